//! Workers that sleep: what comes meanwhile, without a copy of their weights, and once at their load.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

/// Waits until a worker is told something that the hold file keeps it from answering.
async fn until_told(bench: &Bench) {
    until("it is told", || bench.path().join("calls").exists()).await;
}

#[tokio::test]
async fn orders_that_come_while_a_worker_falls_asleep_or_wakes_are_followed() {
    let bench = Bench::new();
    let hold = bench.path().join("hold");
    let mut worker = bench.worker(&["--hold-file", &hold.display().to_string()]);
    worker.load().await;
    std::fs::write(&hold, "").unwrap();
    worker.handle.order(Order::Park);
    until_told(&bench).await;
    worker.handle.order(Order::Retry);
    assert_eq!(worker.next().await, Report::Available, "at once");
    worker.handle.order(Order::Wake);
    std::fs::remove_file(&hold).unwrap();
    assert!(matches!(worker.next().await, Report::Parked { .. }));
    assert!(matches!(worker.next().await, Report::Ready { .. }));
    worker.park().await;
    assert_eq!(bench.calls(), ["/sleep?level=1", "/wake_up", "/sleep?level=1"]);
    std::fs::write(&hold, "").unwrap();
    worker.handle.order(Order::Wake);
    until_told(&bench).await;
    worker.handle.order(Order::Park);
    std::fs::remove_file(&hold).unwrap();
    assert!(matches!(worker.next().await, Report::Ready { .. }));
    assert!(matches!(worker.next().await, Report::Parked { .. }));
    worker.stop().await;
    bench.assert_nothing_left();
}

/// A worker that may be parked in RAM.
fn parks(bench: &Bench, flags: &[&str]) -> Worker {
    bench.supervise(ModelSpec { park: roundhouse::domain::Park::Ram, ..bench.spec(flags) })
}

/// What a worker in this shape is told when it is parked without a copy and woken.
async fn parked_bare(flags: &[&str]) -> Vec<String> {
    let bench = Bench::new();
    let mut worker = parks(&bench, flags);
    worker.load().await;
    worker.handle.order(Order::ParkBare);
    let report = worker.settled().await;
    assert!(matches!(report, Report::Parked { .. }), "{report:?}");
    let view = worker.handle.view();
    assert_eq!((view.state, view.bare), (ModelState::Parked, true));
    worker.handle.order_on(Order::Wake, GpuSet::one(0), Some(7));
    let report = worker.next().await;
    assert!(matches!(report, Report::Ready { .. }), "{report:?}");
    let view = worker.handle.view();
    assert_eq!((view.state, view.bare, view.starts), (ModelState::Resident, false, 1), "the same process");
    worker.stop().await;
    bench.assert_nothing_left();
    bench.calls()
}

#[tokio::test]
async fn a_worker_of_ours_reads_its_weights_again_by_itself() {
    assert_eq!(parked_bare(&[]).await, ["/sleep?level=2", "/wake_up?park_bytes=7"]);
}

#[tokio::test]
async fn vllm_is_told_to_read_its_weights_again() {
    let reload = r#"/collective_rpc {"method":"reload_weights"}"#;
    let calls = ["/sleep?level=2", "/wake_up?tags=weights", reload, "/wake_up?tags=kv_cache"];
    assert_eq!(parked_bare(&["--vllm", "dev"]).await, calls);
}

#[tokio::test]
async fn a_server_that_cannot_be_told_to_read_its_weights_again_is_stopped() {
    let bench = Bench::new();
    let mut worker = parks(&bench, &["--vllm", "old"]);
    worker.load().await;
    worker.handle.order(Order::ParkBare);
    assert!(matches!(worker.settled().await, Report::Stopped { .. }));
    assert_eq!(bench.calls(), [""; 0], "it has not been sent to sleep");
    bench.assert_nothing_left();
}

/// Loads it at leisure; the phases of that.
async fn load_at_leisure(worker: &mut Worker) -> Vec<String> {
    worker.handle.load_at_leisure(GpuSet::one(0), Some(7));
    let mut told = Vec::new();
    loop {
        match worker.next().await {
            Report::Loaded { phases } => told = phases.into_iter().map(|phase| phase.phase).collect(),
            Report::Ready { .. } => return told,
            Report::Loading { .. } | Report::Host(_) => {}
            other => panic!("not ready: {other:?}"),
        }
    }
}

#[tokio::test]
async fn a_worker_sleeps_once_at_its_load_if_nobody_waits_and_its_copy_is_not_there_yet() {
    let bench = Bench::new();
    let mut worker = parks(&bench, &[]);
    assert_eq!(load_at_leisure(&mut worker).await, ["spawn", "load", "rehearsal"]);
    assert_eq!(bench.calls(), ["/sleep?level=1", "/wake_up"]);
    worker.stop().await;
    worker.load().await;
    assert_eq!(bench.calls(), [""; 0], "somebody waits");
    worker.stop().await;
    let mut worker = parks(&bench, &["--host-bytes", "5"]);
    assert_eq!(load_at_leisure(&mut worker).await, ["spawn", "load"], "it has its copy");
    worker.stop().await;
    let mut worker = bench.worker(&[]);
    assert_eq!(load_at_leisure(&mut worker).await, ["spawn", "load"], "it is never parked");
    worker.stop().await;
    assert_eq!(bench.calls(), [""; 0]);
    bench.assert_nothing_left();
}

#[tokio::test]
async fn who_comes_while_it_loads_does_not_wait_for_the_rehearsal() {
    let bench = Bench::new();
    let hang = bench.path().join("hang");
    std::fs::write(&hang, "").unwrap();
    let mut worker = parks(&bench, &["--hang-file", &hang.display().to_string()]);
    worker.handle.load_at_leisure(GpuSet::one(0), Some(7));
    until("it has begun", || !bench.toys().is_empty()).await;
    worker.handle.order(Order::Expedite);
    std::fs::remove_file(&hang).unwrap();
    assert!(matches!(worker.settled().await, Report::Ready { .. }));
    assert_eq!(bench.calls(), [""; 0]);
    worker.stop().await;
}

#[tokio::test]
async fn a_worker_that_does_not_come_back_from_its_rehearsal_is_loaded_anew_and_not_parked() {
    let bench = Bench::new();
    let mut worker = parks(&bench, &["--sleep-fails"]);
    assert_eq!(load_at_leisure(&mut worker).await, ["spawn", "load"]);
    let view = worker.handle.view();
    assert_eq!((view.starts, view.can_park), (2, Some(false)));
    assert!(view.park_note.as_ref().unwrap().contains("/sleep?level=1 answers with status 500"), "{view:?}");
    assert_eq!(bench.calls(), ["/sleep?level=1"]);
    worker.stop().await;
    bench.assert_nothing_left();
}

#[tokio::test]
async fn an_order_to_stop_ends_a_rehearsal_at_once() {
    let bench = Bench::new();
    let hold = bench.path().join("hold");
    std::fs::write(&hold, "").unwrap();
    let mut worker = parks(&bench, &["--hold-file", &hold.display().to_string()]);
    worker.handle.load_at_leisure(GpuSet::one(0), Some(7));
    until_told(&bench).await;
    assert_eq!(worker.handle.view().phase.as_deref(), Some("rehearsal"));
    worker.handle.order(Order::Stop);
    assert!(matches!(worker.settled().await, Report::Stopped { .. }));
    bench.assert_nothing_left();
}

#[tokio::test]
async fn the_death_of_a_parked_worker_is_told_when_the_driver_shows_what_it_kept_free() {
    let (gpus, mut bench, spec) = on_one_gpu();
    bench.tempo.memory_limit = Duration::from_secs(20);
    let mut worker = bench.supervise(spec);
    assert!(matches!(load_on_gpu(&mut worker).await, Report::Ready { .. }));
    worker.park().await;
    let toy = bench.toys()[0];
    kill(Pid::from_raw(toy), Signal::SIGKILL).unwrap();
    until("the toy is gone", || bench.marked().is_empty()).await;
    // As with a real driver, the memory is freed some time later.
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(worker.reports.try_recv().is_err(), "its context is still in use");
    std::fs::remove_file(gpus.path().join(toy.to_string())).unwrap();
    worker.death().await;
    bench.assert_nothing_left();
}

/// A driver that does not answer once: when it is first asked after memory has become free.
struct FailsOnce {
    probe: Arc<dyn GpuProbe>,
    used: Mutex<Option<u64>>,
}

impl FailsOnce {
    /// Whether it fails now, when so much is in use.
    fn fails(&self, now: u64) -> bool {
        let mut used = self.used.lock().unwrap();
        let fails = used.is_some_and(|before| now < before);
        *used = if fails { Some(0) } else { used.map(|before| before.max(now)) };
        fails
    }
}

impl GpuProbe for FailsOnce {
    /// It shows no processes.
    fn gpus(&self) -> Vec<Gpu> {
        let gpus = self.probe.gpus();
        if self.fails(gpus.iter().map(|gpu| gpu.used_bytes).sum()) { Vec::new() } else { gpus }
    }
}

#[tokio::test]
async fn a_driver_that_fails_to_answer_once_does_not_end_a_worker_that_was_parked() {
    let (_gpus, mut bench, spec) = on_one_gpu();
    let driver = Arc::new(FailsOnce { probe: bench.around.gpus.clone(), used: Mutex::new(Some(0)) });
    bench.around.gpus = driver.clone();
    let mut worker = bench.supervise(spec);
    worker.load().await;
    worker.handle.order_on(Order::Park, GpuSet::one(0), None);
    assert_eq!(worker.next().await, Report::Keeps { device_bytes: 700_000_000 });
    assert!(matches!(worker.settled().await, Report::Parked { .. }));
    assert_eq!(*driver.used.lock().unwrap(), Some(700_000_000), "it failed once");
    worker.stop().await;
    bench.assert_nothing_left();
}

#[tokio::test]
async fn a_driver_that_fails_to_answer_once_does_not_cost_a_copy_at_its_wake() {
    let (_gpus, mut bench, spec) = on_one_gpu();
    let driver = Arc::new(FailsOnce { probe: bench.around.gpus.clone(), used: Mutex::new(None) });
    bench.around.gpus = driver.clone();
    let mut worker = bench.supervise(spec);
    assert!(matches!(load_on_gpu(&mut worker).await, Report::Ready { .. }));
    worker.handle.order_on(Order::Park, GpuSet::one(0), None);
    assert!(matches!(worker.settled().await, Report::Parked { .. }));
    // Less is in use than before.
    *driver.used.lock().unwrap() = Some(u64::MAX);
    worker.handle.order_on(Order::Wake, GpuSet::one(0), None);
    let report = worker.settled().await;
    assert!(matches!(report, Report::Ready { .. }), "{report:?}");
    assert_eq!(worker.handle.view().starts, 1, "the same process");
    assert_eq!(*driver.used.lock().unwrap(), Some(5_000_000_000), "it failed once");
    worker.stop().await;
    bench.assert_nothing_left();
}

/// A driver that says nothing any more once it is told to.
struct FallsSilent {
    probe: Arc<dyn GpuProbe>,
    is_silent: AtomicBool,
}

impl FallsSilent {
    fn of(bench: &mut Bench) -> Arc<Self> {
        let driver = Arc::new(Self { probe: bench.around.gpus.clone(), is_silent: AtomicBool::new(false) });
        bench.around.gpus = driver.clone();
        driver
    }
}

impl GpuProbe for FallsSilent {
    fn gpus(&self) -> Vec<Gpu> {
        if self.is_silent.load(Ordering::SeqCst) { Vec::new() } else { self.probe.gpus() }
    }
}

#[tokio::test]
async fn nobody_is_parked_whose_memory_the_driver_does_not_tell_of() {
    let (_gpus, mut bench, spec) = on_one_gpu();
    let driver = FallsSilent::of(&mut bench);
    let mut worker = bench.supervise(spec);
    worker.load().await;
    driver.is_silent.store(true, Ordering::SeqCst);
    worker.handle.order_on(Order::Park, GpuSet::one(0), None);
    assert!(matches!(worker.settled().await, Report::Stopped { .. }));
    bench.assert_nothing_left();
}

/// Puts one that is loaded at leisure to sleep, and wakes it when `meanwhile` has been done.
async fn rehearse(bench: &Bench, mut spec: ModelSpec, meanwhile: impl FnOnce()) -> Worker {
    let hold = bench.path().join("hold");
    std::fs::write(&hold, "").unwrap();
    spec.park = roundhouse::domain::Park::Ram;
    spec.args.extend(["--hold-file".to_owned(), hold.display().to_string()]);
    let worker = bench.supervise(spec);
    worker.handle.load_at_leisure(GpuSet::one(0), Some(7));
    until_told(bench).await;
    meanwhile();
    std::fs::remove_file(&hold).unwrap();
    worker
}

#[tokio::test]
async fn a_rehearsal_of_which_the_driver_tells_nothing_is_not_judged() {
    let (_gpus, mut bench, spec) = on_one_gpu();
    let driver = FallsSilent::of(&mut bench);
    let mut worker = rehearse(&bench, spec, || driver.is_silent.store(true, Ordering::SeqCst)).await;
    let report = worker.settled().await;
    assert!(matches!(report, Report::Ready { .. }), "{report:?}");
    let view = worker.handle.view();
    assert_eq!((view.starts, view.can_park), (1, None), "{view:?}");
    assert_eq!(bench.calls(), ["/sleep?level=1", "/wake_up"]);
    worker.stop().await;
    bench.assert_nothing_left();
}

#[tokio::test]
async fn who_comes_to_a_shared_gpu_does_not_end_a_rehearsal_where_the_driver_shows_no_processes() {
    let (gpus, mut bench, mut spec) = on_one_gpu();
    bench.tempo.park_memory_limit = Duration::from_millis(300);
    spec.memory = Some(8_000_000_000);
    std::fs::write(gpus.path().join("no-pids"), "").unwrap();
    let neighbour = gpus.path().join("1");
    let mut worker = rehearse(&bench, spec, || std::fs::write(neighbour, "60000000000").unwrap()).await;
    let report = worker.settled().await;
    assert!(matches!(report, Report::Ready { .. }), "{report:?}");
    assert_eq!(worker.handle.view().starts, 1);
    assert_eq!(bench.calls(), ["/sleep?level=1", "/wake_up"]);
    worker.stop().await;
    bench.assert_nothing_left();
}

#[tokio::test]
async fn the_load_after_a_failed_rehearsal_has_a_limit_of_its_own() {
    let limit = Duration::from_secs(5);
    let mut bench = Bench::new();
    // It sleeps too late: when that is known, the limit of the first load is over.
    (bench.tempo.load_limit_min, bench.tempo.park_limit) = (limit, limit);
    let hold = bench.path().join("hold");
    std::fs::write(&hold, "").unwrap();
    let mut spec = bench.spec(&["--hold-file", &hold.display().to_string()]);
    (spec.park, spec.startup_time) = (roundhouse::domain::Park::Ram, Duration::from_millis(1));
    let mut worker = bench.supervise(spec);
    assert_eq!(load_at_leisure(&mut worker).await, ["spawn", "load"]);
    let view = worker.handle.view();
    assert_eq!(view.starts, 2);
    assert!(view.park_note.as_ref().unwrap().contains("not asleep within 5 s"), "{view:?}");
    worker.stop().await;
    bench.assert_nothing_left();
}
