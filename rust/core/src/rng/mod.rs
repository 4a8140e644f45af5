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
//! The words are the same everywhere. The normals are float32 numbers within 1e-6 of these formulas; this module computes
//! the same bits on every processor, because it uses nothing but correctly rounded operations, fused multiply-add among
//! them. Only 24 of the 32 bits are used because such `u` and `v` are exact in float32. The largest value is
//! sqrt(48 ln 2), about 5.77. Limits: iteration < 65536, at most 65536 blocks a sample.

// What runs under another instruction set has to be compiled into the function that has it.
#![allow(clippy::inline_always)]
// Vectors take turns by number.
#![allow(clippy::needless_range_loop)]

mod lanes;

use std::f32::consts::LN_2;
use std::ops::Range;

use crate::Error;
use lanes::{Lanes, Portable};

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Iterations that the counter can tell apart, and blocks within a sample.
pub const FIELD: usize = 1 << 16;

/// Which noise: of one environment, in one iteration of one plan.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// Of everything.
    pub seed: u64,
    /// Number of the plan.
    pub plan: u32,
    /// Below 65536.
    pub iteration: u32,
    /// Of the environment.
    pub env_id: u32,
}

/// What noise becomes on its way out: `clamp(mean + std * noise, low, high)`, each (width,).
#[derive(Clone, Copy, Debug)]
pub struct Affine<'a, T> {
    /// Added to it.
    pub mean: &'a [T],
    /// Its factor.
    pub std: &'a [T],
    /// Lower bounds.
    pub low: &'a [T],
    /// Upper bounds.
    pub high: &'a [T],
}

/// One round of Philox on one counter.
const fn round([c0, c1, c2, c3]: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let p0 = MULTIPLIERS[0] as u64 * c0 as u64;
    let p1 = MULTIPLIERS[1] as u64 * c2 as u64;
    [(p1 >> 32) as u32 ^ c1 ^ key[0], p1 as u32, (p0 >> 32) as u32 ^ c3 ^ key[1], p0 as u32]
}

const fn next(key: [u32; 2]) -> [u32; 2] {
    [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])]
}

/// The four Philox4x32-10 words of a counter under a key.
#[must_use]
pub fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        counter = round(counter, key);
        key = next(key);
    }
    counter
}

/// The keys of the ten rounds.
fn schedule(mut key: [u32; 2]) -> [[u32; 2]; 10] {
    let mut keys = [key; 10];
    for round in &mut keys {
        *round = key;
        key = next(key);
    }
    keys
}

/// What the first three rounds leave for the lanes, all samples alike: of one block, with the words that are the same in
/// all lanes computed once.
///
/// A zero stands for a word that differs between lanes; the exclusive or of what is here with what comes from it follows.
fn uniform(c0: u32, [c2, c3]: [u32; 2], keys: &[[u32; 2]; 10]) -> [u32; 4] {
    let [_, a1, a2, a3] = round([c0, 0, c2, c3], keys[0]);
    let [b0, b1, b2, _] = round([0, a1, a2, a3], keys[1]);
    let [_, _, d2, d3] = round([b0, 0, 0, 0], keys[2]);
    [b2, b1 ^ keys[2][0], d2, d3]
}

/// Philox of counters that differ in their second word only, of K blocks. `products` are what the second round makes of
/// the samples, the same in all blocks.
///
/// Words stay in 64-bit lanes whose upper halves are left as they come: only the lower halves are ever multiplied or kept.
#[inline(always)]
fn philox_lanes<V: Lanes, const K: usize>(
    v: V,
    uniform: &[[u32; 4]; K],
    products: [V::W; 2],
    keys: &[[u32; 2]; 10],
) -> [[V::I; 4]; K] {
    // Loops and no closures: a closure is not always compiled into the function that has the instructions.
    let m = (v.wide(MULTIPLIERS[0]), v.wide(MULTIPLIERS[1]));
    let mut state = [[[v.wide(0); 4]; 2]; K];
    for i in 0..K {
        let [b2, d0, d2, d3] = uniform[i];
        for j in 0..2 {
            let p1 = v.multiply(m.1, v.xor(v.upper(products[j]), v.wide(b2)));
            state[i][j] = [v.xor(v.upper(p1), v.wide(d0)), p1, v.xor(products[j], v.wide(d2)), v.wide(d3)];
        }
    }
    state = round_lanes(v, m, state, keys[3]);
    state = round_lanes(v, m, state, keys[4]);
    state = round_lanes(v, m, state, keys[5]);
    state = round_lanes(v, m, state, keys[6]);
    state = round_lanes(v, m, state, keys[7]);
    state = round_lanes(v, m, state, keys[8]);
    state = round_lanes(v, m, state, keys[9]);
    let mut words = [[v.int(0); 4]; K];
    for i in 0..K {
        for j in 0..4 {
            words[i][j] = v.join(state[i][0][j], state[i][1][j]);
        }
    }
    words
}

/// One round on some vectors of counters, which take turns because each waits for itself.
#[inline(always)]
fn round_lanes<V: Lanes, const K: usize>(
    v: V,
    m: (V::W, V::W),
    state: [[[V::W; 4]; 2]; K],
    key: [u32; 2],
) -> [[[V::W; 4]; 2]; K] {
    let (k0, k1) = (v.wide(key[0]), v.wide(key[1]));
    let mut out = state;
    for i in 0..K {
        for j in 0..2 {
            let [c0, c1, c2, c3] = state[i][j];
            let (p0, p1) = (v.multiply(m.0, c0), v.multiply(m.1, c2));
            out[i][j] = [v.xor3(v.upper(p1), c1, k0), p1, v.xor3(v.upper(p0), c3, k1), p0];
        }
    }
    out
}

/// Minimax coefficients, lowest first: (2 f - 2 ln(1 + f)) / f^2 over sqrt(1/2) - 1 <= f <= sqrt(2) - 1; and over
/// 0 <= y <= 1/4, with x = sqrt(y), sin(x pi/2) / x and (cos(x pi/2) - 1) / y. The tests measure what they are good for.
const LOG: [f32; 7] =
    [1.000_006_4, -0.666_694_3, 0.499_424_58, -0.398_137_66, 0.344_864_52, -0.323_609_95, 0.201_647_43];
#[allow(clippy::approx_constant)] // one coefficient among others
const SIN: [f32; 4] = [1.570_796_3, -0.645_962_95, 0.079_675_905, -0.004_592_289];
const COS: [f32; 4] = [-1.233_700_5, 0.253_669_23, -0.020_860_288, 0.000_904_021_7];

/// The bits of sqrt(1/2).
const ROOT: u32 = 0x3F35_04F3;

/// Polynomials of vectors in step, so that their chains of dependent operations overlap.
#[inline(always)]
fn horner<V: Lanes, const N: usize, const K: usize>(
    v: V,
    x: &[[V::F; 2]; K],
    coefficients: &[f32; N],
) -> [[V::F; 2]; K] {
    let mut sum = [[v.float(coefficients[N - 1]); 2]; K];
    for c in coefficients[..N - 1].iter().rev() {
        let c = v.float(*c);
        for k in 0..K {
            for j in 0..2 {
                sum[k][j] = v.fma(sum[k][j], x[k][j], c);
            }
        }
    }
    sum
}

/// Box-Muller of the module's documentation: K times four words to four values.
#[inline(always)]
fn box_muller<V: Lanes, const K: usize>(v: V, words: &[[V::I; 4]; K]) -> [[V::F; 4]; K] {
    let (mut bits, mut f) = ([[v.int(0); 2]; K], [[v.float(0.0); 2]; K]);
    let (mut x, mut y) = (f, f);
    for k in 0..K {
        for j in 0..2 {
            // 2^24 u = 2^e m with m = 1 + f in [sqrt(1/2), sqrt(2)); the subtraction takes the 24 off e, too.
            let u = v.to_float(v.add(v.shift_right_8(words[k][2 * j]), v.int(1)));
            bits[k][j] = v.add(v.bits(u), v.int((ROOT + (24 << 23)).wrapping_neg()));
            let m = v.as_float(v.add(v.and(bits[k][j], v.int((1 << 23) - 1)), v.int(ROOT)));
            f[k][j] = v.fma(m, v.float(1.0), v.float(-1.0));
            // v in quarters of a turn from the nearest whole one: x in [-1/2, 1/2).
            let v32 = v.to_float(v.and(v.shift_left_2(words[k][2 * j + 1]), v.int(!1023)));
            x[k][j] = v.times(v32, v.float(1.0 / (1_u64 << 32) as f32));
            y[k][j] = v.times(x[k][j], x[k][j]);
        }
    }
    let log = horner(v, &f, &LOG);
    let sin = horner(v, &y, &SIN);
    let cos = horner(v, &y, &COS);
    let mut out = [[v.float(0.0); 4]; K];
    for k in 0..K {
        for j in 0..2 {
            // -2 ln u
            let log = v.fma(v.times(f[k][j], f[k][j]), log[k][j], v.times(f[k][j], v.float(-2.0)));
            let e = v.to_float(v.shift_right_23(bits[k][j]));
            let radius = v.sqrt(v.fma(e, v.float(-2.0 * LN_2), log));
            let sin = v.times(x[k][j], sin[k][j]);
            let cos = v.fma(y[k][j], cos[k][j], v.float(1.0));
            // The nearest quarter is in the upper two bits: odd ones swap sine and cosine, the other bit and what a
            // quarter more would carry into it are their signs.
            let t = v.add(words[k][2 * j + 1], v.int(1 << 29));
            out[k][2 * j] = v.times(radius, v.flip(v.pick(t, cos, sin), v.add(t, v.int(1 << 30))));
            out[k][2 * j + 1] = v.times(radius, v.flip(v.pick(t, sin, cos), t));
        }
    }
    out
}

/// Blocks of four values that are kept between the stages of [`draw_lanes`].
const CHUNK: usize = 16;

/// Stage by stage over a few blocks: short loops, of which the processor has several turns under way at once.
#[inline(always)]
fn draw_lanes<V: Lanes, T: Out>(
    v: V,
    key: Key,
    first: u32,
    width: usize,
    affine: Option<Affine<'_, f32>>,
    out: &mut [T],
) -> usize {
    let keys = schedule([key.seed as u32, (key.seed >> 32) as u32]);
    let m0 = v.wide(MULTIPLIERS[0]);
    let [s0, ..] = round([0, 0, key.plan, 0], keys[0]);
    let mut clipped = 0;
    for from in (0..width).step_by(4 * CHUNK) {
        let columns = from..width.min(from + 4 * CHUNK);
        let blocks = columns.len().div_ceil(4);
        let mut uniforms = [[0; 4]; CHUNK];
        for (block, uniform_of) in uniforms[..blocks].iter_mut().enumerate() {
            let c0 = key.iteration << 16 | (from / 4 + block) as u32;
            *uniform_of = uniform(c0, [key.plan, key.env_id], &keys);
        }
        let affine = affine.map(
            #[inline(always)]
            |affine| affine.blocks(columns.clone()),
        );
        let mut words = [[v.int(0); 4]; CHUNK];
        let mut values = [[v.float(0.0); 4]; CHUNK];
        for (group, rows) in out.chunks_mut(V::LANES * width).enumerate() {
            let samples = v.counters(first + (group * V::LANES) as u32);
            let mut products = samples;
            for product in &mut products {
                *product = v.multiply(m0, v.xor(v.wide(s0), *product));
            }
            // In pairs, which have more to do side by side.
            let pairs = blocks.div_ceil(2);
            for (words, uniform) in words.as_chunks_mut::<2>().0[..pairs].iter_mut().zip(uniforms.as_chunks().0) {
                *words = philox_lanes(v, uniform, products, &keys);
            }
            for (values, words) in values.as_chunks_mut::<2>().0[..pairs].iter_mut().zip(words.as_chunks().0) {
                *values = box_muller(v, words);
            }
            let mut moved = v.int(0);
            if let Some(affine) = &affine {
                for (values, [mean, std, low, high]) in values[..blocks].iter_mut().zip(affine) {
                    for i in 0..4 {
                        let free = v.fma(values[i], v.float(std[i]), v.float(mean[i]));
                        values[i] = v.clamp(free, v.float(low[i]), v.float(high[i]), &mut moved);
                    }
                }
            }
            let mut at = from;
            if let (true, Some(rows)) = (rows.len() == V::LANES * width, T::single(rows)) {
                for two in values.as_chunks().0 {
                    if at + 8 > columns.end {
                        break;
                    }
                    v.store_two(*two, rows, width, at);
                    at += 8;
                }
            }
            for values in &values[(at - from) / 4..blocks] {
                let four = v.rows(*values);
                match columns.end - at {
                    1 => put::<1, T>(rows, width, at, four.as_ref()),
                    2 => put::<2, T>(rows, width, at, four.as_ref()),
                    3 => put::<3, T>(rows, width, at, four.as_ref()),
                    _ => put::<4, T>(rows, width, at, four.as_ref()),
                }
                at += 4;
            }
            clipped += v.sum(moved, rows.len() / width);
        }
    }
    clipped
}

impl Affine<'_, f32> {
    /// Mean, standard deviation and bounds of some columns in blocks of four; where there is no column, what moves nothing.
    fn blocks(&self, columns: Range<usize>) -> [[[f32; 4]; 4]; CHUNK] {
        let mut blocks = [[[0.0; 4], [0.0; 4], [f32::NEG_INFINITY; 4], [f32::INFINITY; 4]]; CHUNK];
        for (i, values) in [self.mean, self.std, self.low, self.high].into_iter().enumerate() {
            for (j, &value) in values[columns.clone()].iter().enumerate() {
                blocks[j / 4][i][j % 4] = value;
            }
        }
        blocks
    }
}

/// float32 or float64: what noise is written as.
pub trait Out: Copy + Default + From<f32> {
    /// The slice, if it is one of float32.
    fn single(out: &mut [Self]) -> Option<&mut [f32]>;
}

impl Out for f32 {
    fn single(out: &mut [Self]) -> Option<&mut [f32]> {
        Some(out)
    }
}

impl Out for f64 {
    fn single(_: &mut [Self]) -> Option<&mut [f32]> {
        None
    }
}

/// N of four values each to the rows' column `at`.
#[inline(always)]
fn put<const N: usize, T: Out>(rows: &mut [T], width: usize, at: usize, four: &[[f32; 4]]) {
    for (row, four) in rows.chunks_exact_mut(width).zip(four) {
        if let Some(place) = row[at..].first_chunk_mut::<N>() {
            *place = std::array::from_fn(|i| T::from(four[i]));
        }
    }
}

/// Writes noise of the samples `first ..` of one environment, `out.len() / width` of them, each of `width` values; with
/// `affine`, what it makes of the noise. Returns how many values its bounds moved.
pub(crate) fn draw<T: Out>(
    key: Key,
    first: usize,
    width: usize,
    affine: Option<Affine<'_, f32>>,
    out: &mut [T],
) -> usize {
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(v) = lanes::Avx512::new() {
            // SAFETY: `v` is the proof.
            #[allow(unsafe_code)]
            return unsafe { draw_avx512(v, key, first as u32, width, affine, out) };
        }
        if let Some(v) = lanes::Avx2::new() {
            // SAFETY: `v` is the proof.
            #[allow(unsafe_code)]
            return unsafe { draw_avx2(v, key, first as u32, width, affine, out) };
        }
    }
    draw_lanes(Portable, key, first as u32, width, affine, out)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
fn draw_avx512<T: Out>(
    v: lanes::Avx512,
    key: Key,
    first: u32,
    width: usize,
    affine: Option<Affine<'_, f32>>,
    out: &mut [T],
) -> usize {
    draw_lanes(v, key, first, width, affine, out)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn draw_avx2<T: Out>(
    v: lanes::Avx2,
    key: Key,
    first: u32,
    width: usize,
    affine: Option<Affine<'_, f32>>,
    out: &mut [T],
) -> usize {
    draw_lanes(v, key, first, width, affine, out)
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
) -> Result<Vec<f32>, Error> {
    check(iteration, samples, width)?;
    let mut out = Vec::new();
    resize(&mut out, &[env_ids.len(), samples, width])?;
    for (out, &env_id) in out.chunks_exact_mut(samples * width).zip(env_ids) {
        draw(Key { seed, plan, iteration: iteration as u32, env_id }, 0, width, None, out);
    }
    Ok(out)
}

/// Gives a buffer this shape; a shape that cannot be had is an error, not the end of the process.
pub(crate) fn resize<T: Clone + Default>(buffer: &mut Vec<T>, shape: &[usize]) -> Result<(), Error> {
    let size = shape.iter().try_fold(1_usize, |size, &n| size.checked_mul(n));
    size.filter(|&size| buffer.try_reserve_exact(size.saturating_sub(buffer.len())).is_ok())
        .map(|size| buffer.resize(size, T::default()))
        .ok_or_else(|| Error::Argument(format!("samples: no memory for candidates of shape {shape:?}")))
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
            second_block.iter().zip(exact).all(|(&got, want)| (f64::from(got) - want).abs() < 1e-6),
            "{second_block:?} {exact:?}"
        );
    }

    /// The formula of the module's documentation in float64.
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

    /// The largest error of `box_muller` over these words.
    fn worst(words: impl Iterator<Item = [u32; 2]>) -> f64 {
        words.fold(0.0, |worst, [w0, w1]| {
            let [[n0, n1, ..]] = box_muller(Portable, &[[[w0; 8], [w1; 8], [0; 8], [0; 8]]]);
            let [want0, want1, ..] = normals([w0, w1, 0, 0]);
            f64::max(worst, (f64::from(n0[0]) - want0).abs().max((f64::from(n1[0]) - want1).abs()))
        })
    }

    #[test]
    fn normals_are_within_1e_6_of_float64() {
        // Every radius where cosine or sine is 1, every angle at the largest radius, and some of everything.
        let (mut radii, mut angles): (f64, f64) = (0.0, 0.0);
        for i in 0..1_u32 << 21 {
            // Eight at once, or this would take minutes.
            let lanes: [u32; 8] = std::array::from_fn(|lane| (8 * i + lane as u32) << 8);
            let [[cos, ..]] = box_muller(Portable, &[[lanes, [0; 8], [0; 8], [0; 8]]]);
            let [[.., n0, n1]] = box_muller(Portable, &[[[0; 8], [0; 8], [0; 8], lanes]]);
            let largest = (48.0 * std::f64::consts::LN_2).sqrt();
            for (lane, word) in lanes.into_iter().enumerate() {
                let unit = 2_f64.powi(-24);
                let radius = (-2.0 * (f64::from((word >> 8) + 1) * unit).ln()).sqrt();
                radii = radii.max((f64::from(cos[lane]) - radius).abs());
                let (sin, cos) = (std::f64::consts::TAU * (f64::from(word >> 8) * unit)).sin_cos();
                let error =
                    (f64::from(n0[lane]) - largest * cos).abs().max((f64::from(n1[lane]) - largest * sin).abs());
                angles = angles.max(error);
            }
        }
        assert!(radii < 4e-7 && angles < 9e-7, "{radii:e} {angles:e}");
        // Where both errors are large at once: the radii of the smallest u, all over the circle.
        let both = (0..1 << 18).map(|i: u32| [(i % 64) << 8, i.wrapping_mul(0x9E37_79B9)]);
        assert!(worst(both) < 1e-6);
        let some =
            (0..1 << 18).map(|i: u32| [i.wrapping_mul(0x85EB_CA6B).rotate_left(13), i.wrapping_mul(0x9E37_79B9)]);
        assert!(worst(some) < 1e-6);
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        // More than one chunk, cut groups of rows, cut blocks; and one sample past 2^32 would be.
        for (width, samples) in [(50, 300), (1, 5), (67, 37), (130, 17), (21, 16)] {
            let key = Key { seed: 11 << 40, plan: 2, iteration: 65535, env_id: u32::MAX };
            let mean: Vec<f32> = (0..width).map(|j| j as f32 / 10.0 - 1.0).collect();
            let (std, low, high) = (vec![0.7; width], vec![-1.0; width], vec![0.5; width]);
            let affine = Affine { mean: &mean, std: &std, low: &low, high: &high };
            for affine in [None, Some(affine)] {
                let mut want = vec![0_f32; samples * width];
                let moved = draw_lanes(Portable, key, 7, width, affine, &mut want);
                let mut got = vec![0_f32; samples * width];
                assert_eq!(draw(key, 7, width, affine, &mut got), moved);
                assert_eq!(bits(&got), bits(&want), "{width} {samples}");
                #[cfg(target_arch = "x86_64")]
                if let Some(v) = lanes::Avx2::new() {
                    got.fill(0.0);
                    // SAFETY: `v` is the proof.
                    #[allow(unsafe_code)]
                    let count = unsafe { draw_avx2(v, key, 7, width, affine, &mut got) };
                    assert_eq!((count, bits(&got)), (moved, bits(&want)));
                }
                let mut wide = vec![0_f64; samples * width];
                draw(key, 7, width, affine, &mut wide);
                assert!(wide.iter().zip(&want).all(|(&wide, &want)| wide.to_bits() == f64::from(want).to_bits()));
            }
        }
    }

    fn bits(x: &[f32]) -> Vec<u32> {
        x.iter().map(|x| x.to_bits()).collect()
    }

    #[test]
    fn affine_is_a_fused_multiply_add_and_a_clamp() {
        let key = Key { seed: 1, plan: 0, iteration: 0, env_id: 0 };
        let (mean, std, low, high) = ([0.1, -0.2, 0.3], [1.0, 0.5, 2.0], [-0.5, -1.0, -9.0], [0.5, 0.0, 9.0]);
        let (mut white, mut got) = ([0_f32; 60], [0_f32; 60]);
        draw(key, 0, 3, None, &mut white);
        let moved = draw(key, 0, 3, Some(Affine { mean: &mean, std: &std, low: &low, high: &high }), &mut got);
        let mut count = 0;
        for (i, (white, got)) in white.into_iter().zip(got).enumerate() {
            let free = std[i % 3].mul_add(white, mean[i % 3]);
            assert_eq!(got.to_bits(), free.clamp(low[i % 3], high[i % 3]).to_bits());
            count += usize::from(free < low[i % 3] || free > high[i % 3]);
        }
        assert_eq!(moved, count);
        assert!(count > 10);
    }

    #[test]
    fn extreme_words_give_finite_normals() {
        let normal = |w0: u32, w1: u32| {
            let [[n0, n1, ..]] = box_muller(Portable, &[[[w0; 8], [w1; 8], [0; 8], [0; 8]]]);
            [n0[0], n1[0]]
        };
        let largest = normal(0, 0)[0];
        assert!((f64::from(largest) - (48.0 * 2_f64.ln()).sqrt()).abs() < 1e-6);
        assert!((normal(0, 1 << 31)[0] + largest).abs() < 1e-6, "v = 1/2 is the other side");
        assert!(normal(u32::MAX, u32::MAX).iter().all(|n| n.abs() == 0.0), "u = 1 has radius 0");
    }

    #[test]
    fn moments_are_normal() {
        let values = noise(1, 0, 0, &[0, 1], 1000, 50).unwrap();
        let n = values.len() as f64;
        let moment = |p: i32| values.iter().map(|&x| f64::from(x).powi(p)).sum::<f64>() / n;
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
        let text = |result: Result<Vec<f32>, Error>| result.unwrap_err().to_string();
        assert!(text(noise(0, 0, FIELD, &[0], 1, 4)).contains("iteration must be below 65536, got 65536"));
        assert!(text(noise(0, 0, 0, &[0], 1, 4 * FIELD + 1)).contains("width"));
        assert!(text(noise(0, 0, 0, &[0], 1, 0)).contains("width"));
        assert!(text(noise(0, 0, 0, &[0], 0, 4)).contains("samples"));
        assert!(text(noise(0, 0, 0, &[0; 1 << 12], 1 << 32, 4 * FIELD)).contains("no memory"));
    }
}
