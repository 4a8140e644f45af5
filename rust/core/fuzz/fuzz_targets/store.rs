#![no_main]
//! `RUSTC_BOOTSTRAP=1 cargo fuzz run store -- -malloc_limit_mb=256 -max_len=256`, in `rust/core`.

#[path = "../mutate/mod.rs"]
mod mutate;

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use mutate::store::{bases, mutate, Base};

static BASES: OnceLock<Vec<Base>> = OnceLock::new();

fuzz_target!(|script: &[u8]| {
    let found = BASES.get_or_init(|| bases(tempfile::tempdir().expect("a folder").path()));
    let files = mutate(found, script);
    let _ = lewm_core::store::exercise(&files.catalogue, &files.index, &files.data);
});
