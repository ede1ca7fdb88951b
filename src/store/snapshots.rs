//! Copies of the jobs on a disk that stays, for a data dir whose own disk goes with the pod: a backup every so often and at
//! the end, and the last one restored where there is no database yet.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::Serialize;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::backup::{self, Destination, Held};
use super::open::DATABASE;
use super::placement::FileSystem;
use super::restore::{self, Verified};
use super::writer::lock;
use super::{StoreError, Trouble};
use crate::clock::{Clock, rfc3339};
use crate::domain::Millis;

/// How often it is said that snapshots still fail.
const SAY_EVERY: Duration = Duration::from_secs(300);

/// Takes snapshots of one data dir. Cheap to clone.
#[derive(Clone)]
pub struct Snapshots {
    shared: Arc<Shared>,
}

struct Shared {
    every: Duration,
    clock: Arc<dyn Clock>,
    taking: Mutex<Taking>,
    last: Mutex<Last>,
}

/// One at a time.
struct Taking {
    destination: Destination,
    /// What the database's version was before the last snapshot; `None`: it lacks files, which may be put back.
    version: Option<i64>,
    /// Files that it lacks, and that the log has named.
    told: Vec<String>,
}

#[derive(Clone, Debug, Default)]
struct Last {
    at: Option<Millis>,
    failed: Option<String>,
}

/// What was done before the start of a server.
#[derive(Debug, Default)]
pub struct Prepared {
    /// Keeps others from the folder of snapshots, if there are any; for [`Snapshots::open`].
    pub held: Option<Held>,
    /// The snapshot that the data dir was made of.
    pub restored: Option<Verified>,
}

/// Before the start of a server: keeps others from `folder`, and restores the backup in it if the data dir has no database.
/// Another server's folder is an error before anything is restored; so is an unreadable backup: an empty server would
/// overwrite it. Blocks.
pub fn prepare(data_dir: &Path, folder: &Path) -> Result<Prepared, StoreError> {
    let held = Held::of(folder)?;
    if data_dir.join(DATABASE).exists() || !backup::is_backup(folder) {
        return Ok(Prepared { held, restored: None });
    }
    // What lies there may have more than the last snapshot.
    if let Some(reason) = super::presence::why_unusable(data_dir) {
        return Err(StoreError::Unusable(reason));
    }
    let restored = restore::restore(folder, data_dir, false, &mut |_| {})?;
    Ok(Prepared { held, restored: Some(restored) })
}

impl Snapshots {
    /// Snapshots of `data_dir`, which has a database, into `folder`; `held`: what [`prepare`] has returned.
    pub fn open(
        data_dir: &Path,
        folder: &Path,
        held: Option<Held>,
        every: Duration,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, StoreError> {
        let destination = Destination::open(data_dir, folder, held)?;
        let taking = Taking { destination, version: None, told: Vec::new() };
        let shared = Shared { every, clock, taking: Mutex::new(taking), last: Mutex::default() };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Takes one now and then every so often, until `stop`. One that is being taken then goes on by itself.
    pub async fn run(self, stop: CancellationToken) {
        let mut said = Said::default();
        loop {
            let round = async {
                match self.take().await {
                    Ok(()) if said.works() => tracing::info!("snapshots are taken again"),
                    Err(reason) if said.fails() => {
                        tracing::error!("no snapshot could be taken, the last good one stays: {reason}");
                    }
                    Ok(()) | Err(_) => {}
                }
                tokio::time::sleep(self.shared.every).await;
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = round => {}
            }
        }
    }

    /// Takes a snapshot, unless nothing has changed since the last one. Not on a thread of the runtime, whose end would wait
    /// for a network file system that has gone away.
    pub async fn take(&self) -> Result<(), String> {
        let (reply, taken) = oneshot::channel();
        let shared = self.shared.clone();
        let thread = std::thread::Builder::new().name("snapshot".into()).spawn(move || drop(reply.send(shared.take())));
        thread.map_err(|error| format!("no thread: {error}"))?;
        taken.await.unwrap_or_else(|_| Err("the snapshot's thread panicked".to_owned()))
    }

    fn view(&self, now: Millis) -> SnapshotView {
        let last = lock(&self.shared.last).clone();
        SnapshotView {
            every_s: self.shared.every.as_secs_f64(),
            last_at: last.at.map(rfc3339),
            last_age_s: last.at.map(|at| (now - at).max(0) / 1_000),
            failed: last.failed,
        }
    }
}

/// What the log says of failures: that they begin, now and then that they go on, and that they end.
#[derive(Debug, Default)]
struct Said {
    at: Option<Instant>,
}

impl Said {
    /// It failed; whether that is to be said.
    fn fails(&mut self) -> bool {
        let is_due = self.at.is_none_or(|at| at.elapsed() >= SAY_EVERY);
        if is_due {
            self.at = Some(Instant::now());
        }
        is_due
    }

    /// It did not fail; whether that is to be said.
    fn works(&mut self) -> bool {
        self.at.take().is_some()
    }
}

impl Shared {
    fn take(&self) -> Result<(), String> {
        let mut taking = lock(&self.taking);
        let (at, begun) = (self.clock.now(), Instant::now());
        let taken = taking.take(self.clock.as_ref()).map_err(|error| error.to_string());
        let mut last = lock(&self.last);
        match &taken {
            Ok(done) => {
                *last = Last { at: Some(at), failed: None };
                if let Some(done) = done {
                    tracing::info!(
                        took_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
                        database_bytes = done.manifest.database_bytes,
                        copied = done.copied.files,
                        "snapshot taken"
                    );
                    taking.tell_lost(done);
                }
            }
            Err(reason) => last.failed = Some(reason.clone()),
        }
        taken.map(drop)
    }
}

impl Taking {
    /// Once for the same files: snapshots go on without them.
    fn tell_lost(&mut self, done: &backup::Done) {
        if self.told != done.manifest.damaged && !done.lost.is_empty() {
            let names = super::lost::listed(done.lost.iter().map(ToString::to_string));
            tracing::error!(
                files = done.lost.len(),
                "files of jobs are lost or damaged, so they are not in the snapshots: {}",
                names.join("; ")
            );
        }
        self.told.clone_from(&done.manifest.damaged);
    }

    fn take(&mut self, clock: &dyn Clock) -> Result<Option<backup::Done>, StoreError> {
        let version: i64 = self.destination.live().pragma_query_value(None, "data_version", |row| row.get(0))?;
        if self.version == Some(version) {
            return Ok(None);
        }
        // A file that was lost earlier must not keep all others from being saved.
        let done = self.destination.back_up(clock, true, &mut |_| {})?;
        // A file that is put back changes no row.
        self.version = done.lost.is_empty().then_some(version);
        Ok(Some(done))
    }
}

/// How safe accepted jobs are, as `GET /health` tells. Cheap to clone.
#[derive(Clone, Default)]
pub struct Durability {
    /// Where the data dir lies, if that is known.
    pub file_system: Option<FileSystem>,
    /// Whether commits do not wait for the disk.
    pub lazy: bool,
    /// Copies on another disk.
    pub snapshots: Option<Snapshots>,
}

/// `storage` in `GET /health`.
#[derive(Clone, Debug, Serialize)]
pub struct DurabilityView {
    /// `fsync`: what was accepted is on the data dir's disk. `snapshot`: that disk may go, its copies stay. `none`: commits do
    /// not wait for the disk.
    pub durability: &'static str,
    /// Age of the newest jobs that the loss of the machine may take along.
    pub loss_window_s: f64,
    /// Where the data dir lies.
    pub file_system: Option<String>,
    /// Whether that outlives the pod or container.
    pub persistent: Option<bool>,
    /// With `durability: snapshot`.
    pub snapshot: Option<SnapshotView>,
}

/// The copies on another disk.
#[derive(Clone, Debug, Serialize)]
pub struct SnapshotView {
    /// How often one is taken.
    pub every_s: f64,
    /// When the last good one was begun, or when it was last seen that nothing has changed since.
    pub last_at: Option<String>,
    /// How long ago that was.
    pub last_age_s: Option<i64>,
    /// Why the last try failed; `None`: it did not.
    pub failed: Option<String>,
}

impl Durability {
    /// What is wrong with the copies at `now`. In words without paths.
    pub fn trouble(&self, now: Millis) -> Option<Trouble> {
        let snapshot = self.snapshots.as_ref()?.view(now);
        snapshot.failed?;
        let last = snapshot.last_age_s.map_or_else(
            || "there has been none since the server started".to_owned(),
            |age| format!("the last good one is {age} s old"),
        );
        let reason =
            format!("snapshots fail, {last}: what came since is lost with the data dir's disk; the log says why");
        Some(Trouble { state: "snapshots_fail", reason })
    }

    /// As it is now.
    pub fn view(&self, now: Millis) -> DurabilityView {
        let snapshot = self.snapshots.as_ref().map(|snapshots| snapshots.view(now));
        let loss_window_s = snapshot.as_ref().map_or(0.0, |snapshot| {
            #[expect(clippy::cast_precision_loss, reason = "ages are far below 2^52 s")]
            let age = snapshot.last_age_s.unwrap_or(0) as f64;
            // While snapshots fail, the window grows.
            if snapshot.failed.is_some() { age.max(snapshot.every_s) } else { snapshot.every_s }
        });
        DurabilityView {
            durability: match (&snapshot, self.lazy) {
                (Some(_), _) => "snapshot",
                (None, true) => "none",
                (None, false) => "fsync",
            },
            loss_window_s,
            file_system: self.file_system.as_ref().map(|found| found.name.to_string()),
            persistent: self.file_system.as_ref().map(FileSystem::is_persistent),
            snapshot,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn failures_are_said_when_they_begin_now_and_then_and_when_they_end() {
        let mut said = Said::default();
        assert!(!said.works(), "no news");
        assert!(said.fails());
        for _ in 0..4 {
            tokio::time::advance(SAY_EVERY / 5).await;
            assert!(!said.fails(), "it is known");
        }
        tokio::time::advance(SAY_EVERY / 5).await;
        assert!(said.fails(), "still");
        assert!(said.works() && !said.works());
        assert!(said.fails(), "again");
    }
}
