//! Our own identities: for whom they were granted to, and to nobody's server.

use std::net::Ipv4Addr;

use anyhow::{Context as _, Result, ensure};
use scaivault_tests::fakes::azure::{ALL_RIGHTS, AzureFake, Identity, Operation};
use scaivault_tests::fakes::gcp::Gcp;
use scaivault_tests::planes::{Options, Planes, Rest};
use scaivault_tests::wait;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use super::{SECRET, SHORT, VALUE, grant, path, says_what_to_do, status_path};

const BACKENDS: &str = "/v1/federation/backends";

/// One configuration with each identity of ours, at `endpoint`.
fn configurations(endpoint: &str) -> Vec<(&'static str, &'static str, &'static str, Value)> {
    let vault = |method: &str| {
        let config = json!({
            "endpoint": endpoint, "auth_method": method, "auth_role": "app",
            "sts_endpoint": (method == "aws").then_some("https://sts.us-east-1.amazonaws.com"),
        });
        json!({ "type": "hashicorp-vault", "config": config })
    };
    let aws = json!({
        "type": "aws-secrets-manager",
        "config": {
            "region": "eu-central-1", "endpoint": endpoint,
            "role_arn": "arn:aws:iam::123456789012:role/app",
        },
    });
    let azure = json!({
        "type": "azure-key-vault", "config": { "vault_url": endpoint, "auth_method": "managed_identity" },
    });
    let gcp = json!({
        "type": "google-secret-manager",
        "config": { "project_id": "scaivault-tests", "endpoint": endpoint, "auth_method": "workload_identity" },
    });
    let (auth_path, keys_path, method) =
        ("/config/auth_config_path", "/config/credentials_path", "/config/auth_method");
    vec![
        ("kubernetes", auth_path, "/config/endpoint", vault("kubernetes")),
        ("aws", auth_path, "/config/endpoint", vault("aws")),
        ("gcp", auth_path, "/config/endpoint", vault("gcp")),
        ("aws", keys_path, "/config/endpoint", aws),
        ("azure", method, "/config/vault_url", azure),
        ("gcp", method, "/config/endpoint", gcp),
    ]
}

async fn create(rest: &Rest, mut backend: Value) -> Result<scaivault_tests::planes::Answer> {
    let template = if backend["type"] == "hashicorp-vault" { "secret/data/*" } else { "*" };
    let more = json!({ "name": "own", "mode": "proxy", "path_mapping": { "own/*": template } });
    scaivault_tests::planes::merge(&mut backend, &more);
    rest.post(BACKENDS, backend).await
}

#[tokio::test]
async fn an_identity_of_ours_is_for_whom_it_was_granted_to() -> Result<()> {
    let options = Options::default().control_plane_flag("--own-identity-hosts", "127.0.0.1");
    let planes = Planes::start(options).await?;
    let rest = planes.rest(0)?;
    for (identity, field, _, backend) in configurations("http://127.0.0.1:1") {
        let others: Vec<_> =
            ["kubernetes", "aws", "azure", "gcp"].into_iter().filter(|other| *other != identity).collect();
        for granted in [Vec::new(), others] {
            grant(&rest, &granted).await?;
            let answer = create(&rest, backend.clone()).await?;
            ensure!(answer.refusal() == (403, "permission_denied"), "{identity}: {}", answer.text);
            ensure!(answer.pointers() == [field], "{identity}: {}", answer.text);
            let next = answer.json["next_step"].as_str().unwrap_or_default();
            ensure!(next.contains(&format!("--identity {identity}")), "{identity}: {next}");
        }
        let listed = rest.get(BACKENDS).await?.ok()?;
        ensure!(listed["backends"] == json!([]), "{listed}");
    }
    Ok(())
}

#[tokio::test]
async fn an_identity_of_ours_goes_to_no_server_that_is_not_the_providers_or_listed() -> Result<()> {
    let somebody = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let endpoint = format!("http://{}", somebody.local_addr()?);
    let planes =
        Planes::start(Options::default().control_plane_flag("--own-identity-hosts", "*.trusted.example"))
            .await?;
    let rest = planes.rest(0)?;
    grant(&rest, &["kubernetes", "aws", "azure", "gcp"]).await?;
    for host in [endpoint.as_str(), "https://vault.azure.net.evil.example", "https://trusted.example"] {
        for (identity, _, field, backend) in configurations(host) {
            let answer = create(&rest, backend).await?;
            ensure!(answer.refusal() == (400, "invalid_config"), "{identity} {host}: {}", answer.text);
            ensure!(answer.pointers() == [field], "{identity} {host}: {}", answer.text);
            let next = answer.json["next_step"].as_str().unwrap_or_default();
            ensure!(next.contains("--own-identity-hosts"), "{identity}: {next}");
        }
    }
    // Whoever would have come is there by now.
    let came = tokio::time::timeout(std::time::Duration::from_millis(100), somebody.accept()).await;
    ensure!(came.is_err(), "somebody came");
    Ok(())
}

/// Azure and GCP on one control plane, so that a grant of one is seen not to be that of the other.
async fn two_clouds() -> Result<(AzureFake, Gcp, Planes)> {
    let (azure, gcp) = tokio::try_join!(AzureFake::start(), Gcp::start())?;
    azure.put(SECRET, VALUE);
    gcp.secrets().put(SECRET, VALUE)?;
    azure.register_identity(Identity::System, &ALL_RIGHTS);
    azure.set_token_lifetime(SHORT);
    let options = Options::default()
        .control_plane_flag("--azure-metadata", azure.url())
        .control_plane_flag("--gcp-metadata", gcp.url())
        .control_plane_flag("--own-identity-hosts", "127.0.0.1");
    let planes = Planes::start(options).await?;
    Ok((azure, gcp, planes))
}

#[tokio::test]
async fn an_identity_that_is_taken_away_is_not_shown_again() -> Result<()> {
    let (azure, _gcp, planes) = two_clouds().await?;
    let rest = planes.rest(0)?;
    grant(&rest, &["azure", "gcp"]).await?;
    let backend = json!({
        "type": "azure-key-vault", "config": { "vault_url": azure.url(), "auth_method": "managed_identity" },
    });
    let created = create(&rest, backend).await?.ok()?;
    let id = created["id"].as_str().context("no id")?;
    let works = async || Ok((rest.get(&path("own")).await?.status == 200).then_some(()));
    wait::until("the backend is read", works).await?;

    grant(&rest, &["gcp"]).await?;
    let shown = azure.calls(Operation::IdentityToken);
    let refused = wait::until("what was issued is over", async || {
        let answer = rest.get(&path("own")).await?;
        Ok((answer.status != 200).then_some(answer))
    })
    .await?;
    ensure!(refused.refusal() == (502, "backend_login_failed"), "{}", refused.text);
    let degraded = wait::until("the status tells", async || {
        let status = rest.get(&status_path(id)).await?.ok()?;
        Ok((status["status"] == "degraded").then_some(status))
    })
    .await?;
    ensure!(says_what_to_do(&degraded), "{degraded}");
    ensure!(
        degraded["next_step"].as_str().is_some_and(|next| next.contains("--identity azure")),
        "{degraded}"
    );
    ensure!(azure.calls(Operation::IdentityToken) == shown, "it was shown again");

    grant(&rest, &["azure"]).await?;
    wait::until("the backend is read again", works).await
}
