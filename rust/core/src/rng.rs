//! Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") and the planners' noise.
//!
//! # Noise layout
//!
//! This is the one definition; every other implementation (`NumPy` in the tests, Triton) is checked against it.
//! A value is a pure function of (seed, environment id, plan, iteration, sample, position), so an environment draws the
//! same noise alone or in any batch, in any order, on any number of threads.
//!
//! ```text
//! key     = (seed low 32 bits, seed high 32 bits)
//! counter = (iteration << 16 | block, sample, plan, environment id)
//! ```
//!
//! Block `b` of a sample gives the words `w0..w3`, which become the values `4b .. 4b + 3` of the flattened (H, A) candidate
//! (a last block that is not needed whole is cut off) by Box-Muller:
//!
//! ```text
//! u  = ((w0 >> 8) + 1) * 2^-24  in (0, 1]        n0 = sqrt(-2 ln u) cos(2 pi v)
//! v  =  (w1 >> 8)      * 2^-24  in [0, 1)        n1 = sqrt(-2 ln u) sin(2 pi v)        n2, n3: the same from (w2, w3)
//! ```
//!
//! Only 24 of the 32 bits are used because such `u` and `v` are exact in float32: a float32 implementation starts from the
//! same numbers. The largest value is sqrt(48 ln 2), about 5.77. Limits: iteration < 65536, at most 65536 blocks a sample.

use std::f64::consts::TAU;

use crate::Error;

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Iterations that the counter can tell apart, and blocks within a sample.
pub const FIELD: usize = 1 << 16;

/// The four Philox4x32-10 words of a counter under a key.
#[must_use]
pub fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let p0 = u64::from(MULTIPLIERS[0]) * u64::from(counter[0]);
        let p1 = u64::from(MULTIPLIERS[1]) * u64::from(counter[2]);
        counter =
            [(p1 >> 32) as u32 ^ counter[1] ^ key[0], p1 as u32, (p0 >> 32) as u32 ^ counter[3] ^ key[1], p0 as u32];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// Four standard normals from the four words of a block.
#[must_use]
pub fn normals(words: [u32; 4]) -> [f64; 4] {
    const UNIT: f64 = 1.0 / (1 << 24) as f64;
    let pair = |w0: u32, w1: u32| {
        let radius = (-2.0 * (f64::from((w0 >> 8) + 1) * UNIT).ln()).sqrt();
        let (sin, cos) = (TAU * (f64::from(w1 >> 8) * UNIT)).sin_cos();
        (radius * cos, radius * sin)
    };
    let (n0, n1) = pair(words[0], words[1]);
    let (n2, n3) = pair(words[2], words[3]);
    [n0, n1, n2, n3]
}

/// Checks that the counter has room for these: `width` values a sample, `samples` samples an environment.
///
/// # Errors
/// [`Error::Argument`] when a size is zero or past its limit.
pub fn check(iteration: usize, samples: usize, width: usize) -> Result<(), Error> {
    if iteration >= FIELD {
        return Err(Error::Argument(format!("iteration must be below {FIELD}, got {iteration}")));
    }
    if samples == 0 || samples as u64 > 1 << 32 {
        return Err(Error::Argument(format!("samples must be in 1..=2^32, got {samples}")));
    }
    if width == 0 || width.div_ceil(4) > FIELD {
        let most = 4 * FIELD;
        return Err(Error::Argument(format!("width (horizon * action width) must be in 1..={most}, got {width}")));
    }
    Ok(())
}

/// Writes the noise of one iteration, (E, S, width) with E = `env_ids.len()` and S = `samples`, into `out`.
///
/// # Errors
/// [`Error::Argument`] when a size is past its limit or `out` does not divide into E * S samples.
pub fn fill(
    seed: u64,
    plan: u32,
    iteration: usize,
    env_ids: &[u32],
    samples: usize,
    out: &mut [f64],
) -> Result<(), Error> {
    let rows = env_ids.len() * samples;
    if rows == 0 || out.len() % rows != 0 {
        return Err(Error::Argument(format!("noise of {} values does not divide into {rows} samples", out.len())));
    }
    let width = out.len() / rows;
    check(iteration, samples, width)?;
    let key = [seed as u32, (seed >> 32) as u32];
    let high = (iteration as u32) << 16;
    for (row, values) in out.chunks_exact_mut(width).enumerate() {
        let (env_id, sample) = (env_ids[row / samples], (row % samples) as u32);
        for (block, four) in values.chunks_mut(4).enumerate() {
            let words = philox([high | block as u32, sample, plan, env_id], key);
            four.copy_from_slice(&normals(words)[..four.len()]);
        }
    }
    Ok(())
}

/// The noise of one iteration, (E, S, width), in a new vector.
///
/// # Errors
/// [`Error::Argument`] when a size is zero or past its limit, or there is no memory for the result.
pub fn noise(
    seed: u64,
    plan: u32,
    iteration: usize,
    env_ids: &[u32],
    samples: usize,
    width: usize,
) -> Result<Vec<f64>, Error> {
    check(iteration, samples, width)?;
    let mut out = zeros(&[env_ids.len(), samples, width])?;
    if !out.is_empty() {
        fill(seed, plan, iteration, env_ids, samples, &mut out)?;
    }
    Ok(out)
}

/// A zeroed buffer of this shape; a shape that cannot be had is an error, not the end of the process.
pub(crate) fn zeros(shape: &[usize]) -> Result<Vec<f64>, Error> {
    let mut out = Vec::new();
    shape
        .iter()
        .try_fold(1_usize, |size, &n| size.checked_mul(n))
        .and_then(|size| out.try_reserve_exact(size).ok().map(|()| out.resize(size, 0.0)))
        .ok_or_else(|| Error::Argument(format!("samples: no memory for float64 candidates of shape {shape:?}")))?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `philox4x32 10` of Random123's `kat_vectors`; the third is made of digits of pi.
    #[test]
    fn known_answers() {
        let ones = u32::MAX;
        let pi = ([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]);
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([ones; 4], [ones; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(philox(pi.0, pi.1), [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn layout_is_the_documented_one() {
        let seed = 0x0123_4567_89ab_cdef;
        let out = noise(seed, 7, 3, &[5, 9], 4, 6).unwrap();
        let words = philox([(3 << 16) | 1, 2, 7, 9], [0x89ab_cdef, 0x0123_4567]);
        let second_block = &out[(4 + 2) * 6 + 4..(4 + 2) * 6 + 6];
        assert_eq!(second_block, &normals(words)[..2]);
    }

    #[test]
    fn extreme_words_give_finite_normals() {
        let largest = normals([0, 0, 0, 1 << 31]);
        assert!((largest[0] - (48.0 * 2_f64.ln()).sqrt()).abs() < 1e-12);
        assert!((largest[2] + largest[0]).abs() < 1e-12, "v = 1/2 is the other side");
        assert!(normals([u32::MAX; 4]).iter().all(|n| n.abs() < 1e-12), "u = 1 has radius 0");
    }

    #[test]
    fn moments_are_normal() {
        let values = noise(1, 0, 0, &[0, 1], 1000, 50).unwrap();
        let n = values.len() as f64;
        let moment = |p: i32| values.iter().map(|x| x.powi(p)).sum::<f64>() / n;
        assert!(moment(1).abs() < 0.02 && (moment(2) - 1.0).abs() < 0.02, "{} {}", moment(1), moment(2));
        assert!(moment(3).abs() < 0.05 && (moment(4) - 3.0).abs() < 0.1, "{} {}", moment(3), moment(4));
    }

    #[test]
    fn an_environment_does_not_see_its_batch() {
        let batch = noise(3, 1, 2, &[4, 8, 15], 6, 10).unwrap();
        let alone = noise(3, 1, 2, &[15], 6, 10).unwrap();
        assert_eq!(batch[2 * 60..], alone);
        assert_eq!(alone[..3 * 10], noise(3, 1, 2, &[15], 3, 10).unwrap(), "more samples only add samples");
    }

    #[test]
    fn limits() {
        assert!(noise(0, 0, FIELD - 1, &[0], 1, 4).is_ok());
        assert!(noise(0, 0, 0, &[0], 1, 4 * FIELD).is_ok());
        let text = |result: Result<Vec<f64>, Error>| result.unwrap_err().to_string();
        assert!(text(noise(0, 0, FIELD, &[0], 1, 4)).contains("iteration must be below 65536, got 65536"));
        assert!(text(noise(0, 0, 0, &[0], 1, 4 * FIELD + 1)).contains("width"));
        assert!(text(noise(0, 0, 0, &[0], 1, 0)).contains("width"));
        assert!(text(noise(0, 0, 0, &[0], 0, 4)).contains("samples"));
        assert!(text(noise(0, 0, 0, &[0; 1 << 12], 1 << 32, 4 * FIELD)).contains("no memory"));
        assert!(fill(0, 0, 0, &[0], 2, &mut [0.0; 3]).is_err());
    }
}
