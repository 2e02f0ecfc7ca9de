//! Testing backends, stored or not: what is wrong is named with what to do about it, no value is read, nothing is stored.

use anyhow::{Context as _, Result};
use reqwest::Method;
use scaivault_domain::backend::KvVersion;
use scaivault_tests::planes::{self, CREDENTIAL, Options, Planes, Rest};
use scaivault_tests::servers::moto::{self, AccessKey, Moto, REGION};
use scaivault_tests::servers::openbao::{self, Admin, OpenBao};
use scaivault_tests::wait;
use serde_json::{Value, json};

const BACKENDS: &str = "/v1/federation/backends";

/// Tests a configuration without storing it.
async fn validate(rest: &Rest, configuration: &Value) -> Result<Value> {
    Ok(rest.post(&format!("{BACKENDS}?validate_only=true"), configuration.clone()).await?.ok()?["test"]
        .take())
}

/// Whether it passed, and the outcome of every check.
fn outcomes(test: &Value) -> (bool, Vec<(&str, &str)>) {
    let checks = test["checks"].as_array().map(Vec::as_slice).unwrap_or_default();
    let text = |check: &'_ Value, name: &str| check[name].as_str().unwrap_or_default().to_owned();
    let pairs = checks.iter().map(|check| {
        assert!(text(check, "outcome") != "failed" || !text(check, "next_step").is_empty(), "{check}");
        (check["name"].as_str().unwrap_or_default(), check["outcome"].as_str().unwrap_or_default())
    });
    (test["passed"] == true, pairs.collect())
}

/// What one check says and what to do about it.
fn said<'t>(test: &'t Value, name: &str) -> (&'t str, &'t str) {
    let checks = test["checks"].as_array().map(Vec::as_slice).unwrap_or_default();
    let check = checks.iter().find(|check| check["name"] == name).unwrap_or(&Value::Null);
    (check["detail"].as_str().unwrap_or_default(), check["next_step"].as_str().unwrap_or_default())
}

/// An OpenBao with secrets, planes that know an application's credential, and no backend.
async fn unfederated() -> Result<(Planes, OpenBao, Admin)> {
    let bao = OpenBao::start(openbao::Options::default().audited());
    let (bao, planes) = tokio::try_join!(bao, Planes::start(Options::default()))?;
    let admin = bao.client()?;
    admin.enable_kv("secret", KvVersion::V2).await?;
    for path in ["app/db", "app/api/key"] {
        admin.put("secret", path, json!({ "password": "canary-of-a-test" })).await?;
    }
    let credential = planes::application(&admin, planes::POLICY).await?;
    planes.rest(0)?.put_data(CREDENTIAL, credential).await?;
    Ok((planes, bao, admin))
}

fn vault(bao: &OpenBao, mapping: Value) -> Value {
    planes::backend("tested", &bao.addr(), CREDENTIAL, mapping)
}

fn synced(mut configuration: Value) -> Value {
    planes::merge(&mut configuration, &json!({ "mode": "sync", "sync_interval": "1h" }));
    configuration
}

#[tokio::test]
async fn a_configuration_is_tested_without_being_stored_and_without_reading_a_value() -> Result<()> {
    let (planes, bao, _) = unfederated().await?;
    let rest = planes.rest(0)?;
    let good = vault(&bao, json!({ "external/**": "secret/data/**" }));
    let answer = rest.post(&format!("{BACKENDS}?validate_only=true"), good.clone()).await?;
    assert_eq!(answer.status, 200, "{}", answer.text);
    assert_eq!(
        (&answer.json["backend"]["name"], &answer.json["backend"]["id"]),
        (&json!("tested"), &json!(""))
    );
    let all = ["configuration", "endpoint", "credential", "login", "list", "read"].map(|name| (name, "ok"));
    assert_eq!(outcomes(&answer.json["test"]), (true, all.to_vec()), "{}", answer.text);
    let (read, _) = said(&answer.json["test"], "read");
    assert!(read.contains("`secret/data/app/") && read.contains("`external/app/"), "{read}");

    let test = validate(&rest, &synced(good)).await?;
    assert_eq!(outcomes(&test).1.last(), Some(&("history", "ok")), "{test}");
    assert_eq!(rest.get(BACKENDS).await?.ok()?["backends"], json!([]));
    wait::until("both logins are revoked", async || {
        let requests = bao.requests()?;
        let count = |what: &str| requests.iter().filter(|request| *request == what).count();
        assert_eq!(count("update auth/approle/login"), 2);
        Ok((count("update auth/token/revoke-self") == 2).then_some(()))
    })
    .await?;
    assert_eq!(bao.values_given()?, 0, "{:?}", bao.requests()?);
    let row = wait::until("the audit trail has both tests", async || {
        let rows = rest.audit().await?;
        let mut tests = rows.into_iter().filter(|row| row["action"] == "backend.test");
        Ok(tests.next().zip(tests.next()).map(|(first, _)| first))
    });
    let row = row.await?;
    assert_eq!((&row["path"], &row["outcome"]), (&json!("tested"), &json!("ok")), "{row}");
    assert!(row["remote_name"].as_str().context("a name")?.starts_with("secret/data/app/"), "{row}");
    Ok(())
}

#[tokio::test]
async fn what_a_vault_forbids_is_named_by_capability_and_path() -> Result<()> {
    let (planes, bao, admin) = unfederated().await?;
    let rest = planes.rest(0)?;
    let wild = vault(&bao, json!({ "external/**": "secret/data/**" }));
    let may = |path: &str, capability: &str| {
        format!(r#"path "secret/{path}/*" {{ capabilities = ["{capability}"] }}"#)
    };

    // Reading by name needs no listing, a sync does.
    admin.write_policy("scaivault", &may("data", "read")).await?;
    let test = validate(&rest, &wild).await?;
    assert_eq!(outcomes(&test).1[4..], [("list", "warning"), ("read", "skipped")], "{test}");
    assert_eq!(said(&test, "list").1, "allow `list` on `secret/metadata/*`");
    assert_eq!(test["passed"], true);
    let test = validate(&rest, &synced(wild.clone())).await?;
    assert_eq!(
        outcomes(&test),
        (
            false,
            ["configuration", "endpoint", "credential", "login"]
                .map(|name| (name, "ok"))
                .into_iter()
                .chain([("list", "failed"), ("read", "skipped"), ("history", "skipped")])
                .collect()
        ),
        "{test}"
    );
    let literal = vault(&bao, json!({ "external/one": "secret/data/app/db" }));
    let test = validate(&rest, &literal).await?;
    assert_eq!(outcomes(&test).1[4..], [("list", "skipped"), ("read", "ok")], "{test}");

    admin.write_policy("scaivault", &may("metadata", "list")).await?;
    let test = validate(&rest, &synced(wild.clone())).await?;
    let checks = outcomes(&test);
    assert_eq!(checks.1[4..], [("list", "ok"), ("read", "failed"), ("history", "warning")], "{test}");
    let (detail, next) = said(&test, "read");
    assert!(!checks.0 && detail.contains("may not read"), "{test}");
    assert!(next.starts_with("allow `read` on `secret/data/app/"), "{next}");

    // What a reader is told of the same lack.
    let id = rest.configure(wild).await?;
    let read = rest.get("/v1/secrets/external/app/db").await?;
    assert_eq!(read.refusal(), (502, "backend_forbidden"));
    assert!(read.text.contains("allow `read` on the secret's data path"), "{}", read.text);
    assert_eq!(
        outcomes(&rest.post(&format!("{BACKENDS}/{id}/test"), json!({})).await?.ok()?).1[5].1,
        "failed"
    );
    assert_eq!(bao.values_given()?, 0);
    Ok(())
}

#[tokio::test]
async fn a_wrong_credential_is_not_hidden_by_an_old_login() -> Result<()> {
    let (planes, bao, _) = unfederated().await?;
    let rest = planes.rest(0)?;
    let good = vault(&bao, json!({ "external/**": "secret/data/**" }));
    let id = rest.configure(good.clone()).await?;
    let stored = format!("{BACKENDS}/{id}");
    let works = async || -> Result<bool> { Ok(rest.get("/v1/secrets/external/app/db").await?.status == 200) };
    wait::until("the backend is served", async || Ok(works().await?.then_some(()))).await?;
    let wrong = json!({ "role_id": "none", "secret_id": "canary-secret-id" });
    rest.put_data(CREDENTIAL, wrong).await?;

    let test = rest.post(&format!("{stored}/test"), json!({})).await?.ok()?;
    let skipped = [("login", "failed"), ("list", "skipped"), ("read", "skipped")];
    assert_eq!((outcomes(&test).0, &outcomes(&test).1[3..]), (false, &skipped[..]), "{test}");
    assert!(said(&test, "login").1.contains("auth_config_path"), "{test}");
    assert!(!test.to_string().contains("canary"), "{test}");
    assert!(works().await?, "the login that is held is left alone");
    let cli = planes.cli(&format!("backend test {id}")).await;
    assert!(cli.is_err_and(|failure| failure.to_string().contains("the test failed: `login`")));

    // A credential that lacks a key is one that cannot be configured; of a stored backend it is a failed check.
    rest.put_data(CREDENTIAL, json!({ "role_id": "none" })).await?;
    let test = rest.post(&format!("{stored}/test"), json!({})).await?.ok()?;
    assert_eq!(outcomes(&test).1[2..4], [("credential", "failed"), ("login", "skipped")], "{test}");
    let other = planes::backend("other", &bao.addr(), CREDENTIAL, json!({ "other/**": "secret/data/**" }));
    let refused = rest.post(&format!("{BACKENDS}?validate_only=true"), other).await?;
    assert_eq!(refused.refusal(), (400, "credential_unusable"));

    // A change is tried as it would be made.
    let before = rest.get(&stored).await?.ok()?;
    let at = |endpoint: &str| json!({ "config": { "endpoint": endpoint } });
    let change = async |endpoint| rest.patch(&format!("{stored}?validate_only=true"), at(endpoint)).await;
    let refused = change("https://169.254.169.254").await?;
    assert_eq!((refused.refusal(), refused.pointers()), ((400, "invalid_config"), vec!["/config/endpoint"]));
    rest.put_data(CREDENTIAL, json!({ "role_id": "none", "secret_id": "none" })).await?;
    let tried = change("http://127.0.0.1:9").await?.ok()?;
    assert_eq!(
        outcomes(&tried["test"]).1[1..4],
        [("endpoint", "failed"), ("credential", "ok"), ("login", "skipped")]
    );
    assert_eq!(tried["backend"]["config"]["endpoint"], "http://127.0.0.1:9");
    assert_eq!(rest.get(&stored).await?.ok()?, before);
    Ok(())
}

#[tokio::test]
async fn who_may_not_configure_backends_may_not_test_them() -> Result<()> {
    let (planes, bao, _) = unfederated().await?;
    let rest = planes.rest(0)?;
    let good = vault(&bao, json!({ "external/**": "secret/data/**" }));
    let id = rest.configure(good.clone()).await?;
    let everything = json!([{ "path": "**", "capabilities": ["read", "list", "write"], "effect": "allow" }]);
    let looks = rest.issue("looks", &["federation:read"], everything).await?;
    let looks = rest.with_token(&looks.token)?;
    let test = format!("{BACKENDS}/{id}/test");
    assert_eq!(looks.post(&test, json!({})).await?.refusal(), (403, "permission_denied"));
    let validate = format!("{BACKENDS}?validate_only=true");
    assert_eq!(looks.post(&validate, good.clone()).await?.refusal(), (403, "permission_denied"));
    assert_eq!(rest.without_token().post(&test, json!({})).await?.status, 401);
    let none = format!("{BACKENDS}/fed_aaaaaaaaaaaaaaaa/test");
    assert_eq!(rest.post(&none, json!({})).await?.refusal(), (404, "not_found"));

    // Configuring needs more than the scope; testing what is stored does not, and shows no name.
    let nothing = json!([{ "path": "elsewhere/**", "capabilities": ["read"], "effect": "allow" }]);
    let writes = rest.issue("writes", &["federation:write"], nothing).await?;
    let writes = rest.with_token(&writes.token)?;
    assert_eq!(writes.post(&validate, good).await?.refusal(), (403, "permission_denied"));
    let test = writes.post(&test, json!({})).await?.ok()?;
    assert_eq!(test["passed"], true, "{test}");
    assert!(!said(&test, "read").0.contains("app/"), "{test}");
    Ok(())
}

#[tokio::test]
async fn what_aws_forbids_is_named_by_action_and_arn() -> Result<()> {
    let (moto, planes) =
        tokio::try_join!(Moto::start(moto::Options::default()), Planes::start(Options::default()))?;
    let (admin, rest) = (moto.client()?, planes.rest(0)?);
    admin.create_secret("prod/app/db", "canary-of-a-test", &[]).await?;
    let allow = |actions: &[&str]| {
        let actions: Vec<_> = actions.iter().map(|action| format!("secretsmanager:{action}")).collect();
        let statement = json!({ "Effect": "Allow", "Action": actions, "Resource": "*" });
        json!({ "Version": "2012-10-17", "Statement": [statement] })
    };
    let key = admin.create_user("scaivault", &allow(&["ListSecrets", "GetSecretValue"])).await?;
    let store = async |key: &AccessKey| {
        rest.put_data(CREDENTIAL, json!({ "access_key_id": key.id, "secret_access_key": key.secret })).await
    };
    store(&key).await?;
    let backend = json!({
        "name": "aws",
        "type": "aws-secrets-manager",
        "config": {
            "region": REGION,
            "credentials_path": CREDENTIAL,
            "endpoint": moto.addr(),
            "sts_endpoint": moto.addr(),
        },
        "path_mapping": { "external/aws/**": "prod/**" },
        "mode": "sync",
        "sync_interval": "1h",
    });
    let test = validate(&rest, &backend).await?;
    let (passed, checks) = outcomes(&test);
    assert!(passed, "{test}");
    let optional = [("list", "ok"), ("read", "ok"), ("history", "warning"), ("batch", "warning")];
    assert_eq!(checks[4..], optional, "{test}");
    assert_eq!(said(&test, "history").1, "allow `secretsmanager:ListSecretVersionIds` on the secret");
    assert_eq!(said(&test, "batch").1, "allow `secretsmanager:BatchGetSecretValue`");

    admin.set_user_policy("scaivault", &allow(&["GetSecretValue"])).await?;
    let test = validate(&rest, &backend).await?;
    assert_eq!(outcomes(&test).1[4..6], [("list", "failed"), ("read", "skipped")], "{test}");
    assert_eq!(said(&test, "list").1, "allow `secretsmanager:ListSecrets` on `*`");

    admin.set_user_policy("scaivault", &allow(&["ListSecrets"])).await?;
    let test = validate(&rest, &backend).await?;
    assert_eq!(outcomes(&test).1[4..6], [("list", "ok"), ("read", "failed")], "{test}");
    let resource = format!("arn:aws:secretsmanager:{REGION}:*:secret:prod/*");
    assert_eq!(said(&test, "read").1, format!("allow `secretsmanager:GetSecretValue` on `{resource}`"));

    store(&AccessKey { secret: "wrong".into(), ..key }).await?;
    let test = validate(&rest, &backend).await?;
    assert_eq!(outcomes(&test).1[3..5], [("login", "failed"), ("list", "skipped")], "{test}");
    assert!(!test.to_string().contains("canary"), "{test}");
    assert_eq!(rest.send(Method::GET, BACKENDS, None).await?.ok()?["backends"], json!([]));
    Ok(())
}
