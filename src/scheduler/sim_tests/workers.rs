//! Simulated supervisors and their workers: loads, stops, deaths.

use super::*;

impl Sim {
    pub(super) fn is_alive(&self, index: usize) -> bool {
        matches!(self.workers[index].phase, Phase::Serving { dead: false, .. })
    }

    pub(super) fn report(&mut self, index: usize, report: Report) {
        let model = self.setup.specs[index].name.clone();
        if let Some(server) = &mut self.server {
            server.reports.push_back((model, report));
            self.wake();
        }
    }

    pub(super) fn enter(&mut self, index: usize, phase: Phase) {
        let worker = &mut self.workers[index];
        worker.phase = phase;
        worker.epoch += 1;
        worker.runs.clear();
    }

    pub(super) fn obey(&mut self, index: usize) {
        while self.server.is_some() && self.workers[index].phase != Phase::Leaving {
            let Some(order) = self.workers[index].orders.pop_front() else { return };
            self.follow(index, order);
        }
    }

    fn follow(&mut self, index: usize, order: Order) {
        match (self.workers[index].phase, order) {
            (Phase::Absent, Order::Load) => self.load(index),
            (Phase::Absent | Phase::Blocked | Phase::BackingOff { .. }, Order::Stop) => {
                self.report(index, Report::Stopped { stop_ms: 0 })
            }
            (Phase::Blocked, Order::Load) => self.report(index, Report::NoGpu),
            (Phase::BackingOff { until }, Order::Load) => self.report_failed(index, until),
            (Phase::Absent, Order::Retry) => self.forget(index),
            (Phase::BackingOff { .. }, Order::Retry) => {
                self.enter(index, Phase::Absent);
                self.forget(index);
            }
            (Phase::Loading, Order::Stop) => self.leave(index),
            (Phase::Serving { .. }, Order::Stop) => {
                self.lose_jobs(index);
                self.leave(index);
            }
            (Phase::Serving { since, dead, hung, suspected: false }, Order::Suspect) => {
                self.workers[index].phase = Phase::Serving { since, dead, hung, suspected: true };
                let after = if dead || hung == Hung::All { 3_400 } else { self.rng.range(1, 100) };
                self.of_worker(index, after, Ev::Pulse(index));
            }
            (Phase::Serving { .. }, Order::Proven) => self.workers[index].early_deaths = 0,
            _ => {}
        }
    }

    pub(super) fn load(&mut self, index: usize) {
        let beside: Vec<usize> = (0..self.workers.len()).filter(|other| self.workers[*other].is_on_device()).collect();
        assert!(beside.is_empty(), "m{index} is loaded beside {beside:?}");
        self.enter(index, Phase::Loading);
        self.workers[index].loading_since = self.now;
        self.report(index, Report::Loading { phase: None, percent: None });
        let usual = self.setup.load_ms[index];
        let after = self.rng.range(usual / 2, usual * 2);
        let trouble = self.faults && self.rng.chance(self.setup.troubles / 2);
        match if trouble { self.rng.index(8) } else { 8 } {
            0 => self.of_worker(index, LOAD_LIMIT, Ev::Loaded(index, None)),
            1..=5 => self.of_worker(index, after, Ev::Loaded(index, Some(false))),
            _ => self.of_worker(index, after, Ev::Loaded(index, Some(true))),
        }
    }

    pub(super) fn loaded(&mut self, index: usize, ok: Option<bool>) {
        if ok != Some(true) {
            self.seen.failed_loads += 1;
            self.workers[index].failed_loads += 1;
            let failures = self.workers[index].failed_loads;
            return self.back_off(index, failures);
        }
        if self.rng.chance(50) {
            self.workers[index].port += 10;
        }
        self.workers[index].failed_loads = 0;
        self.enter(index, Phase::Serving { since: self.now, dead: false, hung: Hung::No, suspected: false });
        let worker = &self.workers[index];
        let (base_url, load_ms) = (format!("http://{}", worker.port), self.now - worker.loading_since);
        self.report(index, Report::Ready { base_url, load_ms });
        self.obey(index);
    }

    fn back_off(&mut self, index: usize, failures: u32) {
        let wait = (1_000 << failures.min(10)).min(BACKOFF_MAX);
        let until = self.clock() + wait;
        self.enter(index, Phase::BackingOff { until });
        self.report_failed(index, until);
        self.of_worker(index, 250, Ev::BackoffOver(index));
        self.obey(index);
    }

    fn report_failed(&mut self, index: usize, retry_at: Millis) {
        let error = JobError::new(ErrorCode::ModelLoadFailed, "no", true);
        let quarantined = self.workers[index].failed_loads >= 5;
        self.report(index, Report::LoadFailed { error, retry_at, quarantined });
    }

    pub(super) fn backoff_over(&mut self, index: usize) {
        let Phase::BackingOff { until } = self.workers[index].phase else { return };
        let left = until - self.clock();
        if left > 0 {
            return self.of_worker(index, left.clamp(1, 2_000), Ev::BackoffOver(index));
        }
        self.enter(index, Phase::Absent);
        self.report(index, Report::Available);
        self.obey(index);
    }

    fn forget(&mut self, index: usize) {
        (self.workers[index].failed_loads, self.workers[index].early_deaths) = (0, 0);
        self.report(index, Report::Available);
    }

    /// Stops as ordered.
    fn leave(&mut self, index: usize) {
        self.enter(index, Phase::Leaving);
        let after = self.rng.range(10, STOP_MAX);
        self.of_worker(index, after, Ev::Gone(index, None));
    }

    /// `lived`: of a worker that died; else it was stopped.
    pub(super) fn gone(&mut self, index: usize, lived: Option<Millis>) {
        self.enter(index, Phase::Absent);
        match lived {
            None => self.report(index, Report::Stopped { stop_ms: 1 }),
            Some(lived) => {
                self.seen.deaths += 1;
                let early = if lived < EARLY { self.workers[index].early_deaths + 1 } else { 0 };
                self.workers[index].early_deaths = early;
                if early > FREE_EARLY_DEATHS {
                    self.back_off(index, early - FREE_EARLY_DEATHS);
                }
                self.report(index, Report::Died { reason: "x".to_owned() });
            }
        }
        self.obey(index);
    }

    /// The process ends: at once for its jobs, a little later for its supervisor.
    pub(super) fn dies(&mut self, index: usize) {
        if let Phase::Serving { since, dead: false, hung, suspected } = self.workers[index].phase {
            self.workers[index].phase = Phase::Serving { since, dead: true, hung, suspected };
            self.lose_jobs(index);
            let after = self.rng.range(0, 2_500);
            self.of_worker(index, after, Ev::Noticed(index));
        }
    }

    fn lose_jobs(&mut self, index: usize) {
        let epoch = self.workers[index].epoch;
        let Some(server) = &self.server else { return };
        let hit = |task: &Dispatch| task.model == index && task.stage == Stage::Working(epoch);
        let there: Vec<u64> = server.tasks.iter().filter(|(_, task)| hit(task)).map(|(task, _)| *task).collect();
        for task in there {
            let after = self.hop();
            self.ours(after, Ev::Over(task, lost(true), false));
        }
    }

    pub(super) fn clear_away(&mut self, index: usize) {
        if let Phase::Serving { since, .. } = self.workers[index].phase {
            self.lose_jobs(index);
            self.enter(index, Phase::Leaving);
            let after = self.rng.range(1, STOP_MAX);
            self.of_worker(index, after, Ev::Gone(index, Some(self.now - since)));
        }
    }

    pub(super) fn pulse(&mut self, index: usize) {
        if let Phase::Serving { since, dead, hung, suspected: true } = self.workers[index].phase {
            if dead || hung == Hung::All {
                return self.clear_away(index);
            }
            self.workers[index].phase = Phase::Serving { since, dead, hung, suspected: false };
            let base_url = format!("http://{}", self.workers[index].port);
            self.report(index, Report::Ready { base_url, load_ms: 0 });
        }
    }
}
