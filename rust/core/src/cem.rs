//! The cross-entropy method, written once, for any cost and any number of environments.
//!
//! One iteration, for every environment on its own:
//! 1. candidates `x = clamp(mean + std * noise, low, high)`, sample 0 is `clamp(mean)`; the noise is [`crate::rng`]'s;
//! 2. one call of the cost for all environments and samples;
//! 3. elites are the `elites` lowest costs, ties by sample index; those of cost +inf are left out;
//! 4. `mean` and `std` of the elites, `std` unbiased and at least `min_std`.
//!
//! At the end the mean is scored too, and the better of it and the best candidate ever seen is returned, with its own cost.
//!
//! `reference` mode is the update of the official code (le-wm, stable-worldmodel `solver/cem.py`): no bounds, no floor, and
//! the last mean is returned unscored, under the mean cost of the last elites.
//!
//! The distribution is float64. With `float32`, candidates are rounded to float32 as soon as they are drawn, so what the
//! elites and the result are made of is exactly what was scored; bounds are rounded inwards for it.

use std::cmp::Ordering;
use std::time::{Duration, Instant};

use crate::rng::{self, zeros};
use crate::Error;

/// What a plan costs. Lower is better; +inf marks a candidate that must not be used.
pub trait Cost {
    /// What the cost can fail with. The planner's own errors convert into it.
    type Error: From<Error>;

    /// Writes the costs (E, `samples`) of candidates (E, `samples`, H, A).
    ///
    /// # Errors
    /// Anything; it ends the plan and reaches the caller unchanged.
    fn cost(&mut self, candidates: &[f64], samples: usize, costs: &mut [f64]) -> Result<(), Self::Error>;
}

/// The planner's numbers.
#[derive(Clone, Debug)]
pub struct Cem {
    /// Candidates per environment and iteration, S.
    pub samples: usize,
    /// Iterations, at most 65536.
    pub iterations: usize,
    /// Candidates that the next distribution is fitted to, at least 2.
    pub elites: usize,
    /// Action blocks in a plan, H.
    pub horizon: usize,
    /// Numbers in an action block, A.
    pub width: usize,
    /// Standard deviation of the first iteration.
    pub init_std: f64,
    /// Floor of the later ones (not in `reference` mode).
    pub min_std: f64,
    /// Lower bounds (A,), or none.
    pub low: Option<Vec<f64>>,
    /// Upper bounds (A,), or none.
    pub high: Option<Vec<f64>>,
    /// Seed of the noise.
    pub seed: u64,
    /// Number of this plan in its episode: another plan, other noise.
    pub plan: u32,
    /// The official update instead of the default one.
    pub reference: bool,
    /// Candidates are float32 numbers.
    pub float32: bool,
    /// No iteration starts after this much time, but one always runs.
    pub deadline: Option<Duration>,
}

/// What [`Cem::run`] found, row by row for E environments.
#[derive(Clone, Debug, PartialEq)]
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
    /// Iterations that ran.
    pub iterations: usize,
    /// Fraction of the candidates' entries that the bounds moved (E,).
    pub clipped: Vec<f64>,
    /// The deadline passed before the plan was complete.
    pub deadline_hit: bool,
}

impl Cem {
    /// Plans for E = `env_ids.len()` environments from the means (E, H, A).
    ///
    /// `noise` (iterations, E, S, H, A) replaces the generated noise. Row e of the result depends on `env_ids[e]`, its mean
    /// and its costs only.
    ///
    /// # Errors
    /// [`Error::Argument`] for a number out of its domain, a cost that is NaN or -inf, and an iteration with fewer than two
    /// finite costs; whatever the cost fails with.
    pub fn run<C: Cost>(
        &self,
        env_ids: &[u32],
        mean: &[f64],
        noise: Option<&[f64]>,
        cost: &mut C,
    ) -> Result<Solution, C::Error> {
        let start = Instant::now();
        let (low, high) = self.validate(env_ids, mean, noise)?;
        let (envs, block) = (env_ids.len(), self.horizon * self.width);
        let row = self.samples * block;

        let mut candidates = zeros(&[envs, self.samples, block])?;
        let mut costs = zeros(&[envs, self.samples])?;
        let mut order: Vec<usize> = Vec::with_capacity(self.samples);
        let mut clips = vec![0_usize; envs];
        let mut found = Solution {
            actions: vec![0.0; envs * block],
            cost: vec![f64::INFINITY; envs],
            mean: mean.to_vec(),
            std: vec![self.init_std; envs * block],
            trace: Vec::new(),
            iterations: 0,
            clipped: vec![0.0; envs],
            deadline_hit: false,
        };

        while found.iterations < self.iterations && !found.deadline_hit {
            let iteration = found.iterations;
            match noise {
                Some(noise) => candidates.copy_from_slice(&noise[iteration * envs * row..][..envs * row]),
                None => rng::fill(self.seed, self.plan, iteration, env_ids, self.samples, &mut candidates)?,
            }
            for (e, candidates) in candidates.chunks_exact_mut(row).enumerate() {
                candidates[..block].fill(0.0);
                let (mean, std) = (&found.mean[e * block..][..block], &found.std[e * block..][..block]);
                for candidate in candidates.chunks_exact_mut(block) {
                    for (j, x) in candidate.iter_mut().enumerate() {
                        let free = mean[j] + std[j] * *x;
                        clips[e] += usize::from(free < low[j] || free > high[j]);
                        *x = self.round(free.clamp(low[j], high[j]));
                    }
                }
            }

            cost.cost(&candidates, self.samples, &mut costs)?;

            for (e, (candidates, costs)) in
                candidates.chunks_exact(row).zip(costs.chunks_exact(self.samples)).enumerate()
            {
                check_costs(costs, e, iteration)?;
                let elites = self.select(costs, &mut order);
                if elites.len() < 2 {
                    return Err(argument(format!(
                        "cost must be finite for at least 2 samples, got {} of {} (environment row {e}, iteration {iteration})",
                        elites.len(),
                        self.samples
                    ))
                    .into());
                }
                let span = e * block..(e + 1) * block;
                if costs[elites[0]] < found.cost[e] {
                    found.cost[e] = costs[elites[0]];
                    found.actions[span.clone()].copy_from_slice(&candidates[elites[0] * block..][..block]);
                }
                let (mean, std) = (&mut found.mean[span.clone()], &mut found.std[span]);
                self.fit(candidates, elites, mean, std);
                for j in 0..block {
                    // The mean of numbers within the bounds can leave them by a rounding error.
                    mean[j] = mean[j].clamp(low[j], high[j]);
                }
                found.trace.push(elites.iter().map(|&s| costs[s]).sum::<f64>() / elites.len() as f64);
            }
            found.iterations += 1;
            found.deadline_hit = self.deadline.is_some_and(|deadline| start.elapsed() >= deadline);
        }

        for (clipped, &count) in found.clipped.iter_mut().zip(&clips) {
            *clipped = count as f64 / (found.iterations * row) as f64;
        }
        if self.reference {
            found.actions.copy_from_slice(&found.mean);
            found.cost.copy_from_slice(&found.trace[found.trace.len() - envs..]);
        } else if !found.deadline_hit {
            let means = &mut candidates[..envs * block];
            for (x, &mean) in means.iter_mut().zip(&found.mean) {
                *x = self.round(mean);
            }
            cost.cost(means, 1, &mut costs[..envs])?;
            for e in 0..envs {
                check_costs(&costs[e..=e], e, self.iterations)?;
                if costs[e] < found.cost[e] {
                    found.cost[e] = costs[e];
                    found.actions[e * block..][..block].copy_from_slice(&means[e * block..][..block]);
                }
            }
        }
        Ok(found)
    }

    /// Checks everything that can be checked before the first cost, and gives the bounds per entry of a plan (H * A,).
    fn validate(&self, env_ids: &[u32], mean: &[f64], noise: Option<&[f64]>) -> Result<(Vec<f64>, Vec<f64>), Error> {
        let at_least_one = [
            ("samples", self.samples),
            ("iterations", self.iterations),
            ("horizon", self.horizon),
            ("mean's action width", self.width),
            ("mean's number of environments", env_ids.len()),
        ];
        if let Some((name, _)) = at_least_one.iter().find(|(_, value)| *value == 0) {
            return Err(argument(format!("{name} must be at least 1, got 0")));
        }
        if self.iterations > rng::FIELD {
            return Err(argument(format!("iterations must be at most {}, got {}", rng::FIELD, self.iterations)));
        }
        if self.elites < 2 || self.elites > self.samples {
            return Err(argument(format!("elites must be in 2..=samples ({}), got {}", self.samples, self.elites)));
        }
        if !(self.init_std > 0.0 && self.init_std.is_finite()) {
            return Err(argument(format!("init_std must be positive and finite, got {}", self.init_std)));
        }
        if !(self.min_std >= 0.0 && self.min_std.is_finite()) {
            return Err(argument(format!("min_std must be finite and not negative, got {}", self.min_std)));
        }
        let size = self.horizon.saturating_mul(self.width);
        rng::check(self.iterations - 1, self.samples, size)?;
        let count = env_ids.len() * size;
        if mean.len() != count {
            return Err(argument(format!("mean must have E * H * A = {count} values, got {}", mean.len())));
        }
        if let Some(at) = mean.iter().position(|&x| !self.round(x).is_finite()) {
            let (env, step, action) = (at / size, at % size / self.width, at % self.width);
            return Err(argument(format!("mean[{env}, {step}, {action}] must be finite, got {}", mean[at])));
        }
        if let Some(noise) = noise {
            if Some(noise.len()) != count.checked_mul(self.samples).and_then(|n| n.checked_mul(self.iterations)) {
                return Err(argument(format!("noise must be (iterations, E, S, H, A), got {} values", noise.len())));
            }
            if let Some(x) = noise.iter().find(|x| !x.is_finite()) {
                return Err(argument(format!("noise must be finite, got {x}")));
            }
        }
        self.bounds()
    }

    fn bounds(&self) -> Result<(Vec<f64>, Vec<f64>), Error> {
        let bound = |name: &str, values: Option<&Vec<f64>>, none: f64| {
            let Some(values) = values else { return Ok(vec![none; self.width]) };
            if self.reference {
                return Err(argument(format!(
                    "{name} must be None with reference=True: the official update has no bounds"
                )));
            }
            if values.len() != self.width {
                return Err(argument(format!("{name} must have shape ({},), got ({},)", self.width, values.len())));
            }
            if let Some(a) = values.iter().position(|x| !x.is_finite()) {
                return Err(argument(format!("{name}[{a}] must be finite, got {}", values[a])));
            }
            Ok(values.clone())
        };
        let mut low = bound("low", self.low.as_ref(), f64::NEG_INFINITY)?;
        let mut high = bound("high", self.high.as_ref(), f64::INFINITY)?;
        for a in 0..self.width {
            let (given_low, given_high) = (low[a], high[a]);
            if given_low > given_high {
                return Err(argument(format!("low[{a}] = {given_low} must not exceed high[{a}] = {given_high}")));
            }
            if self.float32 {
                low[a] = float32_above(given_low);
                high[a] = -float32_above(-given_high);
                if low[a] > high[a] {
                    return Err(argument(format!(
                        "low[{a}] = {given_low} and high[{a}] = {given_high} have no float32 number between them: \
                         use dtype \"float64\" or wider bounds"
                    )));
                }
            }
        }
        Ok((low.repeat(self.horizon), high.repeat(self.horizon)))
    }

    /// The number that the cost sees.
    fn round(&self, x: f64) -> f64 {
        if self.float32 {
            f64::from(x as f32)
        } else {
            x
        }
    }

    /// The elites' sample indices, best first; `order` is scratch.
    fn select<'a>(&self, costs: &[f64], order: &'a mut Vec<usize>) -> &'a [usize] {
        let by_cost =
            |&a: &usize, &b: &usize| costs[a].partial_cmp(&costs[b]).unwrap_or(Ordering::Equal).then(a.cmp(&b));
        order.clear();
        order.extend(0..self.samples);
        order.select_nth_unstable_by(self.elites - 1, by_cost);
        let elites = &mut order[..self.elites];
        elites.sort_unstable_by(by_cost);
        let finite = elites.partition_point(|&s| costs[s] < f64::INFINITY);
        &elites[..finite]
    }

    /// Writes mean and standard deviation of the elites, summed from the best one on.
    fn fit(&self, candidates: &[f64], elites: &[usize], mean: &mut [f64], std: &mut [f64]) {
        let count = elites.len() as f64;
        let block = mean.len();
        let elite = |&s: &usize| &candidates[s * block..][..block];
        mean.fill(0.0);
        for x in elites.iter().map(elite) {
            mean.iter_mut().zip(x).for_each(|(mean, x)| *mean += x);
        }
        for mean in mean.iter_mut() {
            *mean /= count;
        }
        std.fill(0.0);
        for x in elites.iter().map(elite) {
            std.iter_mut().zip(&*mean).zip(x).for_each(|((std, mean), x)| *std += (x - mean) * (x - mean));
        }
        let floor = if self.reference { 0.0 } else { self.min_std };
        for std in std.iter_mut() {
            *std = (*std / (count - 1.0)).sqrt().max(floor);
        }
    }
}

fn argument(text: String) -> Error {
    Error::Argument(text)
}

fn check_costs(costs: &[f64], env: usize, iteration: usize) -> Result<(), Error> {
    match costs.iter().position(|cost| cost.is_nan() || *cost == f64::NEG_INFINITY) {
        None => Ok(()),
        Some(sample) => Err(argument(format!(
            "cost must be a number or +inf, got {} for environment row {env}, sample {sample}, iteration {iteration}",
            costs[sample]
        ))),
    }
}

/// The smallest float32 number that is not below `x`.
fn float32_above(x: f64) -> f64 {
    let near = x as f32;
    if f64::from(near) >= x {
        return f64::from(near);
    }
    // Here near < x, so there is a next one. `f32::next_up` is younger than this crate's oldest compiler.
    let bits = near.to_bits();
    f64::from(f32::from_bits(match near {
        0.0 => 1,
        _ if near > 0.0 => bits + 1,
        _ => bits - 1,
    }))
}

#[cfg(test)]
#[allow(clippy::float_cmp)] // equal to the bit is what these tests are about
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Any function of (environment row, plan) as a cost; remembers what it was asked.
    struct Fun<F>(F, Vec<Vec<f64>>);

    impl<F: FnMut(usize, &[f64]) -> f64> Cost for Fun<F> {
        type Error = Error;

        fn cost(&mut self, candidates: &[f64], samples: usize, costs: &mut [f64]) -> Result<(), Error> {
            self.1.push(candidates.to_vec());
            let block = candidates.len() / costs.len();
            for (row, (x, cost)) in candidates.chunks_exact(block).zip(costs).enumerate() {
                *cost = self.0(row / samples, x);
            }
            Ok(())
        }
    }

    fn fun<F: FnMut(usize, &[f64]) -> f64>(cost: F) -> Fun<F> {
        Fun(cost, Vec::new())
    }

    fn small() -> Cem {
        Cem {
            samples: 64,
            iterations: 10,
            elites: 8,
            horizon: 2,
            width: 3,
            init_std: 1.0,
            min_std: 0.05,
            low: None,
            high: None,
            seed: 1,
            plan: 0,
            reference: false,
            float32: false,
            deadline: None,
        }
    }

    fn distance(x: &[f64], target: f64) -> f64 {
        x.iter().map(|x| (x - target).powi(2)).sum()
    }

    fn message(cem: &Cem, cost: impl FnMut(usize, &[f64]) -> f64) -> String {
        cem.run(&[0], &[0.0; 6], None, &mut fun(cost)).unwrap_err().to_string()
    }

    #[test]
    fn converges_for_each_environment() {
        let targets = [-0.5, 0.0, 1.5];
        let cem = Cem { samples: 300, elites: 30, iterations: 30, min_std: 1e-3, ..small() };
        let found = cem.run(&[3, 1, 2], &[0.0; 18], None, &mut fun(|e, x| distance(x, targets[e]))).unwrap();
        for (e, target) in targets.iter().enumerate() {
            let plan = &found.actions[e * 6..][..6];
            assert!(plan.iter().all(|x| (x - target).abs() < 1e-2), "{plan:?} {target}");
            assert!((found.cost[e] - distance(plan, *target)).abs() < 1e-15, "the cost is that of the plan");
        }
        assert_eq!((found.iterations, found.trace.len(), found.deadline_hit), (30, 90, false));
    }

    #[test]
    fn the_final_mean_is_scored_and_can_win() {
        let mut cost = fun(|_, x| distance(x, 0.3));
        let found = small().run(&[0], &[0.0; 6], None, &mut cost).unwrap();
        assert_eq!(cost.1.len(), 11);
        assert_eq!(cost.1[10], found.mean);
        let best = cost.1.iter().flat_map(|c| c.chunks(6)).map(|x| distance(x, 0.3)).fold(f64::INFINITY, f64::min);
        assert_eq!(found.cost, [best]);
    }

    #[test]
    fn a_mean_between_two_modes_is_not_returned() {
        // Elites on both sides of a ridge: their average is the worst plan of all.
        let cem = Cem { iterations: 1, width: 1, horizon: 1, ..small() };
        let mut ridge = fun(|_, x| (x[0].abs() - 1.0).powi(2));
        let found = cem.run(&[0], &[0.0], None, &mut ridge).unwrap();
        assert!((found.actions[0].abs() - 1.0).abs() < 0.2, "{:?} {:?}", found.actions, found.mean);
        let reference = Cem { reference: true, ..cem }.run(&[0], &[0.0], None, &mut ridge).unwrap();
        assert_eq!(reference.actions, reference.mean);
        assert_eq!(reference.cost, reference.trace);
    }

    #[test]
    fn ties_go_to_the_lower_sample() {
        let cem = Cem { iterations: 1, ..small() };
        let mut flat = fun(|_, _| 7.0);
        let found = cem.run(&[0], &[0.5; 6], None, &mut flat).unwrap();
        assert_eq!(found.actions, [0.5; 6], "sample 0 is the mean");
        let want: f64 = flat.1[0].chunks(6).take(8).map(|x| x[0]).sum::<f64>() / 8.0;
        assert_eq!(found.mean[0].to_bits(), want.to_bits());
    }

    #[test]
    fn the_floor_holds_and_reference_has_none() {
        let noise = vec![0.0; 10 * 64 * 6];
        let floored = small().run(&[0], &[0.0; 6], Some(&noise), &mut fun(|_, _| 0.0)).unwrap();
        assert_eq!(floored.std, [0.05; 6]);
        let reference = Cem { reference: true, ..small() };
        let found = reference.run(&[0], &[0.0; 6], Some(&noise), &mut fun(|_, _| 0.0)).unwrap();
        assert_eq!((found.std, found.actions), (vec![0.0; 6], vec![0.0; 6]));
    }

    #[test]
    fn infinite_costs_are_left_out() {
        let found = small().run(&[0], &[0.0; 6], None, &mut fun(|_, x| if x[0] < 1.0 { f64::INFINITY } else { x[0] }));
        let found = found.unwrap();
        assert!(found.actions[0] >= 1.0 && found.trace.iter().all(|cost| cost.is_finite()));
        let text = message(&small(), |_, _| f64::INFINITY);
        assert!(text.contains("cost must be finite for at least 2 samples, got 0 of 64"), "{text}");
    }

    #[test]
    fn nan_names_environment_and_sample() {
        let mut calls = 0;
        let mut cost = fun(|_, _| {
            calls += 1;
            if calls == 64 + 6 {
                f64::NAN
            } else {
                0.0
            }
        });
        let text = small().run(&[7, 9], &[0.0; 12], None, &mut cost).unwrap_err().to_string();
        assert!(text.contains("got NaN for environment row 1, sample 5, iteration 0"), "{text}");
        assert!(message(&small(), |_, _| f64::NEG_INFINITY).contains("got -inf"));
    }

    #[test]
    fn deadline_returns_the_best_so_far() {
        let cem = Cem { deadline: Some(Duration::ZERO), ..small() };
        let mut cost = fun(|_, x| distance(x, 1.0));
        let found = cem.run(&[0], &[0.0; 6], None, &mut cost).unwrap();
        assert_eq!((cost.1.len(), found.iterations, found.trace.len(), found.deadline_hit), (1, 1, 1, true));
        assert!((found.cost[0] - distance(&found.actions, 1.0)).abs() < 1e-15);
        let cem = Cem { deadline: Some(Duration::from_secs(3600)), ..small() };
        assert!(!cem.run(&[0], &[0.0; 6], None, &mut fun(|_, _| 0.0)).unwrap().deadline_hit);
    }

    #[test]
    fn a_failing_cost_ends_the_plan() {
        struct Broken;
        impl Cost for Broken {
            type Error = Error;
            fn cost(&mut self, _: &[f64], _: usize, _: &mut [f64]) -> Result<(), Error> {
                Err(Error::Index("mine".into()))
            }
        }
        let error = small().run(&[0], &[0.0; 6], None, &mut Broken).unwrap_err();
        assert!(matches!(error, Error::Index(text) if text == "mine"));
    }

    #[test]
    fn bad_numbers_are_named() {
        let cases = [
            ("samples must be at least 1", Cem { samples: 0, ..small() }),
            ("iterations must be at least 1", Cem { iterations: 0, ..small() }),
            ("iterations must be at most 65536", Cem { iterations: 65537, ..small() }),
            ("horizon must be at least 1", Cem { horizon: 0, ..small() }),
            ("action width must be at least 1", Cem { width: 0, ..small() }),
            ("elites must be in 2..=samples (64), got 1", Cem { elites: 1, ..small() }),
            ("elites must be in 2..=samples (64), got 65", Cem { elites: 65, ..small() }),
            ("init_std must be positive and finite, got 0", Cem { init_std: 0.0, ..small() }),
            ("init_std", Cem { init_std: f64::INFINITY, ..small() }),
            ("init_std", Cem { init_std: f64::NAN, ..small() }),
            ("min_std must be finite and not negative, got -1", Cem { min_std: -1.0, ..small() }),
            ("mean must have E * H * A = 9 values, got 6", Cem { horizon: 3, ..small() }),
            ("low must have shape (3,), got (2,)", Cem { low: Some(vec![0.0; 2]), ..small() }),
            ("high[1] must be finite, got inf", Cem { high: Some(vec![0.0, f64::INFINITY, 0.0]), ..small() }),
            (
                "low[0] = 1 must not exceed high[0] = 0",
                Cem { low: Some(vec![1.0; 3]), high: Some(vec![0.0; 3]), ..small() },
            ),
            ("low must be None", Cem { low: Some(vec![0.0; 3]), reference: true, ..small() }),
            ("high must be None", Cem { high: Some(vec![0.0; 3]), reference: true, ..small() }),
            (
                "no float32 number between",
                Cem { low: Some(vec![0.1; 3]), high: Some(vec![0.1; 3]), float32: true, ..small() },
            ),
        ];
        for (want, cem) in cases {
            let text = message(&cem, |_, _| 0.0);
            assert!(text.contains(want), "{text:?} lacks {want:?}");
        }
        let text = |mean: &[f64], noise: Option<&[f64]>, envs: &[u32]| {
            small().run(envs, mean, noise, &mut fun(|_, _| 0.0)).unwrap_err().to_string()
        };
        assert_eq!(text(&[0.0, 0.0, 0.0, 0.0, f64::NAN, 0.0], None, &[0]), "mean[0, 1, 1] must be finite, got NaN");
        assert!(text(&[], None, &[]).contains("number of environments"));
        assert!(text(&[0.0; 6], Some(&[0.0; 6]), &[0]).contains("noise must be (iterations, E, S, H, A)"));
        assert!(text(&[0.0; 6], Some(&vec![f64::NAN; 3840]), &[0]).contains("noise must be finite"));
    }

    #[test]
    fn float32_above_is_tight() {
        for x in [0.0, 0.1, -0.1, 1.0, 1e-60, -1e-60, 3.5e38, -1e-46] {
            let above = float32_above(x);
            assert!(above >= x && -float32_above(-x) <= x);
            assert!(above - x <= (x.abs() * 1.2e-7).max(1.5e-45) || above.is_infinite(), "{x} {above}");
        }
        assert_eq!(float32_above(-3.5e38), f64::from(f32::MIN));
        assert_eq!(float32_above(f64::NEG_INFINITY), f64::NEG_INFINITY);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn bounds_hold(
            bounds in prop::collection::vec((-3.0..3.0_f64, 1e-3..3.0_f64), 3),
            start in -5.0..5.0_f64,
            seed: u64,
            float32: bool,
        ) {
            let low: Vec<f64> = bounds.iter().map(|b| b.0).collect();
            let high: Vec<f64> = bounds.iter().map(|b| b.0 + b.1).collect();
            let cem = Cem { low: Some(low.clone()), high: Some(high.clone()), seed, float32, iterations: 4, ..small() };
            let mut cost = fun(|_, x| distance(x, 10.0));
            let found = cem.run(&[0], &[start; 6], None, &mut cost).unwrap();
            for x in cost.1.iter().flat_map(|c| c.chunks(3)).chain(found.actions.chunks(3)).chain(found.mean.chunks(3)) {
                for a in 0..3 {
                    prop_assert!(low[a] <= x[a] && x[a] <= high[a], "{} not in [{}, {}]", x[a], low[a], high[a]);
                    prop_assert!(!float32 || found.actions.iter().all(|x| f64::from(*x as f32) == *x));
                }
            }
            prop_assert!((0.0..=1.0).contains(&found.clipped[0]) && found.clipped[0] > 0.0);
        }

        #[test]
        fn environments_are_independent(
            env_ids in prop::collection::vec(any::<u32>(), 2..6),
            seed: u64,
            plan: u32,
            reference: bool,
            float32: bool,
        ) {
            let cem = Cem { seed, plan, reference, float32, iterations: 3, ..small() };
            let target = |e: usize| f64::from(env_ids[e] % 17) / 8.0 - 1.0;
            let mean: Vec<f64> = (0..env_ids.len() * 6).map(|i| i as f64 / 10.0).collect();
            let all = cem.run(&env_ids, &mean, None, &mut fun(|e, x| distance(x, target(e)))).unwrap();
            for e in 0..env_ids.len() {
                let span = e * 6..(e + 1) * 6;
                let one = cem.run(&env_ids[e..=e], &mean[span.clone()], None, &mut fun(|_, x| distance(x, target(e)))).unwrap();
                prop_assert_eq!(&one.actions[..], &all.actions[span.clone()]);
                prop_assert_eq!(&one.mean[..], &all.mean[span.clone()]);
                prop_assert_eq!(&one.std[..], &all.std[span]);
                prop_assert_eq!(one.cost[0].to_bits(), all.cost[e].to_bits());
            }
        }
    }
}
