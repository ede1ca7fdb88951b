//! The store on real files, by its verbs alone.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::TryStreamExt as _;

use super::read::JobFilter;
use super::*;
use crate::clock::ManualClock;
use crate::domain::job::Present;
use crate::domain::shape::{Halving, KeptBatches, KeptShape};
use crate::domain::worker::{Answer, HostCopy};
use crate::domain::{BatchId, ErrorCode, Face, JobError, JobId, JobKind, JobState, NewJob, StorageSettings, Token};

struct Bench {
    dir: tempfile::TempDir,
    clock: Arc<ManualClock>,
    opened: Opened,
}

impl Bench {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let clock = Arc::new(ManualClock::at(1_000));
        let opened = reopen(&dir, &clock).await;
        Self { dir, clock, opened }
    }

    fn store(&self) -> &Store {
        &self.opened.store
    }

    /// As after `kill -9`: nothing is flushed by us; all that counts is what was committed.
    async fn restart(self) -> Self {
        let Self { dir, clock, opened } = self;
        drop(opened);
        let opened = reopen(&dir, &clock).await;
        Self { dir, clock, opened }
    }

    async fn add(&self, number: i64) -> JobId {
        let id = JobId::new(1_000, number, 77);
        self.store().insert(vec![(id, new_job())], false, None).await.unwrap();
        id
    }

    async fn claim(&self, id: JobId) -> Token {
        self.store().claim(vec![id.number], 1).await.unwrap()[0].token
    }

    async fn queued(&self) -> Vec<i64> {
        let pages: Vec<_> = self.store().reader().queued(300).await.unwrap().try_collect().await.unwrap();
        assert!(pages.iter().all(|page| page.len() <= 300));
        pages.concat().iter().map(|job| job.number).collect()
    }

    async fn state(&self, id: JobId) -> JobState {
        self.store().reader().job(id).await.unwrap().state
    }

    async fn kinds(&self, id: JobId) -> Vec<String> {
        let events = self.store().reader().events(id, 0, 1_000).await.unwrap();
        let seqs: Vec<i64> = events.iter().map(|e| e.seq).collect();
        assert_eq!(seqs, (1..=events.len() as i64).collect::<Vec<_>>(), "gapless");
        events.into_iter().map(|e| e.kind).collect()
    }
}

fn settings() -> StorageSettings {
    StorageSettings { free_min_bytes: 0, reserve_bytes: 0, ..StorageSettings::default() }
}

pub(super) async fn reopen(dir: &tempfile::TempDir, clock: &Arc<ManualClock>) -> Opened {
    // The lock is released when the last handle of the earlier store is gone, which is a moment after its drop.
    for _ in 0..200 {
        match open(dir.path(), clock.clone(), settings(), Arc::new(|reason| panic!("{reason}"))).await {
            Ok(opened) => return opened,
            Err(StoreError::Unusable(_)) => tokio::time::sleep(std::time::Duration::from_millis(5)).await,
            Err(error) => panic!("{error}"),
        }
    }
    panic!("the data dir stays locked");
}

pub(super) fn new_job() -> NewJob {
    NewJob {
        endpoint: "/v1/chat/completions".into(),
        model: "echo".into(),
        tenant: "default".into(),
        batch: None,
        custom_id: None,
        face: Face::Async,
        priority: 5,
        body: Bytes::from_static(b"{}"),
        batch_key: 1,
        stream: false,
        present: Present::default(),
        start_deadline: None,
        deadline: None,
        timeout_ms: 1_000,
        max_attempts: 3,
        metadata: BTreeMap::from([("team".into(), "a b".into())]),
        retry_of: None,
    }
}

pub(super) fn answer(text: &str) -> Answer {
    Answer {
        status: 200,
        content_type: "application/json".into(),
        body: Bytes::from(text.to_owned()),
        usage: Some(serde_json::json!({"total_tokens": 3})),
    }
}

async fn succeed(store: &Store, token: Token, text: &str) -> Option<Change> {
    let kept = store.keep(token, JobKind::Chat, &answer(text)).await.unwrap();
    store.finish(token, End::Succeeded(kept), 0.0).await.unwrap()
}

#[tokio::test]
async fn a_job_lives_from_queued_to_its_answer() {
    let bench = Bench::new().await;
    let id = bench.add(1).await;
    let token = bench.claim(id).await;
    bench.store().append(token, "job.progress", serde_json::json!({"step": 1})).await.unwrap().unwrap();
    assert!(succeed(bench.store(), token, "{\"ok\":true}").await.is_some());
    let job = bench.store().reader().job(id).await.unwrap();
    assert_eq!(
        (job.state, job.attempt, job.usage),
        (JobState::Succeeded, 1, Some(serde_json::json!({"total_tokens": 3})))
    );
    assert_eq!(bench.store().reader().answer(id).await.unwrap().unwrap().body, "{\"ok\":true}");
    assert_eq!(bench.kinds(id).await, ["job.queued", "job.started", "job.progress", "job.succeeded"]);
}

#[tokio::test]
async fn ids_with_another_tag_find_nothing() {
    let bench = Bench::new().await;
    let id = bench.add(1).await;
    let guessed = JobId { tag: id.tag + 1, ..id };
    assert!(matches!(bench.store().reader().job(guessed).await, Err(StoreError::NotFound)));
    assert!(matches!(
        bench.store().request_cancel(guessed, ErrorCode::CancelledByUser).await,
        Err(StoreError::NotFound)
    ));
    assert_eq!(bench.state(id).await, JobState::Queued);
}

#[tokio::test]
async fn the_first_end_wins_and_late_ones_are_dropped() {
    let bench = Bench::new().await;
    let id = bench.add(1).await;
    let token = bench.claim(id).await;
    assert!(succeed(bench.store(), token, "\"first\"").await.is_some());
    assert!(succeed(bench.store(), token, "\"second\"").await.is_none());
    let failed = End::Failed(JobError::new(ErrorCode::WorkerError, "late", true));
    assert_eq!(bench.store().finish(token, failed, 0.0).await.unwrap(), None);
    assert_eq!(bench.store().reader().answer(id).await.unwrap().unwrap().body, "\"first\"");
}

#[tokio::test]
async fn an_old_attempt_cannot_write() {
    let bench = Bench::new().await;
    let id = bench.add(1).await;
    let old = bench.claim(id).await;
    bench.store().requeue(old, GiveBack { crashes: 1, ..GiveBack::default() }).await.unwrap().unwrap();
    let new = bench.claim(id).await;
    assert_eq!(new.attempt, 2);
    assert!(succeed(bench.store(), old, "\"old\"").await.is_none());
    assert_eq!(bench.store().append(old, "job.progress", serde_json::json!({})).await.unwrap(), None);
    assert_eq!(bench.state(id).await, JobState::Running);
    assert!(succeed(bench.store(), new, "\"new\"").await.is_some());
}

#[tokio::test]
async fn only_queued_jobs_are_claimed() {
    let bench = Bench::new().await;
    let (a, b) = (bench.add(1).await, bench.add(2).await);
    bench.store().request_cancel(a, ErrorCode::CancelledByUser).await.unwrap();
    let claimed = bench.store().claim(vec![1, 2, 3], 1).await.unwrap();
    assert_eq!(claimed.iter().map(|c| c.change.number).collect::<Vec<_>>(), [b.number]);
    assert_eq!(bench.kinds(a).await, ["job.queued", "job.cancelled"]);
}

#[tokio::test]
async fn jobs_of_an_endpoint_that_is_not_served_are_found_and_not_claimed() {
    let bench = Bench::new().await;
    let (a, b) = (bench.add(1).await, bench.add(2).await);
    let (model, endpoint) = (new_job().model, new_job().endpoint);
    let unserved = async |endpoints: Vec<String>| {
        bench.store().reader().unserved(vec![(model.clone(), endpoints), ("another".into(), vec![])]).await.unwrap()
    };
    let priority = new_job().priority;
    assert_eq!(unserved(vec!["/other".into()]).await, [(model.clone(), vec![(priority, 1), (priority, 2)])]);
    assert_eq!(unserved(vec!["/other".into(), endpoint.clone()]).await, []);
    let claim = |endpoints: Vec<String>| bench.store().claim_served(vec![1, 2], 1, Some(endpoints));
    assert_eq!(claim(vec!["/other".into()]).await.unwrap(), (vec![], vec![1, 2]));
    assert_eq!(bench.kinds(a).await, ["job.queued"], "nothing has happened to it");
    let (claimed, unserved) = claim(vec![endpoint]).await.unwrap();
    assert_eq!((claimed.len(), unserved.len()), (2, 0));
    assert_eq!(bench.kinds(b).await, ["job.queued", "job.started"]);
}

#[tokio::test]
async fn cancelling_keeps_a_real_answer_and_never_goes_back_to_the_queue() {
    let bench = Bench::new().await;
    let (a, b) = (bench.add(1).await, bench.add(2).await);
    let (ta, tb) = (bench.claim(a).await, bench.claim(b).await);
    for id in [a, b] {
        let request = bench.store().request_cancel(id, ErrorCode::ClientDisconnected).await.unwrap();
        assert_eq!(request.state, JobState::Cancelling);
    }
    assert_eq!(bench.store().requeue(ta, GiveBack { failures: 1, ..GiveBack::default() }).await.unwrap(), None);
    assert!(succeed(bench.store(), ta, "\"done\"").await.is_some());
    assert!(bench.store().finish(tb, End::Cancelled, 0.0).await.unwrap().is_some());
    assert_eq!(bench.store().reader().job(b).await.unwrap().error.unwrap().code, ErrorCode::ClientDisconnected);
    let again = bench.store().request_cancel(a, ErrorCode::CancelledByUser).await.unwrap();
    assert_eq!((again.change, again.state), (None, JobState::Succeeded));
}

#[tokio::test]
async fn a_restart_gives_running_jobs_back_uncharged_and_ends_cancelled_ones() {
    let bench = Bench::new().await;
    let (a, b, c) = (bench.add(1).await, bench.add(2).await, bench.add(3).await);
    let old = bench.claim(a).await;
    bench.claim(b).await;
    bench.store().request_cancel(b, ErrorCode::CancelledByUser).await.unwrap();
    let bench = bench.restart().await;
    assert_eq!(bench.opened.recovered, 1);
    assert_eq!(bench.queued().await, [a.number, c.number]);
    assert_eq!(bench.opened.next_number, 4);
    assert_eq!(bench.state(b).await, JobState::Cancelled);
    let job = bench.store().reader().job(a).await.unwrap();
    assert_eq!((job.failures, job.crashes, job.attempt), (0, 0, 1));
    assert!(succeed(bench.store(), old, "\"late\"").await.is_none(), "a result of the last run is late");
}

#[tokio::test]
async fn the_fast_path_commits_a_job_that_runs_already() {
    let bench = Bench::new().await;
    let id = JobId::new(1_000, 9, 5);
    let job = bench.store().insert(vec![(id, new_job())], true, None).await.unwrap().jobs.remove(0);
    assert_eq!((job.state, job.attempt, job.version), (JobState::Running, 1, 2));
    let stored = bench.store().reader().job(id).await.unwrap();
    assert_eq!(
        (stored.state, stored.attempt, stored.version, stored.started_at),
        (job.state, job.attempt, job.version, job.started_at)
    );
    assert!(succeed(bench.store(), job.token(), "1").await.is_some());
}

#[tokio::test]
async fn lists_filter_and_page() {
    let bench = Bench::new().await;
    let mut ids = Vec::new();
    for number in 1..=5 {
        ids.push(bench.add(number).await);
    }
    bench.claim(ids[0]).await;
    let reader = bench.store().reader();
    let filter = JobFilter { state: Some(JobState::Queued), limit: 3, ..JobFilter::default() };
    let page = reader.jobs(&filter).await.unwrap();
    assert_eq!((page.jobs.iter().map(|j| j.id.number).collect::<Vec<_>>(), page.has_more), (vec![5, 4, 3], true));
    let page = reader.jobs(&JobFilter { after: Some(page.jobs[2].id), ..filter }).await.unwrap();
    assert_eq!((page.jobs.iter().map(|j| j.id.number).collect::<Vec<_>>(), page.has_more), (vec![2], false));
    let with = |key: &str, value: &str| JobFilter {
        metadata: vec![(key.into(), value.into())],
        limit: 10,
        ..JobFilter::default()
    };
    assert_eq!(reader.jobs(&with("team", "a b")).await.unwrap().jobs.len(), 5);
    assert_eq!(reader.jobs(&with("team", "' OR 1=1 --")).await.unwrap().jobs.len(), 0);
}

#[tokio::test]
async fn a_batch_is_all_or_nothing() {
    let bench = Bench::new().await;
    bench.add(1).await;
    let with_batch = NewJob { batch: Some(BatchId(4)), ..new_job() };
    let taken = vec![(JobId::new(1, 2, 1), with_batch.clone()), (JobId::new(1, 1, 1), with_batch.clone())];
    assert!(bench.store().insert(taken, false, None).await.is_err(), "number 1 is taken");
    assert!(matches!(bench.store().reader().job(JobId::new(1, 2, 1)).await, Err(StoreError::NotFound)));
    bench.store().insert(vec![(JobId::new(1, 2, 1), with_batch)], false, None).await.unwrap();
}

#[tokio::test]
async fn learned_costs_outlive_a_restart() {
    let bench = Bench::new().await;
    let learned = Learned {
        load_ms: Some(2_000.0),
        stop_ms: Some(1.0),
        service_ms: Some(2.0),
        each_ms: Some(3.0),
        left_at: Some(5),
        wake_ms: Some(200.0),
        reload_ms: Some(900.0),
        gap_ms: Some(4.0),
        waiting_at_load: Some(7.0),
        device_bytes: Some(20 << 30),
        entry: Some(-6),
        host: HostCopy {
            bytes: Some(12 << 30),
            can_park: Some(false),
            note: Some("no sleep mode".into()),
            ..HostCopy::default()
        },
        copies_at_load: Some(true),
        keeps_bytes: Some(2 << 30),
        batches: KeptBatches {
            device_bytes: Some(80 << 30),
            shapes: vec![KeptShape {
                key: i64::MIN,
                words: "size 1024x1024".into(),
                level: Some(2),
                cap: Some(7),
                rates: vec![(0, 1.5), (2, 1.1 / 3.0)],
                halvings: vec![Halving { most: 7, level: None, jobs: vec![3, 4], own_fault: true }],
            }],
        },
    };
    bench.store().learn("echo".into(), learned.clone()).await.unwrap();
    let bench = bench.restart().await;
    assert_eq!(bench.opened.learned.get("echo"), Some(&learned));
}

#[tokio::test]
async fn what_tenants_were_served_outlives_a_restart() {
    let bench = Bench::new().await;
    let job = new_job();
    let tenant = job.tenant.clone();
    bench.store().insert(vec![(JobId::new(1, 1, 1), job)], false, None).await.unwrap();
    bench.store().keep_served(vec![(tenant.clone(), 1_234.5), ("nobody".to_owned(), 9.0)]).await.unwrap();
    let bench = bench.restart().await;
    assert_eq!(bench.opened.served.into_iter().collect::<Vec<_>>(), [(tenant, 1_234.5)]);
}

#[tokio::test]
async fn a_second_server_on_the_same_data_dir_is_refused() {
    let bench = Bench::new().await;
    let error = open(bench.dir.path(), bench.clock.clone(), settings(), Arc::new(|_| ())).await.err().expect("refused");
    assert!(error.to_string().contains("another roundhouse server uses"), "{error}");
}

#[tokio::test]
async fn a_thousand_submitters_share_commits() {
    let bench = Bench::new().await;
    let inserts: Vec<_> =
        (1..=1_000).map(|n| bench.store().insert(vec![(JobId::new(1, n, 1), new_job())], false, None)).collect();
    for insert in inserts {
        insert.await.unwrap();
    }
    let bench = bench.restart().await;
    assert_eq!(bench.queued().await.len(), 1_000);
}

#[tokio::test]
async fn what_the_row_tells_is_written_down_before_the_row_tells_something_else() {
    let bench = Bench::new().await;
    let id = bench.add(1).await;
    let first = bench.claim(id).await;
    let error = JobError::new(ErrorCode::WorkerError, "once", true);
    let back = GiveBack { failures: 1, error: Some(error), not_before: Some(9_000), ..GiveBack::default() };
    bench.store().requeue(first, back).await.unwrap().unwrap();
    let waiting = bench.store().reader().job(id).await.unwrap();
    assert_eq!((waiting.state_reason.map(|r| r.as_str()), waiting.failures), (Some("retry_backoff"), 1));
    let second = bench.claim(id).await;
    assert!(succeed(bench.store(), second, "1").await.is_some());
    assert_eq!(bench.kinds(id).await, ["job.queued", "job.started", "job.retrying", "job.started", "job.succeeded"]);
    let events = bench.store().reader().events(id, 0, 10).await.unwrap();
    assert_eq!(events[1].body, serde_json::json!({"attempt": 1, "worker": "echo", "run": "run_1"}));
    assert_eq!(events[2].body["discard_output_before_seq"], 3);
    assert_eq!(events[3].body["attempt"], 2);
    let page = bench.store().reader().events(id, 1, 2).await.unwrap();
    assert_eq!(page.iter().map(|e| e.seq).collect::<Vec<_>>(), [2, 3]);
}

#[tokio::test]
async fn large_bodies_and_answers_are_files_and_come_back_whole() {
    let bench = Bench::new().await;
    let id = JobId::new(1_000, 1, 77);
    let body = Bytes::from(format!("{{\"prompt\":\"{}\"}}", "x".repeat(40_000)));
    let job = NewJob { body: body.clone(), ..new_job() };
    bench.store().insert(vec![(id, job)], false, None).await.unwrap();
    let claimed = bench.store().claim(vec![1], 1).await.unwrap().remove(0);
    assert!(matches!(claimed.body, Body::File(_)), "{:?}", claimed.body);
    assert_eq!(bench.store().reader().load(&claimed.body).await.unwrap(), body);
    let text = format!("\"{}\"", "y".repeat(1_000_000));
    assert!(succeed(bench.store(), claimed.token, &text).await.is_some());
    let bench = bench.restart().await;
    assert_eq!(bench.store().reader().answer(id).await.unwrap().unwrap().body, text);
    assert_eq!(bench.store().reader().body(id).await.unwrap(), body);
    assert_eq!(bench.store().reader().artifacts(id).await.unwrap(), []);
    assert!(bench.store().metrics().await.stored_bytes > 1_040_000);
}

#[tokio::test]
async fn an_answer_that_came_too_late_leaves_no_files() {
    let bench = Bench::new().await;
    let id = bench.add(1).await;
    let token = bench.claim(id).await;
    let large = format!("\"{}\"", "y".repeat(100_000));
    assert!(succeed(bench.store(), token, "1").await.is_some());
    assert!(succeed(bench.store(), token, &large).await.is_none());
    let left = walk(&bench.dir.path().join("artifacts"));
    assert_eq!(left, Vec::<std::path::PathBuf>::new());
    assert_eq!(bench.store().metrics().await.stale_writes, 1);
}

#[tokio::test]
async fn a_second_answer_of_the_same_attempt_leaves_the_file_of_the_first_alone() {
    let bench = Bench::new().await;
    let id = bench.add(1).await;
    let token = bench.claim(id).await;
    let large = |letter: &str| format!("\"{}\"", letter.repeat(100_000));
    assert!(succeed(bench.store(), token, &large("y")).await.is_some());
    assert!(succeed(bench.store(), token, &large("z")).await.is_none());
    assert_eq!(bench.store().reader().answer(id).await.unwrap().unwrap().body, large("y"));
    assert_eq!(walk(&bench.dir.path().join("artifacts")).len(), 1);
}

#[tokio::test]
async fn a_late_answer_of_a_killed_attempt_changes_nothing_after_a_newer_one_has_finished() {
    let bench = Bench::new().await;
    let id = bench.add(1).await;
    let killed = bench.claim(id).await;
    let bench = bench.restart().await;
    let newer = bench.claim(id).await;
    assert_eq!(newer.attempt, 2);
    assert!(succeed(bench.store(), newer, "\"new\"").await.is_some());
    let (before, kinds) = (bench.store().reader().job(id).await.unwrap(), bench.kinds(id).await);
    let late = format!("\"{}\"", "late".repeat(100_000));
    assert!(succeed(bench.store(), killed, &late).await.is_none());
    assert_eq!(bench.store().append(killed, "job.progress", serde_json::json!({})).await.unwrap(), None);
    assert_eq!(bench.store().requeue(killed, GiveBack { crashes: 1, ..GiveBack::default() }).await.unwrap(), None);
    let bench = bench.restart().await;
    let after = bench.store().reader().job(id).await.unwrap();
    assert_eq!((after.state, after.version, after.attempt), (before.state, before.version, before.attempt));
    assert_eq!(bench.kinds(id).await, kinds);
    assert_eq!(bench.store().reader().answer(id).await.unwrap().unwrap().body, "\"new\"");
    assert_eq!(walk(&bench.dir.path().join("artifacts")), Vec::<std::path::PathBuf>::new());
}

/// A worker dies at each stage of a run; each of its 32 jobs ends once, and as its stage says.
#[tokio::test]
async fn a_death_at_any_stage_leaves_every_job_of_a_run_whole() {
    let mut bench = Bench::new().await;
    let mut ids = Vec::new();
    for number in 1..=32 {
        ids.push(bench.add(number).await);
    }
    let numbers: Vec<i64> = ids.iter().map(|id| id.number).collect();
    // Before the claim is committed: nobody has been told, and the claim stands or it does not.
    let mut claim = Box::pin(bench.store().claim(numbers.clone(), 1));
    assert!(futures_util::poll!(&mut claim).is_pending());
    drop(claim);
    bench = bench.restart().await;
    // After the commit and before the jobs are sent.
    assert_eq!(bench.queued().await, numbers);
    let sent = bench.store().claim(numbers.clone(), 2).await.unwrap();
    bench = bench.restart().await;
    // In the middle of the run: a third has been answered, a third is known to have been lost.
    assert_eq!(bench.queued().await, numbers);
    let running = bench.store().claim(numbers.clone(), 3).await.unwrap();
    for claim in &running[..11] {
        assert!(succeed(bench.store(), claim.token, "\"early\"").await.is_some());
    }
    for claim in &running[11..22] {
        let back = GiveBack { crashes: 1, crash: Some(7), ..GiveBack::default() };
        assert!(bench.store().requeue(claim.token, back).await.unwrap().is_some());
    }
    bench = bench.restart().await;
    assert_eq!(bench.queued().await, numbers[11..]);
    // After the results and before they are committed: kept files, no row that names them.
    let last = bench.store().claim(numbers[11..].to_vec(), 4).await.unwrap();
    for claim in &last[..10] {
        let large = format!("\"{}\"", "y".repeat(100_000));
        bench.store().keep(claim.token, JobKind::Chat, &answer(&large)).await.unwrap();
    }
    bench = bench.restart().await;
    let again = bench.store().claim(numbers[11..].to_vec(), 5).await.unwrap();
    assert_eq!(again.len(), 21);
    for (claim, number) in again.iter().zip(12..) {
        let (crashes, crash) = if number <= 22 { (1, Some(7)) } else { (0, None) };
        assert_eq!((claim.failures, claim.crashes, claim.crash), (0, crashes, crash), "{number}");
        assert!(succeed(bench.store(), claim.token, "\"late\"").await.is_some());
    }
    for old in sent.iter().chain(&running).chain(&last) {
        assert!(succeed(bench.store(), old.token, "\"stale\"").await.is_none());
    }
    bench = bench.restart().await;
    for id in &ids {
        let text = if id.number <= 11 { "\"early\"" } else { "\"late\"" };
        assert_eq!(bench.store().reader().answer(*id).await.unwrap().unwrap().body, text);
        let kinds = bench.kinds(*id).await;
        let ends = kinds.iter().filter(|kind| *kind == "job.succeeded").count();
        assert_eq!((ends, kinds.last().map(String::as_str)), (1, Some("job.succeeded")), "{kinds:?}");
    }
    assert!(bench.queued().await.is_empty());
}

/// Pauses are kept as times of the wall clock. Whatever it does between two runs, jobs that wait keep waiting, one by one,
/// and running ones are given back once.
#[tokio::test]
async fn a_wall_clock_that_jumps_between_two_runs_rescues_nobody() {
    for jump in [-3_600_000, 86_400_000] {
        let bench = Bench::new().await;
        bench.clock.advance(10_000_000);
        let (pausing, waiting, running) = (bench.add(1).await, bench.add(2).await, bench.add(3).await);
        let token = bench.claim(pausing).await;
        let back = GiveBack { failures: 1, not_before: Some(10_002_000), ..GiveBack::default() };
        bench.store().requeue(token, back).await.unwrap().unwrap();
        bench.claim(running).await;
        bench.clock.advance(jump);
        assert_eq!(bench.state(running).await, JobState::Running, "nobody takes a job from a worker by the clock");
        let bench = bench.restart().await;
        assert_eq!(bench.opened.recovered, 1, "only what ran");
        assert_eq!(bench.queued().await, [pausing.number, waiting.number, running.number]);
        let job = bench.store().reader().job(pausing).await.unwrap();
        assert_eq!((job.not_before, job.failures, job.attempt), (Some(10_002_000), 1, 1));
        assert_eq!(bench.store().reader().job(running).await.unwrap().failures, 0);
    }
}

fn walk(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
}

#[tokio::test]
async fn the_same_key_makes_one_job_and_another_body_is_a_conflict() {
    let bench = Bench::new().await;
    let key = IdempotencyKey { key: [1; 16], request: [2; 16] };
    let insert = |n: i64, key| bench.store().insert(vec![(JobId::new(1, n, 9), new_job())], false, Some(key));
    // At the same time: some of them in one commit.
    let all: Vec<_> = (1..=50).map(|n| insert(n, key)).collect();
    for (n, one) in all.into_iter().enumerate() {
        let inserted = one.await.unwrap();
        assert_eq!((inserted.jobs[0].id.number, inserted.replayed), (1, n > 0));
    }
    let other = IdempotencyKey { request: [3; 16], ..key };
    assert!(matches!(insert(60, other).await, Err(StoreError::KeyReused)));
    let bench = bench.restart().await;
    let insert = |n: i64, key| bench.store().insert(vec![(JobId::new(1, n, 9), new_job())], false, Some(key));
    for n in 100..150 {
        assert!(insert(n, key).await.unwrap().replayed);
    }
    assert!(matches!(insert(160, other).await, Err(StoreError::KeyReused)));
    assert_eq!(bench.queued().await, [1]);
    bench.clock.advance(idempotency::KEY_TTL_MS);
    assert!(!insert(200, key).await.unwrap().replayed, "a day later it is a new job");
}

#[tokio::test]
async fn polls_of_a_live_job_come_from_memory_and_see_every_change() {
    let bench = Bench::new().await;
    let id = bench.add(1).await;
    assert_eq!(bench.state(id).await, JobState::Queued);
    assert_eq!(bench.state(id).await, JobState::Queued);
    let token = bench.claim(id).await;
    assert_eq!(bench.state(id).await, JobState::Running);
    bench.store().requeue(token, GiveBack::default()).await.unwrap();
    assert_eq!(bench.state(id).await, JobState::Queued);
    let guessed = JobId { tag: id.tag + 1, ..id };
    assert!(matches!(bench.store().reader().job(guessed).await, Err(StoreError::NotFound)));
    bench.store().request_cancel(id, ErrorCode::CancelledByUser).await.unwrap();
    assert_eq!(bench.state(id).await, JobState::Cancelled);
}

#[tokio::test]
async fn below_the_watermark_new_jobs_are_refused_and_answers_still_land() {
    let bench = Bench::new().await;
    let id = bench.add(1).await;
    let Bench { dir, clock, opened } = bench;
    drop(opened);
    let full = StorageSettings { free_min_bytes: u64::MAX / 2, ..settings() };
    let mut opened = None;
    while opened.is_none() {
        opened = open(dir.path(), clock.clone(), full.clone(), Arc::new(|reason| panic!("{reason}"))).await.ok();
    }
    let bench = Bench { dir, clock, opened: opened.unwrap() };
    let refused = bench.store().insert(vec![(JobId::new(1, 2, 1), new_job())], false, None).await;
    assert!(matches!(&refused, Err(StoreError::DiskFull(text)) if text.contains("make room")), "{refused:?}");
    let token = bench.claim(id).await;
    assert!(succeed(bench.store(), token, "1").await.is_some());
    assert!(matches!(bench.store().reader().job(JobId::new(1, 2, 1)).await, Err(StoreError::NotFound)));
}

#[tokio::test]
async fn one_connection_for_all_works_too() {
    let dir = tempfile::tempdir().unwrap();
    let clock = Arc::new(ManualClock::at(1_000));
    let alone = StorageSettings { exclusive: true, ..settings() };
    let opened = open(dir.path(), clock.clone(), alone, Arc::new(|reason| panic!("{reason}"))).await.unwrap();
    let bench = Bench { dir, clock, opened };
    let id = bench.add(1).await;
    let token = bench.claim(id).await;
    assert!(succeed(bench.store(), token, "1").await.is_some());
    assert_eq!(bench.kinds(id).await.len(), 3);
    let names: Vec<String> = std::fs::read_dir(bench.dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    assert!(!names.iter().any(|name| name.ends_with("-shm")), "no shared memory: {names:?}");
}

#[tokio::test]
async fn a_stop_is_told_from_a_crash_and_runs_are_counted() {
    let bench = Bench::new().await;
    assert_eq!((bench.opened.epoch, bench.opened.was_clean), (1, false), "the first run follows none");
    assert_eq!(bench.opened.last_start, None);
    bench.store().note_start().await.unwrap();
    bench.clock.advance(4_000);
    let bench = bench.restart().await;
    assert_eq!((bench.opened.epoch, bench.opened.was_clean, bench.opened.last_start), (2, true, Some(1_000)));
    let bench = bench.restart().await;
    assert_eq!(bench.opened.last_start, Some(1_000), "the second did not get as far");
    bench.store().note_start().await.unwrap();
    let bench = bench.restart().await;
    assert_eq!(bench.opened.last_start, Some(5_000));
}

#[tokio::test]
async fn a_start_that_fails_after_a_crash_leaves_the_crash_to_the_next_one() {
    let bench = Bench::new().await;
    bench.store().note_start().await.unwrap();
    let bench = bench.restart().await;
    assert!(bench.opened.was_clean);
    // As if this run had been killed: what it writes at its end is undone.
    let Bench { dir, clock, opened } = bench;
    drop(opened);
    while super::open::lock(dir.path()).is_err() {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    let database = rusqlite::Connection::open(dir.path().join("roundhouse.db")).unwrap();
    database.execute("DELETE FROM meta WHERE key = 'clean'", []).unwrap();
    drop(database);
    let bench = Bench { opened: reopen(&dir, &clock).await, dir, clock };
    assert!(!bench.opened.was_clean);
    let bench = bench.restart().await;
    assert!(!bench.opened.was_clean, "this start failed before it had cleaned up");
    bench.store().note_start().await.unwrap();
    assert!(bench.restart().await.opened.was_clean);
}

#[tokio::test]
async fn a_restore_that_did_not_end_is_no_empty_data_dir() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("roundhouse.db.restoring"), "half").unwrap();
    let clock = Arc::new(ManualClock::at(1_000));
    let error = open(dir.path(), clock, settings(), Arc::new(|_| ())).await.err().expect("refused").to_string();
    assert!(error.contains("did not end") && error.contains("roundhouse restore"), "{error}");
}
