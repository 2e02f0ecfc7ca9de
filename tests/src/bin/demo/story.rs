//! The numbered steps: from an OpenBao with secrets to an application that reads them through ScaiVault.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use reqwest::Method;
use scaivault_domain::backend::KvVersion;
use scaivault_proto::secrets::v1::GetRequest;
use scaivault_proto::secrets::v1::secrets_service_client::SecretsServiceClient;
use scaivault_tests::planes::{Answer, Bearer, Rest};
use scaivault_tests::servers::openbao::{AppRole, OpenBao};
use scaivault_tests::wait;
use secrecy::ExposeSecret as _;
use serde_json::{Value, json};
use tonic::transport::Endpoint;

use crate::stage::{Stage, is_usual};
use crate::transcript::Transcript;

/// Where the credential lies in ScaiVault.
const CREDENTIAL: &str = "infra/hashicorp/approle";
/// The secret that is shown.
pub(crate) const SECRET: &str = "external/hashicorp/app/db";

/// What the rest of the demo needs to know.
pub(crate) struct Demo {
    /// The URL of the node.
    pub(crate) address: String,
    /// The operator's token.
    pub(crate) token: String,
    /// The id of the backend.
    pub(crate) backend: String,
}

/// Starts everything and tells the story.
pub(crate) async fn tell(stage: &mut Stage, out: &mut Transcript) -> Result<Demo> {
    out.headline("ScaiVault Federation: one secrets API in front of the stores that you have")?;

    let openbao = stage.openbao().await?;
    let (endpoint, admin) = (openbao.addr(), openbao.client()?);
    let role = seed(openbao).await?;
    out.step(&format!("OpenBao, a server of the Vault API, is at {endpoint}"))?;
    out.detail("secret/app/db             3 versions, custom metadata team=payments")?;
    out.detail("secret/app/stripe")?;
    out.detail("secret/team/eu/mail/smtp")?;

    let dev = stage.planes().await?;
    let (address, token) = (format!("http://{}", dev.node), dev.token.expose_secret().to_owned());
    out.step(&format!("ScaiVault is at {address}: a node that joined its control plane"))?;
    if !is_usual(dev.node) {
        out.detail("Port 8300 is taken, so this is another one.")?;
    }
    let api = Rest::new(address.clone(), &token)?;

    out.step("The AppRole credential for OpenBao becomes a secret of ScaiVault")?;
    let path = format!("/v1/secrets/{CREDENTIAL}");
    out.sent(&format!("PUT {path}"))?;
    out.sent(r#"{"data":{"role_id":"…","secret_id":"…"}}"#)?;
    let credential = json!({ "data": { "role_id": role.role_id, "secret_id": role.secret_id } });
    let stored = succeeded(api.put(&path, credential).await?)?;
    out.received(&format!("201, version {}", stored["version"]))?;

    out.step("OpenBao becomes a backend in proxy mode, mapped to external/hashicorp/**")?;
    let body = [
        r#"{"name":"hashicorp-production","type":"hashicorp-vault","mode":"proxy","#.to_owned(),
        format!(r#" "config":{{"endpoint":"{endpoint}","auth_method":"approle","#),
        format!(r#"           "auth_config_path":"{CREDENTIAL}"}},"#),
        r#" "path_mapping":{"external/hashicorp/**":"secret/data/**"}}"#.to_owned(),
    ];
    out.sent("POST /v1/federation/backends")?;
    for line in &body {
        out.sent(line)?;
    }
    let created = api.send(Method::POST, "/v1/federation/backends", Some(body.concat())).await?;
    let created = succeeded(created)?;
    let backend = created["id"].as_str().context("a backend without an id")?.to_owned();
    let status_path = format!("/v1/federation/backends/{backend}/status");
    let status = wait::until("the backend is healthy", async || {
        let status = api.get(&status_path).await?.ok()?;
        Ok((status["status"] == "healthy").then_some(status))
    })
    .await?;
    let state = status["connection"]["status"].as_str().unwrap_or_default();
    out.received(&format!("201, id {backend}, {state}"))?;

    out.step("An application reads through ScaiVault, by REST")?;
    read(&api, SECRET, out).await?;

    out.step("The same by gRPC")?;
    out.sent(&format!("scaivault.secrets.v1.SecretsService/Get {}", json!({ "path": SECRET })))?;
    let channel = Endpoint::from_shared(address.clone())?.connect().await?;
    let mut secrets = SecretsServiceClient::with_interceptor(channel, Bearer::new(&token)?);
    let start = Instant::now();
    let answer = secrets.get(GetRequest { path: SECRET.into(), ..Default::default() }).await?.into_inner();
    let took = start.elapsed();
    let secret = answer.secret.context("an answer without a secret")?;
    let value: Value = serde_json::from_slice(&secret.value)?;
    out.received(&format!("OK, {value}, remote version {}, {}", secret.remote_version, millis(took)))?;

    out.step("Somebody changes a secret in OpenBao; the next read has the new value")?;
    let path = "external/hashicorp/app/stripe";
    read(&api, path, out).await?;
    admin.put("secret", "app/stripe", json!({ "api_key": "after-the-rotation" })).await?;
    out.detail("bao kv put secret/app/stripe api_key=after-the-rotation")?;
    let fresh = read(&api, path, out).await?;
    ensure!(fresh["data"]["api_key"] == "after-the-rotation", "the read after the change gave the old value");

    Ok(Demo { address, token, backend })
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

    let policy = r#"path "secret/*" { capabilities = ["read", "list"] }"#;
    admin.write_policy("scaivault", policy).await?;
    admin.enable_auth("approle", "approle").await?;
    let settings = json!({ "token_policies": ["scaivault"], "token_ttl": "1h" });
    admin.create_approle("approle", "scaivault", settings).await
}

/// Reads a secret, and shows what matters of the answer.
async fn read(api: &Rest, path: &str, out: &Transcript) -> Result<Value> {
    let route = format!("/v1/secrets/{path}");
    out.sent(&format!("GET {route}"))?;
    let start = Instant::now();
    let answer = api.get(&route).await?;
    let took = start.elapsed();
    let secret = succeeded(answer)?;
    let text = |name: &str| secret[name].as_str().unwrap_or_default().to_owned();
    out.received(&format!(
        "200, {}, source {}, remote version {}, {}",
        secret["data"],
        text("source"),
        text("remote_version"),
        millis(took),
    ))?;
    Ok(secret)
}

fn succeeded(answer: Answer) -> Result<Value> {
    answer.ok().context("ScaiVault refused")
}

fn millis(took: Duration) -> String {
    format!("{:.1} ms", took.as_secs_f64() * 1000.0)
}
