//! Which waiting job goes next on a ready worker: by class, then a near deadline, then the tenant that was served least,
//! then priority and arrival (`scheduler::queue` keeps those).

use std::collections::HashMap;
use std::sync::Arc;

use crate::domain::{Class, Millis};

/// Every this many-th admission is batch while batch waits, so that callers cannot starve it.
pub const BATCH_EVERY: u64 = 8;
/// A deadline this close (plus three times the work) goes before anything else of its class.
const NEAR_DEADLINE_MS: i64 = 60_000;

/// Which class the next free slot goes to. `turns` counts the admissions of this model so far, a run as one.
pub fn next_class(waiting_interactive: bool, waiting_batch: bool, turns: u64) -> Option<Class> {
    match (waiting_interactive, waiting_batch) {
        (false, false) => None,
        (true, false) => Some(Class::Interactive),
        (false, true) => Some(Class::Batch),
        (true, true) if turns % BATCH_EVERY == BATCH_EVERY - 1 => Some(Class::Batch),
        (true, true) => Some(Class::Interactive),
    }
}

/// How many of a worker's slots batch jobs may fill: one in eight is kept for callers where there are eight or more.
pub fn batch_slots(limit: u32) -> u32 {
    if limit >= 8 { limit - limit / 8 } else { limit }
}

/// Deadlines up to this time are near for jobs that take `service_ms`.
pub fn near_deadline(service_ms: f64, now: Millis) -> Millis {
    now.saturating_add(NEAR_DEADLINE_MS).saturating_add(super::view::round(3.0 * service_ms))
}

/// How much each tenant was served, in weighted GPU milliseconds, over all models (a virtual token counter).
///
/// The tenant with the lowest counter is next. A job is charged what its model's jobs usually cost when it is admitted, and
/// what it did cost when it has ended. A tenant that comes back after having nothing waiting or running is lifted to the
/// lowest counter among those that have: idling earns no claim on the future.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Served {
    counters: HashMap<Arc<str>, f64>,
    weights: HashMap<Arc<str>, f64>,
}

impl Served {
    /// As kept by an earlier run, with the weights of `models.yaml`; a tenant that is not named weighs 1.
    pub fn new(counters: HashMap<Arc<str>, f64>, weights: HashMap<Arc<str>, f64>) -> Self {
        Self { counters, weights }
    }

    /// Its counter.
    pub fn of(&self, tenant: &str) -> f64 {
        self.counters.get(tenant).copied().unwrap_or(0.0)
    }

    /// Adds GPU time, in ms; less than 0 to take back.
    pub fn charge(&mut self, tenant: &Arc<str>, gpu_ms: f64) {
        let weighted = self.weighted(tenant, gpu_ms);
        let counter = self.counters.entry(tenant.clone()).or_default();
        *counter = (*counter + weighted).max(0.0);
    }

    /// What GPU time counts for this tenant, in ms.
    pub fn weighted(&self, tenant: &str, gpu_ms: f64) -> f64 {
        gpu_ms / self.weights.get(tenant).copied().unwrap_or(1.0)
    }

    /// A tenant has something to do again; `others`: those that have.
    pub fn lift<'a>(&mut self, tenant: &Arc<str>, others: impl Iterator<Item = &'a Arc<str>>) {
        let least = others.filter(|other| *other != tenant).map(|other| self.of(other)).min_by(f64::total_cmp);
        if let Some(least) = least
            && self.of(tenant) < least
        {
            self.counters.insert(tenant.clone(), least);
        }
    }

    /// All counters, to be kept.
    pub fn counters(&self) -> impl Iterator<Item = (&Arc<str>, f64)> {
        self.counters.iter().map(|(tenant, counter)| (tenant, *counter))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_admission_in_eight_is_batch() {
        let batch = (0..80).filter(|n| next_class(true, true, *n) == Some(Class::Batch)).count();
        assert_eq!(batch, 10);
        assert_eq!(next_class(false, true, 0), Some(Class::Batch));
        assert_eq!(next_class(false, false, 7), None);
    }

    #[test]
    fn callers_keep_a_slot_in_eight() {
        assert_eq!((batch_slots(256), batch_slots(8), batch_slots(7), batch_slots(1)), (224, 7, 7, 1));
    }

    #[test]
    fn weights_divide_the_charge_and_idling_earns_nothing() {
        let names = ["a", "b", "c"].map(Arc::<str>::from);
        let mut served = Served::new(HashMap::new(), HashMap::from([(names[1].clone(), 4.0)]));
        names[..2].iter().for_each(|tenant| served.charge(tenant, 1_000.0));
        assert_eq!((served.of("a"), served.of("b")), (1_000.0, 250.0));
        served.lift(&names[2], names[..2].iter());
        assert_eq!(served.of("c"), 250.0, "the least of those that have work");
        served.lift(&names[0], names.iter());
        assert_eq!(served.of("a"), 1_000.0, "never down");
        served.charge(&names[2], -900.0);
        assert_eq!(served.of("c"), 0.0);
    }
}
