//! How the rest of the program asks the scheduler. Cheap to clone.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::domain::worker::WorkerView;
use crate::domain::{
    BatchId, ErrorCode, Job, JobError, JobId, JobState, Millis, ModelState, NewJob, StateReason,
};
pub use crate::policy::plan::Decision;
use crate::scheduler::hub::JobWatch;
use crate::store::StoreError;

/// Why jobs were not accepted; nothing was stored.
#[derive(Debug, thiserror::Error)]
pub enum SubmitError {
    /// The queue is at its limit.
    #[error("the queue is full: {queued} jobs queued, the limit is {limit}")]
    QueueFull {
        /// Now.
        queued: usize,
        /// The limit that was hit.
        limit: usize,
        /// Estimate of when there is room, at most 60.
        retry_after_s: u64,
    },
    /// The model does not load now; only sync calls are refused for it.
    #[error("{}", .0.message)]
    ModelLoadFailed(JobError),
    /// The server is shutting down.
    #[error("the server is shutting down")]
    Draining,
    /// The store could not commit.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// An accepted job: committed, and watched since before it could start.
#[derive(Debug)]
pub struct Submitted {
    /// As committed.
    pub job: Job,
    /// Subscribed before anything could happen to it.
    pub watch: JobWatch,
}

/// What one model waits for and is doing; part of [`QueueView`].
#[derive(Clone, Debug, Serialize)]
pub struct ModelQueueView {
    /// Entry name.
    pub model: String,
    /// Waiting jobs.
    pub queued: usize,
    /// Of these, interactive ones.
    pub queued_interactive: usize,
    /// Jobs on the worker.
    pub running: usize,
    /// Age of the oldest waiting job.
    pub oldest_age_s: Option<f64>,
    /// Whether it holds the device.
    pub resident: bool,
    /// Estimate of when a new job would start.
    pub est_wait_s: Option<f64>,
    /// Estimate of a swap to it, in seconds.
    pub swap_cost_s: f64,
    /// When it is due, ms since the epoch; `None` without waiting jobs.
    pub due_at: Option<Millis>,
    /// Where its worker is.
    pub state: ModelState,
    /// Why its queued jobs do not run.
    pub state_reason: Option<StateReason>,
    /// Why it cannot be loaded now.
    pub trouble: Option<String>,
}

/// The body of `GET /v1/queue`.
#[derive(Clone, Debug, Default, Serialize)]
pub struct QueueView {
    /// All waiting jobs.
    pub queued: usize,
    /// Jobs on workers.
    pub running: usize,
    /// The latest decision.
    pub decision: Option<Decision>,
    /// The latest decisions that started or ended something, newest first, at most 50.
    pub history: Vec<Decision>,
    /// Swaps so far: loads of a model while another one had held the device before.
    pub swaps: u64,
    /// Swaps that arrival order would have cost for the jobs claimed so far.
    pub swaps_in_arrival_order: u64,
    /// By the order of `models.yaml`.
    pub models: Vec<ModelQueueView>,
}

/// Where a queued job stands.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Position {
    /// Jobs that the current plan starts first, 0-based; it may rise. `None` if too far back to count.
    pub position: Option<usize>,
    /// Jobs of its own model before it.
    pub ahead_same_model: Option<usize>,
    /// Swaps before its model is loaded.
    pub swaps_ahead: usize,
    /// Estimate of its start, ms since the epoch.
    pub eta_start: Option<Millis>,
    /// `low`, `medium` or `high`.
    pub eta_confidence: &'static str,
}

/// Counters for `/metrics`, cumulative since start.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    /// Terminal jobs by state since start.
    pub ended: BTreeMap<JobState, u64>,
    /// Loads by model: (count, seconds in all).
    pub loads: BTreeMap<String, (u64, f64)>,
    /// Failed loads by model.
    pub failed_loads: BTreeMap<String, u64>,
    /// Times a ready worker died, by model.
    pub worker_deaths: BTreeMap<String, u64>,
    /// Late results dropped.
    pub stale_results: u64,
    /// Waiting times of claimed jobs: (upper bound in seconds, jobs at or below it), cumulative.
    pub wait_buckets: Vec<(f64, u64)>,
    /// Sum of waiting times, in seconds.
    pub wait_sum_s: f64,
    /// Claimed jobs.
    pub wait_count: u64,
}

/// Asks the scheduler.
#[derive(Clone)]
pub struct Handle {}

impl Handle {
    /// Commits jobs (all or none) and returns them in order. With `batch`, they become one batch.
    pub async fn submit(&self, jobs: Vec<NewJob>) -> Result<Vec<Submitted>, SubmitError> {
        let _ = jobs;
        unimplemented!()
    }

    /// Makes the id of a new batch.
    pub fn new_batch(&self) -> BatchId {
        unimplemented!()
    }

    /// Asks to cancel: queued jobs are cancelled at once, running ones become `cancelling`, terminal ones stay.
    /// `code`: `cancelled_by_user` or `client_disconnected`.
    pub async fn cancel(&self, id: JobId, code: ErrorCode) -> Result<Job, StoreError> {
        let _ = (id, code);
        unimplemented!()
    }

    /// Watches a job from now on; read the store afterwards for what was before.
    pub fn watch(&self, id: JobId) -> JobWatch {
        let _ = id;
        unimplemented!()
    }

    /// The latest view of the queue; a few ms old at most.
    pub fn queue(&self) -> std::sync::Arc<QueueView> {
        unimplemented!()
    }

    /// Where a queued job stands in the current plan.
    pub async fn position(&self, job: &Job) -> Position {
        let _ = job;
        unimplemented!()
    }

    /// Views of all workers.
    pub fn workers(&self) -> Vec<WorkerView> {
        unimplemented!()
    }

    /// Forgets a model's back-off and quarantine. False: no such model.
    pub fn retry_model(&self, model: &str) -> bool {
        let _ = model;
        unimplemented!()
    }

    /// Counters for `/metrics`.
    pub fn counters(&self) -> Counters {
        unimplemented!()
    }

    /// Whether the scheduler's loop and the store's writer answer, each within a second; for `/readyz`.
    pub async fn is_ready(&self) -> Result<(), String> {
        unimplemented!()
    }
}
