//! Accepting jobs.

use std::sync::Arc;

use rusqlite::params;
use serde_json::json;

use super::files::{Files, StoredFile};
use super::idempotency::{IdempotencyKey, Verdict};
use super::read::Reader;
use super::writer::{Kind, Pending, Session, Writer, answer};
use super::{StoreError, verbs};
use crate::domain::job::Present;
use crate::domain::{Job, JobId, JobKind, JobState, Millis, NewJob, StateReason};

/// About what a job takes beside its body.
const ROW_BYTES: u64 = 256;

/// What became of a submission.
#[derive(Debug)]
pub struct Inserted {
    /// As committed; with `replayed`, as they are now.
    pub jobs: Vec<Job>,
    /// The same submission came before under the same idempotency key: nothing was added.
    pub replayed: bool,
}

/// Jobs on their way into the database.
pub(super) struct Submission {
    pub(super) jobs: Vec<(JobId, NewJob)>,
    /// They are `running` in their first attempt from the start.
    pub(super) claimed: bool,
    pub(super) key: Option<IdempotencyKey>,
    pub(super) now: Millis,
}

/// Commits new jobs, all or none. Bodies that are files are written first; without any the operation is queued before this
/// returns, so that the order of calls is the order of commits.
pub(super) fn insert(
    writer: &Writer,
    files: &Files,
    reader: &Reader,
    submission: Submission,
) -> impl Future<Output = Result<Inserted, StoreError>> + Send + use<> {
    let has_files = submission.jobs.iter().any(|(_, job)| job.body.len() > super::files::INLINE_BYTES_MAX);
    let submission = Arc::new(submission);
    let queued = if has_files { None } else { Some(queue(writer, &submission, Vec::new())) };
    let (writer, files, reader) = (writer.clone(), files.clone(), reader.clone());
    async move {
        let mut kept = Vec::new();
        let pending = match queued {
            Some(pending) => Ok(pending),
            None => {
                write_files(&files, &submission, &mut kept).await.map(|()| queue(&writer, &submission, kept.clone()))
            }
        };
        let verdict = match pending {
            Ok(pending) => answer(pending).await,
            Err(error) => Err(error),
        };
        // A store that stopped in the middle may have it all the same.
        let is_known = !matches!(verdict, Ok(Verdict::New) | Err(StoreError::Stopped));
        if is_known && !kept.is_empty() {
            let unused: Vec<StoredFile> = kept.into_iter().map(|(_, file)| file).collect();
            // What cannot be deleted now is found by the collection of files without rows.
            let _ = files.delete(&unused).await;
        }
        match verdict? {
            Verdict::New => Ok(Inserted { jobs: committed(submission), replayed: false }),
            Verdict::Replayed(first) => Ok(Inserted { jobs: reader.replayed(first).await?, replayed: true }),
            Verdict::Reused => Err(StoreError::KeyReused),
        }
    }
}

/// Bodies that are too large for a row. `kept`: those that are written, also after an error.
async fn write_files(
    files: &Files,
    submission: &Submission,
    kept: &mut Vec<(i64, StoredFile)>,
) -> Result<(), StoreError> {
    for (id, job) in &submission.jobs {
        if let Some(file) = files.keep_request(*id, &job.body).await? {
            kept.push((id.number, file));
        }
    }
    Ok(())
}

fn queue(writer: &Writer, submission: &Arc<Submission>, files: Vec<(i64, StoredFile)>) -> Pending<Verdict> {
    let bytes =
        submission.jobs.iter().map(|(_, job)| job.body.len().min(super::files::INLINE_BYTES_MAX) as u64 + ROW_BYTES);
    let submission = submission.clone();
    writer.apply(Kind::Submission, bytes.sum(), move |session| write(session, &submission, &files))
}

fn write(session: &mut Session, submission: &Submission, files: &[(i64, StoredFile)]) -> Result<Verdict, StoreError> {
    let Some((first, job)) = submission.jobs.first() else {
        return Ok(Verdict::New);
    };
    if let Some(key) = &submission.key {
        let verdict = session.keys.check(key, submission.now);
        if verdict != Verdict::New {
            return Ok(verdict);
        }
        let Session { c, keys, .. } = session;
        keys.add(c, key, first.number, submission.now)?;
    }
    for (id, job) in &submission.jobs {
        let file = files.iter().find(|(number, _)| *number == id.number).map(|(_, file)| file);
        insert_one(session, *id, job, submission.claimed, submission.now, file)?;
    }
    if let Some(batch) = job.batch {
        let tenant = session.tenant(&job.tenant)?;
        session
            .c
            .prepare_cached("INSERT INTO batch (id, tenant, created_at, total) VALUES (?1, ?2, ?3, ?4)")?
            .execute(params![batch.0, tenant, submission.now, verbs::int(submission.jobs.len() as u64)])?;
    }
    Ok(Verdict::New)
}

fn insert_one(
    session: &mut Session,
    id: JobId,
    new: &NewJob,
    claimed: bool,
    now: Millis,
    file: Option<&StoredFile>,
) -> Result<(), StoreError> {
    let (model, tenant) = (session.model(&new.model)?, session.tenant(&new.tenant)?);
    let state = if claimed { JobState::Running } else { JobState::Queued };
    let steps = if claimed { 2_i64 } else { 1 };
    session
        .c
        .prepare_cached(
            "INSERT INTO job (number, tag, kind, face, model, tenant, batch, state, priority, attempt, max_attempts, version,
                              last_seq, batch_key, stream, created_at, started_at, started_seq, start_deadline, deadline,
                              timeout_ms)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19, ?20)",
        )?
        .execute(params![
            id.number,
            verbs::int(id.tag),
            JobKind::of_endpoint(&new.endpoint).as_str(),
            new.face.as_str(),
            model,
            tenant,
            new.batch.map(|b| b.0),
            state.as_str(),
            new.priority,
            i64::from(claimed),
            new.max_attempts,
            steps,
            new.batch_key,
            new.stream,
            id.created_ms,
            claimed.then_some(now),
            claimed.then_some(steps),
            new.start_deadline,
            new.deadline,
            new.timeout_ms,
        ])?;
    let metadata = (!new.metadata.is_empty()).then(|| json!(new.metadata).to_string());
    let present = (new.present != Present::default()).then(|| json!(new.present).to_string());
    session
        .c
        .prepare_cached(
            "INSERT INTO request (number, endpoint, custom_id, metadata, present, retry_of, body)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        )?
        .execute(params![
            id.number,
            new.endpoint,
            new.custom_id,
            metadata,
            present,
            new.retry_of.map(|id| id.to_string()),
            file.is_none().then_some(&new.body[..]),
        ])?;
    match file {
        Some(file) => verbs::record_file(&session.c, id.number, file),
        None => Ok(()),
    }
}

fn committed(submission: Arc<Submission>) -> Vec<Job> {
    // The writer has let go of it before it answered.
    let owned = Arc::try_unwrap(submission).unwrap_or_else(|shared| Submission {
        jobs: shared.jobs.clone(),
        claimed: shared.claimed,
        key: shared.key,
        now: shared.now,
    });
    let (claimed, now) = (owned.claimed, owned.now);
    owned.jobs.into_iter().map(|(id, new)| as_job(id, new, claimed, now)).collect()
}

/// The job as its row says it.
fn as_job(id: JobId, new: NewJob, claimed: bool, now: Millis) -> Job {
    Job {
        id,
        kind: JobKind::of_endpoint(&new.endpoint),
        endpoint: new.endpoint,
        model: new.model,
        tenant: new.tenant,
        batch: new.batch,
        custom_id: new.custom_id,
        face: new.face,
        state: if claimed { JobState::Running } else { JobState::Queued },
        state_reason: (!claimed).then_some(StateReason::WaitingForModel),
        priority: new.priority,
        attempt: i64::from(claimed),
        failures: 0,
        crashes: 0,
        max_attempts: new.max_attempts,
        version: if claimed { 2 } else { 1 },
        batch_key: new.batch_key,
        stream: new.stream,
        present: new.present,
        created_at: id.created_ms,
        queued_at: id.created_ms,
        started_at: claimed.then_some(now),
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
        gpu_ms: 0.0,
        delivered_at: None,
        emptied_at: None,
    }
}
