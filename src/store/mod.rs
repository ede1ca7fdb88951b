//! The durable queue: all SQL of this program, behind domain verbs.
//!
//! One thread owns the only connection that writes (`writer`: group commit, `synchronous=FULL`); everybody else reads
//! through `query_only` connections. A verb returns when its transaction is durable.

pub mod artifacts;
pub mod read;
pub mod writer;

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
    /// Files.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: String,
        /// Why.
        source: std::io::Error,
    },
}
