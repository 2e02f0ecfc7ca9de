//! Configuring backends: what is accepted works, what is refused names the field, and nothing half-made stays.

use anyhow::{Context as _, Result};
use reqwest::Method;
use scaivault_tests::planes::{self, CREDENTIAL, Federated, Options, Planes, Rest};
use scaivault_tests::wait;
use serde_json::{Value, json};

const BACKENDS: &str = "/v1/federation/backends";

/// The planes with a stored credential, and the operator's client.
async fn planes() -> Result<(Planes, Rest)> {
    let planes = Planes::start(Options::default()).await?;
    let rest = planes.rest(0)?;
    rest.put_data(CREDENTIAL, json!({ "role_id": "role", "secret_id": "canary-secret-id" })).await?;
    Ok((planes, rest))
}

fn good() -> Value {
    planes::backend(
        "good",
        "https://vault.internal:8200",
        CREDENTIAL,
        json!({ "external/**": "secret/data/**" }),
    )
}

/// `good` in a namespace.
fn good_in(namespace: &str) -> Value {
    let mut changed = good();
    changed["config"]["namespace"] = json!(namespace);
    changed
}

/// `good` with other members.
fn good_but(members: Value) -> Value {
    let mut changed = good();
    if let (Some(changed), Value::Object(members)) = (changed.as_object_mut(), members) {
        changed.extend(members);
    }
    changed
}

#[tokio::test]
async fn the_examples_of_the_reference_work_as_they_are() -> Result<()> {
    let (_planes, rest) = planes().await?;
    let credential = r#"{"data": {"role_id": "...", "secret_id": "..."}, "secret_type": "json"}"#;
    for path in ["infra/hashicorp/approle", "infra/hashicorp/approle-creds"] {
        rest.send(Method::PUT, &format!("/v1/secrets/{path}"), Some(credential.into())).await?.ok()?;
    }
    for example in [
        r#"{
    "name": "hashicorp-production",
    "type": "hashicorp-vault",
    "config": {
      "endpoint": "https://vault.internal:8200",
      "auth_method": "approle",
      "auth_config_path": "infra/hashicorp/approle",
      "tls_verify": true,
      "namespace": "acme"
    },
    "path_mapping": {
      "external/hashicorp/**": "secret/data/**"
    },
    "mode": "proxy"
  }"#,
        r#"{
  "name": "hashicorp-production",
  "type": "hashicorp-vault",
  "config": {
    "endpoint": "https://vault.internal:8200",
    "auth_method": "approle",
    "auth_config_path": "infra/hashicorp/approle-creds",
    "tls_verify": true
  },
  "path_mapping": {
    "external/hashicorp/**": "secret/data/**"
  },
  "mode": "proxy"
}"#,
    ] {
        let created = rest.send(Method::POST, BACKENDS, Some(example.into())).await?;
        assert_eq!(created.status, 201, "{}", created.text);
        let id = created.json["id"].as_str().context("id")?;
        let location = format!("{BACKENDS}/{id}");
        assert_eq!(created.header("location"), location);
        let sent: Value = serde_json::from_str(example)?;
        let read = rest.get(&location).await?;
        assert_eq!(read.header("etag"), created.header("etag"));
        for (field, value) in sent.as_object().context("an object")? {
            let shown = &read.json[field];
            match value.as_object() {
                Some(members) => {
                    members.iter().for_each(|(key, value)| assert_eq!(shown[key], *value, "{field}.{key}"))
                }
                None => assert_eq!(shown, value, "{field}"),
            }
        }
        assert!(!read.text.contains("..."), "the credential is never echoed");
        assert_eq!(rest.get(&format!("{location}/status")).await?.ok()?["name"], "hashicorp-production");
        assert_eq!(rest.delete(&location).await?.status, 200);
        assert_eq!(rest.get(&location).await?.refusal(), (404, "not_found"));
    }
    Ok(())
}

#[tokio::test]
async fn a_patch_changes_what_it_names_and_only_from_the_state_it_was_made_for() -> Result<()> {
    let (_planes, rest) = planes().await?;
    let created = rest.post(BACKENDS, good_in("acme")).await?;
    let backend = created.header("location").to_owned();
    let changed = rest
        .with_header("if-match", created.header("etag"))?
        .patch(&backend, json!({ "config": { "namespace": null, "timeout": "2s" }, "name": "better" }))
        .await?;
    assert_eq!(changed.status, 200, "{}", changed.text);
    assert_ne!(changed.header("etag"), created.header("etag"));
    let config = &changed.json["config"];
    assert_eq!(
        (&changed.json["name"], &config["namespace"], &config["timeout"]),
        (&json!("better"), &Value::Null, &json!("2s"))
    );
    assert_eq!(config["endpoint"], "https://vault.internal:8200");

    let stale = rest.with_header("if-match", created.header("etag"))?;
    assert_eq!(
        stale.patch(&backend, json!({ "name": "lost" })).await?.refusal(),
        (412, "precondition_failed")
    );
    assert_eq!(stale.delete(&backend).await?.refusal(), (412, "precondition_failed"));
    assert_eq!(rest.get(&backend).await?.json["name"], "better");

    let wrong = rest.patch(&backend, json!({ "config": { "endpoint": null } })).await?;
    assert_eq!((wrong.refusal(), wrong.pointers()), ((400, "invalid_config"), vec!["/config/endpoint"]));
    assert_eq!(rest.post(&format!("{backend}/sync"), json!({})).await?.refusal(), (409, "wrong_mode"));
    Ok(())
}

#[tokio::test]
async fn an_endpoint_where_no_backend_may_be_is_refused_with_the_operators_setting() -> Result<()> {
    let (_planes, rest) = planes().await?;
    let at = |endpoint: &str| {
        let mut backend = good();
        backend["config"]["endpoint"] = json!(endpoint);
        backend
    };
    let elsewhere =
        ["https://127.0.0.2", "https://0x7f.2", "https://[::1]:8200", "https://[::ffff:169.254.169.254]"];
    for endpoint in elsewhere.into_iter().chain([
        "http://169.254.169.254",
        "https://0.0.0.0",
        "https://[64:ff9b::7f00:1]",
    ]) {
        let refused = rest.post(BACKENDS, at(endpoint)).await?;
        assert_eq!(refused.refusal(), (400, "invalid_config"), "{endpoint}");
        assert_eq!(refused.pointers(), ["/config/endpoint"], "{endpoint}");
        assert!(refused.text.contains("--egress-allow"), "{}", refused.text);
    }
    // What the operator named, what is private, and what does not resolve yet.
    for endpoint in
        ["http://127.0.0.1:9", "https://localhost:9", "https://10.255.0.1", "https://no-such-host.invalid"]
    {
        let made = rest.post(BACKENDS, at(endpoint)).await?.ok()?;
        let id = made["id"].as_str().context("id")?;
        let moved = rest
            .patch(&format!("{BACKENDS}/{id}"), json!({ "config": at("https://127.0.0.2")["config"] }))
            .await?;
        assert_eq!((moved.refusal(), moved.pointers()), ((400, "invalid_config"), vec!["/config/endpoint"]));
        rest.delete(&format!("{BACKENDS}/{id}")).await?.ok()?;
    }
    Ok(())
}

#[tokio::test]
async fn the_order_of_the_rules_is_kept_whichever_way_they_are_written() -> Result<()> {
    let (_planes, rest) = planes().await?;
    let object = r#"{"z/one":"secret/data/1","a/*":"secret/data/*","m/**":"secret/data/m/**"}"#;
    let array = r#"[{"pattern":"z/one","template":"secret/data/1"},{"template":"secret/data/*","pattern":"a/*"},{"pattern":"m/**","template":"secret/data/m/**"}]"#;
    for mapping in [object, array] {
        let body = good_but(json!({ "path_mapping": "HERE" })).to_string().replace("\"HERE\"", mapping);
        let created = rest.send(Method::POST, BACKENDS, Some(body)).await?;
        assert!(created.text.contains(&format!(r#""path_mapping":{object}"#)), "{}", created.text);
        let rules: Vec<_> = created.json["rules"].as_array().context("rules")?.iter().collect();
        assert_eq!(
            rules.iter().map(|rule| rule["pattern"].as_str()).collect::<Vec<_>>(),
            [Some("z/one"), Some("a/*"), Some("m/**")]
        );
        rest.delete(created.header("location")).await?.ok()?;
    }
    for twice in [
        r#"{"a/**":"x/**","a/**":"y/**"}"#,
        r#"[{"pattern":"a/**","template":"x/**"},{"pattern":"a/**","template":"y/**"}]"#,
        r#"[{"pattern":"a/**","pattern":"b/**","template":"x/**"}]"#,
    ] {
        let body = good_but(json!({ "path_mapping": "HERE" })).to_string().replace("\"HERE\"", twice);
        let refused = rest.send(Method::POST, BACKENDS, Some(body)).await?;
        assert_eq!(refused.refusal(), (400, "invalid_mapping"), "{twice}: {}", refused.text);
        assert!(refused.pointers()[0].starts_with("/path_mapping"), "{twice}");
    }
    Ok(())
}

#[tokio::test]
async fn backends_and_local_secrets_never_fight_for_a_path() -> Result<()> {
    let (_planes, rest) = planes().await?;
    let first = rest.post(BACKENDS, good()).await?.ok()?;
    let overlapping = good_but(
        json!({ "name": "other", "path_mapping": [{ "pattern": "*/x", "template": "secret/*/x" }] }),
    );
    let refused = rest.post(BACKENDS, overlapping).await?;
    assert_eq!(refused.refusal(), (409, "mapping_overlap"));
    for named in ["`*/x`", "`external/**`", "`good`", first["id"].as_str().context("id")?] {
        assert!(refused.text.contains(named), "{named}: {}", refused.text);
    }
    let same_name = rest
        .post(BACKENDS, good_but(json!({ "path_mapping": [{ "pattern": "b", "template": "b" }] })))
        .await?;
    assert_eq!((same_name.refusal(), same_name.pointers()), ((409, "already_exists"), vec!["/name"]));

    rest.put_data("apps/one", json!({})).await?;
    rest.put_data("apps/deep/two", json!({})).await?;
    let covering =
        json!({ "name": "covering", "path_mapping": [{ "pattern": "apps/**", "template": "secret/**" }] });
    let refused = rest.post(BACKENDS, good_but(covering.clone())).await?;
    assert_eq!(refused.refusal(), (409, "local_secrets_covered"));
    assert!(
        refused.text.contains("`apps/one`") && refused.text.contains("`apps/deep/two`"),
        "{}",
        refused.text
    );
    let mut adopting = good_but(covering);
    adopting["adopt"] = json!(true);
    let adopted = rest.post(BACKENDS, adopting).await?.ok()?;
    assert_eq!(
        rest.put("/v1/secrets/apps/one", json!({ "data": {} })).await?.refusal(),
        (409, "federated_read_only")
    );

    // A mapping that would capture the credential of another backend is a cycle too.
    let capture =
        json!({ "path_mapping": [{ "pattern": "infra/**", "template": "secret/**" }], "adopt": true });
    let id = adopted["id"].as_str().context("id")?;
    let refused = rest.patch(&format!("{BACKENDS}/{id}"), capture).await?;
    assert_eq!(
        (refused.status, refused.json["code"].as_str()),
        (400, Some("credential_cycle")),
        "{}",
        refused.text
    );
    rest.delete(&format!("{BACKENDS}/{id}")).await?.ok()?;
    assert_eq!(rest.get("/v1/secrets/apps/one").await?.ok()?["source"], "local");
    Ok(())
}

#[tokio::test]
async fn a_deleted_backend_leaves_no_path_and_no_login_behind() -> Result<()> {
    let federated = Federated::start().await?;
    let (rest, admin) = (federated.planes.rest(0)?, federated.bao.client()?);
    let logins = async || -> Result<usize> {
        let list = Method::from_bytes(b"LIST")?;
        let tokens = admin.call(list, "auth/token/accessors", None).await?;
        Ok(tokens["data"]["keys"].as_array().context("keys")?.len() - 1)
    };
    assert!(logins().await? > 0);
    let backend = format!("{BACKENDS}/{}", federated.backend);

    rest.patch(&backend, json!({ "enabled": false })).await?.ok()?;
    let disabled = rest.get("/v1/secrets/external/hashicorp/app/db").await?;
    assert_eq!(disabled.refusal(), (502, "backend_unreachable"));
    assert_eq!(rest.get(&format!("{backend}/status")).await?.ok()?["status"], "disabled");
    rest.patch(&backend, json!({ "enabled": true })).await?.ok()?;
    rest.get("/v1/secrets/external/hashicorp/app/db").await?.ok()?;

    assert_eq!(rest.delete(&backend).await?.ok()?["pending_nodes"], json!([]));
    assert_eq!(rest.get("/v1/secrets/external/hashicorp/app/db").await?.refusal(), (404, "not_found"));
    rest.put_data("external/hashicorp/app/db", json!({ "own": true })).await?;
    wait::until("every login is revoked", async || Ok((logins().await? == 0).then_some(()))).await
}
