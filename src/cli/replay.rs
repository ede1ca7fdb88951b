//! `roundhouse replay`: a trace against the real server, with echo workers and everything faster by a factor, and the same
//! measures as `simulate` beside those of the simulation.
//!
//! The server's clock is a fast one (`ROUNDHOUSE_CLOCK_FACTOR`), so that its models, knobs, constants and all that it learns
//! are in the trace's own time. Only its workers, and what HTTP, the disk and the system take, are in real time.
//!
//! `server` starts and ends a server of its own in a folder of its own; `client` submits and reads what became of the jobs.

mod client;
mod server;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use clap::Args;

use super::simulate;
use crate::clock::FastClock;
use crate::policy::Knobs;
use crate::sim::measure::{COLUMNS, Measures};
use crate::sim::record::{JobLife, Record, Visit};
use crate::sim::{self, PolicyName, Trace};

/// What the rows are called. `retimed`: the simulation of a trace whose loads take as long as the live ones did in the end.
const SIMULATED: &str = "simulated";
const RETIMED: &str = "retimed";
const LIVE: &str = "live";

/// Flags of `replay`.
#[derive(Clone, Debug, Args)]
pub struct ReplayArgs {
    /// Trace files; tests/traces/README.md describes the format
    #[arg(required = true, value_name = "TRACE")]
    pub traces: Vec<PathBuf>,
    /// How much faster than the trace: the server's clock goes that much faster, and its workers load and work so
    #[arg(long, default_value_t = 60.0, value_name = "N")]
    pub factor: f64,
    /// Print rows with the columns of reference.csv instead of a table
    #[arg(long)]
    pub csv: bool,
    /// Folder of the echo worker
    #[arg(long, default_value = "models/echo", value_name = "DIR")]
    pub echo: PathBuf,
    /// A Python that has what the echo worker requires [default: .venv/bin/python of that folder]
    #[arg(long, value_name = "FILE", env = "ROUNDHOUSE_REPLAY_PYTHON")]
    pub python: Option<PathBuf>,
    /// Keep the folder with the data dir and the logs, and say where it is
    #[arg(long)]
    pub keep: bool,
}

/// Replays traces one after the other. Nothing is started if one of them cannot be read or replayed.
pub(super) async fn replay(args: &ReplayArgs, out: &mut dyn Write) -> anyhow::Result<ExitCode> {
    if !(1.0..=FastClock::PACE_MAX).contains(&args.factor) {
        bail!("--factor: {} must be a number from 1 to {}", args.factor, FastClock::PACE_MAX);
    }
    let traces: Vec<Trace> = args.traces.iter().map(|path| Ok(Trace::read(path)?)).collect::<anyhow::Result<_>>()?;
    for trace in &traces {
        server::check(trace).with_context(|| format!("{} cannot be replayed", trace.name))?;
    }
    if args.csv {
        writeln!(out, "{}", COLUMNS.join(","))?;
    }
    for trace in &traces {
        let (record, swap_s) = live(trace, args).await.with_context(|| format!("replay of {}", trace.name))?;
        let mut retimed = trace.clone();
        for (model, swap_s) in retimed.models.iter_mut().zip(swap_s) {
            model.cold_s = (swap_s - model.stop_s).max(0.0);
        }
        let rows = [simulated(SIMULATED, trace)?, simulated(RETIMED, &retimed)?, Measures::of(trace, LIVE, &record)];
        if args.csv {
            rows.iter().try_for_each(|row| writeln!(out, "{}", row.csv()))?;
            continue;
        }
        out.write_all(simulate::table(trace, &rows, &[], &[]).as_bytes())?;
    }
    Ok(ExitCode::SUCCESS)
}

fn simulated(row: &str, trace: &Trace) -> anyhow::Result<Measures> {
    let policy = PolicyName::Roundhouse;
    let record = sim::simulate(trace, policy, &Knobs::default())
        .with_context(|| format!("{} under {}", trace.name, policy.as_str()))?;
    Ok(Measures::of(trace, row, &record))
}

/// What was seen, and what a swap to each model cost in the end, in seconds.
async fn live(trace: &Trace, args: &ReplayArgs) -> anyhow::Result<(Record, Vec<f64>)> {
    let server = server::Server::start(trace, args).await?;
    let played = tokio::select! {
        played = client::play(trace, &server, args.factor) => played,
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted; its server is stopped")),
    };
    let played = played.map_err(|error| error.context(server.last_words()));
    let stopped = server.stop().await;
    // Why it was not played matters more than how its server ended.
    let played = played?;
    stopped?;
    Ok((record(trace, &played), played.swap_s))
}

/// What was seen, as a simulation leaves it behind. When its workers came and went is not known, only how many loads there
/// were.
fn record(trace: &Trace, played: &client::Played) -> Record {
    let visits = played.loads.iter().enumerate().flat_map(|(model, loads)| {
        let gpus = 0..trace.models[model].gpus;
        let visit = Visit {
            model,
            gpus,
            wake: false,
            parks: false,
            load_at: 0.0,
            ready_at: Some(0.0),
            leave_at: None,
            gone_at: None,
            jobs: 0,
            why: None,
        };
        (0..*loads).map(move |_| visit.clone())
    });
    Record { jobs: played.jobs.clone(), visits: visits.collect(), gpu_busy_s: busy_s(&played.jobs) }
}

/// Seconds in which at least one job ran.
fn busy_s(jobs: &[JobLife]) -> f64 {
    let mut spans: Vec<(f64, f64)> = jobs.iter().filter_map(|job| Some((job.start_s?, job.end_s?))).collect();
    spans.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (mut busy, mut until) = (0.0, f64::MIN);
    for (start, end) in spans {
        busy += (end - start.max(until)).max(0.0);
        until = until.max(end);
    }
    busy
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_that_jobs_share_is_busy_once() {
        let job = |start, end| JobLife { start_s: Some(start), end_s: Some(end), worker: None, told_s: None };
        assert_eq!(busy_s(&[job(5.0, 6.0), job(0.0, 3.0), job(1.0, 2.0), job(2.5, 4.0)]), 5.0);
        assert_eq!(busy_s(&[JobLife::default()]), 0.0);
    }
}
