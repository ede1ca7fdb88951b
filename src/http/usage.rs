//! `GET /v1/usage`: who had how much of the GPUs, what swaps and idling took, and what grouping saved.
//!
//! Work is counted by attempt. Swaps are a model's, not a job's: to tenants, batches and jobs they are apportioned, in the
//! proportion of swap to work that the model had within the period. Idling is nobody's.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::{Extension, State};
use axum::http::Uri;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::clock::rfc3339;
use crate::domain::Millis;
use crate::http::AppState;
use crate::http::auth::Caller;
use crate::http::body::{self, shortened};
use crate::http::error::ApiError;
use crate::store::usage::{HOUR_MS, OfJobs, OfModel, OfTenant, UsageFilter};

/// Latest time that can be asked for: the last one that has a year of four digits.
const TIME_MAX: Millis = 253_402_300_799_999;
/// Jobs or batches that are shown, if it is not said, and at most.
const LIMIT_DEFAULT: u64 = 100;
const LIMIT_MAX: u64 = 1_000;
/// Said beside the estimate.
const HOW: &str = "an estimate: for each model, (swaps that serving in order of arrival would have needed - swaps made) x its \
                   learned cost of a swap (load and stop)";

/// GPU time of a row, ms.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Time {
    jobs: i64,
    work: f64,
    swap: f64,
    /// `None`: not this row's.
    idle: Option<f64>,
}

impl Time {
    /// What attempts had of a model, with their part of its swaps.
    fn had(gpu_ms: f64, model: &str, jobs: i64, swap_share: &BTreeMap<&str, f64>) -> Self {
        let swap = gpu_ms * swap_share.get(model).unwrap_or(&0.0);
        Self { jobs, work: gpu_ms, swap, idle: None }
    }

    fn add(&mut self, other: &Self) {
        self.jobs += other.jobs;
        self.work += other.work;
        self.swap += other.swap;
        if let Some(idle) = other.idle {
            *self.idle.get_or_insert_default() += idle;
        }
    }

    fn all(&self) -> f64 {
        self.work + self.swap + self.idle.unwrap_or(0.0)
    }

    /// `price`: of a GPU hour.
    fn json(&self, price: Option<f64>) -> Value {
        json!({
            "jobs": self.jobs,
            "work_s": seconds(self.work),
            "swap_s": seconds(self.swap),
            "idle_s": self.idle.map(seconds),
            "gpu_s": seconds(self.all()),
            "cost": price.map(|price| cost(self.all(), price)),
        })
    }
}

fn seconds(ms: f64) -> f64 {
    // Never minus zero.
    ms.round() / 1e3 + 0.0
}

fn cost(ms: f64, price: f64) -> f64 {
    (ms / HOUR_MS as f64 * price * 1e6).round() / 1e6 + 0.0
}

/// All that was read of a period.
struct Books {
    models: Vec<OfModel>,
    tenants: Vec<OfTenant>,
}

impl Books {
    /// Of a model, ms of swaps for each ms of its jobs' work.
    fn swap_share(&self) -> BTreeMap<&str, f64> {
        let mut work: BTreeMap<&str, f64> = BTreeMap::new();
        for row in &self.tenants {
            *work.entry(row.model.as_str()).or_default() += row.gpu_ms;
        }
        let share = |row: &'_ OfModel| {
            let (name, work) = work.get_key_value(row.spent.model.as_deref()?)?;
            (*work > 0.0).then_some((*name, row.spent.swap_ms / work))
        };
        self.models.iter().filter_map(share).collect()
    }

    /// Where the devices' time went, by model; the last row may be nobody's.
    fn by_model(&self) -> Vec<(Option<&str>, Time)> {
        let jobs = |model: Option<&str>| {
            let mine = self.tenants.iter().filter(|row| Some(row.model.as_str()) == model);
            mine.map(|row| row.jobs).sum()
        };
        let row = |row: &'_ OfModel| Time {
            jobs: jobs(row.spent.model.as_deref()),
            work: row.spent.work_ms,
            swap: row.spent.swap_ms,
            idle: Some(row.spent.idle_ms),
        };
        self.models.iter().map(|one| (one.spent.model.as_deref(), row(one))).collect()
    }

    /// What tenants had, one row for each value of `key`.
    fn by<'a>(&'a self, tenant: Option<&str>, key: impl Fn(&'a OfTenant) -> &'a str) -> Vec<(Option<&'a str>, Time)> {
        let share = self.swap_share();
        let mut rows: BTreeMap<&str, Time> = BTreeMap::new();
        for row in self.tenants.iter().filter(|row| tenant.is_none_or(|tenant| row.tenant == tenant)) {
            rows.entry(key(row)).or_default().add(&Time::had(row.gpu_ms, &row.model, row.jobs, &share));
        }
        rows.into_iter().map(|(name, time)| (Some(name), time)).collect()
    }

    /// Rows of jobs or batches, which are called `word`.
    fn of_jobs<Id: ToString>(&self, word: &str, rows: Vec<OfJobs<Id>>) -> Vec<(Value, Time)> {
        let share = self.swap_share();
        let row = |row: OfJobs<Id>| {
            let named = json!({word: row.id.to_string(), "model": row.model, "tenant": row.tenant});
            (named, Time::had(row.gpu_ms, &row.model, row.jobs, &share))
        };
        rows.into_iter().map(row).collect()
    }

    /// What grouping saved against order of arrival.
    #[expect(clippy::cast_precision_loss, reason = "swaps are far below 2^52")]
    fn saved(&self, price: Option<f64>) -> Value {
        let sum = |of: fn(&OfModel) -> u64| self.models.iter().map(of).sum::<u64>();
        let saved_ms: f64 = self
            .models
            .iter()
            .map(|row| (row.spent.swaps_in_order as f64 - row.spent.swaps as f64) * row.swap_cost_ms.unwrap_or(0.0))
            .sum();
        json!({
            "estimate": true,
            "how": HOW,
            "swaps": sum(|row| row.spent.swaps),
            "swaps_in_arrival_order": sum(|row| row.spent.swaps_in_order),
            "gpu_s": seconds(saved_ms),
            "cost": price.map(|price| cost(saved_ms, price)),
        })
    }
}

/// `GET /v1/usage?by=model|tenant|batch|job&from=&to=&limit=`
pub async fn get(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    uri: Uri,
) -> Result<Response, ApiError> {
    let query = body::query(&uri)?;
    if let Some((key, _)) = query.iter().find(|(key, _)| !["by", "from", "to", "limit"].contains(&key.as_str())) {
        return Err(body::unknown_field(key, &["by", "from", "to", "limit"]));
    }
    let by = body::field(&query, "by").unwrap_or("model");
    let now = state.clock.now();
    let from = time(&query, "from")?.unwrap_or(0);
    let to = time(&query, "to")?.unwrap_or(now + 1);
    if to <= from {
        return Err(ApiError::invalid("to", "to must be later than from"));
    }
    let limit = body::number(&query, "limit")?.unwrap_or(LIMIT_DEFAULT);
    if !(1..=LIMIT_MAX).contains(&limit) {
        return Err(ApiError::invalid("limit", format!("limit must be a whole number from 1 to {LIMIT_MAX}")));
    }
    let tenant = (!caller.admin).then(|| caller.tenant.to_string());
    let filter = UsageFilter { from, to, tenant: tenant.clone(), limit: u32::try_from(limit).unwrap_or(u32::MAX) };
    state.handle.keep_spent().await?;
    // Sums are kept by the hour.
    let hours = (from.div_euclid(HOUR_MS), (to - 1).div_euclid(HOUR_MS) + 1);
    let books = Books {
        models: state.reader.usage_of_models(hours.0, hours.1).await?,
        tenants: state.reader.usage_of_tenants(hours.0, hours.1).await?,
    };
    let price = state.live().gpu_hourly_cost;
    let named = |rows: Vec<(Option<&str>, Time)>| -> Vec<(Value, Time)> {
        rows.into_iter().map(|(name, time)| (json!({by: name}), time)).collect()
    };
    let rows: Vec<(Value, Time)> = match by {
        "model" if caller.admin => named(books.by_model()),
        "model" => named(books.by(tenant.as_deref(), |row| &row.model)),
        "tenant" => named(books.by(tenant.as_deref(), |row| &row.tenant)),
        "batch" => books.of_jobs("batch", state.reader.usage_of_batches(&filter).await?),
        "job" => books.of_jobs("job", state.reader.usage_of_jobs(&filter).await?),
        other => {
            let message = format!("by must be model, tenant, batch or job, not `{}`", shortened(other));
            return Err(ApiError::invalid("by", message));
        }
    };
    let by_hours = !matches!(by, "batch" | "job");
    let mut total = Time::default();
    // Rows of jobs and batches are of an exact time, and not all that happened: their total is their own.
    if !by_hours {
        rows.iter().for_each(|(_, time)| total.add(time));
    } else {
        let whole = if caller.admin { books.by_model() } else { books.by(tenant.as_deref(), |row| &row.tenant) };
        whole.iter().for_each(|(_, time)| total.add(time));
    }
    let data: Vec<Value> = rows.into_iter().map(|(named, time)| merged(named, time.json(price))).collect();
    Ok(Json(json!({
        "object": "usage",
        "by": by,
        "from": (from > 0).then(|| rfc3339(if by_hours { hours.0 * HOUR_MS } else { from })),
        "to": rfc3339(if by_hours { (hours.1 * HOUR_MS).min(now) } else { to.min(now) }),
        "gpu_hourly_cost": price,
        "data": data,
        "total": total.json(price),
        "saved": caller.admin.then(|| books.saved(price)),
    }))
    .into_response())
}

fn merged(mut named: Value, rest: Value) -> Value {
    if let (Value::Object(named), Value::Object(rest)) = (&mut named, rest) {
        named.extend(rest);
    }
    named
}

/// RFC 3339, or seconds since the epoch.
fn time(query: &[(String, String)], name: &str) -> Result<Option<Millis>, ApiError> {
    let Some(text) = body::field(query, name).filter(|text| !text.is_empty()) else { return Ok(None) };
    let parsed = match text.parse::<i64>() {
        Ok(seconds) => seconds.checked_mul(1_000),
        Err(_) => crate::clock::from_rfc3339(text),
    };
    let parsed = parsed.filter(|at| (0..=TIME_MAX).contains(at));
    let message = || format!("{name} must be a time as 2026-09-21T14:00:00Z or seconds, not `{}`", shortened(text));
    parsed.map(Some).ok_or_else(|| ApiError::invalid(name, message()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Spent;

    fn books() -> Books {
        let spent = |model: Option<&str>, work_ms, swap_ms, idle_ms, swaps, swaps_in_order| Spent {
            hour: 0,
            model: model.map(str::to_owned),
            work_ms,
            swap_ms,
            idle_ms,
            swaps,
            swaps_in_order,
        };
        let had = |model: &str, tenant: &str, gpu_ms, jobs| OfTenant {
            model: model.into(),
            tenant: tenant.into(),
            gpu_ms,
            jobs,
        };
        Books {
            models: vec![
                OfModel { spent: spent(Some("a"), 4_000.0, 2_000.0, 500.0, 1, 4), swap_cost_ms: Some(1_000.0) },
                OfModel { spent: spent(Some("b"), 0.0, 700.0, 0.0, 2, 3), swap_cost_ms: None },
                OfModel { spent: spent(None, 0.0, 0.0, 300.0, 0, 0), swap_cost_ms: None },
            ],
            tenants: vec![had("a", "x", 3_000.0, 2), had("a", "y", 1_000.0, 1)],
        }
    }

    #[test]
    fn swaps_are_apportioned_by_work_and_tenants_see_their_own() {
        let books = books();
        let y = books.by(Some("y"), |row| &row.tenant);
        assert_eq!(y, [(Some("y"), Time { jobs: 1, work: 1_000.0, swap: 500.0, idle: None })]);
        let all = books.by(None, |row| &row.model);
        assert_eq!(all, [(Some("a"), Time { jobs: 3, work: 4_000.0, swap: 2_000.0, idle: None })]);
        let mut total = Time::default();
        books.by_model().iter().for_each(|(_, time)| total.add(time));
        assert_eq!((total.all(), total.jobs, total.idle), (7_500.0, 3, Some(800.0)));
    }

    #[test]
    fn savings_are_swaps_not_made_at_their_learned_cost() {
        let saved = books().saved(Some(3.6));
        assert_eq!((&saved["swaps"], &saved["swaps_in_arrival_order"]), (&json!(3), &json!(7)));
        // What b costs is not known.
        assert_eq!((&saved["gpu_s"], &saved["cost"]), (&json!(3.0), &json!(0.003)), "{saved}");
        assert_eq!(saved["estimate"], true);
    }

    #[test]
    fn times_are_read_in_both_ways() {
        let of = |text: &str| time(&[("from".into(), text.into())], "from");
        assert_eq!(of("1790000000"), Ok(Some(1_790_000_000_000)));
        assert_eq!(of("2026-09-21T14:13:20Z"), Ok(Some(1_790_000_000_000)));
        assert!(of("-1").is_err() && of("9223372036854775").is_err());
        assert!(of("yesterday").is_err() && of("").is_ok_and(|at| at.is_none()));
    }
}
