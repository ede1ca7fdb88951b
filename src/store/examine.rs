//! A look at a data dir from outside, for `roundhouse doctor`: what is in it, and whether it is whole. Changes nothing.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::path::Path;

use rusqlite::Connection;

use super::StoreError;
use super::backup::{
    ALL_FILES, ARTIFACTS, Count, FileRow, Progress, Watch, digest, each_file, explained, files_in, in_database,
    in_file, jobs_by_state, open_live, schema,
};
use super::open::{DATABASE, LOCK, schema_version};
use super::placement::existing;
use super::quota;
use super::restore::integrity;

/// What a data dir holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inside {
    /// How many jobs are in which state.
    pub jobs: BTreeMap<String, u64>,
    /// Files that rows name.
    pub files: Count,
    /// How much room is taken; `None`: the database is of another version.
    pub room: Option<Room>,
    /// The last migration it has had.
    pub schema: i64,
    /// The last migration that this program knows.
    pub schema_known: i64,
}

/// How much room jobs take, and what would go first if more is needed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// Bytes of the database's pages in use and of files.
    pub used: u64,
    /// Bytes that may be used, as decided at the first start; `None`: not yet.
    pub quota: Option<u64>,
    /// Of the bytes in use, those of jobs that have not ended.
    pub live: u64,
    /// Jobs whose answers were fetched: they go first.
    pub fetched: u64,
    /// Jobs that hold an answer which nobody has fetched: they stay.
    pub unfetched: u64,
}

/// What a thorough look finds wrong.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// What SQLite says of the database.
    pub database: Vec<String>,
    /// Files that rows name and that are not there.
    pub missing: Vec<String>,
    /// Files that do not have the checksum they were stored with.
    pub damaged: Vec<String>,
    /// Files that no row names; of a running server's, some may be on their way.
    pub unnamed: Vec<String>,
    /// Bytes of these.
    pub unnamed_bytes: u64,
    /// Files that are as they should be.
    pub whole: Count,
}

/// Version of the linked SQLite.
pub fn sqlite_version() -> &'static str {
    rusqlite::version()
}

/// Whether a server uses the data dir now.
pub fn has_server(data_dir: &Path) -> Result<bool, StoreError> {
    use std::io::ErrorKind;
    let path = data_dir.join(LOCK);
    let file = match File::open(&path) {
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(false),
        file => file.map_err(in_file(&path))?,
    };
    // Given back at once, when the file is closed.
    match file.try_lock_shared() {
        Ok(()) => Ok(false),
        Err(std::fs::TryLockError::WouldBlock) => Ok(true),
        Err(std::fs::TryLockError::Error(error)) => Err(in_file(&path)(error)),
    }
}

/// Why a data dir is not to be used as it is, or should have a database; `None`: it is in order, or a new one.
pub fn why_unusable(data_dir: &Path) -> Result<Option<String>, StoreError> {
    if let Some(reason) = super::presence::why_unusable(data_dir) {
        return Ok(Some(reason));
    }
    let is_absent = !data_dir.join(DATABASE).exists();
    Ok((is_absent && has_server(data_dir)?).then(|| {
        format!(
            "a server runs on {}, and its database ({DATABASE}) is not there: it was removed, or is only about to be made; if it was \
             removed, the server saves what it can, stops, and its log says what to do",
            data_dir.display()
        )
    }))
}

/// What is in a data dir; `None`: no database. [`StoreError::Unusable`]: a server keeps others out.
pub fn look(data_dir: &Path) -> Result<Option<Inside>, StoreError> {
    if !data_dir.join(DATABASE).exists() {
        return Ok(None);
    }
    let c = open_live(data_dir)?;
    let read = || -> Result<Inside, StoreError> {
        let (schema, schema_known) = (schema(&c)?, schema_version());
        let is_known = schema == schema_known;
        let files = if is_known { files_in(&c)? } else { Count::default() };
        let room = if is_known { Some(room(&c, files.bytes)?) } else { None };
        Ok(Inside { jobs: jobs_by_state(&c)?, files, room, schema, schema_known })
    };
    read().map(Some).map_err(|error| explained(data_dir, error))
}

fn room(c: &Connection, file_bytes: u64) -> Result<Room, StoreError> {
    let count = |condition: &str| {
        let sql = format!("SELECT count(*) FROM job WHERE emptied_at IS NULL AND {condition}");
        c.query_row(&sql, [], |row| row.get::<_, i64>(0)).map(i64::unsigned_abs)
    };
    Ok(Room {
        used: quota::pages(c)?.0 + file_bytes,
        quota: quota::remembered(c)?,
        live: quota::live_bytes(c)?,
        fetched: count("finished_at IS NOT NULL AND delivered_at IS NOT NULL")?,
        unfetched: count("finished_at IS NOT NULL AND delivered_at IS NULL")?,
    })
}

/// Whether the data dir, or the folder that it would be made in, can be written to.
pub fn is_writable(data_dir: &Path) -> std::io::Result<()> {
    use nix::unistd::AccessFlags;
    let folder = existing(data_dir);
    if !folder.is_dir() {
        return Err(std::io::ErrorKind::NotADirectory.into());
    }
    let asked = nix::unistd::access(&folder, AccessFlags::W_OK | AccessFlags::X_OK);
    asked.map_err(std::io::Error::from)
}

/// Checks the database's pages and indexes, and every file against its row. Blocks, and reads everything.
pub fn thoroughly(data_dir: &Path, watch: Watch<'_>) -> Result<Faults, StoreError> {
    let c = open_live(data_dir)?;
    let root = data_dir.join(ARTIFACTS);
    let mut faults = Faults::default();
    watch(Progress { step: "database", done: Count::default(), total: Count::default() });
    faults.database = integrity(&c).map_err(|error| in_database(&data_dir.join(DATABASE), error))?;
    // Before the rows: what is written meanwhile has its file first and its row next.
    let mut found: Vec<(String, u64)> = Vec::new();
    each_file(&root, &mut |path, bytes| {
        let relative = path.strip_prefix(&root).unwrap_or(path);
        found.push((relative.to_string_lossy().into_owned(), bytes));
        Ok(())
    })?;
    let mut rows = Vec::new();
    {
        let mut statement = c.prepare(ALL_FILES)?;
        let mut each = statement.query([])?;
        while let Some(row) = each.next()? {
            rows.push(FileRow::of(row)?);
        }
    }
    let total = Count { files: rows.len() as u64, bytes: rows.iter().map(|file| file.bytes).sum() };
    let mut done = Count::default();
    for file in &rows {
        match digest(&root.join(file.relative()?)) {
            Ok(read) if read == (file.sha256.clone(), file.bytes) => faults.whole.add(file.bytes),
            // Retention may have come first.
            _ if !file.is_in(&c)? => {}
            Err(error) if error.is_lost_file() => faults.missing.push(file.path.clone()),
            Err(error) => return Err(error),
            Ok(_) => faults.damaged.push(file.path.clone()),
        }
        done.add(file.bytes);
        watch(Progress { step: "files", done, total });
    }
    let named: HashSet<&str> = rows.iter().map(|file| file.path.as_str()).collect();
    for (path, bytes) in found {
        if !named.contains(path.as_str()) {
            faults.unnamed.push(path);
            faults.unnamed_bytes += bytes;
        }
    }
    Ok(faults)
}
