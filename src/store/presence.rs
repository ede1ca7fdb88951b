//! Whether the names of the files that the store has open still lead to them. Somebody may remove, move or replace them
//! while the server runs: SQLite would not notice, and what is accepted from then on would go when the process ends.
//!
//! While they are open, they can still be read: what they hold is saved before the process ends, and nothing that was
//! accepted is lost.

use std::fs::{File, Metadata};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rusqlite::Connection;

use super::StoreError;
use super::backup::{explained, in_file, remove_if_there, sync_folder};
use super::open::DATABASE;
use crate::clock::rfc3339;
use crate::domain::Millis;

/// Begins the name of the copy that is saved; its time follows.
const RESCUED: &str = "roundhouse.db.rescued-";
/// Ends it while it is written.
const PART: &str = ".part";

/// What a file is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    Database,
    Log,
    Lock,
}

#[derive(Debug)]
struct Watched {
    purpose: Use,
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Watched {
    fn new(purpose: Use, path: PathBuf, found: &Metadata) -> Self {
        Self { purpose, path, device: found.dev(), inode: found.ino() }
    }

    /// `None`: it is where it was, as far as can be seen.
    fn gone(&self) -> Option<Gone> {
        let is_replaced = match std::fs::metadata(&self.path) {
            Ok(found) if (found.dev(), found.ino()) == (self.device, self.inode) => return None,
            Ok(_) => true,
            Err(error) if is_absent(&error) => false,
            // A disk that cannot be asked says nothing about what is on it.
            Err(_) => return None,
        };
        Some(Gone { purpose: self.purpose, path: self.path.clone(), is_replaced })
    }
}

fn is_absent(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory)
}

/// A file that its name does not lead to any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gone {
    purpose: Use,
    path: PathBuf,
    is_replaced: bool,
}

impl std::fmt::Display for Gone {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let how = if self.is_replaced { "replaced by another file" } else { "removed or moved" };
        write!(f, "{} was {how} while the server ran", self.path.display())
    }
}

/// The files of one data dir, as they were when they were opened. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Presence {
    watched: Arc<Vec<Watched>>,
}

impl Presence {
    /// Of a database that is open and has been written to, so that its log is there.
    pub(super) fn of(database: &Path, lock: &File) -> Result<Self, StoreError> {
        let mut log = database.as_os_str().to_owned();
        log.push("-wal");
        let mut watched = Vec::new();
        for (purpose, path) in [(Use::Database, database.to_owned()), (Use::Log, PathBuf::from(log))] {
            let found = std::fs::metadata(&path).map_err(in_file(&path))?;
            watched.push(Watched::new(purpose, path, &found));
        }
        let path = database.with_file_name(super::open::LOCK);
        let found = lock.metadata().map_err(in_file(&path))?;
        watched.push(Watched::new(Use::Lock, path, &found));
        Ok(Self { watched: Arc::new(watched) })
    }

    /// The first of them that is gone.
    pub(super) fn gone(&self) -> Option<Gone> {
        self.watched.iter().find_map(Watched::gone)
    }

    /// Saves what the open files hold, and says where it is and what to do now. Nothing may be written to `c` any more.
    pub(super) fn rescue(&self, c: &Connection, gone: &Gone, now: Millis) -> String {
        if gone.purpose == Use::Lock {
            return "nothing that was accepted is lost, start the server again; only one may run on a data dir, and that file \
                    keeps others out"
                .to_owned();
        }
        // A moved file is whole then, without its log.
        let is_complete = c.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| Ok(row.get::<_, i64>(0)? == 0));
        if gone.purpose == Use::Log && matches!(is_complete, Ok(true)) {
            let before = if gone.is_replaced { "move the new file away and " } else { "" };
            return format!(
                "what it held is in {DATABASE} now and nothing that was accepted is lost: {before}start the server again"
            );
        }
        match self.save(c, now) {
            Ok(copy) => {
                let before = if gone.is_replaced {
                    format!("move the new {DATABASE} and its log ({DATABASE}-wal) away, ")
                } else {
                    String::new()
                };
                format!(
                    "everything that was accepted is in {}: {before}rename this copy to {DATABASE}, and start the server again",
                    copy.display()
                )
            }
            Err(error) => format!(
                "what it held could not be saved ({error}): what was accepted since the last backup is lost, unless the file \
                 was only moved: then move it back and start the server again; else restore a backup (roundhouse restore)"
            ),
        }
    }

    fn save(&self, c: &Connection, now: Millis) -> Result<PathBuf, StoreError> {
        let database = self.watched.iter().find(|file| file.purpose == Use::Database);
        let database = database.ok_or_else(|| StoreError::Unusable("the store has no file".to_owned()))?;
        let folder = database.path.parent().unwrap_or(Path::new("/"));
        std::fs::metadata(folder).map_err(in_file(folder))?;
        let time: String = rfc3339(now).chars().filter(char::is_ascii_alphanumeric).collect();
        let copy = folder.join(format!("{RESCUED}{time}"));
        let part = folder.join(format!("{RESCUED}{time}{PART}"));
        let text = part.to_str().ok_or_else(|| StoreError::Unusable("the path is not UTF-8".to_owned()))?;
        if let Err(error) = c.execute("VACUUM INTO ?1", [text]) {
            let _ = remove_if_there(&part);
            return Err(explained(folder, error.into()));
        }
        File::open(&part).and_then(|file| file.sync_all()).map_err(in_file(&part))?;
        std::fs::rename(&part, &copy).map_err(in_file(&copy))?;
        // The old log would be taken for that of whatever gets the database's name.
        for log in self.watched.iter().filter(|file| file.purpose == Use::Log && file.gone().is_none()) {
            remove_if_there(&log.path)?;
        }
        sync_folder(folder)?;
        Ok(copy)
    }
}

/// Why a data dir without a database is not to be taken for a new one; `None`: it may be.
pub(super) fn why_absent(data_dir: &Path) -> Option<String> {
    let entries = std::fs::read_dir(data_dir).ok()?;
    let mut copies: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with(RESCUED) && !name.ends_with(PART)
        })
        .collect();
    copies.sort();
    let copy = copies.pop()?;
    Some(format!(
        "{} has no {DATABASE}, but {} is there: a server saved its jobs in it when {DATABASE} was removed while it ran; rename \
         this copy to {DATABASE} to go on with them, or move it away to begin anew",
        data_dir.display(),
        copy.display()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(dir: &Path) -> (Connection, Presence) {
        let path = dir.join(DATABASE);
        let c = Connection::open(&path).unwrap();
        c.execute_batch("PRAGMA journal_mode = WAL; CREATE TABLE t (x); INSERT INTO t VALUES (1)").unwrap();
        let lock = File::create(dir.join(super::super::open::LOCK)).unwrap();
        let presence = Presence::of(&path, &lock).unwrap();
        (c, presence)
    }

    fn count(path: &Path) -> i64 {
        Connection::open(path).unwrap().query_row("SELECT count(*) FROM t", [], |row| row.get(0)).unwrap()
    }

    #[test]
    fn what_is_written_after_the_removal_is_saved_too_and_the_old_log_is_in_nobodys_way() {
        let dir = tempfile::tempdir().unwrap();
        let (c, presence) = open(dir.path());
        assert_eq!(presence.gone(), None);
        let database = dir.path().join(DATABASE);
        std::fs::remove_file(&database).unwrap();
        c.execute("INSERT INTO t VALUES (2)", []).unwrap();
        let gone = presence.gone().unwrap();
        assert!(gone.to_string().contains("roundhouse.db was removed or moved"), "{gone}");
        assert_eq!(why_absent(dir.path()), None);
        let said = presence.rescue(&c, &gone, 0);
        assert!(said.contains("roundhouse.db.rescued-19700101T000000"), "{said}");
        let told = why_absent(dir.path()).unwrap();
        let copy = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path());
        let copy = copy.into_iter().find(|path| path.to_string_lossy().contains("rescued")).unwrap();
        assert!(told.contains(&copy.display().to_string()), "{told}");
        std::fs::rename(copy, &database).unwrap();
        assert_eq!(count(&database), 2);
    }

    #[test]
    fn a_replaced_database_is_seen_and_the_new_one_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (c, presence) = open(dir.path());
        let (database, other) = (dir.path().join(DATABASE), dir.path().join("other"));
        std::fs::write(&other, "mine").unwrap();
        std::fs::rename(&other, &database).unwrap();
        let gone = presence.gone().unwrap();
        assert!(gone.to_string().contains("replaced"), "{gone}");
        let said = presence.rescue(&c, &gone, 0);
        assert!(said.contains("move the new roundhouse.db"), "{said}");
        assert_eq!(std::fs::read(&database).unwrap(), b"mine");
        assert!(!dir.path().join("roundhouse.db-wal").exists());
    }

    #[test]
    fn a_removed_log_is_written_into_the_database() {
        let dir = tempfile::tempdir().unwrap();
        let (c, presence) = open(dir.path());
        std::fs::remove_file(dir.path().join("roundhouse.db-wal")).unwrap();
        c.execute("INSERT INTO t VALUES (2)", []).unwrap();
        let gone = presence.gone().unwrap();
        let said = presence.rescue(&c, &gone, 0);
        assert!(said.contains("nothing that was accepted is lost"), "{said}");
        // As after a kill: without this connection.
        let copy = dir.path().join("copy.db");
        std::fs::copy(dir.path().join(DATABASE), &copy).unwrap();
        assert_eq!(count(&copy), 2);
    }

    #[test]
    fn a_folder_that_is_gone_is_said_honestly_and_a_lock_costs_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        std::fs::create_dir(&data).unwrap();
        let (c, presence) = open(&data);
        std::fs::remove_file(data.join(super::super::open::LOCK)).unwrap();
        let gone = presence.gone().unwrap();
        assert!(presence.rescue(&c, &gone, 0).contains("start the server again"));
        std::fs::rename(&data, dir.path().join("moved")).unwrap();
        let said = presence.rescue(&c, &presence.gone().unwrap(), 0);
        assert!(said.contains("could not be saved") && said.contains("move it back"), "{said}");
        assert_eq!(count(&dir.path().join("moved").join(DATABASE)), 1, "a moved one is whole without its log");
    }
}
