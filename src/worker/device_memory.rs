//! What a supervisor knows of the memory of its worker's GPUs, and when that is free again.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::arrivals::{Arrivals, OnItsWay};
use super::*;

/// Device memory that may stay in use after a stop, in bytes: other programs come and go.
const MEMORY_SLACK_BYTES: u64 = 1 << 30;

impl Supervisor {
    /// What a worker says of its memory; whoever plays the driver takes it from there.
    pub(super) fn note_memory(&self, running: &mut Running, memory: Memory) {
        self.note_host(running, memory.host);
        let device_bytes = memory.device_bytes;
        if let Some(bytes) = device_bytes.filter(|_| self.spec.gpus > 0) {
            self.hold(running, bytes);
        }
        running.own = device_bytes.or(running.own);
        self.view.send_if_modified(|v| std::mem::replace(&mut v.device_bytes, running.own) != running.own);
    }

    /// What it says of its copy in host memory: reported when it is another than before.
    pub(super) fn note_host(&self, running: &mut Running, host: HostCopy) {
        // What it can do by itself says nothing of what the driver does to it.
        let host = match &self.park_refused {
            None if self.spec.park == Park::Checkpoint => HostCopy::default(),
            Some(why) => HostCopy { can_park: Some(false), can_reread: Some(false), note: Some(why.clone()), ..host },
            None => host,
        };
        if running.host != host {
            self.view.send_modify(|v| {
                (v.host_bytes, v.can_park, v.park_note) = (host.bytes, host.can_park, host.note.clone())
            });
            running.host = host.clone();
            self.report(Report::Host(host));
        }
    }

    pub(super) fn release(&self, running: &Running) {
        self.hold(running, 0);
    }

    pub(super) fn hold(&self, running: &Running, bytes: u64) {
        self.around.gpus.hold((running.process.mark(), running.process.pid()), &self.gpus, bytes);
    }

    /// When the memory of a worker, which is about to be stopped, is free; `None`: on the CPU, or the driver does not say.
    pub(super) async fn free_when(&self, running: &mut Running) -> Option<Free> {
        let before = running.memory_before?;
        self.note_pids(running).await;
        let is_shared = self.is_shared(running.own);
        let since = Instant::now();
        let now = if is_shared { self.used_bytes_now().await? } else { 0 };
        let all = |each: u64| each.saturating_mul(u64::try_from(self.gpus.len()).unwrap_or(1).max(1));
        let at_most = free_at(before, now, running.own.map(all), running.grown.filter(|_| is_shared));
        Some(Free { at_most, since, pids: running.pids.clone(), is_shared })
    }

    /// When it is free after a load that came to nothing, whose processes were `seen` while it went on; `since` it began.
    pub(super) fn free_as_before(&self, before: Option<u64>, since: Instant, seen: &Seen) -> Option<Free> {
        Some(Free { at_most: before?, since, pids: seen.own.clone(), is_shared: self.is_shared(None) })
    }

    /// It takes memory of its GPUs from now on, which others are not to take for theirs: what it says (`own`) or is declared to
    /// take, or who knows how much.
    pub(super) fn on_its_way(&self, own: Option<u64>) -> Option<OnItsWay> {
        let bytes = own.max(self.spec.memory).unwrap_or(u64::MAX).saturating_add(MEMORY_SLACK_BYTES);
        let arrivals = &self.around.stuck.arrivals;
        (self.spec.gpus > 0).then(|| arrivals.begin((self.spec.name.clone(), self.replica), &self.gpus, bytes))
    }

    /// The most that others have taken of these GPUs together since `free` was looked at, in bytes, as far as that matters: where
    /// the driver shows processes, it shows whose the memory is.
    pub(super) fn come_since(&self, free: &Free, gpus: &[u32]) -> u64 {
        if !free.is_shared || !free.pids.is_empty() {
            return 0;
        }
        self.around.stuck.arrivals.since(free.since, gpus, &(self.spec.name.clone(), self.replica))
    }

    /// Which processes of a load the driver shows by now: it may end by itself at any time.
    pub(super) async fn note_seen(&self, process: &WorkerProcess, seen: &mut Seen) {
        if self.spec.gpus == 0 || seen.is_silent {
            return;
        }
        // A driver that hangs must not keep a load from its orders and its limit, and is not asked again.
        let Ok(users) = timeout(SEEN_WITHIN, self.users(&self.gpus)).await else {
            seen.is_silent = true;
            return;
        };
        let users = users.unwrap_or_default();
        let new: BTreeSet<u32> = users.iter().map(|(_, pid, _)| *pid).filter(|pid| !seen.all.contains(pid)).collect();
        // Whose they are is asked once: that reads the environments of all processes.
        if !new.is_empty() {
            let ours = process.pids().await;
            seen.own.extend(new.intersection(&ours));
            seen.all.extend(new);
        }
    }

    /// What the driver shows of a worker that has just got ready. One that hangs keeps it from nothing.
    pub(super) async fn note_ready(&self, running: &mut Running, seen: &mut Seen) {
        let asked = async {
            self.note_pids(running).await;
            if let Some(before) = running.memory_before {
                running.grown = self.used_bytes().await.map(|now| now.saturating_sub(before));
            }
        };
        seen.is_silent = seen.is_silent || timeout(SEEN_WITHIN, asked).await.is_err();
    }

    /// Whether others may take and free memory of the same GPUs meanwhile.
    fn is_shared(&self, own: Option<u64>) -> bool {
        own.is_some() || (self.spec.memory.is_some() && !self.spec.exclusive)
    }

    /// Which of its processes the driver shows; they are remembered, since a dead one has no parents any more.
    pub(super) async fn note_pids(&self, running: &mut Running) {
        if self.spec.gpus > 0 {
            let ours = running.process.pids().await;
            let users = self.users(&self.gpus).await.unwrap_or_default();
            running.pids.extend(users.iter().map(|(_, pid, _)| *pid).filter(|pid| ours.contains(pid)));
        }
    }

    /// Who uses memory of these GPUs: GPU, process, bytes. `None`: the driver does not say.
    async fn users(&self, gpus: &[u32]) -> Option<Vec<(u32, u32, u64)>> {
        let (probe, gpus) = (self.around.gpus.clone(), gpus.to_vec());
        let each = move |gpu: u32| Some(probe.users(gpu)?.into_iter().map(move |(pid, bytes)| (gpu, pid, bytes)));
        let ask = move || gpus.into_iter().map(each).collect::<Option<Vec<_>>>();
        let all = tokio::task::spawn_blocking(ask).await.ok()??;
        Some(all.into_iter().flatten().collect())
    }

    /// Device memory in use, in bytes: `Some(None)` for a CPU model, `None` if a GPU is needed and there is none, asked again
    /// and again.
    pub(super) async fn device_memory(&self) -> Option<Option<u64>> {
        if self.spec.gpus == 0 {
            return Some(None);
        }
        self.used_bytes_now().await.map(Some)
    }

    /// Whether there are as many GPUs as it needs. Which of them it gets is not decided here.
    pub(super) async fn sees_gpu(&self) -> bool {
        if self.spec.gpus == 0 {
            return true;
        }
        let count = self.look().await.len();
        u32::try_from(count).is_ok_and(|count| count > 0 && count >= self.spec.gpus)
    }

    pub(super) async fn look(&self) -> Vec<Gpu> {
        let probe = self.around.gpus.clone();
        tokio::task::spawn_blocking(move || probe.gpus()).await.unwrap_or_default()
    }

    /// Of its own GPUs, or of all if nobody said which; `None` if one of them is not there.
    pub(super) async fn used_bytes(&self) -> Option<u64> {
        self.used_of(&self.gpus).await
    }

    /// The same, asked again if the driver fails to answer once.
    async fn used_bytes_now(&self) -> Option<u64> {
        for _ in 1..ASKED_MAX {
            if let Some(used) = self.used_bytes().await {
                return Some(used);
            }
            sleep(LOOK_EVERY).await;
        }
        self.used_bytes().await
    }

    /// Who uses its own GPUs, asked as often.
    async fn users_now(&self) -> Option<Vec<(u32, u32, u64)>> {
        for _ in 1..ASKED_MAX {
            if let Some(users) = self.users(&self.gpus).await {
                return Some(users);
            }
            sleep(LOOK_EVERY).await;
        }
        self.users(&self.gpus).await
    }

    async fn used_of(&self, indices: &[u32]) -> Option<u64> {
        let mut gpus = self.look().await;
        if !indices.is_empty() {
            gpus.retain(|gpu| indices.contains(&gpu.index));
        }
        let is_there = !gpus.is_empty() && gpus.len() >= indices.len();
        is_there.then(|| gpus.iter().map(|gpu| gpu.used_bytes).sum())
    }

    /// Memory is free when the driver says so, not when the process is gone. What is not free in time is remembered: no
    /// worker is loaded there until it is.
    pub(super) async fn wait_memory_free(&self, free: Option<Free>) {
        let Some(free) = free else { return };
        let Err(used) = self.until_free(&self.gpus, &free, self.tempo.memory_limit).await else { return };
        tracing::warn!(
            model = self.spec.name,
            memory.used_bytes = used,
            memory.free_at_bytes = free.at_most,
            "the driver still shows the memory of a stopped worker in use"
        );
        // Where others come and go, totals do not prove that it is this worker's.
        if !free.is_shared || !free.pids.is_empty() {
            self.around.stuck.lock().push(Stuck { model: self.spec.name.clone(), gpus: self.gpus.clone(), free });
        }
    }

    /// An error: so many bytes are still in use after `limit`.
    async fn until_free(&self, gpus: &[u32], free: &Free, limit: Duration) -> Result<(), u64> {
        let until = Instant::now() + limit;
        loop {
            let used = match free.pids.is_empty() {
                true => self.used_of(gpus).await.filter(|used| {
                    let beside = MEMORY_SLACK_BYTES.saturating_add(self.come_since(free, gpus));
                    *used > free.at_most.saturating_add(beside)
                }),
                false => self.users(gpus).await.and_then(|users| free.used_by_it(&users)),
            };
            // A driver that does not answer says neither that it is free nor that it is not.
            let is_heard = used.is_some() || self.is_heard(gpus, free).await;
            match used {
                None if is_heard => return Ok(()),
                Some(used) if Instant::now() >= until => return Err(used),
                None if Instant::now() >= until => return Ok(()),
                _ => {}
            }
            tokio::select! {
                () = self.hard.cancelled() => return Ok(()),
                () = sleep(LOOK_EVERY) => {}
            }
        }
    }

    async fn is_heard(&self, gpus: &[u32], free: &Free) -> bool {
        if free.pids.is_empty() { self.used_of(gpus).await.is_some() } else { self.users(gpus).await.is_some() }
    }

    /// Whether the memory that ended workers left in use where it is to be loaded is free at last; an error says whose it is,
    /// where, and what to do.
    pub(super) async fn leftovers_are_free(&self) -> Result<(), String> {
        let overlaps = |stuck: &Stuck| stuck.gpus.is_empty() || stuck.gpus.iter().any(|gpu| self.gpus.contains(gpu));
        let left: Vec<Stuck> = self.around.stuck.lock().iter().filter(|stuck| overlaps(stuck)).cloned().collect();
        for stuck in left {
            // Who finds room all the same only looks.
            let limit = if self.has_room().await { Duration::ZERO } else { self.tempo.memory_limit };
            match self.until_free(&stuck.gpus, &stuck.free, limit).await {
                Ok(()) => self.around.stuck.lock().retain(|other| *other != stuck),
                Err(_) if self.has_room().await => {}
                Err(used) => {
                    let users = self.users(&stuck.gpus).await.unwrap_or_default();
                    return Err(stuck.words(used, &users));
                }
            }
        }
        Ok(())
    }

    /// Memory that is free on the fullest of its GPUs, in bytes; what parked workers keep there is not.
    pub(super) async fn least_free(&self) -> Option<u64> {
        let gpus = self.look().await;
        let own = gpus.iter().filter(|gpu| self.gpus.contains(&gpu.index));
        own.map(|gpu| gpu.total_bytes.saturating_sub(gpu.used_bytes)).min()
    }

    /// What a worker that has just been parked keeps on each of its GPUs, in bytes; `None`: the driver does not say, or others
    /// have come.
    pub(super) async fn kept_bytes(&self, free: Option<&Free>) -> Option<u64> {
        let gpus = u64::try_from(self.gpus.len()).unwrap_or(1).max(1);
        let taken = self.taken_beyond(free?).await?;
        (self.come_since(free?, &self.gpus) == 0).then_some(taken / gpus)
    }

    /// What a worker takes of its GPUs together, in bytes: what the driver shows of its processes, whoever else comes and goes;
    /// or, where it shows none, how much more than `free` is in use. `None`: the driver does not say, asked again and again.
    pub(super) async fn taken_beyond(&self, free: &Free) -> Option<u64> {
        if free.pids.is_empty() {
            return Some(self.used_bytes_now().await?.saturating_sub(free.at_most));
        }
        Some(free.used_by_it(&self.users_now().await?).unwrap_or(0))
    }

    /// Whether what it is declared to take is free on each of its GPUs.
    async fn has_room(&self) -> bool {
        let Some(memory) = self.spec.memory.filter(|_| !self.gpus.is_empty()) else { return false };
        let gpus = self.look().await;
        let is_free = |gpu: &Gpu| gpu.total_bytes.saturating_sub(gpu.used_bytes) >= memory;
        let mut own = gpus.iter().filter(|gpu| self.gpus.contains(&gpu.index));
        own.clone().count() == self.gpus.len() && own.all(is_free)
    }
}

/// Longest answer of the driver while a worker loads.
const SEEN_WITHIN: Duration = Duration::from_secs(1);
/// How many times a driver is asked that fails to answer.
const ASKED_MAX: usize = 5;
/// Between two looks at memory that is to be free.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Processes that the driver has shown while a worker was loaded.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// Those of the worker.
    pub(super) own: BTreeSet<u32>,
    all: BTreeSet<u32>,
    /// The driver did not answer in time.
    pub(super) is_silent: bool,
}

/// When the memory of a worker is free.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Free {
    /// At this use of its GPUs together, in bytes, if the driver shows none of its processes.
    pub(super) at_most: u64,
    /// When that was looked at.
    pub(super) since: Instant,
    /// When it shows none of these any more.
    pub(super) pids: BTreeSet<u32>,
    /// Others may take and free memory of the same GPUs meanwhile.
    pub(super) is_shared: bool,
}

impl Free {
    /// What its processes still use; `None`: none of them is shown.
    pub(super) fn used_by_it(&self, users: &[(u32, u32, u64)]) -> Option<u64> {
        let its: Vec<u64> =
            users.iter().filter(|(_, pid, _)| self.pids.contains(pid)).map(|(.., bytes)| *bytes).collect();
        (!its.is_empty()).then(|| its.iter().sum())
    }
}

/// Memory of an ended worker that was not free in time.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stuck {
    model: String,
    gpus: Vec<u32>,
    free: Free,
}

impl Stuck {
    fn words(&self, used: u64, users: &[(u32, u32, u64)]) -> String {
        let gib = |bytes: u64| format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30));
        let gpus: Vec<String> = self.gpus.iter().map(|gpu| format!("gpu{gpu}")).collect();
        let name = |pid: &u32| std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        let who = |(gpu, pid, bytes): &(u32, u32, u64)| {
            format!("process {pid} {} has {} of gpu{gpu}", name(pid).trim(), gib(*bytes)).replace("  ", " ")
        };
        let whose: Vec<String> = users.iter().map(who).collect();
        let whose = if whose.is_empty() { "the driver does not say by whom".to_owned() } else { whose.join(", ") };
        format!(
            "the worker of `{}` that was on {} has ended, and {} are still in use there: {whose}; end these processes, or \
             restart the machine if there are none",
            self.model,
            if gpus.is_empty() { "the GPUs".to_owned() } else { gpus.join(" and ") },
            gib(used),
        )
    }
}

/// Device memory that ended workers have left in use, and what is about to take some, of all supervisors.
#[derive(Clone, Debug, Default)]
pub struct StuckMemory {
    left: Arc<Mutex<Vec<Stuck>>>,
    arrivals: Arrivals,
}

impl StuckMemory {
    fn lock(&self) -> MutexGuard<'_, Vec<Stuck>> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The use at which a worker's memory is free, all in bytes: what it was before; or, as others may have come to the same GPUs
/// and gone since, what it is now without what the worker says it takes (`own`). One that says nothing has taken at least what
/// the use had `grown` by when it was ready.
fn free_at(before: u64, now: u64, own: Option<u64>, grown: Option<u64>) -> u64 {
    match (own, grown) {
        (Some(own), _) => now.saturating_sub(own),
        (None, Some(grown)) => before.max(now.saturating_sub(grown)),
        (None, None) => before,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_free_whoever_came_and_went_meanwhile() {
        assert_eq!(free_at(0, 40, None, None), 0, "alone");
        assert_eq!(free_at(0, 70, Some(40), None), 30, "another has come");
        assert_eq!(free_at(50, 30, Some(30), None), 0, "another has gone");
        assert_eq!(free_at(0, 70, None, Some(40)), 30, "another has come, and nobody tells anything");
        assert_eq!(free_at(5, 40, None, Some(40)), 5);
    }
}
