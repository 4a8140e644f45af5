//! What a crash leaves: a writer killed at any moment, a file cut at any byte. No committed episode may be lost, none may
//! be half there, and a repair ends in a clean store. `LEWM_LONG_TESTS=1` kills 300 writers and cuts 2,000 times.

#![allow(clippy::cast_possible_wrap, clippy::cast_sign_loss, clippy::float_cmp)]

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use lewm_core::store::{repair, verify, Schema, Store, Writer};
use tempfile::TempDir;

const SIDE: usize = 6;
const STORE: &str = "LEWM_CRASH_STORE";
const FIRST: &str = "LEWM_CRASH_FIRST";

fn long(short: usize, long: usize) -> usize {
    if std::env::var_os("LEWM_LONG_TESTS").is_some() {
        long
    } else {
        short
    }
}

fn schema() -> Schema {
    Schema { height: SIDE, width: SIDE, action_dim: 2, columns: BTreeMap::from([("number".into(), 1)]) }
}

/// The frames of an episode, which follow from its number.
fn frames(number: usize) -> Vec<u8> {
    let size = SIDE * SIDE * 3;
    let count = 2 + number % 40;
    (0..count * size).map(|at| if at % 31 == number % 31 { (at + number) as u8 } else { 200 }).collect()
}

fn append(writer: &mut Writer, number: usize) {
    let frames = frames(number);
    let count = frames.len() / (SIDE * SIDE * 3);
    let column = vec![number as f64; count];
    writer.append(&frames, &vec![0.5; (count - 1) * 2], &[("number", &column)]).expect("a sound episode");
}

/// Numbers of the episodes of a store, each compared with what was written.
fn numbers(folder: &Path) -> Vec<usize> {
    let store = Store::open(folder, false).expect("a sound store");
    (0..store.len())
        .map(|at| {
            let column = store.column("number", at as i64).expect("a sound column");
            let number = column[0] as usize;
            let wanted = frames(number);
            let items: Vec<_> = (0..column.len()).map(|frame| (at, frame)).collect();
            let mut got = vec![0; items.len() * SIDE * SIDE * 3];
            store.gather(&items, &mut got).expect("sound frames");
            assert!(got == wanted && column.iter().all(|&value| value == number as f64), "episode {number} differs");
            assert_eq!(store.actions(at as i64).expect("sound actions").len(), (column.len() - 1) * 2);
            number
        })
        .collect()
}

fn repaired(folder: &Path) {
    repair(folder, false, &mut |_, _| true).expect("a repair").expect("not stopped");
    let found = verify(folder, &mut |_, _| true).expect("a store").expect("not stopped");
    assert!(found.damage.is_empty() && found.notes.is_empty(), "{:?} {:?}", found.damage, found.notes);
}

fn random(word: &mut u64) -> usize {
    *word ^= *word << 13;
    *word ^= *word >> 7;
    *word ^= *word << 17;
    (*word >> 16) as usize
}

/// Not a test by itself: what the killed process runs.
#[test]
fn writer_to_be_killed() {
    let (Some(folder), Ok(first)) = (std::env::var_os(STORE), std::env::var(FIRST)) else { return };
    let first: usize = first.parse().expect("a number");
    let mut writer = Writer::open(folder.as_ref(), schema(), "{}").expect("a store");
    for number in first.. {
        append(&mut writer, number);
        // Straight to the pipe: a report that waits in a buffer is one that nobody got.
        writeln!(std::io::stderr(), "committed {number}").expect("a pipe");
    }
}

#[test]
fn writers_killed_at_any_moment_lose_nothing() {
    let mut folder = TempDir::new().expect("a folder");
    let mut word = 0x5eed_u64;
    let (mut committed, mut in_store, mut kills) = (Vec::new(), Vec::new(), 0);
    for kill in 0..long(30, 300) {
        if kill % 25 == 0 {
            folder = TempDir::new().expect("a folder");
            committed.clear();
            kills = 0;
        }
        let path = folder.path().join("s.lewm");
        let mut child = Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "writer_to_be_killed", "--nocapture", "--test-threads=1"])
            .env(STORE, &path)
            .env(FIRST, (kill * 10_000).to_string())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("a writer");
        // From before the catalogue is there to some tens of episodes. Windows takes its time to start a process.
        let latest = if cfg!(windows) { 800_000 } else { 40_000 };
        sleep(Duration::from_micros((random(&mut word) % latest) as u64));
        child.kill().expect("a kill");
        let output = BufReader::new(child.stderr.take().expect("a pipe"));
        let lines = output.lines().map(|line| line.expect("text"));
        // The last line may be cut: then its episode was committed, but not yet reported.
        committed.extend(lines.filter_map(|line| line.strip_prefix("committed ")?.parse::<usize>().ok()));
        child.wait().expect("an end");
        kills += 1;
        if !path.join("catalogue.json").exists() {
            assert!(committed.is_empty());
            continue;
        }
        in_store = numbers(&path);
        for number in &committed {
            assert!(in_store.contains(number), "kill {kill}: episode {number} is lost");
        }
        assert!(in_store.len() <= committed.len() + kills, "kill {kill}: more than one episode without a report");
        if kill % 3 == 2 {
            repaired(&path);
            let after = numbers(&path);
            assert!(in_store.iter().all(|number| after.contains(number)), "kill {kill}: a repair lost an episode");
            committed = after;
            kills = 0;
        }
    }
    assert!(!in_store.is_empty() && !committed.is_empty(), "no writer came to its first episode");
}

#[test]
fn files_cut_at_any_byte_lose_what_was_cut_off_only() {
    let base = TempDir::new().expect("a folder");
    // Two shards, and where each episode of the first ends.
    let mut ends = Vec::new();
    let data = |folder: &Path| folder.join("shard-000000.data");
    let mut writer = Writer::open(base.path(), schema(), "{\"a\": 1}").expect("a store");
    for number in 0..6 {
        append(&mut writer, number * 7);
        ends.push(fs::metadata(data(base.path())).expect("the shard").len());
    }
    drop(writer);
    let mut writer = Writer::open(base.path(), schema(), "{}").expect("a store");
    (100..103).for_each(|number| append(&mut writer, number));
    drop(writer);
    let all = numbers(base.path());
    let mut word = 0xc07_u64;
    for cut in 0..long(150, 2000) {
        let folder = TempDir::new().expect("a folder");
        for entry in fs::read_dir(base.path()).expect("the store") {
            let entry = entry.expect("a file");
            fs::copy(entry.path(), folder.path().join(entry.file_name())).expect("a copy");
        }
        let name = ["shard-000000.data", "shard-000000.index", "catalogue.json"][[0, 0, 1, 2][cut % 4]];
        let path = folder.path().join(name);
        let size = fs::metadata(&path).expect("a file").len();
        let length = random(&mut word) as u64 % size;
        fs::OpenOptions::new().write(true).open(&path).and_then(|file| file.set_len(length)).expect("a cut");
        // What the data still has in full is there afterwards; a cut index or catalogue costs nothing.
        let first = if name.ends_with("data") { ends.iter().filter(|&&end| end <= length).count() } else { 6 };
        let wanted = [&all[..first], &all[6..]].concat();
        let found = verify(folder.path(), &mut |_, _| true).expect("a store").expect("not stopped");
        assert!(!found.damage.is_empty(), "{name} cut at {length} of {size} is not noticed");
        if let Ok(store) = Store::open(folder.path(), false) {
            // An index cut at a record hides episodes until the repair; none is half visible.
            assert!(store.len() <= wanted.len());
            numbers(folder.path());
        }
        repaired(folder.path());
        assert_eq!(numbers(folder.path()), wanted, "{name} cut at {length} of {size}");
    }
}
