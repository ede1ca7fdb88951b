//! The waiting jobs of one model and class: by tenant, and within a tenant by priority and arrival. Pure.
//!
//! A waiting job is 24 bytes in its tenant's map and 8 in the order of arrivals, so that a million of them fit.

use std::collections::{BTreeMap, BTreeSet};

use crate::domain::{Class, Face, Millis};

/// Bits of a row's number in a [`Key`].
const NUMBER_BITS: u32 = 34;
const TENANT_BITS: u32 = 20;
const PRIORITY_BITS: u32 = u8::BITS;
/// Bits below the number in an [`Arrival`].
const ARRIVAL_BITS: u32 = TENANT_BITS + PRIORITY_BITS;

/// Order within a tenant: higher priority first, then arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key(u64);

impl Key {
    pub(super) fn new(priority: u8, number: i64) -> Self {
        Self((u64::from(u8::MAX - priority) << NUMBER_BITS) | number.unsigned_abs())
    }

    pub(super) fn number(self) -> i64 {
        (self.0 & ((1 << NUMBER_BITS) - 1)).cast_signed()
    }

    pub(super) fn priority(self) -> u8 {
        u8::MAX - u8::try_from(self.0 >> NUMBER_BITS).unwrap_or(u8::MAX)
    }

    pub(super) fn class(self) -> Class {
        Class::of(self.priority())
    }
}

/// What most jobs have, packed: 44 bits time and 20 bits tenant; 63 bits batch key and whether a caller waits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Waiting {
    created_and_tenant: u64,
    key_and_face: u64,
}

impl Waiting {
    pub(super) fn new(created_at: Millis, tenant: u32, batch_key: i64, face: Face) -> Self {
        Self {
            created_and_tenant: (created_at.unsigned_abs() << TENANT_BITS)
                | u64::from(tenant & ((1 << TENANT_BITS) - 1)),
            key_and_face: (batch_key.cast_unsigned() << 1) | u64::from(face == Face::Sync),
        }
    }

    pub(super) fn created_at(self) -> Millis {
        (self.created_and_tenant >> TENANT_BITS).cast_signed()
    }

    /// Its place in the queue's list of tenants.
    pub(super) fn tenant(self) -> u32 {
        u32::try_from(self.created_and_tenant & ((1 << TENANT_BITS) - 1)).unwrap_or(0)
    }

    /// All but the batch key's highest bit.
    pub(super) fn batch_key(self) -> i64 {
        (self.key_and_face >> 1).cast_signed()
    }

    pub(super) fn face(self) -> Face {
        if self.key_and_face & 1 == 1 { Face::Sync } else { Face::Async }
    }
}

/// Where a waiting job is found, in the order of acceptance: number, tenant and priority, packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Arrival(u64);

impl Arrival {
    fn new(key: Key, tenant: u32) -> Self {
        Self(
            (key.number().unsigned_abs() << ARRIVAL_BITS)
                | (u64::from(tenant) << PRIORITY_BITS)
                | u64::from(key.priority()),
        )
    }

    /// Not after any of this number, nor before one of a smaller number.
    fn first_of(number: i64) -> Self {
        Self(number.unsigned_abs() << ARRIVAL_BITS)
    }

    fn key(self) -> Key {
        let priority = u8::try_from(self.0 & u64::from(u8::MAX)).unwrap_or(u8::MAX);
        Key::new(priority, (self.0 >> ARRIVAL_BITS).cast_signed())
    }

    fn tenant(self) -> u32 {
        u32::try_from((self.0 >> PRIORITY_BITS) & ((1 << TENANT_BITS) - 1)).unwrap_or(0)
    }
}

/// Waiting jobs of one class.
#[derive(Debug, Default)]
pub(super) struct Line {
    tenants: BTreeMap<u32, BTreeMap<Key, Waiting>>,
    arrivals: BTreeSet<Arrival>,
}

impl Line {
    pub(super) fn len(&self) -> usize {
        self.arrivals.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.arrivals.is_empty()
    }

    pub(super) fn insert(&mut self, key: Key, waiting: Waiting) {
        self.arrivals.insert(Arrival::new(key, waiting.tenant()));
        self.tenants.entry(waiting.tenant()).or_default().insert(key, waiting);
    }

    pub(super) fn remove(&mut self, key: Key) -> Option<Waiting> {
        let arrival = self.arrival(key)?;
        let tenant = arrival.tenant();
        let jobs = self.tenants.get_mut(&tenant)?;
        let waiting = jobs.remove(&key)?;
        if jobs.is_empty() {
            self.tenants.remove(&tenant);
        }
        self.arrivals.remove(&arrival);
        Some(waiting)
    }

    pub(super) fn get(&self, key: Key) -> Option<Waiting> {
        self.tenants.get(&self.arrival(key)?.tenant())?.get(&key).copied()
    }

    fn arrival(&self, key: Key) -> Option<Arrival> {
        self.arrivals.range(Arrival::first_of(key.number())..).next().copied().filter(|found| found.key() == key)
    }

    /// When the oldest job was accepted.
    pub(super) fn oldest(&self) -> Option<Millis> {
        self.get(self.arrivals.first()?.key()).map(Waiting::created_at)
    }

    /// Tenants with their jobs, each in order.
    pub(super) fn tenants(&self) -> impl Iterator<Item = (u32, &BTreeMap<Key, Waiting>)> {
        self.tenants.iter().map(|(tenant, jobs)| (*tenant, jobs))
    }

    /// All jobs, tenant by tenant.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&Key, &Waiting)> {
        self.tenants.values().flatten()
    }

    /// About how many jobs start before this one: those of its tenant, and as many of each other tenant. `None`: not here,
    /// or more than `most` places from either end of its tenant's jobs.
    pub(super) fn rank(&self, key: Key, most: usize) -> Option<usize> {
        let tenant = self.arrival(key)?.tenant();
        let jobs = self.tenants.get(&tenant)?;
        let own = before(jobs, key, most)?;
        let others = self.tenants().filter(|(other, _)| *other != tenant).map(|(_, jobs)| jobs.len().min(own));
        Some(own + others.sum::<usize>())
    }

    /// The same for a job of any place, as if the jobs of its tenant had come in even steps.
    pub(super) fn rank_about(&self, key: Key) -> Option<usize> {
        let tenant = self.arrival(key)?.tenant();
        let jobs = self.tenants.get(&tenant)?;
        let (first, last) = (jobs.first_key_value()?.0.0, jobs.last_key_value()?.0.0);
        let part = (key.0 - first) as f64 / (last - first).max(1) as f64;
        let own = usize::try_from(crate::policy::view::round(part * (jobs.len() - 1) as f64)).unwrap_or(0);
        let others = self.tenants().filter(|(other, _)| *other != tenant).map(|(_, jobs)| jobs.len().min(own));
        Some(own + others.sum::<usize>())
    }

    /// Whether this job waits here.
    pub(super) fn has(&self, key: Key) -> bool {
        self.arrival(key).is_some()
    }
}

/// Entries before `key`, counted from the nearer end; `None`: more than `most` steps from either.
fn before(map: &BTreeMap<Key, Waiting>, key: Key, most: usize) -> Option<usize> {
    let (mut ahead, mut behind) = (map.range(..key), map.range(key..));
    for steps in 0..=most {
        if ahead.next_back().is_none() {
            return Some(steps);
        }
        if behind.next().is_none() {
            return Some(map.len() - steps);
        }
    }
    None
}
