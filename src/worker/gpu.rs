//! What the driver says about GPUs.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nvml_wrapper::Nvml;
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::struct_wrappers::device::ProcessInfo;
use serde::Deserialize;

use crate::worker::fake_gpus::FakeGpus;

/// One GPU as the driver sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// Index as in `nvidia-smi`.
    pub index: u32,
    /// Product name.
    pub name: String,
    /// All of its memory, in bytes.
    pub total_bytes: u64,
    /// Memory in use by anybody, in bytes.
    pub used_bytes: u64,
}

/// Asks about GPUs. Blocking, a few ms.
pub trait GpuProbe: Send + Sync + 'static {
    /// The GPUs of this box; empty without driver or card.
    fn gpus(&self) -> Vec<Gpu>;

    /// Memory in use on a GPU by process, in bytes; `None`: the driver does not say now. In a container it may show none of the
    /// processes, or know them by other numbers.
    fn users(&self, _gpu: u32) -> Option<Vec<(u32, u64)>> {
        None
    }

    /// A worker, by its mark and process, says that it takes so many bytes on each of these GPUs; 0: it is gone. A driver
    /// knows that by itself.
    fn hold(&self, _worker: (&str, u32), _gpus: &[u32], _bytes: u64) {}
}

/// The probe that the environment names: `ROUNDHOUSE_FAKE_GPUS` or `ROUNDHOUSE_GPU_PROBE`, by their values; the driver
/// without either, as far as `CUDA_VISIBLE_DEVICES` shows it. An error names the variable.
pub fn from_environment(
    fake: Option<&str>,
    probe: Option<&str>,
    visible: Option<String>,
) -> Result<Arc<dyn GpuProbe>, String> {
    let set = |value: Option<&str>| value.is_some_and(|text| !text.trim().is_empty());
    match fake.filter(|_| set(fake)) {
        Some(_) if set(probe) => {
            Err("ROUNDHOUSE_FAKE_GPUS and ROUNDHOUSE_GPU_PROBE are both set; unset one of them".to_owned())
        }
        Some(text) => match FakeGpus::parse(text) {
            Ok(gpus) => Ok(Arc::new(gpus)),
            Err(error) => Err(format!("ROUNDHOUSE_FAKE_GPUS: {error}")),
        },
        None if matches!(probe.map(str::trim), None | Some("" | "nvml")) => {
            Ok(Arc::new(NvmlProbe { visible, ..NvmlProbe::default() }))
        }
        None => from_setting(probe).map_err(|error| format!("ROUNDHOUSE_GPU_PROBE: {error}")),
    }
}

/// The probe that a setting names: `nvml` (the default), `none`, or `dir:<path>` for a [`FakeProbe`].
pub fn from_setting(setting: Option<&str>) -> Result<Arc<dyn GpuProbe>, String> {
    match setting.map(str::trim) {
        None | Some("" | "nvml") => Ok(Arc::new(NvmlProbe::default())),
        Some("none") => Ok(Arc::new(NoGpus)),
        Some(text) => match text.strip_prefix("dir:") {
            Some(dir) if !dir.is_empty() => Ok(Arc::new(FakeProbe::new(dir))),
            _ => Err(format!("the GPU probe `{text}` is unknown: use `nvml`, `none` or `dir:<folder>`")),
        },
    }
}

/// Never sees a GPU.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoGpus;

impl GpuProbe for NoGpus {
    fn gpus(&self) -> Vec<Gpu> {
        Vec::new()
    }
}

/// Asks NVIDIA's driver through NVML. The library is loaded at the first question, and again after a failure: a driver may
/// come later, or come back.
#[derive(Debug, Default)]
pub struct NvmlProbe {
    nvml: Mutex<Option<Nvml>>,
    /// `CUDA_VISIBLE_DEVICES` of the server: what it hides is not for our workers either.
    visible: Option<String>,
}

/// Whether a list of numbers and ids (or their beginnings) shows this GPU; no list shows all.
fn is_visible(list: Option<&str>, index: u32, uuid: &str) -> bool {
    let names = |word: &str| word == index.to_string() || (word.starts_with("GPU-") && uuid.starts_with(word));
    list.is_none_or(|list| list.split(',').map(str::trim).any(names))
}

impl GpuProbe for NvmlProbe {
    fn users(&self, gpu: u32) -> Option<Vec<(u32, u64)>> {
        let nvml = self.nvml.lock().unwrap_or_else(PoisonError::into_inner);
        let read = || {
            let device = nvml.as_ref()?.device_by_index(gpu).ok()?;
            let (compute, graphics) =
                (device.running_compute_processes().ok()?, device.running_graphics_processes().ok()?);
            let bytes = |process: &ProcessInfo| match process.used_gpu_memory {
                UsedGpuMemory::Used(bytes) => bytes,
                UsedGpuMemory::Unavailable => 0,
            };
            let mut users: BTreeMap<u32, u64> = BTreeMap::new();
            // One that does both is in both lists, with all of its memory.
            for process in compute.iter().chain(&graphics) {
                let most = users.entry(process.pid).or_default();
                *most = bytes(process).max(*most);
            }
            Some(users.into_iter().collect())
        };
        read()
    }

    fn gpus(&self) -> Vec<Gpu> {
        let mut nvml = self.nvml.lock().unwrap_or_else(PoisonError::into_inner);
        if nvml.is_none() {
            match Nvml::init() {
                Ok(loaded) => *nvml = Some(loaded),
                Err(error) => {
                    tracing::debug!("no NVIDIA driver: {error}");
                    return Vec::new();
                }
            }
        }
        let Some(loaded) = nvml.as_ref() else {
            return Vec::new();
        };
        read_nvml(loaded, self.visible.as_deref()).unwrap_or_else(|error| {
            tracing::warn!("the NVIDIA driver does not tell its GPUs: {error}");
            *nvml = None;
            Vec::new()
        })
    }
}

fn read_nvml(nvml: &Nvml, visible: Option<&str>) -> Result<Vec<Gpu>, NvmlError> {
    (0..nvml.device_count()?)
        .filter_map(|index| match read_one(nvml, index, visible) {
            // One that has fallen off the bus takes none of the others along.
            Err(NvmlError::GpuLost | NvmlError::NotFound) => {
                tracing::debug!(gpu = index, "the NVIDIA driver has lost a GPU");
                None
            }
            read => read.transpose(),
        })
        .collect()
}

/// `None`: it is hidden.
fn read_one(nvml: &Nvml, index: u32, visible: Option<&str>) -> Result<Option<Gpu>, NvmlError> {
    let device = nvml.device_by_index(index)?;
    if visible.is_some() && !is_visible(visible, index, &device.uuid()?) {
        return Ok(None);
    }
    let memory = device.memory_info()?;
    Ok(Some(Gpu { index, name: device.name()?, total_bytes: memory.total, used_bytes: memory.used }))
}

/// A folder that plays the driver, for tests. `gpus.json` lists the cards (`[{"index","name","total_bytes"}]`; no file: no
/// GPU). A file named by a process id holds the bytes which that process uses on the first card, for as long as the file is
/// there: as with a real driver, that may be longer than the process lives.
#[derive(Clone, Debug)]
pub struct FakeProbe {
    dir: PathBuf,
}

#[derive(Deserialize)]
struct FakeGpu {
    index: u32,
    name: String,
    total_bytes: u64,
}

impl FakeProbe {
    /// Reads `dir` at each question.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    fn by_process(&self) -> Vec<(u32, u64)> {
        let Ok(entries) = std::fs::read_dir(&self.dir) else {
            return Vec::new();
        };
        let read = |entry: std::fs::DirEntry| {
            let pid = entry.file_name().to_str()?.parse::<u32>().ok()?;
            let text = std::fs::read_to_string(entry.path()).ok()?;
            Some((pid, text.trim().parse::<u64>().ok()?))
        };
        entries.flatten().filter_map(read).collect()
    }
}

impl GpuProbe for FakeProbe {
    /// Says nothing as long as there is a file `no-pids`, as in a container.
    fn users(&self, gpu: u32) -> Option<Vec<(u32, u64)>> {
        let is_first = self.gpus().first().is_some_and(|first| first.index == gpu);
        let says = !self.dir.join("no-pids").exists();
        says.then(|| if is_first { self.by_process() } else { Vec::new() })
    }

    fn gpus(&self) -> Vec<Gpu> {
        let path = self.dir.join("gpus.json");
        let Ok(text) = std::fs::read(&path) else {
            return Vec::new();
        };
        let listed: Vec<FakeGpu> = serde_json::from_slice(&text).unwrap_or_else(|error| {
            tracing::warn!(path = %path.display(), "the fake GPUs cannot be read: {error}");
            Vec::new()
        });
        let used = self.by_process().iter().map(|(_, bytes)| bytes).sum();
        listed
            .into_iter()
            .enumerate()
            .map(|(at, gpu)| Gpu {
                index: gpu.index,
                name: gpu.name,
                total_bytes: gpu.total_bytes,
                used_bytes: if at == 0 { used } else { 0 },
            })
            .collect()
    }
}

/// Waits until the driver has stopped giving memory back, at most `limit`: after processes were killed that held some.
pub async fn settled(probe: Arc<dyn GpuProbe>, limit: Duration) {
    let until = tokio::time::Instant::now() + limit;
    let mut before = used_bytes(probe.clone()).await;
    while before > 0 && tokio::time::Instant::now() < until {
        tokio::time::sleep(SETTLE_EVERY).await;
        let now = used_bytes(probe.clone()).await;
        if now >= before {
            return;
        }
        before = now;
    }
}

/// A driver takes up to 1.5 s to free a dead process's memory, in steps.
const SETTLE_EVERY: Duration = Duration::from_millis(1_500);

async fn used_bytes(probe: Arc<dyn GpuProbe>) -> u64 {
    tokio::task::spawn_blocking(move || probe.gpus().iter().map(|gpu| gpu.used_bytes).sum()).await.unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_plays_the_driver() {
        let dir = tempfile::tempdir().unwrap();
        let setting = format!("dir:{}", dir.path().display());
        let probe = from_setting(Some(&setting)).unwrap();
        assert_eq!(probe.gpus(), []);

        std::fs::write(
            dir.path().join("gpus.json"),
            r#"[{"index":0,"name":"Fake","total_bytes":100},{"index":1,"name":"Fake","total_bytes":50}]"#,
        )
        .unwrap();
        std::fs::write(dir.path().join("12"), "30\n").unwrap();
        std::fs::write(dir.path().join("13"), "5").unwrap();
        std::fs::write(dir.path().join("13.tmp"), "7").unwrap();
        let used: Vec<u64> = probe.gpus().iter().map(|g| g.used_bytes).collect();
        assert_eq!(used, [35, 0]);
        assert_eq!(probe.gpus()[1].total_bytes, 50);
    }

    #[test]
    fn settings() {
        assert!(from_setting(None).is_ok());
        assert_eq!(from_setting(Some("none")).unwrap().gpus(), []);
        let Err(refused) = from_setting(Some("rocm")) else { panic!("accepted") };
        assert!(refused.contains("`rocm`") && refused.contains("dir:<folder>"));
    }

    #[test]
    fn what_the_server_must_not_see_is_hidden_from_workers() {
        let seen = |list: Option<&str>| -> Vec<u32> {
            (0..3).filter(|index| is_visible(list, *index, &format!("GPU-{index}abc"))).collect()
        };
        assert_eq!(seen(None), [0, 1, 2]);
        assert_eq!(seen(Some("2, 0")), [0, 2]);
        assert_eq!(seen(Some("GPU-1a")), [1]);
        assert_eq!((seen(Some("")), seen(Some("-1"))), (vec![], vec![]));
    }

    #[test]
    fn the_environment_names_one_probe() {
        assert_eq!(from_environment(Some("2x80GiB"), Some(" "), None).unwrap().gpus().len(), 2);
        assert_eq!(from_environment(Some(""), Some("none"), None).unwrap().gpus(), []);
        let both = from_environment(Some("2x80GiB"), Some("none"), None).err().unwrap();
        assert!(both.contains("both set"), "{both}");
        let wrong = from_environment(Some("2x"), None, None).err().unwrap();
        assert!(wrong.starts_with("ROUNDHOUSE_FAKE_GPUS: `2x` "), "{wrong}");
    }

    #[test]
    fn a_box_without_driver_has_no_gpus() {
        // On a box with one, this reads the real cards; both must not fail.
        for gpu in NvmlProbe::default().gpus() {
            assert!(gpu.total_bytes > 0);
        }
    }
}
