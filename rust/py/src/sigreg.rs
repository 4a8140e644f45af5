//! `sigreg_forward` and `sigreg_backward`: SIGReg on the CPU for Python, with the GIL released.

// pyo3 hands arguments over by value.
#![allow(clippy::needless_pass_by_value)]

use lewm_core::pool::Pool;
use lewm_core::sigreg::{self, Shape};
use numpy::{PyArrayDyn, PyArrayMethods, PyReadonlyArrayDyn, PyReadwriteArrayDyn, PyUntypedArrayMethods};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::convert::tuple;
use crate::error::BindError;

type Result<T> = std::result::Result<T, BindError>;

/// Writes the characteristic function (T, 2, K - 1, P) of z (T, B, D) along directions (D, P).
#[pyfunction]
pub fn sigreg_forward(
    py: Python<'_>,
    z: PyReadonlyArrayDyn<'_, f32>,
    directions: PyReadonlyArrayDyn<'_, f32>,
    out: &Bound<'_, PyArrayDyn<f32>>,
) -> Result<()> {
    let shape = shape_of(z.shape(), directions.shape(), ("out", out.shape()))?;
    let mut memory = writable(out)?;
    let (z, directions) = (slice("z", &z)?, slice("directions", &directions)?);
    let out = memory.as_slice_mut().map_err(|_| not_contiguous("out"))?;
    Ok(py.detach(|| sigreg::forward(shape, z, directions, out, &*Pool::global()?))?)
}

/// Writes the gradient of z from that of its characteristic function.
#[pyfunction]
pub fn sigreg_backward(
    py: Python<'_>,
    z: PyReadonlyArrayDyn<'_, f32>,
    directions: PyReadonlyArrayDyn<'_, f32>,
    grad: PyReadonlyArrayDyn<'_, f32>,
    out: &Bound<'_, PyArrayDyn<f32>>,
) -> Result<()> {
    let shape = shape_of(z.shape(), directions.shape(), ("grad", grad.shape()))?;
    if out.shape() != z.shape() {
        let want = format!("out must have the shape {} of z, got {}", tuple(z.shape()), tuple(out.shape()));
        return Err(PyValueError::new_err(want).into());
    }
    let mut memory = writable(out)?;
    let (z, directions, grad) = (slice("z", &z)?, slice("directions", &directions)?, slice("grad", &grad)?);
    let out = memory.as_slice_mut().map_err(|_| not_contiguous("out"))?;
    Ok(py.detach(|| sigreg::backward(shape, z, directions, grad, out, &*Pool::global()?))?)
}

fn shape_of(z: &[usize], directions: &[usize], (name, ecf): (&str, &[usize])) -> PyResult<Shape> {
    let refused = |text: String| Err(PyValueError::new_err(text));
    let &[steps, batch, dim] = z else {
        return refused(format!("z must have shape (T, B, D), got {}", tuple(z)));
    };
    let &[width, count] = directions else {
        return refused(format!("directions must have shape (D, P), got {}", tuple(directions)));
    };
    if width != dim {
        return refused(format!("directions must have shape ({dim}, P), got {}", tuple(directions)));
    }
    match *ecf {
        [t, 2, powers, p] if (t, p) == (steps, count) => {
            Ok(Shape { steps, batch, dim, directions: count, knots: powers + 1 })
        }
        _ => refused(format!("{name} must have shape ({steps}, 2, K - 1, {count}), got {}", tuple(ecf))),
    }
}

fn slice<'a>(name: &str, array: &'a PyReadonlyArrayDyn<'_, f32>) -> PyResult<&'a [f32]> {
    array.as_slice().map_err(|_| not_contiguous(name))
}

fn writable<'py>(out: &Bound<'py, PyArrayDyn<f32>>) -> PyResult<PyReadwriteArrayDyn<'py, f32>> {
    out.try_readwrite().map_err(|error| PyValueError::new_err(format!("out cannot be written to: {error}")))
}

fn not_contiguous(name: &str) -> PyErr {
    PyValueError::new_err(format!("{name} must be C-contiguous"))
}
