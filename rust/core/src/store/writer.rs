//! Appending whole episodes.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::codec::{self, Buffers};
use super::format::{
    shard_numbers, shard_paths, sync_folder, Catalogue, Digest, Record, Schema, CHUNK, ENTRY, MAX_FRAMES,
};
use super::lock::{self, Lock};
use super::reader::Store;
use crate::Error;

/// One writing session on a store. Several may run at once, each in shard files of its own.
#[derive(Debug)]
pub struct Writer {
    folder: PathBuf,
    catalogue: Catalogue,
    shard: Option<Shard>,
    episodes: usize,
    process: u32,
    _lock: Option<Lock>,
}

#[derive(Debug)]
struct Shard {
    data_path: PathBuf,
    index_path: PathBuf,
    data: File,
    index: File,
    end: u64,
}

impl Writer {
    /// Creates the store at `folder`, or opens it to append. Metadata is that of the session which created the store.
    ///
    /// # Errors
    /// [`Error::Argument`] for a schema out of its limits or other than the store's, for metadata that is not a JSON
    /// object, and for a folder that holds something else; [`Error::Corrupt`] for a damaged catalogue; [`Error::Io`].
    pub fn open(folder: &Path, schema: Schema, metadata: &str) -> Result<Self, Error> {
        let catalogue = Catalogue::new(schema, metadata)?;
        // The process may change its folder before the next file is made.
        let folder = &std::path::absolute(folder).map_err(|error| Error::Io(folder.to_owned(), error))?;
        fs::create_dir_all(folder).map_err(|error| Error::Io(folder.to_owned(), error))?;
        if Catalogue::read(folder)?.is_none() {
            let foreign = refuse_foreign(folder);
            // Unless another writer has made it a store in the meantime.
            if Catalogue::read(folder)?.is_none() {
                foreign?;
                catalogue.create(folder)?;
            }
        }
        // Held before the episodes are counted, so that no repair changes their number in between.
        let lock = lock::share(folder)?;
        let stored = Store::scan(folder)?;
        catalogue.schema.same_as(stored.schema(), folder)?;
        Ok(Self {
            folder: folder.to_owned(),
            episodes: stored.len(),
            catalogue: stored.into_catalogue(),
            shard: None,
            process: std::process::id(),
            _lock: lock,
        })
    }

    /// What an episode must look like.
    #[must_use]
    pub fn schema(&self) -> &Schema {
        &self.catalogue.schema
    }

    /// Appends an episode of N frames; it is committed, and on the disk, when this returns its index, which does not count
    /// what other sessions append meanwhile.
    ///
    /// `frames` is (N, height, width, 3), `actions` (N-1, `action_dim`), and each column (N, its width), all row-major.
    ///
    /// # Errors
    /// [`Error::Argument`] naming the array, and nothing is written; [`Error::Io`], and the next append starts new shard
    /// files, so that whatever was left of this one cannot harm it.
    pub fn append(&mut self, frames: &[u8], actions: &[f32], columns: &[(&str, &[f64])]) -> Result<usize, Error> {
        if std::process::id() != self.process {
            return Err(Error::Argument("this writer was opened in another process: open one after the fork".into()));
        }
        let columns = self.check(frames, actions, columns)?;
        let mut shard = match self.shard.take() {
            Some(shard) => shard,
            None => Shard::create(&self.folder)?,
        };
        let head = if shard.end == 0 { self.catalogue.shard_head() } else { Vec::new() };
        let (bytes, record) = encode(self.schema(), frames, actions, &columns, head, shard.end);
        shard.commit(&bytes, &record)?;
        self.shard = Some(shard);
        self.episodes += 1;
        Ok(self.episodes - 1)
    }

    /// Checks an episode, and returns its columns in the order of the schema.
    fn check<'a>(
        &self,
        frames: &[u8],
        actions: &[f32],
        columns: &[(&str, &'a [f64])],
    ) -> Result<Vec<&'a [f64]>, Error> {
        let schema = self.schema();
        let count = frames.len() / schema.frame_bytes();
        if !frames.len().is_multiple_of(schema.frame_bytes()) {
            return Err(Error::Argument(format!(
                "frames has {} bytes; wants a multiple of {}",
                frames.len(),
                schema.frame_bytes()
            )));
        }
        if count < 2 {
            return Err(Error::Argument(format!("frames: an episode needs at least 2 frames, got {count}")));
        }
        if count > MAX_FRAMES {
            return Err(Error::Argument(format!("frames: an episode has at most {MAX_FRAMES} frames, got {count}")));
        }
        if actions.len() != (count - 1) * schema.action_dim {
            return Err(Error::Argument(format!(
                "actions has {} numbers; {count} frames want {} rows of {}",
                actions.len(),
                count - 1,
                schema.action_dim
            )));
        }
        fits("actions", size_of_val(actions))?;
        if let Some(at) = actions.iter().position(|value| !value.is_finite()) {
            let (row, column, value) = (at / schema.action_dim, at % schema.action_dim, actions[at]);
            return Err(Error::Argument(format!("actions[{row}, {column}] is {value}; wants finite numbers")));
        }
        if let Some((name, _)) = columns.iter().find(|(name, _)| !schema.columns.contains_key(*name)) {
            let known: Vec<_> = schema.columns.keys().collect();
            return Err(Error::Argument(format!("columns has {name:?}; this store has {known:?}")));
        }
        let mut ordered = Vec::with_capacity(schema.columns.len());
        for (name, &width) in &schema.columns {
            let Some(&(_, values)) = columns.iter().find(|(given, _)| given == name) else {
                return Err(Error::Argument(format!("columns lacks {name:?}")));
            };
            if values.len() != count * width {
                return Err(Error::Argument(format!(
                    "columns[{name:?}] has {} numbers; {count} frames want {count} rows of {width}",
                    values.len()
                )));
            }
            fits(name, size_of_val(values))?;
            if let Some(at) = values.iter().position(|value| !value.is_finite()) {
                let (row, column, value) = (at / width, at % width, values[at]);
                return Err(Error::Argument(format!(
                    "columns[{name:?}][{row}, {column}] is {value}; wants finite numbers"
                )));
            }
            ordered.push(values);
        }
        Ok(ordered)
    }
}

/// Checks that a table entry can hold the length of an array.
fn fits(name: &str, bytes: usize) -> Result<(), Error> {
    if u32::try_from(bytes).is_ok() {
        return Ok(());
    }
    Err(Error::Argument(format!("{name} has {bytes} bytes in one episode; wants at most {}", u32::MAX)))
}

/// Refuses to make a store among files that are not a store's.
fn refuse_foreign(folder: &Path) -> Result<(), Error> {
    if !shard_numbers(folder)?.is_empty() {
        return Err(Error::Corrupt(format!(
            "{} has shards but no catalogue.json; `lewm data repair` makes it again",
            folder.display()
        )));
    }
    let failed = |error| Error::Io(folder.to_owned(), error);
    for entry in fs::read_dir(folder).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        // Another writer may have got here first: its catalogue, finished or not, is no stranger.
        if !Catalogue::owns(&name.to_string_lossy()) {
            return Err(Error::Argument(format!(
                "{} is not a .lewm store and not empty: it has {}",
                folder.display(),
                name.to_string_lossy()
            )));
        }
    }
    Ok(())
}

/// The bytes to append to a data file of `end` bytes, `head` first, and the record of the episode in them.
fn encode(
    schema: &Schema,
    frames: &[u8],
    actions: &[f32],
    columns: &[&[f64]],
    head: Vec<u8>,
    end: u64,
) -> (Vec<u8>, Record) {
    let size = schema.frame_bytes();
    let mut record = Record {
        schema: schema.crc(),
        frames: frames.len() / size,
        offset: end + head.len() as u64,
        length: 0,
        digest: 0,
        table: 0,
        chunk: CHUNK,
    };
    let before = head.len();
    let mut bytes = head;
    let blobs_at = before + record.blobs_at(schema) as usize;
    bytes.resize(blobs_at, 0);
    let mut table = Vec::with_capacity(record.blobs(schema) * ENTRY);
    let mut push = |blob: &[u8]| {
        table.extend((blob.len() as u32).to_le_bytes());
        table.extend(crc32fast::hash(blob).to_le_bytes());
        bytes.extend_from_slice(blob);
    };
    let mut digest = Digest::new();
    digest.update(record.frames as u64);
    let mut buffers = Buffers::default();
    for chunk in frames.chunks(size * CHUNK) {
        let mut key = codec::key(chunk, size);
        let mut coded = Vec::new();
        for frame in chunk.chunks_exact(size) {
            digest.blob(frame);
            coded.push(codec::encode(frame, Some(&key), schema.row_bytes(), &mut buffers).to_vec());
        }
        if coded.iter().all(|frame| frame.len() == size) {
            key.fill(0); // Nobody needs it: black is the shortest.
        }
        push(codec::encode(&key, None, schema.row_bytes(), &mut buffers));
        for frame in &coded {
            push(frame);
        }
    }
    let arrays = std::iter::once(actions.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>())
        .chain(columns.iter().map(|values| values.iter().flat_map(|value| value.to_le_bytes()).collect()));
    for array in arrays {
        digest.blob(&array);
        push(&array);
    }
    record.length = (bytes.len() - before) as u64;
    record.digest = digest.finish();
    record.table = crc32fast::hash(&table);
    let copy = record.encode();
    bytes[before..blobs_at].copy_from_slice(&[&copy[..], &table].concat());
    (bytes, record)
}

impl Shard {
    fn create(folder: &Path) -> Result<Self, Error> {
        let after = |number: u32| number.checked_add(1).ok_or(Error::Argument("no shard number is left".into()));
        let mut number = shard_numbers(folder)?.last().map_or(Ok(0), |&last| after(last))?;
        let new = |path: &Path| OpenOptions::new().write(true).create_new(true).open(path);
        loop {
            let (data_path, index_path) = shard_paths(folder, number);
            // The index is first, so that data without an index is damage and never a writer about to make it.
            let index = match new(&index_path) {
                Ok(index) => index,
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                    number = after(number)?;
                    continue;
                }
                Err(error) => return Err(Error::Io(index_path, error)),
            };
            let data = new(&data_path).map_err(|error| Error::Io(data_path.clone(), error))?;
            sync_folder(folder)?;
            return Ok(Self { data_path, index_path, data, index, end: 0 });
        }
    }

    /// Writes an episode, then the record that commits it, each on the disk before the next step.
    fn commit(&mut self, bytes: &[u8], record: &Record) -> Result<(), Error> {
        self.data
            .seek(SeekFrom::Start(self.end))
            .and_then(|_| self.data.write_all(bytes))
            .and_then(|()| self.data.sync_data())
            .map_err(|error| Error::Io(self.data_path.clone(), error))?;
        self.index
            .write_all(&record.encode())
            .and_then(|()| self.index.sync_data())
            .map_err(|error| Error::Io(self.index_path.clone(), error))?;
        self.end = record.end();
        Ok(())
    }
}
