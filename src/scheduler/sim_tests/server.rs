//! The simulated server: what `run` does around the state machine, its starts and crashes.

use super::*;

impl Sim {
    /// A start: recovery, the queue taken in, all workers absent.
    pub(super) fn boot(&mut self) {
        self.generation += 1;
        let mut clock = Held::default();
        let now = clock.read(self.offset + self.now, self.now);
        self.lost_time = self.lost_time.max(self.shown - now);
        self.disk.recover(now);
        let state = State::new(&self.setup.specs, self.setup.knobs.clone(), &self.disk.learned, self.disk.epoch)
            .with_tenants(&self.disk.served, &BTreeMap::new())
            .with_controls(&self.disk.controls);
        self.server = Some(Server {
            state,
            clock,
            inbox: VecDeque::new(),
            reports: VecDeque::new(),
            ops: VecDeque::new(),
            committing: false,
            turning: false,
            timer: 0,
            next_number: self.disk.next_number(),
            next_run: 1,
            stops: HashMap::new(),
            early: BTreeSet::new(),
            tasks: BTreeMap::new(),
            run_of: BTreeMap::new(),
            stopping: None,
        });
        let waiting: Vec<QueuedJob> = self.disk.queued().collect();
        waiting.iter().for_each(|job| self.server().state.enqueue(job, now));
        for index in 0..self.workers.len() {
            if self.workers[index].phase == Phase::Blocked {
                self.report(index, Report::NoGpu);
            }
        }
        // Callers of the last run are gone.
        let callers: Vec<JobId> = self.open().filter(|row| row.new.face == Face::Sync).map(|row| row.id).collect();
        for id in callers {
            let after = self.hop();
            self.ours(after, Ev::AskAgain(Op::Cancel { id, code: ErrorCode::ClientDisconnected }));
        }
        if !self.faults {
            self.lets_go();
        }
        self.step();
        self.end_turn();
    }

    /// The process ends at once, and its workers with it.
    pub(super) fn crash(&mut self) {
        let Some(server) = self.server.take() else { return };
        self.note(|| "CRASH".to_owned());
        self.seen.crashes += 1;
        self.generation += 1;
        // What was inserted as running and not committed is no attempt; its number is given again.
        let tokens = server.tasks.values().map(|task| task.job.token);
        let known = |token: &Token| self.disk.jobs.get(&token.id.number).is_some_and(|row| row.id == token.id);
        self.old.extend(tokens.filter(known));
        for index in 0..self.workers.len() {
            if self.workers[index].phase != Phase::Blocked {
                self.enter(index, Phase::Absent);
            }
            let worker = &mut self.workers[index];
            (worker.failed_loads, worker.early_deaths) = (0, 0);
            worker.orders.clear();
        }
        let down = self.rng.range(10, 5_000);
        self.world(down, Ev::Boot);
    }

    pub(super) fn tell(&mut self, message: Message) {
        self.server().inbox.push_back(message);
        self.wake();
    }

    pub(super) fn wake(&mut self) {
        if !std::mem::replace(&mut self.server().turning, true) {
            let after = self.hop();
            self.ours(after, Ev::Turn);
        }
    }

    /// What `Scheduler::run` does when it is woken: reports before messages, one report or some messages per step.
    pub(super) fn turn(&mut self) {
        if self.server().stopping == Some(0) {
            self.server().stopping = Some(self.now + 20_000);
            self.apply(Event::Stop);
            self.step();
        }
        loop {
            if let Some((model, report)) = self.server().reports.pop_front() {
                self.note(|| format!("loop: {model} {report:?}"));
                self.apply(Event::Report { model, replica: 0, report });
            } else if self.server().inbox.is_empty() {
                break;
            } else {
                for _ in 0..self.rng.pick(&[1, 2, 256]) {
                    let Some(message) = self.server().inbox.pop_front() else { break };
                    self.on_message(message);
                }
            }
            self.step();
        }
        self.end_turn();
    }

    pub(super) fn end_turn(&mut self) {
        if let Some(hard_at) = self.server().stopping
            && hard_at > 0
            && (self.server().state.is_quiet() || hard_at <= self.now)
        {
            return self.crash();
        }
        let now = self.clock();
        let server = self.server();
        server.timer += 1;
        let (timer, stopping) = (server.timer, server.stopping.is_some());
        if let Some(at) = server.state.wake_at() {
            self.ours((at - now).max(1), Ev::Timer(timer));
        } else if stopping {
            self.ours(1_000, Ev::Timer(timer));
        }
    }

    fn apply(&mut self, event: Event) {
        let now = self.clock();
        if let Event::Ended { number, .. } = &event {
            self.server().run_of.remove(number);
        }
        if let Event::Claimed { lost: numbers, .. } | Event::Unclaimed { numbers, .. } = &event {
            for number in numbers {
                self.server().run_of.remove(number);
            }
        }
        let is_control = matches!(event, Event::Control(_));
        let purge = match &event {
            Event::Purge { model, before } => Some((model.clone(), *before, self.purgeable(model.as_deref(), *before))),
            _ => None,
        };
        let effects = self.server().state.on_event(event, now);
        if let Some((model, before, waiting)) = purge {
            let running = self.server().run_of.keys().copied().collect::<BTreeSet<i64>>();
            let cancelled: BTreeSet<i64> = effects
                .iter()
                .flat_map(|effect| match effect {
                    Effect::CancelQueued(numbers) => numbers.clone(),
                    _ => Vec::new(),
                })
                .collect();
            assert_eq!(cancelled, waiting, "a purge ends those that wait, and no other");
            assert!(cancelled.is_disjoint(&running), "a purge ends what runs");
            assert!(self.purgeable(model.as_deref(), before).is_empty(), "a purge leaves somebody");
            self.seen.purged += cancelled.len();
        }
        self.carry_out(effects);
        if is_control {
            self.seen.controls += 1;
            let controls = self.server().state.controls().clone();
            self.ask(Op::KeepControls(controls));
        }
    }

    /// Somebody who found a job in a list has cancelled it before the loop has heard of it at all: it waits until its claim
    /// is refused.
    fn note_early(&mut self, model: &str, number: i64) {
        let server = self.server();
        let is_known = server.state.index_of(model).is_some_and(|index| {
            let queue = &server.state.models[index].queue;
            queue.running().contains_key(&number) || queue.recount().iter().any(|job| job.number == number)
        });
        if !is_known {
            server.early.insert(number);
        }
    }

    /// Waiting jobs that a purge is to end.
    fn purgeable(&self, model: Option<&str>, before: i64) -> BTreeSet<i64> {
        let models = self.server.iter().flat_map(|server| &server.state.models);
        let models = models.filter(|known| model.is_none_or(|model| *known.name == *model));
        models.flat_map(|model| model.queue.recount()).map(|job| job.number).filter(|number| *number < before).collect()
    }

    pub(super) fn step(&mut self) {
        let now = self.clock();
        let effects = self.server().state.step(now);
        self.carry_out(effects);
    }

    fn on_message(&mut self, message: Message) {
        self.note(|| format!("loop: {message:?}"));
        match message {
            Message::Event(event) => {
                match &event {
                    Event::Claimed { lost: numbers, .. } | Event::Unclaimed { numbers, .. } => {
                        numbers.iter().for_each(|number| drop(self.server().stops.remove(number)))
                    }
                    Event::Gone { model, number, .. } => self.note_early(model, *number),
                    Event::Ended { number, .. } => drop(self.server().stops.remove(number)),
                    _ => {}
                }
                self.apply(event);
            }
            Message::Submit(jobs) => self.submit(jobs),
            Message::Cancel(number) => {
                if let Some(stop) = self.server().stops.get(&number).cloned() {
                    stop.set(true);
                    let hit =
                        |task: &Dispatch| matches!(task.stage, Stage::Working(_)) && Rc::ptr_eq(&task.cancelled, &stop);
                    let task = self.server().tasks.iter().find(|(_, task)| hit(task)).map(|(task, _)| *task);
                    if let Some(task) = task {
                        let after = self.hop();
                        self.ours(after, Ev::Over(task, Outcome::Stopped, false));
                    }
                }
            }
        }
    }

    fn submit(&mut self, jobs: Vec<NewJob>) {
        let sync = jobs.iter().find(|job| job.face == Face::Sync).map(|job| job.model.clone());
        let count = jobs.len();
        let server = self.server();
        let refused = server.stopping.is_some()
            || jobs.iter().any(|job| server.state.is_draining(&job.model))
            || server.state.admit(&jobs[0].tenant, count).is_err()
            || sync.is_some_and(|model| server.state.refusal(&model).is_some());
        if refused {
            self.seen.refused_submissions += count;
            return;
        }
        let now = self.clock();
        let mut numbered = Vec::new();
        for job in jobs {
            let server = self.server();
            server.state.count_arrival(&job.model, now);
            let number = server.next_number;
            server.next_number += 1;
            // A number may have been given to a submission that was not committed.
            let nature = self.nature(&job);
            self.natures.insert(number, nature);
            self.note(|| format!("{number} is {nature:?}"));
            numbered.push((JobId::new(now, number, 7), job));
        }
        let queued: Vec<QueuedJob> = numbered
            .iter()
            .map(|(id, job)| {
                let (model, tenant) = (Arc::from(job.model.as_str()), Arc::from(job.tenant.as_str()));
                QueuedJob::of(id.number, id.created_ms, job, model, tenant)
            })
            .collect();
        if let [only] = &queued[..]
            && let Some(place) = self.server().state.reserve(only, now)
        {
            self.seen.fast += 1;
            self.check_paused(&only.model);
            self.check_room(&only.model);
            let job = numbered.remove(0);
            let task = self.insert_claimed(&job, place);
            return self.ask(Op::InsertClaimed { job, task });
        }
        self.ask(Op::Insert { jobs: numbered, queued });
    }

    fn insert_claimed(&mut self, (id, new): &(JobId, NewJob), place: Place) -> u64 {
        let cancelled = Rc::new(Cell::new(false));
        self.server().stops.insert(id.number, cancelled.clone());
        let mut rows = Rows::default();
        rows.insert(vec![(*id, new.clone())], false, None, 0);
        let job = rows.claim(&[id.number], 0).remove(0);
        let number = self.server().next_run;
        self.server().next_run += 1;
        self.server().run_of.insert(id.number, number);
        let name = Arc::from(new.model.as_str());
        self.start_task(job, name, place, None, number, false, false, cancelled, Stage::Inserting)
    }

    #[expect(clippy::too_many_arguments, reason = "one record")]
    pub(super) fn start_task(
        &mut self,
        job: ClaimedJob,
        name: Arc<str>,
        place: Place,
        run: Option<(i64, usize)>,
        number_of_run: i64,
        isolated: bool,
        alone: bool,
        cancelled: Rc<Cell<bool>>,
        stage: Stage,
    ) -> u64 {
        self.next_task += 1;
        let task = self.next_task;
        let model = self.server().state.index_of(&name).unwrap();
        let one = Dispatch {
            job,
            model,
            name,
            place,
            run,
            number_of_run,
            isolated,
            alone,
            cancelled,
            stage,
            since: 0,
            relayed: false,
            by_deadline: false,
            answered: false,
            suspect: false,
            verdict: None,
            pause: 200,
        };
        let number = one.number();
        assert!(self.server().tasks.values().all(|other| other.number() != number), "two attempts of {number}");
        self.server().tasks.insert(task, one);
        task
    }

    pub(super) fn carry_out(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Claim { model, place, run } => {
                    let number = self.server().next_run;
                    self.server().next_run += 1;
                    self.note(|| {
                        let numbers: Vec<i64> = run.jobs.iter().map(|job| job.number).collect();
                        format!("claim {model} load {} run {number} {numbers:?} alone {}", place.load, run.alone)
                    });
                    self.check_paused(&model);
                    self.check_run(&run);
                    self.check_room(&model);
                    for job in &run.jobs {
                        self.server().run_of.insert(job.number, number);
                        self.server().stops.insert(job.number, Rc::default());
                    }
                    self.ask(Op::Claim { model, place, run, number });
                }
                Effect::Order { model, order, .. } => {
                    self.note(|| format!("order {model} {order:?}"));
                    let index = self.server().state.index_of(&model).unwrap();
                    self.workers[index].orders.push_back(order);
                    if order == Order::Stop && self.faults && self.rng.chance(self.setup.troubles / 2) {
                        // It dies while it is told to stop.
                        self.dies(index);
                    }
                    let after = self.hop();
                    self.world(after, Ev::Orders(index));
                }
                Effect::Evict { numbers } => panic!("no GPU vanishes here: {numbers:?}"),
                Effect::Fetch { model, .. } | Effect::EndFetch { model } => panic!("{model} has nothing to fetch"),
                Effect::EndQueued { numbers, error, overdue } => {
                    self.ask(Op::EndQueued { numbers, error, overdue, pause: 200 });
                }
                Effect::CancelQueued(numbers) => self.ask(Op::CancelQueued { numbers, pause: 200 }),
                Effect::TellLoading { numbers, .. } => self.ask(Op::TellLoading { numbers }),
                Effect::AddLoadTime { numbers, load_ms } => self.ask(Op::AddLoadTime { numbers, load_ms }),
                Effect::Learn { model, learned } => self.ask(Op::Learn { model, learned }),
                Effect::Served(tenants) => self.disk.served = tenants.into_iter().collect(),
                Effect::Announce(decision) => self.note(|| format!("decides: {}", decision.reason)),
            }
        }
    }
}
