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
/// Files that are remembered between two looks at all files.
const MET_MAX: usize = 10_000;

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
    missing: BTreeSet<String>,
    /// Lost or damaged when somebody wanted to read them.
    met: BTreeSet<String>,
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
        if known.met.len() < MET_MAX {
            known.met.insert(path.to_owned());
        }
    }

    /// What reads have met.
    pub(super) fn all_met(&self) -> Vec<String> {
        self.known().met.iter().cloned().collect()
    }

    /// After a look at all files: what it did not find, and what was met and is not lost any more.
    pub(super) fn looked(&self, missing: BTreeSet<String>, found: &[String]) {
        let mut known = self.known();
        known.missing = missing;
        known.met.retain(|path| !found.contains(path));
    }

    /// How many there are.
    pub(super) fn count(&self) -> u64 {
        let known = self.known();
        known.missing.union(&known.met).count() as u64
    }
}
