//! The numbered steps: from an OpenBao with secrets to an application that reads them through ScaiVault; [`clouds`] goes
//! on with the other stores.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use reqwest::Method;
use scaivault_domain::backend::KvVersion;
use scaivault_proto::secrets::v1::secrets_service_client::SecretsServiceClient;
use scaivault_proto::secrets::v1::{GetRequest, SecretSource};
use scaivault_tests::planes::{Answer, Authenticated, Bearer, Rest};
use scaivault_tests::servers::openbao::{AppRole, OpenBao};
use scaivault_tests::wait;
use secrecy::ExposeSecret as _;
use serde_json::{Value, json};
use tonic::transport::Endpoint;

use crate::clouds::{self, Cloud};
use crate::stage::{Stage, is_usual};
use crate::transcript::Transcript;

/// Where the credential lies in ScaiVault.
const CREDENTIAL: &str = "infra/hashicorp/approle";
/// The secret that is shown.
pub(crate) const SECRET: &str = "external/hashicorp/app/db";
/// The same secret as a copy.
pub(crate) const COPIED: &str = "external/copy/app/db";
/// The backends, in the API.
const BACKENDS: &str = "/v1/federation/backends";

/// What the rest of the demo needs to know.
pub(crate) struct Demo {
    /// The URL of the node.
    pub(crate) address: String,
    /// The operator's token.
    pub(crate) token: String,
    /// The id of the backend that is proxied.
    pub(crate) backend: String,
    /// The id of the one that is copied.
    pub(crate) copy: String,
    /// The run that made the copies.
    pub(crate) run: String,
    /// The other stores, as far as they are there.
    pub(crate) clouds: Vec<Cloud>,
}

/// A gRPC client of the secrets.
pub(crate) type Secrets = SecretsServiceClient<Authenticated>;

/// Starts everything and tells the story.
pub(crate) async fn tell(stage: &mut Stage, out: &mut Transcript) -> Result<Demo> {
    out.headline("ScaiVault Federation: one secrets API in front of the stores that you have")?;

    stage.begin_others();
    let openbao = stage.openbao().await?;
    let (endpoint, admin) = (openbao.addr(), openbao.client()?);
    let role = seed(openbao).await?;
    out.step(&format!("OpenBao, a server of the Vault API, is at {endpoint}"))?;
    out.detail("secret/app/db             3 versions, custom metadata team=payments")?;
    out.detail("secret/app/stripe")?;
    out.detail("secret/team/eu/mail/smtp")?;
    out.detail("secret/app/with space         a name that no path of ScaiVault has")?;

    let dev = stage.planes().await?;
    let (address, token) = (format!("http://{}", dev.node), dev.token.expose_secret().to_owned());
    out.step(&format!("ScaiVault is at {address}: a node that joined its control plane"))?;
    if !is_usual(dev.node) {
        out.detail("Port 8300 is taken, so this is another one.")?;
    }
    let api = Rest::new(address.clone(), &token)?;

    out.step("The AppRole credential for OpenBao becomes a secret of ScaiVault")?;
    let credential = json!({ "role_id": role.role_id, "secret_id": role.secret_id });
    store(&api, CREDENTIAL, credential, out).await?;

    out.step("OpenBao becomes a backend in proxy mode, mapped to external/hashicorp/**")?;
    let body = [
        r#"{"name":"hashicorp-production","type":"hashicorp-vault","mode":"proxy","#.to_owned(),
        format!(r#" "config":{{"endpoint":"{endpoint}","auth_method":"approle","#),
        format!(r#"           "auth_config_path":"{CREDENTIAL}"}},"#),
        r#" "path_mapping":{"external/hashicorp/**":"secret/data/**"}}"#.to_owned(),
    ];
    let backend = create_backend(&api, &body, out).await?;
    let status = healthy(&api, &backend).await?;
    let state = status["connection"]["status"].as_str().unwrap_or_default();
    out.received(&format!("201, id {backend}, {state}"))?;

    out.step("An application reads through ScaiVault, by REST")?;
    read(&api, SECRET, out).await?;

    out.step("The same by gRPC")?;
    let channel = Endpoint::from_shared(address.clone())?.connect().await?;
    let mut secrets = SecretsServiceClient::with_interceptor(channel, Bearer::new(&token)?);
    read_by_grpc(&mut secrets, SECRET, out).await?;

    out.step("Somebody changes a secret in OpenBao; the next read has the new value")?;
    let path = "external/hashicorp/app/stripe";
    read(&api, path, out).await?;
    admin.put("secret", "app/stripe", json!({ "api_key": "after-the-rotation" })).await?;
    out.detail("bao kv put secret/app/stripe api_key=after-the-rotation")?;
    let fresh = read(&api, path, out).await?;
    ensure!(fresh["data"]["api_key"] == "after-the-rotation", "the read after the change gave the old value");

    out.step("The same OpenBao becomes a second backend, in sync mode: it is copied every 10 seconds")?;
    let body = [
        r#"{"name":"hashicorp-copy","type":"hashicorp-vault","mode":"sync","sync_interval":"10s","#
            .to_owned(),
        format!(r#" "config":{{"endpoint":"{endpoint}","auth_method":"approle","#),
        format!(r#"           "auth_config_path":"{CREDENTIAL}"}},"#),
        r#" "path_mapping":{"external/copy/**":"secret/data/**"}}"#.to_owned(),
    ];
    let copy = create_backend(&api, &body, out).await?;
    out.received(&format!("201, id {copy}"))?;

    out.step("The first sync has its report: what was copied, and what was left out and why")?;
    let (run, report) = first_run(&api, &copy, out).await?;
    ensure!(
        report["skipped"][0]["reason"] == "charset",
        "the name without a path was not left out: {report}"
    );

    out.step("A copy is read: it comes from ScaiVault's own store, and says how old it is")?;
    read(&api, COPIED, out).await?;

    out.step("OpenBao stops. A proxied read fails, within its deadline; the copy is served")?;
    stage.stop_openbao().await?;
    refused(&api, SECRET, 502, out).await?;
    read(&api, COPIED, out).await?;

    out.step("OpenBao starts again. Proxied reads work, and the next sync compares the copies")?;
    stage.start_openbao_again().await?;
    wait::until("the proxied secret is read again", async || {
        Ok((api.get(&format!("/v1/secrets/{SECRET}")).await?.status == 200).then_some(()))
    })
    .await?;
    read(&api, SECRET, out).await?;
    for backend in [&backend, &copy] {
        reached(&api, backend).await?;
    }
    let route = format!("{BACKENDS}/{copy}/sync?wait=30s");
    out.sent(&format!("POST {route}"))?;
    let report = succeeded(api.send(Method::POST, &route, None).await?)?;
    ensure!(report["outcome"] == "complete", "the sync after the outage: {report}");
    out.received(&format!("200, {}", counts(&report)))?;
    healthy(&api, &copy).await?;

    let clouds = clouds::tell(stage, &api, &mut secrets, out).await?;
    Ok(Demo { address, token, backend, copy, run, clouds })
}

/// Stores a credential; what is shown of it is the names of its members.
pub(crate) async fn store(api: &Rest, path: &str, credential: Value, out: &Transcript) -> Result<()> {
    let route = format!("/v1/secrets/{path}");
    let members = credential.as_object().into_iter().flatten();
    let members: Vec<String> = members.map(|(name, _)| format!(r#""{name}":"…""#)).collect();
    out.sent(&format!("PUT {route}"))?;
    out.sent(&format!(r#"{{"data":{{{}}}}}"#, members.join(",")))?;
    let stored = succeeded(api.put(&route, json!({ "data": credential })).await?)?;
    out.received(&format!("201, version {}", stored["version"]))
}

/// Configures a backend as `body` says, line by line; returns its id.
pub(crate) async fn create_backend(api: &Rest, body: &[String], out: &Transcript) -> Result<String> {
    out.sent(&format!("POST {BACKENDS}"))?;
    for line in body {
        out.sent(line)?;
    }
    let created = succeeded(api.send(Method::POST, BACKENDS, Some(body.concat())).await?)?;
    Ok(created["id"].as_str().context("a backend without an id")?.to_owned())
}

/// The status of a backend once it is healthy.
pub(crate) async fn healthy(api: &Rest, backend: &str) -> Result<Value> {
    status_with(api, backend, |status| status["status"] == "healthy").await
}

/// Waits until the control plane has noticed that the backend answers.
async fn reached(api: &Rest, backend: &str) -> Result<()> {
    status_with(api, backend, |status| {
        status["connection"]["status"] == "connected" && status["connection"]["breaker"] == "closed"
    })
    .await
    .map(drop)
}

async fn status_with(api: &Rest, backend: &str, good: impl Fn(&Value) -> bool) -> Result<Value> {
    let route = format!("{BACKENDS}/{backend}/status");
    wait::until("the backend is as it should be", async || {
        let status = api.get(&route).await?.ok()?;
        Ok(good(&status).then_some(status))
    })
    .await
}

/// Shows the report of the first run of a backend; returns the id of the run, and the report.
pub(crate) async fn first_run(api: &Rest, backend: &str, out: &Transcript) -> Result<(String, Value)> {
    let runs = format!("{BACKENDS}/{backend}/syncs");
    let run = wait::until("the first sync has ended", async || {
        let answer = api.get(&runs).await?.ok()?;
        let ended = answer["syncs"].as_array().into_iter().flatten().find(|run| run["ended_at"].is_string());
        Ok(ended.and_then(|run| run["run_id"].as_str()).map(str::to_owned))
    })
    .await?;
    let route = format!("{runs}/{run}");
    out.sent(&format!("GET {route}"))?;
    let report = succeeded(api.get(&route).await?)?;
    out.received(&format!("200, {}", counts(&report)))?;
    for skipped in report["skipped"].as_array().into_iter().flatten() {
        out.received(&format!("     left out: {}, reason {}", skipped["remote_name"], skipped["reason"]))?;
    }
    Ok((run, report))
}

/// What a report counted.
fn counts(report: &Value) -> String {
    let text = |name: &str| report[name].as_str().unwrap_or_default().to_owned();
    let count = |name: &str| report[name].as_u64().unwrap_or_default();
    let calls = report["calls"].as_object().into_iter().flatten();
    let calls: Vec<String> = calls.map(|(operation, count)| format!("{count} {operation}")).collect();
    format!(
        "{}: {} listed, {} created, {} unchanged, {} skipped; calls: {}",
        text("outcome"),
        count("listed"),
        count("created"),
        count("unchanged"),
        count("skipped_count"),
        calls.join(", "),
    )
}

/// Puts secrets into OpenBao, and lets an application role read them.
async fn seed(openbao: &OpenBao) -> Result<AppRole> {
    let admin = openbao.client()?;
    admin.enable_kv("secret", KvVersion::V2).await?;
    for password in ["spring", "summer", "autumn"] {
        admin.put("secret", "app/db", json!({ "user": "app", "password": password })).await?;
    }
    admin.set_custom_metadata("secret", "app/db", json!({ "team": "payments" })).await?;
    admin.put("secret", "app/stripe", json!({ "api_key": "before-the-rotation" })).await?;
    admin.put("secret", "team/eu/mail/smtp", json!({ "host": "smtp.eu.internal", "port": 587 })).await?;
    admin.put("secret", "app/with space", json!({ "note": "named by hand" })).await?;

    let policy = r#"path "secret/*" { capabilities = ["read", "list"] }"#;
    admin.write_policy("scaivault", policy).await?;
    admin.enable_auth("approle", "approle").await?;
    let settings = json!({ "token_policies": ["scaivault"], "token_ttl": "1h" });
    admin.create_approle("approle", "scaivault", settings).await
}

/// Reads a secret, and shows what matters of the answer.
pub(crate) async fn read(api: &Rest, path: &str, out: &Transcript) -> Result<Value> {
    let route = format!("/v1/secrets/{path}");
    out.sent(&format!("GET {route}"))?;
    let start = Instant::now();
    let answer = api.get(&route).await?;
    let took = start.elapsed();
    let secret = succeeded(answer)?;
    let text = |name: &str| secret[name].as_str().unwrap_or_default().to_owned();
    let age = if secret["source"] == "sync" { format!(", age {} s", secret["age"]) } else { String::new() };
    out.received(&format!(
        "200, {}, source {}, remote version {}{age}, {}",
        secret["data"],
        text("source"),
        short(&text("remote_version")),
        millis(took),
    ))?;
    Ok(secret)
}

/// Reads a secret by gRPC, and shows what matters of the answer.
pub(crate) async fn read_by_grpc(secrets: &mut Secrets, path: &str, out: &Transcript) -> Result<()> {
    out.sent(&format!("scaivault.secrets.v1.SecretsService/Get {}", json!({ "path": path })))?;
    let start = Instant::now();
    let answer = secrets.get(GetRequest { path: path.into(), ..Default::default() }).await?.into_inner();
    let took = start.elapsed();
    let secret = answer.secret.context("an answer without a secret")?;
    let value: Value = serde_json::from_slice(&secret.value)?;
    let source = match secret.source() {
        SecretSource::Proxy => "proxy",
        SecretSource::Sync => "sync",
        SecretSource::Local => "local",
        SecretSource::Unspecified => "unspecified",
    };
    out.received(&format!(
        "OK, {value}, source {source}, remote version {}, {}",
        short(&secret.remote_version),
        millis(took)
    ))
}

/// The beginning of a store's name of a version, which may be a GUID.
fn short(version: &str) -> String {
    match version.char_indices().nth(8) {
        Some((end, _)) => format!("{}…", &version[..end]),
        None => version.to_owned(),
    }
}

/// Tries to read a secret that cannot be read now, and shows the refusal.
pub(crate) async fn refused(api: &Rest, path: &str, status: u16, out: &Transcript) -> Result<Value> {
    let route = format!("/v1/secrets/{path}");
    out.sent(&format!("GET {route}"))?;
    let start = Instant::now();
    let answer = api.get(&route).await?;
    let took = start.elapsed();
    ensure!(answer.status == status, "expected {status}: {} {}", answer.status, answer.text);
    let code = answer.json["code"].as_str().unwrap_or_default();
    out.received(&format!("{status}, {code}, {}", millis(took)))?;
    Ok(answer.json)
}

fn succeeded(answer: Answer) -> Result<Value> {
    answer.ok().context("ScaiVault refused")
}

fn millis(took: Duration) -> String {
    format!("{:.1} ms", took.as_secs_f64() * 1000.0)
}
