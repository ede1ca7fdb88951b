//! Our store, called in this process by its verbs.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::{join_all, try_join_all};
use roundhouse::clock::{Clock, SystemClock};
use roundhouse::domain::job::Present;
use roundhouse::domain::worker::Answer;
use roundhouse::domain::{Face, JobId, JobKind, NewJob, StorageSettings, Token};
use roundhouse::store::{self, End, Store};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::measure::{Counters, Run, us};

static MODELS: AtomicU64 = AtomicU64::new(20);
pub(crate) const BODY_BYTES: usize = 600;
/// Jobs of one claim, and of one completion.
pub(crate) const BATCH: usize = 32;
/// Jobs of one bulk call.
pub(crate) const BULK: usize = 100;
/// Callers that submit in bulk side by side.
pub(crate) const BULK_CALLERS: usize = 16;
const RESULT_BYTES: usize = 1_024;
/// Workers of the whole life; each claims, then completes.
const WORKERS: usize = 4;
/// Jobs that may be between their submission and their end in the whole life.
const IN_FLIGHT: usize = 8_192;
/// Claims of one round; the jobs they take are put in before, outside of the time measured.
const CLAIMS: usize = 100;

/// How many models the jobs are for, by turns.
pub(crate) fn models() -> u64 {
    MODELS.load(Ordering::Relaxed)
}

/// Sets it, before anything is measured.
pub(crate) fn set_models(models: u64) {
    MODELS.store(models.max(1), Ordering::Relaxed);
}

/// Which of them a job is for.
pub(crate) fn model_index(number: i64) -> usize {
    usize::try_from(number.unsigned_abs() % models()).unwrap_or(0)
}

/// The name of that model.
pub(crate) fn model(number: i64) -> String {
    format!("m{:02}", model_index(number))
}

/// As good as random, and the same at each run.
pub(crate) fn tag(number: i64) -> i64 {
    (number.unsigned_abs().wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 24).cast_signed() & ((1 << 40) - 1)
}

/// A chat of [`BODY_BYTES`] bytes.
pub(crate) fn body(model: &str) -> String {
    let frame = |text: &str| format!(r#"{{"model":"{model}","messages":[{{"role":"user","content":"{text}"}}]}}"#);
    frame(&"x".repeat(BODY_BYTES - frame("").len()))
}

/// A store, and what the scheduler would keep beside it: the next number.
pub(crate) struct Ours {
    store: Store,
    clock: SystemClock,
    bodies: Vec<Bytes>,
    next: Mutex<i64>,
}

impl Ours {
    pub(crate) async fn open(dir: &Path, fsync: bool) -> anyhow::Result<Self> {
        Self::open_with(dir, StorageSettings { fsync, ..StorageSettings::default() }).await
    }

    /// A store whose ended jobs are past their retention at once.
    pub(crate) async fn open_forgetful(dir: &Path) -> anyhow::Result<Self> {
        let results_ttl = Duration::from_millis(1);
        Self::open_with(dir, StorageSettings { results_ttl, ..StorageSettings::default() }).await
    }

    async fn open_with(dir: &Path, settings: StorageSettings) -> anyhow::Result<Self> {
        let on_fatal = Arc::new(|reason: &str| eprintln!("the store: {reason}"));
        // The data dir is let go of a moment after the last handle.
        let mut tries = 0;
        let opened = loop {
            let clock = Arc::new(SystemClock::default());
            match store::open(dir, clock, settings.clone(), on_fatal.clone()).await {
                Ok(opened) => break opened,
                Err(store::StoreError::Unusable(_)) if tries < 400 => {
                    tries += 1;
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                Err(error) => return Err(error.into()),
            }
        };
        let bodies = (0..models()).map(|n| Bytes::from(body(&model(n.cast_signed())))).collect();
        let next = Mutex::new(opened.next_number);
        Ok(Self { store: opened.store, clock: SystemClock::default(), bodies, next })
    }

    fn job(&self, number: i64) -> (JobId, NewJob) {
        let id = JobId::new(self.clock.now(), number, tag(number).unsigned_abs());
        let new = NewJob {
            endpoint: "/v1/chat/completions".into(),
            model: model(number),
            tenant: "default".into(),
            batch: None,
            custom_id: None,
            face: Face::Async,
            priority: 5,
            body: self.bodies[model_index(number)].clone(),
            batch_key: 1,
            stream: false,
            present: Present::default(),
            start_deadline: None,
            deadline: None,
            timeout_ms: 600_000,
            max_attempts: 3,
            metadata: std::collections::BTreeMap::new(),
            retry_of: None,
        };
        (id, new)
    }

    /// One call; the jobs' ids. Numbers are given out in the order of the calls, as the scheduler does.
    async fn insert(&self, jobs: usize) -> anyhow::Result<Vec<JobId>> {
        let (inserted, ids) = {
            let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
            let numbers = *next..*next + i64::try_from(jobs)?;
            *next = numbers.end;
            let jobs: Vec<_> = numbers.map(|number| self.job(number)).collect();
            let ids: Vec<JobId> = jobs.iter().map(|(id, _)| *id).collect();
            (self.store.insert(jobs, false, None), ids)
        };
        inserted.await?;
        Ok(ids)
    }

    /// Adds one waiting job; its number.
    pub(crate) async fn insert_one(&self) -> anyhow::Result<i64> {
        Ok(self.insert(1).await?[0].number)
    }

    /// Adds waiting jobs, in bulk.
    pub(crate) async fn fill(&self, jobs: u64) -> anyhow::Result<Vec<JobId>> {
        let mut all = Vec::with_capacity(usize::try_from(jobs)?);
        let mut left = usize::try_from(jobs)?;
        while left > 0 {
            let calls = left.div_ceil(1_000).min(8);
            let some: Vec<usize> = (0..calls).map(|call| (left - call * 1_000).min(1_000)).collect();
            left -= some.iter().sum::<usize>();
            let ids = try_join_all(some.into_iter().map(|n| self.insert(n))).await?;
            all.extend(ids.into_iter().flatten());
        }
        Ok(all)
    }

    /// Claims and completes jobs.
    pub(crate) async fn end(&self, ids: &[JobId]) -> anyhow::Result<()> {
        let answer = answer();
        for some in ids.chunks(1_000) {
            let tokens = self.claim(some).await?;
            self.complete(&tokens, &answer).await?;
        }
        Ok(())
    }

    /// Deletes what is past its retention, as the server does, until the token is cancelled.
    pub(crate) fn keep_house(&self) -> CancellationToken {
        let stop = CancellationToken::new();
        tokio::spawn(self.store.clone().keep_house(stop.clone()));
        stop
    }

    /// Jobs whose content was deleted so far.
    pub(crate) async fn emptied(&self) -> u64 {
        self.store.metrics().await.emptied
    }

    async fn claim(&self, ids: &[JobId]) -> anyhow::Result<Vec<Token>> {
        let claimed = self.store.claim(ids.iter().map(|id| id.number).collect(), 1).await?;
        anyhow::ensure!(claimed.len() == ids.len(), "{} of {} jobs could be claimed", claimed.len(), ids.len());
        Ok(claimed.into_iter().map(|claimed| claimed.token).collect())
    }

    /// As the scheduler does it: each answer by itself, all at once.
    async fn complete(&self, tokens: &[Token], answer: &Answer) -> anyhow::Result<()> {
        let ends = tokens.iter().map(|token| async {
            let kept = self.store.keep(*token, JobKind::Chat, answer).await?;
            let change = self.store.finish(*token, End::Succeeded(kept), 0.0).await?;
            anyhow::ensure!(change.is_some(), "job {} was not this attempt's any more", token.id.number);
            Ok(())
        });
        join_all(ends).await.into_iter().collect()
    }
}

fn answer() -> Answer {
    let frame = |text: &str| format!(r#"{{"choices":[{{"message":{{"content":"{text}"}}}}]}}"#);
    let body = frame(&"y".repeat(RESULT_BYTES - frame("").len()));
    Answer { status: 200, content_type: "application/json".into(), body: Bytes::from(body), usage: None }
}

/// `callers` submit `jobs` per call, each waiting for its own answer before the next.
pub(crate) async fn enqueue(store: &Arc<Ours>, callers: usize, jobs: usize, limit: Duration) -> anyhow::Result<Run> {
    let (begun, before) = (Instant::now(), Counters::now());
    let tasks: Vec<_> = (0..callers)
        .map(|_| {
            let store = store.clone();
            tokio::spawn(async move {
                let mut calls = Vec::new();
                while begun.elapsed() < limit {
                    let call = Instant::now();
                    store.insert(jobs).await?;
                    calls.push(us(call.elapsed()));
                }
                anyhow::Ok(calls)
            })
        })
        .collect();
    let mut calls = Vec::new();
    for task in tasks {
        calls.extend(task.await??);
    }
    let (took, counters) = (begun.elapsed(), Counters::now().since(before));
    Ok(Run::new((calls.len() * jobs) as u64, took, calls, counters))
}

/// Claims [`BATCH`] at a time and completes as many at a time, one call after the other, while the number of waiting jobs
/// stays about what it was: what a round takes is put in before it.
pub(crate) async fn claim_and_complete(
    store: &Ours,
    queues: &mut Queues,
    limit: Duration,
) -> anyhow::Result<(Run, Run)> {
    let answer = answer();
    let (mut claims, mut completions) = (Vec::new(), Vec::new());
    let (mut claiming, mut completing) = (Duration::ZERO, Duration::ZERO);
    let (mut of_claims, mut of_completions) = (Counters::default(), Counters::default());
    while claiming + completing < limit * 2 {
        queues.add(store.fill((CLAIMS * BATCH) as u64).await?);
        let mut runs = Vec::new();
        let (begun, before) = (Instant::now(), Counters::now());
        for _ in 0..CLAIMS {
            let Some(ids) = queues.take_full() else { break };
            let call = Instant::now();
            runs.push(store.claim(&ids).await?);
            claims.push(us(call.elapsed()));
        }
        claiming += begun.elapsed();
        of_claims = plus(of_claims, Counters::now().since(before));
        let (begun, before) = (Instant::now(), Counters::now());
        for tokens in &runs {
            let call = Instant::now();
            store.complete(tokens, &answer).await?;
            completions.push(us(call.elapsed()));
        }
        completing += begun.elapsed();
        of_completions = plus(of_completions, Counters::now().since(before));
    }
    let jobs = (claims.len() * BATCH) as u64;
    Ok((Run::new(jobs, claiming, claims, of_claims), Run::new(jobs, completing, completions, of_completions)))
}

fn plus(a: Counters, b: Counters) -> Counters {
    Counters {
        write_bytes: a.write_bytes + b.write_bytes,
        fsyncs: a.fsyncs + b.fsyncs,
        fsync_s: a.fsync_s + b.fsync_s,
        user_s: a.user_s + b.user_s,
        kernel_s: a.kernel_s + b.kernel_s,
    }
}

/// Submissions, claims and completions at the same time, through the one writer. Counts jobs that reached their end.
pub(crate) async fn life(store: &Arc<Ours>, submitters: usize, limit: Duration) -> anyhow::Result<Run> {
    let queues = Arc::new(Mutex::new(Queues::default()));
    let room = Arc::new(Semaphore::new(IN_FLIGHT));
    let ended = Arc::new(AtomicU64::new(0));
    let failed = Arc::new(AtomicBool::new(false));
    let (begun, before) = (Instant::now(), Counters::now());
    let mut tasks = Vec::new();
    for _ in 0..submitters {
        let (store, queues, room, failed) = (store.clone(), queues.clone(), room.clone(), failed.clone());
        tasks.push(tokio::spawn(async move {
            while begun.elapsed() < limit && !failed.load(Ordering::Relaxed) {
                let Ok(Ok(permit)) = tokio::time::timeout(Duration::from_millis(50), room.acquire()).await else {
                    continue;
                };
                permit.forget();
                let ids = store.insert(1).await.inspect_err(|_| failed.store(true, Ordering::Relaxed))?;
                queues.lock().unwrap_or_else(PoisonError::into_inner).add(ids);
            }
            anyhow::Ok(())
        }));
    }
    for _ in 0..WORKERS {
        let (store, queues, room, ended, failed) =
            (store.clone(), queues.clone(), room.clone(), ended.clone(), failed.clone());
        tasks.push(tokio::spawn(async move {
            let answer = answer();
            while begun.elapsed() < limit && !failed.load(Ordering::Relaxed) {
                let taken = queues.lock().unwrap_or_else(PoisonError::into_inner).take_full();
                let Some(ids) = taken else {
                    tokio::time::sleep(Duration::from_micros(200)).await;
                    continue;
                };
                let done = async { store.complete(&store.claim(&ids).await?, &answer).await };
                done.await.inspect_err(|_| failed.store(true, Ordering::Relaxed))?;
                ended.fetch_add(ids.len() as u64, Ordering::Relaxed);
                room.add_permits(ids.len());
            }
            anyhow::Ok(())
        }));
    }
    for task in tasks {
        task.await??;
    }
    let (took, counters) = (begun.elapsed(), Counters::now().since(before));
    Ok(Run::new(ended.load(Ordering::Relaxed), took, Vec::new(), counters))
}

/// What the scheduler keeps in memory: per model, the oldest first.
pub(crate) struct Queues {
    by_model: Vec<VecDeque<JobId>>,
    turn: usize,
}

impl Default for Queues {
    fn default() -> Self {
        Self { by_model: (0..models()).map(|_| VecDeque::new()).collect(), turn: 0 }
    }
}

impl Queues {
    pub(crate) fn add(&mut self, ids: Vec<JobId>) {
        for id in ids {
            self.by_model[model_index(id.number)].push_back(id);
        }
    }

    /// [`BATCH`] jobs of one model, models by turns.
    fn take_full(&mut self) -> Option<Vec<JobId>> {
        for _ in 0..self.by_model.len() {
            self.turn = (self.turn + 1) % self.by_model.len();
            let queue = &mut self.by_model[self.turn];
            if queue.len() >= BATCH {
                return Some(queue.drain(..BATCH).collect());
            }
        }
        None
    }
}

/// Keeps every processor busy until dropped.
pub(crate) struct Burn(Arc<AtomicBool>);

impl Burn {
    pub(crate) fn start(threads: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        for _ in 0..threads {
            let stop = stop.clone();
            std::thread::spawn(move || {
                let mut n = 1_u64;
                while !stop.load(Ordering::Relaxed) {
                    for _ in 0..10_000 {
                        n = std::hint::black_box(n.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(7));
                    }
                }
            });
        }
        Self(stop)
    }
}

impl Drop for Burn {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
