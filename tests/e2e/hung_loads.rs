//! Loads that never end or end badly: what is said of them meanwhile and afterwards, and how a person ends one.

use serde_json::{Value, json};

use crate::common::{Api, LIMIT, Site, echo, eventually, with};

/// A program that is no server, and is not told where to listen.
fn no_server() -> Value {
    with(echo("custom", &[""; 0]), json!({"command": "sh -c 'sleep 1000'", "memory": "1MiB"}))
}

async fn model(api: &Api, name: &str) -> Value {
    api.get(&format!("/v1/models/{name}")).await.is(200).json()["roundhouse"].clone()
}

async fn degraded(api: &Api, name: &str) -> Option<Value> {
    let ready = api.get("/readyz").await.is(200).json();
    ready["degraded"].as_array().unwrap().iter().find(|one| one["model"] == name).cloned()
}

#[tokio::test]
async fn an_unload_by_hand_ends_a_load_that_hangs() {
    let server = Site::new().model("a", no_server()).model("b", echo("custom", &[""; 0])).start().await;
    let api = &server.api;
    let waiting = api.submit_echo("a", json!({})).await;
    let reason = eventually(LIMIT, "it says what it lacks", || async {
        let worker = api.worker("a").await;
        worker["reason"].as_str().filter(|_| worker["state"] == "loading").map(str::to_owned)
    })
    .await;
    assert!(reason.contains("nothing listens") && reason.contains("has no {port}"), "{reason}");
    api.post("/v1/queue/pause", &json!({"model": "a"})).await.is(200);
    api.poke("/v1/models/a/unload").await.is(200);
    eventually(LIMIT, "its load is broken off", || async {
        (api.worker("a").await["state"] == "absent" && server.processes().is_empty()).then_some(())
    })
    .await;
    assert_eq!(api.job(&waiting).await["state"], "queued");
    let other = api.submit_echo("b", json!({})).await;
    api.succeeded(&other).await;
}

#[tokio::test]
async fn a_failed_load_is_remembered_until_one_works() {
    let site = Site::new().server("load_limit", "2s").server("backoff_first", "1s");
    let site = site.model("a", with(no_server(), json!({"startup_time": "10ms"})));
    let server = site.start().await;
    let api = &server.api;
    let waiting = api.submit_echo("a", json!({})).await;
    let failed = |worker: &Value| worker["failed_loads"].as_u64() >= Some(1);
    eventually(LIMIT, "it has failed", || async { failed(&api.worker("a").await).then_some(()) }).await;
    api.poke(&format!("/v1/jobs/{waiting}/cancel")).await.is(200);
    let worker = eventually(LIMIT, "the back-off is over", || async {
        let worker = api.worker("a").await;
        (worker["state"] == "absent").then_some(worker)
    })
    .await;
    let reason = worker["reason"].as_str().unwrap_or_default();
    assert!(
        reason.starts_with("its last load failed: its worker was not ready within 2 s: nothing listens"),
        "{worker}"
    );
    eventually(LIMIT, "the model says the same", || async {
        (model(api, "a").await["last_failure"] == worker["reason"]).then_some(())
    })
    .await;
    assert_eq!(degraded(api, "a").await.expect("listed")["reason"], worker["reason"]);
    // It can be loaded all the same, and may be asked to. Its supervisor knows a moment before the scheduler does.
    eventually(LIMIT, "nothing keeps it from being loaded", || async {
        (model(api, "a").await["trouble"] == Value::Null).then_some(())
    })
    .await;
    api.poke("/v1/models/a/load").await.is(200);
    eventually(LIMIT, "it is tried again", || async {
        (api.worker("a").await["starts"] != worker["starts"]).then_some(())
    })
    .await;

    // Its load may take ten times as long as usual.
    site.model("a", with(echo("custom", &[""; 0]), json!({"startup_time": "60s"}))).write();
    eventually(LIMIT, "mended", || async { (model(api, "a").await["last_failure"] == Value::Null).then_some(()) })
        .await;
    let id = api.submit_echo("a", json!({})).await;
    api.succeeded(&id).await;
    assert_eq!(api.worker("a").await["reason"], Value::Null);
    assert_eq!((model(api, "a").await["last_failure"].clone(), degraded(api, "a").await), (Value::Null, None));
}
