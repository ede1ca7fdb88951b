//! Whom to let into the queue, and which waiting jobs go next on a ready worker.

use crate::domain::Class;
use crate::policy::Knobs;

/// Why a submission is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full {
    /// Jobs queued now, under that limit.
    pub queued: usize,
    /// The limit.
    pub limit: usize,
}

/// Whether `more` jobs of one tenant fit beside those queued.
pub fn admit(queued: usize, queued_of_tenant: usize, more: usize, knobs: &Knobs) -> Result<(), Full> {
    if queued + more > knobs.queued_max {
        return Err(Full { queued, limit: knobs.queued_max });
    }
    if queued_of_tenant + more > knobs.queued_per_tenant_max {
        return Err(Full { queued: queued_of_tenant, limit: knobs.queued_per_tenant_max });
    }
    Ok(())
}

/// Every this many-th admission is batch while batch waits, so that callers cannot starve it.
pub const BATCH_EVERY: u64 = 8;

/// Which class the next free slot goes to. `admitted` counts admissions of this model so far.
pub fn next_class(waiting_interactive: bool, waiting_batch: bool, admitted: u64) -> Option<Class> {
    match (waiting_interactive, waiting_batch) {
        (false, false) => None,
        (true, false) => Some(Class::Interactive),
        (false, true) => Some(Class::Batch),
        (true, true) if admitted % BATCH_EVERY == BATCH_EVERY - 1 => Some(Class::Batch),
        (true, true) => Some(Class::Interactive),
    }
}

/// How many of a worker's slots batch jobs may fill: one in eight is kept for callers where there are eight or more.
pub fn batch_slots(limit: u32) -> u32 {
    if limit >= 8 { limit - limit / 8 } else { limit }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_named() {
        let knobs = Knobs { queued_max: 10, queued_per_tenant_max: 4, ..Knobs::default() };
        assert_eq!(admit(0, 0, 4, &knobs), Ok(()));
        assert!(admit(5, 0, 5, &knobs).is_err());
        assert_eq!(admit(9, 0, 2, &knobs), Err(Full { queued: 9, limit: 10 }));
        assert_eq!(admit(5, 3, 2, &knobs), Err(Full { queued: 3, limit: 4 }));
    }

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
}
