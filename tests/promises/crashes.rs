//! A control plane that is killed while it is written to: what it acknowledged is there afterwards.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures::StreamExt as _;
use futures::future::join_all;
use scaivault_tests::planes::{Options, Planes, Rest};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

const KILLS: usize = 50;
const WRITERS: usize = 8;
/// How soon a killed control plane is to be ready again.
const READY: Duration = Duration::from_secs(2);

/// A version of a writer's secret that was acknowledged, and what was written.
type Acknowledged = (u64, u64);

fn path(writer: usize) -> String {
    format!("/v1/secrets/crashes/{writer}")
}

/// Writes one new value after the other; notes those that are acknowledged.
async fn write(rest: &Rest, writer: usize, known: &mut Vec<Acknowledged>, next: &mut u64, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        *next += 1;
        match rest.put(&path(writer), json!({ "data": { "n": *next } })).await {
            Ok(answer) if answer.status < 300 => {
                known.push((answer.json["version"].as_u64().expect("a version"), *next));
            }
            // It is down, or was killed before it answered: whether this value is a version is open.
            _ => sleep(Duration::from_millis(5)).await,
        }
    }
}

async fn value(rest: &Rest, path: &str) -> Result<Acknowledged> {
    let secret = rest.get(path).await?.ok().with_context(|| path.to_owned())?;
    let number = |value: &Value| value.as_u64().with_context(|| format!("{path}: {secret}"));
    Ok((number(&secret["version"])?, number(&secret["data"]["n"])?))
}

#[tokio::test]
async fn nothing_acknowledged_is_lost_when_the_control_plane_is_killed() -> Result<()> {
    let mut planes = Planes::start(Options::default().nodes(0)).await?;
    let rest = planes.control_plane_rest()?;
    let mut acknowledged = vec![Vec::new(); WRITERS];
    let mut next = [0; WRITERS];
    let mut slowest = Duration::ZERO;
    for kill in 0..KILLS {
        let stop = AtomicBool::new(false);
        let writers = acknowledged.iter_mut().zip(&mut next).enumerate();
        let writing =
            join_all(writers.map(|(writer, (known, next))| write(&rest, writer, known, next, &stop)));
        let killing = async {
            sleep(Duration::from_millis(rand::random_range(0..400))).await;
            planes.control_plane.kill9();
            stop.store(true, Ordering::Relaxed);
        };
        tokio::join!(writing, killing);
        let start = Instant::now();
        planes.control_plane.start_again().await?;
        planes.control_plane.ready().await?;
        slowest = slowest.max(start.elapsed());

        for (writer, known) in acknowledged.iter().enumerate() {
            let Some(last) = known.last() else { continue };
            let current = value(&rest, &path(writer)).await?;
            // A later one that was never acknowledged may have been committed.
            ensure!(
                current == *last || current.0 > last.0 && current.1 > last.1,
                "{kill}: {current:?} {last:?}"
            );
        }
    }

    let all: Vec<_> = acknowledged
        .iter()
        .enumerate()
        .flat_map(|(writer, known)| known.iter().map(move |known| (writer, *known)))
        .collect();
    println!("{KILLS} kills, {} acknowledged writes, ready again after {slowest:?} at most", all.len());
    assert!(all.len() > KILLS * WRITERS, "{} writes", all.len());
    assert!(slowest < READY, "{slowest:?}");
    let checks = all.iter().map(async |(writer, (version, written))| {
        let kept = value(&rest, &format!("{}?version={version}", path(*writer))).await?;
        ensure!(
            kept == (*version, *written),
            "version {version} of writer {writer} is {kept:?}, not {written}"
        );
        Ok(())
    });
    let checks: Vec<Result<()>> = futures::stream::iter(checks).buffer_unordered(WRITERS).collect().await;
    checks.into_iter().collect::<Result<()>>()?;
    assert_eq!(
        all.iter().map(|(writer, (version, _))| (writer, version)).collect::<HashSet<_>>().len(),
        all.len()
    );

    let rows = rest.audit().await?;
    let written: HashSet<_> = rows
        .iter()
        .filter(|row| row["action"] == "secret.write" && row["outcome"] == "ok")
        .map(|row| (row["path"].as_str().unwrap_or_default(), row["version"].as_u64().unwrap_or_default()))
        .collect();
    let silent: Vec<_> = all
        .iter()
        .filter(|(writer, (version, _))| {
            !written.contains(&(&path(*writer)["/v1/secrets/".len()..], *version))
        })
        .collect();
    assert!(
        silent.is_empty(),
        "{} acknowledged writes without a row, e.g. {:?}",
        silent.len(),
        silent.first()
    );
    Ok(())
}
