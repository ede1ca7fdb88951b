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
        let shape = |spec: &Self| Self {
            startup_time: Duration::ZERO,
            endpoints: Vec::new(),
            aliases: Vec::new(),
            limit: 0,
            max_batch: 0,
            first_batch: 0,
            timeout: Duration::ZERO,
            max_attempts: 0,
            idle_ttl: None,
            preload: false,
            max_replicas: 0,
            pin: false,
            spare: false,
            upstream_model: String::new(),
            ..spec.clone()
        };
        shape(self) == shape(other)
    }

    /// A hash of what its workers see that decides how much memory they take. Equal in all runs of the server for an entry that
    /// was not edited.
    pub fn fingerprint(&self) -> i64 {
        let seen = (&self.launch, &self.model, &self.revision, &self.args, &self.env);
        let placed = (self.gpus, self.memory, self.exclusive, self.park);
        super::shape::hash(&format!("{seen:?} {placed:?}"))
    }

    /// The Hugging Face repository whose files have to be here before its worker is started. `None`: its weights are a
    /// folder, or its own program gets them.
    pub fn repository(&self) -> Option<&str> {
        let is_script = matches!(self.launch, Launch::Script { .. });
        let is_repository = |model: &&str| !model.starts_with('/') && model.matches('/').count() == 1;
        self.model.as_deref().filter(|_| is_script).filter(is_repository)
    }

    /// `PYTHONPATH` for the base service's own programs in this model's environment, which may not have it installed: what is
    /// `given`, then `base` beside the script's folder, where our `server.py` look, too. `None`: it runs by a command.
    pub fn python_path(&self, given: Option<&OsStr>) -> Option<OsString> {
        let Launch::Script { script, .. } = &self.launch else { return None };
        let base = script.parent().and_then(Path::parent)?.join("base");
        let given = given.filter(|given| !given.is_empty());
        let before = given.map(|given| std::env::split_paths(given).collect::<Vec<_>>()).unwrap_or_default();
        std::env::join_paths(before.into_iter().chain([base])).ok()
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
