//! Noise and CEM for Python: arrays in, arrays out, the GIL released while Rust works.
#![allow(clippy::doc_markdown)] // these are Python's docstrings

use std::time::Duration;

use lewm_core::cem::{Cem, Cost};
use lewm_core::rng;
use numpy::{Element, PyArray, PyArrayDyn, PyArrayMethods, PyUntypedArrayMethods};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::convert::{boolean, named, real, seconds, tuple, unsigned};
use crate::error::BindError;

/// Philox4x32-10 words of counters (N, 4) uint32 under a key (2,) uint32.
///
/// Returns:
///     uint32 (N, 4).
///
/// Raises:
///     ValueError: a wrong shape, or an entry that is not a 32-bit unsigned number.
///     TypeError: an array that is not of integers.
///
/// Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
#[pyfunction]
pub fn philox<'py>(counter: &Bound<'py, PyAny>, key: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyArrayDyn<u32>>> {
    let py = counter.py();
    let (counters, shape) = words("counter", counter)?;
    if shape.len() != 2 || shape[1] != 4 {
        return Err(PyValueError::new_err(format!("counter must have shape (N, 4), got {}", tuple(&shape))));
    }
    let (key, shape) = words("key", key)?;
    let &[k0, k1] = &key[..] else {
        return Err(PyValueError::new_err(format!("key must have shape (2,), got {}", tuple(&shape))));
    };
    let out: Vec<u32> =
        py.detach(|| counters.chunks_exact(4).flat_map(|c| rng::philox([c[0], c[1], c[2], c[3]], [k0, k1])).collect());
    array_of(py, out, &[counters.len() / 4, 4])
}

/// The planners' standard normal noise of one iteration; its bit layout is written in `rust/core/src/rng.rs`.
///
/// Args:
///     seed: 64-bit unsigned.
///     env_ids: uint32 (E,); an environment's noise depends on its own id only.
///     plan: number of the plan, 32-bit unsigned.
///     iteration: below 65536.
///     samples: S.
///     width: horizon times action width, at most 262144.
///
/// Returns:
///     float64 (E, S, width).
///
/// Raises:
///     ValueError: a number out of its range.
///     TypeError: something that is not an integer.
#[pyfunction]
pub fn noise<'py>(
    py: Python<'py>,
    #[pyo3(from_py_with = seed_of)] seed: u64,
    env_ids: &Bound<'py, PyAny>,
    #[pyo3(from_py_with = plan_of)] plan: u32,
    #[pyo3(from_py_with = iteration_of)] iteration: usize,
    #[pyo3(from_py_with = samples_of)] samples: usize,
    #[pyo3(from_py_with = width_of)] width: usize,
) -> PyResult<Bound<'py, PyArrayDyn<f64>>> {
    let env_ids = env_ids_of(env_ids)?;
    let out = py
        .detach(|| rng::noise(seed, plan, iteration, &env_ids, samples, width))
        .map_err(|error| PyErr::from(BindError::from(error)))?;
    array_of(py, out, &[env_ids.len(), samples, width])
}

/// Plans by the cross-entropy method, for all environments at once.
///
/// Every iteration draws `mean + std * noise` clamped to the bounds (sample 0 is the mean), scores it with one call of
/// `cost`, and fits the next mean and unbiased std, floored at `min_std`, to the elites (ties by sample index). At the end
/// the mean is scored too and the better of it and the best candidate ever is returned. An environment's row depends on
/// its id, mean and costs only. Exceptions in `cost` pass through unchanged.
///
/// Args:
///     cost: called with a new C-contiguous array (E, S, H, A) of `dtype`, returns costs (E, S), lower is better. NaN is an
///         error; +inf takes a candidate out. The last call, for the final mean, has S = 1.
///     mean: float64 (E, H, A), start of the search.
///     low, high: float64 (A,), bounds of an action block, same units as `mean`; None is unbounded.
///     samples: S.
///     iterations: at most 65536.
///     elites: in 2..=samples.
///     init_std: positive; standard deviation of the first iteration.
///     min_std: floor of the later ones.
///     seed: 64-bit unsigned.
///     env_ids: uint32 (E,); None is 0..E.
///     plan: number of this plan, 32-bit unsigned; another plan draws other noise.
///     reference: the official update instead: no bounds (they are refused), no floor; the last mean is returned, unscored,
///         under the mean cost of the last elites.
///     dtype: "float32" or "float64", of what `cost` gets. The distribution is float64 in both. With "float32", candidates
///         are rounded before they are scored and the bounds are rounded inwards, so the result is what was scored.
///     noise: float64 (iterations, E, S, H, A) instead of the generated noise.
///     deadline: seconds from the call; checked after each iteration, so at least one runs.
///
/// Returns:
///     dict: actions (E, H, A), cost (E,), mean and std (E, H, A) of the last distribution, elite_cost (E,) mean cost of the
///     last elites, iterations (int, those that ran), trace (iterations, E) mean elite costs, clipped (E,) fraction of
///     candidate entries that the bounds moved, deadline_hit (bool: time was up, so the final mean was not scored).
///     Arrays are float64.
///
/// Raises:
///     ValueError: a number or shape out of its domain (the text names it), a cost that is NaN or -inf or of the wrong
///         shape, fewer than two finite costs for an environment.
///     TypeError: an argument of the wrong type.
///
/// Source: de Boer et al. 2005; official LeWorldModel planner (topk, unbiased std, sample 0 the mean).
#[pyfunction]
#[pyo3(signature = (
    cost, mean, *, low=None, high=None, samples, iterations, elites, init_std=1.0, min_std=0.05, seed=0,
    env_ids=None, plan=0, reference=false, dtype="float32", noise=None, deadline=None
))]
#[allow(clippy::too_many_arguments)] // the planner's numbers, by keyword
pub fn cem<'py>(
    cost: &Bound<'py, PyAny>,
    mean: &Bound<'py, PyAny>,
    low: Option<&Bound<'py, PyAny>>,
    high: Option<&Bound<'py, PyAny>>,
    #[pyo3(from_py_with = samples_of)] samples: usize,
    #[pyo3(from_py_with = iterations_of)] iterations: usize,
    #[pyo3(from_py_with = elites_of)] elites: usize,
    #[pyo3(from_py_with = init_std_of)] init_std: f64,
    #[pyo3(from_py_with = min_std_of)] min_std: f64,
    #[pyo3(from_py_with = seed_of)] seed: u64,
    env_ids: Option<&Bound<'py, PyAny>>,
    #[pyo3(from_py_with = plan_of)] plan: u32,
    #[pyo3(from_py_with = reference_of)] reference: bool,
    dtype: &str,
    noise: Option<&Bound<'py, PyAny>>,
    #[pyo3(from_py_with = deadline_of)] deadline: Option<Duration>,
) -> PyResult<Bound<'py, PyDict>> {
    let py = cost.py();
    if !cost.is_callable() {
        return Err(PyTypeError::new_err(format!("cost must be callable, got {}", cost.get_type())));
    }
    let (mean, shape) = floats("mean", mean)?;
    let &[envs, horizon, width] = &shape[..] else {
        return Err(PyValueError::new_err(format!("mean must have shape (E, H, A), got {}", tuple(&shape))));
    };
    let bound = |name: &str, values: Option<&Bound<'py, PyAny>>| match values.map(|v| floats(name, v)).transpose()? {
        Some((_, shape)) if shape != [width] => {
            Err(PyValueError::new_err(format!("{name} must have shape ({width},), got {}", tuple(&shape))))
        }
        values => Ok(values.map(|(values, _)| values)),
    };
    let planner = Cem {
        samples,
        iterations,
        elites,
        horizon,
        width,
        init_std,
        min_std,
        low: bound("low", low)?,
        high: bound("high", high)?,
        seed,
        plan,
        reference,
        float32: match dtype {
            "float32" => true,
            "float64" => false,
            _ => return Err(PyValueError::new_err(format!("dtype must be \"float32\" or \"float64\", got {dtype:?}"))),
        },
        deadline,
    };
    let env_ids = match env_ids {
        Some(env_ids) => env_ids_of(env_ids)?,
        None => (0..envs as u32).collect(),
    };
    if env_ids.len() != envs {
        return Err(PyValueError::new_err(format!("env_ids must have shape ({envs},), got ({},)", env_ids.len())));
    }
    let noise = match noise.map(|noise| floats("noise", noise)).transpose()? {
        Some((_, shape)) if shape != [planner.iterations, envs, planner.samples, horizon, width] => {
            let want = [planner.iterations, envs, planner.samples, horizon, width];
            return Err(PyValueError::new_err(format!(
                "noise must have shape (iterations, E, S, H, A) = {}, got {}",
                tuple(&want),
                tuple(&shape)
            )));
        }
        noise => noise.map(|(noise, _)| noise),
    };

    let mut python = PythonCost { callable: cost.clone().unbind(), envs, horizon, width, float32: planner.float32 };
    let found = py.detach(|| planner.run(&env_ids, &mean, noise.as_deref(), &mut python))?;

    let plans = [envs, horizon, width];
    let elite_cost = found.trace[found.trace.len() - envs..].to_vec();
    let out = PyDict::new(py);
    out.set_item("actions", array_of(py, found.actions, &plans)?)?;
    out.set_item("cost", array_of(py, found.cost, &[envs])?)?;
    out.set_item("mean", array_of(py, found.mean, &plans)?)?;
    out.set_item("std", array_of(py, found.std, &plans)?)?;
    out.set_item("elite_cost", array_of(py, elite_cost, &[envs])?)?;
    out.set_item("iterations", found.iterations)?;
    out.set_item("trace", array_of(py, found.trace, &[found.iterations, envs])?)?;
    out.set_item("clipped", array_of(py, found.clipped, &[envs])?)?;
    out.set_item("deadline_hit", found.deadline_hit)?;
    Ok(out)
}

/// A Python callable as the planner's cost.
struct PythonCost {
    callable: Py<PyAny>,
    envs: usize,
    horizon: usize,
    width: usize,
    float32: bool,
}

enum Candidates {
    Single(Vec<f32>),
    Double(Vec<f64>),
}

impl Cost for PythonCost {
    type Error = BindError;

    fn cost(&mut self, candidates: &[f64], samples: usize, costs: &mut [f64]) -> Result<(), BindError> {
        // A new array each time: the callable may keep it. The cast is exact: the planner already rounded for float32.
        let candidates = if self.float32 {
            Candidates::Single(candidates.iter().map(|&x| x as f32).collect())
        } else {
            Candidates::Double(candidates.to_vec())
        };
        let shape = [self.envs, samples, self.horizon, self.width];
        Python::attach(|py| {
            py.check_signals()?;
            let argument = match candidates {
                Candidates::Single(values) => array_of(py, values, &shape)?.into_any(),
                Candidates::Double(values) => array_of(py, values, &shape)?.into_any(),
            };
            let (values, shape) = floats("cost's result", &self.callable.bind(py).call1((argument,))?)?;
            if shape != [self.envs, samples] {
                return Err(PyValueError::new_err(format!(
                    "cost returned shape {}, want (E, S) = ({}, {samples})",
                    tuple(&shape),
                    self.envs
                )));
            }
            costs.copy_from_slice(&values);
            Ok(())
        })
        .map_err(BindError)
    }
}

/// A vector as an array of this shape, without a copy.
fn array_of<'py, T: Element>(py: Python<'py>, values: Vec<T>, shape: &[usize]) -> PyResult<Bound<'py, PyArrayDyn<T>>> {
    PyArray::from_vec(py, values).reshape(shape)
}

/// The numbers of anything that `numpy.asarray` takes, and its shape. `kinds` are the dtype kinds that it may have: a cast
/// that changes what was meant (objects, strings, complex, fractions to integers) is refused.
fn numbers<T: Element + Clone>(
    name: &str,
    values: &Bound<'_, PyAny>,
    kinds: &str,
    want: &str,
) -> PyResult<(Vec<T>, Vec<usize>)> {
    let py = values.py();
    let array = py.import(intern!(py, "numpy"))?.call_method1(intern!(py, "asarray"), (values,))?;
    let kind: String = array.getattr(intern!(py, "dtype"))?.getattr(intern!(py, "kind"))?.extract()?;
    if !kinds.contains(&kind) {
        let dtype = array.getattr(intern!(py, "dtype"))?;
        return Err(PyTypeError::new_err(format!("{name} must be an array of {want}, got dtype {dtype}")));
    }
    let array = array.call_method1(intern!(py, "astype"), (numpy::dtype::<T>(py),))?;
    let array = array.cast_into::<PyArrayDyn<T>>()?;
    Ok((array.readonly().as_array().iter().cloned().collect(), array.shape().to_vec()))
}

fn floats(name: &str, values: &Bound<'_, PyAny>) -> PyResult<(Vec<f64>, Vec<usize>)> {
    numbers(name, values, "fiu", "real numbers")
}

/// 32-bit unsigned numbers from an integer array of any width.
fn words(name: &str, values: &Bound<'_, PyAny>) -> PyResult<(Vec<u32>, Vec<usize>)> {
    // A uint64 above the range of int64 wraps to a negative number and is refused with the others.
    let (wide, shape) = numbers::<i64>(name, values, "iu", "32-bit unsigned integers")?;
    let narrow = |&x: &i64| {
        u32::try_from(x).map_err(|_| PyValueError::new_err(format!("{name} must hold numbers in 0..2^32, got {x}")))
    };
    Ok((wide.iter().map(narrow).collect::<PyResult<_>>()?, shape))
}

fn env_ids_of(values: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
    let (env_ids, shape) = words("env_ids", values)?;
    if shape.len() != 1 || shape[0] == 0 {
        return Err(PyValueError::new_err(format!(
            "env_ids must have shape (E,) with E at least 1, got {}",
            tuple(&shape)
        )));
    }
    Ok(env_ids)
}

named! {
    seed_of("seed") -> u64 = unsigned;
    plan_of("plan") -> u32 = unsigned;
    iteration_of("iteration") -> usize = unsigned;
    width_of("width") -> usize = unsigned;
    samples_of("samples") -> usize = unsigned;
    iterations_of("iterations") -> usize = unsigned;
    elites_of("elites") -> usize = unsigned;
    init_std_of("init_std") -> f64 = real;
    min_std_of("min_std") -> f64 = real;
    deadline_of("deadline") -> Option<Duration> = seconds;
    reference_of("reference") -> bool = boolean;
}
