//! The native face: submit, look, list, cancel, retry.

use std::time::Duration;

use axum::extract::{Extension, OriginalUri, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::{Json, http::Uri};
use bytes::Bytes;
use serde_json::{Value, json};

use crate::domain::{BatchId, ErrorCode, Face, Job, JobId, JobKind, JobState, NewJob};
use crate::http::auth::Caller;
use crate::http::body::{self, JsonObject, Segments, shortened};
use crate::http::error::ApiError;
use crate::http::openai::hops::{self, Prefer, WAIT_MAX_S};
use crate::http::openai::{Waited, wait_for_end};
use crate::http::prepare::PRIORITY_ASYNC;
use crate::http::submit::{Submitted, submit};
use crate::http::waiters::{Guard, Role, release};
use crate::http::{AppState, idempotency, view};
use crate::scheduler::hub::JobWatch;
use crate::store::StoreError;
use crate::store::read::JobFilter;

pub mod artifacts;
pub mod bulk;
pub mod events;
pub mod response;
pub mod submission;

const LIST_DEFAULT: u64 = 20;
const LIST_MAX: u64 = 100;

/// An id from a path; texts that are no ids are simply not found.
pub(crate) fn job_id(text: &str) -> Result<JobId, ApiError> {
    text.parse().map_err(|error: crate::domain::IdError| ApiError::new(ErrorCode::NotFound, error.to_string()))
}

/// `POST /v1/jobs`
pub async fn create(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    OriginalUri(uri): OriginalUri,
    headers: HeaderMap,
    JsonObject(object): JsonObject,
) -> Result<Response, ApiError> {
    no_fields(&uri)?;
    let key = idempotency::key(&headers, &caller, "/v1/jobs", "", &object)?;
    let job = submission::read(&state.models(), object, submission::Source::one(caller.tenant, state.clock.now()))?;
    let (submitted, _) = submit(&state, job, key).await?;
    accepted(&state, submitted, Prefer::read(&headers).wait_s).await
}

/// A submission's query has no fields: who writes `?wait=` there would be answered at once.
fn no_fields(uri: &Uri) -> Result<(), ApiError> {
    let Some((name, _)) = body::query(uri)?.into_iter().next() else { return Ok(()) };
    let name = shortened(&name);
    let message = format!(
        "`{name}` is not a field here: this query has none; to wait for the job's end, send the header `Prefer: wait=SECONDS`"
    );
    Err(ApiError::invalid(&name, message))
}

/// 202 with the job, or 200 if it ended within `wait_s`.
async fn accepted(state: &AppState, submitted: Submitted, wait_s: Option<u64>) -> Result<Response, ApiError> {
    let Submitted { mut job, mut watch, mut position, replayed } = submitted;
    let mut status = StatusCode::ACCEPTED;
    if let Some(seconds) = wait_s {
        wait_for_end(state, &job, &mut watch, Duration::from_secs(seconds)).await;
        job = state.reader.job(job.id).await?;
        position = None;
        if job.state.is_terminal() {
            status = StatusCode::OK;
        }
    }
    let mut response = view::respond_at(state, status, &job, position).await;
    hops::applied(response.headers_mut(), false, wait_s);
    Ok(idempotency::mark(response, replayed))
}

/// `GET /v1/jobs/{id}`
pub async fn get(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segments(id): Segments<String>,
    OriginalUri(uri): OriginalUri,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let id = job_id(&id)?;
    let query = body::query(&uri)?;
    let wait_s = body::number(&query, "wait")?.unwrap_or(0).min(WAIT_MAX_S);
    let until = Until::read(body::field(&query, "until"))?;
    let known = known_version(&headers);
    // Watched before it is read, so that nothing is missed in between.
    let watch = state.handle.watch(id);
    let mut job = state.job(&caller, id).await?;
    if wait_s > 0 && !job.state.is_terminal() {
        let guard = onlooker(&state, &job);
        wait(&state, &job, watch, until, known, Duration::from_secs(wait_s)).await;
        release(guard, Guard::hand_over);
        job = state.job(&caller, id).await?;
    }
    if known == Some(job.version) {
        return Ok(view::not_modified(&job));
    }
    Ok(view::respond(&state, StatusCode::OK, &job).await)
}

/// Whoever looks at a sync job keeps it alive while they do.
pub(crate) fn onlooker(state: &AppState, job: &Job) -> Option<Guard> {
    (job.face == Face::Sync && !job.state.is_terminal()).then(|| state.waiters.wait(job.id, Role::Onlooker))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Until {
    Terminal,
    Change,
}

impl Until {
    fn read(text: Option<&str>) -> Result<Self, ApiError> {
        match text {
            None | Some("terminal") => Ok(Self::Terminal),
            Some("change") => Ok(Self::Change),
            Some(other) => {
                Err(ApiError::invalid("until", format!("until must be terminal or change, not `{}`", shortened(other))))
            }
        }
    }
}

/// The version of an `If-None-Match: "v<n>"`.
fn known_version(headers: &HeaderMap) -> Option<i64> {
    let tag = headers.get(header::IF_NONE_MATCH)?.to_str().ok()?.trim();
    tag.trim_start_matches("W/").strip_prefix("\"v")?.strip_suffix('"')?.parse().ok()
}

async fn wait(state: &AppState, job: &Job, mut watch: JobWatch, until: Until, known: Option<i64>, time: Duration) {
    match until {
        Until::Terminal => {
            let _: Waited = wait_for_end(state, job, &mut watch, time).await;
        }
        Until::Change if known.is_some_and(|known| known != job.version) => {}
        Until::Change => {
            let change = async { while watch.changed().await.version <= job.version {} };
            tokio::select! {
                () = change => {}
                () = tokio::time::sleep(time) => {}
                () = state.tasks.soft().cancelled() => {}
            }
        }
    }
}

/// `GET /v1/jobs`
pub async fn list(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    OriginalUri(uri): OriginalUri,
) -> Result<Response, ApiError> {
    let filter = read_filter(&state, &caller, &uri)?;
    let page = state.reader.jobs(&filter).await?;
    let data: Vec<Value> = page.jobs.iter().map(|job| Value::Object(view::listed(&state, job))).collect();
    let id = |job: Option<&Job>| job.map(|job| job.id.to_string());
    let body = json!({
        "object": "list",
        "first_id": id(page.jobs.first()),
        "last_id": id(page.jobs.last()),
        "has_more": page.has_more,
        "data": data,
    });
    Ok(Json(body).into_response())
}

fn read_filter(state: &AppState, caller: &Caller, uri: &Uri) -> Result<JobFilter, ApiError> {
    const FIELDS: [&str; 8] = ["state", "model", "kind", "batch_id", "metadata[key]", "limit", "after", "order"];
    let mut filter =
        JobFilter { tenant: Some(caller.tenant.to_string()), limit: LIST_DEFAULT as u32, ..JobFilter::default() };
    let query = body::query(uri)?;
    for (name, value) in &query {
        let words = |words: Vec<&str>| {
            ApiError::invalid(name, format!("{name} must be one of {}, not `{}`", words.join(", "), shortened(value)))
        };
        match name.as_str() {
            "state" => {
                let all = || words(JobState::ALL.iter().map(|state| state.as_str()).collect());
                filter.state = Some(JobState::parse(value).ok_or_else(all)?);
            }
            "kind" => {
                let all = || words(JobKind::ALL.iter().map(|kind| kind.as_str()).collect());
                filter.kind = Some(JobKind::parse(value).ok_or_else(all)?);
            }
            "model" => filter.model = Some(state.models().get(value).map_or(value.clone(), |spec| spec.name.clone())),
            "batch_id" => {
                let batch: Result<BatchId, String> = value.parse();
                filter.batch = Some(batch.map_err(|message| ApiError::invalid("batch_id", message))?);
            }
            "limit" => {
                let limit = body::number(&query, "limit")?.filter(|limit| (1..=LIST_MAX).contains(limit));
                let limit = limit.and_then(|limit| u32::try_from(limit).ok());
                filter.limit = limit.ok_or_else(|| ApiError::invalid("limit", "limit must be 1 to 100"))?;
            }
            "after" => filter.after = Some(job_id(value).map_err(|e| ApiError::invalid("after", e.message.clone()))?),
            "order" => match value.as_str() {
                "asc" => filter.ascending = true,
                "desc" => filter.ascending = false,
                _ => return Err(words(vec!["asc", "desc"])),
            },
            _ => match name.strip_prefix("metadata[").and_then(|rest| rest.strip_suffix(']')) {
                Some(key) => filter.metadata.push((key.to_owned(), value.clone())),
                None => return Err(body::unknown_field(name, &FIELDS)),
            },
        }
    }
    Ok(filter)
}

/// `POST /v1/jobs/{id}/cancel`; whatever the body is, it is not read.
pub async fn cancel(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segments(id): Segments<String>,
    OriginalUri(uri): OriginalUri,
) -> Result<Response, ApiError> {
    let id = job_id(&id)?;
    let strict = body::flag(&body::query(&uri)?, "strict")?;
    let before = state.job(&caller, id).await?;
    if before.state.is_terminal() {
        if strict {
            let message = format!("the job is {} already", before.state);
            return Err(ApiError::new(ErrorCode::JobAlreadyTerminal, message).about(id));
        }
        return Ok(view::respond(&state, StatusCode::OK, &before).await);
    }
    let job = state.handle.cancel(id, ErrorCode::CancelledByUser).await?;
    Ok(view::respond(&state, StatusCode::OK, &job).await)
}

/// `POST /v1/jobs/{id}/retry`: the same request as a new job.
pub async fn retry(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segments(id): Segments<String>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let id = job_id(&id)?;
    let old = state.job(&caller, id).await?;
    if !old.state.is_terminal() {
        let message = format!("the job is {}: cancel it first, or wait for its end", old.state);
        return Err(ApiError::new(ErrorCode::JobNotTerminal, message).about(id));
    }
    // It may have been renamed since, with its old name as an alias.
    let model = state.models().get(&old.model)?.name.clone();
    let body = state.reader.body(id).await.map_err(|error| match error {
        StoreError::NotFound | StoreError::Expired => {
            ApiError::new(ErrorCode::ResultExpired, "the request is past its retention; submit it anew").about(id)
        }
        error => error.into(),
    })?;
    let (submitted, _) = submit(&state, NewJob { model, ..again(&old, body, state.clock.now()) }, None).await?;
    accepted(&state, submitted, Prefer::read(&headers).wait_s).await
}

/// The same request, asynchronous, with its deadlines counted from now.
fn again(old: &Job, body: Bytes, now: i64) -> NewJob {
    let from_now = |deadline: Option<i64>| deadline.map(|at| now + (at - old.created_at));
    let priority = if old.face == Face::Sync { PRIORITY_ASYNC } else { old.priority };
    NewJob {
        endpoint: old.endpoint.clone(),
        model: old.model.clone(),
        tenant: old.tenant.clone(),
        batch: None,
        custom_id: old.custom_id.clone(),
        face: Face::Async,
        priority,
        body,
        // Earlier versions stored one bit more.
        batch_key: old.batch_key & i64::MAX,
        stream: old.stream,
        present: old.present.clone(),
        start_deadline: from_now(old.start_deadline),
        deadline: from_now(old.deadline),
        timeout_ms: old.timeout_ms,
        max_attempts: old.max_attempts,
        metadata: old.metadata.clone(),
        retry_of: Some(old.id),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn etags_are_read_strong_or_weak() {
        let known = |tag: &str| known_version(&HeaderMap::from_iter([(header::IF_NONE_MATCH, tag.parse().unwrap())]));
        assert_eq!(known(&view::etag(12)), Some(12));
        assert_eq!(known("W/\"v3\""), Some(3));
        for other in ["*", "v3", "\"3\"", "\"vx\""] {
            assert_eq!(known(other), None, "{other}");
        }
    }
}
