//! Workers that sleep: what comes meanwhile, without a copy of their weights, and once at their load.

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
