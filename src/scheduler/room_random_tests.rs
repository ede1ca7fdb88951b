//! Models that lack room at random, on boxes at random, while jobs, orders of a person and edits come and go: when nobody lacks
//! room any more and nothing is pinned or paused, all jobs end.

use std::collections::{BTreeMap, VecDeque};

use crate::domain::{Control, Face, Park};
use crate::policy::Knobs;
use crate::scheduler::state::sim::Rng;
use crate::scheduler::state::tests::{job, spec};
use crate::scheduler::state::*;

const GIB: u64 = 1 << 30;
const NAMES: [&str; 4] = ["a", "b", "c", "d"];
const CASES: u64 = 400;
const EVENTS: usize = 300;
/// Minutes of the quiet in which all jobs have to end.
const QUIET: usize = 400;
/// What is shown of a case that went wrong.
const LOG_LINES: usize = 60;

fn one_of<T: Clone>(rng: &mut Rng, all: &[T]) -> Option<T> {
    (!all.is_empty()).then(|| all[rng.index(all.len())].clone())
}

fn one_in(n: i64, rng: &mut Rng) -> bool {
    rng.range(1, n) == 1
}

/// What a supervisor does, as far as the scheduler can tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Absent,
    Loading,
    Waking,
    Serving,
    Parked,
    /// It waits for more room.
    Lacks,
}

/// A model and the number of its worker.
type Seat = (String, u32);

struct Case {
    rng: Rng,
    state: State,
    now: Millis,
    specs: Vec<ModelSpec>,
    stages: BTreeMap<Seat, Stage>,
    orders: VecDeque<(Seat, Order)>,
    waiting: BTreeMap<i64, String>,
    running: VecDeque<(String, i64)>,
    last_number: i64,
    log: Vec<String>,
}

impl Case {
    fn new(seed: u64) -> Self {
        let mut rng = Rng(seed);
        let gpus = rng.pick(&[1, 2, 3]);
        let specs: Vec<ModelSpec> = NAMES.iter().map(|name| some_model(name, gpus, &mut rng)).collect();
        let there: BTreeMap<u32, u64> = (0..gpus).map(|gpu| (gpu, 80 * GIB)).collect();
        let host = rng.pick(&[0, 400 * GIB]);
        let inventory = Inventory { host, ..Inventory::of(&there, 0) };
        let state = State::new(&specs, Knobs::default(), &BTreeMap::new(), 1).on(inventory);
        let log = vec![format!("{gpus} GPUs, {specs:?}")];
        let (stages, orders) = (BTreeMap::new(), VecDeque::new());
        let (waiting, running) = (BTreeMap::new(), VecDeque::new());
        Self { rng, state, now: 1_000, specs, stages, orders, waiting, running, last_number: 0, log }
    }

    fn tell(&mut self, event: Event) {
        self.log.push(format!("{} {event:?}", self.now));
        let mut effects = self.state.on_event(event, self.now);
        effects.extend(self.state.step(self.now));
        self.note(effects);
    }

    fn note(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Claim { model, run, .. } => {
                    for job in run.jobs {
                        self.waiting.remove(&job.number).expect("it waits");
                        self.running.push_back((model.to_string(), job.number));
                    }
                }
                Effect::Order { model, replica, order, set, .. } => {
                    self.log.push(format!("   {order:?} {model} {replica} on {set}"));
                    self.orders.push_back(((model, replica), order));
                }
                Effect::EndQueued { numbers, .. } | Effect::CancelQueued(numbers) => {
                    numbers.iter().for_each(|number| drop(self.waiting.remove(number).expect("it waits")));
                }
                Effect::Announce(decision) => self.log.push(format!("   {}", decision.reason)),
                _ => {}
            }
        }
    }

    fn report(&mut self, (model, replica): &Seat, stage: Stage, report: Report) {
        self.stages.insert((model.clone(), *replica), stage);
        self.tell(Event::Report { model: model.clone(), replica: *replica, report });
    }

    fn those(&self, stages: &[Stage]) -> Vec<Seat> {
        self.stages.iter().filter(|(_, stage)| stages.contains(stage)).map(|(seat, _)| seat.clone()).collect()
    }

    /// The oldest order is taken by its supervisor, and done if it is one that takes no time; whether there was one.
    fn obey(&mut self) -> bool {
        let Some((seat, order)) = self.orders.pop_front() else { return false };
        let stage = self.stages.get(&seat).copied().unwrap_or(Stage::Absent);
        match (order, stage) {
            (Order::Load | Order::Wake, Stage::Serving | Stage::Loading) => {}
            (Order::Load | Order::Wake, Stage::Parked) => drop(self.stages.insert(seat, Stage::Waking)),
            (Order::Load | Order::Wake, _) => drop(self.stages.insert(seat, Stage::Loading)),
            (Order::Park | Order::ParkBare, Stage::Serving) => {
                self.report(&seat, Stage::Parked, Report::Keeps { device_bytes: 2 * GIB });
                self.report(&seat, Stage::Parked, Report::Parked { park_ms: 5 });
            }
            (Order::Stop | Order::Park | Order::ParkBare, Stage::Lacks) => {
                self.report(&seat, Stage::Lacks, Report::Stopped { stop_ms: 0 });
            }
            (Order::Stop | Order::Park | Order::ParkBare, _) => {
                self.report(&seat, Stage::Absent, Report::Stopped { stop_ms: 5 });
            }
            _ => {}
        }
        true
    }

    fn ready(&mut self, seat: &Seat) {
        self.report(seat, Stage::Serving, Report::Ready { base_url: "http://x".into(), load_ms: 1_000 });
    }

    /// The oldest running job is answered; whether there was one.
    fn answer(&mut self) -> bool {
        let Some((model, number)) = self.running.pop_front() else { return false };
        self.tell(Event::Ended { model: model.into(), number, answered: true, suspect: false, back: None });
        true
    }

    fn ask(&mut self) {
        let (model, face) =
            (self.rng.pick(&NAMES).to_owned(), if one_in(2, &mut self.rng) { Face::Sync } else { Face::Async });
        if face == Face::Sync && self.state.refusal(&model).is_some() {
            return;
        }
        self.last_number += 1;
        self.waiting.insert(self.last_number, model.clone());
        self.state.count_arrival(&model, self.now);
        self.tell(Event::Queued(vec![QueuedJob { face, ..job(self.last_number, &model) }]));
    }

    fn operate(&mut self) {
        let model = self.rng.pick(&NAMES).to_owned();
        let control = match self.rng.index(6) {
            0 => Control::Pin(model),
            1 | 2 => Control::Unpin(model),
            3 => Control::Unload(model),
            4 => Control::Load(model),
            _ if one_in(2, &mut self.rng) => Control::Pause(Some(model)),
            _ => Control::Resume(None),
        };
        self.tell(Event::Control(control));
    }

    fn edit(&mut self) {
        let mut spec = one_of(&mut self.rng, &self.specs).unwrap();
        let restart = one_in(2, &mut self.rng);
        if restart {
            spec.args = vec![format!("--{}", self.now)];
        } else {
            spec.limit = self.rng.pick(&[1, 2, 3]);
        }
        let name = spec.name.clone();
        self.tell(Event::Edited(vec![Edit { name: name.clone(), spec: Some(spec), keys: vec!["args"], restart }]));
        // Its supervisors are told that the entry is another one.
        for seat in self.those(&[Stage::Lacks]).iter().filter(|(model, _)| *model == name) {
            self.report(seat, Stage::Absent, Report::Available);
        }
    }

    fn something(&mut self) {
        self.now += self.rng.range(1, 20_000);
        let loading = self.those(&[Stage::Loading, Stage::Waking]);
        match self.rng.index(16) {
            0..3 => self.ask(),
            3..7 => drop(self.obey()),
            7 | 8 => {
                if let Some(seat) = one_of(&mut self.rng, &loading) {
                    self.ready(&seat);
                }
            }
            9 | 10 => {
                if let Some(seat) = one_of(&mut self.rng, &loading) {
                    let error = JobError::new(ErrorCode::ModelLoadFailed, "it does not fit", true);
                    let free = self.rng.index(80) as u64 * GIB;
                    self.report(&seat, Stage::Lacks, Report::DoesNotFit { error, free });
                }
            }
            11 | 12 => drop(self.answer()),
            13 => {
                let lacking = self.those(&[Stage::Lacks]);
                if let Some(seat) = one_of(&mut self.rng, &lacking).filter(|_| one_in(3, &mut self.rng)) {
                    self.report(&seat, Stage::Absent, Report::Available);
                }
            }
            14 => self.operate(),
            _ => match self.rng.index(3) {
                0 => {
                    let waiting: Vec<(i64, String)> = self.waiting.clone().into_iter().collect();
                    if let Some((number, model)) = one_of(&mut self.rng, &waiting) {
                        self.waiting.remove(&number);
                        self.tell(Event::Gone { model, priority: 5, number });
                    }
                }
                1 => {
                    let parked = self.those(&[Stage::Parked]);
                    if let Some(seat) = one_of(&mut self.rng, &parked) {
                        self.report(&seat, Stage::Absent, Report::Died { reason: "killed".into() });
                    }
                }
                _ => self.edit(),
            },
        }
    }

    /// Nobody lacks room, and nobody is held back by hand; whether all jobs have ended.
    fn ends_in_the_quiet(&mut self) -> bool {
        self.tell(Event::Control(Control::Resume(None)));
        NAMES.iter().for_each(|name| self.tell(Event::Control(Control::Unpin((*name).to_owned()))));
        for _ in 0..QUIET {
            self.now += 60_000;
            while self.obey() {}
            for seat in self.those(&[Stage::Loading, Stage::Waking]) {
                self.ready(&seat);
            }
            while self.answer() {}
            for seat in self.those(&[Stage::Lacks]) {
                let index = self.state.index_of(&seat.0).unwrap();
                // While it is not blocked, the scheduler has something else in mind.
                if self.state.models[index].trouble.is_some() {
                    self.report(&seat, Stage::Absent, Report::Available);
                }
            }
            let effects = self.state.step(self.now);
            self.note(effects);
            if self.waiting.is_empty() && self.running.is_empty() && self.orders.is_empty() {
                return self.state.queued() == 0;
            }
        }
        false
    }
}

fn some_model(name: &str, gpus: u32, rng: &mut Rng) -> ModelSpec {
    let gib = rng.pick(&[10, 20, 30, 50, 70]);
    ModelSpec {
        gpus: if gpus > 1 && one_in(4, rng) { 2 } else { 1 },
        memory: (!one_in(6, rng)).then_some(gib * GIB),
        park: rng.pick(&[Park::Ram, Park::Off]),
        max_replicas: rng.pick(&[1, 1, 2]),
        pin: one_in(6, rng),
        preload: one_in(3, rng),
        ..spec(name, 1)
    }
}

#[test]
fn whoever_lacks_room_for_a_while_all_jobs_end_when_nobody_does() {
    for seed in 1..=CASES {
        let mut case = Case::new(seed);
        (0..EVENTS).for_each(|_| case.something());
        let ends = case.ends_in_the_quiet();
        let from = case.log.len().saturating_sub(LOG_LINES);
        assert!(ends, "seed {seed}: {:?} wait for ever:\n{}", case.waiting, case.log[from..].join("\n"));
    }
}
