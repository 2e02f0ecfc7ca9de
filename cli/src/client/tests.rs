//! The commands against a server that answers what a test tells it to.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io::Write as _;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::routing::{get, post};
use clap::Parser as _;
use scaivault_proto::admin::v1 as admin;
use scaivault_proto::federation::v1 as federation;
use scaivault_proto::secrets::v1 as secrets;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::Cli;
use crate::failure::{Exit, Failure};
use crate::output::Output;

const TOKEN: &str = "svt_test";

/// A server with the methods that a test gives it; the others are unimplemented.
#[derive(Default)]
struct Server {
    router: Router,
    /// `method principal tenant` of every call.
    calls: Arc<Mutex<Vec<String>>>,
}

impl Server {
    /// Answers `method`, e.g. `secrets.v1.SecretsService/Get`.
    fn on<Q, A>(
        self,
        method: &str,
        answer: impl Fn(Q) -> Result<A, Status> + Clone + Send + Sync + 'static,
    ) -> Self
    where
        Q: prost::Message + Default + Send + 'static,
        A: prost::Message + Default + Send + 'static,
    {
        let calls = self.calls.clone();
        let name = method.rsplit('/').next().unwrap_or(method).to_owned();
        let handler = move |request: axum::extract::Request| async move {
            calls.lock().expect("no test panicked").push(call(&name, request.headers()));
            let serve = tower::service_fn(move |request: tonic::Request<Q>| {
                let answer = answer(request.into_inner()).map(tonic::Response::new);
                async move { answer }
            });
            let codec = tonic_prost::ProstCodec::<A, Q>::default();
            Ok::<_, Infallible>(tonic::server::Grpc::new(codec).unary(serve, request).await)
        };
        Server { router: self.router.route(&format!("/scaivault.{method}"), post(handler)), ..self }
    }

    async fn start(self) -> Running {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let addr = format!("http://{}", listener.local_addr().expect("an address"));
        tokio::spawn(async move { axum::serve(listener, self.router).await });
        Running { addr, calls: self.calls }
    }
}

fn call(method: &str, headers: &http::HeaderMap) -> String {
    let header = |name: &str| headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or("-");
    format!("{method} {} {}", header("authorization"), header("x-scaivault-tenant"))
}

struct Running {
    addr: String,
    calls: Arc<Mutex<Vec<String>>>,
}

/// What a command printed.
#[derive(Debug, Default)]
struct Printed {
    out: String,
    notes: String,
}

impl Running {
    async fn run(&self, command: &str) -> Result<Printed, Failure> {
        self.run_with(&words(command), b"").await
    }

    async fn run_with(&self, command: &[&str], mut input: &[u8]) -> Result<Printed, Failure> {
        let arguments = ["scaivault", "--addr", &self.addr].into_iter().chain(command.iter().copied());
        let cli = Cli::try_parse_from(arguments).unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let crate::Command::Client(command) = cli.command else { panic!("no client command") };
        let (mut out, mut notes) = (Vec::new(), Vec::new());
        let mut output = Output {
            out: &mut out,
            notes: &mut notes,
            input: &mut input,
            format: cli.output,
            terminal: false,
            watched: false,
        };
        super::run(command, &cli.connect, TOKEN.into(), &mut output).await?;
        Ok(Printed {
            out: String::from_utf8(out).expect("UTF-8"),
            notes: String::from_utf8(notes).expect("UTF-8"),
        })
    }

    fn calls(&self) -> Vec<String> {
        self.calls.lock().expect("no test panicked").clone()
    }
}

fn words(command: &str) -> Vec<&str> {
    command.split_whitespace().collect()
}

fn told(failure: &Failure) -> String {
    let mut out = Vec::new();
    failure.tell(&mut out, false);
    String::from_utf8(out).expect("UTF-8")
}

/// A value whose order, digits and spaces must survive.
const VALUE: &str = r#"{"user": "app", "big": 123456789012345678901234567890, "a": {"b": "deep"}}"#;

fn secret(value: &[u8], kind: secrets::SecretType) -> secrets::GetResponse {
    let secret = secrets::Secret {
        path: "apps/db".to_owned(),
        version: 3,
        secret_type: kind.into(),
        value: value.to_vec().into(),
        metadata: [("owner".to_owned(), "team-a".to_owned())].into(),
        state: secrets::SecretState::Active.into(),
        source: secrets::SecretSource::Local.into(),
        ..Default::default()
    };
    secrets::GetResponse { secret: Some(secret) }
}

async fn with_secret(value: &'static [u8], kind: secrets::SecretType) -> Running {
    let answer = move |request: secrets::GetRequest| {
        assert_eq!(request.path, "apps/db");
        Ok(secret(value, kind))
    };
    Server::default().on("secrets.v1.SecretsService/Get", answer).start().await
}

#[tokio::test]
async fn get_prints_the_secret_in_every_format() {
    let server = with_secret(VALUE.as_bytes(), secrets::SecretType::Json).await;
    let out = async |command| server.run(command).await.expect(command).out;

    let table = out("get apps/db").await;
    for line in ["path:      apps/db", "metadata:  owner=team-a", "user  app", r#"a     {"b": "deep"}"#] {
        assert!(table.lines().any(|l| l == line), "{line} is not in\n{table}");
    }
    let json = out("get apps/db -o json").await;
    assert!(json.contains(&format!(r#""data": {VALUE}"#)), "{json}");
    let yaml = out("get apps/db -o yaml").await;
    assert!(yaml.contains("  big: 123456789012345678901234567890\n"), "{yaml}");
    assert_eq!(out("get apps/db -o raw").await, VALUE);
    assert_eq!(out("get apps/db --field a.b").await, "deep");
    assert_eq!(out("get apps/db --field a -o json").await, "{\"b\": \"deep\"}\n");
    assert!(server.calls().iter().all(|call| call == "Get Bearer svt_test -"));
}

#[tokio::test]
async fn a_stale_copy_is_told_beside_the_value() {
    let answer = |request: secrets::GetRequest| {
        assert_eq!((request.max_age.map(|age| age.seconds), request.min_version), (Some(0), 7));
        let mut answer = secret(b"{}", secrets::SecretType::Json);
        let copy = answer.secret.as_mut().expect("a secret");
        copy.source = secrets::SecretSource::Sync.into();
        copy.age = Some(prost_types::Duration { seconds: 1200, nanos: 5 });
        copy.stale = true;
        Ok(answer)
    };
    let server = Server::default().on("secrets.v1.SecretsService/Get", answer).start().await;
    let printed = server.run("get apps/db --max-age 0s --min-version 7 -o json").await.expect("a copy");
    let json: serde_json::Value = serde_json::from_str(&printed.out).expect("JSON");
    assert_eq!(
        (&json["source"], &json["age"], &json["stale"]),
        (&"sync".into(), &"20m".into(), &true.into())
    );
    assert!(printed.notes.contains("stale") && printed.notes.contains("20m"), "{}", printed.notes);
}

#[tokio::test]
async fn binary_values_are_base64_unless_raw() {
    let server = with_secret(b"\x00\x01", secrets::SecretType::Binary).await;
    let json = server.run("get apps/db -o json").await.expect("JSON").out;
    assert!(json.contains(r#""encoding": "base64""#) && json.contains(r#""value":"AAE=""#), "{json}");
    assert_eq!(server.run("get apps/db -o raw").await.expect("raw").out, "\x00\x01");
}

#[tokio::test]
async fn a_missing_field_names_those_that_exist() {
    let server = with_secret(VALUE.as_bytes(), secrets::SecretType::Json).await;
    let failure = server.run("get apps/db --field none").await.expect_err("no such field");
    assert!(told(&failure).contains("next: its fields are: user, big, a"), "{}", told(&failure));
    assert_eq!(failure.exit(), Exit::Server);
}

#[tokio::test]
async fn a_refusal_of_the_server_is_told_whole() {
    let refuse = |_: secrets::GetRequest| {
        let step = HashMap::from([("next_step".to_owned(), "ask for a policy".to_owned())]);
        let mut details = ErrorDetails::with_error_info("PERMISSION_DENIED", "scaivault", step);
        details.set_request_info("req_7", "");
        Err::<secrets::GetResponse, _>(Status::with_error_details(
            Code::PermissionDenied,
            "no policy",
            details,
        ))
    };
    let server = Server::default().on("secrets.v1.SecretsService/Get", refuse).start().await;
    let failure = server.run("get apps/db").await.expect_err("refused");
    assert_eq!(
        told(&failure),
        "error: no policy (code: permission_denied, request id: req_7)\nnext: ask for a policy\n"
    );
}

/// A server that keeps what was put.
async fn with_put() -> (Running, Arc<Mutex<Option<secrets::PutRequest>>>) {
    let kept = Arc::new(Mutex::new(None));
    let keep = kept.clone();
    let answer = move |request: secrets::PutRequest| {
        *keep.lock().expect("no test panicked") = Some(request);
        Ok(secrets::PutResponse { version: 1, create_time: None })
    };
    (Server::default().on("secrets.v1.SecretsService/Put", answer).start().await, kept)
}

#[tokio::test]
async fn put_takes_values_from_wherever_they_stand() {
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    file.write_all(b"in file").expect("written");
    let at_file = format!("key=@{}", file.path().display());
    let file = file.path().to_str().expect("UTF-8");
    let (server, kept) = with_put().await;
    for (arguments, input, value, kind) in [
        (vec!["b=1", "a=x=y"], "", r#"{"b":"1","a":"x=y"}"#, secrets::SecretType::Json),
        (vec![&at_file, "p=-"], "typed", r#"{"key":"in file","p":"typed"}"#, secrets::SecretType::Json),
        (vec!["--data", VALUE], "", VALUE, secrets::SecretType::Json),
        (vec!["--data", "-"], r#"{"x":1}"#, r#"{"x":1}"#, secrets::SecretType::Json),
        (vec!["--text", "-----BEGIN KEY"], "", "-----BEGIN KEY", secrets::SecretType::Text),
        (vec!["--binary-file", file], "", "in file", secrets::SecretType::Binary),
        (vec!["--binary-file", file, "--type", "text"], "", "in file", secrets::SecretType::Text),
    ] {
        let command: Vec<_> = ["put", "apps/db", "--create-only"].into_iter().chain(arguments).collect();
        let printed = server.run_with(&command, input.as_bytes()).await.expect("written");
        let request = kept.lock().expect("no test panicked").take().expect("a request");
        assert_eq!(std::str::from_utf8(&request.value), Ok(value), "{command:?}");
        assert_eq!((request.secret_type(), request.expected_version), (kind, Some(0)), "{command:?}");
        assert_eq!(printed.out, "path:     apps/db\nversion:  1\n");
    }
}

#[tokio::test]
async fn a_bad_value_is_refused_before_it_is_sent() {
    let (server, kept) = with_put().await;
    for command in [
        &["put", "a", "--data", "[1]"][..],
        &["put", "a", "--data", r#"{"a":1,"a":2}"#],
        &["put", "a", "k=1", "k=2"],
        &["put", "a", "j=-", "k=-"],
        &["put", "a", "--text", "@/nonexistent/file"],
    ] {
        let failure = server.run_with(command, b"").await.expect_err("refused");
        assert_eq!(failure.exit(), Exit::Usage, "{command:?}");
    }
    assert!(kept.lock().expect("no test panicked").is_none());
}

#[tokio::test]
async fn list_reads_every_page() {
    let answer = |request: secrets::ListRequest| {
        assert_eq!(request.folder, "apps/");
        Ok(match &*request.page_token {
            "" => secrets::ListResponse { keys: vec!["a".into(), "b/".into()], next_page_token: "2".into() },
            _ => secrets::ListResponse { keys: vec!["c".into()], next_page_token: String::new() },
        })
    };
    let server = Server::default().on("secrets.v1.SecretsService/List", answer).start().await;
    assert_eq!(server.run("list apps").await.expect("a list").out, "a\nb/\nc\n");
    let json: serde_json::Value =
        serde_json::from_str(&server.run("list apps/ -o json").await.expect("a list").out).expect("JSON");
    assert_eq!(json, serde_json::json!({ "keys": ["a", "b/", "c"] }));
}

const ID: &str = "fed_aaaaaaaaaaaaaaaa";

fn backend() -> federation::Backend {
    federation::Backend {
        id: ID.to_owned(),
        name: "vault-prod".to_owned(),
        config: Some(federation::backend::Config::HashicorpVault(federation::HashicorpVaultConfig {
            endpoint: "https://vault:8200".to_owned(),
            auth_method: "approle".to_owned(),
            auth_config_path: "infra/vault".to_owned(),
            ..Default::default()
        })),
        rules: vec![
            federation::PathRule {
                pattern: "e/x/**".to_owned(),
                template: "secret/x/**".to_owned(),
                mode: federation::Mode::Sync.into(),
                ..Default::default()
            },
            federation::PathRule {
                pattern: "e/**".to_owned(),
                template: "secret/**".to_owned(),
                ..Default::default()
            },
        ],
        sync_interval: Some(prost_types::Duration { seconds: 900, nanos: 0 }),
        write_policy: federation::WritePolicy::Disabled.into(),
        history_depth: 10,
        mode: federation::Mode::Proxy.into(),
        etag: "7".to_owned(),
        ..Default::default()
    }
}

fn check(name: &str, outcome: &str, detail: &str, next_step: &str) -> federation::BackendCheck {
    federation::BackendCheck {
        name: name.to_owned(),
        outcome: outcome.to_owned(),
        detail: detail.to_owned(),
        next_step: next_step.to_owned(),
        latency_ms: (outcome != "skipped").then_some(12),
    }
}

fn passed_test() -> federation::BackendTest {
    let checks = vec![
        check("login", "ok", "the store takes the login", ""),
        check("list", "warning", "0 names seen", "compare the templates"),
    ];
    federation::BackendTest { passed: true, checks }
}

fn failed_test() -> federation::BackendTest {
    let checks = vec![
        check("login", "failed", "the backend refused the login", "check the credential"),
        check("list", "skipped", "`login` failed", ""),
    ];
    federation::BackendTest { passed: false, checks }
}

/// A server with one backend, that keeps what was asked to be stored.
async fn with_backend() -> (Running, Arc<Mutex<Option<federation::UpdateBackendRequest>>>) {
    let kept = Arc::new(Mutex::new(None));
    let (created, updated) = (kept.clone(), kept.clone());
    let server = Server::default()
        .on("federation.v1.FederationService/ListBackends", |_: federation::ListBackendsRequest| {
            Ok(federation::ListBackendsResponse { backends: vec![backend()], next_page_token: String::new() })
        })
        .on("federation.v1.FederationService/GetBackend", |request: federation::GetBackendRequest| {
            assert_eq!(request.id, ID);
            Ok(federation::GetBackendResponse { backend: Some(backend()) })
        })
        .on(
            "federation.v1.FederationService/CreateBackend",
            move |request: federation::CreateBackendRequest| {
                let backend = request.backend.map(|sent| federation::Backend { id: ID.to_owned(), ..sent });
                *created.lock().expect("no test panicked") = Some(federation::UpdateBackendRequest {
                    backend: backend.clone(),
                    adopt: request.adopt,
                    validate_only: request.validate_only,
                    ..Default::default()
                });
                let test = request.validate_only.then(failed_test);
                Ok(federation::CreateBackendResponse { backend, test })
            },
        )
        .on(
            "federation.v1.FederationService/UpdateBackend",
            move |request: federation::UpdateBackendRequest| {
                let backend = request.backend.clone();
                let test = request.validate_only.then(passed_test);
                *updated.lock().expect("no test panicked") = Some(request);
                Ok(federation::UpdateBackendResponse { backend, test })
            },
        )
        .on("federation.v1.FederationService/TestBackend", |request: federation::TestBackendRequest| {
            assert_eq!(request.id, ID);
            Ok(federation::TestBackendResponse { test: Some(passed_test()) })
        })
        .on(
            "federation.v1.FederationService/GetBackendStatus",
            |request: federation::GetBackendStatusRequest| {
                Ok(federation::GetBackendStatusResponse {
                    id: request.id,
                    name: "vault-prod".to_owned(),
                    status: federation::BackendHealth::Unreachable.into(),
                    reason: "it does not answer".to_owned(),
                    next_step: "check the network".to_owned(),
                    connection: Some(federation::Connection {
                        status: "disconnected".to_owned(),
                        latency_ms: Some(15),
                        ..Default::default()
                    }),
                    nodes: vec![federation::NodeState { name: "edge-1".to_owned(), ..Default::default() }],
                    ..Default::default()
                })
            },
        )
        .start()
        .await;
    (server, kept)
}

#[tokio::test]
async fn a_backend_is_added_from_options_in_their_order() {
    let (server, kept) = with_backend().await;
    let command = "backend add vault-prod --type hashicorp-vault --endpoint https://vault:8200 --auth-method approle \
                   --auth-config-path infra/vault --no-tls-verify --timeout 2s --map z/**=kv/** --map a/*=kv/x/* --adopt";
    server.run(command).await.expect("added");
    let sent = kept.lock().expect("no test panicked").take().expect("a request");
    let backend = sent.backend.expect("a backend");
    let rules: Vec<_> = backend.rules.iter().map(|rule| (&*rule.pattern, &*rule.template)).collect();
    assert_eq!(rules, [("z/**", "kv/**"), ("a/*", "kv/x/*")]);
    assert_eq!((backend.mode(), sent.adopt), (federation::Mode::Proxy, true));
    assert_eq!(backend.timeout.map(|timeout| timeout.seconds), Some(2));
    let Some(federation::backend::Config::HashicorpVault(config)) = backend.config else {
        panic!("no config")
    };
    assert_eq!(config.tls_verify, Some(false));
}

#[tokio::test]
async fn a_stored_backend_is_tested_by_its_name() {
    let (server, _) = with_backend().await;
    let table = server.run("backend test vault-prod").await.expect("passed").out;
    for line in [
        "CHECK  OUTCOME  TOOK  FOUND",
        "login  ok       12ms  the store takes the login",
        "list   warning  12ms  0 names seen",
        "list  compare the templates",
    ] {
        assert!(table.lines().any(|l| l == line), "{line} is not in\n{table}");
    }
    let json = server.run("backend test vault-prod -o json").await.expect("passed").out;
    let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!((&json["passed"], &json["checks"][0]["outcome"]), (&true.into(), &"ok".into()));
    let yaml = server.run(&format!("backend test {ID} -o yaml")).await.expect("passed").out;
    assert!(yaml.starts_with("passed: true\n"), "{yaml}");
}

#[tokio::test]
async fn a_configuration_that_is_not_stored_is_tested_from_a_file_and_from_options() {
    let (server, kept) = with_backend().await;
    let document = serde_json::json!({
        "name": "vault-prod", "type": "hashicorp-vault", "mode": "proxy", "path_mapping": {"a/**": "kv/**"},
        "config": {"endpoint": "https://v", "auth_method": "token", "auth_config_path": "c"},
    });
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    file.write_all(document.to_string().as_bytes()).expect("written");
    let file = file.path().to_str().expect("UTF-8");
    let options = words(
        "backend add vault-prod --type hashicorp-vault --endpoint https://v --auth-method token \
         --auth-config-path c --map a/**=kv/** --validate-only",
    );
    let from_file = vec!["backend", "test", "--file", file];
    for command in [&from_file, &vec!["backend", "add", "--validate-only", "--file", file], &options] {
        let failure = server.run_with(command, b"").await.expect_err("a check failed");
        assert_eq!(failure.exit(), Exit::Server, "{command:?}");
        assert_eq!(told(&failure), "error: the test failed: `login`\nnext: check the credential\n");
        assert!(kept.lock().expect("no test panicked").take().expect("a request").validate_only);
    }
}

#[tokio::test]
async fn a_change_is_tested_before_it_is_made() {
    let (server, kept) = with_backend().await;
    let command = "backend set vault-prod --namespace acme --validate-only -o json";
    let printed = server.run(command).await.expect("passed");
    assert!(printed.notes.contains("nothing was stored"), "{printed:?}");
    let json: serde_json::Value = serde_json::from_str(&printed.out).expect("JSON");
    assert_eq!(
        (&json["test"]["passed"], &json["backend"]["config"]["namespace"]),
        (&true.into(), &"acme".into())
    );
    let sent = kept.lock().expect("no test panicked").take().expect("a request");
    assert!(sent.validate_only);
    assert_eq!(sent.update_mask.map(|mask| mask.paths), Some(vec!["hashicorp_vault".into()]));
}

#[tokio::test]
async fn every_missing_option_is_named() {
    let (server, _) = with_backend().await;
    let failure = server.run("backend add vault-prod --type hashicorp-vault").await.expect_err("incomplete");
    let told = told(&failure);
    assert!(told.contains("--endpoint, --auth-method, --auth-config-path, --map"), "{told}");
    assert_eq!(failure.exit(), Exit::Usage);
}

#[tokio::test]
async fn set_sends_only_what_changes_with_the_etag_that_was_read() {
    let (server, kept) = with_backend().await;
    server.run("backend set vault-prod --namespace acme --enabled=false").await.expect("changed");
    let sent = kept.lock().expect("no test panicked").take().expect("a request");
    assert_eq!(
        sent.update_mask.map(|mask| mask.paths),
        Some(vec!["hashicorp_vault".into(), "enabled".into()])
    );
    let backend = sent.backend.expect("a backend");
    assert_eq!((&*backend.id, &*backend.etag), (ID, "7"));

    let printed = server.run(&format!("backend set {ID} --mode proxy")).await.expect("nothing to do");
    assert!(printed.notes.contains("nothing to change"), "{printed:?}");
    assert!(kept.lock().expect("no test panicked").is_none());
}

#[tokio::test]
async fn set_of_another_type_sends_nothing_of_the_old_store() {
    let (server, kept) = with_backend().await;
    let command = "backend set vault-prod --type aws-secrets-manager --region eu-central-1 --credentials-path infra/aws";
    server.run(command).await.expect("changed");
    let sent = kept.lock().expect("no test panicked").take().expect("a request");
    let paths = sent.update_mask.expect("a mask").paths;
    assert_eq!(paths, ["aws_secrets_manager", "history_depth"]);
    let backend = sent.backend.expect("a backend");
    assert_eq!(backend.history_depth, 0, "the default of the new store");
    let Some(federation::backend::Config::AwsSecretsManager(config)) = backend.config else {
        panic!("no config")
    };
    assert_eq!(
        (&*config.region, &*config.credentials_path, &*config.endpoint),
        ("eu-central-1", "infra/aws", "")
    );
}

#[tokio::test]
async fn a_backend_is_added_in_mode_sync_with_rules_that_say_otherwise() {
    let (server, kept) = with_backend().await;
    let command = "backend add vault-prod --type hashicorp-vault --endpoint https://vault:8200 --auth-method approle \
                   --auth-config-path infra/vault --mode sync --sync-interval 15m --prefetch --max-staleness 1m \
                   --history-depth 3 --map a/**=kv/a/**,mode=proxy --map b/**=kv/b/**,sync-interval=30s --map c/**=kv/**";
    let printed = server.run(command).await.expect("added");
    let sent = kept.lock().expect("no test panicked").take().expect("a request").backend.expect("a backend");
    assert_eq!((sent.mode(), sent.prefetch, sent.history_depth), (federation::Mode::Sync, true, 3));
    let seconds = |span: Option<prost_types::Duration>| span.map(|span| span.seconds);
    assert_eq!((seconds(sent.sync_interval), seconds(sent.max_staleness)), (Some(900), Some(60)));
    assert_eq!(sent.rules[0].mode(), federation::Mode::Proxy);
    assert_eq!(seconds(sent.rules[1].sync_interval), Some(30));
    assert_eq!(sent.rules[2].mode(), federation::Mode::Unspecified);
    assert!(printed.out.contains("b/**     kv/b/**   sync-interval=30s"), "{}", printed.out);
}

#[tokio::test]
async fn set_keeps_what_rules_override() {
    let (server, kept) = with_backend().await;
    server.run("backend set vault-prod --sync-interval 30m --force").await.expect("changed");
    let sent = kept.lock().expect("no test panicked").take().expect("a request");
    assert_eq!(sent.update_mask.map(|mask| mask.paths), Some(vec!["sync_interval".into()]));
    assert!(sent.force);
    assert_eq!(sent.backend.expect("a backend").rules, backend().rules);
}

#[tokio::test]
async fn a_backend_is_removed_with_or_without_its_copies() {
    for (command, copies) in [
        (format!("backend remove {ID}"), federation::CopiesPolicy::Detach),
        (format!("backend remove {ID} --purge"), federation::CopiesPolicy::Purge),
    ] {
        let answer = move |request: federation::DeleteBackendRequest| {
            assert_eq!(request.copies(), copies);
            Ok(federation::DeleteBackendResponse::default())
        };
        let server = Server::default().on("federation.v1.FederationService/DeleteBackend", answer);
        server.start().await.run(&command).await.expect("removed");
    }
}

const RUN: &str = "run_0000019b7709c4fa0123456789abcdef";

fn run(outcome: &str) -> federation::SyncRun {
    let time = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
    federation::SyncRun {
        run_id: RUN.to_owned(),
        backend_id: ID.to_owned(),
        trigger: "manual".to_owned(),
        start_time: time(1_767_225_600),
        end_time: time(1_767_225_603),
        outcome: outcome.to_owned(),
        counts: Some(federation::SyncCounts { listed: 20, created: 3, skipped: 2, ..Default::default() }),
        calls: [("list".to_owned(), 1)].into(),
        ..Default::default()
    }
}

fn under_way() -> federation::SyncRun {
    let progress = federation::SyncProgress { phase: "applying".to_owned(), listed: 20, done: 5, total: 19 };
    federation::SyncRun { end_time: None, progress: Some(progress), ..run("") }
}

/// A server whose syncs end as `outcome`.
async fn with_sync(outcome: federation::SyncRun) -> Running {
    let left_out = |path: &str, reason: &str| federation::SkippedPath {
        path: path.to_owned(),
        remote_name: "kv/a b".to_owned(),
        reason: reason.to_owned(),
        detail: String::new(),
    };
    Server::default()
        .on("federation.v1.FederationService/SyncBackend", |request: federation::SyncBackendRequest| {
            assert!(request.wait.is_none() && ["", RUN].contains(&&*request.allow_deletes));
            Ok(federation::SyncBackendResponse { run_id: RUN.to_owned(), run: Some(under_way()) })
        })
        .on("federation.v1.FederationService/GetSync", move |request: federation::GetSyncRequest| {
            let mut page = federation::GetSyncResponse { run: Some(outcome.clone()), ..Default::default() };
            match (request.page_size, &*request.page_token) {
                (1, _) => {}
                (_, "") => {
                    page.skipped = vec![left_out("", "charset")];
                    page.next_page_token = "2".to_owned();
                }
                _ => page.failed = vec![left_out("e/a", "transient")],
            }
            Ok(page)
        })
        .on("federation.v1.FederationService/ListSyncs", |_: federation::ListSyncsRequest| {
            let syncs = vec![under_way(), run("complete")];
            Ok(federation::ListSyncsResponse { syncs, next_page_token: String::new() })
        })
        .on("federation.v1.FederationService/CancelSync", |request: federation::CancelSyncRequest| {
            assert_eq!(request.run_id, RUN);
            Ok(federation::CancelSyncResponse { run: Some(run("cancelled")) })
        })
        .start()
        .await
}

#[tokio::test]
async fn a_sync_is_started_and_left_alone() {
    let server = with_sync(run("complete")).await;
    let command = format!("backend sync {ID} --allow-deletes {RUN}");
    let printed = server.run(&command).await.expect("started");
    assert!(printed.out.contains("progress:  applying, 5 of 19"), "{}", printed.out);
    assert!(printed.notes.contains(&format!("sync-report {ID} {RUN}")), "{}", printed.notes);
    assert_eq!(server.calls().len(), 1);
}

#[tokio::test]
async fn a_sync_that_is_waited_for_exits_as_it_ended() {
    let held = federation::HeldBack { deletions: 4, known: 12 };
    let failed = federation::SyncRun { message: "the login failed".to_owned(), ..run("failed") };
    for (outcome, exit, next) in [
        (run("complete"), Exit::Ok, ""),
        (run("partial"), Exit::Differences, "sync-report"),
        (
            federation::SyncRun { held_back: Some(held), ..run("partial") },
            Exit::Differences,
            "--allow-deletes run_",
        ),
        (failed, Exit::Server, "the login failed"),
        (run("cancelled"), Exit::Server, "starts another"),
    ] {
        let server = with_sync(outcome.clone()).await;
        match server.run(&format!("backend sync {ID} --wait")).await {
            Ok(printed) => {
                assert_eq!(exit, Exit::Ok, "{outcome:?}");
                assert!(printed.out.contains("paths:    20 listed, 3 created, 2 skipped"), "{}", printed.out);
            }
            Err(failure) => {
                assert_eq!(failure.exit(), exit, "{outcome:?}");
                assert!(told(&failure).contains(next), "{}", told(&failure));
            }
        }
    }
}

#[tokio::test]
async fn a_wait_ends_when_its_time_is_up() {
    let server = with_sync(under_way()).await;
    let failure = server.run(&format!("backend sync {ID} --wait=50ms")).await.expect_err("too slow");
    assert!(told(&failure).contains("still running"), "{}", told(&failure));
    assert_eq!(failure.exit(), Exit::Server);
}

#[tokio::test]
async fn a_report_has_every_page_of_what_was_left_out() {
    let server = with_sync(run("partial")).await;
    let json = server.run(&format!("backend sync-report {ID} -o json")).await.expect("a report").out;
    let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(
        (&json["run_id"], &json["outcome"], &json["listed"]),
        (&RUN.into(), &"partial".into(), &20.into())
    );
    assert_eq!((&json["skipped"][0]["path"], &json["skipped"][0]["reason"]), (&().into(), &"charset".into()));
    assert_eq!(json["failed"][0]["path"], "e/a");
    let table = server.run(&format!("backend sync-report {ID} {RUN}")).await.expect("a report").out;
    for line in
        ["took:     3s", "skipped   -     kv/a b       charset", "failed    e/a   kv/a b       transient"]
    {
        assert!(table.lines().any(|l| l == line), "{line} is not in\n{table}");
    }
}

#[tokio::test]
async fn runs_are_listed_and_the_latest_is_ended() {
    let server = with_sync(run("complete")).await;
    let table = server.run(&format!("backend syncs {ID}")).await.expect("runs").out;
    let outcomes: Vec<_> = table.lines().filter_map(|line| line.split_whitespace().nth(3)).collect();
    assert_eq!(outcomes, ["TOOK", "running", "3s"], "{table}");
    let printed = server.run(&format!("backend sync-cancel {ID}")).await.expect("ended").out;
    assert!(printed.contains("outcome:  cancelled"), "{printed}");
}

#[tokio::test]
async fn a_status_says_how_the_sync_stands_and_what_to_do() {
    let answer = |request: federation::GetBackendStatusRequest| {
        let sync = federation::SyncStatus {
            secrets_synced: 127,
            last_outcome: "partial".to_owned(),
            oldest_value_age: Some(prost_types::Duration { seconds: 90, nanos: 7 }),
            running: Some(under_way()),
            skipped: 2,
            held_back_run: RUN.to_owned(),
            ..Default::default()
        };
        Ok(federation::GetBackendStatusResponse {
            id: request.id,
            name: "vault-prod".to_owned(),
            sync: Some(sync),
            call_budget: Some(federation::CallBudget {
                quotas: vec![federation::QuotaBudget {
                    quota: "lists".to_owned(),
                    per_second: 90.0,
                    burst: 10.0,
                    remaining: 2.0,
                }],
                concurrency: 8,
                max_concurrency: 64,
                reason: "slowed down by the backend to 8 calls at once".to_owned(),
                ..Default::default()
            }),
            ..Default::default()
        })
    };
    let server =
        Server::default().on("federation.v1.FederationService/GetBackendStatus", answer).start().await;
    let text = server.run(&format!("backend status {ID}")).await.expect("a status").out;
    for part in [
        "127, the oldest compared 1m30s ago",
        &format!("{RUN}: applying, 5 of 19"),
        "2; `scaivault backend sync-report vault-prod` says why",
        &format!("`scaivault backend sync vault-prod --allow-deletes {RUN}`"),
        "8 of 64: slowed down by the backend to 8 calls at once",
        "lists 90/s, 2 now",
    ] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
    let json = server.run(&format!("backend status {ID} -o json")).await.expect("a status").out;
    let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!((&json["last_sync"], &json["oldest_value_age_s"]), (&().into(), &90.into()));
    assert_eq!(json["running"]["progress"]["done"], 5);
    assert_eq!(
        (&json["call_budget"]["concurrency"], &json["call_budget"]["throttled_until"]),
        (&8.into(), &().into())
    );
}

#[tokio::test]
async fn a_status_has_the_fields_of_the_reference() {
    let (server, _) = with_backend().await;
    let out = server.run("backend status vault-prod -o json").await.expect("a status").out;
    let json: serde_json::Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!((&json["id"], &json["status"]), (&ID.into(), &"unreachable".into()));
    assert_eq!(json["connection"]["latency_ms"], 15);
    let table = server.run("backend status vault-prod").await.expect("a status").out;
    assert!(table.contains("next:        check the network"), "{table}");
    assert!(table.contains("edge-1  no"), "{table}");
}

#[tokio::test]
async fn an_unknown_name_is_no_backend() {
    let (server, _) = with_backend().await;
    let failure = server.run("backend status other").await.expect_err("unknown");
    assert!(told(&failure).contains("scaivault backend list"), "{}", told(&failure));
}

#[tokio::test]
async fn a_join_token_stands_alone_on_standard_output() {
    let answer = |request: admin::CreateNodeRequest| {
        assert_eq!(request.tenants, ["acme", "beta"]);
        let node = admin::Node { name: request.name, tenants: request.tenants, ..Default::default() };
        Ok(admin::CreateNodeResponse { join_token: "join_1".to_owned(), node: Some(node) })
    };
    let server = Server::default().on("admin.v1.AdminService/CreateNode", answer).start().await;
    let printed = server.run("node add edge-1 --tenant acme,beta --as-tenant ops").await.expect("invited");
    assert_eq!(printed.out, "join_1\n");
    assert!(!printed.notes.contains("join_1"));
    assert_eq!(server.calls(), ["CreateNode Bearer svt_test ops"]);
}

#[tokio::test]
async fn a_new_token_stands_alone_on_standard_output() {
    let answer = |request: admin::CreateTokenRequest| {
        assert_eq!(request.scopes, ["secrets:read", "secrets:write"]);
        assert_eq!(request.ttl.map(|ttl| ttl.seconds), Some(0));
        let info = admin::Token { accessor: "acc".to_owned(), ..Default::default() };
        Ok(admin::CreateTokenResponse { token: "svt_new".to_owned(), info: Some(info) })
    };
    let server = Server::default().on("admin.v1.AdminService/CreateToken", answer).start().await;
    let printed = server
        .run("token create --subject ci --scope secrets:read,secrets:write --policy apps --no-expiry")
        .await
        .expect("created");
    assert_eq!((&*printed.out, &*printed.notes), ("svt_new\n", "accessor acc, expires never\n"));
}

#[tokio::test]
async fn a_policy_is_put_from_rules_or_from_what_get_printed() {
    let answer = |request: admin::PutPolicyRequest| Ok(admin::PutPolicyResponse { policy: request.policy });
    let server = Server::default().on("admin.v1.AdminService/PutPolicy", answer).start().await;
    let rules = [
        "policy",
        "put",
        "apps",
        "--rule",
        "allow read,list apps/**",
        "--rule",
        "deny read apps/x",
        "-o",
        "json",
    ];
    let json = server.run_with(&rules, b"").await.expect("put").out;
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    file.write_all(json.as_bytes()).expect("written");
    let again = format!("policy put apps --file {} -o json", file.path().display());
    assert_eq!(server.run(&again).await.expect("put again").out, json);
    let other = format!("policy put other --file {}", file.path().display());
    assert_eq!(server.run(&other).await.expect_err("another name").exit(), Exit::Usage);
}

#[tokio::test]
async fn the_trail_is_printed_in_the_order_of_time_whoever_shipped_it_first() {
    let answer = |request: admin::QueryAuditRequest| {
        let row = |path: &str, nanos: i32| admin::AuditRow {
            path: path.to_owned(),
            time: Some(prost_types::Timestamp { seconds: 1_767_225_600, nanos }),
            ..Default::default()
        };
        let late = vec![row("a", 0), row("d", 486_000_000), row("b", 445_000_000), row("c", 472_000_000)];
        let rows = if request.page_token.is_empty() { late } else { vec![] };
        Ok(admin::QueryAuditResponse { rows, next_page_token: "2".to_owned() })
    };
    let server = Server::default().on("admin.v1.AdminService/QueryAudit", answer).start().await;
    for (command, expected) in
        [("audit tail -n 3", vec!["b", "c", "d"]), ("audit query", vec!["a", "b", "c", "d"])]
    {
        let out = server.run(&format!("{command} -o json")).await.expect("rows").out;
        let rows: Vec<serde_json::Value> = match serde_json::from_str::<serde_json::Value>(&out) {
            Ok(document) if document["rows"].is_array() => {
                document["rows"].as_array().cloned().unwrap_or_default()
            }
            _ => out.lines().map(|line| serde_json::from_str(line).expect("one JSON a line")).collect(),
        };
        let paths: Vec<_> = rows.iter().map(|row| row["path"].as_str().unwrap_or_default()).collect();
        assert_eq!(paths, expected, "{command}");
    }
}

#[tokio::test]
async fn tail_prints_the_last_rows_of_every_page() {
    let answer = |request: admin::QueryAuditRequest| {
        assert!(request.start_time.is_some());
        let row = |path: &str| admin::AuditRow { path: path.to_owned(), ..Default::default() };
        let (rows, next) = match &*request.page_token {
            "" => (vec![row("a"), row("b")], "2"),
            // Nothing of this page fits, yet the trail goes on.
            "2" => (vec![], "3"),
            "3" => (vec![row("c")], "4"),
            _ => (vec![], "4"),
        };
        Ok(admin::QueryAuditResponse { rows, next_page_token: next.to_owned() })
    };
    let server = Server::default().on("admin.v1.AdminService/QueryAudit", answer).start().await;
    let out = server.run("audit tail -n 2 -o json").await.expect("rows").out;
    let paths: Vec<_> = out
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).expect("one JSON a line")["path"].clone())
        .collect();
    assert_eq!(paths, ["b", "c"]);
}

#[tokio::test]
async fn events_of_one_backend_are_cloud_events() {
    let answer = |request: federation::ListEventsRequest| {
        let event = |id: &str, backend: &str| federation::Event {
            id: id.to_owned(),
            r#type: "federation.backend.recovered".to_owned(),
            source: format!("/v1/federation/backends/{backend}"),
            data: r#"{"since":"2026-01-01T00:00:00Z"}"#.to_owned(),
            ..Default::default()
        };
        let events = if request.page_token.is_empty() {
            vec![event("1", ID), event("2", "fed_other")]
        } else {
            vec![]
        };
        Ok(federation::ListEventsResponse { events, next_page_token: "end".to_owned() })
    };
    let server = Server::default().on("federation.v1.FederationService/ListEvents", answer).start().await;
    let out = server.run(&format!("backend events {ID} -o json")).await.expect("events").out;
    let json: serde_json::Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(json["events"].as_array().map(Vec::len), Some(1));
    assert_eq!(
        (&json["events"][0]["specversion"], &json["events"][0]["data"]["since"]),
        (&"1.0".into(), &"2026-01-01T00:00:00Z".into())
    );
}

#[tokio::test]
async fn health_is_what_readyz_answers() {
    use axum::http::StatusCode;
    for (status, healthy) in [(StatusCode::OK, true), (StatusCode::SERVICE_UNAVAILABLE, false)] {
        let router = Router::new().route("/readyz", get(move || async move { status }));
        let server = Server { router, ..Default::default() }.start().await;
        assert_eq!(server.run("health").await.is_ok(), healthy);
    }
}

#[tokio::test]
async fn a_server_is_trusted_by_the_ca_that_was_named() {
    use tonic::transport::{Identity, Server as TlsServer, ServerTlsConfig, server::TcpIncoming};
    let key = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    let identity = Identity::from_pem(key.cert.pem(), key.signing_key.serialize_pem());
    let router = Router::new().route("/readyz", get(async || "ok"));
    let incoming = TcpIncoming::bind("127.0.0.1:0".parse().expect("an address")).expect("a port");
    let addr = format!("https://localhost:{}", incoming.local_addr().expect("an address").port());
    let server = TlsServer::builder()
        .tls_config(ServerTlsConfig::new().identity(identity))
        .expect("TLS")
        .add_routes(tonic::service::Routes::from(router));
    tokio::spawn(server.serve_with_incoming(incoming));

    let server = Running { addr, calls: Arc::default() };
    let mut ca = tempfile::NamedTempFile::new().expect("a file");
    ca.write_all(key.cert.pem().as_bytes()).expect("written");
    server.run(&format!("--ca-cert {} health", ca.path().display())).await.expect("trusted");

    let other = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    std::fs::write(ca.path(), other.cert.pem()).expect("written");
    let failure =
        server.run(&format!("--ca-cert {} health", ca.path().display())).await.expect_err("another CA");
    assert!(told(&failure).contains("next: set SCAIVAULT_CACERT"), "{}", told(&failure));
}

#[tokio::test]
async fn raw_is_for_values_only() {
    let (server, _) = with_put().await;
    let failure = server.run("put a k=v -o raw").await.expect_err("no value to print");
    assert_eq!((failure.exit(), server.calls().len()), (Exit::Usage, 0));
}

#[test]
fn what_cannot_be_meant_is_a_usage_error() {
    for command in [
        "get /a",
        "get a --version 0",
        "put a",
        "put a k=v --data {}",
        "put a --text x --if-version 1 --create-only",
        "backend add",
        "backend add x --file f",
        "backend add --file f --endpoint e",
        "backend add x --type etcd",
        "backend add x --mode both",
        "backend add x --map a/**=b/**,mode=both",
        "backend add x --history-depth 0",
        "backend add x --prefetch=maybe",
        "backend sync x --allow-deletes 7",
        "backend sync x --wait=soon",
        "backend sync-report x 7",
        "get a --max-age 5",
        "get a --min-version 0",
        "token create --subject x --scope everything",
        "token revoke",
        "token renew --ttl -5m",
        "policy put p",
        "node add n",
        "audit query --since yesterday",
        "--as-tenant UPPER list",
    ] {
        let parsed = Cli::try_parse_from(std::iter::once("scaivault").chain(command.split_whitespace()));
        assert!(parsed.is_err(), "{command}");
    }
}
