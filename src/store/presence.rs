//! Whether the names of the files that the store has open still lead to them. Somebody may remove, move or replace them
//! while the server runs: SQLite would not notice, and what is accepted from then on would go when the process ends.
//!
//! While they are open, they can still be read: what they hold is saved before the process ends, and nothing that was
//! accepted is lost.

use std::fs::{File, Metadata};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rusqlite::Connection;
use tokio_util::sync::CancellationToken;

use super::backup::{ARTIFACTS, explained, in_file, remove_if_there, sync_folder};
use super::open::{DATABASE, LOCK};
use super::restore::DATABASE_NEXT;
use super::verbs::Store;
use super::writer::lock;
use super::{StoreError, open};
use crate::clock::rfc3339;
use crate::domain::Millis;

/// Begins the name of the copy that is saved; its time follows.
const RESCUED: &str = "roundhouse.db.rescued-";
/// Ends it while it is written.
const PART: &str = ".part";
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Saving is tried again for ten minutes while the disk is full, else for a few seconds: with the process goes what it holds.
const TRY_EVERY: Duration = Duration::from_secs(5);
const TRIES_FULL: u32 = 120;
const TRIES: u32 = 3;

/// What a file is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    Folder,
    Database,
    /// The write-ahead log or its index.
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
        let how = match std::fs::metadata(&self.path) {
            Ok(found) if (found.dev(), found.ino()) == (self.device, self.inode) => {
                if self.purpose != Use::Database || found.len() > 0 {
                    return None;
                }
                How::Emptied
            }
            Ok(_) => How::Replaced,
            Err(error) if is_absent(&error) => How::Removed,
            // A disk that cannot be asked says nothing about what is on it.
            Err(_) => return None,
        };
        Some(Gone { purpose: self.purpose, path: self.path.clone(), how })
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
    how: How,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    Removed,
    Replaced,
    Emptied,
}

impl std::fmt::Display for Gone {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let how = match self.how {
            How::Removed => "removed or moved",
            How::Replaced => "replaced by another file",
            How::Emptied => "emptied",
        };
        write!(f, "{} was {how} while the server ran", self.path.display())
    }
}

/// The files of one data dir, as they were when they were opened. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Presence {
    watched: Arc<Mutex<Vec<Watched>>>,
    /// The lock file that took the place of one that was removed.
    lock: Arc<Mutex<Option<File>>>,
}

impl Presence {
    /// Of a database that is open and has been written to, so that its log is there.
    pub(super) fn of(database: &Path, lock: &File) -> Result<Self, StoreError> {
        let beside = |end: &str| {
            let mut name = database.as_os_str().to_owned();
            name.push(end);
            PathBuf::from(name)
        };
        let folder = database.parent().unwrap_or(Path::new("/"));
        let named = [
            (Use::Folder, folder.to_owned()),
            (Use::Database, database.to_owned()),
            (Use::Log, beside("-wal")),
            (Use::Log, beside("-shm")),
        ];
        let mut watched = Vec::new();
        for (purpose, path) in named {
            match std::fs::metadata(&path) {
                Ok(found) => watched.push(Watched::new(purpose, path, &found)),
                // A database that is used by one connection alone keeps its index in memory.
                Err(error) if is_absent(&error) && path.extension().is_some_and(|end| end == "db-shm") => {}
                Err(error) => return Err(in_file(&path)(error)),
            }
        }
        let path = database.with_file_name(LOCK);
        let found = lock.metadata().map_err(in_file(&path))?;
        watched.push(Watched::new(Use::Lock, path, &found));
        Ok(Self { watched: Arc::new(Mutex::new(watched)), lock: Arc::default() })
    }

    /// The first of them that is gone. Asks the disk.
    pub(super) fn gone(&self) -> Option<Gone> {
        lock(&self.watched).iter().find_map(Watched::gone)
    }

    /// A lock file that was removed (by what cleans old files out of /tmp, for example) is made again, unless another server
    /// was faster. Says whether that was all.
    fn lock_again(&self, gone: &Gone) -> bool {
        if gone.purpose != Use::Lock {
            return false;
        }
        let folder = gone.path.parent().unwrap_or(Path::new("/"));
        let Ok(file) = open::lock(folder) else { return false };
        let Ok(found) = file.metadata() else { return false };
        let mut watched = lock(&self.watched);
        watched.retain(|file| file.purpose != Use::Lock);
        watched.push(Watched::new(Use::Lock, gone.path.clone(), &found));
        // The removed one stays locked, too, by whoever has it open.
        *lock(&self.lock) = Some(file);
        tracing::warn!(
            "{gone}; it is there and locked again: it keeps other servers from this data dir, leave it alone"
        );
        true
    }

    /// Saves what the open files hold, and says where it is and what to do now. Nothing may be written to `c` any more.
    /// `again` is asked after each failure, with the number of tries and the reason, whether to try once more.
    pub(super) fn rescue(
        &self,
        c: &Connection,
        gone: &Gone,
        now: Millis,
        again: &mut dyn FnMut(u32, &StoreError) -> bool,
    ) -> String {
        if gone.purpose == Use::Lock {
            return "nothing that was accepted is lost; another server has begun to use this data dir: stop one of them".to_owned();
        }
        let replaced = match self.put_aside(gone, now) {
            Ok(aside) => aside.map_or(String::new(), |aside| format!("; the new file is now {}", aside.display())),
            Err(error) => format!("; the new file could not be put aside ({error}): move it away first"),
        };
        let write = || match c.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get::<_, i64>(0)) {
            Ok(0) => Ok(()),
            Ok(_) => Err(StoreError::Database("another program reads the database".to_owned())),
            Err(error) => Err(StoreError::from(error)),
        };
        if gone.purpose == Use::Log {
            if attempt(again, write).is_ok() {
                return format!(
                    "what it held is in {DATABASE} now and nothing that was accepted is lost{replaced}: start the server again"
                );
            }
        } else if let Err(error) = write() {
            // Only a database that was moved would need it, to be whole without its log.
            tracing::debug!("the log could not be written into the database: {error}");
        }
        match attempt(again, || self.save(c, now)) {
            Ok(copy) => {
                let before = match (gone.purpose, gone.how) {
                    (Use::Folder, _) => "move the old folder back, with all its files; or, if it is gone, ".to_owned(),
                    (Use::Database, How::Replaced | How::Emptied) => {
                        format!("move the new {DATABASE} and its log ({DATABASE}-wal) away, ")
                    }
                    _ => String::new(),
                };
                format!(
                    "everything that was accepted is in {}{replaced}: {before}rename this copy to {DATABASE}, and start the \
                     server again",
                    copy.display()
                )
            }
            Err(error) => format!(
                "if it was moved, move it back and start the server again, and nothing is lost; if not, what was accepted since \
                 the last backup is (it could not be saved: {error}): restore one (roundhouse restore)"
            ),
        }
    }

    /// SQLite would take a log that is not its own for its own, and delete it in the end.
    fn put_aside(&self, gone: &Gone, now: Millis) -> Result<Option<PathBuf>, StoreError> {
        if gone.purpose != Use::Log || gone.how != How::Replaced {
            return Ok(None);
        }
        let mut aside = gone.path.clone().into_os_string();
        aside.push(format!(".replaced-{}", compact(now)));
        let aside = PathBuf::from(aside);
        std::fs::rename(&gone.path, &aside).map_err(in_file(&gone.path))?;
        Ok(Some(aside))
    }

    fn save(&self, c: &Connection, now: Millis) -> Result<PathBuf, StoreError> {
        let watched = lock(&self.watched);
        let database = watched.iter().find(|file| file.purpose == Use::Database);
        let database = database.ok_or_else(|| StoreError::Unusable("the store has no file".to_owned()))?;
        let folder = database.path.parent().unwrap_or(Path::new("/"));
        std::fs::metadata(folder).map_err(in_file(folder))?;
        let named = |n: u32| {
            folder.join(format!("{RESCUED}{}{}", compact(now), if n == 0 { String::new() } else { format!("-{n}") }))
        };
        // Never over one that is there: the clock may have been set back.
        let copy = (0..).map(named).find(|copy| !copy.exists()).unwrap_or_else(|| named(0));
        let part = PathBuf::from(format!("{}{PART}", copy.display()));
        let text = part.to_str().ok_or_else(|| StoreError::Unusable("the path is not UTF-8".to_owned()))?;
        let _ = remove_if_there(&part);
        if let Err(error) = c.execute("VACUUM INTO ?1", [text]) {
            let _ = remove_if_there(&part);
            return Err(explained(folder, error.into()));
        }
        File::open(&part).and_then(|file| file.sync_all()).map_err(in_file(&part))?;
        std::fs::rename(&part, &copy).map_err(in_file(&copy))?;
        // The old log would be taken for that of whatever gets the database's name.
        for log in watched.iter().filter(|file| file.purpose == Use::Log && file.gone().is_none()) {
            remove_if_there(&log.path)?;
        }
        sync_folder(folder)?;
        Ok(copy)
    }
}

impl Store {
    /// Looks every second, until `stop`, whether the store's files are where they were; if not, the process ends.
    pub async fn watch_files(self, stop: CancellationToken) {
        while self.are_there().await.is_ok() {
            tokio::select! {
                () = tokio::time::sleep(LOOK_EVERY) => {}
                () = stop.cancelled() => return,
            }
        }
    }

    /// An error is the end of the store: what it has promised before is saved, and it promises nothing afterwards.
    async fn are_there(&self) -> Result<(), StoreError> {
        let presence = self.presence.clone();
        // A network file system that has gone away keeps a thread for itself.
        let gone = tokio::task::spawn_blocking(move || presence.gone().filter(|gone| !presence.lock_again(gone))).await;
        let Ok(Some(gone)) = gone else { return Ok(()) };
        self.end(StoreError::Gone(gone)).await
    }
}

/// Whether to try to save once more; waits before it says so.
pub(super) fn wait_for_room(give_up_reserve: impl Fn() -> bool) -> impl FnMut(u32, &StoreError) -> bool {
    move |tries, error| {
        let is_full = matches!(error, StoreError::DiskFull(_));
        if is_full && give_up_reserve() {
            return true;
        }
        if tries >= if is_full { TRIES_FULL } else { TRIES } || matches!(error, StoreError::File { .. }) {
            return false;
        }
        tracing::error!(
            "what the store holds could not be saved yet, do not end this process; it is tried again: {error}"
        );
        std::thread::sleep(TRY_EVERY);
        true
    }
}

fn attempt<T>(
    again: &mut dyn FnMut(u32, &StoreError) -> bool,
    mut act: impl FnMut() -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    let mut tries = 1;
    loop {
        match act() {
            Err(error) if again(tries, &error) => tries += 1,
            done => return done,
        }
    }
}

fn compact(now: Millis) -> String {
    rfc3339(now).chars().filter(char::is_ascii_alphanumeric).collect()
}

/// Why a data dir is not to be used as it is: a copy that was saved lies in it, or what is left of a database. `None`: it may
/// be used. An empty file is no database.
pub(super) fn why_unusable(data_dir: &Path) -> Option<String> {
    let has_database = std::fs::metadata(data_dir.join(DATABASE)).is_ok_and(|found| found.len() > 0);
    let shown = data_dir.display();
    let mut copies: Vec<PathBuf> = std::fs::read_dir(data_dir)
        .ok()?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(RESCUED)))
        .collect();
    copies.sort();
    let is_part = |path: &PathBuf| path.extension().is_some_and(|end| end == &PART[1..]);
    if let Some(copy) = copies.iter().rfind(|path| !is_part(path)) {
        let away = if has_database { "" } else { " and artifacts/" };
        return Some(format!(
            "a server saved its jobs in {} when a file of its store was removed while it ran: rename this copy to {DATABASE} \
             to go on with them, or move it{away} away to go on without",
            copy.display()
        ));
    }
    if has_database {
        return None;
    }
    if let Some(part) = copies.first() {
        return Some(format!(
            "{shown} has no {DATABASE}, and {} is only a part of one: saving it was interrupted. Restore a backup into another \
             data dir (roundhouse restore), or move this one away to begin anew",
            part.display()
        ));
    }
    let log = data_dir.join(format!("{DATABASE}-wal"));
    let left = if std::fs::metadata(&log).is_ok_and(|found| found.len() > 0) {
        format!("its log is there ({})", log.display())
    } else if has_files(&data_dir.join(ARTIFACTS)) && !data_dir.join(DATABASE_NEXT).exists() {
        format!("files of jobs are there (in {})", data_dir.join(ARTIFACTS).display())
    } else {
        return None;
    };
    Some(format!(
        "{shown} has no {DATABASE}, but {left}: put {DATABASE} back, restore a backup into another data dir (roundhouse \
         restore), or move this one away to begin anew"
    ))
}

/// Whether any file lies in `folder` or below.
fn has_files(folder: &Path) -> bool {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.into_iter().any(|entry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => has_files(&entry.path()),
        _ => true,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened(dir: &Path) -> (Connection, Presence) {
        let path = dir.join(DATABASE);
        let c = Connection::open(&path).unwrap();
        c.execute_batch("PRAGMA journal_mode = WAL; CREATE TABLE t (x); INSERT INTO t VALUES (1)").unwrap();
        let lock = File::create(dir.join(LOCK)).unwrap();
        let presence = Presence::of(&path, &lock).unwrap();
        (c, presence)
    }

    fn count(path: &Path) -> i64 {
        Connection::open(path).unwrap().query_row("SELECT count(*) FROM t", [], |row| row.get(0)).unwrap()
    }

    #[test]
    fn what_is_written_after_the_removal_is_saved_too_and_the_old_log_is_in_nobodys_way() {
        let dir = tempfile::tempdir().unwrap();
        let (c, presence) = opened(dir.path());
        assert_eq!(presence.gone(), None);
        let database = dir.path().join(DATABASE);
        std::fs::remove_file(&database).unwrap();
        c.execute("INSERT INTO t VALUES (2)", []).unwrap();
        let gone = presence.gone().unwrap();
        assert!(gone.to_string().contains("roundhouse.db was removed or moved"), "{gone}");
        assert!(why_unusable(dir.path()).unwrap().contains("its log is there"), "nobody begins anew beside it");
        let said = presence.rescue(&c, &gone, 0, &mut |_, _| false);
        assert!(said.contains("roundhouse.db.rescued-19700101T000000"), "{said}");
        let told = why_unusable(dir.path()).unwrap();
        let copy = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path());
        let copy = copy.into_iter().find(|path| path.to_string_lossy().contains("rescued")).unwrap();
        assert!(told.contains(&copy.display().to_string()), "{told}");
        // Neither beside another database: the jobs in the copy would be forgotten.
        std::fs::write(&database, "another").unwrap();
        assert!(why_unusable(dir.path()).unwrap().contains("rename this copy"));
        std::fs::rename(copy, &database).unwrap();
        assert_eq!(why_unusable(dir.path()), None);
        assert_eq!(count(&database), 2);
    }

    #[test]
    fn a_copy_that_cannot_be_written_is_tried_again_and_never_written_over_another() {
        let dir = tempfile::tempdir().unwrap();
        let (c, presence) = opened(dir.path());
        std::fs::remove_file(dir.path().join(DATABASE)).unwrap();
        let earlier = dir.path().join("roundhouse.db.rescued-19700101T000000000Z");
        std::fs::write(&earlier, "earlier").unwrap();
        let in_the_way = dir.path().join("roundhouse.db.rescued-19700101T000000000Z-1.part");
        std::fs::create_dir(&in_the_way).unwrap();
        let mut tries = 0;
        let said = presence.rescue(&c, &presence.gone().unwrap(), 0, &mut |tried, _| {
            tries = tried;
            std::fs::remove_dir(&in_the_way).is_ok()
        });
        assert!(tries == 1 && said.contains("rescued-19700101T000000000Z-1:"), "{tries} {said}");
        assert_eq!(std::fs::read(&earlier).unwrap(), b"earlier");
    }

    #[test]
    fn a_part_of_a_copy_is_not_taken_for_one_and_keeps_others_from_beginning_anew() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("roundhouse.db.rescued-1.part"), "half").unwrap();
        assert!(why_unusable(dir.path()).unwrap().contains("interrupted"));
        std::fs::write(dir.path().join(DATABASE), "a database").unwrap();
        assert_eq!(why_unusable(dir.path()), None);
    }

    #[test]
    fn what_is_left_of_a_database_is_not_taken_for_a_new_data_dir() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join(ARTIFACTS).join("00");
        std::fs::create_dir_all(&folder).unwrap();
        assert_eq!(why_unusable(dir.path()), None, "folders alone are nothing");
        std::fs::write(folder.join("file"), "of a job").unwrap();
        assert!(why_unusable(dir.path()).unwrap().contains("files of jobs are there"));
        // A restore that was interrupted may go on.
        let unfinished = dir.path().join(DATABASE_NEXT);
        std::fs::write(&unfinished, "half").unwrap();
        assert_eq!(why_unusable(dir.path()), None);
        std::fs::remove_file(&unfinished).unwrap();
        let log = dir.path().join("roundhouse.db-wal");
        std::fs::write(&log, "").unwrap();
        std::fs::write(dir.path().join(DATABASE), "").unwrap();
        assert!(why_unusable(dir.path()).unwrap().contains("files of jobs"), "an empty file is no database");
        std::fs::write(&log, "frames").unwrap();
        assert!(why_unusable(dir.path()).unwrap().contains("its log is there"));
        std::fs::write(dir.path().join(DATABASE), "a database").unwrap();
        assert_eq!(why_unusable(dir.path()), None);
    }

    #[test]
    fn a_log_that_somebody_reads_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let (c, presence) = opened(dir.path());
        let reader = Connection::open(dir.path().join(DATABASE)).unwrap();
        reader.execute_batch("BEGIN; SELECT * FROM t").unwrap();
        c.execute("INSERT INTO t VALUES (2)", []).unwrap();
        let other = dir.path().join("other");
        std::fs::write(&other, "mine").unwrap();
        std::fs::rename(&other, dir.path().join("roundhouse.db-wal")).unwrap();
        let mut reader = Some(reader);
        let said = presence.rescue(&c, &presence.gone().unwrap(), 0, &mut |_, _| reader.take().is_some());
        assert!(said.contains("nothing that was accepted is lost; the new file is now"), "{said}");
        let aside = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path());
        let aside = aside.into_iter().find(|path| path.to_string_lossy().contains("-wal.replaced-")).unwrap();
        assert_eq!(std::fs::read(aside).unwrap(), b"mine");
        let copy = dir.path().join("copy.db");
        std::fs::copy(dir.path().join(DATABASE), &copy).unwrap();
        assert_eq!(count(&copy), 2);
    }

    #[test]
    fn a_replaced_database_is_seen_and_the_new_one_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (c, presence) = opened(dir.path());
        let (database, other) = (dir.path().join(DATABASE), dir.path().join("other"));
        std::fs::write(&other, "mine").unwrap();
        std::fs::rename(&other, &database).unwrap();
        let gone = presence.gone().unwrap();
        assert!(gone.to_string().contains("replaced"), "{gone}");
        let said = presence.rescue(&c, &gone, 0, &mut |_, _| false);
        assert!(said.contains("move the new roundhouse.db"), "{said}");
        assert_eq!(std::fs::read(&database).unwrap(), b"mine");
        assert!(!dir.path().join("roundhouse.db-wal").exists());
    }

    #[test]
    fn a_removed_log_is_written_into_the_database() {
        let dir = tempfile::tempdir().unwrap();
        let (c, presence) = opened(dir.path());
        std::fs::remove_file(dir.path().join("roundhouse.db-wal")).unwrap();
        c.execute("INSERT INTO t VALUES (2)", []).unwrap();
        let gone = presence.gone().unwrap();
        let said = presence.rescue(&c, &gone, 0, &mut |_, _| false);
        assert!(said.contains("nothing that was accepted is lost"), "{said}");
        // As after a kill: without this connection.
        let copy = dir.path().join("copy.db");
        std::fs::copy(dir.path().join(DATABASE), &copy).unwrap();
        assert_eq!(count(&copy), 2);
    }

    #[test]
    fn a_folder_that_is_gone_is_said_honestly_and_a_lock_is_made_again() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        std::fs::create_dir(&data).unwrap();
        let (c, presence) = opened(&data);
        std::fs::remove_file(data.join(LOCK)).unwrap();
        assert!(presence.lock_again(&presence.gone().unwrap()));
        assert_eq!(presence.gone(), None);
        assert!(open::lock(&data).is_err(), "it keeps others out");
        // Another server was faster.
        std::fs::remove_file(data.join(LOCK)).unwrap();
        let theirs = open::lock(&data).unwrap();
        let gone = presence.gone().unwrap();
        assert!(!presence.lock_again(&gone));
        assert!(presence.rescue(&c, &gone, 0, &mut |_, _| false).contains("another server"));
        drop(theirs);
        std::fs::remove_file(data.join(LOCK)).unwrap();
        assert!(presence.lock_again(&presence.gone().unwrap()));
        std::fs::rename(&data, dir.path().join("moved")).unwrap();
        let said = presence.rescue(&c, &presence.gone().unwrap(), 0, &mut |_, _| false);
        assert!(said.contains("move it back") && said.contains("could not be saved"), "{said}");
        assert_eq!(count(&dir.path().join("moved").join(DATABASE)), 1, "a moved one is whole without its log");
    }
}
