//! The scheduler's own state machine on a simulated machine. It is the code that the server runs: this file only turns what
//! happens into its events and its effects into orders, as `scheduler::run` does with supervisors and the store. Claims are
//! committed at once.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::Trace;
use super::engine::Policy;
use super::record::WorkerId;
use super::trace::TraceModel;
use super::world::{Breach, Happening, World};
use crate::domain::worker::{HostCopy, Report};
use crate::domain::{Class, Face, GpuSet, Launch, Millis, ModelKind, ModelSpec, Park};
use crate::policy::Knobs;
use crate::policy::plan::Decision;
use crate::scheduler::state::{Effect, Event, Inventory, State};
use crate::store::{Learned, QueuedJob};
use crate::worker::supervisor::Order;

/// Where the state machine's clock stands when the trace begins.
const BEGIN_MS: Millis = 1_800_000_000_000;
/// Of jobs that are submitted together, so many are told when they should start.
const TOLD_OF_BULK: usize = 32;
/// About so many submissions are.
const TOLD_SUBMISSIONS: usize = 600;
/// Priorities of the two classes: what the API gives to a call on the line, and to one job that is looked up later.
const PRIORITY_INTERACTIVE: u8 = 7;
const PRIORITY_BATCH: u8 = 5;

/// The scheduler, and what it says about its decisions.
#[derive(Debug)]
pub struct Roundhouse {
    state: State,
    models: Vec<Arc<str>>,
    tenants: Vec<Arc<str>>,
    index: HashMap<Arc<str>, usize>,
    /// Workers on GPUs by model and the number that the state machine gives them, and the other way round.
    workers: HashMap<(usize, u32), WorkerId>,
    numbers: HashMap<WorkerId, u32>,
    /// Why a model is loaded next.
    reasons: HashMap<String, String>,
    /// Every so many-th submission is told when its jobs should start; 0: none.
    told_every: usize,
    submissions: usize,
}

impl Roundhouse {
    /// As a server that starts with these models and an empty queue.
    pub fn new(trace: &Trace, knobs: Knobs) -> Self {
        let specs: Vec<ModelSpec> = trace.models.iter().map(|model| spec(trace, model)).collect();
        let inventory = Inventory {
            gpus: vec![bytes(trace.gpu_gb); trace.gpus],
            cpu: None,
            host: bytes(trace.host_gb),
            one_at_a_time: false,
            gone: Default::default(),
        };
        let models: Vec<Arc<str>> = trace.models.iter().map(|model| Arc::from(model.name.as_str())).collect();
        // What a models file would declare of its jobs.
        let learned: BTreeMap<String, Learned> = trace
            .models
            .iter()
            .map(|model| {
                let service_ms = Some(model.mean_work_s * 1e3).filter(|ms| *ms > 0.0);
                (model.name.clone(), Learned { service_ms, ..Learned::default() })
            })
            .collect();
        Self {
            state: State::new(&specs, knobs, &learned, 1).on(inventory),
            index: models.iter().cloned().enumerate().map(|(index, name)| (name, index)).collect(),
            models,
            tenants: trace.tenants.iter().map(|name| Arc::from(name.as_str())).collect(),
            workers: HashMap::new(),
            numbers: HashMap::new(),
            reasons: HashMap::new(),
            told_every: 0,
            submissions: 0,
        }
    }

    /// Tells some of the jobs when they should start.
    #[must_use]
    pub fn telling(mut self, trace: &Trace) -> Self {
        let submissions = trace.jobs.chunk_by(|a, b| a == b).count();
        self.told_every = submissions.div_ceil(TOLD_SUBMISSIONS).max(1);
        self
    }

    /// Jobs that arrive together and are alike are submitted together, as one bulk request; others one by one.
    fn arrive(&mut self, world: &mut World<'_>, arrived: Range<usize>) -> Result<(), Breach> {
        let now = millis(world.now());
        let jobs = &world.trace().jobs;
        let mut first = arrived.start;
        while first < arrived.end {
            let alike = jobs[first..arrived.end].iter().take_while(|job| **job == jobs[first]).count();
            let queued: Vec<QueuedJob> = (first..first + alike).map(|job| self.job(world.trace(), job)).collect();
            first += alike;
            queued.iter().for_each(|job| self.state.count_arrival(&job.model, now));
            let place = match &queued[..] {
                [only] => self.state.reserve(only, now).map(|place| (only, place)),
                _ => None,
            };
            match place {
                Some((only, place)) => self.start(world, &only.model, place.replica, only.number)?,
                None => {
                    self.submissions += 1;
                    let is_told = self.told_every > 0 && self.submissions.is_multiple_of(self.told_every);
                    let asked = if is_told { TOLD_OF_BULK.min(alike) } else { 0 };
                    let numbers: Vec<(i64, u8, Arc<str>)> = (0..asked)
                        .map(|n| &queued[n * (alike - 1) / (asked - 1).max(1)])
                        .map(|job| (job.number, job.priority, job.model.clone()))
                        .collect();
                    self.tell(world, Event::Queued(queued))?;
                    for (number, priority, model) in numbers {
                        if let Some(told) = self.state.expected(&model, priority, number, now) {
                            world.tell_start(job_of(number), seconds(told.from), seconds(told.to));
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn job(&self, trace: &Trace, job: usize) -> QueuedJob {
        let it = &trace.jobs[job];
        let (face, priority) = match it.class {
            Class::Interactive => (Face::Sync, PRIORITY_INTERACTIVE),
            Class::Batch => (Face::Async, PRIORITY_BATCH),
        };
        QueuedJob {
            number: number(job),
            model: self.models[it.model].clone(),
            tenant: self.tenants[it.tenant].clone(),
            face,
            priority,
            batch_key: 0,
            created_at: millis(it.arrival_s),
            was_started: false,
            crash: None,
            not_before: None,
            start_deadline: None,
            deadline: it.deadline_s.map(millis),
        }
    }

    fn tell(&mut self, world: &mut World<'_>, event: Event) -> Result<(), Breach> {
        let effects = self.state.on_event(event, millis(world.now()));
        self.carry_out(world, effects)
    }

    fn carry_out(&mut self, world: &mut World<'_>, effects: Vec<Effect>) -> Result<(), Breach> {
        for effect in &effects {
            if let Effect::Announce(decision) = effect {
                self.note(decision);
            }
        }
        for effect in effects {
            match effect {
                Effect::Claim { model, place, run } => {
                    for job in run.jobs {
                        self.start(world, &model, place.replica, job.number)?;
                    }
                }
                Effect::Order { model, replica, set, order: Order::Load, .. } => {
                    self.load(world, &model, replica, set, false)?;
                }
                Effect::Order { model, replica, set, order: Order::Wake, .. } => {
                    self.load(world, &model, replica, set, true)?;
                }
                Effect::Order { model, replica, order: Order::Park | Order::ParkBare, .. } => {
                    world.leave(self.worker(world, &model, replica)?, true)?;
                }
                Effect::Order { model, replica, order: Order::Stop, .. } => self.stop(world, &model, replica)?,
                // Simulated workers neither hang nor fail, and no GPU vanishes.
                Effect::Evict { .. } => {}
                Effect::Order { order: Order::Retry | Order::Suspect | Order::Expedite | Order::Proven, .. } => {}
                Effect::EndQueued { numbers, .. } => {
                    for number in numbers {
                        world.expire(job_of(number))?;
                    }
                }
                Effect::Announce(_)
                | Effect::CancelQueued(_)
                | Effect::Fetch { .. }
                | Effect::EndFetch { .. }
                | Effect::TellLoading { .. }
                | Effect::AddLoadTime { .. }
                | Effect::Learn { .. }
                | Effect::Served(_) => {}
            }
        }
        Ok(())
    }

    fn note(&mut self, decision: &Decision) {
        if let Some(model) = decision.model.as_ref().filter(|_| decision.is_change()) {
            self.reasons.insert(model.clone(), decision.reason.clone());
        }
    }

    fn load(
        &mut self,
        world: &mut World<'_>,
        model: &str,
        replica: u32,
        set: GpuSet,
        wake: bool,
    ) -> Result<(), Breach> {
        let index = self.model(world, model)?;
        let worker = world.load(index, set.first as usize, wake)?;
        self.workers.insert((index, replica), worker);
        self.numbers.insert(worker, replica);
        if let Some(reason) = self.reasons.remove(model) {
            world.explain(worker, reason);
        }
        Ok(())
    }

    /// Ends a worker on GPUs, or a parked one, which is gone at once.
    fn stop(&mut self, world: &mut World<'_>, model: &str, replica: u32) -> Result<(), Breach> {
        let index = self.model(world, model)?;
        if let Some(worker) = self.workers.get(&(index, replica)) {
            return world.leave(*worker, false);
        }
        if !world.is_parked(index) {
            return Err(world.breach(format!("worker {replica} of {model} is to stop, and is nowhere")));
        }
        world.unpark(index);
        let report = Report::Stopped { stop_ms: 0 };
        self.tell(world, Event::Report { model: model.to_owned(), replica, report })
    }

    fn start(&mut self, world: &mut World<'_>, model: &str, replica: u32, number: i64) -> Result<(), Breach> {
        let worker = self.worker(world, model, replica)?;
        world.start(job_of(number), worker)
    }

    fn model(&self, world: &World<'_>, model: &str) -> Result<usize, Breach> {
        let known = self.index.get(model).copied();
        known.ok_or_else(|| world.breach(format!("an order is for `{model}`, which the trace does not have")))
    }

    fn worker(&self, world: &World<'_>, model: &str, replica: u32) -> Result<WorkerId, Breach> {
        let known = self.workers.get(&(self.model(world, model)?, replica)).copied();
        known.ok_or_else(|| world.breach(format!("an order is for worker {replica} of {model}, which is on no GPU")))
    }

    fn report(&mut self, world: &mut World<'_>, worker: WorkerId, report: Report) -> Result<(), Breach> {
        let model = world.model_of(worker).name.clone();
        let replica = self.numbers.get(&worker).copied().unwrap_or(0);
        self.tell(world, Event::Report { model, replica, report })
    }
}

impl Policy for Roundhouse {
    fn act(&mut self, world: &mut World<'_>, happened: &[Happening]) -> Result<Option<f64>, Breach> {
        for event in happened {
            match event {
                Happening::Arrived(jobs) => self.arrive(world, jobs.clone())?,
                Happening::Ready(worker) => {
                    let load_ms = millis(world.now()) - millis(world.visit(*worker).load_at);
                    // A trace does not say what it would take to read weights again.
                    let host = HostCopy { can_reread: Some(false), ..HostCopy::default() };
                    self.report(world, *worker, Report::Host(host))?;
                    let report = Report::Ready { base_url: format!("sim:{worker}"), load_ms };
                    self.report(world, *worker, report)?;
                }
                Happening::Gone(worker) => {
                    let left = world.visit(*worker).leave_at.unwrap_or(world.now());
                    let took_ms = millis(world.now()) - millis(left);
                    let replica = self.numbers.get(worker).copied().unwrap_or(0);
                    self.workers.remove(&(world.worker(*worker).model, replica));
                    let report = if world.visit(*worker).parks {
                        Report::Parked { park_ms: took_ms }
                    } else {
                        Report::Stopped { stop_ms: took_ms }
                    };
                    self.report(world, *worker, report)?;
                }
                Happening::Ended { job, worker } => {
                    let model = self.models[world.worker(*worker).model].clone();
                    let event =
                        Event::Ended { model, number: number(*job), answered: true, suspect: false, back: None };
                    self.tell(world, event)?;
                }
                Happening::Wake => {}
            }
        }
        let effects = self.state.step(millis(world.now()));
        self.carry_out(world, effects)?;
        Ok(self.state.wake_at().map(seconds))
    }
}

/// A model of a trace as the models file would describe it.
fn spec(trace: &Trace, model: &TraceModel) -> ModelSpec {
    let limit = u32::try_from(model.limit).unwrap_or(u32::MAX);
    ModelSpec {
        name: model.name.clone(),
        kind: ModelKind::Custom,
        launch: Launch::Command(Vec::new()),
        model: None,
        revision: None,
        port: 0,
        has_own_port: false,
        startup_time: Duration::from_secs_f64(model.cold_s),
        endpoints: vec!["/".to_owned()],
        args: Vec::new(),
        env: BTreeMap::new(),
        aliases: Vec::new(),
        limit,
        max_batch: if model.join { 1 } else { limit },
        first_batch: if model.join { 1 } else { limit },
        timeout: Duration::from_secs(u64::from(u32::MAX)),
        max_attempts: 1,
        idle_ttl: None,
        preload: false,
        gpus: u32::try_from(model.gpus).unwrap_or(u32::MAX),
        memory: Some(bytes(model.gb_per_gpu)),
        max_replicas: u32::try_from(trace.gpus / model.gpus).unwrap_or(u32::MAX),
        pin: false,
        exclusive: false,
        park: if trace.host_gb > 0.0 { Park::Ram } else { Park::Off },
        spare: false,
        upstream_model: model.name.clone(),
        dir: PathBuf::new(),
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "at most 10^9 GB, never negative")]
fn bytes(gb: f64) -> u64 {
    (gb * 1e9).round() as u64
}

fn number(job: usize) -> i64 {
    i64::try_from(job).unwrap_or(i64::MAX - 1) + 1
}

fn job_of(number: i64) -> usize {
    usize::try_from(number - 1).unwrap_or(usize::MAX)
}

/// The state machine's clock at a time of the trace: whole milliseconds, never ahead.
#[expect(clippy::cast_possible_truncation, reason = "traces are far shorter than 2^53 ms")]
fn millis(seconds: f64) -> Millis {
    BEGIN_MS + (seconds * 1e3 + 1e-6).floor() as Millis
}

fn seconds(at: Millis) -> f64 {
    (at - BEGIN_MS) as f64 / 1e3
}
