//! What a box has to load models on, and the workers that hold it.

use crate::domain::{GpuSet, Millis};
use crate::policy::view::{self, WorkerView};
use crate::scheduler::state::Place;

/// The devices of a box.
#[derive(Clone, Debug, PartialEq)]
pub struct Inventory {
    /// Memory of each GPU, in bytes; none: nothing is known of them.
    pub gpus: Vec<u64>,
    /// Memory for models that run on the CPU, in bytes; `None`: there are none.
    pub cpu: Option<u64>,
    /// Host memory for parked workers, in bytes; 0: nothing is parked.
    pub host: u64,
    /// One model at a time, whatever it needs and whatever there is.
    pub one_at_a_time: bool,
}

impl Inventory {
    /// A box of which nothing is known: one model at a time.
    pub fn one_device() -> Self {
        Self::one_at_a_time(Vec::new())
    }

    /// A box with these GPUs, by their memory in bytes, all of which are one model's at a time.
    pub fn one_at_a_time(gpus: Vec<u64>) -> Self {
        Self { gpus, cpu: None, host: 0, one_at_a_time: true }
    }

    /// Memory of each device that is given to models: the GPUs, then the CPU; or one that is everything.
    pub(super) fn devices(&self) -> Vec<u64> {
        if self.one_at_a_time { vec![1] } else { self.gpus.iter().copied().chain(self.cpu).collect() }
    }

    /// How many of the devices are GPUs.
    pub(super) fn gpu_count(&self) -> u32 {
        if self.one_at_a_time { 1 } else { u32::try_from(self.gpus.len()).unwrap_or(u32::MAX) }
    }
}

/// What a worker is doing, as far as the scheduler has ordered and heard.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Phase {
    /// Its set is being cleared for it; `was_parked`: it lies in host memory.
    Waiting { was_parked: bool },
    /// Ordered to load.
    Loading { since: Millis, was_parked: bool },
    /// Takes jobs.
    Serving { since: Millis, place: Place, idle_since: Option<Millis>, suspect: bool },
    /// Its running jobs end. `hung`: it has stopped answering, so it is not to be parked.
    Draining { hung: bool },
    /// Ordered to stop, or to be parked.
    Stopping { park: bool },
    /// In host memory; holds no device.
    Parked,
    /// Ordered to leave host memory.
    Dropping,
}

/// One worker, or one that is to be.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Worker {
    pub(super) model: usize,
    /// Its number among those of the model.
    pub(super) replica: u32,
    pub(super) set: GpuSet,
    pub(super) phase: Phase,
    /// It makes room at this time.
    pub(super) guest_until: Option<Millis>,
}

impl Worker {
    /// Whether it is on its devices, or on the way there or away.
    pub(super) fn is_on_device(&self) -> bool {
        matches!(
            self.phase,
            Phase::Loading { .. } | Phase::Serving { .. } | Phase::Draining { .. } | Phase::Stopping { .. }
        )
    }

    /// Whether it is to keep its devices.
    pub(super) fn stays(&self) -> bool {
        matches!(self.phase, Phase::Waiting { .. } | Phase::Loading { .. } | Phase::Serving { .. })
    }

    /// As the policy sees it; `None`: it holds no device. `load_ms`: how long its load should take.
    pub(super) fn view(&self, (running, callers): (usize, usize), load_ms: f64) -> Option<WorkerView> {
        let (phase, since, idle_since) = match &self.phase {
            Phase::Waiting { .. } => (view::Phase::Waiting, 0, None),
            Phase::Loading { since, .. } => (view::Phase::Loading { until: since + round(load_ms) }, *since, None),
            Phase::Serving { since, idle_since, .. } => (view::Phase::Serving, *since, *idle_since),
            Phase::Draining { .. } | Phase::Stopping { .. } => (view::Phase::Leaving, 0, None),
            Phase::Parked | Phase::Dropping => return None,
        };
        let guest_until = self.guest_until;
        Some(WorkerView { model: self.model, set: self.set, phase, since, running, callers, idle_since, guest_until })
    }
}

#[expect(clippy::cast_possible_truncation, reason = "durations are far below 2^53 ms")]
pub(super) fn round(ms: f64) -> i64 {
    ms.round() as i64
}
