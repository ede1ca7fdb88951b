use std::collections::BTreeMap;

use crate::domain::worker::HostCopy;
use crate::policy::Knobs;
use crate::scheduler::model::Source;
use crate::scheduler::state::tests::{job, spec};
use crate::scheduler::state::*;

const GIB: u64 = 1 << 30;

/// Some GPUs with 80 GiB each, and workers that do what they are told.
struct Case {
    state: State,
    now: Millis,
    number: i64,
    /// Orders since the last event: model, what, and what a load may take of host memory in GiB.
    orders: Vec<(String, Order, Option<u64>)>,
}

/// A model that takes 50 GiB of a GPU, and so, as far as nobody says otherwise, 30 GiB of host memory.
fn parks(name: &str) -> ModelSpec {
    ModelSpec { gpus: 1, memory: Some(50 * GIB), park: crate::domain::Park::Ram, ..spec(name, 1) }
}

fn takes(gib: u64) -> Report {
    Report::Host(HostCopy { bytes: Some(gib * GIB), can_park: Some(true), ..HostCopy::default() })
}

fn refusal(note: &str) -> HostCopy {
    HostCopy { bytes: Some(0), can_park: Some(false), note: Some(note.into()), can_reread: None }
}

fn order(model: &str, order: Order, promised: Option<u64>) -> (String, Order, Option<u64>) {
    (model.to_owned(), order, promised)
}

impl Case {
    fn new(models: &[ModelSpec], gpus: usize, host_gib: u64) -> Self {
        let inventory = Inventory {
            gpus: vec![80 * GIB; gpus],
            cpu: None,
            host: host_gib * GIB,
            one_at_a_time: false,
            gone: Default::default(),
        };
        let state = State::new(models, Knobs::default(), &BTreeMap::new(), 1).on(inventory);
        Self { state, now: 1_000, number: 0, orders: Vec::new() }
    }

    fn tell(&mut self, event: Event) {
        self.now += 10;
        let mut effects = self.state.on_event(event, self.now);
        effects.extend(self.state.step(self.now));
        let orders = effects.into_iter().filter_map(|effect| match effect {
            Effect::Order { model, order, park_bytes, .. } => Some((model, order, park_bytes.map(|bytes| bytes / GIB))),
            _ => None,
        });
        self.orders = orders.collect();
    }

    fn report(&mut self, model: &str, report: Report) {
        self.tell(Event::Report { model: model.to_owned(), replica: 0, report });
    }

    fn ready(&mut self, model: &str) {
        self.report(model, Report::Ready { base_url: format!("http://{model}"), load_ms: 20_000 });
    }

    /// A job for a model; its number.
    fn wants(&mut self, model: &str) -> i64 {
        self.number += 1;
        self.state.count_arrival(model, self.now);
        self.tell(Event::Queued(vec![job(self.number, model)]));
        self.number
    }

    fn answered(&mut self, model: &str, number: i64) {
        self.tell(Event::Ended { model: Arc::from(model), number, answered: true, suspect: false, back: None });
    }

    /// A visit of a model that has nothing to wait for; `host`: what its worker says of its copy when it is ready.
    fn visit(&mut self, model: &str, host: Option<Report>) -> (Order, Option<u64>) {
        let number = self.wants(model);
        let (_, order, promised) = self.orders.pop().expect("an order");
        host.into_iter().for_each(|host| self.report(model, host));
        self.ready(model);
        self.answered(model, number);
        (order, promised)
    }

    /// As `visit`, of a model that has to wait until another has left; what that was told, and what the model was.
    fn swap(&mut self, from: &str, to: &str, host: Option<Report>) -> (Order, (Order, Option<u64>)) {
        let number = self.wants(to);
        let (who, left, _) = self.orders.pop().expect("an order");
        assert_eq!(who, from);
        let parked = left != Order::Stop;
        self.report(from, if parked { Report::Parked { park_ms: 1 } } else { Report::Stopped { stop_ms: 1 } });
        let (who, order, promised) = self.orders.pop().expect("an order");
        assert_eq!(who, to);
        host.into_iter().for_each(|host| self.report(to, host));
        self.ready(to);
        self.answered(to, number);
        (left, (order, promised))
    }

    fn said(&self, model: &str) -> &str {
        let about = |decision: &&Decision| decision.model.as_deref() == Some(model) && decision.is_done();
        self.state.history.iter().find(about).map_or("", |decision| &decision.reason)
    }
}

#[test]
fn a_worker_may_take_what_the_others_leave_of_host_memory() {
    let mut case =
        Case::new(&[parks("a"), parks("b"), ModelSpec { park: crate::domain::Park::Off, ..parks("c") }], 3, 60);
    assert_eq!(case.visit("a", Some(takes(34))), (Order::Load, Some(60)));
    assert_eq!(case.visit("b", Some(takes(20))), (Order::Load, Some(26)), "the copy of one that serves is there too");
    assert_eq!(case.visit("c", None), (Order::Load, None), "it is never parked");
}

#[test]
fn what_loads_has_been_promised_its_copy() {
    let mut case = Case::new(&[parks("a"), parks("b")], 2, 60);
    case.wants("a");
    case.wants("b");
    assert_eq!(case.orders, [order("b", Order::Load, Some(10))], "the first may take all that it has on its GPU");
    let nobody_knows = |name| ModelSpec { memory: None, ..parks(name) };
    let mut case = Case::new(&[nobody_knows("a"), nobody_knows("b")], 2, 60);
    case.wants("a");
    case.wants("b");
    assert_eq!(case.orders, [order("b", Order::Load, Some(0))]);
    case.report("a", takes(10));
    case.ready("a");
    let mut case = Case::new(&[parks("a"), parks("b")], 2, 60);
    case.visit("a", None);
    assert_eq!(
        case.visit("b", None),
        (Order::Load, Some(60)),
        "one that makes its copy when it is parked has none yet"
    );
}

#[test]
fn what_the_driver_parks_is_promised_nothing_and_takes_nothing_before_it_is_parked() {
    let checkpointed = ModelSpec { park: crate::domain::Park::Checkpoint, ..parks("a") };
    let mut case = Case::new(&[checkpointed, parks("b")], 2, 60);
    let number = case.wants("a");
    assert_eq!(case.orders, [order("a", Order::Load, None)]);
    case.wants("b");
    assert_eq!(case.orders, [order("b", Order::Load, Some(60))], "while the other loads");
    case.ready("a");
    case.answered("a", number);
    // It counts once it leaves.
    let mut case = Case::new(&[ModelSpec { park: crate::domain::Park::Checkpoint, ..parks("a") }, parks("b")], 1, 60);
    case.visit("a", None);
    assert_eq!(case.swap("a", "b", None), (Order::Park, (Order::Load, Some(30))));
}

#[test]
fn what_workers_say_counts_and_not_what_was_expected() {
    for (told, left) in [(55, Order::Park), (61, Order::Stop)] {
        let mut case = Case::new(&[parks("a"), parks("b")], 1, 60);
        case.visit("a", Some(takes(told)));
        assert_eq!(case.swap("a", "b", None).0, left, "{told}");
    }
    let mut case = Case::new(&[parks("a"), parks("b"), parks("c")], 1, 60);
    case.visit("a", Some(takes(10)));
    case.swap("a", "b", Some(takes(10)));
    case.swap("b", "c", Some(takes(10)));
    assert_eq!(case.swap("c", "a", None), (Order::Park, (Order::Wake, Some(40))), "20 are the others'");
}

#[test]
fn a_worker_that_cannot_be_parked_is_stopped_and_the_decision_says_why() {
    let mut case = Case::new(&[parks("a"), parks("b")], 1, 60);
    case.visit("a", Some(Report::Host(refusal("its weights are offloaded"))));
    assert_eq!(case.swap("a", "b", None).0, Order::Stop);
    assert_eq!(
        case.said("a"),
        "stop a without parking it: its worker says that it cannot be: its weights are offloaded"
    );
    let outlook = case.state.parking(0).unwrap();
    assert_eq!(outlook.can, Some(false), "{outlook:?}");
    assert_eq!(case.state.parking(1).unwrap().can, Some(true));
}

#[test]
fn of_two_that_take_turns_one_is_always_parked() {
    // Neither has room beside the other, whenever they make their copies.
    for copies in [(None, None), (Some(40), Some(40)), (Some(40), None), (None, Some(40))] {
        let sized = |name| ModelSpec { memory: Some(66 * GIB), ..parks(name) };
        let mut case = Case::new(&[sized("a"), sized("b")], 1, 60);
        let mut done = BTreeMap::new();
        for turn in 0..12 {
            // Nobody waits for the next job of whoever is there.
            case.now += 1_000_000;
            let (model, copy) = if turn % 2 == 0 { ("a", copies.0) } else { ("b", copies.1) };
            let number = case.wants(model);
            let mut orders = std::mem::take(&mut case.orders);
            while let Some((who, what, promised)) = orders.pop() {
                *done.entry(format!("{what:?}")).or_insert(0) += 1;
                let report = match what {
                    Order::Park | Order::ParkBare => Report::Parked { park_ms: 1 },
                    Order::Stop => Report::Stopped { stop_ms: 1 },
                    _ => {
                        assert_eq!(who, model);
                        // One that was not promised enough says so.
                        match copy.filter(|_| what == Order::Load) {
                            Some(gib) if promised >= copy => case.report(model, takes(gib)),
                            Some(_) => case.report(model, Report::Host(refusal("no room"))),
                            None => {}
                        }
                        Report::Ready { base_url: String::new(), load_ms: 20_000 }
                    }
                };
                case.report(&who, report);
                orders.append(&mut case.orders);
            }
            case.answered(model, number);
        }
        assert!(done.get("Wake").is_some_and(|wakes| *wakes >= 5), "{copies:?}: {done:?}");
    }
}

#[test]
fn a_newcomer_that_is_worth_more_has_the_room_of_what_is_parked() {
    let mut case = Case::new(&[parks("a"), parks("b"), parks("c")], 1, 60);
    case.visit("b", Some(takes(40)));
    case.report("b", Report::Died { reason: "killed".into() });
    case.visit("a", Some(takes(40)));
    case.swap("a", "c", Some(takes(5)));
    for _ in 0..50 {
        case.state.count_arrival("b", case.now);
    }
    case.wants("b");
    assert_eq!(case.orders, [order("c", Order::Park, None)]);
    case.report("c", Report::Parked { park_ms: 1 });
    assert_eq!(case.orders, [order("a", Order::Stop, None)], "while it is there, both copies would be");
    case.wants("b");
    assert_eq!(case.orders, []);
    case.report("a", Report::Stopped { stop_ms: 1 });
    assert_eq!(case.orders, [order("b", Order::Load, Some(55))]);
    assert!(case.said("a").starts_with("drop a from host memory"), "{}", case.said("a"));
}

/// `a` is parked on the first GPU, where `b` serves and is never displaced.
fn locked_out() -> Case {
    let mut case = Case::new(&[parks("a"), ModelSpec { pin: true, ..parks("b") }, parks("c")], 2, 200);
    case.visit("a", None);
    case.wants("c");
    case.ready("c");
    case.wants("b");
    assert_eq!(case.orders, [order("a", Order::Park, None)]);
    case.report("a", Report::Parked { park_ms: 1 });
    assert_eq!(case.orders.last(), Some(&order("b", Order::Load, Some(170))));
    case.ready("b");
    case
}

#[test]
fn a_copy_that_cannot_be_used_where_its_model_is_wanted_is_dropped_in_words() {
    let mut case = locked_out();
    case.answered("c", 2);
    case.now += 2_000_000;
    case.wants("a");
    assert_eq!(case.orders, [order("c", Order::Park, None)]);
    let wake_ms = case.state.models[0].load_ms(Source::Copy);
    case.report("c", Report::Parked { park_ms: 1 });
    assert_eq!(case.orders, [order("a", Order::Wake, Some(170))], "its supervisor loads it from nothing there");
    assert_eq!(
        case.said("a"),
        "drop a from host memory: it is parked on gpu0 and wanted on gpu1, where it cannot wake; a load from disk takes 20 s"
    );
    case.report("a", Report::Loading { phase: None, percent: None });
    case.ready("a");
    assert_eq!(case.state.models[0].load_ms(Source::Copy), wake_ms, "that says nothing about wakes");
}

#[test]
fn a_parked_worker_that_is_wanted_no_more_lies_where_it_lay() {
    let mut case = locked_out();
    case.answered("c", 2);
    case.now += 2_000_000;
    let number = case.wants("a");
    assert_eq!(case.orders, [order("c", Order::Park, None)]);
    case.tell(Event::Gone { model: "a".into(), priority: 5, number });
    let a = case.state.workers.iter().find(|worker| worker.model == 0).unwrap();
    assert_eq!((a.phase.clone(), a.set), (Phase::Parked, GpuSet::one(0)));
}

#[test]
fn a_model_that_shares_its_gpus_with_nobody_is_parked_too() {
    let exclusive = |name| ModelSpec { exclusive: true, ..parks(name) };
    let mut case = Case::new(&[exclusive("a"), exclusive("b")], 1, 60);
    case.visit("a", None);
    assert_eq!(case.swap("a", "b", None).0, Order::Park);
}

#[test]
fn a_copy_that_is_being_dropped_keeps_the_number_of_its_worker() {
    let mut case = Case::new(&[parks("a"), parks("b")], 1, 100);
    case.visit("a", Some(takes(10)));
    case.swap("a", "b", Some(takes(10)));
    case.tell(Event::Control(Control::Unload("b".into())));
    case.report("b", Report::Stopped { stop_ms: 1 });
    let spec = ModelSpec { args: vec!["--new".into()], ..parks("a") };
    case.tell(Event::Edited(vec![Edit { name: "a".into(), spec: Some(spec), keys: vec!["args"], restart: true }]));
    assert_eq!(case.orders, [order("a", Order::Stop, None)]);
    case.wants("a");
    assert_eq!(case.orders, [], "there is no supervisor for a second worker of it");
    case.report("a", Report::Stopped { stop_ms: 1 });
    assert_eq!(case.orders, [order("a", Order::Load, Some(100))]);
}

#[test]
fn what_is_not_in_the_file_any_more_is_not_loaded_whatever_its_supervisor_says() {
    let mut case = Case::new(&[parks("a")], 1, 100);
    case.tell(Event::Edited(vec![Edit { name: "a".into(), spec: None, keys: Vec::new(), restart: true }]));
    case.wants("a");
    case.report("a", Report::Available);
    assert_eq!(case.orders, []);
}

#[test]
fn who_was_loaded_while_nothing_was_parked_is_not_parked() {
    let mut case = Case::new(&[parks("a"), parks("b")], 1, 0);
    assert_eq!(case.visit("a", None), (Order::Load, None), "it is started without the means to sleep");
    case.state.set_knobs(Knobs::default(), 60 * GIB, case.now);
    assert_eq!(case.swap("a", "b", None).0, Order::Stop);
    assert_eq!(
        case.said("a"),
        "stop a without parking it: its worker says that it cannot be: scheduler.park_ram was 0 when it was loaded"
    );
}

#[test]
fn an_edit_loads_no_worker_before_all_that_there_are_have_left() {
    let mut case = Case::new(&[ModelSpec { max_replicas: 2, ..parks("a") }, parks("b")], 2, 0);
    // A long job runs on the first worker.
    case.wants("a");
    case.ready("a");
    let spec = ModelSpec { max_replicas: 2, args: vec!["--new".into()], ..parks("a") };
    case.tell(Event::Edited(vec![Edit { name: "a".into(), spec: Some(spec), keys: vec!["args"], restart: true }]));
    case.wants("a");
    assert_eq!(case.orders, [], "a second worker would be stopped as soon as it is ready");
    case.answered("a", 1);
    assert_eq!(case.orders, [order("a", Order::Stop, None)]);
    case.report("a", Report::Stopped { stop_ms: 1 });
    assert_eq!(case.orders, [order("a", Order::Load, None)], "nothing is parked at all");
}

#[test]
fn a_smaller_budget_drops_what_lies_beyond_it_the_least_worth_first() {
    let mut case = Case::new(&[parks("a"), parks("b"), parks("c")], 1, 100);
    case.visit("a", None);
    case.swap("a", "b", None);
    case.swap("b", "c", None);
    for _ in 0..50 {
        case.state.count_arrival("a", case.now);
    }
    // Both lie there and take 30 GiB each.
    case.state.set_knobs(Knobs::default(), 60 * GIB, case.now);
    case.tell(Event::Edited(Vec::new()));
    assert_eq!(case.orders, []);
    case.state.set_knobs(Knobs::default(), 40 * GIB, case.now);
    case.tell(Event::Edited(Vec::new()));
    assert_eq!(case.orders, [order("b", Order::Stop, None)]);
    assert!(case.said("b").starts_with("drop b from host memory: park_ram was edited, 40 GiB"), "{}", case.said("b"));
    case.report("b", Report::Stopped { stop_ms: 1 });
    case.state.set_knobs(Knobs::default(), 0, case.now);
    case.tell(Event::Edited(Vec::new()));
    assert_eq!(case.orders, [order("a", Order::Stop, None)]);
}

#[path = "bare_tests.rs"]
mod bare;

#[test]
fn room_is_made_for_who_lacked_it_and_not_for_who_refused_though_there_was_enough() {
    let mut case = Case::new(&[parks("a")], 1, 100);
    let model = &mut case.state.models[0];
    let copy = HostCopy { bytes: Some(30 * GIB), can_park: Some(true), ..HostCopy::default() };
    model.count_host(&copy, Some(100 * GIB));
    model.count_copy(&copy);
    assert!(model.copies_at_load() && !model.has_refused_room());
    model.count_host(&refusal("10 GiB are too few"), Some(10 * GIB));
    assert!(model.copies_at_load() && !model.has_refused_room());
    model.count_host(&refusal("2 parks or wakes in a row have failed"), Some(40 * GIB));
    assert!(model.has_refused_room());
    // Another one that says nothing (vLLM) takes that back.
    model.count_copy(&HostCopy::default());
    assert!(!model.has_refused_room());
    assert_eq!(model.learned.host.can_park, None);
}
