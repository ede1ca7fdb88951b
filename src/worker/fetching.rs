//! Fetching weights: one task that looks whether a model's weights are in the cache, and runs the fetcher
//! (`roundhouse_worker.fetch`, in the model's own environment, under the guard) for those that are not.
//!
//! One fetch at a time: two would share one line, and both come later. No GPU is held, and none is seen. Only this process
//! gets `HF_TOKEN`. A fetch that was cut off or killed goes on where it was, after a pause as after a failed load; what a
//! person has to mend (no access, no such model, no space) is tried again after such pauses, too.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::OsString;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::Deserialize;
use serde_json::json;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use crate::clock::rfc3339;
use crate::domain::worker::{Fetch, FetchPhase, FetchReport};
use crate::domain::{ErrorCode, JobError, Launch, ModelSpec};
use crate::worker::cache;
use crate::worker::logs::{self, Tail};
use crate::worker::process::{self, blocking};
use crate::worker::procfs::Family;
use crate::worker::supervisor::Surroundings;
use crate::worker::verdict::{MESSAGE_LIMIT_BYTES, cut};

/// Interruptions in a row, without a byte in between, after which callers on the line are told.
const INTERRUPTIONS_MAX: u32 = 3;
/// How long after the grace period the guard may take to end the fetcher, and SIGKILL after that.
const GUARD_SLACK: Duration = Duration::from_secs(1);
const KILL_LIMIT: Duration = Duration::from_secs(30);
/// How long the last log lines may take to be read once nothing of it lives.
const LOG_LIMIT: Duration = Duration::from_secs(1);
/// Time over which the speed is smoothed.
const SMOOTHED_S: f64 = 5.0;
/// A fetcher of ours speaks every few seconds: one that is silent so long does not come on, and is told to be silent.
const SILENT_AFTER: Duration = Duration::from_secs(20);
/// One that is silent so long hangs, or is stopped: it is ended, and another one goes on where it was.
const HANGS_AFTER: Duration = Duration::from_secs(120);
/// How long no byte may come until that is told. The fetcher itself asks the hub again after half a minute.
const STANDS_AFTER: Duration = Duration::from_secs(20);
/// Readings closer to each other say nothing about the speed.
const READING_MIN_S: f64 = 0.1;

/// What the scheduler needs of the fetching task.
#[derive(Debug)]
pub struct Fetches {
    /// Asks it.
    pub handle: FetchHandle,
    /// What it tells: (model, the number of the last want that it had heard of, report).
    pub reports: mpsc::UnboundedReceiver<(String, u64, FetchReport)>,
    /// The models whose weights come from a hub and were not here at the start.
    pub missing: BTreeSet<String>,
}

impl Fetches {
    /// Looks which weights are missing and starts the task. It ends, with what it runs, in the soft stage of shutdown.
    pub async fn start(specs: &[ModelSpec], around: Surroundings) -> Self {
        let specs = by_name(specs);
        let looked = specs.clone();
        let look = move || looked.values().filter(|spec| !is_here(spec)).map(|spec| spec.name.clone()).collect();
        let missing = blocking(look).await.unwrap_or_default();
        let (orders, inbox) = mpsc::unbounded_channel();
        let (sender, reports) = mpsc::unbounded_channel();
        let tasks = around.tasks.clone();
        let fetching = Fetching {
            specs,
            around,
            orders: inbox,
            reports: sender,
            wants: BTreeMap::new(),
            line: VecDeque::new(),
            current: None,
            pauses: BTreeMap::new(),
            failures: BTreeMap::new(),
        };
        tasks.spawn("fetching", fetching.run());
        Self { handle: FetchHandle { orders }, reports, missing }
    }

    /// Nothing is missing, and nobody is there to be asked.
    pub fn none() -> Self {
        let (orders, _) = mpsc::unbounded_channel();
        let (_, reports) = mpsc::unbounded_channel();
        Self { handle: FetchHandle { orders }, reports, missing: BTreeSet::new() }
    }
}

/// Asks the fetching task; the answers are [`FetchReport`]s. Cheap to clone.
#[derive(Clone, Debug)]
pub struct FetchHandle {
    orders: mpsc::UnboundedSender<Order>,
}

#[derive(Debug)]
enum Order {
    Want(String, u64),
    End(String),
    Retry(String),
    Edit(Vec<ModelSpec>),
}

impl FetchHandle {
    /// The weights of this model are wanted: `Here` if they are, else `Progress` and in the end `Here` or `Failed`, with this
    /// number.
    pub fn want(&self, model: &str, want: u64) {
        // An error: the server is stopping.
        let _ = self.orders.send(Order::Want(model.to_owned(), want));
    }

    /// Ends the fetch of this model's weights, or that it waits for its turn or its next try; what has come stays. Nothing more
    /// is told of it, but for reports that are on their way with the number of its want, until it is wanted again.
    pub fn end(&self, model: &str) {
        let _ = self.orders.send(Order::End(model.to_owned()));
    }

    /// models.yaml was edited: these are its entries now.
    pub fn edit(&self, specs: &[ModelSpec]) {
        let _ = self.orders.send(Order::Edit(specs.to_vec()));
    }

    /// Ends the pause after a failure: `Available`, or the interrupted fetch goes on.
    pub fn retry(&self, model: &str) {
        let _ = self.orders.send(Order::Retry(model.to_owned()));
    }
}

/// Those whose weights come from a hub.
fn by_name(specs: &[ModelSpec]) -> BTreeMap<String, ModelSpec> {
    let fetched = specs.iter().filter(|spec| spec.repository().is_some());
    fetched.map(|spec| (spec.name.clone(), spec.clone())).collect()
}

/// Whether a model's weights are here. Blocking.
fn is_here(spec: &ModelSpec) -> bool {
    let Some(repository) = spec.repository() else { return true };
    let var = |name: &str| spec.env.get(name).map(OsString::from).or_else(|| std::env::var_os(name));
    cache::folder(var).is_some_and(|cache| cache::has(&cache, repository, spec.revision.as_deref()))
}

/// A model whose fetch waits for its next try.
#[derive(Clone, Copy, Debug)]
struct Pause {
    until: Instant,
    /// It goes on by itself; else it is only told that it may be asked for again.
    goes_on: bool,
}

struct Fetching {
    specs: BTreeMap<String, ModelSpec>,
    around: Surroundings,
    orders: mpsc::UnboundedReceiver<Order>,
    reports: mpsc::UnboundedSender<(String, u64, FetchReport)>,
    /// The number of the last want of each model.
    wants: BTreeMap<String, u64>,
    /// To be fetched, the next one first.
    line: VecDeque<String>,
    /// Being fetched.
    current: Option<Current>,
    pauses: BTreeMap<String, Pause>,
    failures: BTreeMap<String, Failures>,
}

/// A fetch that goes on.
struct Current {
    model: String,
    /// The number of its want.
    want: Arc<AtomicU64>,
    /// Ends it. Somebody may want the model again before it is over.
    ended: CancellationToken,
}

impl Current {
    fn comes(&self, model: &str) -> bool {
        self.model == model && !self.ended.is_cancelled()
    }
}

/// Tries of a model's fetch that failed.
#[derive(Clone, Debug)]
struct Failures {
    /// In a row, without a byte in between.
    count: u32,
    /// Why the last one did.
    reason: String,
}

/// How a run of the fetcher ended.
#[derive(Debug, PartialEq)]
enum Outcome {
    Here,
    /// The model's environment has no fetcher: whoever wrote its script gets the weights in another way.
    NoFetcher(String),
    Failed {
        /// For whom to mend: a person, or time.
        for_a_person: bool,
        message: String,
        fetch: Fetch,
        /// Bytes came.
        got_further: bool,
    },
    /// Its entry is no more.
    Dropped,
    /// By hand, or the server is stopping.
    Ended,
}

/// Something that happens beside a fetch.
enum Event {
    Order(Order),
    PauseOver,
}

impl Fetching {
    async fn run(mut self) {
        let soft = self.around.tasks.soft().clone();
        loop {
            let Some(model) = self.line.pop_front() else {
                tokio::select! {
                    biased;
                    () = soft.cancelled() => return,
                    event = next_event(&mut self.orders, &self.pauses) => self.on_event(event).await,
                }
                continue;
            };
            if self.fetch(model).await == Outcome::Ended && soft.is_cancelled() {
                return;
            }
        }
    }

    async fn on_event(&mut self, event: Event) {
        match event {
            Event::PauseOver => {
                let now = Instant::now();
                let over: Vec<String> = self
                    .pauses
                    .iter()
                    .filter(|(_, pause)| pause.until <= now)
                    .map(|(model, _)| model.clone())
                    .collect();
                over.iter().for_each(|model| self.end_pause(model));
            }
            Event::Order(Order::Retry(model)) => {
                self.failures.remove(&model);
                self.tell(&model, FetchReport::Forgiven);
                self.end_pause(&model);
            }
            Event::Order(Order::End(model)) => {
                self.line.retain(|waiting| *waiting != model);
                self.pauses.remove(&model);
                if let Some(current) = self.current.as_ref().filter(|current| current.comes(&model)) {
                    tracing::info!(model, "the fetch of its weights is ended by hand");
                    current.ended.cancel();
                }
            }
            Event::Order(Order::Edit(specs)) => {
                let before = std::mem::replace(&mut self.specs, by_name(&specs));
                for (model, spec) in &before {
                    if self.is_same(model, spec) {
                        continue;
                    }
                    tracing::debug!(model, repository = spec.repository(), "its entry is another one now");
                    self.line.retain(|waiting| waiting != model);
                    self.pauses.remove(model);
                    self.failures.remove(model);
                }
            }
            Event::Order(Order::Want(model, want)) => {
                self.wants.insert(model.clone(), want);
                if let Some(current) = self.current.as_ref().filter(|current| current.comes(&model)) {
                    current.want.store(want, Ordering::Relaxed);
                }
                let Some(spec) = self.specs.get(&model).cloned() else { return };
                if blocking(move || is_here(&spec)).await == Some(true) {
                    self.tell(&model, FetchReport::Here);
                } else if !self.current.as_ref().is_some_and(|it| it.comes(&model)) && !self.line.contains(&model) {
                    if self.current.is_some() || !self.line.is_empty() {
                        self.tell(&model, FetchReport::Progress(Fetch::at(FetchPhase::Waiting)));
                    }
                    self.line.push_back(model);
                }
            }
        }
    }

    /// Whether the entry of a model still asks for the weights that `spec` did: its arguments or its memory are no concern of
    /// theirs.
    fn is_same(&self, model: &str, spec: &ModelSpec) -> bool {
        self.specs.get(model).is_some_and(|now| now.fetch_fingerprint() == spec.fetch_fingerprint())
    }

    fn end_pause(&mut self, model: &str) {
        match self.pauses.remove(model) {
            Some(Pause { goes_on: true, .. }) => self.line.push_back(model.to_owned()),
            Some(Pause { goes_on: false, .. }) => self.tell(model, FetchReport::Available),
            None => {}
        }
    }

    /// One try, and what follows from it.
    async fn fetch(&mut self, model: String) -> Outcome {
        let Some(spec) = self.specs.get(&model).cloned() else { return Outcome::Here };
        let ended = self.around.tasks.soft().child_token();
        let want = Arc::new(AtomicU64::new(self.want_of(&model)));
        self.current = Some(Current { model: model.clone(), want: want.clone(), ended: ended.clone() });
        let before = self.failures.get(&model).map(|failures| failures.reason.clone());
        let reports = (self.reports.clone(), want);
        let mut run = Box::pin(run_fetcher(spec.clone(), self.around.clone(), reports, before, ended.clone()));
        let outcome = loop {
            tokio::select! {
                biased;
                outcome = &mut run => break outcome,
                event = next_event(&mut self.orders, &self.pauses) => {
                    self.on_event(event).await;
                    if !self.is_same(&model, &spec) {
                        break Outcome::Dropped;
                    }
                }
            }
        };
        // Its guard ends a fetcher that nobody waits for.
        drop(run);
        self.current = None;
        match &outcome {
            Outcome::Here => {
                self.failures.remove(&model);
                self.tell(&model, FetchReport::Here);
            }
            Outcome::NoFetcher(why) => {
                tracing::warn!(
                    model,
                    "its weights are not in the cache, and its environment cannot fetch them ({why}): it is loaded as it is"
                );
                self.tell(&model, FetchReport::Here);
            }
            // Nobody waits for a try that was ended.
            Outcome::Failed { .. } | Outcome::Dropped if ended.is_cancelled() => {}
            Outcome::Failed { for_a_person, message, fetch, got_further } => {
                self.failed(&model, *for_a_person, message, fetch.clone(), *got_further);
            }
            // Those of the new entry are asked for again.
            Outcome::Dropped => {
                let want = self.want_of(&model);
                self.on_event(Event::Order(Order::Want(model, want))).await;
            }
            Outcome::Ended => {}
        }
        outcome
    }

    fn failed(&mut self, model: &str, for_a_person: bool, message: &str, fetch: Fetch, got_further: bool) {
        let before = if got_further { 0 } else { self.failures.get(model).map_or(0, |failures| failures.count) };
        let failures = before.saturating_add(1);
        self.failures.insert(model.to_owned(), Failures { count: failures, reason: message.to_owned() });
        let wait = pause(self.around.backoff_first, self.around.backoff_max, failures);
        let retry_at = self.around.clock.now() + i64::try_from(wait.as_millis()).unwrap_or(i64::MAX);
        let goes_on = !for_a_person && failures < INTERRUPTIONS_MAX;
        let until = Instant::now() + self.around.clock.really(wait);
        self.pauses.insert(model.to_owned(), Pause { until, goes_on });
        tracing::warn!(model, failures, retry_in_ms = wait.as_millis(), "its weights were not fetched: {message}");
        let phase = if goes_on { FetchPhase::Interrupted } else { FetchPhase::Failed };
        let shown = rfc3339(retry_at);
        let (reason, retry_at) = (Some(message.to_owned()), Some(retry_at));
        let fetch = Fetch { phase, bytes_per_s: None, eta_s: None, reason, retry_at, ..fetch };
        if goes_on {
            self.tell(model, FetchReport::Progress(fetch));
            return;
        }
        let text = format!("model `{model}`: its weights cannot be fetched: {message}");
        let mut error = JobError::new(ErrorCode::ModelLoadFailed, text, true);
        error.details = Some(json!({"failed_fetches": failures, "retry_at": shown}));
        self.tell(model, FetchReport::Failed { fetch, error });
    }

    fn tell(&self, model: &str, report: FetchReport) {
        // Nobody listening means that the server is shutting down.
        let _ = self.reports.send((model.to_owned(), self.want_of(model), report));
    }

    /// 0: it has not been wanted.
    fn want_of(&self, model: &str) -> u64 {
        self.wants.get(model).copied().unwrap_or(0)
    }
}

async fn next_event(orders: &mut mpsc::UnboundedReceiver<Order>, pauses: &BTreeMap<String, Pause>) -> Event {
    let first = pauses.values().map(|pause| pause.until).min();
    let pause_over = async {
        match first {
            Some(at) => sleep_until(at).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        Some(order) = orders.recv() => Event::Order(order),
        () = pause_over => Event::PauseOver,
        else => std::future::pending().await,
    }
}

/// `first`, doubled for each further failure, at most `max`.
fn pause(first: Duration, max: Duration, failures: u32) -> Duration {
    first.saturating_mul(1 << failures.saturating_sub(1).min(20)).min(max)
}

// ---- one run of the fetcher -------------------------------------------------------------------------------------------

/// What the fetcher writes to stdout, a line each.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Line {
    /// Another fetch of the same repository is at work, of another program.
    Waiting,
    Progress {
        bytes: u64,
        total_bytes: u64,
    },
    /// Something went wrong; the fetcher goes on by itself.
    Retry {
        message: String,
    },
    Done,
    Error {
        code: String,
        message: String,
    },
    #[serde(other)]
    Other,
}

/// A fetcher under its guard. When it is dropped, the guard ends it.
struct Fetcher {
    guard: Child,
    pid: i32,
    lifeline: Option<ChildStdin>,
    mark: String,
    tail: Tail,
    capture: JoinHandle<()>,
}

impl Fetcher {
    fn start(spec: &ModelSpec, around: &Surroundings) -> Result<Self, String> {
        let Launch::Script { python, .. } = &spec.launch else {
            return Err("its own program gets its weights".to_owned());
        };
        process::interpreter_is_there(spec)?;
        let mark = format!("{}:{}", around.data_dir_id, process::nonce()?);
        let (reader, writer) = std::io::pipe().map_err(|error| format!("cannot make a pipe: {error}"))?;
        let mut command = Command::new(&around.program);
        command.arg("guard").arg("--grace-ms").arg(around.grace.as_millis().to_string()).arg("--").arg(python);
        command.args(["-m", "roundhouse_worker.fetch", "--json-progress"]);
        command.arg("--repo").arg(spec.repository().unwrap_or_default());
        if let Some(revision) = &spec.revision {
            command.arg("--revision").arg(revision);
        }
        let mut guard = command
            .env_clear()
            .envs(environment(std::env::vars_os(), spec, &mark))
            .current_dir(&spec.dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::from(writer))
            .spawn()
            .map_err(|error| format!("cannot start {}: {error}", around.program.display()))?;
        let lifeline = guard.stdin.take();
        let pid = guard.id().map_or(0, u32::cast_signed);
        let tail = Tail::default();
        let log = logs::fetch_path(&around.log_dir, &spec.name);
        let capture = logs::capture(reader, watch::channel(log).1, tail.clone(), logs::FILE_LIMIT_BYTES);
        let capture = around.tasks.spawn("fetcher log", capture);
        Ok(Self { guard, pid, lifeline, mark, tail, capture })
    }

    /// Waits until the guard has ended, which takes along what it leaves behind if it is killed. Cancel-safe.
    async fn over(&mut self) {
        // How is told by `end`.
        let _ = self.guard.wait().await;
        let family = self.family();
        blocking(move || family.kill(None, KILL_LIMIT)).await;
    }

    fn family(&self) -> Family {
        Family::Instance { mark: self.mark.clone(), session: Some(self.pid) }
    }

    /// Ends it, if it has not ended; returns how it did when nothing of it lives.
    async fn end(mut self, grace: Duration) -> (String, Tail) {
        drop(self.lifeline.take());
        let ended = timeout(grace + GUARD_SLACK, self.guard.wait()).await;
        let family = self.family();
        blocking(move || family.kill(None, KILL_LIMIT)).await;
        let ended = match ended {
            Ok(ended) => ended,
            Err(_) => self.guard.wait().await,
        };
        // An error: somebody else holds its pipe.
        let _ = timeout(LOG_LIMIT, &mut self.capture).await;
        let how = ended.map_or_else(|error| format!("cannot be waited for: {error}"), process::describe);
        (how, self.tail)
    }
}

/// As a worker's, with the token that workers do not get, the base service, and without a GPU.
fn environment(
    inherited: impl Iterator<Item = (OsString, OsString)>,
    spec: &ModelSpec,
    mark: &str,
) -> BTreeMap<OsString, OsString> {
    let inherited: Vec<(OsString, OsString)> = inherited.collect();
    let token = inherited.iter().find(|(name, _)| name == "HF_TOKEN").cloned();
    let mut vars = process::environment(inherited.into_iter(), spec, &[], (None, None), mark);
    if let Some((name, value)) = token {
        vars.entry(name).or_insert(value);
    }
    vars.insert("CUDA_VISIBLE_DEVICES".into(), "".into());
    vars
}

/// `before`: why the last try failed, which is said until this one gets further. `ended`: it is to end.
async fn run_fetcher(
    spec: ModelSpec,
    around: Surroundings,
    (reports, want): (mpsc::UnboundedSender<(String, u64, FetchReport)>, Arc<AtomicU64>),
    before: Option<String>,
    ended: CancellationToken,
) -> Outcome {
    let looked = spec.clone();
    if blocking(move || is_here(&looked)).await == Some(true) {
        return Outcome::Here;
    }
    let fetch = Fetch { reason: before, ..Fetch::at(FetchPhase::Listing) };
    let tell = |fetch: &Fetch| {
        let report = FetchReport::Progress(fetch.clone());
        drop(reports.send((spec.name.clone(), want.load(Ordering::Relaxed), report)));
    };
    let failed =
        |for_a_person, message, fetch, got_further| Outcome::Failed { for_a_person, message, fetch, got_further };
    tell(&fetch);
    let mut fetcher = match Fetcher::start(&spec, &around) {
        Ok(fetcher) => fetcher,
        Err(message) => return failed(true, message, fetch, false),
    };
    tracing::info!(model = spec.name, process.pid = fetcher.pid, "fetching its weights");
    let Some(stdout) = fetcher.guard.stdout.take() else {
        return failed(false, "the fetcher has no stdout".to_owned(), fetch, false);
    };
    let mut lines = BufReader::new(stdout).lines();
    let mut heard = Heard::new(fetch, Instant::now());
    let begun = Instant::now();
    let mut is_over = false;
    loop {
        let line = tokio::select! {
            biased;
            () = ended.cancelled() => {
                fetcher.end(around.grace).await;
                return Outcome::Ended;
            }
            line = lines.next_line() => line,
            () = fetcher.over(), if !is_over => {
                is_over = true;
                continue;
            }
            () = sleep_until(heard.look_at()) => {
                match heard.look(Instant::now()) {
                    Look::Well => {}
                    Look::Silent => {
                        let silent_s = SILENT_AFTER.as_secs();
                        tracing::warn!(model = spec.name, silent_s, "the fetcher of its weights says nothing");
                        tell(&heard.fetch);
                    }
                    Look::Hangs => break,
                }
                continue;
            }
        };
        let Ok(Some(line)) = line else { break };
        let Ok(line) = serde_json::from_str(&line) else { continue };
        let stood = heard.stands;
        if heard.hear(line, Instant::now()) {
            tell(&heard.fetch);
        }
        if heard.stands && !stood {
            let bytes = heard.fetch.bytes;
            tracing::warn!(
                model = spec.name,
                bytes,
                "its weights do not come: no byte for {} s",
                STANDS_AFTER.as_secs()
            );
        }
    }
    let came = heard.came();
    let hangs = heard.hangs;
    let Heard { fetch, end, .. } = heard;
    let (how, tail) = fetcher.end(around.grace).await;
    match end {
        Some(Line::Done) => {
            let (bytes, seconds) = (fetch.total_bytes, begun.elapsed().as_secs_f64());
            tracing::info!(model = spec.name, bytes, fetched_bytes = came, seconds, "its weights are fetched");
            Outcome::Here
        }
        Some(Line::Error { code, message }) if code == "no_fetcher" => Outcome::NoFetcher(message),
        Some(Line::Error { code, message }) => {
            failed(code != "network", format!("{message} ({code})"), fetch, came > 0)
        }
        _ if hangs => {
            let message = format!("the fetcher said nothing for {} s and was ended", HANGS_AFTER.as_secs());
            failed(false, message, fetch, came > 0)
        }
        _ => match tail.reason() {
            Some(line) if line.contains("No module named") => Outcome::NoFetcher(line),
            Some(line) => failed(false, format!("the fetcher {how}; its log says: {line}"), fetch, came > 0),
            None => failed(false, format!("the fetcher {how}"), fetch, came > 0),
        },
    }
}

/// What a fetcher has said, and when.
struct Heard {
    fetch: Fetch,
    speed: Speed,
    /// The bytes that it began with.
    first: Option<u64>,
    /// Its last trouble that nothing has come since.
    trouble: Option<String>,
    /// When it last said anything.
    heard_at: Instant,
    /// When its bytes last were others than before.
    moved_at: Instant,
    /// No byte comes.
    stands: bool,
    /// It has said nothing for [`SILENT_AFTER`].
    is_silent: bool,
    /// It has said nothing for [`HANGS_AFTER`].
    hangs: bool,
    /// Its last words.
    end: Option<Line>,
}

/// What [`Heard::look`] finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    /// It speaks.
    Well,
    /// It has become silent, which is to be told.
    Silent,
    /// It has to be ended.
    Hangs,
}

impl Heard {
    fn new(fetch: Fetch, now: Instant) -> Self {
        Self {
            trouble: fetch.reason.clone(),
            fetch,
            speed: Speed::default(),
            first: None,
            heard_at: now,
            moved_at: now,
            stands: false,
            is_silent: false,
            hangs: false,
            end: None,
        }
    }

    /// Bytes that came.
    fn came(&self) -> u64 {
        self.first.map_or(0, |first| self.fetch.bytes.saturating_sub(first))
    }

    /// Takes a line of it; whether there is something to tell.
    fn hear(&mut self, line: Line, now: Instant) -> bool {
        self.heard_at = now;
        let was_silent = std::mem::take(&mut self.is_silent);
        match line {
            Line::Waiting => self.fetch.phase = FetchPhase::Waiting,
            Line::Progress { bytes, total_bytes } => {
                self.first.get_or_insert(bytes);
                if self.fetch.phase != FetchPhase::Fetching || self.fetch.bytes != bytes {
                    (self.moved_at, self.trouble) = (now, None);
                }
                // Of files that are here to the last byte the hashes are checked.
                self.stands = bytes < total_bytes && now.duration_since(self.moved_at) >= STANDS_AFTER;
                let mut bytes_per_s = self.speed.read(bytes, now);
                if self.stands {
                    bytes_per_s = Some(0.0);
                    self.speed.bytes_per_s = bytes_per_s;
                }
                self.fetch = progress(bytes, total_bytes, bytes_per_s);
            }
            Line::Retry { message } => self.trouble = Some(cut(message, MESSAGE_LIMIT_BYTES)),
            Line::Error { code, message } => {
                self.end = Some(Line::Error { code, message: cut(message, MESSAGE_LIMIT_BYTES) });
                return false;
            }
            line @ Line::Done => {
                self.end = Some(line);
                return false;
            }
            Line::Other if !was_silent => return false,
            Line::Other => {}
        }
        self.fetch.reason = self.trouble.clone();
        if self.stands && self.fetch.reason.is_none() {
            self.fetch.reason = Some(format!("no byte has come for over {} s", STANDS_AFTER.as_secs()));
        }
        true
    }

    /// When to look whether it still speaks.
    fn look_at(&self) -> Instant {
        self.heard_at + if self.is_silent { HANGS_AFTER } else { SILENT_AFTER }
    }

    fn look(&mut self, now: Instant) -> Look {
        let silence = now.duration_since(self.heard_at);
        self.hangs = silence >= HANGS_AFTER;
        if self.hangs {
            return Look::Hangs;
        }
        if self.is_silent || silence < SILENT_AFTER {
            return Look::Well;
        }
        self.is_silent = true;
        self.fetch.bytes_per_s = self.fetch.bytes_per_s.map(|_| 0.0);
        self.fetch.eta_s = None;
        let (silent, hangs) = (SILENT_AFTER.as_secs(), HANGS_AFTER.as_secs());
        self.fetch.reason =
            Some(format!("the fetcher has said nothing for over {silent} s; after {hangs} s it is started again"));
        Look::Silent
    }
}

#[expect(clippy::cast_precision_loss, reason = "sizes are far below 2^52 bytes")]
fn progress(bytes: u64, total_bytes: u64, bytes_per_s: Option<f64>) -> Fetch {
    let left = total_bytes.saturating_sub(bytes) as f64;
    let percent = if total_bytes == 0 { 100.0 } else { bytes as f64 * 100.0 / total_bytes as f64 };
    Fetch {
        bytes,
        total_bytes: Some(total_bytes),
        percent: Some((percent * 10.0).round() / 10.0),
        bytes_per_s: bytes_per_s.map(f64::round),
        eta_s: bytes_per_s.filter(|speed| *speed >= 1.0).map(|speed| (left / speed).ceil()),
        ..Fetch::at(FetchPhase::Fetching)
    }
}

/// How fast bytes come, smoothed.
#[derive(Debug, Default)]
struct Speed {
    last: Option<(Instant, u64)>,
    bytes_per_s: Option<f64>,
}

impl Speed {
    #[expect(clippy::cast_precision_loss, reason = "sizes are far below 2^52 bytes")]
    fn read(&mut self, bytes: u64, now: Instant) -> Option<f64> {
        let Some((at, before)) = self.last else {
            self.last = Some((now, bytes));
            return None;
        };
        let seconds = now.duration_since(at).as_secs_f64();
        if seconds >= READING_MIN_S {
            self.last = Some((now, bytes));
            // Fewer than before: a file is fetched anew.
            if bytes >= before {
                let reading = (bytes - before) as f64 / seconds;
                let weight = 1.0 - (-seconds / SMOOTHED_S).exp();
                self.bytes_per_s = Some(self.bytes_per_s.map_or(reading, |old| old + weight * (reading - old)));
            }
        }
        self.bytes_per_s
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::SystemClock;
    use crate::lifecycle::Tasks;
    use crate::worker::gpu::from_setting;
    use crate::worker::process::tests::spec;
    use crate::worker::spare::Spares;
    use crate::worker::supervisor::StuckMemory;

    #[test]
    fn the_fetcher_gets_the_token_and_no_gpu() {
        let inherited =
            [("HF_TOKEN", "t"), ("OPENAI_API_KEY", "k"), ("HTTPS_PROXY", "p"), ("CUDA_VISIBLE_DEVICES", "3")];
        let vars = |spec: &ModelSpec| {
            let inherited = inherited.map(|(name, value)| (OsString::from(name), OsString::from(value)));
            environment(inherited.into_iter(), spec, "id:1")
        };
        let mut spec = spec(&["x"]);
        spec.gpus = 1;
        let get = |vars: &BTreeMap<OsString, OsString>, name: &str| {
            vars.get(&OsString::from(name)).map(|value| value.to_string_lossy().into_owned())
        };
        let found = vars(&spec);
        assert_eq!(get(&found, "HF_TOKEN").as_deref(), Some("t"));
        assert_eq!(get(&found, "OPENAI_API_KEY"), None);
        assert_eq!(get(&found, "HTTPS_PROXY").as_deref(), Some("p"));
        assert_eq!(get(&found, "CUDA_VISIBLE_DEVICES").as_deref(), Some(""));
        assert_eq!(get(&found, "ROUNDHOUSE_INSTANCE").as_deref(), Some("id:1"));
        spec.env.insert("HF_TOKEN".to_owned(), "of the entry".to_owned());
        assert_eq!(get(&vars(&spec), "HF_TOKEN").as_deref(), Some("of the entry"));

        assert_eq!(get(&vars(&spec), "PYTHONPATH"), None, "a command");
        let models = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(models.path().join("base/roundhouse_worker")).unwrap();
        let base = models.path().join("base").display().to_string();
        spec.launch = Launch::Script { python: "python3".into(), script: models.path().join("tone/server.py") };
        assert_eq!(get(&vars(&spec), "PYTHONPATH"), Some(base.clone()), "if the environment does not have it");
        spec.env.insert("PYTHONPATH".to_owned(), "/x:/y".to_owned());
        assert_eq!(get(&vars(&spec), "PYTHONPATH"), Some(format!("/x:/y:{base}")));
    }

    #[tokio::test]
    async fn an_end_takes_a_model_out_of_the_line_its_pause_and_its_fetch_until_it_is_wanted_again() {
        let dir = tempfile::tempdir().unwrap();
        let around = Surroundings {
            clock: Arc::new(SystemClock::default()),
            gpus: from_setting(Some("none")).unwrap(),
            tasks: Tasks::new(),
            data_dir_id: "fetching".to_owned(),
            log_dir: dir.path().join("logs"),
            program: dir.path().join("no-such-program"),
            grace: Duration::from_secs(1),
            stuck: StuckMemory::default(),
            backoff_first: Duration::from_secs(60),
            backoff_max: Duration::from_secs(60),
            spares: Spares::default(),
        };
        let env = BTreeMap::from([("HF_HUB_CACHE".to_owned(), dir.path().display().to_string())]);
        let launch = Launch::Script { python: "python3".into(), script: "/m/server.py".into() };
        let model = Some("org/tiny".to_owned());
        let current = ModelSpec { name: "current".to_owned(), launch, model, env, ..spec(&[]) };
        let ended = CancellationToken::new();
        let want = Arc::new(AtomicU64::new(1));
        let (reports, mut told) = mpsc::unbounded_channel();
        let mut fetching = Fetching {
            specs: by_name(&[current]),
            around,
            orders: mpsc::unbounded_channel().1,
            reports,
            wants: [("current".to_owned(), 1)].into(),
            line: ["stays".to_owned(), "waits".to_owned()].into(),
            current: Some(Current { model: "current".to_owned(), want: want.clone(), ended: ended.clone() }),
            pauses: [("pauses".to_owned(), Pause { until: Instant::now(), goes_on: true })].into(),
            failures: BTreeMap::new(),
        };
        fetching.on_event(Event::Order(Order::Want("current".to_owned(), 2))).await;
        assert_eq!(fetching.line, ["stays", "waits"], "it comes already");
        assert_eq!(want.load(Ordering::Relaxed), 2, "and answers both");
        for model in ["waits", "pauses", "current"] {
            fetching.on_event(Event::Order(Order::End(model.to_owned()))).await;
        }
        assert_eq!(fetching.line, ["stays"]);
        assert!(fetching.pauses.is_empty() && ended.is_cancelled());
        assert!(told.try_recv().is_err(), "nothing is told of it");
        fetching.on_event(Event::Order(Order::Want("current".to_owned(), 4))).await;
        assert_eq!(want.load(Ordering::Relaxed), 2, "what is being ended does not answer the next");
        assert_eq!(fetching.line, ["stays", "current"], "after the one that is being ended");
        let waiting = FetchReport::Progress(Fetch::at(FetchPhase::Waiting));
        assert_eq!(told.try_recv(), Ok(("current".to_owned(), 4, waiting)));
    }

    #[test]
    fn what_is_left_is_told_from_the_speed() {
        let begun = Instant::now();
        let mut speed = Speed::default();
        assert_eq!(speed.read(1_000, begun), None, "nothing is known of what was here before");
        assert_eq!(speed.read(1_001, begun + Duration::from_millis(1)), None, "too soon to tell");
        let first = speed.read(3_000, begun + Duration::from_secs(2)).unwrap();
        assert!((first - 1_000.0).abs() < 1.0, "{first}");
        let slower = speed.read(3_000, begun + Duration::from_secs(7)).unwrap();
        assert!(slower < 500.0 && slower > 0.0, "{slower}");
        assert_eq!(speed.read(0, begun + Duration::from_secs(8)), Some(slower), "a file is fetched anew");

        let seen = progress(25, 100, Some(10.0));
        assert_eq!((seen.percent, seen.eta_s, seen.phase), (Some(25.0), Some(8.0), FetchPhase::Fetching));
        assert_eq!(progress(25, 100, None).eta_s, None);
        assert_eq!(progress(25, 100, Some(0.0)).eta_s, None, "it stands");
        assert_eq!(progress(0, 0, None).percent, Some(100.0));
    }

    #[test]
    fn a_fetcher_that_falls_silent_is_told_and_later_ended() {
        let begun = Instant::now();
        let at = |seconds| begun + Duration::from_secs(seconds);
        let mut heard = Heard::new(Fetch::at(FetchPhase::Listing), begun);
        let line = |bytes| Line::Progress { bytes, total_bytes: 100 };
        assert!(heard.hear(line(20), at(1)) && heard.hear(line(33), at(2)));
        assert!(heard.fetch.eta_s.is_some() && heard.fetch.bytes_per_s > Some(1.0));
        assert_eq!(heard.look_at(), at(22));
        assert_eq!(heard.look(at(21)), Look::Well);
        assert_eq!(heard.look(at(22)), Look::Silent);
        let reason = "the fetcher has said nothing for over 20 s; after 120 s it is started again";
        assert_eq!(heard.fetch.reason.as_deref(), Some(reason));
        assert_eq!((heard.fetch.bytes, heard.fetch.bytes_per_s, heard.fetch.eta_s), (33, Some(0.0), None));
        assert_eq!((heard.look_at(), heard.look(at(100))), (at(122), Look::Well), "it is told once");
        // It speaks again, and says no more than that.
        assert!(heard.hear(Line::Other, at(110)));
        assert_eq!((heard.fetch.reason.as_deref(), heard.look_at()), (None, at(130)));
        assert!(!heard.hear(Line::Other, at(111)), "there is nothing to tell");
        assert_eq!(heard.look(at(140)), Look::Silent);
        assert_eq!(heard.look(at(231)), Look::Hangs);
        assert_eq!((heard.hangs, heard.came()), (true, 13));
    }

    #[test]
    fn bytes_that_do_not_come_are_told_unless_hashes_are_checked() {
        let begun = Instant::now();
        let at = |seconds| begun + Duration::from_secs(seconds);
        let mut heard = Heard::new(Fetch { reason: Some("before".into()), ..Fetch::at(FetchPhase::Listing) }, begun);
        let line = |bytes| Line::Progress { bytes, total_bytes: 100 };
        let stands = "no byte has come for over 20 s";
        for (second, bytes, reason) in
            [(1, 20, None), (2, 33, None), (21, 33, None), (22, 33, Some(stands)), (23, 33, Some(stands))]
        {
            heard.hear(line(bytes), at(second));
            assert_eq!(heard.fetch.reason.as_deref(), reason, "after {second} s");
        }
        assert_eq!((heard.fetch.bytes_per_s, heard.fetch.eta_s, heard.stands), (Some(0.0), None, true));
        heard.hear(Line::Retry { message: "timed out".into() }, at(32));
        heard.hear(line(33), at(33));
        assert_eq!(heard.fetch.reason.as_deref(), Some("timed out"), "which says more");
        heard.hear(line(100), at(34));
        assert_eq!((heard.fetch.reason.as_deref(), heard.stands), (None, false));
        heard.hear(line(100), at(90));
        assert_eq!((heard.fetch.reason.as_deref(), heard.stands), (None, false), "all of it is here");
    }

    #[test]
    fn the_fetchers_words_have_nothing_that_a_terminal_obeys() {
        let now = Instant::now();
        let mut heard = Heard::new(Fetch::at(FetchPhase::Listing), now);
        let message = || "\u{1b}[31mHTTP 502\u{1b}[0m".to_owned();
        heard.hear(Line::Retry { message: message() }, now);
        assert_eq!(heard.fetch.reason.as_deref(), Some("HTTP 502"));
        heard.hear(Line::Error { code: "network".into(), message: message() }, now);
        assert!(matches!(heard.end, Some(Line::Error { message, .. }) if message == "HTTP 502"));
    }

    #[test]
    fn pauses_double_up_to_their_maximum() {
        let (first, max) = (Duration::from_secs(10), Duration::from_secs(600));
        let waits: Vec<u64> = (1..=8).map(|n| pause(first, max, n).as_secs()).collect();
        assert_eq!(waits, [10, 20, 40, 80, 160, 320, 600, 600]);
    }
}
