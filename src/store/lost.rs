//! Files of jobs that are lost or damaged: which they are, and how they are told.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;

use super::StoreError;
use super::backup::ARTIFACTS;
use crate::domain::JobId;

/// Lines of one kind that are shown at most.
const LISTED_MAX: usize = 20;
/// Names that are remembered, of each kind.
const NAMES_MAX: usize = 10_000;

/// A file of a job that is not there as its row says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LostFile {
    /// Under `artifacts/`.
    pub path: String,
    /// Whose; `None`: that cannot be told.
    pub job: Option<JobId>,
    /// Not there at all; else it is not what was stored, or cannot be read.
    pub is_gone: bool,
}

impl std::fmt::Display for LostFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let what = if self.is_gone { "gone" } else { "damaged" };
        match self.job {
            Some(job) => write!(f, "{ARTIFACTS}/{} of {job}: {what}", self.path),
            None => write!(f, "{ARTIFACTS}/{}: {what}", self.path),
        }
    }
}

/// The first of many lines, and how many more there are.
pub fn listed(lines: impl ExactSizeIterator<Item = String>) -> Vec<String> {
    let more = lines.len().saturating_sub(LISTED_MAX);
    let mut shown: Vec<String> = lines.take(LISTED_MAX).collect();
    if more > 0 {
        shown.push(format!("... and {more} more"));
    }
    shown
}

/// Names them, up to a limit, and says what to do; `command`: what can go on without them.
pub(super) fn lost_files(lost: &[LostFile], advice: &str, command: &str) -> StoreError {
    let lines = listed(lost.iter().map(LostFile::to_string));
    StoreError::Unusable(format!(
        "files of jobs are lost or damaged, {} of them:\n  {}\n{advice}; roundhouse {command} --without-lost-files goes on \
         without them: the jobs are kept, and whoever asks for such a file is told that it is lost",
        lost.len(),
        lines.join("\n  ")
    ))
}

/// Whether the fault is the source's alone: nothing else is wrong.
pub(super) fn is_damage(error: &StoreError, source: &Path) -> bool {
    match error {
        StoreError::Damaged { .. } => true,
        // A sector that cannot be read.
        StoreError::File { path, source: cause } if cause.raw_os_error() == Some(Errno::EIO as i32) => {
            *path == source.display().to_string()
        }
        error => error.is_lost_file() && !source.exists(),
    }
}

/// The files that the server knows to be lost. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct LostFiles {
    known: Arc<Mutex<Known>>,
}

#[derive(Debug, Default)]
struct Known {
    /// Not found by the last look at all files.
    missing: Missing,
    /// Lost or damaged when somebody wanted to read them.
    met: BTreeSet<String>,
}

/// What a look at all files does not find.
#[derive(Debug, Default)]
pub(super) struct Missing {
    /// The first of them.
    names: BTreeSet<String>,
    /// All of them.
    count: u64,
}

impl Missing {
    /// Each path once.
    pub(super) fn add(&mut self, path: String) {
        self.count += 1;
        if self.names.len() < NAMES_MAX {
            self.names.insert(path);
        }
    }

    fn unnamed(&self) -> u64 {
        self.count - self.names.len() as u64
    }
}

/// Missing files that the look before did not miss.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct News {
    pub(super) names: Vec<String>,
    /// How many are missing beyond those that are remembered by name; 0: as many as before.
    pub(super) unnamed: u64,
}

impl LostFiles {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers the file of an error that a read ended with.
    pub(super) fn met(&self, error: &StoreError) {
        let (StoreError::Damaged { path } | StoreError::File { path, .. }) = error else { return };
        let Some(path) = path.strip_prefix(ARTIFACTS).and_then(|path| path.strip_prefix('/')) else { return };
        let mut known = self.known();
        if known.met.len() < NAMES_MAX {
            known.met.insert(path.to_owned());
        }
    }

    /// What reads have met.
    pub(super) fn all_met(&self) -> Vec<String> {
        self.known().met.iter().cloned().collect()
    }

    /// After a look at all files: what it did not find. Returns what of it is news.
    pub(super) fn looked(&self, missing: Missing) -> News {
        let mut known = self.known();
        let before = std::mem::replace(&mut known.missing, missing);
        let (now, unnamed) = (&known.missing, known.missing.unnamed());
        News {
            names: now.names.difference(&before.names).cloned().collect(),
            unnamed: if unnamed == before.unnamed() { 0 } else { unnamed },
        }
    }

    /// What was met and is not lost any more.
    pub(super) fn found(&self, found: &BTreeSet<String>) {
        self.known().met.retain(|path| !found.contains(path));
    }

    /// How many there are. A file that was met counts twice if it is missing beyond those that are remembered by name.
    pub(super) fn count(&self) -> u64 {
        let known = self.known();
        known.missing.count + known.met.difference(&known.missing.names).count() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn missing(numbers: std::ops::Range<usize>) -> Missing {
        let mut missing = Missing::default();
        numbers.for_each(|number| missing.add(format!("{number:06}")));
        missing
    }

    #[test]
    fn what_is_missing_is_news_once_and_remembered_by_name_up_to_a_limit() {
        let lost = LostFiles::default();
        let news = |names: &[&str], unnamed| News { names: names.iter().map(|&name| name.into()).collect(), unnamed };
        assert_eq!(lost.looked(missing(0..2)), news(&["000000", "000001"], 0));
        assert_eq!((lost.looked(missing(0..2)), lost.count()), (news(&[], 0), 2));
        assert_eq!((lost.looked(missing(1..3)), lost.count()), (news(&["000002"], 0), 2));
        // All of a large store.
        let all = NAMES_MAX + 5;
        let told = lost.looked(missing(0..all));
        assert_eq!((told.names.len(), told.unnamed, lost.count()), (NAMES_MAX - 2, 5, all as u64));
        assert_eq!(lost.looked(missing(0..all)), news(&[], 0));
        assert_eq!(lost.known().missing.names.len(), NAMES_MAX);
        lost.looked(Missing::default());
        assert_eq!(lost.count(), 0);
    }
}
