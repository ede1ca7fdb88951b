//! What to load where, and who makes room: one round of decisions, each with its reason in words.
//!
//! 1. Waiting models are taken in order: late ones by due time, then the others by due time.
//! 2. A model takes the set of devices where all who must leave yield, at the least cost: the price of a swap for those
//!    with work, what will be missed for idle ones. A model with work keeps its devices until it is dry or a late model has
//!    outwaited its hold (`hold`).
//!    One that is parked wakes only where it was: it goes there if that costs no more, or less than the load time it saves.
//! 3. A late model for which no set is found reserves the one that yields first. One that is due later may be a guest there
//!    if three of its loads fit in before; it makes room then, whatever its hold.
//! 4. When nobody waits: one more worker for a model whose backlog is worth more than three loads; models with `preload`;
//!    and idle models past their `idle_ttl` leave.

use crate::domain::{GpuSet, Millis};
use crate::policy::Knobs;
pub use crate::policy::decision::Decision;
use crate::policy::decision::Words;
use crate::policy::due::Due;
use crate::policy::hold::{self, Weighed, Yields};
use crate::policy::sets;
use crate::policy::view::round_up;
pub use crate::policy::view::{ModelView, Phase, Reservation, Residue, View, WorkerView};

/// Loads that must fit in before a reservation starts for a guest to be let in.
const GUEST_LOADS: f64 = 3.0;
/// Loads that a backlog must be worth for one more worker.
const REPLICA_LOADS: f64 = 3.0;

/// What to do now.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Drain and stop the workers in `out`; when they have left, load `model` on `set`.
    Load {
        /// Place of the model.
        model: usize,
        /// Where.
        set: GpuSet,
        /// Places of workers in the view.
        out: Vec<usize>,
        /// It must make room at this time.
        guest_until: Option<Millis>,
    },
    /// Stop this idle worker.
    Unload(usize),
}

/// One thing to do, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// What.
    pub action: Action,
    /// Why.
    pub decision: Decision,
}

/// The outcome of planning.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// What to do now, in order.
    pub steps: Vec<Step>,
    /// Why each model that still waits does, in order; without any, why things stay as they are.
    pub stays: Vec<Decision>,
    /// Sets kept for late models.
    pub reservations: Vec<Reservation>,
    /// When to plan again if nothing happens before.
    pub wake_at: Option<Millis>,
}

impl Plan {
    /// The one to show: the last thing done, else the first reason to do nothing.
    pub fn decision(&self) -> Option<&Decision> {
        self.steps.last().map(|step| &step.decision).or(self.stays.first())
    }
}

/// Decides. Pure: the same view, knobs and `now` give the same plan with the same words.
pub fn plan(view: &View, knobs: &Knobs, now: Millis) -> Plan {
    let mut round = Round {
        view: view.clone(),
        given: view.workers.len(),
        knobs,
        now,
        plan: Plan { steps: Vec::new(), stays: Vec::new(), reservations: Vec::new(), wake_at: None },
    };
    let mut waiting = round.waiting();
    let somebody_waits = !waiting.is_empty();
    // From the first one again after each step: who leaves for one may make room for another that is due before.
    while let Some(placed) = round.place_first(&waiting) {
        waiting.remove(placed);
    }
    if !somebody_waits {
        round.when_nobody_waits();
    }
    round.unload_idle(somebody_waits);
    round.say_something();
    round.plan
}

/// A set for a model, and who leaves it.
struct Found {
    set: GpuSet,
    out: Vec<usize>,
    guest: Option<Reservation>,
}

struct Round<'a> {
    /// As it will be after the steps so far.
    view: View,
    /// Workers that were there before.
    given: usize,
    knobs: &'a Knobs,
    now: Millis,
    plan: Plan,
}

impl Round<'_> {
    fn words(&self) -> Words<'_> {
        Words { view: &self.view, knobs: self.knobs, now: self.now }
    }

    fn wake(&mut self, at: Millis) {
        if at > self.now {
            self.plan.wake_at = Some(self.plan.wake_at.map_or(at, |other| other.min(at)));
        }
    }

    /// Models with waiting jobs, without a worker, that can be loaded: in order. One whose workers are all leaving waits
    /// until one has left.
    fn waiting(&self) -> Vec<(usize, Due)> {
        let mut waiting: Vec<(usize, Due)> = (0..self.view.models.len())
            .filter(|m| {
                let model = &self.view.models[*m];
                let all = self.view.workers.iter().filter(|worker| worker.model == *m).count();
                model.can_load() && self.view.workers_of(*m) == 0 && all < model.max_replicas as usize
            })
            .filter_map(|m| Some((m, self.view.models[m].due(self.knobs)?)))
            .collect();
        waiting.sort_by_key(|(m, due)| (!self.view.models[*m].is_late(*due, self.now), due.at));
        waiting
    }

    /// Places the first model in order for which there is a set now; says why for those before it, or for all.
    fn place_first(&mut self, waiting: &[(usize, Due)]) -> Option<usize> {
        self.plan.stays.clear();
        self.plan.reservations.clear();
        self.plan.wake_at = None;
        waiting.iter().position(|(model, due)| self.place(*model, *due))
    }

    /// Rules 2 and 3 for one model; false: it waits.
    fn place(&mut self, model: usize, due: Due) -> bool {
        let m = &self.view.models[model];
        let late = m.is_late(due, self.now);
        let times: Vec<Option<Yields>> = self
            .view
            .workers
            .iter()
            .map(|worker| hold::yields(&self.view, worker, m, due, self.knobs, self.now))
            .collect();
        if let Some(found) = self.find(model, &times) {
            let decision = self.reason(model, due, &found);
            self.take(model, found, decision);
            return true;
        }
        if !late {
            self.wake(due.at - m.load());
        }
        let first = self.first_to_yield(model, &times);
        if let Some((reservation, out)) = first {
            let last = out.iter().copied().max_by_key(|worker| self.yields_at(*worker, &out, &times)).unwrap_or(out[0]);
            let worker = &self.view.workers[last];
            let (m, w) = (&self.view.models[model], self.weigh(last, model));
            let decision = if worker.phase == Phase::Serving {
                let linger = !self.view.has_work(worker);
                self.words().refusal(m, due, worker, &w, linger)
            } else {
                self.words().not_ready(m, due, worker)
            };
            if late {
                self.note_reservation(model, due, reservation);
            }
            self.plan.stays.push(decision);
            self.wake_for(model, &out, &times);
        } else {
            let m = &self.view.models[model];
            let kept =
                self.plan.reservations.iter().find(|r| sets::open(&self.view, model).iter().any(|s| s.overlaps(r.set)));
            let decision = match kept {
                Some(reservation) => self.words().kept(m, due, reservation),
                None => self.words().blocked(m),
            };
            self.plan.stays.push(decision);
        }
        false
    }

    /// Plans again when the last of these may yield. Who is not ready, or about to finish, tells when that has changed.
    fn wake_for(&mut self, model: usize, out: &[usize], times: &[Option<Yields>]) {
        let at = |worker: &usize| {
            let v = &self.view.workers[*worker];
            let w = self.weigh(*worker, model);
            let finishes = self.view.has_work(v) && w.rest_ms <= w.price.ms();
            let given = v.since + round_up(w.hold_ms + w.price.ms());
            let at = self.yields_at(*worker, out, times).filter(|_| v.phase == Phase::Serving)?;
            let guest = v.guest_until.filter(|until| *until > self.now).unwrap_or(Millis::MAX);
            Some(if finishes { at.max(given).min(guest) } else { at })
        };
        if let Some(at) = out.iter().filter_map(at).max() {
            self.wake(at);
        }
    }

    fn note_reservation(&mut self, model: usize, due: Due, reservation: Reservation) {
        let is_new = !self.view.reservations.iter().any(|r| r.model == model && r.set == reservation.set);
        if is_new && self.view.devices.len() > 1 {
            let decision = self.words().reserve(&self.view.models[model], due, &reservation);
            self.plan.stays.push(decision);
        }
        self.plan.reservations.push(reservation);
    }

    fn weigh(&self, worker: usize, model: usize) -> Weighed {
        hold::weigh(&self.view, &self.view.workers[worker], &self.view.models[model], self.knobs, self.now)
    }

    /// Reserved for a model that is due before.
    fn reserved(&self, set: GpuSet) -> Option<Reservation> {
        let mut all = self.plan.reservations.iter().filter(|r| r.set.overlaps(set));
        let first = *all.next()?;
        Some(all.fold(first, |a, b| if b.at < a.at { *b } else { a }))
    }

    /// The set that can be had now at the least cost. Where it is parked, if that costs not so much more as a wake saves.
    fn find(&self, model: usize, times: &[Option<Yields>]) -> Option<Found> {
        let m = &self.view.models[model];
        let cost = |(worker, yields): (usize, &Option<Yields>)| {
            yields.filter(|yields| yields.at <= self.now).map(|_| self.cost(worker, model))
        };
        let costs: Vec<Option<f64>> = times.iter().enumerate().map(cost).collect();
        type Ranked = (Rank, Found);
        let (mut best, mut home): (Option<Ranked>, Option<Ranked>) = (None, None);
        let keep = |kept: &mut Option<Ranked>, rank: Rank, found: Found| {
            if kept.as_ref().is_none_or(|(other, _)| is_less(rank, *other)) {
                *kept = Some((rank, found));
            }
        };
        for set in sets::open(&self.view, model) {
            let guest = self.reserved(set);
            let too_long = |r: Reservation| self.now + round_up(GUEST_LOADS * m.load_ms) > r.at;
            if guest.is_some_and(too_long) {
                continue;
            }
            let Some(out) = self.leave(model, set, &costs, times) else { continue };
            let cost: f64 = out.iter().filter_map(|worker| costs[*worker]).sum();
            let is_tight = sets::is_tight(&self.view, model, set, &out);
            let rank = (cost, (guest.is_some(), is_tight, sets::used(&self.view, set, true)));
            if m.parked.contains(&set) {
                keep(&mut home, rank, Found { set, out: out.clone(), guest });
            }
            keep(&mut best, rank, Found { set, out, guest });
        }
        let (best, home) = (best?.1, home.map(|(_, found)| found));
        let pays =
            |home: &Found| self.displaced_ms(home, model) <= self.displaced_ms(&best, model) + m.lost_ms(best.set);
        Some(home.filter(pays).unwrap_or(best))
    }

    /// Device time that it costs, now or later, that those who must leave do.
    fn displaced_ms(&self, found: &Found, model: usize) -> f64 {
        let each = |worker: &usize| {
            let v = &self.view.workers[*worker];
            let busy = self.view.has_work(v).then(|| hold::price(&self.view, v, &self.view.models[model]).ms());
            busy.unwrap_or(self.view.model_of(v).reload_ms)
        };
        found.out.iter().map(each).sum()
    }

    /// What it costs that a worker leaves: a whole price if it has work, else the jobs that will come for it meanwhile.
    fn cost(&self, worker: usize, model: usize) -> f64 {
        let v = &self.view.workers[worker];
        if self.view.has_work(v) {
            hold::price(&self.view, v, &self.view.models[model]).ms()
        } else {
            let v = self.view.model_of(v);
            v.rate * v.reload_ms
        }
    }

    /// Who must leave, and may now.
    fn leave(&self, model: usize, set: GpuSet, costs: &[Option<f64>], times: &[Option<Yields>]) -> Option<Vec<usize>> {
        let mut costs = costs.to_vec();
        loop {
            let out = sets::victims(&self.view, model, set, &costs)?;
            let too_early = |worker: &&usize| self.yields_at(**worker, &out, times).is_none_or(|at| at > self.now);
            match out.iter().find(too_early) {
                Some(worker) => costs[*worker] = None,
                None => return Some(out),
            }
        }
    }

    /// When a worker makes room if all of `out` do: as a replica at once, but one of each model that has work is held like
    /// an only worker.
    fn yields_at(&self, worker: usize, out: &[usize], times: &[Option<Yields>]) -> Option<Millis> {
        let model = self.view.workers[worker].model;
        let same = out.iter().copied().filter(|other| self.serves(*other, model));
        let first = same.min_by_key(|other| times[*other].map(|yields| yields.last_at));
        let is_last = self.serving_in(out, model) == self.view.serving_of(model) && first == Some(worker);
        times[worker].map(|yields| if is_last { yields.last_at } else { yields.at })
    }

    fn serves(&self, worker: usize, model: usize) -> bool {
        let worker = &self.view.workers[worker];
        worker.model == model && worker.phase == Phase::Serving
    }

    /// How many of these workers are ready ones of this model.
    fn serving_in(&self, workers: &[usize], model: usize) -> usize {
        workers.iter().filter(|worker| self.serves(**worker, model)).count()
    }

    /// The set that yields first, and the workers on it that must.
    fn first_to_yield(&self, model: usize, times: &[Option<Yields>]) -> Option<(Reservation, Vec<usize>)> {
        let costs: Vec<Option<f64>> = times.iter().map(|yields| yields.map(|yields| yields.at as f64)).collect();
        let when = |set: GpuSet| {
            let out = sets::victims(&self.view, model, set, &costs)?;
            let at = out.iter().filter_map(|worker| self.yields_at(*worker, &out, times)).max()?;
            Some((Reservation { model, set, at }, out))
        };
        let free = sets::open(&self.view, model).into_iter().filter(|set| self.reserved(*set).is_none());
        let ready = |set: GpuSet, at: Millis| at + round_up(self.view.models[model].lost_ms(set));
        let best = free.filter_map(when).min_by_key(|(reservation, _)| ready(reservation.set, reservation.at))?;
        // What was reserved stays so, unless another set is free much sooner.
        let before = self.view.reservations.iter().find(|r| r.model == model && r.set != best.0.set);
        let kept = before.filter(|r| self.reserved(r.set).is_none()).and_then(|r| when(r.set));
        let is_close = |kept: &Reservation| kept.at <= best.0.at + self.view.models[model].load();
        Some(kept.filter(|(kept, _)| is_close(kept)).unwrap_or(best))
    }

    fn reason(&self, model: usize, due: Due, found: &Found) -> Decision {
        let (m, words) = (&self.view.models[model], self.words());
        let since = |worker: usize| self.view.workers[worker].since;
        let is_dearer = |a: &usize, b: &usize| {
            self.cost(*a, model).total_cmp(&self.cost(*b, model)).then(since(*b).cmp(&since(*a)))
        };
        let dearest = found.out.iter().copied().max_by(is_dearer);
        match (dearest, &found.guest) {
            (_, Some(reservation)) => words.guest(m, due, found.set, reservation),
            (Some(worker), None) if self.view.has_work(&self.view.workers[worker]) => {
                let v = &self.view.workers[worker];
                let is_replica = self.serving_in(&found.out, v.model) < self.view.serving_of(v.model);
                let decision = words.early(m, due, found.set, (v, is_replica), &self.weigh(worker, model));
                words.with_wake(m, found.set, decision)
            }
            (Some(worker), None) => {
                words.with_wake(m, found.set, words.dry(m, due, found.set, &self.view.workers[worker]))
            }
            (None, None) => {
                let beside = self.view.workers.iter().find(|w| w.stays() && w.set.overlaps(found.set));
                words.fits(m, due, found.set, beside)
            }
        }
    }

    fn take(&mut self, model: usize, found: Found, decision: Decision) {
        let guest_until = found.guest.map(|r| r.at);
        for worker in &found.out {
            self.view.workers[*worker].phase = Phase::Leaving;
        }
        self.view.workers.push(WorkerView::to_load(model, found.set, guest_until, self.now));
        self.view.models[model].parked.retain(|there| *there != found.set);
        let action = Action::Load { model, set: found.set, out: found.out, guest_until };
        self.plan.steps.push(Step { action, decision });
    }

    /// Rule 4.
    fn when_nobody_waits(&mut self) {
        let mut backlogs: Vec<(usize, f64)> = (0..self.view.models.len())
            .filter_map(|m| {
                let model = &self.view.models[m];
                let workers = self.view.workers_of(m);
                let loading = workers != self.view.serving_of(m);
                let backlog = model.pending() as f64 * model.each_ms;
                // Those that leave have their numbers still.
                let all = self.view.workers.iter().filter(|worker| worker.model == m).count();
                let wanted = workers >= 1 && all < model.max_replicas as usize && !loading && model.can_load();
                (wanted && backlog > REPLICA_LOADS * model.load_ms).then_some((m, backlog))
            })
            .collect();
        backlogs.sort_by(|a, b| b.1.total_cmp(&a.1));
        for (model, _) in backlogs {
            if let Some(found) = self.find(model, &self.idle_times()) {
                let decision = self.words().replica(&self.view.models[model], found.set);
                self.take(model, found, decision);
            }
        }
        let preloads: Vec<usize> = (0..self.view.models.len())
            .filter(|m| {
                let model = &self.view.models[*m];
                model.preload && model.can_load() && self.view.workers_of(*m) == 0
            })
            .collect();
        for model in preloads {
            let nobody = vec![None; self.view.workers.len()];
            if let Some(found) = self.find(model, &nobody) {
                let decision = self.words().preload(&self.view.models[model], found.set);
                self.take(model, found, decision);
            }
        }
    }

    /// Only idle workers make room.
    fn idle_times(&self) -> Vec<Option<Yields>> {
        let idle = |worker: &WorkerView| {
            let free = worker.phase == Phase::Serving && !self.view.has_work(worker);
            (free && !self.view.model_of(worker).pin).then_some(Yields { at: self.now, last_at: self.now })
        };
        self.view.workers.iter().map(idle).collect()
    }

    fn unload_idle(&mut self, somebody_waits: bool) {
        for worker in 0..self.given {
            let v = &self.view.workers[worker];
            let model = self.view.model_of(v);
            let is_idle = v.phase == Phase::Serving && !self.view.has_work(v) && !model.pin;
            let Some(ttl) = model.idle_ttl_ms.filter(|_| is_idle) else { continue };
            let at = v.idle_since.unwrap_or(self.now).saturating_add(ttl);
            if at > self.now {
                self.wake(at);
            } else if !somebody_waits {
                let decision = self.words().unload(v);
                self.view.workers[worker].phase = Phase::Leaving;
                self.plan.steps.push(Step { action: Action::Unload(worker), decision });
            }
        }
    }

    /// A reason for what is, if there is no other.
    fn say_something(&mut self) {
        if !self.plan.steps.is_empty() || !self.plan.stays.is_empty() {
            return;
        }
        let blocked: Vec<&ModelView> = self.view.models.iter().filter(|m| m.pending() > 0 && !m.can_load()).collect();
        let workers = || self.view.workers.iter();
        let waits = workers().find(|w| w.phase == Phase::Waiting);
        let leaves = workers().find(|w| w.phase == Phase::Leaving);
        let loads = workers().find(|w| matches!(w.phase, Phase::Loading { .. }));
        let words = self.words();
        let decision = if let Some(worker) = leaves {
            words.leaving(worker, waits.filter(|w| w.set.overlaps(worker.set)))
        } else if let Some(worker) = loads.or(waits) {
            words.loading(worker)
        } else if let Some(worker) = workers().find(|w| self.view.has_work(w)) {
            words.alone(worker)
        } else if let Some(model) = self.view.models.iter().find(|m| m.paused > 0) {
            words.paused(model)
        } else if let Some(worker) = workers().next() {
            words.alone(worker)
        } else if let Some(first) = blocked.first() {
            let each: Vec<_> = blocked
                .iter()
                .map(|m| format!("{} ({} pending): {}", m.name, m.pending(), m.trouble.as_deref().unwrap_or_default()))
                .collect();
            let mut decision = words.blocked(first);
            decision.reason = format!("nothing can be loaded: {}", each.join("; "));
            decision
        } else {
            words.idle()
        };
        // One whose trouble should be over is ended by a report: waking up for it would not let the loop sleep.
        let again = blocked.iter().filter_map(|m| m.trouble_until).filter(|at| *at > self.now).min();
        let is_blocked = decision.code == "blocked";
        self.plan.stays.push(decision);
        if let Some(at) = again.filter(|_| is_blocked) {
            self.wake(at);
        }
    }
}

/// What a set costs, and of those that cost the same: whether it is lent, whether a copy must be dropped there, and what is in
/// use on it.
type Rank = (f64, (bool, bool, u64));

fn is_less(a: Rank, b: Rank) -> bool {
    a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)).is_lt()
}

#[cfg(test)]
#[path = "plan_tests.rs"]
pub(super) mod tests;
