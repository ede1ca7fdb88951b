//! Random boxes of several GPUs: the state machine among simulated workers that load, run, stop and park as ordered. Checked
//! after every event: memory, slots, draining workers, work conservation, reasons; at the end: that everybody was served, and
//! within the bound.

use std::collections::BTreeSet;
use std::time::Duration;

use proptest::prelude::*;

use super::sim::Rng;
use super::tests::spec;
use super::*;
use crate::domain::{Face, Park};
use crate::policy::{hold, sets, view};
use crate::scheduler::queue::tests::job as base_job;

const GB: u64 = 1_000_000_000;
const GPU: u64 = 80 * GB;
/// Events of one box; more: it never ends.
const EVENTS_MAX: usize = 60_000;
const IDLE_WAKES_MAX: usize = 300;
const CODES: [&str; 18] = [
    "bare",
    "overloaded",
    "dry",
    "hold",
    "finish_first",
    "linger",
    "not_due",
    "due",
    "due_interactive",
    "deadline",
    "guest",
    "reserved",
    "replica",
    "fits",
    "park",
    "drop",
    "blocked",
    "batch",
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Loading,
    Ready,
    Leaving,
    Parked,
}

#[derive(Debug)]
struct There {
    set: GpuSet,
    stage: Stage,
    running: BTreeMap<i64, Millis>,
    /// A GPU of it has vanished since it was loaded.
    vanished: bool,
}

#[derive(Debug)]
enum Ev {
    Arrive(Vec<QueuedJob>),
    Ready(usize, u32),
    Gone(usize, u32, bool),
    End(usize, i64),
    /// A job whose GPU has vanished waits again.
    Back(usize, i64),
    Devices(BTreeMap<u32, u64>),
}

struct Setup {
    specs: Vec<ModelSpec>,
    cold_ms: Vec<Millis>,
    wake_ms: Vec<Millis>,
    work_ms: Vec<Millis>,
    /// What a parked worker keeps of each of its GPUs, in bytes.
    keeps: Vec<u64>,
    stop_ms: Millis,
    inventory: Inventory,
    knobs: Knobs,
    arrivals: Vec<(Millis, Vec<QueuedJob>)>,
}

/// `calm`: no pins, and nothing but what the bound on starvation is about.
fn setup(rng: &mut Rng, calm: bool) -> Setup {
    let gpus = rng.pick(&[1_usize, 1, 2, 4, 8]);
    let inventory = Inventory {
        gpus: vec![GPU; gpus],
        cpu: rng.chance(300).then_some(64 * GB),
        host: rng.pick(&[0, 60, 400]) * GB,
        one_at_a_time: false,
        gone: Default::default(),
    };
    let (mut specs, mut cold_ms, mut wake_ms, mut work_ms) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut keeps = Vec::new();
    for index in 0..rng.index(6) + 2 {
        let limit = rng.pick(&[1, 2, 8, 16]);
        let wanted = rng.pick(&[0, 1, 1, 1, 2, 4]);
        let cold: Millis = rng.pick(&[1_000, 5_000, 30_000]);
        let needs = if wanted == 0 && inventory.cpu.is_none() { 1 } else { wanted.min(u32::try_from(gpus).unwrap()) };
        let memory = (!rng.chance(150)).then(|| rng.pick(&[10, 30, 50, 60]) * GB);
        let max_batch = if rng.chance(300) { limit } else { 1 };
        specs.push(ModelSpec {
            kind: crate::domain::ModelKind::Custom,
            gpus: needs,
            memory,
            max_batch,
            first_batch: max_batch,
            max_replicas: rng.pick(&[1, 1, 2, 4]),
            exclusive: rng.chance(100),
            pin: !calm && rng.chance(50),
            park: if rng.chance(500) { crate::domain::Park::Ram } else { crate::domain::Park::Off },
            idle_ttl: (!calm && rng.chance(100)).then(|| Duration::from_secs(3)),
            preload: !calm && rng.chance(100),
            startup_time: Duration::from_millis(cold.unsigned_abs()),
            ..spec(&format!("m{index}"), limit)
        });
        cold_ms.push(cold);
        wake_ms.push(cold / 10);
        work_ms.push(rng.pick(&[50, 1_000, 3_000]));
        keeps.push(if needs > 0 { rng.pick(&[0, 1, 4]) * GB } else { 0 });
    }
    let seconds = Duration::from_secs;
    let knobs = Knobs {
        max_wait_interactive: seconds(rng.pick(&[1, 60, 3_600])),
        max_wait_batch: seconds(rng.pick(&[1, 60, 900])),
        max_visit: seconds(rng.pick(&[1, 60, 3_600])),
        swap_budget_interactive: rng.pick(&[0.01, 0.5, 0.99]),
        swap_budget_other: rng.pick(&[0.01, 0.15, 0.99]),
        ..Knobs::default()
    };
    let (mut at, mut number) = (1_000, 0);
    let gap = rng.pick(&[0, 200, 2_000]);
    let mut arrivals = Vec::new();
    for _ in 0..rng.pick(&[20, 100, 250]) {
        at += rng.range(0, gap);
        let model = rng.index(specs.len());
        let count = if rng.chance(100) { rng.range(1, 30) } else { 1 };
        let priority = rng.pick(&[3, 5, 7]);
        let tenant: Arc<str> = Arc::from(rng.pick(&["a", "b", "c"]));
        let jobs = (0..count).map(|_| {
            number += 1;
            QueuedJob {
                model: Arc::from(specs[model].name.as_str()),
                tenant: tenant.clone(),
                face: if priority == 7 { Face::Sync } else { Face::Async },
                created_at: at,
                deadline: (!calm && rng.chance(100)).then(|| at + rng.range(1_000, 400_000)),
                ..base_job(number, priority)
            }
        });
        arrivals.push((at, jobs.collect()));
    }
    let stop_ms = rng.pick(&[0, 1_500]);
    Setup { specs, cold_ms, wake_ms, work_ms, keeps, stop_ms, inventory, knobs, arrivals }
}

struct Boxed {
    state: State,
    setup: Setup,
    now: Millis,
    agenda: BTreeMap<(Millis, u64), Ev>,
    made: u64,
    there: BTreeMap<(usize, u32), There>,
    open: usize,
    unvisited: Vec<Option<Millis>>,
    longest: Millis,
    decisions: usize,
    loads: usize,
    /// Models that were said to be parked or dropped from host memory, and were not yet.
    parking: Vec<(String, &'static str)>,
    /// Callers who send their next request when the last was answered: requests left and think time, by model.
    callers: BTreeMap<usize, (usize, Millis)>,
    next_number: i64,
    /// Device time that jobs had, as they were told, ms.
    had_ms: f64,
    /// Workers that were told to leave, and had jobs then.
    leaving: BTreeSet<(usize, u32)>,
    /// Loads that were announced and not yet ordered, by model.
    told_loads: BTreeMap<String, usize>,
}

impl Boxed {
    fn new(seed: u64, calm: bool) -> Self {
        Self::of(setup(&mut Rng(seed), calm))
    }

    fn of(mut setup: Setup) -> Self {
        let state = State::new(&setup.specs, setup.knobs.clone(), &BTreeMap::new(), 1).on(setup.inventory.clone());
        let arrivals = std::mem::take(&mut setup.arrivals);
        let mut boxed = Self {
            state,
            now: 0,
            agenda: BTreeMap::new(),
            made: 0,
            there: BTreeMap::new(),
            open: 0,
            unvisited: vec![None; setup.specs.len()],
            longest: 0,
            decisions: 0,
            loads: 0,
            parking: Vec::new(),
            callers: BTreeMap::new(),
            next_number: 1_000_000,
            had_ms: 0.0,
            leaving: BTreeSet::new(),
            told_loads: BTreeMap::new(),
            setup,
        };
        for (at, jobs) in arrivals {
            boxed.open += jobs.len();
            boxed.at(at, Ev::Arrive(jobs));
        }
        boxed
    }

    fn at(&mut self, at: Millis, event: Ev) {
        self.made += 1;
        self.agenda.insert((at, self.made), event);
    }

    fn run(&mut self) {
        let mut idle_wakes = 0;
        for _ in 0..EVENTS_MAX {
            if self.open == 0 {
                self.check_accounts();
                return;
            }
            let wake = self.state.wake_at();
            let next = self.agenda.first_key_value().map(|((at, _), _)| *at);
            match (next, wake) {
                (Some(at), wake) if wake.is_none_or(|wake| at <= wake.max(self.now)) => {
                    idle_wakes = 0;
                    self.now = at;
                    let (_, event) = self.agenda.pop_first().unwrap();
                    self.happen(event);
                }
                (_, Some(wake)) => {
                    idle_wakes += 1;
                    assert!(idle_wakes < IDLE_WAKES_MAX, "busy with nothing: {:?}", self.state.decision);
                    self.now = self.now.max(wake);
                }
                _ => panic!("{} jobs are left, and nothing will happen: {:?}", self.open, self.state.decision),
            }
            let effects = self.state.step(self.now);
            let wake = self.state.wake_at();
            assert!(wake.is_none_or(|wake| wake > self.now), "{wake:?} is not after {}", self.now);
            self.carry_out(effects);
            let leaving = self.state.workers.iter().filter(|worker| matches!(worker.phase, Phase::Draining { .. }));
            self.leaving = leaving.map(|worker| (worker.model, worker.replica)).collect();
            self.check();
        }
        panic!("no end: {} jobs are left", self.open);
    }

    fn tell(&mut self, event: Event) {
        let effects = self.state.on_event(event, self.now);
        self.carry_out(effects);
    }

    fn report(&mut self, model: usize, replica: u32, report: Report) {
        let model = self.setup.specs[model].name.clone();
        self.tell(Event::Report { model, replica, report });
    }

    fn happen(&mut self, event: Ev) {
        let all = self.state.inventory.gpu_count();
        match event {
            Ev::Arrive(jobs) => {
                for job in &jobs {
                    self.state.count_arrival(&job.model, self.now);
                }
                self.tell(Event::Queued(jobs));
            }
            Ev::Ready(model, replica) => {
                // A load that was broken off is not ready any more.
                let there = self.there.get_mut(&(model, replica)).filter(|there| there.stage == Stage::Loading);
                let Some(there) = there else { return };
                there.stage = Stage::Ready;
                let load_ms = self.setup.cold_ms[model];
                self.report(model, replica, Report::Ready { base_url: format!("{model}:{replica}"), load_ms });
            }
            Ev::Gone(model, replica, parked) => {
                let stop_ms = self.setup.stop_ms;
                if parked {
                    self.there.get_mut(&(model, replica)).unwrap().stage = Stage::Parked;
                    let device_bytes = self.setup.keeps[model];
                    self.report(model, replica, Report::Keeps { device_bytes });
                    self.report(model, replica, Report::Parked { park_ms: stop_ms });
                } else {
                    self.there.remove(&(model, replica));
                    self.report(model, replica, Report::Stopped { stop_ms });
                }
            }
            Ev::Devices(there) => {
                let gone = |set: GpuSet| set.gpus().any(|gpu| gpu < all && !there.contains_key(&gpu));
                let on_device = self.there.values_mut().filter(|there| there.stage != Stage::Parked);
                on_device.filter(|there| gone(there.set)).for_each(|there| there.vanished = true);
                self.tell(Event::Devices(there));
                let lacks = |set| self.state.inventory.lacks(set);
                let stay = self.state.workers.iter().find(|worker| worker.stays() && lacks(worker.set));
                assert_eq!(stay, None, "on a GPU that is gone");
            }
            Ev::Back(model, number) => {
                let name = self.state.models[model].name.clone();
                if self.end(number) {
                    self.had_ms += self.state.settle(&name, number, self.now);
                    let back = Some(Back::default());
                    self.tell(Event::Ended { model: name, number, answered: false, suspect: false, back });
                }
            }
            Ev::End(model, number) => {
                let name = self.state.models[model].name.clone();
                // One that was sent back has no end.
                if !self.end(number) {
                    return;
                }
                self.open -= 1;
                self.had_ms += self.state.settle(&name, number, self.now);
                self.tell(Event::Ended { model: name, number, answered: true, suspect: false, back: None });
                self.send_next(model);
            }
        }
    }

    /// Takes a job off its worker; false: it was on none.
    fn end(&mut self, number: i64) -> bool {
        self.there.values_mut().any(|there| there.running.remove(&number).is_some())
    }

    /// GPUs vanish and come back at random times; in the end all are there.
    fn with_vanishing_gpus(mut self, rng: &mut Rng) -> Self {
        let all: BTreeMap<u32, u64> = (0..).zip(self.setup.inventory.gpus.iter().copied()).collect();
        let mut at = 1_000;
        for _ in 0..rng.range(1, 8) {
            at += rng.range(1, 60_000);
            let some = all.iter().filter(|_| !rng.chance(400)).map(|(gpu, bytes)| (*gpu, *bytes)).collect();
            self.at(at, Ev::Devices(some));
        }
        self.at(at + rng.range(1, 60_000), Ev::Devices(all));
        self
    }

    /// The caller of a model has an answer, and sends the next request.
    fn send_next(&mut self, model: usize) {
        let Some((left, think)) = self.callers.get_mut(&model).filter(|(left, _)| *left > 0) else { return };
        *left -= 1;
        let at = self.now + *think;
        self.next_number += 1;
        let name = Arc::from(self.setup.specs[model].name.as_str());
        let job = QueuedJob { model: name, face: Face::Sync, created_at: at, ..base_job(self.next_number, 7) };
        self.open += 1;
        self.at(at, Ev::Arrive(vec![job]));
    }

    fn carry_out(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Claim { model, place, run } => self.start(&model, &place, &run),
                Effect::Order { model, replica, set, order, .. } => {
                    let index = self.state.index_of(&model).unwrap();
                    self.obey(index, replica, set, order);
                }
                Effect::Evict { numbers } => {
                    for number in numbers {
                        let on = self.there.iter().find(|(_, there)| there.running.contains_key(&number));
                        let ((model, _), there) = on.expect("a running job");
                        assert!(self.state.inventory.lacks(there.set), "its GPU is there");
                        self.at(self.now + 10, Ev::Back(*model, number));
                    }
                }
                Effect::EndQueued { numbers, .. } => self.open -= numbers.len(),
                Effect::Announce(decision) => {
                    self.check_reason(&decision);
                    if matches!(decision.action, "load" | "swap") {
                        *self.told_loads.entry(decision.model.clone().unwrap()).or_default() += 1;
                    }
                    let is_of_host = matches!(decision.action, "park" | "drop");
                    self.parking
                        .extend(decision.model.clone().filter(|_| is_of_host).map(|model| (model, decision.action)));
                }
                _ => {}
            }
        }
    }

    fn start(&mut self, model: &str, place: &Place, run: &Run) {
        let index = self.state.index_of(model).unwrap();
        assert!(!self.leaving.contains(&(index, place.replica)), "{model} {} leaves and is given jobs", place.replica);
        let (spec, work) = (&self.setup.specs[index], self.setup.work_ms[index]);
        let worker = self.there.get_mut(&(index, place.replica)).expect("a worker");
        assert_eq!(worker.stage, Stage::Ready, "{model} {} takes no jobs", place.replica);
        assert!(spec.max_batch == 1 || worker.running.is_empty(), "a run beside another");
        for job in &run.jobs {
            assert!(worker.running.insert(job.number, self.now).is_none());
        }
        assert!(worker.running.len() <= spec.limit as usize, "{model} has more jobs than slots");
        for job in &run.jobs {
            self.at(self.now + work, Ev::End(index, job.number));
        }
    }

    /// Who is parked, dropped or stopped instead was said to be, just before.
    fn check_parking(&mut self, model: usize, replica: u32, stage: Option<Stage>, (order, set): (Order, GpuSet)) {
        let spec = &self.setup.specs[model];
        // With its GPU, what would be parked has gone.
        let vanished = self.there.get(&(model, replica)).is_some_and(|there| there.vanished);
        let action = match (order, stage) {
            (Order::Stop, Some(Stage::Ready)) if vanished => return,
            (Order::Park | Order::ParkBare, _) => {
                assert!(!vanished, "{} is parked from a GPU that is gone", spec.name);
                "park"
            }
            (Order::Stop, Some(Stage::Parked)) => "drop",
            (Order::Wake, _) if self.there.get(&(model, replica)).is_some_and(|there| there.set != set) => "drop",
            (Order::Stop, Some(Stage::Ready)) if spec.park.is_on() && self.setup.inventory.host > 0 => "drop",
            _ => return,
        };
        let said = self.parking.iter().position(|(name, of)| *name == spec.name && *of == action);
        let said = said.unwrap_or_else(|| panic!("{} is to {action} and nobody said so: {order:?}", spec.name));
        self.parking.remove(said);
    }

    fn obey(&mut self, model: usize, replica: u32, set: GpuSet, order: Order) {
        let key = (model, replica);
        let stage = self.there.get(&key).map(|there| there.stage);
        self.check_parking(model, replica, stage, (order, set));
        match (order, stage) {
            (Order::Load, None) | (Order::Wake, Some(Stage::Parked)) => {
                let wakes = order == Order::Wake && self.there.get(&key).is_some_and(|there| there.set == set);
                let takes = if wakes { self.setup.wake_ms[model] } else { self.setup.cold_ms[model] };
                self.loads += 1;
                let told = self.told_loads.entry(self.setup.specs[model].name.clone()).or_default();
                *told = told.checked_sub(1).expect("each load has a decision, made before it");
                self.there.insert(key, There { set, stage: Stage::Loading, running: BTreeMap::new(), vanished: false });
                self.at(self.now + takes, Ev::Ready(model, replica));
            }
            (Order::Stop, Some(Stage::Loading)) if self.state.inventory.lacks(set) => {
                self.there.get_mut(&key).unwrap().stage = Stage::Leaving;
                self.at(self.now + self.setup.stop_ms, Ev::Gone(model, replica, false));
            }
            (Order::Stop | Order::Park | Order::ParkBare, Some(Stage::Ready)) => {
                let there = self.there.get_mut(&key).unwrap();
                assert!(there.running.is_empty(), "{key:?} is stopped with jobs");
                there.stage = Stage::Leaving;
                self.at(self.now + self.setup.stop_ms, Ev::Gone(model, replica, order != Order::Stop));
            }
            (Order::Expedite, Some(Stage::Loading)) | (Order::Proven, Some(Stage::Ready)) => {}
            (Order::Stop, Some(Stage::Parked)) => {
                self.at(self.now, Ev::Gone(model, replica, false));
            }
            other => panic!("{key:?}: {other:?}"),
        }
    }

    fn check(&mut self) {
        self.check_memory();
        assert!(self.parking.is_empty(), "said and not done: {:?}", self.parking);
        for (index, model) in self.state.models.iter().enumerate() {
            let serves = self.there.iter().any(|((m, _), there)| *m == index && there.stage == Stage::Ready);
            let waits = model.queue.pending() != (0, 0) && model.trouble.is_none();
            let takes_jobs =
                self.state.workers.iter().any(|w| w.model == index && matches!(w.phase, Phase::Serving { .. }));
            if waits && !(serves && takes_jobs) {
                let since = *self.unvisited[index].get_or_insert(self.now);
                self.longest = self.longest.max(self.now - since);
            } else {
                self.unvisited[index] = None;
            }
            for worker in self.state.workers.iter().filter(|w| w.model == index && waits) {
                let there = self.there.get(&(index, worker.replica));
                let free = there.is_some_and(|there| there.stage == Stage::Ready && there.running.is_empty());
                let takes_jobs = matches!(worker.phase, Phase::Serving { .. });
                assert!(!(free && takes_jobs), "{} waits beside its own idle worker", model.name);
            }
        }
        if !self.state.plan_soon && !self.state.plan_now {
            self.check_work_conserving();
        }
        self.check_explained();
        let reasons: Vec<Decision> = self.state.decisions().take(2).cloned().collect();
        reasons.iter().for_each(|decision| self.check_reason(decision));
    }

    /// The time that devices worked is the time that jobs had of them, whoever shared what with whom.
    fn check_accounts(&mut self) {
        let worked: f64 = self.state.take_spent(self.now).iter().map(|spent| spent.work_ms).sum();
        assert!((worked - self.had_ms).abs() < 1.0, "devices worked {worked} ms, jobs had {} ms", self.had_ms);
    }

    /// Each model that waits without a worker has been told why, with figures.
    fn check_explained(&self) {
        if self.state.plan_soon || self.state.plan_now {
            return;
        }
        for (index, model) in self.state.models.iter().enumerate() {
            let has_worker = self.state.workers.iter().any(|w| w.model == index && w.is_on_device());
            if model.queue.pending() != (0, 0) && model.trouble.is_none() && !has_worker {
                let why = self.state.journal.about(&model.name);
                let is_said = why.is_some_and(|decision| !decision.numbers.is_empty() && !decision.reason.is_empty());
                assert!(is_said, "{} waits and nobody says why: {why:?}", model.name);
            }
        }
    }

    fn check_memory(&self) {
        for (device, size) in self.setup.inventory.devices().into_iter().enumerate() {
            let device = u32::try_from(device).unwrap();
            let on = self.there.iter().filter(|(_, there)| there.stage != Stage::Parked && there.set.has(device));
            let used: u64 = on.map(|((model, _), _)| self.bytes(*model).unwrap_or(size)).sum();
            assert!(used <= size, "{used} of {size} bytes in use on device {device}");
            self.check_residues(device, size);
        }
        let has_copy = |model: usize, replica: u32| {
            self.state.workers.iter().any(|w| (w.model, w.replica, w.is_bare) == (model, replica, false))
        };
        let parked = self.there.iter().filter(|(_, there)| there.stage == Stage::Parked);
        let parked = parked.filter(|((model, replica), _)| has_copy(*model, *replica));
        let host: u64 = parked.map(|((model, _), _)| self.state.models[*model].parked(self.now).bytes).sum();
        assert!(host <= self.setup.inventory.host, "{host} bytes of parked models");
    }

    /// Nothing is loaded beside what parked workers keep, unless it takes what is free.
    fn check_residues(&self, device: u32, size: u64) {
        let used = |model: usize, there: &There| match there.stage {
            Stage::Parked => Some(self.setup.keeps[model]),
            _ => self.bytes(model),
        };
        let on = self.there.iter().filter(|(_, there)| there.set.has(device));
        let used: Option<u64> = on.map(|((model, _), there)| used(*model, there)).sum();
        assert!(used.is_none_or(|used| used <= size), "{used:?} of {size} bytes in use on device {device}");
    }

    fn bytes(&self, model: usize) -> Option<u64> {
        self.setup.specs[model].memory.filter(|_| !self.setup.specs[model].exclusive)
    }

    /// No set on which a waiting model would fit at once is left empty or idle, unless it is kept for another, its resident
    /// is pinned or lingers, or the model's last worker is still leaving.
    fn check_work_conserving(&self) {
        let view = self.state.view(self.now);
        for (index, model) in view.models.iter().enumerate() {
            let has_any = view.workers.iter().any(|worker| worker.model == index);
            if model.pending() == 0 || has_any || !model.can_load() {
                continue;
            }
            for set in sets::aligned(&view, index) {
                if view.reservations.iter().any(|r| r.model != index && r.set.overlaps(set)) {
                    continue;
                }
                let can_go: Vec<usize> = (0..view.workers.len())
                    .filter(|w| {
                        let worker = &view.workers[*w];
                        let idle = worker.phase == view::Phase::Serving && !view.has_work(worker);
                        let lingers = hold::lingers_until(&view, worker, model).is_some_and(|until| until > self.now);
                        idle && !view.model_of(worker).pin && !lingers
                    })
                    .collect();
                assert!(
                    !sets::fits(&view, index, set, &can_go),
                    "{} waits beside {set}, which is idle: {:?}",
                    model.name,
                    self.state.decision
                );
            }
        }
    }

    fn check_reason(&mut self, decision: &Decision) {
        self.decisions += 1;
        let about_a_swap = decision.is_change() || decision.other.is_some();
        let said = decision.reason.len() >= 10 && CODES.contains(&decision.code);
        let counted = !about_a_swap || !decision.numbers.is_empty() || decision.code == "drop";
        let preload = decision.reason.contains("preload");
        assert!(said && decision.at <= self.now && (counted || preload), "{decision:?}");
        assert!(!decision.is_change() || decision.model.is_some(), "{decision:?}");
        assert!(decision.numbers.values().all(|number| number.is_finite()), "{decision:?}");
    }

    /// B = C + (M - 1)(H + D + L) + L: see the module of the plan and the design it follows.
    fn bound(&self) -> Millis {
        let setup = &self.setup;
        let most = |times: &[Millis]| times.iter().copied().max().unwrap_or(0);
        let load = most(&setup.cold_ms) + setup.stop_ms.max(1_000);
        // The prior of a service time, as long as it is not known.
        let drain = most(&setup.work_ms).max(3_000);
        let price = 2 * load + drain;
        let knobs = &setup.knobs;
        let visit = view::millis(knobs.max_visit).max(view::round(knobs.rush() * price as f64)) + price;
        let again = (3 * view::millis(knobs.max_wait_interactive)).max(view::millis(knobs.max_wait_batch));
        let others = i64::try_from(setup.specs.len()).unwrap() - 1;
        again + others * (visit + drain + load) + load
    }
}

fn cases(few: u32) -> ProptestConfig {
    let cases = std::env::var("ROUNDHOUSE_SIM_SEEDS").ok().and_then(|text| text.parse().ok());
    ProptestConfig {
        max_shrink_iters: 0,
        failure_persistence: None,
        ..ProptestConfig::with_cases(cases.unwrap_or(few))
    }
}

proptest! {
    #![proptest_config(cases(60))]

    #[test]
    fn no_box_breaks_an_invariant(seed in any::<u64>()) {
        let mut boxed = Boxed::new(seed, false);
        // Beside a pinned model others may never fit.
        if boxed.setup.specs.iter().any(|spec| spec.pin) {
            let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| boxed.run()));
            let text = ended.err().and_then(|e| e.downcast_ref::<String>().cloned()).unwrap_or_default();
            prop_assert!(text.is_empty() || text.contains("nothing will happen"), "{text}");
        } else {
            boxed.run();
        }
        prop_assert!(boxed.decisions > 0);
    }

    #[test]
    fn gpus_that_come_and_go_lose_no_job(seed in any::<u64>()) {
        let mut boxed = Boxed::new(seed, true).with_vanishing_gpus(&mut Rng(seed ^ 1));
        boxed.run();
        prop_assert_eq!(boxed.open, 0);
    }

    #[test]
    fn no_model_waits_beyond_the_bound(seed in any::<u64>()) {
        let mut boxed = Boxed::new(seed, true);
        boxed.run();
        let bound = boxed.bound();
        prop_assert!(boxed.longest <= bound, "a model waited {} ms, the bound is {bound} ms", boxed.longest);
    }

    #[test]
    fn a_seed_always_decides_the_same(seed in any::<u64>()) {
        let told = || {
            let mut boxed = Boxed::new(seed, true);
            boxed.run();
            boxed.state.decisions().cloned().collect::<Vec<_>>()
        };
        prop_assert_eq!(told(), told());
    }
}

/// A parked worker waits until another leaves the GPU where it lies, and a third one has room there until then, but not beside
/// what the parked one keeps.
#[test]
fn nobody_is_loaded_beside_what_a_waiting_worker_keeps_before_all_have_left() {
    let seed = 12_138_113_557_233_180_957;
    Boxed::new(seed, true).with_vanishing_gpus(&mut Rng(seed ^ 1)).run();
}

/// Passes of eight turn out to be about as fast as those of sixteen, and that is said.
#[test]
fn passes_that_change_their_size_are_explained() {
    let seed = 4_700_940_324_764_355_423;
    Boxed::new(seed, true).with_vanishing_gpus(&mut Rng(seed ^ 1)).run();
}

/// A job comes for a model whose last worker is just leaving host memory.
#[test]
fn who_waits_for_the_last_worker_to_leave_host_memory_is_told_so() {
    Boxed::new(5_699_835_690_025_950_881, false).run();
}

/// A box after `requests` of each of two callers, who use a model each and send one request after the other.
fn closed_loops(requests: usize, think: Millis, work: Millis, load: Millis) -> Boxed {
    closed_loops_of(ModelSpec { gpus: 1, ..spec("m", 8) }, Inventory::one_device(), (requests, think, work, load))
}

fn closed_loops_of(
    each: ModelSpec,
    inventory: Inventory,
    (requests, think, work, load): (usize, Millis, Millis, Millis),
) -> Boxed {
    let startup_time = Duration::from_millis(load.unsigned_abs());
    let specs = [0, 1].map(|index| ModelSpec { name: format!("m{index}"), startup_time, ..each.clone() });
    let mut boxed = Boxed::of(Setup {
        specs: specs.to_vec(),
        cold_ms: vec![load; 2],
        wake_ms: vec![load; 2],
        work_ms: vec![work; 2],
        keeps: vec![0; 2],
        stop_ms: 500,
        inventory,
        knobs: Knobs::default(),
        arrivals: Vec::new(),
    });
    for model in [0, 1] {
        boxed.callers.insert(model, (requests, think));
        boxed.send_next(model);
    }
    boxed.run();
    boxed
}

#[test]
fn two_callers_who_send_one_request_after_the_other_do_not_cost_a_swap_for_each() {
    for (think, work, load) in
        [(0, 1_000, 10_000), (2, 1_000, 10_000), (2, 5_000, 40_000), (2, 50, 2_000), (1_000, 1_000, 20_000)]
    {
        let loads = closed_loops(8, think, work, load).loads;
        assert!(loads <= 6, "{loads} loads for 16 requests: think {think}, work {work}, load {load} ms");
    }
    // Who thinks longer than a swap takes is not waited for.
    let apart = closed_loops(8, 60_000, 1_000, 2_000);
    assert!(apart.loads > 6);
    let hints = apart.state.decisions().filter(|decision| decision.reason.contains("turns of one job each")).count();
    assert!(hints >= 3 && hints < apart.loads - 3, "{hints} hints on what would help, {} loads", apart.loads);
}

#[test]
fn who_is_parked_already_is_not_told_to_park() {
    let hints = |parks: Park| {
        let each = ModelSpec { gpus: 1, memory: Some(60 * GB), park: parks, ..spec("m", 8) };
        let inventory = Inventory { host: 400 * GB, ..Inventory::of(&[(0, GPU)].into(), 0) };
        let boxed = closed_loops_of(each, inventory, (8, 60_000, 1_000, 2_000));
        let said = boxed.state.decisions().filter(|decision| decision.reason.contains("turns of one job each"));
        said.map(|decision| decision.reason.contains("(`park`)")).collect::<Vec<bool>>()
    };
    let (awake, parked) = (hints(Park::Off), hints(Park::Ram));
    assert!(!awake.is_empty() && awake.iter().all(|advice| *advice), "{awake:?}");
    assert!(!parked.is_empty() && parked.iter().all(|advice| !advice), "{parked:?}");
}
