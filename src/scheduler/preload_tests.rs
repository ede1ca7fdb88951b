//! What is loaded at the start without a job, and until when.

use super::tests::spec;
use super::*;
use crate::domain::Launch;
use crate::domain::worker::{Fetch, FetchPhase};

const GIB: u64 = 1 << 30;

/// A box with one GPU of 80 GiB that has just started.
struct Start {
    state: State,
    now: Millis,
    orders: Vec<(String, Order)>,
}

fn takes(name: &str, gib: u64) -> ModelSpec {
    ModelSpec { gpus: 1, memory: Some(gib * GIB), preload: true, ..spec(name, 1) }
}

impl Start {
    fn new(models: &[ModelSpec]) -> Self {
        Self::without(models, &[])
    }

    /// The weights of some are not here.
    fn without(models: &[ModelSpec], missing: &[&str]) -> Self {
        let gpus = BTreeMap::from([(0, 80 * GIB)]);
        let state = State::new(models, Knobs::default(), &BTreeMap::new(), 1)
            .on(Inventory::of(&gpus, 8 * GIB))
            .without_weights(&missing.iter().map(|name| (*name).to_owned()).collect());
        let mut start = Self { state, now: 1_000, orders: Vec::new() };
        start.step(Vec::new());
        start
    }

    fn step(&mut self, mut effects: Vec<Effect>) {
        effects.extend(self.state.step(self.now));
        self.orders.extend(effects.into_iter().filter_map(|effect| match effect {
            Effect::Order { model, order, .. } => Some((model, order)),
            _ => None,
        }));
    }

    fn event(&mut self, event: Event) {
        self.now += 1_000;
        let effects = self.state.on_event(event, self.now);
        self.step(effects);
    }

    fn report(&mut self, model: &str, report: Report) {
        self.event(Event::Report { model: model.to_owned(), replica: 0, report });
    }

    fn ready(&mut self, model: &str) {
        self.report(model, Report::Ready { base_url: format!("http://{model}"), load_ms: 1_000 });
    }

    fn fails(&mut self, model: &str, quarantined: bool) {
        let error = JobError::new(ErrorCode::ModelLoadFailed, "exited with status 1", true);
        self.report(model, Report::LoadFailed { error, retry_at: self.now + 5_000, quarantined });
    }

    /// Orders since the last look.
    fn ordered(&mut self) -> Vec<String> {
        self.orders.drain(..).map(|(model, order)| format!("{order:?} {model}").to_lowercase()).collect()
    }
}

#[test]
fn a_first_load_that_fails_is_tried_again_until_the_quarantine() {
    let mut start = Start::new(&[takes("a", 30), takes("b", 30)]);
    assert_eq!(start.ordered(), ["load a", "load b"]);
    start.fails("b", false);
    start.ready("a");
    assert!(start.ordered().is_empty(), "it is in its back-off");
    start.report("b", Report::Available);
    assert_eq!(start.ordered(), ["load b"]);
    start.fails("b", true);
    start.report("b", Report::Available);
    assert!(start.ordered().is_empty(), "nobody waits for it, and it is not tried for ever");
}

#[test]
fn what_does_not_fit_the_memory_that_others_left_is_tried_when_there_is_more() {
    let mut start = Start::new(&[takes("a", 30)]);
    start.orders.clear();
    let error = JobError::new(ErrorCode::ModelLoadFailed, "20 GiB are free", true);
    start.report("a", Report::DoesNotFit { error, free: 20 * GIB });
    assert!(start.ordered().is_empty());
    start.report("a", Report::Available);
    assert_eq!(start.ordered(), ["load a"]);
}

fn from_hub() -> ModelSpec {
    ModelSpec {
        launch: Launch::Script { python: "python3".into(), script: "/server.py".into() },
        model: Some("org/hub".to_owned()),
        ..takes("hub", 30)
    }
}

#[test]
fn a_model_whose_fetch_failed_is_fetched_again_and_loaded() {
    let mut start = Start::without(&[from_hub()], &["hub"]);
    let fetch = |want, report| Event::Fetch { model: "hub".to_owned(), want, report: Box::new(report) };
    let error = JobError::new(ErrorCode::ModelLoadFailed, "no way to the hub", true);
    for want in 1..=2 {
        assert_eq!(start.state.models[0].want, want, "it is asked for");
        let failed = FetchReport::Failed { fetch: Fetch::at(FetchPhase::Failed), error: error.clone() };
        start.event(fetch(want, failed));
        assert_eq!(start.state.models[0].want, want, "not before the pause is over");
        start.event(fetch(want, FetchReport::Available));
    }
    start.event(fetch(3, FetchReport::Here));
    assert_eq!(start.ordered(), ["load hub"]);
}

#[test]
fn a_model_is_loaded_when_its_weights_have_come() {
    let mut start = Start::without(&[takes("a", 30), from_hub()], &["hub"]);
    assert_eq!(start.ordered(), ["load a"]);
    start.ready("a");
    start.event(Event::Fetch { model: "hub".to_owned(), want: 1, report: Box::new(FetchReport::Here) });
    assert_eq!(start.ordered(), ["load hub"]);
}

#[test]
fn a_model_that_waits_for_another_to_leave_is_loaded_when_it_has() {
    let mut start = Start::new(&[]);
    let models = [ModelSpec { preload: false, ..takes("x", 60) }, takes("b", 50), takes("y", 10)];
    start.state = State::new(&models, Knobs::default(), &BTreeMap::new(), 1).on(start.state.inventory.clone());
    start.event(Event::Control(Control::Load("x".to_owned())));
    assert_eq!(start.ordered(), ["load x"]);
    start.event(Event::Control(Control::Unload("x".to_owned())));
    assert_eq!(start.ordered(), ["stop x", "load y"]);
    start.ready("y");
    start.report("x", Report::Stopped { stop_ms: 1 });
    assert_eq!(start.ordered(), ["load b"]);
}

#[test]
fn who_does_not_fit_beside_those_that_are_ready_is_not_loaded_later() {
    let mut start = Start::new(&[takes("a", 30), takes("large", 60), takes("b", 30)]);
    assert_eq!(start.ordered(), ["load a", "load b"]);
    start.ready("a");
    start.event(Event::Control(Control::Unload("a".to_owned())));
    start.report("a", Report::Stopped { stop_ms: 1 });
    start.fails("b", true);
    assert_eq!(start.ordered(), ["stop a"], "the start is over for it, though the GPU is empty");
}

#[test]
fn without_its_gpu_a_model_is_loaded_when_that_comes() {
    let on_cpu = ModelSpec { gpus: 0, memory: Some(GIB), ..takes("cpu", 1) };
    let mut start = Start::new(&[]);
    let none = Inventory::of(&BTreeMap::new(), 8 * GIB);
    start.state = State::new(&[on_cpu, takes("a", 30)], Knobs::default(), &BTreeMap::new(), 1).on(none);
    start.report("a", Report::NoGpu);
    assert_eq!(start.ordered(), ["load cpu"]);
    start.ready("cpu");
    start.event(Event::Devices([(0, 80 * GIB)].into()));
    start.report("a", Report::Available);
    assert_eq!(start.ordered(), ["load a"]);
}

#[test]
fn an_entry_that_does_not_say_so_any_more_is_not_loaded() {
    let old = takes("a", 30);
    let new = ModelSpec { preload: false, ..old.clone() };
    let mut start = Start::new(std::slice::from_ref(&old));
    start.fails("a", false);
    start.orders.clear();
    start.event(Event::Edited(edits(&[old], &[new])));
    start.report("a", Report::Available);
    assert!(start.ordered().is_empty());
}
