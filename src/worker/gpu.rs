//! What the driver says about GPUs.

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
}
