//! `/metrics`: every series of this program, in one table and one function.

use std::fmt::{Display, Write as _};

use crate::domain::JobState;
use crate::scheduler::handle::{Counters, QueueView};
use crate::store::StoreMetrics;

/// Name, type and help of every series.
pub const SERIES: [(&str, &str, &str); 29] = [
    ("roundhouse_jobs", "gauge", "Jobs that have not ended, by model and state."),
    ("roundhouse_jobs_ended_total", "counter", "Jobs that ended since the server started, by state."),
    ("roundhouse_swaps_total", "counter", "Loads of a model after another one had held the device."),
    ("roundhouse_swaps_in_arrival_order_total", "counter", "Swaps that arrival order would have cost."),
    ("roundhouse_load_seconds", "summary", "Time of cold loads until ready, by model."),
    ("roundhouse_load_phase_seconds", "summary", "Time of the parts of cold loads, by model and phase."),
    ("roundhouse_wake_seconds", "summary", "Time of wakes from host memory until ready, by model."),
    ("roundhouse_failed_loads_total", "counter", "Loads that failed, by model."),
    ("roundhouse_worker_deaths_total", "counter", "Times a ready worker died, by model."),
    ("roundhouse_stale_results_total", "counter", "Results of old attempts that were dropped."),
    ("roundhouse_wait_seconds", "histogram", "Time from acceptance to the first claim."),
    ("roundhouse_oldest_pending_seconds", "gauge", "Age of the oldest job that waits, by model; 0: none waits."),
    ("roundhouse_waiting_sync_calls", "gauge", "Sync calls whose callers hold the line."),
    ("roundhouse_batch_size", "gauge", "Jobs in a pass when enough wait, as learned, by model and shape."),
    ("roundhouse_model_state", "gauge", "1 for the state each model is in."),
    ("roundhouse_store_commit_seconds", "summary", "Time of commits; quantiles of the latest 4096."),
    ("roundhouse_store_group_size", "summary", "Operations per commit; quantile 1 of the latest 4096."),
    ("roundhouse_store_wal_bytes", "gauge", "Size of the write-ahead log."),
    ("roundhouse_store_database_bytes", "gauge", "Size of the database's file."),
    ("roundhouse_store_used_bytes", "gauge", "What jobs take: pages of the database in use, and files."),
    ("roundhouse_store_quota_bytes", "gauge", "What they may take."),
    ("roundhouse_store_stale_writes_total", "counter", "Writes under an old attempt that were dropped."),
    ("roundhouse_store_rescues_total", "counter", "Jobs given back after their worker or the server had died."),
    ("roundhouse_store_emptied_total", "counter", "Ended jobs whose content was deleted."),
    ("roundhouse_store_deleted_total", "counter", "Ended jobs whose row was deleted."),
    ("roundhouse_store_purge_lag_seconds", "gauge", "How long the oldest job to be deleted has waited for it."),
    ("roundhouse_store_missing_files", "gauge", "Files that jobs name and that are lost or damaged."),
    ("roundhouse_store_recovery_seconds", "gauge", "How long opening the store took at the start."),
    ("roundhouse_uptime_seconds", "gauge", "Time since the server started."),
];

/// What is rendered.
pub struct Seen<'a> {
    /// The latest view.
    pub queue: &'a QueueView,
    /// Since start.
    pub counters: &'a Counters,
    /// The store's own.
    pub store: &'a StoreMetrics,
    /// Waiting now.
    pub sync_calls: usize,
    /// Since start.
    pub uptime_s: f64,
}

/// Prometheus text format 0.0.4.
pub fn render(seen: &Seen<'_>) -> String {
    let mut out = String::with_capacity(4 * 1024);
    for (name, kind, help) in SERIES {
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
        samples(name, seen, &mut out);
    }
    out
}

fn timed_by_model(out: &mut String, name: &str, counts: &std::collections::BTreeMap<String, (u64, f64)>) {
    for (model, (count, seconds)) in counts {
        sample(out, &format!("{name}_sum"), &[("model", model)], seconds);
        sample(out, &format!("{name}_count"), &[("model", model)], count);
    }
}

fn samples(name: &str, seen: &Seen<'_>, out: &mut String) {
    let Seen { queue, counters, store, .. } = seen;
    match name {
        "roundhouse_jobs" => {
            for model in &queue.models {
                sample(out, name, &[("model", &model.model), ("state", "queued")], model.queued);
                sample(out, name, &[("model", &model.model), ("state", "running")], model.running);
            }
        }
        "roundhouse_jobs_ended_total" => {
            for state in JobState::ALL.iter().filter(|state| state.is_terminal()) {
                let count = counters.ended.get(state).copied().unwrap_or(0);
                sample(out, name, &[("state", state.as_str())], count);
            }
        }
        "roundhouse_swaps_total" => sample(out, name, &[], queue.swaps),
        "roundhouse_swaps_in_arrival_order_total" => sample(out, name, &[], queue.swaps_in_arrival_order),
        "roundhouse_load_seconds" => timed_by_model(out, name, &counters.loads),
        "roundhouse_load_phase_seconds" => {
            for ((model, phase), (count, seconds)) in &counters.load_phases {
                sample(out, "roundhouse_load_phase_seconds_sum", &[("model", model), ("phase", phase)], seconds);
                sample(out, "roundhouse_load_phase_seconds_count", &[("model", model), ("phase", phase)], count);
            }
        }
        "roundhouse_wake_seconds" => timed_by_model(out, name, &counters.wakes),
        "roundhouse_failed_loads_total" => by_model(out, name, &counters.failed_loads),
        "roundhouse_worker_deaths_total" => by_model(out, name, &counters.worker_deaths),
        "roundhouse_stale_results_total" => sample(out, name, &[], counters.stale_results),
        "roundhouse_wait_seconds" => {
            for (bound, count) in &counters.wait_buckets {
                sample(out, "roundhouse_wait_seconds_bucket", &[("le", &bound.to_string())], count);
            }
            sample(out, "roundhouse_wait_seconds_bucket", &[("le", "+Inf")], counters.wait_count);
            sample(out, "roundhouse_wait_seconds_sum", &[], counters.wait_sum_s);
            sample(out, "roundhouse_wait_seconds_count", &[], counters.wait_count);
        }
        "roundhouse_oldest_pending_seconds" => {
            for model in &queue.models {
                sample(out, name, &[("model", &model.model)], model.oldest_age_s.unwrap_or(0.0));
            }
        }
        "roundhouse_store_commit_seconds" => {
            sample(out, name, &[("quantile", "0.5")], store.commit_p50_s);
            sample(out, name, &[("quantile", "0.99")], store.commit_p99_s);
            sample(out, "roundhouse_store_commit_seconds_sum", &[], store.commit_seconds);
            sample(out, "roundhouse_store_commit_seconds_count", &[], store.commits);
        }
        "roundhouse_store_group_size" => {
            sample(out, name, &[("quantile", "1")], store.group_max);
            sample(out, "roundhouse_store_group_size_sum", &[], store.operations);
            sample(out, "roundhouse_store_group_size_count", &[], store.commits);
        }
        "roundhouse_store_wal_bytes" => sample(out, name, &[], store.wal_bytes),
        "roundhouse_store_database_bytes" => sample(out, name, &[], store.database_bytes),
        "roundhouse_store_used_bytes" => sample(out, name, &[], store.stored_bytes),
        "roundhouse_store_quota_bytes" => sample(out, name, &[], store.quota_bytes),
        "roundhouse_store_stale_writes_total" => sample(out, name, &[], store.stale_writes),
        "roundhouse_store_rescues_total" => sample(out, name, &[], store.rescues),
        "roundhouse_store_emptied_total" => sample(out, name, &[], store.emptied),
        "roundhouse_store_deleted_total" => sample(out, name, &[], store.deleted),
        "roundhouse_store_purge_lag_seconds" => sample(out, name, &[], store.purge_lag_s),
        "roundhouse_store_missing_files" => sample(out, name, &[], store.missing_files),
        "roundhouse_store_recovery_seconds" => sample(out, name, &[], store.recovery_seconds),
        "roundhouse_waiting_sync_calls" => sample(out, name, &[], seen.sync_calls),
        "roundhouse_batch_size" => {
            for model in &queue.models {
                for shape in &model.batching {
                    let labels = [("model", &*model.model), ("shape", &*shape.shape), ("key", &*shape.key)];
                    sample(out, name, &labels, shape.batch_size);
                }
            }
        }
        "roundhouse_model_state" => {
            for model in &queue.models {
                sample(out, name, &[("model", &model.model), ("state", model.state.as_str())], 1);
            }
        }
        "roundhouse_uptime_seconds" => sample(out, name, &[], seen.uptime_s),
        _ => {}
    }
}

fn by_model(out: &mut String, name: &str, counts: &std::collections::BTreeMap<String, u64>) {
    for (model, count) in counts {
        sample(out, name, &[("model", model)], count);
    }
}

fn sample(out: &mut String, name: &str, labels: &[(&str, &str)], value: impl Display) {
    out.push_str(name);
    for (index, (label, text)) in labels.iter().enumerate() {
        let text = escaped(text);
        let _ = write!(out, "{}{label}=\"{text}\"", if index == 0 { '{' } else { ',' });
    }
    let close = if labels.is_empty() { "" } else { "}" };
    let _ = writeln!(out, "{close} {value}");
}

/// The text of a label as the format has it between quotes.
pub(super) fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_series_of_the_table_is_rendered() {
        let counters = Counters {
            ended: [(JobState::Succeeded, 3)].into(),
            loads: [("a\"b".to_owned(), (2, 3.5))].into(),
            load_phases: [(("flux".to_owned(), "read".to_owned()), (2, 1.5))].into(),
            wakes: [("flux".to_owned(), (2, 0.5))].into(),
            failed_loads: [("flux".to_owned(), 1)].into(),
            worker_deaths: [("flux".to_owned(), 4)].into(),
            stale_results: 5,
            wait_buckets: vec![(0.5, 1), (60.0, 2)],
            wait_sum_s: 70.25,
            wait_count: 3,
        };
        let shape = crate::scheduler::handle::ShapeView {
            shape: "size 64x64".to_owned(),
            key: "00ff".to_owned(),
            batch_size: 4,
            max_batch: 8,
            per_s: vec![(1, 0.5)],
        };
        let model = crate::scheduler::handle::ModelQueueView {
            paused: false,
            draining: false,
            pinned: false,
            batching: vec![shape],
            parking: None,
            model: "flux".into(),
            queued: 7,
            queued_interactive: 0,
            running: 1,
            oldest_age_s: Some(2.5),
            resident: true,
            est_wait_s: None,
            swap_cost_s: 0.0,
            due_at: None,
            state: crate::domain::ModelState::Resident,
            state_reason: None,
            trouble: None,
            last_failure: None,
            fetch: None,
        };
        let queue = QueueView { swaps: 6, swaps_in_arrival_order: 9, models: vec![model], ..QueueView::default() };
        let store = StoreMetrics {
            commits: 4,
            operations: 9,
            commit_seconds: 0.5,
            commit_p99_s: 0.25,
            group_max: 5,
            quota_bytes: 1_000,
            ..StoreMetrics::default()
        };
        let text = render(&Seen { queue: &queue, counters: &counters, store: &store, sync_calls: 8, uptime_s: 1.5 });
        for (name, _, _) in SERIES {
            let samples = text.lines().filter(|line| !line.starts_with('#') && line.starts_with(name)).count();
            assert!(samples > 0, "{name} has no sample");
        }
        for line in [
            "roundhouse_jobs{model=\"flux\",state=\"queued\"} 7",
            "roundhouse_jobs_ended_total{state=\"succeeded\"} 3",
            "roundhouse_jobs_ended_total{state=\"failed\"} 0",
            "roundhouse_load_seconds_sum{model=\"a\\\"b\"} 3.5",
            "roundhouse_load_phase_seconds_sum{model=\"flux\",phase=\"read\"} 1.5",
            "roundhouse_wait_seconds_bucket{le=\"0.5\"} 1",
            "roundhouse_wait_seconds_bucket{le=\"+Inf\"} 3",
            "roundhouse_batch_size{model=\"flux\",shape=\"size 64x64\",key=\"00ff\"} 4",
            "roundhouse_waiting_sync_calls 8",
            "roundhouse_oldest_pending_seconds{model=\"flux\"} 2.5",
            "roundhouse_store_commit_seconds{quantile=\"0.99\"} 0.25",
            "roundhouse_store_commit_seconds_sum 0.5",
            "roundhouse_store_commit_seconds_count 4",
            "roundhouse_store_group_size{quantile=\"1\"} 5",
            "roundhouse_store_group_size_sum 9",
            "roundhouse_store_quota_bytes 1000",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\n{text}");
        }
    }
}
