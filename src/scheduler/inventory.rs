//! What a box has to load models on, and the workers that hold it.

use std::collections::{BTreeMap, BTreeSet};

use crate::domain::worker::HostCopy;
use crate::domain::{GpuSet, Millis};
use crate::policy::view::{self, WorkerView};
use crate::scheduler::model::Source;
use crate::scheduler::state::{Company, Place};

/// The devices of a box.
#[derive(Clone, Debug, PartialEq)]
pub struct Inventory {
    /// Memory of each GPU that is or was there, in bytes, by the driver's numbers; none: nothing is known of them.
    pub gpus: Vec<u64>,
    /// Numbers of those that are not there now.
    pub gone: BTreeSet<u32>,
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
        Self { gpus, gone: BTreeSet::new(), cpu: None, host: 0, one_at_a_time: true }
    }

    /// A box with these GPUs, by their numbers with their memory in bytes, and this much for models on the CPU.
    pub fn of(there: &BTreeMap<u32, u64>, cpu: u64) -> Self {
        let none = Self { gpus: Vec::new(), gone: BTreeSet::new(), cpu: Some(cpu), host: 0, one_at_a_time: false };
        let mut all = none;
        all.see(there);
        all
    }

    /// The GPUs that are there now. What was there once is remembered, so that a model is not too big for want of it.
    pub(super) fn see(&mut self, there: &BTreeMap<u32, u64>) {
        let end = there.keys().next_back().map_or(0, |last| *last as usize + 1);
        self.gpus.resize(self.gpus.len().max(end), 0);
        for (gpu, bytes) in there {
            self.gpus[*gpu as usize] = *bytes;
        }
        self.gone = (0..self.gpu_count()).filter(|gpu| !there.contains_key(gpu)).collect();
    }

    /// With all that was ever there, since what has vanished may come back; a GPU that was never seen, though its number says
    /// that it must be there, is like the largest.
    pub(super) fn whole(&self) -> Self {
        let largest = self.gpus.iter().copied().max().unwrap_or(0);
        let gpus = self.gpus.iter().map(|bytes| if *bytes == 0 { largest } else { *bytes }).collect();
        Self { gpus, gone: BTreeSet::new(), one_at_a_time: false, ..self.clone() }
    }

    /// Whether one of these GPUs has vanished.
    pub(super) fn lacks(&self, set: GpuSet) -> bool {
        set.gpus().any(|gpu| self.gone.contains(&gpu))
    }

    /// Memory of each device that is given to models: the GPUs (0: it is gone), then the CPU; or one that is everything.
    pub(super) fn devices(&self) -> Vec<u64> {
        if self.one_at_a_time {
            return vec![1];
        }
        let there = |(gpu, bytes): (u32, &u64)| if self.gone.contains(&gpu) { 0 } else { *bytes };
        (0..).zip(&self.gpus).map(there).chain(self.cpu).collect()
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
    /// Takes jobs. `proven`: has answered one.
    Serving { since: Millis, place: Place, idle_since: Option<Millis>, suspect: bool, proven: bool },
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
    /// Where it was parked last: it wakes there and nowhere else.
    pub(super) lies_on: Option<GpuSet>,
    /// What it says of its copy in host memory.
    pub(super) host: HostCopy,
    /// It is parked, or on its way there or back, without a copy in host memory.
    pub(super) is_bare: bool,
    /// It was put to sleep with a copy since it was loaded: one that tells nothing of its copy keeps the memory.
    pub(super) has_slept: bool,
    /// The load by which it was woken, or put to sleep and woken, if it has answered nobody since: a failure is not its job's.
    pub(super) canary: Option<i64>,
    /// How long jobs have waited on it for a sign of life, since it answered somebody last.
    pub(super) silence: Silence,
    /// Its entry has been edited since it was ordered, so that it would be another one now: it ends, and is never woken.
    pub(super) is_outdated: bool,
    /// It loads, and nobody waits for it.
    pub(super) at_leisure: bool,
    /// It began to load so: it may make its copy before it is ready, even if somebody has come since.
    pub(super) may_rehearse: bool,
    /// Who was on its devices while it loaded.
    pub(super) company: Company,
    /// What its process keeps on each of its GPUs while it is parked, in bytes.
    pub(super) keeps: u64,
    /// Most host memory that its copy may take, as it was told when it was loaded, in bytes.
    pub(super) promised: Option<u64>,
}

/// Attempts that ended, or were given up by their callers, without a sign of their worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Silence {
    /// When the first of them began, and until when they are counted.
    span: Option<(Millis, Millis)>,
    /// How long they took, what they had in common once, in ms.
    total_ms: i64,
    /// The job of the first of them.
    first: Option<i64>,
    /// They are attempts at more than one job, so that the last need not be the one that hangs.
    pub(super) is_shared: bool,
    /// Jobs on it when it was found to hang; 0: it was not.
    pub(super) hung_with: u32,
}

impl Silence {
    /// One more, at this job from `since` until `now`, of a worker that answered last at `answered`. Returns how long they took.
    pub(super) fn count(&mut self, number: i64, since: Millis, now: Millis, answered: Option<Millis>) -> i64 {
        let is_broken = |from: Millis| answered.is_some_and(|at| at >= from);
        if self.span.is_some_and(|(from, _)| is_broken(from)) {
            *self = Self { hung_with: self.hung_with, ..Self::default() };
        }
        if !is_broken(since) {
            self.is_shared |= *self.first.get_or_insert(number) != number;
            let (from, until) = self.span.unwrap_or((since, since));
            self.total_ms += (now - since.max(until)).max(0);
            self.span = Some((from.min(since), until.max(now)));
        }
        self.total_ms
    }
}

impl Worker {
    /// What its next load comes from, or the one that goes on.
    pub(super) fn source(&self) -> Source {
        match self.phase {
            Phase::Parked | Phase::Waiting { was_parked: true } | Phase::Loading { was_parked: true, .. } => {
                if self.is_bare { Source::Bare } else { Source::Copy }
            }
            _ => Source::Disk,
        }
    }

    /// Its process is gone, and another one is started.
    pub(super) fn starts_anew(&mut self) {
        (self.host, self.is_bare, self.has_slept, self.canary) = (HostCopy::default(), false, false, None);
        self.silence = Silence::default();
    }

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

    /// Whether it lies in host memory and need not stay there: nobody wants it, or only elsewhere, where it cannot wake.
    pub(super) fn can_be_dropped(&self) -> bool {
        match self.phase {
            Phase::Parked => true,
            Phase::Waiting { was_parked: true } => self.lies_on != Some(self.set),
            _ => false,
        }
    }

    /// What its parked process keeps of a device, in bytes.
    pub(super) fn keeps_of(&self, device: u32) -> u64 {
        let lies = matches!(self.phase, Phase::Parked | Phase::Dropping | Phase::Waiting { was_parked: true });
        self.lies_on.filter(|_| lies).filter(|there| there.has(device)).map_or(0, |_| self.keeps)
    }

    /// Whether a process of it that is parked, or was and is being ended, is on one of these devices.
    pub(super) fn lies_on_one_of(&self, set: GpuSet) -> bool {
        let lies = matches!(self.phase, Phase::Parked | Phase::Dropping | Phase::Waiting { was_parked: true });
        lies && self.lies_on.is_some_and(|there| there.overlaps(set))
    }

    /// Back in host memory, since it is not wanted any more.
    pub(super) fn lie_down(&mut self) {
        self.phase = Phase::Parked;
        self.set = self.lies_on.unwrap_or(self.set);
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
