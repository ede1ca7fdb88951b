//! The store on real files against its model: random operations, some at the same time, some whose callers go away, with
//! restarts in between. `ROUNDHOUSE_PROPTEST_CASES` says how many sequences are tried.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use futures_util::TryStreamExt as _;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::model::{Accepted, Row, Rows};
use super::tests::{answer, new_job, reopen};
use super::*;
use crate::clock::ManualClock;
use crate::domain::{ErrorCode, Face, Job, JobError, JobId, JobKind, JobState, Millis, NewJob, StateReason, Token};

const CASES: u32 = 24;
const STEPS_MAX: usize = 80;
const LARGE: usize = 50_000;

/// Which job: one of those there are, by remainder. One number too many names none.
type Which = u16;

/// Which attempt: the current one, or one so many before.
type Ago = i64;

#[derive(Clone, Debug)]
enum Ending {
    Succeeded,
    /// With an answer that is a file.
    Large,
    Failed,
    Cancelled,
    Expired,
}

#[derive(Clone, Debug)]
enum Op {
    Insert {
        count: u8,
        claimed: bool,
        key: Option<u8>,
        variant: u8,
        large: bool,
    },
    Claim {
        which: Vec<Which>,
    },
    Append {
        which: Which,
        ago: Ago,
    },
    Finish {
        which: Which,
        ago: Ago,
        ending: Ending,
    },
    Requeue {
        which: Which,
        ago: Ago,
        back: (u32, u32, Option<i64>, Option<i64>, bool),
    },
    EndQueued {
        which: Which,
        late: bool,
    },
    Cancel {
        which: Which,
        code: bool,
        guessed: bool,
    },
    TellLoading {
        which: Vec<Which>,
    },
    AddLoadTime {
        which: Vec<Which>,
    },
    Learn {
        model: u8,
        load_ms: f64,
    },
    Delivered {
        which: Which,
    },
    Advance {
        ms: i64,
    },
    /// At everything, so that copies in memory are made.
    Look,
    Restart,
}

/// Who waits for the answer of an operation.
#[derive(Clone, Copy, Debug)]
enum Patience {
    Now,
    /// Other operations are asked for before the answer is looked at.
    Later,
    /// Nobody: the caller is gone.
    Never,
}

fn ops() -> impl Strategy<Value = Vec<(Op, Patience)>> {
    let which = any::<Which>;
    let ago = || prop_oneof![4 => Just(0_i64), 1 => 1..3_i64];
    let some = || prop::collection::vec(any::<Which>(), 0..6);
    let ending = prop_oneof![
        3 => Just(Ending::Succeeded),
        1 => Just(Ending::Large),
        1 => Just(Ending::Failed),
        1 => Just(Ending::Cancelled),
        1 => Just(Ending::Expired),
    ];
    let back = (0..3_u32, 0..3_u32, prop::option::of(1..9_i64), prop::option::of(1..9_000_i64), any::<bool>());
    let insert = (1..6_u8, any::<bool>(), prop::option::weighted(0.3, 0..3_u8), 0..2_u8, prop::bool::weighted(0.1));
    let op = prop_oneof![
        6 => insert.prop_map(|(count, claimed, key, variant, large)| Op::Insert { count, claimed, key, variant, large }),
        6 => some().prop_map(|which| Op::Claim { which }),
        3 => (which(), ago()).prop_map(|(which, ago)| Op::Append { which, ago }),
        6 => (which(), ago(), ending).prop_map(|(which, ago, ending)| Op::Finish { which, ago, ending }),
        4 => (which(), ago(), back).prop_map(|(which, ago, back)| Op::Requeue { which, ago, back }),
        2 => (which(), any::<bool>()).prop_map(|(which, late)| Op::EndQueued { which, late }),
        3 => (which(), any::<bool>(), prop::bool::weighted(0.1))
            .prop_map(|(which, code, guessed)| Op::Cancel { which, code, guessed }),
        1 => some().prop_map(|which| Op::TellLoading { which }),
        1 => some().prop_map(|which| Op::AddLoadTime { which }),
        1 => (0..3_u8, 1.0..1e6).prop_map(|(model, load_ms)| Op::Learn { model, load_ms }),
        1 => which().prop_map(|which| Op::Delivered { which }),
        2 => prop_oneof![0..5_000_i64, Just(idempotency::KEY_TTL_MS / 2)].prop_map(|ms| Op::Advance { ms }),
        2 => Just(Op::Look),
        1 => Just(Op::Restart),
    ];
    let patience = prop_oneof![3 => Just(Patience::Now), 2 => Just(Patience::Later), 1 => Just(Patience::Never)];
    prop::collection::vec((op, patience), 1..STEPS_MAX)
}

/// What an operation answers, as far as it is compared.
#[derive(Debug, PartialEq)]
enum Told {
    Inserted(Vec<i64>, bool),
    KeyReused,
    Claimed(Vec<ClaimedJob>),
    Changes(Vec<Change>),
    Cancelled(Option<(Option<Change>, JobState)>),
}

type Asked = Pin<Box<dyn Future<Output = Told>>>;

struct Bench {
    dir: tempfile::TempDir,
    clock: Arc<ManualClock>,
    /// `None` between two runs.
    opened: Option<Opened>,
    rows: Rows,
    next_number: i64,
    ids: Vec<JobId>,
    waiting: Vec<(Asked, Told)>,
}

impl Bench {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let clock = Arc::new(ManualClock::at(1_000));
        let opened = Some(reopen(&dir, &clock).await);
        let mut rows = Rows::default();
        rows.recover(1_000);
        Self { dir, clock, opened, rows, next_number: 1, ids: Vec::new(), waiting: Vec::new() }
    }

    fn store(&self) -> &Store {
        &self.opened.as_ref().unwrap().store
    }

    fn now(&self) -> Millis {
        use crate::clock::Clock as _;
        self.clock.now()
    }

    fn id(&self, which: Which) -> JobId {
        let index = usize::from(which) % (self.ids.len() + 1);
        self.ids.get(index).copied().unwrap_or_else(|| JobId::new(1, 1_000_000, 7))
    }

    fn token(&self, which: Which, ago: Ago) -> Token {
        let id = self.id(which);
        let attempt = self.rows.jobs.get(&id.number).map_or(1, |row| row.attempt);
        Token { id, attempt: attempt - ago }
    }

    fn numbers(&self, which: &[Which]) -> Vec<i64> {
        which.iter().map(|which| self.id(*which).number).collect()
    }

    async fn run(&mut self, op: Op, patience: Patience) {
        let is_slow = matches!(
            &op,
            Op::Insert { large: true, .. } | Op::Finish { ending: Ending::Large, .. } | Op::Advance { .. }
        );
        if is_slow {
            // Files are written first: these are not in turn by their mere call.
            self.look_at_all().await;
        }
        match op {
            Op::Advance { ms } => self.clock.advance(ms),
            Op::Look => self.check().await,
            Op::Restart => self.restart().await,
            Op::Delivered { which } => self.store().delivered(self.id(which)),
            op => {
                let (mut asked, expected) = self.ask(op).await;
                match if is_slow { Patience::Now } else { patience } {
                    Patience::Now => assert_eq!(asked.await, expected),
                    Patience::Later => {
                        let told = begin(&mut asked);
                        self.waiting.push((told.map_or(asked, |told| Box::pin(std::future::ready(told))), expected));
                    }
                    Patience::Never => drop(begin(&mut asked)),
                }
            }
        }
    }

    async fn look_at_all(&mut self) {
        for (asked, expected) in std::mem::take(&mut self.waiting) {
            assert_eq!(asked.await, expected);
        }
    }

    /// What the store is asked for, and what it has to answer.
    async fn ask(&mut self, op: Op) -> (Asked, Told) {
        let (store, now) = (self.store().clone(), self.now());
        match op {
            Op::Insert { count, claimed, key, variant, large } => self.insert(count, claimed, key, variant, large),
            Op::Claim { which } => {
                let numbers = self.numbers(&which);
                let expected = Told::Claimed(self.rows.claim(&numbers, now));
                let asked = async move {
                    let mut claims = store.claim(numbers, 5).await.unwrap();
                    for claim in &mut claims {
                        claim.body = Body::Inline(store.reader().load(&claim.body).await.unwrap());
                    }
                    Told::Claimed(claims)
                };
                (Box::pin(asked), expected)
            }
            Op::Append { which, ago } => {
                let token = self.token(which, ago);
                let expected = self.rows.append(token, "job.progress");
                let asked = async move { store.append(token, "job.progress", serde_json::json!({"step": 1})).await };
                (changes(asked), Told::Changes(expected.into_iter().collect()))
            }
            Op::Finish { which, ago, ending } => {
                let token = self.token(which, ago);
                let text = match ending {
                    Ending::Large => format!("\"{}\"", "y".repeat(LARGE + token.id.number as usize)),
                    _ => format!("\"{token} at {now}\""),
                };
                let (end, kept) = match ending {
                    Ending::Succeeded | Ending::Large => {
                        let kept = store.keep(token, JobKind::Chat, &answer(&text)).await.unwrap();
                        (End::Succeeded(kept), Some(Bytes::from(text)))
                    }
                    Ending::Failed => (End::Failed(error(ErrorCode::WorkerError)), None),
                    Ending::Expired => (End::Expired(error(ErrorCode::DeadlineExceeded)), None),
                    Ending::Cancelled => (End::Cancelled, None),
                };
                let expected = self.rows.finish(token, &end, kept, now);
                (
                    changes(async move { store.finish(token, end, 0.0).await }),
                    Told::Changes(expected.into_iter().collect()),
                )
            }
            Op::Requeue { which, ago, back: (failures, crashes, crash, pause, failed) } => {
                let token = self.token(which, ago);
                let error = failed.then(|| error(ErrorCode::WorkerOom));
                let not_before = pause.map(|pause| now + pause);
                let back = GiveBack { failures, crashes, crash, not_before, error, gpu_ms: 1.5 };
                let expected = self.rows.requeue(token, &back, now);
                (
                    changes(async move { store.requeue(token, back).await }),
                    Told::Changes(expected.into_iter().collect()),
                )
            }
            Op::EndQueued { which, late } => {
                let number = self.id(which).number;
                let end = if late {
                    End::Expired(error(ErrorCode::QueueDeadlineExceeded))
                } else {
                    End::Failed(error(ErrorCode::ModelLoadFailed))
                };
                let expected = self.rows.end_queued(number, &end, now);
                (
                    changes(async move { store.end_queued(number, end).await }),
                    Told::Changes(expected.into_iter().collect()),
                )
            }
            Op::Cancel { which, code, guessed } => {
                let id = self.id(which);
                let id = JobId { tag: id.tag + u64::from(guessed), ..id };
                let code = if code { ErrorCode::CancelledByUser } else { ErrorCode::ClientDisconnected };
                let expected = Told::Cancelled(self.rows.request_cancel(id, code, now));
                let asked = async move {
                    match store.request_cancel(id, code).await {
                        Ok(cancelled) => Told::Cancelled(Some((cancelled.change, cancelled.state))),
                        Err(StoreError::NotFound) => Told::Cancelled(None),
                        Err(error) => panic!("{error}"),
                    }
                };
                (Box::pin(asked), expected)
            }
            Op::TellLoading { which } => {
                let numbers = self.numbers(&which);
                let expected = Told::Changes(self.rows.tell_loading(&numbers));
                let asked = async move {
                    Told::Changes(
                        store
                            .tell_loading(numbers, crate::store::Told::Loading { model: "echo".to_owned(), eta: now })
                            .await
                            .unwrap(),
                    )
                };
                (Box::pin(asked), expected)
            }
            Op::AddLoadTime { which } => {
                let numbers = self.numbers(&which);
                self.rows.add_load_time(&numbers, 7);
                let asked = async move {
                    store.add_load_time(numbers, 7).await.unwrap();
                    Told::Changes(Vec::new())
                };
                (Box::pin(asked), Told::Changes(Vec::new()))
            }
            Op::Learn { model, load_ms } => {
                let learned = Learned { load_ms: Some(load_ms), left_at: Some(now), ..Learned::default() };
                let model = format!("m{model}");
                self.rows.learn(model.clone(), learned.clone());
                let asked = async move {
                    store.learn(model, learned).await.unwrap();
                    Told::Changes(Vec::new())
                };
                (Box::pin(asked), Told::Changes(Vec::new()))
            }
            Op::Delivered { .. } | Op::Advance { .. } | Op::Look | Op::Restart => unreachable!("done by the caller"),
        }
    }

    fn insert(&mut self, count: u8, claimed: bool, key: Option<u8>, variant: u8, large: bool) -> (Asked, Told) {
        let (store, now) = (self.store().clone(), self.now());
        // As in the program: several with a key are a batch, by which they are found again.
        let batch = (count > 1 && (variant == 1 || key.is_some())).then(|| store.new_batch());
        let jobs: Vec<(JobId, NewJob)> = (0..count)
            .map(|index| {
                let number = self.next_number + i64::from(index);
                let job = NewJob {
                    model: format!("m{}", number % 3),
                    tenant: format!("t{}", number % 2),
                    batch,
                    custom_id: batch.map(|_| format!("c{index}")),
                    face: if number % 4 == 0 { Face::Sync } else { Face::Async },
                    priority: u8::try_from(number % 10).unwrap(),
                    body: if large {
                        Bytes::from(vec![b' '; LARGE])
                    } else {
                        Bytes::from(format!("{{\"n\":{number}}}"))
                    },
                    batch_key: number * 1_000_003,
                    start_deadline: (number % 5 == 0).then_some(now + 9),
                    deadline: (number % 7 == 0).then_some(now + 99),
                    retry_of: self.ids.last().copied().filter(|_| number % 6 == 0),
                    ..new_job()
                };
                (JobId::new(now, number, u64::try_from(number).unwrap() * 77), job)
            })
            .collect();
        // As in the program: only a single job without a key takes the fast path.
        let claimed = claimed && count == 1 && key.is_none();
        let key = key.map(|key| IdempotencyKey { key: [key; 16], request: [variant * 10 + count; 16] });
        let numbers: Vec<i64> = jobs.iter().map(|(id, _)| id.number).collect();
        let expected = match self.rows.insert(jobs.clone(), claimed, key, now) {
            Accepted::New => {
                self.ids.extend(jobs.iter().map(|(id, _)| *id));
                Told::Inserted(numbers, false)
            }
            Accepted::Replayed(first) => Told::Inserted((first..first + i64::from(count)).collect(), true),
            Accepted::Reused => Told::KeyReused,
        };
        // Numbers of submissions that came to nothing are not given again.
        self.next_number += i64::from(count);
        let inserted = store.insert(jobs, claimed, key);
        let asked = async move {
            match inserted.await {
                Ok(Inserted { jobs, replayed }) => {
                    Told::Inserted(jobs.iter().map(|job| job.id.number).collect(), replayed)
                }
                Err(StoreError::KeyReused) => Told::KeyReused,
                Err(error) => panic!("{error}"),
            }
        };
        (Box::pin(asked), expected)
    }

    /// As after `kill -9`, but for what was asked for and not answered: that is dropped half-way, and committed all the same.
    async fn restart(&mut self) {
        self.waiting.clear();
        // The store goes with its last handle; the next one waits until its writer has ended.
        drop(self.opened.take());
        self.opened = Some(reopen(&self.dir, &self.clock).await);
        let jobs = self.rows.recover(self.now());
        let opened = self.opened.as_ref().unwrap();
        assert_eq!((opened.recovered, opened.epoch), (jobs, self.rows.epoch));
        assert_eq!(opened.next_number, self.rows.next_number());
        for (model, learned) in &self.rows.learned {
            assert_eq!(opened.learned.get(model), Some(learned));
        }
        self.next_number = opened.next_number;
        self.check().await;
    }

    /// Everything that can be asked about a job is as the model says.
    async fn check(&mut self) {
        self.look_at_all().await;
        self.store().ping().await.unwrap();
        let reader = self.store().reader().clone();
        for row in self.rows.jobs.values() {
            let job = reader.job(row.id).await.unwrap();
            assert_same(&job, row);
            let events = reader.events(row.id, 0, 1_000).await.unwrap();
            let told: Vec<(i64, &str, i64)> = events.iter().map(|e| (e.seq, e.kind.as_str(), e.attempt)).collect();
            let expected: Vec<(i64, &str, i64)> =
                (1..).zip(&row.events).map(|(seq, (kind, attempt))| (seq, *kind, *attempt)).collect();
            assert_eq!(told, expected, "events of {}", row.id.number);
            let kept = reader.answer(row.id).await.unwrap().map(|answer| answer.body);
            assert!(kept == row.answer, "the answer of {}", row.id.number);
            assert_eq!(reader.body(row.id).await.unwrap(), row.new.body);
        }
        let queued: Vec<Vec<QueuedJob>> = reader.queued(7).await.unwrap().try_collect().await.unwrap();
        let queued = queued.concat();
        assert_eq!(queued, self.rows.queued().collect::<Vec<_>>());
        let is_live_call = |row: &&Row| !row.state.is_terminal() && row.new.face == Face::Sync;
        let mut live = reader.live_sync_jobs().await.unwrap();
        live.sort_by_key(|id| id.number);
        assert_eq!(live, self.rows.jobs.values().filter(is_live_call).map(|row| row.id).collect::<Vec<_>>());
    }
}

fn assert_same(job: &Job, row: &Row) {
    let (number, new) = (row.id.number, &row.new);
    assert_eq!((job.id, job.state, job.attempt, job.version), (row.id, row.state, row.attempt, row.version));
    assert_eq!((job.failures, job.crashes, job.load_ms), (row.failures, row.crashes, row.load_ms), "{number}");
    assert_eq!(
        (job.created_at, job.queued_at, job.started_at, job.finished_at, job.not_before),
        (row.id.created_ms, row.queued_at, row.started_at, row.finished_at, row.not_before),
        "{number}"
    );
    assert_eq!(job.error.as_ref().map(|error| error.code), row.error.as_ref().map(|error| error.code), "{number}");
    let reason = match row.not_before {
        _ if row.state != JobState::Queued => None,
        Some(_) => Some(StateReason::RetryBackoff),
        None => Some(StateReason::WaitingForModel),
    };
    assert_eq!(job.state_reason, reason, "{number}");
    assert_eq!((&job.endpoint, &job.model, &job.tenant), (&new.endpoint, &new.model, &new.tenant));
    assert_eq!(
        (job.batch, &job.custom_id, job.face, job.priority),
        (new.batch, &new.custom_id, new.face, new.priority)
    );
    assert_eq!((job.batch_key, job.stream, &job.present), (new.batch_key, new.stream, &new.present));
    assert_eq!((job.start_deadline, job.deadline, job.timeout_ms), (new.start_deadline, new.deadline, new.timeout_ms));
    assert_eq!((job.max_attempts, &job.metadata, job.retry_of), (new.max_attempts, &new.metadata, new.retry_of));
    let usage = (row.state == JobState::Succeeded).then(|| serde_json::json!({"total_tokens": 3}));
    assert_eq!((&job.usage, job.emptied_at), (&usage, None));
}

fn error(code: ErrorCode) -> JobError {
    JobError::new(code, "so it goes", true)
}

fn changes(asked: impl Future<Output = Result<Option<Change>, StoreError>> + 'static) -> Asked {
    Box::pin(async move { Told::Changes(asked.await.unwrap().into_iter().collect()) })
}

/// Polls once: from then on the operation stands in the writer's queue.
fn begin(asked: &mut Asked) -> Option<Told> {
    match asked.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(told) => Some(told),
        Poll::Pending => None,
    }
}

async fn follow(ops: Vec<(Op, Patience)>) {
    let mut bench = Bench::new().await;
    for (op, patience) in ops {
        bench.run(op, patience).await;
    }
    bench.check().await;
    bench.restart().await;
}

#[test]
fn the_store_does_what_its_model_does() {
    let cases = std::env::var("ROUNDHOUSE_PROPTEST_CASES").map_or(CASES, |text| text.parse().unwrap());
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 400, ..Config::default() };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let result = TestRunner::new(config).run(&ops(), |ops| {
        let followed = std::panic::AssertUnwindSafe(|| runtime.block_on(follow(ops)));
        std::panic::catch_unwind(followed).map_err(|panic| {
            let text = panic.downcast_ref::<String>().cloned().unwrap_or_else(|| "a panic".to_owned());
            TestCaseError::fail(text)
        })
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}
