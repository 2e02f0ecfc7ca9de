use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use futures::stream;
use http::{Method, Request};
use scaivault_proto::federation::v1 as federation;
use scaivault_proto::secrets::v1 as proto;
use scaivault_proto::secrets::v1::SecretType;
use serde_json::json;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use super::fake::{Fake, PROXIED};
use super::{Answered, call, front, get, refusal, send};
use crate::{Front, Readiness};

/// Calls a method of secrets with `path` by gRPC.
async fn grpc(router: &axum::Router, method: &str, path: &str, headers: &[(&str, &str)]) -> Answered {
    let message = proto::GetRequest { path: path.to_owned(), ..Default::default() };
    sent(router, &format!("secrets.v1.SecretsService/{method}"), message, headers).await
}

/// Calls a method by gRPC.
async fn sent(
    router: &axum::Router,
    method: &str,
    message: impl prost::Message,
    headers: &[(&str, &str)],
) -> Answered {
    let message = message.encode_to_vec();
    let mut body = vec![0];
    body.extend(u32::try_from(message.len()).unwrap().to_be_bytes());
    body.extend(message);
    let mut request = Request::post(format!("http://host/scaivault.{method}"))
        .version(http::Version::HTTP_2)
        .header("content-type", "application/grpc")
        .header("te", "trailers");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    send(router, request.body(Body::from(body)).unwrap()).await
}

fn status(answer: &Answered) -> Status {
    assert_eq!(answer.header("content-type"), "application/grpc");
    Status::from_header_map(&answer.headers).expect("a status in the head")
}

#[tokio::test]
async fn a_request_id_is_echoed_by_every_protocol_and_names_the_error() {
    let (fake, router) = front();
    fake.hold("a", SecretType::Json, b"{}");
    let rest = call(&router, Method::GET, "/v1/secrets/a", &["x-request-id: my-1"], "").await;
    assert_eq!(rest.header("x-request-id"), "my-1");
    assert_eq!(get(&router, "/v1/secrets/a").await.header("x-request-id").len(), 32);
    assert_eq!(get(&router, "/livez").await.header("x-request-id").len(), 32);

    let answer = grpc(&router, "Get", "denied", &[("x-request-id", "my-2")]).await;
    let status = status(&answer);
    assert_eq!((status.code(), answer.header("x-request-id")), (Code::PermissionDenied, "my-2"));
    let details = status.get_error_details();
    assert_eq!(details.request_info().unwrap().request_id, "my-2");
    assert_eq!(details.error_info().unwrap().reason, "PERMISSION_DENIED");
    assert_eq!(crate::error::grpc::error(&status).next_step.as_deref(), Some("ask for one"));
    assert_eq!(fake.metadata.lock().unwrap()["x-request-id"], "my-2");
    assert_eq!(fake.context.lock().unwrap().clone().unwrap().request_id, "my-2");
}

#[tokio::test]
async fn a_panic_is_an_internal_error_that_tells_nothing() {
    let (_, router) = front();
    let rest = get(&router, "/v1/secrets/panic").await;
    assert_eq!(rest.refusal(), refusal(500, "internal", ""));
    assert!(!String::from_utf8_lossy(&rest.body).contains("canary"));
    let answer = grpc(&router, "Get", "panic", &[]).await;
    let status = status(&answer);
    assert_eq!(status.code(), Code::Internal);
    assert!(!format!("{status:?}").contains("canary"));
    assert!(!status.get_error_details().request_info().unwrap().request_id.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_request_ends_at_its_deadline() {
    let (_, router) = front();
    let began = tokio::time::Instant::now();
    assert_eq!(get(&router, "/v1/secrets/slow").await.refusal(), refusal(504, "deadline_exceeded", ""));
    assert_eq!(began.elapsed().as_secs(), 30);
    let began = tokio::time::Instant::now();
    let answer = grpc(&router, "Get", "slow", &[("grpc-timeout", "2S")]).await;
    assert_eq!((status(&answer).code(), began.elapsed().as_secs()), (Code::DeadlineExceeded, 2));
    let began = tokio::time::Instant::now();
    grpc(&router, "Get", "slow", &[("grpc-timeout", "9H")]).await;
    assert_eq!(began.elapsed().as_secs(), 30);
}

#[tokio::test(start_paused = true)]
async fn a_sync_that_is_waited_for_is_not_cut_by_the_deadline_of_everything_else() {
    const BACKEND: &str = "/v1/federation/backends/fed_abcdefghijklmnop";
    let (_, router) = front();
    let began = tokio::time::Instant::now();
    let answer = call(&router, Method::POST, &format!("{BACKEND}/sync?wait=1m"), &[], "").await;
    assert_eq!((answer.refusal(), began.elapsed().as_secs()), (refusal(504, "deadline_exceeded", ""), 90));

    let began = tokio::time::Instant::now();
    let wait = Some(prost_types::Duration { seconds: 60, nanos: 0 });
    let message = federation::SyncBackendRequest { wait, ..Default::default() };
    let answer = sent(&router, "federation.v1.FederationService/SyncBackend", message, &[]).await;
    assert_eq!((status(&answer).code(), began.elapsed().as_secs()), (Code::DeadlineExceeded, 90));
}

#[tokio::test]
async fn what_waits_is_refused_like_everything_else() {
    let (_, router) = front();
    let sync = "/v1/federation/backends/fed_abcdefghijklmnop/sync";
    let wrong = get(&router, sync).await;
    assert_eq!((wrong.refusal(), wrong.header("allow")), (refusal(405, "invalid_request", ""), "POST"));
    let message = federation::SyncBackendRequest { id: PROXIED.to_owned(), ..Default::default() };
    let answer = sent(&router, "federation.v1.FederationService/SyncBackend", message, &[]).await;
    let error = crate::error::grpc::error(&status(&answer));
    assert_eq!(error.reason, scaivault_domain::Reason::WrongMode);
}

#[tokio::test]
async fn everything_that_is_handed_on_reaches_who_it_is_handed_to() {
    let hand_on = |request: axum::extract::Request| async move {
        axum::response::IntoResponse::into_response(request.uri().path().to_owned())
    };
    let router = Front::new(Readiness::ready).forwarded(hand_on).build();
    for path in [
        "/scaivault.federation.v1.FederationService/SyncBackend",
        "/scaivault.federation.v1.FederationService/GetSync",
        "/scaivault.admin.v1.AdminService/ListNodes",
        "/v1/federation/backends/b/sync",
        "/v1/federation/backends/b/syncs/r/cancel",
        "/v1/nodes",
    ] {
        assert_eq!(call(&router, Method::POST, path, &[], "").await.body, path);
    }
    let (_, served) = front();
    let paths = async |router| get(router, "/openapi.json").await.json()["paths"].clone();
    let (served, handed_on) = (paths(&served).await, paths(&router).await);
    for path in served.as_object().unwrap().keys().filter(|path| !path.starts_with("/v1/secrets")) {
        assert_eq!(served[path], handed_on[path], "{path}");
    }
}

#[tokio::test]
async fn unknown_routes_and_methods_are_refused_in_the_callers_protocol() {
    let (_, router) = front();
    for uri in
        ["/", "/v1", "/v1/secret/a", "/v2/secrets/a", "/v1/federation/backends/", "/v1/secrets//../../x"]
    {
        let answer = get(&router, uri).await;
        assert!(matches!(answer.refusal().0, 400 | 404), "{uri}");
    }
    assert_eq!(get(&router, "/nothing").await.refusal(), refusal(404, "not_found", ""));
    let wrong = call(&router, Method::PUT, "/v1/secrets", &[], "").await;
    assert_eq!((wrong.refusal(), wrong.header("allow")), (refusal(405, "invalid_request", ""), "POST"));
    let unknown = grpc(&router, "NoSuch", "a", &[]).await;
    assert_eq!(status(&unknown).code(), Code::Unimplemented);
    let request =
        Request::post("/no.Such/Method").header("content-type", "application/grpc").body(Body::empty());
    assert_eq!(status(&send(&router, request.unwrap()).await).code(), Code::Unimplemented);
}

#[tokio::test]
async fn a_body_has_at_most_two_mebibytes_however_it_is_sent() {
    let (_, router) = front();
    let body = format!(r#"{{"data":{{"value":"{}"}},"secret_type":"text"}}"#, "x".repeat(2 * 1024 * 1024));
    let length = format!("content-length: {}", body.len());
    let announced = call(&router, Method::PUT, "/v1/secrets/a", &[&length], &body).await;
    assert_eq!(announced.refusal(), refusal(413, "too_large", ""));

    let chunks = stream::repeat_with(|| Ok::<_, std::io::Error>(Bytes::from(vec![b' '; 64 * 1024])));
    let request = Request::put("/v1/secrets/a").body(Body::from_stream(chunks)).unwrap();
    assert_eq!(send(&router, request).await.refusal(), refusal(413, "too_large", ""));

    let answer = grpc(&router, "Get", &"x".repeat(2 * 1024 * 1024), &[]).await;
    let error = crate::error::grpc::error(&status(&answer));
    assert_eq!(error.reason, scaivault_domain::Reason::TooLarge);
}

#[tokio::test]
async fn a_body_that_breaks_off_is_the_callers_fault() {
    let (_, router) = front();
    let chunks = [Ok(Bytes::from_static(b"{\"data\"")), Err(std::io::Error::other("gone"))];
    let request = Request::put("/v1/secrets/a").body(Body::from_stream(stream::iter(chunks))).unwrap();
    assert_eq!(send(&router, request).await.refusal(), refusal(400, "invalid_request", ""));
}

#[tokio::test]
async fn probes_tell_what_the_process_says_of_itself() {
    let ready = Arc::new(AtomicBool::new(false));
    let probe = ready.clone();
    let readiness = move || match probe.load(Ordering::Relaxed) {
        true => Readiness { ready: true, reasons: vec!["stale".into()] },
        false => Readiness { ready: false, reasons: vec!["no view yet".into()] },
    };
    let router = Front::new(readiness).secrets(Arc::new(Fake::default())).build();
    let answer = get(&router, "/readyz").await;
    assert_eq!(
        (answer.status.as_u16(), answer.json()),
        (503, json!({"ready": false, "reasons": ["no view yet"]}))
    );
    assert_eq!(get(&router, "/livez").await.status, 200);
    ready.store(true, Ordering::Relaxed);
    let answer = get(&router, "/readyz").await;
    assert_eq!((answer.status.as_u16(), answer.json()), (200, json!({"ready": true, "reasons": ["stale"]})));
    assert_eq!(get(&router, "/metrics").await.status, 404);
    assert_eq!(get(&router, "/v1/tenants").await.refusal(), refusal(404, "not_found", ""));
}

#[tokio::test(start_paused = true)]
async fn watching_health_tells_changes_only() {
    use futures::StreamExt as _;
    use tonic_health::pb::HealthCheckRequest;
    use tonic_health::pb::health_server::Health as _;

    let ready = Arc::new(AtomicBool::new(true));
    let probe = ready.clone();
    let probe = move || Readiness { ready: probe.load(Ordering::Relaxed), reasons: Vec::new() };
    let health = crate::health::GrpcHealth { probe: Arc::new(probe), services: vec!["known"] };
    let ask = |service: &str| tonic::Request::new(HealthCheckRequest { service: service.to_owned() });
    assert_eq!(health.check(ask("unknown")).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(health.check(ask("known")).await.unwrap().into_inner().status, 1);
    let mut changes = health.watch(ask("")).await.unwrap().into_inner();
    assert_eq!(changes.next().await.unwrap().unwrap().status, 1);
    let quiet = tokio::time::timeout(Duration::from_secs(60), changes.next()).await;
    assert!(quiet.is_err());
    let mut changes = health.watch(ask("")).await.unwrap().into_inner();
    changes.next().await;
    ready.store(false, Ordering::Relaxed);
    assert_eq!(changes.next().await.unwrap().unwrap().status, 2);
}

#[tokio::test]
async fn metrics_are_the_text_that_the_process_gives() {
    let (_, router) = front();
    let answer = get(&router, "/metrics").await;
    assert_eq!((answer.body.as_ref(), answer.header("cache-control")), (b"up 1\n".as_slice(), "no-store"));
}
