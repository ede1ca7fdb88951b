//! Workers that are parked without a copy, and loads while nobody waits.

use super::*;
use crate::domain::worker::PhaseTime;

/// What a worker of ours says of which no copy could be made, and that it reads its weights again.
fn no_room() -> HostCopy {
    HostCopy { can_reread: Some(true), ..refusal("its weights take 30.0 GiB, more than the 12.0 GiB left") }
}

fn phases(told: &[(&str, i64)]) -> Report {
    let phases = told.iter().map(|(phase, ms)| PhaseTime { phase: (*phase).to_owned(), ms: *ms });
    Report::Loaded { phases: phases.collect() }
}

fn ours() -> Report {
    phases(&[("spawn", 500), ("import", 15_000), ("read", 3_000), ("device", 1_000), ("warm_up", 500)])
}

/// As `swap`, when nobody waits for the next job of whoever is there.
fn later(case: &mut Case, from: &str, to: &str) -> (Order, (Order, Option<u64>)) {
    case.now += 1_000_000;
    case.swap(from, to, None)
}

/// `a` of ours, with room for no copy, is where `b` is to be: what it is told.
fn leaves(case: &mut Case, loaded: Report) -> Order {
    case.report("a", loaded);
    case.visit("a", Some(Report::Host(no_room())));
    case.swap("a", "b", None).0
}

#[test]
fn a_worker_without_room_for_its_copy_keeps_its_process_if_reading_again_is_cheaper() {
    let mut case = Case::new(&[parks("a"), parks("b")], 1, 12);
    assert_eq!(leaves(&mut case, ours()), Order::ParkBare);
    assert_eq!(
        case.said("a"),
        "park a without a copy: its worker says that it cannot be: its weights take 30.0 GiB, more than the 12.0 GiB left; \
         its wake reads the weights again, about 4.5 s against 20 s cold"
    );
    let view = case.state.view(case.now);
    assert_eq!((view.models[0].bare, view.models[0].load_ms, view.models[0].cold_ms), (true, 4_500.0, 20_000.0));
    let outlook = case.state.parking(0).unwrap();
    assert_eq!((outlook.can, outlook.bare), (Some(false), true), "{outlook:?}");
    // It comes back, and may make its copy if there is room by then.
    case.answered("b", 2);
    case.wants("a");
    case.report("b", Report::Parked { park_ms: 1 });
    assert_eq!(case.orders, [order("a", Order::Wake, Some(12))]);
    case.report("a", Report::Ready { base_url: String::new(), load_ms: 6_000 });
    let model = &case.state.models[0];
    assert_eq!(model.load_ms(Source::Bare), 6_000.0);
    assert_eq!((model.load_ms(Source::Disk), model.learned.wake_ms), (20_000.0, None), "it is learned apart");
}

#[test]
fn a_process_that_saves_too_little_is_stopped() {
    let mut case = Case::new(&[parks("a"), parks("b")], 1, 12);
    assert_eq!(leaves(&mut case, phases(&[("import", 500), ("read", 19_400)])), Order::Stop);
    let mut case = Case::new(&[parks("a"), parks("b")], 1, 0);
    assert_eq!(leaves(&mut case, ours()), Order::Stop, "nothing is parked at all");
    let mut case = Case::new(&[parks("a"), parks("b")], 1, 12);
    case.report("a", ours());
    case.visit("a", Some(Report::Host(HostCopy { can_reread: None, ..no_room() })));
    assert_eq!(case.swap("a", "b", None).0, Order::Stop, "it does not say that it can read them again");
    let mut case = Case::new(&[parks("a"), parks("b")], 1, 12);
    case.report("a", ours());
    case.visit("a", None);
    assert_eq!(case.swap("a", "b", None).0, Order::Stop, "nor does this one, which would");
}

#[test]
fn of_a_worker_that_tells_nothing_it_is_tried_once_how_long_reading_again_takes() {
    let mut case = Case::new(&[parks("a"), parks("b")], 1, 20);
    case.visit("a", None);
    assert_eq!(later(&mut case, "a", "b").0, Order::ParkBare);
    assert_eq!(
        case.said("a"),
        "park a without a copy: 30 GiB of host memory were wanted, 20 GiB are left; its wake reads the weights again; nobody \
         knows yet how long that takes, cold it is 20 s"
    );
    assert_eq!(later(&mut case, "b", "a"), (Order::ParkBare, (Order::Wake, Some(20))));
    // As long as a load: not again.
    assert_eq!(later(&mut case, "a", "b"), (Order::Stop, (Order::Wake, Some(20))));
}

#[test]
fn a_worker_that_keeps_the_memory_of_an_earlier_copy_gains_nothing_by_it() {
    let mut case = Case::new(&[parks("a"), parks("b")], 1, 60);
    case.visit("a", None);
    later(&mut case, "a", "b");
    later(&mut case, "b", "a");
    case.state.set_knobs(Knobs::default(), 20 * GIB, case.now);
    assert_eq!(later(&mut case, "a", "b").0, Order::Stop);
}

#[test]
fn one_that_had_to_be_stopped_instead_is_not_asked_again() {
    let mut case = Case::new(&[parks("a"), parks("b")], 1, 20);
    case.visit("a", None);
    case.wants("b");
    assert_eq!(case.orders, [order("a", Order::ParkBare, None)]);
    case.report("a", Report::Stopped { stop_ms: 1 });
    case.ready("b");
    case.answered("b", 2);
    later(&mut case, "b", "a");
    assert_eq!(later(&mut case, "a", "b").0, Order::Stop);
}

#[test]
fn what_lies_without_a_copy_takes_no_host_memory_and_goes_when_its_gpu_is_too_small() {
    let mut case = Case::new(&[parks("a"), parks("b"), parks("c")], 1, 12);
    leaves(&mut case, ours());
    assert_eq!(case.state.workers.iter().filter(|worker| worker.is_bare).count(), 1);
    case.wants("c");
    case.report("b", Report::Parked { park_ms: 1 });
    assert_eq!(case.orders, [order("c", Order::Load, Some(12))]);
    let error = JobError::new(ErrorCode::ModelLoadFailed, "too little memory", true);
    case.report("c", Report::DoesNotFit { error, free: 0 });
    let mut dropped: Vec<_> = case.orders.iter().map(|(name, order, _)| (name.as_str(), *order)).collect();
    dropped.sort_by_key(|(name, _)| *name);
    assert_eq!(dropped, [("a", Order::Stop), ("b", Order::Stop)]);
    assert_eq!(
        case.said("a"),
        "drop a, which is parked without a copy: c ran out of memory on gpu0, of which its process keeps some"
    );
}

#[test]
fn no_process_stays_when_nothing_is_to_be_parked_any_more() {
    let mut case = Case::new(&[parks("a"), parks("b")], 1, 12);
    leaves(&mut case, ours());
    case.state.set_knobs(Knobs::default(), 0, case.now);
    case.tell(Event::Edited(Vec::new()));
    assert_eq!(case.orders, [order("a", Order::Stop, None)]);
}

#[test]
fn a_wake_without_a_copy_that_fails_is_learned_as_a_load() {
    let mut case = Case::new(&[parks("a"), parks("b")], 1, 12);
    leaves(&mut case, ours());
    case.wants("a");
    case.report("b", Report::Parked { park_ms: 1 });
    assert_eq!(case.orders, [order("a", Order::Wake, Some(12))]);
    case.report("a", Report::Loading { phase: None, percent: None });
    assert_eq!(case.state.models[0].load_ms(Source::Bare), 20_000.0);
    assert_eq!(case.state.models[0].learned.wake_ms, None);
}

/// Whether orders to load were at leisure, or to be expedited.
fn leisure(effects: &[Effect]) -> Vec<bool> {
    let of = |effect: &Effect| match effect {
        Effect::Order { order: Order::Load | Order::Expedite, at_leisure, .. } => Some(*at_leisure),
        _ => None,
    };
    effects.iter().filter_map(of).collect()
}

#[test]
fn a_load_is_at_leisure_while_nobody_waits_and_not_any_more_when_somebody_comes() {
    let preloads = |name| ModelSpec { preload: true, ..parks(name) };
    let mut case = Case::new(&[preloads("a"), parks("b")], 1, 60);
    let effects = case.state.step(case.now);
    assert_eq!(leisure(&effects), [true]);
    let mut effects = case.state.on_event(Event::Queued(vec![job(1, "a")]), case.now);
    effects.extend(case.state.step(case.now));
    assert_eq!(leisure(&effects), [false]);
    let mut effects = case.state.on_event(Event::Queued(vec![job(2, "a")]), case.now);
    effects.extend(case.state.step(case.now));
    assert!(leisure(&effects).is_empty(), "it has been told");
    // Others wait for its GPU; or it has no room for a copy, or makes it at load.
    for (host, waits) in [(60, Some("b")), (20, None)] {
        let mut case = Case::new(&[preloads("a"), parks("b")], 1, host);
        let jobs = waits.map(|name| job(1, name)).into_iter().collect();
        case.state.models[1].held.paused = true;
        case.state.on_event(Event::Queued(jobs), case.now);
        case.state.on_event(Event::Control(Control::Load("a".into())), case.now);
        case.state.models[1].held.paused = false;
        let effects = case.state.step(case.now);
        assert!(!leisure(&effects).contains(&true), "{host} {effects:?}");
    }
}

#[test]
fn the_copy_of_a_rehearsal_counts() {
    let mut case = Case::new(&[ModelSpec { preload: true, ..parks("a") }, parks("b")], 2, 60);
    case.state.step(case.now);
    case.wants("b");
    assert_eq!(case.orders, [order("b", Order::Load, Some(30))], "it is about to be made");
    case.ready("b");
    case.report("a", phases(&[("spawn", 10), ("load", 10), (PhaseTime::REHEARSAL, 9_000)]));
    case.ready("a");
    case.tell(Event::Control(Control::Unload("b".into())));
    case.answered("b", 1);
    case.report("b", Report::Stopped { stop_ms: 1 });
    case.wants("b");
    assert_eq!(case.orders, [order("b", Order::Load, Some(30))], "its memory is kept");
}

#[test]
fn the_copy_of_a_rehearsal_that_has_begun_counts_though_somebody_has_come() {
    let mut case = Case::new(&[ModelSpec { preload: true, ..parks("a") }, parks("b")], 2, 60);
    case.state.models[0].learned.copies_at_load = Some(false);
    case.state.step(case.now);
    case.wants("a");
    assert_eq!(case.orders, [order("a", Order::Expedite, None)]);
    case.wants("b");
    assert_eq!(case.orders, [order("b", Order::Load, Some(30))], "it may be about to be made");
}
