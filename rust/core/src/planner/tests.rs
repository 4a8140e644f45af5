#![allow(clippy::float_cmp)] // equal to the bit is what these tests are about

use std::cell::RefCell;

use super::*;
use proptest::prelude::*;

/// Any function of (environment row, plan) as a cost; remembers what it was asked.
struct Fun<F>(F, Vec<Vec<f64>>);

impl<T: Real, F: FnMut(usize, &[f64]) -> f64> Cost<T> for Fun<F> {
    type Error = Error;

    fn cost(
        &mut self,
        candidates: &[T],
        samples: usize,
        costs: &mut [f64],
        _: &mut Interrupt<'_, Error>,
    ) -> Result<(), Error> {
        let candidates: Vec<f64> = candidates.iter().map(|&x| x.into()).collect();
        let block = candidates.len() / costs.len();
        for (row, (x, cost)) in candidates.chunks_exact(block).zip(costs).enumerate() {
            *cost = self.0(row / samples, x);
        }
        self.1.push(candidates);
        Ok(())
    }
}

fn fun<F: FnMut(usize, &[f64]) -> f64>(cost: F) -> Fun<F> {
    Fun(cost, Vec::new())
}

const ICEM: Method = Method::Icem(Icem { beta: 2.0, factor: 1.25, keep: 0.3, momentum: 0.1 });
const MPPI: Method = Method::Mppi { temperature: 0.5 };
const CEM: Method = Method::Cem { reference: false };
const REFERENCE: Method = Method::Cem { reference: true };
const METHODS: [Method; 3] = [CEM, ICEM, MPPI];

fn small() -> Planner {
    Planner { samples: 64, iterations: 10, elites: 8, init_std: 1.0, min_std: 0.05, method: CEM }
}

fn task<'a>(env_ids: &'a [u32], mean: &'a [f64]) -> Task<'a> {
    Task {
        horizon: 2,
        width: mean.len() / env_ids.len().max(1) / 2,
        env_ids,
        mean,
        kept: None,
        low: None,
        high: None,
        seed: 1,
        plan: 0,
        noise: None,
        deadline: None,
    }
}

fn one() -> Task<'static> {
    task(&[0], &[0.0; 6])
}

fn run<T: Real + Default>(
    planner: &Planner,
    task: &Task<'_>,
    cost: &mut impl Cost<T, Error = Error>,
) -> Result<Solution, Error> {
    planner.run(task, &mut Workspace::<T>::default(), cost, &mut || Ok(())).cloned()
}

fn distance(x: &[f64], target: f64) -> f64 {
    x.iter().map(|x| (x - target).powi(2)).sum()
}

fn message(planner: &Planner, task: &Task<'_>, cost: impl FnMut(usize, &[f64]) -> f64) -> String {
    run::<f64>(planner, task, &mut fun(cost)).unwrap_err().to_string()
}

#[test]
fn converges_for_each_environment() {
    let targets = [-0.5, 0.0, 1.5];
    for method in METHODS {
        let planner = Planner { samples: 300, elites: 30, iterations: 30, min_std: 1e-3, method, ..small() };
        let found =
            run::<f64>(&planner, &task(&[3, 1, 2], &[0.0; 18]), &mut fun(|e, x| distance(x, targets[e]))).unwrap();
        for (e, target) in targets.iter().enumerate() {
            let plan = &found.actions[e * 6..][..6];
            assert!(plan.iter().all(|x| (x - target).abs() < 2e-2), "{method:?} {plan:?} {target}");
            assert!((found.cost[e] - distance(plan, *target)).abs() < 1e-15, "the cost is that of the plan");
        }
        assert_eq!((found.iterations, found.trace.len(), found.deadline_hit), (30, 90, false));
    }
}

#[test]
fn finds_the_corner_of_a_box() {
    let (low, high) = ([-0.3, 0.2, -2.0], [0.5, 0.9, -1.0]);
    for method in METHODS {
        let planner = Planner { samples: 200, iterations: 20, method, ..small() };
        let task = Task { low: Some(&low), high: Some(&high), ..one() };
        let found = run::<f32>(&planner, &task, &mut fun(|_, x| x[0] - x[1] + x[2] + x[3] - x[4] + x[5])).unwrap();
        let corner = [-0.3, 0.9, -2.0, -0.3, 0.9, -2.0];
        assert!(
            found.actions.iter().zip(corner).all(|(x, want)| (x - want).abs() < 1e-2),
            "{method:?} {:?}",
            found.actions
        );
    }
}

#[test]
fn the_final_mean_is_scored_and_can_win() {
    for method in METHODS {
        let mut cost = fun(|_, x| distance(x, 0.3));
        let found = run::<f64>(&Planner { method, ..small() }, &one(), &mut cost).unwrap();
        assert_eq!(cost.1.len(), 11);
        assert_eq!(cost.1[10], found.mean);
        let best = cost.1.iter().flat_map(|c| c.chunks(6)).map(|x| distance(x, 0.3)).fold(f64::INFINITY, f64::min);
        assert_eq!(found.cost, [best]);
    }
}

#[test]
fn a_mean_between_two_modes_is_not_returned() {
    // Elites on both sides of a ridge: their average is the worst plan of all.
    for method in METHODS {
        let planner = Planner { iterations: 1, method, ..small() };
        let task = Task { horizon: 1, width: 1, mean: &[0.0], ..one() };
        let found = run::<f64>(&planner, &task, &mut fun(|_, x| (x[0].abs() - 1.0).powi(2))).unwrap();
        assert!((found.actions[0].abs() - 1.0).abs() < 0.2, "{:?} {:?}", found.actions, found.mean);
    }
    let planner = Planner { method: REFERENCE, ..small() };
    let found = run::<f64>(&planner, &one(), &mut fun(|_, x| (x[0].abs() - 1.0).powi(2))).unwrap();
    assert_eq!(found.actions, found.mean);
    assert_eq!(found.cost, found.trace[9..]);
}

#[test]
fn ties_go_to_the_lower_sample() {
    let planner = Planner { iterations: 1, ..small() };
    let mut flat = fun(|_, _| 7.0);
    let found = run::<f64>(&planner, &Task { mean: &[0.5; 6], ..one() }, &mut flat).unwrap();
    assert_eq!(found.actions, [0.5; 6], "sample 0 is the mean");
    let want: f64 = flat.1[0].chunks(6).take(8).map(|x| x[0]).sum::<f64>() / 8.0;
    assert_eq!(found.mean[0].to_bits(), want.to_bits());
    let mppi = run::<f64>(&Planner { method: MPPI, ..planner }, &Task { mean: &[0.5; 6], ..one() }, &mut flat).unwrap();
    assert_eq!(mppi.mean[0].to_bits(), want.to_bits(), "equal costs weigh the same");
}

#[test]
fn the_floor_holds_and_reference_has_none() {
    let noise = vec![0.0; 10 * 64 * 6];
    let task = Task { noise: Some(&noise), ..one() };
    for method in METHODS {
        let planner = Planner { iterations: 10, method, ..small() };
        let found = run::<f64>(&planner, &task, &mut fun(|_, _| 0.0)).unwrap();
        assert_eq!(found.std, [0.05; 6]);
    }
    let found = run::<f64>(&Planner { method: REFERENCE, ..small() }, &task, &mut fun(|_, _| 0.0)).unwrap();
    assert_eq!((found.std, found.actions), (vec![0.0; 6], vec![0.0; 6]));
}

#[test]
fn icem_shrinks_keeps_and_ends_with_the_mean() {
    let planner = Planner { samples: 40, elites: 10, iterations: 6, method: ICEM, ..small() };
    let mut cost = fun(|_, x| distance(x, 0.8));
    let found = run::<f64>(&planner, &one(), &mut cost).unwrap();
    let sizes: Vec<usize> = cost.1.iter().map(|c| c.len() / 6).collect();
    assert_eq!(sizes, [40, 32, 25, 20, 20, 20, 1]);
    assert_eq!(found.kept.len(), 3 * 6);
    for pair in cost.1[..6].windows(2) {
        let mut before: Vec<&[f64]> = pair[0].chunks(6).collect();
        before.sort_by(|a, b| distance(a, 0.8).total_cmp(&distance(b, 0.8)));
        let again: Vec<&[f64]> = pair[1].chunks(6).rev().take(3).rev().collect();
        assert_eq!(again, before[..3], "the last samples are the best before");
    }
    let best = cost.1[5].chunks(6).map(|x| distance(x, 0.8)).fold(f64::INFINITY, f64::min);
    assert_eq!(distance(&found.kept[..6], 0.8), best, "kept ones are best first");

    // The next plan: kept ones come first, and within bounds.
    let kept = vec![0.75; 18];
    let mut next = fun(|_, x| distance(x, 0.8));
    let task = Task { kept: Some(&kept), high: Some(&[0.5, 1.0, 0.75]), plan: 1, ..one() };
    run::<f64>(&planner, &task, &mut next).unwrap();
    assert_eq!(next.1[0][37 * 6..].to_vec(), [0.5, 0.75, 0.75].repeat(6));
}

#[test]
fn icem_mixes_in_the_old_distribution() {
    let noise: Vec<f64> = (0..64 * 6).map(|i| f64::from(i).sin()).collect();
    let task = Task { noise: Some(&noise), mean: &[0.5; 6], ..one() };
    let cost = |_: usize, x: &[f64]| distance(x, 1.0);
    let with = |momentum: f64| {
        let method = Method::Icem(Icem { beta: 0.0, factor: 1.0, keep: 0.0, momentum });
        run::<f64>(&Planner { iterations: 1, method, min_std: 0.0, ..small() }, &task, &mut fun(cost)).unwrap()
    };
    let (new, mixed) = (with(0.0), with(0.25));
    for j in 0..6 {
        assert!((mixed.mean[j] - (0.25 * 0.5 + 0.75 * new.mean[j])).abs() < 1e-12);
        assert!((mixed.std[j] - (0.25 + 0.75 * new.std[j])).abs() < 1e-12);
    }
    let cem = run::<f64>(&Planner { iterations: 1, min_std: 0.0, ..small() }, &task, &mut fun(cost)).unwrap();
    assert!(new.mean.iter().zip(&cem.mean).all(|(a, b)| (a - b).abs() < 1e-12), "white and without extras it is CEM");
}

#[test]
fn mppi_is_the_weighted_update() {
    let noise: Vec<f64> = (0..64 * 6).map(|i| (1.7 * f64::from(i)).sin()).collect();
    let mut cost = fun(|_, x| distance(x, 1.0));
    let planner = Planner { iterations: 1, min_std: 0.0, method: MPPI, ..small() };
    let found = run::<f64>(&planner, &Task { noise: Some(&noise), ..one() }, &mut cost).unwrap();
    let mut rows: Vec<(f64, &[f64])> = cost.1[0].chunks(6).map(|x| (distance(x, 1.0), x)).collect();
    rows.sort_by(|a, b| a.0.total_cmp(&b.0));
    rows.truncate(8);
    let gap = rows.iter().map(|row| row.0 - rows[0].0).sum::<f64>() / 8.0;
    let weights: Vec<f64> = rows.iter().map(|row| (-(row.0 - rows[0].0) / (0.5 * gap)).exp()).collect();
    let total: f64 = weights.iter().sum();
    for j in 0..6 {
        let mean = rows.iter().zip(&weights).map(|(row, w)| w * row.1[j]).sum::<f64>() / total;
        let var = rows.iter().zip(&weights).map(|(row, w)| w * (row.1[j] - mean).powi(2)).sum::<f64>() / total;
        assert!((found.mean[j] - mean).abs() < 1e-12 && (found.std[j] - var.sqrt()).abs() < 1e-12);
    }
}

#[test]
fn infinite_costs_are_left_out() {
    for method in METHODS {
        let planner = Planner { method, ..small() };
        let cost = |_: usize, x: &[f64]| if x[0] < 1.0 { f64::INFINITY } else { x[0] };
        let found = run::<f64>(&planner, &one(), &mut fun(cost)).unwrap();
        assert!(found.actions[0] >= 1.0 && found.trace.iter().all(|cost| cost.is_finite()));
        let text = message(&planner, &one(), |_, _| f64::INFINITY);
        assert!(text.contains("cost must be finite for at least 2 samples, got 0 of 64"), "{text}");
    }
}

#[test]
fn nan_names_environment_and_sample() {
    let mut calls = 0;
    let cost = |_: usize, _: &[f64]| {
        calls += 1;
        if calls == 64 + 6 {
            f64::NAN
        } else {
            0.0
        }
    };
    let text = message(&small(), &task(&[7, 9], &[0.0; 12]), cost);
    assert!(text.contains("got NaN for environment row 1, sample 5, iteration 0"), "{text}");
    assert!(message(&small(), &one(), |_, _| f64::NEG_INFINITY).contains("got -inf"));
}

#[test]
fn deadline_returns_the_best_so_far() {
    let mut cost = fun(|_, x| distance(x, 1.0));
    let found = run::<f64>(&small(), &Task { deadline: Some(Duration::ZERO), ..one() }, &mut cost).unwrap();
    assert_eq!((cost.1.len(), found.iterations, found.trace.len(), found.deadline_hit), (1, 1, 1, true));
    assert!((found.cost[0] - distance(&found.actions, 1.0)).abs() < 1e-15);
    let patient = Task { deadline: Some(Duration::from_secs(3600)), ..one() };
    assert!(!run::<f64>(&small(), &patient, &mut fun(|_, _| 0.0)).unwrap().deadline_hit);
}

#[test]
fn an_iteration_that_would_end_late_is_not_started() {
    let mut calls = 0;
    let slow = |_: usize, _: &[f64]| {
        calls += 1;
        if calls % 64 == 0 {
            std::thread::sleep(Duration::from_millis(60));
        }
        0.0
    };
    let start = Instant::now();
    let deadline = Some(Duration::from_millis(100));
    let found = run::<f64>(&small(), &Task { deadline, ..one() }, &mut fun(slow)).unwrap();
    assert_eq!((found.iterations, found.deadline_hit), (1, true));
    assert!(start.elapsed() >= Duration::from_millis(60));
}

#[test]
fn a_failing_cost_or_interrupt_ends_the_plan() {
    struct Broken;
    impl Cost<f32> for Broken {
        type Error = Error;
        fn cost(&mut self, _: &[f32], _: usize, _: &mut [f64], _: &mut Interrupt<'_, Error>) -> Result<(), Error> {
            Err(Error::Index("mine".into()))
        }
    }
    let error = run(&small(), &one(), &mut Broken).unwrap_err();
    assert!(matches!(error, Error::Index(text) if text == "mine"));

    let calls = RefCell::new(0);
    let mut counted = fun(|_, _| 0.0);
    let mut interrupt = || {
        *calls.borrow_mut() += 1;
        if *calls.borrow() == 4 {
            Err(Error::Index("stop".into()))
        } else {
            Ok(())
        }
    };
    let mut workspace = Workspace::<f64>::default();
    let error = small().run(&one(), &mut workspace, &mut counted, &mut interrupt).unwrap_err();
    assert!(matches!(error, Error::Index(text) if text == "stop"));
    assert_eq!(counted.1.len(), 3);
    let again = small().run(&one(), &mut workspace, &mut fun(|_, x| distance(x, 0.2)), &mut || Ok(())).unwrap();
    let fresh = run::<f64>(&small(), &one(), &mut fun(|_, x| distance(x, 0.2))).unwrap();
    assert_eq!(*again, fresh, "what an aborted plan left behind is forgotten");
}

#[test]
fn a_workspace_of_another_shape_is_as_good_as_new() {
    let cost = |e: usize, x: &[f64]| distance(x, e as f64);
    let mut workspace = Workspace::<f32>::default();
    for (method, samples) in [(ICEM, 80), (CEM, 30), (MPPI, 64), (ICEM, 64)] {
        for envs in [3, 1, 2] {
            let (ids, mean) = (vec![5; envs], vec![0.1; envs * 6]);
            let planner = Planner { samples, method, ..small() };
            let fresh = run::<f32>(&planner, &task(&ids, &mean), &mut fun(cost)).unwrap();
            let used = planner.run(&task(&ids, &mean), &mut workspace, &mut fun(cost), &mut || Ok(())).unwrap();
            assert_eq!(*used, fresh);
        }
    }
}

#[test]
fn bad_numbers_are_named() {
    let icem = |change: fn(&mut Icem)| {
        let mut icem = Icem { beta: 2.0, factor: 1.25, keep: 0.3, momentum: 0.1 };
        change(&mut icem);
        Planner { method: Method::Icem(icem), ..small() }
    };
    let planners = [
        ("samples must be at least 1", Planner { samples: 0, ..small() }),
        ("iterations must be at least 1", Planner { iterations: 0, ..small() }),
        ("iterations must be at most 65536", Planner { iterations: 65537, ..small() }),
        ("elites must be in 2..=samples (64), got 1", Planner { elites: 1, ..small() }),
        ("elites must be in 2..=samples (64), got 65", Planner { elites: 65, ..small() }),
        ("init_std must be positive and finite as float64, got 0", Planner { init_std: 0.0, ..small() }),
        ("init_std", Planner { init_std: f64::INFINITY, ..small() }),
        ("init_std", Planner { init_std: f64::NAN, ..small() }),
        ("min_std must be finite as float64 and not negative, got -1", Planner { min_std: -1.0, ..small() }),
        ("beta must be finite and not negative, got NaN", icem(|i| i.beta = f64::NAN)),
        ("factor must be finite and at least 1, got 0.9", icem(|i| i.factor = 0.9)),
        ("keep must be at least 0 and below 1, got 1", icem(|i| i.keep = 1.0)),
        ("momentum must be at least 0 and below 1, got -0.1", icem(|i| i.momentum = -0.1)),
        (
            "temperature must be positive and finite, got 0",
            Planner { method: Method::Mppi { temperature: 0.0 }, ..small() },
        ),
    ];
    for (want, planner) in planners {
        let text = message(&planner, &one(), |_, _| 0.0);
        assert!(text.contains(want), "{text:?} lacks {want:?}");
    }
    let ones = vec![f64::NAN; 3840];
    let tasks = [
        ("horizon must be at least 1", Task { horizon: 0, ..one() }),
        ("action width must be at least 1", Task { width: 0, ..one() }),
        ("number of environments", Task { env_ids: &[], mean: &[], ..one() }),
        ("mean must have E * H * A = 9 values, got 6", Task { horizon: 3, ..one() }),
        ("mean[0, 1, 1] must be finite, got NaN", Task { mean: &[0.0, 0.0, 0.0, 0.0, f64::NAN, 0.0], ..one() }),
        ("low must have shape (3,), got (2,)", Task { low: Some(&[0.0; 2]), ..one() }),
        ("high[1] must be finite, got inf", Task { high: Some(&[0.0, f64::INFINITY, 0.0]), ..one() }),
        ("low[0] = 1 must not exceed high[0] = 0", Task { low: Some(&[1.0; 3]), high: Some(&[0.0; 3]), ..one() }),
        ("noise must be (iterations, E, S, H, A)", Task { noise: Some(&[0.0; 6]), ..one() }),
        ("noise must be finite", Task { noise: Some(&ones), ..one() }),
        ("kept must have E * 0 * H * A = 0 values, got 6", Task { kept: Some(&[0.0; 6]), ..one() }),
    ];
    for (want, task) in tasks {
        let text = message(&small(), &task, |_, _| 0.0);
        assert!(text.contains(want), "{text:?} lacks {want:?}");
    }
    let reference = Planner { method: REFERENCE, ..small() };
    assert!(message(&reference, &Task { low: Some(&[0.0; 3]), ..one() }, |_, _| 0.0).contains("low must be None"));
    assert!(message(&reference, &Task { high: Some(&[0.0; 3]), ..one() }, |_, _| 0.0).contains("high must be None"));
    let kept = Task { kept: Some(&[f64::INFINITY; 12]), ..one() };
    assert!(message(&Planner { method: ICEM, ..small() }, &kept, |_, _| 0.0).contains("kept must be finite, got inf"));
    let narrow = Task { low: Some(&[0.1; 3]), high: Some(&[0.1; 3]), ..one() };
    let text = run::<f32>(&small(), &narrow, &mut fun(|_, _| 0.0)).unwrap_err().to_string();
    assert!(text.contains("no float32 number between"), "{text}");
    let huge = Task { mean: &[1e300; 6], ..one() };
    assert!(run::<f32>(&small(), &huge, &mut fun(|_, _| 0.0)).unwrap_err().to_string().contains("mean[0, 0, 0]"));
    let loud = Planner { init_std: 1e300, ..small() };
    assert!(run::<f32>(&loud, &one(), &mut fun(|_, _| 0.0)).unwrap_err().to_string().contains("init_std"));
}

#[test]
fn float32_bounds_are_tight() {
    for x in [0.0, 0.1, -0.1, 1.0, 1e-60, -1e-60, 3.5e38, -1e-46] {
        let (above, below) = (f64::from(f32::at_least(x)), f64::from(f32::at_most(x)));
        assert!(above >= x && below <= x);
        assert!(above - x <= (x.abs() * 1.2e-7).max(1.5e-45) || above.is_infinite(), "{x} {above}");
        assert!(x - below <= (x.abs() * 1.2e-7).max(1.5e-45) || x > 3e38, "{x} {below}");
    }
    assert_eq!(f32::at_least(-3.5e38), f32::MIN);
    assert_eq!(f32::at_least(f64::NEG_INFINITY), f32::NEG_INFINITY);
}

#[test]
fn float32_and_float64_see_the_same_noise() {
    for method in METHODS {
        let planner = Planner { iterations: 1, method, ..small() };
        let task = Task { mean: &[0.3; 6], low: Some(&[-1.0; 3]), ..one() };
        let (mut single, mut double) = (fun(|_, x| distance(x, 0.4)), fun(|_, x| distance(x, 0.4)));
        let a = run::<f32>(&planner, &task, &mut single).unwrap();
        let b = run::<f64>(&planner, &task, &mut double).unwrap();
        for (x, y) in single.1[0].iter().zip(&double.1[0]) {
            assert!((x - y).abs() < 1e-6, "{method:?} {x} {y}");
        }
        for (x, y) in a.mean.iter().zip(&b.mean).chain(a.std.iter().zip(&b.std)) {
            assert!((x - y).abs() < 1e-6, "{method:?} {x} {y}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn bounds_hold(
        bounds in prop::collection::vec((-3.0..3.0_f64, 1e-3..3.0_f64), 3),
        start in -5.0..5.0_f64,
        seed: u64,
        method in prop::sample::select(METHODS.to_vec()),
        kept in -5.0..5.0_f64,
    ) {
        let low: Vec<f64> = bounds.iter().map(|b| b.0).collect();
        let high: Vec<f64> = bounds.iter().map(|b| b.0 + b.1).collect();
        let planner = Planner { iterations: 4, method, ..small() };
        let (mean, kept) = ([start; 6], vec![kept; 6 * planner.kept()]);
        let task = Task { low: Some(&low), high: Some(&high), seed, mean: &mean, kept: Some(&kept), ..one() };
        let (mut single, mut double) = (fun(|_, x| distance(x, 10.0)), fun(|_, x| distance(x, 10.0)));
        let a = run::<f32>(&planner, &task, &mut single).unwrap();
        let b = run::<f64>(&planner, &task, &mut double).unwrap();
        for (found, seen) in [(&a, &single.1), (&b, &double.1)] {
            let plans = found.actions.chunks(3).chain(found.mean.chunks(3)).chain(found.kept.chunks(3));
            for x in seen.iter().flat_map(|c| c.chunks(3)).chain(plans) {
                for i in 0..3 {
                    prop_assert!(low[i] <= x[i] && x[i] <= high[i], "{} not in [{}, {}]", x[i], low[i], high[i]);
                }
            }
            prop_assert!((0.0..=1.0).contains(&found.clipped[0]) && found.clipped[0] > 0.0);
        }
        prop_assert!(a.actions.iter().all(|x| f64::from(*x as f32) == *x));
    }

    #[test]
    fn environments_are_independent(
        env_ids in prop::collection::vec(any::<u32>(), 8),
        seed: u64,
        plan: u32,
        method in prop::sample::select(vec![CEM, REFERENCE, ICEM, MPPI]),
        warm: bool,
    ) {
        let planner = Planner { iterations: 3, method, ..small() };
        let target = |e: usize| f64::from(env_ids[e] % 17) / 8.0 - 1.0;
        let mean: Vec<f64> = (0..env_ids.len() * 6).map(|i| i as f64 / 50.0).collect();
        let size = 6 * planner.kept();
        let kept: Vec<f64> = (0..env_ids.len() * size).map(|i| (i as f64).sin()).collect();
        let given = |e: std::ops::Range<usize>| warm.then(|| &kept[e.start * size..e.end * size]);
        let batch = Task { seed, plan, kept: given(0..8), ..task(&env_ids, &mean) };
        let all = run::<f32>(&planner, &batch, &mut fun(|e, x| distance(x, target(e)))).unwrap();
        for e in 0..env_ids.len() {
            let span = e * 6..(e + 1) * 6;
            let alone = Task { seed, plan, kept: given(e..e + 1), ..task(&env_ids[e..=e], &mean[span.clone()]) };
            let one = run::<f32>(&planner, &alone, &mut fun(|_, x| distance(x, target(e)))).unwrap();
            prop_assert_eq!(&one.actions[..], &all.actions[span.clone()]);
            prop_assert_eq!(&one.mean[..], &all.mean[span.clone()]);
            prop_assert_eq!(&one.std[..], &all.std[span]);
            prop_assert_eq!(&one.kept[..], &all.kept[e * size..(e + 1) * size]);
            prop_assert_eq!(one.cost[0].to_bits(), all.cost[e].to_bits());
        }
    }
}
