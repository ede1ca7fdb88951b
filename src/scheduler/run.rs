//! The loop that owns the scheduler's state: takes messages, lets the state machine decide, carries out its effects beside
//! the loop, and publishes a view. Nothing here waits for a worker or for the disk.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::domain::worker::Report;
use crate::domain::{
    Face, Job, JobError, JobId, JobKind, JobState, Millis, ModelSpec, ModelState, NewJob, StateReason, Token,
};
use crate::lifecycle::Tasks;
use crate::policy::Knobs;
use crate::scheduler::dispatch::{self, Context, Dispatch};
use crate::scheduler::handle::{Handle, ModelQueueView, Position, QueueView, SubmitError, Submitted};
use crate::scheduler::hub::{Ended, Hub, JobWatch};
use crate::scheduler::queue::{Run, shared};
use crate::scheduler::state::{Device, Effect, Event, State};
use crate::store::{End, Learned, QueuedJob, Store, StoreError};
use crate::worker::client::{RunTag, WorkerClient};
use crate::worker::supervisor::WorkerHandle;

/// Messages handled before effects are carried out and the view is published.
const MESSAGES_PER_STEP: usize = 256;
/// Views are published at most this often.
const VIEW_EVERY: Duration = Duration::from_millis(5);
/// Jobs whose claim the store refused are tried again after this long.
const CLAIM_RETRY: Duration = Duration::from_secs(1);

/// What the loop is told.
pub(super) enum Message {
    /// Something for the state machine.
    Event(Event),
    /// An attempt is over; `state`: what was committed, `None` for a late result.
    Ended { event: Event, state: Option<JobState> },
    /// Commit new jobs.
    Submit { jobs: Vec<NewJob>, reply: oneshot::Sender<Result<Vec<Submitted>, SubmitError>> },
    /// A running job is to be cancelled; its row says so already.
    Cancel { number: i64 },
    /// A job ended without having run in this process.
    EndedQueued { number: i64, state: JobState },
    /// Where a waiting job stands.
    Position { number: i64, reply: oneshot::Sender<Option<Position>> },
    /// Are you there?
    Ping { reply: oneshot::Sender<()> },
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
    /// One per model, with the receiver of their reports.
    pub workers: BTreeMap<String, WorkerHandle>,
    /// Reports of all workers.
    pub reports: mpsc::UnboundedReceiver<(String, Report)>,
    /// Waiting jobs of earlier runs.
    pub queued: Vec<QueuedJob>,
    /// What earlier runs learned.
    pub learned: BTreeMap<String, Learned>,
    /// Number of the next job.
    pub next_number: i64,
}

/// Starts the loop and returns how to ask it.
pub fn start(parts: Parts) -> Handle {
    let Parts { store, clock, tasks, client, models, knobs, workers, reports, queued, learned, next_number } = parts;
    let (messages, inbox) = mpsc::unbounded_channel();
    let (view, viewed) = watch::channel(Arc::new(QueueView::default()));
    let hub = Hub::default();
    let handle = Handle::new(messages.clone(), hub.clone(), store.clone(), workers.clone(), viewed);
    let mut state = State::new(&models, knobs, &learned);
    state.on_event(Event::Queued(queued), clock.now());
    let context = Context { store, hub, client, clock, tasks: tasks.clone(), messages };
    let scheduler = Scheduler {
        state,
        context,
        workers,
        inbox,
        reports,
        handle: handle.clone(),
        view,
        view_at: None,
        next_number,
        next_run: 1,
        names: HashMap::new(),
        stops: HashMap::new(),
    };
    tasks.spawn("scheduler", scheduler.run());
    handle
}

struct Scheduler {
    state: State,
    context: Context,
    workers: BTreeMap<String, WorkerHandle>,
    inbox: mpsc::UnboundedReceiver<Message>,
    reports: mpsc::UnboundedReceiver<(String, Report)>,
    handle: Handle,
    view: watch::Sender<Arc<QueueView>>,
    /// When the changed view is to be published; `None`: it has been.
    view_at: Option<Instant>,
    next_number: i64,
    next_run: u64,
    names: HashMap<String, Arc<str>>,
    /// Ends the attempt of a running job when cancelled.
    stops: HashMap<i64, CancellationToken>,
}

enum Wake {
    Message(Message),
    Report(String, Report),
    Timer,
    View,
    Soft,
    Hard,
}

impl Scheduler {
    async fn run(mut self) {
        self.step();
        self.publish();
        let mut stopping = false;
        loop {
            match self.next(stopping).await {
                Wake::Hard => break,
                Wake::Soft => {
                    stopping = true;
                    self.apply(Event::Stop);
                }
                Wake::View => {
                    self.publish();
                    continue;
                }
                Wake::Timer => {}
                Wake::Report(model, report) => self.on_report(model, report),
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
            self.step();
            self.view_at.get_or_insert_with(|| Instant::now() + VIEW_EVERY);
            if stopping && self.state.is_quiet() {
                break;
            }
        }
        self.publish();
    }

    async fn next(&mut self, stopping: bool) -> Wake {
        let now = self.context.clock.now();
        let timer =
            self.state.wake_at().map(|at| Instant::now() + Duration::from_millis(u64::try_from(at - now).unwrap_or(0)));
        let tasks = &self.context.tasks;
        tokio::select! {
            biased;
            () = tasks.hard().cancelled() => Wake::Hard,
            () = tasks.soft().cancelled(), if !stopping => Wake::Soft,
            Some((model, report)) = self.reports.recv() => Wake::Report(model, report),
            Some(message) = self.inbox.recv() => Wake::Message(message),
            () = until(self.view_at) => Wake::View,
            () = until(timer) => Wake::Timer,
        }
    }

    fn apply(&mut self, event: Event) {
        let effects = self.state.on_event(event, self.context.clock.now());
        self.carry_out(effects);
    }

    fn step(&mut self) {
        let effects = self.state.step(self.context.clock.now());
        self.carry_out(effects);
    }

    /// The supervisors log what they report; here it is only counted and decided on.
    fn on_report(&mut self, model: String, report: Report) {
        // A suspected worker that turns out to be alive reports `Ready` again, which is no load.
        let loading = matches!(self.state.device, Device::Loading { .. });
        self.handle.count(|counters| match &report {
            Report::Ready { load_ms, .. } if loading => {
                let (count, seconds) = counters.loads.entry(model.clone()).or_default();
                *count += 1;
                *seconds += *load_ms as f64 / 1e3;
            }
            Report::LoadFailed { .. } => *counters.failed_loads.entry(model.clone()).or_default() += 1,
            Report::Died { .. } => *counters.worker_deaths.entry(model.clone()).or_default() += 1,
            _ => {}
        });
        self.apply(Event::Report { model, report });
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
            Message::Submit { jobs, reply } => self.submit(jobs, reply),
            Message::Cancel { number } => {
                if let Some(stop) = self.stops.get(&number) {
                    stop.cancel();
                }
            }
            Message::EndedQueued { number, state } => {
                self.count_end(Some(state));
                self.apply(Event::Gone { number });
            }
            Message::Position { number, reply } => {
                let _ = reply.send(self.position(number));
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

    fn position(&self, number: i64) -> Option<Position> {
        let (position, ahead, swaps_ahead, eta) = self.state.standing(number, self.context.clock.now())?;
        let eta_confidence = if swaps_ahead == 0 {
            "high"
        } else if swaps_ahead == 1 {
            "medium"
        } else {
            "low"
        };
        Some(Position {
            position: Some(position),
            ahead_same_model: Some(ahead),
            swaps_ahead,
            eta_start: Some(eta),
            eta_confidence,
        })
    }

    /// Assigns numbers and hands the jobs to the store in one go, so that the order of acceptance, of numbers and of
    /// commits is one. A single job takes the fast path if its model's worker is free for it.
    fn submit(&mut self, jobs: Vec<NewJob>, reply: oneshot::Sender<Result<Vec<Submitted>, SubmitError>>) {
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
        let watches: Vec<JobWatch> = numbered.iter().map(|(id, _)| self.context.hub.watch(id.number)).collect();
        let fast = match &numbered[..] {
            [(id, job)] => self.reserve(*id, job, now),
            _ => None,
        };
        match fast {
            Some(dispatch) => self.insert_claimed(numbered, watches, dispatch, reply),
            None => self.insert_queued(numbered, watches, reply),
        }
    }

    fn refuse(&self, jobs: &[NewJob]) -> Result<(), SubmitError> {
        if self.context.tasks.soft().is_cancelled() {
            return Err(SubmitError::Draining);
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
            retry_after_s: self.state.room_in_s(),
        })?;
        let sync = jobs.iter().find(|job| job.face == Face::Sync);
        match sync.and_then(|job| self.state.refusal(&job.model)) {
            Some(error) => Err(SubmitError::ModelLoadFailed(Box::new(error.clone()))),
            None => Ok(()),
        }
    }

    fn reserve(&mut self, id: JobId, new: &NewJob, now: Millis) -> Option<Dispatch> {
        let job = QueuedJob {
            id,
            kind: JobKind::of_endpoint(&new.endpoint),
            model: shared(&mut self.names, &new.model),
            tenant: shared(&mut self.names, &new.tenant),
            face: new.face,
            priority: new.priority,
            attempt: 1,
            failures: 0,
            crashes: 0,
            max_attempts: new.max_attempts,
            batch_key: new.batch_key,
            stream: new.stream,
            created_at: id.created_ms,
            not_before: None,
            start_deadline: new.start_deadline,
            deadline: new.deadline,
            timeout_ms: new.timeout_ms,
        };
        let base_url = self.state.reserve(&job, now)?;
        let cancelled = CancellationToken::new();
        self.stops.insert(id.number, cancelled.clone());
        self.handle.observe_wait(0.0);
        Some(Dispatch {
            token: Token { id, attempt: 1 },
            endpoint: new.endpoint.clone(),
            body: new.body.clone(),
            base_url,
            run: None,
            alone: false,
            cancelled,
            job,
        })
    }

    fn insert_claimed(
        &self,
        jobs: Vec<(JobId, NewJob)>,
        watches: Vec<JobWatch>,
        dispatch: Dispatch,
        reply: oneshot::Sender<Result<Vec<Submitted>, SubmitError>>,
    ) {
        let context = self.context.clone();
        let inserted = context.store.insert(jobs, true);
        self.context.tasks.spawn("dispatch", async move {
            match inserted.await {
                Ok(jobs) => {
                    let _ = reply.send(Ok(submitted(jobs, watches)));
                    dispatch::run(context, dispatch).await;
                }
                Err(error) => {
                    let (model, number) = (dispatch.job.model.clone(), dispatch.token.id.number);
                    context.tell(Message::Event(Event::Ended { model, number, answered: false, suspect: false }));
                    let _ = reply.send(Err(SubmitError::Store(error)));
                }
            }
        });
    }

    fn insert_queued(
        &mut self,
        jobs: Vec<(JobId, NewJob)>,
        watches: Vec<JobWatch>,
        reply: oneshot::Sender<Result<Vec<Submitted>, SubmitError>>,
    ) {
        let names: Vec<(Arc<str>, Arc<str>)> = jobs
            .iter()
            .map(|(_, job)| (shared(&mut self.names, &job.model), shared(&mut self.names, &job.tenant)))
            .collect();
        let context = self.context.clone();
        let inserted = context.store.insert(jobs, false);
        self.context.tasks.spawn("insert", async move {
            match inserted.await {
                Ok(jobs) => {
                    let queued = jobs
                        .iter()
                        .zip(names)
                        .map(|(job, (model, tenant))| QueuedJob::of(job, model, tenant))
                        .collect();
                    // Before the reply: whoever knows the id can only ask about a job that the loop knows, too.
                    context.tell(Message::Event(Event::Queued(queued)));
                    let _ = reply.send(Ok(submitted(jobs, watches)));
                }
                Err(error) => {
                    let _ = reply.send(Err(SubmitError::Store(error)));
                }
            }
        });
    }

    fn carry_out(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Claim { model, base_url, run } => self.claim(&model, base_url, run),
                Effect::Order { model, order } => {
                    if let Some(worker) = self.workers.get(&model) {
                        worker.order(order);
                    }
                }
                Effect::EndQueued { numbers, error, overdue } => self.end_queued(numbers, error, overdue),
                Effect::TellLoading { numbers, model, eta } => self.tell_loading(numbers, model, eta),
                Effect::AddLoadTime { numbers, load_ms } => {
                    let store = self.context.store.clone();
                    self.beside("add load time", async move { store.add_load_time(numbers, load_ms).await });
                }
                Effect::Learn { model, learned } => {
                    let store = self.context.store.clone();
                    self.beside("learn", async move { store.learn(model, learned).await });
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

    fn claim(&mut self, model: &Arc<str>, base_url: String, run: Run) {
        let run_id = format!("run_{}", self.next_run);
        self.next_run += 1;
        let now = self.context.clock.now();
        let numbers: Vec<i64> = run.jobs.iter().map(|job| job.id.number).collect();
        for job in &run.jobs {
            self.stops.insert(job.id.number, CancellationToken::new());
            if job.attempt == 0 {
                self.handle.observe_wait((now - job.created_at) as f64 / 1e3);
            }
        }
        let stops: Vec<CancellationToken> = numbers.iter().filter_map(|n| self.stops.get(n).cloned()).collect();
        let claimed = self.context.store.claim(numbers, model.to_string(), run_id.clone());
        let (context, model) = (self.context.clone(), model.clone());
        self.context.tasks.spawn("claim", async move {
            let jobs: Vec<_> = run.jobs.into_iter().zip(stops).collect();
            match claimed.await {
                Ok(claims) => {
                    let count = claims.len();
                    let tag = (count > 1).then_some(RunTag { id: run_id, count });
                    let mut lost = Vec::new();
                    for (job, cancelled) in jobs {
                        match claims.iter().find(|claim| claim.change.number == job.id.number) {
                            Some(claim) => {
                                context.hub.publish(job.id.number, claim.change.version, claim.change.seq);
                                let token = Token { id: job.id, attempt: claim.attempt };
                                let send = send(
                                    context.clone(),
                                    job,
                                    token,
                                    base_url.clone(),
                                    tag.clone(),
                                    run.alone,
                                    cancelled,
                                );
                                context.tasks.spawn("dispatch", send);
                            }
                            None => lost.push(job.id.number),
                        }
                    }
                    if !lost.is_empty() {
                        context.tell(Message::Event(Event::Claimed { model, lost }));
                    }
                }
                Err(error) => give_back(&context, model, jobs.into_iter().map(|(job, _)| job).collect(), &error).await,
            }
        });
    }

    fn end_queued(&self, numbers: Vec<i64>, error: JobError, overdue: bool) {
        let context = self.context.clone();
        self.context.tasks.spawn("end queued", async move {
            for number in numbers {
                end_one_queued(&context, number, &error, overdue).await;
            }
        });
    }

    fn tell_loading(&self, numbers: Vec<i64>, model: String, eta: Millis) {
        let context = self.context.clone();
        self.context.tasks.spawn("tell loading", async move {
            match context.store.tell_loading(numbers, model, eta).await {
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
            running: state.models.iter().map(|m| m.queue.running().len()).sum(),
            decision: state.decision.clone(),
            history: state.history.iter().cloned().collect(),
            swaps: state.swaps,
            swaps_in_arrival_order: state.swaps_in_arrival_order,
            models: (0..state.models.len()).map(|index| self.model_view(index, now)).collect(),
        }
    }

    fn model_view(&self, index: usize, now: Millis) -> ModelQueueView {
        let model = &self.state.models[index];
        let view = model.view();
        let worker = self.workers.get(&*model.name).map(WorkerHandle::view);
        let device = &self.state.device;
        let mine = device.model() == Some(index);
        let state = match device {
            Device::Draining { .. } if mine => ModelState::Draining,
            _ => worker.map_or(ModelState::Blocked, |w| w.state),
        };
        let reason = match &model.trouble {
            Some(trouble) => Some(trouble.reason),
            None if mine && matches!(device, Device::Loading { .. }) => Some(StateReason::ModelLoading),
            None => None,
        };
        let resident = mine && matches!(device, Device::Serving { .. } | Device::Draining { .. });
        let oldest = [view.oldest_interactive, view.oldest_batch].into_iter().flatten().min();
        let backlog = model.queue.len() as f64 * model.each_ms();
        let wait = if resident { backlog } else { backlog + model.load_ms() };
        ModelQueueView {
            model: model.name.to_string(),
            queued: model.queue.len(),
            queued_interactive: view.pending_interactive,
            running: view.running,
            oldest_age_s: oldest.map(|at| (now - at) as f64 / 1e3),
            resident,
            est_wait_s: model.trouble.is_none().then_some(wait / 1e3),
            swap_cost_s: (model.load_ms() + view.stop_ms) / 1e3,
            due_at: self.state.due(index),
            state,
            state_reason: reason,
            trouble: model.trouble.as_ref().map(|t| t.text.clone()),
        }
    }
}

/// Reads the claimed job's request and dispatches it.
async fn send(
    context: Context,
    job: QueuedJob,
    token: Token,
    base_url: String,
    run: Option<RunTag>,
    alone: bool,
    cancelled: CancellationToken,
) {
    match context.store.reader().request(token.id.number).await {
        Ok((endpoint, body)) => {
            dispatch::run(context, Dispatch { job, token, endpoint, body, base_url, run, alone, cancelled }).await;
        }
        Err(error) => {
            tracing::error!(job.id = %token.id, "a claimed job's request could not be read, trying again: {error}");
            let (endpoint, body) = (String::new(), bytes::Bytes::new());
            dispatch::give_up(context, Dispatch { job, token, endpoint, body, base_url, run, alone, cancelled }).await;
        }
    }
}

/// Ends a waiting job, trying again while the store refuses: the loop may have forgotten it already.
async fn end_one_queued(context: &Context, number: i64, error: &JobError, overdue: bool) {
    let mut pause = dispatch::STORE_RETRY;
    loop {
        let (state, end) = if overdue {
            (JobState::Expired, End::Expired(error.clone()))
        } else {
            (JobState::Failed, End::Failed(error.clone()))
        };
        match context.store.end_queued(number, end).await {
            Ok(Some(change)) => {
                let ended = Ended { state, answer: None, error: Some(error.clone()) };
                context.hub.end(number, change.version, change.seq, ended);
                return context.tell(Message::EndedQueued { number, state });
            }
            Ok(None) | Err(StoreError::Stopped) => return,
            Err(error) => {
                tracing::error!(job.number = number, "a waiting job could not be ended, trying again: {error}")
            }
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => pause = (pause * 2).min(dispatch::STORE_RETRY_MAX),
            () = context.tasks.hard().cancelled() => return,
        }
    }
}

/// The store refused a claim: the jobs are still queued, and are tried again a little later.
async fn give_back(context: &Context, model: Arc<str>, jobs: Vec<QueuedJob>, error: &StoreError) {
    tracing::error!(model.name = %model, jobs = jobs.len(), "jobs could not be claimed, trying again: {error}");
    tokio::time::sleep(CLAIM_RETRY).await;
    context.tell(Message::Event(Event::Claimed { model, lost: jobs.iter().map(|job| job.id.number).collect() }));
    context.tell(Message::Event(Event::Queued(jobs)));
}

fn submitted(jobs: Vec<Job>, watches: Vec<JobWatch>) -> Vec<Submitted> {
    jobs.into_iter().zip(watches).map(|(job, watch)| Submitted { job, watch }).collect()
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
