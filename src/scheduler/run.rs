//! The loop that owns the scheduler's state: takes messages, lets the state machine decide, carries out its effects beside
//! the loop (`effects`), and publishes a `view`; `submit` takes in new jobs, `operate` does what is said by hand. Nothing here
//! waits for a worker or for the disk.

use std::collections::{BTreeMap, HashMap};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::TryStreamExt as _;
use futures_util::future::join_all;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::clock::Clock;
use crate::domain::worker::{FetchPhase, FetchReport, PhaseTime, Report, WorkerView};
use crate::domain::{
    Class, Control, Controls, Face, JobError, JobId, JobKind, JobState, Millis, ModelSpec, ModelState, NewJob,
    StateReason, Token, resume_command,
};
use crate::lifecycle::Tasks;
use crate::policy::Knobs;
use crate::scheduler::dispatch::{self, Context, Dispatch, Stop};
use crate::scheduler::handle::{Accepted, Handle, ModelQueueView, Position, QueueView, SubmitError, Workers, handles};
use crate::scheduler::hub::{Ended, Hub, JobWatch};
use crate::scheduler::journal::{DecisionFilter, DecisionPage};
use crate::scheduler::model::Model;
use crate::scheduler::queue::{Run, shared};
use crate::scheduler::state::{Effect, Event, Holding, Inventory, Lack, Place, State, TOLD_MAX, edits};
use crate::scheduler::watch as devices;
use crate::store::{
    self, Body, Change, ClaimedJob, End, IdempotencyKey, Inserted, Learned, QueuedJob, Spent, Store, StoreError, Told,
};
use crate::worker::client::{RunTag, WorkerClient};
use crate::worker::fetching::{FetchHandle, Fetches};
use crate::worker::gpu::GpuProbe;
use crate::worker::spare::Spares;
use crate::worker::supervisor::{Order, WorkerHandle};

#[path = "effects.rs"]
pub(super) mod effects;
#[path = "operate.rs"]
mod operate;
#[path = "submit.rs"]
mod submit;
#[path = "view.rs"]
mod view;

/// Messages handled before effects are carried out and the view is published.
const MESSAGES_PER_STEP: usize = 256;
/// Views are published at most this often.
const VIEW_EVERY: Duration = Duration::from_millis(5);
/// Where the devices' time went is kept this often: a server that is killed forgets no more.
const KEEP_SPENT_EVERY: Duration = Duration::from_secs(5);
/// Waiting jobs that are ended at once.
const ENDED_AT_ONCE: usize = 512;
/// Waiting jobs read at once at the start.
const TAKEN_IN_AT_ONCE: usize = 8_192;
/// Jobs whose claim the store refused are tried again after this long.
const CLAIM_RETRY: Duration = Duration::from_secs(1);

type Reply = oneshot::Sender<Result<Accepted, SubmitError>>;

/// What the loop is told.
pub(super) enum Message {
    /// Something for the state machine.
    Event(Event),
    /// An attempt is over; `state`: what was committed, `None` for a late result.
    Ended { event: Event, state: Option<JobState> },
    /// Committed jobs that wait now; the reply says so, and where the only one stands.
    Accepted { queued: Vec<QueuedJob>, accepted: Accepted, reply: Reply },
    /// Commit new jobs.
    Submit { jobs: Vec<NewJob>, key: Option<IdempotencyKey>, reply: Reply },
    /// A running job is to be cancelled; its row says so already.
    Cancel { number: i64 },
    /// A waiting job was cancelled.
    Cancelled { model: String, priority: u8, number: i64 },
    /// A waiting job that the loop had given up ended.
    EndedQueued { state: JobState },
    /// Where a waiting job stands.
    Position { model: String, priority: u8, number: i64, reply: oneshot::Sender<Option<Position>> },
    /// An operator says something; the answer comes when what lasts of it is durable.
    Control { control: Control, reply: oneshot::Sender<Result<(), StoreError>> },
    /// Cancel waiting jobs with numbers below `before`, all that wait now if it is not said; `removed`: so many were.
    Purge { model: Option<String>, before: Option<i64>, removed: usize, reply: oneshot::Sender<usize> },
    /// An attempt is over: what did it have of the devices, in ms?
    Settle { model: Arc<str>, number: i64, reply: oneshot::Sender<f64> },
    /// A job has failed in a way that may be its worker's fault: is it put down to the worker's wake?
    BlameWake { model: Arc<str>, number: i64, reply: oneshot::Sender<bool> },
    /// An attempt that began at `since` was given up without a sign of its worker: with how many jobs on it was that found to
    /// hang? 0: it was not.
    BlameSilence { model: Arc<str>, number: i64, since: Millis, reply: oneshot::Sender<u32> },
    /// Keep where the devices' time went until now.
    KeepSpent { reply: oneshot::Sender<Result<(), StoreError>> },
    /// Where the devices' time went could not be stored.
    PutBackSpent { spent: Vec<Spent> },
    /// What was decided, and why?
    Decisions { filter: DecisionFilter, reply: oneshot::Sender<DecisionPage> },
    /// Waiting jobs have none of the endpoints that their model served when that was looked for; see [`Event::Unserved`].
    Unserved { model: String, endpoints: Vec<String>, jobs: Vec<(u8, i64)>, claimed: bool },
    /// models.yaml was edited.
    Reload { reload: Box<Reload>, reply: oneshot::Sender<()> },
    /// The same, with what was found of the queue: by model, jobs of endpoints that it does not serve by then.
    Reloaded { reload: Box<Reload>, unserved: Vec<(String, Vec<(u8, i64)>)>, reply: oneshot::Sender<()> },
    /// Are you there?
    Ping { reply: oneshot::Sender<()> },
}

/// Starts the supervisor of a worker, by its number.
pub type StartWorker = Arc<dyn Fn(&ModelSpec, u32) -> WorkerHandle + Send + Sync>;

/// What an edited models.yaml has for the scheduler.
#[derive(Clone, Debug)]
pub struct Reload {
    /// By the order of the file.
    pub models: Vec<ModelSpec>,
    /// Limits and waits.
    pub knobs: Knobs,
    /// Memory for parked workers, in bytes.
    pub park_bytes: u64,
}

/// What the scheduler is built from.
pub struct Parts {
    /// Writes and reads.
    pub store: Store,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Spawning and stopping.
    pub tasks: Tasks,
    /// HTTP to workers.
    pub client: WorkerClient,
    /// By the order of `models.yaml`.
    pub models: Vec<ModelSpec>,
    /// Limits and waits.
    pub knobs: Knobs,
    /// Supervisors by model and number.
    pub workers: Workers,
    /// Starts those of models that come later.
    pub start_worker: StartWorker,
    /// Processes that their loads may take over.
    pub spares: Spares,
    /// Their reports.
    pub reports: mpsc::UnboundedReceiver<(String, u32, Report)>,
    /// Fetches weights.
    pub fetches: Fetches,
    /// Number of this run of the server on its data dir.
    pub epoch: i64,
    /// What earlier runs learned.
    pub learned: BTreeMap<String, Learned>,
    /// How much tenants were served in earlier runs, in weighted GPU ms.
    pub served: BTreeMap<String, f64>,
    /// Weights of tenants by name; one that is not named weighs 1.
    pub weights: BTreeMap<String, f64>,
    /// What was said by hand in earlier runs.
    pub controls: Controls,
    /// Asks for GPUs. While it tells of none, no model is too big.
    pub gpus: Arc<dyn GpuProbe>,
    /// Memory for models that run on the CPU, in bytes.
    pub cpu_bytes: u64,
    /// Memory for parked workers, in bytes.
    pub park_bytes: u64,
    /// Number of the next job.
    pub next_number: i64,
}

/// Takes in the jobs that wait in the store, starts the loop and returns how to ask it.
pub async fn start(parts: Parts) -> Result<Handle, StoreError> {
    let Parts {
        store,
        clock,
        tasks,
        client,
        models,
        knobs,
        workers,
        start_worker,
        spares,
        reports,
        fetches: Fetches { handle: fetching, reports: fetches, missing },
        epoch,
        learned,
        served,
        weights,
        controls,
        gpus,
        cpu_bytes,
        park_bytes,
        next_number,
    } = parts;
    let (messages, inbox) = mpsc::unbounded_channel();
    let (view, viewed) = watch::channel(Arc::new(QueueView::default()));
    let hub = Hub::default();
    let handle = Handle::new(
        messages.clone(),
        hub.clone(),
        store.clone(),
        (workers.clone(), fetching.clone(), spares),
        viewed,
        tasks.clone(),
    );
    let there = devices::look(&gpus).await;
    let mut state = State::new(&models, knobs, &learned, epoch)
        .on(Inventory { host: park_bytes, ..Inventory::of(&there, cpu_bytes) })
        .with_tenants(&served, &weights)
        .with_controls(&controls)
        .without_weights(&missing);
    state.tell_parking(&BTreeMap::new());
    let begun = Instant::now();
    take_in(&store, &mut state, clock.now()).await?;
    // Known before the first plan; the supervisors' own reports come later.
    for ((model, replica), worker) in &workers {
        worker.has_looked().await;
        if worker.view().state == ModelState::Blocked {
            let (model, replica) = (model.clone(), *replica);
            state.on_event(Event::Report { model, replica, report: Report::NoGpu }, clock.now());
        }
    }
    store.took_in(begun.elapsed());
    let context = Context { store, hub, client, clock, tasks: tasks.clone(), messages, gpus };
    tasks.spawn("devices", devices::watch(context.clone(), there));
    let mut scheduler = Scheduler {
        state,
        context,
        models,
        workers,
        start_worker,
        inbox,
        reports,
        fetching,
        fetches,
        handle: handle.clone(),
        view,
        changed: true,
        view_at: None,
        keep_at: Instant::now() + KEEP_SPENT_EVERY,
        next_number,
        next_run: 1,
        names: HashMap::new(),
        is_settled: true,
        stops: HashMap::new(),
    };
    scheduler.publish();
    // Beside the start: it has to read each waiting job, and claims look, too.
    let (context, served) = (scheduler.context.clone(), scheduler.served_by(&scheduler.models));
    tasks.spawn("unserved", async move {
        for (model, jobs) in unserved(&context, served.clone()).await {
            let endpoints = served.iter().find(|(name, _)| *name == model).map(|(_, endpoints)| endpoints.clone());
            let endpoints = endpoints.unwrap_or_default();
            context.tell(Message::Unserved { model, endpoints, jobs, claimed: false });
        }
    });
    tasks.spawn("scheduler", scheduler.run());
    Ok(handle)
}

async fn take_in(store: &Store, state: &mut State, now: Millis) -> Result<(), StoreError> {
    let mut pages = pin!(store.reader().queued(TAKEN_IN_AT_ONCE).await?);
    while let Some(jobs) = pages.try_next().await? {
        jobs.iter().for_each(|job| state.enqueue(job, now));
    }
    Ok(())
}

struct Scheduler {
    state: State,
    context: Context,
    /// As models.yaml has them now.
    models: Vec<ModelSpec>,
    workers: Workers,
    start_worker: StartWorker,
    inbox: mpsc::UnboundedReceiver<Message>,
    reports: mpsc::UnboundedReceiver<(String, u32, Report)>,
    fetching: FetchHandle,
    fetches: mpsc::UnboundedReceiver<(String, u64, FetchReport)>,
    handle: Handle,
    view: watch::Sender<Arc<QueueView>>,
    /// Whether something happened since the last step.
    changed: bool,
    /// When the changed view is to be published; `None`: it has been.
    view_at: Option<Instant>,
    /// When it is next kept where the devices' time went.
    keep_at: Instant,
    next_number: i64,
    next_run: i64,
    names: HashMap<String, Arc<str>>,
    /// No supervisor is kept only until its worker has left.
    is_settled: bool,
    /// Ends the attempt of a running job when cancelled.
    stops: HashMap<i64, Stop>,
}

/// Answers a submission that was committed when the loop no longer schedules; the next start does.
fn confirm(message: Message) {
    if let Message::Accepted { accepted, reply, .. } = message {
        let _ = reply.send(Ok(accepted));
    }
}

enum Wake {
    Message(Message),
    Report(String, u32, Report),
    Fetch(String, u64, FetchReport),
    Timer,
    View,
    Keep,
    Soft,
    Hard,
}

impl Scheduler {
    async fn run(mut self) {
        self.step();
        self.publish();
        let mut stopping = false;
        loop {
            let wake = self.next(stopping).await;
            let timer = matches!(wake, Wake::Timer);
            match wake {
                Wake::Hard => break,
                Wake::Soft => {
                    stopping = true;
                    self.apply(Event::Stop);
                }
                Wake::View => {
                    self.publish();
                    continue;
                }
                Wake::Keep => {
                    self.keep_spent(None);
                    continue;
                }
                Wake::Timer => {}
                Wake::Report(model, replica, report) => self.on_report(model, replica, report),
                Wake::Fetch(model, want, report) => self.apply(Event::Fetch { model, want, report: Box::new(report) }),
                Wake::Message(message) => {
                    self.on_message(message);
                    for _ in 1..MESSAGES_PER_STEP {
                        let Ok(message) = self.inbox.try_recv() else {
                            break;
                        };
                        self.on_message(message);
                    }
                }
            }
            // Questions change nothing, and submissions only when they are committed.
            if std::mem::take(&mut self.changed) || timer {
                self.step();
            }
            // The timer comes last, and so never while messages do.
            if self.keep_at <= Instant::now() {
                self.keep_spent(None);
            }
            self.view_at.get_or_insert_with(|| Instant::now() + VIEW_EVERY);
            if stopping && self.state.is_quiet() {
                break;
            }
        }
        self.keep_spent(None);
        // What was committed in the meantime is accepted, whatever happens here.
        self.inbox.close();
        while let Some(message) = self.inbox.recv().await {
            confirm(message);
        }
        self.publish();
    }

    async fn next(&mut self, stopping: bool) -> Wake {
        let clock = &self.context.clock;
        let timer = self.state.wake_at().map(|at| Instant::now() + clock.until(at));
        let tasks = &self.context.tasks;
        tokio::select! {
            biased;
            () = tasks.hard().cancelled() => Wake::Hard,
            () = tasks.soft().cancelled(), if !stopping => Wake::Soft,
            Some((model, replica, report)) = self.reports.recv() => Wake::Report(model, replica, report),
            Some((model, want, report)) = self.fetches.recv() => Wake::Fetch(model, want, report),
            Some(message) = self.inbox.recv() => Wake::Message(message),
            () = until(self.view_at) => Wake::View,
            () = tokio::time::sleep_until(self.keep_at) => Wake::Keep,
            () = until(timer) => Wake::Timer,
        }
    }

    fn apply(&mut self, event: Event) {
        self.changed = true;
        let effects = self.state.on_event(event, self.context.clock.now());
        self.carry_out(effects);
    }

    fn step(&mut self) {
        let effects = self.state.step(self.context.clock.now());
        self.carry_out(effects);
    }

    /// The supervisors log what they report; here it is only counted and decided on.
    fn on_report(&mut self, model: String, replica: u32, report: Report) {
        // A suspected worker that turns out to be alive reports `Ready` again, which is no load.
        let index = self.state.index_of(&model);
        let loading = index.is_some_and(|index| self.state.is_loading(index, replica));
        let waking = index.is_some_and(|index| self.state.is_waking(index, replica));
        self.handle.count(|counters| match &report {
            Report::Ready { load_ms, .. } if loading => {
                let tier = if waking { &mut counters.wakes } else { &mut counters.loads };
                let (count, seconds) = tier.entry(model.clone()).or_default();
                *count += 1;
                *seconds += *load_ms as f64 / 1e3;
            }
            Report::Loaded { phases } => {
                for PhaseTime { phase, ms } in phases {
                    let (count, seconds) = counters.load_phases.entry((model.clone(), phase.clone())).or_default();
                    *count += 1;
                    *seconds += *ms as f64 / 1e3;
                }
            }
            Report::LoadFailed { .. } | Report::DoesNotFit { .. } => {
                *counters.failed_loads.entry(model.clone()).or_default() += 1
            }
            Report::Died { .. } => *counters.worker_deaths.entry(model.clone()).or_default() += 1,
            _ => {}
        });
        let may_be_last = !self.is_settled && matches!(report, Report::Stopped { .. } | Report::Died { .. });
        if let (Report::Loaded { phases }, Some(index)) = (&report, index) {
            let numbers = self.state.models[index].queue.heads(TOLD_MAX);
            self.tell(numbers, Told::Loaded { model: model.clone(), phases: phases.clone() });
        }
        self.apply(Event::Report { model, replica, report });
        if may_be_last {
            self.let_go();
        }
    }

    fn on_message(&mut self, message: Message) {
        match message {
            Message::Event(event) => {
                match &event {
                    Event::Claimed { lost: numbers, .. } | Event::Unclaimed { numbers, .. } => {
                        numbers.iter().for_each(|number| drop(self.stops.remove(number)))
                    }
                    Event::Ended { number, .. } => drop(self.stops.remove(number)),
                    _ => {}
                }
                self.apply(event);
            }
            Message::Ended { event, state } => {
                self.count_end(state);
                if let Event::Ended { number, .. } = &event {
                    self.stops.remove(number);
                }
                self.apply(event);
            }
            Message::Accepted { queued, mut accepted, reply } => {
                let only = match &queued[..] {
                    [job] => Some((job.model.clone(), job.priority, job.number)),
                    _ => None,
                };
                self.apply(Event::Queued(queued));
                accepted.position = only.and_then(|(model, priority, number)| self.position(&model, priority, number));
                let _ = reply.send(Ok(accepted));
            }
            Message::Submit { jobs, key, reply } => self.submit(jobs, key, reply),
            Message::Cancel { number } => {
                if let Some(stop) = self.stops.get(&number) {
                    stop.cancelled.cancel();
                }
            }
            Message::Cancelled { model, priority, number } => {
                self.count_end(Some(JobState::Cancelled));
                self.apply(Event::Gone { model, priority, number });
            }
            Message::EndedQueued { state } => self.count_end(Some(state)),
            Message::Position { model, priority, number, reply } => {
                let _ = reply.send(self.position(&model, priority, number));
            }
            Message::Control { control, reply } => self.control(control, reply),
            Message::PutBackSpent { spent } => self.state.put_back_spent(spent),
            Message::Purge { model, before, removed, reply } => self.purge(model, before, removed, reply),
            Message::Settle { model, number, reply } => {
                let _ = reply.send(self.state.settle(&model, number, self.context.clock.now()));
            }
            Message::BlameWake { model, number, reply } => {
                let effects = self.state.blame_wake(&model, number, self.context.clock.now());
                let _ = reply.send(effects.is_some());
                self.changed |= effects.is_some();
                self.carry_out(effects.unwrap_or_default());
            }
            Message::BlameSilence { model, number, since, reply } => {
                let (jobs, effects) = self.state.blame_silence(&model, number, since, self.context.clock.now());
                let _ = reply.send(jobs);
                self.changed |= !effects.is_empty();
                self.carry_out(effects);
            }
            Message::KeepSpent { reply } => self.keep_spent(Some(reply)),
            Message::Decisions { filter, reply } => {
                let _ = reply.send(self.state.decision_page(&filter));
            }
            Message::Unserved { model, endpoints, jobs, claimed } => self.on_unserved(model, &endpoints, jobs, claimed),
            Message::Reload { reload, reply } => {
                self.prepare_reload(reload, reply);
            }
            Message::Reloaded { reload, unserved, reply } => {
                self.reload(*reload, unserved);
                let _ = reply.send(());
            }
            Message::Ping { reply } => {
                let _ = reply.send(());
            }
        }
    }

    fn count_end(&self, state: Option<JobState>) {
        self.handle.count(|counters| match state {
            Some(state) if state.is_terminal() => *counters.ended.entry(state).or_default() += 1,
            Some(_) => {}
            None => counters.stale_results += 1,
        });
    }

    fn position(&mut self, model: &str, priority: u8, number: i64) -> Option<Position> {
        let now = self.context.clock.now();
        if let Some(why) = self.state.why_aside(model, number) {
            return Some(Position { reason: Some(why), ..Position::default() });
        }
        if !self.state.waits(model, priority, number) {
            return None;
        }
        let standing = self.state.standing(model, priority, number);
        let expected = self.state.expected(model, priority, number, now);
        let (position, ahead) = (standing.map(|s| s.0), standing.map(|s| s.1));
        let swaps_ahead = standing.map_or(0, |s| s.2);
        let eta_confidence = match (expected, swaps_ahead) {
            (None, _) => "",
            (Some(_), _) if standing.is_none() => "low",
            (Some(_), 0) => "high",
            (Some(_), 1) => "medium",
            (Some(_), _) => "low",
        };
        Some(Position {
            position,
            ahead_same_model: ahead,
            swaps_ahead,
            eta_start: expected,
            eta_finish: expected.map(|at| self.state.finish_of(model, at)),
            eta_confidence,
            reason: self.state.why(model, ahead, expected, now),
        })
    }
}

/// Waiting jobs whose endpoint their model does not serve, by model. If the store cannot say, their claims do.
async fn unserved(context: &Context, served: Vec<(String, Vec<String>)>) -> Vec<(String, Vec<(u8, i64)>)> {
    context.store.reader().unserved(served).await.unwrap_or_else(|error| {
        tracing::warn!("it is not known which waiting jobs their models serve no more: {error}");
        Vec::new()
    })
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
