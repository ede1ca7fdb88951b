//! A worker in host memory: how it gets there, lies there, and comes back. Whatever does not work out ends its process, and
//! the next load is a cold one.

use super::loading::load_limit;
use super::*;
use crate::worker::checkpoint::{self, Way};

/// Device memory that a worker's sleeping processes may keep on each of its GPUs (a context, an engine's buffers: 2 GiB of a vLLM
/// with 8B), in bytes; never more than half of what they had.
const RESIDUE_BYTES: u64 = 4 << 30;

/// Parks and wakes that failed in a row after which workers of an entry are not parked any more, until it is edited or tried
/// again by hand: each of them cost a load that began with a wait.
pub(super) const FAILED_PARKS_MAX: u32 = 2;

/// How something that a worker was told to do came out.
pub(super) enum Turn<T> {
    Done(T),
    Failed(String),
    /// It is to be stopped instead.
    Stopped,
    Ended,
}

/// What the driver shows of the memory of a worker that says that it sleeps.
pub(super) enum Shown {
    /// It has given it back, or has none.
    Back,
    Kept(String),
    /// It does not say.
    Nothing(String),
}

impl Supervisor {
    /// Its jobs have ended: it sleeps, and its device memory is seen to be free. `bare`: nothing of its weights stays.
    pub(super) async fn park(&mut self, mut running: Running, bare: bool) -> Phase {
        let ordered_at = Instant::now();
        self.enter(ModelState::Parking);
        running.is_bare = bare;
        self.view.send_modify(|v| v.bare = bare);
        self.note_life(running.since);
        let free = self.free_when(&mut running).await;
        let at_most = self.parked_use(free.as_ref()).await;
        let fall_asleep = self.fall_asleep(&running);
        let failed = match self.meanwhile(&mut running, fall_asleep).await {
            Turn::Done(()) => match self.shows_back(&mut running, free.as_ref(), at_most).await {
                Shown::Back => {
                    let park_ms = millis(ordered_at.elapsed());
                    tracing::info!(model = self.spec.name, park_ms, bare, "parked");
                    let kept = self.kept_bytes(free.as_ref()).await;
                    self.enter(ModelState::Parked);
                    self.view.send_modify(|v| v.device_bytes = kept);
                    if let Some(device_bytes) = kept {
                        self.report(Report::Keeps { device_bytes });
                    }
                    self.report(Report::Parked { park_ms });
                    return Phase::Parked(Box::new(running));
                }
                Shown::Kept(why) | Shown::Nothing(why) => why,
            },
            Turn::Failed(why) => why,
            Turn::Stopped => return self.leave(running, free, ordered_at).await,
            Turn::Ended => return self.end(running).await,
        };
        tracing::warn!(model = self.spec.name, "could not be parked, so it is stopped: {failed}");
        self.note_failed_park(&mut running, &failed);
        self.leave(running, free, ordered_at).await
    }

    /// In host memory, until it is wanted again or has to go.
    pub(super) async fn lie_parked(&mut self, mut running: Running) -> Phase {
        let mut misses = 0;
        let mut probe = self.watch_probe(&running.doctor);
        loop {
            let pulse = tokio::select! {
                biased;
                () = self.hard.cancelled() => return self.end_parked(running).await,
                order = self.orders.recv() => {
                    let Some(asked) = order else { return self.end_parked(running).await };
                    match asked.order {
                        Order::Load | Order::Wake => return self.wake(running, asked).await,
                        Order::Stop => return self.leave_parked(running).await,
                        Order::Park | Order::ParkBare => self.report(Report::Parked { park_ms: 0 }),
                        Order::Retry => self.forget_failures(),
                        Order::Suspect | Order::Expedite | Order::Proven => {} // Nothing runs on it.
                    }
                    continue;
                }
                how = running.process.exited() => return self.lost(running, &format!("it {how}")).await,
                pulse = &mut probe => pulse,
            };
            match pulse {
                Pulse::Alive(memory, _) => {
                    misses = 0;
                    self.note_host(&mut running, memory.host);
                }
                // Whatever asks its GPU something waits until it is back.
                Pulse::Missed(_) if self.is_checkpointed() => {}
                Pulse::Missed(_) | Pulse::Refused => misses += 1,
            }
            if misses >= self.tempo.watch_misses {
                return self.lost(running, "it stopped answering health probes").await;
            }
            probe = self.watch_probe(&running.doctor);
        }
    }

    /// Back to the device where it was; else its process is ended, and a cold load follows.
    async fn wake(&mut self, mut running: Running, asked: Asked) -> Phase {
        let ordered_at = Instant::now();
        let was_on = self.gpus.clone();
        self.note_set(asked);
        let wanted_on = std::mem::replace(&mut self.gpus, was_on);
        let mut before_wake = None;
        let failed = if wanted_on == self.gpus {
            let Some(before) = self.device_memory().await else {
                self.kill(running).await;
                return Phase::Loading; // Which finds that the GPU is not there.
            };
            before_wake = before;
            self.enter(ModelState::Waking);
            let _on_its_way = self.on_its_way(running.own);
            if let Err(why) = self.leftovers_are_free().await {
                // Its memory is what it needs; if that is not there, it says so itself.
                tracing::warn!(model = self.spec.name, "it is woken all the same: {why}");
            }
            let woken = self.come_back(&running);
            match self.meanwhile(&mut running, woken).await {
                Turn::Done(memory) => {
                    self.note_memory(&mut running, memory);
                    self.note_pids(&mut running).await;
                    (running.since, running.memory_before) = (Instant::now(), before);
                    let was_bare = std::mem::take(&mut running.is_bare);
                    self.failed_parks = 0;
                    if let Some(before) = before {
                        running.grown = self.used_bytes().await.map(|now| now.saturating_sub(before));
                    }
                    let base_url = format!("http://127.0.0.1:{}", running.process.port());
                    let load_ms = millis(ordered_at.elapsed());
                    self.enter(ModelState::Resident);
                    tracing::info!(model = self.spec.name, base_url, load_ms, was_bare, "awake");
                    self.report(Report::Ready { base_url, load_ms });
                    return Phase::Serving(Box::new(running));
                }
                Turn::Failed(why) => {
                    self.note_failed_park(&mut running, &why);
                    why
                }
                Turn::Stopped => {
                    let free = self.free_when_parked(&running, before, ordered_at);
                    return self.leave(running, free, ordered_at).await;
                }
                Turn::Ended => return self.end(running).await,
            }
        } else {
            format!("it lies where GPUs {:?} are its own, and is wanted on {wanted_on:?}", self.gpus)
        };
        tracing::warn!(model = self.spec.name, "could not be woken, so it is loaded anew: {failed}");
        let free = self.free_when_parked(&running, before_wake, ordered_at);
        self.kill(running).await;
        self.wait_memory_free(free).await;
        self.gpus = wanted_on;
        Phase::Loading
    }

    /// After too many of them in a row it is said, and no worker of this entry is parked any more.
    fn note_failed_park(&mut self, running: &mut Running, why: &str) {
        self.failed_parks += 1;
        if self.failed_parks >= FAILED_PARKS_MAX {
            let count = self.failed_parks;
            self.park_refused = Some(format!("{count} parks or wakes in a row have failed, the last one since {why}"));
            self.note_host(running, HostCopy { bytes: running.host.bytes, ..HostCopy::default() });
        }
    }

    /// Workers of this entry may be parked again.
    pub(super) fn forget_failed_parks(&mut self) {
        (self.failed_parks, self.park_refused) = (0, None);
    }

    /// Its worker does it, or the driver.
    fn is_checkpointed(&self) -> bool {
        self.spec.park == Park::Checkpoint
    }

    fn checkpoint(&self, way: Way, process: &WorkerProcess) -> impl Future<Output = Result<(), String>> + use<> {
        let (program, family, guard) = (self.around.program.clone(), process.family(), process.pid());
        async move { checkpoint::take(&program, way, family, guard).await }
    }

    pub(super) fn fall_asleep(&self, running: &Running) -> impl Future<Output = Result<(), String>> + use<> {
        let limit = if self.is_checkpointed() { self.tempo.checkpoint_limit } else { self.tempo.park_limit };
        let by_driver = self.is_checkpointed().then(|| self.checkpoint(Way::Park, &running.process));
        let (doctor, bare) = (running.doctor.clone(), running.is_bare);
        async move {
            let asleep = async {
                match by_driver {
                    Some(checkpoint) => checkpoint.await,
                    None => doctor.put_to_sleep(bare).await,
                }
            };
            let late = || Err(format!("it was not asleep within {} s", limit.as_secs_f64()));
            timeout(limit, asleep).await.unwrap_or_else(|_| late())
        }
    }

    pub(super) fn come_back(&self, running: &Running) -> impl Future<Output = Result<Memory, String>> + use<> {
        let by_driver = self.is_checkpointed().then(|| self.checkpoint(Way::Wake, &running.process));
        let (doctor, tempo) = (running.doctor.clone(), self.tempo.clone());
        let (bare, park_bytes) = (running.is_bare, self.park_bytes);
        let limit = match bare {
            // From the disk, whatever else it is spared.
            true => load_limit(self.spec.startup_time, tempo.load_limit_min),
            false if by_driver.is_some() => tempo.checkpoint_limit,
            false => tempo.wake_limit,
        };
        async move {
            let awake = async {
                match by_driver {
                    Some(checkpoint) => checkpoint.await?,
                    None if bare => doctor.wake_bare(park_bytes).await?,
                    None => doctor.wake_up().await?,
                }
                loop {
                    match doctor.ask(tempo.probe_limit).await {
                        Health::Ready { memory, .. } => return Ok(memory),
                        Health::Failed { why, .. } => return Err(format!("it says: {why}")),
                        _ => sleep(tempo.probe_every).await,
                    }
                }
            };
            let late = || Err(format!("it was not ready within {} s", limit.as_secs_f64()));
            timeout(limit, awake).await.unwrap_or_else(|_| late())
        }
    }

    /// Waits for something that the worker was told to do; its end, or an order to stop, breaks that off. Other orders are
    /// followed afterwards.
    pub(super) async fn meanwhile<T>(
        &mut self,
        running: &mut Running,
        what: impl Future<Output = Result<T, String>>,
    ) -> Turn<T> {
        let mut what = std::pin::pin!(what);
        loop {
            tokio::select! {
                biased;
                () = self.hard.cancelled() => return Turn::Ended,
                asked = self.orders.fresh() => {
                    let Some(asked) = asked else { return Turn::Ended };
                    match asked.order {
                        Order::Stop => {
                            // Whatever was wanted before is not any more.
                            self.orders.kept.clear();
                            return Turn::Stopped;
                        }
                        Order::Retry => self.forget_failures(),
                        Order::Suspect | Order::Expedite | Order::Proven => {} // Nothing runs on it.
                        Order::Load | Order::Wake | Order::Park | Order::ParkBare => self.orders.kept.push_back(asked),
                    }
                }
                how = running.process.exited() => return Turn::Failed(format!("it {how}")),
                done = &mut what => return done.map_or_else(Turn::Failed, Turn::Done),
            }
        }
    }

    // ---- its device memory ------------------------------------------------------------------------------------------

    /// When the memory is free of a worker that was parked; `before`: the use before it was told to wake, `since` when. What was
    /// in use before its load says nothing any more, since others have come to its GPUs.
    fn free_when_parked(&self, running: &Running, before: Option<u64>, since: Instant) -> Option<Free> {
        let (pids, is_shared) = (running.pids.clone(), true);
        (before.is_some() || !pids.is_empty()).then(|| Free { at_most: before.unwrap_or(0), since, pids, is_shared })
    }

    /// The most that a worker may keep on its GPUs when it is parked, in bytes, by what it takes there now; `None`: on the CPU.
    pub(super) async fn parked_use(&self, free: Option<&Free>) -> Option<u64> {
        let most = RESIDUE_BYTES.saturating_mul(self.gpus.len().max(1) as u64);
        Some(most.min(self.taken_beyond(free?).await? / 2))
    }

    /// Whether the driver shows that it has given its memory back.
    pub(super) async fn shows_back(&self, running: &mut Running, free: Option<&Free>, at_most: Option<u64>) -> Shown {
        if self.is_checkpointed() {
            // It does not know of it, and may not be able to answer.
            self.release(running);
        } else if let Health::NotYet { memory, .. } = running.doctor.ask(self.tempo.watch_limit).await {
            if let Some(bytes) = memory.device_bytes.filter(|_| self.spec.gpus > 0) {
                self.hold(running, bytes);
            }
            self.note_host(running, memory.host);
        }
        let Some((free, at_most)) = free.zip(at_most) else {
            // Of a worker whose load the driver has not told of either, nothing can be seen.
            return match running.memory_before {
                Some(_) => Shown::Nothing("the driver does not say any more how much of its GPUs is in use".to_owned()),
                None => Shown::Back,
            };
        };
        let until = Instant::now() + self.tempo.park_memory_limit;
        loop {
            let Some(taken) = self.taken_beyond(free).await else {
                return Shown::Nothing("its GPU is gone".to_owned());
            };
            // Who was on the way there may not have taken all yet: only what can be nobody else's is held against it.
            let kept = taken.saturating_sub(self.come_since(free, &self.gpus));
            if kept <= at_most {
                return Shown::Back;
            }
            if Instant::now() >= until || self.hard.is_cancelled() {
                return Shown::Kept(format!(
                    "it says that it sleeps, and the driver shows {kept} bytes of its GPUs in use by it, not {at_most} or less"
                ));
            }
            sleep(Duration::from_millis(50)).await;
        }
    }

    // ---- ends -------------------------------------------------------------------------------------------------------

    /// Stopped, from wherever it was.
    async fn leave(&mut self, running: Running, free: Option<Free>, ordered_at: Instant) -> Phase {
        self.enter(ModelState::Draining);
        self.release(&running);
        running.process.stop(self.around.grace).await;
        self.wait_memory_free(free).await;
        let stop_ms = millis(ordered_at.elapsed());
        tracing::info!(model = self.spec.name, stop_ms, "stopped");
        self.enter(ModelState::Absent);
        self.report(Report::Stopped { stop_ms });
        Phase::Absent
    }

    /// A process whose memory the driver has taken cannot end in good order, so it is not asked to.
    async fn leave_parked(&mut self, running: Running) -> Phase {
        if !self.is_checkpointed() {
            let free = self.free_when_parked(&running, None, Instant::now());
            return self.leave(running, free, Instant::now()).await;
        }
        let ordered_at = Instant::now();
        self.enter(ModelState::Draining);
        self.kill(running).await;
        self.enter(ModelState::Absent);
        self.report(Report::Stopped { stop_ms: millis(ordered_at.elapsed()) });
        Phase::Absent
    }

    /// Nothing ran on it, so nobody is to blame, and there is no back-off.
    async fn lost(&mut self, running: Running, reason: &str) -> Phase {
        let free = self.free_when_parked(&running, None, Instant::now());
        self.release(&running);
        let tail = running.process.clear_away().await;
        let reason = tail.explain(format!("{reason} while it was parked"));
        tracing::error!(model = self.spec.name, "the worker died: {reason}");
        self.wait_memory_free(free).await;
        self.enter(ModelState::Absent);
        self.view.send_modify(|v| v.lost_copy = Some(format!("lost its copy in host memory: {reason}")));
        self.report(Report::Died { reason });
        Phase::Absent
    }

    /// The server ends.
    async fn end(&mut self, running: Running) -> Phase {
        self.enter(ModelState::Draining);
        running.process.stop(self.around.grace).await;
        Phase::Ended
    }

    async fn end_parked(&mut self, running: Running) -> Phase {
        if !self.is_checkpointed() {
            return self.end(running).await;
        }
        self.kill(running).await;
        Phase::Ended
    }

    async fn kill(&self, running: Running) {
        self.release(&running);
        running.process.clear_away().await;
    }
}
