//! Processes, as `/proc` shows them.

use std::fs;

/// A process that carries an instance mark. Equal only if it is the same process, not just the same pid.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Proc {
    pub(crate) pid: i32,
    /// In clock ticks since boot.
    started: u64,
    /// Value of `ROUNDHOUSE_INSTANCE`.
    pub(crate) mark: String,
    /// Words of its command line.
    pub(crate) command: Vec<String>,
}

impl Proc {
    /// Whether it still runs; a zombie does not.
    pub(crate) fn is_alive(&self) -> bool {
        stat(self.pid).is_some_and(|(state, started)| started == self.started && state != 'Z' && state != 'X')
    }

    /// Whether this is the Python process itself, not its guard.
    pub(crate) fn is_worker(&self) -> bool {
        self.command.get(1).is_some_and(|word| word.ends_with("server.py"))
    }

    /// Whether it was started as this model's worker.
    pub(crate) fn serves(&self, model: &str) -> bool {
        self.is_worker() && self.command.windows(2).any(|pair| pair[0] == "--name" && pair[1] == model)
    }

    pub(crate) fn signal(&self, signal: nix::sys::signal::Signal) {
        // It may have ended by itself in the meantime.
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid), signal);
    }
}

/// All processes whose environment carries the data dir's instance mark.
pub(crate) fn marked(data_dir_id: &str) -> Vec<Proc> {
    let pids = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    pids.filter_map(look_at).filter(|found| found.mark.starts_with(data_dir_id)).collect()
}

fn look_at(pid: i32) -> Option<Proc> {
    let environ = fs::read(format!("/proc/{pid}/environ")).ok()?;
    let mark = environ.split(|b| *b == 0).find_map(|pair| pair.strip_prefix(b"ROUNDHOUSE_INSTANCE="))?;
    let words = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let command = words.split(|b| *b == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
    let (_, started) = stat(pid)?;
    let found = Proc { pid, started, mark: String::from_utf8_lossy(mark).into_owned(), command };
    found.is_alive().then_some(found)
}

/// State letter and start time.
fn stat(pid: i32) -> Option<(char, u64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; fields are counted after it, from field 3 on.
    let rest = text.rsplit_once(") ")?.1;
    let mut fields = rest.split(' ');
    let state = fields.next()?.chars().next()?;
    let started = fields.nth(18)?.parse().ok()?;
    Some((state, started))
}
