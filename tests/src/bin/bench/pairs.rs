//! Pairs that take turns, and the figures that come of it.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use scaivault_tests::http;
use serde::Serialize;
use tokio::time::sleep;

use crate::bulk::Bulk;
use crate::clouds;
use crate::cpu::{self, Pinning};
use crate::load::{Grpc, Http, Plain, Reader, read_for};
use crate::planes::Server;
use crate::subjects::{COPIED, PROXIED, Store, Subjects, VAULT_TOKEN, grpc, name};

/// Readers of the pairs that measure throughput.
const MANY: usize = 64;
/// Connections that they share when they speak gRPC.
const CONNECTIONS: usize = 4;

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extent {
    /// Turns of each arm.
    pub(crate) rounds: usize,
    /// How long a turn is.
    pub(crate) turn: Duration,
    /// What is synced.
    pub(crate) bulks: &'static [Bulk],
    /// What is done with the stores of clouds.
    pub(crate) clouds: clouds::Extent,
}

/// ScaiVault beside its floor, in the report's own names.
#[derive(Debug, Serialize)]
pub(crate) struct Pair {
    pub(crate) name: &'static str,
    /// What it is compared with.
    pub(crate) floor: &'static str,
    pub(crate) in_flight: usize,
    /// The floor's price over ours: CPU time per request for `cached_*`, p50 for the others. 1 is as cheap as the floor.
    pub(crate) ratio: f64,
    /// What we add to the p50 of the floor.
    pub(crate) added_p50_ms: f64,
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
    pub(crate) floor_p50_ms: f64,
    pub(crate) floor_p99_ms: f64,
    /// What a read takes on average, which is `in_flight` by the reads per second.
    pub(crate) mean_ms: f64,
    pub(crate) floor_mean_ms: f64,
    /// CPU time of our process for one request.
    pub(crate) cpu_us: f64,
    /// The same of the floor's process; none if the floor is OpenBao itself.
    pub(crate) floor_cpu_us: Option<f64>,
    pub(crate) requests_per_cpu_second: f64,
    pub(crate) floor_requests_per_cpu_second: Option<f64>,
    pub(crate) requests: usize,
    pub(crate) floor_requests: usize,
}

/// Measures every pair.
pub(crate) async fn measure(
    extent: Extent,
    store: &Store,
    folder: &Path,
    pinning: Pinning,
) -> Result<Vec<Pair>> {
    let subjects = Subjects::start(store, folder, MANY, pinning).await?;
    let mut pairs = vec![cached_grpc(&subjects, extent).await?, cached_rest(&subjects, extent).await?];
    pairs.extend(proxied(&subjects, store, 1, extent).await?);
    pairs.extend(proxied(&subjects, store, 16, extent).await?);
    Ok(pairs)
}

async fn cached_grpc(subjects: &Subjects, extent: Extent) -> Result<Pair> {
    let arm = |server: &Server| {
        let clients = (0..CONNECTIONS).map(|_| grpc(server.address, &subjects.control_plane.token));
        let clients = clients.collect::<Result<Vec<_>>>()?;
        let readers = (0..MANY).map(|reader| {
            let client = clients[reader % CONNECTIONS].clone();
            Grpc { client, path: format!("{COPIED}/{}", name(reader)) }
        });
        anyhow::Ok(Arm::new(Some(server.process()), readers.collect()))
    };
    let arms = [arm(&subjects.tonic)?, arm(&subjects.node)?];
    let [floor, ours] = take_turns("cached_grpc", arms, extent).await?;
    Ok(Pair::of_cpu("cached_grpc", "bare tonic unary service", MANY, &ours, &floor))
}

async fn cached_rest(subjects: &Subjects, extent: Extent) -> Result<Pair> {
    let arm = async |server: &Server| {
        let mut readers = Vec::new();
        for reader in 0..MANY {
            let path = format!("/v1/secrets/{COPIED}/{}", name(reader));
            readers.push(Plain::connect(server.address, &path, &subjects.control_plane.token).await?);
        }
        anyhow::Ok(Arm::new(Some(server.process()), readers))
    };
    let arms = [arm(&subjects.axum).await?, arm(&subjects.node).await?];
    let [floor, ours] = take_turns("cached_rest", arms, extent).await?;
    Ok(Pair::of_cpu("cached_rest", "bare axum handler", MANY, &ours, &floor))
}

/// Reads of OpenBao: direct, through a node, and through the simplest proxy there is.
async fn proxied(subjects: &Subjects, store: &Store, readers: usize, extent: Extent) -> Result<[Pair; 2]> {
    let arm = |process: Option<u32>, address: SocketAddr, base: &str, header: (&'static str, String)| {
        let client = http::client(None)?;
        let readers = (0..readers).map(|reader| {
            let url = format!("http://{address}{base}/{}", name(reader));
            Http { client: client.clone(), url, header: header.clone() }
        });
        anyhow::Ok(Arm::new(process, readers.collect()))
    };
    let vault = || (VAULT_TOKEN, store.token.clone());
    let bearer = ("authorization", format!("Bearer {}", subjects.control_plane.token));
    let (node, passthrough) = (&subjects.node, &subjects.passthrough);
    let arms = [
        arm(None, store.openbao.socket(), "/v1/secret/data", vault())?,
        arm(Some(node.process()), node.address, &format!("/v1/secrets/{PROXIED}"), bearer)?,
        arm(Some(passthrough.process()), passthrough.address, "/v1/secret/data", vault())?,
    ];
    let (ours_named, simplest_named) = match readers {
        1 => ("proxied_read_added_p50_ms", "passthrough_added_p50_ms"),
        _ => ("proxied_read_added_p50_ms_16", "passthrough_added_p50_ms_16"),
    };
    let [direct, ours, simplest] = take_turns(ours_named, arms, extent).await?;
    let floor = "direct read of OpenBao";
    Ok([
        Pair::of_latency(ours_named, floor, readers, &ours, &direct),
        Pair::of_latency(simplest_named, floor, readers, &simplest, &direct),
    ])
}

/// One of those that take turns.
struct Arm<R> {
    /// Which process is charged.
    process: Option<u32>,
    readers: Vec<R>,
    /// What the process had used when the last turn ended. What it does after its answers, while it is another's turn,
    /// belongs to them too.
    charged: Option<Duration>,
}

/// What an arm did in one turn.
pub(crate) struct Turn {
    pub(crate) cpu: Option<Duration>,
    /// Sorted.
    pub(crate) took: Vec<Duration>,
}

impl<R: Reader> Arm<R> {
    fn new(process: Option<u32>, readers: Vec<R>) -> Self {
        Arm { process, readers, charged: None }
    }

    async fn turn(&mut self, time: Duration) -> Result<Turn> {
        let mut took = read_for(&mut self.readers, time).await?;
        let used = self.process.map(cpu::used).transpose()?;
        let before = std::mem::replace(&mut self.charged, used);
        let cpu = used.zip(before).map(|(after, before)| after.saturating_sub(before));
        took.sort_unstable();
        Ok(Turn { cpu, took })
    }
}

/// A B A B …: whatever else the machine does meanwhile, it does to all of them.
async fn take_turns<R: Reader, const N: usize>(
    what: &str,
    mut arms: [Arm<R>; N],
    extent: Extent,
) -> Result<[Vec<Turn>; N]> {
    let start = Instant::now();
    eprint!("{what} …");
    let mut turns = [const { Vec::new() }; N];
    for arm in &mut arms {
        arm.turn(Duration::from_millis(300)).await?;
    }
    for _ in 0..extent.rounds {
        for (arm, turns) in arms.iter_mut().zip(&mut turns) {
            turns.push(arm.turn(extent.turn).await?);
            // The server finishes what it does after an answer, before the next one's turn.
            sleep(Duration::from_millis(20)).await;
        }
    }
    eprintln!(" {:.0} s", start.elapsed().as_secs_f64());
    Ok(turns)
}

impl Turn {
    fn cpu_us(&self) -> Option<f64> {
        #[expect(clippy::cast_precision_loss, reason = "a count of requests is small")]
        self.cpu.map(|cpu| cpu.as_secs_f64() * 1e6 / self.took.len() as f64)
    }

    fn mean(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "a count of requests is small")]
        let count = self.took.len() as f64;
        self.took.iter().sum::<Duration>().as_secs_f64() * 1000.0 / count
    }

    /// Milliseconds.
    pub(crate) fn percentile(&self, percent: usize) -> f64 {
        let place = (self.took.len().saturating_sub(1)) * percent / 100;
        self.took.get(place).map_or(f64::NAN, |took| took.as_secs_f64() * 1000.0)
    }
}

/// The one in the middle.
pub(crate) fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

impl Pair {
    fn of_cpu(
        name: &'static str,
        floor_is: &'static str,
        in_flight: usize,
        ours: &[Turn],
        floor: &[Turn],
    ) -> Pair {
        let rounds = ours.iter().zip(floor);
        let ratio = median(rounds.filter_map(|(ours, floor)| Some(floor.cpu_us()? / ours.cpu_us()?)));
        Pair { ratio, ..Pair::of_latency(name, floor_is, in_flight, ours, floor) }
    }

    fn of_latency(
        name: &'static str,
        floor_is: &'static str,
        in_flight: usize,
        ours: &[Turn],
        floor: &[Turn],
    ) -> Pair {
        let of = |turns: &[Turn], percent| median(turns.iter().map(|turn| turn.percentile(percent)));
        let mean = |turns: &[Turn]| median(turns.iter().map(Turn::mean));
        let cpu = |turns: &[Turn]| median(turns.iter().filter_map(Turn::cpu_us));
        let rounds =
            || ours.iter().zip(floor).map(|(ours, floor)| (ours.percentile(50), floor.percentile(50)));
        let floor_cpu_us = Some(cpu(floor)).filter(|cpu| cpu.is_finite());
        Pair {
            name,
            floor: floor_is,
            in_flight,
            ratio: median(rounds().map(|(ours, floor)| floor / ours)),
            added_p50_ms: median(rounds().map(|(ours, floor)| ours - floor)),
            p50_ms: of(ours, 50),
            p99_ms: of(ours, 99),
            floor_p50_ms: of(floor, 50),
            floor_p99_ms: of(floor, 99),
            mean_ms: mean(ours),
            floor_mean_ms: mean(floor),
            cpu_us: cpu(ours),
            floor_cpu_us,
            requests_per_cpu_second: 1e6 / cpu(ours),
            floor_requests_per_cpu_second: floor_cpu_us.map(|cpu| 1e6 / cpu),
            requests: ours.iter().map(|turn| turn.took.len()).sum(),
            floor_requests: floor.iter().map(|turn| turn.took.len()).sum(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turn(cpu_us: u64, took_ms: &[u64]) -> Turn {
        let took = took_ms.iter().copied().map(Duration::from_millis).collect();
        Turn { cpu: Some(Duration::from_micros(cpu_us)), took }
    }

    #[test]
    fn a_ratio_is_that_of_neighbouring_turns() {
        let floor = [turn(100, &[1, 1]), turn(300, &[3, 3]), turn(100, &[1, 1])];
        let ours = [turn(200, &[2, 2]), turn(600, &[6, 6]), turn(200, &[2, 2])];
        let pair = Pair::of_cpu("ours", "floor", 2, &ours, &floor);
        assert_eq!((pair.ratio, pair.cpu_us, pair.floor_cpu_us), (0.5, 100.0, Some(50.0)));
        assert_eq!((pair.added_p50_ms, pair.requests), (1.0, 6));
    }

    #[test]
    fn percentiles_are_of_what_was_seen() {
        let turn = turn(1, &(1..=100).collect::<Vec<_>>());
        assert_eq!((turn.percentile(50), turn.percentile(99)), (50.0, 99.0));
    }
}
