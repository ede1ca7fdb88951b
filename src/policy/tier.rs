//! Which models stay parked in host memory while it is short.

/// A parked model, or one that might be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Parked {
    /// Arrivals per ms.
    pub rate: f64,
    /// Load from disk, ms.
    pub cold_ms: f64,
    /// Load from host memory, ms.
    pub wake_ms: f64,
    /// Host memory it takes, in bytes.
    pub bytes: u64,
}

impl Parked {
    /// What keeping it is worth: load time saved per time and byte.
    fn worth(&self) -> f64 {
        self.rate * (self.cold_ms - self.wake_ms).max(0.0) / self.bytes.max(1) as f64
    }
}

/// Places of those that go to disk so that the others fit into `budget` bytes: the least worth first, ties to the first of
/// the list.
pub fn to_drop(parked: &[Parked], budget: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..parked.len()).collect();
    order.sort_by(|a, b| parked[*a].worth().total_cmp(&parked[*b].worth()));
    let mut total: u64 = parked.iter().map(|p| p.bytes).sum();
    let mut gone = Vec::new();
    for place in order {
        if total <= budget {
            break;
        }
        total -= parked[place].bytes;
        gone.push(place);
    }
    gone
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parked(rate: f64, cold_ms: f64, bytes: u64) -> Parked {
        Parked { rate, cold_ms, wake_ms: 1_000.0, bytes }
    }

    #[test]
    fn the_model_that_saves_least_per_byte_goes_first() {
        let all = [parked(1.0, 41_000.0, 40), parked(0.1, 91_000.0, 40), parked(0.5, 21_000.0, 10)];
        assert_eq!(to_drop(&all, 90), [0_usize; 0]);
        assert_eq!(to_drop(&all, 80), [1]);
        assert_eq!(to_drop(&all, 49), [1, 0]);
        assert_eq!(to_drop(&all, 0), [1, 0, 2]);
    }
}
