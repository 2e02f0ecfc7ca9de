//! `backend add | list | show | set | remove | test | status | sync | syncs | sync-report | sync-cancel | events`.

mod rule;
mod settings;
mod test;

use std::fmt;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use scaivault_domain::backend::BackendId;
use scaivault_domain::sync::Mode;
use scaivault_domain::tenant::BackendName;
use scaivault_edge::json::{self, BackendJson};
use scaivault_proto::federation::v1::backend::Config;
use scaivault_proto::federation::v1::{
    Backend, BackendHealth, CopiesPolicy, CreateBackendRequest, DeleteBackendRequest, GetBackendRequest,
    GetBackendStatusRequest, GetBackendStatusResponse, ListBackendsRequest, UpdateBackendRequest,
};
use serde::Serialize;
use serde_json::Value;
use serde_json::value::{RawValue, to_raw_value};

use self::rule::Rule;
use self::settings::{Settings, check_complete, read_file};
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
    /// Test a backend, stored or not: address, credential, login, permissions. Reads no value, stores nothing.
    ///
    /// The exit code is 0 if it passed, 2 if a check failed.
    Test(test::Test),
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
    #[arg(long, value_name = "FILE", conflicts_with_all = ["settings", "Store", "Login"])]
    file: Option<PathBuf>,
    /// Accept that existing local secrets are hidden by the mapping.
    #[arg(long)]
    adopt: bool,
    /// Check and test everything, but store nothing.
    #[arg(long)]
    validate_only: bool,
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
    /// Check and test everything, but store nothing.
    #[arg(long)]
    validate_only: bool,
    #[command(flatten)]
    settings: Settings,
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
            Command::Test(test) => test.run(to, output).await,
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
        let document = match (&self.file, self.name) {
            (Some(path), _) => read_file(path)?,
            (None, name) => {
                let mut document = self.settings.into_patch()?;
                check_complete(&document)?;
                document.insert("name".into(), name.map(String::from).into());
                document.entry("mode").or_insert(Mode::Proxy.as_str().into());
                Value::from(document).to_string()
            }
        };
        let (backend, consent) = json::parse_backend(document.as_bytes())?;
        let request = CreateBackendRequest {
            backend: Some(backend),
            adopt: self.adopt || consent.adopt,
            validate_only: self.validate_only,
        };
        let answer = to.federation().create_backend(request).await?.into_inner();
        if self.validate_only {
            return test::show_validated(answer.backend, answer.test, output);
        }
        show(answer.backend, output)
    }
}

impl Set {
    async fn run(self, to: &Connection, output: &mut Output<'_>) -> Result<(), Failure> {
        let id = self.named.backend.id(to).await?;
        let answer = to.federation().get_backend(GetBackendRequest { id: id.clone() }).await?.into_inner();
        let before = answer.backend.ok_or_else(|| Failure::strange_answer("no backend"))?;
        let mut patch = self.settings.into_patch()?;
        if let Some(name) = self.name {
            patch.insert("name".into(), String::from(name).into());
        }
        let patch = to_raw_value(&patch).expect("a map of JSON is JSON");
        let (wanted, _) = json::patch_backend(before.clone(), &patch)?;
        // What the patch did not name is written out there as well, defaults included.
        let (written_out, _) =
            json::patch_backend(before.clone(), &RawValue::from_string("{}".into()).expect("JSON"))?;
        let paths = changes(&written_out, &wanted);
        if paths.is_empty() && !self.validate_only {
            output.note("nothing to change: the backend is configured like this")?;
            return show(Some(before), output);
        }
        let request = UpdateBackendRequest {
            // The etag of what was read: a change that somebody else made since is not lost.
            backend: Some(Backend { id, etag: before.etag, ..wanted }),
            update_mask: Some(prost_types::FieldMask { paths }),
            adopt: self.adopt,
            force: self.force,
            validate_only: self.validate_only,
        };
        let answer = to.federation().update_backend(request).await?.into_inner();
        if self.validate_only {
            return test::show_validated(answer.backend, answer.test, output);
        }
        show(answer.backend, output)
    }
}

/// The fields of the update mask in which `wanted` is different.
fn changes(before: &Backend, wanted: &Backend) -> Vec<String> {
    let fields = [
        ("name", before.name != wanted.name),
        (config_field(wanted), before.config != wanted.config),
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

/// The field of the message that holds the configuration of the store.
fn config_field(backend: &Backend) -> &'static str {
    match &backend.config {
        Some(Config::HashicorpVault(_)) | None => "hashicorp_vault",
        Some(Config::AwsSecretsManager(_)) => "aws_secrets_manager",
        Some(Config::AzureKeyVault(_)) => "azure_key_vault",
        Some(Config::GoogleSecretManager(_)) => "google_secret_manager",
    }
}

fn rules(backend: &Backend) -> Result<Vec<Rule>, Failure> {
    let rules = backend.rules.iter().enumerate().map(|(index, rule)| Rule::of(index, rule));
    rules.collect::<Result<_, _>>().map_err(|_| Failure::strange_answer("a rule of a later version"))
}

fn shown(backend: Backend) -> Result<BackendJson, Failure> {
    BackendJson::of(backend).map_err(|_| Failure::strange_answer("a backend of a later version"))
}

fn show(backend: Option<Backend>, output: &mut Output<'_>) -> Result<(), Failure> {
    let backend = backend.ok_or_else(|| Failure::strange_answer("no backend"))?;
    let (rules, etag) = (rules(&backend)?, backend.etag.clone());
    let stored = shown(backend)?;
    output.show(&stored, || {
        let about = serde_json::to_value(&stored).unwrap_or_default();
        // Most telling first; what is only in a later version of the API is not forgotten.
        let first = ["name", "id", "type", "mode", "enabled"];
        let mut lines: Vec<(String, String)> =
            first.iter().map(|name| ((*name).to_owned(), cell(name, &about[*name]))).collect();
        let members = |value: &Value| value.as_object().cloned().unwrap_or_default();
        let rest = members(&about).into_iter().filter(|(name, _)| {
            !first.contains(&name.as_str()) && !matches!(name.as_str(), "config" | "path_mapping" | "rules")
        });
        for (name, value) in members(&about["config"]).into_iter().chain(rest) {
            lines.push((name.replace('_', " "), cell(&name, &value)));
        }
        lines.push(("etag".to_owned(), etag));
        let lines = lines.iter().map(|(name, value)| (name.as_str(), value.clone()));
        let table = table(["pattern", "template", "overrides"], rules.iter().map(Rule::cells));
        format!("{}\n{table}", details(lines))
    })
}

/// A setting as people read it.
fn cell(name: &str, value: &Value) -> String {
    match (name, value) {
        ("tls_verify", Value::Bool(false)) => "the certificate is NOT checked".to_owned(),
        ("ca_cert", Value::String(_)) => "given".to_owned(),
        (_, Value::String(text)) => text.clone(),
        (_, Value::Array(values)) => values.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(", "),
        (_, Value::Null) => String::new(),
        (_, value) => value.to_string(),
    }
}

#[derive(Serialize)]
struct Backends {
    backends: Vec<BackendJson>,
}

async fn show_list(to: &Connection, output: &mut Output<'_>) -> Result<(), Failure> {
    let backends = list(to).await?.into_iter().map(shown).collect::<Result<_, _>>()?;
    let list = Backends { backends };
    output.show(&list, || {
        let rows = list.backends.iter().map(|backend| {
            let about = serde_json::to_value(backend).unwrap_or_default();
            let text = |name: &str| cell(name, &about[name]);
            let config = &about["config"];
            let place =
                ["endpoint", "vault_url", "region", "project_id"].map(|name| cell(name, &config[name]));
            [
                text("name"),
                text("id"),
                text("type"),
                if about["enabled"] == false { "disabled".into() } else { text("mode") },
                about["rules"].as_array().map_or(0, Vec::len).to_string(),
                place.into_iter().find(|place| !place.is_empty()).unwrap_or_default(),
            ]
        });
        table(["name", "id", "type", "mode", "rules", "store"], rows)
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
