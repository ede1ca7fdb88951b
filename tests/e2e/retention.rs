//! What is deleted after a while, what goes when room is needed, and what clients see of it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use crate::common::{Api, LIMIT, Site, echo, echo_job, eventually, with};

fn image(prompt: &str) -> Value {
    json!({"endpoint": "/v1/images/generations", "body": {"model": "i", "prompt": prompt}})
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

async fn emptied(api: &Api, id: &str) -> Value {
    eventually(LIMIT, "what the job held is deleted", || async {
        Some(api.job(id).await).filter(|job| !job["emptied_at"].is_null())
    })
    .await
}

async fn metric(api: &Api, series: &str) -> f64 {
    let reply = api.get("/metrics").await.is(200);
    let text = String::from_utf8_lossy(&reply.body);
    let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ').map(str::to_owned));
    line.unwrap_or_else(|| panic!("no {series}: {text}")).parse().unwrap()
}

#[tokio::test]
async fn what_an_ended_job_held_goes_and_its_end_is_still_told() {
    let site = Site::new()
        .storage("results_ttl", "5s")
        .storage("sync_ttl", "1s")
        .storage("tombstone_ttl", "1h")
        .model("a", echo("custom", &[] as &[&str]))
        .model("t", echo("text", &[] as &[&str]))
        .model("i", echo("image", &[] as &[&str]));
    let server = site.start().await;
    let api = &server.api;
    let drawn = api.submit(&with(image("a fox"), json!({"metadata": {"run": "7"}}))).await;
    let before = api.succeeded(&drawn).await;
    assert_eq!(before["emptied_at"], Value::Null);
    let url = before["artifacts"][0]["url"].as_str().unwrap().to_owned();
    api.get(&url).await.is(200);
    let failing = api.submit_echo("a", json!({"fail": true})).await;
    let chat = json!({"model": "t", "messages": [{"role": "user", "content": "hi"}], "metadata": {"who": "caller"}});
    api.post("/v1/chat/completions", &chat).await.is(200);

    let job = emptied(api, &drawn).await;
    for field in ["id", "kind", "model", "state", "attempt", "created_at", "started_at", "finished_at", "timings"] {
        assert_eq!(job[field], before[field], "{field}: {job}");
    }
    for field in ["result", "endpoint", "usage", "error", "custom_id"] {
        assert_eq!(job[field], Value::Null, "{field}: {job}");
    }
    assert_eq!((&job["artifacts"], &job["metadata"]), (&json!([]), &json!({})), "{job}");
    assert!(job["version"].as_i64() > before["version"].as_i64(), "{job}");
    for path in ["response", "artifacts", "artifacts/art_0"] {
        let reply = api.get(&format!("/v1/jobs/{drawn}/{path}")).await.refused(410, "result_expired");
        assert_eq!(reply.json()["error"]["job_id"], drawn.as_str(), "{path}");
    }
    api.get(&url).await.refused(410, "result_expired");
    api.poke(&format!("/v1/jobs/{drawn}/retry")).await.refused(410, "result_expired");
    api.poke(&format!("/v1/jobs/{drawn}/cancel")).await.is(200);
    // Of the events the end is left, in a list and as a stream.
    let events = api.events(&drawn).await;
    assert_eq!(events.iter().map(|event| &event["type"]).collect::<Vec<_>>(), ["job.succeeded"]);
    assert_eq!(events[0]["job"]["result"], Value::Null);
    let frames = api.follow(&drawn, 0).await.rest_persisted(LIMIT).await;
    assert_eq!(frames.iter().map(|frame| frame.event.as_str()).collect::<Vec<_>>(), ["job.succeeded"]);
    let list = api.get("/v1/jobs?state=succeeded").await.is(200).json();
    assert!(list["data"].as_array().unwrap().iter().any(|job| job["id"] == drawn.as_str()), "{list}");

    // An error stays with the job.
    let job = emptied(api, &failing).await;
    assert_eq!((&job["state"], &job["error"]["code"]), (&json!("failed"), &json!("worker_error")), "{job}");
    api.get(&format!("/v1/jobs/{failing}/response")).await.refused(500, "worker_error");
    eventually(LIMIT, "all three are empty", || async {
        (metric(api, "roundhouse_store_emptied_total").await >= 3.0).then_some(())
    })
    .await;
    assert_eq!(files(&site.data().join("artifacts")), Vec::<PathBuf>::new());
    assert_eq!(metric(api, "roundhouse_store_missing_files").await, 0.0);
}

#[tokio::test]
async fn in_the_end_the_job_is_gone_and_those_that_wait_are_not() {
    let site = Site::new()
        .storage("results_ttl", "4s")
        .storage("tombstone_ttl", "4s")
        .model("a", echo("custom", &[] as &[&str]))
        .model("never", echo("custom", &["--load-s", "600"]));
    let mut server = site.start().await;
    let id = server.api.submit_echo("a", json!({})).await;
    server.api.succeeded(&id).await;
    let waiting = server.api.submit_echo("never", json!({})).await;
    let gone = || async {
        let reply = server.api.get(&format!("/v1/jobs/{id}")).await;
        if reply.status == 404 { Some(()) } else { None }
    };
    eventually(LIMIT, "the job is gone", gone).await;
    assert!(metric(&server.api, "roundhouse_store_deleted_total").await >= 1.0);
    server.kill();
    drop(server);
    // Its number is not given again, and what had not ended is there.
    let server = site.start().await;
    server.api.get(&format!("/v1/jobs/{id}")).await.refused(404, "not_found");
    let job = server.api.job(&waiting).await;
    assert_eq!(job["state"], "queued", "{job}");
    assert_eq!(job["endpoint"], "/echo", "{job}");
}

#[tokio::test]
async fn a_full_store_refuses_new_jobs_until_answers_are_fetched() {
    let site = Site::new().storage("quota", "1MiB").model("a", echo("custom", &[] as &[&str]));
    let server = site.start().await;
    let api = &server.api;
    // 400 KB that come back as they are: body and answer.
    let large = json!({"endpoint": "/echo", "body": {"model": "a", "text": "x".repeat(400_000)}});
    let mut kept = Vec::new();
    let refused = eventually(LIMIT, "new jobs are refused", || async {
        let reply = api.post("/v1/jobs", &large).await;
        if reply.status == 202 { None } else { Some(reply) }
    })
    .await
    .refused(503, "storage_unavailable");
    let text = refused.json()["error"]["message"].as_str().unwrap().to_owned();
    for word in ["quota", "1.0 MiB", "fetch", "storage.quota"] {
        assert!(text.contains(word), "{text}");
    }
    assert!(!text.contains(&*site.path().to_string_lossy()), "no paths: {text}");
    assert!(!refused.header("retry-after").is_empty());
    let list = api.get("/v1/jobs").await.is(200).json();
    for job in list["data"].as_array().unwrap() {
        kept.push(api.succeeded(job["id"].as_str().unwrap()).await["id"].as_str().unwrap().to_owned());
    }
    assert!(kept.len() >= 2, "what was accepted runs to its end: {list}");
    let ready = eventually(LIMIT, "it is said", || async {
        let ready = api.get("/readyz").await.is(200).json();
        (!ready["degraded"].as_array().unwrap().is_empty()).then_some(ready)
    })
    .await;
    assert_eq!(ready["degraded"][0]["store"], "quota_used_up", "{ready}");
    assert_eq!(metric(api, "roundhouse_store_quota_bytes").await, 1_048_576.0);
    assert!(metric(api, "roundhouse_store_used_bytes").await > 1_048_576.0);
    // However long it takes, nothing goes that nobody has fetched.
    tokio::time::sleep(Duration::from_secs(2)).await;
    for id in &kept {
        let answer = api.get(&format!("/v1/jobs/{id}/response")).await.is(200).json();
        assert_eq!(answer["body"]["text"].as_str().map(str::len), Some(400_000));
    }
    // Now they have been: one of them makes room, the oldest that had been fetched when room was made.
    eventually(LIMIT, "what a fetched job held is deleted", || async {
        let mut states = Vec::new();
        for id in &kept {
            states.push(api.job(id).await["emptied_at"].is_string());
        }
        states.contains(&true).then_some(())
    })
    .await;
    let id = eventually(LIMIT, "new jobs are taken again", || async {
        let reply = api.post("/v1/jobs", &echo_job("a", json!({}))).await;
        (reply.status == 202).then(|| reply.json()["id"].as_str().unwrap().to_owned())
    })
    .await;
    api.succeeded(&id).await;
    assert!(server.log().contains("there is room again"), "{}", server.log());
}

#[tokio::test]
async fn jobs_that_wait_are_told_of_when_they_take_the_room() {
    let site = Site::new().storage("quota", "1MiB").model("never", echo("custom", &["--load-s", "600"]));
    let server = site.start().await;
    let api = &server.api;
    // Much smaller than a tenth of the quota: what is refused because of its own size does not use the quota up.
    let small = json!({"endpoint": "/echo", "body": {"model": "never", "text": "x".repeat(40_000)}});
    let (refused, ready) = eventually(LIMIT, "new jobs are refused, and it is said", || async {
        let ready = api.get("/readyz").await.is(200).json();
        let reply = api.post("/v1/jobs", &small).await;
        (reply.status == 503 && ready["degraded"][0]["store"] == "quota_used_up").then(|| (reply.text(), ready))
    })
    .await;
    for text in [refused.as_str(), ready["degraded"][0]["reason"].as_str().unwrap()] {
        assert!(text.contains("of it by jobs that wait or run") && text.contains("cancel some"), "{text}");
        assert!(!text.contains("fetch results that are waiting"), "{text}");
    }
    // What is advised helps.
    for job in api.get("/v1/jobs").await.is(200).json()["data"].as_array().unwrap() {
        api.poke(&format!("/v1/jobs/{}/cancel", job["id"].as_str().unwrap())).await.is(200);
    }
    eventually(LIMIT, "there is room again", || async {
        (api.post("/v1/jobs", &echo_job("never", json!({}))).await.status == 202).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_disk_below_the_watermark_is_said_once_and_by_readyz() {
    let site = Site::new().storage("free_min", "8000TiB").model("a", echo("custom", &[] as &[&str]));
    let server = site.start().await;
    let api = &server.api;
    let ready = eventually(LIMIT, "it is said", || async {
        let ready = api.get("/readyz").await.is(200).json();
        (ready["degraded"][0]["store"] == "disk_low").then_some(ready)
    })
    .await;
    let text = ready["degraded"][0]["reason"].as_str().unwrap();
    assert!(text.contains("nearly full") && text.contains("make room") && text.contains("free_min"), "{text}");
    assert!(!text.contains(&*site.path().to_string_lossy()), "no paths: {text}");
    for _ in 0..5 {
        api.post("/v1/jobs", &echo_job("a", json!({}))).await.refused(503, "storage_unavailable");
    }
    let log = server.log();
    assert_eq!(log.matches("nearly full").count(), 1, "{log}");
}

#[tokio::test]
async fn an_answer_counts_as_fetched_when_somebody_has_it_whole() {
    let site = Site::new()
        .model("t", echo("text", &[] as &[&str]))
        .model("i", echo("image", &[] as &[&str]))
        .model("a", echo("custom", &[] as &[&str]));
    let server = site.start().await;
    let api = &server.api;
    let chat = |who: &str, stream: bool| json!({"model": "t", "messages": [{"role": "user", "content": "hi"}], "metadata": {"who": who}, "stream": stream});
    let marked = |id: String| async move {
        eventually(LIMIT, "it is marked as fetched", || async { is_delivered(api, &id).await.then_some(()) }).await;
    };
    api.post("/v1/chat/completions", &chat("waiting", false)).await.is(200);
    marked(api.job_of("waiting").await).await;
    let streamed = api.post("/v1/chat/completions", &chat("streaming", true)).await.is(200).text();
    assert!(streamed.ends_with("data: [DONE]\n\n"), "{streamed}");
    marked(api.job_of("streaming").await).await;

    let two = json!({"endpoint": "/v1/images/generations", "body": {"model": "i", "prompt": "foxes", "n": 2}});
    let drawn = api.submit(&two).await;
    api.succeeded(&drawn).await;
    let artifact = |n: usize| format!("/v1/jobs/{drawn}/artifacts/art_{n}");
    api.get(&artifact(0)).await.is(200);
    api.header("range", "bytes=0-9").get(&artifact(1)).await.is(206);
    let text = "x".repeat(100_000);
    let large = api.submit(&json!({"endpoint": "/echo", "body": {"model": "a", "text": text}})).await;
    api.succeeded(&large).await;
    // The next commits would tell.
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    assert!(!is_delivered(api, &drawn).await, "one of two, and a part of the other");
    assert!(!is_delivered(api, &large).await, "too long to be in the job");
    api.get(&artifact(1)).await.is(200);
    marked(drawn).await;
    api.get(&format!("/v1/jobs/{large}/response")).await.is(200);
    marked(large).await;
    let small = api.submit_echo("a", json!({})).await;
    api.succeeded(&small).await;
    marked(small).await;
}

/// From the list: a look at the job itself would hand out its answer.
async fn is_delivered(api: &Api, id: &str) -> bool {
    let list = api.get("/v1/jobs?limit=100").await.is(200).json();
    let job = list["data"].as_array().unwrap().iter().find(|job| job["id"] == id).unwrap();
    !job["delivered_at"].is_null()
}
