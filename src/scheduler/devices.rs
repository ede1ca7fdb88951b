//! GPUs that come and go: whose workers leave, whose jobs go back, and which models wait until there are enough again.

use super::*;
use crate::policy::sets;

impl State {
    /// The GPUs that are there now, by number, with their memory in bytes. What was there once and is not any more has
    /// vanished: the jobs on it wait again, uncharged, and its workers are ended.
    pub(super) fn on_devices(&mut self, there: &BTreeMap<u32, u64>) -> Vec<Effect> {
        if self.inventory.one_at_a_time {
            return Vec::new();
        }
        let before = self.inventory.gpu_count();
        self.inventory.see(there);
        self.forget_lack_of_room();
        self.make_room_for(self.inventory.gpu_count() - before, before);
        let mut effects = Vec::new();
        let mut place = 0;
        while place < self.workers.len() {
            let worker = &self.workers[place];
            if !self.inventory.lacks(worker.set) || !self.drop_vanished(place, &mut effects) {
                place += 1;
            }
        }
        self.note_all_devices();
        effects
    }

    /// Which models have no place on this box, now or ever.
    pub(super) fn note_all_devices(&mut self) {
        self.mark_too_big();
        self.models.iter_mut().for_each(|model| model.restore_batches(&self.inventory));
        (0..self.models.len()).for_each(|index| self.note_devices(index));
    }

    /// Ends a worker whose GPU has vanished; whether it is gone at once.
    fn drop_vanished(&mut self, place: usize, effects: &mut Vec<Effect>) -> bool {
        let worker = &self.workers[place];
        match worker.phase {
            Phase::Waiting { was_parked: true } => self.workers[place].lie_down(),
            Phase::Waiting { was_parked: false } => {
                self.workers.remove(place);
                return true;
            }
            Phase::Loading { .. } => {
                self.workers[place].phase = Phase::Stopping { park: false };
                effects.push(self.order(place, Order::Stop));
            }
            // It is stopped when the last of its jobs is back; nothing of it can be parked, as if it had hung.
            Phase::Serving { .. } | Phase::Draining { .. } => {
                self.evict(place, effects);
                self.workers[place].phase = Phase::Draining { hung: true };
            }
            Phase::Stopping { .. } | Phase::Parked | Phase::Dropping => {}
        }
        false
    }

    /// The jobs on a worker wait again.
    pub(super) fn evict(&self, place: usize, effects: &mut Vec<Effect>) {
        let worker = &self.workers[place];
        let queue = &self.models[worker.model].queue;
        let on_it = queue.running().iter().filter(|(_, running)| running.worker == worker.replica);
        let numbers: Vec<i64> = on_it.map(|(number, _)| *number).collect();
        if !numbers.is_empty() {
            effects.push(Effect::Evict { numbers });
        }
    }

    /// The CPU comes after the GPUs: with more of these it has another number.
    fn make_room_for(&mut self, more: u32, before: u32) {
        let workers = self.workers.iter_mut().flat_map(|w| std::iter::once(&mut w.set).chain(&mut w.lies_on));
        let sets = workers.chain(self.reservations.iter_mut().map(|reservation| &mut reservation.set));
        sets.filter(|set| set.first >= before).for_each(|set| set.first += more);
        for _ in 0..more {
            self.last_on.insert(before as usize, None);
        }
    }

    /// Whether a model has the GPUs that it needs, as far as that is its only trouble.
    pub(super) fn note_devices(&mut self, index: usize) {
        let model = &self.models[index];
        let has_trouble = |reason| model.trouble.as_ref().is_some_and(|trouble| trouble.reason == reason);
        if model.too_big.is_some() || has_trouble(StateReason::ModelBlocked) || self.inventory.one_at_a_time {
            return;
        }
        let view = self.view_of_models();
        self.models[index].trouble = (!sets::has_place(&view, index)).then(|| self.models[index].lacks_gpus());
    }
}
