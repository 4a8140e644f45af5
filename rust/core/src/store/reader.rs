//! Reading: positional, checked, and with no state that a fork or another thread could catch half made.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;

use super::format::{shard_numbers, shard_paths, u32_at, xor, Catalogue, Digest, Record, Schema, ENTRY, RECORD};
use crate::Error;

/// Decoded bytes that are worth a thread of their own: below this, starting it takes longer than it saves.
const BYTES_PER_THREAD: usize = 256 << 10;

/// The committed episodes of a store. Cheap to clone; a clone shares open files and tables.
#[derive(Clone, Debug)]
pub struct Store {
    folder: PathBuf,
    catalogue: Catalogue,
    episodes: Vec<Arc<Episode>>,
    shards: Shards,
    skip_damaged: bool,
    skipped: Vec<String>,
    threads: usize,
}

/// The shards by number, each with the number of its index records already read.
type Shards = BTreeMap<u32, (Arc<Shard>, usize)>;

#[derive(Debug)]
struct Shard {
    number: u32,
    path: PathBuf,
    // Filled by whole values only: the lock is never held while a file is opened or read.
    file: OnceLock<File>,
}

#[derive(Debug)]
struct Episode {
    shard: Arc<Shard>,
    ordinal: usize,
    record: Record,
    table: OnceLock<Vec<Blob>>,
}

#[derive(Clone, Copy, Debug)]
struct Blob {
    offset: u64,
    length: u32,
    crc: u32,
}

/// What a look at the index files found.
struct Found {
    shards: Shards,
    episodes: Vec<Arc<Episode>>,
    damage: Vec<String>,
}

/// Buffers of one decoding thread, and the key frame they hold.
#[derive(Default)]
struct Scratch {
    blob: Vec<u8>,
    key: Vec<u8>,
    key_of: Option<(usize, usize)>,
}

impl Store {
    /// Opens the store at `folder`.
    ///
    /// Damage that the index shows is an error here, other damage is one when it is read. With `skip_damaged` every
    /// byte is checked now, and the damaged episodes are left out and listed in [`Store::skipped`].
    ///
    /// # Errors
    /// [`Error::Corrupt`] for a folder that is no store or a damaged one; [`Error::Io`]; [`Error::Argument`] for a
    /// `LEWM_NUM_THREADS` that is no number.
    pub fn open(folder: &Path, skip_damaged: bool) -> Result<Self, Error> {
        let mut store = Self::empty(folder, skip_damaged)?;
        store.refresh()?;
        Ok(store)
    }

    /// Every episode that is committed and there in full length, for a writer to count: damage is no reason not to append.
    pub(super) fn scan(folder: &Path) -> Result<Self, Error> {
        let mut store = Self::empty(folder, true)?;
        Found { shards: store.shards, episodes: store.episodes, damage: store.skipped } = store.find_new()?;
        Ok(store)
    }

    fn empty(folder: &Path, skip_damaged: bool) -> Result<Self, Error> {
        let failed = |error| Error::Io(folder.to_owned(), error);
        fs::metadata(folder).map_err(failed)?;
        let catalogue = Catalogue::read(folder)?.ok_or_else(|| {
            Error::Corrupt(format!("{} is not a .lewm store: it has no catalogue.json", folder.display()))
        })?;
        Ok(Self {
            // The process may change its folder before a shard is opened.
            folder: std::path::absolute(folder).map_err(failed)?,
            catalogue,
            episodes: Vec::new(),
            shards: BTreeMap::new(),
            skip_damaged,
            skipped: Vec::new(),
            threads: threads()?,
        })
    }

    /// Looks for episodes committed since, and returns how many it found. Those already known keep their indices: new
    /// ones are added at the end, by shard and age (a store opened afresh has all of them in that order).
    ///
    /// # Errors
    /// As [`Store::open`]; the store is then as it was.
    pub fn refresh(&mut self) -> Result<usize, Error> {
        let Found { shards, mut episodes, mut damage } = self.find_new()?;
        if self.skip_damaged {
            episodes.retain(|episode| match self.check_episode(episode) {
                Ok(()) => true,
                Err(error) => {
                    damage.push(error.to_string());
                    false
                }
            });
        } else if let Some(first) = damage.first() {
            return Err(Error::Corrupt(format!("{first}; open with skip_damaged=True to read the intact episodes")));
        }
        let count = episodes.len();
        self.shards = shards;
        damage.retain(|text| !self.skipped.contains(text));
        self.episodes.append(&mut episodes);
        self.skipped.append(&mut damage);
        Ok(count)
    }

    /// Reads the index records not yet seen: the episodes they commit, and what is wrong with the others.
    fn find_new(&self) -> Result<Found, Error> {
        let mut shards = self.shards.clone();
        let mut episodes = Vec::new();
        let mut damage = Vec::new();
        for number in shard_numbers(&self.folder)? {
            let (data_path, index_path) = shard_paths(&self.folder, number);
            let new = || Arc::new(Shard { number, path: data_path.clone(), file: OnceLock::new() });
            let (shard, seen) = shards.entry(number).or_insert_with(|| (new(), 0));
            let bytes = match read_from(&index_path, (*seen * RECORD) as u64) {
                Ok(bytes) => bytes,
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    damage.push(format!("{} is missing", index_path.display()));
                    continue;
                }
                Err(error) => return Err(Error::Io(index_path, error)),
            };
            // A record not all there is an episode not committed. So are zeros at the end: after a power failure some
            // file systems have the new length of a file but not its bytes.
            let used = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
            let records = (bytes.len() / RECORD).min(used.div_ceil(RECORD));
            // Taken after the index was read: a writer at work has put the data there before the record.
            let present = match fs::metadata(&data_path) {
                Ok(metadata) => metadata.len(),
                Err(error) if error.kind() == ErrorKind::NotFound => 0,
                Err(error) => return Err(Error::Io(data_path, error)),
            };
            // A copy that is kept up to date may have another file there by now, and the open one lacks the new episodes.
            let replaced = |open: &File| open.metadata().map_or(true, |open| open.len() < present);
            if shard.file.get().is_some_and(replaced) {
                *shard = new();
            }
            let (mut end, mut cut) = (0, 0);
            for (place, bytes) in bytes.chunks_exact(RECORD).take(records).enumerate() {
                let ordinal = *seen + place;
                let record = match Record::decode(bytes, &self.catalogue.schema) {
                    Ok(record) if record.offset < end => Err("it overlaps the one before"),
                    other => other,
                };
                match record {
                    Ok(record) => {
                        end = record.end();
                        if end > present {
                            cut += 1;
                        } else {
                            let shard = Arc::clone(shard);
                            episodes.push(Arc::new(Episode { shard, ordinal, record, table: OnceLock::new() }));
                        }
                    }
                    Err(why) => damage.push(format!("{}: record {ordinal} is damaged: {why}", index_path.display())),
                }
            }
            *seen += records;
            if cut > 0 {
                damage.push(format!(
                    "{} has {present} bytes and needs {end}: {cut} of the {} episodes that its index commits are cut off",
                    shard.path.display(),
                    *seen
                ));
            }
        }
        Ok(Found { shards, episodes, damage })
    }

    /// What every episode has in common.
    #[must_use]
    pub fn schema(&self) -> &Schema {
        &self.catalogue.schema
    }

    /// The JSON object given by whoever created the store.
    #[must_use]
    pub fn metadata(&self) -> &str {
        self.catalogue.metadata.get()
    }

    /// What was left out as damaged, in words.
    #[must_use]
    pub fn skipped(&self) -> &[String] {
        &self.skipped
    }

    /// Number of episodes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.episodes.len()
    }

    /// Whether no episode is committed yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.episodes.is_empty()
    }

    /// Frames of each episode.
    #[must_use]
    pub fn lengths(&self) -> impl ExactSizeIterator<Item = usize> + '_ {
        self.episodes.iter().map(|episode| episode.record.frames)
    }

    /// A number, in hex, that stands for schema and content of all episodes in their order: equal for equal data,
    /// whatever the codec, and for a store refreshed or opened afresh.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        let mut order: Vec<_> = self.episodes.iter().collect();
        order.sort_by_key(|episode| (episode.shard.number, episode.ordinal));
        let mut digest = Digest::new();
        digest.update(u64::from(self.schema().crc()));
        for episode in order {
            digest.update(episode.record.digest);
        }
        format!("{:016x}", digest.finish())
    }

    /// The (episode, frame) pairs of windows: `length` frames each, `stride` apart, from `starts` on.
    ///
    /// # Errors
    /// [`Error::Index`] for a window that is not all within its episode; [`Error::Argument`].
    pub fn windows(
        &self,
        episodes: &[i64],
        starts: &[i64],
        length: usize,
        stride: usize,
    ) -> Result<Vec<(usize, usize)>, Error> {
        if episodes.len() != starts.len() {
            let (episodes, starts) = (episodes.len(), starts.len());
            return Err(Error::Argument(format!("episodes has {episodes} entries and starts {starts}; wants as many")));
        }
        if length == 0 || stride == 0 {
            return Err(Error::Argument(format!("length is {length} and stride {stride}; wants at least 1")));
        }
        let span = (length - 1).checked_mul(stride);
        let mut items = Vec::new();
        for (&episode, &start) in episodes.iter().zip(starts) {
            let index = self.index(episode)?;
            let frames = self.episodes[index].record.frames;
            let first = usize::try_from(start).ok();
            let last = first.and_then(|first| first.checked_add(span?)).filter(|&last| last < frames);
            let (Some(first), Some(last)) = (first, last) else {
                return Err(Error::Index(format!(
                    "episode {episode} has {frames} frames: no window of {length} at stride {stride} starts at {start}"
                )));
            };
            items.extend((first..=last).step_by(stride).map(|frame| (index, frame)));
        }
        Ok(items)
    }

    /// Checks an episode's index.
    ///
    /// # Errors
    /// [`Error::Index`] unless it is from 0 to the number of episodes.
    pub fn index(&self, episode: i64) -> Result<usize, Error> {
        usize::try_from(episode)
            .ok()
            .filter(|&index| index < self.len())
            .ok_or_else(|| Error::Index(format!("episode {episode} is not in a store of {} episodes", self.len())))
    }

    /// Decodes the frames `items`, pairs (episode, frame), into `out`, one after the other.
    ///
    /// # Errors
    /// [`Error::Index`]; [`Error::Argument`] for an `out` of another size; [`Error::Corrupt`]; [`Error::Io`].
    pub fn gather(&self, items: &[(usize, usize)], out: &mut [u8]) -> Result<(), Error> {
        self.gather_on(self.threads, items, out)
    }

    /// [`Store::gather`] on at most so many threads.
    ///
    /// # Errors
    /// As [`Store::gather`].
    pub fn gather_on(&self, threads: usize, items: &[(usize, usize)], out: &mut [u8]) -> Result<(), Error> {
        let size = self.schema().frame_bytes();
        if items.len().checked_mul(size) != Some(out.len()) {
            return Err(Error::Argument(format!(
                "out has {} bytes; {} frames want {size} each",
                out.len(),
                items.len()
            )));
        }
        let decode = |items: &[(usize, usize)], out: &mut [u8]| {
            let mut scratch = Scratch::default();
            items.iter().zip(out.chunks_exact_mut(size)).try_for_each(|(&(episode, frame), out)| {
                let found = self.episodes.get(episode);
                let found = found.ok_or_else(|| Error::Index(format!("episode {episode} is not in the store")))?;
                self.frame(found, episode, frame, &mut scratch, out)
            })
        };
        let threads = threads.min(out.len() / BYTES_PER_THREAD).max(1);
        if threads == 1 {
            return decode(items, out);
        }
        // Threads of this call, not of a pool: nothing is left that a fork would find dead.
        let share = items.len().div_ceil(threads);
        let parts = Mutex::new(items.chunks(share).zip(out.chunks_mut(share * size)));
        let next = || parts.lock().unwrap_or_else(PoisonError::into_inner).next();
        let work = || std::iter::from_fn(next).try_for_each(|(items, out)| decode(items, out));
        thread::scope(|scope| {
            // Where the system gives no more threads, fewer do the work.
            let others: Vec<_> =
                (1..threads).map_while(|_| thread::Builder::new().spawn_scoped(scope, work).ok()).collect();
            let own = work();
            others
                .into_iter()
                .map(|other| other.join().unwrap_or_else(|panic| resume_unwind(panic)))
                .fold(own, Result::and)
        })
    }

    /// The actions of an episode, (N-1, `action_dim`).
    ///
    /// # Errors
    /// As [`Store::gather`].
    pub fn actions(&self, episode: i64) -> Result<Vec<f32>, Error> {
        let episode = &self.episodes[self.index(episode)?];
        let mut bytes = Vec::new();
        self.blob(episode, episode.record.frames, &mut bytes)?;
        Ok(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
    }

    /// A column of an episode, (N, its width).
    ///
    /// # Errors
    /// [`Error::Argument`] for a name that the store has not; as [`Store::gather`].
    pub fn column(&self, name: &str, episode: i64) -> Result<Vec<f64>, Error> {
        let columns = &self.schema().columns;
        let Some(place) = columns.keys().position(|key| key == name) else {
            let known: Vec<_> = columns.keys().collect();
            return Err(Error::Argument(format!("name is {name:?}; this store has {known:?}")));
        };
        let episode = &self.episodes[self.index(episode)?];
        let mut bytes = Vec::new();
        self.blob(episode, episode.record.frames + 1 + place, &mut bytes)?;
        let number = |b: &[u8]| f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]);
        Ok(bytes.chunks_exact(8).map(number).collect())
    }

    /// Reads all of an episode and compares it with the digest it was committed with.
    fn check_episode(&self, episode: &Episode) -> Result<(), Error> {
        let mut scratch = Scratch::default();
        let mut frame = vec![0; self.schema().frame_bytes()];
        let mut digest = Digest::new();
        digest.update(episode.record.frames as u64);
        for at in 0..episode.record.frames {
            self.frame(episode, 0, at, &mut scratch, &mut frame)?;
            digest.blob(&frame);
        }
        for blob in episode.record.frames..self.schema().blobs(episode.record.frames) {
            self.blob(episode, blob, &mut scratch.blob)?;
            digest.blob(&scratch.blob);
        }
        if digest.finish() != episode.record.digest {
            return Err(episode.damaged("its content is not what was committed"));
        }
        Ok(())
    }

    /// Decodes one frame. `index` tells episodes apart whose key frame `scratch` may hold.
    fn frame(
        &self,
        episode: &Episode,
        index: usize,
        frame: usize,
        scratch: &mut Scratch,
        out: &mut [u8],
    ) -> Result<(), Error> {
        let Record { frames, chunk, .. } = episode.record;
        if frame >= frames {
            return Err(Error::Index(format!("frame {frame} is not in an episode of {frames} frames")));
        }
        let key = frame - frame % chunk;
        if scratch.key_of != Some((index, key)) {
            scratch.key_of = None;
            scratch.key.resize(out.len(), 0);
            self.blob(episode, key, &mut scratch.blob)?;
            unpack(episode, &scratch.blob, &mut scratch.key)?;
            scratch.key_of = Some((index, key));
        }
        if frame == key {
            out.copy_from_slice(&scratch.key);
            return Ok(());
        }
        self.blob(episode, frame, &mut scratch.blob)?;
        unpack(episode, &scratch.blob, out)?;
        xor(out, &scratch.key);
        Ok(())
    }

    /// Reads one blob of an episode, checked.
    fn blob(&self, episode: &Episode, at: usize, bytes: &mut Vec<u8>) -> Result<(), Error> {
        let blob = self.table(episode)?[at];
        bytes.resize(blob.length as usize, 0);
        episode.read(blob.offset, bytes)?;
        if crc32fast::hash(bytes) != blob.crc {
            return Err(episode.damaged(&format!("the checksum of part {at} does not fit")));
        }
        Ok(())
    }

    /// The table of an episode, read once.
    fn table<'a>(&self, episode: &'a Episode) -> Result<&'a [Blob], Error> {
        if let Some(table) = episode.table.get() {
            return Ok(table);
        }
        let Record { frames, offset, length, .. } = episode.record;
        // No more than the episode's length, which is within the file: `Record::decode` and `find_new` saw to that.
        let mut bytes = vec![0; self.schema().blobs(frames) * ENTRY];
        episode.read(offset, &mut bytes)?;
        if crc32fast::hash(&bytes) != episode.record.table {
            return Err(episode.damaged("the checksum of its table does not fit"));
        }
        let mut at = offset + bytes.len() as u64;
        let mut table = Vec::with_capacity(bytes.len() / ENTRY);
        for entry in bytes.chunks_exact(ENTRY) {
            let blob = Blob { offset: at, length: u32_at(entry, 0), crc: u32_at(entry, 4) };
            at += u64::from(blob.length);
            table.push(blob);
        }
        let widths = self.schema().columns.values().map(|&width| (frames, width * 8));
        let arrays = std::iter::once((frames - 1, self.schema().action_dim * 4)).chain(widths);
        let fits =
            |(blob, (rows, bytes)): (&Blob, (usize, usize))| u64::from(blob.length) == rows as u64 * bytes as u64;
        let plain = table[frames..].iter().zip(arrays).all(fits);
        // LZ4 makes at most 255 bytes of one, so a file cannot claim frames that it has no room for, nor more than they need.
        let size = self.schema().frame_bytes();
        let packed = size.div_ceil(255)..=lz4_flex::block::get_maximum_output_size(size);
        if !plain
            || !table[..frames].iter().all(|blob| packed.contains(&(blob.length as usize)))
            || at != offset + length
        {
            return Err(episode.damaged("the numbers of its table contradict each other"));
        }
        Ok(episode.table.get_or_init(|| table))
    }
}

impl Episode {
    fn damaged(&self, why: &str) -> Error {
        Error::Corrupt(format!("{}: episode {} is damaged: {why}", self.shard.path.display(), self.ordinal))
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), Error> {
        let failed = |error: std::io::Error| match error.kind() {
            ErrorKind::UnexpectedEof => self.damaged("the file was cut short since it was opened"),
            _ => Error::Io(self.shard.path.clone(), error),
        };
        let file = if let Some(file) = self.shard.file.get() {
            file
        } else {
            let file = File::open(&self.shard.path).map_err(failed)?;
            self.shard.file.get_or_init(|| file)
        };
        read_exact_at(file, bytes, offset).map_err(failed)
    }
}

fn unpack(episode: &Episode, blob: &[u8], out: &mut [u8]) -> Result<(), Error> {
    match lz4_flex::block::decompress_into(blob, out) {
        Ok(length) if length == out.len() => Ok(()),
        _ => Err(episode.damaged("a frame does not decode to its size")),
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, bytes: &mut [u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut bytes: &mut [u8], mut offset: u64) -> std::io::Result<()> {
    while !bytes.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, bytes, offset) {
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

fn read_from(path: &Path, offset: u64) -> std::io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(offset))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Threads to decode with: `LEWM_NUM_THREADS`, else as many as this process may use (cgroup limits included).
pub(crate) fn threads() -> Result<usize, Error> {
    match std::env::var("LEWM_NUM_THREADS") {
        Err(_) => Ok(std::thread::available_parallelism().map_or(1, usize::from)),
        Ok(text) => text.parse().ok().filter(|&threads| threads > 0).ok_or_else(|| {
            Error::Argument(format!("LEWM_NUM_THREADS is {text:?}; wants a whole number of at least 1"))
        }),
    }
}
