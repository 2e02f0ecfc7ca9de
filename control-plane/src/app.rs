//! Wiring: what a running control plane consists of. Decides nothing.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::Response;
use scaivault_discovery::NodeBoard;
use scaivault_domain::tenant::NodeName;
use scaivault_domain::time::Clock;
use scaivault_domain::{Error, Reason};
use scaivault_edge::{
    ClientCertificates, Front, Limits, PeerCertificates, Readiness, TlsSource, refusal, serve,
};
use scaivault_journal::{Journal, JournalConfig, SyncPolicy};
use scaivault_proto::discovery::v1::discovery_service_server::DiscoveryServiceServer;
use scaivault_proto::discovery::v1::enrolment_service_server::EnrolmentServiceServer;
use scaivault_seal::RootKey;
use scaivault_telemetry::{Metrics, NodeMetrics, SystemClock};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::api::{AdminApi, DiscoveryApi, Door, EnrolmentApi, FederationApi, SecretsApi, admin, federation};
use crate::audit::Audit;
use crate::bootstrap;
use crate::config::Config;
use crate::connections::Connections;
use crate::credentials::own::OwnIdentities;
use crate::credentials::{Budgets, Credentials, OwnLeases};
use crate::monitor::Monitor;
use crate::nodes::{Authority, CERTIFICATE_LIFE, CertifiedNode};
use crate::publishing::{self, Publishing};
use crate::service::Configurations;
use crate::service::federation::Federation;
use crate::service::nodes::Nodes;
use crate::service::policies::Policies;
use crate::service::secrets::Secrets;
use crate::service::tenants::Tenants;
use crate::service::tokens::Tokens;
use crate::store::jobs::Jobs;
use crate::store::{Owner, Records, Space, Store};
use crate::sync::{Copies, Erasures, Refresher, Runs, Scheduler, SyncParts, SyncStates, Syncs};

/// The name under which the control plane writes audit rows.
const OWN_NAME: &str = "control-plane";
/// The largest audit segment of a node.
const MAX_SEGMENT: usize = 64 * 1024 * 1024;
/// How often expired tokens, and events beyond those that are kept, are swept.
const SWEEP: Duration = Duration::from_secs(600);
/// How many events of a tenant are kept.
const EVENTS: usize = 10_000;
const ENROLMENT: &str = "/scaivault.discovery.v1.EnrolmentService/";

/// A control plane that serves.
#[derive(Debug)]
pub struct ControlPlane {
    /// Where the public API is.
    pub public: SocketAddr,
    /// Where nodes connect.
    pub nodes: SocketAddr,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl ControlPlane {
    /// Stops: requests under way end, then everything else.
    pub async fn stop(self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

/// Starts a control plane on `store`.
///
/// # Errors
/// What keeps it from starting, and what to do about it.
pub async fn start(config: Config, store: Arc<dyn Store>, root: &RootKey) -> anyhow::Result<ControlPlane> {
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let metrics = Metrics::new();
    let records = bootstrap::open_records(store.clone(), root).await?;
    let authority =
        Authority::load(&records, clock.clone()).await?.context("the store has no certificate authority")?;
    let authority = Arc::new(authority);

    let journal = JournalConfig {
        rotate_after: config.audit_rotate,
        sync: SyncPolicy::None,
        ..JournalConfig::new(config.data_dir.join("audit"), NodeName::parse(OWN_NAME)?)
    };
    let journal = Journal::open(journal, records.keyring().cipher("", "audit-journal"), clock.clone())?;

    let audit = Arc::new(Audit::new(records.clone(), journal, clock.clone()));
    let tenants = Arc::new(Tenants::new(records.clone(), audit.clone(), clock.clone()));
    let tokens = Arc::new(Tokens::new(records.clone(), audit.clone(), clock.clone()));
    let policies = Arc::new(Policies::new(records.clone(), audit.clone(), clock.clone()));
    let nodes = Arc::new(Nodes::new(
        records.clone(),
        tenants.clone(),
        authority.clone(),
        audit.clone(),
        clock.clone(),
    ));
    let configurations = Arc::new(Configurations::new(records.clone()));
    let nudge = watch::Sender::new(0);
    let board = Arc::new(NodeBoard::new(clock.clone()));
    let budgets = Budgets::new({
        let board = board.clone();
        move |tenant| board.serving(tenant)
    });
    let credentials = Credentials::new(
        records.clone(),
        configurations.clone(),
        audit.clone(),
        budgets,
        nudge.clone(),
        OwnIdentities::new(config.own_identities)?,
        config.limits.egress.clone(),
    );
    let connections =
        Arc::new(Connections::new(OwnLeases(credentials.clone()), config.limits.egress.clone()));
    let states = Arc::new(SyncStates::new(records.clone()));
    let copies = Arc::new(Copies::new(records.clone(), states.clone(), clock.clone()));
    let refresher =
        Arc::new(Refresher::new(records.clone(), connections.clone(), audit.clone(), clock.clone()));
    let secrets = Arc::new(Secrets::new(
        records.clone(),
        configurations.clone(),
        connections.clone(),
        copies.clone(),
        refresher,
        audit.clone(),
        clock.clone(),
    ));
    let jobs = Jobs::new(records.clone(), clock.clone());
    let syncs = Arc::new(Syncs::new(SyncParts {
        records: records.clone(),
        jobs: jobs.clone(),
        configurations: configurations.clone(),
        connections: connections.clone(),
        states: states.clone(),
        runs: Arc::new(Runs::new(records.clone())),
        audit: audit.clone(),
        clock: clock.clone(),
        metrics: metrics.clone(),
    }));
    let federation = Arc::new(Federation::new(
        records.clone(),
        configurations.clone(),
        credentials.clone(),
        syncs.clone(),
        audit.clone(),
        clock.clone(),
        config.limits,
    ));
    let monitor = Arc::new(Monitor::new(
        records.clone(),
        tenants.clone(),
        configurations.clone(),
        connections.clone(),
        clock.clone(),
        metrics.clone(),
        config.unreachable_after,
    ));
    let erasures = Erasures {
        records: records.clone(),
        configurations: configurations.clone(),
        nodes: nodes.clone(),
        board: board.clone(),
        audit: audit.clone(),
        clock: clock.clone(),
        started: std::time::Instant::now(),
    };
    let scheduler = Arc::new(Scheduler::new(syncs.clone(), erasures));
    let publishing = publishing::Parts {
        records: records.clone(),
        configurations: configurations.clone(),
        credentials: credentials.clone(),
        connections: connections.clone(),
        tenants: tenants.clone(),
        tokens: tokens.clone(),
        copies,
        states,
        clock: clock.clone(),
        nudge,
    };
    let publishing = Arc::new(Publishing::new(publishing).await);

    let stop = CancellationToken::new();
    let door = Door::new(tokens.clone(), tenants.clone(), audit.clone(), metrics.clone());
    let secrets_api = Arc::new(SecretsApi::new(door.clone(), secrets));
    let federation_api = Arc::new(FederationApi::new(federation::Parts {
        door: door.clone(),
        federation,
        configurations: configurations.clone(),
        monitor: monitor.clone(),
        syncs,
        credentials: credentials.clone(),
        connections,
        nodes: nodes.clone(),
        board: board.clone(),
        records: records.clone(),
        clock: clock.clone(),
    }));
    let admin_api = Arc::new(AdminApi::new(admin::Parts {
        door,
        tenants: tenants.clone(),
        policies,
        tokens: tokens.clone(),
        nodes: nodes.clone(),
        board: board.clone(),
        audit: audit.clone(),
    }));
    let front = || {
        let (metrics, audit) = (metrics.clone(), audit.clone());
        Front::new(Readiness::ready)
            .secrets(secrets_api.clone())
            .federation(federation_api.clone())
            .admin(admin_api.clone())
            .metrics(move || {
                metrics.audit_backlog(audit.backlog_bytes());
                metrics.render()
            })
    };
    let discovery =
        DiscoveryApi::new(publishing.clone(), board.clone(), nodes.clone(), audit.clone(), stop.clone());
    let for_nodes = front()
        .grpc(DiscoveryServiceServer::new(discovery).max_decoding_message_size(MAX_SEGMENT))
        .grpc(EnrolmentServiceServer::new(EnrolmentApi::new(nodes.clone())))
        .build();

    let public = bind(config.listen).await?;
    let node_listener = bind(config.node_listen).await?;
    let addresses = (public.local_addr()?, node_listener.local_addr()?);
    let public_tls = match config.tls {
        Some((cert, key)) => Some(TlsSource::from_files(cert, key, ClientCertificates::Ignored).await?),
        None => None,
    };
    let (chain, key) = authority.listener()?;
    let trusted = ClientCertificates::Optional(vec![authority.certificate().clone()]);
    let node_tls = TlsSource::new(chain, key, trusted)?;

    let tasks = TaskTracker::new();
    tasks.spawn(serve(public, public_tls, front().build(), Limits::default(), stop.clone()));
    let for_nodes = only_nodes(for_nodes, nodes.clone());
    // Hundreds of forwarded requests share one connection.
    let limits = Limits { streams: 4096, ..Limits::default() };
    tasks.spawn(serve(node_listener, Some(node_tls.clone()), for_nodes, limits, stop.clone()));
    tasks.spawn(stop.clone().run_until_cancelled_owned(renew_listener(authority, node_tls)));
    tasks.spawn(publishing.run(stop.clone()));
    tasks.spawn(monitor.run(stop.clone()));
    tasks.spawn(scheduler.run(stop.clone()));
    tasks.spawn(stop.clone().run_until_cancelled_owned(divide_budgets(credentials, board.clone())));
    tasks.spawn(stop.clone().run_until_cancelled_owned(tell_generations(metrics.clone(), board.clone())));
    tasks.spawn(stop.clone().run_until_cancelled_owned(sweep(
        records,
        tokens,
        nodes.clone(),
        tenants.clone(),
    )));
    tasks.spawn(audit.run(tenants, stop.clone()));
    Ok(ControlPlane { public: addresses.0, nodes: addresses.1, stop, tasks })
}

async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))
}

/// Lets only enrolled nodes through, and those who want to enrol.
fn only_nodes(router: Router, nodes: Arc<Nodes>) -> Router {
    async fn check(State(nodes): State<Arc<Nodes>>, request: Request, next: Next) -> Response {
        if request.uri().path().starts_with(ENROLMENT) {
            return next.run(request).await;
        }
        let peer = request.extensions().get::<PeerCertificates>().and_then(|chain| chain.0.first()).cloned();
        let outcome = match peer {
            Some(certificate) => match CertifiedNode::read(&certificate) {
                Ok(node) => nodes.check(&node).await,
                Err(error) => Err(error),
            },
            None => Err(Error::new(Reason::Unauthenticated, "this listener is for nodes")
                .next("use the public API, or join as a node")),
        };
        match outcome {
            Ok(()) => next.run(request).await,
            Err(error) => refusal(request.headers(), error),
        }
    }
    router.layer(from_fn_with_state(nodes, check))
}

/// Gives the listener for nodes a new certificate long before the old one ends.
async fn renew_listener(authority: Arc<Authority>, tls: TlsSource) {
    loop {
        tokio::time::sleep(CERTIFICATE_LIFE / 2).await;
        let renewed = authority.listener().map_err(anyhow::Error::from);
        if let Err(error) = renewed.and_then(|(chain, key)| Ok(tls.replace(chain, key)?)) {
            tracing::error!(%error, "the listener for nodes keeps its old certificate");
        }
    }
}

/// Divides call budgets anew whenever a node comes or goes.
async fn divide_budgets(credentials: Arc<Credentials>, board: Arc<NodeBoard>) {
    let mut changes = board.changes();
    loop {
        credentials.divide_budgets();
        if changes.changed().await.is_err() {
            return;
        }
    }
}

/// Keeps the series of each node's generations.
async fn tell_generations(metrics: Metrics, board: Arc<NodeBoard>) {
    let mut changes = board.changes();
    let mut series: HashMap<NodeName, NodeMetrics> = HashMap::new();
    loop {
        for node in board.snapshots() {
            let views = node.progress.views.values();
            let (sent, in_force) = views.fold((0, 0), |(sent, in_force), view| {
                (sent + view.sent.unwrap_or_default(), in_force + view.acknowledged.unwrap_or_default())
            });
            let series = series.entry(node.name.clone()).or_insert_with(|| metrics.node(&node.name));
            series.generation(sent, in_force);
        }
        // Not for every acknowledgement of a busy stream.
        tokio::time::sleep(Duration::from_secs(1)).await;
        if changes.changed().await.is_err() {
            return;
        }
    }
}

async fn sweep(records: Records, tokens: Arc<Tokens>, nodes: Arc<Nodes>, tenants: Arc<Tenants>) {
    loop {
        tokio::time::sleep(SWEEP).await;
        if let Err(error) = nodes.sweep().await {
            tracing::warn!(%error, "invitations wait for the next sweep");
        }
        for tenant in tenants.all().await.unwrap_or_default() {
            if let Err(error) = records.trim(&Owner::from(&tenant), Space::Event, "", EVENTS).await {
                tracing::warn!(%error, %tenant, "old events wait for the next sweep");
            }
            if let Err(error) = tokens.sweep(&tenant).await {
                tracing::warn!(%error, %tenant, "expired tokens wait for the next sweep");
            }
        }
    }
}
