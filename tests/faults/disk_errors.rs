//! Writes and syncs that fail, a disk that is full or turns read-only, a disk that is slow: no promise is broken, the
//! process ends or refuses clearly, and the next start recovers.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;

use super::common::{LIMIT, Site, echo, eventually, within};
use super::engine::Engine;
use super::ledger::Ledger;
use super::shim::{self, Fault};
use super::workload::{self, Manners};

const DIR: &str = "ROUNDHOUSE_TEST_ERRORS_DIR";
const ROUNDS: usize = 2;

/// What the failing process does: not a test of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_failing_process() {
    let Ok(dir) = std::env::var(DIR) else { return };
    workload::run(Path::new(&dir), ROUNDS, true, Manners::Honest).await.expect("the work is done");
}

/// Runs the process with a fault from its start, and looks at what it left. Says whether it got to its end.
async fn run(what: &str, only: &'static str) -> bool {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().canonicalize().unwrap().join("data");
    std::fs::create_dir(&data).unwrap();
    let armed = dir.path().join("armed");
    std::fs::write(&armed, "").unwrap();
    let fault = Fault { what: what.to_owned(), only };
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "disk_errors::the_failing_process", "--nocapture"])
        .env(DIR, &data)
        .envs(shim::failing(&data, &fault, &armed))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let mut ledger = Ledger::default();
    ledger.read(&String::from_utf8_lossy(&output.stdout));
    let engine = Engine::open(&data, true, Arc::new(|_| {})).await;
    let engine = engine.unwrap_or_else(|error| panic!("{what} {only}: the next start fails: {error}"));
    let broken = ledger.broken_promises(&engine, 1).await;
    assert!(broken.is_empty(), "{what} {only}: {broken:?}");
    assert!(ledger.has_ended() == output.status.success(), "{what} {only}: {output:?}");
    ledger.has_ended()
}

#[tokio::test]
async fn a_failing_disk_breaks_no_promise() {
    let mut ended_early = 0;
    for (what, only) in [
        ("write-eio:40", ""),
        ("write-eio:90", "-wal"),
        ("write-eio:3", "roundhouse.db"),
        ("write-eio:2", ".json#1"),
        ("sync-eio:9", ""),
        ("sync-eio:12", "-wal"),
        ("sync-eio:2", "roundhouse.db"),
        ("sync-eio:2", ".json#1"),
        ("short:30", ""),
        ("short:25", "-wal"),
        ("enospc:300000", ""),
        ("enospc:600000", ""),
        ("erofs:60", ""),
        ("erofs:150", ""),
    ] {
        ended_early += u32::from(!run(what, only).await);
    }
    assert!(ended_early >= 8, "the faults were felt {ended_early} times");
}

#[tokio::test]
async fn a_slow_disk_only_takes_longer() {
    assert!(run("slow-sync:20", "").await, "everything was done");
}

/// A server with a fault that can be switched on.
struct Switched {
    site: Site,
    arm: std::path::PathBuf,
}

impl Switched {
    fn new(what: &str, only: &'static str) -> Self {
        let mut site = Site::new()
            .model("echo", echo("text", &[] as &[&str]))
            .storage("free_min", "0MiB")
            .storage("reserve", "0MiB");
        let data = site.path().canonicalize().unwrap().join("data");
        let arm = site.path().join("armed");
        for (name, value) in shim::failing(&data, &Fault { what: what.to_owned(), only }, &arm) {
            site = site.env(&name, &value);
        }
        Self { site, arm }
    }

    fn on(&self) {
        std::fs::write(&self.arm, "").unwrap();
    }

    fn off(&self) {
        std::fs::remove_file(&self.arm).unwrap();
    }
}

fn chat(text: &str) -> serde_json::Value {
    let body = json!({"model": "echo", "messages": [{"role": "user", "content": text}]});
    json!({"endpoint": "/v1/chat/completions", "body": body})
}

#[tokio::test]
async fn after_a_failed_fsync_nothing_is_acknowledged_and_the_server_stops_and_recovers() {
    let switched = Switched::new("sync-eio:1:1000000", "-wal");
    let mut server = switched.site.start().await;
    let kept = server.api.submit(&chat("kept")).await;
    server.api.succeeded(&kept).await;
    switched.on();
    let body = chat("never promised").to_string().into_bytes();
    let answer = server.api.try_send(reqwest::Method::POST, "/v1/jobs", Some(body)).await;
    let status = answer.map(|reply| reply.status).unwrap_or(0);
    assert!(status != 202 && status != 200, "a false promise: {status}");
    let ended = server.ended().await;
    assert!(!ended.success(), "{ended}");
    let log = server.log();
    assert!(log.contains("could not be made durable"), "{log}");
    server.all_gone(LIMIT).await;
    server.forget_processes();
    switched.off();
    let server = switched.site.start().await;
    assert_eq!(server.api.job(&kept).await["state"], "succeeded");
    let next = server.api.submit(&chat("next")).await;
    server.api.succeeded(&next).await;
}

#[tokio::test]
async fn without_room_new_jobs_are_refused_and_accepted_again_when_there_is_some() {
    let switched = Switched::new("enospc:0", "");
    let server = switched.site.start().await;
    let first = server.api.submit(&chat("first")).await;
    server.api.succeeded(&first).await;
    switched.on();
    for _ in 0..5 {
        server.api.post("/v1/jobs", &chat("refused")).await.refused(503, "storage_unavailable");
    }
    assert_eq!(server.api.get("/readyz").await.status, 503);
    assert_eq!(server.api.job(&first).await["state"], "succeeded", "looking works");
    switched.off();
    let next = server.api.submit(&chat("next")).await;
    server.api.succeeded(&next).await;
    let all = server.api.get("/v1/jobs").await.json();
    assert_eq!(all["data"].as_array().map(Vec::len), Some(2), "what was refused is not there: {all}");
}

#[tokio::test]
async fn a_disk_that_takes_seconds_to_sync_is_waited_for() {
    let seconds = if std::env::var_os("ROUNDHOUSE_SOAK").is_some() { 5 } else { 1 };
    let switched = Switched::new(&format!("slow-sync:{}", seconds * 1_000), "-wal");
    let server = switched.site.start().await;
    switched.on();
    let texts = ["a", "b", "c"].map(chat);
    let accepted = within(LIMIT, "all are accepted", async {
        let submissions = texts.iter().map(|text| server.api.submit(text));
        futures_util::future::join_all(submissions).await
    })
    .await;
    switched.off();
    for id in &accepted {
        server.api.succeeded(id).await;
    }
    eventually(Duration::from_secs(30), "ready again", || async {
        (server.api.get("/readyz").await.status == 200).then_some(())
    })
    .await;
}
