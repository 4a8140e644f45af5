//! The predictor rollout with the least work that gives the same answer.
//!
//! Candidates are independent of each other, so a block of them goes through the whole rollout on one thread. Within it:
//! * an action's modulation of all layers is computed once, when the action enters the window;
//! * while the window grows, keys and values of earlier positions are kept; when it slides, positions are relative to the
//!   window, so all its tokens are computed anew; an action-prefix model has no window, but passes, whose positions are
//!   all computed together;
//! * the last layer computes queries, outputs and the MLP for the last position only;
//! * position 0 sees only itself: its attention is one map, `W_o W_v`, without queries and scores;
//! * keys and values are computed where a later position needs them;
//! * linear maps that follow each other, norms' gains and the BatchNorm are folded into one map beforehand.

use std::ops::Range;

use super::gemm::{End, Gate, Product, Start};
use super::kernels::Kernels;
use super::layout::{lines, padded, Buffer, Line, Rows, LANES};
use super::rows::{Attend, Modulate, Norm};
use super::weights::{line_up, padded_lines, values, Groups, Linear, Packed, Tensors};
use super::Config;
use crate::Error;

/// Epsilon of the norms without gain, and of those with one.
const EPS: [f32; 2] = [1e-6, 1e-5];
const BATCH_NORM_EPS: f64 = 1e-5;
/// Attention works through so many words of heads at a time, an MLP through so many words of hidden units.
const HEADS: usize = 64;
pub(super) const CHUNK: usize = 128;
/// Most tiles that a block of candidates has, and that go through a layer together, positions counted: enough to use a panel
/// of weights often while it is near, few enough for what a layer works on to stay in a level 2 cache.
pub(super) const BLOCK: usize = 40;
const PART: usize = 40;

/// Two linear maps with a GELU between them, in chunks of hidden units: up, and down, whose first chunk has the bias.
pub(super) struct Mlp(Vec<[Packed; 2]>);

struct Layer {
    groups: Vec<Heads>,
    /// From a token to what attention gives the position that sees only itself, `W_o W_v`.
    alone: Packed,
    mlp: Mlp,
}

/// A group of heads: queries, keys and values, and its part of the way back to tokens; the first group's has the bias.
struct Heads {
    queries: Packed,
    keys: Packed,
    values: Packed,
    out: Packed,
}

pub(super) struct Predictor {
    config: Config,
    /// Blocks to hidden, hidden to condition; a SiLU after each.
    action: [Packed; 2],
    /// Condition to (shift, scale, gate) of attention and MLP of all layers; 1 is already added to the scales.
    modulation: Packed,
    /// Latent to token where the widths differ, with a bias for each position.
    input: Option<Packed>,
    positions: Vec<Vec<Line>>,
    layers: Vec<Layer>,
    /// Last norm's output to hidden, hidden to latent.
    output: Mlp,
    /// Heads in a group and lines of a head.
    group: usize,
    head: usize,
}

/// What one thread needs for a block of candidates; grows with the largest block that it has seen.
#[derive(Default)]
pub(super) struct Workspace {
    shape: Shape,
    buffers: Option<Buffers>,
}

#[derive(Clone, Copy, Default, PartialEq)]
struct Shape {
    tiles: usize,
    tokens: usize,
    grows: bool,
}

struct Buffers {
    /// Latents of every token, modulations of every slot, tokens of every position.
    z: Buffer,
    modulation: Buffer,
    x: Buffer,
    /// Operand and sums of every position.
    a: Buffer,
    y: Buffer,
    raw: Buffer,
    raw_operand: Buffer,
    action: Buffer,
    condition: Buffer,
    /// Queries, keys, values and results of a group of heads, at every position.
    q: Buffer,
    kv: [Buffer; 2],
    attended: Buffer,
    /// Keys and values of all layers, positions and heads, while the window grows.
    cache: [Buffer; 2],
    hidden: Buffer,
    scratch: Vec<Line>,
    scores: Vec<f32>,
    views: Views,
    /// Positions that the buffers have room for: the window, or the tokens where they are fewer.
    window: usize,
}

/// A matrix for each position of a window.
#[derive(Default)]
struct Views {
    slots: Vec<Rows>,
    gates: Vec<Rows>,
    keys: Vec<Rows>,
    vals: Vec<Rows>,
}

/// A rollout: E * S candidates, row (e, s).
#[derive(Clone, Copy)]
pub(super) struct Rollout<'a> {
    /// Latents of the observed frames (E, T, D).
    pub z: &'a [f32],
    /// Normalised blocks between them (E, T - 1, A).
    pub past: &'a [f32],
    /// Normalised candidates (E, S, H, A).
    pub candidates: &'a [f32],
    pub frames: usize,
    pub samples: usize,
    pub horizon: usize,
    /// Whether all latents are asked for, not only the last one.
    pub every: bool,
}

impl Rollout<'_> {
    fn tokens(&self) -> usize {
        self.frames + self.horizon
    }
}

/// The window or pass that starts at token `start`: its positions `from..=last` are computed, those from `leaving` on
/// predict. `slot` has the modulation of position 0. `cached`: keys and values of those before are kept, or these will be
/// needed.
#[derive(Clone, Copy)]
struct Positions {
    start: usize,
    slot: usize,
    from: usize,
    last: usize,
    leaving: usize,
    cached: bool,
}

/// Tiles `first..first + tiles` of a block of `of` tiles; `rows` of their rows are candidates.
#[derive(Clone, Copy)]
struct Part {
    of: usize,
    first: usize,
    tiles: usize,
    rows: usize,
}

impl Predictor {
    pub fn new(config: &Config, tensors: &Tensors, k: &Kernels) -> Result<Self, Error> {
        let (c, words, bulk) = (config, k.group, k.bulk_group);
        let (d, inner) = (c.predictor_dim, c.predictor_heads * c.predictor_head_dim);
        let read = |name: &str, outputs, inputs| Linear::read(tensors, name, outputs, inputs, true);
        let one = Groups::one;

        let smooth = read("action_encoder.patch_embed", c.action_smoothed, c.block_dim)?;
        let hidden = read("action_encoder.embed.0", c.action_hidden, c.action_smoothed)?.after(&smooth);
        let mut condition = read("action_encoder.embed.2", c.embed_dim, c.action_hidden)?;
        let same = c.embed_dim == d;
        let name = "predictor.transformer";
        if !same {
            condition = read(&format!("{name}.cond_proj"), d, c.embed_dim)?.after(&condition);
        }
        let action = [
            Packed::new(&hidden, one(c.block_dim), one(c.action_hidden), words),
            Packed::new(&condition, one(c.action_hidden), one(d), words),
        ];

        let embedding = values(tensors, "predictor.pos_embedding", c.positions() * c.embed_dim)?;
        let input = if same { None } else { Some(read(&format!("{name}.input_proj"), d, c.embed_dim)?) };
        let positions = embedding
            .chunks_exact(c.embed_dim)
            .map(|position| match &input {
                None => padded_lines(position),
                Some(input) => {
                    let at = Linear { weight: position.to_vec(), bias: vec![0.0; c.embed_dim], inputs: 1 };
                    let at = input.after(&at);
                    padded_lines(&at.weight.iter().zip(&at.bias).map(|(w, b)| w + b).collect::<Vec<_>>())
                }
            })
            .collect();

        let heads = (HEADS * words / padded(c.predictor_head_dim)).clamp(1, c.predictor_heads);
        let mut adaptive = Linear { weight: Vec::new(), bias: Vec::new(), inputs: d };
        let mut layers = Vec::new();
        for layer in 0..c.predictor_depth {
            let name = format!("{name}.layers.{layer}");
            let map = read(&format!("{name}.adaLN_modulation.1"), 6 * d, d)?;
            adaptive.weight.extend(map.weight);
            adaptive.bias.extend(map.bias.iter().enumerate().map(|(i, b)| b + f64::from(u8::from(i / d % 3 == 1))));

            let normed = |linear: Linear, norm: &str| -> Result<Linear, Error> {
                let gain = values(tensors, &format!("{norm}.weight"), d)?;
                Ok(linear.after_norm(&gain, &values(tensors, &format!("{norm}.bias"), d)?))
            };
            let qkv = Linear::read(tensors, &format!("{name}.attn.to_qkv"), 3 * inner, d, false)?;
            let qkv = normed(qkv, &format!("{name}.attn.norm"))?;
            let scale = (c.predictor_head_dim as f64).powf(-0.5);
            let qkv = qkv.scaled(|i| if i < inner { scale } else { 1.0 });
            let out = read(&format!("{name}.attn.to_out.0"), d, inner)?;
            let alone = out.after(&qkv.outputs_of(2 * inner..3 * inner));
            let groups = (0..c.predictor_heads).step_by(heads).map(|first| {
                let group = Groups { count: heads.min(c.predictor_heads - first), width: c.predictor_head_dim };
                let (from, width) = (first * group.width, group.count * group.width);
                let of = |part: usize| {
                    let linear = qkv.outputs_of(part * inner + from..part * inner + from + width);
                    Packed::new(&linear, one(d), group, bulk)
                };
                let out = Packed::new(&out.inputs_of(from..from + width), group, one(d), words);
                Heads { queries: of(0), keys: of(1), values: of(2), out }
            });
            let up = normed(read(&format!("{name}.mlp.net.1"), c.predictor_mlp, d)?, &format!("{name}.mlp.net.0"))?;
            let down = read(&format!("{name}.mlp.net.4"), d, c.predictor_mlp)?;
            layers.push(Layer {
                groups: groups.collect(),
                alone: Packed::new(&alone, one(d), one(d), bulk),
                mlp: Mlp::new(&up, &down, bulk),
            });
        }

        let gain = values(tensors, &format!("{name}.norm.weight"), d)?;
        let offset = values(tensors, &format!("{name}.norm.bias"), d)?;
        let [mut up, down] = projector(tensors, "pred_proj", c.embed_dim, c.projector_hidden, c.embed_dim)?;
        if !same {
            up = up.after(&read(&format!("{name}.output_proj"), c.embed_dim, d)?);
        }
        let mut output = Mlp::new(&up.after_norm(&gain, &offset), &down, words);
        let modulation = Groups { count: 6 * c.predictor_depth, width: d };
        line_up(layers.iter_mut().flat_map(Layer::in_order).chain(output.in_order()));
        Ok(Self {
            config: c.clone(),
            action,
            modulation: Packed::new(&adaptive, one(d), modulation, words),
            input: input.map(|input| Packed::new(&input, one(c.embed_dim), one(d), words)),
            positions,
            layers,
            output,
            group: heads,
            head: lines(c.predictor_head_dim),
        })
    }

    fn buffers(&self, k: &Kernels, shape: Shape) -> Buffers {
        let c = &self.config;
        let (w, tiles) = (c.positions().min(shape.tokens), shape.tiles);
        let actions = if c.action_prefix { w * tiles } else { tiles };
        let local = (w * tiles).min(PART.max(w));
        let buffer = |tiles, lines| Buffer::new(tiles, k.tile, lines);
        let (d, heads) = (lines(c.predictor_dim), self.group * self.head);
        let groups = c.predictor_depth * c.predictor_heads.div_ceil(self.group);
        let cached = if shape.grows { groups * w * tiles } else { 0 };
        // An operand of bytes has a line of scales.
        let operand = |width: usize, group: usize| lines(width).div_ceil(group) + usize::from(group == 4);
        let hidden = |width: usize, group: usize| operand(width.min(CHUNK * group), group);
        let latents = lines(c.embed_dim);
        Buffers {
            z: buffer(shape.tokens * tiles, latents),
            modulation: buffer(w * tiles, 6 * c.predictor_depth * d),
            x: buffer(local, d),
            a: buffer(local, operand(c.predictor_dim, k.bulk_group).max(d.max(latents) / k.group)),
            y: buffer(local, d.max(latents)),
            raw: buffer(actions, lines(c.block_dim)),
            raw_operand: buffer(actions, lines(c.block_dim) / k.group),
            action: buffer(actions, lines(c.action_hidden) / k.group),
            condition: buffer(actions, d / k.group),
            q: buffer(local, heads),
            kv: [buffer(local, heads), buffer(local, heads)],
            attended: buffer(local, heads / k.group),
            cache: [buffer(cached, heads), buffer(cached, heads)],
            hidden: buffer(local, hidden(c.predictor_mlp, k.bulk_group).max(hidden(c.projector_hidden, k.group))),
            scratch: vec![Line::ZERO; d * k.tile],
            scores: vec![0.0; w * LANES],
            views: Views::default(),
            window: w,
        }
    }

    /// Tiles that a block of candidates should have at most.
    pub fn block(&self, horizon: usize) -> usize {
        let together = if self.config.action_prefix { horizon.min(self.config.prefix_blocks) } else { 1 };
        (BLOCK / together).max(1)
    }

    /// Rolls candidates `first..first + rows` out; `done` gets the latents of every token, as rows 0..rows.
    ///
    /// # Safety
    /// The processor has `k`. The slices of `job` have the shapes that it says.
    pub unsafe fn run(
        &self,
        k: &Kernels,
        space: &mut Workspace,
        job: &Rollout<'_>,
        first: usize,
        rows: usize,
        done: impl FnOnce(&dyn Fn(usize) -> Rows),
    ) {
        let c = &self.config;
        let (window, tn) = (c.history, rows.div_ceil(k.tile));
        let shape = Shape {
            tiles: tn.max(space.shape.tiles),
            tokens: job.tokens().max(space.shape.tokens),
            grows: space.shape.grows || (job.frames < window && job.horizon > 1),
        };
        if space.buffers.is_none() || space.shape != shape {
            space.buffers = Some(self.buffers(k, shape));
            space.shape = shape;
        }
        let Some(b) = &mut space.buffers else { return };
        let z = b.z.rows();
        for row in 0..rows {
            let env = (first + row) / job.samples;
            for t in 0..job.frames {
                let from = &job.z[(env * job.frames + t) * c.embed_dim..][..c.embed_dim];
                write_row(z.skip(t * tn), row, from);
            }
        }
        let (mut t, end) = (job.frames, job.tokens()); // the first latent that is not known yet
        let mut known = 0; // actions whose modulation is there
        while t < end {
            let positions = if c.action_prefix {
                let last = (end - t).min(c.prefix_blocks) - 1;
                self.modulate_by(k, b, job, first, rows, t - 1..t + last, 0);
                let leaving = if job.every { 0 } else { last };
                Positions { start: t - 1, slot: 0, from: 0, last, leaving, cached: false }
            } else {
                let start = t.saturating_sub(window);
                for action in known.max(start)..t {
                    self.modulate_by(k, b, job, first, rows, action..action + 1, action % b.window);
                }
                known = t;
                let last = t - start - 1;
                let from = if start == 0 && t > job.frames { last } else { 0 };
                let grows = start == 0 && t < window && t + 1 < end;
                let slot = start % b.window;
                Positions { start, slot, from, last, leaving: last, cached: grows || from > 0 }
            };
            let Positions { start, from, last, .. } = positions;
            t = start + last + 2;
            let parts = tn.div_ceil((PART / (last + 1 - from)).max(1));
            for part in 0..parts {
                let (from, to) = (part * tn / parts, (part + 1) * tn / parts);
                let rows = (rows - from * k.tile).min((to - from) * k.tile);
                self.step(k, b, positions, Part { of: tn, first: from, tiles: to - from, rows });
            }
        }
        done(&|t| z.skip(t * tn));
    }

    /// Computes the modulation of some actions of the sequence, in slots from `slot` on.
    #[allow(clippy::too_many_arguments)] // the insides of `run`
    unsafe fn modulate_by(
        &self,
        k: &Kernels,
        b: &mut Buffers,
        job: &Rollout<'_>,
        first: usize,
        rows: usize,
        actions: Range<usize>,
        slot: usize,
    ) {
        let (width, tn) = (self.config.block_dim, rows.div_ceil(k.tile));
        let (raw, operand) = (b.raw.rows(), b.raw_operand.rows());
        let count = actions.len() * tn;
        for (i, action) in actions.enumerate() {
            let raw = raw.skip(i * tn);
            for row in 0..rows {
                let (env, history) = ((first + row) / job.samples, job.frames - 1);
                let from = if action < history {
                    &job.past[(env * history + action) * width..]
                } else {
                    &job.candidates[((first + row) * job.horizon + action - history) * width..]
                };
                write_row(raw, row, &from[..width]);
            }
            (k.convert)(raw, operand.skip(i * tn), rows, lines(width));
        }
        let (hidden, condition) = (b.action.rows(), b.condition.rows());
        run(k, operand, count, &self.action[0], End::Silu(hidden));
        run(k, hidden, count, &self.action[1], End::Silu(condition));
        run(k, condition, count, &self.modulation, End::Store(b.modulation.rows().skip(slot * tn)));
    }

    /// Predicts, for some candidates, the latent that follows a window, or those of a pass.
    unsafe fn step(&self, k: &Kernels, b: &mut Buffers, positions: Positions, part: Part) {
        let c = &self.config;
        let Positions { start, slot, from, last, leaving, cached } = positions;
        let (tn, rows, d) = (part.tiles, part.rows, lines(c.predictor_dim));
        // Of the positions that are computed, (position, part); and of the whole block, (token, slot or position, block).
        let (x, a, y) = (b.x.rows(), b.a.rows(), b.y.rows());
        let (q, attended, hidden) = (b.q.rows(), b.attended.rows(), b.hidden.rows());
        let at = |rows: Rows, p: usize| rows.skip((p - from) * tn);
        let (z, modulation) = (b.z.rows(), b.modulation.rows());
        let whole = |rows: Rows, i: usize| rows.skip(i * part.of + part.first);
        let (kept, local) = (b.cache.each_mut().map(Buffer::rows), b.kv.each_mut().map(Buffer::rows));
        let Views { slots, gates, keys, vals } = &mut b.views;
        let fill = |views: &mut Vec<Rows>, f: &dyn Fn(usize) -> Rows| {
            views.clear();
            views.extend((0..=last).map(f));
        };
        let window = b.window;
        fill(slots, &|p| whole(modulation, (slot + p) % window));

        for p in from..=last {
            let token = if c.action_prefix { start } else { start + p };
            let (token, to) = (whole(z, token), at(x, p));
            match &self.input {
                Some(input) => {
                    (k.convert)(token, a, rows, lines(c.embed_dim));
                    let bias = Start::Bias(self.positions[p].as_ptr().cast());
                    product(k, a, tn, input, bias, End::Store(to));
                }
                None => add_rows(token, &self.positions[p], to, rows),
            }
        }

        for (l, layer) in self.layers.iter().enumerate() {
            // Positions that leave this layer.
            let queries = if l + 1 == self.layers.len() { leaving } else { from };
            // Shift, scale and gate of attention, then of the MLP.
            let piece = |slot: Rows, j: usize| slot.columns((l * 6 + j) * d);
            let modulate = |p: usize, j: usize, slot: Rows, scratch: &mut [Line]| {
                let (shift, scale) = (piece(slot, j), piece(slot, j + 1));
                let (x, out) = (at(x, p), at(a, p));
                let m = Modulate { x, scale, shift, out, tiles: tn, width: c.predictor_dim, eps: EPS };
                (k.modulate)(&m, scratch.as_mut_ptr().cast());
            };
            let residual = |p: usize, gates: &[Rows]| {
                End::Residual(at(x, p), Some(Gate { slots: gates[p..].as_ptr(), tiles: tn }))
            };

            for p in from..=last {
                modulate(p, 0, slots[p], &mut b.scratch);
            }
            fill(gates, &|p| piece(slots[p], 2));
            // Position 0 is asked for keys and values only if another position will look at it.
            let groups = if last > 0 || cached { &layer.groups[..] } else { &[] };
            let asking = queries.max(1);
            for (g, group) in groups.iter().enumerate() {
                let kv = |i: usize, p: usize| {
                    if cached {
                        whole(kept[i], (l * groups.len() + g) * window + p)
                    } else {
                        at(local[i], p)
                    }
                };
                for p in from..=last {
                    // Positions lie behind each other in the local buffers: one product for all.
                    let count = if cached { tn } else { (last + 1 - from) * tn };
                    run(k, at(a, p), count, &group.keys, End::Store(kv(0, p)));
                    run(k, at(a, p), count, &group.values, End::Store(kv(1, p)));
                    if !cached {
                        break;
                    }
                }
                if asking > last {
                    continue;
                }
                let count = (last + 1 - asking) * tn;
                run(k, at(a, asking), count, &group.queries, End::Store(at(q, asking)));
                fill(keys, &|p| kv(0, p));
                fill(vals, &|p| kv(1, p));
                for p in asking..=last {
                    let (k_rows, v_rows) = (&keys[..=p], &vals[..=p]);
                    let (q, out) = (at(q, p), at(attended, p));
                    let heads = group.queries.panels / self.head;
                    let m = Attend { q, k: k_rows, v: v_rows, out, tiles: tn, heads, lines: self.head };
                    (k.attend)(&m, &mut b.scores);
                }
                let sum = at(y, asking);
                let begin = if g == 0 { Start::Bias(group.out.bias()) } else { Start::Rest(sum) };
                let end = if g + 1 == groups.len() { residual(asking, gates) } else { End::Store(sum) };
                product(k, at(attended, asking), count, &group.out, begin, end);
            }
            if queries == 0 {
                run(k, a, tn, &layer.alone, residual(0, gates));
            }

            for p in queries..=last {
                modulate(p, 3, slots[p], &mut b.scratch);
            }
            fill(gates, &|p| piece(slots[p], 5));
            let count = (last + 1 - queries) * tn;
            layer.mlp.run(k, at(a, queries), count, hidden, y, residual(queries, gates));
        }

        for p in leaving..=last {
            let (x, out) = (at(x, p), at(a, p));
            (k.norm)(&Norm { x, out, tiles: tn, width: c.predictor_dim, eps: EPS[1] });
            self.output.run(k, out, tn, hidden, y, End::Store(whole(z, start + p + 1)));
        }
    }
}

/// Both linear maps of a projector, the BatchNorm between them folded into the first.
pub(super) fn projector(
    tensors: &Tensors,
    name: &str,
    inputs: usize,
    hidden: usize,
    outputs: usize,
) -> Result<[Linear; 2], Error> {
    let norm = |part: &str| values(tensors, &format!("{name}.net.1.{part}"), hidden);
    let (gain, offset, mean, variance) = (norm("weight")?, norm("bias")?, norm("running_mean")?, norm("running_var")?);
    if let Some(x) = variance.iter().find(|x| **x < 0.0) {
        return Err(Error::Argument(format!("{name}.net.1.running_var of the weights must not be negative, got {x}")));
    }
    let rate = |i: usize| gain[i] / (variance[i] + BATCH_NORM_EPS).sqrt();
    let mut up = Linear::read(tensors, &format!("{name}.net.0"), hidden, inputs, true)?.scaled(rate);
    for (i, bias) in up.bias.iter_mut().enumerate() {
        *bias += offset[i] - mean[i] * rate(i);
    }
    Ok([up, Linear::read(tensors, &format!("{name}.net.3"), outputs, hidden, true)?])
}

impl Layer {
    /// Its matrices as a window uses them.
    fn in_order(&mut self) -> impl Iterator<Item = &mut Packed> {
        let groups = self.groups.iter_mut().flat_map(|g| [&mut g.keys, &mut g.values, &mut g.queries, &mut g.out]);
        groups.chain([&mut self.alone]).chain(self.mlp.in_order())
    }
}

impl Mlp {
    pub fn new(up: &Linear, down: &Linear, group: usize) -> Self {
        let (chunk, hidden) = (CHUNK * group, up.outputs());
        let part = |first: usize| {
            let units = first..hidden.min(first + chunk);
            let (width, outputs) = (Groups::one(units.len()), Groups::one(down.outputs()));
            let rest = down.inputs_of(units.clone());
            [
                Packed::new(&up.outputs_of(units), Groups::one(up.inputs), width, group),
                if group == 4 {
                    Packed::bytes(&rest, width, outputs, true)
                } else {
                    Packed::new(&rest, width, outputs, group)
                },
            ]
        };
        let mut parts: Vec<_> = (0..hidden).step_by(chunk).map(part).collect();
        if let [[_, first], others @ ..] = &mut parts[..] {
            for [_, other] in others {
                first.add_bias(other);
            }
        }
        Self(parts)
    }

    fn in_order(&mut self) -> impl Iterator<Item = &mut Packed> {
        self.0.iter_mut().flatten()
    }

    /// `down(gelu(up(a)))`; `hidden` holds a chunk of hidden units, `y` the sum between two chunks.
    pub unsafe fn run(&self, k: &Kernels, a: Rows, tiles: usize, hidden: Rows, y: Rows, end: End) {
        for (i, [up, down]) in self.0.iter().enumerate() {
            run(k, a, tiles, up, End::Gelu(hidden));
            let begin = if i == 0 { Start::Bias(down.bias()) } else { Start::Rest(y) };
            let end = if i + 1 == self.0.len() { end } else { End::Store(y) };
            product(k, hidden, tiles, down, begin, end);
        }
    }
}

/// `a w`, starting from its bias.
pub(super) unsafe fn run(k: &Kernels, a: Rows, tiles: usize, w: &Packed, end: End) {
    product(k, a, tiles, w, Start::Bias(w.bias()), end);
}

/// `a w`, starting from `start`.
pub(super) unsafe fn product(k: &Kernels, a: Rows, tiles: usize, w: &Packed, start: Start, end: End) {
    let p = Product { a, tiles, units: w.units, w: w.panel(0), stride: w.stride, panels: w.panels };
    let product = if w.words == k.group { k.product } else { k.bulk };
    product(&p, &start, &end);
}

/// Writes `values` as a row; the padding behind them stays as it is.
pub(super) unsafe fn write_row(to: Rows, row: usize, values: &[f32]) {
    for (line, values) in values.chunks(LANES).enumerate() {
        std::ptr::copy_nonoverlapping(values.as_ptr(), to.at(row, line).cast(), values.len());
    }
}

/// `to = from + offset` for every row.
unsafe fn add_rows(from: Rows, offset: &[Line], to: Rows, rows: usize) {
    for row in 0..rows {
        for (line, offset) in offset.iter().enumerate() {
            let (from, to) = (from.at(row, line), to.at(row, line));
            *to = Line(std::array::from_fn(|lane| (*from).0[lane] + offset.0[lane]));
        }
    }
}
