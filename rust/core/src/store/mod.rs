//! The trajectory store, a `.lewm` folder: whole episodes, appended and never rewritten. `docs/store-format.md` says what
//! every byte means.
//!
//! ```text
//! catalogue.json       schema and metadata, written once (temporary file, fsync, link)
//! shard-000000.data    the catalogue once more, then episodes: each its record, a table and its blobs
//! shard-000000.index   one 64-byte record per committed episode
//! lock                 empty; locked by writers together, by a repair alone
//! damaged/             what a repair has replaced
//! ```
//!
//! A writing session makes its own pair of shard files, so two writers never share one. An episode's bytes reach the
//! disk before its index record does: a record that is not there, or not whole, is an episode that was never committed.
//! The data file repeats every record, so an index that is lost can be made again from it.

mod check;
mod codec;
mod episode;
mod format;
mod lock;
mod reader;
#[cfg(test)]
mod tests;
mod writer;

#[doc(hidden)]
pub use check::exercise;
pub use check::{repair, verify, Progress, Repair, Verification};
pub use format::{Schema, MAX_FRAMES, MAX_SIDE, MAX_WIDTH};
pub(crate) use reader::threads as threads_allowed;
pub use reader::Store;
pub use writer::Writer;
