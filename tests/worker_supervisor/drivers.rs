//! Drivers that are counted.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

/// A driver that counts how often it is asked who uses a GPU.
struct Counted {
    probe: Arc<dyn GpuProbe>,
    asked: AtomicUsize,
}

impl Counted {
    fn of(bench: &mut Bench) -> Arc<Self> {
        let driver = Arc::new(Self { probe: bench.around.gpus.clone(), asked: AtomicUsize::new(0) });
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
        self.probe.users(gpu)
    }
}

#[tokio::test]
async fn an_answer_that_is_told_after_the_death_of_its_worker_counts() {
    let (gpus, mut bench, spec) = on_one_gpu();
    // Each death is counted when the memory is free.
    bench.tempo.memory_limit = Duration::from_secs(3600);
    let driver = Counted::of(&mut bench);
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
