//! A trace: a machine, its models, and the jobs that arrive, read from one CSV file. The format is described in
//! `tests/traces/README.md`.

use std::collections::BTreeMap;
use std::path::Path;

use crate::domain::Class;

/// Columns of a trace's rows; its header line.
pub const COLUMNS: &str = "arrival_s,model,class,deadline_s,tenant,work_s,count";
/// Most jobs of a trace, all counts together.
pub const JOBS_MAX: usize = 5_000_000;
/// Largest number of a trace, whatever its unit: thirty years, if seconds.
const NUMBER_MAX: f64 = 1e9;
const BOX_KEYS: [&str; 4] = ["gpus", "gpu_gb", "host_gb", "seed"];
const MODEL_KEYS: [&str; 9] =
    ["gpus", "gb_per_gpu", "cold_s", "wake_s", "stop_s", "limit", "alpha", "join", "mean_work_s"];

/// One trace. Times in seconds, memory in GB.
#[derive(Clone, Debug, PartialEq)]
pub struct Trace {
    /// The file's name without its ending.
    pub name: String,
    /// GPUs of the machine.
    pub gpus: usize,
    /// Memory of each.
    pub gpu_gb: f64,
    /// Host memory for parked models; 0: none.
    pub host_gb: f64,
    /// Of the noise of loads.
    pub seed: u64,
    /// Loads take exactly what the models say (traces named `small-...`); else 15 % lognormal noise.
    pub exact_loads: bool,
    /// In the order of the file.
    pub models: Vec<TraceModel>,
    /// Names of tenants, in order of their first job.
    pub tenants: Vec<String>,
    /// In order of arrival, counts taken apart.
    pub jobs: Vec<TraceJob>,
}

/// One model of a trace.
#[derive(Clone, Debug, PartialEq)]
pub struct TraceModel {
    /// Its name.
    pub name: String,
    /// GPUs that one worker needs: a power of two.
    pub gpus: usize,
    /// Memory that it takes on each.
    pub gb_per_gpu: f64,
    /// From disk to ready.
    pub cold_s: f64,
    /// From host memory to ready.
    pub wake_s: f64,
    /// Stop or park a drained worker.
    pub stop_s: f64,
    /// Most jobs at once.
    pub limit: usize,
    /// n jobs at once each run at 1/(1 + alpha (n - 1)) of their solo speed.
    pub alpha: f64,
    /// A job may join others that run; else jobs start together on an empty worker.
    pub join: bool,
    /// Solo seconds of a mean job, as a models file would declare it.
    pub mean_work_s: f64,
}

impl TraceModel {
    /// How fast each of `jobs` at once runs, compared with one alone.
    pub fn speed(&self, jobs: usize) -> f64 {
        1.0 / (1.0 + self.alpha * (jobs.max(1) - 1) as f64)
    }

    /// GPU seconds that one second of solo work takes at full batch.
    pub fn full_batch(&self) -> f64 {
        self.gpus as f64 / (self.limit as f64 * self.speed(self.limit))
    }

    /// Host memory that it takes while parked, in GB.
    pub fn parked_gb(&self) -> f64 {
        0.6 * self.gb_per_gpu * self.gpus as f64
    }
}

/// One job of a trace.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TraceJob {
    /// When it arrives.
    pub arrival_s: f64,
    /// Index into [`Trace::models`].
    pub model: usize,
    /// Whether a caller waits on the line.
    pub class: Class,
    /// When it should have ended, counted from the trace's begin.
    pub deadline_s: Option<f64>,
    /// Index into [`Trace::tenants`].
    pub tenant: usize,
    /// Service time alone on a worker.
    pub work_s: f64,
}

/// What is wrong with a trace, and where.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file cannot be read.
    #[error("{path}: cannot be read: {source}")]
    Unreadable {
        /// As given.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// A line is not as it must be.
    #[error("{file}:{line}: {what}")]
    Line {
        /// As given.
        file: String,
        /// Counted from 1.
        line: usize,
        /// Field, what is wrong, and what it must be.
        what: String,
    },
    /// The file as a whole is not as it must be.
    #[error("{file}: {what}")]
    Whole {
        /// As given.
        file: String,
        /// What is missing.
        what: String,
    },
}

impl Trace {
    /// Reads a file.
    pub fn read(path: &Path) -> Result<Self, TraceError> {
        let shown = path.display().to_string();
        let bytes = std::fs::read(path).map_err(|source| TraceError::Unreadable { path: shown.clone(), source })?;
        let text = String::from_utf8(bytes).map_err(|error| {
            let good = error.utf8_error().valid_up_to();
            let line = 1 + error.as_bytes()[..good].iter().filter(|byte| **byte == b'\n').count();
            TraceError::Line { file: shown.clone(), line, what: "is not UTF-8 text; is this a trace?".to_owned() }
        })?;
        let name = path.file_stem().map_or_else(|| shown.clone(), |stem| stem.to_string_lossy().into_owned());
        Self::parse(&name, &shown, &text)
    }

    /// Reads a text; `name` is the trace's own, `file` stands in errors.
    pub fn parse(name: &str, file: &str, text: &str) -> Result<Self, TraceError> {
        let mut reader = Reader::default();
        for (index, line) in text.trim_start_matches('\u{feff}').lines().enumerate() {
            reader.line(line.trim_end()).map_err(|what| TraceError::Line {
                file: file.to_owned(),
                line: index + 1,
                what,
            })?;
        }
        reader.finish(name).map_err(|what| TraceError::Whole { file: file.to_owned(), what })
    }

    /// No schedule ends before this: the largest of t + (all work that arrives from t on, at full batch, on all GPUs), and
    /// no sooner than a job that starts when it arrives and runs alone.
    pub fn lower_bound_s(&self) -> f64 {
        let mut rest = 0.0;
        let mut bound: f64 = 0.0;
        for job in self.jobs.iter().rev() {
            rest += job.work_s * self.models[job.model].full_batch() / self.gpus as f64;
            bound = bound.max(job.arrival_s + rest.max(job.work_s));
        }
        bound
    }

    /// The aligned sets of GPUs that can hold a worker of `gpus` GPUs, by their first GPU.
    pub fn sets(&self, gpus: usize) -> impl Iterator<Item = usize> + use<> {
        (0..self.gpus).step_by(gpus.max(1)).take_while({
            let all = self.gpus;
            move |first| first + gpus <= all
        })
    }
}

/// What has been read so far.
#[derive(Default)]
struct Reader {
    machine: Option<Machine>,
    models: Vec<TraceModel>,
    names: BTreeMap<String, usize>,
    has_header: bool,
    tenants: Vec<String>,
    tenant_names: BTreeMap<String, usize>,
    jobs: Vec<TraceJob>,
}

#[derive(Clone, Copy)]
struct Machine {
    gpus: usize,
    gpu_gb: f64,
    host_gb: f64,
    seed: u64,
}

impl Reader {
    fn line(&mut self, line: &str) -> Result<(), String> {
        if line.is_empty() || line.starts_with("# ") {
            return Ok(());
        }
        if let Some(rest) = line.strip_prefix("#box,") {
            return self.machine(rest);
        }
        if let Some(rest) = line.strip_prefix("#model,") {
            return self.model(rest);
        }
        if line.starts_with('#') {
            let word: String = line.chars().take_while(|c| *c != ',').take(40).collect();
            return Err(format!("`{word}` is unknown: a line is `#box,...`, `#model,...`, `# a comment` or a row"));
        }
        if !self.has_header {
            if line != COLUMNS {
                return Err(format!("the first line without `#` must be `{COLUMNS}`"));
            }
            self.has_header = true;
            return Ok(());
        }
        self.row(line)
    }

    fn machine(&mut self, rest: &str) -> Result<(), String> {
        if self.machine.is_some() {
            return Err("a second `#box` line: one machine a trace".to_owned());
        }
        let fields = Fields::read("#box", rest, &BOX_KEYS)?;
        let machine = Machine {
            gpus: fields.whole("gpus", 1, 1024)?,
            gpu_gb: fields.number("gpu_gb")?,
            host_gb: fields.number("host_gb")?,
            seed: fields.whole("seed", 0, usize::MAX >> 1)? as u64,
        };
        self.machine = Some(machine);
        Ok(())
    }

    fn model(&mut self, rest: &str) -> Result<(), String> {
        let Some(machine) = self.machine else {
            return Err("a `#model` line before the `#box` line".to_owned());
        };
        let (name, rest) = rest.split_once(',').unwrap_or((rest, ""));
        if name.is_empty() || name.contains('=') {
            return Err("`#model` needs a name first: `#model,NAME,gpus=1,...`".to_owned());
        }
        if self.names.contains_key(name) {
            return Err(format!("a second model `{name}`"));
        }
        let fields = Fields::read("#model", rest, &MODEL_KEYS)?;
        let model = TraceModel {
            name: name.to_owned(),
            gpus: fields.whole("gpus", 1, 1024)?,
            gb_per_gpu: fields.number("gb_per_gpu")?,
            cold_s: fields.number("cold_s")?,
            wake_s: fields.number("wake_s")?,
            stop_s: fields.number("stop_s")?,
            limit: fields.whole("limit", 1, 100_000)?,
            alpha: fields.number("alpha")?,
            join: fields.whole("join", 0, 1)? == 1,
            mean_work_s: fields.number("mean_work_s")?,
        };
        if !model.gpus.is_power_of_two() {
            return Err(format!("gpus: {} is no power of two: workers take aligned sets of GPUs", model.gpus));
        }
        if model.gpus > machine.gpus {
            return Err(format!("gpus: `{name}` needs {}, the box has {}", model.gpus, machine.gpus));
        }
        if model.gb_per_gpu > machine.gpu_gb {
            let (needs, has) = (model.gb_per_gpu, machine.gpu_gb);
            return Err(format!("gb_per_gpu: `{name}` needs {needs} GB on each GPU, which has {has}"));
        }
        self.names.insert(name.to_owned(), self.models.len());
        self.models.push(model);
        Ok(())
    }

    fn row(&mut self, line: &str) -> Result<(), String> {
        let fields: Vec<&str> = line.split(',').map(str::trim).collect();
        let [arrival, model, class, deadline, tenant, work, count] = fields[..] else {
            return Err(format!("{} fields, not the 7 of `{COLUMNS}`", fields.len()));
        };
        let Some(index) = self.names.get(model) else {
            return Err(format!("model: `{}` has no `#model` line", shown(model)));
        };
        let Some(class_read) = Class::parse(class) else {
            return Err(format!("class: `{}` is neither `interactive` nor `batch`", shown(class)));
        };
        let deadline_s = if deadline.is_empty() { None } else { Some(number("deadline_s", deadline)?) };
        if tenant.is_empty() {
            return Err("tenant: is empty".to_owned());
        }
        let count = whole("count", count, 1, JOBS_MAX)?;
        if self.jobs.len() + count > JOBS_MAX {
            return Err(format!("count: more than {JOBS_MAX} jobs in all"));
        }
        let tenant = *self.tenant_names.entry(tenant.to_owned()).or_insert_with(|| {
            self.tenants.push(tenant.to_owned());
            self.tenants.len() - 1
        });
        let job = TraceJob {
            arrival_s: number("arrival_s", arrival)?,
            model: *index,
            class: class_read,
            deadline_s,
            tenant,
            work_s: number("work_s", work)?,
        };
        self.jobs.extend(std::iter::repeat_n(job, count));
        Ok(())
    }

    fn finish(mut self, name: &str) -> Result<Trace, String> {
        let Some(machine) = self.machine else {
            return Err("no `#box,gpus=..,gpu_gb=..,host_gb=..,seed=..` line: is this a trace?".to_owned());
        };
        if self.models.is_empty() {
            return Err("no `#model,...` line".to_owned());
        }
        if self.jobs.is_empty() {
            return Err(format!("no rows under `{COLUMNS}`"));
        }
        self.jobs.sort_by(|a, b| a.arrival_s.total_cmp(&b.arrival_s));
        Ok(Trace {
            name: name.to_owned(),
            gpus: machine.gpus,
            gpu_gb: machine.gpu_gb,
            host_gb: machine.host_gb,
            seed: machine.seed,
            exact_loads: name.starts_with("small-"),
            models: self.models,
            tenants: self.tenants,
            jobs: self.jobs,
        })
    }
}

/// `key=value` pairs of a `#` line.
struct Fields<'a> {
    of: &'static str,
    pairs: BTreeMap<&'a str, &'a str>,
}

impl<'a> Fields<'a> {
    fn read(of: &'static str, text: &'a str, known: &[&str]) -> Result<Self, String> {
        let mut pairs = BTreeMap::new();
        for field in text.split(',').map(str::trim).filter(|field| !field.is_empty()) {
            let Some((key, value)) = field.split_once('=') else {
                return Err(format!("`{}` is not `key=value`", shown(field)));
            };
            if !known.contains(&key) {
                return Err(format!("`{}` is no key of {of}; known are {}", shown(key), known.join(", ")));
            }
            if pairs.insert(key, value).is_some() {
                return Err(format!("{key} stands twice"));
            }
        }
        Ok(Self { of, pairs })
    }

    fn get(&self, key: &str) -> Result<&'a str, String> {
        self.pairs.get(key).copied().ok_or_else(|| format!("{key} is missing: {} needs it", self.of))
    }

    fn number(&self, key: &str) -> Result<f64, String> {
        number(key, self.get(key)?)
    }

    fn whole(&self, key: &str, low: usize, high: usize) -> Result<usize, String> {
        whole(key, self.get(key)?, low, high)
    }
}

fn number(field: &str, text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if (0.0..=NUMBER_MAX).contains(&value) => Ok(value),
        Ok(_) => Err(format!("{field}: `{}` is not in 0 to {NUMBER_MAX:e}", shown(text))),
        Err(_) => Err(format!("{field}: `{}` is not a number", shown(text))),
    }
}

fn whole(field: &str, text: &str, low: usize, high: usize) -> Result<usize, String> {
    match text.parse::<usize>() {
        Ok(value) if (low..=high).contains(&value) => Ok(value),
        _ => Err(format!("{field}: `{}` is not a whole number from {low} to {high}", shown(text))),
    }
}

/// A text of a file as errors show it: no control characters, not endless.
fn shown(text: &str) -> String {
    text.chars().take(40).map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
#[path = "trace_tests.rs"]
mod tests;
