//! Where the time of a case goes, by `perf`.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::measure::{Counters, Cpu};

/// Symbols that are shown.
const TOP: usize = 10;

/// How long perf takes to look at all threads of a process.
const ATTACHED: Duration = Duration::from_millis(250);

/// Watches a process until it is asked what it saw.
pub(crate) struct Watch {
    perf: Option<Child>,
    data: std::path::PathBuf,
    pid: u32,
    begun: Instant,
    cpu: Cpu,
    own: Counters,
}

/// Whether `perf` can be used; else, why not.
pub(crate) fn available() -> Result<(), String> {
    match Command::new("perf").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status() {
        Ok(status) if status.success() => Ok(()),
        _ => Err("perf is not installed (Debian: apt-get install linux-perf)".to_owned()),
    }
}

impl Watch {
    /// Of `pid`, whose threads are there, for about as long as `limit`; returns when perf has begun.
    pub(crate) async fn start(dir: &Path, pid: u32, limit: Duration) -> Self {
        let data = dir.join("perf.data");
        let seconds = format!("{:.1}", limit.as_secs_f64() * 0.8);
        let perf = available().ok().and_then(|()| {
            let mut perf = Command::new("perf");
            perf.args(["record", "-q", "-F", "997", "-o"]).arg(&data).args([
                "-p",
                &pid.to_string(),
                "--",
                "sleep",
                &seconds,
            ]);
            perf.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().ok()
        });
        if perf.is_some() {
            tokio::time::sleep(ATTACHED).await;
        }
        Self { perf, data, pid, begun: Instant::now(), cpu: Cpu::of(&pid.to_string()), own: Counters::now() }
    }

    /// Prints what was seen.
    pub(crate) fn show(self, case: &str) {
        let wall = self.begun.elapsed().as_secs_f64();
        let cpu = Cpu::of(&self.pid.to_string());
        let (user, kernel) = (cpu.user_s - self.cpu.user_s, cpu.kernel_s - self.cpu.kernel_s);
        let mut line = format!(
            "profile: {case}: {:.2} processors busy ({user:.1} s own code, {kernel:.1} s kernel, of {wall:.1} s)",
            (user + kernel) / wall
        );
        if self.pid == std::process::id() {
            let own = Counters::now().since(self.own);
            line += &format!("; {:.0} % of the time in {} fsyncs", 100.0 * own.fsync_s / wall, own.fsyncs);
        }
        println!("{line}");
        match self.perf {
            Some(mut perf) => {
                let _ = perf.wait();
                show_symbols(&self.data);
            }
            None => println!("    no symbols: {}", available().err().unwrap_or_default()),
        }
    }
}

/// Prints what perf wrote into a file, and removes it.
pub(crate) fn show_symbols(data: &Path) {
    for (what, keys, top) in [("threads", "comm", 4), ("symbols", "comm,symbol", TOP)] {
        match report(data, keys, top) {
            Ok(lines) => {
                println!("    by {what}:");
                lines.iter().for_each(|line| println!("      {line}"));
            }
            Err(why) => println!("    no {what}: {why}"),
        }
    }
    let _ = std::fs::remove_file(data);
}

fn report(data: &Path, keys: &str, top: usize) -> Result<Vec<String>, String> {
    let mut report = Command::new("perf");
    report.args(["report", "-q", "--stdio", "--no-children", "--sort", keys, "-i"]).arg(data);
    let found = report.stdin(Stdio::null()).output().map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&found.stdout);
    let lines = text
        .lines()
        .map(|line| line.trim_matches([' ', '-']))
        .filter(|line| !line.is_empty() && !line.starts_with('#'));
    let lines: Vec<String> = lines.take(top).map(|line| line.chars().take(120).collect()).collect();
    if lines.is_empty() {
        let why = String::from_utf8_lossy(&found.stderr);
        let why = why.lines().last().unwrap_or("is it allowed to? see kernel.perf_event_paranoid").to_owned();
        return Err(format!("perf saw nothing ({why})"));
    }
    Ok(lines)
}
