//! `lewm._core`: the Rust core as a Python module. Exports only.

use pyo3::prelude::*;

mod convert;
mod engine;
mod error;
mod loader;
mod model_file;
mod planner;
mod sigreg;
mod store;

#[pymodule(gil_used = true)]
mod _core {
    #[pymodule_export]
    use crate::engine::{Engine, Objective};
    #[pymodule_export]
    use crate::error::StoreError;
    #[pymodule_export]
    use crate::loader::{copy_windows, read_windows, WindowOrder};
    #[pymodule_export]
    use crate::model_file::read_tensors;
    #[pymodule_export]
    use crate::planner::{noise, philox, Planner};
    #[pymodule_export]
    use crate::sigreg::{sigreg_backward, sigreg_directions, sigreg_forward};
    #[pymodule_export]
    use crate::store::{repair_store, verify_store, Store, StoreWriter};

    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
