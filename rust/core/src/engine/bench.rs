//! One thread of the engine's matrix products, for benchmarks that compare them with other libraries. Not an API.

use std::hint::black_box;
use std::time::Instant;

use super::gemm::End;
use super::kernels::{self, Kernels};
use super::layout::{lines, Buffer, LANES};
use super::predictor::{run, write_row};
use super::weights::{Groups, Linear, Packed};
use super::{Error, Precision};

/// One product `a (M, K) x w (K, N)`, packed as the predictor packs its own, with the best instructions of this processor.
pub struct Matmul {
    kernels: &'static Kernels,
    rows: usize,
    outputs: usize,
    a: Buffer,
    w: Packed,
    c: Buffer,
    hidden: Buffer,
}

impl Matmul {
    /// `a` (rows, inputs) and `w` (outputs, inputs), row-major.
    ///
    /// # Errors
    /// [`Error::Argument`]: lengths that do not fit; a precision that this processor does not have.
    pub fn new(precision: Precision, rows: usize, a: &[f32], w: &[f32]) -> Result<Self, Error> {
        let kernels = best(precision)?;
        let inputs = a.len() / rows.max(1);
        if rows == 0 || inputs == 0 || a.len() != rows * inputs || !w.len().is_multiple_of(inputs) {
            return Err(Error::Argument(format!("a has {} numbers and w {} for {rows} rows", a.len(), w.len())));
        }
        let (outputs, tiles) = (w.len() / inputs, rows.div_ceil(kernels.tile));
        let buffer = |width: usize, words: usize| Buffer::new(tiles, kernels.tile, lines(width) / words);
        let (mut floats, mut operand) = (buffer(inputs, 1), buffer(inputs, kernels.group));
        // SAFETY: both buffers have `rows` rows of `inputs` numbers, and the processor has the kernels.
        unsafe {
            for (row, values) in a.chunks_exact(inputs).enumerate() {
                write_row(floats.rows(), row, values);
            }
            (kernels.convert)(floats.rows(), operand.rows(), rows, lines(inputs));
        }
        let weight = w.iter().map(|&x| f64::from(x)).collect();
        let linear = Linear { weight, bias: vec![0.0; outputs], inputs };
        let w = Packed::new(&linear, Groups::one(inputs), Groups::one(outputs), kernels.group);
        let (c, hidden) = (buffer(outputs, 1), buffer(outputs, kernels.group));
        Ok(Self { kernels, rows, outputs, a: operand, w, c, hidden })
    }

    /// Seconds of `repeats` products; with `gelu` they end in GELU and an operand for the next product.
    pub fn run(&mut self, gelu: bool, repeats: usize) -> f64 {
        let (a, tiles) = (self.a.rows(), self.rows.div_ceil(self.kernels.tile));
        let (c, hidden) = (self.c.rows(), self.hidden.rows());
        let start = Instant::now();
        for _ in 0..repeats {
            let end = if gelu { End::Gelu(hidden) } else { End::Store(c) };
            // SAFETY: the buffers and weights were made for these kernels, rows and widths.
            unsafe { run(self.kernels, black_box(a), tiles, &self.w, end) };
        }
        start.elapsed().as_secs_f64()
    }

    /// The product (rows, outputs) of the last run without GELU.
    pub fn result(&mut self) -> Vec<f32> {
        let c = self.c.rows();
        let at = |row: usize, n: usize| unsafe {
            // SAFETY: `c` has `rows` rows of `outputs` numbers.
            (*c.at(row, n / LANES)).0[n % LANES]
        };
        (0..self.rows).flat_map(|row| (0..self.outputs).map(move |n| at(row, n))).collect()
    }
}

/// Floating-point operations per second of one thread that multiplies and adds registers: the best of five.
///
/// # Errors
/// [`Error::Argument`]: a precision that this processor does not have.
pub fn peak(precision: Precision) -> Result<f64, Error> {
    const ROUNDS: usize = 200_000;
    let k = best(precision)?;
    let rate = || {
        let start = Instant::now();
        // SAFETY: the processor has these kernels.
        black_box(unsafe { (k.peak)(black_box(ROUNDS), black_box(1e-9)) });
        (ROUNDS * k.flops) as f64 / start.elapsed().as_secs_f64()
    };
    Ok((0..5).map(|_| rate()).fold(0.0, f64::max))
}

fn best(precision: Precision) -> Result<&'static Kernels, Error> {
    let fitting = kernels::ALL.iter().find(|k| k.precision == precision && (k.here)());
    fitting.copied().ok_or_else(|| Error::Argument(format!("this processor has no {}", precision.name())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_timed_is_the_product() {
        let (rows, inputs, outputs) = (7, 40, 35);
        let value = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 50.0;
        let a: Vec<_> = (0..rows * inputs).map(value).collect();
        let w: Vec<_> = (0..outputs * inputs).map(|i| value(i + 13)).collect();
        for (precision, tolerance) in [(Precision::Float32, 1e-4), (Precision::Bfloat16, 0.2)] {
            let Ok(mut product) = Matmul::new(precision, rows, &a, &w) else { continue };
            assert!(product.run(true, 1) > 0.0);
            assert!(product.run(false, 1) > 0.0);
            for (i, got) in product.result().into_iter().enumerate() {
                let (row, n) = (i / outputs, i % outputs);
                let pairs = a[row * inputs..].iter().zip(&w[n * inputs..]).take(inputs);
                let want: f32 = pairs.map(|(a, w)| a * w).sum();
                assert!((got - want).abs() < tolerance, "{precision:?} {row} {n}: {got} {want}");
            }
        }
        assert!(Matmul::new(Precision::Float32, 7, &a[1..], &w).is_err());
    }
}
