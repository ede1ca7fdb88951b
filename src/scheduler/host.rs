//! Whose host memory is whose: what copies of weights take there now or are about to, who is parked, and who makes room.
//!
//! A worker makes its copy either when it is parked first (vLLM, which tells nothing of it), or when it is loaded (ours with
//! torch, which say `host_bytes` from then on), and keeps it until its process ends: torch gives page-locked memory back to
//! nobody, so one that has slept once counts as long as it lives, unless it says otherwise. What is asked of a leaving worker counts
//! only what the others have by then or were promised; a newcomer is promised the rest when its devices are free, which is
//! after all who leave for it have been parked or stopped, and is loaded when what is dropped for it is gone. So of two, one
//! always gets what there is.

use super::*;
use crate::policy::tier::{self, Parked, Tier};

/// The place of a worker whose copy may be dropped, or of the one that wants room, and its size.
type Sized = (usize, Parked);

/// Who shares host memory when one wants room.
struct Shares {
    /// The one that wants it, then those that lie parked.
    all: Vec<Sized>,
    /// Places in `all` of those for which there is no room.
    gone: Vec<usize>,
    tier: Tier,
}

impl Shares {
    fn has_room(&self) -> bool {
        !self.gone.contains(&0)
    }
}

impl State {
    /// Host memory that the copy of a worker's weights takes or was promised, in bytes. One that leaves it counts no more.
    fn host_bytes(&self, worker: &Worker) -> u64 {
        let model = &self.models[worker.model];
        let told = || match worker.host.bytes {
            Some(bytes) => bytes,
            None if worker.lies_on.is_some() && !model.is_checkpointed => self.parked_size(worker, 0).bytes,
            None => 0,
        };
        match worker.phase {
            _ if !model.park => 0,
            Phase::Waiting { was_parked: false } | Phase::Dropping => 0,
            Phase::Loading { was_parked: false, .. } => model.host_at_load(worker.promised),
            Phase::Serving { .. } | Phase::Draining { .. } | Phase::Stopping { park: false } => told(),
            _ => self.parked_size(worker, 0).bytes,
        }
    }

    /// A worker as it is or would be in host memory.
    pub(super) fn parked_size(&self, worker: &Worker, now: Millis) -> Parked {
        let size = self.models[worker.model].parked(now);
        Parked { bytes: worker.host.bytes.filter(|bytes| *bytes > 0).unwrap_or(size.bytes), ..size }
    }

    /// Who goes if this worker, of this size, is to have room.
    fn shares(&self, place: usize, own: Parked, now: Millis) -> Shares {
        let others = || self.workers.iter().enumerate().filter(|(other, _)| *other != place);
        let lies = |worker: &Worker| worker.phase == Phase::Parked;
        let fixed: u64 = others().filter(|(_, w)| !lies(w)).map(|(_, worker)| self.host_bytes(worker)).sum();
        let parked = others().filter(|(_, w)| lies(w)).map(|(other, worker)| (other, self.parked_size(worker, now)));
        let all: Vec<Sized> = std::iter::once((place, own)).chain(parked).collect();
        let sizes: Vec<Parked> = all.iter().map(|(_, size)| *size).collect();
        let gone = tier::to_drop(&sizes, self.inventory.host.saturating_sub(fixed));
        let stay = (0..all.len()).filter(|which| !gone.contains(which));
        let used = fixed + stay.map(|which| sizes[which].bytes).sum::<u64>();
        Shares { all, gone, tier: Tier { host: self.inventory.host, used, now } }
    }

    /// Those parked ones go for which there is no room beside this worker.
    fn drop_others(&mut self, place: usize, shares: &Shares, effects: &mut Vec<Effect>) {
        for (other, size) in shares.gone.iter().map(|which| shares.all[*which]).filter(|(other, _)| *other != place) {
            let name = |place: usize| self.models[self.workers[place].model].name.clone();
            self.announce(shares.tier.drop(&name(other), &size, &name(place)), effects);
            self.workers[other].phase = Phase::Dropping;
            effects.push(self.order(other, Order::Stop));
        }
    }

    /// Whether a worker that leaves its devices is parked; if so, parked ones that are worth less make room for it.
    pub(super) fn parks(&mut self, place: usize, now: Millis, effects: &mut Vec<Effect>) -> bool {
        let worker = &self.workers[place];
        let model = &self.models[worker.model];
        if self.inventory.host == 0 || !model.park {
            return false;
        }
        let own = self.parked_size(worker, now);
        let shares = self.shares(place, own, now);
        // Who was promised nothing was started without the means to sleep (vLLM).
        let has_means = model.is_checkpointed || worker.promised != Some(0) || worker.lies_on.is_some();
        let refusal = worker.host.can_park == Some(false) || !has_means;
        let note =
            if has_means { worker.host.note.as_deref() } else { Some("no host memory was left when it was loaded") };
        // Of what nobody knows the size of, nobody can say whether it fits.
        let fits = !refusal && own.bytes > 0 && shares.has_room();
        let in_the_way = self.would_be_in_the_way(place).filter(|_| fits);
        let parks = fits && in_the_way.is_none();
        let decision = match in_the_way {
            Some((residue, other)) => {
                shares.tier.would_be_in_the_way(&model.name, &own, &residue, &self.models[other].name)
            }
            None if parks => shares.tier.park(&model.name, &own),
            None if refusal => shares.tier.refused(&model.name, &own, note),
            None => shares.tier.stop(&model.name, &own),
        };
        if parks {
            self.drop_others(place, &shares, effects);
        }
        self.announce(decision, effects);
        parks
    }

    /// Most host memory that a worker which is about to load may take for its copy: what is left. If that is less than it
    /// takes, parked ones that are worth less go first. `None`: it is never parked.
    pub(super) fn promise(&mut self, place: usize, now: Millis, effects: &mut Vec<Effect>) -> Option<u64> {
        let worker = &self.workers[place];
        let model = &self.models[worker.model];
        if !model.park {
            return None;
        }
        if model.copies_at_load() {
            let shares = self.shares(place, self.parked_size(worker, now), now);
            if shares.has_room() {
                self.drop_others(place, &shares, effects);
            }
        }
        let others = self.workers.iter().enumerate().filter(|(other, _)| *other != place);
        let used: u64 = others.map(|(_, worker)| self.host_bytes(worker)).sum();
        Some(self.inventory.host.saturating_sub(used))
    }

    /// A parked worker loads where it cannot wake.
    pub(super) fn lose_copy(&mut self, place: usize, now: Millis, effects: &mut Vec<Effect>) {
        let worker = &self.workers[place];
        let size = self.parked_size(worker, now);
        let places = (worker.lies_on.unwrap_or(worker.set), worker.set);
        let decision = self.tier_without(place, now).elsewhere(&self.models[worker.model].name, &size, places);
        self.announce(decision, effects);
    }

    /// Host memory as it is when this worker has left it.
    pub(super) fn tier_without(&self, place: usize, now: Millis) -> Tier {
        let others = self.workers.iter().enumerate().filter(|(other, _)| *other != place);
        let used = others.map(|(_, worker)| self.host_bytes(worker)).sum();
        Tier { host: self.inventory.host, used, now }
    }

    /// A worker says what its copy in host memory takes.
    pub(super) fn on_host(&mut self, index: usize, place: Option<usize>, host: HostCopy) {
        if let Some(place) = place {
            let worker = &mut self.workers[place];
            self.models[index].count_host(&host, worker.promised);
            worker.host = host;
        }
    }

    /// Whether a model that is to be parked can be, and why not, in words; `None`: it is not to be.
    pub(in crate::scheduler) fn parking(&self, index: usize) -> Option<tier::Outlook> {
        let model = &self.models[index];
        let said = &model.learned.host;
        let refusal = (said.can_park == Some(false)).then(|| said.note.as_deref().unwrap_or_default());
        model.park.then(|| tier::outlook(model.parked(0).bytes, self.inventory.host, refusal, said.note.as_deref()))
    }

    /// Says for each model that is to be parked whether it can be.
    pub(in crate::scheduler) fn tell_parking(&self) {
        for (index, model) in self.models.iter().enumerate() {
            let Some(outlook) = self.parking(index) else { continue };
            let (model, park_ram) = (&*model.name, self.inventory.host);
            match outlook.can {
                Some(true) => tracing::info!(model, park_ram.bytes = park_ram, "can be parked: {}", outlook.why),
                Some(false) => tracing::warn!(model, park_ram.bytes = park_ram, "cannot be parked: {}", outlook.why),
                None => tracing::info!(model, park_ram.bytes = park_ram, "may be parked: {}", outlook.why),
            }
        }
    }
}

#[cfg(test)]
#[path = "host_tests.rs"]
mod tests;
