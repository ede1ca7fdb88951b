//! The simulated store: what is committed, refused and answered.

use super::*;

impl Sim {
    pub(super) fn ask(&mut self, op: Op) {
        self.server().ops.push_back(op);
        self.write_on();
    }

    fn write_on(&mut self) {
        let idle = !self.server().committing && !self.server().ops.is_empty();
        if idle {
            self.server().committing = true;
            let after = if self.slow_disk { self.rng.range(500, 5_000) } else { self.rng.range(1, 15) };
            self.ours(after, Ev::Commit);
        }
    }

    /// The writer commits a group, all of it or nothing.
    pub(super) fn commit(&mut self) {
        self.server().committing = false;
        let count = self.server().ops.len().min(self.rng.pick(&[1, 3, 1_024]));
        let now = self.clock();
        for _ in 0..count {
            let Some(op) = self.server().ops.pop_front() else { break };
            let reply = if self.refusing {
                self.seen.refused_commits += 1;
                self.refuse(op)
            } else {
                self.write(op, now)
            };
            if let Some(reply) = reply {
                let after = self.hop();
                self.ours(after, Ev::Answer(reply));
            }
        }
        self.write_on();
    }

    fn refuse(&mut self, op: Op) -> Option<Reply> {
        match op {
            Op::Insert { .. } => Some(Reply::Inserted { queued: None }),
            Op::InsertClaimed { task, .. } => Some(Reply::InsertedClaimed { task, ok: false }),
            Op::Claim { model, place, run, number } => Some(Reply::Claimed { model, place, run, number, claims: None }),
            Op::End { task } => Some(Reply::Ended { task, committed: None }),
            Op::EndQueued { numbers, error, overdue, pause } => {
                Some(Reply::EndedQueued { numbers, error, overdue, pause, ok: false })
            }
            Op::CancelQueued { numbers, pause } => Some(Reply::CancelledQueued { numbers, pause, ok: false }),
            Op::Cancel { id, .. } => Some(Reply::Cancelled { number: id.number, cancelled: None }),
            Op::TellLoading { .. } | Op::AddLoadTime { .. } | Op::Learn { .. } | Op::KeepControls(_) => None,
        }
    }

    fn write(&mut self, op: Op, now: Millis) -> Option<Reply> {
        match op {
            Op::Insert { jobs, queued } => {
                assert_eq!(self.disk.insert(jobs, false, None, now), Accepted::New);
                Some(Reply::Inserted { queued: Some(queued) })
            }
            Op::InsertClaimed { job, task } => {
                self.disk.insert(vec![job], true, None, now);
                Some(Reply::InsertedClaimed { task, ok: true })
            }
            Op::Claim { model, place, run, number } => {
                let numbers: Vec<i64> = run.jobs.iter().map(|job| job.number).collect();
                let claims = Some(self.disk.claim(&numbers, now));
                Some(Reply::Claimed { model, place, run, number, claims })
            }
            Op::End { task } => Some(self.write_end(task, now)),
            Op::EndQueued { numbers, error, overdue, pause } => {
                let end = if overdue { End::Expired(error.clone()) } else { End::Failed(error.clone()) };
                self.disk.end_queued(numbers[0], &end, now);
                Some(Reply::EndedQueued { numbers, error, overdue, pause, ok: true })
            }
            Op::CancelQueued { numbers, pause } => {
                self.disk.end_queued(numbers[0], &End::Cancelled, now);
                Some(Reply::CancelledQueued { numbers, pause, ok: true })
            }
            Op::KeepControls(controls) => {
                self.disk.controls = controls;
                None
            }
            Op::Cancel { id, code } => {
                let (change, state) = self.disk.request_cancel(id, code, now).expect("the job exists");
                let new = &self.disk.jobs[&id.number].new;
                let cancelled = change.map(|_| (state, new.model.clone(), new.priority));
                Some(Reply::Cancelled { number: id.number, cancelled })
            }
            Op::TellLoading { numbers } => {
                self.disk.tell_loading(&numbers);
                None
            }
            Op::AddLoadTime { numbers, load_ms } => {
                self.disk.add_load_time(&numbers, load_ms);
                None
            }
            Op::Learn { model, learned } => {
                self.disk.learn(model, learned);
                None
            }
        }
    }

    /// As `dispatch::try_commit`.
    fn write_end(&mut self, task: u64, now: Millis) -> Reply {
        let one = &self.server.as_ref().unwrap().tasks[&task];
        let (token, load, before) = (one.job.token, one.place.load, one.job.crash);
        let end = match one.verdict.as_ref().unwrap() {
            Verdict::Succeed(_) => End::Succeeded(StoredAnswer {
                status: 200,
                content_type: String::new(),
                body: None,
                usage: None,
                files: Vec::new(),
            }),
            Verdict::Fail(error) => End::Failed(error.clone()),
            Verdict::Expire(error) => End::Expired(error.clone()),
            Verdict::Cancel => End::Cancelled,
            Verdict::Requeue(requeue) => {
                let back = dispatch::given_back(&one.job, load, requeue, 0.0);
                let suspicion = requeue.suspicion;
                let Some(change) = self.disk.requeue(token, &back, now) else {
                    return Reply::NotRequeued { task };
                };
                self.note_suspicion(token.id.number, load, suspicion, before);
                let waits = Back { not_before: back.not_before, crash: back.crash };
                return Reply::Ended { task, committed: Some((Some(change), Some(waits))) };
            }
        };
        let change = self.disk.finish(token, &end, None, now);
        assert!(change.is_some() || end == End::Cancelled, "the only attempt of a job is its current one");
        Reply::Ended { task, committed: Some((change, None)) }
    }

    /// `crash`: the death that the job was a suspect of when it ran.
    fn note_suspicion(&mut self, number: i64, load: i64, suspicion: Suspicion, crash: Option<i64>) {
        match suspicion {
            Suspicion::Raised => {
                *self.deaths.entry(load).or_default() += 1;
                // It was among those that ran of an earlier death: the killer of that one is found among these.
                if let Some(crash) = crash.filter(|crash| *crash != load) {
                    *self.acquitted.entry(crash).or_default() += 1;
                }
                self.suspects.entry(number).or_insert((load, 0, false)).1 += 1;
            }
            Suspicion::Dropped | Suspicion::Own => drop(self.suspects.remove(&number)),
            Suspicion::Kept => {
                if let Some(crash) = crash {
                    *self.kept.entry(crash).or_default() += 1;
                }
            }
        }
    }

    pub(super) fn answered(&mut self, reply: Reply) {
        match reply {
            Reply::Inserted { queued } => {
                if let Some(queued) = queued {
                    self.tell(Message::Event(Event::Queued(queued)));
                }
            }
            Reply::InsertedClaimed { task, ok: true } => {
                self.server().tasks.get_mut(&task).unwrap().stage = Stage::Sending;
                let after = self.hop();
                self.ours(after, Ev::Send(task));
            }
            Reply::InsertedClaimed { task, ok: false } => {
                let one = self.server().tasks.remove(&task).unwrap();
                let (model, number) = (one.name, one.job.token.id.number);
                let event = Event::Ended { model, number, answered: false, suspect: false, back: None };
                self.tell(Message::Event(event));
            }
            Reply::Claimed { model, place, run, number, claims } => self.claimed(model, place, run, number, claims),
            Reply::Ended { task, committed: Some((change, back)) } => {
                let one = self.server().tasks.remove(&task).unwrap();
                if change.is_none() {
                    self.seen.stale += 1;
                }
                self.old.push(one.job.token);
                let number = one.number();
                let (model, answered, suspect) = (one.name, one.answered, one.suspect);
                self.tell(Message::Event(Event::Ended { model, number, answered, suspect, back }));
            }
            Reply::Ended { task, committed: None } => {
                let one = self.server().tasks.get_mut(&task).unwrap();
                let pause = one.pause;
                one.pause = (pause * 2).min(30_000);
                self.ours(pause, Ev::AskAgain(Op::End { task }));
            }
            Reply::NotRequeued { task } => {
                self.server().tasks.get_mut(&task).unwrap().verdict = Some(Verdict::Cancel);
                self.ask(Op::End { task });
            }
            Reply::EndedQueued { numbers, error, overdue, pause, ok: false } => {
                let again = Op::EndQueued { numbers, error, overdue, pause: (pause * 2).min(30_000) };
                self.ours(pause, Ev::AskAgain(again));
            }
            Reply::EndedQueued { mut numbers, error, overdue, ok: true, .. } => {
                numbers.remove(0);
                if !numbers.is_empty() {
                    self.ask(Op::EndQueued { numbers, error, overdue, pause: 200 });
                }
            }
            Reply::CancelledQueued { numbers, pause, ok: false } => {
                self.ours(pause, Ev::AskAgain(Op::CancelQueued { numbers, pause: (pause * 2).min(30_000) }));
            }
            Reply::CancelledQueued { mut numbers, ok: true, .. } => {
                numbers.remove(0);
                if !numbers.is_empty() {
                    self.ask(Op::CancelQueued { numbers, pause: 200 });
                }
            }
            Reply::Cancelled { number, cancelled: Some((JobState::Cancelling, ..)) } => {
                self.tell(Message::Cancel(number))
            }
            Reply::Cancelled { number, cancelled: Some((_, model, priority)) } => {
                self.tell(Message::Event(Event::Gone { model, priority, number }));
            }
            Reply::Cancelled { cancelled: None, .. } => {}
        }
    }

    fn claimed(&mut self, model: Arc<str>, place: Place, run: Run, number: i64, claims: Option<Vec<ClaimedJob>>) {
        let Some(claims) = claims else {
            return self.ours(1_000, Ev::GiveBack(model, run.jobs));
        };
        let lost = effects::lost(&run, &claims);
        let count = claims.len();
        let tag = (count > 1 && place.max_batch > 1).then_some((number, count));
        for job in claims {
            // A job that was cancelled before has lost its stop by now only if the loop forgot it.
            let cancelled = self.server().stops.get(&job.change.number).cloned().unwrap_or_default();
            let alone = run.alone && count == 1;
            let (model, place) = (model.clone(), place.clone());
            let task = self.start_task(job, model, place, tag, number, run.alone, alone, cancelled, Stage::Sending);
            let after = self.hop();
            self.ours(after, Ev::Send(task));
        }
        if !lost.is_empty() {
            self.tell(Message::Event(Event::Claimed { model, lost }));
        }
    }
}
