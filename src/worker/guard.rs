//! `roundhouse guard`: a small process between the server and one worker that ends the worker when the server is gone.
//!
//! Its stdin is a pipe whose other end only the server holds (the lifeline). When that closes, by order or because the
//! server died, the guard ends the worker: SIGTERM to its process group, the grace period, then the same, shorter, for whatever
//! else is in the guard's session or carries the worker's mark, and SIGKILL in the end. When the worker ends by itself, its remains are ended the same way.

use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{Signal, killpg};
use nix::sys::stat::Mode;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use tokio::signal::unix::SignalKind;

use crate::clock::{Clock, SystemClock};
use crate::worker::leftovers;
use crate::worker::procfs::{Family, MARK};

/// What a shell answers when it cannot start a program.
const CANNOT_START: i32 = 127;
/// Grace of what a worker leaves behind: escaped children get SIGTERM only when their group is gone.
const REMAINS_GRACE: Duration = Duration::from_millis(500);
/// How long the exit status of an ended worker may take to come.
const EXIT_NOTICE: Duration = Duration::from_millis(200);
/// How long SIGKILL may take; a process in an uninterruptible wait can take its time.
const KILL_LIMIT: Duration = Duration::from_secs(60);

enum Event {
    LifelineClosed,
    Exited(i32),
}

/// Runs `command` (program and words) until it ends or stdin closes; returns the exit code for the guard itself: the
/// worker's, 128 + signal if it was killed, 127 if it cannot be started. `umask`: which permissions files of the worker never
/// have; `None`: as the caller's.
pub fn run(grace_ms: u64, umask: Option<u32>, command: Vec<String>) -> i32 {
    if let Some(mask) = umask {
        nix::sys::stat::umask(Mode::from_bits_truncate(mask));
    }
    match guard(Duration::from_millis(grace_ms), &command) {
        Ok(code) => code,
        Err(message) => {
            // stderr is the worker's log.
            let _ = writeln!(std::io::stderr(), "roundhouse guard: {message}");
            CANNOT_START
        }
    }
}

fn guard(grace: Duration, command: &[String]) -> Result<i32, String> {
    let (program, words) = command.split_first().ok_or("no command to run")?;
    match nix::unistd::setsid() {
        Ok(_) | Err(Errno::EPERM) => {} // EPERM: leads a group already, for example under a shell.
        Err(error) => return Err(format!("cannot make a session: {error}")),
    }
    let _signals = outlive_signals()?;
    // Orphans of the worker become children of the guard, so that they can be waited for.
    if let Err(error) = nix::sys::prctl::set_child_subreaper(true) {
        tracing::debug!("no subreaper: {error}");
    }
    let started_at = SystemClock::default().now();
    let child = Command::new(program)
        .args(words)
        .stdin(Stdio::null())
        .process_group(0)
        .spawn()
        .map_err(|e| format!("cannot start `{program}`: {e}"))?;
    let group = Pid::from_raw(child.id().cast_signed());

    let (events, inbox) = mpsc::channel();
    watch_lifeline(events.clone())?;
    watch_children(group, events)?;
    let family = Family::Instance {
        mark: std::env::var(MARK).unwrap_or_else(|_| format!("unmarked:{group}")),
        session: Some(nix::unistd::getpid().as_raw()),
    };
    let code = match inbox.recv() {
        Ok(Event::Exited(code)) => Some(code),
        Ok(Event::LifelineClosed) | Err(mpsc::RecvError) => {
            // ESRCH: the whole group is gone already.
            let _ = killpg(group, Signal::SIGTERM);
            family.wait_group_gone(group.as_raw(), grace);
            None
        }
    };
    // What left the group, or outlived its leader, has not been asked yet.
    let remains = family.living(None);
    if remains.iter().any(|p| code.is_some() || p.group != group.as_raw()) {
        family.terminate();
        family.wait_gone(REMAINS_GRACE);
    }
    family.kill(None, KILL_LIMIT);
    // For a guard started by hand without mark and session: its family is empty.
    let _ = killpg(group, Signal::SIGKILL);
    leftovers::remove(started_at);
    Ok(code.unwrap_or_else(|| match inbox.recv_timeout(EXIT_NOTICE) {
        Ok(Event::Exited(code)) => code,
        _ => 128 + Signal::SIGKILL as i32,
    }))
}

/// Handlers instead of ignored signals: a handler is reset when the worker is started, an ignored signal would be
/// inherited. tokio's are the ones that need no unsafe code; a handler stays when the runtime goes.
fn outlive_signals() -> Result<impl Sized, String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(|e| format!("cannot handle signals: {e}"))?;
    let entered = runtime.enter();
    for kind in [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup(), SignalKind::quit()] {
        drop(tokio::signal::unix::signal(kind).map_err(|e| format!("cannot handle signals: {e}"))?);
    }
    drop(entered);
    Ok(runtime)
}

fn watch_lifeline(events: mpsc::Sender<Event>) -> Result<(), String> {
    thread("lifeline", move || {
        let mut buffer = [0; 64];
        loop {
            match std::io::stdin().read(&mut buffer) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        let _ = events.send(Event::LifelineClosed);
    })
}

/// Waits for the worker and for every orphan of it.
fn watch_children(worker: Pid, events: mpsc::Sender<Event>) -> Result<(), String> {
    thread("children", move || {
        loop {
            let (pid, code) = match waitpid(None, None) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, code),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, 128 + signal as i32),
                Ok(_) | Err(Errno::EINTR) => continue,
                Err(_) => break, // ECHILD: the last one is gone.
            };
            if pid == worker {
                let _ = events.send(Event::Exited(code));
            }
        }
    })
}

fn thread(name: &str, body: impl FnOnce() + Send + 'static) -> Result<(), String> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .stack_size(128 << 10)
        .spawn(body)
        .map(drop)
        .map_err(|e| format!("cannot start a thread: {e}"))
}
