//! The CPU engine: a trained model's encoder and rollout without torch.
//!
//! * `layout`: how matrices lie in memory; the same for every instruction set.
//! * `simd`: the instructions; `gemm` and `rows`: matrix products with fused ends and what happens between them, written once
//!   over the instructions; `amx`: products on tiles; `bytes`: what differs for int8; `kernels`: all compiled for every
//!   instruction set, chosen at run time.
//! * [`sigreg`]: the regulariser of training, which lives here for these instructions and products.
//! * `weights`: named tensors to folded and packed matrices; [`encoder`](Engine::encode) and [`rollout`](Engine::rollout).
//!
//! A candidate's numbers do not depend on the candidates beside it, nor on the number of threads: bit for bit.
#![allow(unsafe_code)] // instructions, and buffers that threads share by rows
#![allow(clippy::inline_always)] // a kernel compiled by itself would be compiled without its instruction set
#![allow(clippy::needless_range_loop)] // an index that is known when this is compiled keeps a sum in its register

#[cfg(any(test, all(target_arch = "x86_64", target_os = "linux")))]
mod amx;
#[doc(hidden)]
pub mod bench;
#[cfg(target_arch = "x86_64")]
mod bytes;
mod encoder;
mod gemm;
mod head;
mod kernels;
mod layout;
mod predictor;
mod rows;
pub mod sigreg;
mod simd;
#[cfg(test)]
mod tests;
mod weights;

use std::fmt;
use std::hint::black_box;
use std::sync::{Arc, Barrier, Mutex, PoisonError};
use std::thread;
use std::time::Instant;

pub use kernels::Precision;
pub use weights::{Tensor, Tensors};

use crate::pool::Pool;
use crate::Error;
use encoder::Encoder;
use head::Head;
use kernels::Kernels;
use layout::{Line, Rows, LANES};
use predictor::{write_row, Predictor, Rollout};

/// Architecture of a model; the fields are those of the model file.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // named as in the model file
pub struct Config {
    pub image_size: usize,
    pub patch_size: usize,
    pub encoder_dim: usize,
    pub encoder_depth: usize,
    pub encoder_heads: usize,
    pub encoder_mlp: usize,
    pub embed_dim: usize,
    pub projector_hidden: usize,
    pub predictor_dim: usize,
    pub predictor_depth: usize,
    pub predictor_heads: usize,
    pub predictor_head_dim: usize,
    pub predictor_mlp: usize,
    pub history: usize,
    /// Width A of an action block.
    pub block_dim: usize,
    pub action_smoothed: usize,
    pub action_hidden: usize,
    pub distance_head: bool,
    pub action_prior: bool,
    pub prior_blocks: usize,
    pub head_hidden: usize,
    pub action_prefix: bool,
    pub prefix_blocks: usize,
}

impl Config {
    /// Tokens that the predictor sees at most.
    fn positions(&self) -> usize {
        if self.action_prefix {
            self.prefix_blocks
        } else {
            self.history
        }
    }
}

/// What a candidate costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cost {
    /// The squared distance of the last imagined latent to the goal, summed over D.
    Latent,
    /// The action blocks between the two that the model's distance head estimates.
    Distance,
}

impl Cost {
    /// The cost that the Python side calls `name`.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "latent" => Some(Self::Latent),
            "distance" => Some(Self::Distance),
            _ => None,
        }
    }
}

/// Where candidates shall lead, and how far they are from it.
#[derive(Clone, Copy, Debug)]
pub struct Goal<'a> {
    /// A latent for each environment (E, D).
    pub latents: &'a [f32],
    /// What is measured.
    pub cost: Cost,
}

/// The same as padded lines, of what the head makes of the latents where it is asked.
#[derive(Debug)]
struct Goals {
    lines: Vec<Line>,
    cost: Cost,
}

/// A model ready to encode and to imagine on this processor.
pub struct Engine {
    config: Config,
    exact: &'static Kernels,
    kernels: &'static Kernels,
    encoder: Encoder,
    predictor: Predictor,
    distance: Option<Head>,
    prior: Option<Head>,
    pool: Arc<Pool>,
    /// Workspaces that no call uses now.
    encoding: Mutex<Vec<encoder::Workspace>>,
    rolling: Mutex<Vec<predictor::Workspace>>,
}

/// Takes a finished block: its first row, its rows, and the latents of a token.
type Done<'a> = dyn Fn(usize, usize, &dyn Fn(usize) -> Rows) + Sync + 'a;

/// A pointer that tasks share; each writes its own part.
struct Parts<T>(*mut T);
// SAFETY: every user writes disjoint parts.
unsafe impl<T> Sync for Parts<T> {}

impl Engine {
    /// Folds and packs the weights, `tensors` under their official names.
    ///
    /// `cpu` names the instruction set to use instead of the best: one of [`Engine::instruction_sets`].
    ///
    /// # Errors
    /// [`Error::Argument`]: a tensor that is missing, of another size or not finite; an instruction set or precision that
    /// this processor does not have.
    pub fn new(
        config: &Config,
        tensors: &Tensors,
        precision: Precision,
        cpu: Option<&str>,
        pool: Arc<Pool>,
    ) -> Result<Self, Error> {
        let find = |precision: Precision, cpu: Option<&str>| {
            let mut fitting = kernels::ALL.iter().filter(|k| k.precision == precision && (k.here)());
            fitting.find(|k| cpu.is_none_or(|cpu| cpu == k.name)).copied().ok_or_else(|| {
                let sets = Self::instruction_sets(precision);
                let name = precision.name();
                Error::Argument(match cpu {
                    Some(cpu) => format!("cpu must be one of {sets:?} for {name} on this processor, got {cpu:?}"),
                    None => format!("this processor has no instructions for precision {name:?}; use \"float32\""),
                })
            })
        };
        let kernels = find(precision, cpu)?;
        // Not every instruction set of bfloat16 has float32.
        let exact = find(Precision::Float32, cpu).or_else(|_| find(Precision::Float32, None))?;
        let (d, hidden) = (config.embed_dim, config.head_hidden);
        let distance = config.distance_head.then(|| Head::new(tensors, "distance_head", d, hidden, d));
        let blocks = config.prior_blocks * config.block_dim;
        let prior = config.action_prior.then(|| Head::new(tensors, "action_prior", 2 * d, hidden, blocks));
        Ok(Self {
            config: config.clone(),
            exact,
            kernels,
            encoder: Encoder::new(config, tensors)?,
            predictor: Predictor::new(config, tensors, kernels)?,
            distance: distance.transpose()?,
            prior: prior.transpose()?,
            pool,
            encoding: Mutex::default(),
            rolling: Mutex::default(),
        })
    }

    /// Names of the instruction sets that this processor has for `precision`, the best first.
    #[must_use]
    pub fn instruction_sets(precision: Precision) -> Vec<&'static str> {
        kernels::ALL.iter().filter(|k| k.precision == precision && (k.here)()).map(|k| k.name).collect()
    }

    /// The instruction set of the rollout.
    #[must_use]
    pub fn cpu(&self) -> &'static str {
        self.kernels.name
    }

    /// The precision of the rollout.
    #[must_use]
    pub fn precision(&self) -> Precision {
        self.kernels.precision
    }

    /// Threads that work, the caller's included.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// The architecture.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The most floating-point operations per second that all threads together reach with the rollout's instructions, from
    /// registers alone: the best of five rounds of about 20 ms. What a benchmark divides by.
    #[must_use]
    pub fn peak(&self) -> f64 {
        const ROUNDS: usize = 200_000;
        let threads = self.pool.threads();
        let mut best = 0.0_f64;
        for _ in 0..5 {
            let ready = Barrier::new(threads);
            let work = || {
                ready.wait();
                let start = Instant::now();
                // SAFETY: the processor has these kernels.
                black_box(unsafe { (self.kernels.peak)(black_box(ROUNDS), black_box(1e-9)) });
                (start, Instant::now())
            };
            // Threads of its own: the pool may be busy, and these must run together.
            let times: Vec<_> = thread::scope(|scope| {
                let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
                std::iter::once(work()).chain(others.into_iter().filter_map(|other| other.join().ok())).collect()
            });
            let (start, end) = (times.iter().map(|t| t.0).min(), times.iter().map(|t| t.1).max());
            if let (Some(start), Some(end)) = (start, end) {
                let flops = (ROUNDS * self.kernels.flops * times.len()) as f64;
                best = best.max(flops / (end - start).as_secs_f64());
            }
        }
        best
    }

    /// Latents (N, D) of frames (N, size, size, 3).
    ///
    /// # Errors
    /// [`Error::Argument`]: `frames` or `out` of another length.
    pub fn encode(&self, frames: &[u8], out: &mut [f32]) -> Result<(), Error> {
        let (size, width) = (self.config.image_size * self.config.image_size * 3, self.config.embed_dim);
        if !frames.len().is_multiple_of(size) || frames.len() / size * width != out.len() {
            let (frames, out) = (frames.len(), out.len());
            return Err(Error::Argument(format!(
                "frames has {frames} bytes and out {out} numbers; want N * {size} and N * {width}"
            )));
        }
        let free = self.encoding.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut space = free.unwrap_or_else(|| self.encoder.workspace(self.exact, self.pool.threads()));
        for (frame, out) in frames.chunks_exact(size).zip(out.chunks_exact_mut(width)) {
            // SAFETY: the processor has `exact`, and the workspace was made for it and this pool.
            unsafe { self.encoder.run(self.exact, &self.pool, &mut space, frame, out) };
        }
        self.encoding.lock().unwrap_or_else(PoisonError::into_inner).push(space);
        Ok(())
    }

    /// Imagined latents (E, S, T + H, D), the observed ones first, of candidates (E, S, H, A) after latents `z` (E, T, D)
    /// with the blocks `past` (E, T - 1, A) between them; all actions normalised.
    ///
    /// # Errors
    /// [`Error::Argument`]: lengths that do not fit `shape`.
    pub fn rollout(
        &self,
        shape: Shape,
        z: &[f32],
        past: &[f32],
        candidates: &[f32],
        out: &mut [f32],
    ) -> Result<(), Error> {
        let job = Rollout { every: true, ..self.job(shape, z, past, candidates)? };
        let (tokens, width) = (shape.frames + shape.horizon, self.config.embed_dim);
        check("out", out.len(), shape.envs * shape.samples * tokens * width)?;
        let out = Parts(out.as_mut_ptr());
        self.run(shape, &job, &|first, rows, latents| {
            let out = &out;
            for t in 0..tokens {
                let z = latents(t);
                for row in 0..rows {
                    for from in (0..width).step_by(LANES) {
                        let to = ((first + row) * tokens + t) * width + from;
                        // SAFETY: every row is one task's, and `out` has them all.
                        unsafe {
                            let line = z.at(row, from / LANES).cast();
                            std::ptr::copy_nonoverlapping(line, out.0.add(to), LANES.min(width - from));
                        }
                    }
                }
            }
        });
        Ok(())
    }

    /// Costs (E, S) of candidates for `goal`. The other arguments are those of [`Engine::rollout`].
    ///
    /// # Errors
    /// [`Error::Argument`]: lengths that do not fit `shape`, or a cost that needs a head which the model does not have.
    pub fn costs(
        &self,
        shape: Shape,
        z: &[f32],
        past: &[f32],
        goal: Goal<'_>,
        candidates: &[f32],
        out: &mut [f64],
    ) -> Result<(), Error> {
        let goals = self.goals(shape, goal)?;
        self.score(shape, z, past, &goals, candidates, out)
    }

    /// `goal` as it is compared with.
    fn goals(&self, shape: Shape, goal: Goal<'_>) -> Result<Goals, Error> {
        let (width, lines) = (self.config.embed_dim, layout::lines(self.config.embed_dim));
        check("goal", goal.latents.len(), shape.envs * width)?;
        let mut goals = vec![Line::ZERO; shape.envs * lines];
        let embedded = match goal.cost {
            Cost::Latent => None,
            Cost::Distance if self.distance.is_some() => Some(self.head("distance_head", goal.latents)?),
            Cost::Distance => {
                return Err(Error::Argument("cost must be \"latent\": the model has no distance head".into()));
            }
        };
        let values = embedded.as_deref().unwrap_or(goal.latents);
        for (goal, to) in values.chunks_exact(width).zip(goals.chunks_exact_mut(lines)) {
            for (i, &x) in goal.iter().enumerate() {
                to[i / LANES].0[i % LANES] = x;
            }
        }
        Ok(Goals { lines: goals, cost: goal.cost })
    }

    /// What head `name` makes of rows of its inputs, one after the other: `distance_head`, D to D, or `action_prior`, 2 D
    /// (now, then the goal) to a number of blocks.
    ///
    /// # Errors
    /// [`Error::Argument`]: the model has no such head, or `rows` holds no whole rows.
    pub fn head(&self, name: &str, rows: &[f32]) -> Result<Vec<f32>, Error> {
        let found = match name {
            "distance_head" => self.distance.as_ref(),
            "action_prior" => self.prior.as_ref(),
            _ => None,
        };
        let Some(head) = found else { return Err(Error::Argument(format!("the model has no head {name:?}"))) };
        if !rows.len().is_multiple_of(head.inputs) {
            let (want, got) = (head.inputs, rows.len());
            return Err(Error::Argument(format!("rows must have a multiple of {want} numbers, got {got}")));
        }
        let mut out = vec![0.0; rows.len() / head.inputs * head.outputs];
        // SAFETY: the processor has `exact`, and rows are as wide as the head's inputs and outputs.
        unsafe {
            let read = |row: usize, x: Rows, at: usize| write_row(x, at, &rows[row * head.inputs..][..head.inputs]);
            head.run(self.exact, rows.len() / head.inputs, read, |row, y, at| {
                for (line, to) in out[row * head.outputs..][..head.outputs].chunks_mut(LANES).enumerate() {
                    let line = *y.at(at, line);
                    to.copy_from_slice(&line.0[..to.len()]);
                }
            });
        }
        Ok(out)
    }

    fn score(
        &self,
        shape: Shape,
        z: &[f32],
        past: &[f32],
        goals: &Goals,
        candidates: &[f32],
        out: &mut [f64],
    ) -> Result<(), Error> {
        let job = self.job(shape, z, past, candidates)?;
        check("out", out.len(), shape.envs * shape.samples)?;
        let lines = layout::lines(self.config.embed_dim);
        let out = Parts(out.as_mut_ptr());
        let goal = |row: usize| {
            let goal = &goals.lines[row / shape.samples * lines..][..lines];
            // SAFETY: lines are sixteen numbers.
            unsafe { std::slice::from_raw_parts(goal.as_ptr().cast::<f32>(), lines * LANES) }
        };
        self.run(shape, &job, &|first, rows, latents| {
            let out = &out;
            let z = latents(shape.frames + shape.horizon - 1);
            // SAFETY: the processor has these kernels; every row is one task's; a head's inputs are latents.
            unsafe {
                if let (Cost::Distance, Some(head)) = (goals.cost, &self.distance) {
                    let read = |row: usize, x: Rows, at: usize| {
                        for line in 0..lines {
                            *x.at(at, line) = *z.at(row, line);
                        }
                    };
                    head.run(self.exact, rows, read, |row, y, at| {
                        let square = (self.exact.distance)(y, at, goal(first + row));
                        *out.0.add(first + row) = f64::from(square.sqrt());
                    });
                } else {
                    for row in 0..rows {
                        let square = (self.kernels.distance)(z, row, goal(first + row));
                        *out.0.add(first + row) = f64::from(square);
                    }
                }
            }
        });
        Ok(())
    }

    fn job<'a>(&self, s: Shape, z: &'a [f32], past: &'a [f32], candidates: &'a [f32]) -> Result<Rollout<'a>, Error> {
        let (d, a) = (self.config.embed_dim, self.config.block_dim);
        if s.frames == 0 || s.horizon == 0 || s.samples == 0 {
            return Err(Error::Argument(format!("frames, samples and horizon must be at least 1, got {s:?}")));
        }
        check("z", z.len(), s.envs * s.frames * d)?;
        check("past", past.len(), s.envs * (s.frames - 1) * a)?;
        check("candidates", candidates.len(), s.envs * s.samples * s.horizon * a)?;
        let Shape { frames, samples, horizon, .. } = s;
        Ok(Rollout { z, past, candidates, frames, samples, horizon, every: false })
    }

    /// Calls `done(first row, rows, latents of a token)` for blocks of all rows.
    fn run(&self, shape: Shape, job: &Rollout<'_>, done: &Done) {
        let k = self.kernels;
        let (rows, threads) = (shape.envs * shape.samples, self.pool.threads());
        let tiles = rows.div_ceil(k.tile);
        // As many blocks as keep every thread busy, equal to a tile, none too large for its cache.
        let blocks = tiles.div_ceil(self.predictor.block(shape.horizon)).next_multiple_of(threads).min(tiles);
        self.pool.run(blocks, &|block, _| {
            let (from, to) = (block * tiles / blocks * k.tile, ((block + 1) * tiles / blocks * k.tile).min(rows));
            let free = self.rolling.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let mut space = free.unwrap_or_default();
            // SAFETY: the processor has `k`, and `job` checked the lengths.
            unsafe {
                (k.enter)();
                self.predictor.run(k, &mut space, job, from, to - from, |latents| done(from, to - from, latents));
                (k.leave)();
            }
            self.rolling.lock().unwrap_or_else(PoisonError::into_inner).push(space);
        });
    }
}

/// What a plan costs: where it starts, what has been done, and where it shall lead, for E environments.
#[derive(Debug)]
pub struct Objective {
    engine: Arc<Engine>,
    envs: usize,
    frames: usize,
    z: Vec<f32>,
    past: Vec<f32>,
    goals: Goals,
}

impl Objective {
    /// Latents `z` (E, T, D) of the observed frames, normalised blocks `past` (E, T - 1, A) between them, goals (E, D).
    ///
    /// # Errors
    /// [`Error::Argument`]: lengths that do not fit, or a cost that needs a head which the model does not have.
    pub fn new(
        engine: Arc<Engine>,
        envs: usize,
        frames: usize,
        z: Vec<f32>,
        past: Vec<f32>,
        goal: Goal<'_>,
    ) -> Result<Self, Error> {
        let c = engine.config();
        if envs == 0 || frames == 0 {
            return Err(Error::Argument(format!(
                "z must have at least 1 environment and 1 frame, got {envs} and {frames}"
            )));
        }
        check("z", z.len(), envs * frames * c.embed_dim)?;
        check("past", past.len(), envs * (frames - 1) * c.block_dim)?;
        let goals = engine.goals(Shape { envs, frames, samples: 1, horizon: 1 }, goal)?;
        Ok(Self { engine, envs, frames, z, past, goals })
    }

    /// Environments.
    #[must_use]
    pub fn envs(&self) -> usize {
        self.envs
    }

    /// Costs (E, S) of candidates (E, S, H, A).
    ///
    /// # Errors
    /// [`Error::Argument`]: lengths that do not fit.
    pub fn costs(&self, candidates: &[f32], samples: usize, out: &mut [f64]) -> Result<(), Error> {
        let row = self.envs * samples * self.engine.config.block_dim;
        let shape = Shape { envs: self.envs, frames: self.frames, samples, horizon: candidates.len() / row.max(1) };
        self.engine.score(shape, &self.z, &self.past, &self.goals, candidates, out)
    }
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("cpu", &self.cpu()).field("precision", &self.precision()).finish_non_exhaustive()
    }
}

/// Numbers of environments E, observed frames T, candidates S and imagined blocks H.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)] // said above
pub struct Shape {
    pub envs: usize,
    pub frames: usize,
    pub samples: usize,
    pub horizon: usize,
}

fn check(name: &str, got: usize, want: usize) -> Result<(), Error> {
    if got == want {
        return Ok(());
    }
    Err(Error::Argument(format!("{name} must have {want} numbers, got {got}")))
}
