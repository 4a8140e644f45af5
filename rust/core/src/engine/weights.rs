//! From named tensors to packed matrices: everything that can be computed once is computed here, in float64.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use super::layout::{lines, padded, Line, LANES};
use crate::Error;

/// A tensor of a model file: shape and float32 values in row-major order.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// Its axes.
    pub shape: Vec<usize>,
    /// Its values.
    pub values: Vec<f32>,
}

/// The tensors of a model under their official names.
pub type Tensors = HashMap<String, Tensor>;

/// A linear map in float64, `y = W x + b`, while it is folded with others.
#[derive(Clone)]
pub(super) struct Linear {
    /// (outputs, inputs).
    pub weight: Vec<f64>,
    pub bias: Vec<f64>,
    pub inputs: usize,
}

impl Linear {
    pub fn outputs(&self) -> usize {
        self.bias.len()
    }

    /// The tensors `{name}.weight` (outputs, inputs, 1...) and `{name}.bias`, which may be absent where `bias` is false.
    pub fn read(tensors: &Tensors, name: &str, outputs: usize, inputs: usize, bias: bool) -> Result<Self, Error> {
        let weight = values(tensors, &format!("{name}.weight"), outputs * inputs)?;
        let bias = if bias { values(tensors, &format!("{name}.bias"), outputs)? } else { vec![0.0; outputs] };
        Ok(Self { weight, bias, inputs })
    }

    /// This map after the gain and offset of a norm.
    pub fn after_norm(mut self, gain: &[f64], offset: &[f64]) -> Self {
        for (row, bias) in self.weight.chunks_exact_mut(self.inputs).zip(&mut self.bias) {
            *bias += row.iter().zip(offset).map(|(w, o)| w * o).sum::<f64>();
            row.iter_mut().zip(gain).for_each(|(w, g)| *w *= g);
        }
        self
    }

    /// This map after `first`.
    pub fn after(&self, first: &Self) -> Self {
        let mut weight = vec![0.0; self.outputs() * first.inputs];
        let mut bias = self.bias.clone();
        for ((out, row), bias) in
            weight.chunks_exact_mut(first.inputs).zip(self.weight.chunks_exact(self.inputs)).zip(&mut bias)
        {
            for ((&w, inner), offset) in row.iter().zip(first.weight.chunks_exact(first.inputs)).zip(&first.bias) {
                *bias += w * offset;
                out.iter_mut().zip(inner).for_each(|(out, inner)| *out += w * inner);
            }
        }
        Self { weight, bias, inputs: first.inputs }
    }

    /// Multiplies output by output.
    pub fn scaled(mut self, factors: impl Fn(usize) -> f64) -> Self {
        for (i, (row, bias)) in self.weight.chunks_exact_mut(self.inputs).zip(&mut self.bias).enumerate() {
            let factor = factors(i);
            for w in row {
                *w *= factor;
            }
            *bias *= factor;
        }
        self
    }

    /// The inputs `inputs` alone; the bias stays with the first ones.
    pub fn inputs_of(&self, inputs: Range<usize>) -> Self {
        let weight = self.weight.chunks_exact(self.inputs).flat_map(|row| &row[inputs.clone()]).copied().collect();
        let bias = if inputs.start == 0 { self.bias.clone() } else { vec![0.0; self.outputs()] };
        Self { weight, bias, inputs: inputs.len() }
    }

    /// The rows `outputs`, in that order.
    pub fn outputs_of(&self, outputs: impl Iterator<Item = usize>) -> Self {
        let (mut weight, mut bias) = (Vec::new(), Vec::new());
        for i in outputs {
            weight.extend_from_slice(&self.weight[i * self.inputs..][..self.inputs]);
            bias.push(self.bias[i]);
        }
        Self { weight, bias, inputs: self.inputs }
    }
}

/// The values of tensor `name`, which must have `count` of them and be finite.
pub(super) fn values(tensors: &Tensors, name: &str, count: usize) -> Result<Vec<f64>, Error> {
    let tensor = tensors.get(name).ok_or_else(|| Error::Argument(format!("weights lack {name}")))?;
    if tensor.values.len() != count {
        return Err(Error::Argument(format!("{name} of the weights must have {count} values, got {:?}", tensor.shape)));
    }
    if let Some(x) = tensor.values.iter().find(|x| !x.is_finite()) {
        return Err(Error::Argument(format!("{name} of the weights must be finite, got {x}")));
    }
    Ok(tensor.values.iter().map(|&x| f64::from(x)).collect())
}

/// Inputs or outputs of a matrix, where they lie among the padded ones: equal groups, each padded by itself.
#[derive(Clone, Copy)]
pub(super) struct Groups {
    pub count: usize,
    pub width: usize,
}

impl Groups {
    pub fn one(width: usize) -> Self {
        Self { count: 1, width }
    }

    fn padded(self) -> usize {
        self.count * padded(self.width)
    }

    /// Where number `i` of the unpadded ones lies.
    fn at(self, i: usize) -> usize {
        i / self.width * padded(self.width) + i % self.width
    }
}

/// The byte of 0 in a signed operand of bytes, and the number of byte 0 in one behind a GELU: no GELU is lower.
pub(super) const ZERO: u8 = 128;
pub(super) const LOWEST: f32 = -0.17;

/// A linear map as the kernels read it.
pub(super) struct Packed {
    data: Arc<Vec<Line>>,
    first: usize,
    bias: Vec<Line>,
    /// Numbers in a word.
    pub words: usize,
    /// Lines of a panel: words of a row, and two more where there are four bytes in a word.
    pub stride: usize,
    /// Panels of sixteen outputs.
    pub panels: usize,
    /// Lines of an operand row.
    pub units: usize,
}

impl Packed {
    /// `words` inputs share a word: 1 keeps them float32, 2 rounds them to bfloat16, 4 to int8.
    pub fn new(linear: &Linear, inputs: Groups, outputs: Groups, words: usize) -> Self {
        if words == 4 {
            return Self::bytes(linear, inputs, outputs, false);
        }
        let units = inputs.padded() / LANES / words;
        let (stride, panels) = (units * LANES, outputs.padded() / LANES);
        let mut data = vec![Line::ZERO; stride * panels];
        let mut bias = vec![Line::ZERO; panels];
        for (n, (row, &b)) in linear.weight.chunks_exact(linear.inputs).zip(&linear.bias).enumerate() {
            let n = outputs.at(n);
            let (panel, lane) = (n / LANES, n % LANES);
            bias[panel].0[lane] = b as f32;
            for (k, &w) in row.iter().enumerate() {
                let k = inputs.at(k);
                let word = &mut data[panel * stride + k / words].0[lane];
                *word = if words == 1 {
                    w as f32
                } else {
                    let half = u32::from(bfloat16(w as f32)) << (16 * (k % words));
                    f32::from_bits(word.to_bits() | half)
                };
            }
        }
        Self { data: Arc::new(data), first: 0, bias, words, stride, panels, units }
    }

    /// int8 weights for an operand of bytes, which is signed or comes from a GELU (module `bytes`).
    pub fn bytes(linear: &Linear, inputs: Groups, outputs: Groups, gelu: bool) -> Self {
        let units = (inputs.padded() / LANES).div_ceil(4);
        let (stride, panels) = (units * LANES + 2, outputs.padded() / LANES);
        let mut data = vec![Line::ZERO; stride * panels];
        let mut bias = vec![Line::ZERO; panels];
        for (n, (row, &b)) in linear.weight.chunks_exact(linear.inputs).zip(&linear.bias).enumerate() {
            let n = outputs.at(n);
            let (panel, lane) = (n / LANES, n % LANES);
            let scale = row.iter().fold(0.0_f64, |most, w| most.max(w.abs())) as f32 / 127.0;
            let mut sum = 0;
            for (k, &w) in row.iter().enumerate() {
                let byte = if scale > 0.0 { (w / f64::from(scale)).round().clamp(-127.0, 127.0) as i8 } else { 0 };
                sum += i32::from(byte);
                let k = inputs.at(k);
                let word = &mut data[panel * stride + k / 4].0[lane];
                *word = f32::from_bits(word.to_bits() | u32::from(byte.cast_unsigned()) << (8 * (k % 4)));
            }
            let (start, offset) = if gelu { (0, LOWEST * scale * sum as f32) } else { (-i32::from(ZERO) * sum, 0.0) };
            bias[panel].0[lane] = b as f32 + offset;
            data[panel * stride + stride - 2].0[lane] = f32::from_bits(start.cast_unsigned());
            data[panel * stride + stride - 1].0[lane] = scale;
        }
        Self { data: Arc::new(data), first: 0, bias, words: 4, stride, panels, units }
    }

    /// Adds the bias of `other`, which has as many outputs, to this one's.
    pub fn add_bias(&mut self, other: &Self) {
        for (line, other) in self.bias.iter_mut().zip(&other.bias) {
            line.0.iter_mut().zip(other.0).for_each(|(x, y)| *x += y);
        }
    }

    /// First line of panel `panel`.
    pub fn panel(&self, panel: usize) -> *const Line {
        self.data[self.first + panel * self.stride..].as_ptr()
    }

    pub fn bias(&self) -> *const f32 {
        self.bias.as_ptr().cast()
    }
}

/// Moves matrices behind each other in memory, in the order in which they are used: what a product fetches ahead at its end
/// is then the beginning of the next one.
pub(super) fn line_up<'a>(matrices: impl Iterator<Item = &'a mut Packed>) {
    let mut matrices: Vec<&mut Packed> = matrices.collect();
    let mut data = Vec::with_capacity(matrices.iter().map(|m| m.data.len()).sum());
    for m in &mut matrices {
        m.first = data.len();
        data.extend_from_slice(&m.data);
        m.data = Arc::default();
    }
    let data = Arc::new(data);
    for m in matrices {
        m.data = Arc::clone(&data);
    }
}

/// The nearest bfloat16, ties to even.
pub(super) fn bfloat16(x: f32) -> u16 {
    let bits = x.to_bits();
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

/// `values` as padded lines.
pub(super) fn padded_lines(values: &[f64]) -> Vec<Line> {
    let mut out = vec![Line::ZERO; lines(values.len())];
    for (i, &x) in values.iter().enumerate() {
        out[i / LANES].0[i % LANES] = x as f32;
    }
    out
}
