//! effectum as a peer: `peer-effectum DIR SECONDS JOBS BYTES`.
//!
//! Enqueues for SECONDS by 64 and by 256 submitters, one job per call, each waiting for its own before the next; then lets
//! a worker with 32 slots process jobs that do nothing, until JOBS are done or four times SECONDS have passed.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use effectum::{Job, JobRunner, Queue, RunningJob, Worker};

const SLOTS: u16 = 32;

#[derive(Debug)]
struct Nothing;

async fn noop(_job: RunningJob, _context: Arc<Nothing>) -> Result<(), effectum::Error> {
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let mut next = |name: &str| arguments.next().ok_or(format!("{name} is missing"));
    let dir = PathBuf::from(next("DIR")?);
    let seconds: f64 = next("SECONDS")?.parse()?;
    let jobs: u64 = next("JOBS")?.parse()?;
    let bytes: usize = next("BYTES")?.parse()?;

    for submitters in [64, 256] {
        let file = dir.join(format!("enqueue-{submitters}.db"));
        let queue = Arc::new(Queue::new(&file).await?);
        enqueue(&queue, submitters, seconds, bytes).await?;
        if submitters == 64 {
            println!("{{\"what\":\"settings\",\"text\":\"{}\"}}", settings(&file)?);
        }
        queue.close(Duration::from_secs(10)).await?;
    }
    process(&dir.join("process.db"), jobs, seconds * 4.0, bytes).await
}

fn payload(bytes: usize) -> Vec<u8> {
    vec![b'x'; bytes]
}

async fn enqueue(queue: &Arc<Queue>, submitters: usize, seconds: f64, bytes: usize) -> Result<(), Box<dyn Error>> {
    let begun = Instant::now();
    let end = begun + Duration::from_secs_f64(seconds);
    let tasks: Vec<_> = (0..submitters)
        .map(|_| {
            let queue = queue.clone();
            tokio::spawn(async move {
                let mut done = 0_u64;
                while Instant::now() < end {
                    Job::builder("noop").payload(payload(bytes)).add_to(&queue).await?;
                    done += 1;
                }
                Ok::<u64, effectum::Error>(done)
            })
        })
        .collect();
    let mut done = 0;
    for task in tasks {
        done += task.await??;
    }
    report("enqueue", submitters as u64, done, begun.elapsed());
    Ok(())
}

async fn process(file: &Path, jobs: u64, seconds: f64, bytes: usize) -> Result<(), Box<dyn Error>> {
    let queue = Queue::new(file).await?;
    let mut left = jobs;
    while left > 0 {
        let some = left.min(1_000);
        let batch = (0..some).map(|_| Job::builder("noop").payload(payload(bytes)).build()).collect();
        queue.add_jobs(batch).await?;
        left -= some;
    }
    let begun = Instant::now();
    let runner = JobRunner::builder("noop", noop).build();
    let worker = Worker::builder(&queue, Arc::new(Nothing))
        .jobs([runner])
        .min_concurrency(SLOTS / 2)
        .max_concurrency(SLOTS)
        .build()
        .await?;
    while worker.counts().finished < jobs && begun.elapsed().as_secs_f64() < seconds {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    report("process", u64::from(SLOTS), worker.counts().finished, begun.elapsed());
    Ok(())
}

/// What the library's own file says; `synchronous` is a setting of its connection and taken from its source.
fn settings(file: &Path) -> Result<String, Box<dyn Error>> {
    let connection = rusqlite::Connection::open(file)?;
    let mode: String = connection.pragma_query_value(None, "journal_mode", |row| row.get(0))?;
    Ok(format!(
        "journal_mode={mode} (read from its file), synchronous=NORMAL (set in its source), SQLite {}",
        rusqlite::version()
    ))
}

fn report(what: &str, by: u64, jobs: u64, took: Duration) {
    println!("{{\"what\":\"{what}\",\"by\":{by},\"jobs\":{jobs},\"seconds\":{}}}", took.as_secs_f64());
}
