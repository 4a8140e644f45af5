//! Python's numbers as Rust's, with errors that name the argument.

use std::time::Duration;

use pyo3::exceptions::{PyOverflowError, PyTypeError, PyValueError};
use pyo3::prelude::*;

/// Converters for `from_py_with`, which does not tell the name that the error needs.
macro_rules! named {
    ($($function:ident($name:literal) -> $type:ty = $convert:ident;)*) => {
        $(fn $function(value: &Bound<'_, PyAny>) -> PyResult<$type> { $convert($name, value) })*
    };
}
pub(crate) use named;

/// A Python integer as an unsigned number; a negative or too large one is a `ValueError` that names the argument.
pub fn unsigned<T: TryFrom<u64>>(name: &str, value: &Bound<'_, PyAny>) -> PyResult<T> {
    let range = || {
        let bits = 8 * size_of::<T>();
        PyValueError::new_err(format!("{name} must be an integer in 0..2^{bits}, got {value}"))
    };
    match value.extract::<u64>() {
        Ok(number) => T::try_from(number).map_err(|_| range()),
        Err(error) if error.is_instance_of::<PyOverflowError>(value.py()) => Err(range()),
        Err(_) => Err(PyTypeError::new_err(format!("{name} must be an integer, got {}", value.get_type()))),
    }
}

pub fn real(name: &str, value: &Bound<'_, PyAny>) -> PyResult<f64> {
    value.extract().map_err(|_| PyTypeError::new_err(format!("{name} must be a number, got {}", value.get_type())))
}

pub fn boolean(name: &str, value: &Bound<'_, PyAny>) -> PyResult<bool> {
    value.extract().map_err(|_| PyTypeError::new_err(format!("{name} must be True or False, got {value}")))
}

pub fn seconds(name: &str, value: &Bound<'_, PyAny>) -> PyResult<Option<Duration>> {
    if value.is_none() {
        return Ok(None);
    }
    let seconds = real(name, value)?;
    Duration::try_from_secs_f64(seconds)
        .map(Some)
        .map_err(|_| PyValueError::new_err(format!("{name} must be a number of seconds of at least 0, got {seconds}")))
}

/// A shape as Python writes it.
pub fn tuple(shape: &[usize]) -> String {
    match shape {
        [n] => format!("({n},)"),
        _ => format!("({})", shape.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")),
    }
}
