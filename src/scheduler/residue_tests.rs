use std::collections::BTreeMap;

use crate::domain::Park;
use crate::policy::Knobs;
use crate::scheduler::state::tests::{job, spec};
use crate::scheduler::state::*;

const GIB: u64 = 1 << 30;

/// GPUs of 80 GiB each, on which parked workers keep 2 GiB.
struct Case {
    state: State,
    now: Millis,
    number: i64,
    orders: Vec<(String, Order)>,
}

fn needs(name: &str, gib: u64) -> ModelSpec {
    ModelSpec { gpus: 1, memory: Some(gib * GIB), park: Park::Ram, ..spec(name, 1) }
}

fn order(model: &str, order: Order) -> (String, Order) {
    (model.to_owned(), order)
}

impl Case {
    fn new(models: &[ModelSpec], gpus: usize) -> Self {
        let inventory = Inventory {
            gpus: vec![80 * GIB; gpus],
            cpu: None,
            host: 400 * GIB,
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
            Effect::Order { model, order, .. } => Some((model, order)),
            _ => None,
        });
        self.orders = orders.collect();
    }

    fn report(&mut self, model: &str, report: Report) {
        self.tell(Event::Report { model: model.to_owned(), replica: 0, report });
    }

    /// A job for a model, after so long that nobody is waited for.
    fn wants(&mut self, model: &str) {
        self.number += 1;
        self.now += 2_000_000;
        self.state.count_arrival(model, self.now);
        self.tell(Event::Queued(vec![job(self.number, model)]));
    }

    /// A model loads, does its job, and is dry.
    fn served(&mut self, model: &str) {
        self.report(model, Report::Ready { base_url: format!("http://{model}"), load_ms: 20_000 });
        let answer =
            Event::Ended { model: model.into(), number: self.number, answered: true, suspect: false, back: None };
        self.tell(answer);
    }

    fn parked(&mut self, model: &str) {
        self.report(model, Report::Keeps { device_bytes: 2 * GIB });
        self.report(model, Report::Parked { park_ms: 1 });
    }

    fn stopped(&mut self, model: &str) {
        self.report(model, Report::Stopped { stop_ms: 1 });
    }

    fn said(&self, model: &str) -> &str {
        let about = |decision: &&Decision| decision.model.as_deref() == Some(model) && decision.code == "drop";
        self.state.history.iter().find(about).map_or("", |decision| &decision.reason)
    }
}

#[test]
fn a_parked_process_that_is_in_the_way_is_dropped_first_and_not_parked_again() {
    let mut case = Case::new(&[needs("flux", 60), needs("text", 79)], 1);
    case.wants("flux");
    case.served("flux");
    case.wants("text");
    assert_eq!(case.orders, [order("flux", Order::Park)], "nobody knows yet what it keeps");
    case.parked("flux");
    assert_eq!(case.orders, [order("flux", Order::Stop)], "no load before it is gone");
    assert_eq!(
        case.said("flux"),
        "drop flux from host memory: its process keeps 2 GiB of gpu0, where text needs 79.0 GiB of 80.0 GiB"
    );
    case.stopped("flux");
    assert_eq!(case.orders, [order("text", Order::Load)]);
    case.served("text");

    case.wants("flux");
    case.parked("text");
    assert_eq!(case.orders, [order("flux", Order::Load)], "it fits beside what text keeps");
    case.served("flux");
    case.wants("text");
    assert_eq!(case.orders, [order("flux", Order::Stop)]);
    assert_eq!(
        case.said("flux"),
        "stop flux without parking it: its process would keep 2 GiB of gpu0, where text needs 79.0 GiB of 80.0 GiB"
    );
    case.stopped("flux");
    assert_eq!(case.orders, [order("text", Order::Wake)]);
}

#[test]
fn residents_and_residues_count_together() {
    let mut case = Case::new(&[needs("a", 45), needs("b", 40), needs("c", 39)], 1);
    case.wants("a");
    case.served("a");
    case.wants("b");
    case.parked("a");
    assert_eq!(case.orders, [order("b", Order::Load)]);
    case.served("b");
    case.wants("c");
    assert_eq!(case.orders, [order("a", Order::Stop)], "40 and 39 leave no 2 GiB");
    let said = case.said("a");
    assert!(said.ends_with("its process keeps 2 GiB of gpu0, where c needs 39.0 GiB of 40.0 GiB"), "{said}");
    case.stopped("a");
    assert_eq!(case.orders, [order("c", Order::Load)]);
}

#[test]
fn what_has_its_own_process_there_is_woken_beside_it() {
    let mut case = Case::new(&[needs("a", 79), needs("b", 78)], 1);
    case.wants("a");
    case.served("a");
    case.wants("b");
    case.parked("a");
    assert_eq!(case.orders, [order("b", Order::Load)], "78 and 2 are 80");
    case.served("b");
    case.wants("a");
    case.parked("b");
    assert_eq!(case.orders, [order("b", Order::Stop)], "79 and 2 are too much; its own 2 are part of its 79");
    case.stopped("b");
    assert_eq!(case.orders, [order("a", Order::Wake)]);
}
