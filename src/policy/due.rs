//! When a model's turn must come.
//!
//! `due(m)` = when its oldest job has waited `max_wait` of its class, but not before it was away for `again` (three times
//! `max_wait` for interactive, once for batch) since it last left, and never before it left; or the last moment that still
//! keeps a deadline; or the time when somebody asked for it by hand. A model is late when loading it now would be just in
//! time, or later.

use crate::domain::Millis;
use crate::policy::Knobs;
use crate::policy::view::{ModelView, millis, round};

/// Of the time that all waiting jobs take, this much is kept before the last deadline.
const BACKLOG_MARGIN: f64 = 1.2;

/// Why a model is due when it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// A caller will have waited.
    Caller,
    /// A batch job will have waited.
    Batch,
    /// A deadline.
    Deadline,
    /// Somebody asked for it by hand.
    Hand,
}

/// A model's turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Due {
    /// When it must come.
    pub at: Millis,
    /// For whom.
    pub why: Why,
}

impl ModelView {
    /// When its turn must come; `None` without waiting jobs, unless somebody asked for it.
    pub fn due(&self, knobs: &Knobs) -> Option<Due> {
        let interactive = millis(knobs.max_wait_interactive);
        let batch = millis(knobs.max_wait_batch);
        let by_class = |oldest: Option<Millis>, max_wait: i64, again: i64, why: Why| {
            let away = self.left_at.map_or(i64::MIN, |left| left.saturating_add(again));
            oldest.map(|oldest| Due { at: oldest.saturating_add(max_wait).max(away), why })
        };
        let due = [
            by_class(self.oldest_interactive, interactive, interactive.saturating_mul(3), Why::Caller),
            by_class(self.oldest_batch, batch, batch, Why::Batch),
            self.must_start().map(|at| Due { at, why: Why::Deadline }),
            self.wanted_at.map(|at| Due { at, why: Why::Hand }),
        ];
        let first = due.into_iter().flatten().min_by_key(|due| due.at)?;
        Some(Due { at: first.at.max(self.left_at.unwrap_or(Millis::MIN)), why: first.why })
    }

    /// The last moment at which it must be ready to keep its deadlines: twice the work of one job before the first, and
    /// all that waits before the last.
    pub fn must_start(&self) -> Option<Millis> {
        self.must_start_for().map(|(at, _)| at)
    }

    /// The same, with the deadline that it is for.
    pub fn must_start_for(&self) -> Option<(Millis, Millis)> {
        let work = round(2.0 * self.service_ms);
        let backlog = round(BACKLOG_MARGIN * self.pending() as f64 * self.each_ms);
        let first = self.first_deadline.map(|at| (at - work, at));
        let last = self.last_deadline.map(|at| (at - work - backlog, at));
        [first, last].into_iter().flatten().min()
    }

    /// Whether loading it now would be just in time for `due`, or later.
    pub fn is_late(&self, due: Due, now: Millis) -> bool {
        now >= due.at - self.load()
    }
}
