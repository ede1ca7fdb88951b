//! Workers that die, hang, run out of memory or fail on single jobs.

use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::common::{Api, LIMIT, Site, check_history, echo, eventually, with};

fn kinds(events: &[Value]) -> Vec<&str> {
    events.iter().map(|event| event["type"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn jobs_of_a_killed_worker_run_again_uncharged() {
    let site = Site::new();
    let mut args = site.whole_device();
    args.extend(["--delay-ms", "1500"].map(str::to_owned));
    let site = site.model("a", echo("text", &args));
    let server = site.start().await;
    let api = &server.api;
    let chat = json!({"endpoint": "/v1/chat/completions",
                      "body": {"model": "a", "messages": [{"role": "user", "content": "hi"}]}});
    let mut ids = Vec::new();
    for _ in 0..4 {
        ids.push(api.submit(&chat).await);
    }
    for id in &ids {
        api.happened(id, "job.progress").await;
    }
    let worker = server.worker("a").await;
    worker.signal(Signal::SIGKILL);
    for id in &ids {
        let job = api.succeeded(id).await;
        let events = api.events(id).await;
        check_history(&events);
        assert_eq!(job["attempt"], 2, "{job}");
        assert!(kinds(&events).contains(&"job.retrying"), "{events:?}");
        assert_eq!((&job["failures"], &job["crashes"]), (&json!(0), &json!(1)), "a crash isolates and charges nothing");
    }
    assert!(!server.worker_log("a").contains("out of memory"), "the dead one's memory was free");
}

#[tokio::test]
async fn the_killer_of_a_run_fails_and_its_companions_do_not() {
    let args = ["--load-s", "1", "--delay-ms", "50"];
    let site = Site::new()
        .model("a", with(echo("image", &args), json!({"max_batch": 8, "limit": 8})))
        .model("b", echo("custom", &[] as &[&str]));
    let server = site.start().await;
    let api = &server.api;
    let image = |wishes: Value| json!({"endpoint": "/v1/images/generations", "body": {"model": "a", "prompt": "x", "echo": wishes}});
    let mut requests = vec![image(json!({})); 8];
    requests[4] = image(json!({"crash": true}));
    let mut innocents = api.submit_together(requests).await;
    let killer = innocents.remove(4);

    let job = api.finished(&killer).await;
    assert_eq!((&job["state"], &job["error"]["code"]), (&json!("failed"), &json!("worker_lost")), "{job}");
    assert_eq!(job["attempt"], 3, "among eight, then (the first four are innocent) with one other, then alone: {job}");
    assert_eq!(check_history(&api.events(&killer).await), "job.failed");
    for id in &innocents {
        let job = api.succeeded(id).await;
        check_history(&api.events(id).await);
        assert_eq!(job["failures"], 0, "{job}");
        assert!(job["crashes"].as_i64().unwrap() <= 2, "the search halves: {job}");
    }
    // The run of eight: all of it was there when the worker died.
    let started = api.events(&killer).await.into_iter().find(|event| event["type"] == "job.started").unwrap();
    let together = innocents.len();
    let mut beside_the_killer = 0;
    for id in &innocents {
        let events = api.events(id).await;
        beside_the_killer +=
            usize::from(events.iter().any(|e| e["type"] == "job.started" && e["run"] == started["run"]));
    }
    assert_eq!(beside_the_killer, together, "one run had all eight: {started}");
    let other = api.submit_echo("b", json!({})).await;
    api.succeeded(&other).await;
}

#[tokio::test]
async fn a_poisonous_job_among_32_is_alone_after_five_more_runs_and_the_others_succeed() {
    // While it loads, all of them come to wait for it. The first place is the worst: each half with it dies.
    let args = ["--load-s", "1", "--delay-ms", "20"];
    let site = Site::new().model("a", with(echo("image", &args), json!({"max_batch": 32, "limit": 32})));
    let server = site.start().await;
    let api = &server.api;
    let image = |wishes: Value| json!({"endpoint": "/v1/images/generations", "body": {"model": "a", "prompt": "x", "echo": wishes}});
    let mut requests = vec![image(json!({})); 32];
    requests[0] = image(json!({"crash": true}));
    let mut innocents = api.submit_together(requests).await;
    let killer = innocents.remove(0);

    let job = api.finished(&killer).await;
    assert_eq!((&job["state"], &job["error"]["code"]), (&json!("failed"), &json!("worker_lost")), "{job}");
    assert_eq!((&job["attempt"], &job["crashes"]), (&json!(6), &json!(5)), "among 32, 16, 8, 4, 2, and alone: {job}");
    assert_eq!(check_history(&api.events(&killer).await), "job.failed");
    for id in &innocents {
        let job = api.succeeded(id).await;
        assert_eq!(check_history(&api.events(id).await), "job.succeeded");
        assert_eq!(job["failures"], 0, "{job}");
        assert!(job["crashes"].as_i64().unwrap() <= 5, "{job}");
    }
    assert_eq!(api.worker("a").await["starts"], 7, "one for each death and one for the innocent");
}

#[tokio::test]
async fn a_killed_guard_takes_its_worker_along() {
    let site = Site::new();
    let mut args = site.whole_device();
    args.extend(["--delay-ms", "1000"].map(str::to_owned));
    let site = site.model("a", echo("custom", &args));
    let server = site.start().await;
    let api = &server.api;
    let id = api.submit_echo("a", json!({})).await;
    api.happened(&id, "job.progress").await;
    let worker = server.worker("a").await;
    let guard = server.processes().into_iter().find(|found| !found.is_worker());
    guard.expect("a guard").signal(Signal::SIGKILL);
    eventually(Duration::from_secs(15), "the worker is gone", || async { (!worker.is_alive()).then_some(()) }).await;
    api.succeeded(&id).await;
    assert!(!server.worker_log("a").contains("out of memory"), "no second worker beside the first");
}

#[tokio::test]
async fn a_worker_whose_health_hangs_is_replaced() {
    // Misses are counted every 2 s with 5 s of patience each, so this takes a while.
    let site = Site::new().model("a", echo("custom", &["--hang-health", "--delay-ms", "10"]));
    let server = site.start().await;
    let api = &server.api;
    let first = api.submit_echo("a", json!({})).await;
    api.succeeded(&first).await;
    let worker = server.worker("a").await;
    eventually(Duration::from_secs(60), "the worker is gone", || async { (!worker.is_alive()).then_some(()) }).await;
    let second = api.submit_echo("a", json!({})).await;
    api.succeeded(&second).await;
}

#[tokio::test]
async fn a_worker_that_hangs_on_a_job_is_replaced() {
    let site =
        Site::new().model("a", with(echo("custom", &[] as &[&str]), json!({"timeout": "1s", "max_attempts": 1})));
    let server = site.start().await;
    let api = &server.api;
    let hanging = api.submit_echo("a", json!({"hang": true})).await;
    let next = api.submit_echo("a", json!({})).await;
    let job = api.finished(&hanging).await;
    assert_eq!((&job["state"], &job["error"]["code"]), (&json!("failed"), &json!("execution_timeout")), "{job}");
    let job = api.succeeded(&next).await;
    assert_eq!(job["attempt"], 1, "it was not sent to the hanging worker: {job}");
    assert_eq!(api.worker("a").await["starts"], 2);
}

#[tokio::test]
async fn who_shares_a_pass_with_a_job_that_hangs_is_charged_nothing() {
    let entry = json!({"timeout": "2s", "max_batch": 4, "max_attempts": 1});
    let site = Site::new().model("a", with(echo("custom", &[] as &[&str]), entry));
    let server = site.start().await;
    let api = &server.api;
    api.poke("/v1/queue/pause").await.is(200);
    let mut others = vec![api.submit_echo("a", json!({})).await];
    let hanging = api.submit_echo("a", json!({"hang": true})).await;
    for _ in 0..2 {
        others.push(api.submit_echo("a", json!({})).await);
    }
    api.poke("/v1/queue/resume").await.is(200);
    let job = api.finished(&hanging).await;
    assert_eq!((&job["state"], &job["error"]["code"]), (&json!("failed"), &json!("execution_timeout")), "{job}");
    for id in &others {
        let job = api.succeeded(id).await;
        assert_eq!((&job["failures"], &job["crashes"]), (&json!(0), &json!(0)), "{job}");
    }
    assert!(server.log().contains("its worker hangs, and is ended"), "{}", server.log());
}

#[tokio::test]
async fn who_runs_behind_a_cancelled_job_that_hangs_is_charged_nothing() {
    let entry = json!({"timeout": "2s", "max_attempts": 1});
    let server = Site::new().model("a", with(echo("custom", &[] as &[&str]), entry)).start().await;
    let api = &server.api;
    // Before its first sign.
    let hanging = api.submit_echo("a", json!({"hang": true, "steps": 1})).await;
    api.happened(&hanging, "job.started").await;
    let metrics = format!("http://127.0.0.1:{}/metrics", api.worker("a").await["port"]);
    eventually(LIMIT, "it is on the worker", || async {
        let text = reqwest::get(&metrics).await.ok()?.text().await.ok()?;
        text.contains("roundhouse_worker_in_flight 1\n").then_some(())
    })
    .await;
    api.poke(&format!("/v1/jobs/{hanging}/cancel")).await.is(200);
    let behind = api.submit_echo("a", json!({})).await;
    let job = api.succeeded(&behind).await;
    assert_eq!((&job["failures"], &job["crashes"]), (&json!(0), &json!(0)), "{job}");
    assert_eq!(api.finished(&hanging).await["state"], "cancelled");
    assert_eq!(api.worker("a").await["starts"], 2);
}

#[tokio::test]
async fn a_worker_that_does_not_let_go_of_a_cancelled_job_is_ended_long_before_the_limit() {
    // Nothing is behind the first, one job behind the second: it goes back.
    let entry = json!({"timeout": "10min", "max_attempts": 1});
    let server = Site::new().model("a", with(echo("custom", &[] as &[&str]), entry)).start().await;
    let api = &server.api;
    let cancelled = async || {
        let hanging = api.submit_echo("a", json!({"hang": true})).await;
        api.happened(&hanging, "job.started").await;
        // It is not only on its way to the worker.
        api.happened(&hanging, "job.progress").await;
        api.poke(&format!("/v1/jobs/{hanging}/cancel")).await.is(200);
        assert_eq!(api.finished(&hanging).await["state"], "cancelled");
    };
    cancelled().await;
    worker_is(api, "absent").await;
    cancelled().await;
    let behind = api.submit_echo("a", json!({})).await;
    let job = api.succeeded(&behind).await;
    let charged = (&job["attempt"], &job["failures"], &job["crashes"]);
    assert_eq!(charged, (&json!(2), &json!(0), &json!(0)), "{job}");
    let worker = api.worker("a").await;
    assert_eq!((&worker["starts"], &worker["failed_loads"]), (&json!(3), &json!(0)), "{worker}");
}

#[tokio::test]
async fn callers_who_leave_before_the_limit_do_not_keep_a_hung_worker() {
    let site = Site::new().model("a", with(echo("custom", &[] as &[&str]), json!({"timeout": "3s"})));
    let server = site.start().await;
    let api = &server.api;
    let short = |wishes: Value| json!({"endpoint": "/echo", "body": {"model": "a", "echo": wishes}, "timeout_s": 1, "max_attempts": 1});
    api.submit(&short(json!({"hang": true}))).await;
    eventually(LIMIT, "the worker is replaced", || async {
        let next = api.submit(&short(json!({}))).await;
        api.finished(&next).await;
        (api.worker("a").await["starts"] == 2).then_some(())
    })
    .await;
    api.succeeded(&api.submit_echo("a", json!({})).await).await;
}

#[tokio::test]
async fn deaths_soon_after_readiness_are_counted_as_deaths_and_not_as_failed_loads() {
    let site = Site::new().server("backoff_first", "10min").server("backoff_max", "10min");
    let server = site.model("a", echo::<&str>("custom", &[])).start().await;
    let api = &server.api;
    for state in ["absent", "absent", "backoff"] {
        api.poke("/v1/models/a/load").await.is(200);
        worker_is(api, "resident").await;
        server.worker("a").await.signal(Signal::SIGKILL);
        worker_is(api, state).await;
    }
    let deaths = "roundhouse_worker_deaths_total{model=\"a\"} 3\n";
    let metrics = eventually(LIMIT, "they are counted", || async {
        let metrics = api.get("/metrics").await.is(200).text();
        metrics.contains(deaths).then_some(metrics)
    })
    .await;
    assert!(!metrics.contains("roundhouse_failed_loads_total{"), "{metrics}");
    assert_eq!(api.worker("a").await["failed_loads"], 0);
}

async fn worker_is(api: &Api, state: &str) {
    eventually(LIMIT, state, || async { (api.worker("a").await["state"] == state).then_some(()) }).await;
}

#[tokio::test]
async fn failures_of_single_jobs_are_results_and_leave_the_worker_alone() {
    let site = Site::new()
        .model("a", with(echo("image", &["--load-s", "1"]), json!({"max_batch": 4, "limit": 4, "max_attempts": 2})))
        .model("t", with(echo("text", &[] as &[&str]), json!({"max_attempts": 1})));
    let server = site.start().await;
    let api = &server.api;
    let image = |wishes: Value| json!({"endpoint": "/v1/images/generations", "body": {"model": "a", "prompt": "x", "echo": wishes}});
    let good = api.submit(&image(json!({}))).await;
    let failing = api.submit(&image(json!({"fail": "no such colour"}))).await;
    let refused = api.submit(&image(json!({"status": 422}))).await;
    let job = api.finished(&failing).await;
    assert_eq!((&job["state"], &job["error"]["code"]), (&json!("failed"), &json!("worker_error")), "{job}");
    assert!(job["error"]["message"].as_str().unwrap().contains("no such colour"), "{job}");
    assert_eq!((&job["failures"], &job["attempt"]), (&json!(1), &json!(2)), "{job}");
    let job = api.finished(&refused).await;
    assert_eq!((&job["state"], &job["error"]["code"]), (&json!("failed"), &json!("upstream_rejected")), "{job}");
    assert_eq!(job["attempt"], 1, "what the engine refuses is not tried again: {job}");
    assert_eq!(api.get(&format!("/v1/jobs/{refused}/response")).await.status, 422, "its own status");
    api.succeeded(&good).await;

    let oom = api.submit(&image(json!({"oom": true}))).await;
    let job = api.finished(&oom).await;
    assert_eq!((&job["state"], &job["error"]["code"]), (&json!("failed"), &json!("worker_oom")), "{job}");
    assert_eq!(api.worker("a").await["starts"], 1, "none of it restarted the worker");

    // A success without an end is none.
    let endless = api
        .submit(&json!({"endpoint": "/v1/chat/completions", "body": {"model": "t", "echo": {"no_finish": true},
                        "messages": [{"role": "user", "content": "hi"}]}}))
        .await;
    let job = api.finished(&endless).await;
    assert_eq!((&job["state"], &job["error"]["code"]), (&json!("failed"), &json!("worker_error")), "{job}");
}
