//! What the store has to do, said again in memory and in the plainest way: the verbs with their guards. The store is held to
//! it (`model_tests`), and the simulation of the scheduler runs on it. Nothing here is part of the program.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;

use super::files::Body;
use super::idempotency::{Hash, KEY_TTL_MS};
use super::{Change, ClaimedJob, End, GiveBack, IdempotencyKey, Learned, QueuedJob};
use crate::domain::{Controls, ErrorCode, JobError, JobId, JobKind, JobState, Millis, NewJob, Token};

/// One job.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) id: JobId,
    pub(crate) new: NewJob,
    pub(crate) state: JobState,
    pub(crate) attempt: i64,
    pub(crate) failures: u32,
    pub(crate) crashes: u32,
    pub(crate) crash: Option<i64>,
    pub(crate) not_before: Option<Millis>,
    pub(crate) version: i64,
    pub(crate) queued_at: Millis,
    pub(crate) started_at: Option<Millis>,
    pub(crate) finished_at: Option<Millis>,
    pub(crate) error: Option<JobError>,
    pub(crate) load_ms: i64,
    /// Kinds by seq, from 1, each with its attempt.
    pub(crate) events: Vec<(&'static str, i64)>,
    pub(crate) answer: Option<Bytes>,
    cancel_code: Option<ErrorCode>,
}

impl Row {
    fn change(&mut self, kind: &'static str) -> Change {
        self.version += 1;
        let attempt = if kind == "job.queued" { 0 } else { self.attempt };
        self.events.push((kind, attempt));
        self.last_change()
    }

    fn last_change(&self) -> Change {
        let seq = i64::try_from(self.events.len()).unwrap_or(i64::MAX);
        Change { number: self.id.number, state: self.state, version: self.version, seq }
    }

    /// As it waits.
    pub(crate) fn queued(&self) -> QueuedJob {
        let (model, tenant) = (Arc::from(self.new.model.as_str()), Arc::from(self.new.tenant.as_str()));
        QueuedJob {
            was_started: self.attempt > 0,
            crash: self.crash,
            not_before: self.not_before,
            ..QueuedJob::of(self.id.number, self.id.created_ms, &self.new, model, tenant)
        }
    }

    pub(crate) fn token(&self) -> Token {
        Token { id: self.id, attempt: self.attempt }
    }
}

/// What became of an insertion.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Accepted {
    New,
    /// By an earlier one under the same key, which began with this number.
    Replayed(i64),
    /// The key came with another body.
    Reused,
}

/// All of it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rows {
    pub(crate) jobs: BTreeMap<i64, Row>,
    pub(crate) learned: BTreeMap<String, Learned>,
    pub(crate) served: BTreeMap<String, f64>,
    pub(crate) controls: Controls,
    pub(crate) epoch: i64,
    /// Writes of old attempts that were dropped.
    pub(crate) stale: u64,
    keys: BTreeMap<Hash, (Hash, i64, Millis)>,
}

impl Rows {
    pub(crate) fn insert(
        &mut self,
        jobs: Vec<(JobId, NewJob)>,
        claimed: bool,
        key: Option<IdempotencyKey>,
        now: Millis,
    ) -> Accepted {
        if let (Some(key), Some((first, _))) = (key, jobs.first()) {
            match self.keys.get(&key.key) {
                Some((request, number, at)) if now < at + KEY_TTL_MS => {
                    return if *request == key.request { Accepted::Replayed(*number) } else { Accepted::Reused };
                }
                _ => drop(self.keys.insert(key.key, (key.request, first.number, now))),
            }
        }
        for (id, new) in jobs {
            let mut row = Row {
                id,
                new,
                state: JobState::Queued,
                attempt: 0,
                failures: 0,
                crashes: 0,
                crash: None,
                not_before: None,
                version: 0,
                queued_at: id.created_ms,
                started_at: None,
                finished_at: None,
                error: None,
                load_ms: 0,
                events: Vec::new(),
                answer: None,
                cancel_code: None,
            };
            row.change("job.queued");
            if claimed {
                start(&mut row, now);
            }
            assert!(self.jobs.insert(id.number, row).is_none(), "number {} is taken", id.number);
        }
        Accepted::New
    }

    pub(crate) fn claim(&mut self, numbers: &[i64], now: Millis) -> Vec<ClaimedJob> {
        let mut claims = Vec::new();
        for number in numbers {
            if let Some(row) = self.in_state(*number, &[JobState::Queued]) {
                row.not_before = None;
                let change = start(row, now);
                claims.push(ClaimedJob {
                    change,
                    token: row.token(),
                    kind: JobKind::of_endpoint(&row.new.endpoint),
                    face: row.new.face,
                    failures: row.failures,
                    crashes: row.crashes,
                    crash: row.crash,
                    max_attempts: row.new.max_attempts,
                    stream: row.new.stream,
                    deadline: row.new.deadline,
                    timeout_ms: row.new.timeout_ms,
                    endpoint: row.new.endpoint.clone(),
                    body: Body::Inline(row.new.body.clone()),
                });
            }
        }
        claims
    }

    pub(crate) fn append(&mut self, token: Token, kind: &'static str) -> Option<Change> {
        self.of_attempt(token, &[JobState::Running, JobState::Cancelling]).map(|row| row.change(kind))
    }

    /// `answer`: of a success.
    pub(crate) fn finish(&mut self, token: Token, end: &End, answer: Option<Bytes>, now: Millis) -> Option<Change> {
        let from: &[JobState] = match end {
            End::Cancelled => &[JobState::Cancelling],
            _ => &[JobState::Running, JobState::Cancelling],
        };
        let change = self.of_attempt(token, from).map(|row| {
            row.answer = answer;
            finish(row, end, now)
        });
        self.stale += u64::from(change.is_none());
        change
    }

    pub(crate) fn end_queued(&mut self, number: i64, end: &End, now: Millis) -> Option<Change> {
        self.in_state(number, &[JobState::Queued]).map(|row| finish(row, end, now))
    }

    pub(crate) fn requeue(&mut self, token: Token, back: &GiveBack, now: Millis) -> Option<Change> {
        let change = self.of_attempt(token, &[JobState::Running]).map(|row| give_back(row, back, now));
        self.stale += u64::from(change.is_none());
        change
    }

    /// The change, if there was one, and the state afterwards; `None`: no such job.
    pub(crate) fn request_cancel(
        &mut self,
        id: JobId,
        code: ErrorCode,
        now: Millis,
    ) -> Option<(Option<Change>, JobState)> {
        let row = self.jobs.get_mut(&id.number).filter(|row| row.id == id)?;
        let change = match row.state {
            JobState::Queued => {
                row.cancel_code = Some(code);
                Some(finish(row, &End::Cancelled, now))
            }
            JobState::Running => {
                row.cancel_code = Some(code);
                row.state = JobState::Cancelling;
                Some(row.change("job.cancelling"))
            }
            _ => None,
        };
        Some((change, row.state))
    }

    pub(crate) fn tell_loading(&mut self, numbers: &[i64]) -> Vec<Change> {
        let mut changes = Vec::new();
        for number in numbers {
            changes.extend(self.in_state(*number, &[JobState::Queued]).map(|row| row.change("job.loading")));
        }
        changes
    }

    pub(crate) fn add_load_time(&mut self, numbers: &[i64], load_ms: i64) {
        for number in numbers {
            if let Some(row) = self.jobs.get_mut(number) {
                row.load_ms += load_ms;
            }
        }
    }

    pub(crate) fn learn(&mut self, model: String, learned: Learned) {
        self.learned.insert(model, learned);
    }

    /// What a start does; returns how many jobs wait again.
    pub(crate) fn recover(&mut self, now: Millis) -> usize {
        self.epoch += 1;
        let mut jobs = 0;
        for row in self.jobs.values_mut() {
            match row.state {
                JobState::Running => {
                    jobs += 1;
                    let (failures, crashes, crash) = (row.failures, row.crashes, row.crash);
                    give_back(row, &GiveBack { failures, crashes, crash, ..GiveBack::default() }, now);
                }
                JobState::Cancelling => drop(finish(row, &End::Cancelled, now)),
                _ => {}
            }
        }
        jobs
    }

    pub(crate) fn next_number(&self) -> i64 {
        self.jobs.last_key_value().map_or(1, |(number, _)| number + 1)
    }

    /// Waiting jobs in the order of their numbers.
    pub(crate) fn queued(&self) -> impl Iterator<Item = QueuedJob> {
        self.jobs.values().filter(|row| row.state == JobState::Queued).map(Row::queued)
    }

    fn in_state(&mut self, number: i64, states: &[JobState]) -> Option<&mut Row> {
        self.jobs.get_mut(&number).filter(|row| states.contains(&row.state))
    }

    fn of_attempt(&mut self, token: Token, states: &[JobState]) -> Option<&mut Row> {
        self.in_state(token.id.number, states).filter(|row| row.attempt == token.attempt)
    }
}

fn become_state(row: &mut Row, to: JobState) {
    assert!(row.state.may_become(to), "{} -> {to}", row.state);
    row.state = to;
}

fn start(row: &mut Row, now: Millis) -> Change {
    become_state(row, JobState::Running);
    row.attempt += 1;
    row.started_at = Some(now);
    row.change("job.started")
}

fn finish(row: &mut Row, end: &End, now: Millis) -> Change {
    let (state, kind, error) = match end {
        End::Succeeded(_) => (JobState::Succeeded, "job.succeeded", None),
        End::Failed(error) => (JobState::Failed, "job.failed", Some(error.clone())),
        End::Expired(error) => (JobState::Expired, "job.expired", Some(error.clone())),
        End::Cancelled => {
            let code = row.cancel_code.unwrap_or(ErrorCode::CancelledByUser);
            (JobState::Cancelled, "job.cancelled", Some(JobError::new(code, "", true)))
        }
    };
    become_state(row, state);
    row.finished_at = Some(now);
    row.error = error;
    row.change(kind)
}

fn give_back(row: &mut Row, back: &GiveBack, now: Millis) -> Change {
    become_state(row, JobState::Queued);
    row.failures = back.failures;
    row.crashes = back.crashes;
    row.crash = back.crash;
    row.not_before = back.not_before;
    row.error.clone_from(&back.error);
    row.queued_at = now;
    row.change("job.retrying")
}
