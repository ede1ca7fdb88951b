//! The waiting and running jobs of one model, in the model's own order. Pure: no clock, no I/O.
//!
//! Order: jobs isolated by a crash first, each alone on the worker; else interactive before batch, but every 8th admission
//! is batch while batch waits; within a class a job whose deadline is near, then priority, then arrival.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use crate::domain::{Class, Millis};
use crate::policy::admission::{batch_slots, next_class};
use crate::store::QueuedJob;

/// How many waiting jobs are looked at to fill a run with equal batch keys.
const RUN_SCAN_MAX: usize = 256;
/// A deadline this close (plus three times the work) goes before priority.
const NEAR_DEADLINE_MS: i64 = 60_000;

/// Order within a class: higher priority first, then arrival.
type Key = (u8, i64);

/// When a waiting job is too late: its deadline, or, before its first start, its start deadline.
fn limit(job: &QueuedJob) -> Option<Millis> {
    let start = job.start_deadline.filter(|_| job.attempt == 0);
    [job.deadline, start].into_iter().flatten().min()
}

fn key(job: &QueuedJob) -> Key {
    (u8::MAX - job.priority, job.id.number)
}

/// A job on the worker, or on its way there.
#[derive(Clone, Debug)]
pub(super) struct Running {
    /// As it was when claimed.
    pub(super) job: QueuedJob,
    /// Nothing else may run beside it.
    pub(super) alone: bool,
    /// When it was claimed.
    pub(super) claimed_at: Millis,
}

/// Jobs to be claimed together and sent as one run.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    /// In order; all with one batch key if more than one.
    pub jobs: Vec<QueuedJob>,
    /// Isolated by an earlier crash.
    pub alone: bool,
}

/// Limits of the model's worker.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slots {
    /// Most jobs on the worker.
    pub(super) limit: u32,
    /// Most jobs in one run.
    pub(super) max_batch: u32,
}

/// One model's jobs.
#[derive(Debug, Default)]
pub(super) struct Queue {
    jobs: HashMap<i64, QueuedJob>,
    interactive: BTreeSet<Key>,
    batch: BTreeSet<Key>,
    isolated: BTreeSet<Key>,
    deadlines: BTreeSet<(Millis, i64)>,
    delayed: BTreeSet<(Millis, i64)>,
    running: BTreeMap<i64, Running>,
    admitted: u64,
}

impl Queue {
    /// Adds a waiting job; one with `not_before` in the future waits aside until [`Queue::wake`].
    pub(super) fn push(&mut self, job: QueuedJob, now: Millis) {
        let number = job.id.number;
        if let Some(deadline) = limit(&job) {
            self.deadlines.insert((deadline, number));
        }
        match job.not_before.filter(|at| *at > now) {
            Some(at) => {
                self.delayed.insert((at, number));
            }
            None => self.make_ready(&job),
        }
        self.jobs.insert(number, job);
    }

    fn make_ready(&mut self, job: &QueuedJob) {
        let set = if job.crashes > 0 {
            &mut self.isolated
        } else if Class::of(job.priority) == Class::Interactive {
            &mut self.interactive
        } else {
            &mut self.batch
        };
        set.insert(key(job));
    }

    /// Takes a waiting job out, whatever it waits for.
    pub(super) fn remove(&mut self, number: i64) -> Option<QueuedJob> {
        let job = self.jobs.remove(&number)?;
        let k = key(&job);
        let _ = self.interactive.remove(&k) || self.batch.remove(&k) || self.isolated.remove(&k);
        if let Some(at) = job.not_before {
            self.delayed.remove(&(at, number));
        }
        if let Some(deadline) = limit(&job) {
            self.deadlines.remove(&(deadline, number));
        }
        Some(job)
    }

    /// Lets in delayed jobs whose time has come.
    pub(super) fn wake(&mut self, now: Millis) {
        while let Some((at, number)) = self.delayed.first().copied()
            && at <= now
        {
            self.delayed.remove(&(at, number));
            if let Some(job) = self.jobs.get(&number).cloned() {
                self.make_ready(&job);
            }
        }
    }

    /// The next time something here changes by itself: a delay ends or a deadline passes.
    pub(super) fn next_wake(&self) -> Option<Millis> {
        [self.delayed.first(), self.deadlines.first()].into_iter().flatten().map(|(at, _)| *at).min()
    }

    /// Waiting jobs whose (start) deadline has passed, and whether each was ever started.
    pub(super) fn overdue(&self, now: Millis) -> Vec<(i64, bool)> {
        let late = self.deadlines.iter().take_while(|(at, _)| *at <= now);
        late.filter_map(|(_, number)| self.jobs.get(number)).map(|job| (job.id.number, job.attempt > 0)).collect()
    }

    /// All waiting jobs, delayed ones too.
    pub(super) fn len(&self) -> usize {
        self.jobs.len()
    }

    /// Every waiting job, in no order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &QueuedJob> {
        self.jobs.values()
    }

    /// Claimable interactive and batch jobs; isolated ones count in their own class.
    pub(super) fn pending(&self) -> (usize, usize) {
        let isolated = self.isolated.iter().filter(|k| class(**k) == Class::Interactive).count();
        (self.interactive.len() + isolated, self.batch.len() + self.isolated.len() - isolated)
    }

    /// When the oldest claimable job of a class was accepted.
    pub(super) fn oldest(&self, of: Class) -> Option<Millis> {
        let set = if of == Class::Interactive { &self.interactive } else { &self.batch };
        // Keys are ordered by priority, then number: the oldest is the first of one of the ten priorities.
        let firsts = (0..=9_u8).filter_map(|p| {
            let band = u8::MAX - p;
            set.range((band, i64::MIN)..=(band, i64::MAX)).next()
        });
        let isolated = self.isolated.iter().filter(|k| class(**k) == of);
        firsts.chain(isolated).filter_map(|(_, number)| self.jobs.get(number)).map(|job| job.created_at).min()
    }

    /// The nearest deadline of a waiting job.
    pub(super) fn first_deadline(&self) -> Option<Millis> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    /// Numbers of the first claimable jobs, about in order.
    pub(super) fn heads(&self, most: usize) -> Vec<i64> {
        let all = self.isolated.iter().chain(&self.interactive).chain(&self.batch);
        all.take(most).map(|(_, number)| *number).collect()
    }

    /// Jobs before `number` in this queue; `None`: not waiting, or more than `most`.
    pub(super) fn rank(&self, number: i64, most: usize) -> Option<usize> {
        let job = self.jobs.get(&number)?;
        let k = key(job);
        let before = |set: &BTreeSet<Key>| set.range(..k).take(most + 1).count();
        let rank = if self.isolated.contains(&k) {
            before(&self.isolated)
        } else if self.interactive.contains(&k) {
            self.isolated.len() + before(&self.interactive)
        } else if self.batch.contains(&k) {
            self.isolated.len() + self.interactive.len() + before(&self.batch)
        } else {
            return None;
        };
        (rank <= most).then_some(rank)
    }

    /// Jobs on the worker.
    pub(super) fn running(&self) -> &BTreeMap<i64, Running> {
        &self.running
    }

    /// Whether one more job may start at once, passing nobody: the fast path.
    pub(super) fn has_free_slot(&self, slots: Slots, priority: u8) -> bool {
        let nobody_waits = self.interactive.is_empty() && self.batch.is_empty() && self.isolated.is_empty();
        let room = self.room(slots, Class::of(priority));
        // A model that batches runs takes the next run when the worker is free.
        let fits = if slots.max_batch > 1 { self.running.is_empty() } else { room > 0 };
        nobody_waits && fits && !self.running.values().any(|r| r.alone)
    }

    /// Counts a job as running.
    pub(super) fn start(&mut self, job: QueuedJob, alone: bool, now: Millis) {
        self.admitted += 1;
        self.running.insert(job.id.number, Running { job, alone, claimed_at: now });
    }

    /// Counts it no longer.
    pub(super) fn end(&mut self, number: i64) -> Option<Running> {
        self.running.remove(&number)
    }

    fn room(&self, slots: Slots, class: Class) -> usize {
        let limit = slots.limit as usize;
        let free = limit.saturating_sub(self.running.len());
        if class == Class::Interactive {
            return free;
        }
        let batch = self.running.values().filter(|r| Class::of(r.job.priority) == Class::Batch).count();
        free.min((batch_slots(slots.limit) as usize).saturating_sub(batch))
    }

    /// Takes the jobs that may go to the ready worker now and counts them as running.
    pub(super) fn admit(&mut self, slots: Slots, service_ms: f64, now: Millis) -> Vec<Run> {
        let mut runs = Vec::new();
        while let Some(run) = self.next_run(slots, service_ms, now) {
            for job in &run.jobs {
                self.remove(job.id.number);
                self.start(job.clone(), run.alone, now);
            }
            runs.push(run);
        }
        runs
    }

    fn next_run(&self, slots: Slots, service_ms: f64, now: Millis) -> Option<Run> {
        if self.running.values().any(|r| r.alone) {
            return None;
        }
        if let Some((_, number)) = self.isolated.first() {
            let job = self.jobs.get(number).filter(|_| self.running.is_empty())?;
            return Some(Run { jobs: vec![job.clone()], alone: true });
        }
        if slots.max_batch > 1 && !self.running.is_empty() {
            return None;
        }
        let interactive = !self.interactive.is_empty() && self.room(slots, Class::Interactive) > 0;
        let batch = !self.batch.is_empty() && self.room(slots, Class::Batch) > 0;
        let class = next_class(interactive, batch, self.admitted)?;
        let first = self.first_of(class, service_ms, now)?;
        let mut jobs = vec![first.clone()];
        if slots.max_batch > 1 {
            let most = slots.max_batch.min(slots.limit) as usize;
            let alike =
                self.interactive.iter().chain(&self.batch).take(RUN_SCAN_MAX).filter_map(|(_, n)| self.jobs.get(n));
            jobs.extend(alike.filter(|j| j.batch_key == first.batch_key && j.id != first.id).take(most - 1).cloned());
        }
        Some(Run { jobs, alone: false })
    }

    #[expect(clippy::cast_possible_truncation, reason = "service times are far below 2^53 ms")]
    fn first_of(&self, class: Class, service_ms: f64, now: Millis) -> Option<&QueuedJob> {
        let set = if class == Class::Interactive { &self.interactive } else { &self.batch };
        let near = now + NEAR_DEADLINE_MS + (3.0 * service_ms) as i64;
        let urgent = self
            .deadlines
            .iter()
            .take_while(|(at, _)| *at <= near)
            .take(RUN_SCAN_MAX)
            .filter_map(|(_, number)| self.jobs.get(number))
            .find(|job| set.contains(&key(job)));
        urgent.or_else(|| set.first().and_then(|(_, number)| self.jobs.get(number)))
    }
}

fn class((band, _): Key) -> Class {
    Class::of(u8::MAX - band)
}

/// An `Arc<str>` for a name, shared by all jobs of a model or tenant.
pub(super) fn shared(names: &mut HashMap<String, Arc<str>>, name: &str) -> Arc<str> {
    if let Some(known) = names.get(name) {
        return known.clone();
    }
    let new: Arc<str> = Arc::from(name);
    names.insert(name.to_owned(), new.clone());
    new
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::domain::{Face, JobId, JobKind};

    pub(in crate::scheduler) fn job(number: i64, priority: u8) -> QueuedJob {
        QueuedJob {
            id: JobId::new(number, number, 0),
            kind: JobKind::Chat,
            model: Arc::from("a"),
            tenant: Arc::from("default"),
            face: Face::Async,
            priority,
            attempt: 0,
            failures: 0,
            crashes: 0,
            max_attempts: 3,
            batch_key: 0,
            stream: false,
            created_at: number,
            not_before: None,
            start_deadline: None,
            deadline: None,
            timeout_ms: 1_000,
        }
    }

    fn queue(jobs: impl IntoIterator<Item = QueuedJob>) -> Queue {
        let mut queue = Queue::default();
        jobs.into_iter().for_each(|job| queue.push(job, 0));
        queue
    }

    fn numbers(runs: &[Run]) -> Vec<Vec<i64>> {
        runs.iter().map(|r| r.jobs.iter().map(|j| j.id.number).collect()).collect()
    }

    const TEXT: Slots = Slots { limit: 4, max_batch: 1 };

    #[test]
    fn callers_first_then_priority_then_arrival() {
        let mut q = queue([job(1, 3), job(2, 5), job(3, 7), job(4, 9), job(5, 7)]);
        assert_eq!(numbers(&q.admit(TEXT, 0.0, 0)), [[4], [3], [5], [2]]);
        assert_eq!((q.len(), q.running().len()), (1, 4));
    }

    #[test]
    fn a_near_deadline_goes_before_priority() {
        let mut q = queue([job(1, 7), QueuedJob { deadline: Some(30_000), ..job(2, 6) }]);
        assert_eq!(numbers(&q.admit(Slots { limit: 1, max_batch: 1 }, 0.0, 0)), [[2]]);
    }

    #[test]
    fn runs_share_a_batch_key_and_wait_for_each_other() {
        let slots = Slots { limit: 3, max_batch: 3 };
        let keyed = |n, batch_key| QueuedJob { batch_key, ..job(n, 5) };
        let mut q = queue([keyed(1, 1), keyed(2, 2), keyed(3, 1), keyed(4, 1), keyed(5, 1)]);
        assert_eq!(numbers(&q.admit(slots, 0.0, 0)), [[1, 3, 4]]);
        assert!(q.admit(slots, 0.0, 0).is_empty(), "the next pass starts when this one has ended");
        for n in [1, 3, 4] {
            q.end(n);
        }
        assert_eq!(numbers(&q.admit(slots, 0.0, 0)), [[2]]);
    }

    #[test]
    fn a_job_isolated_by_a_crash_runs_alone() {
        let crashed = |n| QueuedJob { crashes: 1, ..job(n, 5) };
        let mut q = queue([job(1, 7)]);
        q.admit(TEXT, 0.0, 0);
        [crashed(2), crashed(3), job(4, 7)].into_iter().for_each(|j| q.push(j, 0));
        assert!(q.admit(TEXT, 0.0, 0).is_empty(), "waits until the worker is free, and lets nobody in before");
        q.end(1);
        for expected in [2, 3] {
            let runs = q.admit(TEXT, 0.0, 0);
            assert_eq!((numbers(&runs), runs[0].alone), (vec![vec![expected]], true));
            q.end(expected);
        }
        assert_eq!(numbers(&q.admit(TEXT, 0.0, 0)), [[4]]);
    }

    #[test]
    fn delayed_jobs_wait_aside() {
        let mut q = queue([QueuedJob { not_before: Some(50), ..job(1, 5) }]);
        assert_eq!((q.pending(), q.next_wake(), q.len()), ((0, 0), Some(50), 1));
        q.wake(49);
        assert!(q.admit(TEXT, 0.0, 49).is_empty());
        q.wake(50);
        assert_eq!(numbers(&q.admit(TEXT, 0.0, 50)), [[1]]);
    }

    #[test]
    fn removing_leaves_no_trace() {
        let mut q = queue([
            QueuedJob { deadline: Some(9), ..job(1, 5) },
            QueuedJob { not_before: Some(9), ..job(2, 5) },
            QueuedJob { crashes: 1, ..job(3, 5) },
        ]);
        assert_eq!(q.overdue(9), [(1, false)]);
        for n in 1..=3 {
            assert!(q.remove(n).is_some());
        }
        assert_eq!((q.pending(), q.next_wake(), q.overdue(100).len(), q.heads(9).len()), ((0, 0), None, 0, 0));
    }

    #[test]
    fn the_fast_path_passes_nobody() {
        let mut q = Queue::default();
        assert!(q.has_free_slot(TEXT, 7));
        q.push(QueuedJob { not_before: Some(50), ..job(1, 5) }, 0);
        assert!(q.has_free_slot(TEXT, 7), "a delayed job is not passed");
        q.push(job(2, 0), 0);
        assert!(!q.has_free_slot(TEXT, 9));
    }

    #[test]
    fn rank_and_oldest() {
        let q = queue([job(9, 5), job(3, 7), job(4, 2), job(5, 8)]);
        assert_eq!([5, 3, 9, 4].map(|n| q.rank(n, 100)), [Some(0), Some(1), Some(2), Some(3)]);
        assert_eq!((q.oldest(Class::Batch), q.oldest(Class::Interactive)), (Some(4), Some(3)));
    }
}
