//! The scheduler as a pure state machine: events in, effects out, `now` as an argument. It owns one truth: which model
//! holds the device, and which jobs wait for and run on it. Everything else (processes, rows) belongs to others, who tell
//! it by events and are asked by effects.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use crate::domain::worker::Report;
use crate::domain::{Class, ErrorCode, JobError, Millis, ModelKind, ModelSpec, StateReason};
use crate::policy::plan::{self, Action, Decision, DeviceView, ModelView, Plan, View};
use crate::policy::{Knobs, admission};
use crate::scheduler::queue::{Queue, Run, Slots};
use crate::store::{Learned, QueuedJob};
use crate::worker::supervisor::Order;

/// How long a plan stands while only more of the same arrives.
const PLAN_EVERY_MS: i64 = 5;
/// Decisions kept for a person to look back on.
const HISTORY_MAX: usize = 50;
/// Waiting jobs that are told when their model is being loaded.
const TOLD_MAX: usize = 256;
/// Farthest position that is counted, from the nearer end of a queue.
const RANK_MAX: usize = 1_000;
/// Weight of a new sample: loads, then service times. See `design`: EWMAs with .3 and .1.
const LOAD_WEIGHT: f64 = 0.3;
const SERVICE_WEIGHT: f64 = 0.1;
/// Bits that count the loads of one run of the server.
const LOAD_BITS: u32 = 24;
/// Time constant of the arrival rate.
const RATE_TAU_MS: f64 = 300_000.0;

/// Something that happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// Committed jobs that wait now: new ones, or given back after an attempt.
    Queued(Vec<QueuedJob>),
    /// A claim was committed; `lost` were not queued any more.
    Claimed {
        /// Entry name.
        model: Arc<str>,
        /// Numbers that are not this run's after all.
        lost: Vec<i64>,
    },
    /// An attempt is over and its slot free.
    Ended {
        /// Entry name.
        model: Arc<str>,
        /// The job.
        number: i64,
        /// It was answered: its time counts as a sample.
        answered: bool,
        /// Its worker could not be reached or broke the connection.
        suspect: bool,
        /// The job waits again; committed.
        back: Option<Back>,
    },
    /// An attempt ran into its time limit and showed no progress for the last half of it: its worker may hang, though its
    /// health is well.
    Silent {
        /// Entry name.
        model: Arc<str>,
        /// When the attempt was sent.
        since: Millis,
    },
    /// A waiting job is not to be scheduled any more: it was cancelled; committed.
    Gone {
        /// Entry name.
        model: String,
        /// Of the job.
        priority: u8,
        /// The job.
        number: i64,
    },
    /// A supervisor's report.
    Report {
        /// Entry name.
        model: String,
        /// What it says.
        report: Report,
    },
    /// The server is stopping: nothing new starts.
    Stop,
}

/// How a job comes back to the queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Back {
    /// Not to be claimed before.
    pub not_before: Option<Millis>,
    /// The death of a worker that it was part of.
    pub crash: Option<i64>,
}

/// A place on a worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Where the worker answers.
    pub base_url: String,
    /// Which load it is from: jobs that are lost with it died together.
    pub load: i64,
    /// Most jobs in one run of its model.
    pub max_batch: u32,
}

/// Something to be done.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Claim these jobs, then send them to the worker.
    Claim {
        /// Entry name.
        model: Arc<str>,
        /// Where they go.
        place: Place,
        /// The jobs.
        run: Run,
    },
    /// Give a supervisor an order.
    Order {
        /// Entry name.
        model: String,
        /// The order.
        order: Order,
    },
    /// End waiting jobs with an error: `expired` if `overdue`, else `failed`.
    EndQueued {
        /// The jobs.
        numbers: Vec<i64>,
        /// Why.
        error: JobError,
        /// A deadline passed.
        overdue: bool,
    },
    /// Tell waiting jobs that their model is being loaded.
    TellLoading {
        /// The jobs.
        numbers: Vec<i64>,
        /// Entry name.
        model: String,
        /// When it should be ready.
        eta: Millis,
    },
    /// Add a load's time to the jobs that waited for it.
    AddLoadTime {
        /// The jobs.
        numbers: Vec<i64>,
        /// Its length.
        load_ms: i64,
    },
    /// Keep what was learned.
    Learn {
        /// Entry name.
        model: String,
        /// All of it.
        learned: Learned,
    },
    /// Log a decision that starts or ends something.
    Announce(Decision),
}

/// Why a model cannot be loaded now.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Trouble {
    /// What its waiting jobs say.
    pub(super) reason: StateReason,
    /// What a sync caller is told; `None`: such calls wait.
    pub(super) error: Option<JobError>,
    /// For a person.
    pub(super) text: String,
    /// When it may be over by itself.
    pub(super) until: Option<Millis>,
}

/// One model.
#[derive(Debug)]
pub(super) struct Model {
    pub(super) name: Arc<str>,
    pub(super) queue: Queue,
    pub(super) trouble: Option<Trouble>,
    slots: Slots,
    startup_ms: f64,
    service_prior_ms: f64,
    idle_ttl_ms: Option<i64>,
    preload: bool,
    timeout_ms: i64,
    learned: Learned,
    rate: f64,
    rate_at: Millis,
    backlogged_since: Option<Millis>,
    answered_at: Option<Millis>,
}

impl Model {
    fn of(spec: &ModelSpec) -> Self {
        let name: Arc<str> = Arc::from(spec.name.as_str());
        let service_prior_ms = match spec.kind {
            ModelKind::Text | ModelKind::Custom => 3_000.0,
            ModelKind::Image => 5_000.0,
            ModelKind::Audio => 10_000.0,
        };
        Self {
            queue: Queue::new(name.clone()),
            name,
            trouble: None,
            slots: Slots { limit: spec.limit, max_batch: spec.max_batch },
            startup_ms: spec.startup_time.as_secs_f64() * 1e3,
            service_prior_ms,
            idle_ttl_ms: spec.idle_ttl.map(|ttl| i64::try_from(ttl.as_millis()).unwrap_or(i64::MAX)),
            preload: spec.preload,
            timeout_ms: i64::try_from(spec.timeout.as_millis()).unwrap_or(i64::MAX),
            learned: Learned::default(),
            rate: 0.0,
            rate_at: 0,
            backlogged_since: None,
            answered_at: None,
        }
    }

    /// A model that has waiting jobs and no entry any more.
    fn unknown(name: &str) -> Self {
        let text = format!("`{name}` is not in models.yaml any more: add it back and restart, or cancel its jobs");
        let name: Arc<str> = Arc::from(name);
        Self {
            queue: Queue::new(name.clone()),
            name,
            trouble: Some(Trouble { reason: StateReason::ModelBlocked, error: None, text, until: None }),
            slots: Slots { limit: 1, max_batch: 1 },
            startup_ms: 60_000.0,
            service_prior_ms: 3_000.0,
            idle_ttl_ms: None,
            preload: false,
            timeout_ms: i64::MAX,
            learned: Learned::default(),
            rate: 0.0,
            rate_at: 0,
            backlogged_since: None,
            answered_at: None,
        }
    }

    pub(super) fn load_ms(&self) -> f64 {
        self.learned.load_ms.unwrap_or(self.startup_ms)
    }

    pub(super) fn service_ms(&self) -> f64 {
        self.learned.service_ms.unwrap_or(self.service_prior_ms)
    }

    pub(super) fn each_ms(&self) -> f64 {
        let share = f64::from(self.slots.limit.clamp(1, 8));
        self.learned.each_ms.unwrap_or(self.service_ms() / share)
    }

    fn stop_ms(&self) -> f64 {
        self.learned.stop_ms.unwrap_or(1_000.0)
    }

    fn count_arrival(&mut self, now: Millis) {
        let decay = (-((now - self.rate_at).max(0) as f64) / RATE_TAU_MS).exp();
        self.rate = self.rate * decay + 1.0 / RATE_TAU_MS;
        self.rate_at = now;
    }

    pub(super) fn view(&self) -> ModelView {
        let (pending_interactive, pending_batch) = self.queue.pending();
        ModelView {
            name: self.name.to_string(),
            pending_interactive,
            pending_batch,
            running: self.queue.running().len(),
            oldest_interactive: self.queue.oldest(Class::Interactive),
            oldest_batch: self.queue.oldest(Class::Batch),
            first_deadline: self.queue.first_deadline(),
            left_at: self.learned.left_at,
            load_ms: self.load_ms(),
            stop_ms: self.stop_ms(),
            service_ms: self.service_ms(),
            each_ms: self.each_ms(),
            rate: self.rate,
            trouble: self.trouble.as_ref().map(|t| t.text.clone()),
            trouble_until: self.trouble.as_ref().and_then(|t| t.until),
            preload: self.preload,
            idle_ttl_ms: self.idle_ttl_ms,
        }
    }
}

/// Who holds the device.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Device {
    Empty,
    Loading { model: usize, since: Millis },
    Serving { model: usize, since: Millis, place: Place, idle_since: Option<Millis>, suspect: bool },
    Draining { model: usize, to: Option<usize> },
    Stopping { model: usize, to: Option<usize> },
}

impl Device {
    pub(super) fn model(&self) -> Option<usize> {
        match self {
            Self::Empty => None,
            Self::Loading { model, .. }
            | Self::Serving { model, .. }
            | Self::Draining { model, .. }
            | Self::Stopping { model, .. } => Some(*model),
        }
    }
}

/// All of it.
#[derive(Debug)]
pub struct State {
    knobs: Knobs,
    pub(super) models: Vec<Model>,
    index: HashMap<String, usize>,
    pub(super) device: Device,
    by_tenant: HashMap<Arc<str>, usize>,
    last_loaded: Option<usize>,
    last_arrival: Option<usize>,
    pub(super) swaps: u64,
    pub(super) swaps_in_arrival_order: u64,
    pub(super) decision: Option<Decision>,
    pub(super) history: VecDeque<Decision>,
    next_load: i64,
    stopping: bool,
    wake_at: Option<Millis>,
    /// When the last plan wants to be made anew.
    plan_at: Option<Millis>,
    planned_at: Millis,
    /// Something happened that may change the plan.
    plan_now: bool,
    /// More of what was there has arrived: the next plan has time.
    plan_soon: bool,
    /// The second half of a swap that has been announced: its load is no decision of its own.
    swapping_to: Option<usize>,
}

impl State {
    /// Nothing loaded, nothing waiting. `epoch`: number of this run of the server, so that its loads are no other's.
    pub fn new(specs: &[ModelSpec], knobs: Knobs, learned: &BTreeMap<String, Learned>, epoch: i64) -> Self {
        let mut models: Vec<Model> = specs.iter().map(Model::of).collect();
        for model in &mut models {
            if let Some(known) = learned.get(&*model.name) {
                model.learned = known.clone();
            }
        }
        let index = models.iter().enumerate().map(|(i, m)| (m.name.to_string(), i)).collect();
        Self {
            knobs,
            models,
            index,
            device: Device::Empty,
            by_tenant: HashMap::new(),
            last_loaded: None,
            last_arrival: None,
            swaps: 0,
            swaps_in_arrival_order: 0,
            decision: None,
            history: VecDeque::new(),
            next_load: epoch << LOAD_BITS,
            stopping: false,
            wake_at: None,
            plan_at: None,
            planned_at: 0,
            plan_now: true,
            plan_soon: false,
            swapping_to: None,
        }
    }

    /// When a place in the full queue should be free, in seconds from 1 to 60: one job of the model that holds the device.
    pub fn room_in_s(&self) -> u64 {
        let holder = self.device.model().map_or(60_000.0, |index| self.models[index].each_ms());
        u64::try_from(round(holder / 1e3)).unwrap_or(60).clamp(1, 60)
    }

    /// When [`State::step`] should be called again if no event comes before.
    pub fn wake_at(&self) -> Option<Millis> {
        self.wake_at
    }

    /// Whether no job is on the worker or on its way there.
    pub fn is_quiet(&self) -> bool {
        self.models.iter().all(|m| m.queue.running().is_empty())
    }

    /// All waiting jobs.
    pub fn queued(&self) -> usize {
        self.models.iter().map(|model| model.queue.len()).sum()
    }

    pub(super) fn index_of(&self, model: &str) -> Option<usize> {
        self.index.get(model).copied()
    }

    /// Whether new jobs may come in; `sync` callers are told at once when their model does not load.
    pub fn admit(&self, tenant: &str, more: usize) -> Result<(), admission::Full> {
        let of_tenant = self.by_tenant.get(tenant).copied().unwrap_or(0);
        admission::admit(self.queued(), of_tenant, more, &self.knobs)
    }

    /// What a sync caller of this model must be told now instead of waiting.
    pub fn refusal(&self, model: &str) -> Option<&JobError> {
        let model = self.index_of(model)?;
        self.models[model].trouble.as_ref().and_then(|t| t.error.as_ref())
    }

    /// Counts a submission, in order of arrival.
    pub fn count_arrival(&mut self, model: &str, now: Millis) {
        let Some(index) = self.index_of(model) else {
            return;
        };
        if self.last_arrival.is_some_and(|last| last != index) {
            self.swaps_in_arrival_order += 1;
        }
        self.last_arrival = Some(index);
        self.models[index].count_arrival(now);
    }

    /// The fast path: if the job's model serves with a free slot and nobody waits, the slot is the job's, and its worker's
    /// address is returned. Give it back by [`Event::Ended`].
    pub fn reserve(&mut self, job: &QueuedJob, now: Millis) -> Option<Place> {
        let Device::Serving { model: index, place, suspect: false, .. } = &self.device else {
            return None;
        };
        let model = &mut self.models[*index];
        let same = model.name == job.model && !self.stopping && job.not_before.is_none();
        if !same || !model.queue.has_free_slot(model.slots, job.priority) {
            return None;
        }
        model.queue.start(job.clone(), false, now);
        Some(place.clone())
    }

    /// Takes in an event. Call [`State::step`] after one or more of them.
    pub fn on_event(&mut self, event: Event, now: Millis) -> Vec<Effect> {
        self.plan_now |= !matches!(event, Event::Queued(_));
        match event {
            Event::Queued(jobs) => {
                jobs.iter().for_each(|job| self.enqueue(job, now));
                Vec::new()
            }
            Event::Claimed { model, lost } => {
                for number in lost {
                    self.end_running(&model, number);
                }
                Vec::new()
            }
            Event::Silent { model, since } => self.on_silent(&model, since, now),
            Event::Ended { model, number, answered, suspect, back } => {
                self.on_ended(&model, number, answered, suspect, back, now)
            }
            Event::Gone { model, priority, number } => {
                if let Some(index) = self.index_of(&model)
                    && let Some(job) = self.models[index].queue.remove(priority, number)
                {
                    self.forget_tenant(&job.tenant);
                }
                Vec::new()
            }
            Event::Report { model, report } => match self.index_of(&model) {
                Some(index) => self.on_report(index, report, now),
                None => Vec::new(),
            },
            Event::Stop => {
                self.stopping = true;
                Vec::new()
            }
        }
    }

    /// Takes in one waiting job.
    pub fn enqueue(&mut self, job: &QueuedJob, now: Millis) {
        let index = self.index_of(&job.model).unwrap_or_else(|| {
            self.models.push(Model::unknown(&job.model));
            self.index.insert(job.model.to_string(), self.models.len() - 1);
            self.models.len() - 1
        });
        *self.by_tenant.entry(job.tenant.clone()).or_default() += 1;
        let model = &mut self.models[index];
        let is_more = model.queue.has(Class::of(job.priority)) && job.limit().is_none() && job.crash.is_none();
        self.plan_soon = true;
        self.plan_now |= !is_more;
        model.queue.push(job, now);
        model.backlogged_since.get_or_insert(now);
    }

    fn forget_tenant(&mut self, tenant: &Arc<str>) {
        if let Some(count) = self.by_tenant.get_mut(tenant) {
            *count -= 1;
            if *count == 0 {
                self.by_tenant.remove(tenant);
            }
        }
    }

    fn end_running(&mut self, model: &str, number: i64) {
        if let Some(index) = self.index_of(model) {
            self.models[index].queue.end(number);
        }
    }

    /// Restarts a worker that let an attempt run into the model's own time limit without progress, and has answered nobody
    /// since the attempt began. A limit that the client set shorter proves nothing.
    fn on_silent(&mut self, model: &str, since: Millis, now: Millis) -> Vec<Effect> {
        let mut effects = Vec::new();
        if let Some(index) = self.index_of(model)
            && matches!(self.device, Device::Serving { model, .. } if model == index)
            && now - since >= self.models[index].timeout_ms
            && self.models[index].answered_at.is_none_or(|at| at < since)
        {
            self.leave(model, None, &mut effects);
        }
        effects
    }

    fn on_ended(
        &mut self,
        model: &str,
        number: i64,
        answered: bool,
        suspect: bool,
        back: Option<Back>,
        now: Millis,
    ) -> Vec<Effect> {
        let Some(index) = self.index_of(model) else {
            return Vec::new();
        };
        let model = &mut self.models[index];
        let Some(running) = model.queue.end(number) else {
            return Vec::new();
        };
        if answered {
            model.answered_at = Some(now);
            let service = (now - running.claimed_at) as f64;
            blend(&mut model.learned.service_ms, service, SERVICE_WEIGHT);
            // Device time per completion is only seen while jobs wait: otherwise the pauses are the callers'.
            if let Some(since) = model.backlogged_since {
                blend(&mut model.learned.each_ms, (now - since) as f64, SERVICE_WEIGHT);
            }
        }
        model.backlogged_since = (model.queue.len() > 0).then_some(now);
        if let Some(Back { not_before, crash }) = back {
            self.enqueue(&QueuedJob { was_started: true, not_before, crash, ..running.job }, now);
        }
        match &mut self.device {
            Device::Serving { model, suspect: s, .. } if *model == index && suspect => {
                // Once: a worker that dies takes up to `limit` jobs along, and each of them says so.
                if std::mem::replace(s, true) { Vec::new() } else { vec![self.order(index, Order::Suspect)] }
            }
            _ => Vec::new(),
        }
    }

    fn on_report(&mut self, index: usize, report: Report, now: Millis) -> Vec<Effect> {
        match report {
            Report::Loading { .. } => Vec::new(),
            Report::Ready { base_url, load_ms } => self.on_ready(index, base_url, load_ms, now),
            Report::Stopped { stop_ms } => {
                // The answer to a stop that crossed with a death says nothing about a load that was ordered since.
                if !matches!(self.device, Device::Stopping { model, .. } if model == index) {
                    return Vec::new();
                }
                blend(&mut self.models[index].learned.stop_ms, stop_ms as f64, LOAD_WEIGHT);
                self.on_left(index, now)
            }
            Report::Died { .. } => self.on_left(index, now),
            Report::LoadFailed { error, retry_at, quarantined } => {
                self.on_load_failed(index, error, retry_at, quarantined)
            }
            Report::NoGpu => {
                self.models[index].trouble = Some(Trouble {
                    reason: StateReason::NoGpu,
                    error: None,
                    text: "needs a GPU and this box sees none; its jobs wait until one is there".to_owned(),
                    until: None,
                });
                self.free_device_of(index);
                Vec::new()
            }
            Report::Available => {
                self.models[index].trouble = None;
                Vec::new()
            }
        }
    }

    fn on_ready(&mut self, index: usize, base_url: String, load_ms: i64, now: Millis) -> Vec<Effect> {
        match &mut self.device {
            Device::Serving { model, suspect, place, .. } if *model == index => {
                // The answer to `Order::Suspect`: it is alive.
                *suspect = false;
                place.base_url = base_url;
                return Vec::new();
            }
            // The same, after it was told to leave: its running jobs may still finish.
            Device::Draining { model, .. } | Device::Stopping { model, .. } if *model == index => return Vec::new(),
            Device::Loading { model, .. } if *model == index => {}
            // Ready after we changed our mind: it must not stay beside another.
            _ => return vec![self.order(index, Order::Stop)],
        }
        let place = Place { base_url, load: self.next_load, max_batch: self.models[index].slots.max_batch };
        self.next_load += 1;
        self.device = Device::Serving { model: index, since: now, place, idle_since: None, suspect: false };
        if self.last_loaded.is_some_and(|last| last != index) {
            self.swaps += 1;
        }
        self.last_loaded = Some(index);
        for model in &mut self.models {
            model.preload = false;
        }
        let model = &mut self.models[index];
        model.trouble = None;
        model.backlogged_since = (model.queue.len() > 0).then_some(now);
        blend(&mut model.learned.load_ms, load_ms as f64, LOAD_WEIGHT);
        let numbers = model.queue.heads(TOLD_MAX);
        let mut effects = vec![self.learn(index)];
        if !numbers.is_empty() {
            effects.push(Effect::AddLoadTime { numbers, load_ms });
        }
        effects
    }

    fn on_left(&mut self, index: usize, now: Millis) -> Vec<Effect> {
        self.models[index].learned.left_at = Some(now);
        if let Device::Stopping { model, to } = self.device
            && model == index
        {
            self.swapping_to = to;
        }
        self.free_device_of(index);
        vec![self.learn(index)]
    }

    fn on_load_failed(&mut self, index: usize, error: JobError, retry_at: Millis, quarantined: bool) -> Vec<Effect> {
        let word = if quarantined { "quarantined after repeated failed loads" } else { "its last load failed" };
        let text = format!("{word}: {}", first_line(&error.message));
        let model = &mut self.models[index];
        model.preload = false;
        let trouble =
            Trouble { reason: StateReason::ModelBlocked, error: Some(error.clone()), text, until: Some(retry_at) };
        model.trouble = Some(trouble);
        let callers = model.queue.take_sync();
        callers.iter().for_each(|job| self.forget_tenant(&job.tenant));
        let numbers: Vec<i64> = callers.into_iter().map(|job| job.number).collect();
        self.free_device_of(index);
        if numbers.is_empty() { Vec::new() } else { vec![Effect::EndQueued { numbers, error, overdue: false }] }
    }

    fn free_device_of(&mut self, index: usize) {
        if self.device.model() == Some(index) {
            self.device = Device::Empty;
        }
    }

    /// Does what follows from all events so far: ends overdue jobs, fills free slots, plans.
    pub fn step(&mut self, now: Millis) -> Vec<Effect> {
        let mut effects = self.end_overdue(now);
        self.plan_now |= !effects.is_empty();
        for model in &mut self.models {
            self.plan_now |= model.queue.wake(now);
        }
        self.admit_jobs(now, &mut effects);
        self.note_idle(now);
        self.finish_draining(&mut effects);
        let planned = if self.stopping { None } else { self.plan_in_time(now, &mut effects) };
        let own = self.models.iter().filter_map(|m| m.queue.next_wake()).min();
        self.wake_at = [planned, own].into_iter().flatten().min();
        effects
    }

    fn end_overdue(&mut self, now: Millis) -> Vec<Effect> {
        let overdue: Vec<QueuedJob> = self.models.iter_mut().flat_map(|m| m.queue.take_overdue(now)).collect();
        overdue.iter().for_each(|job| self.forget_tenant(&job.tenant));
        let (started, never): (Vec<_>, Vec<_>) = overdue.into_iter().partition(|job| job.was_started);
        let never_text = "not started before its deadline; submit it again with a later one or a higher priority";
        let started_text = "not finished before its deadline; submit it again with a later one";
        [(never, ErrorCode::QueueDeadlineExceeded, never_text), (started, ErrorCode::DeadlineExceeded, started_text)]
            .into_iter()
            .filter(|(jobs, ..)| !jobs.is_empty())
            .map(|(jobs, code, text)| Effect::EndQueued {
                numbers: jobs.into_iter().map(|job| job.number).collect(),
                error: JobError::new(code, text, true),
                overdue: true,
            })
            .collect()
    }

    fn admit_jobs(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        let Device::Serving { model: index, place, suspect: false, .. } = &self.device else {
            return;
        };
        if self.stopping {
            return;
        }
        let (index, place) = (*index, place.clone());
        let model = &mut self.models[index];
        let service_ms = model.service_ms();
        let runs = model.queue.admit(model.slots, service_ms, now);
        for run in runs {
            run.jobs.iter().for_each(|job| self.forget_tenant(&job.tenant));
            effects.push(Effect::Claim { model: self.models[index].name.clone(), place: place.clone(), run });
        }
    }

    fn note_idle(&mut self, now: Millis) {
        if let Device::Serving { model, idle_since, .. } = &mut self.device {
            let queue = &self.models[*model].queue;
            let busy = !queue.running().is_empty() || queue.pending() != (0, 0);
            *idle_since = if busy { None } else { Some(idle_since.unwrap_or(now)) };
        }
    }

    fn finish_draining(&mut self, effects: &mut Vec<Effect>) {
        if let Device::Draining { model, to, .. } = self.device
            && self.models[model].queue.running().is_empty()
        {
            self.device = Device::Stopping { model, to };
            effects.push(self.order(model, Order::Stop));
        }
    }

    /// Plans at once when something happened, and a little later when only more of the same arrived: under load most
    /// arrivals change nothing but numbers. Returns when to come again.
    fn plan_in_time(&mut self, now: Millis, effects: &mut Vec<Effect>) -> Option<Millis> {
        let soon = self.plan_soon.then_some(self.planned_at + PLAN_EVERY_MS);
        let due = [self.plan_at, soon].into_iter().flatten().min();
        if !self.plan_now && due.is_none_or(|at| now < at) {
            return due;
        }
        (self.plan_now, self.plan_soon, self.planned_at) = (false, false, now);
        self.plan_at = self.plan(now, effects);
        self.plan_at
    }

    fn plan(&mut self, now: Millis, effects: &mut Vec<Effect>) -> Option<Millis> {
        let Plan { action, decision, wake_at } = plan::plan(&self.view(), &self.knobs, now);
        let second_half = match (&action, self.swapping_to.take()) {
            (Action::Load(name), Some(to)) => self.index_of(name) == Some(to),
            _ => false,
        };
        match action {
            Action::Stay => {}
            Action::Load(name) => self.load(&name, now, effects),
            Action::Swap { from, to } => {
                let to = self.index_of(&to);
                self.leave(&from, to, effects);
            }
            Action::Unload(name) => self.leave(&name, None, effects),
        }
        let is_change = decision.action == "load" || decision.action == "swap" || decision.action == "unload";
        if is_change && !second_half {
            self.history.push_front(decision.clone());
            self.history.truncate(HISTORY_MAX);
            effects.push(Effect::Announce(decision.clone()));
        }
        self.decision = Some(decision);
        wake_at
    }

    fn view(&self) -> View {
        let name = |index: usize| self.models[index].name.to_string();
        let device = match &self.device {
            Device::Empty => DeviceView::Empty,
            Device::Loading { model, .. } => DeviceView::Loading { model: name(*model) },
            Device::Serving { model, since, idle_since, .. } => {
                DeviceView::Serving { model: name(*model), since: *since, idle_since: *idle_since }
            }
            Device::Draining { model, to, .. } | Device::Stopping { model, to } => {
                DeviceView::Leaving { model: name(*model), to: to.map(name) }
            }
        };
        View { device, models: self.models.iter().map(Model::view).collect() }
    }

    fn load(&mut self, name: &str, now: Millis, effects: &mut Vec<Effect>) {
        let Some(index) = self.index_of(name) else {
            return;
        };
        self.device = Device::Loading { model: index, since: now };
        let model = &self.models[index];
        let numbers = model.queue.heads(TOLD_MAX);
        if !numbers.is_empty() {
            effects.push(Effect::TellLoading { numbers, model: name.to_owned(), eta: now + round(model.load_ms()) });
        }
        effects.push(self.order(index, Order::Load));
    }

    fn leave(&mut self, name: &str, to: Option<usize>, effects: &mut Vec<Effect>) {
        let Some(index) = self.index_of(name) else {
            return;
        };
        if let Device::Serving { .. } = &self.device {
            self.device = Device::Draining { model: index, to };
            self.finish_draining(effects);
        }
    }

    fn order(&self, index: usize, order: Order) -> Effect {
        Effect::Order { model: self.models[index].name.to_string(), order }
    }

    fn learn(&self, index: usize) -> Effect {
        let model = &self.models[index];
        Effect::Learn { model: model.name.to_string(), learned: model.learned.clone() }
    }

    /// When a model's turn must come; `None` without waiting jobs.
    pub(super) fn due(&self, index: usize) -> Option<Millis> {
        self.models[index].view().due(&self.knobs)
    }

    /// Where a waiting job stands: (jobs the plan starts first, jobs of its own model before it, swaps before its start,
    /// expected start, if its model can be loaded). `None`: not waiting, or too far back to count.
    pub fn standing(
        &self,
        model: &str,
        priority: u8,
        number: i64,
        now: Millis,
    ) -> Option<(usize, usize, usize, Option<Millis>)> {
        let index = self.index_of(model)?;
        let rank = self.models[index].queue.rank(priority, number, RANK_MAX)?;
        let own = rank as f64 * self.models[index].each_ms();
        if matches!(self.device, Device::Serving { model, .. } if model == index) {
            return Some((rank, rank, 0, Some(now + round(own))));
        }
        let due = |m: &Model| m.view().due(&self.knobs).unwrap_or(i64::MAX);
        let mine = (due(&self.models[index]), index);
        let holder = self.device.model();
        let mut ahead: Vec<(i64, usize)> = (0..self.models.len())
            .filter(|i| *i != index && self.models[*i].trouble.is_none() && self.models[*i].queue.len() > 0)
            .map(|i| (if Some(i) == holder { i64::MIN } else { due(&self.models[i]) }, i))
            .filter(|other| *other < mine)
            .collect();
        ahead.sort_unstable();
        let loading_mine = matches!(self.device, Device::Loading { model, .. } if model == index);
        let before: usize = ahead.iter().map(|(_, i)| self.models[*i].queue.len()).sum();
        let wait: f64 = ahead
            .iter()
            .map(|(_, i)| {
                let m = &self.models[*i];
                m.queue.len() as f64 * m.each_ms() + if Some(*i) == holder { 0.0 } else { m.load_ms() }
            })
            .sum();
        let swaps = ahead.iter().filter(|(_, i)| Some(*i) != holder).count() + usize::from(!loading_mine);
        let start = now + round(wait + self.models[index].load_ms() + own);
        // Of a model that cannot be loaded nobody knows.
        let start = self.models[index].trouble.is_none().then_some(start);
        Some((before + rank, rank, swaps, start))
    }
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

fn blend(known: &mut Option<f64>, sample: f64, weight: f64) {
    *known = Some(known.map_or(sample, |old| old + weight * (sample - old)));
}

#[expect(clippy::cast_possible_truncation, reason = "durations are far below 2^53 ms")]
fn round(ms: f64) -> i64 {
    ms.round() as i64
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "sim_tests.rs"]
mod sim;
