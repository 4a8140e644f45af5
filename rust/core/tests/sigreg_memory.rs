//! SIGReg keeps nothing of the size of its projections, let alone one for every knot.
#![allow(unsafe_code)] // an allocator cannot be written without

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use lewm_core::pool::Pool;
use lewm_core::sigreg::{backward, forward, Directions, Gradients, Shape};

/// The system's allocator, and the bytes that it has given.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is handed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        MOST.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// One test: another one running beside it would be counted.
#[test]
fn work_space_is_small() {
    let shape = Shape { steps: 4, batch: 512, dim: 192, directions: 1024, knots: 17 };
    let (z, directions) = (vec![0.1; 4 * 512 * 192], Directions::Keyed { seed: 0, step: 0 });
    let (mut statistic, mut ecf) = (vec![0.0; 4 * 1024], vec![0.0; 4 * 2 * 16 * 1024]);
    let mut z_grad = vec![0.0; z.len()];
    let pool = Pool::new(4);
    let extra = |run: &mut dyn FnMut()| {
        let before = NOW.load(Ordering::Relaxed);
        MOST.store(before, Ordering::Relaxed);
        run();
        MOST.load(Ordering::Relaxed) - before
    };
    let projections = 4 * 512 * 1024 * size_of::<f32>();
    let ahead = extra(&mut || forward(shape, &z, directions, &mut statistic, &mut ecf, &pool).unwrap());
    let gradients = Gradients { ecf: &ecf, of_statistic: Some(&statistic), of_ecf: None };
    let back = extra(&mut || backward(shape, &z, directions, gradients, &mut z_grad, &pool).unwrap());
    // z and directions packed are 2.4 MB, and 3.7 MB with all that the gradient needs.
    assert!(ahead < projections / 3, "forward took {ahead} bytes");
    assert!(back < projections / 2, "backward took {back} bytes");
}
