//! The shape of `models.yaml`. Doc comments here become the descriptions of the JSON Schema, which editors show.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_saphyr::{MessageFormatter, Spanned};

use super::units::{Command, Period, Room, Share, Size, Word};
use crate::domain::ModelKind;

/// Models and settings of a Roundhouse server.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields, title = "models.yaml")]
pub(super) struct File {
    /// Models by name: the name that clients put into `model`.
    #[schemars(required, with = "BTreeMap<String, Entry>")]
    pub(super) models: Option<Entries>,
    /// How waiting time is traded against swaps, and how much may wait.
    pub(super) scheduler: Option<Scheduler>,
    /// The HTTP server and its workers' grace periods.
    pub(super) server: Option<Server>,
    /// How long things are kept, and how much room they take.
    pub(super) storage: Option<Storage>,
    /// Tenants by the name of their API key; `default` without keys.
    pub(super) tenants: Option<BTreeMap<String, Tenant>>,
}

/// One tenant.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub(super) struct Tenant {
    /// Its share of the GPUs while others want them, too: twice the weight, twice the time. Default 1.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub(super) weight: Option<At<f64>>,
}

/// The entries of `models:` in the order of the file.
#[derive(Debug)]
pub(super) struct Entries(pub(super) Vec<(At<String>, Entry)>);

/// One model.
#[derive(Debug, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
#[schemars(extend("oneOf" = [{ "required": ["service_script"] }, { "required": ["command"] }]))]
pub(super) struct Entry {
    /// What it makes; chooses the defaults of `endpoint`, `limit`, `max_batch` and `timeout`.
    #[serde(rename = "type")]
    #[schemars(required)]
    pub(super) kind: Option<At<Kind>>,
    /// Python program that serves it, relative to this file. Runs with `.venv/bin/python` of its folder, as
    /// `server.py --name NAME --port PORT --model MODEL`, with `--revision REVISION` if the entry has one, and `args`. Either
    /// this or `command`.
    pub(super) service_script: Option<At<String>>,
    /// Any program that serves the endpoint and answers `GET /health` or `GET /v1/models`; `{port}`, `{model}`,
    /// `{name}` and `{revision}` are filled in. One string, split as a shell would (nothing is expanded), or a list of words.
    pub(super) command: Option<At<Command>>,
    /// Hugging Face id, or a folder relative to this file.
    pub(super) model: Option<At<String>>,
    /// Branch, tag or commit on Hugging Face that is fetched, and that the worker is told to load.
    pub(super) revision: Option<At<String>>,
    /// Preferred port on 127.0.0.1; if it is taken, the next free one in 8001-8999. Default: 8001 for the first model,
    /// 8002 for the second and so on.
    #[schemars(range(min = 1024, max = 65535))]
    pub(super) port: Option<At<u16>>,
    /// Expected time of a cold load, until loads have been measured. Default 60.
    pub(super) startup_time: Option<At<Period>>,
    /// Main path of the worker. Required for `custom`.
    pub(super) endpoint: Option<At<String>>,
    /// All paths of the worker, if not those that are usual for its type.
    pub(super) endpoints: Option<At<Vec<At<String>>>>,
    /// More words for the worker's command line.
    pub(super) args: Option<At<Vec<Word>>>,
    /// Environment of the worker, besides the server's own without what looks like a credential. A name without a value
    /// (`MY_TOKEN:`) passes the server's own value on, if it has one.
    pub(super) env: Option<At<BTreeMap<String, Option<Word>>>>,
    /// Other names clients may use for it.
    pub(super) aliases: Option<At<Vec<At<String>>>>,
    /// Most requests on the worker at once. Default 256 for text, else `max_batch`.
    #[schemars(range(min = 1))]
    pub(super) limit: Option<At<u32>>,
    /// Most requests in one pass; fewer are sent where more do not pay, which is measured. Default 16 for audio; images
    /// with a `service_script` and no `limit` begin with 1 and may come to 8; text engines batch by themselves (`limit`);
    /// 1 for all else.
    #[schemars(range(min = 1))]
    pub(super) max_batch: Option<At<u32>>,
    /// Longest time of one attempt. Default 600 for text and custom, 300 for images, 900 for audio.
    pub(super) timeout: Option<At<Period>>,
    /// How often a job that failed by itself is tried. Default 3.
    #[schemars(range(min = 1))]
    pub(super) max_attempts: Option<At<u32>>,
    /// Unload after this long without work. Default: stays until another model needs the device.
    pub(super) idle_ttl: Option<At<Period>>,
    /// Load when the server starts. Default false.
    pub(super) preload: Option<bool>,
    /// GPUs it needs; 0 marks a model that runs on the CPU. Default 1.
    pub(super) gpus: Option<At<u32>>,
    /// Memory it needs on each GPU, for example 18GiB. Default: learned.
    pub(super) memory: Option<At<Size>>,
    /// Most workers of it at once: more than one is loaded on GPUs that nobody else needs, while its backlog is worth it.
    /// Default 1.
    #[schemars(range(min = 1, max = 64))]
    pub(super) max_replicas: Option<At<u32>>,
    /// Never displaced once it is loaded; the other models share what is left. Default false.
    pub(super) pin: Option<bool>,
    /// Shares its GPUs with no other model, whatever their memory. Default false.
    pub(super) exclusive: Option<bool>,
    /// Where it goes when others need its GPUs: `ram` keeps it in host memory, from which it comes back in about a second (its
    /// worker answers `POST /sleep` and `/wake_up`; see `scheduler.park_ram`), `checkpoint` has the driver do the same to any
    /// worker, slower (NVIDIA driver 570 or newer), `off` ends its worker. Default off.
    pub(super) park: Option<At<Park>>,
    /// Keep a process that has imported everything heavy and becomes its next worker, so that a cold load begins with reading. It
    /// takes host memory (1-2 GB with torch) that `scheduler.park_ram` does not count; models with the same script, interpreter
    /// and `env` share one. Default false.
    pub(super) spare: Option<At<bool>>,
    /// Interpreter of `service_script`, if not the one of its `.venv`.
    pub(super) python: Option<At<String>>,
    /// The `model` field of requests as the worker sees it. Default: the entry's name.
    pub(super) upstream_model: Option<At<String>>,
}

/// What a model makes.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub(super) enum Kind {
    /// Chat and completions.
    Text,
    /// Images.
    Image,
    /// Music and speech.
    Audio,
    /// Anything else behind its endpoint.
    Custom,
}

/// Where a model goes when others need its GPUs.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub(super) enum Park {
    /// To host memory, by its worker.
    Ram,
    /// To host memory, by the driver.
    Checkpoint,
    /// Nowhere: its worker ends.
    Off,
}

impl From<Kind> for ModelKind {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Text => Self::Text,
            Kind::Image => Self::Image,
            Kind::Audio => Self::Audio,
            Kind::Custom => Self::Custom,
        }
    }
}

/// How waiting time is traded against swaps, and how much may wait.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub(super) struct Scheduler {
    /// Target waits.
    pub(super) max_wait: Option<MaxWait>,
    /// Longest hold of a model while another one is due. Default 5m.
    pub(super) max_visit: Option<At<Period>>,
    /// Share of device time that early swaps may cost.
    pub(super) swap_budget: Option<SwapBudget>,
    /// Host memory that parked models may take together, as a size or as a share of all of it (or of the container's limit);
    /// 0: none is parked. Default 60%.
    pub(super) park_ram: Option<At<Room>>,
    /// Most jobs queued in all. Default 2000000.
    #[schemars(range(min = 1))]
    pub(super) queued_max: Option<At<usize>>,
    /// Most jobs queued per tenant. Default 500000.
    #[schemars(range(min = 1))]
    pub(super) queued_per_tenant_max: Option<At<usize>>,
    /// Most synchronous calls waiting at once. Default 4000.
    #[schemars(range(min = 1))]
    pub(super) waiting_sync_max: Option<At<usize>>,
    /// What a GPU costs for an hour, in whatever money: `/v1/usage` shows costs then.
    #[schemars(range(min = 0))]
    pub(super) gpu_hourly_cost: Option<At<f64>>,
}

/// Target waits by class.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub(super) struct MaxWait {
    /// Target wait of a caller on the line. Default 60.
    pub(super) interactive: Option<At<Period>>,
    /// Longest a model with batch jobs goes unvisited before it is due. Default 15m.
    pub(super) batch: Option<At<Period>>,
}

/// Share of device time that early swaps may cost; between 0 and 1, for example 50%.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub(super) struct SwapBudget {
    /// In favour of interactive callers over batch work. Default 50%.
    pub(super) interactive: Option<At<Share>>,
    /// All other early swaps. Default 15%.
    pub(super) other: Option<At<Share>>,
}

/// The HTTP server and its workers' grace periods.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub(super) struct Server {
    /// Address to listen on; `--listen` and ROUNDHOUSE_LISTEN win. Default 127.0.0.1:9000.
    pub(super) listen: Option<At<String>>,
    /// Where clients reach the server, for absolute URLs; ROUNDHOUSE_PUBLIC_URL wins. Default on RunPod: the pod's
    /// proxy.
    pub(super) public_url: Option<At<String>>,
    /// A synchronous call is answered by a redirect to its result after this long. Default 85.
    pub(super) sync_hop: Option<At<Period>>,
    /// Most redirects of one call. Default 9.
    pub(super) sync_max_hops: Option<At<u32>>,
    /// A synchronous job that nobody asks for is cancelled after this long. Default 30.
    pub(super) hop_grace: Option<At<Period>>,
    /// A synchronous job whose connection broke is cancelled after this long. Default 2.
    pub(super) disconnect_grace: Option<At<Period>>,
    /// Longest request body. Default 10MiB.
    pub(super) body_bytes_max: Option<At<Size>>,
    /// From SIGTERM to SIGKILL of a worker. Default 10.
    pub(super) worker_grace: Option<At<Period>>,
    /// A load that takes longer than this, and longer than 10 times its model's `startup_time`, is ended. Default 10m.
    pub(super) load_limit: Option<At<Period>>,
    /// First wait after a failed load; doubles. Default 10.
    pub(super) backoff_first: Option<At<Period>>,
    /// Longest wait after failed loads. Default 10m.
    pub(super) backoff_max: Option<At<Period>>,
    /// How long running jobs may finish after SIGTERM of the server. Default 30.
    pub(super) shutdown_grace: Option<At<Period>>,
}

/// How long things are kept, and how much room they take.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub(super) struct Storage {
    /// How long what a job held (body, answer, events, files) is kept after its end; at most `tombstone_ttl`. Default 168h
    /// (7 days).
    pub(super) results_ttl: Option<At<Period>>,
    /// The same for synchronous calls. Default 24h.
    pub(super) sync_ttl: Option<At<Period>>,
    /// The same for members of a batch. Default 720h (30 days).
    pub(super) batch_ttl: Option<At<Period>>,
    /// How long after its end a job can still be looked up. Default 720h (30 days).
    pub(super) tombstone_ttl: Option<At<Period>>,
    /// Room for all that jobs hold, waiting ones included: at the limit, expired ones go first, then answers that were
    /// fetched, then new jobs are refused. Default half of what is free on the disk at the first start.
    pub(super) quota: Option<At<Size>>,
    /// New jobs are refused while less than this is free on the disk. Default 512MiB.
    pub(super) free_min: Option<At<Size>>,
    /// Room set aside for the answers of running jobs when the disk is full. Default 64MiB.
    pub(super) reserve: Option<At<Size>>,
    /// Pages (4 KiB) of the write-ahead log after which it is copied into the database. Default 1000.
    pub(super) wal_pages: Option<At<u32>>,
    /// A folder on a disk that outlives the data dir's, for example a network volume: copies of all jobs are kept there, and
    /// restored where the data dir is empty. `--snapshot-dir` and ROUNDHOUSE_SNAPSHOT_DIR win. Default: none.
    pub(super) snapshot_dir: Option<At<PathBuf>>,
    /// How often such a copy is made; what was accepted since the last one is lost with the data dir. `--snapshot-every` and
    /// ROUNDHOUSE_SNAPSHOT_EVERY win. Default 60.
    pub(super) snapshot_every: Option<At<Period>>,
}

impl File {
    /// The entries in the order of the file.
    pub(super) fn entries(&self) -> &[(At<String>, Entry)] {
        self.models.as_ref().map_or(&[], |entries| &entries.0)
    }

    /// Reads the file; keys that it does not know are skipped here (`keys` reports them).
    pub(super) fn parse(text: &str) -> Result<Self, serde_saphyr::Error> {
        serde_saphyr::from_str_with_options(text, options())
    }
}

/// Options of both readings of the file.
pub(super) fn options() -> serde_saphyr::Options {
    serde_saphyr::options! {
        with_snippet: false,
        // Reported by `keys`, with the line of the first one.
        duplicate_keys: serde_saphyr::DuplicateKeyPolicy::LastWins,
    }
}

/// The line an error points at, 1-based.
pub(super) fn line_of(error: &serde_saphyr::Error) -> Option<usize> {
    let line = error.location()?.line();
    usize::try_from(line).ok().filter(|line| *line > 0)
}

/// An error's text without its place.
pub(super) fn message_of(error: &serde_saphyr::Error) -> String {
    serde_saphyr::UserMessageFormatter.format_message(error.without_snippet()).into_owned()
}

/// A value and the line it stands on.
#[derive(Clone, Debug)]
pub(super) struct At<T> {
    pub(super) line: usize,
    pub(super) value: T,
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for At<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<T>::deserialize(deserializer)?;
        Ok(Self { line: usize::try_from(spanned.referenced.line()).unwrap_or(0), value: spanned.value })
    }
}

impl<T: JsonSchema> JsonSchema for At<T> {
    fn inline_schema() -> bool {
        T::inline_schema()
    }

    fn schema_name() -> Cow<'static, str> {
        T::schema_name()
    }

    fn schema_id() -> Cow<'static, str> {
        T::schema_id()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        T::json_schema(generator)
    }
}

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map, name: settings")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}
