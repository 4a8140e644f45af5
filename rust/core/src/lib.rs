//! The pure core of lewm-fast: nothing in this crate knows of Python.
//!
//! * [`rng`]: Philox4x32-10 and the normals made from it, keyed so that a candidate's noise depends on
//!   (seed, environment, plan, iteration, sample) and on nothing else.
//! * [`planner`]: CEM, iCEM and MPPI, one loop that drives any [`planner::Cost`].
//! * [`store`]: the trajectory store, append-only shards of whole episodes.

pub mod error;
pub mod planner;
pub mod rng;
pub mod store;

pub use error::Error;
