//! The real server as a child process, and a stand-in for a model's worker.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde_json::{Map, Value, json};

use crate::ours::{model, models as model_count};

/// How long a start may take before the run is given up.
const START_LIMIT: Duration = Duration::from_secs(120);
/// How long the stand-in holds a job.
const HELD: Duration = Duration::from_secs(300);

/// A running server; killed when dropped.
pub(crate) struct Server {
    child: Child,
    pub(crate) address: SocketAddr,
    /// When its process was started.
    pub(crate) started: Instant,
    /// From then to its line that says where it listens.
    pub(crate) listening_after: Duration,
}

impl Server {
    /// Starts the server on `dir/data` and waits until it says that it listens. Its models need a GPU, and it is told that
    /// there is none, so their jobs wait; with `worker`, the first model has a worker that is ready at once, holds four
    /// jobs and needs no GPU.
    pub(crate) fn start(program: &Path, dir: &Path, worker: bool) -> anyhow::Result<Self> {
        Self::start_by(&mut Command::new(program), program, dir, worker)
    }

    /// The same as an argument of `wrapper`.
    pub(crate) fn start_under(program: &Path, dir: &Path, wrapper: &mut Command) -> anyhow::Result<Self> {
        Self::start_by(wrapper.arg(program), program, dir, true)
    }

    fn start_by(command: &mut Command, program: &Path, dir: &Path, worker: bool) -> anyhow::Result<Self> {
        anyhow::ensure!(program.exists(), "{} is missing: build it with cargo build --release", program.display());
        wait_for_lock(&dir.join("data").join("lock"));
        let config = dir.join("models.yaml");
        std::fs::write(&config, serde_json::to_string_pretty(&models(dir, worker)?)?)?;
        let log = std::fs::File::options().create(true).append(true).open(dir.join("server.log"))?;
        let started = Instant::now();
        let mut child = command
            .args(["serve", "--listen", "127.0.0.1:0", "--config"])
            .arg(&config)
            .arg("--data-dir")
            .arg(dir.join("data"))
            .env_remove("ROUNDHOUSE_API_KEYS")
            .env_remove("RUNPOD_POD_ID")
            .env("ROUNDHOUSE_GPU_PROBE", "none")
            .env("ROUNDHOUSE_LOG", "warn")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let stdout = child.stdout.take().context("no stdout")?;
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                // Nobody listens after the start: read on, so that the server never blocks on a full pipe.
                let _ = sender.send((Instant::now(), line));
            }
        });
        let mut server =
            Self { child, address: SocketAddr::from(([127, 0, 0, 1], 0)), started, listening_after: Duration::ZERO };
        loop {
            let left = START_LIMIT.saturating_sub(started.elapsed());
            let (at, line) = lines.recv_timeout(left).with_context(|| {
                let log = std::fs::read_to_string(dir.join("server.log")).unwrap_or_default();
                let tail: Vec<&str> = log.lines().rev().take(8).collect();
                format!(
                    "the server did not start; its log ends:\n{}",
                    tail.into_iter().rev().collect::<Vec<_>>().join("\n")
                )
            })?;
            if let Some((_, rest)) = line.split_once("listening on http://") {
                server.address = rest.split_whitespace().next().unwrap_or_default().parse()?;
                server.listening_after = at - started;
                return Ok(server);
            }
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Resident memory, bytes.
    pub(crate) fn resident(&self) -> f64 {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap_or_default();
        let kib =
            text.lines().find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse::<f64>().ok());
        kib.unwrap_or(0.0) * 1024.0
    }

    /// As `kill -9` does.
    pub(crate) fn kill(&mut self) {
        // An error here means that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    /// Asks it to end, and waits for that.
    pub(crate) fn end_gently(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.pid().cast_signed());
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT);
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(15) && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// A store that was just dropped keeps its data dir until its last change is written.
fn wait_for_lock(lock: &Path) {
    for _ in 0..2_000 {
        match std::fs::File::open(lock).map(|file| file.try_lock()) {
            Ok(Err(std::fs::TryLockError::WouldBlock)) => std::thread::sleep(Duration::from_millis(5)),
            _ => return,
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

fn models(dir: &Path, worker: bool) -> anyhow::Result<Value> {
    let mut models = Map::new();
    for n in 0..model_count() {
        let entry = if worker && n == 0 {
            let program = std::env::current_exe()?;
            let command =
                [&program.display().to_string(), "--dir", &dir.display().to_string(), "--play-worker", "{port}"];
            json!({"type": "text", "command": command, "gpus": 0, "startup_time": 1, "limit": 4})
        } else {
            json!({"type": "text", "command": ["false"], "gpus": 1, "startup_time": 1})
        };
        models.insert(model(n.cast_signed()), entry);
    }
    let room = 100_000_000;
    Ok(json!({"models": models, "scheduler": {"queued_max": room, "queued_per_tenant_max": room}}))
}

/// Where the stand-in leaves its process id.
pub(crate) const WORKER_PID: &str = "worker.pid";

/// A worker that is ready at once and holds each job.
pub(crate) fn play_worker(port: u16, dir: &Path) -> anyhow::Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", port))?;
    std::fs::write(dir.join(WORKER_PID), std::process::id().to_string())?;
    for stream in listener.incoming() {
        let stream = stream?;
        std::thread::spawn(move || answer(stream));
    }
    Ok(())
}

fn answer(mut stream: TcpStream) {
    let mut read = Vec::new();
    let mut some = [0_u8; 4096];
    loop {
        match stream.read(&mut some) {
            Ok(n) if n > 0 => read.extend_from_slice(&some[..n]),
            _ => return,
        }
        let Some(head) = read.windows(4).position(|four| four == b"\r\n\r\n") else { continue };
        let text = String::from_utf8_lossy(&read[..head]).to_ascii_lowercase();
        let length = text.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse::<usize>().ok());
        if read.len() < head + 4 + length.unwrap_or(0) {
            continue;
        }
        if text.starts_with("post") {
            std::thread::sleep(HELD);
        }
        if stream
            .write_all(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}")
            .is_err()
        {
            return;
        }
        read.clear();
    }
}
