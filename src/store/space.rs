//! Room on the disk: a watermark below which new jobs are refused, and a reserve file that is given up when the disk is
//! full all the same, so that answers of running jobs still land.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use crate::domain::storage::shown_bytes;

/// Too little room. Bytes.
struct Lack {
    free: u64,
    needed: u64,
}

impl Lack {
    fn words(&self, whose: &str) -> String {
        let (free, needed) = (shown_bytes(self.free), shown_bytes(self.needed));
        format!("the disk of {whose} is nearly full: {free} free, new jobs need {needed} (storage.free_min)")
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
    /// New jobs are refused, and that was said.
    is_low: AtomicBool,
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
            is_low: no(),
            making: Mutex::new(()),
        };
        Self { inner: Arc::new(inner) }
    }

    #[cfg(test)]
    pub(super) fn unlimited() -> Self {
        Self::of(Path::new(""), 0, 0)
    }

    fn reserve(&self) -> PathBuf {
        self.inner.dir.join("reserve")
    }

    /// Why new jobs are refused now, in words; `None`: there is room. Puts the reserve back when there is room for it. Says
    /// when it begins.
    pub(super) fn check(&self) -> Option<String> {
        let lack = self.lack()?;
        let reason =
            format!("{}; make room there, running jobs go on", lack.words(&self.inner.dir.display().to_string()));
        if !self.inner.is_low.swap(true, Ordering::Relaxed) {
            tracing::warn!(free = lack.free, needed = lack.needed, "new jobs are refused: {reason}");
        }
        Some(reason)
    }

    /// As [`Self::check`], now and then: says when it ends, too, at most as often as it is called.
    pub(super) fn look(&self) {
        if self.check().is_none() && self.inner.is_low.swap(false, Ordering::Relaxed) {
            let free = free_bytes(&self.inner.dir).unwrap_or_default();
            let dir = self.inner.dir.display();
            tracing::info!(free, "there is room again on the disk of {dir}: {} free", shown_bytes(free));
        }
    }

    /// What a keeper should know now, in words without paths.
    pub(super) fn trouble(&self) -> Option<String> {
        let lack = self.inner.is_low.load(Ordering::Relaxed).then(|| self.lack())??;
        Some(format!("new jobs are refused: {}; make room there, running jobs go on", lack.words("the data dir")))
    }

    fn lack(&self) -> Option<Lack> {
        let inner = &self.inner;
        if inner.free_min == 0 {
            return None;
        }
        let free = self.refill();
        let has_reserve = inner.reserve_bytes == 0 || inner.reserve_is_there.load(Ordering::Relaxed);
        if free >= inner.free_min && has_reserve {
            return None;
        }
        let needed = inner.free_min + if has_reserve { 0 } else { inner.reserve_bytes };
        Some(Lack { free, needed })
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
    fn below_the_watermark_the_refusal_says_how_much_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        let space = Space::new(dir.path(), u64::MAX / 2, 0);
        let reason = space.check().unwrap();
        assert!(reason.contains("nearly full") && reason.contains("make room"), "{reason}");
        let trouble = space.trouble().unwrap();
        assert!(trouble.contains("nearly full") && !trouble.contains(&*dir.path().to_string_lossy()), "{trouble}");
    }
}
