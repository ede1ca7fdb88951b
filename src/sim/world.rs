//! The simulated machine: GPUs, workers on them, host memory for parked models, and what has become of each job. It does
//! what a policy orders and refuses what no machine could do; it decides nothing.
//!
//! n jobs at once on a worker each run at `TraceModel::speed(n)`; workers with jobs on one GPU share it equally. A worker
//! keeps a virtual time that runs at the speed of its jobs, so that a job's end is fixed in it when it starts, and a change
//! of speed costs the same however many jobs run.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::ops::Range;

use super::Trace;
use super::noise::load_noise;
use super::record::{JobLife, Record, Visit, WorkerId};
use super::trace::TraceModel;

/// Slack of sums of memory, in GB.
const GB_SLACK: f64 = 1e-6;
/// Jobs whose ends differ by less virtual time end together.
const SAME_S: f64 = 1e-9;

/// An order that no machine could carry out: a mistake of the policy.
#[derive(Debug, thiserror::Error)]
#[error("at {at_s:.3} s: {what}")]
pub struct Breach {
    /// When, in the trace's time.
    pub at_s: f64,
    /// What was ordered, and why it cannot be.
    pub what: String,
}

/// A time in seconds that can be ordered. Never NaN.
#[derive(Clone, Copy, Debug, PartialEq)]
struct At(f64);

impl Eq for At {}

impl PartialOrd for At {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for At {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.total_cmp(&other.0)
    }
}

/// Something that happened by itself.
#[derive(Clone, Debug, PartialEq)]
pub enum Happening {
    /// Jobs of the trace arrived: indices.
    Arrived(Range<usize>),
    /// A worker is ready.
    Ready(WorkerId),
    /// A worker is stopped or parked; its GPU memory is free.
    Gone(WorkerId),
    /// A job ended.
    Ended {
        /// Index into the trace's jobs.
        job: usize,
        /// Where it ran.
        worker: WorkerId,
    },
    /// The time that the policy asked for.
    Wake,
}

/// Where a worker is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// From disk or from host memory.
    Loading,
    /// Takes jobs.
    Ready,
    /// Stops or parks.
    Leaving,
    /// Not there any more.
    Gone,
}

/// A worker as policies see it.
#[derive(Debug)]
pub struct Worker {
    /// Index into the trace's models.
    pub model: usize,
    /// Its GPUs.
    pub gpus: Range<usize>,
    /// Where it is.
    pub stage: Stage,
    /// When its last job ended, or it became ready.
    pub used_at: f64,
    /// By their end in virtual time.
    running: BinaryHeap<Reverse<(At, usize)>>,
    /// When the jobs that run now started, if they had to start together.
    together_at: f64,
    virtual_s: f64,
    virtual_at: f64,
    speed: f64,
    /// Which of its events of ends is not outdated.
    plan: u64,
    is_dirty: bool,
}

impl Worker {
    /// Jobs on it.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    fn catch_up(&mut self, now: f64) {
        self.virtual_s += (now - self.virtual_at) * self.speed;
        self.virtual_at = now;
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Due {
    Loaded(WorkerId),
    Stopped(WorkerId),
    JobsEnd { worker: WorkerId, plan: u64 },
}

/// The machine.
#[derive(Debug)]
pub struct World<'t> {
    trace: &'t Trace,
    now: f64,
    due: BinaryHeap<Reverse<(At, u64, Due)>>,
    made: u64,
    workers: Vec<Worker>,
    present: Vec<WorkerId>,
    loads: Vec<u64>,
    parked: Vec<usize>,
    host_used_gb: f64,
    gpu_used_gb: Vec<f64>,
    gpu_busy: Vec<u32>,
    gpu_busy_since: Vec<f64>,
    dirty: Vec<WorkerId>,
    open_jobs: usize,
    record: Record,
}

impl<'t> World<'t> {
    /// Nothing loaded, nothing arrived.
    pub fn new(trace: &'t Trace) -> Self {
        let record = Record { jobs: vec![JobLife::default(); trace.jobs.len()], visits: Vec::new(), gpu_busy_s: 0.0 };
        Self {
            trace,
            now: 0.0,
            due: BinaryHeap::new(),
            made: 0,
            workers: Vec::new(),
            present: Vec::new(),
            loads: vec![0; trace.models.len()],
            parked: vec![0; trace.models.len()],
            host_used_gb: 0.0,
            gpu_used_gb: vec![0.0; trace.gpus],
            gpu_busy: vec![0; trace.gpus],
            gpu_busy_since: vec![0.0; trace.gpus],
            dirty: Vec::new(),
            open_jobs: trace.jobs.len(),
            record,
        }
    }

    /// The trace that is played.
    pub fn trace(&self) -> &'t Trace {
        self.trace
    }

    /// Seconds since the trace began.
    pub fn now(&self) -> f64 {
        self.now
    }

    /// Workers that are loading, ready or leaving, in order of their loads.
    pub fn present(&self) -> &[WorkerId] {
        &self.present
    }

    /// A worker of this run, gone or not.
    pub fn worker(&self, id: WorkerId) -> &Worker {
        &self.workers[id]
    }

    /// The model of a worker.
    pub fn model_of(&self, id: WorkerId) -> &'t TraceModel {
        &self.trace.models[self.workers[id].model]
    }

    /// The life of a worker so far.
    pub fn visit(&self, id: WorkerId) -> &Visit {
        &self.record.visits[id]
    }

    /// Keeps why a worker was loaded.
    pub fn explain(&mut self, id: WorkerId, why: String) {
        self.record.visits[id].why = Some(why);
    }

    /// Keeps when a job was told to start.
    pub fn tell_start(&mut self, job: usize, from_s: f64, to_s: f64) {
        self.record.jobs[job].told_s = Some((from_s, to_s));
    }

    /// Free memory of a GPU, in GB.
    pub fn gpu_free_gb(&self, gpu: usize) -> f64 {
        self.trace.gpu_gb - self.gpu_used_gb[gpu]
    }

    /// Free host memory for parked models, in GB.
    pub fn host_free_gb(&self) -> f64 {
        self.trace.host_gb - self.host_used_gb
    }

    /// Whether a worker of the model is parked in host memory.
    pub fn is_parked(&self, model: usize) -> bool {
        self.parked[model] > 0
    }

    /// Whether a worker of the model could be loaded on the set that begins with `first`, now.
    pub fn fits(&self, model: usize, first: usize) -> bool {
        let needs = &self.trace.models[model];
        (first..first + needs.gpus).all(|gpu| self.gpu_free_gb(gpu) + GB_SLACK >= needs.gb_per_gpu)
    }

    /// Jobs that may be started on this worker now.
    pub fn room(&self, id: WorkerId) -> usize {
        let worker = &self.workers[id];
        let model = &self.trace.models[worker.model];
        let may_join = model.join || worker.running.is_empty() || worker.together_at == self.now;
        if worker.stage == Stage::Ready && may_join { model.limit.saturating_sub(worker.running.len()) } else { 0 }
    }

    /// Loads a model on the set of GPUs that begins with `first`; `wake`: the one that is parked in host memory.
    pub fn load(&mut self, model: usize, first: usize, wake: bool) -> Result<WorkerId, Breach> {
        let needs = &self.trace.models[model];
        if !self.trace.sets(needs.gpus).any(|set| set == first) {
            return Err(self.breach(format!("{} cannot be loaded on {} GPUs from {first}", needs.name, needs.gpus)));
        }
        if !self.fits(model, first) {
            let free: Vec<f64> = (first..first + needs.gpus).map(|gpu| self.gpu_free_gb(gpu)).collect();
            let what =
                format!("{} needs {} GB a GPU, from {first} there are {free:?} free", needs.name, needs.gb_per_gpu);
            return Err(self.breach(what));
        }
        if wake {
            if !self.is_parked(model) {
                return Err(self.breach(format!("{} is to wake, and is not parked", needs.name)));
            }
            self.unpark(model);
        }
        let id = self.workers.len();
        let gpus = first..first + needs.gpus;
        gpus.clone().for_each(|gpu| self.gpu_used_gb[gpu] += needs.gb_per_gpu);
        self.workers.push(Worker {
            model,
            gpus: gpus.clone(),
            stage: Stage::Loading,
            used_at: self.now,
            running: BinaryHeap::new(),
            together_at: f64::NEG_INFINITY,
            virtual_s: 0.0,
            virtual_at: self.now,
            speed: 1.0,
            plan: 0,
            is_dirty: false,
        });
        self.present.push(id);
        let visit = Visit {
            model,
            gpus,
            wake,
            parks: false,
            load_at: self.now,
            ready_at: None,
            leave_at: None,
            gone_at: None,
            jobs: 0,
            why: None,
        };
        self.record.visits.push(visit);
        self.loads[model] += 1;
        let noise = if self.trace.exact_loads { 1.0 } else { load_noise(self.trace.seed, model, self.loads[model]) };
        let takes = if wake { needs.wake_s } else { needs.cold_s } * noise;
        self.plan_due(self.now + takes, Due::Loaded(id));
        Ok(id)
    }

    /// Stops a ready worker without jobs, or parks it in host memory.
    pub fn leave(&mut self, id: WorkerId, park: bool) -> Result<(), Breach> {
        let model = self.model_of(id);
        let worker = &self.workers[id];
        if worker.stage != Stage::Ready || worker.running() > 0 {
            let (stage, running) = (worker.stage, worker.running());
            return Err(self.breach(format!("{} is to leave, {stage:?} with {running} jobs", model.name)));
        }
        if park {
            if self.host_free_gb() + GB_SLACK < model.parked_gb() {
                let (needs, free) = (model.parked_gb(), self.host_free_gb());
                return Err(self.breach(format!("parking {} needs {needs} GB, {free} are free", model.name)));
            }
            self.host_used_gb += model.parked_gb();
        }
        self.workers[id].stage = Stage::Leaving;
        self.record.visits[id].leave_at = Some(self.now);
        self.record.visits[id].parks = park;
        self.plan_due(self.now + model.stop_s, Due::Stopped(id));
        Ok(())
    }

    /// Forgets a parked worker: its next load comes from disk. Does nothing if there is none.
    pub fn unpark(&mut self, model: usize) {
        if self.parked[model] > 0 {
            self.parked[model] -= 1;
            self.host_used_gb -= self.trace.models[model].parked_gb();
        }
    }

    /// Starts a job.
    pub fn start(&mut self, job: usize, id: WorkerId) -> Result<(), Breach> {
        let it = &self.trace.jobs[job];
        let life = self.record.jobs[job];
        if it.arrival_s > self.now || life.start_s.is_some() || life.end_s.is_some() {
            return Err(self.breach(format!("job {job} is started, though it does not wait")));
        }
        if self.room(id) == 0 || it.model != self.workers[id].model {
            let (model, worker) = (self.model_of(id), &self.workers[id]);
            let what = format!(
                "job {job} is started on {} ({:?}, {} of {} jobs), which cannot take it",
                model.name,
                worker.stage,
                worker.running(),
                model.limit
            );
            return Err(self.breach(what));
        }
        let now = self.now;
        let worker = &mut self.workers[id];
        let was_idle = worker.running.is_empty();
        if was_idle {
            (worker.virtual_s, worker.virtual_at, worker.together_at) = (0.0, now, now);
        } else {
            worker.catch_up(now);
        }
        worker.running.push(Reverse((At(worker.virtual_s + it.work_s), job)));
        self.record.jobs[job].start_s = Some(now);
        self.record.jobs[job].worker = Some(id);
        self.record.visits[id].jobs += 1;
        self.changed(id, was_idle);
        Ok(())
    }

    /// Ends a waiting job unserved: its deadline has passed.
    pub fn expire(&mut self, job: usize) -> Result<(), Breach> {
        let life = self.record.jobs[job];
        if life.start_s.is_some() || life.end_s.is_some() {
            return Err(self.breach(format!("job {job} is ended, though it does not wait")));
        }
        self.record.jobs[job].end_s = Some(self.now);
        self.open_jobs -= 1;
        Ok(())
    }

    /// A mistake of the policy, now.
    pub fn breach(&self, what: String) -> Breach {
        Breach { at_s: self.now, what }
    }

    /// Jobs that have not ended, those that have not arrived included.
    pub(super) fn open_jobs(&self) -> usize {
        self.open_jobs
    }

    /// Loads so far.
    pub(super) fn loads(&self) -> usize {
        self.workers.len()
    }

    /// When something will happen by itself.
    pub(super) fn next_due(&mut self) -> Option<f64> {
        while let Some(Reverse((at, _, due))) = self.due.peek() {
            match due {
                Due::JobsEnd { worker, plan } if self.workers[*worker].plan != *plan => drop(self.due.pop()),
                _ => return Some(at.0),
            }
        }
        None
    }

    /// Moves time on, and tells what happened up to then.
    pub(super) fn advance(&mut self, to: f64, happened: &mut Vec<Happening>) {
        self.now = to;
        while self.next_due().is_some_and(|at| at <= to) {
            let Some(Reverse((_, _, due))) = self.due.pop() else { break };
            match due {
                Due::Loaded(id) => {
                    let worker = &mut self.workers[id];
                    (worker.stage, worker.used_at) = (Stage::Ready, to);
                    self.record.visits[id].ready_at = Some(to);
                    happened.push(Happening::Ready(id));
                }
                Due::Stopped(id) => {
                    self.remove(id);
                    happened.push(Happening::Gone(id));
                }
                Due::JobsEnd { worker, .. } => self.end_jobs(worker, happened),
            }
        }
    }

    /// Works out new speeds after all orders of this moment.
    pub(super) fn settle(&mut self) {
        for id in std::mem::take(&mut self.dirty) {
            let shared = self.workers[id].gpus.clone().map(|gpu| self.gpu_busy[gpu]).max().unwrap_or(1).max(1);
            let model = &self.trace.models[self.workers[id].model];
            let now = self.now;
            self.made += 1;
            let worker = &mut self.workers[id];
            worker.is_dirty = false;
            worker.catch_up(now);
            worker.speed = model.speed(worker.running.len()) / f64::from(shared);
            worker.plan = self.made;
            if let Some(Reverse((end, _))) = worker.running.peek() {
                let at = now + ((end.0 - worker.virtual_s) / worker.speed).max(0.0);
                self.plan_due(at, Due::JobsEnd { worker: id, plan: self.workers[id].plan });
            }
        }
    }

    /// What is left behind.
    pub(super) fn into_record(self) -> Record {
        self.record
    }

    fn plan_due(&mut self, at: f64, due: Due) {
        self.made += 1;
        self.due.push(Reverse((At(at), self.made, due)));
    }

    fn remove(&mut self, id: WorkerId) {
        let (model, gpus) = (self.workers[id].model, self.workers[id].gpus.clone());
        self.workers[id].stage = Stage::Gone;
        gpus.for_each(|gpu| self.gpu_used_gb[gpu] -= self.trace.models[model].gb_per_gpu);
        self.present.retain(|other| *other != id);
        self.record.visits[id].gone_at = Some(self.now);
        if self.record.visits[id].parks {
            self.parked[model] += 1;
        }
    }

    fn end_jobs(&mut self, id: WorkerId, happened: &mut Vec<Happening>) {
        let now = self.now;
        let worker = &mut self.workers[id];
        worker.catch_up(now);
        worker.used_at = now;
        // Rounding must not keep back the job that this event was made for.
        let first = worker.running.peek().map_or(f64::NEG_INFINITY, |Reverse((end, _))| end.0);
        let until = (first.max(worker.virtual_s)) + SAME_S;
        while let Some(Reverse((end, job))) = worker.running.peek().copied()
            && end.0 <= until
        {
            worker.running.pop();
            self.record.jobs[job].end_s = Some(now);
            self.open_jobs -= 1;
            happened.push(Happening::Ended { job, worker: id });
        }
        let is_idle = worker.running.is_empty();
        self.changed(id, is_idle);
    }

    /// Its jobs changed; `turned`: from none to some, or the other way round.
    fn changed(&mut self, id: WorkerId, turned: bool) {
        self.soil(id);
        if !turned {
            return;
        }
        let gpus = self.workers[id].gpus.clone();
        let is_busy = !self.workers[id].running.is_empty();
        for gpu in gpus.clone() {
            if is_busy {
                if self.gpu_busy[gpu] == 0 {
                    self.gpu_busy_since[gpu] = self.now;
                }
                self.gpu_busy[gpu] += 1;
            } else {
                self.gpu_busy[gpu] -= 1;
                if self.gpu_busy[gpu] == 0 {
                    self.record.gpu_busy_s += self.now - self.gpu_busy_since[gpu];
                }
            }
        }
        for index in 0..self.present.len() {
            let other = self.present[index];
            let theirs = &self.workers[other].gpus;
            if theirs.start < gpus.end && gpus.start < theirs.end {
                self.soil(other);
            }
        }
    }

    fn soil(&mut self, id: WorkerId) {
        if !std::mem::replace(&mut self.workers[id].is_dirty, true) {
            self.dirty.push(id);
        }
    }
}
