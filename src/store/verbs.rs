//! What can be done to jobs. Each verb is one operation of the writer; its answer says what was committed.
//!
//! The row says what a look at the job needs, and three events need no row of their own (see `read`): the submission, the
//! start of the current attempt (`started_seq`), and the end. Before an attempt gives its place to the next one, its start
//! is written down.
//!
//! A guarded update looks at its row first and then names what it saw in its WHERE: `RETURNING` would build a temporary
//! table each time, which costs more than the look.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use rusqlite::{Connection, OptionalExtension, Row, params};
use serde_json::{Value, json};

use super::StoreError;
use super::files::{Body, Files, Role, StoredAnswer, StoredFile};
use super::idempotency::IdempotencyKey;
use super::metrics::{Metrics, StoreMetrics};
use super::presence::Presence;
use super::quota::Quota;
use super::read::Reader;
use super::space::Space;
use super::submit::{self, Inserted, Submission};
use super::usage::Used;
use super::writer::{Kind, Session, Writer, answer};
use crate::clock::Clock;
use crate::domain::worker::{Answer, PhaseTime};
use crate::domain::{
    BatchId, ErrorCode, Face, JobError, JobId, JobKind, JobState, Millis, NewJob, StorageSettings, Token,
};

/// What jobs are told about the load of their model, as `job.loading`.
#[derive(Clone, Debug)]
pub enum Told {
    /// It begins.
    Loading {
        /// Entry name.
        model: String,
        /// When it should be ready.
        eta: Millis,
    },
    /// It has ended well.
    Loaded {
        /// Entry name.
        model: String,
        /// Where its time went.
        phases: Vec<PhaseTime>,
    },
}

/// The durable queue. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    pub(super) writer: Writer,
    pub(super) reader: Reader,
    pub(super) files: Files,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) metrics: Metrics,
    pub(super) quota: Quota,
    pub(super) space: Space,
    /// Whether free pages can be given back to the disk.
    pub(super) gives_back: bool,
    pub(super) presence: Presence,
    pub(super) settings: Arc<StorageSettings>,
    pub(super) next_batch: Arc<AtomicI64>,
    /// Keeps the data dir for this process; its time is when a run began last.
    pub(super) lock: Arc<File>,
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

/// A job that is now this attempt's, with all that its worker is to be sent.
#[derive(Clone, Debug, PartialEq)]
pub struct ClaimedJob {
    /// The claim as a change.
    pub change: Change,
    /// The attempt that fences its writes.
    pub token: Token,
    /// See [`JobKind`].
    pub kind: JobKind,
    /// Whether a caller holds the line.
    pub face: Face,
    /// Retriable errors so far.
    pub failures: u32,
    /// Crashes so far.
    pub crashes: u32,
    /// The death of a worker it was part of.
    pub crash: Option<i64>,
    /// Budget of `failures`.
    pub max_attempts: u32,
    /// Whether the body asks for a stream.
    pub stream: bool,
    /// To be finished before.
    pub deadline: Option<Millis>,
    /// Longest time of one attempt, in ms.
    pub timeout_ms: i64,
    /// Path on the worker.
    pub endpoint: String,
    /// What to send.
    pub body: Body,
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

/// Another attempt: what a job takes back to the queue.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GiveBack {
    /// New value of `failures`.
    pub failures: u32,
    /// New value of `crashes`.
    pub crashes: u32,
    /// The death of a worker it was part of.
    pub crash: Option<i64>,
    /// Not before; `None`: as soon as there is a slot.
    pub not_before: Option<Millis>,
    /// Why the attempt ended.
    pub error: Option<JobError>,
    /// What the attempt had of the devices, ms.
    pub gpu_ms: f64,
}

/// What became of a wish to cancel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cancelled {
    /// The change, if there was one.
    pub change: Option<Change>,
    /// State afterwards.
    pub state: JobState,
    /// The job's model and priority: where it waits.
    pub model: String,
    /// See `model`.
    pub priority: u8,
}

impl Store {
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
    /// path of a worker with a free slot). The order of calls is the order of numbers. With a `key` that came before, the
    /// jobs of then are returned instead.
    pub fn insert(
        &self,
        jobs: Vec<(JobId, NewJob)>,
        claimed: bool,
        key: Option<IdempotencyKey>,
    ) -> impl Future<Output = Result<Inserted, StoreError>> + Send + use<> {
        let submission = Submission { jobs, claimed, key, now: self.clock.now() };
        submit::insert(&self.writer, &self.files, &self.reader, submission)
    }

    /// Claims queued jobs for a run; answers with those that were still queued, in the given order, and the numbers of those
    /// that stay so, since their endpoint is none of `endpoints`; `None`: any will do.
    pub fn claim_served(
        &self,
        numbers: Vec<i64>,
        run: i64,
        endpoints: Option<Vec<String>>,
    ) -> impl Future<Output = Result<(Vec<ClaimedJob>, Vec<i64>), StoreError>> + Send + use<> {
        let now = self.clock.now();
        answer(self.writer.apply(Kind::Change, 0, move |session| {
            let (mut claimed, mut unserved) = (Vec::with_capacity(numbers.len()), Vec::new());
            for number in &numbers {
                match claim_one(session, *number, (run, endpoints.as_deref()), now)? {
                    Some(Ok(claim)) => claimed.push(claim),
                    Some(Err(Unserved)) => unserved.push(*number),
                    None => {}
                }
            }
            Ok((claimed, unserved))
        }))
    }

    /// The same, whatever their endpoint.
    pub fn claim(
        &self,
        numbers: Vec<i64>,
        run: i64,
    ) -> impl Future<Output = Result<Vec<ClaimedJob>, StoreError>> + Send + use<> {
        let claimed = self.claim_served(numbers, run, None);
        async { Ok(claimed.await?.0) }
    }

    /// Appends an event to a running job. `None`: the attempt is no longer the job's.
    pub async fn append(&self, token: Token, kind: &'static str, body: Value) -> Result<Option<Change>, StoreError> {
        let now = self.clock.now();
        let text = body.to_string();
        let pending = self.writer.apply(Kind::Change, text.len() as u64, move |session| {
            let row = Seen::of(&session.c, token.id.number)?;
            let Some(row) = row.filter(|row| Guard::Attempt(token).admits(row)) else {
                return Ok(None);
            };
            let changed = session
                .c
                .prepare_cached(
                    "UPDATE job SET last_seq = last_seq + 1, version = version + 1
                     WHERE number = ?1 AND attempt = ?2 AND state = ?3",
                )?
                .execute(params![row.number, row.attempt, row.state.as_str()])?;
            let change = row.changed(changed, row.state)?;
            session.touched.push(change.number);
            record(&session.c, change, token.attempt, kind, now, &text)?;
            Ok(Some(change))
        });
        answer(pending).await
    }

    /// Stores the files of an answer; the first half of a success.
    pub async fn keep(&self, token: Token, kind: JobKind, answer: &Answer) -> Result<StoredAnswer, StoreError> {
        self.files.keep(token, kind, answer).await
    }

    /// Ends a running job, whose attempt had `gpu_ms` of the devices. `None`: a late result of an old attempt, dropped.
    pub async fn finish(&self, token: Token, end: End, gpu_ms: f64) -> Result<Option<Change>, StoreError> {
        let (now, settings) = (self.clock.now(), self.settings.clone());
        let bytes = match &end {
            End::Succeeded(answer) => answer.body.as_ref().map_or(0, |body| body.len() as u64),
            _ => 0,
        };
        let from = if end == End::Cancelled { Guard::Cancelling(token) } else { Guard::Attempt(token) };
        // Kept here, so that the files of a dropped answer can be deleted.
        let end = Arc::new(end);
        let ending = end.clone();
        let pending = self
            .writer
            .apply(Kind::Change, bytes, move |session| end_one(session, from, &ending, gpu_ms, now, &settings));
        let change = answer(pending).await?;
        if change.is_none() {
            self.metrics.stale();
            if let End::Succeeded(answer) = &*end {
                let _ = self.files.delete(&answer.files).await;
            }
        }
        Ok(change)
    }

    /// Ends a job that is still queued: too late, or its model does not load. `None`: it is not queued any more.
    pub async fn end_queued(&self, number: i64, end: End) -> Result<Option<Change>, StoreError> {
        let (now, settings) = (self.clock.now(), self.settings.clone());
        let pending = self
            .writer
            .apply(Kind::Change, 0, move |session| end_one(session, Guard::Queued(number), &end, 0.0, now, &settings));
        answer(pending).await
    }

    /// Gives a running job back to the queue. `None`: not this attempt's any more, or being cancelled.
    pub async fn requeue(&self, token: Token, back: GiveBack) -> Result<Option<Change>, StoreError> {
        let now = self.clock.now();
        let rescued = back.crash.is_some_and(|crash| crash >= 0);
        let pending = self.writer.apply(Kind::Change, 0, move |session| requeue_one(session, token, &back, now));
        let change = answer(pending).await?;
        match change {
            Some(_) if rescued => self.metrics.rescued(1),
            Some(_) => {}
            None => self.metrics.stale(),
        }
        Ok(change)
    }

    /// Asks to cancel: queued jobs end at once, running ones become `cancelling`, others stay as they are.
    pub async fn request_cancel(&self, id: JobId, code: ErrorCode) -> Result<Cancelled, StoreError> {
        let (now, settings) = (self.clock.now(), self.settings.clone());
        let pending = self.writer.apply(Kind::Change, 0, move |session| cancel_one(session, id, code, now, &settings));
        answer(pending).await?.ok_or(StoreError::NotFound)
    }

    /// Tells jobs about the load of their model: that it has begun only those that are queued still.
    pub async fn tell_loading(&self, numbers: Vec<i64>, told: Told) -> Result<Vec<Change>, StoreError> {
        let now = self.clock.now();
        let (body, begins) = match told {
            Told::Loading { model, eta } => (json!({"model": model, "eta_ms": eta}), true),
            Told::Loaded { model, phases } => (json!({"model": model, "phases": phases}), false),
        };
        let body = body.to_string();
        let pending = self.writer.apply(Kind::Change, 0, move |session| {
            let mut changes = Vec::with_capacity(numbers.len());
            for number in &numbers {
                let row = session
                    .c
                    .prepare_cached(
                        "UPDATE job SET last_seq = last_seq + 1, version = version + 1 WHERE number = ?1 AND (state = 'queued' OR (state = 'running' AND NOT ?2))
                         RETURNING number, state, version, last_seq, attempt",
                    )?
                    .query_row(params![number, begins], |row| Ok((change(row)?, row.get::<_, i64>(4)?)))
                    .optional()?;
                if let Some((change, attempt)) = row {
                    session.touched.push(change.number);
                    record(&session.c, change, attempt, "job.loading", now, &body)?;
                    changes.push(change);
                }
            }
            Ok(changes)
        });
        answer(pending).await
    }

    /// Adds to the time that jobs have waited for a load of their model.
    pub async fn add_load_time(&self, numbers: Vec<i64>, load_ms: i64) -> Result<(), StoreError> {
        let pending = self.writer.apply(Kind::Change, 0, move |session| {
            for number in &numbers {
                session.touched.push(*number);
                execute(
                    &session.c,
                    "UPDATE job SET load_ms = load_ms + ?2 WHERE number = ?1",
                    params![number, load_ms],
                )?;
            }
            Ok(())
        });
        answer(pending).await
    }

    /// Keeps how much tenants were served: weighted GPU ms by name. Tenants without a job yet are left out.
    pub async fn keep_served(&self, tenants: Vec<(String, f64)>) -> Result<(), StoreError> {
        let pending = self.writer.apply(Kind::Change, 0, move |session| {
            for (tenant, served_ms) in &tenants {
                execute(&session.c, "UPDATE tenant SET served_ms = ?2 WHERE name = ?1", params![tenant, served_ms])?;
            }
            Ok(())
        });
        answer(pending).await
    }

    /// Notes that a job's answer was handed to a client; written with the next commit. When room is needed, delivered
    /// answers go before undelivered ones, which never do.
    pub fn delivered(&self, id: JobId) {
        self.writer.delivered(id.number);
    }

    /// Reading the queue into memory took so long; part of the time that a start needs.
    pub fn took_in(&self, time: std::time::Duration) {
        self.metrics.recovered_in(time);
    }

    /// The last word: the next start knows that this run ended in order. If files were removed meanwhile, they are saved.
    pub async fn close(&self) -> Result<(), StoreError> {
        let presence = self.presence.clone();
        let pending = self.writer.apply(Kind::Change, 0, move |session| match presence.gone() {
            Some(gone) => Err(StoreError::Gone(gone)),
            None => super::writer::mark_clean(session),
        });
        answer(pending).await
    }

    /// The end of the store, for a reason that the writer has not seen itself: what it has promised before is saved, and it
    /// promises nothing afterwards.
    pub(super) async fn end(&self, error: StoreError) -> Result<(), StoreError> {
        answer(self.writer.apply(Kind::Change, 0, move |_| Err(error.for_everybody()))).await
    }

    /// Answers when the writer does, for `/readyz`.
    pub async fn ping(&self) -> Result<(), StoreError> {
        answer(self.writer.apply(Kind::Change, 0, |_| Ok(()))).await
    }

    /// The store's own figures.
    pub async fn metrics(&self) -> StoreMetrics {
        let file_bytes = self.files.stored_bytes();
        let sizes = self.reader.sizes(self.clock.now()).await.unwrap_or_default();
        StoreMetrics {
            wal_bytes: sizes.wal_bytes,
            database_bytes: sizes.database_bytes,
            purge_lag_s: sizes.purge_lag_ms as f64 / 1e3,
            stored_bytes: sizes.used_bytes + file_bytes,
            quota_bytes: self.quota.bytes(),
            missing_files: self.files.lost.count(),
            ..self.metrics.look()
        }
    }
}

/// SQLite's integers are signed.
pub(super) fn int(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

pub(super) fn execute(c: &Connection, sql: &str, params: impl rusqlite::Params) -> Result<(), StoreError> {
    c.prepare_cached(sql)?.execute(params)?;
    Ok(())
}

/// Reads `number, state, version, last_seq`.
pub(super) fn change(row: &Row<'_>) -> rusqlite::Result<Change> {
    Ok(Change { number: row.get(0)?, state: state_of(row, 1)?, version: row.get(2)?, seq: row.get(3)? })
}

pub(super) fn record(
    c: &Connection,
    change: Change,
    attempt: i64,
    kind: &str,
    now: Millis,
    body: &str,
) -> Result<(), StoreError> {
    execute(
        c,
        "INSERT INTO event (number, seq, attempt, kind, at, body) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        params![change.number, change.seq, attempt, kind, now, body],
    )
}

pub(super) fn record_file(c: &Connection, number: i64, file: &StoredFile) -> Result<(), StoreError> {
    execute(
        c,
        "INSERT INTO file (number, role, position, name, mime, bytes, sha256, path) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
        params![
            number,
            file.role.as_str(),
            file.position,
            file.name,
            file.mime,
            int(file.bytes),
            file.sha256,
            file.path
        ],
    )
}

/// The body of `job.started`.
pub(super) fn started(attempt: i64, worker: &str, run: Option<i64>) -> Value {
    match run {
        Some(run) => json!({"attempt": attempt, "worker": worker, "run": format!("run_{run}")}),
        None => json!({"attempt": attempt, "worker": worker}),
    }
}

fn retrying(attempt: i64, back: &GiveBack, seq: i64) -> String {
    json!({
        "attempt": attempt,
        "error": back.error,
        "not_before_ms": back.not_before,
        "discard_output_before_seq": seq,
    })
    .to_string()
}

impl Guard {
    fn number(self) -> i64 {
        match self {
            Self::Attempt(token) | Self::Cancelling(token) => token.id.number,
            Self::Queued(number) => number,
        }
    }

    fn admits(self, row: &Seen) -> bool {
        match self {
            Self::Attempt(token) => {
                row.attempt == token.attempt && matches!(row.state, JobState::Running | JobState::Cancelling)
            }
            Self::Cancelling(token) => row.attempt == token.attempt && row.state == JobState::Cancelling,
            Self::Queued(_) => row.state == JobState::Queued,
        }
    }
}

/// Which row an end may change.
#[derive(Clone, Copy)]
pub(super) enum Guard {
    /// Running, or being cancelled, in this attempt.
    Attempt(Token),
    /// Being cancelled in this attempt.
    Cancelling(Token),
    /// Not claimed.
    Queued(i64),
}

pub(super) fn end_one(
    session: &mut Session,
    from: Guard,
    end: &End,
    gpu_ms: f64,
    now: Millis,
    settings: &StorageSettings,
) -> Result<Option<Change>, StoreError> {
    let Some(row) = Seen::of(&session.c, from.number())? else {
        return Ok(None);
    };
    if !from.admits(&row) {
        return Ok(None);
    }
    let error = match end {
        End::Succeeded(_) => None,
        End::Failed(error) | End::Expired(error) => Some(json!(error).to_string()),
        End::Cancelled => Some(json!(cancel_error(&session.c, row.number)?).to_string()),
    };
    let result = match end {
        End::Succeeded(answer) => Some(record_answer(&session.c, row.number, answer)?),
        _ => None,
    };
    let changed = session
        .c
        .prepare_cached(
            "UPDATE job SET state = ?4, finished_at = ?5, error = ?6, result = ?10, gpu_ms = gpu_ms + ?11,
                    delivered_at = CASE WHEN ?10 IS NULL THEN ?5 END, version = version + 1, last_seq = last_seq + 1,
                    expires_at = ?5 + CASE WHEN face = 'sync' THEN ?7 WHEN batch IS NOT NULL THEN ?8 ELSE ?9 END
             WHERE number = ?1 AND attempt = ?2 AND state = ?3",
        )?
        .execute(params![
            row.number,
            row.attempt,
            row.state.as_str(),
            end.state().as_str(),
            now,
            error,
            ms(settings.sync_ttl),
            ms(settings.batch_ttl),
            ms(settings.results_ttl),
            result,
            gpu_ms
        ])?;
    let change = row.changed(changed, end.state())?;
    session.touched.push(row.number);
    if row.state != JobState::Queued {
        session.used.push(row.used(gpu_ms, true, now));
    }
    Ok(Some(change))
}

/// What guards look at.
struct Seen {
    number: i64,
    state: JobState,
    attempt: i64,
    version: i64,
    last_seq: i64,
    model: i64,
    tenant: i64,
}

impl Seen {
    fn of(c: &Connection, number: i64) -> Result<Option<Self>, StoreError> {
        Ok(c.prepare_cached(
            "SELECT number, state, attempt, version, last_seq, model, tenant FROM job WHERE number = ?1",
        )?
        .query_row([number], |row| {
            Ok(Self {
                number,
                state: state_of(row, 1)?,
                attempt: row.get(2)?,
                version: row.get(3)?,
                last_seq: row.get(4)?,
                model: row.get(5)?,
                tenant: row.get(6)?,
            })
        })
        .optional()?)
    }

    /// What its attempt had; `ended`: it was the last.
    fn used(&self, gpu_ms: f64, ended: bool, now: Millis) -> Used {
        Used { at: now, model: self.model, tenant: self.tenant, gpu_ms, ended }
    }

    /// The change that an update of this row made; `changed`: how many rows it says it changed.
    fn changed(&self, changed: usize, state: JobState) -> Result<Change, StoreError> {
        if changed == 1 {
            return Ok(Change { number: self.number, state, version: self.version + 1, seq: self.last_seq + 1 });
        }
        Err(StoreError::Database(format!("job {} changed within a transaction", self.number)))
    }
}

fn state_of(row: &Row<'_>, index: usize) -> rusqlite::Result<JobState> {
    JobState::parse(row.get_ref(index)?.as_str()?).ok_or(rusqlite::Error::InvalidQuery)
}

pub(super) fn ms(duration: std::time::Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX / 4)
}

/// Stores an answer and its files; returns its row.
fn record_answer(c: &Connection, number: i64, answer: &StoredAnswer) -> Result<i64, StoreError> {
    execute(
        c,
        "INSERT INTO result (status, content_type, usage, body) VALUES (?1, ?2, ?3, ?4)",
        params![
            answer.status,
            answer.content_type,
            answer.usage.as_ref().map(Value::to_string),
            answer.body.as_deref(),
        ],
    )?;
    let row = c.last_insert_rowid();
    answer.files.iter().try_for_each(|file| record_file(c, number, file))?;
    Ok(row)
}

/// The error of a cancelled job; `cancel_code` says who asked.
fn cancel_error(c: &Connection, number: i64) -> Result<JobError, StoreError> {
    let code: Option<Option<String>> = c
        .prepare_cached("SELECT cancel_code FROM job WHERE number = ?1")?
        .query_row([number], |row| row.get(0))
        .optional()?;
    Ok(cancelled_by(code.flatten().as_deref().and_then(ErrorCode::parse)))
}

/// The error of a job that somebody cancelled.
pub fn cancelled_by_user() -> JobError {
    cancelled_by(Some(ErrorCode::CancelledByUser))
}

fn cancelled_by(code: Option<ErrorCode>) -> JobError {
    match code {
        Some(ErrorCode::ClientDisconnected) => {
            JobError::new(ErrorCode::ClientDisconnected, "nobody waited for the answer any more", true)
        }
        _ => JobError::new(ErrorCode::CancelledByUser, "cancelled by request", true),
    }
}

/// A job's endpoint is none of those that its model serves.
struct Unserved;

/// `None`: it is not queued any more.
fn claim_one(
    session: &mut Session,
    number: i64,
    (run, endpoints): (i64, Option<&[String]>),
    now: Millis,
) -> Result<Option<Result<ClaimedJob, Unserved>>, StoreError> {
    let c = &session.c;
    let found = c
        .prepare_cached(
            "SELECT job.number, job.state, job.version + 1, job.last_seq + 1, job.attempt + 1, job.tag, job.created_at, job.kind,
                    job.face, job.failures, job.crashes, job.max_attempts, job.stream, job.deadline, job.timeout_ms, job.crash,
                    request.endpoint, request.body
             FROM job JOIN request ON request.number = job.number WHERE job.number = ?1",
        )?
        .query_row([number], |row| {
            let (tag, created_at): (i64, Millis) = (row.get(5)?, row.get(6)?);
            let id = JobId::new(created_at, number, u64::try_from(tag).unwrap_or_default());
            let body: Option<&[u8]> = row.get_ref(17)?.as_blob_or_null()?;
            let claim = ClaimedJob {
                change: Change { state: JobState::Running, ..change(row)? },
                token: Token { id, attempt: row.get(4)? },
                kind: JobKind::parse(row.get_ref(7)?.as_str()?).ok_or(rusqlite::Error::InvalidQuery)?,
                face: Face::parse(row.get_ref(8)?.as_str()?).ok_or(rusqlite::Error::InvalidQuery)?,
                failures: row.get(9)?,
                crashes: row.get(10)?,
                max_attempts: row.get(11)?,
                stream: row.get(12)?,
                deadline: row.get(13)?,
                timeout_ms: row.get(14)?,
                crash: row.get(15)?,
                endpoint: row.get(16)?,
                body: Body::Inline(body.map(bytes::Bytes::copy_from_slice).unwrap_or_default()),
            };
            Ok((state_of(row, 1)?, body.is_none(), claim))
        })
        .optional()?;
    let Some((JobState::Queued, is_file, mut claim)) = found else {
        return Ok(None);
    };
    if endpoints.is_some_and(|served| !served.contains(&claim.endpoint)) {
        return Ok(Some(Err(Unserved)));
    }
    if is_file {
        claim.body = Body::File(request_file(c, number)?);
    }
    let changed = c
        .prepare_cached(
            "UPDATE job SET state = 'running', attempt = attempt + 1, started_at = ?3, started_seq = last_seq + 1, run = ?4,
                    not_before = NULL, version = version + 1, last_seq = last_seq + 1
             WHERE number = ?1 AND attempt = ?2 AND state = 'queued'",
        )?
        .execute(params![number, claim.token.attempt - 1, now, run])?;
    if changed != 1 {
        return Err(StoreError::Database(format!("job {number} changed within a transaction")));
    }
    session.touched.push(number);
    Ok(Some(Ok(claim)))
}

fn request_file(c: &Connection, number: i64) -> Result<StoredFile, StoreError> {
    let file = super::read::files_of(c, number)?.into_iter().find(|file| file.role == Role::Request);
    file.ok_or_else(|| StoreError::Database(format!("job {number} has neither a body nor a file of it")))
}

/// Writes down the start that the row tells, before the row tells another one.
pub(super) fn record_start(c: &Connection, number: i64) -> Result<(), StoreError> {
    let start = c
        .prepare_cached(
            "SELECT started_seq, attempt, started_at, run, model.name FROM job JOIN model ON model.id = job.model
             WHERE number = ?1 AND started_seq IS NOT NULL",
        )?
        .query_row([number], |row| {
            let (attempt, worker): (i64, String) = (row.get(1)?, row.get(4)?);
            Ok((row.get::<_, i64>(0)?, attempt, row.get::<_, Millis>(2)?, started(attempt, &worker, row.get(3)?)))
        })
        .optional()?;
    if let Some((seq, attempt, at, body)) = start {
        let change = Change { number, state: JobState::Running, version: 0, seq };
        record(c, change, attempt, "job.started", at, &body.to_string())?;
    }
    Ok(())
}

pub(super) fn requeue_one(
    session: &mut Session,
    token: Token,
    back: &GiveBack,
    now: Millis,
) -> Result<Option<Change>, StoreError> {
    let number = token.id.number;
    let Some(row) = Seen::of(&session.c, number)? else {
        return Ok(None);
    };
    if row.attempt != token.attempt || row.state != JobState::Running {
        return Ok(None);
    }
    record_start(&session.c, number)?;
    let error = back.error.as_ref().map(|error| json!(error).to_string());
    let changed = session
        .c
        .prepare_cached(
            "UPDATE job SET state = 'queued', failures = ?3, crashes = ?4, crash = ?5, not_before = ?6, requeued_at = ?7,
                    error = ?8, gpu_ms = gpu_ms + ?9, started_seq = NULL, run = NULL, version = version + 1, last_seq = last_seq + 1
             WHERE number = ?1 AND attempt = ?2 AND state = 'running'",
        )?
        .execute(params![
            number,
            token.attempt,
            back.failures,
            back.crashes,
            back.crash,
            back.not_before,
            now,
            error,
            back.gpu_ms
        ])?;
    let change = row.changed(changed, JobState::Queued)?;
    session.used.push(row.used(back.gpu_ms, false, now));
    session.touched.push(number);
    record(&session.c, change, token.attempt, "job.retrying", now, &retrying(token.attempt, back, change.seq))?;
    Ok(Some(change))
}

/// `None`: no such job.
fn cancel_one(
    session: &mut Session,
    id: JobId,
    code: ErrorCode,
    now: Millis,
    settings: &StorageSettings,
) -> Result<Option<Cancelled>, StoreError> {
    let found = session
        .c
        .prepare_cached(
            "SELECT state, attempt, model.name, priority FROM job JOIN model ON model.id = job.model
             WHERE number = ?1 AND tag = ?2 AND created_at = ?3",
        )?
        .query_row(params![id.number, int(id.tag), id.created_ms], |row| {
            let state = JobState::parse(row.get_ref(0)?.as_str()?).ok_or(rusqlite::Error::InvalidQuery)?;
            Ok((state, row.get::<_, i64>(1)?, row.get(2)?, row.get(3)?))
        })
        .optional()?;
    let Some((state, attempt, model, priority)) = found else {
        return Ok(None);
    };
    let asked = |sql: &str| -> Result<(), StoreError> {
        let changed = session.c.prepare_cached(sql)?.execute(params![id.number, code.as_str()])?;
        if changed == 1 { Ok(()) } else { Err(StoreError::Database("the job changed within a transaction".to_owned())) }
    };
    let change = match state {
        JobState::Queued => {
            asked("UPDATE job SET cancel_code = ?2 WHERE number = ?1 AND state = 'queued'")?;
            end_one(session, Guard::Queued(id.number), &End::Cancelled, 0.0, now, settings)?
        }
        JobState::Running => {
            asked(
                "UPDATE job SET state = 'cancelling', cancel_code = ?2, version = version + 1, last_seq = last_seq + 1
                 WHERE number = ?1 AND state = 'running'",
            )?;
            let change = session
                .c
                .prepare_cached("SELECT number, state, version, last_seq FROM job WHERE number = ?1")?
                .query_row([id.number], change)?;
            session.touched.push(id.number);
            record(&session.c, change, attempt, "job.cancelling", now, "{}")?;
            Some(change)
        }
        _ => None,
    };
    let state = change.map_or(state, |change| change.state);
    Ok(Some(Cancelled { change, state, model, priority }))
}
