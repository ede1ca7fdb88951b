//! Whose host memory is whose: what copies of weights take there now or are about to, who is parked, and who makes room.
//!
//! A worker makes its copy either when it is parked first (vLLM, which tells nothing of it), or when it is loaded (ours with
//! torch, which say `host_bytes` from then on), and keeps it until its process ends: torch gives page-locked memory back to
//! nobody, so one that has slept once counts as long as it lives, unless it says otherwise. What is asked of a leaving worker counts
//! only what the others have by then or were promised; a newcomer is promised the rest when its devices are free, which is
//! after all who leave for it have been parked or stopped, and is loaded when what is dropped for it is gone. So of two, one
//! always gets what there is. What the driver's checkpoint takes of it, it takes when the worker leaves: a load is promised
//! nothing for that.

use super::*;
use crate::policy::tier::{self, Bare, Parked, Tier};

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
            None if worker.has_slept && !model.is_checkpointed => self.parked_size(worker, 0).bytes,
            None => 0,
        };
        match worker.phase {
            _ if !model.park => 0,
            Phase::Waiting { was_parked: false } | Phase::Dropping => 0,
            Phase::Parked | Phase::Waiting { .. } if worker.is_bare => 0,
            Phase::Loading { .. } if worker.may_rehearse => self.parked_size(worker, 0).bytes,
            // What reads its weights again may make a copy of them again.
            Phase::Loading { was_parked, .. } if !was_parked || worker.is_bare => model.host_at_load(worker.promised),
            Phase::Stopping { park: true } if worker.is_bare => told(),
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
        let lies = |worker: &Worker| worker.phase == Phase::Parked && !worker.is_bare;
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

    /// Parked workers go for which there is no room any more, since an edit has made host memory smaller.
    pub(super) fn drop_beyond_host(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        let lies = |worker: &Worker| worker.phase == Phase::Parked && !worker.is_bare;
        let fixed: u64 = self.workers.iter().filter(|w| !lies(w)).map(|worker| self.host_bytes(worker)).sum();
        let parked: Vec<usize> = (0..self.workers.len()).filter(|place| lies(&self.workers[*place])).collect();
        let sizes: Vec<Parked> = parked.iter().map(|place| self.parked_size(&self.workers[*place], now)).collect();
        let gone = tier::to_drop(&sizes, self.inventory.host.saturating_sub(fixed));
        let stay = (0..sizes.len()).filter(|which| !gone.contains(which));
        let used = fixed + stay.map(|which| sizes[which].bytes).sum::<u64>();
        let tier = Tier { host: self.inventory.host, used, now };
        for which in gone {
            let place = parked[which];
            self.announce(tier.shrunk(&self.models[self.workers[place].model].name, &sizes[which]), effects);
            self.workers[place].phase = Phase::Dropping;
            effects.push(self.order(place, Order::Stop));
        }
        if self.inventory.host == 0 {
            self.end_bare(|_| true, "scheduler.park_ram is 0", now, effects);
        }
    }

    /// Processes of workers that are parked without a copy end, of those that `ends` picks.
    fn end_bare(&mut self, ends: impl Fn(&Worker) -> bool, why: &str, now: Millis, effects: &mut Vec<Effect>) {
        for place in 0..self.workers.len() {
            let worker = &self.workers[place];
            if worker.phase == Phase::Parked && worker.is_bare && ends(worker) {
                let used = self.workers.iter().map(|worker| self.host_bytes(worker)).sum();
                let tier = Tier { host: self.inventory.host, used, now };
                let decision = tier.end_bare(&self.models[worker.model].name, &self.parked_size(worker, now), why);
                self.announce(decision, effects);
                self.workers[place].phase = Phase::Dropping;
                effects.push(self.order(place, Order::Stop));
            }
        }
    }

    /// Whether a worker that is about to load, and makes its copy when it is parked, may make it at once.
    pub(super) fn has_room_to_rehearse(&self, place: usize, promised: Option<u64>) -> bool {
        let worker = &self.workers[place];
        let model = &self.models[worker.model];
        let takes = self.parked_size(worker, 0).bytes;
        takes > 0 && promised >= Some(takes) && !model.is_checkpointed && !model.copies_at_load()
    }

    /// What it would be to park a worker without a copy; `None`: it cannot be, or its process is not worth keeping. One that
    /// has made its copy and does not say that it is gone keeps the memory, and so nothing is gained.
    fn bare(&self, worker: &Worker) -> Option<Bare> {
        let model = &self.models[worker.model];
        let gains = worker.host.bytes.is_some() || !worker.has_slept;
        Some(model.bare()).filter(|bare| gains && model.can_be_bare(&worker.host) && bare.is_worth_it())
    }

    /// How a worker leaves its devices: it is parked, without a copy if there is no room for one, or stopped. If it is parked,
    /// parked ones that are worth less make room for it.
    pub(super) fn leaves_by(&mut self, place: usize, now: Millis, effects: &mut Vec<Effect>) -> Order {
        let worker = &self.workers[place];
        let model = &self.models[worker.model];
        if self.inventory.host == 0 || !model.park {
            return Order::Stop;
        }
        let own = self.parked_size(worker, now);
        let shares = self.shares(place, own, now);
        // Who was promised nothing, not even that nothing is left, was started without the means to sleep (vLLM).
        let has_means = model.is_checkpointed || worker.promised.is_some() || worker.has_slept;
        let refusal = worker.host.can_park == Some(false) || !has_means;
        let note =
            if has_means { worker.host.note.as_deref() } else { Some("scheduler.park_ram was 0 when it was loaded") };
        // Of what nobody knows the size of, nobody can say whether it fits.
        let fits = !refusal && own.bytes > 0 && shares.has_room();
        let bare = self.bare(worker).filter(|_| !fits && has_means && (refusal || own.bytes > 0));
        let in_the_way = self.would_be_in_the_way(place).filter(|_| fits || bare.is_some());
        let (order, decision) = match (in_the_way, bare) {
            (Some((obstruction, other)), _) => {
                let other = &self.models[other].name;
                (Order::Stop, shares.tier.would_be_in_the_way(&model.name, &own, &obstruction, other))
            }
            (None, _) if fits => (Order::Park, shares.tier.park(&model.name, &own)),
            (None, Some(bare)) => {
                let refusal = refusal.then(|| note.unwrap_or_default());
                (Order::ParkBare, shares.tier.bare(&model.name, &own, refusal, &bare))
            }
            (None, None) if refusal => (Order::Stop, shares.tier.refused(&model.name, &own, note)),
            (None, None) => (Order::Stop, shares.tier.stop(&model.name, &own)),
        };
        if order == Order::Park {
            self.drop_others(place, &shares, effects);
        }
        self.announce(decision, effects);
        order
    }

    /// Most host memory that a worker which is about to load may take for its copy: what is left. If that is less than it
    /// takes, parked ones that are worth less go first. `None`: it is never parked, whatever there is, or its load makes no copy.
    pub(super) fn promise(&mut self, place: usize, now: Millis, effects: &mut Vec<Effect>) -> Option<u64> {
        let worker = &self.workers[place];
        let model = &self.models[worker.model];
        if !model.park || model.is_checkpointed || self.inventory.host == 0 {
            return None;
        }
        if model.copies_at_load() && !model.has_refused_room() {
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
        let (lies, wanted) = (worker.lies_on.unwrap_or(worker.set), worker.set);
        let (tier, name) = (self.tier_without(place, now), &self.models[worker.model].name);
        let decision = if worker.is_bare {
            tier.end_bare(name, &size, &format!("its process is on {lies}, and it is wanted on {wanted}"))
        } else {
            tier.elsewhere(name, &size, (lies, wanted))
        };
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
        // What models on the CPU may have is all of it.
        let memory = self.inventory.cpu;
        let outlook =
            tier::outlook(model.parked(0).bytes, (self.inventory.host, memory), refusal, said.note.as_deref());
        let bare = Some(model.bare()).filter(|bare| model.can_be_bare(said) && bare.is_worth_it());
        model.park.then(|| match bare.filter(|_| self.inventory.host > 0) {
            Some(bare) => outlook.or_bare(&bare),
            None => outlook,
        })
    }

    /// Of each model that is to be parked, whether it can be.
    pub(in crate::scheduler) fn outlooks(&self) -> BTreeMap<Arc<str>, tier::Outlook> {
        let listed = (0..self.models.len()).filter(|index| self.models[*index].is_listed);
        listed.filter_map(|index| Some((self.models[index].name.clone(), self.parking(index)?))).collect()
    }

    /// Says it for each of which it is not as it was `before`.
    pub(in crate::scheduler) fn tell_parking(&self, before: &BTreeMap<Arc<str>, tier::Outlook>) {
        for (model, outlook) in self.outlooks().iter().filter(|(model, outlook)| before.get(*model) != Some(*outlook)) {
            let (model, park_ram) = (&**model, self.inventory.host);
            match outlook.can {
                Some(false) if outlook.bare => {
                    tracing::info!(model, park_ram.bytes = park_ram, "its copy has no room: {}", outlook.why)
                }
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
