//! `models.yaml` and the environment, as one typed tree.
//!
//! `file` is the shape of the file, `keys` finds misspelt keys, `units` reads durations and sizes, `entry` and `sections`
//! check values and fill in defaults. Everything that is wrong is reported at once, each with its line.

mod entry;
mod file;
mod keys;
mod sections;
mod units;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::domain::{ModelSpec, StorageSettings};
use crate::policy::Knobs;

/// Where the server listens if nobody says otherwise.
pub const DEFAULT_LISTEN: &str = "127.0.0.1:9000";

/// Everything a person can set.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The file it came from.
    pub path: PathBuf,
    /// Models by the order of the file.
    pub models: Vec<ModelSpec>,
    /// `scheduler:`
    pub scheduler: Knobs,
    /// `server:`
    pub server: ServerSettings,
    /// `storage:`
    pub storage: StorageSettings,
    /// `tenants:`, their weights by name; one that is not named weighs 1.
    pub weights: BTreeMap<String, f64>,
    /// `scheduler.gpu_hourly_cost`: what a GPU costs for an hour, in whatever money.
    pub gpu_hourly_cost: Option<f64>,
}

/// The `server:` section.
#[derive(Clone, Debug, PartialEq)]
pub struct ServerSettings {
    /// Address to listen on, if the environment or the file says; a flag wins (`cli::ServeArgs::load` puts it here).
    pub listen: Option<String>,
    /// Where clients reach us, for absolute URLs, without a slash at the end; default from RUNPOD_POD_ID, else none
    /// (relative).
    pub public_url: Option<String>,
    /// A sync call is answered by a 303 hop after this long.
    pub sync_hop: Duration,
    /// Most hops of one call.
    pub sync_max_hops: u32,
    /// A sync job without a next hop for this long is cancelled.
    pub hop_grace: Duration,
    /// A sync job whose connection broke is cancelled after this long.
    pub disconnect_grace: Duration,
    /// Longest JSON body, in bytes.
    pub body_bytes_max: usize,
    /// SIGTERM to SIGKILL of a worker.
    pub worker_grace: Duration,
    /// A load that takes longer than this, and than 10 times its `startup_time`, is ended.
    pub load_limit: Duration,
    /// First and longest back-off of failed loads.
    pub backoff_first: Duration,
    /// See `backoff_first`.
    pub backoff_max: Duration,
    /// How long running jobs may finish after SIGTERM of the server.
    pub shutdown_grace: Duration,
}

impl Default for ServerSettings {
    fn default() -> Self {
        Self {
            listen: None,
            public_url: None,
            sync_hop: Duration::from_secs(85),
            sync_max_hops: 9,
            hop_grace: Duration::from_secs(30),
            disconnect_grace: Duration::from_secs(2),
            body_bytes_max: 10 * 1024 * 1024,
            worker_grace: Duration::from_secs(10),
            // A first vLLM start compiles for minutes, and a cold disk reads 0.5 GB/s.
            load_limit: Duration::from_secs(600),
            backoff_first: Duration::from_secs(10),
            backoff_max: Duration::from_secs(600),
            shutdown_grace: Duration::from_secs(30),
        }
    }
}

/// One thing that is wrong with a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// 1-based; `None` if it concerns the whole file.
    pub line: Option<usize>,
    /// A flag or a variable is at fault, and not the file.
    pub is_outside: bool,
    /// What is wrong and what to do, naming the key.
    pub message: String,
}

/// Why a file was refused: all its problems, in the order of their lines. Shows one line for each: path, line, what to do.
#[derive(Debug)]
pub struct ConfigError {
    /// The file.
    pub path: String,
    /// At least one.
    pub problems: Vec<Problem>,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            match problem.line {
                Some(line) => write!(f, "{}:{line}: {}", self.path, problem.message)?,
                None if problem.is_outside => f.write_str(&problem.message)?,
                None => write!(f, "{}: {}", self.path, problem.message)?,
            }
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}

/// Collects what is wrong while a file is read.
#[derive(Debug, Default)]
struct Problems(Vec<Problem>);

impl Problems {
    fn add(&mut self, line: impl Into<Option<usize>>, message: impl Into<String>) {
        self.0.push(Problem { line: line.into(), is_outside: false, message: message.into() });
    }

    /// What a flag or a variable says.
    fn add_outside(&mut self, message: impl Into<String>) {
        self.0.push(Problem { line: None, is_outside: true, message: message.into() });
    }
}

/// Reads and checks a file. `env` looks up environment variables (a function, so that tests need no real ones):
/// `ROUNDHOUSE_LISTEN` and `ROUNDHOUSE_PUBLIC_URL` win over the file, `RUNPOD_POD_ID` gives `public_url` a default.
pub fn load(path: &Path, env: &dyn Fn(&str) -> Option<String>) -> Result<Config, ConfigError> {
    let fail = |problems| ConfigError { path: path.display().to_string(), problems };
    let whole = |message| fail(vec![Problem { line: None, is_outside: false, message }]);
    let text = std::fs::read_to_string(path).map_err(|error| {
        whole(format!("cannot read the model file: {error}; name another with --config or ROUNDHOUSE_CONFIG"))
    })?;
    let absolute = std::path::absolute(path).map_err(|error| whole(format!("cannot resolve the path: {error}")))?;
    let (config, mut problems) = parse(&absolute, &text, env);
    match config {
        Some(config) if problems.is_empty() => Ok(config),
        _ => {
            problems.sort_by_key(|problem| problem.line.unwrap_or(0));
            problems.dedup();
            Err(fail(problems))
        }
    }
}

/// The JSON Schema of the file, with a newline at the end; `docs/models.schema.json` is this text.
pub fn schema() -> String {
    let schema = schemars::schema_for!(file::File);
    let mut text =
        serde_json::to_string_pretty(&schema).unwrap_or_else(|error| format!("{{\"$comment\": \"{error}\"}}"));
    text.push('\n');
    text
}

/// Parts: misspelt keys, then types, then values. `None` if the file could not be understood at all.
fn parse(path: &Path, text: &str, env: &dyn Fn(&str) -> Option<String>) -> (Option<Config>, Vec<Problem>) {
    let mut problems = Problems::default();
    let tree = match keys::Node::parse(text) {
        Ok(tree) => tree,
        Err(error) => {
            problems.add(file::line_of(&error), file::message_of(&error));
            return (None, problems.0);
        }
    };
    let lacks_map = keys::check(&tree, &mut problems);
    let file = match file::File::parse(text) {
        Ok(file) => file,
        // Said already, and better.
        Err(_) if lacks_map => return (None, problems.0),
        Err(error) => {
            let line = file::line_of(&error);
            let place = line.and_then(|line| tree.path_at(line));
            let place = place.map(|place| format!("{place}: ")).unwrap_or_default();
            problems.add(line, format!("{place}{}", file::message_of(&error)));
            return (None, problems.0);
        }
    };
    let dir = path.parent().unwrap_or(Path::new("/"));
    let config = Config {
        path: path.to_path_buf(),
        models: entry::models(&file, dir, env, &mut problems),
        scheduler: sections::scheduler(&file, &mut problems),
        server: sections::server(&file, env, &mut problems),
        storage: sections::storage(&file, dir, &mut problems),
        weights: sections::weights(&file, &mut problems),
        gpu_hourly_cost: sections::gpu_hourly_cost(&file, &mut problems),
    };
    (Some(config), problems.0)
}

/// A duration as it is written in the file and in flags: seconds, or `500ms`, `90s`, `15m`, `2h`, `7d`; more than 0.
pub fn duration(text: &str) -> Result<Duration, String> {
    match units::period(text)? {
        Duration::ZERO => Err("must be more than 0".to_owned()),
        duration => Ok(duration),
    }
}

/// The usual knobs, changed by `key=value` as `max_wait.interactive=120s`: the keys of `scheduler:` that decide about swaps,
/// with values as they are written in the file. Errors name the key and what to write.
pub fn knobs(settings: &[String]) -> Result<Knobs, String> {
    let mut knobs = Knobs::default();
    for setting in settings {
        let (key, value) = setting
            .split_once('=')
            .ok_or_else(|| format!("`{setting}`: write a key and its value, as max_wait.interactive=120s"))?;
        let named = |error| format!("{key}: {error}");
        let period = || duration(value).map_err(named);
        let share = || units::share_within(value).map_err(named);
        match key {
            "max_wait.interactive" => knobs.max_wait_interactive = period()?,
            "max_wait.batch" => knobs.max_wait_batch = period()?,
            "max_visit" => knobs.max_visit = period()?,
            "swap_budget.interactive" => knobs.swap_budget_interactive = share()?,
            "swap_budget.other" => knobs.swap_budget_other = share()?,
            _ => {
                return Err(format!(
                    "`{key}` is unknown; known are max_wait.interactive, max_wait.batch, max_visit, \
                     swap_budget.interactive and swap_budget.other"
                ));
            }
        }
    }
    Ok(knobs)
}

/// Whether a `model:` value is a Hugging Face id (`org/name` or `name`), not a folder.
pub fn is_hub_id(model: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && !part.starts_with(['.', '-'])
            && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
    };
    let parts: Vec<&str> = model.split('/').collect();
    parts.len() <= 2 && parts.iter().copied().all(part)
}
