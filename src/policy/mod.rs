//! Decisions as pure functions: what to load, keep or swap (`plan`), whom to let in (`admission`), what a failed attempt
//! means (`retry`). `now` is an argument; nothing here logs, sleeps, reads a clock or touches the database.

pub mod admission;
pub mod knobs;
pub mod plan;
pub mod retry;

pub use knobs::Knobs;
