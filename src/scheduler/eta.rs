//! When a waiting job should start, as a range: the middle is what the plan would come to (`policy::forecast`), the width
//! how well such estimates have held of late.

use std::collections::{HashMap, VecDeque};

use super::*;
use crate::policy::decision;
use crate::policy::forecast::{Forecast, forecast};
use crate::policy::view::View;

/// A forecast is used for this long while the same workers are where they were and the same models wait.
const GOOD_FOR_MS: i64 = 1_000;
/// And for this long in any case: making one takes a millisecond.
const KEPT_FOR_MS: i64 = 20;
/// Estimates whose outcome is waited for.
const ASKED_MAX: usize = 1_024;
/// Outcomes from which the width comes.
const OUTCOMES_MAX: usize = 128;
/// Of outcomes, those below and above the range.
const BELOW: f64 = 0.05;
const ABOVE: f64 = 0.95;
/// Taken for outcomes as long as there are few: ln of the wait over the estimate.
const PRIOR: [f64; 8] = [-1.2, -0.8, -0.4, -0.1, 0.1, 0.3, 0.5, 0.7];

/// The lower end of the range of a model that has not ended a job while others waited.
const UNMEASURED: f64 = -2.3;
/// Estimates of these sizes and more are as good as each other, ms.
const SIZES_MS: [i64; 3] = [10_000, 60_000, 600_000];

/// What distinguishes forecasts.
type Key = Vec<(usize, u8)>;

/// When a job should start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Expected {
    /// Hardly before.
    pub from: Millis,
    /// About then.
    pub about: Millis,
    /// Hardly later.
    pub to: Millis,
}

#[derive(Clone, Copy, Debug)]
struct Asked {
    at: Millis,
    estimate: i64,
    /// A time that is short for its model.
    unit: f64,
    kind: usize,
}

/// How far waits were from estimates, as ln of their quotient.
#[derive(Debug, Default)]
struct Spread(VecDeque<f64>);

impl Spread {
    fn count(&mut self, ratio: f64) {
        self.0.push_front(ratio);
        self.0.truncate(OUTCOMES_MAX);
    }

    fn range(&self) -> (f64, f64) {
        let mut all: Vec<f64> = self.0.iter().copied().collect();
        // As good as eight outcomes, and less beside many.
        if all.len() < 4 * PRIOR.len() {
            all.extend(PRIOR);
        }
        all.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let place = share * (all.len() - 1) as f64;
            let below = place.floor();
            let (low, high) = (all[index(below)], all[index(place.ceil())]);
            low + (high - low) * (place - below)
        };
        (at(BELOW), at(ABOVE))
    }
}

fn index(place: f64) -> usize {
    usize::try_from(round(place)).unwrap_or(0)
}

/// Forecasts, and how good they were.
#[derive(Debug, Default)]
pub(super) struct Eta {
    latest: Option<(Key, Forecast)>,
    /// By class, and by the size of the estimate.
    spreads: [Spread; 8],
    asked: HashMap<i64, Asked>,
}

impl Eta {
    /// A job whose start was estimated may have started.
    pub(super) fn started(&mut self, number: i64, now: Millis) {
        if let Some(asked) = self.asked.remove(&number) {
            let ratio = ((now - asked.at) as f64 + asked.unit) / (asked.estimate as f64 + asked.unit);
            self.spreads[asked.kind].count(ratio.ln());
        }
    }
}

impl State {
    /// When a waiting job should start; `None`: nobody knows. A forecast is made at most once a second while nothing changes
    /// hands, so that it costs little to ask for many.
    pub fn expected(&mut self, model: &str, priority: u8, number: i64, now: Millis) -> Option<Expected> {
        let index = self.index_of(model)?;
        if self.models[index].blocked().is_some() || self.models[index].held.paused {
            return None;
        }
        let ahead = self.models[index].queue.ahead_in_class(priority, number)?;
        let class = Class::of(priority);
        self.look_ahead(now, KEPT_FOR_MS);
        let about = match self.foretold(index, class, ahead, now) {
            Some(about) => about,
            None => {
                // It may be older than the job's being the first of its kind.
                self.look_ahead(now, 0);
                self.foretold(index, class, ahead, now)?
            }
        };
        let unit = self.models[index].service_ms().max(10.0);
        let estimate = (about - now).max(0);
        let size = SIZES_MS.iter().take_while(|size| estimate >= **size).count();
        let kind = usize::from(class == Class::Batch) + 2 * size;
        let (low, high) = self.eta.spreads[kind].range();
        // Nobody has seen yet how many of its jobs are done at once.
        let low = if self.models[index].has_measured_each() { low } else { low.min(UNMEASURED) };
        let at = |ln: f64| now + round(((estimate as f64 + unit) * ln.exp() - unit).max(0.0));
        let expected = Expected { from: at(low).min(about), about, to: at(high).max(about) };
        if self.eta.asked.len() >= ASKED_MAX {
            self.eta.asked.clear();
        }
        self.eta.asked.entry(number).or_insert(Asked { at: now, estimate, unit, kind });
        Some(expected)
    }

    /// Whether a job waits, delayed or not.
    pub fn waits(&self, model: &str, priority: u8, number: i64) -> bool {
        self.index_of(model).is_some_and(|index| self.models[index].queue.waits(priority, number))
    }

    /// Why a waiting job stands aside, if it does.
    pub fn why_aside(&self, model: &str, number: i64) -> Option<String> {
        let model = &self.models[self.index_of(model)?];
        let name = &model.name;
        let is_aside = model.queue.is_unserved(number);
        (is_aside && model.is_listed).then(|| {
            format!(
                "`{name}` does not serve the endpoint of this job any more: its entry in models.yaml was changed; the job waits \
                 until it is changed back, or cancel it and send it to another model"
            )
        })
    }

    /// When a job should end that should start then.
    pub fn finish_of(&self, model: &str, start: Expected) -> Expected {
        let service = self.index_of(model).map_or(0, |index| round(self.models[index].service_ms()));
        Expected { from: start.from + service, about: start.about + service, to: start.to + service }
    }

    /// Why a waiting job waits, in words: those of the latest decision about its model; if it only waits for its turn, where
    /// it stands.
    pub fn why(&self, model: &str, ahead: Option<usize>, expected: Option<Expected>, now: Millis) -> Option<String> {
        let index = self.index_of(model)?;
        let m = &self.models[index];
        if m.is_paused() {
            return Some(decision::is_paused(model, m.queue.len(), self.controls.all.paused));
        }
        if let Some(trouble) = m.blocked() {
            let word = if m.trouble.is_none() && trouble.error.is_none() { "yet" } else { "now" };
            return Some(format!("{model} cannot be loaded {word}: {}", trouble.text));
        }
        let holding = self.holding(index);
        let about = self.journal.about(model).filter(|_| holding != Holding::Serving);
        if let Some(decision) = about {
            return Some(decision.reason.clone());
        }
        let turn = match (holding, self.due(index)) {
            (Holding::Serving, _) => format!("{model} is loaded"),
            (Holding::Loading, _) => format!("{model} is being loaded"),
            (Holding::Awaiting, _) => format!("{model} is loaded once others have left its devices"),
            (_, Some(due)) if due > now => format!("{model} is due in {}", decision::seconds((due - now) as f64)),
            _ => format!("{model} is due"),
        };
        let place = ahead.map_or_else(|| "far back".to_owned(), |ahead| decision::nth(ahead + 1));
        let start = expected.map_or_else(String::new, |at| {
            let [from, to] = [at.from, at.to].map(|at| decision::short((at - now).max(0) as f64));
            format!("; expected start in {from}-{to} s")
        });
        Some(format!("job queued: {place} for {model}; {turn}{start}"))
    }

    fn foretold(&self, index: usize, class: Class, ahead: usize, now: Millis) -> Option<Millis> {
        self.eta.latest.as_ref()?.1.start(index, class, ahead, now)
    }

    /// Makes a forecast if the latest one is too old; `kept`: how old it may be if something has changed hands since, ms.
    fn look_ahead(&mut self, now: Millis, kept: i64) {
        let key = self.forecast_key();
        let is_good =
            |(of, forecast): &(Key, Forecast)| now < forecast.at() + if *of == key { GOOD_FOR_MS } else { kept };
        if !self.eta.latest.as_ref().is_some_and(is_good) {
            let (view, _) = self.view_with_places(now);
            self.eta.latest = Some((key, self.forecast_of(&view, now)));
        }
    }

    fn forecast_of(&self, view: &View, now: Millis) -> Forecast {
        let limits: Vec<u32> = self.models.iter().map(|model| model.at_once()).collect();
        forecast(view, &limits, &self.knobs, now)
    }

    fn forecast_key(&self) -> Key {
        let workers = self.workers.iter().map(|worker| {
            let phase = match worker.phase {
                Phase::Waiting { .. } => 1,
                Phase::Loading { .. } => 2,
                Phase::Serving { .. } => 3,
                Phase::Draining { .. } => 4,
                Phase::Stopping { .. } => 5,
                Phase::Parked | Phase::Dropping => 6,
            };
            (worker.model, phase)
        });
        let waiting = self.models.iter().enumerate().map(|(index, model)| {
            let (interactive, batch) = model.pending();
            (index, 8 + u8::from(interactive > 0) + 2 * u8::from(batch > 0))
        });
        workers.chain(waiting).collect()
    }
}
