use axum::Router;
use http::Method;
use scaivault_proto::federation::v1 as federation;
use serde_json::{Value, json};

use super::fake::{PROXIED, RUN};
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

/// The examples of the deep dive for the other stores.
const AWS_WITH_A_ROLE: &str = r#"{
    "name": "aws-prod-sm",
    "type": "aws-secrets-manager",
    "config": {
      "region": "us-east-1",
      "credentials_path": "infra/aws/sm/reader",
      "role_arn": "arn:aws:iam::123456789012:role/scaivault-sm-reader"
    },
    "path_mapping": {
      "external/aws/**": "prod/**"
    },
    "mode": "sync",
    "sync_interval": "15m"
  }"#;
const AZURE: &str = r#"{
  "name": "azure-prod-kv",
  "type": "azure-key-vault",
  "config": {
    "vault_url": "https://acme-prod.vault.azure.net",
    "auth_method": "managed_identity"
  },
  "path_mapping": {
    "external/azure/**": "**"
  },
  "mode": "proxy"
}"#;
const GCP: &str = r#"{
  "name": "gcp-prod-sm",
  "type": "google-secret-manager",
  "config": {
    "project_id": "acme-prod",
    "credentials_path": "infra/gcp/sm/reader-sa"
  },
  "path_mapping": {
    "external/gcp/**": "**"
  },
  "mode": "sync",
  "sync_interval": "30m"
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
    for example in [REFERENCE, DEEP_DIVE, AWS, AWS_WITH_A_ROLE, AZURE, GCP] {
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
        let (pattern, template) = sent["path_mapping"].as_object().unwrap().iter().next().unwrap();
        assert_eq!(shown["rules"][0], json!({"pattern": pattern, "template": template}));
        assert_eq!((&shown["id"], &shown["enabled"]), (&json!("fed_abcdefghijklmnop"), &json!(true)));
    }
}

#[tokio::test]
async fn a_field_of_another_store_is_named() {
    let (_, router) = front();
    for (example, field) in
        [(REFERENCE, "region"), (AWS, "vault_url"), (AZURE, "project_id"), (GCP, "region")]
    {
        let mut body: Value = serde_json::from_str(example).unwrap();
        body["config"][field] = json!("x");
        let answer = create(&router, &body.to_string()).await;
        assert_eq!(answer.refusal(), refusal(400, "invalid_config", &format!("/config/{field}")));
    }
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
        (with(|b| b["mode"] = json!("both")), "invalid_config", "/mode", "`proxy` or `sync`"),
        (with(|b| b["sync_interval"] = json!("15")), "invalid_config", "/sync_interval", "duration"),
        (with(|b| b["sync_interval"] = json!(15)), "invalid_config", "/sync_interval", "not a string"),
        (with(|b| b["write_policy"] = json!("on")), "invalid_config", "/write_policy", "`write_through`"),
        (with(|b| b["conflict_policy"] = json!("")), "invalid_config", "/conflict_policy", "`manual`"),
        (with(|b| b["prefetch"] = json!("yes")), "invalid_config", "/prefetch", "not a boolean"),
        (with(|b| b["max_staleness"] = json!("-1s")), "invalid_config", "/max_staleness", "duration"),
        (with(|b| b["history_depth"] = json!(0)), "invalid_config", "/history_depth", "from 1 on"),
        (with(|b| b["force"] = json!(true)), "invalid_request", "/force", "changes"),
        (
            with(|b| {
                b["path_mapping"] = json!([{"pattern": "x", "template": "x"},
                {"pattern": "a", "template": "b", "mode": "both"}])
            }),
            "invalid_config",
            "/path_mapping/1/mode",
            "`proxy` or `sync`",
        ),
        (
            with(|b| b["path_mapping"] = json!([{"pattern": "a", "template": "b", "sync_interval": "1"}])),
            "invalid_config",
            "/path_mapping/0/sync_interval",
            "duration",
        ),
        (
            with(|b| b["path_mapping"] = json!([{"pattern": "a", "template": "b", "separators": "-"}])),
            "invalid_mapping",
            "/path_mapping/0/separators",
            "no field",
        ),
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
async fn another_type_takes_nothing_of_the_old_store_over() {
    let (_, router) = front();
    create(&router, &with(|b| b["history_depth"] = json!(3))).await;
    let change = |config: Value| json!({"type": "google-secret-manager", "config": config}).to_string();
    let nothing = patch(&router, &[], r#"{"type":"google-secret-manager"}"#).await;
    assert_eq!(nothing.refusal(), refusal(400, "invalid_request", "/config"));
    let after = patch(&router, &[], &change(json!({"project_id": "acme", "credentials_path": "c"}))).await;
    assert_eq!(after.status, 200, "{:?}", after.body);
    for member in ["endpoint", "auth_method", "namespace"] {
        assert_eq!(after.json()["config"].get(member), None, "{member}");
    }
    assert_eq!(after.json()["history_depth"], json!(10), "the fake's default, and not 3");
    let again = patch(&router, &[], &change(json!({"endpoint": "https://sm"}))).await.json();
    assert_eq!(again["config"]["project_id"], "acme", "the same type is no other store");
}

#[tokio::test]
async fn defaults_follow_what_they_come_from() {
    let config = async |before: Value, change: Value| {
        let (_, router) = front();
        let kind = before.get("region").map_or("hashicorp-vault", |_| "aws-secrets-manager");
        let body = with(|b| (b["type"], b["config"]) = (json!(kind), before));
        assert_eq!(create(&router, &body).await.status, 201, "{body}");
        let answer = patch(&router, &[], &json!({"config": change}).to_string()).await;
        assert_eq!(answer.status, 200, "{:?}", answer.body);
        answer.json()["config"].clone()
    };
    let role = json!({"region": "eu-central-1", "credentials_path": "c", "role_arn": "r", "external_id": "x",
        "session_duration": "2h"});
    let after = config(role.clone(), json!({"role_arn": null})).await;
    assert_eq!((after.get("external_id"), after.get("session_duration")), (None, None));
    let after = config(role.clone(), json!({"credentials_path": null})).await;
    assert_eq!((after.get("external_id"), &after["session_duration"]), (None, &json!("2h")));
    let after = config(role, json!({"role_arn": "s"})).await;
    assert_eq!((&after["external_id"], &after["session_duration"]), (&json!("x"), &json!("2h")));

    // As the service gives them: defaults filled in.
    let vault = json!({"endpoint": "https://a:8200", "auth_method": "aws", "auth_role": "r", "auth_mount": "aws",
        "aws_server_id": "a", "aws_region": "us-east-1"});
    let after = config(vault.clone(), json!({"endpoint": "https://b:8200"})).await;
    assert_eq!(after.get("aws_server_id"), None);
    let after = config(vault, json!({"auth_method": "gcp"})).await;
    for member in ["auth_mount", "aws_server_id", "aws_region"] {
        assert_eq!(after.get(member), None, "{member}");
    }
    let chosen = json!({"endpoint": "https://a:8200", "auth_method": "aws", "auth_role": "r", "auth_mount": "team/aws",
        "aws_server_id": "vault.example", "aws_region": "eu-central-1"});
    let after = config(chosen.clone(), json!({"endpoint": "https://b:8200"})).await;
    for member in ["auth_mount", "aws_server_id", "aws_region"] {
        assert_eq!(after[member], chosen[member], "{member}");
    }
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
        (r#"{"mode":"both"}"#, "invalid_config", "/mode"),
        (r#"{"mode":null}"#, "invalid_config", "/mode"),
        (r#"{"history_depth":0}"#, "invalid_config", "/history_depth"),
        (r#"{"rules":[]}"#, "invalid_request", "/rules"),
    ] {
        assert_eq!(patch(&router, &[], change).await.refusal(), refusal(400, code, pointer), "{change}");
    }
}

/// A backend that is synced but for one subtree.
fn synced() -> String {
    with(|b| {
        b["mode"] = json!("sync");
        b["sync_interval"] = json!("1h30m");
        b["prefetch"] = json!(true);
        b["max_staleness"] = json!("1m");
        b["history_depth"] = json!(3);
        b["write_policy"] = json!("write_through");
        b["conflict_policy"] = json!("manual");
        b["path_mapping"] = json!([
            {"pattern": "z/x/**", "template": "kv/x/**", "mode": "proxy"},
            {"pattern": "z/y/**", "template": "kv/y/**", "sync_interval": "30s", "write_policy": "local_only",
             "conflict_policy": "local_wins"},
            {"pattern": "a/**", "template": "kv/**"},
        ]);
    })
}

#[tokio::test]
async fn what_rules_override_comes_back_in_their_order() {
    let (_, router) = front();
    let (sent, answer) =
        (serde_json::from_str::<Value>(&synced()).unwrap(), create(&router, &synced()).await);
    let shown = answer.json();
    assert_eq!(shown["rules"], sent["path_mapping"]);
    let mapping = r#""path_mapping":{"z/x/**":"kv/x/**","z/y/**":"kv/y/**","a/**":"kv/**"}"#;
    assert!(std::str::from_utf8(&answer.body).unwrap().contains(mapping), "{:?}", answer.body);
    for name in [
        "mode",
        "sync_interval",
        "prefetch",
        "max_staleness",
        "history_depth",
        "write_policy",
        "conflict_policy",
    ] {
        assert_eq!(shown[name], sent[name], "{name}");
    }
}

#[tokio::test]
async fn what_is_left_out_has_its_default() {
    let (_, router) = front();
    let shown = create(&router, REFERENCE).await.json();
    for (name, value) in [
        ("write_policy", json!("disabled")),
        ("conflict_policy", json!("backend_wins")),
        ("prefetch", json!(false)),
        ("history_depth", json!(10)),
    ] {
        assert_eq!(shown[name], value, "{name}");
    }
    assert_eq!((shown.get("sync_interval"), shown.get("max_staleness")), (None, None));
}

#[tokio::test]
async fn an_interval_is_kept_in_mode_proxy_for_the_day_that_it_is_needed() {
    let (_, router) = front();
    let shown = create(&router, &with(|b| b["sync_interval"] = json!("15m"))).await.json();
    assert_eq!((&shown["mode"], &shown["sync_interval"]), (&json!("proxy"), &json!("15m")));
    assert_eq!(patch(&router, &[], r#"{"mode":"sync"}"#).await.json()["sync_interval"], "15m");
}

#[tokio::test]
async fn a_patch_of_something_else_keeps_what_rules_override() {
    let (_, router) = front();
    let before = create(&router, &synced()).await.json();
    let after = patch(&router, &[], r#"{"enabled":false,"history_depth":null}"#).await.json();
    assert_eq!((&after["rules"], &after["history_depth"]), (&before["rules"], &json!(10)));
    for name in ["mode", "sync_interval", "prefetch", "max_staleness", "write_policy", "conflict_policy"] {
        assert_eq!(after[name], before[name], "{name}");
    }
    let again = json!({"path_mapping": after["rules"]}).to_string();
    assert_eq!(patch(&router, &[], &again).await.json()["rules"], before["rules"], "an answer's rules");
    let object = json!({"path_mapping": {"a/**": "kv/**"}}).to_string();
    let rules = patch(&router, &[], &object).await.json()["rules"].clone();
    assert_eq!(rules, json!([{"pattern": "a/**", "template": "kv/**"}]), "a mapping is replaced whole");
}

#[tokio::test]
async fn who_changes_a_backend_may_accept_that_copies_are_erased() {
    let (fake, router) = front();
    create(&router, REFERENCE).await;
    let forced = async |query: &str, body: &str| {
        let uri = format!("{BACKEND}{query}");
        assert_eq!(call(&router, Method::PATCH, &uri, &[], body).await.status, 200);
        fake.asked.lock().unwrap().contains("force: true")
    };
    assert!(!forced("", "{}").await && !forced("?force=false", "{}").await);
    assert!(forced("?force=true", "{}").await && forced("", r#"{"force":true}"#).await);
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

/// What the fake's test finds.
fn found() -> Value {
    let check = |name, outcome, next_step, latency_ms: Option<u64>| {
        json!({"name": name, "outcome": outcome, "detail": "found", "next_step": next_step,
               "latency_ms": latency_ms})
    };
    json!({"passed": false, "checks": [
        check("login", "ok", "", Some(7)), check("list", "failed", "allow it", Some(3)),
        check("read", "skipped", "", None),
    ]})
}

#[tokio::test]
async fn a_test_that_fails_is_an_answer_and_no_error() {
    let (fake, router) = front();
    for body in ["", "{}"] {
        let answer = call(&router, Method::POST, &format!("{BACKEND}/test"), &[], body).await;
        assert_eq!((answer.status.as_u16(), answer.json()), (200, found()));
    }
    assert!(fake.asked.lock().unwrap().contains("TestBackendRequest { id: \"fed_abcdefghijklmnop\" }"));
    let wrong = call(&router, Method::POST, &format!("{BACKEND}/test"), &[], r#"{"x":1}"#).await;
    assert_eq!(wrong.refusal(), refusal(400, "invalid_request", "/x"));
}

#[tokio::test]
async fn a_configuration_is_validated_and_not_stored() {
    let (fake, router) = front();
    let headers = ["content-type: application/json"];
    let validate = async |query: &str| {
        call(&router, Method::POST, &format!("{BACKENDS}?validate_only={query}"), &headers, REFERENCE).await
    };
    let tried = validate("true").await;
    assert_eq!((tried.status.as_u16(), &tried.json()["test"]), (200, &found()));
    let backend = &tried.json()["backend"];
    assert_eq!((&backend["id"], &backend["name"]), (&json!(""), &json!("hashicorp-production")));
    assert!(fake.backends.lock().unwrap().is_empty());
    assert_eq!(validate("yes").await.refusal(), refusal(400, "invalid_request", "/validate_only"));
    assert_eq!(validate("false").await.status, 201);
}

#[tokio::test]
async fn a_change_is_validated_and_not_made() {
    let (_, router) = front();
    let before = create(&router, REFERENCE).await.json();
    let uri = format!("{BACKEND}?validate_only=true");
    let tried = call(&router, Method::PATCH, &uri, &[], r#"{"enabled":false}"#).await;
    assert_eq!((tried.status.as_u16(), &tried.json()["test"]), (200, &found()));
    assert_eq!(tried.json()["backend"]["enabled"], json!(false));
    assert_eq!(get(&router, BACKEND).await.json(), before);
}

#[tokio::test]
async fn a_delete_names_the_nodes_that_do_not_know_yet() {
    let (fake, router) = front();
    let answer = call(&router, Method::DELETE, BACKEND, &["if-match: \"e1\""], "").await;
    assert_eq!((answer.status.as_u16(), answer.json()), (200, json!({"pending_nodes": ["n1"]})));
    assert!(fake.asked.lock().unwrap().contains("etag: \"e1\""));
}

#[tokio::test]
async fn a_delete_says_what_becomes_of_the_copies() {
    let (fake, router) = front();
    use federation::CopiesPolicy::{Detach, Purge};
    for (query, copies) in [("", Detach), ("?data=detach", Detach), ("?data=purge", Purge)] {
        let answer = call(&router, Method::DELETE, &format!("{BACKEND}{query}"), &[], "").await;
        assert_eq!(answer.status, 200, "{query}");
        let asked = fake.asked.lock().unwrap().clone();
        assert!(asked.contains(&format!("copies: {copies:?}")), "{query} {asked}");
    }
    let wrong = call(&router, Method::DELETE, &format!("{BACKEND}?data=keep"), &[], "").await;
    assert_eq!(wrong.refusal(), refusal(400, "invalid_request", "/data"));
}

#[tokio::test]
async fn the_status_has_the_fields_of_the_reference() {
    let (_, router) = front();
    let status = get(&router, &format!("{BACKEND}/status")).await.json();
    for (name, value) in [
        ("id", json!("fed_abcdefghijklmnop")),
        ("name", json!("hashicorp-production")),
        ("status", json!("healthy")),
        ("last_sync", json!("2026-01-01T00:00:00.250Z")),
        ("last_sync_duration_ms", json!(3421)),
        ("secrets_synced", json!(127)),
        ("last_attempt", json!("2026-01-01T00:00:00.250Z")),
        ("last_outcome", json!("failed")),
        ("consecutive_failures", json!(0)),
        ("sync_failures", json!(2)),
        ("oldest_value_age_s", json!(90)),
        ("next_sync", Value::Null),
        ("skipped", json!(1)),
        ("held_back_run", json!(RUN)),
    ] {
        assert_eq!(status.get(name), Some(&value), "{name}");
    }
    assert_eq!(
        status["running"]["progress"],
        json!({"phase": "applying", "listed": 20, "done": 5, "total": 19})
    );
    assert!(status["next_step"].as_str().unwrap().contains(RUN), "{status}");
    assert_eq!(
        (&status["connection"]["status"], &status["connection"]["latency_ms"]),
        (&json!("connected"), &json!(15))
    );
    assert_eq!(
        status["call_budget"],
        json!({
            "quotas": [{"quota": "lists", "per_second": 90.0, "burst": 10.0, "remaining": 2.5}],
            "concurrency": 8,
            "max_concurrency": 64,
            "throttled_until": "2026-01-01T00:00:00.250Z",
            "reason": "slowed down by the backend until then",
        })
    );
    assert_eq!((&status["nodes"][0]["name"], &status["generation"]), (&json!("n1"), &json!(4)));
}

#[tokio::test]
async fn a_proxied_backend_is_not_synced() {
    let (_, router) = front();
    let status = get(&router, &format!("{BACKENDS}/{PROXIED}/status")).await.json();
    for name in [
        "last_sync",
        "last_sync_duration_ms",
        "secrets_synced",
        "last_attempt",
        "last_outcome",
        "sync_failures",
        "oldest_value_age_s",
        "next_sync",
        "running",
        "skipped",
        "held_back_run",
    ] {
        assert_eq!(status.get(name), Some(&Value::Null), "{name}");
    }
    for body in ["", "{}"] {
        let answer = call(&router, Method::POST, &format!("{BACKENDS}/{PROXIED}/sync"), &[], body).await;
        assert_eq!(answer.refusal(), refusal(409, "wrong_mode", ""));
    }
}

#[tokio::test]
async fn a_sync_is_answered_as_it_stands_when_the_wait_is_over() {
    let (fake, router) = front();
    let started = call(&router, Method::POST, &format!("{BACKEND}/sync"), &[], "").await;
    assert_eq!(
        (started.status.as_u16(), started.header("location")),
        (202, &*format!("{BACKEND}/syncs/{RUN}"))
    );
    let run = started.json();
    assert_eq!(
        (&run["run_id"], &run["outcome"], &run["ended_at"]),
        (&json!(RUN), &Value::Null, &Value::Null)
    );
    assert_eq!(run["progress"]["done"], 5);

    let consent = format!(r#"{{"allow_deletes":"{RUN}"}}"#);
    let ended = call(&router, Method::POST, &format!("{BACKEND}/sync?wait=30s"), &[], &consent).await;
    assert_eq!((ended.status.as_u16(), ended.header("location")), (200, ""));
    let expected = json!({
        "run_id": RUN, "backend_id": "fed_abcdefghijklmnop", "trigger": "manual",
        "started_at": "2026-01-01T00:00:00.250Z", "ended_at": "2026-01-01T00:00:00.250Z", "outcome": "partial",
        "listed": 20, "mapped": 19, "unchanged": 10, "created": 3, "updated": 2, "tombstoned": 0,
        "local_ahead": 0, "conflicts": 0, "skipped_count": 1, "failed_count": 1, "calls": {"list": 1, "read": 5},
        "held_back": {"deletions": 4, "known": 12}, "class": "transient", "message": "a read failed",
        "progress": null,
    });
    assert_eq!(ended.json(), expected);
    let asked = fake.asked.lock().unwrap().clone();
    assert!(asked.contains("seconds: 30") && asked.contains(RUN), "{asked}");
}

#[tokio::test]
async fn a_wrong_wish_for_a_sync_is_named() {
    let (_, router) = front();
    for (query, body, status, code, pointer) in [
        ("?wait=61s", "", 400, "invalid_request", "/wait"),
        ("?wait=30", "", 400, "invalid_request", "/wait"),
        ("?dry_run=true", "", 400, "invalid_request", "/dry_run"),
        ("", r#"{"force":true}"#, 400, "invalid_request", "/force"),
        ("", r#"{"allow_deletes":true}"#, 400, "invalid_request", "/allow_deletes"),
        ("", r#"{"allow_deletes":""}"#, 404, "not_found", ""),
    ] {
        let answer = call(&router, Method::POST, &format!("{BACKEND}/sync{query}"), &[], body).await;
        assert_eq!(answer.refusal(), refusal(status, code, pointer), "{query} {body}");
    }
}

#[tokio::test]
async fn runs_are_listed_read_and_ended() {
    let (fake, router) = front();
    let syncs = format!("{BACKEND}/syncs");
    let list = get(&router, &format!("{syncs}?page_size=2&page_token=t")).await.json();
    assert_eq!(
        (&list["syncs"][0]["outcome"], &list["syncs"][1]["outcome"]),
        (&Value::Null, &json!("partial"))
    );
    assert_eq!(list["next_page_token"], "");
    assert!(fake.asked.lock().unwrap().contains(r#"page_size: 2, page_token: "t""#));

    let report = get(&router, &format!("{syncs}/{RUN}?page_size=1")).await.json();
    assert_eq!((&report["outcome"], &report["skipped_count"]), (&json!("partial"), &json!(1)));
    let left_out = json!({"path": null, "remote_name": "kv/a b", "reason": "charset", "detail": ""});
    assert_eq!((&report["skipped"], &report["next_page_token"]), (&json!([left_out]), &json!("2")));
    assert_eq!(report["failed"][0]["path"], "external/a");
    let asked = fake.asked.lock().unwrap().clone();
    assert!(asked.contains(&format!(r#"run_id: "{RUN}", page_size: 1"#)), "{asked}");

    for body in ["", "{}"] {
        let ended = call(&router, Method::POST, &format!("{syncs}/{RUN}/cancel"), &[], body).await;
        assert_eq!((ended.status.as_u16(), &ended.json()["outcome"]), (200, &json!("cancelled")));
    }
    let not_utf8 = get(&router, &format!("{syncs}/%ff")).await;
    assert_eq!(not_utf8.refusal(), refusal(404, "not_found", ""));
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
