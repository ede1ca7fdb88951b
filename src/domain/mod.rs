//! What jobs, batches, models and workers are, and how they may change. Imports nothing of ours: no clock, no database,
//! no handles. Everything here can be rebuilt from what is stored.

pub mod batch;
pub mod control;
pub mod error;
pub mod gpu;
pub mod ids;
pub mod job;
pub mod model;
pub mod shape;
pub mod storage;
pub mod worker;

pub use batch::BatchId;
pub use control::{Control, Controls, Held, resume_command};
pub use error::{ErrorCode, JobError};
pub use gpu::GpuSet;
pub use ids::{IdError, JobId};
pub use job::{Class, Face, Job, JobKind, JobState, NewJob, StateReason, Token};
pub use model::{Launch, ModelKind, ModelSpec, ModelState, Park};
pub use storage::StorageSettings;

/// Milliseconds since the Unix epoch, the only wall-clock unit in this program.
pub type Millis = i64;
