//! The encoder: a frame to one latent (ViT, its first token, projector), in float32.
//!
//! A plan encodes a frame or two and rolls thousands of candidates out, so precision is not traded here. One frame is worked
//! on at a time, by all threads: every phase is cut into groups of tiles.

use super::gemm::{End, Start};
use super::kernels::Kernels;
use super::layout::{lines, padded, Buffer, Line, Rows, LANES};
use super::predictor::{product, projector, run, Mlp};
use super::rows::Norm;
use super::weights::{padded_lines, values, Groups, Linear, Packed, Tensors};
use super::Config;
use crate::pool::Pool;
use crate::Error;

const EPS: f32 = 1e-12;
/// Of ImageNet, in [0, 1] units: the official preprocessing subtracts the one and divides by the other.
const MEAN: [f64; 3] = [0.485, 0.456, 0.406];
const STD: [f64; 3] = [0.229, 0.224, 0.225];

struct Layer {
    /// Queries, keys and values of all heads, each head padded by itself.
    qkv: [Packed; 3],
    out: Packed,
    mlp: Mlp,
}

pub(super) struct Encoder {
    config: Config,
    patch: Packed,
    /// What every token starts from, (tokens, lines): its position, and the patch's bias or the first token.
    start: Vec<Line>,
    layers: Vec<Layer>,
    projector: Mlp,
    tokens: usize,
    /// A bias that is none.
    zeros: Vec<Line>,
}

/// What encoding needs beside the weights.
pub(super) struct Workspace {
    patches: Buffer,
    x: Buffer,
    a: Buffer,
    q: Buffer,
    k: Buffer,
    v: Buffer,
    attended: Buffer,
    y: Buffer,
    hidden: Buffer,
    /// Keys (columns are tokens) and values (columns are a head's numbers) of one head as panels, for every head.
    keys: Vec<Line>,
    vals: Vec<Line>,
    /// Scores of one group of tiles, for every thread.
    scores: Vec<Vec<Line>>,
    latent: Buffer,
}

impl Encoder {
    pub fn new(config: &Config, tensors: &Tensors) -> Result<Self, Error> {
        let c = config;
        let (d, p) = (c.encoder_dim, c.patch_size);
        let one = Groups::one;
        let side = c.image_size / p;
        let tokens = side * side + 1;

        // (D, channel, y, x) to (D, y, x, channel), with the pixels' mean and standard deviation folded in.
        let official = Linear::read(tensors, "encoder.embeddings.patch_embeddings.projection", d, 3 * p * p, true)?;
        let mut patch = Linear { weight: vec![0.0; d * 3 * p * p], bias: official.bias.clone(), inputs: 3 * p * p };
        for n in 0..d {
            for i in 0..p * p {
                for channel in 0..3 {
                    let w = official.weight[(n * 3 + channel) * p * p + i];
                    patch.weight[(n * p * p + i) * 3 + channel] = w / (255.0 * STD[channel]);
                    patch.bias[n] -= w * MEAN[channel] / STD[channel];
                }
            }
        }
        let positions = values(tensors, "encoder.embeddings.position_embeddings", tokens * d)?;
        let first = values(tensors, "encoder.embeddings.cls_token", d)?;
        let start = positions.chunks_exact(d).enumerate().flat_map(|(t, position)| {
            let offset = if t == 0 { &first } else { &patch.bias };
            padded_lines(&position.iter().zip(offset).map(|(a, b)| a + b).collect::<Vec<_>>())
        });
        let start = start.collect();

        let head = d / c.encoder_heads;
        let heads = Groups { count: c.encoder_heads, width: head };
        let mut layers = Vec::new();
        for layer in 0..c.encoder_depth {
            let name = format!("encoder.layers.{layer}");
            let read =
                |part: &str, outputs, inputs| Linear::read(tensors, &format!("{name}.{part}"), outputs, inputs, true);
            let normed = |linear: Linear, norm: &str| -> Result<Linear, Error> {
                let gain = values(tensors, &format!("{name}.{norm}.weight"), d)?;
                Ok(linear.after_norm(&gain, &values(tensors, &format!("{name}.{norm}.bias"), d)?))
            };
            let part = |part: &str, factor: f64| -> Result<Packed, Error> {
                let linear = normed(read(&format!("attention.{part}_proj"), d, d)?, "layernorm_before")?;
                Ok(Packed::new(&linear.scaled(|_| factor), one(d), heads, 1))
            };
            layers.push(Layer {
                qkv: [part("q", (head as f64).powf(-0.5))?, part("k", 1.0)?, part("v", 1.0)?],
                out: Packed::new(&read("attention.o_proj", d, d)?, heads, one(d), 1),
                mlp: Mlp::new(
                    &normed(read("mlp.fc1", c.encoder_mlp, d)?, "layernorm_after")?,
                    &read("mlp.fc2", d, c.encoder_mlp)?,
                    1,
                ),
            });
        }
        let gain = values(tensors, "encoder.layernorm.weight", d)?;
        let offset = values(tensors, "encoder.layernorm.bias", d)?;
        let [up, down] = projector(tensors, "projector", d, c.projector_hidden, c.embed_dim)?;
        Ok(Self {
            config: c.clone(),
            patch: Packed::new(&patch, one(3 * p * p), one(d), 1),
            start,
            layers,
            projector: Mlp::new(&up.after_norm(&gain, &offset), &down, 1),
            tokens,
            zeros: vec![Line::ZERO; lines(tokens).max(lines(head))],
        })
    }

    pub fn workspace(&self, k: &Kernels, threads: usize) -> Workspace {
        let c = &self.config;
        let tiles = self.tokens.div_ceil(k.tile);
        let buffer = |lines| Buffer::new(tiles, k.tile, lines);
        let (d, heads) = (lines(c.encoder_dim), self.heads() * c.encoder_heads);
        let widest = d.max(lines(c.embed_dim));
        // A head's panels: tokens in both directions are padded.
        let (wide, deep) = (lines(self.tokens), padded(self.tokens));
        Workspace {
            patches: buffer(self.patch.units),
            x: buffer(d),
            a: buffer(d),
            q: buffer(heads),
            k: buffer(heads),
            v: buffer(heads),
            attended: buffer(heads),
            y: buffer(widest),
            hidden: buffer(lines(super::predictor::CHUNK)),
            keys: vec![Line::ZERO; c.encoder_heads * wide * self.heads() * LANES],
            vals: vec![Line::ZERO; c.encoder_heads * self.heads() * deep],
            scores: (0..threads).map(|_| vec![Line::ZERO; (GROUP * k.tile + 1) * wide]).collect(),
            latent: Buffer::new(1, k.tile, lines(c.embed_dim)),
        }
    }

    /// Lines of a head.
    fn heads(&self) -> usize {
        lines(self.config.encoder_dim / self.config.encoder_heads)
    }

    /// Encodes one frame, (size, size, 3), into `out` (D,).
    ///
    /// # Safety
    /// The processor has `k`; `space` was made for it and for as many threads as `pool` has.
    pub unsafe fn run(&self, k: &Kernels, pool: &Pool, space: &mut Workspace, frame: &[u8], out: &mut [f32]) {
        let c = &self.config;
        let d = lines(c.encoder_dim);
        let heads = c.encoder_heads;
        let tiles = self.tokens.div_ceil(k.tile);
        let s = Shared {
            patches: space.patches.rows(),
            x: space.x.rows(),
            a: space.a.rows(),
            q: space.q.rows(),
            k: space.k.rows(),
            v: space.v.rows(),
            attended: space.attended.rows(),
            y: space.y.rows(),
            hidden: space.hidden.rows(),
            keys: space.keys.as_mut_ptr(),
            vals: space.vals.as_mut_ptr(),
            scores: space.scores.iter_mut().map(Vec::as_mut_ptr).collect(),
        };
        // Calls `f(first tile, tiles, worker)` for groups of the first `tiles` tiles.
        let groups = |tiles: usize, f: &(dyn Fn(usize, usize, usize) + Sync)| {
            pool.run(tiles.div_ceil(GROUP), &|i, worker| f(i * GROUP, GROUP.min(tiles - i * GROUP), worker));
        };
        let rows = |first: usize, count: usize| (self.tokens - first * k.tile).min(count * k.tile);
        let norm = |s: &Shared, first: usize, count: usize| {
            let (x, out) = (s.x.skip(first), s.a.skip(first));
            (k.norm)(&Norm { x, out, tiles: count, width: c.encoder_dim, eps: EPS });
        };

        groups(tiles, &|first, count, _| {
            let s = &s;
            self.gather(frame, s.patches, first * k.tile, rows(first, count));
            let x = s.x.skip(first);
            for row in 0..rows(first, count) {
                let from = &self.start[(first * k.tile + row) * d..][..d];
                for (line, from) in from.iter().enumerate() {
                    *x.at(row, line) = *from;
                }
            }
            product(k, s.patches.skip(first), count, &self.patch, Start::Rest(x), End::Store(x));
        });

        for (l, layer) in self.layers.iter().enumerate() {
            groups(tiles, &|first, count, _| {
                let s = &s;
                norm(s, first, count);
                for (w, to) in layer.qkv.iter().zip([s.q, s.k, s.v]) {
                    run(k, s.a.skip(first), count, w, End::Store(to.skip(first)));
                }
            });
            pool.run(heads, &|h, _| self.pack(&s, h));
            // Only the first token leaves the last layer.
            let last = l + 1 == self.layers.len();
            groups(if last { 1 } else { tiles }, &|first, count, worker| {
                let s = &s;
                for h in 0..heads {
                    self.attend(k, s, h, first, count, worker);
                }
                run(k, s.attended.skip(first), count, &layer.out, End::Residual(s.x.skip(first), None));
                norm(s, first, count);
                let end = End::Residual(s.x.skip(first), None);
                layer.mlp.run(k, s.a.skip(first), count, s.hidden.skip(first), s.y.skip(first), end);
            });
        }
        (k.norm)(&Norm { x: s.x, out: s.a, tiles: 1, width: c.encoder_dim, eps: EPS });
        let latent = space.latent.rows();
        self.projector.run(k, s.a, 1, s.hidden, s.y, End::Store(latent));
        for (line, out) in out.chunks_mut(LANES).enumerate() {
            let line = *latent.at(0, line);
            out.copy_from_slice(&line.0[..out.len()]);
        }
    }

    /// Copies the patches of `rows` tokens from token `first` on, (y, x, channel) of 0 to 255.
    unsafe fn gather(&self, frame: &[u8], patches: Rows, first: usize, rows: usize) {
        let (size, p) = (self.config.image_size, self.config.patch_size);
        for token in first.max(1)..first + rows {
            let (top, left) = ((token - 1) / (size / p) * p, (token - 1) % (size / p) * p);
            let mut i = 0;
            for y in top..top + p {
                for &pixel in &frame[(y * size + left) * 3..][..3 * p] {
                    (*patches.at(token, i / LANES)).0[i % LANES] = f32::from(pixel);
                    i += 1;
                }
            }
        }
    }

    /// Keys and values of head `h` as panels.
    unsafe fn pack(&self, s: &Shared, h: usize) {
        let head = self.heads();
        let (wide, deep) = (lines(self.tokens), padded(self.tokens));
        let keys = s.keys.add(h * wide * head * LANES);
        let vals = s.vals.add(h * head * deep);
        for token in 0..self.tokens {
            for line in 0..head {
                let key = (*s.k.at(token, h * head + line)).0;
                let panel = keys.add((token / LANES) * head * LANES + line * LANES);
                for (word, key) in key.into_iter().enumerate() {
                    (*panel.add(word)).0[token % LANES] = key;
                }
                *vals.add(line * deep + token) = *s.v.at(token, h * head + line);
            }
        }
    }

    /// Attention of head `h` for the tokens of some tiles.
    unsafe fn attend(&self, k: &Kernels, s: &Shared, h: usize, first: usize, count: usize, worker: usize) {
        let head = self.heads();
        let (wide, deep) = (lines(self.tokens), padded(self.tokens));
        let scores = Rows { data: s.scores[worker], tile: k.tile, lines: wide };
        let row = s.scores[worker].add(GROUP * k.tile * wide);
        let keys = super::gemm::Product {
            a: s.q.skip(first).columns(h * head),
            tiles: count,
            units: head,
            w: s.keys.add(h * wide * head * LANES),
            stride: head * LANES,
            panels: wide,
        };
        let nothing = Start::Bias(self.zeros.as_ptr().cast());
        (k.product)(&keys, &nothing, &End::Store(scores));
        for r in 0..count * k.tile {
            let weights = std::slice::from_raw_parts_mut(row.cast::<f32>(), wide * LANES);
            for line in 0..wide {
                *row.add(line) = *scores.at(r, line);
            }
            (k.softmax)(weights, self.tokens);
            for line in 0..wide {
                *scores.at(r, line) = *row.add(line);
            }
        }
        let vals = super::gemm::Product {
            a: scores,
            tiles: count,
            units: wide,
            w: s.vals.add(h * head * deep),
            stride: deep,
            panels: head,
        };
        let to = s.attended.skip(first).columns(h * head);
        (k.product)(&vals, &nothing, &End::Store(to));
    }
}

/// Tiles that are one task.
const GROUP: usize = 4;

/// The buffers as the threads see them: each task writes rows of its own.
struct Shared {
    patches: Rows,
    x: Rows,
    a: Rows,
    q: Rows,
    k: Rows,
    v: Rows,
    attended: Rows,
    y: Rows,
    hidden: Rows,
    keys: *mut Line,
    vals: *mut Line,
    scores: Vec<*mut Line>,
}

// SAFETY: tasks of one phase write disjoint rows, heads or workers' scratch, and phases do not overlap.
unsafe impl Sync for Shared {}
