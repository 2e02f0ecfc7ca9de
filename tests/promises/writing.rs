//! Writing: what is acknowledged is kept as it was sent, and a store that is the truth is never written.

use anyhow::{Context as _, Result};
use reqwest::Method;
use scaivault_domain::Reason;
use scaivault_edge::error::grpc::error;
use scaivault_proto::secrets::v1::{DeleteRequest, PutRequest, SecretType};
use scaivault_tests::planes::{Federated, Options, Planes, Rest};
use scaivault_tests::wait;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;

const PATH: &str = "/v1/secrets/app/db";

async fn planes() -> Result<(Planes, Rest)> {
    let planes = Planes::start(Options::default()).await?;
    let rest = planes.rest(0)?;
    Ok((planes, rest))
}

#[tokio::test]
async fn every_write_is_a_version_and_a_delete_keeps_them() -> Result<()> {
    let (_planes, rest) = planes().await?;
    let metadata = json!({ "data": { "n": 1 }, "metadata": { "team": "core" } });
    let first = rest.put(PATH, metadata).await?;
    assert_eq!((first.status, first.header("etag")), (201, "\"v1\""));
    let second = rest.put(PATH, json!({ "data": { "n": 2 } })).await?;
    assert_eq!((second.status, second.header("etag")), (200, "\"v2\""));

    let current = rest.get(PATH).await?;
    assert_eq!((current.header("etag"), &current.json["source"]), ("\"v2\"", &json!("local")));
    let old = rest.get(&format!("{PATH}?version=1")).await?.ok()?;
    assert_eq!(
        (&old["data"], &old["version"], &old["metadata"]["team"]),
        (&json!({ "n": 1 }), &json!(1), &json!("core"))
    );
    assert_eq!(rest.get(&format!("{PATH}?version=3")).await?.refusal(), (404, "not_found"));

    assert_eq!(rest.delete(PATH).await?.status, 204);
    assert_eq!(rest.get(PATH).await?.refusal(), (404, "not_active"));
    assert_eq!(rest.delete(PATH).await?.refusal(), (404, "not_found"));
    assert_eq!(rest.get(&format!("{PATH}?version=1")).await?.ok()?["data"], json!({ "n": 1 }));
    let versions = rest.get(&format!("{PATH}?versions=true")).await?.ok()?;
    let versions: Vec<_> = versions["versions"].as_array().context("versions")?.iter().collect();
    let told: Vec<_> = versions.iter().map(|v| (v["version"].as_u64(), v["state"].as_str())).collect();
    assert_eq!(told, [(Some(2), Some("deleted")), (Some(1), Some("active"))]);
    assert_eq!(rest.put(PATH, json!({ "data": { "n": 3 } })).await?.header("etag"), "\"v3\"");
    Ok(())
}

#[tokio::test]
async fn conditions_keep_writers_from_overwriting_each_other() -> Result<()> {
    let (_planes, rest) = planes().await?;
    let body = || json!({ "data": {} });
    let conflict = (412, "precondition_failed");
    assert_eq!(rest.with_header("if-match", "\"v1\"")?.put(PATH, body()).await?.refusal(), conflict);
    let absent = rest.with_header("if-none-match", "*")?;
    assert_eq!(absent.put(PATH, body()).await?.status, 201);
    assert_eq!(absent.put(PATH, body()).await?.refusal(), conflict);
    assert_eq!(rest.with_header("if-match", "\"v1\"")?.put(PATH, body()).await?.header("etag"), "\"v2\"");
    assert_eq!(rest.with_header("if-match", "\"v1\"")?.put(PATH, body()).await?.refusal(), conflict);
    assert_eq!(rest.with_header("if-none-match", "\"v2\"")?.get(PATH).await?.status, 304);
    assert_eq!(rest.with_header("if-match", "\"v1\"")?.delete(PATH).await?.refusal(), conflict);
    assert_eq!(rest.with_header("if-match", "\"v2\"")?.delete(PATH).await?.status, 204);
    assert_eq!(absent.put(PATH, body()).await?.header("etag"), "\"v3\"");

    // Of many that race for one version exactly one wins.
    let racer = rest.with_header("if-match", "\"v3\"")?;
    let races =
        futures::future::try_join_all((0..8).map(|n| racer.put(PATH, json!({ "data": { "n": n } })))).await?;
    assert_eq!(races.iter().filter(|answer| answer.status == 200).count(), 1);
    assert!(races.iter().all(|answer| answer.status == 200 || answer.refusal() == conflict));
    Ok(())
}

#[tokio::test]
async fn a_value_stays_byte_for_byte_what_it_was() -> Result<()> {
    let (planes, rest) = planes().await?;
    let value = r#"{"z":123456789012345678901234567890,"a":1.10,"é":"\u00e9","m":{"y":null,"b":[]}}"#;
    let body = format!(r#"{{"data":{value},"secret_type":"json"}}"#);
    rest.send(Method::PUT, PATH, Some(body)).await?.ok()?;
    let answer = rest.get(PATH).await?;
    assert!(answer.text.contains(&format!(r#""data":{value}"#)), "{}", answer.text);

    let twice = r#"{"data":{"a":{"b":1,"b":2}}}"#;
    let refused = rest.send(Method::PUT, PATH, Some(twice.into())).await?;
    assert_eq!((refused.refusal(), refused.pointers()), ((400, "invalid_request"), vec!["/data"]));

    let text = " not json \u{0} ä\n";
    rest.put("/v1/secrets/text", json!({ "data": { "value": text }, "secret_type": "text" })).await?.ok()?;
    let read = rest.get("/v1/secrets/text").await?.ok()?;
    assert_eq!((&read["data"]["value"], &read["secret_type"]), (&json!(text), &json!("text")));

    let bytes = PutRequest {
        path: "binary".into(),
        value: (0..=255).collect::<Vec<u8>>().into(),
        secret_type: SecretType::Binary.into(),
        content_type: "application/x-thing".into(),
        ..Default::default()
    };
    planes.secrets_client(0)?.put(bytes).await?;
    let read = rest.get("/v1/secrets/binary").await?.ok()?;
    assert_eq!((&read["encoding"], &read["content_type"]), (&json!("base64"), &json!("application/x-thing")));
    let again = json!({ "data": read["data"], "secret_type": "binary", "encoding": "base64" });
    rest.put("/v1/secrets/again", again).await?.ok()?;
    assert_eq!(rest.get("/v1/secrets/again").await?.ok()?["data"], read["data"]);

    for (body, pointer) in [
        (json!({ "data": [1] }), "/data"),
        (json!({ "data": { "value": 7 }, "secret_type": "text" }), "/data/value"),
        (json!({ "data": { "value": "=" }, "secret_type": "binary" }), "/data/value"),
        (json!({ "data": {}, "colour": 1 }), "/colour"),
        (json!({ "data": {}, "secret_type": "yaml" }), "/secret_type"),
        (json!({ "data": {}, "metadata": { "k": 1 } }), "/metadata/k"),
    ] {
        let refused = rest.put("/v1/secrets/wrong", body.clone()).await?;
        assert_eq!(
            (refused.refusal(), refused.pointers()),
            ((400, "invalid_request"), vec![pointer]),
            "{body}"
        );
    }
    assert_eq!(rest.get("/v1/secrets/wrong").await?.status, 404);
    Ok(())
}

#[tokio::test]
async fn what_is_too_large_is_refused_whole() -> Result<()> {
    let (planes, rest) = planes().await?;
    let of = |bytes: usize| json!({ "data": { "value": "x".repeat(bytes) }, "secret_type": "text" });
    rest.put(PATH, of(1 << 20)).await?.ok()?;
    assert_eq!(rest.get(PATH).await?.ok()?["data"]["value"].as_str().map(str::len), Some(1 << 20));
    assert_eq!(rest.put(PATH, of((1 << 20) + 1)).await?.refusal(), (413, "too_large"));
    assert_eq!(rest.put(PATH, of(3 << 20)).await?.refusal(), (413, "too_large"));
    let put = PutRequest {
        path: "app/db".into(),
        value: vec![b'x'; (1 << 20) + 1].into(),
        secret_type: SecretType::Text.into(),
        ..Default::default()
    };
    let refused = planes.secrets_client(0)?.put(put).await.expect_err("it is too large");
    assert_eq!(error(&refused).reason, Reason::TooLarge);
    assert_eq!(rest.get(PATH).await?.header("etag"), "\"v1\"");
    Ok(())
}

#[tokio::test]
async fn a_federated_path_takes_no_write_and_its_backend_hears_of_none() -> Result<()> {
    let federated = Federated::start().await?;
    let (planes, rest) = (&federated.planes, federated.planes.rest(0)?);
    for path in ["app/db", "new"] {
        let path = format!("/v1/secrets/external/hashicorp/{path}");
        assert_eq!(rest.put(&path, json!({ "data": {} })).await?.refusal(), (409, "federated_read_only"));
        assert_eq!(rest.delete(&path).await?.refusal(), (409, "federated_read_only"));
        let direct = planes.control_plane_rest()?;
        assert_eq!(direct.put(&path, json!({ "data": {} })).await?.refusal(), (409, "federated_read_only"));
    }
    let path = "external/hashicorp/app/db".to_owned();
    let put = PutRequest { path: path.clone(), value: "{}".into(), ..Default::default() };
    let mut grpc = planes.secrets_client(0)?;
    let refused = grpc.put(put).await.expect_err("it is read-only");
    assert_eq!(error(&refused).reason, Reason::FederatedReadOnly);
    let refused =
        grpc.delete(DeleteRequest { path, expected_version: None }).await.expect_err("it is read-only");
    assert_eq!(error(&refused).reason, Reason::FederatedReadOnly);

    let changes = ["create", "update", "patch", "delete"];
    let by_us = federated.network.requests();
    assert!(
        !by_us.iter().any(|request| request.contains("secret/") && !request.starts_with("GET ")),
        "{by_us:?}"
    );
    let secret = federated.bao.client()?.read("secret/data/app/db").await?.context("it is there")?;
    assert_eq!(secret["data"]["metadata"]["version"], 3);
    assert!(
        !federated
            .bao
            .requests()?
            .iter()
            .any(|r| changes.iter().any(|c| r.starts_with(c)) && r.ends_with("/new"))
    );
    Ok(())
}

#[tokio::test]
async fn a_write_is_whole_or_not_there_when_its_caller_hangs_up() -> Result<()> {
    let (planes, rest) = planes().await?;
    let body = json!({ "data": { "whole": true } }).to_string();
    for _ in 0..30 {
        let mut caller = TcpStream::connect(planes.nodes[0].address()).await?;
        let head = format!(
            "PUT {PATH} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {}\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n",
            planes.operator_token(),
            body.len()
        );
        caller.write_all(head.as_bytes()).await?;
        caller.write_all(body.as_bytes()).await?;
        drop(caller);
    }
    let last = rest.put(PATH, json!({ "data": { "last": true } })).await?.ok()?;
    let versions: Value = rest.get(&format!("{PATH}?versions=true")).await?.ok()?;
    let numbers: Vec<_> = versions["versions"].as_array().context("versions")?.iter().collect();
    // No number is missing, and behind each there is a whole value.
    assert!(numbers.len() as u64 >= last["version"].as_u64().context("version")?);
    for (distance, line) in numbers.iter().rev().enumerate() {
        assert_eq!(line["version"], distance + 1);
        rest.get(&format!("{PATH}?version={}", distance + 1)).await?.ok()?;
    }
    Ok(())
}

#[tokio::test]
async fn an_acknowledged_write_survives_the_death_of_the_control_plane() -> Result<()> {
    let (mut planes, rest) = planes().await?;
    let writer = tokio::spawn({
        let rest = rest.clone();
        async move {
            let mut acknowledged = 0;
            while let Ok(answer) = rest.put(PATH, json!({ "data": { "n": acknowledged + 1 } })).await {
                if answer.status / 100 != 2 {
                    break;
                }
                acknowledged += 1;
            }
            acknowledged
        }
    });
    wait::until("some writes are acknowledged", async || {
        Ok((rest.get(PATH).await?.json["version"].as_u64() > Some(20)).then_some(()))
    })
    .await?;
    planes.control_plane.kill9();
    let acknowledged: u64 = writer.await?;
    planes.control_plane.start_again().await?;
    let direct = planes.control_plane_rest()?;
    let kept = direct.get(&format!("{PATH}?version={acknowledged}")).await?.ok()?;
    assert_eq!(kept["data"]["n"], acknowledged);
    wait::until("the node forwards again", async || Ok((rest.get(PATH).await?.status == 200).then_some(())))
        .await
}
