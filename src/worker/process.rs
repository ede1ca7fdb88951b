//! One worker process: start under the guard, log capture, stop of the whole group, sweep by instance mark.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use serde_json::{Map, Value, json};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::clock::{Clock, SystemClock};
use crate::domain::{Launch, Millis, ModelSpec};
use crate::lifecycle::Tasks;
use crate::worker::leftovers;
use crate::worker::logs::{self, Tail};
use crate::worker::ports::Lease;
use crate::worker::procfs::{Family, MARK};
use crate::worker::secrets::is_secret;

/// How long after the grace period the guard may take before its work is done for it. With the kill after it, a stubborn
/// worker is gone 2 s after the grace period.
const GUARD_SLACK: Duration = Duration::from_millis(1200);
/// How long SIGKILL may take until the log says that something is stuck.
const KILL_LIMIT: Duration = Duration::from_secs(30);
/// How long the last log lines may take to be read once every process is gone.
const LOG_LIMIT: Duration = Duration::from_secs(1);
/// Most that is waited at server start for orphans to end by themselves; they had their grace when the server died.
const ORPHAN_GRACE_MAX: Duration = Duration::from_secs(3);
/// How long their guards may take, once nothing else of them lives, to remove what they left and to end.
const GUARDS_END_WITHIN: Duration = Duration::from_secs(1);
/// What a worker writes is for the user alone that runs it: prompts and answers may be in it.
const UMASK: &str = "077";
/// Of what it would take by itself, the share that a worker is to make do with after it ran out of memory.
const SMALL_SCALE: &str = "0.85";
/// Of the grace period, what a worker needs at most to cancel what still runs and to free its device.
const LAST_STEPS: Duration = Duration::from_secs(2);

/// What a start needs besides the model.
pub(super) struct Start<'a> {
    pub(super) spec: &'a ModelSpec,
    pub(super) replica: u32,
    /// The GPUs that it may see, by the driver's numbers.
    pub(super) gpus: &'a [u32],
    /// Host memory that the copy of its weights may take, in bytes; `None`: it will not be parked.
    pub(super) park_bytes: Option<u64>,
    /// Memory that is free on the fullest of its GPUs, in bytes.
    pub(super) free_bytes: Option<u64>,
    /// It ran out of memory, and is to make do with less.
    pub(super) is_small: bool,
    pub(super) data_dir_id: &'a str,
    pub(super) log_dir: &'a Path,
    pub(super) program: &'a Path,
    pub(super) grace: Duration,
    pub(super) tasks: &'a Tasks,
}

/// A running worker under its guard. Dropping it closes the lifeline, and the guard then ends the worker.
pub(super) struct WorkerProcess {
    guard: Child,
    pid: i32,
    lifeline: Option<ChildStdin>,
    lease: Lease,
    mark: String,
    started_at: Millis,
    tail: Tail,
    capture: JoinHandle<()>,
    /// What it was started with.
    environment: BTreeMap<OsString, OsString>,
    log_path: watch::Sender<PathBuf>,
}

impl Start<'_> {
    fn environment(&self, mark: &str) -> BTreeMap<OsString, OsString> {
        let mut vars = environment(std::env::vars_os(), self.spec, self.gpus, (self.park_bytes, self.free_bytes), mark);
        if self.is_small {
            vars.insert("ROUNDHOUSE_MEMORY_SCALE".into(), SMALL_SCALE.into());
        }
        let running_s = (self.grace - LAST_STEPS.min(self.grace / 2)).as_secs_f64();
        vars.entry("ROUNDHOUSE_GRACE_S".into()).or_insert_with(|| running_s.to_string().into());
        vars
    }

    fn log_path(&self) -> PathBuf {
        logs::path(self.log_dir, &self.spec.name, self.replica)
    }
}

impl WorkerProcess {
    /// Starts the guard with the worker's command; the text of an error is for a person.
    pub(super) fn start(start: &Start, lease: Lease) -> Result<Self, String> {
        let command = command_line(start.spec, lease.port())?;
        Self::run(start, lease, &command, start.log_path())
    }

    /// As [`Self::start`], but it is a spare process, whose log is in `log_path` until it is a worker.
    pub(super) fn start_spare(start: &Start, lease: Lease, log_path: PathBuf) -> Result<Self, String> {
        let Launch::Script { python, script } = &start.spec.launch else {
            return Err(format!("model `{}`: its `command` cannot be started as a spare process", start.spec.name));
        };
        script_is_there(start.spec, script)?;
        let port = lease.port().to_string();
        let command = [python.into(), script.into(), "--spare".into(), "--port".into(), port.into()];
        Self::run(start, lease, &command, log_path)
    }

    fn run(start: &Start, lease: Lease, command: &[OsString], log_path: PathBuf) -> Result<Self, String> {
        let mark = format!("{}:{}", start.data_dir_id, nonce()?);
        let environment = start.environment(&mark);
        let (reader, writer) = std::io::pipe().map_err(|e| format!("cannot make a pipe: {e}"))?;
        let stderr = writer.try_clone().map_err(|e| format!("cannot make a pipe: {e}"))?;
        let mut guard = Command::new(start.program)
            .arg("guard")
            .arg("--grace-ms")
            .arg(start.grace.as_millis().to_string())
            .args(["--umask", UMASK])
            .arg("--")
            .args(command)
            .env_clear()
            .envs(&environment)
            .current_dir(&start.spec.dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::from(writer))
            .stderr(Stdio::from(stderr))
            .spawn()
            .map_err(|e| format!("cannot start {} in {}: {e}", start.program.display(), start.spec.dir.display()))?;
        // Taken out, since tokio closes a child's stdin when it is waited for.
        let lifeline = guard.stdin.take();
        let pid = guard.id().map_or(0, u32::cast_signed);
        let tail = Tail::default();
        let (log_path, path) = watch::channel(log_path);
        let capture =
            start.tasks.spawn("worker log", logs::capture(reader, path, tail.clone(), logs::FILE_LIMIT_BYTES));
        Ok(Self {
            guard,
            pid,
            lifeline,
            lease,
            mark,
            started_at: SystemClock::default().now(),
            tail,
            capture,
            environment,
            log_path,
        })
    }

    /// What a spare process is to be told to become the worker of `start`.
    pub(super) fn order(&self, start: &Start) -> Result<Value, String> {
        let words = command_line(start.spec, self.lease.port())?;
        // The interpreter and the script run already.
        order(&words[2..], &self.environment, &start.environment(&self.mark), &self.mark)
    }

    /// It is the worker of `start` now: so is its log from here on.
    pub(super) fn became(&self, start: &Start) {
        self.log_path.send_replace(start.log_path());
    }

    /// The guard's process id.
    pub(super) fn pid(&self) -> u32 {
        self.pid.cast_unsigned()
    }

    /// All processes that belong to it, its guard too.
    pub(super) fn family(&self) -> Family {
        Family::Instance { mark: self.mark.clone(), session: Some(self.pid) }
    }

    /// The numbers of its processes, its guard among them.
    pub(super) async fn pids(&self) -> BTreeSet<u32> {
        let family = self.family();
        let living = blocking(move || family.living(None)).await.unwrap_or_default();
        living.iter().map(|process| process.pid.cast_unsigned()).chain([self.pid()]).collect()
    }

    pub(super) fn port(&self) -> u16 {
        self.lease.port()
    }

    /// `<data dir id>:<nonce>`, as the worker's `/health` gives it back.
    pub(super) fn mark(&self) -> &str {
        &self.mark
    }

    /// Waits until the guard ends, which it does when the worker has ended; says how. Cancel-safe.
    pub(super) async fn exited(&mut self) -> String {
        match self.guard.wait().await {
            Ok(status) => describe(status),
            Err(error) => format!("cannot be waited for: {error}"),
        }
    }

    /// Ends the worker: SIGTERM, the grace period, SIGKILL; returns when nothing of it lives.
    pub(super) async fn stop(mut self, grace: Duration) -> Tail {
        drop(self.lifeline.take());
        if tokio::time::timeout(grace + GUARD_SLACK, self.guard.wait()).await.is_err() {
            tracing::warn!(process.pid = self.pid, "the guard did not end its worker in time");
        }
        self.clear_away().await
    }

    /// Ends the worker at once, with SIGKILL; returns when nothing of it lives. Also to be called after [`Self::exited`].
    pub(super) async fn clear_away(mut self) -> Tail {
        let family = self.family();
        let (guard, since) = (self.pid, self.started_at);
        let worker = family.clone();
        // The guard last: while it lives it waits for the worker's orphans.
        blocking(move || worker.kill(Some(guard), KILL_LIMIT)).await;
        drop(self.lifeline.take());
        if tokio::time::timeout(GUARD_SLACK / 2, self.guard.wait()).await.is_err() {
            if let Err(error) = self.guard.start_kill() {
                tracing::debug!(process.pid = guard, "cannot kill the guard: {error}");
            }
            if let Err(error) = self.guard.wait().await {
                tracing::warn!(process.pid = guard, "cannot wait for the guard: {error}");
            }
        }
        blocking(move || {
            if !family.kill(None, KILL_LIMIT) {
                tracing::error!("processes of a worker outlive SIGKILL");
            }
            leftovers::remove(since);
        })
        .await;
        if tokio::time::timeout(LOG_LIMIT, &mut self.capture).await.is_err() {
            tracing::warn!("a worker's log pipe is still held by somebody");
        }
        self.tail
    }
}

/// What makes a process that was started with the environment `has` the worker of these arguments; a null unsets a variable.
fn order(
    words: &[OsString],
    has: &BTreeMap<OsString, OsString>,
    wants: &BTreeMap<OsString, OsString>,
    mark: &str,
) -> Result<Value, String> {
    let text = |value: &OsString| value.to_str().map(str::to_owned);
    let changed = wants.iter().filter(|(name, value)| has.get(*name) != Some(value));
    let changed = changed.map(|(name, value)| (text(name), text(value).map(Value::from)));
    let dropped = has.keys().filter(|name| !wants.contains_key(*name)).map(|name| (text(name), Some(Value::Null)));
    let environment: Option<Map<String, Value>> = changed.chain(dropped).map(|(name, value)| name.zip(value)).collect();
    let arguments: Option<Vec<String>> = words.iter().map(text).collect();
    let (environment, arguments) =
        environment.zip(arguments).ok_or("its arguments or its environment are not in UTF-8")?;
    Ok(json!({"arguments": arguments, "environment": environment, "instance": mark}))
}

/// See [`super::supervisor::end_orphans`].
pub(super) async fn end_orphans(data_dir_id: &str, grace: Duration, since: Option<Millis>) -> usize {
    let (family, unguarded) =
        (Family::DataDir { id: data_dir_id.to_owned() }, Family::Unguarded { id: data_dir_id.to_owned() });
    let grace = grace.min(ORPHAN_GRACE_MAX);
    blocking(move || {
        let count = family.living(None).len();
        if count > 0 {
            tracing::warn!(processes = count, "ending processes that an earlier run left behind");
            family.terminate();
            let is_gone = family.wait_gone(grace) || {
                let is_killed = unguarded.kill(None, KILL_LIMIT);
                (is_killed && family.wait_gone(GUARDS_END_WITHIN))
                    || family.kill(None, if is_killed { KILL_LIMIT } else { Duration::ZERO })
            };
            if !is_gone {
                tracing::error!("processes of an earlier run outlive SIGKILL");
            }
        }
        // Their guards may have been killed, too.
        if let Some(since) = since {
            leftovers::remove(since);
        }
        count
    })
    .await
    .unwrap_or(0)
}

/// Runs blocking work beside the async threads. `None` only if it panicked or the program ends.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    tokio::task::spawn_blocking(work).await.ok()
}

/// The program and its words, placeholders filled in.
fn command_line(spec: &ModelSpec, port: u16) -> Result<Vec<OsString>, String> {
    match &spec.launch {
        Launch::Script { python, script } => {
            script_is_there(spec, script)?;
            let mut words: Vec<OsString> = vec![
                python.into(),
                script.into(),
                "--name".into(),
                spec.name.clone().into(),
                "--port".into(),
                port.to_string().into(),
            ];
            if let Some(model) = &spec.model {
                words.extend(["--model".into(), model.into()]);
                words.extend(spec.revision.iter().flat_map(|revision| ["--revision".into(), revision.into()]));
            }
            words.extend(spec.args.iter().map(OsString::from));
            Ok(words)
        }
        Launch::Command(words) => {
            if words.is_empty() {
                return Err("its `command` is empty".to_owned());
            }
            let all = words.iter().chain(&spec.args);
            all.map(|word| fill(word, spec, port).map(OsString::from)).collect()
        }
    }
}

fn script_is_there(spec: &ModelSpec, script: &Path) -> Result<(), String> {
    if !script.is_file() {
        return Err(format!("there is no script {}; correct `service_script`", script.display()));
    }
    interpreter_is_there(spec)
}

/// The text of an error is for a person.
pub(super) fn interpreter_is_there(spec: &ModelSpec) -> Result<(), String> {
    spec.launch.without_python(&spec.name).map_or(Ok(()), Err)
}

fn fill(word: &str, spec: &ModelSpec, port: u16) -> Result<String, String> {
    let mut word = word.replace("{port}", &port.to_string()).replace("{name}", &spec.name);
    for (key, value) in [("revision", &spec.revision), ("model", &spec.model)] {
        let placeholder = format!("{{{key}}}");
        word = match value {
            Some(value) => word.replace(&placeholder, value),
            None if word.contains(&placeholder) => {
                return Err(format!("its command uses {placeholder}, but the entry `{}` has no `{key}`", spec.name));
            }
            None => word,
        };
    }
    Ok(word)
}

/// The worker's environment: what the server has without its secrets, then ours, then the entry's, which wins; the base
/// service is found behind what these have in PYTHONPATH.
pub(super) fn environment(
    inherited: impl Iterator<Item = (OsString, OsString)>,
    spec: &ModelSpec,
    gpus: &[u32],
    (park_bytes, free_bytes): (Option<u64>, Option<u64>),
    mark: &str,
) -> BTreeMap<OsString, OsString> {
    // A name that is no text cannot be judged.
    let is_secret = |name: &OsString| name.to_str().is_none_or(is_secret);
    let mut vars: BTreeMap<OsString, OsString> = inherited.filter(|(name, _)| !is_secret(name)).collect();
    let mut set = |name: &str, value: &str| vars.insert(name.into(), value.into());
    set("HF_HUB_OFFLINE", "1");
    set("PYTHONUNBUFFERED", "1");
    // Else setproctitle, which vLLM uses, overwrites the environment that the mark is read from.
    set("SPT_NOENV", "1");
    if spec.gpus == 0 {
        set("CUDA_VISIBLE_DEVICES", "");
    } else if !gpus.is_empty() {
        let numbers: Vec<String> = gpus.iter().map(u32::to_string).collect();
        set("CUDA_VISIBLE_DEVICES", &numbers.join(","));
        // The driver's numbers are in this order; CUDA's own order is another.
        set("CUDA_DEVICE_ORDER", "PCI_BUS_ID");
    }
    if let Some(bytes) = spec.memory {
        set("ROUNDHOUSE_MEMORY_BYTES", &bytes.to_string());
    }
    if let Some(bytes) = park_bytes {
        set("ROUNDHOUSE_PARK_BYTES", &bytes.to_string());
    }
    if let Some(bytes) = free_bytes {
        set("ROUNDHOUSE_DEVICE_FREE_BYTES", &bytes.to_string());
    }
    for (name, value) in &spec.env {
        set(name, value);
    }
    set(MARK, mark);
    let python_path = spec.python_path(vars.get(OsStr::new("PYTHONPATH")).map(OsString::as_os_str));
    vars.extend(python_path.map(|path| ("PYTHONPATH".into(), path)));
    vars
}

pub(super) fn nonce() -> Result<String, String> {
    let number = getrandom::u64().map_err(|e| format!("no random numbers: {e}"))?;
    Ok(format!("{number:016x}"))
}

/// The guard passes its worker's exit on: its code, or 128 + signal.
pub(super) fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(127), _) => "could not be started (exit status 127)".to_owned(),
        (Some(code @ 129..=192), _) => {
            let signal = nix::sys::signal::Signal::try_from(code - 128);
            match signal {
                Ok(signal) => format!("was killed by {signal}"),
                Err(_) => format!("exited with status {code}"),
            }
        }
        (Some(code), _) => format!("exited with status {code}"),
        (None, Some(signal)) => format!("lost its guard to signal {signal}"),
        (None, None) => "exited".to_owned(),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::domain::{ModelKind, Park};

    /// A CPU model that runs `words`.
    pub(crate) fn spec(words: &[&str]) -> ModelSpec {
        ModelSpec {
            name: "toy".into(),
            kind: ModelKind::Custom,
            launch: Launch::Command(words.iter().map(|w| (*w).to_owned()).collect()),
            model: None,
            revision: None,
            port: 8001,
            has_own_port: false,
            startup_time: Duration::from_secs(1),
            endpoints: vec!["/echo".into()],
            args: Vec::new(),
            env: BTreeMap::new(),
            aliases: Vec::new(),
            limit: 1,
            max_batch: 1,
            first_batch: 1,
            timeout: Duration::from_secs(60),
            max_attempts: 3,
            idle_ttl: None,
            preload: false,
            gpus: 0,
            memory: None,
            max_replicas: 1,
            pin: false,
            exclusive: false,
            park: Park::Off,
            spare: false,
            upstream_model: "toy".into(),
            dir: "/".into(),
        }
    }

    #[test]
    fn placeholders_are_filled_in() {
        let mut spec = spec(&["serve", "{model}", "--port={port}"]);
        spec.args = vec!["--name".into(), "{name}".into()];
        let refused = command_line(&spec, 8005).unwrap_err();
        assert!(refused.contains("`toy`") && refused.contains("{model}"));
        spec.model = Some("org/m".into());
        assert_eq!(command_line(&spec, 8005).unwrap(), ["serve", "org/m", "--port=8005", "--name", "toy"]);
        spec.args = vec!["--rev={revision}".into()];
        let refused = command_line(&spec, 8005).unwrap_err();
        assert!(refused.contains("{revision}") && refused.contains("no `revision`"), "{refused}");
        spec.revision = Some("v1".into());
        assert_eq!(command_line(&spec, 8005).unwrap(), ["serve", "org/m", "--port=8005", "--rev=v1"]);
    }

    #[test]
    fn a_script_gets_its_flags_and_a_missing_interpreter_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("flux");
        std::fs::create_dir(&folder).unwrap();
        let (python, script) = (folder.join(".venv/bin/python"), folder.join("server.py"));
        let mut spec = spec(&[]);
        spec.model = Some("/weights".into());
        spec.args = vec!["--x".into()];
        spec.launch = Launch::Script { python: python.clone(), script: script.clone() };
        let refused = command_line(&spec, 1).unwrap_err();
        assert!(refused.contains("server.py") && refused.contains("service_script"), "{refused}");
        std::fs::write(&script, "").unwrap();
        let refused = command_line(&spec, 1).unwrap_err();
        assert!(
            refused.contains(".venv/bin/python") && refused.contains("`roundhouse models install toy`"),
            "{refused}"
        );
        spec.launch = Launch::Script { python: folder.join("mine/python"), script: script.clone() };
        let refused = command_line(&spec, 1).unwrap_err();
        assert!(refused.contains("`python` names") && !refused.contains("models install"), "{refused}");
        spec.launch = Launch::Script { python: "python3".into(), script: script.clone() };
        let words = command_line(&spec, 8002).unwrap();
        assert_eq!(words[1], script);
        assert_eq!(words[2..], ["--name", "toy", "--port", "8002", "--model", "/weights", "--x"]);
        spec.revision = Some("v1".into());
        let words = command_line(&spec, 8002).unwrap();
        assert_eq!(words[6..], ["--model", "/weights", "--revision", "v1", "--x"]);
    }

    #[test]
    fn a_spare_process_is_told_only_what_it_does_not_have() {
        let vars =
            |pairs: &[(&str, &str)]| pairs.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        let has = vars(&[("PATH", "/bin"), ("ROUNDHOUSE_MEMORY_BYTES", "5"), ("X", "1")]);
        let wants = vars(&[("PATH", "/bin"), ("CUDA_VISIBLE_DEVICES", "0"), ("X", "2")]);
        let told = order(&["--name".into(), "toy".into()], &has, &wants, "id:1").unwrap();
        let environment = json!({"CUDA_VISIBLE_DEVICES": "0", "ROUNDHOUSE_MEMORY_BYTES": null, "X": "2"});
        assert_eq!(told, json!({"arguments": ["--name", "toy"], "environment": environment, "instance": "id:1"}));
    }

    /// What a worker of `spec` is told by a variable.
    fn told(name: &str, spec: &ModelSpec, is_small: bool, grace: Duration) -> Option<OsString> {
        let (tasks, path) = (Tasks::new(), Path::new("/"));
        let start = Start {
            park_bytes: None,
            free_bytes: None,
            spec,
            replica: 0,
            gpus: &[],
            is_small,
            data_dir_id: "id",
            log_dir: path,
            program: path,
            grace,
            tasks: &tasks,
        };
        start.environment("id:1").remove(OsStr::new(name))
    }

    #[test]
    fn only_a_second_try_is_told_to_take_less() {
        let scale = |is_small| told("ROUNDHOUSE_MEMORY_SCALE", &spec(&["x"]), is_small, Duration::ZERO);
        assert_eq!((scale(false), scale(true)), (None, Some("0.85".into())));
    }

    #[test]
    fn a_worker_is_told_how_long_what_runs_may_take_after_sigterm() {
        let mut spec = spec(&["x"]);
        let running = |spec: &ModelSpec, grace_ms| {
            told("ROUNDHOUSE_GRACE_S", spec, false, Duration::from_millis(grace_ms)).unwrap()
        };
        let all = [10_000, 60_000, 3_000, 0].map(|grace_ms| running(&spec, grace_ms));
        assert_eq!(all, ["8", "58", "1.5", "0"]);
        spec.env.insert("ROUNDHOUSE_GRACE_S".into(), "3".into());
        assert_eq!(running(&spec, 10_000), "3", "the entry wins");
    }

    #[test]
    fn a_worker_sees_its_own_gpus_only() {
        let mut spec = spec(&["x"]);
        let seen = |spec: &ModelSpec, gpus: &[u32]| {
            let inherited = [("CUDA_VISIBLE_DEVICES".into(), "7".into())];
            let vars = environment(inherited.into_iter(), spec, gpus, (None, None), "id:1");
            ["CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"]
                .map(|name| vars.get(&OsString::from(name)).and_then(|v| v.to_str()).unwrap_or("-").to_owned())
        };
        assert_eq!(seen(&spec, &[]), ["", "-"]);
        spec.gpus = 2;
        assert_eq!(seen(&spec, &[2, 3]), ["2,3", "PCI_BUS_ID"]);
        assert_eq!(seen(&spec, &[]), ["7", "-"], "nobody said which");
    }

    #[test]
    fn a_script_in_an_environment_of_ones_own_finds_the_base_service() {
        let dir = tempfile::tempdir().unwrap();
        let with = |inherited: &[(&str, &str)], spec: &ModelSpec| {
            let inherited = inherited.iter().map(|(name, value)| (OsString::from(name), OsString::from(value)));
            let mut vars = environment(inherited, spec, &[], (None, None), "id:1");
            vars.remove(OsStr::new("PYTHONPATH")).and_then(|path| path.into_string().ok())
        };
        let launch = Launch::Script { python: "/mine/python".into(), script: dir.path().join("tone/server.py") };
        let mut own = ModelSpec { launch, dir: dir.path().into(), ..spec(&[]) };
        let theirs = [("PYTHONPATH", "/theirs")];
        assert_eq!(with(&theirs, &own).as_deref(), Some("/theirs"), "there is no base");
        let make = |folder: &str| {
            let base = dir.path().join(folder);
            std::fs::create_dir_all(base.join("roundhouse_worker")).unwrap();
            base.display().to_string()
        };
        let base = make("models/base");
        assert_eq!(with(&[], &own), Some(base.clone()), "beside models.yaml");
        assert_eq!(with(&theirs, &own), Some(format!("/theirs:{base}")));
        let base = make("base");
        assert_eq!(with(&[], &own), Some(base.clone()), "beside the script's folder");
        own.env.insert("PYTHONPATH".into(), "/entry".into());
        assert_eq!(with(&theirs, &own), Some(format!("/entry:{base}")));
        assert_eq!(with(&[], &ModelSpec { dir: dir.path().into(), ..spec(&["serve"]) }), None, "a command");
    }

    #[test]
    fn secrets_stay_with_the_server() {
        let inherited = [
            ("PATH", "/bin"),
            ("HF_TOKEN", "t"),
            ("HUGGING_FACE_HUB_TOKEN", "t"),
            ("RUNPOD_API_KEY", "t"),
            ("MY_DB_PASSWORD", "t"),
            ("GITHUB_TOKEN", "t"),
            ("WANTED_TOKEN", "t"),
            ("ROUNDHOUSE_API_KEYS", "a:t"),
            ("HF_HOME", "/hf"),
        ];
        let mut spec = spec(&["x"]);
        spec.memory = Some(5);
        let own = [("HF_HUB_OFFLINE", "0"), ("WANTED_TOKEN", "of the entry"), (MARK, "forged")];
        spec.env = own.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        let inherited = inherited.map(|(k, v)| (OsString::from(k), OsString::from(v)));
        let vars = environment(inherited.into_iter(), &spec, &[], (Some(0), Some(9)), "id:1");
        let get = |name: &str| vars.get(&OsString::from(name)).and_then(|v| v.to_str());
        assert!(vars.values().all(|v| v != "t" && v != "a:t"));
        assert_eq!(get("PATH"), Some("/bin"));
        assert_eq!(get("HF_HOME"), Some("/hf"));
        assert_eq!(get("HF_HUB_OFFLINE"), Some("0"), "the entry wins");
        assert_eq!(get("WANTED_TOKEN"), Some("of the entry"), "what the entry gives, the worker gets");
        assert_eq!(get("CUDA_VISIBLE_DEVICES"), Some(""));
        assert_eq!(get("ROUNDHOUSE_MEMORY_BYTES"), Some("5"));
        assert_eq!(get("ROUNDHOUSE_DEVICE_FREE_BYTES"), Some("9"));
        assert_eq!(get("ROUNDHOUSE_PARK_BYTES"), Some("0"), "none is left, which is not that nobody parks it");
        let vars = environment(std::iter::empty(), &spec, &[], (None, None), "id:1");
        assert_eq!(vars.get(&OsString::from("ROUNDHOUSE_PARK_BYTES")), None);
        assert_eq!(get(MARK), Some("id:1"), "but not over the mark");
    }
}
