//! The one thread that writes: takes what has piled up, applies it in one transaction, commits (an fsync), and only then
//! answers everybody.
//!
//! Each operation runs in a savepoint, so one that fails takes nothing of itself along and leaves the others whole. If the
//! commit fails, all are told so and nothing was stored; if the disk cannot be trusted any more (an I/O error at commit),
//! the program is brought down and recovers at its next start.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rusqlite::Connection;
use tokio::sync::{mpsc, oneshot};

use super::StoreError;

/// Operations in one transaction at most.
const GROUP_MAX: usize = 1_024;
/// Submissions are refused while this many operations wait.
const WAITING_MAX: usize = 16_384;

type Reply = Box<dyn FnOnce(Result<(), StoreError>) + Send>;
/// Runs in the open transaction; `None`: there is none (any more), and the reply will be told why.
type Operation = Box<dyn FnOnce(Option<&Connection>) -> Reply + Send>;
/// Called with a reason when the process must not go on.
pub type OnFatal = Arc<dyn Fn(&str) + Send + Sync>;

/// Hands operations to the writing thread. Cheap to clone.
#[derive(Clone)]
pub(super) struct Writer {
    operations: mpsc::UnboundedSender<Operation>,
    waiting: Arc<AtomicUsize>,
}

/// The answer to an operation, once it is durable.
pub(super) type Pending<T> = oneshot::Receiver<Result<T, StoreError>>;

impl Writer {
    /// Starts the thread; it ends when the last `Writer` is dropped.
    pub(super) fn start(connection: Connection, on_fatal: OnFatal) -> std::io::Result<Self> {
        let (operations, receiver) = mpsc::unbounded_channel();
        let waiting = Arc::new(AtomicUsize::new(0));
        let counter = waiting.clone();
        std::thread::Builder::new()
            .name("store-writer".into())
            .spawn(move || write_until_closed(&connection, receiver, &counter, &on_fatal))?;
        Ok(Self { operations, waiting })
    }

    /// Whether new work should be refused for now. Changes to accepted jobs always go through: there are never more of
    /// them than jobs on workers and events in flight.
    pub(super) fn is_full(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) >= WAITING_MAX
    }

    /// Queues an operation at once (so that the order of calls is the order of commits) and returns where its answer will
    /// arrive.
    pub(super) fn apply<T, F>(&self, operation: F) -> Pending<T>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> Result<T, StoreError> + Send + 'static,
    {
        let (sender, receiver) = oneshot::channel();
        let boxed: Operation = Box::new(move |connection| {
            let result = match connection {
                Some(connection) => in_savepoint(connection, operation),
                None => Err(StoreError::Database("the transaction was not open".to_owned())),
            };
            Box::new(move |committed| {
                // Nobody may wait any more; the change stands all the same.
                let _ = sender.send(committed.and(result));
            })
        });
        self.waiting.fetch_add(1, Ordering::Relaxed);
        if self.operations.send(boxed).is_err() {
            tracing::error!("the store's writer has stopped; a change was not stored");
        }
        receiver
    }
}

/// Waits for an operation's answer.
pub(super) async fn answer<T>(pending: Pending<T>) -> Result<T, StoreError> {
    pending.await.unwrap_or(Err(StoreError::Stopped))
}

fn in_savepoint<T>(
    connection: &Connection,
    operation: impl FnOnce(&Connection) -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    run(connection, "SAVEPOINT operation")?;
    let result = operation(connection);
    if result.is_err() {
        run(connection, "ROLLBACK TO operation")?;
    }
    run(connection, "RELEASE operation")?;
    result
}

fn run(connection: &Connection, sql: &str) -> Result<(), StoreError> {
    connection.prepare_cached(sql)?.execute([])?;
    Ok(())
}

fn write_until_closed(
    connection: &Connection,
    mut operations: mpsc::UnboundedReceiver<Operation>,
    waiting: &AtomicUsize,
    on_fatal: &OnFatal,
) {
    while let Some(first) = operations.blocking_recv() {
        let mut group = vec![first];
        while group.len() < GROUP_MAX
            && let Ok(next) = operations.try_recv()
        {
            group.push(next);
        }
        waiting.fetch_sub(group.len(), Ordering::Relaxed);
        commit(connection, group, on_fatal);
    }
}

fn commit(connection: &Connection, group: Vec<Operation>, on_fatal: &OnFatal) {
    let begun = run(connection, "BEGIN IMMEDIATE");
    // Some errors (a full disk, an I/O error) make SQLite roll the whole transaction back: then nothing more may be
    // written, or it would commit one by one.
    let open = || begun.is_ok() && !connection.is_autocommit();
    let replies: Vec<Reply> = group.into_iter().map(|operation| operation(open().then_some(connection))).collect();
    let is_open = open();
    let committed = match begun {
        Ok(()) if is_open => run(connection, "COMMIT"),
        Ok(()) => Err(StoreError::Database("the transaction was rolled back by an error within it".to_owned())),
        Err(error) => Err(error),
    };
    if let Err(error) = &committed {
        tracing::error!(operations = replies.len(), "nothing was stored: {error}");
        if !connection.is_autocommit() {
            let _ = run(connection, "ROLLBACK");
        }
        if is_untrustworthy(error) {
            on_fatal(&format!("the database could not be made durable: {error}"));
        }
    }
    answer_all(replies, &committed);
}

fn answer_all(replies: Vec<Reply>, committed: &Result<(), StoreError>) {
    for reply in replies {
        reply(match committed {
            Ok(()) => Ok(()),
            Err(error) => Err(StoreError::Database(error.to_string())),
        });
    }
}

/// After a failed write or fsync the page cache may claim to be clean: only a restart through recovery knows.
fn is_untrustworthy(error: &StoreError) -> bool {
    matches!(error, StoreError::Io(_))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn writer() -> Writer {
        let connection = Connection::open_in_memory().unwrap();
        connection.execute_batch("CREATE TABLE t (x INTEGER UNIQUE)").unwrap();
        Writer::start(connection, Arc::new(|reason| panic!("{reason}"))).unwrap()
    }

    fn insert(writer: &Writer, x: i64) -> Pending<()> {
        writer.apply(move |c| {
            c.execute("INSERT INTO t VALUES (?1 + 1000)", [x])?;
            c.execute("INSERT INTO t VALUES (?1)", [x])?;
            Ok(())
        })
    }

    #[tokio::test]
    async fn a_failing_operation_leaves_its_group_whole_and_nothing_of_itself() {
        let writer = writer();
        let replies = [insert(&writer, 1), insert(&writer, 1), insert(&writer, 2)];
        let mut results = Vec::new();
        for reply in replies {
            results.push(answer(reply).await.is_ok());
        }
        assert_eq!(results, [true, false, true]);
        let count = writer.apply(|c| Ok(c.query_row("SELECT count(*) FROM t", [], |r| r.get::<_, i64>(0))?));
        assert_eq!(answer(count).await.unwrap(), 4);
    }

    #[tokio::test]
    async fn a_database_that_is_locked_by_another_is_an_error_to_try_again_and_no_end() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("t.db");
        let connection = Connection::open(&file).unwrap();
        connection.execute_batch("CREATE TABLE t (x INTEGER UNIQUE)").unwrap();
        connection.busy_timeout(std::time::Duration::from_millis(10)).unwrap();
        let writer = Writer::start(connection, Arc::new(|reason| panic!("{reason}"))).unwrap();
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
        let first = insert(&writer, 1);
        // What a full disk does to a transaction.
        let broken: Pending<()> = writer.apply(|c| {
            c.execute_batch("ROLLBACK")?;
            Err(StoreError::Database("disk full".to_owned()))
        });
        let last = insert(&writer, 2);
        let (first, broken, last) = (answer(first).await, answer(broken).await, answer(last).await);
        assert!(broken.is_err());
        let count = writer.apply(|c| Ok(c.query_row("SELECT count(*) FROM t", [], |r| r.get::<_, i64>(0))?));
        let stored = usize::try_from(answer(count).await.unwrap()).unwrap();
        let promised = [first.is_ok(), last.is_ok()].iter().filter(|ok| **ok).count();
        assert_eq!(stored, 2 * promised, "what was promised is there, and nothing else");
    }
}
