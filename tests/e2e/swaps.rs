//! Which model holds the device, and how often that changes.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

use crate::common::{LIMIT, Site, beside, echo, echo_job, eventually, with};

/// Looks at a device's memory all the time: how many processes held some of it at once, at most.
struct DeviceWatch {
    most: Arc<AtomicUsize>,
    looks: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
}

impl DeviceWatch {
    fn start(device: PathBuf) -> Self {
        let watch = Self { most: Arc::default(), looks: Arc::default(), stop: Arc::default() };
        let (most, looks, stop) = (watch.most.clone(), watch.looks.clone(), watch.stop.clone());
        beside(async move {
            while !stop.load(Ordering::SeqCst) {
                most.fetch_max(holders(&device), Ordering::SeqCst);
                looks.fetch_add(1, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_millis(3)).await;
            }
        });
        watch
    }
}

impl Drop for DeviceWatch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
    }
}

fn holders(device: &Path) -> usize {
    let files = std::fs::read_dir(device).unwrap();
    files.filter(|file| file.as_ref().is_ok_and(|f| f.file_name().to_string_lossy().parse::<u32>().is_ok())).count()
}

#[tokio::test]
async fn sixty_interleaved_jobs_cost_two_swaps() {
    let site = Site::new();
    let mut args = site.whole_device();
    args.extend(["--load-s", "2", "--delay-ms", "50", "--steps", "1"].map(str::to_owned));
    let models = ["a", "b", "c"];
    let site = models
        .iter()
        .fold(site, |site, name| site.model(name, with(echo("custom", &args), json!({"startup_time": 2}))));
    let device = DeviceWatch::start(site.device());
    let server = site.start().await;
    let api = &server.api;

    let mut ids = Vec::new();
    // All are there before the first model has run dry, on a busy machine too.
    for n in 0..60 {
        ids.push(api.submit_echo(models[n % 3], json!({})).await);
    }
    for id in &ids {
        let job = api.succeeded(id).await;
        assert_eq!(job["attempt"], 1, "{job}");
    }

    let queue = eventually(LIMIT, "the queue's view has seen the last end", || async {
        let queue = api.queue().await;
        (queue["running"] == 0).then_some(queue)
    })
    .await;
    assert!(queue["swaps"].as_u64().unwrap() <= 3, "{queue}");
    assert!(queue["swaps"].as_u64().unwrap() >= 2, "three models had their turn: {queue}");
    assert_eq!(queue["swaps_in_arrival_order"], 59, "{queue}");
    assert_eq!(queue["queued"], 0, "{queue}");
    for decision in queue["history"].as_array().unwrap() {
        assert!(!decision["reason"].as_str().unwrap().is_empty(), "{decision}");
    }
    assert!(device.looks.load(Ordering::SeqCst) > 100);
    assert_eq!(device.most.load(Ordering::SeqCst), 1, "one model on the device at a time");
}

#[tokio::test]
async fn two_callers_in_turns_do_not_cost_a_swap_for_each_request() {
    let site = Site::new();
    let mut args = site.whole_device();
    args.extend(["--load-s", "4", "--delay-ms", "100"].map(str::to_owned));
    let site = ["a", "b"]
        .iter()
        .fold(site, |site, name| site.model(name, with(echo("text", &args), json!({"startup_time": 4}))));
    let server = site.start().await;
    // Each sends its next request when the last one is answered, without any think time.
    let caller = async |model: &str| {
        for _ in 0..8 {
            let body = json!({"model": model, "messages": [{"role": "user", "content": "hi"}]});
            server.api.following().post("/v1/chat/completions", &body).await.is(200);
        }
    };
    tokio::join!(caller("a"), caller("b"));
    let swaps = server.api.queue().await["swaps"].as_u64().unwrap();
    assert!((1..=6).contains(&swaps), "{swaps} swaps for 16 requests");
}

#[tokio::test]
async fn two_models_are_never_on_the_device_at_once() {
    let site = Site::new();
    let mut args = site.whole_device();
    // It frees the memory late, as drivers do, though not so late that a careful scheduler would be caught by it.
    args.extend(["--delay-ms", "20"].map(str::to_owned));
    let site = site.model("a", echo("custom", &args)).model("b", echo("image", &args));
    let device = DeviceWatch::start(site.device());
    let server = site.start().await;
    let api = &server.api;
    let image = json!({"endpoint": "/v1/images/generations", "body": {"model": "b", "prompt": "x"}});
    for _ in 0..3 {
        let first = api.submit_echo("a", json!({})).await;
        let second = api.submit(&image).await;
        api.succeeded(&first).await;
        api.succeeded(&second).await;
    }
    assert_eq!(device.most.load(Ordering::SeqCst), 1);
    // a; b, a; b, a; b: or better, if a model that is there already is asked first.
    let swaps = api.queue().await["swaps"].as_u64().unwrap();
    assert!((3..=5).contains(&swaps), "{swaps}");
    for model in ["a", "b"] {
        let log = server.worker_log(model);
        assert!(!log.is_empty() && !log.contains("out of memory"), "{model} found the device free: {log}");
    }
}

#[tokio::test]
async fn a_worker_that_ignores_sigterm_is_gone_within_its_grace_and_two_seconds() {
    let site = Site::new();
    let mut stubborn = site.whole_device();
    stubborn.push("--ignore-sigterm".to_owned());
    let polite = site.whole_device();
    let site = site
        .server("worker_grace", "1s")
        .model("stubborn", echo("custom", &stubborn))
        .model("polite", echo("custom", &polite));
    let server = site.start().await;
    let api = &server.api;
    let first = api.submit_echo("stubborn", json!({})).await;
    api.succeeded(&first).await;
    let worker = server.worker("stubborn").await;
    let started = Instant::now();
    let next = api.submit_echo("polite", json!({})).await;
    eventually(Duration::from_millis(3_500), "the stubborn worker is gone", || async {
        (!worker.is_alive()).then_some(())
    })
    .await;
    assert!(started.elapsed() >= Duration::from_millis(900), "it had its grace: {:?}", started.elapsed());
    api.succeeded(&next).await;
    assert!(server.worker_log("stubborn").contains("ignored stop.signal=SIGTERM"));
    assert!(!server.worker_log("polite").contains("out of memory"));
}

#[tokio::test]
async fn an_idle_model_leaves_after_its_ttl_and_comes_back() {
    let site = Site::new().model("a", with(echo("custom", &[] as &[&str]), json!({"idle_ttl": "300ms"})));
    let server = site.start().await;
    let api = &server.api;
    let first = api.submit_echo("a", json!({})).await;
    api.succeeded(&first).await;
    server.all_gone(Duration::from_secs(20)).await;
    eventually(Duration::from_secs(10), "it is absent", || async {
        (api.worker("a").await["state"] == "absent").then_some(())
    })
    .await;
    let second = api.submit_echo("a", json!({})).await;
    api.succeeded(&second).await;
    assert_eq!(api.queue().await["swaps"], 0, "a model that comes back to an empty device is no swap");
    assert_eq!(api.worker("a").await["starts"], 2);
}

#[tokio::test]
async fn preloaded_models_are_there_without_a_job() {
    let site = Site::new().model("a", with(echo("custom", &[] as &[&str]), json!({"preload": true})));
    let server = site.start().await;
    let state = eventually(Duration::from_secs(30), "it is resident", || async {
        let worker = server.api.worker("a").await;
        (worker["state"] == "resident").then_some(worker)
    })
    .await;
    assert_ne!(state["pid"], Value::Null, "{state}");
}

#[tokio::test]
async fn a_preloaded_model_whose_first_start_fails_is_loaded_all_the_same() {
    let preload = || with(echo("custom", &[""; 0]), json!({"preload": true, "memory": "1MiB"}));
    let site = Site::new();
    let mut once = preload();
    let script =
        format!(r#"if [ -e '{0}' ]; then exec "$@"; fi; : > '{0}'; exit 1"#, site.path().join("tried").display());
    let mut command = vec![json!("sh"), json!("-c"), json!(script), json!("sh")];
    command.extend(once["command"].as_array().unwrap().iter().cloned());
    once["command"] = json!(command);
    let server = site.model("a", preload()).model("b", once).start().await;
    for model in ["a", "b"] {
        eventually(LIMIT, &format!("{model} is resident"), || async {
            (server.api.worker(model).await["state"] == "resident").then_some(())
        })
        .await;
    }
    assert_eq!(server.api.worker("b").await["starts"], 2);
}

#[tokio::test]
async fn jobs_of_one_shape_share_a_run() {
    let args = ["--load-s", "1", "--delay-ms", "100", "--batch-wait-ms", "10000"];
    let site = Site::new().model("a", with(echo("custom", &args), json!({"max_batch": 8, "limit": 8})));
    let server = site.start().await;
    let api = &server.api;
    let ids = api.submit_together(vec![echo_job("a", json!({})); 8]).await;
    let other = api.submit(&json!({"endpoint": "/echo", "body": {"model": "a", "shape": 2}})).await;
    for id in &ids {
        api.succeeded(id).await;
        let answer = api.get(&format!("/v1/jobs/{id}/response")).await.is(200).json();
        assert_eq!(answer["pass_size"], 8, "{answer}");
    }
    api.succeeded(&other).await;
    let answer = api.get(&format!("/v1/jobs/{other}/response")).await.is(200).json();
    assert_eq!(answer["pass_size"], 1, "another shape is another pass: {answer}");
}

#[tokio::test]
async fn a_worker_takes_another_port_if_its_own_is_taken() {
    let entry = echo("custom", &[] as &[&str]);
    let port = u16::try_from(entry["port"].as_u64().unwrap()).unwrap();
    let stranger = std::net::TcpListener::bind(("127.0.0.1", port)).unwrap();
    let server = Site::new().model("a", entry).start().await;
    let id = server.api.submit_echo("a", json!({})).await;
    server.api.succeeded(&id).await;
    let worker = server.api.worker("a").await;
    assert_ne!(worker["port"], port, "{worker}");
    drop(stranger);
}
