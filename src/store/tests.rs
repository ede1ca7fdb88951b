//! The store on real files, by its verbs alone.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;

use super::read::JobFilter;
use super::*;
use crate::clock::ManualClock;
use crate::domain::job::Present;
use crate::domain::worker::Answer;
use crate::domain::{BatchId, ErrorCode, Face, JobError, JobId, JobKind, JobState, NewJob, Token};

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
        self.store().insert(vec![(id, new_job())], false).await.unwrap();
        id
    }

    async fn claim(&self, id: JobId) -> Token {
        let claimed = self.store().claim(vec![id.number], "echo".into(), "run_1".into()).await.unwrap();
        Token { id, attempt: claimed[0].attempt }
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

async fn reopen(dir: &tempfile::TempDir, clock: &Arc<ManualClock>) -> Opened {
    // The lock is released when the last handle of the earlier store is gone, which is a moment after its drop.
    for _ in 0..200 {
        match open(dir.path(), clock.clone(), Arc::new(|reason| panic!("{reason}"))).await {
            Ok(opened) => return opened,
            Err(StoreError::Unusable(_)) => tokio::time::sleep(std::time::Duration::from_millis(5)).await,
            Err(error) => panic!("{error}"),
        }
    }
    panic!("the data dir stays locked");
}

fn new_job() -> NewJob {
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

fn answer(text: &str) -> Answer {
    Answer {
        status: 200,
        content_type: "application/json".into(),
        body: Bytes::from(text.to_owned()),
        usage: Some(serde_json::json!({"total_tokens": 3})),
    }
}

async fn succeed(store: &Store, token: Token, text: &str) -> Option<Change> {
    let kept = store.keep(token, JobKind::Chat, &answer(text)).await.unwrap();
    store.finish(token, End::Succeeded(kept)).await.unwrap()
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
    assert_eq!(bench.store().finish(token, failed).await.unwrap(), None);
    assert_eq!(bench.store().reader().answer(id).await.unwrap().unwrap().body, "\"first\"");
}

#[tokio::test]
async fn an_old_attempt_cannot_write() {
    let bench = Bench::new().await;
    let id = bench.add(1).await;
    let old = bench.claim(id).await;
    bench.store().requeue(old, 0, 1, None, None).await.unwrap().unwrap();
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
    let claimed = bench.store().claim(vec![1, 2, 3], "echo".into(), "r".into()).await.unwrap();
    assert_eq!(claimed.iter().map(|c| c.change.number).collect::<Vec<_>>(), [b.number]);
    assert_eq!(bench.kinds(a).await, ["job.queued", "job.cancelled"]);
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
    assert_eq!(bench.store().requeue(ta, 1, 0, None, None).await.unwrap(), None);
    assert!(succeed(bench.store(), ta, "\"done\"").await.is_some());
    assert!(bench.store().finish(tb, End::Cancelled).await.unwrap().is_some());
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
    assert_eq!(bench.opened.queued.iter().map(|j| j.id).collect::<Vec<_>>(), [a, c]);
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
    let job = bench.store().insert(vec![(id, new_job())], true).await.unwrap().remove(0);
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
    assert!(bench.store().insert(taken, false).await.is_err(), "number 1 is taken");
    assert!(matches!(bench.store().reader().job(JobId::new(1, 2, 1)).await, Err(StoreError::NotFound)));
    bench.store().insert(vec![(JobId::new(1, 2, 1), with_batch)], false).await.unwrap();
}

#[tokio::test]
async fn learned_costs_outlive_a_restart() {
    let bench = Bench::new().await;
    let learned = Learned { load_ms: Some(2_000.0), left_at: Some(5), ..Learned::default() };
    bench.store().learn("echo".into(), learned.clone()).await.unwrap();
    let bench = bench.restart().await;
    assert_eq!(bench.opened.learned.get("echo"), Some(&learned));
}

#[tokio::test]
async fn a_second_server_on_the_same_data_dir_is_refused() {
    let bench = Bench::new().await;
    let error = open(bench.dir.path(), bench.clock.clone(), Arc::new(|_| ())).await.err().expect("refused");
    assert!(error.to_string().contains("another roundhouse server uses"), "{error}");
}

#[tokio::test]
async fn a_thousand_submitters_share_commits() {
    let bench = Bench::new().await;
    let inserts: Vec<_> =
        (1..=1_000).map(|n| bench.store().insert(vec![(JobId::new(1, n, 1), new_job())], false)).collect();
    for insert in inserts {
        insert.await.unwrap();
    }
    let bench = bench.restart().await;
    assert_eq!(bench.opened.queued.len(), 1_000);
}
