//! A server in a folder of its own, with an echo worker for each model of a trace. Ends with its value.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Map, Value, json};
use tempfile::TempDir;
use tokio::process::{Child, Command};
use tokio::time::Instant;

use super::ReplayArgs;
use crate::cli::api;
use crate::sim::Trace;

/// Longest wait for the server to answer, and for it to end.
const PATIENCE: Duration = Duration::from_secs(30);
/// Lines of its log that are shown when something fails.
const LAST_LINES: usize = 8;
/// Of an attempt, by the trace's clock: longer than any.
const TIMEOUT: &str = "1000h";
/// More than any trace has.
const JOBS_MAX: u64 = 10_000_000;

/// Where the worker answers each request by itself.
pub(super) const CHAT: &str = "/v1/chat/completions";

/// Says why a trace cannot be replayed on the server as it is.
pub(super) fn check(trace: &Trace) -> anyhow::Result<()> {
    if trace.gpus != 1 || trace.host_gb > 0.0 {
        bail!(
            "it is for {} GPUs and {} GB of host memory for parked models; replay drives a box with one GPU and no such \
             memory (simulate plays every box)",
            trace.gpus,
            trace.host_gb
        );
    }
    Ok(())
}

/// A running server.
pub(super) struct Server {
    child: Child,
    dir: TempDir,
    pub(super) base: String,
    keep: bool,
}

impl Server {
    /// Writes the model file and starts the server; comes back when it answers.
    pub(super) async fn start(trace: &Trace, args: &ReplayArgs) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("roundhouse-replay-").tempdir().context("cannot make a folder")?;
        let worker = Worker::of(args)?;
        let file = dir.path().join("models.yaml");
        let text = serde_json::to_string_pretty(&model_file(trace, args.factor, &worker)?)?;
        std::fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
        let port = free_port()?;
        let log = std::fs::File::create(dir.path().join("server.log")).context("cannot make the server's log")?;
        let mut command = Command::new(std::env::current_exe().context("this program's own file")?);
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("ROUNDHOUSE_")) {
            command.env_remove(name);
        }
        command
            .arg("serve")
            .arg("--config")
            .arg(&file)
            .arg("--data-dir")
            .arg(dir.path().join("data"))
            .args(["--listen", &format!("127.0.0.1:{port}")])
            .env("ROUNDHOUSE_API_KEYS", keys(trace))
            .env("ROUNDHOUSE_CLOCK_FACTOR", args.factor.to_string())
            .env("ROUNDHOUSE_FAKE_GPUS", format!("{}x{}", trace.gpus, mib(trace.gpu_gb)))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            // Ctrl-C is for us, who then stop it.
            .process_group(0)
            .kill_on_drop(true);
        let child = command.spawn().context("cannot start the server")?;
        let mut server = Self { child, dir, base: format!("http://127.0.0.1:{port}"), keep: args.keep };
        match server.answers(trace).await {
            Ok(()) => Ok(server),
            Err(error) => Err(error.context(server.last_words())),
        }
    }

    async fn answers(&mut self, trace: &Trace) -> anyhow::Result<()> {
        let api = self.api(&trace.tenants[0])?;
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait()? {
                bail!("the server ended at once ({status})");
            }
            match api.get("/readyz").await {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() > until => return Err(error),
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    /// A client with the key of a tenant.
    pub(super) fn api(&self, tenant: &str) -> anyhow::Result<api::Server> {
        api::Server::new(&self.base, Some(key(tenant)))
    }

    /// The end of its log, for an error.
    pub(super) fn last_words(&self) -> String {
        let log = std::fs::read_to_string(self.dir.path().join("server.log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        format!("the server's last lines:\n{}\n", lines[lines.len().saturating_sub(LAST_LINES)..].join("\n"))
    }

    /// Ends it in order, and removes its folder.
    pub(super) async fn stop(mut self) -> anyhow::Result<()> {
        if let Some(pid) = self.child.id() {
            let _ = kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGTERM);
        }
        let ended = tokio::time::timeout(PATIENCE, self.child.wait()).await;
        if self.keep {
            let path = self.dir.keep();
            tracing::warn!("kept: {}", path.display());
        }
        ended.context("the server did not end in time and was killed")?.context("lost the server")?;
        Ok(())
    }
}

fn key(tenant: &str) -> String {
    format!("replay-{tenant}")
}

fn keys(trace: &Trace) -> String {
    trace.tenants.iter().map(|tenant| format!("{tenant}:{}", key(tenant))).collect::<Vec<_>>().join(",")
}

/// How a worker is started.
struct Worker {
    python: PathBuf,
    script: PathBuf,
}

impl Worker {
    fn of(args: &ReplayArgs) -> anyhow::Result<Self> {
        let script = args.echo.join("server.py");
        let script = std::path::absolute(&script)?;
        if !script.is_file() {
            bail!("--echo: {} is missing; name the folder models/echo of the project", script.display());
        }
        let python = match &args.python {
            Some(python) => python.clone(),
            None => args.echo.join(".venv/bin/python"),
        };
        // Not resolved: a Python knows its environment by the path that it was called by.
        let python = std::path::absolute(&python)?;
        if !python.is_file() {
            bail!(
                "{} is missing; install the echo worker's requirements there, or name a Python that has them with --python",
                python.display()
            );
        }
        Ok(Self { python, script })
    }
}

fn model_file(trace: &Trace, factor: f64, worker: &Worker) -> anyhow::Result<Value> {
    let mut models = Map::new();
    for model in &trace.models {
        // The worker lives in real time, and the server by the trace's clock.
        let load_s = model.cold_s / factor;
        let command = [
            shown(&worker.python),
            shown(&worker.script),
            "--port".to_owned(),
            "{port}".to_owned(),
            "--name".to_owned(),
            "{name}".to_owned(),
            "--share-alpha".to_owned(),
            model.alpha.to_string(),
            "--load-s".to_owned(),
            load_s.to_string(),
            "--load-from-start".to_owned(),
            "--end-at-once".to_owned(),
        ];
        let mut entry = json!({
            "command": command, "gpus": model.gpus, "memory": mib(model.gb_per_gpu), "port": free_port()?,
            "startup_time": model.cold_s, "limit": model.limit, "timeout": TIMEOUT, "max_attempts": 1,
        });
        if model.join {
            entry["type"] = json!("text");
        } else {
            // What starts together is a run; the worker answers each of its jobs when that has had its share.
            (entry["type"], entry["endpoint"], entry["max_batch"]) = (json!("custom"), json!(CHAT), json!(model.limit));
        }
        models.insert(model.name.clone(), entry);
    }
    Ok(json!({
        "models": models,
        "scheduler": {"queued_max": JOBS_MAX, "queued_per_tenant_max": JOBS_MAX},
    }))
}

/// A size as the server reads it.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "at most 10^9 GB, never negative")]
fn mib(gb: f64) -> String {
    format!("{}MiB", (gb * 1e9 / f64::from(1 << 20)).round().max(1.0) as u64)
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0)).context("no free port")?.local_addr()?.port())
}
