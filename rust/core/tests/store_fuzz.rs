//! Mutated stores through everything that reads one, without a sanitizer. `LEWM_FUZZ_RUNS=10000000 cargo test --release -p
//! lewm-core --test store_fuzz` runs longer; `rust/core/fuzz` has the same under libFuzzer.

#[path = "../fuzz/mutate.rs"]
mod mutate;

use std::alloc::{GlobalAlloc, Layout, System};
use std::panic::{catch_unwind, AssertUnwindSafe};

use lewm_core::store::exercise;

/// Refuses what no small store can need: the process aborts, and says so.
struct Capped;

// SAFETY: hands on to the system what it does not refuse, and a null pointer is how an allocator refuses.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Capped {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.size() > 256 << 20 {
            return std::ptr::null_mut();
        }
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Capped = Capped;

#[test]
fn mutated_stores_are_read_and_repaired() {
    let setting =
        |name: &str, default: u64| std::env::var(name).map_or(default, |text| text.parse().expect("a whole number"));
    let (runs, seed) = (setting("LEWM_FUZZ_RUNS", 20_000), setting("LEWM_FUZZ_SEED", 0));
    let bases = mutate::bases(tempfile::tempdir().expect("a folder").path());
    let mut repaired = [0_u64; 4];
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
        let files = mutate::mutate(&bases, &script);
        let episodes = catch_unwind(AssertUnwindSafe(|| exercise(&files.catalogue, &files.index, &files.data)));
        repaired[episodes.unwrap_or_else(|_| panic!("run {run} of seed {seed}")).min(3)] += 1;
    }
    // Every depth is reached: stores that keep all their episodes, some, and none.
    assert!(repaired.iter().all(|&count| count > runs / 1000), "{repaired:?}");
}
