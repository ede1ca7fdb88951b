//! What a start finds: jobs that ran when the last run ended, jobs that wait, and what was learned.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::Arc;

use rusqlite::{Connection, params};

use super::StoreError;
use super::usage;
use super::verbs::{self, Change, End, GiveBack, Guard};
use super::writer::Session;
use crate::domain::{Face, JobId, JobState, Millis, NewJob, StorageSettings, Token};

/// A waiting job as the scheduler plans with it. All else is read when it is claimed.
#[derive(Clone, Debug, PartialEq)]
pub struct QueuedJob {
    /// The row's key; also the order of arrival.
    pub number: i64,
    /// Entry name.
    pub model: Arc<str>,
    /// API key's name.
    pub tenant: Arc<str>,
    /// Whether a caller holds the line.
    pub face: Face,
    /// 0 to 9.
    pub priority: u8,
    /// Jobs with equal keys may share a run.
    pub batch_key: i64,
    /// When it was accepted.
    pub created_at: Millis,
    /// Whether it was ever claimed.
    pub was_started: bool,
    /// The death of a worker that it was part of: it runs with others of the same death only. Less than 0: it ran out of
    /// memory alone, and runs with nothing beside it.
    pub crash: Option<i64>,
    /// Not to be claimed before.
    pub not_before: Option<Millis>,
    /// To be started before.
    pub start_deadline: Option<Millis>,
    /// To be finished before.
    pub deadline: Option<Millis>,
}

impl QueuedJob {
    /// A submission as it waits.
    pub fn of(number: i64, created_at: Millis, new: &NewJob, model: Arc<str>, tenant: Arc<str>) -> Self {
        Self {
            number,
            model,
            tenant,
            face: new.face,
            priority: new.priority,
            batch_key: new.batch_key,
            created_at,
            was_started: false,
            crash: None,
            not_before: None,
            start_deadline: new.start_deadline,
            deadline: new.deadline,
        }
    }

    /// When it is too late: its deadline, or, before its first start, its start deadline.
    pub fn limit(&self) -> Option<Millis> {
        let start = self.start_deadline.filter(|_| !self.was_started);
        [self.deadline, start].into_iter().flatten().min()
    }
}

/// What the last run left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Recovered {
    /// Jobs that were on a worker, and wait again.
    pub(super) jobs: usize,
    /// Whether it ended in order.
    pub(super) was_clean: bool,
    /// Number of this run of the server on this data dir.
    pub(super) epoch: i64,
}

/// Puts the jobs of the last run's workers back, uncharged; ends those that were being cancelled. One transaction.
pub(super) fn recover(session: &mut Session, now: Millis, settings: &StorageSettings) -> Result<Recovered, StoreError> {
    session.c.execute_batch("BEGIN IMMEDIATE")?;
    let (epoch, was_clean) = begin_epoch(&session.c)?;
    session.is_settled = was_clean || epoch == 1;
    set_times(&session.c, now, settings)?;
    let mut left: Vec<(Token, JobState)> = Vec::new();
    {
        let mut statement = session.c.prepare(
            "SELECT created_at, number, tag, attempt, state FROM job INDEXED BY job_live
             WHERE finished_at IS NULL AND state <> 'queued' ORDER BY number",
        )?;
        let rows = statement.query_map([], |row| {
            let tag = u64::try_from(row.get::<_, i64>(2)?).unwrap_or_default();
            let token = Token { id: JobId::new(row.get(0)?, row.get(1)?, tag), attempt: row.get(3)? };
            let state = JobState::parse(row.get_ref(4)?.as_str()?).ok_or(rusqlite::Error::InvalidQuery)?;
            Ok((token, state))
        })?;
        for row in rows {
            left.push(row?);
        }
    }
    let mut jobs = 0;
    for (token, state) in left {
        let changed = if state == JobState::Cancelling {
            verbs::end_one(session, Guard::Cancelling(token), &End::Cancelled, 0.0, now, settings)?
        } else {
            jobs += 1;
            give_back(session, token, now)?
        };
        if changed.is_none() {
            return Err(StoreError::Corrupt(format!("{} could not be taken back from its last attempt", token.id)));
        }
    }
    usage::add_used(&session.c, &session.used)?;
    usage::forget_old(&session.c, now)?;
    session.c.execute_batch("COMMIT")?;
    session.touched.clear();
    session.used.clear();
    Ok(Recovered { jobs, was_clean, epoch })
}

/// Jobs that ended before there was a retention have theirs from now on.
fn set_times(c: &Connection, now: Millis, settings: &StorageSettings) -> Result<(), StoreError> {
    c.execute(
        "UPDATE job SET expires_at = max(finished_at, ?1)
                + CASE WHEN face = 'sync' THEN ?2 WHEN batch IS NOT NULL THEN ?3 ELSE ?4 END
         WHERE expires_at = 0",
        [now, verbs::ms(settings.sync_ttl), verbs::ms(settings.batch_ttl), verbs::ms(settings.results_ttl)],
    )?;
    Ok(())
}

/// Uncharged: what it was charged with before stays.
fn give_back(session: &mut Session, token: Token, now: Millis) -> Result<Option<Change>, StoreError> {
    let back = session
        .c
        .prepare_cached("SELECT failures, crashes, crash FROM job WHERE number = ?1")?
        .query_row([token.id.number], |row| {
            Ok(GiveBack { failures: row.get(0)?, crashes: row.get(1)?, crash: row.get(2)?, ..GiveBack::default() })
        })?;
    verbs::requeue_one(session, token, &back, now)
}

fn begin_epoch(c: &Connection) -> Result<(i64, bool), StoreError> {
    let epoch = c.query_row(
        "INSERT INTO meta (key, value) VALUES ('epoch', '1')
         ON CONFLICT (key) DO UPDATE SET value = CAST(value AS INTEGER) + 1 RETURNING CAST(value AS INTEGER)",
        [],
        |row| row.get(0),
    )?;
    let was_clean = c.execute("DELETE FROM meta WHERE key = 'clean'", [])? == 1;
    Ok((epoch, was_clean))
}

/// Numbers of the live jobs, in order, cut into ranges of at most `size` jobs. Reads the index alone.
pub(super) fn pages_of_live(c: &Connection, size: usize) -> Result<Vec<RangeInclusive<i64>>, StoreError> {
    let mut statement =
        c.prepare("SELECT number FROM job INDEXED BY job_live WHERE finished_at IS NULL ORDER BY number")?;
    let mut rows = statement.query([])?;
    let (mut pages, mut in_page) = (Vec::<RangeInclusive<i64>>::new(), size);
    while let Some(row) = rows.next()? {
        let number = row.get(0)?;
        match pages.last_mut() {
            Some(page) if in_page < size => (*page, in_page) = (*page.start()..=number, in_page + 1),
            _ => {
                pages.push(number..=number);
                in_page = 1;
            }
        }
    }
    Ok(pages)
}

/// Queued jobs with these numbers, oldest first.
pub(super) fn load_queued(c: &Connection, numbers: &RangeInclusive<i64>) -> Result<Vec<QueuedJob>, StoreError> {
    let models = names(c, "SELECT id, name FROM model")?;
    let tenants = names(c, "SELECT id, name FROM tenant")?;
    let unknown: Arc<str> = Arc::from("");
    let mut statement = c.prepare_cached(
        "SELECT number, model, tenant, face, priority, batch_key, created_at, attempt > 0, crash, not_before, start_deadline,
                deadline
         FROM job INDEXED BY job_live WHERE finished_at IS NULL AND state = 'queued' AND number BETWEEN ?1 AND ?2 ORDER BY number",
    )?;
    let rows = statement.query_map([numbers.start(), numbers.end()], |row| {
        Ok(QueuedJob {
            number: row.get(0)?,
            model: models.get(&row.get(1)?).unwrap_or(&unknown).clone(),
            tenant: tenants.get(&row.get(2)?).unwrap_or(&unknown).clone(),
            face: Face::parse(row.get_ref(3)?.as_str()?).ok_or(rusqlite::Error::InvalidQuery)?,
            priority: row.get(4)?,
            batch_key: row.get(5)?,
            created_at: row.get(6)?,
            was_started: row.get(7)?,
            crash: row.get(8)?,
            not_before: row.get(9)?,
            start_deadline: row.get(10)?,
            deadline: row.get(11)?,
        })
    })?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// Of the queued jobs of a model, those whose endpoint is none of these: priority and number.
pub(super) fn load_unserved(c: &Connection, model: &str, endpoints: &[String]) -> Result<Vec<(u8, i64)>, StoreError> {
    let mut statement = c.prepare_cached(
        "SELECT job.priority, job.number FROM job INDEXED BY job_live JOIN request ON request.number = job.number
         WHERE job.finished_at IS NULL AND job.state = 'queued' AND job.model = (SELECT id FROM model WHERE name = ?1)
               AND request.endpoint NOT IN (SELECT value FROM json_each(?2))",
    )?;
    let endpoints = serde_json::json!(endpoints).to_string();
    let rows = statement.query_map([model, &endpoints], |row| Ok((row.get(0)?, row.get(1)?)))?;
    Ok(rows.collect::<Result<_, _>>()?)
}

fn names(c: &Connection, sql: &str) -> Result<BTreeMap<i64, Arc<str>>, StoreError> {
    let mut statement = c.prepare(sql)?;
    let rows = statement.query_map([], |row| Ok((row.get(0)?, Arc::from(row.get::<_, String>(1)?))))?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// What each tenant was served, in weighted GPU ms.
pub(super) fn load_served(c: &Connection) -> Result<BTreeMap<String, f64>, StoreError> {
    let mut statement = c.prepare("SELECT name, served_ms FROM tenant WHERE served_ms > 0")?;
    let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// The number after the highest one there ever was.
pub(super) fn next_number(c: &Connection) -> Result<i64, StoreError> {
    after_last(c, "SELECT max(number) FROM job", LAST_NUMBER)
}

/// The same for batches.
pub(super) fn next_batch(c: &Connection) -> Result<i64, StoreError> {
    after_last(c, "SELECT max(id) FROM batch", LAST_BATCH)
}

/// What the last deleted row leaves in `meta`, so that its number is never given again.
pub(super) const LAST_NUMBER: &str = "last_number";
/// The same for batches.
pub(super) const LAST_BATCH: &str = "last_batch";

fn after_last(c: &Connection, highest: &str, deleted: &str) -> Result<i64, StoreError> {
    let sql = format!(
        "SELECT max(coalesce(({highest}), 0), coalesce((SELECT CAST(value AS INTEGER) FROM meta WHERE key = ?1), 0)) + 1"
    );
    Ok(c.query_row(&sql, [deleted], |row| row.get(0))?)
}

/// Remembers that rows up to `number` were there.
pub(super) fn remember_last(c: &Connection, key: &str, number: i64) -> Result<(), StoreError> {
    verbs::execute(
        c,
        "INSERT INTO meta (key, value) VALUES (?1, ?2)
         ON CONFLICT (key) DO UPDATE SET value = max(CAST(value AS INTEGER), CAST(excluded.value AS INTEGER))",
        params![key, number.to_string()],
    )
}
