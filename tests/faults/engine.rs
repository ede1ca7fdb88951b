//! The store as these tests drive it: few verbs, jobs whose bodies and answers follow from their numbers.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use roundhouse::clock::SystemClock;
use roundhouse::domain::job::Present;
use roundhouse::domain::worker::Answer;
use roundhouse::domain::{ErrorCode, Face, JobError, JobId, JobKind, JobState, NewJob, StorageSettings, Token};
use roundhouse::store::read::JobFilter;
use roundhouse::store::{self, End, GiveBack, OnFatal, Store, StoreError};

/// Answers beyond this are files where the store says so; one size below and one above it.
pub(crate) const SMALL: usize = 200;
pub(crate) const LARGE: usize = 40_000;

/// An open store.
#[derive(Clone)]
pub(crate) struct Engine {
    pub(crate) store: Store,
    next_number: i64,
}

impl Engine {
    pub(crate) async fn open(dir: &Path, fsync: bool, on_fatal: OnFatal) -> Result<Self, StoreError> {
        let settings = StorageSettings {
            fsync,
            free_min_bytes: 0,
            reserve_bytes: 0,
            // So that the log is copied into the database in the middle of the work.
            wal_pages: 60,
            ..StorageSettings::default()
        };
        let opened = store::open(dir, Arc::new(SystemClock::default()), settings, on_fatal).await?;
        Ok(Self { store: opened.store, next_number: opened.next_number })
    }

    /// The first number that is free.
    pub(crate) fn next_number(&self) -> i64 {
        self.next_number
    }

    pub(crate) async fn insert(&self, jobs: &[(JobId, usize)]) -> Result<(), StoreError> {
        let jobs = jobs.iter().map(|(id, size)| (*id, new_job(body(id.number, *size)))).collect();
        self.store.insert(jobs, false, None).await.map(drop)
    }

    pub(crate) async fn claim(&self, ids: &[JobId]) -> Result<Vec<Token>, StoreError> {
        let numbers = ids.iter().map(|id| id.number).collect();
        Ok(self.store.claim(numbers, 1).await?.into_iter().map(|claim| claim.token).collect())
    }

    /// Ends a job with an answer: JSON, or with `is_audio` a file.
    pub(crate) async fn succeed(&self, token: Token, size: usize, is_audio: bool) -> Result<(), StoreError> {
        let content_type = if is_audio { "audio/wav" } else { "application/json" };
        let answer = Answer {
            status: 200,
            content_type: content_type.into(),
            body: answer(token.id.number, token.attempt, size),
            usage: None,
        };
        let kept = self.store.keep(token, JobKind::Chat, &answer).await?;
        self.must_change(self.store.finish(token, End::Succeeded(kept), 0.0).await?.is_some(), token)
    }

    pub(crate) async fn fail(&self, token: Token) -> Result<(), StoreError> {
        let error = JobError::new(ErrorCode::WorkerError, "on purpose", false);
        self.must_change(self.store.finish(token, End::Failed(error), 0.0).await?.is_some(), token)
    }

    pub(crate) async fn requeue(&self, token: Token, failures: u32) -> Result<(), StoreError> {
        self.must_change(
            self.store.requeue(token, GiveBack { failures, ..GiveBack::default() }).await?.is_some(),
            token,
        )
    }

    pub(crate) async fn cancel(&self, id: JobId) -> Result<(), StoreError> {
        self.store.request_cancel(id, ErrorCode::CancelledByUser).await.map(drop)
    }

    pub(crate) async fn finish_cancelled(&self, token: Token) -> Result<(), StoreError> {
        self.must_change(self.store.finish(token, End::Cancelled, 0.0).await?.is_some(), token)
    }

    /// A verb that changed nothing: the workload has only one hand on each job.
    fn must_change(&self, changed: bool, token: Token) -> Result<(), StoreError> {
        if changed { Ok(()) } else { Err(StoreError::Database(format!("{token} was not changed"))) }
    }

    /// What the store says about a job, whole. `None`: it does not know it.
    pub(crate) async fn look(&self, id: JobId) -> Result<Option<Seen>, StoreError> {
        let reader = self.store.reader();
        let job = match reader.job(id).await {
            Ok(job) => job,
            Err(StoreError::NotFound) => return Ok(None),
            Err(error) => return Err(error),
        };
        let events = reader.events(id, 0, 10_000).await?;
        let seqs: Vec<i64> = events.iter().map(|event| event.seq).collect();
        Ok(Some(Seen {
            state: job.state,
            attempt: job.attempt,
            failures: job.failures,
            body: reader.body(id).await?,
            answer: reader.answer(id).await?.map(|answer| answer.body),
            has_gaps: seqs != (1..=seqs.len() as i64).collect::<Vec<_>>(),
            last_event: events.last().map(|event| event.kind.clone()).unwrap_or_default(),
        }))
    }

    /// Every job there is.
    pub(crate) async fn ids(&self) -> Result<Vec<JobId>, StoreError> {
        let mut ids = Vec::new();
        loop {
            let filter = JobFilter { after: ids.last().copied(), ascending: true, limit: 100, ..JobFilter::default() };
            let page = self.store.reader().jobs(&filter).await?;
            ids.extend(page.jobs.iter().map(|job| job.id));
            if !page.has_more {
                return Ok(ids);
            }
        }
    }
}

/// A job as read back.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) state: JobState,
    pub(crate) attempt: i64,
    pub(crate) failures: u32,
    pub(crate) body: Bytes,
    pub(crate) answer: Option<Bytes>,
    pub(crate) has_gaps: bool,
    pub(crate) last_event: String,
}

/// The id of a job of these tests; its tag follows from its number.
pub(crate) fn id(number: i64) -> JobId {
    JobId::new(1_790_000_000_000 + number, number, number.unsigned_abs().wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 24)
}

/// The body of a job, about `size` bytes.
pub(crate) fn body(number: i64, size: usize) -> Bytes {
    json_text("prompt", number, 0, size)
}

/// The answer of an attempt.
pub(crate) fn answer(number: i64, attempt: i64, size: usize) -> Bytes {
    json_text("answer", number, attempt, size)
}

fn json_text(what: &str, number: i64, attempt: i64, size: usize) -> Bytes {
    let word = format!("{what} {number}.{attempt} ");
    Bytes::from(serde_json::json!({"model": "echo", what: word.repeat(size / word.len() + 1)}).to_string())
}

fn new_job(body: Bytes) -> NewJob {
    NewJob {
        endpoint: "/v1/chat/completions".into(),
        model: "echo".into(),
        tenant: "default".into(),
        batch: None,
        custom_id: None,
        face: Face::Async,
        priority: 5,
        body,
        batch_key: 1,
        stream: false,
        present: Present::default(),
        start_deadline: None,
        deadline: None,
        timeout_ms: 60_000,
        max_attempts: 3,
        metadata: BTreeMap::new(),
        retry_of: None,
    }
}
