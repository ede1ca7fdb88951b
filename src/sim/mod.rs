//! Replays traces: the scheduler's own state machine on simulated workers, and simpler policies beside it.
//!
//! `trace` reads a file; `world` is the machine and what becomes of the jobs; `engine` moves time on and lets a policy act;
//! `roundhouse` and `baseline` are policies; `record` is what is left behind, `measure` says how good that is, `picture`
//! shows it.

pub mod baseline;
pub mod engine;
pub mod measure;
mod noise;
pub mod picture;
pub mod record;
pub mod roundhouse;
pub mod trace;
pub mod world;

use baseline::{Baseline, Rule};
pub use engine::SimError;
pub use measure::{Measures, Told};
use record::Record;
use roundhouse::Roundhouse;
pub use trace::Trace;

use crate::policy::Knobs;

/// A policy by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyName {
    /// The server's own.
    Roundhouse,
    /// See [`Rule`].
    Baseline(Rule),
}

impl PolicyName {
    /// All of them, the server's own first.
    pub const ALL: [PolicyName; 4] = [
        Self::Roundhouse,
        Self::Baseline(Rule::Fifo),
        Self::Baseline(Rule::Exhaustive),
        Self::Baseline(Rule::LlamaSwap),
    ];

    /// As in `reference.csv`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Roundhouse => "roundhouse",
            Self::Baseline(Rule::Fifo) => "fifo",
            Self::Baseline(Rule::Exhaustive) => "exhaustive",
            Self::Baseline(Rule::LlamaSwap) => "llama-swap",
        }
    }

    /// The policy of that name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|policy| policy.as_str() == name)
    }
}

/// As [`simulate`] by the server's own policy, which tells some of the jobs when they should start.
pub fn simulate_told(trace: &Trace, knobs: &Knobs) -> Result<Record, SimError> {
    engine::run(trace, &mut Roundhouse::new(trace, knobs.clone()).telling(trace))
}

/// Plays a trace through a policy. The same trace always gives the same record. Fails if the policy makes a mistake that no
/// machine could carry out.
pub fn simulate(trace: &Trace, policy: PolicyName, knobs: &Knobs) -> Result<Record, SimError> {
    match policy {
        PolicyName::Roundhouse => engine::run(trace, &mut Roundhouse::new(trace, knobs.clone())),
        PolicyName::Baseline(rule) => engine::run(trace, &mut Baseline::new(trace, rule)),
    }
}

#[cfg(test)]
mod tests;
