//! apalis-sqlite as a peer: `peer-apalis DIR SECONDS JOBS BYTES`.
//!
//! Enqueues for SECONDS by 64 submitters, one job per call, each waiting for its own before the next; then lets a worker
//! process jobs that do nothing, until JOBS are done or SECONDS times three have passed.

use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use apalis_core::backend::TaskSink;
use apalis_core::error::BoxDynError;
use apalis_core::worker::builder::WorkerBuilder;
use apalis_sqlite::{SqlitePool, SqliteStorage};

const SUBMITTERS: usize = 64;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let mut next = |name: &str| arguments.next().ok_or(format!("{name} is missing"));
    let dir = PathBuf::from(next("DIR")?);
    let seconds: f64 = next("SECONDS")?.parse()?;
    let jobs: u64 = next("JOBS")?.parse()?;
    let bytes: usize = next("BYTES")?.parse()?;

    let pool = SqlitePool::connect(&format!("sqlite://{}?mode=rwc", dir.join("jobs.db").display())).await?;
    SqliteStorage::setup(&pool).await?;
    let enqueued = enqueue(&pool, seconds, bytes).await?;
    println!("{{\"what\":\"settings\",\"text\":\"{}\"}}", settings(&pool).await?);
    fill(&pool, jobs.saturating_sub(enqueued), bytes).await?;
    process(&pool, jobs, seconds * 3.0).await
}

fn payload(bytes: usize) -> String {
    // With its quotes it is that many bytes of JSON.
    "x".repeat(bytes.saturating_sub(2))
}

async fn enqueue(pool: &SqlitePool, seconds: f64, bytes: usize) -> Result<u64, Box<dyn Error>> {
    let begun = Instant::now();
    let end = begun + Duration::from_secs_f64(seconds);
    let tasks: Vec<_> = (0..SUBMITTERS)
        .map(|_| {
            let mut storage: SqliteStorage<String> = SqliteStorage::new(pool);
            tokio::spawn(async move {
                let (mut done, mut refused) = (0_u64, 0_u64);
                while Instant::now() < end {
                    match storage.push(payload(bytes)).await {
                        Ok(()) => done += 1,
                        Err(_) => refused += 1,
                    }
                }
                (done, refused)
            })
        })
        .collect();
    let (mut done, mut refused) = (0, 0);
    for task in tasks {
        let (some, not) = task.await?;
        done += some;
        refused += not;
    }
    report("enqueue", SUBMITTERS as u64, done, begun.elapsed());
    if refused > 0 {
        println!("{{\"what\":\"note\",\"text\":\"{refused} pushes were refused (database is locked)\"}}");
    }
    Ok(done)
}

async fn fill(pool: &SqlitePool, jobs: u64, bytes: usize) -> Result<(), Box<dyn Error>> {
    let mut storage: SqliteStorage<String> = SqliteStorage::new(pool);
    let mut left = jobs;
    while left > 0 {
        let some = left.min(500);
        storage.push_bulk((0..some).map(|_| payload(bytes)).collect()).await.map_err(|error| format!("{error:?}"))?;
        left -= some;
    }
    Ok(())
}

async fn process(pool: &SqlitePool, jobs: u64, seconds: f64) -> Result<(), Box<dyn Error>> {
    let done = Arc::new(AtomicU64::new(0));
    let counter = done.clone();
    let noop = move |_payload: String| {
        let counter = counter.clone();
        async move {
            counter.fetch_add(1, Ordering::Relaxed);
            Ok::<(), BoxDynError>(())
        }
    };
    let backend: SqliteStorage<String> = SqliteStorage::new(pool);
    let worker = WorkerBuilder::new("bench").backend(backend).build(noop);
    let begun = Instant::now();
    let running = tokio::spawn(worker.run());
    let limit = Duration::from_secs_f64(seconds);
    while done.load(Ordering::Relaxed) < jobs && begun.elapsed() < limit && !running.is_finished() {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    report("process", 1, done.load(Ordering::Relaxed), begun.elapsed());
    running.abort();
    Ok(())
}

/// What a connection of its pool says, each asked a few times: they are not set alike.
async fn settings(pool: &SqlitePool) -> Result<String, Box<dyn Error>> {
    let mode: String = sqlx::query_scalar("PRAGMA journal_mode").fetch_one(pool).await?;
    let mut held = Vec::new();
    let mut counts = [0; 4];
    for _ in 0..pool.size() {
        let mut connection = pool.acquire().await?;
        let level: i64 = sqlx::query_scalar("PRAGMA synchronous").fetch_one(&mut *connection).await?;
        if let Some(count) = usize::try_from(level).ok().and_then(|level| counts.get_mut(level)) {
            *count += 1;
        }
        held.push(connection);
    }
    let text: Vec<String> = ["OFF", "NORMAL", "FULL", "EXTRA"]
        .iter()
        .zip(counts)
        .filter(|(_, count)| *count > 0)
        .map(|(name, count)| format!("{name} on {count}"))
        .collect();
    Ok(format!("journal_mode={mode}, synchronous={} of {} connections (read back)", text.join(", "), held.len()))
}

fn report(what: &str, by: u64, jobs: u64, took: Duration) {
    println!("{{\"what\":\"{what}\",\"by\":{by},\"jobs\":{jobs},\"seconds\":{}}}", took.as_secs_f64());
}
