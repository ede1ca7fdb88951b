//! The store's own task: sees whether its files are still there, measures, deletes what is past its time, makes room, gives
//! free pages back, collects files without rows, and knows what is wrong.

use std::collections::BTreeSet;
use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::lost::Missing;
use super::read::Sizes;
use super::retention::Purged;
use super::verbs::Store;
use super::{FilesReport, StoreError};
use crate::domain::storage::shown_bytes;

/// How often it looks when there is nothing to do.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Deleting by age takes a tenth of the writer's time at most, making room half of it.
const REST_PURGING: u32 = 9;
const REST_MAKING_ROOM: u32 = 1;
const REST_MIN: Duration = Duration::from_millis(2);
/// Old idempotency keys have no lag of their own: looked for so often.
const PURGE_AT_LEAST_EVERY: Duration = Duration::from_secs(60);
/// A log that is so many times longer than what it is cut back to is held open by a reader.
const WAL_TIMES: u64 = 4;
const WARN_EVERY: Duration = Duration::from_secs(60);
/// Fewer operations between two looks than this: idle.
const IDLE_OPERATIONS: u64 = 8;
const FREE_MIN_BYTES: u64 = 1024 * 1024;
const PAGES_PER_STEP: u32 = 256;
/// The collection of files: when it begins, its pause between folders, and between passes.
const COLLECT_AFTER: Duration = Duration::from_secs(60);
const COLLECT_PAUSE: Duration = Duration::from_millis(200);
const COLLECT_EVERY: Duration = Duration::from_secs(3_600);
/// Between two files that are read again.
const REREAD_PAUSE: Duration = Duration::from_millis(20);
/// Names in one line of the log.
const NAMES_MAX: usize = 20;

/// Something about the store that its keeper should know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Trouble {
    /// `wal_long`, `disk_low`, `quota_used_up`, `files_missing` or `snapshots_fail`.
    pub state: &'static str,
    /// In words, without paths.
    pub reason: String,
}

/// What the task remembers from look to look.
#[derive(Default)]
struct Seen {
    is_making_room: bool,
    operations: u64,
    purged_at: Option<Instant>,
    warned_at: Option<Instant>,
    failed_at: Option<Instant>,
    /// When it was last seen what jobs that have not ended take.
    weighed_at: Option<Instant>,
}

impl Store {
    /// Runs until `stop` is cancelled.
    pub async fn keep_house(self, stop: CancellationToken) {
        tokio::join!(self.sweep(&stop), self.collect_files(&stop));
    }

    /// What is wrong now.
    pub fn troubles(&self) -> Vec<Trouble> {
        let mut troubles = Vec::new();
        let wal = self.metrics.long_wal();
        if wal > 0 {
            troubles.push(Trouble { state: "wal_long", reason: self.long_wal(wal) });
        }
        if let Some(reason) = self.space.trouble() {
            troubles.push(Trouble { state: "disk_low", reason });
        }
        if self.quota.is_used_up() {
            let error = self.quota.refusal();
            troubles.push(Trouble { state: "quota_used_up", reason: format!("new jobs are refused: {error}") });
        }
        let missing = self.files.lost.count();
        if missing > 0 {
            let reason = format!(
                "{missing} files of jobs are lost or damaged, the log names them; put them back from the artifacts/ of a backup"
            );
            troubles.push(Trouble { state: "files_missing", reason });
        }
        troubles
    }

    fn long_wal(&self, bytes: u64) -> String {
        format!(
            "the write-ahead log has grown to {} (normal: up to {}): a reader holds it open; is another program reading \
             the database?",
            shown_bytes(bytes),
            shown_bytes(self.settings.wal_bytes_kept)
        )
    }

    async fn sweep(&self, stop: &CancellationToken) {
        let mut seen = Seen::default();
        loop {
            let rest = match self.look_after(&mut seen).await {
                Ok(rest) => rest,
                Err(StoreError::Stopped) => return,
                // Nothing is to be promised on top of it.
                Err(error @ StoreError::Corrupt(_)) => return drop(self.end(error).await),
                Err(error) => {
                    if is_due(&mut seen.failed_at) {
                        tracing::warn!("old jobs could not be deleted, it is tried again: {error}");
                    }
                    LOOK_EVERY
                }
            };
            let pause = async {
                tokio::time::sleep(rest.min(REST_MIN)).await;
                tokio::select! {
                    () = tokio::time::sleep(rest.saturating_sub(REST_MIN)) => {}
                    () = self.quota.exceeded(), if !self.quota.is_used_up() => {}
                }
            };
            tokio::select! {
                () = pause => {}
                () = stop.cancelled() => return,
            }
        }
    }

    /// One look, and one step if there is something to do; returns how long to rest.
    async fn look_after(&self, seen: &mut Seen) -> Result<Duration, StoreError> {
        self.look_at_disk().await?;
        let sizes = self.measure().await?;
        self.watch_wal(&sizes, seen);
        if self.writer.has_delivered() {
            self.ping().await?;
        }
        seen.is_making_room = self.quota.is_over() || (seen.is_making_room && self.quota.too_much() > 0);
        let is_time = seen.purged_at.is_none_or(|at| at.elapsed() >= PURGE_AT_LEAST_EVERY);
        if sizes.purge_lag_ms > 0 || is_time {
            let begun = Instant::now();
            seen.purged_at = Some(begun);
            let purged = self.purge().await?;
            if purged.has_more || seen.is_making_room {
                let times = if seen.is_making_room { REST_MAKING_ROOM } else { REST_PURGING };
                return Ok(rest(&purged, begun, times));
            }
        }
        if seen.is_making_room {
            let begun = Instant::now();
            let purged = self.make_room(self.quota.too_much()).await?;
            self.measure().await?;
            let is_stuck = purged.emptied + purged.deleted == 0;
            seen.is_making_room &= !is_stuck;
            if is_stuck && is_due(&mut seen.weighed_at) {
                self.quota.weighed(self.reader.live_bytes().await?);
            }
            self.say_used_up(is_stuck && self.quota.is_over());
            return Ok(if is_stuck { LOOK_EVERY } else { rest(&purged, begun, REST_MAKING_ROOM) });
        }
        self.say_used_up(false);
        let operations = self.metrics.operations();
        let is_idle = operations - seen.operations < IDLE_OPERATIONS;
        seen.operations = operations;
        let free = sizes.free_bytes;
        if is_idle && self.gives_back && free > FREE_MIN_BYTES && free > (sizes.used_bytes + free) / 4 {
            let begun = Instant::now();
            self.give_back_pages(PAGES_PER_STEP).await?;
            seen.operations = self.metrics.operations();
            return Ok((begun.elapsed() * REST_PURGING).max(REST_MIN));
        }
        Ok(LOOK_EVERY)
    }

    /// How much room there is. Not on a thread of the runtime: a disk may take its time.
    async fn look_at_disk(&self) -> Result<(), StoreError> {
        let space = self.space.clone();
        let looked = tokio::task::spawn_blocking(move || space.look()).await;
        looked.map_err(|error| StoreError::Database(format!("the look at the disk: {error}")))
    }

    async fn measure(&self) -> Result<Sizes, StoreError> {
        let sizes = self.reader.sizes(self.clock.now()).await?;
        self.quota.measured(sizes.used_bytes);
        Ok(sizes)
    }

    fn say_used_up(&self, is_used_up: bool) {
        if !self.quota.set_used_up(is_used_up) {
            return;
        }
        let (used, quota) = (self.quota.used(), self.quota.bytes());
        if is_used_up {
            tracing::warn!(used, quota, "new jobs are refused: {}", self.quota.refusal());
        } else {
            tracing::info!(used, quota, "there is room again: {} of {}", shown_bytes(used), shown_bytes(quota));
        }
    }

    fn watch_wal(&self, sizes: &Sizes, seen: &mut Seen) {
        let is_long = sizes.wal_bytes > self.settings.wal_bytes_kept.saturating_mul(WAL_TIMES);
        self.metrics.set_long_wal(if is_long { sizes.wal_bytes } else { 0 });
        if is_long && is_due(&mut seen.warned_at) {
            tracing::warn!(wal_bytes = sizes.wal_bytes, "{}", self.long_wal(sizes.wal_bytes));
        }
    }

    async fn collect_files(&self, stop: &CancellationToken) {
        let mut wait = COLLECT_AFTER;
        loop {
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = stop.cancelled() => return,
            }
            wait = COLLECT_EVERY;
            tokio::select! {
                passed = self.pass() => if let Err(error) = passed {
                    tracing::warn!("files without rows could not be collected, it is tried again in an hour: {error}");
                },
                () = stop.cancelled() => return,
            }
        }
    }

    /// All folders, slowly, and the files that readers met.
    pub(super) async fn pass(&self) -> Result<(), StoreError> {
        let mut missing = Missing::default();
        let (mut deleted, mut bytes) = (0, 0);
        let mut next = self.folder_from(0).await?;
        while let Some(folder) = next {
            let report: FilesReport = self.check_folder(folder, true).await?;
            report.missing.into_iter().for_each(|path| missing.add(path));
            deleted += report.deleted;
            bytes += report.orphan_bytes;
            tokio::time::sleep(COLLECT_PAUSE).await;
            next = self.folder_from(folder + 1).await?;
        }
        if deleted > 0 {
            tracing::info!(deleted, bytes, "deleted {deleted} files that no job has, {}", shown_bytes(bytes));
        }
        let news = self.files.lost.looked(missing);
        for names in news.names.chunks(NAMES_MAX) {
            tracing::error!("files of jobs are missing under artifacts/: {}", names.join(", "));
        }
        if news.unnamed > 0 {
            tracing::error!("{} more files of jobs are missing under artifacts/", news.unnamed);
        }
        self.read_again().await
    }

    /// The files that readers met as lost: some may be back.
    async fn read_again(&self) -> Result<(), StoreError> {
        let mut found = BTreeSet::new();
        for path in self.files.lost.all_met() {
            match self.is_lost(&path).await {
                Ok(false) => drop(found.insert(path)),
                Ok(true) => {}
                Err(StoreError::Stopped) => return Err(StoreError::Stopped),
                // What cannot be read now is not back.
                Err(error) => tracing::debug!(path, "a file that was lost cannot be read: {error}"),
            }
            tokio::time::sleep(REREAD_PAUSE).await;
        }
        self.files.lost.found(&found);
        Ok(())
    }
}

/// So that the step, which was asked for at `begun`, keeps the writer for one part of `times + 1`.
fn rest(purged: &Purged, begun: Instant, times: u32) -> Duration {
    (purged.took * (times + 1)).saturating_sub(begun.elapsed()).max(REST_MIN)
}

/// At most once a minute.
fn is_due(last: &mut Option<Instant>) -> bool {
    let is_due = last.is_none_or(|at| at.elapsed() >= WARN_EVERY);
    if is_due {
        *last = Some(Instant::now());
    }
    is_due
}
