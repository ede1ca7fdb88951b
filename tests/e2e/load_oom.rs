//! Loads that run out of the GPU's memory: once more with less, and then the model is blocked until there is more room.

use std::path::Path;

use serde_json::{Value, json};

use crate::common::{Api, LIMIT, Site, echo, eventually, with};
use crate::parking::{is, visit};

fn on_gpu(args: &[&str]) -> Value {
    with(echo("custom", args), json!({"gpus": 1, "memory": "20GiB"}))
}

async fn starts(api: &Api) -> u64 {
    api.worker("a").await["starts"].as_u64().unwrap()
}

#[tokio::test]
async fn a_load_that_runs_out_of_memory_is_tried_once_more_with_less() {
    let site = Site::new().env("ROUNDHOUSE_FAKE_GPUS", "1x80GiB").model("a", on_gpu(&["--load-oom", "1"]));
    let server = site.start().await;
    visit(&server.api, "a").await;
    assert_eq!(starts(&server.api).await, 2);
    assert_eq!(server.api.worker("a").await["failed_loads"], 0);
    assert!(server.log().contains("told to make do with less"), "{}", server.log());
}

#[tokio::test]
async fn what_fitted_only_with_less_is_loaded_so_at_once_until_its_entry_changes() {
    let entry = on_gpu(&["--load-oom", "1"]);
    let site = Site::new().env("ROUNDHOUSE_FAKE_GPUS", "1x80GiB").model("a", entry.clone());
    let server = site.start().await;
    let api = &server.api;
    visit(api, "a").await;
    assert_eq!(starts(api).await, 2);
    for again in [3, 4] {
        api.poke("/v1/models/a/unload").await.is(200);
        is(api, "a", "absent").await;
        visit(api, "a").await;
        assert_eq!(starts(api).await, again, "it does not run out of memory first");
    }
    let site = site.model("a", with(entry, json!({"env": {"OTHER": "1"}})));
    site.write();
    is(api, "a", "absent").await;
    visit(api, "a").await;
    assert_eq!(starts(api).await, 6, "of another entry nothing is known");
}

#[tokio::test]
async fn a_model_that_does_not_fit_is_blocked_with_advice() {
    let entry = with(echo("text", &["--load-oom", "2"]), json!({"gpus": 1, "memory": "20GiB"}));
    let server = Site::new().env("ROUNDHOUSE_FAKE_GPUS", "1x80GiB").model("a", entry).start().await;
    let api = &server.api;
    let chat = json!({"model": "a", "messages": [{"role": "user", "content": "hi"}]});
    let id = api.submit(&json!({"endpoint": "/v1/chat/completions", "body": chat})).await;
    is(api, "a", "blocked").await;
    let worker = api.worker("a").await;
    let reason = worker["reason"].as_str().unwrap();
    for part in ["`a` does not fit", "CUDA out of memory", "80.0 GiB are free", "`memory: 20.0 GiB`", "models retry a"]
    {
        assert!(reason.contains(part), "{part}: {reason}");
    }
    assert_eq!((&worker["failed_loads"], &worker["retry_at"]), (&json!(1), &Value::Null));
    // Jobs wait; callers on the line are told.
    eventually(LIMIT, "its job says why it waits", || async {
        (api.job(&id).await["state_reason"] == "model_blocked").then_some(())
    })
    .await;
    let refused = api.post("/v1/chat/completions", &chat).await.refused(503, "model_load_failed");
    assert!(refused.text().contains("does not fit"), "{}", refused.text());
    assert_eq!(starts(api).await, 2, "it is not tried again and again");
    api.poke("/v1/models/a/retry").await.is(200);
    eventually(LIMIT, "it was tried again", || async { (starts(api).await == 4).then_some(()) }).await;
    is(api, "a", "blocked").await;
    api.post(&format!("/v1/jobs/{id}/cancel"), &json!({})).await.is(200);
}

/// Another program on the GPU.
fn hold(device: &Path, gib: u64) {
    std::fs::write(device.join("999999999"), (gib << 30).to_string()).unwrap();
}

#[tokio::test]
async fn a_blocked_model_is_loaded_when_somebody_leaves_the_gpu() {
    let site = Site::new();
    let device = site.device();
    let cards = json!([{"index": 0, "name": "fake", "total_bytes": 80_u64 << 30}]);
    std::fs::write(device.join("gpus.json"), cards.to_string()).unwrap();
    hold(&device, 70);
    let (folder, bytes, total) = (device.display().to_string(), (20_u64 << 30).to_string(), (80_u64 << 30).to_string());
    let args = ["--device-memory-dir", &folder, "--device-memory-bytes", &bytes, "--device-total-bytes", &total];
    let probe = format!("dir:{folder}");
    let server = site.model("a", on_gpu(&args)).env("ROUNDHOUSE_GPU_PROBE", &probe).start().await;
    let api = &server.api;
    let id = api.submit_echo("a", json!({})).await;
    is(api, "a", "blocked").await;
    let reason = api.worker("a").await["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains("10.0 GiB are free") && reason.contains("70.0 GiB are held by others"), "{reason}");
    hold(&device, 50);
    api.succeeded(&id).await;
    assert_eq!(starts(api).await, 3);
}
