//! Between the planes: a change is in force on every node, and nodes that were away catch up by themselves.

use anyhow::{Context as _, Result};
use scaivault_tests::faults::Fault;
use scaivault_tests::planes::{CREDENTIAL, Federated, Options, Planes, Rest};
use scaivault_tests::wait;
use serde_json::{Value, json};

const BACKENDS: &str = "/v1/federation/backends";

/// Waits until `rest` answers `path` with `status`.
async fn answers(rest: &Rest, path: &str, status: u16) -> Result<()> {
    wait::until(&format!("{path} answers {status}"), async || {
        Ok((rest.get(path).await?.status == status).then_some(()))
    })
    .await
}

/// What the status of a backend says of its nodes.
async fn nodes(rest: &Rest, backend: &str) -> Result<(u64, Vec<Value>)> {
    let status = rest.get(&format!("{BACKENDS}/{backend}/status")).await?.ok()?;
    let nodes = status["nodes"].as_array().context("nodes")?.clone();
    Ok((status["generation"].as_u64().context("generation")?, nodes))
}

#[tokio::test]
async fn a_change_is_in_force_where_it_was_made_when_it_is_answered() -> Result<()> {
    let federated = Federated::start_with(Options::default().nodes(2)).await?;
    let rests = [federated.planes.rest(0)?, federated.planes.rest(1)?];
    let backend = format!("{BACKENDS}/{}", federated.backend);
    let operator = federated.planes.rest(0)?;
    for round in 0..10 {
        let (here, there) = (&rests[round % 2], &rests[(round + 1) % 2]);
        let path = format!("/v1/secrets/moved/{round}/app/db");
        assert_eq!(here.get(&path).await?.status, 404);
        let mapping = json!({ "path_mapping": { format!("moved/{round}/**"): "secret/data/**" } });
        let changed = here.patch(&backend, mapping).await?;
        assert_eq!(changed.header("x-scaivault-pending"), "", "it did not wait in vain");
        let generation = changed.ok()?["generation"].as_u64().context("generation")?;
        assert_eq!(here.get(&path).await?.ok()?["data"]["password"], "three");
        answers(there, &path, 200).await?;
        wait::until("both nodes say so", async || {
            let (current, nodes) = nodes(&operator, &federated.backend).await?;
            assert_eq!(current, generation);
            Ok(nodes.iter().all(|node| node["generation"] == generation).then_some(()))
        })
        .await?;
    }
    Ok(())
}

#[tokio::test]
async fn status_tells_how_far_each_node_is() -> Result<()> {
    let federated = Federated::start_with(Options::default().nodes(2).cuttable()).await?;
    let (planes, rest) = (&federated.planes, federated.planes.rest(0)?);
    let (generation, told) = nodes(&rest, &federated.backend).await?;
    for (index, node) in told.iter().enumerate() {
        let expected = json!({
            "name": format!("node-{index}"), "connected": true, "sent_generation": generation,
            "generation": generation, "refusal": null, "has_lease": true, "prefetched": false,
            "secrets": 0,
        });
        assert_eq!(*node, expected);
    }

    planes.link(1).set(Fault::Blackhole).await?;
    let backend = format!("{BACKENDS}/{}", federated.backend);
    let mapping = json!({ "path_mapping": { "moved/**": "secret/data/**" } });
    let next = rest.patch(&backend, mapping).await?.ok()?["generation"].as_u64().context("generation")?;
    wait::until("the status says who is behind", async || {
        let (_, told) = nodes(&rest, &federated.backend).await?;
        assert_eq!(told[1]["generation"], generation);
        Ok((told[0]["generation"] == next).then_some(()))
    })
    .await?;
    // What it held it goes on serving, and the new path is not there yet.
    let behind = planes.rest(1)?;
    assert_eq!(behind.get("/v1/secrets/external/hashicorp/app/db").await?.status, 200);

    planes.link(1).set(Fault::Pass).await?;
    answers(&behind, "/v1/secrets/moved/app/db", 200).await?;
    answers(&behind, "/v1/secrets/external/hashicorp/app/db", 404).await?;
    wait::until("the status says so", async || {
        let (_, told) = nodes(&rest, &federated.backend).await?;
        Ok((told[1]["generation"] == next && told[1]["connected"] == true).then_some(()))
    })
    .await
}

#[tokio::test]
async fn nodes_serve_through_a_restart_of_the_control_plane_and_then_follow_it_again() -> Result<()> {
    let mut federated = Federated::start_with(Options::default().nodes(2)).await?;
    let rests = [federated.planes.rest(0)?, federated.planes.rest(1)?];
    let db = "/v1/secrets/external/hashicorp/app/db";
    federated.planes.control_plane.kill9();
    for rest in &rests {
        assert_eq!(rest.get(db).await?.ok()?["data"]["password"], "three");
        let write = rest.put("/v1/secrets/own", json!({ "data": {} })).await?;
        assert_eq!(write.refusal(), (503, "control_plane_unavailable"));
        assert_ne!(write.header("retry-after"), "");
    }
    federated.bao.client()?.put("secret", "app/db", json!({ "password": "four" })).await?;
    assert_eq!(rests[1].get(db).await?.ok()?["data"]["password"], "four");

    federated.planes.control_plane.start_again().await?;
    let direct = federated.planes.control_plane_rest()?;
    let issued = direct
        .issue("late", &["secrets:read"], json!([{ "path": "moved/**", "capabilities": ["read"] }]))
        .await?;
    let mapping = json!({ "path_mapping": { "moved/**": "secret/data/**" } });
    direct.patch(&format!("{BACKENDS}/{}", federated.backend), mapping).await?.ok()?;
    for rest in &rests {
        let late = rest.with_token(&issued.token)?;
        answers(&late, "/v1/secrets/moved/app/db", 200).await?;
        answers(rest, db, 404).await?;
    }
    wait::until("the status says so", async || {
        let (generation, told) = nodes(&direct, &federated.backend).await?;
        Ok(told
            .iter()
            .all(|node| node["generation"] == generation && node["connected"] == true)
            .then_some(()))
    })
    .await
}

#[tokio::test]
async fn a_node_that_starts_late_knows_everything_when_it_is_ready() -> Result<()> {
    let mut federated = Federated::start().await?;
    let late = federated.planes.add_node("late", &["*"]).await?;
    let rest = federated.planes.rest(late)?;
    assert_eq!(rest.get("/v1/secrets/external/hashicorp/app/db").await?.ok()?["data"]["password"], "three");
    federated.planes.nodes[late].stop().await?;
    federated.planes.nodes[late].start_again().await?;
    federated.planes.nodes[late].ready().await?;
    assert_eq!(rest.get("/v1/secrets/external/hashicorp/app/db").await?.status, 200);
    Ok(())
}

#[tokio::test]
async fn a_rotated_credential_heals_by_itself() -> Result<()> {
    let federated = Federated::start().await?;
    let (rest, admin) = (federated.planes.rest(0)?, federated.bao.client()?);
    let db = "/v1/secrets/external/hashicorp/app/db";
    // Everything that was logged in is out, and the old credential is worth nothing any more.
    let tokens = admin.call(reqwest::Method::from_bytes(b"LIST")?, "auth/token/accessors", None).await?;
    let before =
        admin.read("auth/token/lookup-self").await?.context("it is there")?["data"]["accessor"].clone();
    let role = json!({ "token_policies": ["scaivault"], "token_ttl": "1h" });
    let fresh = admin.create_approle("approle", "fresh", role).await?;
    let fresh = json!({ "role_id": fresh.role_id, "secret_id": fresh.secret_id });
    rest.put_data(CREDENTIAL, fresh).await?;
    admin.call(reqwest::Method::DELETE, "auth/approle/role/scaivault", None).await?;
    for accessor in tokens["data"]["keys"].as_array().context("keys")?.iter().filter(|key| **key != before) {
        admin.revoke_accessor(accessor.as_str().context("an accessor")?).await?;
    }
    answers(&rest, db, 200).await
}

#[tokio::test]
async fn the_planes_stop_in_order_when_they_are_asked() -> Result<()> {
    let mut planes = Planes::start(Options::default().nodes(2)).await?;
    planes.rest(0)?.put_data("x", json!({})).await?;
    for node in &mut planes.nodes {
        node.stop().await?;
    }
    planes.control_plane.stop().await?;
    planes.control_plane.start_again().await?;
    assert_eq!(planes.control_plane_rest()?.get("/v1/secrets/x").await?.status, 200);
    for (path, log) in planes.logs()? {
        assert!(!log.contains("panicked"), "{}", path.display());
    }
    Ok(())
}
