//! Reads: point look-ups, lists, event logs. Through `query_only` connections of their own, so they never hold up the
//! writer.

use std::str::FromStr;
use std::sync::Arc;

use bytes::Bytes;
use serde::de::DeserializeOwned;
use sqlx::sqlite::SqlitePool;
use sqlx::{FromRow, QueryBuilder, Sqlite};

use super::StoreError;
use super::artifacts::Artifacts;
use crate::domain::worker::Answer;
use crate::domain::{BatchId, Face, Job, JobId, JobKind, JobState, Millis, StateReason};

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

/// Read side of the store. Cheap to clone.
#[derive(Clone)]
pub struct Reader {
    inner: Arc<ReaderInner>,
}

struct ReaderInner {
    pool: SqlitePool,
    artifacts: Artifacts,
}

/// status, content_type, body, artifact, usage
type ResultRow = (i64, String, Option<Vec<u8>>, Option<i64>, Option<String>);

#[derive(FromRow)]
struct JobRow {
    number: i64,
    tag: i64,
    kind: String,
    face: String,
    model_name: String,
    tenant_name: String,
    batch: Option<i64>,
    state: String,
    state_reason: Option<String>,
    priority: i64,
    attempt: i64,
    failures: i64,
    crashes: i64,
    max_attempts: i64,
    version: i64,
    batch_key: i64,
    stream: i64,
    created_at: i64,
    queued_at: i64,
    started_at: Option<i64>,
    finished_at: Option<i64>,
    not_before: Option<i64>,
    start_deadline: Option<i64>,
    deadline: Option<i64>,
    timeout_ms: i64,
    endpoint: String,
    custom_id: Option<String>,
    metadata: String,
    present: String,
    retry_of: Option<String>,
    error: Option<String>,
    usage: Option<String>,
    load_ms: i64,
}

impl JobRow {
    fn into_job(self) -> Result<Job, StoreError> {
        let tag = u64::try_from(self.tag).map_err(|_| unreadable("tag"))?;
        Ok(Job {
            id: JobId::new(self.created_at, self.number, tag),
            kind: JobKind::parse(&self.kind).ok_or_else(|| unreadable("kind"))?,
            endpoint: self.endpoint,
            model: self.model_name,
            tenant: self.tenant_name,
            batch: self.batch.map(BatchId),
            custom_id: self.custom_id,
            face: Face::parse(&self.face).ok_or_else(|| unreadable("face"))?,
            state: JobState::parse(&self.state).ok_or_else(|| unreadable("state"))?,
            state_reason: self.state_reason.as_deref().and_then(StateReason::parse),
            priority: u8::try_from(self.priority).map_err(|_| unreadable("priority"))?,
            attempt: self.attempt,
            failures: count(self.failures),
            crashes: count(self.crashes),
            max_attempts: count(self.max_attempts),
            version: self.version,
            batch_key: self.batch_key,
            stream: self.stream != 0,
            present: json("present", &self.present)?,
            created_at: self.created_at,
            queued_at: self.queued_at,
            started_at: self.started_at,
            finished_at: self.finished_at,
            not_before: self.not_before,
            start_deadline: self.start_deadline,
            deadline: self.deadline,
            timeout_ms: self.timeout_ms,
            metadata: json("metadata", &self.metadata)?,
            retry_of: self.retry_of.as_deref().and_then(|text| JobId::from_str(text).ok()),
            error: self.error.as_deref().map(|text| json("error", text)).transpose()?,
            usage: self.usage.as_deref().map(|text| json("usage", text)).transpose()?,
            load_ms: self.load_ms,
        })
    }
}

fn count(value: i64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

fn unreadable(column: &str) -> StoreError {
    StoreError::Database(format!("column `{column}` holds a value this version does not know"))
}

fn json<T: DeserializeOwned>(column: &str, text: &str) -> Result<T, StoreError> {
    serde_json::from_str(text).map_err(|error| StoreError::Database(format!("column `{column}`: {error}")))
}

impl Reader {
    pub(super) fn new(pool: SqlitePool, artifacts: Artifacts) -> Self {
        Self { inner: Arc::new(ReaderInner { pool, artifacts }) }
    }

    /// The job, if the id's tag matches too.
    pub async fn job(&self, id: JobId) -> Result<Job, StoreError> {
        let row: Option<JobRow> = sqlx::query_as("SELECT * FROM job_full WHERE number = ?")
            .bind(id.number)
            .fetch_optional(&self.inner.pool)
            .await?;
        let job = row.ok_or(StoreError::NotFound)?.into_job()?;
        if job.id == id { Ok(job) } else { Err(StoreError::NotFound) }
    }

    /// A page of jobs.
    pub async fn jobs(&self, filter: &JobFilter) -> Result<JobPage, StoreError> {
        let limit = i64::from(filter.limit.clamp(1, 100));
        let mut query = QueryBuilder::<Sqlite>::new("SELECT * FROM job_full WHERE 1 = 1");
        if let Some(state) = filter.state {
            query.push(" AND state = ").push_bind(state.as_str());
        }
        if let Some(model) = &filter.model {
            query.push(" AND model_name = ").push_bind(model.clone());
        }
        if let Some(kind) = filter.kind {
            query.push(" AND kind = ").push_bind(kind.as_str());
        }
        if let Some(batch) = filter.batch {
            query.push(" AND batch = ").push_bind(batch.0);
        }
        if let Some(tenant) = &filter.tenant {
            query.push(" AND tenant_name = ").push_bind(tenant.clone());
        }
        for (key, value) in &filter.metadata {
            // `json_each` instead of a JSON path, so that any key can be asked for.
            query
                .push(" AND EXISTS (SELECT 1 FROM json_each(metadata) AS pair WHERE pair.key = ")
                .push_bind(key.clone());
            query.push(" AND pair.value = ").push_bind(value.clone()).push(")");
        }
        if let Some(after) = filter.after {
            query.push(if filter.ascending { " AND number > " } else { " AND number < " }).push_bind(after.number);
        }
        query.push(if filter.ascending { " ORDER BY number ASC LIMIT " } else { " ORDER BY number DESC LIMIT " });
        query.push_bind(limit + 1);
        let rows: Vec<JobRow> = query.build_query_as().fetch_all(&self.inner.pool).await?;
        let mut jobs = rows.into_iter().map(JobRow::into_job).collect::<Result<Vec<_>, _>>()?;
        let has_more = jobs.len() as i64 > limit;
        jobs.truncate(usize::try_from(limit).unwrap_or(100));
        Ok(JobPage { jobs, has_more })
    }

    /// Events with seq > `after`, in order, at most `limit`.
    pub async fn events(&self, id: JobId, after: i64, limit: u32) -> Result<Vec<EventRow>, StoreError> {
        let rows: Vec<(i64, i64, String, i64, String)> = sqlx::query_as(
            "SELECT seq, attempt, kind, at, body FROM event WHERE number = ? AND seq > ? ORDER BY seq LIMIT ?",
        )
        .bind(id.number)
        .bind(after)
        .bind(i64::from(limit))
        .fetch_all(&self.inner.pool)
        .await?;
        rows.into_iter()
            .map(|(seq, attempt, kind, at, body)| {
                Ok(EventRow { seq, attempt, kind, at, body: json("event.body", &body)? })
            })
            .collect()
    }

    /// The forwarded body as it was submitted.
    pub async fn body(&self, id: JobId) -> Result<Bytes, StoreError> {
        let row: Option<(Vec<u8>,)> = sqlx::query_as("SELECT body FROM payload WHERE number = ?")
            .bind(id.number)
            .fetch_optional(&self.inner.pool)
            .await?;
        row.map(|(body,)| Bytes::from(body)).ok_or(StoreError::NotFound)
    }

    /// Endpoint and body of a claimed job, for its worker.
    pub async fn request(&self, number: i64) -> Result<(String, Bytes), StoreError> {
        let row: Option<(String, Vec<u8>)> = sqlx::query_as(
            "SELECT job_detail.endpoint, payload.body FROM job_detail JOIN payload USING (number) WHERE job_detail.number = ?",
        )
        .bind(number)
        .fetch_optional(&self.inner.pool)
        .await?;
        row.map(|(endpoint, body)| (endpoint, Bytes::from(body))).ok_or(StoreError::NotFound)
    }

    /// The stored answer of a succeeded job, whole: images inlined again as `b64_json`.
    pub async fn answer(&self, id: JobId) -> Result<Option<Answer>, StoreError> {
        let row: Option<ResultRow> =
            sqlx::query_as("SELECT status, content_type, body, artifact, usage FROM result WHERE number = ?")
                .bind(id.number)
                .fetch_optional(&self.inner.pool)
                .await?;
        let Some((status, content_type, body, artifact, usage)) = row else {
            return Ok(None);
        };
        let files = self.files(id).await?;
        let body = match (body, artifact) {
            (Some(body), _) => self.inner.artifacts.inline(Bytes::from(body), &files).await?,
            (None, position) => {
                let position = position.and_then(|p| usize::try_from(p).ok()).unwrap_or(0);
                let (_, path) = files.get(position).ok_or(StoreError::NotFound)?;
                self.inner.artifacts.read(path, None).await?
            }
        };
        let usage = usage.as_deref().map(|text| json("usage", text)).transpose()?;
        Ok(Some(Answer { status: u16::try_from(status).unwrap_or(200), content_type, body, usage }))
    }

    /// The JSON answer of a succeeded job as it is kept: the place of an image has `{"$artifact": "art_<n>"}`. `None`: no
    /// answer, or one that is a file alone.
    pub async fn kept_body(&self, id: JobId) -> Result<Option<Bytes>, StoreError> {
        let row: Option<(Option<Vec<u8>>,)> = sqlx::query_as("SELECT body FROM result WHERE number = ?")
            .bind(id.number)
            .fetch_optional(&self.inner.pool)
            .await?;
        Ok(row.and_then(|(body,)| body).map(Bytes::from))
    }

    /// The job's artifacts, in order.
    pub async fn artifacts(&self, id: JobId) -> Result<Vec<Artifact>, StoreError> {
        Ok(self.files(id).await?.into_iter().map(|(artifact, _)| artifact).collect())
    }

    /// An artifact's bytes, or the part `range` (start, end exclusive) of them.
    pub async fn artifact_bytes(
        &self,
        id: JobId,
        artifact: &str,
        range: Option<(u64, u64)>,
    ) -> Result<Bytes, StoreError> {
        let files = self.files(id).await?;
        let (_, path) = files.iter().find(|(a, _)| a.id == artifact).ok_or(StoreError::NotFound)?;
        self.inner.artifacts.read(path, range).await
    }

    /// Live jobs whose callers hold the line; asked once, after a restart.
    pub async fn live_sync_jobs(&self) -> Result<Vec<JobId>, StoreError> {
        let rows: Vec<(i64, i64, i64)> = sqlx::query_as(
            "SELECT created_at, number, tag FROM job WHERE state IN ('queued', 'running', 'cancelling') AND face = 'sync'",
        )
        .fetch_all(&self.inner.pool)
        .await?;
        rows.into_iter()
            .map(|(created, number, tag)| {
                Ok(JobId::new(created, number, u64::try_from(tag).map_err(|_| unreadable("tag"))?))
            })
            .collect()
    }

    async fn files(&self, id: JobId) -> Result<Vec<(Artifact, String)>, StoreError> {
        let rows: Vec<(i64, String, String, i64, String, String)> = sqlx::query_as(
            "SELECT position, name, mime, bytes, sha256, path FROM artifact WHERE number = ? ORDER BY position",
        )
        .bind(id.number)
        .fetch_all(&self.inner.pool)
        .await?;
        Ok(rows
            .into_iter()
            .map(|(position, name, mime, bytes, sha256, path)| {
                let artifact = Artifact {
                    id: format!("art_{position}"),
                    name,
                    mime,
                    bytes: u64::try_from(bytes).unwrap_or(0),
                    sha256,
                };
                (artifact, path)
            })
            .collect())
    }
}
