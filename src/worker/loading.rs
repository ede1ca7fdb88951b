//! A cold load: starting the process, watching it get ready, and waiting after a failure.

use super::device_memory::Seen;
use super::parking::FAILED_PARKS_MAX;
use super::rehearsal::rehearsed;
use super::*;
use crate::clock::rfc3339;
use crate::worker::procfs;

/// Failed loads in a row after which a model is quarantined.
const QUARANTINE_AFTER: u32 = 5;
/// Ports that one load tries when another program has taken the chosen one.
const PORTS_TRIED: usize = 3;
/// What keeps a load from being ready is told after this long: at first it says nothing.
const TOLD_AFTER: Duration = Duration::from_secs(5);
/// How often the clock is asked whether a back-off is over.
const BACKOFF_LOOK_EVERY: Duration = Duration::from_millis(250);

/// Longest time in which a spare process has to say that it becomes a worker.
const TAKE_OVER_LIMIT: Duration = Duration::from_secs(5);
/// Names of the phases that are measured here.
const SPAWN: &str = "spawn";
const REST: &str = "load";
/// The phase of a spare process that was taken over before it was ready.
const IMPORT: &str = "import";

/// How one try of a load ended.
pub(super) enum Try {
    Ready(Box<Running>, Vec<PhaseTime>),
    /// Another program has this port, which showed in this way.
    PortTaken(u16, String, Tail),
    Failed(String, Tail),
    /// It was a spare process that had not ended its imports.
    ImportsFailed(String),
    /// Its device has not enough memory.
    OutOfMemory(String, Tail),
    /// By an order given at this time.
    Stopped(Instant),
    /// It did not come back from its rehearsal.
    RehearsalFailed(String),
    Ended,
}

/// Whether the worker of another server has the port of this one.
async fn another_listens(process: &WorkerProcess) -> bool {
    let (port, mark) = (process.port(), process.mark().to_owned());
    tokio::task::spawn_blocking(move || procfs::another_listens(port, &mark)).await.unwrap_or(false)
}

impl Supervisor {
    pub(super) async fn load(&mut self) -> Phase {
        let mut ordered_at = Instant::now();
        let since = ordered_at;
        self.take_spec();
        let _loading = self.around.spares.loading();
        self.enter(ModelState::Loading);
        let _on_its_way = self.on_its_way(None);
        if self.failed_parks < FAILED_PARKS_MAX {
            self.park_refused = None;
        }
        if let Err(reason) = self.leftovers_are_free().await {
            return self.failed_load(reason, &Tail::default(), None).await;
        }
        let memory_before = match self.device_memory().await {
            Some(memory) => memory,
            None => return Phase::Blocked,
        };
        self.free_bytes = self.least_free().await;
        self.is_small = self.begins_small();
        let limit = load_limit(self.spec.startup_time, self.tempo.load_limit_min);
        let mut deadline = ordered_at + limit;
        let mut avoid = BTreeSet::new();
        loop {
            let mut seen = Seen::default();
            let tried = match self.try_load(&avoid, deadline, memory_before, &mut seen).await {
                Try::Ready(running, phases) if !seen.is_silent && self.rehearses(&running) => {
                    seen.own.extend(&running.pids);
                    self.rehearse(running, phases).await
                }
                tried => tried,
            };
            let free = self.free_as_before(memory_before, since, &seen);
            match tried {
                Try::Ready(running, phases) => {
                    let base_url = format!("http://127.0.0.1:{}", running.process.port());
                    (self.failed_loads, self.last_failure, self.last_deaths) = (0, None, None);
                    self.note_small();
                    self.enter(ModelState::Resident);
                    let load_ms = self.around.clock.millis_in(ordered_at.elapsed().saturating_sub(rehearsed(&phases)));
                    tracing::info!(model = self.spec.name, base_url, load_ms, phases = in_words(&phases), "ready");
                    self.view.send_modify(|v| v.phases.clone_from(&phases));
                    self.report(Report::Loaded { phases });
                    if let Some(device_bytes) = running.own {
                        self.report(Report::Takes { device_bytes });
                    }
                    self.report(Report::Ready { base_url, load_ms });
                    return Phase::Serving(running);
                }
                Try::PortTaken(port, why, _) if avoid.len() + 1 < PORTS_TRIED => {
                    let model = &self.spec.name;
                    tracing::warn!(model, port, "another program has its port, another one is tried: {why}");
                    avoid.insert(port);
                    self.wait_memory_free(free).await;
                }
                Try::PortTaken(_, reason, tail) => return self.failed_load(reason, &tail, free).await,
                Try::OutOfMemory(reason, tail) => {
                    self.wait_memory_free(free).await;
                    if !self.is_tried_again(&reason).await {
                        return self.does_not_fit(reason, &tail).await;
                    }
                }
                Try::Failed(reason, tail) => return self.failed_load(reason, &tail, free).await,
                Try::ImportsFailed(why) => {
                    let model = &self.spec.name;
                    tracing::warn!(
                        model,
                        "its spare process has failed to import, so it is loaded from nothing: {why}"
                    );
                    // Before the next try, which is to find none.
                    self.around.spares.came(&self.spec, Err(why)).await;
                    self.wait_memory_free(free).await;
                }
                Try::Stopped(ordered_at) => {
                    self.wait_memory_free(free).await;
                    self.enter(ModelState::Absent);
                    self.report(Report::Stopped { stop_ms: self.around.clock.millis_in(ordered_at.elapsed()) });
                    return Phase::Absent;
                }
                Try::RehearsalFailed(why) => {
                    let model = &self.spec.name;
                    tracing::warn!(model, "it did not come back when it was put to sleep, and is loaded anew: {why}");
                    self.at_leisure = false;
                    self.failed_parks += 1;
                    ordered_at = Instant::now();
                    deadline = ordered_at + limit;
                    self.park_refused = Some(format!("put to sleep once after its load, it did not come back: {why}"));
                    self.wait_memory_free(free).await;
                }
                Try::Ended => return Phase::Ended,
            }
        }
    }

    /// Starts the process and probes it until it is ready. Whatever the end but `Ready`, nothing of it runs any more, and `seen`
    /// says which of its processes were on its GPUs.
    async fn try_load(
        &mut self,
        avoid: &BTreeSet<u16>,
        deadline: Instant,
        memory_before: Option<u64>,
        seen: &mut Seen,
    ) -> Try {
        let started = Instant::now();
        let spare = if avoid.is_empty() && !self.is_small { self.take_spare().await } else { None };
        let was_spare = spare.is_some();
        // As long as nothing is heard of the load itself.
        let mut imports = was_spare;
        let mut process = match spare.map_or_else(|| self.start_process(avoid), Ok) {
            Ok(process) => process,
            Err(reason) => return Try::Failed(reason, Tail::default()),
        };
        let doctor = Doctor::new(process.port(), process.mark());
        self.view.send_modify(|v| {
            v.pid = Some(process.pid());
            v.port = Some(process.port());
            v.gpus.clone_from(&self.gpus);
            v.starts += 1;
        });
        tracing::info!(
            model = self.spec.name,
            process.pid = process.pid(),
            port = process.port(),
            was_spare,
            "loading"
        );
        self.report(Report::Loading { phase: None, percent: None });
        let mut strange_since = None;
        let mut spawned = None;
        let (mut heard, mut is_told) = (None, false);
        loop {
            let probe = async {
                sleep(self.tempo.probe_every).await;
                doctor.ask(self.tempo.probe_limit).await
            };
            let health = tokio::select! {
                biased;
                () = self.hard.cancelled() => {
                    process.stop(self.around.grace).await;
                    return Try::Ended;
                }
                order = self.orders.recv() => {
                    match order.map(|asked| asked.order) {
                        Some(Order::Stop | Order::Park | Order::ParkBare) => {
                            let ordered_at = Instant::now();
                            self.enter(ModelState::Draining);
                            self.note_seen(&process, seen).await;
                            process.stop(self.around.grace).await;
                            return Try::Stopped(ordered_at);
                        }
                        None => {
                            process.stop(self.around.grace).await;
                            return Try::Ended;
                        }
                        Some(Order::Expedite) => {
                            self.at_leisure = false;
                            continue;
                        }
                        Some(Order::Retry) => {
                            self.forget_failed_parks();
                            continue;
                        }
                        Some(Order::Load | Order::Wake | Order::Suspect | Order::Proven) => continue,
                    }
                }
                how = process.exited() => {
                    let port = process.port();
                    let tail = process.clear_away().await;
                    if imports {
                        return Try::ImportsFailed(tail.explain(format!("it {how}")));
                    }
                    return match self.failed(format!("its worker {how}"), false, tail) {
                        Try::Failed(why, tail) if self.found_port_taken(port, &tail) => Try::PortTaken(port, why, tail),
                        tried => tried,
                    };
                }
                () = sleep_until(deadline) => {
                    let why = heard.as_ref().and_then(|heard| so_far(&self.spec, process.port(), heard));
                    self.note_seen(&process, seen).await;
                    let tail = process.stop(self.around.grace).await;
                    let limit = load_limit(self.spec.startup_time, self.tempo.load_limit_min);
                    let seconds = limit.as_secs_f64();
                    let why = why.map_or_else(String::new, |why| format!(": {why}"));
                    return Try::Failed(format!("its worker was not ready within {seconds} s{why}"), tail);
                }
                health = probe => health,
            };
            let health = match health {
                // Nothing in the answers of a server that is not ours tells whose it is.
                Health::Ready { .. } if another_listens(&process).await => Health::Stranger,
                told => told,
            };
            if !matches!(health, Health::Ready { .. }) {
                self.note_seen(&process, seen).await;
            }
            if imports && matches!(health, Health::Ready { .. } | Health::NotYet { .. } | Health::Failed { .. }) {
                imports = false;
                self.around.spares.came(&self.spec, Ok(())).await;
            }
            if health != Health::Stranger {
                strange_since = None;
                if health != Health::Refused {
                    spawned.get_or_insert_with(|| started.elapsed());
                }
            }
            let is_news = heard.as_ref() != Some(&health);
            if started.elapsed() >= TOLD_AFTER && (is_news || !is_told) {
                self.show_so_far(process.port(), &health);
                is_told = true;
            }
            if is_news {
                heard = Some(health.clone());
            }
            match health {
                Health::Ready { memory, phases, .. } => {
                    let since = Instant::now();
                    let phases = whole(spawned.unwrap_or_default(), started.elapsed(), phases);
                    let host = HostCopy::default();
                    let pids = BTreeSet::new();
                    let mut running = Running {
                        process,
                        doctor,
                        since,
                        memory_before,
                        own: None,
                        grown: None,
                        host,
                        is_bare: false,
                        pids,
                    };
                    self.note_memory(&mut running, memory);
                    self.note_ready(&mut running, seen).await;
                    return Try::Ready(Box::new(running), phases);
                }
                Health::NotYet { phase, percent, .. } => self.show_progress(phase, percent),
                Health::Importing(Ok(())) => self.show_progress(Some(IMPORT.to_owned()), None),
                Health::Importing(Err(why)) => {
                    let tail = process.clear_away().await;
                    return Try::ImportsFailed(tail.explain(format!("it says: {why}")));
                }
                Health::Failed { why, oom } => {
                    let tail = process.stop(self.around.grace).await;
                    return self.failed(format!("its worker says: {why}"), oom, tail);
                }
                Health::Stranger => {
                    let since = *strange_since.get_or_insert_with(Instant::now);
                    if since.elapsed() >= self.tempo.stranger_limit {
                        let port = process.port();
                        process.stop(self.around.grace).await;
                        let why = format!("another program answers on port {port}");
                        return Try::PortTaken(port, why, Tail::default());
                    }
                }
                Health::Silent(_) | Health::Refused => {}
            }
        }
    }

    /// Whether a worker that ended before it was ready found its port taken since that was chosen: somebody has it now that
    /// nothing of the worker runs any more, or the worker named it. One that is not told its port gets no other.
    ///
    /// Where neither is so, its words may be of another port, that its entry fixes and that stays taken. Taken for its own,
    /// that would cost three loads of which nobody is told; a port that was its own, not named and free again, is a failed
    /// load with its reason and a back-off, which costs less.
    fn found_port_taken(&self, port: u16, tail: &Tail) -> bool {
        self.spec.tells_port() && (tail.tells_port_taken(port) || ports::is_foreign(port))
    }

    /// What keeps it from being ready, if that may be something that will not change.
    fn show_so_far(&self, port: u16, heard: &Health) {
        let may_stay = match heard {
            Health::Silent(_) => true,
            Health::Refused => !self.spec.tells_port(),
            _ => false,
        };
        let so_far = so_far(&self.spec, port, heard).filter(|_| may_stay).map(|why| format!("not ready yet: {why}"));
        self.view.send_modify(|v| v.reason = so_far.or_else(|| self.failure()));
    }

    fn start_process(&self, avoid: &BTreeSet<u16>) -> Result<WorkerProcess, String> {
        let lease = ports::lease(self.spec.port, avoid).ok_or("no port from 8001 to 8999 is free on 127.0.0.1")?;
        WorkerProcess::start(&self.wanted(), lease)
    }

    /// A spare process of its environment that becomes its worker, once its imports are over. Whatever is wrong with one until
    /// then costs a start from nothing.
    async fn take_spare(&self) -> Option<WorkerProcess> {
        let process = self.around.spares.take(&self.spec).await?;
        let doctor = Doctor::new(process.port(), process.mark());
        let took = match process.order(&self.wanted()) {
            Ok(order) => timeout(TAKE_OVER_LIMIT, doctor.take_over(&order))
                .await
                .unwrap_or_else(|_| Err(format!("no answer to /take_over within {} s", TAKE_OVER_LIMIT.as_secs()))),
            Err(why) => Err(why),
        };
        match took {
            Ok(()) => {
                process.became(&self.wanted());
                Some(process)
            }
            Err(why) => {
                process.clear_away().await;
                self.around.spares.came(&self.spec, Err(why)).await;
                None
            }
        }
    }

    fn wanted(&self) -> Start<'_> {
        Start {
            spec: &self.spec,
            replica: self.replica,
            gpus: &self.gpus,
            // Who will not be put to sleep makes no copy for it.
            park_bytes: self.park_bytes.map(|bytes| if self.park_refused.is_some() { 0 } else { bytes }),
            free_bytes: self.free_bytes,
            is_small: self.is_small,
            data_dir_id: &self.around.data_dir_id,
            log_dir: &self.around.log_dir,
            program: &self.around.program,
            grace: self.around.grace,
            tasks: &self.around.tasks,
        }
    }

    async fn failed_load(&mut self, reason: String, tail: &Tail, free: Option<Free>) -> Phase {
        self.wait_memory_free(free).await;
        self.failed_loads += 1;
        let reason = tail.explain(reason);
        self.last_failure = Some(reason.clone());
        let after = Setback::FailedLoads(self.failed_loads);
        let (error, until) = self.enter_backoff(&format!("does not load: {reason}"), tail, after);
        self.report(Report::LoadFailed {
            error: error.clone(),
            retry_at: until,
            quarantined: after.brings_quarantine(),
        });
        Phase::BackingOff { error, until, after }
    }

    /// `what`: what is to be said of the model after its name. Returns what its jobs are told, and until when; both are to be
    /// reported.
    pub(super) fn enter_backoff(&mut self, what: &str, tail: &Tail, after: Setback) -> (JobError, Millis) {
        let (failures, quarantined) = (after.failures(), after.brings_quarantine());
        let wait = if quarantined {
            self.around.backoff_max
        } else {
            backoff(self.around.backoff_first, self.around.backoff_max, failures)
        };
        let until = self.around.clock.now() + millis(wait);
        let message = format!("model `{}` {what}", self.spec.name);
        tracing::error!(model = self.spec.name, failures, quarantined, retry_in_ms = millis(wait), "{message}");
        let mut error = JobError::new(ErrorCode::ModelLoadFailed, message.clone(), true);
        let (counted, times) = after.in_details();
        error.details = Some(json!({
            counted: times,
            "retry_at": rfc3339(until),
            "log_tail": tail.lines(),
        }));
        self.enter(if quarantined { ModelState::Quarantined } else { ModelState::Backoff });
        self.view.send_modify(|v| {
            v.retry_at = Some(until);
            v.reason = Some(message);
        });
        (error, until)
    }

    pub(super) async fn back_off(&mut self, error: JobError, until: Millis, after: Setback) -> Phase {
        loop {
            let left = until - self.around.clock.now();
            if left <= 0 {
                self.enter(ModelState::Absent);
                self.report(Report::Available);
                return Phase::Absent;
            }
            let nap = Duration::from_millis(left.unsigned_abs()).min(BACKOFF_LOOK_EVERY);
            let Some(order) = self.next_order_within(nap).await else { continue };
            match order {
                // Not yet: the same answer again, so that nobody waits for one.
                Some(Order::Load | Order::Wake) => self.report(Report::BacksOff {
                    error: error.clone(),
                    retry_at: until,
                    quarantined: after.brings_quarantine(),
                    deaths: after.deaths(),
                }),
                Some(Order::Stop | Order::Park | Order::ParkBare) => self.report(Report::Stopped { stop_ms: 0 }),
                Some(Order::Retry) => {
                    self.enter(ModelState::Absent);
                    self.forget_failures();
                    return Phase::Absent;
                }
                Some(Order::Suspect | Order::Expedite | Order::Proven) => {}
                None => return Phase::Ended,
            }
        }
    }
}

/// After what a model is not loaded for a while, and how often in a row that has happened.
#[derive(Clone, Copy)]
pub(super) enum Setback {
    FailedLoads(u32),
    /// Of workers, soon after they were ready.
    Deaths(u32),
}

impl Setback {
    /// What its pause grows with.
    fn failures(self) -> u32 {
        match self {
            Self::FailedLoads(times) => times,
            Self::Deaths(times) => times.saturating_sub(FREE_EARLY_DEATHS),
        }
    }

    fn brings_quarantine(self) -> bool {
        matches!(self, Self::FailedLoads(times) if times >= QUARANTINE_AFTER)
    }

    pub(super) fn deaths(self) -> u32 {
        if let Self::Deaths(times) = self { times } else { 0 }
    }

    /// For programs.
    fn in_details(self) -> (&'static str, u32) {
        match self {
            Self::FailedLoads(times) => ("failed_loads", times),
            Self::Deaths(times) => ("deaths", times),
        }
    }
}

/// What was heard last of a worker that is not ready.
fn so_far(spec: &ModelSpec, port: u16, heard: &Health) -> Option<String> {
    match heard {
        Health::Refused if spec.tells_port() => Some(format!("nothing listens on its port, {port}")),
        Health::Refused => Some(format!("nothing listens on its port, {port} (its `command` has no {{port}})")),
        Health::Silent(why) => Some(format!("on its port, {port}: {why}")),
        Health::NotYet { phase: Some(phase), percent, .. } => {
            let percent = percent.map_or_else(String::new, |percent| format!(", {percent:.0} %"));
            Some(format!("it says that it is at `{phase}`{percent}"))
        }
        Health::Importing(Ok(())) => Some(format!("it says that it is at `{IMPORT}`")),
        _ => None,
    }
}

/// All phases of a load that took `all`: of a server that does not tell any, what came after the start is one.
fn whole(spawn: Duration, all: Duration, told: Vec<PhaseTime>) -> Vec<PhaseTime> {
    let phase = |phase: &str, took: Duration| PhaseTime { phase: phase.to_owned(), ms: millis(took) };
    let rest = told.is_empty().then(|| phase(REST, all.saturating_sub(spawn)));
    std::iter::once(phase(SPAWN, spawn)).chain(told).chain(rest).collect()
}

/// `spawn 812 ms, import 4210 ms`
fn in_words(phases: &[PhaseTime]) -> String {
    let each = phases.iter().map(|PhaseTime { phase, ms }| format!("{phase} {ms} ms"));
    each.collect::<Vec<_>>().join(", ")
}

/// Longest time of a load: ten times what it usually takes, at least `at_least`.
pub(super) fn load_limit(startup_time: Duration, at_least: Duration) -> Duration {
    startup_time.saturating_mul(10).max(at_least)
}

/// `first`, doubled for each further failure, at most `max`.
pub(in crate::worker) fn backoff(first: Duration, max: Duration, failures: u32) -> Duration {
    let doublings = failures.saturating_sub(1).min(20);
    first.saturating_mul(1 << doublings).min(max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_load_may_take_ten_times_as_long_as_usual() {
        let least = Tempo::default().load_limit_min;
        let limit = |s: u64| load_limit(Duration::from_secs(s), least).as_secs();
        assert_eq!((limit(10), limit(140)), (600, 1400));
    }

    #[test]
    fn a_load_that_took_too_long_says_what_was_heard_last() {
        let mut spec = crate::worker::process::tests::spec(&["serve", "{port}"]);
        let silent = Health::Silent("/health answers with status 404 and /v1/models with status 404".into());
        let at = |spec: &ModelSpec, heard: &Health| so_far(spec, 8004, heard).unwrap_or_default();
        assert_eq!(at(&spec, &Health::Refused), "nothing listens on its port, 8004");
        assert!(at(&spec, &silent).starts_with("on its port, 8004: /health answers with status 404"));
        let memory = Memory::default();
        let not_yet = Health::NotYet { phase: Some("weights".into()), percent: Some(39.6), memory };
        assert_eq!(at(&spec, &not_yet), "it says that it is at `weights`, 40 %");
        spec.launch = crate::domain::Launch::Command(vec!["serve".into()]);
        assert!(at(&spec, &Health::Refused).ends_with("(its `command` has no {port})"));
        spec.args = vec!["--port={port}".into()];
        assert_eq!(at(&spec, &Health::Refused), "nothing listens on its port, 8004");
    }

    #[test]
    fn what_a_worker_does_not_tell_is_one_phase() {
        let (spawn, all) = (Duration::from_millis(30), Duration::from_millis(100));
        let said = |told: &[(&str, i64)]| {
            let told = told.iter().map(|(phase, ms)| PhaseTime { phase: (*phase).to_owned(), ms: *ms }).collect();
            in_words(&whole(spawn, all, told))
        };
        assert_eq!(said(&[]), "spawn 30 ms, load 70 ms");
        assert_eq!(said(&[("import", 40), ("read", 25)]), "spawn 30 ms, import 40 ms, read 25 ms");
    }

    #[test]
    fn backoff_doubles_up_to_its_maximum() {
        let (first, max) = (Duration::from_secs(10), Duration::from_secs(600));
        let waits: Vec<u64> = (1..=8).map(|n| backoff(first, max, n).as_secs()).collect();
        assert_eq!(waits, [10, 20, 40, 80, 160, 320, 600, 600]);
        assert_eq!(backoff(first, max, u32::MAX), max);
    }
}
