//! A model that does not fit the memory of its GPU: told so with the numbers, and tried again when there is more room.

use super::loading::Try;
use super::*;
use crate::domain::storage::shown_bytes;

/// How much more has to be free than when it failed, in bytes: other programs come and go.
const MORE_BYTES: u64 = 1 << 30;

impl Supervisor {
    /// A load has failed; if the worker (`oom`) or its log says so, since the device has not enough memory.
    pub(super) fn failed(&self, reason: String, oom: bool, tail: Tail) -> Try {
        let is_oom = self.spec.gpus > 0 && (oom || tail.tells_out_of_memory());
        if is_oom { Try::OutOfMemory(reason, tail) } else { Try::Failed(reason, tail) }
    }

    /// It ran out of memory twice, the second time when it was told to make do with less.
    pub(super) async fn does_not_fit(&mut self, reason: String, tail: &Tail, memory_before: Option<u64>) -> Phase {
        self.wait_memory_free(self.free_as_before(memory_before)).await;
        self.failed_loads += 1;
        let gpus = self.look().await;
        let reason = tail.explain(reason);
        self.last_failure = Some(reason.clone());
        let message = format!(
            "model `{}` does not fit, even with less to do: {reason}. {}",
            self.spec.name,
            advice(&self.spec, &gpus, &self.gpus)
        );
        tracing::error!(model = self.spec.name, failures = self.failed_loads, "{message}");
        let mut error = JobError::new(ErrorCode::ModelLoadFailed, message, true);
        error.details = Some(json!({"failed_loads": self.failed_loads, "log_tail": tail.lines()}));
        Phase::DoesNotFit { error, free: most_free(&gpus, self.spec.gpus) }
    }

    /// Until somebody asks for a retry, or as many GPUs as it needs have more free than they had.
    pub(super) async fn wait_for_room(&mut self, error: JobError, free: u64) -> Phase {
        self.enter(ModelState::Blocked);
        self.view.send_modify(|v| v.reason = Some(error.message.clone()));
        self.report(Report::DoesNotFit { error: error.clone() });
        let look_every = self.tempo.gpu_every;
        loop {
            match self.next_order_within(look_every).await {
                Some(None) => return Phase::Ended,
                Some(Some(Order::Stop | Order::Park)) => self.report(Report::Stopped { stop_ms: 0 }),
                Some(Some(Order::Suspect)) => {}
                Some(Some(Order::Load | Order::Wake)) => self.report(Report::DoesNotFit { error: error.clone() }),
                Some(Some(Order::Retry)) => {
                    self.enter(ModelState::Absent);
                    self.forget_failures();
                    return Phase::Absent;
                }
                None => {
                    let now = most_free(&self.look().await, self.spec.gpus);
                    if now >= free.saturating_add(MORE_BYTES) {
                        tracing::info!(model = self.spec.name, "there is more room than when it did not fit");
                        self.enter(ModelState::Absent);
                        self.report(Report::Available);
                        return Phase::Absent;
                    }
                }
            }
        }
    }
}

/// What each of the `count` GPUs with most room has free at least, in bytes.
fn most_free(gpus: &[Gpu], count: u32) -> u64 {
    let mut free: Vec<u64> = gpus.iter().map(|gpu| gpu.total_bytes.saturating_sub(gpu.used_bytes)).collect();
    free.sort_unstable_by(|a, b| b.cmp(a));
    let last = usize::try_from(count.max(1)).unwrap_or(usize::MAX) - 1;
    free.get(last).copied().unwrap_or(0)
}

/// The numbers, and what a person can do about them. `own`: where it was loaded, by the driver's numbers.
fn advice(spec: &ModelSpec, gpus: &[Gpu], own: &[u32]) -> String {
    let is_own = |gpu: &&Gpu| own.is_empty() || own.contains(&gpu.index);
    let rooms = gpus.iter().filter(is_own).map(|gpu| {
        format!(
            "GPU {} has {}, of which {} are free without it and {} are held by others (`nvidia-smi` shows by whom)",
            gpu.index,
            shown_bytes(gpu.total_bytes),
            shown_bytes(gpu.total_bytes.saturating_sub(gpu.used_bytes)),
            shown_bytes(gpu.used_bytes)
        )
    });
    let rooms = rooms.collect::<Vec<_>>().join("; ");
    let declared = match spec.memory {
        Some(bytes) => format!("`memory: {}` is declared for it", shown_bytes(bytes)),
        None => "no `memory` is declared for it".to_owned(),
    };
    format!(
        "{rooms}; {declared}. Give it less to do in `args` (text: a smaller --max-model-len), raise `memory` if it was given too \
         little, take a smaller model, or free the GPU. It is tried again when a GPU has {} more free, after an edit of its entry, \
         or by `roundhouse models retry {}`",
        shown_bytes(MORE_BYTES),
        spec.name
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::process::tests::spec;

    fn gpu(index: u32, used_gib: u64) -> Gpu {
        Gpu { index, name: "H100".into(), total_bytes: 80 << 30, used_bytes: used_gib << 30 }
    }

    #[test]
    fn room_is_what_the_best_gpus_have_in_common() {
        let gpus = [gpu(0, 70), gpu(1, 20), gpu(2, 40)];
        let free = |count| most_free(&gpus, count) >> 30;
        assert_eq!([free(1), free(2), free(3), free(4)], [60, 40, 10, 0]);
    }

    #[test]
    fn the_advice_has_the_numbers_and_the_command() {
        let spec = ModelSpec { memory: Some(20 << 30), ..spec(&["x"]) };
        let text = advice(&spec, &[gpu(0, 0), gpu(1, 66)], &[1]);
        for part in
            ["GPU 1 has 80.0 GiB", "14.0 GiB are free", "66.0 GiB are held", "`memory: 20.0 GiB`", "models retry toy"]
        {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!text.contains("GPU 0"));
    }
}
