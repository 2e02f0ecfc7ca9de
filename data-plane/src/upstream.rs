//! The node's side of the link to the control plane: its identity, the channel, and what is shipped over it.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use arc_swap::ArcSwap;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hyper_util::rt::TokioIo;
use rcgen::{CertificateParams, KeyPair};
use rustls::RootCertStore;
use rustls::client::ResolvesClientCert;
use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use scaivault_domain::tenant::NodeName;
use scaivault_domain::time::{Clock, Timestamp};
use scaivault_journal::Journal;
use scaivault_proto::discovery::v1::discovery_service_client::DiscoveryServiceClient;
use scaivault_proto::discovery::v1::enrolment_service_client::EnrolmentServiceClient;
use scaivault_proto::discovery::v1::{EnrolRequest, RenewCertificateRequest, ShipSegmentRequest};
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint, Uri};
use tower::service_fn;
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// The name in the control plane's certificate, whatever address it is reached at.
const CONTROL_PLANE_NAME: &str = "control-plane.scaivault.internal";
const JOIN_PREFIX: &str = "svj_";
const IDENTITY_FILE: &str = "identity.json";
/// How often the age of the certificate is looked at.
const RENEWAL_CHECK: Duration = Duration::from_secs(600);
const RETRY: Duration = Duration::from_secs(1);

/// What a join token says.
#[derive(Deserialize)]
struct Invitation {
    secret: String,
    authority: String,
}

/// The identity as it lies on disk, readable by the node alone.
#[derive(Serialize, Deserialize)]
struct Stored {
    name: String,
    key: String,
    certificates: Vec<String>,
    authority: String,
}

/// Who this node is to the control plane.
pub struct Identity {
    /// The node's name.
    pub name: NodeName,
    file: PathBuf,
    key: KeyPair,
    authority: CertificateDer<'static>,
    presented: Arc<Presented>,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity").field("name", &self.name).finish_non_exhaustive()
    }
}

/// The certificate that handshakes present; swapped when it is renewed.
#[derive(Debug)]
struct Presented(ArcSwap<CertifiedKey>);

impl ResolvesClientCert for Presented {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.load_full())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

impl Identity {
    /// The identity in `dir`, if the node has joined before.
    ///
    /// # Errors
    /// When the file cannot be read or is not one that a node wrote.
    pub fn load(dir: &Path) -> anyhow::Result<Option<Self>> {
        let file = dir.join(IDENTITY_FILE);
        let bytes = match fs::read(&file) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", file.display())),
        };
        let damaged =
            || format!("{} is damaged; remove it and join again with a new join token", file.display());
        let stored: Stored = serde_json::from_slice(&bytes).with_context(damaged)?;
        let key =
            KeyPair::try_from(decode(&stored.key).with_context(damaged)?.as_slice()).with_context(damaged)?;
        let certificates: Vec<_> = stored
            .certificates
            .iter()
            .map(|text| decode(text))
            .collect::<anyhow::Result<_>>()
            .with_context(damaged)?;
        let authority = CertificateDer::from(decode(&stored.authority).with_context(damaged)?);
        let name = NodeName::parse(&stored.name).with_context(damaged)?;
        Self::new(name, file, key, certificates, authority).map(Some)
    }

    /// Joins: makes a key, has it certified for the join token, and keeps both in `dir`.
    ///
    /// # Errors
    /// When the token is none, or the control plane refuses it.
    pub async fn join(dir: &Path, address: &str, token: &SecretString) -> anyhow::Result<Self> {
        const NOT_ONE: &str = "this is no join token; `scaivault node add` gives one";
        let encoded = token.expose_secret().trim().strip_prefix(JOIN_PREFIX).context(NOT_ONE)?;
        let invitation: Invitation =
            serde_json::from_slice(&decode(encoded).context(NOT_ONE)?).context(NOT_ONE)?;
        let authority = CertificateDer::from(decode(&invitation.authority).context(NOT_ONE)?);
        let key = KeyPair::generate()?;
        let csr = CertificateParams::default().serialize_request(&key)?;

        let tls = client_tls(&authority, None)?;
        let mut client = EnrolmentServiceClient::new(channel(address, tls)?);
        let request = EnrolRequest { join_secret: invitation.secret, csr: csr.der().to_vec() };
        let answer = client.enrol(request).await.map_err(|status| {
            let error = scaivault_edge::error::grpc::error(&status);
            anyhow::anyhow!(
                "the control plane at {address} did not take the join token: {}; {}",
                error.message,
                error.what_next()
            )
        })?;
        let answer = answer.into_inner();
        let name = NodeName::parse(&answer.name)?;
        let identity = Self::new(name, dir.join(IDENTITY_FILE), key, answer.certificates, authority)?;
        identity.save()?;
        Ok(identity)
    }

    fn new(
        name: NodeName,
        file: PathBuf,
        key: KeyPair,
        certificates: Vec<Vec<u8>>,
        authority: CertificateDer<'static>,
    ) -> anyhow::Result<Self> {
        let presented = Arc::new(Presented(ArcSwap::from(certified(&key, certificates)?)));
        Ok(Identity { name, file, key, authority, presented })
    }

    fn save(&self) -> anyhow::Result<()> {
        let stored = Stored {
            name: self.name.to_string(),
            key: URL_SAFE_NO_PAD.encode(self.key.serialize_der()),
            certificates: self
                .presented
                .0
                .load()
                .cert
                .iter()
                .map(|der| URL_SAFE_NO_PAD.encode(der))
                .collect(),
            authority: URL_SAFE_NO_PAD.encode(&self.authority),
        };
        let next = self.file.with_extension("new");
        let mut file =
            fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&next)?;
        file.write_all(&serde_json::to_vec(&stored)?)?;
        file.sync_all()?;
        fs::rename(&next, &self.file)?;
        Ok(())
    }

    /// A channel to the control plane, opened when it is used and again when it breaks.
    ///
    /// # Errors
    /// When `address` is none.
    pub fn channel(&self, address: &str) -> anyhow::Result<Channel> {
        channel(address, client_tls(&self.authority, Some(self.presented.clone()))?)
    }

    /// Renews the certificate at half of its life, for ever.
    pub async fn keep_renewed(&self, channel: Channel, clock: Arc<dyn Clock>) {
        loop {
            let pause = match self.half_life() {
                Some(half) if clock.now() >= half => match self.renew(channel.clone()).await {
                    Ok(()) => RENEWAL_CHECK,
                    Err(error) => {
                        tracing::warn!(%error, "the node's certificate could not be renewed yet");
                        RETRY * 60
                    }
                },
                _ => RENEWAL_CHECK,
            };
            tokio::time::sleep(pause).await;
        }
    }

    fn half_life(&self) -> Option<Timestamp> {
        let presented = self.presented.0.load();
        let (_, certificate) = X509Certificate::from_der(presented.cert.first()?).ok()?;
        let validity = certificate.validity();
        let middle = i64::midpoint(validity.not_before.timestamp(), validity.not_after.timestamp());
        Some(Timestamp::from_millis(middle * 1000))
    }

    async fn renew(&self, channel: Channel) -> anyhow::Result<()> {
        let csr = CertificateParams::default().serialize_request(&self.key)?;
        let request = RenewCertificateRequest { csr: csr.der().to_vec() };
        let answer = DiscoveryServiceClient::new(channel).renew_certificate(request).await?.into_inner();
        self.presented.0.store(certified(&self.key, answer.certificates)?);
        self.save()
    }
}

/// Ships closed segments of the journal in order, for ever.
pub async fn ship(journal: Arc<Journal>, channel: Channel) {
    let mut client = DiscoveryServiceClient::new(channel).max_encoding_message_size(usize::MAX);
    loop {
        let segment = journal.next_segment().await;
        match client.ship_segment(ShipSegmentRequest { segment: segment.encode() }).await {
            Ok(_) => journal.acknowledge(&segment.id()),
            Err(status) => {
                tracing::debug!(code = ?status.code(), "audit segments wait for the control plane");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

fn certified(key: &KeyPair, certificates: Vec<Vec<u8>>) -> anyhow::Result<Arc<CertifiedKey>> {
    if certificates.is_empty() {
        bail!("the control plane gave no certificate");
    }
    let chain = certificates.into_iter().map(CertificateDer::from).collect();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    Ok(Arc::new(CertifiedKey::from_der(chain, key, &provider)?))
}

fn client_tls(
    authority: &CertificateDer<'static>,
    presented: Option<Arc<Presented>>,
) -> anyhow::Result<Arc<rustls::ClientConfig>> {
    let mut roots = RootCertStore::empty();
    roots.add(authority.clone())?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots);
    let mut config = match presented {
        Some(presented) => config.with_client_cert_resolver(presented),
        None => config.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

/// `https://host:port` of the control plane's listener for nodes.
fn channel(address: &str, tls: Arc<rustls::ClientConfig>) -> anyhow::Result<Channel> {
    let uri: Uri =
        address.parse().with_context(|| format!("`{address}` is no address such as https://host:8201"))?;
    if uri.scheme_str() != Some("https") {
        bail!("the control plane's address begins with https://; nodes speak mutual TLS only");
    }
    let host =
        uri.host().context("the control plane's address has no host")?.trim_matches(['[', ']']).to_owned();
    let port = uri.port_u16().unwrap_or(8201);
    let connector = TlsConnector::from(tls);
    let connect = service_fn(move |_: Uri| {
        let (connector, host) = (connector.clone(), host.clone());
        async move {
            let stream = TcpStream::connect((host.as_str(), port)).await?;
            stream.set_nodelay(true)?;
            let name = ServerName::try_from(CONTROL_PLANE_NAME).expect("a constant DNS name");
            Ok::<_, io::Error>(TokioIo::new(connector.connect(name, stream).await?))
        }
    });
    // The connector does TLS; `http` keeps tonic from doing it again.
    let endpoint = Endpoint::from_shared(format!("http://{CONTROL_PLANE_NAME}"))?
        .connect_timeout(Duration::from_secs(3))
        .http2_keep_alive_interval(Duration::from_secs(3))
        .keep_alive_timeout(Duration::from_secs(3))
        .keep_alive_while_idle(true);
    Ok(endpoint.connect_with_connector_lazy(connect))
}

fn decode(text: &str) -> anyhow::Result<Vec<u8>> {
    Ok(URL_SAFE_NO_PAD.decode(text)?)
}
