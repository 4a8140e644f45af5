//! Products of bytes against whole numbers, and what is rounded to bytes against what it was.

#![allow(clippy::cast_possible_wrap, clippy::cast_sign_loss)] // small rows, rounded bytes
#![allow(clippy::float_cmp)] // exact is what it says

use super::super::gemm::{End, Gate, Start};
use super::super::kernels::{Kernels, Precision, ALL};
use super::super::layout::{lines, padded, Buffer, Line, Rows, LANES};
use super::super::predictor::{product, run, Mlp};
use super::super::rows::Modulate;
use super::super::simd::{gelu_exact, Portable, Simd};
use super::super::weights::{Groups, Linear, Packed, LOWEST, ZERO};
use crate::rng;

fn kernels() -> impl Iterator<Item = &'static Kernels> {
    ALL.iter().copied().filter(|k| k.precision == Precision::Int8 && (k.here)())
}

fn noise(seed: u64, count: usize) -> Vec<f32> {
    rng::noise(seed, 0, 0, &[0], 1, count).unwrap()
}

fn linear(seed: u64, inputs: usize, outputs: usize) -> Linear {
    let rate = (inputs as f64).sqrt().recip();
    let weight = noise(seed, inputs * outputs).into_iter().map(|w| f64::from(w) * rate).collect();
    Linear { weight, bias: noise(seed + 1, outputs).into_iter().map(f64::from).collect(), inputs }
}

/// Whole weights from -127 to 127, which is reached in every column, so that all scales are 1; the last columns extreme.
fn whole(seed: u64, inputs: usize, outputs: usize) -> Linear {
    let mut weight: Vec<f64> =
        noise(seed, inputs * outputs).iter().map(|w| f64::from((w * 40.0).round().clamp(-127.0, 127.0))).collect();
    for (n, row) in weight.chunks_exact_mut(inputs).enumerate() {
        row[n % inputs] = if n % 2 == 0 { 127.0 } else { -127.0 };
        if n + 1 == outputs {
            row.fill(-127.0);
        }
    }
    let bias = noise(seed + 1, outputs).iter().map(|b| f64::from((b * 100.0).round())).collect();
    Linear { weight, bias, inputs }
}

unsafe fn number(x: Rows, row: usize, column: usize) -> f32 {
    (*x.at(row, column / LANES)).0[column % LANES]
}

unsafe fn set(x: Rows, row: usize, column: usize, value: f32) {
    (*x.at(row, column / LANES)).0[column % LANES] = value;
}

/// Byte `column` of an operand's row.
unsafe fn byte(a: Rows, row: usize, column: usize) -> u8 {
    number(a, row, column / 4).to_bits().to_le_bytes()[column % 4]
}

/// Lines of an operand of `width` numbers, its scales included.
fn operand(width: usize) -> usize {
    lines(width).div_ceil(4) + 1
}

/// Random bytes in all columns, padding included, the first rows extreme; row r has scale 2^(r % 3).
unsafe fn random_bytes(a: Rows, rows: usize, units: usize) {
    let numbers = noise(3, rows * units * LANES * 4);
    for (row, numbers) in numbers.chunks_exact(units * LANES * 4).enumerate() {
        for (word, numbers) in numbers.chunks_exact(4).enumerate() {
            let bytes = [0, 1, 2, 3].map(|i| match row {
                0 => 0,
                1 => 255,
                _ => (numbers[i] * 60.0 + 128.0).round().clamp(0.0, 255.0) as u8,
            });
            set(a, row, word, f32::from_bits(u32::from_le_bytes(bytes)));
        }
        (*a.at(row, units)).0 = [2.0_f32.powi(row as i32 % 3); LANES];
    }
}

#[test]
fn a_product_is_exact() {
    for k in kernels() {
        for (inputs, outputs) in [(1, 1), (33, 17), (64, 40), (70, 33), (200, 5), (512, 64)] {
            let w = whole(inputs as u64, inputs, outputs);
            let packed = Packed::new(&w, Groups::one(inputs), Groups::one(outputs), 4);
            for tiles in [1, 2, 3, 5] {
                let rows = tiles * k.tile;
                let buffer = |lines| Buffer::new(tiles, k.tile, lines);
                let (mut a, mut x, mut rest) =
                    (buffer(operand(inputs)), buffer(lines(outputs)), buffer(lines(outputs)));
                let (mut old, mut gates) = (buffer(lines(outputs)), buffer(lines(outputs)));
                let [a, x, rest, old, gates] = [&mut a, &mut x, &mut rest, &mut old, &mut gates].map(Buffer::rows);
                // SAFETY: all have room for what is used of them.
                unsafe {
                    random_bytes(a, rows, packed.units);
                    for row in 0..rows {
                        for n in 0..outputs {
                            set(rest, row, n, (row * 31 + n) as f32 - 50.0);
                            set(old, row, n, 0.3 * n as f32 - row as f32);
                            set(gates, row, n, 0.25 * (row % 5) as f32 - 0.3);
                        }
                    }
                    let want = |row: usize, n: usize, start: f64| {
                        let weights = &w.weight[n * inputs..][..inputs];
                        let factor = |i: usize| i64::from(byte(a, row, i)) - i64::from(ZERO);
                        let sum: i64 = weights.iter().enumerate().map(|(i, &w)| factor(i) * w as i64).sum();
                        (sum as f64 * f64::from(number(a, row, packed.units * LANES)) + start) as f32
                    };
                    let check = |got: &dyn Fn(usize, usize) -> f32, want: &dyn Fn(usize, usize) -> f32| {
                        for row in 0..rows {
                            for n in 0..outputs {
                                let (got, want) = (got(row, n), want(row, n));
                                assert_eq!(got, want, "{inputs} {outputs} {tiles} {row} {n}");
                            }
                        }
                    };
                    let result = |row, n| number(x, row, n);
                    run(k, a, tiles, &packed, End::Store(x));
                    check(&result, &|row, n| want(row, n, w.bias[n]));
                    for row in 0..rows {
                        for n in outputs..padded(outputs) {
                            assert_eq!(number(x, row, n), 0.0, "padding");
                        }
                    }
                    product(k, a, tiles, &packed, Start::Rest(rest), End::Store(x));
                    check(&result, &|row, n| want(row, n, f64::from(number(rest, row, n))));
                    let fill =
                        || (0..rows).for_each(|row| (0..outputs).for_each(|n| set(x, row, n, number(old, row, n))));
                    fill();
                    run(k, a, tiles, &packed, End::Residual(x, None));
                    check(&result, &|row, n| want(row, n, w.bias[n]) + number(old, row, n));
                    fill();
                    run(k, a, tiles, &packed, End::Residual(x, Some(Gate { slots: &raw const gates, tiles })));
                    check(&result, &|row, n| {
                        number(gates, row, n).mul_add(want(row, n, w.bias[n]), number(old, row, n))
                    });
                }
            }
        }
    }
}

#[test]
fn a_gelu_is_rounded_to_bytes_row_by_row() {
    for k in kernels() {
        for (inputs, outputs, tiles) in [(1, 1, 1), (33, 17, 2), (70, 100, 3), (192, 512, 5)] {
            // Rows of very different sizes, one of them far below zero where GELU is 0.
            let mut w = linear(7, inputs, outputs);
            w.bias.fill(-0.5);
            let packed = Packed::new(&w, Groups::one(inputs), Groups::one(outputs), 4);
            let buffer = |lines| Buffer::new(tiles, k.tile, lines);
            let (mut a, mut x, mut c) = (buffer(operand(inputs)), buffer(lines(outputs)), buffer(operand(outputs)));
            let [a, x, c] = [&mut a, &mut x, &mut c].map(Buffer::rows);
            // SAFETY: all have room for what is used of them.
            unsafe {
                random_bytes(a, tiles * k.tile, packed.units);
                for row in 0..tiles * k.tile {
                    (*a.at(row, packed.units)).0 = [0.002 * 3.0_f32.powi(row as i32 % 7); LANES];
                }
                run(k, a, tiles, &packed, End::Store(x));
                run(k, a, tiles, &packed, End::Gelu(c));
                for row in 0..tiles * k.tile {
                    let scale = number(c, row, lines(outputs).div_ceil(4) * LANES);
                    // The padding is gelu(0): a row's range includes 0.
                    let mut most = if padded(outputs) > outputs { 0.0 } else { LOWEST };
                    for n in 0..outputs {
                        let want = gelu_exact::<Portable>(Portable::splat(number(x, row, n)))[0];
                        let got = LOWEST + f32::from(byte(c, row, n)) * scale;
                        assert!((got - want).abs() <= 0.501 * scale + 1e-4, "{row} {n}: {got} {want} {scale}");
                        most = want.max(most);
                    }
                    assert!((scale * 255.0 - (most - LOWEST)).abs() < 1e-4 * most.max(1.0), "{scale} {most}");
                }
            }
        }
    }
}

#[test]
fn modulated_rows_are_rounded_to_bytes_row_by_row() {
    for k in kernels() {
        for width in [2, 20, 33, 192] {
            let tiles = 2;
            let buffer = || Buffer::new(tiles, k.tile, lines(width));
            let (mut x, mut scale, mut shift) = (buffer(), buffer(), buffer());
            let mut out = Buffer::new(tiles, k.tile, operand(width));
            let [x, scale, shift, out] = [&mut x, &mut scale, &mut shift, &mut out].map(Buffer::rows);
            let mut scratch = vec![Line::ZERO; lines(width) * k.tile];
            let numbers = noise(9, 3 * tiles * k.tile * width);
            // SAFETY: all have room for what is used of them.
            unsafe {
                for (at, numbers) in numbers.chunks_exact(3).enumerate() {
                    let (row, n) = (at / width, at % width);
                    let values = match row {
                        0 => [0.0, 0.0, 0.0],                                // nothing
                        1 => [5.0, 1.0, 0.0],                                // constant
                        2 => [numbers[0], 0.0, 7.0],                         // constant behind the first norm
                        3 => [numbers[0], 0.0, f32::from(u8::from(n == 1))], // one outlier
                        4 => [1e4 * numbers[0], 1e3 * numbers[1], -1e3],
                        5 => [1e-6 * numbers[0], 1e-6 * numbers[1], 0.0],
                        _ => [numbers[0], 1.0 + 0.3 * numbers[1], 0.3 * numbers[2]],
                    };
                    for (to, value) in [x, scale, shift].into_iter().zip(values) {
                        set(to, row, n, value);
                    }
                }
                let eps = [1e-6, 1e-5];
                (k.modulate)(&Modulate { x, scale, shift, out, tiles, width, eps }, scratch.as_mut_ptr().cast());
                for row in 0..tiles * k.tile {
                    let norm = |x: Vec<f64>, eps: f32| {
                        let mean = x.iter().sum::<f64>() / width as f64;
                        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64;
                        x.into_iter().map(move |x| (x - mean) / (variance + f64::from(eps)).sqrt())
                    };
                    let of = |x: Rows| (0..width).map(|n| f64::from(number(x, row, n))).collect::<Vec<_>>();
                    let first =
                        norm(of(x), eps[0]).zip(of(scale)).zip(of(shift)).map(|((x, scale), shift)| x * scale + shift);
                    let want: Vec<_> = norm(first.collect(), eps[1]).collect();
                    let step = f64::from(number(out, row, lines(width).div_ceil(4) * LANES));
                    let most = want.iter().fold(0.0_f64, |most, x| most.max(x.abs()));
                    assert!((step * 127.0 - most).abs() <= 2e-3 * most + 1e-4, "{width} {row}: {step} {most}");
                    for (n, want) in want.into_iter().enumerate() {
                        let got = (f64::from(byte(out, row, n)) - f64::from(ZERO)) * step;
                        assert!(
                            (got - want).abs() <= 0.51 * step + 2e-3 * most + 1e-4,
                            "{width} {row} {n}: {got} {want}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn an_mlp_in_bytes_is_near_float32() {
    let exact = ALL.iter().find(|k| k.name == "portable").unwrap();
    for k in kernels() {
        for (width, units) in [(20, 9), (33, 512), (70, 1100)] {
            let (up, down) = (linear(11, width, units), linear(13, units, width));
            let answer = |k: &Kernels, group: usize, operand: &dyn Fn(Rows, Rows)| {
                let tiles = 3;
                let wide = lines(units) + 1;
                let buffers = [lines(width), lines(width) + 1, wide, lines(width), lines(width)];
                let mut buffers = buffers.map(|lines| Buffer::new(tiles, k.tile, lines));
                let [x, a, hidden, y, out] = buffers.each_mut().map(Buffer::rows);
                // SAFETY: all have room for what is used of them.
                unsafe {
                    for (at, &value) in noise(15, tiles * k.tile * width).iter().enumerate() {
                        set(x, at / width, at % width, value);
                    }
                    operand(x, a);
                    Mlp::new(&up, &down, group).run(k, a, tiles, hidden, y, End::Store(out));
                    (0..tiles * k.tile * width).map(|at| number(out, at / width, at % width)).collect::<Vec<_>>()
                }
            };
            let want = answer(exact, 1, &|x, a| unsafe { (exact.convert)(x, a, 18, lines(width)) });
            let got = answer(k, 4, &|x, a| {
                for row in 0..18 {
                    // SAFETY: as above.
                    unsafe {
                        let most = (0..width).fold(0.0_f32, |most, n| most.max(number(x, row, n).abs()));
                        for word in 0..lines(width).div_ceil(4) * LANES {
                            let bytes = [0, 1, 2, 3].map(|i| {
                                let n = word * 4 + i;
                                let value = if n < width { number(x, row, n) } else { 0.0 };
                                (value / most * 127.0 + f32::from(ZERO)).round() as u8
                            });
                            set(a, row, word, f32::from_bits(u32::from_le_bytes(bytes)));
                        }
                        (*a.at(row, lines(width).div_ceil(4))).0 = [most / 127.0; LANES];
                    }
                }
            });
            let size = (want.iter().map(|x| x * x).sum::<f32>() / want.len() as f32).sqrt();
            let error = got.iter().zip(&want).map(|(a, b)| (a - b).powi(2)).sum::<f32>() / want.len() as f32;
            assert!(error.sqrt() < 0.02 * size, "{width} {units}: {} of {size}", error.sqrt());
        }
    }
}
