//! Dev mode: both planes in one process on loopback, with an embedded store and a random operator token.
//!
//! What differs from production: plaintext for clients, plain `http` endpoints of backends, backends on loopback, whose
//! certificates need not be checked, and the node joins by itself. Between the planes there is mutual TLS as always.

pub mod vault;

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use scaivault_backends::egress::{Egress, Policy, Private};
use scaivault_control_plane::credentials::own;
use scaivault_control_plane::service::federation::Limits;
use scaivault_control_plane::{app as control_plane, bootstrap};
use scaivault_data_plane::app as data_plane;
use scaivault_data_plane::cache::key::KeySource;
use scaivault_data_plane::known::Patience;
use scaivault_proto::admin::v1::CreateNodeRequest;
use scaivault_proto::admin::v1::admin_service_client::AdminServiceClient;
use secrecy::{ExposeSecret as _, SecretString};
use tempfile::TempDir;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::transport::Endpoint;
use tonic::{Request, Status};

/// How long the node may take to be ready.
const READY: Duration = Duration::from_secs(20);
const NODE: &str = "dev-node";

/// Settings of dev mode.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Address of the API; a loopback address
    #[arg(long, env = "SCAIVAULT_LISTEN", value_name = "ADDR", default_value = "127.0.0.1:8300")]
    pub listen: SocketAddr,
    /// Keep the data here; without it everything is gone at the end
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Let backends be at this host name, `*.suffix`, address or range, as loopback may be without it
    #[arg(long, env = "SCAIVAULT_EGRESS_ALLOW", value_name = "ENTRY", value_delimiter = ',')]
    pub egress_allow: Vec<String>,
    /// What to log
    #[arg(long, env = "SCAIVAULT_LOG", value_name = "FILTER", default_value = "warn")]
    pub log: String,
}

/// Both planes, serving.
#[derive(Debug)]
pub struct Dev {
    /// Where clients go: the node.
    pub node: SocketAddr,
    /// Where the control plane's own API is.
    pub control_plane: SocketAddr,
    /// The operator's token.
    pub token: SecretString,
    egress: Egress,
    planes: (control_plane::ControlPlane, data_plane::Node),
    dir: Option<TempDir>,
}

impl Dev {
    fn operator(&self) -> anyhow::Result<Operator> {
        Operator::new(&self.token)
    }

    /// Stops both; a temporary directory is removed.
    pub async fn stop(self) {
        let (control_plane, node) = self.planes;
        node.stop().await;
        control_plane.stop().await;
        drop(self.dir);
    }
}

/// Starts both planes.
///
/// # Errors
/// What keeps them from starting, and what to do about it.
pub async fn start(options: &Options) -> anyhow::Result<Dev> {
    if !options.listen.ip().is_loopback() {
        bail!(
            "dev mode serves plaintext and stays on loopback: use `scaivault control-plane` and `scaivault data-plane`"
        );
    }
    let policy = Policy::of_settings(&options.egress_allow, Private::Allowed).context("--egress-allow")?;
    let egress = Egress::new(policy.with_loopback());
    let temporary = if options.data_dir.is_none() { Some(tempfile::tempdir()?) } else { None };
    let dir =
        options.data_dir.as_deref().or(temporary.as_ref().map(TempDir::path)).context("no directory")?;
    let store = bootstrap::open_store(&dir.join("control-plane"))?;
    let root_file = dir.join("root.key");
    let root = if root_file.exists() {
        scaivault_control_plane::RootKey::from_file(&root_file)?
    } else {
        scaivault_control_plane::RootKey::create_file(&root_file)?
    };
    let token_file = dir.join("operator-token");
    let token = if bootstrap::is_initialised(&*store).await? {
        fs::read_to_string(&token_file)
            .with_context(|| format!("cannot read {}", token_file.display()))?
            .into()
    } else {
        // Tried before the commit: an installation whose first token was lost could not be used.
        write_private(&token_file, "")?;
        let token = bootstrap::initialise(store.clone(), &root, &scaivault_telemetry::SystemClock).await?;
        write_private(&token_file, token.expose_secret())?;
        token
    };
    let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
    let config = scaivault_control_plane::config::Config {
        data_dir: dir.join("control-plane"),
        listen: loopback,
        node_listen: loopback,
        tls: None,
        limits: Limits {
            plaintext: true,
            unverified_tls: true,
            sync_interval: Duration::from_secs(1),
            egress: egress.clone(),
        },
        unreachable_after: Duration::from_secs(60),
        audit_rotate: Duration::from_secs(1),
        own_identities: own::Settings::default(),
    };
    let control_plane = control_plane::start(config, store, &root).await?;
    match start_node(options.listen, dir.join("node"), &control_plane, &token, egress.clone()).await {
        Ok(node) => Ok(Dev {
            node: node.address,
            control_plane: control_plane.public,
            token,
            egress,
            planes: (control_plane, node),
            dir: temporary,
        }),
        Err(error) => {
            // Before its directory goes, or is given to the next one.
            control_plane.stop().await;
            Err(error)
        }
    }
}

async fn start_node(
    listen: SocketAddr,
    dir: PathBuf,
    control_plane: &control_plane::ControlPlane,
    token: &SecretString,
    egress: Egress,
) -> anyhow::Result<data_plane::Node> {
    let join_token = match scaivault_data_plane::upstream::Identity::load(&dir)? {
        Some(_) => None,
        None => Some(invite(control_plane.public, token).await?),
    };
    let config = scaivault_data_plane::config::Config {
        data_dir: dir,
        listen,
        control_plane: format!("https://{}", control_plane.nodes),
        join_token_file: None,
        tls: None,
        patience: Patience { grants: Duration::from_secs(3600), values: Duration::from_secs(24 * 3600) },
        cache_key: KeySource::File,
        audit_max_bytes: 1 << 30,
        audit_rotate: Duration::from_secs(1),
        audit_sync: scaivault_data_plane::SyncPolicy::None,
        egress,
    };
    let node = data_plane::start(config, join_token).await?;
    if tokio::time::timeout(READY, node.ready()).await.is_err() {
        node.stop().await;
        bail!("the node did not get its configuration in time");
    }
    Ok(node)
}

/// Sends the operator's token with every request.
#[derive(Clone)]
struct Operator(MetadataValue<Ascii>);

impl Operator {
    fn new(token: &SecretString) -> anyhow::Result<Self> {
        let mut bearer: MetadataValue<Ascii> = format!("Bearer {}", token.expose_secret()).parse()?;
        bearer.set_sensitive(true);
        Ok(Operator(bearer))
    }
}

impl Interceptor for Operator {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("authorization", self.0.clone());
        Ok(request)
    }
}

async fn invite(control_plane: SocketAddr, token: &SecretString) -> anyhow::Result<SecretString> {
    let channel = Endpoint::from_shared(format!("http://{control_plane}"))?.connect().await?;
    let mut admin = AdminServiceClient::with_interceptor(channel, Operator::new(token)?);
    let request = CreateNodeRequest { name: NODE.into(), tenants: vec!["*".into()] };
    Ok(admin.create_node(request).await?.into_inner().join_token.into())
}

fn write_private(path: &Path, text: &str) -> anyhow::Result<()> {
    use std::io::Write as _;
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    Ok(file.write_all(text.as_bytes())?)
}
