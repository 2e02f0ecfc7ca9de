//! Faults of a backend: each is told apart, is the business of that backend alone, and heals by itself.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use axum::body::{Bytes, to_bytes};
use axum::extract::Request;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};
use futures::future::try_join_all;
use reqwest::Method;
use scaivault_tests::faults::{Fault, Proxy};
use scaivault_tests::planes::{self, CREDENTIAL, Federated, Options, Rest};
use scaivault_tests::servers::openbao::Admin;
use scaivault_tests::{http, ports, wait};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::time::{Instant, sleep};

/// Reads of this pass the network that the faults are in.
const FAULTY: &str = "/v1/secrets/external/hashicorp/app/db";
/// Reads of this do not.
const HEALTHY: &str = "/v1/secrets/healthy/app/db";
const TIMEOUT: Duration = Duration::from_secs(1);
/// What the machine may add to a deadline.
const SLACK: Duration = Duration::from_secs(1);

/// One OpenBao as two backends: one behind the network with the faults, one beside it.
async fn two_backends(options: Options) -> Result<(Federated, Rest)> {
    let federated = Federated::start_with(options).await?;
    let rest = federated.planes.rest(0)?;
    let beside = json!({ "healthy/**": "secret/data/**" });
    rest.create_backend("healthy", &federated.bao.addr(), CREDENTIAL, beside).await?;
    let timeout = json!({ "config": { "timeout": format!("{}ms", TIMEOUT.as_millis()) } });
    rest.patch(&format!("/v1/federation/backends/{}", federated.backend), timeout).await?.ok()?;
    ensure!(rest.get(HEALTHY).await?.status == 200, "the backend without faults is healthy");
    Ok((federated, rest))
}

async fn status(rest: &Rest, backend: &str) -> Result<Value> {
    rest.get(&format!("/v1/federation/backends/{backend}/status")).await?.ok()
}

async fn status_is(rest: &Rest, backend: &str, expected: &str) -> Result<Value> {
    wait::until(&format!("the backend is {expected}"), async || {
        Ok(Some(status(rest, backend).await?).filter(|status| status["status"] == expected))
    })
    .await
}

async fn read_again(rest: &Rest, path: &str) -> Result<()> {
    wait::until("it is read again", async || Ok((rest.get(path).await?.status == 200).then_some(()))).await
}

/// Whether somebody who looks at the status knows why, and what to do.
fn says_why_and_what_to_do(status: &Value) -> bool {
    ["reason", "next_step"].iter().all(|name| status[name].as_str().is_some_and(|text| !text.is_empty()))
}

fn answer(status: u16, content_type: &'static str, body: impl Into<String>) -> Fault {
    Fault::Answer { status, headers: vec![("Content-Type", content_type)], body: body.into() }
}

fn json_answer(status: u16, body: impl Into<String>) -> Fault {
    answer(status, "application/json", body)
}

#[tokio::test]
async fn every_fault_is_told_apart_leaves_other_backends_alone_and_heals_by_itself() -> Result<()> {
    let (federated, rest) = two_backends(Options::default()).await?;
    let elsewhere = Proxy::start(federated.bao.socket()).await?;
    let location: &'static str = format!("http://{}{FAULTY}", elsewhere.addr()).leak();
    let redirect =
        |status| Fault::Answer { status, headers: vec![("Location", location)], body: String::new() };
    let compressed = Fault::Answer {
        status: 200,
        headers: vec![("Content-Type", "application/json"), ("Content-Encoding", "gzip")],
        body: "\u{1f}".into(),
    };
    let (unreachable, invalid) = ((502, "backend_unreachable"), (502, "backend_invalid_answer"));
    let timeout = (504, "backend_timeout");
    for (name, fault, expected) in [
        ("stopped", Fault::Cut, unreachable),
        ("blackholed", Fault::Blackhole, timeout),
        ("slow", Fault::Delay(TIMEOUT * 5), timeout),
        ("500", Fault::status(500), unreachable),
        ("sealed", json_answer(503, r#"{"errors":["Vault is sealed"]}"#), unreachable),
        ("garbage", Fault::Garbage, invalid),
        ("truncated", Fault::Truncate, invalid),
        ("HTML", answer(200, "text/html", "<html>sign in</html>"), invalid),
        ("half of a JSON", json_answer(200, r#"{"data":"#), invalid),
        ("another JSON", json_answer(200, "[]"), invalid),
        ("deep JSON", json_answer(200, "[".repeat(100_000)), invalid),
        ("compressed", compressed, invalid),
        ("huge", json_answer(200, format!(r#"{{"data":"{}"}}"#, "x".repeat(8 << 20))), invalid),
        ("no content", Fault::status(204), invalid),
        ("301", redirect(301), invalid),
        ("307", redirect(307), invalid),
    ] {
        federated.network.set(fault).await?;
        let start = Instant::now();
        let (faulty, healthy) = tokio::join!(rest.get(FAULTY), async {
            let healthy = rest.get(HEALTHY).await;
            (healthy, start.elapsed())
        });
        let (faulty, elapsed) = (faulty?, start.elapsed());
        assert_eq!(faulty.refusal(), expected, "{name}: {}", faulty.text);
        assert!(elapsed < TIMEOUT + SLACK, "{name}: {elapsed:?}");
        assert!(elapsed >= TIMEOUT || expected != timeout, "{name}: {elapsed:?}");
        assert!(
            faulty.json["detail"].as_str().is_some_and(|text| text.contains("openbao")),
            "{}",
            faulty.text
        );
        assert!(!faulty.text.contains("sign in") && !faulty.text.contains("xxxx"), "{name}: {}", faulty.text);
        let (healthy, elapsed) = healthy;
        assert_eq!(healthy?.json["data"]["password"], "three", "{name}");
        assert!(elapsed < SLACK, "{name}: {elapsed:?}");

        federated.network.set(Fault::Pass).await?;
        read_again(&rest, FAULTY).await.context(name)?;
    }
    assert_eq!(elsewhere.connections(), 0, "nobody follows a redirect with a credential");
    Ok(())
}

#[tokio::test]
async fn throttling_is_handed_on_and_opens_no_breaker() -> Result<()> {
    let (federated, rest) = two_backends(Options::default()).await?;
    let control_plane = federated.planes.control_plane_rest()?;
    status_is(&rest, &federated.backend, "healthy").await?;
    assert_eq!(control_plane.get(FAULTY).await?.status, 200);
    let throttled = Fault::Answer { status: 429, headers: vec![("Retry-After", "2")], body: String::new() };
    federated.network.set(throttled).await?;
    let asked = federated.network.requests().len();
    for plane in [&rest, &control_plane] {
        for _ in 0..10 {
            let answer = plane.get(FAULTY).await?;
            assert_eq!(answer.refusal(), (503, "backend_throttled"), "{}", answer.text);
            assert!(matches!(answer.header("retry-after"), "1" | "2"), "{}", answer.header("retry-after"));
        }
    }
    assert_eq!(federated.network.requests().len() - asked, 2, "a backend that asks for a pause is given one");
    assert_eq!(rest.get(HEALTHY).await?.status, 200);
    let slowed = status(&rest, &federated.backend).await?;
    assert_eq!(slowed["connection"]["breaker"], "closed");
    let (budget, reason) = (&slowed["call_budget"], slowed["call_budget"]["reason"].as_str());
    assert_eq!(budget["quotas"], json!([]), "Vault has none");
    assert!(budget["concurrency"].as_u64() < budget["max_concurrency"].as_u64(), "{budget}");
    assert!(reason.is_some_and(|reason| reason.starts_with("slowed down by the backend")), "{budget}");
    federated.network.set(Fault::Pass).await?;
    read_again(&rest, FAULTY).await
}

#[tokio::test]
async fn what_the_backend_forbids_or_lacks_says_so_and_nothing_else_suffers() -> Result<()> {
    let (federated, rest) = two_backends(Options::default()).await?;
    let only_app = r#"path "secret/data/app/*" { capabilities = ["read"] }"#;
    federated.bao.client()?.write_policy("scaivault", only_app).await?;
    let logins = federated.asked("update", "auth/approle/login")?;
    for _ in 0..10 {
        let forbidden = rest.get("/v1/secrets/external/hashicorp/top").await?;
        assert_eq!(forbidden.refusal(), (502, "backend_forbidden"), "{}", forbidden.text);
        assert!(forbidden.json["next_step"].as_str().is_some_and(|step| step.contains("`read` on")));
        assert_eq!(rest.get(FAULTY).await?.status, 200);
        let missing = rest.get("/v1/secrets/external/hashicorp/app/missing").await?;
        assert_eq!(missing.refusal(), (404, "not_found"), "{}", missing.text);
    }
    let logins = federated.asked("update", "auth/approle/login")? - logins;
    // The control plane's own, which comes with its first probe of a backend.
    assert!(logins <= 2, "{logins} logins");
    Ok(())
}

#[tokio::test]
async fn a_backend_that_fails_five_times_is_given_a_pause_and_the_status_says_so() -> Result<()> {
    let (federated, rest) = two_backends(Options::default()).await?;
    let control_plane = federated.planes.control_plane_rest()?;
    status_is(&rest, &federated.backend, "healthy").await?;
    federated.network.set(Fault::Cut).await?;
    for plane in [&rest, &control_plane] {
        // Each read tries twice.
        for _ in 0..3 {
            assert_eq!(plane.get(FAULTY).await?.refusal(), (502, "backend_unreachable"));
        }
        federated.network.set(Fault::status(500)).await?;
        let asked = federated.network.requests().len();
        for _ in 0..10 {
            let answer = plane.get(FAULTY).await?;
            assert_eq!(answer.refusal(), (502, "backend_unreachable"), "{}", answer.text);
            assert_eq!(answer.header("retry-after"), "1");
        }
        let asked = federated.network.requests().len() - asked;
        assert!(asked <= 2, "{asked} of 10 reads asked a backend that is to have a pause");
    }
    let open = status_is(&rest, &federated.backend, "unreachable").await?;
    assert!(matches!(open["connection"]["breaker"].as_str(), Some("open" | "half_open")), "{open}");
    assert_eq!(open["connection"]["status"], "disconnected");
    assert!(says_why_and_what_to_do(&open), "{open}");
    assert_eq!(rest.get(HEALTHY).await?.status, 200);

    federated.network.set(Fault::Pass).await?;
    read_again(&rest, FAULTY).await?;
    read_again(&control_plane, FAULTY).await?;
    let healed = status_is(&rest, &federated.backend, "healthy").await?;
    assert_eq!(healed["connection"]["breaker"], "closed");
    Ok(())
}

/// The types of all events so far, with the backends that they are about.
async fn events(rest: &Rest) -> Result<Vec<(String, String)>> {
    let answer = rest.get("/v1/federation/events?page_size=1000").await?.ok()?;
    let events = answer["events"].as_array().context("events")?;
    let text = |event: &Value, name: &str| event[name].as_str().unwrap_or_default().to_owned();
    Ok(events.iter().map(|event| (text(event, "type"), text(event, "subject"))).collect())
}

#[tokio::test]
async fn an_outage_is_one_event_and_its_end_another_also_across_a_restart() -> Result<()> {
    let (mut federated, _) = two_backends(Options::default()).await?;
    let rest = federated.planes.control_plane_rest()?;
    let unreachable = ("federation.backend.unreachable".to_owned(), "openbao".to_owned());
    let recovered = ("federation.backend.recovered".to_owned(), "openbao".to_owned());
    let mut expected = Vec::new();
    let happened = async |expected: &[(String, String)]| {
        wait::until("the event is told", async || {
            // Reads open the breaker, and find out that it may close.
            rest.get(FAULTY).await?;
            let events = events(&rest).await?;
            ensure!(expected.starts_with(&events), "{events:?}");
            Ok((events == expected).then_some(()))
        })
        .await
    };
    for restart in [true, false] {
        status_is(&rest, &federated.backend, "healthy").await?;
        federated.network.set(Fault::Cut).await?;
        expected.push(unreachable.clone());
        happened(&expected).await?;
        if restart {
            let control_plane = &mut federated.planes.control_plane;
            control_plane.kill9();
            control_plane.start_again().await?;
            control_plane.ready().await?;
        }
        // It has had its occasions to tell it again.
        wait::until("the backend was probed again", async || {
            let status = status(&rest, &federated.backend).await?;
            Ok((status["consecutive_failures"].as_u64() >= Some(2)).then_some(()))
        })
        .await?;
        happened(&expected).await?;
        federated.network.set(Fault::Pass).await?;
        expected.push(recovered.clone());
        happened(&expected).await?;
    }
    Ok(())
}

fn logins(federated: &Federated) -> Result<usize> {
    federated.asked("update", "auth/approle/login")
}

/// Revokes every token that a login gave.
#[tokio::test]
async fn a_backend_that_cannot_even_be_logged_in_to_is_an_outage_too() -> Result<()> {
    let (federated, rest) = two_backends(Options::default()).await?;
    let nobody = format!("http://127.0.0.1:{}", ports::free());
    rest.create_backend("gone", &nobody, CREDENTIAL, json!({ "gone/**": "secret/data/**" })).await?;
    assert_eq!(rest.get("/v1/secrets/gone/x").await?.refusal(), (502, "backend_unreachable"));
    wait::until("the outage is an event", async || {
        let reported = ("federation.backend.unreachable".to_owned(), "gone".to_owned());
        Ok(events(&rest).await?.contains(&reported).then_some(()))
    })
    .await?;
    drop(federated);
    Ok(())
}

async fn revoke_logins(admin: &Admin) -> Result<()> {
    admin.call(Method::PUT, "sys/leases/revoke-prefix/auth/approle", Some(json!({}))).await.map(drop)
}

#[tokio::test]
async fn a_revoked_lease_heals_by_one_login_however_many_read() -> Result<()> {
    let federated = Federated::start().await?;
    let rest = federated.planes.rest(0)?;
    status_is(&rest, &federated.backend, "healthy").await?;
    let before = logins(&federated)?;
    revoke_logins(&federated.bao.client()?).await?;
    assert_eq!(rest.get(FAULTY).await?.status, 200);
    assert_eq!(logins(&federated)?, before + 1);
    revoke_logins(&federated.bao.client()?).await?;
    let paths = ["app/db", "top", "app/api/key", "app/api/v2/key"].repeat(5);
    let paths = paths.into_iter().map(|path| format!("/v1/secrets/external/hashicorp/{path}"));
    let reads = try_join_all(paths.map(async |path| rest.get(&path).await)).await?;
    for read in reads {
        assert_eq!(read.status, 200, "{}", read.text);
    }
    assert_eq!(logins(&federated)?, before + 2);
    Ok(())
}

#[tokio::test]
async fn a_rotated_credential_is_picked_up_without_a_restart() -> Result<()> {
    let federated = Federated::start().await?;
    let (rest, admin) = (federated.planes.rest(0)?, federated.bao.client()?);
    status_is(&rest, &federated.backend, "healthy").await?;
    let mut credential = rest.get(&format!("/v1/secrets/{CREDENTIAL}")).await?.ok()?["data"].take();
    let role = "auth/approle/role/scaivault/secret-id";
    let destroyed = json!({ "secret_id": credential["secret_id"] });
    admin.call(Method::POST, &format!("{role}/destroy"), Some(destroyed)).await?;
    assert_eq!(rest.get(FAULTY).await?.status, 200, "its lease is good until it ends");
    revoke_logins(&admin).await?;
    assert_eq!(rest.get(FAULTY).await?.refusal(), (502, "backend_login_failed"));
    let degraded = status_is(&rest, &federated.backend, "degraded").await?;
    assert!(says_why_and_what_to_do(&degraded), "{degraded}");

    let mut made = admin.call(Method::POST, role, Some(json!({}))).await?;
    credential["secret_id"] = made["data"]["secret_id"].take();
    rest.put_data(CREDENTIAL, credential).await?;
    read_again(&rest, FAULTY).await?;
    status_is(&rest, &federated.backend, "healthy").await.map(drop)
}

#[tokio::test]
async fn a_wrong_credential_is_told_with_what_to_do() -> Result<()> {
    let federated = Federated::start().await?;
    let rest = federated.planes.rest(0)?;
    rest.put_data("infra/wrong", json!({ "role_id": "nobody", "secret_id": "nothing" })).await?;
    let mapping = json!({ "wrong/**": "secret/data/**" });
    let wrong = rest.create_backend("wrong", &federated.bao.addr(), "infra/wrong", mapping).await?;
    let refused = rest.get("/v1/secrets/wrong/app/db").await?;
    assert_eq!(refused.refusal(), (502, "backend_login_failed"), "{}", refused.text);
    let degraded = status_is(&rest, &wrong, "degraded").await?;
    assert!(
        degraded["next_step"].as_str().is_some_and(|step| step.contains("auth_config_path")),
        "{degraded}"
    );
    assert_eq!(degraded["nodes"][0]["has_lease"], false);
    assert_eq!(rest.get(FAULTY).await?.status, 200);
    Ok(())
}

#[tokio::test]
async fn leases_that_end_within_seconds_are_renewed_without_a_failed_read() -> Result<()> {
    let federated = Federated::start().await?;
    let (rest, admin) = (federated.planes.rest(0)?, federated.bao.client()?);
    for (name, settings) in [
        ("renewed", json!({ "token_policies": ["scaivault"], "token_ttl": "2s" })),
        ("again", json!({ "token_policies": ["scaivault"], "token_ttl": "2s", "token_max_ttl": "4s" })),
        ("batch", json!({ "token_policies": ["scaivault"], "token_ttl": "2s", "token_type": "batch" })),
    ] {
        let role = admin.create_approle("approle", name, settings).await?;
        let credential = format!("infra/{name}");
        rest.put_data(&credential, json!({ "role_id": role.role_id, "secret_id": role.secret_id })).await?;
        let mapping = json!({ format!("{name}/**"): "secret/data/**" });
        rest.create_backend(name, &federated.bao.addr(), &credential, mapping).await?;
    }
    let end = Instant::now() + Duration::from_secs(7);
    let read = async |name: &str| {
        let (mut reads, path) = (0, format!("/v1/secrets/{name}/app/db"));
        while Instant::now() < end {
            let answer = rest.get(&path).await?;
            ensure!(answer.status == 200, "read {reads} of {name}: {}", answer.text);
            reads += 1;
            sleep(Duration::from_millis(10)).await;
        }
        Ok(reads)
    };
    let (renewed, again, batch) = tokio::try_join!(read("renewed"), read("again"), read("batch"))?;
    assert!(renewed > 20 && again > 20 && batch > 20, "{renewed} {again} {batch}");
    Ok(())
}

/// Configures a backend with the auth method `token` and a mapping of its own name.
async fn with_token(rest: &Rest, endpoint: &str, name: &str, token: &str, more: Value) -> Result<String> {
    let credential = format!("infra/{name}");
    rest.put_data(&credential, json!({ "token": token })).await?;
    let mapping = json!({ format!("{name}/**"): "secret/data/**" });
    let mut backend = planes::backend(name, endpoint, &credential, mapping);
    backend["config"]["auth_method"] = json!("token");
    for (field, value) in more.as_object().into_iter().flatten() {
        backend["config"][field] = value.clone();
    }
    let created = rest.post("/v1/federation/backends", backend).await?.ok()?;
    Ok(created["id"].as_str().context("id")?.to_owned())
}

/// What OpenBao knows of the tokens that were made from other tokens.
async fn children(admin: &Admin) -> Result<Vec<Value>> {
    let listed = admin.call(Method::from_bytes(b"LIST")?, "auth/token/accessors", None).await?;
    let mut children = Vec::new();
    for accessor in listed["data"]["keys"].as_array().context("keys")? {
        let asked = json!({ "accessor": accessor });
        let mut token = admin.call(Method::POST, "auth/token/lookup-accessor", Some(asked)).await?;
        if token["data"]["path"] == "auth/token/create" {
            children.push(token["data"].take());
        }
    }
    Ok(children)
}

#[tokio::test]
async fn nodes_get_a_child_of_the_configured_token_with_the_policies_of_leases() -> Result<()> {
    let federated = Federated::start().await?;
    let (rest, admin, endpoint) = (federated.planes.rest(0)?, federated.bao.client()?, federated.bao.addr());
    let parent = r#"path "auth/token/create" { capabilities = ["update"] }"#;
    admin.write_policy("parent", parent).await?;
    let parent = json!({ "policies": ["parent", "scaivault"], "ttl": "1h" });
    let parent = admin.create_token(parent).await?;
    with_token(&rest, &endpoint, "child", &parent.token, json!({ "lease_policies": ["scaivault"] })).await?;
    assert_eq!(rest.get("/v1/secrets/child/app/db").await?.status, 200);
    let of_lease = |child: &&Value| child["policies"] == json!(["default", "scaivault"]);
    assert_eq!(children(&admin).await?.iter().filter(of_lease).count(), 1);

    // What the root token makes for nodes ends, although the root token does not.
    with_token(&rest, &endpoint, "root", federated.bao.root_token(), json!({})).await?;
    assert_eq!(rest.get("/v1/secrets/root/app/db").await?.status, 200);
    for child in children(&admin).await? {
        assert!(child["ttl"].as_u64() > Some(0), "{child}");
    }
    Ok(())
}

#[tokio::test]
async fn a_token_for_a_limited_number_of_calls_is_not_used() -> Result<()> {
    let federated = Federated::start().await?;
    let (rest, admin) = (federated.planes.rest(0)?, federated.bao.client()?);
    let limited = json!({ "policies": ["scaivault"], "ttl": "1h", "num_uses": 5 });
    let limited = admin.create_token(limited).await?;
    let id = with_token(&rest, &federated.bao.addr(), "limited", &limited.token, json!({})).await?;
    assert_eq!(rest.get("/v1/secrets/limited/app/db").await?.refusal().1, "credential_unusable");
    let degraded = status_is(&rest, &id, "degraded").await?;
    assert!(degraded["next_step"].as_str().is_some_and(|step| step.contains("num_uses")), "{degraded}");
    Ok(())
}

#[tokio::test]
async fn a_token_that_never_ends_reaches_nodes_only_if_that_is_allowed() -> Result<()> {
    let federated = Federated::start().await?;
    let rest = federated.planes.rest(0)?;
    let root = federated.bao.root_token();
    let gate = Gate::open(federated.bao.socket(), "/v1/auth/token/create").await?;
    let id = with_token(&rest, &gate.addr(), "static", root, json!({})).await?;
    let path = "/v1/secrets/static/app/db";
    let refused = rest.get(path).await?;
    assert_eq!(refused.refusal(), (503, "no_lease"), "{}", refused.text);
    let degraded = status_is(&rest, &id, "degraded").await?;
    let next_step = degraded["next_step"].as_str().unwrap_or_default();
    assert!(next_step.contains("allow_static_on_nodes"), "{degraded}");
    assert!(!gate.reads_came_with(root), "no node held it");
    let allowed = json!({ "config": { "allow_static_on_nodes": true } });
    rest.patch(&format!("/v1/federation/backends/{id}"), allowed).await?.ok()?;
    read_again(&rest, path).await?;
    assert!(gate.reads_came_with(root));
    Ok(())
}

/// A way to OpenBao on which one path is forbidden, and which notes the tokens that reads come with.
pub(crate) struct Gate {
    addr: SocketAddr,
    reads: Arc<Mutex<BTreeSet<String>>>,
}

impl Gate {
    /// Opens one in front of `upstream`. It closes with the runtime of the test.
    pub(crate) async fn open(upstream: SocketAddr, forbidden: &'static str) -> Result<Gate> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let addr = listener.local_addr()?;
        let (client, reads) = (http::client(None)?, Arc::new(Mutex::new(BTreeSet::new())));
        let noted = reads.clone();
        let pass = move |request: Request| {
            let (client, noted) = (client.clone(), noted.clone());
            async move {
                let path = request.uri().path();
                if path == forbidden {
                    return refusal(StatusCode::FORBIDDEN, r#"{"errors":["permission denied"]}"#);
                }
                if path.starts_with("/v1/secret/") {
                    let token = request.headers().get("x-vault-token").and_then(|token| token.to_str().ok());
                    noted.lock().expect("no panic under it").extend(token.map(str::to_owned));
                }
                let url = format!("http://{upstream}{}", request.uri());
                let outcome = forward(&client, request, url).await;
                outcome.unwrap_or_else(|error| refusal(StatusCode::BAD_GATEWAY, &error.to_string()))
            }
        };
        let app = axum::Router::new().fallback(pass);
        tokio::spawn(async move { axum::serve(listener, app).await });
        Ok(Gate { addr, reads })
    }

    /// Its base URL.
    pub(crate) fn addr(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// The tokens that reads came with.
    pub(crate) fn tokens(&self) -> Vec<String> {
        self.reads.lock().expect("no panic under it").iter().cloned().collect()
    }

    fn reads_came_with(&self, token: &str) -> bool {
        self.tokens().iter().any(|known| known == token)
    }
}

async fn forward(client: &reqwest::Client, request: Request, url: String) -> Result<Response> {
    let (parts, body) = request.into_parts();
    let body: Bytes = to_bytes(body, 1 << 20).await?;
    let answer = client.request(parts.method, url).headers(parts.headers).body(body).send().await?;
    let mut headers = HeaderMap::new();
    if let Some(kind) = answer.headers().get("content-type") {
        headers.insert("content-type", kind.clone());
    }
    Ok((answer.status(), headers, answer.bytes().await?).into_response())
}

fn refusal(status: StatusCode, body: &str) -> Response {
    (status, [("content-type", "application/json")], body.to_owned()).into_response()
}
