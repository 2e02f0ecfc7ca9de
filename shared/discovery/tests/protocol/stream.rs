//! Both loops over a real HTTP/2 connection through a pipe in memory. Time is paused: it passes when all wait for it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::Stream;
use hyper_util::rt::TokioIo;
use scaivault_discovery::{
    Change, Demand, Demands, Desired, Found, LeaseState, Mark, NodeBoard, NodeIdentity, PrefetchProgress,
    Restored, SecretChanges, Sink, Source, Subscriber, Surveyed, Tenants, delta_stream, follow,
};
use scaivault_domain::access::Caller;
use scaivault_domain::lease::LeaseKey;
use scaivault_domain::path::SecretPath;
use scaivault_domain::replica::{Absence, Freshness, SecretKey, Stamp};
use scaivault_domain::secret::State;
use scaivault_domain::tenant::{NodeName, TenantId};
use scaivault_domain::time::{Clock, Timestamp};
use scaivault_domain::token::TokenHash;
use scaivault_domain::view::TenantView;
use scaivault_proto::discovery::v1::discovery_service_client::DiscoveryServiceClient;
use scaivault_proto::discovery::v1::discovery_service_server::{DiscoveryService, DiscoveryServiceServer};
use scaivault_proto::discovery::v1::{
    DeltaRequest, DeltaResponse, RenewCertificateRequest, RenewCertificateResponse, ShipSegmentRequest,
    ShipSegmentResponse,
};
use tokio::io::DuplexStream;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Code, Request, Response, Status, Streaming};

use crate::fixtures::{
    Held, caller, hash, key, large_view, lease, overlapping_view, prefetched_view, tenant, view,
};
use crate::shelf::{Shelf, owning, secret};

/// What is committed.
#[derive(Default)]
struct Store {
    /// The newest revision that was not of a secret.
    concerned: u64,
    shelf: Shelf,
    freshness: BTreeMap<LeaseKey, Arc<Freshness>>,
    views: BTreeMap<TenantId, Arc<TenantView>>,
    grants: HashMap<TokenHash, (u64, Arc<Caller>)>,
    leases: HashMap<LeaseKey, LeaseState>,
}

struct ControlPlane {
    store: Mutex<Store>,
    wake: watch::Sender<u64>,
    feed: watch::Sender<Mark>,
    refused: Mutex<Vec<(LeaseKey, String)>>,
    diffs: AtomicU32,
    board: Arc<NodeBoard>,
    shutdown: Mutex<CancellationToken>,
}

struct Stopped;

impl Clock for Stopped {
    fn now(&self) -> Timestamp {
        Timestamp::from_millis(42)
    }
}

impl ControlPlane {
    fn start() -> Arc<Self> {
        Arc::new(ControlPlane {
            store: Mutex::default(),
            wake: watch::Sender::new(0),
            feed: watch::Sender::default(),
            refused: Mutex::default(),
            diffs: AtomicU32::new(0),
            board: Arc::new(NodeBoard::new(Arc::new(Stopped))),
            shutdown: Mutex::default(),
        })
    }

    fn commit(&self, change: impl FnOnce(&mut Store)) {
        self.commit_in_silence(change);
        self.wake.send_modify(|count| *count += 1);
    }

    fn commit_in_silence(&self, change: impl FnOnce(&mut Store)) {
        let mut store = self.store.lock().unwrap();
        store.concerned = store.shelf.commit();
        change(&mut store);
        self.feed.send_replace(Mark { revision: store.shelf.revision, concerned: store.concerned });
    }

    /// A commit that nothing but a secret is in.
    fn write(&self, change: impl FnOnce(&mut Shelf)) {
        let mut store = self.store.lock().unwrap();
        change(&mut store.shelf);
        self.feed.send_replace(Mark { revision: store.shelf.revision, concerned: store.concerned });
    }

    fn set_view(&self, view: Arc<TenantView>) {
        self.commit(|store| drop(store.views.insert(view.tenant.clone(), view)));
    }

    /// Ends every stream, as a restart does.
    fn restart(&self) {
        std::mem::take(&mut *self.shutdown.lock().unwrap()).cancel();
    }
}

#[tonic::async_trait]
impl Source for ControlPlane {
    fn wake(&self) -> watch::Receiver<u64> {
        self.wake.subscribe()
    }

    async fn desired(&self, _: &NodeIdentity, demands: &Demands) -> Result<Desired, Status> {
        self.diffs.fetch_add(1, Ordering::Relaxed);
        let store = self.store.lock().unwrap();
        Ok(Desired {
            epoch: "e1".into(),
            revision: store.shelf.revision,
            views: store.views.clone(),
            grants: demands.grants.iter().map(|hash| (*hash, store.grants.get(hash).cloned())).collect(),
            leases: store.leases.clone(),
            freshness: store.freshness.clone(),
        })
    }

    fn feed(&self) -> watch::Receiver<Mark> {
        self.feed.subscribe()
    }

    async fn changed(&self, cursor: u64, max: usize) -> Result<Option<SecretChanges>, Status> {
        Ok(self.store.lock().unwrap().shelf.changed(cursor, max))
    }

    async fn secrets(
        &self,
        _: &NodeIdentity,
        keys: &[SecretKey],
        enough: usize,
    ) -> Result<Vec<Found>, Status> {
        Ok(self.store.lock().unwrap().shelf.look(keys, enough))
    }

    async fn survey(
        &self,
        tenant: &TenantId,
        after: Option<&SecretPath>,
        max: usize,
    ) -> Result<Vec<Surveyed>, Status> {
        Ok(self.store.lock().unwrap().shelf.survey(tenant, after, max))
    }

    async fn lease_refused(&self, _: &NodeIdentity, key: &LeaseKey, lease_id: &str) {
        self.refused.lock().unwrap().push((key.clone(), lease_id.to_owned()));
        let number = key.tenant.as_str().as_bytes()[7] - b'0';
        self.commit(|store| {
            drop(store.leases.insert(key.clone(), LeaseState::Held(lease(number, "second"))))
        });
    }
}

/// The control plane as one node's certificate lets it appear.
struct AsSeenBy(Arc<ControlPlane>, NodeIdentity);

type Responses = Pin<Box<dyn Stream<Item = Result<DeltaResponse, Status>> + Send>>;

#[tonic::async_trait]
impl DiscoveryService for AsSeenBy {
    type DeltaStream = Responses;

    async fn delta(&self, request: Request<Streaming<DeltaRequest>>) -> Result<Response<Responses>, Status> {
        let AsSeenBy(plane, node) = self;
        let shutdown = plane.shutdown.lock().unwrap().clone();
        let stream =
            delta_stream(plane.clone(), plane.board.clone(), node.clone(), request.into_inner(), shutdown);
        Ok(Response::new(Box::pin(stream)))
    }

    async fn ship_segment(
        &self,
        _: Request<ShipSegmentRequest>,
    ) -> Result<Response<ShipSegmentResponse>, Status> {
        Err(Status::new(Code::Unimplemented, "not here"))
    }

    async fn renew_certificate(
        &self,
        _: Request<RenewCertificateRequest>,
    ) -> Result<Response<RenewCertificateResponse>, Status> {
        Err(Status::new(Code::Unimplemented, "not here"))
    }
}

/// What a node holds, and how often it was connected.
struct Node {
    held: watch::Sender<Held>,
    connected: watch::Sender<(u32, bool)>,
    demands: mpsc::Sender<Demand>,
    wire: Arc<Wire>,
    shutdown: CancellationToken,
}

struct Recorder {
    held: watch::Sender<Held>,
    connected: watch::Sender<(u32, bool)>,
}

impl Sink for Recorder {
    fn apply(&self, changes: Vec<Change>, _: &str, revision: u64) {
        self.held.send_modify(|held| held.apply(changes, revision));
    }

    fn connected(&self) {
        self.connected.send_modify(|(times, now)| (*times, *now) = (*times + 1, true));
    }

    fn expelled(&self) {}

    fn disconnected(&self) {
        self.connected.send_modify(|(_, now)| *now = false);
    }
}

/// The connections of one node, which can be cut.
struct Wire {
    accept: mpsc::UnboundedSender<std::io::Result<DuplexStream>>,
    cut: Mutex<CancellationToken>,
}

impl Wire {
    fn dial(&self) -> DuplexStream {
        let (client, mut near) = tokio::io::duplex(64 * 1024);
        let (mut far, server) = tokio::io::duplex(64 * 1024);
        let cut = self.cut.lock().unwrap().clone();
        tokio::spawn(async move {
            cut.run_until_cancelled(tokio::io::copy_bidirectional(&mut near, &mut far)).await;
        });
        self.accept.send(Ok(server)).expect("the server listens");
        client
    }

    fn cut(&self) {
        std::mem::take(&mut *self.cut.lock().unwrap()).cancel();
    }

    async fn channel(self: Arc<Self>) -> Result<Channel, tonic::transport::Error> {
        let connector = tower::service_fn(move |_| {
            let stream = TokioIo::new(self.dial());
            async move { Ok::<_, std::io::Error>(stream) }
        });
        Endpoint::from_static("http://control-plane").connect_with_connector(connector).await
    }
}

fn start_node(plane: &Arc<ControlPlane>, name: &str, tenants: Tenants) -> Node {
    start_node_with(plane, name, tenants, Subscriber::new())
}

fn start_node_with(plane: &Arc<ControlPlane>, name: &str, tenants: Tenants, subscriber: Subscriber) -> Node {
    let (accept, incoming) = mpsc::unbounded_channel();
    let identity = NodeIdentity { name: NodeName::parse(name).unwrap(), tenants };
    let service = DiscoveryServiceServer::new(AsSeenBy(plane.clone(), identity));
    tokio::spawn(
        Server::builder().add_service(service).serve_with_incoming(UnboundedReceiverStream::new(incoming)),
    );
    let wire = Arc::new(Wire { accept, cut: Mutex::default() });
    let (demands, taken) = mpsc::channel(16);
    let (held, connected) = (watch::Sender::default(), watch::Sender::default());
    let sink = Arc::new(Recorder { held: held.clone(), connected: connected.clone() });
    let shutdown = CancellationToken::new();
    let (dial, stop) = (wire.clone(), shutdown.clone());
    tokio::spawn(async move {
        let connect = || {
            let channel = dial.clone().channel();
            async { channel.await.map(DiscoveryServiceClient::new) }
        };
        follow(connect, subscriber, "0.1.0", Arc::new(Stopped), sink, taken, stop).await;
    });
    Node { held, connected, demands, wire, shutdown }
}

impl Node {
    async fn demand(&self, demand: Demand) {
        self.demands.send(demand).await.expect("the node follows");
    }

    async fn until(&self, holds: impl FnMut(&Held) -> bool) {
        until(&self.held, holds).await;
    }
}

/// Five minutes of paused time are enough for anything that will happen at all.
async fn until<T>(state: &watch::Sender<T>, holds: impl FnMut(&T) -> bool) {
    let mut state = state.subscribe();
    let waited = tokio::time::timeout(Duration::from_secs(300), state.wait_for(holds)).await;
    waited.expect("it happens").expect("the sender lives");
}

fn generation_of(held: &Held, number: u8) -> Option<u64> {
    held.views.get(&tenant(number)).map(|view| view.generation)
}

fn name(text: &str) -> NodeName {
    NodeName::parse(text).unwrap()
}

#[tokio::test(start_paused = true)]
async fn two_nodes_see_a_change_and_the_board_says_so() {
    let plane = ControlPlane::start();
    plane.set_view(view(1, 1));
    let nodes = ["node-a", "node-b"].map(|name| start_node(&plane, name, Tenants::All));
    for node in &nodes {
        node.until(|held| generation_of(held, 1) == Some(1)).await;
    }
    plane.set_view(view(1, 2));
    let pending = plane.board.acknowledged(&tenant(1), 2, Duration::from_secs(5)).await;
    assert_eq!(pending, []);
    for node in &nodes {
        assert_eq!(generation_of(&node.held.borrow(), 1), Some(2));
    }
    let status = plane.board.snapshot(&name("node-a")).unwrap();
    assert_eq!((status.connected, status.build.as_str()), (true, "0.1.0"));
    assert_eq!(plane.board.snapshots().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_cut_connection_is_replaced_and_only_differences_travel() {
    let plane = ControlPlane::start();
    plane.set_view(view(1, 1));
    plane.set_view(view(2, 1));
    let node = start_node(&plane, "node-a", Tenants::All);
    node.until(|held| held.views.len() == 2).await;
    let kept = node.held.borrow().views[&tenant(2)].clone();
    node.wire.cut();
    until(&node.connected, |(_, now)| !now).await;
    assert_eq!(node.held.borrow().views.len(), 2, "what is held stays in force");
    plane.set_view(view(1, 2));
    node.until(|held| generation_of(held, 1) == Some(2)).await;
    assert_eq!(*node.connected.borrow(), (2, true));
    assert!(Arc::ptr_eq(&kept, &node.held.borrow().views[&tenant(2)]), "not sent again");
}

#[tokio::test(start_paused = true)]
async fn a_node_comes_back_after_a_restart_of_the_control_plane() {
    let plane = ControlPlane::start();
    let node = start_node(&plane, "node-a", Tenants::All);
    for times in 1..4 {
        until(&node.connected, |state| *state == (times, true)).await;
        plane.restart();
        until(&node.connected, |(_, now)| !now).await;
    }
    node.shutdown.cancel();
    node.demands.closed().await;
}

#[tokio::test(start_paused = true)]
async fn a_demand_made_without_a_stream_is_answered_when_there_is_one() {
    let plane = ControlPlane::start();
    plane.commit(|store| drop(store.grants.insert(hash(1), (1, caller(1, 1)))));
    let node = start_node(&plane, "node-a", Tenants::All);
    until(&node.connected, |(_, now)| *now).await;
    plane.restart();
    until(&node.connected, |(_, now)| !now).await;
    node.demand(Demand::Grant(hash(1))).await;
    node.demand(Demand::Grant(hash(2))).await;
    node.until(|held| matches!(held.grants.get(&hash(1)), Some(Some((1, _))))).await;
    node.until(|held| matches!(held.grants.get(&hash(2)), Some(None))).await;
    plane.commit(|store| drop(store.grants.remove(&hash(1))));
    node.until(|held| matches!(held.grants.get(&hash(1)), Some(None))).await;
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_the_backend_refused_is_replaced() {
    let plane = ControlPlane::start();
    let node = start_node(&plane, "node-a", Tenants::All);
    node.demand(Demand::Lease { key: key(1), refused_id: None }).await;
    plane.commit(|store| drop(store.leases.insert(key(1), LeaseState::Pending)));
    plane.commit(|store| drop(store.leases.insert(key(1), LeaseState::Held(lease(1, "first")))));
    node.until(|held| held.leases.get(&key(1)) == Some(&Some("first".into()))).await;
    node.demand(Demand::Lease { key: key(1), refused_id: Some("first".into()) }).await;
    node.until(|held| held.leases.get(&key(1)) == Some(&Some("second".into()))).await;
    assert_eq!(*plane.refused.lock().unwrap(), [(key(1), "first".to_owned())]);
}

#[tokio::test(start_paused = true)]
async fn a_node_is_told_nothing_of_tenants_it_does_not_serve() {
    let plane = ControlPlane::start();
    plane.set_view(view(1, 1));
    plane.set_view(view(2, 1));
    plane.commit(|store| {
        store.grants.extend([(hash(1), (1, caller(1, 1))), (hash(2), (1, caller(2, 2)))]);
        store.leases.insert(key(2), LeaseState::Held(lease(2, "first")));
    });
    let node = start_node(&plane, "node-a", Tenants::Only(BTreeSet::from([tenant(1)])));
    node.demand(Demand::Grant(hash(1))).await;
    node.demand(Demand::Grant(hash(2))).await;
    node.demand(Demand::Lease { key: key(2), refused_id: Some("first".into()) }).await;
    node.until(|held| held.grants.len() == 2 && held.leases.len() == 1 && !held.views.is_empty()).await;
    let held = node.held.borrow();
    assert_eq!(held.views.keys().collect::<Vec<_>>(), [&tenant(1)]);
    assert!(held.grants[&hash(1)].is_some() && held.grants[&hash(2)].is_none());
    assert_eq!(held.leases[&key(2)], None);
    assert_eq!(*plane.refused.lock().unwrap(), []);
    assert_eq!(plane.board.pending(&tenant(2), 1), []);
}

#[tokio::test(start_paused = true)]
async fn a_refused_view_is_on_the_board_and_does_not_hold_up_who_waits() {
    let plane = ControlPlane::start();
    plane.set_view(view(1, 1));
    let node = start_node(&plane, "node-a", Tenants::All);
    node.until(|held| generation_of(held, 1) == Some(1)).await;
    plane.set_view(overlapping_view(1, 2));
    let before = tokio::time::Instant::now();
    let pending = plane.board.acknowledged(&tenant(1), 2, Duration::from_secs(5)).await;
    assert_eq!(pending, [name("node-a")]);
    assert_eq!(before.elapsed(), Duration::ZERO);
    let progress = plane.board.snapshot(&name("node-a")).unwrap().progress.views[&tenant(1)].clone();
    assert_eq!((progress.sent, progress.acknowledged), (Some(2), Some(1)));
    assert!(progress.refusal.unwrap().message.contains("overlap"));
    assert_eq!(generation_of(&node.held.borrow(), 1), Some(1));
}

#[tokio::test(start_paused = true)]
async fn a_second_stream_of_a_node_replaces_the_first() {
    let plane = ControlPlane::start();
    let first = start_node(&plane, "node-a", Tenants::All);
    until(&first.connected, |(_, now)| *now).await;
    let second = start_node(&plane, "node-a", Tenants::All);
    until(&second.connected, |(_, now)| *now).await;
    until(&first.connected, |(_, now)| !now).await;
    assert!(plane.board.snapshot(&name("node-a")).unwrap().connected);
}

#[tokio::test(start_paused = true)]
async fn what_nobody_was_woken_for_is_found_by_the_net() {
    let plane = ControlPlane::start();
    plane.set_view(view(1, 1));
    let node = start_node(&plane, "node-a", Tenants::All);
    node.until(|held| generation_of(held, 1) == Some(1)).await;
    plane.commit_in_silence(|store| drop(store.views.insert(tenant(1), view(1, 2))));
    node.until(|held| generation_of(held, 1) == Some(2)).await;
}

#[tokio::test(start_paused = true)]
async fn a_view_of_many_chunks_goes_on_as_it_is_acknowledged() {
    let plane = ControlPlane::start();
    let node = start_node(&plane, "node-a", Tenants::All);
    until(&node.connected, |(_, now)| *now).await;
    let before = tokio::time::Instant::now();
    plane.set_view(large_view(1, 1, 40));
    node.until(|held| generation_of(held, 1) == Some(1)).await;
    assert_eq!(before.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn a_change_costs_one_diff() {
    let plane = ControlPlane::start();
    plane.set_view(view(1, 1));
    let _node = start_node(&plane, "node-a", Tenants::All);
    let mut changes = plane.board.changes();
    while plane.board.snapshots().iter().all(|status| status.progress.views.is_empty()) {
        changes.changed().await.unwrap();
    }
    assert_eq!(plane.board.acknowledged(&tenant(1), 1, Duration::from_secs(5)).await, []);
    let before = plane.diffs.load(Ordering::Relaxed);
    plane.set_view(large_view(1, 2, 40));
    assert_eq!(plane.board.acknowledged(&tenant(1), 2, Duration::from_secs(5)).await, []);
    assert_eq!(plane.diffs.load(Ordering::Relaxed), before + 1);
}

#[tokio::test(start_paused = true)]
async fn a_node_that_is_gone_is_not_waited_for() {
    let plane = ControlPlane::start();
    plane.set_view(view(1, 1));
    let node = start_node(&plane, "node-a", Tenants::All);
    node.until(|held| generation_of(held, 1) == Some(1)).await;
    node.shutdown.cancel();
    let mut changes = plane.board.changes();
    while plane.board.snapshot(&name("node-a")).unwrap().connected {
        changes.changed().await.unwrap();
    }
    plane.set_view(view(1, 2));
    assert_eq!(plane.board.acknowledged(&tenant(1), 2, Duration::from_secs(5)).await, []);
}

fn text_of(held: &Held, key: &SecretKey) -> Option<Vec<u8>> {
    let (_, replica) = held.secrets.get(key)?.as_ref().ok()?;
    replica.value.as_ref().map(|value| value.expose().to_vec())
}

#[tokio::test(start_paused = true)]
async fn a_write_reaches_who_subscribed_and_costs_no_diff() {
    let plane = ControlPlane::start();
    plane.set_view(view(1, 1));
    let (key, other) = (secret(1, 1), secret(1, 2));
    let nodes = ["node-a", "node-b"].map(|name| start_node(&plane, name, Tenants::All));
    nodes[0].demand(Demand::Secret(key.clone())).await;
    nodes[1].demand(Demand::Secret(other.clone())).await;
    nodes[0].until(|held| held.secrets.len() == 1 && held.views.len() == 1).await;
    nodes[1].until(|held| held.secrets.len() == 1 && held.views.len() == 1).await;
    let diffs = plane.diffs.load(Ordering::Relaxed);
    let before = tokio::time::Instant::now();
    for text in ["one", "two", "three"] {
        plane.write(|shelf| shelf.put(&key, text.as_bytes()));
        let revision = plane.store.lock().unwrap().shelf.revision;
        nodes[0].until(|held| held.revision == revision && text_of(held, &key) == Some(text.into())).await;
    }
    assert!(before.elapsed() < Duration::from_millis(100));
    assert_eq!(plane.diffs.load(Ordering::Relaxed), diffs);
    assert!(nodes[1].held.borrow().secrets[&other].is_err());
    assert!(nodes[1].held.borrow().revision < plane.store.lock().unwrap().shelf.revision);
}

#[tokio::test(start_paused = true)]
async fn a_prefetched_backend_of_many_secrets_arrives_and_the_board_says_so() {
    let plane = ControlPlane::start();
    plane.write(|shelf| {
        shelf.prefetched.insert(tenant(1));
        (0..250).for_each(|number| shelf.put(&secret(1, number), &[number; 20_000]));
    });
    plane.set_view(prefetched_view(1, 1));
    let node = start_node(&plane, "node-a", Tenants::All);
    let before = tokio::time::Instant::now();
    node.until(|held| held.complete == [owning(1)]).await;
    assert_eq!(before.elapsed(), Duration::ZERO);
    assert_eq!(node.held.borrow().secrets.len(), 250);
    let mut changes = plane.board.changes();
    let complete = |progress: &scaivault_discovery::Progress| {
        progress.secrets == 250 && progress.prefetch.get(&owning(1)) == Some(&PrefetchProgress::Complete)
    };
    while !complete(&plane.board.snapshot(&name("node-a")).unwrap().progress) {
        changes.changed().await.unwrap();
    }
    plane.write(|shelf| shelf.delete(&secret(1, 7)));
    node.until(|held| held.secrets[&secret(1, 7)].is_err()).await;
}

#[tokio::test(start_paused = true)]
async fn an_expired_feed_costs_a_comparison_and_nothing_else() {
    let plane = ControlPlane::start();
    plane.set_view(view(1, 1));
    let node = start_node(&plane, "node-a", Tenants::All);
    node.demand(Demand::Secret(secret(1, 1))).await;
    node.demand(Demand::Secret(secret(1, 2))).await;
    node.until(|held| held.secrets.len() == 2).await;
    plane.write(|shelf| {
        shelf.put(&secret(1, 1), b"one");
        shelf.expire_feed();
        shelf.put(&secret(1, 2), b"two");
    });
    node.until(|held| text_of(held, &secret(1, 1)).is_some() && text_of(held, &secret(1, 2)).is_some()).await;
    assert_eq!(*node.connected.borrow(), (1, true));
}

#[tokio::test(start_paused = true)]
async fn a_cut_connection_costs_no_copy_that_is_held() {
    let plane = ControlPlane::start();
    plane.set_view(view(1, 1));
    plane.write(|shelf| (1..3).for_each(|number| shelf.put(&secret(1, number), b"one")));
    let node = start_node(&plane, "node-a", Tenants::All);
    node.demand(Demand::Secret(secret(1, 1))).await;
    node.demand(Demand::Secret(secret(1, 2))).await;
    node.until(|held| held.secrets.len() == 2).await;
    let copy_of = |number| node.held.borrow().secrets[&secret(1, number)].clone().unwrap().1;
    let kept = copy_of(2);
    node.wire.cut();
    until(&node.connected, |(_, now)| !now).await;
    plane.write(|shelf| shelf.put(&secret(1, 1), b"two"));
    node.until(|held| text_of(held, &secret(1, 1)) == Some("two".into())).await;
    assert!(Arc::ptr_eq(&kept, &copy_of(2)), "not sent again");
}

#[tokio::test(start_paused = true)]
async fn a_node_has_no_copies_of_tenants_it_does_not_serve() {
    let plane = ControlPlane::start();
    plane.set_view(view(1, 1));
    plane.set_view(view(2, 1));
    plane.write(|shelf| (1..3).for_each(|owner| shelf.put(&secret(owner, 1), b"one")));
    let node = start_node(&plane, "node-a", Tenants::Only(BTreeSet::from([tenant(1)])));
    node.demand(Demand::Secret(secret(1, 1))).await;
    node.demand(Demand::Secret(secret(2, 1))).await;
    node.until(|held| held.secrets.len() == 2).await;
    assert!(node.held.borrow().secrets[&secret(1, 1)].is_ok());
    assert!(matches!(node.held.borrow().secrets[&secret(2, 1)], Err(Absence::NotFound)));
}

#[tokio::test(start_paused = true)]
async fn a_copy_that_nobody_was_told_of_is_found_by_the_net() {
    let plane = ControlPlane::start();
    plane.set_view(view(1, 1));
    let node = start_node(&plane, "node-a", Tenants::All);
    node.demand(Demand::Secret(secret(1, 1))).await;
    node.until(|held| held.secrets.len() == 1).await;
    plane.write(|shelf| shelf.put_in_silence(&secret(1, 1), b"one", State::Active));
    let mut held = node.held.subscribe();
    let found = held.wait_for(|held| text_of(held, &secret(1, 1)).is_some());
    tokio::time::timeout(Duration::from_secs(25 * 60), found).await.expect("it happens").unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_node_that_comes_back_with_its_cache_is_sent_what_differs() {
    let plane = ControlPlane::start();
    plane.set_view(view(1, 1));
    plane.write(|shelf| (1..3).for_each(|number| shelf.put(&secret(1, number), b"one")));
    let stamp = plane.store.lock().unwrap().shelf.secrets[&secret(1, 1)].0;
    let secrets = vec![
        (secret(1, 1).hash(), stamp),
        (secret(1, 2).hash(), Stamp { revision: 1, tag: 0 }),
        (secret(1, 3).hash(), Stamp { revision: 1, tag: 0 }),
    ];
    let restored = Restored { epoch: "e1".into(), secrets, ..Restored::default() };
    let node = start_node_with(&plane, "node-a", Tenants::All, Subscriber::restore(restored));
    node.until(|held| held.revision == 3).await;
    assert_eq!(node.held.borrow().secrets.keys().collect::<Vec<_>>(), [&secret(1, 2)]);
    let status = plane.board.snapshot(&name("node-a")).unwrap();
    assert_eq!(status.progress.secrets, 2, "of three that it held one is gone");
}
