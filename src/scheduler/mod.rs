//! Which job runs where and when. `state` is a pure state machine (events in, effects out) over `model` and `inventory`,
//! what is known of models, devices and workers, and `queue` with its `line`s, the jobs of one model; `run` is the loop that
//! owns it and carries out the effects, `dispatch` one task per running job, `hub` what watchers of a job see, `watch` the task that looks at the driver's GPUs, `journal` what was decided and why, `handle` how
//! the rest of the program asks.

mod dispatch;
pub mod handle;
pub mod hub;
mod inventory;
mod journal;
mod ledger;
mod line;
mod model;
mod queue;
pub mod run;
pub mod state;
mod watch;

pub use queue::Run;
