//! What the stores of the clouds cost through ScaiVault, beside what they cost anyway.
//!
//! AWS is moto, Azure and GCP are our fakes, each a process that both cores may run, for every side, as OpenBao. drongo
//! is not measured: it asks for no token and gives no checksum, so less would be done on either side than with Google.

use std::any::Any;
use std::future::pending;
use std::path::Path;
use std::time::{Duration, Instant};
use std::{env, fs};

use anyhow::{Context as _, Result, ensure};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use scaivault_tests::fakes::gcp::PROJECT;
use scaivault_tests::faults::{Fault, Proxy};
use scaivault_tests::planes::Rest;
use scaivault_tests::process::Process;
use scaivault_tests::servers::moto::{self, AccessKey, Moto};
use scaivault_tests::{http, wait};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::bulk::READS;
use crate::cpu::{self, Pinning};
use crate::direct::{Api, Caller, Client};
use crate::fakes::Ready;
use crate::load::{Http, Reader};
use crate::pairs::{Turn, median};
use crate::planes::{ControlPlane, Ended, Server, loopback};
use crate::subjects::value;
use crate::syncs::{Round, Sync};

/// The folder in AWS that the secrets are in; the others have no folders.
const FOLDER: &str = "bulk/";
/// Between two reads. With a node, Azure's quota leaves the planes 180 calls a second each.
const GAP: Duration = Duration::from_millis(8);
/// What a call takes longer if the store is not on this machine.
const AWAY: Duration = Duration::from_millis(10);
/// Writes at the same time.
const WRITES: usize = 16;

/// How much is measured of each store.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extent {
    /// Turns of each arm of a read.
    pub(crate) turns: usize,
    /// How long a turn is.
    pub(crate) turn: Duration,
    /// What is synced.
    pub(crate) secrets: usize,
    /// How often, each time by a new installation.
    pub(crate) rounds: usize,
}

/// Reads through a node beside direct ones, one in flight.
#[derive(Debug, Serialize)]
pub(crate) struct Reads {
    pub(crate) name: String,
    /// Which server it is.
    pub(crate) store: &'static str,
    /// What a direct read is.
    pub(crate) direct: &'static str,
    /// The direct read's p50 over ours.
    pub(crate) ratio: f64,
    pub(crate) added_p50_ms: f64,
    /// What axum and reqwest in between add; none where requests are signed for the host that they go to.
    pub(crate) passthrough_added_p50_ms: Option<f64>,
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
    pub(crate) direct_p50_ms: f64,
    pub(crate) direct_p99_ms: f64,
    /// CPU time of the store for a direct read.
    pub(crate) store_cpu_ms: f64,
    pub(crate) reads: usize,
}

/// A first sync beside a loop that lists and reads the same.
#[derive(Debug, Serialize)]
pub(crate) struct CloudSync {
    #[serde(flatten)]
    pub(crate) sync: Sync,
    /// Which server it is.
    pub(crate) store: &'static str,
    /// CPU time of the store while we sync.
    pub(crate) store_cpu_seconds: f64,
    /// The same for the loop.
    pub(crate) floor_store_cpu_seconds: f64,
    /// What the calls take at the least by the quotas of the cloud that we keep and the loop does not.
    pub(crate) quota_seconds: f64,
    /// Our time over the loop's, or over that of the quota if it is longer.
    pub(crate) ratio_to_bound: f64,
}

/// A store with secrets.
struct Cloud {
    login: Login,
    store: &'static str,
    process: u32,
    url: String,
    /// What ScaiVault logs in with.
    credential: Value,
    fill: Duration,
    /// What ends the store when it is dropped.
    _running: Box<dyn Any>,
}

/// What a direct caller shows.
enum Login {
    Aws { role: String, session: AccessKey },
    Azure { token: String },
    Gcp { token: String },
}

/// Every store.
pub(crate) struct Clouds(Vec<Cloud>);

/// The name of a secret.
pub(crate) fn name(index: usize) -> String {
    format!("s{index:05}")
}

impl Clouds {
    /// Starts and fills them; on both cores, if the caller may still run on both.
    pub(crate) async fn start(extent: Extent, folder: &Path) -> Result<Clouds> {
        let clouds = vec![
            aws(extent.secrets).await?,
            faked("serve-azure", extent.secrets, folder, |token| Login::Azure { token }).await?,
            faked("serve-gcp", extent.secrets, folder, |token| Login::Gcp { token }).await?,
        ];
        for cloud in &clouds {
            let fill = cloud.fill.as_secs_f64();
            eprintln!("{} secrets written into {} in {fill:.0} s", extent.secrets, cloud.store);
        }
        Ok(Clouds(clouds))
    }

    /// Measures each.
    pub(crate) async fn measure(
        &self,
        extent: Extent,
        folder: &Path,
        pinning: Pinning,
    ) -> Result<(Vec<Reads>, Vec<CloudSync>)> {
        let control_plane = ControlPlane::start(&folder.join("clouds"), pinning).await?;
        let node = control_plane.node("node").await?;
        let (mut reads, mut syncs) = (Vec::new(), Vec::new());
        for cloud in &self.0 {
            reads.push(cloud.reads(&control_plane, &node, extent, folder, pinning).await?);
        }
        drop((node, control_plane));
        for cloud in &self.0 {
            for distance in [Distance::Near, Distance::Far] {
                syncs.push(cloud.syncs(extent, folder, pinning, distance).await?);
            }
        }
        Ok((reads, syncs))
    }
}

async fn aws(secrets: usize) -> Result<Cloud> {
    let moto = Moto::start(moto::Options::default()).await?;
    let admin = moto.client()?;
    let allow = |actions: Value| {
        let statement = json!({ "Effect": "Allow", "Action": actions, "Resource": "*" });
        json!({ "Version": "2012-10-17", "Statement": [statement] })
    };
    let key = admin.create_user("scaivault", &allow(json!(["sts:AssumeRole"]))).await?;
    let user = admin.with_key(key.clone());
    let principal = json!({ "AWS": user.caller().await? });
    let statement = json!({ "Effect": "Allow", "Principal": principal, "Action": "sts:AssumeRole" });
    let trust = json!({ "Version": "2012-10-17", "Statement": [statement] });
    let actions = ["GetSecretValue", "BatchGetSecretValue", "ListSecrets"];
    let actions = actions.map(|action| format!("secretsmanager:{action}"));
    let role = admin.create_role("scaivault", &trust, &allow(json!(actions))).await?;

    let start = Instant::now();
    let writes = (0..secrets).map(|index| {
        let (admin, name) = (admin.clone(), format!("{FOLDER}{}", name(index)));
        async move { admin.create_secret(&name, &value(&name).to_string(), &[]).await }
    });
    let _: Vec<String> = stream::iter(writes).buffer_unordered(WRITES).try_collect().await?;
    let session = user.assume_role(&role, "bench").await?;
    Ok(Cloud {
        login: Login::Aws { role, session },
        store: "moto",
        process: moto.process()?,
        url: moto.addr(),
        credential: json!({ "access_key_id": key.id, "secret_access_key": key.secret }),
        fill: start.elapsed(),
        _running: Box::new(moto),
    })
}

async fn faked(
    mode: &str,
    secrets: usize,
    folder: &Path,
    login: impl FnOnce(String) -> Login,
) -> Result<Cloud> {
    let start = Instant::now();
    let file = folder.join(format!("{mode}.json"));
    let process =
        start_here(&[mode, &file.display().to_string(), &secrets.to_string()], folder, Pinning::Free)?;
    let (process, ready) = ready(process, &file).await?;
    let Ready { url, credential, token } = serde_json::from_slice(&ready)?;
    Ok(Cloud {
        login: login(token),
        store: "our fake",
        process: process.id(),
        url,
        credential,
        fill: start.elapsed(),
        _running: Box::new(process),
    })
}

/// Runs this program as another server.
fn start_here(args: &[&str], folder: &Path, pinning: Pinning) -> Result<Process> {
    cpu::serve(&env::current_exe()?, args, pinning, &folder.join(args[0]))
}

/// CPU time of a read. Of all turns together: the kernel counts a whole process in hundredths of a second.
fn mean_cpu_ms(turns: &[Turn]) -> f64 {
    let cpu: Duration = turns.iter().filter_map(|turn| turn.cpu).sum();
    #[expect(clippy::cast_precision_loss, reason = "a count of reads is small")]
    let reads = turns.iter().map(|turn| turn.took.len()).sum::<usize>() as f64;
    cpu.as_secs_f64() * 1e3 / reads
}

/// What a server has written into `file`, as soon as it serves.
async fn ready(mut process: Process, file: &Path) -> Result<(Process, Vec<u8>)> {
    let ready = wait::until("it serves", async || {
        process.ensure_running()?;
        Ok(fs::read(file).ok())
    });
    let ready = ready.await?;
    Ok((process, ready))
}

impl Cloud {
    fn name(&self) -> &'static str {
        match self.login {
            Login::Aws { .. } => "aws",
            Login::Azure { .. } => "azure",
            Login::Gcp { .. } => "gcp",
        }
    }

    /// What a direct read is.
    fn direct(&self) -> &'static str {
        match self.login {
            Login::Aws { .. } => "GetSecretValue of the official SDK",
            Login::Azure { .. } | Login::Gcp { .. } => "GET with reqwest and the bearer",
        }
    }

    fn folder(&self) -> &'static str {
        match self.login {
            Login::Aws { .. } => FOLDER,
            Login::Azure { .. } | Login::Gcp { .. } => "",
        }
    }

    async fn put_credential(&self, control_plane: &ControlPlane) -> Result<()> {
        control_plane.rest.put_data(&format!("infra/{}", self.name()), self.credential.clone()).await
    }

    /// A backend that reaches the store at `url`.
    fn backend(&self, url: &str) -> Value {
        let name = self.name();
        let credentials = format!("infra/{name}");
        let (kind, config) = match &self.login {
            Login::Aws { role, .. } => (
                "aws-secrets-manager",
                json!({
                    "region": moto::REGION,
                    "endpoint": url,
                    "sts_endpoint": url,
                    "role_arn": role,
                    "credentials_path": credentials,
                }),
            ),
            Login::Azure { .. } => (
                "azure-key-vault",
                json!({
                    "vault_url": url,
                    "authority": url,
                    "auth_method": "client_secret",
                    "credentials_path": credentials,
                }),
            ),
            Login::Gcp { .. } => (
                "google-secret-manager",
                json!({ "project_id": PROJECT, "endpoint": url, "credentials_path": credentials }),
            ),
        };
        json!({
            "name": name,
            "type": kind,
            "config": config,
            "path_mapping": { format!("external/{name}/*"): format!("{}*", self.folder()) },
            "mode": "proxy",
        })
    }

    /// A direct caller of the store at `url`.
    fn client(&self, url: &str) -> Result<Client> {
        match &self.login {
            Login::Aws { session, .. } => Client::aws(url, session),
            Login::Azure { token } => Client::bearer(Api::Azure, url.to_owned(), token.clone()),
            Login::Gcp { token } => {
                Client::bearer(Api::Gcp, format!("{url}/v1/projects/{PROJECT}"), token.clone())
            }
        }
    }

    async fn reads(
        &self,
        control_plane: &ControlPlane,
        node: &Server,
        extent: Extent,
        folder: &Path,
        pinning: Pinning,
    ) -> Result<Reads> {
        let start = Instant::now();
        let measured = format!("proxied_read_added_p50_ms_{}", self.name());
        eprint!("{measured} …");
        self.put_credential(control_plane).await?;
        control_plane.rest.configure(self.backend(&self.url)).await?;
        let path = format!("/v1/secrets/external/{}/{}", self.name(), name(0));
        let rest = Rest::new(format!("http://{}", node.address), &control_plane.token)?;
        wait::until("the node serves it", async || {
            Ok((rest.get(&path).await?.json["source"] == "proxy").then_some(()))
        })
        .await
        .with_context(|| path.clone())?;

        let remote = format!("{}{}", self.folder(), name(0));
        let client = self.client(&self.url)?;
        let mut arms = vec![
            client.reader(&remote)?,
            Caller::Http(Http {
                client: http::client(None)?,
                url: format!("http://{}{path}", node.address),
                header: ("authorization", format!("Bearer {}", control_plane.token)),
            }),
        ];
        let mut passthrough = None;
        if let Some((url, header)) = client.request(&remote) {
            let address = loopback();
            let (origin, asked) = split(&url)?;
            let args = ["serve-passthrough", &address.to_string(), origin];
            let log = folder.join(format!("{}-passthrough", self.name()));
            let server = Server::start(&env::current_exe()?, &args, address, pinning, &log).await?;
            let url = format!("http://{address}{asked}");
            arms.push(Caller::Http(Http { client: http::client(None)?, url, header }));
            passthrough = Some(server);
        }
        let turns = self.take_turns(&mut arms, extent).await?;
        drop(passthrough);
        eprintln!(" {:.0} s", start.elapsed().as_secs_f64());
        let [direct, ours, simplest @ ..] = turns.as_slice() else { anyhow::bail!("two arms at least") };
        Ok(self.read_figures(measured, direct, ours, simplest.first().map(Vec::as_slice)))
    }

    async fn take_turns(&self, arms: &mut [Caller], extent: Extent) -> Result<Vec<Vec<Turn>>> {
        let mut turns: Vec<Vec<Turn>> = arms.iter().map(|_| Vec::new()).collect();
        for round in 0..=extent.turns {
            for (arm, turns) in arms.iter_mut().zip(&mut turns) {
                let before = cpu::used_by_all(self.process)?;
                let mut took = read_spaced(arm, extent.turn).await?;
                let cpu = Some(cpu::used_by_all(self.process)?.saturating_sub(before));
                took.sort_unstable();
                // The first round is for connections and caches.
                if round > 0 {
                    turns.push(Turn { cpu, took });
                }
            }
        }
        Ok(turns)
    }

    fn read_figures(&self, name: String, direct: &[Turn], ours: &[Turn], simplest: Option<&[Turn]>) -> Reads {
        let of = |turns: &[Turn], percent| median(turns.iter().map(|turn| turn.percentile(percent)));
        let beside_direct = |turns: &[Turn], figure: &dyn Fn(f64, f64) -> f64| {
            let p50s =
                turns.iter().zip(direct).map(|(turn, floor)| (turn.percentile(50), floor.percentile(50)));
            median(p50s.map(|(turn, floor)| figure(turn, floor)))
        };
        let added = |turns: &[Turn]| beside_direct(turns, &|turn, floor| turn - floor);
        Reads {
            name,
            store: self.store,
            direct: self.direct(),
            ratio: beside_direct(ours, &|ours, floor| floor / ours),
            added_p50_ms: added(ours),
            passthrough_added_p50_ms: simplest.map(added),
            p50_ms: of(ours, 50),
            p99_ms: of(ours, 99),
            direct_p50_ms: of(direct, 50),
            direct_p99_ms: of(direct, 99),
            store_cpu_ms: mean_cpu_ms(direct),
            reads: ours.iter().map(|turn| turn.took.len()).sum(),
        }
    }

    async fn syncs(
        &self,
        extent: Extent,
        folder: &Path,
        pinning: Pinning,
        distance: Distance,
    ) -> Result<CloudSync> {
        let name = format!("{}_{}{}", self.name(), extent.secrets, distance.suffix());
        let (url, _network) = match distance {
            Distance::Near => (self.url.clone(), None),
            Distance::Far => {
                let file = folder.join(format!("{}.far", self.name()));
                let upstream = self.url.trim_start_matches("http://");
                let args = ["serve-far", &file.display().to_string(), upstream];
                let network = start_here(&args, folder, Pinning::Free)?;
                let (network, url) = ready(network, &file).await?;
                (String::from_utf8(url)?, Some(network))
            }
        };
        let client = self.client(&url)?;
        let mut rounds = Vec::new();
        let (mut store_cpu, mut floor_store_cpu, mut quota) = (Vec::new(), Vec::new(), Vec::new());
        for index in 0..extent.rounds {
            let start = Instant::now();
            eprint!("sync_{name}, {} of {} …", index + 1, extent.rounds);
            let control_plane = ControlPlane::start(&folder.join(format!("{name}-{index}")), pinning).await?;
            let at_first = cpu::used_by_all(self.process)?;
            let (floor, floor_cpu) = looped(&client, self.folder(), extent.secrets).await?;
            let after_floor = cpu::used_by_all(self.process)?;
            floor_store_cpu.push(after_floor.saturating_sub(at_first).as_secs_f64());

            self.put_credential(&control_plane).await?;
            let server = control_plane.server.process();
            let before = cpu::used(server)?;
            let run = control_plane.sync_of(self.backend(&url)).await?;
            let first = run.ended().await?;
            store_cpu.push(cpu::used_by_all(self.process)?.saturating_sub(after_floor).as_secs_f64());
            let cpu = cpu::used(server)?.saturating_sub(before);
            let peak_bytes = cpu::resident_peak(server)?;
            ensure!(first.created == extent.secrets, "{} of {} were copied", first.created, extent.secrets);
            let status = format!("/v1/federation/backends/{}/status", run.backend);
            let status = control_plane.rest.get(&status).await?.ok()?;
            quota.push(quota_seconds(&first, &status["call_budget"]["quotas"]));

            let unchanged = control_plane.sync_again(&run.backend).await?.ended().await?;
            ensure!(unchanged.unchanged == extent.secrets, "{} are unchanged", unchanged.unchanged);
            rounds.push(Round { first, unchanged, floor, cpu, floor_cpu, peak_bytes });
            eprintln!(" {:.0} s", start.elapsed().as_secs_f64());
        }
        let bounds = rounds
            .iter()
            .zip(&quota)
            .map(|(round, quota)| round.first.took.as_secs_f64() / round.floor.as_secs_f64().max(*quota));
        Ok(CloudSync {
            store: self.store,
            store_cpu_seconds: median(store_cpu.into_iter()),
            floor_store_cpu_seconds: median(floor_store_cpu.into_iter()),
            ratio_to_bound: median(bounds),
            quota_seconds: median(quota.into_iter()),
            sync: Sync::of(&name, extent.secrets, READS, &rounds, self.fill),
        })
    }
}

/// How far away a store is.
#[derive(Clone, Copy, Debug)]
enum Distance {
    /// On this machine.
    Near,
    /// Every call takes [`AWAY`] longer, as one to a cloud does.
    Far,
}

impl Distance {
    fn suffix(self) -> &'static str {
        match self {
            Distance::Near => "",
            Distance::Far => "_10ms",
        }
    }
}

/// A network before the server at `upstream` that makes each call [`AWAY`] longer, until the process is ended; writes its
/// URL into `file`.
#[tokio::main]
pub(crate) async fn far(file: &Path, upstream: &str) -> Result<()> {
    let network = Proxy::start(upstream.parse()?).await?;
    network.set(Fault::Delay(AWAY)).await?;
    let unfinished = file.with_extension("unfinished");
    fs::write(&unfinished, format!("http://{}", network.addr()))?;
    fs::rename(unfinished, file)?;
    pending().await
}

/// What the loop takes, and what CPU time.
async fn looped(client: &Client, folder: &str, secrets: usize) -> Result<(Duration, Duration)> {
    let own = std::process::id();
    let (start, before) = (Instant::now(), cpu::used(own)?);
    let read = client.list_and_read(folder).await?;
    let took = (start.elapsed(), cpu::used(own)?.saturating_sub(before));
    ensure!(read == secrets, "the loop read {read} of {secrets}");
    Ok(took)
}

/// Reads again some time after each answer, and returns what each read took.
async fn read_spaced(reader: &mut impl Reader, time: Duration) -> Result<Vec<Duration>> {
    let end = Instant::now() + time;
    let mut took = Vec::new();
    while Instant::now() < end {
        sleep(GAP).await;
        let start = Instant::now();
        reader.read().await?;
        took.push(start.elapsed());
    }
    Ok(took)
}

/// How long the calls of a run take by the quota that takes longest: what is beyond the calls that may be made at once,
/// at the rate of the others.
fn quota_seconds(run: &Ended, quotas: &Value) -> f64 {
    let of_quota = |quota: &Value| {
        let operations: &[&str] = match quota["quota"].as_str()? {
            "values" => &["read"],
            "metadata" => &["metadata"],
            "batches" => &["batch"],
            _ => &["list"],
        };
        #[expect(clippy::cast_precision_loss, reason = "a count of calls is small")]
        let calls = operations.iter().filter_map(|name| run.calls.get(*name)).sum::<u64>() as f64;
        Some((calls - quota["burst"].as_f64()?).max(0.0) / quota["per_second"].as_f64()?)
    };
    let quotas = quotas.as_array().map(Vec::as_slice).unwrap_or_default();
    quotas.iter().filter_map(of_quota).fold(0.0, f64::max)
}

/// `http://host:port` and the rest.
fn split(url: &str) -> Result<(&str, &str)> {
    let host = url.find("://").context("no URL")? + 3;
    let path = url[host..].find('/').context("no path")? + host;
    Ok(url.split_at(path))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn the_slowest_quota_bounds_a_run() {
        let calls = BTreeMap::from([("read".to_owned(), 2000), ("list".to_owned(), 80)]);
        let run = Ended { took: Duration::ZERO, calls, created: 2000, unchanged: 0 };
        let quotas = json!([
            { "quota": "values", "burst": 400.0, "per_second": 400.0 },
            { "quota": "lists", "burst": 10.0, "per_second": 100.0 },
        ]);
        assert_eq!(quota_seconds(&run, &quotas), 4.0);
        assert_eq!(quota_seconds(&run, &Value::Null), 0.0);
    }

    #[test]
    fn an_address_ends_where_its_path_begins() {
        let split = split("http://127.0.0.1:80/v1/a?b=c").expect("a URL");
        assert_eq!(split, ("http://127.0.0.1:80", "/v1/a?b=c"));
    }
}
