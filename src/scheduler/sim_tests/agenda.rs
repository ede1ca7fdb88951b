//! Time in the simulation: what happens when, until every job has ended and nobody is busy.

use super::*;

impl Sim {
    pub(super) fn note(&self, text: impl FnOnce() -> String) {
        if self.trace {
            eprintln!("{:>9} {}", self.now, text());
        }
    }

    fn put(&mut self, after: Millis, stamp: u64, event: Ev) {
        self.next_event += 1;
        self.agenda.insert((self.now + after, self.next_event), (stamp, event));
    }

    pub(super) fn world(&mut self, after: Millis, event: Ev) {
        self.put(after, 0, event);
    }

    pub(super) fn ours(&mut self, after: Millis, event: Ev) {
        self.put(after, self.generation, event);
    }

    pub(super) fn of_worker(&mut self, index: usize, after: Millis, event: Ev) {
        self.put(after, self.workers[index].epoch, event);
    }

    /// A delay as between tasks of a busy program: mostly short.
    pub(super) fn hop(&mut self) -> Millis {
        match self.rng.index(20) {
            0 => self.rng.range(0, 2_000),
            1..=4 => self.rng.range(0, 50),
            _ => self.rng.range(0, 3),
        }
    }

    pub(super) fn server(&mut self) -> &mut Server {
        self.server.as_mut().expect("the server is up")
    }

    pub(super) fn clock(&mut self) -> Millis {
        let (wall, steady) = (self.offset + self.now, self.now);
        let now = self.server().clock.read(wall, steady);
        self.shown = self.shown.max(now);
        now
    }

    /// Runs until every job has ended and nobody is busy.
    pub(super) fn run(mut self) -> Seen {
        while let Some(((at, _), (stamp, event))) = self.agenda.pop_first() {
            self.now = at;
            self.seen.events += 1;
            assert!(self.seen.events < EVENTS_MAX, "no end");
            self.idle_wakes = if matches!(event, Ev::Timer(_)) { self.idle_wakes + 1 } else { 0 };
            assert!(self.idle_wakes < IDLE_WAKES_MAX, "the loop is busy with nothing");
            let changes = matches!(event, Ev::Turn | Ev::Timer(_) | Ev::Commit | Ev::Boot | Ev::Stale);
            self.happen(stamp, event);
            self.check_device();
            if changes {
                self.check();
            }
            if let Some((_, due)) = self.due {
                assert!(
                    at <= due,
                    "starved: {:?}",
                    self.open().map(|row| (row.id.number, row.state)).collect::<Vec<_>>()
                );
                if self.is_over() {
                    break;
                }
            }
        }
        assert!(self.is_over(), "nothing will happen any more, and jobs are left: {:?}", self.open().count());
        self.check_empty();
        if let Some((from, due)) = self.due {
            self.seen.worst = (self.now - from) * 100 / (due - from);
        }
        self.seen.jobs = self.disk.jobs.len();
        self.seen.cancelled = self.disk.jobs.values().filter(|row| row.state == JobState::Cancelled).count();
        self.seen.expired = self.disk.jobs.values().filter(|row| row.state == JobState::Expired).count();
        self.seen
    }

    pub(super) fn open(&self) -> impl Iterator<Item = &Row> {
        self.disk.jobs.values().filter(|row| !row.state.is_terminal())
    }

    fn is_over(&self) -> bool {
        let Some(server) = &self.server else { return false };
        self.open().next().is_none()
            && server.tasks.is_empty()
            && server.inbox.is_empty()
            && server.reports.is_empty()
            && server.ops.is_empty()
            && server.state.queued() == 0
            && server.state.is_quiet()
            && !self
                .agenda
                .values()
                .any(|(_, event)| matches!(event, Ev::Answer(_) | Ev::AskAgain(_) | Ev::GiveBack(..)))
    }

    fn happen(&mut self, stamp: u64, event: Ev) {
        let is_void = match &event {
            Ev::Turn
            | Ev::Timer(_)
            | Ev::Commit
            | Ev::Answer(_)
            | Ev::Send(_)
            | Ev::Over(..)
            | Ev::AskAgain(_)
            | Ev::GiveBack(..) => stamp != self.generation || self.server.is_none(),
            Ev::Loaded(index, _)
            | Ev::Gone(index, _)
            | Ev::BackoffOver(index)
            | Ev::Kills(index, _)
            | Ev::Noticed(index)
            | Ev::Pulse(index)
            | Ev::Gathered(index, _) => stamp != self.workers[*index].epoch,
            _ => false,
        };
        if is_void {
            return;
        }
        if !matches!(
            event,
            Ev::Turn | Ev::Timer(_) | Ev::Commit | Ev::Cancels | Ev::Operates | Ev::Stale | Ev::Strike | Ev::Arrive
        ) {
            self.note(|| format!("{event:?}"));
        }
        match event {
            Ev::Turn => {
                self.server().turning = false;
                self.turn();
            }
            Ev::Timer(number) => {
                if number == self.server().timer {
                    self.step();
                    self.end_turn();
                }
            }
            Ev::Commit => self.commit(),
            Ev::Answer(reply) => self.answered(reply),
            Ev::Send(task) => self.send(task),
            Ev::Over(task, outcome, silent) => self.over(task, outcome, silent),
            Ev::AskAgain(op) => self.ask(op),
            Ev::GiveBack(model, jobs) => {
                let numbers = jobs.iter().map(|job| job.number).collect();
                self.tell(Message::Event(Event::Unclaimed { model, numbers }));
            }
            Ev::Loaded(index, ok) => self.loaded(index, ok),
            Ev::Gone(index, lived) => self.gone(index, lived),
            Ev::BackoffOver(index) => self.backoff_over(index),
            Ev::Kills(index, task) => {
                if self.is_working(task) {
                    self.dies(index);
                }
            }
            Ev::Noticed(index) => self.clear_away(index),
            Ev::Pulse(index) => self.pulse(index),
            Ev::Gathered(index, run) => self.start_run(index, run),
            Ev::Orders(index) => self.obey(index),
            Ev::GpuBack(index) => {
                if self.workers[index].phase == Phase::Blocked {
                    self.enter(index, Phase::Absent);
                    self.report(index, Report::Available);
                }
            }
            Ev::Arrive => self.arrive(),
            Ev::Cancels => self.cancels(),
            Ev::Operates => self.operates(),
            Ev::Strike => self.strike(),
            Ev::Stale => self.stale(),
            Ev::Boot => self.boot(),
            Ev::Disk(refusing) => self.refusing = refusing && self.faults,
            Ev::Cease => self.cease(),
        }
    }
}
