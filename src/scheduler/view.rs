//! What the loop publishes: how the queue and each model stand.

use super::*;

impl Scheduler {
    pub(super) fn publish(&mut self) {
        self.view_at = None;
        self.view.send_replace(Arc::new(self.queue_view()));
    }

    fn queue_view(&self) -> QueueView {
        let state = &self.state;
        let now = self.context.clock.now();
        QueueView {
            queued: state.queued(),
            running: state.models.iter().map(Model::under_way).sum(),
            decision: state.decision.clone(),
            history: state.history.iter().cloned().collect(),
            swaps: state.swaps,
            swaps_in_arrival_order: state.swaps_in_arrival_order,
            overload: state.overload(now),
            paused: state.controls().all.paused,
            draining: state.controls().all.draining,
            models: (0..state.models.len())
                .filter(|index| state.is_known(*index))
                .map(|index| self.model_view(index, now))
                .collect(),
        }
    }

    fn model_view(&self, index: usize, now: Millis) -> ModelQueueView {
        let model = &self.state.models[index];
        let holding = self.state.holding(index);
        let lacks_gpus = model.trouble.as_ref().is_some_and(|trouble| trouble.reason == StateReason::NoGpu);
        let fetch = model.lack.as_ref().and_then(|lack| lack.fetch.as_ref()).filter(|_| holding == Holding::Nothing);
        let state = match (holding, fetch) {
            (Holding::Draining, _) => ModelState::Draining,
            (Holding::Nothing, _) if lacks_gpus => ModelState::Blocked,
            (_, Some(fetch)) if fetch.phase == FetchPhase::Failed => ModelState::Backoff,
            (_, Some(_)) => ModelState::Fetching,
            _ => match state_of(handles(&self.workers, &model.name).map(|worker| worker.view().state)) {
                // It did not fit, and is tried once more when others have made room.
                ModelState::Blocked if model.blocked().is_none() => ModelState::Absent,
                state => state,
            },
        };
        let has_begun = |lack: &&Lack| lack.fetch.is_some();
        let lack = model.lack.as_ref().filter(has_begun).map(|lack| &lack.trouble);
        let reason = match model.trouble.as_ref().or(lack) {
            _ if model.is_paused() => Some(StateReason::Paused),
            Some(trouble) => Some(trouble.reason),
            None if holding == Holding::Loading => Some(StateReason::ModelLoading),
            None => None,
        };
        // What is on its way is no trouble.
        let trouble = model.trouble.as_ref().or(lack).filter(|trouble| trouble.reason != StateReason::ModelFetching);
        let failed_fetch = model.lack.as_ref().and_then(|lack| lack.failure.clone());
        let fetch_ms = fetch.and_then(|fetch| fetch.eta_s).map(|left| left * 1e3);
        let is_expected = model.blocked().is_none() || (trouble.is_none() && fetch_ms.is_some());
        let resident = matches!(holding, Holding::Serving | Holding::Draining);
        let oldest = [Class::Interactive, Class::Batch].into_iter().filter_map(|class| model.queue.oldest(class)).min();
        let backlog = model.queue.len() as f64 * model.each_ms();
        let load_ms = self.state.load_ms(index);
        let wait = if resident { backlog } else { backlog + load_ms + fetch_ms.unwrap_or(0.0) };
        ModelQueueView {
            model: model.name.to_string(),
            queued: model.queue.len(),
            queued_interactive: model.queue.pending().0,
            running: model.under_way(),
            oldest_age_s: oldest.map(|at| (now - at) as f64 / 1e3),
            resident,
            est_wait_s: (is_expected && !model.held.paused).then_some(wait / 1e3),
            swap_cost_s: (load_ms + model.stop_ms()) / 1e3,
            due_at: self.state.due(index),
            state,
            state_reason: reason,
            trouble: trouble.map(|t| t.text.clone()),
            last_failure: failed_fetch
                .or_else(|| last_failure(handles(&self.workers, &model.name).map(WorkerHandle::view))),
            fetch: fetch.cloned(),
            paused: model.held.paused,
            draining: model.held.draining,
            pinned: model.is_pinned(),
            batching: model.batching.shapes(),
            parking: self.state.parking(index),
        }
    }
}

/// Why the last load of a model failed, if none of its workers has got ready since.
fn last_failure(mut workers: impl Iterator<Item = WorkerView>) -> Option<String> {
    workers.find_map(|view| view.last_failure)
}

/// Where a model is whose workers are there: as far as the one that is nearest to serving, or else in the worst trouble.
fn state_of(workers: impl Iterator<Item = ModelState>) -> ModelState {
    let rank = |state: &ModelState| match state {
        ModelState::Resident => 0,
        ModelState::Waking => 1,
        ModelState::Loading => 2,
        ModelState::Fetching => 3,
        ModelState::Draining => 4,
        ModelState::Parking => 5,
        ModelState::Parked => 6,
        ModelState::Quarantined => 7,
        ModelState::Backoff => 8,
        ModelState::Blocked => 9,
        ModelState::Absent => 10,
    };
    workers.min_by_key(rank).unwrap_or(ModelState::Blocked)
}
