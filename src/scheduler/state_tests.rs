use super::*;
use crate::domain::worker::PhaseTime;
use crate::domain::{Face, Launch, ModelKind, Park};
use crate::scheduler::queue::tests::job as base_job;
use std::time::Duration;

pub(super) fn spec(name: &str, limit: u32) -> ModelSpec {
    ModelSpec {
        name: name.to_owned(),
        kind: ModelKind::Text,
        launch: Launch::Command(vec![name.to_owned()]),
        model: None,
        revision: None,
        port: 8001,
        has_own_port: false,
        startup_time: Duration::from_secs(10),
        endpoints: vec!["/v1/chat/completions".to_owned()],
        args: Vec::new(),
        env: BTreeMap::new(),
        aliases: Vec::new(),
        limit,
        max_batch: 1,
        first_batch: 1,
        timeout: Duration::from_secs(60),
        max_attempts: 3,
        idle_ttl: None,
        preload: false,
        gpus: 0,
        memory: None,
        max_replicas: 1,
        pin: false,
        exclusive: false,
        park: Park::Off,
        spare: false,
        upstream_model: name.to_owned(),
        dir: "/".into(),
    }
}

pub(super) fn job(number: i64, model: &str) -> QueuedJob {
    QueuedJob { model: Arc::from(model), ..base_job(number, 5) }
}

/// A world around the state machine: supervisors that obey, workers that answer when told to.
struct World {
    state: State,
    now: Millis,
    running: Vec<(Arc<str>, i64)>,
    loaded: Vec<String>,
    ended: Vec<(i64, ErrorCode)>,
    orders: Vec<(String, Order)>,
}

impl World {
    fn new(models: &[(&str, u32)]) -> Self {
        let specs: Vec<_> = models.iter().map(|(name, limit)| spec(name, *limit)).collect();
        let state = State::new(&specs, Knobs::default(), &BTreeMap::new(), 1);
        Self { state, now: 1_000, running: Vec::new(), loaded: Vec::new(), ended: Vec::new(), orders: Vec::new() }
    }

    fn event(&mut self, event: Event) {
        let mut effects = self.state.on_event(event, self.now);
        effects.extend(self.state.step(self.now));
        self.note(effects);
        assert!(self.loading_or_serving() <= 1, "two models on the device");
    }

    /// An attempt at a job of `a` is given up without a sign of its worker; with how many jobs that is found to hang.
    fn silent(&mut self, number: i64, since: Millis) -> u32 {
        let (jobs, mut effects) = self.state.blame_silence("a", number, since, self.now);
        effects.extend(self.state.step(self.now));
        self.note(effects);
        jobs
    }

    fn loading_or_serving(&self) -> usize {
        self.state.workers.iter().filter(|worker| worker.is_on_device()).count()
    }

    fn note(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Claim { model, run, .. } => {
                    self.running.extend(run.jobs.iter().map(|j| (model.clone(), j.number)))
                }
                Effect::Order { order: Order::Proven, .. } => {}
                Effect::Order { model, order, .. } => self.orders.push((model, order)),
                Effect::EndQueued { numbers, error, .. } => self.ended.extend(numbers.iter().map(|n| (*n, error.code))),
                _ => {}
            }
        }
    }

    fn queue(&mut self, jobs: Vec<QueuedJob>) {
        self.event(Event::Queued(jobs));
    }

    fn report(&mut self, model: &str, report: Report) {
        self.event(Event::Report { model: model.to_owned(), replica: 0, report });
    }

    /// The supervisors carry out what they were ordered, one order at a time.
    fn obey(&mut self) {
        while !self.orders.is_empty() {
            let (model, order) = self.orders.remove(0);
            match order {
                Order::Load | Order::Wake => {
                    self.now += 2_000;
                    self.loaded.push(model.clone());
                    self.report(&model, Report::Ready { base_url: format!("http://{model}"), load_ms: 2_000 });
                }
                Order::Stop | Order::Park | Order::ParkBare => {
                    self.now += 500;
                    self.report(&model, Report::Stopped { stop_ms: 500 });
                }
                Order::Retry | Order::Suspect | Order::Expedite | Order::Proven => {}
            }
        }
    }

    /// Workers answer everything that runs, oldest first, until nothing runs and nobody has orders.
    fn finish_all(&mut self) {
        self.obey();
        while !self.running.is_empty() {
            let (model, number) = self.running.remove(0);
            self.now += 50;
            self.event(Event::Ended { model, number, answered: true, suspect: false, back: None });
            self.obey();
        }
    }
}

#[test]
fn sixty_interleaved_jobs_cost_three_loads() {
    let mut world = World::new(&[("a", 1), ("b", 1), ("c", 1)]);
    for n in 0..60 {
        let model = ["a", "b", "c"][usize::try_from(n % 3).unwrap()];
        world.state.count_arrival(model, world.now);
        world.queue(vec![job(n, model)]);
        world.now += 16;
    }
    world.finish_all();
    assert_eq!(world.loaded.len(), 3, "{:?}", world.loaded);
    assert_eq!((world.state.swaps, world.state.swaps_in_arrival_order), (2, 59));
    assert_eq!(world.state.queued(), 0);
}

#[test]
fn the_old_model_is_stopped_before_the_new_one_loads_and_only_when_dry() {
    let mut world = World::new(&[("a", 4), ("b", 4)]);
    world.queue(vec![job(1, "a")]);
    world.obey();
    world.queue(vec![job(2, "b")]);
    assert!(world.orders.is_empty(), "a still runs job 1");
    world.event(Event::Ended { model: Arc::from("a"), number: 1, answered: true, suspect: false, back: None });
    assert_eq!(world.orders, [("a".to_owned(), Order::Stop)]);
    let b = world.state.index_of("b").unwrap();
    assert_eq!(world.state.holding(b), Holding::Awaiting, "it does not load");
    world.report("a", Report::Stopped { stop_ms: 100 });
    assert_eq!(world.orders.last(), Some(&("b".to_owned(), Order::Load)));
    assert_eq!(world.state.holding(b), Holding::Loading);
}

#[test]
fn the_fast_path_takes_a_free_slot_and_passes_nobody() {
    let mut world = World::new(&[("a", 1), ("b", 1)]);
    assert_eq!(world.state.reserve(&job(1, "a"), world.now), None, "nothing is loaded");
    world.queue(vec![job(1, "a")]);
    world.finish_all();
    assert_eq!(world.state.reserve(&job(2, "a"), world.now).map(|place| place.base_url).as_deref(), Some("http://a"));
    assert_eq!(world.state.reserve(&job(3, "a"), world.now), None, "one slot");
    world.event(Event::Ended { model: Arc::from("a"), number: 2, answered: true, suspect: false, back: None });
    assert_eq!(world.state.reserve(&job(4, "b"), world.now), None, "another model");
    world.event(Event::Stop);
    assert_eq!(world.state.reserve(&job(5, "a"), world.now), None, "stopping");
}

#[test]
fn a_failed_load_tells_sync_callers_at_once_and_keeps_async_jobs() {
    let mut world = World::new(&[("a", 1), ("b", 1)]);
    world.queue(vec![QueuedJob { face: Face::Sync, ..job(1, "a") }, job(2, "a")]);
    let error = JobError::new(ErrorCode::ModelLoadFailed, "no weights\nmore", true);
    world.report("a", Report::LoadFailed { error, retry_at: 11_000, quarantined: false });
    assert_eq!(world.ended, [(1, ErrorCode::ModelLoadFailed)]);
    let learned = &world.state.models[0].learned;
    assert_eq!((learned.load_ms, learned.reload_ms), (None, None), "it is no sample");
    world.event(Event::Gone { model: "old".into(), priority: 5, number: 1 });
    assert!(world.state.refusal("a").is_some(), "new sync calls are refused");
    assert_eq!(world.state.queued(), 1);
    let decision = world.state.decision.clone().unwrap();
    assert_eq!((decision.code, decision.reason.contains("no weights")), ("blocked", true), "{}", decision.reason);
    world.orders.clear();
    world.queue(vec![job(3, "b")]);
    assert_eq!(world.orders, [("b".to_owned(), Order::Load)], "others go on");
    world.finish_all();
    world.report("a", Report::Available);
    world.finish_all();
    assert_eq!((world.state.queued(), world.loaded.as_slice()), (0, ["b".to_owned(), "a".to_owned()].as_slice()));
}

#[test]
fn a_model_that_does_not_fit_waits_without_a_time_until_there_is_room() {
    let mut world = World::new(&[("a", 1)]);
    world.queue(vec![QueuedJob { face: Face::Sync, ..job(1, "a") }, job(2, "a")]);
    let error = JobError::new(ErrorCode::ModelLoadFailed, "it takes 20 GiB", true);
    world.report("a", Report::DoesNotFit { error, free: 0 });
    assert_eq!(world.ended, [(1, ErrorCode::ModelLoadFailed)]);
    let trouble = world.state.models[0].trouble.clone().unwrap();
    assert_eq!((trouble.reason, trouble.until), (StateReason::ModelBlocked, None));
    assert_eq!(trouble.text, "blocked: it takes 20 GiB");
    let said = |world: &World| world.state.models[0].trouble.clone().unwrap().text;
    let error = |text: &str| JobError::new(ErrorCode::ModelLoadFailed, text, true);
    world.report("a", Report::DoesNotFit { error: error("model `a` does not fit: 20 GiB"), free: 0 });
    assert_eq!(said(&world), "it does not fit: 20 GiB", "its name is said already");
    let failed = error("model `a` does not load: no weights");
    world.report("a", Report::LoadFailed { error: failed, retry_at: 9, quarantined: false });
    assert_eq!(said(&world), "its last load failed: no weights");
    let deaths = error("model `a` is not loaded for now: its worker died 3 times in a row");
    world.report("a", Report::BacksOff { error: deaths, retry_at: 9, quarantined: false, deaths: 3 });
    assert_eq!(said(&world), "it is not loaded for now: its worker died 3 times in a row");
    world.report("a", Report::DoesNotFit { error: error("it takes 20 GiB"), free: 0 });
    world.event(Event::Gone { model: "a".into(), priority: 5, number: 1 });
    world.orders.clear();
    world.report("a", Report::Available);
    world.finish_all();
    assert_eq!((world.state.queued(), world.loaded.as_slice()), (0, ["a".to_owned()].as_slice()));
}

#[test]
fn without_a_gpu_jobs_wait_and_go_on_when_one_comes() {
    let mut world = World::new(&[("a", 1)]);
    world.queue(vec![QueuedJob { face: Face::Sync, ..job(1, "a") }]);
    world.report("a", Report::NoGpu);
    assert!(world.ended.is_empty());
    assert_eq!(world.state.models[0].trouble.as_ref().unwrap().reason, StateReason::NoGpu);
    world.orders.clear();
    world.report("a", Report::Available);
    world.finish_all();
    assert_eq!(world.loaded, ["a"]);
}

#[test]
fn a_dead_worker_frees_the_device_and_is_loaded_again_for_its_jobs() {
    let mut world = World::new(&[("a", 4)]);
    world.queue(vec![job(1, "a"), job(2, "a")]);
    world.obey();
    world.report("a", Report::Died { reason: "signal 9".into() });
    assert!(world.orders.is_empty(), "its jobs are not back yet");
    for n in [1, 2] {
        world.event(Event::Ended { model: Arc::from("a"), number: n, answered: false, suspect: true, back: None });
    }
    world.running.clear();
    world.queue(vec![
        QueuedJob { crash: Some(1), was_started: true, ..job(1, "a") },
        QueuedJob { crash: Some(1), was_started: true, ..job(2, "a") },
    ]);
    world.obey();
    assert_eq!(world.running.len(), 1, "isolated jobs run alone");
    world.finish_all();
    assert_eq!((world.loaded.len(), world.state.queued()), (2, 0));
}

#[test]
fn nothing_is_sent_to_a_suspect_worker_until_it_is_seen_alive() {
    let mut world = World::new(&[("a", 2)]);
    world.queue(vec![job(1, "a")]);
    world.obey();
    world.event(Event::Ended { model: Arc::from("a"), number: 1, answered: false, suspect: true, back: None });
    assert_eq!(world.orders.pop(), Some(("a".to_owned(), Order::Suspect)));
    world.running.clear();
    world.queue(vec![job(2, "a")]);
    assert!(world.running.is_empty());
    assert_eq!(world.state.reserve(&job(3, "a"), world.now), None);
    world.report("a", Report::Ready { base_url: "http://a".into(), load_ms: 1 });
    assert_eq!(world.running.len(), 1);
    assert_eq!(world.state.swaps, 0, "being seen alive is no load");
}

#[test]
fn a_worker_that_is_silent_for_the_models_own_limit_is_restarted() {
    let mut world = World::new(&[("a", 1)]);
    world.queue(vec![job(1, "a"), job(2, "a")]);
    world.obey();
    let since = world.now;
    let timed_out =
        |number| Event::Ended { model: Arc::from("a"), number, answered: false, suspect: false, back: None };
    world.now = since + 1_000;
    assert_eq!(world.silent(1, since), 0, "a limit of the client's proves nothing");
    assert_eq!(world.orders, []);
    world.now = since + 60_000;
    assert_eq!(world.silent(1, since), 1);
    world.event(timed_out(1));
    assert_eq!(world.orders.pop(), Some(("a".to_owned(), Order::Stop)));
    world.running.clear();
    world.report("a", Report::Stopped { stop_ms: 1 });
    world.obey();
    assert_eq!(world.running.len(), 1, "the next job runs on the next worker");

    world.now += 1;
    let since = world.now;
    world.finish_all();
    world.queue(vec![job(3, "a")]);
    world.now += 60_000;
    assert_eq!(world.silent(3, since), 0);
    assert_eq!(world.orders, [], "it has answered others in the meantime");
}

#[test]
fn short_limits_and_callers_who_leave_add_up_to_the_models_own_limit() {
    let mut world = World::new(&[("a", 1)]);
    let mut number = 0;
    // A job that is given up after 10 s, a minute after the one before it.
    let mut given_up = |world: &mut World| {
        number += 1;
        world.now += 60_000;
        world.queue(vec![job(number, "a")]);
        world.obey();
        let since = world.now;
        world.now += 10_000;
        let jobs = world.silent(number, since);
        let ended = Event::Ended { model: Arc::from("a"), number, answered: false, suspect: false, back: None };
        world.event(ended);
        world.running.clear();
        jobs
    };
    for _ in 0..5 {
        assert_eq!(given_up(&mut world), 0, "the time in between is nobody's");
    }
    assert_eq!(given_up(&mut world), 2, "it is not the last one's alone");
    assert_eq!(world.orders.pop(), Some(("a".to_owned(), Order::Stop)));
    world.report("a", Report::Stopped { stop_ms: 1 });

    for _ in 0..5 {
        assert_eq!(given_up(&mut world), 0, "it is another one");
    }
    world.now += 1;
    world.queue(vec![job(100, "a")]);
    world.finish_all();
    for _ in 0..5 {
        assert_eq!(given_up(&mut world), 0, "it has answered");
    }
    assert_eq!(world.orders, []);
}

#[test]
fn who_runs_behind_a_cancelled_job_does_not_answer_for_its_hang_and_who_is_tried_again_does() {
    for (first, hung_with) in [(1, 2), (2, 1)] {
        let mut world = World::new(&[("a", 1)]);
        world.queue(vec![job(first, "a")]);
        world.obey();
        let since = world.now;
        world.now += 1_000;
        assert_eq!(world.silent(first, since), 0);
        world.event(Event::Ended { model: Arc::from("a"), number: first, answered: false, suspect: false, back: None });
        world.queue(vec![job(2, "a")]);
        let since = world.now;
        world.now += 60_000;
        assert_eq!(world.silent(2, since), hung_with);
    }
}

#[test]
fn a_worker_that_does_not_let_go_of_a_pass_is_stopped_and_who_is_behind_goes_back() {
    let evicted = |world: &mut World, ms| {
        let event = Event::Report { model: "a".into(), replica: 0, report: Report::GivenUp { ms } };
        let effects = world.state.on_event(event, world.now);
        let numbers = effects.iter().find_map(|effect| match effect {
            Effect::Evict { numbers } => Some(numbers.clone()),
            _ => None,
        });
        world.note(effects);
        numbers
    };
    let mut world = World::new(&[("a", 2)]);
    world.queue(vec![job(1, "a"), job(2, "a"), job(3, "a")]);
    world.obey();
    // Passes of this model are known to take long: twice that is waited, but no longer than a job may take.
    for (service_ms, limit) in [(1_000.0, 10_000), (8_000.0, 16_000), (50_000.0, 60_000)] {
        world.state.models[0].learned.service_ms = Some(service_ms);
        assert_eq!(evicted(&mut world, limit - 1), None, "{service_ms}");
    }
    assert_eq!(evicted(&mut world, 60_000), Some(vec![1, 2]));
    assert_eq!(evicted(&mut world, 62_000), None, "once");
    assert_eq!(world.orders, [], "its jobs end first");
    for number in [1, 2] {
        let back = Some(Back::default());
        world.event(Event::Ended { model: Arc::from("a"), number, answered: false, suspect: false, back });
    }
    assert_eq!(world.orders, [("a".to_owned(), Order::Stop)]);
    world.running.clear();
    world.report("a", Report::Stopped { stop_ms: 1 });
    world.obey();
    assert_eq!(world.running, [(Arc::from("a"), 1), (Arc::from("a"), 2)]);
    // Nothing is behind it.
    world.finish_all();
    world.state.models[0].learned.service_ms = None;
    assert_eq!(evicted(&mut world, 10_000), None);
    assert_eq!(world.orders, [("a".to_owned(), Order::Stop)]);
}

#[test]
fn a_hang_is_told_to_all_that_shared_the_worker_as_they_are_given_up() {
    let mut world = World::new(&[("a", 3)]);
    world.queue(vec![job(1, "a"), job(2, "a"), job(3, "a"), job(4, "a")]);
    world.obey();
    let since = world.now;
    world.now += 60_000;
    for number in 1..=3 {
        assert_eq!(world.silent(number, since), 3, "job {number}");
        world.event(Event::Ended { model: Arc::from("a"), number, answered: false, suspect: false, back: None });
    }
    assert_eq!(world.orders, [("a".to_owned(), Order::Stop)]);
}

#[test]
fn a_hung_worker_is_stopped_and_not_parked() {
    let on_gpu = |name| ModelSpec { gpus: 1, memory: Some(50 << 30), park: Park::Ram, ..spec(name, 1) };
    let inventory =
        Inventory { gpus: vec![80 << 30], cpu: None, host: 64 << 30, one_at_a_time: false, gone: Default::default() };
    let mut world = World::new(&[]);
    world.state = State::new(&[on_gpu("a"), on_gpu("b")], Knobs::default(), &BTreeMap::new(), 1).on(inventory);
    world.queue(vec![job(1, "a")]);
    world.obey();
    world.finish_all();
    world.queue(vec![job(2, "b")]);
    assert_eq!(world.orders.first(), Some(&("a".to_owned(), Order::Park)), "one that is well is parked");
    world.obey();
    world.finish_all();
    world.queue(vec![job(3, "a")]);
    world.obey();
    let since = world.now;
    world.now += 60_000;
    assert_eq!(world.silent(3, since), 1);
    world.event(Event::Ended { model: Arc::from("a"), number: 3, answered: false, suspect: false, back: None });
    assert_eq!(world.orders, [("a".to_owned(), Order::Stop)]);
}

#[test]
fn a_worker_that_loads_is_not_blamed_for_the_silence_of_the_one_before_it() {
    let mut world = World::new(&[("a", 1)]);
    world.queue(vec![job(1, "a"), job(2, "a")]);
    world.obey();
    let since = world.now;
    world.now += 60_000;
    world.report("a", Report::Died { reason: "killed".into() });
    assert_eq!(world.orders, [("a".to_owned(), Order::Load)]);
    assert_eq!(world.silent(1, since), 0);
    world.obey();
    assert_eq!(world.silent(1, world.now), 0, "nor has it been marked");
}

/// `a` was ordered to come back from host memory for job 3, and `b` is parked in its stead.
fn waking() -> World {
    waking_with(1)
}

/// The same with so many slots.
fn waking_with(limit: u32) -> World {
    let on_gpu = |name| ModelSpec { gpus: 1, memory: Some(50 << 30), park: Park::Ram, ..spec(name, limit) };
    let inventory =
        Inventory { gpus: vec![80 << 30], cpu: None, host: 64 << 30, one_at_a_time: false, gone: Default::default() };
    let mut world = World::new(&[]);
    world.state = State::new(&[on_gpu("a"), on_gpu("b")], Knobs::default(), &BTreeMap::new(), 1).on(inventory);
    world.queue(vec![job(1, "a")]);
    world.finish_all();
    for (number, model, other) in [(2, "b", "a"), (3, "a", "b")] {
        world.queue(vec![job(number, model)]);
        assert_eq!(std::mem::take(&mut world.orders), [(other.to_owned(), Order::Park)]);
        world.report(other, Report::Parked { park_ms: 10 });
        if model == "b" {
            world.finish_all();
        }
    }
    assert_eq!(std::mem::take(&mut world.orders), [("a".to_owned(), Order::Wake)]);
    assert!(world.state.is_waking(0, 0));
    world
}

fn ready(load_ms: i64) -> Report {
    Report::Ready { base_url: "http://a".into(), load_ms }
}

#[test]
fn a_parked_worker_that_died_before_it_heard_that_it_is_wanted_is_loaded_by_the_same_order() {
    let mut world = waking();
    world.report("a", Report::Died { reason: "killed".into() });
    assert_eq!(world.orders, [], "its supervisor follows the order to wake");
    assert!(world.state.is_loading(0, 0) && !world.state.is_waking(0, 0));
    world.report("a", ready(2_000));
    assert_eq!(world.running, [(Arc::from("a"), 3)]);
}

#[test]
fn a_wake_that_turns_into_a_cold_load_counts_as_one() {
    let mut world = waking();
    let before = world.state.models[0].load_ms(Source::Copy);
    world.report("a", Report::Loading { phase: None, percent: None });
    assert!(!world.state.is_waking(0, 0));
    world.report("a", ready(2_000));
    assert!(world.state.models[0].load_ms(Source::Copy) >= before, "a wake is not expected to be quick for that");
    assert_eq!(world.running, [(Arc::from("a"), 3)]);
}

#[test]
fn a_model_of_which_nobody_knows_the_size_is_not_parked() {
    let on_gpu = |name| ModelSpec { gpus: 1, memory: None, park: Park::Ram, ..spec(name, 1) };
    let inventory =
        Inventory { gpus: vec![80 << 30], cpu: None, host: 64 << 30, one_at_a_time: false, gone: Default::default() };
    let mut world = World::new(&[]);
    world.state = State::new(&[on_gpu("a"), on_gpu("b")], Knobs::default(), &BTreeMap::new(), 1).on(inventory);
    world.queue(vec![job(1, "a")]);
    world.finish_all();
    world.queue(vec![job(2, "b")]);
    assert_eq!(world.orders, [("a".to_owned(), Order::Stop)]);
    let said = world.state.history.iter().any(|decision| decision.reason.contains("nobody has told yet"));
    assert!(said, "{:?}", world.state.history);
}

#[test]
fn overdue_jobs_end_with_the_code_that_tells_whether_they_were_started() {
    let mut world = World::new(&[("a", 1)]);
    world.report("a", Report::NoGpu);
    let never = QueuedJob { start_deadline: Some(5_000), ..job(1, "a") };
    let started = QueuedJob { deadline: Some(5_000), was_started: true, ..job(2, "a") };
    let later = QueuedJob { start_deadline: Some(5_000), was_started: true, ..job(3, "a") };
    world.queue(vec![never, started, later]);
    assert_eq!(world.state.wake_at(), Some(5_000));
    world.now = 5_000;
    let effects = world.state.step(world.now);
    world.note(effects);
    assert_eq!(world.ended, [(1, ErrorCode::QueueDeadlineExceeded), (2, ErrorCode::DeadlineExceeded)]);
    assert_eq!(world.state.queued(), 1);
}

#[test]
fn a_stop_starts_nothing_and_is_quiet_when_the_running_jobs_have_ended() {
    let mut world = World::new(&[("a", 1), ("b", 1)]);
    world.queue(vec![job(1, "a"), job(2, "a"), job(3, "b")]);
    world.obey();
    world.event(Event::Stop);
    assert!(!world.state.is_quiet());
    world.event(Event::Ended { model: Arc::from("a"), number: 1, answered: true, suspect: false, back: None });
    assert!(world.state.is_quiet());
    assert_eq!((world.running.len(), world.state.queued()), (1, 2), "the rest waits for the next start");
}

#[test]
fn jobs_of_a_model_that_is_gone_from_the_file_wait_and_say_so() {
    let mut world = World::new(&[("a", 1)]);
    world.queue(vec![job(1, "old")]);
    let reason = world.state.decision.clone().unwrap().reason;
    assert!(reason.contains("`old` is not in models.yaml any more"), "{reason}");
    world.event(Event::Gone { model: "old".into(), priority: 5, number: 1 });
    assert_eq!(world.state.queued(), 0);
}

#[test]
fn a_worker_that_gets_ready_when_nobody_wants_it_any_more_is_stopped() {
    let mut world = World::new(&[("a", 1), ("b", 1)]);
    world.queue(vec![job(1, "a")]);
    world.orders.clear();
    world.report("b", Report::Ready { base_url: "http://b".into(), load_ms: 1 });
    assert_eq!(world.orders, [("b".to_owned(), Order::Stop)]);
}

#[test]
fn standing_counts_the_jobs_and_swaps_before() {
    let mut world = World::new(&[("a", 1), ("b", 1)]);
    world.queue(vec![job(1, "a"), job(2, "a"), job(3, "a"), job(4, "b")]);
    world.obey();
    assert_eq!(world.state.standing("a", 5, 3), Some((1, 1, 0)), "job 1 runs, job 2 is before");
    assert_eq!(world.state.standing("b", 5, 4), Some((2, 0, 1)));
    assert_eq!(world.state.standing("a", 5, 99), None);
}

#[test]
fn a_start_is_foretold_to_the_first_who_waits_right_after_another_one_asked() {
    let mut world = World::new(&[("a", 1), ("b", 1)]);
    world.queue(vec![job(1, "a"), job(2, "b")]);
    world.obey();
    assert!(world.state.expected("b", 5, 2, world.now).is_some());
    world.queue(vec![job(3, "a")]);
    assert!(world.state.expected("a", 5, 3, world.now).is_some());
    // And to the first caller beside those who are in no hurry.
    world.queue(vec![QueuedJob { priority: 7, ..job(4, "a") }]);
    assert!(world.state.expected("a", 7, 4, world.now).is_some());
}

#[test]
fn a_pause_ends_though_the_wall_clock_was_set_back() {
    let mut world = World::new(&[("a", 1)]);
    let in_an_hour = world.now + 3_600_000;
    world.queue(vec![QueuedJob { not_before: Some(in_an_hour), was_started: true, ..job(1, "a") }]);
    assert!(world.loaded.is_empty(), "it does wait");
    let wake = world.state.wake_at().expect("a time");
    assert_eq!(wake, world.now + crate::policy::retry::PAUSE_MAX_MS);
}

#[test]
fn limits_count_waiting_jobs_by_tenant() {
    let mut world = World::new(&[("a", 1)]);
    world.state.knobs.queued_per_tenant_max = 2;
    world.queue(vec![job(1, "a"), job(2, "a")]);
    assert!(world.state.admit("default", 1).is_err());
    assert!(world.state.admit("other", 2).is_ok());
    world.event(Event::Gone { model: "a".into(), priority: 5, number: 2 });
    assert!(world.state.admit("default", 1).is_ok());
}

#[test]
fn a_worker_is_suspected_once_however_many_jobs_it_takes_along() {
    let mut world = World::new(&[("a", 200)]);
    world.queue((1..=200).map(|n| job(n, "a")).collect());
    world.obey();
    for n in 1..=150 {
        world.event(Event::Ended { model: Arc::from("a"), number: n, answered: false, suspect: true, back: None });
    }
    assert_eq!(world.orders, [("a".to_owned(), Order::Suspect)]);
}

#[test]
fn a_stop_that_crossed_with_a_death_does_not_free_a_device_that_loads_again() {
    let mut world = World::new(&[("a", 1), ("b", 1)]);
    world.queue(vec![job(1, "a")]);
    world.orders.clear();
    world.report("a", Report::Stopped { stop_ms: 0 });
    world.queue(vec![job(2, "b")]);
    assert!(world.orders.is_empty(), "a still loads: {:?}", world.orders);
}

#[test]
fn a_suspect_that_is_seen_alive_while_it_drains_may_finish_its_jobs() {
    let mut world = World::new(&[("a", 2), ("b", 1)]);
    world.queue(vec![job(1, "a"), job(2, "a")]);
    world.obey();
    world.state.workers[0].phase = Phase::Draining { hung: false };
    world.report("a", Report::Ready { base_url: "http://a".into(), load_ms: 0 });
    assert!(world.orders.is_empty(), "two jobs still run: {:?}", world.orders);
    for n in [1, 2] {
        world.event(Event::Ended { model: Arc::from("a"), number: n, answered: true, suspect: false, back: None });
    }
    assert_eq!(world.orders, [("a".to_owned(), Order::Stop)]);
}

#[test]
fn a_clock_that_jumps_takes_no_job_from_its_worker_and_loses_no_pause() {
    let mut world = World::new(&[("a", 4)]);
    world.queue(vec![job(1, "a"), job(2, "a")]);
    world.obey();
    assert_eq!(world.running.len(), 2);
    let back = Some(Back { not_before: Some(world.now + 2_000), crash: None });
    world.event(Event::Ended { model: Arc::from("a"), number: 1, answered: false, suspect: false, back });
    assert_eq!(world.state.wake_at(), Some(world.now + 2_000));
    // Back between two runs of the server: the pause lasts longer, and nobody else is touched.
    world.now -= 900;
    world.event(Event::Queued(Vec::new()));
    assert_eq!((world.running.len(), world.state.queued()), (2, 1));
    // A day forward: the pause is over, and what runs goes on running.
    world.now += 86_400_000;
    world.event(Event::Queued(Vec::new()));
    assert_eq!(world.running.iter().map(|(_, number)| *number).collect::<Vec<_>>(), [1, 2, 1], "one more claim");
    assert_eq!((world.state.queued(), world.orders.len(), world.ended.len()), (0, 0, 0));
}

#[test]
fn a_waiting_job_says_why_and_when_it_should_start() {
    let mut world = World::new(&[("a", 1), ("b", 1)]);
    world.queue((1..=30).map(|n| job(n, "a")).chain([job(40, "b")]).collect());
    let told = |world: &mut World, model: &str, number: i64| {
        let ahead = world.state.standing(model, 5, number).map(|standing| standing.1);
        let expected = world.state.expected(model, 5, number, world.now);
        (expected, world.state.why(model, ahead, expected, world.now).unwrap())
    };
    let (loading, why) = told(&mut world, "a", 2);
    assert_eq!(why, "load a: the device is free; 30 pending");
    assert!(loading.unwrap().about > world.now, "a load is before it");
    world.obey();
    let (third, why) = told(&mut world, "a", 4);
    assert!(why.starts_with("job queued: 3rd for a; a is loaded; expected start in "), "{why}");
    let (last, _) = told(&mut world, "a", 30);
    let (other, why) = told(&mut world, "b", 40);
    assert!(why.starts_with("stay on a: 29 pending, swap costs "), "the latest decision about it: {why}");
    let (third, last, other) = (third.unwrap(), last.unwrap(), other.unwrap());
    assert!(third.from <= third.about && third.about <= third.to);
    assert!(third.about < last.about && last.about < other.about, "{third:?} {last:?} {other:?}");
    assert_eq!(world.state.expected("b", 5, 41, world.now), None, "no such job");
}

#[test]
fn more_work_than_the_box_can_do_is_said_when_it_lasts() {
    let mut world = World::new(&[("a", 1)]);
    let arrive = |world: &mut World, n: i64| {
        world.now += 1_000;
        world.state.count_arrival("a", world.now);
        world.queue(vec![job(n, "a")]);
        world.obey();
    };
    (0..600).for_each(|n| arrive(&mut world, n));
    assert_eq!(world.state.overload(world.now), None, "not for long");
    (600..1_200).for_each(|n| arrive(&mut world, n));
    let asked = world.state.overload(world.now).unwrap();
    assert!((2.0..3.5).contains(&asked), "3 s of work come each second: {asked}");
    let said: Vec<_> = world.state.decisions().filter(|decision| decision.code == "overloaded").collect();
    assert_eq!(said.len(), 1, "once");
    assert!(
        said[0].reason.starts_with("overloaded: 2.") || said[0].reason.starts_with("overloaded: 3"),
        "{}",
        said[0].reason
    );
    world.now += 3_600_000;
    world.queue(vec![job(2_000, "a")]);
    assert_eq!(world.state.overload(world.now), None, "nothing has come for an hour");
}

#[test]
fn ranges_are_as_wide_as_estimates_were_wrong() {
    let mut world = World::new(&[("a", 1)]);
    world.queue((1..=200).map(|n| job(n, "a")).collect());
    world.obey();
    let width = |world: &mut World| {
        let at = world.state.expected("a", 5, world.running[0].1 + 3, world.now).unwrap();
        (at.to - at.from) as f64 / (at.about - world.now) as f64
    };
    let before = width(&mut world);
    // All take the same time: estimates hold.
    for _ in 0..150 {
        let next = world.running[0].1 + 3;
        world.state.expected("a", 5, next, world.now);
        let (model, number) = world.running.remove(0);
        world.now += 3_000;
        world.event(Event::Ended { model, number, answered: true, suspect: false, back: None });
    }
    let after = width(&mut world);
    assert!(after < before / 2.0, "{before} {after}");
}

#[test]
fn nobody_knows_when_a_model_without_a_gpu_starts_its_jobs() {
    let mut world = World::new(&[("a", 1), ("b", 1)]);
    world.queue(vec![job(1, "a"), job(2, "b")]);
    assert!(world.state.expected("b", 5, 2, world.now).is_some());
    world.report("b", Report::NoGpu);
    let standing = world.state.standing("b", 5, 2).unwrap();
    assert_eq!((standing.1, world.state.expected("b", 5, 2, world.now)), (0, None));
}

#[test]
fn a_model_that_no_device_could_hold_is_refused_with_what_is_missing() {
    const GIB: u64 = 1 << 30;
    let on = |gpus: u32, memory: Option<u64>| ModelSpec { gpus, memory, ..spec("big", 1) };
    let refused = |big: ModelSpec, there: &[u64]| {
        let state = State::new(&[big, spec("b", 1)], Knobs::default(), &BTreeMap::new(), 1);
        let mut state = state.on(Inventory::one_at_a_time(there.to_vec()));
        assert_eq!(state.refuse_too_big("b", 5), None);
        let error = state.refuse_too_big("big", 5)?;
        assert_eq!(error.code, ErrorCode::NoWorkerForModel);
        let kept = state.decisions().next().unwrap();
        assert_eq!((kept.at, kept.action, kept.code, &kept.reason), (5, "refuse", "too_big", &error.message));
        assert_eq!((kept.model.as_deref(), kept.numbers["box_gpus"]), (Some("big"), there.len() as f64));
        Some(error.message)
    };
    let what_to_do = "use a larger box, or lower `gpus` or `memory` of the model in models.yaml";
    assert_eq!(
        refused(on(1, Some(100 * GIB)), &[24 * GIB, 80 * GIB]).unwrap(),
        format!(
            "big can never be loaded: it needs a GPU with 100 GiB, and this box has 2 GPUs of at most 80 GiB; {what_to_do}"
        )
    );
    assert_eq!(
        refused(on(4, None), &[80 * GIB]).unwrap(),
        format!("big can never be loaded: it needs 4 GPUs, and this box has 1; {what_to_do}")
    );
    assert_eq!(refused(on(1, Some(60 * GIB)), &[24 * GIB, 80 * GIB]), None, "one of them is enough");
    assert_eq!(refused(on(2, Some(60 * GIB)), &[80 * GIB; 2]), None);
    assert_eq!(refused(on(8, Some(900 * GIB)), &[]), None, "a driver that tells of no GPU may find one");
    assert_eq!(refused(on(0, Some(900 * GIB)), &[GIB]), None, "the memory of a CPU is not known");
}

#[test]
fn a_gpu_that_comes_and_goes_makes_no_model_smaller() {
    let big = ModelSpec { gpus: 2, ..spec("big", 1) };
    let mut world = World::new(&[("b", 1)]);
    let state = State::new(&[big, spec("b", 1)], Knobs::default(), &BTreeMap::new(), 1);
    world.state = state.on(Inventory::one_at_a_time(vec![1 << 30]));
    world.queue(vec![job(1, "big")]);
    for report in [Report::NoGpu, Report::Available] {
        world.report("big", report);
        assert!(world.state.refuse_too_big("big", world.now).is_some());
        assert!(world.orders.is_empty());
        let reason = &world.state.decision.as_ref().unwrap().reason;
        assert!(reason.contains("it needs 2 GPUs, and this box has 1"), "{reason}");
    }
    world.queue(vec![job(2, "b")]);
    world.finish_all();
    assert_eq!(world.loaded, ["b"]);
}

fn by_hand(world: &mut World, control: Control) {
    world.event(Event::Control(control));
}

#[test]
fn of_a_pause_of_all_it_is_said_that_only_a_resume_of_all_ends_it() {
    let mut world = World::new(&[("a", 1), ("b", 1)]);
    by_hand(&mut world, Control::Pause(Some("a".into())));
    by_hand(&mut world, Control::Pause(None));
    world.queue(vec![job(1, "a"), job(2, "a")]);
    let words = "a waits: it is paused with 2 jobs; `roundhouse queue resume` lets them start";
    assert_eq!(world.state.why("a", Some(0), None, 0).as_deref(), Some(words));
    assert_eq!(world.state.decision.clone().map(|decision| decision.reason).as_deref(), Some(words));
}

#[test]
fn nothing_starts_while_paused_and_a_paused_model_asks_for_no_device() {
    let mut world = World::new(&[("a", 1), ("b", 1)]);
    by_hand(&mut world, Control::Pause(Some("a".into())));
    world.queue(vec![job(1, "a")]);
    world.finish_all();
    assert!(world.loaded.is_empty(), "{:?}", world.loaded);
    let decision = world.state.decision.clone().unwrap();
    assert_eq!((decision.code, decision.model.as_deref()), ("paused", Some("a")), "{decision:?}");
    let words = "a waits: it is paused with 1 job; `roundhouse queue resume --model a` lets them start";
    assert_eq!(decision.reason, words);
    assert_eq!(world.state.why("a", Some(0), None, 0).as_deref(), Some(words));
    world.queue(vec![job(2, "b")]);
    world.finish_all();
    assert_eq!((&world.loaded[..], world.state.queued()), (&["b".to_owned()][..], 1));
    by_hand(&mut world, Control::Pause(None));
    let next = world.state.reserve(&job(3, "b"), world.now);
    assert!(next.is_none(), "the fast path starts nothing either");
    by_hand(&mut world, Control::Resume(None));
    world.finish_all();
    assert_eq!((world.loaded.len(), world.state.queued()), (2, 0));
    let said: Vec<_> = world.state.history.iter().filter(|d| d.code == "manual").map(|d| d.action).collect();
    assert_eq!(said, ["resume", "pause", "pause"], "what was done by hand is a decision");
}

#[test]
fn a_model_asked_for_by_hand_comes_without_a_job_and_leaves_when_told_to() {
    let mut world = World::new(&[("a", 1), ("b", 1)]);
    world.queue(vec![job(1, "b")]);
    world.finish_all();
    by_hand(&mut world, Control::Load("a".into()));
    world.finish_all();
    assert_eq!(world.loaded, ["b", "a"]);
    by_hand(&mut world, Control::Load("a".into()));
    assert!(world.orders.is_empty(), "it is there");
    by_hand(&mut world, Control::Unload("a".into()));
    assert_eq!(world.orders, [("a".to_owned(), Order::Stop)]);
    world.finish_all();
    assert!(world.state.workers.is_empty(), "{:?}", world.state.workers);
}

#[test]
fn an_unload_waits_for_running_jobs_and_breaks_a_load_off() {
    let mut world = World::new(&[("a", 1)]);
    world.queue(vec![job(1, "a"), job(2, "a")]);
    by_hand(&mut world, Control::Unload("a".into()));
    let order = |order| ("a".to_owned(), order);
    assert_eq!(world.orders, [order(Order::Load), order(Order::Stop)], "it may never be ready");
    world.orders.clear();
    // It has been ready just before it heard that.
    world.report("a", Report::Ready { base_url: "http://a".into(), load_ms: 2_000 });
    assert_eq!((world.orders.len(), world.running.len()), (0, 0), "it leaves all the same");
    world.report("a", Report::Stopped { stop_ms: 10 });
    assert_eq!(world.orders, [order(Order::Load)], "its jobs wait, so it comes back");
    world = World::new(&[("a", 1)]);
    world.queue(vec![job(1, "a")]);
    world.obey();
    by_hand(&mut world, Control::Unload("a".into()));
    assert!(world.orders.is_empty(), "job 1 runs");
    world.event(Event::Ended { model: Arc::from("a"), number: 1, answered: true, suspect: false, back: None });
    assert_eq!(world.orders, [("a".to_owned(), Order::Stop)]);
}

#[test]
fn a_pin_by_hand_keeps_others_out_until_it_is_undone() {
    let mut world = World::new(&[("a", 1), ("b", 1)]);
    world.queue(vec![job(1, "a")]);
    world.finish_all();
    by_hand(&mut world, Control::Pin("a".into()));
    world.queue(vec![job(2, "b")]);
    world.now += 3_600_000;
    world.finish_all();
    assert_eq!(world.loaded, ["a"]);
    by_hand(&mut world, Control::Unpin("a".into()));
    world.finish_all();
    assert_eq!(world.loaded, ["a", "b"]);
}

#[test]
fn a_purge_takes_what_waits_and_nothing_that_runs_or_came_later() {
    let mut world = World::new(&[("a", 1), ("b", 1)]);
    world.queue(vec![job(1, "a"), job(2, "a"), job(3, "b")]);
    world.obey();
    assert_eq!(world.running.len(), 1);
    world.queue(vec![job(4, "a")]);
    let effects = world.state.on_event(Event::Purge { model: Some("a".into()), before: 4 }, world.now);
    assert_eq!(effects, [Effect::CancelQueued(vec![2])]);
    assert_eq!(world.state.queued(), 2);
    assert!(world.state.on_event(Event::Purge { model: Some("a".into()), before: 4 }, world.now).is_empty());
    let effects = world.state.on_event(Event::Purge { model: None, before: 5 }, world.now);
    assert_eq!(effects, [Effect::CancelQueued(vec![4, 3])]);
    world.finish_all();
    assert_eq!((world.state.queued(), world.state.by_tenant.len()), (0, 0));
}

#[path = "canary_tests.rs"]
mod canary;

#[path = "outdated_tests.rs"]
mod outdated;
