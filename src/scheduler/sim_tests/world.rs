//! What the world does: jobs that arrive, callers who cancel, operators, late results, faults and their end.

use super::*;

impl Sim {
    pub(super) fn arrive(&mut self) {
        if self.submitted >= self.setup.jobs || !self.faults {
            return;
        }
        let count = if self.rng.chance(300) { self.rng.pick(&[2, 5, 16, 40]) } else { 1 };
        let jobs: Vec<NewJob> = (0..count).map(|_| self.new_job(count == 1)).collect();
        let tenant = jobs[0].tenant.clone();
        let jobs = jobs.into_iter().map(|job| NewJob { tenant: tenant.clone(), ..job }).collect();
        self.submitted += count;
        if self.server.is_some() {
            self.tell(Message::Submit(jobs));
        }
        let most = self.setup.faults_until * 2 / i64::try_from(self.setup.jobs).unwrap();
        let pause = self.rng.range(0, most);
        let pause = if self.rng.chance(300) { pause / 50 } else { pause };
        self.world(pause, Ev::Arrive);
    }

    fn new_job(&mut self, single: bool) -> NewJob {
        let now = self.offset + self.now;
        let favourite = self.rng.chance(self.setup.favour);
        let index = if favourite { 0 } else { self.rng.index(self.setup.specs.len()) };
        let rng = &mut self.rng;
        let soon = |rng: &mut Rng, permille: i64| rng.chance(permille).then(|| now + rng.range(100, 120_000));
        let spec = &self.setup.specs[index];
        let usual = i64::try_from(spec.timeout.as_millis()).unwrap();
        NewJob {
            endpoint: "/x".to_owned(),
            model: spec.name.clone(),
            tenant: rng.pick(&["a", "b", "c"]).to_owned(),
            batch: None,
            custom_id: None,
            face: if single && rng.chance(300) { Face::Sync } else { Face::Async },
            priority: rng.pick(&[0, 3, 5, 5, 5, 6, 7, 9]),
            body: bytes::Bytes::new(),
            batch_key: rng.range(1, 2),
            stream: rng.chance(300),
            present: Present::default(),
            start_deadline: soon(rng, 100),
            deadline: soon(rng, 100),
            timeout_ms: if rng.chance(100) { usual / 4 } else { usual },
            max_attempts: u32::try_from(rng.range(1, 3)).unwrap(),
            metadata: BTreeMap::new(),
            retry_of: None,
        }
    }

    pub(super) fn nature(&mut self, _: &NewJob) -> Nature {
        let rng = &mut self.rng;
        if rng.chance(self.setup.killers) {
            Nature::Killer
        } else if rng.chance(self.setup.troubles / 4) {
            let times = rng.range(1, 3);
            rng.pick(&[
                Nature::Refused,
                Nature::Hungry(1),
                Nature::Hungry(2),
                Nature::Flaky(times),
                Nature::Flaky(1),
                Nature::Slow,
                Nature::Hanging,
            ])
        } else {
            Nature::Good
        }
    }

    pub(super) fn cancels(&mut self) {
        if !self.faults {
            return;
        }
        let open: Vec<JobId> = self.open().map(|row| row.id).collect();
        if self.server.is_some() && !open.is_empty() && self.rng.chance(200) {
            let id = self.rng.pick(&open);
            let code = self.rng.pick(&[ErrorCode::CancelledByUser, ErrorCode::ClientDisconnected]);
            self.note(|| format!("somebody cancels {}", id.number));
            self.ask(Op::Cancel { id, code });
        }
        let after = self.rng.range(100, 10_000);
        self.world(after, Ev::Cancels);
    }

    /// Somebody pauses, drains, purges, loads, unloads and pins.
    pub(super) fn operates(&mut self) {
        if !self.faults {
            return;
        }
        if let Some(server) = &self.server {
            let before = server.next_number - self.rng.range(0, 3);
            let index = self.rng.index(self.setup.specs.len());
            let name = self.setup.specs[index].name.clone();
            let scope = self.rng.chance(500).then(|| name.clone());
            let event = match self.rng.index(10) {
                0 => Event::Control(Control::Pause(scope)),
                1..=3 => Event::Control(Control::Resume(scope)),
                4 => Event::Control(Control::Drain(scope)),
                5 => Event::Control(Control::Load(name)),
                6 => Event::Control(Control::Unload(name)),
                7 => Event::Control(Control::Pin(name)),
                8 => Event::Control(Control::Unpin(name)),
                _ => Event::Purge { model: scope, before },
            };
            self.tell(Message::Event(event));
        }
        let after = self.rng.range(500, 20_000);
        self.world(after, Ev::Operates);
    }

    /// Nothing is held by hand any more.
    pub(super) fn lets_go(&mut self) {
        let names: Vec<String> = self.setup.specs.iter().map(|spec| spec.name.clone()).collect();
        self.tell(Message::Event(Event::Control(Control::Resume(None))));
        for name in names {
            self.tell(Message::Event(Event::Control(Control::Unpin(name))));
        }
    }

    pub(super) fn check_paused(&mut self, model: &str) {
        assert!(!self.server().state.controls().of(model).paused, "a job of {model} starts though it is paused");
    }

    /// A late or a second result of an attempt that is over.
    pub(super) fn stale(&mut self) {
        if !self.faults {
            return;
        }
        if !self.old.is_empty() && self.server.is_some() {
            let token = self.rng.pick(&self.old);
            let now = self.clock();
            let before = self.disk.jobs.get(&token.id.number).cloned();
            let error = JobError::new(ErrorCode::WorkerError, "late", true);
            let is_current =
                before.as_ref().is_some_and(|row| row.attempt == token.attempt && !row.state.is_terminal());
            let changed = if is_current {
                // Given back: its attempt is over, though no other has begun.
                self.disk.finish(token, &End::Failed(error), None, now).is_some()
            } else if self.rng.chance(500) {
                self.disk.finish(token, &End::Failed(error), None, now).is_some()
            } else {
                self.disk.requeue(token, &GiveBack::default(), now).is_some()
            };
            assert!(!changed, "a late result of {token} was accepted");
            assert!(before.is_none_or(|row| row.version == self.disk.jobs[&token.id.number].version));
            self.seen.stale += 1;
        }
        let after = self.rng.range(100, 5_000);
        self.world(after, Ev::Stale);
    }

    /// Whether a death by chance would look like the doing of an isolated job.
    fn spares(&self, index: usize) -> bool {
        let isolated = |task: &Dispatch| task.isolated && task.model == index;
        !self.setup.wild && self.server.as_ref().is_some_and(|server| server.tasks.values().any(isolated))
    }

    pub(super) fn strike(&mut self) {
        if !self.faults {
            return;
        }
        let mut index = self.rng.index(self.workers.len());
        if let Some(serving) = (0..self.workers.len()).find(|index| self.is_alive(*index))
            && self.rng.chance(700)
        {
            index = serving;
        }
        match self.rng.index(16) {
            0 => self.crash(),
            2 if self.server.is_some() => {
                let server = self.server();
                if server.stopping.is_none() {
                    server.stopping = Some(0);
                    self.wake();
                }
            }
            3..=5 | 14 | 15 if !self.spares(index) => self.dies(index),
            6 => {
                if let Phase::Serving { since, dead: false, suspected, .. } = self.workers[index].phase {
                    let all = self.setup.wild && self.rng.chance(500);
                    let hung = if all { Hung::All } else { Hung::Jobs };
                    self.workers[index].phase = Phase::Serving { since, dead: false, hung, suspected };
                    self.seen.stopped_hung += 1;
                    if all {
                        let after = self.rng.range(6_000, 21_000);
                        self.of_worker(index, after, Ev::Noticed(index));
                    }
                }
            }
            7 if !self.spares(index) => {
                // One connection breaks; the worker lives.
                let working = |task: &Dispatch| task.model == index && matches!(task.stage, Stage::Working(_));
                let hit =
                    self.server.as_ref().and_then(|s| s.tasks.iter().find(|(_, t)| working(t)).map(|(id, _)| *id));
                if let Some(task) = hit {
                    self.ours(0, Ev::Over(task, lost(true), false));
                }
            }
            8 => {
                self.refusing = true;
                let until = self.rng.pick(&[50, 2_000, 20_000]);
                self.world(until, Ev::Disk(false));
            }
            9 => self.slow_disk = !self.slow_disk,
            10 => self.offset += 86_400_000,
            11 => {
                self.offset -= self.rng.range(1, 3_600_000);
            }
            12 => {
                self.workers[index].orders.push_back(Order::Retry);
                self.world(0, Ev::Orders(index));
            }
            _ => {}
        }
        let often = 1_000_000 / self.setup.troubles;
        let after = self.rng.range(50, often * 4);
        self.world(after, Ev::Strike);
    }

    /// From now on nothing goes wrong any more but what jobs do, and every job must end within the sum of
    ///
    /// - what is under way: a load that hangs, a pause of the store, a server that is down, a back-off (at half the pace if
    ///   the clock was set back);
    /// - twice what the clock lost over restarts, since pauses that were written down before last longer by it (at half the
    ///   pace, if it was set back once more);
    /// - for each attempt that a job has left: a load and a stop, its time limit and its pause. Jobs that fail by themselves
    ///   have three, others two (one may be on a worker that hangs);
    /// - for each death that killers have left: a load, a stop, a back-off of the model, and the time limit of what it takes
    ///   along. A killer has seven: its first, five of the search, and the last.
    pub(super) fn cease(&mut self) {
        self.faults = false;
        self.refusing = false;
        self.slow_disk = false;
        let swap = 2 * self.setup.load_ms.iter().max().unwrap() + STOP_MAX;
        let limit = self.setup.specs.iter().map(|spec| spec.timeout.as_millis()).max().unwrap();
        let limit = i64::try_from(limit).unwrap();
        let (mut attempts, mut deaths) = (3 * i64::try_from(self.flying_submissions()).unwrap(), 0);
        for row in self.open() {
            match self.natures[&row.id.number] {
                Nature::Killer => deaths += 7,
                Nature::Flaky(_) | Nature::Hanging => attempts += 3,
                // Among 32, 16, 8, 4 and 2, alone, and with nothing beside; it takes its run along.
                Nature::Hungry(_) => attempts += 7,
                Nature::Good | Nature::Refused | Nature::Slow => attempts += 2,
            }
        }
        let under_way = LOAD_LIMIT + 2 * BACKOFF_MAX + SLACK;
        let work = attempts * (swap + limit + 2 * 4_000) + deaths * (swap + 2 * BACKOFF_MAX + limit);
        let bound = under_way + 2 * self.lost_time + work;
        self.due = Some((self.now, self.now + bound));
        if self.server.is_some() {
            self.lets_go();
        }
        self.note(|| format!("faults cease; jobs have {attempts} attempts and {deaths} deaths left, and {bound} ms"));
    }

    fn flying_submissions(&self) -> usize {
        let Some(server) = &self.server else { return 0 };
        let in_ops = server.ops.iter().map(|op| match op {
            Op::Insert { jobs, .. } => jobs.len(),
            Op::InsertClaimed { .. } => 1,
            _ => 0,
        });
        let in_inbox = server.inbox.iter().map(|message| match message {
            Message::Submit(jobs) => jobs.len(),
            _ => 0,
        });
        in_ops.chain(in_inbox).sum()
    }
}
