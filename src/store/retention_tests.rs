//! Retention, quota and the collection of files, by verbs alone.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use proptest::prelude::*;
use tokio_util::sync::CancellationToken;

use super::tests::new_job;
use super::*;
use crate::clock::{Clock, ManualClock};
use crate::domain::worker::Answer;
use crate::domain::{BatchId, ErrorCode, Face, JobError, JobId, JobKind, JobState, NewJob, StorageSettings, Token};

const DAY: i64 = 86_400_000;
const MIB: u64 = 1024 * 1024;

/// A data dir, and a store on it that can be opened again.
struct House {
    dir: tempfile::TempDir,
    clock: Arc<ManualClock>,
    settings: StorageSettings,
    store: Store,
    next_number: i64,
}

impl House {
    async fn new(settings: StorageSettings) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let clock = Arc::new(ManualClock::at(1_000));
        let opened = reopen(dir.path(), &clock, &settings).await;
        Self { dir, clock, settings, next_number: opened.next_number, store: opened.store }
    }

    async fn restart(self) -> Self {
        let Self { dir, clock, settings, store, .. } = self;
        drop(store);
        let opened = reopen(dir.path(), &clock, &settings).await;
        Self { dir, clock, settings, next_number: opened.next_number, store: opened.store }
    }

    async fn try_add(&mut self, job: NewJob) -> Result<JobId, StoreError> {
        let id = JobId::new(self.clock.now(), self.next_number, 77);
        self.next_number += 1;
        self.store.insert(vec![(id, job)], false, None).await.map(|_| id)
    }

    async fn add(&mut self, job: NewJob) -> JobId {
        self.try_add(job).await.unwrap()
    }

    async fn claim(&self, id: JobId) -> Token {
        self.store.claim(vec![id.number], 1).await.unwrap()[0].token
    }

    /// A job that has an answer of so many bytes.
    async fn answered(&mut self, job: NewJob, bytes: usize) -> JobId {
        let id = self.add(job).await;
        let token = self.claim(id).await;
        let kept = self.store.keep(token, JobKind::Chat, &answer(bytes)).await.unwrap();
        self.store.finish(token, End::Succeeded(kept), 0.0).await.unwrap().unwrap();
        id
    }

    async fn job(&self, id: JobId) -> Option<crate::domain::Job> {
        match self.store.reader().job(id).await {
            Ok(job) => Some(job),
            Err(StoreError::NotFound) => None,
            Err(error) => panic!("{error}"),
        }
    }

    async fn has_answer(&self, id: JobId) -> bool {
        match self.store.reader().answer(id).await {
            Ok(answer) => answer.is_some(),
            // It was emptied between the look at its row and the one at its file.
            Err(StoreError::Expired) => false,
            Err(error) => panic!("{error}"),
        }
    }

    async fn purge_all(&self) -> (u64, u64) {
        let (mut emptied, mut deleted) = (0, 0);
        loop {
            let purged = self.store.purge().await.unwrap();
            emptied += purged.emptied;
            deleted += purged.deleted;
            if !purged.has_more {
                return (emptied, deleted);
            }
        }
    }

    fn artifacts(&self) -> PathBuf {
        self.dir.path().join("artifacts")
    }

    fn files(&self) -> BTreeSet<String> {
        walk(&self.artifacts())
            .into_iter()
            .map(|path| path.strip_prefix(self.artifacts()).unwrap().to_string_lossy().into_owned())
            .collect()
    }
}

async fn reopen(dir: &Path, clock: &Arc<ManualClock>, settings: &StorageSettings) -> Opened {
    // The lock is released when the last handle of the earlier store is gone, which is a moment after its drop.
    for _ in 0..2_000 {
        match open(dir, clock.clone(), settings.clone(), Arc::new(|reason| panic!("{reason}"))).await {
            Ok(opened) => return opened,
            Err(StoreError::Unusable(_)) => tokio::time::sleep(Duration::from_millis(5)).await,
            Err(error) => panic!("{error}"),
        }
    }
    panic!("the data dir stays locked");
}

fn walk(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
}

fn settings() -> StorageSettings {
    StorageSettings { free_min_bytes: 0, reserve_bytes: 0, fsync: false, ..StorageSettings::default() }
}

fn answer(bytes: usize) -> Answer {
    let body = Bytes::from(format!("\"{}\"", "y".repeat(bytes)));
    Answer { status: 200, content_type: "application/json".into(), body, usage: None }
}

/// Does something beside the store's own task.
async fn with_housekeeping<T>(house: &mut House, work: impl AsyncFnOnce(&mut House) -> T) -> T {
    let stop = CancellationToken::new();
    let keeping = house.store.clone().keep_house(stop.clone());
    tokio::select! {
        done = work(house) => done,
        () = keeping => panic!("the housekeeping ended by itself"),
    }
}

async fn eventually(what: &str, mut look: impl AsyncFnMut() -> bool) {
    for _ in 0..6_000 {
        if look().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not within a minute: {what}");
}

#[tokio::test]
async fn an_ended_job_is_emptied_and_then_deleted() {
    let mut house = House::new(settings()).await;
    let body = Bytes::from(format!("\"{}\"", "x".repeat(50_000)));
    let id = house.answered(NewJob { body, ..new_job() }, 60_000).await;
    assert_eq!(house.files().len(), 2);
    let before = house.job(id).await.unwrap();
    house.clock.advance(7 * DAY - 1);
    assert_eq!(house.purge_all().await, (0, 0), "a week is a week");
    house.clock.advance(1);
    let purged = house.store.purge().await.unwrap();
    assert_eq!((purged.emptied, purged.deleted, purged.has_more), (1, 0, false));
    assert!(purged.bytes > 110_000, "{purged:?}");
    assert_eq!(house.files(), BTreeSet::new());

    let job = house.job(id).await.unwrap();
    assert_eq!((job.state, job.emptied_at), (JobState::Succeeded, Some(house.clock.now())));
    assert!(job.version > before.version, "who has seen it before sees that it changed");
    assert_eq!(job.finished_at, before.finished_at);
    assert!(!house.has_answer(id).await);
    assert!(matches!(house.store.reader().body(id).await, Err(StoreError::Expired)));
    let events = house.store.reader().events(id, 0, 10).await.unwrap();
    assert_eq!(events.iter().map(|event| event.kind.as_str()).collect::<Vec<_>>(), ["job.succeeded"]);

    house.clock.advance(23 * DAY - 1);
    assert_eq!(house.purge_all().await, (0, 0));
    house.clock.advance(1);
    assert_eq!(house.purge_all().await, (0, 1));
    assert!(house.job(id).await.is_none());
    let seen = house.store.metrics().await;
    assert_eq!((seen.emptied, seen.deleted, seen.purge_lag_s), (1, 1, 0.0));
}

#[tokio::test]
async fn each_kind_of_job_has_its_time() {
    let mut house = House::new(settings()).await;
    let sync = house.answered(NewJob { face: Face::Sync, ..new_job() }, 1).await;
    let asynchronous = house.answered(new_job(), 1).await;
    let batch = house.store.new_batch();
    let member = house.answered(NewJob { batch: Some(batch), ..new_job() }, 1).await;
    let mut seen = Vec::new();
    for days in [1, 6, 23] {
        house.clock.advance(days * DAY);
        house.purge_all().await;
        for id in [sync, asynchronous, member] {
            seen.push(house.job(id).await.map(|job| job.emptied_at.is_some()));
        }
    }
    let (kept, empty, gone) = (Some(false), Some(true), None);
    assert_eq!(seen, [empty, kept, kept, empty, empty, kept, gone, gone, gone]);
}

#[tokio::test]
async fn a_job_whose_row_need_not_stay_goes_at_once() {
    let mut house = House::new(StorageSettings { tombstone_ttl: Duration::ZERO, ..settings() }).await;
    let id = house.answered(new_job(), 40_000).await;
    house.clock.advance(7 * DAY);
    assert_eq!(house.purge_all().await, (0, 1));
    assert!(house.job(id).await.is_none());
    assert_eq!(house.files(), BTreeSet::new());
}

#[tokio::test]
async fn numbers_of_deleted_jobs_and_batches_are_never_given_again() {
    let mut house = House::new(settings()).await;
    let first = house.answered(new_job(), 1).await;
    let batch = house.store.new_batch();
    let last = house.answered(NewJob { batch: Some(batch), ..new_job() }, 1).await;
    house.clock.advance(60 * DAY);
    assert_eq!(house.purge_all().await, (0, 2));
    let house = house.restart().await;
    assert_eq!(house.next_number, last.number + 1);
    assert_eq!(house.store.new_batch(), BatchId(batch.0 + 1));
    assert!(first.number < last.number);
}

#[tokio::test]
async fn many_go_in_small_steps_and_old_keys_with_them() {
    let mut house = House::new(settings()).await;
    let mut jobs = Vec::new();
    for number in 1..=1_500 {
        jobs.push((JobId::new(1_000, number, 1), new_job()));
    }
    let key = IdempotencyKey { key: [1; 16], request: [2; 16] };
    house.store.insert(jobs, false, Some(key)).await.unwrap();
    house.next_number = 1_501;
    for number in 1..=1_499 {
        house.store.end_queued(number, End::Cancelled).await.unwrap().unwrap();
    }
    house.clock.advance(7 * DAY);
    let (mut steps, mut emptied, mut keys) = (0, 0, 0);
    loop {
        let purged = house.store.purge().await.unwrap();
        assert!(purged.emptied <= 1_024, "{purged:?}");
        steps += 1;
        emptied += purged.emptied;
        keys += purged.keys;
        if !purged.has_more {
            break;
        }
    }
    assert!(steps > 1);
    assert_eq!((emptied, keys), (1_499, 1));
    let left = house.job(JobId::new(1_000, 1_500, 1)).await.unwrap();
    assert_eq!((left.state, left.emptied_at), (JobState::Queued, None));
}

#[tokio::test]
async fn free_pages_are_given_back() {
    let mut house = House::new(settings()).await;
    for _ in 0..40 {
        let body = Bytes::from(format!("\"{}\"", "x".repeat(30_000)));
        house.answered(NewJob { body, ..new_job() }, 30_000).await;
    }
    let full = house.store.reader().sizes(0).await.unwrap();
    house.clock.advance(7 * DAY);
    assert_eq!(house.purge_all().await.0, 40);
    let emptied = house.store.reader().sizes(0).await.unwrap();
    assert!(emptied.free_bytes > full.used_bytes / 2, "{full:?} {emptied:?}");
    assert_eq!(house.store.give_back_pages(10).await.unwrap(), 10);
    // The rest goes by itself while nothing else happens.
    let reader = house.store.reader().clone();
    with_housekeeping(&mut house, async |_| {
        eventually("free pages are given back", async || {
            reader.sizes(0).await.unwrap().free_bytes < emptied.free_bytes / 2
        })
        .await;
    })
    .await;
}

#[tokio::test]
async fn the_quota_takes_expired_then_delivered_and_never_what_nobody_has_fetched() {
    let mut house = House::new(StorageSettings { quota_bytes: Some(4 * MIB), ..settings() }).await;
    let size = 300_000;
    let expiring = house.answered(NewJob { face: Face::Sync, ..new_job() }, size).await;
    house.clock.advance(1_000);
    let mut delivered = Vec::new();
    for _ in 0..3 {
        delivered.push(house.answered(new_job(), size).await);
        house.clock.advance(1_000);
    }
    // The first to end is not the first to be fetched.
    delivered.iter().rev().for_each(|id| house.store.delivered(*id));
    house.store.ping().await.unwrap();
    let mut waiting = vec![house.answered(new_job(), size).await];
    house.clock.advance(DAY);
    let running = house.add(new_job()).await;
    let token = house.claim(running).await;

    with_housekeeping(&mut house, async |house| {
        eventually("the expired one goes", async || house.job(expiring).await.unwrap().emptied_at.is_some()).await;
        for id in &delivered {
            assert!(house.has_answer(*id).await, "there is room enough");
        }
        // Until the oldest delivered one has to go.
        while house.has_answer(delivered[0]).await {
            waiting.push(house.answered(new_job(), size).await);
            house.store.ping().await.unwrap();
            let is_over = house.store.metrics().await.stored_bytes > 4 * MIB;
            if is_over {
                eventually("room is made", async || house.store.metrics().await.stored_bytes < 4 * MIB).await;
            }
        }
        assert!(house.has_answer(delivered[2]).await, "only as many as have to");
        // Until nothing is left that may go.
        let refused = loop {
            let may_go = house.has_answer(delivered[2]).await;
            match house.try_add(NewJob { body: Bytes::from(vec![b' '; size]), ..new_job() }).await {
                Ok(_) => {}
                Err(error) if !may_go => break error,
                // Until housekeeping has come to it.
                Err(_) => {
                    eventually("room is made", async || {
                        !house.has_answer(delivered[2]).await || house.store.metrics().await.stored_bytes < 4 * MIB
                    })
                    .await;
                }
            }
        };
        assert!(matches!(&refused, StoreError::OverQuota { quota, used, .. } if *quota == 4 * MIB && used > quota));
        for word in ["quota", "4.0 MiB", "fetch", "storage.quota"] {
            assert!(refused.to_string().contains(word), "{refused}");
        }
        eventually("the delivered ones are gone", async || {
            house.job(delivered[2]).await.unwrap().emptied_at.is_some() && house.store.troubles().len() == 1
        })
        .await;
        assert_eq!(house.store.troubles()[0].state, "quota_used_up");
        // What runs may end, and what nobody has fetched stays.
        let kept = house.store.keep(token, JobKind::Chat, &answer(size)).await.unwrap();
        assert!(house.store.finish(token, End::Succeeded(kept), 0.0).await.unwrap().is_some());
        waiting.push(running);
        tokio::time::sleep(Duration::from_millis(1_500)).await;
        for id in &waiting {
            assert!(house.has_answer(*id).await);
        }
        assert!(house.try_add(new_job()).await.is_err());
        // Somebody fetches, and new jobs are taken again.
        waiting.iter().for_each(|id| house.store.delivered(*id));
        house.store.ping().await.unwrap();
        house.clock.advance(retention::DELIVERED_GRACE_MS);
        eventually("there is room again", async || house.store.troubles().is_empty()).await;
        assert!(house.try_add(new_job()).await.is_ok());
        assert!(!house.has_answer(waiting[0]).await);
    })
    .await;
}

#[tokio::test]
async fn what_jobs_take_that_have_not_ended_is_added_up_some_at_a_time() {
    let mut house = House::new(settings()).await;
    house.answered(new_job(), 50_000).await;
    let body = |bytes: usize| Bytes::from(vec![b' '; bytes]);
    // One in a file.
    house.add(NewJob { body: body(100_000), ..new_job() }).await;
    let jobs = (0..2_500)
        .map(|number| (JobId::new(1_000, house.next_number + number, 77), NewJob { body: body(2), ..new_job() }));
    house.store.insert(jobs.collect(), false, None).await.unwrap();
    let reader = house.store.reader();
    assert_eq!(reader.live_bytes().await.unwrap(), Some(105_000));
    let (outside, first, more) = reader
        .read(|c| {
            let more = |most| quota::are_more_live(c, most);
            Ok((quota::live_bytes(c)?, quota::weigh(c, 0)?, (more(2_500)?, more(2_501)?)))
        })
        .await
        .unwrap();
    assert_eq!(outside, Some(105_000));
    assert!(first.next.is_some() && first.bytes < 105_000, "not all at once: {first:?}");
    assert_eq!(more, (true, false));
}

#[tokio::test]
async fn the_quota_is_decided_once() {
    let mut house = House::new(settings()).await;
    let quota = house.store.metrics().await.quota_bytes;
    assert!(quota > 0);
    for _ in 0..5 {
        house.answered(new_job(), 1_000_000).await;
    }
    let house = house.restart().await;
    assert_eq!(house.store.metrics().await.quota_bytes, quota);
    let Opened { store, .. } = {
        let House { dir, clock, settings, store, .. } = house;
        drop(store);
        let settings = StorageSettings { quota_bytes: Some(7 * MIB), ..settings };
        reopen(dir.path(), &clock, &settings).await
    };
    assert_eq!(store.metrics().await.quota_bytes, 7 * MIB, "unless it is set");
}

#[tokio::test]
async fn files_without_rows_are_collected_and_rows_without_files_reported() {
    let mut house = House::new(settings()).await;
    let kept = house.answered(new_job(), 50_000).await;
    let lost = house.answered(new_job(), 50_000).await;
    let live = house.add(new_job()).await;
    let token = house.claim(live).await;
    let folder = house.artifacts().join("00000");
    let files = house.files();
    let path_of = |id: JobId| files.iter().find(|path| path.contains(&id.uuid().to_string())).unwrap().clone();
    assert_eq!(files, BTreeSet::from([path_of(kept), path_of(lost)]));
    // What a crash leaves, and what is not ours.
    let crashed = JobId::new(1_000, 7, 1).uuid();
    for name in ["image-0.png", "image-1.png#1"] {
        std::fs::write(folder.join(format!("{crashed}-1-{name}")), "half").unwrap();
    }
    std::fs::write(folder.join("notes.txt"), "of somebody").unwrap();
    std::fs::write(folder.join(format!("{}-1-x", JobId::new(1_000, 5_000, 1).uuid())), "in the wrong folder").unwrap();
    // An answer whose row is about to be committed.
    let answer = house.store.keep(token, JobKind::Chat, &answer(50_000)).await.unwrap();
    // Of an earlier attempt of the same job.
    let earlier = format!("00000/{}-0-response.json", live.uuid());
    std::fs::write(house.artifacts().join(&earlier), "late").unwrap();
    std::fs::create_dir(house.artifacts().join("00009")).unwrap();
    std::fs::remove_file(house.artifacts().join(path_of(lost))).unwrap();

    let young = house.store.check_files(true).await.unwrap();
    assert_eq!((young.orphans.len(), young.deleted), (0, 0), "they may be somebody's: {young:?}");
    let modified = std::fs::metadata(folder.join("notes.txt")).unwrap().modified().unwrap();
    let modified = modified.duration_since(std::time::UNIX_EPOCH).unwrap().as_millis();
    house.clock.advance(i64::try_from(modified).unwrap() + collect::MIN_AGE_MS + 10_000);

    let orphans = BTreeSet::from([
        format!("00000/{crashed}-1-image-0.png"),
        format!("00000/{crashed}-1-image-1.png#1"),
        earlier.clone(),
    ]);
    let told = house.store.check_files(false).await.unwrap();
    assert_eq!(BTreeSet::from_iter(told.orphans.clone()), orphans);
    assert_eq!((told.deleted, told.rows, told.orphan_bytes), (0, 2, 12));
    assert_eq!(told.missing, [path_of(lost)]);
    let done = house.store.check_files(true).await.unwrap();
    assert_eq!((done.deleted, done.missing), (3, told.missing));
    assert!(house.files().is_disjoint(&orphans), "{:?}", house.files());
    assert_eq!(house.files().len(), 4);
    assert!(!house.artifacts().join("00009").exists(), "an empty folder goes");

    assert!(house.store.finish(token, End::Succeeded(answer), 0.0).await.unwrap().is_some());
    assert!(house.has_answer(live).await && house.has_answer(kept).await);
    let error = house.store.reader().answer(lost).await.unwrap_err();
    assert!(error.is_lost_file(), "not guessed to be expired: {error}");
}

#[tokio::test]
async fn a_lost_file_counts_as_soon_as_somebody_meets_it_and_until_it_is_back() {
    let mut house = House::new(settings()).await;
    let (gone, damaged) = (house.answered(new_job(), 50_000).await, house.answered(new_job(), 50_000).await);
    let files = house.files();
    let path_of =
        |id: JobId| house.artifacts().join(files.iter().find(|path| path.contains(&id.uuid().to_string())).unwrap());
    let (gone_at, damaged_at) = (path_of(gone), path_of(damaged));
    let (gone_was, damaged_was) = (std::fs::read(&gone_at).unwrap(), std::fs::read(&damaged_at).unwrap());
    std::fs::remove_file(&gone_at).unwrap();
    std::fs::write(&damaged_at, "other").unwrap();
    let count = async |house: &House| house.store.metrics().await.missing_files;
    assert_eq!(count(&house).await, 0, "nobody has looked");
    let reader = house.store.reader();
    assert!(reader.answer(gone).await.is_err());
    assert_eq!(count(&house).await, 1);
    assert!(reader.kept_body(damaged).await.is_err() && reader.kept_body(damaged).await.is_err());
    assert_eq!(count(&house).await, 2, "each once");
    let trouble = house.store.troubles().remove(0);
    assert!(trouble.state == "files_missing" && trouble.reason.starts_with("2 files"), "{trouble:?}");
    // A look at all files knows of one of them only, and does not forget the other.
    house.store.pass().await.unwrap();
    assert_eq!(count(&house).await, 2);
    std::fs::write(&gone_at, &gone_was).unwrap();
    std::fs::write(&damaged_at, damaged_was).unwrap();
    house.store.pass().await.unwrap();
    assert_eq!(count(&house).await, 0);
    assert_eq!(house.store.troubles(), []);
    // Neither gone nor damaged, but it cannot be opened: it counts as lost, and keeps no other from being found.
    std::fs::write(&damaged_at, "other").unwrap();
    std::fs::remove_file(&gone_at).unwrap();
    assert!(reader.kept_body(damaged).await.is_err() && reader.answer(gone).await.is_err());
    std::fs::remove_file(&damaged_at).unwrap();
    std::os::unix::fs::symlink(&damaged_at, &damaged_at).unwrap();
    std::fs::write(&gone_at, &gone_was).unwrap();
    let relative = damaged_at.strip_prefix(house.artifacts()).unwrap().to_str().unwrap();
    assert!(house.store.is_lost(relative).await.is_err(), "that it is lost cannot be told");
    house.store.pass().await.unwrap();
    assert_eq!(count(&house).await, 1);
    std::fs::remove_file(&damaged_at).unwrap();
    // The whole folder.
    std::fs::remove_dir_all(house.artifacts()).unwrap();
    house.store.pass().await.unwrap();
    assert_eq!(count(&house).await, 2);
}

#[tokio::test]
async fn a_reader_that_holds_the_log_open_is_told_about() {
    let small = StorageSettings { wal_pages: 10, wal_bytes_kept: 40_000, ..settings() };
    let mut house = House::new(small).await;
    house.add(new_job()).await;
    let shell = rusqlite::Connection::open(house.dir.path().join("roundhouse.db")).unwrap();
    shell.execute_batch("BEGIN").unwrap();
    let _: i64 = shell.query_row("SELECT count(*) FROM job", [], |row| row.get(0)).unwrap();
    with_housekeeping(&mut house, async |house| {
        eventually("the log is too long", async || {
            house.add(NewJob { body: Bytes::from(vec![b' '; 30_000]), ..new_job() }).await;
            house.store.troubles().iter().any(|trouble| trouble.state == "wal_long")
        })
        .await;
        let trouble = house.store.troubles().remove(0);
        assert!(trouble.reason.contains("reader"), "{trouble:?}");
        shell.execute_batch("COMMIT").unwrap();
        eventually("it is short again", async || {
            house.add(new_job()).await;
            house.store.troubles().is_empty()
        })
        .await;
    })
    .await;
}

#[derive(Clone, Debug)]
enum Act {
    Add {
        sync: bool,
        batch: bool,
        large: bool,
    },
    Claim(prop::sample::Index),
    End(prop::sample::Index, u8),
    GiveBack(prop::sample::Index),
    Cancel(prop::sample::Index),
    Deliver(prop::sample::Index),
    /// Both ways: a wall clock can be set.
    Clock(i64),
    Purge,
    MakeRoom(u64),
    Collect,
    Restart,
}

fn act() -> impl Strategy<Value = Act> {
    let index = any::<prop::sample::Index>;
    let bools = (any::<bool>(), any::<bool>(), any::<bool>());
    prop_oneof![
        4 => bools.prop_map(|(sync, batch, large)| Act::Add { sync, batch, large }),
        4 => index().prop_map(Act::Claim),
        3 => (index(), 0..4_u8).prop_map(|(index, how)| Act::End(index, how)),
        1 => index().prop_map(Act::GiveBack),
        1 => index().prop_map(Act::Cancel),
        2 => index().prop_map(Act::Deliver),
        3 => prop_oneof![-40 * DAY..40 * DAY, -10_000..10_000_i64, Just(400 * DAY)].prop_map(Act::Clock),
        4 => Just(Act::Purge),
        2 => prop_oneof![Just(u64::MAX), 0..100_000_u64].prop_map(Act::MakeRoom),
        1 => Just(Act::Collect),
        1 => Just(Act::Restart),
    ]
}

/// What must be there: jobs that have not ended, the attempts of those that run, and answers that nobody has fetched, with
/// the time until which they are kept whatever room is needed.
#[derive(Default)]
struct Model {
    live: BTreeMap<JobId, Option<Token>>,
    unfetched: BTreeMap<JobId, i64>,
    answered: Vec<JobId>,
}

async fn carry_out(acts: Vec<Act>) {
    let mut house = House::new(settings()).await;
    let mut model = Model::default();
    let pick = |index: &prop::sample::Index, among: Vec<JobId>| (!among.is_empty()).then(|| *index.get(&among));
    let running = |model: &Model| model.live.iter().filter(|(_, token)| token.is_some()).map(|(id, _)| *id).collect();
    for act in acts {
        match act {
            Act::Add { sync, batch, large } => {
                let batch = (batch && !sync).then(|| house.store.new_batch());
                let face = if sync { Face::Sync } else { Face::Async };
                let body = Bytes::from(vec![b' '; if large { 40_000 } else { 2 }]);
                let id = house.add(NewJob { face, batch, body, ..new_job() }).await;
                model.live.insert(id, None);
            }
            Act::Claim(index) => {
                let queued = model.live.iter().filter(|(_, token)| token.is_none()).map(|(id, _)| *id).collect();
                if let Some(id) = pick(&index, queued) {
                    model.live.insert(id, Some(house.claim(id).await));
                }
            }
            Act::End(index, how) => {
                let Some(id) = pick(&index, running(&model)) else { continue };
                let token = model.live.remove(&id).flatten().unwrap();
                if how == 0 {
                    let failed = End::Failed(JobError::new(ErrorCode::WorkerError, "no", false));
                    house.store.finish(token, failed, 0.0).await.unwrap().unwrap();
                } else {
                    let bytes = if how == 1 { 40_000 } else { 10 };
                    let kept = house.store.keep(token, JobKind::Chat, &answer(bytes)).await.unwrap();
                    house.store.finish(token, End::Succeeded(kept), 0.0).await.unwrap().unwrap();
                    // The shortest time there is.
                    model.unfetched.insert(id, house.clock.now() + DAY);
                    model.answered.push(id);
                }
            }
            Act::GiveBack(index) => {
                if let Some(id) = pick(&index, running(&model)) {
                    let token = model.live[&id].unwrap();
                    house.store.requeue(token, GiveBack::default()).await.unwrap().unwrap();
                    model.live.insert(id, None);
                }
            }
            Act::Cancel(index) => {
                if let Some(id) = pick(&index, model.live.keys().copied().collect()) {
                    let after = house.store.request_cancel(id, ErrorCode::CancelledByUser).await.unwrap();
                    match model.live.remove(&id).flatten() {
                        Some(token) => drop(house.store.finish(token, End::Cancelled, 0.0).await.unwrap().unwrap()),
                        None => assert_eq!(after.state, JobState::Cancelled),
                    }
                }
            }
            Act::Deliver(index) => {
                if let Some(id) = pick(&index, model.answered.clone()) {
                    house.store.delivered(id);
                    model.unfetched.remove(&id);
                }
            }
            Act::Clock(by) => house.clock.advance(by.max(1_000 - house.clock.now())),
            Act::Purge => drop(house.purge_all().await),
            Act::MakeRoom(bytes) => drop(house.store.make_room(bytes).await.unwrap()),
            Act::Collect => drop(house.store.check_files(true).await.unwrap()),
            Act::Restart => {
                house = house.restart().await;
                // Jobs that ran wait again.
                model.live.values_mut().for_each(|token| *token = None);
            }
        }
        let now = house.clock.now();
        // Once past its time an answer may go, also if the clock is set back later.
        model.unfetched.retain(|_, until| *until > now);
        for (id, token) in &model.live {
            let job = house.job(*id).await.unwrap_or_else(|| panic!("{id} has not ended and is gone"));
            assert_eq!((job.state.is_terminal(), job.emptied_at), (false, None));
            assert_eq!(job.state == JobState::Running, token.is_some());
            assert!(house.store.reader().body(*id).await.is_ok(), "its body is there");
        }
        for id in model.unfetched.keys() {
            assert!(house.has_answer(*id).await, "nobody has fetched the answer of {id}, and it is gone");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn nothing_that_has_not_ended_is_ever_deleted(acts in prop::collection::vec(act(), 1..60)) {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(carry_out(acts));
    }
}
