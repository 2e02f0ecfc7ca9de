//! Proxy mode: a read shows what the store has now, in its own kind, and keeps nothing.

use anyhow::{Context as _, Result};
use scaivault_domain::Reason;
use scaivault_edge::error::grpc::error;
use scaivault_proto::secrets::v1::{GetRequest, SecretSource, SecretType};
use scaivault_tests::planes::Rest;
use scaivault_tests::stores::Store;
use serde_json::{Value, json};

use super::{keys, planes, readable, secret, with_stores};

/// No JSON number of a computer's own holds these digits.
const BIG: &str = r#"{"big":123456789012345678901234567890,"float":1.10,"b":{"z":1,"a":[null,"ü\n"]}}"#;

async fn values_arrive_as_they_are(store: Store) -> Result<()> {
    let (planes, rest) = planes().await?;
    let mut texts = vec![
        ("json", BIG, SecretType::Json),
        ("text", "pässword", SecretType::Text),
        ("twice", r#"{"a":1,"a":2}"#, SecretType::Text),
        ("number", "7", SecretType::Text),
    ];
    // The others take no empty values.
    if matches!(store, Store::Azure(_)) {
        texts.push(("empty", "", SecretType::Text));
    }
    for (path, value, _) in &texts {
        store.put(&store.name(path), value).await?;
    }
    store.federate(&rest, "there", json!({})).await?;
    readable(&rest, "there/text").await?;
    let mut grpc = planes.secrets_client(0)?;
    for (path, value, kind) in texts {
        let path = format!("there/{path}");
        let shown = rest.get(&secret(&path)).await?;
        assert_eq!(shown.header("cache-control"), "no-store");
        assert_eq!((&shown.json["source"], &shown.json["age"]), (&json!("proxy"), &json!(0)), "{path}");
        match kind {
            SecretType::Json => assert!(shown.text.contains(&format!(r#""data":{value}"#)), "{}", shown.text),
            _ => assert_eq!(shown.json["data"], json!({ "value": value }), "{path}"),
        }
        let by_grpc = grpc.get(GetRequest { path: path.clone(), ..Default::default() }).await?;
        let by_grpc = by_grpc.into_inner().secret.context("it")?;
        assert_eq!(by_grpc.value, value.as_bytes(), "{path}");
        assert_eq!((by_grpc.secret_type(), by_grpc.source()), (kind, SecretSource::Proxy), "{path}");
        assert_eq!(shown.json["remote_version"], by_grpc.remote_version);
    }
    if matches!(store, Store::Azure(_)) {
        return Ok(());
    }
    store.put_bytes(&store.name("binary"), b"\xff\0\xfe").await?;
    let shown = rest.get(&secret("there/binary")).await?.ok()?;
    assert_eq!(
        (&shown["secret_type"], &shown["encoding"], &shown["data"]),
        (&json!("binary"), &json!("base64"), &json!({ "value": "/wD+" }))
    );
    let by_grpc = grpc.get(GetRequest { path: "there/binary".into(), ..Default::default() }).await?;
    assert_eq!(by_grpc.into_inner().secret.context("it")?.value, &b"\xff\0\xfe"[..]);
    Ok(())
}
with_stores!(aws, azure, gcp, drongo: values_arrive_as_they_are);

async fn folders_are_listed_and_what_is_not_there_says_so(store: Store) -> Result<()> {
    let (planes, rest) = planes().await?;
    for path in ["app/db", "app/api/key", "top"] {
        store.put(&store.name(path), r#"{"v":1}"#).await?;
    }
    store.federate(&rest, "there", json!({})).await?;
    readable(&rest, "there/top").await?;
    assert_eq!(keys(&rest, "there/").await?, ["app/", "top"]);
    assert_eq!(keys(&rest, "there/app/").await?, ["api/", "db"]);
    assert_eq!(keys(&rest, "").await?.iter().filter(|key| *key == "there/").count(), 1);

    for path in ["there/none", "there/app", "there/app/db/none"] {
        assert_eq!(rest.get(&secret(path)).await?.refusal(), (404, "not_found"), "{path}");
    }
    let get = GetRequest { path: "there/none".into(), ..Default::default() };
    let status = planes.secrets_client(0)?.get(get).await.expect_err("it is not there");
    assert_eq!(error(&status).reason, Reason::NotFound);

    // A change is seen at once, and so is a deletion.
    store.put(&store.name("top"), r#"{"v":2}"#).await?;
    assert_eq!(rest.get(&secret("there/top")).await?.ok()?["data"], json!({ "v": 2 }));
    store.delete(&store.name("top")).await?;
    let gone = rest.get(&secret("there/top")).await?;
    // AWS tells that a secret waits for its end; the others know it no more.
    let code = if matches!(store, Store::Aws(_)) { "not_active" } else { "not_found" };
    assert_eq!(gone.refusal(), (404, code), "{}", gone.text);
    assert_eq!(
        rest.put(&secret("there/app/db"), json!({ "data": {} })).await?.refusal(),
        (409, "federated_read_only")
    );
    Ok(())
}
with_stores!(aws, azure, gcp, drongo: folders_are_listed_and_what_is_not_there_says_so);

/// Remote version and state of each version, as a listing of versions shows them.
async fn history(rest: &Rest, path: &str) -> Result<Vec<(String, String)>> {
    let answer = rest.get(&format!("{}?versions=true", secret(path))).await?.ok()?;
    let text = |version: &Value, name: &str| version[name].as_str().unwrap_or_default().to_owned();
    let versions = answer["versions"].as_array().context("versions")?;
    Ok(versions.iter().map(|version| (text(version, "remote_version"), text(version, "state"))).collect())
}

async fn the_history_is_shown(store: Store) -> Result<()> {
    let (_planes, rest) = planes().await?;
    let name = store.name("db");
    for value in ["one", "two"] {
        store.put(&name, value).await?;
    }
    store.federate(&rest, "there", json!({})).await?;
    readable(&rest, "there/db").await?;
    let shown = history(&rest, "there/db").await?;
    assert_eq!(shown.len(), 2, "{shown:?}");
    assert!(shown.iter().all(|(id, state)| !id.is_empty() && state == "active"), "{shown:?}");
    let current = rest.get(&secret("there/db")).await?.ok()?;
    if !matches!(store, Store::Azure(_)) {
        // Azure dates versions to the second, so these two may stand in either order.
        assert_eq!(current["remote_version"], shown[0].0);
    }
    let old = rest.get(&format!("{}?version=1", secret("there/db"))).await?;
    assert_eq!((old.refusal(), old.pointers()), ((400, "version_unsupported"), vec!["/version"]));
    Ok(())
}
with_stores!(aws, azure, gcp, drongo: the_history_is_shown);

#[tokio::test]
async fn a_disabled_or_expired_secret_of_azure_has_no_value() -> Result<()> {
    let (_planes, rest) = planes().await?;
    let store = Store::azure().await?;
    for path in ["db", "old"] {
        store.put(&store.name(path), "value").await?;
    }
    store.federate(&rest, "there", json!({})).await?;
    readable(&rest, "there/db").await?;
    store.azure_fake()?.disable(&store.name("db"));
    let disabled = rest.get(&secret("there/db")).await?;
    assert_eq!(disabled.refusal(), (404, "not_active"), "{}", disabled.text);
    assert!(disabled.text.contains("disabled"), "{}", disabled.text);
    assert_eq!(history(&rest, "there/db").await?[0].1, "disabled");
    store.azure_fake()?.enable(&store.name("db"));
    assert_eq!(rest.get(&secret("there/db")).await?.status, 200);
    // Azure itself serves what is expired.
    store.azure_fake()?.set_expiry(&store.name("old"), 1_000_000_000);
    let expired = rest.get(&secret("there/old")).await?;
    assert_eq!(expired.refusal(), (404, "not_active"), "{}", expired.text);
    assert!(expired.text.contains("expired"), "{}", expired.text);
    Ok(())
}

/// Not with drongo, whose `latest` is the newest version that is enabled.
#[tokio::test]
async fn a_closed_version_of_gcp_has_no_value() -> Result<()> {
    let (_planes, rest) = planes().await?;
    let store = Store::gcp().await?;
    let name = store.name("db");
    for value in ["one", "two"] {
        store.put(&name, value).await?;
    }
    store.federate(&rest, "there", json!({})).await?;
    readable(&rest, "there/db").await?;
    for state in ["disabled", "destroyed"] {
        let secrets = store.gcp_fake()?.secrets();
        if state == "disabled" {
            secrets.disable(&name, 2)?
        } else {
            secrets.destroy(&name, 2)?
        }
        // The newest version is what counts: an older one never takes its place.
        let closed = rest.get(&secret("there/db")).await?;
        assert_eq!(closed.refusal(), (404, "not_active"), "{state}: {}", closed.text);
        assert!(closed.text.contains(state), "{}", closed.text);
        let shown = history(&rest, "there/db").await?;
        assert_eq!(shown, [("2".into(), state.into()), ("1".into(), "active".into())]);
    }
    Ok(())
}
