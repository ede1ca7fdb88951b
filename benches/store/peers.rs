//! Other queues, each a program of its own that prints what it measured.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::Context as _;
use serde::Deserialize;

use crate::Options;
use crate::measure::{Figures, count};

#[derive(Deserialize)]
#[serde(tag = "what", rename_all = "snake_case")]
enum Line {
    Enqueue { by: u64, jobs: f64, seconds: f64 },
    Process { by: u64, jobs: f64, seconds: f64 },
    Settings { text: String },
    Note { text: String },
}

/// Runs those that are at hand; why another is not, it says.
pub(crate) fn run(options: &Options, dir: &Path, figures: &mut Figures) {
    let seconds = options.limit().as_secs_f64();
    let size = |full: u64, quick: u64| if options.quick { quick } else { full };
    let huey = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/peers/huey_peer.py");
    let peers = [
        ("effectum", options.effectum.as_deref(), None, size(40_000, 10_000)),
        ("apalis", options.apalis.as_deref(), None, size(4_000, 1_500)),
        ("huey", options.huey_python.as_deref(), Some(huey), size(6_000, 1_500)),
    ];
    for (name, program, script, jobs) in peers {
        let Some(program) = program else {
            println!("  {name}: not run, since it was not given");
            continue;
        };
        let folder = dir.join(name);
        let mut command = Command::new(program);
        command.args(script).arg(&folder).args([
            seconds.to_string(),
            jobs.to_string(),
            crate::ours::BODY_BYTES.to_string(),
        ]);
        if let Err(error) = peer(name, command, &folder, figures) {
            println!("  {name}: not measured: {error:#}");
        }
        let _ = std::fs::remove_dir_all(&folder);
    }
}

fn peer(name: &str, mut command: Command, folder: &Path, figures: &mut Figures) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder)?;
    let found = command.stdin(Stdio::null()).output().with_context(|| format!("cannot start {command:?}"))?;
    for line in String::from_utf8_lossy(&found.stdout).lines() {
        match serde_json::from_str(line).with_context(|| format!("it printed `{line}`"))? {
            Line::Enqueue { by, jobs, seconds } => {
                let rate = jobs / seconds;
                println!("  {name:<9} enqueue, {by:>3} at a time  {:>9} jobs/s", count(rate));
                figures.put(format!("{name}.enqueue.{by}"), rate);
            }
            Line::Process { by, jobs, seconds } => {
                let rate = jobs / seconds;
                println!(
                    "  {name:<9} process, {by:>3} at a time  {:>9} jobs/s   (nothing else at the time)",
                    count(rate)
                );
                figures.put(format!("{name}.process"), rate);
            }
            Line::Settings { text } => println!("  {name:<9} durability: {text}"),
            Line::Note { text } => println!("  {name:<9} {text}"),
        }
    }
    let stderr = String::from_utf8_lossy(&found.stderr);
    anyhow::ensure!(found.status.success(), "{}: {}", found.status, stderr.lines().last().unwrap_or_default());
    Ok(())
}
