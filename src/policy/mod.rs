//! Decisions as pure functions: what to load, keep or swap (`plan`), which job goes next (`order`), whom to let in
//! (`admission`), what a failed attempt means (`retry`). `now` is an argument; nothing here logs, sleeps, reads a clock or
//! touches the database.
//!
//! A plan is made of: `view`, what it depends on; `due`, when a model's turn must come; `hold`, what a swap costs and when a
//! resident yields; `sets`, which GPUs can hold a model; `decision`, the reasons in words. Beside it stand `tier`, what stays
//! in host memory, `batching`, how many jobs a pass takes, and `learn`, averages of what things cost.

pub mod admission;
pub mod batching;
pub mod decision;
pub mod due;
pub mod forecast;
pub mod hold;
pub mod knobs;
pub mod learn;
pub mod order;
pub mod plan;
pub mod retry;
pub mod sets;
pub mod tier;
pub mod view;

pub use knobs::Knobs;
