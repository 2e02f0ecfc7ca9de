//! The store in memory, for tests and simulation: the same promises, except that nothing outlives the process.
//!
//! It never leaves the calling task, so it also works under paused time.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use tokio::sync::watch;

use super::{
    Change, ChangeKind, Changes, CommitError, Depth, Entry, Epoch, FEED_LENGTH, FeedError, Key, Op, Owner,
    Query, Revision, Row, Space, Store, StoreError, Tx,
};

/// A store that is gone with its process.
pub struct MemoryStore {
    epoch: Epoch,
    state: Mutex<State>,
    head: watch::Sender<Revision>,
}

#[derive(Default)]
struct State {
    head: Revision,
    rows: BTreeMap<Key, Row>,
    feed: BTreeMap<(Revision, Key), ChangeKind>,
    /// The newest revision of which the feed has lost something.
    trimmed: Revision,
}

impl MemoryStore {
    /// An empty store.
    pub fn new() -> Self {
        MemoryStore {
            epoch: Epoch::random(),
            state: Mutex::default(),
            head: watch::Sender::new(Revision::START),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for MemoryStore {
    fn default() -> Self {
        MemoryStore::new()
    }
}

impl State {
    fn commit(&mut self, tx: Tx) -> Result<Revision, CommitError> {
        for (key, precondition) in tx.preconditions {
            if !precondition.holds(self.rows.get(&key).map(|row| row.version)) {
                return Err(CommitError::Precondition(key));
            }
        }
        let revision = self.head.next();
        self.head = revision;
        for op in tx.ops {
            match op {
                Op::Put(key, value) => {
                    self.rows.insert(key.clone(), Row { version: revision, value });
                    self.announce(key, ChangeKind::Put);
                }
                Op::Delete(key) => {
                    if self.rows.remove(&key).is_some() {
                        self.announce(key, ChangeKind::Deleted);
                    }
                }
            }
        }
        while self.feed.len() > FEED_LENGTH
            && let Some(((revision, _), _)) = self.feed.pop_first()
        {
            self.trimmed = revision;
        }
        Ok(revision)
    }

    fn announce(&mut self, key: Key, kind: ChangeKind) {
        if key.space.is_fed() {
            self.feed.insert((self.head, key), kind);
        }
    }
}

#[async_trait]
impl Store for MemoryStore {
    async fn get(&self, key: &Key) -> Result<Option<Row>, StoreError> {
        Ok(self.state().rows.get(key).cloned())
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
        let state = self.state();
        Query::new(prefix, depth, after, limit).run(
            |start| {
                let start = start.map(|name| Key::new(owner.clone(), space, name));
                let rows = state.rows.range((start, Bound::Unbounded));
                let rows = rows.take_while(|(key, _)| key.owner == *owner && key.space == space);
                Ok(rows.map(|(key, row)| Ok((key.name.clone(), row))))
            },
            Row::clone,
        )
    }

    async fn commit(&self, tx: Tx) -> Result<Revision, CommitError> {
        let mut state = self.state();
        let revision = state.commit(tx)?;
        self.head.send_replace(revision);
        Ok(revision)
    }

    async fn changes(&self, cursor: Revision, max: usize) -> Result<Changes, FeedError> {
        let state = self.state();
        if cursor < state.trimmed || cursor > state.head {
            return Err(FeedError::Expired);
        }
        let least_key = Key::installation(Space::Tenant, "");
        let feed = state
            .feed
            .range((cursor.next(), least_key)..)
            .map(|((revision, key), kind)| Ok(Change { revision: *revision, key: key.clone(), kind: *kind }));
        Changes::collect(feed, max, state.head)
    }

    async fn head(&self) -> Revision {
        self.state().head
    }

    fn wake(&self) -> watch::Receiver<Revision> {
        self.head.subscribe()
    }

    fn epoch(&self) -> Epoch {
        self.epoch
    }

    fn is_exclusive(&self) -> bool {
        true
    }

    async fn health(&self) -> Result<(), StoreError> {
        Ok(())
    }
}
