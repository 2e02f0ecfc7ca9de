//! What a node holds on its disk: sealed, disposable, and enough to serve after a restart without the control plane.
//!
//! ```text
//! apply ──► seal ──► sled                       get ──► index (memory) ──► sled ──► open
//!              └──► memory, when the disk fails
//! ```
//!
//! Nothing that must last is here: the control plane has all of it, and what is lost is sent again. So whatever is wrong
//! with the directory, the node starts: a directory that cannot be opened is set aside and a new one begun, and a disk
//! that fails later is replaced by a bounded place in memory until the node restarts.
//!
//! # Rows
//!
//! | key | content |
//! |---|---|
//! | `h…` | sealed: nothing; tells the format and the key |
//! | `i`, number | sealed: stamp, era, count of chunks, and what it is: a secret's hash, a tenant's view, a grant, … |
//! | `v`, number, chunk | sealed for the tenant: up to 6 KiB of the value |
//!
//! Each write has a number of its own, so neither paths nor their hashes are in a key. A chunk is sealed to its place,
//! its tenant and path, and the state that it is a part of: one that was moved, is left from another state, or belongs to
//! another secret does not open, and what does not open is not there.
//!
//! The rows of an [`apply`](Cache::apply) are written one after the other: values, then their index, then the removal of
//! what they replace, and the marks last. A crash leaves what was written up to some row: of each secret the old state
//! or the new one, and never marks that are ahead of what is held.
//!
//! # Epochs
//!
//! Within an epoch a secret's revision only grows; an older one is refused. Marks of a new epoch set the revision of
//! everything that is held to zero: the tag still tells what it is, and anything may replace it.
//!
//! # What a crash costs
//!
//! If the process dies: what was written within the last half second, but nothing that [`Cache::apply`] removed comes
//! back. If the machine goes down without closing it: the directory, because sled does not survive that. A disk that failed is not trusted again, because a grant that was revoked
//! meanwhile would be in force after a restart: the directory is removed.

mod dir;
mod disk;
pub mod key;
mod row;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};

use scaivault_domain::backend::BackendId;
use scaivault_domain::replica::{Freshness, KeyHash, Replica, SecretKey, Stamp};
use scaivault_domain::secret::State;
use scaivault_domain::tenant::TenantId;
use scaivault_domain::time::{Clock, Timestamp};
use scaivault_domain::token::TokenHash;
use scaivault_seal::Keyring;
use serde::{Deserialize, Serialize};
use sled::IVec;
use zeroize::Zeroizing;

use self::dir::{Lock, LockError};
use self::disk::{Disk, Fault, Flush, Reads};
use self::row::{Context, Entry, Name, Place, Row, Seals};

/// Where a cache is, and how much memory it may use.
pub struct CacheConfig {
    /// Its directory, in one that exists. What is set aside stays beside it.
    pub dir: PathBuf,
    /// What seals the rows.
    pub keyring: Arc<Keyring>,
    /// Names what is set aside.
    pub clock: Arc<dyn Clock>,
    /// Memory for pages of the disk.
    pub page_bytes: u64,
    /// Memory for values when there is no disk.
    pub memory_bytes: u64,
}

impl CacheConfig {
    /// A cache in `dir` with as little memory as serves well.
    pub fn new(dir: impl Into<PathBuf>, keyring: Arc<Keyring>, clock: Arc<dyn Clock>) -> Self {
        CacheConfig { dir: dir.into(), keyring, clock, page_bytes: 8 << 20, memory_bytes: 32 << 20 }
    }
}

/// Why there is no cache.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// Two nodes with one data directory.
    #[error("{0} is in use by another process: give each node a data directory of its own")]
    InUse(PathBuf),
}

/// What was in the directory.
#[derive(Debug)]
pub enum Found {
    /// What an earlier run held.
    Warm(Warm),
    /// Nothing yet.
    Empty,
    /// Something of no use; why. It was set aside.
    SetAside(String),
    /// No directory can be used; why. Values are kept in memory.
    NoDisk(String),
}

/// What an earlier run held, beside its secrets.
#[derive(Debug)]
pub struct Warm {
    /// Up to where, and when.
    pub marks: Marks,
    /// Views, as they were given.
    pub views: Vec<(TenantId, Zeroizing<Vec<u8>>)>,
    /// Grants, as they were given.
    pub grants: Vec<(TokenHash, Zeroizing<Vec<u8>>)>,
    /// When copies were compared with their backends.
    pub freshness: Vec<(TenantId, Freshness)>,
}

/// Up to where the control plane was followed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marks {
    /// The epoch of all revisions.
    pub epoch: String,
    /// Everything up to it was applied.
    pub revision: u64,
    /// When the control plane last confirmed what is held.
    pub confirmed: Timestamp,
    /// The backends whose every copy is held.
    pub prefetched: Vec<BackendId>,
}

/// One change of what is held.
#[derive(Debug)]
pub enum Write {
    /// A copy of a secret.
    Secret(SecretKey, Stamp, Replica),
    /// There is no copy any more.
    SecretGone(KeyHash),
    /// A tenant's view, encoded.
    View(TenantId, Zeroizing<Vec<u8>>),
    /// The tenant is not served any more.
    ViewGone(TenantId),
    /// A grant, encoded.
    Grant(TokenHash, Zeroizing<Vec<u8>>),
    /// The grant is over.
    GrantGone(TokenHash),
    /// When a backend's copies were compared with it.
    Freshness(TenantId, Freshness),
    /// The backend has no copies any more.
    FreshnessGone(TenantId, BackendId),
    /// Up to where this is; of a new epoch, to be given before its secrets. A directory without marks is not used again:
    /// nothing would say how old it is.
    Marks(Marks),
}

/// Where values are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Storage {
    /// In the directory.
    Disk,
    /// In memory, until the node restarts; why.
    Memory(String),
}

/// A cache, and what was in it.
#[derive(Debug)]
pub struct Opened {
    /// Ready to use.
    pub cache: Cache,
    /// What an earlier run left.
    pub found: Found,
}

/// The node's copies of secrets, and what it needs to serve them after a restart.
pub struct Cache {
    seals: Seals,
    /// Says what is held. A row that is not named here is not there.
    index: RwLock<HashMap<KeyHash, Entry>>,
    writer: Mutex<Writer>,
    disk: Option<Disk>,
    /// Why the disk is not written any more.
    off: OnceLock<Fault>,
    /// Sealed rows, when there is no disk.
    memory: moka::sync::Cache<Place, IVec>,
    broken: AtomicU64,
    /// There if the disk is.
    lock: Option<Lock>,
}

/// What only a writer needs.
#[derive(Debug, Default)]
struct Writer {
    last_number: u64,
    /// `None` before the first marks.
    epoch: Option<String>,
    /// Counts epochs: a row of an earlier one has no revision.
    era: u16,
    others: HashMap<Name, Entry>,
}

/// What was read from a directory.
struct Loaded {
    secrets: HashMap<KeyHash, Entry>,
    writer: Writer,
    warm: Option<Warm>,
}

impl Cache {
    /// Opens the cache in its directory, whatever is in there. May take a second with many secrets, or much longer on a
    /// damaged disk: not to be called where other work waits.
    ///
    /// # Errors
    /// Another process has the directory.
    pub fn open(config: CacheConfig) -> Result<Opened, CacheError> {
        let seals = Seals(config.keyring.clone());
        let lock = match Lock::take(&config.dir) {
            Ok(lock) => Ok(lock),
            Err(LockError::InUse) => return Err(CacheError::InUse(config.dir)),
            Err(LockError::Io(error)) => Err(error.to_string()),
        };
        let opened = lock.and_then(|lock| {
            let (disk, loaded, set_aside) = open_disk(&config, &seals, &lock)?;
            Ok((lock, disk, loaded, set_aside))
        });
        let memory = moka::sync::Cache::builder()
            .max_capacity(config.memory_bytes)
            .weigher(|_, row: &IVec| u32::try_from(row.len() + 128).unwrap_or(u32::MAX))
            .eviction_policy(moka::policy::EvictionPolicy::lru())
            .build();
        let cache = |lock, disk, off: Option<Fault>, loaded: Loaded| Cache {
            seals,
            index: RwLock::new(loaded.secrets),
            writer: Mutex::new(loaded.writer),
            disk,
            off: off.map(OnceLock::from).unwrap_or_default(),
            memory,
            broken: AtomicU64::default(),
            lock,
        };
        Ok(match opened {
            Ok((lock, disk, mut loaded, set_aside)) => {
                let found = match (loaded.warm.take(), set_aside) {
                    (Some(warm), _) => Found::Warm(warm),
                    (None, Some(reason)) => Found::SetAside(reason),
                    (None, None) => Found::Empty,
                };
                Opened { cache: cache(Some(lock), Some(disk), None, loaded), found }
            }
            Err(reason) => {
                tracing::error!(reason, "no cache on disk; values are kept in memory");
                let off = Fault { reason: reason.clone(), reads: Reads::Over };
                let nothing = Loaded { secrets: HashMap::new(), writer: Writer::default(), warm: None };
                Opened { cache: cache(None, None, Some(off), nothing), found: Found::NoDisk(reason) }
            }
        })
    }

    /// The copy of a secret.
    pub fn get(&self, key: &SecretKey) -> Option<(Stamp, Replica)> {
        let hash = key.hash();
        let mut entry = self.entry(hash)?;
        loop {
            if let Some(replica) = self.read(key, &entry) {
                return Some((entry.stamp, replica));
            }
            // A write may have come between the index and the row: what it wrote is there, for the index names nothing
            // else.
            let now = self.entry(hash)?;
            if now.number == entry.number {
                self.forget(hash, &entry);
                return None;
            }
            entry = now;
        }
    }

    /// Which state of a secret is held.
    pub fn stamp(&self, hash: KeyHash) -> Option<Stamp> {
        self.entry(hash).map(|entry| entry.stamp)
    }

    /// Every secret that is held, and which state of it.
    pub fn held(&self) -> Vec<(KeyHash, Stamp)> {
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        index.iter().map(|(hash, entry)| (*hash, entry.stamp)).collect()
    }

    /// How many secrets are held.
    pub fn len(&self) -> usize {
        self.index.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Whether no secret is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where values are kept.
    pub fn storage(&self) -> Storage {
        match self.off.get() {
            None => Storage::Disk,
            Some(fault) => Storage::Memory(fault.reason.clone()),
        }
    }

    /// How many secrets were dropped because their rows did not open.
    pub fn broken(&self) -> u64 {
        self.broken.load(Ordering::Relaxed)
    }

    /// Bytes of the directory.
    pub fn bytes_on_disk(&self) -> u64 {
        match (&self.disk, self.off.get()) {
            (Some(disk), None) => disk.bytes(),
            _ => 0,
        }
    }

    /// Applies the writes of one response, in their order. When this returns, what was removed is removed also if the
    /// process dies. May wait for the disk.
    pub fn apply(&self, writes: Vec<Write>) {
        let mut writer = lock(&self.writer);
        let (mut rows, mut marks_rows) = (Vec::new(), Vec::new());
        // Until their rows are written, readers get what was there before.
        let mut fresh: HashMap<KeyHash, Entry> = HashMap::new();
        let mut erased = Vec::new();
        let mut flush = Flush::Soon;
        for write in writes {
            let gone = match write {
                Write::Secret(key, stamp, replica) => {
                    let hash = key.hash();
                    let old = fresh.get(&hash).copied().or_else(|| self.entry(hash));
                    if old.is_none_or(|old| old.stamp.revision <= stamp.revision) {
                        if replica.state != State::Active {
                            // A deletion comes as a state: what it takes away must not come back either.
                            flush = Flush::Now;
                        }
                        let entry = self.new_secret(&mut writer, &key, stamp, &replica, &mut rows);
                        if let Some(replaced) = fresh.insert(hash, entry) {
                            replaced.erase(&mut erased);
                        }
                    }
                    continue;
                }
                Write::SecretGone(hash) => {
                    if let Some(replaced) = fresh.remove(&hash) {
                        replaced.erase(&mut erased);
                    }
                    self.write_index().remove(&hash)
                }
                Write::View(tenant, view) => {
                    self.put(&mut writer, Name::View(tenant), &view, &mut rows);
                    // Rare, and nothing can be served without it.
                    flush = Flush::Now;
                    continue;
                }
                Write::ViewGone(tenant) => writer.others.remove(&Name::View(tenant)),
                Write::Grant(hash, grant) => {
                    self.put(&mut writer, Name::Grant(hash), &grant, &mut rows);
                    flush = Flush::Now;
                    continue;
                }
                Write::GrantGone(hash) => writer.others.remove(&Name::Grant(hash)),
                Write::Freshness(tenant, freshness) => {
                    let name = Name::Freshness(tenant, freshness.backend.clone());
                    self.put(&mut writer, name, &to_json(&freshness), &mut rows);
                    continue;
                }
                Write::FreshnessGone(tenant, backend) => {
                    writer.others.remove(&Name::Freshness(tenant, backend))
                }
                Write::Marks(marks) => {
                    // What came before the first marks is of their epoch.
                    let before = writer.epoch.replace(marks.epoch.clone());
                    if before.is_some_and(|before| before != marks.epoch) {
                        writer.era = writer.era.wrapping_add(1);
                        self.write_index().values_mut().for_each(|entry| entry.stamp.revision = 0);
                    }
                    let marks = to_json(&(writer.era, marks));
                    self.put(&mut writer, Name::Marks, &marks, &mut marks_rows);
                    continue;
                }
            };
            if let Some(entry) = gone {
                entry.erase(&mut rows);
                flush = Flush::Now;
            }
        }
        rows.append(&mut marks_rows);
        self.store(rows, flush);
        {
            let mut index = self.write_index();
            for (hash, entry) in fresh {
                if let Some(old) = index.insert(hash, entry) {
                    old.erase(&mut erased);
                }
            }
        }
        self.store(erased, Flush::Soon);
    }

    fn new_secret(
        &self,
        writer: &mut Writer,
        key: &SecretKey,
        stamp: Stamp,
        replica: &Replica,
        rows: &mut Vec<Row>,
    ) -> Entry {
        let plain = row::encode(replica);
        let entry = Entry::new(stamp, writer.era, writer.new_number(), &plain);
        let context = Context::secret(&key.tenant, key.path.as_str());
        self.seals.seal(&entry, &Name::Secret(key.hash()), Some(context), &plain, rows);
        entry
    }

    fn put(&self, writer: &mut Writer, name: Name, plain: &[u8], rows: &mut Vec<Row>) {
        let entry = Entry::new(Stamp { revision: 0, tag: 0 }, writer.era, writer.new_number(), plain);
        self.seals.seal(&entry, &name, None, plain, rows);
        if let Some(old) = writer.others.insert(name, entry) {
            old.erase(rows);
        }
    }

    fn store(&self, rows: Vec<Row>, flush: Flush) {
        if rows.is_empty() {
            return;
        }
        let rows: Arc<[Row]> = rows.into();
        if let (Some(disk), None) = (&self.disk, self.off.get()) {
            match disk.write(rows.clone(), flush) {
                Ok(()) => return,
                Err(fault) => self.turn_off(fault),
            }
        }
        for (place, record) in rows.iter().filter(|(place, _)| row::is_value(place)) {
            match record {
                Some(record) => self.memory.insert(*place, record.as_slice().into()),
                None => self.memory.invalidate(place),
            }
        }
    }

    fn turn_off(&self, fault: Fault) {
        tracing::error!(
            reason = fault.reason,
            "the cache on disk failed and is removed; values are kept in memory until the node restarts"
        );
        if let Some(lock) = &self.lock {
            lock.discard();
        }
        // Only a writer comes here, and there is one at a time.
        let _ = self.off.set(fault);
    }

    fn read(&self, key: &SecretKey, entry: &Entry) -> Option<Replica> {
        let context = Context::secret(&key.tenant, key.path.as_str());
        let plain = self.seals.open(entry, context, |place| self.row(place))?;
        row::decode(plain)
    }

    fn row(&self, place: &Place) -> Option<IVec> {
        let disk = match self.off.get() {
            None => self.disk.as_ref(),
            Some(fault) => {
                if let Some(row) = self.memory.get(place) {
                    return Some(row);
                }
                self.disk.as_ref().filter(|_| fault.reads == Reads::Work)
            }
        };
        disk?.get(place).ok()?
    }

    /// Gives up a secret whose rows do not open. It is asked for again.
    fn forget(&self, hash: KeyHash, entry: &Entry) {
        self.write_index().remove(&hash);
        let mut rows = Vec::new();
        entry.erase(&mut rows);
        self.store(rows, Flush::Soon);
        // In memory rows are evicted: nothing is wrong with that.
        if self.off.get().is_none() && self.broken.fetch_add(1, Ordering::Relaxed) == 0 {
            tracing::warn!("a cached secret does not open; such are dropped and fetched again");
        }
    }

    fn entry(&self, hash: KeyHash) -> Option<Entry> {
        self.index.read().unwrap_or_else(PoisonError::into_inner).get(&hash).copied()
    }

    fn write_index(&self) -> std::sync::RwLockWriteGuard<'_, HashMap<KeyHash, Entry>> {
        self.index.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        let (Some(disk), Some(lock)) = (&mut self.disk, &self.lock) else { return };
        match (disk.close(), self.off.get()) {
            (Ok(()), None) => lock.closed(),
            // The directory is gone.
            (_, Some(_)) => {}
            (Err(Fault { reason, .. }), None) => {
                tracing::warn!(reason, "the cache was not closed and is removed");
                lock.discard();
            }
        }
    }
}

impl fmt::Debug for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cache")
            .field("secrets", &self.len())
            .field("storage", &self.storage())
            .finish_non_exhaustive()
    }
}

impl Writer {
    fn new_number(&mut self) -> u64 {
        self.last_number += 1;
        self.last_number
    }
}

/// The directory, what is in it, and why another one had to be set aside first.
fn open_disk(
    config: &CacheConfig,
    seals: &Seals,
    lock: &Lock,
) -> Result<(Disk, Loaded, Option<String>), String> {
    let open = || {
        lock.begin()?;
        let seals = seals.clone();
        let opened = Disk::open(lock.dir(), config.page_bytes, move |tree| load(tree, &seals))?;
        lock.opened();
        Ok(opened)
    };
    let reason: String = match open() {
        Ok((disk, loaded)) => return Ok((disk, loaded, None)),
        Err(reason) => reason,
    };
    tracing::warn!(reason, "the cache is of no use: it is set aside, and everything is fetched again");
    lock.set_aside(config.clock.now()).map_err(|error| error.to_string())?;
    let (disk, loaded) = open()?;
    Ok((disk, loaded, Some(reason)))
}

/// Reads what a directory says of itself. What does not open is erased.
fn load(tree: &sled::Db, seals: &Seals) -> Result<Loaded, String> {
    let failed = |error: sled::Error| error.to_string();
    match tree.get(row::HEADER).map_err(failed)? {
        Some(header) if seals.is_header(&header) => {}
        Some(_) => return Err("it is of another format, or was sealed with another key".into()),
        None if tree.is_empty() => {
            let (place, header) = seals.header();
            tree.insert(place, header.unwrap_or_default()).map_err(failed)?;
        }
        None => return Err("it does not say what format it is of".into()),
    }
    let mut found = HashMap::new();
    let mut secrets = HashMap::new();
    let (mut erased, mut unknown) = (Vec::new(), Vec::new());
    let mut last = 0;
    for row in tree.scan_prefix(row::INDEX_PREFIX) {
        let (key, record) = row.map_err(failed)?;
        let Some(number) = row::number_of(&key) else { continue };
        last = number;
        let before = match seals.open_index(&key, &record) {
            Some((Name::Secret(hash), entry)) => secrets.insert(hash, entry),
            Some((name, entry)) => found.insert(name, entry),
            None => {
                erased.push(key);
                unknown.push(number..=number);
                None
            }
        };
        // The process died before it removed what this replaces.
        if let Some(entry) = before {
            erased.extend(entry.places().map(|place| IVec::from(&place)));
        }
    }
    // The process died before it wrote the index of these.
    unknown.push(last + 1..=u64::MAX);
    for row in unknown.into_iter().flat_map(|numbers| tree.range(row::values_of(numbers))) {
        erased.push(row.map_err(failed)?.0);
    }
    let mut others = HashMap::new();
    let mut marked: Option<(u16, Marks)> = None;
    let (mut views, mut grants, mut freshness) = (Vec::new(), Vec::new(), Vec::new());
    for (name, entry) in found {
        let plain = seals.open_named(&entry, &name, |place| tree.get(place).ok()?);
        let taken = plain.and_then(|plain| {
            match &name {
                Name::View(tenant) => views.push((tenant.clone(), plain)),
                Name::Grant(hash) => grants.push((*hash, plain)),
                Name::Freshness(tenant, _) => {
                    freshness.push((tenant.clone(), serde_json::from_slice(&plain).ok()?));
                }
                Name::Marks => marked = Some(serde_json::from_slice(&plain).ok()?),
                Name::Secret(_) => return None,
            }
            Some(())
        });
        if taken.is_some() {
            others.insert(name, entry);
        } else {
            erased.extend(entry.places().map(|place| IVec::from(&place)));
        }
    }
    if marked.is_none() && !(secrets.is_empty() && others.is_empty()) {
        return Err("it does not say how old it is".into());
    }
    for key in erased {
        tree.remove(key).map_err(failed)?;
    }
    // A disk without room is better known now.
    tree.flush().map_err(failed)?;

    let era = marked.as_ref().map_or(0, |(era, _)| *era);
    for entry in secrets.values_mut().filter(|entry| entry.era != era) {
        entry.stamp.revision = 0;
    }
    let epoch = marked.as_ref().map(|(_, marks)| marks.epoch.clone());
    Ok(Loaded {
        secrets,
        writer: Writer { last_number: last, epoch, era, others },
        warm: marked.map(|(_, marks)| Warm { marks, views, grants, freshness }),
    })
}

fn to_json(value: &impl Serialize) -> Zeroizing<Vec<u8>> {
    Zeroizing::new(serde_json::to_vec(value).expect("names, numbers and times are JSON"))
}

fn lock(writer: &Mutex<Writer>) -> MutexGuard<'_, Writer> {
    writer.lock().unwrap_or_else(PoisonError::into_inner)
}
