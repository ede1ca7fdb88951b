//! A box whose GPU is not there, comes, and is slow to give its memory back. A folder plays the driver.

use std::path::Path;

use serde_json::{Value, json};

use crate::common::{LIMIT, Site, echo, echo_job, eventually, with};

fn insert_card(device: &Path) {
    let fresh = device.join("new");
    std::fs::write(&fresh, json!([{"index": 0, "name": "Fake 24G", "total_bytes": 24_u64 << 30}]).to_string()).unwrap();
    std::fs::rename(fresh, device.join("gpus.json")).unwrap();
}

fn gpu_model(site: &Site, more: &[&str]) -> Value {
    let device = site.device().display().to_string();
    let bytes = (12_u64 << 30).to_string();
    let total = (20_u64 << 30).to_string();
    let mut args =
        vec!["--device-memory-dir", &device, "--device-memory-bytes", &bytes, "--device-total-bytes", &total];
    args.extend(more);
    with(echo("custom", &args), json!({"gpus": 1}))
}

fn site_with(models: &[(&str, &[&str])]) -> Site {
    let site = Site::new();
    let probe = format!("dir:{}", site.device().display());
    models
        .iter()
        .fold(site, |site, (name, more)| {
            let entry = gpu_model(&site, more);
            site.model(name, entry)
        })
        .model("cpu", echo("custom", &[] as &[&str]))
        .env("ROUNDHOUSE_GPU_PROBE", &probe)
}

#[tokio::test]
async fn without_a_gpu_jobs_wait_and_run_after_a_restart_that_sees_one() {
    let site = site_with(&[("gpu", &[])]);
    let server = site.start().await;
    let api = &server.api;
    let waiting = api.submit_echo("gpu", json!({})).await;
    let job = eventually(LIMIT, "it says why it waits", || async {
        let job = api.job(&waiting).await;
        assert_eq!(job["state"], "queued", "{job}");
        (job["state_reason"] == "no_gpu").then_some(job)
    })
    .await;
    assert_eq!(job["attempt"], 0, "{job}");
    let ready = api.get("/readyz").await.is(200).json();
    assert!(ready["degraded"].to_string().contains("gpu"), "{ready}");
    let worker = api.worker("gpu").await;
    assert_eq!(worker["state"], "blocked", "{worker}");
    let on_cpu = api.submit_echo("cpu", json!({})).await;
    api.succeeded(&on_cpu).await;
    assert_eq!(api.job(&waiting).await["state"], "queued");
    drop(server);

    // Still none: nothing is decided for the model, and nobody knows when its job starts.
    let server = site.start().await;
    let api = &server.api;
    let on_cpu = api.submit_echo("cpu", json!({})).await;
    api.succeeded(&on_cpu).await;
    let job = api.job(&waiting).await;
    assert_eq!((&job["state"], &job["queue"]["eta_start"]), (&json!("queued"), &Value::Null), "{job}");
    assert_eq!(job["queue"]["position"], 0, "{job}");
    let history = api.queue().await["history"].clone();
    assert!(!history.to_string().contains("load gpu"), "{history}");
    assert!(history.to_string().contains("load cpu"), "{history}");
    drop(server);

    insert_card(&site.device());
    let server = site.start().await;
    let job = server.api.succeeded(&waiting).await;
    assert_eq!(job["attempt"], 1, "{job}");
    let ready = server.api.get("/readyz").await.is(200).json();
    assert!(!ready["degraded"].to_string().contains("gpu"), "{ready}");
}

#[tokio::test]
async fn jobs_resume_by_themselves_when_a_gpu_appears() {
    let site = site_with(&[("gpu", &[])]);
    let server = site.start().await;
    let api = &server.api;
    let waiting = api.submit_echo("gpu", json!({})).await;
    eventually(LIMIT, "it says why it waits", || async {
        (api.job(&waiting).await["state_reason"] == "no_gpu").then_some(())
    })
    .await;
    insert_card(&site.device());
    let job = api.succeeded(&waiting).await;
    assert_eq!(job["failures"], 0, "{job}");
}

#[tokio::test]
async fn the_next_model_loads_only_when_the_driver_says_the_memory_is_free() {
    // The memory stays taken for a second after the process has gone; two do not fit.
    let late: &[&str] = &["--release-delay-s", "1"];
    let site = site_with(&[("one", late), ("two", late)]);
    insert_card(&site.device());
    let server = site.start().await;
    let api = &server.api;
    for model in ["one", "two", "one"] {
        let id = api.submit_echo(model, json!({})).await;
        api.succeeded(&id).await;
    }
    for model in ["one", "two"] {
        assert_eq!(api.worker(model).await["failed_loads"], 0);
        assert!(!server.worker_log(model).contains("out of memory"), "{model}");
    }
    assert_eq!(api.queue().await["swaps"], 2);

    // After a crash, too.
    let id = api.submit_echo("one", json!({"delay_ms": 2000})).await;
    api.happened(&id, "job.progress").await;
    server.worker("one").await.signal(nix::sys::signal::Signal::SIGKILL);
    api.succeeded(&id).await;
    assert!(!server.worker_log("one").contains("out of memory"));
}

#[tokio::test]
async fn jobs_of_a_model_that_no_gpu_here_could_hold_are_refused_with_what_is_missing() {
    let site = Site::new();
    let probe = format!("dir:{}", site.device().display());
    let large = with(echo("custom", &[] as &[&str]), json!({"gpus": 1, "memory": "100GiB"}));
    let small = with(echo("custom", &[] as &[&str]), json!({"gpus": 1, "memory": "20GiB"}));
    let site = site.model("large", large).model("small", small).env("ROUNDHOUSE_GPU_PROBE", &probe);
    // A box that sees no GPU may see one later: its jobs wait.
    let server = site.start().await;
    let waiting = server.api.submit_echo("large", json!({})).await;
    assert_eq!(server.api.job(&waiting).await["state"], "queued");
    drop(server);

    insert_card(&site.device());
    let server = site.start().await;
    let api = &server.api;
    let text = "large can never be loaded: it needs a GPU with 100 GiB, and this box has 1 GPU of at most 24 GiB; use a larger \
                box, or lower `gpus` or `memory` of the model in models.yaml";
    let job = echo_job("large", json!({}));
    let both = json!({"requests": [echo_job("small", json!({})), job.clone()]});
    for (path, body) in [("/v1/jobs", &job), ("/v1/jobs/bulk", &both)] {
        let refused = api.post(path, body).await.is(503);
        assert_eq!(refused.header("x-should-retry"), "false");
        assert!(refused.text().contains(text), "{}", refused.text());
        refused.refused(503, "no_worker_for_model");
    }
    // What was accepted before waits, and says the same.
    let job = api.job(&waiting).await;
    assert_eq!((&job["state"], &job["state_reason"]), (&json!("queued"), &json!("model_blocked")), "{job}");
    let fits = api.submit_echo("small", json!({})).await;
    api.succeeded(&fits).await;
}
