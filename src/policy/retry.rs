//! What the end of an attempt means for its job: done, or another attempt and when.
//!
//! Two budgets, never mixed: `failures` counts the job's own retriable errors (limit `max_attempts`); `crashes` counts
//! workers that died while they ran it. A crash isolates: the jobs of that worker go back unharmed and run again in halves
//! (see `scheduler::queue`); only a job whose worker dies again while it is isolated and alone is the killer, and fails.
//!
//! Out of memory is neither, as long as fewer jobs at once may fit: those of a run go back uncharged, and the next runs of their
//! shape are half as long (`batching`); one that was the only job of its run goes back once more, to run with nothing beside it
//! at all. Only then it fails.
//!
//! A worker that hangs, though its health is well, is like a death to those that shared it: they go back uncharged and run again
//! in halves; the one that a search leaves alone, and that lets its worker hang again, fails. One that shared it with nobody is
//! charged a failure, and runs with nothing beside it from then on.
//!
//! A stop of the server charges nothing, and what it cuts runs again; but not for a caller who has been sent a part of the answer
//! already: that job fails.

use crate::domain::worker::{Answer, Outcome};
use crate::domain::{ErrorCode, JobError, Millis};

/// What is known about the job when its attempt ends.
#[derive(Clone, Debug, PartialEq)]
pub struct Attempt {
    /// Retriable errors before this attempt.
    pub failures: u32,
    /// Crashes before this attempt.
    pub crashes: u32,
    /// Budget of `failures`.
    pub max_attempts: u32,
    /// It had the worker for itself alone, since it had seen a crash before.
    pub isolated: bool,
    /// Jobs of its run, itself included.
    pub run_jobs: u32,
    /// It had the worker for itself alone by a mark of its own: it had run out of memory before though it was the only one of its
    /// run, or had let a worker hang that it shared with nobody.
    pub has_own_mark: bool,
    /// Somebody asked to cancel it.
    pub cancelling: bool,
    /// The server is stopping: nothing is charged.
    pub stopping: bool,
    /// Its worker was woken and had answered nobody since when it failed, and is loaded from nothing now. Only for what
    /// [`may_be_the_wakes`].
    pub canary: bool,
    /// So many jobs, itself included, were on its worker when that was found to hang; 0: it does not.
    pub hung_with: u32,
    /// Output has been relayed to a caller who cannot be asked to forget it.
    pub relayed: bool,
    /// Its own deadline, not its timeout, ended the attempt.
    pub deadline_passed: bool,
    /// To be finished before.
    pub deadline: Option<Millis>,
    /// Random, from 0 to below 1: which part of its pause it waits, so that jobs that failed together do not all come back
    /// together.
    pub jitter: f64,
}

/// What to do with the job.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// `succeeded`
    Succeed(Answer),
    /// `failed`
    Fail(JobError),
    /// `cancelled`
    Cancel,
    /// `expired`
    Expire(JobError),
    /// Back to `queued`.
    Requeue(Requeue),
}

/// What an attempt says about a job as the killer of a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suspicion {
    /// The worker died, or hung: the job runs next with others of the same death only.
    Raised,
    /// It ran out of memory as the only job of its run, or let a worker hang that it shared with nobody: it runs next with
    /// nothing beside it; see [`own_mark`].
    Own,
    /// The attempt proves nothing.
    Kept,
    /// The worker survived it.
    Dropped,
}

/// Another attempt.
#[derive(Clone, Debug, PartialEq)]
pub struct Requeue {
    /// Not before; `None`: as soon as there is a slot.
    pub not_before: Option<Millis>,
    /// New value of `failures`.
    pub failures: u32,
    /// New value of `crashes`.
    pub crashes: u32,
    /// Whether it may have killed its worker.
    pub suspicion: Suspicion,
    /// Why this attempt ended; shown while it waits.
    pub error: Option<JobError>,
}

/// What stands in the place of a death for a job that is to run alone: nobody shares it.
pub const fn own_mark(number: i64) -> i64 {
    -number
}

/// Whether it is such a mark, and not the load that died.
pub const fn is_own_mark(crash: i64) -> bool {
    crash < 0
}

/// No job waits longer than this for its next attempt, whatever its last one came to, in ms.
pub const PAUSE_MAX_MS: i64 = 64_000;
/// Longest first pause after a failure, in ms; doubles up to [`BACKOFF_MAX_MS`]. How much of it is waited is random ("full
/// jitter"), but at least [`BACKOFF_MIN_MS`].
pub const BACKOFF_FIRST_MS: i64 = 1_000;
/// Longest pause, in ms.
pub const BACKOFF_MAX_MS: i64 = 60_000;
/// Shortest pause, in ms.
pub const BACKOFF_MIN_MS: i64 = 100;

/// Judges the end of an attempt.
pub fn judge(outcome: Outcome, attempt: &Attempt, now: Millis) -> Verdict {
    if attempt.canary && may_be_the_wakes(&outcome, attempt) {
        let error = if let Outcome::Failed { error, .. } = outcome { Some(error) } else { None };
        return requeue(attempt, error);
    }
    match outcome {
        Outcome::Answered(answer) => Verdict::Succeed(answer),
        _ if attempt.deadline_passed => Verdict::Expire(JobError::new(
            ErrorCode::DeadlineExceeded,
            "not finished before its deadline; submit it again with a later one",
            true,
        )),
        Outcome::Stopped if attempt.cancelling => Verdict::Cancel,
        Outcome::Failed { error, retriable: false } => Verdict::Fail(error),
        _ if attempt.cancelling => Verdict::Cancel,
        Outcome::Stopped | Outcome::WorkerLost { .. } if attempt.stopping && attempt.relayed => {
            Verdict::Fail(cut_by_stop())
        }
        Outcome::Stopped => requeue(attempt, None),
        Outcome::WorkerLost { .. } if attempt.stopping => requeue(attempt, None),
        Outcome::WorkerLost { reached: false, .. } => requeue(attempt, None),
        Outcome::WorkerLost { reason, .. } => judge_crash(&reason, attempt),
        Outcome::Failed { error, retriable: true } if error.code == ErrorCode::WorkerOom => judge_oom(error, attempt),
        Outcome::Failed { error, retriable: true } if attempt.hung_with > 0 => judge_hang(error, attempt, now),
        Outcome::Failed { error, retriable: true } => judge_failure(error, attempt, now),
    }
}

/// Whether it is put down to the worker, if that was woken and has answered nobody since ([`Attempt::canary`]): the job runs
/// again uncharged, on one that was loaded from nothing.
pub fn may_be_the_wakes(outcome: &Outcome, attempt: &Attempt) -> bool {
    let is_over = attempt.relayed || attempt.deadline_passed || attempt.cancelling || attempt.stopping;
    let failed = matches!(outcome, Outcome::Failed { retriable: true, .. } | Outcome::WorkerLost { reached: true, .. });
    failed && !is_over
}

fn requeue(attempt: &Attempt, error: Option<JobError>) -> Verdict {
    Verdict::Requeue(Requeue {
        not_before: None,
        failures: attempt.failures,
        crashes: attempt.crashes,
        suspicion: Suspicion::Kept,
        error,
    })
}

fn cut_by_stop() -> JobError {
    let message = "the server was stopped while this answer was being streamed; send the request again for a whole one";
    JobError::new(ErrorCode::WorkerLost, message, true)
}

fn judge_crash(reason: &str, attempt: &Attempt) -> Verdict {
    let error =
        JobError::new(ErrorCode::WorkerLost, format!("no answer from the worker that ran this job: {reason}"), true);
    // Alone since it ran out of memory, it has been part of no death yet: this one may be anybody's.
    if (attempt.isolated && !attempt.has_own_mark) || attempt.relayed {
        return Verdict::Fail(error);
    }
    let crashes = attempt.crashes + 1;
    Verdict::Requeue(Requeue {
        not_before: None,
        failures: attempt.failures,
        crashes,
        suspicion: Suspicion::Raised,
        error: Some(error),
    })
}

fn judge_oom(error: JobError, attempt: &Attempt) -> Verdict {
    if attempt.relayed {
        return Verdict::Fail(error);
    }
    let suspicion = match (attempt.run_jobs > 1, attempt.has_own_mark) {
        (true, _) => Suspicion::Dropped,
        (false, false) => Suspicion::Own,
        (false, true) => {
            let message = format!(
                "out of memory with nothing beside it on its worker; ask for less (a smaller size, a shorter duration), or \
                 give the model more room in models.yaml (`memory`, `exclusive: true`, `max_batch: 1`): {}",
                error.message
            );
            return Verdict::Fail(JobError { message, ..error });
        }
    };
    Verdict::Requeue(Requeue {
        not_before: None,
        failures: attempt.failures,
        crashes: attempt.crashes,
        suspicion,
        error: Some(error),
    })
}

fn judge_hang(error: JobError, attempt: &Attempt, now: Millis) -> Verdict {
    if attempt.run_jobs.max(attempt.hung_with) > 1 && !attempt.relayed {
        return Verdict::Requeue(Requeue {
            not_before: None,
            failures: attempt.failures,
            crashes: attempt.crashes,
            suspicion: Suspicion::Raised,
            error: Some(error),
        });
    }
    if attempt.isolated && !attempt.has_own_mark {
        return Verdict::Fail(error);
    }
    match judge_failure(error, attempt, now) {
        Verdict::Requeue(requeue) => Verdict::Requeue(Requeue { suspicion: Suspicion::Own, ..requeue }),
        verdict => verdict,
    }
}

fn judge_failure(error: JobError, attempt: &Attempt, now: Millis) -> Verdict {
    let failures = attempt.failures + 1;
    if failures >= attempt.max_attempts || attempt.relayed {
        return Verdict::Fail(error);
    }
    let longest = (BACKOFF_FIRST_MS << (failures - 1).min(16)).min(BACKOFF_MAX_MS);
    #[expect(clippy::cast_possible_truncation, reason = "at most a minute of ms")]
    let pause = ((longest as f64 * attempt.jitter) as i64).max(BACKOFF_MIN_MS);
    if attempt.deadline.is_some_and(|deadline| now + pause >= deadline) {
        return Verdict::Fail(error);
    }
    Verdict::Requeue(Requeue {
        not_before: Some(now + pause),
        failures,
        crashes: attempt.crashes,
        suspicion: Suspicion::Dropped,
        error: Some(error),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attempt() -> Attempt {
        Attempt {
            failures: 0,
            crashes: 0,
            max_attempts: 3,
            isolated: false,
            run_jobs: 1,
            has_own_mark: false,
            cancelling: false,
            stopping: false,
            canary: false,
            hung_with: 0,
            relayed: false,
            deadline_passed: false,
            deadline: None,
            jitter: 0.999,
        }
    }

    fn oom() -> Outcome {
        Outcome::Failed { error: JobError::new(ErrorCode::WorkerOom, "out of memory", true), retriable: true }
    }

    fn broken() -> Outcome {
        Outcome::Failed { error: JobError::new(ErrorCode::WorkerError, "no", true), retriable: true }
    }

    fn lost() -> Outcome {
        Outcome::WorkerLost { reason: "killed".into(), reached: true }
    }

    #[test]
    fn failures_are_retried_with_doubling_pauses_until_the_budget_is_spent() {
        let pauses: Vec<_> = (0..3)
            .map(|failures| match judge(broken(), &Attempt { failures, ..attempt() }, 0) {
                Verdict::Requeue(r) => r.not_before,
                Verdict::Fail(e) => {
                    assert_eq!(e.code, ErrorCode::WorkerError);
                    None
                }
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(pauses, [Some(999), Some(1_998), None]);
        let lucky = Attempt { failures: 1, jitter: 0.0, ..attempt() };
        assert!(matches!(judge(broken(), &lucky, 0), Verdict::Requeue(r) if r.not_before == Some(BACKOFF_MIN_MS)));
    }

    #[test]
    fn out_of_memory_is_charged_to_nobody_and_fails_only_with_nothing_beside() {
        let back = |attempt: &Attempt| match judge(oom(), attempt, 0) {
            Verdict::Requeue(r) => (r.not_before, r.failures, r.crashes, r.suspicion),
            other => panic!("{other:?}"),
        };
        let last_try = Attempt { max_attempts: 1, crashes: 1, ..attempt() };
        let among_many = Attempt { run_jobs: 2, ..last_try.clone() };
        assert_eq!(back(&among_many), (None, 0, 1, Suspicion::Dropped));
        assert_eq!(back(&Attempt { has_own_mark: true, ..among_many }), (None, 0, 1, Suspicion::Dropped));
        assert_eq!(back(&last_try), (None, 0, 1, Suspicion::Own));
        let isolated = Attempt { isolated: true, ..last_try };
        assert_eq!(back(&isolated).3, Suspicion::Own, "a crash was why it was alone");
        let Verdict::Fail(error) = judge(oom(), &Attempt { has_own_mark: true, ..isolated }, 0) else {
            panic!("again")
        };
        assert_eq!(error.code, ErrorCode::WorkerOom);
        for word in ["smaller size", "`memory`", "`max_batch: 1`", "out of memory"] {
            assert!(error.message.contains(word), "{word}: {error:?}");
        }
        assert!(is_own_mark(own_mark(1)) && !is_own_mark(0));
    }

    #[test]
    fn a_crash_charges_no_failure_and_isolates() {
        let Verdict::Requeue(r) = judge(lost(), &attempt(), 0) else { panic!("innocent jobs lose nothing") };
        assert_eq!((r.failures, r.crashes), (0, 1));
        let alone = Attempt { crashes: 1, isolated: true, ..attempt() };
        assert!(matches!(judge(lost(), &alone, 0), Verdict::Fail(e) if e.code == ErrorCode::WorkerLost));
    }

    #[test]
    fn who_shared_a_worker_that_hung_is_charged_nothing_until_it_was_alone() {
        let hung = || {
            let error = JobError::new(ErrorCode::ExecutionTimeout, "too long", true);
            Outcome::Failed { error, retriable: true }
        };
        let back = |attempt: &Attempt| match judge(hung(), attempt, 0) {
            Verdict::Requeue(r) => (r.failures, r.crashes, r.suspicion),
            other => panic!("{other:?}"),
        };
        let last_try = Attempt { max_attempts: 1, ..attempt() };
        // Of one run, or each in its own.
        for shared in [
            Attempt { run_jobs: 8, hung_with: 1, ..last_try.clone() },
            Attempt { run_jobs: 1, hung_with: 8, ..last_try.clone() },
        ] {
            assert_eq!(back(&shared), (0, 0, Suspicion::Raised));
            assert!(matches!(judge(hung(), &Attempt { relayed: true, ..shared }, 0), Verdict::Fail(_)));
        }
        let alone = Attempt { hung_with: 1, ..last_try };
        let Verdict::Fail(error) = judge(hung(), &alone, 0) else { panic!("its last try") };
        assert_eq!(error.code, ErrorCode::ExecutionTimeout);
        let alone = Attempt { max_attempts: 3, ..alone };
        assert_eq!(back(&alone), (1, 0, Suspicion::Own));
        let again = Attempt { failures: 1, isolated: true, has_own_mark: true, ..alone.clone() };
        assert_eq!(back(&again), (2, 0, Suspicion::Own));
        let found = Attempt { isolated: true, ..alone };
        assert!(matches!(judge(hung(), &found, 0), Verdict::Fail(_)), "a search has left it alone");
    }

    #[test]
    fn a_job_that_never_reached_the_worker_is_not_to_blame() {
        let alone = Attempt { crashes: 1, isolated: true, ..attempt() };
        let refused = Outcome::WorkerLost { reason: "refused".into(), reached: false };
        assert!(matches!(judge(refused, &alone, 0), Verdict::Requeue(r) if r.crashes == 1));
    }

    #[test]
    fn a_server_stop_charges_nothing() {
        let stopping = Attempt { stopping: true, isolated: true, ..attempt() };
        for outcome in [lost(), Outcome::Stopped] {
            assert!(matches!(judge(outcome, &stopping, 0), Verdict::Requeue(r) if r.failures == 0 && r.crashes == 0));
        }
    }

    #[test]
    fn what_a_stop_cuts_is_not_repeated_to_who_has_a_part_of_it() {
        let cut = Attempt { stopping: true, relayed: true, ..attempt() };
        // Whether the server lets go of the worker first, or the worker ends first.
        for outcome in [lost(), Outcome::Stopped] {
            let Verdict::Fail(error) = judge(outcome, &cut, 0) else { panic!("it would run again for nobody") };
            assert_eq!((error.code, error.retryable), (ErrorCode::WorkerLost, true));
            assert!(error.message.contains("the server was stopped"), "{error:?}");
        }
        assert_eq!(judge(Outcome::Stopped, &Attempt { cancelling: true, ..cut }, 0), Verdict::Cancel);
        let evicted = Attempt { relayed: true, ..attempt() };
        assert!(matches!(judge(Outcome::Stopped, &evicted, 0), Verdict::Requeue(_)), "`dispatch` says who is to blame");
    }

    #[test]
    fn the_first_failure_after_a_wake_is_the_wakes() {
        let canary = Attempt { canary: true, failures: 2, isolated: true, crashes: 1, ..attempt() };
        for outcome in [oom(), lost()] {
            let Verdict::Requeue(r) = judge(outcome, &canary, 0) else { panic!("charged") };
            assert_eq!((r.failures, r.crashes, r.suspicion, r.not_before), (2, 1, Suspicion::Kept, None));
        }
        let own = Outcome::Failed { error: JobError::new(ErrorCode::InvalidRequest, "no", false), retriable: false };
        assert!(matches!(judge(own, &canary, 0), Verdict::Fail(_)), "its own fault");
        assert!(matches!(judge(oom(), &Attempt { relayed: true, ..canary.clone() }, 0), Verdict::Fail(_)));
        assert_eq!(judge(oom(), &Attempt { cancelling: true, ..canary }, 0), Verdict::Cancel);
    }

    #[test]
    fn nothing_is_repeated_after_output_was_relayed() {
        let relayed = Attempt { relayed: true, ..attempt() };
        assert!(matches!(judge(lost(), &relayed, 0), Verdict::Fail(_)));
        assert!(matches!(judge(oom(), &relayed, 0), Verdict::Fail(_)));
    }

    #[test]
    fn a_cancelled_job_keeps_a_real_answer_and_is_never_retried() {
        let cancelling = Attempt { cancelling: true, ..attempt() };
        assert_eq!(judge(Outcome::Stopped, &cancelling, 0), Verdict::Cancel);
        assert_eq!(judge(oom(), &cancelling, 0), Verdict::Cancel);
        assert_eq!(judge(lost(), &cancelling, 0), Verdict::Cancel);
        let answer = Answer { status: 200, content_type: String::new(), body: bytes::Bytes::new(), usage: None };
        assert_eq!(judge(Outcome::Answered(answer.clone()), &cancelling, 0), Verdict::Succeed(answer));
    }

    #[test]
    fn a_death_is_not_held_against_who_was_alone_for_want_of_memory() {
        let lost = || Outcome::WorkerLost { reason: "killed".into(), reached: true };
        let has_own_mark = Attempt { isolated: true, has_own_mark: true, ..attempt() };
        let verdict = judge(lost(), &has_own_mark, 0);
        assert!(
            matches!(&verdict, Verdict::Requeue(Requeue { suspicion: Suspicion::Raised, crashes: 1, .. })),
            "{verdict:?}"
        );
        let suspect = Attempt { isolated: true, crashes: 1, ..attempt() };
        assert!(matches!(judge(lost(), &suspect, 0), Verdict::Fail(_)));
    }

    #[test]
    fn an_answer_is_a_success_whatever_else_has_happened() {
        // The slot is given away before the attempt is judged.
        for bits in 0..1_u32 << 8 {
            let is = |bit: u32| bits >> bit & 1 == 1;
            let attempt = Attempt {
                isolated: is(0),
                has_own_mark: is(1),
                cancelling: is(2),
                stopping: is(3),
                canary: is(4),
                relayed: is(5),
                deadline_passed: is(6),
                deadline: is(7).then_some(-1),
                failures: 9,
                ..attempt()
            };
            let answer = Answer { status: 200, content_type: String::new(), body: bytes::Bytes::new(), usage: None };
            assert_eq!(judge(Outcome::Answered(answer.clone()), &attempt, 0), Verdict::Succeed(answer), "{attempt:?}");
        }
    }

    #[test]
    fn a_pause_never_passes_the_deadline() {
        let near = Attempt { deadline: Some(500), ..attempt() };
        assert!(matches!(judge(broken(), &near, 0), Verdict::Fail(_)));
        let passed = Attempt { deadline_passed: true, ..attempt() };
        assert!(
            matches!(judge(Outcome::Stopped, &passed, 0), Verdict::Expire(e) if e.code == ErrorCode::DeadlineExceeded)
        );
    }
}
