//! Files that cannot be written or synced. A store under the shim meets each kind of error at each of its first operations;
//! afterwards, without errors, all that was promised is there. And the whole server stops, or refuses with a word.

use std::path::Path;
use std::process::{Output, Stdio};
use std::sync::Arc;

use super::clients::{Clients, plain};
use super::common::{LIMIT, Site, eventually};
use super::engine::{self, Engine};
use super::ledger::Ledger;
use super::replay::{Random, seed};
use super::shim::{self, Fault};
use super::{is_long, store_child, worker};

fn fault(what: String, only: &'static str) -> Fault {
    Fault { what, only }
}

/// Runs the workload on a new data dir with one fault, from the start or from when the store is open.
fn run(fault: &Fault, is_from_start: bool, dir: &Path) -> Output {
    let (data, arm) = (dir.join("data"), dir.join("arm"));
    std::fs::create_dir(&data).unwrap();
    if is_from_start {
        std::fs::write(&arm, "").unwrap();
    }
    store_child("honest", &data, 2)
        .envs(shim::failing(&data, fault, &arm))
        .env("FAULTS_ARM", &arm)
        .stderr(Stdio::piped())
        .output()
        .unwrap()
}

/// What is wrong after a run; the data dir is opened without faults.
async fn broken(dir: &Path, output: &Output) -> Vec<String> {
    let mut ledger = Ledger::default();
    ledger.read(&String::from_utf8_lossy(&output.stdout));
    let data = dir.join("data");
    let on_fatal = Arc::new(|reason: &str| panic!("{reason}"));
    match Engine::open(&data, engine::settings(true), on_fatal).await {
        Ok(engine) => ledger.broken_promises(&engine).await,
        Err(error) => vec![format!("it does not open again: {error}")],
    }
}

/// One run: promises are kept, and an error that cannot be got over ends the process with a word.
async fn check(fault: &Fault, is_from_start: bool, must_end_well: bool) -> bool {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().canonicalize().unwrap();
    let output = run(fault, is_from_start, &root);
    let said = String::from_utf8_lossy(&output.stderr);
    let found = broken(&root, &output).await;
    assert!(found.is_empty(), "{fault:?}, from the start: {is_from_start}: {found:?}\n{said}");
    let mut ledger = Ledger::default();
    ledger.read(&String::from_utf8_lossy(&output.stdout));
    if output.status.success() {
        assert!(ledger.has_ended(), "{fault:?}: {said}");
    } else {
        assert!(!must_end_well, "{fault:?}: {said}");
        let words = ["fatal:", "the store refused:"];
        assert!(words.iter().any(|word| said.contains(word)), "{fault:?}: no word in {said}");
    }
    output.status.success()
}

#[tokio::test]
async fn no_promise_is_broken_by_a_disk_that_fails() {
    let seed = seed("disk errors");
    let mut random = Random::new(seed);
    let rounds = if is_long() { 40 } else { 4 };
    let (mut runs, mut ended_well) = (0, 0);
    for round in 0..rounds {
        for kind in ["write-eio", "sync-eio", "erofs", "enospc"] {
            // The first few, and some later ones.
            let nth = if round < 2 { round + 1 } else { 1 + random.below(60) };
            let nth = if kind == "enospc" { random.below(400_000) } else { nth };
            let is_from_start = round % 2 == 0;
            ended_well += usize::from(check(&fault(format!("{kind}:{nth}"), ""), is_from_start, false).await);
            runs += 1;
        }
    }
    eprintln!("disk errors: {runs} runs, {ended_well} of them got to their end");
    assert!(ended_well < runs / 2, "the faults were met: {ended_well} of {runs} runs ended well");
}

#[tokio::test]
async fn a_failed_sync_of_the_log_ends_the_process() {
    for nth in [1, 4, 9] {
        assert!(!check(&fault(format!("sync-eio:{nth}"), "roundhouse.db-wal"), false, false).await, "sync {nth}");
        assert!(!check(&fault(format!("write-eio:{nth}"), "roundhouse.db-wal"), false, false).await, "write {nth}");
    }
}

#[tokio::test]
async fn short_writes_and_slow_syncs_change_nothing() {
    check(&fault("short:1:1000000".to_owned(), ""), true, true).await;
    let begun = tokio::time::Instant::now();
    check(&fault("slow-sync:5000:1".to_owned(), "roundhouse.db-wal"), false, true).await;
    assert!(begun.elapsed().as_secs_f64() >= 5.0, "it was slow");
    check(&fault("slow-sync:10".to_owned(), ""), false, true).await;
}

/// A server whose disk begins to fail when `arm` is called.
fn site(fault: &Fault) -> (Site, std::path::PathBuf) {
    let site = Site::new().server("worker_grace", "1s").model("fast", worker::entry(2));
    let site = site.storage("free_min", "0").storage("reserve", "0").storage("quota", "1GiB");
    let arm = site.path().join("arm");
    let env = shim::failing(&site.data(), fault, &arm);
    (env.iter().fold(site, |site, (name, value)| site.env(name, value)), arm)
}

#[tokio::test]
async fn a_server_whose_syncs_fail_stops_with_a_word_and_recovers() {
    for what in ["sync-eio:5:1000000", "erofs:20"] {
        let (site, arm) = site(&fault(what.to_owned(), "roundhouse.db-wal"));
        let mut server = site.start().await;
        let clients = Clients::default();
        let hands = clients.submit_until_broken(&server.api, 8, 1, &plain());
        eventually(LIMIT, "some jobs are accepted", || async { (clients.accepted() > 20).then_some(()) }).await;
        std::fs::write(&arm, "").unwrap();
        let status = server.ended().await;
        assert_eq!(status.code(), Some(1), "{what}");
        assert!(
            server.log().contains("cannot go on: the database could not be made durable"),
            "{what}: {}",
            server.log()
        );
        for hand in hands {
            hand.await.unwrap();
        }
        drop(server);
        std::fs::remove_file(&arm).unwrap();
        let server = site.start().await;
        clients.settle(&server.api, &plain()).await;
        clients.compare_histories(&server.api).await;
    }
}

#[tokio::test]
async fn a_server_without_room_refuses_with_a_word_and_goes_on_when_there_is_some() {
    let (site, arm) = site(&fault("enospc:0".to_owned(), "roundhouse.db-wal"));
    let server = site.start().await;
    let clients = Clients::default();
    let hands = clients.submit_until_broken(&server.api, 4, 1, &plain());
    eventually(LIMIT, "some jobs are accepted", || async { (clients.accepted() > 20).then_some(()) }).await;
    std::fs::write(&arm, "").unwrap();
    eventually(LIMIT, "some are refused", || async { (!clients.refusals().is_empty()).then_some(()) }).await;
    std::fs::remove_file(&arm).unwrap();
    let before = clients.accepted();
    eventually(LIMIT, "jobs are accepted again", || async { (clients.accepted() > before + 20).then_some(()) }).await;
    clients.stop();
    for hand in hands {
        hand.await.unwrap();
    }
    let refusals = clients.refusals();
    assert_eq!(refusals.keys().collect::<Vec<_>>(), ["storage_unavailable"], "{refusals:?}");
    clients.settle(&server.api, &plain()).await;
    clients.compare_histories(&server.api).await;
}
