//! The kernels of every instruction set and precision, as tables of functions chosen at run time.

use super::gemm::{self, End, Product, Single, Start};
use super::layout::Rows;
use super::rows::{self, Attend, Modulate, Norm};
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
    /// What it is called, as in `LEWM_CPU`.
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
    /// Rounds of as many multiply-adds as `flops / 2`, from registers alone.
    pub peak: unsafe fn(usize, f32) -> f32,
    /// Floating-point operations of such a round.
    pub flops: usize,
    /// Whether this processor has it.
    pub here: fn() -> bool,
}

macro_rules! kernels {
    ($table:ident, $name:literal, $precision:ident, $dot:ty, rows $r:literal, tiles $t:literal, panels $n:literal
     $(, features $features:literal)?, here $here:expr) => {
        pub(super) static $table: Kernels = {
            $(#[target_feature(enable = $features)])?
            unsafe fn product(p: &Product, start: &Start, end: &End) {
                gemm::product::<$dot, $r, $t, $n>(p, start, end);
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn modulate(m: &Modulate, scratch: *mut f32) {
                rows::modulate::<$dot, $r>(m, scratch);
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn norm(m: &Norm) {
                rows::norm::<$dot, $r>(m);
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn convert(x: Rows, out: Rows, rows: usize, lines: usize) {
                rows::convert::<$dot>(x, out, rows, lines);
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn attend(m: &Attend<'_>, scores: &mut [f32]) {
                rows::attend::<$dot, $r>(m, scores);
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn softmax(scores: &mut [f32], count: usize) {
                rows::softmax::<<$dot as gemm::Dot>::S>(scores, count);
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn distance(z: Rows, row: usize, goal: &[f32]) -> f32 {
                rows::distance::<<$dot as gemm::Dot>::S>(z, row, goal)
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn peak(rounds: usize, x: f32) -> f32 {
                gemm::peak::<$dot, $r, $t, $n>(rounds, x)
            }
            Kernels {
                name: $name,
                precision: Precision::$precision,
                tile: $r,
                group: <$dot as gemm::Dot>::GROUP,
                product,
                bulk_group: <$dot as gemm::Dot>::GROUP,
                bulk: product,
                modulate,
                norm,
                convert,
                attend,
                softmax,
                distance,
                peak,
                flops: $r * $t * $n * super::layout::LANES * <$dot as gemm::Dot>::GROUP * 2,
                here: $here,
            }
        };
    };
}

kernels!(PORTABLE, "portable", Float32, Single<Portable>, rows 6, tiles 1, panels 1, here || true);

#[cfg(target_arch = "x86_64")]
kernels!(AVX2, "avx2", Float32, Single<Avx2>, rows 6, tiles 1, panels 1, features "avx2,fma",
    here || is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"));

#[cfg(target_arch = "x86_64")]
kernels!(AVX512, "avx512", Float32, Single<Avx512>, rows 6, tiles 2, panels 2,
    features "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma", here avx512);

#[cfg(target_arch = "x86_64")]
kernels!(AVX512_BF16, "avx512", Bfloat16, Pairs, rows 6, tiles 2, panels 2,
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
kernels!(NEON, "neon", Float32, Single<super::simd::Neon>, rows 6, tiles 1, panels 1, here || true);

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
    #[cfg(target_arch = "x86_64")]
    &AVX512_BF16,
    #[cfg(target_arch = "x86_64")]
    &AVX512_INT8,
    #[cfg(target_arch = "x86_64")]
    &AVX2,
    #[cfg(target_arch = "aarch64")]
    &NEON,
    &PORTABLE,
];
