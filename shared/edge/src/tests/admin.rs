use http::Method;
use serde_json::json;

use super::{call, front, get, refusal};

#[tokio::test]
async fn what_is_made_has_a_place() {
    let (_, router) = front();
    for (uri, body, location) in [
        ("/v1/tenants", r#"{"id":"acme","display_name":"Acme"}"#, "/v1/tenants/acme"),
        ("/v1/policies", r#"{"name":"p","rules":[]}"#, "/v1/policies/p"),
        ("/v1/tokens", r#"{"subject":"ci","scopes":["secrets:read"]}"#, "/v1/tokens/acc"),
        ("/v1/nodes", r#"{"name":"n1","tenants":["*"]}"#, "/v1/nodes/n1"),
    ] {
        let answer = call(&router, Method::POST, uri, &[], body).await;
        assert_eq!((answer.status.as_u16(), answer.header("location")), (201, location));
        assert_eq!(
            (answer.header("cache-control"), answer.header("x-scaivault-revision")),
            ("no-store", "41")
        );
    }
}

#[tokio::test]
async fn a_patch_of_a_tenant_changes_what_it_names() {
    let (fake, router) = front();
    for (body, mask) in [
        (r#"{"identities":["aws","gcp"]}"#, r#"["identities"]"#),
        (r#"{"identities":null}"#, r#"["identities"]"#),
        (r#"{"display_name":"Acme","identities":[]}"#, r#"["display_name", "identities"]"#),
        ("{}", r#"["id"]"#),
    ] {
        let answer = call(&router, Method::PATCH, "/v1/tenants/acme", &[], body).await;
        assert_eq!((answer.status.as_u16(), &answer.json()["id"]), (200, &json!("acme")), "{body}");
        let asked = fake.asked.lock().unwrap().clone();
        assert!(
            asked.contains(&format!("update_mask: Some(FieldMask {{ paths: {mask} }})")),
            "{body}: {asked}"
        );
    }
    let answer = call(&router, Method::PATCH, "/v1/tenants/acme", &[], r#"{"identities":["root"]}"#).await;
    assert_eq!(answer.refusal(), refusal(400, "invalid_request", "/identities/0"));
}

#[tokio::test]
async fn what_is_gone_is_nothing_or_counted() {
    let (fake, router) = front();
    for uri in ["/v1/tenants/acme", "/v1/policies/p", "/v1/nodes/n1"] {
        let answer = call(&router, Method::DELETE, uri, &[], "").await;
        assert_eq!((answer.status.as_u16(), answer.body.len()), (204, 0), "{uri}");
    }
    for (uri, accessor) in [("/v1/tokens/acc", r#""acc""#), ("/v1/tokens/self", r#""""#)] {
        assert_eq!(call(&router, Method::DELETE, uri, &[], "").await.json(), json!({"revoked": 2}));
        assert_eq!(*fake.asked.lock().unwrap(), format!("RevokeTokenRequest {{ accessor: {accessor} }}"));
    }
}

#[tokio::test]
async fn a_policy_reads_as_it_is_written() {
    let (_, router) = front();
    let rules = json!([
        {"path": "apps/**", "capabilities": ["read", "list"], "effect": "allow"},
        {"path": "apps/x", "capabilities": ["read"], "effect": "deny"},
    ]);
    let body = json!({ "rules": rules }).to_string();
    let answer = call(&router, Method::PUT, "/v1/policies/p", &[], &body).await;
    assert_eq!(answer.json(), json!({"name": "p", "rules": rules}));
    let default = r#"{"rules":[{"path":"a","capabilities":["read"]}]}"#;
    let answer = call(&router, Method::PUT, "/v1/policies/p", &[], default).await;
    assert_eq!(answer.json()["rules"][0]["effect"], "allow");
    assert_eq!(get(&router, "/v1/policies/q").await.json()["name"], "q");
    for (body, pointer) in [
        (r#"{"rules":[{"path":"a","capabilities":["read"],"efect":"deny"}]}"#, "/rules/0/efect"),
        (r#"{"rules":[["a",["read"],"deny"]]}"#, "/rules/0"),
        (r#"{"rules":[{"path":"a","capabilities":["read"],"effect":"maybe"}]}"#, "/rules/0/effect"),
        (r#"{"name":"p","rules":[]}"#, "/name"),
    ] {
        let answer = call(&router, Method::PUT, "/v1/policies/p", &[], body).await;
        assert_eq!(answer.refusal(), refusal(400, "invalid_request", pointer), "{body}");
    }
}

#[tokio::test]
async fn a_token_is_shown_once_with_what_is_known_of_it() {
    let (fake, router) = front();
    let body = r#"{"subject":"ci","scopes":["secrets:read"],"policies":["p"],"ttl":"24h"}"#;
    let created = call(&router, Method::POST, "/v1/tokens", &[], body).await.json();
    let expected = json!({
        "token": "svt_new", "accessor": "acc", "subject": "ci-deployer", "scopes": ["secrets:read"],
        "policies": [], "tenant": "acme", "parent": null, "created_at": "2026-01-01T00:00:00.250Z",
        "expires_at": null,
    });
    assert_eq!(created, expected);
    assert!(fake.asked.lock().unwrap().contains("seconds: 86400"));
    let wrong =
        call(&router, Method::POST, "/v1/tokens", &[], r#"{"subject":"ci","scopes":[],"ttl":"24"}"#).await;
    assert_eq!(wrong.refusal(), refusal(400, "invalid_request", "/ttl"));
}

#[tokio::test]
async fn a_token_is_looked_up_and_renewed_by_accessor_or_as_ones_own() {
    let (fake, router) = front();
    assert_eq!(get(&router, "/v1/tokens/acc").await.json()["accessor"], "acc");
    assert_eq!(get(&router, "/v1/tokens/self").await.json()["accessor"], "");
    for (uri, body, asked) in [
        ("/v1/tokens/self/renew", "", r#"accessor: "", ttl: None"#),
        ("/v1/tokens/self/renew", "{}", r#"accessor: "", ttl: None"#),
        (
            "/v1/tokens/acc/renew",
            r#"{"ttl":"1h30m"}"#,
            r#"accessor: "acc", ttl: Some(Duration { seconds: 5400"#,
        ),
    ] {
        assert_eq!(call(&router, Method::POST, uri, &[], body).await.status, 200);
        assert!(fake.asked.lock().unwrap().contains(asked), "{uri}");
    }
}

#[tokio::test]
async fn audit_rows_are_asked_for_by_time_path_and_principal() {
    let (fake, router) = front();
    let uri = "/v1/audit?start=2026-01-01T00:00:00Z&end=2026-01-02T01:00:00%2B01:00&path=a/&principal=ci&page_size=5";
    let list = get(&router, uri).await.json();
    assert_eq!(
        (&list["rows"][0]["action"], &list["rows"][0]["latency_us"]),
        (&json!("secret.read"), &json!(1500))
    );
    assert_eq!(list["next_page_token"], "n");
    let asked = fake.asked.lock().unwrap().clone();
    for part in
        ["seconds: 1767225600", "seconds: 1767312000", r#"path: "a/""#, r#"principal: "ci""#, "page_size: 5"]
    {
        assert!(asked.contains(part), "{part} in {asked}");
    }
    let wrong = get(&router, "/v1/audit?start=monday").await;
    assert_eq!(wrong.refusal(), refusal(400, "invalid_request", "/start"));
}
