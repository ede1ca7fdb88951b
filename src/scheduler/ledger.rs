//! Where the devices' time goes: work, swaps and idling, by model and hour. Added up in memory; whoever keeps it takes it out
//! every few seconds.
//!
//! A device works while a job runs on it, swaps while a model loads, wakes or stops on it, and idles else. Models that share a
//! device share its time: work before swaps, swaps before idling, equally among those who do the same.

use std::collections::BTreeMap;

use crate::domain::Millis;
use crate::store::{Spent, hour_of};

/// What a worker does with a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Doing {
    /// Nothing.
    Idle,
    /// It comes or goes.
    Swap,
    /// It runs jobs.
    Work,
}

/// All that was not taken out yet.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    /// Until when time was counted; `None`: it has not begun.
    at: Option<Millis>,
    /// By hour and place of the model; `None`: no model.
    sums: BTreeMap<(i64, Option<usize>), Spent>,
}

impl Ledger {
    /// Time since the last call, which is counted from now on as having been spent.
    pub(super) fn elapsed(&mut self, now: Millis) -> i64 {
        let before = self.at.replace(now).unwrap_or(now);
        (now - before).max(0)
    }

    /// One device spent `elapsed` ms; `there`: who is on it, and what for.
    pub(super) fn spend(&mut self, elapsed: i64, there: impl Iterator<Item = (usize, Doing)> + Clone) {
        let most = there.clone().map(|(_, doing)| doing).max();
        let count = there.clone().filter(|(_, doing)| Some(*doing) == most).count();
        let Some(most) = most else {
            self.sum(None).idle_ms += elapsed as f64;
            return;
        };
        for (model, _) in there.filter(|(_, doing)| *doing == most) {
            let sum = self.sum(Some(model));
            let part = match most {
                Doing::Idle => &mut sum.idle_ms,
                Doing::Swap => &mut sum.swap_ms,
                Doing::Work => &mut sum.work_ms,
            };
            *part += elapsed as f64 / count as f64;
        }
    }

    /// A swap to this model was made.
    pub(super) fn count_swap(&mut self, model: usize) {
        self.sum(Some(model)).swaps += 1;
    }

    /// Arrival order would have cost one.
    pub(super) fn count_swap_in_order(&mut self, model: usize) {
        self.sum(Some(model)).swaps_in_order += 1;
    }

    fn sum(&mut self, model: Option<usize>) -> &mut Spent {
        let hour = hour_of(self.at.unwrap_or(0));
        self.sums.entry((hour, model)).or_default()
    }

    /// Takes everything out; `name`: of a model.
    pub(super) fn take(&mut self, name: impl Fn(usize) -> String) -> Vec<Spent> {
        let sums = std::mem::take(&mut self.sums);
        sums.into_iter().map(|((hour, model), spent)| Spent { hour, model: model.map(&name), ..spent }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_time_is_somebodys_and_work_comes_first() {
        let mut ledger = Ledger::default();
        assert_eq!(ledger.elapsed(3_600_000), 0, "it begins");
        let mut pass = |now: Millis, there: &[(usize, Doing)]| {
            let elapsed = ledger.elapsed(now);
            ledger.spend(elapsed, there.iter().copied());
        };
        pass(3_601_000, &[]);
        pass(3_603_000, &[(0, Doing::Swap)]);
        pass(3_607_000, &[(0, Doing::Work), (1, Doing::Swap), (2, Doing::Work)]);
        pass(3_606_000, &[(0, Doing::Work)]);
        pass(3_614_000, &[(0, Doing::Idle)]);
        let spent = ledger.take(|model| format!("m{model}"));
        let of = |model: Option<&str>| spent.iter().find(|s| s.model.as_deref() == model).cloned().unwrap_or_default();
        assert_eq!(of(None).idle_ms, 1_000.0);
        assert_eq!(
            (of(Some("m0")).work_ms, of(Some("m0")).swap_ms, of(Some("m0")).idle_ms),
            (2_000.0, 2_000.0, 8_000.0)
        );
        assert_eq!((of(Some("m1")).swap_ms, of(Some("m2")).work_ms), (0.0, 2_000.0));
        assert!(spent.iter().all(|s| s.hour == 1) && ledger.take(|_| String::new()).is_empty());
    }
}
