//! Models whose weights are not here: they are asked for when somebody wants the model, and it is neither loaded nor given a
//! device before they have come. What is no trouble of a load counts as none: no failed load, no sample of its time.

use std::collections::BTreeSet;

use super::*;
use crate::domain::worker::{Fetch, FetchPhase, FetchReport};
use crate::policy::decision;

/// How far somebody has got with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// To be asked for when the model is wanted.
    Unasked,
    /// Somebody looks for them, and fetches them if they are not here.
    Asked,
    /// They cannot be had now.
    Failed,
    /// Their fetch was ended by hand; to be asked for when the model is wanted again.
    Ended,
}

/// That a model's weights are not known to be here.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::scheduler) struct Lack {
    stage: Stage,
    /// How far the fetch is or was; `None`: nobody has begun.
    pub(in crate::scheduler) fetch: Option<Fetch>,
    /// What that means for the model's jobs.
    pub(in crate::scheduler) trouble: Trouble,
    /// Why the last try to fetch them failed; that it is tried again does not end it, bytes that come do.
    pub(in crate::scheduler) failure: Option<String>,
}

impl Lack {
    fn unasked() -> Self {
        Self::at(Stage::Unasked, None)
    }

    fn at(stage: Stage, fetch: Option<Fetch>) -> Self {
        let (reason, text) = match &fetch {
            None => (StateReason::WaitingForModel, "its weights are being looked for".to_owned()),
            Some(fetch) => (StateReason::ModelFetching, in_words(fetch)),
        };
        let failure = fetch.as_ref().and_then(|fetch| match (fetch.phase, fetch.reason.as_deref()?) {
            (FetchPhase::Fetching, why) => Some(format!("its weights do not come now: {}", first_line(why))),
            (_, why) => Some(last_try(why)),
        });
        Self { stage, fetch, trouble: Trouble { reason, error: None, text, until: None }, failure }
    }

    /// `before`: why the try before it failed.
    fn after(mut self, before: Option<String>) -> Self {
        let comes = self.fetch.as_ref().is_some_and(|fetch| fetch.phase == FetchPhase::Fetching);
        self.failure = self.failure.or(before.filter(|_| !comes));
        self
    }

    /// `told`: what callers on the line are refused with.
    fn failed(fetch: Fetch, told: Option<JobError>, error: &JobError) -> Self {
        let why = fetch.reason.as_deref().unwrap_or(&error.message);
        let text = format!("its weights cannot be fetched: {}", first_line(why));
        let (until, failure) = (fetch.retry_at, Some(last_try(why)));
        let trouble = Trouble { reason: StateReason::ModelBlocked, error: told, text, until };
        Self { stage: Stage::Failed, fetch: Some(fetch), trouble, failure }
    }

    /// Their fetch was ended by hand.
    fn ended(&self) -> Self {
        let so_far = self.fetch.as_ref().map(|fetch| format!(" at {}", so_far(fetch))).unwrap_or_default();
        let text =
            format!("the fetch of its weights was ended by hand{so_far}; it goes on from there when it is wanted");
        let trouble = Trouble { reason: StateReason::WaitingForModel, error: None, text, until: None };
        Self { stage: Stage::Ended, fetch: None, trouble, failure: self.failure.clone() }
    }

    /// Whether somebody is to be asked for them when the model is wanted.
    fn is_to_be_asked(&self) -> bool {
        matches!(self.stage, Stage::Unasked | Stage::Ended)
    }

    /// Whether nothing can be done about it now.
    pub(in crate::scheduler) fn has_failed(&self) -> bool {
        self.stage == Stage::Failed
    }
}

fn last_try(why: &str) -> String {
    format!("the last try to fetch its weights failed: {}", first_line(why))
}

/// How much has come.
#[expect(clippy::cast_precision_loss, reason = "sizes are far below 2^52 bytes")]
fn so_far(fetch: &Fetch) -> String {
    match (fetch.total_bytes, fetch.percent) {
        (Some(total), Some(percent)) => {
            format!("{:.2} of {:.2} GB ({percent:.0} %)", fetch.bytes as f64 / 1e9, total as f64 / 1e9)
        }
        _ => "size not known yet".to_owned(),
    }
}

/// How far it is, for a person.
fn in_words(fetch: &Fetch) -> String {
    let so_far = so_far(fetch);
    let trouble = fetch.reason.as_deref().map(|reason| format!("; last trouble: {reason}")).unwrap_or_default();
    match fetch.phase {
        FetchPhase::Waiting => "its weights are not here, and are fetched after those of another model".to_owned(),
        FetchPhase::Listing => {
            format!("its weights are being fetched: the hub is asked which files there are{trouble}")
        }
        FetchPhase::Fetching => {
            let speed = fetch.bytes_per_s.map(|speed| format!(", {:.1} MB/s", speed / 1e6)).unwrap_or_default();
            let left = fetch.eta_s.map(|left| format!(", about {} left", decision::seconds(left * 1e3)));
            format!("its weights are being fetched: {so_far}{speed}{}{trouble}", left.unwrap_or_default())
        }
        FetchPhase::Interrupted | FetchPhase::Failed => {
            let why = fetch.reason.as_deref().unwrap_or("no reason is known");
            format!("the fetch of its weights was interrupted at {so_far} and goes on by itself: {why}")
        }
    }
}

impl State {
    /// Models whose weights were not found: they are asked for before they are loaded.
    #[must_use]
    pub fn without_weights(mut self, missing: &BTreeSet<String>) -> Self {
        let lack = |model: &&mut Model| missing.contains(&*model.name);
        self.models.iter_mut().filter(lack).for_each(|model| model.lack = Some(Lack::unasked()));
        self
    }

    /// A load has failed, which may be since files of it have been deleted, or its entry is another one now.
    pub(super) fn look_for_weights_again(&mut self, index: usize) {
        let model = &mut self.models[index];
        if model.fetches.is_some() && model.lack.is_none() {
            model.lack = Some(Lack::unasked());
        }
    }

    /// Asks for the weights of models that are wanted and could otherwise be loaded, now or when a pause is over.
    pub(super) fn ask_for_weights(&mut self, effects: &mut Vec<Effect>) {
        if self.stopping {
            return;
        }
        for model in &mut self.models {
            let is_wanted = model.pending() != (0, 0) || model.preload || model.wanted_at.is_some();
            let has_place = model.too_big.is_none()
                && model.trouble.as_ref().is_none_or(|trouble| trouble.reason != StateReason::NoGpu);
            if let Some(lack) = model.lack.as_mut().filter(|lack| lack.is_to_be_asked() && is_wanted && has_place) {
                *lack = Lack::at(Stage::Asked, lack.fetch.take()).after(lack.failure.take());
                model.want += 1;
                effects.push(Effect::Fetch { model: model.name.to_string(), want: model.want });
            }
        }
    }

    /// Ends the fetch of a model's weights, if it goes on or is to; the answer: where it was, for a person.
    pub(super) fn end_fetch(&mut self, index: usize, effects: &mut Vec<Effect>) -> Option<String> {
        let model = &mut self.models[index];
        let lack = model.lack.as_mut().filter(|lack| lack.stage == Stage::Asked)?;
        *lack = lack.ended();
        // What is on its way is of a want that is no more.
        model.want += 1;
        effects.push(Effect::EndFetch { model: model.name.to_string() });
        Some(lack.trouble.text.clone())
    }

    /// The fetching task says something about a want. That a person asked for a retry is of no want.
    pub(super) fn on_fetch(&mut self, model: &str, want: u64, report: FetchReport) -> Vec<Effect> {
        let Some(index) = self.index_of(model) else { return Vec::new() };
        let serves = self.serves(index);
        let model = &mut self.models[index];
        let is_late = want != model.want && report != FetchReport::Forgiven;
        if model.fetches.is_none() || is_late {
            // Of an entry or a want that is no more.
            return Vec::new();
        }
        let before = model.lack.as_ref().and_then(|lack| lack.failure.clone());
        match report {
            FetchReport::Here => model.lack = None,
            FetchReport::Progress(fetch) => model.lack = Some(Lack::at(Stage::Asked, Some(fetch)).after(before)),
            FetchReport::Available => {
                if model.lack.as_ref().is_some_and(Lack::has_failed) {
                    model.lack = Some(Lack::unasked().after(before));
                }
            }
            FetchReport::Forgiven => model.lack.iter_mut().for_each(|lack| lack.failure = None),
            FetchReport::Failed { fetch, error } => {
                // A `preload` is asked for again when the pause is over.
                model.wanted_at = None;
                model.lack = Some(Lack::failed(fetch, (!serves).then(|| error.clone()), &error));
                // Else callers have a worker.
                if !serves {
                    return self.end_callers(index, error);
                }
            }
        }
        Vec::new()
    }

    /// Whoever is on the line for this model is told why it does not come.
    pub(super) fn end_callers(&mut self, index: usize, error: JobError) -> Vec<Effect> {
        let callers = self.models[index].queue.take_sync();
        callers.iter().for_each(|job| self.forget_tenant(&job.tenant));
        let numbers: Vec<i64> = callers.into_iter().map(|job| job.number).collect();
        if numbers.is_empty() { Vec::new() } else { vec![Effect::EndQueued { numbers, error, overdue: false }] }
    }
}
