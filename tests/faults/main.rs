//! The store and the server on disks that fail: what was promised is there afterwards, whatever happened.
//!
//! `disk.c` is preloaded into processes under test: it records each write, sync and rename in order (with the promises that
//! the process prints), or makes them fail. Short forms run with the other tests; `scripts/soak.sh` runs long ones.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "tests")]

#[path = "../common/mod.rs"]
mod common;

mod cancels;
mod clients;
mod damage;
mod disk_errors;
mod disk_full;
mod engine;
mod kills;
mod ledger;
mod locks;
mod power_cut;
mod refusals;
mod removed;
mod replay;
mod shim;
mod slow_store;
mod worker;
mod workload;
