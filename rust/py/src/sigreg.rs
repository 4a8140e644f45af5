//! `sigreg_forward` and `sigreg_backward`: SIGReg on the CPU for Python, with the GIL released.

// pyo3 hands arguments over by value.
#![allow(clippy::needless_pass_by_value)]

use lewm_core::pool::Pool;
use lewm_core::sigreg::{self, Gradients, Shape};
use numpy::{PyArrayDyn, PyArrayMethods, PyReadonlyArrayDyn, PyReadwriteArrayDyn, PyUntypedArrayMethods};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::convert::tuple;
use crate::error::BindError;

type Result<T> = std::result::Result<T, BindError>;

/// Writes the statistic (T, P) and the characteristic function (T, 2, K - 1, P) of z (T, B, D) along directions (D, P).
#[pyfunction]
pub fn sigreg_forward(
    py: Python<'_>,
    z: PyReadonlyArrayDyn<'_, f32>,
    directions: PyReadonlyArrayDyn<'_, f32>,
    statistic: &Bound<'_, PyArrayDyn<f32>>,
    ecf: &Bound<'_, PyArrayDyn<f32>>,
) -> Result<()> {
    let shape = shape_of(z.shape(), directions.shape(), ecf.shape())?;
    same_shape("statistic", statistic.shape(), &[shape.steps, shape.directions])?;
    let (mut statistic, mut ecf) = (writable("statistic", statistic)?, writable("ecf", ecf)?);
    let (z, directions) = (slice("z", &z)?, slice("directions", &directions)?);
    let (statistic, ecf) = (slice_mut("statistic", &mut statistic)?, slice_mut("ecf", &mut ecf)?);
    Ok(py.detach(|| sigreg::forward(shape, z, directions, statistic, ecf, &*Pool::global()?))?)
}

/// Writes the gradient of z from those of statistic and characteristic function.
#[pyfunction]
pub fn sigreg_backward(
    py: Python<'_>,
    z: PyReadonlyArrayDyn<'_, f32>,
    directions: PyReadonlyArrayDyn<'_, f32>,
    ecf: PyReadonlyArrayDyn<'_, f32>,
    statistic_grad: Option<PyReadonlyArrayDyn<'_, f32>>,
    ecf_grad: Option<PyReadonlyArrayDyn<'_, f32>>,
    z_grad: &Bound<'_, PyArrayDyn<f32>>,
) -> Result<()> {
    let shape = shape_of(z.shape(), directions.shape(), ecf.shape())?;
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
    let (z, directions) = (slice("z", &z)?, slice("directions", &directions)?);
    let z_grad = slice_mut("z_grad", &mut z_grad)?;
    Ok(py.detach(|| sigreg::backward(shape, z, directions, gradients, z_grad, &*Pool::global()?))?)
}

fn shape_of(z: &[usize], directions: &[usize], ecf: &[usize]) -> PyResult<Shape> {
    let &[steps, batch, dim] = z else {
        return refused("z", "(T, B, D)", z);
    };
    let &[width, count] = directions else {
        return refused("directions", "(D, P)", directions);
    };
    if width != dim {
        return refused("directions", &format!("({dim}, P)"), directions);
    }
    match *ecf {
        [t, 2, powers, p] if (t, p) == (steps, count) => {
            Ok(Shape { steps, batch, dim, directions: count, knots: powers + 1 })
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
