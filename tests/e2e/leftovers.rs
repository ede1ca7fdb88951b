//! What killed workers leave in shared folders, when the server was killed as well and is started again at once.

use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use nix::sys::signal::Signal;
use roundhouse::clock::SystemClock;
use roundhouse::domain::StorageSettings;
use roundhouse::store;
use serde_json::json;

use crate::common::{Site, free_port};
use crate::faults_of_workers::{chat_job, is_guard, shared_memory, stock};

/// A start that opens the data dir and then fails.
fn failing_start(site: &Site) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_roundhouse"));
    command.args(["serve", "--listen", "127.0.0.1:0"]).arg("--config").arg(site.config());
    command.arg("--data-dir").arg(site.data()).env("ROUNDHOUSE_FAKE_GPUS", "none such");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

fn has_failed(start: Child) {
    let output = start.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("ROUNDHOUSE_FAKE_GPUS"), "{said}");
}

/// The worker ends by SIGKILL alone, so that its guard still waits for it when the next run begins.
async fn a_restart(and_guards: bool, fails_at_first: bool) {
    let token = format!("psm_rh{}_", free_port());
    let site = Site::new().server("worker_grace", "60s").model("t", stock(&["--ignore-term", "--shm", &token]));
    let mut server = site.start().await;
    let id = server.api.submit(&chat_job(json!({"words": 1}))).await;
    server.api.succeeded(&id).await;
    assert_eq!(shared_memory(&token).len(), 1);
    let of_first = server.processes();
    server.kill();
    server.forget_processes();
    if and_guards {
        of_first.iter().filter(|found| is_guard(found)).for_each(|guard| guard.signal(Signal::SIGKILL));
    }
    if fails_at_first {
        has_failed(failing_start(&site));
    }
    let next = site.start().await;
    assert_eq!(shared_memory(&token), Vec::<String>::new());
    let alive: Vec<_> = of_first.iter().filter(|found| found.is_alive()).collect();
    assert!(alive.is_empty(), "left of the first run: {alive:?}");
    drop(next);
}

/// Without the wait for the store one of ten or so ended before it had noted that.
#[tokio::test]
async fn a_start_that_is_refused_ends_in_order_each_time() {
    let sites: Vec<Site> = (0..24).map(|_| Site::new().model("t", stock::<&str>(&[]))).collect();
    sites.iter().for_each(Site::write);
    let starts: Vec<Child> = sites.iter().map(failing_start).collect();
    starts.into_iter().for_each(has_failed);
    for site in &sites {
        let settings = StorageSettings { reserve_bytes: 0, ..StorageSettings::default() };
        let clock = Arc::new(SystemClock::default());
        let opened = store::open(&site.data(), clock, settings, Arc::new(|error| panic!("{error}"))).await.unwrap();
        assert!(opened.was_clean);
    }
}

/// Nothing has run, so nothing broke off.
#[tokio::test]
async fn a_start_that_is_refused_is_no_run_that_did_not_end_in_order() {
    let site = Site::new().model("t", stock::<&str>(&[]));
    site.write();
    has_failed(failing_start(&site));
    let mut server = site.start().await;
    assert!(!server.log().contains("did not end in order"), "{}", server.log());
    server.kill();
    has_failed(failing_start(&site));
    let server = site.start().await;
    assert!(server.log().contains("did not end in order"), "the one that was killed: {}", server.log());
}

#[tokio::test]
async fn a_restart_at_once_leaves_no_files_of_the_killed_run() {
    a_restart(false, false).await;
}

#[tokio::test]
async fn a_restart_leaves_no_files_of_a_run_that_was_killed_with_its_guards() {
    a_restart(true, false).await;
}

#[tokio::test]
async fn a_start_that_fails_does_not_forget_when_the_killed_run_began() {
    a_restart(true, true).await;
}
