//! Scripts of GPUs that vanish and come back, on a box with several.

use std::collections::BTreeMap;

use super::tests::{job, spec};
use super::*;
use crate::policy::Knobs;

const GIB: u64 = 1 << 30;

struct Case {
    state: State,
    now: Millis,
    effects: Vec<Effect>,
}

impl Case {
    fn new(models: Vec<ModelSpec>, gpus: &[u32]) -> Self {
        let state = State::new(&models, Knobs::default(), &BTreeMap::new(), 1);
        let mut this = Self { state: state.on(Inventory::of(&seen(gpus), 8 * GIB)), now: 1_000, effects: Vec::new() };
        this.step();
        this
    }

    fn step(&mut self) {
        let mut more = self.state.step(self.now);
        self.effects.append(&mut more);
        self.now += 10;
    }

    fn tell(&mut self, event: Event) {
        self.effects.clear();
        self.effects = self.state.on_event(event, self.now);
        self.step();
    }

    fn queue(&mut self, jobs: Vec<QueuedJob>) {
        self.tell(Event::Queued(jobs));
    }

    fn report(&mut self, model: &str, replica: u32, report: Report) {
        self.tell(Event::Report { model: model.to_owned(), replica, report });
    }

    fn ready(&mut self, model: &str, replica: u32) {
        self.report(model, replica, Report::Ready { base_url: format!("http://{model}/{replica}"), load_ms: 5 });
    }

    fn see(&mut self, gpus: &[u32]) {
        self.tell(Event::Devices(seen(gpus)));
    }

    /// Orders since the last event: model, worker, where, what.
    fn orders(&self) -> Vec<(String, u32, String, Order)> {
        let order = |effect: &Effect| match effect {
            Effect::Order { order: Order::Proven, .. } => None,
            Effect::Order { model, replica, set, order, .. } => {
                Some((model.clone(), *replica, set.to_string(), *order))
            }
            _ => None,
        };
        self.effects.iter().filter_map(order).collect()
    }

    fn claimed(&self) -> Vec<i64> {
        let numbers = |effect: &Effect| match effect {
            Effect::Claim { run, .. } => run.jobs.iter().map(|job| job.number).collect(),
            _ => Vec::new(),
        };
        self.effects.iter().flat_map(numbers).collect()
    }

    fn reason(&self, model: &str) -> Option<StateReason> {
        self.state.models[self.state.index_of(model).unwrap()].trouble.as_ref().map(|trouble| trouble.reason)
    }
}

fn seen(gpus: &[u32]) -> BTreeMap<u32, u64> {
    gpus.iter().map(|gpu| (*gpu, 80 * GIB)).collect()
}

fn on(gpus: u32, name: &str) -> ModelSpec {
    ModelSpec { gpus, ..spec(name, 2) }
}

fn order(model: &str, replica: u32, set: &str, order: Order) -> (String, u32, String, Order) {
    (model.to_owned(), replica, set.to_owned(), order)
}

#[test]
fn models_are_loaded_side_by_side_and_those_on_the_cpu_beside_them() {
    let mut on_box = Case::new(vec![on(1, "a"), on(1, "b"), on(2, "pair"), on(0, "cpu")], &[0, 1, 2, 3]);
    on_box.queue(vec![job(1, "pair"), job(2, "a"), job(3, "b"), job(4, "cpu")]);
    let mut orders = on_box.orders();
    orders.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(orders.len(), 4, "{orders:?}");
    assert_eq!(orders[2], order("cpu", 0, "gpu4", Order::Load), "the CPU comes after the GPUs");
    let pair = &orders[3].2;
    assert!(pair == "gpu0-1" || pair == "gpu2-3", "{pair}");
    assert!(orders[0].2 != orders[1].2 && !["gpu0-1", "gpu2-3"].contains(&orders[0].2.as_str()), "{orders:?}");
}

#[test]
fn jobs_on_a_gpu_that_vanishes_go_back_and_its_worker_leaves() {
    let mut on_box = Case::new(vec![on(1, "a"), on(1, "b")], &[0, 1]);
    on_box.queue(vec![job(1, "a"), job(2, "a"), job(3, "b")]);
    on_box.ready("a", 0);
    assert_eq!(on_box.claimed(), [1, 2]);
    on_box.ready("b", 0);
    // A third job of `a` keeps it wanted; `b` is busy on the other GPU.
    on_box.see(&[1]);
    assert_eq!(on_box.effects[0], Effect::Evict { numbers: vec![1, 2] });
    assert_eq!(on_box.orders(), [], "its jobs end first");
    assert_eq!(on_box.reason("a"), None, "another GPU could hold it");
    for number in [1, 2] {
        let back = Some(Back::default());
        on_box.tell(Event::Ended { model: Arc::from("a"), number, answered: false, suspect: false, back });
    }
    assert_eq!(on_box.orders(), [order("a", 0, "gpu0", Order::Stop)]);
    on_box.report("a", 0, Report::Stopped { stop_ms: 5 });
    assert_eq!(on_box.orders(), [], "the only GPU is busy with b");
    on_box.see(&[0, 1]);
    assert_eq!(on_box.orders(), [order("a", 0, "gpu0", Order::Load)]);
    on_box.ready("a", 0);
    assert_eq!(on_box.claimed(), [1, 2]);
}

#[test]
fn a_model_without_enough_gpus_waits_for_them_and_others_go_on() {
    let mut on_box = Case::new(vec![on(2, "pair"), on(1, "a")], &[0, 1]);
    on_box.queue(vec![job(1, "pair")]);
    assert_eq!(on_box.orders(), [order("pair", 0, "gpu0-1", Order::Load)]);
    on_box.see(&[0]);
    assert_eq!(on_box.orders(), [order("pair", 0, "gpu0-1", Order::Stop)], "the load is broken off");
    assert_eq!((on_box.reason("pair"), on_box.reason("a")), (Some(StateReason::NoGpu), None));
    assert_eq!(on_box.state.refuse_too_big("pair", 5), None, "they may come back");
    on_box.report("pair", 0, Report::Stopped { stop_ms: 5 });
    on_box.report("pair", 0, Report::Available);
    assert_eq!(on_box.reason("pair"), Some(StateReason::NoGpu), "a supervisor knows nothing of sets");
    on_box.queue(vec![job(2, "a")]);
    assert_eq!(on_box.orders(), [order("a", 0, "gpu0", Order::Load)]);
    on_box.ready("a", 0);
    let model = Arc::from("a");
    on_box.tell(Event::Ended { model, number: 2, answered: true, suspect: false, back: None });
    on_box.see(&[0, 1]);
    assert_eq!(on_box.reason("pair"), None);
    assert_eq!(on_box.orders(), [order("a", 0, "gpu0", Order::Stop)], "a is dry");
}

#[test]
fn a_box_that_sees_its_first_gpu_late_keeps_its_cpu_worker() {
    let mut on_box = Case::new(vec![on(0, "cpu"), on(1, "a")], &[]);
    assert_eq!((on_box.reason("cpu"), on_box.reason("a")), (None, Some(StateReason::NoGpu)));
    on_box.queue(vec![job(1, "cpu"), job(2, "a")]);
    assert_eq!(on_box.orders(), [order("cpu", 0, "gpu0", Order::Load)], "the only device");
    on_box.ready("cpu", 0);
    on_box.see(&[0]);
    assert_eq!(on_box.orders(), [order("a", 0, "gpu0", Order::Load)]);
    assert_eq!(on_box.state.workers[0].set, GpuSet::one(1));
    on_box.ready("a", 0);
    assert_eq!(on_box.claimed(), [2]);
}

#[test]
fn models_share_a_gpu_when_what_they_tell_fits() {
    let mut on_box = Case::new(vec![on(1, "a"), on(1, "b")], &[0]);
    on_box.queue(vec![job(1, "a")]);
    on_box.report("a", 0, Report::Takes { device_bytes: 30 * GIB });
    on_box.ready("a", 0);
    on_box.queue(vec![job(2, "b")]);
    assert_eq!(on_box.orders(), [], "nobody knows what b takes: it would have to have the GPU alone");
    let model: Arc<str> = Arc::from("a");
    on_box.tell(Event::Ended { model, number: 1, answered: true, suspect: false, back: None });
    assert_eq!(on_box.orders(), [order("a", 0, "gpu0", Order::Stop)]);
    on_box.report("a", 0, Report::Stopped { stop_ms: 5 });
    assert_eq!(on_box.orders(), [order("b", 0, "gpu0", Order::Load)]);
    on_box.report("b", 0, Report::Takes { device_bytes: 50 * GIB });
    on_box.ready("b", 0);
    on_box.queue(vec![job(3, "a")]);
    assert_eq!(on_box.orders(), [order("a", 0, "gpu0", Order::Load)], "30 and 50 GiB fit");
    on_box.ready("a", 0);
    assert_eq!(on_box.state.swaps, 1, "b had the place of a, and a stands beside b");
}
