//! The server is killed or stopped, and started again on the same data dir.

use std::time::Duration;

use nix::sys::signal::Signal;
use reqwest::Method;
use serde_json::json;

use crate::common::{Api, LIMIT, Proc, Reply, Server, Site, beside, check_history, echo, echo_job, eventually, with};

/// Jobs in three rounds of submitting, killing and starting again.
const ROUNDS: u64 = 3;
const JOBS_PER_ROUND: usize = 40;

#[tokio::test]
async fn no_accepted_job_is_lost_or_ends_twice_when_the_server_is_killed() {
    let seed =
        std::env::var("ROUNDHOUSE_TEST_SEED").map_or_else(|_| u64::from(std::process::id()), |s| s.parse().unwrap());
    eprintln!("ROUNDHOUSE_TEST_SEED={seed}");
    let site = Site::new().server("worker_grace", "1s");
    // Orphans that hold the device until they are killed: the next server must see to that before it loads.
    let mut args = site.whole_device();
    args.extend(["--ignore-sigterm", "--delay-ms", "30"].map(str::to_owned));
    let site = site.model("a", echo("custom", &args)).model("b", echo("text", &args));
    let mut accepted = Vec::new();
    let mut random = seed;
    let mut server = site.start().await;
    for _ in 0..ROUNDS {
        let submitting = beside(submit_until_refused(server.api.clone()));
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        // A moment without meaning: what matters is that each round has another one.
        tokio::time::sleep(Duration::from_millis(100 + (random >> 33) % 1_500)).await;
        let before = server.processes();
        server.kill();
        accepted.extend(submitting.await.unwrap());
        let orphans: Vec<Proc> = before.into_iter().filter(Proc::is_alive).collect();
        server.forget_processes();
        server = site.start().await;
        no_orphan_beside_a_new_worker(&server, &orphans).await;
    }
    assert!(accepted.len() > 10, "the rounds did something: {}", accepted.len());

    for id in &accepted {
        let job = server.api.succeeded(id).await;
        let events = server.api.events(id).await;
        assert_eq!(check_history(&events), "job.succeeded");
        let started = events.iter().filter(|event| event["type"] == "job.started").count();
        assert_eq!(job["attempt"], started, "each claim is an attempt: {job}");
        assert_eq!((&job["failures"], &job["crashes"]), (&json!(0), &json!(0)), "a restart charges nothing: {job}");
    }
    for state in ["queued", "running", "cancelling", "failed"] {
        let page = server.api.get(&format!("/v1/jobs?state={state}")).await.is(200).json();
        // One that was committed without its 202 having reached us counts, too: it must not hang about either.
        let left = page["data"].as_array().unwrap();
        for job in left {
            server.api.succeeded(job["id"].as_str().unwrap()).await;
        }
    }
    for model in ["a", "b"] {
        assert!(!server.worker_log(model).contains("out of memory"), "{model} found the device free");
    }
}

#[tokio::test]
async fn a_key_makes_one_job_whatever_becomes_of_the_server() {
    let site = Site::new().model("a", echo("custom", &[] as &[&str]));
    let mut server = site.start().await;
    let request = echo_job("a", json!({}));
    let sent = |server: &Server| {
        let (api, body) = (server.api.header("idempotency-key", "once"), request.to_string().into_bytes());
        beside(async move { api.try_send(Method::POST, "/v1/jobs", Some(body)).await })
    };
    let mut answers = Vec::new();
    for _ in 0..2 {
        // The first answer shows that the server is at it; the others come before its end, or not at all.
        let calls: Vec<_> = (0..25).map(|_| sent(&server)).collect();
        let mut calls = calls.into_iter();
        answers.push(calls.next().unwrap().await.unwrap().unwrap().is(202));
        server.kill();
        for call in calls {
            answers.extend(call.await.unwrap());
        }
        server.forget_processes();
        server = site.start().await;
    }
    for call in (0..50).map(|_| sent(&server)).collect::<Vec<_>>() {
        answers.push(call.await.unwrap().unwrap());
    }
    let is_new = |reply: &&Reply| reply.header("idempotent-replayed") != "true";
    assert!(answers.iter().filter(is_new).count() <= 1, "all but the first are told so");
    let mut ids: Vec<String> = Vec::new();
    for reply in answers {
        ids.push(reply.is(202).json()["id"].as_str().unwrap().to_owned());
    }
    ids.dedup();
    assert_eq!(ids.len(), 1, "{ids:?}");
    let api = server.api.header("idempotency-key", "once");
    api.post("/v1/jobs", &echo_job("a", json!({"other": 1}))).await.refused(422, "idempotency_key_reused");
    server.api.succeeded(&ids[0]).await;
    let page = server.api.get("/v1/jobs").await.is(200).json();
    assert_eq!(page["data"].as_array().unwrap().len(), 1, "{page}");
}

/// Submits until the connection breaks; returns the ids of accepted jobs.
async fn submit_until_refused(api: Api) -> Vec<String> {
    let mut ids = Vec::new();
    for n in 0..JOBS_PER_ROUND {
        let request = if n % 4 == 3 {
            json!({"endpoint": "/v1/chat/completions",
                   "body": {"model": "b", "messages": [{"role": "user", "content": "hi"}]}})
        } else {
            echo_job("a", json!({}))
        };
        match api.try_send(Method::POST, "/v1/jobs", Some(request.to_string().into_bytes())).await {
            Ok(reply) => ids.push(reply.is(202).json()["id"].as_str().unwrap().to_owned()),
            Err(_) => break,
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    ids
}

/// At the moment the first worker of the new server is seen, no process of the old one may live.
async fn no_orphan_beside_a_new_worker(server: &Server, orphans: &[Proc]) {
    let new = eventually(Duration::from_secs(30), "a new worker, or nothing to do", || async {
        let new: Vec<Proc> = server.processes().into_iter().filter(|p| p.is_worker() && !orphans.contains(p)).collect();
        if !new.is_empty() {
            return Some(new);
        }
        let queue = server.api.queue().await;
        (queue["queued"] == 0 && queue["running"] == 0).then(Vec::new)
    })
    .await;
    let alive: Vec<&Proc> = orphans.iter().filter(|p| p.is_alive()).collect();
    assert!(alive.is_empty(), "{alive:?} live beside {new:?}");
}

#[tokio::test]
async fn nothing_of_a_killed_server_runs_on() {
    // A worker that hears neither SIGTERM nor the end of its request, in the middle of a job.
    let site = Site::new()
        .model("a", echo("custom", &["--ignore-sigterm", "--hang"]))
        .model("b", echo("custom", &["--load-s", "60"]));
    let mut server = site.start().await;
    let id = server.api.submit_echo("a", json!({})).await;
    server.api.happened(&id, "job.started").await;
    assert!(!server.processes().is_empty());
    server.kill();
    server.all_gone(Duration::from_secs(15)).await;
}

#[tokio::test]
async fn a_server_killed_while_a_model_loads_leaves_nothing_either() {
    let site = Site::new().model("a", echo("custom", &["--load-s", "60"]));
    let mut server = site.start().await;
    let id = server.api.submit_echo("a", json!({})).await;
    server.api.happened(&id, "job.loading").await;
    server.worker("a").await;
    server.kill();
    server.all_gone(Duration::from_secs(15)).await;
}

#[tokio::test]
async fn sigterm_lets_running_jobs_finish_and_keeps_the_others() {
    let site = Site::new().model("a", echo("custom", &["--delay-ms", "2000"]));
    let mut server = site.start().await;
    let api = server.api.clone();
    let running = api.submit_echo("a", json!({})).await;
    let mut waiting = Vec::new();
    for _ in 0..3 {
        waiting.push(api.submit_echo("a", json!({})).await);
    }
    api.happened(&running, "job.started").await;
    let caller = {
        let (api, running) = (api.clone(), running.clone());
        beside(async move { api.get(&format!("/v1/jobs/{running}?wait=30")).await })
    };
    // Nothing shows when the caller's request has come; it is a matter of a few ms.
    tokio::time::sleep(Duration::from_millis(300)).await;
    server.signal(Signal::SIGTERM);
    // New work is refused from now on: by an answer, or since nobody listens any more.
    let refused = eventually(Duration::from_secs(10), "new work is refused", || async {
        let request = echo_job("a", json!({})).to_string().into_bytes();
        match api.try_send(Method::POST, "/v1/jobs", Some(request)).await {
            Ok(reply) if reply.status == 202 => None,
            Ok(reply) => Some(Some(reply)),
            Err(_) => Some(None),
        }
    })
    .await;
    if let Some(reply) = refused {
        reply.refused(503, "draining");
    }
    let status = server.ended().await;
    assert_eq!(status.code(), Some(0));
    assert!(server.processes().is_empty(), "nothing is left when the server has ended");
    let answered = caller.await.unwrap();
    assert_eq!(answered.is(200).json()["state"], "succeeded", "who waits for a running job is answered");
    drop(server);

    let server = site.start().await;
    let job = server.api.job(&running).await;
    assert_eq!((&job["state"], &job["attempt"]), (&json!("succeeded"), &json!(1)), "it was let finish: {job}");
    for id in &waiting {
        let job = server.api.succeeded(id).await;
        assert_eq!(job["attempt"], 1, "it was not touched: {job}");
        check_history(&server.api.events(id).await);
    }
}

#[tokio::test]
async fn a_second_signal_stops_at_once_and_the_running_job_runs_again() {
    let site = Site::new().model("a", echo("custom", &["--delay-ms", "60000"]));
    let mut server = site.start().await;
    let id = server.api.submit_echo("a", json!({})).await;
    server.api.happened(&id, "job.started").await;
    server.signal(Signal::SIGTERM);
    eventually(Duration::from_secs(10), "the first signal is heard", || async {
        server.log().contains("a second signal stops at once").then_some(())
    })
    .await;
    server.signal(Signal::SIGTERM);
    server.ended().await;
    assert!(server.processes().is_empty());
    drop(server);
    let server = site.start().await;
    server.api.happened(&id, "job.started").await;
    assert_eq!(server.api.job(&id).await["failures"], 0, "stopping charges nothing");
    assert_eq!(server.api.poke(&format!("/v1/jobs/{id}/cancel")).await.is(200).json()["id"], id.as_str());
    assert_eq!(server.api.finished(&id).await["state"], "cancelled");
}

#[tokio::test]
async fn a_second_server_on_the_same_data_dir_is_refused() {
    let site = Site::new().model("a", echo("custom", &[] as &[&str]));
    let server = site.start().await;
    let output = tokio::process::Command::new(env!("CARGO_BIN_EXE_roundhouse"))
        .args(["serve", "--listen", "127.0.0.1:0", "--config"])
        .arg(site.path().join("models.yaml"))
        .arg("--data-dir")
        .arg(site.data())
        .output()
        .await
        .unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("another roundhouse server uses"), "{text}");
    let id = server.api.submit_echo("a", json!({})).await;
    server.api.succeeded(&id).await;
}

#[tokio::test]
async fn callers_on_the_line_are_told_when_the_server_stops() {
    let text = with(echo("text", &["--delay-ms", "2000"]), json!({"limit": 1}));
    let site = Site::new().server("hop_grace", "30s").model("t", text);
    let mut server = site.start().await;
    let api = server.api.clone();
    let chat = |who: &str, stream: bool| json!({"model": "t", "messages": [{"role": "user", "content": "hi"}], "metadata": {"who": who}, "stream": stream});
    let call = |body: serde_json::Value| {
        let api = api.clone();
        beside(async move { api.post("/v1/chat/completions", &body).await })
    };
    let running = call(chat("running", true));
    let id = api.job_of("running").await;
    api.happened(&id, "job.started").await;
    let waiting = call(chat("waiting", false));
    let waiting_id = api.job_of("waiting").await;
    server.signal(Signal::SIGTERM);
    let refused = waiting.await.unwrap().refused(503, "draining");
    assert_eq!(refused.json()["error"]["job_id"], waiting_id.as_str(), "where its answer will be");
    let streamed = running.await.unwrap().is(200).text();
    assert!(streamed.contains("echo:") && streamed.ends_with("data: [DONE]\n\n"), "{streamed}");
    assert_eq!(server.ended().await.code(), Some(0));
    drop(server);

    let server = site.start().await;
    let answer = server.api.following().get(&format!("/v1/jobs/{waiting_id}/response")).await.is(200).json();
    assert_eq!(answer["choices"][0]["message"]["content"], "echo: hi", "{answer}");
}

#[tokio::test]
async fn callers_of_jobs_that_a_stop_cuts_are_told_to_fetch_and_not_to_send_again() {
    let text = echo("text", &["--delay-ms", "3000"]);
    let site = Site::new().server("shutdown_grace", "1s").model("t", text);
    let mut server = site.start().await;
    let api = server.api.clone();
    let chat = json!({"model": "t", "messages": [{"role": "user", "content": "hi"}], "metadata": {"who": "async"}});
    let submitted = api.submit(&json!({"endpoint": "/v1/chat/completions", "body": chat.clone()})).await;
    let called = beside({
        let (api, mut chat) = (api.clone(), chat.clone());
        chat["metadata"]["who"] = json!("sync");
        async move { api.post("/v1/chat/completions", &chat).await }
    });
    let called_id = api.job_of("sync").await;
    let fetched = beside({
        let (api, submitted) = (api.clone(), submitted.clone());
        async move { api.get(&format!("/v1/jobs/{submitted}/response")).await }
    });
    for id in [&submitted, &called_id] {
        api.happened(id, "job.started").await;
    }
    // Nothing shows when the request for the answer has come; it is a matter of a few ms.
    tokio::time::sleep(Duration::from_millis(300)).await;
    server.signal(Signal::SIGTERM);
    for (waiting, id) in [(called, &called_id), (fetched, &submitted)] {
        let told = waiting.await.unwrap().refused(503, "draining");
        let body = told.json();
        assert_eq!((&body["error"]["job_id"], &body["error"]["retryable"]), (&json!(id), &json!(false)), "{body}");
        assert_eq!((told.header("x-should-retry"), told.header("retry-after")), ("false", ""), "{:?}", told.headers);
        assert_ne!(body["title"], "No new jobs are accepted now", "{body}");
        for words in ["accepted", &format!("/v1/jobs/{id}/response"), "do not send"] {
            assert!(body["detail"].as_str().unwrap().contains(words), "{words}: {body}");
        }
    }
    assert_eq!(server.ended().await.code(), Some(0));
    drop(server);

    let server = site.start().await;
    for id in [&called_id, &submitted] {
        let answer = server.api.following().get(&format!("/v1/jobs/{id}/response")).await.is(200).json();
        assert_eq!(answer["choices"][0]["message"]["content"], "echo: hi", "{answer}");
        assert_eq!(server.api.job(id).await["attempt"], 2);
    }
}

#[tokio::test]
async fn jobs_of_a_model_that_left_the_file_wait_until_it_is_back() {
    let entry = || echo("custom", &[] as &[&str]);
    let site = Site::new().model("gone", echo("custom", &["--load-s", "60"])).model("b", entry());
    let server = site.start().await;
    let waiting = server.api.submit_echo("gone", json!({})).await;
    let unwanted = server.api.submit_echo("gone", json!({})).await;
    drop(server);

    let site = site.without_model("gone");
    let server = site.start().await;
    let api = &server.api;
    let job = api.job(&waiting).await;
    assert_eq!((&job["state"], &job["state_reason"]), (&json!("queued"), &json!("model_blocked")), "{job}");
    let other = api.submit_echo("b", json!({})).await;
    api.succeeded(&other).await;
    api.poke(&format!("/v1/jobs/{unwanted}/cancel")).await.is(200);
    assert_eq!(api.job(&unwanted).await["state"], "cancelled");
    api.post("/v1/jobs", &echo_job("gone", json!({}))).await.refused(404, "model_not_found");
    drop(server);

    let server = site.model("gone", entry()).start().await;
    server.api.succeeded(&waiting).await;
}

#[tokio::test]
async fn who_comes_while_the_server_stops_is_answered() {
    let site = Site::new().model("a", echo("custom", &[] as &[&str]));
    let mut server = site.start().await;
    let running = server.api.submit_echo("a", json!({"delay_ms": 4000})).await;
    server.api.happened(&running, "job.started").await;
    server.signal(Signal::SIGTERM);
    eventually(LIMIT, "it stops", || async { server.log().contains("stopping: no new work").then_some(()) }).await;
    for _ in 0..2 {
        // With connections of its own each.
        let stranger = Api::new(&server.api.base);
        let refused = stranger.post("/v1/jobs", &echo_job("a", json!({}))).await.refused(503, "draining");
        assert!(!refused.header("retry-after").is_empty());
        let stranger = Api::new(&server.api.base);
        assert_eq!(stranger.job(&running).await["state"], "running");
        stranger.get("/readyz").await.refused(503, "draining");
    }
    assert!(server.ended().await.success());
    let server = site.start().await;
    server.api.succeeded(&running).await;
    let page = server.api.get("/v1/jobs").await.is(200).json();
    assert_eq!(page["data"].as_array().unwrap().len(), 1, "what was refused is not there: {page}");
}
