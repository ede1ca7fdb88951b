//! Jobs and artifacts as JSON. Every field of a job is always there; what is not known or does not apply is null.

use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::{Json, body::Body};
use serde_json::{Map, Value, json};

use crate::clock::rfc3339;
use crate::domain::{Job, JobId, JobKind, JobState, Millis, ModelSpec, StateReason};
use crate::http::{AppState, JOB_ID};
use crate::scheduler::handle::{Expected, ModelQueueView, Position};
use crate::store::read::Artifact;

/// How long a signed URL is good for.
pub const URL_LIFE_S: i64 = 24 * 3_600;
/// Longest answer that is shown within its job.
const INLINE_BYTES_MAX: usize = 64 * 1024;
const POLL_MAX_S: i64 = 30;
const QUEUE_POSITION: HeaderName = HeaderName::from_static("x-queue-position");
const POLL_AFTER_MS: HeaderName = HeaderName::from_static("openai-poll-after-ms");

/// A job as shown, and how soon to ask again.
pub struct JobView {
    /// The object.
    pub json: Value,
    /// Seconds; `None` for a job that has ended.
    pub poll_after_s: Option<i64>,
}

/// The whole job (`position`: if it is known already): place in line, progress, artifacts, and a short answer.
pub async fn full(state: &AppState, job: &Job, position: Option<Position>) -> JobView {
    let now = state.clock.now();
    let mut object = listed(state, job);
    let mut poll_after_s = (!job.state.is_terminal()).then_some(1);
    match job.state {
        JobState::Queued => {
            let position = match position {
                Some(position) => position,
                None => state.handle.position(job).await,
            };
            poll_after_s = Some(poll_after(position.eta_start.map(|eta| eta.about), now));
            object.insert("queue".into(), queue(&position));
        }
        JobState::Running | JobState::Cancelling => {
            object.insert("progress".into(), progress(state, job).await);
        }
        JobState::Succeeded if job.emptied_at.is_none() => {
            let artifacts = state.reader.artifacts(job.id).await.unwrap_or_default();
            object.insert("result".into(), result(state, job).await);
            object.insert("artifacts".into(), artifacts_json(state, job.id, &artifacts));
        }
        JobState::Succeeded | JobState::Failed | JobState::Cancelled | JobState::Expired => {}
    }
    JobView { json: Value::Object(object), poll_after_s }
}

/// What the job's row says, as lists show it.
pub fn listed(state: &AppState, job: &Job) -> Map<String, Value> {
    let queue = state.handle.queue();
    let model = queue.models.iter().find(|view| view.model == job.model);
    let mut row = row(job, model, state.clock.now());
    let models = state.models();
    let spec = models.specs.iter().find(|spec| spec.name == job.model);
    if waits_unserved(job, spec.map(|spec| &**spec)) {
        row.insert("state_reason".into(), StateReason::ModelBlocked.as_str().into());
    }
    row
}

/// Whether a job waits for a model whose entry does not list its endpoint any more.
fn waits_unserved(job: &Job, spec: Option<&ModelSpec>) -> bool {
    job.state == JobState::Queued
        && job.state_reason == Some(StateReason::WaitingForModel)
        && spec.is_some_and(|spec| !spec.serves(&job.endpoint))
}

fn row(job: &Job, model: Option<&ModelQueueView>, now: Millis) -> Map<String, Value> {
    let at = |at: Option<Millis>| at.map(rfc3339);
    let own = format!("/v1/jobs/{}", job.id);
    let model_state = model.filter(|_| !job.state.is_terminal()).map(|view| view.state.as_str());
    let value = json!({
        "id": job.id.to_string(),
        "object": "job",
        "kind": job.kind.as_str(),
        // Went with the rest of the submission.
        "endpoint": Some(&job.endpoint).filter(|endpoint| !endpoint.is_empty()),
        "model": job.model,
        "state": job.state.as_str(),
        "state_reason": reason(job, model).map(StateReason::as_str),
        "attempt": job.attempt,
        "max_attempts": job.max_attempts,
        "failures": job.failures,
        "crashes": job.crashes,
        "priority": job.priority,
        "version": job.version,
        "created_at": rfc3339(job.created_at),
        "queued_at": rfc3339(job.queued_at),
        "started_at": at(job.started_at),
        "finished_at": at(job.finished_at),
        "delivered_at": at(job.delivered_at),
        "emptied_at": at(job.emptied_at),
        "not_before": at(job.not_before),
        "start_deadline": at(job.start_deadline),
        "deadline": at(job.deadline),
        "timeout_s": seconds(job.timeout_ms),
        "progress": null,
        "queue": null,
        "model_state": model_state,
        "batch_id": job.batch.map(|batch| batch.to_string()),
        "custom_id": job.custom_id,
        "metadata": job.metadata,
        "usage": job.usage,
        "timings": timings(job, now),
        "result": null,
        "artifacts": [],
        "error": job.error,
        "retry_of": job.retry_of.map(|id| id.to_string()),
        "urls": {
            "self": own,
            "events": format!("{own}/events"),
            "cancel": format!("{own}/cancel"),
            "response": format!("{own}/response"),
        },
    });
    match value {
        Value::Object(object) => object,
        _ => Map::new(),
    }
}

/// A job that waits for its model says what the model waits for.
fn reason(job: &Job, model: Option<&ModelQueueView>) -> Option<StateReason> {
    match job.state_reason {
        Some(StateReason::WaitingForModel) => model.and_then(|view| view.state_reason).or(job.state_reason),
        other => other,
    }
}

#[expect(clippy::cast_precision_loss, reason = "times of jobs are far below 2^52 ms")]
fn seconds(ms: i64) -> f64 {
    ms as f64 / 1e3
}

/// `queue_s` until the latest start, loads included; `load_s` of it for loads; `run_s` of the latest attempt.
fn timings(job: &Job, now: Millis) -> Value {
    let started = job.started_at.filter(|_| job.state != JobState::Queued);
    let until_start = started.or(job.finished_at).unwrap_or(now);
    let run = started.map(|at| seconds(job.finished_at.unwrap_or(now) - at));
    json!({"queue_s": seconds(until_start - job.created_at), "load_s": seconds(job.load_ms), "run_s": run, "gpu_s": job.gpu_ms.round() / 1e3})
}

fn queue(position: &Position) -> Value {
    json!({
        "position": position.position,
        "ahead_same_model": position.ahead_same_model,
        "swaps_ahead": position.swaps_ahead,
        "eta_start": range(position.eta_start),
        "eta_finish": range(position.eta_finish),
        "eta_confidence": Some(position.eta_confidence).filter(|text| !text.is_empty()),
        "reason": position.reason,
    })
}

/// Times between which something should happen.
pub fn range(expected: Option<Expected>) -> Value {
    json!(expected.map(|at| [rfc3339(at.from), rfc3339(at.to)]))
}

/// A queued job is worth a look after a quarter of its wait.
fn poll_after(eta_start: Option<Millis>, now: Millis) -> i64 {
    eta_start.map_or(5, |eta| (eta - now) / 4_000).clamp(1, POLL_MAX_S)
}

/// The figures of the latest progress event of this attempt. Text jobs have none.
async fn progress(state: &AppState, job: &Job) -> Value {
    if matches!(job.kind, JobKind::Chat | JobKind::Completion) {
        return Value::Null;
    }
    let latest = state.reader.latest_event(job.id, job.attempt, "job.progress").await;
    latest.ok().flatten().and_then(|event| event.body.get("progress").cloned()).unwrap_or(Value::Null)
}

/// Where the answer is; short JSON answers are in it.
async fn result(state: &AppState, job: &Job) -> Value {
    let body_url = format!("/v1/jobs/{}/response", job.id);
    if matches!(job.kind, JobKind::Image | JobKind::Audio) {
        let body = if job.kind == JobKind::Image { image_body(state, job.id).await } else { None };
        return json!({"status_code": 200, "body": body, "body_url": body_url});
    }
    let Ok(Some(answer)) = state.reader.answer(job.id).await else {
        return Value::Null;
    };
    let is_short = answer.body.len() <= INLINE_BYTES_MAX && answer.content_type.starts_with("application/json");
    let body = is_short.then(|| super::openai::answer::named(job, &answer.body));
    let body: Option<Value> = body.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    if body.is_some() {
        state.delivered(job.id);
    }
    json!({"status_code": answer.status, "body": body, "body_url": body_url})
}

/// What an answer says about its images (seeds, size, settings), with links in their place.
async fn image_body(state: &AppState, id: JobId) -> Option<Value> {
    let body = state.reader.kept_body(id).await.ok()?.filter(|body| body.len() <= INLINE_BYTES_MAX)?;
    let expires_s = url_expiry_s(state);
    with_links(&body, |artifact| artifact_url(state, id, artifact, expires_s))
}

fn with_links(body: &[u8], url: impl Fn(&str) -> String) -> Option<Value> {
    let mut answer: Value = serde_json::from_slice(body).ok()?;
    for image in answer.get_mut("data")?.as_array_mut()? {
        let url = image.pointer("/b64_json/$artifact").and_then(Value::as_str).map(&url);
        if let (Some(url), Some(image)) = (url, image.as_object_mut()) {
            image.shift_remove("b64_json");
            image.shift_insert(0, "url".to_owned(), json!(url));
        }
    }
    Some(answer)
}

/// A job's artifacts with URLs that open them without a key.
pub fn artifacts_json(state: &AppState, id: JobId, artifacts: &[Artifact]) -> Value {
    let expires_s = url_expiry_s(state);
    artifacts
        .iter()
        .map(|artifact| {
            json!({
                "id": artifact.id,
                "name": artifact.name,
                "mime": artifact.mime,
                "bytes": artifact.bytes,
                "sha256": artifact.sha256,
                "url": artifact_url(state, id, &artifact.id, expires_s),
                "expires_at": rfc3339(expires_s * 1_000),
            })
        })
        .collect()
}

/// When a URL that is signed now ends, in seconds since the epoch.
pub fn url_expiry_s(state: &AppState) -> i64 {
    state.clock.now() / 1_000 + URL_LIFE_S
}

/// A signed URL: absolute if the server knows its public address, else relative to it.
pub fn artifact_url(state: &AppState, id: JobId, artifact: &str, expires_s: i64) -> String {
    let signed = state.signer.sign(&format!("/v1/jobs/{id}/artifacts/{artifact}"), expires_s);
    match &state.server.public_url {
        Some(public_url) => format!("{}{signed}", public_url.trim_end_matches('/')),
        None => signed,
    }
}

/// A job as a response: its version as ETag, advice on polling, and with 202 where to find it.
pub async fn respond(state: &AppState, status: StatusCode, job: &Job) -> Response {
    respond_at(state, status, job, None).await
}

/// The same, for a job whose place in line is known already.
pub async fn respond_at(state: &AppState, status: StatusCode, job: &Job, position: Option<Position>) -> Response {
    let view = full(state, job, position).await;
    let position = view.json.pointer("/queue/position").and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok());
    let mut response = (status, Json(view.json)).into_response();
    let headers = response.headers_mut();
    job_headers(headers, job);
    set_position(headers, position);
    if status == StatusCode::ACCEPTED {
        set(headers, header::LOCATION, &format!("/v1/jobs/{}", job.id));
    }
    if let Some(seconds) = view.poll_after_s {
        headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        headers.insert(POLL_AFTER_MS, HeaderValue::from(seconds * 1_000));
    }
    response
}

/// The job has not changed since the client looked.
pub fn not_modified(job: &Job) -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NOT_MODIFIED;
    job_headers(response.headers_mut(), job);
    response
}

/// The job's version as `ETag`.
pub fn etag(version: i64) -> String {
    format!("\"v{version}\"")
}

fn job_headers(headers: &mut HeaderMap, job: &Job) {
    set(headers, JOB_ID, &job.id.to_string());
    set(headers, header::ETAG, &etag(job.version));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
}

/// `X-Queue-Position`: jobs that the current plan starts first, while the job waits.
pub fn set_position(headers: &mut HeaderMap, position: Option<usize>) {
    if let Some(position) = position {
        headers.insert(QUEUE_POSITION, HeaderValue::from(position));
    }
}

/// Sets a header to a text of ours.
pub fn set(headers: &mut HeaderMap, name: HeaderName, text: &str) {
    if let Ok(value) = HeaderValue::from_str(text) {
        headers.insert(name, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{BatchId, ErrorCode, Face, JobError, ModelState};

    #[test]
    fn a_kept_answer_shows_links_and_all_that_is_said_about_the_images() {
        let kept = json!({"data": [{"b64_json": {"$artifact": "art_0"}, "seed": 7}, {"seed": 8}], "size": "64x64"});
        let shown = with_links(kept.to_string().as_bytes(), |artifact| format!("/{artifact}")).unwrap();
        assert_eq!(shown, json!({"data": [{"url": "/art_0", "seed": 7}, {"seed": 8}], "size": "64x64"}));
        assert_eq!(with_links(b"RIFF", |_| String::new()), None);
    }

    fn job() -> Job {
        Job {
            id: JobId::new(1_790_000_000_000, 7, 9),
            kind: JobKind::Image,
            endpoint: "/v1/images/generations".into(),
            model: "flux".into(),
            tenant: "default".into(),
            batch: Some(BatchId(3)),
            custom_id: None,
            face: Face::Async,
            state: JobState::Queued,
            state_reason: Some(StateReason::WaitingForModel),
            priority: 5,
            attempt: 0,
            failures: 0,
            crashes: 0,
            max_attempts: 3,
            version: 2,
            batch_key: 1,
            stream: false,
            present: crate::domain::job::Present::default(),
            created_at: 1_790_000_000_000,
            queued_at: 1_790_000_000_000,
            started_at: None,
            finished_at: None,
            not_before: None,
            start_deadline: None,
            deadline: None,
            timeout_ms: 300_000,
            metadata: [("run".to_owned(), "42".to_owned())].into(),
            retry_of: None,
            error: None,
            usage: None,
            load_ms: 1_500,
            gpu_ms: 250.0,
            delivered_at: None,
            emptied_at: None,
        }
    }

    fn model(reason: Option<StateReason>) -> ModelQueueView {
        ModelQueueView {
            paused: false,
            draining: false,
            pinned: false,
            batching: Vec::new(),
            parking: None,
            model: "flux".into(),
            queued: 1,
            queued_interactive: 0,
            running: 0,
            oldest_age_s: None,
            resident: false,
            est_wait_s: None,
            swap_cost_s: 1.0,
            due_at: None,
            state: ModelState::Loading,
            state_reason: reason,
            trouble: None,
            last_failure: None,
            fetch: None,
        }
    }

    #[test]
    fn a_queued_job_as_shown() {
        let shown = Value::Object(row(&job(), Some(&model(Some(StateReason::ModelLoading))), 1_790_000_002_500));
        let id = job().id.to_string();
        assert_eq!(
            shown,
            json!({
                "id": id, "object": "job", "kind": "image", "endpoint": "/v1/images/generations", "model": "flux",
                "state": "queued", "state_reason": "model_loading", "attempt": 0, "max_attempts": 3, "failures": 0,
                "crashes": 0, "priority": 5, "version": 2, "created_at": "2026-09-21T14:13:20.000Z", "queued_at": "2026-09-21T14:13:20.000Z",
                "started_at": null, "finished_at": null, "delivered_at": null, "emptied_at": null, "not_before": null, "start_deadline": null, "deadline": null,
                "timeout_s": 300.0, "progress": null, "queue": null, "model_state": "loading",
                "batch_id": "batch_0000000000000003", "custom_id": null, "metadata": {"run": "42"}, "usage": null,
                "timings": {"queue_s": 2.5, "load_s": 1.5, "run_s": null, "gpu_s": 0.25}, "result": null, "artifacts": [],
                "error": null, "retry_of": null,
                "urls": {"self": format!("/v1/jobs/{id}"), "events": format!("/v1/jobs/{id}/events"),
                    "cancel": format!("/v1/jobs/{id}/cancel"), "response": format!("/v1/jobs/{id}/response")},
            })
        );
    }

    #[test]
    fn a_job_of_its_own_reason_keeps_it() {
        let backing_off = Job { state_reason: Some(StateReason::RetryBackoff), ..job() };
        assert_eq!(reason(&backing_off, Some(&model(Some(StateReason::NoGpu)))), Some(StateReason::RetryBackoff));
        assert_eq!(reason(&job(), Some(&model(None))), Some(StateReason::WaitingForModel));
        assert_eq!(reason(&job(), None), Some(StateReason::WaitingForModel));
    }

    #[test]
    fn an_ended_job_has_times_and_an_error_and_no_model_state() {
        let ended = Job {
            state: JobState::Failed,
            state_reason: None,
            started_at: Some(1_790_000_001_000),
            finished_at: Some(1_790_000_004_000),
            error: Some(JobError::new(ErrorCode::WorkerOom, "out of memory", true)),
            ..job()
        };
        let shown = row(&ended, Some(&model(None)), 0);
        assert_eq!(shown["timings"], json!({"queue_s": 1.0, "load_s": 1.5, "run_s": 3.0, "gpu_s": 0.25}));
        assert_eq!(shown["error"]["code"], "worker_oom");
        assert_eq!((&shown["model_state"], &shown["state_reason"]), (&Value::Null, &Value::Null));
    }

    #[test]
    fn polling_is_advised_by_the_wait_that_is_left() {
        assert_eq!(poll_after(Some(41_000), 1_000), 10);
        assert_eq!(poll_after(Some(1_000_000), 0), 30);
        assert_eq!(poll_after(Some(0), 9_000), 1);
        assert_eq!(poll_after(None, 0), 5);
    }
}
