//! TLS whose certificate can change while it is served.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{RootCertStore, ServerConfig, version};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

/// How often files are looked at for a change.
const POLLED_EVERY: Duration = Duration::from_secs(30);

/// Why there is no TLS, or why the certificate stays the one it is.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file cannot be read: check its path and mode.
    #[error("cannot read {path}")]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The text is no PEM, or has no certificate or no key.
    #[error("no PEM with a certificate chain and a private key")]
    Pem(#[source] rustls_pki_types::pem::Error),
    /// The certificate and the key do not belong together, or are of a kind that is not supported.
    #[error("the certificate and the key cannot be used together")]
    Key(#[source] rustls::Error),
    /// The roots for client certificates cannot be used.
    #[error("the roots for client certificates cannot be used")]
    Roots(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Whether callers show a certificate. Where they can, TLS 1.3 is demanded: those callers are our own.
#[derive(Clone, Debug)]
pub enum ClientCertificates {
    /// They are not asked for.
    Ignored,
    /// A caller without one is served too; one that does not chain to the roots is refused.
    Optional(Vec<CertificateDer<'static>>),
    /// Only callers whose certificate chains to these roots are served.
    Required(Vec<CertificateDer<'static>>),
}

/// The TLS of a listener. Clones share the certificate.
#[derive(Clone, Debug)]
pub struct TlsSource {
    config: Arc<ServerConfig>,
    current: Arc<Current>,
}

impl TlsSource {
    /// TLS with this chain, the server's own certificate first, and its key.
    ///
    /// # Errors
    /// If they do not fit together.
    pub fn new(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        clients: ClientCertificates,
    ) -> Result<Self, TlsError> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let current = Arc::new(Current {
            certified: ArcSwap::from_pointee(certified(chain, key, &provider)?),
            provider: provider.clone(),
        });
        let versions = match clients {
            ClientCertificates::Ignored => rustls::ALL_VERSIONS,
            ClientCertificates::Optional(_) | ClientCertificates::Required(_) => &[&version::TLS13],
        };
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(versions)
            .map_err(TlsError::Key)?;
        let verifier = |roots: Vec<CertificateDer<'static>>| {
            let mut store = RootCertStore::empty();
            for root in roots {
                store.add(root).map_err(|error| TlsError::Roots(error.into()))?;
            }
            Ok(WebPkiClientVerifier::builder_with_provider(store.into(), provider))
        };
        let refused = |error: rustls::server::VerifierBuilderError| TlsError::Roots(error.into());
        let builder = match clients {
            ClientCertificates::Ignored => builder.with_no_client_auth(),
            ClientCertificates::Optional(roots) => {
                let verifier = verifier(roots)?.allow_unauthenticated().build().map_err(refused)?;
                builder.with_client_cert_verifier(verifier)
            }
            ClientCertificates::Required(roots) => {
                builder.with_client_cert_verifier(verifier(roots)?.build().map_err(refused)?)
            }
        };
        let mut config = builder.with_cert_resolver(current.clone());
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(TlsSource { config: Arc::new(config), current })
    }

    /// TLS with the PEM chain and key in these files. They are looked at again every 30 s; what cannot be used then is
    /// logged, and what was in use stays.
    ///
    /// # Errors
    /// If the files cannot be read or used.
    pub async fn from_files(
        chain: PathBuf,
        key: PathBuf,
        clients: ClientCertificates,
    ) -> Result<Self, TlsError> {
        let files = Files { chain, key };
        let modified = files.modified().await;
        let (chain, key) = files.read().await?;
        let source = TlsSource::new(chain, key, clients)?;
        tokio::spawn(follow(files, modified, Arc::downgrade(&source.current)));
        Ok(source)
    }

    /// Serves this certificate from the next handshake on.
    ///
    /// # Errors
    /// If they do not fit together; what was in use stays.
    pub fn replace(
        &self,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Result<(), TlsError> {
        self.current.replace(chain, key)
    }

    /// The configuration for accepting connections.
    pub(crate) fn config(&self) -> Arc<ServerConfig> {
        self.config.clone()
    }
}

/// The certificate in use.
#[derive(Debug)]
struct Current {
    certified: ArcSwap<CertifiedKey>,
    provider: Arc<CryptoProvider>,
}

impl Current {
    fn replace(
        &self,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Result<(), TlsError> {
        self.certified.store(Arc::new(certified(chain, key, &self.provider)?));
        Ok(())
    }
}

impl ResolvesServerCert for Current {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.certified.load_full())
    }
}

fn certified(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    provider: &CryptoProvider,
) -> Result<CertifiedKey, TlsError> {
    CertifiedKey::from_der(chain, key, provider).map_err(TlsError::Key)
}

/// A certificate on disk.
struct Files {
    chain: PathBuf,
    key: PathBuf,
}

type Modified = [Option<SystemTime>; 2];

impl Files {
    async fn modified(&self) -> Modified {
        let of = async |path: &Path| tokio::fs::metadata(path).await.ok()?.modified().ok();
        [of(&self.chain).await, of(&self.key).await]
    }

    async fn read(&self) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), TlsError> {
        let read = async |path: &Path| {
            let unreadable = |source| TlsError::Unreadable { path: path.to_owned(), source };
            tokio::fs::read(path).await.map(zeroize::Zeroizing::new).map_err(unreadable)
        };
        let (chain, key) = (read(&self.chain).await?, read(&self.key).await?);
        let chain = CertificateDer::pem_slice_iter(&chain).collect::<Result<Vec<_>, _>>();
        let key = PrivateKeyDer::from_pem_slice(&key).map_err(TlsError::Pem)?;
        Ok((chain.map_err(TlsError::Pem)?, key))
    }
}

/// Follows the files until nobody serves their certificate any more.
async fn follow(files: Files, mut seen: Modified, current: Weak<Current>) {
    loop {
        tokio::time::sleep(POLLED_EVERY).await;
        let Some(current) = current.upgrade() else { return };
        let modified = files.modified().await;
        if modified == seen {
            continue;
        }
        let outcome = match files.read().await {
            Ok((chain, key)) => current.replace(chain, key),
            Err(error) => Err(error),
        };
        match outcome {
            Ok(()) => {
                tracing::info!(file = %files.chain.display(), "serving the certificate's new version");
                seen = modified;
            }
            // Not marked as seen: the two files may be half written, and the next look finds them whole.
            Err(error) => {
                let error: &dyn std::error::Error = &error;
                tracing::warn!(file = %files.chain.display(), error, "the certificate's new version cannot be used");
            }
        }
    }
}

#[cfg(test)]
impl TlsSource {
    /// The certificate in use.
    pub(crate) fn served(&self) -> CertificateDer<'static> {
        self.current.certified.load().cert[0].clone()
    }
}
