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

    /// One device spent `elapsed` ms; `there`: who is on it, and what for. Returns how much of it each of those had who
    /// worked, ms.
    pub(super) fn spend(&mut self, elapsed: i64, there: impl Iterator<Item = (usize, Doing)> + Clone) -> f64 {
        let most = there.clone().map(|(_, doing)| doing).max();
        let count = there.clone().filter(|(_, doing)| Some(*doing) == most).count();
        let Some(most) = most else {
            self.sum(None).idle_ms += elapsed as f64;
            return 0.0;
        };
        let each = elapsed as f64 / count as f64;
        for (model, _) in there.filter(|(_, doing)| *doing == most) {
            let sum = self.sum(Some(model));
            let part = match most {
                Doing::Idle => &mut sum.idle_ms,
                Doing::Swap => &mut sum.swap_ms,
                Doing::Work => &mut sum.work_ms,
            };
            *part += each;
        }
        if most == Doing::Work { each } else { 0.0 }
    }

    /// What was taken out could not be kept; `place`: of a model.
    pub(super) fn put_back(&mut self, spent: Vec<Spent>, place: impl Fn(&str) -> Option<usize>) {
        for one in spent {
            let sum = self.sums.entry((one.hour, one.model.as_deref().and_then(&place))).or_default();
            sum.work_ms += one.work_ms;
            sum.swap_ms += one.swap_ms;
            sum.idle_ms += one.idle_ms;
            sum.swaps += one.swaps;
            sum.swaps_in_order += one.swaps_in_order;
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

/// Which models a box would hold that served in arrival order, the last used first: what leaves when another one needs its
/// room is the one that was used longest ago.
#[derive(Debug, Default)]
pub(super) struct ArrivalOrder {
    there: Vec<usize>,
}

impl ArrivalOrder {
    /// A job of this model arrives; `fit`: whether such models have room together. Returns whether it costs a swap.
    pub(super) fn arrive(&mut self, model: usize, fit: impl Fn(&[usize]) -> bool) -> bool {
        let is_there = self.there.iter().position(|there| *there == model);
        if let Some(place) = is_there {
            self.there[..=place].rotate_right(1);
            return false;
        }
        self.there.insert(0, model);
        let count = self.there.len();
        while self.there.len() > 1 && !fit(&self.there) {
            self.there.pop();
        }
        self.there.len() < count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_arrival_order_who_fits_stays() {
        let cost = |room: usize, arrivals: &[usize]| {
            let mut order = ArrivalOrder::default();
            arrivals.iter().filter(|model| order.arrive(**model, |there| there.len() <= room)).count()
        };
        assert_eq!(cost(1, &[0, 1, 0, 1, 1, 0]), 4);
        assert_eq!(cost(2, &[0, 1, 0, 1, 1, 0]), 0, "side by side");
        assert_eq!(cost(2, &[0, 1, 0, 2, 0, 1]), 2, "the one used longest ago leaves");
    }

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
        // What could not be kept is taken out again the next time.
        ledger.put_back(spent.clone(), |name| name[1..].parse().ok());
        assert_eq!(ledger.take(|model| format!("m{model}")), spent);
    }
}
