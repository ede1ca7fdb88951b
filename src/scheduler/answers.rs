//! The ends of attempts. A worker that has answered is done with the job: its slot, its place in a run, its time and its
//! tenant's share end there, the next run may be claimed, and a drain does not wait. What is left is the disk's: until the
//! answer is committed the job runs for the store, its watchers, whoever cancels it, and a server that stops.

use super::*;
use crate::scheduler::queue::Slots;

/// An answer that is not committed yet.
#[derive(Clone, Copy, Debug)]
struct Answer {
    /// Whose it is: a number among the workers of the model, which may be gone by now.
    worker: u32,
    /// What the job had of the devices.
    device_ms: f64,
}

/// Answers of a model's workers on their way to the store, by number of the job.
#[derive(Debug, Default)]
pub(in crate::scheduler) struct Storing(BTreeMap<i64, Answer>);

impl Storing {
    /// Whether a worker gets no more jobs for now: more of its answers are being stored than it may have jobs at once.
    ///
    /// As many as that are stored while it makes the next ones, so that a disk that keeps up costs no time of the worker. One
    /// that does not slows the intake: of each worker there are never more answers, stored or to come, than twice what it may
    /// have at once.
    pub(in crate::scheduler) fn is_full(&self, worker: u32, slots: Slots) -> bool {
        self.of(worker) > slots.limit.max(slots.max_batch) as usize
    }

    /// How many there are of a worker.
    fn of(&self, worker: u32) -> usize {
        self.0.values().filter(|answer| answer.worker == worker).count()
    }

    /// How many there are.
    pub(in crate::scheduler) fn len(&self) -> usize {
        self.0.len()
    }

    /// What a job had of the devices, ms; `None`: no answer of it is being stored.
    pub(in crate::scheduler) fn device_ms(&self, number: i64) -> Option<f64> {
        self.0.get(&number).map(|answer| answer.device_ms)
    }

    /// The jobs.
    #[cfg(test)]
    pub(in crate::scheduler) fn numbers(&self) -> impl Iterator<Item = i64> {
        self.0.keys().copied()
    }
}

impl State {
    /// A worker has answered a job.
    pub(super) fn on_answered(&mut self, model: &str, number: i64, now: Millis) -> Vec<Effect> {
        let Some(index) = self.index_of(model) else { return Vec::new() };
        let Some(had) = self.models[index].queue.settle(number, now) else { return Vec::new() };
        let Some(running) = self.end_running(model, number, now) else { return Vec::new() };
        self.plan_now = true;
        let model = &mut self.models[index];
        model.storing.0.insert(number, Answer { worker: running.worker, device_ms: had.device_ms });
        model.queue.count_answer(running.worker, now);
        model.count_end(Some(now - running.claimed_at), now);
        if let Some(canary) = running.canary {
            model.queue.prove(canary);
            let of_it = self.workers.iter_mut().filter(|worker| worker.model == index && worker.canary == Some(canary));
            of_it.for_each(|worker| worker.canary = None);
        }
        let change = model.end_of_run(running.worker, true, now);
        let mut effects = self.tell_change(index, change, now);
        if let Some(worker) = self.find(index, running.worker)
            && let Phase::Serving { proven, .. } = &mut self.workers[worker].phase
            && !std::mem::replace(proven, true)
        {
            effects.push(self.order(worker, Order::Proven));
        }
        effects
    }

    /// A running job ran out of memory, in a run of so many. The first of a run says so for all of it, which is still there.
    pub(super) fn on_out_of_memory(&mut self, model: &str, number: i64, jobs: u32, now: Millis) -> Vec<Effect> {
        let Some(index) = self.index_of(model) else { return Vec::new() };
        let Model { queue, batching, .. } = &mut self.models[index];
        let Some(running) = queue.running().get(&number) else { return Vec::new() };
        let change = match (jobs, running.alone) {
            (..=1, _) => {
                batching.own_fault(running.job.batch_key, number);
                None
            }
            // Those that ran when a worker died say nothing about a shape, whatever they have in common.
            (_, true) => None,
            (_, false) => {
                let all = queue.running().iter().filter(|(_, other)| other.worker == running.worker);
                batching.out_of_memory(running.job.batch_key, jobs, all.map(|(number, _)| *number).collect())
            }
        };
        self.tell_change(index, change, now)
    }

    /// Jobs that were about to run wait again.
    pub(super) fn on_unclaimed(&mut self, model: &str, numbers: Vec<i64>, now: Millis) {
        for number in numbers {
            if let Some(running) = self.end_running(model, number, now).filter(|running| !running.is_gone) {
                self.enqueue(&running.job, now);
            }
        }
    }

    /// A job was cancelled as one that waits. Here it may still run: what it was cancelled after is on its way to us.
    pub(super) fn on_gone(&mut self, model: &str, priority: u8, number: i64) {
        let Some(index) = self.index_of(model) else { return };
        let queue = &mut self.models[index].queue;
        match queue.remove(priority, number) {
            Some(job) => self.forget_tenant(&job.tenant),
            None => queue.note_gone(number),
        }
    }

    /// The end of an attempt is committed.
    pub(super) fn on_ended(
        &mut self,
        name: &str,
        number: i64,
        answered: bool,
        suspect: bool,
        back: Option<Back>,
        now: Millis,
    ) -> Vec<Effect> {
        let mut effects = if answered { self.on_answered(name, number, now) } else { Vec::new() };
        let Some(index) = self.index_of(name) else { return effects };
        let model = &mut self.models[index];
        if let Some(Answer { worker, .. }) = model.storing.0.get(&number).copied() {
            // Only what may be claimed has changed, if anything.
            self.plan_now |= model.storing.is_full(worker, model.slots);
            model.storing.0.remove(&number);
            return effects;
        }
        let Some(running) = self.end_running(name, number, now) else { return effects };
        let model = &mut self.models[index];
        model.count_end(None, now);
        let change = model.end_of_run(running.worker, false, now);
        effects.extend(self.tell_change(index, change, now));
        if let Some(Back { not_before, crash }) = back.filter(|_| !running.is_gone) {
            self.enqueue(&QueuedJob { was_started: true, not_before, crash, ..running.job }, now);
        }
        // Once: a worker that dies takes up to `limit` jobs along, and each of them says so.
        if let Some(worker) = self.find(index, running.worker)
            && let Phase::Serving { suspect: is_suspected, .. } = &mut self.workers[worker].phase
            && suspect
            && !std::mem::replace(is_suspected, true)
        {
            effects.push(self.order(worker, Order::Suspect));
        }
        effects
    }
}
