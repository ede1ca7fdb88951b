//! Composition root: builds everything, connects it, and runs until shutdown. The only module that knows all others.

mod reload;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::net::{TcpListener, TcpSocket};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use crate::clock::{Clock, FastClock, SystemClock};
use crate::config::{Config, ServerSettings};
use crate::domain::storage::shown_bytes;
use crate::domain::{ModelSpec, StorageSettings};
use crate::http::auth::ApiKeys;
use crate::http::{self, AppState};
use crate::lifecycle::Tasks;
use crate::scheduler::handle::{Handle, Workers};
use crate::scheduler::run::{self, Parts, StartWorker};
use crate::store;
use crate::store::backup::Held;
use crate::store::placement::{self, FileSystem, FileSystems};
use crate::store::restore::Verified;
use crate::store::snapshots::{self, Durability, Prepared, Snapshots};
use crate::worker::client::WorkerClient;
use crate::worker::fetching::Fetches;
use crate::worker::gpu::{self, GpuProbe};
use crate::worker::host;
use crate::worker::spare::Spares;
use crate::worker::supervisor::{self, StuckMemory, Surroundings, Tempo, WorkerHandle};

/// How long tasks may take to end after the hard stage, beyond the workers' own grace.
const HARD_LIMIT: Duration = Duration::from_secs(5);
/// Longest wait for the driver to give back the memory of an earlier run's workers.
const MEMORY_SETTLES_WITHIN: Duration = Duration::from_secs(10);
/// Connections that may wait to be accepted.
const BACKLOG: u32 = 4_096;
/// Time for answers on the wire to be written after the last running job has ended.
const FLUSH: Duration = Duration::from_millis(250);

/// What `serve` was asked for, flags, environment and file already weighed.
#[derive(Debug)]
pub struct Serve {
    /// From `models.yaml`.
    pub config: Config,
    /// Database, artifacts, logs.
    pub data_dir: PathBuf,
    /// Address to listen on.
    pub listen: String,
    /// Whether the data dir may lie on a network file system.
    pub allow_network_fs: bool,
}

/// Runs the server until it is told to stop. Says whether it ended well.
pub async fn serve(serve: Serve) -> anyhow::Result<bool> {
    let Serve { mut config, data_dir, listen, allow_network_fs } = serve;
    let tasks = Tasks::new();
    let clock = clock()?;
    let listener = listen_on(&listen).await.map_err(|error| anyhow::anyhow!(not_listening(&listen, &error)))?;
    let address = listener.local_addr().context("the address that is listened on cannot be told")?;
    let on_fatal = {
        let tasks = tasks.clone();
        Arc::new(move |reason: &str| tasks.fail(reason))
    };
    let file_system = place_data_dir(&data_dir, &mut config.storage, allow_network_fs)?;
    let held = prepare_snapshots(&data_dir, &config.storage).await?;
    let opened = store::open(&data_dir, clock.clone(), config.storage.clone(), on_fatal)
        .await
        .with_context(|| no_data_dir(&data_dir))?;
    let settings = || {
        let snapshots = open_snapshots(&data_dir, &config.storage, held, &clock)?;
        Ok((snapshots, gpus()?, given_keys()?))
    };
    let (snapshots, gpus, given_keys) = match settings() {
        Ok(settings) => settings,
        Err(error) => {
            // A start that is refused is no run that broke off. One that did before it is the next start's matter.
            if let Err(error) = opened.store.close().await {
                tracing::warn!("the database was not closed in order: {error}");
            }
            return Err(error);
        }
    };
    let broke_off = (!opened.was_clean).then_some(opened.last_start).flatten();
    let orphans = supervisor::end_orphans(&opened.data_dir_id, config.server.worker_grace, broke_off).await;
    opened.store.note_start().await?;
    if orphans > 0 {
        tracing::warn!(orphans, "ended {orphans} processes that an earlier run left behind");
        // Memory is free when the driver says so.
        gpu::settled(gpus.clone(), MEMORY_SETTLES_WITHIN).await;
    }
    if opened.is_restored {
        tracing::warn!("restored from a backup: what was accepted or finished after it was taken is not in it");
    } else if opened.lacks_log {
        tracing::error!(
            "the last run did not end in order, and its log (roundhouse.db-wal) is gone: what was accepted last may be lost; if \
             you have that file, stop this server and put it back before anything else is written"
        );
    } else if opened.epoch > 1 && !opened.was_clean {
        tracing::warn!("the last run did not end in order; nothing that was accepted is lost");
    }
    if opened.recovered > 0 {
        tracing::warn!(
            jobs = opened.recovered,
            "{} when {}; what ran then waits again",
            if opened.recovered == 1 { "1 job ran".to_owned() } else { format!("{} jobs ran", opened.recovered) },
            if opened.is_restored { "the backup was taken" } else { "the last run ended" }
        );
    }
    let keys = api_keys(given_keys, &data_dir, address.ip().is_loopback())?;
    let around = surroundings(&config, &data_dir, &opened.data_dir_id, &clock, gpus.clone(), &tasks)?;
    let (workers, start_worker, reports) = start_workers(&config, &around);
    let spares = around.spares.clone();
    let fetches = Fetches::start(&config.models, around).await;
    let reader = opened.store.reader().clone();
    let live_sync_jobs = reader.live_sync_jobs().await?;
    let store = opened.store.clone();
    let handle = run::start(Parts {
        store: opened.store,
        clock: clock.clone(),
        tasks: tasks.clone(),
        client: WorkerClient::new(),
        models: config.models.clone(),
        knobs: config.scheduler.clone(),
        workers,
        start_worker,
        spares,
        reports,
        fetches,
        epoch: opened.epoch,
        learned: opened.learned,
        served: opened.served,
        weights: config.weights.clone(),
        controls: opened.controls,
        gpus,
        cpu_bytes: host::memory_bytes(),
        park_bytes: config.scheduler.park_ram.of(host::memory_bytes()),
        next_number: opened.next_number,
    })
    .await?;
    tasks.spawn("housekeeping", store.clone().keep_house(tasks.soft().clone()));
    tasks.spawn("files", store.clone().watch_files(tasks.hard().clone()));
    warn_of_little_memory(&config);
    let waiting = handle.queue().queued;
    stop_when_drained(&tasks, &handle);
    let follower = handle.clone();
    let state = AppState::new(http::Parts {
        handle,
        reader,
        models: config.models.clone(),
        server: config.server.clone(),
        waiting_sync_max: config.scheduler.waiting_sync_max,
        keys,
        tasks: tasks.clone(),
        clock,
        url_secret: secret(&data_dir)?,
        durability: Durability {
            file_system: Some(file_system),
            lazy: !config.storage.fsync,
            snapshots: snapshots.clone(),
        },
        gpu_hourly_cost: config.gpu_hourly_cost,
    });
    for id in live_sync_jobs {
        state.expect_hop(id);
    }
    let follower = reload::Follower::new(config.clone(), follower, state.clone());
    tasks.spawn("models.yaml", follower.run(tasks.clone()));
    announce(address, config.models.len(), waiting)?;
    let server = http::serve(listener, http::router(state), tasks.clone());
    tasks.spawn("http", server);
    if let Some(snapshots) = &snapshots {
        tasks.spawn("snapshots", snapshots.clone().run(tasks.soft().clone()));
    }
    wait_for_end(&tasks, &config.server).await?;
    let is_kept = last_snapshot(snapshots).await;
    if let Err(error) = store.close().await {
        tracing::warn!("the database was not closed in order: {error}");
    }
    Ok(is_kept && !tasks.has_failed())
}

/// The system's clock, or the fast one that `replay` asks for.
fn clock() -> anyhow::Result<Arc<dyn Clock>> {
    let Ok(factor) = std::env::var("ROUNDHOUSE_CLOCK_FACTOR") else {
        return Ok(Arc::new(SystemClock::default()));
    };
    let clock = FastClock::parse(&factor).map_err(|error| anyhow::anyhow!("ROUNDHOUSE_CLOCK_FACTOR: {error}"))?;
    tracing::warn!(
        "ROUNDHOUSE_CLOCK_FACTOR: the clock goes {} times too fast; for replays and tests only, never for real jobs",
        clock.pace()
    );
    Ok(Arc::new(clock))
}

async fn again(signal: &mut Option<Signal>) -> Option<()> {
    signal.as_mut()?.recv().await
}

/// Refuses a data dir where a database would not be safe, and warns of what else there is to know.
fn place_data_dir(
    data_dir: &Path,
    storage: &mut StorageSettings,
    allow_network_fs: bool,
) -> anyhow::Result<FileSystem> {
    let setting = std::env::var("ROUNDHOUSE_STATFS").ok();
    let file_systems =
        FileSystems::from_setting(setting.as_deref()).map_err(|error| anyhow::anyhow!("ROUNDHOUSE_STATFS: {error}"))?;
    let placement = placement::place(data_dir, storage.snapshot_dir.as_deref(), allow_network_fs, &file_systems)
        .with_context(|| no_data_dir(data_dir))?;
    if let Some(warning) = placement.warning {
        tracing::warn!("{warning}");
    }
    storage.exclusive |= placement.exclusive;
    Ok(placement.file_system)
}

/// Where the data dir has no database and the snapshot folder has a backup, that is where we go on. Keeps the folder.
async fn prepare_snapshots(data_dir: &Path, storage: &StorageSettings) -> anyhow::Result<Option<Held>> {
    let Some(folder) = storage.snapshot_dir.clone() else {
        return Ok(None);
    };
    let data = data_dir.to_owned();
    let shown = folder.display().to_string();
    let prepared = tokio::task::spawn_blocking(move || snapshots::prepare(&data, &folder)).await?;
    let Prepared { held, restored } = prepared.with_context(|| {
        format!("{} cannot go on with the snapshots in {shown} (--snapshot-dir)", data_dir.display())
    })?;
    if let Some(Verified { manifest, files, .. }) = restored {
        let jobs: u64 = manifest.jobs.values().sum();
        tracing::warn!(
            jobs,
            files = files.files,
            "{} had no database: restored the snapshot of {} from {shown}",
            data_dir.display(),
            manifest.created_at
        );
    }
    Ok(held)
}

fn open_snapshots(
    data_dir: &Path,
    storage: &StorageSettings,
    held: Option<Held>,
    clock: &Arc<dyn Clock>,
) -> anyhow::Result<Option<Snapshots>> {
    let Some(folder) = &storage.snapshot_dir else {
        return Ok(None);
    };
    let every = storage.snapshot_every;
    let snapshots = Snapshots::open(data_dir, folder, held, every, clock.clone())
        .with_context(|| format!("no snapshots can be kept in {} (--snapshot-dir)", folder.display()))?;
    tracing::info!(
        "snapshots go to {} every {} s and at the end: if the data dir's disk is lost, so are the jobs and results of up to {} s",
        folder.display(),
        every.as_secs_f64(),
        every.as_secs_f64()
    );
    Ok(Some(snapshots))
}

/// What was accepted and finished since the last snapshot. Says whether it is safe.
async fn last_snapshot(snapshots: Option<Snapshots>) -> bool {
    let Some(snapshots) = snapshots else {
        return true;
    };
    let mut terminate = signal(SignalKind::terminate()).ok();
    let mut interrupt = signal(SignalKind::interrupt()).ok();
    let taken = tokio::select! {
        taken = snapshots.take() => taken,
        // Its volume may have gone away, and then it would never end.
        Some(()) = again(&mut terminate) => Err("another signal came first".to_owned()),
        Some(()) = again(&mut interrupt) => Err("another signal came first".to_owned()),
    };
    match taken {
        Ok(()) => tracing::info!("the last snapshot holds everything"),
        Err(reason) => {
            tracing::error!("the last snapshot could not be taken, the data dir has what it lacks: {reason}");
            return false;
        }
    }
    true
}

/// A listener on the first address of `listen` that can be had, with room for a burst of callers.
async fn listen_on(listen: &str) -> std::io::Result<TcpListener> {
    let mut failed = std::io::Error::new(std::io::ErrorKind::InvalidInput, "the name has no address");
    for address in tokio::net::lookup_host(listen).await? {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        socket.set_reuseaddr(true)?;
        match socket.bind(address).and_then(|()| socket.listen(BACKLOG)) {
            Ok(listener) => return Ok(listener),
            Err(error) => failed = error,
        }
    }
    Err(failed)
}

/// Why nobody can listen there, and what to do.
fn not_listening(listen: &str, error: &std::io::Error) -> String {
    use std::io::ErrorKind::{AddrInUse, AddrNotAvailable, PermissionDenied};
    let what_to_do = match error.kind() {
        AddrInUse => {
            "another program, perhaps another roundhouse, listens there: stop it (`ss -ltnp` shows which it is), or choose \
             another port with --listen HOST:PORT"
        }
        AddrNotAvailable => "this machine does not have that address; 0.0.0.0:PORT listens on all that it has",
        PermissionDenied => "ports below 1024 are not for everybody; choose another with --listen HOST:PORT",
        _ => "write HOST:PORT, as 127.0.0.1:9000",
    };
    format!("cannot listen on {listen} (--listen, ROUNDHOUSE_LISTEN or server.listen): {error}; {what_to_do}")
}

/// What comes before the reason.
fn no_data_dir(data_dir: &Path) -> String {
    format!("{} cannot be the data dir (--data-dir)", data_dir.display())
}

fn gpus() -> anyhow::Result<Arc<dyn GpuProbe>> {
    let (fake, probe) = (std::env::var("ROUNDHOUSE_FAKE_GPUS").ok(), std::env::var("ROUNDHOUSE_GPU_PROBE").ok());
    let visible = std::env::var("CUDA_VISIBLE_DEVICES").ok();
    gpu::from_environment(fake.as_deref(), probe.as_deref(), visible).map_err(anyhow::Error::msg)
}

/// Those of the environment; `None`: it has none.
fn given_keys() -> anyhow::Result<Option<ApiKeys>> {
    let text = std::env::var("ROUNDHOUSE_API_KEYS").ok().filter(|text| !text.trim().is_empty());
    let parse = |text: String| ApiKeys::parse(&text).map_err(|error| anyhow::anyhow!("ROUNDHOUSE_API_KEYS: {error}"));
    text.map(parse).transpose()
}

fn api_keys(given: Option<ApiKeys>, data_dir: &Path, loopback: bool) -> anyhow::Result<ApiKeys> {
    match given {
        Some(keys) => Ok(keys),
        None if loopback => Ok(ApiKeys::none()),
        None => {
            let path = data_dir.join("api_key");
            ApiKeys::generated(&path).with_context(|| format!("no API key can be kept in {}", path.display()))
        }
    }
}

type Supervised = (Workers, StartWorker, mpsc::UnboundedReceiver<(String, u32, crate::domain::worker::Report)>);

/// What all that start processes share.
fn surroundings(
    config: &Config,
    data_dir: &Path,
    data_dir_id: &str,
    clock: &Arc<dyn Clock>,
    gpus: Arc<dyn GpuProbe>,
    tasks: &Tasks,
) -> anyhow::Result<Surroundings> {
    let mut around = Surroundings {
        clock: clock.clone(),
        gpus,
        tasks: tasks.clone(),
        data_dir_id: data_dir_id.to_owned(),
        log_dir: data_dir.join("log"),
        program: std::env::current_exe().context("cannot find this program's own file")?,
        grace: config.server.worker_grace,
        backoff_first: config.server.backoff_first,
        backoff_max: config.server.backoff_max,
        stuck: StuckMemory::default(),
        spares: Spares::default(),
    };
    around.spares = Spares::start(&config.models, &around);
    Ok(around)
}

fn start_workers(config: &Config, around: &Surroundings) -> Supervised {
    let (sender, reports) = mpsc::unbounded_channel();
    let tempo = Tempo { load_limit_min: config.server.load_limit, ..Tempo::default() };
    let around = around.clone();
    let start: StartWorker = Arc::new(move |spec: &ModelSpec, replica| {
        WorkerHandle::start_with(spec.clone(), replica, around.clone(), tempo.clone(), sender.clone())
    });
    let all = config.models.iter().flat_map(|spec| (0..spec.max_replicas.max(1)).map(move |replica| (spec, replica)));
    let workers = all.map(|(spec, replica)| ((spec.name.clone(), replica), start(spec, replica))).collect();
    (workers, start, reports)
}

/// Parked models that this machine has no memory for would be killed by it.
fn warn_of_little_memory(config: &Config) {
    let memory = host::memory_bytes();
    let parks = config.models.iter().any(|model| model.park.is_on());
    if parks && config.scheduler.park_ram.of(memory) > memory {
        tracing::warn!(
            "scheduler.park_ram is more than the {} that this machine has; lower it, or parked models will be killed",
            shown_bytes(memory)
        );
    }
}

/// Once nothing runs any more, there is no reason to wait for the grace period's end.
fn stop_when_drained(tasks: &Tasks, handle: &Handle) {
    let (handle, hard) = (handle.clone(), tasks.hard().clone());
    tasks.spawn("drain", async move {
        tokio::select! {
            () = handle.drained() => tokio::time::sleep(FLUSH).await,
            () = hard.cancelled() => {}
        }
        hard.cancel();
    });
}

/// The one line that says the server accepts requests.
fn announce(address: std::net::SocketAddr, models: usize, waiting: usize) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    let counted = |count: usize, what: &str| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
    let (models, waiting) = (counted(models, "model"), counted(waiting, "job"));
    writeln!(out, "roundhouse listening on http://{address} ({models}, {waiting} waiting)")?;
    out.flush()
}

async fn wait_for_end(tasks: &Tasks, server: &ServerSettings) -> anyhow::Result<()> {
    tasks.run_until_signalled(server.shutdown_grace).await?;
    tasks.hard().cancel();
    let limit = server.worker_grace + HARD_LIMIT;
    if !tasks.wait(limit).await {
        tracing::warn!("some tasks did not end within {} s", limit.as_secs());
    }
    tracing::info!("stopped");
    Ok(())
}

/// Signs artifact URLs; made once per data dir, readable by its owner only.
fn secret(data_dir: &Path) -> anyhow::Result<[u8; 32]> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let path = data_dir.join("url_secret");
    let mut secret = [0_u8; 32];
    match std::fs::read(&path) {
        Ok(bytes) if bytes.len() == secret.len() => secret.copy_from_slice(&bytes),
        _ => {
            getrandom::fill(&mut secret).map_err(|error| anyhow::anyhow!("no random numbers: {error}"))?;
            let mut file = std::fs::OpenOptions::new()
                .create(true)
                .truncate(true)
                .write(true)
                .mode(0o600)
                .open(&path)
                .with_context(|| format!("cannot write {}", path.display()))?;
            file.write_all(&secret).with_context(|| format!("cannot write {}", path.display()))?;
        }
    }
    Ok(secret)
}
