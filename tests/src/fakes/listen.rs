//! How fakes are served.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use anyhow::Result;
use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;

use crate::authority::ServerCertificate;

/// A router that is served until this is dropped. Its open connections go with it.
#[derive(Debug)]
pub(super) struct Listening(JoinHandle<()>);

impl Drop for Listening {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A listener on a free port of loopback, so that what is served can know its own address first.
pub(super) async fn bind() -> Result<(TcpListener, SocketAddr)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let addr = listener.local_addr()?;
    Ok((listener, addr))
}

/// Serves HTTP/1 and HTTP/2, over TLS if there is a certificate.
pub(super) fn serve(
    listener: TcpListener,
    router: Router,
    certificate: Option<&ServerCertificate>,
) -> Result<Listening> {
    let tls = certificate.map(acceptor).transpose()?;
    Ok(Listening(tokio::spawn(async move {
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                accepted = listener.accept() => {
                    // A connection that was gone before it was accepted is nobody's loss.
                    if let Ok((stream, _)) = accepted {
                        connections.spawn(connection(stream, tls.clone(), router.clone()));
                    }
                }
                Some(_ended) = connections.join_next() => {}
            }
        }
    })))
}

fn acceptor(certificate: &ServerCertificate) -> Result<TlsAcceptor> {
    let chain = vec![CertificateDer::from_pem_slice(certificate.certificate.as_bytes())?];
    let key = PrivateKeyDer::from_pem_slice(certificate.key.as_bytes())?;
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let mut config = builder.with_no_client_auth().with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

async fn connection(stream: TcpStream, tls: Option<TlsAcceptor>, router: Router) {
    match tls {
        // A handshake that fails is the client's to report.
        Some(tls) => {
            if let Ok(stream) = tls.accept(stream).await {
                converse(stream, router).await;
            }
        }
        None => converse(stream, router).await,
    }
}

async fn converse(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, router: Router) {
    let service = TowerToHyperService::new(router);
    // It ends when either side closes, and with an error when a fault breaks an answer off.
    drop(Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await);
}
