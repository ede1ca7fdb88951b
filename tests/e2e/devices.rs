//! Boxes with several GPUs, which `ROUNDHOUSE_FAKE_GPUS` plays: who is loaded where, who shares, who waits, and what happens
//! when a GPU vanishes. An echo worker tells in its answers what `CUDA_VISIBLE_DEVICES` it was given.

use std::collections::BTreeSet;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::common::{Api, LIMIT, Server, Site, echo, echo_job, eventually, with};

const GIB: u64 = 1 << 30;

/// An echo model on this many GPUs.
fn on_gpus(gpus: u32, args: &[&str]) -> Value {
    with(echo("custom", args), json!({"gpus": gpus}))
}

/// One that tells that it takes so many GiB.
fn taking(gib: u64) -> Value {
    on_gpus(1, &["--device-bytes", &(gib * GIB).to_string()])
}

async fn answer(api: &Api, id: &str) -> Value {
    api.succeeded(id).await;
    api.get(&format!("/v1/jobs/{id}/response")).await.is(200).json()
}

/// The GPUs that a worker of this model saw, which has just answered.
async fn gpus_of(api: &Api, model: &str) -> String {
    let id = api.submit_echo(model, json!({})).await;
    answer(api, &id).await["gpus"].as_str().unwrap().to_owned()
}

async fn workers(api: &Api) -> Vec<Value> {
    api.get("/v1/workers").await.is(200).json()["data"].as_array().unwrap().clone()
}

/// Names of the models that are loaded now.
async fn residents(api: &Api) -> BTreeSet<String> {
    let loaded = workers(api).await.into_iter().filter(|worker| worker["state"] == "resident");
    loaded.map(|worker| worker["model"].as_str().unwrap().to_owned()).collect()
}

fn names(all: &[&str]) -> BTreeSet<String> {
    all.iter().map(|name| (*name).to_owned()).collect()
}

#[tokio::test]
async fn four_models_run_at_once_each_on_a_gpu_of_its_own_and_one_on_the_cpu() {
    let site = ["a", "b", "c", "d"].iter().fold(Site::new(), |site, name| site.model(name, on_gpus(1, &[])));
    let site = site.model("cpu", echo("custom", &[] as &[&str])).env("ROUNDHOUSE_FAKE_GPUS", "4x80GiB");
    let server = site.start().await;
    let api = &server.api;
    let ids = api.submit_together(["a", "b", "c", "d", "cpu"].map(|name| echo_job(name, json!({}))).to_vec()).await;
    let mut seen = Vec::new();
    for id in &ids {
        seen.push(answer(api, id).await["gpus"].as_str().unwrap().to_owned());
    }
    assert_eq!(seen.pop().unwrap(), "", "a model on the CPU sees no GPU");
    assert_eq!(seen.iter().map(String::as_str).collect::<BTreeSet<_>>(), ["0", "1", "2", "3"].into(), "{seen:?}");
    assert_eq!(residents(api).await, names(&["a", "b", "c", "d", "cpu"]));
    let worker = api.worker("a").await;
    assert_eq!(
        (&worker["replica"], &worker["gpus"]),
        (&json!(0), &json!([seen[0].parse::<u32>().unwrap()])),
        "{worker}"
    );
    assert_eq!(api.worker("cpu").await["gpus"], json!([]));
    assert_eq!(api.queue().await["swaps"], 0);
}

#[tokio::test]
async fn a_model_on_four_gpus_waits_for_what_runs_on_them_and_then_has_them_all() {
    let site = Site::new()
        .model("big", on_gpus(4, &[]))
        .model("pair", on_gpus(2, &[]))
        .model("small", on_gpus(1, &[]))
        .env("ROUNDHOUSE_FAKE_GPUS", "4x80GiB");
    let server = site.start().await;
    let api = &server.api;
    let pair = gpus_of(api, "pair").await;
    assert!(["0,1", "2,3"].contains(&pair.as_str()), "an aligned set, not {pair}");
    let running = api.submit_echo("small", json!({"delay_ms": 1500, "steps": 30})).await;
    api.happened(&running, "job.progress").await;
    let big = api.submit_echo("big", json!({})).await;
    assert_eq!(answer(api, &big).await["gpus"], "0,1,2,3");
    let small = api.job(&running).await;
    assert_eq!((&small["state"], &small["attempt"]), (&json!("succeeded"), &json!(1)), "{small}");
    assert_eq!(residents(api).await, names(&["big"]));
    // And back: both fit again.
    assert_eq!(gpus_of(api, "pair").await.len(), 3);
    assert_eq!(gpus_of(api, "small").await.len(), 1);
    assert_eq!(residents(api).await, names(&["pair", "small"]));
}

#[tokio::test]
async fn models_share_a_gpu_when_their_memory_fits() {
    let declared = |gib: u64| with(taking(gib), json!({"memory": format!("{gib}GiB")}));
    let site = Site::new()
        .model("a", declared(30))
        .model("b", declared(50))
        .model("learned", taking(20))
        .env("ROUNDHOUSE_FAKE_GPUS", "1x80GiB");
    let server = site.start().await;
    let api = &server.api;
    for model in ["a", "b"] {
        assert_eq!(gpus_of(api, model).await, "0");
    }
    assert_eq!(residents(api).await, names(&["a", "b"]));
    assert_eq!(api.queue().await["swaps"], 0, "they stand side by side");
    // Nobody knows yet what it takes: it gets the whole GPU, and tells.
    gpus_of(api, "learned").await;
    assert_eq!(residents(api).await, names(&["learned"]));
    gpus_of(api, "b").await;
    assert_eq!(residents(api).await, names(&["b", "learned"]));
    // 20 + 50 + 30 GiB are too much: somebody leaves, and no more than that.
    gpus_of(api, "a").await;
    let all = residents(api).await;
    assert!(all.contains("a") && all.len() == 2, "{all:?}");
    for worker in workers(api).await {
        assert_eq!(worker["failed_loads"], 0, "{worker}");
    }
}

#[tokio::test]
async fn what_a_model_took_is_remembered_and_says_nothing_about_a_smaller_gpu() {
    let site = |gpus: &str, site: Site| site.env("ROUNDHOUSE_FAKE_GPUS", gpus).server("worker_grace", "1s");
    let box_of = site("1x80GiB", Site::new().model("a", taking(30)).model("b", taking(40)));
    let mut server = box_of.start().await;
    for model in ["a", "b"] {
        gpus_of(&server.api, model).await;
    }
    assert_eq!(residents(&server.api).await, names(&["b"]), "until it has told, a model has the GPU to itself");
    server.kill();
    server.forget_processes();
    let mut server = box_of.start().await;
    for model in ["a", "b"] {
        gpus_of(&server.api, model).await;
    }
    assert_eq!(residents(&server.api).await, names(&["a", "b"]), "it is known that both fit");
    server.kill();
    server.forget_processes();
    // The same data dir on another box: `b` cannot take 40 GiB there.
    let server = site("1x35GiB", box_of).start().await;
    for model in ["b", "a"] {
        gpus_of(&server.api, model).await;
    }
}

async fn two_replicas(args: &[&str]) -> (Site, Server) {
    let model = with(on_gpus(1, args), json!({"max_replicas": 2}));
    let site = Site::new().model("r", model).env("ROUNDHOUSE_FAKE_GPUS", "2x80GiB");
    let server = site.start().await;
    (site, server)
}

#[tokio::test]
async fn a_backlog_gets_a_second_worker_and_both_answer() {
    let (_site, server) = two_replicas(&["--delay-ms", "200"]).await;
    let api = &server.api;
    let ids = api.submit_together(vec![echo_job("r", json!({})); 40]).await;
    let mut seen = BTreeSet::new();
    for id in &ids {
        let answer = answer(api, id).await;
        seen.insert((answer["gpus"].as_str().unwrap().to_owned(), answer["pid"].as_i64().unwrap()));
    }
    let gpus: Vec<&str> = seen.iter().map(|(gpus, _)| gpus.as_str()).collect();
    assert_eq!(gpus, ["0", "1"], "one worker on each GPU: {seen:?}");
    let mut numbers: Vec<u64> = workers(api).await.iter().map(|worker| worker["replica"].as_u64().unwrap()).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, [0, 1]);
    let log = server.worker_log("r+1");
    assert!(!log.is_empty() && !server.worker_log("r").is_empty(), "each has a log of its own");
}

#[tokio::test]
async fn a_replica_that_is_killed_takes_no_job_and_no_neighbour_along() {
    let (_site, server) = two_replicas(&["--delay-ms", "400", "--steps", "20"]).await;
    let api = &server.api;
    let ids = api.submit_together(vec![echo_job("r", json!({})); 30]).await;
    let both = eventually(LIMIT, "two workers", || async {
        let all: Vec<_> = server.processes().into_iter().filter(|found| found.serves("r")).collect();
        let ready = workers(api).await.iter().all(|worker| worker["state"] == "resident");
        (ready && all.len() == 2).then_some(all)
    })
    .await;
    both[0].signal(Signal::SIGKILL);
    for id in &ids {
        let job = api.succeeded(id).await;
        assert_eq!(job["failures"], 0, "{job}");
    }
    assert!(both[1].is_alive(), "the other one goes on");
    let starts: Vec<u64> = workers(api).await.iter().map(|worker| worker["starts"].as_u64().unwrap()).collect();
    assert!(starts.contains(&1), "{starts:?}");
}

#[tokio::test]
async fn a_gpu_that_vanishes_blocks_those_who_need_it_and_charges_nobody() {
    let site = Site::new().model("pair", on_gpus(2, &[])).model("solo", on_gpus(1, &[]));
    let gpus = site.path().join("gpus");
    let show = |text: &str| {
        let fresh = gpus.with_extension("new");
        std::fs::write(&fresh, text).unwrap();
        std::fs::rename(&fresh, &gpus).unwrap();
    };
    show("3x80GiB");
    let server = site.env("ROUNDHOUSE_FAKE_GPUS", &format!("@{}", gpus.display())).start().await;
    let api = &server.api;
    assert_eq!(gpus_of(api, "pair").await, "0,1");
    assert_eq!(gpus_of(api, "solo").await, "2");
    let solo = server.worker("solo").await;
    let running = api.submit_echo("pair", json!({"delay_ms": 60_000, "steps": 600})).await;
    api.happened(&running, "job.progress").await;

    show("3x80GiB without 1");
    let waits = || async {
        let job = api.job(&running).await;
        (job["state_reason"] == "no_gpu").then_some(job)
    };
    let job = eventually(LIMIT, "it waits for the GPU", waits).await;
    assert_eq!((&job["state"], &job["attempt"]), (&json!("queued"), &json!(1)), "{job}");
    assert_eq!((&job["failures"], &job["crashes"]), (&json!(0), &json!(0)), "{job}");
    let ready = api.get("/readyz").await.is(200).json();
    assert!(ready["degraded"].to_string().contains("needs 2 GPUs side by side"), "{ready}");
    assert_eq!(gpus_of(api, "solo").await, "2", "others go on");
    assert!(solo.is_alive());

    show("3x80GiB");
    // It goes on by itself, and dies with its worker when the GPU goes before anybody has looked: no reason to blame it.
    eventually(LIMIT, "it runs again", || async { (api.job(&running).await["attempt"] == 2).then_some(()) }).await;
    let worker = server.worker("pair").await;
    show("3x80GiB without 0");
    worker.signal(Signal::SIGKILL);
    let job = eventually(LIMIT, "it waits again", waits).await;
    assert_eq!((&job["failures"], &job["crashes"]), (&json!(0), &json!(0)), "{job}");
    api.poke(&format!("/v1/jobs/{running}/cancel")).await;
    let other = api.submit_echo("pair", json!({})).await;
    show("3x80GiB");
    assert_eq!(answer(api, &other).await["gpus"], "0,1");
    assert!(solo.is_alive());
}
