//! The durable queue: all SQL of this program, behind domain verbs.
//!
//! One thread owns the only connection that writes (`writer`: group commit, `synchronous=FULL`); everybody else reads
//! through `query_only` connections (`read`). A verb's answer comes when its transaction is durable. Every guarded update
//! names the state it starts from and the attempt, and checks how many rows it changed.
//!
//! - `verbs`: what can be done to jobs; `submit`: accepting them; `recovery`: what a start finds.
//! - `files`: bodies, answers and artifacts that are files.
//! - `presence`: whether the open files are still in their place.
//! - `placement`: where a database may lie; `backup`, `restore`, `snapshots`: copies of it; `examine`: a look from outside.
//! - `retention`: what is deleted when its time has come or room is needed; `quota`: how much may be kept; `collect`: files
//!   without rows, rows without files; `housekeeping`: the task that calls them.
//! - `lost`: files of jobs that are lost or damaged.
//! - `usage`: GPU time, and who had how much; `controls`: what was said by hand.
//! - `live`, `idempotency`: what is kept in memory beside the database; `space`, `metrics`: the disk, and figures.

pub mod backup;
mod collect;
mod controls;
pub mod examine;
pub mod files;
mod housekeeping;
pub mod idempotency;
mod learned;
mod live;
mod lost;
pub mod metrics;
#[cfg(test)]
pub(crate) mod model;
mod open;
pub mod placement;
mod presence;
mod quota;
pub mod read;
mod recovery;
pub mod restore;
mod retention;
pub mod snapshots;
mod space;
mod submit;
pub mod usage;
mod verbs;
mod writer;

pub use collect::FilesReport;
pub use files::Body;
pub use housekeeping::Trouble;
pub use idempotency::IdempotencyKey;
pub use learned::Learned;
pub use metrics::StoreMetrics;
pub use open::{Opened, data_dir_id_of, open};
pub use presence::Gone;
pub use recovery::QueuedJob;
pub use retention::Purged;
pub use submit::Inserted;
pub use usage::{Spent, hour_of};
pub use verbs::{Cancelled, Change, ClaimedJob, End, GiveBack, Store, Told, cancelled_by_user};
pub use writer::OnFatal;

use crate::domain::storage::shown_bytes;

/// Why a verb did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// No such job, or the tag does not match.
    #[error("no such job")]
    NotFound,
    /// What the job held is past its retention.
    #[error("the job's content is past its retention and was deleted")]
    Expired,
    /// The idempotency key came with another body before.
    #[error("the idempotency key was used with another body")]
    KeyReused,
    /// The writer's queue is full: try again shortly.
    #[error("the write queue is full")]
    Full,
    /// No room on the disk for new jobs; the text says where.
    #[error("{0}")]
    DiskFull(String),
    /// What is kept takes all the room it may. The text is for clients, too.
    #[error("{}", over_quota(*.used, *.quota, *.live))]
    OverQuota {
        /// Bytes that are kept.
        used: u64,
        /// The limit.
        quota: u64,
        /// Of the bytes that are kept, what jobs that have not ended take; `None`: they are too many to be weighed.
        live: Option<u64>,
    },
    /// The writer has stopped; the process is going down.
    #[error("the store has stopped")]
    Stopped,
    /// SQLite refused.
    #[error("database: {0}")]
    Database(String),
    /// The database's file could not be read or written; what is on disk is unknown until the next start.
    #[error("database file: {0}")]
    Io(String),
    /// The database's file is damaged.
    #[error(
        "the database is damaged: {0}; look at it with roundhouse doctor --deep, and restore a backup into a new data dir \
         (roundhouse restore BACKUP --data-dir DIR)"
    )]
    Corrupt(String),
    /// A file of the store is not in its place any more.
    #[error("{0}")]
    Gone(Gone),
    /// A job's file does not have the checksum it was stored with.
    #[error("{path}: does not have the checksum it was stored with; restore it from a backup")]
    Damaged {
        /// Which.
        path: String,
    },
    /// Files.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// Another server holds this data dir, or it cannot be used; the text says what to do.
    #[error("{0}")]
    Unusable(String),
}

impl StoreError {
    /// After a failed write or fsync the page cache may claim to be clean: only a restart through recovery knows.
    fn is_untrustworthy(&self) -> bool {
        matches!(self, Self::Io(_) | Self::Corrupt(_) | Self::Gone(_))
    }

    /// A file that will not come back by waiting.
    pub fn is_lost_file(&self) -> bool {
        match self {
            Self::Damaged { .. } => true,
            Self::File { source, .. } => source.kind() == std::io::ErrorKind::NotFound,
            _ => false,
        }
    }

    /// The same failure with the name of the database's file, where that is to blame.
    fn in_database(self, database: &std::path::Path) -> Self {
        match self {
            Self::Corrupt(text) => Self::Corrupt(format!("{}: {text}", database.display())),
            Self::Io(text) => Self::Io(format!("{}: {text}", database.display())),
            other => other,
        }
    }

    /// The same failure, told to one of many.
    fn for_everybody(&self) -> Self {
        match self {
            Self::DiskFull(text) => Self::DiskFull(text.clone()),
            Self::OverQuota { used, quota, live } => Self::OverQuota { used: *used, quota: *quota, live: *live },
            Self::Io(text) => Self::Io(text.clone()),
            Self::Corrupt(text) => Self::Corrupt(text.clone()),
            Self::Gone(gone) => Self::Gone(gone.clone()),
            Self::Database(text) => Self::Database(text.clone()),
            other => Self::Database(other.to_string()),
        }
    }
}

/// What takes the room decides what helps.
fn over_quota(used: u64, quota: u64, live: Option<u64>) -> String {
    let how_much = format!("the storage quota is used up: {} of {}", shown_bytes(used), shown_bytes(quota));
    let whose = match live {
        Some(live) if live < used / 2 => {
            return format!(
                "{how_much}; fetch results that are waiting (fetched ones make room), or raise storage.quota in models.yaml"
            );
        }
        Some(live) => format!("{how_much}, {} of it by jobs that wait or run", shown_bytes(live)),
        None => format!("{how_much}, and more than {} jobs wait or run", quota::WEIGHED_MAX),
    };
    format!(
        "{whose}; room comes when they have ended and their answers were fetched: come again later, cancel some, or raise \
         storage.quota in models.yaml"
    )
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        use rusqlite::ErrorCode::{DatabaseCorrupt, DiskFull, NotADatabase, SystemIoFailure};
        match error.sqlite_error_code() {
            Some(SystemIoFailure) => Self::Io(error.to_string()),
            Some(DatabaseCorrupt | NotADatabase) => Self::Corrupt(error.to_string()),
            Some(DiskFull) => Self::DiskFull("the disk is full".to_owned()),
            _ => Self::Database(error.to_string()),
        }
    }
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        Self::Database(error.to_string())
    }
}

#[cfg(test)]
mod backup_tests;
#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod retention_tests;
#[cfg(test)]
mod tests;
