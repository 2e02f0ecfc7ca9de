//! How a fake listens: HTTP on loopback, with TLS if asked for.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use anyhow::Result;
use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;

use crate::authority::Authority;

/// A port that is taken and not served yet: a fake writes its own address into what it hands out.
#[derive(Debug)]
pub struct Bound {
    listener: TcpListener,
    address: SocketAddr,
    tls: Option<Arc<ServerConfig>>,
}

/// A router being served; dropping it closes every connection.
#[derive(Debug)]
pub struct Serving(JoinHandle<()>);

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Bound {
    /// Takes a free port on loopback.
    ///
    /// # Errors
    /// If there is none.
    pub async fn plain() -> Result<Bound> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        Ok(Bound { address: listener.local_addr()?, listener, tls: None })
    }

    /// Takes a free port on loopback, to serve TLS with a certificate of this authority.
    ///
    /// # Errors
    /// If there is none, or no certificate could be made.
    pub async fn tls(authority: &Authority) -> Result<Bound> {
        // Whoever is first in this process installs it.
        drop(rustls::crypto::aws_lc_rs::default_provider().install_default());
        let issued = authority.issue()?;
        let chain = vec![CertificateDer::from_pem_slice(issued.certificate.as_bytes())?];
        let key = PrivateKeyDer::from_pem_slice(issued.key.as_bytes())?;
        let mut config = ServerConfig::builder().with_no_client_auth().with_single_cert(chain, key)?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Bound { tls: Some(Arc::new(config)), ..Bound::plain().await? })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its base URL, without a slash at the end.
    pub fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    /// Serves until the result is dropped.
    pub fn serve(self, router: Router) -> Serving {
        Serving(tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let accepted = tokio::select! {
                    accepted = self.listener.accept() => accepted,
                    Some(_ended) = connections.join_next() => continue,
                };
                // Out of file handles: the next one may be luckier.
                let Ok((stream, _)) = accepted else { continue };
                let (tls, router) = (self.tls.clone(), router.clone());
                connections.spawn(async move {
                    let Some(tls) = tls else { return converse(stream, router).await };
                    // A client that does not trust us is the client's matter.
                    if let Ok(stream) = TlsAcceptor::from(tls).accept(stream).await {
                        converse(stream, router).await;
                    }
                });
            }
        }))
    }
}

async fn converse(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, router: Router) {
    let service = TowerToHyperService::new(router);
    let server = auto::Builder::new(TokioExecutor::new());
    // A connection that breaks is the client's to notice.
    drop(server.serve_connection(TokioIo::new(stream), service).await);
}
