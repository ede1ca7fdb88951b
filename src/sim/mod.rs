//! Replays traces: the scheduler's own state machine on simulated workers, and simpler policies beside it.

pub mod trace;

pub use trace::Trace;
