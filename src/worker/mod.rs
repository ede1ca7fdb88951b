//! Worker processes: starting, watching and stopping them (`supervisor`, `process`), speaking HTTP to them (`client`),
//! and asking the driver about GPUs (`gpu`).

pub mod assemble;
pub mod client;
pub mod gpu;
pub mod guard;
mod health;
mod leftovers;
mod logs;
mod ports;
pub mod process;
mod procfs;
mod sse;
pub mod supervisor;
mod verdict;
mod wire;
