//! The planes as processes: a control plane, nodes that joined it, and clients of their API.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use std::{env, fs};

use anyhow::{Context as _, Result, bail, ensure};
use futures::future::try_join_all;
use reqwest::header::HeaderMap;
use reqwest::{Method, StatusCode};
use scaivault_domain::backend::KvVersion;
use scaivault_proto::admin::v1::admin_service_client::AdminServiceClient;
use scaivault_proto::federation::v1::federation_service_client::FederationServiceClient;
use scaivault_proto::secrets::v1::secrets_service_client::SecretsServiceClient;
use serde::Deserialize;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::time::{sleep, timeout};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use crate::faults::Proxy;
use crate::process::Process;
use crate::servers::openbao::{self, Admin, OpenBao};
use crate::{http, ports, wait};

/// What the planes log: our own crates in detail, so that a search for what must not be there means something.
const LOG: &str = "info,scaivault_control_plane=debug,scaivault_data_plane=debug,scaivault_edge=debug,\
                   scaivault_backends=debug,scaivault_discovery=debug,scaivault_journal=debug";

/// The servers of the testbed are on loopback, where backends may not be.
pub const EGRESS: &str = "--egress-allow=127.0.0.1,localhost";

/// How the planes are to run. The default: one node, connected directly, for every tenant.
#[derive(Clone, Debug)]
pub struct Options {
    nodes: usize,
    link: Link,
    unreachable_after: Duration,
    audit_max_bytes: Option<u64>,
    max_offline: Option<Duration>,
    allow_unverified_tls: bool,
    traces: Option<String>,
    log: &'static str,
    control_plane_flags: Vec<String>,
    control_plane_environment: BTreeMap<String, String>,
}

#[derive(Clone, Copy, Debug)]
enum Link {
    Direct,
    Cuttable,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            nodes: 1,
            link: Link::Direct,
            unreachable_after: Duration::from_secs(1),
            audit_max_bytes: None,
            max_offline: None,
            allow_unverified_tls: false,
            traces: None,
            log: LOG,
            control_plane_flags: Vec::new(),
            control_plane_environment: BTreeMap::new(),
        }
    }
}

impl Options {
    /// Starts this many nodes.
    #[must_use]
    pub fn nodes(mut self, nodes: usize) -> Self {
        self.nodes = nodes;
        self
    }

    /// Puts a proxy between each node and the control plane; see [`Planes::link`].
    #[must_use]
    pub fn cuttable(mut self) -> Self {
        self.link = Link::Cuttable;
        self
    }

    /// How long a backend's breaker is open before it is called unreachable; one second unless told.
    #[must_use]
    pub fn unreachable_after(mut self, after: Duration) -> Self {
        self.unreachable_after = after;
        self
    }

    /// Bounds the audit journal of the nodes.
    #[must_use]
    pub fn audit_max_bytes(mut self, bytes: u64) -> Self {
        self.audit_max_bytes = Some(bytes);
        self
    }

    /// How long the nodes trust what they know without the control plane.
    #[must_use]
    pub fn max_offline(mut self, longest: Duration) -> Self {
        self.max_offline = Some(longest);
        self
    }

    /// Lets backends be configured with `tls_verify: false`.
    #[must_use]
    pub fn allow_unverified_tls(mut self) -> Self {
        self.allow_unverified_tls = true;
        self
    }

    /// Has the planes export their traces to this collector.
    #[must_use]
    pub fn traces(mut self, endpoint: String) -> Self {
        self.traces = Some(endpoint);
        self
    }

    /// Gives the control plane one more flag, e.g. `--own-identity-hosts`.
    #[must_use]
    pub fn control_plane_flag(mut self, flag: &str, value: impl Display) -> Self {
        self.control_plane_flags.push(format!("{flag}={value}"));
        self
    }

    /// Gives the control plane a variable in its environment, which is empty otherwise.
    #[must_use]
    pub fn control_plane_variable(mut self, name: &str, value: &str) -> Self {
        self.control_plane_environment.insert(name.to_owned(), value.to_owned());
        self
    }

    /// What the planes log, e.g. `debug`.
    #[must_use]
    pub fn log(mut self, filter: &'static str) -> Self {
        self.log = filter;
        self
    }
}

/// One plane's process, which can be stopped and started again at the same address and with the same data.
#[derive(Debug)]
pub struct Plane {
    name: String,
    arguments: Vec<String>,
    environment: BTreeMap<String, String>,
    address: SocketAddr,
    dir: PathBuf,
    log: PathBuf,
    process: Option<Process>,
}

impl Plane {
    /// Where its API is.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The URL of its API, without a slash at the end.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// What it was called when it was made: `control-plane`, or the node's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where its data are.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Starts with this flag from now on, e.g. `--cache-key`. It must not have it already.
    pub fn add_flag(&mut self, flag: &str, value: &str) {
        self.arguments.extend([flag.to_owned(), value.to_owned()]);
    }

    /// Starts with this variable in its environment from now on, or with another value of it.
    pub fn set_variable(&mut self, name: &str, value: &str) {
        self.environment.insert(name.to_owned(), value.to_owned());
    }

    /// What it has logged so far.
    ///
    /// # Errors
    /// If the log cannot be read.
    pub fn log(&self) -> Result<String> {
        Ok(fs::read_to_string(&self.log)?)
    }

    /// The running process.
    ///
    /// # Errors
    /// If it does not run.
    pub fn process(&self) -> Result<&Process> {
        self.process.as_ref().with_context(|| format!("{} does not run", self.name))
    }

    /// Kills it, as a power loss does; returns when it is gone.
    pub fn kill9(&mut self) {
        self.process = None;
    }

    /// Asks it to shut down and waits until it has.
    ///
    /// # Errors
    /// If it does not, or ends with an error.
    pub async fn stop(&mut self) -> Result<()> {
        let process = self.process.take().context("it does not run")?;
        let status = process.stop().await?;
        ensure!(status.success(), "{} ended with {status}", self.name);
        Ok(())
    }

    /// Starts it, with the same address and data as before, and waits until it answers. Whether it is ready is another
    /// question: see [`Plane::ready`].
    ///
    /// # Errors
    /// What went wrong, with the end of its log.
    pub async fn start_again(&mut self) -> Result<()> {
        let mut command = scaivault();
        command.args(&self.arguments).envs(&self.environment);
        let mut process = Process::spawn(&mut command, &self.log)?;
        let (http, url) = (http::client(None)?, format!("{}/livez", self.url()));
        wait::until("the plane answers", async || {
            process.ensure_running()?;
            Ok(http.get(&url).send().await.ok())
        })
        .await?;
        self.process = Some(process);
        Ok(())
    }

    /// Waits until it says that it is ready.
    ///
    /// # Errors
    /// If that takes too long, or it has ended.
    pub async fn ready(&mut self) -> Result<()> {
        let (http, url) = (http::client(None)?, format!("{}/readyz", self.url()));
        let process = self.process.as_mut().context("it does not run")?;
        wait::until("the plane is ready", async || {
            process.ensure_running()?;
            let answer = http.get(&url).send().await.ok();
            Ok(answer.filter(|answer| answer.status() == StatusCode::OK).map(drop))
        })
        .await
    }
}

/// The command `scaivault` as it was built with this test, without our environment.
///
/// # Panics
/// If it was not built.
pub fn scaivault() -> Command {
    let ours = env::current_exe().expect("a running program has a path");
    let program =
        ours.ancestors().skip(1).take(2).map(|dir| dir.join("scaivault")).find(|file| file.is_file());
    let program = program.expect("no program `scaivault`: cargo build --workspace --bins first");
    let mut command = Command::new(program);
    command.env_clear();
    command
}

/// A control plane and its nodes. Everything is gone when this is dropped.
#[derive(Debug)]
pub struct Planes {
    /// The control plane.
    pub control_plane: Plane,
    /// The nodes, in the order in which they were made.
    pub nodes: Vec<Plane>,
    links: Vec<Proxy>,
    operator: String,
    node_listener: SocketAddr,
    options: Options,
    folder: TempDir,
}

impl Planes {
    /// Makes an installation and starts it; returns when every node is ready.
    ///
    /// # Errors
    /// What went wrong, with the end of the log of the one that failed.
    pub async fn start(options: Options) -> Result<Planes> {
        let folder = tempfile::Builder::new().prefix("planes-").tempdir()?;
        let file = |name: &str| folder.path().join(name).display().to_string();
        let (data, root_key, token) = (file("control-plane"), file("root.key"), file("operator-token"));
        let mut init = scaivault();
        init.args([
            "operator",
            "init",
            "--data-dir",
            &data,
            "--root-key-file",
            &root_key,
            "--token-file",
            &token,
        ]);
        let made = tokio::process::Command::from(init).output().await?;
        ensure!(made.status.success(), "operator init: {}", String::from_utf8_lossy(&made.stderr));

        let (address, node_listener) = (loopback(), loopback());
        let mut arguments = vec!["control-plane".to_owned()];
        for (flag, value) in [
            ("--data-dir", data.clone()),
            ("--listen", address.to_string()),
            ("--node-listen", node_listener.to_string()),
            ("--root-key-file", root_key),
            ("--audit-rotate", "300ms".into()),
            ("--min-sync-interval", "1s".into()),
            ("--unreachable-after", format!("{}ms", options.unreachable_after.as_millis())),
            ("--log", options.log.into()),
        ] {
            arguments.extend([flag.to_owned(), value]);
        }
        arguments.push("--allow-plaintext-backends".into());
        arguments.push(EGRESS.into());
        arguments.extend(options.traces.iter().map(|endpoint| format!("--otlp-endpoint={endpoint}")));
        if options.allow_unverified_tls {
            arguments.push("--allow-unverified-tls".into());
        }
        arguments.extend(options.control_plane_flags.iter().cloned());
        let mut control_plane = Plane {
            name: "control-plane".into(),
            arguments,
            environment: options.control_plane_environment.clone(),
            address,
            dir: data.into(),
            log: file("control-plane.log").into(),
            process: None,
        };
        control_plane.start_again().await?;
        control_plane.ready().await?;

        let operator = fs::read_to_string(token)?.trim().to_owned();
        let nodes = options.nodes;
        let mut planes = Planes {
            control_plane,
            nodes: Vec::new(),
            links: Vec::new(),
            operator,
            node_listener,
            options,
            folder,
        };
        for index in 0..nodes {
            planes.invite(&format!("node-{index}"), &["*"]).await?;
        }
        try_join_all(planes.nodes.iter_mut().map(|node| async {
            node.start_again().await?;
            node.ready().await
        }))
        .await?;
        Ok(planes)
    }

    /// Starts one more node, for these tenants only, and returns its index; waits until it is ready.
    ///
    /// # Errors
    /// If it cannot join.
    pub async fn add_node(&mut self, name: &str, tenants: &[&str]) -> Result<usize> {
        let index = self.invite(name, tenants).await?;
        self.nodes[index].start_again().await?;
        self.nodes[index].ready().await?;
        Ok(index)
    }

    /// Prepares a node that has a join token and was not started yet, and returns its index.
    ///
    /// # Errors
    /// If the control plane gives no join token.
    pub async fn invite(&mut self, name: &str, tenants: &[&str]) -> Result<usize> {
        let invited =
            self.control_plane_rest()?.post("/v1/nodes", json!({ "name": name, "tenants": tenants })).await?;
        let join_token = invited.ok()?["join_token"].as_str().context("no join token")?.to_owned();
        let file = |name: String| self.folder.path().join(name);
        let (dir, join_token_file) = (file(name.to_owned()), self.join_token(name));
        fs::write(&join_token_file, join_token)?;
        let control_plane = match self.options.link {
            Link::Direct => self.node_listener,
            Link::Cuttable => {
                self.links.push(Proxy::start(self.node_listener).await?);
                self.links.last().context("just pushed")?.addr()
            }
        };
        let address = loopback();
        let mut arguments = vec!["data-plane".to_owned()];
        for (flag, value) in [
            ("--data-dir", dir.display().to_string()),
            ("--listen", address.to_string()),
            ("--control-plane", format!("https://{control_plane}")),
            ("--join-token-file", join_token_file.display().to_string()),
            ("--audit-rotate", "300ms".into()),
            ("--log", self.options.log.into()),
        ] {
            arguments.extend([flag.to_owned(), value]);
        }
        arguments.push(EGRESS.into());
        let traces = self.options.traces.iter();
        arguments.extend(traces.map(|endpoint| format!("--otlp-endpoint={endpoint}")));
        if let Some(bytes) = self.options.audit_max_bytes {
            arguments.extend(["--audit-max-bytes".into(), bytes.to_string()]);
        }
        if let Some(longest) = self.options.max_offline {
            arguments.extend(["--max-offline".into(), format!("{}ms", longest.as_millis())]);
        }
        let log = file(format!("{name}.log"));
        let environment = BTreeMap::new();
        self.nodes.push(Plane {
            name: name.into(),
            arguments,
            environment,
            address,
            dir,
            log,
            process: None,
        });
        Ok(self.nodes.len() - 1)
    }

    /// The file with the join token that a node of this name was invited with.
    pub fn join_token(&self, name: &str) -> PathBuf {
        self.folder.path().join(format!("{name}.join-token"))
    }

    /// The operator's token.
    pub fn operator_token(&self) -> &str {
        &self.operator
    }

    /// The URL of a node, without a slash at the end.
    pub fn node(&self, index: usize) -> String {
        self.nodes[index].url()
    }

    /// The network between the control plane and a node of [`Options::cuttable`] planes.
    pub fn link(&self, index: usize) -> &Proxy {
        &self.links[index]
    }

    /// Where the control plane listens for nodes, mutual TLS.
    pub fn node_listener(&self) -> SocketAddr {
        self.node_listener
    }

    /// The operator's REST client of a node.
    ///
    /// # Errors
    /// If TLS cannot be set up.
    pub fn rest(&self, index: usize) -> Result<Rest> {
        Rest::new(self.node(index), &self.operator)
    }

    /// The operator's REST client of the control plane itself.
    ///
    /// # Errors
    /// If TLS cannot be set up.
    pub fn control_plane_rest(&self) -> Result<Rest> {
        Rest::new(self.control_plane.url(), &self.operator)
    }

    /// A gRPC channel to a node, without a token: for clients with a [`Bearer`] of their own.
    ///
    /// # Errors
    /// Never: addresses of nodes are valid.
    pub fn channel(&self, index: usize) -> Result<Channel> {
        Ok(Endpoint::from_shared(self.node(index))?.connect_lazy())
    }

    /// The operator's gRPC client for secrets.
    ///
    /// # Errors
    /// See [`Planes::channel`].
    pub fn secrets_client(&self, index: usize) -> Result<SecretsServiceClient<Authenticated>> {
        Ok(SecretsServiceClient::with_interceptor(self.channel(index)?, Bearer::new(&self.operator)?))
    }

    /// The operator's gRPC client for backends.
    ///
    /// # Errors
    /// See [`Planes::channel`].
    pub fn federation_client(&self, index: usize) -> Result<FederationServiceClient<Authenticated>> {
        Ok(FederationServiceClient::with_interceptor(self.channel(index)?, Bearer::new(&self.operator)?))
    }

    /// The operator's gRPC client for administration.
    ///
    /// # Errors
    /// See [`Planes::channel`].
    pub fn admin_client(&self, index: usize) -> Result<AdminServiceClient<Authenticated>> {
        Ok(AdminServiceClient::with_interceptor(self.channel(index)?, Bearer::new(&self.operator)?))
    }

    /// Runs `scaivault` with these words as the operator at the first node, and returns what it prints.
    ///
    /// # Errors
    /// If it cannot be run, or fails.
    pub async fn cli(&self, line: &str) -> Result<String> {
        let mut command = scaivault();
        command
            .args(line.split_whitespace())
            .env("SCAIVAULT_ADDR", self.node(0))
            .env("SCAIVAULT_TOKEN", &self.operator);
        let told = tokio::process::Command::from(command).output().await?;
        ensure!(told.status.success(), "{line}: {}", String::from_utf8_lossy(&told.stderr));
        Ok(String::from_utf8(told.stdout)?)
    }

    /// Everything that was logged, and where.
    ///
    /// # Errors
    /// If a log cannot be read.
    pub fn logs(&self) -> Result<Vec<(PathBuf, String)>> {
        self.planes().map(|plane| Ok((plane.log.clone(), plane.log()?))).collect()
    }

    /// The data directories of the planes.
    pub fn dirs(&self) -> Vec<PathBuf> {
        self.planes().map(|plane| plane.dir.clone()).collect()
    }

    fn planes(&self) -> impl Iterator<Item = &Plane> {
        std::iter::once(&self.control_plane).chain(&self.nodes)
    }
}

fn loopback() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, ports::free()).into()
}

/// A gRPC channel with a token.
pub type Authenticated = InterceptedService<Channel, Bearer>;

/// Sends a token with every gRPC request.
#[derive(Clone, Debug)]
pub struct Bearer(MetadataValue<Ascii>);

impl Bearer {
    /// Sends this token.
    ///
    /// # Errors
    /// If a header cannot carry it.
    pub fn new(token: &str) -> Result<Bearer> {
        Ok(Bearer(format!("Bearer {token}").parse()?))
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("authorization", self.0.clone());
        Ok(request)
    }
}

/// A client of the REST API.
#[derive(Clone, Debug)]
pub struct Rest {
    http: reqwest::Client,
    url: String,
    headers: HeaderMap,
}

impl Rest {
    /// A client of the API at `url` with a token.
    ///
    /// # Errors
    /// If a header cannot carry the token.
    pub fn new(url: String, token: &str) -> Result<Rest> {
        Rest { http: http::client(None)?, url, headers: HeaderMap::new() }.with_token(token)
    }

    /// The same client with another token.
    ///
    /// # Errors
    /// If a header cannot carry it.
    pub fn with_token(&self, token: &str) -> Result<Rest> {
        self.with_header("authorization", &format!("Bearer {token}"))
    }

    /// The same client without a token.
    #[must_use]
    pub fn without_token(&self) -> Rest {
        let mut rest = self.clone();
        rest.headers.remove("authorization");
        rest
    }

    /// The same client, an operator's, in another tenant.
    ///
    /// # Errors
    /// If a header cannot carry it.
    pub fn in_tenant(&self, tenant: &str) -> Result<Rest> {
        self.with_header("x-scaivault-tenant", tenant)
    }

    /// The same client with this header, e.g. `if-match`, in every request.
    ///
    /// # Errors
    /// If it is no header.
    pub fn with_header(&self, name: &'static str, value: &str) -> Result<Rest> {
        let mut rest = self.clone();
        rest.headers.insert(name, value.parse()?);
        Ok(rest)
    }

    /// GET.
    ///
    /// # Errors
    /// If there is no answer; a refusal is one.
    pub async fn get(&self, path: &str) -> Result<Answer> {
        self.send(Method::GET, path, None).await
    }

    /// POST of a JSON body.
    ///
    /// # Errors
    /// If there is no answer; a refusal is one.
    pub async fn post(&self, path: &str, body: Value) -> Result<Answer> {
        self.send(Method::POST, path, Some(body.to_string())).await
    }

    /// PUT of a JSON body.
    ///
    /// # Errors
    /// If there is no answer; a refusal is one.
    pub async fn put(&self, path: &str, body: Value) -> Result<Answer> {
        self.send(Method::PUT, path, Some(body.to_string())).await
    }

    /// PATCH of a JSON body.
    ///
    /// # Errors
    /// If there is no answer; a refusal is one.
    pub async fn patch(&self, path: &str, body: Value) -> Result<Answer> {
        self.send(Method::PATCH, path, Some(body.to_string())).await
    }

    /// DELETE.
    ///
    /// # Errors
    /// If there is no answer; a refusal is one.
    pub async fn delete(&self, path: &str) -> Result<Answer> {
        self.send(Method::DELETE, path, None).await
    }

    /// Stores a JSON secret.
    ///
    /// # Errors
    /// If it is refused.
    pub async fn put_data(&self, path: &str, data: Value) -> Result<()> {
        self.put(&format!("/v1/secrets/{path}"), json!({ "data": data })).await?.ok().map(drop)
    }

    /// Configures [`backend`] and returns its id.
    ///
    /// # Errors
    /// If it is refused.
    pub async fn create_backend(
        &self,
        name: &str,
        endpoint: &str,
        credential: &str,
        mapping: Value,
    ) -> Result<String> {
        self.configure(backend(name, endpoint, credential, mapping)).await
    }

    /// Creates a backend and returns its id.
    ///
    /// # Errors
    /// If it is refused.
    pub async fn configure(&self, configuration: Value) -> Result<String> {
        let created = self.post("/v1/federation/backends", configuration).await?.ok()?;
        Ok(created["id"].as_str().context("no id")?.to_owned())
    }

    /// Runs a sync of this backend, and returns its report.
    ///
    /// # Errors
    /// If it is refused, or does not end within [`SYNC_PATIENCE`].
    pub async fn sync(&self, backend: &str) -> Result<Value> {
        self.sync_with(backend, json!({})).await
    }

    /// [`Rest::sync`] with a body, e.g. `{"allow_deletes": "run_…"}`.
    ///
    /// # Errors
    /// If it is refused, or does not end within [`SYNC_PATIENCE`].
    pub async fn sync_with(&self, backend: &str, body: Value) -> Result<Value> {
        let run = self.post(&format!("/v1/federation/backends/{backend}/sync"), body).await?.ok()?;
        self.ended(backend, run["run_id"].as_str().context("no run")?).await
    }

    /// Waits for the end of a run, and returns its report.
    ///
    /// # Errors
    /// If there is no such run, or it does not end within [`SYNC_PATIENCE`].
    pub async fn ended(&self, backend: &str, run: &str) -> Result<Value> {
        let path = format!("/v1/federation/backends/{backend}/syncs/{run}");
        let ended = async {
            loop {
                let report = self.get(&path).await?.ok()?;
                if !report["outcome"].is_null() {
                    return Ok(report);
                }
                sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(SYNC_PATIENCE, ended).await.with_context(|| format!("{run} does not end"))?
    }

    /// What the status of this backend says.
    ///
    /// # Errors
    /// If there is no such backend.
    pub async fn status(&self, backend: &str) -> Result<Value> {
        self.get(&format!("/v1/federation/backends/{backend}/status")).await?.ok()
    }

    /// Makes a token with a policy of its own, e.g. `[{"path":"app/**","capabilities":["read"]}]`.
    ///
    /// # Errors
    /// If it is refused.
    pub async fn issue(&self, subject: &str, scopes: &[&str], rules: Value) -> Result<Issued> {
        self.put(&format!("/v1/policies/{subject}"), json!({ "rules": rules })).await?.ok()?;
        let wanted = json!({ "subject": subject, "scopes": scopes, "policies": [subject] });
        Ok(serde_json::from_value(self.post("/v1/tokens", wanted).await?.ok()?)?)
    }

    /// All audit rows of the tenant that have arrived, oldest first.
    ///
    /// # Errors
    /// If they cannot be read.
    pub async fn audit(&self) -> Result<Vec<Value>> {
        let mut all = Vec::new();
        let mut page = String::new();
        loop {
            let mut answer = self.get(&format!("/v1/audit?page_size=1000&page_token={page}")).await?.ok()?;
            let rows: Vec<Value> = serde_json::from_value(answer["rows"].take())?;
            let next = answer["next_page_token"].as_str().unwrap_or_default().to_owned();
            let end = rows.is_empty() && next == page;
            all.extend(rows);
            if end {
                return Ok(all);
            }
            page = next;
        }
    }

    /// Any request, its body byte for byte as given.
    ///
    /// # Errors
    /// If there is no answer; a refusal is one.
    pub async fn send(&self, method: Method, path: &str, body: Option<String>) -> Result<Answer> {
        let mut request =
            self.http.request(method.clone(), format!("{}{path}", self.url)).headers(self.headers.clone());
        if let Some(body) = body {
            let kind =
                if method == Method::PATCH { "application/merge-patch+json" } else { "application/json" };
            request = request.header("content-type", kind).body(body);
        }
        let answer = request.send().await?;
        let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
        let text = answer.text().await?;
        let json = serde_json::from_str(&text).unwrap_or_default();
        Ok(Answer { status, headers, json, text })
    }
}

/// A token that was made.
#[derive(Clone, Debug, Deserialize)]
pub struct Issued {
    /// The token.
    pub token: String,
    /// Its name.
    pub accessor: String,
}

/// An answer of the REST API.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// The headers.
    pub headers: HeaderMap,
    /// The body, null if it is not JSON.
    pub json: Value,
    /// The body as it came.
    pub text: String,
}

impl Answer {
    /// The body of a success.
    ///
    /// # Errors
    /// If it is a refusal, which is then told.
    pub fn ok(self) -> Result<Value> {
        if !(200..300).contains(&self.status) {
            bail!("{} {}", self.status, self.text);
        }
        Ok(self.json)
    }

    /// A header, empty if there is none.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    /// Status and `code` of a refusal, to compare both at once.
    pub fn refusal(&self) -> (u16, &str) {
        (self.status, self.json["code"].as_str().unwrap_or_default())
    }

    /// The pointers of the fields that a refusal names.
    pub fn pointers(&self) -> Vec<&str> {
        let errors = self.json["errors"].as_array().map(Vec::as_slice).unwrap_or_default();
        errors.iter().filter_map(|error| error["pointer"].as_str()).collect()
    }
}

/// How long a sync may take. One that gives up on a backend has tried for minutes.
pub const SYNC_PATIENCE: Duration = Duration::from_secs(200);

/// Where the credential of the [`Federated`] backend is.
pub const CREDENTIAL: &str = "infra/hashicorp/approle";

/// The planes with an OpenBao behind them.
///
/// KV version 2 at `secret/` is mapped to `external/hashicorp/**`:
/// - `app/db`: `{"user":"app","password":"three"}`, the third of three versions, custom metadata `team: core`
/// - `app/api/key` and `app/api/v2/key`: nested
/// - `top`: not nested
/// - `gone`: deleted
#[derive(Debug)]
pub struct Federated {
    /// The planes.
    pub planes: Planes,
    /// The id of the backend.
    pub backend: String,
    /// The network between the planes and OpenBao.
    pub network: Proxy,
    /// OpenBao, audited.
    pub bao: OpenBao,
}

impl Federated {
    /// With one node.
    ///
    /// # Errors
    /// What went wrong.
    pub async fn start() -> Result<Federated> {
        Federated::start_with(Options::default()).await
    }

    /// In sync mode, and every node serves what the first run copied. Other runs have to be asked for: the clock lets
    /// none begin.
    ///
    /// # Errors
    /// What went wrong.
    pub async fn synced(options: Options) -> Result<Federated> {
        let settings = json!({ "mode": "sync", "sync_interval": "1h", "config": { "timeout": "1s" } });
        let federated = Federated::start_as(options, &settings).await?;
        let rest = federated.planes.rest(0)?;
        let runs = format!("/v1/federation/backends/{}/syncs", federated.backend);
        let first = wait::until("the first run has begun", async || {
            Ok(rest.get(&runs).await?.ok()?["syncs"][0]["run_id"].as_str().map(str::to_owned))
        });
        let first = rest.ended(&federated.backend, &first.await?).await?;
        ensure!(first["outcome"] == "complete", "{first}");
        for index in 0..federated.planes.nodes.len() {
            let rest = federated.planes.rest(index)?;
            wait::until("the node serves copies", async || {
                let db = rest.get("/v1/secrets/external/hashicorp/app/db").await?;
                Ok((db.json["source"] == "sync").then_some(()))
            })
            .await?;
        }
        Ok(federated)
    }

    /// Starts and seeds everything, and has made the first proxied read at each node.
    ///
    /// # Errors
    /// What went wrong.
    pub async fn start_with(options: Options) -> Result<Federated> {
        Federated::start_as(options, &json!({})).await
    }

    /// As [`Federated::start_with`], with `settings` merged into the configuration of the backend.
    ///
    /// # Errors
    /// What went wrong.
    pub async fn start_as(options: Options, settings: &Value) -> Result<Federated> {
        let (bao, planes) = tokio::try_join!(seeded(), Planes::start(options))?;
        let network = Proxy::start(bao.socket()).await?;
        let operator = planes.rest(0)?;
        operator.put_data(CREDENTIAL, application(&bao.client()?, POLICY).await?).await?;
        let endpoint = format!("http://{}", network.addr());
        let mapping = json!({ "external/hashicorp/**": "secret/data/**" });
        let mut configuration = backend("openbao", &endpoint, CREDENTIAL, mapping);
        merge(&mut configuration, settings);
        let backend = operator.configure(configuration).await?;
        for index in 0..planes.nodes.len() {
            let rest = planes.rest(index)?;
            wait::until("the node serves the backend", async || {
                Ok((rest.get("/v1/secrets/external/hashicorp/app/db").await?.status == 200).then_some(()))
            })
            .await?;
        }
        Ok(Federated { planes, backend, network, bao })
    }

    /// How often OpenBao was asked to `operation` (`read`, `list`, …) `path` so far.
    ///
    /// # Errors
    /// If its log cannot be read.
    pub fn asked(&self, operation: &str, path: &str) -> Result<usize> {
        let asked = format!("{operation} {path}");
        Ok(self.bao.requests()?.into_iter().filter(|request| *request == asked).count())
    }
}

async fn seeded() -> Result<OpenBao> {
    let bao = OpenBao::start(openbao::Options::default().audited()).await?;
    let admin = bao.client()?;
    admin.enable_kv("secret", KvVersion::V2).await?;
    for password in ["one", "two", "three"] {
        admin.put("secret", "app/db", json!({ "user": "app", "password": password })).await?;
    }
    admin.set_custom_metadata("secret", "app/db", json!({ "team": "core" })).await?;
    for path in ["app/api/key", "app/api/v2/key", "top", "gone"] {
        admin.put("secret", path, json!({ "value": path })).await?;
    }
    admin.delete("secret", "gone", &[1]).await?;
    Ok(bao)
}

/// A policy of OpenBao: everything in `secret/` may be read and listed.
pub const POLICY: &str = r#"path "secret/*" { capabilities = ["read", "list"] }"#;

/// Makes an application role with this policy in OpenBao, and returns its credential as a backend wants it.
///
/// # Errors
/// If OpenBao refuses.
pub async fn application(admin: &Admin, policy: &str) -> Result<Value> {
    admin.write_policy("scaivault", policy).await?;
    admin.enable_auth("approle", "approle").await?;
    let settings = json!({ "token_policies": ["scaivault"], "token_ttl": "1h" });
    let role = admin.create_approle("approle", "scaivault", settings).await?;
    Ok(json!({ "role_id": role.role_id, "secret_id": role.secret_id }))
}

/// Puts the members of `settings` into `configuration`, those of objects one by one.
pub fn merge(configuration: &mut Value, settings: &Value) {
    match (configuration, settings) {
        (Value::Object(before), Value::Object(settings)) => {
            for (name, setting) in settings {
                merge(before.entry(name).or_insert(Value::Null), setting);
            }
        }
        (before, setting) => *before = setting.clone(),
    }
}

/// A Vault backend in mode `proxy` that logs in with approle.
pub fn backend(name: &str, endpoint: &str, credential: &str, mapping: Value) -> Value {
    json!({
        "name": name,
        "type": "hashicorp-vault",
        "config": { "endpoint": endpoint, "auth_method": "approle", "auth_config_path": credential },
        "path_mapping": mapping,
        "mode": "proxy",
    })
}
