//! What a supervisor knows of the memory of its worker's GPUs, and when that is free again.

use super::*;

/// Device memory that may stay in use after a stop, in bytes: other programs come and go.
const MEMORY_SLACK_BYTES: u64 = 1 << 30;

impl Supervisor {
    /// What a worker says of its memory; whoever plays the driver takes it from there.
    pub(super) fn note_memory(&self, running: &mut Running, memory: Memory) {
        self.note_host(running, memory.host);
        let device_bytes = memory.device_bytes;
        if let Some(bytes) = device_bytes.filter(|_| self.spec.gpus > 0) {
            self.around.gpus.hold(running.process.mark(), &self.gpus, bytes);
        }
        running.own = device_bytes.or(running.own);
    }

    /// What it says of its copy in host memory: reported when it is another than before.
    pub(super) fn note_host(&self, running: &mut Running, host: HostCopy) {
        if running.host != host {
            self.view.send_modify(|v| {
                (v.host_bytes, v.can_park, v.park_note) = (host.bytes, host.can_park, host.note.clone())
            });
            running.host = host.clone();
            self.report(Report::Host(host));
        }
    }

    pub(super) fn release(&self, running: &Running) {
        self.around.gpus.hold(running.process.mark(), &self.gpus, 0);
    }

    /// The use of memory at which that of a worker, which is about to be stopped, is free.
    pub(super) async fn free_when(&self, running: &Running) -> Option<u64> {
        let before = running.memory_before?;
        let is_shared = running.own.is_some() || (self.spec.memory.is_some() && !self.spec.exclusive);
        let now = if is_shared { self.used_bytes().await.unwrap_or(0) } else { 0 };
        let all = |each: u64| each.saturating_mul(u64::try_from(self.gpus.len()).unwrap_or(1).max(1));
        Some(free_at(before, now, running.own.map(all), running.grown.filter(|_| is_shared)))
    }

    /// Device memory in use, in bytes: `Some(None)` for a CPU model, `None` if a GPU is needed and there is none.
    pub(super) async fn device_memory(&self) -> Option<Option<u64>> {
        if self.spec.gpus == 0 {
            return Some(None);
        }
        self.used_bytes().await.map(Some)
    }

    /// Whether there are as many GPUs as it needs. Which of them it gets is not decided here.
    pub(super) async fn sees_gpu(&self) -> bool {
        let count = self.look().await.len();
        u32::try_from(count).is_ok_and(|count| count > 0 && count >= self.spec.gpus)
    }

    pub(super) async fn look(&self) -> Vec<Gpu> {
        let probe = self.around.gpus.clone();
        tokio::task::spawn_blocking(move || probe.gpus()).await.unwrap_or_default()
    }

    /// Of its own GPUs, or of all if nobody said which; `None` if one of them is not there.
    pub(super) async fn used_bytes(&self) -> Option<u64> {
        let mut gpus = self.look().await;
        if !self.gpus.is_empty() {
            gpus.retain(|gpu| self.gpus.contains(&gpu.index));
        }
        let is_there = !gpus.is_empty() && gpus.len() >= self.gpus.len();
        is_there.then(|| gpus.iter().map(|gpu| gpu.used_bytes).sum())
    }

    /// Memory is free when the driver says so, not when the process is gone.
    pub(super) async fn wait_memory_free(&self, before: Option<u64>) {
        let Some(before) = before else {
            return;
        };
        let until = Instant::now() + self.tempo.memory_limit;
        loop {
            let used = self.used_bytes().await.unwrap_or(0);
            if used <= before.saturating_add(MEMORY_SLACK_BYTES) {
                return;
            }
            if Instant::now() >= until {
                tracing::warn!(
                    model = self.spec.name,
                    memory.used_bytes = used,
                    memory.before_bytes = before,
                    "the driver still shows the memory of a stopped worker in use: going on"
                );
                return;
            }
            tokio::select! {
                () = self.hard.cancelled() => return,
                () = sleep(Duration::from_millis(50)) => {}
            }
        }
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
