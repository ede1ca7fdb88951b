//! How much room jobs take (pages of the database in use, and files), and how much they may. The retention sweeper measures
//! and makes room; the writer asks before each group, which costs a few loads.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rusqlite::{Connection, OptionalExtension};
use tokio::sync::Notify;

use super::StoreError;
use super::space::free_bytes;
use super::verbs::int;
use crate::domain::StorageSettings;
use crate::domain::storage::shown_bytes;

/// When room is made, so much of the quota is free afterwards: one part of so many.
const MADE_FREE: u64 = 10;

/// Shared by the writer, the sweeper and the metrics. Cheap to clone.
#[derive(Clone)]
pub(super) struct Quota {
    inner: Arc<Inner>,
}

struct Inner {
    bytes: u64,
    /// Bytes of files, as their keeper counts them.
    files: Arc<AtomicU64>,
    /// Pages in use, as measured last.
    database: AtomicU64,
    /// What was written into the database since.
    since: AtomicU64,
    /// Of it, what jobs that have not ended take, as measured last.
    live: AtomicU64,
    /// Nothing is left that may go: new jobs are refused.
    is_used_up: AtomicBool,
    wake: Notify,
}

impl Quota {
    /// `files`: the running count of bytes in files.
    pub(super) fn new(bytes: u64, database: u64, files: Arc<AtomicU64>) -> Self {
        let inner = Inner {
            bytes,
            files,
            database: AtomicU64::new(database),
            since: AtomicU64::new(0),
            live: AtomicU64::new(0),
            is_used_up: AtomicBool::new(false),
            wake: Notify::new(),
        };
        Self { inner: Arc::new(inner) }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.inner.bytes
    }

    /// Pages in use and files, by what is known now.
    pub(super) fn used(&self) -> u64 {
        let inner = &self.inner;
        let database = inner.database.load(Ordering::Relaxed).saturating_add(inner.since.load(Ordering::Relaxed));
        database.saturating_add(inner.files.load(Ordering::Relaxed))
    }

    pub(super) fn is_over(&self) -> bool {
        self.used() > self.inner.bytes
    }

    /// Bytes that have to go before enough is free again.
    pub(super) fn too_much(&self) -> u64 {
        self.used().saturating_sub(self.inner.bytes - self.inner.bytes / MADE_FREE)
    }

    /// Pages in use, measured.
    pub(super) fn measured(&self, database: u64) {
        self.inner.since.store(0, Ordering::Relaxed);
        self.inner.database.store(database, Ordering::Relaxed);
    }

    /// Bytes of jobs that have not ended, measured.
    pub(super) fn weighed(&self, live: u64) {
        self.inner.live.store(live, Ordering::Relaxed);
    }

    /// What a new job is told.
    pub(super) fn refusal(&self) -> StoreError {
        let live = self.inner.live.load(Ordering::Relaxed);
        StoreError::OverQuota { used: self.used(), quota: self.inner.bytes, live }
    }

    /// A group was committed, with about so many bytes in it.
    pub(super) fn wrote(&self, bytes: u64) {
        self.inner.since.fetch_add(bytes, Ordering::Relaxed);
        if self.is_over() {
            self.inner.wake.notify_one();
        }
    }

    /// Comes back when more is used than may be.
    pub(super) async fn exceeded(&self) {
        self.inner.wake.notified().await;
    }

    /// Whether there is anything left that may go. Says whether that is news.
    pub(super) fn set_used_up(&self, is_used_up: bool) -> bool {
        self.inner.is_used_up.swap(is_used_up, Ordering::Relaxed) != is_used_up
    }

    pub(super) fn is_used_up(&self) -> bool {
        self.inner.is_used_up.load(Ordering::Relaxed)
    }

    /// Why new jobs are refused now; `None`: there is room, or it is being made.
    pub(super) fn check(&self) -> Option<StoreError> {
        let (used, quota) = (self.used(), self.inner.bytes);
        // Being far beyond it means that jobs come faster than room can be made.
        let is_far_over = used > quota.saturating_add(quota / MADE_FREE);
        (self.is_used_up() || is_far_over).then(|| self.refusal())
    }
}

/// The quota of this data dir: as set, else half of what was free at the first start, which is remembered so that it does
/// not shrink by what is stored.
pub(super) fn decide(c: &Connection, dir: &Path, settings: &StorageSettings, used: u64) -> Result<u64, StoreError> {
    if let Some(bytes) = settings.quota_bytes {
        tracing::info!(quota_bytes = bytes, "jobs may take {} (storage.quota)", shown_bytes(bytes));
        return Ok(bytes);
    }
    let bytes = match remembered(c)? {
        Some(bytes) => bytes,
        None => {
            let bytes = used.saturating_add(free_bytes(dir).unwrap_or(u64::MAX / 4) / 2);
            c.execute("INSERT INTO meta (key, value) VALUES ('quota_bytes', ?1)", [int(bytes).to_string()])?;
            bytes
        }
    };
    tracing::info!(
        quota_bytes = bytes,
        "jobs may take {}: half of what was free at the first start; storage.quota sets it",
        shown_bytes(bytes)
    );
    Ok(bytes)
}

/// Bytes of the bodies and files of jobs that have not ended.
pub(super) fn live_bytes(c: &Connection) -> rusqlite::Result<u64> {
    let sum = |what: &str, table: &str| {
        let sql = format!(
            "SELECT coalesce(sum({what}), 0) FROM job INDEXED BY job_live JOIN {table} USING (number) WHERE finished_at IS NULL"
        );
        c.query_row(&sql, [], |row| row.get::<_, i64>(0)).map(i64::unsigned_abs)
    };
    Ok(sum("length(request.body)", "request")? + sum("file.bytes", "file")?)
}

/// What was decided at the first start; `None`: nothing yet, or it was set.
pub(super) fn remembered(c: &Connection) -> rusqlite::Result<Option<u64>> {
    c.query_row("SELECT CAST(value AS INTEGER) FROM meta WHERE key = 'quota_bytes'", [], |row| row.get::<_, i64>(0))
        .optional()
        .map(|known| known.map(i64::unsigned_abs))
}

/// Pages of the database in use, and free ones, in bytes.
pub(super) fn pages(c: &Connection) -> Result<(u64, u64), StoreError> {
    let pragma =
        |name: &str| c.query_row(&format!("PRAGMA {name}"), [], |row| row.get::<_, i64>(0)).map(i64::unsigned_abs);
    let (all, free, size) = (pragma("page_count")?, pragma("freelist_count")?, pragma("page_size")?);
    Ok((all.saturating_sub(free) * size, free * size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_used_is_what_was_measured_and_what_came_since() {
        let quota = Quota::new(1_000, 400, Arc::new(AtomicU64::new(100)));
        assert_eq!((quota.used(), quota.is_over(), quota.too_much()), (500, false, 0));
        quota.wrote(550);
        assert_eq!((quota.used(), quota.is_over(), quota.too_much()), (1_050, true, 150));
        assert!(quota.check().is_none(), "room is being made");
        quota.wrote(60);
        assert!(matches!(quota.check(), Some(StoreError::OverQuota { used: 1_110, quota: 1_000, live: 0 })));
        quota.measured(850);
        assert!(quota.check().is_none());
        assert!(quota.set_used_up(true) && !quota.set_used_up(true));
        assert!(quota.check().is_some());
    }
}
