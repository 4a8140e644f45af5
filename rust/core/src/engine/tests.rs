//! The engine against itself: every instruction set, any number of threads, any block of candidates. Agreement with the
//! official code and with float64 `PyTorch` is tested from Python (`tests/test_cpu_backend.py`).

use std::sync::Arc;

use super::{Config, Engine, Objective, Precision, Shape, Tensor, Tensors};
use crate::pool::Pool;
use crate::rng;
use crate::Error;

/// Odd everywhere: no width is a multiple of a vector, no count one of a tile.
fn config() -> Config {
    Config {
        image_size: 9,
        patch_size: 3,
        encoder_dim: 22,
        encoder_depth: 2,
        encoder_heads: 2,
        encoder_mlp: 37,
        embed_dim: 13,
        projector_hidden: 35,
        predictor_dim: 21,
        predictor_depth: 2,
        predictor_heads: 3,
        predictor_head_dim: 9,
        predictor_mlp: 300,
        history: 3,
        block_dim: 6,
        action_smoothed: 5,
        action_hidden: 18,
    }
}

fn tensors(c: &Config) -> Tensors {
    let mut out = Tensors::new();
    let mut add = |name: String, shape: &[usize], center: f32, scale: f32| {
        let count = shape.iter().product::<usize>();
        let noise = rng::noise(out.len() as u64, 0, 0, &[0], 1, count).unwrap();
        let values = noise.into_iter().map(|x| center + scale * x).collect();
        out.insert(name, Tensor { shape: shape.to_vec(), values });
    };
    let mut linear = |name: &str, outputs: usize, inputs: usize, bias: bool| {
        add(format!("{name}.weight"), &[outputs, inputs], 0.0, (inputs as f32).sqrt().recip());
        if bias {
            add(format!("{name}.bias"), &[outputs], 0.0, 0.1);
        }
    };
    let (d, p, inner) = (c.encoder_dim, c.predictor_dim, c.predictor_heads * c.predictor_head_dim);
    linear("encoder.embeddings.patch_embeddings.projection", d, 3 * c.patch_size * c.patch_size, true);
    let mut norms = vec![("encoder.layernorm".to_owned(), d), ("predictor.transformer.norm".to_owned(), p)];
    for i in 0..c.encoder_depth {
        let layer = format!("encoder.layers.{i}");
        for part in ["q", "k", "v", "o"] {
            linear(&format!("{layer}.attention.{part}_proj"), d, d, true);
        }
        linear(&format!("{layer}.mlp.fc1"), c.encoder_mlp, d, true);
        linear(&format!("{layer}.mlp.fc2"), d, c.encoder_mlp, true);
        norms.extend(["before", "after"].map(|part| (format!("{layer}.layernorm_{part}"), d)));
    }
    let transformer = "predictor.transformer";
    linear(&format!("{transformer}.input_proj"), p, c.embed_dim, true);
    linear(&format!("{transformer}.cond_proj"), p, c.embed_dim, true);
    linear(&format!("{transformer}.output_proj"), c.embed_dim, p, true);
    for i in 0..c.predictor_depth {
        let layer = format!("{transformer}.layers.{i}");
        linear(&format!("{layer}.attn.to_qkv"), 3 * inner, p, false);
        linear(&format!("{layer}.attn.to_out.0"), p, inner, true);
        linear(&format!("{layer}.mlp.net.1"), c.predictor_mlp, p, true);
        linear(&format!("{layer}.mlp.net.4"), p, c.predictor_mlp, true);
        linear(&format!("{layer}.adaLN_modulation.1"), 6 * p, p, true);
        norms.extend(["attn.norm", "mlp.net.0"].map(|part| (format!("{layer}.{part}"), p)));
    }
    linear("action_encoder.patch_embed", c.action_smoothed, c.block_dim, true);
    linear("action_encoder.embed.0", c.action_hidden, c.action_smoothed, true);
    linear("action_encoder.embed.2", c.embed_dim, c.action_hidden, true);
    for (name, inputs) in [("projector", d), ("pred_proj", c.embed_dim)] {
        linear(&format!("{name}.net.0"), c.projector_hidden, inputs, true);
        linear(&format!("{name}.net.3"), c.embed_dim, c.projector_hidden, true);
        norms.push((format!("{name}.net.1"), c.projector_hidden));
    }
    for name in ["projector", "pred_proj"] {
        add(format!("{name}.net.1.running_mean"), &[c.projector_hidden], 0.0, 0.1);
        add(format!("{name}.net.1.running_var"), &[c.projector_hidden], 1.0, 0.1);
    }
    for (name, width) in norms {
        add(format!("{name}.weight"), &[width], 1.0, 0.1);
        add(format!("{name}.bias"), &[width], 0.0, 0.1);
    }
    let patches = (c.image_size / c.patch_size).pow(2);
    add("encoder.embeddings.cls_token".into(), &[d], 0.0, 0.1);
    add("encoder.embeddings.position_embeddings".into(), &[patches + 1, d], 0.0, 0.1);
    add("predictor.pos_embedding".into(), &[c.history, c.embed_dim], 0.0, 0.1);
    out
}

fn engine(precision: Precision, cpu: Option<&str>, threads: usize) -> Engine {
    Engine::new(&config(), &tensors(&config()), precision, cpu, Arc::new(Pool::new(threads))).unwrap()
}

/// Inputs of a rollout: latents, blocks between them, goals, candidates.
fn inputs(s: Shape) -> [Vec<f32>; 4] {
    let c = config();
    [
        s.envs * s.frames * c.embed_dim,
        s.envs * (s.frames - 1) * c.block_dim,
        s.envs * c.embed_dim,
        s.envs * s.samples * s.horizon * c.block_dim,
    ]
    .map(|count| rng::noise(7, 0, 0, &[count as u32], 1, count.max(1)).unwrap()[..count].to_vec())
}

fn costs(engine: &Engine, s: Shape) -> Vec<f64> {
    let [z, past, goal, candidates] = inputs(s);
    let mut out = vec![f64::NAN; s.envs * s.samples];
    engine.costs(s, &z, &past, &goal, &candidates, &mut out).unwrap();
    out
}

fn frames() -> Vec<u8> {
    (0..2 * 9 * 9 * 3_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

fn shapes() -> Vec<Shape> {
    let all = [(1, 1, 7, 5), (2, 2, 9, 3), (1, 3, 1, 4), (3, 1, 5, 1), (1, 2, 13, 1)];
    // Miri runs a thousand times slower.
    let all = if cfg!(miri) { &all[..1] } else { &all[..] };
    all.iter().map(|&(envs, frames, samples, horizon)| Shape { envs, frames, samples, horizon }).collect()
}

#[test]
fn instruction_sets_agree() {
    let precision = Precision::Float32;
    let plain = engine(precision, Some("portable"), 1);
    let mut want = vec![0.0; 2 * 13];
    plain.encode(&frames(), &mut want).unwrap();
    assert!(want.iter().all(|x| x.is_finite()) && want.iter().any(|x| x.abs() > 0.1));
    for cpu in Engine::instruction_sets(precision) {
        let other = engine(precision, Some(cpu), 1);
        assert_eq!((other.cpu(), other.precision()), (cpu, precision));
        let mut got = vec![0.0; 2 * 13];
        other.encode(&frames(), &mut got).unwrap();
        for (got, want) in got.iter().zip(&want) {
            assert!((got - want).abs() < 1e-5, "{cpu}: {got} {want}");
        }
        for shape in shapes() {
            for (got, want) in costs(&other, shape).iter().zip(costs(&plain, shape)) {
                assert!((got - want).abs() < 1e-4 * want.abs().max(1.0), "{cpu} {shape:?}: {got} {want}");
            }
        }
    }
}

#[test]
fn bfloat16_and_int8_are_near_float32() {
    let exact = engine(Precision::Float32, None, 1);
    for precision in [Precision::Bfloat16, Precision::Int8] {
        for cpu in Engine::instruction_sets(precision) {
            let rough = engine(precision, Some(cpu), 1);
            for shape in shapes() {
                for (got, want) in costs(&rough, shape).iter().zip(costs(&exact, shape)) {
                    assert!((got - want).abs() < 0.1 * want.max(1.0), "{precision:?} {cpu} {shape:?}: {got} {want}");
                }
            }
        }
    }
}

#[test]
fn a_row_does_not_depend_on_threads_or_on_the_rows_beside_it() {
    for precision in [Precision::Float32, Precision::Bfloat16, Precision::Int8] {
        for cpu in Engine::instruction_sets(precision) {
            let alone = engine(precision, Some(cpu), 1);
            for shape in shapes() {
                let want = costs(&alone, shape);
                for threads in [2, 4] {
                    assert_eq!(costs(&engine(precision, Some(cpu), threads), shape), want, "{cpu} {threads} threads");
                }
                let [z, past, goal, candidates] = inputs(shape);
                let row = candidates.len() / (shape.envs * shape.samples);
                for e in 0..shape.envs {
                    let part = |values: &[f32]| {
                        let each = values.len() / shape.envs;
                        values[e * each..][..each].to_vec()
                    };
                    let candidate = &candidates[(e + 1) * shape.samples * row - row..][..row];
                    let one = Shape { envs: 1, samples: 1, ..shape };
                    let mut got = [0.0];
                    alone.costs(one, &part(&z), &part(&past), &part(&goal), candidate, &mut got).unwrap();
                    assert_eq!(got[..], want[(e + 1) * shape.samples - 1..][..1], "{cpu} {shape:?}");
                }
            }
        }
    }
}

#[test]
fn costs_are_the_distances_of_the_rollout_and_an_objective_gives_the_same() {
    let engine = Arc::new(engine(Precision::Float32, None, 2));
    for s in shapes() {
        let [z, past, goal, candidates] = inputs(s);
        let (tokens, d) = (s.frames + s.horizon, 13);
        let mut latents = vec![0.0; s.envs * s.samples * tokens * d];
        engine.rollout(s, &z, &past, &candidates, &mut latents).unwrap();
        let got = costs(&engine, s);
        for (row, trajectory) in latents.chunks_exact(tokens * d).enumerate() {
            let e = row / s.samples;
            assert_eq!(trajectory[..s.frames * d], z[e * s.frames * d..][..s.frames * d]);
            let last = trajectory[(tokens - 1) * d..].iter().zip(&goal[e * d..]);
            let want: f64 = last.map(|(z, goal)| f64::from((z - goal) * (z - goal))).sum();
            assert!((got[row] - want).abs() < 1e-4 * want.max(1.0), "{} {want}", got[row]);
        }
        let objective = Objective::new(Arc::clone(&engine), s.envs, s.frames, z, past, &goal).unwrap();
        let mut same = vec![0.0; got.len()];
        objective.costs(&candidates, s.samples, &mut same).unwrap();
        assert_eq!(same, got);
    }
}

#[test]
fn a_workspace_serves_every_shape_in_any_order() {
    let used = engine(Precision::Float32, None, 1);
    for _ in 0..2 {
        for shape in shapes() {
            assert_eq!(costs(&used, shape), costs(&engine(Precision::Float32, None, 1), shape), "{shape:?}");
        }
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let pool = Arc::new(Pool::new(1));
    let fails = |tensors: &Tensors, precision, cpu, text: &str| match Engine::new(
        &config(),
        tensors,
        precision,
        cpu,
        Arc::clone(&pool),
    ) {
        Err(Error::Argument(got)) => assert!(got.contains(text), "{got}"),
        other => panic!("{other:?}"),
    };
    let good = tensors(&config());
    let without = |name: &str| good.clone().into_iter().filter(|(key, _)| key != name).collect::<Tensors>();
    let with = |name: &str, values: Vec<f32>| {
        let mut changed = good.clone();
        changed.insert(name.to_owned(), Tensor { shape: vec![values.len()], values });
        changed
    };
    let single = Precision::Float32;
    fails(&without("encoder.layernorm.bias"), single, None, "weights lack encoder.layernorm.bias");
    fails(&with("encoder.layernorm.bias", vec![0.0; 3]), single, None, "must have 22 values, got [3]");
    fails(&with("encoder.layernorm.bias", vec![f32::INFINITY; 22]), single, None, "must be finite, got inf");
    fails(&with("pred_proj.net.1.running_var", vec![-1.0; 35]), single, None, "must not be negative, got -1");
    fails(&good, single, Some("z80"), "cpu must be one of");

    let engine = engine(single, None, 1);
    let fails = |result: Result<(), Error>, text: &str| match result {
        Err(Error::Argument(got)) => assert!(got.contains(text), "{got}"),
        other => panic!("{other:?}"),
    };
    fails(engine.encode(&[0; 10], &mut [0.0; 13]), "frames has 10 bytes");
    let shape = Shape { envs: 1, frames: 1, samples: 2, horizon: 1 };
    let [z, past, goal, candidates] = inputs(shape);
    fails(engine.costs(shape, &z[1..], &past, &goal, &candidates, &mut [0.0; 2]), "z must have 13 numbers, got 12");
    fails(engine.costs(shape, &z, &past, &goal[1..], &candidates, &mut [0.0; 2]), "goal must have 13 numbers, got 12");
    fails(engine.costs(shape, &z, &past, &goal, &candidates[1..], &mut [0.0; 2]), "candidates must have 12");
    fails(engine.costs(shape, &z, &past, &goal, &candidates, &mut [0.0; 3]), "out must have 2 numbers, got 3");
    let none = Shape { samples: 0, ..shape };
    fails(engine.costs(none, &z, &past, &goal, &[], &mut []), "must be at least 1");
}
