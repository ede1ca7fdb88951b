//! Passes of several jobs: their size is learned, too large ones run out of memory, and a job of one can be cancelled.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::common::{Server, Site, check_history, echo, echo_job, eventually, free_port, python, with};

/// A model of several jobs a pass that come while it loads.
fn batching(max_batch: u32, args: &[&str]) -> Site {
    let mut all = vec!["--load-s", "1", "--batch-wait-ms", "10000"];
    all.extend(args);
    Site::new().model("a", with(echo("custom", &all), json!({"max_batch": max_batch, "limit": max_batch})))
}

/// What is known about the only shape of the model.
async fn shape(server: &Server) -> Value {
    let model = server.api.get("/v1/models/a").await.is(200).json();
    let shapes = model["roundhouse"]["batching"].as_array().unwrap().clone();
    assert_eq!(shapes.len(), 1, "{model}");
    shapes[0].clone()
}

#[tokio::test]
async fn passes_grow_where_more_at_once_pay() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let args = ["--load-s", "1", "--batch-wait-ms", "10000", "--batch-cost", "500+1"];
    let entry = json!({"type": "image", "service_script": root.join("models/echo/server.py"), "python": python(root),
                       "args": args, "gpus": 0, "startup_time": 1, "port": free_port()});
    let site = Site::new().model("a", entry);
    let mut server = site.start().await;
    let api = &server.api;
    let image = |n: usize| {
        json!({"endpoint": "/v1/images/generations",
                                  "body": {"model": "a", "prompt": format!("secret {n}"), "size": "16x16"}})
    };
    let ids = api.submit_together((0..64).map(image).collect()).await;
    for id in &ids {
        let job = api.succeeded(id).await;
        assert_eq!(job["attempt"], 1, "{job}");
    }
    let learned = shape(&server).await;
    assert_eq!((&learned["batch_size"], &learned["max_batch"]), (&json!(8), &json!(8)), "{learned}");
    assert_eq!(learned["shape"], "size 16x16", "and no prompt");
    let measured: Vec<_> = learned["measured"].as_array().unwrap().iter().map(|m| m["jobs"].clone()).collect();
    assert_eq!(measured, [1, 2, 4, 8], "{learned}");

    let metrics = api.get("/metrics").await.is(200).text();
    let key = learned["key"].as_str().unwrap();
    let line = format!("roundhouse_batch_size{{model=\"a\",shape=\"size 16x16\",key=\"{key}\"}} 8");
    assert!(metrics.contains(&line), "{line}\n{metrics}");
    let decisions = api.get("/v1/queue/decisions?model=a").await.is(200).json();
    let told: Vec<&Value> =
        decisions["data"].as_array().unwrap().iter().filter(|decision| decision["action"] == "batch").collect();
    let reason = told[0]["reason"].as_str().unwrap();
    assert!(reason.starts_with("a (size 16x16): 8 jobs a pass from now on, "), "{reason}");
    assert!(server.log().contains(reason), "the log has it too");

    // It is known after a crash, before anything is loaded.
    server.kill();
    let server = site.start().await;
    let again = shape(&server).await;
    assert_eq!((&again["batch_size"], &again["shape"], &again["key"]), (&json!(8), &json!("size 16x16"), &json!(key)));
}

#[tokio::test]
async fn out_of_memory_halves_the_passes_until_they_fit() {
    let server = batching(8, &["--oom-above", "2"]).start().await;
    let api = &server.api;
    let ids = api.submit_together(vec![echo_job("a", json!({})); 8]).await;
    for id in &ids {
        let job = api.succeeded(id).await;
        assert_eq!((&job["failures"], &job["crashes"]), (&json!(0), &json!(0)), "charged to nobody: {job}");
        // Four of them had to go twice; of the others, those that came with them.
        assert!((2..=3).contains(&job["attempt"].as_i64().unwrap()), "{job}");
        let answer = api.get(&format!("/v1/jobs/{id}/response")).await.is(200).json();
        assert_eq!(answer["pass_size"], 2, "{answer}");
        check_history(&api.events(id).await);
    }
    assert_eq!(shape(&server).await["max_batch"], 2);
    assert_eq!(api.worker("a").await["starts"], 1, "none of it restarted the worker");
    let more = api.submit_together(vec![echo_job("a", json!({})); 8]).await;
    for id in &more {
        assert_eq!(api.succeeded(id).await["attempt"], 1, "it is remembered");
    }
}

#[tokio::test]
async fn a_job_that_never_fits_fails_with_advice_and_takes_nobody_along() {
    let server = batching(4, &[]).start().await;
    let api = &server.api;
    let mut requests = vec![echo_job("a", json!({})); 4];
    requests[1] = echo_job("a", json!({"oom": true}));
    let mut others = api.submit_together(requests).await;
    let hungry = others.remove(1);
    let job = api.finished(&hungry).await;
    assert_eq!((&job["state"], &job["error"]["code"]), (&json!("failed"), &json!("worker_oom")), "{job}");
    let message = job["error"]["message"].as_str().unwrap();
    assert!(message.contains("smaller size") && message.contains("`memory`"), "{message}");
    assert_eq!(job["attempt"], 4, "among four, two, alone, and with nothing beside it: {job}");
    assert_eq!(check_history(&api.events(&hungry).await), "job.failed");
    let metrics = api.get("/metrics").await.is(200).body;
    let metrics = String::from_utf8_lossy(&metrics);
    assert!(metrics.contains("\nroundhouse_store_rescues_total 0\n"), "no worker has died: {metrics}");
    for id in &others {
        let job = api.succeeded(id).await;
        assert_eq!(job["failures"], 0, "{job}");
        assert!(job["attempt"].as_i64().unwrap() <= 3, "{job}");
    }
    assert_eq!(api.worker("a").await["starts"], 1);
}

#[tokio::test]
async fn what_runs_out_of_memory_once_is_tried_alone_though_it_has_one_attempt() {
    let site = Site::new().model("a", with(echo("custom", &["--oom-item", "1"]), json!({"max_attempts": 1})));
    let server = site.start().await;
    let api = &server.api;
    let id = api.submit_echo("a", json!({})).await;
    let job = api.succeeded(&id).await;
    assert_eq!((&job["attempt"], &job["failures"]), (&json!(2), &json!(0)), "{job}");
    check_history(&api.events(&id).await);
}

#[tokio::test]
async fn a_job_of_a_pass_is_cancelled_and_the_others_are_answered() {
    let server = batching(4, &["--delay-ms", "4000", "--steps", "40"]).start().await;
    let api = &server.api;
    let mut ids = api.submit_together(vec![echo_job("a", json!({})); 4]).await;
    for id in &ids {
        api.happened(id, "job.progress").await;
    }
    let unwanted = ids.remove(2);
    api.poke(&format!("/v1/jobs/{unwanted}/cancel")).await.is(200);
    let job = api.finished(&unwanted).await;
    assert_eq!((&job["state"], &job["error"]["code"]), (&json!("cancelled"), &json!("cancelled_by_user")), "{job}");
    assert_eq!(check_history(&api.events(&unwanted).await), "job.cancelled");
    let run = started_in(&api.events(&unwanted).await);
    for id in &ids {
        let before = api.job(id).await;
        assert_eq!(before["state"], "running", "the pass goes on: {before}");
    }
    for id in &ids {
        let job = api.succeeded(id).await;
        assert_eq!((&job["attempt"], &job["failures"]), (&json!(1), &json!(0)), "{job}");
        let events = api.events(id).await;
        assert_eq!((check_history(&events), started_in(&events)), ("job.succeeded".to_owned(), run.clone()));
        let answer = api.get(&format!("/v1/jobs/{id}/response")).await.is(200).json();
        assert_eq!(answer["pass_size"], 4, "{answer}");
    }
    assert_eq!(api.worker("a").await["starts"], 1);
    let quiet = eventually(Duration::from_secs(10), "nothing runs", || async {
        let queue = api.queue().await;
        (queue["running"] == 0).then_some(queue)
    });
    quiet.await;
    let next = api.submit_echo("a", json!({"delay_ms": 10})).await;
    api.succeeded(&next).await;
}

/// The run of a job's first attempt.
fn started_in(events: &[Value]) -> Value {
    events.iter().find(|event| event["type"] == "job.started").unwrap()["run"].clone()
}
