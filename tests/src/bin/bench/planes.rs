//! Both planes, each a process of its own, with the settings that they have unless told.

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use reqwest::Method;
use scaivault_domain::time::{Clock as _, Timestamp};
use scaivault_telemetry::SystemClock;
use scaivault_tests::planes::Rest;
use scaivault_tests::process::Process;
use scaivault_tests::servers::openbao::AppRole;
use scaivault_tests::{planes, ports, wait};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep};

use crate::cpu::{self, Pinning};

const CREDENTIAL: &str = "infra/hashicorp/approle";
/// How long a run of the largest sync may take on the slowest machine.
const RUN: Duration = Duration::from_secs(1800);

/// A server under load.
pub(crate) struct Server {
    /// Where it listens.
    pub(crate) address: SocketAddr,
    process: Process,
}

impl Server {
    /// Starts a server and waits until it listens at `address`.
    pub(crate) async fn start(
        program: &Path,
        args: &[&str],
        address: SocketAddr,
        pinning: Pinning,
        log: &Path,
    ) -> Result<Server> {
        let mut process = cpu::serve(program, args, pinning, log)?;
        wait::until("the server listens", async || {
            process.ensure_running()?;
            Ok(TcpStream::connect(address).await.ok().map(drop))
        })
        .await
        .with_context(|| format!("at {address}"))?;
        Ok(Server { address, process })
    }

    /// The process that is charged for its requests.
    pub(crate) fn process(&self) -> u32 {
        self.process.id()
    }

    async fn ready(&self, rest: &Rest) -> Result<()> {
        wait::until("the plane is ready", async || {
            Ok((rest.get("/readyz").await?.status == 200).then_some(()))
        })
        .await
    }
}

/// A new installation's control plane.
pub(crate) struct ControlPlane {
    pub(crate) server: Server,
    /// The operator's client.
    pub(crate) rest: Rest,
    /// The operator's token.
    pub(crate) token: String,
    nodes: SocketAddr,
    folder: PathBuf,
    pinning: Pinning,
}

impl ControlPlane {
    /// Makes an installation in `folder`, which is made too, and starts its control plane.
    pub(crate) async fn start(folder: &Path, pinning: Pinning) -> Result<ControlPlane> {
        fs::create_dir(folder)?;
        let file = |name: &str| folder.join(name).display().to_string();
        let (data, root_key, token) = (file("control-plane"), file("root.key"), file("operator-token"));
        let init =
            ["operator", "init", "--data-dir", &data, "--root-key-file", &root_key, "--token-file", &token];
        let made = planes::scaivault().args(init).output()?;
        ensure!(made.status.success(), "operator init: {}", String::from_utf8_lossy(&made.stderr));
        let token = fs::read_to_string(token)?.trim().to_owned();

        let (address, nodes) = (loopback(), loopback());
        let (listen, node_listen) = (address.to_string(), nodes.to_string());
        let mut args = vec!["control-plane", "--data-dir", &data, "--root-key-file", &root_key];
        args.extend(["--listen", &listen, "--node-listen", &node_listen, "--allow-plaintext-backends"]);
        args.push(planes::EGRESS);
        args.extend(["--log", "warn"]);
        let log = folder.join("control-plane.log");
        let server = Server::start(&program(), &args, address, pinning, &log).await?;
        let rest = Rest::new(format!("http://{address}"), &token)?;
        server.ready(&rest).await?;
        Ok(ControlPlane { server, rest, token, nodes, folder: folder.to_owned(), pinning })
    }

    /// Starts a node and waits until it serves.
    pub(crate) async fn node(&self, name: &str) -> Result<Server> {
        let invited = json!({ "name": name, "tenants": ["*"] });
        let invited = self.rest.post("/v1/nodes", invited).await?.ok()?;
        let join_token = self.folder.join(format!("{name}.join-token"));
        fs::write(&join_token, invited["join_token"].as_str().context("no join token")?)?;
        let (address, data) = (loopback(), self.folder.join(name).display().to_string());
        let (listen, control_plane) = (address.to_string(), format!("https://{}", self.nodes));
        let join_token = join_token.display().to_string();
        let mut args = vec!["data-plane", "--data-dir", &data, "--listen", &listen, "--log", "warn"];
        args.extend(["--control-plane", &control_plane, "--join-token-file", &join_token, planes::EGRESS]);
        let log = self.folder.join(format!("{name}.log"));
        let node = Server::start(&program(), &args, address, self.pinning, &log).await?;
        node.ready(&Rest::new(format!("http://{address}"), &self.token)?).await?;
        Ok(node)
    }

    /// Stores what backends log in with.
    pub(crate) async fn put_credential(&self, role: &AppRole) -> Result<()> {
        let credential = json!({ "role_id": role.role_id, "secret_id": role.secret_id });
        self.rest.put_data(CREDENTIAL, credential).await
    }

    /// Configures a backend that proxies, and returns its id.
    pub(crate) async fn proxy(&self, endpoint: &str, mapping: Value) -> Result<String> {
        self.rest.create_backend("proxied", endpoint, CREDENTIAL, mapping).await
    }

    /// Configures a backend that is synced, which starts its first run.
    pub(crate) async fn sync(&self, endpoint: &str, mapping: Value) -> Result<Run<'_>> {
        self.sync_of(planes::backend("synced", endpoint, CREDENTIAL, mapping)).await
    }

    /// As [`ControlPlane::sync`], of any kind of backend.
    pub(crate) async fn sync_of(&self, mut backend: Value) -> Result<Run<'_>> {
        backend["mode"] = "sync".into();
        backend["sync_interval"] = "12h".into();
        let asked = SystemClock.now();
        let created = self.rest.post("/v1/federation/backends", backend).await?.ok()?;
        let backend = created["id"].as_str().context("no id")?.to_owned();
        let runs = format!("/v1/federation/backends/{backend}/syncs");
        let id = wait::until("the first run is there", async || {
            let runs = self.rest.get(&runs).await?.ok()?;
            Ok(runs["syncs"][0]["run_id"].as_str().map(str::to_owned))
        })
        .await?;
        Ok(Run { control_plane: self, backend, id, asked })
    }

    /// Starts another run.
    pub(crate) async fn sync_again(&self, backend: &str) -> Result<Run<'_>> {
        let asked = SystemClock.now();
        let run =
            self.rest.post(&format!("/v1/federation/backends/{backend}/sync"), json!({})).await?.ok()?;
        let id = run["run_id"].as_str().context("no id of a run")?.to_owned();
        Ok(Run { control_plane: self, backend: backend.to_owned(), id, asked })
    }
}

/// A sync that runs.
pub(crate) struct Run<'a> {
    control_plane: &'a ControlPlane,
    /// Of which backend.
    pub(crate) backend: String,
    id: String,
    asked: Timestamp,
}

/// What became of a sync.
#[derive(Debug)]
pub(crate) struct Ended {
    /// From the request until it had ended.
    pub(crate) took: Duration,
    /// Calls of the backend, by operation.
    pub(crate) calls: BTreeMap<String, u64>,
    pub(crate) created: usize,
    pub(crate) unchanged: usize,
}

impl Run<'_> {
    /// Waits for its end, which must be a success. When that was is what its report says: to ask more often would cost
    /// the control plane time.
    pub(crate) async fn ended(&self) -> Result<Ended> {
        #[derive(Deserialize)]
        struct Report {
            outcome: Option<String>,
            ended_at: Option<String>,
            calls: BTreeMap<String, u64>,
            created: usize,
            unchanged: usize,
        }
        let path = format!("/v1/federation/backends/{}/syncs/{}", self.backend, self.id);
        let deadline = Instant::now() + RUN;
        loop {
            let text = self.control_plane.rest.send(Method::GET, &path, None).await?.text;
            let report: Report = serde_json::from_str(&text).with_context(|| text.clone())?;
            if let (Some(outcome), Some(at)) = (report.outcome, report.ended_at) {
                ensure!(outcome == "complete", "{text}");
                let ended = Timestamp::parse(&at).with_context(|| at.clone())?;
                let Report { calls, created, unchanged, .. } = report;
                return Ok(Ended { took: ended.since(self.asked), calls, created, unchanged });
            }
            ensure!(Instant::now() < deadline, "the run does not end: {text}");
            sleep(Duration::from_millis(100)).await;
        }
    }
}

/// `scaivault`, built with this program.
fn program() -> PathBuf {
    planes::scaivault().get_program().into()
}

/// A free address.
pub(crate) fn loopback() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, ports::free()).into()
}
