//! One task per running job: sends it to the worker, relays what comes back, judges the end, commits it, and only then
//! tells anybody; but the loop hears at once that the worker has answered, so that its slot does not wait for the disk.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::domain::shape;
use crate::domain::worker::{Answer, Outcome, Progress};
use crate::domain::{ErrorCode, Face, JobError, JobState, Millis, Token};
use crate::lifecycle::Tasks;
use crate::policy::retry::{self, Attempt, Requeue, Suspicion, Verdict};
use crate::scheduler::hub::{Ended, Hub};
use crate::scheduler::run::Message;
use crate::scheduler::state::{Back, Event, Place};
use crate::scheduler::watch;
use crate::store::files::StoredAnswer;
use crate::store::{Change, ClaimedJob, End, GiveBack, Store, StoreError};
use crate::worker::client::{Call, RunTag, WorkerClient};
use crate::worker::gpu::GpuProbe;

/// Longest that output waits to be committed, and how often progress is.
const FLUSH_EVERY: Duration = Duration::from_millis(250);
const PROGRESS_EVERY: Duration = Duration::from_millis(500);
/// Bytes of output committed in one event.
const FLUSH_BYTES: usize = 4 * 1024;
/// Progress that may wait between the worker's reader and this task.
const PROGRESS_WAITING_MAX: usize = 256;
/// First pause after the store refused a final write; doubles up to 30 s.
pub(super) const STORE_RETRY: Duration = Duration::from_millis(200);
/// The longest of these pauses.
pub(super) const STORE_RETRY_MAX: Duration = Duration::from_secs(30);
/// How long a job waits whose request could not be read; doubles with its attempts up to [`retry::PAUSE_MAX_MS`].
const GIVE_UP_PAUSE_MS: i64 = 1_000;

/// The shape of a longer body is not read, in bytes.
const NAMED_BYTES_MAX: usize = 64 * 1024;

fn give_up_pause_ms(attempt: i64) -> i64 {
    (GIVE_UP_PAUSE_MS << attempt.clamp(0, 30)).min(retry::PAUSE_MAX_MS)
}

/// What every dispatch needs. Cheap to clone.
#[derive(Clone)]
pub(super) struct Context {
    pub(super) store: Store,
    pub(super) hub: Hub,
    pub(super) client: WorkerClient,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) tasks: Tasks,
    pub(super) messages: mpsc::UnboundedSender<Message>,
    pub(super) gpus: Arc<dyn GpuProbe>,
}

/// How the loop ends the attempt of a running job.
#[derive(Clone, Debug, Default)]
pub(super) struct Stop {
    /// Somebody asked to cancel the job.
    pub(super) cancelled: CancellationToken,
    /// A GPU of its worker has vanished, or a job that was cancelled before does not let go of it.
    pub(super) evicted: CancellationToken,
}

/// One claimed job on its way to a worker.
pub(super) struct Dispatch {
    pub(super) job: ClaimedJob,
    /// Entry name.
    pub(super) model: Arc<str>,
    pub(super) place: Place,
    pub(super) run: Option<RunTag>,
    /// Isolated by an earlier crash, or by an end of memory, and the only one of its run.
    pub(super) alone: bool,
    /// Jobs of its run, itself included.
    pub(super) run_jobs: u32,
    /// The first of a run of a model that batches: says what its shape is in words.
    pub(super) names_shape: bool,
    /// Ends it.
    pub(super) stop: Stop,
}

/// What the relay saw of an attempt.
#[derive(Debug, Default, Clone, Copy)]
struct Relayed {
    chunks: bool,
    /// When the last chunk or step came.
    sign_at: Option<Instant>,
}

/// How an attempt's end was committed.
struct Committed {
    change: Option<Change>,
    ended: Option<Ended>,
    back: Option<Back>,
}

/// Runs the attempt to its committed end, then tells the loop.
pub(super) async fn run(context: Context, dispatch: Dispatch) {
    match context.store.reader().load(&dispatch.job.body).await {
        Ok(body) => send(context, dispatch, body).await,
        Err(error) if error.is_lost_file() => {
            tracing::error!(job.id = %dispatch.job.token.id, "the body of a job is lost: {error}");
            let message = "the stored body of this job is damaged or gone; submit it again";
            let verdict = Verdict::Fail(JobError::new(ErrorCode::InternalError, message, true));
            conclude(context, dispatch, verdict, false, false).await;
        }
        Err(error) => {
            tracing::error!(job.id = %dispatch.job.token.id, "a body could not be read, trying again: {error}");
            let verdict = Verdict::Requeue(Requeue {
                not_before: Some(context.clock.now() + give_up_pause_ms(dispatch.job.token.attempt)),
                failures: dispatch.job.failures,
                crashes: dispatch.job.crashes,
                suspicion: Suspicion::Kept,
                error: None,
            });
            conclude(context, dispatch, verdict, false, false).await;
        }
    }
}

async fn send(context: Context, dispatch: Dispatch, body: Bytes) {
    if dispatch.names_shape && body.len() <= NAMED_BYTES_MAX {
        let words = serde_json::from_slice(&body).map(|body| shape::words(&body)).unwrap_or_default();
        let (model, number) = (dispatch.model.clone(), dispatch.job.token.id.number);
        context.tell(Message::Event(Event::Shape { model, number, words }));
    }
    let started = Instant::now();
    let since = context.clock.now();
    let token = dispatch.job.token;
    let (outcome, relayed, deadline_passed) = attempt(&context, &dispatch, body).await;
    let outcome = of_dead_engine(&context, &dispatch, outcome).await;
    let suspect = matches!(outcome, Outcome::WorkerLost { .. });
    let outcome = blame(&context, &dispatch, outcome, relayed).await;
    let answered = matches!(outcome, Outcome::Answered(_));
    if let Outcome::WorkerLost { reason, .. } = &outcome {
        tracing::warn!(job.id = %token.id, model = %dispatch.model, "worker lost: {reason}");
    }
    let mut hung_with = 0;
    if is_timeout(&outcome) || (matches!(outcome, Outcome::Stopped) && dispatch.stop.cancelled.is_cancelled()) {
        // Half of the time is long: engines that live give a sign of it many times a minute.
        let is_silent = relayed.sign_at.unwrap_or(started).elapsed() >= started.elapsed() / 2;
        if is_timeout(&outcome) {
            let after_s = started.elapsed().as_secs();
            tracing::warn!(job.id = %token.id, model = %dispatch.model, after_s, is_silent, "ran into its time limit");
        }
        if is_silent {
            hung_with = context.blames_silence(&dispatch.model, token.id.number, since).await;
        }
        if hung_with > 0 {
            tracing::warn!(job.id = %token.id, model = %dispatch.model, jobs = hung_with, "its worker hangs, and is ended");
        }
    }
    let mut judged = judged(&context, &dispatch, relayed, deadline_passed);
    judged.hung_with = hung_with;
    if retry::may_be_the_wakes(&outcome, &judged) {
        judged.canary = context.blames_wake(&dispatch.model, token.id.number).await;
    }
    if judged.canary {
        tracing::warn!(job.id = %token.id, model = %dispatch.model, "failed on a worker just woken, which is loaded anew");
    } else if matches!(&outcome, Outcome::Failed { error, .. } if error.code == ErrorCode::WorkerOom) {
        let (model, number, jobs) = (dispatch.model.clone(), token.id.number, dispatch.run_jobs);
        tracing::warn!(job.id = %token.id, model = %model, run.jobs = jobs, "out of memory");
        context.tell(Message::Event(Event::OutOfMemory { model, number, jobs }));
    }
    let verdict = retry::judge(outcome, &judged, context.clock.now());
    tracing::debug!(
        job.id = %token.id, job.attempt = token.attempt, elapsed_ms = started.elapsed().as_millis(), "attempt ended"
    );
    conclude(context, dispatch, verdict, answered, suspect).await;
}

/// What a server says about each of its requests when its engine has died is no failure of theirs, and neither is an answer
/// that ends early without a word: the worker is lost.
async fn of_dead_engine(context: &Context, dispatch: &Dispatch, outcome: Outcome) -> Outcome {
    let is_servers = |error: &JobError| {
        let status = error.details.as_ref().and_then(|details| details["status"].as_u64());
        error.code == ErrorCode::WorkerError && status.is_none_or(|status| status >= 500)
    };
    match outcome {
        Outcome::Failed { error, retriable } if is_servers(&error) => {
            match context.client.engine_death(&dispatch.place.base_url).await {
                Some(reason) => {
                    Outcome::WorkerLost { reason: format!("{reason}; it said: {}", error.message), reached: true }
                }
                None => Outcome::Failed { error, retriable },
            }
        }
        other => other,
    }
}

/// A job is not to blame for a worker that has lost its GPU, or that another one hangs: it was stopped, unless its caller has
/// had a part of the answer.
async fn blame(context: &Context, dispatch: &Dispatch, outcome: Outcome, relayed: Relayed) -> Outcome {
    let has_part = relayed.chunks && dispatch.job.face == Face::Sync;
    let vanished = "a GPU of its worker has vanished";
    let evicted = "its worker hangs, or a GPU of it has vanished";
    match outcome {
        Outcome::Stopped if has_part && dispatch.stop.evicted.is_cancelled() => {
            Outcome::WorkerLost { reason: evicted.to_owned(), reached: true }
        }
        Outcome::WorkerLost { reason, reached } => {
            let gone = match dispatch.place.gpus {
                Some(set) => watch::lacks(&context.gpus, set).await,
                None => false,
            };
            match (gone, has_part) {
                (true, false) => {
                    tracing::warn!(job.id = %dispatch.job.token.id, "{vanished}: {reason}");
                    Outcome::Stopped
                }
                (true, true) => Outcome::WorkerLost { reason: vanished.to_owned(), reached },
                (false, _) => Outcome::WorkerLost { reason, reached },
            }
        }
        other => other,
    }
}

/// Commits the verdict, tells watchers, and lets go of the job whatever became of it.
async fn conclude(context: Context, dispatch: Dispatch, verdict: Verdict, answered: bool, suspect: bool) {
    let number = dispatch.job.token.id.number;
    let gpu_ms = context.settle(&dispatch.model, number).await;
    let committed = commit(&context, &dispatch, verdict, gpu_ms).await;
    let state = committed.change.map(|change| change.state);
    if let (Some(change), Some(ended)) = (committed.change, committed.ended) {
        context.hub.end(number, change.version, change.seq, ended);
    } else if let Some(change) = committed.change {
        context.hub.publish(number, change.version, change.seq);
    }
    let event = Event::Ended { model: dispatch.model.clone(), number, answered, suspect, back: committed.back };
    context.tell(Message::Ended { event, state });
}

fn judged(context: &Context, dispatch: &Dispatch, relayed: Relayed, deadline_passed: bool) -> Attempt {
    let job = &dispatch.job;
    Attempt {
        failures: job.failures,
        crashes: job.crashes,
        max_attempts: job.max_attempts,
        isolated: dispatch.alone,
        run_jobs: dispatch.run_jobs,
        has_own_mark: dispatch.alone && job.crash.is_some_and(retry::is_own_mark),
        // Asked for when it matters.
        canary: false,
        hung_with: 0,
        cancelling: dispatch.stop.cancelled.is_cancelled(),
        stopping: context.tasks.hard().is_cancelled(),
        // A caller on the line has the output already and cannot be asked to forget it; readers of events can.
        relayed: relayed.chunks && job.face == Face::Sync,
        deadline_passed,
        deadline: job.deadline,
        // 32 random bits as a share; without them the whole pause.
        jitter: getrandom::u32().map_or(0.999, |bits| f64::from(bits) / (f64::from(u32::MAX) + 1.0)),
    }
}

/// What a job takes back to the queue from a worker of this load.
pub(super) fn given_back(job: &ClaimedJob, load: i64, requeue: &Requeue, gpu_ms: f64) -> GiveBack {
    let crash = match requeue.suspicion {
        Suspicion::Raised => Some(load),
        Suspicion::Own => Some(retry::own_mark(job.token.id.number)),
        Suspicion::Kept => job.crash,
        Suspicion::Dropped => None,
    };
    GiveBack {
        failures: requeue.failures,
        crashes: requeue.crashes,
        crash,
        not_before: requeue.not_before,
        error: requeue.error.clone(),
        gpu_ms,
    }
}

impl Context {
    /// What an attempt that is over had of the devices, ms. 0 if the loop has ended: nobody counts any more.
    async fn settle(&self, model: &Arc<str>, number: i64) -> f64 {
        let (reply, answer) = oneshot::channel();
        self.tell(Message::Settle { model: model.clone(), number, reply });
        answer.await.unwrap_or(0.0)
    }

    /// Whether a failure is put down to the wake of the job's worker, which ends then. False if the loop has ended.
    async fn blames_wake(&self, model: &Arc<str>, number: i64) -> bool {
        let (reply, answer) = oneshot::channel();
        self.tell(Message::BlameWake { model: model.clone(), number, reply });
        answer.await.unwrap_or(false)
    }

    /// With how many jobs on it the worker of an attempt without a sign of life was found to hang. 0 if the loop has ended.
    async fn blames_silence(&self, model: &Arc<str>, number: i64, since: Millis) -> u32 {
        let (reply, answer) = oneshot::channel();
        self.tell(Message::BlameSilence { model: model.clone(), number, since, reply });
        answer.await.unwrap_or(0)
    }

    /// Tells the loop; after the loop has ended there is nothing left to tell.
    pub(super) fn tell(&self, message: Message) {
        let _ = self.messages.send(message);
    }
}

/// Sends the job and relays its progress until it ends. Says whether the job's own deadline cut it.
async fn attempt(context: &Context, dispatch: &Dispatch, body: Bytes) -> (Outcome, Relayed, bool) {
    let now = context.clock.now();
    let (timeout, by_deadline) = time_left(&dispatch.job, now);
    let stop = CancellationToken::new();
    let (sender, receiver) = mpsc::channel(PROGRESS_WAITING_MAX);
    let call = Call {
        base_url: dispatch.place.base_url.clone(),
        endpoint: dispatch.job.endpoint.clone(),
        token: dispatch.job.token,
        body,
        stream: dispatch.job.stream,
        run: dispatch.run.clone(),
        timeout: context.clock.really(timeout),
    };
    let work = async {
        let outcome = context.client.run(call, sender, stop.clone()).await;
        if matches!(outcome, Outcome::Answered(_)) {
            // Nothing can come between it and its success; what is still to be stored of it is none of the worker's business.
            let (model, number) = (dispatch.model.clone(), dispatch.job.token.id.number);
            context.tell(Message::Event(Event::Answered { model, number }));
        }
        outcome
    };
    let relay = relay(context, dispatch.job.token, receiver);
    let stopper = async {
        tokio::select! {
            () = dispatch.stop.cancelled.cancelled() => {}
            () = dispatch.stop.evicted.cancelled() => {}
            () = context.tasks.hard().cancelled() => {}
        }
        stop.cancel();
        std::future::pending::<()>().await;
    };
    let both = async { tokio::join!(work, relay) };
    let (outcome, relayed) = tokio::select! {
        done = both => done,
        () = stopper => unreachable!("waits for ever after it has asked to stop"),
    };
    let deadline_passed = by_deadline && is_timeout(&outcome);
    (outcome, relayed, deadline_passed)
}

fn is_timeout(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Failed { error, .. } if error.code == ErrorCode::ExecutionTimeout)
}

/// The attempt's time limit, and whether it is the job's deadline that sets it.
pub(super) fn time_left(job: &ClaimedJob, now: Millis) -> (Duration, bool) {
    let millis = |ms: i64| Duration::from_millis(u64::try_from(ms).unwrap_or(0));
    match job.deadline.map(|deadline| deadline - now) {
        Some(left) if left < job.timeout_ms => (millis(left), true),
        _ => (millis(job.timeout_ms), false),
    }
}

/// Output and progress on their way to watchers (at once) and to the event log (coalesced).
async fn relay(context: &Context, token: Token, mut receiver: mpsc::Receiver<Progress>) -> Relayed {
    let mut relayed = Relayed::default();
    let mut output: Vec<Bytes> = Vec::new();
    let mut output_bytes = 0;
    let mut step: Option<(u64, u64)> = None;
    let mut flush_at: Option<Instant> = None;
    let mut last_step_at: Option<Instant> = None;
    loop {
        let flush = async {
            match flush_at {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        let progress = tokio::select! {
            progress = receiver.recv() => Some(progress),
            () = flush => None,
        };
        match progress {
            Some(Some(Progress::Chunk(chunk))) => {
                relayed.chunks = true;
                relayed.sign_at = Some(Instant::now());
                context.hub.chunk(token.id.number, chunk.clone());
                output_bytes += chunk.len();
                output.push(chunk);
                let due = if output_bytes >= FLUSH_BYTES { Instant::now() } else { Instant::now() + FLUSH_EVERY };
                flush_at = Some(flush_at.map_or(due, |at| at.min(due)));
            }
            Some(Some(Progress::Step { step: done, total })) => {
                relayed.sign_at = Some(Instant::now());
                step = Some((done, total));
                let due = last_step_at.map_or_else(Instant::now, |at| at + PROGRESS_EVERY);
                flush_at = Some(flush_at.map_or(due, |at| at.min(due)));
            }
            Some(None) => {
                flush_output(context, token, &mut output).await;
                flush_step(context, token, &mut step).await;
                return relayed;
            }
            None => {
                flush_at = None;
                flush_output(context, token, &mut output).await;
                output_bytes = 0;
                if step.is_some() {
                    last_step_at = Some(Instant::now());
                    flush_step(context, token, &mut step).await;
                }
            }
        }
    }
}

async fn flush_output(context: &Context, token: Token, output: &mut Vec<Bytes>) {
    if output.is_empty() {
        return;
    }
    let delta: Vec<Value> = output.drain(..).filter_map(|chunk| serde_json::from_slice(&chunk).ok()).collect();
    append(context, token, "job.output", json!({"format": "openai.chunk", "delta": delta})).await;
}

async fn flush_step(context: &Context, token: Token, step: &mut Option<(u64, u64)>) {
    let Some((done, total)) = step.take() else {
        return;
    };
    #[expect(clippy::cast_precision_loss, reason = "steps are few")]
    let percent = if total > 0 { (done as f64 / total as f64 * 100.0).round() } else { 0.0 };
    append(context, token, "job.progress", json!({"progress": {"step": done, "total": total, "percent": percent}}))
        .await;
}

async fn append(context: &Context, token: Token, kind: &'static str, body: Value) {
    match context.store.append(token, kind, body).await {
        Ok(Some(change)) => context.hub.publish(token.id.number, change.version, change.seq),
        Ok(None) => {}
        // Progress is advice: losing a line of it loses nothing of the job.
        Err(error) => tracing::warn!(job.id = %token.id, "an event was not stored: {error}"),
    }
}

/// Commits the verdict, trying again while the store refuses, since an accepted job must get its end.
async fn commit(context: &Context, dispatch: &Dispatch, verdict: Verdict, gpu_ms: f64) -> Committed {
    let mut pause = STORE_RETRY;
    // Files are written once, however often the row has to be tried.
    let mut kept = None;
    loop {
        match try_commit(context, dispatch, &verdict, gpu_ms, &mut kept).await {
            Ok(committed) => return committed,
            Err(StoreError::Stopped) => break,
            Err(error) => {
                tracing::error!(job.id = %dispatch.job.token.id, "the end of a job was not stored, trying again: {error}")
            }
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => pause = (pause * 2).min(STORE_RETRY_MAX),
            () = context.tasks.hard().cancelled() => break,
        }
    }
    // The next start finds the job running, and gives it back to the queue.
    Committed { change: None, ended: None, back: None }
}

async fn try_commit(
    context: &Context,
    dispatch: &Dispatch,
    verdict: &Verdict,
    gpu_ms: f64,
    kept: &mut Option<StoredAnswer>,
) -> Result<Committed, StoreError> {
    let token = dispatch.job.token;
    let (end, ended) = match verdict {
        Verdict::Succeed(answer) => return succeed(context, dispatch, answer, gpu_ms, kept).await,
        Verdict::Fail(error) => (End::Failed(error.clone()), ended(JobState::Failed, error.clone())),
        Verdict::Expire(error) => (End::Expired(error.clone()), ended(JobState::Expired, error.clone())),
        Verdict::Cancel => return cancel(context, token, gpu_ms).await,
        Verdict::Requeue(requeue) => {
            let back = given_back(&dispatch.job, dispatch.place.load, requeue, gpu_ms);
            let waits = Back { not_before: back.not_before, crash: back.crash };
            let change = context.store.requeue(token, back).await?;
            // Asked to cancel in the meantime: then it is not tried again.
            return match change {
                None => cancel(context, token, gpu_ms).await,
                Some(_) => Ok(Committed { change, ended: None, back: Some(waits) }),
            };
        }
    };
    let change = context.store.finish(token, end, gpu_ms).await?;
    Ok(Committed { change, ended: Some(ended), back: None })
}

async fn succeed(
    context: &Context,
    dispatch: &Dispatch,
    answer: &Answer,
    gpu_ms: f64,
    kept: &mut Option<StoredAnswer>,
) -> Result<Committed, StoreError> {
    let stored = match kept.take() {
        Some(stored) => stored,
        None => context.store.keep(dispatch.job.token, dispatch.job.kind, answer).await?,
    };
    *kept = Some(stored.clone());
    let change = context.store.finish(dispatch.job.token, End::Succeeded(stored), gpu_ms).await?;
    let ended = Ended { state: JobState::Succeeded, answer: Some(Arc::new(answer.clone())), error: None };
    Ok(Committed { change, ended: Some(ended), back: None })
}

async fn cancel(context: &Context, token: Token, gpu_ms: f64) -> Result<Committed, StoreError> {
    let change = context.store.finish(token, End::Cancelled, gpu_ms).await?;
    let error = context.store.reader().job(token.id).await.ok().and_then(|job| job.error);
    let ended = Ended { state: JobState::Cancelled, answer: None, error };
    Ok(Committed { change, ended: Some(ended), back: None })
}

fn ended(state: JobState, error: JobError) -> Ended {
    Ended { state, answer: None, error: Some(error) }
}
