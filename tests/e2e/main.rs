//! The whole server, as users run it: the real binary, real worker processes (echo), real HTTP. Each test has a server of
//! its own. `scripts/test.sh` makes the Python environment that the workers need.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "tests")]

#[path = "../common/mod.rs"]
mod common;

mod api;
mod auth;
mod backups;
mod batching;
mod batching_limits;
mod broken_models;
mod checkpoint;
mod controls;
mod crashes;
mod devices;
mod ends;
mod environment;
mod explain;
mod faults_of_workers;
mod fetching;
mod gpu;
mod hung_loads;
mod input;
mod leftovers;
mod limits;
mod load_oom;
mod messages;
mod metrics;
mod parking;
mod reloads;
mod renames;
mod replay;
mod residue;
mod restarts;
mod retention;
mod revisions;
mod sleeping;
mod starts;
mod streams;
mod swaps;
mod sync_calls;
mod usage;
