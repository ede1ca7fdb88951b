//! What the state machine is told and what it asks for: events in, effects out.

use super::*;

/// Something that happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// Committed jobs that wait now.
    Queued(Vec<QueuedJob>),
    /// A claim was committed; `lost` were not queued any more.
    Claimed {
        /// Entry name.
        model: Arc<str>,
        /// Numbers that are not this run's after all.
        lost: Vec<i64>,
    },
    /// The store refused a claim: the jobs are queued as before.
    Unclaimed {
        /// Entry name.
        model: Arc<str>,
        /// Their numbers.
        numbers: Vec<i64>,
    },
    /// A worker has answered a job whole and is done with it: its slot is free. The answer is on its way to the store.
    Answered {
        /// Entry name.
        model: Arc<str>,
        /// Its number; it is under way until `Ended`.
        number: i64,
    },
    /// The end of an attempt is committed; its slot is free, if it was not already.
    Ended {
        /// Entry name.
        model: Arc<str>,
        /// The job.
        number: i64,
        /// It was answered: its time counts as a sample. Stands for `Answered` as well, if nobody has told that.
        answered: bool,
        /// Its worker could not be reached or broke the connection.
        suspect: bool,
        /// The job waits again; committed.
        back: Option<Back>,
    },
    /// A running job ran out of memory; it is about to go back, or has failed.
    OutOfMemory {
        /// Entry name.
        model: Arc<str>,
        /// Its number; it counts as running until `Ended`.
        number: i64,
        /// Jobs of its run.
        jobs: u32,
    },
    /// What the shape of a running job is, in words.
    Shape {
        /// Entry name.
        model: Arc<str>,
        /// Its number.
        number: i64,
        /// See `domain::shape::words`.
        words: String,
    },
    /// A waiting job is not to be scheduled any more: it was cancelled; committed.
    Gone {
        /// Entry name.
        model: String,
        /// Of the job.
        priority: u8,
        /// The job.
        number: i64,
    },
    /// A supervisor's report.
    Report {
        /// Entry name.
        model: String,
        /// Which of its workers.
        replica: u32,
        /// What it says.
        report: Report,
    },
    /// The fetching task says something about a model's weights.
    Fetch {
        /// Entry name.
        model: String,
        /// The number of the want that it answers; see [`Effect::Fetch`].
        want: u64,
        /// What it says.
        report: Box<FetchReport>,
    },
    /// The GPUs that are there now: memory in bytes, by the driver's numbers.
    Devices(BTreeMap<u32, u64>),
    /// An operator says something.
    Control(Control),
    /// Waiting jobs with numbers below `before` are to be cancelled. Some at a time: ask again until there is no effect.
    Purge {
        /// Entry name; `None`: of all models.
        model: Option<String>,
        /// The number after the last of them.
        before: i64,
    },
    /// So many were.
    Purged {
        /// As in `Purge`.
        model: Option<String>,
        /// How many.
        removed: usize,
    },
    /// Entries of models.yaml were edited.
    Edited(Vec<Edit>),
    /// Waiting jobs ask for an endpoint that their model's entry does not list now; see [`Event::Edited`], which lets them in
    /// again.
    Unserved {
        /// Entry name.
        model: String,
        /// Their priority and number.
        jobs: Vec<(u8, i64)>,
        /// It was seen when they were to be claimed: they are on their way to a worker here.
        claimed: bool,
    },
    /// The server is stopping: nothing new starts.
    Stop,
}

/// How a job comes back to the queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Back {
    /// Not to be claimed before.
    pub not_before: Option<Millis>,
    /// The death of a worker that it was part of.
    pub crash: Option<i64>,
}

/// A place on a worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Number of the worker among those of its model.
    pub replica: u32,
    /// Where the worker answers.
    pub base_url: String,
    /// Which load it is from: jobs that are lost with it died together.
    pub load: i64,
    /// Most jobs in one run of its model.
    pub max_batch: u32,
    /// The GPUs that the worker is on; `None`: on the CPU, or nobody knows.
    pub gpus: Option<GpuSet>,
}

/// Something to be done.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Claim these jobs, then send them to the worker.
    Claim {
        /// Entry name.
        model: Arc<str>,
        /// Where they go.
        place: Place,
        /// The jobs.
        run: Run,
    },
    /// Give a supervisor an order.
    Order {
        /// Entry name.
        model: String,
        /// Which of its workers; they are numbered from 0.
        replica: u32,
        /// The devices it holds, or is to be loaded on.
        set: GpuSet,
        /// The order.
        order: Order,
        /// With a load: most host memory that the copy of its weights may take, in bytes; `None`: it is never parked.
        park_bytes: Option<u64>,
        /// With a load: nobody waits for it.
        at_leisure: bool,
    },
    /// Look for the weights of a model, and fetch them if they are not here.
    Fetch {
        /// Entry name.
        model: String,
        /// The number of this want, which its reports carry: those of an earlier one may still be on their way.
        want: u64,
    },
    /// End the fetch of a model's weights; what has come stays.
    EndFetch {
        /// Entry name.
        model: String,
    },
    /// End the attempts of running jobs whose GPU has vanished, or whose worker hangs for another's sake: they wait again,
    /// uncharged.
    Evict {
        /// The jobs.
        numbers: Vec<i64>,
    },
    /// End waiting jobs with an error: `expired` if `overdue`, else `failed`.
    EndQueued {
        /// The jobs.
        numbers: Vec<i64>,
        /// Why.
        error: JobError,
        /// A deadline passed.
        overdue: bool,
    },
    /// Cancel jobs that waited; nothing else will be done with them.
    CancelQueued(Vec<i64>),
    /// Tell waiting jobs that their model is being loaded.
    TellLoading {
        /// The jobs.
        numbers: Vec<i64>,
        /// Entry name.
        model: String,
        /// When it should be ready.
        eta: Millis,
    },
    /// Add a load's time to the jobs that waited for it.
    AddLoadTime {
        /// The jobs.
        numbers: Vec<i64>,
        /// Its length.
        load_ms: i64,
    },
    /// Keep what was learned.
    Learn {
        /// Entry name.
        model: String,
        /// All of it.
        learned: Learned,
    },
    /// Keep how much tenants were served: weighted GPU ms by name.
    Served(Vec<(String, f64)>),
    /// Log a decision that was made, or a reason to wait that is a new one: all that is kept of them.
    Announce(Arc<Decision>),
}
