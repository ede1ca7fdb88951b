//! The only place where error codes become HTTP statuses, retry headers and bodies. One body on every face: RFC 9457
//! members plus OpenAI's inner `error` object.

use std::ops::{Deref, DerefMut};

use axum::body::Body;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

use crate::domain::{ErrorCode, JobError, JobId};
use crate::scheduler::handle::SubmitError;
use crate::store::StoreError;

/// Longest `Retry-After`: the Node SDK ignores longer ones and retries at once.
pub const RETRY_AFTER_MAX_S: u64 = 60;

const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// What the SDKs are told about sending the request again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Retry {
    /// Nothing: the status speaks for itself.
    Unsaid,
    /// `x-should-retry: false`: it would not help, or we have retried already.
    Never,
    /// `Retry-After`, in seconds, unless the error knows better.
    After(u64),
}

/// What a code means over HTTP.
#[derive(Clone, Copy, Debug)]
struct Meaning {
    status: u16,
    title: &'static str,
    retry: Retry,
}

/// The table. Job-level codes are those of an answer on the sync face.
fn meaning(code: ErrorCode) -> Meaning {
    use ErrorCode as C;
    let (status, title, retry) = match code {
        C::InvalidJson => (400, "The body is not JSON", Retry::Unsaid),
        C::InvalidRequest => (400, "The request is invalid", Retry::Unsaid),
        C::UnsupportedParameter => (400, "A parameter is not supported", Retry::Unsaid),
        C::ContextLengthExceeded => (400, "The prompt is too long for the model", Retry::Unsaid),
        C::InvalidApiKey => (401, "The API key is missing or wrong", Retry::Unsaid),
        C::Forbidden => (403, "Not allowed", Retry::Unsaid),
        C::ModelNotFound => (404, "No such model", Retry::Unsaid),
        C::NotFound => (404, "Not found", Retry::Unsaid),
        C::MethodNotAllowed => (405, "The method is not served on this path", Retry::Unsaid),
        C::JobNotTerminal => (409, "The job has not ended yet", Retry::Never),
        C::JobAlreadyTerminal => (409, "The job has ended already", Retry::Never),
        C::ResultExpired => (410, "The result is past its retention", Retry::Unsaid),
        C::IdempotencyKeyReused => (422, "The idempotency key was used for another request", Retry::Unsaid),
        C::PayloadTooLarge => (413, "The body is too large", Retry::Unsaid),
        C::UnsupportedMediaType => (415, "The body is not JSON", Retry::Unsaid),
        C::RateLimited => (429, "Too many requests", Retry::After(1)),
        C::QueueFull => (429, "The queue is full", Retry::After(5)),
        C::Draining => (503, "No new jobs are accepted now", Retry::After(5)),
        C::StorageUnavailable => (503, "The store cannot be used now", Retry::After(1)),
        C::NoWorkerForModel => (503, "No worker can serve this model", Retry::Never),
        C::SyncWaitExceeded => (504, "The call waited as long as it may; its job goes on", Retry::Never),
        C::InternalError => (500, "Something in the server broke", Retry::Unsaid),
        C::QueueDeadlineExceeded => (504, "The job did not start before its deadline", Retry::Never),
        C::DeadlineExceeded => (504, "The job did not end before its deadline", Retry::Never),
        C::ExecutionTimeout => (504, "The job ran longer than it may", Retry::Never),
        C::ModelLoadFailed => (503, "The model does not load", Retry::Never),
        C::WorkerLost => (502, "The worker died, or broke the connection, while it ran the job", Retry::Never),
        C::WorkerOom => (500, "The device ran out of memory", Retry::Never),
        C::WorkerError => (500, "The worker failed on the job", Retry::Never),
        C::InvalidOutput => (502, "The worker's answer cannot be used", Retry::Never),
        C::UpstreamRejected => (502, "The engine refused the request", Retry::Never),
        C::CancelledByUser => (409, "The job was cancelled", Retry::Never),
        C::ClientDisconnected => (409, "The job was cancelled, since nobody waited for it", Retry::Never),
    };
    Meaning { status, title, retry }
}

/// OpenAI's `type` of an error.
fn openai_type(status: u16) -> &'static str {
    match status {
        401 => "authentication_error",
        403 => "permission_error",
        404 | 410 => "not_found_error",
        429 => "rate_limit_error",
        400..=499 => "invalid_request_error",
        _ => "server_error",
    }
}

/// An answer that is no success. Becomes a response at the edge, where the path is known.
#[derive(Clone, Debug, PartialEq)]
pub struct ApiError(Box<Fault>);

/// What is known about an error.
#[derive(Clone, Debug, PartialEq)]
pub struct Fault {
    /// Decides the status.
    pub code: ErrorCode,
    /// For a person: what was wrong and what to do.
    pub message: String,
    /// The request's field at fault.
    pub param: Option<String>,
    /// The job it is about.
    pub job_id: Option<JobId>,
    /// More for a program.
    pub details: Option<Value>,
    retryable: Option<bool>,
    retry_after_s: Option<u64>,
    status: Option<StatusCode>,
    content_range: Option<String>,
    /// Its job is accepted and runs later, so the request is not to be sent again.
    goes_on: bool,
}

impl Deref for ApiError {
    type Target = Fault;

    fn deref(&self) -> &Fault {
        &self.0
    }
}

impl DerefMut for ApiError {
    fn deref_mut(&mut self) -> &mut Fault {
        &mut self.0
    }
}

impl ApiError {
    /// An error with nothing but its code and text.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self(Box::new(Fault {
            code,
            message: message.into(),
            param: None,
            job_id: None,
            details: None,
            retryable: None,
            retry_after_s: None,
            status: None,
            content_range: None,
            goes_on: false,
        }))
    }

    /// A field is missing or wrong.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(ErrorCode::InvalidRequest, message).at(param)
    }

    /// A field we know and do not serve.
    pub fn unsupported(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(ErrorCode::UnsupportedParameter, message).at(param)
    }

    /// No such thing, or another tenant's.
    pub fn not_found(what: &str) -> Self {
        Self::new(ErrorCode::NotFound, format!("{what} does not exist"))
    }

    /// The server stops before an accepted job has its answer.
    pub fn goes_on(id: JobId) -> Self {
        let message = format!(
            "the server stops before this answer is there; the job was accepted and goes on when the server is up again: do not \
             send the request again, but fetch the answer from /v1/jobs/{id}/response, and soon (the job of a call that nobody \
             comes back for is cancelled)"
        );
        let mut error = Self::new(ErrorCode::Draining, message).about(id);
        error.goes_on = true;
        error.retryable = Some(false);
        error
    }

    /// A `Range` outside the file: 416.
    pub fn range_not_satisfiable(bytes: u64) -> Self {
        let message = format!("the range lies outside the file, which has {bytes} bytes");
        let mut error = Self::invalid("Range", message);
        error.status = Some(StatusCode::RANGE_NOT_SATISFIABLE);
        error.content_range = Some(format!("bytes */{bytes}"));
        error
    }

    /// Why a job has no answer.
    pub fn of_job(error: &JobError, job_id: JobId) -> Self {
        let mut shown = Self::without_job(error).about(job_id);
        shown.status = (error.code == ErrorCode::UpstreamRejected).then(|| upstream_status(error)).flatten();
        shown
    }

    fn without_job(error: &JobError) -> Self {
        let mut shown = Self::new(error.code, error.message.clone());
        shown.param.clone_from(&error.param);
        shown.details.clone_from(&error.details);
        shown.retryable = Some(error.retryable);
        shown
    }

    /// Names the field at fault.
    pub fn at(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// The same, seen from one level further out: `model` becomes `body.model`.
    pub fn below(mut self, outer: &str) -> Self {
        self.param = self.param.take().map(|param| format!("{outer}.{param}"));
        self
    }

    /// Names the job.
    pub fn about(mut self, id: JobId) -> Self {
        self.job_id = Some(id);
        self
    }

    /// More for a program.
    pub fn with_details(mut self, details: Value) -> Self {
        self.details = Some(details);
        self
    }

    /// When to come back, in seconds; cut to [`RETRY_AFTER_MAX_S`].
    pub fn after(mut self, seconds: u64) -> Self {
        self.retry_after_s = Some(seconds);
        self
    }

    /// The HTTP status.
    pub fn status(&self) -> StatusCode {
        let table = || StatusCode::from_u16(meaning(self.code).status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        self.status.unwrap_or_else(table)
    }

    fn title(&self) -> &'static str {
        if self.goes_on { "The server stops; the job was accepted and goes on" } else { meaning(self.code).title }
    }

    fn retry(&self) -> Retry {
        if self.goes_on { Retry::Never } else { meaning(self.code).retry }
    }

    fn is_retryable(&self) -> bool {
        self.retryable.unwrap_or(matches!(
            self.code,
            ErrorCode::RateLimited
                | ErrorCode::QueueFull
                | ErrorCode::Draining
                | ErrorCode::StorageUnavailable
                | ErrorCode::InternalError
        ))
    }

    /// OpenAI's inner object.
    pub fn inner(&self) -> Value {
        let mut inner = Map::new();
        inner.insert("message".into(), json!(self.message));
        inner.insert("type".into(), json!(openai_type(self.status().as_u16())));
        inner.insert("code".into(), json!(self.code.as_str()));
        inner.insert("param".into(), json!(self.param));
        inner.insert("retryable".into(), json!(self.is_retryable()));
        if let Some(id) = self.job_id {
            inner.insert("job_id".into(), json!(id.to_string()));
        }
        if let Some(details) = &self.details {
            inner.insert("details".into(), details.clone());
        }
        Value::Object(inner)
    }

    /// The whole body; `instance`: the path it is about.
    pub fn body(&self, instance: &str) -> Value {
        json!({
            "type": format!("urn:roundhouse:error:{}", self.code),
            "title": self.title(),
            "status": self.status().as_u16(),
            "detail": self.message,
            "instance": instance,
            "error": self.inner(),
        })
    }

    /// The response on `path`: problem+json on native paths, plain JSON on OpenAI's.
    pub fn render(&self, path: &str) -> Response {
        let content_type = if is_openai(path) { "application/json" } else { "application/problem+json" };
        let mut response = Response::new(Body::from(self.body(path).to_string()));
        *response.status_mut() = self.status();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
        if self.status() == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(id) = self.job_id.and_then(|id| HeaderValue::from_str(&id.to_string()).ok()) {
            headers.insert(super::JOB_ID, id);
        }
        if let Some(range) = self.content_range.as_deref().and_then(|range| HeaderValue::from_str(range).ok()) {
            headers.insert(header::CONTENT_RANGE, range);
        }
        match self.retry() {
            Retry::Unsaid => {}
            Retry::Never => {
                headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"));
            }
            Retry::After(seconds) => {
                let seconds = self.retry_after_s.unwrap_or(seconds).clamp(1, RETRY_AFTER_MAX_S);
                headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
            }
        }
        response
    }
}

/// Whether a path belongs to OpenAI's face, whose clients expect `application/json` errors.
pub fn is_openai(path: &str) -> bool {
    const FACES: [&str; 5] = ["/v1/chat/", "/v1/completions", "/v1/images/", "/v1/audio/", "/v1/models"];
    FACES.iter().any(|face| path.starts_with(face)) || path.ends_with("/response")
}

/// The engine's own status, if it is an error status.
fn upstream_status(error: &JobError) -> Option<StatusCode> {
    let status = error.details.as_ref()?.get("status")?.as_u64()?;
    let status = StatusCode::from_u16(u16::try_from(status).ok()?).ok()?;
    (status.is_client_error() || status.is_server_error()).then_some(status)
}

impl IntoResponse for ApiError {
    /// Carries the error to the outermost layer, which knows the path and calls [`ApiError::render`].
    fn into_response(self) -> Response {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = self.status();
        response.extensions_mut().insert(self);
        response
    }
}

/// The error a handler answered with, if it did.
pub fn taken_from(response: &mut Response) -> Option<ApiError> {
    response.extensions_mut().remove()
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::NotFound => Self::not_found("the job"),
            StoreError::Expired => Self::new(
                ErrorCode::ResultExpired,
                "what the job held was deleted: it was past its retention, or had been fetched and room was needed (storage.quota)",
            ),
            StoreError::KeyReused => Self::new(
                ErrorCode::IdempotencyKeyReused,
                "this Idempotency-Key came with another body before: use a new key for a new request",
            )
            .at("Idempotency-Key"),
            StoreError::DiskFull(reason) => {
                // That it begins and ends is logged by the store.
                tracing::debug!("a request was refused: {reason}");
                Self::new(ErrorCode::StorageUnavailable, "no room on the server's disk for new jobs; try again later")
            }
            error @ StoreError::OverQuota { .. } => {
                Self::new(ErrorCode::StorageUnavailable, error.to_string()).after(10)
            }
            StoreError::Full => {
                Self::new(ErrorCode::QueueFull, "more submissions wait for the disk than may; try again shortly").after(1)
            }
            // The store was lost in the middle: what it was asked for may be in the file all the same.
            StoreError::Stopped => Self::new(
                ErrorCode::StorageUnavailable,
                "the server is stopping since its database cannot be trusted any more; whether this was stored is not known: ask \
                 again under the same Idempotency-Key",
            )
            .after(5),
            error if error.is_lost_file() => {
                tracing::error!("a file of a job is lost: {error}");
                let message = "a file of this job is lost or damaged on the server; it has to be restored from a backup";
                Self::new(ErrorCode::InternalError, message)
            }
            error => {
                tracing::error!("the store failed a request: {error}");
                Self::new(ErrorCode::StorageUnavailable, "the database cannot be used now; the server's log says why")
            }
        }
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        let message = error.to_string();
        match error {
            SubmitError::QueueFull { full, retry_after_s } => Self::new(ErrorCode::QueueFull, message)
                .with_details(json!({"queued": full.queued, "limit": full.limit, "key": full.key}))
                .after(retry_after_s),
            SubmitError::TooMany(full) => {
                Self::invalid("requests", message).with_details(json!({"limit": full.limit, "key": full.key}))
            }
            SubmitError::ModelLoadFailed(error) | SubmitError::TooBig(error) => Self::without_job(&error),
            SubmitError::Draining | SubmitError::Drained { .. } => Self::new(ErrorCode::Draining, message),
            SubmitError::Store(error) => error.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The contract of every code: code, status, OpenAI type, retry advice.
    const TABLE: &str = "\
invalid_json 400 invalid_request_error -
invalid_request 400 invalid_request_error -
unsupported_parameter 400 invalid_request_error -
context_length_exceeded 400 invalid_request_error -
invalid_api_key 401 authentication_error -
forbidden 403 permission_error -
model_not_found 404 not_found_error -
not_found 404 not_found_error -
method_not_allowed 405 invalid_request_error -
job_not_terminal 409 invalid_request_error never
job_already_terminal 409 invalid_request_error never
result_expired 410 not_found_error -
idempotency_key_reused 422 invalid_request_error -
payload_too_large 413 invalid_request_error -
unsupported_media_type 415 invalid_request_error -
rate_limited 429 rate_limit_error after 1
queue_full 429 rate_limit_error after 5
draining 503 server_error after 5
storage_unavailable 503 server_error after 1
no_worker_for_model 503 server_error never
sync_wait_exceeded 504 server_error never
internal_error 500 server_error -
queue_deadline_exceeded 504 server_error never
deadline_exceeded 504 server_error never
execution_timeout 504 server_error never
model_load_failed 503 server_error never
worker_lost 502 server_error never
worker_oom 500 server_error never
worker_error 500 server_error never
invalid_output 502 server_error never
upstream_rejected 502 server_error never
cancelled_by_user 409 invalid_request_error never
client_disconnected 409 invalid_request_error never
";

    #[test]
    fn a_store_that_is_behind_or_full_says_when_to_come_again() {
        let header = |error: StoreError| {
            let response = ApiError::from(error).render("/v1/jobs");
            let after = response.headers().get("retry-after").and_then(|v| v.to_str().ok()).map(str::to_owned);
            (response.status().as_u16(), after)
        };
        assert_eq!(header(StoreError::Full), (429, Some("1".to_owned())));
        assert_eq!(header(StoreError::DiskFull("/disk is full".into())), (503, Some("1".to_owned())));
        assert_eq!(header(StoreError::OverQuota { used: 2, quota: 1, live: Some(0) }), (503, Some("10".to_owned())));
    }

    #[test]
    fn the_table_is_the_contract() {
        let shown: String = ErrorCode::ALL
            .iter()
            .map(|code| {
                let response = ApiError::new(*code, "x").render("/v1/jobs");
                let header = |name: &str| response.headers().get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
                let retry = match (header("x-should-retry").as_deref(), header("retry-after")) {
                    (Some("false"), None) => "never".to_owned(),
                    (None, Some(seconds)) => format!("after {seconds}"),
                    (None, None) => "-".to_owned(),
                    other => panic!("{code}: {other:?}"),
                };
                let status = response.status().as_u16();
                format!("{code} {status} {} {retry}\n", openai_type(status))
            })
            .collect();
        assert_eq!(shown, TABLE);
    }

    #[test]
    fn one_body_on_every_face() {
        let error = ApiError::invalid("n", "n must be 1 to 10, not 11");
        assert_eq!(
            error.body("/v1/images/generations"),
            json!({
                "type": "urn:roundhouse:error:invalid_request",
                "title": "The request is invalid",
                "status": 400,
                "detail": "n must be 1 to 10, not 11",
                "instance": "/v1/images/generations",
                "error": {
                    "message": "n must be 1 to 10, not 11",
                    "type": "invalid_request_error",
                    "code": "invalid_request",
                    "param": "n",
                    "retryable": false,
                },
            })
        );
        let type_on = |path: &str| error.render(path).headers()[header::CONTENT_TYPE].to_str().unwrap().to_owned();
        assert_eq!(type_on("/v1/jobs/bulk"), "application/problem+json");
        for path in ["/v1/chat/completions", "/v1/completions", "/v1/audio/speech", "/v1/jobs/job_1/response"] {
            assert_eq!(type_on(path), "application/json", "{path}");
        }
    }

    #[test]
    fn engines_keep_their_status_and_jobs_their_id() {
        let id = JobId::new(1, 2, 3);
        let mut error = JobError::new(ErrorCode::UpstreamRejected, "too hot", false);
        error.details = Some(json!({"status": 422, "body": {"error": "too hot"}}));
        let shown = ApiError::of_job(&error, id);
        assert_eq!(shown.status(), 422);
        assert_eq!(shown.inner()["job_id"], id.to_string());
        assert_eq!(shown.inner()["details"]["body"]["error"], "too hot");
        error.details = Some(json!({"status": 200}));
        assert_eq!(ApiError::of_job(&error, id).status(), 502, "a success is no status of an error");
        let response = shown.render("/v1/chat/completions");
        assert_eq!(response.headers()["x-should-retry"], "false");
        assert_eq!(response.headers()["x-roundhouse-job-id"], id.to_string().as_str());
    }

    #[test]
    fn who_waits_for_an_accepted_job_at_a_stop_is_not_told_to_send_it_again() {
        let id = JobId::new(1, 2, 3);
        let error = ApiError::goes_on(id);
        let response = error.render("/v1/chat/completions");
        assert_eq!(response.status(), 503);
        assert_eq!(response.headers()["x-should-retry"], "false");
        assert!(!response.headers().contains_key(header::RETRY_AFTER));
        let body = error.body("/v1/chat/completions");
        assert_eq!(body["title"], "The server stops; the job was accepted and goes on");
        assert_eq!(body["error"]["code"], "draining");
        assert_eq!((&body["error"]["retryable"], &body["error"]["job_id"]), (&json!(false), &json!(id.to_string())));
        for words in ["accepted", &format!("/v1/jobs/{id}/response"), "do not send"] {
            assert!(body["detail"].as_str().is_some_and(|detail| detail.contains(words)), "{words}: {body}");
        }
    }

    #[test]
    fn retry_after_is_never_longer_than_clients_obey() {
        let response = ApiError::new(ErrorCode::QueueFull, "full").after(3_600).render("/v1/jobs");
        assert_eq!(response.headers()[header::RETRY_AFTER], "60");
    }
}
