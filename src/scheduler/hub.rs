//! What watchers of one job see while it lives: its version, its state, the raw chunks of its stream, and how it ended.
//!
//! Entries exist only while somebody watches or the job runs; a watcher subscribes first and reads the store afterwards,
//! so nothing is missed between the two. Writers never wait for readers: a reader that falls further behind than
//! [`CHUNK_BYTES_MAX`] is cut and resumes from the store.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use bytes::Bytes;
use tokio::sync::watch;

use crate::domain::worker::Answer;
use crate::domain::{JobError, JobState};

/// Bytes of a stream kept for its readers.
pub const CHUNK_BYTES_MAX: usize = 4 * 1024 * 1024;

/// How a job ended, as committed.
#[derive(Clone, Debug)]
pub struct Ended {
    /// Terminal.
    pub state: JobState,
    /// With `succeeded`.
    pub answer: Option<Arc<Answer>>,
    /// With the others.
    pub error: Option<JobError>,
}

/// The latest of one job. Everything in it is committed, except `chunks_end`.
#[derive(Clone, Debug, Default)]
pub struct Live {
    /// Highest committed version seen; 0: nothing has happened since the watch began.
    pub version: i64,
    /// Highest committed event number seen.
    pub last_seq: i64,
    /// Chunks relayed so far in this attempt.
    pub chunks_end: u64,
    /// Set once, last.
    pub ended: Option<Arc<Ended>>,
}

#[derive(Debug, Default)]
struct ChunkLog {
    first: u64,
    bytes: usize,
    chunks: VecDeque<Bytes>,
}

#[derive(Debug)]
struct Entry {
    number: i64,
    live: watch::Sender<Live>,
    chunks: Mutex<ChunkLog>,
    map: Weak<Mutex<HashMap<i64, Weak<Entry>>>>,
}

impl Drop for Entry {
    fn drop(&mut self) {
        if let Some(map) = self.map.upgrade() {
            let mut map = lock(&map);
            if map.get(&self.number).is_some_and(|weak| weak.strong_count() == 0) {
                map.remove(&self.number);
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All live entries. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Hub {
    map: Arc<Mutex<HashMap<i64, Weak<Entry>>>>,
}

/// Why a watcher gets no more chunks.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("reader fell more than 4 MiB behind")]
pub struct Lagged;

impl Hub {
    /// Watches job `number` from now on.
    pub fn watch(&self, number: i64) -> JobWatch {
        let entry = self.entry(number);
        let live = entry.live.subscribe();
        JobWatch { entry, live }
    }

    /// Publishes something committed; without watchers this does nothing.
    pub fn publish(&self, number: i64, version: i64, last_seq: i64) {
        if let Some(entry) = self.existing(number) {
            entry.live.send_modify(|live| {
                live.version = live.version.max(version);
                live.last_seq = live.last_seq.max(last_seq);
            });
        }
    }

    /// Publishes the end of a job. Later calls for the same job change nothing.
    pub fn end(&self, number: i64, version: i64, last_seq: i64, ended: Ended) {
        if let Some(entry) = self.existing(number) {
            entry.live.send_modify(|live| {
                live.version = live.version.max(version);
                live.last_seq = live.last_seq.max(last_seq);
                live.ended.get_or_insert_with(|| Arc::new(ended));
            });
        }
    }

    /// Relays a chunk to whoever watches now.
    pub fn chunk(&self, number: i64, chunk: Bytes) {
        let Some(entry) = self.existing(number) else {
            return;
        };
        let end = {
            let mut log = lock(&entry.chunks);
            log.bytes += chunk.len();
            log.chunks.push_back(chunk);
            while log.bytes > CHUNK_BYTES_MAX {
                let Some(dropped) = log.chunks.pop_front() else {
                    break;
                };
                log.bytes -= dropped.len();
                log.first += 1;
            }
            log.first + log.chunks.len() as u64
        };
        entry.live.send_modify(|live| live.chunks_end = end);
    }

    fn existing(&self, number: i64) -> Option<Arc<Entry>> {
        lock(&self.map).get(&number).and_then(Weak::upgrade)
    }

    fn entry(&self, number: i64) -> Arc<Entry> {
        let mut map = lock(&self.map);
        if let Some(entry) = map.get(&number).and_then(Weak::upgrade) {
            return entry;
        }
        let entry = Arc::new(Entry {
            number,
            live: watch::Sender::new(Live::default()),
            chunks: Mutex::default(),
            map: Arc::downgrade(&self.map),
        });
        map.insert(number, Arc::downgrade(&entry));
        entry
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        lock(&self.map).len()
    }
}

/// One watcher of one job.
#[derive(Debug)]
pub struct JobWatch {
    entry: Arc<Entry>,
    live: watch::Receiver<Live>,
}

impl JobWatch {
    /// The latest, without waiting.
    pub fn live(&self) -> Live {
        self.live.borrow().clone()
    }

    /// Waits until something differs from what this watcher saw last.
    pub async fn changed(&mut self) -> Live {
        // The sender lives in `entry`, which we hold: this cannot fail.
        let _ = self.live.changed().await;
        self.live.borrow_and_update().clone()
    }

    /// Waits for the end. Cancel-safe.
    pub async fn ended(&mut self) -> Arc<Ended> {
        loop {
            if let Some(ended) = self.live.borrow_and_update().ended.clone() {
                return ended;
            }
            let _ = self.live.changed().await;
        }
    }

    /// Chunks from number `from` on (0-based, counted within the attempt), as far as they are there.
    pub fn chunks(&self, from: u64) -> Result<Vec<Bytes>, Lagged> {
        let log = lock(&self.entry.chunks);
        if from < log.first {
            return Err(Lagged);
        }
        let skip = usize::try_from(from - log.first).unwrap_or(usize::MAX);
        Ok(log.chunks.iter().skip(skip).cloned().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_watcher_sees_chunks_then_the_end_and_leaves_nothing_behind() {
        let hub = Hub::default();
        hub.chunk(1, Bytes::from_static(b"nobody watches"));
        let mut watch = hub.watch(1);
        hub.chunk(1, Bytes::from_static(b"a"));
        hub.chunk(1, Bytes::from_static(b"b"));
        assert_eq!(watch.changed().await.chunks_end, 2);
        assert_eq!(watch.chunks(1).expect("kept"), vec![Bytes::from_static(b"b")]);
        hub.end(1, 3, 4, Ended { state: JobState::Succeeded, answer: None, error: None });
        hub.end(1, 9, 9, Ended { state: JobState::Failed, answer: None, error: None });
        assert_eq!(watch.ended().await.state, JobState::Succeeded);
        drop(watch);
        assert_eq!(hub.len(), 0);
    }

    #[test]
    fn a_slow_reader_is_cut_and_memory_is_bounded() {
        let hub = Hub::default();
        let watch = hub.watch(1);
        for _ in 0..5 {
            hub.chunk(1, Bytes::from(vec![0; 1024 * 1024]));
        }
        assert_eq!(watch.chunks(0), Err(Lagged));
        assert_eq!(watch.chunks(1).expect("kept").len(), 4);
    }
}
