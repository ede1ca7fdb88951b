//! `park: checkpoint`: the driver takes a worker to host memory. `libcuda.c` plays the driver, `ROUNDHOUSE_FAKE_GPUS` the GPU.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::common::{Server, Site, compiled, echo, with};
use crate::parking::{is, loads, there_and_back, visit};

/// The compiled library.
fn library() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| compiled("tests/e2e/libcuda.c", "libcuda.so"))
}

/// A model that takes 50 of the 80 GiB, and knows nothing of being parked.
fn checkpointed() -> Value {
    let bytes = (50_u64 << 30).to_string();
    let ours = echo("custom", &["--device-bytes", &bytes, "--park-fail", "it was asked"]);
    with(ours, json!({"gpus": 1, "memory": "50GiB", "park": "checkpoint", "max_attempts": 1}))
}

fn site() -> Site {
    let site = Site::new().model("a", checkpointed()).model("b", checkpointed());
    let driver = site.path().display().to_string();
    let site = site.env("ROUNDHOUSE_LIBCUDA", &library().display().to_string()).env("FAKE_LIBCUDA", &driver);
    site.env("ROUNDHOUSE_FAKE_GPUS", "1x80GiB").scheduler("park_ram", "200GiB")
}

/// What was asked of the driver.
fn steps(site: &Site) -> Vec<String> {
    let log = std::fs::read_to_string(site.path().join("log")).unwrap_or_default();
    log.lines().map(str::to_owned).collect()
}

fn fail(site: &Site, step: &str) {
    std::fs::write(site.path().join(format!("fail-{step}")), "").unwrap();
}

async fn end(server: &mut Server) {
    server.signal(Signal::SIGTERM);
    assert!(server.ended().await.success());
    server.all_gone(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn the_driver_takes_a_worker_to_host_memory_and_back() {
    let site = site();
    let mut server = site.start().await;
    let api = server.api.clone();
    assert_eq!(there_and_back(&api).await["attempt"], 1);
    assert_eq!(loads(&api, "a").await, (1, 1));
    assert_eq!(api.worker("a").await["starts"], 1, "it is the same process");
    is(&api, "b", "parked").await;
    assert_eq!(steps(&site), ["lock", "checkpoint", "lock", "checkpoint", "restore", "unlock"]);
    // `b` cannot even answer a signal, and ends with the server all the same.
    end(&mut server).await;
}

#[tokio::test]
async fn a_checkpoint_that_fails_is_undone_and_the_worker_stopped() {
    let site = site();
    fail(&site, "checkpoint");
    let server = site.start().await;
    assert_eq!(there_and_back(&server.api).await["attempt"], 1);
    assert_eq!(loads(&server.api, "a").await, (2, 0));
    assert_eq!(steps(&site)[..3], ["lock", "checkpoint", "unlock"]);
    let log = server.log();
    assert!(log.contains("could not be parked, so it is stopped: Checkpoint of process"), "{log}");
    assert!(log.contains("CUDA_ERROR_NOT_SUPPORTED"), "{log}");
}

#[tokio::test]
async fn a_worker_that_the_driver_does_not_bring_back_is_loaded_anew() {
    let site = site();
    fail(&site, "restore");
    let server = site.start().await;
    assert_eq!(there_and_back(&server.api).await["attempt"], 1);
    assert_eq!(loads(&server.api, "a").await, (2, 0));
    assert!(server.log().contains("could not be woken, so it is loaded anew: Restore of process"), "{}", server.log());
}

#[tokio::test]
async fn a_driver_that_cannot_is_said_so() {
    let server = site().env("ROUNDHOUSE_LIBCUDA", "/nonexistent/libcuda.so").start().await;
    visit(&server.api, "a").await;
    visit(&server.api, "b").await;
    assert_eq!(loads(&server.api, "a").await, (1, 0));
    let log = server.log();
    assert!(log.contains("could not be parked, so it is stopped: cannot load /nonexistent/libcuda.so"), "{log}");
}

#[tokio::test]
async fn a_stopped_worker_and_a_killed_server_leave_nothing() {
    let site = site();
    let mut server = site.start().await;
    visit(&server.api, "a").await;
    visit(&server.api, "b").await;
    is(&server.api, "a", "parked").await;
    let parked = server.worker("a").await;
    server.api.post("/v1/models/a/unload", &json!({})).await;
    is(&server.api, "a", "absent").await;
    assert!(!parked.is_alive());
    visit(&server.api, "a").await;
    is(&server.api, "b", "parked").await;
    server.kill();
    server.all_gone(Duration::from_secs(15)).await;
}
