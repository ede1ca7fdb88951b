//! What can be done to jobs. Each verb is one operation of the writer; its answer says what was committed.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use rusqlite::{Connection, OptionalExtension, Row, params};
use serde_json::{Value, json};

use super::StoreError;
use super::artifacts::{Artifacts, StoredAnswer};
use super::read::Reader;
use super::writer::{Writer, answer};
use crate::clock::Clock;
use crate::domain::worker::Answer;
use crate::domain::{
    BatchId, ErrorCode, Face, Job, JobError, JobId, JobKind, JobState, Millis, NewJob, StateReason, Token,
};

/// The durable queue. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    writer: Writer,
    reader: Reader,
    artifacts: Artifacts,
    clock: Arc<dyn Clock>,
    next_batch: Arc<AtomicI64>,
    _lock: Arc<File>,
}

/// A committed change of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// Whose.
    pub number: i64,
    /// State afterwards.
    pub state: JobState,
    /// Version afterwards.
    pub version: i64,
    /// Number of the event that tells it.
    pub seq: i64,
}

/// A job that is now this attempt's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claimed {
    /// The claim as a change.
    pub change: Change,
    /// The attempt that fences its writes.
    pub attempt: i64,
}

/// How a job ends.
#[derive(Clone, Debug, PartialEq)]
pub enum End {
    /// With an answer whose files are stored.
    Succeeded(StoredAnswer),
    /// With an error.
    Failed(JobError),
    /// As asked; the error says by whom.
    Cancelled,
    /// Too late.
    Expired(JobError),
}

impl End {
    fn state(&self) -> JobState {
        match self {
            Self::Succeeded(_) => JobState::Succeeded,
            Self::Failed(_) => JobState::Failed,
            Self::Cancelled => JobState::Cancelled,
            Self::Expired(_) => JobState::Expired,
        }
    }
}

/// What the scheduler keeps of a queued job in memory.
#[derive(Clone, Debug, PartialEq)]
pub struct QueuedJob {
    /// Public id.
    pub id: JobId,
    /// See [`JobKind`].
    pub kind: JobKind,
    /// Entry name.
    pub model: Arc<str>,
    /// API key's name.
    pub tenant: Arc<str>,
    /// Whether a caller holds the line.
    pub face: Face,
    /// 0 to 9.
    pub priority: u8,
    /// Claims so far.
    pub attempt: i64,
    /// Retriable errors so far.
    pub failures: u32,
    /// Crashes so far.
    pub crashes: u32,
    /// Budget of `failures`.
    pub max_attempts: u32,
    /// Jobs with equal keys may share a run.
    pub batch_key: i64,
    /// Whether the body asks for a stream.
    pub stream: bool,
    /// When it was accepted.
    pub created_at: Millis,
    /// Not to be claimed before.
    pub not_before: Option<Millis>,
    /// To be started before.
    pub start_deadline: Option<Millis>,
    /// To be finished before.
    pub deadline: Option<Millis>,
    /// Longest time of one attempt, in ms.
    pub timeout_ms: i64,
}

impl QueuedJob {
    /// The part of a stored job that scheduling needs.
    pub fn of(job: &Job, model: Arc<str>, tenant: Arc<str>) -> Self {
        Self {
            id: job.id,
            kind: job.kind,
            model,
            tenant,
            face: job.face,
            priority: job.priority,
            attempt: job.attempt,
            failures: job.failures,
            crashes: job.crashes,
            max_attempts: job.max_attempts,
            batch_key: job.batch_key,
            stream: job.stream,
            created_at: job.created_at,
            not_before: job.not_before,
            start_deadline: job.start_deadline,
            deadline: job.deadline,
            timeout_ms: job.timeout_ms,
        }
    }
}

/// What was learned about a model; durable so that a restart plans as well as before.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Learned {
    /// Cold load, ms.
    pub load_ms: Option<f64>,
    /// Stop until its device memory is free, ms.
    pub stop_ms: Option<f64>,
    /// Service of one job, ms.
    pub service_ms: Option<f64>,
    /// Device time per completed job while jobs wait, ms.
    pub each_ms: Option<f64>,
    /// When it last lost the device.
    pub left_at: Option<Millis>,
}

/// What became of a wish to cancel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CancelRequest {
    /// The change, if there was one.
    pub change: Option<Change>,
    /// State afterwards.
    pub state: JobState,
}

impl Store {
    pub(super) fn new(
        writer: Writer,
        reader: Reader,
        artifacts: Artifacts,
        clock: Arc<dyn Clock>,
        next_batch: i64,
        lock: File,
    ) -> Self {
        Self {
            writer,
            reader,
            artifacts,
            clock,
            next_batch: Arc::new(AtomicI64::new(next_batch)),
            _lock: Arc::new(lock),
        }
    }

    /// Reads.
    pub fn reader(&self) -> &Reader {
        &self.reader
    }

    /// Whether submissions should be refused for now, since too many writes wait.
    pub fn is_full(&self) -> bool {
        self.writer.is_full()
    }

    /// A new batch's id. The batch's row is written with its first jobs.
    pub fn new_batch(&self) -> BatchId {
        BatchId(self.next_batch.fetch_add(1, Ordering::Relaxed))
    }

    /// Commits new jobs, all or none. With `claimed`, they are `running` in their first attempt from the start (the fast
    /// path of a worker with a free slot). The order of calls is the order of numbers.
    pub fn insert(
        &self,
        jobs: Vec<(JobId, NewJob)>,
        claimed: bool,
    ) -> impl Future<Output = Result<Vec<Job>, StoreError>> + use<> {
        let now = self.clock.now();
        let total = int(jobs.len() as u64);
        answer(self.writer.apply(move |c| {
            let jobs = jobs.into_iter().map(|(id, new)| insert_one(c, id, new, claimed, now)).collect::<Result<Vec<_>, _>>()?;
            if let Some(job) = jobs.first()
                && let Some(batch) = job.batch
            {
                execute(
                    c,
                    "INSERT INTO batch (id, tenant, created_at, total) VALUES (?1, (SELECT id FROM tenant WHERE name = ?2), ?3, ?4)",
                    params![batch.0, job.tenant, now, total],
                )?;
            }
            Ok(jobs)
        }))
    }

    /// Claims queued jobs for a run on `model`'s worker; answers with those that were still queued.
    pub fn claim(
        &self,
        numbers: Vec<i64>,
        worker: String,
        run: String,
    ) -> impl Future<Output = Result<Vec<Claimed>, StoreError>> + use<> {
        let now = self.clock.now();
        answer(self.writer.apply(move |c| {
            let mut claimed = Vec::with_capacity(numbers.len());
            for number in numbers {
                if let Some(claim) = claim_one(c, number, &worker, &run, now)? {
                    claimed.push(claim);
                }
            }
            Ok(claimed)
        }))
    }

    /// Appends an event to a running job. `None`: the attempt is no longer the job's.
    pub async fn append(&self, token: Token, kind: &'static str, body: Value) -> Result<Option<Change>, StoreError> {
        let now = self.clock.now();
        let pending = self.writer.apply(move |c| {
            let change = c
                .prepare_cached(
                    "UPDATE job SET last_seq = last_seq + 1, version = version + 1
                     WHERE number = ?1 AND attempt = ?2 AND state IN ('running', 'cancelling')
                     RETURNING number, state, version, last_seq",
                )?
                .query_row(params![token.id.number, token.attempt], change)
                .optional()?;
            if let Some(change) = change {
                record(c, change, token.attempt, kind, now, &body)?;
            }
            Ok(change)
        });
        answer(pending).await
    }

    /// Stores the files of an answer; the first half of a success.
    pub async fn keep(&self, token: Token, kind: JobKind, answer: &Answer) -> Result<StoredAnswer, StoreError> {
        self.artifacts.keep(token, kind, answer).await
    }

    /// Ends a running job. `None`: a late result of an old attempt, dropped.
    pub async fn finish(&self, token: Token, end: End) -> Result<Option<Change>, StoreError> {
        let now = self.clock.now();
        let pending = self.writer.apply(move |c| {
            let sql = if matches!(end, End::Cancelled) {
                "UPDATE job SET state = ?3, finished_at = ?4, version = version + 1, last_seq = last_seq + 1
                 WHERE number = ?1 AND attempt = ?2 AND state = 'cancelling' RETURNING number, state, version, last_seq"
            } else {
                "UPDATE job SET state = ?3, finished_at = ?4, version = version + 1, last_seq = last_seq + 1
                 WHERE number = ?1 AND attempt = ?2 AND state IN ('running', 'cancelling')
                 RETURNING number, state, version, last_seq"
            };
            let change = c
                .prepare_cached(sql)?
                .query_row(params![token.id.number, token.attempt, end.state().as_str(), now], change)
                .optional()?;
            if let Some(change) = change {
                record_end(c, change, token.attempt, end, now)?;
            }
            Ok(change)
        });
        answer(pending).await
    }

    /// Ends a job that is still queued: too late, or its model does not load. `None`: it is not queued any more.
    pub async fn end_queued(&self, number: i64, end: End) -> Result<Option<Change>, StoreError> {
        let now = self.clock.now();
        let pending = self.writer.apply(move |c| {
            let row = c
                .prepare_cached(
                    "UPDATE job SET state = ?2, state_reason = NULL, finished_at = ?3, version = version + 1, last_seq = last_seq + 1
                     WHERE number = ?1 AND state = 'queued' RETURNING number, state, version, last_seq, attempt",
                )?
                .query_row(params![number, end.state().as_str(), now], |row| Ok((change(row)?, row.get::<_, i64>(4)?)))
                .optional()?;
            if let Some((change, attempt)) = row {
                record_end(c, change, attempt, end, now)?;
            }
            Ok(row.map(|(change, _)| change))
        });
        answer(pending).await
    }

    /// Gives a running job back to the queue. `None`: not this attempt's any more, or being cancelled.
    pub async fn requeue(
        &self,
        token: Token,
        failures: u32,
        crashes: u32,
        not_before: Option<Millis>,
        error: Option<JobError>,
    ) -> Result<Option<Change>, StoreError> {
        let now = self.clock.now();
        let pending = self.writer.apply(move |c| {
            let reason = if not_before.is_some() { StateReason::RetryBackoff } else { StateReason::WaitingForModel };
            let change = c
                .prepare_cached(
                    "UPDATE job SET state = 'queued', state_reason = ?3, failures = ?4, crashes = ?5, not_before = ?6,
                            queued_at = ?7, version = version + 1, last_seq = last_seq + 1
                     WHERE number = ?1 AND attempt = ?2 AND state = 'running' RETURNING number, state, version, last_seq",
                )?
                .query_row(
                    params![token.id.number, token.attempt, reason.as_str(), failures, crashes, not_before, now],
                    change,
                )
                .optional()?;
            if let Some(change) = change {
                set_error(c, change.number, error.as_ref())?;
                record(c, change, token.attempt, "job.retrying", now, &retrying(token.attempt, error.as_ref(), not_before, change.seq))?;
            }
            Ok(change)
        });
        answer(pending).await
    }

    /// Asks to cancel: queued jobs end at once, running ones become `cancelling`, others stay as they are.
    pub async fn request_cancel(&self, id: JobId, code: ErrorCode) -> Result<CancelRequest, StoreError> {
        let now = self.clock.now();
        answer(self.writer.apply(move |c| cancel_one(c, id, code, now))).await
    }

    /// Tells queued jobs that their model is being loaded.
    pub async fn tell_loading(&self, numbers: Vec<i64>, model: String, eta: Millis) -> Result<Vec<Change>, StoreError> {
        let now = self.clock.now();
        let pending = self.writer.apply(move |c| {
            let mut changes = Vec::with_capacity(numbers.len());
            for number in numbers {
                let row = c
                    .prepare_cached(
                        "UPDATE job SET last_seq = last_seq + 1, version = version + 1 WHERE number = ?1 AND state = 'queued'
                         RETURNING number, state, version, last_seq, attempt",
                    )?
                    .query_row([number], |row| Ok((change(row)?, row.get::<_, i64>(4)?)))
                    .optional()?;
                if let Some((change, attempt)) = row {
                    record(c, change, attempt, "job.loading", now, &json!({"model": model, "eta_ms": eta}))?;
                    changes.push(change);
                }
            }
            Ok(changes)
        });
        answer(pending).await
    }

    /// Adds to the time that jobs have waited for a load of their model.
    pub async fn add_load_time(&self, numbers: Vec<i64>, load_ms: i64) -> Result<(), StoreError> {
        let pending = self.writer.apply(move |c| {
            for number in numbers {
                execute(c, "UPDATE job_detail SET load_ms = load_ms + ?2 WHERE number = ?1", params![number, load_ms])?;
            }
            Ok(())
        });
        answer(pending).await
    }

    /// Keeps what was learned about a model.
    pub async fn learn(&self, model: String, learned: Learned) -> Result<(), StoreError> {
        let pending = self.writer.apply(move |c| {
            execute(
                c,
                "INSERT INTO model (name, load_ms, stop_ms, service_ms, each_ms, left_at) VALUES (?1, ?2, ?3, ?4, ?5, ?6)
                 ON CONFLICT (name) DO UPDATE SET load_ms = excluded.load_ms, stop_ms = excluded.stop_ms,
                     service_ms = excluded.service_ms, each_ms = excluded.each_ms, left_at = excluded.left_at",
                params![model, learned.load_ms, learned.stop_ms, learned.service_ms, learned.each_ms, learned.left_at],
            )
        });
        answer(pending).await
    }

    /// Answers when the writer does, for `/readyz`.
    pub async fn ping(&self) -> Result<(), StoreError> {
        answer(self.writer.apply(|_| Ok(()))).await
    }
}

/// SQLite's integers are signed.
fn int(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

fn execute(c: &Connection, sql: &str, params: impl rusqlite::Params) -> Result<(), StoreError> {
    c.prepare_cached(sql)?.execute(params)?;
    Ok(())
}

/// Reads `number, state, version, last_seq` of a RETURNING clause.
fn change(row: &Row<'_>) -> rusqlite::Result<Change> {
    let state: String = row.get(1)?;
    let state = JobState::parse(&state).ok_or(rusqlite::Error::InvalidQuery)?;
    Ok(Change { number: row.get(0)?, state, version: row.get(2)?, seq: row.get(3)? })
}

fn record(
    c: &Connection,
    change: Change,
    attempt: i64,
    kind: &str,
    now: Millis,
    body: &Value,
) -> Result<(), StoreError> {
    execute(
        c,
        "INSERT INTO event (number, seq, attempt, kind, at, body) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        params![change.number, change.seq, attempt, kind, now, body.to_string()],
    )
}

fn set_error(c: &Connection, number: i64, error: Option<&JobError>) -> Result<(), StoreError> {
    let text = error.map(|error| json!(error).to_string());
    execute(c, "UPDATE job_detail SET error = ?2 WHERE number = ?1 AND error IS NOT ?2", params![number, text])
}

fn retrying(attempt: i64, error: Option<&JobError>, not_before: Option<Millis>, seq: i64) -> Value {
    json!({"attempt": attempt, "error": error, "not_before_ms": not_before, "discard_output_before_seq": seq})
}

/// The end's event, error, result and files. The row itself has been updated.
fn record_end(c: &Connection, change: Change, attempt: i64, end: End, now: Millis) -> Result<(), StoreError> {
    let kind = match change.state {
        JobState::Succeeded => "job.succeeded",
        JobState::Failed => "job.failed",
        JobState::Cancelled => "job.cancelled",
        _ => "job.expired",
    };
    let error = match end {
        End::Succeeded(answer) => {
            record_answer(c, change.number, &answer)?;
            None
        }
        End::Failed(error) | End::Expired(error) => Some(error),
        End::Cancelled => Some(cancel_error(c, change.number)?),
    };
    set_error(c, change.number, error.as_ref())?;
    record(c, change, attempt, kind, now, &error.map_or_else(|| json!({}), |error| json!({"error": error})))
}

fn record_answer(c: &Connection, number: i64, answer: &StoredAnswer) -> Result<(), StoreError> {
    let position = answer.body.is_none().then_some(0_i64);
    execute(
        c,
        "INSERT INTO result (number, status, content_type, body, artifact, usage) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        params![
            number,
            answer.status,
            answer.content_type,
            answer.body.as_deref(),
            position,
            answer.usage.as_ref().map(Value::to_string)
        ],
    )?;
    for (position, stored) in answer.artifacts.iter().enumerate() {
        let a = &stored.artifact;
        execute(
            c,
            "INSERT INTO artifact (number, position, name, mime, bytes, sha256, path) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
            params![number, int(position as u64), a.name, a.mime, int(a.bytes), a.sha256, stored.path],
        )?;
    }
    Ok(())
}

/// The error of a cancelled job; `cancel_code` says who asked.
fn cancel_error(c: &Connection, number: i64) -> Result<JobError, StoreError> {
    let code: Option<String> =
        c.prepare_cached("SELECT cancel_code FROM job WHERE number = ?1")?.query_row([number], |row| row.get(0))?;
    let error = match code.as_deref().and_then(ErrorCode::parse) {
        Some(ErrorCode::ClientDisconnected) => {
            JobError::new(ErrorCode::ClientDisconnected, "nobody waited for the answer any more", true)
        }
        _ => JobError::new(ErrorCode::CancelledByUser, "cancelled by request", true),
    };
    Ok(error)
}

fn insert_one(c: &Connection, id: JobId, new: NewJob, claimed: bool, now: Millis) -> Result<Job, StoreError> {
    execute(c, "INSERT INTO model (name) VALUES (?1) ON CONFLICT DO NOTHING", [&new.model])?;
    execute(c, "INSERT INTO tenant (name) VALUES (?1) ON CONFLICT DO NOTHING", [&new.tenant])?;
    let state = if claimed { JobState::Running } else { JobState::Queued };
    let state_reason = (!claimed).then_some(StateReason::WaitingForModel);
    let steps = if claimed { 2 } else { 1 };
    let kind = JobKind::of_endpoint(&new.endpoint);
    let created_at = id.created_ms;
    let started_at = claimed.then_some(now);
    let attempt = i64::from(claimed);
    execute(
        c,
        "INSERT INTO job (number, tag, kind, face, model, tenant, batch, state, state_reason, priority, attempt, max_attempts,
                          version, last_seq, batch_key, stream, created_at, queued_at, started_at, start_deadline, deadline,
                          timeout_ms)
         VALUES (?1, ?2, ?3, ?4, (SELECT id FROM model WHERE name = ?5), (SELECT id FROM tenant WHERE name = ?6), ?7, ?8, ?9,
                 ?10, ?11, ?12, ?13, ?13, ?14, ?15, ?16, ?16, ?17, ?18, ?19, ?20)",
        params![
            id.number,
            int(id.tag),
            kind.as_str(),
            new.face.as_str(),
            new.model,
            new.tenant,
            new.batch.map(|b| b.0),
            state.as_str(),
            state_reason.map(StateReason::as_str),
            new.priority,
            attempt,
            new.max_attempts,
            steps,
            new.batch_key,
            new.stream,
            created_at,
            started_at,
            new.start_deadline,
            new.deadline,
            new.timeout_ms,
        ],
    )?;
    execute(c, "INSERT INTO payload (number, body) VALUES (?1, ?2)", params![id.number, &new.body[..]])?;
    execute(
        c,
        "INSERT INTO job_detail (number, endpoint, custom_id, metadata, present, retry_of) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        params![
            id.number,
            new.endpoint,
            new.custom_id,
            json!(new.metadata).to_string(),
            json!(new.present).to_string(),
            new.retry_of.map(|id| id.to_string()),
        ],
    )?;
    let change = Change { number: id.number, state, version: steps, seq: 1 };
    record(c, change, 0, "job.queued", now, &json!({}))?;
    if claimed {
        record(c, Change { seq: 2, ..change }, 1, "job.started", now, &json!({"attempt": 1, "worker": new.model}))?;
    }
    Ok(Job {
        id,
        kind,
        endpoint: new.endpoint,
        model: new.model,
        tenant: new.tenant,
        batch: new.batch,
        custom_id: new.custom_id,
        face: new.face,
        state,
        state_reason,
        priority: new.priority,
        attempt,
        failures: 0,
        crashes: 0,
        max_attempts: new.max_attempts,
        version: steps,
        batch_key: new.batch_key,
        stream: new.stream,
        present: new.present,
        created_at,
        queued_at: created_at,
        started_at,
        finished_at: None,
        not_before: None,
        start_deadline: new.start_deadline,
        deadline: new.deadline,
        timeout_ms: new.timeout_ms,
        metadata: new.metadata,
        retry_of: new.retry_of,
        error: None,
        usage: None,
        load_ms: 0,
    })
}

fn claim_one(c: &Connection, number: i64, worker: &str, run: &str, now: Millis) -> Result<Option<Claimed>, StoreError> {
    let claimed = c
        .prepare_cached(
            "UPDATE job SET state = 'running', state_reason = NULL, attempt = attempt + 1, started_at = ?2, not_before = NULL,
                    version = version + 1, last_seq = last_seq + 1
             WHERE number = ?1 AND state = 'queued' RETURNING number, state, version, last_seq, attempt",
        )?
        .query_row(params![number, now], |row| Ok(Claimed { change: change(row)?, attempt: row.get(4)? }))
        .optional()?;
    if let Some(claim) = &claimed {
        let body = json!({"attempt": claim.attempt, "worker": worker, "run": run});
        record(c, claim.change, claim.attempt, "job.started", now, &body)?;
    }
    Ok(claimed)
}

fn cancel_one(c: &Connection, id: JobId, code: ErrorCode, now: Millis) -> Result<CancelRequest, StoreError> {
    let found: Option<(String, i64)> = c
        .prepare_cached("SELECT state, attempt FROM job WHERE number = ?1 AND tag = ?2 AND created_at = ?3")?
        .query_row(params![id.number, int(id.tag), id.created_ms], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    let (state, attempt) = found.ok_or(StoreError::NotFound)?;
    let state = JobState::parse(&state).ok_or_else(|| StoreError::Database(format!("unknown state `{state}`")))?;
    let (to, finished_at) = match state {
        JobState::Queued => (JobState::Cancelled, Some(now)),
        JobState::Running => (JobState::Cancelling, None),
        _ => {
            return Ok(CancelRequest { change: None, state });
        }
    };
    let change = c
        .prepare_cached(
            "UPDATE job SET state = ?2, state_reason = NULL, finished_at = ?3, cancel_code = ?4, version = version + 1,
                    last_seq = last_seq + 1
             WHERE number = ?1 AND state = ?5 RETURNING number, state, version, last_seq",
        )?
        .query_row(params![id.number, to.as_str(), finished_at, code.as_str(), state.as_str()], change)?;
    if to == JobState::Cancelled {
        record_end(c, change, attempt, End::Cancelled, now)?;
    } else {
        record(c, change, attempt, "job.cancelling", now, &json!({}))?;
    }
    Ok(CancelRequest { change: Some(change), state: to })
}

/// Puts the jobs of the last run's workers back, uncharged; ends those that were being cancelled. One transaction.
pub(super) fn recover(c: &Connection, now: Millis) -> Result<usize, StoreError> {
    c.execute_batch("BEGIN IMMEDIATE")?;
    let cancelling: Vec<(Change, i64)> = c
        .prepare(
            "UPDATE job SET state = 'cancelled', finished_at = ?1, version = version + 1, last_seq = last_seq + 1
             WHERE state = 'cancelling' RETURNING number, state, version, last_seq, attempt",
        )?
        .query_map([now], |row| Ok((change(row)?, row.get(4)?)))?
        .collect::<Result<_, _>>()?;
    for (change, attempt) in cancelling {
        record_end(c, change, attempt, End::Cancelled, now)?;
    }
    let running: Vec<(Change, i64)> = c
        .prepare(
            "UPDATE job SET state = 'queued', state_reason = 'waiting_for_model', queued_at = ?1, version = version + 1,
                    last_seq = last_seq + 1
             WHERE state = 'running' RETURNING number, state, version, last_seq, attempt",
        )?
        .query_map([now], |row| Ok((change(row)?, row.get(4)?)))?
        .collect::<Result<_, _>>()?;
    for (change, attempt) in &running {
        record(c, *change, *attempt, "job.retrying", now, &retrying(*attempt, None, None, change.seq))?;
    }
    c.execute_batch("COMMIT")?;
    Ok(running.len())
}

/// All queued jobs, oldest first.
pub(super) fn load_queued(c: &Connection) -> Result<Vec<QueuedJob>, StoreError> {
    let models = names(c, "SELECT id, name FROM model")?;
    let tenants = names(c, "SELECT id, name FROM tenant")?;
    let unknown: Arc<str> = Arc::from("");
    let mut statement = c.prepare(
        "SELECT created_at, number, tag, kind, model, tenant, face, priority, attempt, failures, crashes, max_attempts, batch_key,
                stream, not_before, start_deadline, deadline, timeout_ms
         FROM job WHERE state = 'queued' ORDER BY number",
    )?;
    let jobs = statement.query_map([], |row| {
        let (kind, face): (String, String) = (row.get(3)?, row.get(6)?);
        Ok(QueuedJob {
            id: JobId::new(row.get(0)?, row.get(1)?, u64::try_from(row.get::<_, i64>(2)?).unwrap_or_default()),
            kind: JobKind::parse(&kind).ok_or(rusqlite::Error::InvalidQuery)?,
            model: models.get(&row.get(4)?).unwrap_or(&unknown).clone(),
            tenant: tenants.get(&row.get(5)?).unwrap_or(&unknown).clone(),
            face: Face::parse(&face).ok_or(rusqlite::Error::InvalidQuery)?,
            priority: row.get(7)?,
            attempt: row.get(8)?,
            failures: row.get(9)?,
            crashes: row.get(10)?,
            max_attempts: row.get(11)?,
            batch_key: row.get(12)?,
            stream: row.get(13)?,
            created_at: row.get(0)?,
            not_before: row.get(14)?,
            start_deadline: row.get(15)?,
            deadline: row.get(16)?,
            timeout_ms: row.get(17)?,
        })
    })?;
    Ok(jobs.collect::<Result<_, _>>()?)
}

fn names(c: &Connection, sql: &str) -> Result<BTreeMap<i64, Arc<str>>, StoreError> {
    let mut statement = c.prepare(sql)?;
    let rows = statement.query_map([], |row| Ok((row.get(0)?, Arc::from(row.get::<_, String>(1)?))))?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// What earlier runs learned.
pub(super) fn load_learned(c: &Connection) -> Result<BTreeMap<String, Learned>, StoreError> {
    let mut statement = c.prepare("SELECT name, load_ms, stop_ms, service_ms, each_ms, left_at FROM model")?;
    let rows = statement.query_map([], |row| {
        let learned = Learned {
            load_ms: row.get(1)?,
            stop_ms: row.get(2)?,
            service_ms: row.get(3)?,
            each_ms: row.get(4)?,
            left_at: row.get(5)?,
        };
        Ok((row.get(0)?, learned))
    })?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// The number after the highest one given out.
pub(super) fn next_number(c: &Connection) -> Result<i64, StoreError> {
    Ok(c.query_row("SELECT coalesce(max(number), 0) + 1 FROM job", [], |row| row.get(0))?)
}

/// The same for batches.
pub(super) fn next_batch(c: &Connection) -> Result<i64, StoreError> {
    Ok(c.query_row("SELECT coalesce(max(id), 0) + 1 FROM batch", [], |row| row.get(0))?)
}
