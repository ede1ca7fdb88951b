//! Failures that are put down to the wake of a worker, and what becomes of it.

use super::*;

/// Whether the failure of a job of `a` that runs is put down to the wake of its worker.
fn blames_wake(world: &mut World, number: i64) -> bool {
    let blamed = world.state.blame_wake("a", number, world.now);
    let is_blamed = blamed.is_some();
    world.note(blamed.unwrap_or_default());
    step(world);
    is_blamed
}

fn step(world: &mut World) {
    let effects = world.state.step(world.now);
    world.note(effects);
}

fn back(number: i64) -> Event {
    Event::Ended { model: Arc::from("a"), number, answered: false, suspect: false, back: Some(Back::default()) }
}

fn taken(world: &mut World) -> Vec<(String, Order)> {
    std::mem::take(&mut world.orders)
}

/// `a` was woken, runs these jobs, and is to leave for `b` when they have ended.
fn draining(jobs: &[i64]) -> World {
    let mut world = waking_with(2);
    world.queue(jobs.iter().filter(|number| **number != 3).map(|number| job(*number, "a")).collect());
    world.report("a", ready(20));
    world.queue(vec![job(9, "b")]);
    // It is late, and `a` has had its hold.
    world.now += 10_000_000;
    step(&mut world);
    assert_eq!(world.state.workers[0].phase, Phase::Draining { hung: false });
    assert_eq!(world.state.models[0].queue.running().keys().copied().collect::<Vec<_>>(), jobs);
    assert_eq!(world.orders, []);
    world
}

/// `a` has been stopped: `b` has its turn, then `a` is loaded from nothing.
fn assert_is_cold_after_b(world: &mut World) {
    assert_eq!(taken(world), [("a".to_owned(), Order::Stop)], "not parked again");
    world.report("a", Report::Stopped { stop_ms: 1 });
    assert_eq!(taken(world), [("b".to_owned(), Order::Wake)]);
    world.report("b", ready(20));
    world.event(Event::Ended { model: Arc::from("b"), number: 9, answered: true, suspect: false, back: None });
    assert_eq!(taken(world), [("b".to_owned(), Order::Park)]);
    world.report("b", Report::Parked { park_ms: 10 });
    assert_eq!(taken(world), [("a".to_owned(), Order::Load)]);
}

#[test]
fn a_worker_that_fails_first_after_its_wake_is_loaded_from_nothing() {
    let mut world = waking();
    world.report("a", ready(20));
    assert!(blames_wake(&mut world, 3));
    world.event(back(3));
    assert_eq!(taken(&mut world), [("a".to_owned(), Order::Stop)], "not parked again");
    world.report("a", Report::Stopped { stop_ms: 1 });
    assert_eq!(taken(&mut world), [("a".to_owned(), Order::Load)]);
    world.report("a", ready(2_000));
    assert_eq!(world.running.len(), 2, "job 3 runs for the second time");
    assert!(!blames_wake(&mut world, 3), "that worker was not woken");
    assert_eq!(world.orders, []);
}

#[test]
fn a_worker_that_fails_first_after_its_rehearsal_is_loaded_from_nothing() {
    let mut world = World::new(&[("a", 1)]);
    world.queue(vec![job(3, "a")]);
    assert_eq!(taken(&mut world), [("a".to_owned(), Order::Load)]);
    let phase = PhaseTime { phase: PhaseTime::REHEARSAL.to_owned(), ms: 9_000 };
    world.report("a", Report::Loaded { phases: vec![phase] });
    world.report("a", ready(2_000));
    assert!(blames_wake(&mut world, 3));
    world.event(back(3));
    assert_eq!(taken(&mut world), [("a".to_owned(), Order::Stop)], "not parked");
}

#[test]
fn a_worker_that_has_answered_since_its_wake_is_as_good_as_any() {
    let mut world = waking();
    world.report("a", ready(20));
    world.event(Event::Ended { model: Arc::from("a"), number: 3, answered: true, suspect: false, back: None });
    world.queue(vec![job(4, "a")]);
    assert!(!blames_wake(&mut world, 4));
    assert_eq!(world.orders, []);
}

#[test]
fn an_answer_proves_the_wake_for_those_that_were_claimed_before_it() {
    let mut world = waking_with(2);
    world.queue(vec![job(4, "a")]);
    world.report("a", ready(20));
    assert_eq!(world.running.len(), 2);
    world.event(Event::Answered { model: Arc::from("a"), number: 3 });
    assert!(!blames_wake(&mut world, 4));
    assert_eq!(world.orders, []);
    let mut world = draining(&[3, 4]);
    world.event(Event::Answered { model: Arc::from("a"), number: 3 });
    assert!(!blames_wake(&mut world, 4));
    world.event(back(4));
    assert_eq!(world.orders, [("a".to_owned(), Order::Park)], "it is well, and leaves as it was to");
}

#[test]
fn a_worker_that_fails_first_while_it_drains_is_stopped_and_loaded_from_nothing() {
    let mut world = draining(&[3]);
    assert!(blames_wake(&mut world, 3));
    world.event(back(3));
    assert_is_cold_after_b(&mut world);
    world.report("a", ready(2_000));
    assert!(!blames_wake(&mut world, 3), "from now on it is charged");
}

#[test]
fn all_that_fail_before_the_first_answer_go_back_uncharged() {
    let mut world = draining(&[3, 4]);
    assert!(blames_wake(&mut world, 3));
    assert!(blames_wake(&mut world, 4));
    world.event(back(3));
    assert_eq!(world.orders, [], "the other one runs");
    world.event(back(4));
    assert_is_cold_after_b(&mut world);
}

#[test]
fn a_worker_that_hangs_while_it_drains_is_stopped_and_not_asked_to_park() {
    let mut world = draining(&[3]);
    let since = world.now;
    world.now += 60_000;
    assert_eq!(world.silent(3, since), 1);
    world.event(back(3));
    assert_is_cold_after_b(&mut world);
}

#[test]
fn a_death_after_a_wake_is_the_wakes_and_not_held_against_the_next_worker() {
    let mut world = waking_with(2);
    world.queue(vec![job(4, "a")]);
    world.report("a", ready(20));
    world.report("a", Report::Died { reason: "killed".into() });
    assert!(blames_wake(&mut world, 3));
    world.event(back(3));
    assert_eq!(taken(&mut world), [("a".to_owned(), Order::Load)]);
    world.report("a", ready(2_000));
    world.event(Event::Answered { model: Arc::from("a"), number: 3 });
    // It asks late, and is of the one that died, though the next one has its number.
    assert!(blames_wake(&mut world, 4));
    assert_eq!(world.orders, []);
    assert!(world.state.serves(0));
}
