//! Reading: positional, checked, and with no state that a fork or another thread could catch half made.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;

use super::episode::{read_table, Blob, Fault, Reading, Scratch};
use super::format::{shard_numbers, shard_paths, Catalogue, Digest, Record, Schema, RECORD};
use crate::Error;

/// Decoded bytes that are worth a thread of their own: below this, starting it takes longer than it saves.
const BYTES_PER_THREAD: usize = 256 << 10;
/// Shards whose files stay open, the first ones. A file of another is opened for one run of frames out of it.
const KEPT_OPEN: usize = 128;

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
    keep: bool,
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

/// What a look at the index files found.
struct Found {
    shards: Shards,
    episodes: Vec<Arc<Episode>>,
    damage: Vec<String>,
}

/// What one decoding thread uses again.
#[derive(Default)]
struct Worker {
    scratch: Scratch,
    file: Option<(u32, File)>,
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
    #[allow(clippy::redundant_closure_for_method_calls)] // the method itself has not the lifetimes for it
    pub fn refresh(&mut self) -> Result<usize, Error> {
        let Found { shards, mut episodes, mut damage } = self.find_new()?;
        if self.skip_damaged {
            let mut worker = Worker::default();
            episodes.retain(|episode| {
                match self.read(episode, &mut worker, |reading, scratch| reading.check(scratch)) {
                    Ok(()) => true,
                    Err(error) => {
                        damage.push(error.to_string());
                        false
                    }
                }
            });
        } else if let Some(first) = damage.first() {
            return Err(Error::Corrupt(format!(
                "{first}; `lewm data repair` sets it right, skip_damaged=True reads the intact episodes"
            )));
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
            let keep = shards.len() < KEPT_OPEN;
            let new = |keep| Arc::new(Shard { number, path: data_path.clone(), keep, file: OnceLock::new() });
            let (shard, seen) = shards.entry(number).or_insert_with(|| (new(keep), 0));
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
                *shard = new(true);
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

    pub(super) fn into_catalogue(self) -> Catalogue {
        self.catalogue
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
            let mut worker = Worker::default();
            items.iter().zip(out.chunks_exact_mut(size)).try_for_each(|(&(index, frame), out)| {
                let episode = self.episodes.get(index);
                let episode = episode.ok_or_else(|| Error::Index(format!("episode {index} is not in the store")))?;
                let frames = episode.record.frames;
                if frame >= frames {
                    return Err(Error::Index(format!("frame {frame} is not in an episode of {frames} frames")));
                }
                self.read(episode, &mut worker, |reading, scratch| reading.frame(index, frame, scratch, out))
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
        let bytes = self.array(episode, 0)?;
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
        let bytes = self.array(episode, 1 + place)?;
        let number = |b: &[u8]| f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]);
        Ok(bytes.chunks_exact(8).map(number).collect())
    }

    /// The bytes of the actions (0) or a column (from 1 on) of an episode.
    fn array(&self, episode: &Episode, place: usize) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::new();
        self.read(episode, &mut Worker::default(), |reading, _| reading.array(place, &mut bytes))?;
        Ok(bytes)
    }

    /// Reads something of an episode, its file opened and its table read first where that has to be.
    fn read(
        &self,
        episode: &Episode,
        worker: &mut Worker,
        what: impl FnOnce(&Reading<'_, File>, &mut Scratch) -> Result<(), Fault>,
    ) -> Result<(), Error> {
        let Worker { scratch, file } = worker;
        let shard = &episode.shard;
        let read = || {
            let data = if let Some(data) = shard.file.get() {
                data
            } else if shard.keep {
                let data = File::open(&shard.path)?;
                shard.file.get_or_init(|| data)
            } else {
                if file.as_ref().is_none_or(|(number, _)| *number != shard.number) {
                    *file = Some((shard.number, File::open(&shard.path)?));
                }
                &file.as_ref().expect("just opened").1
            };
            let (schema, record) = (self.schema(), &episode.record);
            let table = if let Some(table) = episode.table.get() {
                table
            } else {
                let table = read_table(data, schema, record)?;
                episode.table.get_or_init(|| table)
            };
            what(&Reading { data, schema, record, table }, scratch)
        };
        read().map_err(|fault| match fault {
            Fault::Damaged(why) => Error::Corrupt(damaged(&shard.path, episode.ordinal, &why)),
            Fault::Io(error) => Error::Io(shard.path.clone(), error),
        })
    }
}

/// Says which episode of which file is damaged.
pub(super) fn damaged(path: &Path, ordinal: usize, why: &str) -> String {
    format!("{}: episode {ordinal} is damaged: {why}", path.display())
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
