//! Matrix products of bfloat16 on tiles: Intel AMX through inline assembly, and the same instructions in plain Rust.
//!
//! A tile register is 16 rows of 64 bytes. The layout was made for it: 1 KB in one piece is a tile of float32 sums, 16 rows
//! of an operand times 32 numbers, or, of a panel of weights, 16 words times 16 columns; a bias is a tile whose rows all lie
//! at the same place. What follows a product works on vectors, a few rows at a time between the tile instructions of the
//! next block.

use std::marker::PhantomData;
use std::mem::MaybeUninit;

use super::gemm::{finish, Dot, End, Multiply, Place, Product, Start};
use super::layout::{Line, Rows, LANES};

/// Rows of a tile.
const ROWS: usize = 16;
/// Row tiles and panels of a block: with two of each, four of the eight registers hold sums.
const BLOCK: usize = 2;
/// Tile products between two branches of [`Tiled::peak`].
const PEAK: usize = 16;

/// Eight tile registers and the instructions on them.
///
/// The registers are no operands of the assembly: the compiler does not know of them and never touches them, and volatile
/// assembly stays in order.
///
/// # Safety
/// The processor has them, and this thread is between `enter` and `leave`. `stride`, in numbers, leads from row to row.
pub(super) trait Tiles {
    unsafe fn new() -> Self;
    unsafe fn enter() {}
    unsafe fn leave() {}
    /// `TILELOADD`.
    unsafe fn load<const R: usize>(&mut self, from: *const f32, stride: usize);
    /// `TILELOADDT1` of a tile in one piece: as `load`, but it does not stay in the level 1 cache.
    unsafe fn stream<const R: usize>(&mut self, from: *const f32);
    /// `TDPBF16PS`: register C += A B.
    unsafe fn dot<const C: usize, const A: usize, const B: usize>(&mut self);
    /// `TILESTORED`.
    unsafe fn store<const R: usize>(&mut self, to: *mut f32, stride: usize);
}

/// Products on tiles `X`; the rows between them by `D`.
pub(super) struct Tiled<X, D>(PhantomData<(X, D)>);

impl<X: Tiles, D: Dot> Multiply for Tiled<X, D> {
    type Dot = D;
    const ROWS: usize = ROWS;
    const FLOPS: usize = PEAK * ROWS * LANES * LANES * 2 * 2;

    #[inline(always)]
    unsafe fn product(p: &Product, start: &Start, end: &End) {
        const LINES: usize = BLOCK * BLOCK * ROWS;
        let mut x = X::new();
        // The sums of this block and those of the one before.
        let mut scratch = [const { MaybeUninit::<Line>::uninit() }; 2 * LINES];
        let scratch = scratch.as_mut_ptr().cast();
        let mut sums = Rows { data: scratch, tile: ROWS, lines: BLOCK };
        let mut other = Rows { data: scratch.add(LINES), ..sums };
        let mut later = Later { end, sums, tile: 0, panel: 0, next: 0, rows: 0 };
        // Row tiles outside: theirs stay in the level 1 cache while the weights come past.
        for tile in (0..p.tiles).step_by(BLOCK) {
            let tiles = BLOCK.min(p.tiles - tile);
            for panel in (0..p.panels).step_by(BLOCK) {
                let from = Place::start::<ROWS>(start, tile, panel);
                let (to, rows) = match *end {
                    End::Store(c) => (Place::of::<ROWS>(c, tile, panel), 0),
                    _ => (Place::of::<ROWS>(sums, 0, 0), tiles * ROWS),
                };
                if tiles == BLOCK {
                    block::<X, D, 2>(&mut x, p, tile, panel, from, to, &mut later);
                } else {
                    block::<X, D, 1>(&mut x, p, tile, panel, from, to, &mut later);
                }
                later = Later { end, sums, tile, panel, next: 0, rows };
                std::mem::swap(&mut sums, &mut other);
            }
        }
        while later.next < later.rows {
            later.some::<D>(ROWS);
        }
    }

    #[inline(always)]
    unsafe fn peak(rounds: usize, x: f32) -> f32 {
        X::enter();
        let mut tiles = X::new();
        // Pairs of 0 and x, rounded.
        let mut lines = [Line([f32::from_bits(x.to_bits() & 0xffff_0000); LANES]); ROWS];
        let data: *mut f32 = lines.as_mut_ptr().cast();
        tiles.load::<0>(data, LANES);
        tiles.load::<1>(data, LANES);
        tiles.load::<2>(data, LANES);
        tiles.load::<3>(data, LANES);
        tiles.load::<4>(data, LANES);
        tiles.load::<5>(data, LANES);
        tiles.load::<6>(data, LANES);
        tiles.load::<7>(data, LANES);
        for _ in 0..rounds {
            for _ in 0..PEAK / 4 {
                tiles.dot::<0, 4, 6>();
                tiles.dot::<2, 5, 6>();
                tiles.dot::<1, 4, 7>();
                tiles.dot::<3, 5, 7>();
            }
        }
        tiles.store::<0>(data, LANES);
        let mut sum = lines[0].0[0];
        tiles.store::<1>(data, LANES);
        sum += lines[0].0[0];
        tiles.store::<2>(data, LANES);
        sum += lines[0].0[0];
        tiles.store::<3>(data, LANES);
        sum += lines[0].0[0];
        X::leave();
        sum
    }

    #[inline(always)]
    unsafe fn enter() {
        X::enter();
    }
    #[inline(always)]
    unsafe fn leave() {
        X::leave();
    }
}

/// The end of a block whose sums are stored: rows `next..rows` are still to be finished.
struct Later<'a> {
    end: &'a End,
    sums: Rows,
    tile: usize,
    panel: usize,
    next: usize,
    rows: usize,
}

impl Later<'_> {
    /// Finishes `count` rows, a divisor of [`ROWS`].
    #[inline(always)]
    unsafe fn some<D: Dot>(&mut self, count: usize) {
        if self.next < self.rows {
            let (t, r) = (self.next / ROWS, self.next % ROWS);
            finish::<D, ROWS, BLOCK>(self.end, self.sums.skip(t), self.tile + t, self.panel, r..r + count);
            self.next += count;
        }
    }
}

/// `T` row tiles times two panels: sums in registers 0 to 3, operands in 4 and 5, weights in 6 and 7.
#[inline(always)]
unsafe fn block<X: Tiles, D: Dot, const T: usize>(
    x: &mut X,
    p: &Product,
    tile: usize,
    panel: usize,
    from: Place,
    to: Place,
    later: &mut Later,
) {
    let mut a: *const f32 = p.a.data.add(tile * p.a.lines * ROWS).cast();
    let mut w: *const f32 = p.w.add(panel * p.stride).cast();
    let (below, beside) = (p.a.lines * ROWS * LANES, p.stride * LANES);
    // Rows of the block before that are finished after each product, so that none are left at the end.
    let count = later.rows.div_ceil(p.units * T * BLOCK).next_power_of_two();
    x.load::<0>(from.at(0, 0, 0), from.row);
    x.load::<1>(from.at(0, 0, 1), from.row);
    if T == 2 {
        x.load::<2>(from.at(1, 0, 0), from.row);
        x.load::<3>(from.at(1, 0, 1), from.row);
    }
    for _ in 0..p.units {
        x.stream::<6>(w);
        x.load::<4>(a, LANES);
        x.stream::<7>(w.add(beside));
        x.dot::<0, 4, 6>();
        later.some::<D>(count);
        if T == 2 {
            x.load::<5>(a.add(below), LANES);
            x.dot::<2, 5, 6>();
            later.some::<D>(count);
        }
        x.dot::<1, 4, 7>();
        later.some::<D>(count);
        if T == 2 {
            x.dot::<3, 5, 7>();
            later.some::<D>(count);
        }
        a = a.add(ROWS * LANES);
        w = w.add(LANES * LANES);
    }
    x.store::<0>(to.at(0, 0, 0), LANES);
    x.store::<1>(to.at(0, 0, 1), LANES);
    if T == 2 {
        x.store::<2>(to.at(1, 0, 0), LANES);
        x.store::<3>(to.at(1, 0, 1), LANES);
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(super) use registers::{here, Registers};

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod registers {
    use core::arch::asm;
    use core::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
    use std::sync::OnceLock;

    use super::super::layout::LANES;
    use super::{Tiles, ROWS};

    /// Whether this processor has AMX for bfloat16 and Linux lets this process use it, which it asks for once.
    pub(in super::super) fn here() -> bool {
        static HERE: OnceLock<bool> = OnceLock::new();
        // SAFETY: xgetbv is there where CPUID says that Linux uses it.
        *HERE.get_or_init(|| unsafe { supported() && permitted() })
    }

    #[allow(unused_unsafe)] // CPUID is safe from Rust 1.94 on
    #[target_feature(enable = "xsave")]
    unsafe fn supported() -> bool {
        const AMX_BF16: u32 = 1 << 22;
        const AMX_TILE: u32 = 1 << 24;
        const OSXSAVE: u32 = 1 << 27;
        /// State of tile configuration and data.
        const XCR0: u64 = 0b11 << 17;
        unsafe {
            __cpuid(0).eax >= 7
                && __cpuid(1).ecx & OSXSAVE != 0
                && __cpuid_count(7, 0).edx & (AMX_BF16 | AMX_TILE) == AMX_BF16 | AMX_TILE
                && _xgetbv(0) & XCR0 == XCR0
        }
    }

    /// `arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA)`: for all threads of the process, also future ones.
    fn permitted() -> bool {
        const ARCH_PRCTL: usize = 158;
        const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
        const XFEATURE_XTILE_DATA: usize = 18;
        let result: isize;
        // SAFETY: the system call touches no memory; the kernel refuses what it does not know.
        unsafe {
            asm!(
                "syscall",
                inlateout("rax") ARCH_PRCTL => result,
                in("rdi") ARCH_REQ_XCOMP_PERM,
                in("rsi") XFEATURE_XTILE_DATA,
                lateout("rcx") _,
                lateout("r11") _,
                options(nostack, nomem),
            );
        }
        result == 0
    }

    /// What `LDTILECFG` reads.
    #[repr(C, align(64))]
    struct Shapes {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        bytes: [u16; 16],
        rows: [u8; 16],
    }

    /// All eight tiles are as large as they can be.
    static SHAPES: Shapes = Shapes {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
        rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
    };

    /// The processor's own.
    pub(in super::super) struct Registers;

    impl Tiles for Registers {
        #[inline(always)]
        unsafe fn new() -> Self {
            Self
        }
        #[inline(always)]
        unsafe fn enter() {
            asm!("ldtilecfg [{}]", in(reg) &raw const SHAPES, options(nostack, preserves_flags, readonly));
        }
        #[inline(always)]
        unsafe fn leave() {
            asm!("tilerelease", options(nostack, preserves_flags, nomem));
        }
        #[inline(always)]
        unsafe fn load<const R: usize>(&mut self, from: *const f32, stride: usize) {
            asm!("tileloadd tmm{}, [{} + {} * 4]", const R, in(reg) from, in(reg) stride,
                options(nostack, preserves_flags, readonly));
        }
        #[inline(always)]
        unsafe fn stream<const R: usize>(&mut self, from: *const f32) {
            asm!("tileloaddt1 tmm{}, [{} + {} * 4]", const R, in(reg) from, in(reg) LANES,
                options(nostack, preserves_flags, readonly));
        }
        #[inline(always)]
        unsafe fn dot<const C: usize, const A: usize, const B: usize>(&mut self) {
            asm!("tdpbf16ps tmm{}, tmm{}, tmm{}", const C, const A, const B,
                options(nostack, preserves_flags, nomem));
        }
        #[inline(always)]
        unsafe fn store<const R: usize>(&mut self, to: *mut f32, stride: usize) {
            asm!("tilestored [{} + {} * 4], tmm{}", in(reg) to, in(reg) stride, const R,
                options(nostack, preserves_flags));
        }
    }

    const _: () = assert!(size_of::<Shapes>() == 64 && ROWS == 16);
}

#[cfg(test)]
pub(super) use emulated::{Emulated, Halves};

#[cfg(test)]
mod emulated {
    use super::super::layout::{Line, LANES};
    use super::super::simd::{Portable, Simd};
    use super::super::weights::bfloat16;
    use super::{Dot, Tiles, ROWS};

    /// Tile registers in memory.
    pub(in super::super) struct Emulated([[Line; ROWS]; 8]);

    /// The two bfloat16 of a word, the lower one first.
    fn halves(word: f32) -> [f32; 2] {
        let bits = word.to_bits();
        [f32::from_bits(bits << 16), f32::from_bits(bits & 0xffff_0000)].map(flush)
    }

    /// Denormal numbers are zero, with their sign.
    fn flush(x: f32) -> f32 {
        if x.is_subnormal() {
            0.0_f32.copysign(x)
        } else {
            x
        }
    }

    impl Tiles for Emulated {
        unsafe fn new() -> Self {
            Self([[Line::ZERO; ROWS]; 8])
        }
        unsafe fn load<const R: usize>(&mut self, from: *const f32, stride: usize) {
            for (r, line) in self.0[R].iter_mut().enumerate() {
                line.0 = Portable::load(from.add(r * stride));
            }
        }
        unsafe fn stream<const R: usize>(&mut self, from: *const f32) {
            self.load::<R>(from, LANES);
        }
        /// As Intel's manual has it: the lower halves of the words and the upper ones are summed apart, from zero, k
        /// ascending, one fused step each; then both together; then to the sum that was there. To nearest, ties to even,
        /// denormal inputs and results zero.
        unsafe fn dot<const C: usize, const A: usize, const B: usize>(&mut self) {
            let b = self.0[B].map(|line| line.0.map(halves));
            for row in 0..ROWS {
                let mut sums = [[0.0_f32; 2]; LANES];
                for (k, b) in b.iter().enumerate() {
                    let a = halves(self.0[A][row].0[k]);
                    for (sum, b) in sums.iter_mut().zip(b) {
                        for i in 0..2 {
                            // Products are exact in float64, and rounding there first does not change a normal float32.
                            sum[i] = flush((f64::from(a[i]) * f64::from(b[i]) + f64::from(sum[i])) as f32);
                        }
                    }
                }
                for (c, sum) in self.0[C][row].0.iter_mut().zip(sums) {
                    *c = flush(flush(*c) + flush(sum[0] + sum[1]));
                }
            }
        }
        unsafe fn store<const R: usize>(&mut self, to: *mut f32, stride: usize) {
            for (r, line) in self.0[R].iter().enumerate() {
                Portable::store(to.add(r * stride), line.0);
            }
        }
    }

    /// Words are pairs of bfloat16, in plain Rust.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Halves;

    impl Dot for Halves {
        type S = Portable;
        const GROUP: usize = 2;

        unsafe fn word(from: *const f32) -> [f32; 16] {
            Portable::splat(*from)
        }
        unsafe fn dot(a: [f32; 16], b: [f32; 16], c: [f32; 16]) -> [f32; 16] {
            std::array::from_fn(|i| {
                let (a, b) = (halves(a[i]), halves(b[i]));
                a[0] * b[0] + (a[1] * b[1] + c[i])
            })
        }
        unsafe fn put(to: *mut f32, v: [[f32; 16]; 2]) {
            let numbers = v.as_flattened();
            let word = |i: usize| u32::from(bfloat16(flush(numbers[i])));
            Portable::store(to, std::array::from_fn(|i| f32::from_bits(word(2 * i) | word(2 * i + 1) << 16)));
        }
    }
}
