//! Stores that are nearly right, made from a script of bytes: the parts of a sound store are changed at every level, and
//! the checksums above the change are computed anew, or nothing would be reached behind them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use lewm_core::store::{Schema, Writer};

use super::Script;

const RECORD: usize = 64;

/// An episode taken apart: its record, and its blobs.
#[derive(Clone)]
struct Episode {
    record: Vec<u8>,
    blobs: Vec<Vec<u8>>,
}

/// A sound store, taken apart.
pub struct Base {
    catalogue: Vec<u8>,
    head: Vec<u8>,
    episodes: Vec<Episode>,
}

/// The three files of a store with one shard.
pub struct Files {
    pub catalogue: Vec<u8>,
    pub index: Vec<u8>,
    pub data: Vec<u8>,
}

/// Stores of several shapes, all small: frames that are coded and frames that are not, several chunks, no columns.
pub fn bases(folder: &Path) -> Vec<Base> {
    let shapes = [(3, 4, 1), (1, 1, 0), (8, 8, 2), (2, 30, 1)];
    shapes
        .into_iter()
        .enumerate()
        .map(|(at, (height, width, columns))| {
            let folder = folder.join(at.to_string());
            let columns: BTreeMap<String, usize> = (0..columns).map(|at| (format!("c{at}"), at + 1)).collect();
            let schema = Schema { height, width, action_dim: 2, columns };
            let mut writer = Writer::open(&folder, schema.clone(), "{\"a\": 1}").expect("a new store");
            for (count, noise) in [(2, false), (35, false), (3, true)] {
                let size = schema.frame_bytes();
                let byte = |at: usize| if noise || at % 29 == 3 { ((at * 77) >> 3) as u8 } else { 255 };
                let frames: Vec<u8> = (0..count * size).map(byte).collect();
                let values: Vec<(&str, Vec<f64>)> =
                    schema.columns.iter().map(|(name, width)| (&**name, vec![0.5; count * width])).collect();
                let values: Vec<(&str, &[f64])> = values.iter().map(|(name, values)| (*name, &**values)).collect();
                writer.append(&frames, &vec![1.0; (count - 1) * 2], &values).expect("a sound episode");
            }
            drop(writer);
            let read = |name: &str| fs::read(folder.join(name)).expect("the store just written");
            take_apart(read("catalogue.json"), &read("shard-000000.index"), &read("shard-000000.data"))
        })
        .collect()
}

fn u32_at(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes")) as usize
}

fn take_apart(catalogue: Vec<u8>, index: &[u8], data: &[u8]) -> Base {
    let head = data[..16 + u32_at(data, 8)].to_vec();
    let episodes = index
        .chunks_exact(RECORD)
        .map(|record| {
            let (offset, length) = (u32_at(record, 16), u32_at(record, 24));
            let (mut table, mut blobs, mut taken) = (offset + RECORD, Vec::new(), RECORD);
            while taken < length {
                let blob = u32_at(data, table);
                table += 8;
                taken += 8 + blob;
                blobs.push(blob);
            }
            let mut at = table;
            let blobs = blobs.into_iter().map(|length| (at += length, data[at - length..at].to_vec()).1).collect();
            Episode { record: record.to_vec(), blobs }
        })
        .collect();
    Base { catalogue, head, episodes }
}

/// Puts a store together as `script` says.
pub fn mutate(bases: &[Base], script: &[u8]) -> Files {
    let script = &mut Script(script);
    let base = &bases[script.below(bases.len())];
    let mut episodes = base.episodes.clone();
    for _ in 0..script.byte() % 3 {
        change_episode(script, &mut episodes);
    }
    let mut catalogue = base.catalogue.clone();
    let mut data = base.head.clone();
    let mut index = Vec::new();
    let level = script.byte() % 8;
    for Episode { mut record, blobs } in episodes {
        let mut table = Vec::new();
        for blob in &blobs {
            table.extend((blob.len() as u32).to_le_bytes());
            table.extend(crc32fast::hash(blob).to_le_bytes());
        }
        if level == 1 && script.byte() % 2 == 0 {
            let number = (script.number() as u32).to_le_bytes();
            let at = script.below(table.len() / 4) * 4;
            if let Some(entry) = table.get_mut(at..at + 4) {
                entry.copy_from_slice(&number);
            }
        }
        let length = RECORD + table.len() + blobs.iter().map(Vec::len).sum::<usize>();
        record[16..24].copy_from_slice(&(data.len() as u64).to_le_bytes());
        record[24..32].copy_from_slice(&(length as u64).to_le_bytes());
        record[40..44].copy_from_slice(&crc32fast::hash(&table).to_le_bytes());
        if level == 2 && script.byte() % 2 == 0 {
            let field = [8, 12, 16, 20, 24, 28, 32, 40, 44, 46][script.below(10)];
            let number = script.number().to_le_bytes();
            let width = if field >= 44 { 2 } else { 4 };
            record[field..field + width].copy_from_slice(&number[..width]);
        }
        let crc = crc32fast::hash(&record[..60]);
        record[60..].copy_from_slice(&crc.to_le_bytes());
        data.extend(&record);
        data.extend(table);
        data.extend(blobs.concat());
        index.extend(record);
    }
    // Damage that no checksum hides.
    if level >= 3 {
        for _ in 0..=script.byte() % 3 {
            let file = match script.byte() % 8 {
                0 => &mut catalogue,
                1..=3 => &mut index,
                _ => &mut data,
            };
            script.change(file);
        }
    }
    Files { catalogue, index, data }
}

fn change_episode(script: &mut Script<'_>, episodes: &mut Vec<Episode>) {
    let at = script.below(episodes.len());
    let Some(episode) = episodes.get_mut(at) else { return };
    let place = script.below(episode.blobs.len());
    let Some(blob) = episode.blobs.get_mut(place) else { return };
    match script.byte() % 8 {
        0 => drop(episodes.remove(at)),
        1 => {
            let copy = episode.clone();
            episodes.push(copy);
        }
        2 => drop(episode.blobs.remove(place)),
        3 | 4 => script.change(blob),
        // The runs inside a blob, packed again.
        _ => {
            let mut stream = vec![0; 1 << 12];
            if let Ok(length) = lz4_flex::block::decompress_into(blob, &mut stream) {
                stream.truncate(length);
                script.change(&mut stream);
                *blob = lz4_flex::block::compress(&stream);
            }
        }
    }
}
