//! What a supervisor tells about its worker, and what a worker tells about a job.

use serde::{Deserialize, Serialize};

use super::job::text_enum;
use super::{JobError, Millis, ModelState};
use std::fmt;

/// A load that ran out of memory is tried again where so much more is free than was then, in bytes: other programs come and go.
pub const MORE_BYTES: u64 = 1 << 30;

/// Shortest time, in ms, for which a pass that nobody waits for may go on: it notices at the end of a step, which takes seconds.
pub const LETS_GO_MS: i64 = 10_000;

/// A worker's report, sent by its supervisor to the scheduler. Each changes what the scheduler may do next.
#[derive(Clone, Debug, PartialEq)]
pub enum Report {
    /// The process is up; `phase` and `percent` as its `/health` gives them.
    Loading {
        /// For example `weights`.
        phase: Option<String>,
        /// 0 to 100.
        percent: Option<f64>,
    },
    /// It answers on `base_url` and takes jobs.
    Ready {
        /// `http://127.0.0.1:8001`
        base_url: String,
        /// Time from the order to load to readiness, in ms.
        load_ms: i64,
    },
    /// Where the time of its cold load went, in order; comes before `Ready`.
    Loaded {
        /// See [`PhaseTime`].
        phases: Vec<PhaseTime>,
    },
    /// What it takes on each of its GPUs, as it says itself; comes before `Ready`.
    Takes {
        /// Device memory, in bytes.
        device_bytes: u64,
    },
    /// What it says of its copy in host memory; comes before `Ready`, and again when that has changed.
    Host(HostCopy),
    /// What its sleeping process keeps on each of its GPUs, as the driver shows it; comes before `Parked`.
    Keeps {
        /// Device memory, in bytes.
        device_bytes: u64,
    },
    /// Nobody waits any more for the pass that it runs, and it goes on; again and again from [`LETS_GO_MS`] on.
    GivenUp {
        /// For how long, in ms.
        ms: i64,
    },
    /// Stopped as ordered; its device memory is free.
    Stopped {
        /// Time from the order to stop to free memory, in ms.
        stop_ms: i64,
    },
    /// Parked as ordered: it lies in host memory, and its device memory is free.
    Parked {
        /// Time from the order to park to free memory, in ms.
        park_ms: i64,
    },
    /// It died or was killed for not answering, after it had been ready; its device memory is free. What ran on it is lost.
    Died {
        /// For a person.
        reason: String,
    },
    /// It is not to be loaded before `retry_at`, without a load that has just failed: its worker has died again and again soon
    /// after it was ready, or it was ordered to load too early.
    BacksOff {
        /// For a person, with the last log lines.
        error: JobError,
        /// When the next load may be ordered, ms since the epoch.
        retry_at: Millis,
        /// After five failed loads in a row.
        quarantined: bool,
        /// How often its worker has died in a row soon after it was ready; 0: its loads have failed.
        deaths: u32,
    },
    /// It did not get ready; nothing of it runs. Tried again not before `retry_at`.
    LoadFailed {
        /// For a person, with the last log lines.
        error: JobError,
        /// When the next load may be ordered, ms since the epoch.
        retry_at: Millis,
        /// Five in a row.
        quarantined: bool,
    },
    /// Its GPU has not enough memory for it, also when it is told to take less. Nothing of it runs; tried again when more is
    /// free there, which `Available` tells, or when it is ordered to load all the same.
    DoesNotFit {
        /// For a person, with numbers and advice.
        error: JobError,
        /// What was free on the fullest of its GPUs before, in bytes.
        free: u64,
    },
    /// Needs GPUs that the box does not see.
    NoGpu,
    /// May be loaded again: back-off is over, a GPU came back, or a person asked for a retry.
    Available,
}

/// One part of a cold load.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PhaseTime {
    /// `spawn` (until somebody listens on the worker's port), then what the worker tells: `import`, `read` (from disk), `device`
    /// (to the GPU), `warm_up`; of a server that tells nothing, `load` is all the rest. `rehearsal`, if nobody waited for it: it
    /// was put to sleep and woken once.
    pub phase: String,
    /// How long it took, in ms.
    pub ms: i64,
}

impl PhaseTime {
    /// Name of the phase in which a worker is put to sleep and woken once.
    pub const REHEARSAL: &str = "rehearsal";
}

/// What a worker says of the copy of its weights in host memory; one that does not know about it says nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostCopy {
    /// Host memory that it takes now, in bytes; 0: there is none. Some workers make it when they are loaded, not when they are
    /// parked.
    pub bytes: Option<u64>,
    /// False: if it is sent to sleep, its device memory does not come back.
    pub can_park: Option<bool>,
    /// Why not, or what else there is to know about it, in a sentence.
    pub note: Option<String>,
    /// Whether it can sleep without a copy, and read its weights again when it is woken.
    pub can_reread: Option<bool>,
}

text_enum! {
    /// Where the fetch of a model's weights is.
    FetchPhase {
        /// Another one is at work: one at a time.
        Waiting => "waiting",
        /// The hub is asked which files there are.
        Listing => "listing",
        /// Files come.
        Fetching => "fetching",
        /// It was cut off and goes on by itself where it was.
        Interrupted => "interrupted",
        /// It cannot go on; tried again by itself, in case somebody has mended it.
        Failed => "failed",
    }
}

/// How far the fetch of a model's weights is.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Fetch {
    /// Where it is.
    pub phase: FetchPhase,
    /// Bytes that are here, those of earlier fetches too.
    pub bytes: u64,
    /// All that there are to be; `None` until the hub has said.
    pub total_bytes: Option<u64>,
    /// 0 to 100.
    pub percent: Option<f64>,
    /// Measured over the last seconds.
    pub bytes_per_s: Option<f64>,
    /// What is left, at that speed, in seconds.
    pub eta_s: Option<f64>,
    /// Why it does not go on now, if it does not.
    pub reason: Option<String>,
    /// When it is tried again, ms since the epoch, if it does not go on now.
    pub retry_at: Option<Millis>,
}

impl Fetch {
    /// One of which no more is known than where it is.
    pub fn at(phase: FetchPhase) -> Self {
        let (bytes, total_bytes, percent, bytes_per_s, eta_s) = (0, None, None, None, None);
        Self { phase, bytes, total_bytes, percent, bytes_per_s, eta_s, reason: None, retry_at: None }
    }
}

/// What the fetching task tells the scheduler about a model's weights.
#[derive(Clone, Debug, PartialEq)]
pub enum FetchReport {
    /// All of them are here: the model may be loaded.
    Here,
    /// They are not here, and on their way.
    Progress(Fetch),
    /// They cannot be had now, as `error` says.
    Failed {
        /// Where it ended.
        fetch: Fetch,
        /// For those who wait for an answer.
        error: JobError,
    },
    /// May be asked for again: the pause after a failure is over, or a person asked for a retry.
    Available,
    /// A person asked for a retry: what failed before is told no more.
    Forgiven,
}

/// A supervisor's view of its worker, for `/v1/workers`; stale by the time it is read.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WorkerView {
    /// Entry name.
    pub model: String,
    /// Its number among the workers of its model, from 0.
    pub replica: u32,
    /// The GPUs that it was started on last, by the driver's numbers; empty on the CPU.
    pub gpus: Vec<u32>,
    /// Where it is.
    pub state: ModelState,
    /// Loading phase.
    pub phase: Option<String>,
    /// Loading progress, 0 to 100.
    pub percent: Option<f64>,
    /// Where the time of its last cold load went, in order.
    pub phases: Vec<PhaseTime>,
    /// The guard's process id.
    pub pid: Option<u32>,
    /// Port it listens on.
    pub port: Option<u16>,
    /// Since when in this state.
    pub since: Millis,
    /// Failed loads in a row.
    pub failed_loads: u32,
    /// Times it was started.
    pub starts: u64,
    /// When the next load may happen, in `backoff` and `quarantined`.
    pub retry_at: Option<Millis>,
    /// Why it is in `backoff`, `quarantined` or `blocked`.
    pub reason: Option<String>,
    /// Memory that it takes on each of its GPUs, in bytes, as it says itself; while it is parked, what it keeps there, as the
    /// driver shows it.
    #[serde(default)]
    pub device_bytes: Option<u64>,
    /// It is parked, or about to be, without a copy in host memory: its process stays, and its wake reads the weights again.
    #[serde(default, rename = "without_copy")]
    pub bare: bool,
    /// How its copy in host memory was lost, until its next load.
    #[serde(default)]
    pub lost_copy: Option<String>,
    /// That and why its last load failed, or its worker died again and again, until a load works or somebody says that it is
    /// another matter now.
    #[serde(default)]
    pub last_failure: Option<String>,
    /// Host memory that the copy of its weights takes now, in bytes, as it says itself.
    #[serde(default)]
    pub host_bytes: Option<u64>,
    /// Whether it can be parked, as it says itself.
    #[serde(default)]
    pub can_park: Option<bool>,
    /// Why it cannot, or what else it says about that.
    #[serde(default)]
    pub park_note: Option<String>,
    /// Where its log is.
    pub log_path: String,
}

/// How a spare process is, for `/v1/workers`; stale by the time it is read.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SpareView {
    /// The models that it could become.
    pub models: Vec<String>,
    /// Where it is.
    pub state: SpareState,
    /// The guard's process id.
    pub pid: Option<u32>,
    /// Port it listens on.
    pub port: Option<u16>,
    /// Host memory that it takes, in bytes; no part of `scheduler.park_ram`.
    pub host_bytes: Option<u64>,
    /// Spare processes that were started.
    pub starts: u64,
    /// Loads that have taken one.
    pub taken: u64,
    /// Why the last one is gone, unless a load took it.
    pub reason: Option<String>,
    /// Where its log is while it is a spare.
    pub log_path: String,
}

/// Where a spare process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SpareState {
    /// There is none, since somebody loads or has just done so.
    Absent,
    /// It imports; a load would take it.
    Importing,
    /// It waits for a load.
    Ready,
    /// The last one failed or was refused; another is started later.
    Backoff,
}

/// The answer to one job.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// HTTP status, 2xx.
    pub status: u16,
    /// For example `application/json` or `audio/wav`.
    pub content_type: String,
    /// The body.
    pub body: bytes::Bytes,
    /// Token counts, if the engine gave them.
    pub usage: Option<serde_json::Value>,
}

/// How an attempt ended, as seen by the worker's client.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// With an answer.
    Answered(Answer),
    /// With the job's own error; `retriable` ones charge `failures`.
    Failed {
        /// What to store.
        error: JobError,
        /// Whether another attempt may help.
        retriable: bool,
    },
    /// The connection broke or was refused: the worker may be gone. Its supervisor knows.
    WorkerLost {
        /// For the log.
        reason: String,
        /// Whether the request may have reached the worker; if not, the job cannot be to blame.
        reached: bool,
    },
    /// We closed the connection, since the job was cancelled or its time was up.
    Stopped,
}

/// Something a running job tells before it ends.
#[derive(Clone, Debug, PartialEq)]
pub enum Progress {
    /// Step `step` of `total`.
    Step {
        /// Done so far.
        step: u64,
        /// All.
        total: u64,
    },
    /// One SSE data payload of a stream, without `data: `, exactly as the engine sent it. Never `[DONE]`.
    Chunk(bytes::Bytes),
}
