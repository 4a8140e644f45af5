//! The pure core of lewm-fast: nothing in this crate knows of Python.
//!
//! * [`rng`]: Philox4x32-10 and the normals made from it, keyed so that a candidate's noise depends on
//!   (seed, environment, plan, iteration, sample) and on nothing else.
//! * [`engine`]: a trained model's encoder and rollout on this processor.
//! * [`loader`]: the order of training windows, and windows from memory.
//! * [`model_file`]: files of tensors, as models and checkpoints are.
//! * [`planner`]: CEM, iCEM and MPPI, one loop that drives any [`planner::Cost`].
//! * [`pool`]: threads that the engine's tasks run on.
//! * [`store`]: the trajectory store, append-only shards of whole episodes.

pub mod engine;
pub mod error;
pub mod loader;
pub mod model_file;
pub mod planner;
pub mod pool;
pub mod rng;
pub mod store;

pub use engine::sigreg;
pub use error::Error;
