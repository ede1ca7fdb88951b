//! Idempotency keys of the last day: rows that are only appended, looked up in memory. A unique index over random keys would
//! cost half of the speed of a submission.

use std::collections::{HashMap, VecDeque};

use rusqlite::{Connection, params};

use super::StoreError;
use crate::domain::Millis;

/// How long a key is known.
pub const KEY_TTL_MS: i64 = 86_400_000;

/// 16 bytes of a SHA-256.
pub type Hash = [u8; 16];

/// What a client sent to make its submission repeatable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdempotencyKey {
    /// Of tenant, route and key.
    pub key: Hash,
    /// Of the body.
    pub request: Hash,
}

#[derive(Clone, Copy, Debug)]
struct Known {
    request: Hash,
    first: i64,
    at: Millis,
}

/// Known keys. Part of the writer's session: asked and changed within transactions only.
#[derive(Default)]
pub(super) struct Keys {
    known: HashMap<Hash, Known>,
    by_age: VecDeque<(Millis, Hash)>,
    uncommitted: Vec<Hash>,
}

/// What a key says about a submission.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    New,
    /// The same submission has made jobs from this number on.
    Replayed(i64),
    /// The key came with another body before.
    Reused,
}

impl Keys {
    /// Those that are not too old.
    pub(super) fn load(c: &Connection, now: Millis) -> Result<Self, StoreError> {
        let mut keys = Self::default();
        let mut statement =
            c.prepare("SELECT key_hash, request_hash, number, at FROM idempotency WHERE at > ?1 ORDER BY id")?;
        let rows = statement
            .query_map([now - KEY_TTL_MS], |row| Ok((row.get::<_, Hash>(0)?, row.get(1)?, row.get(2)?, row.get(3)?)))?;
        for row in rows {
            let (key, request, first, at) = row?;
            keys.remember(key, Known { request, first, at });
        }
        Ok(keys)
    }

    fn remember(&mut self, key: Hash, known: Known) {
        self.known.insert(key, known);
        self.by_age.push_back((known.at, key));
    }

    pub(super) fn check(&mut self, key: &IdempotencyKey, now: Millis) -> Verdict {
        while let Some((at, hash)) = self.by_age.front().copied()
            && at <= now - KEY_TTL_MS
        {
            self.by_age.pop_front();
            if self.known.get(&hash).is_some_and(|known| known.at == at) {
                self.known.remove(&hash);
            }
        }
        match self.known.get(&key.key) {
            None => Verdict::New,
            Some(known) if known.request == key.request => Verdict::Replayed(known.first),
            Some(_) => Verdict::Reused,
        }
    }

    /// Writes a key and knows it from now on.
    pub(super) fn add(
        &mut self,
        c: &Connection,
        key: &IdempotencyKey,
        first: i64,
        now: Millis,
    ) -> Result<(), StoreError> {
        c.prepare_cached("INSERT INTO idempotency (key_hash, request_hash, number, at) VALUES (?1, ?2, ?3, ?4)")?
            .execute(params![key.key, key.request, first, now])?;
        self.remember(key.key, Known { request: key.request, first, at: now });
        self.uncommitted.push(key.key);
        Ok(())
    }

    pub(super) fn committed(&mut self) {
        self.uncommitted.clear();
    }

    /// A place to go back to with [`Self::back_to`].
    pub(super) fn mark(&self) -> usize {
        self.uncommitted.len()
    }

    pub(super) fn rolled_back(&mut self) {
        self.back_to(0);
    }

    pub(super) fn back_to(&mut self, mark: usize) {
        for key in self.uncommitted.drain(mark..) {
            self.known.remove(&key);
        }
    }
}

/// Deletes keys that are too old, at most `limit`: they are the first ones.
pub(super) fn purge(c: &Connection, now: Millis, limit: u32) -> Result<usize, StoreError> {
    Ok(c.prepare_cached(
        "DELETE FROM idempotency WHERE id IN
             (SELECT id FROM (SELECT id, at FROM idempotency ORDER BY id LIMIT ?2) WHERE at <= ?1)",
    )?
    .execute(params![now - KEY_TTL_MS, limit])?)
}
