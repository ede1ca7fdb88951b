//! Passes of several jobs, through the state machine.

use super::tests::{job, spec};
use super::*;
use crate::domain::ModelKind;

/// One model, whose worker is there.
struct World {
    state: State,
    now: Millis,
    next: i64,
    runs: VecDeque<(Place, Run)>,
    told: Vec<String>,
    /// What is kept of it, and how many times that was written.
    kept: Option<Learned>,
    writes: usize,
}

impl World {
    fn new(first_batch: u32, max_batch: u32) -> Self {
        let spec = ModelSpec { kind: ModelKind::Image, max_batch, first_batch, ..spec("a", max_batch) };
        Self::of(State::new(&[spec], Knobs::default(), &BTreeMap::new(), 1))
    }

    /// On a GPU with so much memory, with what an earlier run has kept.
    fn on_gpu(gib: u64, kept: Option<Learned>, entry: impl FnOnce(&mut ModelSpec)) -> Self {
        let mut spec = ModelSpec { kind: ModelKind::Image, max_batch: 8, first_batch: 1, gpus: 1, ..spec("a", 8) };
        entry(&mut spec);
        let known = kept.into_iter().map(|kept| ("a".to_owned(), kept)).collect();
        let inventory = Inventory::of(&BTreeMap::from([(0, gib << 30)]), 0);
        Self::of(State::new(&[spec], Knobs::default(), &known, 1).on(inventory))
    }

    fn of(state: State) -> Self {
        let (runs, told) = (VecDeque::new(), Vec::new());
        let mut world = Self { state, now: 1_000, next: 1, runs, told, kept: None, writes: 0 };
        world.wait(64, 5);
        let report = Report::Ready { base_url: "http://a".to_owned(), load_ms: 10 };
        world.event(Event::Report { model: "a".to_owned(), replica: 0, report });
        world
    }

    fn event(&mut self, event: Event) {
        let mut effects = self.state.on_event(event, self.now);
        effects.extend(self.state.step(self.now));
        for effect in effects {
            match effect {
                Effect::Claim { place, run, .. } => self.runs.push_back((place, run)),
                Effect::Announce(decision) if decision.action == "batch" => self.told.push(decision.reason.clone()),
                Effect::Learn { learned, .. } => (self.kept, self.writes) = (Some(learned), self.writes + 1),
                _ => {}
            }
        }
    }

    /// So many more jobs come.
    fn wait(&mut self, count: i64, priority: u8) {
        let jobs = (self.next..self.next + count).map(|n| QueuedJob { priority, ..job(n, "a") }).collect();
        self.next += count;
        self.event(Event::Queued(jobs));
    }

    fn end(&mut self, number: i64, answered: bool, back: Option<Back>) {
        self.event(Event::Ended { model: Arc::from("a"), number, answered, suspect: false, back });
    }

    /// The next run ends well after so long; as many jobs come as were in it. Returns its size.
    fn pass(&mut self, ms: impl Fn(i64) -> Millis) -> i64 {
        let (_, run) = self.runs.pop_front().expect("a run");
        let jobs = i64::try_from(run.jobs.len()).unwrap();
        self.now += ms(jobs);
        self.wait(jobs, 5);
        run.jobs.iter().for_each(|job| self.end(job.number, true, None));
        jobs
    }

    /// The next run ends in out of memory, as `dispatch` tells it. Returns its size.
    fn runs_out_of_memory(&mut self) -> u32 {
        let (_, run) = self.runs.pop_front().expect("a run");
        let jobs = u32::try_from(run.jobs.len()).unwrap();
        for job in &run.jobs {
            self.event(Event::OutOfMemory { model: Arc::from("a"), number: job.number, jobs });
            self.end(job.number, false, Some(Back::default()));
        }
        jobs
    }
}

#[test]
fn passes_of_eight_come_down_to_one_where_they_gain_nothing_and_stay_where_they_do() {
    let mut world = World::new(8, 8);
    (0..80).for_each(|_| assert!(world.pass(|jobs| 10 + 780 * jobs) > 0));
    assert_eq!(world.pass(|_| 790), 1);
    assert_eq!(world.told.len(), 3, "{:?}", world.told);
    assert_eq!(world.told[0], "a: 4 jobs a pass from now on, 1.3 a second; with 8 it was 1.3");
    assert_eq!(world.state.models[0].at_once(), 1, "what is foretold counts with it");

    let mut world = World::new(8, 8);
    let sizes: Vec<i64> = (0..40).map(|_| world.pass(|jobs| 1_000 + 10 * jobs)).collect();
    assert!(sizes.iter().filter(|size| **size == 8).count() >= 37 && world.told.is_empty(), "{sizes:?}");
}

#[test]
fn passes_grow_from_one_but_not_for_callers() {
    let mut world = World::new(1, 8);
    (0..20).for_each(|_| assert!(world.pass(|_| 500) > 0));
    assert_eq!(world.pass(|_| 500), 8);

    let mut world = World::new(1, 8);
    world.wait(100, 7);
    // Their turn is seven in eight.
    let callers = |world: &World| world.runs[0].1.jobs[0].priority == 7;
    for _ in 0..70 {
        let (by_callers, size) = (callers(&world), world.runs[0].1.jobs.len());
        assert!(size == 1 || !by_callers || world.state.models[0].at_once() > 1, "nothing is tried with callers");
        world.pass(|_| 500);
    }
}

#[test]
fn a_run_of_which_one_is_not_answered_is_no_sample() {
    let mut world = World::new(2, 2);
    for _ in 0..50 {
        let (_, run) = world.runs.pop_front().expect("a run");
        world.now += 1_000;
        world.wait(2, 5);
        world.end(run.jobs[0].number, true, None);
        world.end(run.jobs[1].number, false, None);
    }
    assert_eq!(world.state.models[0].batching.shapes(), []);
}

#[test]
fn out_of_memory_halves_the_next_run_before_any_job_of_it_is_back() {
    let mut world = World::new(8, 8);
    assert_eq!((0..3).map(|_| world.runs_out_of_memory()).collect::<Vec<_>>(), [8, 4, 2]);
    assert_eq!(world.pass(|_| 10), 1);
    assert_eq!(world.told.len(), 3, "each once: {:?}", world.told);
    assert_eq!(world.told[0], "a: 4 jobs a pass from now on, 8 at once ran out of memory");
    (0..300).for_each(|_| assert_eq!(world.pass(|_| 10), 1, "for the life of the server"));
}

#[test]
fn a_shape_gets_its_name_from_a_job_that_runs() {
    let mut world = World::new(8, 8);
    let number = world.runs[0].1.jobs[0].number;
    world.event(Event::Shape { model: Arc::from("a"), number, words: "size 64x64".to_owned() });
    world.event(Event::Shape { model: Arc::from("a"), number: 999, words: "nobody".to_owned() });
    let shapes = world.state.models[0].batching.shapes();
    assert_eq!(shapes.iter().map(|shape| &*shape.shape).collect::<Vec<_>>(), ["size 64x64"]);
}

#[test]
fn what_passes_take_outlives_a_restart_and_is_written_when_it_changes() {
    let mut world = World::on_gpu(80, None, |_| {});
    (0..200).for_each(|_| assert!(world.pass(|_| 500) > 0));
    assert_eq!(world.pass(|_| 500), 8);
    assert!(world.writes < 20, "{} times in 200 passes", world.writes);
    let kept = world.kept.clone();
    let first = |mut world: World| world.pass(|_| 500);
    assert_eq!(first(World::on_gpu(80, kept.clone(), |_| {})), 8, "at once");
    assert_eq!(first(World::on_gpu(24, kept.clone(), |_| {})), 1, "another GPU");
    assert_eq!(first(World::on_gpu(80, kept.clone(), |spec| spec.args.push("--fp8".into()))), 1, "another entry");
    assert_eq!(first(World::on_gpu(80, kept.clone(), |spec| spec.aliases.push("b".into()))), 8);

    // Nobody knows the GPU when the server starts: what was kept is kept until then.
    let kept = BTreeMap::from([("a".to_owned(), kept.unwrap())]);
    let spec = ModelSpec { max_batch: 8, first_batch: 1, gpus: 1, kind: ModelKind::Image, ..spec("a", 8) };
    let mut state = State::new(&[spec], Knobs::default(), &kept, 1).on(Inventory::of(&BTreeMap::new(), 0));
    assert_eq!(state.models[0].at_once(), 1);
    let Effect::Learn { learned, .. } = state.learn(0) else { panic!("it keeps what it knows") };
    assert_eq!(learned.batches, kept["a"].batches);
    state.on_event(Event::Devices(BTreeMap::from([(0, 80 << 30)])), 1);
    assert_eq!(state.models[0].at_once(), 8);
}

#[test]
fn what_ran_out_of_memory_is_kept_at_once() {
    let mut world = World::on_gpu(80, None, |spec| spec.first_batch = 8);
    assert_eq!(world.runs_out_of_memory(), 8);
    let mut world = World::on_gpu(80, world.kept, |spec| spec.first_batch = 8);
    assert_eq!(world.pass(|_| 500), 4);
}

#[test]
fn a_job_that_runs_out_of_memory_alone_leaves_its_shape_as_it_was() {
    let mut world = World::new(8, 8);
    let hungry = world.runs[0].1.jobs[0].number;
    // It comes back as the first in the order.
    assert_eq!((0..3).map(|_| world.runs_out_of_memory()).collect::<Vec<_>>(), [8, 4, 2]);
    let (_, run) = world.runs.pop_front().expect("a run");
    assert_eq!(run.jobs.iter().map(|job| job.number).collect::<Vec<_>>(), [hungry]);
    world.event(Event::OutOfMemory { model: Arc::from("a"), number: hungry, jobs: 1 });
    world.end(hungry, false, None);
    assert_eq!(world.pass(|_| 10), 1, "no other pass has shown that the shape fits at all");
    assert_eq!(world.pass(|_| 10), 8);
    assert_eq!(world.told.len(), 4, "{:?}", world.told);
    assert_eq!(world.told[3], "a: 8 jobs a pass from now on, before 1: a job ran out of memory alone");
}

#[test]
fn who_ran_out_of_memory_in_a_pass_is_kept_at_once() {
    let mut world = World::on_gpu(80, None, |spec| spec.first_batch = 8);
    let numbers: Vec<i64> = world.runs[0].1.jobs.iter().map(|job| job.number).collect();
    assert_eq!(world.runs_out_of_memory(), 8);
    let kept = |world: &World| world.kept.clone().expect("kept").batches.shapes[0].halvings.clone();
    assert_eq!(kept(&world).iter().map(|halving| halving.jobs.clone()).collect::<Vec<_>>(), [numbers]);
    assert!(!kept(&world)[0].own_fault);
    let number = world.runs[0].1.jobs[0].number;
    world.event(Event::OutOfMemory { model: Arc::from("a"), number, jobs: 1 });
    assert!(kept(&world)[0].own_fault);
}

#[test]
fn those_that_ran_when_a_worker_died_say_nothing_about_a_shape() {
    let mut world = World::new(8, 8);
    let (_, run) = world.runs.pop_front().expect("a run");
    for job in &run.jobs {
        world.end(job.number, false, Some(Back { not_before: None, crash: Some(1) }));
    }
    // The first half of them, with nothing beside it.
    while !world.runs.front().expect("a run").1.alone {
        world.pass(|_| 10);
    }
    assert!(world.runs_out_of_memory() > 1);
    assert_eq!(world.state.models[0].batching.usual(), 8);
    assert_eq!(world.told, Vec::<String>::new());
}
