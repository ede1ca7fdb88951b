//! Worker processes: starting, watching and stopping them (`supervisor`, `process`), fetching weights (`fetching`), speaking HTTP to them (`client`),
//! and asking the driver about GPUs (`gpu`; `fake_gpus` plays it).

pub mod assemble;
mod cache;
pub mod checkpoint;
pub mod client;
pub mod fake_gpus;
pub mod fetching;
pub mod gpu;
pub mod guard;
mod health;
mod held;
pub mod host;
mod leftovers;
mod logs;
mod plain;
mod ports;
pub mod process;
mod procfs;
mod secrets;
pub mod spare;
mod sse;
pub mod supervisor;
mod verdict;
mod wire;
