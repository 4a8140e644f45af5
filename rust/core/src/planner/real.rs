//! The two number types that candidates may have.

use std::fmt::Debug;

use crate::rng::{self, Affine, Key, Out};

/// float32 or float64: what a cost is handed.
pub trait Real: Debug + PartialOrd + Into<f64> + Out + Send + Sync + private::Draw {
    /// As `NumPy` names it.
    const NAME: &'static str;

    /// The nearest number to `x`.
    fn nearest(x: f64) -> Self;

    /// The smallest number that is not below `x`, so that bounds are rounded inwards; infinite past the largest one.
    fn at_least(x: f64) -> Self;

    /// `self * b + c`, rounded once.
    #[must_use]
    fn fma(self, b: Self, c: Self) -> Self;

    /// The largest number that is not above `x`.
    fn at_most(x: f64) -> Self;
}

mod private {
    use super::{Affine, Key};

    /// Candidates from noise.
    pub trait Draw: Sized {
        /// Draws the samples `first ..` of one environment, puts them within bounds, and counts the values that this moved.
        fn draw(key: Key, first: usize, affine: Affine<'_, Self>, out: &mut [Self]) -> usize;
    }
}
pub(super) use private::Draw;

impl Real for f32 {
    const NAME: &'static str = "float32";

    fn nearest(x: f64) -> Self {
        x as f32
    }

    fn at_least(x: f64) -> Self {
        let near = x as f32;
        if f64::from(near) < x {
            near.next_up()
        } else {
            near
        }
    }

    fn at_most(x: f64) -> Self {
        -Self::at_least(-x)
    }

    #[inline(always)]
    fn fma(self, b: Self, c: Self) -> Self {
        self.mul_add(b, c)
    }
}

impl Draw for f32 {
    fn draw(key: Key, first: usize, affine: Affine<'_, f32>, out: &mut [f32]) -> usize {
        rng::draw(key, first, affine.mean.len(), Some(affine), out)
    }
}

impl Real for f64 {
    const NAME: &'static str = "float64";

    fn nearest(x: f64) -> Self {
        x
    }

    fn at_least(x: f64) -> Self {
        x
    }

    fn at_most(x: f64) -> Self {
        x
    }

    #[inline(always)]
    fn fma(self, b: Self, c: Self) -> Self {
        self.mul_add(b, c)
    }
}

impl Draw for f64 {
    fn draw(key: Key, first: usize, affine: Affine<'_, f64>, out: &mut [f64]) -> usize {
        rng::draw(key, first, affine.mean.len(), None, out);
        place(affine, out)
    }
}

/// Turns noise into candidates, in place; counts the values that the bounds moved.
#[inline(always)]
pub(super) fn place<T: Real>(Affine { mean, std, low, high }: Affine<'_, T>, rows: &mut [T]) -> usize {
    let mut moved = 0;
    for row in rows.chunks_exact_mut(mean.len()) {
        let bounds = low.iter().zip(high);
        let mut count = 0_u32;
        for (((x, &mean), &std), (&low, &high)) in row.iter_mut().zip(mean).zip(std).zip(bounds) {
            let free = std.fma(*x, mean);
            *x = clamp(free, low, high);
            count += u32::from(free < low || free > high);
        }
        moved += count as usize;
    }
    moved
}

#[inline(always)]
pub(super) fn clamp<T: Real>(x: T, low: T, high: T) -> T {
    let above = if x > low { x } else { low };
    if above < high {
        above
    } else {
        high
    }
}

/// Runs `f`, compiled for the widest registers that the processor has. The results are the same: Rust fuses and reorders
/// nothing by itself.
#[inline(always)]
pub(super) fn vectorised<R>(f: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code)]
    {
        #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")]
        fn avx512<R>(f: impl FnOnce() -> R) -> R {
            f()
        }
        #[target_feature(enable = "avx2,fma")]
        fn avx2<R>(f: impl FnOnce() -> R) -> R {
            f()
        }
        use std::arch::is_x86_feature_detected as has;
        if has!("avx2") && has!("fma") {
            let wide = has!("avx512f") && has!("avx512vl") && has!("avx512dq") && has!("avx512bw");
            // SAFETY: the processor has the instructions, as was just asked.
            return unsafe {
                if wide {
                    avx512(f)
                } else {
                    avx2(f)
                }
            };
        }
    }
    f()
}
