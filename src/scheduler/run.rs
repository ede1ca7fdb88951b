//! The loop that owns the scheduler's state: takes messages, lets the state machine decide, carries out its effects beside
//! the loop, and publishes a view (`operate`: what is done by hand). Nothing here waits for a worker or for the disk.

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
    StateReason, Token,
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

#[path = "operate.rs"]
mod operate;

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
    /// Keep where the devices' time went until now.
    KeepSpent { reply: oneshot::Sender<Result<(), StoreError>> },
    /// Where the devices' time went could not be stored.
    PutBackSpent { spent: Vec<Spent> },
    /// What was decided, and why?
    Decisions { filter: DecisionFilter, reply: oneshot::Sender<DecisionPage> },
    /// models.yaml was edited.
    Reload { reload: Box<Reload>, reply: oneshot::Sender<()> },
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
    state.tell_parking();
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
    fetches: mpsc::UnboundedReceiver<(String, FetchReport)>,
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
    Fetch(String, FetchReport),
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
                Wake::Fetch(model, report) => self.apply(Event::Fetch { model, report: Box::new(report) }),
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
            Some((model, report)) = self.fetches.recv() => Wake::Fetch(model, report),
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
                    Event::Claimed { lost, .. } => lost.iter().for_each(|number| drop(self.stops.remove(number))),
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
            Message::KeepSpent { reply } => self.keep_spent(Some(reply)),
            Message::Decisions { filter, reply } => {
                let _ = reply.send(self.state.decision_page(&filter));
            }
            Message::Reload { reload, reply } => {
                self.reload(*reload);
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

    /// Assigns numbers and hands the jobs to the store in one go, so that the order of acceptance, of numbers and of
    /// commits is one. A single job takes the fast path if its model's worker is free for it.
    fn submit(&mut self, jobs: Vec<NewJob>, key: Option<IdempotencyKey>, reply: Reply) {
        if let Err(refusal) = self.refuse(&jobs) {
            let _ = reply.send(Err(refusal));
            return;
        }
        let now = self.context.clock.now();
        let mut numbered = Vec::with_capacity(jobs.len());
        for job in jobs {
            let Ok(tag) = getrandom::u64() else {
                let error = StoreError::Unusable("the system gives no random numbers".to_owned());
                let _ = reply.send(Err(SubmitError::Store(error)));
                return;
            };
            self.state.count_arrival(&job.model, now);
            numbered.push((JobId::new(now, self.next_number, tag), job));
            self.next_number += 1;
        }
        let fast = match &numbered[..] {
            // Whether a submission with a key is new is known when it is committed.
            [(id, job)] if key.is_none() => self.reserve(*id, job, now),
            _ => None,
        };
        // Only whoever submits one job may wait for it; members of a batch are looked up.
        let watch = match &numbered[..] {
            [(id, _)] => Some(self.context.hub.watch(id.number)),
            _ => None,
        };
        match fast {
            Some(dispatch) => self.insert_claimed(numbered, watch, dispatch, reply),
            None => self.insert_queued(numbered, key, watch, reply),
        }
    }

    fn refuse(&mut self, jobs: &[NewJob]) -> Result<(), SubmitError> {
        if self.context.tasks.soft().is_cancelled() {
            return Err(SubmitError::Draining);
        }
        if let Some(job) = jobs.iter().find(|job| self.state.is_draining(&job.model)) {
            return Err(SubmitError::Drained { model: job.model.clone() });
        }
        if self.context.store.is_full() {
            return Err(SubmitError::Store(StoreError::Full));
        }
        let Some(first) = jobs.first() else {
            return Ok(());
        };
        self.state.admit(&first.tenant, jobs.len()).map_err(|full| SubmitError::QueueFull {
            queued: full.queued,
            limit: full.limit,
            key: full.key,
            retry_after_s: self.state.room_in_s(),
        })?;
        let now = self.context.clock.now();
        if let Some(error) = jobs.iter().find_map(|job| self.state.refuse_too_big(&job.model, now)) {
            return Err(SubmitError::TooBig(Box::new(error)));
        }
        let sync = jobs.iter().find(|job| job.face == Face::Sync);
        match sync.and_then(|job| self.state.refusal(&job.model)) {
            Some(error) => Err(SubmitError::ModelLoadFailed(Box::new(error.clone()))),
            None => Ok(()),
        }
    }

    fn reserve(&mut self, id: JobId, new: &NewJob, now: Millis) -> Option<Dispatch> {
        let (model, tenant) = (shared(&mut self.names, &new.model), shared(&mut self.names, &new.tenant));
        let job = QueuedJob::of(id.number, id.created_ms, new, model.clone(), tenant);
        let place = self.state.reserve(&job, now)?;
        self.changed = true;
        let stop = Stop::default();
        self.stops.insert(id.number, stop.clone());
        self.handle.observe_wait(0.0);
        let job = ClaimedJob {
            change: Change { number: id.number, state: JobState::Running, version: 2, seq: 2 },
            token: Token { id, attempt: 1 },
            kind: JobKind::of_endpoint(&new.endpoint),
            face: new.face,
            failures: 0,
            crashes: 0,
            crash: None,
            max_attempts: new.max_attempts,
            stream: new.stream,
            deadline: new.deadline,
            timeout_ms: new.timeout_ms,
            endpoint: new.endpoint.clone(),
            body: Body::Inline(new.body.clone()),
        };
        let names_shape = place.max_batch > 1;
        Some(Dispatch { job, model, place, run: None, alone: false, run_jobs: 1, names_shape, stop })
    }

    fn insert_claimed(&self, jobs: Vec<(JobId, NewJob)>, watch: Option<JobWatch>, dispatch: Dispatch, reply: Reply) {
        let context = self.context.clone();
        let inserted = context.store.insert(jobs, true, None);
        self.context.tasks.spawn("dispatch", async move {
            match inserted.await {
                Ok(Inserted { jobs, replayed }) => {
                    let _ = reply.send(Ok(Accepted { jobs, watch, position: None, replayed }));
                    dispatch::run(context, dispatch).await;
                }
                Err(error) => {
                    let (model, number) = (dispatch.model.clone(), dispatch.job.token.id.number);
                    let event = Event::Ended { model, number, answered: false, suspect: false, back: None };
                    context.tell(Message::Event(event));
                    let _ = reply.send(Err(SubmitError::Store(error)));
                }
            }
        });
    }

    fn insert_queued(
        &mut self,
        jobs: Vec<(JobId, NewJob)>,
        key: Option<IdempotencyKey>,
        watch: Option<JobWatch>,
        reply: Reply,
    ) {
        let queued: Vec<QueuedJob> = jobs
            .iter()
            .map(|(id, job)| {
                let (model, tenant) = (shared(&mut self.names, &job.model), shared(&mut self.names, &job.tenant));
                QueuedJob::of(id.number, id.created_ms, job, model, tenant)
            })
            .collect();
        let context = self.context.clone();
        let inserted = context.store.insert(jobs, false, key);
        self.context.tasks.spawn("insert", async move {
            let accepted = match inserted.await {
                Ok(Inserted { jobs, replayed: false }) => {
                    // The loop replies: whoever knows the id can only ask about a job that the loop knows, too.
                    let accepted = Accepted { jobs, watch, position: None, replayed: false };
                    if let Err(unsent) = context.messages.send(Message::Accepted { queued, accepted, reply }) {
                        confirm(unsent.0);
                    }
                    return;
                }
                Ok(Inserted { jobs, replayed: true }) => {
                    let watch = watch.and_then(|_| jobs.first()).map(|job| context.hub.watch(job.id.number));
                    Ok(Accepted { jobs, watch, position: None, replayed: true })
                }
                Err(error) => Err(SubmitError::Store(error)),
            };
            let _ = reply.send(accepted);
        });
    }

    fn carry_out(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Claim { model, place, run } => self.claim(&model, place, run),
                Effect::Order { model, replica, set, order, park_bytes, at_leisure } => {
                    match self.workers.get(&(model, replica)) {
                        Some(worker) if at_leisure => worker.load_at_leisure(set, park_bytes),
                        Some(worker) => worker.order_on(order, set, park_bytes),
                        None => tracing::error!(replica, ?order, "an order for a worker that has no supervisor"),
                    }
                }
                Effect::Fetch { model } => self.fetching.want(&model),
                Effect::Evict { numbers } => {
                    let stops = numbers.iter().filter_map(|number| self.stops.get(number));
                    stops.for_each(|stop| stop.evicted.cancel());
                }
                Effect::EndQueued { numbers, error, overdue } => {
                    let ending = if overdue { Ending::Expired(error) } else { Ending::Failed(error) };
                    self.end_queued(numbers, ending);
                }
                Effect::CancelQueued(numbers) => self.end_queued(numbers, Ending::Cancelled),
                Effect::TellLoading { numbers, model, eta } => self.tell(numbers, Told::Loading { model, eta }),
                Effect::AddLoadTime { numbers, load_ms } => {
                    let store = self.context.store.clone();
                    self.beside("add load time", async move { store.add_load_time(numbers, load_ms).await });
                }
                Effect::Learn { model, learned } => {
                    let kept = self.context.store.learn(model, learned);
                    self.beside("learn", kept);
                }
                Effect::Served(tenants) => {
                    let store = self.context.store.clone();
                    self.beside("keep what tenants were served", async move { store.keep_served(tenants).await });
                }
                Effect::Announce(decision) => {
                    tracing::info!(
                        decision.action = decision.action,
                        decision.code = decision.code,
                        "{}",
                        decision.reason
                    );
                }
            }
        }
    }

    /// Runs a write whose failure loses no job.
    fn beside<F>(&self, what: &'static str, write: F)
    where
        F: Future<Output = Result<(), StoreError>> + Send + 'static,
    {
        self.context.tasks.spawn("store write", async move {
            if let Err(error) = write.await {
                tracing::warn!("{what}: not stored: {error}");
            }
        });
    }

    fn claim(&mut self, model: &Arc<str>, place: Place, run: Run) {
        let number = self.next_run;
        self.next_run += 1;
        let now = self.context.clock.now();
        let numbers: Vec<i64> = run.jobs.iter().map(|job| job.number).collect();
        let mut stops = HashMap::with_capacity(numbers.len());
        for job in &run.jobs {
            let stop = Stop::default();
            self.stops.insert(job.number, stop.clone());
            stops.insert(job.number, stop);
            if !job.was_started {
                self.handle.observe_wait((now - job.created_at) as f64 / 1e3);
            }
        }
        let claimed = self.context.store.claim(numbers, number);
        let (context, model) = (self.context.clone(), model.clone());
        self.context.tasks.spawn("claim", async move {
            match claimed.await {
                Ok(claims) => {
                    let lost = lost(&run, &claims);
                    let count = claims.len();
                    let tag = (count > 1 && place.max_batch > 1).then(|| RunTag { id: format!("run_{number}"), count });
                    let names_shape = place.max_batch > 1;
                    for (nth, job) in claims.into_iter().enumerate() {
                        context.hub.publish(job.change.number, job.change.version, job.change.seq);
                        let Some(stop) = stops.remove(&job.change.number) else { continue };
                        let dispatch = Dispatch {
                            job,
                            model: model.clone(),
                            place: place.clone(),
                            run: tag.clone(),
                            alone: run.alone && count == 1,
                            run_jobs: u32::try_from(count).unwrap_or(u32::MAX),
                            names_shape: names_shape && nth == 0,
                            stop,
                        };
                        context.tasks.spawn("dispatch", dispatch::run(context.clone(), dispatch));
                    }
                    if !lost.is_empty() {
                        context.tell(Message::Event(Event::Claimed { model, lost }));
                    }
                }
                Err(error) => give_back(&context, model, run.jobs, &error).await,
            }
        });
    }

    fn end_queued(&self, numbers: Vec<i64>, ending: Ending) {
        let context = self.context.clone();
        self.context.tasks.spawn("end queued", async move {
            end_all_queued(&context, &numbers, &ending).await;
        });
    }

    fn tell(&self, numbers: Vec<i64>, what: Told) {
        if numbers.is_empty() {
            return;
        }
        let context = self.context.clone();
        self.context.tasks.spawn("tell loading", async move {
            match context.store.tell_loading(numbers, what).await {
                Ok(changes) => changes.iter().for_each(|c| context.hub.publish(c.number, c.version, c.seq)),
                Err(error) => tracing::warn!("job.loading was not stored: {error}"),
            }
        });
    }

    fn publish(&mut self) {
        self.view_at = None;
        self.view.send_replace(Arc::new(self.queue_view()));
    }

    fn queue_view(&self) -> QueueView {
        let state = &self.state;
        let now = self.context.clock.now();
        QueueView {
            queued: state.queued(),
            running: state.models.iter().map(Model::under_way).sum(),
            decision: state.decision.clone(),
            history: state.history.iter().cloned().collect(),
            swaps: state.swaps,
            swaps_in_arrival_order: state.swaps_in_arrival_order,
            overload: state.overload(now),
            paused: state.controls().all.paused,
            draining: state.controls().all.draining,
            models: (0..state.models.len())
                .filter(|index| state.is_known(*index))
                .map(|index| self.model_view(index, now))
                .collect(),
        }
    }

    fn model_view(&self, index: usize, now: Millis) -> ModelQueueView {
        let model = &self.state.models[index];
        let holding = self.state.holding(index);
        let lacks_gpus = model.trouble.as_ref().is_some_and(|trouble| trouble.reason == StateReason::NoGpu);
        let fetch = model.lack.as_ref().and_then(|lack| lack.fetch.as_ref()).filter(|_| holding == Holding::Nothing);
        let state = match (holding, fetch) {
            (Holding::Draining, _) => ModelState::Draining,
            (Holding::Nothing, _) if lacks_gpus => ModelState::Blocked,
            (_, Some(fetch)) if fetch.phase == FetchPhase::Failed => ModelState::Backoff,
            (_, Some(_)) => ModelState::Fetching,
            _ => state_of(handles(&self.workers, &model.name).map(|worker| worker.view().state)),
        };
        let has_begun = |lack: &&Lack| lack.fetch.is_some();
        let lack = model.lack.as_ref().filter(has_begun).map(|lack| &lack.trouble);
        let reason = match model.trouble.as_ref().or(lack) {
            _ if model.held.paused => Some(StateReason::Paused),
            Some(trouble) => Some(trouble.reason),
            None if holding == Holding::Loading => Some(StateReason::ModelLoading),
            None => None,
        };
        // What is on its way is no trouble.
        let trouble = model.trouble.as_ref().or(lack).filter(|trouble| trouble.reason != StateReason::ModelFetching);
        let failed_fetch = model.lack.as_ref().and_then(|lack| lack.failure.clone());
        let fetch_ms = fetch.and_then(|fetch| fetch.eta_s).map(|left| left * 1e3);
        let is_expected = model.blocked().is_none() || (trouble.is_none() && fetch_ms.is_some());
        let resident = matches!(holding, Holding::Serving | Holding::Draining);
        let oldest = [Class::Interactive, Class::Batch].into_iter().filter_map(|class| model.queue.oldest(class)).min();
        let backlog = model.queue.len() as f64 * model.each_ms();
        let load_ms = self.state.load_ms(index);
        let wait = if resident { backlog } else { backlog + load_ms + fetch_ms.unwrap_or(0.0) };
        ModelQueueView {
            model: model.name.to_string(),
            queued: model.queue.len(),
            queued_interactive: model.queue.pending().0,
            running: model.under_way(),
            oldest_age_s: oldest.map(|at| (now - at) as f64 / 1e3),
            resident,
            est_wait_s: (is_expected && !model.held.paused).then_some(wait / 1e3),
            swap_cost_s: (load_ms + model.stop_ms()) / 1e3,
            due_at: self.state.due(index),
            state,
            state_reason: reason,
            trouble: trouble.map(|t| t.text.clone()),
            last_failure: failed_fetch
                .or_else(|| last_failure(handles(&self.workers, &model.name).map(WorkerHandle::view))),
            fetch: fetch.cloned(),
            paused: model.held.paused,
            draining: model.held.draining,
            pinned: model.is_pinned(),
            batching: model.batching.shapes(),
            parking: self.state.parking(index),
        }
    }
}

/// Why the last load of a model failed, if none of its workers has got ready since.
fn last_failure(mut workers: impl Iterator<Item = WorkerView>) -> Option<String> {
    workers.find_map(|view| view.last_failure)
}

/// Where a model is whose workers are there: as far as the one that is nearest to serving, or else in the worst trouble.
fn state_of(workers: impl Iterator<Item = ModelState>) -> ModelState {
    let rank = |state: &ModelState| match state {
        ModelState::Resident => 0,
        ModelState::Waking => 1,
        ModelState::Loading => 2,
        ModelState::Fetching => 3,
        ModelState::Draining => 4,
        ModelState::Parking => 5,
        ModelState::Parked => 6,
        ModelState::Quarantined => 7,
        ModelState::Backoff => 8,
        ModelState::Blocked => 9,
        ModelState::Absent => 10,
    };
    workers.min_by_key(rank).unwrap_or(ModelState::Blocked)
}

/// Jobs of a run that were not queued any more.
pub(super) fn lost(run: &Run, claims: &[ClaimedJob]) -> Vec<i64> {
    let is_claimed = |number| claims.iter().any(|claim| claim.change.number == number);
    run.jobs.iter().map(|job| job.number).filter(|number| !is_claimed(*number)).collect()
}

/// How waiting jobs end.
enum Ending {
    Failed(JobError),
    Expired(JobError),
    Cancelled,
}

impl Ending {
    fn committed(&self) -> (JobState, End, JobError) {
        match self {
            Self::Failed(error) => (JobState::Failed, End::Failed(error.clone()), error.clone()),
            Self::Expired(error) => (JobState::Expired, End::Expired(error.clone()), error.clone()),
            Self::Cancelled => (JobState::Cancelled, End::Cancelled, store::cancelled_by_user()),
        }
    }
}

/// Ends waiting jobs, and says how many it were.
async fn end_all_queued(context: &Context, numbers: &[i64], ending: &Ending) -> usize {
    let mut ended = 0;
    // Together, so that they share commits.
    for some in numbers.chunks(ENDED_AT_ONCE) {
        let all = join_all(some.iter().map(|number| end_one_queued(context, *number, ending))).await;
        ended += all.into_iter().filter(|ended| *ended).count();
    }
    ended
}

/// Ends a waiting job, trying again while the store refuses: the loop may have forgotten it already. False: it did not wait
/// any more.
async fn end_one_queued(context: &Context, number: i64, ending: &Ending) -> bool {
    let mut pause = dispatch::STORE_RETRY;
    loop {
        let (state, end, error) = ending.committed();
        match context.store.end_queued(number, end).await {
            Ok(Some(change)) => {
                let ended = Ended { state, answer: None, error: Some(error) };
                context.hub.end(number, change.version, change.seq, ended);
                context.tell(Message::EndedQueued { state });
                return true;
            }
            Ok(None) | Err(StoreError::Stopped) => return false,
            Err(error) => {
                tracing::error!(job.number = number, "a waiting job could not be ended, trying again: {error}")
            }
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => pause = (pause * 2).min(dispatch::STORE_RETRY_MAX),
            () = context.tasks.hard().cancelled() => return false,
        }
    }
}

/// The store refused a claim: the jobs are still queued, and are tried again a little later.
async fn give_back(context: &Context, model: Arc<str>, jobs: Vec<QueuedJob>, error: &StoreError) {
    tracing::error!(model.name = %model, jobs = jobs.len(), "jobs could not be claimed, trying again: {error}");
    tokio::time::sleep(CLAIM_RETRY).await;
    context.tell(Message::Event(Event::Claimed { model, lost: jobs.iter().map(|job| job.number).collect() }));
    context.tell(Message::Event(Event::Queued(jobs)));
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
