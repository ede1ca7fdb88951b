//! The loop's side of what is done by hand: it is kept before it is answered.

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
