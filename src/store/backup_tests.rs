//! Backups of real data dirs, restored and damaged.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::backup::{Destination, Done};
use super::snapshots::{Durability, Prepared, Snapshots, prepare};
use super::tests::new_job;
use super::*;
use crate::clock::ManualClock;
use crate::domain::worker::Answer;
use crate::domain::{JobId, JobKind, JobState, NewJob, StorageSettings};

struct Bench {
    dir: tempfile::TempDir,
    clock: Arc<ManualClock>,
    opened: Opened,
}

async fn open_at(data: &Path, clock: &Arc<ManualClock>) -> Opened {
    let settings = StorageSettings { free_min_bytes: 0, reserve_bytes: 0, ..StorageSettings::default() };
    open(data, clock.clone(), settings, Arc::new(|reason: &str| panic!("{reason}"))).await.unwrap()
}

impl Bench {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let clock = Arc::new(ManualClock::at(1_000));
        let opened = open_at(&dir.path().join("data"), &clock).await;
        Self { dir, clock, opened }
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    fn backup(&self) -> PathBuf {
        self.dir.path().join("backup")
    }

    async fn add(&self, number: i64) -> JobId {
        let id = JobId::new(1_000, number, 77);
        let job = NewJob { endpoint: "/v1/images/generations".into(), model: "m".into(), ..new_job() };
        self.opened.store.insert(vec![(id, job)], false, None).await.unwrap();
        id
    }

    /// A job with an answer of one file.
    async fn finished(&self, number: i64, bytes: usize) -> JobId {
        let id = self.add(number).await;
        let store = &self.opened.store;
        let token = store.claim(vec![number], 1).await.unwrap()[0].token;
        let body = Bytes::from(vec![u8::try_from(number % 250).unwrap(); bytes]);
        let answer = Answer { status: 200, content_type: "image/png".into(), body, usage: None };
        let stored = store.keep(token, JobKind::Image, &answer).await.unwrap();
        store.finish(token, End::Succeeded(stored), 0.0).await.unwrap();
        id
    }

    async fn file_of(&self, id: JobId) -> PathBuf {
        let root = self.data().join("artifacts/00000");
        let mut found = std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path());
        found.find(|path| path.to_string_lossy().contains(&id.uuid().to_string())).unwrap()
    }

    fn back_up(&self) -> Result<Done, StoreError> {
        Destination::open(&self.data(), &self.backup(), None)?.back_up(self.clock.as_ref(), false, &mut |_| {})
    }

    fn restore(&self, to: &str) -> Result<restore::Verified, StoreError> {
        restore::restore(&self.backup(), &self.dir.path().join(to), false, &mut |_| {})
    }
}

fn check(folder: &Path) -> Result<restore::Verified, StoreError> {
    restore::check(folder, false, &mut |_| {})
}

fn refusal<T: std::fmt::Debug>(result: Result<T, StoreError>) -> String {
    result.unwrap_err().to_string()
}

#[tokio::test]
async fn a_backup_taken_while_the_store_is_open_restores_with_all_jobs_and_files_and_an_id_of_its_own() {
    let bench = Bench::new().await;
    let waiting = bench.add(1).await;
    let done = bench.finished(2, 100_000).await;
    let made = bench.back_up().unwrap();
    assert_eq!((made.copied.files, made.kept.files, made.manifest.jobs["queued"]), (1, 0, 1));
    assert_eq!(made.manifest.file_bytes, 100_000);
    let restored = bench.restore("other").unwrap();
    assert_eq!((restored.files.files, restored.manifest), (1, made.manifest));

    let other = open_at(&bench.dir.path().join("other"), &bench.clock).await;
    assert_ne!(other.data_dir_id, bench.opened.data_dir_id);
    let reader = other.store.reader();
    assert_eq!(reader.job(waiting).await.unwrap().state, JobState::Queued);
    let (original, copy) = (bench.opened.store.reader().answer(done).await, reader.answer(done).await);
    assert_eq!(original.unwrap().unwrap(), copy.unwrap().unwrap());
}

#[tokio::test]
async fn a_second_backup_copies_only_what_is_new_and_removes_what_is_gone() {
    let bench = Bench::new().await;
    bench.finished(1, 1_000).await;
    bench.back_up().unwrap();
    bench.finished(2, 2_000).await;
    std::fs::write(bench.backup().join("artifacts/00000/old"), "x").unwrap();
    let made = bench.back_up().unwrap();
    assert_eq!((made.copied.files, made.copied.bytes), (1, 2_000));
    assert_eq!((made.kept.files, made.removed.files), (1, 1));
    assert!(!bench.backup().join("artifacts/00000/old").exists());
    assert_eq!(check(&bench.backup()).unwrap().files.files, 2);
}

#[tokio::test]
async fn a_file_that_is_lost_or_damaged_is_named_and_the_former_backup_stays() {
    let bench = Bench::new().await;
    bench.finished(1, 1_000).await;
    let before = bench.back_up().unwrap();
    let lost = bench.finished(2, 2_000).await;
    let file = bench.file_of(lost).await;
    let name = file.file_name().unwrap().to_string_lossy().into_owned();
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&file, vec![0; 2_000]).unwrap();
    assert!(refusal(bench.back_up()).contains(&name));
    std::fs::remove_file(&file).unwrap();
    assert!(refusal(bench.back_up()).contains(&name));
    assert_eq!(check(&bench.backup()).unwrap().manifest, before.manifest, "the former one stays");

    // Snapshots leave it out, and say so.
    let destination = Destination::open(&bench.data(), &bench.backup(), None).unwrap();
    let made = destination.back_up(bench.clock.as_ref(), true, &mut |_| {}).unwrap();
    assert!(made.manifest.damaged.len() == 1 && made.manifest.damaged[0].ends_with(&name));
    assert_eq!(check(&bench.backup()).unwrap().files.files, 1);
    // And take it in again once it is back.
    std::fs::write(&file, bytes).unwrap();
    let made = destination.back_up(bench.clock.as_ref(), true, &mut |_| {}).unwrap();
    assert_eq!((made.manifest.damaged.len(), made.copied.files), (0, 1));
}

#[tokio::test]
async fn all_lost_files_are_named_with_their_jobs_and_all_else_is_saved_and_restored_without_them() {
    let bench = Bench::new().await;
    let (lost, damaged) = (bench.finished(1, 1_000).await, bench.finished(2, 2_000).await);
    let whole = bench.finished(3, 3_000).await;
    let harm = async |root: &Path| {
        std::fs::remove_file(bench.file_of(lost).await.strip_prefix(bench.data()).map(|path| root.join(path)).unwrap())
            .unwrap();
        let damaged = bench.file_of(damaged).await;
        std::fs::write(root.join(damaged.strip_prefix(bench.data()).unwrap()), vec![0; 2_000]).unwrap();
    };
    bench.back_up().unwrap();
    // In the data dir; the backup has them still, so they are no loss.
    let copy = bench.dir.path().join("copy");
    assert!(std::process::Command::new("cp").arg("-r").arg(bench.data()).arg(&copy).status().unwrap().success());
    harm(&bench.data()).await;
    assert_eq!(bench.back_up().unwrap().lost, []);
    let second = bench.dir.path().join("second");
    let destination = Destination::open(&bench.data(), &second, None).unwrap();
    let text = refusal(destination.back_up(bench.clock.as_ref(), false, &mut |_| {}));
    for word in ["2 of them", &format!("{lost}: gone"), &format!("{damaged}: damaged"), "backup --without-lost-files"] {
        assert!(text.contains(word), "{word}: {text}");
    }
    let done = destination.back_up(bench.clock.as_ref(), true, &mut |_| {}).unwrap();
    assert_eq!((done.lost.len(), done.manifest.damaged.len(), done.manifest.files), (2, 2, 1));
    assert_eq!(check(&second).unwrap().files.files, 1, "it is whole without them");

    // In the backup.
    std::fs::remove_dir_all(bench.data().join("artifacts")).unwrap();
    std::fs::rename(copy.join("artifacts"), bench.data().join("artifacts")).unwrap();
    harm(&bench.backup()).await;
    for text in [refusal(check(&bench.backup())), refusal(bench.restore("other"))] {
        for word in [
            &format!("{lost}: gone"),
            &format!("{damaged}: damaged"),
            "another one may",
            "restore --without-lost-files",
        ] {
            assert!(text.contains(word), "{word}: {text}");
        }
        assert!(!text.contains("from a backup"), "no advice to do what is being done: {text}");
    }
    let other = bench.dir.path().join("other");
    assert!(!other.join("roundhouse.db").exists());
    let checked = restore::check(&bench.backup(), true, &mut |_| {}).unwrap();
    let restored = restore::restore(&bench.backup(), &other, true, &mut |_| {}).unwrap();
    assert_eq!((checked.lost.len(), checked.files.files), (2, 1));
    assert_eq!(restored, checked);
    let opened = open_at(&other, &bench.clock).await;
    let reader = opened.store.reader();
    assert!(reader.answer(whole).await.unwrap().is_some());
    for id in [lost, damaged] {
        assert_eq!(reader.job(id).await.unwrap().state, JobState::Succeeded);
        assert!(reader.answer(id).await.unwrap_err().is_lost_file());
    }
}

#[test]
fn a_long_list_is_cut() {
    let lost: Vec<_> = (0..25).map(|n| lost::LostFile { path: format!("f{n}"), job: None, is_gone: true }).collect();
    let text = lost::lost_files(&lost, "advice", "backup").to_string();
    assert!(text.contains("25 of them") && text.contains("artifacts/f19") && text.contains("... and 5 more"), "{text}");
    assert!(!text.contains("f20"), "{text}");
}

#[tokio::test]
async fn a_file_that_retention_deletes_meanwhile_is_no_error() {
    let bench = Bench::new().await;
    let gone = bench.finished(1, 1_000).await;
    bench.finished(2, 2_000).await;
    let (file, data) = (bench.file_of(gone).await, bench.data());
    let mut is_first = true;
    let destination = Destination::open(&data, &bench.backup(), None).unwrap();
    let mut purge = |_: backup::Progress| {
        // Told before the snapshot is taken: what follows in this pass sees the file.
        if std::mem::take(&mut is_first) {
            return;
        }
        if file.exists() {
            let c = rusqlite::Connection::open(data.join("roundhouse.db")).unwrap();
            c.execute("DELETE FROM file WHERE number = 1", []).unwrap();
            std::fs::remove_file(&file).unwrap();
        }
    };
    // Job 2 sorts behind job 1, so the purge strikes after job 1's file; strike for it in a second backup, too.
    let made = destination.back_up(bench.clock.as_ref(), false, &mut purge).unwrap();
    assert_eq!(made.manifest.files, 2);
    let made = destination.back_up(bench.clock.as_ref(), false, &mut |_| {}).unwrap();
    assert_eq!((made.manifest.files, made.removed.files), (1, 1));

    // Now a file goes between the snapshot that names it and its copying.
    let third = bench.finished(3, 3_000).await;
    let (file, data) = (bench.file_of(third).await, bench.data());
    let mut purge = |progress: backup::Progress| {
        if progress.step == "files" && progress.done.files == 1 && file.exists() {
            let c = rusqlite::Connection::open(data.join("roundhouse.db")).unwrap();
            c.execute("DELETE FROM file WHERE number = 3", []).unwrap();
            std::fs::remove_file(&file).unwrap();
        }
    };
    let made = destination.back_up(bench.clock.as_ref(), false, &mut purge).unwrap();
    assert_eq!((made.manifest.files, made.copied.files), (1, 0), "a second snapshot does not name it any more");
    check(&bench.backup()).unwrap();
}

#[tokio::test]
async fn a_crash_at_any_step_leaves_a_backup_that_can_be_restored() {
    let bench = Bench::new().await;
    bench.finished(1, 1_000).await;
    let first = bench.back_up().unwrap();
    let backup = bench.backup();
    let (database, manifest) = (backup.join("roundhouse.db"), backup.join("manifest.json"));
    let (old_database, old_manifest) = (std::fs::read(&database).unwrap(), std::fs::read(&manifest).unwrap());
    bench.finished(2, 2_000).await;
    let second = bench.back_up().unwrap();
    let (new_database, new_manifest) = (std::fs::read(&database).unwrap(), std::fs::read(&manifest).unwrap());
    // In the order of the writing: new files are there in all.
    let next = backup.join("manifest.next.json");
    let crashed = |db: &[u8], settled: &[u8], coming: Option<&[u8]>| {
        std::fs::write(&database, db).unwrap();
        std::fs::write(&manifest, settled).unwrap();
        let _ = std::fs::remove_file(&next);
        if let Some(coming) = coming {
            std::fs::write(&next, coming).unwrap();
        }
        check(&backup).unwrap().manifest
    };
    assert_eq!(crashed(&old_database, &old_manifest, None), first.manifest);
    assert_eq!(crashed(&old_database, &old_manifest, Some(&new_manifest)), first.manifest);
    assert_eq!(crashed(&new_database, &old_manifest, Some(&new_manifest)), second.manifest);
    assert_eq!(crashed(&new_database, &new_manifest, None), second.manifest);
    // The very first backup, cut off after its database.
    std::fs::remove_file(&manifest).unwrap();
    std::fs::write(&next, &new_manifest).unwrap();
    assert_eq!(check(&backup).unwrap().manifest, second.manifest);
    assert_eq!(bench.back_up().unwrap().copied.files, 0, "and the next one goes on from there");
}

#[tokio::test]
async fn a_damaged_backup_is_refused_by_name() {
    let bench = Bench::new().await;
    let id = bench.finished(1, 100_000).await;
    bench.back_up().unwrap();
    let flip = |path: &Path| {
        let mut bytes = std::fs::read(path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(path, bytes).unwrap();
    };
    let name = bench.file_of(id).await.file_name().unwrap().to_string_lossy().into_owned();
    let file = bench.backup().join("artifacts/00000").join(&name);
    flip(&file);
    for text in [refusal(check(&bench.backup())), refusal(bench.restore("other"))] {
        assert!(text.contains(&name), "{text}");
    }
    assert!(!bench.dir.path().join("other/roundhouse.db").exists());
    std::fs::remove_file(&file).unwrap();
    assert!(refusal(check(&bench.backup())).contains(&name));
    bench.back_up().unwrap();
    bench.restore("other").unwrap();

    flip(&bench.backup().join("roundhouse.db"));
    for text in [refusal(check(&bench.backup())), refusal(bench.restore("third"))] {
        assert!(text.contains("backup/roundhouse.db") && text.contains("damaged"), "{text}");
    }
}

#[tokio::test]
async fn folders_that_are_no_place_for_it_are_refused() {
    let bench = Bench::new().await;
    let data = bench.data();
    for inside in [data.clone(), data.join("backups/1"), bench.dir.path().to_owned()] {
        let text = refusal(Destination::open(&data, &inside, None));
        assert!(text.contains("within each other"), "{text}");
    }
    let full = bench.dir.path().join("full");
    std::fs::create_dir(&full).unwrap();
    std::fs::write(full.join("thesis.txt"), "x").unwrap();
    assert!(refusal(Destination::open(&data, &full, None)).contains("is not empty"));
    assert!(refusal(Destination::open(&full, &bench.backup(), None)).contains("--data-dir"));
    let held = Destination::open(&data, &bench.backup(), None).unwrap();
    assert!(refusal(bench.back_up()).contains("somebody else writes"));
    drop(held);
    bench.back_up().unwrap();
    // A data dir that is in use, by a database or by a server.
    assert!(refusal(bench.restore("data")).contains("--data-dir"));
    std::fs::create_dir(bench.dir.path().join("held")).unwrap();
    let held = super::open::lock(&bench.dir.path().join("held"));
    assert!(refusal(bench.restore("held")).contains("another roundhouse server"));
    drop(held);
    assert!(refusal(check(&full)).contains("no backup"));
    // Another data dir's backup is not overwritten; that of the one it was restored from is.
    let stranger = bench.dir.path().join("stranger");
    let other = open_at(&stranger, &bench.clock).await;
    assert!(refusal(Destination::open(&stranger, &bench.backup(), None)).contains("another data dir"));
    drop(other);
    bench.restore("other").unwrap();
    Destination::open(&bench.dir.path().join("other"), &bench.backup(), None).unwrap();
}

#[tokio::test]
async fn snapshots_are_taken_when_something_changed_and_say_how_old_they_are() {
    let bench = Bench::new().await;
    let every = Duration::from_secs(60);
    let snapshots = Snapshots::open(&bench.data(), &bench.backup(), None, every, bench.clock.clone()).unwrap();
    let durability = Durability { snapshots: Some(snapshots.clone()), ..Durability::default() };
    let view = |at: i64| durability.view(at);
    assert_eq!((view(1_000).durability, view(1_000).loss_window_s), ("snapshot", 60.0));
    assert_eq!(view(1_000).snapshot.unwrap().last_at, None);
    bench.finished(1, 1_000).await;
    snapshots.take().await.unwrap();
    let manifest = bench.backup().join("manifest.json");
    let written = || std::fs::metadata(&manifest).unwrap().modified().unwrap();
    let first = written();
    assert_eq!(view(11_000).snapshot.unwrap().last_age_s, Some(10));
    bench.clock.advance(60_000);
    snapshots.take().await.unwrap();
    assert_eq!(written(), first, "nothing has changed");
    assert_eq!(view(61_000).snapshot.unwrap().last_age_s, Some(0));
    bench.finished(2, 1_000).await;
    snapshots.take().await.unwrap();
    assert_ne!(written(), first);

    // A volume that is gone is said, and the window grows.
    std::fs::remove_dir_all(bench.backup()).unwrap();
    std::fs::write(bench.backup(), "in the way").unwrap();
    bench.finished(3, 1_000).await;
    assert!(snapshots.take().await.unwrap_err().contains("backup"));
    let seen = view(261_000);
    assert_eq!(seen.loss_window_s, 200.0);
    assert!(seen.snapshot.unwrap().failed.is_some());
    assert_eq!(Durability::default().view(0).durability, "fsync");
}

/// The task that took the last snapshot lets go of the folder a moment after it has answered: what is said then, or what is
/// still said after a while.
async fn once_free<T>(ask: impl Fn() -> Result<T, StoreError>) -> Result<T, StoreError> {
    for _ in 0..2_000 {
        match ask() {
            Err(error) if error.to_string().contains("somebody else writes") => {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            other => return other,
        }
    }
    ask()
}

async fn prepared(data: &Path, folder: &Path) -> Result<Prepared, StoreError> {
    once_free(|| prepare(data, folder)).await
}

#[tokio::test]
async fn a_lost_data_dir_comes_back_from_its_snapshots_and_an_existing_one_is_left_alone() {
    let bench = Bench::new().await;
    let id = bench.finished(1, 1_000).await;
    let every = Duration::from_secs(60);
    let new = bench.dir.path().join("new");
    let nothing = prepare(&new, &bench.backup()).unwrap();
    assert!(nothing.held.is_none() && nothing.restored.is_none(), "no backup yet");
    let snapshots = Snapshots::open(&bench.data(), &bench.backup(), None, every, bench.clock.clone()).unwrap();
    snapshots.take().await.unwrap();
    // Those of a server that runs are not for another one.
    assert!(refusal(prepare(&new, &bench.backup())).contains("somebody else writes"));
    assert!(!new.exists(), "nothing was restored");
    drop(snapshots);
    let Prepared { held, restored } = prepared(&bench.data(), &bench.backup()).await.unwrap();
    assert!(held.is_some() && restored.is_none(), "it has its own");
    drop(held);
    let Prepared { held, restored } = prepared(&new, &bench.backup()).await.unwrap();
    assert_eq!(restored.unwrap().files.files, 1);
    let opened = open_at(&new, &bench.clock).await;
    assert!(opened.is_restored && !opened.was_clean && !bench.opened.is_restored);
    assert!(opened.store.reader().answer(id).await.unwrap().is_some());
    // It goes on with the same snapshots.
    assert!(refusal(Destination::open(&new, &bench.backup(), None)).contains("somebody else writes"), "held all along");
    Snapshots::open(&new, &bench.backup(), held, every, bench.clock.clone()).unwrap().take().await.unwrap();
    // Then they are the new one's.
    let refused = refusal(once_free(|| Destination::open(&bench.data(), &bench.backup(), None)).await);
    assert!(refused.contains("another data dir"), "{refused}");
    // A backup that cannot be read is no reason to begin empty.
    std::fs::write(bench.backup().join("roundhouse.db"), "nonsense").unwrap();
    assert!(refusal(prepared(&bench.dir.path().join("next"), &bench.backup()).await).contains("damaged"));
}

#[tokio::test]
async fn a_snapshot_takes_a_lost_file_along_when_it_is_put_back_though_no_row_has_changed() {
    let bench = Bench::new().await;
    let id = bench.finished(1, 1_000).await;
    let snapshots =
        Snapshots::open(&bench.data(), &bench.backup(), None, Duration::from_secs(60), bench.clock.clone()).unwrap();
    let file = bench.file_of(id).await;
    let held = std::fs::read(&file).unwrap();
    std::fs::remove_file(&file).unwrap();
    // Nothing of its folder is there to be copied.
    snapshots.take().await.unwrap();
    let copy = bench.backup().join(file.strip_prefix(bench.data()).unwrap());
    assert!(!copy.exists());
    std::fs::write(&file, &held).unwrap();
    snapshots.take().await.unwrap();
    assert_eq!(std::fs::read(copy).unwrap(), held);
}

#[tokio::test]
async fn a_thorough_look_finds_files_without_rows_and_rows_without_files() {
    let bench = Bench::new().await;
    let (lost, damaged) = (bench.finished(1, 1_000).await, bench.finished(2, 2_000).await);
    bench.finished(3, 3_000).await;
    assert!(examine::has_server(&bench.data()).unwrap());
    let inside = examine::look(&bench.data()).unwrap().unwrap();
    assert_eq!((inside.files.files, inside.files.bytes, inside.jobs["succeeded"]), (3, 6_000, 3));
    std::fs::remove_file(bench.file_of(lost).await).unwrap();
    std::fs::write(bench.file_of(damaged).await, vec![9; 2_000]).unwrap();
    std::fs::write(bench.data().join("artifacts/00000/left-over"), "1234").unwrap();
    // As a sector that cannot be read.
    let unreadable = bench.file_of(bench.finished(4, 4_000).await).await;
    std::fs::remove_file(&unreadable).unwrap();
    std::os::unix::fs::symlink("/proc/self/mem", &unreadable).unwrap();
    let faults = examine::thoroughly(&bench.data(), &mut |_| {}).unwrap();
    assert!(faults.database.is_empty());
    assert_eq!((faults.missing.len(), faults.damaged.len(), faults.whole.files), (1, 2, 1));
    assert_eq!((faults.unnamed, faults.unnamed_bytes), (vec!["00000/left-over".to_owned()], 4));
    assert_eq!(examine::look(bench.dir.path()).unwrap(), None);
    assert!(!examine::has_server(bench.dir.path()).unwrap());
}
