//! The waiting and running jobs of one model, in the model's own order. Pure: no clock, no I/O.
//!
//! Order: jobs isolated by a crash first, each part alone on the worker; else interactive before batch, but every 8th
//! admission is batch while batch waits; within a class a job whose deadline is near, then the tenant that was served least,
//! then priority, then arrival.
//!
//! A run of several begins with the job that is first in this order, and goes on with the next ones that have its batch key.
//! They pass jobs of other keys, but a job of lower priority passes none of its tenant and class, and a batch job passes no
//! caller, unless it is the turn of batch.
//!
//! Jobs that were on a worker when it died may have killed it. They run again in halves, nothing beside them, until the
//! killer is alone: of those that died together the first half runs; if it dies too, the other half is innocent and runs
//! whole, else the search goes on in the other half. A search over n jobs takes at most log2(n) runs.
//!
//! A job that ran out of memory alone stands among these, too, for itself: it runs with nothing beside it.
//!
//! What few jobs have (deadlines, delays) stands in maps of its own. Those whose endpoint the model does not serve any more
//! stand aside, for nobody's turn.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use crate::domain::shape::ALONE;
use crate::domain::{Class, Face, Millis};
use crate::policy::batching::Batching;
use crate::policy::order::{Served, batch_slots, near_deadline, next_class};
use crate::policy::retry::{PAUSE_MAX_MS, is_own_mark};
use crate::scheduler::line::{Key, Line, Waiting};
use crate::store::QueuedJob;

/// How many waiting jobs of a tenant are looked at to fill a run with equal batch keys.
const RUN_SCAN_MAX: usize = 256;
/// How many places from either end of a tenant's jobs are counted; others are guessed.
const RANK_SCAN_MAX: usize = 1_000;

/// What few jobs have.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Rare {
    was_started: bool,
    crash: Option<i64>,
    not_before: Option<Millis>,
    /// Until when it waits aside: `not_before`, but never longer than a pause may be, since the wall clock may have been set
    /// back between two runs of the server.
    aside_until: Option<Millis>,
    start_deadline: Option<Millis>,
    deadline: Option<Millis>,
}

impl Rare {
    fn of(job: &QueuedJob, now: Millis) -> Self {
        let aside_until = job.not_before.filter(|at| *at > now);
        Self {
            was_started: job.was_started,
            crash: job.crash,
            not_before: job.not_before,
            aside_until: aside_until.map(|at| at.min(now.saturating_add(PAUSE_MAX_MS))),
            start_deadline: job.start_deadline,
            deadline: job.deadline,
        }
    }
}

/// Jobs that died together.
#[derive(Debug, Default)]
struct Suspects {
    jobs: BTreeMap<Key, Waiting>,
    /// The killer was in the half that ran: these run whole.
    innocent: bool,
}

/// A job on the worker, or on its way there.
#[derive(Clone, Debug)]
pub(super) struct Running {
    /// As it was when claimed.
    pub(super) job: QueuedJob,
    /// Nothing else may run beside its run.
    pub(super) alone: bool,
    /// When it was claimed.
    pub(super) claimed_at: Millis,
    /// Number of its worker among those of the model.
    pub(super) worker: u32,
    /// See [`To::canary`]; `None` once the worker has answered somebody.
    pub(super) canary: Option<i64>,
    /// It was cancelled when the store had it back as waiting already: it does not wait again.
    pub(super) is_gone: bool,
    /// GPU time that its tenant was charged in advance, ms.
    charged_ms: f64,
    /// The worker's shares so far when it began, ms.
    share_from: f64,
    /// The worker's device shares so far when it began, ms.
    device_from: f64,
    /// What it had of the worker and of its devices, once that is settled.
    had: Option<Had>,
}

/// What a job had, ms.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Had {
    /// Of its worker's time.
    worker_ms: f64,
    /// Of its devices' time, all of them together.
    pub(super) device_ms: f64,
}

/// What a worker has to do.
#[derive(Clone, Copy, Debug, Default)]
struct Load {
    jobs: usize,
    batch: usize,
    /// Of an isolated run.
    alone: usize,
    /// Of the jobs, those that share its time: an attempt that is over waits for its end to be stored.
    sharing: usize,
    /// Time that each of its jobs had of the worker so far, ms: grows by 1/n while n share it.
    share_ms: f64,
    /// Time that each of its jobs had of the devices so far, ms: their keeper says how much the worker has had.
    device_share_ms: f64,
    at: Millis,
}

impl Load {
    fn count_until(&mut self, now: Millis) {
        if self.sharing > 0 {
            self.share_ms += (now - self.at).max(0) as f64 / self.sharing as f64;
        }
        self.at = now;
    }
}

/// A ready worker that jobs may go to.
#[derive(Clone, Copy, Debug)]
pub(super) struct To {
    /// Its number among those of the model.
    pub(super) worker: u32,
    /// Its limits.
    pub(super) slots: Slots,
    /// The load by which it was woken, if it has answered nobody since.
    pub(super) canary: Option<i64>,
    /// Expected service time of a job.
    pub(super) service_ms: f64,
    /// What a tenant is charged for a job in advance, GPU ms.
    pub(super) charge_ms: f64,
}

/// Jobs to be claimed together and sent as one run.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    /// In order; all with one batch key if more than one and not isolated.
    pub jobs: Vec<QueuedJob>,
    /// Isolated by an earlier crash: nothing else runs beside.
    pub alone: bool,
}

/// Limits of the model's worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slots {
    /// Most jobs on the worker.
    pub(super) limit: u32,
    /// Most jobs in one run.
    pub(super) max_batch: u32,
}

/// One model's jobs.
#[derive(Debug)]
pub(super) struct Queue {
    model: Arc<str>,
    interactive: Line,
    batch: Line,
    /// By the death of a worker.
    isolated: BTreeMap<i64, Suspects>,
    /// The death whose first half runs now.
    probed: Option<i64>,
    /// Jobs whose time has not come.
    delayed: BTreeMap<(Millis, i64), (Key, Waiting)>,
    /// Jobs whose endpoint the model's entry does not list now.
    unserved: BTreeMap<i64, (Key, Waiting)>,
    rare: HashMap<i64, Rare>,
    deadlines: BTreeMap<(Millis, i64), Key>,
    /// The same by tenant.
    deadlines_of: BTreeMap<u32, BTreeSet<(Millis, i64)>>,
    sync: BTreeMap<i64, Key>,
    tenants: Vec<Arc<str>>,
    waiting: usize,
    running: BTreeMap<i64, Running>,
    /// By worker.
    loads: BTreeMap<u32, Load>,
    /// By worker, when it last answered.
    answered: BTreeMap<u32, Millis>,
    admitted: u64,
    /// The same by runs.
    turns: u64,
}

impl Queue {
    /// Nothing waits.
    pub(super) fn new(model: Arc<str>) -> Self {
        Self {
            model,
            interactive: Line::default(),
            batch: Line::default(),
            isolated: BTreeMap::new(),
            probed: None,
            delayed: BTreeMap::new(),
            unserved: BTreeMap::new(),
            rare: HashMap::new(),
            deadlines: BTreeMap::new(),
            deadlines_of: BTreeMap::new(),
            sync: BTreeMap::new(),
            tenants: Vec::new(),
            waiting: 0,
            running: BTreeMap::new(),
            loads: BTreeMap::new(),
            answered: BTreeMap::new(),
            admitted: 0,
            turns: 0,
        }
    }

    /// Adds a waiting job; one with `not_before` in the future waits aside until [`Queue::wake`].
    pub(super) fn push(&mut self, job: &QueuedJob, now: Millis) {
        let key = Key::new(job.priority, job.number);
        let waiting = Waiting::new(job.created_at, self.tenant(&job.tenant), job.batch_key, job.face);
        let rare = Rare::of(job, now);
        if rare != Rare::default() {
            self.rare.insert(job.number, rare);
        }
        if let Some(limit) = job.limit() {
            self.deadlines.insert((limit, job.number), key);
            self.deadlines_of.entry(waiting.tenant()).or_default().insert((limit, job.number));
        }
        if job.face == Face::Sync {
            self.sync.insert(job.number, key);
        }
        if let (Some(probed), Some(crash)) = (self.probed, job.crash)
            && probed != crash
            && !is_own_mark(crash)
            && let Some(rest) = self.isolated.get_mut(&probed)
        {
            rest.innocent = true;
        }
        self.waiting += 1;
        match rare.aside_until {
            Some(at) => {
                self.delayed.insert((at, job.number), (key, waiting));
            }
            None => self.make_ready(key, waiting, job.crash),
        }
    }

    fn tenant(&mut self, name: &Arc<str>) -> u32 {
        let known = self.tenants.iter().position(|tenant| tenant == name);
        let index = known.unwrap_or_else(|| {
            self.tenants.push(name.clone());
            self.tenants.len() - 1
        });
        u32::try_from(index).unwrap_or(0)
    }

    fn make_ready(&mut self, key: Key, waiting: Waiting, crash: Option<i64>) {
        match crash {
            Some(crash) => {
                self.isolated.entry(crash).or_default().jobs.insert(key, waiting);
            }
            None if key.class() == Class::Interactive => self.interactive.insert(key, waiting),
            None => self.batch.insert(key, waiting),
        }
    }

    /// A waiting job asks for an endpoint that the model does not serve: it stands aside until [`Queue::readmit`].
    pub(super) fn set_aside(&mut self, priority: u8, number: i64) {
        let key = Key::new(priority, number);
        let rare = self.rare.get(&number).copied().unwrap_or_default();
        if let Some(waiting) = self.take_waiting(key, rare) {
            self.unserved.insert(number, (key, waiting));
        }
    }

    /// Lets those in again that stand aside: the model may serve their endpoint now.
    pub(super) fn readmit(&mut self, now: Millis) {
        for (number, (key, waiting)) in std::mem::take(&mut self.unserved) {
            let rare = self.rare.get(&number).copied().unwrap_or_default();
            match rare.aside_until.filter(|at| *at > now) {
                Some(at) => {
                    self.delayed.insert((at, number), (key, waiting));
                }
                None => self.make_ready(key, waiting, rare.crash),
            }
        }
    }

    /// Whether a waiting job stands aside.
    pub(super) fn is_unserved(&self, number: i64) -> bool {
        self.unserved.contains_key(&number)
    }

    /// Takes a waiting job out, whatever it waits for.
    pub(super) fn remove(&mut self, priority: u8, number: i64) -> Option<QueuedJob> {
        let key = Key::new(priority, number);
        let rare = self.rare.get(&number).copied().unwrap_or_default();
        let waiting = self.take_waiting(key, rare)?;
        self.rare.remove(&number);
        self.sync.remove(&number);
        self.waiting -= 1;
        let job = self.job(key, waiting, rare);
        if let Some(limit) = job.limit() {
            self.deadlines.remove(&(limit, number));
            if let Some(of_tenant) = self.deadlines_of.get_mut(&waiting.tenant()) {
                of_tenant.remove(&(limit, number));
                if of_tenant.is_empty() {
                    self.deadlines_of.remove(&waiting.tenant());
                }
            }
        }
        Some(job)
    }

    fn take_waiting(&mut self, key: Key, rare: Rare) -> Option<Waiting> {
        if let Some((_, waiting)) = self.unserved.remove(&key.number()) {
            return Some(waiting);
        }
        if let Some(at) = rare.aside_until
            && let Some((_, waiting)) = self.delayed.remove(&(at, key.number()))
        {
            return Some(waiting);
        }
        match rare.crash {
            Some(crash) => {
                let suspects = self.isolated.get_mut(&crash)?;
                let waiting = suspects.jobs.remove(&key);
                if suspects.jobs.is_empty() {
                    self.isolated.remove(&crash);
                }
                waiting
            }
            None if key.class() == Class::Interactive => self.interactive.remove(key),
            None => self.batch.remove(key),
        }
    }

    /// All waiting jobs, counted again from the maps; what stands beside them must fit.
    #[cfg(test)]
    pub(super) fn recount(&self) -> Vec<QueuedJob> {
        let ready = self.interactive.iter().chain(self.batch.iter()).chain(self.isolated_keys());
        let aside = self.delayed.values().chain(self.unserved.values());
        let all = ready.map(|(key, waiting)| (*key, *waiting)).chain(aside.copied());
        let jobs: Vec<QueuedJob> = all
            .map(|(key, waiting)| self.job(key, waiting, self.rare.get(&key.number()).copied().unwrap_or_default()))
            .collect();
        assert_eq!(self.waiting, jobs.len(), "the count of waiting jobs");
        assert_eq!(self.deadlines.len(), jobs.iter().filter(|job| job.limit().is_some()).count(), "deadlines");
        assert_eq!(self.deadlines_of.values().map(BTreeSet::len).sum::<usize>(), self.deadlines.len(), "by tenant");
        assert_eq!(self.sync.len(), jobs.iter().filter(|job| job.face == Face::Sync).count(), "callers");
        assert!(self.rare.keys().all(|number| jobs.iter().any(|job| job.number == *number)), "rare things of nobody");
        jobs
    }

    /// Whether a waiting job waits aside.
    #[cfg(test)]
    pub(super) fn is_delayed(&self, job: &QueuedJob) -> bool {
        let rare = self.rare.get(&job.number);
        rare.and_then(|rare| rare.aside_until).is_some_and(|at| self.delayed.contains_key(&(at, job.number)))
    }

    fn job(&self, key: Key, waiting: Waiting, rare: Rare) -> QueuedJob {
        QueuedJob {
            number: key.number(),
            model: self.model.clone(),
            tenant: self.tenants.get(waiting.tenant() as usize).cloned().unwrap_or_else(|| Arc::from("")),
            face: waiting.face(),
            priority: key.priority(),
            batch_key: waiting.batch_key(),
            created_at: waiting.created_at(),
            was_started: rare.was_started,
            crash: rare.crash,
            not_before: rare.not_before,
            start_deadline: rare.start_deadline,
            deadline: rare.deadline,
        }
    }

    /// Lets in delayed jobs whose time has come; false: there are none.
    pub(super) fn wake(&mut self, now: Millis) -> bool {
        let before = self.delayed.len();
        while let Some(entry) = self.delayed.first_entry()
            && entry.key().0 <= now
        {
            let (key, waiting) = entry.remove();
            let crash = self.rare.get(&key.number()).and_then(|rare| rare.crash);
            self.make_ready(key, waiting, crash);
        }
        self.delayed.len() < before
    }

    /// The next time something here changes by itself: a delay ends or a deadline passes.
    pub(super) fn next_wake(&self) -> Option<Millis> {
        let delay = self.delayed.first_key_value().map(|((at, _), _)| *at);
        [delay, self.first_deadline()].into_iter().flatten().min()
    }

    /// Takes out waiting jobs whose (start) deadline has passed.
    pub(super) fn take_overdue(&mut self, now: Millis) -> Vec<QueuedJob> {
        let late: Vec<Key> = self.deadlines.iter().take_while(|((at, _), _)| *at <= now).map(|(_, key)| *key).collect();
        late.into_iter().filter_map(|key| self.remove(key.priority(), key.number())).collect()
    }

    /// All waiting jobs, delayed ones too.
    pub(super) fn len(&self) -> usize {
        self.waiting
    }

    /// Takes out waiting jobs whose callers hold the line.
    pub(super) fn take_sync(&mut self) -> Vec<QueuedJob> {
        let keys: Vec<Key> = self.sync.values().copied().collect();
        keys.into_iter().filter_map(|key| self.remove(key.priority(), key.number())).collect()
    }

    /// Takes out waiting jobs, whatever they wait for, with numbers below `before`: at most so many.
    pub(super) fn take_before(&mut self, before: i64, most: usize) -> Vec<QueuedJob> {
        let ready = self.interactive.iter().chain(self.batch.iter()).chain(self.isolated_keys()).map(|(key, _)| *key);
        let all = ready.chain(self.delayed.values().chain(self.unserved.values()).map(|(key, _)| *key));
        let keys: Vec<Key> = all.filter(|key| key.number() < before).take(most).collect();
        keys.into_iter().filter_map(|key| self.remove(key.priority(), key.number())).collect()
    }

    /// Whether jobs of a class wait that are not isolated.
    pub(super) fn has(&self, class: Class) -> bool {
        !(if class == Class::Interactive { &self.interactive } else { &self.batch }).is_empty()
    }

    fn isolated_keys(&self) -> impl Iterator<Item = (&Key, &Waiting)> {
        self.isolated.values().flat_map(|suspects| &suspects.jobs)
    }

    /// Claimable interactive and batch jobs; isolated ones count in their own class.
    pub(super) fn pending(&self) -> (usize, usize) {
        let (mut interactive, mut batch) = (self.interactive.len(), self.batch.len());
        for (key, _) in self.isolated_keys() {
            *(if key.class() == Class::Interactive { &mut interactive } else { &mut batch }) += 1;
        }
        (interactive, batch)
    }

    /// When the oldest claimable job of a class was accepted.
    pub(super) fn oldest(&self, of: Class) -> Option<Millis> {
        let isolated =
            self.isolated_keys().filter(|(key, _)| key.class() == of).map(|(_, waiting)| waiting.created_at());
        self.line(of).oldest().into_iter().chain(isolated).min()
    }

    fn line(&self, of: Class) -> &Line {
        if of == Class::Interactive { &self.interactive } else { &self.batch }
    }

    /// The nearest deadline of a waiting job.
    pub(super) fn first_deadline(&self) -> Option<Millis> {
        self.deadlines.first_key_value().map(|((at, _), _)| *at)
    }

    /// Of each tenant's latest deadline, the nearest.
    pub(super) fn last_deadline(&self) -> Option<Millis> {
        self.deadlines_of.values().filter_map(|of_tenant| of_tenant.last()).map(|(at, _)| *at).min()
    }

    /// Numbers of the first claimable jobs, about in order.
    pub(super) fn heads(&self, most: usize) -> Vec<i64> {
        let all = self.isolated_keys().chain(self.interactive.iter()).chain(self.batch.iter());
        all.take(most).map(|(key, _)| key.number()).collect()
    }

    /// About how many jobs of this queue start before `number`; `None`: not waiting, or more than `most` places from either
    /// end of its tenant's.
    pub(super) fn rank(&self, priority: u8, number: i64, most: usize) -> Option<usize> {
        let key = Key::new(priority, number);
        let isolated: usize = self.isolated.values().map(|suspects| suspects.jobs.len()).sum();
        if self.interactive.has(key) {
            Some(isolated + self.interactive.rank(key, most)?)
        } else if self.batch.has(key) {
            Some(isolated + self.interactive.len() + self.batch.rank(key, most)?)
        } else {
            self.isolated_keys().position(|(other, _)| *other == key)
        }
    }

    /// Jobs that were taken to workers so far.
    pub(super) fn admitted(&self) -> u64 {
        self.admitted
    }

    /// Whether this job waits for its turn.
    pub(super) fn waits(&self, priority: u8, number: i64) -> bool {
        let key = Key::new(priority, number);
        self.line(key.class()).has(key) || self.isolated_keys().any(|(other, _)| *other == key)
    }

    /// About how many jobs of its class start before `number`, however many; `None`: not waiting, or isolated, or delayed.
    pub(super) fn ahead_in_class(&self, priority: u8, number: i64) -> Option<usize> {
        let key = Key::new(priority, number);
        let line = self.line(key.class());
        line.rank(key, RANK_SCAN_MAX).or_else(|| line.rank_about(key))
    }

    /// Jobs on workers.
    pub(super) fn running(&self) -> &BTreeMap<i64, Running> {
        &self.running
    }

    /// How many of them are on this one.
    pub(super) fn running_on(&self, worker: u32) -> usize {
        self.load(worker).jobs
    }

    /// The same, and how many of those are interactive.
    pub(super) fn running_by_class(&self, worker: u32) -> (usize, usize) {
        let load = self.load(worker);
        (load.jobs, load.jobs - load.batch.min(load.jobs))
    }

    fn load(&self, worker: u32) -> Load {
        self.loads.get(&worker).copied().unwrap_or_default()
    }

    /// Whether one more job may start at once, passing nobody: the fast path.
    pub(super) fn has_free_slot(&self, slots: Slots, priority: u8, worker: u32) -> bool {
        let nobody_waits = self.interactive.is_empty() && self.batch.is_empty() && self.isolated.is_empty();
        let room = self.room(slots, Class::of(priority), worker);
        // A model that batches runs takes the next run when the worker is free.
        let fits = if slots.max_batch > 1 { self.running_on(worker) == 0 } else { room > 0 };
        nobody_waits && fits && self.load(worker).alone == 0
    }

    /// A job that waits behind nobody takes a slot at once: the fast path.
    pub(super) fn reserve(&mut self, job: QueuedJob, to: To, served: &mut Served, now: Millis) {
        self.turns += 1;
        self.start(job, false, to, served, now);
    }

    /// Counts a job as running and charges its tenant.
    fn start(&mut self, job: QueuedJob, alone: bool, to: To, served: &mut Served, now: Millis) {
        self.admitted += 1;
        served.charge(&job.tenant, to.charge_ms);
        let load = self.loads.entry(to.worker).or_default();
        load.count_until(now);
        load.jobs += 1;
        load.sharing += 1;
        load.batch += usize::from(Class::of(job.priority) == Class::Batch);
        load.alone += usize::from(alone);
        let (share_from, device_from) = (load.share_ms, load.device_share_ms);
        let running = Running {
            alone,
            claimed_at: now,
            worker: to.worker,
            canary: to.canary,
            is_gone: false,
            charged_ms: to.charge_ms,
            share_from,
            device_from,
            had: None,
            job,
        };
        self.running.insert(running.job.number, running);
    }

    /// A worker has worked for so much time of its devices, ms, which is what its jobs had.
    pub(super) fn credit(&mut self, worker: u32, device_ms: f64) {
        if let Some(load) = self.loads.get_mut(&worker).filter(|load| load.sharing > 0) {
            load.device_share_ms += device_ms / load.sharing as f64;
        }
    }

    /// What a job had: from now on it shares nothing any more. `None`: it does not run.
    pub(super) fn settle(&mut self, number: i64, now: Millis) -> Option<Had> {
        let running = self.running.get_mut(&number)?;
        if let Some(had) = running.had {
            return Some(had);
        }
        let load = self.loads.entry(running.worker).or_default();
        load.count_until(now);
        load.sharing = load.sharing.saturating_sub(1);
        let had = Had {
            worker_ms: load.share_ms - running.share_from,
            device_ms: load.device_share_ms - running.device_from,
        };
        running.had = Some(had);
        Some(had)
    }

    /// Whether jobs share this worker's time.
    pub(super) fn works(&self, worker: u32) -> bool {
        self.load(worker).sharing > 0
    }

    /// A job was cancelled as one that waits, while it counts as running here.
    pub(super) fn note_gone(&mut self, number: i64) {
        if let Some(running) = self.running.get_mut(&number) {
            running.is_gone = true;
        }
    }

    /// Counts it no longer, and charges its tenant for what it had of the worker: `gpus` times its share of the time.
    pub(super) fn end(&mut self, number: i64, gpus: f64, served: &mut Served, now: Millis) -> Option<Running> {
        let had = self.settle(number, now)?.worker_ms * gpus;
        let running = self.running.remove(&number)?;
        if let Some(load) = self.loads.get_mut(&running.worker) {
            load.count_until(now);
            load.jobs = load.jobs.saturating_sub(1);
            load.alone -= usize::from(running.alone).min(load.alone);
            load.batch -= usize::from(Class::of(running.job.priority) == Class::Batch).min(load.batch);
            served.charge(&running.job.tenant, had - running.charged_ms);
            if load.jobs == 0 {
                self.loads.remove(&running.worker);
            }
        }
        Some(running)
    }

    fn room(&self, slots: Slots, class: Class, worker: u32) -> usize {
        let load = self.load(worker);
        let free = (slots.limit as usize).saturating_sub(load.jobs);
        if class == Class::Interactive {
            return free;
        }
        free.min((batch_slots(slots.limit) as usize).saturating_sub(load.batch))
    }

    /// Whether a job could be claimed now.
    pub(super) fn has_ready(&self) -> bool {
        !self.interactive.is_empty() || !self.batch.is_empty() || !self.isolated.is_empty()
    }

    /// A worker has answered.
    pub(super) fn count_answer(&mut self, worker: u32, now: Millis) {
        self.answered.insert(worker, now);
    }

    /// The worker that this load woke has answered somebody.
    pub(super) fn prove(&mut self, canary: i64) {
        let of_it = self.running.values_mut().filter(|running| running.canary == Some(canary));
        of_it.for_each(|running| running.canary = None);
    }

    /// When a worker last answered a job.
    pub(super) fn answered_at(&self, worker: u32) -> Option<Millis> {
        self.answered.get(&worker).copied()
    }

    /// Takes the next run that may go to the ready worker now and counts it as running.
    pub(super) fn admit_one(&mut self, to: To, sizes: &Batching, served: &mut Served, now: Millis) -> Option<Run> {
        let (keys, alone) = self.next_run(to, sizes, served, now)?;
        self.turns += 1;
        let jobs: Vec<QueuedJob> =
            keys.into_iter().filter_map(|key| self.remove(key.priority(), key.number())).collect();
        jobs.iter().for_each(|job| self.start(job.clone(), alone, to, served, now));
        (!jobs.is_empty()).then_some(Run { jobs, alone })
    }

    /// All runs that may go to it now.
    #[cfg(test)]
    pub(super) fn admit(&mut self, to: To, served: &mut Served, now: Millis) -> Vec<Run> {
        let sizes = Batching::new(to.slots.max_batch, to.slots.max_batch);
        std::iter::from_fn(|| self.admit_one(to, &sizes, served, now)).collect()
    }

    fn next_run(&mut self, to: To, sizes: &Batching, served: &Served, now: Millis) -> Option<(Vec<Key>, bool)> {
        let load = self.load(to.worker);
        if load.alone > 0 {
            return None;
        }
        // One search at a time; meanwhile other workers go on with the others.
        if !self.isolated.is_empty() && !self.loads.values().any(|load| load.alone > 0) {
            return (load.jobs == 0).then(|| (self.next_suspects(), true));
        }
        if to.slots.max_batch > 1 && load.jobs > 0 {
            return None;
        }
        let interactive = !self.interactive.is_empty() && self.room(to.slots, Class::Interactive, to.worker) > 0;
        let batch = !self.batch.is_empty() && self.room(to.slots, Class::Batch, to.worker) > 0;
        let class = next_class(interactive, batch, self.turns)?;
        let (first, waiting) = self.first_of(class, to, served, now)?;
        let mut keys = vec![first];
        if to.slots.max_batch > 1 {
            let most = to.slots.max_batch.min(to.slots.limit) as usize;
            if waiting.batch_key() != ALONE {
                self.fill(&mut keys, waiting, most, to, served, now);
            }
            let callers = keys.iter().any(|key| key.class() == Class::Interactive);
            let size = sizes.next(waiting.batch_key(), u32::try_from(keys.len()).unwrap_or(u32::MAX), callers);
            keys.truncate(size as usize);
        }
        Some((keys, false))
    }

    /// Adds the jobs that are next after the first one and have its batch key.
    fn fill(&self, keys: &mut Vec<Key>, first: Waiting, most: usize, to: To, served: &Served, now: Millis) {
        let charge = |tenant: u32| served.weighted(self.tenant_name(tenant), to.charge_ms);
        let mut charged: HashMap<u32, f64> = HashMap::from([(first.tenant(), charge(first.tenant()))]);
        let begun_by = keys[0].class();
        for class in [Class::Interactive, Class::Batch] {
            if class == Class::Batch && begun_by == Class::Interactive && self.interactive.len() > keys.len() {
                break;
            }
            let line = self.line(class);
            for (key, waiting) in self.urgent(line, to, now) {
                if keys.len() < most && waiting.batch_key() == first.batch_key() && !keys.contains(&key) {
                    keys.push(key);
                    *charged.entry(waiting.tenant()).or_default() += charge(waiting.tenant());
                }
            }
            let taken: BTreeSet<Key> = keys.iter().copied().collect();
            let mut heads: Vec<_> = line
                .tenants()
                .map(|(tenant, jobs)| {
                    let next = next_alike(jobs, first.batch_key()).filter(|key| !taken.contains(key));
                    (tenant, next.peekable())
                })
                .collect();
            while keys.len() < most {
                let counter = |tenant: u32| self.counter(tenant, served) + charged.get(&tenant).unwrap_or(&0.0);
                let next = heads
                    .iter_mut()
                    .filter_map(|(tenant, jobs)| Some((counter(*tenant), jobs.peek()?.number(), *tenant, jobs)))
                    .min_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
                let Some((_, _, tenant, jobs)) = next else { break };
                keys.extend(jobs.next());
                *charged.entry(tenant).or_default() += charge(tenant);
            }
        }
    }

    fn tenant_name(&self, tenant: u32) -> &str {
        self.tenants.get(tenant as usize).map_or("", |name| name)
    }

    fn counter(&self, tenant: u32, served: &Served) -> f64 {
        served.of(self.tenant_name(tenant))
    }

    /// The part of the latest death that runs next.
    fn next_suspects(&mut self) -> Vec<Key> {
        let Some((crash, suspects)) = self.isolated.last_key_value() else {
            return Vec::new();
        };
        let half = if suspects.innocent { suspects.jobs.len() } else { suspects.jobs.len().div_ceil(2) };
        self.probed = Some(*crash);
        suspects.jobs.keys().take(half).copied().collect()
    }

    /// Jobs of a line whose deadline is near, the nearest first.
    fn urgent<'a>(&'a self, line: &'a Line, to: To, now: Millis) -> impl Iterator<Item = (Key, Waiting)> {
        let near = near_deadline(to.service_ms, now);
        let all = self.deadlines.iter().take_while(move |((at, _), _)| *at <= near).take(RUN_SCAN_MAX);
        all.filter_map(|(_, key)| Some((*key, line.get(*key)?)))
    }

    fn first_of(&self, class: Class, to: To, served: &Served, now: Millis) -> Option<(Key, Waiting)> {
        let line = self.line(class);
        self.urgent(line, to, now).next().or_else(|| {
            let heads = line.tenants().filter_map(|(tenant, jobs)| Some((tenant, jobs.first_key_value()?)));
            let counted = heads.map(|(tenant, (key, waiting))| (self.counter(tenant, served), *key, *waiting));
            let least = counted.min_by(|a, b| a.0.total_cmp(&b.0).then(a.1.number().cmp(&b.1.number())))?;
            Some((least.1, least.2))
        })
    }
}

/// A tenant's jobs with this batch key, in order, up to the first that one of another key and a higher priority waits before.
fn next_alike(jobs: &BTreeMap<Key, Waiting>, batch_key: i64) -> impl Iterator<Item = Key> {
    let before = move |highest: &mut u8, (key, waiting): (&Key, &Waiting)| match waiting.batch_key() == batch_key {
        true => (key.priority() >= *highest).then_some(Some(*key)),
        false => {
            *highest = (*highest).max(key.priority());
            Some(None)
        }
    };
    jobs.iter().take(RUN_SCAN_MAX).scan(0, before).flatten()
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
#[path = "queue_tests.rs"]
pub(super) mod tests;
