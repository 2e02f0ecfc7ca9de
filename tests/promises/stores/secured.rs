//! Endpoints and certificates: each backend has its own, and nothing else decides them.

use anyhow::{Context as _, Result};
use scaivault_tests::authority::Authority;
use scaivault_tests::planes::{Options, Planes};
use scaivault_tests::stores::{Aws, Azure, Gcp, Store, copied};
use scaivault_tests::wait;
use serde_json::json;

use super::{BACKENDS, planes, readable, secret};

/// Two stores of each kind, each with an authority of its own.
async fn stores() -> Result<Vec<(&'static str, Store)>> {
    let authority = Authority::new;
    Ok(vec![
        ("aws-1", Store::Aws(Box::new(Aws::start(Some(authority()?)).await?))),
        ("aws-2", Store::Aws(Box::new(Aws::start(Some(authority()?)).await?))),
        ("azure-1", Store::Azure(Azure::start(Some(&authority()?)).await?)),
        ("azure-2", Store::Azure(Azure::start(Some(&authority()?)).await?)),
        ("gcp-1", Store::Gcp(Gcp::start(Some(&authority()?)).await?)),
        ("gcp-2", Store::Gcp(Gcp::start(Some(&authority()?)).await?)),
    ])
}

#[tokio::test]
async fn each_backend_trusts_its_own_authority_and_no_other() -> Result<()> {
    let (_planes, rest) = planes().await?;
    let mut backends = Vec::new();
    let stores = stores().await?;
    for (name, store) in &stores {
        store.put(&store.name("db"), name).await?;
        let (_, report) = store.sync(&rest, &format!("{name}-copied"), json!({})).await?;
        assert_eq!(report["outcome"], "complete", "{name}: {report}");
        backends.push((*name, store.federate(&rest, name, json!({})).await?));
    }
    for (name, _) in &stores {
        readable(&rest, &format!("{name}/db")).await?;
        for prefix in [(*name).to_owned(), format!("{name}-copied")] {
            let read = rest.get(&secret(&format!("{prefix}/db"))).await?.ok()?;
            assert_eq!(read["data"], json!({ "value": name }));
        }
        copied(&rest, &secret(&format!("{name}-copied/db"))).await?;
    }
    // What is signed by another's authority is signed by nobody.
    let stranger = Authority::new()?.pem();
    for (name, id) in backends {
        let patch = json!({ "config": { "ca_cert": stranger } });
        rest.patch(&format!("{BACKENDS}/{id}"), patch).await?.ok()?;
        let mut last = String::new();
        let refused = wait::until("the certificate is refused", async || {
            let read = rest.get(&secret(&format!("{name}/db"))).await?;
            last.clone_from(&read.text);
            Ok((read.status != 200).then_some(read))
        });
        let refused = refused.await.with_context(|| format!("{name}: {last}"))?;
        assert_eq!(refused.refusal(), (502, "backend_unreachable"), "{name}: {}", refused.text);
        assert!(refused.text.contains("certificate"), "{name}: {}", refused.text);
        let mut last = String::new();
        let told = wait::until("the status tells of it", async || {
            let status = rest.status(&id).await?;
            last = status.to_string();
            let reason = status["reason"].as_str().unwrap_or_default();
            Ok((reason.contains("certificate") && status["next_step"].is_string()).then_some(()))
        });
        told.await.with_context(|| format!("{name}: {last}"))?;
    }
    Ok(())
}

/// Variables that the providers' own libraries and HTTP clients obey.
const NONSENSE: &[(&str, &str)] = &[
    ("AWS_ACCESS_KEY_ID", "AKIANONSENSE"),
    ("AWS_SECRET_ACCESS_KEY", "nonsense"),
    ("AWS_SESSION_TOKEN", "nonsense"),
    ("AWS_REGION", "no-where-1"),
    ("AWS_DEFAULT_REGION", "no-where-1"),
    ("AWS_PROFILE", "nonsense"),
    ("AWS_CONFIG_FILE", "/nonexistent"),
    ("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent"),
    ("AWS_ENDPOINT_URL", "http://127.0.0.1:1"),
    ("AWS_ENDPOINT_URL_STS", "http://127.0.0.1:1"),
    ("AWS_ENDPOINT_URL_SECRETS_MANAGER", "http://127.0.0.1:1"),
    ("AWS_CA_BUNDLE", "/nonexistent"),
    ("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/nonsense"),
    ("AWS_WEB_IDENTITY_TOKEN_FILE", "/nonexistent"),
    ("AWS_USE_FIPS_ENDPOINT", "true"),
    ("AWS_USE_DUALSTACK_ENDPOINT", "true"),
    ("AZURE_TENANT_ID", "nonsense"),
    ("AZURE_CLIENT_ID", "nonsense"),
    ("AZURE_CLIENT_SECRET", "nonsense"),
    ("AZURE_AUTHORITY_HOST", "http://127.0.0.1:1"),
    ("AZURE_FEDERATED_TOKEN_FILE", "/nonexistent"),
    ("IDENTITY_ENDPOINT", "http://127.0.0.1:1"),
    ("MSI_ENDPOINT", "http://127.0.0.1:1"),
    ("GOOGLE_APPLICATION_CREDENTIALS", "/nonexistent"),
    ("GOOGLE_CLOUD_PROJECT", "nonsense"),
    ("GOOGLE_CLOUD_UNIVERSE_DOMAIN", "nonsense.example"),
    ("CLOUDSDK_CONFIG", "/nonexistent"),
    ("VAULT_ADDR", "http://127.0.0.1:1"),
    ("VAULT_TOKEN", "nonsense"),
    ("HTTP_PROXY", "http://127.0.0.1:1"),
    ("HTTPS_PROXY", "http://127.0.0.1:1"),
    ("ALL_PROXY", "http://127.0.0.1:1"),
    ("http_proxy", "http://127.0.0.1:1"),
    ("https_proxy", "http://127.0.0.1:1"),
    ("all_proxy", "http://127.0.0.1:1"),
    ("SSL_CERT_FILE", "/nonexistent"),
    ("SSL_CERT_DIR", "/nonexistent"),
    ("HOME", "/nonexistent"),
];

#[tokio::test]
async fn the_environment_of_the_planes_is_nobodys_configuration() -> Result<()> {
    let mut planes = Planes::start(Options::default()).await?;
    for plane in std::iter::once(&mut planes.control_plane).chain(&mut planes.nodes) {
        plane.kill9();
        NONSENSE.iter().for_each(|(name, value)| plane.set_variable(name, value));
        plane.start_again().await?;
        plane.ready().await?;
    }
    let rest = planes.rest(0)?;
    for (name, store) in stores().await?.into_iter().step_by(2) {
        store.put(&store.name("db"), name).await?;
        let (_, report) = store.sync(&rest, &format!("{name}-copied"), json!({})).await?;
        assert_eq!(report["outcome"], "complete", "{name}: {report}");
        store.federate(&rest, name, json!({})).await?;
        readable(&rest, &format!("{name}/db")).await?;
    }
    Ok(())
}
