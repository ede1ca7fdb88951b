//! The power is cut at any moment: what was promised is there afterwards. A recorded run is played onto a model of the
//! disk, and at every sync what that disk may hold is opened and compared with the promises made until then.
//!
//! The same look must find losses where there are some: without syncs at commits, and with promises made too early.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use roundhouse::store::StoreError;

use super::engine::{self, Engine};
use super::ledger::Ledger;
use super::replay::{Disk, Log, Random, Record, Torn, seed};
use super::{damage, is_long, shim, store_child};

/// Rounds of each hand: enough for checkpoints, bodies in files, and everything in between.
const ROUNDS: usize = 3;
/// Torn states of the disk that are looked at, without and with `ROUNDHOUSE_SOAK`.
const TORN: usize = 60;
const TORN_LONG: usize = 1_000;

/// A run of the workload, recorded.
struct Run {
    _dir: tempfile::TempDir,
    log: Log,
    before: std::path::PathBuf,
}

/// The workload on a new data dir; `mode`: see `child`.
fn record(mode: &str) -> Run {
    record_on(mode, |_| {})
}

/// The same on what `make` puts into a folder.
fn record_on(mode: &str, make: impl Fn(&Path)) -> Run {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().canonicalize().unwrap();
    let (data, before, log) = (root.join("data"), root.join("before"), root.join("log"));
    for folder in [&data, &before] {
        std::fs::create_dir(folder).unwrap();
        make(folder);
    }
    let output = store_child(mode, &data, ROUNDS).envs(shim::recording(&data, &log)).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let log = Log::read(&log, &data);
    Run { _dir: dir, log, before }
}

/// One state of the disk.
async fn look(disk: &Disk<'_>, torn: Torn<'_>, ledger: &Ledger) -> Vec<String> {
    let dir = tempfile::tempdir().unwrap();
    disk.cut(dir.path(), torn);
    let engine = match open(dir.path()).await {
        Ok(engine) => engine,
        Err(error) => return vec![format!("it does not open: {error}")],
    };
    let mut broken = ledger.broken_promises(&engine).await;
    // What was recovered is no dead end.
    let next = engine::id(engine.next_number());
    if let Err(error) = engine.insert(&[(next, 10)]).await {
        broken.push(format!("it takes no job: {error}"));
    }
    drop(engine);
    engine::closed(dir.path()).await;
    broken
}

async fn open(dir: &Path) -> Result<Engine, StoreError> {
    Engine::open(dir, engine::settings(true), Arc::new(|reason| panic!("{reason}"))).await
}

/// Looks at the disk before each sync (of all that is promised by then, as little is safe as can be) and, `torn` times in
/// all, at a part of what was not synced. Returns what was lost, and stops after the first few.
async fn losses(run: &Run, torn: usize, random: &mut Random) -> (usize, Vec<String>) {
    let mut disk = Disk::new(&run.log, &run.before);
    let mut ledger = Ledger::default();
    let syncs = run.log.records.iter().filter(|record| matches!(record, Record::Sync { .. })).count();
    let (mut looked, mut lost) = (0, Vec::new());
    let mut nth = 0;
    for (place, record) in run.log.records.iter().enumerate() {
        if matches!(record, Record::Sync { .. }) {
            nth += 1;
            // As many at each sync, and the rest spread out.
            let here = torn * nth / syncs - torn * (nth - 1) / syncs;
            for state in 0..=here {
                let was = random.clone();
                let (name, torn) = match state {
                    0 => ("nothing that was not synced".to_owned(), Torn::Nothing),
                    _ => (format!("a part of it, {was:?}"), Torn::AtRandom(random)),
                };
                looked += 1;
                let broken = look(&disk, torn, &ledger).await;
                if !broken.is_empty() {
                    let parts = disk.unsafe_parts();
                    lost.push(format!(
                        "before sync {nth} of {syncs} (record {place}), with {name} of {parts:?}: {broken:?}"
                    ));
                }
                if lost.len() >= 3 {
                    return (looked, lost);
                }
            }
        }
        if let Record::Output { data } = record {
            ledger.read(run.log.text(data));
        }
        disk.play(record);
    }
    assert!(ledger.has_ended(), "the run was recorded to its end");
    for torn in [Torn::Nothing, Torn::Everything] {
        let broken = look(&disk, torn, &ledger).await;
        if !broken.is_empty() {
            lost.push(format!("at the end: {broken:?}"));
        }
    }
    (looked, lost)
}

#[tokio::test]
async fn what_was_promised_outlives_a_power_cut_at_any_sync() {
    let seed = seed("power cut");
    let run = record("honest");
    checks_what_it_says(&run);
    let torn = if is_long() { TORN_LONG } else { TORN };
    let (looked, lost) = losses(&run, torn, &mut Random::new(seed)).await;
    eprintln!("power cut: {looked} states of the disk, {} records", run.log.records.len());
    assert!(lost.is_empty(), "ROUNDHOUSE_TEST_SEED={seed}\n{}", lost.join("\n"));
    assert!(looked > torn, "{looked}");
}

/// The recorded run has in it what the test is about.
fn checks_what_it_says(run: &Run) {
    let mut ledger = Ledger::default();
    let (mut files, mut opened, mut checkpoints) = (BTreeSet::new(), std::collections::HashMap::new(), 0);
    let mut last_synced = None;
    for record in &run.log.records {
        match record {
            Record::Output { data } => ledger.read(run.log.text(data)),
            Record::Open { file, path, .. } => drop(opened.insert(*file, path.clone())),
            Record::Rename { to, .. } => drop(files.insert(to.clone())),
            Record::Sync { file } => {
                let path = opened[file].display().to_string();
                // The database is written at checkpoints only.
                checkpoints +=
                    usize::from(path == "roundhouse.db" && last_synced.as_deref() == Some("roundhouse.db-wal"));
                last_synced = Some(path);
            }
            _ => {}
        }
    }
    assert!(checkpoints > 3, "{checkpoints} checkpoints");
    assert!(files.len() > 5, "bodies and answers in files: {files:?}");
    assert!(ledger.promises() > 50 && ledger.states().len() >= 4, "{:?}", ledger.states());
}

#[tokio::test]
async fn the_same_look_sees_what_is_lost_without_syncs_at_commits() {
    let run = record("lazy");
    let (_, lost) = losses(&run, 0, &mut Random::new(1)).await;
    assert!(lost.iter().any(|loss| loss.contains("is lost")), "{lost:?}");
}

#[tokio::test]
async fn the_same_look_sees_promises_that_were_made_too_early() {
    let run = record("early");
    let (_, lost) = losses(&run, 0, &mut Random::new(1)).await;
    assert!(!lost.is_empty());
}

/// All that a data dir says, in words.
async fn told(dir: &Path) -> Vec<String> {
    let engine = match open(dir).await {
        Ok(engine) => engine,
        Err(error) => return vec![format!("it does not open: {error}")],
    };
    let mut told = Vec::new();
    for id in engine.ids().await.unwrap() {
        told.push(format!("{id}: {:?}", engine.look(id).await));
    }
    drop(engine);
    engine::closed(dir).await;
    told
}

#[tokio::test]
async fn a_migration_that_is_cut_off_loses_no_job_of_the_first_release() {
    let seed = seed("power cut in a migration");
    let mut random = Random::new(seed);
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/schema-1");
    let run = record_on("opens", |folder| damage::copy(&fixture, folder));
    let whole = tempfile::tempdir().unwrap();
    damage::copy(&fixture, whole.path());
    let expected = told(whole.path()).await;
    assert_eq!(expected.len(), 10, "{expected:?}");
    let mut disk = Disk::new(&run.log, &run.before);
    let mut looked = 0;
    for record in &run.log.records {
        if matches!(record, Record::Sync { .. }) {
            for state in 0..if is_long() { 50 } else { 3 } {
                let dir = tempfile::tempdir().unwrap();
                disk.cut(dir.path(), if state == 0 { Torn::Nothing } else { Torn::AtRandom(&mut random) });
                let found = told(dir.path()).await;
                assert_eq!(found, expected, "ROUNDHOUSE_TEST_SEED={seed}, state {looked}, {:?}", disk.unsafe_parts());
                looked += 1;
            }
        }
        disk.play(record);
    }
    eprintln!("power cut: {looked} states of the disk in a migration");
    assert!(looked > 20, "{looked}");
}
