//! Sets of GPUs that one worker is loaded on.

use std::fmt;

use serde::Serialize;

/// Neighbouring GPUs of one box: those from `first` on, `count` of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct GpuSet {
    /// Number of the first one.
    pub first: u32,
    /// How many; at least 1.
    pub count: u32,
}

impl GpuSet {
    /// A single GPU.
    pub const fn one(first: u32) -> Self {
        Self { first, count: 1 }
    }

    /// Numbers of its GPUs.
    pub fn gpus(self) -> std::ops::Range<u32> {
        self.first..self.first + self.count
    }

    /// Whether it holds this GPU.
    pub fn has(self, gpu: u32) -> bool {
        self.gpus().contains(&gpu)
    }

    /// Whether the two have a GPU in common.
    pub fn overlaps(self, other: Self) -> bool {
        self.first < other.first + other.count && other.first < self.first + self.count
    }
}

impl fmt::Display for GpuSet {
    /// `gpu0` or `gpu0-3`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.count {
            1 => write!(f, "gpu{}", self.first),
            _ => write!(f, "gpu{}-{}", self.first, self.first + self.count - 1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_overlap_if_they_share_a_gpu() {
        let pair = GpuSet { first: 2, count: 2 };
        assert!(pair.overlaps(GpuSet::one(3)) && pair.overlaps(GpuSet { first: 0, count: 4 }) && pair.has(2));
        assert!(!pair.overlaps(GpuSet::one(1)) && !pair.overlaps(GpuSet::one(4)) && !pair.has(4));
        assert_eq!((pair.to_string(), GpuSet::one(7).to_string()), ("gpu2-3".to_owned(), "gpu7".to_owned()));
    }
}
