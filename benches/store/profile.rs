//! Where the time of a case goes, by `perf`.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::measure::{Counters, Cpu};

/// Symbols that are shown.
const TOP: usize = 10;

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
    /// Of `pid`, for about as long as `limit`.
    pub(crate) fn start(dir: &Path, pid: u32, limit: Duration) -> Self {
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
    match symbols(data) {
        Ok(symbols) => symbols.iter().for_each(|symbol| println!("    {symbol}")),
        Err(why) => println!("    no symbols: {why}"),
    }
    let _ = std::fs::remove_file(data);
}

fn symbols(data: &Path) -> Result<Vec<String>, String> {
    let mut report = Command::new("perf");
    report.args(["report", "-q", "--stdio", "--no-children", "--sort", "comm,symbol", "-i"]).arg(data);
    let found = report.stdin(Stdio::null()).output().map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&found.stdout);
    let lines: Vec<String> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .take(TOP)
        .map(|line| line.chars().take(140).collect())
        .collect();
    if lines.is_empty() {
        let why = String::from_utf8_lossy(&found.stderr);
        return Err(format!(
            "perf saw nothing ({})",
            why.lines().last().unwrap_or("is it allowed to? see kernel.perf_event_paranoid")
        ));
    }
    Ok(lines)
}
