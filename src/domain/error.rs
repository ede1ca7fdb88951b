//! The codes an error can carry, on every face. What HTTP status a code means is decided in `http/error.rs` alone.

use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident => $text:literal,)*) => {
        /// A machine-readable reason; part of the public contract.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum ErrorCode { $($(#[$doc])* $variant,)* }
        impl ErrorCode {
            /// Every code, for documentation and tests.
            pub const ALL: &'static [ErrorCode] = &[$(ErrorCode::$variant,)*];
            /// The code as it stands in JSON, SQL and logs.
            pub fn as_str(self) -> &'static str { match self { $(ErrorCode::$variant => $text,)* } }
            /// The code for a stored text, if it is one of ours.
            pub fn parse(text: &str) -> Option<Self> { Self::ALL.iter().copied().find(|c| c.as_str() == text) }
        }
    };
}

codes! {
    /// The body is not JSON.
    InvalidJson => "invalid_json",
    /// A field is missing or has a wrong value; `param` names it.
    InvalidRequest => "invalid_request",
    /// A parameter we know and do not support.
    UnsupportedParameter => "unsupported_parameter",
    /// The prompt is longer than the model takes.
    ContextLengthExceeded => "context_length_exceeded",
    /// No key, or a wrong one.
    InvalidApiKey => "invalid_api_key",
    /// The key may not do this.
    Forbidden => "forbidden",
    /// No model of that name.
    ModelNotFound => "model_not_found",
    /// No such job, path or artifact.
    NotFound => "not_found",
    /// The method is not served on this path.
    MethodNotAllowed => "method_not_allowed",
    /// Needs a finished job.
    JobNotTerminal => "job_not_terminal",
    /// The job has ended already.
    JobAlreadyTerminal => "job_already_terminal",
    /// The result is past its retention.
    ResultExpired => "result_expired",
    /// The idempotency key came with another body before.
    IdempotencyKeyReused => "idempotency_key_reused",
    /// A body over the limit.
    PayloadTooLarge => "payload_too_large",
    /// Not JSON where JSON is needed.
    UnsupportedMediaType => "unsupported_media_type",
    /// Too many requests by this caller.
    RateLimited => "rate_limited",
    /// The queue, or the number of waiting sync calls, is at its limit.
    QueueFull => "queue_full",
    /// The server is shutting down.
    Draining => "draining",
    /// The database cannot be written.
    StorageUnavailable => "storage_unavailable",
    /// No worker can serve this model.
    NoWorkerForModel => "no_worker_for_model",
    /// A sync call waited through all its hops; the job goes on.
    SyncWaitExceeded => "sync_wait_exceeded",
    /// Something of ours broke.
    InternalError => "internal_error",
    /// Never started before its deadline.
    QueueDeadlineExceeded => "queue_deadline_exceeded",
    /// Not finished before its deadline.
    DeadlineExceeded => "deadline_exceeded",
    /// One attempt ran longer than `timeout_s`.
    ExecutionTimeout => "execution_timeout",
    /// The model does not load.
    ModelLoadFailed => "model_load_failed",
    /// The worker died, or broke the connection, while it ran this job.
    WorkerLost => "worker_lost",
    /// The device ran out of memory on this job.
    WorkerOom => "worker_oom",
    /// The worker failed on this job.
    WorkerError => "worker_error",
    /// The worker's answer is not what its endpoint promises.
    InvalidOutput => "invalid_output",
    /// The engine refused the request; its status and body are kept.
    UpstreamRejected => "upstream_rejected",
    /// Cancelled by request.
    CancelledByUser => "cancelled_by_user",
    /// Cancelled since nobody waited for the answer any more.
    ClientDisconnected => "client_disconnected",
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why a job ended other than well; stored with the job and shown as the inner object of every error body.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobError {
    /// What kind of trouble.
    pub code: ErrorCode,
    /// For a person: what happened and what to do.
    pub message: String,
    /// The request's field at fault, if one is.
    #[serde(default)]
    pub param: Option<String>,
    /// Whether sending the same request again makes sense.
    pub retryable: bool,
    /// The engine's own status and body for `upstream_rejected`, a log tail for `model_load_failed`, and the like.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub details: Option<serde_json::Value>,
}

impl JobError {
    /// An error without param or details.
    pub fn new(code: ErrorCode, message: impl Into<String>, retryable: bool) -> Self {
        Self { code, message: message.into(), param: None, retryable, details: None }
    }
}
