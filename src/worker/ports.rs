//! Choosing ports for workers. A chosen port stays taken within this program until its lease is dropped, so two workers
//! that start at the same time never get the same one.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, TcpListener};
use std::ops::RangeInclusive;
use std::sync::{Mutex, PoisonError};

/// Where a port is looked for when the preferred one is taken.
const RANGE: RangeInclusive<u16> = 8001..=8999;

static LEASED: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());

/// A port that no other worker of this program gets.
#[derive(Debug)]
pub(super) struct Lease(u16);

impl Lease {
    pub(super) fn port(&self) -> u16 {
        self.0
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut leased = LEASED.lock().unwrap_or_else(PoisonError::into_inner);
        leased.remove(&self.0);
    }
}

/// The preferred port if it is free on 127.0.0.1, else the next free one of the range; never one of `avoid`.
pub(super) fn lease(preferred: u16, avoid: &BTreeSet<u16>) -> Option<Lease> {
    let mut leased = LEASED.lock().unwrap_or_else(PoisonError::into_inner);
    let next = RANGE.filter(|port| *port > preferred);
    let before = RANGE.filter(|port| *port < preferred);
    let port = std::iter::once(preferred)
        .chain(next)
        .chain(before)
        .find(|port| !avoid.contains(port) && !leased.contains(port) && is_free(*port))?;
    leased.insert(port);
    Some(Lease(port))
}

/// Whether another program than this one and its workers has this port.
pub(super) fn is_foreign(port: u16) -> bool {
    let leased = LEASED.lock().unwrap_or_else(PoisonError::into_inner);
    !leased.contains(&port) && !is_free(port)
}

fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_or_leased_port_is_passed_over() {
        let none = BTreeSet::new();
        let first = lease(8900, &none).unwrap();
        let second = lease(first.port(), &none).unwrap();
        assert_ne!(first.port(), second.port());

        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        assert!(is_foreign(port) && !is_foreign(first.port()));
        let third = lease(port, &none).unwrap();
        assert!(RANGE.contains(&third.port()));

        let avoided = first.port();
        drop(first);
        let again = lease(avoided, &BTreeSet::from([avoided])).unwrap();
        assert_ne!(again.port(), avoided);
    }
}
