//! The collection of files that no row names (what a crash between a file and its row leaves, or a deletion that failed),
//! and the report of rows whose file is not there.
//!
//! One folder at a time: its files are listed, then its rows are read. Deleted is only what has a name of ours, is old by
//! the file system's time and by the time in its own name, and does not belong to an attempt that may still be writing.
//! Rows without files are never touched: only a backup can bring such a file back.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::path::PathBuf;
use std::str::FromStr as _;
use std::time::{Duration, UNIX_EPOCH};

use rusqlite::{Connection, params};

use super::StoreError;
use super::files::folder_of;
use super::verbs::Store;
use crate::domain::{JobId, Millis};

/// Numbers in one folder.
const NUMBERS: i64 = 1_000;
/// Younger files may belong to a row that is about to be committed.
pub(super) const MIN_AGE_MS: i64 = 3_600_000;

/// What a look at files and rows found. Paths are under `artifacts/`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FilesReport {
    /// Files that were looked at.
    pub files: u64,
    /// Rows that name a file.
    pub rows: u64,
    /// Files without a row, old enough to be sure.
    pub orphans: Vec<String>,
    /// Their size.
    pub orphan_bytes: u64,
    /// Of these, files that were deleted.
    pub deleted: u64,
    /// Files that rows name and that are not there.
    pub missing: Vec<String>,
}

impl FilesReport {
    fn add(&mut self, other: Self) {
        self.files += other.files;
        self.rows += other.rows;
        self.orphans.extend(other.orphans);
        self.orphan_bytes += other.orphan_bytes;
        self.deleted += other.deleted;
        self.missing.extend(other.missing);
    }
}

/// A file of the folder with a name of ours.
struct Found {
    path: String,
    id: JobId,
    attempt: i64,
    bytes: u64,
    modified: Millis,
}

/// What the database knows about a folder's numbers.
struct Known {
    /// Path and number of each row.
    rows: BTreeMap<String, i64>,
    /// Attempts of jobs that have not ended.
    live: BTreeMap<i64, i64>,
}

impl Store {
    /// Compares all files with all rows. With `collect`, files without a row are deleted; rows without a file are only
    /// reported.
    pub async fn check_files(&self, collect: bool) -> Result<FilesReport, StoreError> {
        let mut report = FilesReport::default();
        let mut next = self.folder_from(0).await?;
        while let Some(folder) = next {
            report.add(self.check_folder(folder, collect).await?);
            next = self.folder_from(folder + 1).await?;
        }
        Ok(report)
    }

    /// The first folder from `folder` on that is there, or that rows name.
    pub(super) async fn folder_from(&self, folder: i64) -> Result<Option<i64>, StoreError> {
        let named: Option<i64> = self
            .reader
            .read(move |c| {
                Ok(c.prepare_cached("SELECT min(number) FROM file WHERE number >= ?1")?
                    .query_row([folder * NUMBERS], |row| row.get(0))?)
            })
            .await?;
        let named = named.map(|number| number / NUMBERS);
        let mut there = None;
        let root = self.files.folder.as_ref();
        let mut entries = match tokio::fs::read_dir(root).await {
            // Then all files are missing.
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(named),
            entries => entries.map_err(|source| in_file(root.display(), source))?,
        };
        while let Some(entry) = entries.next_entry().await.map_err(|source| in_file(root.display(), source))? {
            let number = entry.file_name().to_str().and_then(folder_number);
            if let Some(number) = number.filter(|number| *number >= folder) {
                there = Some(there.map_or(number, |first: i64| first.min(number)));
            }
        }
        Ok([named, there].into_iter().flatten().min())
    }

    /// The same for one folder.
    pub(super) async fn check_folder(&self, folder: i64, collect: bool) -> Result<FilesReport, StoreError> {
        let name = folder_of(folder * NUMBERS);
        let now = self.clock.now();
        let (found, all) = self.list(&name, folder).await?;
        let known = self.reader.read(move |c| known(c, folder)).await?;
        let mut report =
            FilesReport { files: all.len() as u64, rows: known.rows.len() as u64, ..FilesReport::default() };
        for file in found {
            let is_old = file.modified <= now - MIN_AGE_MS && file.id.created_ms <= now - MIN_AGE_MS;
            let may_be_written = known.live.get(&file.id.number) == Some(&file.attempt);
            if known.rows.contains_key(&file.path) || !is_old || may_be_written {
                continue;
            }
            if collect {
                match tokio::fs::remove_file(self.files.folder.join(&file.path)).await {
                    Ok(()) => report.deleted += 1,
                    Err(error) if error.kind() == ErrorKind::NotFound => continue,
                    Err(error) => tracing::warn!("artifacts/{} could not be deleted: {error}", file.path),
                }
            }
            report.orphan_bytes += file.bytes;
            report.orphans.push(file.path);
        }
        for (path, number) in &known.rows {
            if !all.contains(path) && self.is_missing(path, *number).await? {
                report.missing.push(path.clone());
            }
        }
        if collect && known.rows.is_empty() {
            // Only an empty folder goes, and whoever writes a file makes it anew.
            let _ = tokio::fs::remove_dir(self.files.folder.join(&name)).await;
        }
        Ok(report)
    }

    /// Files with names of ours, and all paths.
    async fn list(&self, name: &str, folder: i64) -> Result<(Vec<Found>, BTreeSet<String>), StoreError> {
        let (mut found, mut all) = (Vec::new(), BTreeSet::new());
        let path: PathBuf = self.files.folder.join(name);
        let failed = |source| in_file(format!("artifacts/{name}"), source);
        let mut entries = match tokio::fs::read_dir(&path).await {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok((found, all)),
            Err(error) => return Err(failed(error)),
        };
        while let Some(entry) = entries.next_entry().await.map_err(failed)? {
            let Ok(file) = entry.file_name().into_string() else { continue };
            let path = format!("{name}/{file}");
            // It may be gone by now.
            let about = entry.metadata().await.ok().filter(std::fs::Metadata::is_file);
            if let (Some(about), Some((id, attempt))) = (about, owner(&file))
                && id.number / NUMBERS == folder
            {
                let modified = about.modified().ok().and_then(|at| at.duration_since(UNIX_EPOCH).ok());
                let modified = modified.map_or(Millis::MAX, |since: Duration| super::verbs::ms(since));
                found.push(Found { path: path.clone(), id, attempt, bytes: about.len(), modified });
            }
            all.insert(path);
        }
        Ok((found, all))
    }

    /// Looks again: the row may have gone with its file, or the file may have come with its row.
    async fn is_missing(&self, path: &str, number: i64) -> Result<bool, StoreError> {
        let is_there = tokio::fs::try_exists(self.files.folder.join(path)).await;
        if is_there.map_err(|source| in_file(format!("artifacts/{path}"), source))? {
            return Ok(false);
        }
        let rows = self.reader.read(move |c| super::read::files_of(c, number)).await?;
        Ok(rows.iter().any(|row| row.path == path))
    }

    /// Whether a row names the file and it cannot be read as it was stored.
    pub(super) async fn is_lost(&self, path: &str) -> Result<bool, StoreError> {
        let Some((id, _)) = path.rsplit('/').next().and_then(owner) else {
            return Ok(false);
        };
        let rows = self.reader.read(move |c| super::read::files_of(c, id.number)).await?;
        let Some(row) = rows.iter().find(|row| row.path == path) else {
            return Ok(false);
        };
        match self.files.read(row).await {
            Ok(_) => Ok(false),
            Err(error) if error.is_lost_file() => Ok(true),
            Err(error) => Err(error),
        }
    }
}

fn known(c: &Connection, folder: i64) -> Result<Known, StoreError> {
    let range = params![folder * NUMBERS, folder * NUMBERS + NUMBERS - 1];
    // In this order: a job that ends in between is seen as live, or with its rows.
    let mut live = c.prepare_cached(
        "SELECT number, attempt FROM job INDEXED BY job_live WHERE finished_at IS NULL AND number BETWEEN ?1 AND ?2",
    )?;
    let live = live.query_map(range, |row| Ok((row.get(0)?, row.get(1)?)))?.collect::<Result<_, _>>()?;
    let mut rows = c.prepare_cached("SELECT path, number FROM file WHERE number BETWEEN ?1 AND ?2")?;
    let rows = rows.query_map(range, |row| Ok((row.get(0)?, row.get(1)?)))?.collect::<Result<_, _>>()?;
    Ok(Known { rows, live })
}

fn folder_number(name: &str) -> Option<i64> {
    name.parse().ok().filter(|folder: &i64| *folder >= 0 && folder_of(folder.saturating_mul(NUMBERS)) == name)
}

/// The job and the attempt in the name of a file: `<uuid>-<attempt>-<name>`, with `#<n>` at its end while it is written.
fn owner(file: &str) -> Option<(JobId, i64)> {
    let (uuid, rest) = file.split_at_checked(36)?;
    let (attempt, name) = rest.strip_prefix('-')?.split_once('-')?;
    let id = JobId::from_str(&format!("job_{uuid}")).ok()?;
    let attempt = attempt.parse().ok().filter(|attempt: &i64| *attempt >= 0)?;
    let name = match name.split_once('#') {
        Some((name, part)) if !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()) => name,
        Some(_) => return None,
        None => name,
    };
    (!name.is_empty()).then_some((id, attempt))
}

fn in_file(path: impl std::fmt::Display, source: std::io::Error) -> StoreError {
    StoreError::File { path: path.to_string(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_files_tell_whose_they_are() {
        let id = JobId::new(5, 12_345, 6);
        let uuid = id.uuid();
        assert_eq!(owner(&format!("{uuid}-2-image-0.png")), Some((id, 2)));
        assert_eq!(owner(&format!("{uuid}-0-request.json#1")), Some((id, 0)));
        for other in ["notes.txt", &format!("{uuid}.png"), &format!("{uuid}-x-a"), &format!("{uuid}-1-a#b"), "é"] {
            assert_eq!(owner(other), None, "{other}");
        }
        assert_eq!((folder_number("00012"), folder_number("123456")), (Some(12), Some(123_456)));
        assert_eq!((folder_number("12"), folder_number("lost+found"), folder_number("-0001")), (None, None, None));
    }
}
