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
        for device in 0..self.counted_devices() {
            if self.inventory.gone.contains(&device) {
                continue;
            }
            let (workers, models) = (&self.workers, &self.models);
            let here = workers.iter().filter(|worker| worker.is_on_device() && worker.set.has(device));
            let doing = here.map(|worker| {
                let doing = match worker.phase {
                    _ if models[worker.model].queue.works(worker.replica) => Doing::Work,
                    Phase::Loading { .. } | Phase::Stopping { .. } => Doing::Swap,
                    _ => Doing::Idle,
                };
                (worker.model, doing)
            });
            let each = self.ledger.spend(elapsed, doing);
            for worker in
                self.workers.iter().filter(|worker| each > 0.0 && worker.is_on_device() && worker.set.has(device))
            {
                self.models[worker.model].queue.credit(worker.replica, each);
            }
        }
    }

    /// The GPUs; where there are none, whatever there is.
    fn counted_devices(&self) -> u32 {
        match self.inventory.gpu_count() {
            0 => u32::from(self.inventory.cpu.is_some()),
            gpus => gpus,
        }
    }

    /// What a job had of the devices, ms. Its attempt is over: from now on it has nothing more of them.
    pub fn settle(&mut self, model: &str, number: i64, now: Millis) -> f64 {
        self.account(now);
        let Some(index) = self.index_of(model) else { return 0.0 };
        let model = &mut self.models[index];
        let answered = model.storing.device_ms(number);
        answered.or_else(|| Some(model.queue.settle(number, now)?.device_ms)).unwrap_or(0.0)
    }

    /// Takes out where the time went since the last call.
    pub fn take_spent(&mut self, now: Millis) -> Vec<Spent> {
        self.account(now);
        let models = &self.models;
        self.ledger.take(|model| models[model].name.to_string())
    }

    /// What was taken out could not be kept.
    pub fn put_back_spent(&mut self, spent: Vec<Spent>) {
        let index = &self.index;
        self.ledger.put_back(spent, |name| index.get(name).copied());
    }

    /// Whether serving in arrival order would have to swap for a job of this model.
    pub(super) fn swaps_in_order(&mut self, model: usize) -> bool {
        let (models, inventory) = (&self.models, &self.inventory);
        let gpu = inventory.gpus.iter().copied().max().unwrap_or(0) as f64;
        let gpus: f64 = inventory.gpus.iter().map(|bytes| *bytes as f64).sum();
        let cpu = inventory.cpu.unwrap_or(0) as f64;
        let fit = |there: &[usize]| {
            let used = |on_gpus: bool, device: f64| -> f64 {
                let of = there.iter().map(|m| &models[*m]).filter(|m| m.needs_gpus() == on_gpus);
                of.map(|m| m.weight() * m.bytes_on(inventory).map_or(device, |bytes| bytes as f64)).sum()
            };
            !inventory.one_at_a_time && used(true, gpu) <= gpus && used(false, cpu) <= cpu
        };
        self.arrival_order.arrive(model, fit)
    }
}
