//! What an operator does by hand.

use serde_json::{Value, json};

use crate::common::{LIMIT, Site, check_history, echo, eventually};

fn view<'a>(queue: &'a Value, model: &str) -> &'a Value {
    queue["models"].as_array().unwrap().iter().find(|view| view["model"] == model).unwrap()
}

fn none() -> [&'static str; 0] {
    []
}

#[tokio::test]
async fn a_pause_holds_through_a_restart_and_a_resume_ends_it() {
    let site = Site::new().model("a", echo("custom", &none())).model("b", echo("custom", &none()));
    let mut server = site.start().await;
    let queue = server.api.post("/v1/queue/pause", &json!({"model": "a"})).await.is(200).json();
    assert_eq!((&view(&queue, "a")["paused"], &view(&queue, "b")["paused"]), (&json!(true), &json!(false)), "{queue}");
    assert_eq!(queue["history"][0]["action"], "pause", "{queue}");
    let held = server.api.submit_echo("a", json!({})).await;
    let free = server.api.submit_echo("b", json!({})).await;
    server.api.succeeded(&free).await;
    for _ in 0..2 {
        let job = server.api.job(&held).await;
        assert_eq!((&job["state"], &job["state_reason"]), (&json!("queued"), &json!("paused")), "{job}");
        assert_eq!(job["queue"]["eta_start"], Value::Null, "{job}");
        server.kill();
        server = site.start().await;
    }
    server.api.poke("/v1/queue/resume").await.is(200);
    server.api.succeeded(&held).await;
    server.api.post("/v1/queue/pause", &json!({"model": "nope"})).await.refused(404, "model_not_found");
    server.api.post("/v1/queue/pause", &json!({"modle": "a"})).await.refused(400, "invalid_request");
    server.api.poke("/v1/queue/stop").await.refused(404, "not_found");
}

#[tokio::test]
async fn a_drain_finishes_what_is_there_and_refuses_what_comes() {
    let site = Site::new().model("a", echo("custom", &none())).model("b", echo("custom", &none()));
    let server = site.start().await;
    let api = &server.api;
    let ids = api.submit_together(vec![crate::common::echo_job("a", json!({})); 5]).await;
    api.post("/v1/queue/drain", &json!({"model": "a"})).await.is(200);
    let job = crate::common::echo_job("a", json!({}));
    let refused = api.post("/v1/jobs", &job).await.refused(503, "draining");
    assert!(refused.text().contains("roundhouse queue resume --model a"), "{}", refused.text());
    for id in &ids {
        api.succeeded(id).await;
    }
    let other = api.submit_echo("b", json!({})).await;
    api.succeeded(&other).await;
    api.get("/readyz").await.is(200);
    api.poke("/v1/queue/drain").await.is(200);
    api.get("/readyz").await.refused(503, "draining");
    api.poke("/v1/queue/resume").await.is(200);
    let again = api.submit(&job).await;
    api.succeeded(&again).await;
}

#[tokio::test]
async fn a_purge_cancels_those_that_wait_and_their_watchers_hear_it() {
    let site = Site::new().model("a", echo("custom", &none())).model("b", echo("custom", &none()));
    let server = site.start().await;
    let api = &server.api;
    api.poke("/v1/queue/pause").await.is(200);
    let mut purged = api.submit_together(vec![crate::common::echo_job("a", json!({})); 700]).await;
    let kept = api.submit_echo("b", json!({})).await;
    let mut events = api.follow(&purged[0], 0).await;
    api.post("/v1/queue/purge", &json!({"model": null})).await.refused(400, "invalid_request");
    let answer = api.post("/v1/queue/purge", &json!({"model": "a"})).await.is(200).json();
    assert_eq!(answer, json!({"removed": 700}));
    let last = events.rest().await.pop().unwrap();
    assert_eq!(last.event, "job.cancelled", "{last:?}");
    for id in purged.drain(..).step_by(100) {
        let job = api.job(&id).await;
        assert_eq!((&job["state"], &job["error"]["code"]), (&json!("cancelled"), &json!("cancelled_by_user")), "{job}");
        assert_eq!(check_history(&api.events(&id).await), "job.cancelled");
    }
    let queue = api.queue().await;
    assert_eq!((&queue["queued"], &queue["history"][0]["action"]), (&json!(1), &json!("purge")), "{queue}");
    assert_eq!(api.poke("/v1/queue/purge").await.is(200).json(), json!({"removed": 1}));
    assert_eq!(api.finished(&kept).await["state"], "cancelled");
}

#[tokio::test]
async fn models_are_loaded_unloaded_and_pinned_by_hand() {
    let site = Site::new().model("a", echo("custom", &none())).model("b", echo("custom", &none()));
    let server = site.start().await;
    let api = &server.api;
    let is = async |model: &str, state: &str| {
        eventually(LIMIT, &format!("{model} is {state}"), || async {
            (api.worker(model).await["state"] == state).then_some(())
        })
        .await;
    };
    api.poke("/v1/models/a/load").await.is(200);
    is("a", "resident").await;
    let model = api.poke("/v1/models/a/pin").await.is(200).json();
    assert_eq!(model["roundhouse"]["pinned"], true, "{model}");
    let waits = api.submit_echo("b", json!({})).await;
    let served = api.submit_echo("a", json!({})).await;
    api.succeeded(&served).await;
    assert_eq!(api.job(&waits).await["state"], "queued");
    api.poke("/v1/models/a/unpin").await.is(200);
    api.succeeded(&waits).await;
    api.poke("/v1/models/b/unload").await.is(200);
    is("b", "absent").await;
    api.poke("/v1/models/nope/load").await.refused(404, "model_not_found");
    api.poke("/v1/models/a/lift").await.refused(404, "not_found");
}

#[tokio::test]
async fn only_an_admin_operates() {
    let site = Site::new().model("a", echo("custom", &none()));
    let site = site.env("ROUNDHOUSE_API_KEYS", "alice:alice-secret,admin:admin-secret");
    let server = site.start().await;
    let (alice, admin) = (server.api.key("alice-secret"), server.api.key("admin-secret"));
    for path in ["/v1/queue/pause", "/v1/queue/purge", "/v1/models/a/load", "/v1/models/a/pin", "/v1/models/a/retry"] {
        alice.poke(path).await.refused(403, "forbidden");
    }
    admin.poke("/v1/queue/pause").await.is(200);
    let held = alice.submit_echo("a", json!({})).await;
    assert_eq!(alice.job(&held).await["state_reason"], "paused");
    admin.poke("/v1/queue/resume").await.is(200);
    alice.succeeded(&held).await;
}
