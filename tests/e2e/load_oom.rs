//! Loads that run out of the GPU's memory: once more with less, then without neighbours, and then the model is blocked until
//! there is more room.

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
    assert_eq!((&worker["failed_loads"], &worker["retry_at"]), (&json!(0), &Value::Null));
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

/// A GPU of 80 GiB, as the driver shows it.
fn install(device: &Path) {
    let cards = json!([{"index": 0, "name": "fake", "total_bytes": 80_u64 << 30}]);
    std::fs::write(device.join("gpus.json"), cards.to_string()).unwrap();
}

/// Another program on the GPU.
fn hold(device: &Path, gib: u64) {
    std::fs::write(device.join("999999999"), (gib << 30).to_string()).unwrap();
}

#[tokio::test]
async fn a_blocked_model_is_loaded_when_somebody_leaves_the_gpu() {
    let site = Site::new();
    let device = site.device();
    install(&device);
    hold(&device, 70);
    let probe = format!("dir:{}", device.display());
    let entry = with(echo("custom", &taking(&device, 20 << 10)), json!({"gpus": 1, "memory": "20GiB"}));
    let server = site.model("a", entry).env("ROUNDHOUSE_GPU_PROBE", &probe).start().await;
    let api = &server.api;
    let id = api.submit_echo("a", json!({})).await;
    is(api, "a", "blocked").await;
    let reason = api.worker("a").await["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains("10.0 GiB are free") && reason.contains("70.0 GiB are held by others"), "{reason}");
    hold(&device, 50);
    api.succeeded(&id).await;
    assert_eq!(starts(api).await, 3);
}

/// Flags of a worker that takes so much of the GPU.
fn taking(device: &Path, mib: u64) -> Vec<String> {
    let (folder, bytes, total) = (device.display().to_string(), (mib << 20).to_string(), (80_u64 << 30).to_string());
    let args = ["--device-memory-dir", &folder, "--device-memory-bytes", &bytes, "--device-total-bytes", &total];
    args.map(str::to_owned).to_vec()
}

#[tokio::test]
async fn a_load_is_tried_again_if_somebody_has_left_the_gpu_meanwhile() {
    let site = Site::new();
    let device = site.device();
    install(&device);
    hold(&device, 70);
    let probe = format!("dir:{}", device.display());
    let entry = on_gpu(&["--load-oom", "2", "--load-s", "1.5"]);
    let server = site.model("a", entry).env("ROUNDHOUSE_GPU_PROBE", &probe).start().await;
    let api = &server.api;
    let id = api.submit_echo("a", json!({})).await;
    eventually(LIMIT, "its second try", || async { (starts(api).await == 2).then_some(()) }).await;
    std::fs::remove_file(device.join("999999999")).unwrap();
    // With all of it, and once more with less: it says that there is too little whatever there is.
    eventually(LIMIT, "two more tries", || async { (starts(api).await == 4).then_some(()) }).await;
    assert!(server.log().contains("tried once more since more is free now"), "{}", server.log());
    is(api, "a", "blocked").await;
    api.post(&format!("/v1/jobs/{id}/cancel"), &json!({})).await.is(200);
}

#[tokio::test]
async fn an_idle_neighbour_that_takes_more_than_declared_leaves() {
    let site = Site::new();
    let device = site.device();
    install(&device);
    let entry = |gib: u64, declared: &str| {
        with(echo("custom", &taking(&device, gib << 10)), json!({"gpus": 1, "memory": declared}))
    };
    let site = site.model("b", entry(60, "40GiB")).model("a", entry(30, "30GiB"));
    let server = site.env("ROUNDHOUSE_GPU_PROBE", &format!("dir:{}", device.display())).start().await;
    let api = &server.api;
    visit(api, "b").await;
    visit(api, "a").await;
    is(api, "b", "absent").await;
    assert_eq!(starts(api).await, 3, "with all, with less, and without the other one");
    assert!(server.log().contains("a ran out of memory on gpu0 beside b"), "{}", server.log());
    visit(api, "b").await;
}

#[tokio::test]
async fn a_parked_process_ends_for_a_model_that_does_not_fit_beside_it() {
    let site = Site::new();
    let device = site.device();
    install(&device);
    let parks = [taking(&device, 60 << 10), ["--device-parked-bytes".to_owned(), (700_u64 << 20).to_string()].to_vec()]
        .concat();
    let parks = with(echo("custom", &parks), json!({"gpus": 1, "memory": "60GiB", "park": "ram"}));
    let site = site
        .model("b", parks)
        .model("a", with(echo("custom", &taking(&device, (80 << 10) - 500)), json!({"gpus": 1, "memory": "30GiB"})));
    let site = site.scheduler("park_ram", "200GiB");
    let server = site.env("ROUNDHOUSE_GPU_PROBE", &format!("dir:{}", device.display())).start().await;
    let api = &server.api;
    visit(api, "b").await;
    let id = api.submit_echo("a", json!({})).await;
    is(api, "b", "parked").await;
    api.succeeded(&id).await;
    is(api, "b", "absent").await;
    assert_eq!(starts(api).await, 3);
}
