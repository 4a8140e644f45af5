//! Noise and planners for Python: arrays in, arrays out, the GIL released while Rust works.
#![allow(clippy::doc_markdown)] // these are Python's docstrings

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lewm_core::engine;
use lewm_core::planner::{self as core, Cost, Icem, Interrupt, Method, Real, Task, Workspace};
use lewm_core::rng;
use numpy::{Element, PyArray, PyArrayDyn, PyArrayMethods, PyUntypedArrayMethods};
use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::convert::{boolean, named, real, seconds, tuple, unsigned};
use crate::engine::Objective;
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

/// The planners' standard normal noise of one iteration; its bit layout is written in `rust/core/src/rng/mod.rs`.
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
///     float32 (E, S, width).
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
) -> PyResult<Bound<'py, PyArrayDyn<f32>>> {
    let env_ids = env_ids_of(env_ids)?;
    let out = py
        .detach(|| rng::noise(seed, plan, iteration, &env_ids, samples, width))
        .map_err(|error| PyErr::from(BindError::from(error)))?;
    array_of(py, out, &[env_ids.len(), samples, width])
}

/// A planner and the memory that it works in, for all environments at once.
///
/// Every iteration draws `mean + std * noise` clamped to the bounds (sample 0 is the mean), scores it with one call of the
/// cost, and fits the next mean and unbiased std, floored at `min_std`, to the elites (ties by sample index). At the end the
/// mean is scored too and the better of it and the best candidate ever is returned. "icem" and "mppi" differ as their
/// arguments tell. After the first plan of a shape nothing is allocated but the arrays that Python sees.
///
/// Args:
///     name: "cem", "icem" or "mppi".
///     samples: S.
///     iterations: at most 65536.
///     elites: in 2..=samples.
///     init_std: positive; standard deviation of the first iteration.
///     min_std: floor of the later ones.
///     dtype: "float32" or "float64", of the candidates. The distribution is float64 in both. Candidates are rounded before
///         they are scored and the bounds are rounded inwards, so the result is what was scored.
///     reference: cem only. The official update instead: no bounds (they are refused), no floor; the last mean is returned,
///         unscored, under the mean cost of the last elites.
///     beta: icem only. Exponent of the noise's spectrum over the horizon; its variance is 1 at every step.
///     factor: icem only. Iteration i has samples / factor**i of them, at least twice the elites.
///     keep: icem only. Fraction of the elites that is scored again in the next iteration, in place of its last samples.
///     momentum: icem only. Share of the old mean and std in the new. Sample 0 is the mean in the last iteration only.
///     temperature: mppi only. Elites weigh exp(-(cost - lowest) / (temperature * (mean elite cost - lowest))).
///
/// Raises:
///     ValueError: an unknown name or dtype. What is out of its domain is told by the first plan.
///     TypeError: an argument of the wrong type, missing for this name, or not one of its.
///
/// Source: de Boer et al. 2005; official LeWorldModel planner (topk, unbiased std, sample 0 the mean); Pinneri et al. 2020;
/// Williams et al. 2017 and TD-MPC2.
#[pyclass(module = "lewm._core", frozen)]
pub struct Planner {
    planner: core::Planner,
    workspace: Memory,
}

enum Memory {
    Single(Mutex<Workspace<f32>>),
    Double(Mutex<Workspace<f64>>),
}

#[pymethods]
impl Planner {
    #[new]
    #[pyo3(signature = (
        name, *, samples, iterations, elites, init_std=1.0, min_std=0.05, dtype="float32",
        reference=None, beta=None, factor=None, keep=None, momentum=None, temperature=None
    ))]
    #[allow(clippy::too_many_arguments)] // the planner's numbers, by keyword
    fn new(
        name: &str,
        #[pyo3(from_py_with = samples_of)] samples: usize,
        #[pyo3(from_py_with = iterations_of)] iterations: usize,
        #[pyo3(from_py_with = elites_of)] elites: usize,
        #[pyo3(from_py_with = init_std_of)] init_std: f64,
        #[pyo3(from_py_with = min_std_of)] min_std: f64,
        dtype: &str,
        reference: Option<&Bound<'_, PyAny>>,
        beta: Option<&Bound<'_, PyAny>>,
        factor: Option<&Bound<'_, PyAny>>,
        keep: Option<&Bound<'_, PyAny>>,
        momentum: Option<&Bound<'_, PyAny>>,
        temperature: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let needs = |argument: &str, value: Option<&Bound<'_, PyAny>>| match value {
            Some(value) => real(argument, value),
            None => Err(PyTypeError::new_err(format!("{name} needs {argument}"))),
        };
        let method = match name {
            "cem" => Method::Cem {
                reference: reference.map(|value| boolean("reference", value)).transpose()?.unwrap_or(false),
            },
            "icem" => Method::Icem(Icem {
                beta: needs("beta", beta)?,
                factor: needs("factor", factor)?,
                keep: needs("keep", keep)?,
                momentum: needs("momentum", momentum)?,
            }),
            "mppi" => Method::Mppi { temperature: needs("temperature", temperature)? },
            _ => {
                return Err(PyValueError::new_err(format!("name must be \"cem\", \"icem\" or \"mppi\", got {name:?}")))
            }
        };
        let icem = [("beta", beta), ("factor", factor), ("keep", keep), ("momentum", momentum)];
        let of = [("cem", "reference", reference), ("mppi", "temperature", temperature)];
        let of = of.into_iter().chain(icem.map(|(argument, value)| ("icem", argument, value)));
        for (owner, argument, value) in of {
            if value.is_some() && owner != name {
                return Err(PyTypeError::new_err(format!("{name} has no {argument}: it is one of {owner}")));
            }
        }
        let workspace = match dtype {
            "float32" => Memory::Single(Mutex::default()),
            "float64" => Memory::Double(Mutex::default()),
            _ => return Err(PyValueError::new_err(format!("dtype must be \"float32\" or \"float64\", got {dtype:?}"))),
        };
        Ok(Self { planner: core::Planner { samples, iterations, elites, init_std, min_std, method }, workspace })
    }

    /// Elites of each environment that a plan hands to the next, 0 unless it is "icem".
    #[getter]
    fn kept(&self) -> usize {
        self.planner.kept()
    }

    /// Plans. An environment's row depends on its id, mean, kept elites and costs only.
    ///
    /// Args:
    ///     cost: called with a new C-contiguous array (E, S, H, A) of `dtype`, returns costs (E, S), lower is better. NaN is
    ///         an error; +inf takes a candidate out. The last call, for the final mean, has S = 1. Exceptions pass through.
    ///     mean: float64 (E, H, A), start of the search.
    ///     low, high: float64 (A,), bounds of an action block, same units as `mean`; None is unbounded.
    ///     seed: 64-bit unsigned.
    ///     env_ids: uint32 (E,); None is 0..E.
    ///     plan: number of this plan, 32-bit unsigned; another plan draws other noise.
    ///     kept: float64 (E, K, H, A) with K = `self.kept`, elites of an earlier plan to score in the first iteration.
    ///     noise: float64 (iterations, E, S, H, A), white, instead of the generated noise.
    ///     deadline: seconds from the call. The first iteration always runs; another one starts if it would end in time,
    ///         taking as long as the one before.
    ///
    /// Returns:
    ///     dict: actions (E, H, A), cost (E,), mean and std (E, H, A) of the last distribution, elite_cost (E,) mean cost of
    ///     the last elites, iterations (int, those that ran), trace (iterations, E) mean elite costs, kept (E, K, H, A) best
    ///     elites of the last iteration, best first, clipped (E,) fraction of candidate entries that the bounds moved,
    ///     deadline_hit (bool: iterations or the scoring of the final mean were left out). Arrays are float64.
    ///
    /// Raises:
    ///     ValueError: a number or shape out of its domain (the text names it), a cost that is NaN or -inf or of the wrong
    ///         shape, fewer than two finite costs for an environment.
    ///     TypeError: an argument of the wrong type.
    ///     RuntimeError: the planner is at work, in another thread or around this call.
    #[pyo3(signature = (
        cost, mean, *, low=None, high=None, seed=0, env_ids=None, plan=0, kept=None, noise=None, deadline=None
    ))]
    #[allow(clippy::too_many_arguments)] // the task, by keyword
    fn solve<'py>(
        &self,
        cost: &Bound<'py, PyAny>,
        mean: &Bound<'py, PyAny>,
        low: Option<&Bound<'py, PyAny>>,
        high: Option<&Bound<'py, PyAny>>,
        #[pyo3(from_py_with = seed_of)] seed: u64,
        env_ids: Option<&Bound<'py, PyAny>>,
        #[pyo3(from_py_with = plan_of)] plan: u32,
        kept: Option<&Bound<'py, PyAny>>,
        noise: Option<&Bound<'py, PyAny>>,
        #[pyo3(from_py_with = deadline_of)] deadline: Option<Duration>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let py = cost.py();
        let objective = cost.cast::<Objective>().ok().map(|objective| Arc::clone(&objective.get().objective));
        if objective.is_none() && !cost.is_callable() {
            return Err(PyTypeError::new_err(format!("cost must be callable, got {}", cost.get_type())));
        }
        let (mean, shape) = floats("mean", mean)?;
        let &[envs, horizon, width] = &shape[..] else {
            return Err(PyValueError::new_err(format!("mean must have shape (E, H, A), got {}", tuple(&shape))));
        };
        let array = |name: &str, shape: &[usize], letters: &str, values: Option<&Bound<'py, PyAny>>| match values
            .map(|values| floats(name, values))
            .transpose()?
        {
            Some((_, got)) if got != shape => Err(PyValueError::new_err(format!(
                "{name} must have shape {letters}{}, got {}",
                tuple(shape),
                tuple(&got)
            ))),
            values => Ok(values.map(|(values, _)| values)),
        };
        let low = array("low", &[width], "", low)?;
        let high = array("high", &[width], "", high)?;
        let kept = array("kept", &[envs, self.kept(), horizon, width], "(E, K, H, A) = ", kept)?;
        let core::Planner { samples, iterations, .. } = self.planner;
        let noise = array("noise", &[iterations, envs, samples, horizon, width], "(iterations, E, S, H, A) = ", noise)?;
        let env_ids = match env_ids {
            Some(env_ids) => env_ids_of(env_ids)?,
            None => (0..envs as u32).collect(),
        };
        if env_ids.len() != envs {
            return Err(PyValueError::new_err(format!("env_ids must have shape ({envs},), got ({},)", env_ids.len())));
        }
        let task = Task {
            horizon,
            width,
            env_ids: &env_ids,
            mean: &mean,
            kept: kept.as_deref(),
            low: low.as_deref(),
            high: high.as_deref(),
            seed,
            plan,
            noise: noise.as_deref(),
            deadline,
        };
        if let Some(objective) = objective {
            let Memory::Single(workspace) = &self.workspace else {
                return Err(PyValueError::new_err(
                    "dtype must be \"float32\" with an Objective as cost, got \"float64\"",
                ));
            };
            if objective.envs() != envs {
                let text = format!("mean must have as many environments as cost, {}, got {envs}", objective.envs());
                return Err(PyValueError::new_err(text));
            }
            return solve(py, &self.planner, &task, workspace, &mut EngineCost(&objective));
        }
        let mut cost = PythonCost { callable: cost.clone().unbind(), envs, horizon, width };
        match &self.workspace {
            Memory::Single(workspace) => solve(py, &self.planner, &task, workspace, &mut cost),
            Memory::Double(workspace) => solve(py, &self.planner, &task, workspace, &mut cost),
        }
    }
}

/// The plan with any cost, outside the GIL; signals are looked at every 20 ms, because that needs the GIL.
fn solve<'py, T, C>(
    py: Python<'py>,
    planner: &core::Planner,
    task: &Task<'_>,
    workspace: &Mutex<Workspace<T>>,
    cost: &mut C,
) -> PyResult<Bound<'py, PyDict>>
where
    T: Real,
    C: Cost<T, Error = BindError> + Send,
{
    const SIGNALS: Duration = Duration::from_millis(20);
    let found = py.detach(|| {
        // A plan that panicked left nothing behind that the next one reads.
        let mut workspace = match workspace.try_lock() {
            Ok(workspace) => workspace,
            Err(std::sync::TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(std::sync::TryLockError::WouldBlock) => {
                return Err(BindError(PyRuntimeError::new_err(
                    "this planner is at work: give each thread one of its own",
                )))
            }
        };
        let mut looked = Instant::now();
        let mut interrupt = || {
            if looked.elapsed() < SIGNALS {
                return Ok(());
            }
            looked = Instant::now();
            Python::attach(|py| Ok(py.check_signals()?))
        };
        planner.run(task, &mut workspace, cost, &mut interrupt).cloned()
    })?;
    let (envs, plans) = (task.env_ids.len(), [task.env_ids.len(), task.horizon, task.width]);
    let elite_cost = found.trace[found.trace.len() - envs..].to_vec();
    let out = PyDict::new(py);
    out.set_item("actions", array_of(py, found.actions, &plans)?)?;
    out.set_item("cost", array_of(py, found.cost, &[envs])?)?;
    out.set_item("mean", array_of(py, found.mean, &plans)?)?;
    out.set_item("std", array_of(py, found.std, &plans)?)?;
    out.set_item("elite_cost", array_of(py, elite_cost, &[envs])?)?;
    out.set_item("iterations", found.iterations)?;
    out.set_item("trace", array_of(py, found.trace, &[found.iterations, envs])?)?;
    out.set_item("kept", array_of(py, found.kept, &[envs, planner.kept(), task.horizon, task.width])?)?;
    out.set_item("clipped", array_of(py, found.clipped, &[envs])?)?;
    out.set_item("deadline_hit", found.deadline_hit)?;
    Ok(out)
}

/// An engine's model as the planner's cost.
struct EngineCost<'a>(&'a engine::Objective);

impl Cost<f32> for EngineCost<'_> {
    type Error = BindError;

    fn cost(
        &mut self,
        candidates: &[f32],
        samples: usize,
        costs: &mut [f64],
        _: &mut Interrupt<'_, BindError>,
    ) -> Result<(), BindError> {
        Ok(self.0.costs(candidates, samples, costs)?)
    }
}

/// A Python callable as the planner's cost.
struct PythonCost {
    callable: Py<PyAny>,
    envs: usize,
    horizon: usize,
    width: usize,
}

impl<T: Real + Element> Cost<T> for PythonCost {
    type Error = BindError;

    fn cost(
        &mut self,
        candidates: &[T],
        samples: usize,
        costs: &mut [f64],
        interrupt: &mut Interrupt<'_, BindError>,
    ) -> Result<(), BindError> {
        // A callable of C code alone would never look at signals.
        interrupt()?;
        let shape = [self.envs, samples, self.horizon, self.width];
        Python::attach(|py| {
            // A new array each time: the callable may keep it.
            let argument = PyArray::from_slice(py, candidates).reshape(shape)?;
            let result = self.callable.bind(py).call1((argument,))?;
            let want = [self.envs, samples];
            if let Ok(result) = result.cast::<PyArrayDyn<f64>>() {
                let result = result.readonly();
                let as_wanted = result.shape() == want && result.is_c_contiguous();
                if let (true, Ok(values)) = (as_wanted, result.as_slice()) {
                    costs.copy_from_slice(values);
                    return Ok(());
                }
            }
            let (values, shape) = floats("cost's result", &result)?;
            if shape != want {
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
}
