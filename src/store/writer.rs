//! The one thread that writes: takes what has piled up, applies it in one transaction, commits (an fsync), and only then
//! answers everybody.
//!
//! 1. A group runs without savepoints: what is written has been checked before, so nothing fails half-way.
//! 2. If an operation does fail, the group is rolled back and run again, each operation in a savepoint: the failing one
//!    takes nothing of itself along and leaves the others whole.
//! 3. If the disk is full, the reserve is given up and the group runs again without its submissions.
//! 4. If the commit fails, all are told so and nothing was stored. If the disk cannot be trusted any more (an I/O error, a
//!    damaged file, a file that was removed), the program is brought down, answers nobody, and recovers at its next start.

use std::collections::HashMap;
use std::fs::File;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rusqlite::Connection;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::StoreError;
use super::idempotency::Keys;
use super::live::Live;
use super::metrics::Metrics;
use super::presence::{self, Presence};
use super::quota::Quota;
use super::space::Space;
use super::usage::{self, Used};

/// Operations in one transaction at most, and bytes of bodies and answers.
const GROUP_MAX: usize = 1_024;
const GROUP_BYTES_MAX: u64 = 4 * 1024 * 1024;
/// Submissions are refused while this many operations wait, or this many bytes in them.
const WAITING_MAX: usize = 16_384;
const WAITING_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// Called with a reason when the process must not go on.
pub type OnFatal = Arc<dyn Fn(&str) + Send + Sync>;

/// What an operation works on: the open transaction and what the writer keeps in memory beside it.
pub(super) struct Session {
    /// In a transaction while operations run.
    pub(super) c: Connection,
    /// Recent idempotency keys.
    pub(super) keys: Keys,
    /// Jobs that this transaction changes; their copies in memory are dropped when it has been committed.
    pub(super) touched: Vec<i64>,
    /// What attempts that this transaction ends had; added to the sums before it is committed.
    pub(super) used: Vec<Used>,
    /// Nothing of an earlier run is left: it ended in order, or this one has cleaned up after it ([`Store::note_start`]).
    ///
    /// [`Store::note_start`]: super::Store::note_start
    pub(super) is_settled: bool,
    models: HashMap<String, i64>,
    tenants: HashMap<String, i64>,
}

impl Session {
    pub(super) fn new(c: Connection, keys: Keys) -> Self {
        let (touched, used) = (Vec::new(), Vec::new());
        Self { c, keys, touched, used, is_settled: true, models: HashMap::new(), tenants: HashMap::new() }
    }

    /// The small integer of a model's name.
    pub(super) fn model(&mut self, name: &str) -> Result<i64, StoreError> {
        dictionary(&self.c, &mut self.models, "model", name)
    }

    /// The small integer of a tenant's name.
    pub(super) fn tenant(&mut self, name: &str) -> Result<i64, StoreError> {
        dictionary(&self.c, &mut self.tenants, "tenant", name)
    }

    fn committed(&mut self) {
        self.keys.committed();
        self.touched.clear();
        self.used.clear();
    }

    /// What an operation had added that was rolled back alone; `keys`, `used`: the marks before it.
    fn operation_rolled_back(&mut self, keys: usize, used: usize) {
        self.keys.back_to(keys);
        self.used.truncate(used);
        self.models.clear();
        self.tenants.clear();
    }

    /// What the rolled back transaction had added is not known any more.
    fn rolled_back(&mut self) {
        self.keys.rolled_back();
        self.touched.clear();
        self.used.clear();
        self.models.clear();
        self.tenants.clear();
    }
}

fn dictionary(c: &Connection, known: &mut HashMap<String, i64>, table: &str, name: &str) -> Result<i64, StoreError> {
    if let Some(id) = known.get(name) {
        return Ok(*id);
    }
    c.prepare_cached(&format!("INSERT INTO {table} (name) VALUES (?1) ON CONFLICT DO NOTHING"))?.execute([name])?;
    let id = c
        .prepare_cached(&format!("SELECT id FROM {table} WHERE name = ?1"))?
        .query_row([name], |row| row.get::<_, i64>(0))?;
    known.insert(name.to_owned(), id);
    Ok(id)
}

/// What kind of change an operation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// New work; refused when the disk is nearly full.
    Submission,
    /// A change of accepted work: always goes through, if need be from the reserve.
    Change,
}

trait Operation: Send {
    fn run(&mut self, session: &mut Session);
    fn refuse(&mut self, error: StoreError);
    fn error(&self) -> Option<&StoreError>;
    fn kind(&self) -> Kind;
    fn bytes(&self) -> u64;
    /// Answers; `Err`: the transaction was not committed.
    fn reply(self: Box<Self>, committed: Result<(), StoreError>);
}

struct Typed<T, F> {
    kind: Kind,
    bytes: u64,
    apply: F,
    result: Option<Result<T, StoreError>>,
    sender: oneshot::Sender<Result<T, StoreError>>,
}

impl<T, F> Operation for Typed<T, F>
where
    T: Send,
    F: FnMut(&mut Session) -> Result<T, StoreError> + Send,
{
    fn run(&mut self, session: &mut Session) {
        self.result = Some((self.apply)(session));
    }

    fn refuse(&mut self, error: StoreError) {
        self.result = Some(Err(error));
    }

    fn error(&self) -> Option<&StoreError> {
        self.result.as_ref().and_then(|result| result.as_ref().err())
    }

    fn kind(&self) -> Kind {
        self.kind
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn reply(self: Box<Self>, committed: Result<(), StoreError>) {
        let Self { apply, result, sender, .. } = *self;
        // What it holds is free before the answer arrives: the caller may want it back.
        drop(apply);
        let result = result.unwrap_or_else(|| Err(StoreError::Database("the operation was not run".to_owned())));
        // Nobody may wait any more; the change stands all the same.
        let _ = sender.send(committed.and(result));
    }
}

/// Hands operations to the writing thread. Cheap to clone.
#[derive(Clone)]
pub(super) struct Writer {
    operations: mpsc::UnboundedSender<Box<dyn Operation>>,
    waiting: Arc<Waiting>,
}

#[derive(Default)]
struct Waiting {
    operations: AtomicUsize,
    bytes: AtomicU64,
    /// Answers that were handed to clients since the last commit; told to the database with the next group.
    delivered: Mutex<Vec<i64>>,
}

/// The answer to an operation, once it is durable.
pub(super) type Pending<T> = oneshot::Receiver<Result<T, StoreError>>;

/// What the writing thread works with.
pub(super) struct Parts {
    pub(super) session: Session,
    pub(super) space: Space,
    pub(super) quota: Quota,
    pub(super) live: Live,
    pub(super) metrics: Metrics,
    pub(super) presence: Presence,
    pub(super) on_fatal: OnFatal,
    /// Keeps the data dir until the last change has been written.
    pub(super) _lock: Option<Arc<File>>,
}

impl Writer {
    /// Starts the thread; it ends when the last `Writer` is dropped.
    pub(super) fn start(parts: Parts) -> std::io::Result<Self> {
        let (operations, receiver) = mpsc::unbounded_channel();
        let waiting = Arc::new(Waiting::default());
        let thread = Thread { parts, waiting: waiting.clone(), is_dead: false };
        let on_fatal = thread.parts.on_fatal.clone();
        let run = std::panic::AssertUnwindSafe(move || thread.run(receiver));
        std::thread::Builder::new().name("store-writer".into()).spawn(move || {
            if std::panic::catch_unwind(run).is_err() {
                on_fatal("the store's writing thread panicked");
            }
        })?;
        Ok(Self { operations, waiting })
    }

    /// Whether new work should be refused for now. Changes to accepted jobs always go through: there are never more of
    /// them than jobs on workers and events in flight.
    pub(super) fn is_full(&self) -> bool {
        self.waiting.operations.load(Ordering::Relaxed) >= WAITING_MAX
            || self.waiting.bytes.load(Ordering::Relaxed) >= WAITING_BYTES_MAX
    }

    /// Queues an operation at once (so that the order of calls is the order of commits) and returns where its answer will
    /// arrive. It may be run more than once: after a rollback it starts again. `bytes`: about what it writes.
    pub(super) fn apply<T, F>(&self, kind: Kind, bytes: u64, operation: F) -> Pending<T>
    where
        T: Send + 'static,
        F: FnMut(&mut Session) -> Result<T, StoreError> + Send + 'static,
    {
        let (sender, receiver) = oneshot::channel();
        let boxed = Box::new(Typed { kind, bytes, apply: operation, result: None, sender });
        self.waiting.operations.fetch_add(1, Ordering::Relaxed);
        self.waiting.bytes.fetch_add(bytes, Ordering::Relaxed);
        if self.operations.send(boxed).is_err() {
            tracing::error!("the store's writer has stopped; a change was not stored");
        }
        receiver
    }

    /// Whether answers were handed to clients since the last commit.
    pub(super) fn has_delivered(&self) -> bool {
        !lock(&self.waiting.delivered).is_empty()
    }

    /// Notes that a job's answer was handed to a client; written with the next commit.
    pub(super) fn delivered(&self, number: i64) {
        lock(&self.waiting.delivered).push(number);
    }
}

/// What a panicking thread left is whole: nobody panics in the middle of a change.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for an operation's answer.
pub(super) async fn answer<T>(pending: Pending<T>) -> Result<T, StoreError> {
    pending.await.unwrap_or(Err(StoreError::Stopped))
}

fn run(c: &Connection, sql: &str) -> Result<(), StoreError> {
    c.prepare_cached(sql)?.execute([])?;
    Ok(())
}

struct Thread {
    parts: Parts,
    waiting: Arc<Waiting>,
    is_dead: bool,
}

impl Thread {
    fn run(mut self, mut operations: mpsc::UnboundedReceiver<Box<dyn Operation>>) {
        while let Some(first) = operations.blocking_recv() {
            let mut bytes = first.bytes();
            let mut group = vec![first];
            // Who has just begun to send, and waits for this processor, gets its operations into this group.
            std::thread::yield_now();
            while group.len() < GROUP_MAX
                && bytes < GROUP_BYTES_MAX
                && let Ok(next) = operations.try_recv()
            {
                bytes += next.bytes();
                group.push(next);
            }
            self.waiting.operations.fetch_sub(group.len(), Ordering::Relaxed);
            self.waiting.bytes.fetch_sub(bytes, Ordering::Relaxed);
            self.commit(group, bytes);
        }
        if !self.is_dead {
            close(&self.parts.session);
        }
    }

    fn commit(&mut self, mut group: Vec<Box<dyn Operation>>, bytes: u64) {
        if self.is_dead {
            // Nothing is answered by a store that cannot be trusted.
            return;
        }
        let begun = Instant::now();
        let delivered = std::mem::take(&mut *lock(&self.waiting.delivered));
        let committed = self.try_commit(&mut group, &delivered);
        match &committed {
            Ok(()) => {
                self.parts.live.forget(&self.parts.session.touched);
                self.parts.session.committed();
                self.parts.quota.wrote(bytes);
                self.parts.metrics.committed(group.len(), begun.elapsed());
            }
            Err(error) => {
                lock(&self.waiting.delivered).extend(delivered);
                tracing::error!(operations = group.len(), "nothing was stored: {error}");
                if error.is_untrustworthy() {
                    self.is_dead = true;
                    return (self.parts.on_fatal)(&self.last_words(error));
                }
            }
        }
        for operation in group {
            operation.reply(match &committed {
                Ok(()) => Ok(()),
                Err(error) => Err(error.for_everybody()),
            });
        }
    }

    /// Why the process ends, and what to do.
    fn last_words(&self, error: &StoreError) -> String {
        match error {
            StoreError::Gone(gone) => {
                let mut again = presence::wait_for_room(|| self.parts.space.give_up_reserve());
                let now = self.parts.metrics.now();
                let saved = self.parts.presence.rescue(&self.parts.session.c, gone, now, &mut again);
                format!("{gone}: {saved}")
            }
            error => {
                let database = self.parts.session.c.path().unwrap_or_default();
                let error = error.for_everybody().in_database(std::path::Path::new(database));
                match error {
                    StoreError::Corrupt(_) => error.to_string(),
                    error => format!("the database could not be made durable: {error}"),
                }
            }
        }
    }

    fn try_commit(&mut self, group: &mut [Box<dyn Operation>], delivered: &[i64]) -> Result<(), StoreError> {
        let low = self.parts.space.check().map(StoreError::DiskFull).or_else(|| self.parts.quota.check());
        let has_submissions = group.iter().any(|operation| operation.kind() == Kind::Submission);
        let mut outcome =
            if low.is_some() && has_submissions { Err(Stop::Failed) } else { self.plain(group, delivered) };
        if let Err(Stop::Failed) = outcome {
            outcome = self.guarded(group, delivered, low.as_ref());
        }
        if let Err(Stop::NotCommitted(StoreError::DiskFull(_))) = &outcome
            && self.parts.space.give_up_reserve()
        {
            let low = self.parts.space.check().unwrap_or_else(|| "the disk is full".to_owned());
            outcome = self.guarded(group, delivered, Some(&StoreError::DiskFull(low)));
        }
        if outcome.is_err() {
            // However it ended: the next group begins its own transaction.
            self.roll_back();
        }
        outcome.map_err(|stop| match stop {
            Stop::NotCommitted(error) => error,
            Stop::Failed => StoreError::Database("the group could not be run".to_owned()),
        })
    }

    /// Without savepoints; gives up at the first failing operation.
    fn plain(&mut self, group: &mut [Box<dyn Operation>], delivered: &[i64]) -> Result<(), Stop> {
        self.begin(delivered)?;
        for operation in group.iter_mut() {
            operation.run(&mut self.parts.session);
            if operation.error().is_some() {
                self.roll_back();
                return Err(Stop::Failed);
            }
        }
        self.end()
    }

    /// With savepoints; `low`: submissions are refused with this reason.
    fn guarded(
        &mut self,
        group: &mut [Box<dyn Operation>],
        delivered: &[i64],
        low: Option<&StoreError>,
    ) -> Result<(), Stop> {
        self.begin(delivered)?;
        for operation in group.iter_mut() {
            if let Some(reason) = low
                && operation.kind() == Kind::Submission
            {
                operation.refuse(reason.for_everybody());
                continue;
            }
            run(&self.parts.session.c, "SAVEPOINT operation")?;
            let (keys, used) = (self.parts.session.keys.mark(), self.parts.session.used.len());
            operation.run(&mut self.parts.session);
            // Some errors (a full disk, an I/O error) make SQLite roll the whole transaction back: then nothing more may be
            // written, or it would commit one by one.
            if self.parts.session.c.is_autocommit() {
                let error = operation.error().map_or_else(rolled_back_within, StoreError::for_everybody);
                self.parts.session.rolled_back();
                return Err(Stop::NotCommitted(error));
            }
            if let Some(error) = operation.error() {
                if error.is_untrustworthy() || matches!(error, StoreError::DiskFull(_)) {
                    let error = error.for_everybody();
                    self.roll_back();
                    return Err(Stop::NotCommitted(error));
                }
                run(&self.parts.session.c, "ROLLBACK TO operation")?;
                self.parts.session.operation_rolled_back(keys, used);
            }
            run(&self.parts.session.c, "RELEASE operation")?;
        }
        self.end()
    }

    fn begin(&mut self, delivered: &[i64]) -> Result<(), Stop> {
        let c = &self.parts.session.c;
        run(c, "BEGIN IMMEDIATE")?;
        let at = self.parts.metrics.now();
        for number in delivered {
            let marked = c
                .prepare_cached("UPDATE job SET delivered_at = ?2 WHERE number = ?1 AND delivered_at IS NULL")
                .and_then(|mut statement| statement.execute([*number, at]));
            if let Err(error) = marked {
                self.roll_back();
                return Err(Stop::NotCommitted(error.into()));
            }
        }
        Ok(())
    }

    fn end(&mut self) -> Result<(), Stop> {
        if self.parts.session.c.is_autocommit() {
            self.parts.session.rolled_back();
            return Err(Stop::NotCommitted(rolled_back_within()));
        }
        let session = &self.parts.session;
        usage::add_used(&session.c, &session.used).and_then(|()| run(&session.c, "COMMIT")).map_err(|error| {
            self.roll_back();
            Stop::NotCommitted(error)
        })
    }

    fn roll_back(&mut self) {
        if !self.parts.session.c.is_autocommit() {
            let _ = run(&self.parts.session.c, "ROLLBACK");
        }
        self.parts.session.rolled_back();
    }
}

fn rolled_back_within() -> StoreError {
    StoreError::Database("the transaction was rolled back by an error within it".to_owned())
}

/// Why a pass over a group ended without a commit.
enum Stop {
    /// An operation failed; the next pass finds out which.
    Failed,
    /// The transaction as a whole.
    NotCommitted(StoreError),
}

impl From<StoreError> for Stop {
    fn from(error: StoreError) -> Self {
        Self::NotCommitted(error)
    }
}

/// Writes that the run ended in order; not if it was a start that failed after a run that did not.
pub(super) fn mark_clean(session: &Session) -> Result<(), StoreError> {
    if !session.is_settled {
        return Ok(());
    }
    session.c.execute(
        "INSERT INTO meta (key, value) VALUES ('clean', '1') ON CONFLICT (key) DO UPDATE SET value = '1'",
        [],
    )?;
    Ok(())
}

/// A clean end: everything is in the database's own file, and the next start knows it.
fn close(session: &Session) {
    let closed = mark_clean(session).and_then(|()| Ok(session.c.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)")?));
    if let Err(error) = closed {
        tracing::warn!("the database was not closed cleanly (nothing is lost): {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;

    fn parts(c: Connection) -> Parts {
        Parts {
            session: Session::new(c, Keys::default()),
            space: Space::unlimited(),
            quota: Quota::new(u64::MAX, 0, Arc::default()),
            live: Live::default(),
            metrics: Metrics::new(Arc::new(ManualClock::at(1))),
            presence: Presence::default(),
            on_fatal: Arc::new(|reason| panic!("{reason}")),
            _lock: None,
        }
    }

    fn writer() -> Writer {
        let connection = Connection::open_in_memory().unwrap();
        connection
            .execute_batch("CREATE TABLE t (x INTEGER UNIQUE); CREATE TABLE meta (key TEXT PRIMARY KEY, value)")
            .unwrap();
        Writer::start(parts(connection)).unwrap()
    }

    fn apply<T: Send + 'static>(
        writer: &Writer,
        mut operation: impl FnMut(&Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Pending<T> {
        writer.apply(Kind::Change, 0, move |session| operation(&session.c))
    }

    fn insert(writer: &Writer, x: i64) -> Pending<()> {
        apply(writer, move |c| {
            c.execute("INSERT INTO t VALUES (?1 + 1000)", [x])?;
            c.execute("INSERT INTO t VALUES (?1)", [x])?;
            Ok(())
        })
    }

    fn count(writer: &Writer) -> Pending<i64> {
        apply(writer, |c| Ok(c.query_row("SELECT count(*) FROM t", [], |r| r.get::<_, i64>(0))?))
    }

    #[tokio::test]
    async fn a_failing_operation_leaves_its_group_whole_and_nothing_of_itself() {
        let writer = writer();
        // Held until all three are queued, so that they are one group.
        let (release, held) = std::sync::mpsc::channel::<()>();
        let first = apply(&writer, move |_| {
            let _ = held.recv();
            Ok(())
        });
        let replies = [insert(&writer, 1), insert(&writer, 1), insert(&writer, 2)];
        drop(release);
        answer(first).await.unwrap();
        let mut results = Vec::new();
        for reply in replies {
            results.push(answer(reply).await.is_ok());
        }
        assert_eq!(results, [true, false, true]);
        assert_eq!(answer(count(&writer)).await.unwrap(), 4);
    }

    #[tokio::test]
    async fn a_damaged_database_is_named_with_the_way_out() {
        let dir = tempfile::tempdir().unwrap();
        let connection = Connection::open(dir.path().join("t.db")).unwrap();
        let (told, reason) = std::sync::mpsc::channel();
        let told = Mutex::new(told);
        let on_fatal: OnFatal = Arc::new(move |reason| lock(&told).send(reason.to_owned()).unwrap());
        let writer = Writer::start(Parts { on_fatal, ..parts(connection) }).unwrap();
        let broken: Pending<()> = apply(&writer, |_| Err(StoreError::Corrupt("malformed".to_owned())));
        assert!(matches!(answer(broken).await, Err(StoreError::Stopped)), "nobody is answered");
        let reason = reason.recv().unwrap();
        for word in ["t.db: malformed", "roundhouse doctor --deep", "roundhouse restore"] {
            assert!(reason.contains(word), "{word}: {reason}");
        }
    }

    #[tokio::test]
    async fn a_database_that_is_locked_by_another_is_an_error_to_try_again_and_no_end() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("t.db");
        let connection = Connection::open(&file).unwrap();
        connection.execute_batch("CREATE TABLE t (x INTEGER UNIQUE)").unwrap();
        connection.busy_timeout(std::time::Duration::from_millis(10)).unwrap();
        let writer = Writer::start(parts(connection)).unwrap();
        let shell = Connection::open(&file).unwrap();
        shell.execute_batch("BEGIN IMMEDIATE").unwrap();
        let refused = answer(insert(&writer, 1)).await;
        assert!(matches!(&refused, Err(StoreError::Database(text)) if text.contains("locked")), "{refused:?}");
        shell.execute_batch("COMMIT").unwrap();
        assert!(answer(insert(&writer, 1)).await.is_ok());
    }

    #[tokio::test]
    async fn a_transaction_that_sqlite_rolled_back_stores_nothing_of_its_group() {
        let writer = writer();
        let (release, held) = std::sync::mpsc::channel::<()>();
        let gate = apply(&writer, move |_| {
            let _ = held.recv();
            Ok(())
        });
        let first = insert(&writer, 1);
        // What a full disk does to a transaction.
        let broken: Pending<()> = apply(&writer, |c| {
            c.execute_batch("ROLLBACK")?;
            Err(StoreError::Database("an error that ended the transaction".to_owned()))
        });
        let last = insert(&writer, 2);
        drop(release);
        // The gate may be in the same group.
        let _ = answer(gate).await;
        let (first, broken, last) = (answer(first).await, answer(broken).await, answer(last).await);
        assert!(broken.is_err());
        let stored = usize::try_from(answer(count(&writer)).await.unwrap()).unwrap();
        let promised = [first.is_ok(), last.is_ok()].iter().filter(|ok| **ok).count();
        assert_eq!(stored, 2 * promised, "what was promised is there, and nothing else");
    }
}
