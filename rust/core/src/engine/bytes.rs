//! Matrix products of bytes: int8 weights with a scale for every column, activations of eight bits with a scale for every row.
//!
//! A word holds four neighbours; `vpdpbusd` multiplies unsigned activations with signed weights and sums exactly, in 32 bits.
//! A row of an operand has one more line behind its numbers: its scale, in every lane. A panel of weights has two more:
//! what its sums start from (`-ZERO` times the sum of the column, where the operand is signed) and the columns' scales.
//!
//! Signed rows are `(byte - ZERO) * scale`. Rows behind a GELU are `LOWEST + byte * scale`; what that adds, a number for
//! every column, is in the bias.

#[allow(clippy::wildcard_imports)]
use core::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::gemm::{residual, End, Pairs, Place, Product, Start, MOST};
use super::layout::{Line, Rows, LANES};
use super::predictor::CHUNK;
use super::rows::{adapt, moments, tail, Modulate};
use super::simd::{gelu_coarse, Avx512 as S, Simd};
use super::weights::{LOWEST, ZERO};

#[cfg(test)]
mod tests;

/// Numbers in a word.
pub(super) const GROUP: usize = 4;

/// As [`super::gemm::product`]; a GELU takes the whole width at once, which is at most [`CHUNK`] words.
#[inline(always)]
pub(super) unsafe fn product<const R: usize, const T: usize, const N: usize>(p: &Product, start: &Start, end: &End) {
    if let End::Gelu(c) = *end {
        let mut tile = 0;
        while tile + T <= p.tiles {
            gelu::<R, T, N>(p, tile, start, c);
            tile += T;
        }
        while tile < p.tiles {
            gelu::<R, 1, N>(p, tile, start, c);
            tile += 1;
        }
        return;
    }
    let ahead = (N * p.stride).div_ceil(p.tiles.div_ceil(T));
    let mut panel = 0;
    while panel < p.panels {
        let mut next = p.w.wrapping_add((panel + N) * p.stride);
        let mut tile = 0;
        while tile + T <= p.tiles {
            for _ in 0..ahead {
                S::fetch(next.cast());
                next = next.wrapping_add(1);
            }
            block::<R, T, N>(p, tile, panel, start, end);
            tile += T;
        }
        while tile < p.tiles {
            block::<R, 1, N>(p, tile, panel, start, end);
            tile += 1;
        }
        panel += N;
    }
}

#[inline(always)]
unsafe fn block<const R: usize, const T: usize, const N: usize>(
    p: &Product,
    tile: usize,
    panel: usize,
    start: &Start,
    end: &End,
) {
    let mut scratch = [const { MaybeUninit::<Line>::uninit() }; MOST];
    let results = Rows { data: scratch.as_mut_ptr().cast(), tile: R, lines: N };
    match *end {
        End::Residual(x, gate) => {
            sums::<R, T, N, false>(p, tile, panel, start, Place::of::<R>(results, 0, 0));
            for t in 0..T {
                residual::<Pairs, R, N>(results.skip(t), tile + t, panel, 0..R, x, gate);
            }
        }
        End::Store(c) => sums::<R, T, N, false>(p, tile, panel, start, Place::of::<R>(c, tile, panel)),
        End::Gelu(_) | End::Silu(_) => unreachable!("whole rows are made bytes of"),
    }
}

/// A tile of results, in float32; `GELU`: of each.
#[inline(always)]
unsafe fn sums<const R: usize, const T: usize, const N: usize, const GELU: bool>(
    p: &Product,
    tile: usize,
    panel: usize,
    start: &Start,
    to: Place,
) {
    let w = p.w.add(panel * p.stride).cast::<f32>();
    let (next, behind) = (p.stride * LANES, w.add((p.stride - 2) * LANES));
    let mut sums = [[[_mm512_setzero_si512(); N]; R]; T];
    for t in 0..T {
        for r in 0..R {
            for n in 0..N {
                sums[t][r][n] = _mm512_loadu_si512(behind.add(n * next).cast());
            }
        }
    }
    let (mut a, mut w) = (p.a.in_tile::<R>(tile, 0, 0).cast_const(), w);
    let step = p.a.lines * R * LANES;
    for _ in 0..p.units {
        for k in 0..LANES {
            let mut b = [_mm512_setzero_si512(); N];
            for n in 0..N {
                b[n] = _mm512_loadu_si512(w.add(n * next + k * LANES).cast());
            }
            for t in 0..T {
                for r in 0..R {
                    let x = _mm512_set1_epi32(a.add(t * step + r * LANES + k).cast::<i32>().read());
                    for n in 0..N {
                        sums[t][r][n] = _mm512_dpbusd_epi32(sums[t][r][n], x, b[n]);
                    }
                }
            }
        }
        a = a.add(R * LANES);
        w = w.add(LANES * LANES);
    }
    // Now `a` is at the scales.
    let from = Place::start::<R>(start, tile, panel);
    for n in 0..N {
        let columns = S::load(behind.add(n * next + LANES));
        for t in 0..T {
            for r in 0..R {
                let sum = S::mul(_mm512_cvtepi32_ps(sums[t][r][n]), S::load(a.add(t * step + r * LANES)));
                let x = S::fma(sum, columns, S::load(from.at(t, r, n)));
                S::store(to.at(t, r, n), if GELU { gelu_coarse::<S>(x) } else { x });
            }
        }
    }
}

/// No row of an operand has a smaller range: what it is divided by.
const LEAST: f32 = 1e-20;
/// Lines of float32 that a GELU takes.
const WIDE: usize = CHUNK * GROUP / LANES;

/// Whole rows of some tiles through a GELU, as an operand.
#[inline(always)]
#[allow(clippy::large_stack_arrays)] // 24 KiB: in the level 1 cache, and a thread has 2 MiB
unsafe fn gelu<const R: usize, const T: usize, const N: usize>(p: &Product, tile: usize, start: &Start, c: Rows) {
    // Of rows of float32 in the level 1 cache: a row's scale is known when all of it is.
    let mut scratch = [const { MaybeUninit::<Line>::uninit() }; WIDE * 12];
    debug_assert!(R * T <= 12 && p.panels <= WIDE);
    let rows = Rows { data: scratch.as_mut_ptr().cast(), tile: R, lines: p.panels };
    let mut panel = 0;
    while panel < p.panels {
        sums::<R, T, N, true>(p, tile, panel, start, Place::of::<R>(rows, 0, panel));
        panel += N;
    }
    for t in 0..T {
        let x = rows.in_tile::<R>(t, 0, 0).cast_const();
        let mut largest = [S::splat(LOWEST); R];
        for i in 0..p.panels {
            for r in 0..R {
                largest[r] = S::max(largest[r], S::load(x.add((i * R + r) * LANES)));
            }
        }
        let (mut rates, mut offsets, mut scales) = ([S::splat(0.0); R], [S::splat(0.0); R], [0.0; R]);
        for r in 0..R {
            let range = (S::largest(largest[r]) - LOWEST).max(LEAST);
            scales[r] = range / 255.0;
            rates[r] = S::splat(255.0 / range);
            offsets[r] = S::splat(-LOWEST * (255.0 / range));
        }
        bytes::<R>(x, p.panels, rates, offsets, scales, c.in_tile::<R>(tile + t, 0, 0));
    }
}

/// Rounds `x * rate + offset` of every row of a tile to bytes, and writes the scales behind them.
#[inline(always)]
unsafe fn bytes<const R: usize>(
    x: *const f32,
    count: usize,
    rates: [__m512; R],
    offsets: [__m512; R],
    scales: [f32; R],
    out: *mut f32,
) {
    // Packing works within quarters of a register: word 4 q + i is quarter q of line i; wanted is word 4 i + q.
    let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    let units = count.div_ceil(4);
    for unit in 0..units {
        for r in 0..R {
            let mut v = [_mm512_castps_si512(S::splat(0.0)); 4];
            for i in 0..4 {
                if unit * 4 + i < count {
                    let x = S::load(x.add(((unit * 4 + i) * R + r) * LANES));
                    v[i] = _mm512_cvtps_epi32(S::fma(x, rates[r], offsets[r]));
                }
            }
            let halves = [_mm512_packus_epi32(v[0], v[1]), _mm512_packus_epi32(v[2], v[3])];
            let line = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(halves[0], halves[1]));
            _mm512_storeu_si512(out.add((unit * R + r) * LANES).cast(), line);
        }
    }
    for r in 0..R {
        S::store(out.add((units * R + r) * LANES), S::splat(scales[r]));
    }
}

/// As [`super::rows::modulate`].
#[inline(always)]
pub(super) unsafe fn modulate<const R: usize>(m: &Modulate, scratch: *mut f32) {
    let count = m.width.div_ceil(LANES);
    let mask = S::load(tail(m.width).as_ptr());
    for tile in 0..m.tiles {
        adapt::<S, R>(m, tile, mask, scratch);
        let (means, rates) = moments::<S, R>(scratch, count, m.width, mask, m.eps[1]);
        let mut largest = [S::splat(0.0); R];
        for i in 0..count {
            for r in 0..R {
                let mut d = S::sub(S::load(scratch.add((i * R + r) * LANES)), means[r]);
                if i == count - 1 {
                    d = S::mul(d, mask);
                }
                largest[r] = S::max(largest[r], _mm512_abs_ps(d));
            }
        }
        let (mut steps, mut offsets, mut scales) = ([S::splat(0.0); R], [S::splat(0.0); R], [0.0; R]);
        for r in 0..R {
            let range = S::splat(S::largest(largest[r]).max(LEAST));
            steps[r] = S::div(S::splat(127.0), range);
            offsets[r] = S::sub(S::splat(f32::from(ZERO)), S::mul(means[r], steps[r]));
            scales[r] = S::largest(S::div(rates[r], steps[r]));
        }
        bytes::<R>(scratch, count, steps, offsets, scales, m.out.in_tile::<R>(tile, 0, 0));
    }
}

/// As [`super::gemm::peak`].
#[inline(always)]
pub(super) unsafe fn peak<const R: usize, const T: usize, const N: usize>(rounds: usize, x: f32) -> f32 {
    let x = _mm512_set1_epi32(x.to_bits().cast_signed());
    let mut sums = [[[x; N]; R]; T];
    for _ in 0..rounds {
        for sum in sums.as_flattened_mut().as_flattened_mut() {
            *sum = _mm512_dpbusd_epi32(*sum, x, x);
        }
    }
    let total = sums.as_flattened().as_flattened().iter().fold(x, |total, sum| _mm512_add_epi32(total, *sum));
    _mm512_reduce_add_epi32(total) as f32
}
