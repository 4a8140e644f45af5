//! SIGReg on the CPU for Python, with the GIL released.

// pyo3 hands arguments over by value.
#![allow(clippy::needless_pass_by_value)]

use lewm_core::pool::Pool;
use lewm_core::sigreg::{self, Directions, Gradients, Shape};
use numpy::{
    PyArray1, PyArray2, PyArrayDyn, PyArrayMethods, PyReadonlyArrayDyn, PyReadwriteArrayDyn, PyUntypedArrayMethods,
};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

use crate::convert::{tuple, unsigned};
use crate::error::BindError;

type Result<T> = std::result::Result<T, BindError>;

/// The directions of a key, (P, D).
#[pyfunction]
pub fn sigreg_directions<'py>(
    py: Python<'py>,
    seed: &Bound<'py, PyAny>,
    step: &Bound<'py, PyAny>,
    count: &Bound<'py, PyAny>,
    dim: &Bound<'py, PyAny>,
) -> Result<Bound<'py, PyArray2<f32>>> {
    let (seed, step) = (unsigned("seed", seed)?, unsigned("step", step)?);
    let (count, dim) = (unsigned::<u64>("count", count)? as usize, unsigned::<u64>("dim", dim)? as usize);
    let rows = py.detach(|| sigreg::directions(seed, step, count, dim))?;
    Ok(PyArray1::from_vec(py, rows).reshape([count, dim])?)
}

/// Unit directions (D, P), or the seed and the step that they are made from.
enum Source<'py> {
    Given(PyReadonlyArrayDyn<'py, f32>),
    Keyed(u64, u32),
}

impl<'py> Source<'py> {
    fn new(directions: &Bound<'py, PyAny>) -> PyResult<Self> {
        if let Ok(given) = directions.extract() {
            return Ok(Self::Given(given));
        }
        if let Ok((seed, step)) = directions.extract::<(Bound<'py, PyAny>, Bound<'py, PyAny>)>() {
            return Ok(Self::Keyed(unsigned("seed", &seed)?, unsigned("step", &step)?));
        }
        let got = directions.get_type();
        Err(PyTypeError::new_err(format!("directions must be a float32 array (D, P) or (seed, step), got {got}")))
    }

    /// The directions, and how many there are; `count` of a key.
    fn of(&self, dim: usize, count: usize) -> PyResult<(Directions<'_>, usize)> {
        match self {
            &Self::Keyed(seed, step) => Ok((Directions::Keyed { seed, step }, count)),
            Self::Given(directions) => match *directions.shape() {
                [width, count] if width == dim => Ok((Directions::Given(slice("directions", directions)?), count)),
                [_, _] => refused("directions", &format!("({dim}, P)"), directions.shape()),
                _ => refused("directions", "(D, P)", directions.shape()),
            },
        }
    }
}

/// Writes the statistic (T, P) and the characteristic function (T, 2, K - 1, P) of z (T, B, D) along directions.
#[pyfunction]
pub fn sigreg_forward(
    py: Python<'_>,
    z: PyReadonlyArrayDyn<'_, f32>,
    directions: &Bound<'_, PyAny>,
    statistic: &Bound<'_, PyArrayDyn<f32>>,
    ecf: &Bound<'_, PyArrayDyn<f32>>,
) -> Result<()> {
    let directions = Source::new(directions)?;
    let (shape, directions) = shape_of(z.shape(), &directions, ecf.shape())?;
    same_shape("statistic", statistic.shape(), &[shape.steps, shape.directions])?;
    let (mut statistic, mut ecf) = (writable("statistic", statistic)?, writable("ecf", ecf)?);
    let z = slice("z", &z)?;
    let (statistic, ecf) = (slice_mut("statistic", &mut statistic)?, slice_mut("ecf", &mut ecf)?);
    Ok(py.detach(|| sigreg::forward(shape, z, directions, statistic, ecf, &*Pool::global()?))?)
}

/// Writes the gradient of z from those of statistic and characteristic function.
#[pyfunction]
pub fn sigreg_backward(
    py: Python<'_>,
    z: PyReadonlyArrayDyn<'_, f32>,
    directions: &Bound<'_, PyAny>,
    ecf: PyReadonlyArrayDyn<'_, f32>,
    statistic_grad: Option<PyReadonlyArrayDyn<'_, f32>>,
    ecf_grad: Option<PyReadonlyArrayDyn<'_, f32>>,
    z_grad: &Bound<'_, PyArrayDyn<f32>>,
) -> Result<()> {
    let directions = Source::new(directions)?;
    let (shape, directions) = shape_of(z.shape(), &directions, ecf.shape())?;
    same_shape("z_grad", z_grad.shape(), z.shape())?;
    let optional = |name, grad: &'_ Option<PyReadonlyArrayDyn<'_, f32>>, shape: &[usize]| match grad {
        Some(grad) => same_shape(name, grad.shape(), shape),
        None => Ok(()),
    };
    optional("statistic_grad", &statistic_grad, &[shape.steps, shape.directions])?;
    optional("ecf_grad", &ecf_grad, ecf.shape())?;
    let gradients = Gradients {
        ecf: slice("ecf", &ecf)?,
        of_statistic: statistic_grad.as_ref().map(|grad| slice("statistic_grad", grad)).transpose()?,
        of_ecf: ecf_grad.as_ref().map(|grad| slice("ecf_grad", grad)).transpose()?,
    };
    let mut z_grad = writable("z_grad", z_grad)?;
    let (z, z_grad) = (slice("z", &z)?, slice_mut("z_grad", &mut z_grad)?);
    Ok(py.detach(|| sigreg::backward(shape, z, directions, gradients, z_grad, &*Pool::global()?))?)
}

fn shape_of<'a>(z: &[usize], directions: &'a Source<'_>, ecf: &[usize]) -> PyResult<(Shape, Directions<'a>)> {
    let &[steps, batch, dim] = z else {
        return refused("z", "(T, B, D)", z);
    };
    let (directions, count) = directions.of(dim, *ecf.last().unwrap_or(&0))?;
    match *ecf {
        [t, 2, powers, p] if (t, p) == (steps, count) => {
            Ok((Shape { steps, batch, dim, directions: count, knots: powers + 1 }, directions))
        }
        _ => refused("ecf", &format!("({steps}, 2, K - 1, {count})"), ecf),
    }
}

fn same_shape(name: &str, got: &[usize], want: &[usize]) -> PyResult<()> {
    if got == want {
        return Ok(());
    }
    refused(name, &tuple(want), got)
}

fn refused<T>(name: &str, want: &str, got: &[usize]) -> PyResult<T> {
    Err(PyValueError::new_err(format!("{name} must have shape {want}, got {}", tuple(got))))
}

fn writable<'py>(name: &str, array: &Bound<'py, PyArrayDyn<f32>>) -> PyResult<PyReadwriteArrayDyn<'py, f32>> {
    array.try_readwrite().map_err(|error| PyValueError::new_err(format!("{name} cannot be written to: {error}")))
}

// `as_slice` takes Fortran's order too.
fn slice<'a>(name: &str, array: &'a PyReadonlyArrayDyn<'_, f32>) -> PyResult<&'a [f32]> {
    array.as_slice().ok().filter(|_| array.is_c_contiguous()).ok_or_else(|| not_contiguous(name))
}

fn slice_mut<'a>(name: &str, array: &'a mut PyReadwriteArrayDyn<'_, f32>) -> PyResult<&'a mut [f32]> {
    let ordered = array.is_c_contiguous();
    array.as_slice_mut().ok().filter(|_| ordered).ok_or_else(|| not_contiguous(name))
}

fn not_contiguous(name: &str) -> PyErr {
    PyValueError::new_err(format!("{name} must be C-contiguous"))
}
