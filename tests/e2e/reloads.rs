//! models.yaml is edited while the server runs: only what changed is touched, and no work is lost.

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::common::{Api, LIMIT, Site, check_history, echo, eventually, with};

fn none() -> [&'static str; 0] {
    []
}

async fn starts(api: &Api, model: &str) -> u64 {
    api.worker(model).await["starts"].as_u64().unwrap()
}

/// Waits until the server has taken an edit in, or refused it.
async fn heard(server: &crate::common::Server, line: &str, times: usize) {
    eventually(LIMIT, line, || async { (server.log().matches(line).count() >= times).then_some(()) }).await;
}

const IN_FORCE: &str = "models.yaml was edited: it is in force";

#[tokio::test]
async fn only_what_changed_is_touched_and_what_runs_finishes() {
    // All of them fit beside each other.
    let small = |args: &[&str]| with(echo("custom", args), json!({"memory": "1MiB"}));
    let site = Site::new().model("a", small(&["--delay-ms", "10"])).model("b", small(&none()));
    let server = site.start().await;
    let api = &server.api;
    for model in ["a", "b"] {
        let id = api.submit_echo(model, json!({})).await;
        api.succeeded(&id).await;
    }
    let untouched = starts(api, "b").await;
    let running = api.submit_echo("a", json!({"delay_ms": 3000})).await;
    api.happened(&running, "job.started").await;
    let waiting = api.submit_echo("a", json!({})).await;
    let before = server.worker("a").await;

    let site = site.model("a", small(&["--delay-ms", "20"])).model("new", small(&none()));
    site.write();
    heard(&server, IN_FORCE, 1).await;
    // What is new can be used, what is the same was not touched.
    let id = api.submit_echo("new", json!({})).await;
    api.succeeded(&id).await;
    let id = api.submit_echo("b", json!({})).await;
    api.succeeded(&id).await;
    assert_eq!(starts(api, "b").await, untouched);
    // What ran has finished where it was, what waited runs on a worker of the new entry.
    for id in [&running, &waiting] {
        let job = api.succeeded(id).await;
        assert_eq!((&job["attempt"], &job["crashes"], &job["failures"]), (&json!(1), &json!(0), &json!(0)), "{job}");
        check_history(&api.events(id).await);
    }
    let pid = |answer: Value| answer["pid"].as_i64().unwrap();
    let of = |id: String| async move { pid(api.get(&format!("/v1/jobs/{id}/response")).await.is(200).json()) };
    assert_eq!(of(running).await, i64::from(before.pid));
    assert_ne!(of(waiting).await, i64::from(before.pid));
    let now = server.worker("a").await;
    assert!(now.command.windows(2).any(|pair| pair == ["--delay-ms", "20"]), "{now:?}");
    assert!(!before.is_alive());
    assert!(!server.log().contains("has no supervisor"), "{}", server.log());
}

#[tokio::test]
async fn what_a_worker_does_not_see_is_changed_under_it() {
    let entry = echo("custom", &none());
    let site = Site::new().model("a", entry.clone());
    let server = site.start().await;
    let api = &server.api;
    let id = api.submit_echo("a", json!({})).await;
    api.succeeded(&id).await;
    // One at a time before.
    let site = site.model("a", with(entry, json!({"limit": 3, "max_batch": 1, "aliases": ["other"]})));
    site.write();
    server.signal(Signal::SIGHUP);
    heard(&server, IN_FORCE, 1).await;
    let mut ids = Vec::new();
    for _ in 0..3 {
        ids.push(api.submit_echo("other", json!({"delay_ms": 1000})).await);
    }
    eventually(LIMIT, "three at once", || async { (api.queue().await["running"] == 3).then_some(()) }).await;
    for id in &ids {
        api.succeeded(id).await;
    }
    assert_eq!(starts(api, "a").await, 1);
}

#[tokio::test]
async fn jobs_of_a_model_that_is_taken_out_wait_until_it_is_back() {
    let site = Site::new().model("a", echo("custom", &none())).model("b", echo("custom", &none()));
    let server = site.start().await;
    let api = &server.api;
    let running = api.submit_echo("a", json!({"delay_ms": 2000})).await;
    api.happened(&running, "job.started").await;
    // Also if somebody has paused it: no resume would help before its entry is back.
    api.post("/v1/queue/pause", &json!({"model": "a"})).await.is(200);
    let waiting = api.submit_echo("a", json!({})).await;
    assert_eq!(api.job(&waiting).await["state_reason"], "paused");
    let limited = api.submit(&json!({"endpoint": "/echo", "body": {"model": "a"}, "deadline_s": 4})).await;
    let site = site.without_model("a");
    site.write();
    heard(&server, IN_FORCE, 1).await;
    api.post("/v1/jobs", &crate::common::echo_job("a", json!({}))).await.refused(404, "model_not_found");
    let job = api.succeeded(&running).await;
    assert_eq!(job["attempt"], 1, "it finished where it was: {job}");
    let job = api.job(&waiting).await;
    assert_eq!((&job["state"], &job["state_reason"]), (&json!("queued"), &json!("model_blocked")), "{job}");
    let why = job["queue"]["reason"].as_str().unwrap();
    assert!(why.contains("not in models.yaml any more") && !why.contains("paused"), "{why}");
    api.get("/v1/queue/decisions?model=a").await.is(200);
    let queue = api.post("/v1/queue/resume", &json!({"model": "a"})).await.is(200).json();
    assert!(queue["history"][0]["reason"].as_str().unwrap().contains("until it is in models.yaml again"), "{queue}");
    assert_eq!(api.finished(&limited).await["state"], "expired", "its deadline holds");
    eventually(LIMIT, "its worker has left, and its supervisor with it", || async {
        let workers = api.get("/v1/workers").await.is(200).json();
        let is_listed = workers["data"].as_array().unwrap().iter().any(|worker| worker["model"] == "a");
        (!is_listed && !server.processes().iter().any(|found| found.serves("a"))).then_some(())
    })
    .await;
    let other = api.submit_echo("b", json!({})).await;
    api.succeeded(&other).await;

    site.model("a", echo("custom", &none())).write();
    let job = api.succeeded(&waiting).await;
    assert_eq!((&job["attempt"], &job["failures"]), (&json!(1), &json!(0)), "{job}");
}

/// As after a removed entry: nothing is sent to a worker that does not know what to do with it, and nothing is lost.
#[tokio::test]
async fn jobs_of_an_endpoint_that_is_taken_out_wait_until_it_is_back() {
    let of = |endpoint: &str| with(echo("custom", &none()), json!({"endpoint": endpoint, "limit": 1, "max_batch": 1}));
    let site = Site::new().model("a", of("/echo"));
    let mut server = site.start().await;
    let api = &server.api;
    let running = api.submit_echo("a", json!({"delay_ms": 2000})).await;
    api.happened(&running, "job.started").await;
    let waiting = api.submit_echo("a", json!({})).await;
    let cancelled = api.submit_echo("a", json!({})).await;
    let site = site.model("a", of("/v1/chat/completions"));
    site.write();
    heard(&server, IN_FORCE, 1).await;
    let job = api.succeeded(&running).await;
    assert_eq!(job["attempt"], 1, "it finished where it was: {job}");
    let waits = async |api: &Api| {
        let job = api.job(&waiting).await;
        assert_eq!((&job["state"], &job["state_reason"]), (&json!("queued"), &json!("model_blocked")), "{job}");
        let why = job["queue"]["reason"].as_str().unwrap();
        assert!(why.contains("does not serve the endpoint of this job any more"), "{why}");
    };
    waits(api).await;
    // What the entry lists now is done meanwhile, and the worker takes no harm.
    let body = json!({"model": "a", "messages": [{"role": "user", "content": "hi"}]});
    let id = api.submit(&json!({"endpoint": "/v1/chat/completions", "body": body})).await;
    api.succeeded(&id).await;
    waits(api).await;
    api.post(&format!("/v1/jobs/{cancelled}/cancel"), &json!({})).await.is(200);
    assert_eq!(api.job(&cancelled).await["state"], "cancelled");
    // Another start finds it so, too.
    server.kill();
    let server = site.start().await;
    let api = &server.api;
    let id = api.submit(&json!({"endpoint": "/v1/chat/completions", "body": body})).await;
    api.succeeded(&id).await;
    waits(api).await;
    site.model("a", of("/echo")).write();
    heard(&server, IN_FORCE, 1).await;
    let job = api.succeeded(&waiting).await;
    assert_eq!((&job["attempt"], &job["failures"]), (&json!(1), &json!(0)), "{job}");
}

#[tokio::test]
async fn a_wrong_file_is_refused_and_what_was_read_before_stays() {
    let site = Site::new().model("a", echo("custom", &none()));
    let server = site.start().await;
    let api = &server.api;
    let good = std::fs::read_to_string(site.config()).unwrap();
    for wrong in ["models:\n  a:\n    tipe: custom\n", "models: [", ""] {
        std::fs::write(site.config(), wrong).unwrap();
        let reason = eventually(LIMIT, "it says so", || async {
            let ready = api.get("/readyz").await.is(200).json();
            let found =
                ready["degraded"].as_array().unwrap().iter().find(|one| one["config"] == "refused_edit").cloned();
            found.map(|found| found["reason"].as_str().unwrap().to_owned())
        })
        .await;
        assert!(reason.contains("models.yaml"), "{reason}");
        let models = api.get("/v1/models").await.is(200).json();
        assert_eq!(models["data"][0]["id"], "a");
        let id = api.submit_echo("a", json!({})).await;
        api.succeeded(&id).await;
        std::fs::write(site.config(), &good).unwrap();
        eventually(LIMIT, "mended", || async {
            let ready = api.get("/readyz").await.is(200).json();
            ready["degraded"].as_array().unwrap().is_empty().then_some(())
        })
        .await;
    }
    assert!(server.log().contains("tipe"), "the problems are in the log");
    heard(&server, "models.yaml is accepted again", 3).await;
    assert_eq!(starts(api, "a").await, 1);
}

#[tokio::test]
async fn an_edit_mends_a_model_that_does_not_load() {
    let site = Site::new().server("backoff_first", "10m").server("backoff_max", "10m");
    let site = site.model("a", echo("custom", &["--load-fail", "no weights"]));
    let server = site.start().await;
    let api = &server.api;
    let id = api.submit_echo("a", json!({})).await;
    eventually(LIMIT, "it waits", || async { (api.job(&id).await["state_reason"] == "model_blocked").then_some(()) })
        .await;
    site.model("a", echo("custom", &none())).write();
    let job = api.succeeded(&id).await;
    assert_eq!(job["attempt"], 1, "{job}");
}

#[tokio::test]
async fn replicas_come_and_go() {
    let entry = |replicas: u32| {
        with(echo("custom", &["--delay-ms", "300"]), json!({"max_replicas": replicas, "memory": "1MiB"}))
    };
    let first = entry(1);
    let again = |replicas: u32| with(first.clone(), json!({"max_replicas": replicas}));
    let site = Site::new().model("a", again(1));
    let server = site.start().await;
    let api = &server.api;
    let id = api.submit_echo("a", json!({})).await;
    api.succeeded(&id).await;
    let count = || async {
        let workers = api.get("/v1/workers").await.is(200).json();
        workers["data"].as_array().unwrap().len()
    };
    let site = site.model("a", again(2));
    site.write();
    heard(&server, IN_FORCE, 1).await;
    assert_eq!((count().await, starts(api, "a").await), (2, 1));
    site.model("a", again(1)).write();
    heard(&server, IN_FORCE, 2).await;
    eventually(LIMIT, "one is enough", || async { (count().await == 1).then_some(()) }).await;
    let id = api.submit_echo("a", json!({})).await;
    api.succeeded(&id).await;
    assert_eq!(starts(api, "a").await, 1);
}

#[tokio::test]
async fn knobs_hold_at_once_and_other_sections_at_the_next_start() {
    let site = Site::new().model("a", echo("custom", &["--load-s", "30"]));
    let server = site.start().await;
    let api = &server.api;
    let site = site.scheduler("queued_max", 1).server("sync_hop", "9s");
    site.write();
    heard(&server, IN_FORCE, 1).await;
    heard(&server, "`server:` was edited; that takes effect at the next start", 1).await;
    let history = api.queue().await["history"].to_string();
    assert!(history.contains("`scheduler:` changed in models.yaml (queued_max); it holds at once"), "{history}");
    api.submit_echo("a", json!({})).await;
    api.post("/v1/jobs", &crate::common::echo_job("a", json!({}))).await.refused(429, "queue_full");
}

#[tokio::test]
async fn that_a_model_cannot_be_parked_any_more_is_said_when_park_ram_is_edited() {
    let site = Site::new().env("ROUNDHOUSE_FAKE_GPUS", "1x80GiB").scheduler("park_ram", "200GiB");
    let site = site.model("a", parking(&none()));
    let server = site.start().await;
    assert!(!server.log().contains("cannot be parked"), "{}", server.log());
    site.scheduler("park_ram", "10GiB").write();
    heard(&server, "cannot be parked: it takes 30 GiB", 1).await;
    heard(&server, IN_FORCE, 1).await;
}

/// A model that takes most of a GPU that `ROUNDHOUSE_FAKE_GPUS` plays, and is parked when others need it.
fn parking(args: &[&str]) -> Value {
    let bytes = (50_u64 << 30).to_string();
    let args: Vec<&str> = ["--device-bytes", &bytes].into_iter().chain(args.iter().copied()).collect();
    with(echo("custom", &args), json!({"gpus": 1, "memory": "50GiB", "park": "ram"}))
}

#[tokio::test]
async fn what_is_parked_or_on_its_way_there_is_not_woken_as_it_was() {
    for edited_in in ["parking", "parked"] {
        let site = Site::new().env("ROUNDHOUSE_FAKE_GPUS", "1x80GiB").scheduler("park_ram", "200GiB");
        let site = site.model("a", parking(&["--park-s", "1.5"])).model("b", parking(&none()));
        let server = site.start().await;
        let api = &server.api;
        let id = api.submit_echo("a", json!({})).await;
        api.succeeded(&id).await;
        let before = server.worker("a").await;
        let other = api.submit_echo("b", json!({})).await;
        eventually(LIMIT, edited_in, || async { (api.worker("a").await["state"] == edited_in).then_some(()) }).await;
        site.model("a", parking(&["--delay-ms", "20"])).write();
        server.signal(Signal::SIGHUP);
        eventually(LIMIT, "the parked one is gone", || async { (!before.is_alive()).then_some(()) }).await;
        api.succeeded(&other).await;
        let id = api.submit_echo("a", json!({})).await;
        let job = api.succeeded(&id).await;
        assert_eq!((&job["attempt"], &job["crashes"]), (&json!(1), &json!(0)), "{edited_in}: {job}");
        let now = server.worker("a").await;
        assert!(now.command.windows(2).any(|pair| pair == ["--delay-ms", "20"]), "{edited_in}: {now:?}");
        assert_eq!(starts(api, "a").await, 2, "{edited_in}");
    }
}
