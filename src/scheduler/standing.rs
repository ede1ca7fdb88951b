//! Where a waiting job stands, and how a model does, for those who ask.

use super::*;

/// Farthest position that is counted, from the nearer end of a queue.
const RANK_MAX: usize = 1_000;

/// Where a model's workers are, as the scheduler has ordered and heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::scheduler) enum Holding {
    /// None holds or awaits a device.
    Nothing,
    /// One waits for its set, which others are to leave.
    Awaiting,
    /// One loads.
    Loading,
    /// One takes jobs.
    Serving,
    /// Its running jobs end.
    Draining,
    /// It stops.
    Stopping,
}

impl State {
    /// Where its workers are.
    pub(in crate::scheduler) fn holding(&self, index: usize) -> Holding {
        let of = |is: fn(&Phase) -> bool| self.workers.iter().any(|w| w.model == index && is(&w.phase));
        if self.serves(index) {
            Holding::Serving
        } else if of(|phase| matches!(phase, Phase::Loading { .. })) {
            Holding::Loading
        } else if of(|phase| matches!(phase, Phase::Waiting { .. })) {
            Holding::Awaiting
        } else if of(|phase| matches!(phase, Phase::Draining { .. })) {
            Holding::Draining
        } else if of(|phase| matches!(phase, Phase::Stopping { .. })) {
            Holding::Stopping
        } else {
            Holding::Nothing
        }
    }

    /// Whether a worker has been ordered to load and is not ready yet.
    pub(in crate::scheduler) fn is_loading(&self, index: usize, replica: u32) -> bool {
        let worker = self.find(index, replica).map(|place| &self.workers[place].phase);
        matches!(worker, Some(Phase::Loading { .. }))
    }

    /// Whether a worker is on its way back from host memory.
    pub(in crate::scheduler) fn is_waking(&self, index: usize, replica: u32) -> bool {
        let worker = self.find(index, replica).map(|place| &self.workers[place].phase);
        matches!(worker, Some(Phase::Loading { was_parked: true, .. }))
    }

    /// Expected load of a model, from where it is now.
    pub(in crate::scheduler) fn load_ms(&self, index: usize) -> f64 {
        let lies =
            |bare: bool| self.workers.iter().any(|w| w.model == index && w.phase == Phase::Parked && w.is_bare == bare);
        let source = match (lies(false), lies(true)) {
            (true, _) => Source::Copy,
            (false, true) => Source::Bare,
            _ => Source::Disk,
        };
        self.models[index].load_ms(source)
    }

    /// When a model's turn must come; `None` without waiting jobs.
    pub(in crate::scheduler) fn due(&self, index: usize) -> Option<Millis> {
        self.models[index].view(&self.inventory, Vec::new(), 0).due(&self.knobs).map(|due| due.at)
    }

    /// Where a waiting job stands: (jobs the plan starts first, jobs of its own model before it, swaps before its start).
    /// `None`: not waiting, or too far back to count.
    pub fn standing(&self, model: &str, priority: u8, number: i64) -> Option<(usize, usize, usize)> {
        let index = self.index_of(model)?;
        let rank = self.models[index].queue.rank(priority, number, RANK_MAX)?;
        if self.models[index].held.paused || self.serves(index) {
            return Some((rank, rank, 0));
        }
        let due = |index: usize| self.due(index).unwrap_or(i64::MAX);
        let mine = (due(index), index);
        // Of those that hold devices, the one that is dry first makes room.
        let backlog = |index: usize| self.models[index].queue.len() as f64 * self.models[index].each_ms();
        let holders = self.workers.iter().filter(|w| w.is_on_device() && w.model != index).map(|w| w.model);
        let first = holders.clone().min_by(|a, b| backlog(*a).total_cmp(&backlog(*b)));
        let ahead: Vec<usize> = (0..self.models.len())
            .filter(|i| *i != index && self.models[*i].blocked().is_none() && self.models[*i].queue.len() > 0)
            .filter(|i| Some(*i) == first || !holders.clone().any(|holder| holder == *i))
            .filter(|i| Some(*i) == first || (due(*i), *i) < mine)
            .collect();
        let loading_mine = matches!(self.holding(index), Holding::Loading | Holding::Awaiting);
        let before: usize = ahead.iter().map(|i| self.models[*i].queue.len()).sum();
        let swaps = ahead.iter().filter(|i| Some(**i) != first).count() + usize::from(!loading_mine);
        Some((before + rank, rank, swaps))
    }
}
