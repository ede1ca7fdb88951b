//! What is done by hand: pausing, draining, purging, loading and unloading, pins.

use super::*;
use crate::domain::{Control, Controls};
use crate::scheduler::inventory::Phase;

/// Waiting jobs taken out at once by a purge: the loop has others to serve.
const PURGED_AT_ONCE: usize = 4_096;
/// The code of what is done by hand.
const MANUAL: &str = "manual";

impl State {
    /// With what was said by hand in earlier runs.
    #[must_use]
    pub fn with_controls(mut self, controls: &Controls) -> Self {
        self.controls = controls.clone();
        self.models.iter_mut().for_each(|model| model.held = controls.of(&model.name));
        self
    }

    /// What was said by hand and holds.
    pub fn controls(&self) -> &Controls {
        &self.controls
    }

    /// Whether new jobs of this model are refused, since it, or all, is being drained by hand.
    pub fn is_draining(&self, model: &str) -> bool {
        self.controls.of(model).draining
    }

    pub(super) fn on_control(&mut self, control: &Control, now: Millis) -> Vec<Effect> {
        let (before, pins) = (self.controls.clone(), self.pins());
        self.controls.take(control);
        for model in &mut self.models {
            let was_paused = model.held.paused;
            model.held = self.controls.of(&model.name);
            if was_paused && !model.held.paused {
                model.resume(now);
            }
        }
        self.note_pins(&pins);
        let mut effects = Vec::new();
        let acts = match control {
            Control::Load(model) => self.load_by_hand(model, now),
            Control::Unload(model) => self.unload_by_hand(model, now, &mut effects),
            _ => self.controls != before,
        };
        if acts {
            self.announce(self.by_hand(control, now), &mut effects);
        }
        effects
    }

    /// False: it is there, or on its way, or cannot be loaded.
    fn load_by_hand(&mut self, model: &str, now: Millis) -> bool {
        let Some(index) = self.index_of(model) else { return false };
        let is_there = self.workers.iter().any(|worker| worker.model == index && worker.stays());
        let model = &mut self.models[index];
        if is_there || model.trouble.is_some() || model.lack.as_ref().is_some_and(Lack::has_failed) {
            return false;
        }
        (model.unload, model.wanted_at) = (false, Some(now));
        true
    }

    /// Ends a fetch of its weights, too. False: nothing of it is there.
    fn unload_by_hand(&mut self, model: &str, now: Millis, effects: &mut Vec<Effect>) -> bool {
        let Some(index) = self.index_of(model) else { return false };
        (self.models[index].wanted_at, self.models[index].preload) = (None, false);
        if let Some(text) = self.end_fetch(index, effects) {
            let decision = Decision::new(now, "unload", MANUAL, format!("unload {model}: {text}"));
            self.announce(Decision { model: Some(model.to_owned()), ..decision }, effects);
        }
        self.unload(index, now, effects)
    }

    /// All workers of a model leave and are stopped, not parked, and loads of it are broken off; until then none is loaded.
    /// False: nothing of it is there.
    pub(super) fn unload(&mut self, index: usize, now: Millis, effects: &mut Vec<Effect>) -> bool {
        self.workers.retain(|w| w.model != index || w.phase != Phase::Waiting { was_parked: false });
        let all: Vec<usize> = (0..self.workers.len()).filter(|place| self.workers[*place].model == index).collect();
        self.models[index].unload = !all.is_empty();
        for place in &all {
            match self.workers[*place].phase {
                Phase::Parked | Phase::Waiting { .. } => {
                    self.workers[*place].phase = Phase::Dropping;
                    effects.push(self.order(*place, Order::Stop));
                }
                Phase::Loading { .. } => {
                    self.workers[*place].phase = Phase::Stopping { park: false };
                    effects.push(self.order(*place, Order::Stop));
                }
                _ => self.leave(*place, false, now, effects),
            }
        }
        !all.is_empty()
    }

    /// Whether all workers of this model are to leave, and to be stopped, before another one is loaded.
    pub(super) fn is_unloaded(&self, index: usize) -> bool {
        self.models[index].unload
    }

    /// Whether a worker that leaves is to be stopped, and not parked.
    pub(super) fn must_end(&self, place: usize) -> bool {
        let worker = &self.workers[place];
        worker.is_outdated || self.is_unloaded(worker.model)
    }

    /// A worker has left: what was asked for by hand may be done.
    pub(super) fn note_unloaded(&mut self, index: usize) {
        if !self.workers.iter().any(|worker| worker.model == index) {
            self.models[index].unload = false;
        }
    }

    /// Takes out waiting jobs with numbers below `before`, a part of them at a time.
    pub(super) fn on_purge(&mut self, model: Option<&str>, before: i64) -> Vec<Effect> {
        let mut numbers = Vec::new();
        for index in 0..self.models.len() {
            if model.is_none_or(|model| *model == *self.models[index].name) {
                let jobs = self.models[index].queue.take_before(before, PURGED_AT_ONCE - numbers.len());
                jobs.iter().for_each(|job| self.forget_tenant(&job.tenant));
                numbers.extend(jobs.into_iter().map(|job| job.number));
            }
        }
        if numbers.is_empty() { Vec::new() } else { vec![Effect::CancelQueued(numbers)] }
    }

    #[expect(clippy::cast_precision_loss, reason = "jobs are far below 2^52")]
    pub(super) fn on_purged(&mut self, model: Option<&str>, removed: usize, now: Millis) -> Vec<Effect> {
        let mut effects = Vec::new();
        let whose = model.map_or("all models".to_owned(), str::to_owned);
        let jobs = if removed == 1 { "1 waiting job was".to_owned() } else { format!("{removed} waiting jobs were") };
        let reason = format!("purge {whose}: {jobs} cancelled by hand");
        let decision = Decision::new(now, "purge", MANUAL, reason).with(&[("removed", removed as f64)]);
        self.announce(Decision { model: model.map(str::to_owned), ..decision }, &mut effects);
        effects
    }

    fn by_hand(&self, control: &Control, now: Millis) -> Decision {
        let is_gone = |model: &str| self.index_of(model).is_none_or(|index| !self.models[index].is_listed);
        let whole = |scope: &Option<String>| scope.clone().unwrap_or_else(|| "all models".to_owned());
        let (model, reason) = match control {
            Control::Pause(scope) => {
                (scope.as_ref(), format!("pause {}: no waiting job starts until a resume", whole(scope)))
            }
            Control::Resume(Some(model)) if is_gone(model) => {
                (Some(model), format!("resume {model}: its jobs wait until it is in models.yaml again"))
            }
            Control::Resume(scope) => {
                (scope.as_ref(), format!("resume {}: jobs are accepted and start again", whole(scope)))
            }
            Control::Drain(scope) => (
                scope.as_ref(),
                format!(
                    "drain {}: new jobs are refused until a resume, those that are there are finished",
                    whole(scope)
                ),
            ),
            Control::Load(model) => (Some(model), format!("load {model}: it was asked for by hand, and is due now")),
            Control::Unload(model) => {
                (Some(model), format!("unload {model}: by hand, when its running jobs have ended"))
            }
            Control::Pin(model) => (Some(model), format!("pin {model}: by hand, no other model displaces it")),
            Control::Unpin(model) => (Some(model), format!("unpin {model}: by hand, other models may displace it")),
        };
        let decision = Decision::new(now, control.as_str(), MANUAL, reason);
        Decision { model: model.cloned(), ..decision }
    }
}
