//! Reads: point look-ups, lists, event logs. Never blocks the writer.

use std::sync::Arc;

use crate::domain::worker::Answer;
use crate::domain::{BatchId, Job, JobId, JobKind, JobState, Millis};
use crate::store::StoreError;

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

struct ReaderInner {}

impl Reader {
    /// The job, if the id's tag matches too.
    pub async fn job(&self, id: JobId) -> Result<Job, StoreError> {
        let _ = (&self.inner, id);
        unimplemented!()
    }

    /// A page of jobs.
    pub async fn jobs(&self, filter: &JobFilter) -> Result<JobPage, StoreError> {
        let _ = filter;
        unimplemented!()
    }

    /// Events with seq > `after`, in order, at most `limit`.
    pub async fn events(
        &self,
        id: JobId,
        after: i64,
        limit: u32,
    ) -> Result<Vec<EventRow>, StoreError> {
        let _ = (id, after, limit);
        unimplemented!()
    }

    /// The forwarded body as it was submitted.
    pub async fn body(&self, id: JobId) -> Result<bytes::Bytes, StoreError> {
        let _ = id;
        unimplemented!()
    }

    /// The stored answer of a succeeded job, whole: images inlined again as `b64_json`.
    pub async fn answer(&self, id: JobId) -> Result<Option<Answer>, StoreError> {
        let _ = id;
        unimplemented!()
    }

    /// The job's artifacts, in order.
    pub async fn artifacts(&self, id: JobId) -> Result<Vec<Artifact>, StoreError> {
        let _ = id;
        unimplemented!()
    }

    /// An artifact's bytes, or the part `range` (start, end exclusive) of them.
    pub async fn artifact_bytes(
        &self,
        id: JobId,
        artifact: &str,
        range: Option<(u64, u64)>,
    ) -> Result<bytes::Bytes, StoreError> {
        let _ = (id, artifact, range);
        unimplemented!()
    }
}
