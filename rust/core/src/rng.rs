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

// What runs under another instruction set has to be compiled into the function that has it.
#![allow(clippy::inline_always)]

use std::f64::consts::{FRAC_PI_2, LN_2, SQRT_2};

use crate::Error;

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Iterations that the counter can tell apart, and blocks within a sample.
pub const FIELD: usize = 1 << 16;

/// The four Philox4x32-10 words of a counter under a key.
#[must_use]
pub fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    philox_lanes(counter.map(|word| [word]), key).map(|[word]| word)
}

/// Taylor coefficients in the square of the argument, lowest first: artanh(s) / s, sin(r) / r, cos(r).
const ARTANH: [f64; 11] = {
    let mut series = [0.0; 11];
    let mut n = 0;
    while n < 11 {
        series[n] = 1.0 / (2 * n + 1) as f64;
        n += 1;
    }
    series
};
const SIN: [f64; 9] = alternating_factorials(1);
const COS: [f64; 9] = alternating_factorials(0);

/// `(-1)^n / (2 n + first)!`
const fn alternating_factorials(first: usize) -> [f64; 9] {
    let mut series = [1.0; 9];
    let mut n = 1;
    while n < 9 {
        let k = 2 * n + first;
        series[n] = -series[n - 1] / ((k - 1) * k) as f64;
        n += 1;
    }
    series
}

#[inline(always)]
fn horner<const N: usize>(x: f64, coefficients: &[f64; N]) -> f64 {
    coefficients.iter().rev().fold(0.0, |sum, c| sum * x + c)
}

/// Samples computed at once: wide enough for the compiler to fill vector registers.
const LANES: usize = 16;

/// Philox of L counters at once, word by word.
#[inline(always)]
fn philox_lanes<const L: usize>(mut counter: [[u32; L]; 4], mut key: [u32; 2]) -> [[u32; L]; 4] {
    for _ in 0..10 {
        let [c0, c1, c2, c3] = counter;
        for i in 0..L {
            let p0 = u64::from(MULTIPLIERS[0]) * u64::from(c0[i]);
            let p1 = u64::from(MULTIPLIERS[1]) * u64::from(c2[i]);
            counter[0][i] = (p1 >> 32) as u32 ^ c1[i] ^ key[0];
            counter[1][i] = p1 as u32;
            counter[2][i] = (p0 >> 32) as u32 ^ c3[i] ^ key[1];
            counter[3][i] = p0 as u32;
        }
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// Box-Muller of the module's documentation: the words of `u` and `v` to `n0` and `n1`.
///
/// Own logarithm, sine and cosine (series on ranges where they are exact to an ulp or two), without a branch, so that lanes
/// stay in vector registers; and without fused multiply-adds, so that every machine computes the same bits.
#[inline(always)]
fn box_muller(w0: [u32; LANES], w1: [u32; LANES]) -> [[f64; LANES]; 2] {
    const UNIT: f64 = 1.0 / (1 << 24) as f64;
    let mut pair = [[0.0; LANES]; 2];
    for i in 0..LANES {
        let u = f64::from((w0[i] >> 8) + 1) * UNIT;
        let bits = u.to_bits();
        let mantissa = f64::from_bits(bits & 0x000F_FFFF_FFFF_FFFF | 0x3FF0_0000_0000_0000); // in [1, 2)
        let exponent = f64::from((bits >> 52) as i32 - 1023);
        let high = mantissa > SQRT_2;
        let m = if high { 0.5 * mantissa } else { mantissa }; // in [sqrt(1/2), sqrt(2)]
        let e = if high { exponent + 1.0 } else { exponent };
        // ln m = 2 artanh(s), |s| <= 0.172
        let s = (m - 1.0) / (m + 1.0);
        let artanh = s * horner(s * s, &ARTANH);
        let radius = (-2.0 * (e * LN_2 + 2.0 * artanh)).sqrt();

        // v in quarters of a turn: the nearest whole one, and what is left, |r| <= pi / 4.
        let v = w1[i] >> 8;
        let quarter = (v + (1 << 21)) >> 22;
        #[allow(clippy::cast_possible_wrap)] // both are below 2^25
        let r = f64::from(v as i32 - (quarter << 22) as i32) * (FRAC_PI_2 / f64::from(1 << 22));
        let (sin, cos) = (r * horner(r * r, &SIN), horner(r * r, &COS));
        let odd = quarter & 1 == 1;
        let (sin, cos) = if odd { (cos, sin) } else { (sin, cos) };
        pair[0][i] = radius * if (quarter + 1) & 2 == 2 { -cos } else { cos };
        pair[1][i] = radius * if quarter & 2 == 2 { -sin } else { sin };
    }
    pair
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
    // Of sample 0; the lanes count up from it.
    let counter = |block: u32, env_id: u32| [(iteration as u32) << 16 | block, 0, plan, env_id];
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2, as was just asked.
        #[allow(unsafe_code)]
        unsafe {
            fill_avx2(key, counter, env_ids, samples, width, out);
        }
        return Ok(());
    }
    fill_lanes(key, counter, env_ids, samples, width, out);
    Ok(())
}

/// `fill_lanes` for registers of four doubles; the same bits.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn fill_avx2(
    key: [u32; 2],
    counter: impl Fn(u32, u32) -> [u32; 4],
    env_ids: &[u32],
    samples: usize,
    width: usize,
    out: &mut [f64],
) {
    fill_lanes(key, counter, env_ids, samples, width, out);
}

/// A lane is a sample: the same block of `LANES` samples at once.
#[inline(always)]
fn fill_lanes(
    key: [u32; 2],
    counter: impl Fn(u32, u32) -> [u32; 4],
    env_ids: &[u32],
    samples: usize,
    width: usize,
    out: &mut [f64],
) {
    for (env, &env_id) in out.chunks_exact_mut(samples * width).zip(env_ids) {
        for (group, rows) in env.chunks_mut(LANES * width).enumerate() {
            for block in 0..width.div_ceil(4) {
                let mut counters = counter(block as u32, env_id).map(|word| [word; LANES]);
                for (i, sample) in counters[1].iter_mut().enumerate() {
                    *sample = (group * LANES + i) as u32;
                }
                let [w0, w1, w2, w3] = philox_lanes(counters, key);
                let ([n0, n1], [n2, n3]) = (box_muller(w0, w1), box_muller(w2, w3));
                for (i, row) in rows.chunks_exact_mut(width).enumerate() {
                    let values = &mut row[4 * block..];
                    let count = values.len().min(4);
                    values[..count].copy_from_slice(&[n0[i], n1[i], n2[i], n3[i]][..count]);
                }
            }
        }
    }
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
        let exact = normals(words);
        assert!(
            second_block.iter().zip(exact).all(|(got, want)| (got - want).abs() < 1e-14),
            "{second_block:?} {exact:?}"
        );
    }

    /// The formula of the module's documentation with the standard library's functions.
    fn normals([w0, w1, w2, w3]: [u32; 4]) -> [f64; 4] {
        let unit = 2_f64.powi(-24);
        let pair = |a: u32, b: u32| {
            let radius = (-2.0 * (f64::from((a >> 8) + 1) * unit).ln()).sqrt();
            let (sin, cos) = (std::f64::consts::TAU * (f64::from(b >> 8) * unit)).sin_cos();
            [radius * cos, radius * sin]
        };
        let ([n0, n1], [n2, n3]) = (pair(w0, w1), pair(w2, w3));
        [n0, n1, n2, n3]
    }

    #[test]
    fn own_functions_are_the_standard_ones() {
        let edges = (0..1 << 13).flat_map(|i: u32| [i << 8, u32::MAX - (i << 8), i.wrapping_mul(0x9E37_79B9), i << 19]);
        for (i, word) in edges.enumerate() {
            let other = (i as u32).wrapping_mul(0x85EB_CA6B).rotate_left(13);
            for (w0, w1) in [(word, other), (other, word), (word, word)] {
                let [n0, n1] = box_muller([w0; LANES], [w1; LANES]).map(|lane| lane[LANES - 1]);
                let [want0, want1, ..] = normals([w0, w1, 0, 0]);
                assert!((n0 - want0).abs() < 1e-14 && (n1 - want1).abs() < 1e-14, "{w0:x} {w1:x}: {n0} {n1}");
            }
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let (ids, samples, width) = ([3, u32::MAX], 37, 21);
        let got = noise(11, 2, 5, &ids, samples, width).unwrap();
        let mut portable = vec![0.0; got.len()];
        fill_lanes([11, 0], |b, e| [5 << 16 | b, 0, 2, e], &ids, samples, width, &mut portable);
        assert_eq!(got, portable);
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
