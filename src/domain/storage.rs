//! How long things are kept, and how much room they may take.

use std::path::PathBuf;
use std::time::Duration;

/// Settings of the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StorageSettings {
    /// How long what a job holds (body, events, answer, files) is kept after its end.
    pub results_ttl: Duration,
    /// The same for sync calls, whose callers have had their answer.
    pub sync_ttl: Duration,
    /// The same for members of a batch.
    pub batch_ttl: Duration,
    /// How long after its end a job's row says what became of it.
    pub tombstone_ttl: Duration,
    /// Bytes that results and files may take; `None`: half of what is free at the first start.
    pub quota_bytes: Option<u64>,
    /// Bytes that must be free on the disk for new jobs.
    pub free_min_bytes: u64,
    /// Bytes set aside for the answers of running jobs when the disk is full.
    pub reserve_bytes: u64,
    /// Pages of the write-ahead log after which it is copied into the database.
    pub wal_pages: u32,
    /// The write-ahead log's file is cut back to so many bytes; four times as much is a reason to warn.
    pub wal_bytes_kept: u64,
    /// One connection that nobody else may have: for network file systems.
    pub exclusive: bool,
    /// Copies of the jobs are kept in this folder, on a disk that outlives the data dir's; `None`: nowhere.
    pub snapshot_dir: Option<PathBuf>,
    /// How often such a copy is made.
    pub snapshot_every: Duration,
    /// Whether commits wait for the disk. Only benchmarks and fault tests turn it off.
    pub fsync: bool,
}

const MIB: u64 = 1024 * 1024;
const DAY: Duration = Duration::from_secs(86_400);

impl Default for StorageSettings {
    fn default() -> Self {
        Self {
            results_ttl: 7 * DAY,
            sync_ttl: DAY,
            batch_ttl: 30 * DAY,
            tombstone_ttl: 30 * DAY,
            quota_bytes: None,
            free_min_bytes: 512 * MIB,
            reserve_bytes: 64 * MIB,
            wal_pages: 1_000,
            wal_bytes_kept: 64 * MIB,
            exclusive: false,
            snapshot_dir: None,
            snapshot_every: Duration::from_secs(60),
            fsync: true,
        }
    }
}

/// A size for a person, as `1.5 GiB`.
pub fn shown_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    #[expect(clippy::cast_precision_loss, reason = "one decimal is shown")]
    let mut size = bytes as f64;
    let mut unit = 0;
    while size >= 1024.0 && unit + 1 < UNITS.len() {
        size /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{size:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_for_people() {
        assert_eq!(shown_bytes(1_000), "1000 B");
        assert_eq!(shown_bytes(1_536), "1.5 KiB");
        assert_eq!(shown_bytes(64 * MIB), "64.0 MiB");
    }
}
