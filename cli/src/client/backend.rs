//! `backend add | list | show | set | remove | status | sync | syncs | sync-report | sync-cancel | events`.

use std::fmt;
use std::path::PathBuf;

use clap::builder::PossibleValuesParser;
use clap::{ArgAction, Args, Subcommand};
use scaivault_domain::backend::{BackendId, HASHICORP_VAULT, VaultAuthMethod};
use scaivault_domain::sync::{ConflictPolicy, MAX_HISTORY, Mode, WritePolicy};
use scaivault_domain::tenant::BackendName;
use scaivault_proto::federation::v1::{
    Backend, BackendHealth, CopiesPolicy, CreateBackendRequest, DeleteBackendRequest, GetBackendRequest,
    GetBackendStatusRequest, GetBackendStatusResponse, ListBackendsRequest, UpdateBackendRequest,
};
use serde::Serialize;

use super::backend_file::{BackendFile, Rule, Rules, Stored, rule};
use super::{events, sync, wire};
use crate::connection::Connection;
use crate::failure::Failure;
use crate::output::{Output, details, table};
use crate::parse;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Federate a store.
    Add(Box<Add>),
    /// List the federated stores.
    List,
    /// Show the configuration of a backend.
    Show(Named),
    /// Change the configuration of a backend; what is not named stays as it is.
    Set(Box<Set>),
    /// Stop federating a store; the store itself is left as it is.
    Remove(Remove),
    /// Show whether a backend works, and how far each node is with its configuration.
    Status(Named),
    /// Start a sync, or join the one under way.
    ///
    /// With --wait the exit code tells how it ended: 0 complete; 3 partial, so something was left out; 2 failed or
    /// cancelled, or the time is up.
    Sync(sync::Sync),
    /// List the last syncs of a backend, newest first.
    Syncs(Named),
    /// Show what a sync did, what it left out and why.
    SyncReport(sync::OfRun),
    /// End a running sync; what it committed stays.
    SyncCancel(sync::OfRun),
    /// Show what happened to a backend.
    Events(BackendEvents),
}

#[derive(Debug, Args)]
pub(crate) struct Named {
    /// Name or id of the backend.
    #[arg(value_name = "NAME|ID", value_parser = reference)]
    pub(super) backend: Reference,
}

#[derive(Debug, Args)]
pub(crate) struct Remove {
    #[command(flatten)]
    named: Named,
    /// Erase its copies too; otherwise they become ordinary local secrets.
    #[arg(long)]
    purge: bool,
}

#[derive(Debug, Args)]
pub(crate) struct BackendEvents {
    #[command(flatten)]
    named: Named,
    #[command(flatten)]
    follow: events::Follow,
}

#[derive(Debug, Args)]
pub(crate) struct Add {
    /// Name of the backend, unique in the tenant.
    #[arg(value_parser = parse::backend_name, required_unless_present = "file", conflicts_with = "file")]
    name: Option<BackendName>,
    /// The configuration as JSON, with the fields of the REST API.
    #[arg(long, value_name = "FILE", conflicts_with = "settings")]
    file: Option<PathBuf>,
    /// Accept that existing local secrets are hidden by the mapping.
    #[arg(long)]
    adopt: bool,
    #[command(flatten)]
    settings: Settings,
}

#[derive(Debug, Args)]
pub(crate) struct Set {
    #[command(flatten)]
    named: Named,
    /// Another name.
    #[arg(long, value_name = "NAME", value_parser = parse::backend_name)]
    name: Option<BackendName>,
    /// Accept that existing local secrets are hidden by the mapping.
    #[arg(long)]
    adopt: bool,
    /// Accept that copies which were changed here are erased when their paths are proxied again.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    settings: Settings,
}

/// The settings of a backend. An empty text takes an optional setting back.
#[derive(Debug, Args)]
#[group(id = "settings", multiple = true)]
pub(crate) struct Settings {
    /// Which kind of store.
    #[arg(long = "type", value_name = "TYPE", value_parser = PossibleValuesParser::new([HASHICORP_VAULT]))]
    kind: Option<String>,
    /// Base URL, e.g. https://vault.internal:8200.
    #[arg(long, value_name = "URL")]
    endpoint: Option<String>,
    /// How ScaiVault logs in.
    #[arg(long, value_name = "METHOD", value_parser = parse::one_of(VaultAuthMethod::ALL, VaultAuthMethod::as_str))]
    auth_method: Option<VaultAuthMethod>,
    /// Path of the local secret with the credential.
    #[arg(long, value_name = "PATH")]
    auth_config_path: Option<String>,
    /// Where the auth method is mounted, if not under its own name.
    #[arg(long, value_name = "MOUNT")]
    auth_mount: Option<String>,
    /// Vault namespace.
    #[arg(long)]
    namespace: Option<String>,
    /// PEM certificates that the store's certificate must chain to.
    #[arg(long, value_name = "FILE")]
    ca_cert_file: Option<String>,
    /// Do not check the store's certificate.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    no_tls_verify: Option<bool>,
    /// The KV mount, where ScaiVault may not ask for it.
    #[arg(long, value_name = "MOUNT")]
    kv_mount: Option<String>,
    /// The version of the KV mount, 1 or 2.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..=2))]
    kv_version: Option<i32>,
    /// A policy of the tokens that nodes get (auth method `token`). Repeatable.
    #[arg(long, value_name = "POLICY", action = ArgAction::Append)]
    lease_policy: Option<Vec<String>>,
    /// Let nodes hold a token that never expires (auth method `token`).
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    allow_static_on_nodes: Option<bool>,
    /// Deadline of a read, e.g. 5s.
    #[arg(long, value_name = "DURATION")]
    timeout: Option<String>,
    /// Which paths are which names in the store, e.g. 'external/vault/**=secret/data/**'. Repeatable; the first that
    /// matches wins. A rule may override settings of the backend: 'a/**=secret/a/**,mode=sync,sync-interval=30s'; there
    /// are mode, sync-interval, write-policy, conflict-policy.
    #[arg(
        long = "map",
        value_name = "PATTERN=TEMPLATE[,SETTING=VALUE…]",
        value_parser = rule,
        action = ArgAction::Append
    )]
    mapping: Option<Vec<Rule>>,
    /// How reads are served: from the store each time (proxy, the default), or from copies (sync).
    #[arg(long, value_parser = parse::one_of(Mode::ALL, Mode::as_str))]
    mode: Option<Mode>,
    /// From the start of one sync to the start of the next, e.g. 15m; needed with --mode sync.
    #[arg(long, value_name = "DURATION")]
    sync_interval: Option<String>,
    /// What becomes of writes to synced paths. This version serves `disabled` only.
    #[arg(long, value_name = "POLICY", value_parser = parse::one_of(WritePolicy::ALL, WritePolicy::as_str))]
    write_policy: Option<WritePolicy>,
    /// Who is right when both sides of a synced path changed. This version serves `backend_wins` only.
    #[arg(long, value_name = "POLICY", value_parser = parse::one_of(ConflictPolicy::ALL, ConflictPolicy::as_str))]
    conflict_policy: Option<ConflictPolicy>,
    /// Let every node hold every copy, instead of those that were read there.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    prefetch: Option<bool>,
    /// How old an answer may be, e.g. 1m; an older copy is compared with the store first.
    #[arg(long, value_name = "DURATION")]
    max_staleness: Option<String>,
    /// How many versions the first copy of a secret brings along (10 unless set).
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_HISTORY)))]
    history_depth: Option<u32>,
    /// Whether it is used; a backend that is not keeps its paths and refuses reads.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    enabled: Option<bool>,
}

impl Settings {
    /// Puts what was named into `file`.
    fn apply(self, file: &mut BackendFile) -> Result<(), Failure> {
        fn put<T>(place: &mut T, value: Option<T>) {
            if let Some(value) = value {
                *place = value;
            }
        }
        let config = &mut file.config;
        put(&mut file.kind, self.kind);
        put(&mut config.endpoint, self.endpoint);
        put(&mut config.auth_method, self.auth_method.map(|method| method.as_str().to_owned()));
        put(&mut config.auth_config_path, self.auth_config_path);
        put(&mut config.auth_mount, self.auth_mount);
        put(&mut config.namespace, self.namespace);
        put(&mut config.ca_cert, self.ca_cert_file.as_deref().map(read_certificates).transpose()?);
        put(&mut config.tls_verify, self.no_tls_verify.map(|unchecked| Some(!unchecked)));
        if self.kv_mount.as_deref() == Some("") {
            config.kv_version = None;
        }
        put(&mut config.kv_mount, self.kv_mount);
        put(&mut config.kv_version, self.kv_version.map(Some));
        put(
            &mut config.lease_policies,
            self.lease_policy.map(|all| all.into_iter().filter(|policy| !policy.is_empty()).collect()),
        );
        put(&mut config.allow_static_on_nodes, self.allow_static_on_nodes);
        put(&mut config.timeout, self.timeout);
        put(&mut file.path_mapping, self.mapping.map(Rules));
        put(&mut file.mode, self.mode.map(|mode| mode.as_str().to_owned()));
        put(&mut file.sync_interval, self.sync_interval);
        put(&mut file.write_policy, self.write_policy.map(Some));
        put(&mut file.conflict_policy, self.conflict_policy.map(Some));
        put(&mut file.prefetch, self.prefetch);
        put(&mut file.max_staleness, self.max_staleness);
        put(&mut file.history_depth, self.history_depth.map(Some));
        put(&mut file.enabled, self.enabled.map(Some));
        Ok(())
    }
}

fn read_certificates(file: &str) -> Result<String, Failure> {
    if file.is_empty() {
        return Ok(String::new());
    }
    read_file(file.as_ref())
}

fn read_file(file: &std::path::Path) -> Result<String, Failure> {
    std::fs::read_to_string(file).map_err(|error| {
        Failure::usage(format!("{} cannot be read: {error}", file.display()), "name a file that can be read")
    })
}

/// A backend as people name it. What has the shape of an id is one.
#[derive(Clone, Debug)]
pub(super) enum Reference {
    Id(BackendId),
    Name(BackendName),
}

fn reference(text: &str) -> Result<Reference, String> {
    match BackendId::parse(text) {
        Ok(id) => Ok(Reference::Id(id)),
        Err(_) => parse::backend_name(text).map(Reference::Name),
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reference::Id(id) => id.fmt(f),
            Reference::Name(name) => name.fmt(f),
        }
    }
}

impl Reference {
    /// The id of the backend.
    pub(super) async fn id(&self, to: &Connection) -> Result<String, Failure> {
        let name = match self {
            Reference::Id(id) => return Ok(id.to_string()),
            Reference::Name(name) => name,
        };
        let found = list(to).await?.into_iter().find(|backend| backend.name == name.as_str());
        found.map(|backend| backend.id).ok_or_else(|| {
            Failure::server(
                format!("no backend is named `{name}`"),
                "`scaivault backend list` shows what there is",
            )
        })
    }
}

async fn list(to: &Connection) -> Result<Vec<Backend>, Failure> {
    wire::all(async |page_token| {
        let request = ListBackendsRequest { page_size: wire::PAGE, page_token };
        let answer = to.federation().list_backends(request).await?.into_inner();
        Ok((answer.backends, answer.next_page_token))
    })
    .await
}

impl Command {
    pub(super) async fn run(self, to: &Connection, output: &mut Output<'_>) -> Result<(), Failure> {
        match self {
            Command::Add(add) => add.run(to, output).await,
            Command::List => show_list(to, output).await,
            Command::Show(named) => {
                let request = GetBackendRequest { id: named.backend.id(to).await? };
                show(to.federation().get_backend(request).await?.into_inner().backend, output)
            }
            Command::Set(set) => set.run(to, output).await,
            Command::Remove(remove) => remove.run(to, output).await,
            Command::Status(named) => status(&named.backend, to, output).await,
            Command::Sync(sync) => sync.run(to, output).await,
            Command::Syncs(named) => sync::list(&named.backend, to, output).await,
            Command::SyncReport(of) => of.report(to, output).await,
            Command::SyncCancel(of) => of.cancel(to, output).await,
            Command::Events(events) => {
                let id = events.named.backend.id(to).await?;
                events::show(to, Some(&id), &events.follow, output).await
            }
        }
    }
}

impl Add {
    async fn run(self, to: &Connection, output: &mut Output<'_>) -> Result<(), Failure> {
        let file = match (&self.file, self.name) {
            (Some(path), _) => BackendFile::parse(&read_file(path)?)?,
            (None, name) => {
                let mut file =
                    BackendFile { name: name.map(String::from).unwrap_or_default(), ..Default::default() };
                file.mode = Mode::Proxy.as_str().to_owned();
                self.settings.apply(&mut file)?;
                all_given(&file)?;
                file
            }
        };
        let request =
            CreateBackendRequest { backend: Some(file.to_wire()?), adopt: self.adopt || file.adopt };
        show(to.federation().create_backend(request).await?.into_inner().backend, output)
    }
}

/// Names every option that is missing, not only the first.
fn all_given(file: &BackendFile) -> Result<(), Failure> {
    let options = [
        ("--type", file.kind.is_empty()),
        ("--endpoint", file.config.endpoint.is_empty()),
        ("--auth-method", file.config.auth_method.is_empty()),
        ("--auth-config-path", file.config.auth_config_path.is_empty()),
        ("--map", file.path_mapping.0.is_empty()),
    ];
    let missing: Vec<_> =
        options.into_iter().filter(|(_, missing)| *missing).map(|(option, _)| option).collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(Failure::usage(
        format!("a backend needs {}", missing.join(", ")),
        "add them, or give the whole configuration with --file; `scaivault backend add --help` explains each",
    ))
}

impl Set {
    async fn run(self, to: &Connection, output: &mut Output<'_>) -> Result<(), Failure> {
        let id = self.named.backend.id(to).await?;
        let answer = to.federation().get_backend(GetBackendRequest { id: id.clone() }).await?.into_inner();
        let before = answer.backend.ok_or_else(|| Failure::strange_answer("no backend"))?;
        let mut file = BackendFile::of_wire(&before)?;
        if let Some(name) = self.name {
            file.name = name.into();
        }
        self.settings.apply(&mut file)?;
        let wanted = file.to_wire()?;
        let paths = changes(&before, &wanted);
        if paths.is_empty() {
            output.note("nothing to change: the backend is configured like this")?;
            return show(Some(before), output);
        }
        let request = UpdateBackendRequest {
            // The etag of what was read: a change that somebody else made since is not lost.
            backend: Some(Backend { id, etag: before.etag, ..wanted }),
            update_mask: Some(prost_types::FieldMask { paths }),
            adopt: self.adopt,
            force: self.force,
        };
        show(to.federation().update_backend(request).await?.into_inner().backend, output)
    }
}

/// The fields of the update mask in which `wanted` is different.
fn changes(before: &Backend, wanted: &Backend) -> Vec<String> {
    let fields = [
        ("name", before.name != wanted.name),
        ("hashicorp_vault", before.config != wanted.config),
        ("rules", before.rules != wanted.rules),
        ("mode", before.mode != wanted.mode),
        ("enabled", before.enabled != wanted.enabled),
        ("timeout", before.timeout != wanted.timeout),
        ("sync_interval", before.sync_interval != wanted.sync_interval),
        ("write_policy", before.write_policy != wanted.write_policy),
        ("conflict_policy", before.conflict_policy != wanted.conflict_policy),
        ("prefetch", before.prefetch != wanted.prefetch),
        ("max_staleness", before.max_staleness != wanted.max_staleness),
        ("history_depth", before.history_depth != wanted.history_depth),
    ];
    fields.into_iter().filter(|(_, changed)| *changed).map(|(field, _)| field.to_owned()).collect()
}

fn show(backend: Option<Backend>, output: &mut Output<'_>) -> Result<(), Failure> {
    let stored = Stored::of(backend.ok_or_else(|| Failure::strange_answer("no backend"))?)?;
    output.show(&stored, || {
        let (file, config) = (&stored.file, &stored.file.config);
        let about = details([
            ("name", file.name.clone()),
            ("id", stored.id.clone()),
            ("type", file.kind.clone()),
            ("mode", file.mode.clone()),
            ("enabled", file.enabled.unwrap_or(true).to_string()),
            ("endpoint", config.endpoint.clone()),
            ("namespace", config.namespace.clone()),
            ("auth method", config.auth_method.clone()),
            ("auth mount", config.auth_mount.clone()),
            ("auth config path", config.auth_config_path.clone()),
            ("TLS", tls(file).to_owned()),
            (
                "KV mount",
                config.kv_version.map(|v| format!("{} (v{v})", config.kv_mount)).unwrap_or_default(),
            ),
            ("lease policies", config.lease_policies.join(", ")),
            (
                "static token on nodes",
                if config.allow_static_on_nodes { "allowed".into() } else { String::new() },
            ),
            ("timeout", config.timeout.clone()),
            ("sync interval", file.sync_interval.clone()),
            ("write policy", file.write_policy.map(WritePolicy::as_str).unwrap_or_default().to_owned()),
            (
                "conflict policy",
                file.conflict_policy.map(ConflictPolicy::as_str).unwrap_or_default().to_owned(),
            ),
            ("prefetch", if file.prefetch { "every node holds every copy".into() } else { String::new() }),
            ("max staleness", file.max_staleness.clone()),
            ("history depth", file.history_depth.map(|depth| depth.to_string()).unwrap_or_default()),
            ("generation", stored.generation.to_string()),
            ("etag", stored.etag.clone()),
            ("created", stored.create_time.clone().unwrap_or_default()),
            ("changed", stored.update_time.clone().unwrap_or_default()),
        ]);
        let rules = file.path_mapping.0.iter();
        let rules = rules.map(|rule| [rule.pattern.clone(), rule.template.clone(), rule.overrides()]);
        format!("{about}\n{}", table(["pattern", "template", "overrides"], rules))
    })
}

fn tls(file: &BackendFile) -> &'static str {
    match (file.config.tls_verify, file.config.ca_cert.is_empty()) {
        (Some(false), _) => "certificate is NOT checked",
        (_, true) => "public roots",
        (_, false) => "own CA",
    }
}

#[derive(Serialize)]
struct Backends {
    backends: Vec<Stored>,
}

async fn show_list(to: &Connection, output: &mut Output<'_>) -> Result<(), Failure> {
    let backends = list(to).await?.into_iter().map(Stored::of).collect::<Result<_, _>>()?;
    let list = Backends { backends };
    output.show(&list, || {
        let rows = list.backends.iter().map(|stored| {
            [
                stored.file.name.clone(),
                stored.id.clone(),
                stored.file.kind.clone(),
                if stored.file.enabled == Some(false) { "disabled".into() } else { stored.file.mode.clone() },
                stored.file.path_mapping.0.len().to_string(),
                stored.file.config.endpoint.clone(),
            ]
        });
        table(["name", "id", "type", "mode", "rules", "endpoint"], rows)
    })
}

impl Remove {
    async fn run(self, to: &Connection, output: &mut Output<'_>) -> Result<(), Failure> {
        let id = self.named.backend.id(to).await?;
        let copies = if self.purge { CopiesPolicy::Purge } else { CopiesPolicy::Detach };
        let request = DeleteBackendRequest { id: id.clone(), etag: String::new(), copies: copies.into() };
        let pending = to.federation().delete_backend(request).await?.into_inner().pending_nodes;
        output.note(&format!("removed {id}"))?;
        if !pending.is_empty() {
            output.note(&format!("still served, until they acknowledge, by: {}", pending.join(", ")))?;
        }
        Ok(())
    }
}

/// The status with the names of the REST API.
#[derive(Serialize)]
struct Status {
    id: String,
    name: String,
    status: &'static str,
    #[serde(skip_serializing_if = "String::is_empty")]
    reason: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    next_step: String,
    #[serde(flatten)]
    sync: Option<sync::State>,
    connection: Connected,
    consecutive_failures: u32,
    generation: u64,
    nodes: Vec<Node>,
    #[serde(skip_serializing_if = "Option::is_none")]
    login_expire_time: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    call_budget: Option<CallBudget>,
}

#[derive(Serialize)]
struct CallBudget {
    quotas: Vec<Quota>,
    concurrency: u32,
    max_concurrency: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    throttled_until: Option<String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    reason: String,
}

#[derive(Serialize)]
struct Quota {
    quota: String,
    per_second: f64,
    burst: f64,
    remaining: f64,
}

impl From<scaivault_proto::federation::v1::CallBudget> for CallBudget {
    fn from(budget: scaivault_proto::federation::v1::CallBudget) -> Self {
        let quotas = budget.quotas.into_iter().map(|left| Quota {
            quota: left.quota,
            per_second: left.per_second,
            burst: left.burst,
            remaining: left.remaining,
        });
        CallBudget {
            quotas: quotas.collect(),
            concurrency: budget.concurrency,
            max_concurrency: budget.max_concurrency,
            throttled_until: wire::time(budget.throttled_until),
            reason: budget.reason,
        }
    }
}

impl CallBudget {
    fn calls(&self) -> String {
        match self.reason.as_str() {
            "" => format!("{} at once", self.concurrency),
            reason => format!("{} of {}: {reason}", self.concurrency, self.max_concurrency),
        }
    }

    fn quotas(&self) -> String {
        let left = |quota: &Quota| {
            let Quota { quota, per_second, remaining, .. } = quota;
            format!("{quota} {per_second:.0}/s, {remaining:.0} now")
        };
        self.quotas.iter().map(left).collect::<Vec<_>>().join("; ")
    }
}

#[derive(Serialize)]
struct Connected {
    status: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    latency_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    probe_time: Option<String>,
    breaker: String,
}

#[derive(Serialize)]
struct Node {
    name: String,
    connected: bool,
    sent_generation: u64,
    generation: u64,
    #[serde(skip_serializing_if = "String::is_empty")]
    refusal: String,
    has_lease: bool,
    prefetched: bool,
    secrets: u64,
}

impl From<GetBackendStatusResponse> for Status {
    fn from(answer: GetBackendStatusResponse) -> Self {
        let status = match answer.status() {
            BackendHealth::Pending => "pending",
            BackendHealth::Healthy => "healthy",
            BackendHealth::Degraded => "degraded",
            BackendHealth::Unreachable => "unreachable",
            BackendHealth::Disabled => "disabled",
            BackendHealth::Unspecified => "unknown",
        };
        let connection = answer.connection.unwrap_or_default();
        let node = |node: scaivault_proto::federation::v1::NodeState| Node {
            name: node.name,
            connected: node.connected,
            sent_generation: node.sent_generation,
            generation: node.generation,
            refusal: node.refusal,
            has_lease: node.has_lease,
            prefetched: node.prefetched,
            secrets: node.secrets,
        };
        Status {
            id: answer.id,
            name: answer.name,
            status,
            reason: answer.reason,
            next_step: answer.next_step,
            sync: answer.sync.map(sync::State::from),
            connection: Connected {
                status: connection.status,
                latency_ms: connection.latency_ms,
                probe_time: wire::time(connection.probe_time),
                breaker: connection.breaker,
            },
            consecutive_failures: answer.consecutive_failures,
            generation: answer.generation,
            nodes: answer.nodes.into_iter().map(node).collect(),
            login_expire_time: wire::time(answer.login_expire_time),
            call_budget: answer.call_budget.map(CallBudget::from),
        }
    }
}

async fn status(backend: &Reference, to: &Connection, output: &mut Output<'_>) -> Result<(), Failure> {
    let request = GetBackendStatusRequest { id: backend.id(to).await? };
    let status = Status::from(to.federation().get_backend_status(request).await?.into_inner());
    output.show(&status, || status.to_text())
}

impl Status {
    fn to_text(&self) -> String {
        let connection = &self.connection;
        let latency = connection.latency_ms.map(|ms| format!("{ms}ms")).unwrap_or_default();
        let failures = self.consecutive_failures;
        let about = details([
            ("name", self.name.clone()),
            ("id", self.id.clone()),
            ("status", self.status.to_owned()),
            ("reason", self.reason.clone()),
            ("next", self.next_step.clone()),
            ("connection", connection.status.clone()),
            ("latency", latency),
            ("probed", connection.probe_time.clone().unwrap_or_default()),
            ("breaker", connection.breaker.clone()),
            ("failed probes", if failures > 0 { failures.to_string() } else { String::new() }),
            ("calls", self.call_budget.as_ref().map(CallBudget::calls).unwrap_or_default()),
            ("call budget", self.call_budget.as_ref().map(CallBudget::quotas).unwrap_or_default()),
            ("login ends", self.login_expire_time.clone().unwrap_or_default()),
            ("generation", self.generation.to_string()),
        ]);
        let sync = self.sync.as_ref().map(|sync| sync.to_text(&self.name)).unwrap_or_default();
        let rows = self.nodes.iter().map(|node| {
            [
                node.name.clone(),
                yes(node.connected),
                node.sent_generation.to_string(),
                node.generation.to_string(),
                yes(node.has_lease),
                yes(node.prefetched),
                node.secrets.to_string(),
                node.refusal.clone(),
            ]
        });
        let header = ["node", "connected", "sent", "in force", "lease", "all copies", "secrets", "refusal"];
        format!("{about}\n{sync}{}", table(header, rows))
    }
}

fn yes(fact: bool) -> String {
    if fact { "yes" } else { "no" }.to_owned()
}
