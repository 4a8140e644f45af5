#![allow(clippy::cast_possible_wrap, clippy::cast_sign_loss)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use tempfile::TempDir;

use super::codec::{self, Buffers};
use super::format::{shard_paths, CHUNK, RECORD};
use super::{repair, verify, Schema, Store, Verification, Writer};
use crate::Error;

struct Episode {
    frames: Vec<u8>,
    actions: Vec<f32>,
    state: Vec<f64>,
}

fn schema(height: usize, width: usize) -> Schema {
    Schema { height, width, action_dim: 2, columns: BTreeMap::from([("state".into(), 3)]) }
}

/// An episode of `count` frames: a dot that moves over a background, or noise.
fn episode(schema: &Schema, count: usize, seed: u32, noise: bool) -> Episode {
    let mut word = seed.wrapping_mul(2_654_435_769) | 1;
    let mut random = move || {
        word ^= word << 13;
        word ^= word >> 17;
        word ^= word << 5;
        word
    };
    let size = schema.frame_bytes();
    let mut frames = vec![255; count * size];
    for frame in frames.chunks_exact_mut(size) {
        if noise {
            frame.fill_with(|| random() as u8);
        } else {
            frame[random() as usize % size] = 7;
        }
    }
    let actions = (0..(count - 1) * 2).map(|_| random() as f32).collect();
    let state = (0..count * 3).map(|_| f64::from(random()) / 3.0).collect();
    Episode { frames, actions, state }
}

fn append(writer: &mut Writer, episode: &Episode) -> Result<usize, Error> {
    writer.append(&episode.frames, &episode.actions, &[("state", &episode.state)])
}

fn write(folder: &Path, schema: &Schema, episodes: &[Episode]) {
    let mut writer = Writer::open(folder, schema.clone(), "{}").unwrap();
    for episode in episodes {
        append(&mut writer, episode).unwrap();
    }
}

fn read(store: &Store, index: usize) -> Result<Episode, Error> {
    let items: Vec<_> = (0..store.lengths().nth(index).unwrap()).map(|frame| (index, frame)).collect();
    let mut frames = vec![0; items.len() * store.schema().frame_bytes()];
    store.gather(&items, &mut frames)?;
    let index = index as i64;
    Ok(Episode { frames, actions: store.actions(index)?, state: store.column("state", index)? })
}

fn assert_equal(got: &Episode, wanted: &Episode) {
    assert!(got.frames == wanted.frames, "frames differ");
    assert_eq!(got.actions, wanted.actions);
    assert_eq!(got.state, wanted.state);
}

/// Three small episodes, their folder, and how many index records and data bytes each needs.
fn small() -> (TempDir, Vec<Episode>, Vec<usize>) {
    let schema = schema(4, 5);
    let folder = TempDir::new().unwrap();
    let episodes: Vec<_> = (0..3).map(|seed| episode(&schema, 2 + 9 * seed as usize, seed, seed == 1)).collect();
    let mut writer = Writer::open(folder.path(), schema, "{}").unwrap();
    let mut ends = Vec::new();
    for episode in &episodes {
        append(&mut writer, episode).unwrap();
        ends.push(fs::metadata(data(folder.path())).unwrap().len() as usize);
    }
    (folder, episodes, ends)
}

fn data(folder: &Path) -> PathBuf {
    shard_paths(folder, 0).0
}

fn index(folder: &Path) -> PathBuf {
    shard_paths(folder, 0).1
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn check(folder: &Path) -> Verification {
    verify(folder, &mut |_, _| true).unwrap().unwrap()
}

fn corrupt(result: Result<Store, Error>) -> String {
    match result {
        Err(Error::Corrupt(text)) => text,
        other => panic!("wanted Corrupt, got {other:?}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn what_is_written_is_read(
        height in 1..9_usize,
        width in 1..9_usize,
        counts in prop::collection::vec(2..3 * CHUNK + 2, 0..5),
        seed: u32,
        noise: bool,
    ) {
        let schema = schema(height, width);
        let folder = TempDir::new().unwrap();
        let episodes: Vec<_> =
            counts.iter().zip(seed..).map(|(&count, seed)| episode(&schema, count, seed, noise)).collect();
        write(folder.path(), &schema, &episodes);
        for skip_damaged in [false, true] {
            let store = Store::open(folder.path(), skip_damaged).unwrap();
            prop_assert_eq!(store.lengths().collect::<Vec<_>>(), counts.clone());
            prop_assert!(store.skipped().is_empty());
            for (at, wanted) in episodes.iter().enumerate() {
                assert_equal(&read(&store, at).unwrap(), wanted);
            }
        }
    }

    #[test]
    fn damaged_bytes_are_found_and_never_panic(
        edits in prop::collection::vec((any::<prop::sample::Index>(), 1..=255_u8), 1..4),
        which in 0..3_usize,
        checksums: bool,
    ) {
        let (folder, episodes, _) = small();
        let path = [data(folder.path()), index(folder.path()), folder.path().join("catalogue.json")][which].clone();
        let good = fs::read(&path).unwrap();
        let mut bad = good.clone();
        for (at, by) in edits {
            let at = at.index(bad.len());
            bad[at] ^= by;
        }
        if which == 1 && checksums {
            // A forged checksum: the numbers themselves must be harmless.
            for record in bad.chunks_exact_mut(RECORD) {
                let crc = crc32fast::hash(&record[..60]);
                record[60..].copy_from_slice(&crc.to_le_bytes());
            }
        }
        fs::write(&path, &bad).unwrap();
        let whole = Store::open(folder.path(), false).and_then(|store| {
            (0..store.len()).map(|at| read(&store, at)).collect::<Result<Vec<_>, _>>()
        });
        match whole {
            // Chunk length and digest have no second witness: that nothing panics is all there is to ask.
            _ if which == 1 && checksums => {}
            Ok(got) => {
                // Edits that cancel, or that turn white space of the catalogue into other white space, or that change
                // what only a repair reads.
                prop_assert!(bad == good || which == 2 || (which == 0 && !check(folder.path()).damage.is_empty()));
                prop_assert_eq!(got.len(), episodes.len());
                got.iter().zip(&episodes).for_each(|(got, wanted)| assert_equal(got, wanted));
            }
            Err(error) => prop_assert!(bad != good && matches!(error, Error::Corrupt(_)), "{error}"),
        }
        if let Ok(store) = Store::open(folder.path(), true) {
            for at in 0..store.len() {
                let got = read(&store, at).unwrap();
                prop_assert!(episodes.iter().any(|wanted| wanted.frames == got.frames && wanted.state == got.state));
            }
        }
    }

    #[test]
    fn any_bytes_as_an_index_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let (folder, _, _) = small();
        fs::write(index(folder.path()), &bytes).unwrap();
        let _ = Store::open(folder.path(), false);
        prop_assert_eq!(Store::open(folder.path(), true).unwrap().len(), 0);
    }

    #[test]
    fn pictures_are_decoded_to_what_they_were(
        (height, width) in (1..12_usize, 1..40_usize),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 1..30_usize), 0..12),
        level: u8,
        noise: bool,
    ) {
        let size = height * width * 3;
        let mut frame = vec![level; size];
        for (at, value, length) in changes {
            let at = at.index(size);
            let value = |place: usize| if noise { value.wrapping_mul(place as u8 ^ 0x5d) } else { value };
            frame.iter_mut().enumerate().skip(at).take(length).for_each(|(place, byte)| *byte = value(place));
        }
        let key: Vec<u8> = frame.iter().map(|byte| if byte % 5 == 0 { 9 } else { *byte }).collect();
        for key in [None, Some(&*key)] {
            assert_coding(&frame, key, width * 3);
        }
    }

    #[test]
    fn any_bytes_as_a_picture_do_not_panic(stream in prop::collection::vec(any::<u8>(), 0..80), packed: bool) {
        let bytes = if packed { lz4_flex::block::compress(&stream) } else { stream };
        for key in [None, Some(&[7; 60][..])] {
            let mut out = [1; 60];
            let _ = codec::decode(&bytes, key, 12, &mut out, &mut Vec::new());
        }
    }
}

/// Codes and decodes a picture; returns the bytes it took.
fn assert_coding(frame: &[u8], key: Option<&[u8]>, row: usize) -> usize {
    let mut buffers = Buffers::default();
    let bytes = codec::encode(frame, key, row, &mut buffers);
    if bytes.len() < frame.len() {
        let mut out = vec![0xaa; frame.len()];
        codec::decode(bytes, key, row, &mut out, &mut vec![3; 5]).expect("it was just coded");
        assert!(out == frame, "decoded to something else");
    } else {
        assert!(bytes == frame, "a picture that is kept as it is");
    }
    bytes.len()
}

#[test]
fn pictures_of_odd_sizes_and_the_largest() {
    let random =
        |size: usize| (0..size as u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect::<Vec<_>>();
    for (height, width) in [(1, 1), (1, 7), (7, 1), (3, 5), (17, 31), (96, 96), (64, 64)] {
        let (size, row) = (height * width * 3, width * 3);
        for frame in [vec![0; size], vec![255; size], random(size)] {
            for key in [None, Some(&*frame), Some(&*vec![255; size])] {
                assert_coding(&frame, key, row);
            }
        }
    }
    // All white: one row, and a copy of it for each of the others.
    assert!(assert_coding(&vec![255; 4096 * 4096 * 3], None, 4096 * 3) < 100);
    let noise = random(96 * 96 * 3);
    assert_eq!(assert_coding(&noise, None, 96 * 3), noise.len());
}

#[test]
fn a_key_frame_is_the_median() {
    assert_eq!(codec::key(&[1, 2, 3, 1, 9, 3, 1, 4, 3], 3), [1, 4, 3]);
    assert_eq!(codec::key(&[1, 2, 3], 3), [1, 2, 3]);
    // Noise: the first frame does as well.
    assert_eq!(codec::key(&[1, 2, 3, 4, 5, 6, 7, 8, 9], 3), [1, 2, 3]);
}

#[test]
fn index_cut_at_every_byte() {
    let (folder, episodes, _) = small();
    let whole = fs::read(index(folder.path())).unwrap();
    for cut in 0..=whole.len() {
        fs::write(index(folder.path()), &whole[..cut]).unwrap();
        for skip_damaged in [false, true] {
            let store = Store::open(folder.path(), skip_damaged).unwrap();
            assert_eq!(store.len(), cut / RECORD, "cut at {cut}");
            for (at, wanted) in episodes.iter().enumerate().take(store.len()) {
                assert_equal(&read(&store, at).unwrap(), wanted);
            }
        }
    }
}

#[test]
fn data_cut_at_every_byte() {
    let (folder, episodes, ends) = small();
    let whole = fs::read(data(folder.path())).unwrap();
    for cut in 0..whole.len() {
        fs::write(data(folder.path()), &whole[..cut]).unwrap();
        let text = corrupt(Store::open(folder.path(), false));
        let sizes = format!("shard-000000.data has {cut} bytes and needs {}", whole.len());
        assert!(text.contains(&sizes) && text.contains("skip_damaged=True"), "{text}");
        let store = Store::open(folder.path(), true).unwrap();
        assert_eq!(store.len(), ends.iter().filter(|&&end| end <= cut).count(), "cut at {cut}");
        assert_eq!(store.skipped().len(), 1);
        for (at, wanted) in episodes.iter().enumerate().take(store.len()) {
            assert_equal(&read(&store, at).unwrap(), wanted);
        }
    }
}

#[test]
fn data_cut_while_open_is_an_error_of_the_read() {
    let (folder, episodes, ends) = small();
    let store = Store::open(folder.path(), false).unwrap();
    fs::OpenOptions::new().write(true).open(data(folder.path())).unwrap().set_len(ends[1] as u64).unwrap();
    assert_equal(&read(&store, 0).unwrap(), &episodes[0]);
    assert!(matches!(read(&store, 2), Err(Error::Corrupt(text)) if text.contains("cut short")));
}

#[test]
fn every_flipped_byte_of_an_index_is_damage() {
    let (folder, episodes, _) = small();
    let good = fs::read(index(folder.path())).unwrap();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1;
        fs::write(index(folder.path()), &bad).unwrap();
        let text = corrupt(Store::open(folder.path(), false));
        assert!(text.contains(&format!("record {} is damaged", at / RECORD)), "{text}");
        let store = Store::open(folder.path(), true).unwrap();
        let left: Vec<_> = (0..episodes.len()).filter(|&episode| episode != at / RECORD).collect();
        assert_eq!(store.len(), left.len());
        for (at, &episode) in left.iter().enumerate() {
            assert_equal(&read(&store, at).unwrap(), &episodes[episode]);
        }
    }
}

#[test]
fn every_flipped_byte_of_the_data_is_found() {
    let (folder, episodes, ends) = small();
    let good = fs::read(data(folder.path())).unwrap();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x80;
        fs::write(data(folder.path()), &bad).unwrap();
        let broken = ends.iter().position(|&end| at < end).unwrap();
        let store = Store::open(folder.path(), false).unwrap();
        for (episode, wanted) in episodes.iter().enumerate() {
            match read(&store, episode) {
                // What only a repair reads may be broken too: the head of the shard, an episode's own record.
                Ok(got) => assert_equal(&got, wanted),
                Err(Error::Corrupt(_)) if episode == broken => {}
                _ => panic!("byte {at}, episode {episode}"),
            }
        }
        assert!(Store::open(folder.path(), true).unwrap().len() >= episodes.len() - 1);
        assert!(!check(folder.path()).damage.is_empty(), "byte {at}");
    }
}

#[test]
fn zeros_after_the_last_record_are_no_episode() {
    let (folder, episodes, _) = small();
    let mut bytes = fs::read(index(folder.path())).unwrap();
    bytes.resize(bytes.len() + 3 * RECORD - 7, 0);
    fs::write(index(folder.path()), &bytes).unwrap();
    assert_eq!(Store::open(folder.path(), false).unwrap().len(), episodes.len());
}

#[test]
fn a_catalogue_cut_at_any_byte_or_missing_is_refused() {
    let (folder, _, _) = small();
    let path = folder.path().join("catalogue.json");
    let whole = fs::read(&path).unwrap();
    for cut in 0..whole.len() {
        fs::write(&path, &whole[..cut]).unwrap();
        assert!(corrupt(Store::open(folder.path(), true)).contains("damaged catalogue"));
        assert!(matches!(Writer::open(folder.path(), schema(4, 5), "{}"), Err(Error::Corrupt(_))));
    }
    fs::remove_file(&path).unwrap();
    assert!(corrupt(Store::open(folder.path(), true)).contains("not a .lewm store"));
    assert!(matches!(Writer::open(folder.path(), schema(4, 5), "{}"), Err(Error::Corrupt(_))));
    assert!(matches!(Store::open(&folder.path().join("none"), false), Err(Error::Io(..))));
}

#[test]
fn a_newer_catalogue_says_so() {
    let (folder, _, _) = small();
    let path = folder.path().join("catalogue.json");
    let text = fs::read_to_string(&path).unwrap().replace("\"version\": 1", "\"version\": 9");
    fs::write(&path, text).unwrap();
    assert!(corrupt(Store::open(folder.path(), false)).contains("version 9"));
    let refused = repair(folder.path(), false, &mut |_, _| true).unwrap_err();
    assert!(refused.to_string().contains("version 9"), "{refused}");
}

#[test]
fn an_index_that_is_gone_is_damage() {
    let (folder, _, _) = small();
    fs::remove_file(index(folder.path())).unwrap();
    assert!(corrupt(Store::open(folder.path(), false)).contains("shard-000000.index is missing"));
    let mut store = Store::open(folder.path(), true).unwrap();
    store.refresh().unwrap();
    assert_eq!(store.skipped().len(), 1);
}

#[test]
fn a_shard_of_another_store_is_damage() {
    let (folder, _, _) = small();
    let other = TempDir::new().unwrap();
    let schema = schema(5, 4);
    write(other.path(), &schema, &[episode(&schema, 3, 9, true)]);
    fs::copy(data(other.path()), shard_paths(folder.path(), 1).0).unwrap();
    fs::copy(index(other.path()), shard_paths(folder.path(), 1).1).unwrap();
    assert!(corrupt(Store::open(folder.path(), false)).contains("another schema"));
    assert_eq!(Store::open(folder.path(), true).unwrap().len(), 3);
}

#[test]
fn sessions_have_shards_of_their_own_and_refresh_sees_them() {
    let schema = schema(6, 6);
    let folder = TempDir::new().unwrap();
    let episodes: Vec<_> = (0..6).map(|seed| episode(&schema, 4 + seed as usize, seed, true)).collect();
    let mut first = Writer::open(folder.path(), schema.clone(), r#"{"session": 1}"#).unwrap();
    let mut second = Writer::open(folder.path(), schema.clone(), r#"{"session": 2}"#).unwrap();
    let mut store = Store::open(folder.path(), false).unwrap();
    assert!(store.is_empty());
    // Interleaved, so that the order of commits is not the order of shards.
    for (at, wanted) in episodes.iter().enumerate() {
        let writer = if at % 2 == 0 { &mut first } else { &mut second };
        assert_eq!(append(writer, wanted).unwrap(), at / 2);
        assert_eq!(store.refresh().unwrap(), 1);
        assert_equal(&read(&store, at).unwrap(), wanted);
    }
    assert_eq!(store.refresh().unwrap(), 0);
    let afresh = Store::open(folder.path(), false).unwrap();
    assert_eq!(afresh.lengths().collect::<Vec<_>>(), [4, 6, 8, 5, 7, 9]);
    assert_eq!(afresh.fingerprint(), store.fingerprint());
    assert_eq!(afresh.metadata(), r#"{"session": 1}"#);
    assert!(shard_paths(folder.path(), 1).0.exists() && !shard_paths(folder.path(), 2).1.exists());
}

#[test]
fn a_copy_whose_files_are_replaced_is_refreshed() {
    let schema = schema(4, 5);
    let (folder, copy) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let episodes: Vec<_> = (0..2).map(|seed| episode(&schema, 5, seed, true)).collect();
    let mut writer = Writer::open(folder.path(), schema.clone(), "{}").unwrap();
    let bring = || {
        for path in [data(folder.path()), index(folder.path()), folder.path().join("catalogue.json")] {
            let temporary = copy.path().join("temporary");
            fs::copy(&path, &temporary).unwrap();
            fs::rename(&temporary, copy.path().join(path.file_name().unwrap())).unwrap();
        }
    };
    append(&mut writer, &episodes[0]).unwrap();
    bring();
    let mut store = Store::open(copy.path(), false).unwrap();
    assert_equal(&read(&store, 0).unwrap(), &episodes[0]);
    append(&mut writer, &episodes[1]).unwrap();
    bring();
    assert_eq!(store.refresh().unwrap(), 1);
    assert_equal(&read(&store, 1).unwrap(), &episodes[1]);
    assert_equal(&read(&store, 0).unwrap(), &episodes[0]);
}

#[test]
fn a_refresh_that_fails_loses_nothing() {
    let schema = schema(4, 5);
    let folder = TempDir::new().unwrap();
    let episodes: Vec<_> = (0..2).map(|seed| episode(&schema, 5, seed, true)).collect();
    let mut store = {
        Writer::open(folder.path(), schema.clone(), "{}").unwrap();
        Store::open(folder.path(), false).unwrap()
    };
    write(folder.path(), &schema, &episodes);
    let unreadable = shard_paths(folder.path(), 1).1;
    fs::create_dir(&unreadable).unwrap();
    assert!(matches!(store.refresh(), Err(Error::Io(..))));
    assert!(store.is_empty());
    fs::remove_dir(unreadable).unwrap();
    assert_eq!(store.refresh().unwrap(), 2);
    assert_equal(&read(&store, 1).unwrap(), &episodes[1]);
}

#[test]
fn a_frame_larger_than_its_pixels_is_not_read() {
    let (folder, _, _) = small();
    let (mut bytes, mut record) = (fs::read(data(folder.path())).unwrap(), fs::read(index(folder.path())).unwrap());
    record.truncate(RECORD);
    // The first episode has a key frame, 2 frames, its actions and a column: a table of 5. Its key grows by a kilobyte.
    let table = u64::from_le_bytes(record[16..24].try_into().unwrap()) as usize + RECORD;
    let blobs = table + 40;
    let length = u32::from_le_bytes(bytes[table..table + 4].try_into().unwrap()) as usize;
    bytes.splice(blobs + length..blobs + length, [0; 1024]);
    bytes[table..table + 4].copy_from_slice(&(length as u32 + 1024).to_le_bytes());
    let crc = crc32fast::hash(&bytes[blobs..blobs + length + 1024]);
    bytes[table + 4..table + 8].copy_from_slice(&crc.to_le_bytes());
    let whole = u64::from_le_bytes(record[24..32].try_into().unwrap()) + 1024;
    record[24..32].copy_from_slice(&whole.to_le_bytes());
    record[40..44].copy_from_slice(&crc32fast::hash(&bytes[table..blobs]).to_le_bytes());
    let crc = crc32fast::hash(&record[..60]);
    record[60..].copy_from_slice(&crc.to_le_bytes());
    fs::write(data(folder.path()), bytes).unwrap();
    fs::write(index(folder.path()), record).unwrap();
    let error = read(&Store::open(folder.path(), false).unwrap(), 0).map(drop).unwrap_err();
    assert!(error.to_string().contains("contradict each other"), "{error}");
}

#[test]
fn a_catalogue_left_half_made_is_in_nobodys_way() {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("catalogue.json.0"), "{").unwrap();
    let schema = schema(4, 5);
    write(folder.path(), &schema, &[episode(&schema, 3, 1, true)]);
    assert_eq!(Store::open(folder.path(), false).unwrap().len(), 1);
    assert_eq!(fs::read_to_string(folder.path().join("catalogue.json.0")).unwrap(), "{");
}

#[test]
fn what_a_crash_leaves_is_ignored_and_the_next_session_goes_on() {
    let (folder, episodes, ends) = small();
    let record = fs::read(index(folder.path())).unwrap();
    // Data of an episode without its record, then half a record.
    let mut tail = fs::read(data(folder.path())).unwrap();
    tail.extend([1; 100]);
    fs::write(data(folder.path()), &tail).unwrap();
    fs::write(index(folder.path()), &record[..2 * RECORD + 30]).unwrap();
    fs::write(shard_paths(folder.path(), 1).1, []).unwrap();
    assert_eq!(Store::open(folder.path(), false).unwrap().len(), 2);
    let mut writer = Writer::open(folder.path(), schema(4, 5), "{}").unwrap();
    assert_eq!(append(&mut writer, &episodes[2]).unwrap(), 2);
    let store = Store::open(folder.path(), false).unwrap();
    assert_equal(&read(&store, 2).unwrap(), &episodes[2]);
    assert!(fs::metadata(data(folder.path())).unwrap().len() as usize > ends[2]);
}

#[test]
fn fingerprint_is_of_content_and_order() {
    let schema = schema(4, 4);
    let make = |order: &[u32]| {
        let folder = TempDir::new().unwrap();
        let episodes: Vec<_> = order.iter().map(|&seed| episode(&schema, 5, seed, true)).collect();
        write(folder.path(), &schema, &episodes);
        Store::open(folder.path(), false).unwrap().fingerprint()
    };
    assert_eq!(make(&[1, 2]), make(&[1, 2]));
    assert_ne!(make(&[1, 2]), make(&[2, 1]));
    assert_ne!(make(&[1, 2]), make(&[1]));
    assert_ne!(make(&[1, 2]), make(&[1, 3]));
    assert_eq!(make(&[1]).len(), 16);
}

#[test]
fn windows_are_what_their_frames_are() {
    // Large enough that several threads share the work, and a window straddles their border.
    let schema = schema(64, 64);
    let folder = TempDir::new().unwrap();
    let episodes: Vec<_> = (0..3).map(|seed| episode(&schema, 50, seed, false)).collect();
    write(folder.path(), &schema, &episodes);
    let store = Store::open(folder.path(), false).unwrap();
    let size = schema.frame_bytes();
    let (ids, starts): (Vec<i64>, Vec<i64>) = (0..60).map(|at| (at % 3, at * 7 % 35)).unzip();
    let items = store.windows(&ids, &starts, 4, 5).unwrap();
    let mut out = vec![1; items.len() * size];
    store.gather(&items, &mut out).unwrap();
    for (at, got) in out.chunks_exact(size).enumerate() {
        let (episode, frame) = (ids[at / 4] as usize, starts[at / 4] as usize + at % 4 * 5);
        assert!(got == &episodes[episode].frames[frame * size..][..size], "window {at}");
    }
    assert_eq!(store.windows(&[0], &[34], 4, 5).unwrap(), [(0, 34), (0, 39), (0, 44), (0, 49)]);
    for (ids, starts, length, stride) in
        [([0], [35], 4, 5), ([3], [0], 1, 1), ([-1], [0], 1, 1), ([0], [-1], 1, 1), ([0], [1], usize::MAX, usize::MAX)]
    {
        assert!(matches!(store.windows(&ids, &starts, length, stride), Err(Error::Index(_))));
    }
    assert!(matches!(store.windows(&[0], &[0], 0, 1), Err(Error::Argument(_))));
    assert!(matches!(store.windows(&[0], &[0], 1, 0), Err(Error::Argument(_))));
    assert!(matches!(store.windows(&[0], &[0, 1], 1, 1), Err(Error::Argument(_))));
    assert!(matches!(store.gather(&[(0, 50)], &mut vec![0; size]), Err(Error::Index(_))));
    assert!(matches!(store.gather(&[(0, 0)], &mut []), Err(Error::Argument(_))));
}

#[test]
fn bad_episodes_are_refused_and_leave_nothing() {
    let schema = schema(4, 5);
    let folder = TempDir::new().unwrap();
    let mut writer = Writer::open(folder.path(), schema.clone(), "{}").unwrap();
    let good = episode(&schema, 5, 1, true);
    let mut refuse = |frames: &[u8], actions: &[f32], columns: &[(&str, &[f64])], wanted: &str| {
        let error = writer.append(frames, actions, columns).unwrap_err();
        assert!(matches!(&error, Error::Argument(text) if text.contains(wanted)), "{error}");
    };
    let state: (&str, &[f64]) = ("state", &good.state);
    refuse(&[], &[], &[("state", &[])], "at least 2 frames, got 0");
    refuse(&good.frames[..60], &[], &[("state", &good.state[..3])], "at least 2 frames, got 1");
    refuse(&good.frames[1..], &good.actions, &[state], "frames has 299 bytes");
    refuse(&good.frames, &good.actions[2..], &[state], "actions has 6 numbers");
    refuse(&good.frames, &good.actions, &[], "columns lacks \"state\"");
    refuse(&good.frames, &good.actions, &[state, ("pose", &[])], "columns has \"pose\"");
    refuse(&good.frames, &good.actions, &[("state", &good.state[3..])], "columns[\"state\"] has 12 numbers");
    let mut actions = good.actions.clone();
    actions[3] = f32::NAN;
    refuse(&good.frames, &actions, &[state], "actions[1, 1] is NaN");
    let mut values = good.state.clone();
    values[5] = f64::INFINITY;
    refuse(&good.frames, &good.actions, &[("state", &values)], "columns[\"state\"][1, 2] is inf");
    assert_eq!(names(folder.path()), ["catalogue.json", "lock"]);
    assert_eq!(append(&mut writer, &good).unwrap(), 0);
}

#[test]
fn bad_stores_are_refused() {
    let (folder, _, _) = small();
    let refuse = |path: &Path, schema: Schema, metadata: &str, wanted: &str| {
        let error = Writer::open(path, schema, metadata).unwrap_err();
        assert!(matches!(&error, Error::Argument(text) if text.contains(wanted)), "{error}");
    };
    let base = schema(4, 5);
    refuse(folder.path(), schema(8, 5), "{}", "height is 8");
    refuse(folder.path(), schema(4, 8), "{}", "width is 8");
    refuse(folder.path(), Schema { action_dim: 3, ..base.clone() }, "{}", "action_dim is 3");
    refuse(folder.path(), Schema { columns: BTreeMap::new(), ..base.clone() }, "{}", "columns is {}");
    let new = TempDir::new().unwrap();
    refuse(new.path(), schema(0, 5), "{}", "height is 0");
    refuse(new.path(), schema(4, 5000), "{}", "width is 5000");
    refuse(new.path(), base.clone(), "[]", "JSON object");
    refuse(new.path(), base.clone(), "{", "not JSON");
    fs::write(new.path().join("thesis.tex"), "years").unwrap();
    refuse(new.path(), base, "{}", "not empty: it has thesis.tex");
}

/// Repairs, and expects a store in order that has exactly `wanted`.
fn assert_repaired(folder: &Path, wanted: &[&Episode]) -> Vec<String> {
    let planned = repair(folder, true, &mut |_, _| true).unwrap().unwrap();
    let done = repair(folder, false, &mut |_, _| true).unwrap().unwrap();
    assert_eq!(planned.changes, done.changes);
    let found = check(folder);
    assert_eq!((found.damage, found.notes), (vec![], vec![]));
    assert_eq!((found.episodes, done.episodes), (wanted.len(), wanted.len()));
    assert_eq!(found.frames, wanted.iter().map(|episode| episode.frames.len() / 60).sum::<usize>());
    let store = Store::open(folder, false).unwrap();
    assert_eq!(store.len(), wanted.len());
    wanted.iter().enumerate().for_each(|(at, wanted)| assert_equal(&read(&store, at).unwrap(), wanted));
    assert!(repair(folder, false, &mut |_, _| true).unwrap().unwrap().changes.is_empty());
    done.changes
}

#[test]
fn a_store_in_order_needs_no_repair() {
    let (folder, episodes, _) = small();
    let before = fs::read(data(folder.path())).unwrap();
    let found = check(folder.path());
    assert_eq!((found.episodes, found.frames, found.damage, found.notes), (3, 33, vec![], vec![]));
    assert!(assert_repaired(folder.path(), &episodes.iter().collect::<Vec<_>>()).is_empty());
    assert!(before == fs::read(data(folder.path())).unwrap() && !folder.path().join("damaged").exists());
}

#[test]
fn an_index_cut_at_a_record_or_gone_is_noticed_and_made_again() {
    let (folder, episodes, _) = small();
    let whole = fs::read(index(folder.path())).unwrap();
    for records in 0..3 {
        fs::write(index(folder.path()), &whole[..records * RECORD]).unwrap();
        assert_eq!(Store::open(folder.path(), false).unwrap().len(), records);
        let found = check(folder.path());
        assert_eq!((found.episodes, found.damage.len()), (records, 3 - records));
        assert!(found.damage[0].contains("is not in the index"), "{:?}", found.damage);
        assert_repaired(folder.path(), &episodes.iter().collect::<Vec<_>>());
        assert!(fs::read(index(folder.path())).unwrap() == whole);
    }
    fs::remove_file(index(folder.path())).unwrap();
    assert!(check(folder.path()).damage[0].contains("is missing"));
    assert_repaired(folder.path(), &episodes.iter().collect::<Vec<_>>());
    assert!(fs::read(index(folder.path())).unwrap() == whole);
}

#[test]
fn one_damaged_episode_goes_and_the_others_stay() {
    let (folder, episodes, ends) = small();
    let good = (fs::read(data(folder.path())).unwrap(), fs::read(index(folder.path())).unwrap());
    let head = fs::metadata(folder.path().join("catalogue.json")).unwrap().len() as usize + 16;
    for at in (0..good.0.len()).step_by(7) {
        let mut bad = good.0.clone();
        bad[at] ^= 1;
        fs::write(data(folder.path()), &bad).unwrap();
        fs::write(index(folder.path()), &good.1).unwrap();
        let _ = fs::remove_dir_all(folder.path().join("damaged"));
        let starts = [head, ends[0], ends[1]];
        // The head of the shard and an episode's copy of its record can be made again.
        let lost = (0..3).find(|&episode| (starts[episode] + RECORD..ends[episode]).contains(&at));
        let left: Vec<_> = (0..3).filter(|&episode| Some(episode) != lost).map(|episode| &episodes[episode]).collect();
        assert_repaired(folder.path(), &left);
        assert!(fs::read(folder.path().join("damaged/shard-000000.data.0")).unwrap() == bad, "nothing is deleted");
        // Killed between data and index: the next repair ends as this one did.
        fs::write(index(folder.path()), &good.1).unwrap();
        assert_repaired(folder.path(), &left);
    }
}

#[test]
fn a_catalogue_is_made_again_from_a_shard() {
    let (folder, episodes, _) = small();
    let path = folder.path().join("catalogue.json");
    let whole = fs::read(&path).unwrap();
    for cut in 0..whole.len() {
        fs::write(&path, &whole[..cut]).unwrap();
        assert!(check(folder.path()).damage[0].contains("damaged catalogue"));
        assert_repaired(folder.path(), &episodes.iter().collect::<Vec<_>>());
        assert!(fs::read(&path).unwrap() == whole);
    }
    fs::remove_file(&path).unwrap();
    assert_repaired(folder.path(), &episodes.iter().collect::<Vec<_>>());
    assert!(fs::read(&path).unwrap() == whole);
    assert!(matches!(verify(&folder.path().join("damaged"), &mut |_, _| true), Err(Error::Corrupt(_))));
    assert!(matches!(repair(&folder.path().join("damaged"), false, &mut |_, _| true), Err(Error::Corrupt(_))));
}

#[test]
fn a_repair_waits_for_nobody() {
    let (folder, episodes, _) = small();
    let mut writer = Writer::open(folder.path(), schema(4, 5), "{}").unwrap();
    append(&mut writer, &episodes[0]).unwrap();
    for dry_run in [false, true] {
        let error = repair(folder.path(), dry_run, &mut |_, _| true).unwrap_err();
        assert!(error.to_string().contains("has a writer at work"), "{error}");
    }
    // An append that has not come to its record is no damage while somebody writes.
    let record = fs::read(shard_paths(folder.path(), 1).1).unwrap();
    fs::write(shard_paths(folder.path(), 1).1, []).unwrap();
    let found = check(folder.path());
    assert_eq!((found.episodes, found.damage.len(), found.notes.len()), (3, 0, 1));
    drop(writer);
    assert_eq!(check(folder.path()).damage.len(), 1);
    fs::write(shard_paths(folder.path(), 1).1, record).unwrap();
    assert!(repair(folder.path(), false, &mut |_, _| false).unwrap().is_none());
    assert!(verify(folder.path(), &mut |_, _| false).unwrap().is_none());
    assert_repaired(folder.path(), &[&episodes[0], &episodes[1], &episodes[2], &episodes[0]]);
}

#[test]
fn more_shards_than_files_may_be_open() {
    let schema = schema(4, 5);
    let folder = TempDir::new().unwrap();
    let episodes: Vec<_> = (0..140).map(|seed| episode(&schema, 3, seed, true)).collect();
    for episode in &episodes {
        write(folder.path(), &schema, std::slice::from_ref(episode));
    }
    let store = Store::open(folder.path(), false).unwrap();
    for (at, wanted) in episodes.iter().enumerate() {
        assert_equal(&read(&store, at).unwrap(), wanted);
    }
    #[cfg(target_os = "linux")]
    {
        let links = fs::read_dir("/proc/self/fd").unwrap().filter_map(|link| fs::read_link(link.ok()?.path()).ok());
        let open = links.filter(|file| file.starts_with(folder.path())).count();
        assert_eq!(open, 128);
    }
}

#[test]
fn a_mutated_store_in_memory_is_repaired() {
    let (folder, _, _) = small();
    let read = |path: &Path| fs::read(path).unwrap();
    let (catalogue, index, data) =
        (read(&folder.path().join("catalogue.json")), read(&index(folder.path())), read(&data(folder.path())));
    assert_eq!(super::exercise(&catalogue, &index, &data), 3);
    assert_eq!(super::exercise(&[], &[], &data), 3);
    assert_eq!(super::exercise(&catalogue, &index, &data[..data.len() - 1]), 2);
    assert_eq!(super::exercise(&catalogue, &index, &[]), 0);
    assert_eq!(super::exercise(&[], &index, &data[1..]), 0);
}
