//! A node that is sent a configuration it cannot trust keeps the last good one, and the control plane sees that it does.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, Result};
use futures::Stream;
use scaivault_data_plane::cache::{Cache, CacheConfig};
use scaivault_data_plane::known::{Copies, Known, Patience, Remembered};
use scaivault_discovery::wire::view_chunks;
use scaivault_discovery::{
    Demand, Demands, Desired, Found, Mark, NodeBoard, NodeIdentity, SecretChanges, Source, Subscriber,
    Surveyed, Tenants, ViewProgress, delta_stream, follow,
};
use scaivault_domain::backend::{self, BackendId, Target, VaultTarget};
use scaivault_domain::lease::LeaseKey;
use scaivault_domain::mapping::PathMapping;
use scaivault_domain::path::SecretPath;
use scaivault_domain::replica::{Absence, SecretKey};
use scaivault_domain::sync::{Mode, SyncSettings};
use scaivault_domain::tenant::{BackendName, NodeName, TenantId};
use scaivault_domain::view::{BackendView, Generation, Route, TenantView};
use scaivault_proto::discovery::v1::delta_request::Message;
use scaivault_proto::discovery::v1::discovery_service_client::DiscoveryServiceClient;
use scaivault_proto::discovery::v1::discovery_service_server::{DiscoveryService, DiscoveryServiceServer};
use scaivault_proto::discovery::v1::{
    DeltaRequest, DeltaResponse, RenewCertificateRequest, RenewCertificateResponse, ShipSegmentRequest,
    ShipSegmentResponse, Upsert, upsert,
};
use scaivault_seal::Keyring;
use scaivault_telemetry::SystemClock;
use scaivault_tests::{ports, wait};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};

type Responses = Pin<Box<dyn Stream<Item = Result<DeltaResponse, Status>> + Send>>;

/// What answers a node's stream.
trait Streams: Send + Sync + 'static {
    fn open(self: Arc<Self>, requests: Streaming<DeltaRequest>) -> Responses;
}

struct Wire<T>(Arc<T>);

#[tonic::async_trait]
impl<T: Streams> DiscoveryService for Wire<T> {
    type DeltaStream = Responses;

    async fn delta(&self, request: Request<Streaming<DeltaRequest>>) -> Result<Response<Responses>, Status> {
        Ok(Response::new(self.0.clone().open(request.into_inner())))
    }

    async fn ship_segment(
        &self,
        _: Request<ShipSegmentRequest>,
    ) -> Result<Response<ShipSegmentResponse>, Status> {
        Err(Status::unimplemented("no journal here"))
    }

    async fn renew_certificate(
        &self,
        _: Request<RenewCertificateRequest>,
    ) -> Result<Response<RenewCertificateResponse>, Status> {
        Err(Status::unimplemented("no certificates here"))
    }
}

/// A control plane that publishes whatever it is told to.
struct Publisher {
    views: Mutex<BTreeMap<TenantId, Arc<TenantView>>>,
    commits: watch::Sender<u64>,
    feed: watch::Sender<Mark>,
    board: Arc<NodeBoard>,
}

impl Publisher {
    fn publish(&self, view: TenantView) {
        self.views.lock().expect("nothing panics under it").insert(view.tenant.clone(), Arc::new(view));
        self.commits.send_modify(|count| *count += 1);
    }

    fn progress(&self, tenant: &str) -> ViewProgress {
        let node = self.board.snapshot(&identity().name);
        node.and_then(|node| node.progress.views.get(&name(tenant)).cloned()).unwrap_or_default()
    }

    async fn in_force(&self, tenant: &str, generation: Generation) -> Result<()> {
        wait::until("the generation is acknowledged", async || {
            Ok((self.progress(tenant).acknowledged == Some(generation)).then_some(()))
        })
        .await
    }

    async fn refused(&self, tenant: &str, generation: Generation) -> Result<String> {
        wait::until("the generation is refused", async || {
            let refusal = self.progress(tenant).refusal;
            Ok(refusal.filter(|refusal| refusal.generation == generation).map(|refusal| refusal.message))
        })
        .await
    }
}

#[tonic::async_trait]
impl Source for Publisher {
    fn wake(&self) -> watch::Receiver<u64> {
        self.commits.subscribe()
    }

    async fn desired(&self, _: &NodeIdentity, _: &Demands) -> Result<Desired, Status> {
        let views = self.views.lock().expect("nothing panics under it").clone();
        Ok(Desired { epoch: "one".into(), revision: *self.commits.borrow(), views, ..Desired::default() })
    }

    async fn lease_refused(&self, _: &NodeIdentity, _: &LeaseKey, _: &str) {}

    fn feed(&self) -> watch::Receiver<Mark> {
        self.feed.subscribe()
    }

    async fn changed(&self, cursor: u64, _: usize) -> Result<Option<SecretChanges>, Status> {
        Ok(Some(SecretChanges { next: cursor + 1, ..SecretChanges::default() }))
    }

    async fn secrets(&self, _: &NodeIdentity, keys: &[SecretKey], _: usize) -> Result<Vec<Found>, Status> {
        Ok(keys.iter().map(|_| Err(Absence::NotFound)).collect())
    }

    async fn survey(&self, _: &TenantId, _: Option<&SecretPath>, _: usize) -> Result<Vec<Surveyed>, Status> {
        Ok(Vec::new())
    }
}

/// What the node's certificate would say.
fn identity() -> NodeIdentity {
    NodeIdentity { name: NodeName::parse("node").expect("a name"), tenants: Tenants::All }
}

impl Streams for Publisher {
    fn open(self: Arc<Self>, requests: Streaming<DeltaRequest>) -> Responses {
        let board = self.board.clone();
        Box::pin(delta_stream(self, board, identity(), requests, CancellationToken::new()))
    }
}

/// A control plane that sends what it is told to, whatever it sent before.
struct Replayer {
    stream: watch::Sender<Option<mpsc::Sender<Result<DeltaResponse, Status>>>>,
    heard: mpsc::Sender<DeltaRequest>,
}

impl Streams for Replayer {
    fn open(self: Arc<Self>, mut requests: Streaming<DeltaRequest>) -> Responses {
        let (responses, mut stream) = mpsc::channel(1);
        self.stream.send_replace(Some(responses));
        tokio::spawn(async move {
            while let Ok(Some(request)) = requests.message().await {
                drop(self.heard.send(request).await);
            }
        });
        Box::pin(futures::stream::poll_fn(move |context| stream.poll_recv(context)))
    }
}

impl Replayer {
    /// Sends a view on the stream that is open, or the next one.
    async fn send(&self, nonce: u64, view: &TenantView) -> Result<()> {
        let upserts = view_chunks(view)
            .into_iter()
            .map(|chunk| Upsert { resource: Some(upsert::Resource::View(chunk)) })
            .collect();
        let response = DeltaResponse { nonce, epoch: "one".into(), upserts, ..DeltaResponse::default() };
        let stream = self.stream.subscribe().wait_for(Option::is_some).await?.clone();
        Ok(stream.context("a stream")?.send(Ok(response)).await?)
    }

    fn end_stream(&self) {
        self.stream.send_replace(None);
    }
}

/// A node that follows a control plane of the test's, over TCP.
struct Node {
    known: Arc<Known>,
    _demands: mpsc::Sender<Demand>,
    tasks: [JoinHandle<()>; 2],
}

impl Drop for Node {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Node {
    fn follow(control_plane: Arc<impl Streams>) -> Node {
        let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, ports::free()));
        let service = DiscoveryServiceServer::new(Wire(control_plane));
        let server = tokio::spawn(async move {
            Server::builder().add_service(service).serve(addr).await.expect("the port is free");
        });
        let (demands, demanded) = mpsc::channel(1);
        let clock = Arc::new(SystemClock);
        // In no directory: it holds nothing that has to outlive the test.
        let cache = CacheConfig::new("/dev/null/cache", Arc::new(Keyring::generate()), clock.clone());
        let cache = Cache::open(cache).expect("nobody else has it").cache;
        let minute = Duration::from_secs(60);
        let known = Arc::new(Known::new(
            clock.clone(),
            demands.clone(),
            Copies::new(Arc::new(cache), |_| {}),
            Remembered::default(),
            Patience { grants: minute, values: minute },
        ));
        let sink = known.clone();
        let follower = tokio::spawn(async move {
            let channel = Endpoint::from_shared(format!("http://{addr}")).expect("an address").connect_lazy();
            let connect =
                || std::future::ready(Ok::<_, Infallible>(DiscoveryServiceClient::new(channel.clone())));
            let stop = CancellationToken::new();
            follow(connect, Subscriber::new(), "test", clock, sink, demanded, stop).await;
        });
        Node { known, _demands: demands, tasks: [server, follower] }
    }

    /// Where the node would read `path` from.
    fn route(&self, tenant: &str, path: &str) -> Result<String> {
        let view = self.known.view(&name(tenant))?;
        Ok(match view.mounts.route(&SecretPath::parse(path)?) {
            Route::Local => "local".into(),
            Route::Unrepresentable { backend } => format!("{} has no name for it", backend.name),
            Route::Proxied { backend, name } | Route::Synced { backend, name, .. } => {
                format!("{} {}", backend.name, name.as_str())
            }
        })
    }
}

fn name(tenant: &str) -> TenantId {
    TenantId::parse(tenant).expect("a name")
}

fn backend(number: u8, pattern: &str, template: &str) -> BackendView {
    BackendView {
        login_generation: 1,
        id: BackendId::from_random([number; 10]),
        name: BackendName::parse(&format!("backend-{number}")).expect("a name"),
        target: Target::HashicorpVault(VaultTarget::at(
            backend::Endpoint::parse("endpoint", "https://vault.internal:8200").expect("a URL"),
        )),
        mapping: PathMapping::parse([(pattern.to_owned(), template.to_owned())]).expect("a rule"),
        mode: Mode::Proxy,
        sync: SyncSettings::default(),
        enabled: true,
        timeout: Duration::from_secs(5),
    }
}

fn view(tenant: &str, generation: Generation, backends: Vec<BackendView>) -> TenantView {
    TenantView { tenant: name(tenant), generation, backends }
}

fn good(tenant: &str, generation: Generation) -> TenantView {
    view(tenant, generation, vec![backend(1, "external/**", &format!("kv/{generation}/**"))])
}

#[tokio::test]
async fn a_poisoned_view_is_refused_and_the_last_good_one_serves() -> Result<()> {
    let publisher = Arc::new(Publisher {
        views: Mutex::default(),
        commits: watch::Sender::new(0),
        feed: watch::Sender::new(Mark::default()),
        board: Arc::new(NodeBoard::new(Arc::new(SystemClock))),
    });
    let node = Node::follow(publisher.clone());
    publisher.publish(good("poisoned", 10));
    publisher.in_force("poisoned", 10).await?;
    let stolen = || backend(2, "external/**", "kv/stolen/**");
    let with = |change: fn(&mut BackendView)| {
        let mut backend = stolen();
        change(&mut backend);
        vec![backend]
    };
    let same_id = BackendView { id: backend(1, "a", "kv/a").id, ..backend(3, "b", "kv/b") };
    for (generation, backends) in (11..).zip([
        // Two backends own one path.
        vec![stolen(), backend(3, "external/app/**", "kv/**")],
        vec![stolen(), backend(3, "*/app/db", "kv/*")],
        vec![stolen(), stolen()],
        vec![stolen(), backend(1, "a", "kv/a"), same_id],
        // No deadline, or one that nobody waits for.
        with(|backend| backend.timeout = Duration::ZERO),
        with(|backend| backend.timeout = Duration::from_secs(3600)),
        // A header more.
        with(|backend| {
            let Target::HashicorpVault(vault) = &mut backend.target else { panic!("it is a Vault") };
            vault.namespace = Some("team\r\nX-Vault-Token: stolen".into());
        }),
    ]) {
        publisher.publish(view("poisoned", generation, backends));
        let why = publisher
            .refused("poisoned", generation)
            .await
            .with_context(|| format!("generation {generation}"))?;
        assert_ne!(why, "");
        assert_eq!(publisher.progress("poisoned").acknowledged, Some(10), "what is in force is told as such");
        assert_eq!(node.route("poisoned", "external/app/db")?, "backend-1 kv/10/app/db");
        let pending = publisher.board.pending(&name("poisoned"), generation);
        assert_eq!(pending, [identity().name]);
    }

    // Others go on, and so does this tenant with the next good one.
    publisher.publish(good("healthy", 1));
    publisher.in_force("healthy", 1).await?;
    assert_eq!(node.route("healthy", "external/x")?, "backend-1 kv/1/x");
    publisher.publish(good("poisoned", 20));
    publisher.in_force("poisoned", 20).await?;
    assert_eq!(node.route("poisoned", "external/app/db")?, "backend-1 kv/20/app/db");
    assert_eq!(publisher.progress("poisoned").refusal, None);
    Ok(())
}

#[tokio::test]
async fn an_older_generation_is_refused_also_on_a_new_stream() -> Result<()> {
    let (heard, mut requests) = mpsc::channel(16);
    let replayer = Arc::new(Replayer { stream: watch::Sender::new(None), heard });
    let node = Node::follow(replayer.clone());
    let mut answer = async || loop {
        match requests.recv().await.context("the node is there")?.message {
            Some(Message::Ack(ack)) => return Ok::<_, anyhow::Error>((ack.nonce, String::new())),
            Some(Message::Nack(nack)) => return Ok((nack.nonce, nack.refusals[0].message.clone())),
            _ => {}
        }
    };
    replayer.send(1, &good("replayed", 10)).await?;
    assert_eq!(answer().await?, (1, String::new()));
    for (nonce, generation) in [(2, 9), (3, 1)] {
        replayer.send(nonce, &good("replayed", generation)).await?;
        let (refused, why) = answer().await?;
        assert!(refused == nonce && why.contains("older"), "{refused} {why}");
        assert_eq!(node.route("replayed", "external/app/db")?, "backend-1 kv/10/app/db");
    }
    replayer.end_stream();
    replayer.send(1, &good("replayed", 8)).await?;
    let (refused, why) = answer().await?;
    assert!(refused == 1 && why.contains("older"), "{refused} {why}");
    assert_eq!(node.route("replayed", "external/app/db")?, "backend-1 kv/10/app/db");
    replayer.send(2, &good("replayed", 11)).await?;
    assert_eq!(answer().await?, (2, String::new()));
    assert_eq!(node.route("replayed", "external/app/db")?, "backend-1 kv/11/app/db");
    Ok(())
}
