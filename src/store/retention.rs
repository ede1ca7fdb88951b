//! What is deleted, and when. First a job is emptied: what it held (body, events, answer, files) goes, and its row goes on
//! telling what became of it; later the row goes, too. By age, or, if the quota is used up, answers that were delivered.
//! Nothing that has not ended is touched: it has no expiry, every statement says so again, and a trigger watches.
//!
//! All of it happens in small steps on the writer's thread, and each file is deleted when the commit that forgets it is
//! durable; one that is left behind by a crash in between is found by `collect`.

use std::collections::BTreeSet;
use std::time::Duration;

use rusqlite::{Connection, params};
use tokio::time::Instant;

use super::StoreError;
use super::files::StoredFile;
use super::idempotency;
use super::recovery::{self, LAST_BATCH, LAST_NUMBER};
use super::verbs::{Store, execute, ms};
use super::writer::{Kind, Session, answer};
use crate::domain::{Millis, StorageSettings};

/// Rows in one step at most, and so many are asked for at a time.
const ROWS_MAX: u64 = 1_000;
const ROWS_AT_ONCE: u32 = 32;
/// A step ends when it has taken about this long: others wait for their commits meanwhile.
const STEP: Duration = Duration::from_millis(1);
/// Old idempotency keys in one step at most.
const KEYS_MAX: u32 = 256;
/// A client whose connection broke may come back for its answer so long, however full the disk is.
pub(super) const DELIVERED_GRACE_MS: i64 = 10_000;

/// What one step did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Purged {
    /// Jobs whose content was deleted and whose row stays for now.
    pub emptied: u64,
    /// Jobs whose row was deleted, too.
    pub deleted: u64,
    /// Idempotency keys that were forgotten.
    pub keys: u64,
    /// About what was set free.
    pub bytes: u64,
    /// Whether there is more to do at once.
    pub has_more: bool,
    /// How long it kept the writer from other work.
    pub took: Duration,
}

/// A step within its transaction.
struct Step {
    begun: Instant,
    /// Bytes that are enough.
    limit: u64,
    purged: Purged,
    files: Vec<StoredFile>,
    last_number: i64,
    batches: BTreeSet<i64>,
}

/// An ended job that may go.
struct Candidate {
    number: i64,
    finished_at: Millis,
    is_empty: bool,
    batch: Option<i64>,
}

impl Store {
    /// One step of deleting what is past its time: at most a thousand jobs, oldest expiry first, and old idempotency keys.
    pub async fn purge(&self) -> Result<Purged, StoreError> {
        const EXPIRED: &str = "SELECT number, finished_at, emptied_at IS NOT NULL, batch FROM job INDEXED BY job_expiry
             WHERE expires_at <= ?1 AND finished_at IS NOT NULL ORDER BY expires_at LIMIT ?2";
        let (now, settings) = (self.clock.now(), self.settings.clone());
        self.step(move |session| {
            let mut step = Step::new();
            step.each(&session.c, EXPIRED, now, |step, job| {
                if job.is_empty { step.delete(&session.c, job) } else { step.empty(&session.c, job, now, &settings) }
            })?;
            if !step.purged.has_more {
                step.purged.keys = idempotency::purge(&session.c, now, KEYS_MAX)? as u64;
                step.purged.has_more = step.purged.keys == u64::from(KEYS_MAX);
            }
            step.ended(&session.c)
        })
        .await
    }

    /// One step of making room: empties jobs whose answers were delivered, oldest end first, until about `bytes` are free.
    /// Answers that nobody has fetched stay.
    pub async fn make_room(&self, bytes: u64) -> Result<Purged, StoreError> {
        const DELIVERED: &str = "SELECT number, finished_at, 0, batch FROM job INDEXED BY job_delivered
             WHERE delivered_at IS NOT NULL AND emptied_at IS NULL AND delivered_at <= ?1 AND finished_at IS NOT NULL
             ORDER BY finished_at LIMIT ?2";
        let (now, settings) = (self.clock.now(), self.settings.clone());
        self.step(move |session| {
            let mut step = Step::new();
            step.limit = bytes;
            step.each(&session.c, DELIVERED, now - DELIVERED_GRACE_MS, |step, job| {
                step.empty(&session.c, job, now, &settings)
            })?;
            step.ended(&session.c)
        })
        .await
    }

    async fn step<F>(&self, step: F) -> Result<Purged, StoreError>
    where
        F: FnMut(&mut Session) -> Result<Step, StoreError> + Send + 'static,
    {
        let Step { purged, files, .. } = answer(self.writer.apply(Kind::Change, 0, step)).await?;
        self.metrics.purged(purged.emptied, purged.deleted);
        for (path, error) in self.files.delete(&files).await {
            tracing::warn!(path, "artifacts/{path} could not be deleted, it is tried again later: {error}");
        }
        Ok(purged)
    }

    /// Gives up to `pages` free pages back to the disk; says how many. None, if the file was made by the first release.
    pub async fn give_back_pages(&self, pages: u32) -> Result<u64, StoreError> {
        if !self.gives_back {
            return Ok(0);
        }
        let pending = self.writer.apply(Kind::Change, 0, move |session| {
            let mut statement = session.c.prepare(&format!("PRAGMA incremental_vacuum({pages})"))?;
            let mut rows = statement.query([])?;
            let mut given = 0;
            // One row for each page.
            while rows.next()?.is_some() {
                given += 1;
            }
            Ok(given)
        });
        answer(pending).await
    }
}

/// The next ones; what was done with the ones before must have taken them out of it.
fn candidates(c: &Connection, sql: &str, until: Millis) -> Result<Vec<Candidate>, StoreError> {
    let mut statement = c.prepare_cached(sql)?;
    let rows = statement.query_map(params![until, ROWS_AT_ONCE], |row| {
        Ok(Candidate { number: row.get(0)?, finished_at: row.get(1)?, is_empty: row.get(2)?, batch: row.get(3)? })
    })?;
    Ok(rows.collect::<Result<_, _>>()?)
}

impl Step {
    fn new() -> Self {
        Self {
            begun: Instant::now(),
            limit: u64::MAX,
            purged: Purged::default(),
            files: Vec::new(),
            last_number: 0,
            batches: BTreeSet::new(),
        }
    }

    /// Does something with jobs until there are no more or the step has done enough.
    fn each(
        &mut self,
        c: &Connection,
        sql: &str,
        until: Millis,
        mut with: impl FnMut(&mut Self, &Candidate) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        loop {
            let jobs = candidates(c, sql, until)?;
            for job in &jobs {
                if self.purged.bytes >= self.limit {
                    return Ok(());
                }
                with(self, job)?;
            }
            if jobs.len() < ROWS_AT_ONCE as usize {
                return Ok(());
            }
            if self.purged.emptied + self.purged.deleted >= ROWS_MAX || self.begun.elapsed() > STEP {
                self.purged.has_more = true;
                return Ok(());
            }
        }
    }

    fn ended(mut self, c: &Connection) -> Result<Self, StoreError> {
        self.forget(c)?;
        self.purged.took = self.begun.elapsed();
        Ok(self)
    }

    /// Deletes what a job holds, and the row as well if it has told its end for long enough.
    fn empty(
        &mut self,
        c: &Connection,
        job: &Candidate,
        now: Millis,
        settings: &StorageSettings,
    ) -> Result<(), StoreError> {
        let bodies: i64 = c
            .prepare_cached(
                "SELECT coalesce((SELECT length(body) FROM request WHERE number = ?1), 0)
                      + coalesce((SELECT length(body) FROM result WHERE id = (SELECT result FROM job WHERE number = ?1)), 0)",
            )?
            .query_row([job.number], |row| row.get(0))?;
        let files = super::read::files_of(c, job.number)?;
        self.purged.bytes += bodies.unsigned_abs() + files.iter().map(|file| file.bytes).sum::<u64>();
        self.files.extend(files);
        for sql in [
            "DELETE FROM request WHERE number = ?1",
            "DELETE FROM event WHERE number = ?1",
            "DELETE FROM result WHERE id = (SELECT result FROM job WHERE number = ?1)",
            "DELETE FROM file WHERE number = ?1",
        ] {
            execute(c, sql, [job.number])?;
        }
        let until = job.finished_at.saturating_add(ms(settings.tombstone_ttl));
        if until <= now {
            return self.delete(c, job);
        }
        execute(
            c,
            "UPDATE job SET emptied_at = ?2, expires_at = ?3, result = NULL, version = version + 1
             WHERE number = ?1 AND finished_at IS NOT NULL AND emptied_at IS NULL",
            params![job.number, now, until],
        )?;
        self.purged.emptied += 1;
        Ok(())
    }

    fn delete(&mut self, c: &Connection, job: &Candidate) -> Result<(), StoreError> {
        execute(c, "DELETE FROM job WHERE number = ?1 AND finished_at IS NOT NULL", [job.number])?;
        self.purged.deleted += 1;
        self.last_number = self.last_number.max(job.number);
        self.batches.extend(job.batch);
        Ok(())
    }

    /// Deletes batches whose last job is gone. Numbers of what was deleted are never given again: ids, keys and paths of
    /// then may still be around.
    fn forget(&mut self, c: &Connection) -> Result<(), StoreError> {
        if self.purged.deleted == 0 {
            return Ok(());
        }
        recovery::remember_last(c, LAST_NUMBER, self.last_number)?;
        for batch in &self.batches {
            execute(
                c,
                "DELETE FROM batch WHERE id = ?1 AND NOT EXISTS (SELECT 1 FROM job WHERE job.batch = ?1)",
                [*batch],
            )?;
        }
        match self.batches.last() {
            Some(last) => recovery::remember_last(c, LAST_BATCH, *last),
            None => Ok(()),
        }
    }
}
