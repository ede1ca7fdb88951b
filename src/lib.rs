//! Roundhouse: a durable, model-aware job scheduler for boxes with one GPU and more models than fit.
//!
//! Map: `domain` (what things are) <- `policy` (pure decisions) <- `config`; `store` (all SQL); `worker` (processes and HTTP
//! to them); `scheduler` (state machine and loop over store and workers); `http` (faces over scheduler and store);
//! `cli` and `app` (composition). Imports point in that direction only; `tests/architecture.rs` holds it.

pub mod app;
pub mod cli;
pub mod clock;
pub mod config;
pub mod domain;
pub mod http;
pub mod lifecycle;
pub mod policy;
pub mod scheduler;
pub mod sim;
pub mod store;
pub mod telemetry;
pub mod worker;
