//! Submits the jobs of a trace when they are due, waits for their end, and reads when they started and ended.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::time::Instant;

use super::server::{CHAT, Server};
use crate::cli::api;
use crate::domain::Class;
use crate::sim::Trace;
use crate::sim::record::JobLife;

/// Most jobs of one submission.
const BULK_MAX: usize = 500;
/// Jobs of a page.
const PAGE: usize = 100;
/// How often it is looked whether all have ended.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// How often it is said how far it is.
const SAY_EVERY: Duration = Duration::from_secs(10);
/// Priorities of the two classes: what the API gives to a call on the line, and to one job that is looked up later.
const PRIORITY_INTERACTIVE: u8 = 7;
const PRIORITY_BATCH: u8 = 5;

/// What became of a trace's jobs, in its seconds.
pub(super) struct Played {
    /// By the trace's jobs.
    pub(super) jobs: Vec<JobLife>,
    /// By the trace's models.
    pub(super) loads: Vec<usize>,
    /// What ending a worker and loading one took together, as the server has learned it; by the trace's models.
    pub(super) swap_s: Vec<f64>,
}

/// Plays a trace. Fails if a job does not end well, except by its deadline.
pub(super) async fn play(trace: &Trace, server: &Server, factor: f64) -> anyhow::Result<Played> {
    let tenants: Vec<api::Server> =
        trace.tenants.iter().map(|tenant| server.api(tenant)).collect::<anyhow::Result<_>>()?;
    let mut player =
        Player { trace, tenants, factor, begun: Instant::now(), said: Instant::now(), ids: HashMap::new() };
    player.submit_all().await?;
    let jobs = player.ended_jobs().await?;
    Ok(Played { jobs: player.lives(&jobs)?, loads: player.loads().await?, swap_s: player.swap_s().await? })
}

struct Player<'a> {
    trace: &'a Trace,
    /// Clients, by the trace's tenants.
    tenants: Vec<api::Server>,
    factor: f64,
    begun: Instant,
    said: Instant,
    /// Place of each job in the trace, by its id.
    ids: HashMap<String, usize>,
}

impl Player<'_> {
    /// Seconds of the trace since the begin.
    fn now_s(&self) -> f64 {
        self.begun.elapsed().as_secs_f64() * self.factor
    }

    async fn submit_all(&mut self) -> anyhow::Result<()> {
        let mut next = 0;
        while let Some(job) = self.trace.jobs.get(next) {
            let at = self.begun + Duration::from_secs_f64(job.arrival_s / self.factor);
            while Instant::now() < at {
                self.say("submitted", next);
                tokio::time::sleep_until(at.min(Instant::now() + SAY_EVERY)).await;
            }
            let now = self.now_s();
            let due = self.trace.jobs[next..].iter().take_while(|job| job.arrival_s <= now).count().max(1);
            self.submit(next, next + due).await?;
            next += due;
        }
        Ok(())
    }

    /// Submits jobs that are due: those of one tenant together, if they are alike, one by one otherwise.
    async fn submit(&mut self, from: usize, to: usize) -> anyhow::Result<()> {
        let mut first = from;
        while first < to {
            let jobs = &self.trace.jobs[first..to];
            let alike = jobs.iter().take(BULK_MAX).take_while(|job| **job == jobs[0]).count();
            let requests: Vec<Value> = jobs[..alike].iter().map(|_| self.request(first)).collect();
            let api = &self.tenants[jobs[0].tenant];
            if let [request] = &requests[..] {
                let job = api.post_json("/v1/jobs", request).await?;
                self.note(&job, first)?;
            } else {
                let answer = api.post_json("/v1/jobs/bulk", &json!({"requests": requests})).await?;
                let jobs = answer["jobs"].as_array().context("no `jobs` in the answer to a bulk submission")?;
                for (place, job) in jobs.iter().enumerate() {
                    self.note(job, first + place)?;
                }
            }
            first += alike;
        }
        Ok(())
    }

    fn note(&mut self, job: &Value, place: usize) -> anyhow::Result<()> {
        let id = job["id"].as_str().context("no `id` in the answer to a submission")?;
        self.ids.insert(id.to_owned(), place);
        Ok(())
    }

    fn request(&self, place: usize) -> Value {
        let job = &self.trace.jobs[place];
        let ms = job.work_s * 1e3 / self.factor;
        let priority = if job.class == Class::Interactive { PRIORITY_INTERACTIVE } else { PRIORITY_BATCH };
        let model = &self.trace.models[job.model];
        let mut body = json!({"messages": [{"role": "user", "content": "x"}], "echo": {"delay_ms": ms}});
        let mut request = if model.join {
            body["model"] = json!(model.name);
            json!({"endpoint": CHAT, "body": body, "priority": priority})
        } else {
            json!({"kind": "custom", "model": model.name, "input": body, "priority": priority})
        };
        if let Some(deadline) = job.deadline_s {
            request["deadline_s"] = json!((deadline - self.now_s()).max(0.001));
        }
        request
    }

    /// All jobs by their places in the trace, once they have ended.
    async fn ended_jobs(&mut self) -> anyhow::Result<Vec<Value>> {
        loop {
            let queue = self.tenants[0].get("/v1/queue").await?;
            let count = |name: &str| queue[name].as_u64().with_context(|| format!("no `{name}` in /v1/queue"));
            let left = count("queued")? + count("running")?;
            // What was submitted or ended just now may not be counted yet.
            if left == 0 {
                let jobs = self.all_jobs().await?;
                if jobs.iter().all(|job| !job["finished_at"].is_null()) {
                    return Ok(jobs);
                }
            }
            self.say("ended", self.trace.jobs.len().saturating_sub(usize::try_from(left)?));
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Progress, now and then.
    #[expect(clippy::print_stderr, reason = "progress for the person who waits")]
    fn say(&mut self, what: &str, count: usize) {
        if self.said.elapsed() >= SAY_EVERY {
            self.said = Instant::now();
            let (name, jobs) = (&self.trace.name, self.trace.jobs.len());
            eprintln!("{name}: {:.0} s of the trace, {count} of {jobs} jobs {what}", self.now_s());
        }
    }

    async fn all_jobs(&self) -> anyhow::Result<Vec<Value>> {
        let mut jobs = vec![Value::Null; self.trace.jobs.len()];
        for api in &self.tenants {
            let mut after = String::new();
            loop {
                let page = api.get(&format!("/v1/jobs?order=asc&limit={PAGE}{after}")).await?;
                for job in page["data"].as_array().context("no `data` in /v1/jobs")? {
                    let id = job["id"].as_str().unwrap_or_default();
                    let place = *self.ids.get(id).with_context(|| format!("{id} was not submitted"))?;
                    jobs[place] = job.clone();
                    after = format!("&after={id}");
                }
                if page["has_more"] != json!(true) {
                    break;
                }
            }
        }
        if jobs.contains(&Value::Null) {
            bail!("jobs that were accepted are missing in /v1/jobs");
        }
        Ok(jobs)
    }

    /// When each job started and ended, counted from the begin of the trace as the server's clock saw it.
    fn lives(&self, jobs: &[Value]) -> anyhow::Result<Vec<JobLife>> {
        let mut begin = f64::MAX;
        for (job, planned) in jobs.iter().zip(&self.trace.jobs) {
            let created = at_s(job, "created_at")?.context("a job without created_at")?;
            // No job was submitted before its time, and the promptest one right on it.
            begin = begin.min(created - planned.arrival_s);
        }
        let life = |job: &Value| {
            let state = job["state"].as_str().unwrap_or_default();
            if !matches!(state, "succeeded" | "expired") {
                bail!("{} ended as {state}: {}", job["id"], job["error"]);
            }
            let since = |name: &str| anyhow::Ok(at_s(job, name)?.map(|at| at - begin));
            let start_s = if state == "succeeded" { since("started_at")? } else { None };
            Ok(JobLife { start_s, end_s: since("finished_at")?, worker: None, told_s: None })
        };
        jobs.iter().map(life).collect()
    }

    /// What a swap to each model costs, by what the server has learned.
    async fn swap_s(&self) -> anyhow::Result<Vec<f64>> {
        let queue = self.tenants[0].get("/v1/queue").await?;
        let models = queue["models"].as_array().context("no `models` in /v1/queue")?;
        let of = |name: &str| {
            let own = models.iter().find(|model| model["model"] == name);
            own.and_then(|model| model["swap_cost_s"].as_f64()).with_context(|| format!("no swap_cost_s of {name}"))
        };
        self.trace.models.iter().map(|model| of(&model.name)).collect()
    }

    /// Loads of each model after which a worker was ready.
    async fn loads(&self) -> anyhow::Result<Vec<usize>> {
        let workers = self.tenants[0].get("/v1/workers").await?;
        let workers = workers["data"].as_array().context("no `data` in /v1/workers")?;
        let of = |name: &str| {
            let own = workers.iter().filter(|worker| worker["model"] == name);
            own.filter_map(|worker| usize::try_from(worker["starts"].as_u64()?).ok()).sum()
        };
        Ok(self.trace.models.iter().map(|model| of(&model.name)).collect())
    }
}

/// A time of a job in seconds.
fn at_s(job: &Value, name: &str) -> anyhow::Result<Option<f64>> {
    let Some(text) = job[name].as_str() else { return Ok(None) };
    let at = OffsetDateTime::parse(text, &Rfc3339).with_context(|| format!("{name} of a job is `{text}`"))?;
    Ok(Some(at.unix_timestamp_nanos() as f64 / 1e9))
}
