//! What a worker's answer frees before it is stored, and what waits until it is.

use super::tests::{job, spec};
use super::*;
use crate::domain::ModelKind;

/// One or two models that cannot stand side by side; supervisors that obey when told to.
struct World {
    state: State,
    now: Millis,
    /// Numbers of jobs by run, in the order of claims.
    runs: Vec<Vec<i64>>,
    orders: Vec<(String, Order)>,
}

impl World {
    /// `a` serves; `limit` and `max_batch` are those of both.
    fn new(limit: u32, max_batch: u32) -> Self {
        let of = |name| ModelSpec { kind: ModelKind::Image, max_batch, first_batch: max_batch, ..spec(name, limit) };
        let state = State::new(&[of("a"), of("b")], Knobs::default(), &BTreeMap::new(), 1);
        let mut world = Self { state, now: 1_000, runs: Vec::new(), orders: Vec::new() };
        world.event(Event::Control(Control::Load("a".to_owned())));
        world.report("a", Report::Ready { base_url: "http://a".to_owned(), load_ms: 10 });
        world.orders.clear();
        world
    }

    fn event(&mut self, event: Event) {
        let mut effects = self.state.on_event(event, self.now);
        effects.extend(self.state.step(self.now));
        for effect in effects {
            match effect {
                Effect::Claim { run, .. } => self.runs.push(run.jobs.iter().map(|job| job.number).collect()),
                Effect::Order { model, order, .. } => self.orders.push((model, order)),
                _ => {}
            }
        }
    }

    fn report(&mut self, model: &str, report: Report) {
        self.event(Event::Report { model: model.to_owned(), replica: 0, report });
    }

    fn wait(&mut self, model: &str, numbers: std::ops::RangeInclusive<i64>) {
        self.event(Event::Queued(numbers.map(|number| job(number, model)).collect()));
    }

    /// The worker answers.
    fn answer(&mut self, number: i64) {
        self.event(Event::Answered { model: Arc::from("a"), number });
    }

    /// What it answered is committed.
    fn store(&mut self, number: i64) {
        self.event(Event::Ended { model: Arc::from("a"), number, answered: true, suspect: false, back: None });
    }

    /// The attempt ends without an answer.
    fn lose(&mut self, number: i64) {
        let back = Some(Back { crash: Some(1), ..Back::default() });
        self.event(Event::Ended { model: Arc::from("a"), number, answered: false, suspect: true, back });
    }

    fn a(&self) -> &Model {
        &self.state.models[0]
    }
}

#[test]
fn a_slot_is_free_when_the_worker_has_answered() {
    let mut world = World::new(2, 1);
    world.wait("a", 1..=4);
    assert_eq!(world.runs, [[1], [2]]);
    world.answer(1);
    assert_eq!(world.runs, [[1], [2], [3]], "before the answer is stored");
    assert_eq!((world.a().queue.running_on(0), world.a().under_way()), (2, 3), "for the store, the first one runs");
    world.store(1);
    assert_eq!((world.runs.len(), world.a().under_way()), (3, 2), "a slot is free once");
    world.store(1);
    assert_eq!(world.a().under_way(), 2, "and a job ends once");
}

#[test]
fn a_caller_gets_the_slot_of_an_answer_at_once() {
    let mut world = World::new(1, 1);
    let reserve = |world: &mut World, number| world.state.reserve(&job(number, "a"), world.now).is_some();
    assert!(reserve(&mut world, 1) && !reserve(&mut world, 2));
    world.answer(1);
    assert!(reserve(&mut world, 3) && !reserve(&mut world, 4));
    world.answer(3);
    assert!(!reserve(&mut world, 5), "two answers of a worker of one slot are being stored");
    world.store(1);
    assert!(reserve(&mut world, 6));
}

#[test]
fn the_next_run_is_claimed_when_all_jobs_of_the_last_one_are_answered_and_its_time_ends_there() {
    let mut world = World::new(4, 4);
    world.wait("a", 1..=16);
    for run in 0..4 {
        let numbers = world.runs[run].clone();
        assert_eq!(numbers.len(), 4);
        world.now += 800;
        // The disk takes nearly as long as the next run.
        if run > 0 {
            world.runs[run - 1].clone().iter().for_each(|number| world.store(*number));
        }
        numbers[..3].iter().for_each(|number| world.answer(*number));
        assert_eq!(world.runs.len(), run + 1, "one of it is still in the works");
        world.answer(numbers[3]);
        assert_eq!(world.runs.len(), (run + 2).min(4));
    }
    assert_eq!(world.a().batching.shapes()[0].per_s, [(4, 5.0)], "800 ms a pass, whatever the disk takes");
    assert_eq!(world.a().service_ms(), 800.0);
}

#[test]
fn a_slow_disk_slows_the_intake() {
    let mut world = World::new(2, 2);
    world.wait("a", 1..=8);
    for number in [1, 2, 3, 4] {
        world.answer(number);
    }
    assert_eq!(world.runs, [[1, 2], [3, 4]], "four answers of a worker of two slots are being stored");
    world.event(Event::Queued(vec![job(9, "a")]));
    world.store(1);
    assert_eq!(world.runs.len(), 2);
    world.store(3);
    assert_eq!(world.runs, [[1, 2], [3, 4], [5, 6]], "whichever of them is stored");
    assert_eq!(world.a().under_way(), 4);
}

#[test]
fn a_drain_does_not_wait_for_the_store() {
    let mut world = World::new(1, 1);
    world.wait("a", 1..=1);
    world.wait("b", 2..=2);
    assert_eq!(world.orders, []);
    world.answer(1);
    assert_eq!(world.orders, [("a".to_owned(), Order::Proven), ("a".to_owned(), Order::Stop)]);
    world.report("a", Report::Stopped { stop_ms: 10 });
    assert_eq!(world.orders[2..], [("b".to_owned(), Order::Load)]);
    world.report("b", Report::Ready { base_url: "http://b".to_owned(), load_ms: 10 });
    assert_eq!(world.runs, [[1], [2]]);
    assert_eq!(world.a().under_way(), 1, "its answer is still on its way");
    world.store(1);
    assert_eq!(world.a().under_way(), 0);
}

#[test]
fn its_supervisor_is_told_once_that_a_worker_answers() {
    let mut world = World::new(4, 4);
    world.wait("a", 1..=4);
    world.answer(1);
    world.answer(2);
    assert_eq!(world.orders, [("a".to_owned(), Order::Proven)]);
}

#[test]
fn the_death_of_a_worker_leaves_what_it_has_answered_alone() {
    let mut world = World::new(4, 4);
    world.wait("a", 1..=4);
    assert_eq!(world.runs, [[1, 2, 3, 4]]);
    world.answer(1);
    world.report("a", Report::Died { reason: "killed".to_owned() });
    [2, 3, 4].into_iter().for_each(|number| world.lose(number));
    assert_eq!((world.a().queue.len(), world.a().under_way()), (3, 1));
    world.orders.clear();
    world.store(1);
    assert_eq!((world.a().queue.len(), world.a().under_way()), (3, 0), "it does not come back");
    assert_eq!(world.orders, [], "and nobody looks at its worker, which is another one");
}

#[test]
fn a_server_that_stops_waits_for_the_store() {
    let mut world = World::new(1, 1);
    world.wait("a", 1..=2);
    world.event(Event::Stop);
    world.answer(1);
    assert!(!world.state.is_quiet(), "its answer is not stored");
    assert_eq!(world.runs, [[1]], "and nothing new starts");
    world.store(1);
    assert!(world.state.is_quiet());
}

#[test]
fn a_job_has_nothing_of_the_devices_once_it_is_answered() {
    let mut world = World::new(1, 1);
    world.wait("a", 1..=1);
    world.now += 500;
    world.answer(1);
    world.now += 2_000;
    assert_eq!(world.state.settle("a", 1, world.now), 500.0);
    world.store(1);
    let spent = world.state.take_spent(world.now);
    assert_eq!(spent.iter().map(|spent| spent.work_ms).sum::<f64>(), 500.0, "{spent:?}");
    assert_eq!(world.state.settle("a", 1, world.now), 0.0, "it is gone");
}

#[test]
fn a_cancel_or_a_purge_does_not_touch_an_answer_that_is_being_stored() {
    let mut world = World::new(1, 1);
    world.wait("a", 1..=2);
    world.answer(1);
    world.event(Event::Gone { model: "a".to_owned(), priority: 5, number: 1 });
    world.event(Event::Purge { model: None, before: 100 });
    assert_eq!((world.a().under_way(), world.runs.len()), (2, 2));
    world.store(1);
    assert_eq!((world.a().under_way(), world.runs.len()), (1, 2));
}

#[test]
fn a_job_that_is_cancelled_on_its_way_back_to_the_queue_does_not_wait() {
    let mut world = World::new(1, 1);
    world.wait("a", 1..=2);
    // The store has it as waiting already, and it is cancelled there before the loop hears that its attempt is over.
    world.event(Event::Gone { model: "a".to_owned(), priority: 5, number: 1 });
    assert_eq!(world.a().under_way(), 1, "its attempt is told to be over by its task");
    world.lose(1);
    assert_eq!((world.state.queued(), world.state.by_tenant.values().sum::<usize>()), (1, 1), "the second job");
}

#[test]
fn a_job_that_is_cancelled_after_the_store_refused_its_claim_does_not_wait() {
    let mut world = World::new(2, 1);
    world.wait("a", 1..=2);
    assert_eq!(world.runs, [[1], [2]]);
    world.event(Event::Control(Control::Pause(Some("a".to_owned()))));
    world.event(Event::Gone { model: "a".to_owned(), priority: 5, number: 1 });
    world.event(Event::Unclaimed { model: Arc::from("a"), numbers: vec![1, 2] });
    assert_eq!((world.state.queued(), world.a().under_way()), (1, 0), "the other one does");
}
