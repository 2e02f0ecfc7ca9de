//! Wiring: what a running node consists of. Decides nothing.

use std::collections::HashMap;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

use anyhow::Context as _;
use scaivault_backends::connection::Connections;
use scaivault_discovery::{Demand, Subscriber, follow};
use scaivault_domain::lease::LeaseKey;
use scaivault_domain::time::Clock;
use scaivault_edge::{ClientCertificates, Front, Limits, Readiness, TlsSource, serve};
use scaivault_journal::{Journal, JournalConfig};
use scaivault_proto::discovery::v1::discovery_service_client::DiscoveryServiceClient;
use scaivault_seal::Keyring;
use scaivault_telemetry::{BackendMetrics, Health, Metrics, SystemClock};
use secrecy::SecretString;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::Channel;

use crate::api::SecretsApi;
use crate::cache::key::KeySource;
use crate::cache::{Cache, CacheConfig, Found};
use crate::config::Config;
use crate::forward::{Forward, Gate};
use crate::known::{Copies, Known, Link, Remembered};
use crate::service::read::Reader;
use crate::upstream::{self, Identity};

/// How often expired grants are looked at.
const SWEEP: Duration = Duration::from_secs(60);
/// Demands that wait for the stream.
const DEMANDS: usize = 1024;
/// How long a stopping node waits for its last rows to be shipped.
const LAST_ROWS: Duration = Duration::from_secs(3);

/// A node that serves.
#[derive(Debug)]
pub struct Node {
    /// Where the API is.
    pub address: SocketAddr,
    stop: CancellationToken,
    tasks: TaskTracker,
    known: Arc<Known>,
    journal: Arc<Journal>,
    shipping: tokio::task::JoinHandle<()>,
}

impl Node {
    /// Waits until the first configuration is in force.
    pub async fn ready(&self) {
        self.known.ready().await;
    }

    /// Stops: requests under way end, the last rows are shipped if the control plane takes them, then everything else.
    pub async fn stop(self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        self.journal.rotate_now();
        let shipped = async {
            while self.journal.backlog().bytes > 0 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        // What is not shipped now is on disk, and shipped after the next start.
        let _ = tokio::time::timeout(LAST_ROWS, shipped).await;
        self.shipping.abort();
    }
}

/// Starts a node; joins first if it has not joined yet.
///
/// # Errors
/// What keeps it from starting, and what to do about it.
pub async fn start(config: Config, join_token: Option<SecretString>) -> anyhow::Result<Node> {
    private_dir(&config.data_dir)?;
    let identity = match Identity::load(&config.data_dir)? {
        Some(identity) => identity,
        None => {
            Identity::join(&config.data_dir, &config.control_plane, &config.join_token(join_token)?).await?
        }
    };
    let identity = Arc::new(identity);
    let upstream = identity.channel(&config.control_plane)?;
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let metrics = Metrics::new();

    let keyring = Arc::new(config.cache_key.keyring(&config.data_dir).await?);
    // Rows that are not shipped yet must be readable after a restart, whatever becomes of the copies.
    let journal_keyring = match config.cache_key {
        KeySource::Memory => Arc::new(KeySource::File.keyring(&config.data_dir).await?),
        _ => keyring.clone(),
    };
    let journal = JournalConfig {
        max_bytes: config.audit_max_bytes,
        rotate_after: config.audit_rotate,
        sync: config.audit_sync,
        ..JournalConfig::new(config.data_dir.join("audit"), identity.name.clone())
    };
    let journal =
        Arc::new(Journal::open(journal, journal_keyring.cipher("", "audit-journal"), clock.clone())?);

    let (demands, demanded) = mpsc::channel(DEMANDS);
    // Views say which connections are still needed, and connections take leases from what is known: the circle is
    // closed here, weakly, or a node that has stopped would keep its cache open.
    let needed: Arc<OnceLock<Weak<Connections<Known>>>> = Arc::default();
    let (copies, remembered) = open_copies(&config.data_dir, keyring, clock.clone(), demands.clone()).await?;
    let subscriber = Subscriber::restore(remembered.restored.clone());
    let known = Known::new(clock.clone(), demands, copies, remembered, config.patience);
    let known = Arc::new(known.on_view({
        let needed = needed.clone();
        move |tenant, mounts| {
            if let Some(connections) = needed.get().and_then(Weak::upgrade) {
                connections.retain(tenant, |id| mounts.backends().iter().any(|backend| backend.id == *id));
            }
        }
    }));
    let connections = Arc::new(Connections::new(known.clone(), config.egress));
    needed.get_or_init(|| Arc::downgrade(&connections));
    let reader = Arc::new(Reader::new(
        known.clone(),
        connections.clone(),
        journal.clone(),
        clock.clone(),
        metrics.clone(),
    ));

    let readiness = {
        let known = known.clone();
        move || match known.link() {
            Link::Ready => Readiness::ready(),
            _ if known.is_settling() => {
                Readiness { ready: false, reasons: vec!["the control plane has not been heard yet".into()] }
            }
            // What is in force stays so; only a node that has nothing yet cannot serve.
            Link::Starting | Link::Up | Link::Down if known.serves() => {
                Readiness { ready: true, reasons: vec!["stale: no stream to the control plane".into()] }
            }
            Link::Starting | Link::Up | Link::Down => Readiness {
                ready: false,
                reasons: vec!["no configuration from the control plane yet".into()],
            },
        }
    };
    let gate = Gate::new(known.clone());
    let router = Front::new(readiness)
        .secrets(Arc::new(SecretsApi::new(
            known.clone(),
            reader,
            upstream.clone(),
            gate.clone(),
            metrics.clone(),
        )))
        .forwarded({
            let forward = Forward::new(upstream.clone(), known.clone(), gate);
            move |request| forward.clone().whole(request)
        })
        .metrics({
            let (metrics, known, journal) = (metrics.clone(), known.clone(), journal.clone());
            // Series are told for as long as they are held.
            let series: Arc<Mutex<HashMap<LeaseKey, BackendMetrics>>> = Arc::default();
            let called: Arc<Mutex<HashMap<LeaseKey, BackendMetrics>>> = Arc::default();
            move || {
                metrics.audit_backlog(journal.backlog().bytes);
                metrics.leases_held(u64::try_from(known.leases_held()).unwrap_or(u64::MAX));
                let copies = known.copies();
                metrics.cache(copies.cache().len() as u64, copies.cache().bytes_on_disk());
                let mut series = series.lock().unwrap_or_else(PoisonError::into_inner);
                let oldest: HashMap<_, _> = copies.oldest(known.now()).into_iter().collect();
                series.retain(|key, _| oldest.contains_key(key));
                for (key, oldest) in oldest {
                    let Ok(view) = known.view(&key.tenant) else { continue };
                    if let Some(backend) = view.mounts.backends().iter().find(|b| b.id == key.backend) {
                        let kind = backend.target.kind().as_str();
                        let told = series.entry(key).or_insert_with(|| metrics.backend(&backend.id, kind));
                        told.cache_staleness(oldest);
                    }
                }
                drop(series);
                let connections = connections.all();
                let mut called = called.lock().unwrap_or_else(PoisonError::into_inner);
                called.retain(|key, _| connections.iter().any(|connection| connection.key() == key));
                for connection in connections {
                    let key = connection.key();
                    let told = called
                        .entry(key.clone())
                        .or_insert_with(|| metrics.backend(&key.backend, connection.kind()));
                    told.flow(connection.guard().flow());
                }
                drop(called);
                metrics.control_plane(if known.link() == Link::Ready { Health::Up } else { Health::Down });
                metrics.render()
            }
        })
        .build();

    let listener = TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("cannot listen on {}", config.listen))?;
    let address = listener.local_addr()?;
    let tls = match config.tls {
        Some((cert, key)) => Some(TlsSource::from_files(cert, key, ClientCertificates::Ignored).await?),
        None => None,
    };

    let stop = CancellationToken::new();
    let tasks = TaskTracker::new();
    tasks.spawn(serve(listener, tls, router, Limits::default(), stop.clone()));
    tasks.spawn(follow_control_plane(
        upstream.clone(),
        subscriber,
        clock.clone(),
        known.clone(),
        demanded,
        stop.clone(),
    ));
    tasks.spawn({
        let (identity, upstream) = (identity.clone(), upstream.clone());
        stop.clone().run_until_cancelled_owned(async move { identity.keep_renewed(upstream, clock).await })
    });
    let swept = known.clone();
    tasks.spawn(stop.clone().run_until_cancelled_owned(async move {
        loop {
            tokio::time::sleep(SWEEP).await;
            swept.sweep().await;
            swept.confirm();
        }
    }));
    let shipping = tokio::spawn(upstream::ship(journal.clone(), upstream));
    Ok(Node { address, stop, tasks, known, journal, shipping })
}

async fn follow_control_plane(
    upstream: Channel,
    subscriber: Subscriber,
    clock: Arc<dyn Clock>,
    known: Arc<Known>,
    demanded: mpsc::Receiver<Demand>,
    stop: CancellationToken,
) {
    let connect = || {
        let client = DiscoveryServiceClient::new(upstream.clone());
        async move { Ok::<_, std::convert::Infallible>(client) }
    };
    follow(connect, subscriber, env!("CARGO_PKG_VERSION"), clock, known, demanded, stop).await;
}

/// A directory for the node alone.
fn private_dir(dir: &Path) -> anyhow::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .and_then(|()| fs::set_permissions(dir, fs::Permissions::from_mode(0o700)))
        .with_context(|| format!("cannot make {} a directory for the node alone", dir.display()))
}

/// The copies of an earlier run, or none. Whatever is wrong with them, the node starts.
async fn open_copies(
    dir: &Path,
    keyring: Arc<Keyring>,
    clock: Arc<dyn Clock>,
    demands: mpsc::Sender<Demand>,
) -> anyhow::Result<(Copies, Remembered)> {
    let config = CacheConfig::new(dir.join("cache"), keyring, clock.clone());
    let opened = tokio::task::spawn_blocking(move || Cache::open(config)).await??;
    let forgotten = move |hash| {
        // A full channel costs a demand that stays open, nothing more.
        let _ = demands.try_send(Demand::DropSecret(hash));
    };
    let copies = Copies::new(Arc::new(opened.cache), forgotten);
    let remembered = match opened.found {
        Found::Warm(warm) => copies.remember(warm, clock.now()),
        Found::Empty => Remembered::default(),
        Found::SetAside(why) => {
            tracing::warn!("the cache of an earlier run was set aside: {why}");
            Remembered::default()
        }
        Found::NoDisk(why) => {
            tracing::error!("copies are kept in memory only: {why}");
            Remembered::default()
        }
    };
    tracing::info!(secrets = copies.cache().len(), "copies of an earlier run");
    Ok((copies, remembered))
}
