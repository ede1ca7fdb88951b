//! Opening the data dir: lock, migrations, pragmas read back, recovery, and what the scheduler has to know.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicI64;
use std::time::{Duration, UNIX_EPOCH};

use rusqlite::{Connection, OpenFlags};
use sqlx::sqlite::{
    SqliteAutoVacuum, SqliteConnectOptions, SqliteJournalMode, SqliteLockingMode, SqlitePoolOptions, SqliteSynchronous,
};
use tokio::time::Instant;

use super::StoreError;
use super::controls;
use super::files::{Files, hex};
use super::idempotency::Keys;
use super::learned::{self, Learned};
use super::live::Live;
use super::metrics::Metrics;
use super::presence::{self, Presence};
use super::quota::{self, Quota};
use super::read::Reader;
use super::recovery;
use super::space::Space;
use super::verbs::Store;
use super::writer::{Kind, OnFatal, Parts, Session, Writer, answer};
use crate::clock::Clock;
use crate::domain::{Controls, Millis, StorageSettings};

/// Oldest SQLite without the WAL-reset corruption.
const SQLITE_MIN: i32 = 3_051_003;
/// Pages the writer keeps in memory: 32 MiB.
const CACHE_KIB: i64 = 32 * 1024;
/// Larger databases are not looked at whole by a start, so that it takes no longer than a third of a second.
const CHECKED_BYTES_MAX: i64 = 64 << 20;
/// The database's file in the data dir.
pub(super) const DATABASE: &str = "roundhouse.db";
/// The file whose lock keeps other servers out.
pub(super) const LOCK: &str = "lock";

/// What the schema went through.
static MIGRATIONS: sqlx::migrate::Migrator = sqlx::migrate!("./migrations");

/// The last migration that this program knows.
pub(super) fn schema_version() -> i64 {
    MIGRATIONS.iter().map(|migration| migration.version).max().unwrap_or(0)
}

/// A store that is ready, and what it found.
pub struct Opened {
    /// Writes and reads.
    pub store: Store,
    /// What was learned about models in earlier runs.
    pub learned: BTreeMap<String, Learned>,
    /// How much tenants were served in earlier runs, in weighted GPU ms.
    pub served: BTreeMap<String, f64>,
    /// What was said by hand in earlier runs.
    pub controls: Controls,
    /// The next job's number.
    pub next_number: i64,
    /// Jobs that were on a worker when the last run ended, and wait again now, uncharged.
    pub recovered: usize,
    /// Whether the last run that called [`Store::note_start`] ended in order.
    pub was_clean: bool,
    /// When the last run that called [`Store::note_start`] did, in ms since the epoch; `None`: none did, or it cannot be told.
    pub last_start: Option<Millis>,
    /// Whether the write-ahead log of the last run was gone, and with it what was accepted last.
    pub lacks_log: bool,
    /// Whether this is the first run on a restored backup.
    pub is_restored: bool,
    /// Number of this run of the server on this data dir.
    pub epoch: i64,
    /// Identifies this data dir in instance marks.
    pub data_dir_id: String,
}

/// Opens (and makes) the data dir `dir`. `on_fatal` is called if the database cannot be made durable any more. Waiting jobs
/// are read with [`Reader::queued`].
pub async fn open(
    dir: &Path,
    clock: Arc<dyn Clock>,
    settings: StorageSettings,
    on_fatal: OnFatal,
) -> Result<Opened, StoreError> {
    let begun = Instant::now();
    // For its owner only: prompts and answers lie in it.
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|source| StoreError::File { path: dir.display().to_string(), source })?;
    if let Some(parent) = dir.parent().filter(|parent| parent.is_dir()) {
        // The folder's own name has to outlive a power cut, too. Where it may not be read, it was there before.
        let _ = File::open(parent).and_then(|parent| parent.sync_all());
    }
    let lacks_lock = !dir.join(LOCK).exists();
    let lock = Arc::new(lock(dir)?);
    if let Some(reason) = super::restore::unfinished(dir) {
        return Err(StoreError::Unusable(reason));
    }
    if rusqlite::version_number() < SQLITE_MIN {
        return Err(StoreError::Unusable(format!(
            "SQLite {} is linked; 3.51.3 or newer is needed",
            rusqlite::version()
        )));
    }
    let database = dir.join(DATABASE);
    if let Some(reason) = presence::why_unusable(dir) {
        return Err(StoreError::Unusable(reason));
    }
    let in_database = |error: StoreError| error.in_database(&database);
    // A run that did not end in order leaves both; one that did, neither.
    let beside = |end: &str| dir.join(format!("{DATABASE}{end}")).exists();
    let lacks_log = beside("-shm") && !beside("-wal");
    migrate(&database, &settings).await?;
    let metrics = Metrics::new(clock.clone());
    let now = clock.now();
    let last_start = if lacks_lock { None } else { started_at(&lock) };
    let connection = writing_connection(&database, &settings).map_err(in_database)?;
    verify(&connection).map_err(in_database)?;
    let keys = Keys::load(&connection, now).map_err(in_database)?;
    let mut session = Session::new(connection, keys);
    let recovered = recovery::recover(&mut session, now, &settings).map_err(in_database)?;
    let (data_dir_id, is_new) = data_dir_id(&session.c)?;
    let learned = learned::load(&session.c).map_err(in_database)?;
    let served = recovery::load_served(&session.c).map_err(in_database)?;
    let controls = controls::load(&session.c).map_err(in_database)?;
    let next_number = recovery::next_number(&session.c).map_err(in_database)?;
    let next_batch = recovery::next_batch(&session.c).map_err(in_database)?;
    let file_bytes = session.c.query_row("SELECT coalesce(sum(bytes), 0) FROM file", [], |row| row.get::<_, i64>(0));
    let file_bytes = file_bytes.map_err(StoreError::from).map_err(in_database)?;
    let space = Space::new(dir, settings.free_min_bytes, settings.reserve_bytes);
    let files = Files::open(&dir.join("artifacts"), file_bytes.unsigned_abs(), space.clone())?;
    let (used, _) = quota::pages(&session.c).map_err(in_database)?;
    let bytes = quota::decide(&session.c, dir, &settings, used + files.stored_bytes())?;
    let quota = Quota::new(bytes, used, files.counter());
    // Files of the first release cannot give pages back.
    let gives_back = session.c.pragma_query_value(None, "auto_vacuum", |row| row.get::<_, i64>(0))? == 2;
    let live = Live::default();
    // Recovery has written, so all of them are there.
    let presence = Presence::of(&database, &lock)?;
    let parts = Parts {
        session,
        space: space.clone(),
        quota: quota.clone(),
        live: live.clone(),
        metrics: metrics.clone(),
        presence: presence.clone(),
        on_fatal,
        _lock: Some(lock.clone()),
    };
    let writer = Writer::start(parts)
        .map_err(|source| StoreError::File { path: "the store's writing thread".into(), source })?;
    let reader = if settings.exclusive {
        Reader::on_writer(&database, files.clone(), live, writer.clone())
    } else {
        Reader::on_threads(&database, files.clone(), live)?
    };
    metrics.recovered_in(begun.elapsed());
    metrics.rescued(recovered.jobs as u64);
    let store = Store {
        writer,
        reader,
        files,
        clock,
        metrics,
        quota,
        space,
        gives_back,
        presence,
        settings: Arc::new(settings),
        next_batch: Arc::new(AtomicI64::new(next_batch)),
        lock,
    };
    Ok(Opened {
        store,
        learned,
        served,
        controls,
        next_number,
        recovered: recovered.jobs,
        was_clean: recovered.was_clean,
        last_start,
        lacks_log: lacks_log && !recovered.was_clean,
        is_restored: is_new && recovered.epoch > 1,
        epoch: recovered.epoch,
        data_dir_id,
    })
}

/// The id of the data dir `dir`, which a server may be using: what its workers are marked with. Changes nothing.
pub fn data_dir_id_of(dir: &Path) -> Result<String, StoreError> {
    let c = Connection::open_with_flags(dir.join(DATABASE), OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    c.busy_timeout(Duration::from_secs(5))?;
    Ok(c.query_row("SELECT value FROM meta WHERE key = 'data_dir_id'", [], |row| row.get(0))?)
}

/// One server per data dir: an advisory lock that ends with the process.
pub(super) fn lock(dir: &Path) -> Result<File, StoreError> {
    let path = dir.join(LOCK);
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

/// When a run began last, by [`Store::note_start`].
fn started_at(lock: &File) -> Option<Millis> {
    let at = lock.metadata().ok()?.modified().ok()?;
    i64::try_from(at.duration_since(UNIX_EPOCH).ok()?.as_millis()).ok()
}

impl Store {
    /// Notes that a run begins now, for [`Opened::last_start`] and [`Opened::was_clean`] of the next one: after what the last
    /// run left behind has been ended and removed, and before anything is started. A start that fails before leaves both as
    /// they were, since what has not been removed yet dates from then.
    pub async fn note_start(&self) -> Result<(), StoreError> {
        let now = self.clock.now().unsigned_abs();
        if let Err(error) = self.lock.set_modified(UNIX_EPOCH + Duration::from_millis(now)) {
            tracing::debug!("the lock file cannot tell when this run began: {error}");
        }
        let settle = |session: &mut Session| {
            session.is_settled = true;
            Ok(())
        };
        answer(self.writer.apply(Kind::Change, 0, settle)).await
    }
}

async fn migrate(database: &Path, settings: &StorageSettings) -> Result<(), StoreError> {
    let mut options = SqliteConnectOptions::new()
        .filename(database)
        .create_if_missing(true)
        // Only a new file takes it: free pages are given back to the disk a few at a time.
        .auto_vacuum(SqliteAutoVacuum::Incremental)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full);
    if settings.exclusive {
        options = options.locking_mode(SqliteLockingMode::Exclusive);
    }
    let damaged = |error: String| {
        let is_damage = ["malformed", "not a database"].iter().any(|word| error.contains(word));
        let text = format!("{}: {error}", database.display());
        if is_damage { StoreError::Corrupt(text) } else { StoreError::Unusable(text) }
    };
    let pool = SqlitePoolOptions::new().max_connections(1).connect_with(options).await;
    let pool = pool.map_err(|error| damaged(error.to_string()))?;
    let migrated = MIGRATIONS.run(&pool).await;
    pool.close().await;
    migrated.map_err(|error| damaged(error.to_string()))
}

/// Looks at the database's structure: damage is better found now than by somebody's job. It takes 4 to 5 ms for each MiB.
fn verify(c: &Connection) -> Result<(), StoreError> {
    let pragma = |name| c.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
    let bytes = pragma("page_count")? * pragma("page_size")?;
    if bytes > CHECKED_BYTES_MAX {
        return Ok(());
    }
    let found: String = c.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
    if found == "ok" { Ok(()) } else { Err(StoreError::Corrupt(found)) }
}

fn writing_connection(database: &Path, settings: &StorageSettings) -> Result<Connection, StoreError> {
    let c = Connection::open_with_flags(database, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
    c.set_prepared_statement_cache_capacity(64);
    c.busy_timeout(Duration::from_secs(5))?;
    let synchronous = if settings.fsync { 2 } else { 1 };
    let locking = if settings.exclusive { "exclusive" } else { "normal" };
    // (name, value, value read back)
    let pragmas: [(&str, String, String); 9] = [
        ("locking_mode", locking.to_owned(), locking.to_owned()),
        ("journal_mode", "wal".to_owned(), "wal".to_owned()),
        ("synchronous", synchronous.to_string(), synchronous.to_string()),
        ("temp_store", "2".to_owned(), "2".to_owned()),
        ("cache_size", (-CACHE_KIB).to_string(), (-CACHE_KIB).to_string()),
        ("wal_autocheckpoint", settings.wal_pages.to_string(), settings.wal_pages.to_string()),
        ("journal_size_limit", settings.wal_bytes_kept.to_string(), settings.wal_bytes_kept.to_string()),
        ("trusted_schema", "0".to_owned(), "0".to_owned()),
        ("foreign_keys", "0".to_owned(), "0".to_owned()),
    ];
    for (name, value, _) in &pragmas {
        c.execute_batch(&format!("PRAGMA {name} = {value}"))?;
    }
    // Some settings are refused in silence: what counts is what SQLite says it does.
    for (name, _, expected) in &pragmas {
        let found = c.pragma_query_value(None, name, |row| row.get::<_, rusqlite::types::Value>(0))?;
        let found = match found {
            rusqlite::types::Value::Integer(n) => n.to_string(),
            rusqlite::types::Value::Text(text) => text,
            other => format!("{other:?}"),
        };
        if found != *expected {
            return Err(StoreError::Unusable(format!(
                "{}: the database's {name} is {found}, needed is {expected}; is it on a local disk?",
                database.display()
            )));
        }
    }
    Ok(c)
}

/// The id, and whether it had none: a new one, or a copy, which does not keep the original's.
fn data_dir_id(connection: &Connection) -> Result<(String, bool), StoreError> {
    let mut random = [0_u8; 8];
    getrandom::fill(&mut random).map_err(|error| StoreError::Unusable(format!("no random numbers: {error}")))?;
    let made = connection
        .execute("INSERT INTO meta (key, value) VALUES ('data_dir_id', ?1) ON CONFLICT DO NOTHING", [hex(&random)])?;
    let id = connection.query_row("SELECT value FROM meta WHERE key = 'data_dir_id'", [], |row| row.get(0))?;
    Ok((id, made == 1))
}
