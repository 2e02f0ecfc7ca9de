//! Which nodes follow, and what is in force on each: the difference between "accepted" and "in force".

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use scaivault_domain::tenant::{NodeName, TenantId};
use scaivault_domain::time::{Clock, Timestamp};
use scaivault_domain::view::Generation;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, WaitForCancellationFuture};

use crate::publisher::{Progress, Publisher};
use crate::serve::{NodeIdentity, Tenants};

/// How one node stands. Kept after the node is gone: what it was last known to hold, it still holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeStatus {
    /// The node.
    pub name: NodeName,
    /// Whether it has a stream open.
    pub connected: bool,
    /// Its build; empty before it said hello.
    pub build: String,
    /// When it last said something, or connected.
    pub last_seen: Timestamp,
    /// What it was sent and acknowledged.
    pub progress: Progress,
    /// The last thing besides a view that it refused on this stream.
    pub refusal: Option<String>,
}

struct Entry {
    status: NodeStatus,
    tenants: Tenants,
    stream: u64,
    replaced: CancellationToken,
}

/// How every node stands that has connected since the start.
pub struct NodeBoard {
    clock: Arc<dyn Clock>,
    nodes: Mutex<HashMap<NodeName, Entry>>,
    changed: watch::Sender<u64>,
}

impl NodeBoard {
    /// An empty board.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        NodeBoard { clock, nodes: Mutex::default(), changed: watch::Sender::new(0) }
    }

    /// How a node stands; `None` if it has not connected since the start.
    pub fn snapshot(&self, name: &NodeName) -> Option<NodeStatus> {
        self.lock().get(name).map(|entry| entry.status.clone())
    }

    /// How every node stands, by name.
    pub fn snapshots(&self) -> Vec<NodeStatus> {
        let mut all: Vec<_> = self.lock().values().map(|entry| entry.status.clone()).collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// How many connected nodes serve `tenant`.
    pub fn serving(&self, tenant: &TenantId) -> usize {
        let nodes = self.lock();
        nodes.values().filter(|entry| entry.status.connected && entry.tenants.serves(tenant)).count()
    }

    /// Changes whenever a status does.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// The connected nodes that serve `tenant` and have not acknowledged `generation` or a later one.
    pub fn pending(&self, tenant: &TenantId, generation: Generation) -> Vec<NodeName> {
        self.waiting(tenant, generation).into_iter().map(|(name, _)| name).collect()
    }

    /// Waits until every connected node of the tenant has acknowledged or refused `generation`, at most for `timeout`.
    /// Answers those that have not acknowledged it, by name.
    pub async fn acknowledged(
        &self,
        tenant: &TenantId,
        generation: Generation,
        timeout: Duration,
    ) -> Vec<NodeName> {
        let mut changed = self.changed.subscribe();
        let settled = async {
            while self.waiting(tenant, generation).iter().any(|(_, refused)| !refused) {
                changed.changed().await.expect("the board outlives the borrow of itself");
            }
        };
        // Out of time or not: who is still pending is the answer.
        let _ = tokio::time::timeout(timeout, settled).await;
        self.pending(tenant, generation)
    }

    /// Those who have not acknowledged, each with whether it refused.
    fn waiting(&self, tenant: &TenantId, generation: Generation) -> Vec<(NodeName, bool)> {
        let nodes = self.lock();
        let concerned = nodes.values().filter(|entry| entry.status.connected && entry.tenants.serves(tenant));
        let mut waiting: Vec<_> = concerned
            .filter_map(|entry| {
                let view = entry.status.progress.views.get(tenant);
                let acknowledged =
                    view.and_then(|view| view.acknowledged).is_some_and(|held| held >= generation);
                let refusal = view.and_then(|view| view.refusal.as_ref());
                let refused = refusal.is_some_and(|refusal| refusal.generation >= generation);
                (!acknowledged).then(|| (entry.status.name.clone(), refused))
            })
            .collect();
        waiting.sort();
        waiting
    }

    /// Puts a new stream of a node up; the one before it, if any, is told to end.
    pub(crate) fn connect(self: &Arc<Self>, node: &NodeIdentity) -> Session {
        let replaced = CancellationToken::new();
        let mut nodes = self.lock();
        let before = nodes.remove(&node.name);
        let stream = before.as_ref().map_or(0, |entry| entry.stream) + 1;
        let progress = before.map_or_else(Progress::default, |entry| {
            entry.replaced.cancel();
            entry.status.progress
        });
        let status = NodeStatus {
            name: node.name.clone(),
            connected: true,
            build: String::new(),
            last_seen: self.clock.now(),
            progress,
            refusal: None,
        };
        let entry = Entry { status, tenants: node.tenants.clone(), stream, replaced: replaced.clone() };
        nodes.insert(node.name.clone(), entry);
        drop(nodes);
        self.notify();
        Session { board: self.clone(), name: node.name.clone(), stream, replaced }
    }

    fn notify(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<NodeName, Entry>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for NodeBoard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NodeBoard").field("nodes", &self.lock().len()).finish_non_exhaustive()
    }
}

/// The place of one stream on the board. The node counts as disconnected when it is dropped, unless it was replaced.
pub(crate) struct Session {
    board: Arc<NodeBoard>,
    name: NodeName,
    stream: u64,
    replaced: CancellationToken,
}

impl Session {
    /// Ends when the node has opened another stream.
    pub(crate) fn replaced(&self) -> WaitForCancellationFuture<'_> {
        self.replaced.cancelled()
    }

    /// The time by the board's clock.
    pub(crate) fn now(&self) -> Timestamp {
        self.board.clock.now()
    }

    /// The node said something.
    pub(crate) fn seen(&self) {
        let now = self.now();
        self.update(|status| status.last_seen = now);
    }

    /// Shows how the node stands.
    pub(crate) fn show(&self, publisher: &Publisher) {
        let (build, progress) = (publisher.build(), publisher.progress());
        self.update(|status| {
            build.clone_into(&mut status.build);
            status.progress = progress;
        });
        self.board.notify();
    }

    /// Shows what the node refused.
    pub(crate) fn refused(&self, message: &str) {
        self.update(|status| status.refusal = Some(message.to_owned()));
        self.board.notify();
    }

    fn update(&self, change: impl FnOnce(&mut NodeStatus)) {
        if let Some(entry) = self.board.lock().get_mut(&self.name).filter(|entry| entry.stream == self.stream)
        {
            change(&mut entry.status);
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.update(|status| status.connected = false);
        self.board.notify();
    }
}
