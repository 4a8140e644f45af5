//! Model files that are nearly right: the header is changed entry by entry and as text, and the data laid out anew below
//! it where the script says so, or nothing would be reached behind the header.

use std::sync::Arc;

use lewm_core::engine::{Config, Engine, Precision, Tensor, Tensors};
use lewm_core::model_file::{self, Dtype};
use lewm_core::pool::Pool;

use super::Script;

/// An entry of the header, and the data that belongs to it.
#[derive(Clone)]
struct Entry {
    name: String,
    dtype: &'static str,
    shape: Vec<u64>,
    offsets: (u64, u64),
    data: Vec<u8>,
}

/// A sound model file, taken apart, and the architecture it is of.
pub struct Base {
    config: Config,
    entries: Vec<Entry>,
    pool: Arc<Pool>,
}

const DTYPES: [(&str, u64); 8] =
    [("F32", 4), ("I64", 8), ("F16", 2), ("F64", 8), ("BOOL", 1), ("BF16", 2), ("F4", 1), ("F128", 16)];

/// A model file of the smallest network that has every part.
pub fn base() -> Base {
    let config = Config {
        image_size: 2,
        patch_size: 1,
        encoder_dim: 2,
        encoder_depth: 1,
        encoder_heads: 1,
        encoder_mlp: 2,
        embed_dim: 3,
        projector_hidden: 2,
        predictor_dim: 2,
        predictor_depth: 1,
        predictor_heads: 1,
        predictor_head_dim: 2,
        predictor_mlp: 2,
        history: 1,
        block_dim: 1,
        action_smoothed: 1,
        action_hidden: 2,
        distance_head: true,
        action_prior: true,
        prior_blocks: 1,
        head_hidden: 2,
        action_prefix: true,
        prefix_blocks: 2,
    };
    let pool = Arc::new(Pool::new(1));
    let mut tensors = Tensors::new();
    let mut entries = Vec::new();
    // The engine says what it lacks: first a name, then a number of values.
    while let Err(error) = Engine::new(&config, &tensors, Precision::Float32, None, Arc::clone(&pool)) {
        let error = error.to_string();
        if let Some(name) = error.strip_prefix("weights lack ") {
            tensors.insert(name.to_owned(), Tensor { shape: vec![0], values: Vec::new() });
            continue;
        }
        let (name, rest) = error.split_once(" of the weights must have ").expect("a wrong number of values");
        let count = rest.split(' ').next().and_then(|count| count.parse().ok()).expect("the right number");
        tensors.insert(name.to_owned(), Tensor { shape: vec![count], values: vec![0.5; count] });
        let data = 0.5_f32.to_le_bytes().repeat(count);
        entries.push(Entry { name: name.to_owned(), dtype: "F32", shape: vec![count as u64], offsets: (0, 0), data });
    }
    let counts = Entry { name: "counts".into(), dtype: "I64", shape: vec![], offsets: (0, 0), data: vec![7; 8] };
    entries.insert(entries.len() / 2, counts);
    Base { config, entries, pool }
}

/// Puts a model file together as `script` says.
pub fn mutate(base: &Base, script: &[u8]) -> Vec<u8> {
    let script = &mut Script(script);
    let mut entries = base.entries.clone();
    // Some begin with less: a header that ends soon is changed more often where it matters.
    if script.byte().is_multiple_of(4) {
        entries.truncate(script.below(4));
    }
    let level = script.byte() % 8;
    let mut end = 0;
    for _ in 0..script.byte() % 3 {
        change_entry(script, &mut entries);
    }
    for entry in &mut entries {
        entry.offsets = (end, end + entry.data.len() as u64);
        end = entry.offsets.1;
    }
    if level == 1 {
        let at = script.below(entries.len());
        if let Some(entry) = entries.get_mut(at) {
            let offsets = &mut entry.offsets;
            *(if script.byte().is_multiple_of(2) { &mut offsets.0 } else { &mut offsets.1 }) = script.number();
        }
    }
    let parts: Vec<String> = entries
        .iter()
        .map(|Entry { name, dtype, shape, offsets, .. }| {
            let (from, to) = offsets;
            format!("\"{name}\":{{\"dtype\":\"{dtype}\",\"shape\":{shape:?},\"data_offsets\":[{from},{to}]}}")
        })
        .collect();
    let mut header = format!("{{\"__metadata__\":{{\"lewm\":\"[]\"}},{}}}", parts.join(",")).into_bytes();
    if level == 2 {
        for _ in 0..=script.byte() % 3 {
            script.change(&mut header);
        }
    }
    let size = if level == 3 { script.number() } else { header.len() as u64 };
    let mut file = size.to_le_bytes().to_vec();
    file.extend(header);
    for entry in &entries {
        file.extend(&entry.data);
    }
    if level == 4 {
        for _ in 0..=script.byte() % 3 {
            script.change(&mut file);
        }
    }
    file
}

fn change_entry(script: &mut Script<'_>, entries: &mut Vec<Entry>) {
    let (at, to) = (script.below(entries.len()), script.below(entries.len()));
    let Some(entry) = entries.get_mut(at) else { return };
    let axis = script.below(entry.shape.len() + 1);
    match script.byte() % 10 {
        0 => drop(entries.remove(at)),
        1 => {
            let mut copy = entry.clone();
            if script.byte().is_multiple_of(2) {
                copy.name.push('x');
            }
            entries.push(copy);
        }
        2 => entries.swap(at, to),
        3 => entry.shape.insert(axis, script.number()),
        4 if axis < entry.shape.len() => entry.shape[axis] = script.number(),
        5 => script.change(&mut entry.data),
        6 => {
            // A value that a model must not have, or may.
            let value = [f32::NAN, f32::INFINITY, f32::MAX, -1.0, 1e-45][usize::from(script.byte() % 5)];
            let place = script.below(entry.data.len() / 4) * 4;
            if let Some(word) = entry.data.get_mut(place..place + 4) {
                word.copy_from_slice(&value.to_le_bytes());
            }
        }
        // Of another type or shape, and sound all the same.
        kind => {
            let (dtype, width) = DTYPES[usize::from(script.byte()) % DTYPES.len()];
            entry.dtype = dtype;
            if kind < 9 {
                entry.shape.insert(axis, u64::from(script.byte() % 4));
            }
            let count = entry.shape.iter().fold(width, |count, &axis| count.saturating_mul(axis));
            entry.data.resize(count.min(1 << 12) as usize, 1);
        }
    }
}

/// Puts a model file in memory through everything that reads one. Returns how far it came: it is refused, its tensors make
/// no model, or they do.
///
/// # Panics
/// Where the code has a fault.
pub fn exercise(base: &Base, bytes: &[u8]) -> usize {
    let Ok(file) = model_file::parse(&mut &*bytes, bytes.len() as u64) else { return 0 };
    let size = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    let data: Vec<u8> = file.tensors.iter().flat_map(|tensor| &tensor.data).copied().collect();
    assert!(bytes[8 + size..] == data, "what follows the header is the tensors");
    let mut tensors = Tensors::new();
    for model_file::Tensor { name, dtype, shape, data } in file.tensors {
        assert_eq!(shape.iter().product::<usize>() * dtype.bitsize(), data.len() * 8, "{name}");
        if dtype == Dtype::F32 {
            let values = data.chunks_exact(4).map(|word| f32::from_le_bytes(word.try_into().expect("4 bytes")));
            tensors.insert(name, Tensor { shape, values: values.collect() });
        }
    }
    let engine = Engine::new(&base.config, &tensors, Precision::Float32, None, Arc::clone(&base.pool));
    if engine.is_ok() {
        2
    } else {
        1
    }
}
