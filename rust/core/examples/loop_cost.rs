//! What a paper-size plan costs besides the model, with a cost in Rust: `cargo run --release --example loop_cost`.
#![allow(clippy::print_stdout)] // that is its work

use std::time::Instant;

use lewm_core::planner::{Cost, Interrupt, Method, Planner, Task, Workspace};
use lewm_core::Error;

/// The same costs every time, as if the model took no time.
struct Free(Vec<f64>);

impl Cost<f32> for Free {
    type Error = Error;

    fn cost(
        &mut self,
        _: &[f32],
        samples: usize,
        costs: &mut [f64],
        _: &mut Interrupt<'_, Error>,
    ) -> Result<(), Error> {
        costs.copy_from_slice(&self.0[..samples]);
        Ok(())
    }
}

fn main() -> Result<(), Error> {
    let method = Method::Cem { reference: false };
    let planner = Planner { samples: 300, iterations: 30, elites: 30, init_std: 1.0, min_std: 0.05, method };
    let task = Task {
        horizon: 5,
        width: 10,
        env_ids: &[0],
        mean: &[0.0; 50],
        kept: None,
        low: Some(&[-2.0; 10]),
        high: Some(&[2.0; 10]),
        seed: 0,
        plan: 0,
        noise: None,
        deadline: None,
    };
    let mut cost = Free((0..300_u32).map(|i| f64::from(i.wrapping_mul(0x9E37_79B9) >> 8)).collect());
    let mut workspace = Workspace::default();
    let mut times = Vec::new();
    for _ in 0..500 {
        let start = Instant::now();
        planner.run(&task, &mut workspace, &mut cost, &mut || Ok(()))?;
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    let median = times[250];
    println!(
        "median {:.3} ms a plan, {:.2} us an iteration (best {:.3} ms)",
        1e3 * median,
        1e6 * median / 30.0,
        1e3 * times[0]
    );
    Ok(())
}
