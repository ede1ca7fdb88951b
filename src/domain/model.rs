//! A model: one entry of `models.yaml` after validation, and the state its worker is in.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::job::text_enum;

text_enum! {
    /// What a model makes.
    ModelKind {
        /// Chat and completions.
        Text => "text",
        /// Images.
        Image => "image",
        /// Music and speech.
        Audio => "audio",
        /// Anything else behind its endpoint.
        Custom => "custom",
    }
}

text_enum! {
    /// Where a model is, from nothing to serving and back. Its supervisor task is the only writer.
    ModelState {
        /// No process.
        Absent => "absent",
        /// Weights are being fetched.
        Fetching => "fetching",
        /// The process is up and loads.
        Loading => "loading",
        /// Ready to serve, on the device.
        Resident => "resident",
        /// No new jobs; running ones finish.
        Draining => "draining",
        /// Going to host memory.
        Parking => "parking",
        /// In host memory.
        Parked => "parked",
        /// Coming back to the device.
        Waking => "waking",
        /// A load failed; the next try has a time.
        Backoff => "backoff",
        /// Five loads in a row failed; tried every ten minutes.
        Quarantined => "quarantined",
        /// Cannot run here now, for example no GPU.
        Blocked => "blocked",
    }
}

/// How a worker process is started. `{port}`, `{model}`, `{name}` and `{revision}` in words are filled in at start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Launch {
    /// `python script --name N --port P --model M [--revision R] args...`
    Script {
        /// The interpreter; `None` if the model's venv is not installed, which is an error at load, not at start.
        python: PathBuf,
        /// Absolute path of server.py.
        script: PathBuf,
    },
    /// Any program, words already split.
    Command(Vec<String>),
}

impl Launch {
    /// The interpreter of the environment that is made beside `script`.
    pub fn own_python(script: &Path) -> PathBuf {
        script.parent().unwrap_or(Path::new("/")).join(".venv/bin/python")
    }

    /// What is wrong with the interpreter, by a look at the disk, and what to do; `name`: of the entry. `None`: it is there,
    /// there is to be none, or it is looked up in `PATH`.
    pub fn without_python(&self, name: &str) -> Option<String> {
        let Self::Script { python, script } = self else { return None };
        if python.is_file() || python.components().count() < 2 {
            return None;
        }
        let shown = python.display();
        let inside = python.join("bin/python");
        Some(if *python == Self::own_python(script) {
            format!("there is no interpreter {shown}; run `roundhouse models install {name}`")
        } else if inside.is_file() {
            format!("`python` names {shown}, which is a folder; did you mean {}?", inside.display())
        } else if python.is_dir() {
            format!("`python` names {shown}, which is a folder; name the interpreter")
        } else if python.components().any(|part| part.as_os_str() == "~") {
            format!("`python` names {shown}, which is not there: ~ is not expanded, write the whole path")
        } else {
            format!("`python` names {shown}, which is not there; make that environment, or correct or remove `python`")
        })
    }

    /// Whether its environment is the one that `roundhouse models install` makes, and is not there.
    pub fn is_not_installed(&self) -> bool {
        matches!(self, Self::Script { python, script } if *python == Self::own_python(script) && !python.is_file())
    }

    /// The key of an entry that makes this differ from `other`.
    fn edited_key(&self, other: &Self) -> &'static str {
        match (self, other) {
            (Self::Script { script, .. }, Self::Script { script: other, .. }) if script == other => "python",
            (_, Self::Script { .. }) => "service_script",
            (_, Self::Command(_)) => "command",
        }
    }
}

/// Where a model goes when others need its GPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Park {
    /// Nowhere: its worker ends.
    #[default]
    Off,
    /// To host memory; its worker knows how.
    Ram,
    /// To host memory; the driver does it to any process.
    Checkpoint,
}

impl Park {
    /// Whether it can be parked at all.
    pub fn is_on(self) -> bool {
        self != Self::Off
    }
}

/// One entry of `models.yaml`, defaults applied, paths absolute.
#[derive(Clone, PartialEq)]
pub struct ModelSpec {
    /// The entry's name.
    pub name: String,
    /// What it makes.
    pub kind: ModelKind,
    /// How its worker is started.
    pub launch: Launch,
    /// Hugging Face id or absolute folder.
    pub model: Option<String>,
    /// Branch, tag or commit of `model`, for the fetcher and the worker; `None`: `main`.
    pub revision: Option<String>,
    /// Preferred port; if taken, the next free one in 8001-8999.
    pub port: u16,
    /// The entry names that port; else it comes from the entry's place in the file, and means nothing.
    pub has_own_port: bool,
    /// Prior of a cold load.
    pub startup_time: Duration,
    /// Paths it serves; the first is the main one. Never empty.
    pub endpoints: Vec<String>,
    /// More words for the command line.
    pub args: Vec<String>,
    /// Environment of the worker.
    pub env: BTreeMap<String, String>,
    /// Other names clients may use.
    pub aliases: Vec<String>,
    /// Most jobs on the worker at once. At least 1.
    pub limit: u32,
    /// Most jobs in one run. At least 1; 1 for text, which the engine batches by itself.
    pub max_batch: u32,
    /// Jobs in one run until it is known what pays. At least 1, at most `max_batch`.
    pub first_batch: u32,
    /// Longest time of one attempt.
    pub timeout: Duration,
    /// Budget of a job's own retriable errors.
    pub max_attempts: u32,
    /// Unload after this long without work; `None` keeps it until another model needs the device.
    pub idle_ttl: Option<Duration>,
    /// Load at start.
    pub preload: bool,
    /// 0 marks a CPU model.
    pub gpus: u32,
    /// Declared device memory per GPU, in bytes.
    pub memory: Option<u64>,
    /// Most workers of it at once. At least 1.
    pub max_replicas: u32,
    /// Never displaced once it is loaded.
    pub pin: bool,
    /// Shares its GPUs with no other model.
    pub exclusive: bool,
    /// How its worker can go to host memory and come back.
    pub park: Park,
    /// A process that has imported what it needs is kept, and becomes its next worker.
    pub spare: bool,
    /// The `model` field of forwarded bodies.
    pub upstream_model: String,
    /// Working directory of the worker.
    pub dir: PathBuf,
}

impl ModelSpec {
    /// Whether a worker of it is started in the same way, on the same kind of place, as one of `other`. What it is called
    /// by clients, how many jobs it gets and how long it may take are not its worker's concern.
    pub fn starts_as(&self, other: &Self) -> bool {
        !self.differences(other).into_iter().any(|(_, restarts)| restarts)
    }

    /// The keys of the entry that `other` has written in another way, or that follow from such a key.
    pub fn edited_keys(&self, other: &Self) -> Vec<&'static str> {
        self.differences(other).into_iter().map(|(key, _)| key).collect()
    }

    /// The keys whose values differ, and whether a worker sees that.
    fn differences(&self, other: &Self) -> Vec<(&'static str, bool)> {
        // All of them, so that a new one is not forgotten.
        let Self {
            name,
            kind,
            launch,
            model,
            revision,
            port,
            has_own_port,
            startup_time,
            endpoints,
            args,
            env,
            aliases,
            limit,
            max_batch,
            first_batch,
            timeout,
            max_attempts,
            idle_ttl,
            preload,
            gpus,
            memory,
            max_replicas,
            pin,
            exclusive,
            park,
            spare,
            upstream_model,
            dir,
        } = self;
        let is_port_edited = has_own_port != &other.has_own_port || (*has_own_port && port != &other.port);
        let all = [
            ("name", name != &other.name, true),
            ("type", kind != &other.kind, true),
            (launch.edited_key(&other.launch), launch != &other.launch, true),
            ("model", model != &other.model, true),
            ("revision", revision != &other.revision, true),
            ("port", is_port_edited, true),
            ("args", args != &other.args, true),
            ("env", env != &other.env, true),
            ("gpus", gpus != &other.gpus, true),
            ("memory", memory != &other.memory, true),
            ("exclusive", exclusive != &other.exclusive, true),
            ("park", park != &other.park, true),
            ("the folder of models.yaml", dir != &other.dir, true),
            ("startup_time", startup_time != &other.startup_time, false),
            ("endpoint", endpoints != &other.endpoints, false),
            ("aliases", aliases != &other.aliases, false),
            ("limit", limit != &other.limit, false),
            ("max_batch", (max_batch, first_batch) != (&other.max_batch, &other.first_batch), false),
            ("timeout", timeout != &other.timeout, false),
            ("max_attempts", max_attempts != &other.max_attempts, false),
            ("idle_ttl", idle_ttl != &other.idle_ttl, false),
            ("preload", preload != &other.preload, false),
            ("max_replicas", max_replicas != &other.max_replicas, false),
            ("pin", pin != &other.pin, false),
            ("spare", spare != &other.spare, false),
            ("upstream_model", upstream_model != &other.upstream_model, false),
        ];
        all.into_iter().filter(|(_, differs, _)| *differs).map(|(key, _, restarts)| (key, restarts)).collect()
    }

    /// A hash of what its workers see that decides how much memory they take. Equal in all runs of the server for an entry that
    /// was not edited.
    pub fn fingerprint(&self) -> i64 {
        let seen = (&self.launch, &self.model, &self.revision, &self.args, &self.env);
        let placed = (self.gpus, self.memory, self.exclusive, self.park);
        super::shape::hash(&format!("{seen:?} {placed:?}"))
    }

    /// A hash of what decides which weights are fetched for it, and how; `None`: none are.
    pub fn fetch_fingerprint(&self) -> Option<i64> {
        let fetched = (self.repository()?, &self.revision, &self.launch, &self.env, &self.dir);
        Some(super::shape::hash(&format!("{fetched:?}")))
    }

    /// The Hugging Face repository whose files have to be here before its worker is started. `None`: its weights are a
    /// folder, or its own program gets them.
    pub fn repository(&self) -> Option<&str> {
        let is_script = matches!(self.launch, Launch::Script { .. });
        let is_repository = |model: &&str| !model.starts_with('/') && model.matches('/').count() == 1;
        self.model.as_deref().filter(|_| is_script).filter(is_repository)
    }

    /// `PYTHONPATH` for programs in this model's environment, which may not have the base service installed: what is `given`,
    /// then its folder, `base` beside the script's own or `models/base` beside models.yaml. `None`: it is in neither, or the
    /// model runs by a command.
    pub fn python_path(&self, given: Option<&OsStr>) -> Option<OsString> {
        let base = self.base()?;
        let given = given.filter(|given| !given.is_empty());
        let before = given.map(|given| std::env::split_paths(given).collect::<Vec<_>>()).unwrap_or_default();
        std::env::join_paths(before.into_iter().chain([base])).ok()
    }

    /// The folder of the base service.
    fn base(&self) -> Option<PathBuf> {
        let Launch::Script { script, .. } = &self.launch else { return None };
        let beside = script.parent().and_then(Path::parent).map(|models| models.join("base"));
        let mut places = beside.into_iter().chain([self.dir.join("models/base")]);
        places.find(|base| base.join("roundhouse_worker").is_dir())
    }

    /// The folders whose Python files its worker is made of: its script's and the base service's. None of a `command`.
    pub fn code_folders(&self) -> Vec<PathBuf> {
        let Launch::Script { script, .. } = &self.launch else { return Vec::new() };
        let own = script.parent().map(Path::to_owned);
        own.into_iter().chain(self.base().map(|base| base.join("roundhouse_worker"))).collect()
    }

    /// Whether its worker is told which port to listen on.
    pub fn tells_port(&self) -> bool {
        match &self.launch {
            Launch::Script { .. } => true,
            Launch::Command(words) => words.iter().chain(&self.args).any(|word| word.contains("{port}")),
        }
    }

    /// Whether `endpoint` is one of its paths.
    pub fn serves(&self, endpoint: &str) -> bool {
        self.endpoints.iter().any(|e| e == endpoint)
    }
}

impl fmt::Debug for ModelSpec {
    /// Environment values are hidden: they may hold secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ModelSpec")
            .field("name", &self.name)
            .field("kind", &self.kind)
            .field("launch", &self.launch)
            .field("model", &self.model)
            .field("port", &self.port)
            .field("endpoints", &self.endpoints)
            .field("env", &self.env.keys().collect::<Vec<_>>())
            .field("limit", &self.limit)
            .field("max_batch", &self.max_batch)
            .finish_non_exhaustive()
    }
}
