//! A head: two hidden layers on latents, in float32. It is small beside the rollout, so precision is not traded here.

use std::sync::{Mutex, PoisonError};

use super::gemm::End;
use super::kernels::Kernels;
use super::layout::{lines, Buffer, Rows};
use super::predictor::run;
use super::weights::{Groups, Linear, Packed, Tensors};
use crate::Error;

/// Tiles that go through a head together.
const TILES: usize = 16;

pub(super) struct Head {
    layers: [Packed; 3],
    pub inputs: usize,
    hidden: usize,
    pub outputs: usize,
    /// Workspaces that no call uses now, all for the same kernels.
    free: Mutex<Vec<Workspace>>,
}

/// Rows of every layer; the padding of the inputs is zero.
struct Workspace {
    x: Buffer,
    hidden: [Buffer; 2],
    y: Buffer,
}

impl Head {
    pub fn new(tensors: &Tensors, name: &str, inputs: usize, hidden: usize, outputs: usize) -> Result<Self, Error> {
        let layer = |place: usize, outputs: usize, inputs: usize| -> Result<Packed, Error> {
            let linear = Linear::read(tensors, &format!("{name}.net.{place}"), outputs, inputs, true)?;
            Ok(Packed::new(&linear, Groups::one(inputs), Groups::one(outputs), 1))
        };
        let layers = [layer(0, hidden, inputs)?, layer(2, hidden, hidden)?, layer(4, outputs, hidden)?];
        Ok(Self { layers, inputs, hidden, outputs, free: Mutex::default() })
    }

    fn workspace(&self, k: &Kernels) -> Workspace {
        let buffer = |width| Buffer::new(TILES, k.tile, lines(width));
        let hidden = [buffer(self.hidden), buffer(self.hidden)];
        Workspace { x: buffer(self.inputs), hidden, y: buffer(self.outputs) }
    }

    /// `read(row, inputs, at)` writes row `row` to row `at` of the inputs, and `done(row, outputs, at)` takes what comes of it.
    ///
    /// # Safety
    /// The processor has `k`, which is of float32 and the same in every call; `read` writes `inputs` numbers.
    pub unsafe fn run(
        &self,
        k: &Kernels,
        rows: usize,
        read: impl Fn(usize, Rows, usize),
        mut done: impl FnMut(usize, Rows, usize),
    ) {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut space = free.unwrap_or_else(|| self.workspace(k));
        let (x, y) = (space.x.rows(), space.y.rows());
        let [first, second] = &mut space.hidden;
        let hidden = [first.rows(), second.rows()];
        for from in (0..rows).step_by(TILES * k.tile) {
            let count = (rows - from).min(TILES * k.tile);
            let tiles = count.div_ceil(k.tile);
            (0..count).for_each(|row| read(from + row, x, row));
            run(k, x, tiles, &self.layers[0], End::Gelu(hidden[0]));
            run(k, hidden[0], tiles, &self.layers[1], End::Gelu(hidden[1]));
            run(k, hidden[1], tiles, &self.layers[2], End::Store(y));
            (0..count).for_each(|row| done(from + row, y, row));
        }
        self.free.lock().unwrap_or_else(PoisonError::into_inner).push(space);
    }
}
