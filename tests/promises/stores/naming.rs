//! Names: which path stands for which secret, and that no other does.

use anyhow::{Context as _, Result};
use scaivault_domain::Reason;
use scaivault_edge::error::grpc::error;
use scaivault_proto::secrets::v1::GetRequest;
use scaivault_tests::fakes::azure::{Fault, Side};
use scaivault_tests::servers::moto;
use scaivault_tests::stores::{Store, copied};
use serde_json::{Value, json};

use super::{BACKENDS, keys, planes, readable, secret, with_stores};

/// What a run skipped, and why.
fn skipped(report: &Value) -> Vec<(String, String)> {
    let text = |entry: &Value, name: &str| entry[name].as_str().unwrap_or_default().to_owned();
    let mut skipped: Vec<_> = report["skipped"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|entry| (text(entry, "remote_name"), text(entry, "reason")))
        .collect();
    skipped.sort();
    skipped
}

async fn a_path_that_no_name_can_stand_for_is_not_asked_for(store: Store) -> Result<()> {
    let (planes, rest) = planes().await?;
    let separator = store.separator().context("a store without slashes")?;
    for path in ["app/db", "flat"] {
        store.put(&store.name(path), "value").await?;
    }
    let flat = json!({ "pattern": "flat/**", "template": "**" });
    let rules = json!({ "path_mapping": [store.rule("there"), flat] });
    store.federate(&rest, "there", rules).await?;
    readable(&rest, "there/app/db").await?;
    readable(&rest, &format!("flat/{}", store.name("flat"))).await?;

    let mut paths = vec![
        // The separator within a segment, or made by two of them.
        format!("there/a{separator}b"),
        format!("there/a{}/b", &separator[..1]),
        // A character that the store's names have not.
        "there/a.b".to_owned(),
        // More than one segment, and nothing to join them.
        "flat/app/db".to_owned(),
        // Longer than any name there.
        format!("there/{}", "a".repeat(255)),
    ];
    if matches!(store, Store::Azure(_)) {
        paths.extend(["there/App/db".into(), "there/app/DB".into(), "there/a_b".into()]);
    }
    let mut grpc = planes.secrets_client(0)?;
    let control_plane = planes.control_plane_rest()?;
    let before = store.values_read()?;
    for path in paths {
        for rest in [&rest, &control_plane] {
            let refused = rest.get(&secret(&path)).await?;
            assert_eq!(refused.refusal(), (404, "unrepresentable"), "{path}: {}", refused.text);
            assert!(refused.json["next_step"].is_string(), "{}", refused.text);
        }
        let status =
            grpc.get(GetRequest { path: path.clone(), ..Default::default() }).await.expect_err(&path);
        assert_eq!(error(&status).reason, Reason::Unrepresentable, "{path}");
    }
    assert_eq!(store.values_read()?, before, "nobody was asked");
    Ok(())
}
with_stores!(azure, gcp: a_path_that_no_name_can_stand_for_is_not_asked_for);

async fn every_path_is_found_again_by_its_name(store: Store) -> Result<()> {
    let (_planes, rest) = planes().await?;
    let mut paths = vec!["a", "0", "app/db", "app/db/password", "app/-x", "a-b/c-d/e", "a/b/c/d/e/f/g/h"];
    match store {
        Store::Aws(_) => paths.extend(["A/b", "a.b/c_d", "app/db-AbCdEf", "x/--/y", "x/__"]),
        Store::Azure(_) => {}
        Store::Gcp(_) | Store::Drongo(_) => paths.extend(["A/b", "a/B", "x_y/z", "app/--/x"]),
    }
    for path in &paths {
        store.put(&store.name(path), path).await?;
    }
    let (_, report) = store.sync(&rest, "copied", json!({})).await?;
    assert_eq!(
        (&report["outcome"], &report["created"], &report["skipped"]),
        (&json!("complete"), &json!(paths.len()), &json!([])),
        "{report}"
    );
    store.federate(&rest, "there", json!({ "path_mapping": [store.rule("there")] })).await?;
    for path in &paths {
        let copy = copied(&rest, &secret(&format!("copied/{path}"))).await?;
        assert_eq!(copy["data"], json!({ "value": path }));
        readable(&rest, &format!("there/{path}")).await?;
        assert_eq!(rest.get(&secret(&format!("there/{path}"))).await?.json["data"], copy["data"]);
    }
    for folder in ["", "app/"] {
        assert_eq!(
            keys(&rest, &format!("there/{folder}")).await?,
            keys(&rest, &format!("copied/{folder}")).await?
        );
    }
    Ok(())
}
with_stores!(aws, azure, gcp, drongo: every_path_is_found_again_by_its_name);

async fn a_name_that_no_path_can_have_is_skipped_and_told(store: Store) -> Result<()> {
    let (_planes, rest) = planes().await?;
    let nameless = match store {
        Store::Aws(_) => vec!["prod/a+b", "prod/a//b", "prod/user@host", "prod/b/.."],
        Store::Azure(_) => vec!["prod--a----b", "prod--"],
        Store::Gcp(_) | Store::Drongo(_) => vec!["prod__a____b", "prod__"],
    };
    for name in nameless.iter().copied().chain([&*store.name("db")]) {
        store.put(name, "value").await?;
    }
    let (id, report) = store.sync(&rest, "there", json!({})).await?;
    assert_eq!((&report["outcome"], &report["created"]), (&json!("complete"), &json!(1)), "{report}");
    let mut expected: Vec<_> = nameless.iter().map(|name| ((*name).into(), "charset".into())).collect();
    expected.sort();
    assert_eq!(skipped(&report), expected, "{report}");
    assert_eq!(rest.status(&id).await?["skipped"], nameless.len());
    copied(&rest, &secret("there/db")).await?;
    assert_eq!(keys(&rest, "there/").await?, ["db"]);
    Ok(())
}
with_stores!(aws, azure, gcp, drongo: a_name_that_no_path_can_have_is_skipped_and_told);

#[tokio::test]
async fn names_of_azure_have_no_case() -> Result<()> {
    let (_planes, rest) = planes().await?;
    let store = Store::azure().await?;
    store.put("Prod--App--DB", "value").await?;
    store.federate(&rest, "there", json!({})).await?;
    readable(&rest, "there/app/db").await?;
    assert_eq!(keys(&rest, "there/app/").await?, ["db"]);
    assert_eq!(rest.get(&secret("there/App/DB")).await?.refusal(), (404, "unrepresentable"));
    // So no policy about the one spelling is got around by another.
    let rules = json!([
        { "path": "there/**", "capabilities": ["read"] },
        { "path": "there/app/db", "capabilities": ["read"], "effect": "deny" },
    ]);
    let reader = rest.with_token(&rest.issue("reader", &["secrets:read"], rules).await?.token)?;
    for (path, refusal) in
        [("there/app/db", (403, "permission_denied")), ("there/App/DB", (404, "unrepresentable"))]
    {
        assert_eq!(reader.get(&secret(path)).await?.refusal(), refusal, "{path}");
    }
    let (_, report) = store.sync(&rest, "copied", json!({})).await?;
    assert_eq!((&report["created"], &report["skipped"]), (&json!(1), &json!([])), "{report}");
    copied(&rest, &secret("copied/app/db")).await?;
    Ok(())
}

#[tokio::test]
async fn two_names_for_one_path_are_a_collision_that_names_both_and_takes_neither() -> Result<()> {
    let (_planes, rest) = planes().await?;
    let store = Store::azure().await?;
    for path in ["app/db", "other"] {
        store.put(&store.name(path), "value").await?;
    }
    store.settle();
    let (id, _) = store.sync(&rest, "there", json!({})).await?;
    copied(&rest, &secret("there/app/db")).await?;
    let also = Fault::ListsAlso("prod--App--DB".into());
    store.azure_fake()?.set_fault(Side::Vault, also);
    let report = rest.sync(&id).await?;
    assert_eq!(skipped(&report), [("prod--app--db".into(), "collision".into())], "{report}");
    let detail = report["skipped"][0]["detail"].as_str().context("a detail")?;
    assert!(detail.contains("prod--App--DB, prod--app--db"), "{detail}");
    assert_eq!((&report["tombstoned"], &report["updated"]), (&json!(0), &json!(0)), "{report}");
    // What was copied before goes on being served.
    copied(&rest, &secret("there/app/db")).await?;
    store.azure_fake()?.set_fault(Side::Vault, Fault::Pass);
    assert_eq!(skipped(&rest.sync(&id).await?), []);
    Ok(())
}

#[tokio::test]
async fn what_cannot_be_mapped_is_refused_by_its_rule() -> Result<()> {
    let (_planes, rest) = planes().await?;
    let (aws, azure, gcp) = (Store::aws().await?, Store::azure().await?, Store::gcp().await?);
    for (name, store) in [("aws", &aws), ("azure", &azure), ("gcp", &gcp)] {
        rest.put_data(&format!("infra/{name}"), store.credential()?).await?;
    }
    rest.put_data("infra/vault", json!({ "role_id": "role", "secret_id": "secret" })).await?;
    let vault = scaivault_tests::planes::backend("vault", "http://127.0.0.1:1", "infra/vault", json!([]));
    let (aws, azure, gcp) = (aws.backend("aws"), azure.backend("azure"), gcp.backend("gcp"));
    for (backend, template, separator) in [
        (&vault, "secret/**", "--"),
        (&aws, "prod/**", "--"),
        (&aws, "prod db/**", ""),
        (&aws, "arn:aws:s3:::bucket/**", ""),
        (&azure, "prod/**", ""),
        (&azure, "prod/**", "__"),
        (&azure, "prod/**", "."),
        (&azure, "prod_1/**", "--"),
        (&azure, "Prod/**", "--"),
        (&gcp, "prod/**", ""),
        (&gcp, "prod/**", "."),
        (&gcp, "prod.1/**", "__"),
        (&gcp, "prod/**", "/"),
        (&gcp, "**", "*"),
    ] {
        let mut wrong = json!({ "pattern": "wrong/**", "template": template });
        if !separator.is_empty() {
            wrong["separator"] = json!(separator);
        }
        let mut backend = backend.clone();
        let good = if backend["type"] == "hashicorp-vault" { "kv/good" } else { "good" };
        backend["path_mapping"] = json!([{ "pattern": "right", "template": good }, wrong]);
        let refused = rest.post(BACKENDS, backend).await?;
        assert_eq!(
            (refused.refusal(), refused.pointers()),
            ((400, "invalid_mapping"), vec!["/path_mapping/1"]),
            "{template} {separator}: {}",
            refused.text
        );
        assert!(refused.json["next_step"].is_string(), "{}", refused.text);
    }
    assert_eq!(rest.get(BACKENDS).await?.ok()?["backends"], json!([]));
    Ok(())
}

#[tokio::test]
async fn a_secret_of_aws_is_never_taken_for_another() -> Result<()> {
    let (_planes, rest) = planes().await?;
    let store = Store::aws().await?;
    let admin = store.moto()?.client()?;
    let mut arns = Vec::new();
    for name in ["prod/db", "prod/db-AbCdEf", "prod/other", "elsewhere/db"] {
        store.put(name, name).await?;
        arns.push(admin.describe_secret(name).await?["ARN"].as_str().context("an ARN")?.to_owned());
    }
    let partial = format!("arn:aws:secretsmanager:{}:{}:secret:prod/db", moto::REGION, moto::ACCOUNT);
    assert!(arns[0].starts_with(&format!("{partial}-")), "{}", arns[0]);
    let literal = |pattern: &str, template: &str| json!({ "pattern": pattern, "template": template });
    let rules = json!([
        literal("by-arn/db", &arns[0]),
        literal("by-arn/elsewhere", &arns[3]),
        literal("by-arn/partial", &partial),
        store.rule("there"),
    ]);
    let expected = [
        ("there/db", Some("prod/db")),
        ("there/db-AbCdEf", Some("prod/db-AbCdEf")),
        ("there/other", Some("prod/other")),
        ("by-arn/db", Some("prod/db")),
        ("by-arn/elsewhere", Some("elsewhere/db")),
        // What AWS would find by a part of an ARN or a name nobody asked for.
        ("by-arn/partial", None),
        ("there/other-AbCdEf", None),
    ];
    let id = store.federate(&rest, "there", json!({ "path_mapping": rules })).await?;
    readable(&rest, "there/db").await?;
    for (path, value) in expected {
        let read = rest.get(&secret(path)).await?;
        match value {
            Some(value) => assert_eq!(read.json["data"], json!({ "value": value }), "{path}: {}", read.text),
            None => assert_eq!(read.refusal(), (404, "not_found"), "{path}: {}", read.text),
        }
    }
    rest.patch(&format!("{BACKENDS}/{id}"), json!({ "mode": "sync", "sync_interval": "1h" })).await?.ok()?;
    for (path, value) in expected {
        let Some(value) = value else { continue };
        assert_eq!(copied(&rest, &secret(path)).await?["data"], json!({ "value": value }), "{path}");
    }
    // The partial ARN is a rule's too: that there is nothing is no change.
    let report = rest.sync(&id).await?;
    assert_eq!((&report["outcome"], &report["unchanged"]), (&json!("complete"), &json!(6)), "{report}");
    for path in ["by-arn/partial", "there/other-AbCdEf"] {
        assert_eq!(rest.get(&secret(path)).await?.status, 404, "{path}");
    }
    Ok(())
}
