use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use scaivault_domain::backend::{Endpoint, KvMount, Tls};
use tokio_rustls::TlsAcceptor;

use super::*;
use crate::budget::Cost;
use crate::coalesce::Coalescer;
use crate::guard::{Guard, Limits, Retry};
use crate::testing::{Reply, Server, egress, json, lease, with_header};

pub(super) const MOUNTS: &str = "/v1/sys/internal/ui/mounts/";
pub(super) const LOOKUP: &str = "/v1/auth/token/lookup-self";
const V2: &str = r#"{"data":{"path":"kv/","type":"kv","options":{"version":"2"}}}"#;
pub(super) const V1: &str = r#"{"data":{"path":"kv/","type":"kv","options":null}}"#;
pub(super) const DENIED: &str = r#"{"errors":["permission denied"]}"#;
const VALUE: &str = r#"{"data":{"data":{"n":123456789012345678901234567890,"b":1.10,"a":"<x>"},"metadata":{
    "created_time":"2026-01-01T00:00:00.5Z","custom_metadata":{"owner":"ops"},"deletion_time":"","destroyed":false,
    "version":7}},"warnings":null}"#;

/// `kv/data/**` with everything behind it captured.
pub(super) fn name(text: &str) -> RemoteName {
    RemoteName::with_literal(text, 2)
}

pub(super) fn vault(target: &VaultTarget) -> VaultBackend {
    VaultBackend::connect(target, &egress()).expect("a usable target")
}

/// A server with a version 2 mount `kv`, and what it says otherwise.
pub(super) async fn v2(reply: impl Fn(&str) -> Reply + Send + Sync + 'static) -> (Server, VaultBackend) {
    let server =
        Server::start(move |path| if path.starts_with(MOUNTS) { json(200, V2) } else { reply(path) }).await;
    let vault = vault(&server.target());
    (server, vault)
}

async fn read(reply: impl Fn(&str) -> Reply + Send + Sync + 'static) -> Result<RemoteSecret, BackendError> {
    let (_server, vault) = v2(reply).await;
    vault.read(&lease("t"), &name("kv/data/app/db")).await
}

async fn failure(reply: impl Fn(&str) -> Reply + Send + Sync + 'static) -> BackendError {
    read(reply).await.expect_err("a failure")
}

#[tokio::test]
async fn a_value_is_kept_byte_for_byte() {
    let (server, vault) = v2(|_| json(200, VALUE)).await;
    let secret = vault.read(&lease("t"), &name("kv/data/app/d b")).await.expect("a value");
    let bytes = br#"{"n":123456789012345678901234567890,"b":1.10,"a":"<x>"}"#;
    assert_eq!(secret.value.expose(), bytes);
    assert_eq!((secret.kind, &*secret.remote_version), (Kind::Json, "7"));
    assert_eq!(secret.metadata.expect("Vault tells")["owner"], "ops");
    assert_eq!(secret.created, Timestamp::parse("2026-01-01T00:00:00.5Z"));
    assert_eq!(server.paths(), [&format!("{MOUNTS}kv/data"), "/v1/kv/data/app/d%20b"]);
    let head = server.heads()[1].to_ascii_lowercase();
    assert!(head.contains("x-vault-token: t\r\n") && head.contains("x-vault-request: true\r\n"));
}

#[tokio::test]
async fn a_captured_data_is_part_of_the_name() {
    let (server, vault) = v2(|_| json(200, VALUE)).await;
    for (text, literal) in [("kv/data/x", 1), ("kv/data/data/x", 2)] {
        let name = RemoteName::with_literal(text, literal);
        vault.read(&lease("t"), &name).await.expect("a value");
        assert_eq!(server.paths().last().map(String::as_str), Some("/v1/kv/data/data/x"));
    }
}

#[tokio::test]
async fn a_mount_is_looked_up_once() {
    let (server, vault) = v2(|_| json(200, VALUE)).await;
    for _ in 0..3 {
        vault.read(&lease("t"), &name("kv/data/x")).await.expect("a value");
    }
    assert_eq!(server.paths().iter().filter(|path| path.starts_with(MOUNTS)).count(), 1);
}

#[tokio::test]
async fn a_configured_mount_is_never_looked_up() {
    let server = Server::start(|_| json(200, r#"{"data":{"a":1}}"#)).await;
    let kv = Some(KvMount { path: "team/kv".into(), version: KvVersion::V1 });
    let vault = vault(&VaultTarget { kv, namespace: Some("ns1".into()), ..server.target() });
    let secret =
        vault.read(&lease("t"), &RemoteName::with_literal("team/kv/data/x", 0)).await.expect("a value");
    assert_eq!(secret.value.expose(), br#"{"a":1}"#);
    assert_eq!(server.paths(), ["/v1/team/kv/data/x"]);
    assert!(server.heads()[0].to_ascii_lowercase().contains("x-vault-namespace: ns1\r\n"));
    let elsewhere = vault.read(&lease("t"), &name("kv/data/x")).await;
    assert_eq!(elsewhere.err(), Some(BackendError::MountNotLiteral));
}

#[tokio::test]
async fn a_mount_that_was_upgraded_is_noticed() {
    let upgraded = Arc::new(AtomicUsize::new(0));
    let server = Server::start(move |path| match path {
        _ if path.starts_with(MOUNTS) && upgraded.fetch_add(1, Ordering::SeqCst) == 0 => json(200, V1),
        _ if path.starts_with(MOUNTS) => json(200, V2),
        "/v1/kv/x" => {
            json(404, r#"{"data":null,"warnings":["Invalid path for a versioned K/V secrets engine."]}"#)
        }
        _ => json(200, VALUE),
    })
    .await;
    let secret = vault(&server.target()).read(&lease("t"), &RemoteName::with_literal("kv/x", 1)).await;
    assert_eq!(secret.expect("a value").remote_version, "7");
}

#[tokio::test]
async fn a_mount_that_may_not_be_looked_up_has_its_own_hint() {
    let server =
        Server::start(|path| if path == LOOKUP { json(200, r#"{"data":{}}"#) } else { json(403, DENIED) })
            .await;
    let error = vault(&server.target()).read(&lease("t"), &name("kv/data/x")).await.expect_err("forbidden");
    assert_eq!(error, BackendError::MountLookupForbidden);
    assert!(error.hint().expect("a hint").contains("kv_mount"));
}

#[tokio::test]
async fn the_mount_lies_in_the_literal_part() {
    let (server, vault) = v2(|_| json(200, VALUE)).await;
    let read = vault.read(&lease("t"), &RemoteName::with_literal("kv/x", 0)).await;
    assert_eq!(read.err(), Some(BackendError::MountNotLiteral));
    let list = vault.list(&lease("t"), None, None).await;
    assert_eq!(list.err(), Some(BackendError::MountNotLiteral));
    assert_eq!(server.paths(), [""; 0]);
}

#[tokio::test]
async fn names_that_would_change_on_the_way_are_not_asked_for() {
    let (server, vault) = v2(|_| json(200, VALUE)).await;
    for text in ["kv/data/..", "kv/data/a/../b", "kv/data/.", "kv/data//a", "kv/data"] {
        let read = vault.read(&lease("t"), &name(text)).await;
        assert_eq!(read.err(), Some(BackendError::Unrepresentable), "{text}");
    }
    assert_eq!(server.paths(), [format!("{MOUNTS}kv/data")]);
}

#[tokio::test]
async fn deleted_and_destroyed_are_states_and_absent_is_not_found() {
    let state = |deletion: &str, destroyed: bool| {
        json(
            404,
            &format!(
                r#"{{"data":{{"data":null,"metadata":{{"created_time":"2026-01-01T00:00:00Z",
                "deletion_time":"{deletion}","destroyed":{destroyed},"version":1}}}}}}"#
            ),
        )
    };
    let deleted = failure(move |_| state("2026-01-02T00:00:00Z", false)).await;
    assert_eq!(deleted, BackendError::NotActive(State::Deleted));
    let destroyed = failure(move |_| state("2026-01-02T00:00:00Z", true)).await;
    assert_eq!(destroyed, BackendError::NotActive(State::Destroyed));
    assert_eq!(failure(|_| json(404, r#"{"errors":[]}"#)).await, BackendError::NotFound);
    let unmounted = failure(|_| json(404, r#"{"errors":["no handler for route"]}"#)).await;
    assert!(matches!(unmounted, BackendError::InvalidConfig(_)));
}

#[tokio::test]
async fn a_version_without_keys_is_an_empty_object() {
    let written_as_null = VALUE.replace(r#"{"n":123456789012345678901234567890,"b":1.10,"a":"<x>"}"#, "null");
    let secret = read(move |_| json(200, &written_as_null)).await.expect("a value");
    assert_eq!(secret.value.expose(), b"{}");
}

#[tokio::test]
async fn history_knows_states_and_planned_deletions() {
    let (_server, vault) = v2(|_| {
        with_header(
            200,
            "date: Thu, 01 Jan 2026 12:00:00 GMT",
            r#"{"data":{"versions":{
            "10":{"created_time":"2026-01-01T04:00:00Z","deletion_time":"2026-01-03T00:00:00Z","destroyed":false},
            "9":{"created_time":"2026-01-01T03:00:00Z","deletion_time":"2026-01-01T12:00:00.9Z","destroyed":false},
            "8":{"created_time":"2026-01-01T02:00:00Z","deletion_time":"","destroyed":true}}}}"#,
        )
    })
    .await;
    let history = vault.history(&lease("t"), &name("kv/data/x")).await.expect("a history");
    let states: Vec<_> = history.iter().map(|v| (&*v.remote_version, v.state)).collect();
    assert_eq!(states, [("8", State::Destroyed), ("9", State::Deleted), ("10", State::Active)]);
}

#[tokio::test]
async fn entries_are_spelled_as_the_template_is() {
    let (server, vault) = v2(|path| {
        if path.starts_with("/v1/kv/metadata/none") {
            return json(404, r#"{"errors":[]}"#);
        }
        json(200, r#"{"data":{"keys":["db","db/","sp ace"]}}"#)
    })
    .await;
    let page = vault.list(&lease("t"), Some(&name("kv/data/app")), None).await.expect("a page");
    let entry = |text, kind| RemoteEntry { name: name(text), kind };
    assert_eq!(
        page.entries,
        [
            entry("kv/data/app/db", EntryKind::Secret),
            entry("kv/data/app/db", EntryKind::Folder),
            entry("kv/data/app/sp ace", EntryKind::Secret),
        ]
    );
    assert_eq!(page.next, None);
    assert_eq!(server.paths()[1], "/v1/kv/metadata/app?list=true&limit=1000");
    let none = vault.list(&lease("t"), Some(&name("kv/data/none")), None).await.expect("a page");
    assert_eq!(none.entries, []);
}

#[tokio::test]
async fn a_listing_ends_whether_or_not_the_server_knows_pages() {
    for knows_pages in [true, false] {
        let first: Vec<_> = (0..KEYS_PER_PAGE).map(|n| format!("\"k{n}\"")).collect();
        let first = format!(r#"{{"data":{{"keys":[{}]}}}}"#, first.join(","));
        let (_server, vault) = v2(move |path| {
            let last = knows_pages && path.contains("&after=k999");
            if last { json(200, r#"{"data":{"keys":["z"]}}"#) } else { json(200, &first) }
        })
        .await;
        let folder = name("kv/data");
        let (mut found, mut after) = (0, None);
        loop {
            let page = vault.list(&lease("t"), Some(&folder), after.as_ref()).await.expect("a page");
            found += page.entries.len();
            after = page.next;
            if after.is_none() {
                break;
            }
        }
        assert_eq!(found, KEYS_PER_PAGE + usize::from(knows_pages));
    }
}

#[tokio::test]
async fn a_redirect_is_not_followed() {
    let other = Server::start(|_| json(200, VALUE)).await;
    let to_other = format!("location: http://{}/v1/kv/data/x", other.address);
    for status in [301, 302, 307, 308] {
        let to_other = to_other.clone();
        let error = failure(move |_| with_header(status, &to_other, "")).await;
        assert!(matches!(error, BackendError::InvalidAnswer(_)), "{status}");
    }
    assert_eq!(other.heads(), [""; 0]);
}

#[tokio::test]
async fn forbidden_and_ended_tokens_are_told_apart() {
    for (status, body, expected) in [
        (200, r#"{"data":{}}"#, BackendError::Forbidden),
        (403, DENIED, BackendError::LoginExpired),
        (403, r#"{"errors":["1 error occurred:\n\t* permission denied\n\n"]}"#, BackendError::Forbidden),
    ] {
        let (server, vault) =
            v2(move |path| if path == LOOKUP { json(status, body) } else { json(403, DENIED) }).await;
        for _ in 0..3 {
            let read = vault.read(&lease("t"), &name("kv/data/x")).await;
            assert_eq!(read.err(), Some(expected.clone()), "{body}");
        }
        let lookups = server.paths().iter().filter(|path| *path == LOOKUP).count();
        assert_eq!(lookups, 1, "one look-up serves every refusal of the next seconds");
    }
}

#[tokio::test]
async fn a_lease_that_is_revoked_is_noticed_although_another_name_is_forbidden() {
    let revoked = Arc::new(AtomicBool::new(false));
    let (server, vault) = v2({
        let revoked = revoked.clone();
        move |path| match path {
            LOOKUP if !revoked.load(Ordering::SeqCst) => json(200, r#"{"data":{}}"#),
            _ => json(403, DENIED),
        }
    })
    .await;
    let read = async || vault.read(&lease("t"), &name("kv/data/x")).await.err();
    assert_eq!(read().await, Some(BackendError::Forbidden));
    revoked.store(true, Ordering::SeqCst);
    for _ in 0..3 {
        tokio::time::pause();
        tokio::time::advance(VALIDITY_IS_TRUSTED_FOR).await;
        tokio::time::resume();
        assert_eq!(read().await, Some(BackendError::LoginExpired));
    }
    let lookups = server.paths().iter().filter(|path| *path == LOOKUP).count();
    assert_eq!(lookups, 2, "a token that ended is not looked up again");
}

#[tokio::test]
async fn an_old_version_is_read_and_no_other_taken_for_it() {
    let (server, vault) = v2(|path| match path.split_once('?') {
        Some((_, "version=7" | "version=8")) => json(200, VALUE),
        Some((_, "version=6")) => {
            let deleted = r#"{"data":{"data":null,"metadata":{"created_time":"2026-01-01T00:00:00Z",
                "deletion_time":"2026-01-02T00:00:00Z","destroyed":false,"version":6}}}"#;
            json(404, deleted)
        }
        _ => json(404, r#"{"errors":[]}"#),
    })
    .await;
    let read = async |version| vault.read_version(&lease("t"), &name("kv/data/x"), version).await;
    assert_eq!(read("7").await.expect("a value").remote_version, "7");
    assert_eq!(read("6").await.err(), Some(BackendError::NotActive(State::Deleted)));
    assert_eq!(read("5").await.err(), Some(BackendError::NotFound));
    assert!(matches!(read("8").await, Err(BackendError::InvalidAnswer(_))));
    let asked = server.paths().len();
    for no_version in ["0", "", "-1", "x"] {
        assert_eq!(read(no_version).await.err(), Some(BackendError::NotFound));
    }
    assert_eq!(server.paths().len(), asked);
}

#[tokio::test]
async fn version_1_has_no_old_versions() {
    let server =
        Server::start(|path| json(200, if path.starts_with(MOUNTS) { V1 } else { r#"{"data":{}}"# })).await;
    let read = vault(&server.target()).read_version(&lease("t"), &name("kv/x"), "1").await;
    assert_eq!(read.err(), Some(BackendError::NotFound));
}

#[tokio::test]
async fn a_probe_asks_about_the_token_itself() {
    for (status, body, expected) in [
        (200, r#"{"data":{}}"#, Ok(())),
        (403, DENIED, Err(BackendError::LoginExpired)),
        (503, r#"{"errors":["Vault is sealed"]}"#, Err(BackendError::Server { status: 503 })),
    ] {
        let (server, vault) = v2(move |_| json(status, body)).await;
        assert_eq!(vault.probe(&lease("t")).await, expected);
        assert_eq!(server.paths(), [LOOKUP]);
    }
}

#[tokio::test]
async fn a_store_that_slows_us_down_says_for_how_long() {
    let after = |header: &'static str| failure(move |_| with_header(429, header, "{}"));
    let throttled = |seconds| BackendError::Throttled { retry_after: Some(Duration::from_secs(seconds)) };
    assert_eq!(after("retry-after: 7").await, throttled(7));
    let dated = "date: Thu, 01 Jan 2026 12:00:00 GMT\r\nretry-after: Thu, 01 Jan 2026 12:00:30 GMT";
    assert_eq!(after(dated).await, throttled(30));
    assert_eq!(after("x: y").await, BackendError::Throttled { retry_after: None });
}

#[tokio::test]
async fn faults_of_the_store_are_named_by_their_status() {
    for status in [500, 502, 503, 472, 473] {
        assert_eq!(failure(move |_| json(status, "{}")).await, BackendError::Server { status });
    }
}

#[tokio::test]
async fn garbage_is_an_invalid_answer() {
    let raw = |text: &str| {
        let bytes = text.as_bytes().to_vec();
        failure(move |_| Reply::Bytes(bytes.clone()))
    };
    let json_200 = |body: &'static str| failure(move |_| json(200, body));
    for error in [
        raw("\0\x01 no http at all\r\n\r\n").await,
        raw("HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 2\r\n\r\n{}").await,
        raw("HTTP/1.1 404 X\r\ncontent-type: text/html\r\ncontent-length: 2\r\n\r\n{}").await,
        raw("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").await,
        raw("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-encoding: gzip\r\n\r\n{}").await,
        raw("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 999\r\n\r\n{\"data\"")
            .await,
        json_200("").await,
        json_200("[1]").await,
        json_200("{\"data\":").await,
        json_200("{\"data\":{\"data\":[1],\"metadata\":{}}}").await,
        json_200(r#"{"data":null}"#).await,
    ] {
        assert!(matches!(error, BackendError::InvalidAnswer(_)), "{error}");
    }
}

#[tokio::test]
async fn huge_answers_are_cut_off() {
    let announced =
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 99999999999\r\n\r\n";
    assert_eq!(failure(move |_| Reply::Bytes(announced.into())).await, BackendError::TooLarge);
    let chunk = format!("100000\r\n{}\r\n", "x".repeat(0x10_0000));
    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
    let unannounced = format!("{head}{}", chunk.repeat(3));
    assert_eq!(failure(move |_| Reply::Bytes(unannounced.clone().into())).await, BackendError::TooLarge);
}

#[tokio::test]
async fn a_store_that_is_not_there_is_unreachable() {
    let address = {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        listener.local_addr().expect("it is bound")
    };
    let (server, _) = v2(|_| Reply::Silence).await;
    let endpoint = Endpoint::parse("endpoint", &format!("http://{address}")).expect("a URL");
    let gone = vault(&VaultTarget { endpoint, ..server.target() });
    let error = gone.probe(&lease("t")).await;
    assert_eq!(error, Err(BackendError::Unreachable("the connection was refused")));

    let hangs_up = failure(|_| Reply::Bytes(Vec::new())).await;
    assert_eq!(hangs_up, BackendError::Unreachable("the connection broke"));
}

#[tokio::test]
async fn a_store_that_says_nothing_is_left_at_the_deadline() {
    let (_server, vault) = v2(|_| Reply::Silence).await;
    let guard = Guard::new(Limits::default());
    let (lease, name) = (lease("t"), name("kv/data/x"));
    let read =
        guard.call(Retry::PROXIED_READ, Cost::FREE, Duration::from_millis(50), || vault.read(&lease, &name));
    assert_eq!(read.await.err(), Some(BackendError::Timeout));
}

#[tokio::test]
async fn reads_at_the_same_time_cost_one_request() {
    let (server, vault) = v2(|_| json(200, VALUE)).await;
    let (vault, guard) = (Arc::new(vault), Arc::new(Guard::new(Limits::default())));
    let coalescer = Coalescer::default();
    let read = || {
        let (vault, guard, lease, name) = (vault.clone(), guard.clone(), lease("t"), name("kv/data/x"));
        coalescer.run(name.clone(), async move {
            guard
                .call(Retry::PROXIED_READ, Cost::FREE, Duration::from_secs(5), || vault.read(&lease, &name))
                .await
        })
    };
    let (a, b, c) = tokio::join!(read(), read(), read());
    for secret in [a, b, c] {
        assert_eq!(secret.expect("a value").remote_version, "7");
    }
    assert_eq!(server.paths().len(), 2, "one look-up of the mount and one read");
}

#[tokio::test]
async fn a_token_that_no_header_can_carry_is_refused() {
    let (server, vault) = v2(|_| json(200, VALUE)).await;
    for token in ["a\nb", "a\r\nx-evil: 1", "a\0", "a\tb", "\u{7f}"] {
        let error = vault.probe(&lease(token)).await.expect_err("refused");
        assert!(matches!(error, BackendError::InvalidConfig(_)));
    }
    assert_eq!(server.heads(), [""; 0]);
}

#[test]
fn leases_and_secrets_do_not_print() {
    let printed = format!("{:?}", lease("hunter2").material);
    assert!(!printed.contains("hunter2"), "{printed}");
}

/// A server whose certificate is its own authority, and that certificate in PEM.
async fn tls_server() -> (Server, String) {
    let made = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).expect("a certificate");
    let chain = vec![CertificateDer::from(made.cert.der().to_vec())];
    let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).expect("a key");
    let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("usable versions")
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .expect("a usable certificate");
    let server =
        Server::start_tls(TlsAcceptor::from(Arc::new(config)), |_| json(200, r#"{"data":{}}"#)).await;
    (server, made.cert.pem())
}

#[tokio::test]
async fn only_the_configured_authority_is_trusted() {
    let ((server, pem), (_, other)) = (tls_server().await, tls_server().await);
    let endpoint = Endpoint::parse("endpoint", &format!("https://{}", server.address)).expect("a URL");
    let probe = |ca_cert: Option<String>, verify| {
        let vault = vault(&VaultTarget {
            endpoint: endpoint.clone(),
            tls: Tls { ca_cert, verify },
            ..server.target()
        });
        async move { vault.probe(&lease("t")).await }
    };
    assert_eq!(probe(Some(pem), true).await, Ok(()));
    let untrusted = Err(BackendError::Unreachable("its certificate is not trusted"));
    assert_eq!(probe(Some(other.clone()), true).await, untrusted);
    assert_eq!(probe(None, true).await, untrusted);
    assert_eq!(probe(Some(other), false).await, Ok(()));
    let nonsense =
        VaultTarget { tls: Tls { ca_cert: Some("x".into()), verify: true }, endpoint, ..server.target() };
    assert!(matches!(VaultBackend::connect(&nonsense, &egress()), Err(BackendError::InvalidConfig(_))));
}
