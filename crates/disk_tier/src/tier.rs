//! The tier: blocks are stored, looked up and loaded.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use block_pool::{PrefixKey, TierWatcher};

use crate::buffer::ALIGNMENT;
use crate::file_header::{self, FileHeader, Found};
use crate::index::{Index, Taken};
use crate::io::{open_direct, read_at, read_pages_at, write_at};
use crate::keys::{Bits, Keys};
use crate::slot::{Address, HEADER, Said};
use crate::{Buffer, Geometry, Namespace, OpenError, Options, Place, Prefix, StoreError};

/// A tier in a file. When it is dropped, the file can be opened again.
pub struct DiskTier {
    path: PathBuf,
    file: File,
    /// For reading blocks past the system's cache.
    direct: Option<File>,
    header: FileHeader,
    namespace: Namespace,
    keys: Keys,
    geometry: Geometry,
    max_age: Option<Duration>,
    is_writer: bool,
    state: Mutex<State>,
    watcher: OnceLock<TierWatcher>,
}

/// What changes.
#[derive(Debug, Default)]
struct State {
    index: Index,
    /// How many slots the file may have: less than the limit if the disk is full.
    most: u64,
    stats: Stats,
}

/// What a tier has and has done since it was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Blocks that are in the file, of all namespaces.
    pub blocks: u64,
    /// The size of the file in bytes.
    pub bytes: u64,
    /// Blocks that were stored.
    pub stored: u64,
    /// Blocks that left because the limit was reached.
    pub evicted: u64,
    /// Blocks that were loaded.
    pub loaded: u64,
    /// Blocks that were looked for and are not in the file, or are too old.
    pub misses: u64,
    /// Blocks that are in the file but were not what they should be: damaged, torn, exchanged, or written over by
    /// another process.
    pub damaged: u64,
    /// Blocks that could not be written.
    pub failed: u64,
}

/// What became of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// It was written.
    New,
    /// It is in the file already.
    Already,
}

impl DiskTier {
    /// Opens a file for reading and writing, and creates it if there is none. The file of another version, byte order or
    /// size of blocks, or one whose header is damaged, is emptied. Files of several namespaces with blocks of one size
    /// can be one: each finds its own.
    ///
    /// Reads the header of each slot.
    ///
    /// # Errors
    ///
    /// [`OpenError::HasWriter`] if the file is open for writing elsewhere, [`OpenError::NotATier`] if it is something
    /// else, and others if it cannot be read or the sizes make no sense.
    pub fn open(
        path: impl AsRef<Path>,
        namespace: &Namespace,
        geometry: &Geometry,
        options: &Options,
    ) -> Result<Self, OpenError> {
        let path = path.as_ref();
        let largest = geometry.check()?;
        options.check()?;
        let io = |error| OpenError::Io { path: path.to_owned(), error };
        let mut open = OpenOptions::new();
        open.read(true).write(true).create(true).truncate(false);
        // What is under no salt is not encrypted.
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut open, 0o600);
        let file = open.open(path).map_err(io)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(OpenError::HasWriter(path.to_owned())),
            Err(TryLockError::Error(error)) => return Err(io(error)),
        }
        let mut store: Bits = [0; 32];
        getrandom::fill(&mut store).map_err(OpenError::Random)?;
        let new = FileHeader::new(geometry, largest, store);
        let needed = file_header::BYTES as u64 + new.slot_bytes;
        if options.max_bytes < needed {
            return Err(OpenError::LimitTooSmall { limit: options.max_bytes, needed });
        }
        let header = match read_header(&file).map_err(io)? {
            Found::Foreign => return Err(OpenError::NotATier(path.to_owned())),
            Found::Header(header) if header.has_sizes_of(&new) => header,
            found => {
                if found != Found::Empty {
                    tracing::warn!(path = %path.display(), "the file of another version or model, or damaged: it is emptied");
                }
                // Blocks may be lost with the power, but not what the file is.
                let write = || write_at(&file, &new.encode(), 0).and_then(|()| file.sync_data());
                file.set_len(0).and_then(|()| write()).map_err(io)?;
                new
            }
        };
        let most = (options.max_bytes - file_header::BYTES as u64) / header.slot_bytes;
        let len = file.metadata().map_err(io)?.len();
        if len > file_header::BYTES as u64 + most * header.slot_bytes {
            file.set_len(file_header::BYTES as u64 + most * header.slot_bytes).map_err(io)?;
        }
        Self::with((path, file), header, namespace, geometry, options, most, true)
    }

    /// Opens a file for reading: another process may write to it. A file that [`open`](Self::open) would empty has no
    /// blocks. What is stored later is found after a [`refresh`](Self::refresh).
    ///
    /// # Errors
    ///
    /// [`OpenError::NotATier`] if the file is something else, and others if it cannot be read or the sizes make no sense.
    pub fn open_read_only(
        path: impl AsRef<Path>,
        namespace: &Namespace,
        geometry: &Geometry,
        options: &Options,
    ) -> Result<Self, OpenError> {
        let path = path.as_ref();
        let largest = geometry.check()?;
        options.check()?;
        let io = |error| OpenError::Io { path: path.to_owned(), error };
        let file = File::open(path).map_err(io)?;
        let expected = FileHeader::new(geometry, largest, [0; 32]);
        let header = match read_header(&file).map_err(io)? {
            Found::Foreign => return Err(OpenError::NotATier(path.to_owned())),
            Found::Header(header) if header.has_sizes_of(&expected) => header,
            _ => {
                tracing::warn!(path = %path.display(), "the file of another version or model, or damaged: nothing is found");
                return Self::with((path, file), expected, namespace, geometry, options, 0, false);
            }
        };
        let most = options.max_bytes.saturating_sub(file_header::BYTES as u64) / header.slot_bytes;
        Self::with((path, file), header, namespace, geometry, options, most, false)
    }

    fn with(
        (path, file): (&Path, File),
        header: FileHeader,
        namespace: &Namespace,
        geometry: &Geometry,
        options: &Options,
        most: u64,
        is_writer: bool,
    ) -> Result<Self, OpenError> {
        let keys = Keys::new(options.secret.as_deref(), &header.store, &namespace.0);
        let tier = Self {
            path: path.to_owned(),
            file,
            direct: options.direct_reads.then(|| open_direct(path)).flatten(),
            header,
            namespace: *namespace,
            keys,
            geometry: geometry.clone(),
            max_age: options.max_age,
            is_writer,
            state: Mutex::new(State { most, ..State::default() }),
            watcher: OnceLock::new(),
        };
        tier.read_index().map_err(|error| OpenError::Io { path: path.to_owned(), error })?;
        Ok(tier)
    }

    /// Reads the header of each slot again, to find what another process has stored since. Does nothing in the tier that
    /// writes.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub fn refresh(&self) -> io::Result<()> {
        // Its own index is never behind, and slots may be taken.
        if self.is_writer { Ok(()) } else { self.read_index() }
    }

    fn read_index(&self) -> io::Result<()> {
        let len = self.file.metadata()?.len().saturating_sub(file_header::BYTES as u64);
        // Of the last slot, the file has what was written.
        let slots = len.div_ceil(self.header.slot_bytes).min(self.state().most);
        let mut found = Vec::new();
        let mut bytes = [0; HEADER];
        for slot in 0..slots {
            match read_at(&self.file, &mut bytes, self.offset(slot)) {
                Ok(()) => found.push(Said::of(&bytes, slot)),
                // It was cut, perhaps just now.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => found.push(None),
                Err(error) => return Err(error),
            }
        }
        let index = Index::of(found);
        tracing::debug!(path = %self.path.display(), slots, blocks = index.blocks(), "read the index of a disk tier");
        self.state().index = index;
        Ok(())
    }

    /// Has `left` called with the name and the group of each block that leaves. Of a tier that is only read nobody knows
    /// what leaves.
    pub(crate) fn watch(&self, left: TierWatcher) -> bool {
        let watches = self.is_writer && self.watcher.set(left).is_ok();
        if watches {
            self.state().index.left = Some(Vec::new());
        }
        watches
    }

    /// Calls the watcher, without the lock.
    fn report(&self) {
        let Some(watcher) = self.watcher.get() else { return };
        let left = self.state().index.left.as_mut().map(std::mem::take);
        left.into_iter().flatten().for_each(|(name, group)| watcher(&name, group as usize));
    }

    /// The places of the blocks of sequences with this key, from the first block on.
    pub fn prefix(&self, key: &PrefixKey) -> Prefix {
        Prefix::new(&self.keys, self.geometry.block_size, key)
    }

    /// The sizes of the blocks.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Whether the block of a group seems to be there. Only loading it shows whether it is whole.
    pub fn contains(&self, place: &Place, group: usize) -> bool {
        let contains = self.find(&mut self.state(), place, group).is_some();
        self.report();
        contains
    }

    /// Reads the block of a group. `None` if it is not there, or not whole.
    pub fn load<'a>(&self, place: &Place, group: usize, buffer: &'a mut Buffer) -> Option<&'a [u8]> {
        let loaded = self.load_unreported(place, group, buffer);
        self.report();
        loaded
    }

    fn load_unreported<'a>(&self, place: &Place, group: usize, buffer: &'a mut Buffer) -> Option<&'a [u8]> {
        let &bytes = self.geometry.bytes.get(group)?;
        let mut state = self.state();
        let Some(slot) = self.find(&mut state, place, group) else {
            state.stats.misses += 1;
            return None;
        };
        state.index.touch(&place.name);
        drop(state);
        let address = self.address(place, group, slot);
        let used = address.used(bytes);
        let pages = buffer.of(used.next_multiple_of(ALIGNMENT));
        let read = match &self.direct {
            // Some file systems refuse only the request.
            Some(direct) => read_pages_at(direct, pages, used, self.offset(slot))
                .or_else(|_| read_at(&self.file, &mut pages[..used], self.offset(slot))),
            None => read_at(&self.file, &mut pages[..used], self.offset(slot)),
        };
        let buffer = &mut pages[..used];
        let verified = read.as_ref().ok().and_then(|()| address.verify(&self.keys, bytes, buffer));
        let mut state = self.state();
        let Some((range, stored)) = verified else {
            // In the tier that writes, the slot may have been given to another block meanwhile, which is no damage.
            match state.index.get(&place.name, group as u32) {
                Some((of, _)) if of == slot => {
                    state.index.remove(slot);
                    state.stats.damaged += 1;
                    drop(state);
                    let error = read.err();
                    tracing::warn!(path = %self.path.display(), slot, ?error, "a block is damaged or was exchanged: it is not used");
                }
                _ => state.stats.misses += 1,
            }
            return None;
        };
        // The index has what the header said before it was verified.
        if self.is_too_old(stored) {
            state.stats.misses += 1;
            return None;
        }
        state.stats.loaded += 1;
        Some(&buffer[range])
    }

    /// Writes the block of a group, unless it is there.
    ///
    /// # Errors
    ///
    /// [`StoreError`] when the tier is read-only, the size is another, or the file cannot be written. If the disk is
    /// full, the file does not grow from then on, and new blocks take the place of others.
    pub fn store(&self, place: &Place, group: usize, bytes: &[u8], buffer: &mut Buffer) -> Result<Stored, StoreError> {
        let stored = self.store_unreported(place, group, bytes, buffer);
        self.report();
        stored
    }

    fn store_unreported(
        &self,
        place: &Place,
        group: usize,
        bytes: &[u8],
        buffer: &mut Buffer,
    ) -> Result<Stored, StoreError> {
        if !self.is_writer {
            return Err(StoreError::ReadOnly);
        }
        let expected = self.geometry.bytes.get(group).copied().unwrap_or(0);
        if expected != bytes.len()
            || group >= self.geometry.bytes.len()
            || place.tokens.len() != self.geometry.block_size
        {
            return Err(StoreError::Size { group, expected, got: bytes.len() });
        }
        let mut state = self.state();
        if self.find(&mut state, place, group).is_some() {
            state.index.touch(&place.name);
            return Ok(Stored::Already);
        }
        let most = state.most;
        let taken = state.index.take(most, &place.parent).ok_or(StoreError::NoSlot)?;
        state.stats.evicted += taken.evicted;
        drop(state);
        let stored = now();
        let written = self.write(&self.address(place, group, taken.slot), stored, bytes, buffer);
        let mut state = self.state();
        if let Err(error) = written {
            self.give_back(&mut state, taken, &error);
            return Err(error);
        }
        let said = Said { name: place.name, parent: place.parent, group: group as u32, stored };
        state.index.insert(taken.slot, said);
        state.stats.stored += 1;
        Ok(Stored::New)
    }

    /// What the tier has and has done.
    pub fn stats(&self) -> Stats {
        let state = self.state();
        let slots = state.index.slots();
        let bytes = file_header::BYTES as u64 + slots.saturating_mul(self.header.slot_bytes);
        Stats { blocks: state.index.blocks(), bytes, ..state.stats }
    }

    fn write(&self, address: &Address<'_>, stored: u64, bytes: &[u8], buffer: &mut Buffer) -> Result<(), StoreError> {
        let buffer = buffer.of(address.used(bytes.len()));
        address.encode(&self.keys, stored, bytes, buffer)?;
        Ok(write_at(&self.file, buffer, self.offset(address.slot))?)
    }

    /// After a write that failed.
    fn give_back(&self, state: &mut State, taken: Taken, error: &StoreError) {
        use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
        state.stats.failed += 1;
        let is_full = |error: &io::Error| matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge);
        if !(taken.is_new && matches!(error, StoreError::Io(error) if is_full(error))) {
            state.index.give_back(taken.slot);
        } else if state.most > state.index.slots() {
            // The slot is not tried again: those before it are all that there is room for.
            state.most = state.index.slots();
            tracing::warn!(path = %self.path.display(), "the disk is full: new blocks take the place of others");
        }
    }

    /// The slot of a block that is not too old.
    fn find(&self, state: &mut State, place: &Place, group: usize) -> Option<u64> {
        let (slot, stored) = state.index.get(&place.name, u32::try_from(group).ok()?)?;
        if self.is_too_old(stored) {
            if self.is_writer {
                state.index.remove(slot);
            }
            return None;
        }
        Some(slot)
    }

    fn is_too_old(&self, stored: u64) -> bool {
        self.max_age.is_some_and(|age| now().saturating_sub(stored) > age.as_secs())
    }

    fn address<'a>(&'a self, place: &'a Place, group: usize, slot: u64) -> Address<'a> {
        Address { namespace: &self.namespace, place, group: group as u32, slot }
    }

    fn offset(&self, slot: u64) -> u64 {
        file_header::BYTES as u64 + slot * self.header.slot_bytes
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing in it panics half-way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads the header of a file.
fn read_header(file: &File) -> io::Result<Found> {
    let len = file.metadata()?.len().min(file_header::BYTES as u64);
    let mut bytes = vec![0; len as usize];
    read_at(file, &mut bytes, 0)?;
    Ok(FileHeader::decode(&bytes))
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

impl std::fmt::Debug for DiskTier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut out = f.debug_struct("DiskTier");
        out.field("path", &self.path).field("geometry", &self.geometry).field("stats", &self.stats()).finish()
    }
}
