//! How devices change hands: plans are carried out, workers drain, stop or are parked, load and get ready.

use super::*;
use crate::policy::plan::{self, Action, Step, View};
use crate::policy::{decision, sets};

/// Decisions that changed something, kept for a person to look back on.
const HISTORY_MAX: usize = 50;
/// Waiting jobs that are told when their model is being loaded.
pub(in crate::scheduler) const TOLD_MAX: usize = 256;

impl State {
    pub(super) fn plan(&mut self, now: Millis, effects: &mut Vec<Effect>) -> Option<Millis> {
        let (view, places) = self.view_with_places(now);
        let plan = plan::plan(&view, &self.knobs, now);
        self.decision = plan.decision().cloned();
        self.reservations = plan.reservations;
        let mut gone = Vec::new();
        for Step { action, decision } in plan.steps {
            match action {
                Action::Load { model, set, out, guest_until } => {
                    gone.extend(out.iter().map(|worker| places[*worker]));
                    self.assign(model, set, guest_until);
                }
                Action::Unload(worker) => gone.push(places[worker]),
            }
            let decision = if decision.action == "swap" { self.with_hint(decision) } else { decision };
            self.announce(decision, effects);
        }
        self.note_overload(now, effects);
        // Not before: it changes nobody's place, but a worker that stops at once may be parked, and so be asked for again.
        for worker in gone {
            self.leave(worker, false, now, effects);
        }
        self.load_where_free(now, effects);
        for decision in self.own_leave_first(&view, now).into_iter().chain(plan.stays) {
            effects.extend(self.journal.keep(decision).map(Effect::Announce));
        }
        plan.wake_at
    }

    pub(super) fn announce(&mut self, decision: Decision, effects: &mut Vec<Effect>) {
        self.history.push_front(decision.clone());
        self.history.truncate(HISTORY_MAX);
        effects.extend(self.journal.keep(decision).map(Effect::Announce));
    }

    /// As the policy sees it.
    #[cfg(test)]
    pub(in crate::scheduler) fn view(&self, now: Millis) -> View {
        self.view_with_places(now).0
    }

    /// The view, and the place among our workers of each of its workers.
    pub(super) fn view_with_places(&self, now: Millis) -> (View, Vec<usize>) {
        let parked = |index: usize, bare: bool| {
            let lies =
                self.workers.iter().filter(|w| w.model == index && w.phase == Phase::Parked && w.is_bare == bare);
            lies.map(|w| w.set).collect::<Vec<GpuSet>>()
        };
        let mut models: Vec<_> =
            self.models.iter().enumerate().map(|(i, m)| m.view(&self.inventory, parked(i, false), now)).collect();
        for (index, model) in models.iter_mut().enumerate() {
            if model.parked.is_empty() {
                model.parked = parked(index, true);
                model.bare = !model.parked.is_empty();
            }
            if model.bare {
                model.load_ms = self.models[index].load_ms(Source::Bare);
            }
            let name = &self.models[index].name;
            if self.is_unloaded(index) {
                model.trouble.get_or_insert_with(|| format!("the workers of {name} that there are leave first"));
            } else if self.is_dropping_the_last(index) {
                model.trouble.get_or_insert_with(|| format!("the last worker of {name} is leaving host memory"));
            }
        }
        let seen = self.workers.iter().enumerate().filter_map(|(place, worker)| {
            let model = &self.models[worker.model];
            Some((worker.view(model.queue.running_by_class(worker.replica), model.load_ms(worker.source()))?, place))
        });
        let (workers, places) = seen.unzip();
        let gpus = self.inventory.gpu_count();
        let reservations = self.reservations.clone();
        let residues = self.residues();
        let all_paused = self.controls.all.paused;
        (View { devices: self.inventory.devices(), gpus, models, workers, reservations, residues, all_paused }, places)
    }

    /// Why models wait that are in no trouble but that workers of their own have to leave before one is loaded.
    fn own_leave_first(&self, view: &View, now: Millis) -> Vec<Decision> {
        let all = view.models.iter().zip(&self.models);
        let wait = all.filter(|(seen, model)| seen.pending() > 0 && !seen.can_load() && model.blocked().is_none());
        wait.map(|(seen, _)| decision::own_leave_first(seen, now)).collect()
    }

    /// Whether all the numbers that workers of a model may have are taken, one of them by a worker that leaves host memory. It
    /// keeps its number until its process is gone; the report of that makes a new plan.
    fn is_dropping_the_last(&self, index: usize) -> bool {
        let of_it = || self.workers.iter().filter(|w| w.model == index);
        let count = of_it().count() >= self.models[index].max_replicas() as usize;
        count && of_it().any(|w| w.phase == Phase::Dropping) && !of_it().any(|w| w.phase == Phase::Parked)
    }

    /// Marks models that no device of this box could ever hold.
    pub(super) fn mark_too_big(&mut self) {
        let view = self.models_on(&self.inventory.whole());
        for (index, model) in self.models.iter_mut().enumerate() {
            let is_too_big = !sets::fits_the_box(&view, index);
            if is_too_big && model.trouble.as_ref().is_none_or(|trouble| trouble.reason == StateReason::NoGpu) {
                model.too_big = Some(decision::too_big(&view, index, 0));
                model.block_too_big();
            } else if !is_too_big && model.too_big.take().is_some() {
                // A larger GPU has come.
                model.trouble = None;
            }
        }
    }

    /// The models on the devices that are there now, all empty.
    pub(super) fn view_of_models(&self) -> View {
        self.models_on(&self.inventory)
    }

    fn models_on(&self, inventory: &Inventory) -> View {
        View {
            devices: inventory.devices(),
            gpus: inventory.gpu_count(),
            models: self.models.iter().map(|m| m.view(inventory, Vec::new(), 0)).collect(),
            ..View::default()
        }
    }

    /// Why jobs of this model must not be accepted: no device could ever hold it. Keeps that as a decision.
    pub fn refuse_too_big(&mut self, model: &str, now: Millis) -> Option<JobError> {
        let decision = self.models[self.index_of(model)?].too_big.clone()?;
        let error = JobError::new(ErrorCode::NoWorkerForModel, decision.reason.clone(), false);
        self.journal.keep(Decision { at: now, ..decision });
        Some(error)
    }

    /// Gives a set to a new worker of a model, or to a parked one, to be loaded when those who leave have left.
    fn assign(&mut self, model: usize, set: GpuSet, guest_until: Option<Millis>) {
        let is_parked = |worker: &Worker| worker.model == model && worker.phase == Phase::Parked;
        // One wakes only where it was; elsewhere it is loaded from nothing, and its place in host memory lost.
        let there = self.workers.iter().position(|worker| is_parked(worker) && worker.set == set);
        let is_full =
            self.workers.iter().filter(|w| w.model == model).count() >= self.models[model].max_replicas() as usize;
        if let Some(parked) = there.or_else(|| self.workers.iter().position(is_parked).filter(|_| is_full)) {
            let worker = &mut self.workers[parked];
            (worker.set, worker.guest_until) = (set, guest_until);
            worker.phase = Phase::Waiting { was_parked: true };
            return;
        }
        let is_free = |replica: &u32| self.find(model, *replica).is_none();
        let replica = (0..).find(is_free).unwrap_or(u32::MAX);
        let phase = Phase::Waiting { was_parked: false };
        self.workers.push(Worker {
            model,
            replica,
            set,
            phase,
            guest_until,
            lies_on: None,
            host: HostCopy::default(),
            is_bare: false,
            has_slept: false,
            canary: None,
            silence: Silence::default(),
            is_outdated: false,
            at_leisure: false,
            may_rehearse: false,
            company: Company::default(),
            keeps: 0,
            promised: None,
        });
    }

    /// Loads the workers whose sets are free now, in the order of decisions.
    pub(super) fn load_where_free(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        let mut place = 0;
        while place < self.workers.len() {
            let worker = &self.workers[place];
            let Phase::Waiting { was_parked } = worker.phase else {
                place += 1;
                continue;
            };
            let model = &self.models[worker.model];
            let is_wanted = model.pending() != (0, 0) || model.preload || model.wanted_at.is_some();
            if self.stopping || !is_wanted || model.blocked().is_some() {
                // Its jobs were cancelled, or it is in trouble: the next plan decides anew.
                self.plan_now = true;
                if was_parked {
                    self.workers[place].lie_down();
                    place += 1;
                } else {
                    self.workers.remove(place);
                }
                continue;
            }
            if self.is_free(place) && self.is_clear(place, now, effects) {
                self.load(place, was_parked, now, effects);
            }
            place += 1;
        }
    }

    /// Whether a worker whose load takes host memory at once has to wait until a copy that is being dropped is gone.
    fn waits_for_host_memory(&self, place: usize) -> bool {
        let model = &self.models[self.workers[place].model];
        model.park && model.copies_at_load() && self.workers.iter().any(|w| w.phase == Phase::Dropping)
    }

    /// Whether a waiting worker fits beside all who are still there, or has the place to itself, if it is to.
    fn is_free(&self, place: usize) -> bool {
        let worker = &self.workers[place];
        let is_in_the_way =
            |other: usize| self.workers[other].set.overlaps(worker.set) && self.has_to_leave_for_apart(other);
        if self.is_apart(worker) && (0..self.workers.len()).any(is_in_the_way) {
            return false;
        }
        worker.set.gpus().all(|device| {
            let size = self.size(device);
            self.used(device) + self.needs(worker, size) <= size
        })
    }

    pub(super) fn size(&self, device: u32) -> u64 {
        self.inventory.devices()[device as usize].max(1)
    }

    /// What a worker needs of a device of this size, in bytes.
    fn needs(&self, worker: &Worker, size: u64) -> u64 {
        self.models[worker.model].bytes_on(&self.inventory).unwrap_or(size).max(1)
    }

    /// What a worker takes of it: all of it, as long as nobody is to be beside it.
    pub(super) fn bytes(&self, worker: &Worker, size: u64) -> u64 {
        if self.is_apart(worker) { size } else { self.needs(worker, size) }
    }

    /// Memory of a device that is in use by workers on it, in bytes.
    pub(super) fn used(&self, device: u32) -> u64 {
        let size = self.size(device);
        let there = self.workers.iter().filter(|w| w.is_on_device() && w.set.has(device));
        there.map(|w| self.bytes(w, size)).sum()
    }

    /// Orders a load; not yet, if host memory has to be free first.
    fn load(&mut self, place: usize, was_parked: bool, now: Millis, effects: &mut Vec<Effect>) {
        let wakes = was_parked && self.workers[place].lies_on == Some(self.workers[place].set);
        let promised = self.promise(place, now, effects);
        // What reads its weights again may make a copy of them again.
        if (!wakes || self.workers[place].is_bare) && self.waits_for_host_memory(place) {
            return;
        }
        if was_parked && !wakes {
            self.lose_copy(place, now, effects);
        }
        self.note_company(place);
        let at_leisure = !was_parked && self.has_room_to_rehearse(place, promised) && self.nobody_waits(place);
        let worker = &mut self.workers[place];
        (worker.phase, worker.promised, worker.at_leisure) =
            (Phase::Loading { since: now, was_parked }, promised, at_leisure);
        worker.may_rehearse = at_leisure;
        if !wakes {
            worker.starts_anew();
        }
        let source = if wakes { worker.source() } else { Source::Disk };
        let model = &self.models[worker.model];
        let numbers = model.queue.heads(TOLD_MAX);
        if !numbers.is_empty() {
            let eta = now + round(model.load_ms(source));
            effects.push(Effect::TellLoading { numbers, model: model.name.to_string(), eta });
        }
        effects.push(self.order(place, if was_parked { Order::Wake } else { Order::Load }));
    }

    /// Whether nobody waits for this worker, or for its devices.
    fn nobody_waits(&self, place: usize) -> bool {
        let own = self.workers[place].model;
        let has_worker = |index| self.workers.iter().any(|w| w.model == index && w.stays());
        let mut all = self.models.iter().enumerate();
        all.all(|(index, model)| {
            let is_served = || has_worker(index) || model.blocked().is_some();
            model.pending() == (0, 0) || (index != own && is_served())
        })
    }

    /// Tells workers that load at leisure when somebody waits for them.
    pub(super) fn expedite(&mut self, effects: &mut Vec<Effect>) {
        for place in 0..self.workers.len() {
            let loads = matches!(self.workers[place].phase, Phase::Loading { .. });
            if self.workers[place].at_leisure && loads && !self.nobody_waits(place) {
                self.workers[place].at_leisure = false;
                effects.push(self.order(place, Order::Expedite));
            }
        }
    }

    pub(super) fn on_ready(
        &mut self,
        index: usize,
        replica: u32,
        base_url: String,
        load_ms: i64,
        now: Millis,
    ) -> Vec<Effect> {
        let Some(place) = self.find(index, replica) else {
            // Ready after we changed our mind: it must not stay beside another.
            let (model, set) = (self.models[index].name.to_string(), GpuSet::one(0));
            return vec![Effect::Order {
                model,
                replica,
                set,
                order: Order::Stop,
                park_bytes: None,
                at_leisure: false,
            }];
        };
        let load = self.next_load;
        let max_batch = self.models[index].slots.max_batch;
        let worker = &mut self.workers[place];
        let was_parked = match &mut worker.phase {
            Phase::Serving { suspect, place, .. } => {
                // The answer to `Order::Suspect`: it is alive.
                *suspect = false;
                place.base_url = base_url;
                return Vec::new();
            }
            Phase::Loading { was_parked, .. } => *was_parked,
            // The same, after it was told to leave: its running jobs may still finish.
            Phase::Draining { .. } | Phase::Stopping { .. } | Phase::Dropping => return Vec::new(),
            Phase::Waiting { .. } | Phase::Parked => return vec![self.order(place, Order::Stop)],
        };
        let gpus = (self.models[index].needs_gpus() && !self.inventory.one_at_a_time).then_some(worker.set);
        let at = Place { replica, base_url, load, max_batch, gpus };
        worker.canary = (was_parked || worker.has_slept).then_some(load);
        worker.phase = Phase::Serving { since: now, place: at, idle_since: None, suspect: false, proven: false };
        let (set, is_bare) = (worker.set, std::mem::take(&mut worker.is_bare));
        (worker.at_leisure, worker.may_rehearse) = (false, false);
        let source = match was_parked {
            true if is_bare => Source::Bare,
            true => Source::Copy,
            false => Source::Disk,
        };
        if source != Source::Copy {
            self.models[index].count_copy(&worker.host);
        }
        self.next_load += 1;
        if set.gpus().any(|device| self.is_swap(index, device)) {
            self.swaps += 1;
            self.ledger.count_swap(index);
        }
        self.last_on[set.first as usize..(set.first + set.count) as usize].fill(Some(index));
        self.forget_preloads(index, now);
        self.note_that_it_fits(index, now);
        let model = &mut self.models[index];
        (model.trouble, model.wanted_at) = (None, None);
        model.count_load(load_ms as f64, source, now);
        let numbers = model.queue.heads(TOLD_MAX);
        let mut effects = vec![self.learn(index), self.keep_served(now)];
        if !numbers.is_empty() {
            effects.push(Effect::AddLoadTime { numbers, load_ms });
        }
        if self.is_unloaded(index) {
            self.leave(place, false, now, &mut effects);
        }
        effects
    }

    /// A model is ready: the start is over for it, and for those that do not fit beside all that are ready. Nobody leaves for them,
    /// and later they would come as a surprise.
    fn forget_preloads(&mut self, ready: usize, now: Millis) {
        self.models[ready].preload = false;
        if !self.models.iter().any(|model| model.preload) {
            return;
        }
        let (mut view, _) = self.view_with_places(now);
        view.workers.retain(|worker| worker.phase == plan::Phase::Serving);
        for (index, model) in self.models.iter_mut().enumerate() {
            // Where even an empty box has no place for it, it waits for a GPU to come.
            model.preload &= sets::has_room(&view, index) || !sets::has_place(&view, index);
        }
    }

    /// Whether a model that is loaded on a device has another one's place there, and does not stand beside it.
    fn is_swap(&self, index: usize, device: u32) -> bool {
        let stands = |last| self.workers.iter().any(|w| w.model == last && w.set.has(device) && w.is_on_device());
        self.last_on[device as usize].is_some_and(|last| last != index && !stands(last))
    }

    /// Tells a ready worker to leave when its jobs have ended. `hung`: it has stopped answering, which is news of one that
    /// leaves already, too.
    pub(super) fn leave(&mut self, place: usize, hung: bool, now: Millis, effects: &mut Vec<Effect>) {
        match &mut self.workers[place].phase {
            Phase::Serving { .. } => {
                self.workers[place].phase = Phase::Draining { hung };
                self.note_left(self.workers[place].model, now);
                self.finish_draining(now, effects);
            }
            Phase::Draining { hung: known } => *known |= hung,
            _ => {}
        }
    }

    /// A model without a worker that stays has lost its devices.
    fn note_left(&mut self, index: usize, now: Millis) {
        if !self.workers.iter().any(|w| w.model == index && w.stays()) {
            self.models[index].learned.left_at = Some(now);
        }
    }

    pub(super) fn finish_draining(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        for place in 0..self.workers.len() {
            let worker = &self.workers[place];
            let queue = &self.models[worker.model].queue;
            let Phase::Draining { hung } = worker.phase else { continue };
            if queue.running_on(worker.replica) == 0 {
                let may_stay = !hung && !self.must_end(place);
                let order = if may_stay { self.leaves_by(place, now, effects) } else { Order::Stop };
                let worker = &mut self.workers[place];
                worker.phase = Phase::Stopping { park: order != Order::Stop };
                worker.is_bare = order == Order::ParkBare;
                effects.push(self.order(place, order));
            }
        }
    }

    pub(super) fn on_left(&mut self, place: usize, now: Millis) -> Vec<Effect> {
        let index = self.workers[place].model;
        self.workers.remove(place);
        self.note_unloaded(index);
        self.note_left(index, now);
        vec![self.learn(index)]
    }

    pub(super) fn on_parked(&mut self, place: usize, now: Millis) -> Vec<Effect> {
        let index = self.workers[place].model;
        let worker = &mut self.workers[place];
        (worker.phase, worker.guest_until, worker.lies_on) = (Phase::Parked, None, Some(worker.set));
        worker.has_slept |= !worker.is_bare;
        self.note_left(index, now);
        let mut effects = vec![self.learn(index)];
        if self.must_end(place) {
            // It was on its way when it was said that nothing of it is to stay.
            self.workers[place].phase = Phase::Dropping;
            effects.push(self.order(place, Order::Stop));
        }
        effects
    }

    pub(super) fn on_died(&mut self, place: usize, now: Millis) -> Vec<Effect> {
        if matches!(self.workers[place].phase, Phase::Waiting { was_parked: false }) {
            // The old one of this number, of which nothing is left.
            return Vec::new();
        }
        if let Phase::Loading { since, was_parked: true } = self.workers[place].phase {
            // It died in host memory before it heard that it is wanted: it will, and be loaded from nothing.
            self.workers[place].phase = Phase::Loading { since, was_parked: false };
            self.workers[place].starts_anew();
            return Vec::new();
        }
        if !self.workers[place].is_on_device() {
            // In host memory.
            let index = self.workers[place].model;
            self.workers.remove(place);
            self.note_unloaded(index);
            return Vec::new();
        }
        self.on_left(place, now)
    }

    /// A worker loads from nothing, though it was to be woken.
    pub(super) fn note_cold(&mut self, place: usize) {
        let worker = &mut self.workers[place];
        let source = worker.source();
        if let Phase::Loading { was_parked, .. } = &mut worker.phase
            && std::mem::take(was_parked)
        {
            worker.starts_anew();
            if worker.lies_on == Some(worker.set) {
                self.models[worker.model].count_failed_wake(source);
            }
        }
    }

    /// A load came to nothing.
    pub(super) fn give_up(&mut self, place: Option<usize>) {
        if let Some(place) = place {
            let index = self.workers[place].model;
            self.workers.remove(place);
            self.note_unloaded(index);
        }
    }

    /// Whether a worker of this model takes jobs.
    pub(super) fn serves(&self, index: usize) -> bool {
        self.workers.iter().any(|w| w.model == index && matches!(w.phase, Phase::Serving { .. }))
    }

    pub(super) fn order(&self, place: usize, order: Order) -> Effect {
        let worker = &self.workers[place];
        let model = self.models[worker.model].name.to_string();
        let park_bytes = worker.promised.filter(|_| matches!(order, Order::Load | Order::Wake));
        let at_leisure = worker.at_leisure && order == Order::Load;
        Effect::Order { model, replica: worker.replica, set: worker.set, order, park_bytes, at_leisure }
    }

    pub(super) fn learn(&self, index: usize) -> Effect {
        let model = &self.models[index];
        Effect::Learn { model: model.name.to_string(), learned: model.to_keep(&self.inventory) }
    }
}
