//! Finding and ending processes through /proc. Blocking; used by the guard and, off the async threads, by the server.

use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::time::Instant;

/// The environment variable that marks every process of a worker: `<data dir id>:<nonce>`.
pub(super) const MARK: &str = "ROUNDHOUSE_INSTANCE";
/// How often processes are looked at while they end: soon at first, since most end at once, then less and less often.
const LOOK_FIRST: Duration = Duration::from_millis(2);
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// How long Python's resource tracker may outlive the processes it cleans up after.
const TRACKER_GRACE: Duration = Duration::from_millis(600);

/// One process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Process {
    pub(super) pid: i32,
    pub(super) group: i32,
    pub(super) session: i32,
    /// Ended, not yet waited for; it holds nothing any more.
    pub(super) is_zombie: bool,
}

/// All processes of this machine (of this pid namespace).
pub(super) fn processes() -> Vec<Process> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter_map(|pid| {
            let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
            parse_stat(pid, &stat)
        })
        .collect()
}

/// `pid (name) state ppid pgrp session ...`; the name may hold blanks and brackets.
fn parse_stat(pid: i32, stat: &[u8]) -> Option<Process> {
    let after_name = stat.iter().rposition(|b| *b == b')')? + 1;
    let rest = std::str::from_utf8(stat.get(after_name..)?).ok()?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?;
    let mut number = || fields.next()?.parse::<i32>().ok();
    let _parent = number()?;
    Some(Process { pid, group: number()?, session: number()?, is_zombie: matches!(state, "Z" | "X") })
}

/// Host memory that a process has resident, in bytes.
pub(super) fn resident_bytes(pid: i32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?.trim().strip_suffix("kB")?;
    kib.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Whether the environment that `pid` was started with has a mark that `accept` takes. Unreadable: no.
fn has_mark(pid: i32, accept: impl Fn(&[u8]) -> bool) -> bool {
    let Ok(environ) = std::fs::read(format!("/proc/{pid}/environ")) else {
        return false;
    };
    environ.split(|b| *b == 0).any(|variable| {
        variable.strip_prefix(MARK.as_bytes()).and_then(|rest| rest.strip_prefix(b"=")).is_some_and(&accept)
    })
}

/// Whether a worker of another mark listens on this port of 127.0.0.1, by the sockets that processes hold. What cannot be
/// read, and whoever has no mark, is nobody's.
pub(super) fn another_listens(port: u16, mark: &str) -> bool {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(|path| std::fs::read_to_string(path).unwrap_or_default());
    let sockets: Vec<String> = tables.iter().flat_map(|table| listening(table, port)).collect();
    let holds = |pid: i32| {
        let files = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        let mut targets = files.filter_map(|file| std::fs::read_link(file.path()).ok());
        targets.any(|target| sockets.iter().any(|socket| target.as_os_str() == socket.as_str()))
    };
    !sockets.is_empty()
        && processes().iter().any(|other| has_mark(other.pid, |m| m != mark.as_bytes()) && holds(other.pid))
}

/// Addresses by which 127.0.0.1 is reached, as a table of `/proc/net` has them: itself and all, of both kinds.
const REACHED: [&str; 4] =
    ["0100007F", "00000000", "00000000000000000000000000000000", "0000000000000000FFFF00000100007F"];

/// The sockets that listen on a port, as they are called in `/proc/PID/fd`, by a table of `/proc/net`.
fn listening(table: &str, port: u16) -> impl Iterator<Item = String> + '_ {
    table.lines().skip(1).filter_map(move |line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let (address, own) = fields.get(1)?.rsplit_once(':')?;
        let listens =
            REACHED.contains(&address) && u16::from_str_radix(own, 16).ok()? == port && *fields.get(3)? == "0A";
        listens.then(|| format!("socket:[{}]", fields.get(9).unwrap_or(&"")))
    })
}

/// Which processes belong together.
#[derive(Clone, Debug)]
pub(super) enum Family {
    /// One worker: what carries its mark, and what is in its guard's session (a program may overwrite its environment).
    Instance {
        /// `<data dir id>:<nonce>`
        mark: String,
        /// The guard's process id; it leads the session.
        session: Option<i32>,
    },
    /// Whatever carries a mark of this data dir.
    DataDir {
        /// First half of the mark.
        id: String,
    },
    /// The same without the guards.
    Unguarded {
        /// As of `DataDir`.
        id: String,
    },
}

impl Family {
    /// Its living processes, without the caller and `except`.
    pub(super) fn living(&self, except: Option<i32>) -> Vec<Process> {
        self.living_still(except, &mut Vec::new())
    }

    /// The same, with those of `seen` that still live: the environment of one that is ending is empty before it has let go of its
    /// files.
    fn living_still(&self, except: Option<i32>, seen: &mut Vec<Process>) -> Vec<Process> {
        let own = nix::unistd::getpid().as_raw();
        let all: Vec<Process> =
            processes().into_iter().filter(|p| p.pid != own && Some(p.pid) != except && !p.is_zombie).collect();
        seen.retain(|process| all.contains(process));
        let more: Vec<Process> = all.into_iter().filter(|p| !seen.contains(p) && self.includes(p)).collect();
        seen.extend(more);
        seen.clone()
    }

    fn includes(&self, process: &Process) -> bool {
        match self {
            Self::Instance { mark, session } => {
                *session == Some(process.session) || has_mark(process.pid, |m| m == mark.as_bytes())
            }
            Self::DataDir { id } => is_of(process.pid, id),
            Self::Unguarded { id } => !is_guard(process) && is_of(process.pid, id),
        }
    }

    /// Sends SIGTERM to all of it, once.
    pub(super) fn terminate(&self) {
        for process in self.living(None) {
            send(process.pid, Signal::SIGTERM);
        }
    }

    /// Waits until nothing of it lives; false if something does after `limit`.
    pub(super) fn wait_gone(&self, limit: Duration) -> bool {
        self.wait(limit, |_| true)
    }

    /// Waits until none of its processes in `group` lives; false if one does after `limit`.
    pub(super) fn wait_group_gone(&self, group: i32, limit: Duration) -> bool {
        self.wait(limit, |process| process.group == group)
    }

    fn wait(&self, limit: Duration, counts: impl Fn(&Process) -> bool) -> bool {
        let until = Instant::now() + limit;
        let (mut pause, mut seen) = (LOOK_FIRST, Vec::new());
        loop {
            if !self.living_still(None, &mut seen).iter().any(&counts) {
                return true;
            }
            if Instant::now() >= until {
                return false;
            }
            rest(&mut pause);
        }
    }

    /// SIGKILL to all of it until nothing lives; false if something does after `limit`.
    ///
    /// Python's resource tracker is left for a moment longer: once the others are gone it removes the shared memory and
    /// semaphores they left behind, and ends by itself.
    pub(super) fn kill(&self, except: Option<i32>, limit: Duration) -> bool {
        let start = Instant::now();
        let (mut pause, mut seen) = (LOOK_FIRST, Vec::new());
        loop {
            let living = self.living_still(except, &mut seen);
            if living.is_empty() {
                return true;
            }
            let spare_trackers = start.elapsed() < TRACKER_GRACE;
            for process in living {
                if !(spare_trackers && is_resource_tracker(process.pid)) {
                    send(process.pid, Signal::SIGKILL);
                }
            }
            if start.elapsed() >= limit {
                return false;
            }
            rest(&mut pause);
        }
    }
}

/// Between two looks; the next rest is longer.
fn rest(pause: &mut Duration) {
    std::thread::sleep(*pause);
    *pause = (*pause * 2).min(LOOK_EVERY);
}

/// Whether it carries a mark of the data dir `id`.
fn is_of(pid: i32, id: &str) -> bool {
    has_mark(pid, |m| m.strip_prefix(id.as_bytes()).is_some_and(|rest| rest.first() == Some(&b':')))
}

/// `<this program> guard ...`, which leads its session.
fn is_guard(process: &Process) -> bool {
    process.session == process.pid
        && std::fs::read(format!("/proc/{}/cmdline", process.pid))
            .is_ok_and(|words| words.split(|b| *b == 0).nth(1) == Some(b"guard"))
}

fn is_resource_tracker(pid: i32) -> bool {
    std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|words| {
        const NAME: &[u8] = b"multiprocessing.resource_tracker";
        words.windows(NAME.len()).any(|w| w == NAME)
    })
}

/// A process that is gone already is no trouble.
fn send(pid: i32, signal: Signal) {
    match kill(Pid::from_raw(pid), signal) {
        Ok(()) | Err(Errno::ESRCH) => {}
        Err(error) => {
            tracing::warn!(process.pid = pid, "cannot send {signal} to a process: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_stat_with_an_odd_name() {
        assert_eq!(
            parse_stat(7, b"7 (a) b (c)) S 1 5 6 0 -1"),
            Some(Process { pid: 7, group: 5, session: 6, is_zombie: false })
        );
        assert!(parse_stat(7, b"7 (x) Z 1 5 6 0").is_some_and(|p| p.is_zombie));
        assert_eq!(parse_stat(7, b"7 (x"), None);
    }

    #[test]
    fn who_was_of_it_lives_on_without_its_mark() {
        use std::io::Write as _;
        use std::process::{Command, Stdio};

        let id = format!("still{}", std::process::id());
        let family = Family::DataDir { id: id.clone() };
        let mut child = Command::new("sh")
            .args(["-c", "read go; exec env -i sleep 600"])
            .env(MARK, format!("{id}:1"))
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        while family.living(None).is_empty() {
            std::thread::sleep(LOOK_FIRST);
        }
        let mut seen = Vec::new();
        assert_eq!(family.living_still(None, &mut seen).len(), 1);
        child.stdin.take().unwrap().write_all(b"go\n").unwrap();
        while !family.living(None).is_empty() {
            std::thread::sleep(LOOK_FIRST);
        }
        assert_eq!(family.living_still(None, &mut seen).len(), 1, "its environment tells nothing any more");
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(family.living_still(None, &mut seen).is_empty());
    }

    #[test]
    fn sees_itself() {
        let own = nix::unistd::getpid().as_raw();
        assert!(processes().iter().any(|p| p.pid == own && !p.is_zombie));
    }

    #[test]
    fn a_listening_socket_is_found_by_its_port() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
            0: 0100007F:1F41 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0 100 0 0 10 0\n   \
            1: 0100007F:1F41 0100007F:C001 01 00000000:00000000 00:00000000 00000000     0        0 4712 1 0 20 4 30 10 -1\n";
        assert_eq!(listening(table, 8001).collect::<Vec<_>>(), ["socket:[4711]"]);
        assert_eq!(listening(table, 8002).count(), 0);
        let own = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
        assert!(!another_listens(own.local_addr().unwrap().port(), "id:1"), "it has no mark");
    }

    #[test]
    fn who_listens_on_an_address_that_is_not_asked_is_no_stranger() {
        let listens = |address: &str| {
            let line =
                format!("  0: {address}:1F41 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 4711 1");
            listening(&format!("head\n{line}\n"), 8001).count() == 1
        };
        let loopback = ["0100007F", "0000000000000000FFFF00000100007F"];
        let all = ["00000000", "00000000000000000000000000000000"];
        assert!(loopback.into_iter().chain(all).all(listens));
        let others = ["0200007F", "0500000A", "00000000000000000000000001000000", "0000000000000000FFFF00000500000A"];
        assert!(!others.into_iter().any(listens));
    }

    #[test]
    fn ends_exactly_what_carries_the_mark() {
        let spawn = |mark: &str| std::process::Command::new("sleep").arg("60").env(MARK, mark).spawn().unwrap();
        let id = format!("procfs-test-{}", std::process::id());
        let mut ours = spawn(&format!("{id}:1"));
        let mut sibling = spawn(&format!("{id}:2"));
        let mut other = spawn(&format!("{id}x:1"));
        let pids = |family: &Family| -> Vec<u32> {
            let living = family.living(None);
            living.iter().map(|p| p.pid.cast_unsigned()).collect()
        };

        let instance = Family::Instance { mark: format!("{id}:1"), session: None };
        assert_eq!(pids(&instance), [ours.id()]);
        assert!(instance.kill(None, Duration::from_secs(5)));
        ours.wait().unwrap();

        let data_dir = Family::DataDir { id };
        assert_eq!(pids(&data_dir), [sibling.id()]);
        data_dir.terminate();
        assert!(data_dir.wait_gone(Duration::from_secs(5)));
        sibling.wait().unwrap();

        assert_eq!(other.try_wait().unwrap(), None, "of another data dir");
        other.kill().unwrap();
        other.wait().unwrap();
    }
}
