//! What a simulation leaves behind: the lives of its jobs and of its workers. Measures and pictures are made of it.

use std::ops::Range;

/// A worker of one simulation: its place in [`Record::visits`].
pub type WorkerId = usize;

/// A worker's life, for measures and pictures. Times in seconds; `None`: has not come yet.
#[derive(Clone, Debug, PartialEq)]
pub struct Visit {
    /// Index into the trace's models.
    pub model: usize,
    /// Its GPUs.
    pub gpus: Range<usize>,
    /// Loaded from host memory.
    pub wake: bool,
    /// Goes to host memory in the end.
    pub parks: bool,
    /// When its load was ordered.
    pub load_at: f64,
    /// When it became ready.
    pub ready_at: Option<f64>,
    /// When it was told to leave.
    pub leave_at: Option<f64>,
    /// When its GPU memory was free.
    pub gone_at: Option<f64>,
    /// Jobs that ran on it.
    pub jobs: usize,
    /// Why it was loaded, in the policy's words.
    pub why: Option<String>,
}

/// What became of a job. Times in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct JobLife {
    /// When its service started.
    pub start_s: Option<f64>,
    /// When it ended, served or not.
    pub end_s: Option<f64>,
    /// Where it was served.
    pub worker: Option<WorkerId>,
    /// The range of time for its start that was told when it arrived, if it had to wait.
    pub told_s: Option<(f64, f64)>,
}

/// What a simulation leaves behind.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// By the trace's jobs.
    pub jobs: Vec<JobLife>,
    /// All workers, in order of their loads.
    pub visits: Vec<Visit>,
    /// Seconds with at least one job running, all GPUs together.
    pub gpu_busy_s: f64,
}
