//! Decisions and their reasons: one record and one sentence for each.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::domain::{GpuSet, Millis, resume_command};
use crate::policy::Knobs;
use crate::policy::due::{Due, Why};
use crate::policy::hold::Weighed;
use crate::policy::view::{ModelView, Reservation, View, WorkerView, millis};

/// A decision of the scheduler and its reason in words.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Decision {
    /// When.
    pub at: Millis,
    /// The GPUs it is about; empty: none in particular, or not GPUs.
    pub gpus: Vec<u32>,
    /// `stay`, `load`, `swap`, `reserve`, `park`, `drop`, `unload`, `wait`, `refuse`, `batch` or `idle`; by hand also `pause`,
    /// `resume`, `drain`, `purge`, `pin` and `unpin`.
    pub action: &'static str,
    /// `dry`, `hold`, `finish_first`, `linger`, `not_due`, `due`, `due_interactive`, `deadline`, `guest`, `reserved`,
    /// `replica`, `fits`, `park`, `drop`, `blocked`, `too_big`, `paused`, `overloaded`, `batch`, `worker_oom`, `no_room`
    /// or `manual`.
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

impl Decision {
    /// A decision about nobody yet.
    pub fn new(at: Millis, action: &'static str, code: &'static str, reason: String) -> Self {
        Self { at, gpus: Vec::new(), action, code, model: None, other: None, reason, numbers: BTreeMap::new() }
    }

    /// Names the model.
    #[must_use]
    pub fn of(mut self, model: &str) -> Self {
        self.model = Some(model.to_owned());
        self
    }

    /// Names the other one.
    #[must_use]
    pub fn against(mut self, other: &str) -> Self {
        self.other = Some(other.to_owned());
        self
    }

    /// Names the GPUs.
    #[must_use]
    pub fn on(mut self, view: &View, set: GpuSet) -> Self {
        self.gpus = set.gpus().filter(|gpu| *gpu < view.gpus).collect();
        self
    }

    /// Adds figures.
    #[must_use]
    pub fn with(mut self, numbers: &[(&'static str, f64)]) -> Self {
        self.numbers.extend(numbers.iter().copied());
        self
    }

    /// Whether it starts or ends something.
    pub fn is_change(&self) -> bool {
        matches!(self.action, "load" | "swap" | "unload" | "park" | "drop")
    }

    /// Whether something is done, by the policy or by hand, and not only said.
    pub fn is_done(&self) -> bool {
        !matches!(self.action, "stay" | "wait" | "reserve" | "refuse" | "idle")
    }

    /// Whether it only tells how things are: nothing is done, and nobody is made to wait.
    pub fn is_status(&self) -> bool {
        self.action == "idle" || (self.action == "stay" && (self.other.is_none() || self.code == "drop"))
    }

    /// The models whose waiting jobs it tells why they wait, or wait no longer.
    pub fn explains(&self) -> impl Iterator<Item = &str> {
        let (model, other) = match self.action {
            "stay" => (None, self.other.as_deref()),
            "swap" => (self.model.as_deref(), self.other.as_deref()),
            "wait" | "reserve" | "load" => (self.model.as_deref(), None),
            _ => (None, None),
        };
        model.into_iter().chain(other)
    }
}

/// A job of a model that no device of this box could ever hold.
pub fn too_big(view: &View, model: usize, now: Millis) -> Decision {
    let m = &view.models[model];
    let on_gpus = m.gpus > 0;
    let there = if on_gpus { ..view.gpus as usize } else { ..view.devices.len() };
    let largest = view.devices[there].iter().copied().max().unwrap_or(0);
    let (needs, has) = match (on_gpus, m.bytes) {
        (false, _) => (format!("{} of memory", gib(m.bytes.unwrap_or(0))), gib(largest)),
        (true, None) => (gpus(m.gpus), view.gpus.to_string()),
        (true, Some(bytes)) if m.gpus == 1 => {
            (format!("a GPU with {}", gib(bytes)), format!("{} of at most {}", gpus(view.gpus), gib(largest)))
        }
        (true, Some(bytes)) => (
            format!("{} with {} each", gpus(m.gpus), gib(bytes)),
            format!("{} of at most {}", gpus(view.gpus), gib(largest)),
        ),
    };
    let reason = format!(
        "{} can never be loaded: it needs {needs}, and this box has {has}; use a larger box, or lower `gpus` or `memory` of \
         the model in models.yaml",
        m.name
    );
    Decision::new(now, "refuse", "too_big", reason).of(&m.name).with(&[
        ("gpus", f64::from(m.gpus)),
        ("gib", in_gib(m.bytes.unwrap_or(0))),
        ("box_gpus", f64::from(view.gpus)),
        ("box_gib", in_gib(largest)),
    ])
}

/// A model whose own workers, or the last of them, have to leave before one is loaded.
pub fn own_leave_first(m: &ModelView, now: Millis) -> Decision {
    let why = m.trouble.as_deref().unwrap_or_default();
    let reason = format!("{} waits ({} pending): {why}", m.name, m.pending());
    Decision::new(now, "wait", "blocked", reason).of(&m.name).with(&[("pending", m.pending() as f64)])
}

/// What decisions are made of.
pub(super) struct Words<'a> {
    pub(super) view: &'a View,
    pub(super) knobs: &'a Knobs,
    pub(super) now: Millis,
}

impl Words<'_> {
    fn name(&self, worker: &WorkerView) -> &str {
        &self.view.model_of(worker).name
    }

    /// ` on gpu1`; empty on a box with one device.
    fn place(&self, set: GpuSet) -> String {
        if self.view.devices.len() < 2 { String::new() } else { format!(" on {}", self.set(set)) }
    }

    /// `wake a on gpu1`, if it is parked there, or `load a on gpu1`.
    fn bring(&self, m: &ModelView, set: GpuSet) -> String {
        let verb = if m.parked.contains(&set) { "wake" } else { "load" };
        format!("{verb} {}{}", m.name, self.place(set))
    }

    /// A swap, and that the newcomer wakes from host memory.
    pub(super) fn with_wake(&self, m: &ModelView, set: GpuSet, swap: Decision) -> Decision {
        if !m.parked.contains(&set) {
            return swap;
        }
        let how = if m.bare { "its process is there and reads the weights again" } else { "it wakes from host memory" };
        let reason = format!("{}; {how}, in {}", swap.reason, seconds(m.load_ms));
        Decision { reason, ..swap }
    }

    fn set(&self, set: GpuSet) -> String {
        if set.first >= self.view.gpus { "the CPU".to_owned() } else { set.to_string() }
    }

    fn due_in(&self, due: Due) -> f64 {
        (due.at - self.now) as f64
    }

    fn basics(&self, m: &ModelView, due: Due) -> [(&'static str, f64); 3] {
        let due_in = self.due_in(due);
        [("pending", m.pending() as f64), ("load_s", m.load_ms / 1e3), ("due_in_s", due_in / 1e3)]
    }

    /// How long it has waited, and of what: `63 s of 60 s`; `None` if it waits for a deadline or since it left.
    fn waited(&self, m: &ModelView, due: Due) -> Option<String> {
        let (oldest, of) = match due.why {
            Why::Caller => (m.oldest_interactive?, millis(self.knobs.max_wait_interactive)),
            Why::Batch => (m.oldest_batch?, millis(self.knobs.max_wait_batch)),
            Why::Deadline | Why::Hand => return None,
        };
        (oldest.saturating_add(of) == due.at)
            .then(|| format!("{} of {}", seconds((self.now - oldest) as f64), seconds(of as f64)))
    }

    /// `llama waits 8 s of 60 s`.
    fn waits(&self, m: &ModelView, due: Due) -> String {
        match self.waited(m, due) {
            Some(waited) => format!("{} waits {waited}", m.name),
            None => self.is_due(m, due),
        }
    }

    /// `llama is due (63 s of 60 s)`.
    fn is_due(&self, m: &ModelView, due: Due) -> String {
        let when = if due.at <= self.now {
            format!("{} is due", m.name)
        } else {
            format!("{} is due in {}", m.name, seconds(self.due_in(due)))
        };
        match (self.waited(m, due), due.why) {
            (Some(waited), _) => format!("{when} ({waited})"),
            (None, Why::Deadline) => format!("{when} (its deadline)"),
            (None, Why::Hand) => format!("{when} (asked for by hand)"),
            (None, _) => format!("{when} (it was visited {} ago)", seconds(self.since_left(m))),
        }
    }

    fn since_left(&self, m: &ModelView) -> f64 {
        m.left_at.map_or(0.0, |left| (self.now - left) as f64)
    }

    pub(super) fn idle(&self) -> Decision {
        Decision::new(self.now, "idle", "dry", "idle: nothing is pending".to_owned())
    }

    /// Nothing that waits can be loaded.
    pub(super) fn blocked(&self, m: &ModelView) -> Decision {
        let why = m.trouble.as_deref().unwrap_or("no device can hold it beside pinned models");
        let reason = format!("nothing can be loaded: {} ({} pending): {why}", m.name, m.pending());
        Decision::new(self.now, "wait", "blocked", reason).of(&m.name).with(&[("pending", m.pending() as f64)])
    }

    /// Nothing but paused jobs waits.
    pub(super) fn paused(&self, m: &ModelView) -> Decision {
        let reason = is_paused(&m.name, m.paused, self.view.all_paused);
        Decision::new(self.now, "wait", "paused", reason).of(&m.name).with(&[("paused", m.paused as f64)])
    }

    pub(super) fn loading(&self, worker: &WorkerView) -> Decision {
        let reason = format!("loading {}{}", self.name(worker), self.place(worker.set));
        Decision::new(self.now, "stay", "fits", reason).of(self.name(worker)).on(self.view, worker.set)
    }

    pub(super) fn leaving(&self, worker: &WorkerView, to: Option<&WorkerView>) -> Decision {
        let next = to.map_or(String::new(), |to| format!(" to make room for {}", self.name(to)));
        let reason = format!("{} is leaving the device{next}", self.name(worker));
        let decision = Decision::new(self.now, "stay", "drop", reason).of(self.name(worker)).on(self.view, worker.set);
        match to {
            Some(to) => decision.against(self.name(to)),
            None => decision,
        }
    }

    /// A resident when nobody waits.
    pub(super) fn alone(&self, worker: &WorkerView) -> Decision {
        let (v, name) = (self.view.model_of(worker), self.name(worker));
        let numbers = [("pending", v.pending() as f64), ("running", worker.running as f64)];
        let (code, reason) = if self.view.has_work(worker) {
            let (pending, running) = (v.pending(), worker.running);
            ("fits", format!("stay on {name}: {pending} pending, {running} running; no other model waits"))
        } else {
            ("dry", format!("stay on {name}: it is idle and no other model waits"))
        };
        Decision::new(self.now, "stay", code, reason).of(name).on(self.view, worker.set).with(&numbers)
    }

    pub(super) fn unload(&self, worker: &WorkerView) -> Decision {
        let v = self.view.model_of(worker);
        let ttl = v.idle_ttl_ms.unwrap_or(0) as f64;
        let reason = format!("unload {}: idle for {}, its idle_ttl", v.name, seconds(ttl));
        Decision::new(self.now, "unload", "drop", reason)
            .of(&v.name)
            .on(self.view, worker.set)
            .with(&[("idle_ttl_s", ttl / 1e3)])
    }

    pub(super) fn preload(&self, m: &ModelView, set: GpuSet) -> Decision {
        let reason = format!("{}: preload, and the device is free", self.bring(m, set));
        Decision::new(self.now, "load", "fits", reason).of(&m.name).on(self.view, set)
    }

    pub(super) fn fits(&self, m: &ModelView, due: Due, set: GpuSet, beside: Option<&WorkerView>) -> Decision {
        let why = match beside {
            None => "the device is free".to_owned(),
            Some(worker) => format!("it fits beside {}", self.name(worker)),
        };
        let reason = format!("{}: {why}; {} pending", self.bring(m, set), m.pending());
        Decision::new(self.now, "load", "fits", reason).of(&m.name).on(self.view, set).with(&self.basics(m, due))
    }

    pub(super) fn guest(&self, m: &ModelView, due: Due, set: GpuSet, of: &Reservation) -> Decision {
        let reason = format!(
            "{} for at most {}: {} {} reserved for {} from {}",
            self.bring(m, set),
            seconds((of.at - self.now) as f64),
            self.set(of.set),
            if of.set.count > 1 { "are" } else { "is" },
            self.view.models[of.model].name,
            clock(of.at)
        );
        Decision::new(self.now, "load", "guest", reason)
            .of(&m.name)
            .against(&self.view.models[of.model].name)
            .on(self.view, set)
            .with(&self.basics(m, due))
            .with(&[("guest_s", (of.at - self.now) as f64 / 1e3)])
    }

    pub(super) fn replica(&self, m: &ModelView, set: GpuSet) -> Decision {
        let work = m.pending() as f64 * m.each_ms;
        let reason = format!(
            "{}: one more worker, {} pending are {} of work and a load takes {}",
            self.bring(m, set),
            m.pending(),
            seconds(work),
            seconds(m.load_ms)
        );
        Decision::new(self.now, "load", "replica", reason).of(&m.name).on(self.view, set).with(&[
            ("pending", m.pending() as f64),
            ("work_s", work / 1e3),
            ("load_s", m.load_ms / 1e3),
        ])
    }

    /// A swap in which everybody displaced has nothing to do.
    pub(super) fn dry(&self, m: &ModelView, due: Due, set: GpuSet, out: &WorkerView) -> Decision {
        let name = self.name(out);
        let when = if due.at > self.now {
            format!("in {}", seconds(self.due_in(due)))
        } else {
            format!("since {}", seconds(-self.due_in(due)))
        };
        let reason =
            format!("swap {name} -> {}: {name} is dry, {} due next ({when}; {} pending)", m.name, m.name, m.pending());
        Decision::new(self.now, "swap", "dry", reason)
            .of(&m.name)
            .against(name)
            .on(self.view, set)
            .with(&self.basics(m, due))
    }

    /// A swap that displaces somebody with work; `is_replica`: another worker of its model stays.
    pub(super) fn early(
        &self,
        m: &ModelView,
        due: Due,
        set: GpuSet,
        (out, is_replica): (&WorkerView, bool),
        w: &Weighed,
    ) -> Decision {
        let (vn, mn) = (self.name(out), &m.name);
        let ran = seconds(w.ran_ms);
        let (code, why) = if out.guest_until.is_some_and(|until| until <= self.now) {
            ("reserved", format!("{vn} was a guest on a set that is reserved for {mn}"))
        } else if is_replica {
            ("due", format!("{}, another worker of {vn} stays", self.waits(m, due)))
        } else if w.rushed && due.why == Why::Caller {
            let waited = m.oldest_interactive.map_or(0.0, |at| (self.now - at) as f64);
            (
                "due_interactive",
                format!(
                    "caller waiting {}, {vn} has batch work only and has run {ran} >= {}",
                    seconds(waited),
                    seconds(w.hold_ms)
                ),
            )
        } else if due.why == Why::Deadline {
            let end = m.must_start_for().map(|(_, deadline)| deadline);
            (
                "deadline",
                format!(
                    "{mn} must start by {} to end by {} ({} x {} + load {})",
                    clock(due.at),
                    clock(end.unwrap_or(due.at)),
                    counted(m.pending(), "job"),
                    seconds(m.each_ms),
                    seconds(m.load_ms)
                ),
            )
        } else {
            let code = if due.why == Why::Hand { "manual" } else { "due" };
            (code, format!("{}, {vn} has run {ran} >= its {} hold", self.is_due(m, due), seconds(w.hold_ms)))
        };
        Decision::new(self.now, "swap", code, format!("swap {vn} -> {mn}: {why}"))
            .of(mn)
            .against(vn)
            .on(self.view, set)
            .with(&self.basics(m, due))
            .with(&numbers(w))
    }

    /// Why `m` waits for a resident that does not yield yet.
    pub(super) fn refusal(&self, m: &ModelView, due: Due, v: &WorkerView, w: &Weighed, linger: bool) -> Decision {
        let (vn, model) = (self.name(v), self.view.model_of(v));
        let price = seconds(w.price.ms());
        let (code, why) = if linger {
            let gap = model.gap_ms.unwrap_or(0.0);
            (
                "linger",
                format!(
                    "its next job is expected in about {}, less than the {price} a swap costs; {}",
                    seconds(gap),
                    self.waits(m, due)
                ),
            )
        } else if !m.is_late(due, self.now) {
            (
                "not_due",
                format!(
                    "{} pending, swap costs {price} (drain {} + load {} + reload {}), {}",
                    model.pending(),
                    short(w.price.drain_ms),
                    short(w.price.load_ms),
                    short(w.price.reload_ms),
                    self.waits(m, due)
                ),
            )
        } else if w.ran_ms < w.hold_ms {
            let factor = w.hold_ms / w.price.ms().max(1.0);
            let most = millis(self.knobs.max_visit) as f64;
            let how = if (w.hold_ms - most).abs() < 1.0 {
                "max_visit".to_owned()
            } else {
                format!("{} x {price}", short(factor * 1e3))
            };
            (
                "hold",
                format!(
                    "{}, {vn} has run {} of its {} hold ({how})",
                    self.is_due(m, due),
                    seconds(w.ran_ms),
                    seconds(w.hold_ms)
                ),
            )
        } else {
            let rest = seconds(w.rest_ms);
            (
                "finish_first",
                format!("{} is due, but {vn} is done in about {rest}, less than the {price} a swap costs", m.name),
            )
        };
        Decision::new(self.now, "stay", code, format!("stay on {vn}: {why}"))
            .of(vn)
            .against(&m.name)
            .on(self.view, v.set)
            .with(&[("pending", model.pending() as f64), ("running", v.running as f64)])
            .with(&[("other_pending", m.pending() as f64), ("due_in_s", self.due_in(due) / 1e3)])
            .with(&numbers(w))
    }

    /// Why `m` waits for one that is not ready yet.
    pub(super) fn not_ready(&self, m: &ModelView, due: Due, v: &WorkerView) -> Decision {
        let name = self.name(v);
        let code = if m.is_late(due, self.now) { "hold" } else { "not_due" };
        let reason = format!("stay on {name}: it is being loaded; {}", self.waits(m, due));
        Decision::new(self.now, "stay", code, reason)
            .of(name)
            .against(&m.name)
            .on(self.view, v.set)
            .with(&self.basics(m, due))
    }

    /// Why `m` waits though nobody on its set objects: the set is kept for another.
    pub(super) fn kept(&self, m: &ModelView, due: Due, of: &Reservation) -> Decision {
        let other = &self.view.models[of.model].name;
        let reason = format!(
            "{} waits: {} {} reserved for {other} from {}; {}",
            m.name,
            self.set(of.set),
            if of.set.count > 1 { "are" } else { "is" },
            clock(of.at),
            self.waits(m, due)
        );
        Decision::new(self.now, "wait", "reserved", reason)
            .of(&m.name)
            .against(other)
            .on(self.view, of.set)
            .with(&self.basics(m, due))
    }

    /// A new reservation.
    pub(super) fn reserve(&self, m: &ModelView, due: Due, of: &Reservation) -> Decision {
        let reason =
            format!("reserve {} for {} from {}: {}", self.set(of.set), m.name, clock(of.at), self.is_due(m, due));
        Decision::new(self.now, "reserve", "reserved", reason)
            .of(&m.name)
            .on(self.view, of.set)
            .with(&self.basics(m, due))
            .with(&[("reserved_in_s", (of.at - self.now) as f64 / 1e3)])
    }
}

fn numbers(w: &Weighed) -> [(&'static str, f64); 7] {
    [
        ("price_s", w.price.ms() / 1e3),
        ("drain_s", w.price.drain_ms / 1e3),
        ("swap_load_s", w.price.load_ms / 1e3),
        ("reload_s", w.price.reload_ms / 1e3),
        ("ran_s", w.ran_ms / 1e3),
        ("hold_s", w.hold_ms / 1e3),
        ("rest_s", w.rest_ms / 1e3),
    ]
}

/// `1 job`, `2 jobs`.
fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

fn gpus(count: u32) -> String {
    counted(count as usize, "GPU")
}

pub(super) fn in_gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

/// Why jobs of a model wait that somebody has paused; `with_all`: with all others.
pub(crate) fn is_paused(model: &str, jobs: usize, with_all: bool) -> String {
    let (jobs, resume) = (counted(jobs, "job"), resume_command(model, with_all));
    format!("{model} waits: it is paused with {jobs}; `{resume}` lets them start")
}

/// `1st`, `2nd`, `11th`.
pub(crate) fn nth(n: usize) -> String {
    let ending = match (n % 10, n % 100) {
        (1, last) if last != 11 => "st",
        (2, last) if last != 12 => "nd",
        (3, last) if last != 13 => "rd",
        _ => "th",
    };
    format!("{n}{ending}")
}

/// `24 GiB`.
pub(super) fn gib(bytes: u64) -> String {
    format!("{} GiB", short(in_gib(bytes) * 1e3))
}

/// `41`, `4`, `2.9`: one digit after the point below 10.
pub(crate) fn short(ms: f64) -> String {
    let s = ms / 1e3;
    let tenths = (s * 10.0).round() / 10.0;
    // Never minus zero.
    if s.abs() < 9.95 && tenths.fract() != 0.0 { format!("{tenths:.1}") } else { format!("{:.0}", s.round() + 0.0) }
}

/// `41 s`.
pub(crate) fn seconds(ms: f64) -> String {
    format!("{} s", short(ms))
}

/// `14:02:10`, UTC.
fn clock(at: Millis) -> String {
    let s = at.div_euclid(1_000).rem_euclid(86_400);
    format!("{:02}:{:02}:{:02}", s / 3_600, s / 60 % 60, s % 60)
}
