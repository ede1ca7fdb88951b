//! Models that wait in host memory for their next turn: on a GPU that `ROUNDHOUSE_FAKE_GPUS` plays, and on which no two of them
//! fit together. Whatever goes wrong with it costs a cold load, and no job anything.

use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::common::{Api, LIMIT, Server, Site, echo, eventually, with};

/// A model that takes 50 of the 80 GiB, and 30 GiB of host memory when it is parked.
fn parking(args: &[&str]) -> Value {
    let bytes = (50_u64 << 30).to_string();
    let args: Vec<&str> = ["--device-bytes", &bytes].into_iter().chain(args.iter().copied()).collect();
    with(echo("custom", &args), json!({"gpus": 1, "memory": "50GiB", "park": "ram", "max_attempts": 1}))
}

/// `a` with these flags, and others without.
pub(crate) fn site(args: &[&str]) -> Site {
    let site = Site::new().model("a", parking(args)).model("b", parking(&[])).model("c", parking(&[]));
    site.env("ROUNDHOUSE_FAKE_GPUS", "1x80GiB").scheduler("park_ram", "200GiB")
}

/// One job, by its end; it has to succeed.
pub(crate) async fn visit(api: &Api, model: &str) -> Value {
    let id = api.submit_echo(model, json!({})).await;
    api.succeeded(&id).await
}

pub(crate) async fn is(api: &Api, model: &str, state: &str) {
    eventually(LIMIT, &format!("{model} is {state}"), || async {
        (api.worker(model).await["state"] == state).then_some(())
    })
    .await;
}

/// Cold loads and wakes of a model.
pub(crate) async fn loads(api: &Api, model: &str) -> (u64, u64) {
    let metrics = api.get("/metrics").await.is(200).text();
    let count = |name: &str| {
        let series = format!("roundhouse_{name}_seconds_count{{model=\"{model}\"}} ");
        metrics.lines().find_map(|line| line.strip_prefix(&series)).map_or(0, |count| count.parse().unwrap())
    };
    (count("load"), count("wake"))
}

/// `a` has had its turn and the GPU is `b`'s; then `a` has another one. Returns the job of that.
pub(crate) async fn there_and_back(api: &Api) -> Value {
    visit(api, "a").await;
    visit(api, "b").await;
    visit(api, "a").await
}

async fn pid_of(server: &Server, model: &str) -> i32 {
    server.worker(model).await.pid
}

#[tokio::test]
async fn two_models_that_do_not_fit_together_take_turns_by_waking() {
    let mut server = site(&[]).start().await;
    let api = server.api.clone();
    visit(&api, "a").await;
    let pid = pid_of(&server, "a").await;
    for _ in 0..2 {
        visit(&api, "b").await;
        is(&api, "a", "parked").await;
        visit(&api, "a").await;
        is(&api, "b", "parked").await;
    }
    assert_eq!((loads(&api, "a").await, loads(&api, "b").await), ((1, 2), (1, 1)));
    assert_eq!(pid_of(&server, "a").await, pid, "it is the same process");
    assert_eq!(api.worker("a").await["starts"], 1);
    assert!(server.log().contains("can be parked"), "{}", server.log());
    let queue = api.queue().await;
    let actions = queue["history"].as_array().unwrap().iter().filter(|decision| decision["action"] == "park");
    assert_eq!(actions.count(), 4, "{queue}");
    // What is parked ends with the server.
    server.signal(Signal::SIGTERM);
    assert!(server.ended().await.success());
    server.all_gone(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn what_cannot_be_parked_is_stopped_and_its_next_load_is_cold() {
    for flags in [&["--park-fail", "no room"] as &[&str], &["--park-crash"], &["--park-lie"]] {
        let server = site(flags).start().await;
        let api = &server.api;
        let job = there_and_back(api).await;
        assert_eq!(job["attempt"], 1, "{flags:?}: {job}");
        assert_eq!(loads(api, "a").await, (2, 0), "{flags:?}");
        assert!(server.log().contains("could not be parked, so it is stopped"), "{flags:?}: {}", server.log());
    }
}

#[tokio::test]
async fn a_wake_that_fails_is_a_cold_load_within_the_same_order() {
    let server = site(&["--wake-fail", "the weights are gone"]).start().await;
    let job = there_and_back(&server.api).await;
    assert_eq!(job["attempt"], 1, "{job}");
    assert_eq!(loads(&server.api, "a").await, (2, 0));
    assert_eq!(server.api.worker("a").await["failed_loads"], 0);
    let log = server.log();
    assert!(log.contains("could not be woken, so it is loaded anew") && log.contains("the weights are gone"), "{log}");
}

#[tokio::test]
async fn who_fails_to_park_or_to_wake_again_and_again_is_parked_no_more() {
    for flags in [["--wake-fail", "the weights are gone"], ["--park-fail", "no room"]] {
        let server = site(&flags).start().await;
        let api = &server.api;
        visit(api, "a").await;
        for _ in 0..2 {
            visit(api, "b").await;
            visit(api, "a").await;
        }
        let parking = |queue: &Value| {
            queue["models"].as_array().unwrap().iter().find(|m| m["model"] == "a").unwrap()["parking"].clone()
        };
        let found = parking(&api.queue().await);
        let why = found["why"].as_str().unwrap();
        assert_eq!(found["can"], false, "{found}");
        assert!(why.contains("2 parks or wakes in a row have failed") && why.contains(flags[1]), "{why}");
        let starts = api.worker("a").await["starts"].clone();
        visit(api, "b").await;
        assert_eq!(api.worker("a").await["state"], "absent", "it was stopped, not parked");
        visit(api, "a").await;
        assert_eq!(api.worker("a").await["starts"], json!(starts.as_u64().unwrap() + 1));
        assert_eq!(parking(&api.queue().await)["can"], false, "a new process says otherwise, and is not asked");
        // By hand it may try again.
        api.post("/v1/models/a/retry", &json!({})).await.is(200);
        eventually(LIMIT, "its worker is asked again", || async {
            (parking(&api.queue().await)["can"] != false).then_some(())
        })
        .await;
        visit(api, "b").await;
        visit(api, "a").await;
        let tries = server
            .log()
            .matches(if flags[0] == "--wake-fail" { "could not be woken" } else { "could not be parked" })
            .count();
        assert_eq!(tries, 3, "{}", server.log());
    }
}

#[tokio::test]
async fn a_job_that_fails_first_after_a_wake_runs_again_uncharged_on_a_worker_loaded_anew() {
    let server = site(&["--wake-broken", "damaged weights"]).start().await;
    let job = there_and_back(&server.api).await;
    // One attempt is all that it has, and this was the second.
    assert_eq!((&job["attempt"], &job["max_attempts"]), (&json!(2), &json!(1)), "{job}");
    assert_eq!(loads(&server.api, "a").await, (2, 1));
}

#[tokio::test]
async fn a_worker_that_dies_while_it_is_parked_costs_a_cold_load() {
    let server = site(&[]).start().await;
    let api = &server.api;
    visit(api, "a").await;
    visit(api, "b").await;
    is(api, "a", "parked").await;
    server.worker("a").await.signal(Signal::SIGKILL);
    is(api, "a", "absent").await;
    let lost = api.worker("a").await["lost_copy"].clone();
    let why = "lost its copy in host memory: it was killed by SIGKILL while it was parked";
    assert!(lost.as_str().is_some_and(|lost| lost.starts_with(why)), "{lost}");
    assert_eq!(visit(api, "a").await["attempt"], 1);
    assert_eq!(loads(api, "a").await, (2, 0));
}

#[tokio::test]
async fn when_host_memory_is_short_the_model_that_is_asked_for_most_stays() {
    let slow = || parking(&["--load-s", "4"]);
    let site = site(&["--load-s", "4"]).model("b", slow()).model("c", slow()).scheduler("park_ram", "40GiB");
    let server = site.start().await;
    let api = &server.api;
    for _ in 0..6 {
        visit(api, "a").await;
    }
    visit(api, "b").await;
    is(api, "a", "parked").await;
    visit(api, "c").await;
    is(api, "b", "absent").await;
    assert_eq!(api.worker("a").await["state"], "parked");
    assert_eq!((loads(api, "a").await, loads(api, "b").await), ((1, 0), (1, 0)));
}

#[tokio::test]
async fn nothing_parked_outlives_a_killed_server() {
    let site = site(&[]);
    let mut server = site.start().await;
    visit(&server.api, "a").await;
    visit(&server.api, "b").await;
    is(&server.api, "a", "parked").await;
    let parked = server.worker("a").await;
    server.kill();
    server.forget_processes();
    let server = site.start().await;
    assert!(!parked.is_alive(), "ended before the next server accepts jobs");
    assert_eq!(server.api.worker("a").await["state"], "absent");
    there_and_back(&server.api).await;
    assert_eq!(loads(&server.api, "a").await, (1, 1));
}

#[tokio::test]
async fn workers_are_told_what_is_left_for_their_copy_and_tell_what_it_takes() {
    // Theirs are made when they are loaded: 34 + 30 GiB are more than there is.
    let copy = |gib: u64| (gib << 30).to_string();
    let (first, second) = (copy(34), copy(30));
    let site = site(&["--host-bytes", &first]).model("b", parking(&["--host-bytes", &second]));
    let site = site.model("c", parking(&["--no-park", "its weights are offloaded"]));
    let server = site.scheduler("park_ram", "60GiB").start().await;
    let api = &server.api;
    let parking_of = async |model: &str| {
        let shown = api.get(&format!("/v1/models/{model}")).await.is(200).json();
        shown["roundhouse"]["parking"].clone()
    };
    assert_eq!(parking_of("a").await["can"], true, "30 GiB, as far as anybody knows");
    visit(api, "a").await;
    let worker = api.worker("a").await;
    assert_eq!((&worker["host_bytes"], &worker["can_park"]), (&json!(34_u64 << 30), &json!(true)), "{worker}");
    visit(api, "b").await;
    is(api, "a", "parked").await;
    assert_eq!(api.worker("a").await["host_bytes"], 34_u64 << 30);
    let worker = api.worker("b").await;
    let left = (60_u64 - 34) << 30;
    let note = format!("the copy takes {second} bytes, and {left} are left for it");
    assert_eq!((&worker["can_park"], &worker["park_note"]), (&json!(false), &json!(note)), "{worker}");
    assert_eq!(worker["host_bytes"], 0);
    visit(api, "c").await;
    is(api, "b", "absent").await;
    visit(api, "a").await;
    is(api, "c", "absent").await;
    assert_eq!((loads(api, "a").await, loads(api, "b").await, loads(api, "c").await), ((1, 1), (1, 0), (1, 0)));
    let reasons = api.queue().await["history"].to_string();
    assert!(
        reasons.contains("stop c without parking it: its worker says that it cannot be: its weights are offloaded")
    );
    assert_eq!(parking_of("c").await["can"], false);
    assert!(parking_of("c").await["why"].as_str().unwrap().contains("offloaded"));
}
