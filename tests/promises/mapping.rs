//! Mapping and listing: which paths there are, whatever the shape of the store behind them.

use anyhow::{Context as _, Result};
use scaivault_domain::backend::KvVersion;
use scaivault_tests::authority::Authority;
use scaivault_tests::planes::{self, CREDENTIAL, Federated, Planes, Rest};
use scaivault_tests::servers::openbao::{self, OpenBao};
use serde_json::{Value, json};

async fn keys(rest: &Rest, folder: &str) -> Result<Vec<String>> {
    let list = rest.get(&format!("/v1/secrets/{folder}?list=true")).await?.ok()?;
    Ok(serde_json::from_value(list["keys"].clone())?)
}

#[tokio::test]
async fn a_folder_shows_local_and_federated_children_as_far_as_the_caller_may_see() -> Result<()> {
    let federated = Federated::start().await?;
    let rest = federated.planes.rest(0)?;
    for path in ["external/local", "external/hash/x", "zebra"] {
        rest.put_data(path, json!({})).await?;
    }
    assert_eq!(keys(&rest, "").await?, ["external/", "infra/", "zebra"]);
    assert_eq!(keys(&rest, "external/").await?, ["hash/", "hashicorp/", "local"]);
    assert_eq!(keys(&rest, "external/hashicorp/").await?, ["app/", "gone", "top"]);
    assert_eq!(keys(&rest, "external/hashicorp/app/").await?, ["api/", "db"]);
    assert_eq!(keys(&rest, "external/nothing/").await?, [""; 0]);

    let first = rest.get("/v1/secrets/external/?list=true&page_size=2").await?.ok()?;
    let token = first["next_page_token"].as_str().context("there is more")?;
    let second =
        rest.get(&format!("/v1/secrets/external/?list=true&page_size=2&page_token={token}")).await?.ok()?;
    assert_eq!((&first["keys"], &second["keys"]), (&json!(["hash/", "hashicorp/"]), &json!(["local"])));

    let rules = json!([
        { "path": "external/hashicorp/app/**", "capabilities": ["list"] },
        { "path": "external/hashicorp/app/db", "capabilities": ["list"], "effect": "deny" },
        { "path": "zebra", "capabilities": ["read"] },
    ]);
    let one = rest.with_token(&rest.issue("lister", &["secrets:read"], rules).await?.token)?;
    assert_eq!(keys(&one, "").await?, ["external/"]);
    assert_eq!(keys(&one, "external/").await?, ["hashicorp/"]);
    assert_eq!(keys(&one, "external/hashicorp/").await?, ["app/"]);
    assert_eq!(keys(&one, "external/hashicorp/app/").await?, ["api/"]);
    Ok(())
}

#[tokio::test]
async fn a_folder_in_which_everything_is_denied_is_not_shown() -> Result<()> {
    let planes = Planes::start(planes::Options::default()).await?;
    let rest = planes.rest(0)?;
    rest.put_data("app/open", json!({})).await?;
    rest.put_data("app/closed/deep/x", json!({})).await?;
    let rules = json!([
        { "path": "app/**", "capabilities": ["list"] },
        { "path": "app/closed/**", "capabilities": ["list"], "effect": "deny" },
    ]);
    let one = rest.with_token(&rest.issue("lister", &["secrets:read"], rules).await?.token)?;
    assert_eq!(keys(&one, "app/").await?, ["open"]);
    assert_eq!(keys(&one, "app/closed/").await?, [""; 0]);
    Ok(())
}

#[tokio::test]
async fn mounts_of_every_shape_are_found() -> Result<()> {
    let (bao, planes) = tokio::try_join!(
        OpenBao::start(openbao::Options::default()),
        Planes::start(planes::Options::default())
    )?;
    let (admin, rest) = (bao.client()?, planes.rest(0)?);
    let all = r#"path "*" { capabilities = ["read", "list"] }"#;
    rest.put_data(CREDENTIAL, planes::application(&admin, all).await?).await?;
    admin.enable_kv("secret", KvVersion::V2).await?;
    admin.enable_kv("old", KvVersion::V1).await?;
    admin.enable_kv("team/one/kv", KvVersion::V2).await?;
    admin.put("secret", "x", json!({ "is": "x" })).await?;
    admin.put("secret", "data/x", json!({ "is": "data/x" })).await?;
    admin.put_v1("old", "data/a b", json!({ "is": "old" })).await?;
    admin.put_v1("old", "data/y", json!({ "is": "data/y" })).await?;
    admin.put("team/one/kv", "deep/x", json!({ "is": "deep" })).await?;
    let mapping = json!({
        "infix/**": "secret/data/**", "plain/**": "secret/**", "old/**": "old/**", "team/**": "team/one/kv/data/**",
        "single": "secret/data/x",
    });
    rest.create_backend("shapes", &bao.addr(), CREDENTIAL, mapping).await?;
    for (path, is) in [
        ("infix/x", Some("x")),
        ("infix/data/x", Some("data/x")),
        ("plain/x", Some("x")),
        ("plain/data/x", Some("data/x")),
        ("plain/metadata/x", None),
        ("old/data/y", Some("data/y")),
        ("old/y", None),
        ("team/deep/x", Some("deep")),
        ("single", Some("x")),
    ] {
        let answer = rest.get(&format!("/v1/secrets/{path}")).await?;
        assert_eq!(answer.json["data"]["is"].as_str(), is, "{path}: {}", answer.text);
        assert!(is.is_some() || answer.status == 404, "{path}: {}", answer.text);
    }
    let old = rest.get("/v1/secrets/old/data/y").await?.ok()?;
    assert_eq!((&old["remote_version"], &old["metadata"]), (&Value::Null, &json!({})));
    Ok(())
}

#[tokio::test]
async fn a_namespace_behind_tls_of_a_private_authority_is_read() -> Result<()> {
    let authority = Authority::new()?;
    let (ca, stranger) = (authority.pem(), Authority::new()?.pem());
    let (bao, planes) = tokio::try_join!(
        OpenBao::start(openbao::Options::default().tls(authority)),
        Planes::start(planes::Options::default())
    )?;
    bao.client()?.create_namespace("team").await?;
    let (admin, rest) = (bao.client()?.in_namespace("team"), planes.rest(0)?);
    rest.put_data(CREDENTIAL, planes::application(&admin, planes::POLICY).await?).await?;
    admin.enable_kv("secret", KvVersion::V2).await?;
    admin.put("secret", "x", json!({ "is": "in the namespace" })).await?;
    let mut configuration =
        planes::backend("tls", &bao.addr(), CREDENTIAL, json!({ "ns/**": "secret/data/**" }));
    configuration["config"]["namespace"] = json!("team");
    configuration["config"]["ca_cert"] = json!(ca);
    let id = rest.post("/v1/federation/backends", configuration).await?.ok()?["id"]
        .as_str()
        .context("id")?
        .to_owned();
    assert_eq!(rest.get("/v1/secrets/ns/x").await?.ok()?["data"]["is"], "in the namespace");

    let backend = format!("/v1/federation/backends/{id}");
    for ca_cert in [json!(stranger), Value::Null] {
        rest.patch(&backend, json!({ "config": { "ca_cert": ca_cert } })).await?.ok()?;
        let refused = rest.get("/v1/secrets/ns/x").await?;
        assert_eq!(refused.status / 100, 5, "{}", refused.text);
        assert!(!refused.text.contains("in the namespace"));
    }
    Ok(())
}
