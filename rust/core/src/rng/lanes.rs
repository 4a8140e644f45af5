//! Registers of many lanes, one implementation per instruction set: what the noise is computed in.
//!
//! The intrinsics are written out because the compiler, left to vectorise plain loops, was found to gather and scatter
//! instead. Every operation is exact or correctly rounded, so all implementations give the same bits.
#![allow(unsafe_code)]
#![allow(clippy::needless_range_loop, clippy::float_cmp)] // lanes are numbered; moved means not the same number

/// An instruction set. A value of it is the proof that the processor has it.
pub trait Lanes: Copy {
    /// Candidates computed at once, the lanes of `I` and `F`.
    const LANES: usize;
    /// Half as many 64-bit lanes, of which the lower 32 bits count: even or odd candidates.
    type W: Copy;
    /// 32-bit words.
    type I: Copy;
    /// float32 numbers.
    type F: Copy;
    /// Four numbers of each candidate, next to each other.
    type Rows: AsRef<[[f32; 4]]>;

    fn wide(self, x: u32) -> Self::W;
    /// `first`, `first + 1`, ...: the even ones and the odd ones.
    fn counters(self, first: u32) -> [Self::W; 2];
    /// The 64-bit product of the lower halves.
    fn multiply(self, a: Self::W, b: Self::W) -> Self::W;
    fn upper(self, a: Self::W) -> Self::W;
    fn xor(self, a: Self::W, b: Self::W) -> Self::W;
    fn xor3(self, a: Self::W, b: Self::W, c: Self::W) -> Self::W;
    /// The lower halves of both, in the order of the candidates.
    fn join(self, even: Self::W, odd: Self::W) -> Self::I;

    fn int(self, x: u32) -> Self::I;
    fn add(self, a: Self::I, b: Self::I) -> Self::I;
    fn and(self, a: Self::I, b: Self::I) -> Self::I;
    fn shift_left_2(self, a: Self::I) -> Self::I;
    fn shift_right_8(self, a: Self::I) -> Self::I;
    /// Of signed numbers.
    fn shift_right_23(self, a: Self::I) -> Self::I;
    /// Signed numbers that float32 can hold.
    fn to_float(self, a: Self::I) -> Self::F;
    fn bits(self, a: Self::F) -> Self::I;
    fn as_float(self, a: Self::I) -> Self::F;

    fn float(self, x: f32) -> Self::F;
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    fn times(self, a: Self::F, b: Self::F) -> Self::F;
    fn sqrt(self, a: Self::F) -> Self::F;
    /// `b` where bit 30 of `t` is set, else `a`.
    fn pick(self, t: Self::I, a: Self::F, b: Self::F) -> Self::F;
    /// `x` with its sign turned where bit 31 of `t` is set.
    fn flip(self, x: Self::F, t: Self::I) -> Self::F;
    /// `x` within bounds; counts the lanes that this moved.
    fn clamp(self, x: Self::F, low: Self::F, high: Self::F, moved: &mut Self::I) -> Self::F;
    /// The sum of the first `lanes` lanes.
    fn sum(self, a: Self::I, lanes: usize) -> usize;
    fn rows(self, x: [Self::F; 4]) -> Self::Rows;
    /// Writes them to the columns `at .. at + 4` of `LANES` rows of this width.
    #[inline(always)]
    fn store(self, x: [Self::F; 4], rows: &mut [f32], width: usize, at: usize) {
        for (row, four) in rows.chunks_exact_mut(width).zip(self.rows(x).as_ref()) {
            row[at..at + 4].copy_from_slice(four);
        }
    }
    /// The same for the columns `at .. at + 8`.
    #[inline(always)]
    fn store_two(self, x: [[Self::F; 4]; 2], rows: &mut [f32], width: usize, at: usize) {
        self.store(x[0], rows, width, at);
        self.store(x[1], rows, width, at + 4);
    }
}

/// Lanes as arrays, for any processor. NEON has all of these operations, and the compiler finds them.
#[derive(Clone, Copy)]
pub struct Portable;

const N: usize = 8;

#[inline(always)]
fn each<A: Copy, B: Copy, C: Copy + Default, const M: usize>(a: [A; M], b: [B; M], f: impl Fn(A, B) -> C) -> [C; M] {
    let mut out = [C::default(); M];
    for i in 0..M {
        out[i] = f(a[i], b[i]);
    }
    out
}

impl Lanes for Portable {
    const LANES: usize = N;
    type W = [u64; N / 2];
    type I = [u32; N];
    type F = [f32; N];
    type Rows = [[f32; 4]; N];

    #[inline(always)]
    fn wide(self, x: u32) -> Self::W {
        [u64::from(x); N / 2]
    }
    #[inline(always)]
    fn counters(self, first: u32) -> [Self::W; 2] {
        let mut pair = [self.wide(first); 2];
        for i in 0..N {
            pair[i % 2][i / 2] += i as u64;
        }
        pair
    }
    #[inline(always)]
    fn multiply(self, a: Self::W, b: Self::W) -> Self::W {
        each(a, b, |a, b| (a & 0xFFFF_FFFF) * (b & 0xFFFF_FFFF))
    }
    #[inline(always)]
    fn upper(self, a: Self::W) -> Self::W {
        each(a, a, |a, _| a >> 32)
    }
    #[inline(always)]
    fn xor(self, a: Self::W, b: Self::W) -> Self::W {
        each(a, b, |a, b| a ^ b)
    }
    #[inline(always)]
    fn xor3(self, a: Self::W, b: Self::W, c: Self::W) -> Self::W {
        self.xor(self.xor(a, b), c)
    }
    #[inline(always)]
    fn join(self, even: Self::W, odd: Self::W) -> Self::I {
        let mut out = [0; N];
        for i in 0..N / 2 {
            (out[2 * i], out[2 * i + 1]) = (even[i] as u32, odd[i] as u32);
        }
        out
    }
    #[inline(always)]
    fn int(self, x: u32) -> Self::I {
        [x; N]
    }
    #[inline(always)]
    fn add(self, a: Self::I, b: Self::I) -> Self::I {
        each(a, b, u32::wrapping_add)
    }
    #[inline(always)]
    fn and(self, a: Self::I, b: Self::I) -> Self::I {
        each(a, b, |a, b| a & b)
    }
    #[inline(always)]
    fn shift_left_2(self, a: Self::I) -> Self::I {
        each(a, a, |a, _| a << 2)
    }
    #[inline(always)]
    fn shift_right_8(self, a: Self::I) -> Self::I {
        each(a, a, |a, _| a >> 8)
    }
    #[inline(always)]
    fn shift_right_23(self, a: Self::I) -> Self::I {
        each(a, a, |a, _| (a.cast_signed() >> 23).cast_unsigned())
    }
    #[inline(always)]
    fn to_float(self, a: Self::I) -> Self::F {
        each(a, a, |a, _| a.cast_signed() as f32)
    }
    #[inline(always)]
    fn bits(self, a: Self::F) -> Self::I {
        each(a, a, |a, _| a.to_bits())
    }
    #[inline(always)]
    fn as_float(self, a: Self::I) -> Self::F {
        each(a, a, |a, _| f32::from_bits(a))
    }
    #[inline(always)]
    fn float(self, x: f32) -> Self::F {
        [x; N]
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        each(each(a, b, |a, b| (a, b)), c, |(a, b), c| a.mul_add(b, c))
    }
    #[inline(always)]
    fn times(self, a: Self::F, b: Self::F) -> Self::F {
        each(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn sqrt(self, a: Self::F) -> Self::F {
        each(a, a, |a, _| a.sqrt())
    }
    #[inline(always)]
    fn pick(self, t: Self::I, a: Self::F, b: Self::F) -> Self::F {
        each(t, each(a, b, |a, b| (a, b)), |t, (a, b)| if t & 1 << 30 == 0 { a } else { b })
    }
    #[inline(always)]
    fn flip(self, x: Self::F, t: Self::I) -> Self::F {
        each(x, t, |x, t| f32::from_bits(x.to_bits() ^ (t & 1 << 31)))
    }
    #[inline(always)]
    fn clamp(self, x: Self::F, low: Self::F, high: Self::F, moved: &mut Self::I) -> Self::F {
        let above = each(x, low, |x, low| if x > low { x } else { low });
        let within = each(above, high, |x, high| if x < high { x } else { high });
        *moved = each(*moved, each(x, within, |x, y| u32::from(x != y)), |sum, one| sum + one);
        within
    }
    #[inline(always)]
    fn sum(self, a: Self::I, lanes: usize) -> usize {
        a[..lanes].iter().map(|&n| n as usize).sum()
    }
    #[inline(always)]
    fn rows(self, [a, b, c, d]: [Self::F; 4]) -> Self::Rows {
        let mut out = [[0.0; 4]; N];
        for i in 0..N {
            out[i] = [a[i], b[i], c[i], d[i]];
        }
        out
    }
}

#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
#[allow(clippy::wildcard_imports)]
mod x86 {
    use super::Lanes;
    use std::arch::x86_64::*;

    /// The processor has AVX2 and FMA.
    #[derive(Clone, Copy)]
    pub struct Avx2(());

    /// The processor has AVX-512 F.
    #[derive(Clone, Copy)]
    pub struct Avx512(());

    impl Avx2 {
        pub fn new() -> Option<Self> {
            (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")).then_some(Self(()))
        }
    }

    impl Avx512 {
        pub fn new() -> Option<Self> {
            (Avx2::new().is_some() && is_x86_feature_detected!("avx512f")).then_some(Self(()))
        }
    }

    macro_rules! operations {
        ($($name:ident($self:ident $(, $argument:ident: $type:ty)*) -> $result:ty { $body:expr })*) => {$(
            #[inline(always)]
            #[allow(unused_unsafe)] // some are made of others
            fn $name($self $(, $argument: $type)*) -> $result {
                // SAFETY: `self` exists only where the processor has the instructions; memory is read and
                // written within arrays of that size, and within slices after a check of their length.
                unsafe { $body }
            }
        )*};
    }

    impl Lanes for Avx512 {
        const LANES: usize = 16;
        type W = __m512i;
        type I = __m512i;
        type F = __m512;
        type Rows = [[f32; 4]; 16];

        operations! {
            wide(self, x: u32) -> __m512i { _mm512_set1_epi64(i64::from(x)) }
            counters(self, first: u32) -> [__m512i; 2] {{
                let even = _mm512_add_epi64(self.wide(first), _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14));
                [even, _mm512_add_epi64(even, _mm512_set1_epi64(1))]
            }}
            multiply(self, a: __m512i, b: __m512i) -> __m512i { _mm512_mul_epu32(a, b) }
            upper(self, a: __m512i) -> __m512i { _mm512_srli_epi64::<32>(a) }
            xor(self, a: __m512i, b: __m512i) -> __m512i { _mm512_xor_si512(a, b) }
            xor3(self, a: __m512i, b: __m512i, c: __m512i) -> __m512i { _mm512_ternarylogic_epi64::<0x96>(a, b, c) }
            join(self, even: __m512i, odd: __m512i) -> __m512i { _mm512_mask_shuffle_epi32::<0xA0>(even, 0xAAAA, odd) }
            int(self, x: u32) -> __m512i { _mm512_set1_epi32(x.cast_signed()) }
            add(self, a: __m512i, b: __m512i) -> __m512i { _mm512_add_epi32(a, b) }
            and(self, a: __m512i, b: __m512i) -> __m512i { _mm512_and_si512(a, b) }
            shift_left_2(self, a: __m512i) -> __m512i { _mm512_slli_epi32::<2>(a) }
            shift_right_8(self, a: __m512i) -> __m512i { _mm512_srli_epi32::<8>(a) }
            shift_right_23(self, a: __m512i) -> __m512i { _mm512_srai_epi32::<23>(a) }
            to_float(self, a: __m512i) -> __m512 { _mm512_cvtepi32_ps(a) }
            bits(self, a: __m512) -> __m512i { _mm512_castps_si512(a) }
            as_float(self, a: __m512i) -> __m512 { _mm512_castsi512_ps(a) }
            float(self, x: f32) -> __m512 { _mm512_set1_ps(x) }
            fma(self, a: __m512, b: __m512, c: __m512) -> __m512 { _mm512_fmadd_ps(a, b, c) }
            times(self, a: __m512, b: __m512) -> __m512 { _mm512_mul_ps(a, b) }
            sqrt(self, a: __m512) -> __m512 { _mm512_sqrt_ps(a) }
            pick(self, t: __m512i, a: __m512, b: __m512) -> __m512 {
                _mm512_mask_blend_ps(_mm512_test_epi32_mask(t, self.int(1 << 30)), a, b)
            }
            flip(self, x: __m512, t: __m512i) -> __m512 {
                // x ^ (t & sign)
                self.as_float(_mm512_ternarylogic_epi32::<0x78>(self.bits(x), t, self.int(1 << 31)))
            }
            clamp(self, x: __m512, low: __m512, high: __m512, moved: &mut __m512i) -> __m512 {{
                let within = _mm512_min_ps(_mm512_max_ps(x, low), high);
                let mask = _mm512_cmp_ps_mask::<_CMP_NEQ_OQ>(x, within);
                *moved = _mm512_mask_sub_epi32(*moved, mask, *moved, _mm512_set1_epi32(-1));
                within
            }}
            sum(self, a: __m512i, lanes: usize) -> usize {{
                let mut all = [0_u32; 16];
                _mm512_storeu_si512(all.as_mut_ptr().cast(), a);
                all[..lanes].iter().map(|&n| n as usize).sum()
            }}
            rows(self, x: [__m512; 4]) -> [[f32; 4]; 16] {{
                let mut out = [[0.0; 4]; 16];
                self.store(x, out.as_flattened_mut(), 4, 0);
                out
            }}
            store(self, x: [__m512; 4], rows: &mut [f32], width: usize, at: usize) -> () {{
                assert!(at + 4 <= width && rows.len() == 16 * width);
                let quads = transpose(x);
                let first = rows.as_mut_ptr().add(at);
                for i in 0..4 {
                    let quad = _mm512_castpd_ps(quads[i]); // rows i, i + 4, i + 8, i + 12
                    _mm_storeu_ps(first.add(i * width), _mm512_castps512_ps128(quad));
                    _mm_storeu_ps(first.add((i + 4) * width), _mm512_extractf32x4_ps::<1>(quad));
                    _mm_storeu_ps(first.add((i + 8) * width), _mm512_extractf32x4_ps::<2>(quad));
                    _mm_storeu_ps(first.add((i + 12) * width), _mm512_extractf32x4_ps::<3>(quad));
                }
            }}
            store_two(self, x: [[__m512; 4]; 2], rows: &mut [f32], width: usize, at: usize) -> () {{
                assert!(at + 8 <= width && rows.len() == 16 * width);
                let (a, b) = (transpose(x[0]), transpose(x[1]));
                let (lower, upper) =
                    (_mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15));
                let first = rows.as_mut_ptr().add(at);
                for i in 0..4 {
                    let two = _mm512_permutex2var_pd(a[i], lower, b[i]); // rows i and i + 4
                    let more = _mm512_permutex2var_pd(a[i], upper, b[i]); // rows i + 8 and i + 12
                    _mm256_storeu_ps(first.add(i * width), half::<0>(two));
                    _mm256_storeu_ps(first.add((i + 4) * width), half::<1>(two));
                    _mm256_storeu_ps(first.add((i + 8) * width), half::<0>(more));
                    _mm256_storeu_ps(first.add((i + 12) * width), half::<1>(more));
                }
            }}
        }
    }

    #[inline(always)]
    unsafe fn half<const I: i32>(x: __m512d) -> __m256 {
        _mm256_castpd_ps(_mm512_extractf64x4_pd::<I>(x))
    }

    /// Four numbers of sixteen rows: of the rows i, i + 4, i + 8 and i + 12, for i from 0 to 3.
    #[inline(always)]
    unsafe fn transpose([a, b, c, d]: [__m512; 4]) -> [__m512d; 4] {
        let (ab, cd) = (_mm512_castps_pd(_mm512_unpacklo_ps(a, b)), _mm512_castps_pd(_mm512_unpacklo_ps(c, d)));
        let (ef, gh) = (_mm512_castps_pd(_mm512_unpackhi_ps(a, b)), _mm512_castps_pd(_mm512_unpackhi_ps(c, d)));
        [_mm512_unpacklo_pd(ab, cd), _mm512_unpackhi_pd(ab, cd), _mm512_unpacklo_pd(ef, gh), _mm512_unpackhi_pd(ef, gh)]
    }

    impl Lanes for Avx2 {
        const LANES: usize = 8;
        type W = __m256i;
        type I = __m256i;
        type F = __m256;
        type Rows = [[f32; 4]; 8];

        operations! {
            wide(self, x: u32) -> __m256i { _mm256_set1_epi64x(i64::from(x)) }
            counters(self, first: u32) -> [__m256i; 2] {{
                let even = _mm256_add_epi64(self.wide(first), _mm256_setr_epi64x(0, 2, 4, 6));
                [even, _mm256_add_epi64(even, _mm256_set1_epi64x(1))]
            }}
            multiply(self, a: __m256i, b: __m256i) -> __m256i { _mm256_mul_epu32(a, b) }
            upper(self, a: __m256i) -> __m256i { _mm256_srli_epi64::<32>(a) }
            xor(self, a: __m256i, b: __m256i) -> __m256i { _mm256_xor_si256(a, b) }
            xor3(self, a: __m256i, b: __m256i, c: __m256i) -> __m256i { _mm256_xor_si256(_mm256_xor_si256(a, b), c) }
            join(self, even: __m256i, odd: __m256i) -> __m256i {
                _mm256_blend_epi32::<0xAA>(even, _mm256_slli_epi64::<32>(odd))
            }
            int(self, x: u32) -> __m256i { _mm256_set1_epi32(x.cast_signed()) }
            add(self, a: __m256i, b: __m256i) -> __m256i { _mm256_add_epi32(a, b) }
            and(self, a: __m256i, b: __m256i) -> __m256i { _mm256_and_si256(a, b) }
            shift_left_2(self, a: __m256i) -> __m256i { _mm256_slli_epi32::<2>(a) }
            shift_right_8(self, a: __m256i) -> __m256i { _mm256_srli_epi32::<8>(a) }
            shift_right_23(self, a: __m256i) -> __m256i { _mm256_srai_epi32::<23>(a) }
            to_float(self, a: __m256i) -> __m256 { _mm256_cvtepi32_ps(a) }
            bits(self, a: __m256) -> __m256i { _mm256_castps_si256(a) }
            as_float(self, a: __m256i) -> __m256 { _mm256_castsi256_ps(a) }
            float(self, x: f32) -> __m256 { _mm256_set1_ps(x) }
            fma(self, a: __m256, b: __m256, c: __m256) -> __m256 { _mm256_fmadd_ps(a, b, c) }
            times(self, a: __m256, b: __m256) -> __m256 { _mm256_mul_ps(a, b) }
            sqrt(self, a: __m256) -> __m256 { _mm256_sqrt_ps(a) }
            pick(self, t: __m256i, a: __m256, b: __m256) -> __m256 {
                // The blend looks at bit 31.
                _mm256_blendv_ps(a, b, _mm256_castsi256_ps(_mm256_slli_epi32::<1>(t)))
            }
            flip(self, x: __m256, t: __m256i) -> __m256 {
                _mm256_xor_ps(x, self.as_float(self.and(t, self.int(1 << 31))))
            }
            clamp(self, x: __m256, low: __m256, high: __m256, moved: &mut __m256i) -> __m256 {{
                let within = _mm256_min_ps(_mm256_max_ps(x, low), high);
                let mask = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_NEQ_OQ>(x, within));
                *moved = _mm256_sub_epi32(*moved, mask);
                within
            }}
            sum(self, a: __m256i, lanes: usize) -> usize {{
                let mut all = [0_u32; 8];
                _mm256_storeu_si256(all.as_mut_ptr().cast(), a);
                all[..lanes].iter().map(|&n| n as usize).sum()
            }}
            rows(self, x: [__m256; 4]) -> [[f32; 4]; 8] {{
                let mut out = [[0.0; 4]; 8];
                self.store(x, out.as_flattened_mut(), 4, 0);
                out
            }}
            store(self, x: [__m256; 4], rows: &mut [f32], width: usize, at: usize) -> () {{
                assert!(at + 4 <= width && rows.len() == 8 * width);
                let [a, b, c, d] = x;
                let (ab, cd) = (_mm256_castps_pd(_mm256_unpacklo_ps(a, b)), _mm256_castps_pd(_mm256_unpacklo_ps(c, d)));
                let (ef, gh) = (_mm256_castps_pd(_mm256_unpackhi_ps(a, b)), _mm256_castps_pd(_mm256_unpackhi_ps(c, d)));
                let quads = [
                    _mm256_unpacklo_pd(ab, cd),
                    _mm256_unpackhi_pd(ab, cd),
                    _mm256_unpacklo_pd(ef, gh),
                    _mm256_unpackhi_pd(ef, gh),
                ];
                let first = rows.as_mut_ptr().add(at);
                for i in 0..4 {
                    let quad = _mm256_castpd_ps(quads[i]); // rows i and i + 4
                    _mm_storeu_ps(first.add(i * width), _mm256_castps256_ps128(quad));
                    _mm_storeu_ps(first.add((i + 4) * width), _mm256_extractf128_ps::<1>(quad));
                }
            }}
        }
    }
}
