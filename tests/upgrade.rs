//! Data dirs of earlier releases open, migrate, and lose nothing, also when the migration is killed.
//!
//! `fixtures/schema-1` was made by the first release: 10 jobs in all states, killed with SIGKILL while one ran.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use futures_util::TryStreamExt as _;
use roundhouse::clock::ManualClock;
use roundhouse::domain::{JobId, JobState, StorageSettings};
use roundhouse::store::read::{JobFilter, Reader};
use roundhouse::store::{self, Body, End, Opened};

const CHILD: &str = "ROUNDHOUSE_TEST_OPENS";
/// When the fixture was made.
const NOW: i64 = 1_795_725_000_000;
const KILLS: u32 = 25;

fn fixture() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    copy(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/schema-1"), dir.path());
    dir
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let (entry, to) = (entry.unwrap(), PathBuf::from(to));
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

async fn open(dir: &Path) -> Opened {
    open_at(dir, NOW).await
}

async fn open_at(dir: &Path, now: i64) -> Opened {
    let settings = StorageSettings { free_min_bytes: 0, reserve_bytes: 0, ..StorageSettings::default() };
    let clock = Arc::new(ManualClock::at(now));
    store::open(dir, clock, settings, Arc::new(|reason| panic!("{reason}"))).await.unwrap()
}

async fn kinds(reader: &Reader, id: JobId) -> Vec<String> {
    let events = reader.events(id, 0, 100).await.unwrap();
    let seqs: Vec<i64> = events.iter().map(|event| event.seq).collect();
    assert_eq!(seqs, (1..=events.len() as i64).collect::<Vec<_>>(), "gapless");
    events.into_iter().map(|event| event.kind).collect()
}

/// All jobs by number, as the first release left them.
async fn check(opened: Opened) {
    let store = opened.store;
    let reader = store.reader();
    let filter = JobFilter { ascending: true, limit: 100, ..JobFilter::default() };
    let jobs = reader.jobs(&filter).await.unwrap().jobs;
    let states: Vec<JobState> = jobs.iter().map(|job| job.state).collect();
    use JobState::{Cancelled, Failed, Queued, Succeeded};
    // The last one ran when the server was killed: it waits again, uncharged.
    assert_eq!(states, [Succeeded, Failed, Succeeded, Queued, Queued, Cancelled, Queued, Queued, Queued, Queued]);
    assert_eq!(opened.next_number, 11);
    assert_eq!(jobs[0].id.to_string(), "job_01a21462-3e08-7000-8000-01a3dd766c1b");
    assert_eq!(jobs[0].metadata.get("team").map(String::as_str), Some("a b"));
    assert_eq!((jobs[0].priority, jobs[3].priority, jobs[9].attempt, jobs[9].crashes), (6, 2, 1, 0));
    assert!(jobs[0].load_ms > 0 && jobs[3].deadline.is_some());
    assert_eq!(jobs[1].error.as_ref().map(|error| error.code.as_str()), Some("worker_error"));
    assert_eq!(jobs[5].error.as_ref().map(|error| error.code.as_str()), Some("cancelled_by_user"));
    let batch: Vec<_> = jobs[6..9].iter().map(|job| (job.batch.map(|b| b.0), job.custom_id.as_deref())).collect();
    assert_eq!(batch, [(Some(1), Some("c0")), (Some(1), Some("c1")), (Some(1), Some("c2"))]);
    assert_eq!(kinds(reader, jobs[0].id).await, ["job.queued", "job.loading", "job.started", "job.succeeded"]);
    assert_eq!(kinds(reader, jobs[9].id).await, ["job.queued", "job.loading", "job.started", "job.retrying"]);

    let chat = reader.answer(jobs[0].id).await.unwrap().unwrap();
    assert!(String::from_utf8_lossy(&chat.body).contains("hello"), "{chat:?}");
    let image = reader.artifact_bytes(jobs[2].id, "art_0", None).await.unwrap();
    assert!(image.starts_with(b"\x89PNG"));
    let body = reader.body(jobs[4].id).await.unwrap();
    assert!(body.len() > 50_000, "an old body stays in the database, however large");

    let queued: Vec<_> = reader.queued(100).await.unwrap().try_collect().await.unwrap();
    let queued: Vec<i64> = queued.concat().iter().map(|job| job.number).collect();
    assert_eq!(queued, [4, 5, 7, 8, 9, 10]);
    let claimed = store.claim(vec![5, 10], 1).await.unwrap();
    assert!(matches!(&claimed[0].body, Body::Inline(bytes) if *bytes == body));
    assert_eq!(claimed[1].token.attempt, 2);
    let kept = store.keep(claimed[1].token, claimed[1].kind, &chat).await.unwrap();
    store.finish(claimed[1].token, End::Succeeded(kept), 0.0).await.unwrap().unwrap();
    let ended = ["job.queued", "job.loading", "job.started", "job.retrying", "job.started", "job.succeeded"];
    assert_eq!(kinds(reader, jobs[9].id).await, ended);
}

#[tokio::test]
async fn the_first_releases_data_dir_opens_with_every_job() {
    let dir = fixture();
    check(open(dir.path()).await).await;
}

#[tokio::test]
async fn what_is_older_than_the_retention_is_not_deleted_by_the_upgrade() {
    let dir = fixture();
    let days = 24 * 3_600_000_i64;
    let opened = open_at(dir.path(), NOW + 40 * days).await;
    let purged = opened.store.purge().await.unwrap();
    assert_eq!((purged.emptied, purged.deleted), (0, 0), "their time begins now");
    check(opened).await;
}

#[tokio::test]
async fn a_migration_that_is_killed_is_made_again() {
    let mut unfinished = 0;
    for kill in 0..KILLS {
        let dir = fixture();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "opens_a_data_dir", "--nocapture"])
            .env(CHILD, dir.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // From before it begins to after its end, on any machine: the child needs some ms to get there.
        tokio::time::sleep(Duration::from_millis(2 + 2 * u64::from(kill))).await;
        unfinished += u32::from(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
        check(open(dir.path()).await).await;
    }
    assert!(unfinished > 0, "no child was killed at its work");
}

/// Not a test of its own: what the child above does.
#[tokio::test]
async fn opens_a_data_dir() {
    if let Some(dir) = std::env::var_os(CHILD) {
        drop(open(Path::new(&dir)).await);
    }
}
