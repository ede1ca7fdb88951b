//! Room on the disk: a watermark below which new jobs are refused, and a reserve file that is given up when the disk is
//! full all the same, so that answers of running jobs still land.

use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::domain::storage::shown_bytes;

/// Name of the reserve file in a data dir.
pub(super) const RESERVE: &str = "reserve";

/// Too little room. Bytes.
#[derive(Clone, Copy, Debug)]
struct Lack {
    free: u64,
    needed: u64,
    /// Keys of models.yaml that say so.
    keys: &'static str,
}

impl Lack {
    fn words(&self, whose: &str) -> String {
        let (free, needed) = (shown_bytes(self.free), shown_bytes(self.needed));
        format!("the disk of {whose} is nearly full: {free} free, new jobs need {needed} ({})", self.keys)
    }
}

/// The disk under one data dir. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Space {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    free_min: u64,
    reserve_bytes: u64,
    reserve_is_there: AtomicBool,
    /// Making the reserve failed, and that was said.
    said_unmade: AtomicBool,
    /// New jobs are refused, and that was said: why.
    low: Mutex<Option<Lack>>,
    /// Held while the reserve is made.
    making: Mutex<()>,
}

impl Space {
    /// `free_min`: bytes that must be free for new jobs. `reserve_bytes`: size of the reserve; 0: none.
    pub(super) fn new(dir: &Path, free_min: u64, reserve_bytes: u64) -> Self {
        let space = Self::of(dir, free_min, reserve_bytes);
        let size = std::fs::metadata(space.reserve()).map_or(0, |file| file.len());
        space.inner.reserve_is_there.store(size == reserve_bytes && size > 0, Ordering::Relaxed);
        space.refill();
        space
    }

    fn of(dir: &Path, free_min: u64, reserve_bytes: u64) -> Self {
        let no = || AtomicBool::new(false);
        let inner = Inner {
            dir: dir.to_owned(),
            free_min,
            reserve_bytes,
            reserve_is_there: no(),
            said_unmade: no(),
            low: Mutex::default(),
            making: Mutex::new(()),
        };
        Self { inner: Arc::new(inner) }
    }

    #[cfg(test)]
    pub(super) fn unlimited() -> Self {
        Self::of(Path::new(""), 0, 0)
    }

    fn reserve(&self) -> PathBuf {
        self.inner.dir.join(RESERVE)
    }

    /// Why new jobs are refused now, in words; `None`: there is room. Puts the reserve back when there is room for it. Says
    /// when it begins.
    pub(super) fn check(&self) -> Option<String> {
        let lack = self.lack()?;
        let reason =
            format!("{}; make room there, running jobs go on", lack.words(&self.inner.dir.display().to_string()));
        if self.low().replace(lack).is_none() {
            tracing::warn!(free = lack.free, needed = lack.needed, "new jobs are refused: {reason}");
        }
        Some(reason)
    }

    fn low(&self) -> MutexGuard<'_, Option<Lack>> {
        self.inner.low.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`Self::check`], now and then: says when it ends, too, at most as often as it is called, and notices a reserve that
    /// was removed. Blocks.
    pub(super) fn look(&self) {
        self.look_for_reserve();
        if self.check().is_none() && self.low().take().is_some() {
            let free = free_bytes(&self.inner.dir).unwrap_or_default();
            let dir = self.inner.dir.display();
            tracing::info!(free, "there is room again on the disk of {dir}: {} free", shown_bytes(free));
        }
    }

    /// Somebody may have removed or cut it.
    fn look_for_reserve(&self) {
        let inner = &self.inner;
        if !inner.reserve_is_there.load(Ordering::Relaxed) {
            return;
        }
        let is_there = match std::fs::metadata(self.reserve()) {
            Ok(file) => file.len() == inner.reserve_bytes,
            // A disk that cannot be asked says nothing about what is on it.
            Err(error) => error.kind() != ErrorKind::NotFound,
        };
        // The writer may have given it up meanwhile.
        if !is_there && inner.reserve_is_there.swap(false, Ordering::Relaxed) {
            let path = self.reserve();
            tracing::warn!("{}: the reserve was removed or cut; it is made again if there is room", path.display());
            self.refill();
        }
    }

    /// What a keeper should know, in words without paths: as the last look or submission found it.
    pub(super) fn trouble(&self) -> Option<String> {
        let lack = (*self.low())?;
        Some(format!("new jobs are refused: {}; make room there, running jobs go on", lack.words("the data dir")))
    }

    fn lack(&self) -> Option<Lack> {
        let inner = &self.inner;
        if inner.free_min == 0 && inner.reserve_bytes == 0 {
            return None;
        }
        let free = self.refill();
        let has_reserve = inner.reserve_bytes == 0 || inner.reserve_is_there.load(Ordering::Relaxed);
        if free >= inner.free_min && has_reserve {
            return None;
        }
        let needed = inner.free_min + if has_reserve { 0 } else { inner.reserve_bytes };
        let keys = match (inner.free_min, has_reserve) {
            (0, _) => "storage.reserve",
            (_, true) => "storage.free_min",
            (_, false) => "storage.free_min and storage.reserve",
        };
        Some(Lack { free, needed, keys })
    }

    /// Makes the reserve again if there is room for it beyond the watermark. Returns what is free.
    fn refill(&self) -> u64 {
        let inner = &self.inner;
        let free = free_bytes(&inner.dir).unwrap_or(u64::MAX);
        if inner.reserve_bytes == 0 || inner.reserve_is_there.load(Ordering::Relaxed) {
            return free;
        }
        if free < inner.free_min + inner.reserve_bytes {
            return free;
        }
        // Another thread makes it already.
        let Ok(_making) = inner.making.try_lock() else { return free };
        match self.make_reserve() {
            Ok(()) => {
                inner.reserve_is_there.store(true, Ordering::Relaxed);
                inner.said_unmade.store(false, Ordering::Relaxed);
                free_bytes(&inner.dir).unwrap_or(free)
            }
            Err(error) => {
                // It is tried again at every look.
                if !inner.said_unmade.swap(true, Ordering::Relaxed) {
                    tracing::warn!("{}: the reserve could not be made: {error}", self.reserve().display());
                }
                let _ = std::fs::remove_file(self.reserve());
                free
            }
        }
    }

    fn make_reserve(&self) -> std::io::Result<()> {
        let file = File::options().create(true).truncate(true).write(true).open(self.reserve())?;
        let length = i64::try_from(self.inner.reserve_bytes).unwrap_or(i64::MAX);
        nix::fcntl::posix_fallocate(&file, 0, length)?;
        file.sync_all()
    }

    /// Gives the reserve back to the disk; false: there was none.
    pub(super) fn give_up_reserve(&self) -> bool {
        let is_given =
            self.inner.reserve_is_there.swap(false, Ordering::Relaxed) && std::fs::remove_file(self.reserve()).is_ok();
        if is_given {
            tracing::warn!(
                "the disk is full: the reserve is given up, new jobs are refused until there is space again"
            );
        }
        is_given
    }
}

/// What an ordinary user may still write on the file system of `path`.
pub(super) fn free_bytes(path: &Path) -> Option<u64> {
    let stat = nix::sys::statvfs::statvfs(path).ok()?;
    Some(stat.blocks_available().saturating_mul(stat.fragment_size()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserve_is_made_given_up_and_made_again() {
        let dir = tempfile::tempdir().unwrap();
        let space = Space::new(dir.path(), 1, 100_000);
        let size = || std::fs::metadata(dir.path().join("reserve")).map_or(0, |file| file.len());
        assert_eq!((size(), space.check()), (100_000, None));
        assert!(space.give_up_reserve());
        assert!(!space.give_up_reserve(), "only once");
        assert_eq!(size(), 0);
        assert_eq!(space.check(), None, "there is room");
        assert_eq!(size(), 100_000);
    }

    #[test]
    fn a_removed_reserve_is_noticed_and_made_again_by_a_look() {
        let dir = tempfile::tempdir().unwrap();
        let reserve = dir.path().join(RESERVE);
        for free_min in [0, 1] {
            let space = Space::new(dir.path(), free_min, 100_000);
            std::fs::remove_file(&reserve).unwrap();
            space.look();
            assert_eq!(std::fs::metadata(&reserve).unwrap().len(), 100_000);
            // Cut, it is of no use.
            File::options().write(true).open(&reserve).unwrap().set_len(10).unwrap();
            space.look();
            assert_eq!(std::fs::metadata(&reserve).unwrap().len(), 100_000);
            assert!(space.give_up_reserve(), "it is there to be given up");
        }
    }

    #[test]
    fn a_keeper_who_asks_makes_the_disk_do_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        let space = Space::new(&data, 1, 100_000);
        assert!(space.check().is_some(), "no reserve can be made there");
        std::fs::create_dir(&data).unwrap();
        assert!(space.trouble().is_some(), "as it was found");
        assert!(!data.join(RESERVE).exists());
        space.look();
        assert!(space.trouble().is_none() && data.join(RESERVE).exists());
    }

    #[test]
    fn without_a_watermark_too_new_jobs_wait_until_the_reserve_is_back() {
        let dir = tempfile::tempdir().unwrap();
        // As on a disk that has no room for it any more.
        let space = Space::new(dir.path(), 0, u64::MAX / 2);
        let reason = space.check().expect("a refusal");
        assert!(reason.contains("nearly full") && reason.contains("(storage.reserve)"), "{reason}");
        assert!(space.trouble().is_some(), "its keeper hears of it");
        let space = Space::new(dir.path(), 0, 100_000);
        assert_eq!(space.check(), None);
        assert!(space.give_up_reserve());
        assert_eq!(space.check(), None, "there is room");
        assert!(dir.path().join(RESERVE).exists(), "and it is made again");
        assert!(Space::new(dir.path(), 0, 0).check().is_none(), "no limit at all");
    }

    #[test]
    fn below_the_watermark_the_refusal_says_how_much_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        let space = Space::new(dir.path(), u64::MAX / 2, 0);
        let reason = space.check().unwrap();
        assert!(reason.contains("nearly full") && reason.contains("make room"), "{reason}");
        let trouble = space.trouble().unwrap();
        assert!(trouble.contains("nearly full") && !trouble.contains(&*dir.path().to_string_lossy()), "{trouble}");
    }
}
