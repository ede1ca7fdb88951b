//! `GET /v1/jobs/{id}/response`: the answer as its endpoint would have given it, or the next hop towards it.

use std::time::Duration;

use axum::extract::{Extension, OriginalUri, Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;

use crate::domain::{Face, Job};
use crate::http::auth::Caller;
use crate::http::body;
use crate::http::error::ApiError;
use crate::http::jobs::job_id;
use crate::http::openai::hops::{WAIT_MAX_S, hop_time};
use crate::http::openai::{self, Waited, answer};
use crate::http::waiters::{Guard, Role, release};
use crate::http::{AppState, view};
use crate::scheduler::hub::JobWatch;

/// With `?wait=N`: 202 and the job if there is no answer after N seconds. Else: 303 to itself, one hop further.
pub async fn get(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    OriginalUri(uri): OriginalUri,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let id = job_id(&id)?;
    let query = body::query(&uri)?;
    let hop = body::number(&query, "hop")?.unwrap_or(0);
    let wait_s = body::number(&query, "wait")?.map(|seconds| seconds.min(WAIT_MAX_S));
    let watch = state.handle.watch(id);
    let job = state.job(&caller, id).await?;
    if job.state.is_terminal() {
        return Ok(answer::of_terminal(&state, &job).await);
    }
    let guard = (job.face == Face::Sync).then(|| state.waiters.wait(id, Role::Caller));
    let _place = guard.is_some().then(|| state.waiters.sync_hop());
    match wait_s {
        Some(seconds) => wait(&state, &job, watch, guard, seconds).await,
        None => {
            let time = hop_time(state.server.sync_hop, &headers);
            let hop = u32::try_from(hop).unwrap_or(u32::MAX);
            Ok(openai::hold(&state, &job, watch, guard, hop, time).await)
        }
    }
}

async fn wait(
    state: &AppState,
    job: &Job,
    mut watch: JobWatch,
    guard: Option<Guard>,
    seconds: u64,
) -> Result<Response, ApiError> {
    match openai::wait_for_end(state, job, &mut watch, Duration::from_secs(seconds)).await {
        Waited::Ended(ended) => {
            release(guard, Guard::answered);
            Ok(answer::of_ended(state, job, &ended).await)
        }
        Waited::TimeUp | Waited::Draining => {
            release(guard, Guard::hand_over);
            let job = state.reader.job(job.id).await?;
            if job.state.is_terminal() {
                return Ok(answer::of_terminal(state, &job).await);
            }
            Ok(view::respond(state, StatusCode::ACCEPTED, &job).await)
        }
    }
}
