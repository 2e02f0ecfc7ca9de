//! A node without its control plane: what it knows goes on, what it does not know is told as such, and nothing has to be
//! restarted afterwards.

use std::time::Duration;

use anyhow::{Result, ensure};
use futures::future::try_join_all;
use reqwest::Method;
use scaivault_tests::faults::Fault;
use scaivault_tests::planes::{CREDENTIAL, Federated, Options, Rest};
use scaivault_tests::wait;
use serde_json::json;
use tokio::time::Instant;

const PROXIED: &str = "/v1/secrets/external/hashicorp/app/db";
const LOCAL: &str = "/v1/secrets/local/app";
/// Written during outages. A frozen control plane may still do, once it goes on, what it was sent.
const WRITTEN: &str = "/v1/secrets/local/written";
const BACKENDS: &str = "/v1/federation/backends";

const NO_CONTROL_PLANE: (u16, &str) = (503, "control_plane_unavailable");

/// How the control plane goes away, and comes back.
#[derive(Clone, Copy, Debug)]
enum Outage {
    Stopped,
    Killed,
    Frozen,
    Cut,
}

impl Outage {
    async fn begin(self, federated: &mut Federated) -> Result<()> {
        match self {
            Outage::Stopped => federated.planes.control_plane.stop().await,
            Outage::Killed => {
                federated.planes.control_plane.kill9();
                Ok(())
            }
            Outage::Frozen => federated.planes.control_plane.process()?.pause().await,
            Outage::Cut => federated.planes.link(0).set(Fault::Cut).await,
        }
    }

    async fn end(self, federated: &mut Federated) -> Result<()> {
        match self {
            Outage::Stopped | Outage::Killed => federated.planes.control_plane.start_again().await,
            Outage::Frozen => federated.planes.control_plane.process()?.resume(),
            Outage::Cut => federated.planes.link(0).set(Fault::Pass).await,
        }
    }
}

/// What the node says of itself.
async fn readiness(rest: &Rest) -> Result<(u16, String)> {
    let answer = rest.without_token().get("/readyz").await?;
    Ok((answer.status, answer.json["reasons"].to_string()))
}

async fn is_linked(rest: &Rest) -> Result<()> {
    wait::until("the node follows the control plane", async || {
        Ok((readiness(rest).await? == (200, "[]".into())).then_some(()))
    })
    .await
}

/// A token that may do everything and was shown to no node.
async fn unknown(federated: &Federated, rest: &Rest) -> Result<Rest> {
    let rules = json!([{ "path": "**", "capabilities": ["read", "list", "write", "delete"] }]);
    let scopes = ["secrets:read", "secrets:write", "federation:read"];
    let issued = federated.planes.control_plane_rest()?.issue("stranger", &scopes, rules).await?;
    rest.with_token(&issued.token)
}

async fn what_is_known_goes_on(outage: Outage) -> Result<()> {
    let mut federated = Federated::start_with(Options::default().cuttable()).await?;
    let rest = federated.planes.rest(0)?;
    rest.put_data("local/app", json!({ "user": "app" })).await?;
    let stranger = unknown(&federated, &rest).await?;
    is_linked(&rest).await?;

    outage.begin(&mut federated).await?;
    // At once, so that what waits for a frozen control plane does so together.
    let (refusals, reads) = tokio::join!(
        try_join_all(
            [
                (Method::GET, LOCAL, None),
                (Method::PUT, WRITTEN, Some(json!({ "data": {} }).to_string())),
                (Method::DELETE, WRITTEN, None),
                (Method::GET, "/v1/secrets/local/?list=true", None),
                (Method::GET, BACKENDS, None),
                (Method::GET, "/v1/tokens", None),
            ]
            .map(async |(method, path, body)| {
                let answer = rest.send(method.clone(), path, body).await?;
                Ok::<_, anyhow::Error>((format!("{method} {path}"), answer))
            })
        ),
        async {
            for _ in 0..20 {
                let start = Instant::now();
                let read = rest.get(PROXIED).await?;
                ensure!(read.json["data"]["password"] == "three", "{}", read.text);
                ensure!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
            }
            let refused = stranger.get(PROXIED).await?;
            ensure!(refused.refusal() == NO_CONTROL_PLANE, "not refused for good: {}", refused.text);
            Ok(())
        }
    );
    reads?;
    for (asked, refused) in refusals? {
        assert_eq!(refused.refusal(), NO_CONTROL_PLANE, "{asked}: {}", refused.text);
        assert_ne!(refused.header("retry-after"), "", "{asked}");
    }
    wait::until("the node says that it is stale, and stays ready", async || {
        let (status, reasons) = readiness(&rest).await?;
        ensure!(status == 200, "{status} {reasons}");
        Ok(reasons.contains("stale").then_some(()))
    })
    .await?;
    assert_eq!(rest.get(PROXIED).await?.status, 200);

    outage.end(&mut federated).await?;
    is_linked(&rest).await?;
    assert_eq!(stranger.get(PROXIED).await?.status, 200);
    assert_eq!(rest.get(LOCAL).await?.ok()?["data"], json!({ "user": "app" }));
    assert_eq!(rest.put(LOCAL, json!({ "data": {} })).await?.status, 200);
    assert_eq!(rest.get(BACKENDS).await?.status, 200);
    Ok(())
}

#[tokio::test]
async fn what_is_known_goes_on_while_the_control_plane_is_stopped() -> Result<()> {
    what_is_known_goes_on(Outage::Stopped).await
}

#[tokio::test]
async fn what_is_known_goes_on_when_the_control_plane_was_killed() -> Result<()> {
    what_is_known_goes_on(Outage::Killed).await
}

#[tokio::test]
async fn what_is_known_goes_on_while_the_control_plane_is_frozen() -> Result<()> {
    what_is_known_goes_on(Outage::Frozen).await
}

#[tokio::test]
async fn what_is_known_goes_on_while_the_network_between_the_planes_is_cut() -> Result<()> {
    what_is_known_goes_on(Outage::Cut).await
}

#[tokio::test]
async fn rows_that_were_written_without_the_control_plane_reach_it() -> Result<()> {
    let mut federated = Federated::start().await?;
    let rest = federated.planes.rest(0)?;
    federated.planes.control_plane.kill9();
    let answer = rest.with_header("x-request-id", "while-it-was-down")?.get(PROXIED).await?;
    assert_eq!((answer.status, answer.header("x-request-id")), (200, "while-it-was-down"));
    federated.planes.control_plane.start_again().await?;
    let control_plane = federated.planes.control_plane_rest()?;
    let row = wait::until("the row has arrived", async || {
        let rows = control_plane.audit().await?;
        Ok(rows.into_iter().find(|row| row["request_id"] == "while-it-was-down"))
    })
    .await?;
    assert_eq!((row["action"].as_str(), row["outcome"].as_str()), (Some("secret.read"), Some("ok")));
    Ok(())
}

#[tokio::test]
async fn a_node_whose_lease_has_ended_says_so_until_it_gets_another() -> Result<()> {
    let mut federated = Federated::start().await?;
    let (rest, admin) = (federated.planes.rest(0)?, federated.bao.client()?);
    let settings = json!({ "token_policies": ["scaivault"], "token_ttl": "3s" });
    let role = admin.create_approle("approle", "short", settings).await?;
    rest.put_data("infra/short", json!({ "role_id": role.role_id, "secret_id": role.secret_id })).await?;
    let mapping = json!({ "short/**": "secret/data/**" });
    rest.create_backend("short", &federated.bao.addr(), "infra/short", mapping).await?;
    let path = "/v1/secrets/short/app/db";
    assert_eq!(rest.get(path).await?.status, 200);

    federated.planes.control_plane.kill9();
    assert_eq!(rest.get(path).await?.status, 200, "its lease is good until it ends");
    let refused = wait::until("the lease has ended", async || {
        let answer = rest.get(path).await?;
        Ok((answer.status != 200).then_some(answer))
    })
    .await?;
    assert_eq!(refused.refusal(), (503, "no_lease"), "{}", refused.text);
    assert_ne!(refused.header("retry-after"), "");
    assert_eq!(rest.get(PROXIED).await?.status, 200, "another lease is good for longer");

    federated.planes.control_plane.start_again().await?;
    wait::until("it is read again", async || Ok((rest.get(path).await?.status == 200).then_some(()))).await
}

#[tokio::test]
async fn known_tokens_are_trusted_offline_but_not_for_ever() -> Result<()> {
    let longest = Duration::from_secs(2);
    let mut federated = Federated::start_with(Options::default().max_offline(longest)).await?;
    let rest = federated.planes.rest(0)?;
    let start = Instant::now();
    federated.planes.control_plane.kill9();
    assert_eq!(rest.get(PROXIED).await?.status, 200);
    let refused = wait::until("that has been for too long", async || {
        let answer = rest.get(PROXIED).await?;
        Ok((answer.status != 200).then_some(answer))
    })
    .await?;
    assert_eq!(refused.refusal(), (503, "offline_too_long"), "{}", refused.text);
    assert_ne!(refused.header("retry-after"), "");
    assert!(start.elapsed() >= longest);

    federated.planes.control_plane.start_again().await?;
    wait::until("it is read again", async || Ok((rest.get(PROXIED).await?.status == 200).then_some(()))).await
}

#[tokio::test]
async fn a_killed_node_serves_again_as_soon_as_it_runs() -> Result<()> {
    let mut federated = Federated::start().await?;
    let rest = federated.planes.rest(0)?;
    for _ in 0..5 {
        let node = &mut federated.planes.nodes[0];
        node.kill9();
        node.start_again().await?;
        node.ready().await?;
        assert_eq!(rest.get(PROXIED).await?.ok()?["data"]["password"], "three");
    }
    assert_eq!(rest.get(&format!("/v1/secrets/{CREDENTIAL}")).await?.status, 200);
    Ok(())
}

#[tokio::test]
async fn a_node_that_starts_without_the_control_plane_has_no_lease_until_that_is_back() -> Result<()> {
    let mut federated = Federated::start().await?;
    let rest = federated.planes.rest(0)?;
    federated.planes.control_plane.stop().await?;
    federated.planes.nodes[0].kill9();
    federated.planes.nodes[0].start_again().await?;
    federated.planes.nodes[0].ready().await?;
    let (status, reasons) = readiness(&rest).await?;
    assert_eq!(status, 200, "what it held it still holds");
    assert!(reasons.contains("stale"), "{reasons}");
    let refused = rest.get(PROXIED).await?;
    assert_eq!(refused.refusal(), (503, "no_lease"), "{}", refused.text);
    federated.planes.control_plane.start_again().await?;
    wait::until("it is read again", async || Ok((rest.get(PROXIED).await?.status == 200).then_some(()))).await
}
