//! Isolation: what one backend does wrong is its own affair, and what it asks for is heeded.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures::future::try_join_all;
use scaivault_tests::fakes::{azure, gcp};
use scaivault_tests::faults::{Fault, Proxy};
use scaivault_tests::planes::{Planes, Rest};
use scaivault_tests::stores::Store;
use scaivault_tests::wait;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{planes, readable, secret, with_stores};

/// Readers of a backend at the same time, each of a path of its own, so that no two reads are one.
const READERS: usize = 4;
/// How long they read for one measurement.
const MEASURED: Duration = Duration::from_secs(2);
/// Reads at the same time of a backend that hangs: more than it is ever asked at once.
const WAITING: usize = 80;
/// How long those wait: all through the measurement.
const HANGING: Duration = Duration::from_secs(4);

/// The half and the 99th part of the time that reads of `prefix` take, and how many there were.
async fn latencies(rest: &Rest, prefix: &str) -> Result<(Duration, Duration, usize)> {
    let end = Instant::now() + MEASURED;
    let readers = (0..READERS).map(async |reader| {
        let path = secret(&format!("{prefix}/{reader}"));
        let mut taken = Vec::new();
        while Instant::now() < end {
            let start = Instant::now();
            let read = rest.get(&path).await?;
            taken.push(start.elapsed());
            ensure!(read.status == 200, "{path}: {}", read.text);
        }
        Ok(taken)
    });
    let mut taken = try_join_all(readers).await?.concat();
    taken.sort_unstable();
    ensure!(taken.len() > 100, "{} reads measure nothing", taken.len());
    Ok((taken[taken.len() / 2], taken[taken.len() * 99 / 100], taken.len()))
}

/// The fakes and the readers have a thread of their own each, so that what is measured is not their queue.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backend_that_hangs_does_not_hold_up_the_others() -> Result<()> {
    let (_planes, rest) = planes().await?;
    let (healthy, azure, gcp) = (Store::gcp().await?, Store::azure().await?, Store::gcp().await?);
    for store in [&healthy, &azure, &gcp] {
        for path in 0..WAITING {
            store.put(&store.name(&path.to_string()), "value").await?;
        }
    }
    let timeout = || json!({ "config": { "timeout": format!("{}s", HANGING.as_secs()) } });
    healthy.federate(&rest, "healthy", timeout()).await?;
    azure.federate(&rest, "azure", timeout()).await?;
    gcp.federate(&rest, "gcp", timeout()).await?;
    let (copies, _) = healthy.sync(&rest, "copied", timeout()).await?;
    let (stuck, _) = azure.sync(&rest, "stuck", timeout()).await?;
    for name in ["healthy", "azure", "gcp"] {
        readable(&rest, &format!("{name}/0")).await?;
    }
    let before = latencies(&rest, "healthy").await?;

    azure.azure_fake()?.set_fault(azure::Side::Vault, azure::Fault::Hang);
    gcp.gcp_fake()?.inject(gcp::Fault::Hang);
    rest.post(&format!("{}/{stuck}/sync", super::BACKENDS), json!({})).await?.ok()?;
    let (start, reads) = (Instant::now(), (azure.values_read()?, gcp.values_read()?));
    let waiting = ["azure", "gcp"].into_iter().flat_map(|name| (0..WAITING).map(move |path| (name, path)));
    let waiting = try_join_all(waiting.map(async |(name, path)| {
        let read = rest.get(&secret(&format!("{name}/{path}"))).await?;
        ensure!(matches!(read.status, 502..=504), "{}", read.text);
        Ok(start.elapsed())
    }));
    let asked = async || {
        wait::until("they are asked", async || {
            Ok((azure.values_read()? > reads.0 && gcp.values_read()? > reads.1).then_some(()))
        })
        .await
    };
    let synced = async {
        asked().await?;
        let report = rest.sync(&copies).await?;
        ensure!(report["outcome"] == "complete", "{report}");
        Ok::<_, anyhow::Error>(start.elapsed())
    };
    let measured = async {
        asked().await?;
        let measured = latencies(&rest, "healthy").await?;
        Ok((measured, start.elapsed()))
    };
    let ((during, measured), waited, synced) = tokio::try_join!(measured, waiting, synced)?;
    assert!(waited.iter().max() > Some(&measured), "others hung all the while: {measured:?} of {waited:?}");
    println!("p50, p99 and reads before: {before:?}; while others hang: {during:?}; a sync: {synced:?}");
    assert!(during.1 < before.1 * 5 + Duration::from_millis(50), "{before:?}, then {during:?}");
    assert!(synced < HANGING, "{synced:?}");
    Ok(())
}

/// A store behind a network that faults are put into, as the backend `there`; logins do not pass it.
async fn behind_a_network(rest: &Rest, store: &Store) -> Result<(String, Proxy)> {
    let backend = store.backend("there");
    let field = if backend["config"]["vault_url"].is_string() { "vault_url" } else { "endpoint" };
    let address = backend["config"][field].as_str().and_then(|url| url.strip_prefix("http://"));
    let network = Proxy::start(address.context("a store without TLS")?.parse()?).await?;
    let mut config = json!({ "timeout": "1s" });
    config[field] = json!(format!("http://{}", network.addr()));
    store.put(&store.name("db"), "value").await?;
    let id = store.federate(rest, "there", json!({ "config": config })).await?;
    readable(rest, "there/db").await?;
    Ok((id, network))
}

async fn a_fault_is_told_apart_and_leaves_others_readable(store: Store) -> Result<()> {
    let (_planes, rest): (Planes, Rest) = planes().await?;
    let healthy = Store::azure().await?;
    healthy.put(&healthy.name("db"), "value").await?;
    healthy.federate(&rest, "healthy", json!({})).await?;
    readable(&rest, "healthy/db").await?;
    let (_, network) = behind_a_network(&rest, &store).await?;
    let (unreachable, invalid) = ((502, "backend_unreachable"), (502, "backend_invalid_answer"));
    let html = |status| Fault::Answer {
        status,
        headers: vec![("Content-Type", "text/html")],
        body: "<html>please sign in</html>".into(),
    };
    for (name, fault, expected) in [
        ("500", Fault::status(500), unreachable),
        ("503", html(503), unreachable),
        ("sign in", html(200), invalid),
        ("garbage", Fault::Garbage, invalid),
        ("truncated", Fault::Truncate, invalid),
        ("cut", Fault::Cut, unreachable),
        ("hanging", Fault::Blackhole, (504, "backend_timeout")),
        ("429", Fault::status(429), (503, "backend_throttled")),
    ] {
        network.set(fault).await?;
        let start = Instant::now();
        let (faulty, other) = tokio::join!(rest.get("/v1/secrets/there/db"), async {
            let other = rest.get(&secret("healthy/db")).await;
            (other, start.elapsed())
        });
        let faulty = faulty?;
        // moto sends the head of an answer first, so that may be all that is cut.
        let is_head_cut = name == "truncated" && faulty.refusal() == unreachable;
        assert!(faulty.refusal() == expected || is_head_cut, "{name}: {}", faulty.text);
        assert!(faulty.json["next_step"].is_string() && !faulty.text.contains("sign in"), "{}", faulty.text);
        assert_eq!(other.0?.status, 200, "{name}");
        assert!(other.1 < Duration::from_secs(1), "{name}: {:?}", other.1);
        network.set(Fault::Pass).await?;
        readable(&rest, "there/db").await.context(name)?;
    }
    Ok(())
}
with_stores!(aws, azure, gcp: a_fault_is_told_apart_and_leaves_others_readable);

async fn throttling_slows_a_backend_and_passes(store: Store) -> Result<()> {
    let (planes, rest) = planes().await?;
    let control_plane = planes.control_plane_rest()?;
    let (id, network) = behind_a_network(&rest, &store).await?;
    readable(&control_plane, "there/db").await?;
    let budget = async || -> Result<Value> {
        let status = rest.status(&id).await?;
        ensure!(status["connection"]["breaker"] == "closed", "{status}");
        Ok(status["call_budget"].clone())
    };
    let calm = budget().await?;
    let quotas = calm["quotas"].as_array().context("quotas")?;
    assert!(!quotas.is_empty(), "{calm}");
    for quota in quotas {
        let number = |name: &str| quota[name].as_f64().unwrap_or(-1.0);
        assert!(quota["quota"].is_string() && number("per_second") > 0.0, "{calm}");
        assert!((0.0..=number("burst")).contains(&number("remaining")), "{calm}");
    }
    assert_eq!((&calm["concurrency"], &calm["reason"]), (&calm["max_concurrency"], &json!("")), "{calm}");

    let headers = vec![("Retry-After", "1")];
    network.set(Fault::Answer { status: 429, headers, body: String::new() }).await?;
    for plane in [&rest, &control_plane] {
        for _ in 0..10 {
            let throttled = plane.get(&secret("there/db")).await?;
            assert_eq!(throttled.refusal(), (503, "backend_throttled"), "{}", throttled.text);
            assert!(!throttled.header("retry-after").is_empty());
        }
    }
    let slowed = budget().await?;
    assert!(slowed["concurrency"].as_u64() < slowed["max_concurrency"].as_u64(), "{slowed}");
    assert!(slowed["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{slowed}");

    network.set(Fault::Pass).await?;
    for plane in [&rest, &control_plane] {
        readable(plane, "there/db").await?;
    }
    let mut last = Value::Null;
    let recovered = wait::until("it is called as before", async || {
        control_plane.get(&secret("there/db")).await?;
        last = budget().await?;
        let more = last["concurrency"].as_u64() > slowed["concurrency"].as_u64();
        Ok((more && last["throttled_until"].is_null()).then_some(()))
    });
    recovered.await.with_context(|| last.to_string())
}
with_stores!(aws, azure, gcp: throttling_slows_a_backend_and_passes);
