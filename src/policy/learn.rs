//! Moving averages of what things cost, and what is assumed before anything was measured.

use crate::domain::Millis;

/// Weight of a new sample of a load, wake or stop.
pub const LOAD_WEIGHT: f64 = 0.3;
/// Weight of a new sample of a service time.
pub const SERVICE_WEIGHT: f64 = 0.1;
/// Time constant of the arrival rate, ms.
pub const RATE_TAU_MS: f64 = 300_000.0;
/// Shortest wake that is assumed, ms.
const WAKE_MIN_MS: f64 = 2_000.0;

/// Takes a sample into an average; the first one is the average.
pub fn blend(known: &mut Option<f64>, sample: f64, weight: f64) {
    *known = Some(known.map_or(sample, |old| old + weight * (sample - old)));
}

/// Load from host memory, ms, as long as none was measured: a tenth of one from disk, but not more than that.
pub fn wake_prior_ms(cold_ms: f64) -> f64 {
    (cold_ms / 10.0).max(WAKE_MIN_MS).min(cold_ms)
}

/// Arrivals per ms, forgetting with [`RATE_TAU_MS`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rate {
    rate: f64,
    at: Millis,
}

impl Rate {
    /// One arrival.
    pub fn count(&mut self, now: Millis) {
        self.rate = self.per_ms(now) + 1.0 / RATE_TAU_MS;
        self.at = now;
    }

    /// The rate now.
    pub fn per_ms(&self, now: Millis) -> f64 {
        self.rate * (-((now - self.at).max(0) as f64) / RATE_TAU_MS).exp()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_steady_stream_gives_its_rate() {
        let mut rate = Rate::default();
        (0..6_000).for_each(|n| rate.count(n * 500));
        assert!((rate.per_ms(3_000_000) * 500.0 - 1.0).abs() < 0.01, "{rate:?}");
        assert!(rate.per_ms(3_000_000 + 1_500_000) < rate.per_ms(3_000_000) / 100.0);
    }

    #[test]
    fn a_wake_is_assumed_to_take_a_tenth_of_a_load() {
        assert_eq!([60_000.0, 5_000.0, 500.0].map(wake_prior_ms), [6_000.0, 2_000.0, 500.0]);
    }

    proptest! {
        #[test]
        fn averages_stay_within_what_was_seen(samples in prop::collection::vec(0.0..1e7_f64, 1..50), weight in 0.01..1.0_f64) {
            let mut known = None;
            samples.iter().for_each(|sample| blend(&mut known, *sample, weight));
            let (low, high) = samples.iter().fold((f64::MAX, f64::MIN), |(l, h), s| (l.min(*s), h.max(*s)));
            let known = known.expect("a sample");
            prop_assert!(known >= low - 1e-6 && known <= high + 1e-6);
        }
    }
}
