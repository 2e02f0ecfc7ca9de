//! The audit trail: whatever is answered has its row, once, and no row has a value.

use anyhow::{Context as _, Result};
use scaivault_tests::planes::{Answer, Federated, Rest};
use scaivault_tests::wait;
use serde_json::{Value, json};

const DB: &str = "/v1/secrets/external/hashicorp/app/db";

/// Waits until the answered request has its row, and returns it; it must be the only one.
async fn row(rest: &Rest, answer: &Answer) -> Result<Value> {
    let id = answer.header("x-request-id").to_owned();
    wait::until("the row has arrived", async || {
        let mut rows = rest.audit().await?;
        rows.retain(|row| row["request_id"] == *id);
        assert!(rows.len() <= 1, "{rows:#?}");
        Ok(rows.pop())
    })
    .await
}

#[tokio::test]
async fn whatever_is_done_has_a_row_that_tells_it() -> Result<()> {
    let federated = Federated::start().await?;
    let rest = federated.planes.rest(0)?;
    let rules = json!([{ "path": "app/**", "capabilities": ["read", "list", "write", "delete"] }]);
    let issued = rest.issue("ci-deployer", &["secrets:read", "secrets:write"], rules).await?;
    let app = rest.with_token(&issued.token)?;
    let body = || json!({ "data": { "password": "canary-local" } });
    let backend = json!(federated.backend);
    for (answer, expected) in [
        (
            app.put("/v1/secrets/app/x", body()).await?,
            json!(["secret.write", "app/x", "ok", 1, "local", null]),
        ),
        (app.get("/v1/secrets/app/x").await?, json!(["secret.read", "app/x", "ok", 1, "local", null])),
        (
            app.get("/v1/secrets/app/?list=true").await?,
            json!(["secret.list", "app/", "ok", null, null, null]),
        ),
        (
            app.get("/v1/secrets/app/x?versions=true").await?,
            json!(["secret.versions", "app/x", "ok", null, null, null]),
        ),
        (
            app.get("/v1/secrets/app/none").await?,
            json!(["secret.read", "app/none", "not_found", null, null, null]),
        ),
        (app.delete("/v1/secrets/app/x").await?, json!(["secret.delete", "app/x", "ok", 1, "local", null])),
        (
            app.get("/v1/secrets/zzz").await?,
            json!(["secret.read", "zzz", "permission_denied", null, null, null]),
        ),
        (
            app.put("/v1/secrets/zzz", body()).await?,
            json!(["secret.write", "zzz", "permission_denied", null, null, null]),
        ),
        (
            app.delete("/v1/secrets/zzz").await?,
            json!(["secret.delete", "zzz", "permission_denied", null, null, null]),
        ),
        (
            app.delete("/v1/policies/ci-deployer").await?,
            json!(["policy.write", "ci-deployer", "permission_denied", null, null, null]),
        ),
    ] {
        let row = row(&rest, &answer).await?;
        let told = json!([
            row["action"],
            row["path"],
            row["outcome"],
            row["version"],
            row["source"],
            row["backend"]
        ]);
        assert_eq!(told, expected, "{row}");
        assert_eq!((&row["principal"], &row["accessor"]), (&json!("ci-deployer"), &json!(issued.accessor)));
        assert!(row["latency_us"].is_u64() && row["time"].is_string() && row["node"].is_string(), "{row}");
    }

    let proxied = row(&rest, &rest.get(DB).await?).await?;
    for (field, value) in [
        ("action", json!("secret.read")),
        ("path", json!("external/hashicorp/app/db")),
        ("outcome", json!("ok")),
        ("backend", backend.clone()),
        ("remote_name", json!("secret/data/app/db")),
        ("remote_version", json!("3")),
        ("source", json!("proxy")),
        ("version", Value::Null),
        ("node", json!("node-0")),
    ] {
        assert_eq!(proxied[field], value, "{field}: {proxied}");
    }
    let gone = row(&rest, &rest.get("/v1/secrets/external/hashicorp/gone").await?).await?;
    assert_eq!((&gone["outcome"], &gone["backend"]), (&json!("not_active"), &backend));
    let refused = row(&rest, &rest.put(DB, body()).await?).await?;
    assert_eq!(
        (&refused["action"], &refused["outcome"]),
        (&json!("secret.write"), &json!("federated_read_only"))
    );
    let closed = r#"path "secret/data/app/db" { capabilities = ["deny"] }"#;
    federated.bao.client()?.write_policy("scaivault", closed).await?;
    let forbidden = row(&rest, &rest.get(DB).await?).await?;
    assert_eq!((&forbidden["outcome"], &forbidden["source"]), (&json!("backend_forbidden"), &json!("proxy")));

    for (answer, action, path) in [
        (rest.put("/v1/policies/p", json!({ "rules": [] })).await?, "policy.write", "p"),
        (rest.delete("/v1/policies/p").await?, "policy.write", "p"),
        (
            rest.delete(&format!("/v1/tokens/{}", issued.accessor)).await?,
            "token.write",
            issued.accessor.as_str(),
        ),
        (rest.post("/v1/tenants", json!({ "id": "acme" })).await?, "tenant.write", "acme"),
        (rest.post("/v1/nodes", json!({ "name": "n", "tenants": ["*"] })).await?, "node.write", "n"),
        (
            rest.patch(
                &format!("/v1/federation/backends/{}", federated.backend),
                json!({ "enabled": false }),
            )
            .await?,
            "backend.write",
            "openbao",
        ),
    ] {
        assert!(answer.status < 300, "{}", answer.text);
        let row = row(&rest, &answer).await?;
        assert_eq!(
            (&row["action"], &row["path"], &row["outcome"]),
            (&json!(action), &json!(path), &json!("ok"))
        );
    }
    let strangers = rest.with_token("svt_nobody")?.get(DB).await?;
    assert_eq!(strangers.status, 401);
    row(&rest, &rest.get("/v1/secrets/last").await?).await?;
    let rows = rest.audit().await?;
    assert!(rows.iter().any(|row| row["action"] == "backend.login" && row["principal"] == "control-plane"));
    assert!(
        !rows.iter().any(|row| row["request_id"] == strangers.header("x-request-id")),
        "strangers fill no disk"
    );
    let text = serde_json::to_string(&rows)?;
    for value in ["canary-local", "three", &issued.token, federated.planes.operator_token()] {
        assert!(!text.contains(value));
    }
    Ok(())
}

#[tokio::test]
async fn rows_are_found_by_time_path_and_principal() -> Result<()> {
    let federated = Federated::start().await?;
    let rest = federated.planes.rest(0)?;
    for path in ["a/x", "a/b/y", "ab"] {
        rest.put_data(path, json!({})).await?;
    }
    let last = row(&rest, &rest.get("/v1/secrets/a/x").await?).await?;
    let found = async |query: &str| -> Result<Vec<String>> {
        let answer = rest.get(&format!("/v1/audit?{query}")).await?.ok()?;
        let rows = answer["rows"].as_array().context("rows")?;
        let text = |row: &Value, field: &str| row[field].as_str().unwrap_or_default().to_owned();
        let mut told: Vec<_> =
            rows.iter().map(|row| text(row, "action") + " " + &text(row, "path")).collect();
        // Rows arrive in any order.
        told.sort();
        Ok(told)
    };
    wait::until("every row has arrived", async || Ok((found("path=a/").await?.len() == 3).then_some(())))
        .await?;
    assert_eq!(found("path=a/x").await?, ["secret.read a/x", "secret.write a/x"]);
    assert_eq!(found("path=a/").await?, ["secret.read a/x", "secret.write a/b/y", "secret.write a/x"]);
    assert_eq!(found("principal=nobody").await?, [""; 0]);
    assert!(found("principal=control-plane").await?.iter().any(|row| row.starts_with("backend.login")));
    let time = last["time"].as_str().context("time")?;
    assert_eq!(found(&format!("path=a/&start={time}")).await?, ["secret.read a/x"]);
    assert_eq!(found(&format!("path=a/&end={time}")).await?, ["secret.write a/b/y", "secret.write a/x"]);
    assert_eq!(rest.get("/v1/audit?start=yesterday").await?.refusal(), (400, "invalid_request"));
    Ok(())
}
