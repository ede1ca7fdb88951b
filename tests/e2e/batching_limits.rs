//! What sets the size of passes, from what really happens on workers: one job that never fits, and passes that gain nothing.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

use crate::common::{Api, Site, echo, echo_job, free_port, python, with};

/// What is known about the only shape of the model, which both views tell.
async fn shape(api: &Api) -> Value {
    let model = api.get("/v1/models/a").await.is(200).json();
    let queue = api.queue().await;
    let shapes = &queue["models"][0]["batching"];
    assert_eq!(shapes, &model["roundhouse"]["batching"], "{queue}");
    assert_eq!(shapes.as_array().map(Vec::len), Some(1), "{queue}");
    shapes[0].clone()
}

#[tokio::test]
async fn a_job_that_never_fits_leaves_the_passes_of_its_shape_as_they_were() {
    let args = ["--load-s", "1", "--batch-wait-ms", "10000", "--batch-cost", "300+1"];
    let site = Site::new().model("a", with(echo("custom", &args), json!({"max_batch": 8, "limit": 8})));
    let mut server = site.start().await;
    let api = &server.api;
    for id in api.submit_together(vec![echo_job("a", json!({})); 16]).await {
        assert_eq!(api.succeeded(&id).await["attempt"], 1);
    }
    assert_eq!(shape(api).await["max_batch"], 8);

    let mut requests = vec![echo_job("a", json!({})); 16];
    requests[0] = echo_job("a", json!({"oom": true}));
    let mut others = api.submit_together(requests).await;
    let job = api.finished(&others.remove(0)).await;
    assert_eq!((&job["state"], &job["error"]["code"]), (&json!("failed"), &json!("worker_oom")), "{job}");
    assert_eq!(job["attempt"], 5, "among eight, four, two, alone, and with nothing beside it: {job}");
    for id in &others {
        let job = api.succeeded(id).await;
        assert_eq!(job["failures"], 0, "{job}");
        assert!(job["attempt"].as_i64().unwrap() <= 4, "each time with that one, and then without: {job}");
    }
    let learned = shape(api).await;
    assert_eq!((&learned["batch_size"], &learned["max_batch"]), (&json!(8), &json!(8)), "{learned}");
    for id in api.submit_together(vec![echo_job("a", json!({})); 8]).await {
        assert_eq!(api.succeeded(&id).await["attempt"], 1);
        let answer = api.get(&format!("/v1/jobs/{id}/response")).await.is(200).json();
        assert_eq!(answer["pass_size"], 8, "{answer}");
    }
    assert_eq!(api.worker("a").await["starts"], 1);

    // Nor is it a limit after a crash.
    server.kill();
    let server = site.start().await;
    let learned = shape(&server.api).await;
    assert_eq!((&learned["batch_size"], &learned["max_batch"]), (&json!(8), &json!(8)), "{learned}");
}

/// Makes so many images of one size, and returns how many jobs each of their runs had.
async fn runs(api: &Api, count: usize) -> Vec<usize> {
    let image = json!({"endpoint": "/v1/images/generations",
                       "body": {"model": "a", "prompt": "a cat", "size": "16x16"}});
    let mut runs: BTreeMap<String, usize> = BTreeMap::new();
    for id in api.submit_together(vec![image; count]).await {
        api.succeeded(&id).await;
        let events = api.events(&id).await;
        let started = events.iter().find(|event| event["type"] == "job.started").unwrap();
        *runs.entry(started["run"].as_str().unwrap_or(&id).to_owned()).or_default() += 1;
    }
    runs.into_values().collect()
}

/// As Flux at 1024x1024: a pass of two takes twice as long as one of one job.
#[tokio::test]
async fn where_more_at_once_gain_nothing_passes_come_back_to_one() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let args = ["--load-s", "1", "--batch-wait-ms", "10000", "--batch-cost", "0+800"];
    let entry = json!({"type": "image", "service_script": root.join("models/echo/server.py"), "python": python(root),
                       "args": args, "gpus": 0, "startup_time": 1, "port": free_port(), "max_batch": 2});
    let server = Site::new().model("a", entry).start().await;
    let api = &server.api;
    // The first pass after a load counts for nothing, three of a size for something.
    for _ in 0..4 {
        assert_eq!(runs(api, 1).await, [1]);
    }
    let learned = shape(api).await;
    assert_eq!(learned["batch_size"], 2, "as models.yaml says, as long as nobody knows: {learned}");
    assert_eq!(runs(api, 6).await, [2; 3], "they are measured");
    // What goes on beside this test may cost a short pass more than a long one: then it takes a few more to see.
    let mut seen = Vec::new();
    for _ in 0..20 {
        let sizes = runs(api, 4).await;
        let learned = shape(api).await;
        if sizes == [1; 4] && learned["batch_size"] == 1 {
            let measured: Vec<_> = learned["measured"].as_array().unwrap().iter().map(|m| m["jobs"].clone()).collect();
            assert_eq!((&learned["max_batch"], measured), (&json!(2), vec![json!(1), json!(2)]), "{learned}");
            return;
        }
        seen.push((sizes, learned));
    }
    panic!("passes stay larger than one: {seen:?}");
}
