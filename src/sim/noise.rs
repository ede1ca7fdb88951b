//! How much longer or shorter a load takes than its model says: lognormal, 15 %. The noise of a model's n-th load is the
//! same under every policy, so that policies are compared on equal luck.

use std::f64::consts::TAU;

/// Standard deviation of the logarithm.
const SIGMA: f64 = 0.15;

/// Factor on the time of the `nth` load of a model.
pub(super) fn load_noise(seed: u64, model: usize, nth: u64) -> f64 {
    let mut state = mix(mix(seed ^ 0x526f_756e_6468_6f75) ^ mix(model as u64 + 1)) ^ mix(nth);
    let mut uniform = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        // 53 bits, never 0.
        ((mix(state) >> 11) as f64 + 0.5) / (1_u64 << 53) as f64
    };
    // Box and Muller.
    let (radius, angle) = ((-2.0 * uniform().ln()).sqrt(), TAU * uniform());
    (SIGMA * radius * angle.cos()).exp()
}

/// The finalizer of `SplitMix64`.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_noise_has_the_size_it_should_have() {
        let logs: Vec<f64> = (0..20_000).map(|nth| load_noise(7, nth % 5, nth as u64).ln()).collect();
        let mean = logs.iter().sum::<f64>() / logs.len() as f64;
        let deviation = (logs.iter().map(|log| (log - mean).powi(2)).sum::<f64>() / logs.len() as f64).sqrt();
        assert!(mean.abs() < 0.005, "{mean}");
        assert!((deviation - SIGMA).abs() < 0.005, "{deviation}");
    }

    #[test]
    fn the_noise_follows_its_seed() {
        assert_eq!(load_noise(7, 1, 3).to_bits(), load_noise(7, 1, 3).to_bits());
        assert_ne!(load_noise(7, 1, 3).to_bits(), load_noise(8, 1, 3).to_bits());
        assert_ne!(load_noise(7, 1, 3).to_bits(), load_noise(7, 2, 3).to_bits());
        assert_ne!(load_noise(7, 1, 3).to_bits(), load_noise(7, 1, 4).to_bits());
    }
}
