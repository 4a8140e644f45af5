//! Planners by sampling, written once, for any cost and any number of environments: CEM, iCEM and MPPI.
//!
//! One iteration, for every environment on its own:
//! 1. candidates `x = clamp(mean + std * noise, low, high)`; the noise is [`crate::rng`]'s, coloured by iCEM. Sample 0 is
//!    `clamp(mean)`, with iCEM in the last iteration only. The last samples of iCEM are the best elites of the iteration
//!    before, in the first iteration those that came with the task;
//! 2. one call of the cost for all environments and samples;
//! 3. elites are the `elites` lowest costs, ties by sample index; those of cost +inf are left out;
//! 4. `mean` and `std` of the elites, weighted by MPPI, mixed with the old ones by iCEM, `std` at least `min_std`.
//!
//! At the end the mean is scored too, and the better of it and the best candidate ever seen is returned, with its own cost.
//!
//! CEM's `reference` mode is the update of the official code (le-wm, stable-worldmodel `solver/cem.py`): no bounds, no floor,
//! and the last mean is returned unscored, under the mean cost of the last elites.
//!
//! Candidates are float32 or float64, whichever the cost takes, the distribution is float64. Bounds are rounded inwards, so
//! what the elites and the result are made of is exactly what was scored, and within them.

// What runs under another instruction set has to be compiled into the function that has it.
#![allow(clippy::inline_always)]

mod elites;
mod icem;
mod mppi;
mod real;
#[cfg(test)]
mod tests;

use std::time::{Duration, Instant};

use crate::rng::{self, resize, Affine, Key};
use crate::Error;
use real::{clamp, place, vectorised};

pub use icem::Icem;
pub use real::Real;

/// What a plan costs. Lower is better; +inf marks a candidate that must not be used.
pub trait Cost<T: Real> {
    /// What the cost can fail with. The planner's own errors convert into it.
    type Error: From<Error>;

    /// Writes the costs (E, `samples`) of candidates (E, `samples`, H, A).
    ///
    /// A cost that takes long calls `interrupt` now and then, and passes on its error.
    ///
    /// # Errors
    /// Anything; it ends the plan and reaches the caller unchanged.
    fn cost(
        &mut self,
        candidates: &[T],
        samples: usize,
        costs: &mut [f64],
        interrupt: &mut Interrupt<'_, Self::Error>,
    ) -> Result<(), Self::Error>;
}

/// Fails when the user wants to stop. Called before each iteration; it should be cheap.
pub type Interrupt<'a, E> = dyn FnMut() -> Result<(), E> + 'a;

/// What is done with the elites.
#[derive(Clone, Copy, Debug)]
pub enum Method {
    /// Their mean and unbiased standard deviation (de Boer et al. 2005).
    Cem {
        /// The official update, see the module.
        reference: bool,
    },
    /// The same, mixed with the old ones; with other noise, fewer and fewer samples, and elites scored again.
    Icem(Icem),
    /// Means weighted by `exp(-(cost - lowest) / (temperature * (mean elite cost - lowest)))`, and the standard deviation
    /// under the same weights.
    Mppi {
        /// Low: the best elite counts; high: all count alike.
        temperature: f64,
    },
}

/// The planner's numbers.
#[derive(Clone, Debug)]
pub struct Planner {
    /// Candidates per environment and iteration, S.
    pub samples: usize,
    /// Iterations, at most 65536.
    pub iterations: usize,
    /// Candidates that the next distribution is fitted to, at least 2.
    pub elites: usize,
    /// Standard deviation of the first iteration.
    pub init_std: f64,
    /// Floor of the later ones.
    pub min_std: f64,
    /// What is done with the elites.
    pub method: Method,
}

/// One search for E = `env_ids.len()` environments. Row e of the result depends on `env_ids[e]`, its mean, its kept elites
/// and its costs only.
#[derive(Clone, Copy, Debug)]
pub struct Task<'a> {
    /// Action blocks in a plan, H.
    pub horizon: usize,
    /// Numbers in an action block, A.
    pub width: usize,
    /// Ids of the environments, which choose their noise.
    pub env_ids: &'a [u32],
    /// First means (E, H, A).
    pub mean: &'a [f64],
    /// Elites of an earlier plan (E, [`Planner::kept`], H, A), to be scored again in the first iteration; or none.
    pub kept: Option<&'a [f64]>,
    /// Lower bounds (A,), or none.
    pub low: Option<&'a [f64]>,
    /// Upper bounds (A,), or none.
    pub high: Option<&'a [f64]>,
    /// Seed of the noise.
    pub seed: u64,
    /// Number of this plan in its episode: another plan, other noise.
    pub plan: u32,
    /// White noise (iterations, E, S, H, A) instead of the generated.
    pub noise: Option<&'a [f64]>,
    /// No iteration but the first starts that would end later than this after the call, if it took as long as the one
    /// before. The last one and not the longest: the first, with cold caches, says little about the others.
    pub deadline: Option<Duration>,
}

/// What [`Planner::run`] found, row by row for E environments.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Solution {
    /// The plans (E, H, A).
    pub actions: Vec<f64>,
    /// Their costs (E,).
    pub cost: Vec<f64>,
    /// Mean of the last distribution (E, H, A).
    pub mean: Vec<f64>,
    /// Standard deviation of the last distribution (E, H, A).
    pub std: Vec<f64>,
    /// Mean elite cost per iteration that ran (iterations, E).
    pub trace: Vec<f64>,
    /// The best elites of the last iteration (E, [`Planner::kept`], H, A), best first.
    pub kept: Vec<f64>,
    /// Iterations that ran.
    pub iterations: usize,
    /// Fraction of the candidates' entries that the bounds moved (E,).
    pub clipped: Vec<f64>,
    /// The deadline kept something from being done: iterations, or scoring the final mean.
    pub deadline_hit: bool,
}

/// The planner's memory. Kept between calls, it makes those of the same shape allocate nothing.
#[derive(Debug, Default)]
pub struct Workspace<T> {
    candidates: Vec<T>,
    kept: Vec<T>,
    /// Bounds, mean and standard deviation of one plan, and a scratch for one.
    low: Vec<T>,
    high: Vec<T>,
    mean: Vec<T>,
    std: Vec<T>,
    scratch: Vec<T>,
    matrix: Vec<T>,
    costs: Vec<f64>,
    ranks: Vec<u64>,
    elites: Vec<usize>,
    weights: Vec<f64>,
    new_mean: Vec<f64>,
    new_std: Vec<f64>,
    moved: Vec<usize>,
    found: Solution,
}

/// Rows of one environment in one iteration: the mean, fresh ones, kept ones.
#[derive(Clone, Copy)]
struct Layout {
    samples: usize,
    lead: usize,
    kept: usize,
}

impl Planner {
    /// Elites that a plan hands to the next one, for each environment; 0 unless it is iCEM.
    #[must_use]
    pub fn kept(&self) -> usize {
        match &self.method {
            Method::Icem(icem) => icem.kept(self.elites),
            _ => 0,
        }
    }

    /// Plans. What it found stays in the workspace until the next call.
    ///
    /// # Errors
    /// [`Error::Argument`] for a number out of its domain, a cost that is NaN or -inf, and an iteration with fewer than two
    /// finite costs; whatever the cost and `interrupt` fail with.
    pub fn run<'w, T: Real, C: Cost<T>>(
        &self,
        task: &Task<'_>,
        workspace: &'w mut Workspace<T>,
        cost: &mut C,
        interrupt: &mut Interrupt<'_, C::Error>,
    ) -> Result<&'w Solution, C::Error> {
        let start = Instant::now();
        self.validate::<T>(task)?;
        workspace.prepare(self, task)?;
        let (envs, block) = (task.env_ids.len(), task.horizon * task.width);
        let late = |more: Duration| task.deadline.is_some_and(|deadline| start.elapsed() + more > deadline);
        let mut last = Duration::ZERO;
        let mut entries = 0;

        for iteration in 0..self.iterations {
            if iteration > 0 && late(last) {
                workspace.found.deadline_hit = true;
                break;
            }
            let started = Instant::now();
            interrupt()?;
            let layout = self.layout(iteration, task.kept.is_some());
            entries += layout.samples * block;
            for e in 0..envs {
                self.draw(task, workspace, layout, iteration, e);
            }
            let candidates = &workspace.candidates[..envs * layout.samples * block];
            let costs = &mut workspace.costs[..envs * layout.samples];
            cost.cost(candidates, layout.samples, costs, interrupt)?;
            for e in 0..envs {
                self.refit(workspace, layout.samples, block, iteration, e)?;
            }
            workspace.found.iterations += 1;
            last = started.elapsed();
        }

        let Workspace { candidates, costs, moved, found, .. } = workspace;
        for (clipped, &count) in found.clipped.iter_mut().zip(&*moved) {
            *clipped = count as f64 / entries as f64;
        }
        if self.reference() {
            found.actions.copy_from_slice(&found.mean);
            found.cost.copy_from_slice(&found.trace[found.trace.len() - envs..]);
        } else if found.deadline_hit || late(Duration::ZERO) {
            found.deadline_hit = true;
        } else {
            let means = &mut candidates[..envs * block];
            for (x, &mean) in means.iter_mut().zip(&found.mean) {
                *x = T::nearest(mean);
            }
            cost.cost(means, 1, &mut costs[..envs], interrupt)?;
            for e in 0..envs {
                check(&costs[e..=e], e, self.iterations)?;
                if costs[e] < found.cost[e] {
                    found.cost[e] = costs[e];
                    widen(&means[e * block..][..block], &mut found.actions[e * block..][..block]);
                }
            }
        }
        Ok(found)
    }

    fn reference(&self) -> bool {
        matches!(self.method, Method::Cem { reference: true })
    }

    fn layout(&self, iteration: usize, warm: bool) -> Layout {
        match &self.method {
            Method::Icem(icem) => Layout {
                samples: icem.population(self.samples, self.elites, iteration),
                lead: usize::from(iteration + 1 == self.iterations),
                kept: if warm || iteration > 0 { self.kept() } else { 0 },
            },
            _ => Layout { samples: self.samples, lead: 1, kept: 0 },
        }
    }

    /// Writes the candidates of one environment.
    fn draw<T: Real>(&self, task: &Task<'_>, workspace: &mut Workspace<T>, layout: Layout, iteration: usize, e: usize) {
        let Workspace { candidates, kept, low, high, mean, std, scratch, matrix, moved, found, .. } = workspace;
        let (block, size) = (low.len(), layout.samples * low.len());
        let rows = &mut candidates[e * size..][..size];
        let (lead, rows) = rows.split_at_mut(layout.lead * block);
        let (fresh, again) = rows.split_at_mut(rows.len() - layout.kept * block);

        for j in 0..block {
            mean[j] = T::nearest(found.mean[e * block + j]);
            std[j] = T::nearest(found.std[e * block + j]);
        }
        for (j, x) in lead.iter_mut().enumerate() {
            *x = clamp(mean[j], low[j], high[j]);
            moved[e] += usize::from(*x != mean[j]);
        }
        again.copy_from_slice(&kept[e * self.kept() * block..][..again.len()]);

        let affine = Affine { mean, std, low, high };
        let key = Key { seed: task.seed, plan: task.plan, iteration: iteration as u32, env_id: task.env_ids[e] };
        let white = task.noise.map(|noise| {
            let first = ((iteration * task.env_ids.len() + e) * self.samples + layout.lead) * block;
            &noise[first..][..fresh.len()]
        });
        moved[e] += match (white, &self.method) {
            (None, Method::Cem { .. } | Method::Mppi { .. }) => T::draw(key, layout.lead, affine, fresh),
            (white, method) => {
                match white {
                    Some(white) => fresh.iter_mut().zip(white).for_each(|(x, &white)| *x = T::nearest(white)),
                    None => _ = rng::draw(key, layout.lead, block, None, fresh),
                }
                if let Method::Icem(_) = method {
                    icem::apply(matrix, fresh, scratch);
                }
                vectorised(
                    #[inline(always)]
                    || place(affine, fresh),
                )
            }
        };
    }

    /// Fits the distribution of one environment to its elites.
    fn refit<T: Real>(
        &self,
        workspace: &mut Workspace<T>,
        samples: usize,
        block: usize,
        iteration: usize,
        e: usize,
    ) -> Result<(), Error> {
        let Workspace { candidates, kept, low, high, costs, ranks, elites, weights, new_mean, new_std, found, .. } =
            workspace;
        let candidates = &candidates[e * samples * block..][..samples * block];
        let costs = &costs[e * samples..][..samples];
        check(costs, e, iteration)?;
        elites::select(costs, self.elites, ranks, elites);
        let count = elites.len();
        if count < 2 {
            return Err(Error::Argument(format!(
                "cost must be finite for at least 2 samples, got {count} of {samples} (environment row {e}, iteration \
                 {iteration})"
            )));
        }
        found.trace.push(elites.iter().map(|&s| costs[s]).sum::<f64>() / count as f64);

        let weights = &mut weights[..count];
        weights.fill(1.0);
        let mut degrees = count as f64 - 1.0;
        let mut momentum = 0.0;
        match &self.method {
            Method::Cem { .. } => (),
            Method::Icem(icem) => momentum = icem.momentum,
            Method::Mppi { temperature } => {
                mppi::weigh(*temperature, elites.iter().map(|&s| costs[s]), weights);
                degrees = weights.iter().sum();
            }
        }
        vectorised(
            #[inline(always)]
            || elites::moments(candidates, elites, weights, degrees, new_mean, new_std),
        );
        let floor = if self.reference() { 0.0 } else { self.min_std };
        let (mean, std) = (&mut found.mean[e * block..][..block], &mut found.std[e * block..][..block]);
        for j in 0..block {
            // The mean of numbers within the bounds can leave them by a rounding error.
            mean[j] = (momentum * mean[j] + (1.0 - momentum) * new_mean[j]).clamp(low[j].into(), high[j].into());
            std[j] = (momentum * std[j] + (1.0 - momentum) * new_std[j]).max(floor);
        }

        let keep = self.kept();
        if keep > 0 {
            elites.sort_unstable_by(|&a, &b| costs[a].total_cmp(&costs[b]).then(a.cmp(&b)));
            for (row, &s) in kept[e * keep * block..].chunks_exact_mut(block).take(keep).zip(elites.iter().cycle()) {
                row.copy_from_slice(&candidates[s * block..][..block]);
            }
            widen(&kept[e * keep * block..][..keep * block], &mut found.kept[e * keep * block..][..keep * block]);
        }
        let best = elites.iter().copied().fold(elites[0], |best, s| if costs[s] < costs[best] { s } else { best });
        if costs[best] < found.cost[e] {
            found.cost[e] = costs[best];
            widen(&candidates[best * block..][..block], &mut found.actions[e * block..][..block]);
        }
        Ok(())
    }

    /// Checks everything that can be checked before the first cost.
    fn validate<T: Real>(&self, task: &Task<'_>) -> Result<(), Error> {
        let fail = |text: String| Err(Error::Argument(text));
        let at_least_one = [
            ("samples", self.samples),
            ("iterations", self.iterations),
            ("horizon", task.horizon),
            ("mean's action width", task.width),
            ("mean's number of environments", task.env_ids.len()),
        ];
        if let Some((name, _)) = at_least_one.iter().find(|(_, value)| *value == 0) {
            return fail(format!("{name} must be at least 1, got 0"));
        }
        if self.iterations > rng::FIELD {
            return fail(format!("iterations must be at most {}, got {}", rng::FIELD, self.iterations));
        }
        if self.elites < 2 || self.elites > self.samples {
            return fail(format!("elites must be in 2..=samples ({}), got {}", self.samples, self.elites));
        }
        let real = |x: f64| T::nearest(x).into();
        if !(real(self.init_std) > 0.0 && real(self.init_std).is_finite()) {
            return fail(format!("init_std must be positive and finite as {}, got {}", T::NAME, self.init_std));
        }
        if !(self.min_std >= 0.0 && real(self.min_std).is_finite()) {
            return fail(format!("min_std must be finite as {} and not negative, got {}", T::NAME, self.min_std));
        }
        match self.method {
            Method::Cem { .. } => (),
            Method::Icem(Icem { beta, factor, keep, momentum }) => {
                if !(beta >= 0.0 && beta.is_finite()) {
                    return fail(format!("beta must be finite and not negative, got {beta}"));
                }
                if !(factor >= 1.0 && factor.is_finite()) {
                    return fail(format!("factor must be finite and at least 1, got {factor}"));
                }
                for (name, value) in [("keep", keep), ("momentum", momentum)] {
                    if !(0.0..1.0).contains(&value) {
                        return fail(format!("{name} must be at least 0 and below 1, got {value}"));
                    }
                }
            }
            Method::Mppi { temperature } => {
                if !(temperature > 0.0 && temperature.is_finite()) {
                    return fail(format!("temperature must be positive and finite, got {temperature}"));
                }
            }
        }
        let size = task.horizon.saturating_mul(task.width);
        rng::check(self.iterations - 1, self.samples, size)?;
        let count = task.env_ids.len() * size;
        if task.mean.len() != count {
            return fail(format!("mean must have E * H * A = {count} values, got {}", task.mean.len()));
        }
        let infinite = |values: &[f64]| values.iter().position(|&x| !real(x).is_finite());
        if let Some(at) = infinite(task.mean) {
            let (env, step, action) = (at / size, at % size / task.width, at % task.width);
            return fail(format!("mean[{env}, {step}, {action}] must be finite, got {}", task.mean[at]));
        }
        if let Some(kept) = task.kept {
            if kept.len() != count * self.kept() {
                let want = count * self.kept();
                return fail(format!("kept must have E * {} * H * A = {want} values, got {}", self.kept(), kept.len()));
            }
            if let Some(at) = infinite(kept) {
                return fail(format!("kept must be finite, got {}", kept[at]));
            }
        }
        if let Some(noise) = task.noise {
            if Some(noise.len()) != count.checked_mul(self.samples).and_then(|n| n.checked_mul(self.iterations)) {
                return fail(format!("noise must be (iterations, E, S, H, A), got {} values", noise.len()));
            }
            if let Some(x) = noise.iter().find(|x| !x.is_finite()) {
                return fail(format!("noise must be finite, got {x}"));
            }
        }
        for (name, bounds) in [("low", task.low), ("high", task.high)] {
            let Some(bounds) = bounds else { continue };
            if self.reference() {
                return fail(format!("{name} must be None with reference=True: the official update has no bounds"));
            }
            if bounds.len() != task.width {
                return fail(format!("{name} must have shape ({},), got ({},)", task.width, bounds.len()));
            }
            if let Some(a) = bounds.iter().position(|x| !x.is_finite()) {
                return fail(format!("{name}[{a}] must be finite, got {}", bounds[a]));
            }
        }
        Ok(())
    }
}

impl<T: Real> Workspace<T> {
    /// Gives every buffer its size and its first content; the bounds are checked on the way.
    fn prepare(&mut self, planner: &Planner, task: &Task<'_>) -> Result<(), Error> {
        let (envs, block) = (task.env_ids.len(), task.horizon * task.width);
        resize(&mut self.candidates, &[envs, planner.samples, block])?;
        resize(&mut self.costs, &[envs, planner.samples])?;
        resize(&mut self.kept, &[envs, planner.kept(), block])?;
        for buffer in [&mut self.low, &mut self.high, &mut self.mean, &mut self.std, &mut self.scratch] {
            resize(buffer, &[block])?;
        }
        for buffer in [&mut self.new_mean, &mut self.new_std] {
            resize(buffer, &[block])?;
        }
        resize(&mut self.weights, &[planner.elites])?;
        self.ranks.clear();
        self.ranks.reserve(planner.samples);
        self.elites.clear();
        self.elites.reserve(planner.elites);
        self.moved.clear();
        self.moved.resize(envs, 0);

        for a in 0..task.width {
            let given =
                (task.low.map_or(f64::NEG_INFINITY, |low| low[a]), task.high.map_or(f64::INFINITY, |high| high[a]));
            if given.0 > given.1 {
                return Err(Error::Argument(format!("low[{a}] = {} must not exceed high[{a}] = {}", given.0, given.1)));
            }
            let (low, high) = (T::at_least(given.0), T::at_most(given.1));
            if low > high {
                return Err(Error::Argument(format!(
                    "low[{a}] = {} and high[{a}] = {} have no {} number between them: use dtype \"float64\" or wider bounds",
                    given.0,
                    given.1,
                    T::NAME
                )));
            }
            for h in 0..task.horizon {
                (self.low[h * task.width + a], self.high[h * task.width + a]) = (low, high);
            }
        }
        for (i, (x, &kept)) in self.kept.iter_mut().zip(task.kept.unwrap_or_default()).enumerate() {
            *x = clamp(T::nearest(kept), self.low[i % block], self.high[i % block]);
        }
        if let Method::Icem(icem) = &planner.method {
            resize(&mut self.matrix, &[task.horizon])?;
            icem::colour(icem.beta, &mut self.matrix);
        }

        let found = &mut self.found;
        for (buffer, count, first) in [
            (&mut found.actions, envs * block, 0.0),
            (&mut found.cost, envs, f64::INFINITY),
            (&mut found.std, envs * block, planner.init_std),
            (&mut found.kept, envs * planner.kept() * block, 0.0),
            (&mut found.clipped, envs, 0.0),
        ] {
            buffer.clear();
            buffer.resize(count, first);
        }
        found.mean.clear();
        found.mean.extend_from_slice(task.mean);
        found.trace.clear();
        found.trace.reserve(planner.iterations * envs);
        (found.iterations, found.deadline_hit) = (0, false);
        Ok(())
    }
}

fn widen<T: Real>(from: &[T], to: &mut [f64]) {
    to.iter_mut().zip(from).for_each(|(to, &x)| *to = x.into());
}

fn check(costs: &[f64], env: usize, iteration: usize) -> Result<(), Error> {
    // NaN is not above anything. In two passes: the first has no branch, and nearly always it is the only one.
    if costs.iter().all(|&cost| cost > f64::NEG_INFINITY) {
        return Ok(());
    }
    let sample = costs.iter().position(|&cost| cost.is_nan() || cost == f64::NEG_INFINITY).unwrap_or(0);
    Err(Error::Argument(format!(
        "cost must be a number or +inf, got {} for environment row {env}, sample {sample}, iteration {iteration}",
        costs[sample]
    )))
}
