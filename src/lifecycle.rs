//! Two-stage shutdown and the tasks it waits for. Soft: no new work, what runs may finish. Hard: stop at once.
//!
//! First SIGTERM or SIGINT: soft, and hard after the grace period. Second signal: hard now. A task that panics brings the
//! whole program down through the hard stage, since nobody would restart it alone.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Shared by everything that runs: who is asked to stop, and who still does.
#[derive(Clone, Debug, Default)]
pub struct Tasks {
    tracker: TaskTracker,
    soft: CancellationToken,
    hard: CancellationToken,
    failed: Arc<AtomicBool>,
}

impl Tasks {
    /// No task yet, nobody asked to stop.
    pub fn new() -> Self {
        Self::default()
    }

    /// Starts a task that shutdown waits for. `name` is for the log if it panics.
    pub fn spawn<F>(&self, name: &'static str, future: F) -> tokio::task::JoinHandle<()>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (failed, soft, hard) = (self.failed.clone(), self.soft.clone(), self.hard.clone());
        self.tracker.spawn(async move {
            if AssertUnwindSafe(future).catch_unwind().await.is_err() {
                tracing::error!(
                    task.name = name,
                    "task `{name}` panicked: stopping the server so that recovery can run"
                );
                failed.store(true, Ordering::SeqCst);
                soft.cancel();
                hard.cancel();
            }
        })
    }

    /// Cancelled in the first stage: take no new work.
    pub fn soft(&self) -> &CancellationToken {
        &self.soft
    }

    /// Cancelled in the second stage: stop at once.
    pub fn hard(&self) -> &CancellationToken {
        &self.hard
    }

    /// Brings the program down because something cannot go on, for example a failed fsync.
    pub fn fail(&self, reason: &str) {
        tracing::error!("cannot go on: {reason}");
        self.failed.store(true, Ordering::SeqCst);
        self.soft.cancel();
        self.hard.cancel();
    }

    /// Whether the stop is due to a failure.
    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::SeqCst)
    }

    /// Waits for signals and moves through the stages; returns when `hard` is reached or all tasks have ended.
    pub async fn run_until_signalled(&self, grace: Duration) -> std::io::Result<()> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            () = self.soft.cancelled() => {}
        }
        tracing::info!(grace_s = grace.as_secs(), "stopping: no new work; a second signal stops at once");
        self.soft.cancel();
        self.tracker.close();
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            () = self.hard.cancelled() => {}
            () = tokio::time::sleep(grace) => {}
            () = self.tracker.wait() => return Ok(()),
        }
        self.hard.cancel();
        Ok(())
    }

    /// Waits until every task has ended, at most `limit`; says whether all did.
    pub async fn wait(&self, limit: Duration) -> bool {
        self.tracker.close();
        tokio::time::timeout(limit, self.tracker.wait()).await.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_stops_everything() {
        let tasks = Tasks::new();
        tasks.spawn("doomed", async { panic!("on purpose") });
        tasks.hard().cancelled().await;
        assert!(tasks.has_failed());
        assert!(tasks.wait(Duration::from_secs(5)).await);
    }

    #[tokio::test]
    async fn waits_for_tasks_to_finish_in_the_soft_stage() {
        let tasks = Tasks::new();
        let soft = tasks.soft().clone();
        tasks.spawn("polite", async move { soft.cancelled().await });
        tasks.soft().cancel();
        tasks.run_until_signalled(Duration::from_secs(5)).await.expect("signals");
        assert!(!tasks.hard().is_cancelled());
    }
}
