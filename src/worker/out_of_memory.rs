//! A model that does not fit the memory of its GPU: told so with the numbers, and tried again when there is more room.

use super::loading::Try;
use super::*;
use crate::domain::storage::shown_bytes;
use crate::domain::worker::MORE_BYTES;

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
        self.spec.starts_as(spec) && !has_more(free, self.free)
    }
}

/// Where a load ran out of memory though it was told to make do with less.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Lacked {
    gpus: Vec<u32>,
    /// The most that was free on the fullest of them when it failed, or was tried again for that, in bytes.
    free: u64,
}

/// Whether so much more is free than before a try that failed that another one is worth it.
fn has_more(now: Option<u64>, before: Option<u64>) -> bool {
    now.zip(before).is_some_and(|(now, before)| now >= before.saturating_add(MORE_BYTES))
}

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
        self.lacked.clear();
    }

    /// Its load has run out of memory, and its processes are gone. Whether it is tried once more: with all of it if more is free
    /// now than before, since others have left meanwhile; else with less, if it was not already.
    pub(super) async fn is_tried_again(&mut self, reason: &str) -> bool {
        let now = self.least_free().await;
        let is_more = has_more(now, self.free_bytes);
        if !is_more && self.is_small {
            return false;
        }
        let how = if is_more { "since more is free now" } else { "and told to make do with less" };
        tracing::warn!(model = self.spec.name, "out of memory while loading, tried once more {how}: {reason}");
        (self.is_small, self.free_bytes) = (!is_more, now.or(self.free_bytes));
        true
    }

    /// It ran out of memory, the last time when it was told to make do with less.
    pub(super) async fn does_not_fit(&mut self, reason: String, tail: &Tail) -> Phase {
        self.small = None;
        let gpus = self.look().await;
        // What was free before: by now those may have left beside whom it did not fit.
        let free = self.free_bytes.or_else(|| free_on(&gpus, &self.gpus, self.spec.gpus)).unwrap_or(0);
        // The most with which it failed: who comes and goes by turns does not have it tried each time.
        match self.lacked.iter_mut().find(|lacked| lacked.gpus == self.gpus) {
            Some(lacked) => lacked.free = lacked.free.max(free),
            None => self.lacked.push(Lacked { gpus: self.gpus.clone(), free }),
        }
        let reason = tail.explain(reason);
        self.last_failure = Some(reason.clone());
        let message = format!(
            "model `{}` does not fit, nor when it was told to make do with less: {reason}. {}",
            self.spec.name,
            advice(&self.spec, &gpus, &self.gpus)
        );
        tracing::error!(model = self.spec.name, "{message}");
        let mut error = JobError::new(ErrorCode::ModelLoadFailed, message, true);
        error.details = Some(json!({"log_tail": tail.lines()}));
        Phase::DoesNotFit { error, free }
    }

    /// Until somebody asks for a retry, or more is free where it failed than was before, or it is to be loaded all the same:
    /// elsewhere, or without those who were beside it.
    pub(super) async fn wait_for_room(&mut self, error: JobError, free: u64) -> Phase {
        self.enter(ModelState::Blocked);
        self.view.send_modify(|v| v.reason = Some(error.message.clone()));
        self.report(Report::DoesNotFit { error, free });
        let look_every = self.tempo.gpu_every;
        loop {
            match self.next_order_within(look_every).await {
                Some(None) => return Phase::Ended,
                Some(Some(Order::Stop | Order::Park | Order::ParkBare)) => self.report(Report::Stopped { stop_ms: 0 }),
                Some(Some(Order::Suspect | Order::Expedite | Order::Proven)) => {}
                Some(Some(Order::Load | Order::Wake)) => return Phase::Loading,
                Some(Some(Order::Retry)) => {
                    self.enter(ModelState::Absent);
                    self.forget_failures();
                    return Phase::Absent;
                }
                None => {
                    let gpus = self.look().await;
                    let count = self.spec.gpus;
                    if take_room(&mut self.lacked, &gpus, count) {
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

/// Whether more is free where it failed. It is tried for that once: elsewhere it may fail again before it comes there.
fn take_room(lacked: &mut [Lacked], gpus: &[Gpu], count: u32) -> bool {
    let mut is_more = false;
    for it in lacked {
        let now = free_on(gpus, &it.gpus, count).filter(|now| has_more(Some(*now), Some(it.free)));
        is_more |= now.is_some();
        it.free = now.unwrap_or(it.free);
    }
    is_more
}

/// What is free on the fullest of these GPUs, in bytes; if nobody said which, of the `count` that have most.
fn free_on(gpus: &[Gpu], own: &[u32], count: u32) -> Option<u64> {
    if own.is_empty() {
        return Some(most_free(gpus, count));
    }
    let free = gpus.iter().filter(|gpu| own.contains(&gpu.index));
    free.map(|gpu| gpu.total_bytes.saturating_sub(gpu.used_bytes)).min()
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
         little, take a smaller model, or free the GPU. It is tried again when {} more are free there, after an edit of its \
         entry, or by `roundhouse models retry {}`",
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
    fn what_is_free_where_it_failed_is_not_what_is_free_elsewhere() {
        let gpus = [gpu(0, 70), gpu(1, 0), gpu(2, 40)];
        let free = |own: &[u32]| free_on(&gpus, own, 1).map(|bytes| bytes >> 30);
        assert_eq!([free(&[0]), free(&[2, 1]), free(&[3]), free(&[])], [Some(10), Some(40), None, Some(80)]);
        let more = |now: u64, before: u64| has_more(Some(now << 30), Some(before << 30));
        assert_eq!([more(10, 10), more(11, 10), more(80, 10), more(10, 80)], [false, true, true, false]);
    }

    #[test]
    fn more_room_on_a_gpu_is_a_reason_to_try_once() {
        let lacks = |index, free: u64| Lacked { gpus: vec![index], free: free << 30 };
        let mut lacked = [lacks(0, 10), lacks(1, 10)];
        let tried = |lacked: &mut [Lacked], used: u64| take_room(lacked, &[gpu(0, 70), gpu(1, used)], 1);
        assert_eq!(
            [70, 60, 60, 70, 60, 59].map(|used| tried(&mut lacked, used)),
            [false, true, false, false, false, true]
        );
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
