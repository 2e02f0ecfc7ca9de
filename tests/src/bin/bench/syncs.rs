//! What it costs to copy many secrets, to find that nothing has changed, and to hold them.

use std::collections::BTreeMap;
use std::path::Path;
use std::process;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use scaivault_tests::planes::Rest;
use serde::Serialize;
use serde_json::json;
use tokio::time::{Duration, sleep};

use crate::bulk::{Bulk, READS};
use crate::cpu::{self, Pinning};
use crate::pairs::median;
use crate::planes::{ControlPlane, Ended};
use crate::subjects::{COPIED, Store};

/// How long a node may take to have every copy.
const PREFETCH: Duration = Duration::from_secs(900);
/// One of so many secrets is read before the node's memory is looked at.
const READ_EVERY: usize = 10;

/// A first sync beside a loop that lists and reads the same.
#[derive(Debug, Serialize)]
pub(crate) struct Sync {
    pub(crate) name: String,
    pub(crate) secrets: usize,
    pub(crate) rounds: usize,
    pub(crate) in_flight: usize,
    /// Our time over the loop's.
    pub(crate) ratio: f64,
    pub(crate) seconds: f64,
    pub(crate) floor_seconds: f64,
    /// CPU time of the control plane for one secret.
    pub(crate) cpu_us: f64,
    /// The same of the loop.
    pub(crate) floor_cpu_us: f64,
    /// The most memory that the control plane had resident.
    pub(crate) peak_bytes: u64,
    /// Of the last round.
    pub(crate) calls: BTreeMap<String, u64>,
    /// The cycle after it.
    pub(crate) unchanged: Unchanged,
    /// How long it took to write them into the store.
    pub(crate) fill_seconds: f64,
}

/// A cycle that finds nothing changed.
#[derive(Debug, Serialize)]
pub(crate) struct Unchanged {
    pub(crate) name: String,
    /// Calls of the first sync over those of this cycle.
    pub(crate) fewer_calls: f64,
    pub(crate) seconds: f64,
    /// Time of the first sync over that of this cycle.
    pub(crate) faster: f64,
    pub(crate) calls: BTreeMap<String, u64>,
}

/// What a node has resident with every copy on its disk.
#[derive(Debug, Serialize)]
pub(crate) struct Memory {
    pub(crate) name: String,
    pub(crate) secrets: usize,
    /// After the secrets came and some of them were read.
    pub(crate) bytes: u64,
    /// Without the program's file.
    pub(crate) own_bytes: u64,
    pub(crate) peak_bytes: u64,
    /// From the start of the node until it had every copy.
    pub(crate) prefetch_seconds: f64,
    /// Of the cache's directory.
    pub(crate) disk_bytes: u64,
}

/// What was seen of one installation.
pub(crate) struct Round {
    pub(crate) first: Ended,
    pub(crate) unchanged: Ended,
    /// What the loop took.
    pub(crate) floor: Duration,
    /// CPU time of the control plane for the first sync.
    pub(crate) cpu: Duration,
    pub(crate) floor_cpu: Duration,
    pub(crate) peak_bytes: u64,
}

/// Measures each, and the memory of a node with the last.
pub(crate) async fn measure(
    bulks: &[Bulk],
    store: &Store,
    folder: &Path,
    pinning: Pinning,
) -> Result<(Vec<Sync>, Vec<Memory>)> {
    let (mut syncs, mut memory) = (Vec::new(), Vec::new());
    for (at, bulk) in bulks.iter().enumerate() {
        let fill = bulk.fill(store).await?;
        eprintln!("{} secrets written into OpenBao in {:.0} s", bulk.secrets, fill.as_secs_f64());
        let mut rounds = Vec::new();
        for index in 0..bulk.rounds {
            let start = Instant::now();
            eprint!("sync_{}, {} of {} …", bulk.label(), index + 1, bulk.rounds);
            let folder = folder.join(format!("{}-{index}", bulk.label()));
            let control_plane = ControlPlane::start(&folder, pinning).await?;
            let (backend, round) = round(*bulk, store, &control_plane).await?;
            rounds.push(round);
            eprintln!(" {:.0} s", start.elapsed().as_secs_f64());
            if at + 1 == bulks.len() && index + 1 == bulk.rounds {
                memory.push(node_memory(*bulk, &control_plane, &backend, &folder).await?);
            }
        }
        syncs.push(Sync::of(&bulk.label(), bulk.secrets, READS, &rounds, fill));
    }
    Ok((syncs, memory))
}

async fn round(bulk: Bulk, store: &Store, control_plane: &ControlPlane) -> Result<(String, Round)> {
    let own = process::id();
    let before = cpu::used(own)?;
    let floor = bulk.list_and_read(store).await?;
    let floor_cpu = cpu::used(own)?.saturating_sub(before);

    control_plane.put_credential(&store.role).await?;
    let server = control_plane.server.process();
    let before = cpu::used(server)?;
    let mapping = json!({ format!("{COPIED}/**"): format!("secret/data/{}/**", bulk.root()) });
    let run = control_plane.sync(&store.openbao.addr(), mapping).await?;
    let first = run.ended().await?;
    let cpu = cpu::used(server)?.saturating_sub(before);
    let peak_bytes = cpu::resident_peak(server)?;
    ensure!(first.created == bulk.secrets, "{} of {} were copied", first.created, bulk.secrets);

    let unchanged = control_plane.sync_again(&run.backend).await?.ended().await?;
    ensure!(unchanged.unchanged == bulk.secrets, "{} are unchanged", unchanged.unchanged);
    let round = Round { first, unchanged, floor, cpu, floor_cpu, peak_bytes };
    Ok((run.backend, round))
}

async fn node_memory(
    bulk: Bulk,
    control_plane: &ControlPlane,
    backend: &str,
    folder: &Path,
) -> Result<Memory> {
    let name = format!("node_memory_{}", bulk.label());
    eprint!("{name} …");
    let at = format!("/v1/federation/backends/{backend}");
    control_plane.rest.patch(&at, json!({ "prefetch": true })).await?.ok()?;
    let start = Instant::now();
    let node = control_plane.node("prefetching").await?;
    let status = format!("{at}/status");
    loop {
        let node = control_plane.rest.get(&status).await?.ok()?["nodes"][0].take();
        if node["prefetched"] == true && node["secrets"].as_u64() == u64::try_from(bulk.secrets).ok() {
            break;
        }
        ensure!(start.elapsed() < PREFETCH, "the node does not get every copy: {node}");
        sleep(Duration::from_millis(100)).await;
    }
    let prefetch_seconds = start.elapsed().as_secs_f64();

    let rest = Rest::new(format!("http://{}", node.address), &control_plane.token)?;
    let reads = bulk.names().step_by(READ_EVERY).map(async |name| {
        let answer = rest.get(&format!("/v1/secrets/{COPIED}/{name}")).await?.ok()?;
        ensure!(answer["source"] == "sync", "{answer}");
        Ok(())
    });
    stream::iter(reads).buffer_unordered(READS).try_collect::<()>().await?;
    eprintln!(" {:.0} s", start.elapsed().as_secs_f64());
    Ok(Memory {
        name,
        secrets: bulk.secrets,
        bytes: cpu::resident(node.process())?,
        own_bytes: cpu::resident_own(node.process())?,
        peak_bytes: cpu::resident_peak(node.process())?,
        prefetch_seconds,
        disk_bytes: bytes_of(&folder.join("prefetching").join("cache"))?,
    })
}

fn bytes_of(path: &Path) -> Result<u64> {
    let metadata = path.symlink_metadata().with_context(|| path.display().to_string())?;
    if !metadata.is_dir() {
        return Ok(metadata.len());
    }
    path.read_dir()?.map(|entry| bytes_of(&entry?.path())).sum()
}

impl Sync {
    /// The figures of several rounds; `label` says of what.
    pub(crate) fn of(
        label: &str,
        secrets: usize,
        in_flight: usize,
        rounds: &[Round],
        fill: Duration,
    ) -> Sync {
        let of = |figure: &dyn Fn(&Round) -> f64| median(rounds.iter().map(figure));
        let per_secret = |cpu: Duration| per(cpu, secrets) * 1e6;
        let last = rounds.last();
        Sync {
            name: format!("sync_{label}"),
            secrets,
            rounds: rounds.len(),
            in_flight,
            ratio: of(&|round| round.first.took.as_secs_f64() / round.floor.as_secs_f64()),
            seconds: of(&|round| round.first.took.as_secs_f64()),
            floor_seconds: of(&|round| round.floor.as_secs_f64()),
            cpu_us: of(&|round| per_secret(round.cpu)),
            floor_cpu_us: of(&|round| per_secret(round.floor_cpu)),
            peak_bytes: rounds.iter().map(|round| round.peak_bytes).max().unwrap_or_default(),
            calls: last.map(|round| round.first.calls.clone()).unwrap_or_default(),
            unchanged: Unchanged {
                name: format!("sync_unchanged_{label}"),
                fewer_calls: of(&|round| {
                    let sum = |ended: &Ended| ended.calls.values().sum::<u64>() as f64;
                    sum(&round.first) / sum(&round.unchanged)
                }),
                seconds: of(&|round| round.unchanged.took.as_secs_f64()),
                faster: of(&|round| round.first.took.as_secs_f64() / round.unchanged.took.as_secs_f64()),
                calls: last.map(|round| round.unchanged.calls.clone()).unwrap_or_default(),
            },
            fill_seconds: fill.as_secs_f64(),
        }
    }
}

fn per(time: Duration, count: usize) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a count of secrets is small")]
    let count = count as f64;
    time.as_secs_f64() / count
}
