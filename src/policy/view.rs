//! What a plan depends on, besides knobs and time. Models and workers are named by their places in the view's lists.

use std::sync::Arc;

use crate::domain::{GpuSet, Millis};

/// A box as the policy sees it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct View {
    /// Memory of each device in bytes: the GPUs, then the CPU if models without GPUs have one of their own.
    pub devices: Vec<u64>,
    /// How many of the devices are GPUs.
    pub gpus: u32,
    /// All models, by the order of `models.yaml`.
    pub models: Vec<ModelView>,
    /// Workers that hold devices, or are about to.
    pub workers: Vec<WorkerView>,
    /// Sets kept for late models, as the last plan left them.
    pub reservations: Vec<Reservation>,
    /// What parked workers keep of devices. It is nobody's place: they are dropped where it is in the way.
    pub residues: Vec<Residue>,
    /// Somebody has paused all models, not single ones.
    pub all_paused: bool,
}

/// Memory that a parked worker keeps on each of its devices.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Residue {
    /// Place of its model.
    pub model: usize,
    /// Where it lies.
    pub set: GpuSet,
    /// On each device, in bytes.
    pub bytes: u64,
}

/// What a worker is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Waits for others to leave its set; then it loads.
    Waiting,
    /// Loads, and should be ready at this time.
    Loading {
        /// When.
        until: Millis,
    },
    /// Takes jobs.
    Serving,
    /// Takes no new jobs; leaves when the running ones have ended, or is stopping already.
    Leaving,
}

/// One worker. Times in ms.
#[derive(Clone, Debug, PartialEq)]
pub struct WorkerView {
    /// Place of its model.
    pub model: usize,
    /// The devices it holds.
    pub set: GpuSet,
    /// What it is doing.
    pub phase: Phase,
    /// Since when it is ready.
    pub since: Millis,
    /// Jobs on it.
    pub running: usize,
    /// Of these, interactive ones.
    pub callers: usize,
    /// Since when it has nothing to do; `None` while it has.
    pub idle_since: Option<Millis>,
    /// It was loaded on a reserved set, and makes room at this time whatever its hold.
    pub guest_until: Option<Millis>,
}

/// A set that is kept for a late model until its residents yield.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reservation {
    /// Place of the model.
    pub model: usize,
    /// The set.
    pub set: GpuSet,
    /// When its residents should have yielded.
    pub at: Millis,
}

/// One model as the policy sees it. Times in ms.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelView {
    /// Entry name.
    pub name: Arc<str>,
    /// Waiting interactive jobs, claimable now.
    pub pending_interactive: usize,
    /// Waiting batch jobs, claimable now.
    pub pending_batch: usize,
    /// Waiting jobs that are not pending, since somebody has paused the model.
    pub paused: usize,
    /// When somebody asked for it by hand; it is due then.
    pub wanted_at: Option<Millis>,
    /// When the oldest waiting interactive job was accepted.
    pub oldest_interactive: Option<Millis>,
    /// The same for batch.
    pub oldest_batch: Option<Millis>,
    /// Nearest deadline of a waiting job.
    pub first_deadline: Option<Millis>,
    /// Of each tenant's latest deadline, the nearest: until then all of its jobs must be done.
    pub last_deadline: Option<Millis>,
    /// When it last lost its last worker.
    pub left_at: Option<Millis>,
    /// GPUs that a worker needs; 0: runs on the CPU.
    pub gpus: u32,
    /// Memory that it takes on each device; `None`: the whole device.
    pub bytes: Option<u64>,
    /// Its next load has its devices to itself, but for pinned workers.
    pub apart: bool,
    /// Where it ran out of memory, and what was free there before, in bytes.
    pub lacked: Vec<(GpuSet, u64)>,
    /// Expected load: from host memory if it is parked there, else from disk.
    pub load_ms: f64,
    /// Expected load from disk: on any other set than those where it is parked.
    pub cold_ms: f64,
    /// Where workers of it are parked. They wake there and nowhere else.
    pub parked: Vec<GpuSet>,
    /// Those are parked without a copy: a wake reads the weights again.
    pub bare: bool,
    /// What loads of it have cost of late, from wherever.
    pub reload_ms: f64,
    /// Expected stop, device memory free.
    pub stop_ms: f64,
    /// Expected service time of one job.
    pub service_ms: f64,
    /// Expected device time per completed job while jobs wait (concurrency counted in).
    pub each_ms: f64,
    /// Arrivals per ms.
    pub rate: f64,
    /// Expected time from an end of its last job to the next arrival; `None`: not known yet.
    pub gap_ms: Option<f64>,
    /// Jobs that usually wait for it when it gets ready.
    pub group: f64,
    /// Why it cannot be loaded now, in words; `None` if it can.
    pub trouble: Option<String>,
    /// When the trouble may be over by itself.
    pub trouble_until: Option<Millis>,
    /// To be loaded without a job: `preload` says so, and its start is not over.
    pub preload: bool,
    /// Unload after this long without work.
    pub idle_ttl_ms: Option<i64>,
    /// Never displaced.
    pub pin: bool,
    /// Most workers of it at once; at least 1.
    pub max_replicas: u32,
}

impl ModelView {
    /// Waiting jobs of both classes.
    pub fn pending(&self) -> usize {
        self.pending_interactive + self.pending_batch
    }

    /// Whether a worker may be loaded.
    pub fn can_load(&self) -> bool {
        self.trouble.is_none()
    }

    /// What a load on this set takes more than one where it is parked, in ms.
    pub(super) fn lost_ms(&self, set: GpuSet) -> f64 {
        let is_elsewhere = !self.parked.is_empty() && !self.parked.contains(&set);
        if is_elsewhere { (self.cold_ms - self.load_ms).max(0.0) } else { 0.0 }
    }

    /// The load rounded to ms.
    pub(super) fn load(&self) -> Millis {
        round(self.load_ms)
    }
}

impl WorkerView {
    /// One that is to be loaded as soon as its devices are free.
    pub fn to_load(model: usize, set: GpuSet, guest_until: Option<Millis>, now: Millis) -> Self {
        Self { model, set, phase: Phase::Waiting, since: now, running: 0, callers: 0, idle_since: None, guest_until }
    }

    /// Whether it keeps its devices: everything but those that leave.
    pub fn stays(&self) -> bool {
        self.phase != Phase::Leaving
    }
}

impl View {
    /// The model of a worker.
    pub fn model_of(&self, worker: &WorkerView) -> &ModelView {
        &self.models[worker.model]
    }

    /// Workers of a model that keep their devices.
    pub fn workers_of(&self, model: usize) -> usize {
        self.workers.iter().filter(|w| w.model == model && w.stays()).count()
    }

    /// Ready workers of a model.
    pub fn serving_of(&self, model: usize) -> usize {
        self.workers.iter().filter(|w| w.model == model && w.phase == Phase::Serving).count()
    }

    /// Whether a worker has something to do, or will at once.
    pub fn has_work(&self, worker: &WorkerView) -> bool {
        worker.running > 0 || self.model_of(worker).pending() > 0
    }
}

pub(crate) fn millis(d: std::time::Duration) -> i64 {
    i64::try_from(d.as_millis()).unwrap_or(i64::MAX / 4)
}

/// The first whole ms that is not before: what has to last at least so long.
pub(crate) fn round_up(ms: f64) -> i64 {
    round(ms.ceil())
}

#[expect(clippy::cast_possible_truncation, reason = "saturates, and durations are far below 2^53 ms")]
pub(crate) fn round(ms: f64) -> i64 {
    (ms.round() as i64).clamp(i64::MIN / 4, i64::MAX / 4)
}
