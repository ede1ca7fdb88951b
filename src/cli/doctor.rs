//! `roundhouse doctor`: where everything lies, how much it takes, whether it stays, and whether it is whole.

use std::collections::BTreeSet;
use std::io::Write;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;

use super::backup::{Shown, absolute, counted, jobs};
use super::environment;
use crate::config::{self, Config, is_hub_id};
use crate::domain::storage::shown_bytes;
use crate::domain::{Launch, ModelSpec, StorageSettings};
use crate::store::StoreError;
use crate::store::examine::{self, DATABASE, Faults, RESERVE, Room};
use crate::store::placement::{Class, FileSystem, FileSystems, free_bytes, place};

/// Lines of one kind that are shown at most.
const LISTED_MAX: usize = 20;

/// `roundhouse doctor ...`
#[derive(Clone, Debug, Args)]
#[command(after_help = "Exit codes: 0: nothing is wrong; 1: something is, the last lines say what; 2: the flags are.")]
pub struct DoctorArgs {
    /// The server's data dir; it need not be there yet, and the server may run
    #[arg(long, value_name = "DIR", default_value = "./data", env = "ROUNDHOUSE_DATA_DIR")]
    pub data_dir: PathBuf,
    /// Model file; without one, nothing is said about models [default: ./models.yaml if it is there]
    #[arg(long, value_name = "FILE", env = "ROUNDHOUSE_CONFIG")]
    pub config: Option<PathBuf>,
    /// As for `serve` [default: storage.snapshot_dir of the file, else none]
    #[arg(long, value_name = "DIR", env = "ROUNDHOUSE_SNAPSHOT_DIR")]
    pub snapshot_dir: Option<PathBuf>,
    /// As for `serve`
    #[arg(long, env = "ROUNDHOUSE_ALLOW_NETWORK_FS", value_parser = clap::builder::BoolishValueParser::new())]
    pub allow_network_fs: bool,
    /// Also check the database, and compare every file with its row; reads everything, changes nothing
    #[arg(long)]
    pub deep: bool,
}

/// What kind of thing lies somewhere, which decides what is good for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Database,
    Files,
    Logs,
    Snapshots,
    Weights,
    Caches,
    Environment,
}

/// One place.
struct Place {
    kind: Kind,
    what: String,
    path: PathBuf,
    /// `None`: not there.
    bytes: Option<u64>,
    file_system: Option<FileSystem>,
    free: Option<u64>,
}

/// Looks around. Everything that it needs to know of the world is in it, for tests.
struct Doctor<'a> {
    args: &'a DoctorArgs,
    env: &'a dyn Fn(&str) -> Option<String>,
    file_systems: FileSystems,
    /// What is wrong: a reason for exit code 1.
    wrong: Vec<String>,
    advice: Vec<String>,
}

/// Prints what it finds; exit code 1 if something is wrong.
pub(super) fn doctor(args: &DoctorArgs, out: &mut dyn Write) -> anyhow::Result<ExitCode> {
    let file_systems = FileSystems::from_setting(environment("ROUNDHOUSE_STATFS").as_deref())
        .map_err(|error| anyhow::anyhow!("ROUNDHOUSE_STATFS: {error}"))?;
    let mut doctor = Doctor { args, env: &environment, file_systems, wrong: Vec::new(), advice: Vec::new() };
    doctor.look(out)?;
    Ok(if doctor.wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Doctor<'_> {
    fn look(&mut self, out: &mut dyn Write) -> anyhow::Result<()> {
        let config = self.config();
        let storage = config.as_ref().map_or_else(StorageSettings::default, |config| config.storage.clone());
        let data_dir = absolute(&self.args.data_dir);
        let snapshot_dir = self.args.snapshot_dir.clone().or_else(|| storage.snapshot_dir.clone());
        let places = self.places(&data_dir, snapshot_dir.as_deref(), config.as_ref());
        show_places(&places, out)?;
        self.judge_data_dir(&data_dir, snapshot_dir.as_deref());
        self.judge_places(&places);
        writeln!(out)?;
        self.show_settings(&storage, snapshot_dir.as_deref(), out)?;
        self.judge_room(&data_dir, &storage);
        self.show_inside(&data_dir, &storage, out)?;
        if self.args.deep {
            self.look_deep(&data_dir, out)?;
        }
        for (title, lines) in [("Advice", &self.advice), ("Wrong", &self.wrong)] {
            if !lines.is_empty() {
                writeln!(out, "\n{title}:")?;
            }
            for line in lines {
                writeln!(out, "- {line}")?;
            }
        }
        if self.wrong.is_empty() {
            writeln!(out, "\nNothing is wrong.")?;
        }
        Ok(())
    }

    /// The model file, if there is one or one was named.
    fn config(&mut self) -> Option<Config> {
        let usual = PathBuf::from("./models.yaml");
        let path = match &self.args.config {
            Some(path) => path.clone(),
            None if usual.exists() => usual,
            None => {
                self.advice
                    .push("no model file (--config FILE): nothing is said about weights and environments".into());
                return None;
            }
        };
        match config::load(&path, self.env) {
            Ok(config) => Some(config),
            Err(error) => {
                self.wrong.push(error.to_string());
                None
            }
        }
    }

    fn places(&self, data_dir: &Path, snapshot_dir: Option<&Path>, config: Option<&Config>) -> Vec<Place> {
        let database = ["", "-wal", "-shm"].map(|end| data_dir.join(format!("{DATABASE}{end}")));
        let bytes = database.iter().filter_map(|path| used(path)).reduce(|sum, bytes| sum + bytes);
        let mut places = vec![
            Place { bytes, ..self.at(Kind::Database, "database and its log".into(), database[0].clone()) },
            self.at(Kind::Files, "files of jobs".into(), data_dir.join("artifacts")),
            self.at(Kind::Files, "reserve for a full disk".into(), data_dir.join(RESERVE)),
            self.at(Kind::Logs, "logs of workers".into(), data_dir.join("log")),
        ];
        if let Some(dir) = snapshot_dir {
            places.push(self.at(Kind::Snapshots, "snapshots".into(), absolute(dir)));
        }
        let models = config.map_or(&[][..], |config| &config.models);
        let mut seen = BTreeSet::new();
        for spec in models {
            places.extend(self.weights(spec).into_iter().filter(|place| seen.insert(place.path.clone())));
        }
        for (what, path) in self.caches(models) {
            if path.exists() && seen.insert(path.clone()) {
                places.push(self.at(Kind::Caches, what.into(), path));
            }
        }
        for spec in models {
            let venv = environment_of(spec).filter(|path| seen.insert(path.clone()));
            places.extend(venv.map(|path| self.at(Kind::Environment, format!("environment of {}", spec.name), path)));
        }
        places
    }

    fn at(&self, kind: Kind, what: String, path: PathBuf) -> Place {
        Place {
            kind,
            what,
            bytes: used(&path),
            file_system: self.file_systems.of(&path).ok(),
            free: free_bytes(&path),
            path,
        }
    }

    fn weights(&self, spec: &ModelSpec) -> Option<Place> {
        let model = spec.model.as_deref()?;
        let path = if is_hub_id(model) {
            self.hub(spec).join(format!("models--{}", model.replace('/', "--")))
        } else {
            PathBuf::from(model)
        };
        Some(self.at(Kind::Weights, format!("weights of {}", spec.name), path))
    }

    /// What a worker of the model would see: its own environment before ours.
    fn variable(&self, spec: Option<&ModelSpec>, name: &str) -> Option<PathBuf> {
        let own = spec.and_then(|spec| spec.env.get(name).cloned());
        own.or_else(|| (self.env)(name)).filter(|value| !value.is_empty()).map(PathBuf::from)
    }

    fn home(&self) -> PathBuf {
        self.variable(None, "HOME").unwrap_or_else(|| PathBuf::from("/root"))
    }

    fn cache(&self, spec: Option<&ModelSpec>) -> PathBuf {
        self.variable(spec, "XDG_CACHE_HOME").unwrap_or_else(|| self.home().join(".cache"))
    }

    /// Where Hugging Face's libraries keep weights.
    fn hub(&self, spec: &ModelSpec) -> PathBuf {
        let spec = Some(spec);
        self.variable(spec, "HF_HUB_CACHE")
            .or_else(|| self.variable(spec, "HUGGINGFACE_HUB_CACHE"))
            .or_else(|| self.variable(spec, "HF_HOME").map(|home| home.join("hub")))
            .unwrap_or_else(|| self.cache(spec).join("huggingface/hub"))
    }

    fn caches(&self, models: &[ModelSpec]) -> Vec<(&'static str, PathBuf)> {
        let mut found = Vec::new();
        for spec in models.iter().map(Some).chain([None]) {
            let vllm = self.variable(spec, "VLLM_CACHE_ROOT").unwrap_or_else(|| self.cache(spec).join("vllm"));
            found.push(("compile cache of vLLM", vllm));
            let triton = self.variable(spec, "TRITON_CACHE_DIR").unwrap_or_else(|| self.home().join(".triton"));
            found.push(("compile cache of Triton", triton));
            let inductor = self.variable(spec, "TORCHINDUCTOR_CACHE_DIR").or_else(|| {
                self.variable(None, "USER").map(|user| format!("/tmp/torchinductor_{}", user.display()).into())
            });
            found.extend(inductor.map(|path| ("compile cache of PyTorch", path)));
        }
        found
    }

    fn judge_data_dir(&mut self, data_dir: &Path, snapshot_dir: Option<&Path>) {
        match place(data_dir, snapshot_dir, self.args.allow_network_fs, &self.file_systems) {
            Ok(placement) => self.advice.extend(placement.warning),
            Err(error) => self.wrong.push(error.to_string()),
        }
    }

    fn judge_places(&mut self, places: &[Place]) {
        for place in places {
            let Some(file_system) = &place.file_system else { continue };
            let (what, name) = (&place.what, &file_system.name);
            let advice = match (place.kind, file_system.class) {
                (Kind::Weights, Class::Volatile) => format!(
                    "{what}: {name} is gone with the pod, and they are fetched again; set HF_HOME to a folder on a volume that stays"
                ),
                (Kind::Caches, Class::Volatile) => format!(
                    "{what}: {name} is gone with the pod, and the first load compiles again; move {} to a volume that stays",
                    place.path.display()
                ),
                (Kind::Environment, Class::Network) => {
                    format!("{what}: thousands of small files on {name} make imports slow; install it on a local disk")
                }
                (Kind::Snapshots, Class::Volatile) => format!(
                    "{what}: {name} is gone with the pod, so they save nothing; give --snapshot-dir a folder on a volume that stays"
                ),
                _ => continue,
            };
            self.advice.push(advice);
        }
    }

    fn show_settings(
        &mut self,
        storage: &StorageSettings,
        snapshot_dir: Option<&Path>,
        out: &mut dyn Write,
    ) -> anyhow::Result<()> {
        let quota = storage.quota_bytes.map_or_else(|| "half of the free disk at the start".into(), shown_bytes);
        line(out, "quota", &format!("{quota} for results and files"))?;
        line(out, "watermark", &format!("new jobs are refused below {} free", shown_bytes(storage.free_min_bytes)))?;
        line(out, "reserve", &format!("{} for answers when the disk is full", shown_bytes(storage.reserve_bytes)))?;
        let snapshots = match snapshot_dir {
            Some(dir) => format!("every {} s to {}", storage.snapshot_every.as_secs_f64(), absolute(dir).display()),
            None => "none; --snapshot-dir DIR keeps copies on a disk that stays".to_owned(),
        };
        line(out, "snapshots", &snapshots)?;
        line(out, "SQLite", examine::sqlite_version())?;
        Ok(())
    }

    /// Whether jobs can be stored at all.
    fn judge_room(&mut self, data_dir: &Path, storage: &StorageSettings) {
        let shown = data_dir.display();
        if let Err(error) = examine::is_writable(data_dir) {
            self.wrong.push(format!(
                "{shown} (--data-dir) cannot be written to: {error}; the server needs a folder of its own user, on a disk that \
                 is not read-only"
            ));
        }
        let free = free_bytes(data_dir).unwrap_or(u64::MAX);
        let free_min = storage.free_min_bytes;
        if free < free_min {
            self.wrong.push(format!(
                "{shown}: {} free, new jobs are refused below {} (storage.free_min); make room there",
                shown_bytes(free),
                shown_bytes(free_min)
            ));
        }
        // The server makes it at its start, so a data dir that was only restored has none yet.
        let has_database = data_dir.join(DATABASE).exists();
        let lacks_reserve = storage.reserve_bytes > 0 && free_min > 0 && !data_dir.join(RESERVE).exists();
        if has_database && lacks_reserve {
            let has_server = examine::has_server(data_dir).unwrap_or(false);
            self.wrong.extend(no_reserve(data_dir, free, storage, has_server));
        }
    }

    /// How much of the quota is used, and what goes first.
    fn show_room(&mut self, room: Room, storage: &StorageSettings, out: &mut dyn Write) -> std::io::Result<()> {
        let Some(quota) = storage.quota_bytes.or(room.quota) else {
            return line(out, "room", &format!("{} used; the next start decides on a quota", shown_bytes(room.used)));
        };
        let percent = u128::from(room.used) * 100 / u128::from(quota.max(1));
        let (used, of) = (shown_bytes(room.used), shown_bytes(quota));
        let live = room
            .live
            .map_or_else(|| "too many jobs to be added up".to_owned(), |live| format!("{} by jobs", shown_bytes(live)));
        line(out, "room", &format!("{used} of {of} used ({percent} %), {live} that wait or run"))?;
        let first = match (room.fetched, room.unfetched) {
            (0, 0) => "nothing: no job that has ended holds anything".to_owned(),
            (0, stay) => format!(
                "nothing: no answer was fetched; those of {} stay until their time is up",
                super::counted(stay, "job")
            ),
            (go, stay) => {
                let others = if stay == 1 { "1 other".to_owned() } else { format!("{stay} others") };
                format!(
                    "what belongs to {} whose answers were fetched; that of {others} stays",
                    super::counted(go, "job")
                )
            }
        };
        line(out, "goes first", &first)?;
        if room.used > quota && room.fetched == 0 {
            let error = StoreError::OverQuota { used: room.used, quota, live: room.live };
            self.wrong.push(format!("new jobs are refused: {error}"));
        }
        Ok(())
    }

    fn show_inside(&mut self, data_dir: &Path, storage: &StorageSettings, out: &mut dyn Write) -> anyhow::Result<()> {
        match examine::has_server(data_dir) {
            Ok(true) => line(out, "server", "one runs on this data dir")?,
            Ok(false) => line(out, "server", "none runs on this data dir")?,
            Err(error) => self.wrong.push(error.to_string()),
        }
        let unusable = examine::why_unusable(data_dir)?;
        let is_new = unusable.is_none();
        self.wrong.extend(unusable);
        match examine::look(data_dir) {
            Ok(None) if is_new => line(out, "jobs", "no database yet; the first start makes it")?,
            Ok(None) => line(out, "jobs", "no database")?,
            Ok(Some(inside)) => {
                line(out, "jobs", &jobs(&inside.jobs))?;
                line(out, "files", &format!("{} named by the database", counted(inside.files)))?;
                if let Some(room) = inside.room {
                    self.show_room(room, storage, out)?;
                }
                if inside.schema > inside.schema_known {
                    self.wrong.push(format!(
                        "{}: the database has schema {}, this version of roundhouse knows {}: use the newer program",
                        data_dir.display(),
                        inside.schema,
                        inside.schema_known
                    ));
                } else if inside.schema < inside.schema_known {
                    let text = "an older version's database: the next start brings it up to date";
                    self.advice.push(format!("{}: {text}", data_dir.display()));
                }
            }
            Err(error @ StoreError::Unusable(_)) => line(out, "jobs", &format!("not to be seen now: {error}"))?,
            Err(error) => self.wrong.push(told(error)),
        }
        Ok(())
    }

    fn look_deep(&mut self, data_dir: &Path, out: &mut dyn Write) -> anyhow::Result<()> {
        match examine::look(data_dir) {
            Ok(Some(inside)) if inside.schema == inside.schema_known => {}
            Ok(None) => return Ok(()),
            Ok(Some(_)) => {
                self.wrong.push("--deep: the database is of another version, so it cannot be read in depth".into());
                return Ok(());
            }
            Err(StoreError::Unusable(_)) => {
                self.wrong.push("--deep: a server keeps the database to itself; stop it first".into());
                return Ok(());
            }
            // Told already.
            Err(_) => return Ok(()),
        }
        let mut shown = Shown::new();
        let faults = examine::thoroughly(data_dir, &mut |progress| shown.show(progress));
        shown.end();
        match faults {
            Ok(faults) => {
                line(out, "whole files", &counted(faults.whole))?;
                self.judge_faults(data_dir, faults);
            }
            Err(error) => self.wrong.push(told(error)),
        }
        Ok(())
    }

    fn judge_faults(&mut self, data_dir: &Path, faults: Faults) {
        let Faults { database, missing, damaged, unnamed, unnamed_bytes, whole: _ } = faults;
        if !database.is_empty() {
            let shown = data_dir.join(DATABASE);
            self.wrong.push(format!("{}: damaged: stop the server and restore a backup", shown.display()));
        }
        self.wrong.extend(listed(database));
        self.wrong.extend(
            listed(missing).into_iter().map(|path| format!("artifacts/{path}: a row names it, and it is gone")),
        );
        let damaged = listed(damaged).into_iter();
        self.wrong.extend(
            damaged.map(|path| {
                format!("artifacts/{path}: does not have the checksum it was stored with, or cannot be read")
            }),
        );
        if !unnamed.is_empty() {
            self.advice.push(format!(
                "{} files ({}) under artifacts/ that no row names, as an interrupted write leaves them; the server collects \
                 old ones by itself",
                unnamed.len(),
                shown_bytes(unnamed_bytes)
            ));
            self.advice.extend(listed(unnamed).into_iter().map(|path| format!("artifacts/{path}: no row names it")));
        }
    }
}

/// What is wrong if there is no reserve; `None`: the next start makes it.
fn no_reserve(data_dir: &Path, free: u64, storage: &StorageSettings, has_server: bool) -> Option<String> {
    let reserve =
        format!("the reserve for a full disk ({}, storage.reserve) is not there", shown_bytes(storage.reserve_bytes));
    let (shown, needed) = (data_dir.display(), storage.free_min_bytes.saturating_add(storage.reserve_bytes));
    if free < needed {
        return Some(format!(
            "{shown}: {reserve}, and {} free is not enough to make it: new jobs are refused; make room there, {} more at least",
            shown_bytes(free),
            shown_bytes(needed - free)
        ));
    }
    has_server.then(|| {
        format!(
            "{shown}: {reserve}, though there is room for it: new jobs are refused until the server has made it again, which \
             it tries every second; if this stays, its log says why"
        )
    })
}

/// Without the advice to ask the doctor.
fn told(error: StoreError) -> String {
    match error {
        StoreError::Corrupt(text) => {
            format!("{text}: damaged: stop the server and restore a backup (roundhouse restore)")
        }
        error => error.to_string(),
    }
}

/// The first of many lines, and how many more there are.
fn listed(lines: Vec<String>) -> Vec<String> {
    let more = lines.len().saturating_sub(LISTED_MAX);
    let mut shown: Vec<String> = lines.into_iter().take(LISTED_MAX).collect();
    if more > 0 {
        shown.push(format!("... and {more} more"));
    }
    shown
}

fn line(out: &mut dyn Write, name: &str, text: &str) -> std::io::Result<()> {
    writeln!(out, "{name:<12} {text}")
}

/// The folder of a script's virtual environment.
fn environment_of(spec: &ModelSpec) -> Option<PathBuf> {
    let Launch::Script { python, .. } = &spec.launch else {
        return None;
    };
    // .venv/bin/python
    let folder = python.parent()?.parent()?;
    (python.components().count() > 2).then(|| folder.to_owned())
}

fn show_places(places: &[Place], out: &mut dyn Write) -> std::io::Result<()> {
    let size = |place: &Place| place.bytes.map_or_else(|| "not there".to_owned(), shown_bytes);
    let kind = |place: &Place| place.file_system.as_ref().map_or("?".to_owned(), |found| found.name.to_string());
    let stays = |place: &Place| match &place.file_system {
        Some(found) if found.is_persistent() => "stays",
        Some(_) => "gone with the pod",
        None => "?",
    };
    let rows: Vec<[String; 6]> = std::iter::once(["what", "size", "free", "disk", "lasts", "path"].map(str::to_owned))
        .chain(places.iter().map(|place| {
            let free = place.free.map_or("?".to_owned(), shown_bytes);
            let path = place.path.display().to_string();
            [place.what.clone(), size(place), free, kind(place), stays(place).to_owned(), path]
        }))
        .collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..5).map(width).collect();
    for [what, size, free, kind, stays, path] in &rows {
        writeln!(
            out,
            "{what:<w0$}  {size:>w1$}  {free:>w2$}  {kind:<w3$}  {stays:<w4$}  {path}",
            w0 = widths[0],
            w1 = widths[1],
            w2 = widths[2],
            w3 = widths[3],
            w4 = widths[4],
        )?;
    }
    let sum: u64 = places.iter().filter_map(|place| place.bytes).sum();
    writeln!(out, "{:<w0$}  {:>w1$}", "all of it", shown_bytes(sum), w0 = widths[0], w1 = widths[1])?;
    let absent = places.iter().filter(|place| place.kind == Kind::Weights && place.bytes.is_none()).count();
    if absent > 0 {
        writeln!(out, "Weights of {absent} models are still to be downloaded; see the sizes on their pages.")?;
    }
    Ok(())
}

/// What a file or folder takes on its disk; `None`: it is not there. Links are not followed, and what cannot be read is not
/// counted.
fn used(path: &Path) -> Option<u64> {
    let mut total = 0;
    let mut waiting = vec![path.to_owned()];
    let mut counted = BTreeSet::new();
    std::fs::symlink_metadata(path).ok()?;
    while let Some(path) = waiting.pop() {
        let Ok(found) = std::fs::symlink_metadata(&path) else { continue };
        if found.is_dir() {
            let entries = std::fs::read_dir(&path).into_iter().flatten().flatten();
            waiting.extend(entries.map(|entry| entry.path()));
        }
        // Files with several names are there once.
        if found.is_dir() || found.nlink() == 1 || counted.insert((found.dev(), found.ino())) {
            total += found.blocks() * 512;
        }
    }
    Some(total)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    const ENTRIES: &str = "models:
  a: {type: image, service_script: models/echo/server.py, model: org/name}
  b: {type: text, command: x, model: ./weights, env: {HF_HOME: /elsewhere}}
";

    struct Site {
        dir: tempfile::TempDir,
        args: DoctorArgs,
    }

    impl Site {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let config = dir.path().join("models.yaml");
            std::fs::create_dir_all(dir.path().join("models/echo")).unwrap();
            std::fs::write(dir.path().join("models/echo/server.py"), "").unwrap();
            std::fs::write(&config, ENTRIES).unwrap();
            let args = DoctorArgs {
                data_dir: dir.path().join("data"),
                config: Some(config),
                snapshot_dir: None,
                allow_network_fs: false,
                deep: false,
            };
            Self { dir, args }
        }

        /// What it says and what is wrong. `disks`: as ROUNDHOUSE_STATFS, relative to the folder.
        fn says(&self, disks: &[(&str, u32)], hub: &str) -> (String, Vec<String>) {
            let told: Vec<(PathBuf, u32)> =
                disks.iter().map(|(path, kind)| (self.dir.path().join(path), *kind)).collect();
            let file_systems = FileSystems::asking(Arc::new(move |path| {
                Ok(told.iter().find(|(told, _)| path.starts_with(told)).map_or(0xef53, |(_, kind)| *kind))
            }));
            let hub = self.dir.path().join(hub).display().to_string();
            let home = self.dir.path().join("home").display().to_string();
            let env = move |name: &str| match name {
                "HF_HUB_CACHE" => Some(hub.clone()),
                "HOME" => Some(home.clone()),
                _ => None,
            };
            let mut doctor =
                Doctor { args: &self.args, env: &env, file_systems, wrong: Vec::new(), advice: Vec::new() };
            let mut out = Vec::new();
            doctor.look(&mut out).unwrap();
            (String::from_utf8(out).unwrap(), doctor.wrong)
        }
    }

    fn row<'a>(text: &'a str, what: &str) -> &'a str {
        text.lines().find(|line| line.starts_with(what)).unwrap_or_else(|| panic!("no {what}: {text}"))
    }

    #[test]
    fn places_are_listed_before_anything_is_there() {
        let site = Site::new();
        let (text, wrong) = site.says(&[], "hub");
        assert!(wrong.is_empty(), "{wrong:?}");
        for what in ["database", "files of jobs", "weights of a", "weights of b", "environment of a"] {
            assert!(row(&text, what).contains("not there"), "{text}");
        }
        assert!(row(&text, "weights of a").ends_with("/hub/models--org--name"), "{text}");
        assert!(row(&text, "weights of b").ends_with("/weights"), "{text}");
        assert!(row(&text, "environment of a").ends_with("models/echo/.venv"), "{text}");
        assert!(text.contains("Weights of 2 models are still to be downloaded"), "{text}");
        assert!(row(&text, "jobs").contains("no database yet") && row(&text, "quota").contains("half"), "{text}");
        assert!(row(&text, "SQLite").contains("3.5"), "{text}");
    }

    #[test]
    fn sizes_are_summed_and_links_counted_once() {
        let site = Site::new();
        let blobs = site.dir.path().join("hub/models--org--name/blobs");
        std::fs::create_dir_all(&blobs).unwrap();
        std::fs::write(blobs.join("x"), vec![1; 1 << 20]).unwrap();
        std::fs::hard_link(blobs.join("x"), blobs.join("y")).unwrap();
        std::os::unix::fs::symlink(blobs.join("x"), blobs.join("z")).unwrap();
        let (text, _) = site.says(&[], "hub");
        assert!(row(&text, "weights of a").contains("1.0 MiB"), "{text}");
        assert!(row(&text, "all of it").contains("1.0 MiB"), "{text}");
    }

    #[test]
    fn what_lies_badly_is_said() {
        let site = Site::new();
        let (text, wrong) = site.says(&[("data", 0x6969)], "hub");
        assert!(wrong.len() == 1 && wrong[0].contains("NFS") && text.contains("Wrong:"), "{text}");
        let (text, wrong) = site.says(&[("data", 0x794c_7630), ("hub", 0x0102_1994), ("models", 0x6573_5546)], "hub");
        assert!(wrong.is_empty() && row(&text, "database").contains("gone with the pod"), "{text}");
        for advice in ["--snapshot-dir", "set HF_HOME", "install it on a local disk"] {
            assert!(text.contains(advice), "{advice}: {text}");
        }
    }

    #[test]
    fn what_keeps_jobs_from_being_stored_is_wrong() {
        let site = Site::new();
        let path = site.dir.path().join("models.yaml");
        let data = &site.args.data_dir;
        std::fs::write(&path, format!("{ENTRIES}storage: {{free_min: 1, reserve: 8000TiB}}\n")).unwrap();
        let (_, wrong) = site.says(&[], "hub");
        assert!(wrong.is_empty(), "nothing was there yet: {wrong:?}");
        std::fs::create_dir(data).unwrap();
        std::fs::write(data.join("roundhouse.db"), "").unwrap();
        let (_, wrong) = site.says(&[], "hub");
        assert!(wrong.iter().any(|line| line.contains("storage.reserve")), "{wrong:?}");
        // A file where a folder belongs cannot be written into, whoever asks.
        std::fs::remove_dir_all(data).unwrap();
        std::fs::write(data, "").unwrap();
        let (text, wrong) = site.says(&[], "hub");
        assert!(wrong.iter().any(|line| line.contains("--data-dir") && line.contains("cannot be written")), "{text}");
        assert!(!text.contains("Nothing is wrong"), "{text}");
    }

    #[test]
    fn a_reserve_that_is_not_there_is_wrong_if_there_is_no_room_or_a_server_should_have_made_it() {
        let storage = StorageSettings { free_min_bytes: 2 << 20, reserve_bytes: 1 << 20, ..StorageSettings::default() };
        let says = |free: u64, has_server| no_reserve(Path::new("data"), free, &storage, has_server);
        for has_server in [false, true] {
            let said = says(1 << 20, has_server).unwrap();
            assert!(said.contains("1.0 MiB free is not enough") && said.contains("2.0 MiB more at least"), "{said}");
        }
        assert_eq!(says(3 << 20, false), None, "the next start makes it");
        let said = says(3 << 20, true).unwrap();
        assert!(said.contains("though there is room") && !said.contains("more at least"), "{said}");
    }

    #[test]
    fn a_quota_that_is_used_up_is_wrong_unless_something_may_go() {
        let site = Site::new();
        let (used, quota) = (3 << 20, Some(2 << 20));
        let says = |room: Room, storage: &StorageSettings| {
            let env = |_: &str| None;
            let (file_systems, wrong, advice) = (FileSystems::real(), Vec::new(), Vec::new());
            let mut doctor = Doctor { args: &site.args, env: &env, file_systems, wrong, advice };
            let mut out = Vec::new();
            doctor.show_room(room, storage, &mut out).unwrap();
            (String::from_utf8(out).unwrap(), doctor.wrong)
        };
        let usual = StorageSettings::default();
        let room = Room { used, quota, live: Some(1 << 20), fetched: 0, unfetched: 4 };
        let (text, wrong) = says(room, &usual);
        assert!(row(&text, "room").contains("3.0 MiB of 2.0 MiB used (150 %), 1.0 MiB by jobs"), "{text}");
        assert!(row(&text, "goes first").contains("those of 4 jobs stay"), "{text}");
        assert!(wrong.len() == 1 && wrong[0].contains("quota is used up"), "{wrong:?}");
        let (text, wrong) = says(Room { fetched: 7, ..room }, &usual);
        assert!(row(&text, "goes first").contains("7 jobs") && wrong.is_empty(), "{text} {wrong:?}");
        let (text, wrong) = says(Room { live: None, ..room }, &usual);
        assert!(row(&text, "room").contains("(150 %), too many jobs"), "{text}");
        assert!(wrong[0].contains("more than 50000 jobs wait") && wrong[0].contains("cancel some"), "{wrong:?}");
        let (_, wrong) = says(room, &StorageSettings { quota_bytes: Some(4 << 20), ..usual });
        assert!(wrong.is_empty(), "what is set counts: {wrong:?}");
    }

    #[test]
    fn a_refused_model_file_and_a_full_disk_are_wrong() {
        let site = Site::new();
        let path = site.dir.path().join("models.yaml");
        std::fs::write(&path, format!("{ENTRIES}storage: {{free_min: 8000TiB}}\n")).unwrap();
        let (_, wrong) = site.says(&[], "hub");
        assert!(wrong.len() == 1 && wrong[0].contains("storage.free_min"), "{wrong:?}");
        std::fs::write(&path, "modles: {}\n").unwrap();
        let (_, wrong) = site.says(&[], "hub");
        assert!(wrong.len() == 1 && wrong[0].contains("did you mean"), "{wrong:?}");
    }

    #[test]
    fn a_damaged_database_is_told_without_sending_the_reader_in_a_circle() {
        let mut site = Site::new();
        site.args.deep = true;
        std::fs::create_dir(&site.args.data_dir).unwrap();
        std::fs::write(site.args.data_dir.join("roundhouse.db"), vec![0xa5; 8_192]).unwrap();
        let (text, wrong) = site.says(&[], "hub");
        assert!(wrong.len() == 1 && wrong[0].contains("data/roundhouse.db"), "{wrong:?}");
        assert!(wrong[0].contains("roundhouse restore") && !text.contains("doctor"), "{text}");
    }
}
