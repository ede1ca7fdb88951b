//! Whom to let into the queue.

use crate::policy::Knobs;

/// Why a submission is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full {
    /// Jobs queued now, under that limit.
    pub queued: usize,
    /// The limit.
    pub limit: usize,
    /// Its key in `scheduler:` of models.yaml.
    pub key: &'static str,
}

/// Whether `more` jobs of one tenant fit beside those queued.
pub fn admit(queued: usize, queued_of_tenant: usize, more: usize, knobs: &Knobs) -> Result<(), Full> {
    if queued + more > knobs.queued_max {
        return Err(Full { queued, limit: knobs.queued_max, key: "queued_max" });
    }
    if queued_of_tenant + more > knobs.queued_per_tenant_max {
        let limit = knobs.queued_per_tenant_max;
        return Err(Full { queued: queued_of_tenant, limit, key: "queued_per_tenant_max" });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_named() {
        let knobs = Knobs { queued_max: 10, queued_per_tenant_max: 4, ..Knobs::default() };
        assert_eq!(admit(0, 0, 4, &knobs), Ok(()));
        assert!(admit(5, 0, 5, &knobs).is_err());
        assert_eq!(admit(9, 0, 2, &knobs), Err(Full { queued: 9, limit: 10, key: "queued_max" }));
        assert_eq!(admit(5, 3, 2, &knobs), Err(Full { queued: 3, limit: 4, key: "queued_per_tenant_max" }));
    }
}
