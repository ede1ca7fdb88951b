//! What a swap costs, and how long a resident with work is left alone though another model is late.
//!
//! `price` = drain + load of the newcomer + reload of the one displaced: time in which the devices make nothing.
//! `hold`  = `rush` prices if the resident has batch work only, far from its deadline, and a caller waits for the newcomer;
//! else `keep` prices, at most `max_visit`. A resident that is done sooner than the swap would cost is left to finish, for
//! one price at most.
//!
//! A resident that has just gone dry is left for a moment if its next job is expected sooner than the swap would take: a
//! caller who sends one request after the other would else cost two swaps for each.

use crate::domain::Millis;
use crate::policy::Knobs;
use crate::policy::due::Due;
use crate::policy::view::{ModelView, Phase, View, WorkerView, millis, round, round_up};

/// Highest share of its time that a model is taken to be kept busy by new arrivals.
const BUSY_MAX: f64 = 0.9;
/// A dry resident is kept if its next jobs, one at a time, come in less than this part of the price.
const LINGER_SHARE: f64 = 0.25;
/// It is kept for this many times the expected gap.
const LINGER_GAPS: f64 = 2.0;
/// And for this long at least, in ms: a next request takes a moment even without any think time.
const LINGER_MIN_MS: f64 = 50.0;

/// A swap's cost in ms.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Price {
    /// Running jobs end, and the worker stops.
    pub drain_ms: f64,
    /// The newcomer loads.
    pub load_ms: f64,
    /// The one displaced loads again.
    pub reload_ms: f64,
}

impl Price {
    /// All of it.
    pub fn ms(self) -> f64 {
        self.drain_ms + self.load_ms + self.reload_ms
    }
}

/// What stands between a late model and a resident.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Weighed {
    /// The swap's cost.
    pub price: Price,
    /// How long the resident is left alone, ms.
    pub hold_ms: f64,
    /// How long it has run, ms.
    pub ran_ms: f64,
    /// Time until it is dry, ms.
    pub rest_ms: f64,
    /// The resident has batch work only and a caller waits.
    pub rushed: bool,
}

/// Time until the running jobs have ended and the memory is free.
pub fn drain_ms(view: &View, worker: &WorkerView) -> f64 {
    let model = view.model_of(worker);
    model.stop_ms + if worker.running > 0 { model.service_ms } else { 0.0 }
}

/// Time until its model would be dry, arrivals counted in.
pub fn rest_ms(view: &View, worker: &WorkerView) -> f64 {
    let model = view.model_of(worker);
    let busy = (model.rate * model.each_ms).min(BUSY_MAX);
    model.pending() as f64 * model.each_ms / (1.0 - busy) + drain_ms(view, worker)
}

/// What it costs to put `m` in the place of `worker`.
pub fn price(view: &View, worker: &WorkerView, m: &ModelView) -> Price {
    let reload_ms = view.model_of(worker).reload_ms;
    Price { drain_ms: drain_ms(view, worker), load_ms: m.load_ms, reload_ms }
}

/// Weighs a resident with work against a late model.
pub fn weigh(view: &View, worker: &WorkerView, m: &ModelView, knobs: &Knobs, now: Millis) -> Weighed {
    let v = view.model_of(worker);
    let price = price(view, worker, m);
    let far = v.must_start().is_none_or(|at| at > now + round(2.0 * price.ms()));
    let batch_alone = v.pending_interactive == 0 && worker.callers == 0;
    let rushed = m.pending_interactive > 0 && batch_alone && far;
    let hold_ms = if rushed {
        knobs.rush() * price.ms()
    } else {
        (knobs.keep() * price.ms()).min((millis(knobs.max_visit) as f64).max(knobs.rush() * price.ms()))
    };
    Weighed { price, hold_ms, ran_ms: (now - worker.since) as f64, rest_ms: rest_ms(view, worker), rushed }
}

impl Weighed {
    /// When the resident makes room for the late model, if nothing changes.
    pub fn yields_at(&self, worker: &WorkerView, now: Millis) -> Millis {
        let held = worker.since + round_up(self.hold_ms);
        if self.rest_ms > self.price.ms() {
            return held.max(now);
        }
        let finished = now + round(self.rest_ms);
        held.max(now).max(finished.min(worker.since + round_up(self.hold_ms + self.price.ms())))
    }
}

/// Until when a dry resident is kept in the hope of its next job, though `m` waits.
pub fn lingers_until(view: &View, worker: &WorkerView, m: &ModelView) -> Option<Millis> {
    let (v, since) = (view.model_of(worker), worker.idle_since?);
    let gap = v.gap_ms?;
    let swap = m.load_ms + v.reload_ms;
    if gap.max(1.0) * v.group.max(1.0) > LINGER_SHARE * swap {
        return None;
    }
    Some(since + round((LINGER_GAPS * gap).max(LINGER_MIN_MS).min(LINGER_SHARE * swap)))
}

/// When a worker makes room for a model, if nothing changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Yields {
    /// While another worker of its own model stays.
    pub at: Millis,
    /// As the last of its model to leave: not before `at`.
    pub last_at: Millis,
}

/// When a worker makes room for `m`; `None`: never, or it leaves already. `due`: of `m`.
pub fn yields(view: &View, worker: &WorkerView, m: &ModelView, due: Due, knobs: &Knobs, now: Millis) -> Option<Yields> {
    if view.model_of(worker).pin || worker.phase == Phase::Leaving {
        return None;
    }
    let load = match worker.phase {
        Phase::Serving => None,
        Phase::Loading { until } => Some(until.max(now)),
        _ => Some(now + view.model_of(worker).load()),
    };
    if let Some(ready) = load {
        let weighed = weigh(view, &WorkerView { since: ready, ..worker.clone() }, m, knobs, now);
        let at = ready + round_up(weighed.hold_ms);
        let at = worker.guest_until.map_or(at, |until| at.min(until.max(ready)));
        // Never now: a load is not broken off.
        let at = at.max(now + 1);
        return Some(Yields { at, last_at: at });
    }
    let late_at = (due.at - m.load()).max(now);
    let last_at = if view.has_work(worker) {
        weigh(view, worker, m, knobs, now).yields_at(worker, now).max(late_at)
    } else {
        let weighed = weigh(view, worker, m, knobs, now);
        let early = late_at.max(worker.since + round_up(weighed.hold_ms));
        lingers_until(view, worker, m).map_or(now, |until| until.min(early).max(now))
    };
    let last_at = worker.guest_until.map_or(last_at, |until| last_at.min(until.max(late_at)));
    let is_replica = view.has_work(worker) && view.serving_of(worker.model) > 1;
    Some(Yields { at: if is_replica { now } else { last_at }, last_at })
}
