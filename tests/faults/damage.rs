//! Files that are not as they were left: pages, the write-ahead log, the shared-memory file. The store recovers what can be
//! recovered, or refuses with a word that names the file and says what to do; it never makes a different job of one.

use std::path::Path;
use std::sync::Arc;

use roundhouse::store::StoreError;

use super::engine::{self, Engine};
use super::ledger::Ledger;
use super::replay::{Random, seed};
use super::store_child;

const PAGE: usize = 4096;

/// A data dir, and what was promised of it; `mode`: how the process ended.
fn made(mode: &str) -> (tempfile::TempDir, Ledger) {
    let dir = tempfile::tempdir().unwrap();
    let output = store_child(mode, dir.path(), 3).output().unwrap();
    let mut ledger = Ledger::default();
    ledger.read(&String::from_utf8_lossy(&output.stdout));
    assert!(ledger.has_ended(), "{}", String::from_utf8_lossy(&output.stderr));
    (dir, ledger)
}

/// Copies a folder.
pub(crate) fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy(&path, &target);
        } else {
            std::fs::copy(&path, &target).unwrap();
        }
    }
}

async fn open(dir: &Path) -> Result<Engine, StoreError> {
    Engine::open(dir, engine::settings(true), Arc::new(|_| {})).await
}

/// Damages the file `name` of a copy, and opens it.
async fn damaged(
    dir: &Path,
    name: &str,
    damage: impl FnOnce(&mut Vec<u8>),
) -> (tempfile::TempDir, Result<Engine, StoreError>) {
    let copied = tempfile::tempdir().unwrap();
    copy(dir, copied.path());
    let file = copied.path().join(name);
    let mut bytes = std::fs::read(&file).unwrap();
    damage(&mut bytes);
    std::fs::write(&file, bytes).unwrap();
    let opened = open(copied.path()).await;
    (copied, opened)
}

fn scribble(bytes: &mut [u8], random: &mut Random) {
    bytes.iter_mut().for_each(|byte| *byte = random.next().to_le_bytes()[0]);
}

/// A refusal that a person can do something with.
fn helps(error: &StoreError) -> bool {
    let text = error.to_string();
    text.contains("roundhouse.db") && text.contains("restore a backup")
}

#[tokio::test]
async fn a_damaged_database_is_refused_or_told_and_never_shows_another_job() {
    let seed = seed("damage");
    let mut random = Random::new(seed);
    let (dir, ledger) = made("honest");
    let pages = std::fs::metadata(dir.path().join("roundhouse.db")).unwrap().len() as usize / PAGE;
    let (mut refused, mut told) = (0, 0);
    for page in 0..pages {
        let zeros = random.below(2) == 0;
        let (copied, opened) = damaged(dir.path(), "roundhouse.db", |bytes| {
            let page = &mut bytes[page * PAGE..(page + 1) * PAGE];
            if zeros { page.fill(0) } else { scribble(page, &mut random) }
        })
        .await;
        match opened {
            Err(error) => {
                assert!(helps(&error), "page {page} (zeros: {zeros}): {error}");
                refused += 1;
            }
            Ok(engine) => {
                let broken = ledger.broken_promises(&engine).await;
                let silent: Vec<_> = broken.iter().filter(|text| !text.contains("cannot be")).collect();
                assert!(silent.is_empty(), "page {page} of {pages} (zeros: {zeros}): {silent:?}");
                told += usize::from(!broken.is_empty());
            }
        }
        drop(copied);
    }
    eprintln!("damage: {pages} pages; {refused} refused at the start, {told} told when read");
    assert!(refused > 3, "{refused} of {pages}");
}

#[tokio::test]
async fn a_database_with_another_beginning_or_a_missing_end_is_refused() {
    let (dir, ledger) = made("honest");
    let damages: [(&str, fn(&mut Vec<u8>)); 4] = [
        ("magic", |bytes| bytes[..16].copy_from_slice(b"not a database !")),
        ("page size", |bytes| bytes[16] ^= 0x55),
        ("schema", |bytes| bytes[100..120].fill(0xff)),
        ("half", |bytes| bytes.truncate(bytes.len() / 2 / PAGE * PAGE)),
    ];
    for (what, damage) in damages {
        let (_copied, opened) = damaged(dir.path(), "roundhouse.db", damage).await;
        match opened {
            Err(error) => assert!(helps(&error), "{what}: {error}"),
            Ok(engine) => {
                let broken = ledger.broken_promises(&engine).await;
                let silent: Vec<_> = broken.iter().filter(|text| !text.contains("cannot be")).collect();
                assert!(what == "half" && silent.is_empty() && !broken.is_empty(), "{what}: {silent:?}");
            }
        }
    }
}

#[tokio::test]
async fn of_a_damaged_log_what_comes_before_the_damage_is_recovered() {
    let seed = seed("damaged log");
    let mut random = Random::new(seed);
    let (dir, ledger) = made("killed");
    let earlier = ledger.without_promises();
    let wal = std::fs::metadata(dir.path().join("roundhouse.db-wal")).unwrap().len() as usize;
    assert!(wal > 4 * PAGE, "a killed process leaves its log: {wal}");
    for _ in 0..12 {
        let place = random.below(wal);
        for is_cut in [true, false] {
            let (_copied, opened) = damaged(dir.path(), "roundhouse.db-wal", |bytes| {
                if is_cut {
                    bytes.truncate(place);
                } else {
                    let end = (place + 600).min(bytes.len());
                    scribble(&mut bytes[place..end], &mut random);
                }
            })
            .await;
            let engine = opened.unwrap_or_else(|error| panic!("damage at {place} of {wal}: {error}"));
            let broken = earlier.broken_promises(&engine).await;
            assert!(broken.is_empty(), "damage at {place} of {wal} (cut: {is_cut}): {broken:?}");
        }
    }
}

#[tokio::test]
async fn a_stale_shared_memory_file_is_made_anew() {
    let (dir, ledger) = made("killed");
    let damages: [fn(&mut Vec<u8>); 4] = [
        |bytes| bytes.fill(0xff),
        |bytes| bytes.fill(0),
        |bytes| bytes.truncate(1_000),
        |bytes| bytes.rotate_left(777),
    ];
    for damage in damages {
        let (_copied, opened) = damaged(dir.path(), "roundhouse.db-shm", damage).await;
        let engine = opened.unwrap();
        let broken = ledger.broken_promises(&engine).await;
        assert!(broken.is_empty(), "{broken:?}");
    }
}
