//! Worker processes: starting, watching and stopping them (`supervisor`, `process`), speaking HTTP to them (`client`),
//! and asking the driver about GPUs (`gpu`; `fake_gpus` plays it).

pub mod assemble;
pub mod checkpoint;
pub mod client;
pub mod fake_gpus;
pub mod gpu;
pub mod guard;
mod health;
pub mod host;
mod leftovers;
mod logs;
mod ports;
pub mod process;
mod procfs;
pub mod spare;
mod sse;
pub mod supervisor;
mod verdict;
mod wire;
