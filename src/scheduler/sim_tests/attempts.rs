//! Simulated attempts: what `dispatch` does, from sending a job to the verdict on it.

use super::*;

impl Sim {
    /// As `dispatch::run` and `dispatch::send`: the request leaves, and reaches whoever listens on the port.
    pub(super) fn send(&mut self, task: u64) {
        let now = self.clock();
        let unreadable = self.faults && self.setup.troubles > 0 && self.rng.chance(10);
        let one = self.server().tasks.get_mut(&task).unwrap();
        one.since = now;
        let index = one.model;
        if unreadable {
            let kept = retry::Requeue {
                not_before: Some(now + 1_000),
                failures: one.job.failures,
                crashes: one.job.crashes,
                suspicion: Suspicion::Kept,
                error: None,
            };
            return self.conclude(task, Verdict::Requeue(kept), false, false);
        }
        if one.cancelled.get() {
            return self.over(task, Outcome::Stopped, false);
        }
        let (timeout, by_deadline) = dispatch::time_left(&one.job, now);
        one.by_deadline = by_deadline;
        let worker = &self.workers[index];
        let one = self.server.as_mut().unwrap().tasks.get_mut(&task).unwrap();
        let listens = one.place.base_url == format!("http://{}", worker.port)
            && matches!(worker.phase, Phase::Serving { dead: false, .. });
        if !listens {
            one.stage = Stage::Working(0);
            let after = self.hop();
            return self.ours(after, Ev::Over(task, lost(false), false));
        }
        let Phase::Serving { hung, .. } = worker.phase else { unreachable!() };
        one.stage = Stage::Working(worker.epoch);
        let nature = self.natures[&one.job.token.id.number];
        let silent = hung != Hung::No || nature == Nature::Hanging;
        let run = one.run;
        let timeout = i64::try_from(timeout.as_millis()).unwrap();
        self.check_alone(task);
        self.ours(timeout, Ev::Over(task, timed_out(), silent));
        if hung != Hung::No {
            return;
        }
        match run {
            None => {
                let oom = self.runs_out_of_memory(&[task]);
                self.execute(index, task, oom);
            }
            Some((number, count)) => {
                let there = self.workers[index].runs.entry(number).or_default();
                there.push(task);
                match there.len() {
                    all if all == count => self.start_run(index, number),
                    1 => self.of_worker(index, 2_000, Ev::Gathered(index, number)),
                    _ => {}
                }
            }
        }
    }

    pub(super) fn start_run(&mut self, index: usize, run: i64) {
        let mut tasks = self.workers[index].runs.remove(&run).unwrap_or_default();
        tasks.retain(|task| self.is_working(*task));
        let oom = self.runs_out_of_memory(&tasks);
        tasks.into_iter().for_each(|task| self.execute(index, task, oom));
    }

    fn runs_out_of_memory(&self, tasks: &[u64]) -> bool {
        let nature = |task: &u64| self.natures[&self.server.as_ref().unwrap().tasks[task].number()];
        tasks.iter().any(|task| matches!(nature(task), Nature::Hungry(jobs) if tasks.len() >= jobs))
    }

    pub(super) fn is_working(&self, task: u64) -> bool {
        let task = self.server.as_ref().and_then(|server| server.tasks.get(&task));
        task.is_some_and(|task| matches!(task.stage, Stage::Working(_)))
    }

    fn execute(&mut self, index: usize, task: u64, oom: bool) {
        let one = &self.server.as_ref().unwrap().tasks[&task];
        let (number, attempt) = (one.number(), one.job.token.attempt);
        let streams = one.job.face == Face::Sync && one.job.stream;
        let usual = self.setup.service_ms[index];
        let service = self.rng.range(usual / 2, usual * 2);
        let (after, outcome) = match self.natures[&number] {
            _ if oom => (service, failed(ErrorCode::WorkerOom, true)),
            Nature::Good => (service, answer()),
            Nature::Slow => (service * 10, answer()),
            Nature::Refused => (service / 4, failed(ErrorCode::UpstreamRejected, false)),
            Nature::Flaky(times) if attempt <= times => (service, failed(ErrorCode::WorkerError, true)),
            Nature::Flaky(_) => (service, answer()),
            Nature::Killer => return self.of_worker(index, service / 2, Ev::Kills(index, task)),
            Nature::Hanging => return,
            Nature::Hungry(_) => (service, answer()),
        };
        if streams {
            self.server().tasks.get_mut(&task).unwrap().relayed = true;
        }
        self.ours(after, Ev::Over(task, outcome, false));
    }

    /// As the end of `dispatch::send`: the outcome reaches the task.
    pub(super) fn over(&mut self, task: u64, outcome: Outcome, silent: bool) {
        let Some(one) = self.server.as_ref().unwrap().tasks.get(&task) else { return };
        if !matches!(one.stage, Stage::Working(_) | Stage::Sending) {
            return;
        }
        if let (Stage::Working(epoch), Outcome::Answered(_)) = (one.stage, &outcome) {
            // A dead worker does not answer.
            if epoch != self.workers[one.model].epoch || !self.is_alive(one.model) {
                return;
            }
            if let Phase::Serving { hung: Hung::Jobs | Hung::All, .. } = self.workers[one.model].phase {
                return;
            }
        }
        let is_timeout = matches!(&outcome, Outcome::Failed { error, .. } if error.code == ErrorCode::ExecutionTimeout);
        #[expect(clippy::cast_precision_loss, reason = "less than a thousand")]
        let jitter = self.rng.range(0, 999) as f64 / 1_000.0;
        let mut attempt = Attempt {
            canary: false,
            hung_with: 0,
            failures: one.job.failures,
            crashes: one.job.crashes,
            max_attempts: one.job.max_attempts,
            isolated: one.alone,
            run_jobs: u32::try_from(one.run.map_or(1, |(_, count)| count)).unwrap(),
            has_own_mark: one.alone && one.job.crash.is_some_and(retry::is_own_mark),
            cancelling: one.cancelled.get(),
            stopping: false,
            relayed: one.relayed,
            deadline_passed: one.by_deadline && is_timeout,
            deadline: one.job.deadline,
            jitter,
        };
        let suspect = matches!(outcome, Outcome::WorkerLost { .. });
        let answered = matches!(outcome, Outcome::Answered(_));
        let (name, number, since) = (one.name.clone(), one.number(), one.since);
        if answered {
            self.tell(Message::Event(Event::Answered { model: name.clone(), number }));
        }
        if silent && is_timeout {
            let now = self.clock();
            let (hung_with, effects) = self.server().state.blame_silence(&name, number, since, now);
            attempt.hung_with = hung_with;
            self.carry_out(effects);
            self.wake();
        }
        if matches!(&outcome, Outcome::Failed { error, .. } if error.code == ErrorCode::WorkerOom) {
            self.seen.ooms += 1;
            let (model, jobs) = (self.server().tasks[&task].name.clone(), attempt.run_jobs);
            self.tell(Message::Event(Event::OutOfMemory { model, number, jobs }));
        }
        let now = self.clock();
        let verdict = retry::judge(outcome, &attempt, now);
        self.conclude(task, verdict, answered, suspect);
    }

    fn conclude(&mut self, task: u64, verdict: Verdict, answered: bool, suspect: bool) {
        let one = self.server().tasks.get_mut(&task).unwrap();
        one.stage = Stage::Ending;
        (one.answered, one.suspect) = (answered, suspect);
        one.verdict = Some(verdict);
        self.check_verdict(task);
        self.ask(Op::End { task });
    }
}
