//! Why things are as they are, in words: decisions, the log and waiting jobs say the same ones.

use serde_json::{Value, json};

use crate::common::{LIMIT, Server, Site, echo, eventually};

async fn decisions(server: &Server, query: &str) -> Vec<Value> {
    let page = server.api.get(&format!("/v1/queue/decisions{query}")).await.is(200).json();
    assert_eq!(page["object"], "list", "{page}");
    page["data"].as_array().unwrap().clone()
}

#[tokio::test]
async fn the_log_the_decisions_and_the_job_say_the_same_words() {
    let site = Site::new();
    let args = site.whole_device();
    let site = site.model("a", echo("custom", &args)).model("b", echo("custom", &args));
    let server = site.start().await;
    let api = &server.api;
    let long = api.submit_echo("a", json!({"delay_ms": 60_000})).await;
    eventually(LIMIT, "a runs", || async { (api.job(&long).await["state"] == "running").then_some(()) }).await;
    let waiting = api.submit_echo("b", json!({})).await;
    let words = eventually(LIMIT, "it says why", || async {
        api.job(&waiting).await["queue"]["reason"].as_str().map(str::to_owned)
    })
    .await;
    assert!(words.starts_with("stay on a: "), "{words}");
    let about = decisions(&server, "?model=b").await;
    assert_eq!(about[0]["reason"], words, "{about:?}");
    assert_eq!(
        (&about[0]["action"], &about[0]["code"], &about[0]["other"]),
        (&json!("stay"), &json!("not_due"), &json!("b"))
    );
    assert!(about[0]["numbers"]["price_s"].as_f64().unwrap() > 0.0, "{about:?}");
    api.get("/v1/queue/decisions?model=none").await.refused(404, "model_not_found");

    let queue = api.job(&waiting).await["queue"].clone();
    let times = |field: &str| queue[field].as_array().map(|pair| [pair[0].clone(), pair[1].clone()]).unwrap();
    let [from, to] = times("eta_start").map(|at| at.as_str().unwrap().to_owned());
    assert!(from <= to && times("eta_finish")[1].as_str().unwrap() > to.as_str(), "{queue}");
    let behind = api.submit_echo("a", json!({"delay_ms": 60_000})).await;
    let behind_why = api.job(&behind).await["queue"]["reason"].clone();
    assert!(
        behind_why.as_str().unwrap().starts_with("job queued: 1st for a; a is loaded; expected start in "),
        "{behind_why}"
    );
    api.poke(&format!("/v1/jobs/{behind}/cancel")).await.is(200);

    api.poke(&format!("/v1/jobs/{long}/cancel")).await.is(200);
    api.succeeded(&waiting).await;
    let all = decisions(&server, "").await;
    let swap = all.iter().find(|decision| decision["action"] == "swap").unwrap();
    assert_eq!((&swap["model"], &swap["other"], &swap["code"]), (&json!("b"), &json!("a"), &json!("dry")), "{swap}");
    let ids: Vec<u64> = all.iter().map(|decision| decision["id"].as_u64().unwrap()).collect();
    assert!(ids.windows(2).all(|pair| pair[0] == pair[1] + 1), "newest first: {ids:?}");
    for decision in &all {
        let words = decision["reason"].as_str().unwrap().to_owned();
        eventually(LIMIT, "the log says so", || async { server.log().contains(&words).then_some(()) }).await;
    }
    let page = api.get(&format!("/v1/queue/decisions?limit=1&after={}", ids[0])).await.is(200).json();
    assert_eq!((&page["data"][0]["id"], &page["last_id"]), (&json!(ids[1]), &json!(ids[1])), "{page}");
    assert_eq!(page["has_more"], ids.len() > 2, "{page}");
    api.get("/v1/queue/decisions?limit=5000").await.refused(400, "invalid_request");
}
