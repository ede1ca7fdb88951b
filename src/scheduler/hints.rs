//! What no policy can mend, said in words: two models that take turns with one job each, and more work than the box can do.

use super::*;
use crate::policy::decision;

/// Turns of one job after which it is said what would help.
const TURNS_MIN: u32 = 3;
/// More work than the box can do is said when it has lasted so long.
const OVERLOADED_AFTER_MS: i64 = 600_000;
/// It is over when so much of the box's time is asked for.
const OVERLOAD_ENDS: f64 = 0.9;

/// Swaps between two models, each for a single job.
#[derive(Debug, Default)]
pub(super) struct Turns {
    last: Option<(usize, usize)>,
    count: u32,
    /// By model, jobs admitted before its visit.
    before: HashMap<usize, u64>,
}

impl Turns {
    /// A swap; `from` and `to` have admitted so many jobs until now. How many such turns there were in a row.
    fn count(&mut self, from: (usize, u64), to: (usize, u64)) -> u32 {
        let served = self.before.get(&from.0).map(|before| from.1 - before);
        let goes_back = self.last == Some((to.0, from.0)) && served == Some(1);
        self.count = if goes_back { self.count + 1 } else { 0 };
        self.last = Some((from.0, to.0));
        self.before.insert(to.0, to.1);
        self.count
    }
}

/// Whether more is asked for than the box can do.
#[derive(Debug, Default)]
pub(super) struct Overload {
    since: Option<Millis>,
    is_said: bool,
}

impl Overload {
    /// True: it is to be said now.
    fn count(&mut self, factor: f64, now: Millis) -> bool {
        if factor < OVERLOAD_ENDS {
            *self = Self::default();
        } else if factor > 1.0 {
            let since = *self.since.get_or_insert(now);
            if now - since >= OVERLOADED_AFTER_MS {
                return !std::mem::replace(&mut self.is_said, true);
            }
        }
        false
    }
}

impl State {
    /// What is asked for of what the box can do: 1 keeps all of it busy.
    fn asked_of_capacity(&self, now: Millis) -> f64 {
        let asked: f64 = self.models.iter().map(|model| model.asked(now)).sum();
        asked / f64::from(self.inventory.gpu_count().max(1))
    }

    /// The same, while it has been too much for long.
    pub fn overload(&self, now: Millis) -> Option<f64> {
        self.overloaded.is_said.then(|| self.asked_of_capacity(now))
    }

    pub(super) fn note_overload(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        let factor = self.asked_of_capacity(now);
        if self.overloaded.count(factor, now) {
            let reason = format!(
                "overloaded: {}x: for {} more work has come than this box can do; waits grow until less comes or there are \
                 more GPUs",
                decision::short(factor * 1e3),
                decision::seconds(OVERLOADED_AFTER_MS as f64)
            );
            let said = Decision::new(now, "wait", "overloaded", reason).with(&[("asked_of_capacity", factor)]);
            effects.extend(self.journal.keep(said).map(Effect::Announce));
        }
    }

    /// A swap, with what would help if two callers wait for each other's model in turn.
    pub(super) fn with_hint(&mut self, swap: Decision) -> Decision {
        let index = |name: &Option<String>| name.as_ref().and_then(|name| self.index_of(name));
        let (Some(to), Some(from)) = (index(&swap.model), index(&swap.other)) else { return swap };
        let admitted = |index: usize| (index, self.models[index].queue.admitted());
        let are_parked = [from, to].iter().all(|index| self.parking(*index).is_some_and(|it| it.can == Some(true)));
        let (from, to) = (admitted(from), admitted(to));
        let turns = self.turns.count(from, to);
        if turns < TURNS_MIN {
            return swap;
        }
        let or_parking = if are_parked { "" } else { " or parking in host memory (`park`)" };
        let reason = format!(
            "{}; {turns} turns of one job each: only both on the GPUs at once (`memory`, more GPUs){or_parking} helps",
            swap.reason
        );
        Decision { reason, ..swap }.with(&[("turns", f64::from(turns))])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_of_one_job_are_counted_as_long_as_nothing_else_comes_between() {
        let mut turns = Turns::default();
        // a, b, a, b, ...: each has one job in each visit; what was before the first visit is not known.
        let got: Vec<u32> = (0..6_u64)
            .map(|n| {
                let jobs = n / 2 + 1;
                if n % 2 == 0 { turns.count((0, jobs), (1, n / 2)) } else { turns.count((1, jobs), (0, jobs)) }
            })
            .collect();
        assert_eq!(got, [0, 1, 2, 3, 4, 5]);
        assert_eq!(turns.count((0, 6), (1, 3)), 0, "a has done more than one");
        assert_eq!(turns.count((1, 4), (2, 0)), 0, "a third model");
    }

    #[test]
    fn too_much_work_is_said_once_for_each_time() {
        let mut overload = Overload::default();
        let minute = 60_000;
        assert!(!overload.count(2.4, 0) && !overload.count(2.4, 9 * minute));
        assert!(overload.count(2.4, 10 * minute));
        assert!(!overload.count(2.4, 30 * minute) && !overload.count(0.95, 31 * minute), "it was said");
        assert!(!overload.count(0.5, 32 * minute) && !overload.count(1.5, 33 * minute));
        assert!(!overload.count(1.5, 42 * minute));
        assert!(overload.count(1.5, 43 * minute), "the next time");
    }
}
