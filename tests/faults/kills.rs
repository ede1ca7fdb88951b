//! The server is killed, and told to stop, at random moments while clients submit: every job that was accepted is there
//! once, and ends once, with its own answer.
//!
//! Each submission has an idempotency key and is sent again with it until it is accepted, as a careful client does; so
//! nothing is there twice either, though the first answer may have been lost with the server.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use nix::sys::signal::Signal;
use reqwest::Method;
use serde_json::{Value, json};

use super::common::{Api, LIMIT, Site, beside, check_history, echo, within};
use super::replay::{Random, seed};

const SUBMITTERS: usize = 8;

/// Kills; `ROUNDHOUSE_KILL_CYCLES` sets it.
fn cycles() -> usize {
    std::env::var("ROUNDHOUSE_KILL_CYCLES").map_or(30, |text| text.parse().expect("ROUNDHOUSE_KILL_CYCLES is a number"))
}

/// What clients know: the text of each accepted job, by id.
type Accepted = BTreeMap<String, String>;

struct Clients {
    stop: Arc<AtomicBool>,
    tasks: Vec<tokio::task::JoinHandle<Accepted>>,
}

impl Clients {
    fn start(api: &Api, next: &Arc<AtomicU64>, unanswered: Vec<String>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let unanswered = Arc::new(std::sync::Mutex::new(unanswered));
        let tasks = (0..SUBMITTERS)
            .map(|_| {
                let (api, next, stop, unanswered) = (api.clone(), next.clone(), stop.clone(), unanswered.clone());
                beside(async move {
                    let mut accepted = Accepted::new();
                    while !stop.load(Ordering::SeqCst) {
                        let again = unanswered.lock().unwrap().pop();
                        let text = again.unwrap_or_else(|| format!("text {}", next.fetch_add(1, Ordering::SeqCst)));
                        let sent = submit(&api, &text).await;
                        match sent {
                            Some(id) => drop(accepted.insert(id, text)),
                            None => {
                                accepted.insert(format!("unanswered {text}"), text);
                                return accepted;
                            }
                        }
                    }
                    accepted
                })
            })
            .collect();
        Self { stop, tasks }
    }

    /// What was accepted, and texts without an answer.
    async fn end(self) -> (Accepted, Vec<String>) {
        self.stop.store(true, Ordering::SeqCst);
        let (mut accepted, mut unanswered) = (Accepted::new(), Vec::new());
        for task in self.tasks {
            for (id, text) in within(LIMIT, "a client ends", task).await.unwrap() {
                if id.starts_with("unanswered") { unanswered.push(text) } else { drop(accepted.insert(id, text)) }
            }
        }
        (accepted, unanswered)
    }
}

/// `None`: no answer, or the server is stopping.
async fn submit(api: &Api, text: &str) -> Option<String> {
    let body = json!({"model": "echo", "messages": [{"role": "user", "content": text}]});
    let request = json!({"endpoint": "/v1/chat/completions", "body": body, "metadata": {"text": text}});
    let api = api.header("idempotency-key", text);
    let reply = api.try_send(Method::POST, "/v1/jobs", Some(request.to_string().into_bytes())).await.ok()?;
    match reply.status {
        202 => Some(reply.json()["id"].as_str().unwrap().to_owned()),
        503 => None,
        other => panic!("{other}: {}", reply.text()),
    }
}

/// All jobs of the server.
async fn all_jobs(api: &Api) -> Vec<Value> {
    let mut all: Vec<Value> = Vec::new();
    loop {
        let after = all.last().map_or(String::new(), |job| format!("&after={}", job["id"].as_str().unwrap()));
        let page = api.get(&format!("/v1/jobs?order=asc&limit=100{after}")).await.is(200).json();
        all.extend(page["data"].as_array().unwrap().iter().cloned());
        if page["has_more"] == json!(false) {
            return all;
        }
    }
}

/// Every accepted job once, ended once, with its own answer; nothing twice, nothing that nobody sent.
async fn check(api: &Api, accepted: &Accepted, unanswered: &BTreeSet<String>) {
    let mut texts = BTreeSet::new();
    let all = all_jobs(api).await;
    for job in &all {
        let id = job["id"].as_str().unwrap();
        let text = job["metadata"]["text"].as_str().unwrap();
        assert!(texts.insert(text.to_owned()), "`{text}` is there twice");
        match accepted.get(id) {
            Some(known) => assert_eq!(known, text, "{id} is another one's"),
            None => assert!(unanswered.contains(text), "{id} was never sent: {job}"),
        }
    }
    let ids: BTreeSet<&str> = all.iter().map(|job| job["id"].as_str().unwrap()).collect();
    let lost: Vec<_> = accepted.iter().filter(|(id, _)| !ids.contains(id.as_str())).collect();
    assert!(lost.is_empty(), "accepted and lost: {lost:?}");
    // Side by side: after a thousand kills there are tens of thousands.
    stream::iter(accepted).for_each_concurrent(SUBMITTERS, |(id, text)| check_job(api, id, text)).await;
}

async fn check_job(api: &Api, id: &str, text: &str) {
    let job = api.succeeded(id).await;
    let answer = job["result"]["body"]["choices"][0]["message"]["content"].as_str().unwrap_or_default();
    assert!(answer.contains(text), "{text} was answered by {answer}");
    let events = api.events(id).await;
    assert_eq!(check_history(&events), "job.succeeded");
    // The answer is the attempt's that the end names.
    let starts = events.iter().filter(|event| event["type"] == "job.started").count();
    assert_eq!(job["attempt"], json!(starts), "{events:?}");
}

fn site() -> Site {
    Site::new().model("echo", echo("text", &["--delay-ms", "20"]))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_minus_9_at_any_moment_loses_nothing() {
    let mut random = Random::new(seed("kill_minus_9_at_any_moment_loses_nothing"));
    let site = site();
    let next = Arc::new(AtomicU64::new(0));
    let (mut accepted, mut waiting, mut seen) = (Accepted::new(), Vec::new(), BTreeSet::new());
    let cycles = cycles();
    for cycle in 0..cycles {
        let mut server = site.start().await;
        let clients = Clients::start(&server.api, &next, std::mem::take(&mut waiting));
        tokio::time::sleep(Duration::from_millis(random.below(500) as u64)).await;
        server.kill();
        server.forget_processes();
        let (more, unanswered) = clients.end().await;
        accepted.extend(more);
        seen.extend(unanswered.iter().cloned());
        waiting = unanswered;
        if cycle % 100 == 99 {
            eprintln!("{} of {cycles} kills, {} jobs accepted", cycle + 1, accepted.len());
        }
    }
    let server = site.start().await;
    let clients = Clients::start(&server.api, &next, waiting);
    let (more, unanswered) = clients.end().await;
    accepted.extend(more);
    seen.extend(unanswered);
    assert!(accepted.len() >= cycles, "{} jobs in {cycles} cycles", accepted.len());
    check(&server.api, &accepted, &seen).await;
    eprintln!("{cycles} kills, {} jobs accepted, none lost, none twice", accepted.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_under_load_loses_nothing_and_is_in_time() {
    let site = site().server("shutdown_grace", "5s");
    let next = Arc::new(AtomicU64::new(0));
    let (mut accepted, mut waiting, mut seen) = (Accepted::new(), Vec::new(), BTreeSet::new());
    for _ in 0..3 {
        let mut server = site.start().await;
        let clients = Clients::start(&server.api, &next, std::mem::take(&mut waiting));
        // Once jobs run: a stop must wait for them, or give them back uncharged.
        let text = format!("probe {}", accepted.len());
        let probe = submit(&server.api, &text).await.expect("accepted");
        server.api.succeeded(&probe).await;
        accepted.insert(probe, text);
        server.signal(Signal::SIGTERM);
        let status = within(Duration::from_secs(15), "it stops within its grace", server.ended()).await;
        assert!(status.success(), "{status}: {}", server.log());
        server.all_gone(LIMIT).await;
        server.forget_processes();
        let (more, unanswered) = clients.end().await;
        accepted.extend(more);
        seen.extend(unanswered.iter().cloned());
        waiting = unanswered;
    }
    let server = site.start().await;
    check(&server.api, &accepted, &seen).await;
    for id in accepted.keys() {
        let job = server.api.job(id).await;
        assert_eq!(job["error"], Value::Null, "{job}");
    }
}
