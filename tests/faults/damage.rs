//! Damaged files: a start recovers what SQLite promises, or refuses and says what to do. No job is ever silently another
//! one.

use std::path::Path;
use std::sync::Arc;

use roundhouse::domain::{JobId, JobState};
use roundhouse::store::StoreError;

use super::engine::{self, Engine, SMALL, Seen};

const JOBS: i64 = 300;
const PAGE: usize = 4096;

/// A data dir with queued and succeeded jobs; `live`: copied while the store was open, with its write-ahead log.
async fn data_dir(live: bool) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let engine = Engine::open(dir.path(), true, Arc::new(|reason| panic!("{reason}"))).await.unwrap();
    let ids: Vec<JobId> = (1..=JOBS).map(engine::id).collect();
    for chunk in ids.chunks(50) {
        let jobs: Vec<(JobId, usize)> = chunk.iter().map(|id| (*id, SMALL)).collect();
        engine.insert(&jobs).await.unwrap();
        for token in engine.claim(&chunk[..20]).await.unwrap() {
            engine.succeed(token, SMALL, false).await.unwrap();
        }
    }
    if live {
        let copy = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(dir.path()).unwrap() {
            let entry = entry.unwrap();
            if entry.path().is_file() {
                std::fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
            }
        }
        return copy;
    }
    drop(engine);
    let wal = dir.path().join("roundhouse.db-wal");
    super::common::eventually(super::common::LIMIT, "the store has closed", || async {
        let is_written = std::fs::metadata(&wal).map_or(true, |file| file.len() == 0);
        // The lock is the last that it lets go, and a process that is being started has it for a moment, too.
        let is_free = || std::fs::File::open(dir.path().join("lock")).is_ok_and(|lock| lock.try_lock().is_ok());
        (is_written && is_free()).then_some(())
    })
    .await;
    dir
}

fn is_right(id: JobId, seen: &Seen) -> bool {
    let answer = (seen.state == JobState::Succeeded).then(|| engine::answer(id.number, 1, SMALL));
    let is_known = matches!(seen.state, JobState::Succeeded | JobState::Queued);
    is_known && seen.body == engine::body(id.number, SMALL) && seen.answer == answer && !seen.has_gaps
}

/// Opens a damaged data dir. Jobs found, or why not; panics if a job is wrong.
async fn open(dir: &Path) -> Result<usize, StoreError> {
    let engine = Engine::open(dir, true, Arc::new(|_| {})).await?;
    let mut found = 0;
    for number in 1..=JOBS {
        let id = engine::id(number);
        if let Some(seen) = engine.look(id).await? {
            assert!(is_right(id, &seen), "job {number} is another one: {seen:?}");
            found += 1;
        }
    }
    Ok(found)
}

fn overwrite(file: &Path, at: usize, len: usize, with: u8) {
    let mut bytes = std::fs::read(file).unwrap();
    let end = (at + len).min(bytes.len());
    bytes[at..end].fill(with);
    std::fs::write(file, bytes).unwrap();
}

#[tokio::test]
async fn a_database_without_its_head_is_refused_and_the_way_out_is_said() {
    for with in [0, 0xa5] {
        let dir = data_dir(false).await;
        overwrite(&dir.path().join("roundhouse.db"), 0, 100, with);
        let error = open(dir.path()).await.expect_err("refused").to_string();
        assert!(error.contains("roundhouse.db") && error.contains("roundhouse restore"), "{error}");
    }
}

#[tokio::test]
async fn a_database_that_was_cut_short_is_refused() {
    let dir = data_dir(false).await;
    let file = dir.path().join("roundhouse.db");
    let half = std::fs::metadata(&file).unwrap().len() / 2;
    std::fs::File::options().write(true).open(&file).unwrap().set_len(half).unwrap();
    let error = open(dir.path()).await.expect_err("refused");
    assert!(matches!(error, StoreError::Corrupt(_)), "{error}");
}

#[tokio::test]
async fn a_page_of_garbage_is_seen_or_does_not_matter() {
    let clean = data_dir(false).await;
    let pages = std::fs::metadata(clean.path().join("roundhouse.db")).unwrap().len() as usize / PAGE;
    let mut refused = 0;
    for page in (1..pages).step_by((pages / 40).max(1)) {
        for with in [0, 0xff] {
            let dir = tempfile::tempdir().unwrap();
            std::fs::copy(clean.path().join("roundhouse.db"), dir.path().join("roundhouse.db")).unwrap();
            overwrite(&dir.path().join("roundhouse.db"), page * PAGE, PAGE, with);
            match open(dir.path()).await {
                Ok(found) => {
                    assert_eq!(found, usize::try_from(JOBS).unwrap(), "page {page}: jobs are missing in silence")
                }
                Err(StoreError::Corrupt(_)) => refused += 1,
                Err(error) => panic!("page {page}: {error}"),
            }
        }
    }
    assert!(refused > 20, "{refused} pages were seen to be damaged");
}

#[tokio::test]
async fn a_damaged_page_is_found_by_the_start_and_not_by_somebodys_job() {
    let clean = data_dir(false).await;
    let pages = std::fs::metadata(clean.path().join("roundhouse.db")).unwrap().len() as usize / PAGE;
    let (mut found, mut tried) = (0, 0);
    for page in (1..pages).step_by((pages / 20).max(1)) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(clean.path().join("roundhouse.db"), dir.path().join("roundhouse.db")).unwrap();
        overwrite(&dir.path().join("roundhouse.db"), page * PAGE, PAGE, 0xff);
        tried += 1;
        // Nothing is read that a start does not read.
        if let Err(error) = Engine::open(dir.path(), true, Arc::new(|_| {})).await {
            let error = error.to_string();
            assert!(error.contains("roundhouse.db") && error.contains("roundhouse doctor --deep"), "{error}");
            found += 1;
        }
    }
    assert!(found * 10 >= tried * 9, "{found} of {tried} were found");
}

#[tokio::test]
async fn a_log_that_was_cut_or_overwritten_costs_at_most_what_was_in_it() {
    let clean = data_dir(true).await;
    let log = std::fs::read(clean.path().join("roundhouse.db-wal")).unwrap();
    assert!(log.len() > 20 * PAGE, "there is a log: {}", log.len());
    let all = usize::try_from(JOBS).unwrap();
    let damages: [(&str, Vec<u8>); 5] = [
        ("whole", log.clone()),
        ("cut", log[..log.len() / 2 + 17].to_vec()),
        ("its end overwritten", [&log[..log.len() / 2], &vec![0x5a; log.len() / 2][..]].concat()),
        ("garbage", vec![0xa5; log.len()]),
        ("empty", Vec::new()),
    ];
    for (what, bytes) in damages {
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(clean.path().join("roundhouse.db"), dir.path().join("roundhouse.db")).unwrap();
        std::fs::write(dir.path().join("roundhouse.db-wal"), bytes).unwrap();
        match open(dir.path()).await {
            Ok(found) if what == "whole" => assert_eq!(found, all),
            Ok(found) => assert!(found <= all, "{what}"),
            // The database's own file may be older than its first migration.
            Err(error) => panic!("{what}: {error}"),
        }
    }
}

#[tokio::test]
async fn a_stale_index_of_the_log_is_made_anew() {
    let dir = data_dir(true).await;
    std::fs::write(dir.path().join("roundhouse.db-shm"), vec![0x77; 32_768]).unwrap();
    assert_eq!(open(dir.path()).await.unwrap(), usize::try_from(JOBS).unwrap());
}
