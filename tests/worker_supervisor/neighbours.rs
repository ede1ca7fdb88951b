//! Workers that come to a GPU while another leaves it, where the driver shows no processes.

use super::*;

/// As `on_one_gpu`, on a GPU that others may use, by a driver that shows no processes.
fn totals_only() -> (tempfile::TempDir, Bench, ModelSpec) {
    let (gpus, bench, spec) = on_one_gpu();
    std::fs::write(gpus.path().join("no-pids"), "").unwrap();
    (gpus, bench, ModelSpec { memory: Some(6_000_000_000), ..spec })
}

fn with(mut spec: ModelSpec, flags: &[&str]) -> ModelSpec {
    spec.args.extend(flags.iter().map(|flag| (*flag).to_owned()));
    spec
}

/// Another model's worker, and what keeps its reports from being refused.
struct Neighbour {
    handle: WorkerHandle,
    _reports: mpsc::UnboundedReceiver<(String, u32, Report)>,
}

impl Neighbour {
    fn new(bench: &Bench, spec: ModelSpec) -> Self {
        let (sender, reports) = mpsc::unbounded_channel();
        let spec = ModelSpec { name: "other".into(), ..spec };
        let handle = WorkerHandle::start_with(spec, 0, bench.around.clone(), bench.tempo.clone(), sender);
        Self { handle, _reports: reports }
    }

    async fn turns(&self, order: Order, state: ModelState) {
        self.handle.order_on(order, GpuSet::one(0), None);
        until("the other has followed", || self.handle.view().state == state).await;
    }
}

#[tokio::test]
async fn a_worker_is_parked_though_another_loads_or_wakes_beside_it_meanwhile() {
    for wakes in [false, true] {
        let (_gpus, bench, spec) = totals_only();
        let hold = bench.path().join("hold");
        let mut worker = bench.supervise(with(spec.clone(), &["--hold-file", &hold.display().to_string()]));
        assert!(matches!(load_on_gpu(&mut worker).await, Report::Ready { .. }));
        let other = Neighbour::new(&bench, spec);
        if wakes {
            other.turns(Order::Load, ModelState::Resident).await;
            other.turns(Order::Park, ModelState::Parked).await;
            bench.calls();
        }
        std::fs::write(&hold, "").unwrap();
        worker.handle.order(Order::Park);
        until("it is told", || bench.path().join("calls").exists()).await;
        other.turns(Order::Wake, ModelState::Resident).await;
        std::fs::remove_file(&hold).unwrap();
        let report = worker.next().await;
        assert!(matches!(report, Report::Parked { .. }), "what it keeps cannot be told: {report:?}");
    }
}

#[tokio::test]
async fn a_worker_that_keeps_more_than_another_may_have_taken_meanwhile_is_stopped() {
    let (_gpus, mut bench, spec) = totals_only();
    bench.tempo.park_memory_limit = Duration::from_millis(200);
    let hold = bench.path().join("hold");
    // It says that it sleeps and keeps everything.
    let flags = ["--hold-file", &hold.display().to_string(), "--asleep-bytes", "5000000000"];
    let mut worker = bench.supervise(with(spec.clone(), &flags));
    assert!(matches!(load_on_gpu(&mut worker).await, Report::Ready { .. }));
    let small = with(ModelSpec { memory: Some(1_000_000_000), ..spec }, &["--memory-bytes", "1000000000"]);
    let other = Neighbour::new(&bench, small);
    std::fs::write(&hold, "").unwrap();
    worker.handle.order(Order::Park);
    until("it is told", || bench.path().join("calls").exists()).await;
    other.turns(Order::Load, ModelState::Resident).await;
    std::fs::remove_file(&hold).unwrap();
    assert!(matches!(worker.settled().await, Report::Stopped { .. }));
}

#[tokio::test]
async fn who_comes_while_a_worker_stops_is_not_waited_for() {
    let (gpus, mut bench, spec) = totals_only();
    // Whoever waited for it would not be done within the limit of a test.
    bench.tempo.memory_limit = Duration::from_secs(3600);
    bench.around.grace = Duration::from_secs(60);
    let mut worker = bench.supervise(with(spec.clone(), &["--ignore-term"]));
    assert!(matches!(load_on_gpu(&mut worker).await, Report::Ready { .. }));
    let toy = bench.toys()[0];
    worker.handle.order(Order::Stop);
    until("it stops", || worker.handle.view().state == ModelState::Draining).await;
    let other = Neighbour::new(&bench, spec);
    other.turns(Order::Load, ModelState::Resident).await;
    kill(Pid::from_raw(toy), Signal::SIGKILL).unwrap();
    until("the toy is gone", || !is_alive(toy)).await;
    std::fs::remove_file(gpus.path().join(toy.to_string())).unwrap();
    assert!(matches!(worker.settled().await, Report::Stopped { .. }));
}
