//! Verifying a store byte by byte, and repairing one: what a shard's data file says of itself against what its index says.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

use super::episode::{read_table, Fault, Reading, Scratch};
use super::format::{
    shard_numbers, shard_paths, sync_folder, Catalogue, ReadAt, Record, Schema, DAMAGED, EPISODE_MAGIC, RECORD,
};
use super::lock;
use super::reader::damaged;
use crate::Error;

/// Called with the bytes checked and those there are; false stops the work.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> bool;

/// What [`verify`] found.
#[derive(Debug, Default)]
pub struct Verification {
    /// Episodes that are committed and whole.
    pub episodes: usize,
    /// Their frames.
    pub frames: usize,
    /// Everything that is not as it was committed, in words. Empty for a store in order.
    pub damage: Vec<String>,
    /// What is there besides and does no harm, such as the rest of an append that was killed.
    pub notes: Vec<String>,
}

/// What [`repair`] did, or would do.
#[derive(Debug, Default)]
pub struct Repair {
    /// Episodes in the store afterwards.
    pub episodes: usize,
    /// Their frames.
    pub frames: usize,
    /// Every change, in words. Empty where nothing had to be changed.
    pub changes: Vec<String>,
}

/// Decodes every byte of the store at `folder` and compares it with every checksum. `None` if `progress` stopped it.
///
/// Works beside writers: what they have not committed yet is a note.
///
/// # Errors
/// [`Error::Corrupt`] for a folder that is no store at all; [`Error::Io`].
pub fn verify(folder: &Path, progress: Progress<'_>) -> Result<Option<Verification>, Error> {
    let mut found = Verification::default();
    let Some(surveys) = survey_all(folder, lock::is_shared(folder), progress)? else { return Ok(None) };
    found.damage.extend(surveys.catalogue_damage);
    for (_, survey) in surveys.shards {
        let listed = survey.whole.iter().filter(|episode| episode.listed);
        found.episodes += listed.clone().count();
        found.frames += listed.map(|episode| episode.record.frames).sum::<usize>();
        found.damage.extend(survey.damage);
        found.notes.extend(survey.notes);
    }
    Ok(Some(found))
}

/// Makes the store at `folder` one that [`verify`] finds nothing in: every whole episode stays, also one that only the
/// data file knows of. What is replaced or cannot be read goes to the folder `damaged` in it; nothing is deleted. Killed
/// in the middle, it can be run again. `None` if `progress` stopped it, before anything was changed.
///
/// # Errors
/// [`Error::Argument`] while a writer has the store open; [`Error::Corrupt`] where nothing tells the schema;
/// [`Error::Io`].
pub fn repair(folder: &Path, dry_run: bool, progress: Progress<'_>) -> Result<Option<Repair>, Error> {
    if shard_numbers(folder)?.is_empty() && Catalogue::read(folder).is_ok_and(|catalogue| catalogue.is_none()) {
        return Err(no_store(folder));
    }
    let busy = || Error::Argument(format!("{} has a writer at work: close it first", folder.display()));
    // A dry run changes nothing, not even by making a lock.
    let _lock = match (dry_run, lock::is_shared(folder)) {
        (_, true) => return Err(busy()),
        (true, false) => None,
        (false, false) => Some(lock::alone(folder)?.ok_or_else(busy)?),
    };
    let Some(surveys) = survey_all(folder, false, progress)? else { return Ok(None) };
    let bench = Bench { folder, dry_run };
    let mut done = Repair::default();
    if let Some(why) = surveys.catalogue_damage {
        let path = Catalogue::path(folder);
        bench.keep(&path)?;
        bench.replace(&path, |file| file.write_all(surveys.catalogue.text().as_bytes()))?;
        done.changes.push(format!("{why}: written anew from a shard's head"));
    }
    for (number, survey) in surveys.shards {
        done.episodes += survey.whole.len();
        done.frames += survey.whole.iter().map(|episode| episode.record.frames).sum::<usize>();
        bench.repair_shard(number, &survey, &surveys.catalogue, &mut done.changes)?;
    }
    Ok(Some(done))
}

fn no_store(folder: &Path) -> Error {
    Error::Corrupt(format!("{} is not a .lewm store: it has no catalogue.json and no shards", folder.display()))
}

struct Surveys {
    catalogue: Catalogue,
    catalogue_damage: Option<String>,
    shards: Vec<(u32, Survey)>,
}

/// Surveys every shard. `busy`: somebody may be appending.
fn survey_all(folder: &Path, busy: bool, progress: Progress<'_>) -> Result<Option<Surveys>, Error> {
    let numbers = shard_numbers(folder)?;
    let open = |path: &Path| match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::Io(path.to_owned(), error)),
    };
    let (mut total, mut from_head) = (0, None);
    for &number in &numbers {
        let path = shard_paths(folder, number).0;
        if let Some(data) = open(&path)? {
            let failed = |error| Error::Io(path.clone(), error);
            total += data.size().map_err(failed)?;
            if from_head.is_none() {
                from_head = Catalogue::read_head(&data).map_err(failed)?.map(|(catalogue, _)| catalogue);
            }
        }
    }
    let (catalogue, catalogue_damage) = match (Catalogue::read(folder), from_head) {
        (Ok(Some(catalogue)), _) => (catalogue, None),
        (Ok(None), Some(catalogue)) => (catalogue, Some("catalogue.json is missing".into())),
        // What a later version wrote is not damage, whatever the shards say.
        (Err(Error::Corrupt(why)), Some(catalogue)) if !Catalogue::is_foreign(folder) => (catalogue, Some(why)),
        (Ok(None), None) => return Err(no_store(folder)),
        (Err(error), _) => return Err(error),
    };
    let (mut shards, mut before) = (Vec::new(), 0);
    for number in numbers {
        let (data_path, index_path) = shard_paths(folder, number);
        let index = match fs::read(&index_path) {
            Ok(index) => Some(index),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(Error::Io(index_path, error)),
        };
        let data = open(&data_path)?;
        let failed = |error| Error::Io(data_path.clone(), error);
        let size = data.as_ref().map_or(Ok(0), ReadAt::size).map_err(failed)?;
        let mut step = |at: u64| progress((before + at).min(total), total);
        let paths = (&*data_path, &*index_path);
        let survey = match &data {
            Some(data) => survey(data, index.as_deref(), &catalogue.schema, paths, busy, &mut step),
            None => survey([].as_slice(), index.as_deref(), &catalogue.schema, paths, busy, &mut step),
        };
        let Some(survey) = survey.map_err(failed)? else { return Ok(None) };
        shards.push((number, survey));
        before += size;
    }
    Ok(Some(Surveys { catalogue, catalogue_damage, shards }))
}

/// A whole episode in a data file.
struct Whole {
    record: Record,
    /// The index has the same record.
    listed: bool,
}

/// What a shard holds.
struct Survey {
    whole: Vec<Whole>,
    damage: Vec<String>,
    notes: Vec<String>,
    /// The data file is a head and whole episodes one after the other, up to its `end`.
    compact: bool,
    /// The first byte after the last whole episode.
    end: u64,
    /// Bytes of the data file.
    size: u64,
    /// The index file has the records of the whole episodes, and nothing else.
    indexed: bool,
}

/// Walks through a data file from episode to episode, by their own heads and by the index; `None` if `step` stopped it.
fn survey(
    data: &(impl ReadAt + ?Sized),
    index: Option<&[u8]>,
    schema: &Schema,
    (data_path, index_path): (&Path, &Path),
    busy: bool,
    step: &mut dyn FnMut(u64) -> bool,
) -> io::Result<Option<Survey>> {
    let size = data.size()?;
    let (mut damage, mut notes, mut whole) = (Vec::new(), Vec::new(), Vec::<Whole>::new());
    let (data_name, index_name) = (data_path.display(), index_path.display());
    let mut listed = BTreeMap::new();
    if index.is_none() {
        damage.push(format!("{index_name} is missing"));
    }
    let bytes = index.unwrap_or_default();
    // Zeros at the end are what some file systems leave after a power failure.
    let used = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    for (ordinal, record) in bytes.chunks_exact(RECORD).enumerate().take(used.div_ceil(RECORD)) {
        match Record::decode(record, schema) {
            Ok(record) if listed.contains_key(&record.offset) => {
                damage.push(format!("{index_name}: record {ordinal} is damaged: it repeats another"));
            }
            Ok(record) => drop(listed.insert(record.offset, (ordinal, record))),
            Err(why) => damage.push(format!("{index_name}: record {ordinal} is damaged: {why}")),
        }
    }
    if used > bytes.len() / RECORD * RECORD {
        notes.push(format!("{index_name} ends in the middle of a record"));
    }
    let head = Catalogue::read_head(data)?.filter(|(catalogue, _)| catalogue.schema == *schema).map(|(_, end)| end);
    let mut compact = head.is_some();
    let (mut at, mut end) = (head.unwrap_or(0), head.unwrap_or(0));
    let mut scratch = Scratch::default();
    while at < size {
        if !step(at) {
            return Ok(None);
        }
        let copy = record_at(data, at, size, schema)?;
        let entry = listed.remove(&at);
        let mut why = "its bytes are not an episode".to_owned();
        let mut found = None;
        let known = entry.as_ref().map(|(_, record)| record).filter(|&record| copy.as_ref() != Some(record));
        for record in copy.iter().chain(known) {
            match read_table(data, schema, record)
                .and_then(|table| Reading { data, schema, record, table: &table }.check(&mut scratch))
            {
                Ok(()) => {
                    found = Some(record.clone());
                    break;
                }
                Err(Fault::Damaged(reason)) => why = reason,
                Err(Fault::Io(error)) => return Err(error),
            }
        }
        if let Some(record) = found {
            if at > end {
                damage.push(format!("{data_name}: nothing can be read of bytes {end} to {at}"));
                compact = false;
            }
            let listed = entry.as_ref().is_some_and(|(_, listed)| *listed == record);
            if let (Some((ordinal, _)), false) = (&entry, listed) {
                damage.push(format!("{index_name}: record {ordinal} is not that of the episode"));
            }
            if copy.as_ref() != Some(&record) {
                damage.push(format!("{data_name}: the episode at byte {at} has lost its own record"));
                compact = false;
            }
            (at, end) = (record.end(), record.end());
            whole.push(Whole { record, listed });
        } else {
            if let Some((ordinal, _)) = entry {
                damage.push(damaged(data_path, ordinal, &why));
            }
            let next = listed.range(at + 1..).next().map_or(size, |(&next, _)| next);
            at = find_magic(data, at + 1, next.min(size))?;
        }
    }
    for (ordinal, record) in listed.values() {
        let why = if record.end() > size { "the file is cut off before its end" } else { "it overlaps another" };
        damage.push(damaged(data_path, *ordinal, why));
    }
    let last = whole.iter().rposition(|episode| episode.listed).map_or(0, |last| last + 1);
    for (place, Whole { record, .. }) in whole.iter().enumerate().filter(|(_, episode)| !episode.listed) {
        let text = format!("{data_name}: a whole episode at byte {} is not in the index", record.offset);
        if busy && place >= last { &mut notes } else { &mut damage }.push(text);
    }
    // The first append of a session may have ended before its head did.
    if head.is_none() && !whole.is_empty() {
        damage.push(format!("{data_name}: its head is damaged"));
    }
    if end < size {
        notes.push(format!("{data_name}: the last {} bytes belong to no episode", size - end));
    }
    let records: Vec<u8> = whole.iter().flat_map(|episode| episode.record.encode()).collect();
    let indexed = index.is_some_and(|index| index == records);
    Ok(Some(Survey { whole, damage, notes, compact, end, size, indexed }))
}

/// The record that an episode at `offset` begins with.
fn record_at(data: &(impl ReadAt + ?Sized), offset: u64, size: u64, schema: &Schema) -> io::Result<Option<Record>> {
    let mut bytes = [0; RECORD];
    if offset + RECORD as u64 > size {
        return Ok(None);
    }
    data.read_exact_at(&mut bytes, offset)?;
    Ok(Record::decode(&bytes, schema).ok().filter(|record| record.offset == offset && record.end() <= size))
}

/// Where the next record may begin, from `from` on and before `to`; `to` where none does.
fn find_magic(data: &(impl ReadAt + ?Sized), mut from: u64, to: u64) -> io::Result<u64> {
    let mut bytes = Vec::new();
    // Small steps first: the next episode is often near.
    let mut step = 4096;
    while from < to {
        // As much more as a record that begins at the last byte needs.
        let length = (to - from).min(step) + EPISODE_MAGIC.len() as u64 - 1;
        bytes.resize(length.min(data.size()?.saturating_sub(from)) as usize, 0);
        data.read_exact_at(&mut bytes, from)?;
        if let Some(at) = bytes.windows(EPISODE_MAGIC.len()).position(|bytes| bytes == EPISODE_MAGIC) {
            return Ok(to.min(from + at as u64));
        }
        from += (to - from).min(step);
        step = 1 << 20;
    }
    Ok(to)
}

/// Writes a data file anew: its head, and the whole episodes one after the other. Returns their records.
fn rebuild(
    data: &(impl ReadAt + ?Sized),
    catalogue: &Catalogue,
    whole: &[Whole],
    out: &mut impl Write,
) -> io::Result<Vec<Record>> {
    let head = catalogue.shard_head();
    out.write_all(&head)?;
    let mut end = head.len() as u64;
    let mut records = Vec::with_capacity(whole.len());
    let mut bytes = Vec::new();
    for Whole { record: old, .. } in whole {
        let record = Record { offset: end, ..old.clone() };
        out.write_all(&record.encode())?;
        let mut at = old.offset + RECORD as u64;
        while at < old.end() {
            bytes.resize((old.end() - at).min(1 << 20) as usize, 0);
            data.read_exact_at(&mut bytes, at)?;
            out.write_all(&bytes)?;
            at += bytes.len() as u64;
        }
        end = record.end();
        records.push(record);
    }
    Ok(records)
}

/// Where a repair works; it changes nothing in a dry run.
struct Bench<'a> {
    folder: &'a Path,
    dry_run: bool,
}

impl Bench<'_> {
    fn repair_shard(
        &self,
        number: u32,
        survey: &Survey,
        catalogue: &Catalogue,
        changes: &mut Vec<String>,
    ) -> Result<(), Error> {
        let (data_path, index_path) = shard_paths(self.folder, number);
        // A file of no bytes is a session that was killed before its first append.
        let rewrite = survey.size > 0 && (!survey.compact || survey.end < survey.size);
        if !rewrite && survey.indexed {
            return Ok(());
        }
        let mut records: Vec<Record> = survey.whole.iter().map(|episode| episode.record.clone()).collect();
        // The data first: killed after it, the next repair makes the index from it.
        if rewrite {
            self.keep(&data_path)?;
            self.replace(&data_path, |file| {
                let mut out = io::BufWriter::with_capacity(1 << 20, file);
                records = rebuild(&File::open(&data_path)?, catalogue, &survey.whole, &mut out)?;
                out.flush()
            })?;
        }
        self.keep(&index_path)?;
        self.replace(&index_path, |file| file.write_all(&records.iter().flat_map(Record::encode).collect::<Vec<_>>()))?;
        let what = if rewrite { "written anew" } else { "whole, its index written anew" };
        changes.push(format!("{}: {what}, {} episodes", data_path.display(), records.len()));
        Ok(())
    }

    /// Gives a file a second name in the folder of damaged files, under which it stays when the first is replaced.
    fn keep(&self, path: &Path) -> Result<(), Error> {
        let there = fs::metadata(path).is_ok_and(|metadata| metadata.len() > 0);
        if self.dry_run || !there {
            return Ok(());
        }
        let folder = self.folder.join(DAMAGED);
        fs::create_dir_all(&folder).map_err(|error| Error::Io(folder.clone(), error))?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        for number in 0_u64.. {
            let kept = folder.join(format!("{name}.{number}"));
            match fs::hard_link(path, &kept) {
                Ok(()) => break,
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                // No links here. A copy that was cut short by a kill is only one more file.
                Err(_) if !kept.exists() => {
                    fs::copy(path, &kept).map_err(|error| Error::Io(kept, error))?;
                    break;
                }
                Err(_) => {}
            }
        }
        sync_folder(&folder)
    }

    /// Puts a file with new content in the place of another, whole or not at all.
    fn replace(&self, path: &Path, write: impl FnOnce(&mut File) -> io::Result<()>) -> Result<(), Error> {
        if self.dry_run {
            return Ok(());
        }
        let temporary = PathBuf::from(format!("{}.repair", path.display()));
        let failed = |error| Error::Io(temporary.clone(), error);
        let mut file = File::create(&temporary).map_err(failed)?;
        write(&mut file).and_then(|()| file.sync_all()).and_then(|()| fs::rename(&temporary, path)).map_err(failed)?;
        sync_folder(self.folder)
    }
}

/// Puts a catalogue, an index and a data file in memory through everything that reads one, for a fuzzer: a reader that
/// decodes every frame, and a repair, whose result must be without fault and lose nothing. Returns the episodes repaired.
///
/// # Panics
/// Where the code has a fault.
#[doc(hidden)]
#[must_use]
pub fn exercise(catalogue: &[u8], index: &[u8], data: &[u8]) -> usize {
    let head = Catalogue::read_head(data).expect("memory").map(|(catalogue, _)| catalogue);
    let Some(catalogue) = Catalogue::parse(catalogue).ok().or(head) else { return 0 };
    let schema = &catalogue.schema;
    let mut scratch = Scratch::default();
    let mut frame = vec![0; schema.frame_bytes()];
    let mut bytes = Vec::new();
    for (index, record) in index.chunks_exact(RECORD).enumerate() {
        let Ok(record) = Record::decode(record, schema) else { continue };
        let Ok(table) = read_table(data, schema, &record) else { continue };
        let reading = Reading { data, schema, record: &record, table: &table };
        for at in 0..record.frames {
            let _ = reading.frame(index, at, &mut scratch, &mut frame);
        }
        for place in 0..=schema.columns.len() {
            let _ = reading.array(place, &mut bytes);
        }
    }
    let paths = (Path::new("data"), Path::new("index"));
    let look = |data: &[u8], index: &[u8]| {
        survey(data, Some(index), schema, paths, false, &mut |_| true).expect("memory").expect("not stopped")
    };
    let found = look(data, index);
    let mut repaired = Vec::new();
    let records = rebuild(data, &catalogue, &found.whole, &mut repaired).expect("memory");
    let index: Vec<u8> = records.iter().flat_map(Record::encode).collect();
    let again = look(&repaired, &index);
    assert!(again.damage.is_empty() && again.notes.is_empty() && again.compact && again.indexed, "{:?}", again.damage);
    assert_eq!(again.whole.len(), found.whole.len());
    found.whole.len()
}
