//! Faults around the store: disks that fail, fill up or lose what was not synced, processes that are killed, files that are
//! damaged, callers that vanish. What was promised is kept, or refused with a word.
//!
//! Short forms run here; `scripts/soak.sh` runs the long ones (`ROUNDHOUSE_SOAK=1`). Each prints its seed;
//! `ROUNDHOUSE_TEST_SEED` gives it again.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "tests")]

#[path = "../common/mod.rs"]
mod common;

mod clients;
mod damage;
mod disk_errors;
mod disk_full;
mod engine;
mod kills;
mod ledger;
mod power_cut;
mod replay;
mod shim;
mod stops;
mod strangers;
mod worker;
mod workload;

use std::path::Path;
use std::process::Command;

use roundhouse::domain::StorageSettings;
use workload::Manners;

/// What a child of this binary is to do: see [`child`].
const CHILD: &str = "FAULTS_CHILD";

/// Whether the long forms were asked for.
fn is_long() -> bool {
    std::env::var_os("ROUNDHOUSE_SOAK").is_some_and(|value| value != "0")
}

/// This binary again, as a process that works on the store in `data`.
fn store_child(mode: &str, data: &Path, rounds: usize) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "child", "--nocapture", "--test-threads=1"]);
    command.env(CHILD, mode).env("FAULTS_DATA", data).env("FAULTS_ROUNDS", rounds.to_string());
    command
}

/// How often something is done: as an environment variable says, or as usual.
fn count(variable: &str, usual: usize) -> usize {
    std::env::var(variable).map_or(usual, |text| text.parse().unwrap_or_else(|_| panic!("{variable}={text}: a number")))
}

/// Not a test of its own: what children of this binary do.
#[test]
fn child() {
    let Some(mode) = std::env::var(CHILD).ok() else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    match mode.as_str() {
        "worker" => worker::serve(),
        "disk-full" => runtime.block_on(disk_full::scenario()),
        "opens" => runtime.block_on(async {
            let on_fatal = std::sync::Arc::new(|reason: &str| panic!("{reason}"));
            drop(engine::Engine::open(&data(), engine::settings(true), on_fatal).await.unwrap());
            engine::closed(&data()).await;
        }),
        "lazy" => runtime.block_on(work(Manners::Honest, false)),
        "early" => runtime.block_on(work(Manners::Early, true)),
        "honest" => runtime.block_on(work(Manners::Honest, true)),
        // Its log holds all it did, and nothing of it is in the database's own file.
        "killed" => runtime.block_on(async {
            let settings = StorageSettings { wal_pages: 1_000_000, ..engine::settings(true) };
            let _engine = workload::run(&data(), settings, rounds(), Manners::Honest, false).await.unwrap();
            nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL).unwrap();
        }),
        other => panic!("{other}"),
    }
}

async fn work(manners: Manners, fsync: bool) {
    match workload::run(&data(), engine::settings(fsync), rounds(), manners, true).await {
        Ok(engine) => drop(engine),
        Err(error) => panic!("the store refused: {error}"),
    }
    engine::closed(&data()).await;
    // The last thing it does is to empty its log.
    let log = data().join("roundhouse.db-wal");
    while std::fs::metadata(&log).is_ok_and(|log| log.len() > 0) {
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
}

fn data() -> std::path::PathBuf {
    std::env::var_os("FAULTS_DATA").unwrap().into()
}

fn rounds() -> usize {
    count("FAULTS_ROUNDS", 1)
}
