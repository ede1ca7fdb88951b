//! Copies of live jobs in memory, for those who poll them. A copy is made by the first look and dropped when a change has
//! been committed, so a poll costs a read only after something happened.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::domain::Job;

const SHARDS: usize = 64;
/// Copies in one shard at most; then it starts anew.
const SHARD_MAX: usize = 128;

#[derive(Default)]
struct Shard {
    /// Raised by every drop: a copy read before it may be old.
    generation: u64,
    jobs: HashMap<i64, Arc<Job>>,
}

/// Cheap to clone.
#[derive(Clone, Default)]
pub(super) struct Live {
    inner: Arc<Inner>,
}

struct Inner {
    shards: [Mutex<Shard>; SHARDS],
    copies: AtomicUsize,
    /// Readers between [`Live::get`] and [`Live::put`].
    filling: AtomicUsize,
}

impl Default for Inner {
    fn default() -> Self {
        Self {
            shards: std::array::from_fn(|_| Mutex::default()),
            copies: AtomicUsize::new(0),
            filling: AtomicUsize::new(0),
        }
    }
}

/// What a reader that found no copy brings back with what it read.
pub(super) struct Ticket {
    number: i64,
    generation: u64,
    inner: Arc<Inner>,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.inner.filling.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Live {
    fn shard(&self, number: i64) -> std::sync::MutexGuard<'_, Shard> {
        let index = usize::try_from(number.rem_euclid(SHARDS as i64)).unwrap_or(0);
        self.inner.shards[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The copy, or a ticket for bringing one.
    pub(super) fn get(&self, number: i64) -> Result<Arc<Job>, Ticket> {
        self.inner.filling.fetch_add(1, Ordering::SeqCst);
        let ticket = |generation| Ticket { number, generation, inner: self.inner.clone() };
        let shard = self.shard(number);
        let ticket = ticket(shard.generation);
        match shard.jobs.get(&number) {
            Some(job) => Ok(job.clone()),
            None => Err(ticket),
        }
    }

    /// Keeps what was read, unless something of its shard changed since the ticket was given.
    pub(super) fn put(&self, ticket: &Ticket, job: &Arc<Job>) {
        let mut shard = self.shard(ticket.number);
        if shard.generation != ticket.generation || job.state.is_terminal() {
            return;
        }
        if shard.jobs.len() >= SHARD_MAX {
            self.inner.copies.fetch_sub(shard.jobs.len(), Ordering::SeqCst);
            shard.jobs.clear();
        }
        if shard.jobs.insert(ticket.number, job.clone()).is_none() {
            self.inner.copies.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Drops copies of jobs that have changed. After the commit, before anybody is told.
    pub(super) fn forget(&self, numbers: &[i64]) {
        // A reader that comes later than this look reads what has been committed.
        if self.inner.copies.load(Ordering::SeqCst) == 0 && self.inner.filling.load(Ordering::SeqCst) == 0 {
            return;
        }
        for number in numbers {
            let mut shard = self.shard(*number);
            shard.generation += 1;
            if shard.jobs.remove(number).is_some() {
                self.inner.copies.fetch_sub(1, Ordering::SeqCst);
            }
        }
    }
}
