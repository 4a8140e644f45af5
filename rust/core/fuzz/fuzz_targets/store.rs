#![no_main]
//! `RUSTC_BOOTSTRAP=1 cargo fuzz run store -- -malloc_limit_mb=256 -max_len=256`, in `rust/core`.

#[path = "../mutate.rs"]
mod mutate;

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;

static BASES: OnceLock<Vec<mutate::Base>> = OnceLock::new();

fuzz_target!(|script: &[u8]| {
    let bases = BASES.get_or_init(|| mutate::bases(tempfile::tempdir().expect("a folder").path()));
    let files = mutate::mutate(bases, script);
    let _ = lewm_core::store::exercise(&files.catalogue, &files.index, &files.data);
});
