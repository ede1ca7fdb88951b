//! The loop's side of what is done by hand: it is kept before it is answered.

use super::effects::{Ending, end_all_queued};
use super::*;
use crate::domain::Control;

impl Scheduler {
    /// Does it, and answers when what lasts of it is durable. The view shows it by then.
    pub(super) fn control(&mut self, control: Control, reply: oneshot::Sender<Result<(), StoreError>>) {
        self.apply(Event::Control(control));
        self.step();
        self.publish();
        // Asked for here, so that the order of controls is the order of commits.
        let kept = self.context.store.keep_controls(self.state.controls().clone());
        self.context.tasks.spawn("control", async move {
            let _ = reply.send(kept.await);
        });
    }

    /// Cancels waiting jobs with numbers below `before` (`None`: all that wait now), some at a time, and answers how many.
    pub(super) fn purge(
        &mut self,
        model: Option<String>,
        before: Option<i64>,
        removed: usize,
        reply: oneshot::Sender<usize>,
    ) {
        let before = before.unwrap_or(self.next_number);
        let effects = self.state.on_event(Event::Purge { model: model.clone(), before }, self.context.clock.now());
        let mut cancelled = Vec::new();
        for effect in effects {
            match effect {
                Effect::CancelQueued(numbers) => cancelled.extend(numbers),
                other => self.carry_out(vec![other]),
            }
        }
        self.changed = true;
        if cancelled.is_empty() {
            self.apply(Event::Purged { model, removed });
            self.publish();
            let _ = reply.send(removed);
            return;
        }
        let context = self.context.clone();
        self.context.tasks.spawn("purge", async move {
            let ended = end_all_queued(&context, &cancelled, &Ending::Cancelled).await;
            let removed = removed + ended;
            context.tell(Message::Purge { model, before: Some(before), removed, reply });
        });
    }

    /// Looks for waiting jobs of endpoints that an edited models.yaml does not list, before it is taken in.
    pub(super) fn prepare_reload(&self, reload: Box<Reload>, reply: oneshot::Sender<()>) {
        let edits = edits(&self.models, &reload.models);
        let edited: Vec<ModelSpec> = edits.into_iter().filter_map(|edit| edit.spec).collect();
        let (context, served) = (self.context.clone(), self.served_by(&edited));
        self.context.tasks.spawn("reload", async move {
            let unserved = unserved(&context, served).await;
            context.tell(Message::Reloaded { reload, unserved, reply });
        });
    }

    /// Waiting jobs ask for what their model did not serve. If its entry has been edited since, that says nothing.
    pub(super) fn on_unserved(&mut self, model: String, endpoints: &[String], jobs: Vec<(u8, i64)>, claimed: bool) {
        if claimed {
            jobs.iter().for_each(|(_, number)| drop(self.stops.remove(number)));
        }
        if self.models.iter().any(|spec| spec.name == model && spec.endpoints == endpoints) {
            self.apply(Event::Unserved { model, jobs, claimed });
        } else if claimed {
            let numbers = jobs.into_iter().map(|(_, number)| number).collect();
            self.apply(Event::Unclaimed { model: model.into(), numbers });
        }
    }

    /// What these models serve, as far as jobs of them wait.
    pub(super) fn served_by(&self, specs: &[ModelSpec]) -> Vec<(String, Vec<String>)> {
        let has_jobs = |spec: &&ModelSpec| {
            self.state.index_of(&spec.name).is_some_and(|index| self.state.models[index].queue.len() > 0)
        };
        specs.iter().filter(has_jobs).map(|spec| (spec.name.clone(), spec.endpoints.clone())).collect()
    }

    /// Takes an edited models.yaml in: supervisors know their new entry before anything is ordered because of it.
    pub(super) fn reload(&mut self, reload: Reload, unserved: Vec<(String, Vec<(u8, i64)>)>) {
        let Reload { models, knobs, park_bytes } = reload;
        let edits = edits(&self.models, &models);
        self.handle.edit(&models);
        self.models = models;
        for spec in edits.iter().filter_map(|edit| edit.spec.as_ref()) {
            for replica in 0..spec.max_replicas.max(1) {
                let key = (spec.name.clone(), replica);
                let start = || (self.start_worker)(spec, replica);
                self.workers.entry(key).or_insert_with(start);
            }
            handles(&self.workers, &spec.name).for_each(|worker| worker.edit(spec.clone()));
        }
        let before = self.state.outlooks();
        let said = self.state.set_knobs(knobs, park_bytes, self.context.clock.now());
        self.carry_out(said);
        let kept = edits.iter().filter(|edit| edit.spec.is_some());
        let names: Vec<String> = kept.map(|edit| edit.name.clone()).collect();
        self.apply(Event::Edited(edits));
        for (model, jobs) in unserved {
            self.apply(Event::Unserved { model, jobs, claimed: false });
        }
        self.state.tell_parking(&before);
        // What was wrong with the old entry says nothing about the new one.
        let all = names.iter().flat_map(|name| handles(&self.workers, name));
        all.for_each(|worker| worker.order(Order::Retry));
        self.let_go();
        self.step();
        self.publish();
    }

    /// Lets supervisors go that nobody needs any more.
    pub(super) fn let_go(&mut self) {
        self.workers.retain(|(model, replica), _| self.state.needs_supervisor(model, *replica));
        self.is_settled = self.workers.keys().all(|(model, replica)| {
            self.models.iter().any(|spec| spec.name == *model && *replica < spec.max_replicas.max(1))
        });
        self.handle.supervisors().clone_from(&self.workers);
    }

    /// Keeps where the devices' time went; `reply`: whoever waits for it.
    pub(super) fn keep_spent(&mut self, reply: Option<oneshot::Sender<Result<(), StoreError>>>) {
        self.keep_at = Instant::now() + KEEP_SPENT_EVERY;
        let spent = self.state.take_spent(self.context.clock.now());
        let kept = self.context.store.add_spent(spent.clone());
        let context = self.context.clone();
        self.context.tasks.spawn("keep spent", async move {
            let kept = kept.await;
            if let Err(error) = &kept {
                tracing::warn!("where the last seconds of the devices went was not stored, it is tried again: {error}");
                context.tell(Message::PutBackSpent { spent });
            }
            let _ = reply.map(|reply| reply.send(kept));
        });
    }
}
