use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::Duration;

use scaivault_domain::backend::{Endpoint, Tls};
use scaivault_domain::secret::{Kind, State};
use scaivault_domain::time::Timestamp;
use secrecy::SecretString;
use serde_json::{Value, json};

use super::*;
use crate::error::Class;
use crate::survey::Surveyed;
use crate::testing::{Reply, Server, egress};

mod writing;

/// Half a minute after [`NOW`] in the attributes.
const DATE: &str = "Fri, 02 Sep 2022 22:36:58 GMT";
const NOW: i64 = 1_662_158_188;
const V1: &str = "e3020889427d44e085d3be215a30d277";
const V2: &str = "347d50fcce7c4695820b01b6adcecf98";
const V3: &str = "9625380cef5449f2875e6529aab44c5d";

fn lease() -> Lease {
    let material = Material::Bearer(SecretString::from("t0k.en"));
    Lease { id: "lease".to_owned(), material, expires_at: None, login_generation: 0 }
}

fn name(text: &str) -> RemoteName {
    RemoteName::new(text)
}

fn raw(status: u16, headers: &str, body: &str) -> Reply {
    let length = body.len();
    let head =
        format!("HTTP/1.1 {status} X\r\ncontent-length: {length}\r\nconnection: close\r\n{headers}\r\n");
    Reply::Bytes(format!("{head}{body}").into_bytes())
}

/// As Key Vault answers.
fn answer(status: u16, body: &Value) -> Reply {
    let headers = format!("content-type: application/json; charset=utf-8\r\ndate: {DATE}\r\n");
    raw(status, &headers, &body.to_string())
}

fn ok(body: &Value) -> Reply {
    answer(200, body)
}

fn fault(status: u16, code: &str, inner: Option<&str>) -> Reply {
    let inner = inner.map(|code| json!({ "code": code }));
    answer(status, &json!({ "error": { "code": code, "message": "m", "innererror": inner } }))
}

fn absent() -> Reply {
    fault(404, "SecretNotFound", None)
}

fn attributes(at: i64) -> Value {
    json!({ "enabled": true, "created": at, "updated": at, "recoveryLevel": "Recoverable+Purgeable",
        "recoverableDays": 90 })
}

fn bundle(name: &str, version: &str, value: &str) -> Value {
    json!({ "value": value, "id": format!("https://acme.vault.azure.net/secrets/{name}/{version}"),
        "attributes": attributes(NOW) })
}

fn item(name: &str, at: i64) -> Value {
    json!({ "id": format!("https://acme.vault.azure.net/secrets/{name}"), "attributes": attributes(at) })
}

/// `base` with one thing more.
fn with(mut base: Value, pointer: &str, value: Value) -> Value {
    let (parent, key) = pointer.rsplit_once('/').expect("a pointer");
    base.pointer_mut(parent).expect("it is there")[key] = value;
    base
}

async fn azure(reply: impl Fn(&str) -> Reply + Send + Sync + 'static) -> (Server, AzureBackend) {
    started(Server::start(reply).await)
}

fn started(server: Server) -> (Server, AzureBackend) {
    let vault = Endpoint::parse("vault_url", &format!("http://{}", server.address)).expect("a URL");
    let backend = AzureBackend::connect(&AzureTarget { vault, tls: Tls::default() }, &egress())
        .expect("a usable target");
    (server, backend)
}

/// A server that gives these answers, one after the other.
async fn replies(replies: Vec<Reply>) -> (Server, AzureBackend) {
    let replies = Mutex::new(VecDeque::from(replies));
    azure(move |_| replies.lock().expect("no panic").pop_front().expect("no more requests than answers"))
        .await
}

/// Method, path and body of each request, without the version of the API.
fn requests(server: &Server) -> Vec<String> {
    let request = |text: &String| {
        let (head, body) = text.split_once("\r\n\r\n").expect("a whole request");
        let line = head.lines().next().expect("a request").trim_end_matches(" HTTP/1.1");
        let line = line.replace("?api-version=7.4", "");
        if body.is_empty() { line } else { format!("{line} {body}") }
    };
    server.heads().iter().map(request).collect()
}

async fn read(reply: Reply) -> Result<RemoteSecret, BackendError> {
    let (_server, azure) = replies(vec![reply]).await;
    azure.read(&lease(), &name("db-password")).await
}

/// A page of the vault `server`, with a link to what is `next`.
fn page(address: &str, items: Vec<Value>, next: Option<&str>) -> Value {
    let link = next.map(|next| format!("http://{address}/secrets?{next}"));
    json!({ "value": items, "nextLink": link })
}

async fn survey(azure: &AzureBackend) -> Result<Vec<Surveyed>, BackendError> {
    let calls = Calls::default();
    let mut open = vec![Step::Tree(None)];
    let mut secrets = Vec::new();
    let mut steps = 0;
    while let Some(step) = open.pop() {
        let found = azure.survey(&lease(), &step, &calls).await?;
        secrets.extend(found.page.secrets);
        open.extend(found.next);
        steps += 1;
    }
    assert_eq!(calls.snapshot().get("list"), Some(&steps));
    Ok(secrets)
}

#[tokio::test]
async fn a_secret_is_read_whole() {
    let value = r#"{"n":123456789012345678901234567890,"b":1.10,"a":"\"<ü>"}"#;
    let body = with(bundle("DB-Password", V1, value), "/tags", json!({ "owner": "ops" }));
    let body = with(body, "/contentType", json!("application/vnd.acme"));
    let (server, azure) = replies(vec![ok(&body)]).await;
    let secret = azure.read(&lease(), &name("db-password")).await.expect("a value");
    assert_eq!(secret.value.expose(), value.as_bytes());
    assert_eq!((secret.kind, &*secret.content_type), (Kind::Json, "application/vnd.acme"));
    assert_eq!(secret.remote_version, V1);
    assert_eq!(secret.metadata.expect("reads tell")["owner"], "ops");
    assert_eq!(secret.created, Some(Timestamp::from_millis(NOW * 1000)));
    assert_eq!(server.paths(), ["/secrets/db-password?api-version=7.4"]);
    assert!(server.heads()[0].to_ascii_lowercase().contains("authorization: bearer t0k.en\r\n"));
}

#[tokio::test]
async fn kinds_are_told_by_the_value() {
    for (value, kind, content_type) in [
        ("", Kind::Text, "text/plain"),
        ("s3cret", Kind::Text, "text/plain"),
        ("[1]", Kind::Text, "text/plain"),
        (r#"{"a":1,"a":2}"#, Kind::Text, "text/plain"),
        (r#"{"a":{"b":[]}}"#, Kind::Json, "application/json"),
    ] {
        let secret = read(ok(&bundle("db-password", V1, value))).await.expect("a value");
        let told = (secret.value.expose(), secret.kind, &*secret.content_type);
        assert_eq!(told, (value.as_bytes(), kind, content_type));
    }
}

#[tokio::test]
async fn only_active_versions_have_a_value() {
    let state = async |attribute: &str, value: Value| {
        let body = with(bundle("db-password", V1, "x"), attribute, value);
        read(ok(&body)).await.map(|secret| secret.value.len())
    };
    let date = NOW + 30;
    let inactive = |state| Err(BackendError::NotActive(state));
    assert_eq!(state("/attributes/exp", json!(date)).await, inactive(State::Expired));
    assert_eq!(state("/attributes/exp", json!(date + 1)).await, Ok(1));
    assert_eq!(state("/attributes/nbf", json!(date + 1)).await, inactive(State::Disabled));
    assert_eq!(state("/attributes/nbf", json!(date)).await, Ok(1));
    assert_eq!(state("/attributes/enabled", json!(false)).await, inactive(State::Disabled));
    assert_eq!(state("/attributes/exp", json!(i64::MIN)).await, inactive(State::Expired));
    let disabled = read(fault(403, "Forbidden", Some("SecretDisabled"))).await;
    assert_eq!(disabled.err(), Some(BackendError::NotActive(State::Disabled)));
}

#[tokio::test]
async fn refusals_say_what_to_do() {
    for (reply, class) in [
        (absent(), Class::NotFound),
        (fault(401, "Unauthorized", None), Class::Auth),
        (fault(403, "Forbidden", Some("ForbiddenByRbac")), Class::Forbidden),
        (fault(403, "Forbidden", Some("ForbiddenByPolicy")), Class::Forbidden),
        (fault(403, "Forbidden", Some("ForbiddenByFirewall")), Class::Forbidden),
        (fault(403, "Forbidden", None), Class::Forbidden),
        (raw(403, "content-type: text/html\r\n", "<p>"), Class::Forbidden),
        (fault(400, "BadParameter", None), Class::Invalid),
        (fault(500, "InternalServerError", None), Class::Transient),
        (raw(503, "", ""), Class::Transient),
        (raw(302, "location: https://evil.example/\r\n", ""), Class::Invalid),
        // Taken for a deletion, it would delete a copy.
        (fault(404, "ResourceNotFound", None), Class::Invalid),
        (answer(404, &json!({})), Class::Invalid),
        (raw(404, "content-type: text/html\r\n", "<p>"), Class::Invalid),
        (answer(404, &json!({ "error": null })), Class::Invalid),
    ] {
        let error = read(reply).await.expect_err("a refusal");
        assert_eq!(error.class(), class, "{error}");
    }
}

#[tokio::test]
async fn a_throttled_call_says_how_long_to_wait() {
    let throttled = |headers: &str| read(raw(429, headers, "{}"));
    let error = |retry_after| Some(BackendError::Throttled { retry_after });
    assert_eq!(throttled("retry-after: 7\r\n").await.err(), error(Some(Duration::from_secs(7))));
    assert_eq!(throttled("").await.err(), error(None));
}

#[tokio::test]
async fn ugly_answers_are_refused() {
    let json = "content-type: application/json\r\n";
    let good = bundle("db-password", V1, "x");
    let mut bodies = vec![String::new(), "{}".into(), "[]".into(), "null".into(), "{\"value\":".into()];
    bodies.push("[".repeat(100_000));
    for (pointer, value) in [
        ("/id", json!(7)),
        ("/id", json!("")),
        ("/id", json!("/secrets/db-password")),
        ("/id", json!(format!("https://a/secrets/db-password/{V1}/x"))),
        ("/id", json!(format!("https://a/keys/db-password/{V1}"))),
        ("/id", json!("https://a/secrets/db-password/short")),
        ("/id", json!(format!("https://a/secrets/../{V1}"))),
        ("/value", json!({})),
        ("/value", Value::Null),
        ("/attributes", Value::Null),
        ("/attributes/exp", json!("soon")),
        ("/attributes/exp", json!(1e300)),
        ("/tags", json!({ "a": 1 })),
        ("/contentType", json!([])),
    ] {
        bodies.push(with(good.clone(), pointer, value).to_string());
    }
    for body in bodies {
        let error = read(raw(200, json, &body)).await.expect_err(&body);
        assert!(matches!(error, BackendError::InvalidAnswer(_)), "{error} {}", &body[..body.len().min(99)]);
    }
    let truncated =
        Reply::Bytes(format!("HTTP/1.1 200 X\r\n{json}content-length: 99\r\n\r\n{{").into_bytes());
    assert_eq!(read(truncated).await.err(), Some(BackendError::InvalidAnswer("it ended early")));
    let plain = raw(200, "content-type: text/plain\r\n", &good.to_string());
    assert_eq!(read(plain).await.err(), Some(BackendError::InvalidAnswer("no JSON")));
    let huge = bundle("db-password", V1, &"x".repeat(READ_LIMIT));
    assert_eq!(read(ok(&huge)).await.err(), Some(BackendError::TooLarge));
}

#[tokio::test]
async fn another_secret_than_was_asked_for_is_refused() {
    assert!(read(ok(&bundle("DB-PASSWORD", V1, "x"))).await.is_ok(), "names do not differ by case");
    let error = read(ok(&bundle("db-password2", V1, "x"))).await.err();
    assert_eq!(error, Some(BackendError::InvalidAnswer("another secret than was asked for")));
    // Even where its name is that of the collection.
    let (_server, azure) = azure(|_| ok(&bundle("secrets", V1, "x"))).await;
    assert!(azure.read(&lease(), &name("secrets")).await.is_ok());
}

#[tokio::test]
async fn names_that_key_vault_cannot_have_are_not_asked_for() {
    let (server, azure) = azure(|_| ok(&bundle(&"a".repeat(127), V1, "x"))).await;
    for text in ["", "a_b", "a/b", "a.b", "Db", "..", "a?b", "a%2fb", "ä", &"a".repeat(128)] {
        let read = azure.read(&lease(), &name(text)).await;
        assert_eq!(read.err(), Some(BackendError::Unrepresentable), "{text}");
        let may_read = azure.may_read(&lease(), &name(text)).await;
        assert_eq!(may_read, Err(BackendError::Unrepresentable), "{text}");
    }
    assert_eq!(server.paths(), [""; 0]);
    assert!(azure.read(&lease(), &name(&"a".repeat(127))).await.is_ok());
}

#[tokio::test]
async fn a_token_that_no_header_can_carry_is_refused() {
    let (server, azure) = azure(|_| absent()).await;
    for token in ["a\nb", "a\r\nx-evil: 1", "a\0", "\u{7f}"] {
        let lease = Lease { material: Material::Bearer(SecretString::from(token)), ..lease() };
        assert!(matches!(azure.probe(&lease).await, Err(BackendError::InvalidConfig(_))));
    }
    let foreign = Lease { material: Material::VaultToken(SecretString::from("t")), ..lease() };
    assert_eq!(azure.probe(&foreign).await, Err(BackendError::FOREIGN_LEASE));
    assert_eq!(server.paths(), [""; 0]);
}

#[tokio::test]
async fn the_survey_names_every_secret_with_its_state() {
    let server = Server::start_with_heads(|path, head| {
        let address =
            head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("host: ").map(str::to_owned));
        let address = address.expect("HTTP/1.1 has it");
        let changed = |name: &str, pointer: &str, value| with(item(name, NOW), pointer, value);
        match path {
            "/secrets?maxresults=25&api-version=7.4" => ok(&page(
                &address,
                vec![
                    item("DB-Password", NOW),
                    changed("off", "/attributes/enabled", json!(false)),
                    changed("over", "/attributes/exp", json!(NOW)),
                    changed("soon", "/attributes/nbf", json!(NOW + 3600)),
                ],
                Some("api-version=7.4&$skiptoken=e30.&maxresults=25"),
            )),
            "/secrets?api-version=7.4&$skiptoken=e30.&maxresults=25" => ok(&page(
                &address,
                vec![
                    changed("cert", "/managed", json!(true)),
                    item("fresh", NOW + 29),
                    item("settled", NOW + 28),
                    changed("ancient", "/attributes", json!({ "enabled": true })),
                ],
                Some("last"),
            )),
            "/secrets?last" => ok(&page(&address, Vec::new(), None)),
            _ => raw(500, "", ""),
        }
    })
    .await;
    let (_server, azure) = started(server);
    let secrets = survey(&azure).await.expect("a survey");
    let told: Vec<_> = secrets
        .iter()
        .map(|secret| (secret.name.as_str(), secret.seen.as_ref().map(|seen| seen.state)))
        .collect();
    let expected = [
        ("DB-Password", Some(State::Active)),
        ("off", Some(State::Disabled)),
        ("over", Some(State::Expired)),
        ("soon", Some(State::Disabled)),
        ("cert", Some(State::Active)),
        // Another write may still come in the same second, so it is read.
        ("fresh", None),
        ("settled", Some(State::Active)),
        ("ancient", None),
    ];
    assert_eq!(told, expected);
}

#[tokio::test]
async fn a_read_has_the_token_of_the_survey() {
    let tagged = |base: Value| {
        let base = with(base, "/tags", json!({ "b": "1", "a": "2" }));
        with(base, "/contentType", json!("text/x"))
    };
    let (_server, azure) = azure(move |path| match path {
        "/secrets/a?api-version=7.4" => ok(&tagged(bundle("A", V1, "x"))),
        _ => ok(&page("", vec![tagged(item("A", NOW))], None)),
    })
    .await;
    let surveyed = survey(&azure).await.expect("a survey").remove(0);
    let mut secret = azure.read(&lease(), &name("a")).await.expect("a value");
    secret.metadata = surveyed.metadata.or(secret.metadata);
    let token = surveyed.seen.map(|seen| seen.token);
    assert!(token.is_some());
    assert_eq!(secret.seen().map(|seen| seen.token), token);
}

#[tokio::test]
async fn tokens_change_with_everything_that_a_listing_tells() {
    let token = async |pointer: &str, value: Value| {
        let (_server, azure) = azure({
            let body = page("", vec![with(item("a", NOW), pointer, value)], None);
            move |_| ok(&body)
        })
        .await;
        survey(&azure).await.expect("a survey").remove(0).seen.expect("it is settled").token
    };
    let mut tokens = vec![
        token("/attributes/updated", json!(NOW)).await,
        token("/attributes/updated", json!(NOW - 1)).await,
        token("/contentType", json!("text/x")).await,
        token("/tags", json!({ "a": "b" })).await,
        token("/attributes/enabled", json!(false)).await,
        token("/attributes/exp", json!(NOW)).await,
    ];
    tokens.sort();
    tokens.dedup();
    assert_eq!(tokens.len(), 6);
}

#[tokio::test]
async fn a_value_so_fresh_that_another_may_look_the_same_has_no_stamp() {
    for (age, has_stamp) in [(-60, false), (0, false), (1, false), (2, true)] {
        let body = with(bundle("db-password", V1, "x"), "/attributes/updated", json!(NOW + 30 - age));
        let secret = read(ok(&body)).await.expect("a value");
        assert_eq!(secret.stamp.is_some(), has_stamp, "{age} s old");
    }
    let undated = raw(200, "content-type: application/json\r\n", &bundle("db-password", V1, "x").to_string());
    assert_eq!(read(undated).await.expect("a value").stamp, None);
}

#[tokio::test]
async fn a_listing_that_leads_astray_is_refused() {
    type Link = fn(&str, u32) -> (Vec<Value>, String);
    let cases: [(&str, Link); 4] = [
        ("to another server", |_, _| (vec![item("a", NOW)], "http://127.0.0.1:1/secrets?q".into())),
        ("to itself", |host, _| (vec![item("a", NOW)], format!("http://{host}/secrets?q"))),
        ("to and fro", |host, n| (vec![item("a", NOW)], format!("http://{host}/secrets?q={}", n % 2))),
        ("through nothing", |host, n| (Vec::new(), format!("http://{host}/secrets?q={n}"))),
    ];
    for (case, link) in cases {
        let pages = Mutex::new(0);
        let server = Server::start_with_heads(move |_, head| {
            let host = head.lines().find_map(|line| line.strip_prefix("host: ")).expect("HTTP/1.1 has it");
            let mut pages = pages.lock().expect("no panic");
            *pages += 1;
            let (items, link) = link(host, *pages);
            ok(&json!({ "value": items, "nextLink": link }))
        })
        .await;
        let (server, azure) = started(server);
        let error = survey(&azure).await.expect_err(case);
        assert!(matches!(error, BackendError::InvalidAnswer(_)), "{case}: {error}");
        assert!(server.paths().len() <= 11, "{case}");
    }
}

#[tokio::test]
async fn ugly_listings_are_refused() {
    for body in [
        json!({}),
        json!({ "value": null }),
        json!({ "value": {} }),
        json!({ "value": [{}] }),
        json!({ "value": [item("a_b", NOW)] }),
        json!({ "value": [item("", NOW)] }),
        json!({ "value": [item("..", NOW)] }),
        json!({ "value": [item(&"a".repeat(128), NOW)] }),
        json!({ "value": [{ "id": "a", "attributes": {} }] }),
        json!({ "value": [], "nextLink": 7 }),
        json!({ "value": [], "nextLink": "no link" }),
    ] {
        let shown = body.to_string();
        let (_server, azure) = azure(move |_| ok(&body)).await;
        let error = survey(&azure).await.expect_err("a failure");
        assert!(matches!(error, BackendError::InvalidAnswer(_)), "{error} {shown}");
        let error = azure.list(&lease(), None, None).await.expect_err("a failure");
        assert!(matches!(error, BackendError::InvalidAnswer(_)), "{error} {shown}");
    }
    let huge = json!({ "value": [], "nextLink": "x".repeat(LIST_LIMIT) });
    let (_server, azure) = azure(move |_| ok(&huge)).await;
    assert_eq!(survey(&azure).await.err(), Some(BackendError::TooLarge));
}

#[tokio::test]
async fn a_vault_that_may_not_be_listed_fails_the_survey() {
    let (_server, azure) = azure(|_| fault(403, "Forbidden", Some("ForbiddenByRbac"))).await;
    assert_eq!(survey(&azure).await.err(), Some(BackendError::Forbidden));
}

#[tokio::test]
async fn a_listing_goes_on_where_it_ended() {
    let server = Server::start_with_heads(|path, head| {
        let host = head.lines().find_map(|line| line.strip_prefix("host: ")).expect("HTTP/1.1 has it");
        match path {
            "/secrets?two" => ok(&page(host, vec![item("b", NOW)], None)),
            _ => ok(&page(host, vec![item("A", NOW)], Some("two"))),
        }
    })
    .await;
    let (_server, azure) = started(server);
    let entry = |text: &str| RemoteEntry { name: RemoteName::with_literal(text, 0), kind: EntryKind::Secret };
    let first = azure.list(&lease(), Some(&name("ignored")), None).await.expect("a page");
    assert_eq!(first.entries, [entry("A")]);
    let second = azure.list(&lease(), None, first.next.as_ref()).await.expect("a page");
    assert_eq!(second, Page { entries: vec![entry("b")], next: None });
    let foreign = PageToken("elsewhere".to_owned());
    let error = azure.list(&lease(), None, Some(&foreign)).await.expect_err("a failure");
    assert!(matches!(error, BackendError::InvalidConfig(_)));
}

#[tokio::test]
async fn the_history_is_in_the_order_of_time() {
    let version = |version: &str, at: i64| {
        let id = format!("https://acme.vault.azure.net/secrets/A/{version}");
        with(item("A", at), "/id", json!(id))
    };
    let off = with(version(V2, NOW - 1), "/attributes/enabled", json!(false));
    let server = Server::start_with_heads(move |path, head| {
        let host = head.lines().find_map(|line| line.strip_prefix("host: ")).expect("HTTP/1.1 has it");
        match path {
            "/secrets/a/versions?maxresults=25&api-version=7.4" => {
                ok(&page(host, vec![version(V3, NOW), off.clone()], Some("two")))
            }
            "/secrets/a/versions?two" => ok(&page(host, vec![version(V1, NOW - 2)], None)),
            _ => raw(500, "", ""),
        }
    })
    .await;
    let (_server, azure) = started(server);
    let history = azure.history(&lease(), &name("a")).await.expect("a history");
    let told: Vec<_> = history.iter().map(|known| (&*known.remote_version, known.state)).collect();
    assert_eq!(told, [(V1, State::Active), (V2, State::Disabled), (V3, State::Active)]);
    assert_eq!(history[0].created, Some(Timestamp::from_millis((NOW - 2) * 1000)));
}

#[tokio::test]
async fn a_secret_that_is_not_there_has_no_history() {
    for reply in [absent(), ok(&json!({ "value": [], "nextLink": null }))] {
        let (_server, azure) = replies(vec![reply]).await;
        assert_eq!(azure.history(&lease(), &name("a")).await, Err(BackendError::NotFound));
    }
}

#[tokio::test]
async fn a_history_without_end_is_given_up() {
    let pages = Mutex::new(0_u32);
    let server = Server::start_with_heads(move |_, head| {
        let host = head.lines().find_map(|line| line.strip_prefix("host: ")).expect("HTTP/1.1 has it");
        let mut pages = pages.lock().expect("no panic");
        *pages += 1;
        let id = format!("https://acme.vault.azure.net/secrets/a/{:032x}", *pages);
        ok(&page(host, vec![with(item("a", NOW), "/id", json!(id))], Some(&format!("q={pages}"))))
    })
    .await;
    let (server, azure) = started(server);
    assert_eq!(azure.history(&lease(), &name("a")).await, Err(BackendError::TooLarge));
    assert_eq!(server.paths().len(), MOST_VERSION_PAGES);
}

#[tokio::test]
async fn a_version_is_read_by_its_name() {
    let (server, azure) = azure(|path| match path {
        _ if path.contains(V1) => ok(&bundle("A", V1, "old")),
        _ if path.contains(V2) => ok(&bundle("A", V3, "other")),
        _ => absent(),
    })
    .await;
    let read = async |version: &str| azure.read_version(&lease(), &name("a"), version).await;
    assert_eq!(read(V1).await.expect("a value").value.expose(), b"old");
    assert_eq!(read(V2).await.err(), Some(BackendError::InvalidAnswer("another version than was asked for")));
    assert_eq!(read(V3).await.err(), Some(BackendError::NotFound));
    let asked = server.paths().len();
    for version in ["", "7", "versions", "..", &"é".repeat(16), &format!("{V1}?")] {
        assert_eq!(read(version).await.err(), Some(BackendError::NotFound), "{version}");
    }
    assert_eq!(server.paths().len(), asked, "what no version is named is not asked for");
}

#[tokio::test]
async fn whether_a_value_may_be_read_is_found_out_without_it() {
    let may_read = async |reply| {
        let (server, azure) = replies(vec![reply]).await;
        let verdict = azure.may_read(&lease(), &name("a")).await;
        assert_eq!(server.paths(), ["/secrets/a/00000000000000000000000000000000?api-version=7.4"]);
        verdict
    };
    assert_eq!(may_read(absent()).await, Ok(()));
    let forbidden = fault(403, "Forbidden", Some("ForbiddenByPolicy"));
    assert_eq!(may_read(forbidden).await, Err(BackendError::Forbidden));
    assert_eq!(may_read(fault(401, "Unauthorized", None)).await, Err(BackendError::LoginExpired));
    assert!(may_read(ok(&bundle("a", V1, "x"))).await.is_err());
}

#[tokio::test]
async fn a_probe_asks_whether_the_token_is_taken_and_not_whether_it_may_list() {
    let probe = async |reply| {
        let (server, azure) = replies(vec![reply]).await;
        let verdict = azure.probe(&lease()).await;
        assert_eq!(server.paths(), ["/secrets?maxresults=1&api-version=7.4"]);
        verdict
    };
    assert_eq!(probe(ok(&json!({ "value": [], "nextLink": null }))).await, Ok(()));
    assert_eq!(probe(fault(403, "Forbidden", Some("ForbiddenByRbac"))).await, Ok(()));
    assert_eq!(probe(fault(403, "Forbidden", Some("ForbiddenByPolicy"))).await, Ok(()));
    let firewall = fault(403, "Forbidden", Some("ForbiddenByFirewall"));
    assert_eq!(probe(firewall).await, Err(BackendError::Forbidden));
    assert_eq!(probe(fault(401, "Unauthorized", None)).await, Err(BackendError::LoginExpired));
    assert!(matches!(probe(ok(&json!({ "keys": [] }))).await, Err(BackendError::InvalidAnswer(_))));
}
