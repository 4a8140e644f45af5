//! What happens to single rows between two matrix products: norms, modulation, attention over a window, distances.

use super::gemm::Dot;
use super::layout::{Rows, LANES};
use super::simd::{exp, Simd};

/// Adaptive layer norm and the norm that follows it: `x -> norm(norm(x) * scale + shift)`, as an operand.
///
/// `scale` holds 1 + the official scale. The second norm's own gain and offset are in the weights behind it.
#[derive(Clone, Copy)]
pub(super) struct Modulate {
    pub x: Rows,
    pub scale: Rows,
    pub shift: Rows,
    pub out: Rows,
    pub tiles: usize,
    pub width: usize,
    /// Of the first norm and of the second.
    pub eps: [f32; 2],
}

/// `x -> norm(x)`, as an operand; the norm's own gain and offset are in the weights behind it.
#[derive(Clone, Copy)]
pub(super) struct Norm {
    pub x: Rows,
    pub out: Rows,
    pub tiles: usize,
    pub width: usize,
    pub eps: f32,
}

/// Attention of one query per row over `keys` positions, for the heads of one group, as an operand.
///
/// The query's scale is in its weights. Position j's keys and values are `k[j]` and `v[j]`.
#[derive(Clone, Copy)]
pub(super) struct Attend<'a> {
    pub q: Rows,
    pub k: &'a [Rows],
    pub v: &'a [Rows],
    pub out: Rows,
    pub tiles: usize,
    pub heads: usize,
    /// Lines of a head.
    pub lines: usize,
}

/// The mask of the last line of a row of `width` numbers: 1 where there is one.
pub(super) fn tail(width: usize) -> [f32; LANES] {
    let last = (width - 1) / LANES * LANES;
    std::array::from_fn(|lane| if last + lane < width { 1.0 } else { 0.0 })
}

/// Mean and 1 / standard deviation of the `R` rows of a tile at `x`, `count` lines each.
#[inline(always)]
pub(super) unsafe fn moments<S: Simd, const R: usize>(
    x: *const f32,
    count: usize,
    width: usize,
    mask: S::V,
    eps: f32,
) -> ([S::V; R], [S::V; R]) {
    let mut sums = [S::splat(0.0); R];
    for i in 0..count {
        for r in 0..R {
            sums[r] = S::add(sums[r], S::load(x.add((i * R + r) * LANES)));
        }
    }
    let mut means = [S::splat(0.0); R];
    for r in 0..R {
        means[r] = S::splat(S::sum(sums[r]) / width as f32);
    }
    let mut sums = [S::splat(0.0); R];
    for i in 0..count - 1 {
        for r in 0..R {
            let d = S::sub(S::load(x.add((i * R + r) * LANES)), means[r]);
            sums[r] = S::fma(d, d, sums[r]);
        }
    }
    let mut rates = [S::splat(0.0); R];
    for r in 0..R {
        let d = S::mul(S::sub(S::load(x.add(((count - 1) * R + r) * LANES)), means[r]), mask);
        let variance = S::sum(S::fma(d, d, sums[r])) / width as f32;
        rates[r] = S::splat(1.0 / (variance + eps).sqrt());
    }
    (means, rates)
}

#[inline(always)]
pub(super) unsafe fn modulate<D: Dot, const R: usize>(m: &Modulate, scratch: *mut f32) {
    let count = m.width.div_ceil(LANES);
    let mask = D::S::load(tail(m.width).as_ptr());
    for tile in 0..m.tiles {
        adapt::<D::S, R>(m, tile, mask, scratch);
        normalise::<D, R>(scratch, count, m.width, mask, m.eps[1], m.out.in_tile::<R>(tile, 0, 0));
    }
}

/// The adaptive layer norm alone, of one tile.
#[inline(always)]
pub(super) unsafe fn adapt<S: Simd, const R: usize>(m: &Modulate, tile: usize, mask: S::V, out: *mut f32) {
    let count = m.width.div_ceil(LANES);
    let x = m.x.in_tile::<R>(tile, 0, 0).cast_const();
    let (scale, shift) = (m.scale.in_tile::<R>(tile, 0, 0), m.shift.in_tile::<R>(tile, 0, 0));
    let (means, rates) = moments::<S, R>(x, count, m.width, mask, m.eps[0]);
    for i in 0..count {
        for r in 0..R {
            let at = (i * R + r) * LANES;
            let n = S::mul(S::sub(S::load(x.add(at)), means[r]), rates[r]);
            // The padding of scale and shift is zero, and so is what comes out there.
            S::store(out.add(at), S::fma(n, S::load(scale.add(at)), S::load(shift.add(at))));
        }
    }
}

#[inline(always)]
pub(super) unsafe fn norm<D: Dot, const R: usize>(m: &Norm) {
    let count = m.width.div_ceil(LANES);
    let mask = D::S::load(tail(m.width).as_ptr());
    for tile in 0..m.tiles {
        let (x, out) = (m.x.in_tile::<R>(tile, 0, 0), m.out.in_tile::<R>(tile, 0, 0));
        normalise::<D, R>(x, count, m.width, mask, m.eps, out);
    }
}

/// Writes the normalised rows of a tile as an operand, their padding zero.
#[inline(always)]
unsafe fn normalise<D: Dot, const R: usize>(
    x: *const f32,
    count: usize,
    width: usize,
    mask: <D::S as Simd>::V,
    eps: f32,
    out: *mut f32,
) {
    let (means, rates) = moments::<D::S, R>(x, count, width, mask, eps);
    let mut i = 0;
    while i < count {
        for r in 0..R {
            let mut v = [D::S::splat(0.0); 2];
            for g in 0..D::GROUP {
                if i + g < count {
                    v[g] = D::S::load(x.add(((i + g) * R + r) * LANES));
                    v[g] = D::S::mul(D::S::sub(v[g], means[r]), rates[r]);
                    if i + g == count - 1 {
                        v[g] = D::S::mul(v[g], mask);
                    }
                }
            }
            D::put(out.add((i / D::GROUP * R + r) * LANES), v);
        }
        i += D::GROUP;
    }
}

/// Copies float32 rows of `lines` lines into an operand.
#[inline(always)]
pub(super) unsafe fn convert<D: Dot>(x: Rows, out: Rows, rows: usize, lines: usize) {
    for row in 0..rows {
        let (from, to) = (x.at(row, 0).cast::<f32>(), out.at(row, 0).cast::<f32>());
        let mut i = 0;
        while i < lines {
            let first = D::S::load(from.add(i * x.tile * LANES));
            let second = D::S::load(from.add((i + D::GROUP - 1) * x.tile * LANES));
            D::put(to.add(i / D::GROUP * out.tile * LANES), [first, second]);
            i += D::GROUP;
        }
    }
}

#[inline(always)]
pub(super) unsafe fn attend<D: Dot, const R: usize>(m: &Attend<'_>, scores: &mut [f32]) {
    let keys = m.k.len();
    let s = scores.as_mut_ptr();
    for tile in 0..m.tiles {
        for head in 0..m.heads {
            // The rows of a tile are lanes of the same softmax: scores[key][row].
            let line = head * m.lines;
            let q = m.q.in_tile::<R>(tile, 0, line).cast_const();
            for j in 0..keys {
                let k = m.k.get_unchecked(j).in_tile::<R>(tile, 0, line).cast_const();
                let mut sums = [D::S::splat(0.0); R];
                for i in 0..m.lines {
                    for r in 0..R {
                        let at = (i * R + r) * LANES;
                        sums[r] = D::S::fma(D::S::load(q.add(at)), D::S::load(k.add(at)), sums[r]);
                    }
                }
                for r in 0..R {
                    *s.add(j * LANES + r) = D::S::sum(sums[r]);
                }
            }
            let mut largest = D::S::load(s);
            for j in 1..keys {
                largest = D::S::max(largest, D::S::load(s.add(j * LANES)));
            }
            let mut total = D::S::splat(0.0);
            for j in 0..keys {
                let e = exp::<D::S>(D::S::sub(D::S::load(s.add(j * LANES)), largest));
                D::S::store(s.add(j * LANES), e);
                total = D::S::add(total, e);
            }
            let rate = D::S::div(D::S::splat(1.0), total);
            for j in 0..keys {
                D::S::store(s.add(j * LANES), D::S::mul(D::S::load(s.add(j * LANES)), rate));
            }
            let out = m.out.in_tile::<R>(tile, 0, line / D::GROUP);
            let mut i = 0;
            while i < m.lines {
                let mut mix = [[D::S::splat(0.0); 2]; R];
                for j in 0..keys {
                    let v = m.v.get_unchecked(j).in_tile::<R>(tile, 0, line + i).cast_const();
                    for r in 0..R {
                        let weight = D::S::splat(*s.add(j * LANES + r));
                        for g in 0..D::GROUP {
                            mix[r][g] = D::S::fma(D::S::load(v.add((g * R + r) * LANES)), weight, mix[r][g]);
                        }
                    }
                }
                for r in 0..R {
                    D::put(out.add((i / D::GROUP * R + r) * LANES), mix[r]);
                }
                i += D::GROUP;
            }
        }
    }
}

/// Turns the first `count` of `scores`, whose length is a multiple of [`LANES`], into weights that sum to 1, the rest to 0.
#[inline(always)]
pub(super) unsafe fn softmax<S: Simd>(scores: &mut [f32], count: usize) {
    scores[count..].fill(f32::NEG_INFINITY);
    let mut largest = S::splat(f32::NEG_INFINITY);
    for line in scores.chunks_exact(LANES) {
        largest = S::max(largest, S::load(line.as_ptr()));
    }
    let largest = S::splat(S::largest(largest));
    let mut total = S::splat(0.0);
    for line in scores.chunks_exact_mut(LANES) {
        let e = exp::<S>(S::sub(S::load(line.as_ptr()), largest));
        S::store(line.as_mut_ptr(), e);
        total = S::add(total, e);
    }
    // The padding's exponentials are e^-87, which is below half a unit in the last place of the sum: it is at least 1.
    let rate = S::splat(1.0 / S::sum(total));
    for line in scores.chunks_exact_mut(LANES) {
        S::store(line.as_mut_ptr(), S::mul(S::load(line.as_ptr()), rate));
    }
    scores[count..].fill(0.0);
}

/// Sum over `width` of (z - goal)^2; both have zeros in their padding.
#[inline(always)]
pub(super) unsafe fn distance<S: Simd>(z: Rows, row: usize, goal: &[f32]) -> f32 {
    let mut sum = S::splat(0.0);
    for (i, goal) in goal.chunks_exact(LANES).enumerate() {
        let d = S::sub(S::load(z.at(row, i).cast()), S::load(goal.as_ptr()));
        sum = S::fma(d, d, sum);
    }
    S::sum(sum)
}
