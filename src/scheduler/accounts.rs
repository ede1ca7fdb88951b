//! Where the devices' time goes, and what a job had of it.

use super::*;
use crate::scheduler::ledger::Doing;
use crate::store::Spent;

impl State {
    /// Counts the time until now as spent on what was going on; to be called before anything changes.
    pub(super) fn account(&mut self, now: Millis) {
        let elapsed = self.ledger.elapsed(now);
        if elapsed == 0 {
            return;
        }
        let (workers, models) = (&self.workers, &self.models);
        for device in 0..self.counted_devices() {
            let here = workers.iter().filter(|worker| worker.is_on_device() && worker.set.has(device));
            let doing = here.map(|worker| {
                let doing = match worker.phase {
                    _ if models[worker.model].queue.works(worker.replica) => Doing::Work,
                    Phase::Loading { .. } | Phase::Stopping { .. } => Doing::Swap,
                    _ => Doing::Idle,
                };
                (worker.model, doing)
            });
            self.ledger.spend(elapsed, doing);
        }
    }

    /// The GPUs; where there are none, whatever there is.
    fn counted_devices(&self) -> u32 {
        match self.inventory.gpu_count() {
            0 => u32::from(self.inventory.cpu.is_some()),
            gpus => gpus,
        }
    }

    /// What a running job had of the devices, ms. Its attempt is over: from now on it has nothing more of them.
    pub fn settle(&mut self, model: &str, number: i64, now: Millis) -> f64 {
        self.account(now);
        let Some(index) = self.index_of(model) else { return 0.0 };
        let queue = &mut self.models[index].queue;
        let Some(replica) = queue.running().get(&number).map(|running| running.worker) else { return 0.0 };
        let had = queue.settle(number, now).unwrap_or(0.0);
        let counted = self.counted_devices();
        let set = self.find(index, replica).map(|worker| self.workers[worker].set);
        // Of a worker that is gone already: one device, as most have.
        let devices = set.map_or(1, |set| set.gpus().filter(|device| *device < counted).count());
        had * devices as f64
    }

    /// Takes out where the time went since the last call.
    pub fn take_spent(&mut self, now: Millis) -> Vec<Spent> {
        self.account(now);
        let models = &self.models;
        self.ledger.take(|model| models[model].name.to_string())
    }
}
