//! One entry of `models:` -> `ModelSpec`: checks values, fills in the defaults of its type, makes paths absolute.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::file::{At, Entry, File, Park};
use super::units::{Command, Word};
use super::{Problems, is_hub_id};
use crate::domain::{self, Launch, ModelKind, ModelSpec};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const IMAGES: &str = "/v1/images/generations";
const MUSIC: &str = "/v1/audio/generations";
const SPEECH: &str = "/v1/audio/speech";

/// Ports that an unprivileged worker may take.
const PORTS: std::ops::RangeInclusive<u16> = 1024..=65535;
/// First port given to models that name none.
const FIRST_PORT: u16 = 8001;
/// Most workers of one model.
const REPLICAS_MAX: u32 = 64;
/// Longest name or alias, in characters.
const NAME_CHARS_MAX: usize = 128;
/// What may stand in braces in a command.
const PLACEHOLDERS: &[&str] = &["port", "model", "name", "revision"];

/// All entries in the order of the file; entries with problems are left out.
/// `own`: looks up the server's own environment.
pub(super) fn models(
    file: &File,
    dir: &Path,
    own: &dyn Fn(&str) -> Option<String>,
    problems: &mut Problems,
) -> Vec<ModelSpec> {
    if file.entries().is_empty() {
        problems.add(None, "`models` has no entry; docs/ADDING_MODELS.md shows one");
    }
    names(file, problems);
    let entries = file.entries().iter().enumerate();
    entries
        .filter_map(|(index, (name, entry))| {
            let mut reader = Reader { name, entry, dir, own, problems };
            reader.spec(index)
        })
        .collect()
}

/// Names and aliases share one space: clients put either into `model`.
fn names(file: &File, problems: &mut Problems) {
    let mut taken: BTreeMap<&str, String> = BTreeMap::new();
    for (name, _) in file.entries() {
        taken.insert(&name.value, format!("the name of models.{}", name.value));
    }
    for (name, entry) in file.entries() {
        for alias in entry.aliases.iter().flat_map(|aliases| &aliases.value) {
            let here = format!("an alias of models.{}", name.value);
            if let Some(owner) = taken.insert(&alias.value, here) {
                problems.add(
                    alias.line,
                    format!(
                        "models.{}.aliases: `{}` is already {owner}; every name and alias must be unique",
                        name.value, alias.value
                    ),
                );
            }
        }
    }
}

struct Reader<'a> {
    name: &'a At<String>,
    entry: &'a Entry,
    dir: &'a Path,
    own: &'a dyn Fn(&str) -> Option<String>,
    problems: &'a mut Problems,
}

impl Reader<'_> {
    fn spec(&mut self, index: usize) -> Option<ModelSpec> {
        self.check_names();
        let kind = self.kind();
        let launch = self.launch();
        let port = self.port(index);
        let startup_time = self.startup_time();
        let endpoints = self.endpoints(kind);
        let (limit, max_batch, first_batch) = self.limits(kind);
        let timeout = self.timeout(kind);
        let max_attempts = self.max_attempts();
        let max_replicas = self.max_replicas();
        self.check_words();
        let env = self.env();
        let entry = self.entry;
        Some(ModelSpec {
            name: self.name.value.clone(),
            kind: kind?,
            launch: launch?,
            model: self.model(),
            revision: self.revision(),
            port,
            has_own_port: entry.port.is_some(),
            startup_time,
            endpoints,
            args: entry.args.iter().flat_map(|at| &at.value).map(|word| word.0.clone()).collect(),
            env,
            aliases: entry.aliases.iter().flat_map(|at| &at.value).map(|alias| alias.value.clone()).collect(),
            limit,
            max_batch,
            first_batch,
            timeout,
            max_attempts,
            idle_ttl: entry.idle_ttl.as_ref().map(|at| at.value.0),
            preload: entry.preload.unwrap_or(false),
            gpus: entry.gpus.as_ref().map_or(1, |at| at.value),
            memory: entry.memory.as_ref().map(|at| at.value.0),
            max_replicas,
            pin: entry.pin.unwrap_or(false),
            exclusive: entry.exclusive.unwrap_or(false),
            park: self.park(),
            spare: self.spare(),
            upstream_model: entry.upstream_model.as_ref().map_or(&self.name.value, |at| &at.value).clone(),
            dir: self.dir.to_path_buf(),
        })
    }

    /// `key` is empty for the entry itself.
    fn problem(&mut self, line: usize, key: &str, message: &str) {
        let dot = if key.is_empty() { "" } else { "." };
        let text = format!("models.{}{dot}{key}: {message}", self.name.value);
        self.problems.add(line, text);
    }

    fn check_names(&mut self) {
        let name = &self.name.value;
        if !is_plain(name) || name.contains(['/', ':']) {
            let help = "a name is 1-128 of the characters A-Z a-z 0-9 . _ - and starts with a letter or digit";
            self.problem(self.name.line, "", help);
        }
        for alias in self.entry.aliases.iter().flat_map(|at| &at.value) {
            if !is_plain(&alias.value) {
                let help = format!(
                    "`{}` is no alias: 1-128 of the characters A-Z a-z 0-9 . _ - : /, the first a letter or digit",
                    alias.value
                );
                self.problem(alias.line, "aliases", &help);
            }
        }
    }

    fn kind(&mut self) -> Option<ModelKind> {
        let Some(kind) = &self.entry.kind else {
            let help = "`type` is missing; write type: text, image, audio or custom";
            self.problem(self.name.line, "", help);
            return None;
        };
        Some(kind.value.into())
    }

    fn launch(&mut self) -> Option<Launch> {
        match (&self.entry.service_script, &self.entry.command) {
            (Some(script), None) => self.script(script),
            (None, Some(command)) => self.command(command),
            (None, None) => {
                let help = "needs `service_script` (a server.py) or `command` (any program that serves the endpoint)";
                self.problem(self.name.line, "", help);
                None
            }
            (Some(script), Some(command)) => {
                let help = "`service_script` and `command` are both given; keep one";
                self.problem(script.line.max(command.line), "", help);
                None
            }
        }
    }

    fn script(&mut self, at: &At<String>) -> Option<Launch> {
        let script = self.dir.join(&at.value);
        if !script.is_file() {
            let help = format!("there is no file {}", script.display());
            self.problem(at.line, "service_script", &help);
            return None;
        }
        let python = self.python(&script);
        Some(Launch::Script { python, script })
    }

    /// The interpreter that the entry names, else the venv beside the script, there or not.
    fn python(&self, script: &Path) -> PathBuf {
        match &self.entry.python {
            // A bare name is looked up in PATH at start.
            Some(at) if !at.value.contains('/') => PathBuf::from(&at.value),
            Some(at) => self.dir.join(&at.value),
            None => Launch::own_python(script),
        }
    }

    fn command(&mut self, at: &At<Command>) -> Option<Launch> {
        if let Some(python) = &self.entry.python {
            let help = "goes with `service_script`; put the interpreter into `command`";
            self.problem(python.line, "python", help);
        }
        let words = &at.value.0;
        if words.first().is_none_or(|word| word.is_empty()) {
            self.problem(at.line, "command", "is empty");
            return None;
        }
        self.check_placeholders(at.line, "command", words.iter().map(String::as_str));
        Some(Launch::Command(words.clone()))
    }

    /// Only a `command` is filled in, its `args` included.
    fn check_words(&mut self) {
        let Some(args) = &self.entry.args else { return };
        let words = || args.value.iter().map(|word| word.0.as_str());
        if self.entry.command.is_some() {
            self.check_placeholders(args.line, "args", words());
        } else if let Some(found) = words().flat_map(placeholders).find(|found| PLACEHOLDERS.contains(found)) {
            let help = format!("`{{{found}}}` is filled in only with `command`; a server.py is given --{found} anyway");
            self.problem(args.line, "args", &help);
        }
    }

    fn check_placeholders<'w>(&mut self, line: usize, key: &str, words: impl Iterator<Item = &'w str>) {
        for found in words.flat_map(placeholders) {
            if !PLACEHOLDERS.contains(&found) {
                let help =
                    format!("`{{{found}}}` is no placeholder; there are {{port}}, {{model}}, {{name}}, {{revision}}");
                self.problem(line, key, &help);
            } else if found == "model" && self.entry.model.is_none() {
                self.problem(line, key, "has {model}, but the entry has no `model`");
            } else if found == "revision" && self.entry.revision.is_none() {
                self.problem(line, key, "has {revision}, but the entry has no `revision`");
            }
        }
    }

    fn port(&mut self, index: usize) -> u16 {
        let fallback = FIRST_PORT.saturating_add(u16::try_from(index).unwrap_or(0));
        let Some(port) = &self.entry.port else {
            return fallback;
        };
        if !PORTS.contains(&port.value) {
            let help = format!("{} is out of range; take one of 1024-65535", port.value);
            self.problem(port.line, "port", &help);
        }
        port.value
    }

    fn startup_time(&self) -> Duration {
        let given = self.entry.startup_time.as_ref();
        given.map_or(Duration::from_secs(60), |at| at.value.0)
    }

    fn endpoints(&mut self, kind: Option<ModelKind>) -> Vec<String> {
        let entry = self.entry;
        let listed = entry.endpoints.iter().flat_map(|at| &at.value);
        let given: Vec<&At<String>> = entry.endpoint.iter().chain(listed).collect();
        for at in &given {
            if !at.value.starts_with('/') || at.value.contains(char::is_whitespace) {
                let help = format!("`{}` is no path; it starts with `/`, as /v1/chat/completions does", at.value);
                self.problem(at.line, "endpoint", &help);
            }
        }
        let mut endpoints = Vec::new();
        let mut add = |path: &str| {
            if !endpoints.iter().any(|known| known == path) {
                endpoints.push(path.to_owned());
            }
        };
        given.iter().for_each(|at| add(&at.value));
        if entry.endpoints.is_none() {
            let main = entry.endpoint.as_ref().map(|at| at.value.as_str());
            usual(kind, main).iter().for_each(|path| add(path));
        }
        if endpoints.is_empty() && kind.is_some() {
            let help = "needs an `endpoint`, as /v1/something";
            self.problem(self.name.line, "", help);
        }
        endpoints
    }

    /// `limit`, `max_batch`, and how many jobs a pass takes at first.
    fn limits(&mut self, kind: Option<ModelKind>) -> (u32, u32, u32) {
        let limit = self.at_least_one("limit", self.entry.limit.as_ref());
        let max_batch = self.at_least_one("max_batch", self.entry.max_batch.as_ref());
        let is_text = kind == Some(ModelKind::Text);
        if let Some(at) = &self.entry.max_batch {
            if is_text && at.value > 1 {
                let help = "text engines batch by themselves; set `limit`, the most requests at once";
                self.problem(at.line, "max_batch", help);
            }
            if let Some(limit) = limit.filter(|limit| *limit < at.value) {
                let help = format!("{} is more than `limit` ({limit}); raise `limit`", at.value);
                self.problem(at.line, "max_batch", &help);
            }
        }
        // A program that is none of ours, or has a `limit` of its own, may not make passes of several.
        let (usual, first) = match kind {
            Some(ModelKind::Audio) => (limit.map_or(16, |limit| limit.min(16)), None),
            Some(ModelKind::Image) if self.entry.service_script.is_some() && limit.is_none() => (8, Some(1)),
            _ => (1, None),
        };
        let first = first.filter(|_| max_batch.is_none());
        let max_batch = max_batch.unwrap_or(usual);
        let first = first.unwrap_or(max_batch);
        let usual_limit = if is_text { 256 } else { max_batch };
        (limit.unwrap_or(usual_limit), max_batch, first)
    }

    fn at_least_one(&mut self, key: &str, at: Option<&At<u32>>) -> Option<u32> {
        let at = at?;
        if at.value == 0 {
            self.problem(at.line, key, "must be at least 1");
            return None;
        }
        Some(at.value)
    }

    fn timeout(&mut self, kind: Option<ModelKind>) -> Duration {
        let usual = match kind {
            Some(ModelKind::Image) => 300,
            Some(ModelKind::Audio) => 900,
            Some(ModelKind::Text | ModelKind::Custom) | None => 600,
        };
        match &self.entry.timeout {
            Some(at) if at.value.0.is_zero() => {
                self.problem(at.line, "timeout", "must be more than 0");
                at.value.0
            }
            Some(at) => at.value.0,
            None => Duration::from_secs(usual),
        }
    }

    fn max_attempts(&mut self) -> u32 {
        self.at_least_one("max_attempts", self.entry.max_attempts.as_ref()).unwrap_or(3)
    }

    fn max_replicas(&mut self) -> u32 {
        let wanted = self.at_least_one("max_replicas", self.entry.max_replicas.as_ref()).unwrap_or(1);
        if let Some(at) = self.entry.max_replicas.as_ref().filter(|_| wanted > REPLICAS_MAX) {
            self.problem(at.line, "max_replicas", &format!("{wanted} is too many; take one of 1-{REPLICAS_MAX}"));
        }
        wanted
    }

    fn park(&mut self) -> domain::Park {
        let usual = domain::Park::Off;
        let Some(at) = self.entry.park.as_ref().filter(|at| at.value != Park::Off) else { return usual };
        if self.entry.gpus.as_ref().is_some_and(|gpus| gpus.value == 0) {
            self.problem(at.line, "park", "a model on the CPU (gpus: 0) lies in host memory anyway; remove it");
        }
        if let Some(memory) = self.entry.memory.as_ref().filter(|memory| memory.value.0 == 0) {
            let help = "is 0, so there is nothing to park; write what it takes on each GPU, or remove `park`";
            self.problem(memory.line, "memory", help);
        }
        if at.value == Park::Ram { domain::Park::Ram } else { domain::Park::Checkpoint }
    }

    fn spare(&mut self) -> bool {
        let Some(at) = self.entry.spare.as_ref().filter(|at| at.value) else { return false };
        if self.entry.command.is_some() {
            self.problem(at.line, "spare", "goes with `service_script`; a `command` has no spare process");
        }
        true
    }

    fn env(&mut self) -> BTreeMap<String, String> {
        let Some(at) = &self.entry.env else {
            return BTreeMap::new();
        };
        for key in at.value.keys() {
            if key.is_empty() || key.contains(['=', '\0']) {
                let help = format!("`{key}` is no name of an environment variable");
                self.problem(at.line, "env", &help);
            }
        }
        let value = |key: &str, word: &Option<Word>| match word {
            Some(word) => Some(word.0.clone()),
            None => (self.own)(key),
        };
        at.value.iter().filter_map(|(key, word)| Some((key.clone(), value(key, word)?))).collect()
    }

    /// Only what is fetched has one.
    fn revision(&mut self) -> Option<String> {
        let at = self.entry.revision.as_ref()?;
        let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '/');
        let is_revision = at.value.starts_with(|c: char| c.is_ascii_alphanumeric())
            && at.value.chars().all(is_plain)
            && !at.value.split('/').any(|part| part.is_empty() || part == "..");
        let model = self.entry.model.as_ref();
        let is_folder = model.is_some_and(|model| !is_hub_id(&model.value) || self.dir.join(&model.value).is_dir());
        let help = if !is_revision {
            format!("`{}` is no revision: a branch, a tag or a commit of the hub", at.value)
        } else if model.is_none() {
            "goes with `model`, the repository that it is of".to_owned()
        } else if is_folder {
            "goes with a `model` from the hub; this one is a folder, which has no revisions".to_owned()
        } else {
            return Some(at.value.clone());
        };
        self.problem(at.line, "revision", &help);
        None
    }

    /// A folder becomes absolute, a Hugging Face id stays.
    fn model(&mut self) -> Option<String> {
        let at = self.entry.model.as_ref()?;
        let model = &at.value;
        let folder = self.dir.join(model);
        if !folder.exists() && !is_hub_id(model) && is_hardly_a_folder(model) {
            let help = format!(
                "`{model}` is no Hugging Face id (OWNER/NAME, of A-Z a-z 0-9 . _ -) and there is no such folder; a folder that \
                 comes later starts with ./ or /"
            );
            self.problem(at.line, "model", &help);
        }
        if is_hub_id(model) && !folder.is_dir() {
            return Some(model.clone());
        }
        Some(tidy(&folder).display().to_string())
    }
}

/// Whether somebody who wrote this meant a repository of the hub: it is a URL, or has one `/` and is no path of the usual kind.
fn is_hardly_a_folder(model: &str) -> bool {
    let is_path = model.starts_with(['.', '/', '~']);
    model.contains("://") || (!is_path && model.matches('/').count() == 1 && model.contains(char::is_whitespace))
}

/// The paths that a model of this type serves besides the given ones.
fn usual(kind: Option<ModelKind>, main: Option<&str>) -> &'static [&'static str] {
    match (kind, main) {
        (Some(ModelKind::Text), None | Some(CHAT | COMPLETIONS)) => &[CHAT, COMPLETIONS],
        (Some(ModelKind::Image), None) => &[IMAGES],
        (Some(ModelKind::Audio), None | Some(MUSIC | SPEECH)) => &[MUSIC, SPEECH],
        _ => &[],
    }
}

/// What stands in braces as a bare word; JSON in an argument (`{"a": 1}`) does not count.
fn placeholders(word: &str) -> impl Iterator<Item = &str> {
    word.split('{').skip(1).filter_map(|rest| {
        let (inside, _) = rest.split_once('}')?;
        let is_word = !inside.is_empty() && inside.chars().all(|c| c.is_ascii_alphabetic() || c == '_');
        is_word.then_some(inside)
    })
}

fn is_plain(name: &str) -> bool {
    let starts_well = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    let inside = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | ':' | '/');
    starts_well && name.chars().count() <= NAME_CHARS_MAX && name.chars().all(inside)
}

/// Without `.` in the middle; `..` stays, since a link may stand before it.
fn tidy(path: &Path) -> PathBuf {
    path.components().collect()
}
