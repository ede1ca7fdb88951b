//! A power cut at every sync of a recorded run, and at random with parts of what was not synced: nothing that was promised
//! is lost. The same harness sees the loss when commits do not wait for the disk, and when a promise comes too early.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use super::engine::Engine;
use super::ledger::Ledger;
use super::replay::{Disk, Log, Random, Record, Torn, seed};
use super::shim;
use super::workload::{self, Manners};

const DIR: &str = "ROUNDHOUSE_TEST_POWER_DIR";
const MODE: &str = "ROUNDHOUSE_TEST_POWER_MODE";
/// Rounds of all verbs by each hand.
const ROUNDS: usize = 3;

/// Random cuts; `ROUNDHOUSE_POWER_CUTS` sets it.
fn cuts() -> usize {
    std::env::var("ROUNDHOUSE_POWER_CUTS").map_or(60, |text| text.parse().expect("ROUNDHOUSE_POWER_CUTS is a number"))
}

/// What the recorded process does: not a test of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_recorded_process() {
    let (Ok(dir), Ok(mode)) = (std::env::var(DIR), std::env::var(MODE)) else { return };
    let manners = if mode == "early" { Manners::Early } else { Manners::Honest };
    workload::run(Path::new(&dir), ROUNDS, mode != "normal", manners).await.expect("the work is done");
}

struct Recorded {
    _dir: tempfile::TempDir,
    log: Log,
    before: PathBuf,
}

/// Runs the process on an empty data dir, or on one of the first release.
fn record(mode: &str, from_first_release: bool) -> Recorded {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().canonicalize().unwrap();
    let (before, data, log) = (root.join("before"), root.join("data"), root.join("log"));
    for folder in [&before, &data] {
        std::fs::create_dir_all(folder).unwrap();
        if from_first_release {
            let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/schema-1/roundhouse.db");
            std::fs::copy(fixture, folder.join("roundhouse.db")).unwrap();
        }
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "power_cut::the_recorded_process", "--nocapture"])
        .env(DIR, &data)
        .env(MODE, mode)
        .envs(shim::recording(&data, &log))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "the recorded process failed:\n{said}");
    let log = Log::read(&log, &data);
    Recorded { _dir: dir, log, before }
}

/// What a cut cost.
#[derive(Debug, Default)]
struct Outcome {
    cuts: usize,
    promises: usize,
    broken: Vec<String>,
}

/// Cuts the power after record `at` and looks at what is left.
async fn look(disk: &Disk<'_>, ledger: &Ledger, torn: Torn<'_>, what: &str, first_number: i64, outcome: &mut Outcome) {
    let left = tempfile::tempdir().unwrap();
    disk.cut(left.path(), torn);
    outcome.cuts += 1;
    outcome.promises = ledger.promises();
    let opened = Engine::open(left.path(), true, Arc::new(|_| {})).await;
    let broken = match opened {
        Ok(engine) => ledger.broken_promises(&engine, first_number).await,
        // Before anything was promised there may be no database yet; it must never be one that does not open.
        Err(error) => vec![format!("does not open: {error}")],
    };
    outcome.broken.extend(broken.into_iter().map(|text| format!("{what}: {text}")));
}

async fn cut_everywhere(recorded: &Recorded, seed: u64, random_cuts: usize, first_number: i64) -> Outcome {
    let records = &recorded.log.records;
    let mut random = Random::new(seed);
    let at_random: std::collections::BTreeMap<usize, usize> =
        (0..random_cuts).fold(Default::default(), |mut all, _| {
            *all.entry(random.below(records.len())).or_default() += 1;
            all
        });
    let mut disk = Disk::new(&recorded.log, &recorded.before);
    let mut ledger = Ledger::default();
    let mut outcome = Outcome::default();
    for (index, record) in records.iter().enumerate() {
        // The worst moment is just before a sync ends: all before it was said, nothing of it is safe.
        if matches!(record, Record::Sync { .. }) {
            look(&disk, &ledger, Torn::Nothing, &format!("before sync {index}"), first_number, &mut outcome).await;
        }
        disk.play(record);
        if let Record::Output { data } = record {
            ledger.read(recorded.log.text(data));
        }
        for cut in 0..at_random.get(&index).copied().unwrap_or(0) {
            let what = format!("random cut {cut} after record {index}");
            look(&disk, &ledger, Torn::AtRandom(&mut random), &what, first_number, &mut outcome).await;
        }
    }
    look(&disk, &ledger, Torn::Nothing, "at the end", first_number, &mut outcome).await;
    look(&disk, &ledger, Torn::Everything, "killed at the end", first_number, &mut outcome).await;
    assert!(ledger.has_ended(), "the process did all its work");
    assert_eq!(ledger.states().len(), 4, "jobs of all fates: {:?}", ledger.states());
    outcome
}

#[tokio::test]
async fn nothing_promised_is_lost_wherever_the_power_is_cut() {
    let seed = seed("nothing_promised_is_lost_wherever_the_power_is_cut");
    let outcome = cut_everywhere(&record("full", false), seed, cuts(), 1).await;
    assert!(outcome.cuts > 50 && outcome.promises > 50, "{} cuts, {} promises", outcome.cuts, outcome.promises);
    assert!(outcome.broken.is_empty(), "{} broken promises, the first: {}", outcome.broken.len(), outcome.broken[0]);
    println!("{} cuts, {} promises, none broken", outcome.cuts, outcome.promises);
}

#[tokio::test]
async fn nor_in_the_middle_of_a_migration() {
    let seed = seed("nor_in_the_middle_of_a_migration");
    let outcome = cut_everywhere(&record("full", true), seed, cuts() / 2, 11).await;
    assert!(outcome.broken.is_empty(), "{} broken promises, the first: {}", outcome.broken.len(), outcome.broken[0]);
}

#[tokio::test]
async fn the_harness_sees_what_is_lost_without_waiting_for_the_disk() {
    let seed = seed("the_harness_sees_what_is_lost_without_waiting_for_the_disk");
    let outcome = cut_everywhere(&record("normal", false), seed, 10, 1).await;
    assert!(outcome.broken.iter().any(|text| text.contains("is lost")), "{outcome:?}");
}

#[tokio::test]
async fn the_harness_sees_a_promise_that_comes_too_early() {
    let seed = seed("the_harness_sees_a_promise_that_comes_too_early");
    let outcome = cut_everywhere(&record("early", false), seed, 10, 1).await;
    assert!(outcome.broken.iter().any(|text| text.contains("is lost")), "{outcome:?}");
}
