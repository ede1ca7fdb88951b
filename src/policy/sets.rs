//! Which sets of devices can hold a model, and who would have to leave.

use crate::domain::GpuSet;
use crate::domain::worker::MORE_BYTES;
use crate::policy::view::{Phase, View, WorkerView};

/// Aligned sets that can hold a worker of a model: GPUs 0-1, 2-3 for one of two, 0-3, 4-7 for one of four. None with a device
/// that is gone.
pub fn aligned(view: &View, model: usize) -> impl Iterator<Item = GpuSet> + use<> {
    let count = view.models[model].gpus;
    let devices = u32::try_from(view.devices.len()).unwrap_or(u32::MAX);
    let (from, end, count) = if count == 0 { (view.gpus, devices, 1) } else { (0, view.gpus, count) };
    let step = count.next_power_of_two() as usize;
    let there: Vec<bool> = view.devices.iter().map(|size| *size > 0).collect();
    (from..end)
        .step_by(step)
        .map(move |first| GpuSet { first, count })
        .filter(move |set| set.first + set.count <= end && set.gpus().all(|device| there[device as usize]))
}

/// Those on which it may be loaded: where it has not run out of memory, and which may have more than was free there.
pub fn open(view: &View, model: usize) -> Vec<GpuSet> {
    let lacked = &view.models[model].lacked;
    let may_do = |set: GpuSet, (there, free): (GpuSet, u64)| {
        set != there && set.gpus().all(|device| size(view, device) >= free.saturating_add(MORE_BYTES))
    };
    aligned(view, model).filter(|set| lacked.iter().all(|it| may_do(*set, *it))).collect()
}

/// Whether a model fits somewhere on what is there now, if that is empty.
pub fn has_place(view: &View, model: usize) -> bool {
    aligned(view, model)
        .any(|set| set.gpus().all(|device| need(view.models[model].bytes, size(view, device)) <= size(view, device)))
}

/// Whether a model fits somewhere beside all workers that keep their devices.
pub fn has_room(view: &View, model: usize) -> bool {
    aligned(view, model).any(|set| fits(view, model, set, &[]))
}

/// Memory that a model takes on a device of this size.
fn need(bytes: Option<u64>, device: u64) -> u64 {
    bytes.unwrap_or(device).max(1)
}

fn size(view: &View, device: u32) -> u64 {
    view.devices[device as usize].max(1)
}

/// Memory that a worker takes on one of its devices; all of it on its way there, if nobody is to be beside it.
pub fn taken(view: &View, worker: &WorkerView, device: u32) -> u64 {
    let (model, size) = (view.model_of(worker), size(view, device));
    let is_on_its_way = matches!(worker.phase, Phase::Waiting | Phase::Loading { .. });
    if model.apart && is_on_its_way { size } else { need(model.bytes, size) }
}

/// Whether a model fits somewhere on this box when it is empty. A box without devices of its kind says nothing.
pub fn fits_the_box(view: &View, model: usize) -> bool {
    let is_cpu = view.models[model].gpus == 0;
    let has_any = if is_cpu { view.devices.len() > view.gpus as usize } else { view.gpus > 0 };
    !has_any || has_place(view, model)
}

/// Memory in use on a set by workers that keep their devices, in bytes; with those that leave if `leaving`.
pub fn used(view: &View, set: GpuSet, leaving: bool) -> u64 {
    let on_device = |device: u32| -> u64 {
        let workers = view.workers.iter().filter(|w| w.set.has(device) && (leaving || w.stays()));
        workers.map(|worker| taken(view, worker, device)).sum()
    };
    set.gpus().map(on_device).sum()
}

/// Bytes that are missing on a device for one more worker of `model`, besides the workers in `out`.
fn missing(view: &View, model: usize, device: u32, out: &[usize]) -> u64 {
    let (size, m) = (size(view, device), &view.models[model]);
    let must_leave = |worker: &WorkerView| m.apart && !view.model_of(worker).pin;
    let has_to = staying(view, device, out).any(must_leave);
    let used = if has_to { size } else { used_beside(view, device, out) };
    (used + need(m.bytes, size)).saturating_sub(size)
}

/// Workers that keep a device, but those in `out`.
fn staying<'a>(view: &'a View, device: u32, out: &'a [usize]) -> impl Iterator<Item = &'a WorkerView> {
    let all = view.workers.iter().enumerate();
    all.filter(move |(i, w)| w.set.has(device) && w.stays() && !out.contains(i)).map(|(_, worker)| worker)
}

/// Memory in use on a device by workers that keep it, but those in `out`; bytes.
fn used_beside(view: &View, device: u32, out: &[usize]) -> u64 {
    staying(view, device, out).map(|worker| taken(view, worker, device)).sum()
}

/// Whether a worker of `model` fits on a set only if parked ones of other models are dropped there, when those in `out` have
/// left. One that takes whole devices takes what is free.
pub fn is_tight(view: &View, model: usize, set: GpuSet, out: &[usize]) -> bool {
    let Some(bytes) = view.models[model].bytes else { return false };
    let kept = |device: u32| -> u64 {
        let there = view.residues.iter().filter(|r| r.model != model && r.set.has(device));
        there.map(|residue| residue.bytes).sum()
    };
    set.gpus().any(|device| used_beside(view, device, out) + kept(device) + bytes > size(view, device))
}

/// Whether a worker of `model` fits on a set when those in `out` have left.
pub fn fits(view: &View, model: usize, set: GpuSet, out: &[usize]) -> bool {
    set.gpus().all(|device| missing(view, model, device, out) == 0)
}

/// The workers that must leave a set for one of `model` to fit: the cheapest of those with a cost, as few as do. `costs`:
/// by worker, `None`: it stays. `None`: it does not fit whoever leaves.
pub fn victims(view: &View, model: usize, set: GpuSet, costs: &[Option<f64>]) -> Option<Vec<usize>> {
    let mut out: Vec<usize> = Vec::new();
    if fits(view, model, set, &out) {
        return Some(out);
    }
    let cost = |worker: usize| costs.get(worker).copied().flatten();
    let mut candidates: Vec<(usize, f64)> = (0..view.workers.len())
        .filter(|worker| view.workers[*worker].set.overlaps(set) && view.workers[*worker].stays())
        .filter_map(|worker| cost(worker).map(|cost| (worker, cost)))
        .collect();
    candidates.sort_by(|a, b| a.1.total_cmp(&b.1));
    for (worker, _) in &candidates {
        let helps =
            set.gpus().any(|device| view.workers[*worker].set.has(device) && missing(view, model, device, &out) > 0);
        if helps {
            out.push(*worker);
        }
    }
    if !fits(view, model, set, &out) {
        return None;
    }
    // Small ones that a larger one has made needless stay; the dearest first.
    for (worker, _) in candidates.iter().rev() {
        if let Some(place) = out.iter().position(|other| other == worker) {
            out.remove(place);
            if !fits(view, model, set, &out) {
                out.insert(place, *worker);
            }
        }
    }
    Some(out)
}
