//! Serving a router on a listener, within limits, until told to stop.

use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use rustls_pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::Service as _;

use crate::tls::TlsSource;

/// What every HTTP/2 connection without TLS begins with.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const ALPN_HTTP2: &[u8] = b"h2";
/// hyper panics below this.
const SMALLEST_BUFFER: u32 = 8192;

/// The verified certificates of the caller, its own first: an extension of requests over TLS with client certificates.
#[derive(Clone, Debug)]
pub struct PeerCertificates(pub Arc<[CertificateDer<'static>]>);

/// How much callers may ask of a listener.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections at a time; further ones wait in the kernel's queue.
    pub connections: usize,
    /// The time for a TLS handshake, and for the first bytes of a plain connection.
    pub handshake: Duration,
    /// The time for the head of an HTTP/1.1 request, which is also how long a connection may be idle before it.
    pub header_read: Duration,
    /// Headers of a request.
    pub headers: usize,
    /// Bytes of a request's head; at least 8 KiB over HTTP/1.1.
    pub header_bytes: u32,
    /// Requests at a time on one HTTP/2 connection.
    pub streams: u32,
    /// How often an HTTP/2 connection is pinged; one that does not answer within 20 s is closed.
    pub ping: Duration,
    /// The time that requests under way have when the listener stops.
    pub drain: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            connections: 10_000,
            handshake: Duration::from_secs(10),
            header_read: Duration::from_secs(30),
            headers: 64,
            header_bytes: 32 * 1024,
            streams: 256,
            ping: Duration::from_secs(30),
            drain: Duration::from_secs(20),
        }
    }
}

/// Serves `router` until `shutdown`; then takes no new connection, lets requests under way end within
/// [`Limits::drain`], and cuts what is left.
pub async fn serve(
    listener: TcpListener,
    tls: Option<TlsSource>,
    router: Router,
    limits: Limits,
    shutdown: CancellationToken,
) {
    let slots = Arc::new(Semaphore::new(limits.connections));
    let connections = TaskTracker::new();
    let cut = CancellationToken::new();
    let server = Arc::new(Server::new(tls, router, limits, shutdown.clone()));
    let accept = async {
        loop {
            let slot = slots.clone().acquire_owned().await.expect("the semaphore is never closed");
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Most often out of file descriptors: those of ended connections come back.
                    tracing::warn!(error = &error as &dyn std::error::Error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let (server, cut) = (server.clone(), cut.clone());
            connections.spawn(async move {
                if let Some(Err(error)) = cut.run_until_cancelled(server.connection(stream)).await {
                    tracing::debug!(error = &*error, "a connection ended early");
                }
                drop(slot);
            });
        }
    };
    shutdown.run_until_cancelled(accept).await;
    drop(listener);
    connections.close();
    if tokio::time::timeout(server.limits.drain, connections.wait()).await.is_err() {
        tracing::warn!(connections = connections.len(), "cutting connections that did not end in time");
        cut.cancel();
        connections.wait().await;
    }
}

type Ended = Result<(), Box<dyn std::error::Error + Send + Sync>>;

/// What all connections of a listener have in common.
struct Server {
    tls: Option<TlsAcceptor>,
    router: Router,
    http1: Builder<TokioExecutor>,
    http2: Builder<TokioExecutor>,
    limits: Limits,
    shutdown: CancellationToken,
}

impl Server {
    fn new(tls: Option<TlsSource>, router: Router, limits: Limits, shutdown: CancellationToken) -> Self {
        let mut builder = Builder::new(TokioExecutor::new());
        builder
            .http1()
            .timer(TokioTimer::new())
            .header_read_timeout(limits.header_read)
            .max_headers(limits.headers)
            .max_buf_size(limits.header_bytes.max(SMALLEST_BUFFER) as usize);
        builder
            .http2()
            .timer(TokioTimer::new())
            .max_concurrent_streams(limits.streams)
            .max_header_list_size(limits.header_bytes)
            .max_pending_accept_reset_streams(32)
            .max_local_error_reset_streams(64)
            .keep_alive_interval(limits.ping)
            .keep_alive_timeout(Duration::from_secs(20));
        Server {
            tls: tls.map(|tls| TlsAcceptor::from(tls.config())),
            router,
            http1: builder.clone().http1_only(),
            http2: builder.http2_only(),
            limits,
            shutdown,
        }
    }

    async fn connection(&self, stream: TcpStream) -> Ended {
        stream.set_nodelay(true)?;
        let Some(tls) = &self.tls else {
            let http2 = self.in_time(speaks_http2(&stream)).await?;
            return self.requests(stream, if http2 { &self.http2 } else { &self.http1 }, None).await;
        };
        let stream = self.in_time(tls.accept(stream)).await?;
        let session = stream.get_ref().1;
        let peer = session.peer_certificates().map(|chain| {
            PeerCertificates(chain.iter().map(|certificate| certificate.clone().into_owned()).collect())
        });
        let http2 = session.alpn_protocol() == Some(ALPN_HTTP2);
        self.requests(stream, if http2 { &self.http2 } else { &self.http1 }, peer).await
    }

    async fn in_time<T>(&self, handshake: impl Future<Output = io::Result<T>>) -> io::Result<T> {
        let begun =
            async { tokio::time::timeout(self.limits.handshake, handshake).await.map_err(io::Error::from)? };
        // Whoever has not even begun when the listener stops has nothing that could be waited for.
        let begun = self.shutdown.run_until_cancelled(begun).await;
        begun.unwrap_or_else(|| Err(io::Error::from(io::ErrorKind::ConnectionAborted)))
    }

    async fn requests(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        http: &Builder<TokioExecutor>,
        peer: Option<PeerCertificates>,
    ) -> Ended {
        let service = service_fn(|mut request: hyper::Request<Incoming>| {
            if let Some(peer) = &peer {
                request.extensions_mut().insert(peer.clone());
            }
            self.router.clone().call(request)
        });
        let mut connection = pin!(http.serve_connection(TokioIo::new(stream), service));
        tokio::select! {
            ended = connection.as_mut() => return ended,
            () = self.shutdown.cancelled() => connection.as_mut().graceful_shutdown(),
        }
        connection.await
    }
}

/// Whether a plain connection begins as HTTP/2 does. Reads nothing.
///
/// hyper can tell too, but waits for ever for the first bytes.
async fn speaks_http2(stream: &TcpStream) -> io::Result<bool> {
    let mut seen = [0; PREFACE.len()];
    loop {
        let length = stream.peek(&mut seen).await?;
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if seen[..length] != PREFACE[..length] {
            return Ok(false);
        }
        if length == PREFACE.len() {
            return Ok(true);
        }
        // A preface in pieces. `peek` returns at once with what it has shown before, so waiting means sleeping.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
