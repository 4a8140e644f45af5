//! Mutated stores and model files through everything that reads them, without a sanitizer. `LEWM_FUZZ_RUNS=10000000 cargo
//! test --release -p lewm-core --test fuzz store` (or `model_file`) runs longer; `rust/core/fuzz` has the same under
//! libFuzzer.

#[path = "../fuzz/mutate/mod.rs"]
mod mutate;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::panic::{catch_unwind, AssertUnwindSafe};

use lewm_core::store;
use mutate::{model_file, store as stores};

/// Remembers the largest allocation of each thread, and refuses what would harm the machine.
struct Watched;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: hands on to the system what it does not refuse, and a null pointer is how an allocator refuses.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.set(LARGEST.get().max(layout.size()));
        if layout.size() > 1 << 30 {
            return std::ptr::null_mut();
        }
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watched = Watched;

/// Runs `exercise`, which says how deep it came, on scripts; every one of `N` depths must be reached, and nothing of more
/// than `largest` bytes allocated.
fn run<const N: usize>(runs: u64, largest: usize, exercise: impl Fn(&[u8]) -> usize) {
    let setting =
        |name: &str, default: u64| std::env::var(name).map_or(default, |text| text.parse().expect("a whole number"));
    let (runs, seed) = (setting("LEWM_FUZZ_RUNS", runs), setting("LEWM_FUZZ_SEED", 0));
    let mut depths = [0_u64; N];
    LARGEST.set(0);
    for run in 0..runs {
        let mut word = ((seed << 40) ^ run).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let script: Vec<u8> = std::iter::repeat_with(|| {
            word ^= word << 13;
            word ^= word >> 7;
            word ^= word << 17;
            (word >> 32) as u8
        })
        .take(96)
        .collect();
        let depth = catch_unwind(AssertUnwindSafe(|| exercise(&script)));
        depths[depth.unwrap_or_else(|_| panic!("run {run} of seed {seed}")).min(N - 1)] += 1;
        assert!(LARGEST.get() <= largest, "run {run} of seed {seed} allocated {} bytes", LARGEST.get());
    }
    assert!(depths.iter().all(|&count| count > runs / 1000), "{depths:?}");
}

/// The depths: stores that keep none of their episodes, some, and all.
#[test]
fn mutated_stores_are_read_and_repaired() {
    let bases = stores::bases(tempfile::tempdir().expect("a folder").path());
    run::<4>(20_000, 256 << 20, |script| {
        let files = stores::mutate(&bases, script);
        store::exercise(&files.catalogue, &files.index, &files.data)
    });
}

#[test]
fn mutated_model_files_are_read_or_refused() {
    let base = model_file::base();
    run::<3>(50_000, 1 << 18, |script| model_file::exercise(&base, &model_file::mutate(&base, script)));
}
