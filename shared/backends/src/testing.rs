//! A server that answers what a test tells it to, byte for byte.

use std::sync::{Arc, Mutex};

use scaivault_domain::backend::{Endpoint, VaultTarget};
use secrecy::SecretString;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::Barrier;
use tokio_rustls::TlsAcceptor;

use crate::egress::{Egress, Policy};
use crate::{Lease, Material};

/// What the server does after the head of a request.
pub(crate) enum Reply {
    Bytes(Vec<u8>),
    /// Bytes, as soon as as many requests wait for theirs as the barrier is for.
    Together(Arc<Barrier>, Vec<u8>),
    Silence,
}

/// The whole answer, with a JSON body.
pub(crate) fn json(status: u16, body: &str) -> Reply {
    with_header(status, "x-test: 1", body)
}

/// [`json`] with one more header.
pub(crate) fn with_header(status: u16, header: &str, body: &str) -> Reply {
    let length = body.len();
    let head =
        format!("HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n");
    Reply::Bytes(format!("{head}{header}\r\nconnection: close\r\n\r\n{body}").into_bytes())
}

/// A running server; stops with the test's runtime.
pub(crate) struct Server {
    pub(crate) address: String,
    heads: Arc<Mutex<Vec<String>>>,
}

impl Server {
    /// Answers each request by what `reply` says to its path, query included.
    pub(crate) async fn start(reply: impl Fn(&str) -> Reply + Send + Sync + 'static) -> Self {
        Self::serve(None, move |path, _| reply(path)).await
    }

    /// [`Self::start`], where the reply depends on the headers and the body behind them too.
    pub(crate) async fn start_with_heads(
        reply: impl Fn(&str, &str) -> Reply + Send + Sync + 'static,
    ) -> Self {
        Self::serve(None, reply).await
    }

    pub(crate) async fn start_tls(
        acceptor: TlsAcceptor,
        reply: impl Fn(&str) -> Reply + Send + Sync + 'static,
    ) -> Self {
        Self::serve(Some(acceptor), move |path, _| reply(path)).await
    }

    async fn serve(
        tls: Option<TlsAcceptor>,
        reply: impl Fn(&str, &str) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback has free ports");
        let address = listener.local_addr().expect("it is bound").to_string();
        let heads = Arc::new(Mutex::new(Vec::new()));
        let (seen, reply) = (heads.clone(), Arc::new(reply));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (seen, reply, tls) = (seen.clone(), reply.clone(), tls.clone());
                tokio::spawn(async move {
                    match tls {
                        None => converse(stream, &seen, &*reply).await,
                        Some(tls) => {
                            let Ok(stream) = tls.accept(stream).await else { return };
                            converse(stream, &seen, &*reply).await;
                        }
                    }
                });
            }
        });
        Server { address, heads }
    }

    /// The requests so far, as they came, each with its body behind the head.
    pub(crate) fn heads(&self) -> Vec<String> {
        self.heads.lock().expect("no test panicked with it").clone()
    }

    /// Their paths, queries included.
    pub(crate) fn paths(&self) -> Vec<String> {
        self.heads().iter().map(|head| path_of(head).to_owned()).collect()
    }

    pub(crate) fn target(&self) -> VaultTarget {
        let url = format!("http://{}", self.address);
        VaultTarget::at(Endpoint::parse("endpoint", &url).expect("an address is a URL"))
    }
}

fn path_of(head: &str) -> &str {
    head.split(' ').nth(1).unwrap_or("")
}

fn length_of_body(head: &[u8]) -> usize {
    let head = String::from_utf8_lossy(head).to_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
    length.map_or(0, |length| length.trim().parse().expect("our client counts right"))
}

async fn converse(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    seen: &Mutex<Vec<String>>,
    reply: &(impl Fn(&str, &str) -> Reply + ?Sized),
) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let Ok(byte) = stream.read_u8().await else { return };
        head.push(byte);
    }
    let mut body = vec![0; length_of_body(&head)];
    if stream.read_exact(&mut body).await.is_err() {
        return;
    }
    head.append(&mut body);
    let head = String::from_utf8_lossy(&head).into_owned();
    let reply = reply(path_of(&head), &head);
    seen.lock().expect("no test panicked with it").push(head);
    match reply {
        Reply::Bytes(bytes) => {
            // The client may have hung up already.
            let _ = stream.write_all(&bytes).await;
            let _ = stream.shutdown().await;
        }
        Reply::Together(others, bytes) => {
            others.wait().await;
            let _ = stream.write_all(&bytes).await;
            let _ = stream.shutdown().await;
        }
        Reply::Silence => std::future::pending().await,
    }
}

/// For servers on loopback.
pub(crate) fn egress() -> Egress {
    Egress::new(Policy::default().with_loopback())
}

/// A lease on the token `token`.
pub(crate) fn lease(token: &str) -> Lease {
    Lease {
        id: format!("lease of {token}"),
        material: Material::VaultToken(SecretString::from(token)),
        expires_at: None,
        login_generation: 0,
    }
}
