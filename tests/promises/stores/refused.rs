//! Configurations that cannot work: each is refused at its field, with what to do, and none is kept.

use anyhow::{Context as _, Result};
use scaivault_tests::fakes::azure::AppCertificate;
use scaivault_tests::stores::Store;
use serde_json::{Value, json};

use super::{BACKENDS, planes};

/// Somewhere that no backend may be.
const METADATA: &str = "http://169.254.169.254";

/// The credential with one of its fields changed, or left out for null.
fn with(credential: &Value, field: &str, value: Value) -> Value {
    let mut credential = credential.clone();
    match value {
        Value::Null => drop(credential.as_object_mut().expect("an object").remove(field)),
        value => credential[field] = value,
    }
    credential
}

#[tokio::test]
async fn what_cannot_work_is_refused_at_its_field() -> Result<()> {
    let (_planes, rest) = planes().await?;
    let (aws, azure, gcp) = (Store::aws().await?, Store::azure().await?, Store::gcp().await?);
    let (of_aws, of_azure, of_gcp) = (aws.credential()?, azure.credential()?, gcp.credential()?);
    let (mine, others) = (AppCertificate::generate()?, AppCertificate::generate()?);
    let certificate = json!({
        "tenant_id": of_azure["tenant_id"], "client_id": of_azure["client_id"],
        "certificate_pem": mine.certificate, "private_key_pem": mine.key,
    });
    for (name, credential) in [
        ("aws", of_aws.clone()),
        ("azure", of_azure.clone()),
        ("gcp", of_gcp.clone()),
        ("aws/half", with(&of_aws, "secret_access_key", Value::Null)),
        ("aws/broken", with(&of_aws, "access_key_id", json!("AKIA\nX"))),
        ("azure/half", with(&of_azure, "client_secret", Value::Null)),
        ("azure/nobody", with(&of_azure, "tenant_id", json!("common"))),
        ("azure/traversal", with(&of_azure, "tenant_id", json!("../x"))),
        ("azure/no-key", with(&certificate, "private_key_pem", Value::Null)),
        ("azure/other-key", with(&certificate, "private_key_pem", json!(others.key))),
        ("azure/no-pem", with(&certificate, "certificate_pem", json!("no PEM"))),
        ("gcp/no-key", with(&of_gcp, "private_key", Value::Null)),
        ("gcp/no-pem", with(&of_gcp, "private_key", json!("no PEM"))),
        ("gcp/no-email", with(&of_gcp, "client_email", Value::Null)),
        ("gcp/number", with(&of_gcp, "client_email", json!(7))),
        ("gcp/external", with(&of_gcp, "type", json!("external_account"))),
        ("gcp/user", with(&of_gcp, "type", json!("authorized_user"))),
    ] {
        rest.put_data(&format!("infra/{name}"), credential).await?;
    }
    let text = json!({ "secret_type": "text", "data": { "value": "{\"type\":\"service_acc" } });
    rest.put("/v1/secrets/infra/gcp/text", text).await?.ok()?;

    let (invalid, unusable) = ("invalid_config", "credential_unusable");
    let path = "credentials_path";
    let certified = |credential: &str| json!({ "auth_method": "certificate", path: credential });
    let stored = |credential: &str| json!({ path: credential });
    for (store, name, wrong, field, code) in [
        // Fields that are not there, or not known.
        (&aws, "aws", json!({ "colour": "red" }), "colour", invalid),
        (&azure, "azure", json!({ "colour": "red" }), "colour", invalid),
        (&gcp, "gcp", json!({ "colour": "red" }), "colour", invalid),
        (&aws, "aws", json!({ "region": null }), "region", invalid),
        (&azure, "azure", json!({ "vault_url": null }), "vault_url", invalid),
        (&azure, "azure", json!({ "auth_method": null }), "auth_method", invalid),
        (&gcp, "gcp", json!({ "project_id": null }), "project_id", invalid),
        // Those of another store.
        (&aws, "aws", json!({ "auth_method": "approle" }), "auth_method", invalid),
        (&aws, "aws", json!({ "vault_url": "https://a.vault.azure.net" }), "vault_url", invalid),
        (&azure, "azure", json!({ "auth_method": "approle" }), "auth_method", invalid),
        (&azure, "azure", json!({ "auth_method": "service_account" }), "auth_method", invalid),
        (&azure, "azure", json!({ "region": "eu-central-1" }), "region", invalid),
        (&gcp, "gcp", json!({ "auth_method": "client_secret" }), "auth_method", invalid),
        (&gcp, "gcp", json!({ "role_arn": "x" }), "role_arn", invalid),
        // Fields that say nothing that could be.
        (&aws, "aws", json!({ "region": "Frankfurt" }), "region", invalid),
        (&aws, "aws", json!({ "role_arn": "reader" }), "role_arn", invalid),
        (&aws, "aws", json!({ "role_arn": "arn:aws:iam::123456789012:user/a" }), "role_arn", invalid),
        (&aws, "aws", json!({ "external_id": "a b" }), "external_id", invalid),
        (&aws, "aws", json!({ "session_duration": "1m" }), "session_duration", invalid),
        (&aws, "aws", json!({ "endpoint": "moto" }), "endpoint", invalid),
        (&azure, "azure", json!({ "vault_url": "acme" }), "vault_url", invalid),
        (&azure, "azure", json!({ "vault_url": "https://u:p@acme.vault.azure.net" }), "vault_url", invalid),
        (&gcp, "gcp", json!({ "project_id": "a/b" }), "project_id", invalid),
        (&gcp, "gcp", json!({ "location": "a.evil.example" }), "location", invalid),
        (&gcp, "gcp", json!({ "ca_cert": "no PEM" }), "ca_cert", invalid),
        (&gcp, "gcp", json!({ "timeout": "soon" }), "timeout", invalid),
        // Where no backend may be.
        (&aws, "aws", json!({ "endpoint": METADATA }), "endpoint", invalid),
        (&aws, "aws", json!({ "sts_endpoint": METADATA }), "sts_endpoint", invalid),
        (&azure, "azure", json!({ "vault_url": METADATA }), "vault_url", invalid),
        (&azure, "azure", json!({ "authority": METADATA }), "authority", invalid),
        (&gcp, "gcp", json!({ "endpoint": METADATA }), "endpoint", invalid),
        // Logins that are none.
        (&aws, "aws", stored("infra/none"), path, unusable),
        (&azure, "azure", stored("infra/none"), path, unusable),
        (&gcp, "gcp", stored("infra/none"), path, unusable),
        (&aws, "aws", stored("infra/aws/half"), path, unusable),
        (&aws, "aws", stored("infra/aws/broken"), path, unusable),
        (&aws, "aws", stored("infra/azure"), path, unusable),
        (&azure, "azure", stored("infra/aws"), path, unusable),
        (&azure, "azure", stored("infra/azure/half"), path, unusable),
        (&azure, "azure", stored("infra/azure/nobody"), path, unusable),
        (&azure, "azure", stored("infra/azure/traversal"), path, unusable),
        (&azure, "azure", certified("infra/azure"), path, unusable),
        (&azure, "azure", certified("infra/azure/no-key"), path, unusable),
        (&azure, "azure", certified("infra/azure/other-key"), path, unusable),
        (&azure, "azure", certified("infra/azure/no-pem"), path, unusable),
        (&gcp, "gcp", stored("infra/aws"), path, unusable),
        (&gcp, "gcp", stored("infra/gcp/text"), path, unusable),
        (&gcp, "gcp", stored("infra/gcp/no-key"), path, unusable),
        (&gcp, "gcp", stored("infra/gcp/no-pem"), path, unusable),
        (&gcp, "gcp", stored("infra/gcp/no-email"), path, unusable),
        (&gcp, "gcp", stored("infra/gcp/number"), path, unusable),
        (&gcp, "gcp", stored("infra/gcp/external"), path, unusable),
        (&gcp, "gcp", stored("infra/gcp/user"), path, unusable),
        (&gcp, "gcp", stored("gcp/x"), path, "credential_cycle"),
    ] {
        let mut backend = store.backend(name);
        for (field, value) in wrong.as_object().context("fields")? {
            backend["config"] = with(&backend["config"], field, value.clone());
        }
        let refused = rest.post(BACKENDS, backend).await?;
        let pointer = format!("/config/{field}");
        assert_eq!(
            (refused.refusal(), refused.pointers()),
            ((400, code), vec![pointer.as_str()]),
            "{name} {wrong}: {}",
            refused.text
        );
        assert!(refused.json["next_step"].as_str().is_some_and(|next| !next.is_empty()), "{}", refused.text);
        for credential in [&of_aws["secret_access_key"], &of_azure["client_secret"]] {
            assert!(!refused.text.contains(credential.as_str().context("a text")?), "{}", refused.text);
        }
    }
    assert_eq!(rest.get(BACKENDS).await?.ok()?["backends"], json!([]));
    Ok(())
}
