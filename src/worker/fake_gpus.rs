//! GPUs that are not there, for tests and for trying things out on a box without any. Their free memory is what the workers
//! on them leave, as these say themselves (`device_bytes` of their health).

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use crate::worker::gpu::{Gpu, GpuProbe};

/// GPUs that a text describes: `4x80GiB`, or `4x80GiB without 1,3` when some of them are not to be seen; or a file with such
/// a text (`@PATH`), which is read at each look, so that GPUs can vanish and come back. No file, or an empty one: no GPU.
#[derive(Debug)]
pub struct FakeGpus {
    source: Source,
    /// By worker.
    held: Mutex<BTreeMap<String, Held>>,
}

/// Process, GPUs and bytes on each.
type Held = (u32, Vec<u32>, u64);

#[derive(Debug)]
enum Source {
    Fixed(Seen),
    File(PathBuf),
}

/// What a text describes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Seen {
    count: u32,
    total_bytes: u64,
    without: Vec<u32>,
}

/// Most GPUs that a text may ask for.
const COUNT_MAX: u32 = 64;

impl FakeGpus {
    /// From the value of `ROUNDHOUSE_FAKE_GPUS`; an error says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let source = match text.trim().strip_prefix('@') {
            Some(path) => {
                let path = PathBuf::from(path);
                read(&path)?;
                Source::File(path)
            }
            None => Source::Fixed(parse(text)?),
        };
        Ok(Self { source, held: Mutex::default() })
    }
}

fn read(path: &PathBuf) -> Result<Seen, String> {
    match std::fs::read_to_string(path) {
        Ok(text) if text.trim().is_empty() => Ok(Seen::default()),
        Ok(text) => parse(&text).map_err(|error| format!("{}: {error}", path.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Seen::default()),
        Err(error) => Err(format!("{} cannot be read: {error}", path.display())),
    }
}

fn parse(text: &str) -> Result<Seen, String> {
    let text = text.trim();
    let wrong =
        |what: &str| format!("`{text}` {what}; write NxSIZE, as 4x80GiB or 4x80GiB without 1,3, or @PATH of a file");
    let (all, gone) = text.split_once(" without ").unwrap_or((text, ""));
    let (count, size) = all.trim().split_once('x').ok_or_else(|| wrong("has no `x`"))?;
    let count: u32 = count.parse().map_err(|_| wrong("does not start with a number of GPUs"))?;
    if count == 0 || count > COUNT_MAX {
        return Err(wrong("asks for a number of GPUs that is not from 1 to 64"));
    }
    let units = [("GiB", 1_u64 << 30), ("MiB", 1 << 20)];
    let sized = units.iter().find_map(|(unit, bytes)| Some((size.strip_suffix(unit)?, bytes)));
    let (number, unit) = sized.ok_or_else(|| wrong("has a size that ends neither in GiB nor in MiB"))?;
    let number: u64 = number.parse().ok().filter(|n| *n > 0).ok_or_else(|| wrong("has a size that is no number"))?;
    let total_bytes = number.checked_mul(*unit).ok_or_else(|| wrong("has a size that is too large"))?;
    let without = gone.split(',').map(str::trim).filter(|word| !word.is_empty());
    let without = without.map(|word| word.parse().ok().filter(|index| *index < count));
    let without: Option<Vec<u32>> = without.collect();
    Ok(Seen { count, total_bytes, without: without.ok_or_else(|| wrong("leaves out a GPU that it does not have"))? })
}

impl GpuProbe for FakeGpus {
    fn gpus(&self) -> Vec<Gpu> {
        let seen = match &self.source {
            Source::Fixed(seen) => seen.clone(),
            Source::File(path) => read(path).unwrap_or_else(|error| {
                tracing::warn!("ROUNDHOUSE_FAKE_GPUS: {error}");
                Seen::default()
            }),
        };
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let used = |index| held.values().filter(|(_, gpus, _)| gpus.contains(&index)).map(|(.., bytes)| bytes).sum();
        (0..seen.count)
            .filter(|index| !seen.without.contains(index))
            .map(|index| Gpu { index, name: "fake".to_owned(), total_bytes: seen.total_bytes, used_bytes: used(index) })
            .collect()
    }

    fn users(&self, gpu: u32) -> Option<Vec<(u32, u64)>> {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let on_it = held.values().filter(|(_, gpus, _)| gpus.contains(&gpu));
        Some(on_it.map(|(pid, _, bytes)| (*pid, *bytes)).collect())
    }

    fn hold(&self, (worker, pid): (&str, u32), gpus: &[u32], bytes: u64) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if bytes == 0 {
            held.remove(worker);
        } else {
            held.insert(worker.to_owned(), (pid, gpus.to_vec(), bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(probe: &FakeGpus) -> Vec<(u32, u64, u64)> {
        probe.gpus().iter().map(|gpu| (gpu.index, gpu.total_bytes >> 30, gpu.used_bytes)).collect()
    }

    #[test]
    fn a_text_describes_gpus_and_workers_take_their_memory() {
        let probe = FakeGpus::parse("3x80GiB").unwrap();
        probe.hold(("a", 10), &[0, 1], 7);
        probe.hold(("b", 11), &[1], 5);
        assert_eq!(seen(&probe), [(0, 80, 7), (1, 80, 12), (2, 80, 0)]);
        assert_eq!(probe.users(1), Some(vec![(10, 7), (11, 5)]));
        assert_eq!(probe.users(2), Some(Vec::new()));
        probe.hold(("a", 10), &[0, 1], 0);
        assert_eq!(seen(&probe), [(0, 80, 0), (1, 80, 5), (2, 80, 0)]);
    }

    #[test]
    fn gpus_of_a_file_vanish_and_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("gpus");
        let probe = FakeGpus::parse(&format!("@{}", path.display())).unwrap();
        assert_eq!(seen(&probe), []);
        std::fs::write(&path, "3x2GiB without 1\n").unwrap();
        assert_eq!(seen(&probe), [(0, 2, 0), (2, 2, 0)]);
        std::fs::write(&path, "3x2GiB\n").unwrap();
        assert_eq!(seen(&probe).len(), 3);
    }

    #[test]
    fn what_is_wrong_is_said() {
        let wrong = [
            ("80GiB", "has no `x`"),
            ("fourx80GiB", "number of GPUs"),
            ("0x80GiB", "from 1 to 64"),
            ("4x80GB", "neither in GiB nor in MiB"),
            ("4x-1GiB", "is no number"),
            ("4x80GiB without 4", "does not have"),
        ];
        for (text, what) in wrong {
            let error = FakeGpus::parse(text).unwrap_err();
            assert!(error.contains(what) && error.contains(text) && error.contains("NxSIZE"), "{error}");
        }
    }
}
