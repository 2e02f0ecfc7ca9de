//! Reading: whatever store a secret lives in, a node shows what is there, and nothing else.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result};
use futures::future::try_join_all;
use prost::Message as _;
use scaivault_domain::Reason;
use scaivault_edge::error::grpc::error;
use scaivault_proto::secrets::v1::{GetRequest, GetResponse, SecretSource};
use scaivault_tests::faults::Fault;
use scaivault_tests::planes::{CREDENTIAL, Federated};
use scaivault_tests::{http, wait};
use serde_json::{Value, json};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

const DB: &str = "/v1/secrets/external/hashicorp/app/db";

#[tokio::test]
async fn a_mapped_path_shows_what_its_backend_has() -> Result<()> {
    let federated = Federated::start().await?;
    let answer = federated.planes.rest(0)?.get(DB).await?;
    assert_eq!(answer.header("cache-control"), "no-store");
    assert_eq!(answer.header("age"), "0");
    let mut secret = answer.ok()?;
    assert!(secret["created_at"].take().is_string());
    let expected = json!({
        "path": "external/hashicorp/app/db", "version": null, "secret_type": "json",
        "data": { "user": "app", "password": "three" }, "content_type": "application/json",
        "metadata": { "team": "core" }, "state": "active", "source": "proxy", "remote_version": "3", "age": 0,
        "created_at": null,
    });
    assert_eq!(secret, expected);
    Ok(())
}

#[tokio::test]
async fn one_port_speaks_every_protocol() -> Result<()> {
    let federated = Federated::start().await?;
    let planes = &federated.planes;
    let get = GetRequest { path: "external/hashicorp/app/db".into(), ..Default::default() };
    let by_grpc =
        planes.secrets_client(0)?.get(get.clone()).await?.into_inner().secret.context("no secret")?;
    assert_eq!(by_grpc.source(), SecretSource::Proxy);
    assert_eq!(
        serde_json::from_slice::<Value>(&by_grpc.value)?,
        json!({ "user": "app", "password": "three" })
    );

    // grpc-web over HTTP/1.1: one flag byte and four of length before each message; the trailers are a message too.
    let mut framed = vec![0];
    framed.extend(u32::try_from(get.encoded_len())?.to_be_bytes());
    framed.extend(get.encode_to_vec());
    let web = http::client(None)?
        .post(format!("{}/scaivault.secrets.v1.SecretsService/Get", planes.node(0)))
        .version(reqwest::Version::HTTP_11)
        .header("content-type", "application/grpc-web+proto")
        .header("authorization", format!("Bearer {}", planes.operator_token()))
        .body(framed);
    let answer = web.send().await?;
    assert_eq!((answer.status().as_u16(), answer.version()), (200, reqwest::Version::HTTP_11));
    let answer = answer.bytes().await?;
    let length = u32::from_be_bytes(answer[1..5].try_into()?) as usize;
    let by_web = GetResponse::decode(&answer[5..5 + length])?.secret.context("no secret")?;
    assert_eq!((by_web.value, by_web.remote_version), (by_grpc.value, by_grpc.remote_version));
    assert!(answer[5 + length..].windows(13).any(|text| text == b"grpc-status:0"));

    for service in ["", "scaivault.secrets.v1.SecretsService", "scaivault.federation.v1.FederationService"] {
        let check = HealthCheckRequest { service: service.into() };
        let health = HealthClient::new(planes.channel(0)?).check(check).await?.into_inner();
        assert_eq!(health.status(), ServingStatus::Serving, "{service}");
    }
    let list = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let asked = futures::stream::iter([list]);
    let mut told =
        ServerReflectionClient::new(planes.channel(0)?).server_reflection_info(asked).await?.into_inner();
    let Some(MessageResponse::ListServicesResponse(list)) =
        told.message().await?.and_then(|m| m.message_response)
    else {
        anyhow::bail!("no list of services")
    };
    let services: Vec<_> = list.service.iter().map(|service| service.name.as_str()).collect();
    for service in ["secrets.v1.SecretsService", "federation.v1.FederationService", "admin.v1.AdminService"] {
        assert!(services.contains(&format!("scaivault.{service}").as_str()), "{services:?}");
    }
    Ok(())
}

#[tokio::test]
async fn one_field_can_be_picked() -> Result<()> {
    let federated = Federated::start().await?;
    let rest = federated.planes.rest(0)?;
    federated.bao.client()?.put("secret", "deep", json!({ "a": { "b": [1, 2] }, "c": "d" })).await?;
    assert_eq!(rest.get(&format!("{DB}?field=password")).await?.ok()?["value"], "three");
    let deep = rest.get("/v1/secrets/external/hashicorp/deep?field=a.b").await?.ok()?;
    assert_eq!(deep["value"], json!([1, 2]));
    let none = rest.get(&format!("{DB}?field=no.such")).await?;
    assert_eq!((none.refusal(), none.pointers()), ((404, "not_found"), vec!["/field"]));
    assert!(!none.text.contains("three"));
    Ok(())
}

#[tokio::test]
async fn every_path_of_a_batch_has_its_own_outcome() -> Result<()> {
    let federated = Federated::start().await?;
    let rest = federated.planes.rest(0)?;
    rest.put_data("own", json!({ "v": 1 })).await?;
    let reader = json!([
        { "path": "external/**", "capabilities": ["read"] },
        { "path": "own", "capabilities": ["read"] },
    ]);
    let reader = rest.with_token(&rest.issue("batch", &["secrets:read"], reader).await?.token)?;
    let paths = [
        "external/hashicorp/app/db",
        "own",
        "external/hashicorp/none",
        "external/hashicorp/gone",
        CREDENTIAL,
        "a//b",
    ];
    let answer = reader.post("/v1/secrets", json!({ "paths": paths })).await?.ok()?;
    let outcomes: Vec<_> = paths
        .iter()
        .zip(answer["results"].as_array().context("results")?)
        .map(|(path, result)| {
            assert_eq!(result["path"], *path);
            result["secret"]["source"].as_str().or(result["error"]["code"].as_str()).unwrap_or_default()
        })
        .collect();
    assert_eq!(outcomes, ["proxy", "local", "not_found", "not_active", "permission_denied", "invalid_path"]);
    Ok(())
}

#[tokio::test]
async fn the_history_of_a_backend_is_shown_with_its_states_and_without_values() -> Result<()> {
    let federated = Federated::start().await?;
    let rest = federated.planes.rest(0)?;
    let admin = federated.bao.client()?;
    admin.delete("secret", "app/db", &[2]).await?;
    admin.destroy("secret", "app/db", &[1]).await?;
    let versions = rest.get(&format!("{DB}?versions=true")).await?;
    assert!(!versions.text.contains("three"));
    let versions = versions.ok()?;
    let told: Vec<_> = versions["versions"].as_array().context("versions")?.iter().collect();
    let told: Vec<_> =
        told.iter().map(|v| (v["remote_version"].as_str(), v["state"].as_str(), &v["version"])).collect();
    let line = |remote, state| (Some(remote), Some(state), &Value::Null);
    assert_eq!(told, [line("3", "active"), line("2", "deleted"), line("1", "destroyed")]);

    let one = rest.get(&format!("{DB}?version=3")).await?;
    assert_eq!((one.refusal(), one.pointers()), ((400, "version_unsupported"), vec!["/version"]));
    Ok(())
}

#[tokio::test]
async fn what_has_no_value_says_why() -> Result<()> {
    let federated = Federated::start().await?;
    let rest = federated.planes.rest(0)?;
    assert_eq!(rest.get("/v1/secrets/external/hashicorp/gone").await?.refusal(), (404, "not_active"));
    assert_eq!(rest.get("/v1/secrets/external/hashicorp/none").await?.refusal(), (404, "not_found"));
    assert_eq!(rest.get("/v1/secrets/external/hashicorp/app").await?.refusal(), (404, "not_found"));
    assert_eq!(rest.get("/v1/secrets/elsewhere").await?.refusal(), (404, "not_found"));
    for path in ["external//db", "external/a%2fb", "external/%61", "%C3%A4", "a/", &"a/".repeat(40)] {
        assert_eq!(
            rest.get(&format!("/v1/secrets/{path}")).await?.refusal(),
            (400, "invalid_path"),
            "{path}"
        );
    }
    let mut grpc = federated.planes.secrets_client(0)?;
    for path in ["", "/", "external/../top", "./a", "a\0", "ä", "a\\b", &"a".repeat(256)] {
        let status = grpc.get(GetRequest { path: path.into(), ..Default::default() }).await.expect_err(path);
        assert_eq!(error(&status).reason, Reason::InvalidPath, "{path}");
    }
    let get = GetRequest { path: "external/hashicorp/gone".into(), ..Default::default() };
    let status = grpc.get(get).await.expect_err("it is deleted");
    assert_eq!(error(&status).reason, Reason::NotActive);
    Ok(())
}

#[tokio::test]
async fn identical_reads_in_flight_are_one_read_upstream_and_each_has_its_audit_row() -> Result<()> {
    const READERS: usize = 20;
    let federated = Federated::start().await?;
    let rest = federated.planes.rest(0)?;
    let before = federated.asked("read", "secret/data/app/db")?;
    federated.network.set(Fault::Delay(Duration::from_millis(500))).await?;
    let answers = try_join_all((0..READERS).map(|_| rest.get(DB))).await?;
    assert_eq!(federated.asked("read", "secret/data/app/db")? - before, 1);
    let mut requests: BTreeMap<String, usize> = BTreeMap::new();
    for answer in answers {
        requests.insert(answer.header("x-request-id").to_owned(), 0);
        assert_eq!(answer.ok()?["data"]["password"], "three");
    }
    assert_eq!(requests.len(), READERS);
    wait::until("every row has arrived", async || {
        requests.values_mut().for_each(|rows| *rows = 0);
        for row in rest.audit().await? {
            if let Some(rows) = requests.get_mut(row["request_id"].as_str().unwrap_or_default()) {
                *rows += 1;
            }
        }
        Ok(requests.values().all(|rows| *rows == 1).then_some(()))
    })
    .await
}

#[tokio::test]
async fn a_value_that_changes_upstream_is_seen_at_once() -> Result<()> {
    let federated = Federated::start().await?;
    let (rest, admin) = (federated.planes.rest(0)?, federated.bao.client()?);
    for number in 4..14 {
        admin.put("secret", "app/db", json!({ "number": number })).await?;
        let secret = rest.get(DB).await?.ok()?;
        assert_eq!(
            (&secret["data"]["number"], &secret["remote_version"]),
            (&json!(number), &json!(number.to_string()))
        );
    }
    admin.delete("secret", "app/db", &[13]).await?;
    assert_eq!(rest.get(DB).await?.refusal(), (404, "not_active"));
    Ok(())
}
