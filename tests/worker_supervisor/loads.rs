//! What loads that come to nothing leave on their GPUs: known by process, whoever else comes and goes there.

use super::*;

/// As `on_one_gpu`, on a GPU that others may use; it is never ready.
fn loading() -> (tempfile::TempDir, Bench, ModelSpec) {
    let (gpus, bench, mut spec) = on_one_gpu();
    spec.memory = Some(8_000_000_000);
    spec.args.extend(["--load-s".to_owned(), "3600".to_owned()]);
    (gpus, bench, spec)
}

/// Begins to load it; its process, once it has said something, by when its memory has been seen.
async fn begin(bench: &Bench, worker: &mut Worker) -> i32 {
    worker.handle.order_on(Order::Load, GpuSet::one(0), None);
    while !matches!(worker.next().await, Report::Loading { phase: Some(_), .. }) {}
    bench.toys().into_iter().find(|pid| is_alive(*pid)).unwrap()
}

#[tokio::test]
async fn what_a_dead_load_left_in_use_is_remembered_on_a_shared_gpu_too() {
    let (gpus, bench, spec) = loading();
    let mut worker = bench.supervise(spec.clone());
    let toy = begin(&bench, &mut worker).await;
    kill(Pid::from_raw(toy), Signal::SIGKILL).unwrap();
    assert!(matches!(worker.settled().await, Report::LoadFailed { .. }));
    // The driver keeps it in use: nobody removes the file.
    let mut next = bench.supervise(ModelSpec { memory: Some(78_000_000_000), ..spec });
    let Report::LoadFailed { error, .. } = load_on_gpu(&mut next).await else { panic!("loaded") };
    assert!(error.message.contains(&format!("process {toy} has 4.7 GiB of gpu0")), "{}", error.message);
    std::fs::remove_file(gpus.path().join(toy.to_string())).unwrap();
}

#[tokio::test]
async fn who_comes_while_a_load_is_broken_off_is_not_waited_for() {
    let (gpus, mut bench, spec) = loading();
    // Whoever waited for it would not be done within the limit of a test.
    bench.tempo.memory_limit = Duration::from_secs(3600);
    let mut worker = bench.supervise(spec);
    let toy = begin(&bench, &mut worker).await;
    std::fs::write(gpus.path().join("1"), "60000000000").unwrap();
    worker.handle.order(Order::Stop);
    until("the toy is gone", || !is_alive(toy)).await;
    std::fs::remove_file(gpus.path().join(toy.to_string())).unwrap();
    assert!(matches!(worker.settled().await, Report::Stopped { .. }));
    bench.assert_nothing_left();
}

#[tokio::test]
async fn a_rehearsal_that_gives_no_memory_back_is_a_failed_one() {
    let (gpus, mut bench, mut spec) = on_one_gpu();
    bench.tempo.park_memory_limit = Duration::from_millis(300);
    spec.park = roundhouse::domain::Park::Ram;
    // It says that it sleeps and keeps everything.
    *spec.args.last_mut().unwrap() = "700000000".to_owned();
    let mut worker = bench.supervise(spec);
    worker.handle.load_at_leisure(GpuSet::one(0), Some(7));
    until("a toy", || !bench.toys().is_empty()).await;
    let first = bench.toys()[0];
    until("the toy is gone", || !is_alive(first)).await;
    std::fs::remove_file(gpus.path().join(first.to_string())).unwrap();
    while !matches!(worker.settled().await, Report::Ready { .. }) {}
    let view = worker.handle.view();
    assert_eq!((view.starts, view.can_park), (2, Some(false)));
    assert!(view.park_note.as_ref().unwrap().contains("the driver shows 700000000 bytes"), "{view:?}");
}
