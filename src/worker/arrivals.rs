//! Who is on the way to which GPUs, of all supervisors: where the driver shows no processes, a total says what a worker has given
//! back only without what its neighbours may have taken meanwhile.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;

/// A worker: its model, and its number among the workers of that.
type Who = (String, u32);

/// Loads and wakes: of each worker the last one. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Arrivals(Arc<Mutex<BTreeMap<Who, Arrival>>>);

#[derive(Debug)]
struct Arrival {
    gpus: Vec<u32>,
    /// The most that it takes on each of them.
    bytes: u64,
    /// `None`: it is on its way.
    ended: Option<Instant>,
}

/// While it lives a worker is on its way.
pub(super) struct OnItsWay {
    arrivals: Arrivals,
    who: Who,
}

impl Drop for OnItsWay {
    fn drop(&mut self) {
        if let Some(arrival) = self.arrivals.lock().get_mut(&self.who) {
            arrival.ended = Some(Instant::now());
        }
    }
}

impl Arrivals {
    /// Takes memory of these GPUs from now on, at most `bytes` on each; none: of any.
    pub(super) fn begin(&self, who: Who, gpus: &[u32], bytes: u64) -> OnItsWay {
        self.lock().insert(who.clone(), Arrival { gpus: gpus.to_vec(), bytes, ended: None });
        OnItsWay { arrivals: self.clone(), who }
    }

    /// The most that others than `who` have taken of these GPUs together after `since`, in bytes.
    pub(super) fn since(&self, since: Instant, gpus: &[u32], who: &Who) -> u64 {
        let all = self.lock();
        let others = all.iter().filter(|(other, arrival)| *other != who && arrival.ended.is_none_or(|at| at >= since));
        others.map(|(_, arrival)| arrival.bytes.saturating_mul(arrival.count_of(gpus))).fold(0, u64::saturating_add)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Who, Arrival>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Arrival {
    /// On how many of these GPUs it is.
    fn count_of(&self, gpus: &[u32]) -> u64 {
        let count = match (self.gpus.is_empty(), gpus.is_empty()) {
            (false, false) => self.gpus.iter().filter(|gpu| gpus.contains(gpu)).count(),
            _ => self.gpus.len().max(gpus.len()).max(1),
        };
        u64::try_from(count).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test(start_paused = true)]
    async fn others_who_came_since_are_counted_where_they_came() {
        let arrivals = Arrivals::default();
        let who = |name: &str| (name.to_owned(), 0);
        let since = |at, gpus: &[u32]| arrivals.since(at, gpus, &who("a"));
        let pass = || tokio::time::advance(Duration::from_secs(1));
        let own = arrivals.begin(who("a"), &[0], 100);
        let b = arrivals.begin(who("b"), &[0, 1], 20);
        pass().await;
        let then = Instant::now();
        assert_eq!((since(then, &[0]), since(then, &[0, 1]), since(then, &[2])), (20, 40, 0), "b is on its way");
        pass().await;
        drop((own, b));
        assert_eq!(since(then, &[0]), 20, "b was on its way then");
        pass().await;
        let now = Instant::now();
        assert_eq!(since(now, &[0]), 0, "b was there before");
        let _c = arrivals.begin(who("c"), &[], u64::MAX);
        let _again = arrivals.begin(who("b"), &[1], 20);
        assert_eq!((since(now, &[0, 1]), since(now, &[])), (u64::MAX, u64::MAX), "nobody said where c is to be");
    }
}
