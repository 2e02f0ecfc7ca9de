//! Sync: what a cycle copies, what it does about changes, and what no fault makes it do.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use reqwest::Method;
use scaivault_domain::backend::KvVersion;
use scaivault_proto::secrets::v1::{GetRequest, SecretSource};
use scaivault_tests::faults::Fault;
use scaivault_tests::planes::{self, Answer, CREDENTIAL, Federated, Options, Planes, Rest};
use scaivault_tests::servers::openbao::{self, Admin, OpenBao};
use scaivault_tests::wait;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use tokio::time::Instant;

const BACKENDS: &str = "/v1/federation/backends";
const DB: &str = "/v1/secrets/external/hashicorp/app/db";
const TOP: &str = "/v1/secrets/external/hashicorp/top";
/// What is active in a [`Federated`] OpenBao.
const SEEDED: [&str; 4] = ["app/db", "app/api/key", "app/api/v2/key", "top"];

/// A node answers `path` with what `is` recognises; copies arrive by themselves a moment after a run.
async fn answered(rest: &Rest, path: &str, what: &str, is: impl Fn(&Answer) -> bool) -> Result<Answer> {
    let (mut last, what) = (String::new(), format!("{path} is {what}"));
    let answer = wait::until(&what, async || {
        let answer = rest.get(path).await?;
        last.clone_from(&answer.text);
        Ok(is(&answer).then_some(answer))
    })
    .await;
    answer.context(last)
}

async fn password(rest: &Rest, expected: &str) -> Result<Answer> {
    answered(rest, DB, expected, |answer| answer.json["data"]["password"] == expected).await
}

async fn refused(rest: &Rest, path: &str, refusal: (u16, &str)) -> Result<Answer> {
    answered(rest, path, refusal.1, |answer| answer.refusal() == refusal).await
}

/// The status is one of these; it is known once the backend was probed.
async fn status_is(rest: &Rest, backend: &str, expected: &[&str]) -> Result<Value> {
    let mut last = Value::Null;
    let status = wait::until("the status is as expected", async || {
        last = rest.status(backend).await?;
        Ok(expected.iter().any(|expected| last["status"] == *expected).then(|| last.clone()))
    })
    .await;
    status.with_context(|| last.to_string())
}

/// Every seeded secret is there, as a copy.
async fn all_are_served(rest: &Rest) -> Result<()> {
    for path in SEEDED {
        let answer = rest.get(&format!("/v1/secrets/external/hashicorp/{path}")).await?;
        ensure!(answer.status == 200 && answer.json["source"] == "sync", "{path}: {}", answer.text);
    }
    Ok(())
}

fn count(report: &Value, names: &[&str]) -> Vec<u64> {
    names.iter().map(|name| report[name].as_u64().unwrap_or(u64::MAX)).collect()
}

/// How many paths a run changed: created, updated, deleted.
fn changed(report: &Value) -> Vec<u64> {
    count(report, &["created", "updated", "tombstoned"])
}

/// How often a value was read in OpenBao.
fn values_read(bao: &OpenBao) -> Result<usize> {
    Ok(bao.requests()?.iter().filter(|request| request.starts_with("read secret/data/")).count())
}

async fn keys(rest: &Rest, folder: &str) -> Result<Vec<String>> {
    let list = rest.get(&format!("/v1/secrets/{folder}?list=true")).await?.ok()?;
    Ok(serde_json::from_value(list["keys"].clone())?)
}

/// OpenBao on its own, with an application's credential at [`CREDENTIAL`]; no backend is configured.
async fn unfederated(options: Options) -> Result<(Planes, OpenBao)> {
    let bao = OpenBao::start(openbao::Options::default().audited());
    let (bao, planes) = tokio::try_join!(bao, Planes::start(options))?;
    let admin = bao.client()?;
    admin.enable_kv("secret", KvVersion::V2).await?;
    let credential = planes::application(&admin, planes::POLICY).await?;
    planes.rest(0)?.put_data(CREDENTIAL, credential).await?;
    Ok((planes, bao))
}

/// Creates a backend in sync mode, and returns its id and the report of its first run.
async fn first_cycle(rest: &Rest, bao: &OpenBao, mapping: Value, settings: Value) -> Result<(String, Value)> {
    let mut configuration = planes::backend("copied", &bao.addr(), CREDENTIAL, mapping);
    planes::merge(&mut configuration, &json!({ "mode": "sync", "sync_interval": "1h" }));
    planes::merge(&mut configuration, &settings);
    let id = rest.configure(configuration).await?;
    let run = wait::until("the first run has begun", async || {
        let runs = rest.get(&format!("{BACKENDS}/{id}/syncs")).await?.ok()?;
        Ok(runs["syncs"][0]["run_id"].as_str().map(str::to_owned))
    });
    let report = rest.ended(&id, &run.await?).await?;
    Ok((id, report))
}

/// The value of a secret exactly as an answer has it.
fn raw(answer: &str) -> Result<String> {
    #[derive(Deserialize)]
    struct Secret<'a> {
        #[serde(borrow)]
        data: &'a RawValue,
    }
    Ok(serde_json::from_str::<Secret<'_>>(answer)?.data.get().to_owned())
}

#[tokio::test]
async fn a_first_cycle_copies_everything_and_tells_what_it_left_out() -> Result<()> {
    let (mut planes, bao) = unfederated(Options::default()).await?;
    let (rest, admin) = (planes.rest(0)?, bao.client()?);
    // Of JSON, version 2 keeps no number as it was written.
    let everywhere = r#"path "secret/*" { capabilities = ["read", "list"] } path "old/*" { capabilities = ["read", "list"] }"#;
    admin.write_policy("scaivault", everywhere).await?;
    admin.enable_kv("old", KvVersion::V1).await?;
    let exact =
        r#"{"big":123456789012345678901234567890,"float":1.10,"nested":{"b":[1,null],"a":"ü\n"},"z":""}"#;
    admin.put_v1_raw("old", "exact", serde_json::from_str(exact)?).await?;
    for password in ["one", "two", "three", "four"] {
        admin.put("secret", "app/db", json!({ "password": password })).await?;
    }
    admin.delete("secret", "app/db", &[2]).await?;
    admin.destroy("secret", "app/db", &[3]).await?;
    admin.set_custom_metadata("secret", "app/db", json!({ "team": "core" })).await?;
    admin.put("secret", "not a path", json!({ "x": 1 })).await?;
    admin.put("secret", "gone", json!({ "x": 1 })).await?;
    admin.delete("secret", "gone", &[1]).await?;

    let proxied = json!({ "proxied/**": "old/**" });
    rest.create_backend("proxied", &bao.addr(), CREDENTIAL, proxied).await?;
    let mapping = json!({ "copied/**": "secret/data/**", "old/**": "old/**" });
    let (id, report) = first_cycle(&rest, &bao, mapping, json!({})).await?;
    assert_eq!((&report["trigger"], &report["outcome"]), (&json!("configuration"), &json!("complete")));
    assert_eq!(
        count(&report, &["listed", "created", "skipped_count", "failed_count"]),
        [4, 2, 1, 0],
        "{report}"
    );
    let skipped = &report["skipped"][0];
    assert_eq!(
        (&skipped["remote_name"], &skipped["reason"]),
        (&json!("secret/data/not a path"), &json!("charset"))
    );
    // The two current values, and the first version of one of them.
    assert_eq!(report["calls"]["read"], 3, "{report}");

    let copied = answered(&rest, "/v1/secrets/old/exact", "a copy", |a| a.json["source"] == "sync").await?;
    let proxied = rest.get("/v1/secrets/proxied/exact").await?;
    assert_eq!(raw(&copied.text)?, raw(&proxied.text)?);
    for written in ["123456789012345678901234567890", "1.10"] {
        assert!(raw(&copied.text)?.contains(written), "{}", copied.text);
    }
    let db = rest.get("/v1/secrets/copied/app/db").await?.ok()?;
    assert_eq!(
        (&db["version"], &db["remote_version"], &db["source"], &db["state"], &db["data"], &db["metadata"]),
        (
            &json!(4),
            &json!("4"),
            &json!("sync"),
            &json!("active"),
            &json!({ "password": "four" }),
            &json!({ "team": "core" })
        )
    );
    let versions = rest.get("/v1/secrets/copied/app/db?versions=true").await?.ok()?;
    let versions: Vec<_> = versions["versions"]
        .as_array()
        .context("versions")?
        .iter()
        .map(|version| {
            (version["version"].as_u64(), version["remote_version"].as_str(), version["state"].as_str())
        })
        .collect();
    assert_eq!(
        versions,
        [
            (Some(4), Some("4"), Some("active")),
            (Some(3), Some("3"), Some("destroyed")),
            (Some(2), Some("2"), Some("deleted")),
            (Some(1), Some("1"), Some("active")),
        ]
    );
    let first = rest.get("/v1/secrets/copied/app/db?version=1").await?.ok()?;
    assert_eq!(first["data"], json!({ "password": "one" }));
    for (version, state) in [(2, "deleted"), (3, "destroyed")] {
        let none = rest.get(&format!("/v1/secrets/copied/app/db?version={version}")).await?;
        assert_eq!(none.refusal(), (404, "not_active"), "{state}");
        assert!(none.text.contains(state), "{}", none.text);
    }

    let status = rest.status(&id).await?;
    assert_eq!(
        (&status["secrets_synced"], &status["skipped"], &status["last_outcome"], &status["sync_failures"]),
        (&json!(2), &json!(1), &json!("complete"), &json!(0)),
        "{status}"
    );
    let run = format!("{BACKENDS}/{id}/syncs/{}", report["run_id"].as_str().context("a run")?);
    planes.control_plane.kill9();
    planes.control_plane.start_again().await?;
    planes.control_plane.ready().await?;
    assert_eq!(planes.control_plane_rest()?.get(&run).await?.ok()?, report);
    Ok(())
}

#[tokio::test]
async fn a_run_can_be_waited_for_followed_and_found_again() -> Result<()> {
    let federated = Federated::synced(Options::default()).await?;
    let (rest, admin) = (federated.planes.rest(0)?, federated.bao.client()?);
    let backend = format!("{BACKENDS}/{}", federated.backend);
    let waited = rest.post(&format!("{backend}/sync?wait=20s"), json!({})).await?;
    assert_eq!((waited.status, &waited.json["outcome"]), (200, &json!("complete")), "{}", waited.text);

    for number in 0..40 {
        admin.put("secret", &format!("many/{number}"), json!({ "n": number })).await?;
    }
    federated.network.set(Fault::Delay(Duration::from_millis(200))).await?;
    let asked = rest.post(&format!("{backend}/sync"), json!({})).await?;
    assert_eq!(asked.status, 202, "{}", asked.text);
    let run = asked.json["run_id"].as_str().context("a run")?;
    assert_eq!(asked.header("location"), format!("{backend}/syncs/{run}"));
    let running = wait::until("the progress shows", async || {
        let running = rest.status(&federated.backend).await?["running"].clone();
        Ok((running["progress"]["done"].as_u64() > Some(0)).then_some(running))
    })
    .await?;
    assert_eq!((&running["run_id"], &running["outcome"]), (&json!(run), &Value::Null));
    assert_eq!(
        (&running["progress"]["phase"], &running["progress"]["total"]),
        (&json!("applying"), &json!(40)),
        "{running}"
    );
    // During a run its id is answered.
    let again = rest.post(&format!("{backend}/sync"), json!({})).await?;
    assert_eq!(again.json["run_id"], run, "{}", again.text);
    federated.network.set(Fault::Pass).await?;

    let location = asked.header("location").to_owned();
    assert_eq!(changed(&rest.ended(&federated.backend, run).await?), [40, 0, 0]);
    assert_eq!(rest.get(&location).await?.ok()?["progress"], Value::Null);
    let runs = wait::until("the queued run has ended too", async || {
        let runs = rest.get(&format!("{backend}/syncs")).await?.ok()?;
        let runs = runs["syncs"].as_array().context("runs")?.clone();
        Ok((runs.len() == 4 && !runs[0]["outcome"].is_null()).then_some(runs))
    })
    .await?;
    let told: Vec<_> = runs.iter().map(|run| (run["trigger"].as_str(), run["outcome"].as_str())).collect();
    let manual = (Some("manual"), Some("complete"));
    assert_eq!(told, [manual, manual, manual, (Some("configuration"), Some("complete"))]);
    assert_eq!((&runs[1]["run_id"], &runs[2]["run_id"]), (&json!(run), &waited.json["run_id"]));
    Ok(())
}

#[tokio::test]
async fn a_backend_in_proxy_mode_has_nothing_to_sync() -> Result<()> {
    let federated = Federated::start().await?;
    let sync = format!("{BACKENDS}/{}/sync", federated.backend);
    let refused = federated.planes.rest(0)?.post(&sync, json!({})).await?;
    assert_eq!(refused.refusal(), (409, "wrong_mode"), "{}", refused.text);
    Ok(())
}

#[tokio::test]
async fn an_answer_tells_its_age_and_serving_it_makes_it_no_younger() -> Result<()> {
    let federated = Federated::start_as(
        Options::default(),
        &json!({ "mode": "sync", "sync_interval": "1s", "config": { "timeout": "1s" } }),
    )
    .await?;
    let rest = federated.planes.rest(0)?;
    answered(&rest, DB, "a copy", |answer| answer.json["source"] == "sync").await?;
    federated.bao.client()?.put("secret", "app/db", json!({ "password": "by the clock" })).await?;
    let fresh = password(&rest, "by the clock").await?;
    assert_eq!(fresh.header("age"), fresh.json["age"].to_string());

    federated.network.set(Fault::Cut).await?;
    let mut last = 0;
    wait::until("it is four seconds old", async || {
        let answer = rest.get(DB).await?;
        let value = &answer.json["data"]["password"];
        assert_eq!((answer.status, value), (200, &json!("by the clock")), "{}", answer.text);
        let age = answer.json["age"].as_u64().context("an age")?;
        // A cycle that was under way may still have ended well.
        assert!(age >= last || last <= 2, "{age} after {last}");
        assert_eq!(answer.header("age"), age.to_string());
        assert_eq!(answer.header("x-scaivault-stale") == "true", answer.json["stale"] == true);
        assert!(age <= 1 || answer.json["stale"] == true, "{}", answer.text);
        last = age;
        Ok((age >= 4).then_some(()))
    })
    .await?;
    let by_grpc = GetRequest { path: "external/hashicorp/app/db".into(), ..Default::default() };
    let secret = federated.planes.secrets_client(0)?.get(by_grpc).await?.into_inner().secret.context("it")?;
    assert_eq!(
        (secret.source(), secret.stale, secret.age.map(|age| age.seconds) >= Some(4)),
        (SecretSource::Sync, true, true)
    );

    federated.network.set(Fault::Pass).await?;
    answered(&rest, DB, "fresh again", |answer| answer.json["stale"] == false).await?;
    Ok(())
}

#[tokio::test]
async fn every_change_in_the_backend_arrives_with_the_next_cycle() -> Result<()> {
    let federated = Federated::synced(Options::default()).await?;
    let (rest, admin) = (federated.planes.rest(0)?, federated.bao.client()?);
    let sync = async || {
        let report = rest.sync(&federated.backend).await?;
        ensure!(report["outcome"] == "complete", "{report}");
        Ok::<_, anyhow::Error>(report)
    };
    all_are_served(&rest).await?;

    let read = values_read(&federated.bao)?;
    let report = sync().await?;
    assert_eq!((changed(&report), &report["unchanged"]), (vec![0, 0, 0], &json!(4)), "{report}");
    assert_eq!((report["calls"]["read"].as_u64(), values_read(&federated.bao)?), (None, read), "{report}");

    admin.put("secret", "app/db", json!({ "password": "four" })).await?;
    assert_eq!(rest.get(DB).await?.ok()?["data"]["password"], "three");
    let report = sync().await?;
    assert_eq!((changed(&report), &report["calls"]["read"]), (vec![0, 1, 0], &json!(1)), "{report}");
    assert_eq!(password(&rest, "four").await?.json["version"], 4);
    assert_eq!(rest.get(&format!("{DB}?version=3")).await?.ok()?["data"]["password"], "three");

    admin.set_custom_metadata("secret", "app/db", json!({ "team": "other" })).await?;
    assert_eq!(changed(&sync().await?), [0, 1, 0]);
    let told = answered(&rest, DB, "told", |answer| answer.json["metadata"]["team"] == "other").await?;
    assert_eq!(told.json["version"], 4, "the value is the same");

    // Several versions between two cycles all become history.
    for password in ["five", "six"] {
        admin.put("secret", "app/db", json!({ "password": password })).await?;
    }
    assert_eq!(changed(&sync().await?), [0, 1, 0]);
    assert_eq!(password(&rest, "six").await?.json["version"], 6);
    assert_eq!(rest.get(&format!("{DB}?version=5")).await?.ok()?["data"]["password"], "five");

    let deleted = async || {
        ensure!(changed(&sync().await?) == [0, 0, 1]);
        let refused = refused(&rest, TOP, (404, "not_active")).await?;
        ensure!(refused.text.contains("deleted"), "{}", refused.text);
        ensure!(changed(&sync().await?) == [0, 0, 0], "a deletion is one");
        Ok::<_, anyhow::Error>(())
    };
    let back = async |value: &str| {
        ensure!(changed(&sync().await?) == [1, 0, 0]);
        answered(&rest, TOP, "back", |answer| answer.json["data"]["value"] == value).await
    };
    admin.delete("secret", "top", &[1]).await?;
    deleted().await?;
    admin.undelete("secret", "top", &[1]).await?;
    back("top").await?;
    admin.destroy("secret", "top", &[1]).await?;
    deleted().await?;
    admin.put("secret", "top", json!({ "value": "written again" })).await?;
    back("written again").await?;
    admin.remove("secret", "top").await?;
    deleted().await?;
    // Its versions are counted anew in the backend, and not here.
    admin.put("secret", "top", json!({ "value": "made again" })).await?;
    let made = back("made again").await?;
    assert_eq!(made.json["remote_version"], "1");
    assert!(made.json["version"].as_u64() > Some(2), "{}", made.text);

    admin.put("secret", "app/new", json!({ "value": "new" })).await?;
    assert_eq!(changed(&sync().await?), [1, 0, 0]);
    answered(&rest, "/v1/secrets/external/hashicorp/app/new", "there", |answer| answer.status == 200).await?;
    Ok(())
}

async fn no_consent(rest: &Rest, backend: &str, run: &str) -> Result<()> {
    let body = json!({ "allow_deletes": run });
    let refused = rest.post(&format!("{BACKENDS}/{backend}/sync"), body).await?;
    ensure!(refused.refusal() == (412, "precondition_failed"), "{}", refused.text);
    ensure!(refused.pointers() == ["/allow_deletes"], "{}", refused.text);
    Ok(())
}

/// A run held back `deletions`, and whoever looks is told what to do.
async fn is_held_back(federated: &Federated, rest: &Rest, report: &Value, deletions: u64) -> Result<()> {
    let run = report["run_id"].as_str().context("a run")?;
    ensure!(report["outcome"] == "partial" && changed(report) == [0, 0, 0], "{report}");
    ensure!(report["held_back"] == json!({ "deletions": deletions, "known": 4 }), "{report}");
    let skipped = report["skipped"].as_array().context("skipped")?;
    ensure!(
        skipped.iter().filter(|line| line["reason"] == "mass_delete_guard").count() as u64 == deletions,
        "{report}"
    );
    let status = status_is(rest, &federated.backend, &["degraded"]).await?;
    ensure!(status["held_back_run"] == run, "{status}");
    ensure!(status["next_step"].as_str().is_some_and(|text| text.contains(run)), "{status}");
    all_are_served(rest).await
}

#[tokio::test]
async fn mass_deletions_wait_for_consent_to_exactly_them() -> Result<()> {
    let federated = Federated::synced(Options::default()).await?;
    let (rest, admin) = (federated.planes.rest(0)?, federated.bao.client()?);
    all_are_served(&rest).await?;
    for path in ["app/api/key", "app/api/v2/key", "top"] {
        admin.delete("secret", path, &[1]).await?;
    }
    let earlier = rest.sync(&federated.backend).await?;
    is_held_back(&federated, &rest, &earlier, 3).await?;
    let report = rest.sync(&federated.backend).await?;
    is_held_back(&federated, &rest, &report, 3).await?;

    let run = report["run_id"].as_str().context("a run")?;
    no_consent(&rest, &federated.backend, earlier["run_id"].as_str().context("a run")?).await?;
    no_consent(&rest, &federated.backend, &format!("run_{:032x}", 7)).await?;
    let report = rest.sync_with(&federated.backend, json!({ "allow_deletes": run })).await?;
    assert_eq!((&report["outcome"], changed(&report)), (&json!("complete"), vec![0, 0, 3]), "{report}");
    refused(&rest, TOP, (404, "not_active")).await?;
    assert_eq!(rest.get(DB).await?.status, 200);
    let status = rest.status(&federated.backend).await?;
    assert_eq!((&status["status"], &status["held_back_run"]), (&json!("healthy"), &Value::Null), "{status}");
    no_consent(&rest, &federated.backend, run).await
}

#[tokio::test]
async fn an_emptied_store_empties_nothing_here() -> Result<()> {
    let federated = Federated::synced(Options::default()).await?;
    let (rest, admin) = (federated.planes.rest(0)?, federated.bao.client()?);
    all_are_served(&rest).await?;
    for path in SEEDED.into_iter().chain(["gone"]) {
        admin.remove("secret", path).await?;
    }
    let report = rest.sync(&federated.backend).await?;
    is_held_back(&federated, &rest, &report, 4).await?;
    // A mount that is not there is no empty store.
    admin.call(Method::DELETE, "sys/mounts/secret", None).await?;
    let report = rest.sync(&federated.backend).await?;
    assert_eq!((changed(&report), &report["tombstoned"]), (vec![0, 0, 0], &json!(0)), "{report}");
    assert_ne!(report["outcome"], "complete", "{report}");
    all_are_served(&rest).await
}

fn json_answer(body: &str) -> Fault {
    let headers = vec![("Content-Type", "application/json")];
    Fault::Answer { status: 200, headers, body: body.into() }
}

/// The next run puts everything right.
async fn heals(federated: &Federated, rest: &Rest) -> Result<()> {
    federated.network.set(Fault::Pass).await?;
    let report = wait::until("a run is complete", async || {
        // For a moment the backend may be left alone after a login that failed.
        Ok(Some(rest.sync(&federated.backend).await?).filter(|report| report["outcome"] == "complete"))
    })
    .await?;
    ensure!(changed(&report)[2] == 0, "{report}");
    let status = status_is(rest, &federated.backend, &["healthy"]).await?;
    ensure!(status["sync_failures"] == 0, "{status}");
    Ok(())
}

async fn a_fault_deletes_nothing(fault: Fault, outcome: &str) -> Result<()> {
    let federated = Federated::synced(Options::default()).await?;
    let (rest, admin) = (federated.planes.rest(0)?, federated.bao.client()?);
    all_are_served(&rest).await?;
    admin.put("secret", "app/db", json!({ "password": "four" })).await?;
    federated.network.set(fault).await?;
    let report = rest.sync(&federated.backend).await?;
    ensure!(report["outcome"] == outcome && report["tombstoned"] == 0, "{report}");
    ensure!(report["message"].as_str().is_some_and(|text| !text.is_empty()), "{report}");
    ensure!(report["class"].is_string() == (outcome == "failed"), "{report}");
    all_are_served(&rest).await?;
    let status = status_is(&rest, &federated.backend, &["degraded", "unreachable"]).await?;
    for text in ["reason", "next_step"] {
        ensure!(status[text].as_str().is_some_and(|text| !text.is_empty()), "{status}");
    }
    ensure!(status["last_outcome"] == outcome, "{status}");
    ensure!(status["oldest_value_age_s"].is_u64(), "{status}");
    heals(&federated, &rest).await?;
    password(&rest, "four").await.map(drop)
}

#[tokio::test]
async fn a_backend_that_is_down_fails_the_run_and_deletes_nothing() -> Result<()> {
    a_fault_deletes_nothing(Fault::Cut, "failed").await
}

#[tokio::test]
async fn a_backend_that_answers_500_fails_the_run_and_deletes_nothing() -> Result<()> {
    a_fault_deletes_nothing(Fault::status(500), "failed").await
}

#[tokio::test]
async fn half_a_listing_fails_the_run_and_deletes_nothing() -> Result<()> {
    a_fault_deletes_nothing(Fault::Truncate, "failed").await
}

#[tokio::test]
async fn garbage_fails_the_run_and_deletes_nothing() -> Result<()> {
    a_fault_deletes_nothing(Fault::Garbage, "failed").await
}

#[tokio::test]
async fn an_empty_listing_out_of_the_blue_is_held_back_and_deletes_nothing() -> Result<()> {
    a_fault_deletes_nothing(json_answer(r#"{"data":{"keys":[]}}"#), "partial").await
}

#[tokio::test]
async fn a_slow_backend_and_one_that_throttles_are_waited_for() -> Result<()> {
    let federated = Federated::synced(Options::default()).await?;
    let (rest, admin) = (federated.planes.rest(0)?, federated.bao.client()?);
    admin.put("secret", "app/db", json!({ "password": "four" })).await?;
    federated.network.set(Fault::Delay(Duration::from_millis(500))).await?;
    let report = rest.sync(&federated.backend).await?;
    assert_eq!((&report["outcome"], changed(&report)), (&json!("complete"), vec![0, 1, 0]), "{report}");

    let throttled = Fault::Answer { status: 429, headers: vec![("Retry-After", "1")], body: String::new() };
    federated.network.set(throttled).await?;
    admin.put("secret", "app/db", json!({ "password": "five" })).await?;
    let asked = federated.network.requests().len();
    let run = rest.post(&format!("{BACKENDS}/{}/sync", federated.backend), json!({})).await?.ok()?;
    wait::until("it was told to wait, twice", async || {
        Ok((federated.network.requests().len() >= asked + 2).then_some(()))
    })
    .await?;
    all_are_served(&rest).await?;
    federated.network.set(Fault::Pass).await?;
    let report = rest.ended(&federated.backend, run["run_id"].as_str().context("a run")?).await?;
    assert_eq!((&report["outcome"], changed(&report)), (&json!("complete"), vec![0, 1, 0]), "{report}");
    Ok(())
}

/// A backend of 200 secrets more, all of which the next run reads; the run is in the middle of it.
async fn in_mid_cycle() -> Result<(Federated, Rest, String)> {
    let federated = Federated::synced(Options::default()).await?;
    let (rest, admin) = (federated.planes.rest(0)?, federated.bao.client()?);
    for number in 0..200 {
        admin.put("secret", &format!("many/{number}"), json!({ "n": number })).await?;
    }
    federated.network.set(Fault::Delay(Duration::from_millis(100))).await?;
    let run = rest.post(&format!("{BACKENDS}/{}/sync", federated.backend), json!({})).await?.ok()?;
    wait::until("the run reads values", async || {
        let done = rest.status(&federated.backend).await?["running"]["progress"]["done"].as_u64();
        Ok((done > Some(16)).then_some(()))
    })
    .await?;
    let run = run["run_id"].as_str().context("a run")?.to_owned();
    Ok((federated, rest, run))
}

#[tokio::test]
async fn a_backend_that_dies_in_mid_cycle_ends_the_run_soon_and_the_next_goes_on() -> Result<()> {
    let (federated, rest, run) = in_mid_cycle().await?;
    federated.network.set(Fault::Cut).await?;
    let start = Instant::now();
    let report = rest.ended(&federated.backend, &run).await?;
    assert!(start.elapsed() < Duration::from_secs(75), "{:?}", start.elapsed());
    let created = report["created"].as_u64().context("created")?;
    assert_eq!((&report["outcome"], &report["tombstoned"]), (&json!("partial"), &json!(0)), "{report}");
    assert_eq!(created + report["failed_count"].as_u64().context("failed")?, 200, "{report}");
    assert!(created > 16, "what was committed stays: {report}");
    assert_eq!(report["failed"][0]["reason"], "transient", "{report}");
    all_are_served(&rest).await?;

    federated.network.set(Fault::Pass).await?;
    let report = rest.sync(&federated.backend).await?;
    assert_eq!((&report["outcome"], changed(&report)), (&json!("complete"), vec![200 - created, 0, 0]));
    Ok(())
}

async fn revoke_logins(admin: &Admin) -> Result<()> {
    admin.call(Method::PUT, "sys/leases/revoke-prefix/auth/approle", Some(json!({}))).await.map(drop)
}

#[tokio::test]
async fn a_token_that_is_revoked_in_mid_cycle_costs_one_more_login() -> Result<()> {
    let (federated, rest, run) = in_mid_cycle().await?;
    revoke_logins(&federated.bao.client()?).await?;
    let report = rest.ended(&federated.backend, &run).await?;
    assert_eq!((&report["outcome"], changed(&report)), (&json!("complete"), vec![200, 0, 0]), "{report}");
    Ok(())
}

#[tokio::test]
async fn a_login_that_ends_for_good_in_mid_cycle_deletes_nothing() -> Result<()> {
    let (federated, rest, run) = in_mid_cycle().await?;
    let admin = federated.bao.client()?;
    admin.call(Method::DELETE, "auth/approle/role/scaivault", None).await?;
    revoke_logins(&admin).await?;
    let report = rest.ended(&federated.backend, &run).await?;
    assert_eq!(
        (&report["outcome"], changed(&report)[1..].to_vec()),
        (&json!("partial"), vec![0, 0]),
        "{report}"
    );
    assert_eq!(
        count(&report, &["skipped_count"]),
        [0],
        "a login that failed says nothing of the secrets: {report}"
    );
    all_are_served(&rest).await?;
    let report = rest.sync(&federated.backend).await?;
    assert_eq!((&report["outcome"], &report["class"]), (&json!("failed"), &json!("auth")), "{report}");
    all_are_served(&rest).await?;
    status_is(&rest, &federated.backend, &["degraded"]).await?;

    let role = json!({ "token_policies": ["scaivault"], "token_ttl": "1h" });
    let role = admin.create_approle("approle", "fresh", role).await?;
    let fresh = json!({ "role_id": role.role_id, "secret_id": role.secret_id });
    rest.put_data(CREDENTIAL, fresh).await?;
    heals(&federated, &rest).await
}

/// The events of syncs, oldest first: type, run, outcome or class.
fn sync_events(answer: &Value) -> Result<Vec<(String, String, String)>> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let events = answer
        .as_array()
        .context("events")?
        .iter()
        .filter(|event| event["type"].as_str().is_some_and(|name| name.starts_with("federation.sync.")));
    Ok(events
        .map(|event| {
            let data = &event["data"];
            let end = if data["class"].is_null() { &data["outcome"] } else { &data["class"] };
            (text(&event["type"]), text(&data["run_id"]), text(end))
        })
        .collect())
}

#[tokio::test]
async fn every_cycle_is_exactly_one_event() -> Result<()> {
    let (federated, rest, run) = in_mid_cycle().await?;
    let cancel = format!("{BACKENDS}/{}/syncs/{run}/cancel", federated.backend);
    let cancelled = rest.post(&cancel, json!({})).await?.ok()?;
    assert_eq!(
        (&cancelled["outcome"], &cancelled["class"]),
        (&json!("cancelled"), &json!("cancelled")),
        "{cancelled}"
    );
    assert!(cancelled["created"].as_u64() > Some(16), "what it committed stays: {cancelled}");
    assert_eq!(rest.post(&cancel, json!({})).await?.ok()?["outcome"], "cancelled");
    federated.network.set(Fault::Garbage).await?;
    let failed = rest.sync(&federated.backend).await?;
    heals(&federated, &rest).await?;

    let events = rest.get("/v1/federation/events?page_size=1000").await?.ok()?;
    let told = sync_events(&events["events"])?;
    let runs = rest.get(&format!("{BACKENDS}/{}/syncs", federated.backend)).await?.ok()?;
    let runs = runs["syncs"].as_array().context("runs")?;
    let expected: Vec<_> = runs
        .iter()
        .rev()
        .map(|run| {
            let ends = ["complete", "partial"].iter().any(|outcome| run["outcome"] == *outcome);
            let end = if ends { &run["outcome"] } else { &run["class"] };
            let kind = if ends { "completed" } else { "failed" };
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            (format!("federation.sync.{kind}"), text(&run["run_id"]), text(end))
        })
        .collect();
    assert_eq!(told, expected);
    let ends: Vec<_> = told.iter().map(|(.., end)| end.as_str()).collect();
    assert_eq!(ends, ["complete", "cancelled", failed["class"].as_str().context("a class")?, "complete"]);
    let counts = events["events"].as_array().context("events")?.iter().rev();
    let counts = counts.map(|event| &event["data"]["counts"]["listed"]).find(|listed| !listed.is_null());
    assert_eq!(counts, Some(&json!(205)));

    let by_cli: Value = serde_json::from_str(&federated.planes.cli("events -o json").await?)?;
    assert_eq!(sync_events(&by_cli["events"])?, told);
    Ok(())
}

#[tokio::test]
async fn whoever_asks_for_a_fresh_value_gets_one_or_is_told() -> Result<()> {
    let federated = Federated::synced(Options::default().nodes(2)).await?;
    let (rest, admin) = (federated.planes.rest(0)?, federated.bao.client()?);
    let impatient = rest.with_header("cache-control", "max-age=0")?;
    all_are_served(&rest).await?;
    admin.put("secret", "app/db", json!({ "password": "four" })).await?;
    assert_eq!(rest.get(DB).await?.ok()?["data"]["password"], "three");
    let fresh = impatient.get(DB).await?.ok()?;
    assert_eq!(
        (&fresh["data"]["password"], &fresh["source"], &fresh["version"], &fresh["age"]),
        (&json!("four"), &json!("sync"), &json!(4), &json!(0))
    );
    // It was committed for everybody, with what came between.
    password(&rest, "four").await?;
    password(&federated.planes.rest(1)?, "four").await?;

    admin.put("secret", "app/db", json!({ "password": "five" })).await?;
    let ask = GetRequest {
        path: "external/hashicorp/app/db".into(),
        max_age: Some(prost_types::Duration { seconds: 0, nanos: 0 }),
        ..Default::default()
    };
    let mut grpc = federated.planes.secrets_client(1)?;
    let secret = grpc.get(ask.clone()).await?.into_inner().secret.context("it")?;
    assert_eq!(serde_json::from_slice::<Value>(&secret.value)?["password"], "five");
    // What is gone is not given, and not deleted here before a cycle has seen how much is gone.
    admin.delete("secret", "top", &[1]).await?;
    assert_eq!(impatient.get(TOP).await?.refusal(), (503, "too_stale"));
    assert_eq!(rest.get(TOP).await?.status, 200);
    password(&rest, "five").await?;
    federated.network.set(Fault::Cut).await?;
    for plane in [rest.clone(), federated.planes.control_plane_rest()?] {
        let old = plane.with_header("cache-control", "max-age=0")?.get(DB).await?;
        assert_eq!(old.refusal(), (503, "too_stale"), "{}", old.text);
        assert_ne!(old.header("retry-after"), "");
        assert_eq!(plane.get(DB).await?.ok()?["data"]["password"], "five");
        assert_eq!(plane.with_header("cache-control", "max-age=3600")?.get(DB).await?.status, 200);
    }
    let old = grpc.get(ask).await.expect_err("too stale");
    assert_eq!(old.code(), tonic::Code::Unavailable, "{old:?}");
    Ok(())
}

#[tokio::test]
async fn a_backend_can_limit_the_age_of_every_answer() -> Result<()> {
    let federated = Federated::synced(Options::default()).await?;
    let (rest, admin) = (federated.planes.rest(0)?, federated.bao.client()?);
    let limit = json!({ "max_staleness": "2s" });
    rest.patch(&format!("{BACKENDS}/{}", federated.backend), limit).await?.ok()?;
    rest.sync(&federated.backend).await?;
    admin.put("secret", "app/db", json!({ "password": "four" })).await?;
    // The next cycle is an hour away.
    password(&rest, "four").await?;
    federated.network.set(Fault::Cut).await?;
    refused(&rest, DB, (503, "too_stale")).await?;
    Ok(())
}

#[tokio::test]
async fn local_secrets_are_adopted_where_they_are_equal_and_kept_as_versions_where_not() -> Result<()> {
    let (planes, bao) = unfederated(Options::default()).await?;
    let (rest, admin) = (planes.rest(0)?, bao.client()?);
    for (path, ours, theirs) in [("same", "x", "x"), ("other", "ours", "theirs")] {
        rest.put_data(&format!("copied/{path}"), json!({ "is": ours, "n": 1 })).await?;
        admin.put("secret", path, json!({ "n": 1, "is": theirs })).await?;
    }
    rest.put_data("copied/only/here", json!({ "is": "local" })).await?;
    let mapping = json!({ "copied/**": "secret/data/**" });
    let mut configuration = planes::backend("copied", &bao.addr(), CREDENTIAL, mapping.clone());
    planes::merge(&mut configuration, &json!({ "mode": "sync", "sync_interval": "1h" }));
    let refused = rest.post(BACKENDS, configuration).await?;
    assert_eq!(refused.refusal(), (409, "local_secrets_covered"), "{}", refused.text);

    let (_, report) = first_cycle(&rest, &bao, mapping, json!({ "adopt": true })).await?;
    assert_eq!(count(&report, &["unchanged", "created", "updated", "conflicts"]), [1, 0, 1, 1], "{report}");
    let same = answered(&rest, "/v1/secrets/copied/same", "a copy", |a| a.json["source"] == "sync").await?;
    assert_eq!(
        (&same.json["version"], &same.json["remote_version"]),
        (&json!(1), &json!("1")),
        "{}",
        same.text
    );
    let other = answered(&rest, "/v1/secrets/copied/other", "a copy", |a| a.json["source"] == "sync").await?;
    assert_eq!(
        (&other.json["version"], &other.json["data"]["is"]),
        (&json!(2), &json!("theirs")),
        "{}",
        other.text
    );
    let ours = rest.get("/v1/secrets/copied/other?version=1").await?.ok()?;
    assert_eq!(ours["data"]["is"], "ours");
    Ok(())
}

#[tokio::test]
async fn copies_are_read_only_and_policies_hold_for_them() -> Result<()> {
    let federated = Federated::synced(Options::default()).await?;
    let (rest, direct) = (federated.planes.rest(0)?, federated.planes.control_plane_rest()?);
    for plane in [&rest, &direct] {
        for path in [DB, "/v1/secrets/external/hashicorp/new"] {
            let written = plane.put(path, json!({ "data": {} })).await?;
            assert_eq!(written.refusal(), (409, "federated_read_only"), "{}", written.text);
            assert_eq!(plane.delete(path).await?.refusal(), (409, "federated_read_only"));
        }
    }
    all_are_served(&rest).await?;

    let rules = json!([
        { "path": "external/hashicorp/app/**", "capabilities": ["list"] },
        { "path": "external/hashicorp/top", "capabilities": ["list", "read"] },
        { "path": "external/hashicorp/app/db", "capabilities": ["list"], "effect": "deny" },
    ]);
    let issued = rest.issue("reader", &["secrets:read"], rules).await?;
    // The listing is of the copies: what the backend has by now is another matter.
    federated.bao.client()?.put("secret", "app/new", json!({})).await?;
    federated.bao.client()?.remove("secret", "top").await?;
    for plane in [&rest, &direct] {
        let one = plane.with_token(&issued.token)?;
        for path in ["app/db", "app/api/key", "nothing"] {
            let path = format!("/v1/secrets/external/hashicorp/{path}");
            assert_eq!(one.get(&path).await?.refusal(), (403, "permission_denied"), "{path}");
        }
        assert_eq!(one.get(TOP).await?.status, 200);
        assert_eq!(keys(plane, "external/hashicorp/").await?, ["app/", "top"]);
        assert_eq!(keys(plane, "external/hashicorp/app/").await?, ["api/", "db"]);
        assert_eq!(keys(&one, "external/hashicorp/").await?, ["app/", "top"]);
        assert_eq!(keys(&one, "external/hashicorp/app/").await?, ["api/"]);
    }
    rest.sync(&federated.backend).await?;
    assert_eq!(keys(&rest, "external/hashicorp/app/").await?, ["api/", "db", "new"]);
    assert_eq!(keys(&rest, "external/hashicorp/").await?, ["app/"]);

    // Every read of a copy is a row, and so is every path that a run changed.
    let read = wait::until("the rows have arrived", async || {
        let rows = rest.audit().await?;
        let paths = |action: &str| {
            let rows = rows.iter().filter(|row| row["action"] == action);
            rows.filter_map(|row| row["path"].as_str()).map(str::to_owned).collect::<BTreeSet<_>>()
        };
        let written = (paths("sync.pull").len(), paths("sync.delete").len()) == (5, 1);
        let read = rows.iter().find(|row| {
            row["action"] == "secret.read" && row["source"] == "sync" && row["principal"] == "reader"
        });
        Ok(read.filter(|_| written).cloned())
    })
    .await?;
    assert_eq!(
        (&read["path"], &read["remote_version"]),
        (&json!("external/hashicorp/top"), &json!("1")),
        "{read}"
    );
    Ok(())
}
