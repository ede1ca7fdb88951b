//! Drivers that are counted, and that hang.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::*;

/// A driver that counts how often it is asked who uses a GPU, and hangs then as long as it is told to.
struct Counted {
    probe: Arc<dyn GpuProbe>,
    asked: AtomicUsize,
    hangs: AtomicBool,
}

impl Counted {
    fn of(bench: &mut Bench, hangs: bool) -> Arc<Self> {
        let (asked, hangs) = (AtomicUsize::new(0), AtomicBool::new(hangs));
        let driver = Arc::new(Self { probe: bench.around.gpus.clone(), asked, hangs });
        bench.around.gpus = driver.clone();
        driver
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

impl GpuProbe for Counted {
    fn gpus(&self) -> Vec<Gpu> {
        self.probe.gpus()
    }

    fn users(&self, gpu: u32) -> Option<Vec<(u32, u64)>> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        while self.hangs.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(10));
        }
        self.probe.users(gpu)
    }
}

/// Lets it answer in the end: a runtime waits for the threads that ask it.
struct Freed(Arc<Counted>);

impl Drop for Freed {
    fn drop(&mut self) {
        self.0.hangs.store(false, Ordering::SeqCst);
    }
}

#[tokio::test]
async fn a_driver_that_hangs_keeps_no_load_from_its_orders_and_its_limit_and_is_asked_once() {
    let (_gpus, mut bench, mut spec) = on_one_gpu();
    let driver = Counted::of(&mut bench, true);
    let _freed = Freed(driver.clone());
    // It leaves nothing in use, of which the driver would be asked before the next load.
    spec.args = ["--load-s", "3600"].map(str::to_owned).to_vec();
    let mut worker = bench.supervise(spec.clone());
    worker.handle.order_on(Order::Load, GpuSet::one(0), None);
    while !matches!(worker.next().await, Report::Loading { phase: Some(_), .. }) {}
    worker.stop().await;
    assert_eq!(driver.asked(), 1);
    bench.assert_nothing_left();

    bench.tempo.load_limit_min = Duration::from_millis(500);
    spec.startup_time = Duration::from_millis(1);
    let mut worker = bench.supervise(spec);
    let Report::LoadFailed { error, .. } = load_on_gpu(&mut worker).await else { panic!("loaded") };
    assert!(error.message.contains("not ready within 0.5 s"), "{}", error.message);
    assert_eq!(driver.asked(), 2);
    bench.assert_nothing_left();
}

#[tokio::test]
async fn a_driver_that_hangs_keeps_no_worker_from_being_ready() {
    let (_gpus, mut bench, mut spec) = on_one_gpu();
    let driver = Counted::of(&mut bench, true);
    let freed = Freed(driver.clone());
    spec.park = roundhouse::domain::Park::Ram;
    let mut worker = bench.supervise(spec);
    // Nor is it rehearsed, of which the driver would be asked, too.
    worker.handle.load_at_leisure(GpuSet::one(0), Some(7));
    assert!(matches!(worker.settled().await, Report::Ready { .. }));
    assert_eq!((driver.asked(), bench.calls()), (1, Vec::new()));
    drop(freed);
    worker.stop().await;
    bench.assert_nothing_left();
}

#[tokio::test]
async fn an_answer_that_is_told_after_the_death_of_its_worker_counts() {
    let (gpus, mut bench, spec) = on_one_gpu();
    // Each death is counted when the memory is free.
    bench.tempo.memory_limit = Duration::from_secs(3600);
    let driver = Counted::of(&mut bench, false);
    let mut worker = bench.supervise(spec);
    for _ in 0..4 {
        assert!(matches!(load_on_gpu(&mut worker).await, Report::Ready { .. }));
        let toy = bench.toys().into_iter().find(|pid| is_alive(*pid)).unwrap();
        let asked = driver.asked();
        kill(Pid::from_raw(toy), Signal::SIGKILL).unwrap();
        until("its death is noticed", || driver.asked() > asked).await;
        worker.handle.order(Order::Proven);
        std::fs::remove_file(gpus.path().join(toy.to_string())).unwrap();
        worker.death().await;
    }
    bench.assert_nothing_left();
}
