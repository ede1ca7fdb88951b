//! One task per model, the only writer of its worker's state.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};

use crate::clock::Clock;
use crate::domain::ModelSpec;
use crate::domain::worker::{Report, WorkerView};
use crate::lifecycle::Tasks;
use crate::worker::gpu::GpuProbe;

/// What all supervisors share.
#[derive(Clone)]
pub struct Surroundings {
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// GPUs.
    pub gpus: Arc<dyn GpuProbe>,
    /// Tracks tasks; its hard stage kills workers.
    pub tasks: Tasks,
    /// This data dir's id, first half of the instance mark.
    pub data_dir_id: String,
    /// Where `<model>.log` files go.
    pub log_dir: PathBuf,
    /// Path of this program, for `guard`.
    pub program: PathBuf,
    /// SIGTERM to SIGKILL.
    pub grace: Duration,
    /// First back-off after a failed load; doubles up to `backoff_max`.
    pub backoff_first: Duration,
    /// Longest back-off; also how often a quarantined model is tried.
    pub backoff_max: Duration,
}

/// Asks one supervisor; the answers are [`Report`]s. Cheap to clone.
#[derive(Clone, Debug)]
pub struct WorkerHandle {
    orders: mpsc::Sender<Order>,
    view: watch::Receiver<WorkerView>,
}

/// What a supervisor can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Get it ready: `Loading`, then `Ready`, `LoadFailed` or `NoGpu`. While it is ready or loading: nothing.
    Load,
    /// End it: `Stopped` when its device memory is free. While absent: `Stopped` at once.
    Stop,
    /// Forget back-off and quarantine: `Available`.
    Retry,
    /// A job got no answer though the worker looks alive: probe now, restart if it does not answer.
    Suspect,
}

impl WorkerHandle {
    /// Starts the supervisor of `spec`. Reports go to `reports` as (model, report).
    pub fn start(
        spec: ModelSpec,
        around: Surroundings,
        reports: mpsc::UnboundedSender<(String, Report)>,
    ) -> Self {
        let _ = (spec, around, reports);
        unimplemented!()
    }

    /// Gives an order.
    pub fn order(&self, order: Order) {
        let _ = (order, &self.orders);
    }

    /// The latest view; may be stale.
    pub fn view(&self) -> WorkerView {
        self.view.borrow().clone()
    }
}

/// Ends every process whose environment carries this data dir's instance mark (an earlier run's orphans); returns how
/// many there were, when they are gone.
pub async fn end_orphans(data_dir_id: &str, grace: Duration) -> usize {
    let _ = (data_dir_id, grace);
    0
}
