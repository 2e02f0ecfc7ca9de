//! The store in one file of redb, for one machine.
//!
//! File. `rows`: encoded key -> (revision, value). `feed`: (revision, encoded key) -> what happened. `store`: the
//! format, the epoch, the newest revision, and how far the feed has been trimmed. An encoded key is the owner, a NUL
//! (which no tenant's id has), the code of the space, and the name, so the order of keys is the order of names.
//!
//! Writing. One thread owns all writes. While it waits for the disk, transactions queue up; then it takes as many as
//! are there, at most [`GROUP`], and commits them with one fsync. Each is judged by its own preconditions against
//! what the ones before it left. Nobody is answered before the fsync.
//!
//! Failing. After a failed write or fsync nobody knows what the disk holds, and a later fsync that succeeds proves
//! nothing about the earlier one. So the thread answers its group with the failure and ends: no more writes until
//! the file is opened again. Reads go on.

use std::error::Error as StdError;
use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::ops::Bound;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::thread;

use async_trait::async_trait;
use bytes::Bytes;
use redb::backends::FileBackend;
use redb::{
    AccessGuard, Builder, Database, DatabaseError, Durability, ReadTransaction, ReadableDatabase,
    ReadableTable, ReadableTableMetadata, StorageBackend, Table, TableDefinition, WriteTransaction,
};
use scaivault_domain::tenant::TenantId;
use tokio::sync::{mpsc, oneshot, watch};

use super::{
    Change, ChangeKind, Changes, CommitError, Depth, Entry, Epoch, FEED_LENGTH, FeedError, Key, Op, Owner,
    Query, Revision, Row, Space, Store, StoreError, Tx,
};

const ROWS: TableDefinition<'_, &[u8], (u64, &[u8])> = TableDefinition::new("rows");
const FEED: TableDefinition<'_, (u64, &[u8]), u8> = TableDefinition::new("feed");
const STORE: TableDefinition<'_, &str, u128> = TableDefinition::new("store");

/// Keys of [`STORE`].
const FORMAT: &str = "format";
const EPOCH: &str = "epoch";
const HEAD: &str = "head";
const TRIMMED: &str = "trimmed";

const CURRENT_FORMAT: u128 = 1;

/// Values of [`FEED`].
const PUT: u8 = 1;
const DELETED: u8 = 2;

/// Most transactions in one fsync. More would raise throughput a little and the slowest answer a lot.
const GROUP: usize = 64;
/// Most transactions that wait; beyond it callers wait to get in.
const QUEUE: usize = 1024;
/// redb's own default is 1 GiB, which shows as resident memory.
const CACHE_BYTES: usize = 64 * 1024 * 1024;

/// Why a file cannot be the store.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has it open: stop that one, or use another file.
    #[error("the store {} is in use by another process", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// Written by another version of this program: use that version.
    #[error("the store has format {found}, this program knows {CURRENT_FORMAT}")]
    Format {
        /// The format of the file.
        found: u128,
    },
    /// The file or its directory does not let us.
    #[error("the store {} cannot be opened", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file was opened, but cannot be read or written.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A store in one file.
pub struct RedbStore {
    database: Arc<Database>,
    epoch: Epoch,
    head: watch::Receiver<Revision>,
    writer: Writer,
}

impl RedbStore {
    /// Opens the store in the file at `path`, or makes one. Blocks; after a crash, for as long as it takes to check
    /// the whole file.
    ///
    /// # Errors
    /// What the operator has to do about it.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let unusable = |source| OpenError::Unusable { path: path.to_owned(), source };
        let file = open_file(path).map_err(unusable)?;
        match FileBackend::new(file).and_then(create) {
            Ok(database) => RedbStore::start(database),
            Err(DatabaseError::DatabaseAlreadyOpen) => Err(OpenError::InUse { path: path.to_owned() }),
            Err(other) => Err(fault(other).into()),
        }
    }

    fn start(database: Database) -> Result<Self, OpenError> {
        let (epoch, head) = prepare(&database)?;
        let database = Arc::new(database);
        let (moved, head) = watch::channel(head);
        let writer = Writer::start(database.clone(), moved).map_err(StoreError::unavailable)?;
        Ok(RedbStore { database, epoch, head, writer })
    }

    fn reader(&self) -> Result<ReadTransaction, StoreError> {
        self.database.begin_read().map_err(fault)
    }

    /// Runs a read that may take long where it holds nobody up.
    async fn off_thread<T: Send + 'static, E: From<StoreError> + Send + 'static>(
        &self,
        read: impl FnOnce(ReadTransaction) -> Result<T, E> + Send + 'static,
    ) -> Result<T, E> {
        let reader = self.reader()?;
        match tokio::task::spawn_blocking(move || read(reader)).await {
            Ok(outcome) => outcome,
            Err(died) => Err(StoreError::unavailable(died).into()),
        }
    }
}

fn open_file(path: &Path) -> io::Result<File> {
    // A directory that is there keeps its mode: it may be anything, and is the operator's.
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let file =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
    if file.metadata()?.permissions().mode() & 0o077 != 0 {
        file.set_permissions(Permissions::from_mode(0o600))?;
    }
    // Otherwise a power loss could take a new file away with everything that was acknowledged into it.
    File::open(directory)?.sync_all()?;
    Ok(file)
}

fn create(backend: impl StorageBackend) -> Result<Database, DatabaseError> {
    Builder::new().set_cache_size(CACHE_BYTES).create_with_backend(backend)
}

/// Makes the tables of a new file, or checks those of an old one. Commits in either case, so that a disk that takes
/// no writes is found here.
fn prepare(database: &Database) -> Result<(Epoch, Revision), OpenError> {
    let write = begin_durable(database).map_err(fault)?;
    let found = {
        let mut store = write.open_table(STORE).map_err(fault)?;
        let format = number(&store, FORMAT)?;
        match format {
            Some(CURRENT_FORMAT) => {}
            Some(found) => return Err(OpenError::Format { found }),
            None => {
                write.open_table(ROWS).map_err(fault)?;
                write.open_table(FEED).map_err(fault)?;
                for (name, value) in
                    [(FORMAT, CURRENT_FORMAT), (EPOCH, Epoch::random().0), (HEAD, 0), (TRIMMED, 0)]
                {
                    store.insert(name, value).map_err(fault)?;
                }
            }
        }
        (Epoch(number(&store, EPOCH)?.ok_or_else(|| missing(EPOCH))?), revision(&store, HEAD)?)
    };
    write.commit().map_err(fault)?;
    Ok(found)
}

fn begin_durable(database: &Database) -> Result<WriteTransaction, redb::Error> {
    let mut write = database.begin_write()?;
    write.set_durability(Durability::Immediate)?;
    Ok(write)
}

fn number(store: &impl ReadableTable<&'static str, u128>, name: &str) -> Result<Option<u128>, StoreError> {
    Ok(store.get(name).map_err(fault)?.map(|found| found.value()))
}

fn revision(store: &impl ReadableTable<&'static str, u128>, name: &str) -> Result<Revision, StoreError> {
    number(store, name)?
        .and_then(|number| u64::try_from(number).ok())
        .map(Revision)
        .ok_or_else(|| missing(name))
}

fn missing(name: &str) -> StoreError {
    StoreError::Corrupt(format!("the file does not say its `{name}`"))
}

fn fault(error: impl Into<redb::Error>) -> StoreError {
    match error.into() {
        redb::Error::Corrupted(what) => StoreError::Corrupt(what),
        other => StoreError::unavailable(other),
    }
}

/// The one thread that writes. Ends with the store, or with the first failure.
struct Writer {
    /// `None` only while the store is being dropped.
    queue: Option<mpsc::Sender<Request>>,
    thread: Option<thread::JoinHandle<()>>,
    failure: Arc<OnceLock<StoreError>>,
}

struct Request {
    tx: Tx,
    reply: oneshot::Sender<Result<Revision, CommitError>>,
}

impl Writer {
    fn start(database: Arc<Database>, head: watch::Sender<Revision>) -> io::Result<Writer> {
        let (queue, requests) = mpsc::channel(QUEUE);
        let failure = Arc::new(OnceLock::new());
        let thread = thread::Builder::new().name("store-writer".into()).spawn({
            let failure = failure.clone();
            move || write_groups(&database, requests, &head, &failure)
        })?;
        Ok(Writer { queue: Some(queue), thread: Some(thread), failure })
    }

    async fn commit(&self, tx: Tx) -> Result<Revision, CommitError> {
        let (reply, outcome) = oneshot::channel();
        if let Some(queue) = &self.queue
            && queue.send(Request { tx, reply }).await.is_ok()
            && let Ok(outcome) = outcome.await
        {
            return outcome;
        }
        Err(self.why_stopped().into())
    }

    fn health(&self) -> Result<(), StoreError> {
        match &self.queue {
            Some(queue) if !queue.is_closed() => Ok(()),
            _ => Err(self.why_stopped()),
        }
    }

    fn why_stopped(&self) -> StoreError {
        // Without a failure of the disk, the thread can only have panicked.
        self.failure.get().cloned().unwrap_or_else(|| StoreError::unavailable("the store's writer has died"))
    }
}

impl Drop for Writer {
    /// Waits for the thread, so that the file is closed and can be opened again at once.
    fn drop(&mut self) {
        self.queue = None;
        if let Some(thread) = self.thread.take() {
            // It holds no lock and owes no answer, so how it ended does not matter here.
            let _ended = thread.join();
        }
    }
}

fn write_groups(
    database: &Database,
    mut requests: mpsc::Receiver<Request>,
    head: &watch::Sender<Revision>,
    failure: &OnceLock<StoreError>,
) {
    let mut group = Vec::with_capacity(GROUP);
    while requests.blocking_recv_many(&mut group, GROUP) > 0 {
        let (txs, replies): (Vec<_>, Vec<_>) =
            group.drain(..).map(|request| (request.tx, request.reply)).unzip();
        // Let go before the match: a guard in its head would still be held where the head is moved.
        let before = *head.borrow();
        match write_group(database, before, txs) {
            Ok((newest, outcomes)) => {
                head.send_replace(newest);
                for (reply, outcome) in replies.into_iter().zip(outcomes) {
                    // A caller who went away knows that it may have happened.
                    let _gone = reply.send(outcome.map_err(CommitError::Precondition));
                }
            }
            Err(error) => {
                let error = failure.get_or_init(|| error);
                tracing::error!(
                    error = error as &(dyn StdError + 'static),
                    "a commit failed; the store takes no writes until it is opened again"
                );
                // Before anybody is told, so that `health` agrees with what they were told.
                requests.close();
                for reply in replies {
                    let _gone = reply.send(Err(error.clone().into()));
                }
                return;
            }
        }
    }
}

type Outcome = Result<Revision, Key>;

fn write_group(
    database: &Database,
    head: Revision,
    txs: Vec<Tx>,
) -> Result<(Revision, Vec<Outcome>), StoreError> {
    let write = begin_durable(database).map_err(fault)?;
    let written = Tables::open(&write).and_then(|tables| tables.write(head, txs)).map_err(fault)?;
    if written.0 == head {
        // Nothing happened, and nothing needs an fsync.
        write.abort().map_err(fault)?;
    } else {
        write.commit().map_err(fault)?;
    }
    Ok(written)
}

struct Tables<'w> {
    rows: Table<'w, &'static [u8], (u64, &'static [u8])>,
    feed: Table<'w, (u64, &'static [u8]), u8>,
    store: Table<'w, &'static str, u128>,
}

impl<'w> Tables<'w> {
    fn open(write: &'w WriteTransaction) -> Result<Self, redb::Error> {
        Ok(Tables {
            rows: write.open_table(ROWS)?,
            feed: write.open_table(FEED)?,
            store: write.open_table(STORE)?,
        })
    }

    fn write(mut self, mut head: Revision, txs: Vec<Tx>) -> Result<(Revision, Vec<Outcome>), redb::Error> {
        let mut outcomes = Vec::with_capacity(txs.len());
        for tx in txs {
            outcomes.push(match self.unmet(&tx)? {
                Some(key) => Err(key),
                None => {
                    head = head.next();
                    self.apply(head, tx.ops)?;
                    Ok(head)
                }
            });
        }
        self.store.insert(HEAD, u128::from(head.as_u64()))?;
        self.trim()?;
        Ok((head, outcomes))
    }

    fn unmet(&self, tx: &Tx) -> Result<Option<Key>, redb::Error> {
        for (key, precondition) in &tx.preconditions {
            let found = self.rows.get(encode(key).as_slice())?.map(|row| Revision(row.value().0));
            if !precondition.holds(found) {
                return Ok(Some(key.clone()));
            }
        }
        Ok(None)
    }

    fn apply(&mut self, revision: Revision, ops: Vec<Op>) -> Result<(), redb::Error> {
        let revision = revision.as_u64();
        for op in ops {
            let (key, kind) = match &op {
                Op::Put(key, value) => {
                    self.rows.insert(encode(key).as_slice(), (revision, value.as_ref()))?;
                    (key, PUT)
                }
                Op::Delete(key) => {
                    if self.rows.remove(encode(key).as_slice())?.is_none() {
                        continue;
                    }
                    (key, DELETED)
                }
            };
            if key.space.is_fed() {
                self.feed.insert((revision, encode(key).as_slice()), kind)?;
            }
        }
        Ok(())
    }

    fn trim(&mut self) -> Result<(), redb::Error> {
        let mut trimmed = None;
        for _ in FEED_LENGTH as u64..self.feed.len()? {
            trimmed = self.feed.pop_first()?.map(|(key, _)| key.value().0);
        }
        if let Some(revision) = trimmed {
            self.store.insert(TRIMMED, u128::from(revision))?;
        }
        Ok(())
    }
}

fn encode_prefix(owner: &Owner, space: Space) -> Vec<u8> {
    let mut prefix = owner.as_str().as_bytes().to_vec();
    prefix.extend([0, space.code()]);
    prefix
}

fn encode(key: &Key) -> Vec<u8> {
    let mut encoded = encode_prefix(&key.owner, key.space);
    encoded.extend_from_slice(key.name.as_bytes());
    encoded
}

fn decode(encoded: &[u8]) -> Result<Key, StoreError> {
    let parse = || {
        let (owner, rest) = encoded.split_at(encoded.iter().position(|byte| *byte == 0)?);
        let owner = match std::str::from_utf8(owner).ok()? {
            "" => Owner::Installation,
            tenant => Owner::Tenant(TenantId::parse(tenant).ok()?),
        };
        let (code, name) = rest.get(1..)?.split_first()?;
        Some(Key { owner, space: Space::from_code(*code)?, name: String::from_utf8(name.to_vec()).ok()? })
    };
    parse().ok_or_else(|| StoreError::Corrupt("a key of the store is malformed".into()))
}

fn to_row(found: AccessGuard<'_, (u64, &'static [u8])>) -> Row {
    let (revision, value) = found.value();
    Row { version: Revision(revision), value: Bytes::copy_from_slice(value) }
}

fn scan(
    reader: &ReadTransaction,
    owner: &Owner,
    space: Space,
    query: &Query,
) -> Result<Vec<Entry>, StoreError> {
    let table = reader.open_table(ROWS).map_err(fault)?;
    let prefix = encode_prefix(owner, space);
    query.run(
        |start| {
            let start = start.map(|name| [prefix.as_slice(), name.as_bytes()].concat());
            let start = start.as_ref().map(Vec::as_slice);
            let rows = table.range::<&[u8]>((start, Bound::Unbounded)).map_err(fault)?;
            Ok(rows.map_while(|row| {
                let (key, found) = match row {
                    Ok(row) => row,
                    Err(error) => return Some(Err(fault(error))),
                };
                let name = key.value().strip_prefix(prefix.as_slice())?.to_vec();
                let malformed = |_| StoreError::Corrupt(format!("a name in {space:?} is not UTF-8"));
                Some(String::from_utf8(name).map(|name| (name, found)).map_err(malformed))
            }))
        },
        to_row,
    )
}

fn changes(reader: &ReadTransaction, cursor: Revision, max: usize) -> Result<Changes, FeedError> {
    let store = reader.open_table(STORE).map_err(fault)?;
    let head = revision(&store, HEAD)?;
    if cursor < revision(&store, TRIMMED)? || cursor > head {
        return Err(FeedError::Expired);
    }
    let feed = reader.open_table(FEED).map_err(fault)?;
    let lines = feed.range((cursor.next().as_u64(), [].as_slice())..).map_err(fault)?.map(|line| {
        let (place, kind) = line.map_err(fault)?;
        let (revision, key) = place.value();
        let kind = match kind.value() {
            PUT => ChangeKind::Put,
            DELETED => ChangeKind::Deleted,
            _ => return Err(StoreError::Corrupt("a line of the feed is malformed".into())),
        };
        Ok(Change { revision: Revision(revision), key: decode(key)?, kind })
    });
    Ok(Changes::collect(lines, max, head)?)
}

#[async_trait]
impl Store for RedbStore {
    async fn get(&self, key: &Key) -> Result<Option<Row>, StoreError> {
        // In place: a few pages, nearly always in the cache, and redb never makes a reader wait for the writer's
        // fsync. A hop to another thread would cost more than the lookup.
        let rows = self.reader()?.open_table(ROWS).map_err(fault)?;
        Ok(rows.get(encode(key).as_slice()).map_err(fault)?.map(to_row))
    }

    async fn scan(
        &self,
        owner: &Owner,
        space: Space,
        prefix: &str,
        depth: Depth,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<Entry>, StoreError> {
        let owner = owner.clone();
        let query = Query::new(prefix, depth, after, limit);
        self.off_thread(move |reader| scan(&reader, &owner, space, &query)).await
    }

    async fn commit(&self, tx: Tx) -> Result<Revision, CommitError> {
        self.writer.commit(tx).await
    }

    async fn changes(&self, cursor: Revision, max: usize) -> Result<Changes, FeedError> {
        self.off_thread(move |reader| changes(&reader, cursor, max)).await
    }

    async fn head(&self) -> Revision {
        *self.head.borrow()
    }

    fn wake(&self) -> watch::Receiver<Revision> {
        let mut wake = self.head.clone();
        wake.mark_unchanged();
        wake
    }

    fn epoch(&self) -> Epoch {
        self.epoch
    }

    fn is_exclusive(&self) -> bool {
        // redb locks the file.
        true
    }

    async fn health(&self) -> Result<(), StoreError> {
        self.writer.health()?;
        let store = self.reader()?.open_table(STORE).map_err(fault)?;
        revision(&store, HEAD).map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Condvar, Mutex};

    use super::*;

    fn key(name: &str) -> Key {
        Key::installation(Space::Setting, name)
    }

    fn put(name: &str) -> Tx {
        Tx::new().put(key(name), Bytes::from_static(b"value"))
    }

    /// A disk whose fsync can be held, fails on demand, and is counted.
    #[derive(Clone, Debug)]
    struct Disk {
        file: Arc<FileBackend>,
        fsync: Arc<(Mutex<Fsync>, Condvar)>,
        fsyncs: Arc<AtomicUsize>,
    }

    #[derive(Debug, PartialEq)]
    enum Fsync {
        Works,
        Hangs,
        Fails,
    }

    impl Disk {
        fn new(path: &Path) -> Self {
            let file = Arc::new(FileBackend::new(open_file(path).unwrap()).unwrap());
            Disk { file, fsync: Arc::new((Mutex::new(Fsync::Works), Condvar::new())), fsyncs: Arc::default() }
        }

        fn set(&self, fsync: Fsync) {
            *self.fsync.0.lock().unwrap() = fsync;
            self.fsync.1.notify_all();
        }

        fn store(&self) -> Arc<RedbStore> {
            Arc::new(RedbStore::start(create(self.clone()).unwrap()).unwrap())
        }
    }

    impl StorageBackend for Disk {
        fn len(&self) -> io::Result<u64> {
            self.file.len()
        }

        fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
            self.file.read(offset, out)
        }

        fn set_len(&self, len: u64) -> io::Result<()> {
            self.file.set_len(len)
        }

        fn sync_data(&self) -> io::Result<()> {
            self.fsyncs.fetch_add(1, Ordering::SeqCst);
            let (fsync, moved) = &*self.fsync;
            let fsync = moved.wait_while(fsync.lock().unwrap(), |fsync| *fsync == Fsync::Hangs).unwrap();
            match *fsync {
                Fsync::Fails => Err(io::Error::other("the disk is gone")),
                _ => self.file.sync_data(),
            }
        }

        fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
            self.file.write(offset, data)
        }
    }

    async fn until(mut reached: impl FnMut() -> bool) {
        while !reached() {
            tokio::task::yield_now().await;
        }
    }

    /// Holds the disk with one commit in it, and queues `txs` behind it.
    async fn queued(
        disk: &Disk,
        store: &Arc<RedbStore>,
        txs: impl IntoIterator<Item = Tx>,
    ) -> Vec<tokio::task::JoinHandle<Result<Revision, CommitError>>> {
        let before = disk.fsyncs.load(Ordering::SeqCst);
        disk.set(Fsync::Hangs);
        let commit = |tx| {
            let store = store.clone();
            tokio::spawn(async move { store.commit(tx).await })
        };
        let mut commits = vec![commit(put("first"))];
        until(|| disk.fsyncs.load(Ordering::SeqCst) > before).await;
        commits.extend(txs.into_iter().map(commit));
        let queue = store.writer.queue.as_ref().unwrap();
        until(|| QUEUE - queue.capacity() == commits.len() - 1).await;
        commits
    }

    #[tokio::test]
    async fn whatever_waits_for_the_disk_shares_one_fsync() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::new(&dir.path().join("store"));
        let store = disk.store();
        let commits = queued(&disk, &store, (0..64).map(|n| put(&n.to_string()))).await;
        let before = disk.fsyncs.load(Ordering::SeqCst);
        disk.set(Fsync::Works);
        for (n, commit) in commits.into_iter().enumerate() {
            assert_eq!(commit.await.unwrap().unwrap(), Revision::from_u64(n as u64 + 1));
        }
        assert_eq!(disk.fsyncs.load(Ordering::SeqCst) - before, 1);
    }

    #[tokio::test]
    async fn a_failed_transaction_harms_nobody_in_its_group() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::new(&dir.path().join("store"));
        let store = disk.store();
        let txs = [
            put("a").expect_absent(key("a")),
            put("b").put(key("trace"), Bytes::new()).expect_absent(key("a")),
            put("c").expect_absent(key("c")),
        ];
        let commits = queued(&disk, &store, txs).await;
        disk.set(Fsync::Works);
        let mut outcomes = Vec::new();
        for commit in commits {
            outcomes.push(commit.await.unwrap().is_ok());
        }
        assert_eq!(outcomes, [true, true, false, true]);
        assert!(store.get(&key("c")).await.unwrap().is_some());
        assert!(store.get(&key("trace")).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn after_a_failed_fsync_nothing_is_acknowledged_until_reopened() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        let disk = Disk::new(&path);
        let store = disk.store();
        store.commit(put("kept")).await.unwrap();

        let commits = queued(&disk, &store, ["a", "b"].map(put)).await;
        disk.set(Fsync::Fails);
        for commit in commits {
            assert!(matches!(commit.await.unwrap(), Err(CommitError::Unavailable(_))));
        }
        disk.set(Fsync::Works);
        assert!(matches!(store.commit(put("later")).await, Err(CommitError::Unavailable(_))));
        assert!(store.health().await.is_err());
        assert!(store.get(&key("kept")).await.unwrap().is_some(), "reads go on");
        drop((store, disk));

        let store = RedbStore::open(&path).unwrap();
        assert!(store.get(&key("kept")).await.unwrap().is_some());
        assert!(store.get(&key("later")).await.unwrap().is_none());
        store.commit(put("again")).await.unwrap();
        store.health().await.unwrap();
    }

    #[tokio::test]
    async fn reopening_finds_everything() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/store");
        let store = RedbStore::open(&path).unwrap();
        let epoch = store.epoch();
        store.commit(put("a").put(key("gone"), Bytes::new())).await.unwrap();
        let head = store.commit(put("b").delete(key("gone"))).await.unwrap();
        let row = store.get(&key("a")).await.unwrap();
        let feed = store.changes(Revision::START, 100).await.unwrap();
        drop(store);

        let store = RedbStore::open(&path).unwrap();
        assert_eq!((store.epoch(), store.head().await), (epoch, head));
        assert_eq!(store.get(&key("a")).await.unwrap(), row);
        assert_eq!(store.get(&key("gone")).await.unwrap(), None);
        assert_eq!(store.changes(Revision::START, 100).await.unwrap(), feed);
        assert!(store.commit(put("c")).await.unwrap() > head);
    }

    #[tokio::test]
    async fn a_file_that_was_never_closed_has_every_acknowledged_commit() {
        let dir = tempfile::tempdir().unwrap();
        let store = RedbStore::open(&dir.path().join("store")).unwrap();
        for n in 0..20 {
            store.commit(put(&n.to_string())).await.unwrap();
        }
        let left_behind = dir.path().join("left-behind");
        std::fs::copy(dir.path().join("store"), &left_behind).unwrap();

        let found = RedbStore::open(&left_behind).unwrap();
        assert_eq!(found.head().await, Revision::from_u64(20));
        assert!(found.get(&key("19")).await.unwrap().is_some());
    }

    #[test]
    fn only_its_owner_may_read_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/store");
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
        drop(RedbStore::open(&path).unwrap());
        assert_eq!((mode(path.parent().unwrap()), mode(&path)), (0o700, 0o600));

        std::fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        drop(RedbStore::open(&path).unwrap());
        assert_eq!(mode(&path), 0o600);
    }

    #[test]
    fn a_file_in_use_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        let _first = RedbStore::open(&path).unwrap();
        assert!(matches!(RedbStore::open(&path), Err(OpenError::InUse { .. })));
    }

    #[test]
    fn another_format_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        drop(RedbStore::open(&path).unwrap());
        let database = Database::open(&path).unwrap();
        let write = database.begin_write().unwrap();
        write.open_table(STORE).unwrap().insert(FORMAT, 2).unwrap();
        write.commit().unwrap();
        drop(database);
        assert!(matches!(RedbStore::open(&path), Err(OpenError::Format { found: 2 })));
    }

    #[test]
    fn keys_are_found_as_they_were_encoded() {
        let tenant = TenantId::parse("acme").unwrap();
        for key in [Key::installation(Space::Tenant, ""), Key::new(&tenant, Space::SecretVersion, "a/b\0ä")]
        {
            assert_eq!(decode(&encode(&key)).unwrap(), key);
        }
        for malformed in [&b""[..], b"acme", b"acme\0", b"ACME\0\x01", b"acme\0\xff", b"\0\x01\xff"] {
            assert!(matches!(decode(malformed), Err(StoreError::Corrupt(_))));
        }
    }
}
