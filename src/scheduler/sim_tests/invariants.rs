//! What must hold after every event, at every run, at every verdict and at the end.

use super::*;

impl Sim {
    /// A run that is about to be claimed: isolated ones share one death, and are at most half of those who died
    /// then, or all whom the death of the others acquitted.
    pub(super) fn check_run(&mut self, run: &Run) {
        if !run.alone {
            assert!(run.jobs.iter().all(|job| job.crash.is_none()), "a suspect runs among others: {run:?}");
            assert!(run.jobs.iter().all(|job| job.batch_key == run.jobs[0].batch_key), "{run:?}");
            return;
        }
        let crash = run.jobs[0].crash.expect("isolated by a death");
        if retry::is_own_mark(crash) {
            assert_eq!(run.jobs.iter().map(|job| -job.number).collect::<Vec<_>>(), [crash], "{run:?}");
            return;
        }
        self.seen.probes += 1;
        assert!(run.jobs.iter().all(|job| job.crash == Some(crash)), "suspects of two deaths: {run:?}");
        let died = self.deaths.get(&crash).copied().unwrap_or_default();
        let kept = self.kept.get(&crash).copied().unwrap_or_default();
        let count = run.jobs.len();
        let most = self.acquitted.get(&crash).map_or(died.div_ceil(2), |found| died - found);
        assert!(count <= most + kept, "{count} of {died} that died in {crash} run together");
        for job in run.jobs.iter().filter(|_| kept > 0) {
            if let Some(suspect) = self.suspects.get_mut(&job.number) {
                suspect.2 = true;
            }
        }
    }

    /// Jobs start beside answers that are being stored, but never beside more than a worker may have jobs at once.
    pub(super) fn check_room(&mut self, model: &str) {
        let state = &self.server.as_ref().unwrap().state;
        let model = &state.models[state.index_of(model).unwrap()];
        self.seen.ahead += usize::from(model.storing.len() > 0);
        let (of_it, most) = (model.storing.len(), model.slots.limit.max(model.slots.max_batch) as usize);
        assert!(of_it <= most, "a job of {} starts though {of_it} answers of {most} are being stored", model.name);
    }

    /// Nothing runs beside an isolated run.
    pub(super) fn check_alone(&self, task: u64) {
        let server = self.server.as_ref().unwrap();
        let mine = &server.tasks[&task];
        let there = |other: &&Dispatch| other.model == mine.model && matches!(other.stage, Stage::Working(_));
        let limit = self.setup.specs[mine.model].limit as usize;
        assert!(server.tasks.values().filter(there).count() <= limit, "more jobs on m{} than it takes", mine.model);
        for other in server.tasks.values().filter(there) {
            assert!(
                other.number_of_run == mine.number_of_run || !(other.isolated || mine.isolated),
                "{} runs beside {}, and one of them is isolated",
                other.number(),
                mine.number()
            );
        }
        if mine.alone {
            let beside = server.tasks.values().filter(there).count();
            assert_eq!(beside, 1, "{} is not alone", mine.number());
        }
    }

    /// Who fails for a death did it; who did it is found soon.
    pub(super) fn check_verdict(&mut self, task: u64) {
        let one = &self.server.as_ref().unwrap().tasks[&task];
        let number = one.number();
        let Some(Verdict::Fail(error)) = &one.verdict else { return };
        if error.code == ErrorCode::WorkerOom && !one.relayed {
            assert_eq!(
                (one.alone, self.natures[&number]),
                (true, Nature::Hungry(1)),
                "{number} needs no more than it got"
            );
            self.seen.hungry += 1;
        }
        if error.code != ErrorCode::WorkerLost || one.relayed {
            return;
        }
        assert!(one.alone && one.isolated, "{number} fails for a death and was not alone");
        let (first, extra, lenient) = self.suspects.get(&number).copied().expect("it had been part of a death before");
        if self.natures[&number] == Nature::Killer {
            let together = self.deaths[&first];
            let bound = together.next_power_of_two().trailing_zeros().max(1);
            assert!(lenient || extra <= bound, "{number}, a killer among {together}, took {extra} more deaths");
            self.seen.killers += 1;
        } else {
            assert!(self.setup.wild, "{number} is innocent and fails for a death");
        }
    }

    /// Jobs that a message, an operation or an answer carries.
    fn flying(&self) -> BTreeSet<i64> {
        let mut found = BTreeSet::new();
        let Some(server) = &self.server else { return found };
        for message in &server.inbox {
            match message {
                Message::Event(Event::Queued(jobs)) => found.extend(jobs.iter().map(|job| job.number)),
                Message::Event(Event::Claimed { lost: numbers, .. } | Event::Unclaimed { numbers, .. }) => {
                    found.extend(numbers);
                }
                Message::Event(Event::Ended { number, .. } | Event::Gone { number, .. }) => {
                    found.insert(*number);
                }
                _ => {}
            }
        }
        let ops = self.agenda.values().filter_map(|(stamp, event)| match event {
            Ev::AskAgain(op) if *stamp == self.generation => Some(op),
            _ => None,
        });
        for op in server.ops.iter().chain(ops) {
            match op {
                Op::Claim { run, .. } => found.extend(run.jobs.iter().map(|job| job.number)),
                Op::EndQueued { numbers, .. } | Op::CancelQueued { numbers, .. } => found.extend(numbers),
                _ => {}
            }
        }
        for (_, event) in self.agenda.values().filter(|(stamp, _)| *stamp == self.generation) {
            match event {
                Ev::GiveBack(_, jobs) => found.extend(jobs.iter().map(|job| job.number)),
                Ev::Answer(Reply::Inserted { queued: Some(jobs) }) => found.extend(jobs.iter().map(|job| job.number)),
                Ev::Answer(Reply::Claimed { run, .. }) => found.extend(run.jobs.iter().map(|job| job.number)),
                Ev::Answer(Reply::EndedQueued { numbers, .. } | Reply::CancelledQueued { numbers, .. }) => {
                    found.extend(numbers);
                }
                Ev::Answer(Reply::Cancelled { number, .. }) => {
                    found.insert(*number);
                }
                _ => {}
            }
        }
        found
    }

    pub(super) fn check_device(&self) {
        let on_device = self.workers.iter().filter(|worker| worker.is_on_device()).count();
        assert!(on_device <= 1, "two models on the device");
    }

    /// When nothing is under way between them, the state machine and the supervisors agree on who holds the device.
    fn check_agreement(&self, server: &Server) {
        if !server.reports.is_empty() || self.workers.iter().any(|worker| !worker.orders.is_empty()) {
            return;
        }
        for (index, worker) in self.workers.iter().enumerate() {
            let mine = server.state.workers.iter().any(|w| w.model == index && w.is_on_device());
            let phase = worker.phase;
            assert!(
                mine || !worker.is_on_device(),
                "m{index} is {phase:?}, and the device is held by {:?}",
                server.state.workers
            );
            assert!(!mine || worker.is_on_device(), "the device waits for m{index} for ever, which is {phase:?}");
        }
    }

    pub(super) fn check(&mut self) {
        for row in self.disk.jobs.values() {
            let now = (row.state, row.version);
            let then = self.terminal.get(&row.id.number).copied();
            assert!(then.is_none_or(|then| then == now), "{} has changed after its end", row.id.number);
            if then.is_none() && row.state.is_terminal() {
                self.terminal.insert(row.id.number, now);
            }
        }
        let Some(server) = &self.server else { return };
        self.check_agreement(server);
        let flying = self.flying();
        let mut attempts: BTreeMap<i64, &Dispatch> = BTreeMap::new();
        for task in server.tasks.values() {
            attempts.insert(task.number(), task);
        }
        let mut waiting: BTreeMap<i64, QueuedJob> = BTreeMap::new();
        let mut running: BTreeSet<i64> = BTreeSet::new();
        let mut held = 0;
        let mut by_tenant: HashMap<Arc<str>, usize> = HashMap::new();
        for model in &server.state.models {
            let jobs = model.queue.recount();
            let now = |class: Class| {
                jobs.iter().filter(|job| Class::of(job.priority) == class && is_ready(&model.queue, job)).count()
            };
            assert_eq!(
                model.queue.pending(),
                (now(Class::Interactive), now(Class::Batch)),
                "pending jobs of {}",
                model.name
            );
            for job in jobs {
                *by_tenant.entry(job.tenant.clone()).or_default() += 1;
                let number = job.number;
                assert!(waiting.insert(number, job).is_none(), "{number} waits twice");
            }
            let alone: BTreeSet<i64> =
                model.queue.running().values().filter(|r| r.alone).map(|r| server.run_of[&r.job.number]).collect();
            for number in model.queue.running().keys() {
                assert!(running.insert(*number), "{number} runs twice");
                let run = server.run_of[number];
                assert!(alone.iter().all(|other| *other == run), "{number} runs beside an isolated run");
                assert!(attempts.contains_key(number) || flying.contains(number), "nobody will end {number}");
            }
            for number in model.storing.numbers() {
                assert!(running.insert(number), "{number} runs, and its answer is being stored");
                let is_ending = attempts.get(&number).is_none_or(|task| task.answered && task.stage == Stage::Ending);
                assert!(is_ending, "{number} is answered, and its attempt is not over");
                assert!(attempts.contains_key(&number) || flying.contains(&number), "nobody will store {number}");
            }
            let most = 2 * model.slots.limit.max(model.slots.max_batch) as usize;
            assert!(model.under_way() <= most, "{} jobs of {} are under way", model.under_way(), model.name);
            held += usize::from(model.storing.is_full(0, model.slots));
        }
        assert_eq!(server.state.queued(), waiting.len());
        assert_eq!(server.state.by_tenant, by_tenant);
        for (number, task) in &attempts {
            assert!(running.contains(number), "{number} has a task and the state machine does not know");
            let row = self.disk.jobs.get(number);
            let is_current = row.is_some_and(|row| row.attempt == task.job.token.attempt);
            assert!(is_current || task.stage == Stage::Inserting, "{number} has a newer attempt");
        }
        for row in self.disk.jobs.values() {
            let number = row.id.number;
            match row.state {
                JobState::Queued => match waiting.get(&number) {
                    Some(known) if !flying.contains(&number) => {
                        assert_eq!(*known, row.queued(), "the row and the state machine say different things");
                    }
                    Some(_) => {}
                    None => {
                        let given_back = attempts.get(&number).is_some_and(|task| task.stage == Stage::Ending);
                        assert!(given_back || flying.contains(&number), "{number} is lost: {row:?}");
                    }
                },
                JobState::Running | JobState::Cancelling => {
                    let live = attempts.get(&number).is_some_and(|task| task.job.token == row.token());
                    assert!(live || flying.contains(&number), "{number} is lost: {row:?}");
                    assert!(!waiting.contains_key(&number), "{number} runs and waits");
                }
                _ => {
                    let is_told = !flying.contains(&number) && !server.early.contains(&number);
                    assert!(!is_told || !waiting.contains_key(&number), "{number} has ended and waits");
                }
            }
        }
        self.seen.held += held;
        if self.seen.events.is_multiple_of(8) && flying.is_empty() {
            self.check_view(&waiting);
        }
    }

    /// What a start on these rows would plan is what is planned now, all workers being absent. Only what rows say counts:
    /// rates of arrival and the preload of a start are not kept.
    fn check_view(&mut self, waiting: &BTreeMap<i64, QueuedJob>) {
        let now = self.clock();
        let server = self.server.as_ref().unwrap();
        // Not while somebody is about to tell of a change.
        let rows: Vec<i64> = self.disk.queued().map(|job| job.number).collect();
        let kept = *server.state.controls() == self.disk.controls;
        if !kept || !server.ops.is_empty() || !waiting.keys().eq(&rows) {
            return;
        }
        let mut rebuilt =
            State::new(&self.setup.specs, self.setup.knobs.clone(), &self.disk.learned, self.disk.epoch + 1)
                .with_controls(&self.disk.controls);
        for job in self.disk.queued() {
            // In memory, a pause has ended when the loop was awake after it.
            let ready = waiting.get(&job.number).is_some_and(|known| {
                is_ready(&server.state.models[server.state.index_of(&known.model).unwrap()].queue, known)
            });
            rebuilt.enqueue(&job, if ready { Millis::MAX } else { job.not_before.map_or(now, |at| at - 1) });
        }
        let (mut ours, mut theirs) = (server.state.view(now), rebuilt.view(now));
        ours.workers.clear();
        ours.reservations.clear();
        let mut all = true;
        for (index, (our, their)) in ours.models.iter_mut().zip(&mut theirs.models).enumerate() {
            let nothing_runs = server.state.models[index].under_way() == 0;
            all &= nothing_runs;
            (our.trouble, our.trouble_until, our.rate, our.preload) = (None, None, 0.0, false);
            (their.rate, their.preload, our.wanted_at) = (0.0, false, None);
            let learned = |state: &State| {
                let known = state.models[index].learned.clone();
                (known.load_ms, known.stop_ms, known.left_at)
            };
            // Samples of service times are kept with the next load or stop.
            (their.service_ms, their.each_ms, their.gap_ms) = (our.service_ms, our.each_ms, our.gap_ms);
            if learned(&server.state) != learned(&rebuilt) {
                // The store refused to keep them: advice only.
                (their.load_ms, their.reload_ms, their.group) = (our.load_ms, our.reload_ms, our.group);
                (their.stop_ms, their.left_at, their.cold_ms) = (our.stop_ms, our.left_at, our.cold_ms);
            }
            if nothing_runs {
                assert_eq!(our, their, "the view after a restart is another one");
                self.seen.same_views += 1;
            }
        }
        if all {
            let knobs = &self.setup.knobs;
            assert_eq!(plan::plan(&ours, knobs, now), plan::plan(&theirs, knobs, now));
            self.seen.same_plans += 1;
        }
    }

    pub(super) fn check_empty(&self) {
        let server = self.server.as_ref().unwrap();
        assert_eq!((server.state.queued(), server.state.by_tenant.len(), server.run_of.len()), (0, 0, 0));
        assert!(server.stops.is_empty(), "stops of ended jobs: {:?}", server.stops.keys());
        for model in &server.state.models {
            assert_eq!((model.queue.recount().len(), model.queue.next_wake(), model.under_way()), (0, None, 0));
        }
    }
}
