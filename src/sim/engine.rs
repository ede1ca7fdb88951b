//! Plays a trace: moves the world's time from one event to the next and lets the policy act on each.

use super::Trace;
use super::record::Record;
use super::world::{Breach, Happening, World};

/// A policy that acts this often without time moving on will never end.
const ACTS_AT_ONCE_MAX: usize = 10_000;
/// One that loads this often, and this often more for each job, neither.
const LOADS_MAX: usize = 1_000;
const LOADS_PER_JOB_MAX: usize = 20;

/// Decides what the machine does.
pub trait Policy {
    /// Takes in what happened and gives orders. Returns when it wants to act again if nothing happens before.
    fn act(&mut self, world: &mut World<'_>, happened: &[Happening]) -> Result<Option<f64>, Breach>;
}

/// Why a simulation did not come to its end: the policy made a mistake.
#[derive(Debug, thiserror::Error)]
pub enum SimError {
    /// It ordered what cannot be done.
    #[error(transparent)]
    Breach(#[from] Breach),
    /// Nothing will ever happen again, and jobs are left.
    #[error("at {at_s:.3} s: {jobs} jobs are left, and the policy waits for nothing")]
    Stuck {
        /// When.
        at_s: f64,
        /// How many.
        jobs: usize,
    },
    /// It acts for ever without time moving on.
    #[error("at {at_s:.3} s: the policy acts for ever without time moving on")]
    Restless {
        /// When.
        at_s: f64,
    },
    /// It loads and loads.
    #[error("at {at_s:.3} s: {loads} loads, and {jobs} jobs are left")]
    Thrashing {
        /// When.
        at_s: f64,
        /// How many.
        loads: usize,
        /// How many.
        jobs: usize,
    },
}

/// Plays the whole trace.
pub fn run(trace: &Trace, policy: &mut dyn Policy) -> Result<Record, SimError> {
    let mut world = World::new(trace);
    let mut arrived = 0;
    let mut wake: Option<f64> = None;
    let mut happened = Vec::new();
    let mut acts_at_once = 0;
    while world.open_jobs() > 0 {
        let arrival = trace.jobs.get(arrived).map(|job| job.arrival_s);
        let next = [arrival, world.next_due(), wake].into_iter().flatten().min_by(f64::total_cmp);
        let Some(at) = next.map(|at| at.max(world.now())) else {
            return Err(SimError::Stuck { at_s: world.now(), jobs: world.open_jobs() });
        };
        acts_at_once = if at > world.now() { 0 } else { acts_at_once + 1 };
        if acts_at_once > ACTS_AT_ONCE_MAX {
            return Err(SimError::Restless { at_s: at });
        }
        if world.loads() > LOADS_MAX + LOADS_PER_JOB_MAX * trace.jobs.len() {
            return Err(SimError::Thrashing { at_s: at, loads: world.loads(), jobs: world.open_jobs() });
        }
        happened.clear();
        world.advance(at, &mut happened);
        let first = arrived;
        while trace.jobs.get(arrived).is_some_and(|job| job.arrival_s <= at) {
            arrived += 1;
        }
        if arrived > first {
            happened.push(Happening::Arrived(first..arrived));
        }
        if wake.is_some_and(|wake| wake <= at) {
            happened.push(Happening::Wake);
        }
        wake = policy.act(&mut world, &happened)?;
        world.settle();
    }
    Ok(world.into_record())
}
