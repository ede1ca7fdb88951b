//! What happens when too much waits. A refusal harms nothing that is already there.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};

use crate::common::{LIMIT, Site, echo, echo_job, eventually};

fn chat(who: &str) -> Value {
    json!({"model": "t", "messages": [{"role": "user", "content": "hi"}], "metadata": {"who": who}})
}

#[tokio::test]
async fn a_full_queue_refuses_and_keeps_what_it_has() {
    let site = Site::new().scheduler("queued_max", 4).model("a", echo("custom", &["--load-s", "2"]));
    let server = site.start().await;
    let api = &server.api;
    let mut ids = Vec::new();
    for _ in 0..3 {
        ids.push(api.submit_echo("a", json!({})).await);
    }
    // All or none: two do not fit, so none of them is taken.
    let two = json!({"requests": [echo_job("a", json!({})), echo_job("a", json!({}))]});
    let reply = api.post("/v1/jobs/bulk", &two).await.refused(429, "queue_full");
    assert!(!reply.header("retry-after").is_empty(), "{:?}", reply.headers);
    assert!(reply.text().contains("3 queued and 2 more would be over the limit of 4"), "{}", reply.text());
    // What is over the limit alone will never fit: nobody is told to try again.
    let five: Vec<Value> = (0..5).map(|_| echo_job("a", json!({}))).collect();
    let reply = api.post("/v1/jobs/bulk", &json!({"requests": five})).await.refused(400, "invalid_request");
    let error = &reply.json()["error"];
    assert!(error["message"].as_str().is_some_and(|text| text.contains("send at most 4")), "{error}");
    assert_eq!((&error["retryable"], &error["param"]), (&json!(false), &json!("requests")));
    assert_eq!(error["details"], json!({"limit": 4, "key": "queued_max"}));
    assert!(!reply.headers.contains_key("retry-after"), "{:?}", reply.headers);
    eventually(LIMIT, "three wait", || async { (api.queue().await["queued"] == 3).then_some(()) }).await;
    ids.push(api.submit_echo("a", json!({})).await);
    let reply = api.post("/v1/jobs", &echo_job("a", json!({}))).await.refused(429, "queue_full");
    let seconds: u64 = reply.header("retry-after").parse().unwrap();
    assert!((1..=60).contains(&seconds), "{seconds}");
    assert_eq!(reply.json()["error"]["type"], "rate_limit_error");
    for id in &ids {
        api.succeeded(id).await;
    }
    let id = api.submit_echo("a", json!({})).await;
    api.succeeded(&id).await;
}

#[tokio::test]
async fn one_tenant_cannot_fill_the_queue_for_others() {
    let site = Site::new()
        .scheduler("queued_per_tenant_max", 2)
        .env("ROUNDHOUSE_API_KEYS", "alice:key-of-alice,bob:key-of-bob")
        .model("a", echo("custom", &["--load-s", "60"]));
    let server = site.start().await;
    let (alice, bob) = (server.api.key("key-of-alice"), server.api.key("key-of-bob"));
    alice.submit_echo("a", json!({})).await;
    alice.submit_echo("a", json!({})).await;
    alice.post("/v1/jobs", &echo_job("a", json!({}))).await.refused(429, "queue_full");
    bob.submit_echo("a", json!({})).await;
}

#[tokio::test]
async fn too_many_waiting_callers_are_refused_and_places_come_back() {
    let site = Site::new()
        .scheduler("waiting_sync_max", 2)
        .server("disconnect_grace", "200ms")
        .model("t", echo("text", &["--load-s", "60"]));
    let server = site.start().await;
    let api = &server.api;
    let call = |who: &'static str| {
        let api = api.clone();
        crate::common::beside(async move {
            api.try_send(Method::POST, "/v1/chat/completions", Some(chat(who).to_string().into_bytes())).await
        })
    };
    let (first, second) = (call("first"), call("second"));
    let first_job = api.job_of("first").await;
    let second_job = api.job_of("second").await;
    let reply = api.post("/v1/chat/completions", &chat("third")).await.refused(429, "queue_full");
    assert!(!reply.header("retry-after").is_empty());
    assert_eq!(reply.json()["error"]["details"], json!({"limit": 2, "key": "waiting_sync_max"}));
    // The limit is on callers, not on jobs.
    let asynchronous = api.submit(&json!({"endpoint": "/v1/chat/completions", "body": chat("fourth")})).await;
    assert_eq!(api.job(&asynchronous).await["state"], "queued");

    first.abort();
    assert_eq!(api.happened(&first_job, "job.cancelled").await.event, "job.cancelled");
    let third = call("third");
    api.job_of("third").await;
    for task in [second, third] {
        task.abort();
    }
    api.happened(&second_job, "job.cancelled").await;
    eventually(LIMIT, "only the asynchronous job is left", || async {
        (api.queue().await["queued"] == 1).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_want_of_file_descriptors_is_said_once_and_not_at_each_try() {
    let server = Site::new().model("a", echo("custom", &[] as &[&str])).start().await;
    let (pid, address) = (server.pid(), server.api.base.trim_start_matches("http://").to_owned());
    let may_open = |files: usize| {
        let args = ["--pid".to_owned(), pid.to_string(), format!("--nofile={files}:")];
        assert!(std::process::Command::new("prlimit").args(args).status().unwrap().success());
    };
    may_open(std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count());
    // Some take numbers that are free below the limit.
    let callers: Vec<_> = (0..30).map(|_| std::net::TcpStream::connect(&address).unwrap()).collect();
    let said =
        || server.log().lines().filter(|line| line.contains("accepted") && line.contains("(os error 24)")).count();
    eventually(LIMIT, "it is said", || async { (said() > 0).then_some(()) }).await;
    // Time for ten tries.
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(said(), 1, "{}", server.log());
    may_open(1_000);
    drop(callers);
    server.api.get("/health").await.is(200);
}
