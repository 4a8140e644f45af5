//! What the bytes mean: schema and catalogue, index records, frame coding. No file is opened here but the catalogue.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::Error;

/// Most pixels on a side of a frame.
pub const MAX_SIDE: usize = 4096;
/// Most numbers per step in the actions or in a column, and most columns.
pub const MAX_WIDTH: usize = 4096;
/// Most frames in one episode.
pub const MAX_FRAMES: usize = 1 << 24;
/// Frames that share a key frame. A window of 4 at stride 5 spans 16 frames, so it meets at most two. Bytes a frame at 16,
/// 32 and 64: `TwoRoom` at 64 px 500, 520, 531; a PushT-like scene at 224 px 1541, 1662, 1981. Fewer keys decode faster.
pub(super) const CHUNK: usize = 32;
/// Bytes of an index record, and of its copy before the episode.
pub(super) const RECORD: usize = 64;
/// Bytes of a table entry.
pub(super) const ENTRY: usize = 8;

/// The file that writers share a lock on, and a repair has for itself.
pub(super) const LOCK: &str = "lock";
/// The folder that a repair moves to what it cannot read.
pub(super) const DAMAGED: &str = "damaged";

const CATALOGUE: &str = "catalogue.json";
const FORMAT: &str = "lewm-store";
const VERSION: u32 = 1;
/// What every record begins with.
pub(super) const EPISODE_MAGIC: [u8; 8] = *b"LEWM-EP1";
const SHARD_MAGIC: [u8; 8] = *b"LEWM-SH1";
const CODEC_RUNS_LZ4: u16 = 1;
const MAX_METADATA: usize = 1 << 20;
/// Most bytes of a catalogue.
const MAX_CATALOGUE: usize = 8 << 20;

/// What every episode of a store has in common.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Schema {
    /// Pixels from top to bottom.
    pub height: usize,
    /// Pixels from left to right.
    pub width: usize,
    /// Numbers per raw action.
    pub action_dim: usize,
    /// Numbers per step of each extra column.
    pub columns: BTreeMap<String, usize>,
}

impl Schema {
    /// Bytes of one decoded frame, `height * width * 3`.
    #[must_use]
    pub fn frame_bytes(&self) -> usize {
        self.height * self.width * 3
    }

    /// Checks every number against its limit.
    ///
    /// # Errors
    /// [`Error::Argument`] naming the field.
    pub fn check(&self) -> Result<(), Error> {
        let within = |name: &str, value: usize, most: usize| {
            if (1..=most).contains(&value) {
                return Ok(());
            }
            Err(Error::Argument(format!("{name} is {value}; wants 1 to {most}")))
        };
        within("height", self.height, MAX_SIDE)?;
        within("width", self.width, MAX_SIDE)?;
        within("action_dim", self.action_dim, MAX_WIDTH)?;
        if self.columns.len() > MAX_WIDTH {
            return Err(Error::Argument(format!(
                "columns has {} entries; wants at most {MAX_WIDTH}",
                self.columns.len()
            )));
        }
        for (name, &width) in &self.columns {
            if name.is_empty() || name.len() > 255 {
                return Err(Error::Argument(format!("columns: the name {name:?} wants 1 to 255 bytes")));
            }
            within(&format!("columns[{name:?}]"), width, MAX_WIDTH)?;
        }
        Ok(())
    }

    /// Checks that `self`, wanted by a writer, is what the store at `folder` has.
    pub(super) fn same_as(&self, stored: &Self, folder: &Path) -> Result<(), Error> {
        let numbers = [
            ("height", self.height, stored.height),
            ("width", self.width, stored.width),
            ("action_dim", self.action_dim, stored.action_dim),
        ];
        for (name, wanted, has) in numbers {
            if wanted != has {
                return Err(Error::Argument(format!("{name} is {wanted}, but {} has {has}", folder.display())));
            }
        }
        if self.columns != stored.columns {
            return Err(Error::Argument(format!(
                "columns is {:?}, but {} has {:?}",
                self.columns,
                folder.display(),
                stored.columns
            )));
        }
        Ok(())
    }

    /// Numbers an index record by the schema that it was written under.
    pub(super) fn crc(&self) -> u32 {
        let mut crc = crc32fast::Hasher::new();
        for number in [self.height, self.width, self.action_dim] {
            crc.update(&(number as u64).to_le_bytes());
        }
        for (name, &width) in &self.columns {
            crc.update(&(name.len() as u64).to_le_bytes());
            crc.update(name.as_bytes());
            crc.update(&(width as u64).to_le_bytes());
        }
        crc.finalize()
    }

    /// Bytes of one row of a frame.
    pub(super) fn row_bytes(&self) -> usize {
        self.width * 3
    }
}

/// Schema and metadata of a store.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Catalogue {
    format: String,
    version: u32,
    crc32: u32,
    pub schema: Schema,
    pub metadata: Box<RawValue>,
}

/// The version is read by itself first: a later one may have other fields.
#[derive(Deserialize)]
struct Head {
    format: String,
    version: u32,
}

impl Catalogue {
    pub fn new(schema: Schema, metadata: &str) -> Result<Self, Error> {
        schema.check()?;
        let metadata = RawValue::from_string(metadata.to_owned())
            .map_err(|error| Error::Argument(format!("metadata is not JSON: {error}")))?;
        if !metadata.get().starts_with('{') || metadata.get().len() > MAX_METADATA {
            return Err(Error::Argument(format!("metadata wants a JSON object of at most {MAX_METADATA} bytes")));
        }
        let mut catalogue = Self { format: FORMAT.into(), version: VERSION, crc32: 0, schema, metadata };
        catalogue.crc32 = catalogue.crc();
        Ok(catalogue)
    }

    fn crc(&self) -> u32 {
        let mut crc = crc32fast::Hasher::new_with_initial(self.schema.crc());
        crc.update(self.metadata.get().as_bytes());
        crc.finalize()
    }

    /// Reads a folder's catalogue; `None` where there is none.
    pub fn read(folder: &Path) -> Result<Option<Self>, Error> {
        let path = Self::path(folder);
        let mut bytes = Vec::new();
        match fs::File::open(&path).and_then(|file| file.take(MAX_CATALOGUE as u64 + 1).read_to_end(&mut bytes)) {
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(None),
            Err(error) => return Err(Error::Io(path, error)),
        }
        Self::parse(&bytes).map(Some).map_err(|why| Error::Corrupt(format!("{}: {why}", path.display())))
    }

    /// Reads a catalogue, or says what is wrong with it.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let damaged = |error: &dyn std::fmt::Display| format!("damaged catalogue: {error}");
        if bytes.len() > MAX_CATALOGUE {
            return Err(damaged(&format!("it has more than {MAX_CATALOGUE} bytes")));
        }
        let head: Head = serde_json::from_slice(bytes).map_err(|error| damaged(&error))?;
        if head.format != FORMAT || head.version != VERSION {
            let (format, version) = (head.format, head.version);
            return Err(format!("format {format:?} version {version}; this reads {FORMAT:?} version {VERSION}"));
        }
        let catalogue: Self = serde_json::from_slice(bytes).map_err(|error| damaged(&error))?;
        catalogue.schema.check().map_err(|error| damaged(&error))?;
        if catalogue.crc() != catalogue.crc32 {
            return Err(damaged(&"its checksum does not fit"));
        }
        Ok(catalogue)
    }

    /// Whether the catalogue of a folder is whole as far as it can be told, but of a version that this code does not know.
    pub fn is_foreign(folder: &Path) -> bool {
        let head = fs::read(Self::path(folder)).ok().and_then(|bytes| serde_json::from_slice::<Head>(&bytes).ok());
        head.is_some_and(|head| head.format != FORMAT || head.version != VERSION)
    }

    /// The text of `catalogue.json`.
    pub fn text(&self) -> String {
        serde_json::to_string_pretty(self).expect("names and numbers are JSON")
    }

    /// What a data file begins with: the catalogue once more, so that a shard alone can be read.
    pub fn shard_head(&self) -> Vec<u8> {
        let text = self.text();
        let mut bytes = SHARD_MAGIC.to_vec();
        bytes.extend((text.len() as u32).to_le_bytes());
        bytes.extend(crc32fast::hash(text.as_bytes()).to_le_bytes());
        bytes.extend(text.as_bytes());
        bytes
    }

    /// Reads the head of a data file: the catalogue and the bytes that it takes. `None` where it is damaged.
    pub fn read_head(data: &(impl ReadAt + ?Sized)) -> io::Result<Option<(Self, u64)>> {
        let mut fixed = [0; 16];
        if data.size()? < 16 {
            return Ok(None);
        }
        data.read_exact_at(&mut fixed, 0)?;
        let length = u64::from(u32_at(&fixed, 8));
        if fixed[..8] != SHARD_MAGIC || length > MAX_CATALOGUE as u64 || 16 + length > data.size()? {
            return Ok(None);
        }
        let mut text = vec![0; length as usize];
        data.read_exact_at(&mut text, 16)?;
        if crc32fast::hash(&text) != u32_at(&fixed, 12) {
            return Ok(None);
        }
        Ok(Self::parse(&text).ok().map(|catalogue| (catalogue, 16 + length)))
    }

    pub fn path(folder: &Path) -> PathBuf {
        folder.join(CATALOGUE)
    }

    /// Writes the catalogue unless there is one, whole or not at all. The caller reads back which one it is.
    pub fn create(&self, folder: &Path) -> Result<(), Error> {
        let path = Self::path(folder);
        // A name that nobody has: other writers may be at it, on other machines too.
        let mut number = 0_u64;
        let (temporary, mut file) = loop {
            let temporary = folder.join(format!("{CATALOGUE}.{number}"));
            match fs::File::create_new(&temporary) {
                Ok(file) => break (temporary, file),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => number += 1,
                Err(error) => return Err(Error::Io(temporary, error)),
            }
        };
        let failed = |error| Error::Io(temporary.clone(), error);
        file.write_all(self.text().as_bytes()).and_then(|()| file.sync_all()).map_err(failed)?;
        // A link, unlike a rename, fails where another writer was first. Some file systems have no links.
        match fs::hard_link(&temporary, &path) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => fs::rename(&temporary, &path),
            _ => fs::remove_file(&temporary),
        }
        .map_err(failed)?;
        sync_folder(folder)?;
        // The folder itself may be new, and those above it. Not all may be opened, and the store is whole without.
        for parent in folder.ancestors().skip(1) {
            let _ = sync_folder(parent);
        }
        Ok(())
    }

    /// Whether a file of this name is a catalogue, one that a writer was making, or what a repair left.
    pub fn owns(name: &str) -> bool {
        name.starts_with(CATALOGUE) || name == LOCK || name == DAMAGED
    }
}

/// Makes new file names in `folder` last.
pub(super) fn sync_folder(folder: &Path) -> Result<(), Error> {
    if cfg!(unix) {
        fs::File::open(folder).and_then(|file| file.sync_all()).map_err(|error| Error::Io(folder.to_owned(), error))?;
    }
    Ok(())
}

/// The two files of shard `number`: data and index.
pub(super) fn shard_paths(folder: &Path, number: u32) -> (PathBuf, PathBuf) {
    (folder.join(format!("shard-{number:06}.data")), folder.join(format!("shard-{number:06}.index")))
}

/// The numbers of all shards in `folder`, ascending. One that has only one of its files counts too.
pub(super) fn shard_numbers(folder: &Path) -> Result<Vec<u32>, Error> {
    let failed = |error| Error::Io(folder.to_owned(), error);
    let mut numbers = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let stem = name.to_str().and_then(|name| name.strip_suffix(".data").or_else(|| name.strip_suffix(".index")));
        let digits = stem.and_then(|stem| stem.strip_prefix("shard-"));
        // Only the spelling that `shard_paths` makes: "shard-1.data" would be looked for under another name.
        numbers.extend(digits.and_then(|d| d.parse().ok().filter(|number: &u32| format!("{number:06}") == d)));
    }
    numbers.sort_unstable();
    numbers.dedup();
    Ok(numbers)
}

/// The commit of one episode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub schema: u32,
    pub frames: usize,
    pub offset: u64,
    pub length: u64,
    pub digest: u64,
    pub table: u32,
    pub chunk: usize,
}

impl Record {
    pub fn encode(&self) -> [u8; RECORD] {
        let mut bytes = [0; RECORD];
        bytes[..8].copy_from_slice(&EPISODE_MAGIC);
        bytes[8..12].copy_from_slice(&self.schema.to_le_bytes());
        bytes[12..16].copy_from_slice(&(self.frames as u32).to_le_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.length.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.digest.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.table.to_le_bytes());
        bytes[44..46].copy_from_slice(&CODEC_RUNS_LZ4.to_le_bytes());
        bytes[46..48].copy_from_slice(&(self.chunk as u16).to_le_bytes());
        let crc = crc32fast::hash(&bytes[..60]);
        bytes[60..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Decodes a record, or says what is wrong with it.
    pub fn decode(bytes: &[u8], schema: &Schema) -> Result<Self, &'static str> {
        if bytes.len() != RECORD || u32_at(bytes, 60) != crc32fast::hash(&bytes[..60]) {
            return Err("its checksum does not fit");
        }
        if bytes[..8] != EPISODE_MAGIC || bytes[44..46] != CODEC_RUNS_LZ4.to_le_bytes() {
            return Err("another version wrote it");
        }
        let record = Self {
            schema: u32_at(bytes, 8),
            frames: u32_at(bytes, 12) as usize,
            offset: u64_at(bytes, 16),
            length: u64_at(bytes, 24),
            digest: u64_at(bytes, 32),
            table: u32_at(bytes, 40),
            chunk: usize::from(u16::from_le_bytes([bytes[46], bytes[47]])),
        };
        if record.schema != schema.crc() {
            return Err("it belongs to a store with another schema");
        }
        let sound = (2..=MAX_FRAMES).contains(&record.frames) && record.chunk > 0;
        if !sound || record.length < record.blobs_at(schema) || record.offset.checked_add(record.length).is_none() {
            return Err("its numbers contradict each other");
        }
        Ok(record)
    }

    /// Chunks of the episode, each with a key frame.
    pub fn chunks(&self) -> usize {
        self.frames.div_ceil(self.chunk)
    }

    /// Blobs of the episode: key frames and frames, actions, columns.
    pub fn blobs(&self, schema: &Schema) -> usize {
        self.chunks() + self.frames + 1 + schema.columns.len()
    }

    /// Where in the table a frame is. The key frame of its chunk is before the chunk's first.
    pub fn blob_of(&self, frame: usize) -> usize {
        frame + frame / self.chunk + 1
    }

    /// Bytes of the episode before its first blob: the copy of the record and the table.
    pub fn blobs_at(&self, schema: &Schema) -> u64 {
        (RECORD + self.blobs(schema) * ENTRY) as u64
    }

    /// The first byte after the episode.
    pub fn end(&self) -> u64 {
        self.offset + self.length
    }
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

/// Bytes that can be read from anywhere: a file, or memory.
pub(super) trait ReadAt {
    /// Fills `bytes` from `offset` on.
    fn read_exact_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()>;
    /// How many there are.
    fn size(&self) -> io::Result<u64>;
}

impl ReadAt for [u8] {
    fn read_exact_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let part = usize::try_from(offset).ok().and_then(|from| self.get(from..from.checked_add(bytes.len())?));
        bytes.copy_from_slice(part.ok_or(ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }
}

impl ReadAt for fs::File {
    #[cfg(unix)]
    fn read_exact_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(self, bytes, offset)
    }

    #[cfg(windows)]
    fn read_exact_at(&self, mut bytes: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !bytes.is_empty() {
            match std::os::windows::fs::FileExt::seek_read(self, bytes, offset) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => {
                    bytes = &mut bytes[count..];
                    offset += count as u64;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        self.metadata().map(|metadata| metadata.len())
    }
}

/// Digest of an episode's content from the CRC-32 of each of its decoded blobs (FNV-1a, 64 bits), so that it outlives
/// a change of codec or chunk length.
pub(super) struct Digest(u64);

impl Digest {
    pub fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    pub fn update(&mut self, number: u64) {
        for byte in number.to_le_bytes() {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    pub fn blob(&mut self, bytes: &[u8]) {
        self.update(u64::from(crc32fast::hash(bytes)));
    }

    pub fn finish(&self) -> u64 {
        self.0
    }
}
