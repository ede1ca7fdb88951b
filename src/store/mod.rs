//! The durable queue: all SQL of this program, behind domain verbs.
//!
//! One thread owns the only connection that writes (`writer`: group commit, `synchronous=FULL`); everybody else reads
//! through `query_only` connections (`read`). A verb's answer comes when its transaction is durable. Every guarded update
//! names the state it starts from and the attempt, and checks how many rows it changed.

pub mod artifacts;
mod open;
pub mod read;
mod verbs;
mod writer;

pub use open::{Opened, open};
pub use verbs::{Change, Claimed, End, Learned, QueuedJob, Store};
pub use writer::OnFatal;

/// Why a verb did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// No such job, or the tag does not match.
    #[error("no such job")]
    NotFound,
    /// The writer's queue is full: try again shortly.
    #[error("the write queue is full")]
    Full,
    /// The writer has stopped; the process is going down.
    #[error("the store has stopped")]
    Stopped,
    /// SQLite refused.
    #[error("database: {0}")]
    Database(String),
    /// The database's file could not be read or written; what is on disk is unknown until the next start.
    #[error("database file: {0}")]
    Io(String),
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

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(rusqlite::ErrorCode::SystemIoFailure) => Self::Io(error.to_string()),
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
mod tests;
