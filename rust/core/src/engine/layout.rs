//! How matrices lie in memory, the same for every instruction set.
//!
//! Everything is made of lines of 64 bytes. Rows of activations are grouped in tiles of `tile` rows (6, or 16 for AMX); a
//! tile holds, for its first line of columns, that line of each of its rows, then the second, and so on:
//! `[row / tile][line][row % tile]`. A line is sixteen float32 numbers, or, in an operand of a matrix product, sixteen words
//! of 32 bits, each holding one float32, two bfloat16 or four byte neighbours. So vectors along a row are whole lines, and a
//! micro-kernel walks through a tile with one pointer and constant distances.
//!
//! Weights lie in panels of sixteen columns: `[column / 16][word of the row][column % 16]`, again sixteen words to a line.
//!
//! Widths are padded with zeros to multiples of [`PAD`]; all operations keep the padding zero.

/// Numbers in a line of float32.
pub(super) const LANES: usize = 16;
/// Widths are padded to multiples of this: a line of bfloat16 holds so many.
pub(super) const PAD: usize = 32;

/// 64 bytes on a boundary of 64 bytes.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(super) struct Line(pub [f32; LANES]);

impl Line {
    pub const ZERO: Self = Self([0.0; LANES]);
}

/// `width` padded.
pub(super) fn padded(width: usize) -> usize {
    width.div_ceil(PAD) * PAD
}

/// Lines that hold `width` float32 numbers, padded.
pub(super) fn lines(width: usize) -> usize {
    padded(width) / LANES
}

/// A matrix of float32 rows, or of operand rows, that this does not own.
///
/// `tile` is the number of rows in a tile, `lines` the number of lines in a row.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub data: *mut Line,
    pub tile: usize,
    pub lines: usize,
}

// SAFETY: it is an address; who reads or writes through it says why that is sound.
unsafe impl Send for Rows {}
// SAFETY: as above.
unsafe impl Sync for Rows {}

impl Rows {
    /// Line `line` of row `row`; the next line of that row is `tile` lines further.
    #[inline(always)]
    pub unsafe fn at(self, row: usize, line: usize) -> *mut Line {
        self.data.add(((row / self.tile) * self.lines + line) * self.tile + row % self.tile)
    }

    /// Line `line` of row `row` of tile `tile`, where the tile's rows `R` are known when this is compiled.
    #[inline(always)]
    pub unsafe fn in_tile<const R: usize>(self, tile: usize, row: usize, line: usize) -> *mut f32 {
        debug_assert_eq!(R, self.tile);
        self.data.add((tile * self.lines + line) * R + row).cast()
    }

    /// The same matrix from tile `tiles` on.
    #[inline(always)]
    pub unsafe fn skip(self, tiles: usize) -> Self {
        Self { data: self.data.add(tiles * self.lines * self.tile), ..self }
    }

    /// The same matrix without its first `lines` lines of every row: same distance between tiles.
    #[inline(always)]
    pub unsafe fn columns(self, line: usize) -> Columns {
        Columns { data: self.data.add(line * self.tile), tile: self.tile, lines: self.lines }
    }
}

/// Some columns of [`Rows`]: `data` is the first of their lines of the first row, `lines` still the whole row's.
pub(super) type Columns = Rows;

/// Zeroed lines that a workspace owns.
pub(super) struct Buffer {
    data: Vec<Line>,
    tile: usize,
    lines: usize,
}

impl Buffer {
    /// Room for `tiles` tiles of `tile` rows with `lines` lines each.
    pub fn new(tiles: usize, tile: usize, lines: usize) -> Self {
        Self { data: vec![Line::ZERO; tiles * tile * lines], tile, lines }
    }

    /// The matrix; good until this is dropped.
    pub fn rows(&mut self) -> Rows {
        Rows { data: self.data.as_mut_ptr(), tile: self.tile, lines: self.lines }
    }
}
