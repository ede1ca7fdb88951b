//! What a process said it would do, and what it said is done: one line each on stdout. A store that is opened afterwards
//! must have all that is done; of what was only begun it may have all or nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;

use roundhouse::domain::{JobId, JobState};
use serde::{Deserialize, Serialize};

use super::engine::{self, Engine, Seen};

/// Begins each line of a ledger, between other things on the same stdout.
const MARK: &str = "@@ ";

/// What a job is after a verb and a restart: what ran waits again, what was being cancelled is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Step {
    pub(crate) number: i64,
    pub(crate) state: JobState,
    pub(crate) attempt: i64,
    pub(crate) failures: u32,
    /// About how long its body is.
    pub(crate) body: usize,
    /// About how long its answer is.
    pub(crate) answer: Option<usize>,
}

/// One line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Will {
        verb: u64,
        steps: Vec<Step>,
    },
    Did {
        verb: u64,
    },
    /// Everything was done.
    End,
}

/// Says what is about to be done; the number is for [`did`].
pub(crate) fn will(verb: u64, steps: Vec<Step>) {
    say(&Line::Will { verb, steps });
}

/// Promises what was said before.
pub(crate) fn did(verb: u64) {
    say(&Line::Did { verb });
}

/// The last line.
pub(crate) fn end() {
    say(&Line::End);
}

fn say(line: &Line) {
    // In one write, so that the shim's log has it in one piece.
    let text = format!("\n{MARK}{}\n", serde_json::to_string(line).unwrap());
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).unwrap();
    out.flush().unwrap();
}

/// All that was said up to some moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ledger {
    /// By number, in order.
    jobs: BTreeMap<i64, Vec<(u64, Step)>>,
    done: BTreeSet<u64>,
    has_ended: bool,
}

impl Ledger {
    /// Takes in more of stdout; lines are whole.
    pub(crate) fn read(&mut self, text: &str) {
        for line in text.lines().filter_map(|line| line.strip_prefix(MARK)) {
            match serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")) {
                Line::Will { verb, steps } => {
                    for step in steps {
                        self.jobs.entry(step.number).or_default().push((verb, step));
                    }
                }
                Line::Did { verb } => drop(self.done.insert(verb)),
                Line::End => self.has_ended = true,
            }
        }
    }

    /// Number of promises.
    pub(crate) fn promises(&self) -> usize {
        self.done.len()
    }

    /// Whether the process got to its end.
    pub(crate) fn has_ended(&self) -> bool {
        self.has_ended
    }

    /// States that are promised at the end, for a look at what the workload does.
    pub(crate) fn states(&self) -> BTreeSet<JobState> {
        self.jobs.values().filter_map(|steps| Some(steps.last()?.1.state)).collect()
    }

    /// What is wrong with a store that was opened after this; empty: nothing. Jobs below `first` were there before.
    pub(crate) async fn broken_promises(&self, engine: &Engine, first: i64) -> Vec<String> {
        let mut broken = Vec::new();
        for (number, steps) in &self.jobs {
            let promised = steps.iter().rposition(|(verb, _)| self.done.contains(verb));
            let seen = match engine.look(engine::id(*number)).await {
                Ok(seen) => seen,
                Err(error) => {
                    broken.push(format!("job {number} cannot be read: {error}"));
                    continue;
                }
            };
            let Some(seen) = seen else {
                if let Some(promised) = promised {
                    broken.push(format!("job {number} is lost; promised was {:?}", steps[promised].1));
                }
                continue;
            };
            let possible = &steps[promised.unwrap_or(0)..];
            let differences: Vec<String> = possible.iter().map(|(_, step)| difference(step, &seen)).collect();
            if !differences.iter().any(String::is_empty) {
                let promised = promised.map(|promised| &steps[promised].1);
                broken.push(format!("job {number}: promised was {promised:?}; it differs by {differences:?}"));
            }
        }
        match engine.ids().await {
            Err(error) => broken.push(format!("jobs cannot be listed: {error}")),
            Ok(ids) => {
                let before = ids.iter().filter(|id| id.number < first).count();
                if i64::try_from(before).unwrap() != first - 1 {
                    broken.push(format!("{before} of the {} jobs that were there before", first - 1));
                }
                let ids: Vec<JobId> = ids.into_iter().filter(|id| id.number >= first).collect();
                let unknown: Vec<&JobId> = ids.iter().filter(|id| !self.jobs.contains_key(&id.number)).collect();
                if !unknown.is_empty() {
                    broken.push(format!("nobody submitted {unknown:?}"));
                }
                if ids.iter().any(|id| *id != engine::id(id.number)) {
                    broken.push(format!("an id has changed: {ids:?}"));
                }
            }
        }
        broken
    }
}

/// How a job that was read back differs from what it should be.
fn difference(step: &Step, seen: &Seen) -> String {
    let mut found = Vec::new();
    if (seen.state, seen.attempt, seen.failures) != (step.state, step.attempt, step.failures) {
        found.push(format!("{} attempt {} failures {}", seen.state, seen.attempt, seen.failures));
    }
    if seen.body != engine::body(step.number, step.body) {
        found.push("its body".to_owned());
    }
    let answer = step.answer.map(|size| engine::answer(step.number, step.attempt, size));
    if seen.answer != answer {
        found.push("its answer".to_owned());
    }
    if seen.has_gaps {
        found.push("gaps between its events".to_owned());
    }
    if seen.state.is_terminal() && seen.last_event != format!("job.{}", seen.state) {
        found.push(format!("its last event, {}", seen.last_event));
    }
    found.join(", ")
}
