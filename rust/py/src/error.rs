//! The one mapping from core errors to Python exceptions.

use pyo3::create_exception;
use pyo3::exceptions::{PyException, PyIndexError, PyOSError, PyValueError};
use pyo3::prelude::*;

create_exception!(lewm._core, StoreError, PyException, "A trajectory store whose bytes are not what was committed.");

/// Wraps `PyErr` so that the core's error converts into it with `?`.
pub struct BindError(pub PyErr);

impl From<BindError> for PyErr {
    fn from(error: BindError) -> Self {
        error.0
    }
}

impl From<PyErr> for BindError {
    fn from(error: PyErr) -> Self {
        Self(error)
    }
}

impl From<lewm_core::Error> for BindError {
    fn from(error: lewm_core::Error) -> Self {
        use lewm_core::Error;
        let text = error.to_string();
        Self(match error {
            Error::Argument(_) => PyValueError::new_err(text),
            Error::Index(_) => PyIndexError::new_err(text),
            Error::Corrupt(_) => StoreError::new_err(text),
            Error::Io(path, source) => match source.raw_os_error() {
                // OSError(errno, text, path) picks FileNotFoundError, PermissionError, ... by itself.
                // Text, not a `Path`: making one imports pathlib, which fails where no more files can be opened.
                Some(code) => PyOSError::new_err((code, source.to_string(), path.into_os_string())),
                None => PyOSError::new_err(text),
            },
        })
    }
}
