use axum::Router;
use http::Method;
use serde_json::{Value, json};

use super::{Answered, call, front, get, refusal};

const BACKENDS: &str = "/v1/federation/backends";
const BACKEND: &str = "/v1/federation/backends/fed_abcdefghijklmnop";

/// The example of the reference.
const REFERENCE: &str = r#"{
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
}"#;

/// The example of the deep dive.
const DEEP_DIVE: &str = r#"{
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
  }"#;

/// The example of the reference in mode `sync`.
const AWS: &str = r#"{
  "name": "aws-prod",
  "type": "aws-secrets-manager",
  "config": {
    "region": "us-east-1",
    "credentials_path": "infra/aws/sm/reader"
  },
  "path_mapping": {
    "external/aws/**": "prod/**"
  },
  "mode": "sync",
  "sync_interval": "15m"
}"#;

async fn create(router: &Router, body: &str) -> Answered {
    call(router, Method::POST, BACKENDS, &["content-type: application/json"], body).await
}

async fn patch(router: &Router, headers: &[&str], body: &str) -> Answered {
    let headers = [&["content-type: application/merge-patch+json"], headers].concat();
    call(router, Method::PATCH, BACKEND, &headers, body).await
}

/// The reference's example with one thing changed.
fn with(change: impl FnOnce(&mut Value)) -> String {
    let mut body = serde_json::from_str(REFERENCE).unwrap();
    change(&mut body);
    body.to_string()
}

#[tokio::test]
async fn the_examples_of_the_documents_are_taken_as_they_stand() {
    let (_, router) = front();
    for example in [REFERENCE, DEEP_DIVE] {
        let answer = create(&router, example).await;
        assert_eq!(answer.status, 201, "{:?}", answer.body);
        assert_eq!((answer.header("location"), answer.header("etag")), (BACKEND, "\"e1\""));
        assert_eq!(answer.header("x-scaivault-revision"), "41");
        let (sent, shown): (Value, _) = (serde_json::from_str(example).unwrap(), answer.json());
        for (name, value) in sent.as_object().unwrap() {
            if name != "config" {
                assert_eq!(&shown[name], value);
            }
        }
        for (name, value) in sent["config"].as_object().unwrap() {
            assert_eq!(&shown["config"][name], value);
        }
        assert_eq!(
            shown["rules"][0],
            json!({"pattern": "external/hashicorp/**", "template": "secret/data/**"})
        );
        assert_eq!((&shown["id"], &shown["enabled"]), (&json!("fed_abcdefghijklmnop"), &json!(true)));
    }
    let aws = create(&router, AWS).await;
    assert_eq!(aws.refusal(), refusal(400, "invalid_config", "/type"));
    assert!(aws.json()["detail"].as_str().unwrap().contains("hashicorp-vault"));
}

#[tokio::test]
async fn every_field_of_a_configuration_comes_back() {
    let (fake, router) = front();
    let body = r#"{"name":"v","type":"hashicorp-vault","mode":"proxy","enabled":false,"adopt":true,
        "config":{"endpoint":"https://v","auth_method":"token","auth_config_path":"c","auth_mount":"m",
        "tls_verify":false,"namespace":"n","ca_cert":"PEM","kv_mount":"kv","kv_version":2,
        "lease_policies":["p"],"allow_static_on_nodes":true,"timeout":"1m30s"},
        "path_mapping":[{"pattern":"z/**","template":"a/**"},{"pattern":"a/*","template":"b/*"}]}"#;
    let shown = create(&router, body).await;
    let sent: Value = serde_json::from_str(body).unwrap();
    assert_eq!((&shown.json()["config"], &shown.json()["rules"]), (&sent["config"], &sent["path_mapping"]));
    assert!(
        std::str::from_utf8(&shown.body).unwrap().contains(r#""path_mapping":{"z/**":"a/**","a/*":"b/*"}"#)
    );
    assert_eq!(shown.json()["enabled"], false);
    assert!(fake.asked.lock().unwrap().contains("adopt: true"));
    let list = get(&router, BACKENDS).await.json();
    assert_eq!((&list["backends"][0], &list["next_page_token"]), (&shown.json(), &json!("")));
    let read = get(&router, BACKEND).await;
    assert_eq!((read.json(), read.header("etag")), (shown.json(), "\"e1\""));
}

#[tokio::test]
async fn a_wrong_field_is_named_by_its_pointer() {
    let (_, router) = front();
    for (body, code, pointer, says) in [
        (with(|b| b["foo"] = json!(1)), "invalid_request", "/foo", "no field"),
        (with(|b| b["config"]["foo"] = json!(1)), "invalid_config", "/config/foo", "`endpoint`"),
        (with(|b| b["name"] = json!(7)), "invalid_request", "/name", "not a string"),
        (
            with(|b| b["config"]["tls_verify"] = json!("yes")),
            "invalid_config",
            "/config/tls_verify",
            "not a boolean",
        ),
        (with(|b| b["config"] = json!([])), "invalid_config", "/config", "not an object"),
        (with(|b| b["config"]["timeout"] = json!("5")), "invalid_config", "/config/timeout", "duration"),
        (with(|b| b["config"]["kv_mount"] = json!("kv")), "invalid_config", "/config/kv_version", "required"),
        (with(|b| b["config"]["kv_version"] = json!(2)), "invalid_config", "/config/kv_mount", "required"),
        (
            with(|b| _ = b["config"].as_object_mut().unwrap().remove("endpoint")),
            "invalid_config",
            "/config/endpoint",
            "is required",
        ),
        (with(|b| _ = b.as_object_mut().unwrap().remove("mode")), "invalid_config", "/mode", "is required"),
        (with(|b| b["mode"] = json!("sync")), "invalid_config", "/mode", "proxy"),
        (with(|b| b["sync_interval"] = json!("15m")), "invalid_config", "/sync_interval", "sync"),
        (with(|b| b["type"] = json!("etcd")), "invalid_config", "/type", "hashicorp-vault"),
        (with(|b| b["path_mapping"] = json!("x")), "invalid_mapping", "/path_mapping", "an object"),
        (with(|b| b["path_mapping"] = json!({"a": 1})), "invalid_mapping", "/path_mapping/a", "not a string"),
        (
            with(|b| b["path_mapping"] = json!([{"pattern": "a"}])),
            "invalid_mapping",
            "/path_mapping/0/template",
            "is required",
        ),
        (REFERENCE.replace(r#""mode""#, r#""name":"x","mode""#), "invalid_request", "/name", "twice"),
        (
            REFERENCE.replace(r#"secret/data/**""#, r#"x/**","external/hashicorp/**":"y/**""#),
            "invalid_mapping",
            "/path_mapping",
            "twice",
        ),
    ] {
        let answer = create(&router, &body).await;
        assert_eq!(answer.refusal(), refusal(400, code, pointer), "{body}");
        let detail = answer.json()["errors"][0]["detail"].as_str().unwrap().to_owned();
        assert!(detail.contains(says), "{detail}");
    }
}

#[tokio::test]
async fn a_patch_changes_what_it_names_and_nothing_else() {
    let (_, router) = front();
    let before = create(&router, DEEP_DIVE).await.json();
    let change =
        r#"{"config":{"namespace":null,"timeout":"2s"},"path_mapping":{"z/**":"x/**","b/**":"y/**"}}"#;
    let answer = patch(&router, &[], change).await;
    assert_eq!((answer.status.as_u16(), answer.header("etag")), (200, "\"e11\""));
    let mut expected = before.clone();
    expected["config"].as_object_mut().unwrap().remove("namespace");
    expected["config"]["timeout"] = json!("2s");
    expected["path_mapping"] = json!({"z/**": "x/**", "b/**": "y/**"});
    let after = answer.json();
    for name in ["name", "type", "config", "path_mapping", "mode", "enabled"] {
        assert_eq!(after[name], expected[name], "{name}");
    }
    let first = json!({"pattern": "z/**", "template": "x/**"});
    assert_eq!(after["rules"][0], first, "the order of the patch");
    let kept = patch(&router, &[], r#"{"enabled":false}"#).await.json();
    assert_eq!((&kept["rules"][0], &kept["enabled"]), (&first, &json!(false)), "the order of the backend");
}

#[tokio::test]
async fn a_wrong_patch_is_named_by_its_pointer() {
    let (_, router) = front();
    create(&router, REFERENCE).await;
    for (change, code, pointer) in [
        ("[]", "invalid_request", ""),
        (r#"{"foo":1}"#, "invalid_request", "/foo"),
        (r#"{"name":null}"#, "invalid_request", "/name"),
        (r#"{"config":{"foo":1}}"#, "invalid_config", "/config/foo"),
        (r#"{"config":{"endpoint":null}}"#, "invalid_config", "/config/endpoint"),
        (r#"{"path_mapping":{"a":"x","a":"y"}}"#, "invalid_mapping", "/path_mapping"),
        (r#"{"name":"a","name":"b"}"#, "invalid_request", ""),
        (r#"{"mode":"sync"}"#, "invalid_config", "/mode"),
    ] {
        assert_eq!(patch(&router, &[], change).await.refusal(), refusal(400, code, pointer), "{change}");
    }
}

#[tokio::test]
async fn a_patch_without_an_etag_is_tried_once_more_after_a_race() {
    let (fake, router) = front();
    create(&router, REFERENCE).await;
    *fake.races.lock().unwrap() = 1;
    assert_eq!(patch(&router, &[], r#"{"enabled":false}"#).await.status, 200);
    *fake.races.lock().unwrap() = 2;
    assert_eq!(
        patch(&router, &[], r#"{"enabled":true}"#).await.refusal(),
        refusal(412, "precondition_failed", "")
    );
}

#[tokio::test]
async fn a_patch_with_an_etag_is_of_that_configuration_only() {
    let (fake, router) = front();
    create(&router, REFERENCE).await;
    let stale = patch(&router, &["if-match: \"e0\""], r#"{"enabled":false}"#).await;
    assert_eq!(stale.refusal(), refusal(412, "precondition_failed", ""));
    *fake.races.lock().unwrap() = 1;
    assert_eq!(patch(&router, &["if-match: \"e1\""], r#"{"enabled":false}"#).await.status, 412);
    assert_eq!(patch(&router, &["if-match: \"e1+\""], r#"{"enabled":false}"#).await.status, 200);
    assert_eq!(patch(&router, &["if-match: *"], r#"{"enabled":true}"#).await.status, 200);
}

#[tokio::test]
async fn a_delete_names_the_nodes_that_do_not_know_yet() {
    let (fake, router) = front();
    let answer = call(&router, Method::DELETE, BACKEND, &["if-match: \"e1\""], "").await;
    assert_eq!((answer.status.as_u16(), answer.json()), (200, json!({"pending_nodes": ["n1"]})));
    assert!(fake.asked.lock().unwrap().contains("etag: \"e1\""));
}

#[tokio::test]
async fn the_status_has_the_fields_of_the_reference() {
    let (_, router) = front();
    let status = get(&router, &format!("{BACKEND}/status")).await.json();
    for (name, value) in [
        ("id", json!("fed_abcdefghijklmnop")),
        ("name", json!("hashicorp-production")),
        ("status", json!("healthy")),
        ("last_sync", Value::Null),
        ("last_sync_duration_ms", Value::Null),
        ("secrets_synced", Value::Null),
    ] {
        assert_eq!(status.get(name), Some(&value), "{name}");
    }
    assert_eq!(
        (&status["connection"]["status"], &status["connection"]["latency_ms"]),
        (&json!("connected"), &json!(15))
    );
    assert_eq!((&status["nodes"][0]["name"], &status["generation"]), (&json!("n1"), &json!(4)));
}

#[tokio::test]
async fn a_proxied_backend_is_not_synced() {
    let (_, router) = front();
    for body in ["", "{}"] {
        let answer = call(&router, Method::POST, &format!("{BACKEND}/sync"), &[], body).await;
        assert_eq!(answer.refusal(), refusal(409, "wrong_mode", ""));
    }
    let unknown = call(&router, Method::POST, &format!("{BACKEND}/sync"), &[], r#"{"force":true}"#).await;
    assert_eq!(unknown.refusal(), refusal(400, "invalid_request", "/force"));
}

#[tokio::test]
async fn events_are_cloud_events() {
    let (_, router) = front();
    let list = get(&router, "/v1/federation/events?page_size=1").await.json();
    let event = json!({
        "specversion": "1.0", "id": "1", "type": "federation.backend.unreachable",
        "source": "/v1/federation/backends/fed_a", "subject": "hashicorp-production",
        "time": "2026-01-01T00:00:00.250Z", "datacontenttype": "application/json", "data": {"class": "timeout"},
    });
    assert_eq!(list, json!({"events": [event], "next_page_token": "2"}));
}
