//! Backups: a copy of the data dir's jobs that can be taken while a server runs, and be restored anywhere.
//!
//! A backup is a folder: `roundhouse.db` (a snapshot made by `VACUUM INTO`, whose table `file` names every file with its
//! checksum), `artifacts/` as in a data dir, and `manifest.json`. A crash leaves the former backup usable, since things
//! change in this order:
//! 1. The snapshot is written beside the former one, and the files it names that are not there yet are added, each under a
//!    temporary name, verified, fsynced, renamed.
//! 2. `manifest.next.json` tells the snapshot's checksum; then the snapshot is renamed to `roundhouse.db`, and that manifest
//!    to `manifest.json`. A reader accepts a database that either of the two describes.
//! 3. Files that only the former snapshot named are removed.
//!
//! `restore` is the other half.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ffi::OsStr;
use std::fs::{DirBuilder, File};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::{Read as _, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, OptionalExtension as _, params};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tokio::time::Instant;

use super::StoreError;
use super::files::hex;
pub use super::lost::{LostFile, listed};
use super::lost::{is_damage, lost_files};
use super::open::DATABASE;
use crate::clock::{Clock, rfc3339};
use crate::domain::JobId;

/// Folder of files, in a data dir and in a backup.
pub(super) const ARTIFACTS: &str = "artifacts";
const MANIFEST: &str = "manifest.json";
const MANIFEST_NEXT: &str = "manifest.next.json";
/// Says that a folder is a backup; locked while one is written.
const MARK: &str = "roundhouse-backup.lock";
const DATABASE_NEXT: &str = "roundhouse.db.next";
/// Ends the names of files in the making.
const TEMPORARY: &str = ".roundhouse-tmp";
/// Shape of a backup; a larger number is refused.
const FORMAT: u32 = 1;
const CHUNK_BYTES: usize = 1 << 20;
/// Snapshots taken at most until all files of one were caught before retention deleted them.
const PASSES_MAX: u32 = 8;
/// How long a deleted file's row may outlive it.
const ROW_GOES_WITHIN: Duration = Duration::from_secs(3);
/// Where a restored copy remembers whose it is.
const RESTORED_FROM: &str = "restored_from";
const ID: &str = "data_dir_id";

/// What `manifest.json` tells.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Shape of the backup.
    pub format: u32,
    /// When the snapshot was taken.
    pub created_at: String,
    /// The version of the program that wrote it.
    pub version: String,
    /// Of the data dir it is a copy of.
    pub data_dir_id: String,
    /// How many jobs are in which state.
    pub jobs: BTreeMap<String, u64>,
    /// How many files the snapshot names.
    pub files: u64,
    /// Their bytes.
    pub file_bytes: u64,
    /// Size of the database.
    pub database_bytes: u64,
    /// Checksum of the database.
    pub database_sha256: String,
    /// Files that were lost or damaged before the backup, and are not in it.
    #[serde(default)]
    pub damaged: Vec<String>,
}

/// Files, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// How many.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Count {
    pub(super) fn add(&mut self, bytes: u64) {
        self.files += 1;
        self.bytes += bytes;
    }
}

/// How far a backup or a restore is.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// For example `copying`.
    pub step: &'static str,
    /// Files and bytes behind us.
    pub done: Count,
    /// All of them.
    pub total: Count,
}

/// Is told how far it is, for every file.
pub type Watch<'a> = &'a mut dyn FnMut(Progress);

/// What a backup did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Done {
    /// What is in it now.
    pub manifest: Manifest,
    /// Files that were copied.
    pub copied: Count,
    /// Files that were there already.
    pub kept: Count,
    /// Files that are not needed any more, and were removed.
    pub removed: Count,
    /// Files that are not in it, since they were lost or damaged.
    pub lost: Vec<LostFile>,
}

pub(super) fn in_file(path: &Path) -> impl Fn(std::io::Error) -> StoreError {
    let path = path.display().to_string();
    move |source| StoreError::File { path: path.clone(), source }
}

/// A folder with a backup that nobody else writes to for as long as this lives.
#[derive(Debug)]
pub struct Held {
    _lock: File,
}

impl Held {
    /// `None`: the folder holds no backup, nor one in the making.
    pub fn of(folder: &Path) -> Result<Option<Self>, StoreError> {
        let mark = folder.join(MARK);
        if !mark.exists() && !is_backup(folder) {
            return Ok(None);
        }
        lock(&mark).map(|lock| Some(Self { _lock: lock }))
    }
}

/// A folder that backups of one data dir are written to, locked for as long as this lives.
#[derive(Debug)]
pub struct Destination {
    data_dir: PathBuf,
    folder: PathBuf,
    /// Opened once: should the database's file be removed or replaced, this is still the one of before.
    live: Connection,
    _held: Held,
}

impl Destination {
    /// Makes the folder if it is not there. Refuses one that is not empty and no backup, one in the data dir, one that holds
    /// the backup of another data dir, and one that somebody else writes to. `held`: the folder, if it is ours already.
    pub fn open(data_dir: &Path, folder: &Path, held: Option<Held>) -> Result<Self, StoreError> {
        let data_dir = data_dir.canonicalize().map_err(in_file(data_dir))?;
        if !data_dir.join(DATABASE).exists() {
            let reason = super::examine::why_unusable(&data_dir)?.unwrap_or_else(|| {
                format!(
                    "{} holds no database ({DATABASE}): name the data dir of a server with --data-dir",
                    data_dir.display()
                )
            });
            return Err(StoreError::Unusable(reason));
        }
        let folder = std::path::absolute(folder).map_err(in_file(folder))?;
        let above = super::placement::existing(&folder);
        let real = above.canonicalize().map_err(in_file(&above))?;
        let real = real.join(folder.strip_prefix(&above).unwrap_or(Path::new("")));
        if real.starts_with(&data_dir) || data_dir.starts_with(&real) {
            return Err(StoreError::Unusable(format!(
                "{} and the data dir {} lie within each other: choose another folder for the backup",
                folder.display(),
                data_dir.display()
            )));
        }
        make_folders(&folder)?;
        let is_backup = folder.join(MARK).exists() || folder.join(MANIFEST).exists();
        if !is_backup && !is_empty(&folder)? {
            return Err(StoreError::Unusable(format!(
                "{} is not empty and holds no backup of roundhouse: choose another folder, or empty this one",
                folder.display()
            )));
        }
        let held = held.map_or_else(|| lock(&folder.join(MARK)).map(|lock| Held { _lock: lock }), Ok)?;
        let live = open_live(&data_dir)?;
        let destination = Self { data_dir, folder, live, _held: held };
        // The first read opens the log, too.
        destination.is_ours().map_err(|error| explained(&destination.data_dir, error))?;
        Ok(destination)
    }

    /// The database that is copied.
    pub(super) fn live(&self) -> &Connection {
        &self.live
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A backup of another data dir is not overwritten, unless this one was restored from it.
    fn is_ours(&self) -> Result<(), StoreError> {
        let ours = [meta(&self.live, ID)?, meta(&self.live, RESTORED_FROM)?];
        let Some(manifest) = read_manifest(&self.folder.join(MANIFEST))? else {
            return Ok(());
        };
        if manifest.data_dir_id.is_empty() || ours.contains(&Some(manifest.data_dir_id)) {
            return Ok(());
        }
        Err(StoreError::Unusable(format!(
            "{} holds the backup of another data dir, of {}: choose another folder, or move that backup away",
            self.folder.display(),
            manifest.created_at
        )))
    }

    /// Brings the backup up to date. With `without_lost`, files that are lost or damaged in the data dir are left out and
    /// listed in the manifest; else they are an error, which names them. Blocks.
    pub fn back_up(&self, clock: &dyn Clock, without_lost: bool, watch: Watch<'_>) -> Result<Done, StoreError> {
        check_schema(&self.live, &self.data_dir).map_err(|error| explained(&self.data_dir, error))?;
        for pass in 1.. {
            match self.pass(clock, without_lost, watch)? {
                Pass::Done(done) => return Ok(*done),
                Pass::Vanished(path) if pass == PASSES_MAX => {
                    return Err(StoreError::Unusable(format!(
                        "{ARTIFACTS}/{path} was deleted by retention while it was to be copied, {PASSES_MAX} times in a row \
                         something like it: is {} much slower than jobs expire?",
                        self.folder.display()
                    )));
                }
                Pass::Vanished(_) => {}
            }
        }
        Err(StoreError::Stopped)
    }

    fn pass(&self, clock: &dyn Clock, without_lost: bool, watch: Watch<'_>) -> Result<Pass, StoreError> {
        let mut manifest = Manifest {
            format: FORMAT,
            created_at: rfc3339(clock.now()),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Manifest::default()
        };
        watch(Progress { step: "database", done: Count::default(), total: Count::default() });
        let next = self.folder.join(DATABASE_NEXT);
        remove_if_there(&next)?;
        self.live
            .execute("VACUUM INTO ?1", [path_text(&next)?])
            .map_err(|error| in_database(&self.data_dir.join(DATABASE), error))?;
        let snapshot = open_still(&next)?;
        manifest.jobs = jobs_by_state(&snapshot)?;
        manifest.data_dir_id = meta(&snapshot, ID)?.unwrap_or_default();
        let mut copying = Copying {
            live: &self.live,
            destination: self,
            watch,
            done: None,
            folders: BTreeSet::new(),
            missed: Vec::new(),
        };
        let files = match copying.run(&snapshot)? {
            Ok(files) => files,
            Err(vanished) => return Ok(Pass::Vanished(vanished)),
        };
        let missed = copying.missed.into_iter();
        let lost: Vec<LostFile> = missed.map(|(file, is_gone)| file.lost(&snapshot, is_gone)).collect();
        if !without_lost && !lost.is_empty() {
            return Err(lost_files(&lost, "put them back, for example from an earlier backup", "backup"));
        }
        manifest.damaged = lost.iter().map(|file| file.path.clone()).collect();
        manifest.files = files.copied.files + files.kept.files;
        manifest.file_bytes = files.copied.bytes + files.kept.bytes;
        drop(snapshot);
        (manifest.database_sha256, manifest.database_bytes) = digest(&next)?;
        File::open(&next).and_then(|file| file.sync_all()).map_err(in_file(&next))?;
        self.finish_former()?;
        self.write_manifest(&manifest)?;
        let database = self.folder.join(DATABASE);
        std::fs::rename(&next, &database).map_err(in_file(&database))?;
        sync_folder(&self.folder)?;
        let described = self.folder.join(MANIFEST);
        std::fs::rename(self.folder.join(MANIFEST_NEXT), &described).map_err(in_file(&described))?;
        sync_folder(&self.folder)?;
        let removed = remove_others(&self.folder.join(ARTIFACTS), &files.named)?;
        Ok(Pass::Done(Box::new(Done { manifest, copied: files.copied, kept: files.kept, removed, lost })))
    }

    /// A former pass may have ended between its two renames: then the next manifest is the one of the database, and has to
    /// get its place before it is written anew.
    fn finish_former(&self) -> Result<(), StoreError> {
        let (next, database) = (self.folder.join(MANIFEST_NEXT), self.folder.join(DATABASE));
        let Some(manifest) = read_manifest(&next)? else {
            return Ok(());
        };
        if database.exists() && digest(&database)?.0 == manifest.database_sha256 {
            let described = self.folder.join(MANIFEST);
            std::fs::rename(&next, &described).map_err(in_file(&described))?;
            sync_folder(&self.folder)?;
        }
        Ok(())
    }

    fn write_manifest(&self, manifest: &Manifest) -> Result<(), StoreError> {
        let path = self.folder.join(MANIFEST_NEXT);
        let mut text =
            serde_json::to_string_pretty(manifest).map_err(|error| StoreError::Database(error.to_string()))?;
        text.push('\n');
        let temporary = self.folder.join(format!("{MANIFEST_NEXT}{TEMPORARY}"));
        let mut file = new_file(&temporary)?;
        file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(in_file(&temporary))?;
        std::fs::rename(&temporary, &path).map_err(in_file(&path))?;
        sync_folder(&self.folder)
    }
}

enum Pass {
    Done(Box<Done>),
    /// A file was deleted by retention after the snapshot; its path.
    Vanished(String),
}

/// The files of one pass.
struct Files {
    copied: Count,
    kept: Count,
    /// Hashes of their paths: a clash keeps a file that could go.
    named: HashSet<u64>,
}

struct Copying<'a, 'w> {
    live: &'a Connection,
    destination: &'a Destination,
    watch: Watch<'w>,
    /// The former backup's database; its files were verified when they were copied.
    done: Option<Connection>,
    /// Folders with new names in them, to be fsynced.
    folders: BTreeSet<PathBuf>,
    /// Files that the source has not as their rows say, and whether they are gone.
    missed: Vec<(FileRow, bool)>,
}

impl Copying<'_, '_> {
    /// Copies what the snapshot names and the destination lacks; the inner `Err`: the path of a file that retention deleted
    /// meanwhile.
    fn run(&mut self, snapshot: &Connection) -> Result<Result<Files, String>, StoreError> {
        let former = self.destination.folder.join(DATABASE);
        self.done = former.exists().then(|| open_still(&former).ok()).flatten();
        let total = files_in(snapshot)?;
        let target = self.destination.folder.join(ARTIFACTS);
        make_folders(&target)?;
        let mut files = Files { copied: Count::default(), kept: Count::default(), named: HashSet::new() };
        let mut statement = snapshot.prepare(ALL_FILES)?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let file = FileRow::of(row)?;
            let relative = file.relative()?;
            let (from, to) = (self.destination.data_dir.join(ARTIFACTS).join(relative), target.join(relative));
            files.named.insert(hash_of(relative.as_os_str()));
            if self.is_there(&file, &to)? {
                files.kept.add(file.bytes);
            } else {
                match copy_verified(&from, &to, &file) {
                    Ok(()) => files.copied.add(file.bytes),
                    Err(error) if is_damage(&error, &from) => self.missed.push((file, !from.exists())),
                    Err(_) if !file.is_in(self.live)? => return Ok(Err(file.path)),
                    Err(error) => return Err(error),
                }
                self.folders.extend(to.parent().map(Path::to_owned));
            }
            let done =
                Count { files: files.copied.files + files.kept.files, bytes: files.copied.bytes + files.kept.bytes };
            (self.watch)(Progress { step: "files", done, total });
        }
        if let Some(vanished) = self.settle()? {
            return Ok(Err(vanished));
        }
        for folder in &self.folders {
            sync_folder(folder)?;
        }
        sync_folder(&target)?;
        Ok(Ok(files))
    }

    /// Whether the destination has the file already: of the right size, and verified before or now.
    fn is_there(&self, file: &FileRow, to: &Path) -> Result<bool, StoreError> {
        let Ok(found) = std::fs::symlink_metadata(to) else {
            return Ok(false);
        };
        if !found.is_file() || found.len() != file.bytes {
            return Ok(false);
        }
        let was_verified = self.done.as_ref().is_some_and(|done| file.is_in(done).unwrap_or(false));
        Ok(was_verified || digest(to)?.0 == file.sha256)
    }

    /// Whether a file that could not be copied was deleted by retention: then the live database does not name it any more,
    /// or will not shortly. Its path. Those that the former backup had not either are not waited for.
    fn settle(&self) -> Result<Option<String>, StoreError> {
        let former = read_manifest(&self.destination.folder.join(MANIFEST))?.unwrap_or_default();
        let known: HashSet<&str> = former.damaged.iter().map(String::as_str).collect();
        let is_news = |(file, is_gone): &(FileRow, bool)| *is_gone && !known.contains(file.path.as_str());
        let begun = Instant::now();
        loop {
            for (file, _) in &self.missed {
                if !file.is_in(self.live)? {
                    return Ok(Some(file.path.clone()));
                }
            }
            if !self.missed.iter().any(is_news) || begun.elapsed() > ROW_GOES_WITHIN {
                return Ok(None);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

// ---- what backups and restores share ---------------------------------------------

pub(super) const ALL_FILES: &str = "SELECT number, role, position, bytes, sha256, path FROM file";

/// A row of the table `file`.
#[derive(Clone, Debug)]
pub(super) struct FileRow {
    number: i64,
    role: String,
    position: i64,
    pub(super) bytes: u64,
    pub(super) sha256: String,
    pub(super) path: String,
}

impl FileRow {
    pub(super) fn of(row: &rusqlite::Row<'_>) -> Result<Self, StoreError> {
        Ok(Self {
            number: row.get(0)?,
            role: row.get(1)?,
            position: row.get(2)?,
            bytes: row.get::<_, i64>(3)?.unsigned_abs(),
            sha256: row.get(4)?,
            path: row.get(5)?,
        })
    }

    /// The path, if it stays inside the folder of files.
    pub(super) fn relative(&self) -> Result<&Path, StoreError> {
        let path = Path::new(&self.path);
        let is_inside = path.components().all(|part| matches!(part, Component::Normal(_)));
        if is_inside && path.file_name().is_some() {
            return Ok(path);
        }
        Err(StoreError::Corrupt(format!("a row names the file `{}`, which lies outside of {ARTIFACTS}/", self.path)))
    }

    /// The file as one that is lost; `c` has its row.
    pub(super) fn lost(self, c: &Connection, is_gone: bool) -> LostFile {
        let job = c.query_row("SELECT created_at, tag FROM job WHERE number = ?1", [self.number], |row| {
            Ok(JobId::new(row.get(0)?, self.number, row.get::<_, i64>(1)?.cast_unsigned()))
        });
        LostFile { path: self.path, job: job.ok(), is_gone }
    }

    /// Whether another database names the same file.
    pub(super) fn is_in(&self, c: &Connection) -> Result<bool, StoreError> {
        let found: Option<i64> = c
            .prepare_cached(
                "SELECT 1 FROM file WHERE number = ?1 AND role = ?2 AND position = ?3 AND path = ?4 AND sha256 = ?5 AND bytes = ?6",
            )?
            .query_row(
                params![self.number, self.role, self.position, self.path, self.sha256, self.bytes.cast_signed()],
                |row| row.get(0),
            )
            .optional()?;
        Ok(found.is_some())
    }
}

/// Copies a file under a temporary name, compares its checksum on the way, makes it durable, renames it. The folder is to be
/// fsynced by the caller.
pub(super) fn copy_verified(from: &Path, to: &Path, file: &FileRow) -> Result<(), StoreError> {
    let mut source = File::open(from).map_err(in_file(from))?;
    let folder = to.parent().unwrap_or(Path::new("/"));
    make_folders(folder)?;
    let mut name = to.file_name().unwrap_or_default().to_owned();
    name.push(TEMPORARY);
    let temporary = folder.join(name);
    let copied = match copy_hashed(&mut source, from, &temporary) {
        Ok((sha256, bytes)) if sha256 == file.sha256 && bytes == file.bytes => Ok(()),
        Ok(_) => Err(StoreError::Damaged { path: from.display().to_string() }),
        Err(error) => Err(error),
    };
    if copied.is_err() {
        remove_if_there(&temporary)?;
        return copied;
    }
    std::fs::rename(&temporary, to).map_err(in_file(to))
}

/// Copies, fsyncs, and returns checksum and size of what was copied.
pub(super) fn copy_hashed(source: &mut File, from: &Path, to: &Path) -> Result<(String, u64), StoreError> {
    let mut target = new_file(to)?;
    let (sha256, bytes) = each_chunk(source, from, |chunk| target.write_all(chunk).map_err(in_file(to)))?;
    target.sync_all().map_err(in_file(to))?;
    Ok((sha256, bytes))
}

/// Checksum and size of a file.
pub(super) fn digest(path: &Path) -> Result<(String, u64), StoreError> {
    each_chunk(&mut File::open(path).map_err(in_file(path))?, path, |_| Ok(()))
}

fn each_chunk(
    source: &mut File,
    from: &Path,
    mut take: impl FnMut(&[u8]) -> Result<(), StoreError>,
) -> Result<(String, u64), StoreError> {
    let (mut hash, mut bytes) = (Sha256::new(), 0_u64);
    let mut chunk = vec![0_u8; CHUNK_BYTES];
    loop {
        let count = source.read(&mut chunk).map_err(in_file(from))?;
        if count == 0 {
            return Ok((hex(&hash.finalize()), bytes));
        }
        hash.update(&chunk[..count]);
        take(&chunk[..count])?;
        bytes += count as u64;
    }
}

/// Readable by its owner only: prompts and answers lie in it.
fn new_file(path: &Path) -> Result<File, StoreError> {
    File::options().create(true).truncate(true).write(true).mode(0o600).open(path).map_err(in_file(path))
}

pub(super) fn make_folders(folder: &Path) -> Result<(), StoreError> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(in_file(folder))
}

pub(super) fn sync_folder(folder: &Path) -> Result<(), StoreError> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(in_file(folder))
}

pub(super) fn remove_if_there(path: &Path) -> Result<(), StoreError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(in_file(path)(error)),
        _ => Ok(()),
    }
}

/// What a fresh volume has is nothing.
fn is_empty(folder: &Path) -> Result<bool, StoreError> {
    for entry in std::fs::read_dir(folder).map_err(in_file(folder))? {
        if entry.map_err(in_file(folder))?.file_name() != "lost+found" {
            return Ok(false);
        }
    }
    Ok(true)
}

fn lock(path: &Path) -> Result<File, StoreError> {
    let file =
        File::options().create(true).truncate(false).write(true).mode(0o600).open(path).map_err(in_file(path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(StoreError::Unusable(format!(
            "somebody else writes a backup to {}: a server with this --snapshot-dir, or `roundhouse backup`; wait, or choose \
             another folder",
            path.parent().unwrap_or(path).display()
        ))),
        // Some network file systems know no locks; then nobody is kept out.
        Err(std::fs::TryLockError::Error(error)) => {
            tracing::debug!("{}: not locked: {error}", path.display());
            Ok(file)
        }
    }
}

fn hash_of(path: &OsStr) -> u64 {
    let mut hasher = DefaultHasher::new();
    path.as_bytes().hash(&mut hasher);
    hasher.finish()
}

/// Removes files that the snapshot does not name, and folders that are empty then.
fn remove_others(root: &Path, named: &HashSet<u64>) -> Result<Count, StoreError> {
    let mut removed = Count::default();
    each_file(root, &mut |path, bytes| {
        let relative = path.strip_prefix(root).unwrap_or(path);
        if !named.contains(&hash_of(relative.as_os_str())) {
            remove_if_there(path)?;
            removed.add(bytes);
        }
        Ok(())
    })?;
    for entry in std::fs::read_dir(root).map_err(in_file(root))?.flatten() {
        // Fails where something is in it.
        let _ = std::fs::remove_dir(entry.path());
    }
    Ok(removed)
}

/// Calls `take` with each file under `folder` and its size.
pub(super) fn each_file(
    folder: &Path,
    take: &mut dyn FnMut(&Path, u64) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = match std::fs::read_dir(&folder) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            entries => entries.map_err(in_file(&folder))?,
        };
        for entry in entries {
            let entry = entry.map_err(in_file(&folder))?;
            match entry.metadata() {
                Ok(found) if found.is_dir() => folders.push(entry.path()),
                Ok(found) => take(&entry.path(), found.len())?,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(in_file(&entry.path())(error)),
            }
        }
    }
    Ok(())
}

/// A manifest, if there is one.
pub(super) fn read_manifest(path: &Path) -> Result<Option<Manifest>, StoreError> {
    let text = match std::fs::read_to_string(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        text => text.map_err(in_file(path))?,
    };
    let manifest: Manifest = serde_json::from_str(&text)
        .map_err(|error| StoreError::Unusable(format!("{}: the manifest is damaged: {error}", path.display())))?;
    if manifest.format > FORMAT {
        return Err(StoreError::Unusable(format!(
            "{}: written by roundhouse {}, in a shape that this version does not know: use that version",
            path.display(),
            manifest.version
        )));
    }
    Ok(Some(manifest))
}

/// The manifests that may describe a backup's database, the settled one first.
pub(super) fn manifests(folder: &Path) -> Result<Vec<Manifest>, StoreError> {
    let both = [read_manifest(&folder.join(MANIFEST))?, read_manifest(&folder.join(MANIFEST_NEXT))?];
    Ok(both.into_iter().flatten().collect())
}

/// Whether a folder holds a backup.
pub fn is_backup(folder: &Path) -> bool {
    folder.join(DATABASE).exists() && (folder.join(MANIFEST).exists() || folder.join(MANIFEST_NEXT).exists())
}

fn path_text(path: &Path) -> Result<&str, StoreError> {
    path.to_str().ok_or_else(|| StoreError::Unusable(format!("{}: the path is not UTF-8", path.display())))
}

/// A reading connection beside a server's. The database's file is never opened by other means in the server's process: a
/// close of that would drop SQLite's locks.
pub(super) fn open_live(data_dir: &Path) -> Result<Connection, StoreError> {
    let database = data_dir.join(DATABASE);
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let c = Connection::open_with_flags(&database, flags).map_err(|error| in_database(&database, error))?;
    c.busy_timeout(Duration::from_secs(5))?;
    Ok(c)
}

/// A database that nobody changes, perhaps on a file system without locks.
pub(super) fn open_still(database: &Path) -> Result<Connection, StoreError> {
    let text = path_text(database)?.replace('%', "%25").replace('?', "%3F").replace('#', "%23");
    let uri = format!("file:{text}?immutable=1");
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_URI;
    Connection::open_with_flags(uri, flags).map_err(|error| in_database(database, error))
}

/// The same error with the database's name.
pub(super) fn in_database(database: &Path, error: rusqlite::Error) -> StoreError {
    named(database, error.into())
}

/// The same error with the database of `data_dir` in it, and what to do if a server keeps others out.
pub(super) fn explained(data_dir: &Path, error: StoreError) -> StoreError {
    named(&data_dir.join(DATABASE), error)
}

fn named(database: &Path, error: StoreError) -> StoreError {
    let error = error.in_database(database);
    let database = database.display();
    match error {
        StoreError::Database(text) if text.contains("locked") => StoreError::Unusable(format!(
            "{database}: {text}: a server with --allow-network-fs shares its database with nobody; stop it first"
        )),
        StoreError::Database(text) => StoreError::Database(format!("{database}: {text}")),
        other => other,
    }
}

pub(super) fn meta(c: &Connection, key: &str) -> Result<Option<String>, StoreError> {
    Ok(c.query_row("SELECT value FROM meta WHERE key = ?1", [key], |row| row.get(0)).optional()?)
}

/// A copy must not have the original's id: two servers with one would end each other's workers. It gets its own at the first
/// start, and remembers whose copy it is, so that it may go on with the same backup.
pub(super) fn forget_id(c: &Connection) -> Result<(), StoreError> {
    let id = meta(c, ID)?;
    // And its share of another disk.
    c.execute("DELETE FROM meta WHERE key IN (?1, ?2, 'quota_bytes')", [ID, RESTORED_FROM])?;
    if let Some(id) = id {
        c.execute("INSERT INTO meta (key, value) VALUES (?1, ?2)", [RESTORED_FROM, &id])?;
    }
    Ok(())
}

pub(super) fn jobs_by_state(c: &Connection) -> Result<BTreeMap<String, u64>, StoreError> {
    let mut statement = c.prepare("SELECT state, count(*) FROM job GROUP BY state")?;
    let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get::<_, i64>(1)?.unsigned_abs())))?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// All files that a database names.
pub(super) fn files_in(c: &Connection) -> Result<Count, StoreError> {
    Ok(c.query_row("SELECT count(*), coalesce(sum(bytes), 0) FROM file", [], |row| {
        Ok(Count { files: row.get::<_, i64>(0)?.unsigned_abs(), bytes: row.get::<_, i64>(1)?.unsigned_abs() })
    })?)
}

/// The database must be of this version's schema, or the words about its tables mean nothing.
pub(super) fn check_schema(c: &Connection, data_dir: &Path) -> Result<(), StoreError> {
    let (found, known) = (schema(c)?, super::open::schema_version());
    if found == known {
        return Ok(());
    }
    let advice = if found < known {
        "start the server of this version on it once, which brings it up to date, or use the older program"
    } else {
        "use the newer program"
    };
    Err(StoreError::Unusable(format!(
        "{}: the database has schema {found}, this version of roundhouse knows {known}: {advice}",
        data_dir.display()
    )))
}

/// The last migration that a database has had.
pub(super) fn schema(c: &Connection) -> Result<i64, StoreError> {
    Ok(c.query_row("SELECT coalesce(max(version), 0) FROM _sqlx_migrations WHERE success", [], |row| row.get(0))?)
}
