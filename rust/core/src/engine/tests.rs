//! Every table that can run here against float64 and against the others; AMX against what its manual says, in the emulation
//! everywhere and, where there is AMX, in the processor.

#![allow(clippy::float_cmp)] // what is compared exactly is meant to be

use std::sync::Arc;

use super::amx::{Emulated, Tiles};
use super::gemm::{End, Gate, Product, Start};
use super::kernels::{Kernels, Precision, ALL, AMX_EMULATED, PORTABLE};
use super::layout::{lines, padded, Buffer, Line, Rows, LANES};
use super::weights::{bfloat16, Groups, Linear, Packed};
use super::{Config, Cost, Engine, Goal, Objective, Shape, Tensor, Tensors};
use crate::pool::Pool;
use crate::Error;

/// Rows of a tile register.
const ROWS: usize = 16;

/// Numbers between -1 and 1.
pub(super) struct Random(pub u64);

impl Random {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ x >> 31) >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }

    pub(super) fn many(&mut self, count: usize, scale: f64) -> Vec<f32> {
        (0..count).map(|_| (self.next() * scale) as f32).collect()
    }
}

fn rounded(x: f32) -> f32 {
    f32::from_bits(u32::from(bfloat16(x)) << 16)
}

/// The tables that can run here.
fn tables() -> impl Iterator<Item = &'static Kernels> {
    ALL.iter().copied().filter(|k| (k.here)())
}

/// A tile whose word (row, column) is `f(row, column)`.
fn tile(f: impl Fn(usize, usize) -> u32) -> [Line; ROWS] {
    std::array::from_fn(|r| Line(std::array::from_fn(|c| f32::from_bits(f(r, c)))))
}

/// `C + A B` by `X`, C with `stride` numbers between its rows.
unsafe fn once<X: Tiles>(c: &[Line; ROWS], stride: usize, a: &[Line; ROWS], b: &[Line; ROWS]) -> [[u32; LANES]; ROWS] {
    let mut out = [Line::ZERO; ROWS];
    X::enter();
    let mut x = X::new();
    x.load::<3>(c.as_ptr().cast(), stride);
    x.load::<4>(a.as_ptr().cast(), LANES);
    x.stream::<7>(b.as_ptr().cast());
    x.dot::<3, 4, 7>();
    x.store::<3>(out.as_mut_ptr().cast(), LANES);
    X::leave();
    out.map(|line| line.0.map(f32::to_bits))
}

/// What Intel's manual says of one instruction, on numbers where another order or rounding gives another result.
unsafe fn as_in_the_manual<X: Tiles>() {
    let word = |low: f32, high: f32| high.to_bits() & 0xffff_0000 | low.to_bits() >> 16;
    let power = |n: i32| 2.0_f32.powi(n);
    let denormal = f32::from_bits(1 << 20);
    let a = tile(|r, k| match (r, k) {
        // Lower halves 2^24 + 1, upper ones 1 + 1: apart, the first is 2^24 (ties to even), and together 2^24 + 2.
        (0, 0) => word(power(24), 1.0),
        (0 | 1, 1) | (1, 0) => word(1.0, 1.0),
        // Factors and results without a normal number are zero.
        (2, 0) => word(denormal, 1.0),
        (3, 0) => word(power(-100), 0.0),
        // 2^-126 (1 + 1/2) - 2^-126: every step is normal, but not the sum of both.
        (4, 0) => word(power(-126) * 1.5, -power(-126)),
        // The fused product is not flushed before it is added.
        (5, 0) => word(power(-126), 0.0),
        (5, 1) => word(power(-64), 0.0),
        _ => 0,
    });
    let b = tile(|k, n| match (k, n) {
        (0 | 1, 0) => word(1.0, 1.0),
        (0, 1) => word(power(100), 1.0),
        (0, 2) => word(power(-100), 0.0),
        (0, 3) => word(1.0, 0.0),
        (1, 3) => word(-power(-63), 0.0),
        _ => 0,
    });
    let c = tile(|r, n| match (r, n) {
        (1, 0) => power(24).to_bits(),
        (6, 6) => denormal.to_bits(),
        (7, 7) => (-0.75_f32).to_bits(),
        _ => 0,
    });
    let out = once::<X>(&c, LANES, &a, &b);
    let at = |r: usize, n: usize| f32::from_bits(out[r][n]);
    assert_eq!(at(0, 0), power(24) + 2.0);
    assert_eq!(at(1, 0), power(24) + 4.0, "the pairs are summed from zero, before the sum that was there");
    assert_eq!(at(2, 1), 1.0);
    assert_eq!(at(3, 2), 0.0);
    assert_eq!(at(4, 0), 0.0);
    // 2^-126 - 2^-127 is not normal.
    assert_eq!(at(5, 3), 0.0);
    assert_eq!(at(6, 6), 0.0);
    assert_eq!(at(7, 7), -0.75);
    // Every row the same, as a bias.
    let row = tile(|_, n| (n as f32).to_bits());
    let none = tile(|_, _| 0);
    let out = once::<X>(&row, 0, &none, &none);
    assert!(out.iter().all(|line| (0..LANES).all(|n| line[n] == (n as f32).to_bits())));
}

#[test]
fn the_emulation_follows_the_manual() {
    unsafe { as_in_the_manual::<Emulated>() }
}

/// Where there is AMX, the processor does what the emulation does, bit for bit; elsewhere its table cannot be had.
#[test]
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn the_processor_agrees_with_the_emulation() {
    use super::amx::{here, Registers};
    let listed = Engine::instruction_sets(Precision::Bfloat16).contains(&"amx");
    if !here() {
        assert!(!listed);
        let config = config(40, 64);
        let pool = Arc::new(Pool::new(1));
        let error = Engine::new(&config, &tensors(&config, 1), Precision::Bfloat16, Some("amx"), pool).unwrap_err();
        assert!(error.to_string().contains("\"amx\""), "{error}");
        return;
    }
    assert!(listed || !is_x86_feature_detected!("avx512bf16"));
    unsafe { as_in_the_manual::<Registers>() }
    let mut random = Random(3);
    for round in 0..200 {
        // From numbers that all count to sums where most are lost, or denormal.
        let scale = 2.0_f64.powi(round % 5 * 30 - 75);
        let mut next = |scale: f64| {
            let numbers: Vec<u32> = random.many(512, scale).into_iter().map(|x| u32::from(bfloat16(x))).collect();
            tile(|r, c| numbers[r * 32 + 2 * c] | numbers[r * 32 + 2 * c + 1] << 16)
        };
        let (a, b, c) = (next(1.0), next(scale), next(scale));
        assert_eq!(unsafe { once::<Registers>(&c, LANES, &a, &b) }, unsafe { once::<Emulated>(&c, LANES, &a, &b) });
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Ending {
    Store,
    Gelu,
    Silu,
    Add,
    Gated,
}

/// Factors of a product; all are bfloat16.
struct Case {
    rows: usize,
    linear: Linear,
    x: Vec<f32>,
    /// What was there of the sum (rows, outputs), or the bias.
    rest: Option<Vec<f32>>,
    /// Rows that the result is added to, and its gates.
    old: Vec<f32>,
    gates: Vec<f32>,
}

impl Case {
    fn new(random: &mut Random, rows: usize, inputs: usize, outputs: usize, rest: bool) -> Self {
        let scale = (inputs as f64).powf(-0.5) * 2.0;
        let linear = Linear {
            weight: random.many(outputs * inputs, scale).iter().map(|&w| f64::from(rounded(w))).collect(),
            bias: random.many(outputs, 1.0).iter().map(|&b| f64::from(b)).collect(),
            inputs,
        };
        Self {
            rows,
            linear,
            x: random.many(rows * inputs, 2.0).into_iter().map(rounded).collect(),
            rest: rest.then(|| random.many(rows * outputs, 1.0)),
            old: random.many(rows * outputs, 1.0),
            gates: random.many(rows * outputs, 1.0),
        }
    }

    /// The sums (rows, outputs).
    fn exact(&self) -> Vec<f64> {
        let (inputs, outputs) = (self.linear.inputs, self.linear.bias.len());
        let sum = |i: usize| {
            let (row, n) = (i / outputs, i % outputs);
            let start = self.rest.as_ref().map_or(self.linear.bias[n], |rest| f64::from(rest[i]));
            let w = &self.linear.weight[n * inputs..][..inputs];
            start + self.x[row * inputs..][..inputs].iter().zip(w).map(|(&x, w)| f64::from(x) * w).sum::<f64>()
        };
        (0..self.rows * outputs).map(sum).collect()
    }

    /// The result (rows, outputs) of `k`; checks that what lies beside it stayed zero.
    fn run(&self, k: &Kernels, ending: Ending) -> Vec<f32> {
        const SLOT: usize = 2;
        let (inputs, outputs) = (self.linear.inputs, self.linear.bias.len());
        let tiles = self.rows.div_ceil(k.tile);
        let buffer = |lines| Buffer::new(tiles, k.tile, lines);
        let filled = |values: &[f32], width: usize| {
            let mut buffer = buffer(lines(width));
            for (row, values) in values.chunks_exact(width).enumerate() {
                for (i, &x) in values.iter().enumerate() {
                    unsafe { (*buffer.rows().at(row, i / LANES)).0[i % LANES] = x };
                }
            }
            buffer
        };
        let w = Packed::new(&self.linear, Groups::one(inputs), Groups::one(outputs), k.group);
        let mut raw = filled(&self.x, inputs);
        let mut a = buffer(padded(inputs) / LANES / k.group);
        let mut rest = filled(self.rest.as_deref().unwrap_or_default(), outputs);
        let mut operand = buffer(padded(outputs) / LANES / k.group);
        let mut gates = filled(&self.gates, outputs);
        // Sums of padding rows and those of single tiles are written too, and only there.
        let mut out = match ending {
            Ending::Add | Ending::Gated => filled(&self.old, outputs),
            _ => buffer(lines(outputs)),
        };
        let slots: Vec<Rows> = (0..tiles.div_ceil(SLOT)).map(|i| unsafe { gates.rows().skip(i * SLOT) }).collect();
        let end = match ending {
            Ending::Store => End::Store(out.rows()),
            Ending::Gelu => End::Gelu(operand.rows()),
            Ending::Silu => End::Silu(operand.rows()),
            Ending::Add => End::Residual(out.rows(), None),
            Ending::Gated => End::Residual(out.rows(), Some(Gate { slots: slots.as_ptr(), tiles: SLOT })),
        };
        let start = if self.rest.is_some() { Start::Rest(rest.rows()) } else { Start::Bias(w.bias()) };
        let p = Product { a: a.rows(), tiles, units: w.units, w: w.panel(0), stride: w.stride, panels: w.panels };
        unsafe {
            (k.convert)(raw.rows(), a.rows(), self.rows, lines(inputs));
            (k.enter)();
            (k.product)(&p, &start, &end);
            (k.leave)();
        }
        let mut number = |row: usize, i: usize| match ending {
            Ending::Gelu | Ending::Silu => {
                let word = i / k.group;
                let word = unsafe { (*operand.rows().at(row, word / LANES)).0[word % LANES] };
                if k.group == 1 {
                    word
                } else {
                    f32::from_bits(word.to_bits() >> (16 * (i % 2)) << 16)
                }
            }
            _ => unsafe { (*out.rows().at(row, i / LANES)).0[i % LANES] },
        };
        let mut result = Vec::new();
        for row in 0..self.rows {
            result.extend((0..outputs).map(|i| number(row, i)));
            assert!((outputs..padded(outputs)).all(|i| number(row, i) == 0.0));
        }
        result
    }
}

/// Rows, inputs and outputs: whole and broken tiles, one and many units, two panels and more.
const SHAPES: [[usize; 3]; 8] =
    [[1, 1, 1], [16, 32, 32], [17, 33, 31], [33, 7, 70], [50, 192, 100], [80, 64, 32], [65, 96, 130], [7, 500, 64]];

#[test]
fn products_are_those_of_float64() {
    let mut random = Random(1);
    for ([rows, inputs, outputs], rest) in SHAPES.into_iter().zip([false, true].into_iter().cycle()) {
        let case = Case::new(&mut random, rows, inputs, outputs, rest);
        let exact = case.exact();
        for k in tables() {
            let what = |ending| format!("{} {:?} {ending:?}", k.name, [rows, inputs, outputs]);
            for (got, want) in case.run(k, Ending::Store).iter().zip(&exact) {
                assert!((f64::from(*got) - want).abs() < 3e-6, "{}: {got} {want}", what(Ending::Store));
            }
            for (ending, gated) in [(Ending::Add, false), (Ending::Gated, true)] {
                for (i, got) in case.run(k, ending).into_iter().enumerate() {
                    let gate = if gated { f64::from(case.gates[i]) } else { 1.0 };
                    let want = f64::from(case.old[i]) + gate * exact[i];
                    assert!((f64::from(got) - want).abs() < 3e-6, "{}: {got} {want}", what(ending));
                }
            }
            for ending in [Ending::Gelu, Ending::Silu] {
                for (got, want) in case.run(k, ending).into_iter().zip(case.run(&PORTABLE, ending)) {
                    // In bfloat16 the result is rounded, and GELU is good to 2.6e-5.
                    let (share, rest) = if k.group == 1 { (0.0, 5e-6) } else { (1.0 / 256.0, 3e-5) };
                    assert!((got - want).abs() <= want.abs() * share + rest, "{}: {got} {want}", what(ending));
                }
            }
        }
    }
}

/// The tile instructions are the same in all of them, and `vdpbf16ps` sums the same products in another order.
#[test]
fn products_agree_among_the_tables_of_bfloat16() {
    let mut random = Random(2);
    for [rows, inputs, outputs] in SHAPES {
        let case = Case::new(&mut random, rows, inputs, outputs, false);
        let want = case.run(&AMX_EMULATED, Ending::Store);
        for k in tables().filter(|k| k.precision == Precision::Bfloat16) {
            let got = case.run(k, Ending::Store);
            if k.tile == ROWS {
                assert!(got.iter().zip(&want).all(|(a, b)| a.to_bits() == b.to_bits()), "{}", k.name);
            }
            assert!(got.iter().zip(&want).all(|(a, b)| (a - b).abs() < 4e-6), "{}", k.name);
        }
    }
}

/// A model whose widths are no multiples of anything; with `dim` other than `embed`, it maps between both.
fn config(embed: usize, dim: usize) -> Config {
    Config {
        image_size: 9,
        patch_size: 3,
        encoder_dim: 22,
        encoder_depth: 2,
        encoder_heads: 2,
        encoder_mlp: 37,
        embed_dim: embed,
        projector_hidden: 70,
        predictor_dim: dim,
        predictor_depth: 2,
        predictor_heads: 5,
        predictor_head_dim: 20,
        predictor_mlp: 300,
        history: 3,
        block_dim: 7,
        action_smoothed: 10,
        action_hidden: 40,
        distance_head: false,
        action_prior: false,
        prior_blocks: 3,
        head_hidden: 45,
        action_prefix: false,
        prefix_blocks: 3,
    }
}

fn tensors(c: &Config, seed: u64) -> Tensors {
    let mut random = Random(seed);
    let mut tensors = Tensors::new();
    let mut add = |name: &str, shape: &[usize], scale: f64, offset: f32| {
        let values = random.many(shape.iter().product(), scale).into_iter().map(|x| x + offset).collect();
        tensors.insert(name.to_owned(), Tensor { shape: shape.to_vec(), values });
    };
    let mut linear = |name: &str, outputs: usize, inputs: usize| {
        add(&format!("{name}.weight"), &[outputs, inputs], 1.7 * (inputs as f64).powf(-0.5), 0.0);
        add(&format!("{name}.bias"), &[outputs], 0.2, 0.0);
    };
    let (d, inner) = (c.predictor_dim, c.predictor_heads * c.predictor_head_dim);
    linear("encoder.embeddings.patch_embeddings.projection", c.encoder_dim, 3 * c.patch_size * c.patch_size);
    for layer in 0..c.encoder_depth {
        let name = format!("encoder.layers.{layer}");
        for part in ["q", "k", "v", "o"] {
            linear(&format!("{name}.attention.{part}_proj"), c.encoder_dim, c.encoder_dim);
        }
        linear(&format!("{name}.mlp.fc1"), c.encoder_mlp, c.encoder_dim);
        linear(&format!("{name}.mlp.fc2"), c.encoder_dim, c.encoder_mlp);
    }
    linear("action_encoder.patch_embed", c.action_smoothed, c.block_dim);
    linear("action_encoder.embed.0", c.action_hidden, c.action_smoothed);
    linear("action_encoder.embed.2", c.embed_dim, c.action_hidden);
    for (name, inputs) in [("projector", c.encoder_dim), ("pred_proj", c.embed_dim)] {
        linear(&format!("{name}.net.0"), c.projector_hidden, inputs);
        linear(&format!("{name}.net.3"), c.embed_dim, c.projector_hidden);
    }
    if c.embed_dim != d {
        linear("predictor.transformer.cond_proj", d, c.embed_dim);
        linear("predictor.transformer.input_proj", d, c.embed_dim);
        linear("predictor.transformer.output_proj", c.embed_dim, d);
    }
    for layer in 0..c.predictor_depth {
        let name = format!("predictor.transformer.layers.{layer}");
        linear(&format!("{name}.adaLN_modulation.1"), 6 * d, d);
        linear(&format!("{name}.attn.to_qkv"), 3 * inner, d);
        linear(&format!("{name}.attn.to_out.0"), d, inner);
        linear(&format!("{name}.mlp.net.1"), c.predictor_mlp, d);
        linear(&format!("{name}.mlp.net.4"), d, c.predictor_mlp);
    }
    let mut norm = |name: &str, width: usize| {
        add(&format!("{name}.weight"), &[width], 0.2, 1.0);
        add(&format!("{name}.bias"), &[width], 0.2, 0.0);
    };
    for layer in 0..c.predictor_depth {
        norm(&format!("predictor.transformer.layers.{layer}.attn.norm"), d);
        norm(&format!("predictor.transformer.layers.{layer}.mlp.net.0"), d);
    }
    for layer in 0..c.encoder_depth {
        norm(&format!("encoder.layers.{layer}.layernorm_before"), c.encoder_dim);
        norm(&format!("encoder.layers.{layer}.layernorm_after"), c.encoder_dim);
    }
    norm("predictor.transformer.norm", d);
    norm("encoder.layernorm", c.encoder_dim);
    for name in ["projector", "pred_proj"] {
        norm(&format!("{name}.net.1"), c.projector_hidden);
    }
    for name in ["projector", "pred_proj"] {
        add(&format!("{name}.net.1.running_mean"), &[c.projector_hidden], 0.2, 0.0);
        add(&format!("{name}.net.1.running_var"), &[c.projector_hidden], 0.2, 1.0);
    }
    add("predictor.pos_embedding", &[c.positions(), c.embed_dim], 0.5, 0.0);
    let patches = (c.image_size / c.patch_size).pow(2);
    add("encoder.embeddings.position_embeddings", &[patches + 1, c.encoder_dim], 0.5, 0.0);
    add("encoder.embeddings.cls_token", &[c.encoder_dim], 0.5, 0.0);
    // Always there; a model takes those that it has.
    let blocks = c.prior_blocks * c.block_dim;
    for (name, inputs, outputs) in
        [("distance_head", c.embed_dim, c.embed_dim), ("action_prior", 2 * c.embed_dim, blocks)]
    {
        for (place, outputs, inputs) in
            [(0, c.head_hidden, inputs), (2, c.head_hidden, c.head_hidden), (4, outputs, c.head_hidden)]
        {
            add(&format!("{name}.net.{place}.weight"), &[outputs, inputs], 1.7 * (inputs as f64).powf(-0.5), 0.0);
            add(&format!("{name}.net.{place}.bias"), &[outputs], 0.2, 0.0);
        }
    }
    tensors
}

/// A model with something to imagine.
struct World {
    config: Config,
    tensors: Tensors,
    shape: Shape,
    z: Vec<f32>,
    past: Vec<f32>,
    goal: Vec<f32>,
    candidates: Vec<f32>,
}

impl World {
    fn new(config: Config, shape: Shape) -> Self {
        let mut random = Random(9);
        let (d, a) = (config.embed_dim, config.block_dim);
        Self {
            tensors: tensors(&config, 5),
            z: random.many(shape.envs * shape.frames * d, 1.7),
            past: random.many(shape.envs * (shape.frames - 1) * a, 1.7),
            goal: random.many(shape.envs * d, 1.7),
            candidates: random.many(shape.envs * shape.samples * shape.horizon * a, 1.7),
            config,
            shape,
        }
    }

    fn engine(&self, k: &Kernels, threads: usize) -> Engine {
        let pool = Arc::new(Pool::new(threads));
        Engine::new(&self.config, &self.tensors, k.precision, Some(k.name), pool).unwrap()
    }

    fn latents(&self, k: &Kernels) -> Vec<f32> {
        let s = self.shape;
        let mut out = vec![0.0; s.envs * s.samples * (s.frames + s.horizon) * self.config.embed_dim];
        self.engine(k, 1).rollout(s, &self.z, &self.past, &self.candidates, &mut out).unwrap();
        out
    }

    fn costs(&self, engine: &Engine) -> Vec<f32> {
        let mut out = vec![0.0; self.shape.envs * self.shape.samples];
        engine.costs(self.shape, &self.z, &self.past, self.goal(), &self.candidates, &mut out).unwrap();
        out.into_iter().map(|cost| cost as f32).collect()
    }

    fn goal(&self) -> Goal<'_> {
        let cost = if self.config.distance_head { Cost::Distance } else { Cost::Latent };
        Goal { latents: &self.goal, cost }
    }

    /// Environment `env` alone, its candidates `samples`.
    fn part(&self, env: usize, samples: std::ops::Range<usize>) -> Self {
        let (s, d, a) = (self.shape, self.config.embed_dim, self.config.block_dim);
        let of = |values: &[f32], width: usize| values[env * width..][..width].to_vec();
        let candidates = of(&self.candidates, s.samples * s.horizon * a);
        Self {
            config: self.config.clone(),
            tensors: self.tensors.clone(),
            shape: Shape { envs: 1, samples: samples.len(), ..s },
            z: of(&self.z, s.frames * d),
            past: of(&self.past, (s.frames - 1) * a),
            goal: of(&self.goal, d),
            candidates: candidates[samples.start * s.horizon * a..samples.end * s.horizon * a].to_vec(),
        }
    }
}

/// Windows that grow and then slide, that slide from the start, and that never do.
const WINDOWS: [[usize; 2]; 4] = [[1, 4], [3, 2], [2, 3], [1, 1]];

/// An action-prefix model with passes of three blocks, and what it is asked for: less than a pass, one, and several.
fn prefixes() -> [World; 5] {
    [[1, 3], [1, 8], [2, 4], [1, 2], [1, 1]].map(|[frames, horizon]| {
        let config = Config { history: 1, action_prefix: true, ..config(40, if frames == 1 { 64 } else { 40 }) };
        World::new(config, Shape { envs: 2, frames, samples: 19, horizon })
    })
}

/// Difference of two results, as a share of their size.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let squares = |f: &dyn Fn(usize) -> f64| (0..a.len()).map(|i| f(i).powi(2)).sum::<f64>();
    (squares(&|i| f64::from(a[i] - b[i])) / squares(&|i| f64::from(b[i]))).sqrt()
}

#[test]
fn all_imagine_the_same_within_rounding() {
    let windows = WINDOWS.into_iter().enumerate().map(|(i, [frames, horizon])| {
        let config = if i % 2 == 0 { config(40, 64) } else { config(50, 50) };
        World::new(config, Shape { envs: 2, frames, samples: 9, horizon })
    });
    for world in windows.chain(prefixes()) {
        let want = world.latents(&PORTABLE);
        let costs = world.costs(&world.engine(&PORTABLE, 1));
        for k in tables() {
            let most = if k.precision == Precision::Float32 { 3e-6 } else { 0.01 };
            let far = distance(&world.latents(k), &want);
            assert!(far < most, "{} {:?}: {far}", k.name, k.precision);
            let far = distance(&world.costs(&world.engine(k, 1)), &costs);
            assert!(far < most, "{} {:?}: {far}", k.name, k.precision);
        }
    }
}

#[test]
fn costs_depend_neither_on_threads_nor_on_neighbours() {
    let windows = [[1, 4], [3, 1]]
        .map(|[frames, horizon]| World::new(config(40, 64), Shape { envs: 2, frames, samples: 19, horizon }));
    for world in windows.into_iter().chain(prefixes()) {
        for k in tables() {
            let want = world.costs(&world.engine(k, 1));
            assert!(want.iter().all(|cost| cost.is_finite() && *cost > 0.0));
            for threads in [2, 4] {
                assert_eq!(world.costs(&world.engine(k, threads)), want, "{} {threads}", k.name);
            }
            for (env, samples) in [(1, 0..19), (1, 5..6), (0, 3..14)] {
                let part = world.part(env, samples.clone());
                let want = &want[env * 19 + samples.start..env * 19 + samples.end];
                assert_eq!(part.costs(&part.engine(k, 1)), want, "{} {env} {samples:?}", k.name);
            }
        }
    }
}

#[test]
fn all_encode_the_same_within_rounding_on_any_number_of_threads() {
    let world = World::new(config(40, 64), Shape { envs: 1, frames: 1, samples: 1, horizon: 1 });
    let frames: Vec<u8> = (0..2 * 9 * 9 * 3_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let encode = |k: &Kernels, threads: usize| {
        let mut out = vec![0.0; 2 * world.config.embed_dim];
        world.engine(k, threads).encode(&frames, &mut out).unwrap();
        out
    };
    let want = encode(&PORTABLE, 1);
    assert!(want.iter().any(|x| x.abs() > 0.1));
    for k in tables() {
        let got = encode(k, 1);
        assert!(distance(&got, &want) < 3e-6, "{}", k.name);
        assert_eq!(encode(k, 3), got, "{}", k.name);
    }
}

#[test]
fn costs_are_the_distances_of_the_rollout_and_an_objective_gives_the_same() {
    let windows =
        WINDOWS.map(|[frames, horizon]| World::new(config(40, 64), Shape { envs: 2, frames, samples: 19, horizon }));
    for world in windows.into_iter().chain(prefixes()) {
        let s = world.shape;
        let (frames, horizon) = (s.frames, s.horizon);
        let engine = Arc::new(world.engine(&PORTABLE, 2));
        let (tokens, d) = (frames + horizon, world.config.embed_dim);
        let (latents, got) = (world.latents(&PORTABLE), world.costs(&engine));
        for (row, trajectory) in latents.chunks_exact(tokens * d).enumerate() {
            let e = row / s.samples;
            assert_eq!(trajectory[..frames * d], world.z[e * frames * d..][..frames * d]);
            let last = trajectory[(tokens - 1) * d..].iter().zip(&world.goal[e * d..]);
            let want: f32 = last.map(|(z, goal)| (z - goal) * (z - goal)).sum();
            assert!((got[row] - want).abs() < 1e-4 * want.max(1.0), "{} {want}", got[row]);
        }
        let (z, past) = (world.z.clone(), world.past.clone());
        let objective = Objective::new(engine, s.envs, frames, z, past, world.goal()).unwrap();
        let mut same = vec![0.0; got.len()];
        objective.costs(&world.candidates, s.samples, &mut same).unwrap();
        assert!(same.iter().zip(&got).all(|(&same, &got)| same as f32 == got));
    }
}

/// A head in float64.
fn perceptron(tensors: &Tensors, name: &str, x: &[f32]) -> Vec<f64> {
    let mut x: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
    for place in [0, 2, 4] {
        let [weight, bias] = ["weight", "bias"].map(|part| &tensors[&format!("{name}.net.{place}.{part}")].values);
        let dot = |row: &[f32]| row.iter().zip(&x).map(|(&w, x)| f64::from(w) * x).sum::<f64>();
        let y = weight.chunks_exact(x.len()).zip(bias).map(|(row, &b)| dot(row) + f64::from(b));
        x = y.map(|y| if place == 4 { y } else { y * normal(y) }).collect();
    }
    x
}

/// The normal distribution function, as a sum of its density.
fn normal(x: f64) -> f64 {
    const STEPS: usize = 2000;
    let density = |t: f64| (-t * t / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
    let step = x / STEPS as f64;
    0.5 + (0..STEPS).map(|i| density((i as f64 + 0.5) * step) * step).sum::<f64>()
}

#[test]
fn heads_are_the_perceptrons_they_should_be_on_every_instruction_set() {
    let mut world = World::new(config(40, 64), Shape { envs: 2, frames: 1, samples: 150, horizon: 2 });
    world.config.distance_head = true;
    world.config.action_prior = true;
    let (d, tokens) = (world.config.embed_dim, 3);
    for k in tables() {
        let engine = world.engine(k, 2);
        let latents = world.latents(k);
        for (row, (got, trajectory)) in world.costs(&engine).iter().zip(latents.chunks_exact(tokens * d)).enumerate() {
            if row % 37 > 0 {
                continue;
            }
            let goal = perceptron(&world.tensors, "distance_head", &world.goal[row / 150 * d..][..d]);
            let last = perceptron(&world.tensors, "distance_head", &trajectory[2 * d..]);
            let want = last.iter().zip(goal).map(|(z, goal)| (z - goal).powi(2)).sum::<f64>().sqrt();
            assert!((f64::from(*got) - want).abs() < 2e-5 * want.max(1.0), "{} {got} {want}", k.name);
        }
        let pairs: Vec<f32> =
            world.z.chunks_exact(d).zip(world.goal.chunks_exact(d)).flat_map(|(z, g)| [z, g].concat()).collect();
        let got = engine.head("action_prior", &pairs).unwrap();
        let want: Vec<_> =
            pairs.chunks_exact(2 * d).flat_map(|x| perceptron(&world.tensors, "action_prior", x)).collect();
        assert_eq!(got.len(), want.len());
        assert!(got.iter().zip(want).all(|(&got, want)| (f64::from(got) - want).abs() < 2e-5), "{}", k.name);
    }
}

fn fails<T: std::fmt::Debug>(result: Result<T, Error>, text: &str) {
    match result {
        Err(Error::Argument(got)) => assert!(got.contains(text), "{got}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_head_that_is_not_there_is_refused() {
    let world = World::new(config(40, 64), Shape { envs: 1, frames: 1, samples: 2, horizon: 1 });
    let engine = world.engine(&PORTABLE, 1);
    let goal = Goal { latents: &world.goal, cost: Cost::Distance };
    fails(engine.costs(world.shape, &world.z, &[], goal, &world.candidates, &mut [0.0; 2]), "has no distance head");
    fails(engine.head("distance_head", &world.z).map(|_| ()), "has no head \"distance_head\"");
    let mut with = world.config.clone();
    with.distance_head = true;
    let mut tensors = world.tensors.clone();
    let make = |c: &Config, t: &Tensors| {
        Engine::new(c, t, Precision::Float32, None, Arc::new(Pool::new(1)))
            .map(|engine| engine.head("distance_head", &[0.0; 41]))
    };
    fails(make(&with, &tensors).unwrap().map(|_| ()), "multiple of 40");
    tensors.get_mut("distance_head.net.2.weight").unwrap().values.pop();
    fails(make(&with, &tensors).map(|_| ()), "distance_head.net.2.weight of the weights must have 2025 values");
    tensors.remove("distance_head.net.0.bias");
    tensors.remove("distance_head.net.2.weight");
    fails(make(&with, &tensors).map(|_| ()), "weights lack distance_head.net.0.bias");
}

#[test]
fn a_workspace_serves_every_shape_in_any_order() {
    let worlds = WINDOWS
        .map(|[frames, horizon]| World::new(config(40, 64), Shape { envs: 1, frames, samples: 10 * horizon, horizon }));
    let [_, long, other, short, one] = prefixes();
    for worlds in [&worlds[..], &[one, long, short], &[other]] {
        let used = worlds[0].engine(&PORTABLE, 1);
        for world in worlds.iter().chain(worlds) {
            assert_eq!(world.costs(&used), world.costs(&world.engine(&PORTABLE, 1)), "{:?}", world.shape);
        }
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let world = World::new(config(40, 64), Shape { envs: 1, frames: 1, samples: 2, horizon: 1 });
    let pool = Arc::new(Pool::new(1));
    let make = |tensors: &Tensors, cpu| Engine::new(&world.config, tensors, Precision::Float32, cpu, Arc::clone(&pool));
    let with = |name: &str, values: Vec<f32>| {
        let mut changed = world.tensors.clone();
        changed.insert(name.to_owned(), Tensor { shape: vec![values.len()], values });
        changed
    };
    let mut fewer = world.tensors.clone();
    fewer.remove("encoder.layernorm.bias");
    fails(make(&fewer, None), "weights lack encoder.layernorm.bias");
    fails(make(&with("encoder.layernorm.bias", vec![0.0; 3]), None), "must have 22 values, got [3]");
    fails(make(&with("encoder.layernorm.bias", vec![f32::INFINITY; 22]), None), "must be finite, got inf");
    fails(make(&with("pred_proj.net.1.running_var", vec![-1.0; 70]), None), "must not be negative, got -1");
    fails(make(&world.tensors, Some("z80")), "cpu must be one of");

    let engine = world.engine(&PORTABLE, 1);
    fails(engine.encode(&[0; 10], &mut [0.0; 40]), "frames has 10 bytes");
    let costs = |shape, z: &[f32], goal: &[f32], candidates: &[f32], out: &mut [f64]| {
        engine.costs(shape, z, &world.past, Goal { latents: goal, cost: Cost::Latent }, candidates, out)
    };
    let (s, z, goal, candidates) = (world.shape, &world.z, &world.goal, &world.candidates);
    fails(costs(s, &z[1..], goal, candidates, &mut [0.0; 2]), "z must have 40 numbers, got 39");
    fails(costs(s, z, &goal[1..], candidates, &mut [0.0; 2]), "goal must have 40 numbers, got 39");
    fails(costs(s, z, goal, &candidates[1..], &mut [0.0; 2]), "candidates must have 14 numbers, got 13");
    fails(costs(s, z, goal, candidates, &mut [0.0; 3]), "out must have 2 numbers, got 3");
    fails(costs(Shape { samples: 0, ..s }, z, goal, &[], &mut []), "must be at least 1");
}
