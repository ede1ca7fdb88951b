//! How the rest of the program asks the scheduler. Cheap to clone.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::join_all;
use serde::Serialize;
use tokio::sync::{mpsc, oneshot, watch};

use crate::domain::worker::{Fetch, FetchPhase, SpareView, WorkerView};
use crate::domain::{
    BatchId, Control, ErrorCode, Job, JobError, JobId, JobState, Millis, ModelSpec, ModelState, NewJob, StateReason,
};
use crate::lifecycle::Tasks;
pub use crate::policy::admission::Full;
pub use crate::policy::batching::ShapeView;
pub use crate::policy::plan::Decision;
pub use crate::policy::tier::Outlook;
use crate::scheduler::hub::JobWatch;
use crate::scheduler::hub::{Ended, Hub};
pub use crate::scheduler::journal::{DecisionFilter, DecisionPage};
use crate::scheduler::run::{Message, Reload};
pub use crate::scheduler::state::Expected;
use crate::store::{IdempotencyKey, Store, StoreError, StoreMetrics, Trouble};
use crate::worker::client::WorkerClient;
use crate::worker::fetching::FetchHandle;
use crate::worker::spare::Spares;
use crate::worker::supervisor::{Order, WorkerHandle};

/// Why jobs were not accepted; nothing was stored.
#[derive(Debug, thiserror::Error)]
pub enum SubmitError {
    /// The queue has no room for them now.
    #[error("the queue is full: {} queued and {} more would be over the limit of {} (scheduler.{})", .full.queued, .full.more, .full.limit, .full.key)]
    QueueFull {
        /// Which limit.
        full: Full,
        /// Estimate of when there is room, at most 60.
        retry_after_s: u64,
    },
    /// They are more than may ever wait.
    #[error("{} jobs at once are over the limit of {} (scheduler.{}): send at most {} in one call", .0.more, .0.limit, .0.key, .0.limit)]
    TooMany(Full),
    /// The model does not load now; only sync calls are refused for it.
    #[error("{}", .0.message)]
    ModelLoadFailed(Box<JobError>),
    /// Nothing in this box could ever hold the model.
    #[error("{}", .0.message)]
    TooBig(Box<JobError>),
    /// Somebody drains the model, or all of them, by hand.
    #[error("new jobs of `{model}` are refused while it is being drained; they are accepted again after `{resume}`")]
    Drained {
        /// Entry name.
        model: String,
        /// The command that ends it.
        resume: String,
    },
    /// The server is shutting down.
    #[error("the server is shutting down")]
    Draining,
    /// The store could not commit.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Accepted jobs: committed.
#[derive(Debug)]
pub struct Accepted {
    /// In order.
    pub jobs: Vec<Job>,
    /// Of the only job, subscribed before anything could happen to it.
    pub watch: Option<JobWatch>,
    /// Where the only job stood when it was accepted.
    pub position: Option<Position>,
    /// They were accepted before, under the same idempotency key.
    pub replayed: bool,
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
    /// Jobs on its workers, and those whose answers are being stored.
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
    /// Why its last load failed, until one works, or the last try to fetch its weights, until bytes come; that it may be tried
    /// again does not end it.
    pub last_failure: Option<String>,
    /// How far its weights are, while they are not here and somebody wants them.
    pub fetch: Option<Fetch>,
    /// Its waiting jobs do not start: somebody has paused it, or all.
    pub paused: bool,
    /// New jobs of it are refused: somebody drains it, or all.
    pub draining: bool,
    /// It is never displaced.
    pub pinned: bool,
    /// Jobs in its passes by their shape, last used first, at most 16; empty if it takes one at a time.
    pub batching: Vec<ShapeView>,
    /// Whether it can be parked in host memory, and why not; `None`: it is not to be.
    pub parking: Option<Outlook>,
}

/// The body of `GET /v1/queue`.
#[derive(Clone, Debug, Default, Serialize)]
pub struct QueueView {
    /// All waiting jobs.
    pub queued: usize,
    /// Jobs on workers, and those whose answers are being stored.
    pub running: usize,
    /// The latest decision.
    pub decision: Option<Decision>,
    /// The latest decisions that started or ended something, newest first, at most 50.
    pub history: Vec<Decision>,
    /// Swaps so far: loads of a model where another one had been before and is no more.
    pub swaps: u64,
    /// Swaps that arrival order would have cost for the jobs claimed so far.
    pub swaps_in_arrival_order: u64,
    /// What is asked for of what the box can do, while it has been too much for long.
    pub overload: Option<f64>,
    /// All models are paused by hand.
    pub paused: bool,
    /// All models are being drained by hand.
    pub draining: bool,
    /// By the order of `models.yaml`, and then those that have no entry any more as long as something is left of them.
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
    pub eta_start: Option<Expected>,
    /// Estimate of its end.
    pub eta_finish: Option<Expected>,
    /// `low`, `medium` or `high`; empty without an estimate.
    pub eta_confidence: &'static str,
    /// Why it waits, in words: those of the latest decision about its model, or where it stands.
    pub reason: Option<String>,
}

/// Counters for `/metrics`, cumulative since start.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    /// Terminal jobs by state since start.
    pub ended: BTreeMap<JobState, u64>,
    /// Loads from nothing by model: (count, seconds in all).
    pub loads: BTreeMap<String, (u64, f64)>,
    /// Parts of those loads by model and phase, in the same way.
    pub load_phases: BTreeMap<(String, String), (u64, f64)>,
    /// Wakes of parked workers, in the same way.
    pub wakes: BTreeMap<String, (u64, f64)>,
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

/// Upper bounds of the waiting-time histogram, in seconds.
pub const WAIT_BUCKETS: [f64; 12] = [0.01, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 180.0, 600.0, 1_800.0, 7_200.0, 86_400.0];

/// Supervisors by model and number of the worker.
pub type Workers = BTreeMap<(String, u32), WorkerHandle>;

/// Supervisors of a model, by number.
pub(super) fn handles<'a>(workers: &'a Workers, model: &str) -> impl Iterator<Item = &'a WorkerHandle> {
    let all = (model.to_owned(), 0)..=(model.to_owned(), u32::MAX);
    workers.range(all).map(|(_, worker)| worker)
}

/// What a worker tells by its own `/metrics`.
#[derive(Clone, Debug)]
pub struct WorkerMetrics {
    /// Entry name.
    pub model: String,
    /// Its number among the workers of its model, from 0.
    pub replica: u32,
    /// Prometheus text, as it came.
    pub text: String,
}

/// Asks the scheduler.
#[derive(Clone)]
pub struct Handle {
    messages: mpsc::UnboundedSender<Message>,
    hub: Hub,
    store: Store,
    workers: Arc<Mutex<Workers>>,
    fetching: FetchHandle,
    spares: Spares,
    client: WorkerClient,
    view: watch::Receiver<Arc<QueueView>>,
    counters: Arc<Mutex<Counters>>,
    tasks: Tasks,
}

impl Handle {
    pub(super) fn new(
        messages: mpsc::UnboundedSender<Message>,
        hub: Hub,
        store: Store,
        (workers, fetching, spares): (Workers, FetchHandle, Spares),
        view: watch::Receiver<Arc<QueueView>>,
        tasks: Tasks,
    ) -> Self {
        let counters =
            Counters { wait_buckets: WAIT_BUCKETS.iter().map(|le| (*le, 0)).collect(), ..Counters::default() };
        let (workers, counters) = (Arc::new(Mutex::new(workers)), Arc::new(Mutex::new(counters)));
        let client = WorkerClient::new();
        Self { messages, hub, store, workers, fetching, spares, client, view, counters, tasks }
    }

    /// Commits jobs (all or none) and returns them in order. All are of one tenant. With a `key` that came before, those of
    /// then are returned.
    pub async fn submit(&self, jobs: Vec<NewJob>, key: Option<IdempotencyKey>) -> Result<Accepted, SubmitError> {
        let (reply, answer) = oneshot::channel();
        self.messages.send(Message::Submit { jobs, key, reply }).map_err(|_| SubmitError::Draining)?;
        answer.await.unwrap_or(Err(SubmitError::Draining))
    }

    /// Makes the id of a new batch.
    pub fn new_batch(&self) -> BatchId {
        self.store.new_batch()
    }

    /// Asks to cancel: queued jobs are cancelled at once, running ones become `cancelling`, terminal ones stay.
    /// `code`: `cancelled_by_user` or `client_disconnected`.
    pub async fn cancel(&self, id: JobId, code: ErrorCode) -> Result<Job, StoreError> {
        // Beside the caller, who may leave in the middle: what is committed must be told to the loop and to watchers.
        let (reply, answer) = oneshot::channel();
        let handle = self.clone();
        self.tasks.spawn("cancel", async move {
            let _ = reply.send(handle.cancel_now(id, code).await);
        });
        answer.await.unwrap_or(Err(StoreError::Stopped))
    }

    async fn cancel_now(&self, id: JobId, code: ErrorCode) -> Result<Job, StoreError> {
        let request = self.store.request_cancel(id, code).await?;
        let Some(change) = request.change else {
            return self.store.reader().job(id).await;
        };
        // After the loop has ended there is nothing left to stop.
        if change.state == JobState::Cancelling {
            let _ = self.messages.send(Message::Cancel { number: id.number });
            self.hub.publish(id.number, change.version, change.seq);
            return self.store.reader().job(id).await;
        }
        let (model, priority) = (request.model, request.priority);
        let _ = self.messages.send(Message::Cancelled { model, priority, number: id.number });
        let job = self.store.reader().job(id).await;
        let error = job.as_ref().ok().and_then(|job| job.error.clone());
        self.hub.end(id.number, change.version, change.seq, Ended { state: change.state, answer: None, error });
        job
    }

    /// Does what an operator says. When it returns, what lasts of it is durable and the view shows it.
    pub async fn control(&self, control: Control) -> Result<(), StoreError> {
        let (reply, answer) = oneshot::channel();
        let _ = self.messages.send(Message::Control { control, reply });
        answer.await.unwrap_or(Err(StoreError::Stopped))
    }

    /// Cancels the jobs that wait now, of one model or of all; returns how many. If nobody waits for the answer any more, it
    /// goes on; if the server ends before, those that are left wait again at its next start.
    pub async fn purge(&self, model: Option<String>) -> Result<usize, StoreError> {
        let (reply, answer) = oneshot::channel();
        let _ = self.messages.send(Message::Purge { model, before: None, removed: 0, reply });
        answer.await.map_err(|_| StoreError::Stopped)
    }

    /// Stores where the devices' time went until now, so that a reader finds it.
    pub async fn keep_spent(&self) -> Result<(), StoreError> {
        let (reply, answer) = oneshot::channel();
        let _ = self.messages.send(Message::KeepSpent { reply });
        answer.await.unwrap_or(Err(StoreError::Stopped))
    }

    /// Watches a job from now on; read the store afterwards for what was before.
    pub fn watch(&self, id: JobId) -> JobWatch {
        self.hub.watch(id.number)
    }

    /// The latest view of the queue; a few ms old at most.
    pub fn queue(&self) -> Arc<QueueView> {
        self.view.borrow().clone()
    }

    /// What was decided of late, and why; nothing after the scheduler's end.
    pub async fn decisions(&self, filter: DecisionFilter) -> DecisionPage {
        let (reply, answer) = oneshot::channel();
        let _ = self.messages.send(Message::Decisions { filter, reply });
        answer.await.unwrap_or_default()
    }

    /// Where a queued job stands in the current plan; all `None` for one that is not queued.
    pub async fn position(&self, job: &Job) -> Position {
        let (reply, answer) = oneshot::channel();
        let (model, priority, number) = (job.model.clone(), job.priority, job.id.number);
        if job.state != JobState::Queued
            || self.messages.send(Message::Position { model, priority, number, reply }).is_err()
        {
            return Position::default();
        }
        answer.await.ok().flatten().unwrap_or_default()
    }

    /// Notes that the answer of a job, which has succeeded, was handed to a client.
    pub fn delivered(&self, id: JobId) {
        self.store.delivered(id);
    }

    /// The store's own figures.
    pub async fn store_metrics(&self) -> StoreMetrics {
        self.store.metrics().await
    }

    /// What is wrong with the store.
    pub fn store_troubles(&self) -> Vec<Trouble> {
        self.store.troubles()
    }

    /// Views of all workers, by name and number. One whose model is being fetched, or for which room is made, says so.
    pub fn workers(&self) -> Vec<WorkerView> {
        let queue = self.queue();
        let show = |worker: &WorkerHandle| {
            let view = worker.view();
            let model = queue.models.iter().find(|model| model.model == view.model);
            match model.and_then(|model| model.fetch.as_ref()) {
                Some(fetch) if matches!(view.state, ModelState::Absent | ModelState::Backoff) => fetching(view, fetch),
                _ => with_room(view, model.is_some_and(|model| model.trouble.is_none())),
            }
        };
        self.supervisors().values().map(show).collect()
    }

    /// What the workers that have loaded tell by their own `/metrics`; those that have none, or do not answer within a second,
    /// are left out.
    pub async fn worker_metrics(&self) -> Vec<WorkerMetrics> {
        let has_loaded =
            |view: &WorkerView| matches!(view.state, ModelState::Resident | ModelState::Draining | ModelState::Parked);
        let views: Vec<WorkerView> = self.supervisors().values().map(WorkerHandle::view).filter(has_loaded).collect();
        let asked = views.into_iter().filter_map(|view| Some((view.port?, view))).map(|(port, view)| async move {
            let text = self.client.metrics(&format!("http://127.0.0.1:{port}")).await?;
            Some(WorkerMetrics { model: view.model, replica: view.replica, text })
        });
        join_all(asked).await.into_iter().flatten().collect()
    }

    /// How the spare processes are.
    pub fn spares(&self) -> Vec<SpareView> {
        self.spares.views()
    }

    /// Forgets a model's back-off and quarantine, and the pause before its weights are asked for again. False: no such model.
    pub fn retry_model(&self, model: &str) -> bool {
        self.fetching.retry(model);
        handles(&self.supervisors(), model).map(|worker| worker.order(Order::Retry)).count() > 0
    }

    /// From now on it is these models' weights and spare processes that may be wanted.
    pub(super) fn edit(&self, models: &[ModelSpec]) {
        self.fetching.edit(models);
        self.spares.edit(models);
    }

    pub(super) fn supervisors(&self) -> MutexGuard<'_, Workers> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in an edited models.yaml; when it returns, new jobs are of it. False: the scheduler has ended.
    pub async fn reload(&self, reload: Reload) -> bool {
        let (reply, answer) = oneshot::channel();
        let _ = self.messages.send(Message::Reload { reload: Box::new(reload), reply });
        answer.await.is_ok()
    }

    /// Counters for `/metrics`.
    pub fn counters(&self) -> Counters {
        self.counters.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn count(&self, change: impl FnOnce(&mut Counters)) {
        change(&mut self.counters.lock().unwrap_or_else(PoisonError::into_inner));
    }

    pub(super) fn observe_wait(&self, seconds: f64) {
        self.count(|counters| {
            counters.wait_count += 1;
            counters.wait_sum_s += seconds;
            counters.wait_buckets.iter_mut().filter(|(le, _)| seconds <= *le).for_each(|(_, count)| *count += 1);
        });
    }

    /// Waits until the scheduler's loop has ended: in the soft stage, when the last running job has.
    pub async fn drained(&self) {
        self.messages.closed().await;
    }

    /// Whether the scheduler's loop and the store's writer answer, each within a second; for `/readyz`.
    pub async fn is_ready(&self) -> Result<(), String> {
        let (reply, answer) = oneshot::channel();
        let _ = self.messages.send(Message::Ping { reply });
        match tokio::time::timeout(ANSWER_WITHIN, answer).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Err("the scheduler has stopped".to_owned()),
            Err(_) => return Err("the scheduler does not answer within a second".to_owned()),
        }
        match tokio::time::timeout(ANSWER_WITHIN, self.store.ping()).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(format!("the store cannot commit: {error}")),
            Err(_) => Err("the store does not commit within a second".to_owned()),
        }
    }
}

/// A worker that waits for its model's weights.
fn fetching(view: WorkerView, fetch: &Fetch) -> WorkerView {
    let state = if fetch.phase == FetchPhase::Failed { ModelState::Backoff } else { ModelState::Fetching };
    let (reason, phase) = (fetch.reason.clone(), Some(fetch.phase.as_str().to_owned()));
    WorkerView { state, phase, percent: fetch.percent, reason, retry_at: fetch.retry_at, ..view }
}

/// A worker that did not fit though nothing is in its model's way: it is tried once more when others have made room, and what
/// a person could do is not told.
fn with_room(view: WorkerView, is_made: bool) -> WorkerView {
    match view.state {
        ModelState::Blocked if is_made => {
            WorkerView { state: ModelState::Absent, reason: view.last_failure.clone(), ..view }
        }
        _ => view,
    }
}

const ANSWER_WITHIN: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_for_which_room_is_made_is_not_told_as_blocked() {
        let blocked: WorkerView = serde_json::from_value(serde_json::json!({
            "model": "a", "replica": 0, "gpus": [0], "state": "blocked", "phases": [], "since": 1, "failed_loads": 1, "starts": 2,
            "reason": "model `a` does not fit: out of memory. `models retry a`", "log_path": "/a.log",
            "last_failure": "its last load failed: out of memory",
        }))
        .unwrap();
        let told = |view: WorkerView| (view.state, view.reason);
        let (state, reason) = told(with_room(blocked.clone(), true));
        assert_eq!((state, reason.as_deref()), (ModelState::Absent, Some("its last load failed: out of memory")));
        assert_eq!(told(with_room(blocked.clone(), false)), told(blocked.clone()), "nothing is left to try");
        let loads = WorkerView { state: ModelState::Loading, ..blocked };
        assert_eq!(told(with_room(loads.clone(), true)), told(loads));
    }
}
