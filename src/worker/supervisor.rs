//! One task per worker (of a model with replicas there are several), the only writer of its state.

use std::collections::{BTreeSet, VecDeque};
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::domain::worker::{HostCopy, LETS_GO_MS, PhaseTime, Report, WorkerView};
use crate::domain::{ErrorCode, GpuSet, JobError, Millis, ModelSpec, ModelState, Park};
use crate::lifecycle::Tasks;
use crate::worker::gpu::{Gpu, GpuProbe};
use crate::worker::health::{Doctor, Health, Memory};
use crate::worker::logs::{self, Tail};
use crate::worker::ports;
use crate::worker::process::{self, Start, WorkerProcess};
use crate::worker::spare::Spares;

#[path = "arrivals.rs"]
mod arrivals;
#[path = "device_memory.rs"]
mod device_memory;
#[path = "loading.rs"]
mod loading;
pub(super) use loading::backoff;
#[path = "out_of_memory.rs"]
mod out_of_memory;
#[path = "parking.rs"]
mod parking;
#[path = "rehearsal.rs"]
mod rehearsal;

/// Deaths soon after readiness, in a row, that cost no back-off: a job that kills its worker is the scheduler's to find.
const FREE_EARLY_DEATHS: u32 = 2;
/// Orders that may wait while a transition that cannot be broken off goes on.
const ORDERS_LIMIT: usize = 64;
/// How long a guard may take to end what a dead worker left running, and to tell how the worker ended.
const EXIT_NOTICE: Duration = Duration::from_millis(2500);
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
    /// Device memory that ended workers have left in use.
    pub stuck: StuckMemory,
    /// Processes that a load may take over.
    pub spares: Spares,
}

use device_memory::Free;
pub use device_memory::StuckMemory;
use loading::Setback;

/// Where supervisors report to: (model, number of the worker, report).
pub type Reports = mpsc::UnboundedSender<(String, u32, Report)>;

/// Asks one supervisor; the answers are [`Report`]s. Cheap to clone.
#[derive(Clone, Debug)]
pub struct WorkerHandle {
    orders: mpsc::Sender<Asked>,
    spec: watch::Sender<ModelSpec>,
    view: watch::Receiver<WorkerView>,
    has_looked: watch::Receiver<bool>,
}

/// An order and what goes with it.
#[derive(Clone, Copy, Debug)]
struct Asked {
    order: Order,
    /// Where it is to be loaded.
    set: Option<GpuSet>,
    /// With a load: most host memory that the copy of its weights may take, in bytes; `None`: it is not to be parked.
    park_bytes: Option<u64>,
    /// With a load: nobody waits for it.
    at_leisure: bool,
}

/// Orders in turn.
struct Inbox {
    orders: mpsc::Receiver<Asked>,
    /// Those that came in the middle of a transition, and are followed after it.
    kept: VecDeque<Asked>,
}

impl Inbox {
    /// The next order; `None`: nobody will give one any more.
    async fn recv(&mut self) -> Option<Asked> {
        match self.kept.pop_front() {
            Some(asked) => Some(asked),
            None => self.orders.recv().await,
        }
    }

    /// The next one that has not been kept: what comes in the middle of a transition.
    async fn fresh(&mut self) -> Option<Asked> {
        self.orders.recv().await
    }

    /// Takes those out that wait and are this one; whether there was any.
    fn take_out(&mut self, order: Order) -> bool {
        while let Ok(asked) = self.orders.try_recv() {
            self.kept.push_back(asked);
        }
        let waiting = self.kept.len();
        self.kept.retain(|asked| asked.order != order);
        self.kept.len() < waiting
    }
}

/// What a supervisor can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Get it ready: `Loading`, then `Ready`, `LoadFailed`, `DoesNotFit` or `NoGpu`. While it is ready or loading: nothing.
    Load,
    /// Bring it back from host memory to where it was: `Ready`. If it does not come back, or is to be elsewhere: as `Load`.
    Wake,
    /// Leave it in host memory: `Parked` when its device memory is free. If it cannot be parked, or is not ready: as `Stop`.
    Park,
    /// As `Park`, without a copy of its weights in host memory: only its process stays, and `Wake` reads them again.
    ParkBare,
    /// End it: `Stopped` when its device memory is free. While absent: `Stopped` at once.
    Stop,
    /// Forget back-off and quarantine: `Available`.
    Retry,
    /// A job got no answer though the worker looks alive: probe now; `Ready` again if it answers, else it is ended and
    /// `Died` reported.
    Suspect,
    /// Somebody waits now for what was to be loaded at leisure. Unless it loads: nothing.
    Expedite,
    /// It has answered a job since it was made ready: if it dies soon, it is not of itself.
    Proven,
}

/// How fast a supervisor looks and how long it waits. The default is what runs; tests shorten it.
#[derive(Clone, Debug)]
pub struct Tempo {
    /// Between two probes while loading.
    pub probe_every: Duration,
    /// Longest answer to such a probe.
    pub probe_limit: Duration,
    /// Between two probes of a ready worker.
    pub watch_every: Duration,
    /// Longest answer to such a probe.
    pub watch_limit: Duration,
    /// Probes in a row without a good answer after which a ready worker is ended.
    pub watch_misses: u32,
    /// Between two of the quick probes of a suspected worker, and the longest answer to one.
    pub suspect_limit: Duration,
    /// How long a stranger may answer on the port of a loading worker before another port is tried.
    pub stranger_limit: Duration,
    /// Between two looks for a GPU on a box without one.
    pub gpu_every: Duration,
    /// A death sooner than this after readiness is an early one.
    pub early_death: Duration,
    /// Longest wait for the driver to show the memory free.
    pub memory_limit: Duration,
    /// Longest time in which a worker has to fall asleep.
    pub park_limit: Duration,
    /// Longest wait for the driver to show the memory of a worker free that says it sleeps.
    pub park_memory_limit: Duration,
    /// Longest time of the driver's checkpoint, either way.
    pub checkpoint_limit: Duration,
    /// Longest time in which a sleeping worker has to be ready again.
    pub wake_limit: Duration,
    /// Shortest limit of a load; the limit is 10 times the model's `startup_time`, if that is longer.
    pub load_limit_min: Duration,
}

impl Default for Tempo {
    fn default() -> Self {
        Self {
            probe_every: Duration::from_millis(25),
            probe_limit: Duration::from_secs(1),
            watch_every: Duration::from_secs(2),
            watch_limit: Duration::from_secs(5),
            watch_misses: 3,
            suspect_limit: Duration::from_secs(1),
            stranger_limit: Duration::from_secs(2),
            gpu_every: Duration::from_secs(5),
            early_death: Duration::from_secs(10),
            memory_limit: Duration::from_secs(10),
            // The first time, a worker may have to lock the pages of its host copy: 10 s for vLLM with 8B.
            park_limit: Duration::from_secs(60),
            park_memory_limit: Duration::from_secs(3),
            // 48 GiB took 38 s to host memory, on an H100.
            checkpoint_limit: Duration::from_secs(180),
            wake_limit: Duration::from_secs(30),
            load_limit_min: Duration::from_secs(600),
        }
    }
}

impl WorkerHandle {
    /// Starts the supervisor of one worker of `spec`, by its number. Reports go to `reports` as (model, number, report). When the last clone of the handle is
    /// dropped, the worker is stopped and the supervisor ends.
    pub fn start(spec: ModelSpec, replica: u32, around: Surroundings, reports: Reports) -> Self {
        Self::start_with(spec, replica, around, Tempo::default(), reports)
    }

    /// As [`Self::start`], at another tempo.
    pub fn start_with(spec: ModelSpec, replica: u32, around: Surroundings, tempo: Tempo, reports: Reports) -> Self {
        let (orders, inbox) = mpsc::channel(ORDERS_LIMIT);
        let log_path = logs::path(&around.log_dir, &spec.name, replica);
        let (looked, has_looked) = watch::channel(false);
        let (view_writer, view) = watch::channel(WorkerView {
            model: spec.name.clone(),
            replica,
            gpus: Vec::new(),
            state: ModelState::Absent,
            phase: None,
            percent: None,
            phases: Vec::new(),
            pid: None,
            port: None,
            since: around.clock.now(),
            failed_loads: 0,
            starts: 0,
            retry_at: None,
            reason: None,
            device_bytes: None,
            bare: false,
            lost_copy: None,
            last_failure: None,
            host_bytes: None,
            can_park: None,
            park_note: None,
            log_path: log_path.display().to_string(),
        });
        let tasks = around.tasks.clone();
        let (spec_writer, next_spec) = watch::channel(spec.clone());
        let supervisor = Supervisor {
            hard: tasks.hard().clone(),
            spec,
            next_spec,
            replica,
            gpus: Vec::new(),
            park_bytes: None,
            at_leisure: false,
            park_refused: None,
            failed_parks: 0,
            free_bytes: None,
            around,
            tempo,
            orders: Inbox { orders: inbox, kept: VecDeque::new() },
            reports,
            view: view_writer,
            looked,
            failed_loads: 0,
            early_deaths: 0,
            last_deaths: None,
            is_small: false,
            small: None,
            lacked: Vec::new(),
            last_failure: None,
        };
        tasks.spawn("supervisor", supervisor.run());
        Self { orders, spec: spec_writer, view, has_looked }
    }

    /// Comes back when the driver has been asked for the first time, if the model needs a GPU: from then on the view says
    /// whether it is blocked.
    pub async fn has_looked(&self) {
        // An error: the supervisor has ended.
        let _ = self.has_looked.clone().wait_for(|has_looked| *has_looked).await;
    }

    /// From its next load on it is a worker of this entry, of the same name.
    pub fn edit(&self, spec: ModelSpec) {
        self.spec.send_replace(spec);
    }

    /// Gives an order. Orders are followed in turn; one that is given in the middle of a transition is followed after it,
    /// except that `Stop` breaks a load off.
    pub fn order(&self, order: Order) {
        self.give(Asked { order, set: None, park_bytes: None, at_leisure: false });
    }

    /// As [`Self::order`]; a load is to be on these devices, and may take `park_bytes` of host memory for the copy that is
    /// parked (`None`: it will not be). Without any word of the devices a worker may see all GPUs.
    pub fn order_on(&self, order: Order, set: GpuSet, park_bytes: Option<u64>) {
        self.give(Asked { order, set: Some(set), park_bytes, at_leisure: false });
    }

    /// As [`Self::order_on`] with `Load`, while nobody waits: a worker that will make its copy when it is parked is put to sleep
    /// and woken once before it is `Ready`, since the first time takes long (page-locking). `Expedite` before that says that
    /// somebody waits now.
    pub fn load_at_leisure(&self, set: GpuSet, park_bytes: Option<u64>) {
        self.give(Asked { order: Order::Load, set: Some(set), park_bytes, at_leisure: true });
    }

    fn give(&self, asked: Asked) {
        if let Err(error) = self.orders.try_send(asked) {
            let order = asked.order;
            let model = &self.view.borrow().model;
            tracing::error!(model, ?order, "a supervisor takes no order: {error}");
        }
    }

    /// The latest view; may be stale.
    pub fn view(&self) -> WorkerView {
        self.view.borrow().clone()
    }
}

/// Ends every process whose environment carries this data dir's instance mark (an earlier run's orphans); returns how
/// many there were, when they are gone. `grace` is cut to 3 s: they had theirs when their server ended. `since`: if that run
/// did not end in order, when it began, in ms since the epoch: the files that its workers left in shared folders are removed.
pub async fn end_orphans(data_dir_id: &str, grace: Duration, since: Option<Millis>) -> usize {
    process::end_orphans(data_dir_id, grace, since).await
}

/// What the supervisor does next. Each phase has its own function, which ends with the next phase.
enum Phase {
    Absent,
    Loading,
    Serving(Box<Running>),
    Parked(Box<Running>),
    BackingOff {
        error: JobError,
        until: Millis,
        after: Setback,
    },
    Blocked,
    /// Its GPU has not enough memory for it; so much was free there, in bytes.
    DoesNotFit {
        error: JobError,
        free: u64,
    },
    Ended,
}

/// A worker that is ready.
struct Running {
    process: WorkerProcess,
    doctor: Doctor,
    since: Instant,
    /// Device memory in use before it was loaded, in bytes; `None` for a CPU model.
    memory_before: Option<u64>,
    /// Device memory that it says it takes on each GPU, in bytes.
    own: Option<u64>,
    /// How much more device memory was in use when it was ready, in bytes.
    grown: Option<u64>,
    /// What was reported of its copy in host memory.
    host: HostCopy,
    /// It sleeps without a copy of its weights.
    is_bare: bool,
    /// Those of its processes that the driver has shown on its GPUs; none: it shows no numbers that are ours.
    pids: BTreeSet<u32>,
}

/// What a ready worker's watch found.
enum Pulse {
    /// For how long nobody has waited for the pass that it runs, in ms, if it says so.
    Alive(Memory, Option<i64>),
    Missed(String),
    /// Nobody listens: it is gone or about to be, and its guard will say how.
    Refused,
}

/// Something that happens while a worker serves.
enum Event {
    Hard,
    Order(Option<Order>),
    Exited(String),
    Pulse(Pulse),
}

type Probe = Pin<Box<dyn Future<Output = Pulse> + Send>>;

struct Supervisor {
    /// Of the worker that is there, or was last.
    spec: ModelSpec,
    /// Of the next one.
    next_spec: watch::Receiver<ModelSpec>,
    /// Its number among the workers of the model.
    replica: u32,
    /// Where it is loaded or to be loaded, by the driver's numbers; empty: nobody said.
    gpus: Vec<u32>,
    /// Host memory that its next load may take for the copy that is parked, in bytes; `None`: it will not be.
    park_bytes: Option<u64>,
    /// Nobody waits for its present load.
    at_leisure: bool,
    /// Why the worker that is there must not be put to sleep: another one of this load did not come back, or too many before it.
    park_refused: Option<String>,
    /// Parks and wakes that failed in a row.
    failed_parks: u32,
    /// Memory that was free on the fullest of its GPUs before it was loaded, in bytes.
    free_bytes: Option<u64>,
    around: Surroundings,
    tempo: Tempo,
    hard: CancellationToken,
    orders: Inbox,
    reports: Reports,
    view: watch::Sender<WorkerView>,
    /// Whether the driver was asked for the first time.
    looked: watch::Sender<bool>,
    failed_loads: u32,
    early_deaths: u32,
    /// The present load is told to make do with less memory.
    is_small: bool,
    /// What was found out when a load ran out of memory and worked with less.
    small: Option<out_of_memory::Small>,
    /// Where it ran out of memory, until it is ready somewhere, or somebody says that it is another matter now.
    lacked: Vec<out_of_memory::Lacked>,
    /// Why its last load failed, until one works or somebody says that it is another matter now.
    last_failure: Option<String>,
    /// That its worker died again and again soon after it was ready, for as long.
    last_deaths: Option<String>,
}

impl Supervisor {
    async fn run(mut self) {
        // A pod may come back without its GPU: better known before the first plan than by a swap in vain.
        let is_blocked = self.spec.gpus > 0 && !self.sees_gpu().await;
        let mut phase = if is_blocked { Phase::Blocked } else { Phase::Absent };
        self.enter(if is_blocked { ModelState::Blocked } else { ModelState::Absent });
        self.looked.send_replace(true);
        loop {
            phase = match phase {
                Phase::Absent => self.absent().await,
                Phase::Loading => self.load().await,
                Phase::Serving(running) => self.serve(*running).await,
                Phase::Parked(running) => self.lie_parked(*running).await,
                Phase::BackingOff { error, until, after } => self.back_off(error, until, after).await,
                Phase::Blocked => self.blocked().await,
                Phase::DoesNotFit { error, free } => self.wait_for_room(error, free).await,
                Phase::Ended => break,
            };
        }
        self.enter(ModelState::Absent);
    }

    // ---- phases -----------------------------------------------------------------------------------------------------

    async fn absent(&mut self) -> Phase {
        self.enter(ModelState::Absent);
        loop {
            match self.next_order().await {
                Some(Order::Load | Order::Wake) => return Phase::Loading,
                Some(Order::Stop | Order::Park | Order::ParkBare) => self.report(Report::Stopped { stop_ms: 0 }),
                Some(Order::Retry) => self.forget_failures(),
                Some(Order::Suspect | Order::Expedite | Order::Proven) => {} // It has died since, and that was reported.
                None => return Phase::Ended,
            }
        }
    }

    async fn serve(&mut self, mut running: Running) -> Phase {
        let mut misses = 0;
        let mut probe = self.watch_probe(&running.doctor);
        let mut suspected = false;
        let mut clings = false;
        loop {
            let event = tokio::select! {
                biased;
                () = self.hard.cancelled() => Event::Hard,
                order = self.orders.recv() => Event::Order(order.map(|asked| asked.order)),
                how = running.process.exited() => Event::Exited(how),
                pulse = &mut probe => Event::Pulse(pulse),
            };
            match event {
                Event::Hard | Event::Order(None) => {
                    self.enter(ModelState::Draining);
                    running.process.stop(self.around.grace).await;
                    return Phase::Ended;
                }
                Event::Order(Some(Order::Stop)) => return self.stop(running).await,
                Event::Order(Some(Order::Park)) => return self.park(running, false).await,
                Event::Order(Some(Order::ParkBare)) => return self.park(running, true).await,
                Event::Order(Some(Order::Suspect)) if !suspected => {
                    suspected = true;
                    probe = self.suspect_probe(&running.doctor);
                }
                // Its next probe tells again what it can.
                Event::Order(Some(Order::Retry)) => self.forget_failed_parks(),
                Event::Order(Some(Order::Proven)) => self.early_deaths = 0,
                Event::Order(Some(Order::Load | Order::Wake | Order::Suspect | Order::Expedite)) => {}
                Event::Exited(how) => return self.died(running, format!("it {how}")).await,
                Event::Pulse(Pulse::Alive(memory, given_up_ms)) => {
                    misses = 0;
                    self.note_memory(&mut running, memory);
                    let given_up_ms = given_up_ms.filter(|ms| *ms >= LETS_GO_MS);
                    if let Some(ms) = given_up_ms {
                        self.report(Report::GivenUp { ms });
                        if !clings {
                            tracing::warn!(model = self.spec.name, ms, "a pass that was cancelled does not end");
                        }
                    }
                    clings = given_up_ms.is_some();
                    if std::mem::take(&mut suspected) {
                        let base_url = format!("http://127.0.0.1:{}", running.process.port());
                        self.report(Report::Ready { base_url, load_ms: 0 });
                    }
                    probe = self.watch_probe(&running.doctor);
                }
                Event::Pulse(pulse) => {
                    misses += 1;
                    let why = match &pulse {
                        Pulse::Missed(why) => why.as_str(),
                        _ => "nobody listens on its port",
                    };
                    tracing::warn!(model = self.spec.name, misses, "a health probe failed: {why}");
                    if suspected || misses >= self.tempo.watch_misses {
                        let how = match pulse {
                            Pulse::Refused => timeout(EXIT_NOTICE, running.process.exited()).await.ok(),
                            _ => None,
                        };
                        let reason = how.map_or_else(
                            || format!("it stopped answering health probes: {why}"),
                            |how| format!("it {how}"),
                        );
                        return self.died(running, reason).await;
                    }
                    probe = self.watch_probe(&running.doctor);
                }
            }
        }
    }

    async fn blocked(&mut self) -> Phase {
        let reason = match (self.gpus.is_empty(), self.spec.gpus) {
            (true, 0 | 1) => "this model needs a GPU and the driver shows none".to_owned(),
            (true, count) => format!("this model needs {count} GPUs and the driver does not show as many"),
            (false, _) => "the driver does not show the GPUs that it was to be loaded on".to_owned(),
        };
        // They may be others next time.
        self.gpus.clear();
        self.take_spec();
        tracing::warn!(model = self.spec.name, "blocked: {reason}");
        self.enter(ModelState::Blocked);
        self.view.send_modify(|v| v.reason = Some(reason));
        self.report(Report::NoGpu);
        let look_every = self.tempo.gpu_every;
        loop {
            match self.next_order_within(look_every).await {
                Some(None) => return Phase::Ended,
                Some(Some(Order::Stop | Order::Park | Order::ParkBare)) => self.report(Report::Stopped { stop_ms: 0 }),
                Some(Some(Order::Suspect | Order::Expedite | Order::Proven)) => {}
                Some(Some(Order::Load | Order::Wake)) if self.sees_gpu().await => return Phase::Loading,
                Some(Some(Order::Load | Order::Wake)) => self.report(Report::NoGpu),
                Some(Some(Order::Retry)) | None => {
                    if self.sees_gpu().await {
                        self.enter(ModelState::Absent);
                        self.report(Report::Available);
                        return Phase::Absent;
                    }
                }
            }
        }
    }

    // ---- steps ------------------------------------------------------------------------------------------------------

    async fn stop(&mut self, mut running: Running) -> Phase {
        let ordered_at = Instant::now();
        self.enter(ModelState::Draining);
        self.note_life(running.since);
        let free = self.free_when(&mut running).await;
        self.release(&running);
        running.process.stop(self.around.grace).await;
        self.wait_memory_free(free).await;
        let stop_ms = self.around.clock.millis_in(ordered_at.elapsed());
        tracing::info!(model = self.spec.name, stop_ms, "stopped");
        self.enter(ModelState::Absent);
        self.report(Report::Stopped { stop_ms });
        Phase::Absent
    }

    /// A worker that had been ready is gone or has to go.
    async fn died(&mut self, mut running: Running, reason: String) -> Phase {
        let lived = running.since.elapsed();
        // A part of its memory may be free already: then what is left of the use says nothing.
        let before = running.memory_before;
        let free = self
            .free_when(&mut running)
            .await
            .map(|free| Free { at_most: free.at_most.max(before.unwrap_or(0)), ..free });
        self.release(&running);
        let tail = running.process.clear_away().await;
        let reason = tail.explain(reason);
        tracing::error!(model = self.spec.name, "the worker died: {reason}");
        self.wait_memory_free(free).await;
        self.enter(ModelState::Absent);
        // Its last answer may have been told after its end.
        let is_proven = self.orders.take_out(Order::Proven);
        let before = if is_proven { 0 } else { self.early_deaths };
        self.early_deaths = if lived < self.tempo.early_death { before + 1 } else { 0 };
        let times = self.early_deaths;
        if times <= FREE_EARLY_DEATHS {
            self.report(Report::Died { reason });
            return Phase::Absent;
        }
        let what = format!(
            "its worker died {times} times in a row soon after it was ready, without an answer in between: {reason}"
        );
        self.last_deaths = Some(what.clone());
        let after = Setback::Deaths(times);
        // The back-off is told first: a load ordered between the two reports would be answered by the second one, and the
        // order be followed when the back-off is over, whoever holds the device then.
        let (error, until) = self.enter_backoff(&format!("is not loaded for now: {what}"), &tail, after);
        self.report(Report::BacksOff {
            error: error.clone(),
            retry_at: until,
            quarantined: false,
            deaths: after.deaths(),
        });
        self.report(Report::Died { reason });
        Phase::BackingOff { error, until, after }
    }

    fn note_life(&mut self, since: Instant) {
        if since.elapsed() >= self.tempo.early_death {
            self.early_deaths = 0;
        }
    }

    fn forget_failures(&mut self) {
        self.failed_loads = 0;
        self.early_deaths = 0;
        self.small = None;
        self.lacked.clear();
        (self.last_failure, self.last_deaths) = (None, None);
        self.forget_failed_parks();
        self.view.send_modify(|v| (v.failed_loads, v.last_failure, v.reason) = (0, None, None));
        self.report(Report::Available);
    }

    // ---- probes -----------------------------------------------------------------------------------------------------

    fn watch_probe(&self, doctor: &Doctor) -> Probe {
        let (doctor, tempo) = (doctor.clone(), self.tempo.clone());
        Box::pin(async move {
            sleep(tempo.watch_every).await;
            pulse(&doctor, tempo.watch_limit).await
        })
    }

    /// Three quick tries.
    fn suspect_probe(&self, doctor: &Doctor) -> Probe {
        let (doctor, limit) = (doctor.clone(), self.tempo.suspect_limit);
        Box::pin(async move {
            let mut last = pulse(&doctor, limit).await;
            for _ in 0..2 {
                if matches!(last, Pulse::Alive(..)) {
                    break;
                }
                sleep(limit / 5).await;
                last = pulse(&doctor, limit).await;
            }
            last
        })
    }

    // ---- telling ----------------------------------------------------------------------------------------------------

    /// The next order; `None` when the supervisor has to end.
    async fn next_order(&mut self) -> Option<Order> {
        tokio::select! {
            biased;
            () = self.hard.cancelled() => None,
            order = self.orders.recv() => {
                let asked = order?;
                self.note_set(asked);
                Some(asked.order)
            }
        }
    }

    /// The same; `None`: there was none for so long.
    async fn next_order_within(&mut self, nap: Duration) -> Option<Option<Order>> {
        tokio::select! {
            biased;
            order = self.next_order() => Some(order),
            () = sleep(nap) => None,
        }
    }

    /// There is no process of the old entry.
    fn take_spec(&mut self) {
        let next = self.next_spec.borrow().clone();
        if !next.starts_as(&self.spec) {
            self.forget_failed_parks();
        }
        self.spec = next;
    }

    /// A load goes where it is ordered to, and takes of host memory what it may.
    fn note_set(&mut self, asked: Asked) {
        if self.view.borrow().pid.is_none() {
            self.take_spec();
        }
        if matches!(asked.order, Order::Load | Order::Wake) {
            let set = asked.set.filter(|_| self.spec.gpus > 0);
            self.gpus = set.map_or_else(Vec::new, |set| set.gpus().collect());
            self.park_bytes = asked.park_bytes;
            self.at_leisure = asked.at_leisure;
        }
    }

    fn enter(&self, state: ModelState) {
        let now = self.around.clock.now();
        self.view.send_modify(|v| {
            if v.state != state {
                v.state = state;
                v.since = now;
            }
            v.failed_loads = self.failed_loads;
            v.last_failure = self.failure();
            v.retry_at = None;
            let keeps = matches!(state, ModelState::Absent | ModelState::Loading);
            v.reason = if keeps { self.failure() } else { None };
            v.phase = None;
            v.percent = None;
            v.bare &= matches!(state, ModelState::Parking | ModelState::Parked | ModelState::Waking);
            if state == ModelState::Loading {
                v.lost_copy = None;
            }
            use ModelState::{Draining, Parked, Parking, Resident, Waking};
            if !matches!(state, Resident | Draining | Parking | Parked | Waking) {
                v.pid = None;
                v.port = None;
                (v.device_bytes, v.host_bytes, v.can_park, v.park_note) = (None, None, None, None);
            }
        });
    }

    /// Why its last load failed or its worker died, for those who ask later.
    fn failure(&self) -> Option<String> {
        let failed = self.last_failure.as_ref().map(|why| format!("its last load failed: {why}"));
        failed.or_else(|| self.last_deaths.clone())
    }

    /// Tells only what changed.
    fn show_progress(&self, phase: Option<String>, percent: Option<f64>) {
        let changed = self.view.send_if_modified(|v| {
            let changed = v.phase != phase || v.percent != percent;
            v.phase.clone_from(&phase);
            v.percent = percent;
            changed
        });
        if changed {
            self.report(Report::Loading { phase, percent });
        }
    }

    /// Nobody listening means that the server is shutting down.
    fn report(&self, report: Report) {
        drop(self.reports.send((self.spec.name.clone(), self.replica, report)));
    }
}

async fn pulse(doctor: &Doctor, limit: Duration) -> Pulse {
    match doctor.ask(limit).await {
        // Asleep is alive; what it keeps on its devices then is not what it takes.
        Health::Ready { memory, given_up_ms, .. } => Pulse::Alive(memory, given_up_ms),
        Health::NotYet { memory, .. } => Pulse::Alive(Memory { device_bytes: None, ..memory }, None),
        Health::Failed { why, .. } => Pulse::Missed(format!("it says that it failed: {why}")),
        Health::Importing(_) => Pulse::Missed("it says that it is a spare process".to_owned()),
        Health::Stranger => Pulse::Missed("another program answers on its port".to_owned()),
        Health::Silent(why) => Pulse::Missed(why),
        Health::Refused => Pulse::Refused,
    }
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}
