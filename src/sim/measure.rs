//! The measures of a simulation, as `tests/traces/README.md` defines them.

use super::Trace;
use super::record::Record;
use crate::domain::Class;

/// How long after the last arrival the tenants' shares are compared.
const SHARES_AFTER_S: f64 = 60.0;
/// What the clock of the state machine cannot tell.
const CLOCK_S: f64 = 0.002;
/// The tenant that `sparse_p99` leaves out.
const FLOODING: &str = "t0";

/// Columns of `simulate --csv` and of `reference.csv`.
pub const COLUMNS: [&str; 20] = [
    "trace",
    "policy",
    "swaps",
    "wakes",
    "busy%",
    "makespan",
    "int_mean",
    "int_p50",
    "int_p99",
    "int_max",
    "bat_mean",
    "bat_p50",
    "bat_p99",
    "bat_max",
    "dl_miss%",
    "jain",
    "span/LB",
    "sparse_p99",
    "jobs_per_hour",
    "lower_bound_s",
];

/// One row.
#[derive(Clone, Debug, PartialEq)]
pub struct Measures {
    /// Name of the trace.
    pub trace: String,
    /// Name of the policy.
    pub policy: String,
    /// The other columns, in the order of [`COLUMNS`].
    pub values: [f64; 18],
}

impl Measures {
    /// Measures what a policy did with a trace.
    pub fn of(trace: &Trace, policy: &str, record: &Record) -> Self {
        let makespan = record.jobs.iter().filter_map(|job| job.end_s).fold(0.0, f64::max);
        let ready = record.visits.iter().filter(|visit| visit.ready_at.is_some());
        let swaps = ready.clone().count() as f64;
        let wakes = ready.filter(|visit| visit.wake).count() as f64;
        let waits = |keep: &dyn Fn(usize) -> bool| Waits::of(trace, record, keep);
        let interactive = waits(&|job| trace.jobs[job].class == Class::Interactive);
        let batch = waits(&|job| trace.jobs[job].class == Class::Batch);
        let sparse = waits(&|job| trace.tenants[trace.jobs[job].tenant] != FLOODING);
        let bound = trace.lower_bound_s();
        let values = [
            swaps,
            wakes,
            100.0 * record.gpu_busy_s / (makespan * trace.gpus as f64).max(f64::MIN_POSITIVE),
            makespan,
            interactive.mean(),
            interactive.percentile(50),
            interactive.percentile(99),
            interactive.percentile(100),
            batch.mean(),
            batch.percentile(50),
            batch.percentile(99),
            batch.percentile(100),
            missed_percent(trace, record),
            jain(trace, record),
            makespan / bound.max(f64::MIN_POSITIVE),
            sparse.percentile(99),
            trace.jobs.len() as f64 / makespan.max(f64::MIN_POSITIVE) * 3600.0,
            bound,
        ];
        Self { trace: trace.name.clone(), policy: policy.to_owned(), values }
    }

    /// A value by the name of its column; `None` for an unknown name and for those that are text.
    pub fn get(&self, column: &str) -> Option<f64> {
        let index = COLUMNS.iter().position(|name| *name == column)?;
        self.values.get(index.checked_sub(2)?).copied()
    }

    /// The row as `--csv` prints it: two decimals, the last two columns whole.
    pub fn csv(&self) -> String {
        let mut line = format!("{},{}", self.trace, self.policy);
        for (index, value) in self.values.iter().enumerate() {
            let decimals = if index >= 16 { 0 } else { 2 };
            line.push_str(&format!(",{value:.decimals$}"));
        }
        line
    }

    /// Reads a line of `reference.csv`; `None` if it is none.
    pub fn from_csv(line: &str) -> Option<Self> {
        let mut fields = line.trim_end().split(',');
        let (trace, policy) = (fields.next()?.to_owned(), fields.next()?.to_owned());
        let values: Vec<f64> = fields.map(|field| field.parse().ok()).collect::<Option<_>>()?;
        Some(Self { trace, policy, values: values.try_into().ok()? })
    }
}

/// How good the ranges were that jobs of a class were told for their start when they arrived. Jobs that started in the same
/// moment do not count.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Told {
    /// Jobs that were told one, and started.
    pub jobs: usize,
    /// Of these, how many started within it, in percent.
    pub within_percent: f64,
    /// Width of the range over the wait, the median.
    pub width: f64,
}

impl Told {
    /// Compares what was told with what came; `None`: nobody was told anything.
    pub fn of(trace: &Trace, record: &Record, class: Class) -> Option<Self> {
        let mut within = 0;
        let mut widths = Vec::new();
        for (job, life) in trace.jobs.iter().zip(&record.jobs) {
            let (Some((from, to)), Some(start)) = (life.told_s, life.start_s) else { continue };
            if job.class == class && start > job.arrival_s + CLOCK_S {
                within += usize::from(from - CLOCK_S <= start && start <= to + CLOCK_S);
                widths.push((to - from) / (start - job.arrival_s));
            }
        }
        widths.sort_by(f64::total_cmp);
        let width = *widths.get(widths.len() / 2)?;
        Some(Self { jobs: widths.len(), within_percent: 100.0 * within as f64 / widths.len() as f64, width })
    }
}

/// Waits of some jobs, in order.
struct Waits(Vec<f64>);

impl Waits {
    fn of(trace: &Trace, record: &Record, keep: &dyn Fn(usize) -> bool) -> Self {
        let jobs = record.jobs.iter().enumerate().filter(|(job, _)| keep(*job));
        // A job that was never served waited until it was given up.
        let mut waits: Vec<f64> =
            jobs.filter_map(|(job, life)| Some(life.start_s.or(life.end_s)? - trace.jobs[job].arrival_s)).collect();
        waits.sort_by(f64::total_cmp);
        Self(waits)
    }

    fn mean(&self) -> f64 {
        if self.0.is_empty() { 0.0 } else { self.0.iter().sum::<f64>() / self.0.len() as f64 }
    }

    /// The smallest wait that more than `percent` of all do not exceed.
    fn percentile(&self, percent: usize) -> f64 {
        let above = self.0.len() * percent / 100;
        self.0.get(above.min(self.0.len().saturating_sub(1))).copied().unwrap_or(0.0)
    }
}

fn missed_percent(trace: &Trace, record: &Record) -> f64 {
    let (mut with, mut missed) = (0_usize, 0_usize);
    for (job, life) in trace.jobs.iter().zip(&record.jobs) {
        if let Some(deadline) = job.deadline_s {
            with += 1;
            let is_kept = life.start_s.is_some() && life.end_s.is_some_and(|end| end <= deadline);
            missed += usize::from(!is_kept);
        }
    }
    if with == 0 { 0.0 } else { 100.0 * missed as f64 / with as f64 }
}

/// Jain's index over tenants of what each got until shortly after the last arrival, over its max-min fair share of all that
/// was done by then. Work is counted in solo seconds times GPUs.
fn jain(trace: &Trace, record: &Record) -> f64 {
    let until = trace.jobs.iter().map(|job| job.arrival_s).fold(0.0, f64::max) + SHARES_AFTER_S;
    let mut asked = vec![0.0; trace.tenants.len()];
    let mut got = vec![0.0; trace.tenants.len()];
    for (job, life) in trace.jobs.iter().zip(&record.jobs) {
        let work = job.work_s * trace.models[job.model].gpus as f64;
        asked[job.tenant] += work;
        let (Some(start), Some(end)) = (life.start_s, life.end_s) else { continue };
        let done = if end <= until { 1.0 } else { ((until - start) / (end - start)).max(0.0) };
        got[job.tenant] += work * done;
    }
    let shares = fair_shares(&asked, got.iter().sum());
    let ratios: Vec<f64> =
        got.iter().zip(&shares).filter(|(_, share)| **share > 0.0).map(|(got, share)| got / share).collect();
    let (sum, squares) = ratios.iter().fold((0.0, 0.0), |(sum, squares), x| (sum + x, squares + x * x));
    if squares == 0.0 { 1.0 } else { sum * sum / (ratios.len() as f64 * squares) }
}

/// Max-min fair: whoever asks for less than an equal part gets all of it, the others share what is left equally.
fn fair_shares(asked: &[f64], whole: f64) -> Vec<f64> {
    let mut order: Vec<usize> = (0..asked.len()).collect();
    order.sort_by(|a, b| asked[*a].total_cmp(&asked[*b]));
    let mut shares = vec![0.0; asked.len()];
    let mut left = whole;
    for (place, tenant) in order.iter().enumerate() {
        shares[*tenant] = asked[*tenant].min(left / (asked.len() - place) as f64);
        left -= shares[*tenant];
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_waits_that_were_there() {
        let waits = Waits((1..=200).map(f64::from).collect());
        assert_eq!([0, 50, 99, 100].map(|p| waits.percentile(p)), [1.0, 101.0, 199.0, 200.0]);
        assert_eq!(Waits(Vec::new()).percentile(99), 0.0);
    }

    #[test]
    fn shares_are_max_min_fair() {
        assert_eq!(fair_shares(&[10.0, 1.0, 4.0], 9.0), [4.0, 1.0, 4.0]);
        assert_eq!(fair_shares(&[10.0, 1.0, 2.0], 9.0), [6.0, 1.0, 2.0]);
    }

    #[test]
    fn a_row_survives_its_text() {
        let mut values = [0.0; 18];
        values.iter_mut().enumerate().for_each(|(i, v)| *v = i as f64 * 1.25);
        let row = Measures { trace: "t".to_owned(), policy: "p".to_owned(), values };
        let read = Measures::from_csv(&row.csv()).unwrap();
        assert_eq!((read.get("swaps"), read.get("span/LB"), read.get("policy")), (Some(0.0), Some(17.5), None));
        assert_eq!(Measures::from_csv(&COLUMNS.join(",")), None);
    }
}
