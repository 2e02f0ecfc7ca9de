//! Refusals: each names the field that is wrong, says the same over REST and gRPC, and leaves nothing behind.

use anyhow::{Context as _, Result};
use reqwest::Method;
use scaivault_edge::error::grpc::error;
use scaivault_proto::federation::v1::backend::Config;
use scaivault_proto::federation::v1::{
    Backend, CreateBackendRequest, HashicorpVaultConfig, KvMount, Mode, PathRule,
};
use scaivault_tests::authority::Authority;
use scaivault_tests::planes::{self, CREDENTIAL, Options, Planes, Rest};
use serde_json::{Value, json};

const BACKENDS: &str = "/v1/federation/backends";

/// The planes with a stored credential, and the operator's client.
async fn planes() -> Result<(Planes, Rest)> {
    let planes = Planes::start(Options::default()).await?;
    let rest = planes.rest(0)?;
    rest.put_data(CREDENTIAL, json!({ "role_id": "role", "secret_id": "canary-secret-id" })).await?;
    rest.put_data("infra/half", json!({ "role_id": "role" })).await?;
    Ok((planes, rest))
}

fn good() -> Value {
    planes::backend(
        "good",
        "https://vault.internal:8200",
        CREDENTIAL,
        json!([{ "pattern": "a/**", "template": "s/**" }]),
    )
}

#[tokio::test]
async fn what_is_wrong_is_named_and_nothing_is_stored() -> Result<()> {
    let (_planes, rest) = planes().await?;
    for (pointer, value, code) in [
        ("/colour", "1", "invalid_request"),
        ("/config/colour", "1", "invalid_config"),
        ("/path_mapping/0/colour", "1", "invalid_mapping"),
        ("/type", r#""keepass""#, "invalid_config"),
        ("/type", "7", "invalid_config"),
        ("/mode", r#""both""#, "invalid_config"),
        ("/sync_interval", r#""900ms""#, "invalid_config"),
        ("/sync_interval", r#""25h""#, "invalid_config"),
        ("/sync_interval", r#""often""#, "invalid_config"),
        ("/write_policy", r#""write_through""#, "invalid_config"),
        ("/write_policy", r#""sometimes""#, "invalid_config"),
        ("/conflict_policy", r#""manual""#, "invalid_config"),
        ("/max_staleness", r#""10ms""#, "invalid_config"),
        ("/history_depth", "1000", "invalid_config"),
        ("/enabled", r#""yes""#, "invalid_request"),
        ("/config", "[]", "invalid_config"),
        ("/config/tls_verify", r#""yes""#, "invalid_config"),
        ("/config/timeout", r#""soon""#, "invalid_config"),
        ("/path_mapping", "{}", "invalid_mapping"),
        ("/path_mapping", "1", "invalid_mapping"),
    ] {
        let mut body = good();
        put(&mut body, pointer, serde_json::from_str(value)?);
        let refused = rest.post(BACKENDS, body).await?;
        assert_eq!((refused.refusal(), refused.pointers()), ((400, code), vec![pointer]), "{}", refused.text);
        assert_eq!(refused.header("content-type"), "application/problem+json");
    }
    for missing in ["name", "type", "config", "path_mapping", "mode"] {
        let mut body = good();
        body.as_object_mut().context("an object")?.remove(missing);
        let refused = rest.post(BACKENDS, body).await?;
        assert_eq!((refused.status, refused.pointers()), (400, vec![format!("/{missing}").as_str()]));
    }
    let twice = good().to_string().replacen('{', r#"{"name":"first","#, 1);
    for body in [twice.as_str(), "", "{", "[]", "null", "7"] {
        let refused = rest.send(Method::POST, BACKENDS, Some(body.into())).await?;
        assert_eq!(refused.refusal(), (400, "invalid_request"), "{body}");
    }
    assert_eq!(rest.get(BACKENDS).await?.ok()?["backends"], json!([]));
    Ok(())
}

/// Sets what `pointer` points at; the last member need not be there.
fn put(body: &mut Value, pointer: &str, value: Value) {
    let (parent, member) = pointer.rsplit_once('/').expect("a pointer");
    match body.pointer_mut(parent).expect("the parent is there") {
        Value::Array(items) => items[member.parse::<usize>().expect("an index")] = value,
        parent => parent[member] = value,
    }
}

/// The same in protobuf.
fn put_proto(backend: &mut Backend, config: &mut HashicorpVaultConfig, pointer: &str, value: &Value) {
    let text = || value.as_str().unwrap_or_default().to_owned();
    match pointer {
        "/name" => backend.name = text(),
        "/config/endpoint" => config.endpoint = text(),
        "/config/auth_method" => config.auth_method = text(),
        "/config/auth_config_path" => config.auth_config_path = text(),
        "/config/ca_cert" => config.ca_cert = text(),
        "/config/namespace" => config.namespace = text(),
        "/config/tls_verify" => config.tls_verify = value.as_bool(),
        "/config/kv_version" => config.kv = Some(KvMount { path: "kv".into(), version: 3 }),
        "/config/timeout" => backend.timeout = Some(prost_types::Duration { seconds: 7200, nanos: 0 }),
        "/path_mapping/0" => {
            let member = |name: &str| value[name].as_str().unwrap_or_default().to_owned();
            backend.rules = vec![PathRule {
                pattern: member("pattern"),
                template: member("template"),
                ..Default::default()
            }];
        }
        other => panic!("{other} is not in this table"),
    }
}

#[tokio::test]
async fn rest_and_grpc_refuse_alike() -> Result<()> {
    let (planes, rest) = planes().await?;
    let mut grpc = planes.federation_client(0)?;
    let rule = |pattern: &str, template: &str| json!({ "pattern": pattern, "template": template });
    for (pointer, value, code) in [
        ("/name", json!("No Name"), "invalid_request"),
        ("/name", json!(""), "invalid_request"),
        ("/config/endpoint", json!("vault"), "invalid_config"),
        ("/config/endpoint", json!("https://u:p@a"), "invalid_config"),
        ("/config/auth_method", json!("ldap"), "invalid_config"),
        ("/config/auth_config_path", json!("a//b"), "invalid_config"),
        ("/config/auth_config_path", json!("no/such"), "credential_unusable"),
        ("/config/auth_config_path", json!("infra/half"), "credential_unusable"),
        ("/config/auth_config_path", json!("a/x"), "credential_cycle"),
        ("/config/ca_cert", json!("no PEM"), "invalid_config"),
        ("/config/tls_verify", json!(false), "invalid_config"),
        ("/config/namespace", json!("a\nb"), "invalid_config"),
        ("/config/kv_version", json!(3), "invalid_config"),
        ("/config/timeout", json!("2h"), "invalid_config"),
        ("/path_mapping/0", rule("a/b*", "b"), "invalid_mapping"),
        ("/path_mapping/0", rule("a/**", "b"), "invalid_mapping"),
        ("/path_mapping/0", rule("a/*/**", "b/**/*"), "invalid_mapping"),
        ("/path_mapping/0", rule("a/**/**", "b/**/**"), "invalid_mapping"),
        ("/path_mapping/0", rule("a/../b", "b"), "invalid_mapping"),
        ("/path_mapping/0", rule("", "b"), "invalid_mapping"),
    ] {
        let mut body = good();
        put(&mut body, pointer, value.clone());
        if pointer == "/config/kv_version" {
            put(&mut body, "/config/kv_mount", json!("kv"));
        }
        let by_rest = rest.post(BACKENDS, body).await?;

        let mut config = HashicorpVaultConfig {
            endpoint: "https://vault.internal:8200".into(),
            auth_method: "approle".into(),
            auth_config_path: CREDENTIAL.into(),
            ..Default::default()
        };
        let rules = vec![PathRule { pattern: "a/**".into(), template: "s/**".into(), ..Default::default() }];
        let mut backend =
            Backend { name: "good".into(), rules, mode: Mode::Proxy.into(), ..Default::default() };
        put_proto(&mut backend, &mut config, pointer, &value);
        backend.config = Some(Config::HashicorpVault(config));
        let request = CreateBackendRequest { backend: Some(backend), ..Default::default() };
        let by_grpc = error(&grpc.create_backend(request).await.expect_err(code));

        let pointers: Vec<_> =
            by_grpc.violations.iter().map(|violation| violation.pointer.as_str()).collect();
        assert_eq!((by_grpc.reason.code(), &pointers[..]), (code, &[pointer][..]), "{value}: {by_grpc:?}");
        assert_eq!(
            (by_rest.refusal(), by_rest.pointers()),
            ((400, code), pointers),
            "{value}: {}",
            by_rest.text
        );
        assert_eq!(by_rest.json["detail"], *by_grpc.message, "{value}");
        assert_eq!(by_rest.json["next_step"].as_str(), by_grpc.next_step.as_deref(), "{value}");
        assert!(!by_rest.text.contains("canary"), "{}", by_rest.text);
    }
    assert_eq!(rest.get(BACKENDS).await?.ok()?["backends"], json!([]));
    Ok(())
}

#[tokio::test]
async fn whoever_redirects_a_credential_must_be_able_to_read_it() -> Result<()> {
    let (_planes, rest) = planes().await?;
    rest.put_data("mine/approle", json!({ "role_id": "r", "secret_id": "s" })).await?;
    let backend = rest.post(BACKENDS, good()).await?.header("location").to_owned();
    let scopes = ["federation:read", "federation:write"];
    let mine = |others: Value| {
        let mut rules = json!([{ "path": "mine/**", "capabilities": ["read", "write"] }]);
        rules.as_array_mut().expect("an array").push(others);
        rules
    };
    let writer = mine(json!({ "path": "a/**", "capabilities": ["read", "write"] }));
    let writer = rest.with_token(&rest.issue("writer", &scopes, writer).await?.token)?;
    let reader = mine(json!({ "path": "infra/**", "capabilities": ["read"] }));
    let reader = rest.with_token(&rest.issue("reader", &scopes, reader).await?.token)?;
    let ca = Authority::new()?.pem();
    for patch in [
        json!({ "config": { "endpoint": "https://thief.example" } }),
        json!({ "config": { "ca_cert": ca } }),
        json!({ "config": { "tls_verify": false } }),
        json!({ "config": { "namespace": "thief" } }),
        json!({ "config": { "auth_method": "token" } }),
        json!({ "config": { "auth_mount": "thief" } }),
        json!({ "config": { "auth_config_path": "infra/other" } }),
    ] {
        let refused = writer.patch(&backend, patch.clone()).await?;
        assert_eq!(
            (refused.refusal(), refused.pointers()),
            ((403, "permission_denied"), vec!["/config/auth_config_path"]),
            "{patch}"
        );
    }
    for patch in [
        json!({ "path_mapping": { "a/**": "s/data/thief/**" } }),
        json!({ "path_mapping": { "mine/app": "secret/data/x", "a/**": "s/data/**" } }),
    ] {
        let refused = reader.patch(&backend, patch.clone()).await?;
        assert_eq!(refused.refusal(), (403, "permission_denied"), "{patch}");
        assert!(refused.pointers()[0].starts_with("/path_mapping"), "{patch}: {}", refused.text);
    }
    for (who, config) in [(&writer, CREDENTIAL), (&reader, CREDENTIAL)] {
        let new = planes::backend("new", "https://vault.internal:8200", config, json!({ "a/new": "s/new" }));
        assert_eq!(who.post(BACKENDS, new).await?.refusal(), (403, "permission_denied"));
    }
    // What the endpoint answers is what `a/**` shows.
    let elsewhere = json!({ "config": { "endpoint": "https://vault2.internal:8200" } });
    assert_eq!(reader.patch(&backend, elsewhere.clone()).await?.refusal(), (403, "permission_denied"));
    // What decides neither is free: and so is one's own credential.
    writer.patch(&backend, json!({ "name": "renamed", "enabled": false })).await?.ok()?;
    writer.patch(&backend, json!({ "config": { "auth_config_path": "mine/approle" } })).await?.ok()?;
    writer.patch(&backend, elsewhere).await?.ok()?;
    assert_eq!(rest.get(&backend).await?.json["config"]["auth_config_path"], "mine/approle");
    Ok(())
}
