//! `read_tensors`: the tensors of a safetensors file.

use std::path::PathBuf;

use lewm_core::model_file;
use numpy::{IntoPyArray, PyArray1};
use pyo3::prelude::*;

use crate::error::BindError;

type Stored<'py> = (String, String, Vec<usize>, Bound<'py, PyArray1<u8>>);

#[pyfunction]
pub fn read_tensors(py: Python<'_>, path: PathBuf) -> Result<(Option<String>, Vec<Stored<'_>>), BindError> {
    let file = py.detach(move || model_file::read(&path))?;
    let stored = |t: model_file::Tensor| (t.name, t.dtype.to_string(), t.shape, t.data.into_pyarray(py));
    Ok((file.lewm, file.tensors.into_iter().map(stored).collect()))
}
