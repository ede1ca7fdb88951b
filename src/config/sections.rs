//! `scheduler:` and `server:`, with their defaults and what the environment says.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use super::file::{At, File, MaxWait, Scheduler, Server, Storage, SwapBudget};
use super::units::{Period, Room, Share, Size, shown_period};
use super::{DEFAULT_LISTEN, Problems, ServerSettings};
use crate::domain::StorageSettings;
use crate::policy::Knobs;
use crate::policy::knobs::ParkRam;

/// Smallest useful limit of a request body.
const BODY_BYTES_MIN: u64 = 1024;
/// Largest sensible limit of a request body; bodies are held in memory.
const BODY_BYTES_MAX: u64 = 1 << 30;

const QUOTA_MIN: u64 = 1 << 20;
const WAL_PAGES_MIN: u32 = 100;

pub(super) fn scheduler(file: &File, problems: &mut Problems) -> Knobs {
    let usual = Knobs::default();
    let Some(section) = &file.scheduler else {
        return usual;
    };
    let Scheduler {
        max_wait,
        max_visit,
        swap_budget,
        park_ram,
        queued_max,
        queued_per_tenant_max,
        waiting_sync_max,
        ..
    } = section;
    let MaxWait { interactive, batch } = max_wait.as_ref().unwrap_or(&NO_WAIT);
    let budget = swap_budget.as_ref().unwrap_or(&NO_BUDGET);
    let mut section = Section { problems };
    Knobs {
        max_wait_interactive: section.period(
            "scheduler.max_wait.interactive",
            interactive.as_ref(),
            usual.max_wait_interactive,
        ),
        max_wait_batch: section.period("scheduler.max_wait.batch", batch.as_ref(), usual.max_wait_batch),
        max_visit: section.period("scheduler.max_visit", max_visit.as_ref(), usual.max_visit),
        swap_budget_interactive: section.share(
            "scheduler.swap_budget.interactive",
            budget.interactive.as_ref(),
            usual.swap_budget_interactive,
        ),
        swap_budget_other: section.share("scheduler.swap_budget.other", budget.other.as_ref(), usual.swap_budget_other),
        park_ram: section.room(park_ram.as_ref(), usual.park_ram),
        queued_max: section.count("scheduler.queued_max", queued_max.as_ref(), usual.queued_max),
        queued_per_tenant_max: section.count(
            "scheduler.queued_per_tenant_max",
            queued_per_tenant_max.as_ref(),
            usual.queued_per_tenant_max,
        ),
        waiting_sync_max: section.count(
            "scheduler.waiting_sync_max",
            waiting_sync_max.as_ref(),
            usual.waiting_sync_max,
        ),
    }
}

const NO_WAIT: MaxWait = MaxWait { interactive: None, batch: None };
const NO_BUDGET: SwapBudget = SwapBudget { interactive: None, other: None };

pub(super) fn server(file: &File, env: &dyn Fn(&str) -> Option<String>, problems: &mut Problems) -> ServerSettings {
    let nothing = Server::default();
    let given = file.server.as_ref().unwrap_or(&nothing);
    let usual = ServerSettings::default();
    let mut section = Section { problems };
    let listen = section.listen(given.listen.as_ref(), env);
    let mut period = |key: &str, at: &Option<At<Period>>, usual: Duration| {
        section.period(&format!("server.{key}"), at.as_ref(), usual)
    };
    let settings = ServerSettings {
        listen,
        public_url: None,
        sync_hop: period("sync_hop", &given.sync_hop, usual.sync_hop),
        sync_max_hops: given.sync_max_hops.as_ref().map_or(usual.sync_max_hops, |at| at.value),
        hop_grace: period("hop_grace", &given.hop_grace, usual.hop_grace),
        disconnect_grace: period("disconnect_grace", &given.disconnect_grace, usual.disconnect_grace),
        body_bytes_max: usual.body_bytes_max,
        worker_grace: period("worker_grace", &given.worker_grace, usual.worker_grace),
        load_limit: period("load_limit", &given.load_limit, usual.load_limit),
        backoff_first: period("backoff_first", &given.backoff_first, usual.backoff_first),
        backoff_max: period("backoff_max", &given.backoff_max, usual.backoff_max),
        shutdown_grace: period("shutdown_grace", &given.shutdown_grace, usual.shutdown_grace),
    };
    if let Some(at) = &given.backoff_max
        && settings.backoff_max < settings.backoff_first
    {
        let help = "server.backoff_max: must not be less than server.backoff_first";
        section.problems.add(at.line, help);
    }
    ServerSettings {
        body_bytes_max: section.body(given.body_bytes_max.as_ref(), usual.body_bytes_max),
        public_url: section.public_url(given, env, settings.listen.as_deref()),
        ..settings
    }
}

pub(super) fn storage(file: &File, dir: &Path, problems: &mut Problems) -> StorageSettings {
    let nothing = Storage::default();
    let given = file.storage.as_ref().unwrap_or(&nothing);
    let usual = StorageSettings::default();
    let mut section = Section { problems };
    let mut period = |key: &str, at: &Option<At<Period>>, usual: Duration| {
        section.period(&format!("storage.{key}"), at.as_ref(), usual)
    };
    let tombstone_ttl = period("tombstone_ttl", &given.tombstone_ttl, usual.tombstone_ttl);
    let settings = StorageSettings {
        results_ttl: period("results_ttl", &given.results_ttl, usual.results_ttl.min(tombstone_ttl)),
        sync_ttl: period("sync_ttl", &given.sync_ttl, usual.sync_ttl.min(tombstone_ttl)),
        batch_ttl: period("batch_ttl", &given.batch_ttl, usual.batch_ttl.min(tombstone_ttl)),
        tombstone_ttl,
        snapshot_dir: given.snapshot_dir.as_ref().map(|at| dir.join(&at.value)),
        snapshot_every: period("snapshot_every", &given.snapshot_every, usual.snapshot_every),
        quota_bytes: given.quota.as_ref().map(|at| at.value.0),
        free_min_bytes: given.free_min.as_ref().map_or(usual.free_min_bytes, |at| at.value.0),
        reserve_bytes: given.reserve.as_ref().map_or(usual.reserve_bytes, |at| at.value.0),
        wal_pages: given.wal_pages.as_ref().map_or(usual.wal_pages, |at| at.value),
        ..usual
    };
    for (key, at) in
        [("results_ttl", &given.results_ttl), ("sync_ttl", &given.sync_ttl), ("batch_ttl", &given.batch_ttl)]
    {
        let Some(At { line, value: Period(ttl) }) = at.as_ref().filter(|at| at.value.0 > tombstone_ttl) else {
            continue;
        };
        let is_usual = if given.tombstone_ttl.is_some() { "" } else { ", its default" };
        let (ttl, tombstone) = (shown_period(*ttl), shown_period(tombstone_ttl));
        section.problems.add(
            *line,
            format!(
                "storage.{key}: {ttl} is longer than storage.tombstone_ttl ({tombstone}{is_usual}), after which the job \
                 itself is deleted; raise tombstone_ttl, or lower {key}"
            ),
        );
    }
    if let Some(at) = given.quota.as_ref().filter(|at| at.value.0 < QUOTA_MIN) {
        section.problems.add(at.line, "storage.quota: must be at least 1MiB");
    }
    if let Some(at) = given.wal_pages.as_ref().filter(|at| at.value < WAL_PAGES_MIN) {
        section.problems.add(at.line, "storage.wal_pages: must be at least 100");
    }
    settings
}

pub(super) fn weights(file: &File, problems: &mut Problems) -> BTreeMap<String, f64> {
    let mut weights = BTreeMap::new();
    for (name, tenant) in file.tenants.iter().flatten() {
        let Some(at) = &tenant.weight else { continue };
        if !(at.value > 0.0 && at.value.is_finite()) {
            problems.add(at.line, format!("tenants.{name}.weight: must be a number more than 0"));
        }
        weights.insert(name.clone(), at.value);
    }
    weights
}

pub(super) fn gpu_hourly_cost(file: &File, problems: &mut Problems) -> Option<f64> {
    let at = file.scheduler.as_ref()?.gpu_hourly_cost.as_ref()?;
    if !(at.value >= 0.0 && at.value.is_finite()) {
        problems.add(at.line, "scheduler.gpu_hourly_cost: must be a number, 0 or more, as 2.49");
    }
    Some(at.value)
}

struct Section<'a> {
    problems: &'a mut Problems,
}

impl Section<'_> {
    fn period(&mut self, key: &str, at: Option<&At<Period>>, usual: Duration) -> Duration {
        let Some(at) = at else { return usual };
        if at.value.0.is_zero() {
            self.problems.add(at.line, format!("{key}: must be more than 0"));
        }
        at.value.0
    }

    fn share(&mut self, key: &str, at: Option<&At<Share>>, usual: f64) -> f64 {
        let Some(at) = at else { return usual };
        if !(at.value.0 > 0.0 && at.value.0 < 1.0) {
            let help = format!("{key}: must lie between 0 and 1, as 0.5 or 50% do");
            self.problems.add(at.line, help);
        }
        at.value.0
    }

    fn room(&mut self, at: Option<&At<Room>>, usual: ParkRam) -> ParkRam {
        let Some(at) = at else { return usual };
        if matches!(at.value.0, ParkRam::Share(share) if share > 1.0) {
            self.problems.add(at.line, "scheduler.park_ram: must be at most 100%; write 60% or 64GiB");
        }
        at.value.0
    }

    fn count(&mut self, key: &str, at: Option<&At<usize>>, usual: usize) -> usize {
        let Some(at) = at else { return usual };
        if at.value == 0 {
            self.problems.add(at.line, format!("{key}: must be at least 1"));
        }
        at.value
    }

    fn body(&mut self, at: Option<&At<Size>>, usual: usize) -> usize {
        let Some(at) = at else { return usual };
        let bytes = at.value.0;
        if !(BODY_BYTES_MIN..=BODY_BYTES_MAX).contains(&bytes) {
            let help = "server.body_bytes_max: must lie between 1KiB and 1GiB";
            self.problems.add(at.line, help);
        }
        usize::try_from(bytes).unwrap_or(usual)
    }

    fn listen(&mut self, at: Option<&At<String>>, env: &dyn Fn(&str) -> Option<String>) -> Option<String> {
        if let Some(listen) = set(env, "ROUNDHOUSE_LISTEN") {
            if port_of(&listen).is_none() {
                self.problems.add_outside(format!("--listen or ROUNDHOUSE_LISTEN: `{listen}` {LISTEN_HELP}"));
            }
            return Some(listen);
        }
        let at = at?;
        if port_of(&at.value).is_none() {
            self.problems.add(at.line, format!("server.listen: `{}` {LISTEN_HELP}", at.value));
        }
        Some(at.value.clone())
    }

    fn public_url(
        &mut self,
        given: &Server,
        env: &dyn Fn(&str) -> Option<String>,
        listen: Option<&str>,
    ) -> Option<String> {
        let file = given.public_url.as_ref();
        let (name, line, url) = match (set(env, "ROUNDHOUSE_PUBLIC_URL"), file) {
            (Some(url), _) => ("ROUNDHOUSE_PUBLIC_URL", None, url),
            (None, Some(at)) => ("server.public_url", Some(at.line), at.value.clone()),
            (None, None) => return runpod_url(env, listen),
        };
        let url = url.trim_end_matches('/').to_owned();
        let host = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://"));
        if host.is_none_or(str::is_empty) || url.contains(char::is_whitespace) {
            let help = format!("{name}: `{url}` is no address; write https://host");
            match line {
                Some(line) => self.problems.add(line, help),
                None => self.problems.add_outside(help),
            }
        }
        Some(url)
    }
}

const LISTEN_HELP: &str = "is no address to listen on; write HOST:PORT, as 127.0.0.1:9000";

/// A RunPod pod is reached through its proxy, one host name per port.
fn runpod_url(env: &dyn Fn(&str) -> Option<String>, listen: Option<&str>) -> Option<String> {
    let pod = set(env, "RUNPOD_POD_ID")?;
    let port = port_of(listen.unwrap_or(DEFAULT_LISTEN)).filter(|port| *port != 0)?;
    Some(format!("https://{pod}-{port}.proxy.runpod.net"))
}

fn port_of(listen: &str) -> Option<u16> {
    let (host, port) = listen.rsplit_once(':')?;
    if host.is_empty() || host.contains('/') {
        return None;
    }
    port.parse().ok()
}

/// An environment variable that is set and not empty.
fn set(env: &dyn Fn(&str) -> Option<String>, name: &str) -> Option<String> {
    env(name).filter(|value| !value.trim().is_empty())
}
