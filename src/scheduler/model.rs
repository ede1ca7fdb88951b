//! One model as the scheduler keeps it: its queue, what was learned about it, and how the policy sees it.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::domain::shape::KeptBatches;
use crate::domain::worker::{HostCopy, PhaseTime};
use crate::domain::{Class, ErrorCode, GpuSet, Held, JobError, Millis, ModelKind, ModelSpec, Park, StateReason};
use crate::policy::batching::{Batching, Change, Pass};
use crate::policy::learn::{self, LOAD_WEIGHT, Rate, SERVICE_WEIGHT, blend};
use crate::policy::plan::Decision;
use crate::policy::tier::{Bare, Parked};
use crate::policy::view::ModelView;
use crate::scheduler::inventory::Inventory;
use crate::scheduler::queue::{Queue, Run, Slots};
use crate::scheduler::state::{Lack, Place, Room, Storing};
use crate::store::Learned;

/// Jobs of a run end about together: completions within this time count as one sample of the time for each.
const TOGETHER_MS: i64 = 100;
/// Of its device memory, what a parked worker takes in host memory.
const PARKED_SHARE: f64 = 0.6;

/// Why a model cannot be loaded now.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Trouble {
    /// What its waiting jobs say.
    pub(super) reason: StateReason,
    /// What a sync caller is told; `None`: such calls wait.
    pub(super) error: Option<JobError>,
    /// For a person.
    pub(super) text: String,
    /// When it may be over by itself.
    pub(super) until: Option<Millis>,
}

/// Completions since the last sample.
#[derive(Clone, Copy, Debug)]
struct Group {
    /// Since when jobs waited and none had ended.
    from: Millis,
    /// When the first and the last of them ended.
    first: Millis,
    last: Millis,
    count: u32,
}

/// A run of a model that batches, on a worker.
#[derive(Clone, Copy, Debug)]
struct Running {
    batch_key: i64,
    since: Millis,
    load: i64,
    jobs: u32,
    answered: u32,
}

/// What a worker is loaded from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// From nothing.
    Disk,
    /// From its copy in host memory.
    Copy,
    /// It is parked without a copy: its process is there, its weights are read again.
    Bare,
}

/// Phases of a load that a wake without a copy has, too.
const READ_AGAIN: [&str; 3] = ["read", "device", "warm_up"];

/// What this run of the server has seen of its workers in host memory.
#[derive(Clone, Debug, Default, PartialEq)]
struct Host {
    /// What the last one that could not be parked might have taken, in bytes.
    refused: Option<u64>,
    /// A wake without a copy, as measured, ms.
    bare_ms: Option<f64>,
    /// The same, by the phases of its last load, ms.
    read_ms: Option<f64>,
    /// One that was to be parked without a copy had to be stopped.
    never_bare: bool,
}

/// One model.
#[derive(Debug)]
pub(super) struct Model {
    pub(super) name: Arc<str>,
    pub(super) queue: Queue,
    /// Answers of its workers that are not committed yet.
    pub(super) storing: Storing,
    /// It has an entry in models.yaml.
    pub(super) is_listed: bool,
    /// Other names that clients may use for it.
    pub(super) aliases: Vec<String>,
    pub(super) trouble: Option<Trouble>,
    /// Whom its next load has beside it.
    pub(super) room: Room,
    /// Since when it has been so.
    pub(super) room_at: Millis,
    /// Where it ran out of memory though nobody could go any more, and what was free there before, in bytes; until it is
    /// ready, or may be tried anew.
    pub(super) lacked: Vec<(GpuSet, u64)>,
    /// Why it failed there, while it may be tried elsewhere.
    pub(super) lack_error: Option<JobError>,
    /// Its weights are not known to be here.
    pub(super) lack: Option<Lack>,
    /// The number of the last want of them, or of the end of one by hand.
    pub(super) want: u64,
    /// Of the weights that come from a hub ([`ModelSpec::fetch_fingerprint`]); `None`: none do.
    pub(super) fetches: Option<i64>,
    /// Why no device of this box could ever hold it.
    pub(super) too_big: Option<Decision>,
    pub(super) slots: Slots,
    /// How many jobs its passes take.
    pub(super) batching: Batching,
    /// What an earlier run learned of that, as long as it is not known whether it holds here.
    kept_batches: Option<KeptBatches>,
    /// By worker, what it runs; only where passes may have several jobs.
    runs: BTreeMap<u32, Running>,
    pub(super) timeout_ms: i64,
    pub(super) learned: Learned,
    /// It is to be loaded without a job, and the start is not over for it: it was not ready yet, there may be room, and its loads
    /// have not failed for good.
    pub(super) preload: bool,
    /// What was said by hand.
    pub(super) held: Held,
    /// When somebody asked for it by hand; `None`: nobody has since it was there last.
    pub(super) wanted_at: Option<Millis>,
    /// All workers of it are to leave, and to be stopped: somebody said so.
    pub(super) unload: bool,
    /// Workers can be parked in host memory.
    pub(super) park: bool,
    host: Host,
    gpus: u32,
    /// Memory that it takes on each device, as models.yaml says.
    declared_bytes: Option<u64>,
    /// The same, whoever shares its devices.
    memory_bytes: Option<u64>,
    /// The driver takes its workers to host memory: they have nothing there until they are parked nor when they are back, and
    /// their loads are promised nothing.
    pub(super) is_checkpointed: bool,
    /// Its memory is for it to tell: neither declared nor all of the device.
    tells_bytes: bool,
    pin: bool,
    max_replicas: u32,
    startup_ms: f64,
    service_prior_ms: f64,
    idle_ttl_ms: Option<i64>,
    rate: Rate,
    backlogged_since: Option<Millis>,
    group: Option<Group>,
    /// When its last job was answered, if nobody has come since.
    answered_last: Option<Millis>,
}

impl Model {
    pub(super) fn of(spec: &ModelSpec) -> Self {
        let service_prior_ms = match spec.kind {
            ModelKind::Text | ModelKind::Custom => 3_000.0,
            ModelKind::Image => 5_000.0,
            ModelKind::Audio => 10_000.0,
        };
        Self {
            is_listed: true,
            aliases: spec.aliases.clone(),
            slots: Slots { limit: spec.limit, max_batch: spec.max_batch },
            batching: Batching::new(spec.first_batch, spec.max_batch.min(spec.limit)),
            timeout_ms: i64::try_from(spec.timeout.as_millis()).unwrap_or(i64::MAX),
            preload: spec.preload,
            park: spec.park.is_on(),
            fetches: spec.fetch_fingerprint(),
            gpus: spec.gpus,
            declared_bytes: spec.memory.filter(|_| !spec.exclusive),
            memory_bytes: spec.memory,
            is_checkpointed: spec.park == Park::Checkpoint,
            tells_bytes: spec.memory.is_none() && !spec.exclusive,
            pin: spec.pin,
            max_replicas: spec.max_replicas.max(1),
            startup_ms: spec.startup_time.as_secs_f64() * 1e3,
            service_prior_ms,
            idle_ttl_ms: spec.idle_ttl.map(|ttl| i64::try_from(ttl.as_millis()).unwrap_or(i64::MAX)),
            learned: Learned { entry: Some(spec.fingerprint()), ..Learned::default() },
            ..Self::named(&spec.name)
        }
    }

    /// What was learned in an earlier run; not what another entry took of memory.
    pub(super) fn remember(&mut self, known: &Learned) {
        let entry = self.learned.entry;
        self.learned = known.clone();
        if known.entry.is_some() && known.entry != entry {
            self.learned.forget_memory();
        }
        self.learned.entry = entry;
        self.kept_batches = Some(std::mem::take(&mut self.learned.batches));
    }

    /// Takes in what an earlier run learned of its passes, once it is known whether it was on such a GPU.
    pub(super) fn restore_batches(&mut self, inventory: &Inventory) {
        let now = self.device_bytes(inventory);
        let Some(kept) = self.kept_batches.take() else { return };
        match (kept.device_bytes, now) {
            (Some(_), None) => self.kept_batches = Some(kept),
            (Some(then), Some(now)) if then != now => {}
            _ => self.batching.restore(&kept.shapes),
        }
    }

    /// All that was learned, to be kept.
    pub(super) fn to_keep(&self, inventory: &Inventory) -> Learned {
        let now = || KeptBatches { device_bytes: self.device_bytes(inventory), shapes: self.batching.kept() };
        Learned { batches: self.kept_batches.clone().unwrap_or_else(now), ..self.learned.clone() }
    }

    /// Memory of the largest GPU, if it runs on GPUs and they are known.
    fn device_bytes(&self, inventory: &Inventory) -> Option<u64> {
        inventory.gpus.iter().copied().max().filter(|bytes| *bytes > 0 && self.needs_gpus())
    }

    /// A model that has waiting jobs and no entry any more.
    pub(super) fn unknown(name: &str) -> Self {
        let mut model = Self::named(name);
        model.lose_entry(None);
        model
    }

    /// It has no entry any more; `heir`: the model whose alias its name is now.
    pub(super) fn lose_entry(&mut self, heir: Option<&str>) {
        let name = &self.name;
        let purge = format!("`roundhouse queue purge --model {name}`");
        let text = match heir {
            Some(heir) => format!(
                "`{name}` is an alias of `{heir}` now, and no entry of models.yaml: its waiting jobs stay its own; end them \
                 with {purge}, and send them again, which `POST /v1/jobs/{{id}}/retry` does for each"
            ),
            None => format!(
                "`{name}` is not in models.yaml any more: add it back, or cancel its jobs, all that wait with {purge}"
            ),
        };
        (self.is_listed, self.preload, self.wanted_at, self.too_big) = (false, false, None, None);
        self.aliases = Vec::new();
        self.trouble = Some(Trouble { reason: StateReason::ModelBlocked, error: None, text, until: None });
    }

    /// It has another entry, or one again. `restart`: its workers are others from now on.
    pub(super) fn take_entry(&mut self, spec: &ModelSpec, restart: bool) {
        let new = Self::of(spec);
        if restart {
            self.learned.forget_memory();
            self.host = Host::default();
        }
        // A fetch of the same weights goes on, and so does its pause.
        if !self.is_listed || self.fetches != new.fetches {
            (self.fetches, self.lack) = (new.fetches, None);
        }
        self.learned.entry = new.learned.entry;
        self.memory_bytes = new.memory_bytes;
        self.is_checkpointed = new.is_checkpointed;
        self.preload = new.preload && (self.preload || !self.is_listed);
        (self.is_listed, self.aliases) = (true, new.aliases);
        if restart || self.slots != new.slots {
            (self.batching, self.kept_batches) = (new.batching, None);
        }
        (self.trouble, self.too_big) = (None, None);
        (self.room, self.lacked, self.lack_error) = (Room::Shared, Vec::new(), None);
        (self.slots, self.timeout_ms, self.park) = (new.slots, new.timeout_ms, new.park);
        (self.gpus, self.declared_bytes, self.tells_bytes) = (new.gpus, new.declared_bytes, new.tells_bytes);
        (self.pin, self.max_replicas, self.idle_ttl_ms) = (new.pin, new.max_replicas, new.idle_ttl_ms);
        (self.startup_ms, self.service_prior_ms) = (new.startup_ms, new.service_prior_ms);
    }

    /// Most workers of it at once.
    pub(super) fn max_replicas(&self) -> u32 {
        self.max_replicas
    }

    /// One of which nothing but its name is known.
    fn named(name: &str) -> Self {
        let name: Arc<str> = Arc::from(name);
        Self {
            queue: Queue::new(name.clone()),
            storing: Storing::default(),
            name,
            is_listed: false,
            aliases: Vec::new(),
            trouble: None,
            room: Room::Shared,
            room_at: 0,
            lacked: Vec::new(),
            lack_error: None,
            lack: None,
            want: 0,
            fetches: None,
            too_big: None,
            slots: Slots { limit: 1, max_batch: 1 },
            batching: Batching::new(1, 1),
            kept_batches: None,
            runs: BTreeMap::new(),
            timeout_ms: i64::MAX,
            learned: Learned::default(),
            preload: false,
            held: Held::default(),
            wanted_at: None,
            unload: false,
            park: false,
            host: Host::default(),
            gpus: 1,
            declared_bytes: None,
            memory_bytes: None,
            is_checkpointed: false,
            tells_bytes: false,
            pin: false,
            max_replicas: 1,
            startup_ms: 60_000.0,
            service_prior_ms: 3_000.0,
            idle_ttl_ms: None,
            rate: Rate::default(),
            backlogged_since: None,
            group: None,
            answered_last: None,
        }
    }

    /// In trouble for ever, if it is too big for this box.
    pub(super) fn block_too_big(&mut self) {
        if let Some(Decision { reason, .. }) = &self.too_big {
            let error = Some(JobError::new(ErrorCode::NoWorkerForModel, reason.clone(), false));
            self.trouble =
                Some(Trouble { reason: StateReason::ModelBlocked, error, text: reason.clone(), until: None });
        }
    }

    /// Why it cannot be loaded now: a trouble of its own, or its weights are not here.
    pub(super) fn blocked(&self) -> Option<&Trouble> {
        self.trouble.as_ref().or(self.lack.as_ref().map(|lack| &lack.trouble))
    }

    /// A worker of it tells the memory that it takes on each device.
    pub(super) fn count_bytes(&mut self, device_bytes: u64) {
        if self.tells_bytes {
            self.learned.device_bytes = Some(device_bytes);
        }
    }

    /// Jobs that a worker has, or whose answers are being stored: for the store, they run.
    pub(super) fn under_way(&self) -> usize {
        self.queue.running().len() + self.storing.len()
    }

    /// Whether its workers run on GPUs.
    pub(super) fn needs_gpus(&self) -> bool {
        self.gpus > 0
    }

    /// That there are not enough GPUs for it now.
    pub(super) fn lacks_gpus(&self) -> Trouble {
        let text = match self.gpus {
            0 | 1 => {
                "needs a GPU and this box sees none that could hold it; its jobs wait until one is there".to_owned()
            }
            count => format!(
                "needs {count} GPUs side by side and this box does not see them now; its jobs wait until they are there"
            ),
        };
        Trouble { reason: StateReason::NoGpu, error: None, text, until: None }
    }

    fn cold_ms(&self) -> f64 {
        self.learned.load_ms.unwrap_or(self.startup_ms)
    }

    fn wake_ms(&self) -> f64 {
        self.learned.wake_ms.unwrap_or_else(|| learn::wake_prior_ms(self.cold_ms()))
    }

    /// Expected load.
    pub(super) fn load_ms(&self, source: Source) -> f64 {
        match source {
            Source::Disk => self.cold_ms(),
            Source::Copy => self.wake_ms(),
            Source::Bare => self.bare().wake_ms.unwrap_or_else(|| self.cold_ms()),
        }
    }

    /// What a wake without a copy takes: measured, or else what its last load took from the reading on.
    pub(super) fn bare(&self) -> Bare {
        Bare { cold_ms: self.cold_ms(), wake_ms: self.host.bare_ms.or(self.host.read_ms) }
    }

    /// Where the time of a load from nothing went.
    pub(super) fn count_phases(&mut self, phases: &[PhaseTime]) {
        let again = || phases.iter().filter(|phase| READ_AGAIN.contains(&&*phase.phase));
        let is_told = again().next().is_some();
        self.host.read_ms = is_told.then(|| again().map(|phase| phase.ms as f64).sum());
    }

    /// Somebody says that it is another matter now.
    pub(super) fn forget_never_bare(&mut self) {
        self.host.never_bare = false;
    }

    /// A worker that was to be parked without a copy was stopped instead.
    pub(super) fn count_never_bare(&mut self) {
        self.host.never_bare = true;
    }

    /// Whether one that says this may be parked without a copy, if that is worth it: it says that it can; or it says nothing
    /// at all, of the phases of its load neither, as vLLM, and has not failed to.
    pub(super) fn can_be_bare(&self, said: &HostCopy) -> bool {
        let says_nothing = said.bytes.is_none() && said.can_park.is_none() && self.host.read_ms.is_none();
        !self.is_checkpointed && !self.host.never_bare && said.can_reread.unwrap_or(says_nothing)
    }

    pub(super) fn service_ms(&self) -> f64 {
        self.learned.service_ms.unwrap_or(self.service_prior_ms)
    }

    /// Jobs that a worker serves at once, when enough wait.
    pub(super) fn at_once(&self) -> u32 {
        if self.batching.is_on() { self.batching.usual() } else { self.slots.limit }
    }

    /// A run begins; none else is on its worker.
    pub(super) fn begin(&mut self, run: &Run, place: &Place, now: Millis) {
        // Those that ran when a worker died are no sample, whatever they have in common.
        if let Some(first) = run.jobs.first().filter(|_| self.batching.is_on() && !run.alone) {
            let jobs = u32::try_from(run.jobs.len()).unwrap_or(u32::MAX);
            let running = Running { batch_key: first.batch_key, since: now, load: place.load, jobs, answered: 0 };
            self.runs.insert(place.replica, running);
        } else {
            self.runs.remove(&place.replica);
        }
    }

    /// A job of the run on this worker has ended; if it was the last one, the run is a sample if all were answered.
    pub(super) fn end_of_run(&mut self, worker: u32, answered: bool, now: Millis) -> Option<Change> {
        let run = self.runs.get_mut(&worker)?;
        run.answered += u32::from(answered);
        if self.queue.running_on(worker) > 0 {
            return None;
        }
        let Running { batch_key, since, load, jobs, answered } = self.runs.remove(&worker)?;
        if answered == jobs { self.batching.passed(batch_key, Pass { jobs, ms: now - since, load }) } else { None }
    }

    /// Device time per completed job while jobs wait.
    pub(super) fn each_ms(&self) -> f64 {
        let share = f64::from(self.at_once().clamp(1, 8));
        let seen = || self.group.map(|group| (group.last - group.from) as f64 / f64::from(group.count));
        self.learned.each_ms.or_else(seen).unwrap_or(self.service_ms() / share)
    }

    /// Of the time of one device, how much of late arrivals ask for.
    pub(super) fn asked(&self, now: Millis) -> f64 {
        if self.blocked().is_some() { 0.0 } else { self.rate.per_ms(now) * self.each_ms() * self.weight() }
    }

    /// Whether that is more than a guess.
    pub(super) fn has_measured_each(&self) -> bool {
        self.learned.each_ms.is_some() || self.group.is_some()
    }

    pub(super) fn stop_ms(&self) -> f64 {
        self.learned.stop_ms.unwrap_or(1_000.0)
    }

    /// What its tenant is charged for a job in advance, in GPU ms.
    pub(super) fn charge_ms(&self) -> f64 {
        self.each_ms() * self.weight()
    }

    /// GPUs that its time counts for.
    pub(super) fn weight(&self) -> f64 {
        f64::from(self.gpus.max(1))
    }

    /// Host memory that a parked worker takes.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "sizes are far below 2^53 bytes")]
    pub(super) fn parked(&self, now: Millis) -> Parked {
        let bytes = self.learned.host.bytes.unwrap_or((self.on_devices() as f64 * PARKED_SHARE) as u64);
        Parked { rate: self.rate.per_ms(now), cold_ms: self.cold_ms(), wake_ms: self.wake_ms(), bytes }
    }

    /// A worker, which may take so many bytes of host memory, says what its copy takes.
    pub(super) fn count_host(&mut self, said: &HostCopy, promised: Option<u64>) {
        let bytes = said.bytes.filter(|bytes| *bytes > 0).or(self.learned.host.bytes);
        self.host.refused = promised.filter(|_| said.can_park == Some(false));
        self.learned.host = HostCopy { bytes, ..said.clone() };
    }

    /// A worker is ready after a load from nothing, and has said this. One that could not make its copy shows nothing.
    pub(super) fn count_copy(&mut self, said: &HostCopy) {
        if *said == HostCopy::default() {
            // It says nothing, so what was said of one before it holds no more.
            (self.learned.host.can_park, self.learned.host.note, self.host.refused) = (None, None, None);
        }
        if said.can_park != Some(false) {
            self.learned.copies_at_load = Some(said.bytes.is_some_and(|bytes| bytes > 0));
        }
    }

    /// Whether a load is known to take host memory at once; or would, if it had not been too little the last time.
    pub(super) fn copies_at_load(&self) -> bool {
        let takes = self.parked(0).bytes;
        takes > 0 && (self.learned.copies_at_load == Some(true) || self.host.refused.is_some_and(|most| most < takes))
    }

    /// Whether the last worker that could not be parked might have taken enough: room is not what it lacked.
    pub(super) fn has_refused_room(&self) -> bool {
        self.host.refused.is_some_and(|most| most >= self.parked(0).bytes)
    }

    /// Memory that it takes on all of its devices, bytes; 0: nobody knows.
    fn on_devices(&self) -> u64 {
        self.memory_bytes.or_else(|| self.bytes()).unwrap_or(0).saturating_mul(u64::from(self.gpus))
    }

    /// Host memory that a worker takes for its copy while it loads, of what it was promised, at most; bytes. Before one has
    /// said what it takes, it may be all that it has on its devices.
    pub(super) fn host_at_load(&self, promised: Option<u64>) -> u64 {
        let makes_none = self.learned.copies_at_load == Some(false);
        let most = self.learned.host.bytes.unwrap_or_else(|| self.on_devices());
        let takes = if makes_none { Some(0) } else { Some(most).filter(|b| *b > 0) };
        promised.map_or(0, |promised| takes.map_or(promised, |takes| takes.min(promised)))
    }

    /// A submission came in.
    pub(super) fn count_arrival(&mut self, now: Millis) {
        self.rate.count(now);
        if let Some(answered) = self.answered_last.take() {
            blend(&mut self.learned.gap_ms, (now - answered).max(0) as f64, LOAD_WEIGHT);
        }
    }

    /// Its jobs wait since somebody has paused it. Those of a model without an entry wait for that first.
    pub(super) fn is_paused(&self) -> bool {
        self.held.paused && self.is_listed
    }

    /// Jobs that may be claimed now, by class; none while it is paused.
    pub(super) fn pending(&self) -> (usize, usize) {
        if self.is_paused() { (0, 0) } else { self.queue.pending() }
    }

    /// Never displaced.
    pub(super) fn is_pinned(&self) -> bool {
        self.held.pin.unwrap_or(self.pin)
    }

    /// A pause has ended: the time until now was not spent on its jobs.
    pub(super) fn resume(&mut self, now: Millis) {
        self.flush();
        self.backlogged_since = (self.queue.len() > 0).then_some(now);
    }

    /// A job waits now.
    pub(super) fn count_waiting(&mut self, now: Millis) {
        self.backlogged_since.get_or_insert(now);
    }

    /// A worker is ready after `load_ms`.
    pub(super) fn count_load(&mut self, load_ms: f64, source: Source, now: Millis) {
        blend(self.measured(source), load_ms, LOAD_WEIGHT);
        blend(&mut self.learned.reload_ms, load_ms, LOAD_WEIGHT);
        blend(&mut self.learned.waiting_at_load, self.queue.len() as f64, LOAD_WEIGHT);
        self.flush();
        self.backlogged_since = (self.queue.len() > 0).then_some(now);
    }

    fn measured(&mut self, source: Source) -> &mut Option<f64> {
        match source {
            Source::Disk => &mut self.learned.load_ms,
            Source::Copy => &mut self.learned.wake_ms,
            Source::Bare => &mut self.host.bare_ms,
        }
    }

    /// A job has ended; `answered_after`: it was answered after this time.
    pub(super) fn count_end(&mut self, answered_after: Option<Millis>, now: Millis) {
        if let Some(service) = answered_after {
            blend(&mut self.learned.service_ms, service as f64, SERVICE_WEIGHT);
            // Device time per completion is only seen while jobs wait: otherwise the pauses are the callers'.
            match &mut self.group {
                Some(group) if now - group.first <= TOGETHER_MS => {
                    (group.last, group.count) = (now, group.count + 1);
                }
                _ => {
                    self.flush();
                    self.group = self.backlogged_since.map(|from| Group { from, first: now, last: now, count: 1 });
                }
            }
        }
        self.backlogged_since = (self.queue.len() > 0).then_some(now);
        self.answered_last = (answered_after.is_some() && self.queue.len() == 0).then_some(now);
    }

    /// Takes the completions since the last sample into the average.
    fn flush(&mut self) {
        if let Some(Group { from, last, count, .. }) = self.group.take() {
            let sample = (last - from).max(0) as f64 / f64::from(count);
            let keeps = (1.0 - SERVICE_WEIGHT).powi(i32::try_from(count).unwrap_or(i32::MAX));
            blend(&mut self.learned.each_ms, sample, 1.0 - keeps);
        }
    }

    /// Memory that it takes on each device, as declared, else as it told last; `None`: the whole device.
    fn bytes(&self) -> Option<u64> {
        self.declared_bytes.or_else(|| self.learned.device_bytes.filter(|_| self.tells_bytes))
    }

    /// As [`Self::bytes`], on these devices. What it told on a larger device than any of these says nothing here.
    pub(super) fn bytes_on(&self, inventory: &Inventory) -> Option<u64> {
        let device = if self.needs_gpus() { inventory.gpus.iter().copied().max() } else { inventory.cpu };
        let fits = |bytes: &u64| self.declared_bytes.is_some() || device.is_none_or(|device| *bytes <= device);
        self.bytes().filter(fits).filter(|_| !inventory.one_at_a_time)
    }

    /// A wake that comes to nothing costs a load from nothing.
    pub(super) fn count_failed_wake(&mut self, source: Source) {
        let cold_ms = self.cold_ms();
        blend(self.measured(source), cold_ms, LOAD_WEIGHT);
    }

    /// As the policy sees it; `parked`: where workers of it wait in host memory.
    pub(super) fn view(&self, inventory: &Inventory, parked: Vec<GpuSet>, now: Millis) -> ModelView {
        let (pending_interactive, pending_batch) = self.pending();
        // What is paused waits for nothing but the end of the pause.
        let waiting = Some(&self.queue).filter(|_| !self.is_paused());
        let gpus = if inventory.one_at_a_time { 1 } else { self.gpus };
        ModelView {
            name: self.name.clone(),
            pending_interactive,
            pending_batch,
            paused: if self.is_paused() { self.queue.len() } else { 0 },
            wanted_at: self.wanted_at,
            oldest_interactive: waiting.and_then(|queue| queue.oldest(Class::Interactive)),
            oldest_batch: waiting.and_then(|queue| queue.oldest(Class::Batch)),
            first_deadline: waiting.and_then(Queue::first_deadline),
            last_deadline: waiting.and_then(Queue::last_deadline),
            left_at: self.learned.left_at,
            gpus,
            bytes: self.bytes_on(inventory),
            apart: self.room != Room::Shared,
            lacked: self.lacked.clone(),
            load_ms: self.load_ms(if parked.is_empty() { Source::Disk } else { Source::Copy }),
            cold_ms: self.cold_ms(),
            parked,
            bare: false,
            reload_ms: self.learned.reload_ms.unwrap_or_else(|| self.cold_ms()),
            stop_ms: self.stop_ms(),
            service_ms: self.service_ms(),
            each_ms: self.each_ms(),
            rate: self.rate.per_ms(now),
            gap_ms: self.learned.gap_ms,
            group: self.learned.waiting_at_load.unwrap_or(1.0),
            trouble: self.blocked().map(|t| t.text.clone()),
            trouble_until: self.blocked().and_then(|t| t.until),
            preload: self.preload,
            idle_ttl_ms: self.idle_ttl_ms,
            pin: self.is_pinned(),
            max_replicas: self.max_replicas,
        }
    }
}
