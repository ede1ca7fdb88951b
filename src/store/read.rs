//! Reads: point look-ups, lists, event logs. On threads and `query_only` connections of their own, so they never hold up
//! the writer; where the database's file admits one connection only, on the writer's.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use rusqlite::types::Value as SqlValue;
use rusqlite::{Connection, OpenFlags, OptionalExtension, Row, params};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::oneshot;

use super::StoreError;
use super::files::{Body, Files, Role, StoredFile};
use super::live::Live;
use super::quota;
use super::recovery::{self, QueuedJob};
use super::verbs;
use super::writer::{Kind, Writer};
use crate::domain::worker::Answer;
use crate::domain::{BatchId, Face, Job, JobId, JobKind, JobState, Millis, StateReason};

/// Threads that read.
const READERS: usize = 3;

/// Which jobs a list shows, newest first unless `ascending`.
#[derive(Clone, Debug, Default)]
pub struct JobFilter {
    /// Only in this state.
    pub state: Option<JobState>,
    /// Only for this model.
    pub model: Option<String>,
    /// Only of this kind.
    pub kind: Option<JobKind>,
    /// Only of this batch.
    pub batch: Option<BatchId>,
    /// Only with all of these pairs.
    pub metadata: Vec<(String, String)>,
    /// Only of this tenant.
    pub tenant: Option<String>,
    /// Start after this job.
    pub after: Option<JobId>,
    /// Oldest first.
    pub ascending: bool,
    /// 1 to 100.
    pub limit: u32,
}

/// One page of a list.
#[derive(Clone, Debug)]
pub struct JobPage {
    /// In order.
    pub jobs: Vec<Job>,
    /// Whether more follow.
    pub has_more: bool,
}

/// One persisted event of a job.
#[derive(Clone, Debug, PartialEq)]
pub struct EventRow {
    /// Gapless from 1.
    pub seq: i64,
    /// Attempt it belongs to.
    pub attempt: i64,
    /// For example `job.progress`.
    pub kind: String,
    /// When.
    pub at: Millis,
    /// Its own fields (without type, job_id, seq, ts), a JSON object.
    pub body: serde_json::Value,
}

/// One stored file of a job.
#[derive(Clone, Debug, PartialEq)]
pub struct Artifact {
    /// `art_<n>` within the job, n from 0.
    pub id: String,
    /// For example `image-0.png`.
    pub name: String,
    /// For example `image/png`.
    pub mime: String,
    /// Size.
    pub bytes: u64,
    /// Hex.
    pub sha256: String,
}

impl From<StoredFile> for Artifact {
    fn from(file: StoredFile) -> Self {
        Self { id: file.artifact_id(), name: file.name, mime: file.mime, bytes: file.bytes, sha256: file.sha256 }
    }
}

/// Sizes of the database, for metrics and quota.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sizes {
    /// The file of the database.
    pub database_bytes: u64,
    /// Of these, pages in use.
    pub used_bytes: u64,
    /// Of these, pages that are free.
    pub free_bytes: u64,
    /// The file of the write-ahead log.
    pub wal_bytes: u64,
    /// How long the oldest job to be deleted has been waiting for it.
    pub purge_lag_ms: i64,
}

type Query = Box<dyn FnOnce(&Connection) + Send>;

#[derive(Clone)]
enum Way {
    /// Threads with connections of their own.
    Threads(std::sync::mpsc::Sender<Query>),
    /// The writer's connection.
    Writer(Writer),
}

/// Read side of the store. Cheap to clone.
#[derive(Clone)]
pub struct Reader {
    way: Way,
    files: Files,
    live: Live,
    database: Arc<PathBuf>,
}

const JOB_COLUMNS: &str =
    "job.number, job.tag, job.kind, job.face, model.name, tenant.name, job.batch, job.state, job.priority,
    job.attempt, job.failures, job.crashes, job.max_attempts, job.version, job.batch_key, job.stream, job.created_at,
    job.requeued_at, job.started_at, job.finished_at, job.not_before, job.start_deadline, job.deadline, job.timeout_ms,
    job.error, job.load_ms, job.emptied_at, job.delivered_at, request.endpoint, request.custom_id, request.metadata, request.present,
    request.retry_of, result.usage, job.gpu_ms";
const JOB_TABLES: &str = "job JOIN model ON model.id = job.model JOIN tenant ON tenant.id = job.tenant
    LEFT JOIN request ON request.number = job.number LEFT JOIN result ON result.id = job.result";

fn job_of(row: &Row<'_>) -> Result<Job, StoreError> {
    let text = |index: usize| -> Result<String, StoreError> { Ok(row.get::<_, String>(index)?) };
    let created_at: Millis = row.get(16)?;
    let tag = u64::try_from(row.get::<_, i64>(1)?).map_err(|_| unreadable("tag"))?;
    let kind = JobKind::parse(&text(2)?).ok_or_else(|| unreadable("kind"))?;
    let state = JobState::parse(&text(7)?).ok_or_else(|| unreadable("state"))?;
    let attempt: i64 = row.get(9)?;
    let not_before: Option<Millis> = row.get(20)?;
    let optional = |index: usize| -> Result<Option<String>, StoreError> { Ok(row.get(index)?) };
    Ok(Job {
        id: JobId::new(created_at, row.get(0)?, tag),
        kind,
        endpoint: optional(28)?.unwrap_or_default(),
        model: text(4)?,
        tenant: text(5)?,
        batch: row.get::<_, Option<i64>>(6)?.map(BatchId),
        custom_id: optional(29)?,
        face: Face::parse(&text(3)?).ok_or_else(|| unreadable("face"))?,
        state,
        state_reason: (state == JobState::Queued).then(|| reason(attempt, not_before)),
        priority: row.get(8)?,
        attempt,
        failures: row.get(10)?,
        crashes: row.get(11)?,
        max_attempts: row.get(12)?,
        version: row.get(13)?,
        batch_key: row.get(14)?,
        stream: row.get(15)?,
        present: optional(31)?.map(|text| parse("present", &text)).transpose()?.unwrap_or_default(),
        created_at,
        queued_at: row.get::<_, Option<Millis>>(17)?.unwrap_or(created_at),
        started_at: row.get(18)?,
        finished_at: row.get(19)?,
        not_before,
        start_deadline: row.get(21)?,
        deadline: row.get(22)?,
        timeout_ms: row.get(23)?,
        metadata: optional(30)?.map(|text| parse("metadata", &text)).transpose()?.unwrap_or_default(),
        retry_of: optional(32)?.and_then(|text| JobId::from_str(&text).ok()),
        error: optional(24)?.map(|text| parse("error", &text)).transpose()?,
        usage: optional(33)?.map(|text| parse("usage", &text)).transpose()?,
        load_ms: row.get(25)?,
        gpu_ms: row.get(34)?,
        emptied_at: row.get(26)?,
        delivered_at: row.get(27)?,
    })
}

/// Why a queued job waits, as far as its row knows.
fn reason(attempt: i64, not_before: Option<Millis>) -> StateReason {
    match not_before {
        Some(_) if attempt > 0 => StateReason::RetryBackoff,
        Some(_) => StateReason::Scheduled,
        None => StateReason::WaitingForModel,
    }
}

fn unreadable(column: &str) -> StoreError {
    StoreError::Database(format!("column `{column}` holds a value this version does not know"))
}

fn parse<T: DeserializeOwned>(column: &str, text: &str) -> Result<T, StoreError> {
    serde_json::from_str(text).map_err(|error| StoreError::Database(format!("column `{column}`: {error}")))
}

impl Reader {
    /// Starts the reading threads; they end with the last `Reader`.
    pub(super) fn on_threads(database: &Path, files: Files, live: Live) -> Result<Self, StoreError> {
        let (sender, receiver) = std::sync::mpsc::channel::<Query>();
        let receiver = Arc::new(Mutex::new(receiver));
        for _ in 0..READERS {
            let (connection, receiver) = (reading_connection(database)?, receiver.clone());
            std::thread::Builder::new()
                .name("store-reader".into())
                .spawn(move || read_until_closed(&connection, &receiver))
                .map_err(|source| StoreError::File { path: "a reading thread of the store".into(), source })?;
        }
        Ok(Self { way: Way::Threads(sender), files, live, database: Arc::new(database.to_owned()) })
    }

    /// Reads on the writer's connection.
    pub(super) fn on_writer(database: &Path, files: Files, live: Live, writer: Writer) -> Self {
        Self { way: Way::Writer(writer), files, live, database: Arc::new(database.to_owned()) }
    }

    pub(super) async fn read<T, F>(&self, query: F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: Fn(&Connection) -> Result<T, StoreError> + Send + 'static,
    {
        match &self.way {
            Way::Writer(writer) => super::writer::answer(writer.apply(Kind::Change, 0, move |s| query(&s.c))).await,
            Way::Threads(sender) => {
                let (reply, answer) = oneshot::channel();
                let query: Query = Box::new(move |c| drop(reply.send(query(c))));
                sender.send(query).map_err(|_| StoreError::Stopped)?;
                let read: Result<T, StoreError> = answer.await.unwrap_or(Err(StoreError::Stopped));
                read.map_err(|error| error.in_database(&self.database))
            }
        }
    }

    /// The job, if the id's tag matches too. A live one comes from memory if somebody looked since its last change.
    pub async fn job(&self, id: JobId) -> Result<Job, StoreError> {
        let job = match self.live.get(id.number) {
            Ok(job) => job,
            Err(ticket) => {
                let job = Arc::new(self.read(move |c| job_by_number(c, id.number)).await?.ok_or(StoreError::NotFound)?);
                self.live.put(&ticket, &job);
                job
            }
        };
        if job.id == id { Ok(Arc::unwrap_or_clone(job)) } else { Err(StoreError::NotFound) }
    }

    /// The jobs of the submission that began with number `first`, as they are now, as far as they are still there.
    pub(super) async fn replayed(&self, first: i64) -> Result<Vec<Job>, StoreError> {
        let jobs = self
            .read(move |c| {
                let Some(job) = job_by_number(c, first)? else {
                    return Ok(Vec::new());
                };
                let Some(batch) = job.batch else {
                    return Ok(vec![job]);
                };
                let sql = format!("SELECT {JOB_COLUMNS} FROM {JOB_TABLES} WHERE job.batch = ?1 ORDER BY job.number");
                jobs_of(c, &sql, &[&batch.0])
            })
            .await?;
        if jobs.is_empty() { Err(StoreError::Expired) } else { Ok(jobs) }
    }

    /// A page of jobs.
    pub async fn jobs(&self, filter: &JobFilter) -> Result<JobPage, StoreError> {
        let filter = filter.clone();
        self.read(move |c| page(c, &filter)).await
    }

    /// Events with seq > `after`, in order, at most `limit`. What the row tells (the submission, the start of the current
    /// attempt, the end) is among them.
    pub async fn events(&self, id: JobId, after: i64, limit: u32) -> Result<Vec<EventRow>, StoreError> {
        self.read(move |c| events(c, id.number, after, limit)).await
    }

    /// The latest event of one kind within an attempt.
    pub async fn latest_event(
        &self,
        id: JobId,
        attempt: i64,
        kind: &'static str,
    ) -> Result<Option<EventRow>, StoreError> {
        self.read(move |c| {
            let mut statement = c.prepare_cached(
                "SELECT seq, attempt, kind, at, body FROM event WHERE number = ?1 AND attempt = ?2 AND kind = ?3
                 ORDER BY seq DESC LIMIT 1",
            )?;
            let mut rows = statement.query(params![id.number, attempt, kind])?;
            rows.next()?.map(event_of).transpose()
        })
        .await
    }

    /// The forwarded body as it was submitted.
    pub async fn body(&self, id: JobId) -> Result<Bytes, StoreError> {
        let number = id.number;
        let found: Option<Body> = self
            .read(move |c| {
                let row: Option<Option<Vec<u8>>> = c
                    .prepare_cached("SELECT body FROM request WHERE number = ?1")?
                    .query_row([number], |row| row.get(0))
                    .optional()?;
                Ok(match row {
                    None => None,
                    Some(Some(body)) => Some(Body::Inline(body.into())),
                    Some(None) => files_of(c, number)?.into_iter().find(|f| f.role == Role::Request).map(Body::File),
                })
            })
            .await?;
        match found.ok_or(StoreError::Expired)? {
            Body::Inline(bytes) => Ok(bytes),
            Body::File(file) => self.file(id, &file).await,
        }
    }

    /// Reads a job's file. Its retention may end between the look at the row and this one.
    async fn file(&self, id: JobId, file: &StoredFile) -> Result<Bytes, StoreError> {
        let read = self.files.read(file).await;
        match read {
            Err(error) if error.is_lost_file() => Err(self.lost(id, error).await),
            other => other,
        }
    }

    /// What a read that met a lost file ends with: `Expired`, if the job was emptied meanwhile, else the error, and the file is
    /// counted.
    async fn lost(&self, id: JobId, error: StoreError) -> StoreError {
        if let Err(expired) = self.still_there(id).await {
            return expired;
        }
        self.files.lost.met(&error);
        error
    }

    /// `Expired`, if the job was emptied.
    async fn still_there(&self, id: JobId) -> Result<(), StoreError> {
        let job = self.read(move |c| job_by_number(c, id.number)).await?;
        if job.is_some_and(|job| job.emptied_at.is_none()) { Ok(()) } else { Err(StoreError::Expired) }
    }

    /// Reads a body that a claim found.
    pub async fn load(&self, body: &Body) -> Result<Bytes, StoreError> {
        match body {
            Body::Inline(bytes) => Ok(bytes.clone()),
            Body::File(file) => self.files.read(file).await.inspect_err(|error| {
                if error.is_lost_file() {
                    self.files.lost.met(error);
                }
            }),
        }
    }

    /// The stored answer of a succeeded job, whole: images inlined again as `b64_json`.
    pub async fn answer(&self, id: JobId) -> Result<Option<Answer>, StoreError> {
        let Some((kept, files)) = self.kept(id).await? else {
            return Ok(None);
        };
        let Kept { status, content_type, usage, body } = kept;
        let role = |role| files.iter().find(move |file: &&StoredFile| file.role == role);
        let whole = match (body, role(Role::Response), role(Role::Artifact)) {
            (Some(body), ..) => self.files.inline(body, &files).await,
            (None, Some(file), _) => match self.files.read(file).await {
                Ok(body) => self.files.inline(body, &files).await,
                Err(error) => Err(error),
            },
            (None, None, Some(file)) => self.files.read(file).await,
            (None, None, None) => {
                return Err(StoreError::Database("an answer has neither a body nor a file".to_owned()));
            }
        };
        let body = match whole {
            Err(error) if error.is_lost_file() => return Err(self.lost(id, error).await),
            other => other?,
        };
        Ok(Some(Answer { status, content_type, body, usage }))
    }

    /// The JSON answer of a succeeded job as it is kept: the place of an image has `{"$artifact": "art_<n>"}`. `None`: no
    /// answer, or one that is an artifact alone.
    pub async fn kept_body(&self, id: JobId) -> Result<Option<Bytes>, StoreError> {
        let Some((kept, files)) = self.kept(id).await? else {
            return Ok(None);
        };
        match (kept.body, files.iter().find(|file| file.role == Role::Response)) {
            (Some(body), _) => Ok(Some(body)),
            (None, Some(file)) => Ok(Some(self.file(id, file).await?)),
            (None, None) => Ok(None),
        }
    }

    async fn kept(&self, id: JobId) -> Result<Option<(Kept, Vec<StoredFile>)>, StoreError> {
        self.read(move |c| {
            let row = c
                .prepare_cached(
                    "SELECT result.status, result.content_type, result.usage, result.body
                     FROM job JOIN result ON result.id = job.result WHERE job.number = ?1",
                )?
                .query_row([id.number], |row| {
                    let usage: Option<String> = row.get(2)?;
                    let body: Option<Vec<u8>> = row.get(3)?;
                    Ok((row.get::<_, u16>(0)?, row.get::<_, String>(1)?, usage, body))
                })
                .optional()?;
            let Some((status, content_type, usage, body)) = row else {
                return Ok(None);
            };
            let usage = usage.map(|text| parse("usage", &text)).transpose()?;
            let kept = Kept { status, content_type, usage, body: body.map(Bytes::from) };
            Ok(Some((kept, files_of(c, id.number)?)))
        })
        .await
    }

    /// The job's artifacts, in order.
    pub async fn artifacts(&self, id: JobId) -> Result<Vec<Artifact>, StoreError> {
        Ok(self.artifact_files(id).await?.into_iter().map(Artifact::from).collect())
    }

    async fn artifact_files(&self, id: JobId) -> Result<Vec<StoredFile>, StoreError> {
        let files = self.read(move |c| files_of(c, id.number)).await?;
        Ok(files.into_iter().filter(|file| file.role == Role::Artifact).collect())
    }

    /// An artifact's bytes, or the part `range` (start, end exclusive) of them. The whole file's checksum is verified.
    pub async fn artifact_bytes(
        &self,
        id: JobId,
        artifact: &str,
        range: Option<(u64, u64)>,
    ) -> Result<Bytes, StoreError> {
        let files = self.artifact_files(id).await?;
        let file = files.iter().find(|file| file.artifact_id() == artifact).ok_or(StoreError::NotFound)?;
        let bytes = self.file(id, file).await?;
        let place = |n: u64| usize::try_from(n).unwrap_or(usize::MAX).min(bytes.len());
        Ok(match range {
            None => bytes,
            Some((start, end)) => bytes.slice(place(start)..place(end.max(start))),
        })
    }

    /// Live jobs whose callers hold the line; asked once, after a restart.
    pub async fn live_sync_jobs(&self) -> Result<Vec<JobId>, StoreError> {
        self.read(|c| {
            let mut found = Vec::new();
            let mut statement = c.prepare(
                "SELECT created_at, number, tag FROM job INDEXED BY job_live WHERE finished_at IS NULL AND face = 'sync'",
            )?;
            let mut rows = statement.query([])?;
            while let Some(row) = rows.next()? {
                let tag = u64::try_from(row.get::<_, i64>(2)?).map_err(|_| unreadable("tag"))?;
                found.push(JobId::new(row.get(0)?, row.get(1)?, tag));
            }
            Ok(found)
        })
        .await
    }

    /// All queued jobs, oldest first, in pages of at most `size`. Pages are read ahead, side by side. For the start: what is
    /// submitted meanwhile may be missing.
    pub async fn queued(
        &self,
        size: usize,
    ) -> Result<impl Stream<Item = Result<Vec<QueuedJob>, StoreError>> + use<>, StoreError> {
        let pages = self.read(move |c| recovery::pages_of_live(c, size)).await?;
        let reader = self.clone();
        let read = move |page| {
            let reader = reader.clone();
            async move { reader.read(move |c| recovery::load_queued(c, &page)).await }
        };
        Ok(stream::iter(pages).map(read).buffered(READERS))
    }

    /// Of the queued jobs of these models, those whose endpoint is none of what their model serves: priority and number, by
    /// model.
    pub async fn unserved(
        &self,
        served: Vec<(String, Vec<String>)>,
    ) -> Result<Vec<(String, Vec<(u8, i64)>)>, StoreError> {
        let mut found = Vec::new();
        for (model, endpoints) in served {
            let name = model.clone();
            let jobs = self.read(move |c| recovery::load_unserved(c, &name, &endpoints)).await?;
            found.extend((!jobs.is_empty()).then_some((model, jobs)));
        }
        Ok(found)
    }

    /// Sizes of the database.
    pub async fn sizes(&self, now: Millis) -> Result<Sizes, StoreError> {
        let mut wal = self.database.as_os_str().to_owned();
        wal.push("-wal");
        let (database, wal) = (self.database.clone(), PathBuf::from(wal));
        self.read(move |c| {
            let length = |path: &Path| std::fs::metadata(path).map_or(0, |file| file.len());
            let (database_bytes, wal_bytes) = (length(&database), length(&wal));
            let (used_bytes, free_bytes) = quota::pages(c)?;
            let first: Option<Millis> = c
                .prepare_cached("SELECT min(expires_at) FROM job INDEXED BY job_expiry WHERE expires_at IS NOT NULL")?
                .query_row([], |row| row.get(0))?;
            let purge_lag_ms = first.map_or(0, |at| (now - at).max(0));
            Ok(Sizes { database_bytes, used_bytes, free_bytes, wal_bytes, purge_lag_ms })
        })
        .await
    }
}

impl Reader {
    /// Bytes of the bodies and files of jobs that have not ended, read some at a time; `None`: they are too many.
    pub(super) async fn live_bytes(&self) -> Result<Option<u64>, StoreError> {
        if self.read(|c| Ok(quota::are_more_live(c, quota::WEIGHED_MAX)?)).await? {
            return Ok(None);
        }
        let (mut bytes, mut after) = (0, Some(0));
        while let Some(number) = after {
            let weighed = self.read(move |c| Ok(quota::weigh(c, number)?)).await?;
            (bytes, after) = (bytes + weighed.bytes, weighed.next);
        }
        Ok(Some(bytes))
    }
}

/// A row of `result`.
struct Kept {
    status: u16,
    content_type: String,
    usage: Option<Value>,
    body: Option<Bytes>,
}

fn reading_connection(database: &Path) -> Result<Connection, StoreError> {
    let c = Connection::open_with_flags(database, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
    c.set_prepared_statement_cache_capacity(32);
    c.busy_timeout(Duration::from_secs(5))?;
    c.execute_batch("PRAGMA query_only = ON; PRAGMA temp_store = MEMORY; PRAGMA trusted_schema = OFF;")?;
    let is_read_only: i64 = c.pragma_query_value(None, "query_only", |row| row.get(0))?;
    if is_read_only != 1 {
        return Err(StoreError::Unusable(format!("{}: query_only could not be set", database.display())));
    }
    Ok(c)
}

fn read_until_closed(c: &Connection, queries: &Mutex<std::sync::mpsc::Receiver<Query>>) {
    loop {
        let next = queries.lock().unwrap_or_else(PoisonError::into_inner).recv();
        match next {
            Ok(query) => query(c),
            Err(_) => return,
        }
    }
}

pub(super) fn job_by_number(c: &Connection, number: i64) -> Result<Option<Job>, StoreError> {
    let sql = format!("SELECT {JOB_COLUMNS} FROM {JOB_TABLES} WHERE job.number = ?1");
    Ok(jobs_of(c, &sql, &[&number])?.pop())
}

fn jobs_of(c: &Connection, sql: &str, values: &[&dyn rusqlite::ToSql]) -> Result<Vec<Job>, StoreError> {
    let mut statement = c.prepare_cached(sql)?;
    let mut rows = statement.query(values)?;
    let mut jobs = Vec::new();
    while let Some(row) = rows.next()? {
        jobs.push(job_of(row)?);
    }
    Ok(jobs)
}

fn page(c: &Connection, filter: &JobFilter) -> Result<JobPage, StoreError> {
    let limit = filter.limit.clamp(1, 100) as usize;
    let mut sql = format!("SELECT {JOB_COLUMNS} FROM {JOB_TABLES} WHERE 1 = 1");
    let mut values: Vec<SqlValue> = Vec::new();
    let mut and = |condition: &str, given: Vec<SqlValue>| {
        sql.push_str(" AND ");
        sql.push_str(condition);
        values.extend(given);
    };
    let text = |text: &str| SqlValue::Text(text.to_owned());
    if let Some(state) = filter.state {
        // Spelt out, so that the partial index is seen to fit.
        let live = if state.is_terminal() { "" } else { "job.finished_at IS NULL AND " };
        and(&format!("{live}job.state = '{state}'"), vec![]);
    }
    if let Some(model) = &filter.model {
        and("job.model = (SELECT id FROM model WHERE name = ?)", vec![text(model)]);
    }
    if let Some(kind) = filter.kind {
        and(&format!("job.kind = '{kind}'"), vec![]);
    }
    if let Some(batch) = filter.batch {
        and("job.batch = ?", vec![SqlValue::Integer(batch.0)]);
    }
    if let Some(tenant) = &filter.tenant {
        and("job.tenant = (SELECT id FROM tenant WHERE name = ?)", vec![text(tenant)]);
    }
    for (key, value) in &filter.metadata {
        // `json_each` instead of a JSON path, so that any key can be asked for.
        and(
            "EXISTS (SELECT 1 FROM json_each(request.metadata) AS pair WHERE pair.key = ? AND pair.value = ?)",
            vec![text(key), text(value)],
        );
    }
    if let Some(after) = filter.after {
        and(if filter.ascending { "job.number > ?" } else { "job.number < ?" }, vec![SqlValue::Integer(after.number)]);
    }
    sql.push_str(if filter.ascending { " ORDER BY job.number ASC LIMIT " } else { " ORDER BY job.number DESC LIMIT " });
    sql.push_str(&(limit + 1).to_string());
    let values: Vec<&dyn rusqlite::ToSql> = values.iter().map(|value| value as &dyn rusqlite::ToSql).collect();
    let mut jobs = jobs_of(c, &sql, &values)?;
    let has_more = jobs.len() > limit;
    jobs.truncate(limit);
    Ok(JobPage { jobs, has_more })
}

fn event_of(row: &Row<'_>) -> Result<EventRow, StoreError> {
    let body: String = row.get(4)?;
    Ok(EventRow {
        seq: row.get(0)?,
        attempt: row.get(1)?,
        kind: row.get(2)?,
        at: row.get(3)?,
        body: parse("event.body", &body)?,
    })
}

fn events(c: &Connection, number: i64, after: i64, limit: u32) -> Result<Vec<EventRow>, StoreError> {
    let mut statement = c.prepare_cached(
        "SELECT seq, attempt, kind, at, body FROM event WHERE number = ?1 AND seq > ?2 ORDER BY seq LIMIT ?3",
    )?;
    let mut rows = statement.query(params![number, after, limit])?;
    let mut events = Vec::new();
    while let Some(row) = rows.next()? {
        events.push(event_of(row)?);
    }
    for told in told_by_row(c, number)? {
        if told.seq > after && !events.iter().any(|event| event.seq == told.seq) {
            events.push(told);
        }
    }
    events.sort_by_key(|event| event.seq);
    events.truncate(limit as usize);
    Ok(events)
}

/// The events that the job's row tells: the submission, the start of the current attempt, the end.
fn told_by_row(c: &Connection, number: i64) -> Result<Vec<EventRow>, StoreError> {
    let row = c
        .prepare_cached(
            "SELECT created_at, attempt, started_seq, started_at, run, model.name, state, last_seq, finished_at, error, emptied_at
             FROM job JOIN model ON model.id = job.model WHERE number = ?1",
        )?
        .query_row([number], |row| {
            let start: (Option<i64>, Option<Millis>, Option<i64>, String) =
                (row.get(2)?, row.get(3)?, row.get(4)?, row.get(5)?);
            let end: (String, i64, Option<Millis>, Option<String>) = (row.get(6)?, row.get(7)?, row.get(8)?, row.get(9)?);
            Ok((row.get::<_, Millis>(0)?, row.get::<_, i64>(1)?, start, end, row.get::<_, Option<Millis>>(10)?))
        })
        .optional()?;
    let Some((
        created_at,
        attempt,
        (started_seq, started_at, run, worker),
        (state, last_seq, finished_at, error),
        emptied,
    )) = row
    else {
        return Ok(Vec::new());
    };
    let event = |seq, attempt, kind: &str, at, body| EventRow { seq, attempt, kind: kind.to_owned(), at, body };
    let mut told = Vec::with_capacity(3);
    if emptied.is_none() {
        told.push(event(1, 0, "job.queued", created_at, json!({})));
        if let (Some(seq), Some(at)) = (started_seq, started_at) {
            told.push(event(seq, attempt, "job.started", at, verbs::started(attempt, &worker, run)));
        }
    }
    if let Some(at) = finished_at {
        let body = match error {
            Some(error) => json!({"error": parse::<Value>("error", &error)?}),
            None => json!({}),
        };
        told.push(event(last_seq, attempt, &format!("job.{state}"), at, body));
    }
    Ok(told)
}

/// The job's files, in order.
pub(super) fn files_of(c: &Connection, number: i64) -> Result<Vec<StoredFile>, StoreError> {
    let mut statement = c.prepare_cached(
        "SELECT role, position, name, mime, bytes, sha256, path FROM file WHERE number = ?1 ORDER BY role, position",
    )?;
    let mut rows = statement.query([number])?;
    let mut files = Vec::new();
    while let Some(row) = rows.next()? {
        files.push(file_of(row)?);
    }
    Ok(files)
}

/// Reads `role, position, name, mime, bytes, sha256, path`.
pub(super) fn file_of(row: &Row<'_>) -> Result<StoredFile, StoreError> {
    Ok(StoredFile {
        role: Role::parse(row.get_ref(0)?.as_str().unwrap_or_default()).ok_or_else(|| unreadable("role"))?,
        position: row.get(1)?,
        name: row.get(2)?,
        mime: row.get(3)?,
        bytes: row.get::<_, i64>(4)?.unsigned_abs(),
        sha256: row.get(5)?,
        path: row.get(6)?,
    })
}
