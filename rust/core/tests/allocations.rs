//! A planner that keeps its workspace allocates nothing after its first plan.
#![allow(unsafe_code)] // an allocator cannot be written without

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use lewm_core::planner::{Cost, Icem, Interrupt, Method, Planner, Real, Task, Workspace};
use lewm_core::Error;

/// The system's allocator, counted.
struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is handed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Squared distance to 0.3; notes how many allocations there were before each call.
struct Quadratic {
    seen: [usize; 16],
    calls: usize,
}

impl<T: Real> Cost<T> for Quadratic {
    type Error = Error;

    fn cost(&mut self, x: &[T], _: usize, costs: &mut [f64], _: &mut Interrupt<'_, Error>) -> Result<(), Error> {
        self.seen[self.calls] = ALLOCATIONS.load(Ordering::Relaxed);
        self.calls += 1;
        let block = x.len() / costs.len();
        for (x, cost) in x.chunks_exact(block).zip(costs) {
            *cost = x.iter().map(|&x| (x.into() - 0.3).powi(2)).sum();
        }
        Ok(())
    }
}

fn plan<T: Real>(planner: &Planner, workspace: &mut Workspace<T>, kept: Option<&[f64]>) -> Quadratic {
    let mut cost = Quadratic { seen: [0; 16], calls: 0 };
    let task = Task {
        horizon: 5,
        width: 10,
        env_ids: &[0, 1],
        mean: &[0.0; 100],
        kept,
        low: Some(&[-1.0; 10]),
        high: Some(&[1.0; 10]),
        seed: 0,
        plan: 0,
        noise: None,
        deadline: None,
    };
    planner.run(&task, workspace, &mut cost, &mut || Ok(())).unwrap();
    cost
}

fn check<T: Real + Default>() {
    let icem = Icem { beta: 2.0, factor: 1.25, keep: 0.3, momentum: 0.1 };
    for method in [Method::Cem { reference: false }, Method::Icem(icem), Method::Mppi { temperature: 0.5 }] {
        let planner = Planner { samples: 64, iterations: 8, elites: 10, init_std: 1.0, min_std: 0.05, method };
        let mut workspace = Workspace::<T>::default();
        let first = plan(&planner, &mut workspace, None);
        assert_eq!(first.calls, 9);
        assert_eq!(first.seen[0], first.seen[8], "iterations of the first plan");
        let kept = vec![0.2; 100 * planner.kept()];
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        plan(&planner, &mut workspace, Some(&kept));
        assert_eq!(ALLOCATIONS.load(Ordering::Relaxed), before, "{method:?} in {}", T::NAME);
    }
}

fn main() {
    check::<f32>();
    check::<f64>();
    println!("no allocation after the first plan");
}
