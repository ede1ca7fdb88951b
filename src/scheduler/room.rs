//! A model that ran out of memory while it was loaded, though it was told to make do with less: who makes room for it, where
//! else it is tried, and when it is blocked.
//!
//! 1. Workers that may leave were on its GPUs: its next load has them to itself (`Room::Apart`). Nobody but pinned ones is
//!    beside it then; who is there leaves as for any model that takes whole devices.
//! 2. It has failed so, or only parked processes were there: these end as well (`Room::Alone`).
//! 3. Nobody was there who could go: it is tried on another set that may have more than was free where it failed.
//! 4. There is none: it is blocked, until more is free where it failed (which its supervisor sees), the GPUs are others, a
//!    pin is taken away, its entry is edited, or somebody asks for a retry.
//!
//! What counts is who was there while it loaded, not what was tried before: so each step is taken only if there is something to
//! gain. They may be gone by now, those too that ran out of memory beside it. What helped is kept for a while.

use super::*;
use crate::policy::sets;
use crate::policy::view::WorkerView;

/// So long a model is loaded as it had to be when it last ran out of memory; then it is tried beside others again.
const KEPT_MS: i64 = 3_600_000;

/// Whom the next load of a model has beside it on its devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::scheduler) enum Room {
    /// Whoever fits there by what models take.
    #[default]
    Shared,
    /// Parked processes, and pinned workers if it fits beside them.
    Apart,
    /// The same without parked processes.
    Alone,
}

/// Who was on the devices of a worker while it loaded, by model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::scheduler) struct Company {
    /// Workers that may leave.
    residents: Vec<usize>,
    /// Parked processes.
    parked: Vec<usize>,
}

impl State {
    /// Its jobs go on waiting if there is something else to try; else they are told, as after any failed load.
    pub(super) fn on_does_not_fit(
        &mut self,
        index: usize,
        worker: Option<usize>,
        (error, free): (JobError, u64),
        now: Millis,
    ) -> Vec<Effect> {
        let listed = self.models[index].is_listed;
        let tried = worker.filter(|worker| listed && !self.workers[*worker].is_outdated);
        let then = tried.and_then(|place| {
            let set = self.workers[place].set;
            let (room, others) = self.in_its_way(place)?;
            Some((room, set, self.names(others)))
        });
        let name = self.models[index].name.clone();
        let reason = match (then, tried.map(|place| self.workers[place].set)) {
            (Some((room, set, others)), _) => {
                let model = &mut self.models[index];
                (model.room, model.room_at) = (room, now);
                // Nobody leaves for a model that nobody wants yet.
                model.preload &= model.pending() != (0, 0) || model.wanted_at.is_some();
                let when = if room == Room::Alone { "their parked processes have ended" } else { "they have left" };
                format!("{name} ran out of memory on {set} beside {others}: it is loaded once more when {when}")
            }
            (None, Some(set)) => {
                let model = &mut self.models[index];
                (model.room, model.lack_error) = (Room::Shared, Some(error.clone()));
                model.lacked.push((set, free));
                if !self.has_another_set(index, now) {
                    return self.on_blocked(index, worker, error);
                }
                format!("{name} ran out of memory on {set}, and other GPUs may have more: it is tried there")
            }
            (None, None) => return self.on_blocked(index, worker, error),
        };
        self.give_up(worker);
        self.give_place_back(index);
        let decision = Decision::new(now, "wait", "no_room", reason).of(&name);
        let mut effects = Vec::new();
        self.announce(decision, &mut effects);
        effects
    }

    /// Workers of a model that wait for their devices were given them by what it took before: a new plan decides.
    fn give_place_back(&mut self, index: usize) {
        self.workers.retain(|w| w.model != index || w.phase != Phase::Waiting { was_parked: false });
        let waiting = self.workers.iter_mut().filter(|w| w.model == index && matches!(w.phase, Phase::Waiting { .. }));
        waiting.for_each(Worker::lie_down);
    }

    /// It is ready.
    pub(super) fn note_that_it_fits(&mut self, index: usize, now: Millis) {
        let model = &mut self.models[index];
        (model.lacked, model.lack_error) = (Vec::new(), None);
        if now - model.room_at >= KEPT_MS {
            model.room = Room::Shared;
        }
    }

    /// Models that were to be tried on another set, and for which there is none any more: somebody was pinned there.
    pub(super) fn block_without_set(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        for index in 0..self.models.len() {
            let model = &self.models[index];
            let waits = model.is_listed && model.trouble.is_none();
            let Some(error) = model.lack_error.clone().filter(|_| waits) else { continue };
            let is_on_its_way =
                |w: &Worker| w.model == index && matches!(w.phase, Phase::Waiting { .. } | Phase::Loading { .. });
            if !self.workers.iter().any(is_on_its_way) && !self.has_another_set(index, now) {
                effects.extend(self.on_blocked(index, None, error));
            }
        }
    }

    fn on_blocked(&mut self, index: usize, worker: Option<usize>, error: JobError) -> Vec<Effect> {
        let model = &mut self.models[index];
        (model.room, model.lack_error) = (Room::Shared, None);
        let line = first_line(&error.message);
        let rest = line.strip_prefix(&format!("model `{}` ", self.models[index].name));
        let text = rest.map_or_else(|| format!("blocked: {line}"), |rest| format!("it {rest}"));
        self.on_load_failed(index, worker, error, None, text)
    }

    /// What its next load is to be without, of what was on its devices while it loaded; of which models.
    fn in_its_way(&self, place: usize) -> Option<(Room, &[usize])> {
        let Company { residents, parked } = &self.workers[place].company;
        let both = [(Room::Apart, residents), (Room::Alone, parked)];
        both.into_iter().find(|(_, models)| !models.is_empty()).map(|(room, models)| (room, &models[..]))
    }

    /// A worker begins to load: who is on its devices is beside it, and it beside those that load there.
    pub(super) fn note_company(&mut self, place: usize) {
        let (set, model) = (self.workers[place].set, self.workers[place].model);
        let models = |is_there: &dyn Fn(usize) -> bool| -> Vec<usize> {
            let there = (0..self.workers.len()).filter(|other| *other != place && is_there(*other));
            // Its own workers elsewhere serve, and do not leave for another one.
            there.map(|other| self.workers[other].model).filter(|other| *other != model).collect()
        };
        let residents = models(&|other| self.has_to_leave_for_apart(other) && self.workers[other].set.overlaps(set));
        let parked = models(&|other| self.workers[other].lies_on_one_of(set));
        self.workers[place].company = Company { residents, parked };
        if !self.models[model].is_pinned() {
            let loads =
                |w: &&mut Worker| w.model != model && matches!(w.phase, Phase::Loading { .. }) && w.set.overlaps(set);
            let others = self.workers.iter_mut().enumerate().filter(|(other, _)| *other != place).map(|(_, w)| w);
            others.filter(loads).for_each(|worker| worker.company.residents.push(model));
        }
    }

    /// Whether a worker is on its devices and cannot be beside one that has them to itself.
    pub(super) fn has_to_leave_for_apart(&self, place: usize) -> bool {
        let worker = &self.workers[place];
        worker.is_on_device() && !(worker.stays() && self.models[worker.model].is_pinned())
    }

    /// Whether a worker has its devices to itself, or is to have them: until it is ready.
    pub(super) fn is_apart(&self, worker: &Worker) -> bool {
        let is_on_its_way = matches!(worker.phase, Phase::Waiting { .. } | Phase::Loading { .. });
        is_on_its_way && self.models[worker.model].room != Room::Shared
    }

    fn names(&self, models: &[usize]) -> String {
        let mut names: Vec<&str> = models.iter().map(|model| &*self.models[*model].name).collect();
        names.sort_unstable();
        names.dedup();
        names.join(", ")
    }

    /// Whether there is a set on which it has not failed and which may have more, if all leave who may.
    fn has_another_set(&self, index: usize, now: Millis) -> bool {
        let view = self.view_with_places(now).0;
        let may_leave = |w: &WorkerView| (w.model != index && !view.model_of(w).pin).then_some(0.0);
        let costs: Vec<Option<f64>> = view.workers.iter().map(may_leave).collect();
        sets::open(&view, index).into_iter().any(|set| sets::victims(&view, index, set, &costs).is_some())
    }

    /// Parked processes on the devices of a worker that is to load alone end; whether they are gone.
    pub(super) fn is_clear_of_parked(&mut self, place: usize, now: Millis, effects: &mut Vec<Effect>) -> bool {
        let set = self.workers[place].set;
        let name = self.models[self.workers[place].model].name.clone();
        for other in (0..self.workers.len()).filter(|other| *other != place) {
            let worker = &self.workers[other];
            if worker.can_be_dropped() && worker.lies_on_one_of(set) {
                let (tier, size) = (self.tier_without(other, now), self.parked_size(worker, now));
                let theirs = &self.models[worker.model].name;
                let decision = tier.beside_oom(theirs, worker.is_bare, &size, (&name, set));
                self.announce(decision, effects);
                self.workers[other].lie_down();
                self.workers[other].phase = Phase::Dropping;
                self.plan_now = true;
                effects.push(self.order(other, Order::Stop));
            }
        }
        let others = self.workers.iter().enumerate().filter(|(other, _)| *other != place);
        !others.into_iter().any(|(_, worker)| worker.phase == Phase::Dropping && worker.lies_on_one_of(set))
    }

    /// Which models are pinned.
    pub(super) fn pins(&self) -> Vec<bool> {
        self.models.iter().map(Model::is_pinned).collect()
    }

    /// Pins were taken away, or not: who was pinned may leave for those who have not fitted beside it.
    pub(super) fn note_pins(&mut self, before: &[bool]) {
        if before.iter().zip(&self.models).any(|(was_pinned, model)| *was_pinned && !model.is_pinned()) {
            self.forget_lack_of_room();
            let apart = |index: &usize| self.models[*index].room != Room::Shared;
            let apart: Vec<usize> = (0..self.models.len()).filter(apart).collect();
            apart.into_iter().for_each(|index| self.give_place_back(index));
        }
    }

    /// Models that failed are tried once more: the devices are others, or whom they have to be beside.
    pub(super) fn forget_lack_of_room(&mut self) {
        for model in self.models.iter_mut().filter(|model| model.is_listed && !model.lacked.is_empty()) {
            (model.lacked, model.lack_error) = (Vec::new(), None);
            model.trouble.take_if(|trouble| trouble.reason == StateReason::ModelBlocked && trouble.until.is_none());
        }
    }
}

#[cfg(test)]
#[path = "room_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "room_random_tests.rs"]
mod random_tests;
