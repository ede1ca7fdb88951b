//! Weights that are fetched before their model is loaded: the real fetcher, against a stand-in of the model hub that counts
//! what is asked of it.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::common::{Api, LIMIT, Proc, Server, Site, echo, echo_job, eventually, free_port, python, with, within};

/// Size of the file with weights, and the byte up to which the hub sends it until it is told to go on.
const BYTES: usize = 3_000_000;
const HELD_AT: usize = 1_000_000;

const CHAT: &str = "/v1/chat/completions";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A hub with the one repository `org/tiny`. Ends when dropped.
struct Hub {
    process: Child,
    url: String,
    log: PathBuf,
    released: PathBuf,
}

impl Hub {
    /// In `folder`; `flags`: faults to act out, and a port.
    fn start(folder: &Path, flags: &[&str]) -> Self {
        let repository = folder.join("hub/org/tiny");
        std::fs::create_dir_all(&repository).unwrap();
        std::fs::write(repository.join("config.json"), "{}").unwrap();
        let weights: Vec<u8> = (0..BYTES).map(|n| u8::try_from((n * 31 + n / 251) % 256).unwrap()).collect();
        std::fs::write(repository.join("model.safetensors"), weights).unwrap();
        let (log, released) = (folder.join("hub.log"), folder.join("go-on"));
        let mut process = Command::new(python(root()))
            .arg(root().join("scripts/lib/hub_standin.py"))
            .arg(folder.join("hub"))
            .arg("--log")
            .arg(&log)
            .args(["--hold", &format!("model.safetensors:{HELD_AT}:{}", released.display())])
            .args(flags)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            // Clients that are killed in the middle.
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut url = String::new();
        BufReader::new(process.stdout.as_mut().unwrap()).read_line(&mut url).unwrap();
        Self { process, url: url.trim().to_owned(), log, released }
    }

    /// From now on files are sent whole.
    fn go_on(&self) {
        std::fs::write(&self.released, "").unwrap();
    }

    /// What was asked for of the file with weights, one for each request: the range, or nothing.
    fn ranges(&self) -> Vec<Option<String>> {
        let range = |line: &Value| line["range"].as_str().map(str::to_owned);
        self.requests().iter().filter(|line| line["path"] == "/cdn/org/tiny/model.safetensors").map(range).collect()
    }

    fn requests(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A model of this site whose weights come from the hub, on the one GPU of the box.
fn from_hub() -> Value {
    let mut entry = with(echo("custom", &[] as &[&str]), json!({"gpus": 1, "model": "org/tiny", "endpoints": [CHAT]}));
    entry.as_object_mut().unwrap().remove("command");
    let script = root().join("models/echo/server.py").display().to_string();
    with(entry, json!({"service_script": script, "python": python(root())}))
}

fn site(hub: &Hub, site: Site) -> Site {
    let cache = site.path().join("cache").display().to_string();
    site.model("hub", from_hub())
        .model("here", with(echo("custom", &[] as &[&str]), json!({"gpus": 1})))
        .env("ROUNDHOUSE_FAKE_GPUS", "1x80GiB")
        .env("HF_HUB_CACHE", &cache)
        .env("HF_ENDPOINT", &hub.url)
        .env("HF_TOKEN", "of-the-server")
}

/// Somebody on the line.
fn call() -> Value {
    json!({"model": "hub", "messages": [{"role": "user", "content": "hi"}]})
}

async fn model(api: &Api, name: &str) -> Value {
    api.get(&format!("/v1/models/{name}")).await.is(200).json()["roundhouse"].clone()
}

/// The fetch as `/v1/models` shows it, once the hub has sent what it sends before it is told to go on.
async fn held(api: &Api) -> Value {
    eventually(LIMIT, "the fetch has come as far as it may", || async {
        let fetch = model(api, "hub").await["fetch"].clone();
        (fetch["bytes"].as_u64()? >= HELD_AT as u64).then_some(fetch)
    })
    .await
}

async fn degraded(api: &Api) -> Value {
    api.get("/readyz").await.is(200).json()["degraded"].clone()
}

async fn fetcher(server: &Server) -> Proc {
    let is_fetcher = |found: &Proc| found.command.get(2).is_some_and(|word| word == "roundhouse_worker.fetch");
    eventually(LIMIT, "a fetcher", || async { server.processes().into_iter().find(is_fetcher) }).await
}

#[tokio::test]
async fn a_fetch_is_shown_holds_no_gpu_and_goes_on_after_its_process_is_killed() {
    let site_dir = Site::new();
    let hub = Hub::start(site_dir.path(), &[]);
    let site = site(&hub, site_dir);
    let server = site.start().await;
    let api = &server.api;
    assert_eq!(model(api, "hub").await["fetch"], Value::Null, "nobody wants it");
    let waiting = api.submit_echo("hub", json!({})).await;

    let fetch = held(api).await;
    assert_eq!((&fetch["phase"], &fetch["total_bytes"]), (&json!("fetching"), &json!(BYTES + 2)), "{fetch}");
    assert!((33.0..34.0).contains(&fetch["percent"].as_f64().unwrap()), "{fetch}");
    assert_eq!(model(api, "hub").await["state"], "fetching");
    let worker = api.worker("hub").await;
    assert_eq!(
        (&worker["state"], &worker["phase"], &worker["pid"]),
        (&json!("fetching"), &json!("fetching"), &Value::Null)
    );
    assert!(worker["percent"].as_f64().unwrap() > 33.0, "{worker}");
    let job = api.job(&waiting).await;
    let shown = (&job["state"], &job["state_reason"], &job["model_state"]);
    assert_eq!(shown, (&json!("queued"), &json!("model_fetching"), &json!("fetching")), "{job}");
    let reason = job["queue"]["reason"].as_str().unwrap();
    assert!(reason.contains("its weights are being fetched: 0.00 of 0.00 GB (33 %)"), "{reason}");
    assert_eq!(api.get("/readyz").await.is(200).json()["degraded"], json!([]), "this is no trouble");

    // The GPU is free for others.
    let other = api.submit_echo("here", json!({})).await;
    assert_eq!(api.succeeded(&other).await["attempt"], 1);
    assert_eq!(api.job(&waiting).await["state_reason"], "model_fetching");

    fetcher(&server).await.signal(Signal::SIGKILL);
    eventually(LIMIT, "the hub is asked for the rest", || async { (hub.ranges().len() == 2).then_some(()) }).await;
    hub.go_on();
    let job = api.succeeded(&waiting).await;
    assert_eq!((&job["attempt"], &job["failures"], &job["crashes"]), (&json!(1), &json!(0), &json!(0)), "{job}");
    assert_eq!(hub.ranges(), [None, Some(format!("bytes={HELD_AT}-"))], "no byte comes twice");
    let worker = api.worker("hub").await;
    assert_eq!((&worker["failed_loads"], &worker["starts"]), (&json!(0), &json!(1)), "{worker}");
    assert_eq!(model(api, "hub").await["fetch"], Value::Null);
    let metrics = api.get("/metrics").await.is(200).text();
    assert!(!metrics.contains("failed_loads_total{model=\"hub\"} 1"), "{metrics}");

    // The token went to the hub, and to nobody else.
    assert!(hub.requests().iter().any(|line| line["token"] == true));
    let environ = std::fs::read(format!("/proc/{}/environ", server.worker("hub").await.pid)).unwrap();
    assert!(!String::from_utf8_lossy(&environ).contains("of-the-server"));
}

#[tokio::test]
async fn a_killed_guard_takes_its_fetcher_along_and_the_fetch_goes_on() {
    let site_dir = Site::new();
    let hub = Hub::start(site_dir.path(), &[]);
    let server = site(&hub, site_dir).start().await;
    let waiting = server.api.submit_echo("hub", json!({})).await;
    held(&server.api).await;
    let orphan = fetcher(&server).await;
    let guard = server.processes().into_iter().find(|found| found.command.get(1).is_some_and(|word| word == "guard"));
    guard.expect("its guard").signal(Signal::SIGKILL);
    eventually(LIMIT, "the hub is asked for the rest", || async { (hub.ranges().len() == 2).then_some(()) }).await;
    assert_ne!(fetcher(&server).await.pid, orphan.pid);
    hub.go_on();
    let job = server.api.succeeded(&waiting).await;
    assert_eq!((&job["attempt"], &job["failures"], &job["crashes"]), (&json!(1), &json!(0), &json!(0)), "{job}");
    assert_eq!(hub.ranges(), [None, Some(format!("bytes={HELD_AT}-"))], "no byte comes twice");
}

#[tokio::test]
async fn a_stopped_fetcher_is_told_until_it_speaks_again() {
    let site_dir = Site::new();
    let hub = Hub::start(site_dir.path(), &[]);
    let site = site(&hub, site_dir);
    let server = site.start().await;
    let waiting = server.api.submit_echo("hub", json!({})).await;
    held(&server.api).await;
    let process = fetcher(&server).await;
    process.signal(Signal::SIGSTOP);
    let is_silent = |fetch: &Value| fetch["reason"].as_str().is_some_and(|reason| reason.contains("has said nothing"));
    let told = eventually(LIMIT, "it is told", || async {
        let fetch = model(&server.api, "hub").await["fetch"].clone();
        is_silent(&fetch).then_some(fetch)
    })
    .await;
    assert_eq!((&told["bytes_per_s"], &told["eta_s"]), (&json!(0.0), &Value::Null), "{told}");
    assert!(server.log().contains("the fetcher of its weights says nothing"));
    process.signal(Signal::SIGCONT);
    hub.go_on();
    server.api.succeeded(&waiting).await;
    assert_eq!(hub.ranges(), [None], "it was not started again");
    assert!(server.log().contains("its weights are fetched"), "{}", server.log());
}

#[tokio::test]
async fn a_fetch_goes_on_after_the_server_is_killed_and_is_not_made_again() {
    let site_dir = Site::new();
    let hub = Hub::start(site_dir.path(), &[]);
    let site = site(&hub, site_dir);
    let mut server = site.start().await;
    let waiting = server.api.submit_echo("hub", json!({})).await;
    held(&server.api).await;
    server.kill();
    server.all_gone(LIMIT).await;

    // Again, by a stop in order: it does not wait for the fetch.
    let mut server = site.start().await;
    let fetch = held(&server.api).await;
    assert_eq!(fetch["phase"], "fetching", "{fetch}");
    eventually(LIMIT, "the hub is asked for the rest", || async { (hub.ranges().len() == 2).then_some(()) }).await;
    server.signal(Signal::SIGTERM);
    assert!(server.ended().await.success());
    assert!(server.processes().is_empty());

    let mut server = site.start().await;
    held(&server.api).await;
    hub.go_on();
    server.api.succeeded(&waiting).await;
    let rest = Some(format!("bytes={HELD_AT}-"));
    assert_eq!(hub.ranges(), [None, rest.clone(), rest], "no byte comes twice");
    let asked = hub.requests().len();
    server.kill();
    server.all_gone(LIMIT).await;

    // All is here: the hub is not even asked.
    let server = site.start().await;
    let job = server.api.submit_echo("hub", json!({})).await;
    server.api.succeeded(&job).await;
    assert_eq!(hub.requests().len(), asked);
}

#[tokio::test]
async fn a_fetch_is_ended_by_hand_and_goes_on_where_it_was_when_the_model_is_wanted() {
    let site_dir = Site::new();
    let hub = Hub::start(site_dir.path(), &[]);
    let server = site(&hub, site_dir).start().await;
    let api = &server.api;
    api.post("/v1/models/hub/load", &json!({})).await.is(200);
    held(api).await;
    let process = fetcher(&server).await;
    let shown = api.post("/v1/models/hub/unload", &json!({})).await.is(200).json()["roundhouse"].clone();
    assert_eq!((&shown["state"], &shown["fetch"], &shown["trouble"]), (&json!("absent"), &Value::Null, &Value::Null));
    eventually(LIMIT, "no fetcher", || async {
        (!server.processes().iter().any(|found| found.pid == process.pid)).then_some(())
    })
    .await;
    let said = api.get("/v1/queue/decisions?model=hub").await.is(200).json();
    let reason = said["data"][0]["reason"].as_str().unwrap();
    assert!(reason.contains("was ended by hand at 0.00 of 0.00 GB (33 %)"), "{reason}");

    let waiting = api.submit_echo("hub", json!({})).await;
    let rest = Some(format!("bytes={HELD_AT}-"));
    eventually(LIMIT, "the hub is asked for the rest", || async { (hub.ranges().len() == 2).then_some(()) }).await;
    // Who waits brings it back at once.
    held(api).await;
    api.post("/v1/models/hub/unload", &json!({})).await.is(200);
    eventually(LIMIT, "the hub is asked once more", || async { (hub.ranges().len() == 3).then_some(()) }).await;
    hub.go_on();
    let job = api.succeeded(&waiting).await;
    assert_eq!((&job["attempt"], &job["failures"]), (&json!(1), &json!(0)), "{job}");
    assert_eq!(hub.ranges(), [None, rest.clone(), rest], "no byte comes twice");
}

#[tokio::test]
async fn an_edit_that_is_no_concern_of_the_weights_leaves_their_fetch_alone() {
    let site_dir = Site::new();
    let hub = Hub::start(site_dir.path(), &[]);
    let site = site(&hub, site_dir);
    let server = site.start().await;
    let waiting = server.api.submit_echo("hub", json!({})).await;
    held(&server.api).await;
    let before = fetcher(&server).await;
    let requests = hub.requests().len();
    site.model("hub", with(from_hub(), json!({"memory": "8GiB", "args": ["--delay-ms", "1"]}))).write();
    eventually(LIMIT, "the edit is in force", || async {
        server.log().contains("models.yaml was edited: it is in force").then_some(())
    })
    .await;
    // Of a fetch that was begun anew the hub is asked at once.
    held(&server.api).await;
    assert_eq!(fetcher(&server).await.pid, before.pid);
    hub.go_on();
    server.api.succeeded(&waiting).await;
    assert_eq!((hub.ranges(), hub.requests().len()), (vec![None], requests), "no byte comes twice");
}

#[tokio::test]
async fn a_fetch_outlives_its_hub() {
    let port = free_port().to_string();
    let site_dir = Site::new();
    let hub = Hub::start(site_dir.path(), &["--port", &port]);
    let site = site(&hub, site_dir);
    let server = site.start().await;
    let waiting = server.api.submit_echo("hub", json!({})).await;
    held(&server.api).await;
    drop(hub);
    let hub = Hub::start(site.path(), &["--port", &port]);
    hub.go_on();
    server.api.succeeded(&waiting).await;
    assert_eq!(hub.ranges(), [None, Some(format!("bytes={HELD_AT}-"))], "no byte comes twice");
}

#[tokio::test]
async fn a_hub_that_cannot_be_reached_is_named_while_it_is_tried_again() {
    let port = free_port().to_string();
    let site_dir = Site::new();
    let hub = Hub::start(site_dir.path(), &["--port", &port]);
    let (site, url) = (site(&hub, site_dir), hub.url.clone());
    drop(hub);
    let server = site.start().await;
    let waiting = server.api.submit_echo("hub", json!({})).await;
    let told = eventually(LIMIT, "what is wrong", || async {
        let fetch = model(&server.api, "hub").await["fetch"].clone();
        fetch["reason"].is_string().then_some(fetch)
    })
    .await;
    assert_eq!(told["phase"], "listing", "{told}");
    assert!(told["reason"].as_str().unwrap().starts_with(&format!("cannot reach the hub, {url}: ")), "{told}");
    let reason = server.api.job(&waiting).await["queue"]["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains("last trouble: cannot reach the hub"), "{reason}");
    let hub = Hub::start(site.path(), &["--port", &port]);
    hub.go_on();
    server.api.succeeded(&waiting).await;
}

#[tokio::test]
async fn a_hub_that_cannot_be_reached_is_listed_from_the_first_try_until_it_is_back() {
    let port = free_port().to_string();
    let site_dir = Site::new();
    let hub = Hub::start(site_dir.path(), &["--port", &port]);
    let (site, url) = (site(&hub, site_dir), hub.url.clone());
    drop(hub);
    let server = site.start().await;
    let api = &server.api;
    let body = call();
    let caller = api.post(CHAT, &body);
    let why = format!("the last try to fetch its weights failed: cannot reach the hub, {url}: ");
    let is_told = |told: &Value| told.as_str().is_some_and(|told| told.starts_with(&why));
    let while_it_waits = async {
        let fetch = eventually(LIMIT, "it is listed", || async {
            let listed = degraded(api).await;
            (is_told(&listed[0]["reason"]) && listed[0]["state"] == "fetching").then_some(())?;
            Some(model(api, "hub").await)
        });
        fetch.await
    };
    let (reply, seen) = tokio::join!(caller, while_it_waits);
    assert!(is_told(&seen["last_failure"]), "{seen}");
    let reply = reply.refused(503, "model_load_failed").json();
    let words = "its weights cannot be fetched: cannot reach the hub";
    assert!(reply["error"]["message"].as_str().unwrap().contains(words), "{reply}");
    eventually(LIMIT, "nobody wants it", || async { (model(api, "hub").await["state"] == "absent").then_some(()) })
        .await;
    assert!(is_told(&model(api, "hub").await["last_failure"]));
    assert!(is_told(&degraded(api).await[0]["reason"]));

    let hub = Hub::start(site.path(), &["--port", &port]);
    hub.go_on();
    let waiting = api.submit_echo("hub", json!({})).await;
    api.succeeded(&waiting).await;
    assert_eq!((model(api, "hub").await["last_failure"].clone(), degraded(api).await), (Value::Null, json!([])));
}

#[tokio::test]
async fn a_model_without_access_fails_alone_and_is_tried_again_when_asked() {
    let site_dir = Site::new();
    let hub = Hub::start(site_dir.path(), &["--token", "another"]);
    hub.go_on();
    let site = site(&hub, site_dir).server("backoff_first", "1h").server("backoff_max", "1h");
    let server = site.start().await;
    let api = &server.api;
    let reply = api.post(CHAT, &call()).await.refused(503, "model_load_failed");
    let message = reply.json()["error"]["message"].as_str().unwrap().to_owned();
    for part in ["HTTP 403", "https://huggingface.co/org/tiny", "HF_TOKEN", "(gated)"] {
        assert!(message.contains(part), "{part}: {message}");
    }
    // The next caller does not wait for another try; a job does.
    let waiting = api.submit(&echo_job("hub", json!({}))).await;
    api.post(CHAT, &call()).await.refused(503, "model_load_failed");
    // A caller is refused a moment before the same is shown.
    let job = eventually(LIMIT, "it is shown", || async {
        Some(api.job(&waiting).await).filter(|job| job["state_reason"] == "model_blocked")
    })
    .await;
    assert_eq!(job["state"], "queued", "{job}");
    assert!(job["queue"]["reason"].as_str().unwrap().contains("HTTP 403"), "{job}");
    let seen = model(api, "hub").await;
    assert_eq!((&seen["state"], &seen["fetch"]["phase"]), (&json!("backoff"), &json!("failed")), "{seen}");
    let worker = api.worker("hub").await;
    assert_eq!(
        (&worker["state"], &worker["failed_loads"], &worker["starts"]),
        (&json!("backoff"), &json!(0), &json!(0))
    );
    assert!(worker["reason"].as_str().unwrap().contains("HTTP 403"), "{worker}");
    let (listed, why) = (degraded(api).await, "its weights cannot be fetched: HTTP 403");
    assert!(listed[0]["reason"].as_str().unwrap().starts_with(why), "{listed}");
    let other = api.submit_echo("here", json!({})).await;
    api.succeeded(&other).await;

    let asked = hub.requests().len();
    api.post("/v1/models/hub/retry", &json!({})).await.is(200);
    eventually(LIMIT, "the hub is asked again", || async { (hub.requests().len() > asked).then_some(()) }).await;
    assert_eq!(api.job(&waiting).await["state"], "queued");
}

#[tokio::test]
async fn a_disk_that_is_too_small_is_told_before_a_byte_comes() {
    let site_dir = Site::new();
    let hub = Hub::start(site_dir.path(), &["--claim", "model.safetensors:10000000000000000"]);
    let site = site(&hub, site_dir);
    let server = site.start().await;
    let reply = server.api.post(CHAT, &call()).await.refused(503, "model_load_failed");
    let message = reply.json()["error"]["message"].as_str().unwrap().to_owned();
    assert!(message.contains("are free (insufficient_space)") && message.contains(" needs "), "{message}");
    assert!(hub.ranges().is_empty());
}

#[tokio::test]
async fn a_fetch_by_hand_waits_for_the_servers_and_gets_nothing_again() {
    let site_dir = Site::new();
    let hub = Hub::start(site_dir.path(), &[]);
    let site = site(&hub, site_dir).model("twin", from_hub());
    let server = site.start().await;
    let waiting = server.api.submit_echo("hub", json!({})).await;
    held(&server.api).await;
    // Nor does another model of the same weights.
    let twin = server.api.submit_echo("twin", json!({})).await;
    let phase = || async { model(&server.api, "twin").await["fetch"]["phase"].as_str().map(str::to_owned) };
    assert_eq!(eventually(LIMIT, "one at a time", phase).await, "waiting");
    let mut by_hand = Command::new(env!("CARGO_BIN_EXE_roundhouse"))
        .args(["models", "fetch", "hub", "--config"])
        .arg(site.path().join("models.yaml"))
        .env("HF_HUB_CACHE", site.path().join("cache"))
        .env("HF_ENDPOINT", &hub.url)
        .env("HF_TOKEN", "of-a-person")
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(by_hand.stderr.take().unwrap()).lines().map_while(Result::ok);
    let waits =
        tokio::task::spawn_blocking(move || said.find(|line| line.contains("another fetch is at work")).map(|_| said));
    let said = within(LIMIT, "it says that it waits", waits).await.unwrap().expect("it waits");
    hub.go_on();
    server.api.succeeded(&waiting).await;
    server.api.succeeded(&twin).await;
    let ends = tokio::task::spawn_blocking(move || (said.last(), by_hand.wait().unwrap()));
    let (last, status) = within(LIMIT, "it ends", ends).await.unwrap();
    assert!(status.success(), "{last:?}");
    assert!(last.unwrap().starts_with("hub: done, revision "));
    assert_eq!(hub.ranges(), [None], "no byte comes twice");
}

#[tokio::test]
async fn a_script_whose_environment_has_no_fetcher_is_loaded_as_it_is() {
    let site_dir = Site::new();
    let hub = Hub::start(site_dir.path(), &[]);
    let without = site_dir.path().join("without");
    std::fs::create_dir(&without).unwrap();
    let missing = "raise ModuleNotFoundError(\"No module named 'huggingface_hub'\")\n";
    std::fs::write(without.join("huggingface_hub.py"), missing).unwrap();
    let server = site(&hub, site_dir).env("PYTHONPATH", &without.display().to_string()).start().await;
    let job = server.api.submit_echo("hub", json!({})).await;
    server.api.succeeded(&job).await;
    assert!(hub.requests().is_empty());
    let log = server.log();
    assert!(log.contains("No module named") && log.contains("it is loaded as it is"), "{log}");
}
