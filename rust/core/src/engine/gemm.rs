//! Matrix products with fused ends: `rows (M, K) x weights (K, N)`, and what happens to a tile of the result while it is
//! still in registers.
//!
//! Every number of the result is summed over k in ascending order, one fused step per word, whatever the tile that it is
//! computed in: a row's result does not depend on the rows beside it, nor on where it stands.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::layout::{Line, Rows, LANES};
use super::simd::{gelu_coarse, gelu_exact, silu, Simd};

/// How an instruction set multiplies words: float32 numbers, or pairs of bfloat16.
///
/// # Safety
/// As [`Simd`].
pub(super) trait Dot: Copy + 'static {
    type S: Simd;
    /// float32 numbers in a word.
    const GROUP: usize;

    /// A word in every lane.
    unsafe fn word(from: *const f32) -> <Self::S as Simd>::V;
    /// `a . b + c` for the words of every lane.
    unsafe fn dot(a: <Self::S as Simd>::V, b: <Self::S as Simd>::V, c: <Self::S as Simd>::V) -> <Self::S as Simd>::V;
    /// Writes `GROUP` lines of float32, a row's line `line` of an operand.
    unsafe fn put(to: *mut f32, v: [<Self::S as Simd>::V; 2]);
}

/// Words are float32 numbers.
#[derive(Clone, Copy)]
pub(super) struct Single<S>(std::marker::PhantomData<S>);

impl<S: Simd> Dot for Single<S> {
    type S = S;
    const GROUP: usize = 1;

    #[inline(always)]
    unsafe fn word(from: *const f32) -> S::V {
        S::splat(*from)
    }
    #[inline(always)]
    unsafe fn dot(a: S::V, b: S::V, c: S::V) -> S::V {
        S::fma(a, b, c)
    }
    #[inline(always)]
    unsafe fn put(to: *mut f32, v: [S::V; 2]) {
        S::store(to, v[0]);
    }
}

/// Words are pairs of bfloat16, products are summed in float32 (`vdpbf16ps`).
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Pairs;

#[cfg(target_arch = "x86_64")]
mod pairs {
    use core::arch::x86_64::{
        __m512, __m512bh, _mm512_cvtne2ps_pbh, _mm512_dpbf16_ps, _mm512_set1_ps, _mm512_storeu_ps,
    };
    use std::mem::transmute;

    use super::{Dot, Pairs};

    impl Dot for Pairs {
        type S = super::super::simd::Avx512;
        const GROUP: usize = 2;

        #[inline(always)]
        unsafe fn word(from: *const f32) -> __m512 {
            _mm512_set1_ps(*from)
        }
        #[inline(always)]
        unsafe fn dot(a: __m512, b: __m512, c: __m512) -> __m512 {
            _mm512_dpbf16_ps(c, transmute::<__m512, __m512bh>(a), transmute::<__m512, __m512bh>(b))
        }
        #[inline(always)]
        unsafe fn put(to: *mut f32, v: [__m512; 2]) {
            _mm512_storeu_ps(to, transmute::<__m512bh, __m512>(_mm512_cvtne2ps_pbh(v[1], v[0])));
        }
    }
}

/// How a table multiplies matrices.
///
/// # Safety
/// As [`Simd`]; [`Multiply::product`] between [`Multiply::enter`] and [`Multiply::leave`] on the same thread.
pub(super) trait Multiply {
    /// What the rows between two products are computed with.
    type Dot: Dot;
    /// Rows in a tile.
    const ROWS: usize;
    /// Floating-point operations of a round of [`Multiply::peak`].
    const FLOPS: usize;

    unsafe fn product(p: &Product, start: &Start, end: &End);
    /// The sums of the inner loop without its loads: what the processor can do at most. Returns something of them all.
    unsafe fn peak(rounds: usize, x: f32) -> f32;
    /// Takes what the products of this thread need.
    unsafe fn enter() {}
    /// Gives it back.
    unsafe fn leave() {}
}

/// Products of vectors, in tiles of `T` row tiles of `R` rows, times `N` panels.
pub(super) struct Vectors<D, const R: usize, const T: usize, const N: usize>(std::marker::PhantomData<D>);

impl<D: Dot, const R: usize, const T: usize, const N: usize> Multiply for Vectors<D, R, T, N> {
    type Dot = D;
    const ROWS: usize = R;
    const FLOPS: usize = R * T * N * LANES * D::GROUP * 2;

    #[inline(always)]
    unsafe fn product(p: &Product, start: &Start, end: &End) {
        product::<D, R, T, N>(p, start, end);
    }
    #[inline(always)]
    unsafe fn peak(rounds: usize, x: f32) -> f32 {
        peak::<D, R, T, N>(rounds, x)
    }
}

/// One matrix product: the first `units` lines of each row of `tiles` tiles of `a`, with `panels` panels of `w`.
#[derive(Clone, Copy)]
pub(super) struct Product {
    pub a: Rows,
    pub tiles: usize,
    pub units: usize,
    /// First line of the first panel, at the word that the first line of `a` is multiplied with.
    pub w: *const Line,
    /// Lines from one panel to the next.
    pub stride: usize,
    /// Even.
    pub panels: usize,
}

/// What a result starts from and what becomes of it. Columns are counted in lines from the product's first one.
#[derive(Clone, Copy)]
pub(super) enum Start {
    /// The bias (panels * 16,).
    Bias(*const f32),
    /// What an earlier part of the same sum left.
    Rest(Rows),
}

/// The gate of every row: row r of the result belongs to tile r / tile; `slots` gives the matrix of every `tiles` tiles.
#[derive(Clone, Copy)]
pub(super) struct Gate {
    pub slots: *const Rows,
    pub tiles: usize,
}

/// What becomes of a tile of results.
#[derive(Clone, Copy)]
pub(super) enum End {
    /// Written as float32.
    Store(Rows),
    /// GELU, then written as an operand.
    Gelu(Rows),
    /// SiLU, then written as an operand.
    Silu(Rows),
    /// Added to rows: `x += gate * result`; without a gate, `x += result`.
    Residual(Rows, Option<Gate>),
}

/// Where a tile of sums comes from or goes to: distances, in numbers, from one row tile, row and panel to the next.
#[derive(Clone, Copy)]
pub(super) struct Place {
    data: *mut f32,
    tile: usize,
    pub row: usize,
    panel: usize,
}

impl Place {
    #[inline(always)]
    pub unsafe fn of<const R: usize>(rows: Rows, tile: usize, panel: usize) -> Self {
        let data = rows.in_tile::<R>(tile, 0, panel);
        Self { data, tile: rows.lines * R * LANES, row: LANES, panel: R * LANES }
    }

    /// Where the sums of a block begin.
    #[inline(always)]
    pub unsafe fn start<const R: usize>(start: &Start, tile: usize, panel: usize) -> Self {
        match *start {
            Start::Bias(bias) => Self { data: bias.add(panel * LANES).cast_mut(), tile: 0, row: 0, panel: LANES },
            Start::Rest(rest) => Self::of::<R>(rest, tile, panel),
        }
    }

    #[inline(always)]
    pub unsafe fn at(self, tile: usize, row: usize, panel: usize) -> *mut f32 {
        self.data.add(tile * self.tile + row * self.row + panel * self.panel)
    }
}

#[inline(always)]
unsafe fn product<D: Dot, const R: usize, const T: usize, const N: usize>(p: &Product, start: &Start, end: &End) {
    // While a panel is used, the lines behind it are fetched, a few before each tile: weights come from beyond level 2.
    let ahead = (N * p.stride).div_ceil(p.tiles.div_ceil(T));
    let mut panel = 0;
    while panel < p.panels {
        let w = p.w.add(panel * p.stride);
        let mut next = w.wrapping_add(N * p.stride);
        let mut tile = 0;
        while tile + T <= p.tiles {
            for _ in 0..ahead {
                D::S::fetch(next.cast());
                next = next.wrapping_add(1);
            }
            block::<D, R, T, N>(p, w, tile, panel, start, end);
            tile += T;
        }
        while tile < p.tiles {
            block::<D, R, 1, N>(p, w, tile, panel, start, end);
            tile += 1;
        }
        panel += N;
    }
}

/// More lines than a tile of sums has.
pub(super) const MOST: usize = 32;

#[inline(always)]
unsafe fn block<D: Dot, const R: usize, const T: usize, const N: usize>(
    p: &Product,
    w: *const Line,
    tile: usize,
    panel: usize,
    start: &Start,
    end: &End,
) {
    let mut scratch = [const { MaybeUninit::<Line>::uninit() }; MOST];
    let sums = Rows { data: scratch.as_mut_ptr().cast(), tile: R, lines: N };
    let from = Place::start::<R>(start, tile, panel);
    let to = match *end {
        End::Store(c) => Place::of::<R>(c, tile, panel),
        _ => Place::of::<R>(sums, 0, 0),
    };
    let a = p.a.data.add(tile * p.a.lines * R).cast();
    accumulate::<D, R, T, N>(a, p.a.lines * R * LANES, w.cast(), p.stride * LANES, p.units, from, to);
    for t in 0..T {
        finish::<D, R, N>(end, sums.skip(t), tile + t, panel, 0..R);
    }
}

/// What becomes of the rows `rows` of a tile of sums.
#[inline(always)]
pub(super) unsafe fn finish<D: Dot, const R: usize, const N: usize>(
    end: &End,
    sums: Rows,
    tile: usize,
    panel: usize,
    rows: Range<usize>,
) {
    match *end {
        End::Store(_) => {}
        End::Gelu(c) => operand::<D, R, N, GELU>(sums, tile, panel, rows, c),
        End::Silu(c) => operand::<D, R, N, SILU>(sums, tile, panel, rows, c),
        End::Residual(x, gate) => residual::<D, R, N>(sums, tile, panel, rows, x, gate),
    }
}

/// The inner loop: as many sums as there are registers for, loaded once and stored once.
#[inline(always)]
unsafe fn accumulate<D: Dot, const R: usize, const T: usize, const N: usize>(
    mut a: *const f32,
    step: usize,
    mut w: *const f32,
    next: usize,
    units: usize,
    from: Place,
    to: Place,
) {
    let mut sums = [[[D::S::splat(0.0); N]; R]; T];
    for t in 0..T {
        for r in 0..R {
            for n in 0..N {
                sums[t][r][n] = D::S::load(from.at(t, r, n));
            }
        }
    }
    for _ in 0..units {
        for k in 0..LANES {
            let mut b = [D::S::splat(0.0); N];
            for n in 0..N {
                b[n] = D::S::load(w.add(n * next + k * LANES));
            }
            for t in 0..T {
                for r in 0..R {
                    let x = D::word(a.add(t * step + r * LANES + k));
                    for n in 0..N {
                        sums[t][r][n] = D::dot(x, b[n], sums[t][r][n]);
                    }
                }
            }
        }
        a = a.add(R * LANES);
        w = w.add(LANES * LANES);
    }
    for t in 0..T {
        for r in 0..R {
            for n in 0..N {
                D::S::store(to.at(t, r, n), sums[t][r][n]);
            }
        }
    }
}

#[inline(always)]
pub(super) unsafe fn residual<D: Dot, const R: usize, const N: usize>(
    sums: Rows,
    tile: usize,
    panel: usize,
    rows: Range<usize>,
    x: Rows,
    gate: Option<Gate>,
) {
    // The tile's gates, or nothing that is read.
    let (gates, within) = match gate {
        Some(gate) => (*gate.slots.add(tile / gate.tiles), tile % gate.tiles),
        None => (x, tile),
    };
    for n in 0..N {
        for r in rows.clone() {
            let to = x.in_tile::<R>(tile, r, panel + n);
            let (sum, old) = (D::S::load(sums.in_tile::<R>(0, r, n)), D::S::load(to));
            let new = if gate.is_some() {
                D::S::fma(D::S::load(gates.in_tile::<R>(within, r, panel + n)), sum, old)
            } else {
                D::S::add(sum, old)
            };
            D::S::store(to, new);
        }
    }
}

const GELU: u8 = 1;
const SILU: u8 = 2;

// Not a closure: one that is compiled by itself would be compiled without the instruction set.
#[inline(always)]
unsafe fn activation<D: Dot, const F: u8>(x: <D::S as Simd>::V) -> <D::S as Simd>::V {
    match F {
        GELU if D::GROUP == 1 => gelu_exact::<D::S>(x),
        GELU => gelu_coarse::<D::S>(x),
        _ => silu::<D::S>(x),
    }
}

#[inline(always)]
unsafe fn operand<D: Dot, const R: usize, const N: usize, const F: u8>(
    sums: Rows,
    tile: usize,
    panel: usize,
    rows: Range<usize>,
    c: Rows,
) {
    let mut n = 0;
    while n < N {
        for r in rows.clone() {
            let first = activation::<D, F>(D::S::load(sums.in_tile::<R>(0, r, n)));
            let second = match D::GROUP {
                1 => first,
                _ => activation::<D, F>(D::S::load(sums.in_tile::<R>(0, r, n + 1))),
            };
            D::put(c.in_tile::<R>(tile, r, (panel + n) / D::GROUP), [first, second]);
        }
        n += D::GROUP;
    }
}

#[inline(always)]
unsafe fn peak<D: Dot, const R: usize, const T: usize, const N: usize>(rounds: usize, x: f32) -> f32 {
    let mut sums = [[[D::S::splat(0.0); N]; R]; T];
    let mut start = x;
    for row in sums.as_flattened_mut() {
        for sum in row {
            *sum = D::S::splat(start);
            start += x;
        }
    }
    let x = D::S::splat(x);
    let mut local = sums;
    for _ in 0..rounds {
        for row in local.as_flattened_mut() {
            for sum in row {
                *sum = D::dot(x, x, *sum);
            }
        }
    }
    sums = local;
    let mut total = D::S::splat(0.0);
    for row in sums.as_flattened() {
        for sum in row {
            total = D::S::add(total, *sum);
        }
    }
    D::S::sum(total)
}
