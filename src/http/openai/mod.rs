//! The OpenAI-compatible face. A call is a job whose caller holds the line: answered when it ends, by a stream, or by 303
//! hops to the job's `/response` when it takes longer than proxies allow.

use std::time::Duration;

use axum::body::Body;
use axum::extract::{Extension, OriginalUri, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::stream::unfold;
use serde_json::json;

use crate::domain::{ErrorCode, Face, Job, JobId, JobState, NewJob};
use crate::http::auth::Caller;
use crate::http::body::JsonObject;
use crate::http::error::ApiError;
use crate::http::openai::stream::{ChunkStream, Look, Queued, Shape};
use crate::http::prepare::{self, Options, PRIORITY_ASYNC, PRIORITY_SYNC};
use crate::http::submit::{Submitted, submit};
use crate::http::waiters::{Guard, SyncCall, release};
use crate::http::{AppState, JOB_ID, idempotency, view};
use crate::scheduler::hub::{Ended, JobWatch};
use crate::store::IdempotencyKey;

pub mod answer;
pub mod hops;
pub mod rewrite;
pub mod stream;

/// How long a stream's status waits for the first chunk, so that a call that fails at once fails with a real status.
const EARLY: Duration = Duration::from_millis(300);
/// When the server stops at once, how long a caller waits for the end of a stream that it cuts.
pub const LAST_WORD: Duration = Duration::from_secs(1);

/// Any of the shim's POST endpoints; the path is the endpoint.
pub async fn call(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    OriginalUri(uri): OriginalUri,
    headers: HeaderMap,
    JsonObject(body): JsonObject,
) -> Result<Response, ApiError> {
    let prefer = hops::Prefer::read(&headers);
    let (face, priority) =
        if prefer.respond_async { (Face::Async, PRIORITY_ASYNC) } else { (Face::Sync, PRIORITY_SYNC) };
    // A job whose caller holds the line is another one than a job that is come back for.
    let key = idempotency::key(&headers, &caller, uri.path(), face.as_str(), &body)?;
    let job = prepare::prepare(&state.models(), uri.path(), body, Options::new(caller.tenant, face, priority))?;
    if prefer.respond_async {
        return respond_async(&state, job, key, prefer.wait_s).await;
    }
    let place = state.waiters.sync_call(state.live().waiting_sync_max).ok_or_else(|| too_many(&state))?;
    let (submitted, guard) = submit(&state, job, key).await?;
    let Submitted { job, watch, replayed, .. } = submitted;
    if replayed && job.state.is_terminal() {
        return Ok(idempotency::mark(answer::of_terminal(&state, &job).await, true));
    }
    let Some(guard) = guard else {
        return Err(ApiError::new(ErrorCode::InternalError, "a sync job has no guard").about(job.id));
    };
    // The chunks of a stream that began before are gone: whoever asks again waits for the whole answer.
    if job.stream && !replayed {
        return chunks(&state, &job, watch, guard, place).await;
    }
    let wait = hops::hop_time(state.server.sync_hop, &headers);
    Ok(idempotency::mark(hold(&state, &job, watch, Some(guard), 0, wait).await, replayed))
}

fn too_many(state: &AppState) -> ApiError {
    let limit = state.live().waiting_sync_max;
    let key = "waiting_sync_max";
    let message = format!(
        "{limit} sync calls wait already, of {limit} allowed by scheduler.{key}; come back later, or submit by POST /v1/jobs"
    );
    ApiError::new(ErrorCode::QueueFull, message).with_details(json!({"limit": limit, "key": key}))
}

/// `Prefer: respond-async`: the job instead of the answer, unless it ends within `wait`.
async fn respond_async(
    state: &AppState,
    job: NewJob,
    key: Option<IdempotencyKey>,
    wait_s: Option<u64>,
) -> Result<Response, ApiError> {
    let (Submitted { job, mut watch, replayed, .. }, _) = submit(state, job, key).await?;
    if let Some(seconds) = wait_s
        && let Waited::Ended(ended) = wait_for_end(state, &job, &mut watch, Duration::from_secs(seconds)).await
    {
        return Ok(answer::of_ended(state, &job, &ended).await);
    }
    let job = state.reader.job(job.id).await.unwrap_or(job);
    let mut response = view::respond(state, StatusCode::ACCEPTED, &job).await;
    hops::applied(response.headers_mut(), true, wait_s);
    Ok(idempotency::mark(response, replayed))
}

/// How a wait ended.
pub enum Waited {
    /// The job has.
    Ended(std::sync::Arc<Ended>),
    /// The time is up.
    TimeUp,
    /// The server stops, and the job goes on at its next start.
    Draining,
}

/// Waits for a job's end, at most `time`. While the server drains, running jobs are waited for.
pub async fn wait_for_end(state: &AppState, job: &Job, watch: &mut JobWatch, time: Duration) -> Waited {
    let draining = async {
        state.tasks.soft().cancelled().await;
        let is_queued = state.reader.job(job.id).await.is_ok_and(|job| job.state == JobState::Queued);
        if !is_queued {
            state.tasks.hard().cancelled().await;
            // Of others no end comes any more.
            if job.stream {
                tokio::time::sleep(LAST_WORD).await;
            }
        }
    };
    tokio::select! {
        biased;
        ended = watch.ended() => Waited::Ended(ended),
        () = tokio::time::sleep(time) => Waited::TimeUp,
        () = draining => Waited::Draining,
    }
}

/// Holds the line for one hop: the answer, a 303 to the next hop, or 504 after the last.
pub async fn hold(
    state: &AppState,
    job: &Job,
    mut watch: JobWatch,
    guard: Option<Guard>,
    hop: u32,
    time: Duration,
) -> Response {
    let waited = wait_for_end(state, job, &mut watch, time).await;
    match waited {
        Waited::Ended(ended) => {
            release(guard, Guard::answered);
            answer::of_ended(state, job, &ended).await
        }
        Waited::TimeUp if hop < state.server.sync_max_hops => {
            release(guard, Guard::hand_over);
            see_other(state, job, hop + 1).await
        }
        Waited::TimeUp => {
            release(guard, Guard::keep_job);
            let message = format!("no answer within {} hops; the job goes on at /v1/jobs/{}", hop, job.id);
            ApiError::new(ErrorCode::SyncWaitExceeded, message).about(job.id).into_response()
        }
        Waited::Draining => ApiError::goes_on(job.id).into_response(),
    }
}

/// Relative, so that the same origin is asked with the same key.
async fn see_other(state: &AppState, job: &Job, hop: u32) -> Response {
    let id = job.id;
    let position = state.handle.position(job).await;
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SEE_OTHER;
    let headers = response.headers_mut();
    view::set(headers, header::LOCATION, &format!("/v1/jobs/{id}/response?hop={hop}"));
    view::set(headers, JOB_ID, &id.to_string());
    view::set_position(headers, position.position);
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

async fn chunks(
    state: &AppState,
    job: &Job,
    watch: JobWatch,
    guard: Guard,
    place: SyncCall,
) -> Result<Response, ApiError> {
    let shape = Shape::new(job.id, job.kind, &job.present);
    let stages = (state.tasks.soft().clone(), state.tasks.hard().clone());
    let mut chunks = ChunkStream::new(job.id, shape, watch, guard, place, look(state.clone(), job.id), stages);
    if let Some(error) = chunks.early_failure(EARLY).await {
        return Err(error);
    }
    let (handle, id) = (state.handle.clone(), job.id);
    let frames = unfold((chunks, handle), move |(mut chunks, handle)| async move {
        let Some(bytes) = chunks.next().await else {
            if chunks.is_answer() {
                handle.delivered(id);
            }
            return None;
        };
        Some((Ok::<_, std::convert::Infallible>(bytes), (chunks, handle)))
    });
    let mut response = Response::new(Body::from_stream(frames));
    let headers = response.headers_mut();
    sse_headers(headers);
    view::set(headers, JOB_ID, &job.id.to_string());
    Ok(response)
}

/// What proxies must know about an event stream.
pub fn sse_headers(headers: &mut HeaderMap) {
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
}

fn look(state: AppState, id: JobId) -> Look {
    Box::new(move || {
        let state = state.clone();
        Box::pin(async move {
            let job = state.reader.job(id).await.ok().filter(|job| job.state == JobState::Queued)?;
            let position = state.handle.position(&job).await;
            let now = state.clock.now();
            let eta_s = position.eta_start.map(|eta| ((eta.about - now) / 1_000).max(0));
            Some(Queued { position: position.position, eta_s })
        })
    })
}
