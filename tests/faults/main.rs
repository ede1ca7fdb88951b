//! Faults around the store: disks that fail, fill up or lose what was not synced, processes that are killed, files that are
//! damaged, callers that vanish. What was promised is kept, or refused with a word.
//!
//! Short forms run here; `scripts/soak.sh` runs the long ones (`ROUNDHOUSE_SOAK=1`). Each prints its seed;
//! `ROUNDHOUSE_TEST_SEED` gives it again.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "tests")]

#[path = "../common/mod.rs"]
mod common;

mod engine;
mod ledger;
mod power_cut;
mod replay;
mod shim;
mod workload;

use std::path::Path;
use std::process::Command;

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

/// Not a test of its own: what children of this binary do.
#[test]
fn child() {
    let Some(mode) = std::env::var(CHILD).ok() else { return };
    let data = std::env::var("FAULTS_DATA").unwrap_or_default();
    let rounds = std::env::var("FAULTS_ROUNDS").map_or(1, |rounds| rounds.parse().unwrap());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (manners, fsync) = match mode.as_str() {
        "honest" => (Manners::Honest, true),
        "lazy" => (Manners::Honest, false),
        "early" => (Manners::Early, true),
        other => panic!("{other}"),
    };
    let done = runtime.block_on(workload::run(Path::new(&data), engine::settings(fsync), rounds, manners));
    if let Err(error) = done {
        panic!("the store refused: {error}");
    }
}
