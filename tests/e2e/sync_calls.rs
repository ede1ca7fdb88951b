//! Calls whose caller holds the line: answers, hops through a cutting proxy, and callers that go away.

use std::time::Duration;

use base64::Engine as _;
use reqwest::Method;
use serde_json::{Value, json};

use crate::common::{Api, CuttingProxy, LIMIT, Reply, Site, beside, check_history, echo, eventually, with};

const PATHS: [&str; 5] =
    ["/v1/chat/completions", "/v1/completions", "/v1/images/generations", "/v1/audio/generations", "/v1/audio/speech"];

/// A text model that serves everything, so that one load is waited for by all kinds of calls.
fn everything(args: &[&str]) -> Value {
    with(echo("text", args), json!({"endpoints": PATHS, "aliases": ["all:latest"]}))
}

fn body(path: &str, who: &str) -> Value {
    let mut body = match path {
        "/v1/chat/completions" => json!({"messages": [{"role": "user", "content": "hi there"}]}),
        "/v1/audio/speech" => json!({"input": "hi there", "voice": "alloy"}),
        _ => json!({"prompt": "hi there"}),
    };
    body["model"] = json!("all:latest");
    body["metadata"] = json!({"who": who});
    if path.starts_with("/v1/audio") {
        body["response_format"] = json!("wav");
    }
    body
}

/// Insists that the answer is what its path promises.
fn check_answer(path: &str, reply: Reply) {
    let reply = reply.is(200);
    assert!(reply.header("x-roundhouse-job-id").starts_with("job_"), "{path}: {:?}", reply.headers);
    match path {
        "/v1/chat/completions" => {
            let answer = reply.json();
            assert_eq!(answer["choices"][0]["message"]["content"], "echo: hi there", "{answer}");
            assert_eq!(answer["choices"][0]["finish_reason"], "stop", "{answer}");
            assert_eq!(
                (&answer["object"], &answer["model"]),
                (&json!("chat.completion"), &json!("all:latest")),
                "{answer}"
            );
            let uuid = reply.header("x-roundhouse-job-id").replace("job_", "chatcmpl-");
            assert_eq!(answer["id"], uuid.as_str(), "{answer}");
            assert!(answer["usage"]["total_tokens"].as_u64().unwrap() > 0, "{answer}");
        }
        "/v1/completions" => assert_eq!(reply.json()["choices"][0]["text"], "echo: hi there", "{}", reply.text()),
        "/v1/images/generations" => {
            let answer = reply.json();
            let text = answer["data"][0]["b64_json"].as_str().unwrap();
            let image = base64::engine::general_purpose::STANDARD.decode(text).unwrap();
            assert!(image.starts_with(b"\x89PNG"), "{path}");
        }
        _ => {
            assert_eq!(reply.header("content-type"), "audio/wav", "{path}");
            assert!(reply.body.starts_with(b"RIFF") && reply.body[8..].starts_with(b"WAVE"), "{path}");
        }
    }
}

async fn call(api: &Api, path: &str, who: &str) -> Reply {
    api.post(path, &body(path, who)).await
}

#[tokio::test]
async fn every_kind_of_call_is_answered() {
    let server = Site::new().model("all", everything(&[])).start().await;
    for path in PATHS {
        check_answer(path, call(&server.api, path, "me").await);
    }
    let page = server.api.get("/v1/jobs?metadata[who]=me").await.is(200).json();
    let kinds: Vec<&str> = page["data"].as_array().unwrap().iter().map(|job| job["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["audio", "audio", "image", "completion", "chat"], "newest first");
    assert!(page["data"].as_array().unwrap().iter().all(|job| job["priority"] == 7), "{page}");
}

#[tokio::test]
async fn calls_through_a_proxy_that_cuts_long_answers_get_theirs_by_hops() {
    let limit = Duration::from_millis(2_000);
    let site = Site::new()
        .server("sync_hop", "700ms")
        .server("sync_max_hops", 50)
        .model("all", everything(&["--load-s", "4"]));
    let server = site.start().await;
    let proxy = CuttingProxy::start(&server.api.base, limit).await;
    let through = server.api.at(&proxy.url).following();

    let calls: Vec<_> = PATHS
        .iter()
        .map(|path| {
            let through = through.clone();
            beside(async move { call(&through, path, path).await })
        })
        .collect();
    for (path, answer) in PATHS.iter().zip(calls) {
        check_answer(path, answer.await.unwrap());
    }
    assert_eq!(proxy.cuts(), 0, "each hop was short enough");
    assert!(proxy.requests() >= 4 * PATHS.len(), "a load of 4 s takes hops of 0.7 s: {}", proxy.requests());

    // The proxy does cut: a wait without hops is lost.
    let slow = json!({"endpoint": "/v1/images/generations", "body": {"model": "all", "prompt": "x", "echo": {"delay_ms": 4000}}});
    let id = server.api.submit(&slow).await;
    through.try_send(Method::GET, &format!("/v1/jobs/{id}?wait=30"), None).await.unwrap_err();
    assert_eq!(proxy.cuts(), 1);
    server.api.succeeded(&id).await;
}

#[tokio::test]
async fn a_hop_is_a_relative_303_that_nobody_may_store() {
    let site = Site::new()
        .server("sync_hop", "200ms")
        .server("sync_max_hops", 500)
        .model("all", everything(&["--load-s", "1"]));
    let server = site.start().await;
    let reply = call(&server.api, "/v1/chat/completions", "me").await.is(303);
    let id = reply.header("x-roundhouse-job-id").to_owned();
    assert_eq!(reply.header("location"), format!("/v1/jobs/{id}/response?hop=1"));
    assert!(reply.header("cache-control").contains("no-store"), "{:?}", reply.headers);
    let again = server.api.get(&format!("/v1/jobs/{id}/response?hop=1")).await.is(303);
    assert_eq!(again.header("location"), format!("/v1/jobs/{id}/response?hop=2"));
    let last = server.api.following().get(again.header("location")).await;
    check_answer("/v1/chat/completions", last);
    // Asked again without waiting, the answer is still there.
    check_answer("/v1/chat/completions", server.api.get(&format!("/v1/jobs/{id}/response?wait=0")).await);
}

#[tokio::test]
async fn after_the_last_hop_the_job_goes_on_without_its_caller() {
    let site = Site::new()
        .server("sync_hop", "200ms")
        .server("sync_max_hops", 3)
        .server("hop_grace", "1s")
        .model("all", everything(&["--load-s", "3"]));
    let server = site.start().await;
    let reply = call(&server.api.following(), "/v1/chat/completions", "me").await.refused(504, "sync_wait_exceeded");
    assert_eq!(reply.header("x-should-retry"), "false");
    let id = reply.json()["error"]["job_id"].as_str().unwrap().to_owned();
    server.api.happened(&id, "job.succeeded").await;
    check_answer("/v1/chat/completions", server.api.get(&format!("/v1/jobs/{id}/response")).await);
}

#[tokio::test]
async fn respond_async_and_waits_are_preferences() {
    let site = Site::new().model("all", everything(&["--load-s", "1"]));
    let server = site.start().await;
    let asynchronous = server.api.header("prefer", "respond-async");
    let job = call(&asynchronous, "/v1/chat/completions", "me").await.is(202).json();
    assert_eq!(job["state"], "queued");
    let request = json!({"endpoint": "/v1/completions", "body": {"model": "all", "prompt": "x"}});
    let waiting = server.api.header("prefer", "wait=60");
    let reply = waiting.post("/v1/jobs", &request).await.is(200);
    assert_eq!(reply.json()["state"], "succeeded");
    assert!(reply.header("preference-applied").contains("wait"), "{:?}", reply.headers);
    server.api.succeeded(job["id"].as_str().unwrap()).await;
}

/// Starts a call and gives back its job's id and what drops the connection.
async fn hold_the_line(api: &Api, who: &'static str) -> (String, tokio::task::JoinHandle<reqwest::Result<Reply>>) {
    let caller = api.clone();
    let request = body("/v1/chat/completions", who).to_string().into_bytes();
    let line = beside(async move { caller.try_send(Method::POST, "/v1/chat/completions", Some(request)).await });
    (api.job_of(who).await, line)
}

/// Insists that the job was cancelled since nobody waited for it.
async fn check_given_up(api: &Api, id: &str) {
    api.happened(id, "job.cancelled").await;
    let job = api.job(id).await;
    assert_eq!((&job["state"], &job["error"]["code"]), (&json!("cancelled"), &json!("client_disconnected")), "{job}");
    check_history(&api.events(id).await);
}

#[tokio::test]
async fn a_job_nobody_waits_for_is_cancelled_and_one_that_somebody_waits_for_is_not() {
    let site = Site::new().server("disconnect_grace", "300ms").model("all", everything(&["--load-s", "5"]));
    let server = site.start().await;
    let api = &server.api;
    let (alone, alone_line) = hold_the_line(api, "alone").await;
    let (watched, watched_line) = hold_the_line(api, "watched").await;
    let (answered, answered_line) = hold_the_line(api, "answered").await;
    let asynchronous =
        api.submit(&json!({"endpoint": "/v1/chat/completions", "body": body("/v1/chat/completions", "async")})).await;

    let by_wait = {
        let (api, id) = (api.clone(), watched.clone());
        beside(async move { api.get(&format!("/v1/jobs/{id}?wait=60")).await })
    };
    let by_response = {
        let (api, id) = (api.clone(), answered.clone());
        beside(async move { api.get(&format!("/v1/jobs/{id}/response")).await })
    };
    // A reader of the asynchronous job that goes away, which is nothing to it.
    drop(api.follow(&asynchronous, 0).await);
    // Nothing shows when the second waiters have been counted; well before the load of 5 s ends is what matters.
    tokio::time::sleep(Duration::from_millis(300)).await;
    for line in [alone_line, watched_line, answered_line] {
        line.abort();
    }

    check_given_up(api, &alone).await;
    assert_ne!(api.worker("all").await["state"], "resident", "it was cancelled while the model was being loaded");
    assert_eq!(by_wait.await.unwrap().is(200).json()["state"], "succeeded");
    check_answer("/v1/chat/completions", by_response.await.unwrap());
    api.succeeded(&asynchronous).await;
    assert_eq!(api.worker("all").await["starts"], 1);
}

#[tokio::test]
async fn losing_the_only_caller_does_not_stop_a_load() {
    let site = Site::new().server("disconnect_grace", "100ms").model("all", everything(&["--load-s", "2"]));
    let server = site.start().await;
    let (id, line) = hold_the_line(&server.api, "me").await;
    line.abort();
    check_given_up(&server.api, &id).await;
    let worker = eventually(LIMIT, "the model is loaded all the same", || async {
        let worker = server.api.worker("all").await;
        (worker["state"] == "resident").then_some(worker)
    })
    .await;
    assert_eq!(worker["starts"], 1, "{worker}");
}

#[tokio::test]
async fn a_caller_that_does_not_follow_its_hop_has_given_up() {
    let site = Site::new()
        .server("sync_hop", "200ms")
        .server("hop_grace", "500ms")
        .model("all", everything(&["--load-s", "60"]));
    let server = site.start().await;
    let reply = call(&server.api, "/v1/images/generations", "me").await.is(303);
    check_given_up(&server.api, reply.header("x-roundhouse-job-id")).await;
}

#[tokio::test]
async fn a_running_job_whose_caller_hangs_up_is_cancelled() {
    let site = Site::new().server("disconnect_grace", "200ms").model("all", everything(&["--delay-ms", "60000"]));
    let server = site.start().await;
    let (id, line) = hold_the_line(&server.api, "me").await;
    server.api.happened(&id, "job.started").await;
    line.abort();
    check_given_up(&server.api, &id).await;
}

#[tokio::test]
async fn callers_of_a_killed_server_find_their_answer_by_their_next_hop() {
    let site = Site::new()
        .server("sync_hop", "300ms")
        .server("sync_max_hops", 50)
        .server("hop_grace", "20s")
        .model("all", everything(&["--load-s", "2"]));
    let mut server = site.start().await;
    let reply = call(&server.api, "/v1/chat/completions", "me").await.is(303);
    server.kill();
    drop(server);
    let server = site.start().await;
    let answer = server.api.following().get(reply.header("location")).await;
    check_answer("/v1/chat/completions", answer);
}

#[tokio::test]
async fn callers_who_do_not_come_back_after_a_restart_have_given_up() {
    let site =
        Site::new().server("sync_hop", "300ms").server("hop_grace", "1s").model("all", everything(&["--load-s", "60"]));
    let mut server = site.start().await;
    let reply = call(&server.api, "/v1/chat/completions", "me").await.is(303);
    server.kill();
    drop(server);
    let server = site.start().await;
    check_given_up(&server.api, reply.header("x-roundhouse-job-id")).await;
}
