//! Entries that move, go or get another name while jobs of them wait.

use serde_json::{Value, json};

use crate::common::{LIMIT, Site, echo, eventually, with};

/// Without a port of its own, and small enough to lie beside others.
fn small() -> Value {
    let mut entry = with(echo("custom", &[""; 0]), json!({"memory": "1MiB"}));
    entry.as_object_mut().unwrap().remove("port");
    entry
}

const IN_FORCE: &str = "models.yaml was edited: it is in force";

#[tokio::test]
async fn an_entry_that_moves_up_keeps_its_worker_and_one_that_is_gone_is_forgotten() {
    let site = Site::new().model("a", small()).model("b", small());
    let server = site.start().await;
    let api = &server.api;
    let id = api.submit_echo("b", json!({})).await;
    api.succeeded(&id).await;
    site.without_model("a").write();
    eventually(LIMIT, IN_FORCE, || async { server.log().contains(IN_FORCE).then_some(()) }).await;
    let id = api.submit_echo("b", json!({})).await;
    api.succeeded(&id).await;
    assert_eq!(api.worker("b").await["starts"], 1);
    let queue = api.queue().await;
    let names: Vec<&Value> = queue["models"].as_array().unwrap().iter().map(|model| &model["model"]).collect();
    assert_eq!(names, ["b"], "nothing of `a` is left");
    assert_eq!(api.get("/readyz").await.is(200).json()["degraded"], json!([]));
}

#[tokio::test]
async fn jobs_of_an_old_name_say_how_they_get_to_the_new_one() {
    let site = Site::new().model("old", small());
    let server = site.start().await;
    let api = &server.api;
    api.post("/v1/queue/pause", &json!({"model": "old"})).await.is(200);
    let waiting = api.submit_echo("old", json!({})).await;
    let site = site.without_model("old").model("new", with(small(), json!({"aliases": ["old"]})));
    site.write();
    eventually(LIMIT, IN_FORCE, || async { server.log().contains(IN_FORCE).then_some(()) }).await;
    let listed = api.get("/v1/models").await.is(200).json();
    let removed = &listed["roundhouse"]["removed"][0];
    assert_eq!((&removed["id"], &removed["queue_depth"]), (&json!("old"), &json!(1)), "{listed}");
    assert!(removed["trouble"].as_str().unwrap().contains("alias of `new`"), "{removed}");
    let purged = api.post("/v1/queue/purge", &json!({"model": "old"})).await.is(200).json();
    assert_eq!(purged["removed"], 1);
    let again = api.poke(&format!("/v1/jobs/{waiting}/retry")).await.is(202).json();
    assert_eq!(again["model"], "new", "{again}");
    api.succeeded(again["id"].as_str().unwrap()).await;
    let listed = api.get("/v1/models").await.is(200).json();
    assert_eq!(listed["roundhouse"], Value::Null, "nothing is left of it");
}
