//! SIGReg on this processor: Epps-Pulley statistics of random projections, and their gradient.
//!
//! For embeddings z (T, B, D), unit directions u (D, P) and projections h = z u, with knots `t_k` = k dt, dt = 3 / (K - 1),
//! [`forward`] makes the empirical characteristic function, the means `C_k` and `S_k` over b of cos(`t_k` h) and sin(`t_k` h)
//! for k = 1 .. K-1, and the statistic from it. With e = exp(i dt h) the terms are e, e^2, ..., e^(K-1): one sine and cosine,
//! then one complex product a knot. [`backward`] evaluates the derivative with respect to h, the real part of a polynomial in
//! e, by Horner's rule. `kernels/README.md` has the formulas.
//!
//! Projections are made for a few rows and columns at a time, and made again by the backward pass; nothing of size (T, B, P)
//! reaches memory. What does is z and u packed for the products, and the gradient's coefficients. Directions of a key are
//! made on their way there.
//!
//! Every sum has one order, whatever the number of threads: same input, same bits.

use super::gemm::{End, Product, Start};
use super::kernels::{self, Kernels, Precision};
use super::layout::{lines, Line, Rows, LANES};
use super::simd::Simd;
use super::Parts;
use crate::pool::Pool;
use crate::{rng, Error};

/// Knots lie on [0, 3], as in the official code.
const LAST_KNOT: f64 = 3.0;
/// Panels of directions that a forward task takes: the fewest that products have.
const GROUP: usize = 2;
/// Row tiles that it projects at once, so that the projections stay in the level 1 cache.
const TILES: usize = 16;
/// Panels of directions that a backward task projects at once; even.
const CHUNK: usize = 8;
/// Most row tiles of a backward task: it reads all directions, so few tasks are good.
const MOST_TILES: usize = 8;

/// The environment whose noise directions are made of.
pub const ENV_ID: u32 = u32::MAX;

/// Unit directions (D, P), or what they are made from.
#[derive(Clone, Copy, Debug)]
pub enum Directions<'a> {
    /// (D, P).
    Given(&'a [f32]),
    /// Direction p is the noise of `seed`, plan `step`, iteration 0, environment [`ENV_ID`] and sample p, D numbers as
    /// [`rng`] lays them out, divided by their norm.
    Keyed {
        /// Of the run.
        seed: u64,
        /// Of training.
        step: u32,
    },
}

/// Directions of a key, in rows: (P, D).
///
/// # Errors
/// [`Error::Argument`] when a size is zero or past the limits of [`rng`], or there is no memory for the result.
pub fn directions(seed: u64, step: u32, count: usize, dim: usize) -> Result<Vec<f32>, Error> {
    check_keyed(count, dim)?;
    let mut rows = Vec::new();
    rng::resize(&mut rows, &[count, dim])?;
    draw(seed, step, 0, dim, &mut rows);
    Ok(rows)
}

/// Writes the directions from number `first` on, each a row of `dim` numbers.
fn draw(seed: u64, step: u32, first: usize, dim: usize, rows: &mut [f32]) {
    rng::draw(rng::Key { seed, plan: step, iteration: 0, env_id: ENV_ID }, first, dim, None, rows);
    for row in rows.chunks_exact_mut(dim) {
        let norm = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        // Where D is 1 a direction can be zero, and stays that.
        for x in row {
            *x = (f64::from(*x) / norm.max(f64::MIN_POSITIVE)) as f32;
        }
    }
}

fn check_keyed(count: usize, dim: usize) -> Result<(), Error> {
    let most = 4 * rng::FIELD;
    if count > 0 && count as u64 <= 1 << 32 && (1..=most).contains(&dim) {
        return Ok(());
    }
    Err(Error::Argument(format!("directions of a key must be 1..=2^32 of 1..={most} numbers, got {count} of {dim}")))
}

/// What is computed: T, B, D, P and K.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Time steps T.
    pub steps: usize,
    /// Embeddings B of a time step.
    pub batch: usize,
    /// Width D of an embedding.
    pub dim: usize,
    /// Directions P.
    pub directions: usize,
    /// Knots K, at least 2.
    pub knots: usize,
}

impl Shape {
    fn check(self, z: usize, directions: Directions, statistic: usize, ecf: usize) -> Result<(), Error> {
        let product = |sizes: &[usize]| sizes.iter().try_fold(1_usize, |all, &size| all.checked_mul(size));
        let Self { steps: t, batch: b, dim: d, directions: p, knots: k } = self;
        let directions = match directions {
            Directions::Given(directions) => directions.len(),
            Directions::Keyed { .. } => check_keyed(p, d).map(|()| p.saturating_mul(d))?,
        };
        let fits = t.min(b).min(d).min(p) > 0
            && k > 1
            && product(&[t, b, d]) == Some(z)
            && product(&[d, p]) == Some(directions)
            && product(&[t, p]) == Some(statistic)
            && product(&[t, 2, k - 1, p]) == Some(ecf);
        if fits {
            return Ok(());
        }
        Err(Error::Argument(format!(
            "want z (T, B, D), directions (D, P), statistic (T, P) and characteristic function (T, 2, K - 1, P), none of them \
             empty; got {z}, {directions}, {statistic} and {ecf} numbers for {self:?}"
        )))
    }

    fn dt(self) -> f64 {
        LAST_KNOT / (self.knots - 1) as f64
    }

    /// `phi_k`, the characteristic function of the standard normal, and the weight `w_k` of the quadrature, k = 1 .. K-1.
    fn normals(self) -> Vec<(f32, f32)> {
        let normal = |k: usize| {
            let normal = (-0.5 * (k as f64 * self.dt()).powi(2)).exp();
            let ends = if k + 1 == self.knots { 1.0 } else { 2.0 };
            (normal as f32, (ends * self.dt() * normal) as f32)
        };
        (1..self.knots).map(normal).collect()
    }
}

/// Writes the statistic (T, P) and the characteristic function (T, 2, K - 1, P), mean cosines, then mean sines, of `z`
/// (T, B, D) along `directions`.
///
/// # Errors
/// [`Error::Argument`]: lengths that do not fit `shape`, or a shape without numbers.
pub fn forward(
    shape: Shape,
    z: &[f32],
    directions: Directions,
    statistic: &mut [f32],
    ecf: &mut [f32],
    pool: &Pool,
) -> Result<(), Error> {
    shape.check(z.len(), directions, statistic.len(), ecf.len())?;
    // SAFETY: the processor has these kernels; lengths are checked.
    unsafe { forward_with(best(), shape, z, directions, statistic, ecf, pool) };
    Ok(())
}

/// What [`forward`] made and the gradients of it; one that is absent is zero.
#[derive(Clone, Copy)]
pub struct Gradients<'a> {
    /// The characteristic function (T, 2, K - 1, P).
    pub ecf: &'a [f32],
    /// Gradient of the statistic (T, P).
    pub of_statistic: Option<&'a [f32]>,
    /// Gradient of the characteristic function.
    pub of_ecf: Option<&'a [f32]>,
}

/// Writes the gradient (T, B, D) of `z`.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    shape: Shape,
    z: &[f32],
    directions: Directions,
    gradients: Gradients,
    z_grad: &mut [f32],
    pool: &Pool,
) -> Result<(), Error> {
    let Gradients { ecf, of_statistic, of_ecf } = gradients;
    let statistic = of_statistic.map_or(shape.steps * shape.directions, <[f32]>::len);
    shape.check(z.len(), directions, statistic, ecf.len())?;
    shape.check(z_grad.len(), directions, statistic, of_ecf.unwrap_or(ecf).len())?;
    // SAFETY: the processor has these kernels; lengths are checked.
    unsafe { backward_with(best(), shape, z, directions, gradients, z_grad, pool) };
    Ok(())
}

fn best() -> &'static Kernels {
    let mut fitting = kernels::ALL.iter().filter(|k| k.precision == Precision::Float32 && (k.here)());
    fitting.next().unwrap_or(&&kernels::PORTABLE)
}

/// # Safety
/// The processor has `k`, which is of float32; the lengths fit `shape`.
unsafe fn forward_with(
    k: &Kernels,
    shape: Shape,
    z: &[f32],
    directions: Directions,
    statistic: &mut [f32],
    ecf: &mut [f32],
    pool: &Pool,
) {
    let Shape { steps, batch, directions: count, knots, .. } = shape;
    let (tiles, groups, powers) = (batch.div_ceil(k.tile), lines(count) / GROUP, knots - 1);
    let [rows, panels] = pack(pool, &[packed_rows(k, shape, z), packed_columns(shape, directions)]);
    let normals = shape.normals();
    let (statistic, ecf) = (Parts(statistic.as_mut_ptr()), Parts(ecf.as_mut_ptr()));
    pool.run(steps * groups, &|task, _| {
        let (statistic, ecf, (step, group)) = (&statistic, &ecf, (task / groups, task % groups));
        let mut block = vec![Line::ZERO; TILES * k.tile * GROUP];
        let h = Rows { data: block.as_mut_ptr(), tile: k.tile, lines: GROUP };
        let mut sums = vec![Line::ZERO; GROUP * powers * 2];
        for from in (0..tiles).step_by(TILES) {
            let waves = Waves { h, tiles: TILES.min(tiles - from), panels: GROUP, dt: shape.dt() as f32, powers };
            let first = step * tiles + from;
            project(k, shape, &rows, first, &panels, group * GROUP, &waves);
            (k.add_powers)(&waves, batch - from * k.tile, &mut sums);
        }
        for (panel, sums) in sums.chunks_exact_mut(powers * 2).enumerate() {
            let from = (group * GROUP + panel) * LANES;
            let columns = LANES.min(count.saturating_sub(from));
            // SAFETY: every column of a time step is one task's.
            let write = |line: &Line, to: *mut f32, row: usize| unsafe {
                std::ptr::copy_nonoverlapping(line.0.as_ptr(), to.add(row * count + from), columns);
            };
            let mut total = Line::ZERO;
            for (i, mean) in sums.iter_mut().enumerate() {
                let (normal, weight) = normals[i / 2];
                let normal = if i % 2 == 0 { normal } else { 0.0 };
                for (mean, total) in mean.0.iter_mut().zip(&mut total.0) {
                    *mean /= batch as f32;
                    *total += batch as f32 * weight * (*mean - normal).powi(2);
                }
                write(mean, ecf.0, (step * 2 + i % 2) * powers + i / 2);
            }
            write(&total, statistic.0, step);
        }
    });
}

/// # Safety
/// As [`forward_with`].
unsafe fn backward_with(
    k: &Kernels,
    shape: Shape,
    z: &[f32],
    directions: Directions,
    gradients: Gradients,
    z_grad: &mut [f32],
    pool: &Pool,
) {
    let Shape { steps, batch, dim, directions: count, knots } = shape;
    let (tiles, panels, powers) = (batch.div_ceil(k.tile), lines(count), knots - 1);
    let [rows, columns, coefficients] =
        pack(pool, &[packed_rows(k, shape, z), packed_columns(shape, directions), coefficients(shape, gradients)]);
    let [turned] = pack(pool, &[turned_columns(shape, &columns)]);
    let most = (steps * tiles / (4 * pool.threads())).clamp(1, MOST_TILES);
    let blocks = tiles.div_ceil(most);
    let z_grad = Parts(z_grad.as_mut_ptr());
    pool.run(steps * blocks, &|task, _| {
        let (z_grad, (step, from)) = (&z_grad, (task / blocks, task % blocks * most));
        let tiles_here = most.min(tiles - from);
        let mut block = vec![Line::ZERO; tiles_here * k.tile * CHUNK];
        let h = Rows { data: block.as_mut_ptr(), tile: k.tile, lines: CHUNK };
        let mut sums = vec![Line::ZERO; tiles_here * k.tile * lines(dim)];
        let sum = Rows { data: sums.as_mut_ptr(), tile: k.tile, lines: lines(dim) };
        for first in (0..panels).step_by(CHUNK) {
            let width = CHUNK.min(panels - first);
            let waves = Waves { h, tiles: tiles_here, panels: width, dt: shape.dt() as f32, powers };
            project(k, shape, &rows, step * tiles + from, &columns, first, &waves);
            let coefficients = &coefficients[(step * panels + first) * powers * 2..][..width * powers * 2];
            (k.horner)(&waves, coefficients);
            let w = turned[first * LANES..].as_ptr();
            let p = Product { a: h, tiles: tiles_here, units: width, w, stride: panels * LANES, panels: lines(dim) };
            (k.product)(&p, &Start::Rest(sum), &End::Store(sum));
        }
        for row in 0..(tiles_here * k.tile).min(batch - from * k.tile) {
            let to = (step * batch + from * k.tile + row) * dim;
            for at in (0..dim).step_by(LANES) {
                // SAFETY: every row is one task's.
                std::ptr::copy_nonoverlapping(
                    sum.at(row, at / LANES).cast(),
                    z_grad.0.add(to + at),
                    LANES.min(dim - at),
                );
            }
        }
    });
}

/// `waves.h` = the packed rows from tile `first` on, times the packed columns from panel `panel` on.
unsafe fn project(
    k: &Kernels,
    shape: Shape,
    rows: &[Line],
    first: usize,
    columns: &[Line],
    panel: usize,
    waves: &Waves,
) {
    static ZEROS: [Line; CHUNK] = [Line::ZERO; CHUNK];
    let units = lines(shape.dim);
    let a = Rows { data: rows[first * k.tile * units..].as_ptr().cast_mut(), tile: k.tile, lines: units };
    let w = columns[panel * units * LANES..].as_ptr();
    let p = Product { a, tiles: waves.tiles, units, w, stride: units * LANES, panels: waves.panels };
    (k.product)(&p, &Start::Bias(ZEROS.as_ptr().cast()), &End::Store(waves.h));
}

/// A buffer to make: `fill(index, part)` is called for each of its parts of `size` lines.
struct Packing<'a> {
    parts: usize,
    size: usize,
    fill: Box<Fill<'a>>,
}

type Fill<'a> = dyn Fn(usize, &mut [Line]) + Sync + 'a;

/// Makes buffers in one call of the pool: each call waits for every thread, which may have other work.
fn pack<const N: usize>(pool: &Pool, packings: &[Packing; N]) -> [Vec<Line>; N] {
    let mut buffers = packings.each_ref().map(|packing| vec![Line::ZERO; packing.parts * packing.size]);
    let starts = buffers.each_mut().map(|buffer| Parts(buffer.as_mut_ptr()));
    pool.run(packings.iter().map(|packing| packing.parts).sum(), &|mut index, _| {
        for (packing, start) in packings.iter().zip(&starts) {
            let &Packing { parts, size, ref fill } = packing;
            if index < parts {
                // SAFETY: the buffer has these lines, and every part is one task's.
                return fill(index, unsafe { std::slice::from_raw_parts_mut(start.0.add(index * size), size) });
            }
            index -= parts;
        }
    });
    buffers
}

/// Copies as many numbers of a line as there are from `from` on.
fn copy(to: &mut Line, from: &[f32]) {
    let count = from.len().min(LANES);
    to.0[..count].copy_from_slice(&from[..count]);
}

/// z (T, B, D) as rows of an operand, every time step in tiles of its own.
fn packed_rows<'a>(k: &'a Kernels, shape: Shape, z: &'a [f32]) -> Packing<'a> {
    let (tiles, units) = (shape.batch.div_ceil(k.tile), lines(shape.dim));
    let fill = move |index: usize, to: &mut [Line]| {
        let first = index % tiles * k.tile;
        for row in 0..k.tile.min(shape.batch - first) {
            let from = &z[(index / tiles * shape.batch + first + row) * shape.dim..][..shape.dim];
            from.chunks(LANES).enumerate().for_each(|(i, from)| copy(&mut to[i * k.tile + row], from));
        }
    };
    Packing { parts: shape.steps * tiles, size: k.tile * units, fill: Box::new(fill) }
}

/// Directions (D, P) as panels of columns.
fn packed_columns(shape: Shape, directions: Directions<'_>) -> Packing<'_> {
    let Shape { dim, directions: count, .. } = shape;
    let fill = move |panel: usize, to: &mut [Line]| {
        let first = (panel * LANES).min(count);
        match directions {
            Directions::Given(directions) => {
                directions.chunks_exact(count).zip(to).for_each(|(row, to)| copy(to, &row[first..]));
            }
            Directions::Keyed { seed, step } => {
                let mut drawn = vec![0.0; LANES.min(count - first) * dim];
                draw(seed, step, first, dim, &mut drawn);
                for (lane, direction) in drawn.chunks_exact(dim).enumerate() {
                    direction.iter().zip(&mut *to).for_each(|(&x, to)| to.0[lane] = x);
                }
            }
        }
    };
    Packing { parts: lines(count), size: lines(dim) * LANES, fill: Box::new(fill) }
}

/// Packed columns as panels of rows: the columns of the transposed matrix.
fn turned_columns(shape: Shape, columns: &[Line]) -> Packing<'_> {
    let height = lines(shape.dim) * LANES;
    let fill = move |panel: usize, to: &mut [Line]| {
        for (column, to) in columns.chunks_exact(height).zip(to.chunks_exact_mut(LANES)) {
            for (lane, row) in column[panel * LANES..][..LANES].iter().enumerate() {
                row.0.iter().zip(&mut *to).for_each(|(&x, to)| to.0[lane] = x);
            }
        }
    };
    Packing { parts: lines(shape.dim), size: lines(shape.directions) * LANES, fill: Box::new(fill) }
}

/// Real and imaginary parts of the coefficients `t_k / B (dL/dS_k + i dL/dC_k)`, (T, panels, K - 1, 2).
fn coefficients(shape: Shape, gradients: Gradients<'_>) -> Packing<'_> {
    let (panels, powers, count) = (lines(shape.directions), shape.knots - 1, shape.directions);
    let normals = shape.normals();
    let fill = move |index: usize, to: &mut [Line]| {
        let (step, column) = (index / panels, (index % panels * LANES).min(count));
        let line = |from: &[f32], row: usize| {
            let mut line = Line::ZERO;
            copy(&mut line, &from[row * count + column..(row + 1) * count]);
            line
        };
        let of_statistic = gradients.of_statistic.map_or(Line::ZERO, |grad| line(grad, step));
        for (i, to) in to.iter_mut().enumerate() {
            let (k, sine) = (i / 2, i % 2 == 0);
            let (normal, weight) = normals[k];
            let (normal, slope) = (if sine { 0.0 } else { normal }, 2.0 * shape.batch as f32 * weight);
            let scale = ((k + 1) as f64 * shape.dt() / shape.batch as f64) as f32;
            let row = (step * 2 + usize::from(sine)) * powers + k;
            let of_ecf = gradients.of_ecf.map_or(Line::ZERO, |grad| line(grad, row));
            let ecf = line(gradients.ecf, row);
            for lane in 0..LANES {
                to.0[lane] = scale * (slope * of_statistic.0[lane] * (ecf.0[lane] - normal) + of_ecf.0[lane]);
            }
        }
    };
    Packing { parts: shape.steps * panels, size: powers * 2, fill: Box::new(fill) }
}

/// Projections (tiles, panels) and the knots to take them to.
pub(super) struct Waves {
    pub h: Rows,
    pub tiles: usize,
    pub panels: usize,
    pub dt: f32,
    /// K - 1.
    pub powers: usize,
}

/// Adds cos(k dt h) and sin(k dt h) of the first `rows` rows to `sums` (panels, powers, 2).
#[inline(always)]
pub(super) unsafe fn add_powers<S: Simd, const R: usize>(m: &Waves, rows: usize, sums: &mut [Line]) {
    for (panel, sums) in sums.chunks_exact_mut(m.powers * 2).enumerate() {
        for tile in 0..m.tiles {
            let (cos1, sin1) = turns::<S, R>(m, tile, panel);
            let (mut cos, mut sin) = (cos1, sin1);
            // Rows of padding start at zero and stay there.
            for r in rows.saturating_sub(tile * R).min(R)..R {
                (cos[r], sin[r]) = (S::splat(0.0), S::splat(0.0));
            }
            for (k, sums) in sums.chunks_exact_mut(2).enumerate() {
                if k > 0 {
                    for r in 0..R {
                        let turned = S::fma(cos[r], cos1[r], negative::<S>(S::mul(sin[r], sin1[r])));
                        sin[r] = S::fma(sin[r], cos1[r], S::mul(cos[r], sin1[r]));
                        cos[r] = turned;
                    }
                }
                let (mut c, mut s) = (cos[0], sin[0]);
                for r in 1..R {
                    c = S::add(c, cos[r]);
                    s = S::add(s, sin[r]);
                }
                let (to_cos, to_sin) = (sums[0].0.as_mut_ptr(), sums[1].0.as_mut_ptr());
                S::store(to_cos, S::add(S::load(to_cos), c));
                S::store(to_sin, S::add(S::load(to_sin), s));
            }
        }
    }
}

/// Replaces h by the real part of the sum over k of `c_k exp(i k dt h)`; `coefficients` c are (panels, powers, 2).
#[inline(always)]
pub(super) unsafe fn horner<S: Simd, const R: usize>(m: &Waves, coefficients: &[Line]) {
    for (panel, coefficients) in coefficients.chunks_exact(m.powers * 2).enumerate() {
        for tile in 0..m.tiles {
            let (cos, sin) = turns::<S, R>(m, tile, panel);
            let (mut real, mut imag) = ([S::splat(0.0); R], [S::splat(0.0); R]);
            for c in coefficients.rchunks_exact(2) {
                let (c_real, c_imag) = (S::load(c[0].0.as_ptr()), S::load(c[1].0.as_ptr()));
                for r in 0..R {
                    let turned = S::fma(real[r], cos[r], S::fma(negative::<S>(imag[r]), sin[r], c_real));
                    imag[r] = S::fma(imag[r], cos[r], S::fma(real[r], sin[r], c_imag));
                    real[r] = turned;
                }
            }
            for r in 0..R {
                let slope = S::fma(real[r], cos[r], negative::<S>(S::mul(imag[r], sin[r])));
                S::store(m.h.in_tile::<R>(tile, r, panel), slope);
            }
        }
    }
}

/// Compiles to no instruction: it becomes part of a product.
#[inline(always)]
unsafe fn negative<S: Simd>(x: S::V) -> S::V {
    S::sub(S::splat(-0.0), x)
}

/// Cosines and sines of dt h.
#[inline(always)]
unsafe fn turns<S: Simd, const R: usize>(m: &Waves, tile: usize, panel: usize) -> ([S::V; R], [S::V; R]) {
    let (mut cos, mut sin) = ([S::splat(0.0); R], [S::splat(0.0); R]);
    for r in 0..R {
        let h = S::load(m.h.in_tile::<R>(tile, r, panel));
        (cos[r], sin[r]) = cos_sin::<S>(S::mul(h, S::splat(m.dt)));
    }
    (cos, sin)
}

/// Cosine and sine to 2e-7 for |x| up to 1e4; some number of at most about 1 far beyond, NaN for what is not finite.
///
/// x is n pi + r with |r| <= pi / 2: pi in three parts (Cody and Waite), then polynomials with the least largest error.
#[inline(always)]
pub(super) unsafe fn cos_sin<S: Simd>(x: S::V) -> (S::V, S::V) {
    let n = S::round(S::mul(x, S::splat(std::f32::consts::FRAC_1_PI)));
    let mut r = x;
    for part in [-3.140_625, -9.675_026e-4, -1.509_958e-7] {
        r = S::fma(n, S::splat(part), r);
    }
    // The bound comes first: so a NaN stays one.
    let bound = S::splat(1.6);
    r = S::max(negative::<S>(bound), S::min(bound, r));
    // Odd n turns the signs: n - 2 round(n / 2) is 0, 1 or -1.
    let odd = S::fma(S::round(S::mul(n, S::splat(0.5))), S::splat(-2.0), n);
    let sign = S::fma(S::mul(odd, odd), S::splat(-2.0), S::splat(1.0));
    let r2 = S::mul(r, r);
    let cos = S::fma(polynomial::<S, 5>(r2, &COS), r2, S::splat(1.0));
    let sin = S::fma(S::mul(polynomial::<S, 4>(r2, &SIN), r2), r, r);
    (S::mul(cos, sign), S::mul(sin, sign))
}

#[inline(always)]
unsafe fn polynomial<S: Simd, const N: usize>(x: S::V, coefficients: &[f32; N]) -> S::V {
    let mut p = S::splat(coefficients[0]);
    for &c in &coefficients[1..] {
        p = S::fma(p, x, S::splat(c));
    }
    p
}

/// (cos r - 1) / r^2 in powers of r^2, highest first, to 2.4e-10 of cos r.
const COS: [f32; 5] = [-2.607_566_2e-7, 2.476_180_8e-5, -1.388_840_3e-3, 4.166_664e-2, -0.5];
/// (sin r - r) / r^3 in powers of r^2, highest first, to 4.6e-9 of sin r.
const SIN: [f32; 4] = [2.599_903_2e-6, -1.980_654_8e-4, 8.333_016e-3, -0.166_666_57];

#[cfg(test)]
mod tests {
    use super::super::tests::Random;
    use super::*;

    // Ones, primes, exact blocks (rows 6, 96 and 48, columns 16, 32 and 128), one past a block.
    const SHAPES: [(usize, usize, usize, usize); 8] = [
        (1, 1, 1, 1),
        (2, 3, 5, 7),
        (1, 6, 16, 16),
        (3, 31, 17, 37),
        (1, 96, 32, 32),
        (2, 97, 33, 33),
        (1, 49, 3, 129),
        (1, 5, 259, 300),
    ];

    struct Case {
        shape: Shape,
        z: Vec<f32>,
        directions: Vec<f32>,
        of_statistic: Vec<f32>,
        of_ecf: Vec<f32>,
    }

    /// Statistic, characteristic function and gradient.
    type Results<T> = [Vec<T>; 3];

    impl Case {
        fn directions(&self) -> Directions<'_> {
            Directions::Given(&self.directions)
        }

        fn new((steps, batch, dim, directions): (usize, usize, usize, usize), knots: usize) -> Self {
            let mut random = Random((steps * batch * dim * directions * knots) as u64);
            Self {
                shape: Shape { steps, batch, dim, directions, knots },
                z: random.many(steps * batch * dim, 2.3).iter().map(|x| x + 0.2).collect(),
                directions: random.many(dim * directions, (3.0 / dim as f64).sqrt()),
                of_statistic: random.many(steps * directions, 1.0),
                of_ecf: random.many(steps * 2 * (knots - 1) * directions, 1.0),
            }
        }

        fn run(&self, k: &Kernels, threads: usize) -> Results<f32> {
            self.run_along(self.directions(), k, threads)
        }

        fn run_along(&self, directions: Directions, k: &Kernels, threads: usize) -> Results<f32> {
            let pool = Pool::new(threads);
            let empty = |count| vec![f32::NAN; count];
            let (mut statistic, mut ecf, mut grad) =
                (empty(self.of_statistic.len()), empty(self.of_ecf.len()), empty(self.z.len()));
            unsafe {
                forward_with(k, self.shape, &self.z, directions, &mut statistic, &mut ecf, &pool);
                let gradients =
                    Gradients { ecf: &ecf, of_statistic: Some(&self.of_statistic), of_ecf: Some(&self.of_ecf) };
                backward_with(k, self.shape, &self.z, directions, gradients, &mut grad, &pool);
            }
            [statistic, ecf, grad]
        }

        /// The formulas as they are written, in float64.
        fn exact(&self) -> Results<f64> {
            let Shape { steps, batch, dim, directions: count, knots } = self.shape;
            let (mut statistic, mut ecf) = (vec![0.0; self.of_statistic.len()], vec![0.0; self.of_ecf.len()]);
            let mut grad = vec![0.0; self.z.len()];
            let n = batch as f64;
            for (step, p) in (0..steps).flat_map(|step| (0..count).map(move |p| (step, p))) {
                let u = |d: usize| f64::from(self.directions[d * count + p]);
                let z = |b: usize, d: usize| f64::from(self.z[(step * batch + b) * dim + d]);
                let h: Vec<f64> = (0..batch).map(|b| (0..dim).map(|d| z(b, d) * u(d)).sum()).collect();
                let mut slopes = vec![0.0; batch];
                for k in 1..knots {
                    let t = 3.0 * k as f64 / (knots - 1) as f64;
                    let normal = (-t * t / 2.0).exp();
                    let weight = normal * 3.0 / (knots - 1) as f64 * if k == knots - 1 { 1.0 } else { 2.0 };
                    let [at_cos, at_sin] = [0, 1].map(|part| ((step * 2 + part) * (knots - 1) + k - 1) * count + p);
                    ecf[at_cos] = h.iter().map(|h| (t * h).cos()).sum::<f64>() / n;
                    ecf[at_sin] = h.iter().map(|h| (t * h).sin()).sum::<f64>() / n;
                    statistic[step * count + p] += n * weight * ((ecf[at_cos] - normal).powi(2) + ecf[at_sin].powi(2));
                    let of_statistic = f64::from(self.of_statistic[step * count + p]) * 2.0 * n * weight;
                    let of_cos = of_statistic * (ecf[at_cos] - normal) + f64::from(self.of_ecf[at_cos]);
                    let of_sin = of_statistic * ecf[at_sin] + f64::from(self.of_ecf[at_sin]);
                    for (slope, h) in slopes.iter_mut().zip(&h) {
                        *slope += t / n * (of_sin * (t * h).cos() - of_cos * (t * h).sin());
                    }
                }
                for (b, d) in (0..batch).flat_map(|b| (0..dim).map(move |d| (b, d))) {
                    grad[(step * batch + b) * dim + d] += slopes[b] * u(d);
                }
            }
            [statistic, ecf, grad]
        }
    }

    fn every() -> impl Iterator<Item = &'static &'static Kernels> {
        kernels::ALL.iter().filter(|k| k.precision == Precision::Float32 && (k.here)())
    }

    /// Norm of the difference, of the norm of what is wanted.
    fn error(got: &[f32], want: &[f64]) -> f64 {
        let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        norm(&mut got.iter().zip(want).map(|(&got, want)| f64::from(got) - want)) / norm(&mut want.iter().copied())
    }

    #[test]
    fn every_instruction_set_computes_the_formula() {
        for (shape, knots) in SHAPES.iter().flat_map(|&shape| [2, 3, 17, 18].map(|knots| (shape, knots))) {
            let case = Case::new(shape, knots);
            let want = case.exact();
            for k in every() {
                let got = case.run(k, 2);
                for (what, (got, want)) in got.iter().zip(&want).enumerate() {
                    let (error, most) = (error(got, want), [5e-6, 2e-6, 1e-5][what]);
                    assert!(error < most, "{} {shape:?} K {knots}: result {what} is off by {error}", k.name);
                }
            }
        }
    }

    #[test]
    fn large_batches_lose_nothing_and_large_projections_little() {
        let mut case = Case::new((1, 30_001, 2, 3), 17);
        assert!(error(&case.run(best(), 1)[1], &case.exact()[1]) < 3e-6);
        case = Case::new((1, 9, 4, 5), 17);
        case.z.iter_mut().for_each(|z| *z *= 300.0);
        for k in every() {
            let (got, want) = (case.run(k, 1), case.exact());
            assert!(error(&got[1], &want[1]) < 1e-4, "{}", k.name);
            assert!(error(&got[2], &want[2]) < 1e-4, "{}", k.name);
        }
    }

    fn bits(results: Results<f32>) -> [Vec<u32>; 3] {
        results.map(|x| x.iter().map(|x| x.to_bits()).collect())
    }

    #[test]
    fn a_key_gives_the_bits_of_its_directions() {
        for (i, &sizes) in SHAPES.iter().enumerate() {
            let (mut case, seed, step) = (Case::new(sizes, 5), u64::MAX - i as u64, i as u32);
            let Shape { dim, directions: count, .. } = case.shape;
            let rows = directions(seed, step, count, dim).unwrap();
            case.directions = (0..dim * count).map(|at| rows[at % count * dim + at / count]).collect();
            let noise = rng::noise(seed, step, 0, &[ENV_ID], count, dim).unwrap();
            for (noise, row) in noise.chunks_exact(dim).zip(rows.chunks_exact(dim)) {
                let norm = noise.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
                let want = |x: &f32| f64::from(*x) / norm;
                assert!(noise.iter().zip(row).all(|(x, &u)| (f64::from(u) - want(x)).abs() < 1e-7));
            }
            for k in every() {
                let keyed = case.run_along(Directions::Keyed { seed, step }, k, 2);
                assert!(bits(keyed) == bits(case.run(k, 2)), "{} {sizes:?}", k.name);
            }
        }
        assert!(directions(0, 0, 0, 4).is_err());
        assert!(directions(0, 0, 4, 0).is_err());
        assert!(directions(0, 0, 1, 4 * rng::FIELD + 1).is_err());
        assert!(directions(0, 0, 1 << 32, 4 * rng::FIELD).is_err(), "there is no memory for this");
    }

    #[test]
    fn threads_change_no_bit() {
        for k in every() {
            let case = Case::new((2, 97, 33, 165), 17);
            let alone = bits(case.run(k, 1));
            for threads in [1, 2, 3, 8] {
                assert!(bits(case.run(k, threads)) == alone, "{} on {threads} threads", k.name);
            }
        }
    }

    #[test]
    fn what_is_not_finite_becomes_nan() {
        for (k, bad) in every().flat_map(|k| [f32::NAN, f32::INFINITY, f32::NEG_INFINITY].map(|bad| (k, bad))) {
            let mut case = Case::new((2, 7, 5, 3), 17);
            case.z[3] = bad;
            let [statistic, ecf, grad] = case.run(k, 1);
            assert!(statistic[..3].iter().chain(&ecf[..96]).chain(&grad[..35]).all(|x| x.is_nan()), "{} {bad}", k.name);
            assert!(statistic[3..].iter().chain(&ecf[96..]).chain(&grad[35..]).all(|x| x.is_finite()));
        }
    }

    #[test]
    fn cosine_and_sine() {
        let both = |x: f32| {
            // SAFETY: any processor has these instructions.
            let (cos, sin) = unsafe { cos_sin::<super::super::simd::Portable>([x; LANES]) };
            (f64::from(cos[0]), f64::from(sin[0]))
        };
        let mut worst = 0.0_f64;
        for i in -200_000..=200_000 {
            let x = (f64::from(i) / 20.0 * std::f64::consts::FRAC_PI_2 * 0.637) as f32;
            let ((cos, sin), exact) = (both(x), f64::from(x));
            worst = worst.max((cos - exact.cos()).abs()).max((sin - exact.sin()).abs());
        }
        assert!(worst < 2e-7, "{worst}");
        for x in [1e6, 1e8, 1e20, f32::MAX] {
            let (cos, sin) = both(x);
            assert!(cos.hypot(sin) < 1.001, "{x}: {cos} {sin}");
        }
    }

    #[test]
    fn lengths_that_do_not_fit_are_refused() {
        let pool = Pool::new(1);
        let shape = Shape { steps: 1, batch: 2, dim: 3, directions: 4, knots: 3 };
        let run = |shape, z: usize, u: usize, statistic: usize, ecf: usize| {
            let u = vec![0.0; u];
            forward(shape, &vec![0.0; z], Directions::Given(&u), &mut vec![0.0; statistic], &mut vec![0.0; ecf], &pool)
        };
        assert!(run(shape, 6, 12, 4, 16).is_ok());
        for (z, u, statistic, ecf) in [(5, 12, 4, 16), (6, 11, 4, 16), (6, 12, 5, 16), (6, 12, 4, 15)] {
            assert!(matches!(run(shape, z, u, statistic, ecf), Err(Error::Argument(_))));
        }
        assert!(run(Shape { batch: 0, ..shape }, 0, 12, 4, 16).is_err());
        assert!(run(Shape { knots: 1, ..shape }, 6, 12, 4, 0).is_err());
        assert!(run(Shape { knots: usize::MAX, ..shape }, 6, 12, 4, 16).is_err());
        let gradients = Gradients { ecf: &[0.0; 16], of_statistic: Some(&[0.0; 3]), of_ecf: None };
        assert!(backward(shape, &[0.0; 6], Directions::Given(&[0.0; 12]), gradients, &mut [0.0; 6], &pool).is_err());
        let gradients = Gradients { ecf: &[0.0; 16], of_statistic: None, of_ecf: Some(&[0.0; 15]) };
        assert!(backward(shape, &[0.0; 6], Directions::Given(&[0.0; 12]), gradients, &mut [0.0; 6], &pool).is_err());
        let gradients = Gradients { ecf: &[0.0; 16], of_statistic: None, of_ecf: None };
        assert!(backward(shape, &[0.0; 6], Directions::Given(&[0.0; 12]), gradients, &mut [0.0; 5], &pool).is_err());
    }
}
