//! `Store` and `StoreWriter`: the trajectory store for Python.

// pyo3 hands arguments over by value.
#![allow(clippy::needless_pass_by_value)]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use lewm_core::store;
use numpy::ndarray::Array2;
use numpy::{
    IntoPyArray, PyArray1, PyArray2, PyArray4, PyArrayDescrMethods, PyArrayDyn, PyArrayMethods, PyReadonlyArray1,
    PyUntypedArray, PyUntypedArrayMethods,
};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::convert::{named, tuple, unsigned};
use crate::error::BindError;

type Result<T> = std::result::Result<T, BindError>;

/// Reads a trajectory store.
#[pyclass(frozen, module = "lewm._core")]
pub struct Store {
    // Replaced as a whole by `refresh`. Locked only to copy the pointer, with the GIL held: a fork cannot find it locked.
    store: Mutex<Arc<store::Store>>,
}

impl Store {
    pub(crate) fn store(&self) -> Arc<store::Store> {
        Arc::clone(&self.store.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[pymethods]
impl Store {
    #[new]
    #[pyo3(signature = (path, *, skip_damaged = false))]
    fn new(py: Python<'_>, path: PathBuf, skip_damaged: bool) -> Result<Self> {
        let store = py.detach(|| store::Store::open(&path, skip_damaged))?;
        Ok(Self { store: Mutex::new(Arc::new(store)) })
    }

    fn __len__(&self) -> usize {
        self.store().len()
    }

    #[getter]
    #[allow(clippy::cast_possible_wrap)] // an episode has at most MAX_FRAMES frames
    fn lengths<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<i64>> {
        self.store().lengths().map(|frames| frames as i64).collect::<Vec<_>>().into_pyarray(py)
    }

    #[getter]
    fn height(&self) -> usize {
        self.store().schema().height
    }

    #[getter]
    fn width(&self) -> usize {
        self.store().schema().width
    }

    #[getter]
    fn action_dim(&self) -> usize {
        self.store().schema().action_dim
    }

    #[getter]
    fn columns(&self) -> BTreeMap<String, usize> {
        self.store().schema().columns.clone()
    }

    #[getter]
    fn metadata(&self) -> String {
        self.store().metadata().to_owned()
    }

    #[getter]
    fn skipped(&self) -> Vec<String> {
        self.store().skipped().to_vec()
    }

    fn frames<'py>(
        &self,
        py: Python<'py>,
        episode: i64,
        indices: PyReadonlyArray1<'py, i64>,
    ) -> Result<Bound<'py, PyArrayDyn<u8>>> {
        let store = self.store();
        let mut items = Vec::new();
        for &index in indices.as_array() {
            // One frame is a window of one.
            items.extend(store.windows(&[episode], &[index], 1, 1)?);
        }
        store.index(episode)?;
        gather(py, &store, &items, &[items.len()], None)
    }

    fn actions<'py>(&self, py: Python<'py>, episode: i64) -> Result<Bound<'py, PyArray2<f32>>> {
        let store = self.store();
        let actions = py.detach(|| store.actions(episode))?;
        let width = store.schema().action_dim;
        let actions = Array2::from_shape_vec((actions.len() / width, width), actions);
        Ok(actions.expect("the store checked the length").into_pyarray(py))
    }

    fn column<'py>(&self, py: Python<'py>, name: &str, episode: i64) -> Result<Bound<'py, PyArray2<f64>>> {
        let store = self.store();
        let values = py.detach(|| store.column(name, episode))?;
        let width = store.schema().columns[name];
        let values = Array2::from_shape_vec((values.len() / width, width), values);
        Ok(values.expect("the store checked the length").into_pyarray(py))
    }

    #[pyo3(signature = (episodes, starts, length, stride, out = None))]
    fn windows<'py>(
        &self,
        py: Python<'py>,
        episodes: PyReadonlyArray1<'py, i64>,
        starts: PyReadonlyArray1<'py, i64>,
        length: usize,
        stride: usize,
        out: Option<Bound<'py, PyAny>>,
    ) -> Result<Bound<'py, PyArrayDyn<u8>>> {
        let store = self.store();
        let (episodes, starts) = (episodes.as_array().to_vec(), starts.as_array().to_vec());
        let items = store.windows(&episodes, &starts, length, stride)?;
        gather(py, &store, &items, &[episodes.len(), length], out)
    }

    fn fingerprint(&self) -> String {
        self.store().fingerprint()
    }

    fn refresh(&self, py: Python<'_>) -> Result<usize> {
        let mut store = store::Store::clone(&self.store());
        let (store, count) = py.detach(|| store.refresh().map(|count| (store, count)))?;
        *self.store.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(store);
        Ok(count)
    }
}

/// Appends episodes to a trajectory store.
#[pyclass(frozen, module = "lewm._core")]
pub struct StoreWriter {
    schema: store::Schema,
    writer: Mutex<Option<store::Writer>>,
}

#[pymethods]
impl StoreWriter {
    #[new]
    #[pyo3(signature = (path, *, height, width, action_dim, columns, metadata))]
    fn new(
        py: Python<'_>,
        path: PathBuf,
        #[pyo3(from_py_with = height_of)] height: usize,
        #[pyo3(from_py_with = width_of)] width: usize,
        #[pyo3(from_py_with = action_dim_of)] action_dim: usize,
        #[pyo3(from_py_with = columns_of)] columns: BTreeMap<String, usize>,
        metadata: &str,
    ) -> Result<Self> {
        let schema = store::Schema { height, width, action_dim, columns };
        let writer = py.detach(|| store::Writer::open(&path, schema.clone(), metadata))?;
        Ok(Self { schema, writer: Mutex::new(Some(writer)) })
    }

    fn append(
        &self,
        py: Python<'_>,
        frames: &Bound<'_, PyAny>,
        actions: &Bound<'_, PyAny>,
        columns: &Bound<'_, PyDict>,
    ) -> Result<usize> {
        let schema = &self.schema;
        let wanted = format!("wants a uint8 array of shape (N, {}, {}, 3)", schema.height, schema.width);
        let refuse = || PyValueError::new_err(format!("frames is {}; {wanted}", describe(frames)));
        let frames = frames.cast::<PyArray4<u8>>().map_err(|_| refuse())?.readonly();
        if frames.shape()[1..] != [schema.height, schema.width, 3] {
            return Err(refuse().into());
        }
        let count = frames.shape()[0];
        let actions: Vec<f32> = numbers(actions, "actions", count.saturating_sub(1), schema.action_dim)?;
        let mut values = Vec::new();
        for (name, column) in columns {
            let name: String = name.extract()?;
            // A name that the schema has not is the core's to refuse; any width will do until then.
            if let Some(&width) = schema.columns.get(&name) {
                let column: Vec<f64> = numbers(&column, &format!("columns[{name:?}]"), count, width)?;
                values.push((name, column));
            } else {
                values.push((name, Vec::new()));
            }
        }
        let frames = frames.as_array();
        let frames = frames.as_standard_layout();
        let frames = frames.as_slice().expect("the standard layout is contiguous");
        let columns: Vec<(&str, &[f64])> = values.iter().map(|(name, values)| (&**name, &**values)).collect();
        // The lock is taken with the GIL released, so that two threads cannot wait for each other.
        Ok(py.detach(|| -> std::result::Result<_, lewm_core::Error> {
            let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
            let writer = writer.as_mut().ok_or(lewm_core::Error::Argument("this StoreWriter is closed".into()))?;
            writer.append(frames, &actions, &columns)
        })?)
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.writer.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    fn __enter__(slf: PyRef<'_, Self>) -> PyRef<'_, Self> {
        slf
    }

    #[pyo3(signature = (*_args))]
    fn __exit__(&self, py: Python<'_>, _args: &Bound<'_, PyAny>) {
        self.close(py);
    }
}

/// Decodes every byte of a store: (episodes, frames, damage, notes).
#[pyfunction]
#[pyo3(signature = (path, progress = None))]
pub fn verify_store(
    py: Python<'_>,
    path: PathBuf,
    progress: Option<Py<PyAny>>,
) -> Result<(usize, usize, Vec<String>, Vec<String>)> {
    let found = watched(py, progress, |step| store::verify(&path, step))?;
    Ok((found.episodes, found.frames, found.damage, found.notes))
}

/// Sets a store right: (episodes, frames, changes).
#[pyfunction]
#[pyo3(signature = (path, *, dry_run = false, progress = None))]
pub fn repair_store(
    py: Python<'_>,
    path: PathBuf,
    dry_run: bool,
    progress: Option<Py<PyAny>>,
) -> Result<(usize, usize, Vec<String>)> {
    let done = watched(py, progress, |step| store::repair(&path, dry_run, step))?;
    Ok((done.episodes, done.frames, done.changes))
}

/// Runs `work` with the GIL released, and its progress shown by a callable; what that raises, Ctrl-C too, ends the work.
fn watched<T: Send>(
    py: Python<'_>,
    progress: Option<Py<PyAny>>,
    work: impl FnOnce(store::Progress<'_>) -> std::result::Result<Option<T>, lewm_core::Error> + Send,
) -> Result<T> {
    let mut raised = None;
    let mut step = |done: u64, total: u64| {
        raised = Python::attach(|py| {
            py.check_signals()?;
            progress.as_ref().map_or(Ok(()), |progress| progress.call1(py, (done, total)).map(drop))
        })
        .err();
        raised.is_none()
    };
    match py.detach(|| work(&mut step))? {
        Some(done) => Ok(done),
        None => Err(raised.expect("only an exception stops the work").into()),
    }
}

/// Decodes frames into `out`, or into a new array, (`leading`..., height, width, 3), with the GIL released.
fn gather<'py>(
    py: Python<'py>,
    store: &store::Store,
    items: &[(usize, usize)],
    leading: &[usize],
    out: Option<Bound<'py, PyAny>>,
) -> Result<Bound<'py, PyArrayDyn<u8>>> {
    let schema = store.schema();
    let shape = [leading, &[schema.height, schema.width, 3]].concat();
    let frames = match out {
        Some(out) => out,
        // NumPy's memory: a batch too large for it is a MemoryError, and it asks for huge pages. Faulting in small ones
        // takes longer than decoding what goes there, and threads wait for each other over it.
        None => py.import("numpy")?.call_method1("empty", (&shape, numpy::dtype::<u8>(py)))?,
    };
    let refuse = || {
        let wanted = format!("wants a writable C-contiguous uint8 array of shape {}", tuple(&shape));
        PyValueError::new_err(format!("out is {}; {wanted}", describe(&frames)))
    };
    let frames = frames.cast::<PyArrayDyn<u8>>().map_err(|_| refuse())?.clone();
    let mut memory = frames.try_readwrite().map_err(|_| refuse())?;
    if memory.shape() != shape || !memory.is_c_contiguous() {
        return Err(refuse().into());
    }
    let out = memory.as_slice_mut().map_err(|_| refuse())?;
    py.detach(|| store.gather(items, out))?;
    drop(memory);
    Ok(frames)
}

/// What an argument is, for an error message: dtype and shape of an array, the type of anything else.
fn describe(value: &Bound<'_, PyAny>) -> String {
    match value.cast::<PyUntypedArray>() {
        Ok(array) => format!("{} of shape {}", array.dtype(), tuple(array.shape())),
        Err(_) => value.get_type().to_string(),
    }
}

/// A (rows, width) array of real numbers, of whatever dtype, as a row-major vector of `T`.
fn numbers<T: numpy::Element + Copy>(
    value: &Bound<'_, PyAny>,
    name: &str,
    rows: usize,
    width: usize,
) -> Result<Vec<T>> {
    let py = value.py();
    let refuse =
        |got: &str| PyValueError::new_err(format!("{name} is {got}; wants real numbers of shape ({rows}, {width})"));
    let array = py.import("numpy")?.call_method1("asarray", (value,)).map_err(|error| {
        if error.is_instance_of::<PyTypeError>(py) || error.is_instance_of::<PyValueError>(py) {
            refuse(&describe(value))
        } else {
            error
        }
    })?;
    let untyped = array.cast::<PyUntypedArray>().map_err(PyErr::from)?;
    if untyped.shape() != [rows, width] || !b"fiu".contains(&untyped.dtype().kind()) {
        return Err(refuse(&describe(&array)).into());
    }
    let array = array.call_method1("astype", (numpy::dtype::<T>(py),))?;
    let array = array.cast::<PyArray2<T>>().map_err(PyErr::from)?.readonly();
    Ok(array.as_array().iter().copied().collect())
}

named! {
    height_of("height") -> usize = unsigned;
    width_of("width") -> usize = unsigned;
    action_dim_of("action_dim") -> usize = unsigned;
}

fn columns_of(value: &Bound<'_, PyAny>) -> PyResult<BTreeMap<String, usize>> {
    let refuse = || PyTypeError::new_err(format!("columns must be a dict of names and widths, got {value}"));
    let column = |(name, width): (Bound<'_, PyAny>, Bound<'_, PyAny>)| {
        let name: String = name.extract().map_err(|_| refuse())?;
        let width = unsigned(&format!("columns[{name:?}]"), &width)?;
        Ok((name, width))
    };
    value.cast::<PyDict>().map_err(|_| refuse())?.iter().map(column).collect()
}
