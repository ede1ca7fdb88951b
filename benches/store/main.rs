//! Benchmark of the store, the server over it, and other queues beside them, in one run on one machine.
//!
//! Started by `scripts/bench-store.sh`, which builds what is needed; `docs/BENCHMARKS.md` says what each line means. Prints
//! only what it has measured itself, and compares only what was measured in the same run.

#![allow(unsafe_code, reason = "counting fsyncs, see measure.rs")]
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program of its own that prints")]
#![allow(clippy::disallowed_methods, reason = "it measures real time, and its tasks end with it")]
#![allow(unused_crate_dependencies)]

mod bare;
mod disk;
mod http;
mod measure;
mod ours;
mod peers;
mod profile;
mod server;
mod suite;
mod table;

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;

/// The server's, since our store is measured in this process.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// What is measured, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Section {
    /// The disk alone
    Disk,
    /// rusqlite alone, with our schema
    Bare,
    /// Our store in this process
    Store,
    /// Our server over HTTP
    Http,
    /// The server's memory and restart with many waiting jobs
    Restart,
    /// Other queues
    Peers,
}

/// Benchmark of the store
#[derive(Clone, Debug, Parser)]
pub(crate) struct Options {
    /// Shorter measurements, and fewer waiting jobs
    #[arg(long)]
    pub(crate) quick: bool,
    /// How many jobs wait before a measurement of the store begins [default: 0,10000,100000,1000000; quick: 0,10000]
    #[arg(long, value_name = "JOBS,...", value_delimiter = ',')]
    pub(crate) pending: Vec<u64>,
    /// How many models the jobs are for, by turns: claims and completions are of one model each
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub(crate) models: u64,
    /// Waits before each part until other processes leave the processors alone, at most so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub(crate) patience: u64,
    /// Only these sections
    #[arg(long, value_name = "SECTION,...", value_delimiter = ',')]
    pub(crate) only: Vec<Section>,
    /// Runs one case (as `enqueue-64`, `life`, `http-single`) under perf and shows where its time goes
    #[arg(long, value_name = "CASE")]
    pub(crate) profile: Option<String>,
    /// Does not profile the cases of missed targets
    #[arg(long)]
    pub(crate) no_profile: bool,
    /// Folder for the databases, on the disk to be measured; what the run puts there is removed at its end
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: PathBuf,
    /// The server to measure [default: as built with this program]
    #[arg(long, value_name = "FILE", default_value = env!("CARGO_BIN_EXE_roundhouse"), hide_default_value = true)]
    pub(crate) server: PathBuf,
    /// The built peer program for effectum
    #[arg(long, value_name = "FILE")]
    pub(crate) effectum: Option<PathBuf>,
    /// The built peer program for apalis-sqlite
    #[arg(long, value_name = "FILE")]
    pub(crate) apalis: Option<PathBuf>,
    /// A Python that has huey
    #[arg(long, value_name = "FILE")]
    pub(crate) huey_python: Option<PathBuf>,
    /// Plays a model's worker on this port, for the server under measurement
    #[arg(long, value_name = "PORT", hide = true)]
    pub(crate) play_worker: Option<u16>,
    /// Given by cargo bench
    #[arg(long, hide = true)]
    pub(crate) bench: bool,
}

impl Options {
    /// How long one measurement takes.
    pub(crate) fn limit(&self) -> Duration {
        Duration::from_millis(if self.quick { 1_000 } else { 3_000 })
    }

    pub(crate) fn levels(&self) -> Vec<u64> {
        if !self.pending.is_empty() {
            let mut levels = self.pending.clone();
            levels.sort_unstable();
            levels.dedup();
            return levels;
        }
        if self.quick { vec![0, 10_000] } else { vec![0, 10_000, 100_000, 1_000_000] }
    }

    pub(crate) fn wants(&self, section: Section) -> bool {
        self.only.is_empty() || self.only.contains(&section)
    }
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    if let Some(port) = options.play_worker {
        return server::play_worker(port, &options.dir);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(suite::run(options))
}
