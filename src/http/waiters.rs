//! Who waits for the answers of sync jobs. A job nobody waits for any more is cancelled: after the hop grace when its
//! caller was sent on by a 303, after the (short) disconnect grace when the connection broke. A new waiter within the
//! grace keeps it.
//!
//! Asynchronous jobs have no guards: they do not care about readers.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::time::Instant;

use crate::domain::JobId;
use crate::lifecycle::Tasks;

/// Jobs that outlive their callers (`sync_wait_exceeded`) which are remembered.
const KEPT_MAX: usize = 4_096;

/// Cancels a job since nobody waits for it.
pub type Cancel = Arc<dyn Fn(JobId) -> BoxFuture<'static, ()> + Send + Sync>;

/// Counts the waiters of each sync job. Cheap to clone.
#[derive(Clone)]
pub struct Waiters {
    inner: Arc<Inner>,
}

struct Inner {
    table: Mutex<Table>,
    cancel: Cancel,
    tasks: Tasks,
    hop_grace: Duration,
    disconnect_grace: Duration,
    sync_calls: AtomicUsize,
}

#[derive(Default)]
struct Table {
    jobs: HashMap<JobId, Waited>,
    /// Jobs that go on without anybody, oldest first.
    kept: VecDeque<JobId>,
}

#[derive(Default)]
struct Waited {
    waiting: usize,
    /// A hop may come until then.
    expected_until: Option<Instant>,
    /// Fences timers: only the latest may cancel.
    generation: u64,
}

/// How a waiter stands to the job's caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The caller itself, or its next hop: takes over from the hop before.
    Caller,
    /// Somebody who looks on: keeps the job alive, and changes nothing about the hop that is still expected.
    Onlooker,
}

/// How a waiter left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leaving {
    /// With the answer.
    Answered,
    /// By a 303: the next hop is expected.
    HandedOver,
    /// Told that the job goes on without it.
    Kept,
    /// The connection broke.
    Lost,
}

impl Waiters {
    /// `hop_grace`: how long the next hop may take; `disconnect_grace`: how long a broken connection may take to return.
    pub fn new(cancel: Cancel, tasks: Tasks, hop_grace: Duration, disconnect_grace: Duration) -> Self {
        Self {
            inner: Arc::new(Inner {
                table: Mutex::default(),
                cancel,
                tasks,
                hop_grace,
                disconnect_grace,
                sync_calls: AtomicUsize::new(0),
            }),
        }
    }

    /// Waits for `id` until the guard is dropped or told otherwise.
    pub fn wait(&self, id: JobId, role: Role) -> Guard {
        let mut table = self.inner.lock();
        let waited = table.jobs.entry(id).or_default();
        waited.waiting += 1;
        waited.generation += 1;
        if role == Role::Caller {
            waited.expected_until = None;
        }
        Guard { inner: self.inner.clone(), id, leaving: Leaving::Lost }
    }

    /// After a restart: the caller of this live sync job may come back by its next hop.
    pub fn expect_hop(&self, id: JobId) {
        self.wait(id, Role::Caller).hand_over();
    }

    /// A place among the waiting sync calls; `None` if there are `max` already.
    pub fn sync_call(&self, max: usize) -> Option<SyncCall> {
        let place = SyncCall::new(&self.inner);
        (place.before < max).then_some(place)
    }

    /// A place for the next hop of a call that has been let in before.
    pub fn sync_hop(&self) -> SyncCall {
        SyncCall::new(&self.inner)
    }

    /// Sync calls that wait now.
    pub fn sync_calls(&self) -> usize {
        self.inner.sync_calls.load(Ordering::Relaxed)
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn leave(self: &Arc<Self>, id: JobId, leaving: Leaving) {
        let now = Instant::now();
        let timer = {
            let mut table = self.lock();
            if leaving == Leaving::Kept {
                table.keep(id);
            }
            let is_kept = table.kept.contains(&id);
            let Some(waited) = table.jobs.get_mut(&id) else {
                return;
            };
            waited.waiting -= 1;
            let until = match leaving {
                Leaving::Answered | Leaving::Kept => None,
                Leaving::HandedOver => Some(now + self.hop_grace),
                Leaving::Lost => Some(now + self.disconnect_grace),
            };
            if leaving == Leaving::HandedOver {
                waited.expected_until = until;
            }
            if waited.waiting > 0 {
                return;
            }
            match until.filter(|_| !is_kept) {
                None => {
                    table.jobs.remove(&id);
                    return;
                }
                Some(until) => {
                    waited.generation += 1;
                    (waited.generation, waited.expected_until.map_or(until, |expected| expected.max(until)))
                }
            }
        };
        self.start_timer(id, timer.0, timer.1);
    }

    fn start_timer(self: &Arc<Self>, id: JobId, generation: u64, until: Instant) {
        // While the server stops, its callers are lost for a reason that is not theirs; they may come back to the next one.
        if self.tasks.soft().is_cancelled() || tokio::runtime::Handle::try_current().is_err() {
            return;
        }
        let inner = self.clone();
        self.tasks.spawn("grace of a lost caller", async move {
            tokio::select! {
                () = tokio::time::sleep_until(until) => {}
                () = inner.tasks.soft().cancelled() => return,
            }
            if inner.give_up(id, generation) {
                (inner.cancel)(id).await;
            }
        });
    }

    /// Whether the job is still without waiters since the timer was started.
    fn give_up(&self, id: JobId, generation: u64) -> bool {
        let mut table = self.lock();
        let is_over = table.jobs.get(&id).is_some_and(|w| w.waiting == 0 && w.generation == generation);
        if is_over {
            table.jobs.remove(&id);
        }
        is_over
    }
}

impl Table {
    fn keep(&mut self, id: JobId) {
        if self.kept.len() == KEPT_MAX {
            self.kept.pop_front();
        }
        self.kept.push_back(id);
    }
}

/// One waiter. Dropped without a word, it counts as a broken connection.
#[must_use]
pub struct Guard {
    inner: Arc<Inner>,
    id: JobId,
    leaving: Leaving,
}

impl Guard {
    /// The waiter has its answer, or the job has ended.
    pub fn answered(mut self) {
        self.leaving = Leaving::Answered;
    }

    /// The waiter is told to come back: the next one is expected within the hop grace.
    pub fn hand_over(mut self) {
        self.leaving = Leaving::HandedOver;
    }

    /// The waiter is told that the job goes on without it.
    pub fn keep_job(mut self) {
        self.leaving = Leaving::Kept;
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.inner.leave(self.id, self.leaving);
    }
}

/// Lets the guard go, if there is one: only sync jobs have them.
pub fn release(guard: Option<Guard>, how: fn(Guard)) {
    if let Some(guard) = guard {
        how(guard);
    }
}

/// A place among the waiting sync calls.
#[must_use]
pub struct SyncCall {
    inner: Arc<Inner>,
    before: usize,
}

impl SyncCall {
    fn new(inner: &Arc<Inner>) -> Self {
        let before = inner.sync_calls.fetch_add(1, Ordering::Relaxed);
        Self { inner: inner.clone(), before }
    }
}

impl Drop for SyncCall {
    fn drop(&mut self) {
        self.inner.sync_calls.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOP: Duration = Duration::from_secs(30);
    const GONE: Duration = Duration::from_secs(2);
    const MOMENT: Duration = Duration::from_millis(1);

    struct World {
        waiters: Waiters,
        cancelled: Arc<Mutex<Vec<JobId>>>,
        tasks: Tasks,
        id: JobId,
    }

    impl World {
        fn new() -> Self {
            let cancelled: Arc<Mutex<Vec<JobId>>> = Arc::default();
            let seen = cancelled.clone();
            let cancel: Cancel = Arc::new(move |id| {
                seen.lock().unwrap().push(id);
                Box::pin(async {})
            });
            let tasks = Tasks::new();
            let waiters = Waiters::new(cancel, tasks.clone(), HOP, GONE);
            Self { waiters, cancelled, tasks, id: JobId::new(1, 2, 3) }
        }

        fn wait(&self) -> Guard {
            self.waiters.wait(self.id, Role::Caller)
        }

        async fn is_cancelled_after(&self, time: Duration) -> bool {
            tokio::time::sleep(time).await;
            !self.cancelled.lock().unwrap().is_empty()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_broken_connection_cancels_after_its_grace() {
        let world = World::new();
        drop(world.wait());
        assert!(!world.is_cancelled_after(GONE - MOMENT).await);
        assert!(world.is_cancelled_after(MOMENT * 2).await);
        assert!(world.waiters.inner.lock().jobs.is_empty(), "nothing is left behind");
    }

    #[tokio::test(start_paused = true)]
    async fn a_hop_has_its_own_grace_and_the_next_waiter_ends_it() {
        let world = World::new();
        world.wait().hand_over();
        assert!(!world.is_cancelled_after(HOP - MOMENT).await);
        let next = world.wait();
        assert!(!world.is_cancelled_after(HOP * 2).await, "somebody waits");
        next.hand_over();
        assert!(!world.is_cancelled_after(HOP - MOMENT).await);
        assert!(world.is_cancelled_after(MOMENT * 2).await);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_ends_the_matter() {
        let world = World::new();
        world.wait().answered();
        assert!(!world.is_cancelled_after(HOP * 2).await);
        assert!(world.waiters.inner.lock().jobs.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn the_last_of_several_waiters_decides() {
        let world = World::new();
        let (first, second) = (world.wait(), world.wait());
        drop(first);
        assert!(!world.is_cancelled_after(HOP).await, "the second still waits");
        drop(second);
        assert!(world.is_cancelled_after(GONE + MOMENT).await);
    }

    #[tokio::test(start_paused = true)]
    async fn an_onlooker_does_not_shorten_the_hop_but_the_hop_itself_may_break() {
        let world = World::new();
        world.wait().hand_over();
        drop(world.waiters.wait(world.id, Role::Onlooker));
        assert!(!world.is_cancelled_after(GONE * 5).await, "the hop is still expected");
        drop(world.wait());
        assert!(world.is_cancelled_after(GONE + MOMENT).await, "it came, and broke");
    }

    #[tokio::test(start_paused = true)]
    async fn a_job_that_goes_on_is_not_cancelled_by_later_onlookers() {
        let world = World::new();
        world.wait().keep_job();
        drop(world.waiters.wait(world.id, Role::Onlooker));
        assert!(!world.is_cancelled_after(HOP * 2).await);
        assert!(world.waiters.inner.lock().jobs.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn after_a_restart_the_caller_has_the_time_of_a_hop() {
        let world = World::new();
        world.waiters.expect_hop(world.id);
        assert!(!world.is_cancelled_after(HOP - MOMENT).await);
        assert!(world.is_cancelled_after(MOMENT * 2).await);
        assert_eq!(*world.cancelled.lock().unwrap(), [world.id]);
    }

    #[tokio::test(start_paused = true)]
    async fn stopping_the_server_cancels_nobody() {
        let world = World::new();
        drop(world.wait());
        world.tasks.soft().cancel();
        drop(world.wait());
        assert!(!world.is_cancelled_after(HOP).await);
    }

    #[tokio::test]
    async fn places_are_counted_and_given_back() {
        let waiters = World::new().waiters;
        let first = waiters.sync_call(1).unwrap();
        assert!(waiters.sync_call(1).is_none());
        let hop = waiters.sync_hop();
        assert_eq!(waiters.sync_calls(), 2, "a hop is always let in");
        drop((first, hop));
        assert!(waiters.sync_call(1).is_some());
    }
}
