//! Planes that are killed in the middle of a sync, and nodes that are cut off from it: nothing that was acknowledged is
//! lost, nothing that was served is taken back, and in the end everybody has the same.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures::future::try_join_all;
use scaivault_tests::faults::Fault;
use scaivault_tests::planes::{Options, Rest};
use scaivault_tests::servers::openbao::Admin;
use scaivault_tests::wait;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use crate::cached::{Synced, Values, have, put_upstream, restart, url};

const KILLS: usize = 20;

fn path(number: usize) -> String {
    format!("copied/{}/{number}", number % 10)
}

/// What these paths have in a round.
fn in_round(round: u64, numbers: impl IntoIterator<Item = usize>) -> Values {
    numbers.into_iter().map(|number| (path(number), json!({ "number": number, "round": round }))).collect()
}

/// Reads what it held from the beginning, again and again: it is always there, is that path's, and never older than
/// what was read before. Returns how many reads there were.
async fn read_on(rest: &Rest, numbers: &[usize], rounds: &mut [u64], stop: &AtomicBool) -> Result<u64> {
    let mut reads = 0;
    while !stop.load(Ordering::Relaxed) {
        for number in numbers {
            let answer = rest.get(&url(&path(*number))).await?.ok().context("it was held")?;
            let data = &answer["data"];
            let round = data["round"].as_u64().filter(|_| data["number"] == *number);
            let round = round.with_context(|| format!("{number} has {data}"))?;
            ensure!(round >= rounds[*number], "{number}: round {round} after {}", rounds[*number]);
            rounds[*number] = round;
            reads += 1;
        }
        sleep(Duration::from_millis(5)).await;
    }
    Ok(reads)
}

/// Writes one new value after the other through a node; `last` is what was acknowledged last, with its version.
async fn write_on(rest: &Rest, last: &mut (u64, u64), stop: &AtomicBool) -> Result<()> {
    let mut next = last.1;
    while !stop.load(Ordering::Relaxed) {
        next += 1;
        let answer = rest.put(&url("local/written"), json!({ "data": { "n": next } })).await?;
        match answer.status {
            200 | 201 => *last = (answer.json["version"].as_u64().context("version")?, next),
            503 => {}
            _ => ensure!(answer.json["code"] == "outcome_unknown", "{}", answer.text),
        }
        sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

/// All runs that are remembered, newest first.
async fn runs(synced: &Synced) -> Result<Vec<Value>> {
    let path = format!("/v1/federation/backends/{}/syncs?page_size=1000", synced.backend);
    let mut list = synced.planes.control_plane_rest()?.get(&path).await?.ok()?;
    Ok(serde_json::from_value(list["syncs"].take())?)
}

/// How many events each run has.
async fn events(rest: &Rest) -> Result<BTreeMap<String, usize>> {
    let mut counts = BTreeMap::new();
    let list = rest.get("/v1/federation/events?page_size=1000").await?.ok()?;
    for event in list["events"].as_array().context("events")? {
        if let Some(run) = event["data"]["run_id"].as_str() {
            *counts.entry(run.to_owned()).or_default() += 1;
        }
    }
    Ok(counts)
}

#[tokio::test]
async fn a_control_plane_killed_in_the_middle_of_a_cycle_resumes_it() -> Result<()> {
    const SECRETS: usize = 300;
    let first = in_round(0, 0..SECRETS);
    let mut synced = Synced::start(Options::default(), json!({ "prefetch": true }), &first).await?;
    synced.prefetched().await?;
    let (rest, control_plane) = (synced.planes.rest(0)?, synced.planes.control_plane_rest()?);
    let admin = synced.bao.client()?;
    let start_sync = format!("/v1/federation/backends/{}/sync", synced.backend);

    let (stop, mut rounds, mut last) = (AtomicBool::new(false), vec![0; SECRETS], (0, 0));
    let numbers: Vec<usize> = (0..SECRETS).step_by(15).collect();
    let mut expected = first;
    let (mut interrupted, mut applying, mut asked) = (0, 0, Vec::new());
    let killing = async {
        for round in 1..=KILLS {
            let change = in_round(round as u64, (0..SECRETS).filter(|number| (number + round) % 3 == 0));
            put_upstream(&admin, &change).await?;
            expected.extend(change);
            let run = control_plane.post(&start_sync, json!({})).await?.ok()?;
            let run = run["run_id"].as_str().context("run_id")?.to_owned();
            asked.push(run);
            sleep(Duration::from_millis(rand::random_range(0..500))).await;
            let running = control_plane.status(&synced.backend).await?["running"]["progress"].take();
            synced.planes.control_plane.kill9();
            interrupted += usize::from(!running.is_null());
            applying += usize::from(running["phase"] == "applying");
            synced.planes.control_plane.start_again().await?;
            synced.planes.control_plane.ready().await?;
        }
        wait::until("a run that began afterwards is complete", async || {
            let report = control_plane.sync(&synced.backend).await?;
            Ok((report["outcome"] == "complete").then_some(()))
        })
        .await?;
        stop.store(true, Ordering::Relaxed);
        Ok::<_, anyhow::Error>(())
    };
    let ((), reads, ()) = tokio::try_join!(
        killing,
        read_on(&rest, &numbers, &mut rounds, &stop),
        write_on(&rest, &mut last, &stop)
    )?;
    println!(
        "{KILLS} kills, {interrupted} within a run, {applying} while it applied what it had found; {reads} reads and {} \
         writes meanwhile",
        last.1
    );
    assert!(interrupted >= KILLS / 4, "{interrupted} of {KILLS} kills were within a run");

    have(&control_plane, &expected).await.context("the store")?;
    wait::until("the node has the same", async || Ok(have(&rest, &expected).await.ok())).await?;
    let (version, n) = last;
    let kept = control_plane.get(&url(&format!("local/written?version={version}"))).await?.ok()?;
    assert_eq!(kept["data"]["n"], n, "the last write that was acknowledged");

    for run in &asked {
        let report = control_plane.ended(&synced.backend, run).await?;
        assert!(
            ["complete", "partial"].contains(&report["outcome"].as_str().unwrap_or_default()),
            "{report}"
        );
    }
    // Before the events: a run may end in between.
    let runs = runs(&synced).await?;
    let events = events(&control_plane).await?;
    assert!(events.values().all(|count| *count == 1), "{events:?}");
    for (index, run) in runs.iter().enumerate() {
        let id = run["run_id"].as_str().context("run_id")?;
        if run["ended_at"].is_null() {
            assert_eq!(index, 0, "{run} was forgotten");
        } else {
            assert!(events.contains_key(id), "{run} has no event");
        }
    }
    Ok(())
}

/// Changes some of the secrets upstream, again and again, until `stop`.
async fn change_on(admin: &Admin, expected: &mut Values, secrets: usize, stop: &AtomicBool) -> Result<()> {
    for round in 1.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let numbers = (0..secrets).filter(|number| (number + round) % 5 == 0);
        let change = in_round(round as u64, numbers);
        put_upstream(admin, &change).await?;
        expected.extend(change);
        sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}

#[tokio::test]
async fn a_node_killed_under_a_sync_serves_what_it_held_and_has_all_in_the_end() -> Result<()> {
    const SECRETS: usize = 60;
    let mut expected = in_round(0, 0..SECRETS);
    let options = Options::default().cuttable();
    let mut synced = Synced::start(options, json!({ "prefetch": true }), &expected).await?;
    synced.prefetched().await?;
    let rest = synced.planes.rest(0)?;
    have(&rest, &expected).await?;
    // So that all of it is on the disk.
    synced.planes.nodes[0].stop().await?;
    synced.planes.nodes[0].start_again().await?;
    synced.planes.nodes[0].ready().await?;

    let (stop, admin) = (AtomicBool::new(false), synced.bao.client()?);
    let mut slowest = Duration::ZERO;
    let killing = async {
        for _ in 0..KILLS {
            sleep(Duration::from_millis(rand::random_range(0..300))).await;
            // What it serves now it has on its own disk.
            synced.planes.link(0).set(Fault::Cut).await?;
            slowest = slowest.max(restart(&mut synced.planes.nodes[0], &rest, &path(0)).await?);
            for number in (0..SECRETS).step_by(3) {
                let held = rest.get(&url(&path(number))).await?.ok().context("it was held")?;
                ensure!(held["data"]["number"] == number, "{number}: {held}");
            }
            synced.planes.link(0).set(Fault::Pass).await?;
        }
        stop.store(true, Ordering::Relaxed);
        Ok::<_, anyhow::Error>(())
    };
    tokio::try_join!(killing, change_on(&admin, &mut expected, SECRETS, &stop))?;
    println!("{KILLS} kills, serving after {slowest:?} at most");
    let control_plane = synced.planes.control_plane_rest()?;
    wait::until("everything is copied", async || Ok(have(&control_plane, &expected).await.ok())).await?;
    wait::until("the node has the same", async || Ok(have(&rest, &expected).await.ok())).await?;
    synced.prefetched().await
}

#[tokio::test]
async fn nodes_that_were_cut_off_converge_as_soon_as_the_network_heals() -> Result<()> {
    const NODES: usize = 6;
    const CUTS: usize = 5;
    const CONVERGED: Duration = Duration::from_secs(5);
    const COPIES: usize = 5;
    let first = in_round(0, 0..COPIES);
    let options = Options::default().nodes(NODES).cuttable();
    let synced = Synced::start(options, json!({ "prefetch": true }), &first).await?;
    synced.prefetched().await?;
    let rests = (0..NODES).map(|index| synced.planes.rest(index)).collect::<Result<Vec<_>>>()?;
    let (control_plane, admin) = (synced.planes.control_plane_rest()?, synced.bao.client()?);
    control_plane.put_data("local/x", json!({ "round": 0 })).await?;
    for rest in &rests {
        rest.get(&url("local/x")).await?.ok()?;
    }

    let stop = AtomicBool::new(false);
    let newest = watch::Sender::new(0);
    let round_of = async |rest: &Rest, path: &str| {
        let answer = rest.get(&url(path)).await?.ok().with_context(|| format!("{path} was held"))?;
        answer["data"]["round"].as_u64().context("round")
    };
    let changing = async {
        for round in 1.. {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            put_upstream(&admin, &in_round(round, 0..COPIES)).await?;
            control_plane.put_data("local/x", json!({ "round": round })).await?;
            wait::until("the change is copied", async || {
                control_plane.sync(&synced.backend).await?;
                let mut copied = true;
                for number in 0..COPIES {
                    copied &= round_of(&control_plane, &path(number)).await? == round;
                }
                Ok(copied.then_some(()))
            })
            .await?;
            newest.send_replace(round);
            sleep(Duration::from_millis(100)).await;
        }
        Ok::<_, anyhow::Error>(())
    };
    let cutting = async {
        let nodes = rests.iter().enumerate().map(async |(index, rest)| {
            let (link, mut slowest) = (synced.planes.link(index), Duration::ZERO);
            let mut known = newest.subscribe();
            for cut in 0..CUTS {
                sleep(Duration::from_millis(rand::random_range(0..500))).await;
                let fault = [Fault::Cut, Fault::Blackhole, Fault::Refuse][(index + cut) % 3].clone();
                if fault == Fault::Refuse {
                    // Only new connections are refused: without the old one, that is a cut.
                    link.set(Fault::Cut).await?;
                }
                link.set(fault).await?;
                let before = *known.borrow_and_update();
                let missed = *known.wait_for(|round| *round > before).await?;
                link.set(Fault::Pass).await?;
                let healed = Instant::now();
                wait::until("the node has the newest", async || {
                    let mut converged = round_of(rest, "local/x").await? >= missed;
                    for number in 0..COPIES {
                        converged &= round_of(rest, &path(number)).await? >= missed;
                    }
                    Ok(converged.then_some(()))
                })
                .await?;
                slowest = slowest.max(healed.elapsed());
            }
            Ok::<_, anyhow::Error>(slowest)
        });
        let slowest = try_join_all(nodes).await?;
        stop.store(true, Ordering::Relaxed);
        Ok(slowest)
    };
    let numbers: Vec<usize> = (0..COPIES).collect();
    let reading = try_join_all(rests.iter().map(async |rest| {
        let mut rounds = vec![0; COPIES];
        read_on(rest, &numbers, &mut rounds, &stop).await
    }));
    let ((), slowest, reads) = tokio::try_join!(changing, cutting, reading)?;
    let slowest = slowest.into_iter().max().unwrap_or_default();
    let reads: u64 = reads.into_iter().sum();
    println!("{} cuts, {reads} reads meanwhile, converged after {slowest:?} at most", NODES * CUTS);
    assert!(slowest <= CONVERGED, "{slowest:?}");
    Ok(())
}
