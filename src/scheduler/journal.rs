//! What was decided, and what stood in the way, in words: the records that `GET /v1/queue/decisions` shows, that the log has
//! a line of each, and that say to a waiting job why it waits. Pure.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use crate::domain::Millis;
use crate::policy::plan::Decision;

/// Records kept.
const KEPT_MAX: usize = 10_000;
/// A reason that still holds is said again after this long, with the figures of then.
const AGAIN_AFTER_MS: i64 = 30_000;

/// Whom a reason to wait is about.
type Pair = (Option<String>, Option<String>);

/// Which sentence it is: sentences of one code differ in how many figures they have.
type Sentence = (&'static str, usize);

/// Kept decisions, newest first, by ids that count from 1.
#[derive(Debug, Default)]
pub(super) struct Journal {
    kept: VecDeque<Arc<Decision>>,
    total: u64,
    /// What was last said about each pair of models, and when.
    said: HashMap<Pair, (Sentence, Millis)>,
    /// By model: the latest one that says why its jobs wait, or wait no longer.
    about: HashMap<String, Arc<Decision>>,
}

/// A part of what is kept.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DecisionPage {
    /// By id, newest first.
    pub decisions: Vec<(u64, Arc<Decision>)>,
    /// There are older ones.
    pub has_more: bool,
}

/// Which of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DecisionFilter {
    /// Older than this one.
    pub after: Option<u64>,
    /// This model is concerned.
    pub model: Option<String>,
    /// Most of them.
    pub limit: usize,
}

impl Journal {
    /// Keeps a decision; `None`: it is none, or was said already. What was done is always kept, a reason to wait if it is
    /// another one than before, or has held for a while.
    pub(super) fn keep(&mut self, decision: Decision) -> Option<Arc<Decision>> {
        if decision.is_status() {
            return None;
        }
        if decision.is_done() {
            // Whatever is said of them next is about another situation.
            let is_of = |name: &Option<String>| name.is_some() && *name == decision.model;
            self.said.retain(|(model, other), _| !is_of(model) && !is_of(other));
        } else {
            let who = (decision.model.clone(), decision.other.clone());
            let before = self.said.get(&who);
            let sentence = (decision.code, decision.numbers.len());
            let stands = |(said, at): &(Sentence, Millis)| *said == sentence && decision.at < at + AGAIN_AFTER_MS;
            if before.is_some_and(stands) {
                return None;
            }
            if self.said.len() >= KEPT_MAX {
                self.said.clear();
            }
            self.said.insert(who, (sentence, decision.at));
        }
        let decision = Arc::new(decision);
        for model in decision.explains() {
            self.about.insert(model.to_owned(), decision.clone());
        }
        self.kept.push_front(decision.clone());
        self.kept.truncate(KEPT_MAX);
        self.total += 1;
        Some(decision)
    }

    /// Newest first.
    pub(super) fn latest(&self) -> impl Iterator<Item = (u64, &Arc<Decision>)> {
        (0..).zip(&self.kept).map(|(back, decision)| (self.total - back, decision))
    }

    /// The latest one that says why jobs of this model wait, or wait no longer.
    pub(super) fn about(&self, model: &str) -> Option<&Arc<Decision>> {
        self.about.get(model)
    }

    /// What is kept, as far as it is asked for.
    pub(super) fn page(&self, filter: &DecisionFilter) -> DecisionPage {
        let concerns = |decision: &Decision| {
            filter.model.is_none() || decision.model == filter.model || decision.other == filter.model
        };
        let newest = filter.after.map_or(0, |after| self.total.saturating_sub(after.saturating_sub(1)));
        let skipped = usize::try_from(newest).unwrap_or(usize::MAX);
        let mut found = self.latest().skip(skipped).filter(|(_, decision)| concerns(decision));
        let decisions = found.by_ref().take(filter.limit).map(|(id, decision)| (id, decision.clone())).collect();
        DecisionPage { decisions, has_more: found.next().is_some() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stay(at: Millis, code: &'static str, on: &str, for_whom: &str) -> Decision {
        Decision::new(at, "stay", code, format!("stay on {on} at {at}")).of(on).against(for_whom)
    }

    fn swap(at: Millis, from: &str, to: &str) -> Decision {
        Decision::new(at, "swap", "dry", format!("swap {from} -> {to} at {at}")).of(to).against(from)
    }

    fn texts(journal: &Journal) -> Vec<&str> {
        journal.latest().map(|(_, decision)| decision.reason.as_str()).collect()
    }

    #[test]
    fn a_reason_is_said_when_it_changes_and_again_after_a_while_and_after_a_swap() {
        let mut journal = Journal::default();
        let mut say = |decision: Decision| journal.keep(decision).is_some();
        assert!(say(stay(0, "not_due", "a", "b")));
        assert!(!say(stay(10, "not_due", "a", "b")), "nothing new");
        assert!(say(stay(10, "not_due", "a", "c")), "somebody else waits");
        assert!(say(stay(20, "hold", "a", "b")));
        assert!(!say(stay(20 + AGAIN_AFTER_MS - 1, "hold", "a", "b")));
        assert!(say(stay(20 + AGAIN_AFTER_MS, "hold", "a", "b")), "it still holds, with other figures");
        assert!(say(swap(40_000, "a", "b")) && say(swap(40_000, "a", "b")), "what is done is always kept");
        assert!(say(swap(40_001, "b", "a")));
        assert!(say(stay(40_002, "hold", "a", "b")), "it is another visit");
        assert!(!say(Decision::new(40_003, "idle", "dry", "idle: nothing is pending".into())), "no decision");
    }

    #[test]
    fn a_model_is_told_the_last_thing_that_concerns_its_waiting_jobs() {
        let mut journal = Journal::default();
        journal.keep(stay(0, "not_due", "a", "b"));
        let about = |journal: &Journal, model: &str| journal.about(model).map(|decision| decision.reason.clone());
        assert_eq!(about(&journal, "b").as_deref(), Some("stay on a at 0"));
        assert_eq!(about(&journal, "a"), None, "whoever is stayed on does not wait for that");
        journal.keep(swap(5, "a", "b"));
        assert_eq!([about(&journal, "a"), about(&journal, "b")], [(); 2].map(|()| Some("swap a -> b at 5".to_owned())));
    }

    #[test]
    fn pages_go_back_in_time_and_find_a_model() {
        let mut journal = Journal::default();
        (0..5).for_each(|at| drop(journal.keep(swap(at, if at % 2 == 0 { "a" } else { "b" }, "c"))));
        let ids = |page: &DecisionPage| page.decisions.iter().map(|(id, _)| *id).collect::<Vec<_>>();
        let page = |after: Option<u64>, model: Option<&str>, limit: usize| {
            let page = journal.page(&DecisionFilter { after, model: model.map(str::to_owned), limit });
            (ids(&page), page.has_more)
        };
        assert_eq!(page(None, None, 2), (vec![5, 4], true));
        assert_eq!(page(Some(4), None, 2), (vec![3, 2], true));
        assert_eq!(page(Some(2), None, 2), (vec![1], false));
        assert_eq!(page(Some(1), None, 2), (vec![], false));
        assert_eq!(page(Some(99), None, 1), (vec![5], true), "newer than all");
        assert_eq!(page(None, Some("b"), 9), (vec![4, 2], false));
        assert_eq!(page(None, Some("c"), 2), (vec![5, 4], true));
        assert_eq!(page(None, Some("d"), 2), (vec![], false));
    }

    #[test]
    fn the_last_ten_thousand_are_kept_with_their_ids() {
        let mut journal = Journal::default();
        (0..10_005).for_each(|at| drop(journal.keep(swap(at, "a", "b"))));
        assert_eq!(texts(&journal).len(), KEPT_MAX);
        assert_eq!((journal.latest().next().unwrap().0, journal.latest().last().unwrap().0), (10_005, 6));
        assert_eq!(journal.page(&DecisionFilter { after: Some(6), model: None, limit: 9 }), DecisionPage::default());
    }
}
