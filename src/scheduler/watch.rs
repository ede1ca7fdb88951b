//! Looks at the driver's GPUs again and again, and tells the loop when one comes or goes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::domain::GpuSet;
use crate::scheduler::dispatch::Context;
use crate::scheduler::run::Message;
use crate::scheduler::state::Event;
use crate::worker::gpu::GpuProbe;

/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The GPUs that are there now: memory in bytes, by the driver's numbers.
pub(super) async fn look(probe: &Arc<dyn GpuProbe>) -> BTreeMap<u32, u64> {
    let probe = probe.clone();
    let gpus = tokio::task::spawn_blocking(move || probe.gpus()).await.unwrap_or_default();
    gpus.into_iter().map(|gpu| (gpu.index, gpu.total_bytes)).collect()
}

/// Whether one of these GPUs is not there now.
pub(super) async fn lacks(probe: &Arc<dyn GpuProbe>, set: GpuSet) -> bool {
    let there = look(probe).await;
    set.gpus().any(|gpu| !there.contains_key(&gpu))
}

/// Tells the loop what changes, until the server stops.
pub(super) async fn watch(context: Context, seen: BTreeMap<u32, u64>) {
    let mut sight = Sight { told: seen, missed: BTreeMap::new() };
    loop {
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            () = context.tasks.hard().cancelled() => return,
        }
        if let Some(there) = sight.see(look(&context.gpus).await) {
            context.tell(Message::Event(Event::Devices(there)));
        }
    }
}

/// What was seen last. A GPU is gone when two looks in a row have missed it: a driver may fail to answer once.
struct Sight {
    told: BTreeMap<u32, u64>,
    /// Of what was told, what the last look has missed.
    missed: BTreeMap<u32, u64>,
}

impl Sight {
    /// What there is now, if that is another thing than was told.
    fn see(&mut self, now: BTreeMap<u32, u64>) -> Option<BTreeMap<u32, u64>> {
        let missing: BTreeMap<u32, u64> =
            self.told.iter().filter(|(gpu, _)| !now.contains_key(gpu)).map(|(gpu, bytes)| (*gpu, *bytes)).collect();
        let mut there = now;
        for (gpu, bytes) in &missing {
            if !self.missed.contains_key(gpu) {
                there.insert(*gpu, *bytes);
            }
        }
        self.missed = missing;
        if there == self.told {
            return None;
        }
        for gpu in self.told.keys().filter(|gpu| !there.contains_key(gpu)) {
            tracing::error!(gpu, "a GPU has vanished: its jobs wait again, uncharged");
        }
        for gpu in there.keys().filter(|gpu| !self.told.contains_key(gpu)) {
            tracing::info!(gpu, "a GPU is there");
        }
        self.told.clone_from(&there);
        Some(there)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_is_gone_when_two_looks_have_missed_it_and_there_when_one_has_seen_it() {
        let gpus = |all: &[u32]| all.iter().map(|gpu| (*gpu, 7)).collect::<BTreeMap<u32, u64>>();
        let mut sight = Sight { told: gpus(&[0, 1]), missed: BTreeMap::new() };
        assert_eq!(sight.see(gpus(&[0, 1])), None);
        assert_eq!(sight.see(gpus(&[])), None, "the driver did not answer once");
        assert_eq!(sight.see(gpus(&[0, 1])), None);
        assert_eq!(sight.see(gpus(&[0])), None);
        assert_eq!(sight.see(gpus(&[0])), Some(gpus(&[0])));
        assert_eq!(sight.see(gpus(&[0])), None);
        assert_eq!(sight.see(gpus(&[0, 1, 2])), Some(gpus(&[0, 1, 2])));
    }
}
