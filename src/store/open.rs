//! Opening the data dir: lock, migrations, pragmas read back, recovery, and what the scheduler has to know.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};

use super::StoreError;
use super::artifacts::{Artifacts, hex};
use super::read::Reader;
use super::verbs::{self, Learned, QueuedJob, Store};
use super::writer::{OnFatal, Writer};
use crate::clock::Clock;

/// Oldest SQLite without the WAL-reset corruption.
const SQLITE_MIN: i32 = 3_051_003;
const READERS: u32 = 4;

/// A store that is ready, and what it found.
pub struct Opened {
    /// Writes and reads.
    pub store: Store,
    /// Jobs to be scheduled, oldest first.
    pub queued: Vec<QueuedJob>,
    /// What was learned about models in earlier runs.
    pub learned: BTreeMap<String, Learned>,
    /// The next job's number.
    pub next_number: i64,
    /// Jobs that were on a worker when the last run ended, and wait again now, uncharged.
    pub recovered: usize,
    /// Identifies this data dir in instance marks.
    pub data_dir_id: String,
}

/// Opens (and makes) the data dir `dir`. `on_fatal` is called if the database cannot be made durable any more.
pub async fn open(dir: &Path, clock: Arc<dyn Clock>, on_fatal: OnFatal) -> Result<Opened, StoreError> {
    // For its owner only: prompts and answers lie in it.
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|source| StoreError::File { path: dir.display().to_string(), source })?;
    let lock = lock(dir)?;
    if rusqlite::version_number() < SQLITE_MIN {
        return Err(StoreError::Unusable(format!(
            "SQLite {} is linked; 3.51.3 or newer is needed",
            rusqlite::version()
        )));
    }
    let file = dir.join("roundhouse.db");
    migrate(&file).await?;
    let connection = writing_connection(&file)?;
    let now = clock.now();
    let recovered = verbs::recover(&connection, now)?;
    let data_dir_id = data_dir_id(&connection)?;
    let queued = verbs::load_queued(&connection)?;
    let learned = verbs::load_learned(&connection)?;
    let next_number = verbs::next_number(&connection)?;
    let next_batch = verbs::next_batch(&connection)?;
    let artifacts = Artifacts::open(&dir.join("artifacts"))?;
    let reader = Reader::new(reading_pool(&file).await?, artifacts.clone());
    let writer = Writer::start(connection, on_fatal)
        .map_err(|source| StoreError::File { path: "the store's writer thread".into(), source })?;
    let store = Store::new(writer, reader, artifacts, clock, next_batch, lock);
    Ok(Opened { store, queued, learned, next_number, recovered, data_dir_id })
}

/// One server per data dir: an advisory lock that ends with the process.
fn lock(dir: &Path) -> Result<File, StoreError> {
    let path = dir.join("lock");
    let in_file = |source| StoreError::File { path: path.display().to_string(), source };
    let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(in_file)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(StoreError::Unusable(format!(
            "another roundhouse server uses {}: stop it, or give this one another --data-dir",
            dir.display()
        ))),
        Err(std::fs::TryLockError::Error(source)) => Err(in_file(source)),
    }
}

async fn migrate(file: &Path) -> Result<(), StoreError> {
    let options = SqliteConnectOptions::new()
        .filename(file)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full);
    let pool = SqlitePoolOptions::new().max_connections(1).connect_with(options).await?;
    let migrated = sqlx::migrate!("./migrations").run(&pool).await;
    pool.close().await;
    migrated.map_err(|error| StoreError::Unusable(format!("{}: {error}", file.display())))
}

fn writing_connection(file: &Path) -> Result<Connection, StoreError> {
    let connection =
        Connection::open_with_flags(file, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
    connection.set_prepared_statement_cache_capacity(64);
    connection.busy_timeout(Duration::from_secs(5))?;
    connection.execute_batch(
        "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA temp_store = MEMORY; PRAGMA cache_size = -65536;
         PRAGMA wal_autocheckpoint = 1000; PRAGMA journal_size_limit = 67108864; PRAGMA trusted_schema = OFF;",
    )?;
    let mode: String = connection.pragma_query_value(None, "journal_mode", |row| row.get(0))?;
    let synchronous: i64 = connection.pragma_query_value(None, "synchronous", |row| row.get(0))?;
    if mode != "wal" || synchronous != 2 {
        return Err(StoreError::Unusable(format!(
            "{}: journal_mode is {mode} and synchronous {synchronous}, needed are wal and 2 (FULL); is it on a local disk?",
            file.display()
        )));
    }
    Ok(connection)
}

async fn reading_pool(file: &Path) -> Result<sqlx::SqlitePool, StoreError> {
    let options = SqliteConnectOptions::new()
        .filename(file)
        .create_if_missing(false)
        .pragma("query_only", "ON")
        .busy_timeout(Duration::from_secs(5));
    Ok(SqlitePoolOptions::new().min_connections(1).max_connections(READERS).connect_with(options).await?)
}

fn data_dir_id(connection: &Connection) -> Result<String, StoreError> {
    let mut random = [0_u8; 8];
    getrandom::fill(&mut random).map_err(|error| StoreError::Unusable(format!("no random numbers: {error}")))?;
    connection
        .execute("INSERT INTO meta (key, value) VALUES ('data_dir_id', ?1) ON CONFLICT DO NOTHING", [hex(&random)])?;
    Ok(connection.query_row("SELECT value FROM meta WHERE key = 'data_dir_id'", [], |row| row.get(0))?)
}
