//! Answers that cannot be stored for a while: their workers go on with other work, but not for ever, and no answer is lost
//! or told before it is durable.

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::common::{Api, LIMIT, Site, check_history, echo, eventually, with};
use super::shim::{self, Fault};

/// A server whose sounds are not stored while the file `arm` is there; `a` makes two of them in a pass, `b` only talks.
struct Held {
    site: Site,
    arm: std::path::PathBuf,
}

impl Held {
    fn new() -> Self {
        let sounds = with(echo("audio", &["--batch-wait-ms", "10000"]), json!({"limit": 2, "max_batch": 2}));
        let mut site = Site::new().model("a", sounds).model("b", echo("text", &[] as &[&str]));
        let data = site.path().canonicalize().unwrap().join("data");
        let arm = site.path().join("armed");
        let fault = Fault { what: "hold-sync:1".to_owned(), only: ".wav#1" };
        for (name, value) in shim::failing(&data, &fault, &arm) {
            site = site.env(&name, &value);
        }
        std::fs::write(&arm, "").unwrap();
        Self { site, arm }
    }

    fn release(&self) {
        std::fs::remove_file(&self.arm).unwrap();
    }

    /// Waits until so many answers of the worker are on their way to the disk.
    async fn answers(&self, count: usize) {
        let folder = self.site.data().join("artifacts/00000");
        eventually(LIMIT, "answers on their way to the disk", || async {
            let names = std::fs::read_dir(&folder).ok()?.map(|file| file.unwrap().file_name());
            (names.filter(|name| name.to_string_lossy().ends_with(".wav#1")).count() == count).then_some(())
        })
        .await;
    }
}

fn sound() -> Value {
    json!({"endpoint": "/v1/audio/generations", "body": {"model": "a", "prompt": "rain", "duration": 1}})
}

fn talk() -> Value {
    let body = json!({"model": "b", "messages": [{"role": "user", "content": "hi"}]});
    json!({"endpoint": "/v1/chat/completions", "body": body})
}

async fn states(api: &Api, ids: &[String]) -> Vec<String> {
    let mut states = Vec::new();
    for id in ids {
        states.push(api.job(id).await["state"].as_str().unwrap().to_owned());
    }
    states
}

#[tokio::test]
async fn the_next_pass_begins_before_the_last_one_is_stored_and_the_one_after_it_does_not() {
    let held = Held::new();
    let server = held.site.start().await;
    let api = &server.api;
    let ids = api.submit_together(vec![sound(); 6]).await;
    held.answers(4).await;
    // Whatever was decided on the last answer is committed before this.
    let last = api.submit(&sound()).await;
    assert_eq!(states(api, &ids).await, ["running", "running", "running", "running", "queued", "queued"]);
    let queue = api.queue().await;
    assert_eq!((&queue["running"], &queue["queued"]), (&json!(4), &json!(3)), "{queue}");
    held.release();
    for id in ids.iter().chain([&last]) {
        assert_eq!(api.succeeded(id).await["attempt"], 1);
        assert_eq!(check_history(&api.events(id).await), "job.succeeded");
    }
    assert_eq!(api.worker("a").await["starts"], 1);
}

#[tokio::test]
async fn another_model_is_loaded_meanwhile_and_a_stop_and_a_cancel_wait_for_what_is_answered() {
    let held = Held::new();
    let mut server = held.site.start().await;
    let api = &server.api;
    let ids = api.submit_together(vec![sound(); 2]).await;
    held.answers(2).await;
    let other = api.submit(&talk()).await;
    api.succeeded(&other).await;
    assert_eq!(states(api, &ids).await, ["running", "running"], "their worker is gone, their answers are not");
    let asked = api.poke(&format!("/v1/jobs/{}/cancel", ids[1])).await.is(200).json();
    assert_eq!(asked["state"], "cancelling", "{asked}");

    server.signal(Signal::SIGTERM);
    eventually(LIMIT, "no new work", || async {
        (api.post("/v1/jobs", &talk()).await.code() == "draining").then_some(())
    })
    .await;
    assert_eq!(states(api, &ids).await, ["running", "cancelling"]);
    held.release();
    assert!(server.ended().await.success());
    server.all_gone(LIMIT).await;
    server.forget_processes();
    let server = held.site.start().await;
    for id in &ids {
        let job = server.api.job(id).await;
        assert_eq!((&job["state"], &job["attempt"]), (&json!("succeeded"), &json!(1)), "{job}");
    }
}

#[tokio::test]
async fn a_worker_that_dies_after_its_answers_takes_none_along() {
    let held = Held::new();
    let server = held.site.start().await;
    let api = &server.api;
    let ids = api.submit_together(vec![sound(); 2]).await;
    held.answers(2).await;
    server.worker("a").await.signal(Signal::SIGKILL);
    eventually(LIMIT, "its death is noticed", || async {
        String::from_utf8_lossy(&api.get("/metrics").await.body)
            .contains("roundhouse_worker_deaths_total{model=\"a\"} 1")
            .then_some(())
    })
    .await;
    let next = api.submit(&sound()).await;
    held.answers(3).await;
    assert_eq!(states(api, &ids).await, ["running", "running"], "the next worker has answered");
    held.release();
    for id in ids.iter().chain([&next]) {
        let job = api.succeeded(id).await;
        assert_eq!((&job["attempt"], &job["crashes"]), (&json!(1), &json!(0)), "{job}");
    }
}

#[tokio::test]
async fn an_answer_that_a_kill_comes_before_is_made_again() {
    let held = Held::new();
    let mut server = held.site.start().await;
    let id = server.api.submit(&sound()).await;
    held.answers(1).await;
    server.kill();
    server.all_gone(LIMIT).await;
    server.forget_processes();
    held.release();
    let server = held.site.start().await;
    let job = server.api.succeeded(&id).await;
    assert_eq!((&job["attempt"], &job["failures"], &job["crashes"]), (&json!(2), &json!(0), &json!(0)), "{job}");
}
