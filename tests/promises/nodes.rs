//! Nodes: who joins, whom they serve, and who cannot pretend to be one.

use anyhow::{Context as _, Result};
use reqwest::{Client, Identity};
use scaivault_tests::authority::Authority;
use scaivault_tests::planes::{Options, Planes, scaivault};
use scaivault_tests::{http, wait};
use serde_json::json;

#[tokio::test]
async fn a_node_of_one_tenant_serves_nobody_else() -> Result<()> {
    let mut planes = Planes::start(Options::default()).await?;
    let operator = planes.rest(0)?;
    let mut tokens = Vec::new();
    for tenant in ["acme", "globex"] {
        operator.post("/v1/tenants", json!({ "id": tenant })).await?.ok()?;
        let wanted =
            json!({ "subject": tenant, "scopes": ["secrets:read", "secrets:write"], "policies": ["root"] });
        let made = operator.in_tenant(tenant)?.post("/v1/tokens", wanted).await?.ok()?;
        let rest = operator.with_token(made["token"].as_str().context("token")?)?;
        rest.put_data("x", json!({ "of": tenant })).await?;
        tokens.push(made["token"].as_str().context("token")?.to_owned());
    }
    let index = planes.add_node("acme-node", &["acme"]).await?;
    let node = planes.rest(index)?;
    assert_eq!(node.with_token(&tokens[0])?.get("/v1/secrets/x").await?.ok()?["data"]["of"], "acme");
    let foreign = node.with_token(&tokens[1])?;
    for answer in [
        foreign.get("/v1/secrets/x").await?,
        foreign.get("/v1/secrets/?list=true").await?,
        foreign.put("/v1/secrets/x", json!({ "data": {} })).await?,
        foreign.get("/v1/tokens/self").await?,
        node.get("/v1/secrets/x").await?,
        node.in_tenant("globex")?.get("/v1/secrets/x").await?,
    ] {
        assert!([401, 403].contains(&answer.status), "{} {}", answer.status, answer.text);
        assert!(!answer.text.contains("globex"), "{}", answer.text);
    }
    assert_eq!(operator.with_token(&tokens[1])?.get("/v1/secrets/x").await?.ok()?["version"], 1);
    Ok(())
}

#[tokio::test]
async fn a_join_token_lets_one_node_in_once() -> Result<()> {
    let planes = Planes::start(Options::default()).await?;
    let second = tempfile::tempdir()?;
    let mut join = scaivault();
    join.arg("data-plane")
        .args(["--listen", "127.0.0.1:0", "--control-plane", &format!("https://{}", planes.node_listener())])
        .arg("--data-dir")
        .arg(second.path())
        .arg("--join-token-file")
        .arg(planes.join_token("node-0"));
    let refused = tokio::process::Command::from(join).output().await?;
    assert!(!refused.status.success());
    let told = String::from_utf8(refused.stderr)?;
    assert!(told.contains("the join token is unknown, used or too old"), "{told}");

    let taken = planes.rest(0)?.post("/v1/nodes", json!({ "name": "node-0", "tenants": ["*"] })).await?;
    assert_eq!((taken.refusal(), taken.pointers()), ((409, "already_exists"), vec!["/name"]));
    Ok(())
}

#[tokio::test]
async fn a_removed_node_is_refused() -> Result<()> {
    let mut planes = Planes::start(Options::default().nodes(2)).await?;
    let (rest, removed) = (planes.rest(0)?, planes.rest(1)?);
    removed.put_data("x", json!({ "v": 1 })).await?;
    assert_eq!(rest.delete("/v1/nodes/node-1").await?.status, 204);
    wait::until("its writes and reads are refused", async || {
        let write = removed.put("/v1/secrets/x", json!({ "data": {} })).await?;
        let read = removed.get("/v1/secrets/x").await?;
        Ok((write.status >= 400 && read.status >= 400).then_some(()))
    })
    .await?;
    let version = rest.get("/v1/secrets/x").await?.ok()?["version"].clone();
    planes.nodes[1].kill9();
    planes.nodes[1].start_again().await?;
    for _ in 0..5 {
        assert!(removed.get("/readyz").await?.status >= 500);
        assert!(removed.get("/v1/secrets/x").await?.status >= 400);
    }
    assert_eq!(rest.get("/v1/secrets/x").await?.ok()?["version"], version);
    let listed = rest.get("/v1/nodes").await?.ok()?;
    assert_eq!(listed["nodes"].as_array().context("nodes")?.len(), 1);

    // The name is free again.
    planes.invite("node-1", &["*"]).await.map(drop)
}

#[tokio::test]
async fn only_enrolled_nodes_reach_the_listener_for_nodes() -> Result<()> {
    let planes = Planes::start(Options::default()).await?;
    let ship =
        format!("https://{}/scaivault.discovery.v1.DiscoveryService/ShipSegment", planes.node_listener());
    let foreign = Authority::new()?.issue()?;
    let foreign = Identity::from_pem(format!("{}{}", foreign.certificate, foreign.key).as_bytes())?;
    let client = || Client::builder().no_proxy().tls_danger_accept_invalid_certs(true);
    // Whoever has no certificate may only enrol; whoever shows a stranger's is cut off.
    for (client, who) in [(client().build()?, "nobody"), (client().identity(foreign).build()?, "a stranger")]
    {
        let request = client
            .post(&ship)
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .header("authorization", format!("Bearer {}", planes.operator_token()))
            .body(vec![0; 5]);
        match request.send().await {
            Ok(answer) => {
                let status = answer.headers().get("grpc-status").and_then(|status| status.to_str().ok());
                assert!([Some("16"), Some("7")].contains(&status), "{who}: {answer:?}");
            }
            Err(cut) => assert!(cut.is_connect() || cut.is_request(), "{who}: {cut:?}"),
        }
    }
    // Its certificate is of the installation's own authority: nobody else vouches for it, and it does no REST.
    assert!(http::client(None)?.get(ship).send().await.is_err());
    let rest = format!("https://{}/v1/secrets/x", planes.node_listener());
    let answer = client().build()?.get(rest).bearer_auth(planes.operator_token()).send().await;
    assert!(answer.is_err() || answer.is_ok_and(|answer| !answer.status().is_success()));
    Ok(())
}
