//! What iCEM (Pinneri et al. 2020, "Sample-efficient Cross-Entropy Method for Real-time Planning") adds to CEM: noise that
//! is correlated over the horizon, a population that shrinks, and elites that are scored again.

use std::f64::consts::TAU;

use super::real::{vectorised, Real};

/// The numbers of iCEM, in the paper's symbols beta, gamma, xi and alpha.
#[derive(Clone, Copy, Debug)]
pub struct Icem {
    /// Exponent of the noise's spectrum, power ~ 1 / frequency^beta; 0 is white.
    pub beta: f64,
    /// Samples shrink by this factor from one iteration to the next, at least 1.
    pub factor: f64,
    /// Fraction of the elites that the next iteration, or the next plan, scores again; below 1.
    pub keep: f64,
    /// Share of the old mean and standard deviation in the new ones; below 1.
    pub momentum: f64,
}

#[allow(clippy::cast_sign_loss)] // none is negative
impl Icem {
    /// Samples of an iteration, never below twice the elites.
    pub(super) fn population(&self, samples: usize, elites: usize, iteration: usize) -> usize {
        let shrunk = samples as f64 * self.factor.powf(-(iteration as f64));
        (shrunk as usize).max(2 * elites).min(samples)
    }

    pub(super) fn kept(&self, elites: usize) -> usize {
        // A product that is a whole number but for rounding is that number: 0.3 * 10, 0.7 * 10.
        (self.keep * elites as f64 + 1e-9) as usize
    }
}

/// Writes the first row of the circulant matrix that colours white noise over a horizon.
///
/// In Fourier space noise of `H` steps is multiplied by `s_k = max(k, 1)^(-beta / 2)` for `k = 0 .. H / 2`, and by the same for
/// the negative frequencies. That is a linear map whose matrix is symmetric and circulant, `M[t, u] = m[|t - u|]` with
/// `m[d] ~ sum_k s_k cos(2 pi k d / H)`. Its rows all have the same norm, which is made 1: every step then has variance 1
/// whatever the horizon, H = 1 included, and beta = 0 gives the identity.
pub(super) fn colour<T: Real>(beta: f64, row: &mut [T]) {
    let horizon = row.len();
    let raw = |d: usize| -> f64 {
        (0..horizon)
            .map(|k| {
                let frequency = k.min(horizon - k).max(1) as f64;
                frequency.powf(-0.5 * beta) * (TAU * ((k * d) % horizon) as f64 / horizon as f64).cos()
            })
            .sum()
    };
    // By Parseval, the squares of a row sum up to those of the spectrum.
    let power: f64 = (0..horizon).map(|k| (k.min(horizon - k).max(1) as f64).powf(-beta)).sum();
    let norm = 1.0 / (power * horizon as f64).sqrt();
    for (d, m) in row.iter_mut().enumerate() {
        *m = T::nearest(norm * raw(d));
    }
}

/// Colours rows (., H, A) of white noise, each action over the horizon; `scratch` holds one row.
pub(super) fn apply<T: Real>(matrix: &[T], rows: &mut [T], scratch: &mut [T]) {
    let horizon = matrix.len();
    let width = scratch.len() / horizon;
    vectorised(
        #[inline(always)]
        || {
            for row in rows.chunks_exact_mut(scratch.len()) {
                scratch.copy_from_slice(row);
                for (t, out) in row.chunks_exact_mut(width).enumerate() {
                    out.fill(T::default());
                    for (u, white) in scratch.chunks_exact(width).enumerate() {
                        let m = matrix[t.abs_diff(u)];
                        for (out, &white) in out.iter_mut().zip(white) {
                            *out = m.fma(white, *out);
                        }
                    }
                }
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    const HORIZONS: [usize; 7] = [1, 2, 3, 4, 5, 30, 31];
    const BETAS: [f64; 5] = [0.0, 0.25, 1.0, 2.0, 2.5];

    fn matrix(beta: f64, horizon: usize) -> Vec<f64> {
        let mut row = vec![0.0; horizon];
        colour(beta, &mut row);
        row
    }

    #[test]
    fn every_step_has_unit_variance() {
        for horizon in HORIZONS {
            for beta in BETAS {
                let m = matrix(beta, horizon);
                for t in 0..horizon {
                    let variance: f64 = (0..horizon).map(|u| m[t.abs_diff(u)].powi(2)).sum();
                    assert!((variance - 1.0).abs() < 1e-12, "H {horizon} beta {beta} step {t}: {variance}");
                }
            }
        }
    }

    #[test]
    fn white_is_left_alone() {
        for horizon in HORIZONS {
            let m = matrix(0.0, horizon);
            assert!((m[0] - 1.0).abs() < 1e-12 && m[1..].iter().all(|m| m.abs() < 1e-12), "{m:?}");
        }
    }

    #[test]
    fn the_spectrum_is_a_power_law() {
        for horizon in [3, 5, 30] {
            for beta in BETAS {
                // The eigenvalues of a circulant matrix are the Fourier transform of its first row.
                let m = matrix(beta, horizon);
                let gain = |k: usize| -> f64 {
                    (0..horizon).map(|d| m[d] * (TAU * (k * d) as f64 / horizon as f64).cos()).sum()
                };
                for k in 1..=horizon / 2 {
                    let want = (k as f64).powf(-beta);
                    assert!(((gain(k) / gain(1)).powi(2) - want).abs() < 1e-9, "H {horizon} beta {beta} k {k}");
                }
                assert!((gain(0) - gain(1)).abs() < 1e-12);
            }
        }
    }

    #[test]
    fn the_map_is_the_matrix() {
        let m = matrix(1.5, 5);
        let mut rows: Vec<f64> = (0..2 * 5 * 3).map(|i| f64::from(i).sin()).collect();
        let white = rows.clone();
        apply(&m, &mut rows, &mut [0.0; 15]);
        for (i, row) in white.chunks(15).enumerate() {
            for t in 0..5_usize {
                for a in 0..3 {
                    let want: f64 = (0..5).map(|u| m[t.abs_diff(u)] * row[u * 3 + a]).sum();
                    assert!((rows[i * 15 + t * 3 + a] - want).abs() < 1e-14);
                }
            }
        }
    }

    #[test]
    fn the_population_shrinks_to_twice_the_elites() {
        let icem = Icem { beta: 2.0, factor: 1.25, keep: 0.3, momentum: 0.1 };
        let sizes: Vec<usize> = (0..10).map(|i| icem.population(100, 10, i)).collect();
        assert_eq!(sizes, [100, 80, 64, 51, 40, 32, 26, 20, 20, 20]);
        assert_eq!(icem.population(15, 10, 3), 15, "never more than the samples asked for");
        assert_eq!([10, 3, 2, 30].map(|elites| icem.kept(elites)), [3, 0, 0, 9]);
        assert_eq!(icem.population(100, 10, 65535), 20);
    }
}
