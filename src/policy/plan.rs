//! Which model holds the device: one decision, with its reason in words.
//!
//! The rule, for one device (first version; method: exhaustive service with due times and holds):
//!
//! 1. A model with work keeps the device. When it is dry and another model waits, the one that is due first is next:
//!    late ones first, then by due time.
//! 2. `due(m)` = when its oldest job has waited `max_wait` of its class, but not before it was away for `again` (three
//!    times `max_wait` for interactive, once for batch) since it last left, and never before it left; or the last moment
//!    that still keeps a deadline.
//! 3. A late model (`now >= due - load`) displaces one that has work only after that one has run for its `hold`: `rush`
//!    times the price of the swap if it has batch work only and a caller waits, else `keep` times the price, at most
//!    `max_visit`. A resident that is done sooner than the swap would cost is left to finish.
//!
//! `price` = drain + stop + load of the newcomer + reload of the one displaced.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::domain::Millis;
use crate::policy::Knobs;

/// A decision of the scheduler and its reason in words.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Decision {
    /// When.
    pub at: Millis,
    /// `stay`, `load`, `swap`, `unload`, `wait` or `idle`.
    pub action: &'static str,
    /// `dry`, `hold`, `finish_first`, `not_due`, `due`, `due_interactive`, `deadline`, `fits`, `drop` or `blocked`.
    pub code: &'static str,
    /// The model it is about: the one that stays or is loaded.
    pub model: Option<String>,
    /// The model it is weighed against.
    pub other: Option<String>,
    /// One line for a person.
    pub reason: String,
    /// The figures behind it; `_s` in seconds.
    pub numbers: BTreeMap<&'static str, f64>,
}

/// What to do now.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Leave things as they are.
    Stay,
    /// The device is free: load this model.
    Load(String),
    /// Drain and stop `from`, then load `to`.
    Swap {
        /// Holds the device.
        from: String,
        /// Is next.
        to: String,
    },
    /// Stop this idle model.
    Unload(String),
}

/// The outcome of planning.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// What to do now.
    pub action: Action,
    /// Why.
    pub decision: Decision,
    /// When to plan again if nothing happens before.
    pub wake_at: Option<Millis>,
}

/// Who holds the device.
#[derive(Clone, Debug, PartialEq)]
pub enum DeviceView {
    /// Nobody.
    Empty,
    /// A worker is loading this model.
    Loading {
        /// Entry name.
        model: String,
    },
    /// A ready worker.
    Serving {
        /// Entry name.
        model: String,
        /// Since when it is ready.
        since: Millis,
        /// Since when it has nothing to do; `None` while it has.
        idle_since: Option<Millis>,
    },
    /// A worker finishes its running jobs, or stops.
    Leaving {
        /// Entry name.
        model: String,
        /// Who is next, as far as decided.
        to: Option<String>,
    },
}

/// One model as the policy sees it. Times in ms.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelView {
    /// Entry name.
    pub name: String,
    /// Waiting interactive jobs, claimable now.
    pub pending_interactive: usize,
    /// Waiting batch jobs, claimable now.
    pub pending_batch: usize,
    /// Jobs on its worker.
    pub running: usize,
    /// When the oldest waiting interactive job was accepted.
    pub oldest_interactive: Option<Millis>,
    /// The same for batch.
    pub oldest_batch: Option<Millis>,
    /// Nearest deadline of a waiting job.
    pub first_deadline: Option<Millis>,
    /// When it last lost the device.
    pub left_at: Option<Millis>,
    /// Expected load.
    pub load_ms: f64,
    /// Expected stop, device memory free.
    pub stop_ms: f64,
    /// Expected service time of one job.
    pub service_ms: f64,
    /// Expected device time per completed job while jobs wait (concurrency counted in).
    pub each_ms: f64,
    /// Arrivals per ms.
    pub rate: f64,
    /// Why it cannot be loaded now, in words; `None` if it can.
    pub trouble: Option<String>,
    /// When the trouble may be over by itself.
    pub trouble_until: Option<Millis>,
    /// To be loaded without a job, since `preload` says so and nothing else has been loaded yet.
    pub preload: bool,
    /// Unload after this long without work.
    pub idle_ttl_ms: Option<i64>,
}

impl ModelView {
    /// Waiting jobs of both classes.
    pub fn pending(&self) -> usize {
        self.pending_interactive + self.pending_batch
    }

    fn can_load(&self) -> bool {
        self.trouble.is_none()
    }

    /// When this model's turn must come. See the module's head, rule 2. `None` without waiting jobs.
    pub fn due(&self, knobs: &Knobs) -> Option<Millis> {
        let left = self.left_at.unwrap_or(0);
        let by_class = |oldest: Option<Millis>, max_wait: i64, again: i64| {
            oldest.map(|oldest| {
                let away = self.left_at.map_or(i64::MIN, |left| left + again);
                (oldest + max_wait).max(away)
            })
        };
        let interactive = millis(knobs.max_wait_interactive);
        let batch = millis(knobs.max_wait_batch);
        [
            by_class(self.oldest_interactive, interactive, 3 * interactive),
            by_class(self.oldest_batch, batch, batch),
            self.must_start(),
        ]
        .into_iter()
        .flatten()
        .min()
        .map(|due| due.max(left))
    }

    /// The last moment at which loading it still keeps its nearest deadline, with a margin of twice the work.
    fn must_start(&self) -> Option<Millis> {
        self.first_deadline.map(|deadline| deadline - round(2.0 * (self.service_ms + self.load_ms)))
    }

    /// Time until it would be dry, arrivals counted in.
    fn rest_ms(&self) -> f64 {
        let load = (self.rate * self.each_ms).min(0.9);
        self.pending() as f64 * self.each_ms / (1.0 - load) + self.drain_ms()
    }

    fn drain_ms(&self) -> f64 {
        if self.running > 0 { self.service_ms } else { 0.0 }
    }
}

/// Everything a plan depends on, besides knobs and time.
#[derive(Clone, Debug, PartialEq)]
pub struct View {
    /// Who holds the device.
    pub device: DeviceView,
    /// All models, by the order of `models.yaml`.
    pub models: Vec<ModelView>,
}

impl View {
    fn model(&self, name: &str) -> Option<&ModelView> {
        self.models.iter().find(|m| m.name == name)
    }
}

fn millis(d: std::time::Duration) -> i64 {
    i64::try_from(d.as_millis()).unwrap_or(i64::MAX / 4)
}

#[expect(clippy::cast_possible_truncation, reason = "saturates, and durations are far below 2^53 ms")]
fn round(ms: f64) -> i64 {
    ms.round() as i64
}

fn seconds(ms: f64) -> String {
    let s = ms / 1000.0;
    if s.abs() < 9.95 { format!("{s:.1} s") } else { format!("{s:.0} s") }
}

/// Decides. Pure: the same view, knobs and `now` give the same plan with the same words.
pub fn plan(view: &View, knobs: &Knobs, now: Millis) -> Plan {
    let waiting = waiting_in_order(view, knobs, now);
    match &view.device {
        DeviceView::Empty => on_empty(view, &waiting, knobs, now),
        DeviceView::Loading { model } => stay(now, "fits", model, None, format!("loading {model}"), &[], None),
        DeviceView::Leaving { model, to } => {
            let next = to.as_ref().map_or(String::new(), |to| format!(" to make room for {to}"));
            stay(now, "drop", model, to.as_deref(), format!("{model} is leaving the device{next}"), &[], None)
        }
        DeviceView::Serving { model, since, idle_since } => match view.model(model) {
            Some(resident) => on_serving(resident, *since, *idle_since, &waiting, knobs, now),
            None => stay(now, "fits", model, None, format!("{model} holds the device"), &[], None),
        },
    }
}

/// Models with waiting jobs that can be loaded, late ones first, then by due time, then by the order of the file.
fn waiting_in_order<'a>(view: &'a View, knobs: &Knobs, now: Millis) -> Vec<(&'a ModelView, Millis)> {
    let holder = match &view.device {
        DeviceView::Serving { model, .. } | DeviceView::Loading { model } => Some(model.as_str()),
        DeviceView::Empty | DeviceView::Leaving { .. } => None,
    };
    let mut waiting: Vec<_> = view
        .models
        .iter()
        .filter(|m| m.pending() > 0 && m.can_load() && Some(m.name.as_str()) != holder)
        .filter_map(|m| m.due(knobs).map(|due| (m, due)))
        .collect();
    waiting.sort_by_key(|(m, due)| (!is_late(m, *due, now), *due));
    waiting
}

fn is_late(m: &ModelView, due: Millis, now: Millis) -> bool {
    now >= due - round(m.load_ms)
}

fn on_empty(view: &View, waiting: &[(&ModelView, Millis)], knobs: &Knobs, now: Millis) -> Plan {
    if let Some((m, due)) = waiting.first() {
        let reason =
            format!("load {}: the device is free; {} pending, {}", m.name, m.pending(), due_words(m, *due, knobs, now));
        let numbers =
            [("pending", m.pending() as f64), ("load_s", m.load_ms / 1e3), ("due_in_s", (*due - now) as f64 / 1e3)];
        return act(Action::Load(m.name.clone()), now, "load", "fits", &m.name, None, reason, &numbers);
    }
    if let Some(m) = view.models.iter().find(|m| m.preload && m.can_load()) {
        let reason = format!("load {}: preload, and the device is free", m.name);
        return act(Action::Load(m.name.clone()), now, "load", "fits", &m.name, None, reason, &[]);
    }
    let blocked: Vec<_> = view.models.iter().filter(|m| m.pending() > 0).collect();
    // One that should be over is ended by a report: waking up for it would not let the loop sleep until then.
    let wake_at = blocked.iter().filter_map(|m| m.trouble_until).filter(|at| *at > now).min();
    if blocked.is_empty() {
        return still(now, "idle", "dry", None, None, "idle: nothing is pending".to_owned(), &[], None);
    }
    let each: Vec<_> = blocked
        .iter()
        .map(|m| {
            format!("{} ({} pending): {}", m.name, m.pending(), m.trouble.as_deref().unwrap_or("cannot be loaded"))
        })
        .collect();
    still(now, "wait", "blocked", None, None, format!("nothing can be loaded: {}", each.join("; ")), &[], wake_at)
}

fn on_serving(
    v: &ModelView,
    since: Millis,
    idle_since: Option<Millis>,
    waiting: &[(&ModelView, Millis)],
    knobs: &Knobs,
    now: Millis,
) -> Plan {
    if v.pending() == 0 && v.running == 0 {
        return on_dry(v, idle_since, waiting, knobs, now);
    }
    let Some((m, due)) = waiting.first().copied() else {
        let reason =
            format!("stay on {}: {} pending, {} running; no other model waits", v.name, v.pending(), v.running);
        return stay(now, "fits", &v.name, None, reason, &counts(v), None);
    };
    weigh(v, since, m, due, knobs, now)
}

fn on_dry(
    v: &ModelView,
    idle_since: Option<Millis>,
    waiting: &[(&ModelView, Millis)],
    knobs: &Knobs,
    now: Millis,
) -> Plan {
    if let Some((m, due)) = waiting.first() {
        let reason = format!(
            "swap {} -> {}: {} is dry, {}; {} pending",
            v.name,
            m.name,
            v.name,
            due_words(m, *due, knobs, now),
            m.pending()
        );
        let numbers = [("pending", m.pending() as f64), ("due_in_s", (*due - now) as f64 / 1e3)];
        let action = Action::Swap { from: v.name.clone(), to: m.name.clone() };
        return act(action, now, "swap", "dry", &m.name, Some(&v.name), reason, &numbers);
    }
    let unload_at = v.idle_ttl_ms.map(|ttl| idle_since.unwrap_or(now).saturating_add(ttl));
    if unload_at.is_some_and(|at| at <= now) {
        let reason =
            format!("unload {}: idle for {}, its idle_ttl", v.name, seconds(v.idle_ttl_ms.unwrap_or(0) as f64));
        return act(Action::Unload(v.name.clone()), now, "unload", "drop", &v.name, None, reason, &[]);
    }
    let reason = format!("stay on {}: it is idle and no other model waits", v.name);
    stay(now, "dry", &v.name, None, reason, &[], unload_at)
}

/// Rule 3: whether the late model `m` may displace `v`, which has work.
fn weigh(v: &ModelView, since: Millis, m: &ModelView, due: Millis, knobs: &Knobs, now: Millis) -> Plan {
    let drain = v.drain_ms() + v.stop_ms;
    let price = drain + m.load_ms + v.load_ms;
    let ran = (now - since) as f64;
    let rushed = m.pending_interactive > 0 && v.pending_interactive == 0 && !has_near_deadline(v, price, now);
    let hold = if rushed {
        knobs.rush() * price
    } else {
        (knobs.keep() * price).min((millis(knobs.max_visit) as f64).max(knobs.rush() * price))
    };
    let numbers = [
        ("pending", v.pending() as f64),
        ("running", v.running as f64),
        ("other_pending", m.pending() as f64),
        ("price_s", price / 1e3),
        ("drain_s", drain / 1e3),
        ("load_s", m.load_ms / 1e3),
        ("reload_s", v.load_ms / 1e3),
        ("ran_s", ran / 1e3),
        ("hold_s", hold / 1e3),
        ("rest_s", v.rest_ms() / 1e3),
        ("due_in_s", (due - now) as f64 / 1e3),
    ];
    let (vn, mn) = (&v.name, &m.name);
    if !is_late(m, due, now) {
        let wake_at = due - round(m.load_ms);
        let reason = format!(
            "stay on {vn}: {} pending, swap costs {} (drain {} + load {} + reload {}), {}",
            v.pending(),
            seconds(price),
            seconds(drain),
            seconds(m.load_ms),
            seconds(v.load_ms),
            due_words(m, due, knobs, now),
        );
        return stay(now, "not_due", vn, Some(mn), reason, &numbers, Some(wake_at));
    }
    if ran < hold {
        let reason = format!(
            "stay on {vn}: {}, {vn} has run {} of its {} hold",
            due_words(m, due, knobs, now),
            seconds(ran),
            seconds(hold)
        );
        return stay(now, "hold", vn, Some(mn), reason, &numbers, Some(since + round(hold)));
    }
    if v.rest_ms() <= price && ran < hold + price {
        let reason = format!(
            "stay on {vn}: {mn} is due, but {vn} is done in about {}, less than the {} a swap costs",
            seconds(v.rest_ms()),
            seconds(price)
        );
        return stay(now, "finish_first", vn, Some(mn), reason, &numbers, Some(since + round(hold + price)));
    }
    let by_deadline = m.must_start().is_some_and(|at| at <= due);
    let (code, why) = if rushed {
        (
            "due_interactive",
            format!(
                "{}, {vn} has batch work only and has run {} >= {}",
                due_words(m, due, knobs, now),
                seconds(ran),
                seconds(hold)
            ),
        )
    } else if by_deadline {
        ("deadline", format!("a deadline of {mn} is near; {vn} has run {} >= {}", seconds(ran), seconds(hold)))
    } else {
        (
            "due",
            format!("{}, {vn} has run {} >= its {} hold", due_words(m, due, knobs, now), seconds(ran), seconds(hold)),
        )
    };
    let action = Action::Swap { from: vn.clone(), to: mn.clone() };
    act(action, now, "swap", code, mn, Some(vn), format!("swap {vn} -> {mn}: {why}"), &numbers)
}

fn has_near_deadline(v: &ModelView, price: f64, now: Millis) -> bool {
    v.must_start().is_some_and(|at| at <= now + round(2.0 * price))
}

fn due_words(m: &ModelView, due: Millis, knobs: &Knobs, now: Millis) -> String {
    let oldest = match (m.oldest_interactive, m.oldest_batch) {
        (Some(at), _) => Some(("caller waits", at, knobs.max_wait_interactive)),
        (None, Some(at)) => Some(("its oldest job waits", at, knobs.max_wait_batch)),
        (None, None) => None,
    };
    let wait = oldest.map_or(String::new(), |(who, at, of)| {
        format!(" ({who} {} of {})", seconds((now - at) as f64), seconds(millis(of) as f64))
    });
    if due <= now {
        format!("{} is due{wait}", m.name)
    } else {
        format!("{} is due in {}{wait}", m.name, seconds((due - now) as f64))
    }
}

fn counts(v: &ModelView) -> [(&'static str, f64); 2] {
    [("pending", v.pending() as f64), ("running", v.running as f64)]
}

#[expect(clippy::too_many_arguments, reason = "one record, spelled out once")]
fn act(
    action: Action,
    at: Millis,
    verb: &'static str,
    code: &'static str,
    model: &str,
    other: Option<&str>,
    reason: String,
    numbers: &[(&'static str, f64)],
) -> Plan {
    let mut plan = still(at, verb, code, Some(model), other, reason, numbers, None);
    plan.action = action;
    plan
}

fn stay(
    at: Millis,
    code: &'static str,
    model: &str,
    other: Option<&str>,
    reason: String,
    numbers: &[(&'static str, f64)],
    wake_at: Option<Millis>,
) -> Plan {
    still(at, "stay", code, Some(model), other, reason, numbers, wake_at)
}

#[expect(clippy::too_many_arguments, reason = "one record, spelled out once")]
fn still(
    at: Millis,
    verb: &'static str,
    code: &'static str,
    model: Option<&str>,
    other: Option<&str>,
    reason: String,
    numbers: &[(&'static str, f64)],
    wake_at: Option<Millis>,
) -> Plan {
    let decision = Decision {
        at,
        action: verb,
        code,
        model: model.map(str::to_owned),
        other: other.map(str::to_owned),
        reason,
        numbers: numbers.iter().copied().collect(),
    };
    Plan { action: Action::Stay, decision, wake_at }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
