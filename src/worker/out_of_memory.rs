//! A model that does not fit the memory of its GPU: told so with the numbers, and tried again when there is more room.

use super::loading::Try;
use super::*;
use crate::domain::storage::shown_bytes;

/// A load that ran out of memory and worked with less: the next ones begin with less, as long as nothing has changed.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Small {
    /// The entry that it was a worker of.
    spec: ModelSpec,
    /// What was free on the fullest of its GPUs before it was loaded, in bytes.
    free: Option<u64>,
}

impl Small {
    /// Whether it says anything about a load of this entry with so much free.
    fn holds(&self, spec: &ModelSpec, free: Option<u64>) -> bool {
        let has_more = |(now, then): (u64, u64)| now >= then.saturating_add(MORE_BYTES);
        self.spec.starts_as(spec) && !free.zip(self.free).is_some_and(has_more)
    }
}

/// How much more has to be free than when it failed, in bytes: other programs come and go.
const MORE_BYTES: u64 = 1 << 30;

impl Supervisor {
    /// A load has failed; if the worker (`oom`) or its log says so, since the device has not enough memory.
    pub(super) fn failed(&self, reason: String, oom: bool, tail: Tail) -> Try {
        let is_oom = self.spec.gpus > 0 && (oom || tail.tells_out_of_memory());
        if is_oom { Try::OutOfMemory(reason, tail) } else { Try::Failed(reason, tail) }
    }

    /// Whether a load begins with less, since one of the same entry fitted only so, and no more is free now than then.
    pub(super) fn begins_small(&self) -> bool {
        let is_small = self.small.as_ref().is_some_and(|small| small.holds(&self.spec, self.free_bytes));
        if is_small {
            tracing::info!(model = self.spec.name, "loaded with less at once: with all of it, it ran out of memory");
        }
        is_small
    }

    /// It is ready: what it was loaded with is enough.
    pub(super) fn note_small(&mut self) {
        let before = self.small.take().filter(|small| small.holds(&self.spec, self.free_bytes));
        let now = || Small { spec: self.spec.clone(), free: self.free_bytes };
        self.small = self.is_small.then(|| before.unwrap_or_else(now));
    }

    /// It ran out of memory twice, the second time when it was told to make do with less.
    pub(super) async fn does_not_fit(&mut self, reason: String, tail: &Tail, free: Option<Free>) -> Phase {
        self.wait_memory_free(free).await;
        self.failed_loads += 1;
        self.small = None;
        let gpus = self.look().await;
        let reason = tail.explain(reason);
        self.last_failure = Some(reason.clone());
        let message = format!(
            "model `{}` does not fit, nor when it was told to make do with less: {reason}. {}",
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
                Some(Some(Order::Stop | Order::Park | Order::ParkBare)) => self.report(Report::Stopped { stop_ms: 0 }),
                Some(Some(Order::Suspect | Order::Expedite | Order::Proven)) => {}
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
    fn what_fitted_only_with_less_begins_so_until_there_is_more_room_or_another_entry() {
        let small = Small { spec: spec(&["x"]), free: Some(20 << 30) };
        let holds = |gib: u64| small.holds(&spec(&["x"]), Some(gib << 30));
        assert_eq!([holds(10), holds(20), holds(21)], [true, true, false]);
        assert!(small.holds(&spec(&["x"]), None), "the driver does not say");
        assert!(small.holds(&ModelSpec { aliases: vec!["y".into()], ..spec(&["x"]) }, Some(0)));
        assert!(!small.holds(&ModelSpec { args: vec!["--less".into()], ..spec(&["x"]) }, Some(0)));
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
