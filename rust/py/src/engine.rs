//! `Engine`: the CPU inference engine for Python.

// pyo3 hands arguments over by value.
#![allow(clippy::needless_pass_by_value)]

use std::sync::Arc;

use lewm_core::engine::{self, Config, Cost, Goal, Precision, Shape, Tensor, Tensors};
use lewm_core::pool::Pool;
use numpy::{Element, PyArray, PyArrayDyn, PyArrayMethods, PyReadonlyArrayDyn, PyUntypedArrayMethods};
use pyo3::exceptions::{PyKeyError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::convert::{tuple, unsigned};
use crate::error::BindError;

type Result<T> = std::result::Result<T, BindError>;

/// A model on this processor: encoder and rollout, without torch.
#[pyclass(frozen, module = "lewm._core")]
pub struct Engine {
    pub engine: Arc<engine::Engine>,
}

#[pymethods]
impl Engine {
    #[new]
    #[pyo3(signature = (config, weights, *, precision = "float32", cpu = None, threads = None))]
    fn new(
        py: Python<'_>,
        config: &Bound<'_, PyDict>,
        weights: &Bound<'_, PyDict>,
        precision: &str,
        cpu: Option<String>,
        threads: Option<usize>,
    ) -> Result<Self> {
        let config = config_of(config)?;
        let tensors = weights.iter().map(|(name, value)| tensor(&name, &value)).collect::<PyResult<Tensors>>()?;
        let precision = precision_of(precision)?;
        let engine = py.detach(|| {
            let pool = match threads {
                Some(threads) => Arc::new(Pool::new(threads)),
                None => Pool::global()?,
            };
            engine::Engine::new(&config, &tensors, precision, cpu.as_deref(), pool)
        })?;
        Ok(Self { engine: Arc::new(engine) })
    }

    /// Names of the instruction sets that this processor has for a precision, the best first.
    #[staticmethod]
    fn instruction_sets(precision: &str) -> Result<Vec<&'static str>> {
        Ok(engine::Engine::instruction_sets(precision_of(precision)?))
    }

    #[getter]
    fn precision(&self) -> &'static str {
        self.engine.precision().name()
    }

    #[getter]
    fn cpu(&self) -> &'static str {
        self.engine.cpu()
    }

    #[getter]
    fn threads(&self) -> usize {
        self.engine.threads()
    }

    fn peak(&self, py: Python<'_>) -> f64 {
        py.detach(|| self.engine.peak())
    }

    fn encode<'py>(&self, py: Python<'py>, frames: PyReadonlyArrayDyn<'py, u8>) -> Result<Bound<'py, PyArrayDyn<f32>>> {
        let config = self.engine.config();
        let (size, shape) = (config.image_size, frames.shape());
        if shape.len() != 4 || shape[1..] != [size, size, 3] {
            let want = format!("frames must have shape (N, {size}, {size}, 3), got {}", tuple(shape));
            return Err(PyValueError::new_err(want).into());
        }
        let mut out = vec![0.0; shape[0] * config.embed_dim];
        let frames_data = slice("frames", &frames)?;
        py.detach(|| self.engine.encode(frames_data, &mut out))?;
        array(py, out, &[shape[0], config.embed_dim])
    }

    #[pyo3(signature = (z, candidates, past = None))]
    fn rollout<'py>(
        &self,
        py: Python<'py>,
        z: PyReadonlyArrayDyn<'py, f32>,
        candidates: PyReadonlyArrayDyn<'py, f32>,
        past: Option<PyReadonlyArrayDyn<'py, f32>>,
    ) -> Result<Bound<'py, PyArrayDyn<f32>>> {
        let shape = shape_of(&z, &candidates)?;
        let (z, candidates) = (slice("z", &z)?, slice("candidates", &candidates)?);
        let past = past.as_ref().map_or(Ok(&[][..]), |past| slice("past", past))?;
        let (tokens, width) = (shape.frames + shape.horizon, self.engine.config().embed_dim);
        let mut out = vec![0.0; shape.envs * shape.samples * tokens * width];
        py.detach(|| self.engine.rollout(shape, z, past, candidates, &mut out))?;
        array(py, out, &[shape.envs, shape.samples, tokens, width])
    }

    fn head<'py>(
        &self,
        py: Python<'py>,
        name: &str,
        rows: PyReadonlyArrayDyn<'py, f32>,
    ) -> Result<Bound<'py, PyArrayDyn<f32>>> {
        let &[count, _] = rows.shape() else {
            let got = tuple(rows.shape());
            return Err(PyValueError::new_err(format!("rows must have shape (N, inputs), got {got}")).into());
        };
        let out = self.engine.head(name, slice("rows", &rows)?)?;
        let width = out.len() / count.max(1);
        array(py, out, &[count, width])
    }

    #[pyo3(signature = (z, goal, candidates, past = None, cost = "latent"))]
    fn costs<'py>(
        &self,
        py: Python<'py>,
        z: PyReadonlyArrayDyn<'py, f32>,
        goal: PyReadonlyArrayDyn<'py, f32>,
        candidates: PyReadonlyArrayDyn<'py, f32>,
        past: Option<PyReadonlyArrayDyn<'py, f32>>,
        cost: &str,
    ) -> Result<Bound<'py, PyArrayDyn<f64>>> {
        let (shape, cost) = (shape_of(&z, &candidates)?, cost_of(cost)?);
        let (z, candidates, goal) = (slice("z", &z)?, slice("candidates", &candidates)?, slice("goal", &goal)?);
        let past = past.as_ref().map_or(Ok(&[][..]), |past| slice("past", past))?;
        let mut out = vec![0.0; shape.envs * shape.samples];
        let goal = Goal { latents: goal, cost };
        py.detach(|| self.engine.costs(shape, z, past, goal, candidates, &mut out))?;
        array(py, out, &[shape.envs, shape.samples])
    }

    #[pyo3(signature = (z, goal, past = None, cost = "latent"))]
    fn objective(
        &self,
        z: PyReadonlyArrayDyn<'_, f32>,
        goal: PyReadonlyArrayDyn<'_, f32>,
        past: Option<PyReadonlyArrayDyn<'_, f32>>,
        cost: &str,
    ) -> Result<Objective> {
        let &[envs, frames, _] = z.shape() else {
            return Err(PyValueError::new_err(format!("z must have shape (E, T, D), got {}", tuple(z.shape()))).into());
        };
        let past = past.as_ref().map_or(Ok(Vec::new()), |past| slice("past", past).map(<[f32]>::to_vec))?;
        let z = slice("z", &z)?.to_vec();
        let goal = Goal { latents: slice("goal", &goal)?, cost: cost_of(cost)? };
        let objective = engine::Objective::new(Arc::clone(&self.engine), envs, frames, z, past, goal)?;
        Ok(Objective { objective: Arc::new(objective) })
    }
}

/// What plans cost an engine's model; `Planner.solve` runs it without Python.
#[pyclass(frozen, module = "lewm._core")]
pub struct Objective {
    pub objective: Arc<engine::Objective>,
}

fn shape_of(z: &PyReadonlyArrayDyn<'_, f32>, candidates: &PyReadonlyArrayDyn<'_, f32>) -> Result<Shape> {
    match (z.shape(), candidates.shape()) {
        (&[envs, frames, _], &[same, samples, horizon, _]) if envs == same => {
            Ok(Shape { envs, frames, samples, horizon })
        }
        (z, candidates) => {
            let (z, candidates) = (tuple(z), tuple(candidates));
            Err(PyValueError::new_err(format!(
                "want z (E, T, D) and candidates (E, S, H, A), got {z} and {candidates}"
            ))
            .into())
        }
    }
}

fn slice<'a, T: Element>(name: &str, array: &'a PyReadonlyArrayDyn<'_, T>) -> Result<&'a [T]> {
    // A slice is had of a Fortran-ordered array, too.
    match array.as_slice() {
        Ok(values) if array.is_c_contiguous() => Ok(values),
        _ => Err(PyValueError::new_err(format!("{name} must be C-contiguous")).into()),
    }
}

fn array<'py, T: Element>(py: Python<'py>, values: Vec<T>, shape: &[usize]) -> Result<Bound<'py, PyArrayDyn<T>>> {
    Ok(PyArray::from_vec(py, values).reshape(shape)?)
}

fn precision_of(name: &str) -> PyResult<Precision> {
    match name {
        "float32" => Ok(Precision::Float32),
        "bfloat16" => Ok(Precision::Bfloat16),
        "int8" => Ok(Precision::Int8),
        _ => {
            Err(PyValueError::new_err(format!("precision must be \"float32\", \"bfloat16\" or \"int8\", got {name:?}")))
        }
    }
}

fn cost_of(name: &str) -> PyResult<Cost> {
    let unknown = || PyValueError::new_err(format!("cost must be \"latent\" or \"distance\", got {name:?}"));
    Cost::named(name).ok_or_else(unknown)
}

fn tensor(name: &Bound<'_, PyAny>, value: &Bound<'_, PyAny>) -> PyResult<(String, Tensor)> {
    let name: String = name.extract()?;
    let array = value.cast::<PyArrayDyn<f32>>().map_err(|_| {
        PyTypeError::new_err(format!("weights[{name:?}] must be a float32 array, got {}", value.get_type()))
    })?;
    Ok((name, Tensor { shape: array.shape().to_vec(), values: array.readonly().as_array().iter().copied().collect() }))
}

fn config_of(config: &Bound<'_, PyDict>) -> PyResult<Config> {
    let field = |name: &str| -> PyResult<usize> {
        let value = config.get_item(name)?.ok_or_else(|| PyKeyError::new_err(format!("config lacks {name}")))?;
        match unsigned(name, &value)? {
            0 => Err(PyValueError::new_err(format!("{name} must be at least 1, got 0"))),
            number => Ok(number),
        }
    };
    let flag = |name: &str| -> PyResult<bool> {
        config.get_item(name)?.ok_or_else(|| PyKeyError::new_err(format!("config lacks {name}")))?.extract()
    };
    Ok(Config {
        image_size: field("image_size")?,
        patch_size: field("patch_size")?,
        encoder_dim: field("encoder_dim")?,
        encoder_depth: field("encoder_depth")?,
        encoder_heads: field("encoder_heads")?,
        encoder_mlp: field("encoder_mlp")?,
        embed_dim: field("embed_dim")?,
        projector_hidden: field("projector_hidden")?,
        predictor_dim: field("predictor_dim")?,
        predictor_depth: field("predictor_depth")?,
        predictor_heads: field("predictor_heads")?,
        predictor_head_dim: field("predictor_head_dim")?,
        predictor_mlp: field("predictor_mlp")?,
        history: field("history")?,
        block_dim: field("block_dim")?,
        action_smoothed: field("action_smoothed")?,
        action_hidden: field("action_hidden")?,
        distance_head: flag("distance_head")?,
        action_prior: flag("action_prior")?,
        prior_blocks: field("prior_blocks")?,
        head_hidden: field("head_hidden")?,
        action_prefix: flag("action_prefix")?,
        prefix_blocks: field("prefix_blocks")?,
    })
}
