//! The kernels of every instruction set and precision, as tables of functions chosen at run time.

#[cfg(any(test, all(target_arch = "x86_64", target_os = "linux")))]
use super::amx;
use super::gemm::{Dot, End, Multiply, Product, Single, Start, Vectors};
use super::layout::{Line, Rows};
use super::rows::{self, Attend, Modulate, Norm};
use super::sigreg::{self, Waves};
use super::simd::Portable;
#[cfg(target_arch = "x86_64")]
use super::{
    bytes,
    gemm::Pairs,
    simd::{Avx2, Avx512},
};

/// What the numbers in a matrix product are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// float32.
    Float32,
    /// bfloat16 factors, float32 sums; everything between two products is float32.
    Bfloat16,
    /// As bfloat16, but the factors of most products within the layers of the predictor are int8: what comes from tokens to
    /// queries, keys, values and hidden units, and from these back.
    Int8,
}

impl Precision {
    /// The name that the Python side uses.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Float32 => "float32",
            Self::Bfloat16 => "bfloat16",
            Self::Int8 => "int8",
        }
    }
}

/// One instruction set in one precision.
pub(super) struct Kernels {
    /// What it is called, as in [`Engine::instruction_sets`](super::Engine::instruction_sets).
    pub name: &'static str,
    pub precision: Precision,
    /// Rows in a tile.
    pub tile: usize,
    /// Numbers in a word of an operand.
    pub group: usize,
    pub product: unsafe fn(&Product, &Start, &End),
    /// The same for what [`Modulate`] writes and for hidden units.
    pub bulk_group: usize,
    pub bulk: unsafe fn(&Product, &Start, &End),
    pub modulate: unsafe fn(&Modulate, *mut f32),
    pub norm: unsafe fn(&Norm),
    pub convert: unsafe fn(Rows, Rows, usize, usize),
    pub attend: unsafe fn(&Attend<'_>, &mut [f32]),
    pub softmax: unsafe fn(&mut [f32], usize),
    pub distance: unsafe fn(Rows, usize, &[f32]) -> f32,
    pub add_powers: unsafe fn(&Waves, usize, &mut [Line]),
    pub horner: unsafe fn(&Waves, &[Line]),
    /// Rounds of as many multiply-adds as `flops / 2`, from registers alone.
    pub peak: unsafe fn(usize, f32) -> f32,
    /// Floating-point operations of such a round.
    pub flops: usize,
    /// Called on a thread before its first product, and after its last one.
    pub enter: unsafe fn(),
    pub leave: unsafe fn(),
    /// Whether this processor has it.
    pub here: fn() -> bool,
}

macro_rules! kernels {
    ($table:ident, $name:literal, $precision:ident, $multiply:ty $(, features $features:literal)?, here $here:expr) => {
        pub(super) static $table: Kernels = {
            type M = $multiply;
            type D = <M as Multiply>::Dot;
            const R: usize = <M as Multiply>::ROWS;
            $(#[target_feature(enable = $features)])?
            unsafe fn product(p: &Product, start: &Start, end: &End) {
                M::product(p, start, end);
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn modulate(m: &Modulate, scratch: *mut f32) {
                rows::modulate::<D, R>(m, scratch);
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn norm(m: &Norm) {
                rows::norm::<D, R>(m);
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn convert(x: Rows, out: Rows, rows: usize, lines: usize) {
                rows::convert::<D>(x, out, rows, lines);
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn attend(m: &Attend<'_>, scores: &mut [f32]) {
                rows::attend::<D, R>(m, scores);
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn softmax(scores: &mut [f32], count: usize) {
                rows::softmax::<<D as Dot>::S>(scores, count);
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn distance(z: Rows, row: usize, goal: &[f32]) -> f32 {
                rows::distance::<<D as Dot>::S>(z, row, goal)
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn add_powers(m: &Waves, rows: usize, sums: &mut [Line]) {
                sigreg::add_powers::<<D as Dot>::S, R>(m, rows, sums);
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn horner(m: &Waves, coefficients: &[Line]) {
                sigreg::horner::<<D as Dot>::S, R>(m, coefficients);
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn peak(rounds: usize, x: f32) -> f32 {
                M::peak(rounds, x)
            }
            unsafe fn enter() {
                M::enter();
            }
            unsafe fn leave() {
                M::leave();
            }
            Kernels {
                name: $name,
                precision: Precision::$precision,
                tile: R,
                group: <D as Dot>::GROUP,
                product,
                bulk_group: <D as Dot>::GROUP,
                bulk: product,
                modulate,
                norm,
                convert,
                attend,
                softmax,
                distance,
                add_powers,
                horner,
                peak,
                enter,
                leave,
                flops: M::FLOPS,
                here: $here,
            }
        };
    };
}

kernels!(PORTABLE, "portable", Float32, Vectors<Single<Portable>, 6, 1, 1>, here || true);

#[cfg(target_arch = "x86_64")]
kernels!(AVX2, "avx2", Float32, Vectors<Single<Avx2>, 6, 1, 1>, features "avx2,fma",
    here || is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"));

#[cfg(target_arch = "x86_64")]
kernels!(AVX512, "avx512", Float32, Vectors<Single<Avx512>, 6, 2, 2>,
    features "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma", here avx512);

#[cfg(target_arch = "x86_64")]
kernels!(AVX512_BF16, "avx512", Bfloat16, Vectors<Pairs, 6, 2, 2>,
    features "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma",
    here || avx512() && is_x86_feature_detected!("avx512bf16"));

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
kernels!(AMX, "amx", Bfloat16, amx::Tiled<amx::Registers, Pairs>,
    features "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma",
    here || avx512() && is_x86_feature_detected!("avx512bf16") && amx::here());

// AMX for machines without it: its instructions in plain Rust.
#[cfg(test)]
kernels!(AMX_EMULATED, "amx-emulated", Bfloat16, amx::Tiled<amx::Emulated, amx::Halves>, here || true);

// AMX with all but the tile instructions as they are.
#[cfg(all(test, target_arch = "x86_64"))]
kernels!(AMX_AVX512, "amx-avx512", Bfloat16, amx::Tiled<amx::Emulated, Pairs>,
    features "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma",
    here || avx512() && is_x86_feature_detected!("avx512bf16"));

#[cfg(target_arch = "x86_64")]
static AVX512_INT8: Kernels = {
    #[target_feature(enable = "avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    unsafe fn bulk(p: &Product, start: &Start, end: &End) {
        bytes::product::<6, 2, 2>(p, start, end);
    }
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    unsafe fn modulate(m: &Modulate, scratch: *mut f32) {
        bytes::modulate::<6>(m, scratch);
    }
    #[target_feature(enable = "avx512vnni,avx512f")]
    unsafe fn peak(rounds: usize, x: f32) -> f32 {
        bytes::peak::<6, 2, 2>(rounds, x)
    }
    Kernels {
        precision: Precision::Int8,
        bulk_group: bytes::GROUP,
        bulk,
        modulate,
        peak,
        flops: AVX512_BF16.flops / AVX512_BF16.group * bytes::GROUP,
        here: || (AVX512_BF16.here)() && is_x86_feature_detected!("avx512vnni"),
        ..AVX512_BF16
    }
};

#[cfg(target_arch = "aarch64")]
kernels!(NEON, "neon", Float32, Vectors<Single<super::simd::Neon>, 6, 1, 1>, here || true);

#[cfg(target_arch = "x86_64")]
fn avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("fma")
}

/// Every table of this architecture, the best of each precision first.
pub(super) static ALL: &[&Kernels] = &[
    #[cfg(target_arch = "x86_64")]
    &AVX512,
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    &AMX,
    #[cfg(target_arch = "x86_64")]
    &AVX512_BF16,
    #[cfg(target_arch = "x86_64")]
    &AVX512_INT8,
    #[cfg(target_arch = "x86_64")]
    &AVX2,
    #[cfg(target_arch = "aarch64")]
    &NEON,
    &PORTABLE,
    #[cfg(all(test, target_arch = "x86_64"))]
    &AMX_AVX512,
    #[cfg(test)]
    &AMX_EMULATED,
];
