//! What the processes of parked workers keep of their GPUs (a context, their engine's buffers), and who of them has to go for it.
//!
//! A plan gives devices to models as if parked workers kept nothing, and of sets that cost the same takes one where that is
//! true: a copy in host memory is worth less than a model that can be loaded. When everybody else has left the set of a worker
//! that is to load, those parked ones are dropped beside which it does not fit. What each of them keeps is known once it has
//! been parked; one that would be in the way is not parked the next time. A model that takes whole devices takes what is free.

use super::*;
use crate::policy::tier::Obstruction;
use crate::policy::view::Residue;

impl State {
    /// What parked workers keep, as the policy sees it.
    pub(super) fn residues(&self) -> Vec<Residue> {
        let kept = self.workers.iter().filter_map(|worker| {
            let set = worker.lies_on.filter(|_| worker.keeps > 0 && worker.phase == Phase::Parked)?;
            Some(Residue { model: worker.model, set, bytes: worker.keeps })
        });
        kept.collect()
    }

    /// A worker that is being parked keeps so much of each of its GPUs.
    pub(super) fn on_keeps(&mut self, index: usize, place: Option<usize>, device_bytes: u64) {
        if let Some(place) = place.filter(|place| self.models[self.workers[*place].model].needs_gpus()) {
            self.workers[place].keeps = device_bytes;
            self.models[index].learned.keeps_bytes = Some(device_bytes);
        }
    }

    /// Whether a worker that is to load fits beside what parked ones keep; if not, it waits until those have left who are
    /// leaving, and parked ones go for which there is no room then either, the least worth first.
    pub(super) fn is_clear(&mut self, place: usize, now: Millis, effects: &mut Vec<Effect>) -> bool {
        let worker = &self.workers[place];
        if self.models[worker.model].room == Room::Alone {
            return self.is_clear_of_parked(place, now, effects);
        }
        let (set, name) = (worker.set, self.models[worker.model].name.clone());
        let Some(needs) = self.models[worker.model].bytes_on(&self.inventory) else { return true };
        for gpu in set.gpus() {
            let there = self.left_by_those_who_stay(gpu);
            while self.kept(gpu, place, false).saturating_add(needs) > there {
                let Some(other) = self.least_worth(gpu, place, now) else { break };
                let obstruction = Obstruction { gpu, kept: self.workers[other].keeps, needs, there };
                let (tier, size) = (self.tier_without(other, now), self.parked_size(&self.workers[other], now));
                let theirs = self.models[self.workers[other].model].name.clone();
                self.announce(tier.in_the_way(&theirs, &size, &obstruction, &name), effects);
                // One that was to load elsewhere does so when it is gone, as a new plan says.
                self.workers[other].lie_down();
                self.workers[other].phase = Phase::Dropping;
                self.plan_now = true;
                effects.push(self.order(other, Order::Stop));
            }
        }
        // Beside those who neither leave nor can go, it is loaded all the same.
        let fits = |gpu: u32| self.kept(gpu, place, true) + self.used(gpu) + needs <= self.size(gpu);
        set.gpus().all(|gpu| fits(gpu) || !self.is_being_left(gpu))
    }

    /// Memory of a GPU that is not taken by workers which stay on it, in bytes.
    fn left_by_those_who_stay(&self, gpu: u32) -> u64 {
        let stay = self.workers.iter().filter(|w| w.stays() && w.is_on_device() && w.set.has(gpu));
        let used: u64 = stay.map(|w| self.bytes(w, self.size(gpu))).sum();
        self.size(gpu).saturating_sub(used)
    }

    /// Whether somebody is leaving a GPU, or leaves host memory and keeps some of it.
    fn is_being_left(&self, gpu: u32) -> bool {
        let leaves = |w: &Worker| w.is_on_device() && !w.stays() && w.set.has(gpu);
        self.workers.iter().any(|w| leaves(w) || (w.phase == Phase::Dropping && w.keeps_of(gpu) > 0))
    }

    /// What parked workers, but the one at `without`, keep of a GPU, in bytes; with those that are being dropped if `leaving`.
    fn kept(&self, gpu: u32, without: usize, leaving: bool) -> u64 {
        let others = self.workers.iter().enumerate().filter(|(other, _)| *other != without);
        others.filter(|(_, w)| leaving || w.phase != Phase::Dropping).map(|(_, w)| w.keeps_of(gpu)).sum()
    }

    fn least_worth(&self, gpu: u32, without: usize, now: Millis) -> Option<usize> {
        let worth = |place: &usize| self.parked_size(&self.workers[*place], now).worth();
        let lies = |place: &usize| {
            let worker = &self.workers[*place];
            *place != without && worker.can_be_dropped() && worker.keeps_of(gpu) > 0
        };
        (0..self.workers.len()).filter(lies).min_by(|a, b| worth(a).total_cmp(&worth(b)))
    }

    /// What a worker that leaves its devices would keep there, if parked, of what one that waits for them needs; and the model
    /// of that one.
    pub(super) fn would_be_in_the_way(&self, place: usize) -> Option<(Obstruction, usize)> {
        let worker = &self.workers[place];
        let kept = self.models[worker.model].learned.keeps_bytes.unwrap_or(0);
        let waiting = self.workers.iter().filter(|w| matches!(w.phase, Phase::Waiting { .. }));
        waiting.filter(|_| kept > 0).find_map(|waits| {
            let model = &self.models[waits.model];
            // Beside one that loads alone nothing stays.
            let all = (model.room == Room::Alone).then(|| self.size(waits.set.first));
            let needs = all.or_else(|| model.bytes_on(&self.inventory))?;
            let obstruction = |gpu: u32| Obstruction { gpu, kept, needs, there: self.left_by_those_who_stay(gpu) };
            let both = worker.set.gpus().filter(|gpu| waits.set.has(*gpu)).map(obstruction);
            let tight = both.into_iter().find(|it| it.kept.saturating_add(needs) > it.there)?;
            Some((tight, waits.model))
        })
    }
}

#[cfg(test)]
#[path = "residue_tests.rs"]
mod tests;
