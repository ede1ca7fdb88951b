//! A job: one request, durable. Its states, who may move it from one to the next, and what a submission carries.

use std::collections::BTreeMap;
use std::fmt;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::error::JobError;
use super::{BatchId, JobId, Millis};

macro_rules! text_enum {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident => $text:literal,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum $name { $($(#[$doc])* $variant,)* }
        impl $name {
            /// Every value, in order.
            pub const ALL: &'static [$name] = &[$($name::$variant,)*];
            /// The word used in SQL, JSON, logs and screens.
            pub fn as_str(self) -> &'static str { match self { $($name::$variant => $text,)* } }
            /// The value for that word.
            pub fn parse(text: &str) -> Option<Self> { Self::ALL.iter().copied().find(|v| v.as_str() == text) }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { f.write_str(self.as_str()) }
        }
    };
}
pub(crate) use text_enum;

text_enum! {
    /// Where a job is in its life.
    JobState {
        /// Accepted and committed, or given back after an attempt.
        Queued => "queued",
        /// Claimed by a ready worker.
        Running => "running",
        /// Cancelled while it ran; the worker has been told.
        Cancelling => "cancelling",
        /// Ended with an answer.
        Succeeded => "succeeded",
        /// Ended with an error.
        Failed => "failed",
        /// Ended by request, or since nobody waited.
        Cancelled => "cancelled",
        /// A deadline passed first.
        Expired => "expired",
    }
}

impl JobState {
    /// Terminal states never change.
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled | Self::Expired)
    }

    /// Whether a job may go from `self` to `to`; the store's guards and the schema's CHECKs say the same.
    pub fn may_become(self, to: JobState) -> bool {
        use JobState::{Cancelled, Cancelling, Expired, Failed, Queued, Running, Succeeded};
        match self {
            Queued => matches!(to, Running | Cancelled | Expired | Failed),
            Running => matches!(to, Succeeded | Failed | Queued | Cancelling | Expired | Cancelled),
            Cancelling => matches!(to, Cancelled | Succeeded | Failed | Expired),
            Succeeded | Failed | Cancelled | Expired => false,
        }
    }
}

text_enum! {
    /// Why a queued job does not run yet.
    StateReason {
        /// Its model has no worker, or no free slot.
        WaitingForModel => "waiting_for_model",
        /// The weights are being fetched.
        ModelFetching => "model_fetching",
        /// The model is being loaded.
        ModelLoading => "model_loading",
        /// The model does not load; retried by itself.
        ModelBlocked => "model_blocked",
        /// The model needs a GPU and this box sees none.
        NoGpu => "no_gpu",
        /// Waits for its next attempt.
        RetryBackoff => "retry_backoff",
        /// Not to start before a time.
        Scheduled => "scheduled",
        /// Waits for another job.
        Dependency => "dependency",
        /// The queue is paused.
        Paused => "paused",
    }
}

text_enum! {
    /// Two classes share a model's slots.
    Class {
        /// Somebody is on the line.
        Interactive => "interactive",
        /// Nobody is.
        Batch => "batch",
    }
}

impl Class {
    /// `interactive` from priority 6 on.
    pub fn of(priority: u8) -> Self {
        if priority >= 6 { Self::Interactive } else { Self::Batch }
    }
}

text_enum! {
    /// What kind of work; follows from the endpoint.
    JobKind {
        /// `/v1/chat/completions`
        Chat => "chat",
        /// `/v1/completions`
        Completion => "completion",
        /// `/v1/images/generations`
        Image => "image",
        /// `/v1/audio/...`
        Audio => "audio",
        /// Any other endpoint of a model.
        Custom => "custom",
    }
}

impl JobKind {
    /// The kind of work an endpoint does.
    pub fn of_endpoint(endpoint: &str) -> Self {
        match endpoint {
            "/v1/chat/completions" => Self::Chat,
            "/v1/completions" => Self::Completion,
            "/v1/images/generations" => Self::Image,
            "/v1/audio/speech" | "/v1/audio/generations" => Self::Audio,
            _ => Self::Custom,
        }
    }
}

text_enum! {
    /// Which face a job came in by; decides whether a lost client matters.
    Face {
        /// The caller holds the line: cancelled when nobody waits any more.
        Sync => "sync",
        /// The caller comes back: runs whoever looks.
        Async => "async",
    }
}

/// Fences writes: an update under an old attempt changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token {
    /// The job.
    pub id: JobId,
    /// Number of claims of the job, this one included.
    pub attempt: i64,
}

impl fmt::Display for Token {
    /// As sent to workers in `x-request-id`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.id, self.attempt)
    }
}

/// What a submission carries, validated; becomes a [`Job`] when the store has committed it.
#[derive(Clone, Debug)]
pub struct NewJob {
    /// Path on the worker, for example `/v1/chat/completions`.
    pub endpoint: String,
    /// The entry's name in `models.yaml`, aliases resolved.
    pub model: String,
    /// The API key's name.
    pub tenant: String,
    /// What it was submitted together with.
    pub batch: Option<BatchId>,
    /// The client's own id within the batch.
    pub custom_id: Option<String>,
    /// Which face it came in by.
    pub face: Face,
    /// 0 to 9.
    pub priority: u8,
    /// The body for the worker, JSON, `model` already replaced by the upstream name.
    pub body: Bytes,
    /// Jobs may share a run only if this is equal; see [`super::shape::batch_key`].
    pub batch_key: i64,
    /// Whether the body asks for a stream of chunks.
    pub stream: bool,
    /// How the answer is shown: for example `response_format: url`.
    pub present: Present,
    /// To be started before, ms since the epoch.
    pub start_deadline: Option<Millis>,
    /// To be finished before, ms since the epoch.
    pub deadline: Option<Millis>,
    /// Longest time one attempt may take, in ms.
    pub timeout_ms: i64,
    /// Budget of `failures`.
    pub max_attempts: u32,
    /// The client's own key-value pairs.
    pub metadata: BTreeMap<String, String>,
    /// The job this one repeats.
    pub retry_of: Option<JobId>,
}

/// What the shim must know again when it shows a stored answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Present {
    /// Images as `url` instead of `b64_json`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub image_url: bool,
    /// The caller asked for the usage chunk of a stream.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub include_usage: bool,
    /// The `model` the caller wrote, alias included; shown again in the answer.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub model: String,
    /// The service tier to echo; empty if the caller named none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub service_tier: String,
}

/// A job as the store has it.
#[derive(Clone, Debug)]
pub struct Job {
    /// Public id; carries the row's key.
    pub id: JobId,
    /// See [`JobKind`].
    pub kind: JobKind,
    /// Path on the worker.
    pub endpoint: String,
    /// Entry name.
    pub model: String,
    /// API key's name.
    pub tenant: String,
    /// What it was submitted together with.
    pub batch: Option<BatchId>,
    /// The client's own id within the batch.
    pub custom_id: Option<String>,
    /// Which face it came in by.
    pub face: Face,
    /// Where it is in its life.
    pub state: JobState,
    /// Why it is not running, while queued.
    pub state_reason: Option<StateReason>,
    /// 0 to 9.
    pub priority: u8,
    /// Claims so far.
    pub attempt: i64,
    /// The job's own retriable errors so far.
    pub failures: u32,
    /// Workers that died, or broke the connection, while they ran it.
    pub crashes: u32,
    /// Budget of `failures`.
    pub max_attempts: u32,
    /// Raised by every change of the row; for `ETag` and long polls.
    pub version: i64,
    /// See [`NewJob::batch_key`].
    pub batch_key: i64,
    /// Whether the body asks for a stream.
    pub stream: bool,
    /// How the answer is shown.
    pub present: Present,
    /// When it was accepted.
    pub created_at: Millis,
    /// When it last became queued.
    pub queued_at: Millis,
    /// When its latest attempt was claimed.
    pub started_at: Option<Millis>,
    /// When it became terminal.
    pub finished_at: Option<Millis>,
    /// Not to be claimed before.
    pub not_before: Option<Millis>,
    /// To be started before.
    pub start_deadline: Option<Millis>,
    /// To be finished before.
    pub deadline: Option<Millis>,
    /// Longest time one attempt may take, in ms.
    pub timeout_ms: i64,
    /// The client's own pairs.
    pub metadata: BTreeMap<String, String>,
    /// The job this one repeats.
    pub retry_of: Option<JobId>,
    /// Why it ended other than well; of the latest attempt while it waits for a retry.
    pub error: Option<JobError>,
    /// Token counts and the like, as the engine gave them.
    pub usage: Option<serde_json::Value>,
    /// Time its model spent loading while it waited, in ms.
    pub load_ms: i64,
    /// What its attempts had of the devices, in ms: a worker's time is shared by the jobs that it runs at once.
    pub gpu_ms: f64,
    /// When its answer was first handed to a client, whole; of a job that ended without one: its end.
    pub delivered_at: Option<Millis>,
    /// When what it held (body, events, answer, files) was deleted, being past its retention.
    pub emptied_at: Option<Millis>,
}

impl Job {
    /// See [`Class::of`].
    pub fn class(&self) -> Class {
        Class::of(self.priority)
    }

    /// The token of the latest claim.
    pub fn token(&self) -> Token {
        Token { id: self.id, attempt: self.attempt }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminal_states_never_change() {
        for from in JobState::ALL {
            for to in JobState::ALL {
                if from.is_terminal() {
                    assert!(!from.may_become(*to), "{from} -> {to}");
                }
            }
            assert_eq!(JobState::parse(from.as_str()), Some(*from));
        }
        assert!(!JobState::Queued.may_become(JobState::Succeeded), "only a claimed job has an answer");
        assert!(!JobState::Cancelling.may_become(JobState::Queued), "a cancelled job is not tried again");
    }

    #[test]
    fn class_follows_priority() {
        assert_eq!((Class::of(5), Class::of(6)), (Class::Batch, Class::Interactive));
    }
}
