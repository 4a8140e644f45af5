//! The trajectory store, a `.lewm` folder: whole episodes, appended and never rewritten.
//!
//! ```text
//! catalogue.json       schema and metadata, written once (temporary file, fsync, link)
//! shard-000000.data    episodes, one after the other; each a table and its blobs
//! shard-000000.index   one 64-byte record per committed episode
//! ```
//!
//! A writing session makes its own pair of shard files, so two writers never share one. An episode's bytes reach the
//! disk before its index record does: a record that is not there, or not whole, is an episode that was never committed,
//! and whatever its bytes left in the `.data` file is nobody's. All numbers are little endian.
//!
//! | record at | type | |
//! |---|---|---|
//! | 0 | 8 bytes | `lewm-ep1` |
//! | 8 | u32 | CRC-32 of the schema, so a shard cannot be read under another store's catalogue |
//! | 12 | u32 | frames N |
//! | 16, 24 | u64, u64 | offset and length of the episode in `.data` |
//! | 32 | u64 | digest of the content (not of its encoding) |
//! | 40 | u32 | CRC-32 of the table |
//! | 44, 46 | u16, u16 | codec, frames per chunk |
//! | 48 | 12 bytes | zero |
//! | 60 | u32 | CRC-32 of the 60 bytes before |
//!
//! An episode is a table of (length u32, CRC-32 u32) per blob, then the blobs: N frames, the actions as f32 (N-1, A), and
//! each column, in the order of their names, as f64 (N, C). Codec 1: the first frame of every chunk is its key frame; the
//! others are stored as their XOR with it; each is an LZ4 block of its own, so a strided window decodes one key frame per
//! chunk and the frames it uses, nothing else.

mod format;
mod reader;
#[cfg(test)]
mod tests;
mod writer;

pub use format::{Schema, MAX_FRAMES, MAX_SIDE, MAX_WIDTH};
pub(crate) use reader::threads as threads_allowed;
pub use reader::Store;
pub use writer::Writer;
