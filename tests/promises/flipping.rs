//! Changing how paths are served while they are read: no read is lost on the way, and no copy stays behind.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::{Context as _, Result, ensure};
use futures::future::try_join_all;
use scaivault_tests::faults::Fault;
use scaivault_tests::planes::{Federated, Options, Rest};
use scaivault_tests::wait;
use serde_json::{Value, json};
use tokio::task::yield_now;

const BACKENDS: &str = "/v1/federation/backends";
const SYNC: &str = "sync";
const PROXY: &str = "proxy";
/// What a [`Federated`] OpenBao has, with one field of each.
const SEEDED: [(&str, &str, &str); 4] = [
    ("app/db", "password", "three"),
    ("app/api/key", "value", "app/api/key"),
    ("app/api/v2/key", "value", "app/api/v2/key"),
    ("top", "value", "top"),
];

fn at(path: &str) -> String {
    format!("/v1/secrets/external/hashicorp/{path}")
}

async fn patch(federated: &Federated, change: Value) -> Result<()> {
    let backend = format!("{BACKENDS}/{}", federated.backend);
    let changed = federated.planes.rest(0)?.patch(&backend, change).await?;
    ensure!(changed.header("x-scaivault-pending").is_empty(), "it waited in vain for the node");
    changed.ok().map(drop)
}

/// Waits until everything is answered as `source` says.
async fn all_are(rest: &Rest, source: &str) -> Result<()> {
    for (path, ..) in SEEDED {
        is(rest, path, source).await?;
    }
    Ok(())
}

async fn is(rest: &Rest, path: &str, source: &str) -> Result<Value> {
    wait::until(&format!("{path} is answered from {source}"), async || {
        Ok(Some(rest.get(&at(path)).await?.ok()?).filter(|secret| secret["source"] == source))
    })
    .await
}

/// Waits until the nodes and the control plane hold no copy any more. There is no local secret that a node was asked for.
async fn all_copies_are_gone(federated: &Federated) -> Result<()> {
    let rest = federated.planes.control_plane_rest()?;
    wait::until("every copy is erased", async || {
        let erased = rest.audit().await?.iter().filter(|row| row["action"] == "sync.erase").count();
        let nodes = rest.status(&federated.backend).await?["nodes"].clone();
        let nodes = nodes.as_array().context("nodes")?;
        Ok((erased == SEEDED.len() && nodes.iter().all(|node| node["secrets"] == 0)).then_some(()))
    })
    .await?;
    // Without the backend the paths are local ones, and there is nothing at them.
    rest.delete(&format!("{BACKENDS}/{}", federated.backend)).await?.ok()?;
    for (path, ..) in SEEDED {
        for query in ["", "?version=1", "?versions=true"] {
            let path = format!("{}{query}", at(path));
            ensure!(rest.get(&path).await?.refusal() == (404, "not_found"), "{path}");
        }
    }
    let list = rest.get("/v1/secrets/external/?list=true").await?.ok()?;
    ensure!(list["keys"] == json!([]), "{list}");
    Ok(())
}

/// Reads the same path again and again until it is told to stop; every answer must be the value.
async fn reader(
    rest: &Rest,
    seeded: (&str, &str, &str),
    stop: &AtomicBool,
    reads: &AtomicUsize,
) -> Result<()> {
    let (path, field, value) = seeded;
    while !stop.load(Ordering::Relaxed) {
        let answer = rest.get(&at(path)).await?;
        ensure!(answer.status == 200 && answer.json["data"][field] == value, "{path}: {}", answer.text);
        reads.fetch_add(1, Ordering::Relaxed);
        yield_now().await;
    }
    Ok(())
}

#[tokio::test]
async fn flips_lose_no_read_on_any_node_and_leave_no_copy_behind() -> Result<()> {
    let federated = Federated::start_with(Options::default().nodes(2)).await?;
    let rests =
        [federated.planes.rest(0)?, federated.planes.rest(1)?, federated.planes.control_plane_rest()?];
    let (stop, reads) = (AtomicBool::new(false), AtomicUsize::new(0));
    let readers = rests.iter().flat_map(|rest| SEEDED.map(|seeded| reader(rest, seeded, &stop, &reads)));
    let flips = async {
        let outcome = async {
            for _ in 0..3 {
                patch(&federated, json!({ "mode": SYNC, "sync_interval": "1h" })).await?;
                for rest in &rests {
                    all_are(rest, SYNC).await?;
                }
                patch(&federated, json!({ "mode": PROXY, "sync_interval": null })).await?;
                // Where it was changed it is in force when it is answered.
                ensure!(rests[0].get(&at("app/db")).await?.ok()?["source"] == PROXY);
                for rest in &rests {
                    all_are(rest, PROXY).await?;
                }
            }
            Ok(())
        };
        let outcome = outcome.await;
        stop.store(true, Ordering::Relaxed);
        outcome
    };
    tokio::try_join!(try_join_all(readers), flips)?;
    println!("{} reads", reads.load(Ordering::Relaxed));
    Ok(())
}

#[tokio::test]
async fn copies_are_erased_once_every_node_has_let_go_of_them() -> Result<()> {
    let federated = Federated::synced(Options::default().nodes(2).cuttable()).await?;
    let (here, there) = (federated.planes.rest(0)?, federated.planes.rest(1)?);
    all_are(&here, SYNC).await?;
    all_are(&there, SYNC).await?;
    federated.planes.link(1).set(Fault::Blackhole).await?;
    patch(&federated, json!({ "mode": PROXY, "sync_interval": null })).await?;
    all_are(&here, PROXY).await?;
    // This one knows nothing of it yet, and the copies are still there if it should ask for them.
    all_are(&there, SYNC).await?;
    let erased = here.audit().await?.iter().any(|row| row["action"] == "sync.erase");
    assert!(!erased, "a node may still need them");

    federated.planes.link(1).set(Fault::Pass).await?;
    all_are(&there, PROXY).await?;
    all_copies_are_gone(&federated).await
}

#[tokio::test]
async fn what_was_changed_here_is_not_lost_by_a_flip_unless_forced() -> Result<()> {
    let federated = Federated::synced(Options::default()).await?;
    let rest = federated.planes.rest(0)?;
    // Detached it is an ordinary secret; attached again it is ahead of the backend.
    patch(&federated, json!({ "path_mapping": { "external/hashicorp/app/**": "secret/data/app/**" } }))
        .await?;
    rest.put_data("external/hashicorp/top", json!({ "value": "ours" })).await?;
    let all = json!({ "path_mapping": { "external/hashicorp/**": "secret/data/**" }, "adopt": true });
    patch(&federated, all).await?;
    let report = wait::until("a run of this configuration has ended", async || {
        Ok(Some(rest.sync(&federated.backend).await?).filter(|report| report["outcome"] != "cancelled"))
    })
    .await?;
    assert_eq!((&report["local_ahead"], &report["updated"]), (&json!(1), &json!(0)), "{report}");
    assert_eq!(is(&rest, "top", SYNC).await?["data"]["value"], "ours");

    let backend = format!("{BACKENDS}/{}", federated.backend);
    let flip = json!({ "mode": PROXY, "sync_interval": null });
    let refused = rest.patch(&backend, flip.clone()).await?;
    assert_eq!(refused.refusal(), (409, "local_ahead"), "{}", refused.text);
    assert!(refused.text.contains("external/hashicorp/top"), "{}", refused.text);
    assert_eq!(is(&rest, "top", SYNC).await?["data"]["value"], "ours");
    rest.patch(&format!("{backend}?force=true"), flip).await?.ok()?;
    assert_eq!(is(&rest, "top", PROXY).await?["data"]["value"], "top");
    all_copies_are_gone(&federated).await
}

#[tokio::test]
async fn a_subtree_is_moved_to_sync_by_a_rule_of_its_own() -> Result<()> {
    let federated = Federated::start_with(Options::default().nodes(2)).await?;
    let (rest, admin) = (federated.planes.rest(0)?, federated.bao.client()?);
    let rules = json!([
        { "pattern": "external/hashicorp/app/**", "template": "secret/data/app/**", "mode": SYNC, "sync_interval": "1s" },
        { "pattern": "external/hashicorp/**", "template": "secret/data/**" },
    ]);
    patch(&federated, json!({ "path_mapping": rules })).await?;
    for rest in [&rest, &federated.planes.rest(1)?] {
        is(rest, "app/db", SYNC).await?;
        is(rest, "app/api/key", SYNC).await?;
        is(rest, "top", PROXY).await?;
    }
    admin.put("secret", "top", json!({ "value": "changed" })).await?;
    assert_eq!(rest.get(&at("top")).await?.ok()?["data"]["value"], "changed");
    admin.put("secret", "app/db", json!({ "password": "four" })).await?;
    wait::until("the rule's own period has passed", async || {
        let db = is(&rest, "app/db", SYNC).await?;
        Ok((db["data"]["password"] == "four").then_some(()))
    })
    .await?;
    let list = rest.get("/v1/secrets/external/hashicorp/?list=true").await?.ok()?;
    assert_eq!(list["keys"], json!(["app/", "gone", "top"]));
    assert_eq!(rest.status(&federated.backend).await?["secrets_synced"], 3);

    patch(&federated, json!({ "path_mapping": { "external/hashicorp/**": "secret/data/**" } })).await?;
    for (path, ..) in SEEDED {
        assert_eq!(rest.get(&at(path)).await?.ok()?["source"], PROXY, "{path}");
    }
    Ok(())
}

#[tokio::test]
async fn paths_that_no_longer_map_are_kept_as_local_secrets() -> Result<()> {
    let federated = Federated::synced(Options::default().nodes(2)).await?;
    let (rest, other) = (federated.planes.rest(0)?, federated.planes.rest(1)?);
    all_are(&rest, SYNC).await?;
    all_are(&other, SYNC).await?;
    patch(&federated, json!({ "path_mapping": { "external/hashicorp/app/**": "secret/data/app/**" } }))
        .await?;
    let report = rest.sync(&federated.backend).await?;
    assert_eq!(
        (&report["outcome"], &report["unchanged"], &report["tombstoned"]),
        (&json!("complete"), &json!(3), &json!(0)),
        "{report}"
    );
    for rest in [&rest, &other] {
        assert_eq!(is(rest, "top", "local").await?["data"], json!({ "value": "top" }));
        is(rest, "app/db", SYNC).await?;
    }
    rest.put_data("external/hashicorp/top", json!({ "value": "ours" })).await?;
    federated.bao.client()?.put("secret", "top", json!({ "value": "theirs" })).await?;
    rest.sync(&federated.backend).await?;
    assert_eq!(rest.get(&at("top")).await?.ok()?["data"]["value"], "ours");
    Ok(())
}

#[tokio::test]
async fn a_removed_backend_leaves_its_copies_as_local_secrets() -> Result<()> {
    let federated = Federated::synced(Options::default().nodes(2)).await?;
    let (rest, other) = (federated.planes.rest(0)?, federated.planes.rest(1)?);
    all_are(&rest, SYNC).await?;
    all_are(&other, SYNC).await?;
    let stop = AtomicBool::new(false);
    let reads = AtomicUsize::new(0);
    let readers =
        [&rest, &other].into_iter().flat_map(|rest| SEEDED.map(|seeded| reader(rest, seeded, &stop, &reads)));
    let removed = async {
        let removed =
            rest.delete(&format!("{BACKENDS}/{}", federated.backend)).await.and_then(|answer| answer.ok());
        let local = async {
            all_are(&rest, "local").await?;
            all_are(&other, "local").await
        };
        let local = local.await;
        stop.store(true, Ordering::Relaxed);
        removed?;
        local
    };
    tokio::try_join!(try_join_all(readers), removed)?;

    assert_eq!(rest.get(&format!("{}?version=1", at("app/db"))).await?.ok()?["data"]["password"], "one");
    rest.put_data("external/hashicorp/app/db", json!({ "password": "ours" })).await?;
    let written = rest.get(&at("app/db")).await?.ok()?;
    assert_eq!((&written["version"], &written["data"]["password"]), (&json!(4), &json!("ours")));
    assert_eq!(rest.delete(&at("top")).await?.status / 100, 2);
    let list = rest.get("/v1/secrets/external/hashicorp/?list=true").await?.ok()?;
    assert_eq!(list["keys"], json!(["app/"]));
    let theirs = federated.bao.client()?.read("secret/data/app/db").await?.context("it is there")?;
    assert_eq!(theirs["data"]["data"]["password"], "three", "the backend is left as it was");
    Ok(())
}

#[tokio::test]
async fn a_removed_backend_takes_its_copies_along_if_they_are_to_be_purged() -> Result<()> {
    let federated = Federated::synced(Options::default().nodes(2)).await?;
    let (rest, other) = (federated.planes.rest(0)?, federated.planes.rest(1)?);
    all_are(&rest, SYNC).await?;
    all_are(&other, SYNC).await?;
    rest.put_data("external/own", json!({ "value": "ours" })).await?;
    rest.delete(&format!("{BACKENDS}/{}?data=purge", federated.backend)).await?.ok()?;
    for rest in [&rest, &other, &federated.planes.control_plane_rest()?] {
        for (path, ..) in SEEDED {
            for query in ["", "?version=1"] {
                let path = format!("{}{query}", at(path));
                wait::until(&format!("{path} is erased"), async || {
                    Ok((rest.get(&path).await?.refusal() == (404, "not_found")).then_some(()))
                })
                .await?;
            }
        }
        assert_eq!(rest.get("/v1/secrets/external/own").await?.ok()?["data"]["value"], "ours");
        assert_eq!(rest.get("/v1/secrets/external/?list=true").await?.ok()?["keys"], json!(["own"]));
    }
    assert!(federated.bao.client()?.read("secret/data/app/db").await?.is_some());
    Ok(())
}
