//! Follows edits of models.yaml while the server runs: looks at the file once a second, and at once on SIGHUP.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use tokio::signal::unix::{SignalKind, signal};

use crate::config::{self, Config};
use crate::http::AppState;
use crate::lifecycle::Tasks;
use crate::scheduler::handle::Handle;
use crate::scheduler::run::Reload;
use crate::worker::host;

const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What tells one state of a file from another: an editor may write it anew or put another in its place.
#[derive(Clone, PartialEq)]
struct Stamp(Option<(u64, u64, u64, Option<SystemTime>)>);

impl Stamp {
    async fn of(path: &Path) -> Self {
        use std::os::unix::fs::MetadataExt as _;
        let found = tokio::fs::metadata(path).await.ok();
        Self(found.map(|file| (file.dev(), file.ino(), file.len(), file.modified().ok())))
    }
}

/// Follows the file that `current` came from until the server stops.
pub(super) struct Follower {
    path: PathBuf,
    current: Config,
    /// As it is in the file, without the flags that win over it.
    in_file: Option<Config>,
    /// The last edit was refused.
    is_refused: bool,
    handle: Handle,
    state: AppState,
}

impl Follower {
    pub(super) fn new(current: Config, handle: Handle, state: AppState) -> Self {
        let path = current.path.clone();
        Self { in_file: load(&path).ok(), is_refused: false, path, current, handle, state }
    }

    pub(super) async fn run(mut self, tasks: Tasks) {
        let mut hangup = match signal(SignalKind::hangup()) {
            Ok(hangup) => hangup,
            Err(error) => return tracing::error!("edits of models.yaml are not followed: {error}"),
        };
        // Read once more soon: it may have been edited since it was read.
        let mut taken = Stamp(None);
        let mut seen = Stamp::of(&self.path).await;
        loop {
            let asked = tokio::select! {
                () = tasks.soft().cancelled() => return,
                _ = hangup.recv() => true,
                () = tokio::time::sleep(LOOK_EVERY) => false,
            };
            let now = Stamp::of(&self.path).await;
            // An editor may be in the middle of it: what has stopped changing is whole.
            let is_whole = std::mem::replace(&mut seen, now.clone()) == now;
            if asked || (is_whole && now != taken) {
                taken = now;
                self.reload().await;
            }
        }
    }

    async fn reload(&mut self) {
        let new = match load(&self.path) {
            Ok(new) => new,
            Err(error) => {
                tracing::error!("models.yaml was edited and is refused, what was read before stays in force:\n{error}");
                self.is_refused = true;
                return self.state.refuse_edit(&error.to_string());
            }
        };
        self.state.accept_edit();
        let was_refused = std::mem::take(&mut self.is_refused);
        if let Some(old) = &self.in_file {
            let sections = [
                ("server", old.server != new.server),
                ("storage", old.storage != new.storage),
                ("tenants", old.weights != new.weights),
            ];
            for (section, _) in sections.iter().filter(|(_, changed)| *changed) {
                tracing::warn!("models.yaml: `{section}:` was edited; that takes effect at the next start");
            }
        }
        let is_same = new.models == self.current.models
            && new.scheduler == self.current.scheduler
            && new.gpu_hourly_cost == self.current.gpu_hourly_cost;
        self.in_file = Some(new.clone());
        if is_same {
            if was_refused {
                tracing::info!("models.yaml is accepted again: its models are as they were before it was refused");
            }
            return;
        }
        let reload = Reload {
            models: new.models.clone(),
            park_bytes: new.scheduler.park_ram.of(host::memory_bytes()),
            knobs: new.scheduler.clone(),
        };
        if !self.handle.reload(reload).await {
            return; // The server stops.
        }
        // After the scheduler, which then knows each model that can be asked for.
        self.state.reload(new.models.clone(), new.scheduler.waiting_sync_max, new.gpu_hourly_cost);
        tracing::info!(models = new.models.len(), "models.yaml was edited: it is in force");
        (self.current.models, self.current.scheduler) = (new.models, new.scheduler);
        self.current.gpu_hourly_cost = new.gpu_hourly_cost;
    }
}

fn load(path: &Path) -> Result<Config, config::ConfigError> {
    config::load(path, &|name| std::env::var(name).ok())
}
