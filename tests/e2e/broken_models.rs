//! Models that do not load.

use std::time::Duration;

use serde_json::{Value, json};

use crate::common::{LIMIT, Site, echo, eventually};

fn chat(model: &str) -> Value {
    json!({"model": model, "messages": [{"role": "user", "content": "hi"}]})
}

/// An echo worker that fails to load until the file `mended` is there.
fn broken_until(mended: &std::path::Path) -> Value {
    let mut entry = echo("text", &[] as &[&str]);
    let words: Vec<String> =
        entry["command"].as_array().unwrap().iter().map(|word| word.as_str().unwrap().to_owned()).collect();
    let script = format!(
        r#"if [ -e '{}' ]; then exec "$@"; else exec "$@" --load-fail 'no weights in sight'; fi"#,
        mended.display()
    );
    let mut command = vec!["sh".to_owned(), "-c".to_owned(), script, "sh".to_owned()];
    command.extend(words);
    entry["command"] = json!(command);
    entry
}

#[tokio::test]
async fn a_broken_model_blocks_its_own_jobs_only_and_comes_back() {
    let site = Site::new();
    let mended = site.path().join("mended");
    let site = site.model("broken", broken_until(&mended)).model("well", echo("custom", &[] as &[&str]));
    let server = site.start().await;
    let api = &server.api;

    // A caller on the line is told as soon as the load has failed, and the next one at once.
    let reply = api.post("/v1/chat/completions", &chat("broken")).await.refused(503, "model_load_failed");
    assert!(reply.json()["error"]["message"].as_str().unwrap().contains("no weights in sight"), "{}", reply.text());
    let waiting = api.submit(&json!({"endpoint": "/v1/chat/completions", "body": chat("broken")})).await;
    api.post("/v1/chat/completions", &chat("broken")).await.refused(503, "model_load_failed");
    let job = eventually(LIMIT, "its job says why it waits", || async {
        let job = api.job(&waiting).await;
        assert_eq!(job["state"], "queued", "{job}");
        (job["state_reason"] == "model_blocked").then_some(job)
    })
    .await;
    assert_eq!(job["attempt"], 0, "a failed load charges nothing: {job}");

    // The others, and time, go on.
    let limited =
        api.submit(&json!({"endpoint": "/v1/chat/completions", "body": chat("broken"), "deadline_s": 1})).await;
    let other = api.submit_echo("well", json!({})).await;
    api.succeeded(&other).await;
    let job = api.finished(&limited).await;
    assert_eq!((&job["state"], &job["error"]["code"]), (&json!("expired"), &json!("queue_deadline_exceeded")), "{job}");

    let worker = eventually(LIMIT, "five failed loads", || async {
        let worker = api.worker("broken").await;
        (worker["state"] == "quarantined").then_some(worker)
    })
    .await;
    assert!(worker["failed_loads"].as_u64().unwrap() >= 5, "{worker}");
    assert!(worker["reason"].as_str().unwrap().contains("no weights in sight"), "{worker}");
    assert_ne!(worker["retry_at"], Value::Null, "{worker}");
    // Between two tries; while it is tried again, it is loading.
    eventually(LIMIT, "troubled models are listed", || async {
        let ready = api.get("/readyz").await.is(200).json();
        ready["degraded"].as_array().unwrap().iter().any(|model| model["model"] == "broken").then_some(())
    })
    .await;

    std::fs::write(&mended, "").unwrap();
    api.poke("/v1/models/broken/retry").await.is(200);
    let job = api.succeeded(&waiting).await;
    assert_eq!((&job["attempt"], &job["failures"]), (&json!(1), &json!(0)), "{job}");
    assert_eq!(api.worker("broken").await["failed_loads"], 0);
    api.post("/v1/chat/completions", &chat("broken")).await.is(200);
    api.poke("/v1/models/nobody/retry").await.refused(404, "model_not_found");
}

#[tokio::test]
async fn a_worker_that_cannot_start_says_why() {
    let mut missing = echo("custom", &[] as &[&str]);
    missing["command"] = json!(["/nowhere/python", "--port", "{port}"]);
    let mut silent = echo("custom", &[] as &[&str]);
    silent["command"] = json!(["sh", "-c", "echo gone fishing >&2; exit 3"]);
    let site = Site::new().model("missing", missing).model("silent", silent);
    let server = site.start().await;
    let api = &server.api;
    for (model, words) in [("missing", "/nowhere/python"), ("silent", "gone fishing")] {
        let id = api.submit_echo(model, json!({})).await;
        let reason = eventually(Duration::from_secs(30), "a reason", || async {
            let worker = api.worker(model).await;
            worker["reason"].as_str().map(str::to_owned)
        })
        .await;
        assert!(reason.contains(words), "{model}: {reason}");
        assert_eq!(api.job(&id).await["state"], "queued");
    }
}

#[tokio::test]
async fn retried_by_itself_a_mended_model_runs_its_jobs() {
    let site = Site::new();
    let mended = site.path().join("mended");
    let site = site.model("broken", broken_until(&mended));
    let server = site.start().await;
    let api = &server.api;
    let id = api.submit(&json!({"endpoint": "/v1/chat/completions", "body": chat("broken")})).await;
    eventually(LIMIT, "a failed load", || async {
        (api.worker("broken").await["failed_loads"].as_u64() >= Some(1)).then_some(())
    })
    .await;
    std::fs::write(&mended, "").unwrap();
    api.succeeded(&id).await;
}
