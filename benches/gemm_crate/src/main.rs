//! The engine's matrix products against those of crates, at the predictor's shapes, on one core, in float32.
//!
//!     cargo run --release --locked --manifest-path benches/gemm_crate/Cargo.toml
//!
//! Crates get row-major `a (M, K)` and `w (K, N)`, as a program has them that packs nothing itself: they pack at every call.
//! The engine packs its weights once per model, and its rows while it computes them. One JSON row per shape.

use std::time::Instant;

use lewm_core::engine::bench::{peak, Matmul};
use lewm_core::engine::Precision;

/// Times each is measured, in turn, and seconds of one measurement.
const ROUNDS: usize = 7;
const SECONDS: f64 = 0.02;

fn seconds(mut run: impl FnMut(), repeats: usize) -> f64 {
    let start = Instant::now();
    (0..repeats).for_each(|_| run());
    start.elapsed().as_secs_f64() / repeats as f64
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn main() -> Result<(), lewm_core::Error> {
    let shapes = [(192, 3072), (1024, 192), (192, 2048), (2048, 192)];
    for (rows, (inputs, outputs)) in [300, 900].into_iter().flat_map(|rows| shapes.map(|shape| (rows, shape))) {
        // Numbers in -1..1 without a pattern that a product could profit from.
        let mut state = 1_u32;
        let mut number = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        let a: Vec<f32> = (0..rows * inputs).map(|_| number()).collect();
        let w: Vec<f32> = (0..inputs * outputs).map(|_| number()).collect();
        let turned: Vec<f32> = (0..inputs * outputs).map(|i| w[i % inputs * outputs + i / inputs]).collect();
        let (mut by_gemm, mut by_multiply) = (vec![0.0_f32; rows * outputs], vec![0.0_f32; rows * outputs]);
        let mut ours = Matmul::new(Precision::Float32, rows, &a, &turned)?;

        let (m, k, n) = (rows, inputs, outputs);
        let mut gemm = || {
            let (row, one) = (n as isize, 1);
            // SAFETY: the slices have these shapes.
            unsafe {
                gemm::gemm(
                    m,
                    n,
                    k,
                    by_gemm.as_mut_ptr(),
                    one,
                    row,
                    false,
                    a.as_ptr(),
                    one,
                    k as isize,
                    w.as_ptr(),
                    one,
                    row,
                    0.0_f32,
                    1.0_f32,
                    false,
                    false,
                    false,
                    gemm::Parallelism::None,
                );
            }
        };
        let mut multiply = || {
            let (row, one) = (n as isize, 1);
            // SAFETY: the slices have these shapes.
            unsafe {
                matrixmultiply::sgemm(
                    m,
                    k,
                    n,
                    1.0,
                    a.as_ptr(),
                    k as isize,
                    one,
                    w.as_ptr(),
                    row,
                    one,
                    0.0,
                    by_multiply.as_mut_ptr(),
                    row,
                    one,
                );
            }
        };
        gemm();
        multiply();
        let flop = 2.0 * (rows * inputs * outputs) as f64;
        let once = ours.run(false, 10) / 10.0;
        let repeats = (SECONDS / once).ceil() as usize;
        let mut times: [Vec<f64>; 4] = Default::default();
        let mut best = 0.0_f64;
        for _ in 0..ROUNDS {
            best = best.max(peak(Precision::Float32)?);
            times[0].push(ours.run(false, repeats) / repeats as f64);
            times[1].push(ours.run(true, repeats) / repeats as f64);
            times[2].push(seconds(&mut gemm, repeats));
            times[3].push(seconds(&mut multiply, repeats));
        }
        ours.run(false, 1);
        let result = ours.result();
        for other in [&by_gemm, &by_multiply] {
            assert!(largest_difference(&result, other) < 1e-3, "another product");
        }
        let [ours, gelu, gemm, multiply] = times.map(|t| flop / median(t) / best);
        println!(
            "{{\"name\": \"gemm float32, one core\", \"rows\": {rows}, \"inputs\": {inputs}, \"outputs\": {outputs}, \
             \"peak_gflop_per_s\": {:.1}, \"ours\": {ours:.3}, \"ours_with_gelu\": {gelu:.3}, \"gemm\": {gemm:.3}, \
             \"matrixmultiply\": {multiply:.3}}}",
            best / 1e9
        );
    }
    Ok(())
}
