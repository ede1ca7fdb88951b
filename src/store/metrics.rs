//! What the store counts about itself; for `/metrics`.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::clock::Clock;
use crate::domain::Millis;

/// Commits that the percentiles are taken over.
const RECENT_MAX: usize = 4_096;

/// A look at the store's own figures.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StoreMetrics {
    /// Transactions since start.
    pub commits: u64,
    /// Operations in them.
    pub operations: u64,
    /// Time from taking a group to its commit, seconds: the sum, and the middle and 99th percentile of the latest 4 096.
    pub commit_seconds: f64,
    /// See `commit_seconds`.
    pub commit_p50_s: f64,
    /// See `commit_seconds`.
    pub commit_p99_s: f64,
    /// Operations of the largest of the latest 4 096 groups.
    pub group_max: u64,
    /// Size of the write-ahead log's file.
    pub wal_bytes: u64,
    /// Size of the database's file.
    pub database_bytes: u64,
    /// Writes under an old attempt, dropped.
    pub stale_writes: u64,
    /// Jobs given back to the queue since their worker was lost or the server had ended.
    pub rescues: u64,
    /// How long the start took to find out what there is to do.
    pub recovery_seconds: f64,
    /// How long the oldest job that should have been deleted has been waiting for it.
    pub purge_lag_s: f64,
    /// Jobs whose content was deleted, and rows deleted, since start.
    pub emptied: u64,
    /// See `emptied`.
    pub deleted: u64,
    /// Files that rows name and that the latest look at all of them did not find, or that were lost or damaged when somebody
    /// wanted to read them.
    pub missing_files: u64,
    /// What jobs take (pages in use and files), and the limit.
    pub stored_bytes: u64,
    /// See `stored_bytes`.
    pub quota_bytes: u64,
}

/// Counters that the store's parts share. Cheap to clone.
#[derive(Clone)]
pub(super) struct Metrics {
    inner: Arc<Inner>,
}

struct Inner {
    clock: Arc<dyn Clock>,
    commits: AtomicU64,
    operations: AtomicU64,
    commit_us: AtomicU64,
    stale: AtomicU64,
    rescues: AtomicU64,
    recovery_us: AtomicU64,
    emptied: AtomicU64,
    deleted: AtomicU64,
    /// Size of the write-ahead log's file while it is far beyond its limit, else 0.
    long_wal: AtomicU64,
    /// (µs, operations)
    recent: Mutex<VecDeque<(u32, u32)>>,
}

impl Metrics {
    pub(super) fn new(clock: Arc<dyn Clock>) -> Self {
        Self {
            inner: Arc::new(Inner {
                clock,
                commits: AtomicU64::new(0),
                operations: AtomicU64::new(0),
                commit_us: AtomicU64::new(0),
                stale: AtomicU64::new(0),
                rescues: AtomicU64::new(0),
                recovery_us: AtomicU64::new(0),
                emptied: AtomicU64::new(0),
                deleted: AtomicU64::new(0),
                long_wal: AtomicU64::new(0),
                recent: Mutex::default(),
            }),
        }
    }

    pub(super) fn now(&self) -> Millis {
        self.inner.clock.now()
    }

    pub(super) fn committed(&self, operations: usize, took: Duration) {
        let inner = &self.inner;
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        inner.commits.fetch_add(1, Ordering::Relaxed);
        inner.operations.fetch_add(operations as u64, Ordering::Relaxed);
        inner.commit_us.fetch_add(us, Ordering::Relaxed);
        let mut recent = inner.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if recent.len() == RECENT_MAX {
            recent.pop_front();
        }
        recent.push_back((u32::try_from(us).unwrap_or(u32::MAX), u32::try_from(operations).unwrap_or(u32::MAX)));
    }

    pub(super) fn stale(&self) {
        self.inner.stale.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn rescued(&self, jobs: u64) {
        self.inner.rescues.fetch_add(jobs, Ordering::Relaxed);
    }

    pub(super) fn recovered_in(&self, took: Duration) {
        self.inner.recovery_us.fetch_add(u64::try_from(took.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    pub(super) fn purged(&self, emptied: u64, deleted: u64) {
        self.inner.emptied.fetch_add(emptied, Ordering::Relaxed);
        self.inner.deleted.fetch_add(deleted, Ordering::Relaxed);
    }

    pub(super) fn set_long_wal(&self, bytes: u64) {
        self.inner.long_wal.store(bytes, Ordering::Relaxed);
    }

    pub(super) fn long_wal(&self) -> u64 {
        self.inner.long_wal.load(Ordering::Relaxed)
    }

    /// Operations since start.
    pub(super) fn operations(&self) -> u64 {
        self.inner.operations.load(Ordering::Relaxed)
    }

    #[expect(clippy::cast_precision_loss, reason = "counters and times are far below 2^52")]
    pub(super) fn look(&self) -> StoreMetrics {
        let inner = &self.inner;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let seconds = |us: u64| us as f64 / 1e6;
        let recent = inner.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let mut times: Vec<u32> = recent.iter().map(|(us, _)| *us).collect();
        let group_max = recent.iter().map(|(_, operations)| *operations).max().unwrap_or(0);
        drop(recent);
        times.sort_unstable();
        let percentile = |of: usize| times.get(times.len() * of / 100).map_or(0.0, |us| seconds(u64::from(*us)));
        StoreMetrics {
            commits: read(&inner.commits),
            operations: read(&inner.operations),
            commit_seconds: seconds(read(&inner.commit_us)),
            commit_p50_s: percentile(50),
            commit_p99_s: percentile(99),
            group_max: u64::from(group_max),
            stale_writes: read(&inner.stale),
            rescues: read(&inner.rescues),
            recovery_seconds: seconds(read(&inner.recovery_us)),
            emptied: read(&inner.emptied),
            deleted: read(&inner.deleted),
            ..StoreMetrics::default()
        }
    }
}
