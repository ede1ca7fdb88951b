//! GPU time: sums by hour that outlive their jobs, and who had how much.
//!
//! What an attempt had is written in the transaction of its end: to its row, and, folded once for each group of the writer,
//! to the sums. What devices did is told by the scheduler every few seconds.

use std::collections::BTreeMap;

use rusqlite::{Connection, params, params_from_iter};

use super::StoreError;
use super::read::Reader;
use super::verbs::{Store, execute};
use super::writer::{Kind, answer};
use crate::domain::{BatchId, JobId, Millis};

/// An hour, by which sums are kept.
pub const HOUR_MS: i64 = 3_600_000;
/// Sums are kept for so many hours: 400 days.
const KEPT_HOURS: i64 = 400 * 24;

/// The hour of a time, counted from the epoch.
pub fn hour_of(at: Millis) -> i64 {
    at.div_euclid(HOUR_MS)
}

/// What the devices did for a model within an hour.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Spent {
    /// See [`hour_of`].
    pub hour: i64,
    /// Entry name; `None`: no model held the device.
    pub model: Option<String>,
    /// Jobs ran, ms.
    pub work_ms: f64,
    /// It loaded, stopped or woke, ms.
    pub swap_ms: f64,
    /// It held the device, or nobody did, and nothing ran, ms.
    pub idle_ms: f64,
    /// Swaps to it.
    pub swaps: u64,
    /// Swaps to it that arrival order would have cost.
    pub swaps_in_order: u64,
}

/// What one attempt had.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Used {
    pub(super) at: Millis,
    pub(super) model: i64,
    pub(super) tenant: i64,
    pub(super) gpu_ms: f64,
    /// Its job ended with it.
    pub(super) ended: bool,
}

/// Adds what the attempts of a group had to the sums.
pub(super) fn add_used(c: &Connection, used: &[Used]) -> Result<(), StoreError> {
    let mut sums: BTreeMap<(i64, i64, i64), (f64, i64)> = BTreeMap::new();
    for one in used {
        let (gpu_ms, jobs) = sums.entry((hour_of(one.at), one.model, one.tenant)).or_default();
        *gpu_ms += one.gpu_ms;
        *jobs += i64::from(one.ended);
    }
    for ((hour, model, tenant), (gpu_ms, jobs)) in sums {
        execute(
            c,
            "INSERT INTO usage_job (hour, model, tenant, gpu_ms, jobs) VALUES (?1, ?2, ?3, ?4, ?5)
             ON CONFLICT DO UPDATE SET gpu_ms = gpu_ms + excluded.gpu_ms, jobs = jobs + excluded.jobs",
            params![hour, model, tenant, gpu_ms, jobs],
        )?;
    }
    Ok(())
}

/// Deletes sums that are past their time.
pub(super) fn forget_old(c: &Connection, now: Millis) -> Result<(), StoreError> {
    let first = hour_of(now) - KEPT_HOURS;
    execute(c, "DELETE FROM usage_job WHERE hour < ?1", [first])?;
    execute(c, "DELETE FROM usage_device WHERE hour < ?1", [first])
}

impl Store {
    /// Adds to what the devices did. The order of calls is the order of commits.
    pub fn add_spent(&self, spent: Vec<Spent>) -> impl Future<Output = Result<(), StoreError>> + Send + use<> {
        answer(self.writer.apply(Kind::Change, 0, move |session| {
            for one in &spent {
                let model = one.model.as_deref().map_or(Ok(0), |name| session.model(name))?;
                execute(
                    &session.c,
                    "INSERT INTO usage_device (hour, model, work_ms, swap_ms, idle_ms, swaps, swaps_in_order)
                     VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)
                     ON CONFLICT DO UPDATE SET work_ms = work_ms + excluded.work_ms, swap_ms = swap_ms + excluded.swap_ms,
                         idle_ms = idle_ms + excluded.idle_ms, swaps = swaps + excluded.swaps,
                         swaps_in_order = swaps_in_order + excluded.swaps_in_order",
                    params![
                        one.hour,
                        model,
                        one.work_ms,
                        one.swap_ms,
                        one.idle_ms,
                        one.swaps.cast_signed(),
                        one.swaps_in_order.cast_signed()
                    ],
                )?;
            }
            Ok(())
        }))
    }
}

/// What a model's devices did in a period.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OfModel {
    /// The sums, `hour` aside.
    pub spent: Spent,
    /// What a swap to it costs as learned so far, ms: its load, from wherever, and its stop. `None`: never loaded.
    pub swap_cost_ms: Option<f64>,
}

/// What a tenant had of a model in a period.
#[derive(Clone, Debug, PartialEq)]
pub struct OfTenant {
    /// Entry name.
    pub model: String,
    /// Whose.
    pub tenant: String,
    /// What attempts had, ms.
    pub gpu_ms: f64,
    /// Jobs that ended after an attempt.
    pub jobs: i64,
}

/// What jobs of a batch, or one job, had of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct OfJobs<Id> {
    /// Which.
    pub id: Id,
    /// Entry name.
    pub model: String,
    /// Whose.
    pub tenant: String,
    /// What their attempts had, ms.
    pub gpu_ms: f64,
    /// How many ended.
    pub jobs: i64,
}

/// Which jobs: those that ended from `from` on and before `to`, newest first.
#[derive(Clone, Debug)]
pub struct UsageFilter {
    /// ms since the epoch.
    pub from: Millis,
    /// ms since the epoch.
    pub to: Millis,
    /// Only of this tenant.
    pub tenant: Option<String>,
    /// At most so many.
    pub limit: u32,
}

impl Reader {
    /// What the devices did for each model, from the hour `from` up to and without the hour `to`.
    pub async fn usage_of_models(&self, from: i64, to: i64) -> Result<Vec<OfModel>, StoreError> {
        self.read(move |c| {
            let mut statement = c.prepare_cached(
                "SELECT model.name, sum(work_ms), sum(swap_ms), sum(idle_ms), sum(swaps), sum(swaps_in_order),
                        coalesce(model.reload_ms, model.load_ms) + coalesce(model.stop_ms, 0)
                 FROM usage_device LEFT JOIN model ON model.id = usage_device.model
                 WHERE hour >= ?1 AND hour < ?2 GROUP BY usage_device.model ORDER BY usage_device.model = 0, model.name",
            )?;
            let rows = statement.query_map([from, to], |row| {
                let spent = Spent {
                    hour: 0,
                    model: row.get(0)?,
                    work_ms: row.get(1)?,
                    swap_ms: row.get(2)?,
                    idle_ms: row.get(3)?,
                    swaps: row.get::<_, i64>(4)?.unsigned_abs(),
                    swaps_in_order: row.get::<_, i64>(5)?.unsigned_abs(),
                };
                Ok(OfModel { spent, swap_cost_ms: row.get(6)? })
            })?;
            Ok(rows.collect::<Result<_, _>>()?)
        })
        .await
    }

    /// What each tenant had of each model, by the hours as above.
    pub async fn usage_of_tenants(&self, from: i64, to: i64) -> Result<Vec<OfTenant>, StoreError> {
        self.read(move |c| {
            let mut statement = c.prepare_cached(
                "SELECT model.name, tenant.name, sum(gpu_ms), sum(jobs)
                 FROM usage_job JOIN model ON model.id = usage_job.model JOIN tenant ON tenant.id = usage_job.tenant
                 WHERE hour >= ?1 AND hour < ?2 GROUP BY usage_job.model, usage_job.tenant ORDER BY tenant.name, model.name",
            )?;
            let rows = statement.query_map([from, to], |row| {
                Ok(OfTenant { model: row.get(0)?, tenant: row.get(1)?, gpu_ms: row.get(2)?, jobs: row.get(3)? })
            })?;
            Ok(rows.collect::<Result<_, _>>()?)
        })
        .await
    }

    /// What jobs that ended in a period had, as far as they are still there.
    pub async fn usage_of_jobs(&self, filter: &UsageFilter) -> Result<Vec<OfJobs<JobId>>, StoreError> {
        let filter = filter.clone();
        self.read(move |c| {
            let sql = "SELECT model.name, tenant.name, job.gpu_ms, job.number, job.created_at, job.tag
                 FROM job JOIN model ON model.id = job.model JOIN tenant ON tenant.id = job.tenant
                 WHERE job.finished_at >= ? AND job.finished_at < ? AND job.attempt > 0";
            of_jobs(c, sql, "ORDER BY job.number DESC", &filter, |row| {
                let tag = u64::try_from(row.get::<_, i64>(5)?).unwrap_or_default();
                Ok((JobId::new(row.get(4)?, row.get(3)?, tag), 1))
            })
        })
        .await
    }

    /// The same by batch, and by model within one.
    pub async fn usage_of_batches(&self, filter: &UsageFilter) -> Result<Vec<OfJobs<BatchId>>, StoreError> {
        let filter = filter.clone();
        self.read(move |c| {
            let sql = "SELECT model.name, tenant.name, sum(job.gpu_ms), job.batch, count(*)
                 FROM job INDEXED BY job_batch JOIN model ON model.id = job.model JOIN tenant ON tenant.id = job.tenant
                 WHERE job.batch IS NOT NULL AND job.finished_at >= ? AND job.finished_at < ? AND job.attempt > 0";
            let order = "GROUP BY job.batch, job.model ORDER BY job.batch DESC, model.name";
            of_jobs(c, sql, order, &filter, |row| Ok((BatchId(row.get(3)?), row.get(4)?)))
        })
        .await
    }
}

fn of_jobs<Id>(
    c: &Connection,
    select: &str,
    order: &str,
    filter: &UsageFilter,
    id: impl Fn(&rusqlite::Row<'_>) -> rusqlite::Result<(Id, i64)>,
) -> Result<Vec<OfJobs<Id>>, StoreError> {
    use rusqlite::types::Value;
    let mut values = vec![Value::Integer(filter.from), Value::Integer(filter.to)];
    let of_tenant = match &filter.tenant {
        Some(tenant) => {
            values.push(Value::Text(tenant.clone()));
            " AND job.tenant = (SELECT id FROM tenant WHERE name = ?)"
        }
        None => "",
    };
    values.push(Value::Integer(filter.limit.into()));
    let mut statement = c.prepare_cached(&format!("{select}{of_tenant} {order} LIMIT ?"))?;
    let rows = statement.query_map(params_from_iter(values), |row| {
        let (id, jobs) = id(row)?;
        Ok(OfJobs { id, model: row.get(0)?, tenant: row.get(1)?, gpu_ms: row.get(2)?, jobs })
    })?;
    Ok(rows.collect::<Result<_, _>>()?)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::clock::ManualClock;
    use crate::domain::{ErrorCode, JobError};
    use crate::store::tests::{new_job, reopen};
    use crate::store::{End, GiveBack, StoreError};

    fn spent(model: Option<&str>, hour: i64) -> Spent {
        Spent {
            hour,
            model: model.map(str::to_owned),
            work_ms: 5.0,
            swap_ms: 2.0,
            idle_ms: 1.0,
            swaps: 1,
            swaps_in_order: 3,
        }
    }

    #[tokio::test]
    async fn attempts_add_up_once_and_a_restart_keeps_them() {
        let dir = tempfile::tempdir().unwrap();
        let clock = Arc::new(ManualClock::at(7 * HOUR_MS + 5));
        let opened = reopen(&dir, &clock).await;
        let store = &opened.store;
        let id = JobId::new(1_000, 1, 77);
        store.insert(vec![(id, new_job())], false, None).await.unwrap();
        let first = store.claim(vec![1], 1).await.unwrap()[0].token;
        store.requeue(first, GiveBack { gpu_ms: 30.0, ..GiveBack::default() }).await.unwrap().unwrap();
        let second = store.claim(vec![1], 2).await.unwrap()[0].token;
        let end = || End::Failed(JobError::new(ErrorCode::WorkerError, "no", false));
        assert_eq!(store.finish(first, end(), 1_000.0).await.unwrap(), None, "a late one");
        // What fails takes what it had added along, and nothing else.
        let failing = store.writer.apply(Kind::Change, 0, |session| {
            session.used.push(Used { at: 0, model: 1, tenant: 1, gpu_ms: 9.0, ended: true });
            Err::<(), _>(StoreError::NotFound)
        });
        let (failed, finished) = tokio::join!(answer(failing), store.finish(second, end(), 12.0));
        assert!(failed.is_err() && finished.unwrap().is_some());
        store.add_spent(vec![spent(Some("echo"), 7), spent(None, 7), spent(Some("echo"), 8)]).await.unwrap();
        store.add_spent(vec![spent(Some("echo"), 7)]).await.unwrap();
        drop(opened);

        let opened = reopen(&dir, &clock).await;
        let reader = opened.store.reader();
        let had = OfTenant { model: "echo".into(), tenant: "default".into(), gpu_ms: 42.0, jobs: 1 };
        assert_eq!(reader.usage_of_tenants(7, 8).await.unwrap(), [had]);
        assert!(
            reader.usage_of_tenants(8, 9).await.unwrap().is_empty()
                && reader.usage_of_tenants(0, 7).await.unwrap().is_empty()
        );
        let models = reader.usage_of_models(7, 8).await.unwrap();
        let of: Vec<_> = models.iter().map(|m| (m.spent.model.as_deref(), m.spent.work_ms, m.spent.swaps)).collect();
        assert_eq!(of, [(Some("echo"), 10.0, 2), (None, 5.0, 1)]);
        assert_eq!(reader.job(id).await.unwrap().gpu_ms, 42.0);
        let mut filter = UsageFilter { from: 7 * HOUR_MS, to: 8 * HOUR_MS, tenant: Some("default".into()), limit: 10 };
        let jobs = reader.usage_of_jobs(&filter).await.unwrap();
        assert_eq!(jobs.iter().map(|job| (job.id, job.gpu_ms)).collect::<Vec<_>>(), [(id, 42.0)]);
        filter.tenant = Some("other".into());
        assert!(reader.usage_of_jobs(&filter).await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn sums_go_after_four_hundred_days() {
        let dir = tempfile::tempdir().unwrap();
        let clock = Arc::new(ManualClock::at(0));
        let opened = reopen(&dir, &clock).await;
        opened.store.add_spent(vec![spent(None, 0), spent(None, 1)]).await.unwrap();
        drop(opened);
        clock.advance((KEPT_HOURS + 1) * HOUR_MS);
        let opened = reopen(&dir, &clock).await;
        let left = opened.store.reader().usage_of_models(0, i64::MAX).await.unwrap();
        assert_eq!(left.len(), 1);
        assert_eq!(left[0].spent.swaps, 1, "that of hour 1");
    }
}
