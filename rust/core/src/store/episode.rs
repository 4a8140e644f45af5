//! Reading one episode out of bytes that nobody vouches for: every length is checked before it is used.

use std::io::{self, ErrorKind};

use super::codec;
use super::format::{u32_at, Digest, ReadAt, Record, Schema, ENTRY, RECORD};

/// One part of an episode: a picture, the actions, a column.
#[derive(Clone, Copy, Debug)]
pub(super) struct Blob {
    offset: u64,
    length: u32,
    crc: u32,
}

/// Why a read failed. Whoever knows the file and the episode makes an error of it.
#[derive(Debug)]
pub(super) enum Fault {
    Damaged(String),
    Io(io::Error),
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            ErrorKind::UnexpectedEof => Self::Damaged("the file was cut short since it was opened".into()),
            _ => Self::Io(error),
        }
    }
}

fn damaged<T>(why: &str) -> Result<T, Fault> {
    Err(Fault::Damaged(why.into()))
}

/// Buffers of one decoding thread, and the key frame they hold.
#[derive(Default)]
pub(super) struct Scratch {
    work: Work,
    key: Vec<u8>,
    key_of: Option<(usize, usize)>,
}

#[derive(Default)]
struct Work {
    blob: Vec<u8>,
    stream: Vec<u8>,
}

/// Reads the table of an episode, and checks it. What it allocates, `data` has room for.
pub(super) fn read_table(data: &(impl ReadAt + ?Sized), schema: &Schema, record: &Record) -> Result<Vec<Blob>, Fault> {
    if record.end() > data.size()? {
        return damaged("the file was cut short since it was opened");
    }
    let mut bytes = vec![0; record.blobs(schema) * ENTRY];
    data.read_exact_at(&mut bytes, record.offset + RECORD as u64)?;
    if crc32fast::hash(&bytes) != record.table {
        return damaged("the checksum of its table does not fit");
    }
    let mut at = record.offset + record.blobs_at(schema);
    let mut table = Vec::with_capacity(bytes.len() / ENTRY);
    for entry in bytes.chunks_exact(ENTRY) {
        let blob = Blob { offset: at, length: u32_at(entry, 0), crc: u32_at(entry, 4) };
        at += u64::from(blob.length);
        table.push(blob);
    }
    let (pictures, arrays) = table.split_at(record.chunks() + record.frames);
    let rows = |rows: usize, bytes: usize| rows as u64 * bytes as u64;
    let wanted = std::iter::once(rows(record.frames - 1, schema.action_dim * 4))
        .chain(schema.columns.values().map(|width| rows(record.frames, width * 8)));
    let fit = arrays.iter().zip(wanted).all(|(blob, wanted)| u64::from(blob.length) == wanted)
        && pictures.iter().all(|blob| (1..=schema.frame_bytes()).contains(&(blob.length as usize)));
    if !fit || at != record.end() {
        return damaged("the numbers of its table contradict each other");
    }
    Ok(table)
}

/// An episode and where it is.
pub(super) struct Reading<'a, R: ?Sized> {
    pub data: &'a R,
    pub schema: &'a Schema,
    pub record: &'a Record,
    pub table: &'a [Blob],
}

impl<R: ReadAt + ?Sized> Reading<'_, R> {
    /// Reads the actions (0) or a column (from 1 on).
    pub fn array(&self, place: usize, bytes: &mut Vec<u8>) -> Result<(), Fault> {
        let at = self.record.chunks() + self.record.frames + place;
        bytes.resize(self.table[at].length as usize, 0);
        self.read(at, bytes)
    }

    /// Decodes one frame. `index` tells episodes apart whose key frame `scratch` may hold.
    pub fn frame(&self, index: usize, frame: usize, scratch: &mut Scratch, out: &mut [u8]) -> Result<(), Fault> {
        let chunk = frame / self.record.chunk;
        let at = self.record.blob_of(frame);
        if self.table[at].length as usize == out.len() {
            return self.read(at, out);
        }
        let Scratch { work, key, key_of } = scratch;
        if *key_of != Some((index, chunk)) {
            *key_of = None;
            key.resize(out.len(), 0);
            self.picture(self.record.blob_of(chunk * self.record.chunk) - 1, None, key, work)?;
            *key_of = Some((index, chunk));
        }
        self.picture(at, Some(key), out, work)
    }

    /// Reads all of the episode and compares it with the digest it was committed with.
    pub fn check(&self, scratch: &mut Scratch) -> Result<(), Fault> {
        scratch.key_of = None;
        let mut frame = vec![0; self.schema.frame_bytes()];
        let mut digest = Digest::new();
        digest.update(self.record.frames as u64);
        for at in 0..self.record.frames {
            if at % self.record.chunk == 0 {
                // Also where no frame of the chunk needs it.
                self.picture(self.record.blob_of(at) - 1, None, &mut frame, &mut scratch.work)?;
            }
            self.frame(0, at, scratch, &mut frame)?;
            digest.blob(&frame);
        }
        for place in 0..=self.schema.columns.len() {
            self.array(place, &mut scratch.work.blob)?;
            digest.blob(&scratch.work.blob);
        }
        scratch.key_of = None;
        if digest.finish() != self.record.digest {
            return damaged("its content is not what was committed");
        }
        Ok(())
    }

    /// Decodes the picture in a blob.
    fn picture(&self, at: usize, key: Option<&[u8]>, out: &mut [u8], work: &mut Work) -> Result<(), Fault> {
        let length = self.table[at].length as usize;
        if length == out.len() {
            return self.read(at, out);
        }
        work.blob.resize(length, 0);
        self.read(at, &mut work.blob)?;
        codec::decode(&work.blob, key, self.schema.row_bytes(), out, &mut work.stream)
            .ok_or_else(|| Fault::Damaged("a picture does not decode to its size".into()))
    }

    /// Reads a blob, checked. `bytes` has its length.
    fn read(&self, at: usize, bytes: &mut [u8]) -> Result<(), Fault> {
        let blob = self.table[at];
        self.data.read_exact_at(bytes, blob.offset)?;
        if crc32fast::hash(bytes) != blob.crc {
            return Err(Fault::Damaged(format!("the checksum of part {at} does not fit")));
        }
        Ok(())
    }
}
