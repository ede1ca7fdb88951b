//! What the plan would come to if nothing unforeseen happened: when jobs that wait now would start. The plan itself is played
//! forward on a copy of the view, with jobs as a fluid: each model takes its jobs in as fast as it has of late, and as many
//! come as have of late.

use crate::domain::{Class, Millis};
use crate::policy::Knobs;
use crate::policy::order::batch_slots;
use crate::policy::plan::{Action, plan};
use crate::policy::view::{ModelView, Phase, View, WorkerView, round};

/// Most moments that are played: what is farther away goes on as it has until then.
const MOMENTS_MAX: usize = 64;
/// Highest share of its time that a model is taken to be kept busy by new arrivals.
const BUSY_MAX: f64 = 0.8;
/// Every so many-th admission is batch while batch waits.
const BATCH_SHARE: f64 = 1.0 / 8.0;
/// Time constant with which a rate of arrivals is taken to fall, ms.
const RATE_FALLS_MS: f64 = 600_000.0;

/// Jobs that have started by some time; the rate holds until the next piece.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Piece {
    from: Millis,
    started: [f64; 2],
    per_ms: [f64; 2],
}

/// When the jobs of each model start.
#[derive(Clone, Debug, PartialEq)]
pub struct Forecast {
    at: Millis,
    until: Millis,
    /// By model.
    pieces: Vec<Vec<Piece>>,
}

fn place(class: Class) -> usize {
    usize::from(class == Class::Batch)
}

impl Forecast {
    /// When it was made.
    pub fn at(&self) -> Millis {
        self.at
    }

    /// When the job with so many of its class before it should start; `None`: not as far as can be seen.
    pub fn start(&self, model: usize, class: Class, ahead: usize, now: Millis) -> Option<Millis> {
        let (pieces, place) = (self.pieces.get(model)?, place(class));
        let before = pieces.iter().rev().find(|piece| piece.from <= now);
        let base = before.map_or(0.0, |piece| piece.started[place] + piece.per_ms[place] * (now - piece.from) as f64);
        let target = base + ahead as f64 + 0.5;
        for (index, piece) in pieces.iter().enumerate() {
            if piece.started[place] >= target {
                return Some(piece.from.max(now));
            }
            let until = pieces.get(index + 1).map_or(self.until, |next| next.from);
            let takes = (target - piece.started[place]) / piece.per_ms[place];
            if piece.per_ms[place] > 0.0 && piece.from as f64 + takes <= until as f64 {
                return Some((piece.from + round(takes)).max(now));
            }
        }
        // As it went until then.
        let last = pieces.last()?;
        let started = last.started[place] + last.per_ms[place] * (self.until - last.from) as f64;
        let per_ms = started / (self.until - self.at).max(1) as f64;
        (per_ms > 0.0).then(|| (self.until + round((target - started) / per_ms)).max(now))
    }
}

/// Plays the plan forward. `limits`: most jobs at once on a worker, by model.
pub fn forecast(view: &View, limits: &[u32], knobs: &Knobs, now: Millis) -> Forecast {
    let models = view.models.len();
    let mut play = Play {
        view: view.clone(),
        limits,
        knobs,
        from: now,
        now,
        waiting: view.models.iter().map(|m| [m.pending_interactive as f64, m.pending_batch as f64]).collect(),
        shares: view.models.iter().map(share).collect(),
        owed: view.models.iter().map(|m| m.pending() as f64).collect(),
        started: vec![[0.0; 2]; models],
        until: Vec::new(),
        pieces: vec![Vec::new(); models],
    };
    play.begin();
    for _ in 0..MOMENTS_MAX {
        if !play.moment() {
            break;
        }
    }
    Forecast { at: now, until: play.now.max(now + 1), pieces: play.pieces }
}

/// Of the jobs that come, those that are interactive: as of those that wait.
fn share(m: &ModelView) -> f64 {
    if m.pending() == 0 { 0.5 } else { m.pending_interactive as f64 / m.pending() as f64 }
}

struct Play<'a> {
    view: View,
    limits: &'a [u32],
    knobs: &'a Knobs,
    from: Millis,
    now: Millis,
    /// By model and class.
    waiting: Vec<[f64; 2]>,
    shares: Vec<f64>,
    /// Jobs that waited at the beginning and have not started.
    owed: Vec<f64>,
    started: Vec<[f64; 2]>,
    /// By worker: when it is gone, if it leaves, else when its last job ends.
    until: Vec<Option<Millis>>,
    pieces: Vec<Vec<Piece>>,
}

impl Play<'_> {
    fn begin(&mut self) {
        for place in 0..self.view.workers.len() {
            let worker = &self.view.workers[place];
            let model = &self.view.models[worker.model];
            let rest = if worker.running > 0 { model.service_ms / 2.0 } else { 0.0 };
            let until = match worker.phase {
                Phase::Leaving => Some(self.now + round(rest + model.stop_ms)),
                Phase::Serving if worker.running > 0 => Some(self.now + round(rest).max(1)),
                _ => None,
            };
            self.until.push(until);
            // A load that takes longer than it should.
            if let Phase::Loading { until } = worker.phase
                && until <= self.now
            {
                let more = round(model.load_ms / 10.0).max(1);
                self.view.workers[place].phase = Phase::Loading { until: self.now + more };
            }
        }
    }

    fn limit(&self, model: usize) -> f64 {
        f64::from(self.limits.get(model).copied().unwrap_or(1).max(1))
    }

    /// What happens now, what is decided on it, and the time until the next moment. False: nothing is left to happen.
    fn moment(&mut self) -> bool {
        self.change_phases();
        (0..self.view.models.len()).for_each(|model| self.take_in(model));
        self.show_waiting();
        let plan = plan(&self.view, self.knobs, self.now);
        self.view.reservations = plan.reservations;
        let acts = !plan.steps.is_empty();
        for step in plan.steps {
            match step.action {
                Action::Load { model, set, out, guest_until } => {
                    out.into_iter().for_each(|worker| self.leave(worker));
                    self.view.workers.push(WorkerView::to_load(model, set, guest_until, self.now));
                    self.until.push(None);
                }
                Action::Unload(worker) => self.leave(worker),
            }
        }
        if acts {
            self.change_phases();
        }
        self.note_rates();
        if self.owed.iter().all(|owed| *owed <= 0.0) {
            return false;
        }
        let Some(next) = self.next_moment(plan.wake_at) else { return false };
        self.pass(next);
        true
    }

    fn leave(&mut self, worker: usize) {
        let v = &mut self.view.workers[worker];
        let model = &mut self.view.models[v.model];
        if v.phase == Phase::Leaving {
            return;
        }
        let rest = if v.running > 0 { model.service_ms } else { 0.0 };
        v.phase = Phase::Leaving;
        self.until[worker] = Some(self.now + round(rest + model.stop_ms));
        model.left_at = Some(self.now);
        model.load_ms = model.reload_ms;
    }

    fn change_phases(&mut self) {
        for worker in (0..self.view.workers.len()).rev() {
            let v = &self.view.workers[worker];
            let over = self.until[worker].is_some_and(|until| until <= self.now);
            match v.phase {
                Phase::Leaving if over => {
                    self.view.workers.remove(worker);
                    self.until.remove(worker);
                }
                Phase::Loading { until } if until <= self.now => {
                    self.until[worker] = None;
                    let v = &mut self.view.workers[worker];
                    (v.phase, v.since, v.idle_since) = (Phase::Serving, self.now, None);
                    self.view.models[v.model].wanted_at = None;
                }
                Phase::Serving if over && self.waiting[v.model].iter().sum::<f64>() <= 0.0 => {
                    self.until[worker] = None;
                    let v = &mut self.view.workers[worker];
                    (v.running, v.callers) = (0, 0);
                }
                _ => {}
            }
        }
        for worker in 0..self.view.workers.len() {
            let v = &self.view.workers[worker];
            let leaves = |other: &WorkerView| other.phase == Phase::Leaving && other.set.overlaps(v.set);
            if v.phase == Phase::Waiting && !self.view.workers.iter().any(leaves) {
                let load = round(self.view.models[v.model].load_ms).max(1);
                self.view.workers[worker].phase = Phase::Loading { until: self.now + load };
            }
        }
    }

    /// Free slots are filled.
    fn take_in(&mut self, model: usize) {
        for worker in 0..self.view.workers.len() {
            let v = &self.view.workers[worker];
            if v.model != model || v.phase != Phase::Serving {
                continue;
            }
            let limit = self.limit(model);
            let free = limit - v.running as f64;
            let callers = self.waiting[model][0].min(free);
            let most = f64::from(batch_slots(self.limits.get(model).copied().unwrap_or(1)));
            let batch =
                self.waiting[model][1].min(free - callers).min((most - (v.running - v.callers) as f64).max(0.0));
            self.start(model, [callers, batch]);
            let waits = self.waiting[model][0] + self.waiting[model][1] > 0.0;
            let service = round(self.view.models[model].service_ms).max(1);
            let v = &mut self.view.workers[worker];
            v.running = (v.running + whole(callers + batch)).min(whole(limit));
            v.callers = (v.callers + whole(callers)).min(v.running);
            if callers + batch > 0.0 || waits {
                self.until[worker] = Some(self.now + service);
            }
            v.idle_since = if v.running > 0 || waits { None } else { v.idle_since.or(Some(self.now)) };
        }
    }

    fn start(&mut self, model: usize, jobs: [f64; 2]) {
        for class in [0, 1] {
            let waiting = &mut self.waiting[model][class];
            let left = (*waiting - jobs[class]).max(0.0);
            let left = if left < 1e-6 { 0.0 } else { left };
            let part = if *waiting > 0.0 { left / *waiting } else { 0.0 };
            *waiting = left;
            let m = &mut self.view.models[model];
            let oldest = if class == 0 { &mut m.oldest_interactive } else { &mut m.oldest_batch };
            // Those that wait came one after the other.
            *oldest = oldest.map(|at| self.now - round((self.now - at) as f64 * part)).filter(|_| left > 0.0);
            self.started[model][class] += jobs[class];
            self.owed[model] -= jobs[class];
        }
    }

    fn show_waiting(&mut self) {
        for (m, waiting) in self.view.models.iter_mut().zip(&self.waiting) {
            m.pending_interactive = whole(waiting[0]);
            m.pending_batch = whole(waiting[1]);
            // Who would come next is not there yet.
            if m.pending() > 0 && waiting[0] + waiting[1] < 1.0 - 1e-6 {
                (m.pending_interactive, m.pending_batch) = (0, 0);
            }
            if m.pending_interactive > 0 {
                m.oldest_interactive.get_or_insert(self.now);
            } else {
                m.oldest_interactive = None;
            }
            if m.pending_batch > 0 {
                m.oldest_batch.get_or_insert(self.now);
            } else {
                m.oldest_batch = None;
            }
            if m.pending() == 0 {
                (m.first_deadline, m.last_deadline) = (None, None);
            }
        }
    }

    /// How fast jobs of a model start while it serves and jobs wait, by class.
    fn rates(&self, model: usize) -> [f64; 2] {
        let [callers, batch] = self.waiting[model];
        if self.view.serving_of(model) == 0 || callers + batch <= 0.0 {
            return [0.0; 2];
        }
        let per_ms = 1.0 / self.view.models[model].each_ms.max(1.0);
        match (callers > 0.0, batch > 0.0) {
            (true, true) => [per_ms * (1.0 - BATCH_SHARE), per_ms * BATCH_SHARE],
            (true, false) => [per_ms, 0.0],
            _ => [0.0, per_ms],
        }
    }

    fn note_rates(&mut self) {
        for model in 0..self.view.models.len() {
            let (per_ms, started) = (self.rates(model), self.started[model]);
            let piece = Piece { from: self.now, started, per_ms };
            let pieces = &mut self.pieces[model];
            let goes_on = pieces.last().is_some_and(|last| {
                let passed = (self.now - last.from) as f64;
                (0..2).all(|c| {
                    last.per_ms[c] == per_ms[c] && (last.started[c] + passed * per_ms[c] - started[c]).abs() < 1e-6
                })
            });
            if !goes_on {
                pieces.push(piece);
            }
        }
    }

    /// Jobs that come per ms.
    fn arrivals(&self, model: usize) -> f64 {
        let m = &self.view.models[model];
        let passed = (self.now - self.from) as f64;
        m.rate.min(BUSY_MAX / m.each_ms.max(1.0)) * (-passed / RATE_FALLS_MS).exp()
    }

    fn next_moment(&self, wake_at: Option<Millis>) -> Option<Millis> {
        let workers = self.view.workers.iter().zip(&self.until).filter_map(|(v, until)| match v.phase {
            Phase::Loading { until } => Some(until),
            Phase::Serving if self.waiting[v.model][0] + self.waiting[v.model][1] > 0.0 => None,
            _ => *until,
        });
        let dry = (0..self.view.models.len()).flat_map(|model| {
            let (rates, waiting) = (self.rates(model), self.waiting[model]);
            let more = self.arrivals(model);
            let of_class = [self.shares[model], 1.0 - self.shares[model]];
            (0..2).filter_map(move |class| {
                let falls = rates[class] - more * of_class[class];
                (rates[class] > 0.0 && falls > 0.0).then(|| self.now + round((waiting[class] / falls).ceil()).max(1))
            })
        });
        let next = workers.chain(dry).chain(wake_at).filter(|at| *at > self.now).min()?;
        Some(next)
    }

    fn pass(&mut self, next: Millis) {
        let passed = (next - self.now) as f64;
        for model in 0..self.view.models.len() {
            let rates = self.rates(model);
            let (more, share) = (self.arrivals(model) * passed, self.shares[model]);
            let serves = self.view.serving_of(model) > 0;
            // What comes for a model that keeps up starts at once.
            let keeps_up = serves && rates == [0.0; 2];
            if !keeps_up {
                self.waiting[model][0] += more * share;
                self.waiting[model][1] += more * (1.0 - share);
            }
            self.start(model, [0, 1].map(|class| (rates[class] * passed).min(self.waiting[model][class])));
            if rates != [0.0; 2] && self.waiting[model][0] + self.waiting[model][1] <= 0.0 {
                // Dry: what runs is left.
                let end = next + round(self.view.models[model].service_ms).max(1);
                for (v, until) in self.view.workers.iter().zip(&mut self.until) {
                    if v.model == model && v.phase == Phase::Serving {
                        *until = Some(end);
                    }
                }
            }
        }
        self.now = next;
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "jobs: never negative, far below 2^52")]
fn whole(jobs: f64) -> usize {
    jobs.max(0.0).ceil() as usize
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::policy::plan::tests::{batch, callers, model, one_device, serving};

    const NOW: Millis = 1_000_000;

    /// Seconds from now until jobs with so many before them start.
    fn starts(view: &View, model: usize, class: Class, ahead: &[usize]) -> Vec<Millis> {
        let seen = forecast(view, &vec![1; view.models.len()], &Knobs::default(), NOW);
        ahead.iter().map(|ahead| (seen.start(model, class, *ahead, NOW).unwrap() - NOW) / 1_000).collect()
    }

    #[test]
    fn a_loaded_model_starts_its_jobs_one_after_the_other() {
        let busy = WorkerView { running: 1, callers: 1, ..serving(0, 0) };
        let view = one_device(vec![callers(model("a"), 5, NOW)], vec![busy]);
        assert_eq!(
            starts(&view, 0, Class::Interactive, &[0, 1, 4]),
            [4, 13, 40],
            "9 s each; the first in half of that"
        );
        let free = one_device(vec![callers(model("a"), 1, NOW)], vec![serving(0, 0)]);
        assert_eq!(starts(&free, 0, Class::Interactive, &[0]), [0]);
    }

    #[test]
    fn who_waits_for_another_waits_until_that_is_dry_and_for_the_load() {
        let busy = WorkerView { running: 1, ..serving(0, NOW) };
        let models = vec![batch(model("a"), 3, NOW), callers(model("b"), 2, NOW), batch(model("c"), 1, NOW)];
        let view = one_device(models, vec![busy]);
        // a: 3 x 9 s until the last one starts, 9 s until it ends; then 28 s of load; b has two jobs, and c comes last.
        assert_eq!(starts(&view, 1, Class::Interactive, &[0, 1]), [64, 68]);
        let after_b = starts(&view, 2, Class::Batch, &[0])[0];
        assert!((95..=115).contains(&after_b), "{after_b}");
    }

    #[test]
    fn a_late_caller_gets_the_device_of_a_long_batch_and_the_batch_goes_on_later() {
        let busy = WorkerView { running: 1, ..serving(0, NOW - 200_000) };
        let view = one_device(vec![batch(model("a"), 1_000, NOW), callers(model("b"), 1, NOW)], vec![busy]);
        let caller = starts(&view, 1, Class::Interactive, &[0])[0];
        assert!((50..=80).contains(&caller), "max_wait is 60 s: {caller}");
        let last = starts(&view, 0, Class::Batch, &[999])[0];
        assert!((9_000..12_000).contains(&last), "1000 x 9 s and two loads: {last}");
    }

    #[test]
    fn of_a_model_that_never_gets_a_turn_nobody_knows() {
        let mut blocked = callers(model("a"), 1, NOW);
        blocked.trouble = Some("out of memory".to_owned());
        let seen = forecast(&one_device(vec![blocked], Vec::new()), &[1], &Knobs::default(), NOW);
        assert_eq!(seen.start(0, Class::Interactive, 0, NOW), None);
        assert_eq!(seen.start(7, Class::Interactive, 0, NOW), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]

        #[test]
        fn later_places_start_later_and_nothing_starts_in_the_past(
            jobs in prop::collection::vec((0_usize..300, 0_usize..3_000, 1.0..60_000.0_f64, 0.0..0.01_f64), 1..6),
            serves in any::<bool>(),
        ) {
            let models: Vec<ModelView> = jobs.iter().enumerate().map(|(index, (waiting, lots, each, rate))| {
                let mut m = model(&format!("m{index}"));
                (m.each_ms, m.service_ms, m.rate) = (*each, *each, *rate);
                let m = if *waiting > 0 { callers(m, *waiting, NOW - 5_000) } else { m };
                if *lots > 0 { batch(m, *lots, NOW - 90_000) } else { m }
            }).collect();
            let workers = if serves { vec![serving(0, NOW - 1_000)] } else { Vec::new() };
            let seen = forecast(&one_device(models, workers), &vec![4; jobs.len()], &Knobs::default(), NOW);
            for (model, (waiting, lots, ..)) in jobs.iter().enumerate() {
                for (class, count) in [(Class::Interactive, *waiting), (Class::Batch, *lots)] {
                    let all: Vec<_> = (0..count).step_by(7).filter_map(|n| seen.start(model, class, n, NOW)).collect();
                    prop_assert!(all.windows(2).all(|pair| pair[0] <= pair[1]) && all.iter().all(|at| *at >= NOW));
                }
            }
        }
    }
}
