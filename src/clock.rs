//! Time as a value: the only place that asks the system what time it is.

use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use crate::domain::Millis;

/// Says what time it is. Wall-clock milliseconds are stored and shown; durations are measured with `tokio::time`, and
/// converted where they are compared with this clock, which may be a fast one.
pub trait Clock: Send + Sync + 'static {
    /// Milliseconds since the Unix epoch.
    fn now(&self) -> Millis;

    /// How many times faster than real time it goes.
    fn pace(&self) -> f64 {
        1.0
    }

    /// How long a `time` by this clock really is.
    fn really(&self, time: Duration) -> Duration {
        if self.pace() > 1.0 { time.div_f64(self.pace()) } else { time }
    }

    /// How long it really is until this clock shows `at`; zero if it has.
    fn until(&self, at: Millis) -> Duration {
        self.really(Duration::from_millis(u64::try_from(at - self.now()).unwrap_or(0)))
    }

    /// By how many milliseconds this clock goes on in a real `time`.
    fn millis_in(&self, time: Duration) -> Millis {
        let time = if self.pace() > 1.0 { time.mul_f64(self.pace()) } else { time };
        i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
    }
}

/// The system's clock, held so that it never steps back within one run of the program, and never stands still: see
/// `Held`.
#[derive(Debug)]
pub struct SystemClock {
    begun: Instant,
    held: Mutex<Held>,
}

impl Default for SystemClock {
    #[expect(clippy::disallowed_methods, reason = "the one place that reads the clocks")]
    fn default() -> Self {
        Self { begun: Instant::now(), held: Mutex::default() }
    }
}

impl Clock for SystemClock {
    #[expect(clippy::disallowed_methods, reason = "the one place that reads the clocks")]
    fn now(&self) -> Millis {
        let millis = |duration: std::time::Duration| i64::try_from(duration.as_millis()).unwrap_or(i64::MAX);
        let wall = millis(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default());
        let steady = millis(self.begun.elapsed());
        self.held.lock().unwrap_or_else(PoisonError::into_inner).read(wall, steady)
    }
}

/// The rule of [`SystemClock`]: when the wall clock is set back, the time shown goes on from where it was at half the pace,
/// until the wall clock has caught up. Were it to stand still, no pause would end for as long as the clock was set back.
#[derive(Debug, Default)]
pub(crate) struct Held {
    latest: Millis,
    /// While the wall clock is behind: the time shown when it fell behind, and the steady clock then.
    behind: Option<(Millis, Millis)>,
}

impl Held {
    /// `wall`: what the system's clock says; `steady`: of a clock that nobody sets.
    pub(crate) fn read(&mut self, wall: Millis, steady: Millis) -> Millis {
        let at_half_pace = match self.behind {
            Some((shown, since)) => shown.saturating_add((steady - since) / 2),
            None => self.latest,
        };
        if wall >= at_half_pace {
            self.behind = None;
        } else {
            self.behind.get_or_insert((self.latest, steady));
        }
        self.latest = self.latest.max(wall).max(at_half_pace);
        self.latest
    }
}

/// A clock that goes faster than time from where the system's clock was when it was made. For `replay`.
#[derive(Debug)]
pub struct FastClock {
    begun: Instant,
    since: Millis,
    pace: f64,
}

impl FastClock {
    /// Most that a clock may be faster: at more, a millisecond of real time is ten seconds.
    pub const PACE_MAX: f64 = 10_000.0;

    /// From the value of `ROUNDHOUSE_CLOCK_FACTOR`; an error says what is wrong with it.
    #[expect(clippy::disallowed_methods, reason = "the one place that reads the clocks")]
    pub fn parse(text: &str) -> Result<Self, String> {
        let pace = text.trim().parse().ok().filter(|pace| (1.0..=Self::PACE_MAX).contains(pace));
        let pace = pace.ok_or_else(|| format!("`{text}` is no number from 1 to {}", Self::PACE_MAX))?;
        Ok(Self { begun: Instant::now(), since: SystemClock::default().now(), pace })
    }
}

impl Clock for FastClock {
    fn now(&self) -> Millis {
        self.since.saturating_add(self.millis_in(self.begun.elapsed()))
    }

    fn pace(&self) -> f64 {
        self.pace
    }
}

/// A clock that moves when it is told to. For tests.
#[derive(Debug, Default)]
pub struct ManualClock {
    now: AtomicI64,
}

impl ManualClock {
    /// Starts at `now` ms.
    pub fn at(now: Millis) -> Self {
        Self { now: AtomicI64::new(now) }
    }

    /// Moves forward by `ms`.
    pub fn advance(&self, ms: i64) {
        self.now.fetch_add(ms, Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Millis {
        self.now.load(Ordering::SeqCst)
    }
}

/// RFC 3339 in UTC with milliseconds, as native JSON shows times.
pub fn rfc3339(at: Millis) -> String {
    let format =
        time::macros::format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");
    time::OffsetDateTime::from_unix_timestamp_nanos(i128::from(at) * 1_000_000)
        .ok()
        .and_then(|t| t.format(format).ok())
        .unwrap_or_else(|| at.to_string())
}

/// The time that a text as `2026-09-21T14:13:20.123Z` names; `None`: it is none.
pub fn from_rfc3339(text: &str) -> Option<Millis> {
    let at = time::OffsetDateTime::parse(text, &time::format_description::well_known::Rfc3339).ok()?;
    i64::try_from(at.unix_timestamp_nanos() / 1_000_000).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_rfc3339() {
        assert_eq!(rfc3339(1_790_000_000_123), "2026-09-21T14:13:20.123Z");
        assert_eq!(from_rfc3339("2026-09-21T16:13:20.123+02:00"), Some(1_790_000_000_123));
        assert_eq!(from_rfc3339("2026-09-21"), None);
    }

    #[test]
    fn a_fast_clock_goes_on_by_its_factor() {
        let clock = FastClock::parse(" 50 ").unwrap();
        assert_eq!(clock.millis_in(Duration::from_millis(30)), 1_500);
        assert_eq!(clock.really(Duration::from_millis(1_500)), Duration::from_millis(30));
        let begun = clock.begun.elapsed();
        assert!(clock.now() - clock.since >= clock.millis_in(begun));
        assert!(clock.until(clock.since + 50_000_000) <= Duration::from_secs(1_000));
        assert_eq!(clock.until(clock.since), Duration::ZERO);
        let plain = SystemClock::default();
        assert_eq!(plain.millis_in(Duration::from_millis(30)), 30);
        assert_eq!(plain.really(Duration::from_micros(1_500)), Duration::from_micros(1_500));
        for wrong in ["", "fast", "0.5", "NaN", "inf"] {
            let error = FastClock::parse(wrong).unwrap_err();
            assert_eq!(error, format!("`{wrong}` is no number from 1 to 10000"));
        }
    }

    #[test]
    fn never_steps_back() {
        let clock = SystemClock::default();
        clock.held.lock().unwrap().latest = i64::MAX - 1_000_000;
        assert!(clock.now() >= i64::MAX - 1_000_000);
    }

    #[test]
    fn a_clock_set_back_goes_on_at_half_the_pace_until_it_is_right_again() {
        let mut held = Held::default();
        assert_eq!(held.read(10_000, 0), 10_000);
        assert_eq!([held.read(4_000, 0), held.read(4_001, 1), held.read(5_000, 1_000)], [10_000, 10_000, 10_500]);
        assert_eq!(held.read(16_000, 12_000), 16_000, "it has caught up");
        assert_eq!(held.read(17_000, 13_000), 17_000);
        assert_eq!([held.read(16_000, 13_000), held.read(17_500, 14_500)], [17_000, 17_750]);
        assert_eq!(held.read(90_000_000, 14_600), 90_000_000, "a day forward");
    }
}
