#![no_main]
//! `RUSTC_BOOTSTRAP=1 cargo fuzz run model_file -- -malloc_limit_mb=256 -max_len=256`, in `rust/core`.

#[path = "../mutate/mod.rs"]
mod mutate;

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use mutate::model_file::{base, exercise, mutate, Base};

static BASE: OnceLock<Base> = OnceLock::new();

fuzz_target!(|script: &[u8]| {
    let base = BASE.get_or_init(base);
    let _ = exercise(base, &mutate(base, script));
});
