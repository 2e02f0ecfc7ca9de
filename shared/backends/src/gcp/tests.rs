use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use scaivault_domain::backend::{Endpoint, ProjectId, Tls};
use scaivault_domain::secret::{Kind, Metadata, SecretValue};
use scaivault_domain::time::Timestamp;
use secrecy::SecretString;

use super::*;
use crate::Expected;
use crate::budget::{Budget, Cost, Quotas};
use crate::guard::{Guard, Limits, Retry};
use crate::testing::{self, Reply, Server, egress, json, with_header};

const SECRETS: &str = "/v1/projects/acme/secrets";
const LATEST_OF_DB: &str = "/v1/projects/acme/secrets/db/versions/latest";
const HELLO: &str = r#"{"name":"projects/42/secrets/db/versions/7",
    "payload":{"data":"aGVsbG8=","dataCrc32c":"2591144780"}}"#;
const DENIED: &str = r#"{"error":{"code":403,"message":"m","status":"PERMISSION_DENIED"}}"#;
const MISSING: &str = r#"{"error":{"code":404,"message":"m","status":"NOT_FOUND"}}"#;
const CLOSED: &str = r#"{"error":{"code":400,"message":"m","status":"FAILED_PRECONDITION"}}"#;
const EXISTS: &str = r#"{"error":{"code":409,"message":"m","status":"ALREADY_EXISTS"}}"#;

fn lease() -> Lease {
    Lease { material: Material::Bearer(SecretString::from("t")), ..testing::lease("t") }
}

fn name(text: &str) -> RemoteName {
    RemoteName::new(text)
}

fn target(server: &Server) -> GcpTarget {
    let url = format!("http://{}", server.address);
    GcpTarget {
        project: ProjectId::parse("acme").expect("a project"),
        location: None,
        endpoint: Some(Endpoint::parse("endpoint", &url).expect("an address is a URL")),
        tls: Tls::default(),
    }
}

async fn gcp(reply: impl Fn(&str) -> Reply + Send + Sync + 'static) -> (Server, GcpBackend) {
    let server = Server::start(reply).await;
    let gcp = GcpBackend::connect(&target(&server), &egress()).expect("a usable target");
    (server, gcp)
}

/// A server whose replies depend on `METHOD /path`.
async fn writable(reply: impl Fn(&str) -> Reply + Send + Sync + 'static) -> (Server, GcpBackend) {
    let server = Server::start_with_heads(move |path, head| {
        let method = head.split(' ').next().expect("a request has a method");
        reply(&format!("{method} {path}"))
    })
    .await;
    let gcp = GcpBackend::connect(&target(&server), &egress()).expect("a usable target");
    (server, gcp)
}

async fn read(reply: impl Fn(&str) -> Reply + Send + Sync + 'static) -> Result<RemoteSecret, BackendError> {
    let (_server, gcp) = gcp(reply).await;
    gcp.read(&lease(), &name("db")).await
}

async fn failure(reply: impl Fn(&str) -> Reply + Send + Sync + 'static) -> BackendError {
    read(reply).await.expect_err("a failure")
}

fn bodies(server: &Server) -> Vec<String> {
    let body = |head: String| head.split_once("\r\n\r\n").map(|(_, body)| body.to_owned());
    server.heads().into_iter().filter_map(body).collect()
}

fn payload(data: &str) -> String {
    format!(r#"{{"name":"projects/42/secrets/db/versions/7","payload":{{{data}}}}}"#)
}

fn version(number: u64, state: &str) -> String {
    let name = format!("projects/42/secrets/db/versions/{number}");
    format!(
        r#"{{"name":"{name}","createTime":"2026-01-01T00:00:00.5Z","state":"{state}","etag":"\"e{number}\""}}"#
    )
}

fn secret(id: &str, more: &str) -> String {
    format!(r#"{{"name":"projects/42/secrets/{id}","createTime":"2026-01-01T00:00:00Z"{more}}}"#)
}

fn map(pairs: &[(&str, &str)]) -> Metadata {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn to_write(value: &[u8], expected: Expected, metadata: &[(&str, &str)]) -> RemoteWrite {
    RemoteWrite {
        value: SecretValue::new(value.to_vec()),
        kind: Kind::Text,
        content_type: "text/plain".into(),
        metadata: map(metadata),
        expected,
    }
}

fn at(version: &str) -> Expected {
    Expected::Version(version.to_owned())
}

#[tokio::test]
async fn a_value_is_asked_for_with_the_token_and_kept_byte_for_byte() {
    let (server, gcp) = gcp(|_| json(200, HELLO)).await;
    let secret = gcp.read(&lease(), &name("db")).await.expect("a value");
    assert_eq!(secret.value.expose(), b"hello");
    assert_eq!((secret.kind, &*secret.remote_version), (Kind::Text, "7"));
    assert_eq!((&secret.metadata, secret.created, secret.seen()), (&None, None, None));
    assert_eq!(server.paths(), [format!("{LATEST_OF_DB}:access")]);
    assert!(server.heads()[0].to_ascii_lowercase().contains("authorization: bearer t\r\n"));
}

#[tokio::test]
async fn regional_secrets_lie_in_their_location() {
    let server = Server::start(|_| {
        json(200, r#"{"name":"projects/42/locations/europe-west3/secrets/db/versions/1","payload":{}}"#)
    })
    .await;
    let target = GcpTarget {
        project: ProjectId::parse("example.com:acme").expect("a project"),
        location: Some("europe-west3".into()),
        ..target(&server)
    };
    let gcp = GcpBackend::connect(&target, &egress()).expect("a usable target");
    gcp.read(&lease(), &name("db")).await.expect("a value");
    let path = "/v1/projects/example.com%3Aacme/locations/europe-west3/secrets/db/versions/latest:access";
    assert_eq!(server.paths(), [path]);
}

#[tokio::test]
async fn bytes_tell_their_kind() {
    for (data, value, kind) in [
        (
            r#""data":"eyJuIjoxMjM0NTY3ODkwMTIzNDU2Nzg5MCwiYSI6MS4xMH0=""#,
            &br#"{"n":12345678901234567890,"a":1.10}"#[..],
            Kind::Json,
        ),
        (r#""data":"eyJhIjoxLCJhIjoyfQ==""#, br#"{"a":1,"a":2}"#, Kind::Text),
        (r#""data":"W10=""#, b"[]", Kind::Text),
        (r#""data":"//79""#, b"\xff\xfe\xfd", Kind::Binary),
        // The other base64, without padding, and with the escapes that some encoders write.
        (r#""data":"__79_w""#, b"\xff\xfe\xfd\xff", Kind::Binary),
        (r#""data":"aGVsbG8\u003d""#, b"hello", Kind::Text),
        (r#""data":"""#, b"", Kind::Text),
        (r#""dataCrc32c":"0""#, b"", Kind::Text),
        ("", b"", Kind::Text),
    ] {
        let body = payload(data);
        let secret = read(move |_| json(200, &body)).await.expect(data);
        assert_eq!((secret.value.expose(), secret.kind), (value, kind), "{data}");
    }
}

#[tokio::test]
async fn a_value_that_does_not_match_its_checksum_is_not_given() {
    // The last one is the CRC32 of IEEE, which this is not.
    for sum in [r#""2591144781""#, "0", r#""907060870""#] {
        let body = payload(&format!(r#""data":"aGVsbG8=","dataCrc32c":{sum}"#));
        assert_eq!(failure(move |_| json(200, &body)).await, BackendError::Checksum, "{sum}");
    }
    let number = payload(r#""data":"aGVsbG8=","dataCrc32c":2591144780"#);
    assert!(read(move |_| json(200, &number)).await.is_ok());
}

#[tokio::test]
async fn what_is_not_secret_managers_is_an_invalid_answer() {
    for body in [
        "",
        "{",
        "[]",
        "{}",
        r#"{"name":"projects/42/secrets/db/versions/7"}"#,
        r#"{"name":"projects/42/secrets/other/versions/7","payload":{}}"#,
        r#"{"name":"projects/42/secrets/db/versions/latest","payload":{}}"#,
        r#"{"name":"projects/42/secrets/db/versions/0","payload":{}}"#,
        r#"{"name":"x/../secrets/db/versions/7","payload":{}}"#,
        &payload(r#""data":"?""#),
        &payload(r#""data":7"#),
        &payload(r#""data":"aGVsbG8=","dataCrc32c":"-1""#),
        &payload(r#""data":"aGVsbG8=","dataCrc32c":4294967296"#),
        &format!("{}{}", "[".repeat(10_000), "]".repeat(10_000)),
    ] {
        let owned = body.to_owned();
        let error = failure(move |_| json(200, &owned)).await;
        assert!(matches!(error, BackendError::InvalidAnswer(_)), "{body:.100} {error:?}");
    }
    let cut = b"HTTP/1.1 200 X\r\ncontent-type: application/json\r\ncontent-length: 90\r\n\r\n{\"name\":";
    assert!(matches!(failure(|_| Reply::Bytes(cut.to_vec())).await, BackendError::InvalidAnswer(_)));
    let page = b"HTTP/1.1 404 X\r\ncontent-type: text/html\r\ncontent-length: 2\r\n\r\nno";
    assert!(matches!(failure(|_| Reply::Bytes(page.to_vec())).await, BackendError::InvalidAnswer(_)));
}

#[tokio::test]
async fn an_answer_that_is_too_large_is_not_read() {
    let big = payload(&format!(r#""data":"{}""#, "A".repeat(READ_LIMIT)));
    assert_eq!(failure(move |_| json(200, &big)).await, BackendError::TooLarge);
}

#[tokio::test]
async fn refusals_say_what_to_do() {
    let says = |status: &str, details: &str| {
        format!(r#"{{"error":{{"code":1,"message":"SECRET","status":"{status}","details":{details}}}}}"#)
    };
    let disabled = r#"[{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":"SERVICE_DISABLED"}]"#;
    for (code, body, expected) in [
        (401, says("UNAUTHENTICATED", "[]"), BackendError::LoginExpired),
        (401, "{}".to_owned(), BackendError::LoginExpired),
        (403, DENIED.to_owned(), BackendError::Forbidden),
        (403, r#"{"no":"entry"}"#.to_owned(), BackendError::Forbidden),
        (
            403,
            says("PERMISSION_DENIED", disabled),
            BackendError::InvalidConfig("the Secret Manager API is not enabled in the project"),
        ),
        (404, MISSING.to_owned(), BackendError::NotFound),
        (400, says("RESOURCE_EXHAUSTED", "7"), BackendError::Throttled { retry_after: None }),
        (499, says("CANCELLED", "null"), BackendError::Server { status: 499 }),
        (503, says("UNAVAILABLE", "[]"), BackendError::Server { status: 503 }),
        (
            400,
            says("INVALID_ARGUMENT", "[{}]"),
            BackendError::InvalidAnswer("it takes the request for malformed"),
        ),
    ] {
        let shown = body.clone();
        let error = failure(move |_| json(code, &body)).await;
        assert_eq!(error, expected, "{code} {shown}");
        assert!(!error.to_string().contains("SECRET"));
    }
    // Whatever answers so is not Google: nothing may be deleted for it.
    let disagreeing = r#"{"error":{"code":404,"message":"m","status":"INTERNAL"}}"#;
    for body in ["{}", r#"{"error":"not found"}"#, r#"{"error":{"code":404}}"#, disagreeing] {
        assert!(matches!(failure(|_| json(404, body)).await, BackendError::InvalidAnswer(_)), "{body}");
    }
}

#[tokio::test]
async fn throttling_is_told_with_the_pause_that_is_asked_for() {
    let throttled = |seconds| BackendError::Throttled { retry_after: seconds };
    assert_eq!(failure(|_| json(429, "{}")).await, throttled(None));
    let reply = |_: &str| with_header(429, "retry-after: 7", "{}");
    assert_eq!(failure(reply).await, throttled(Some(Duration::from_secs(7))));
}

#[tokio::test]
async fn a_version_that_is_closed_is_asked_for_its_state() {
    let scheduled = version(7, "DISABLED")
        .replace("\"etag\"", "\"scheduledDestroyTime\":\"2027-01-01T00:00:00Z\",\"etag\"");
    for (body, state) in [
        (version(7, "DISABLED"), State::Disabled),
        (version(7, "DESTROYED"), State::Destroyed),
        (scheduled, State::Deleted),
    ] {
        let reply = move |path: &str| if path == LATEST_OF_DB { json(200, &body) } else { json(400, CLOSED) };
        assert_eq!(failure(reply).await, BackendError::NotActive(state));
    }
    let may_not_look = |path: &str| if path == LATEST_OF_DB { json(403, DENIED) } else { json(400, CLOSED) };
    assert_eq!(failure(may_not_look).await, BackendError::NotActive(State::Disabled));
    // Its key is away, say. That is no state of the secret.
    for state in ["ENABLED", "STATE_UNSPECIFIED", "NEW"] {
        let body = version(7, state);
        let reply = move |path: &str| if path == LATEST_OF_DB { json(200, &body) } else { json(400, CLOSED) };
        assert!(matches!(failure(reply).await, BackendError::InvalidAnswer(_)), "{state}");
    }
}

#[tokio::test]
async fn a_look_at_the_state_is_made_within_the_quota_only() {
    let body = version(7, "DISABLED");
    let (server, gcp) =
        gcp(move |path| if path == LATEST_OF_DB { json(200, &body) } else { json(400, CLOSED) }).await;
    let budget = Arc::new(Budget::new(Quotas::gcp()));
    let (guard, lease, db) = (Guard::new(Limits::default()), lease(), name("db"));
    let read = || {
        let cost = Cost::one(&budget, Quota::Values);
        guard.call(Retry::NEVER, cost, Duration::from_secs(5), || gcp.read(&lease, &db))
    };
    assert_eq!(read().await.expect_err("a state"), BackendError::NotActive(State::Disabled));
    assert_eq!(budget.remaining()[1].now.floor(), 59.0);
    budget.debit(Quota::Metadata, 600);
    assert!(matches!(read().await, Err(BackendError::Throttled { retry_after: Some(_) })));
    assert_eq!(server.paths().iter().filter(|path| *path == LATEST_OF_DB).count(), 1);
}

#[tokio::test]
async fn names_that_secret_manager_cannot_have_are_not_asked_for() {
    let (server, gcp) = gcp(|_| json(200, HELLO)).await;
    for text in ["", "a/b", "a?b", "..", "a:access", "ä", &"a".repeat(256)] {
        let error = gcp.read(&lease(), &name(text)).await.expect_err("no name");
        assert_eq!(error, BackendError::Unrepresentable, "{text}");
    }
    assert!(server.paths().is_empty());
}

#[tokio::test]
async fn a_lease_of_another_store_is_not_sent() {
    let (server, gcp) = gcp(|_| json(200, HELLO)).await;
    let error = gcp.read(&testing::lease("t"), &name("db")).await.expect_err("a Vault token");
    assert_eq!(error, BackendError::FOREIGN_LEASE);
    let lease = Lease { material: Material::Bearer(SecretString::from("a\r\nb")), ..lease() };
    assert!(matches!(gcp.read(&lease, &name("db")).await, Err(BackendError::InvalidConfig(_))));
    assert!(server.paths().is_empty());
}

#[tokio::test]
async fn a_numbered_version_is_read_and_nothing_else() {
    let (server, gcp) = gcp(|path| json(200, if path.contains("/7:") { HELLO } else { "{}" })).await;
    assert_eq!(gcp.read_version(&lease(), &name("db"), "7").await.expect("a value").value.expose(), b"hello");
    for text in ["latest", "0", "07", "+7", "-1", "", "7:x", "99999999999999999999"] {
        let error = gcp.read_version(&lease(), &name("db"), text).await.expect_err("no number");
        assert_eq!(error, BackendError::NotFound, "{text}");
    }
    assert_eq!(server.paths().len(), 1);
}

#[tokio::test]
async fn a_history_is_told_from_its_beginning_across_pages() {
    let (server, gcp) = gcp(|path| match path {
        _ if path.ends_with("&pageToken=a%2Fb") => {
            json(200, &format!(r#"{{"versions":[{},{}]}}"#, version(2, "DESTROYED"), version(1, "DISABLED")))
        }
        _ => json(
            200,
            &format!(r#"{{"versions":[{}],"nextPageToken":"a/b","totalSize":3}}"#, version(3, "ENABLED")),
        ),
    })
    .await;
    let created = Timestamp::parse("2026-01-01T00:00:00.5Z");
    let told = |number: &str, state| RemoteVersion { remote_version: number.into(), state, created };
    let expected = [told("1", State::Disabled), told("2", State::Destroyed), told("3", State::Active)];
    assert_eq!(gcp.history(&lease(), &name("db")).await.expect("versions"), expected);
    let first = format!("{SECRETS}/db/versions?pageSize=1000");
    assert_eq!(server.paths(), [first.clone(), format!("{first}&pageToken=a%2Fb")]);
}

#[tokio::test]
async fn a_history_without_versions_is_empty_and_one_without_a_secret_is_not_found() {
    let (_server, gcp) =
        gcp(|path| if path.contains("/db/") { json(200, "{}") } else { json(404, MISSING) }).await;
    assert_eq!(gcp.history(&lease(), &name("db")).await, Ok(Vec::new()));
    assert_eq!(gcp.history(&lease(), &name("x")).await, Err(BackendError::NotFound));
}

#[tokio::test]
async fn a_survey_tells_every_secret_with_its_metadata_page_by_page() {
    let (_server, gcp) = gcp(|path| match path {
        _ if path.ends_with("&pageToken=2") => json(200, &format!(r#"{{"secrets":[{}]}}"#, secret("b", ""))),
        _ => {
            let more = r#","labels":{"team":"ops","x":"label"},"annotations":{"x":"Annotation"}"#;
            json(200, &format!(r#"{{"secrets":[{}],"nextPageToken":"2"}}"#, secret("a", more)))
        }
    })
    .await;
    let (calls, root) = (Calls::default(), Some(name("a")));
    let first = gcp.survey(&lease(), &Step::Tree(root.clone()), &calls).await.expect("a page");
    let surveyed = |id, metadata: &[(&str, &str)]| Surveyed {
        name: RemoteName::with_literal(id, 0),
        seen: None,
        metadata: Some(map(metadata)),
    };
    assert_eq!(first.page.secrets, [surveyed("a", &[("team", "ops"), ("x", "Annotation")])]);
    assert_eq!(first.next, [Step::More { root, after: PageToken("2".into()) }]);
    let last = gcp.survey(&lease(), &first.next[0], &calls).await.expect("a page");
    assert_eq!((last.page.secrets, last.next), (vec![surveyed("b", &[])], vec![]));
    assert_eq!(calls.snapshot(), BTreeMap::from([("list", 2)]));
}

#[tokio::test]
async fn a_secret_that_is_expired_is_not_there() {
    let (_server, gcp) = gcp(|_| {
        let gone = secret("gone", r#","expireTime":"1994-11-06T08:49:37Z""#);
        let there = secret("there", r#","expireTime":"1994-11-06T08:49:38Z""#);
        with_header(200, "date: Sun, 06 Nov 1994 08:49:37 GMT", &format!(r#"{{"secrets":[{gone},{there}]}}"#))
    })
    .await;
    let page = gcp.list(&lease(), None, None).await.expect("a page");
    assert_eq!(
        page.entries,
        [RemoteEntry { name: RemoteName::with_literal("there", 0), kind: EntryKind::Secret }]
    );
}

#[tokio::test]
async fn a_listing_without_an_end_is_no_listing() {
    let list = async |body: String| {
        let (server, gcp) = gcp(move |_| json(200, &body)).await;
        let page = gcp.list(&lease(), None, Some(&PageToken("2".into()))).await;
        (page, server.paths().len())
    };
    let full = |next: &str| format!(r#"{{"secrets":[{}],"nextPageToken":"{next}"}}"#, secret("a", ""));
    let (page, calls) = list(full("2")).await;
    assert!(matches!(page, Err(BackendError::InvalidAnswer(_))) && calls == 1, "it leads to itself");
    assert!(list(full("3")).await.0.is_ok());
    let (page, _) = list(full(&"3".repeat(5000))).await;
    assert!(matches!(page, Err(BackendError::InvalidAnswer(_))), "a token that is no token");
    let (page, calls) = list(r#"{"nextPageToken":"3"}"#.into()).await;
    assert!(
        matches!(page, Err(BackendError::InvalidAnswer(_))) && calls == 2,
        "an empty page that leads to itself"
    );

    let turn = std::sync::atomic::AtomicUsize::new(0);
    let endless = move |_: &str| {
        let turn = turn.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        json(200, &format!(r#"{{"nextPageToken":"{turn}"}}"#))
    };
    let (server, gcp) = gcp(endless).await;
    assert!(matches!(gcp.list(&lease(), None, None).await, Err(BackendError::InvalidAnswer(_))));
    assert_eq!(server.paths().len(), MOST_EMPTY_PAGES);
}

#[tokio::test]
async fn a_listing_that_fails_is_not_an_empty_one() {
    for (status, body, expected) in [
        (403, DENIED, BackendError::Forbidden),
        (404, MISSING, BackendError::InvalidConfig("no such project or location")),
        (500, "{}", BackendError::Server { status: 500 }),
    ] {
        let (_server, gcp) = gcp(move |_| json(status, body)).await;
        assert_eq!(gcp.list(&lease(), None, None).await, Err(expected.clone()));
        let found = gcp.survey(&lease(), &Step::Tree(None), &Calls::default()).await;
        assert_eq!(found, Err(expected));
    }
    for name in ["", "db", "projects/p/secrets/", "projects/p/secrets/a/b", "projects/p/topics/a"] {
        let (_server, gcp) =
            gcp(move |_| json(200, &format!(r#"{{"secrets":[{{"name":"{name}"}}]}}"#))).await;
        assert!(
            matches!(gcp.list(&lease(), None, None).await, Err(BackendError::InvalidAnswer(_))),
            "{name}"
        );
    }
}

#[tokio::test]
async fn whether_a_value_may_be_read_is_found_out_without_it() {
    for (status, body, expected) in [
        (404, MISSING, Ok(())),
        (403, DENIED, Err(BackendError::Forbidden)),
        (401, "{}", Err(BackendError::LoginExpired)),
    ] {
        let (server, gcp) = gcp(move |_| json(status, body)).await;
        assert_eq!(gcp.may_read(&lease(), &name("db")).await, expected);
        assert_eq!(server.paths(), [format!("{SECRETS}/db/versions/2147483647:access")]);
    }
}

#[tokio::test]
async fn a_probe_proves_the_token_even_if_it_must_not_list() {
    let proxy = b"HTTP/1.1 403 X\r\ncontent-type: text/html\r\ncontent-length: 2\r\n\r\nno";
    let answers = [
        (json(200, "{}"), Ok(())),
        (json(403, DENIED), Ok(())),
        (json(403, "{}"), Err(BackendError::Forbidden)),
        (Reply::Bytes(proxy.to_vec()), Err(BackendError::Forbidden)),
        (json(401, "{}"), Err(BackendError::LoginExpired)),
        (json(404, MISSING), Err(BackendError::InvalidConfig("no such project or location"))),
    ];
    for (reply, expected) in answers {
        let Reply::Bytes(bytes) = reply else { continue };
        let (server, gcp) = gcp(move |_| Reply::Bytes(bytes.clone())).await;
        assert_eq!(gcp.probe(&lease()).await, expected);
        assert_eq!(server.paths(), [format!("{SECRETS}?pageSize=1")]);
    }
}

#[tokio::test]
async fn a_new_version_comes_after_the_expected_one() {
    let (server, gcp) = writable(|call| match call {
        "GET /v1/projects/acme/secrets/db/versions/latest" => json(200, &version(7, "ENABLED")),
        "GET /v1/projects/acme/secrets/db" => json(200, &secret("db", "")),
        "POST /v1/projects/acme/secrets/db:addVersion" => json(200, &version(8, "ENABLED")),
        other => panic!("{other}"),
    })
    .await;
    let written = gcp.write(&lease(), &name("db"), &to_write(b"hello", at("7"), &[])).await.expect("written");
    assert_eq!(written, Written { remote_version: "8".into(), metadata: None });
    let body: serde_json::Value = serde_json::from_str(&bodies(&server)[1]).expect("JSON");
    assert_eq!(body, serde_json::json!({ "payload": { "data": "aGVsbG8=", "dataCrc32c": "2591144780" } }));
}

#[tokio::test]
async fn a_write_over_something_else_is_lost_before_or_after() {
    let (server, gcp) = writable(|call| match call {
        "GET /v1/projects/acme/secrets/db/versions/latest" => json(200, &version(7, "ENABLED")),
        "GET /v1/projects/acme/secrets/x/versions/latest" => json(404, MISSING),
        "POST /v1/projects/acme/secrets/db:addVersion" => json(200, &version(9, "ENABLED")),
        other => panic!("{other}"),
    })
    .await;
    for (id, expected) in [("db", "6"), ("db", "8"), ("db", "latest"), ("x", "1")] {
        let lost = gcp.write(&lease(), &name(id), &to_write(b"v", at(expected), &[])).await;
        assert_eq!(lost, Err(BackendError::PreconditionLost), "{id} {expected}");
    }
    assert!(bodies(&server).iter().all(String::is_empty), "nothing was written");
    // Somebody added version 8 between the look and the write.
    let lost = gcp.write(&lease(), &name("db"), &to_write(b"v", at("7"), &[])).await;
    assert_eq!(lost, Err(BackendError::PreconditionLost));
}

#[tokio::test]
async fn who_may_not_see_versions_learns_the_number_from_the_value() {
    let (_server, gcp) = writable(|call| match call {
        "GET /v1/projects/acme/secrets/db/versions/latest:access" => json(200, HELLO),
        "POST /v1/projects/acme/secrets/db:addVersion" => json(200, &version(8, "ENABLED")),
        _ => json(403, DENIED),
    })
    .await;
    let written = gcp.write(&lease(), &name("db"), &to_write(b"v", at("7"), &[])).await.expect("written");
    assert_eq!(written, Written { remote_version: "8".into(), metadata: None });
    let written = gcp.write(&lease(), &name("db"), &to_write(b"v", at("7"), &[("a", "b")])).await;
    assert_eq!(written.expect("written").metadata, Some(BackendError::Forbidden));
}

#[tokio::test]
async fn a_new_secret_is_made_with_its_metadata() {
    let (server, gcp) = writable(|call| match call {
        "POST /v1/projects/acme/secrets?secretId=db" => json(200, &secret("db", "")),
        "POST /v1/projects/acme/secrets/db:addVersion" => json(200, &version(1, "ENABLED")),
        other => panic!("{other}"),
    })
    .await;
    let write = to_write(b"v", Expected::Absent, &[("team", "ops")]);
    let written = gcp.write(&lease(), &name("db"), &write).await.expect("written");
    assert_eq!(written, Written { remote_version: "1".into(), metadata: None });
    let body: serde_json::Value = serde_json::from_str(&bodies(&server)[0]).expect("JSON");
    assert_eq!(
        body,
        serde_json::json!({ "annotations": { "team": "ops" }, "replication": { "automatic": {} } })
    );
    let write = to_write(b"v", Expected::Absent, &[("no key", "v")]);
    let written = gcp.write(&lease(), &name("db"), &write).await.expect("written");
    assert_eq!(
        written.metadata,
        Some(BackendError::Unsupported("some of the metadata can be neither annotation nor label"))
    );
}

#[tokio::test]
async fn a_secret_without_a_value_counts_as_absent() {
    for (create, latest, added, expected) in [
        ((409, EXISTS), json(404, MISSING), Some(1), Ok("1")),
        ((409, EXISTS), json(200, &version(3, "DESTROYED")), Some(4), Ok("4")),
        ((409, EXISTS), json(200, &version(3, "DISABLED")), None, Err(BackendError::PreconditionLost)),
        ((409, EXISTS), json(200, &version(3, "ENABLED")), None, Err(BackendError::PreconditionLost)),
        ((409, EXISTS), json(404, MISSING), Some(2), Err(BackendError::PreconditionLost)),
        // Somebody else makes the secrets, and has made this one, or has not.
        ((403, DENIED), json(404, MISSING), Some(1), Ok("1")),
        ((403, DENIED), json(404, MISSING), None, Err(BackendError::Forbidden)),
    ] {
        let Reply::Bytes(latest) = latest else { continue };
        let (_server, gcp) = writable(move |call| match call {
            "POST /v1/projects/acme/secrets?secretId=db" => json(create.0, create.1),
            "GET /v1/projects/acme/secrets/db/versions/latest" => Reply::Bytes(latest.clone()),
            "GET /v1/projects/acme/secrets/db" => json(200, &secret("db", "")),
            _ => added.map_or_else(|| json(404, MISSING), |number| json(200, &version(number, "ENABLED"))),
        })
        .await;
        let written = gcp.write(&lease(), &name("db"), &to_write(b"v", Expected::Absent, &[])).await;
        assert_eq!(written.map(|written| written.remote_version), expected.map(str::to_owned));
    }
}

#[tokio::test]
async fn a_value_that_is_too_large_is_not_sent() {
    let (server, gcp) = writable(|_| json(404, MISSING)).await;
    let write = to_write(&[b'x'; 65_537], at("1"), &[]);
    assert_eq!(
        gcp.write(&lease(), &name("db"), &write).await,
        Err(BackendError::ValueTooLarge { most: 65_536 })
    );
    assert!(server.paths().is_empty());
    let write = to_write(&[b'x'; 65_536], at("1"), &[]);
    assert_eq!(gcp.write(&lease(), &name("db"), &write).await, Err(BackendError::PreconditionLost));
}

#[tokio::test]
async fn an_empty_value_is_refused_before_anything_is_sent() {
    let (server, gcp) = writable(|_| Reply::Silence).await;
    let refused = gcp.write(&lease(), &name("db"), &to_write(b"", at("7"), &[])).await;
    assert_eq!(refused, Err(BackendError::Unsupported("it takes no empty value")));
    assert!(server.paths().is_empty());
}

#[tokio::test]
async fn metadata_follows_the_value_and_leaves_alone_what_it_need_not_touch() {
    let reads = std::sync::atomic::AtomicUsize::new(0);
    let (server, gcp) = writable(move |call| match call {
        "GET /v1/projects/acme/secrets/db/versions/latest" => json(200, &version(7, "ENABLED")),
        "POST /v1/projects/acme/secrets/db:addVersion" => json(200, &version(8, "ENABLED")),
        "GET /v1/projects/acme/secrets/db" => {
            let etag = reads.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            json(200, &secret("db", &format!(r#","labels":{{"team":"ops"}},"etag":"\"{etag}\"""#)))
        }
        "PATCH /v1/projects/acme/secrets/db?updateMask=annotations" => json(400, CLOSED),
        other => panic!("{other}"),
    })
    .await;
    let same = to_write(b"v", at("7"), &[("team", "ops")]);
    assert_eq!(gcp.write(&lease(), &name("db"), &same).await.expect("written").metadata, None);
    assert_eq!(server.paths().len(), 3, "what is the same is not written");

    let more = to_write(b"v", at("7"), &[("team", "ops"), ("a", "b")]);
    let written = gcp.write(&lease(), &name("db"), &more).await.expect("the value is written");
    assert_eq!(written.metadata, Some(BackendError::PreconditionLost));
    let patches: Vec<_> = bodies(&server).into_iter().filter(|body| body.contains("annotations")).collect();
    assert_eq!(patches.len(), 2, "it is tried again with the new etag");
    let last: serde_json::Value = serde_json::from_str(&patches[1]).expect("JSON");
    assert_eq!(
        last,
        serde_json::json!({ "labels": { "team": "ops" }, "annotations": { "a": "b" }, "etag": "\"2\"" })
    );
}

#[tokio::test]
async fn a_deletion_disables_the_version_that_was_expected() {
    let (server, gcp) = writable(|call| match call {
        "GET /v1/projects/acme/secrets/db/versions/latest" => json(200, &version(7, "ENABLED")),
        "POST /v1/projects/acme/secrets/db/versions/7:disable" => json(200, &version(7, "DISABLED")),
        other => panic!("{other}"),
    })
    .await;
    assert_eq!(gcp.delete(&lease(), &name("db"), "6").await, Err(BackendError::PreconditionLost));
    assert_eq!(server.paths().len(), 1);
    assert_eq!(gcp.delete(&lease(), &name("db"), "7").await, Ok(()));
    assert_eq!(bodies(&server)[2], r#"{"etag":"\"e7\""}"#);
}

#[tokio::test]
async fn a_deletion_is_done_once_and_lost_to_a_newer_version() {
    let (server, gcp) = gcp(|_| json(200, &version(7, "DISABLED"))).await;
    assert_eq!(gcp.delete(&lease(), &name("db"), "7").await, Ok(()));
    assert_eq!(server.paths(), [LATEST_OF_DB]);

    let looks = std::sync::atomic::AtomicU64::new(7);
    let (_server, gcp) = writable(move |call| {
        if call.starts_with("POST") {
            return json(200, &version(7, "DISABLED"));
        }
        json(200, &version(looks.fetch_add(1, std::sync::atomic::Ordering::SeqCst), "ENABLED"))
    })
    .await;
    assert_eq!(gcp.delete(&lease(), &name("db"), "7").await, Err(BackendError::PreconditionLost));
}
