use std::collections::BTreeMap;

use crate::domain::Park;
use crate::policy::Knobs;
use crate::scheduler::state::tests::{job, spec};
use crate::scheduler::state::*;

const GIB: u64 = 1 << 30;

/// GPUs of 80 GiB each.
struct Case {
    state: State,
    now: Millis,
    number: i64,
    /// Orders since the last event: model, what, where.
    orders: Vec<(String, Order, String)>,
    /// Callers that were told since then.
    ended: usize,
}

fn needs(name: &str, gib: u64) -> ModelSpec {
    ModelSpec { gpus: 1, memory: Some(gib * GIB), park: Park::Ram, ..spec(name, 1) }
}

fn order(model: &str, order: Order, set: &str) -> (String, Order, String) {
    (model.to_owned(), order, set.to_owned())
}

impl Case {
    fn new(models: &[ModelSpec], gpus: u32, host_gib: u64) -> Self {
        let there = (0..gpus).map(|gpu| (gpu, 80 * GIB)).collect();
        let inventory = Inventory { host: host_gib * GIB, ..Inventory::of(&there, 0) };
        let state = State::new(models, Knobs::default(), &BTreeMap::new(), 1).on(inventory);
        Self { state, now: 1_000, number: 0, orders: Vec::new(), ended: 0 }
    }

    fn tell(&mut self, event: Event) {
        self.now += 10;
        let mut effects = self.state.on_event(event, self.now);
        effects.extend(self.state.step(self.now));
        (self.orders, self.ended) = (Vec::new(), 0);
        for effect in effects {
            match effect {
                Effect::Order { order: Order::Proven, .. } => {}
                Effect::Order { model, order, set, .. } => self.orders.push((model, order, set.to_string())),
                Effect::EndQueued { numbers, .. } => self.ended += numbers.len(),
                _ => {}
            }
        }
    }

    fn report(&mut self, model: &str, report: Report) {
        self.tell(Event::Report { model: model.to_owned(), replica: 0, report });
    }

    /// A caller of a model, after so long that nobody is waited for.
    fn wants(&mut self, model: &str) {
        self.number += 1;
        self.now += 2_000_000;
        self.state.count_arrival(model, self.now);
        self.tell(Event::Queued(vec![QueuedJob { face: crate::domain::Face::Sync, ..job(self.number, model) }]));
    }

    /// It does its job, and is dry.
    fn served(&mut self, model: &str) {
        self.report(model, Report::Ready { base_url: format!("http://{model}"), load_ms: 20_000 });
        self.answered(model, self.number);
    }

    fn answered(&mut self, model: &str, number: i64) {
        self.tell(Event::Ended { model: model.into(), number, answered: true, suspect: false, back: None });
    }

    fn visit(&mut self, model: &str) {
        self.wants(model);
        assert_eq!(self.orders.last().map(|(model, order, _)| (&**model, *order)), Some((model, Order::Load)));
        self.served(model);
    }

    fn stopped(&mut self, model: &str) {
        self.report(model, Report::Stopped { stop_ms: 1 });
    }

    /// It keeps 2 GiB of its GPU.
    fn parked(&mut self, model: &str) {
        self.report(model, Report::Keeps { device_bytes: 2 * GIB });
        self.report(model, Report::Parked { park_ms: 1 });
    }

    /// It runs out of memory, with so much free before.
    fn lacks(&mut self, model: &str, gib: u64) {
        let error = JobError::new(ErrorCode::ModelLoadFailed, format!("model `{model}` does not fit: numbers"), true);
        self.report(model, Report::DoesNotFit { error, free: gib * GIB });
    }

    fn trouble(&self, model: &str) -> Option<&str> {
        let index = self.state.index_of(model).unwrap();
        self.state.models[index].trouble.as_ref().map(|trouble| &*trouble.text)
    }

    fn said(&self, code: &str) -> &str {
        self.state.history.iter().find(|decision| decision.code == code).map_or("", |decision| &decision.reason)
    }
}

#[test]
fn an_idle_neighbour_leaves_for_a_model_that_ran_out_of_memory_beside_it() {
    let mut case = Case::new(&[needs("b", 40), needs("a", 30)], 1, 0);
    case.visit("b");
    case.wants("a");
    assert_eq!(case.orders, [order("a", Order::Load, "gpu0")], "it fits beside it by what both are declared to take");
    case.lacks("a", 20);
    assert_eq!((case.trouble("a"), case.ended), (None, 0), "nobody is told yet");
    assert_eq!(
        case.said("no_room"),
        "a ran out of memory on gpu0 beside b: it is loaded once more when they have left"
    );
    assert_eq!(case.orders, [order("b", Order::Stop, "gpu0")]);
    case.stopped("b");
    assert_eq!(case.orders, [order("a", Order::Load, "gpu0")]);
    case.wants("b");
    assert_eq!(case.orders, [], "nobody comes beside it while it loads");
    case.report("a", Report::Ready { base_url: String::new(), load_ms: 1 });
    assert_eq!(case.orders, [order("b", Order::Load, "gpu0")], "from then on they share as before");
}

#[test]
fn what_does_not_fit_alone_either_is_blocked_until_there_is_more_room() {
    let mut case = Case::new(&[needs("b", 40), needs("a", 30)], 1, 0);
    case.visit("b");
    case.wants("a");
    case.lacks("a", 20);
    case.stopped("b");
    case.lacks("a", 80);
    assert_eq!((case.trouble("a"), case.ended), (Some("it does not fit: numbers"), 1));
    case.tell(Event::Queued(vec![job(9, "a")]));
    assert_eq!(case.orders, []);
    case.report("a", Report::Available);
    assert_eq!(case.orders, [order("a", Order::Load, "gpu0")]);
}

#[test]
fn two_that_ran_out_of_memory_together_are_loaded_one_after_the_other() {
    let mut case = Case::new(&[needs("a", 30), needs("b", 30)], 1, 0);
    case.wants("a");
    case.wants("b");
    assert_eq!(case.orders, [order("b", Order::Load, "gpu0")], "beside the other one, which loads");
    case.lacks("a", 80);
    assert_eq!((case.trouble("a"), &case.orders[..]), (None, &[][..]));
    case.lacks("b", 80);
    assert_eq!((case.trouble("b"), &case.orders[..]), (None, &[order("a", Order::Load, "gpu0")][..]));
    case.report("a", Report::Ready { base_url: String::new(), load_ms: 1 });
    case.answered("a", 1);
    assert_eq!(case.orders, [order("a", Order::Stop, "gpu0")]);
    case.stopped("a");
    assert_eq!(case.orders, [order("b", Order::Load, "gpu0")]);
    case.lacks("b", 80);
    assert!(case.trouble("b").is_some());
}

#[test]
fn a_neighbour_with_work_finishes_it_first() {
    let mut case = Case::new(&[needs("b", 40), needs("a", 30)], 1, 0);
    case.wants("b");
    let number = case.number;
    case.report("b", Report::Ready { base_url: String::new(), load_ms: 20_000 });
    case.wants("a");
    case.lacks("a", 20);
    assert_eq!((case.trouble("a"), &case.orders[..]), (None, &[][..]), "b runs a job");
    case.answered("b", number);
    assert_eq!(case.orders, [order("b", Order::Stop, "gpu0")]);
}

#[test]
fn pinned_neighbours_stay_and_others_leave() {
    let mut case = Case::new(&[ModelSpec { pin: true, ..needs("p", 10) }, needs("b", 30), needs("a", 30)], 1, 0);
    case.visit("p");
    case.visit("b");
    case.wants("a");
    case.lacks("a", 20);
    assert_eq!(case.orders, [order("b", Order::Stop, "gpu0")]);
    case.stopped("b");
    assert_eq!(case.orders, [order("a", Order::Load, "gpu0")]);
    case.lacks("a", 50);
    assert_eq!(case.trouble("a"), Some("it does not fit: numbers"), "whom it is beside does not leave");
    case.wants("a");
    case.tell(Event::Control(crate::domain::Control::Unpin("p".into())));
    assert_eq!(case.orders, [order("a", Order::Load, "gpu0")]);
    case.lacks("a", 50);
    assert_eq!(case.orders, [order("p", Order::Stop, "gpu0")], "now it may");
}

#[test]
fn a_pin_that_is_taken_away_meanwhile_holds_nobody_back() {
    let mut case = Case::new(&[ModelSpec { pin: true, ..needs("p", 10) }, needs("b", 30), needs("a", 30)], 1, 0);
    case.visit("p");
    case.visit("b");
    case.wants("a");
    case.lacks("a", 20);
    case.tell(Event::Control(crate::domain::Control::Unpin("p".into())));
    assert_eq!(case.orders, [order("p", Order::Stop, "gpu0")]);
    case.stopped("b");
    assert_eq!(case.orders, []);
    case.stopped("p");
    assert_eq!(case.orders, [order("a", Order::Load, "gpu0")]);
}

#[test]
fn parked_processes_end_last_and_it_is_tried_once_they_are_gone() {
    let mut case = Case::new(&[needs("b", 60), needs("c", 40), needs("a", 30)], 1, 400);
    case.visit("b");
    case.wants("c");
    case.parked("b");
    case.served("c");
    case.wants("a");
    case.lacks("a", 20);
    assert_eq!(case.orders, [order("c", Order::Park, "gpu0")], "the resident alone");
    case.parked("c");
    assert_eq!(case.orders, [order("a", Order::Load, "gpu0")]);
    case.lacks("a", 76);
    let mut orders = std::mem::take(&mut case.orders);
    orders.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(orders, [order("b", Order::Stop, "gpu0"), order("c", Order::Stop, "gpu0")]);
    assert_eq!(
        case.said("no_room"),
        "a ran out of memory on gpu0 beside b, c: it is loaded once more when their parked processes have ended"
    );
    assert!(
        case.said("drop").ends_with("from host memory: a ran out of memory on gpu0, of which its process keeps some")
    );
    case.stopped("b");
    assert_eq!(case.orders, [], "not before all are gone");
    case.stopped("c");
    assert_eq!(case.orders, [order("a", Order::Load, "gpu0")], "whatever that has freed");
    case.lacks("a", 80);
    assert!(case.trouble("a").is_some());
}

#[test]
fn nobody_is_parked_beside_a_model_that_is_to_load_alone() {
    let mut case = Case::new(&[needs("b", 60), needs("a", 30)], 1, 400);
    case.visit("b");
    case.wants("a");
    case.parked("b");
    case.lacks("a", 78);
    assert_eq!(case.orders, [order("b", Order::Stop, "gpu0")]);
    // Its job is cancelled meanwhile; the next one comes when the other is back.
    case.tell(Event::Gone { model: "a".into(), priority: 5, number: case.number });
    case.stopped("b");
    let index = case.state.index_of("a").unwrap();
    assert_eq!(case.state.models[index].room, Room::Alone);
    case.visit("b");
    case.wants("a");
    assert_eq!(case.orders, [order("b", Order::Stop, "gpu0")]);
}

#[test]
fn it_is_tried_on_another_gpu_that_may_have_more_and_blocked_when_none_is_left() {
    let mut case = Case::new(&[needs("a", 30)], 2, 0);
    case.wants("a");
    assert_eq!(case.orders, [order("a", Order::Load, "gpu0")]);
    case.lacks("a", 10);
    assert_eq!(case.orders, [order("a", Order::Load, "gpu1")], "another program has 70 GiB of the first one");
    assert_eq!(case.said("no_room"), "a ran out of memory on gpu0, and other GPUs may have more: it is tried there");
    assert_eq!(case.ended, 0);
    case.lacks("a", 12);
    assert_eq!((case.trouble("a"), case.ended), (Some("it does not fit: numbers"), 1));
    case.wants("a");
    case.report("a", Report::Available);
    assert_eq!(case.orders, [order("a", Order::Load, "gpu0")], "all are tried anew");
    // Where it failed with all of the GPU free, the other one has no more.
    case.lacks("a", 80);
    assert!(case.trouble("a").is_some());
    // Other GPUs are another matter.
    case.wants("a");
    case.tell(Event::Devices((0..3).map(|gpu| (gpu, 90 * GIB)).collect()));
    assert_eq!((case.trouble("a"), case.orders.len()), (None, 1));
}

#[test]
fn a_model_with_an_edited_entry_shares_again() {
    let mut case = Case::new(&[needs("b", 40), needs("a", 30)], 1, 0);
    case.visit("b");
    case.wants("a");
    case.lacks("a", 20);
    let entry = ModelSpec { args: vec!["--less".into()], ..needs("a", 30) };
    let edit = Edit { name: "a".into(), spec: Some(entry), keys: vec!["args"], restart: true };
    case.stopped("b");
    case.tell(Event::Edited(vec![edit]));
    let index = case.state.index_of("a").unwrap();
    assert_eq!(case.state.models[index].room, Room::Shared);
    case.lacks("a", 20);
    assert_eq!(case.state.models[index].room, Room::Shared, "that was the old one");
}

#[test]
fn two_that_do_not_fit_together_do_not_fail_at_each_turn() {
    let mut case = Case::new(&[needs("b", 40), needs("a", 30)], 1, 0);
    case.visit("b");
    let mut failed = Vec::new();
    for turn in 0..8 {
        let (comes, leaves) = if turn % 2 == 0 { ("a", "b") } else { ("b", "a") };
        case.wants(comes);
        if case.orders == [order(comes, Order::Load, "gpu0")] {
            failed.push(turn);
            case.lacks(comes, 20);
        }
        assert_eq!(case.orders, [order(leaves, Order::Stop, "gpu0")]);
        case.stopped(leaves);
        assert_eq!(case.orders, [order(comes, Order::Load, "gpu0")]);
        case.served(comes);
    }
    assert_eq!(failed, [0, 1, 4, 5], "once each, and an hour later whether they fit now");
}

#[test]
fn on_another_gpu_it_is_beside_others_again() {
    let mut case = Case::new(&[needs("b", 40), needs("c", 50), needs("a", 30)], 2, 0);
    case.visit("b");
    case.visit("c");
    case.wants("a");
    assert_eq!(case.orders, [order("a", Order::Load, "gpu0")]);
    case.lacks("a", 20);
    case.stopped("b");
    case.lacks("a", 20);
    assert_eq!(case.orders, [order("a", Order::Load, "gpu1")], "c stays");
}

#[test]
fn a_replica_asks_nothing_of_the_workers_of_its_own_model() {
    let mut case = Case::new(&[ModelSpec { max_replicas: 2, ..needs("a", 30) }], 1, 0);
    case.wants("a");
    case.report("a", Report::Ready { base_url: "http://a".into(), load_ms: 20_000 });
    case.tell(Event::Queued((1000..1600).map(|number| job(number, "a")).collect()));
    assert_eq!(case.orders, [order("a", Order::Load, "gpu0")], "beside the first one");
    let error = JobError::new(ErrorCode::ModelLoadFailed, "model `a` does not fit: numbers", true);
    let report = Report::DoesNotFit { error, free: 10 * GIB };
    case.tell(Event::Report { model: "a".into(), replica: 1, report });
    assert_eq!((case.said("no_room"), case.state.models[0].room), ("", Room::Shared));
    assert!(case.orders.is_empty(), "{:?}", case.orders);
}

#[test]
fn nobody_leaves_for_a_model_that_is_only_preloaded_nor_is_it_loaded_much_later() {
    let models = [needs("b", 40), ModelSpec { preload: true, ..needs("a", 30) }];
    let mut case = Case::new(&models, 1, 0);
    case.wants("b");
    case.served("b");
    case.lacks("a", 20);
    assert!(case.orders.is_empty(), "{:?}", case.orders);
    case.tell(Event::Control(crate::domain::Control::Unload("b".into())));
    case.stopped("b");
    assert!(!case.orders.contains(&order("a", Order::Load, "gpu0")), "{:?}", case.orders);
    case.wants("a");
    assert_eq!(case.orders, [order("a", Order::Load, "gpu0")]);
}

#[test]
fn who_has_no_other_gpu_left_is_blocked() {
    let mut case = Case::new(&[needs("q", 70), needs("a", 30)], 2, 0);
    case.wants("q");
    let q = case.number;
    case.report("q", Report::Ready { base_url: "http://q".into(), load_ms: 20_000 });
    case.tell(Event::Queued(vec![QueuedJob { face: crate::domain::Face::Sync, ..job(900, "a") }]));
    assert_eq!(case.orders, [order("a", Order::Load, "gpu1")]);
    case.lacks("a", 10);
    assert_eq!((case.trouble("a"), case.ended), (None, 0), "the other GPU may have more when q is done");
    case.tell(Event::Control(crate::domain::Control::Pin("q".into())));
    assert!(case.trouble("a").is_some_and(|text| text.contains("does not fit")), "{:?}", case.trouble("a"));
    assert_eq!(case.ended, 1, "the caller is told");
    case.answered("q", q);
    case.tell(Event::Control(crate::domain::Control::Unpin("q".into())));
    assert_eq!(case.trouble("a"), None, "and may go there now");
}
