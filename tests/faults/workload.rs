//! What a process does to a store while somebody watches: all verbs, by several hands at once, each promised on stdout.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use roundhouse::domain::{JobId, JobState, Token};
use roundhouse::store::StoreError;

use super::engine::{self, Engine, LARGE, SMALL};
use super::ledger::{self, Step};

/// How the process keeps its word.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Manners {
    /// Promises what is done.
    Honest,
    /// Promises before the store has answered: what the tests must find out.
    Early,
}

/// Hands that work at the same time, each on jobs of its own.
const HANDS: usize = 3;

struct Counters {
    number: AtomicI64,
    verb: AtomicU64,
}

#[derive(Clone)]
struct Hand {
    engine: Engine,
    counters: Arc<Counters>,
    manners: Manners,
}

/// Opens the store in `dir` and has `rounds` rounds of all verbs done to it. An error ends it, after a line that tells it.
pub(crate) async fn run(dir: &Path, rounds: usize, fsync: bool, manners: Manners) -> Result<(), StoreError> {
    let on_fatal = Arc::new(|reason: &str| {
        eprintln!("fatal: {reason}");
        std::process::abort();
    });
    let engine = Engine::open(dir, fsync, on_fatal).await?;
    let counters = Arc::new(Counters { number: AtomicI64::new(engine.next_number()), verb: AtomicU64::new(1) });
    let hand = Hand { engine, counters, manners };
    let mut hands = tokio::task::JoinSet::new();
    for _ in 0..HANDS {
        let hand = hand.clone();
        hands.spawn(async move {
            for round in 0..rounds {
                hand.round(round).await?;
            }
            Ok::<(), StoreError>(())
        });
    }
    while let Some(done) = hands.join_next().await {
        done.unwrap()?;
    }
    ledger::end();
    Ok(())
}

impl Hand {
    /// Eight jobs, each with another fate.
    async fn round(&self, round: usize) -> Result<(), StoreError> {
        let size = if round % 4 == 3 { LARGE } else { SMALL };
        let first = self.counters.number.fetch_add(8, Ordering::Relaxed);
        let mut jobs: Vec<Step> = (first..first + 8).map(|number| queued(number, size)).collect();
        self.promise(jobs.clone(), self.engine.insert(&pairs(&jobs))).await?;
        // The first stays queued; the second is cancelled as it waits.
        self.move_on(
            &mut jobs[1],
            |step| step.state = JobState::Cancelled,
            |engine, id, _| async move { engine.cancel(id).await },
        )
        .await?;
        let running: Vec<JobId> = jobs[2..].iter().map(|step| engine::id(step.number)).collect();
        for step in &mut jobs[2..] {
            step.attempt += 1;
        }
        self.promise(jobs[2..].to_vec(), async { self.engine.claim(&running).await.map(drop) }).await?;
        // The third stays on its worker.
        let large = if round.is_multiple_of(2) { LARGE } else { SMALL };
        self.succeed(&mut jobs[3], SMALL, false).await?;
        self.succeed(&mut jobs[4], large, false).await?;
        self.succeed(&mut jobs[5], large, true).await?;
        self.move_on(
            &mut jobs[6],
            |step| step.failures = 1,
            |engine, _, token| async move { engine.requeue(token, 1).await },
        )
        .await?;
        self.move_on(
            &mut jobs[6],
            |step| step.attempt = 2,
            |engine, id, _| async move { engine.claim(&[id]).await.map(drop) },
        )
        .await?;
        let failed = |step: &mut Step| step.state = JobState::Failed;
        self.move_on(&mut jobs[6], failed, |engine, _, token| async move { engine.fail(token).await }).await?;
        // What was being cancelled when the power went is cancelled.
        let cancelled = |step: &mut Step| step.state = JobState::Cancelled;
        self.move_on(&mut jobs[7], cancelled, |engine, id, _| async move { engine.cancel(id).await }).await?;
        self.move_on(&mut jobs[7], cancelled, |engine, _, token| async move { engine.finish_cancelled(token).await })
            .await
    }

    async fn succeed(&self, job: &mut Step, size: usize, is_audio: bool) -> Result<(), StoreError> {
        let change = |step: &mut Step| {
            step.state = JobState::Succeeded;
            step.answer = Some(size);
        };
        self.move_on(job, change, |engine, _, token| async move { engine.succeed(token, size, is_audio).await }).await
    }

    async fn move_on<F>(
        &self,
        job: &mut Step,
        change: impl FnOnce(&mut Step),
        verb: impl FnOnce(Engine, JobId, Token) -> F,
    ) -> Result<(), StoreError>
    where
        F: Future<Output = Result<(), StoreError>>,
    {
        let id = engine::id(job.number);
        let token = Token { id, attempt: job.attempt };
        change(job);
        self.promise(vec![job.clone()], verb(self.engine.clone(), id, token)).await
    }

    async fn promise(
        &self,
        steps: Vec<Step>,
        verb: impl Future<Output = Result<(), StoreError>>,
    ) -> Result<(), StoreError> {
        let number = self.counters.verb.fetch_add(1, Ordering::Relaxed);
        ledger::will(number, steps);
        if self.manners == Manners::Early {
            ledger::did(number);
        }
        verb.await?;
        ledger::did(number);
        Ok(())
    }
}

fn queued(number: i64, body: usize) -> Step {
    Step { number, state: JobState::Queued, attempt: 0, failures: 0, body, answer: None }
}

fn pairs(steps: &[Step]) -> Vec<(JobId, usize)> {
    steps.iter().map(|step| (engine::id(step.number), step.body)).collect()
}
