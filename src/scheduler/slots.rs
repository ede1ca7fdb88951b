//! Who gets a free slot of a serving worker: a job that has just come, or the next of those that wait.

use super::*;

impl State {
    /// The fast path: if the job's model serves with a free slot and nobody waits, the slot is the job's, and its worker's
    /// address is returned. Give it back by [`Event::Ended`].
    pub fn reserve(&mut self, job: &QueuedJob, now: Millis) -> Option<Place> {
        let index = self.index_of(&job.model)?;
        if self.stopping || self.models[index].held.paused || job.not_before.is_some() {
            return None;
        }
        let model = &self.models[index];
        let free = |worker: &&Worker| {
            worker.model == index
                && matches!(worker.phase, Phase::Serving { suspect: false, .. })
                && !model.storing.is_full(worker.replica, model.slots)
                && model.queue.has_free_slot(model.slots, job.priority, worker.replica)
        };
        let worker = self.workers.iter().filter(free).min_by_key(|worker| model.queue.running_on(worker.replica))?;
        let Phase::Serving { place, .. } = &worker.phase else { return None };
        let place = place.clone();
        self.account(now);
        self.lift(&job.tenant);
        let to = self.to(index, place.replica);
        self.count_running(&job.tenant);
        let model = &mut self.models[index];
        model.queue.reserve(job.clone(), to, &mut self.served, now);
        model.begin(&Run { jobs: vec![job.clone()], alone: false }, &place, now);
        Some(place)
    }

    /// A worker as its model's queue needs it.
    pub(super) fn to(&self, index: usize, worker: u32) -> To {
        let model = &self.models[index];
        let canary = self.find(index, worker).and_then(|place| self.workers[place].canary);
        let (slots, service_ms, charge_ms) = (model.slots, model.service_ms(), model.charge_ms());
        To { worker, slots, canary, service_ms, charge_ms }
    }

    /// Fills the free slots of ready workers, the least busy worker of a model first.
    pub(super) fn admit_jobs(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        if self.stopping {
            return;
        }
        for index in 0..self.models.len() {
            while !self.models[index].held.paused
                && self.models[index].queue.has_ready()
                && let Some((place, run)) = self.admit_one(index, now)
            {
                for job in &run.jobs {
                    self.forget_tenant(&job.tenant);
                    self.count_running(&job.tenant);
                }
                run.jobs.iter().for_each(|job| self.eta.started(job.number, now));
                effects.push(Effect::Claim { model: self.models[index].name.clone(), place, run });
            }
        }
    }

    fn admit_one(&mut self, index: usize, now: Millis) -> Option<(Place, Run)> {
        let model = &self.models[index];
        let mut places: Vec<&Place> = self
            .workers
            .iter()
            .filter(|worker| worker.model == index)
            .filter_map(|worker| match &worker.phase {
                Phase::Serving { place, suspect: false, .. } => Some(place),
                _ => None,
            })
            .filter(|place| !model.storing.is_full(place.replica, model.slots))
            .collect();
        places.sort_by_key(|place| model.queue.running_on(place.replica));
        let places: Vec<Place> = places.into_iter().cloned().collect();
        places.into_iter().find_map(|place| {
            let to = self.to(index, place.replica);
            let model = &mut self.models[index];
            let run = model.queue.admit_one(to, &model.batching, &mut self.served, now)?;
            model.begin(&run, &place, now);
            Some((place, run))
        })
    }
}
