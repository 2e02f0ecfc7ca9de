use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use scaivault_proto::secrets::v1 as proto;
use scaivault_proto::secrets::v1::SecretType;
use scaivault_proto::secrets::v1::secrets_service_client::SecretsServiceClient;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use tonic_reflection::pb::v1::{ServerReflectionRequest, ServerReflectionResponse};

use super::fake::Fake;
use super::front_of;
use crate::{ClientCertificates, Limits, PeerCertificates, TlsSource, serve};

/// A front on loopback.
struct Served {
    fake: Arc<Fake>,
    address: SocketAddr,
    shutdown: CancellationToken,
    task: JoinHandle<()>,
}

async fn served(tls: Option<TlsSource>, limits: Limits) -> Served {
    let fake = Arc::new(Fake::default());
    fake.hold("a", SecretType::Json, br#"{"k":"v"}"#);
    let (address, shutdown, task) = serving(front_of(fake.clone()), tls, limits).await;
    Served { fake, address, shutdown, task }
}

async fn serving(
    router: axum::Router,
    tls: Option<TlsSource>,
    limits: Limits,
) -> (SocketAddr, CancellationToken, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, shutdown) = (listener.local_addr().unwrap(), CancellationToken::new());
    let task = tokio::spawn(serve(listener, tls, router, limits, shutdown.clone()));
    (address, shutdown, task)
}

/// An authority and what it signs.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Authority(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn root(&self) -> CertificateDer<'static> {
        self.0.der().clone()
    }

    fn sign(&self, name: &str) -> (rcgen::Certificate, KeyPair) {
        let key = KeyPair::generate().unwrap();
        let certificate =
            CertificateParams::new([name.to_owned()]).unwrap().signed_by(&key, &self.0).unwrap();
        (certificate, key)
    }

    fn identity(&self, name: &str) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        let (certificate, key) = self.sign(name);
        (vec![certificate.der().clone()], PrivateKeyDer::try_from(key.serialize_der()).unwrap())
    }

    fn source(&self, clients: ClientCertificates) -> TlsSource {
        let (chain, key) = self.identity("localhost");
        TlsSource::new(chain, key, clients).unwrap()
    }

    /// A client that trusts the authority and shows `identity`.
    fn client(&self, alpn: &[u8], identity: Option<&Authority>) -> Arc<ClientConfig> {
        let mut roots = RootCertStore::empty();
        roots.add(self.root()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder =
            ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let builder = builder.with_root_certificates(roots);
        let mut config = match identity {
            None => builder.with_no_client_auth(),
            Some(authority) => {
                let (chain, key) = authority.identity("node-1");
                builder.with_client_auth_cert(chain, key).unwrap()
            }
        };
        config.alpn_protocols = vec![alpn.to_vec()];
        Arc::new(config)
    }
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

async fn connect(address: SocketAddr, tls: Option<Arc<ClientConfig>>) -> std::io::Result<Box<dyn Stream>> {
    let stream = TcpStream::connect(address).await?;
    let Some(tls) = tls else { return Ok(Box::new(stream)) };
    let name = ServerName::try_from("localhost").unwrap();
    Ok(Box::new(TlsConnector::from(tls).connect(name, stream).await?))
}

/// Sends one HTTP/1.1 request and reads the answer.
async fn http1(
    stream: Box<dyn Stream>,
    request: http::Request<Full<bytes::Bytes>>,
) -> hyper::Result<(http::response::Parts, bytes::Bytes)> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let (parts, body) = sender.send_request(request).await?.into_parts();
    Ok((parts, body.collect().await?.to_bytes()))
}

fn get(path: &str) -> http::Request<Full<bytes::Bytes>> {
    http::Request::get(path).header("host", "localhost").body(Full::default()).unwrap()
}

async fn channel(address: SocketAddr, tls: Option<Arc<ClientConfig>>) -> Channel {
    let connector = tower::service_fn(move |_: http::Uri| {
        let tls = tls.clone();
        async move { connect(address, tls).await.map(TokioIo::new) }
    });
    Endpoint::from_static("http://localhost").connect_with_connector(connector).await.unwrap()
}

/// A gRPC frame.
fn framed(message: &impl prost::Message) -> Vec<u8> {
    let message = message.encode_to_vec();
    [&[0], u32::try_from(message.len()).unwrap().to_be_bytes().as_slice(), &message].concat()
}

async fn every_protocol_works(served: Served, tls: impl Fn(&[u8]) -> Option<Arc<ClientConfig>>) {
    let channel = channel(served.address, tls(b"h2")).await;
    let request = || proto::GetRequest { path: "a".into(), ..Default::default() };
    let grpc = SecretsServiceClient::new(channel.clone()).get(request()).await.unwrap();
    assert_eq!(grpc.metadata().get("x-request-id").unwrap().len(), 32);
    assert_eq!(grpc.into_inner().secret.unwrap().value, r#"{"k":"v"}"#);

    let ask = MessageRequest::ListServices(String::new());
    let ask = ServerReflectionRequest { host: String::new(), message_request: Some(ask) };
    let mut answers = ServerReflectionClient::new(channel)
        .server_reflection_info(futures::stream::iter([ask]))
        .await
        .unwrap()
        .into_inner();
    let Some(Ok(ServerReflectionResponse {
        message_response: Some(MessageResponse::ListServicesResponse(services)),
        ..
    })) = answers.next().await
    else {
        panic!("no list of services");
    };
    let services: Vec<_> = services.service.into_iter().map(|service| service.name).collect();
    for name in
        ["scaivault.secrets.v1.SecretsService", "scaivault.admin.v1.AdminService", "grpc.health.v1.Health"]
    {
        assert!(services.iter().any(|service| service == name), "{name} in {services:?}");
    }
    assert!(!services.iter().any(|service| service.contains("discovery")), "{services:?}");

    let stream = connect(served.address, tls(b"http/1.1")).await.unwrap();
    let (parts, body) = http1(stream, get("/v1/secrets/a")).await.unwrap();
    assert_eq!((parts.status.as_u16(), &parts.headers["etag"]), (200, &"\"v3\"".parse().unwrap()));
    assert!(body.starts_with(br#"{"path":"a""#));

    let stream = connect(served.address, tls(b"h2")).await.unwrap();
    let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
    let (mut sender, connection) = handshake.await.unwrap();
    tokio::spawn(connection);
    let request_over_http2 =
        http::Request::get("http://localhost/v1/secrets/a").body(Full::<bytes::Bytes>::default());
    let response = sender.send_request(request_over_http2.unwrap()).await.unwrap();
    assert_eq!((response.status().as_u16(), response.version()), (200, http::Version::HTTP_2));

    let web = http::Request::post("/scaivault.secrets.v1.SecretsService/Get")
        .header("host", "localhost")
        .header("content-type", "application/grpc-web+proto")
        .body(Full::from(framed(&request())))
        .unwrap();
    let stream = connect(served.address, tls(b"http/1.1")).await.unwrap();
    let (parts, body) = http1(stream, web).await.unwrap();
    assert_eq!(parts.headers["content-type"], "application/grpc-web+proto");
    let text = String::from_utf8_lossy(&body);
    assert!(text.contains(r#"{"k":"v"}"#) && text.contains("grpc-status:0"), "{text}");

    served.shutdown.cancel();
    served.task.await.unwrap();
}

#[tokio::test]
async fn every_protocol_works_on_one_plain_port() {
    every_protocol_works(served(None, Limits::default()).await, |_| None).await;
}

#[tokio::test]
async fn every_protocol_works_on_one_tls_port() {
    let authority = Authority::new();
    let tls = authority.source(ClientCertificates::Ignored);
    let served = served(Some(tls), Limits::default()).await;
    every_protocol_works(served, |alpn| Some(authority.client(alpn, None))).await;
}

#[tokio::test]
async fn a_caller_that_never_finishes_its_head_is_cut_off() {
    let limits = Limits {
        handshake: Duration::from_millis(50),
        header_read: Duration::from_millis(50),
        ..Limits::default()
    };
    let served = served(None, limits).await;
    for begun in ["", "PRI * HTT", "GET /livez HTTP/1.1\r\nx-slow: ", "G"] {
        let mut stream = TcpStream::connect(served.address).await.unwrap();
        stream.write_all(begun.as_bytes()).await.unwrap();
        let mut rest = Vec::new();
        let cut = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut rest)).await;
        assert!(cut.is_ok(), "{begun:?} still open");
    }
}

#[tokio::test]
async fn a_preface_in_pieces_is_still_one() {
    let served = served(None, Limits::default()).await;
    let mut stream = TcpStream::connect(served.address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    for piece in [b"PRI * HTTP/2.0".as_slice(), b"\r\n\r\nSM\r\n\r\n", &[0, 0, 0, 4, 0, 0, 0, 0, 0]] {
        stream.write_all(piece).await.unwrap();
        tokio::task::yield_now().await;
    }
    let mut head = [0; 9];
    stream.read_exact(&mut head).await.unwrap();
    assert_eq!(head[3], 4, "the server's SETTINGS");
}

#[tokio::test]
async fn too_many_headers_are_refused() {
    let served = served(None, Limits { headers: 8, ..Limits::default() }).await;
    let mut request = get("/livez");
    for number in 0..16 {
        let name = http::HeaderName::try_from(format!("x-{number}")).unwrap();
        request.headers_mut().insert(name, "1".parse().unwrap());
    }
    let stream = connect(served.address, None).await.unwrap();
    assert_eq!(http1(stream, request).await.unwrap().0.status, 431);
}

#[tokio::test]
async fn connections_beyond_the_limit_wait_their_turn() {
    let served = served(None, Limits { connections: 1, ..Limits::default() }).await;
    let mut first = TcpStream::connect(served.address).await.unwrap();
    first.write_all(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    first.read_u8().await.unwrap();
    let second = connect(served.address, None).await.unwrap();
    let mut second = tokio::spawn(http1(second, get("/livez")));
    let waiting = tokio::time::timeout(Duration::from_millis(100), &mut second).await;
    assert!(waiting.is_err());
    drop(first);
    assert_eq!(second.await.unwrap().unwrap().0.status, 200);
}

#[tokio::test]
async fn requests_under_way_end_before_the_listener_does() {
    let gate = Arc::new(tokio::sync::Semaphore::new(0));
    let (entered, opened) = (Arc::new(tokio::sync::Notify::new()), gate.clone());
    let seen = entered.clone();
    let handler = async move || {
        seen.notify_one();
        _ = opened.acquire().await;
        "done"
    };
    let router = axum::Router::new().route("/", axum::routing::get(handler));
    let (address, shutdown, task) = serving(router, None, Limits::default()).await;
    let idle = TcpStream::connect(address).await.unwrap();
    let request = tokio::spawn(http1(connect(address, None).await.unwrap(), get("/")));
    entered.notified().await;
    shutdown.cancel();
    gate.add_permits(1);
    assert_eq!(request.await.unwrap().unwrap().1, "done");
    task.await.unwrap();
    assert!(TcpStream::connect(address).await.is_err());
    drop(idle);
}

#[tokio::test]
async fn a_request_that_does_not_end_is_cut_after_the_drain() {
    let served = served(None, Limits { drain: Duration::from_millis(50), ..Limits::default() }).await;
    let stream = connect(served.address, None).await.unwrap();
    let request = tokio::spawn(http1(stream, get("/v1/secrets/slow")));
    while served.fake.context.lock().unwrap().is_none() {
        tokio::task::yield_now().await;
    }
    served.shutdown.cancel();
    served.task.await.unwrap();
    assert!(request.await.unwrap().is_err());
}

#[tokio::test]
async fn certificates_of_callers_are_verified_and_handed_on() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let subject = async |request: axum::extract::Request| match request.extensions().get::<PeerCertificates>()
    {
        Some(PeerCertificates(chain)) => format!("{} certificates", chain.len()),
        None => "nobody".to_owned(),
    };
    let router = axum::Router::new().route("/", axum::routing::get(subject));
    let roots = || vec![authority.root()];
    let shown = async |clients: ClientCertificates, identity: Option<&Authority>| {
        let source = authority.source(clients);
        let (address, shutdown, task) = serving(router.clone(), Some(source), Limits::default()).await;
        let answered = async {
            let stream = connect(address, Some(authority.client(b"http/1.1", identity))).await.ok()?;
            let (_, body) = http1(stream, get("/")).await.ok()?;
            Some(String::from_utf8(body.to_vec()).unwrap())
        };
        let answered = answered.await;
        shutdown.cancel();
        task.await.unwrap();
        answered
    };
    let one = || Some("1 certificates".to_owned());
    let nobody = || Some("nobody".to_owned());
    assert_eq!(shown(ClientCertificates::Required(roots()), Some(&authority)).await, one());
    assert_eq!(shown(ClientCertificates::Required(roots()), None).await, None);
    assert_eq!(shown(ClientCertificates::Required(roots()), Some(&stranger)).await, None);
    assert_eq!(shown(ClientCertificates::Optional(roots()), Some(&authority)).await, one());
    assert_eq!(shown(ClientCertificates::Optional(roots()), None).await, nobody());
    assert_eq!(shown(ClientCertificates::Optional(roots()), Some(&stranger)).await, None);
    assert_eq!(shown(ClientCertificates::Ignored, Some(&authority)).await, nobody());
}

#[tokio::test]
async fn a_replaced_certificate_is_served_from_the_next_handshake_on() {
    let (old, new) = (Authority::new(), Authority::new());
    let source = old.source(ClientCertificates::Ignored);
    let served = served(Some(source.clone()), Limits::default()).await;
    let trusted = async |authority: &Authority| {
        connect(served.address, Some(authority.client(b"h2", None))).await.is_ok()
    };
    assert!(trusted(&old).await && !trusted(&new).await);
    let (chain, key) = new.identity("localhost");
    source.replace(chain, key).unwrap();
    assert!(trusted(&new).await && !trusted(&old).await);
    let ((chain, _), (_, key)) = (old.identity("localhost"), new.identity("localhost"));
    assert!(source.replace(chain, key).is_err(), "a key of another certificate");
    assert!(trusted(&new).await);
}

#[tokio::test(start_paused = true)]
async fn a_certificate_that_changes_on_disk_is_reloaded_and_a_broken_one_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let (chain_path, key_path) = (folder.path().join("chain.pem"), folder.path().join("key.pem"));
    let mut clock = std::time::UNIX_EPOCH;
    let mut write = |chain: String, key: String| {
        clock += Duration::from_secs(60);
        for (path, text) in [(&chain_path, chain), (&key_path, key)] {
            std::fs::write(path, text).unwrap();
            std::fs::File::options().write(true).open(path).unwrap().set_modified(clock).unwrap();
        }
    };
    let authority = Authority::new();
    let (old, old_key) = authority.sign("old");
    let (new, new_key) = authority.sign("new");
    write(old.pem(), old_key.serialize_pem());
    let source = TlsSource::from_files(chain_path.clone(), key_path.clone(), ClientCertificates::Ignored);
    let source = source.await.unwrap();
    assert_eq!(source.served(), *old.der());
    write(new.pem(), old_key.serialize_pem());
    tokio::time::sleep(Duration::from_secs(61)).await;
    assert_eq!(source.served(), *old.der());
    write(new.pem(), new_key.serialize_pem());
    while source.served() != *new.der() {
        tokio::time::sleep(Duration::from_secs(30)).await;
    }
}

#[tokio::test]
async fn files_without_a_certificate_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.pem");
    let load = || TlsSource::from_files(path.clone(), path.clone(), ClientCertificates::Ignored);
    assert!(matches!(load().await, Err(crate::TlsError::Unreadable { .. })));
    std::fs::write(&path, "nothing").unwrap();
    assert!(matches!(load().await, Err(crate::TlsError::Pem(_))));
}
