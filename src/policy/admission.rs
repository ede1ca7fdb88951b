//! Whom to let into the queue.

use crate::policy::Knobs;

/// Why a submission is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full {
    /// Jobs queued now, under that limit.
    pub queued: usize,
    /// Jobs that were to come in.
    pub more: usize,
    /// The limit.
    pub limit: usize,
    /// Its key in `scheduler:` of models.yaml.
    pub key: &'static str,
}

impl Full {
    /// Whether they would not fit into an empty queue either.
    pub fn is_for_ever(&self) -> bool {
        self.more > self.limit
    }
}

/// Whether `more` jobs of one tenant fit beside those queued. The limit in the error is one that they can never keep, if
/// there is one, and the lower one if there are two.
pub fn admit(queued: usize, queued_of_tenant: usize, more: usize, knobs: &Knobs) -> Result<(), Full> {
    let all = Full { queued, more, limit: knobs.queued_max, key: "queued_max" };
    let own =
        Full { queued: queued_of_tenant, limit: knobs.queued_per_tenant_max, key: "queued_per_tenant_max", ..all };
    let never = [all, own].into_iter().filter(Full::is_for_ever).min_by_key(|full| full.limit);
    let over = || [all, own].into_iter().find(|full| full.queued + more > full.limit);
    never.or_else(over).map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_named() {
        let knobs = Knobs { queued_max: 10, queued_per_tenant_max: 4, ..Knobs::default() };
        assert_eq!(admit(0, 0, 4, &knobs), Ok(()));
        assert!(admit(5, 0, 5, &knobs).is_err());
        assert_eq!(admit(9, 0, 2, &knobs), Err(Full { queued: 9, more: 2, limit: 10, key: "queued_max" }));
        assert_eq!(admit(5, 3, 2, &knobs), Err(Full { queued: 3, more: 2, limit: 4, key: "queued_per_tenant_max" }));
    }

    #[test]
    fn what_can_never_fit_is_told_apart_and_by_the_lower_limit() {
        let knobs = Knobs { queued_max: 10, queued_per_tenant_max: 4, ..Knobs::default() };
        let refused = |more| admit(9, 0, more, &knobs).expect_err("it does not fit");
        assert_eq!((refused(4).key, refused(4).is_for_ever()), ("queued_max", false));
        // Over both limits now, and over its tenant's for ever.
        assert_eq!((refused(5).key, refused(5).is_for_ever()), ("queued_per_tenant_max", true));
        assert_eq!((refused(11).limit, refused(11).is_for_ever()), (4, true));
    }
}
