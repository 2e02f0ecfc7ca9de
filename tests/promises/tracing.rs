//! Traces: one goes from the caller through a node to the backend or the control plane, and tells no secret.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use axum::body::{Body, to_bytes};
use axum::extract::Request;
use axum::response::Response;
use futures::future::try_join_all;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use prost::Message as _;
use reqwest::Method;
use scaivault_proto::secrets::v1::GetRequest;
use scaivault_tests::collector::{Collected, Collector};
use scaivault_tests::planes::{CREDENTIAL, Federated, Options, Rest};
use scaivault_tests::{http, wait};
use serde_json::json;
use tokio::net::TcpListener;

const NODE: &str = "scaivault-data-plane";
const CONTROL_PLANE: &str = "scaivault-control-plane";
/// The caller's own span.
const CALLER: &str = "00f067aa0ba902b7";

/// A trace that a caller began.
struct Trace(String);

impl Trace {
    fn begin() -> Trace {
        Trace(format!("{:032x}", rand::random::<u128>() | 1))
    }

    fn parent(&self, flags: &str) -> String {
        format!("00-{}-{CALLER}-{flags}", self.0)
    }

    /// A client whose requests are part of it.
    fn of(&self, rest: &Rest) -> Result<Rest> {
        rest.with_header("traceparent", &self.parent("01"))
    }
}

/// What stands before a server and notes the path and the `traceparent` of each request.
struct Tap {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<(String, String)>>>,
}

impl Tap {
    async fn open(upstream: SocketAddr) -> Result<Tap> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let (address, client) = (listener.local_addr()?, http::client(None)?);
        let seen: Arc<Mutex<Vec<_>>> = Arc::default();
        let noted = seen.clone();
        let pass = move |request: Request| {
            let parent = request.headers().get("traceparent").and_then(|value| value.to_str().ok());
            let note = (request.uri().path().to_owned(), parent.unwrap_or_default().to_owned());
            noted.lock().expect("no panic under it").push(note);
            let client = client.clone();
            async move { hand_on(&client, upstream, request).await.expect("the server answers") }
        };
        tokio::spawn(async move { axum::serve(listener, axum::Router::new().fallback(pass)).await });
        Ok(Tap { address, seen })
    }

    /// What came with requests of this path.
    fn parents(&self, path: &str) -> Vec<String> {
        let seen = self.seen.lock().expect("no panic under it");
        seen.iter().filter(|(seen, _)| seen == path).map(|(_, parent)| parent.clone()).collect()
    }
}

async fn hand_on(client: &reqwest::Client, upstream: SocketAddr, request: Request) -> Result<Response> {
    let (parts, body) = request.into_parts();
    let url = format!("http://{upstream}{}", parts.uri);
    let body = to_bytes(body, 1 << 20).await?;
    let answer = client.request(parts.method, url).headers(parts.headers).body(body).send().await?;
    let response = Response::builder().status(answer.status()).header("content-type", "application/json");
    Ok(response.body(Body::from(answer.bytes().await?))?)
}

/// OpenBao behind a tap as `tapped/**`, beside what [`Federated`] has; all planes export to the collector.
async fn traced() -> Result<(Federated, Collector, Tap, String)> {
    let collector = Collector::start().await?;
    let federated = Federated::start_with(Options::default().traces(collector.endpoint())).await?;
    let tap = Tap::open(federated.bao.socket()).await?;
    let mapping = json!({ "tapped/**": "secret/data/**" });
    let endpoint = format!("http://{}", tap.address);
    let rest = federated.planes.rest(0)?;
    let backend = rest.create_backend("tapped", &endpoint, CREDENTIAL, mapping).await?;
    Ok((federated, collector, tap, backend))
}

/// Stops the planes, which sends their last spans.
async fn stop(federated: &mut Federated) -> Result<()> {
    for node in &mut federated.planes.nodes {
        node.stop().await?;
    }
    federated.planes.control_plane.stop().await
}

fn assert_span(collected: &Collected, service: &str, kind: SpanKind, name: &str, parent: &str) {
    let span = &collected.span;
    let told = (collected.service.as_str(), span.kind(), span.name.as_str(), collected.parent());
    assert_eq!(told, (service, kind, name, parent.to_owned()));
}

#[tokio::test]
async fn a_trace_goes_from_the_caller_through_the_node_to_the_backend() -> Result<()> {
    let (mut federated, collector, tap, id) = traced().await?;
    let rest = federated.planes.rest(0)?;
    let (by_rest, by_grpc, unsampled) = (Trace::begin(), Trace::begin(), Trace::begin());

    by_rest.of(&rest)?.get("/v1/secrets/tapped/app/db").await?.ok()?;
    let mut request = tonic::Request::new(GetRequest { path: "tapped/gone".into(), ..GetRequest::default() });
    request.metadata_mut().insert("traceparent", by_grpc.parent("01").parse()?);
    let gone = federated.planes.secrets_client(0)?.get(request).await;
    assert_eq!(gone.map_err(|status| status.code()).map(drop), Err(tonic::Code::NotFound));
    let caller = rest.with_header("traceparent", &unsampled.parent("00"))?;
    caller.get("/v1/secrets/tapped/top").await?.ok()?;
    let rows = wait::until("the rows have arrived", async || {
        let rows = rest.audit().await?;
        let has = |path: &str| rows.iter().any(|row| row["path"] == path);
        Ok((has("tapped/app/db") && has("tapped/gone") && has("tapped/top")).then_some(rows))
    })
    .await?;
    stop(&mut federated).await?;

    let spans = collector.trace(&by_rest.0);
    let [node, backend] = spans.as_slice() else { panic!("{spans:#?}") };
    assert_span(node, NODE, SpanKind::Server, "GET /v1/secrets/{*path}", CALLER);
    assert_eq!(node.attribute("http.route"), "/v1/secrets/{*path}");
    assert_eq!(node.attribute("http.response.status_code"), "200");
    assert_span(backend, NODE, SpanKind::Client, "backend.read", &node.id());
    let told = ["backend.id", "backend.type", "backend.operation", "outcome"];
    assert_eq!(told.map(|name| backend.attribute(name)), [id.as_str(), "hashicorp-vault", "read", "ok"]);
    let onward = format!("00-{}-{}-01", by_rest.0, backend.id());
    assert_eq!(tap.parents("/v1/secret/data/app/db"), [onward]);

    let spans = collector.trace(&by_grpc.0);
    let [node, backend] = spans.as_slice() else { panic!("{spans:#?}") };
    assert_span(node, NODE, SpanKind::Server, "scaivault.secrets.v1.SecretsService/Get", CALLER);
    let told = ["rpc.system", "rpc.service", "rpc.method", "rpc.grpc.status_code"];
    let expected = ["grpc", "scaivault.secrets.v1.SecretsService", "Get", "5"];
    assert_eq!(told.map(|name| node.attribute(name)), expected);
    assert_span(backend, NODE, SpanKind::Client, "backend.read", &node.id());
    assert_eq!(backend.attribute("outcome"), "not_found");

    assert!(collector.trace(&unsampled.0).is_empty(), "the caller decides");
    let [onward] = &tap.parents("/v1/secret/data/top")[..] else { panic!("one read") };
    assert!(onward.starts_with(&format!("00-{}-", unsampled.0)) && onward.ends_with("-00"), "{onward}");

    for (path, trace) in [("tapped/app/db", by_rest), ("tapped/gone", by_grpc), ("tapped/top", unsampled)] {
        let row = rows.iter().find(|row| row["path"] == path).context(path)?;
        assert_eq!(row["trace_id"], *trace.0, "{path}");
    }
    Ok(())
}

#[tokio::test]
async fn a_forwarded_request_stays_in_its_trace() -> Result<()> {
    let (mut federated, collector, ..) = traced().await?;
    let rest = federated.planes.rest(0)?;
    let (listed, written, configured) = (Trace::begin(), Trace::begin(), Trace::begin());
    let value = json!({ "data": { "password": "local" } });
    written.of(&rest)?.put("/v1/secrets/local/x", value).await?.ok()?;
    listed.of(&rest)?.get("/v1/secrets/local/?list=true").await?.ok()?;
    configured.of(&rest)?.get("/v1/federation/backends").await?.ok()?;
    // Without a caller's trace the node begins one.
    let begun =
        rest.with_header("traceparent", "00-nonsense-01")?.get("/v1/secrets/local/x?version=1").await?;
    let row = wait::until("the row has arrived", async || {
        let rows = rest.audit().await?;
        Ok(rows.into_iter().find(|row| row["request_id"] == begun.header("x-request-id")))
    })
    .await?;
    stop(&mut federated).await?;

    let begun = Trace(row["trace_id"].as_str().unwrap_or_default().to_owned());
    let secrets = |method: &str| format!("scaivault.secrets.v1.SecretsService/{method}");
    for (trace, parent, at_node, at_control_plane) in [
        (written, CALLER, "PUT /v1/secrets/{*path}", secrets("Put")),
        (listed, CALLER, "GET /v1/secrets/{*path}", secrets("List")),
        (configured, CALLER, "GET /v1/federation/backends", "GET /v1/federation/backends".into()),
        (begun, "", "GET /v1/secrets/{*path}", secrets("Get")),
    ] {
        let spans = collector.trace(&trace.0);
        let [node, control_plane] = spans.as_slice() else { panic!("{at_node}: {spans:#?}") };
        assert_span(node, NODE, SpanKind::Server, at_node, parent);
        assert_span(control_plane, CONTROL_PLANE, SpanKind::Server, &at_control_plane, &node.id());
    }
    Ok(())
}

#[tokio::test]
async fn a_collector_that_hangs_delays_neither_a_request_nor_the_end() -> Result<()> {
    // Takes connections and says nothing.
    let silent = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let endpoint = format!("http://{}", silent.local_addr()?);
    let mut federated = Federated::start_with(Options::default().traces(endpoint)).await?;
    let rest = federated.planes.rest(0)?;
    let start = Instant::now();
    // More than the queue of spans holds.
    for _ in 0..10 {
        let reads = (0..300).map(|_| rest.get("/v1/secrets/local/none"));
        for answer in try_join_all(reads).await? {
            assert_eq!(answer.status, 404);
        }
    }
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    let start = Instant::now();
    federated.planes.nodes[0].stop().await?;
    assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
    Ok(())
}

#[tokio::test]
async fn no_span_tells_a_value_a_token_a_path_or_what_a_caller_made_up() -> Result<()> {
    const BIRD: &str = "kanarienvogelZ9";
    let (mut federated, collector, ..) = traced().await?;
    let rest = federated.planes.rest(0)?;
    let issued = rest.issue("reader", &["secrets:read"], json!([])).await?;
    let credential = rest.get(&format!("/v1/secrets/{CREDENTIAL}")).await?.ok()?;
    let credential = |name: &str| credential["data"][name].as_str().unwrap_or_default().to_owned();
    let value = json!({ "password": BIRD });
    federated.bao.client()?.put("secret", BIRD, value.clone()).await?;
    rest.put_data(&format!("local/{BIRD}"), value).await?;
    for path in [
        format!("/v1/secrets/tapped/{BIRD}?field=password"),
        format!("/v1/secrets/local/{BIRD}?field={BIRD}"),
        format!("/v1/secrets/local/{BIRD}?version=1"),
        format!("/v1/secrets/{BIRD}/?list=true"),
        format!("/v1/federation/explain?path=tapped/{BIRD}"),
        format!("/v1/federation/backends/{BIRD}"),
        format!("/v1/{BIRD}"),
    ] {
        for rest in [&rest, &rest.with_token(&issued.token)?, &rest.with_token(BIRD)?] {
            rest.get(&path).await?;
        }
    }
    let method = Method::from_bytes(BIRD.as_bytes())?;
    rest.send(method, &format!("/v1/secrets/local/{BIRD}"), Some(BIRD.into())).await?;
    let grpc = http::client(None)?.post(format!("{}/v1/secrets/local/{BIRD}", federated.planes.node(0)));
    grpc.header("content-type", "application/grpc").send().await?;
    let method = format!("{}/scaivault.secrets.v1.SecretsService/{BIRD}", federated.planes.node(0));
    let grpc = http::client(None)?.post(method).header("content-type", "application/grpc");
    grpc.send().await?;
    stop(&mut federated).await?;

    let spans: Vec<u8> = collector.taken().iter().flat_map(|request| request.encode_to_vec()).collect();
    let spans = String::from_utf8_lossy(&spans);
    for expected in ["backend.read", "/v1/secrets/{*path}", "_OTHER", "SecretsService/Get"] {
        assert!(spans.contains(expected), "{expected} was exported");
    }
    for needle in [
        BIRD,
        "app/db",
        "local/",
        "tapped/",
        CREDENTIAL,
        federated.planes.operator_token(),
        federated.bao.root_token(),
        &issued.token,
        &credential("role_id"),
        &credential("secret_id"),
    ] {
        assert!(!spans.contains(needle), "{needle} was exported");
    }
    Ok(())
}
