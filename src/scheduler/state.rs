//! The scheduler as a pure state machine: events in, effects out, `now` as an argument. It owns one truth: which workers
//! hold which devices, and which jobs wait for and run on them. Everything else (processes, rows) belongs to others, who
//! tell it by events and are asked by effects.
//!
//! This file takes events in and steps; `turns` carries out plans and moves workers; `devices` is about GPUs that come and go;
//! `weights` is about models whose weights have to be fetched first; `host` says whose host memory is whose,
//! `residue` whose parked process is in the way on a device;
//! `standing` says where a job stands, `eta` when it should start; `hints` what no policy can mend; `controls` does what an
//! operator says, `edits` what an edited models.yaml does; `answers` takes in the ends of attempts; `accounts` counts where
//! the time goes; `model` and `inventory` are what it keeps of models and workers.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use crate::domain::worker::{FetchReport, HostCopy, PhaseTime, Report};
use crate::domain::{Class, Control, Controls, ErrorCode, GpuSet, JobError, Millis, ModelSpec, StateReason};
use crate::policy::batching::{Batching, Change};
use crate::policy::learn::{LOAD_WEIGHT, blend};
use crate::policy::order::Served;
use crate::policy::plan::{Decision, Reservation};
use crate::policy::{Knobs, admission};
pub use crate::scheduler::inventory::Inventory;
use crate::scheduler::inventory::{Phase, Worker, round};
use crate::scheduler::journal::{DecisionFilter, DecisionPage, Journal};
use crate::scheduler::ledger::{ArrivalOrder, Ledger};
use crate::scheduler::model::{Model, Source, Trouble};
use crate::scheduler::queue::{Run, Running, To};
use crate::store::{Learned, QueuedJob};
use crate::worker::supervisor::Order;

#[path = "accounts.rs"]
mod accounts;
#[path = "answers.rs"]
mod answers;
#[path = "controls.rs"]
mod controls;
#[path = "devices.rs"]
mod devices;
#[path = "edits.rs"]
mod edits;
#[path = "eta.rs"]
mod eta;
#[path = "hints.rs"]
mod hints;
#[path = "host.rs"]
mod host;
#[path = "residue.rs"]
mod residue;
#[path = "standing.rs"]
mod standing;
#[path = "turns.rs"]
mod turns;
#[path = "weights.rs"]
mod weights;
pub(super) use answers::Storing;
pub use edits::{Edit, edits};
pub use eta::Expected;
pub(super) use standing::Holding;
pub(super) use turns::TOLD_MAX;
pub(super) use weights::Lack;

/// How long a plan stands while only more of the same arrives.
const PLAN_EVERY_MS: i64 = 5;
/// Bits that count the loads of one run of the server.
const LOAD_BITS: u32 = 24;
/// What tenants were served is kept at least this often while it changes.
const KEEP_SERVED_EVERY_MS: i64 = 10_000;

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
    /// A worker has answered a job whole and is done with it: its slot is free. The answer is on its way to the store.
    Answered {
        /// Entry name.
        model: Arc<str>,
        /// Its number; it is under way until `Ended`.
        number: i64,
    },
    /// The end of an attempt is committed; its slot is free, if it was not already.
    Ended {
        /// Entry name.
        model: Arc<str>,
        /// The job.
        number: i64,
        /// It was answered: its time counts as a sample. Stands for `Answered` as well, if nobody has told that.
        answered: bool,
        /// Its worker could not be reached or broke the connection.
        suspect: bool,
        /// The job waits again; committed.
        back: Option<Back>,
    },
    /// A job failed on a worker that was woken and has answered nobody since, and is about to go back uncharged.
    CanaryFailed {
        /// Entry name.
        model: Arc<str>,
        /// Its number; it counts as running until `Ended`.
        number: i64,
    },
    /// A running job ran out of memory; it is about to go back, or has failed.
    OutOfMemory {
        /// Entry name.
        model: Arc<str>,
        /// Its number; it counts as running until `Ended`.
        number: i64,
        /// Jobs of its run.
        jobs: u32,
    },
    /// What the shape of a running job is, in words.
    Shape {
        /// Entry name.
        model: Arc<str>,
        /// Its number.
        number: i64,
        /// See `domain::shape::words`.
        words: String,
    },
    /// An attempt ran into its time limit and showed no progress for the last half of it: its worker may hang, though its
    /// health is well.
    Silent {
        /// Entry name.
        model: Arc<str>,
        /// The job.
        number: i64,
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
        /// Which of its workers.
        replica: u32,
        /// What it says.
        report: Report,
    },
    /// The fetching task says something about a model's weights.
    Fetch {
        /// Entry name.
        model: String,
        /// What it says.
        report: Box<FetchReport>,
    },
    /// The GPUs that are there now: memory in bytes, by the driver's numbers.
    Devices(BTreeMap<u32, u64>),
    /// An operator says something.
    Control(Control),
    /// Waiting jobs with numbers below `before` are to be cancelled. Some at a time: ask again until there is no effect.
    Purge {
        /// Entry name; `None`: of all models.
        model: Option<String>,
        /// The number after the last of them.
        before: i64,
    },
    /// So many were.
    Purged {
        /// As in `Purge`.
        model: Option<String>,
        /// How many.
        removed: usize,
    },
    /// Entries of models.yaml were edited.
    Edited(Vec<Edit>),
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
    /// Number of the worker among those of its model.
    pub replica: u32,
    /// Where the worker answers.
    pub base_url: String,
    /// Which load it is from: jobs that are lost with it died together.
    pub load: i64,
    /// Most jobs in one run of its model.
    pub max_batch: u32,
    /// The GPUs that the worker is on; `None`: on the CPU, or nobody knows.
    pub gpus: Option<GpuSet>,
    /// It was woken and has answered nobody since: a failure is not the job's.
    pub canary: bool,
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
        /// Which of its workers; they are numbered from 0.
        replica: u32,
        /// The devices it holds, or is to be loaded on.
        set: GpuSet,
        /// The order.
        order: Order,
        /// With a load: most host memory that the copy of its weights may take, in bytes; `None`: it is never parked.
        park_bytes: Option<u64>,
        /// With a load: nobody waits for it.
        at_leisure: bool,
    },
    /// Look for the weights of a model, and fetch them if they are not here.
    Fetch {
        /// Entry name.
        model: String,
    },
    /// End the attempts of running jobs whose GPU has vanished: they wait again, uncharged.
    Evict {
        /// The jobs.
        numbers: Vec<i64>,
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
    /// Cancel jobs that waited; nothing else will be done with them.
    CancelQueued(Vec<i64>),
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
    /// Keep how much tenants were served: weighted GPU ms by name.
    Served(Vec<(String, f64)>),
    /// Log a decision that was made, or a reason to wait that is a new one: all that is kept of them.
    Announce(Arc<Decision>),
}

/// All of it.
#[derive(Debug)]
pub struct State {
    knobs: Knobs,
    inventory: Inventory,
    pub(super) models: Vec<Model>,
    index: HashMap<String, usize>,
    /// In the order in which they were decided on.
    pub(super) workers: Vec<Worker>,
    reservations: Vec<Reservation>,
    served: Served,
    served_kept_at: Millis,
    served_changed: bool,
    by_tenant: HashMap<Arc<str>, usize>,
    running_of: HashMap<Arc<str>, usize>,
    /// The model last loaded on each device.
    last_on: Vec<Option<usize>>,
    arrival_order: ArrivalOrder,
    pub(super) swaps: u64,
    pub(super) swaps_in_arrival_order: u64,
    pub(super) decision: Option<Decision>,
    pub(super) history: VecDeque<Decision>,
    journal: Journal,
    controls: Controls,
    ledger: Ledger,
    eta: eta::Eta,
    turns: hints::Turns,
    overloaded: hints::Overload,
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
}

impl State {
    /// Nothing loaded, nothing waiting, on a box of which nothing is known: one model at a time. `epoch`: number of this run
    /// of the server, so that its loads are no other's.
    pub fn new(specs: &[ModelSpec], knobs: Knobs, learned: &BTreeMap<String, Learned>, epoch: i64) -> Self {
        let mut models: Vec<Model> = specs.iter().map(Model::of).collect();
        for model in &mut models {
            if let Some(known) = learned.get(&*model.name) {
                model.remember(known);
            }
        }
        let index = models.iter().enumerate().map(|(i, m)| (m.name.to_string(), i)).collect();
        let inventory = Inventory::one_device();
        Self {
            knobs,
            last_on: vec![None; inventory.devices().len()],
            inventory,
            models,
            index,
            workers: Vec::new(),
            reservations: Vec::new(),
            served: Served::default(),
            served_kept_at: 0,
            served_changed: false,
            by_tenant: HashMap::new(),
            running_of: HashMap::new(),
            arrival_order: ArrivalOrder::default(),
            swaps: 0,
            swaps_in_arrival_order: 0,
            decision: None,
            history: VecDeque::new(),
            journal: Journal::default(),
            controls: Controls::default(),
            ledger: Ledger::default(),
            eta: eta::Eta::default(),
            turns: hints::Turns::default(),
            overloaded: hints::Overload::default(),
            next_load: epoch << LOAD_BITS,
            stopping: false,
            wake_at: None,
            plan_at: None,
            planned_at: 0,
            plan_now: true,
            plan_soon: false,
        }
    }

    /// On these devices. Models that fit on none of them are never loaded, and their callers are told so.
    #[must_use]
    pub fn on(mut self, inventory: Inventory) -> Self {
        self.last_on = vec![None; inventory.devices().len()];
        self.inventory = inventory;
        self.note_all_devices();
        self
    }

    /// With what tenants were served so far, in weighted GPU ms, and their weights.
    #[must_use]
    pub fn with_tenants(mut self, served: &BTreeMap<String, f64>, weights: &BTreeMap<String, f64>) -> Self {
        let shared =
            |from: &BTreeMap<String, f64>| from.iter().map(|(name, n)| (Arc::from(name.as_str()), *n)).collect();
        self.served = Served::new(shared(served), shared(weights));
        self
    }

    /// When a place in the full queue should be free, in seconds from 1 to 60: one job of a model that holds a device.
    pub fn room_in_s(&self) -> u64 {
        let each = |worker: &Worker| self.models[worker.model].each_ms();
        let soonest = self.workers.iter().filter(|w| w.is_on_device()).map(each).min_by(f64::total_cmp);
        u64::try_from(round(soonest.unwrap_or(60_000.0) / 1e3)).unwrap_or(60).clamp(1, 60)
    }

    /// When [`State::step`] should be called again if no event comes before.
    pub fn wake_at(&self) -> Option<Millis> {
        self.wake_at
    }

    /// Whether no job is on a worker, on its way there, or on its way from there to the store.
    pub fn is_quiet(&self) -> bool {
        self.models.iter().all(|m| m.under_way() == 0)
    }

    /// All waiting jobs.
    pub fn queued(&self) -> usize {
        self.models.iter().map(|model| model.queue.len()).sum()
    }

    pub(super) fn index_of(&self, model: &str) -> Option<usize> {
        self.index.get(model).copied()
    }

    /// The latest decisions and changed reasons to wait, newest first, at most 10 000.
    pub fn decisions(&self) -> impl Iterator<Item = &Decision> {
        self.journal.latest().map(|(_, decision)| &**decision)
    }

    /// A part of them.
    pub fn decision_page(&self, filter: &DecisionFilter) -> DecisionPage {
        self.journal.page(filter)
    }

    /// Whether new jobs may come in; `sync` callers are told at once when their model does not load.
    pub fn admit(&self, tenant: &str, more: usize) -> Result<(), admission::Full> {
        let of_tenant = self.by_tenant.get(tenant).copied().unwrap_or(0);
        admission::admit(self.queued(), of_tenant, more, &self.knobs)
    }

    /// What a sync caller of this model must be told now instead of waiting.
    pub fn refusal(&self, model: &str) -> Option<&JobError> {
        let model = self.index_of(model)?;
        self.models[model].blocked().and_then(|trouble| trouble.error.as_ref())
    }

    /// Counts a submission, in order of arrival.
    pub fn count_arrival(&mut self, model: &str, now: Millis) {
        let Some(index) = self.index_of(model) else {
            return;
        };
        if self.swaps_in_order(index) {
            self.swaps_in_arrival_order += 1;
            self.ledger.count_swap_in_order(index);
        }
        self.models[index].count_arrival(now);
    }

    /// The fast path: if the job's model serves with a free slot and nobody waits, the slot is the job's, and its worker's
    /// address is returned. Give it back by [`Event::Ended`].
    pub fn reserve(&mut self, job: &QueuedJob, now: Millis) -> Option<Place> {
        let index = self.index_of(&job.model)?;
        if self.stopping || self.models[index].held.paused || job.not_before.is_some() {
            return None;
        }
        let model = &self.models[index];
        let free = |worker: &&Worker| {
            worker.model == index
                && matches!(worker.phase, Phase::Serving { suspect: false, .. })
                && !model.storing.is_full(worker.replica, model.slots)
                && model.queue.has_free_slot(model.slots, job.priority, worker.replica)
        };
        let worker = self.workers.iter().filter(free).min_by_key(|worker| model.queue.running_on(worker.replica))?;
        let Phase::Serving { place, .. } = &worker.phase else { return None };
        let place = place.clone();
        self.account(now);
        self.lift(&job.tenant);
        let to = self.to(index, place.replica);
        self.count_running(&job.tenant);
        let model = &mut self.models[index];
        model.queue.reserve(job.clone(), to, &mut self.served, now);
        model.begin(&Run { jobs: vec![job.clone()], alone: false }, &place, now);
        Some(place)
    }

    /// A worker as its model's queue needs it.
    fn to(&self, index: usize, worker: u32) -> To {
        let model = &self.models[index];
        To { worker, slots: model.slots, service_ms: model.service_ms(), charge_ms: model.charge_ms() }
    }

    /// Takes in an event. Call [`State::step`] after one or more of them.
    pub fn on_event(&mut self, event: Event, now: Millis) -> Vec<Effect> {
        self.account(now);
        self.plan_now |= match &event {
            // An answer changes the plan when it is given, not when it is stored.
            Event::Queued(_) | Event::Ended { answered: true, .. } => false,
            Event::Fetch { report, .. } => !matches!(**report, FetchReport::Progress(_)),
            _ => true,
        };
        match event {
            Event::Queued(jobs) => {
                for job in &jobs {
                    self.lift(&job.tenant);
                    self.enqueue(job, now);
                }
                Vec::new()
            }
            Event::Claimed { model, lost } => {
                for number in lost {
                    self.end_running(&model, number, now);
                }
                Vec::new()
            }
            Event::Silent { model, number, since } => self.on_silent(&model, number, since, now),
            Event::CanaryFailed { model, number } => self.on_canary_failed(&model, number, now),
            Event::OutOfMemory { model, number, jobs } => {
                self.on_shape(&model, number, now, |batching, key| batching.out_of_memory(key, jobs))
            }
            Event::Shape { model, number, words } => self.on_shape(&model, number, now, |batching, key| {
                batching.name(key, words);
                None
            }),
            Event::Answered { model, number } => self.on_answered(&model, number, now),
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
            Event::Report { model, replica, report } => match self.index_of(&model) {
                Some(index) => self.on_report(index, replica, report, now),
                None => Vec::new(),
            },
            Event::Fetch { model, report } => self.on_fetch(&model, *report),
            Event::Devices(there) => self.on_devices(&there),
            Event::Control(control) => self.on_control(&control, now),
            Event::Purge { model, before } => self.on_purge(model.as_deref(), before),
            Event::Purged { model, removed } => self.on_purged(model.as_deref(), removed, now),
            Event::Edited(edits) => self.on_edits(&edits, now),
            Event::Stop => {
                self.stopping = true;
                Vec::new()
            }
        }
    }

    /// Takes in one waiting job, as a start does.
    pub fn enqueue(&mut self, job: &QueuedJob, now: Millis) {
        let index = self.index_of(&job.model).unwrap_or_else(|| self.add_model(&job.model));
        *self.by_tenant.entry(job.tenant.clone()).or_default() += 1;
        let model = &mut self.models[index];
        let is_more = model.queue.has(Class::of(job.priority)) && job.limit().is_none() && job.crash.is_none();
        self.plan_soon = true;
        self.plan_now |= !is_more;
        model.queue.push(job, now);
        model.count_waiting(now);
    }

    /// One of which nothing but its name is known; its place.
    fn add_model(&mut self, name: &str) -> usize {
        let mut model = Model::unknown(name);
        model.held = self.controls.of(name);
        self.models.push(model);
        let index = self.models.len() - 1;
        self.index.insert(name.to_owned(), index);
        self.note_heir(index);
        index
    }

    /// A tenant that had nothing to do comes back.
    fn lift(&mut self, tenant: &Arc<str>) {
        if !self.by_tenant.contains_key(tenant) && !self.running_of.contains_key(tenant) {
            self.served.lift(tenant, self.by_tenant.keys().chain(self.running_of.keys()));
        }
    }

    fn forget_tenant(&mut self, tenant: &Arc<str>) {
        uncount(&mut self.by_tenant, tenant);
    }

    fn count_running(&mut self, tenant: &Arc<str>) {
        *self.running_of.entry(tenant.clone()).or_default() += 1;
        self.served_changed = true;
    }

    fn end_running(&mut self, model: &str, number: i64, now: Millis) -> Option<Running> {
        let index = self.index_of(model)?;
        let model = &mut self.models[index];
        let running = model.queue.end(number, model.weight(), &mut self.served, now)?;
        uncount(&mut self.running_of, &running.job.tenant);
        Some(running)
    }

    /// Restarts a worker that let an attempt run into the model's own time limit without progress, and has answered nobody
    /// since the attempt began. A limit that the client set shorter proves nothing.
    fn on_silent(&mut self, model: &str, number: i64, since: Millis, now: Millis) -> Vec<Effect> {
        let mut effects = Vec::new();
        let Some(index) = self.index_of(model) else { return effects };
        let model = &self.models[index];
        let Some(replica) = model.queue.running().get(&number).map(|running| running.worker) else { return effects };
        if now - since >= model.timeout_ms
            && model.queue.answered_at(replica).is_none_or(|at| at < since)
            && let Some(worker) = self.find(index, replica)
        {
            self.leave(worker, true, now, &mut effects);
        }
        effects
    }

    /// A worker has not served the first job since it was woken: it is stopped, so that it comes back by a cold load.
    fn on_canary_failed(&mut self, model: &str, number: i64, now: Millis) -> Vec<Effect> {
        let mut effects = Vec::new();
        let Some(index) = self.index_of(model) else { return effects };
        let running = self.models[index].queue.running().get(&number);
        let worker = running.map(|running| running.worker).and_then(|replica| self.find(index, replica));
        if let Some(worker) = worker
            && matches!(&self.workers[worker].phase, Phase::Serving { place, .. } if place.canary)
        {
            self.leave(worker, true, now, &mut effects);
        }
        effects
    }

    /// Something is learned about the shape of a running job.
    fn on_shape(
        &mut self,
        model: &str,
        number: i64,
        now: Millis,
        learn: impl FnOnce(&mut Batching, i64) -> Option<Change>,
    ) -> Vec<Effect> {
        let Some(index) = self.index_of(model) else { return Vec::new() };
        let model = &mut self.models[index];
        let Some(key) = model.queue.running().get(&number).map(|running| running.job.batch_key) else {
            return Vec::new();
        };
        let change = learn(&mut model.batching, key);
        self.tell_change(index, change, now)
    }

    fn tell_change(&mut self, index: usize, change: Option<Change>, now: Millis) -> Vec<Effect> {
        let decision = change.map(|change| change.decision(&self.models[index].name, now));
        let told = decision.and_then(|decision| self.journal.keep(decision)).map(Effect::Announce);
        let kept = self.models[index].batching.take_news().then(|| self.learn(index));
        told.into_iter().chain(kept).collect()
    }

    /// The place of a worker.
    fn find(&self, model: usize, replica: u32) -> Option<usize> {
        self.workers.iter().position(|worker| worker.model == model && worker.replica == replica)
    }

    fn on_report(&mut self, index: usize, replica: u32, report: Report, now: Millis) -> Vec<Effect> {
        let worker = self.find(index, replica);
        match report {
            Report::Loading { .. } => {
                worker.into_iter().for_each(|worker| self.note_cold(worker));
                Vec::new()
            }
            Report::Takes { device_bytes } => {
                self.models[index].count_bytes(device_bytes);
                Vec::new()
            }
            Report::Host(host) => {
                self.on_host(index, worker, host);
                Vec::new()
            }
            Report::Keeps { device_bytes } => {
                self.on_keeps(index, worker, device_bytes);
                Vec::new()
            }
            Report::Loaded { phases } => {
                self.models[index].count_phases(&phases);
                if let Some(place) = worker {
                    self.workers[place].has_slept |= phases.iter().any(|phase| phase.phase == PhaseTime::REHEARSAL);
                }
                Vec::new()
            }
            Report::Ready { base_url, load_ms } => self.on_ready(index, replica, base_url, load_ms, now),
            Report::Stopped { stop_ms } => match worker.map(|worker| (worker, &self.workers[worker].phase)) {
                Some((worker, Phase::Stopping { park })) => {
                    if *park && self.workers[worker].is_bare {
                        self.models[index].count_never_bare();
                    }
                    blend(&mut self.models[index].learned.stop_ms, stop_ms as f64, LOAD_WEIGHT);
                    self.on_left(worker, now)
                }
                Some((worker, Phase::Dropping)) => {
                    self.workers.remove(worker);
                    self.note_unloaded(index);
                    Vec::new()
                }
                // The answer to a stop that crossed with a death says nothing about a load that was ordered since.
                _ => Vec::new(),
            },
            Report::Parked { park_ms } => match worker {
                Some(worker) if self.workers[worker].phase == (Phase::Stopping { park: true }) => {
                    blend(&mut self.models[index].learned.stop_ms, park_ms as f64, LOAD_WEIGHT);
                    self.on_parked(worker, now)
                }
                _ => Vec::new(),
            },
            Report::Died { .. } => worker.map_or(Vec::new(), |worker| self.on_died(worker, now)),
            Report::LoadFailed { error, retry_at, quarantined } => {
                let word = if quarantined { "quarantined after repeated failed loads" } else { "its last load failed" };
                let text = format!("{word}: {}", why(&error, &self.models[index].name));
                self.on_load_failed(index, worker, error, Some(retry_at), text)
            }
            Report::DoesNotFit { error } => {
                let line = first_line(&error.message);
                let rest = line.strip_prefix(&format!("model `{}` ", self.models[index].name));
                let text = rest.map_or_else(|| format!("blocked: {line}"), |rest| format!("it {rest}"));
                let mut effects = worker.map_or(Vec::new(), |worker| self.drop_bare_beside(worker, now));
                effects.extend(self.on_load_failed(index, worker, error, None, text));
                effects
            }
            // Its entry is gone, and that is what its jobs wait for.
            Report::Available if !self.models[index].is_listed => Vec::new(),
            Report::NoGpu => {
                self.models[index].trouble = Some(self.models[index].lacks_gpus());
                self.models[index].block_too_big();
                self.models[index].wanted_at = None;
                self.give_up(worker);
                Vec::new()
            }
            Report::Available => {
                self.models[index].forget_never_bare();
                self.models[index].trouble = None;
                self.models[index].block_too_big();
                self.note_devices(index);
                Vec::new()
            }
        }
    }

    fn on_load_failed(
        &mut self,
        index: usize,
        worker: Option<usize>,
        error: JobError,
        retry_at: Option<Millis>,
        text: String,
    ) -> Vec<Effect> {
        self.give_up(worker);
        if !self.models[index].is_listed {
            return Vec::new();
        }
        self.look_for_weights_again(index);
        let serves = self.serves(index);
        let model = &mut self.models[index];
        (model.preload, model.wanted_at) = (false, None);
        let told = (!serves).then(|| error.clone());
        model.trouble = Some(Trouble { reason: StateReason::ModelBlocked, error: told, text, until: retry_at });
        if serves {
            // Callers have another worker.
            return Vec::new();
        }
        self.end_callers(index, error)
    }

    /// Does what follows from all events so far: ends overdue jobs, fills free slots, plans.
    pub fn step(&mut self, now: Millis) -> Vec<Effect> {
        self.account(now);
        let mut effects = self.end_overdue(now);
        self.plan_now |= !effects.is_empty();
        for model in &mut self.models {
            self.plan_now |= model.queue.wake(now);
        }
        self.ask_for_weights(&mut effects);
        self.admit_jobs(now, &mut effects);
        self.note_idle(now);
        self.finish_draining(now, &mut effects);
        self.load_where_free(now, &mut effects);
        let planned = if self.stopping { None } else { self.plan_in_time(now, &mut effects) };
        self.hurry(&mut effects);
        let own = self.models.iter().filter_map(|m| m.queue.next_wake()).min();
        self.wake_at = [planned, own].into_iter().flatten().min();
        if self.served_changed && now - self.served_kept_at >= KEEP_SERVED_EVERY_MS {
            effects.push(self.keep_served(now));
        }
        effects
    }

    fn keep_served(&mut self, now: Millis) -> Effect {
        (self.served_changed, self.served_kept_at) = (false, now);
        let mut counters: Vec<(String, f64)> =
            self.served.counters().map(|(tenant, served)| (tenant.to_string(), served)).collect();
        counters.sort_by(|a, b| a.0.cmp(&b.0));
        Effect::Served(counters)
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

    /// Fills the free slots of ready workers, the least busy worker of a model first.
    fn admit_jobs(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        if self.stopping {
            return;
        }
        for index in 0..self.models.len() {
            while !self.models[index].held.paused
                && self.models[index].queue.has_ready()
                && let Some((place, run)) = self.admit_one(index, now)
            {
                for job in &run.jobs {
                    self.forget_tenant(&job.tenant);
                    self.count_running(&job.tenant);
                }
                run.jobs.iter().for_each(|job| self.eta.started(job.number, now));
                effects.push(Effect::Claim { model: self.models[index].name.clone(), place, run });
            }
        }
    }

    fn admit_one(&mut self, index: usize, now: Millis) -> Option<(Place, Run)> {
        let model = &self.models[index];
        let mut places: Vec<&Place> = self
            .workers
            .iter()
            .filter(|worker| worker.model == index)
            .filter_map(|worker| match &worker.phase {
                Phase::Serving { place, suspect: false, .. } => Some(place),
                _ => None,
            })
            .filter(|place| !model.storing.is_full(place.replica, model.slots))
            .collect();
        places.sort_by_key(|place| model.queue.running_on(place.replica));
        let places: Vec<Place> = places.into_iter().cloned().collect();
        places.into_iter().find_map(|place| {
            let to = self.to(index, place.replica);
            let model = &mut self.models[index];
            let run = model.queue.admit_one(to, &model.batching, &mut self.served, now)?;
            model.begin(&run, &place, now);
            Some((place, run))
        })
    }

    fn note_idle(&mut self, now: Millis) {
        for worker in &mut self.workers {
            let model = &self.models[worker.model];
            if let Phase::Serving { idle_since, .. } = &mut worker.phase {
                let busy = model.queue.running_on(worker.replica) > 0 || model.pending() != (0, 0);
                *idle_since = if busy { None } else { Some(idle_since.unwrap_or(now)) };
            }
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
}

fn uncount(counts: &mut HashMap<Arc<str>, usize>, tenant: &Arc<str>) {
    if let Some(count) = counts.get_mut(tenant) {
        *count -= 1;
        if *count == 0 {
            counts.remove(tenant);
        }
    }
}

/// Why a model does not load, without saying so again.
fn why<'a>(error: &'a JobError, model: &str) -> &'a str {
    let line = first_line(&error.message);
    line.strip_prefix(&format!("model `{model}` does not load: ")).unwrap_or(line)
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "answers_tests.rs"]
mod answers_tests;

#[cfg(test)]
#[path = "batching_tests.rs"]
mod batching_tests;

#[cfg(test)]
#[path = "device_tests.rs"]
mod device_tests;

#[cfg(test)]
#[path = "keeping_tests.rs"]
mod keeping_tests;

#[cfg(test)]
#[path = "weights_tests.rs"]
mod weights_tests;

#[cfg(test)]
#[path = "box_tests.rs"]
mod boxes;

#[cfg(test)]
#[path = "sim_tests.rs"]
mod sim;
