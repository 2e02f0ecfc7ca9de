//! The store: rows under `(owner, space, name)`, changed by transactions and by nothing else.
//!
//! Layout. A row belongs to an [`Owner`] (a tenant or the installation), stands in a [`Space`] (a closed set with
//! stable codes) and has a name. The owner comes first in every encoded key, so no scan can leave its tenant. An
//! engine keeps three things: the rows, the feed (which row changed in which revision), and a few numbers about
//! itself.
//!
//! What is atomic. One [`Tx`]: all its operations or none, and its part of the feed with them. Indexes, events and
//! audit rows are rows of the same `Tx`. [`Store::commit`] is durable when it answers `Ok`. Engines may commit many
//! `Tx` in one go; each still succeeds or fails by its own preconditions, in the order in which they came.
//!
//! Versions. Every successful commit takes the next [`Revision`], and a row's version is the revision that wrote it.
//! Revisions are never used twice, so a row that was deleted and written again never has its old version (no ABA).
//!
//! Values. An engine knows nothing of them: [`Records`] seals every value, bound to its place, before it gets here.
//!
//! Jobs. Work that must survive crashes is rows, too: see [`jobs`].
//!
//! Engines: [`RedbStore`] for one machine, [`MemoryStore`] for tests. One conformance suite runs over both.

use std::error::Error as StdError;
use std::fmt;
use std::ops::Bound;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use scaivault_domain::tenant::TenantId;
use scaivault_domain::{Error, Reason};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

pub mod jobs;

mod memory;
mod records;
mod redb;

#[cfg(test)]
mod conformance;

pub use self::memory::MemoryStore;
pub use self::records::Records;
pub use self::redb::{OpenError, RedbStore};

/// How many changes the feed keeps. A follower that falls further behind starts over with a scan.
pub const FEED_LENGTH: usize = 100_000;

/// Whose a row is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Owner {
    /// Nobody's in particular: tenants, nodes, keys of the installation.
    Installation,
    /// One tenant's.
    Tenant(TenantId),
}

impl Owner {
    /// The tenant's id, or `""`, which is no tenant's id.
    pub fn as_str(&self) -> &str {
        match self {
            Owner::Installation => "",
            Owner::Tenant(tenant) => tenant.as_str(),
        }
    }
}

impl From<&TenantId> for Owner {
    fn from(tenant: &TenantId) -> Self {
        Owner::Tenant(tenant.clone())
    }
}

/// What kind of row it is. The codes are part of the file format and of the seal: never renumber.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Space {
    /// A tenant.
    Tenant = 1,
    /// The row that every change of a tenant's configuration expects and rewrites, so that they serialise.
    Generation = 2,
    /// A backend.
    Backend = 3,
    /// A policy.
    Policy = 4,
    /// A token.
    Token = 5,
    /// A node.
    Node = 6,
    /// An invitation to a node.
    JoinToken = 7,
    /// The head of a secret: its current version and metadata.
    Secret = 8,
    /// One version of a secret, with its value.
    SecretVersion = 9,
    /// An event in the outbox.
    Event = 10,
    /// An audit row that is not in a segment yet.
    AuditRow = 11,
    /// A packed segment of audit rows.
    AuditSegment = 12,
    /// The newest link of an audit chain.
    AuditHead = 13,
    /// What the installation knows about itself: its CA, its key ring.
    Setting = 14,
    /// A part of a job.
    Job = 15,
    /// The report of a sync run.
    Run = 16,
    /// What the last sync cycles of a backend found.
    SyncState = 17,
    /// What a sync run did to single paths.
    RunDetail = 18,
}

impl Space {
    /// Every space.
    pub const ALL: &'static [Space] = &[
        Space::Tenant,
        Space::Generation,
        Space::Backend,
        Space::Policy,
        Space::Token,
        Space::Node,
        Space::JoinToken,
        Space::Secret,
        Space::SecretVersion,
        Space::Event,
        Space::AuditRow,
        Space::AuditSegment,
        Space::AuditHead,
        Space::Setting,
        Space::Job,
        Space::Run,
        Space::SyncState,
        Space::RunDetail,
    ];

    /// The stable code.
    pub fn code(self) -> u8 {
        self as u8
    }

    /// The space with this code.
    pub fn from_code(code: u8) -> Option<Space> {
        Space::ALL.iter().copied().find(|space| space.code() == code)
    }

    /// Whether changes appear in the feed. What nobody follows does not: it would drown the rest. Of a secret, the head
    /// is followed.
    pub fn is_fed(self) -> bool {
        !matches!(
            self,
            Space::SecretVersion
                | Space::AuditRow
                | Space::AuditSegment
                | Space::AuditHead
                | Space::Job
                | Space::Run
                | Space::RunDetail
        )
    }
}

/// Where a row is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// Whose it is.
    pub owner: Owner,
    /// What kind of row it is.
    pub space: Space,
    /// Unique in its owner and space; ordered by its bytes.
    pub name: String,
}

impl Key {
    /// The key of `owner`'s row.
    pub fn new(owner: impl Into<Owner>, space: Space, name: impl Into<String>) -> Self {
        Key { owner: owner.into(), space, name: name.into() }
    }

    /// The key of a row of the installation.
    pub fn installation(space: Space, name: impl Into<String>) -> Self {
        Key::new(Owner::Installation, space, name)
    }
}

/// The number of a commit; the first is 1. Also a cursor into the feed: what came after that commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Revision(u64);

impl Revision {
    /// Before the first commit.
    pub const START: Revision = Revision(0);

    /// The revision with this number.
    pub const fn from_u64(number: u64) -> Self {
        Revision(number)
    }

    /// Its number.
    pub const fn as_u64(self) -> u64 {
        self.0
    }

    fn next(self) -> Self {
        Revision(self.0 + 1)
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// The revision of the commit that wrote a row.
pub type RowVersion = Revision;

/// Random and made with the store: revisions of different epochs have nothing to do with each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Epoch(u128);

impl Epoch {
    /// The epoch as bytes.
    pub fn to_bytes(self) -> [u8; 16] {
        self.0.to_be_bytes()
    }

    fn random() -> Self {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).expect("without the system's randomness no key could be made either");
        Epoch(u128::from_be_bytes(bytes))
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// A row as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// What [`Tx::expect`] takes.
    pub version: RowVersion,
    /// The bytes that were put.
    pub value: Bytes,
}

/// What must hold for a [`Tx`] to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precondition {
    /// There is no such row.
    Absent,
    /// The row is as it was read.
    Version(RowVersion),
}

impl Precondition {
    fn holds(self, found: Option<RowVersion>) -> bool {
        match self {
            Precondition::Absent => found.is_none(),
            Precondition::Version(version) => found == Some(version),
        }
    }
}

/// One step of a [`Tx`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Writes the row, whether or not it exists.
    Put(Key, Bytes),
    /// Deletes the row; nothing if there is none.
    Delete(Key),
}

/// A transaction: preconditions that are checked against what is stored, then operations in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tx {
    preconditions: Vec<(Key, Precondition)>,
    ops: Vec<Op>,
}

impl Tx {
    /// A transaction that changes nothing.
    pub fn new() -> Self {
        Tx::default()
    }

    /// Fails the transaction unless `key` is absent.
    #[must_use]
    pub fn expect_absent(mut self, key: Key) -> Self {
        self.preconditions.push((key, Precondition::Absent));
        self
    }

    /// Fails the transaction unless `key` has this version.
    #[must_use]
    pub fn expect(mut self, key: Key, version: RowVersion) -> Self {
        self.preconditions.push((key, Precondition::Version(version)));
        self
    }

    /// As [`expect`](Self::expect), and judged before what is expected already.
    fn expect_first(mut self, key: Key, version: RowVersion) -> Self {
        self.preconditions.insert(0, (key, Precondition::Version(version)));
        self
    }

    /// Fails the transaction unless `key` is as it was found: absent, or of this version.
    #[must_use]
    pub fn expect_as_found(self, key: Key, found: Option<RowVersion>) -> Self {
        match found {
            None => self.expect_absent(key),
            Some(version) => self.expect(key, version),
        }
    }

    /// Writes a row.
    #[must_use]
    pub fn put(mut self, key: Key, value: Bytes) -> Self {
        self.ops.push(Op::Put(key, value));
        self
    }

    /// Deletes a row.
    #[must_use]
    pub fn delete(mut self, key: Key) -> Self {
        self.ops.push(Op::Delete(key));
        self
    }
}

/// How much of a tree of names a scan shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// Every row below the prefix.
    All,
    /// Rows and folders directly below the prefix. A folder ends at the next `/`.
    Children,
}

/// One line of a scan. `a` and `a/` may both exist.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry<R = Row> {
    /// A row.
    Row {
        /// Its whole name.
        name: String,
        /// What stands there.
        row: R,
    },
    /// At least one row has a name that begins with this one's.
    Folder {
        /// The whole name, ending in `/`.
        name: String,
    },
}

impl<R> Entry<R> {
    /// The name, which is where the next page continues.
    pub fn name(&self) -> &str {
        match self {
            Entry::Row { name, .. } | Entry::Folder { name } => name,
        }
    }
}

/// What happened to a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ChangeKind {
    /// It was written.
    Put,
    /// It is gone.
    Deleted,
}

/// One line of the feed. A commit that touches a row more than once has one line for it, with how it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The commit.
    pub revision: Revision,
    /// The row.
    pub key: Key,
    /// What happened to it.
    pub kind: ChangeKind,
}

/// A page of the feed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changes {
    /// In the order of revisions; whole commits.
    pub changes: Vec<Change>,
    /// Where the next page begins. Equal to the cursor if nothing has been committed since.
    pub next: Revision,
}

impl Changes {
    /// Takes whole commits until there are `max` changes. At least one commit, so that a cursor always moves.
    fn collect<E>(
        feed: impl Iterator<Item = Result<Change, E>>,
        max: usize,
        head: Revision,
    ) -> Result<Changes, E> {
        let mut changes: Vec<Change> = Vec::new();
        for change in feed {
            let change = change?;
            match changes.last() {
                Some(last) if changes.len() >= max && last.revision != change.revision => {
                    return Ok(Changes { next: last.revision, changes });
                }
                _ => changes.push(change),
            }
        }
        Ok(Changes { changes, next: head })
    }
}

/// Why the store did not answer. Cheap to clone: one failure may answer many callers.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    /// The storage does not work now. Try again later; if it stays so, the operator has to look.
    #[error("the store is unavailable")]
    Unavailable(#[source] Arc<dyn StdError + Send + Sync>),
    /// What is stored is not what was written. Trying again does not help; a restore does.
    #[error("the store is corrupt: {0}")]
    Corrupt(String),
}

impl StoreError {
    fn unavailable(cause: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        StoreError::Unavailable(cause.into().into())
    }
}

impl From<StoreError> for Error {
    /// Logs the cause: the caller is not told.
    fn from(error: StoreError) -> Self {
        tracing::error!(error = &error as &(dyn StdError + 'static), "the store failed");
        match error {
            StoreError::Unavailable(_) => Error::new(Reason::Unavailable, "the store does not answer")
                .next("try again")
                .retry_after(Duration::from_secs(1)),
            StoreError::Corrupt(_) => Error::internal(),
        }
    }
}

/// Why a [`Tx`] was not acknowledged.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CommitError {
    /// This key was not as expected, and nothing happened. Read again and decide again.
    #[error("a row of {:?} is not as expected", .0.space)]
    Precondition(Key),
    /// It is unknown whether the transaction happened: all of it or nothing. Read before trying again.
    #[error(transparent)]
    Unavailable(#[from] StoreError),
}

/// Why there is no page of the feed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum FeedError {
    /// The feed does not reach back to the cursor, or never was where the cursor is: take [`Store::head`], scan,
    /// and follow from there.
    #[error("the feed does not have this cursor any more")]
    Expired,
    /// The store does not answer.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Durable rows. The only verb that changes anything is [`commit`](Store::commit).
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// The row at `key`.
    async fn get(&self, key: &Key) -> Result<Option<Row>, StoreError>;

    /// At most `limit` entries whose names begin with `prefix` and come after `after`, in the order of their bytes.
    /// A folder is passed by a seek, however much it holds.
    async fn scan(
        &self,
        owner: &Owner,
        space: Space,
        prefix: &str,
        depth: Depth,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<Entry>, StoreError>;

    /// Does all of `tx` or nothing; durable on `Ok`. The first precondition that does not hold is named.
    ///
    /// A transaction whose caller has gone away may still happen.
    async fn commit(&self, tx: Tx) -> Result<Revision, CommitError>;

    /// What changed after `cursor`: whole commits, in order, about `max` changes.
    async fn changes(&self, cursor: Revision, max: usize) -> Result<Changes, FeedError>;

    /// The newest revision. Take it before a scan, then follow the feed from it, and nothing is missed.
    async fn head(&self) -> Revision;

    /// Moves when there may be something new in the feed. A hint: follow the feed by its cursor.
    fn wake(&self) -> watch::Receiver<Revision>;

    /// The epoch of this store.
    fn epoch(&self) -> Epoch;

    /// Whether no other process can use the store while this one has it open.
    fn is_exclusive(&self) -> bool;

    /// Whether the store can be read and takes writes.
    async fn health(&self) -> Result<(), StoreError>;
}

/// The part of a scan that does not depend on the engine.
struct Query {
    prefix: String,
    depth: Depth,
    after: Option<String>,
    limit: usize,
}

impl Query {
    fn new(prefix: &str, depth: Depth, after: Option<&str>, limit: usize) -> Self {
        Query { prefix: prefix.to_owned(), depth, after: after.map(str::to_owned), limit }
    }

    /// Runs over rows in the order of their names. `rows_from` seeks; `read` turns what the engine found into a row
    /// and is not called for what a folder hides.
    fn run<F, I>(
        &self,
        mut rows_from: impl FnMut(Bound<&str>) -> Result<I, StoreError>,
        read: impl Fn(F) -> Row,
    ) -> Result<Vec<Entry>, StoreError>
    where
        I: Iterator<Item = Result<(String, F), StoreError>>,
    {
        let mut page = Vec::new();
        let mut start = self.start();
        'seek: loop {
            let mut rows = rows_from(start.as_ref().map(String::as_str))?;
            while page.len() < self.limit
                && let Some((name, found)) = rows.next().transpose()?
                && name.starts_with(&self.prefix)
            {
                if let Some(folder) = self.folder_of(&name) {
                    start = Bound::Included(after_folder(folder));
                    page.push(Entry::Folder { name: folder.to_owned() });
                    continue 'seek;
                }
                page.push(Entry::Row { name, row: read(found) });
            }
            return Ok(page);
        }
    }

    fn start(&self) -> Bound<String> {
        match self.after.as_deref() {
            Some(after) if *after >= *self.prefix => match self.folder_of(after) {
                Some(folder) => Bound::Included(after_folder(folder)),
                None => Bound::Excluded(after.to_owned()),
            },
            _ => Bound::Included(self.prefix.clone()),
        }
    }

    /// The folder that stands for `name` in this scan.
    fn folder_of<'n>(&self, name: &'n str) -> Option<&'n str> {
        let below = match self.depth {
            Depth::All => return None,
            Depth::Children => name.strip_prefix(&self.prefix)?,
        };
        below.find('/').map(|slash| &name[..=self.prefix.len() + slash])
    }
}

/// The least name after everything in `folder`, which ends in `/`: `0` is the byte after `/`.
fn after_folder(folder: &str) -> String {
    format!("{}0", folder.strip_suffix('/').expect("folders end in a slash"))
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn codes_are_stable() {
        let codes: Vec<u8> = Space::ALL.iter().map(|space| space.code()).collect();
        assert_eq!(codes, (1..=18).collect::<Vec<u8>>());
        for space in Space::ALL {
            assert_eq!(Space::from_code(space.code()), Some(*space));
        }
        assert_eq!(Space::from_code(0), None);
    }

    #[test]
    fn a_folder_is_passed_without_walking_it() {
        let names: BTreeSet<String> =
            (0..3).flat_map(|folder| (0..1000).map(move |row| format!("{folder}/{row}"))).collect();
        let walked = Cell::new(0);
        let rows_from = |start: Bound<&str>| {
            let rows = names.range::<str, _>((start, Bound::Unbounded));
            Ok(rows.inspect(|_| walked.set(walked.get() + 1)).map(|name| Ok((name.clone(), ()))))
        };
        let query = Query::new("", Depth::Children, None, 10);
        let entries = query.run(rows_from, |()| unreachable!("a folder's rows are not read")).unwrap();
        assert_eq!(entries.iter().map(Entry::name).collect::<Vec<_>>(), ["0/", "1/", "2/"]);
        assert_eq!(walked.get(), 3);
    }

    #[test]
    fn an_outage_can_be_tried_again_and_corruption_cannot() {
        let outage = Error::from(StoreError::unavailable("disk"));
        assert_eq!(outage.reason, Reason::Unavailable);
        assert!(outage.retry_after.is_some());
        assert_eq!(Error::from(StoreError::Corrupt("row".into())).reason, Reason::Internal);
    }
}
