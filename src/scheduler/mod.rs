//! Which job runs where and when. `state` is a pure state machine (events in, effects out), `run` the loop that owns it
//! and carries out the effects, `dispatch` one task per running job, `hub` what watchers of a job see, `handle` how the
//! rest of the program asks.

pub mod handle;
pub mod hub;
