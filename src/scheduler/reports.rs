//! Takes in what supervisors report of workers, and what running jobs show of the worker and of the shape that they run in.

use super::*;

impl State {
    /// An attempt that began at `since` has ended, by its time limit or by its caller, without a sign of its worker. If jobs have
    /// waited for one as long as the model's own limit, with no answer to anybody in between, the worker hangs: it is stopped. A
    /// shorter limit of a client proves nothing by itself. Returns how many jobs were on it when it was found to hang, this one
    /// included; more than one, too, if others were given up before, since one of them may hang it still; 0: it was not.
    pub fn blame_silence(&mut self, model: &str, number: i64, since: Millis, now: Millis) -> (u32, Vec<Effect>) {
        let mut effects = Vec::new();
        let Some(index) = self.index_of(model) else { return (0, effects) };
        let model = &self.models[index];
        let Some(replica) = model.queue.running().get(&number).map(|running| running.worker) else {
            return (0, effects);
        };
        // The next one of its number, which loads, has nothing to do with it.
        let serves =
            |place: &usize| matches!(self.workers[*place].phase, Phase::Serving { .. } | Phase::Draining { .. });
        let Some(place) = self.find(index, replica).filter(serves) else { return (0, effects) };
        let (answered, limit, jobs) =
            (model.queue.answered_at(replica), model.timeout_ms, model.queue.running_on(replica));
        let silence = &mut self.workers[place].silence;
        if silence.hung_with == 0 && silence.count(number, since, now, answered) >= limit {
            let least = if silence.is_shared { 2 } else { 1 };
            silence.hung_with = u32::try_from(jobs).unwrap_or(u32::MAX).max(least);
            self.account(now);
            self.plan_now = true;
            self.leave(place, true, now, &mut effects);
        }
        (self.workers[place].silence.hung_with, effects)
    }

    /// For so long nobody has waited for the pass that a worker runs. One that notices ends with its step, others at the latest as
    /// such passes usually end; after twice that time it hangs. The jobs behind it go back, uncharged, and its worker is stopped.
    pub(super) fn on_given_up(&mut self, place: usize, ms: i64, now: Millis) -> Vec<Effect> {
        let mut effects = Vec::new();
        let worker = &self.workers[place];
        let model = &self.models[worker.model];
        let limit = round(2.0 * model.service_ms()).min(model.timeout_ms).max(LETS_GO_MS);
        if ms >= limit && matches!(worker.phase, Phase::Serving { .. } | Phase::Draining { hung: false }) {
            self.evict(place, &mut effects);
            self.leave(place, true, now, &mut effects);
        }
        effects
    }

    /// A running job has failed in a way that may be its worker's fault. If that was woken and has answered nobody since, the
    /// failure is put down to the wake: the worker is stopped, if it has not died, so that the next load is from nothing, and
    /// the job is to go back uncharged. `None`: it is the job's.
    pub fn blame_wake(&mut self, model: &str, number: i64, now: Millis) -> Option<Vec<Effect>> {
        let index = self.index_of(model)?;
        let canary = self.models[index].queue.running().get(&number)?.canary?;
        self.account(now);
        self.plan_now = true;
        let mut effects = Vec::new();
        // Not by its number, which another one may have by now.
        let worker = self.workers.iter().position(|worker| worker.model == index && worker.canary == Some(canary));
        if let Some(worker) = worker {
            self.leave(worker, true, now, &mut effects);
        }
        Some(effects)
    }

    /// Something is learned about the shape of a running job.
    pub(super) fn on_shape(
        &mut self,
        model: &str,
        number: i64,
        now: Millis,
        learn: impl FnOnce(&mut Batching, i64) -> Option<Change>,
    ) -> Vec<Effect> {
        let Some(index) = self.index_of(model) else { return Vec::new() };
        let model = &mut self.models[index];
        let Some(key) = model.queue.running().get(&number).map(|running| running.job.batch_key) else {
            return Vec::new();
        };
        let change = learn(&mut model.batching, key);
        self.tell_change(index, change, now)
    }

    pub(super) fn tell_change(&mut self, index: usize, change: Option<Change>, now: Millis) -> Vec<Effect> {
        let decision = change.map(|change| change.decision(&self.models[index].name, now));
        let told = decision.and_then(|decision| self.journal.keep(decision)).map(Effect::Announce);
        let kept = self.models[index].batching.take_news().then(|| self.learn(index));
        told.into_iter().chain(kept).collect()
    }

    pub(super) fn on_report(&mut self, index: usize, replica: u32, report: Report, now: Millis) -> Vec<Effect> {
        let worker = self.find(index, replica);
        match report {
            Report::Loading { .. } => {
                worker.into_iter().for_each(|worker| self.note_cold(worker));
                Vec::new()
            }
            Report::Takes { device_bytes } => {
                self.models[index].count_bytes(device_bytes);
                Vec::new()
            }
            Report::Host(host) => {
                self.on_host(index, worker, host);
                Vec::new()
            }
            Report::Keeps { device_bytes } => {
                self.on_keeps(index, worker, device_bytes);
                Vec::new()
            }
            Report::GivenUp { ms } => worker.map_or(Vec::new(), |worker| self.on_given_up(worker, ms, now)),
            Report::Loaded { phases } => {
                self.models[index].count_phases(&phases);
                if let Some(place) = worker {
                    self.workers[place].has_slept |= phases.iter().any(|phase| phase.phase == PhaseTime::REHEARSAL);
                }
                Vec::new()
            }
            Report::Ready { base_url, load_ms } => self.on_ready(index, replica, base_url, load_ms, now),
            Report::Stopped { stop_ms } => match worker.map(|worker| (worker, &self.workers[worker].phase)) {
                Some((worker, Phase::Stopping { park })) => {
                    if *park && self.workers[worker].is_bare {
                        self.models[index].count_never_bare();
                    }
                    blend(&mut self.models[index].learned.stop_ms, stop_ms as f64, LOAD_WEIGHT);
                    self.on_left(worker, now)
                }
                Some((worker, Phase::Dropping)) => {
                    self.workers.remove(worker);
                    self.note_unloaded(index);
                    Vec::new()
                }
                // The answer to a stop that crossed with a death says nothing about a load that was ordered since.
                _ => Vec::new(),
            },
            Report::Parked { park_ms } => match worker {
                Some(worker) if self.workers[worker].phase == (Phase::Stopping { park: true }) => {
                    blend(&mut self.models[index].learned.stop_ms, park_ms as f64, LOAD_WEIGHT);
                    self.on_parked(worker, now)
                }
                _ => Vec::new(),
            },
            Report::Died { .. } => worker.map_or(Vec::new(), |worker| self.on_died(worker, now)),
            Report::BacksOff { error, retry_at, deaths, .. } if deaths > 0 => {
                let line = first_line(&error.message);
                let rest = line.strip_prefix(&format!("model `{}` ", self.models[index].name));
                let text = rest.map_or_else(|| line.to_owned(), |rest| format!("it {rest}"));
                self.on_load_failed(index, worker, error, Some(retry_at), text)
            }
            Report::LoadFailed { error, retry_at, quarantined }
            | Report::BacksOff { error, retry_at, quarantined, .. } => {
                self.models[index].preload &= !quarantined;
                let word = if quarantined { "quarantined after repeated failed loads" } else { "its last load failed" };
                let text = format!("{word}: {}", why(&error, &self.models[index].name));
                self.on_load_failed(index, worker, error, Some(retry_at), text)
            }
            Report::DoesNotFit { error, free } => self.on_does_not_fit(index, worker, (error, free), now),
            // Its entry is gone, and that is what its jobs wait for.
            Report::Available if !self.models[index].is_listed => Vec::new(),
            Report::NoGpu => {
                self.models[index].trouble = Some(self.models[index].lacks_gpus());
                self.models[index].block_too_big();
                self.models[index].wanted_at = None;
                self.give_up(worker);
                Vec::new()
            }
            Report::Available => {
                self.models[index].forget_never_bare();
                (self.models[index].lacked, self.models[index].lack_error) = (Vec::new(), None);
                self.models[index].trouble = None;
                self.models[index].block_too_big();
                self.note_devices(index);
                Vec::new()
            }
        }
    }

    pub(super) fn on_load_failed(
        &mut self,
        index: usize,
        worker: Option<usize>,
        error: JobError,
        retry_at: Option<Millis>,
        text: String,
    ) -> Vec<Effect> {
        self.give_up(worker);
        if !self.models[index].is_listed {
            return Vec::new();
        }
        self.look_for_weights_again(index);
        let serves = self.serves(index);
        let model = &mut self.models[index];
        model.wanted_at = None;
        let told = (!serves).then(|| error.clone());
        model.trouble = Some(Trouble { reason: StateReason::ModelBlocked, error: told, text, until: retry_at });
        if serves {
            // Callers have another worker.
            return Vec::new();
        }
        self.end_callers(index, error)
    }
}

/// Why a model does not load, without saying so again.
fn why<'a>(error: &'a JobError, model: &str) -> &'a str {
    let line = first_line(&error.message);
    line.strip_prefix(&format!("model `{model}` does not load: ")).unwrap_or(line)
}
