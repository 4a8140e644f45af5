//! Sixteen float32 lanes on every instruction set: the only place that names instructions.
//!
//! Everything above is written once, over [`Simd`]. Its functions are `inline(always)` and only sound inside a function that
//! enables the instruction set's features; `kernels` makes those functions.

/// A group of sixteen float32 numbers and what can be done with it.
///
/// # Safety
/// All functions: the processor has the instruction set, and pointers are valid for sixteen numbers.
pub(super) trait Simd: Copy + 'static {
    /// Sixteen numbers in registers.
    type V: Copy;

    unsafe fn load(from: *const f32) -> Self::V;
    unsafe fn store(to: *mut f32, v: Self::V);
    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once where the processor can.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// To the nearest whole number.
    unsafe fn round(a: Self::V) -> Self::V;
    /// `2^n` for whole numbers from -126 to 127.
    unsafe fn exp2(n: Self::V) -> Self::V;
    /// Sum of the lanes.
    unsafe fn sum(a: Self::V) -> f32;
    /// Largest of the lanes.
    unsafe fn largest(a: Self::V) -> f32;
    /// Asks for the line at `at` to be in the level 2 cache soon; any address will do.
    unsafe fn fetch(at: *const f32);
}

/// `e^x` for x <= 88, within 2 units in the last place; 0 below -87.
#[inline(always)]
pub(super) unsafe fn exp<S: Simd>(x: S::V) -> S::V {
    let x = S::max(x, S::splat(-87.0));
    let n = S::round(S::mul(x, S::splat(std::f32::consts::LOG2_E)));
    // ln 2 in two parts: what is left of x is exact.
    let r = S::fma(n, S::splat(-0.693_359_4), x);
    let r = S::fma(n, S::splat(2.121_944_4e-4), r);
    let mut p = S::splat(1.0 / 5040.0);
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = S::fma(p, r, S::splat(c));
    }
    S::mul(p, S::exp2(n))
}

/// `x / (1 + e^-x)`.
#[inline(always)]
pub(super) unsafe fn silu<S: Simd>(x: S::V) -> S::V {
    let e = exp::<S>(S::min(S::sub(S::splat(0.0), x), S::splat(87.0)));
    S::div(x, S::add(S::splat(1.0), e))
}

/// GELU with the exact error function, `x * (1 + erf(x / sqrt 2)) / 2`, as `x * (1/2 + c q(t))`: c is x clamped to
/// +-`LIMIT`, t is c^2 scaled to [-1, 1] (plain powers of c^2 lose four digits), q a minimax fit, highest power first.
#[inline(always)]
unsafe fn gelu<S: Simd>(x: S::V, limit: f32, q: &[f32]) -> S::V {
    let c = S::max(S::min(x, S::splat(limit)), S::splat(-limit));
    let t = S::fma(S::mul(c, c), S::splat(2.0 / (limit * limit)), S::splat(-1.0));
    let mut p = S::splat(q[0]);
    for &k in &q[1..] {
        p = S::fma(p, t, S::splat(k));
    }
    S::mul(x, S::fma(c, p, S::splat(0.5)))
}

/// [`gelu`] to 1.4e-6.
#[inline(always)]
pub(super) unsafe fn gelu_exact<S: Simd>(x: S::V) -> S::V {
    gelu::<S>(x, 5.2, &GELU_12)
}

/// [`gelu`] to 2.6e-5, for results that are rounded to bfloat16.
#[inline(always)]
pub(super) unsafe fn gelu_coarse<S: Simd>(x: S::V) -> S::V {
    gelu::<S>(x, 4.4, &GELU_8)
}

const GELU_12: [f32; 13] = [
    8.587_804_6e-4,
    -2.503_723_6e-3,
    2.853_575_9e-3,
    -3.505_701_4e-3,
    7.557_864e-3,
    -1.310_335_3e-2,
    1.838_715e-2,
    -2.459_340_4e-2,
    3.190_726_4e-2,
    -3.994_13e-2,
    5.003_017e-2,
    -6.774_340_6e-2,
    1.359_499_4e-1,
];
const GELU_8: [f32; 9] = [
    2.754_175_8e-3,
    -7.884_182e-3,
    1.098_782_7e-2,
    -1.597_698_8e-2,
    2.680_219_5e-2,
    -4.008_923_5e-2,
    5.525_052e-2,
    -7.861_231e-2,
    1.604_044_1e-1,
];

/// Plain Rust: any processor.
#[derive(Clone, Copy)]
pub(super) struct Portable;

#[inline(always)]
fn lanes(f: impl Fn(usize) -> f32) -> [f32; 16] {
    std::array::from_fn(f)
}

impl Simd for Portable {
    type V = [f32; 16];

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::V {
        from.cast::<Self::V>().read_unaligned()
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, v: Self::V) {
        to.cast::<Self::V>().write_unaligned(v);
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; 16]
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| a[i] - b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| a[i] / b[i])
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // Rounded twice: a fused one would be a call of the C library for every number.
        lanes(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn round(a: Self::V) -> Self::V {
        // Adding 1.5 * 2^23 leaves no place for a fraction.
        lanes(|i| (a[i] + 12_582_912.0) - 12_582_912.0)
    }
    #[inline(always)]
    unsafe fn exp2(n: Self::V) -> Self::V {
        lanes(|i| f32::from_bits(((n[i] as i32 + 127) << 23).cast_unsigned()))
    }
    #[inline(always)]
    unsafe fn sum(a: Self::V) -> f32 {
        let halves: [f32; 8] = std::array::from_fn(|i| a[i] + a[i + 8]);
        let quarters: [f32; 4] = std::array::from_fn(|i| halves[i] + halves[i + 4]);
        (quarters[0] + quarters[2]) + (quarters[1] + quarters[3])
    }
    #[inline(always)]
    unsafe fn largest(a: Self::V) -> f32 {
        a.iter().copied().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    unsafe fn fetch(_: *const f32) {}
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    #[allow(clippy::wildcard_imports)]
    use core::arch::x86_64::*;

    use super::Simd;

    /// AVX-512 F, BW, DQ and VL.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx512;

    impl Simd for Avx512 {
        type V = __m512;

        #[inline(always)]
        unsafe fn load(from: *const f32) -> __m512 {
            _mm512_loadu_ps(from)
        }
        #[inline(always)]
        unsafe fn store(to: *mut f32, v: __m512) {
            _mm512_storeu_ps(to, v);
        }
        #[inline(always)]
        unsafe fn splat(x: f32) -> __m512 {
            _mm512_set1_ps(x)
        }
        #[inline(always)]
        unsafe fn add(a: __m512, b: __m512) -> __m512 {
            _mm512_add_ps(a, b)
        }
        #[inline(always)]
        unsafe fn sub(a: __m512, b: __m512) -> __m512 {
            _mm512_sub_ps(a, b)
        }
        #[inline(always)]
        unsafe fn mul(a: __m512, b: __m512) -> __m512 {
            _mm512_mul_ps(a, b)
        }
        #[inline(always)]
        unsafe fn div(a: __m512, b: __m512) -> __m512 {
            _mm512_div_ps(a, b)
        }
        #[inline(always)]
        unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
            _mm512_fmadd_ps(a, b, c)
        }
        #[inline(always)]
        unsafe fn min(a: __m512, b: __m512) -> __m512 {
            _mm512_min_ps(a, b)
        }
        #[inline(always)]
        unsafe fn max(a: __m512, b: __m512) -> __m512 {
            _mm512_max_ps(a, b)
        }
        #[inline(always)]
        unsafe fn round(a: __m512) -> __m512 {
            _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a)
        }
        #[inline(always)]
        unsafe fn exp2(n: __m512) -> __m512 {
            let n = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(n))
        }
        #[inline(always)]
        unsafe fn sum(a: __m512) -> f32 {
            _mm512_reduce_add_ps(a)
        }
        #[inline(always)]
        unsafe fn largest(a: __m512) -> f32 {
            _mm512_reduce_max_ps(a)
        }
        #[inline(always)]
        unsafe fn fetch(at: *const f32) {
            _mm_prefetch::<_MM_HINT_T1>(at.cast());
        }
    }

    /// AVX2 and FMA.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx2;

    impl Simd for Avx2 {
        type V = [__m256; 2];

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self::V {
            [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))]
        }
        #[inline(always)]
        unsafe fn store(to: *mut f32, v: Self::V) {
            _mm256_storeu_ps(to, v[0]);
            _mm256_storeu_ps(to.add(8), v[1]);
        }
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self::V {
            [_mm256_set1_ps(x); 2]
        }
        #[inline(always)]
        unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
            [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])]
        }
        #[inline(always)]
        unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
            [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])]
        }
        #[inline(always)]
        unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
            [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])]
        }
        #[inline(always)]
        unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
            [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])]
        }
        #[inline(always)]
        unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
            [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])]
        }
        #[inline(always)]
        unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
            [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])]
        }
        #[inline(always)]
        unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
            [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])]
        }
        #[inline(always)]
        unsafe fn round(a: Self::V) -> Self::V {
            const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
            [_mm256_round_ps::<NEAREST>(a[0]), _mm256_round_ps::<NEAREST>(a[1])]
        }
        #[inline(always)]
        unsafe fn exp2(n: Self::V) -> Self::V {
            let bias = _mm256_set1_epi32(127);
            let low = _mm256_add_epi32(_mm256_cvtps_epi32(n[0]), bias);
            let high = _mm256_add_epi32(_mm256_cvtps_epi32(n[1]), bias);
            [_mm256_castsi256_ps(_mm256_slli_epi32::<23>(low)), _mm256_castsi256_ps(_mm256_slli_epi32::<23>(high))]
        }
        #[inline(always)]
        unsafe fn sum(a: Self::V) -> f32 {
            let v = _mm256_add_ps(a[0], a[1]);
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
        }
        #[inline(always)]
        unsafe fn largest(a: Self::V) -> f32 {
            let v = _mm256_max_ps(a[0], a[1]);
            let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)))
        }
        #[inline(always)]
        unsafe fn fetch(at: *const f32) {
            _mm_prefetch::<_MM_HINT_T1>(at.cast());
        }
    }
}

#[cfg(target_arch = "aarch64")]
pub(super) use arm::Neon;

#[cfg(target_arch = "aarch64")]
mod arm {
    #[allow(clippy::wildcard_imports)]
    use core::arch::aarch64::*;

    use super::Simd;

    /// NEON, which every 64-bit ARM processor has.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Neon;

    #[inline(always)]
    unsafe fn each(f: impl Fn(usize) -> float32x4_t) -> [float32x4_t; 4] {
        std::array::from_fn(f)
    }

    impl Simd for Neon {
        type V = [float32x4_t; 4];

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self::V {
            each(|i| vld1q_f32(from.add(4 * i)))
        }
        #[inline(always)]
        unsafe fn store(to: *mut f32, v: Self::V) {
            for (i, v) in v.into_iter().enumerate() {
                vst1q_f32(to.add(4 * i), v);
            }
        }
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self::V {
            [vdupq_n_f32(x); 4]
        }
        #[inline(always)]
        unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
            each(|i| vaddq_f32(a[i], b[i]))
        }
        #[inline(always)]
        unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
            each(|i| vsubq_f32(a[i], b[i]))
        }
        #[inline(always)]
        unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
            each(|i| vmulq_f32(a[i], b[i]))
        }
        #[inline(always)]
        unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
            each(|i| vdivq_f32(a[i], b[i]))
        }
        #[inline(always)]
        unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
            each(|i| vfmaq_f32(c[i], a[i], b[i]))
        }
        #[inline(always)]
        unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
            each(|i| vminq_f32(a[i], b[i]))
        }
        #[inline(always)]
        unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
            each(|i| vmaxq_f32(a[i], b[i]))
        }
        #[inline(always)]
        unsafe fn round(a: Self::V) -> Self::V {
            each(|i| vrndnq_f32(a[i]))
        }
        #[inline(always)]
        unsafe fn exp2(n: Self::V) -> Self::V {
            each(|i| {
                let n = vaddq_s32(vcvtq_s32_f32(n[i]), vdupq_n_s32(127));
                vreinterpretq_f32_s32(vshlq_n_s32::<23>(n))
            })
        }
        #[inline(always)]
        unsafe fn sum(a: Self::V) -> f32 {
            vaddvq_f32(vaddq_f32(vaddq_f32(a[0], a[1]), vaddq_f32(a[2], a[3])))
        }
        #[inline(always)]
        unsafe fn largest(a: Self::V) -> f32 {
            vmaxvq_f32(vmaxq_f32(vmaxq_f32(a[0], a[1]), vmaxq_f32(a[2], a[3])))
        }
        #[inline(always)]
        unsafe fn fetch(_: *const f32) {}
    }
}
