//! The other half of `backup`: verifies a backup, and makes a data dir of it.

use std::collections::HashSet;
use std::fs::File;
use std::path::{Path, PathBuf};

use rusqlite::{Connection, OpenFlags};

use super::StoreError;
use super::backup::{
    ALL_FILES, ARTIFACTS, Count, FileRow, Manifest, Progress, Watch, copy_hashed, copy_verified, digest, files_in,
    forget_id, in_database, in_file, is_backup, make_folders, manifests, open_still, remove_if_there, schema,
    sync_folder,
};
use super::lost::{LostFile, is_damage, lost_files};
use super::open::{DATABASE, schema_version};

/// The database of a restore that has not ended.
pub(super) const DATABASE_NEXT: &str = "roundhouse.db.restoring";

/// A backup that was verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// What its manifest tells.
    pub manifest: Manifest,
    /// Files that are there as their rows say.
    pub files: Count,
    /// Files that the backup should have and has not; those that were lost before it was made are in the manifest.
    pub lost: Vec<LostFile>,
}

/// Reads a backup whole and compares checksums; writes nothing. Files that are lost or damaged in it are an error, which names
/// them; with `without_lost` they are only listed. Blocks.
pub fn check(source: &Path, without_lost: bool, watch: Watch<'_>) -> Result<Verified, StoreError> {
    checked(source, without_lost, watch).map_err(of_backup)
}

fn checked(source: &Path, without_lost: bool, watch: Watch<'_>) -> Result<Verified, StoreError> {
    let database = source.join(DATABASE);
    let manifests = described(source)?;
    watch(Progress { step: "database", done: Count::default(), total: Count::default() });
    let (sha256, _) = digest(&database)?;
    let manifest = manifest_of(manifests, &sha256, &database)?;
    let snapshot = open_still(&database)?;
    check_database(&snapshot, &database, &manifest)?;
    let (files, lost) = each_named(&snapshot, source, &manifest, watch, &mut |file, path| {
        if digest(path)? == (file.sha256.clone(), file.bytes) {
            return Ok(());
        }
        Err(StoreError::Damaged { path: path.display().to_string() })
    })?;
    refuse_lost(without_lost, &lost)?;
    Ok(Verified { manifest, files, lost })
}

/// Makes the data dir `data_dir` of a backup. It must hold no database and have no server. The database comes last, so an
/// interrupted restore is no data dir, and may be run again. Files that are lost or damaged in the backup are an error, which
/// names them; with `without_lost` the jobs come without them. Blocks.
pub fn restore(source: &Path, data_dir: &Path, without_lost: bool, watch: Watch<'_>) -> Result<Verified, StoreError> {
    restored(source, data_dir, without_lost, watch).map_err(of_backup)
}

fn restored(source: &Path, data_dir: &Path, without_lost: bool, watch: Watch<'_>) -> Result<Verified, StoreError> {
    let manifests = described(source)?;
    refuse_used(data_dir)?;
    make_folders(data_dir)?;
    let _lock = super::open::lock(data_dir)?;
    // Nobody else makes one from now on.
    refuse_used(data_dir)?;
    watch(Progress { step: "database", done: Count::default(), total: Count::default() });
    let (from, next) = (source.join(DATABASE), data_dir.join(DATABASE_NEXT));
    let mut file = File::open(&from).map_err(in_file(&from))?;
    let (sha256, _) = copy_hashed(&mut file, &from, &next)?;
    let manifest = manifest_of(manifests, &sha256, &from)?;
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let snapshot = Connection::open_with_flags(&next, flags).map_err(|error| in_database(&from, error))?;
    check_database(&snapshot, &from, &manifest)?;
    let target = data_dir.join(ARTIFACTS);
    make_folders(&target)?;
    let mut folders: HashSet<PathBuf> = HashSet::new();
    let (files, lost) = each_named(&snapshot, source, &manifest, watch, &mut |file, path| {
        let to = target.join(file.relative()?);
        folders.extend(to.parent().map(Path::to_owned));
        copy_verified(path, &to, file)
    })?;
    refuse_lost(without_lost, &lost)?;
    for folder in &folders {
        sync_folder(folder)?;
    }
    sync_folder(&target)?;
    forget_id(&snapshot)?;
    snapshot.close().map_err(|(_, error)| in_database(&next, error))?;
    File::open(&next).and_then(|file| file.sync_all()).map_err(in_file(&next))?;
    let database = data_dir.join(DATABASE);
    std::fs::rename(&next, &database).map_err(in_file(&database))?;
    sync_folder(data_dir)?;
    Ok(Verified { manifest, files, lost })
}

/// A damaged database is the backup's here: the advice for one that is in use would be to do what is being done.
fn of_backup(error: StoreError) -> StoreError {
    match error {
        StoreError::Corrupt(text) => StoreError::Unusable(format!("{text}: the backup is damaged, use another one")),
        other => other,
    }
}

fn refuse_lost(without_lost: bool, lost: &[LostFile]) -> Result<(), StoreError> {
    if without_lost || lost.is_empty() {
        return Ok(());
    }
    Err(lost_files(lost, "they are so in this backup; another one may have them", "restore"))
}

/// A data dir that holds a database, or what belongs to one, is not written to.
fn refuse_used(data_dir: &Path) -> Result<(), StoreError> {
    for name in [DATABASE, "roundhouse.db-wal", "roundhouse.db-journal"] {
        let path = data_dir.join(name);
        if path.exists() {
            return Err(StoreError::Unusable(format!(
                "{} is there already, and a restore overwrites nothing: choose another --data-dir, or move this one away",
                path.display()
            )));
        }
    }
    // Shared memory of an earlier database; worth nothing, and in the way of the next one.
    remove_if_there(&data_dir.join("roundhouse.db-shm"))
}

fn described(source: &Path) -> Result<Vec<Manifest>, StoreError> {
    if !is_backup(source) {
        return Err(StoreError::Unusable(format!(
            "{} holds no backup: {DATABASE} and manifest.json should be in it; name the folder that `roundhouse backup` or \
             --snapshot-dir wrote to",
            source.display()
        )));
    }
    manifests(source)
}

/// The manifest that describes the database. Two may be there if a backup was interrupted.
fn manifest_of(manifests: Vec<Manifest>, sha256: &str, database: &Path) -> Result<Manifest, StoreError> {
    let found = manifests.into_iter().find(|manifest| manifest.database_sha256 == sha256);
    found.ok_or_else(|| {
        StoreError::Unusable(format!(
            "{}: damaged, its checksum is not the one in manifest.json: use another backup",
            database.display()
        ))
    })
}

fn check_database(c: &Connection, shown: &Path, manifest: &Manifest) -> Result<(), StoreError> {
    let problems = integrity(c).map_err(|error| in_database(shown, error))?;
    if let Some(problem) = problems.first() {
        return Err(StoreError::Corrupt(format!("{}: {problem}", shown.display())));
    }
    let (found, known) = (schema(c)?, schema_version());
    if found > known {
        return Err(StoreError::Unusable(format!(
            "{}: has schema {found}, this version of roundhouse knows {known}: restore it with roundhouse {} or newer",
            shown.display(),
            manifest.version
        )));
    }
    Ok(())
}

/// What SQLite finds wrong with a database; empty: nothing.
pub(super) fn integrity(c: &Connection) -> rusqlite::Result<Vec<String>> {
    let mut statement = c.prepare("PRAGMA integrity_check(20)")?;
    let lines: Vec<String> = statement.query_map([], |row| row.get(0))?.collect::<Result<_, _>>()?;
    Ok(lines.into_iter().filter(|line| line != "ok").collect())
}

/// Calls `take` with each file of a backup; those that were lost before it was made are not asked for. Those that it took, and
/// those that are lost or damaged.
fn each_named(
    snapshot: &Connection,
    source: &Path,
    manifest: &Manifest,
    watch: Watch<'_>,
    take: &mut dyn FnMut(&FileRow, &Path) -> Result<(), StoreError>,
) -> Result<(Count, Vec<LostFile>), StoreError> {
    let before: HashSet<&str> = manifest.damaged.iter().map(String::as_str).collect();
    let total = files_in(snapshot)?;
    let (mut done, mut lost) = (Count::default(), Vec::new());
    let mut statement = snapshot.prepare(ALL_FILES)?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let file = FileRow::of(row)?;
        if before.contains(file.path.as_str()) {
            continue;
        }
        let path = source.join(ARTIFACTS).join(file.relative()?);
        match take(&file, &path) {
            Ok(()) => done.add(file.bytes),
            Err(error) if is_damage(&error, &path) => lost.push(file.lost(snapshot, !path.exists())),
            Err(error) => return Err(error),
        }
        watch(Progress { step: "files", done, total });
    }
    Ok((done, lost))
}
