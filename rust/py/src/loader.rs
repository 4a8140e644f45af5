//! `WindowOrder`, and windows read into memory that the caller has.

// pyo3 hands arguments over by value.
#![allow(clippy::needless_pass_by_value)]

use lewm_core::loader;
use numpy::ndarray::Array2;
use numpy::{
    IntoPyArray, PyArray2, PyArrayDyn, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2, PyReadonlyArray4,
    PyReadwriteArrayDyn, PyUntypedArrayMethods,
};
use pyo3::exceptions::{PyIndexError, PyValueError};
use pyo3::prelude::*;

use crate::convert::{named, unsigned};
use crate::error::BindError;
use crate::store::Store;

type Result<T> = std::result::Result<T, BindError>;

/// The order of the windows of some episodes, for every epoch.
#[pyclass(frozen, module = "lewm._core")]
pub struct WindowOrder {
    order: loader::Order,
}

#[pymethods]
impl WindowOrder {
    #[new]
    #[pyo3(signature = (episodes, counts, *, seed, shuffle, weights = None))]
    fn new(
        episodes: PyReadonlyArray1<'_, i64>,
        counts: PyReadonlyArray1<'_, i64>,
        #[pyo3(from_py_with = seed_of)] seed: u64,
        shuffle: bool,
        weights: Option<PyReadonlyArray1<'_, f64>>,
    ) -> Result<Self> {
        let counts = counts.as_array().iter().map(|&count| u64::try_from(count)).collect::<std::result::Result<_, _>>();
        let counts: Vec<u64> = counts.map_err(|_| PyValueError::new_err("counts wants numbers of at least 0"))?;
        let weights = weights.map(|weights| weights.as_array().to_vec());
        let episodes = episodes.as_array().to_vec();
        Ok(Self { order: loader::Order::new(episodes, &counts, seed, shuffle, weights.as_deref())? })
    }

    fn __len__(&self) -> usize {
        self.order.len() as usize
    }

    fn windows<'py>(
        &self,
        py: Python<'py>,
        #[pyo3(from_py_with = epoch_of)] epoch: u32,
        #[pyo3(from_py_with = first_of)] first: u64,
        #[pyo3(from_py_with = count_of)] count: u64,
    ) -> Result<Bound<'py, PyArray2<i64>>> {
        if !self.order.has(first, count) {
            let text = format!("an epoch has {} places, not {count} from {first} on", self.order.len());
            return Err(PyIndexError::new_err(text).into());
        }
        let windows = py.detach(|| {
            let windows = (first..first + count).map(|place| self.order.at(epoch, place));
            windows.flat_map(|(episode, start)| [episode, start]).collect::<Vec<_>>()
        });
        let windows = Array2::from_shape_vec((windows.len() / 2, 2), windows).expect("two numbers a window");
        Ok(windows.into_pyarray(py))
    }
}

/// Decodes windows of a store into `out`, with the GIL released.
#[pyfunction]
#[pyo3(signature = (store, index, length, stride, out, *, threads = None))]
pub fn read_windows(
    py: Python<'_>,
    store: &Bound<'_, Store>,
    index: PyReadonlyArray2<'_, i64>,
    #[pyo3(from_py_with = length_of)] length: usize,
    #[pyo3(from_py_with = stride_of)] stride: usize,
    out: &Bound<'_, PyArrayDyn<u8>>,
    #[pyo3(from_py_with = threads_of)] threads: Option<usize>,
) -> Result<()> {
    let store = store.get().store();
    let [episodes, starts] = columns(&index)?;
    let items = store.windows(&episodes, &starts, length, stride)?;
    let mut memory = writable(out)?;
    let out = memory.as_slice_mut().map_err(PyErr::from)?;
    Ok(py.detach(|| match threads {
        Some(threads) => store.gather_on(threads, &items, out),
        None => store.gather(&items, out),
    })?)
}

/// Copies windows of `parts`, whole episodes in memory, into `out`, with the GIL released.
#[pyfunction]
#[pyo3(signature = (parts, index, length, stride, out, *, threads = None))]
pub fn copy_windows(
    py: Python<'_>,
    parts: Vec<PyReadonlyArray4<'_, u8>>,
    index: PyReadonlyArray2<'_, i64>,
    #[pyo3(from_py_with = length_of)] length: usize,
    #[pyo3(from_py_with = stride_of)] stride: usize,
    out: &Bound<'_, PyArrayDyn<u8>>,
    #[pyo3(from_py_with = threads_of)] threads: Option<usize>,
) -> Result<()> {
    let size = parts.first().map_or(1, |part| part.as_array().shape()[1..].iter().product());
    if !parts.iter().all(|part| part.is_c_contiguous()) {
        return Err(PyValueError::new_err("parts must be C-contiguous").into());
    }
    let parts = parts.iter().map(|part| part.as_slice().map_err(PyErr::from)).collect::<PyResult<Vec<_>>>()?;
    let [places, starts] = columns(&index)?;
    // A row past the end of anything is refused by the core.
    let row = |start: usize, k: usize| k.checked_mul(stride).and_then(|ahead| start.checked_add(ahead));
    let mut items = Vec::new();
    for (&place, &start) in places.iter().zip(&starts) {
        let (place, start) =
            (usize::try_from(place).unwrap_or(usize::MAX), usize::try_from(start).unwrap_or(usize::MAX));
        items.extend((0..length).map(|k| (place, row(start, k).unwrap_or(usize::MAX))));
    }
    let mut memory = writable(out)?;
    let out = memory.as_slice_mut().map_err(PyErr::from)?;
    Ok(py.detach(|| loader::copy_rows(&parts, size, &items, threads, out))?)
}

/// The two columns of (B, 2).
fn columns(index: &PyReadonlyArray2<'_, i64>) -> Result<[Vec<i64>; 2]> {
    let index = index.as_array();
    if index.ncols() != 2 {
        return Err(PyValueError::new_err(format!("index must be of shape (B, 2), got {:?}", index.shape())).into());
    }
    Ok([index.column(0).to_vec(), index.column(1).to_vec()])
}

fn writable<'py>(out: &Bound<'py, PyArrayDyn<u8>>) -> PyResult<PyReadwriteArrayDyn<'py, u8>> {
    if !out.is_c_contiguous() {
        return Err(PyValueError::new_err("out must be C-contiguous"));
    }
    out.try_readwrite().map_err(|error| PyValueError::new_err(format!("out cannot be written to: {error}")))
}

named! {
    seed_of("seed") -> u64 = unsigned;
    epoch_of("epoch") -> u32 = unsigned;
    first_of("first") -> u64 = unsigned;
    count_of("count") -> u64 = unsigned;
    length_of("length") -> usize = unsigned;
    stride_of("stride") -> usize = unsigned;
}

fn threads_of(value: &Bound<'_, PyAny>) -> PyResult<Option<usize>> {
    if value.is_none() {
        return Ok(None);
    }
    unsigned("threads", value).map(Some)
}
