//! `lewm._core`: the Rust core as a Python module. Exports only.

use pyo3::prelude::*;

mod cem;
mod convert;
mod error;
mod store;

#[pymodule(gil_used = true)]
mod _core {
    #[pymodule_export]
    use crate::cem::{cem, noise, philox};
    #[pymodule_export]
    use crate::error::StoreError;
    #[pymodule_export]
    use crate::store::{repair_store, verify_store, Store, StoreWriter};

    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
