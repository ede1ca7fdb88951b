//! Clocks, counters and what is made of them.

use std::collections::BTreeMap;
use std::ffi::c_int;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::libc;

static FSYNCS: AtomicU64 = AtomicU64::new(0);
static FSYNC_NS: AtomicU64 = AtomicU64::new(0);

/// Stands before libc's: SQLite is linked statically and calls this one, so its fsyncs can be counted.
#[unsafe(no_mangle)]
extern "C" fn fsync(file: c_int) -> c_int {
    counted(libc::SYS_fsync, file)
}

/// See [`fsync`].
#[unsafe(no_mangle)]
extern "C" fn fdatasync(file: c_int) -> c_int {
    counted(libc::SYS_fdatasync, file)
}

fn counted(call: libc::c_long, file: c_int) -> c_int {
    let begun = Instant::now();
    // SAFETY: the call that was asked for, with its own argument; errno is set as libc's function would.
    let result = unsafe { libc::syscall(call, file) };
    FSYNCS.fetch_add(1, Ordering::Relaxed);
    FSYNC_NS.fetch_add(u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    if result == 0 { 0 } else { -1 }
}

/// What this process has done so far.
#[derive(Clone, Copy, Default)]
pub(crate) struct Counters {
    pub(crate) write_bytes: u64,
    pub(crate) fsyncs: u64,
    pub(crate) fsync_s: f64,
    pub(crate) user_s: f64,
    pub(crate) kernel_s: f64,
}

impl Counters {
    /// Of this process.
    pub(crate) fn now() -> Self {
        let cpu = Cpu::of("self");
        Self {
            write_bytes: write_bytes("self"),
            fsyncs: FSYNCS.load(Ordering::Relaxed),
            fsync_s: FSYNC_NS.load(Ordering::Relaxed) as f64 / 1e9,
            user_s: cpu.user_s,
            kernel_s: cpu.kernel_s,
        }
    }

    pub(crate) fn since(self, before: Self) -> Self {
        Self {
            write_bytes: self.write_bytes - before.write_bytes,
            fsyncs: self.fsyncs - before.fsyncs,
            fsync_s: self.fsync_s - before.fsync_s,
            user_s: self.user_s - before.user_s,
            kernel_s: self.kernel_s - before.kernel_s,
        }
    }
}

/// Bytes that a process caused to be written to the disk: pages made dirty, as the kernel counts them.
fn write_bytes(pid: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
    text.lines().find_map(|line| line.strip_prefix("write_bytes: ")?.parse().ok()).unwrap_or(0)
}

/// Processor time of a process.
#[derive(Clone, Copy, Default)]
pub(crate) struct Cpu {
    pub(crate) user_s: f64,
    pub(crate) kernel_s: f64,
    /// Of children that have ended.
    children_s: f64,
}

impl Cpu {
    pub(crate) fn of(pid: &str) -> Self {
        let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let after_name = text.rsplit_once(')').map_or("", |(_, rest)| rest);
        let fields: Vec<f64> =
            after_name.split_whitespace().skip(11).take(4).map(|field| field.parse().unwrap_or(0.0)).collect();
        let seconds = |index: usize| fields.get(index).copied().unwrap_or(0.0) / ticks_per_second();
        Self { user_s: seconds(0), kernel_s: seconds(1), children_s: seconds(2) + seconds(3) }
    }
}

fn ticks_per_second() -> f64 {
    // SAFETY: asks for a constant.
    let ticks = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    if ticks > 0 { ticks as f64 } else { 100.0 }
}

/// Watches what other processes take of the processors, for a while.
pub(crate) struct Others {
    begun: Instant,
    busy_s: f64,
    ours_s: f64,
}

impl Others {
    pub(crate) fn watch() -> Self {
        Self { begun: Instant::now(), busy_s: busy_s(), ours_s: ours_s() }
    }

    /// Share of all processors that went to others, the kernel's own threads included.
    pub(crate) fn share(&self) -> f64 {
        let wall = self.begun.elapsed().as_secs_f64() * cpus() as f64;
        let others = (busy_s() - self.busy_s) - (ours_s() - self.ours_s);
        (others / wall.max(0.001)).max(0.0)
    }
}

pub(crate) fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// All that is neither idle nor waiting for a disk.
fn busy_s() -> f64 {
    let text = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let first = text.lines().next().unwrap_or_default();
    let fields: Vec<f64> = first.split_whitespace().skip(1).map(|field| field.parse().unwrap_or(0.0)).collect();
    let busy: f64 =
        fields.iter().take(8).enumerate().filter(|(index, _)| !matches!(index, 3 | 4)).map(|(_, n)| n).sum();
    busy / ticks_per_second()
}

fn ours_s() -> f64 {
    let cpu = Cpu::of("self");
    cpu.user_s + cpu.kernel_s + cpu.children_s
}

/// One closed loop that was measured.
#[derive(Default)]
pub(crate) struct Run {
    pub(crate) jobs: u64,
    pub(crate) took: Duration,
    /// Of each call, µs, in order of size.
    calls_us: Vec<u32>,
    pub(crate) counters: Counters,
}

impl Run {
    pub(crate) fn new(jobs: u64, took: Duration, mut calls_us: Vec<u32>, counters: Counters) -> Self {
        calls_us.sort_unstable();
        Self { jobs, took, calls_us, counters }
    }

    /// Jobs a second.
    pub(crate) fn rate(&self) -> f64 {
        self.jobs as f64 / self.took.as_secs_f64().max(1e-9)
    }

    pub(crate) fn calls(&self) -> usize {
        self.calls_us.len()
    }

    /// Calls a second.
    pub(crate) fn call_rate(&self) -> f64 {
        self.calls() as f64 / self.took.as_secs_f64().max(1e-9)
    }

    /// The smallest time, ms, that this share of calls did not exceed.
    pub(crate) fn ms(&self, share: f64) -> f64 {
        let last = self.calls_us.len().saturating_sub(1);
        let index = (share * self.calls_us.len() as f64).ceil() as usize;
        self.calls_us.get(index.saturating_sub(1).min(last)).map_or(0.0, |us| f64::from(*us) / 1e3)
    }

    /// `p50 0.61 p99 1.50 p99.9 5.00 ms`
    pub(crate) fn times(&self) -> String {
        format!("p50 {:.2}  p99 {:.2}  p99.9 {:.2} ms", self.ms(0.5), self.ms(0.99), self.ms(0.999))
    }

    pub(crate) fn bytes_per_job(&self) -> f64 {
        self.counters.write_bytes as f64 / self.jobs.max(1) as f64
    }

    pub(crate) fn fsyncs_per_job(&self) -> f64 {
        self.counters.fsyncs as f64 / self.jobs.max(1) as f64
    }

    /// `2.9 KB and 0.031 fsyncs a job`
    pub(crate) fn costs(&self) -> String {
        format!("{:.1} KB and {:.3} fsyncs a job", self.bytes_per_job() / 1e3, self.fsyncs_per_job())
    }
}

pub(crate) fn us(took: Duration) -> u32 {
    u32::try_from(took.as_micros()).unwrap_or(u32::MAX)
}

/// What was measured, by name: only the run itself puts something here.
#[derive(Default)]
pub(crate) struct Figures {
    found: BTreeMap<String, Figure>,
    /// Of the part that is being measured.
    fresh: Vec<String>,
}

/// A figure, and whether others kept the processors busy meanwhile.
#[derive(Clone, Copy)]
pub(crate) struct Figure {
    pub(crate) value: f64,
    pub(crate) is_noisy: bool,
}

impl Figures {
    pub(crate) fn put(&mut self, name: impl Into<String>, value: f64) {
        let name = name.into();
        self.found.insert(name.clone(), Figure { value, is_noisy: false });
        self.fresh.push(name);
    }

    /// Ends a part.
    pub(crate) fn settle(&mut self, is_noisy: bool) {
        for name in self.fresh.drain(..) {
            if let Some(figure) = self.found.get_mut(&name) {
                figure.is_noisy = is_noisy;
            }
        }
    }

    pub(crate) fn get(&self, name: &str) -> Option<Figure> {
        self.found.get(name).copied()
    }
}

/// `84.6 k`, `310`, `1.2 M`
pub(crate) fn count(n: f64) -> String {
    if n >= 999_500.0 {
        format!("{:.2} M", n / 1e6)
    } else if n >= 9_995.0 {
        format!("{:.1} k", n / 1e3)
    } else {
        format!("{n:.0}")
    }
}

/// `0`, `10k`, `1M`
pub(crate) fn short(n: u64) -> String {
    match n {
        0 => "0".to_owned(),
        n if n % 1_000_000 == 0 => format!("{}M", n / 1_000_000),
        n if n % 1_000 == 0 => format!("{}k", n / 1_000),
        n => n.to_string(),
    }
}
