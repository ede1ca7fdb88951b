//! Clients that write down what they were promised, and a look at the server that compares.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use reqwest::Method;
use serde_json::{Value, json};

use super::common::{Api, beside, check_history, is_terminal};
use super::replay::Random;
use super::worker;

/// What one client knows of one submission.
#[derive(Clone, Debug, Default)]
struct Entry {
    /// Sent under an idempotency key: it may be, and is, sent again.
    is_keyed: bool,
    id: Option<String>,
    /// Refused with a word, and not in doubt: nothing of it may be there.
    refused: bool,
    /// The server said that it is cancelled.
    cancelled: bool,
}

/// What all clients know.
#[derive(Clone, Default)]
pub(crate) struct Clients {
    entries: Arc<Mutex<BTreeMap<String, Entry>>>,
    next: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    /// `error.code` of refusals, and how often.
    refusals: Arc<Mutex<BTreeMap<String, usize>>>,
}

impl Clients {
    /// Submissions that were accepted.
    pub(crate) fn accepted(&self) -> usize {
        self.entries.lock().unwrap().values().filter(|entry| entry.id.is_some()).count()
    }

    /// How often something was refused, by code.
    pub(crate) fn refusals(&self) -> BTreeMap<String, usize> {
        self.refusals.lock().unwrap().clone()
    }

    /// Tells all of [`Clients::submit_until_broken`] to stop.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// `hands` clients submit (and cancel now and then) until the server is gone or [`Clients::stop`] is called. Those whose
    /// answer never came are sent again first, if they have a key.
    pub(crate) fn submit_until_broken(
        &self,
        api: &Api,
        hands: usize,
        seed: u64,
        more: &Value,
    ) -> Vec<tokio::task::JoinHandle<()>> {
        self.stop.store(false, Ordering::Relaxed);
        let open: Vec<String> = self.open();
        (0..hands)
            .map(|hand| {
                let (clients, api, more) = (self.clone(), api.clone(), more.clone());
                let again: Vec<String> = open.iter().skip(hand).step_by(hands).cloned().collect();
                let mut random = Random::new(seed ^ hand as u64);
                beside(async move {
                    for name in again {
                        if !clients.submit(&api, &name, &more).await {
                            return;
                        }
                    }
                    while !clients.stop.load(Ordering::Relaxed) {
                        let name = format!("n{}", clients.next.fetch_add(1, Ordering::Relaxed));
                        let entry = Entry { is_keyed: random.below(2) == 0, ..Entry::default() };
                        clients.entries.lock().unwrap().insert(name.clone(), entry);
                        if !clients.submit(&api, &name, &more).await {
                            return;
                        }
                        if random.below(10) == 0 && !clients.cancel(&api, &name).await {
                            return;
                        }
                    }
                })
            })
            .collect()
    }

    /// Names of keyed submissions without an answer.
    fn open(&self) -> Vec<String> {
        let entries = self.entries.lock().unwrap();
        let open = entries.iter().filter(|(_, entry)| entry.is_keyed && entry.id.is_none());
        open.map(|(name, _)| name.clone()).collect()
    }

    /// Sends one; false: the connection broke.
    async fn submit(&self, api: &Api, name: &str, more: &Value) -> bool {
        let is_keyed = self.entries.lock().unwrap()[name].is_keyed;
        let api = if is_keyed { api.header("idempotency-key", name) } else { api.clone() };
        let request = worker::job(name, more.clone()).to_string().into_bytes();
        let Ok(reply) = api.try_send(Method::POST, "/v1/jobs", Some(request)).await else {
            return false;
        };
        let mut entries = self.entries.lock().unwrap();
        let entry = entries.get_mut(name).unwrap();
        if reply.status == 202 {
            entry.id = Some(reply.json()["id"].as_str().unwrap().to_owned());
            entry.refused = false;
        } else {
            assert!(reply.status == 503 || reply.status == 429, "{}: {}", reply.status, reply.text());
            entry.refused = !reply.text().contains("whether this was stored is not known");
            *self.refusals.lock().unwrap().entry(reply.code()).or_default() += 1;
        }
        true
    }

    async fn cancel(&self, api: &Api, name: &str) -> bool {
        let Some(id) = self.entries.lock().unwrap()[name].id.clone() else { return true };
        let Ok(reply) = api.try_send(Method::POST, &format!("/v1/jobs/{id}/cancel"), None).await else {
            return false;
        };
        if reply.status == 200 && reply.json()["state"] == "cancelled" {
            self.entries.lock().unwrap().get_mut(name).unwrap().cancelled = true;
        }
        true
    }

    /// Sends again what is keyed and open, until all of it has its answer.
    pub(crate) async fn settle(&self, api: &Api, more: &Value) {
        for name in self.open() {
            super::common::eventually(super::common::LIMIT, &format!("{name} is accepted"), || async {
                assert!(self.submit(api, &name, more).await, "the server is gone");
                self.entries.lock().unwrap()[&name].id.clone()
            })
            .await;
        }
    }

    /// Compares what the server has with what was promised. Each accepted submission is there once; those without an answer
    /// at most once; those refused not at all; nothing else.
    pub(crate) async fn compare(&self, api: &Api) {
        let mut found: BTreeMap<String, Vec<Value>> = BTreeMap::new();
        for job in all_jobs(api).await {
            found.entry(job["metadata"]["who"].as_str().unwrap().to_owned()).or_default().push(job);
        }
        let entries = self.entries.lock().unwrap().clone();
        for (name, entry) in &entries {
            let jobs = found.remove(name).unwrap_or_default();
            let ids: Vec<&str> = jobs.iter().map(|job| job["id"].as_str().unwrap()).collect();
            match &entry.id {
                Some(id) => assert_eq!(ids, [id], "{name} was accepted, {entry:?}"),
                None if entry.refused => assert!(ids.is_empty(), "{name} was refused: {ids:?}"),
                None => assert!(ids.len() <= 1, "{name} was sent once: {ids:?}"),
            }
            if entry.cancelled {
                assert_eq!(jobs[0]["state"], "cancelled", "{name}");
            }
        }
        assert!(found.is_empty(), "nobody submitted {found:?}");
    }

    /// Waits for the end of all jobs, and compares each whole: one end, and the answer of the attempt that won.
    pub(crate) async fn compare_histories(&self, api: &Api) {
        // Side by side: after a soak there are hundreds of thousands.
        let check = async |job: Value| {
            let id = job["id"].as_str().unwrap();
            let job = if is_terminal(&job) { job } else { api.finished(id).await };
            whole(api, &job).await;
        };
        stream::iter(all_jobs(api).await).for_each_concurrent(8, check).await;
        self.compare(api).await;
    }
}

/// Insists that an ended job is whole. Only what was cancelled may have ended without an answer.
pub(crate) async fn whole(api: &Api, job: &Value) {
    let id = job["id"].as_str().unwrap();
    let events = api.events(id).await;
    let end = check_history(&events);
    assert_eq!(end, format!("job.{}", job["state"].as_str().unwrap()));
    let starts = events.iter().filter(|event| event["type"] == "job.started").count();
    assert_eq!(job["attempt"], starts, "each claim is an attempt: {job}");
    if job["state"] == "cancelled" {
        return;
    }
    assert_eq!(job["state"], "succeeded", "{job}");
    let answer = api.get(&format!("/v1/jobs/{id}/response")).await.is(200).json();
    assert_eq!(answer["prompt"], job["metadata"]["who"], "{job}");
    assert_eq!(answer["token"], format!("{id}.{}", job["attempt"]), "the answer of the attempt that won");
}

/// Every job, oldest first.
pub(crate) async fn all_jobs(api: &Api) -> Vec<Value> {
    let mut jobs: Vec<Value> = Vec::new();
    loop {
        let after = jobs.last().map_or(String::new(), |job| format!("&after={}", job["id"].as_str().unwrap()));
        let page = api.get(&format!("/v1/jobs?order=asc&limit=100{after}")).await.is(200).json();
        jobs.extend(page["data"].as_array().unwrap().iter().cloned());
        if page["has_more"] != true {
            return jobs;
        }
    }
}

/// Waits a moment without meaning, `from` to `to` ms: what matters is that each time it is another one.
pub(crate) async fn a_moment(random: &mut Random, from: u64, to: u64) {
    let ms = from + random.next() % (to - from);
    tokio::time::sleep(Duration::from_millis(ms)).await;
}

/// Nothing special about a job.
pub(crate) fn plain() -> Value {
    json!({})
}
