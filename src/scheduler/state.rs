//! The scheduler as a pure state machine: events in, effects out, `now` as an argument. It owns one truth: which workers
//! hold which devices, and which jobs wait for and run on them. Everything else (processes, rows) belongs to others, who
//! tell it by events and are asked by effects.
//!
//! This file takes events in and steps; `events` is what comes in and goes out; `reports` takes in what supervisors and running
//! jobs tell of workers; `slots` says who gets a free slot; `turns` carries out plans and moves workers; `devices` is about GPUs
//! that come and go; `weights` is about models whose weights have to be fetched first; `host` says whose host memory is whose,
//! `residue` whose parked process is in the way on a device; `standing` says where a job stands, `eta` when it should start;
//! `hints` what no policy can mend; `controls` does what an operator says, `edits` what an edited models.yaml does; `answers`
//! takes in the ends of attempts; `accounts` counts where the time goes; `model` and `inventory` are what it keeps of models
//! and workers.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use crate::domain::worker::{FetchReport, HostCopy, LETS_GO_MS, PhaseTime, Report};
use crate::domain::{Class, Control, Controls, ErrorCode, GpuSet, JobError, Millis, ModelSpec, StateReason};
use crate::policy::batching::{Batching, Change};
use crate::policy::learn::{LOAD_WEIGHT, blend};
use crate::policy::order::Served;
use crate::policy::plan::{Decision, Reservation};
use crate::policy::{Knobs, admission};
pub use crate::scheduler::inventory::Inventory;
use crate::scheduler::inventory::{Phase, Silence, Worker, round};
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
#[path = "events.rs"]
mod events;
#[path = "hints.rs"]
mod hints;
#[path = "host.rs"]
mod host;
#[path = "reports.rs"]
mod reports;
#[path = "residue.rs"]
mod residue;
#[path = "room.rs"]
mod room;
#[path = "slots.rs"]
mod slots;
#[path = "standing.rs"]
mod standing;
#[path = "turns.rs"]
mod turns;
#[path = "weights.rs"]
mod weights;
pub(super) use answers::Storing;
pub use edits::{Edit, edits};
pub use eta::Expected;
pub use events::{Back, Effect, Event, Place};
pub(super) use room::{Company, Room};
pub(super) use standing::Holding;
pub(super) use turns::TOLD_MAX;
pub(super) use weights::Lack;

/// How long a plan stands while only more of the same arrives.
const PLAN_EVERY_MS: i64 = 5;
/// Bits that count the loads of one run of the server.
const LOAD_BITS: u32 = 24;
/// What tenants were served is kept at least this often while it changes.
const KEEP_SERVED_EVERY_MS: i64 = 10_000;

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
            Event::Unclaimed { model, numbers } => {
                self.on_unclaimed(&model, numbers, now);
                Vec::new()
            }
            Event::OutOfMemory { model, number, jobs } => self.on_out_of_memory(&model, number, jobs, now),
            Event::Shape { model, number, words } => self.on_shape(&model, number, now, |batching, key| {
                batching.name(key, words);
                None
            }),
            Event::Answered { model, number } => self.on_answered(&model, number, now),
            Event::Ended { model, number, answered, suspect, back } => {
                self.on_ended(&model, number, answered, suspect, back, now)
            }
            Event::Gone { model, priority, number } => {
                self.on_gone(&model, priority, number);
                Vec::new()
            }
            Event::Report { model, replica, report } => match self.index_of(&model) {
                Some(index) => self.on_report(index, replica, report, now),
                None => Vec::new(),
            },
            Event::Fetch { model, want, report } => self.on_fetch(&model, want, *report),
            Event::Devices(there) => self.on_devices(&there),
            Event::Control(control) => self.on_control(&control, now),
            Event::Purge { model, before } => self.on_purge(model.as_deref(), before),
            Event::Purged { model, removed } => self.on_purged(model.as_deref(), removed, now),
            Event::Edited(edits) => self.on_edits(&edits, now),
            Event::Unserved { model, jobs, claimed } => {
                self.on_unserved(&model, jobs, claimed, now);
                Vec::new()
            }
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

    /// The place of a worker.
    fn find(&self, model: usize, replica: u32) -> Option<usize> {
        self.workers.iter().position(|worker| worker.model == model && worker.replica == replica)
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
        self.block_without_set(now, &mut effects);
        let planned = if self.stopping { None } else { self.plan_in_time(now, &mut effects) };
        self.expedite(&mut effects);
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
#[path = "preload_tests.rs"]
mod preload_tests;

#[cfg(test)]
#[path = "weights_tests.rs"]
mod weights_tests;

#[cfg(test)]
#[path = "box_tests.rs"]
mod boxes;

#[cfg(test)]
#[path = "sim_tests.rs"]
mod sim;
