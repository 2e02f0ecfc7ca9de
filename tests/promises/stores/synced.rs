//! Sync mode: copies with what stands beside them, and a cycle for each kind of change.

use anyhow::Result;
use scaivault_tests::planes::Rest;
use scaivault_tests::stores::{Store, copied};
use scaivault_tests::wait;
use serde_json::{Value, json};

use super::{BACKENDS, planes, secret, with_stores};

/// How many paths a run created, updated, deleted and left as they are.
fn changed(report: &Value) -> [u64; 4] {
    ["created", "updated", "tombstoned", "unchanged"].map(|name| report[name].as_u64().unwrap_or(u64::MAX))
}

/// A run of everything that succeeds.
async fn complete(rest: &Rest, backend: &str) -> Result<Value> {
    let report = rest.sync(backend).await?;
    anyhow::ensure!(report["outcome"] == "complete", "{report}");
    Ok(report)
}

/// Waits until the node serves a copy that is so.
async fn served(rest: &Rest, path: &str, is: impl Fn(&Value) -> bool) -> Result<Value> {
    let mut last = String::new();
    let answer = wait::until("the copy is as expected", async || {
        let answer = rest.get(&secret(path)).await?;
        last.clone_from(&answer.text);
        Ok((answer.json["source"] == "sync" && is(&answer.json)).then_some(answer.json))
    })
    .await;
    anyhow::Context::with_context(answer, || last)
}

async fn copies_follow_the_store(store: Store) -> Result<()> {
    let (_planes, rest) = planes().await?;
    let (db, top) = (store.name("app/db"), store.name("top"));
    for path in ["app/db", "app/api/key", "app/api/v2", "top"] {
        store.put(&store.name(path), r#"{"v":1}"#).await?;
    }
    let has_metadata = !matches!(store, Store::Drongo(_));
    if has_metadata {
        store.set_metadata(&db, &[("team", "core")]).await?;
    }
    if let Store::Gcp(gcp) = &store {
        gcp.fake.secrets().set_labels(&db, &[("stage", "test")])?;
    }
    store.settle();
    let (id, first) = store.sync(&rest, "there", json!({})).await?;
    assert_eq!((&first["outcome"], changed(&first)), (&json!("complete"), [4, 0, 0, 0]), "{first}");
    assert_eq!((&first["listed"], &first["mapped"]), (&json!(4), &json!(4)), "{first}");

    let copy = copied(&rest, &secret("there/app/db")).await?;
    assert_eq!((&copy["version"], &copy["data"]), (&json!(1), &json!({ "v": 1 })), "{copy}");
    assert!(copy["remote_version"].is_string() && copy["age"].is_u64(), "{copy}");
    let metadata = match &store {
        Store::Drongo(_) => json!({}),
        Store::Gcp(_) => json!({ "team": "core", "stage": "test" }),
        _ => json!({ "team": "core" }),
    };
    assert_eq!(copy["metadata"], metadata);

    // Nothing changed.
    store.settle();
    drop(complete(&rest, &id).await?);
    store.settle();
    let before = store.calls().ok();
    let idle = complete(&rest, &id).await?;
    assert_eq!(changed(&idle), [0, 0, 0, 4], "{idle}");
    let calls = match store {
        // Its listings tell no versions, so every value is read and compared.
        Store::Gcp(_) | Store::Drongo(_) => json!({ "list": 1, "read": 4 }),
        _ => json!({ "list": 1 }),
    };
    assert_eq!(idle["calls"], calls, "{idle}");
    if let Some(before) = before {
        let expected: u64 = calls.as_object().into_iter().flatten().filter_map(|(_, n)| n.as_u64()).sum();
        let asked = store.calls()? - before;
        // A probe of the connection may have come in between.
        assert!((expected..=expected + 1).contains(&(asked as u64)), "{asked} calls for {idle}");
    }

    store.put(&db, r#"{"v":2}"#).await?;
    store.settle();
    assert_eq!(changed(&complete(&rest, &id).await?), [0, 1, 0, 3]);
    let copy = served(&rest, "there/app/db", |copy| copy["data"]["v"] == 2).await?;
    assert_eq!((&copy["version"], &copy["metadata"]), (&json!(2), &metadata), "{copy}");

    if has_metadata {
        store.set_metadata(&db, &[("team", "other")]).await?;
        store.settle();
        let report = complete(&rest, &id).await?;
        assert_eq!(changed(&report), [0, 1, 0, 3], "{report}");
        let copy = served(&rest, "there/app/db", |copy| copy["metadata"]["team"] == "other").await?;
        assert_eq!(copy["data"], json!({ "v": 2 }));
    }

    store.put(&store.name("new"), "text").await?;
    store.delete(&top).await?;
    store.settle();
    let report = complete(&rest, &id).await?;
    assert_eq!(changed(&report), [1, 0, 1, 3], "{report}");
    let gone = wait::until("the node serves the copy no more", async || {
        let answer = rest.get(&secret("there/top")).await?;
        Ok((answer.status != 200).then_some(answer))
    });
    let gone = gone.await?;
    assert_eq!(gone.refusal(), (404, "not_active"), "{}", gone.text);
    let copy = served(&rest, "there/new", |_| true).await?;
    assert_eq!(copy["data"], json!({ "value": "text" }));
    Ok(())
}
with_stores!(aws, azure, gcp, drongo: copies_follow_the_store);

async fn a_rule_is_moved_to_sync_and_back(store: Store) -> Result<()> {
    let (_planes, rest) = planes().await?;
    for path in ["app/db", "other"] {
        store.put(&store.name(path), r#"{"v":1}"#).await?;
    }
    let id = store.federate(&rest, "there", json!({})).await?;
    let source = async |path: &str, expected: &str| {
        let mut last = String::new();
        let is = wait::until("the source is as expected", async || {
            let answer = rest.get(&secret(path)).await?;
            last.clone_from(&answer.text);
            Ok((answer.json["source"] == expected).then_some(answer.json))
        })
        .await;
        anyhow::Context::with_context(is, || format!("{path}, {expected}: {last}"))
    };
    source("there/app/db", "proxy").await?;
    let mut app = store.rule("there/app");
    app["template"] = json!("prod/app/**");
    app["mode"] = json!("sync");
    app["sync_interval"] = json!("1h");
    let backend = format!("{BACKENDS}/{id}");
    let rules = json!({ "path_mapping": [app, store.rule("there")] });
    rest.patch(&backend, rules).await?.ok()?;
    source("there/app/db", "sync").await?;
    source("there/other", "proxy").await?;
    store.put(&store.name("app/db"), r#"{"v":2}"#).await?;
    assert_eq!(rest.get(&secret("there/app/db")).await?.ok()?["data"], json!({ "v": 1 }));

    rest.patch(&backend, json!({ "path_mapping": [store.rule("there")] })).await?.ok()?;
    assert_eq!(source("there/app/db", "proxy").await?["data"], json!({ "v": 2 }));
    Ok(())
}
with_stores!(aws, azure, gcp: a_rule_is_moved_to_sync_and_back);

async fn a_name_that_a_rule_has_for_itself_is_seen_in_the_listing_like_others(store: Store) -> Result<()> {
    let (_planes, rest) = planes().await?;
    // Azure spells it as it was written first, and means the same.
    let special = if matches!(store, Store::Azure(_)) { "Prod--Special" } else { &store.name("special") };
    for name in [special, &store.name("app/db")] {
        store.put(name, "value").await?;
    }
    store.set_metadata(special, &[("team", "core")]).await?;
    store.settle();
    let mut own = store.rule("own");
    own["pattern"] = json!("own");
    own["template"] = json!("prod/special");
    let rules = json!({ "path_mapping": [own, store.rule("there")] });
    let (id, report) = store.sync(&rest, "there", rules).await?;
    assert_eq!((&report["outcome"], &report["created"]), (&json!("complete"), &json!(3)), "{report}");
    let copy = copied(&rest, &secret("own")).await?;
    assert_eq!(
        (&copy["data"], &copy["metadata"]),
        (&json!({ "value": "value" }), &json!({ "team": "core" }))
    );
    let report = complete(&rest, &id).await?;
    assert_eq!(report["unchanged"], 3, "{report}");
    let reads = if matches!(store, Store::Gcp(_)) { json!(3) } else { Value::Null };
    assert_eq!(report["calls"]["read"], reads, "{report}");
    Ok(())
}
with_stores!(aws, azure, gcp: a_name_that_a_rule_has_for_itself_is_seen_in_the_listing_like_others);
