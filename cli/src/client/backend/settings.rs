//! The options of `backend add` and `backend set`, as the JSON of the REST API.

use std::path::Path;

use clap::builder::PossibleValuesParser;
use clap::{ArgAction, Args};
use scaivault_domain::backend::ProviderKind;
use scaivault_domain::sync::{ConflictPolicy, MAX_HISTORY, Mode, WritePolicy};
use serde_json::{Map, Value, json};

use super::rule::{Rule, rule};
use crate::failure::Failure;
use crate::parse;

fn kinds() -> PossibleValuesParser {
    PossibleValuesParser::new(ProviderKind::ALL.iter().map(|kind| kind.as_str()))
}

/// The settings of a backend. An empty text takes an optional setting back.
#[derive(Debug, Args)]
#[group(id = "settings", multiple = true)]
pub(crate) struct Settings {
    /// Which kind of store.
    #[arg(long = "type", value_name = "TYPE", value_parser = kinds())]
    kind: Option<String>,
    #[command(flatten)]
    store: Store,
    #[command(flatten)]
    login: Login,
    /// Deadline of a read, e.g. 5s.
    #[arg(long, value_name = "DURATION")]
    timeout: Option<String>,
    /// Which paths are which names in the store, e.g. 'external/vault/**=secret/data/**'. Repeatable; the first that
    /// matches wins. A rule may say what joins the segments of a name where stores have no slashes, and override
    /// settings of the backend: 'a/**=app/**,separator=--,mode=sync,sync-interval=30s'; there are separator, mode,
    /// sync-interval, write-policy, conflict-policy.
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
    /// How many versions the first copy of a secret brings along (unless set 10 of a Vault, 1 of others).
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_HISTORY)))]
    history_depth: Option<u32>,
    /// Whether it is used; a backend that is not keeps its paths and refuses reads.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    enabled: Option<bool>,
}

/// Where the store is.
#[derive(Debug, Args)]
#[command(next_help_heading = "Where the store is")]
struct Store {
    /// Base URL, e.g. https://vault.internal:8200. AWS, GCP: only if it is not the provider's own.
    #[arg(long, value_name = "URL")]
    endpoint: Option<String>,
    /// Vault namespace.
    #[arg(long)]
    namespace: Option<String>,
    /// The KV mount of a Vault, where ScaiVault may not ask for it.
    #[arg(long, value_name = "MOUNT")]
    kv_mount: Option<String>,
    /// The version of the KV mount, 1 or 2.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..=2))]
    kv_version: Option<i32>,
    /// AWS region, e.g. eu-central-1.
    #[arg(long)]
    region: Option<String>,
    /// URL of an Azure Key Vault, e.g. https://acme.vault.azure.net.
    #[arg(long, value_name = "URL")]
    vault_url: Option<String>,
    /// GCP project, e.g. acme-prod.
    #[arg(long, value_name = "PROJECT")]
    project_id: Option<String>,
    /// Location of GCP's regional secrets, e.g. europe-west3.
    #[arg(long)]
    location: Option<String>,
    /// PEM certificates that the store's certificate must chain to.
    #[arg(long, value_name = "FILE")]
    ca_cert_file: Option<String>,
    /// Do not check the store's certificate.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    no_tls_verify: Option<bool>,
}

/// How ScaiVault logs in.
#[derive(Debug, Args)]
#[command(next_help_heading = "How ScaiVault logs in")]
struct Login {
    /// Vault: approle, token, kubernetes, aws, gcp. Azure: managed_identity, client_secret, certificate. GCP:
    /// service_account, workload_identity.
    #[arg(long, value_name = "METHOD")]
    auth_method: Option<String>,
    /// Path of the local secret with the credential (Vault).
    #[arg(long, value_name = "PATH")]
    auth_config_path: Option<String>,
    /// Path of the local secret with the credential (AWS, Azure, GCP).
    #[arg(long, value_name = "PATH")]
    credentials_path: Option<String>,
    /// Where Vault's auth method is mounted, if not under its own name.
    #[arg(long, value_name = "MOUNT")]
    auth_mount: Option<String>,
    /// Vault's role (auth methods kubernetes, aws, gcp).
    #[arg(long, value_name = "ROLE")]
    auth_role: Option<String>,
    /// X-Vault-AWS-IAM-Server-ID (auth method aws), if not the endpoint's host.
    #[arg(long, value_name = "ID")]
    aws_server_id: Option<String>,
    /// The region that a Vault login is signed for (auth method aws).
    #[arg(long, value_name = "REGION")]
    aws_region: Option<String>,
    /// AWS role to assume.
    #[arg(long, value_name = "ARN")]
    role_arn: Option<String>,
    /// What the role's trust policy asks for.
    #[arg(long, value_name = "ID")]
    external_id: Option<String>,
    /// How long a session of the role lasts, e.g. 1h.
    #[arg(long, value_name = "DURATION")]
    session_duration: Option<String>,
    /// Base URL of AWS STS, if it is not the region's own.
    #[arg(long, value_name = "URL")]
    sts_endpoint: Option<String>,
    /// Which user-assigned identity of Azure (auth method managed_identity).
    #[arg(long, value_name = "ID")]
    client_id: Option<String>,
    /// Base URL of Azure's token service, if it is not that of the vault's cloud.
    #[arg(long, value_name = "URL")]
    authority: Option<String>,
    /// What an Azure token is for, if not for the vault's cloud.
    #[arg(long, value_name = "URL")]
    resource: Option<String>,
    /// A policy of the tokens that nodes get (Vault's auth method token). Repeatable.
    #[arg(long, value_name = "POLICY", action = ArgAction::Append)]
    lease_policy: Option<Vec<String>>,
    /// Let nodes hold a credential that never ends (Vault's auth method token, AWS keys).
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    allow_static_on_nodes: Option<bool>,
}

impl Settings {
    /// What was named, as a merge patch of the REST API's JSON.
    pub(super) fn into_patch(self) -> Result<Map<String, Value>, Failure> {
        let Settings { store, login, .. } = self;
        let mut config = Map::new();
        put(&mut config, "endpoint", store.endpoint);
        put(&mut config, "namespace", store.namespace);
        if store.kv_mount.as_deref() == Some("") {
            config.insert("kv_version".into(), Value::Null);
        }
        put(&mut config, "kv_mount", store.kv_mount);
        put(&mut config, "kv_version", store.kv_version);
        put(&mut config, "region", store.region);
        put(&mut config, "vault_url", store.vault_url);
        put(&mut config, "project_id", store.project_id);
        put(&mut config, "location", store.location);
        put(&mut config, "ca_cert", store.ca_cert_file.as_deref().map(read_certificates).transpose()?);
        put(&mut config, "tls_verify", store.no_tls_verify.map(|unchecked| !unchecked));
        put(&mut config, "auth_method", login.auth_method);
        put(&mut config, "auth_config_path", login.auth_config_path);
        put(&mut config, "credentials_path", login.credentials_path);
        put(&mut config, "auth_mount", login.auth_mount);
        put(&mut config, "auth_role", login.auth_role);
        put(&mut config, "aws_server_id", login.aws_server_id);
        put(&mut config, "aws_region", login.aws_region);
        put(&mut config, "role_arn", login.role_arn);
        put(&mut config, "external_id", login.external_id);
        put(&mut config, "session_duration", login.session_duration);
        put(&mut config, "sts_endpoint", login.sts_endpoint);
        put(&mut config, "client_id", login.client_id);
        put(&mut config, "authority", login.authority);
        put(&mut config, "resource", login.resource);
        let policies =
            |all: Vec<String>| all.into_iter().filter(|policy| !policy.is_empty()).collect::<Vec<_>>();
        put(&mut config, "lease_policies", login.lease_policy.map(policies));
        put(&mut config, "allow_static_on_nodes", login.allow_static_on_nodes);
        put(&mut config, "timeout", self.timeout);

        let mut patch = Map::new();
        put(&mut patch, "type", self.kind);
        if !config.is_empty() {
            patch.insert("config".into(), config.into());
        }
        if let Some(rules) = self.mapping {
            patch.insert("path_mapping".into(), rules.iter().map(Rule::to_json).collect());
        }
        put(&mut patch, "mode", self.mode.map(Mode::as_str));
        put(&mut patch, "sync_interval", self.sync_interval);
        put(&mut patch, "write_policy", self.write_policy.map(WritePolicy::as_str));
        put(&mut patch, "conflict_policy", self.conflict_policy.map(ConflictPolicy::as_str));
        put(&mut patch, "prefetch", self.prefetch);
        put(&mut patch, "max_staleness", self.max_staleness);
        put(&mut patch, "history_depth", self.history_depth);
        put(&mut patch, "enabled", self.enabled);
        Ok(patch)
    }
}

/// An empty text is a setting that is taken back.
fn put<T: Into<Value>>(members: &mut Map<String, Value>, name: &str, value: Option<T>) {
    let Some(value) = value.map(Into::into) else { return };
    members.insert(name.into(), if value == json!("") { Value::Null } else { value });
}

/// Names every option that a new backend of its kind lacks, not only the first.
pub(super) fn check_complete(document: &Map<String, Value>) -> Result<(), Failure> {
    let text = |members: Option<&Map<String, Value>>, name: &str| {
        members.and_then(|members| members.get(name)?.as_str().map(str::to_owned))
    };
    let config = document.get("config").and_then(Value::as_object);
    let kind = text(Some(document), "type").and_then(|kind| ProviderKind::parse(&kind).ok());
    let mut needed: Vec<&str> = match kind {
        None => Vec::new(),
        Some(ProviderKind::HashicorpVault) => match text(config, "auth_method").as_deref() {
            None | Some("approle" | "token") => vec!["endpoint", "auth_method", "auth_config_path"],
            Some(_) => vec!["endpoint", "auth_method", "auth_role"],
        },
        Some(ProviderKind::AwsSecretsManager) => vec!["region"],
        Some(ProviderKind::AzureKeyVault) => match text(config, "auth_method").as_deref() {
            Some("managed_identity") => vec!["vault_url", "auth_method"],
            _ => vec!["vault_url", "auth_method", "credentials_path"],
        },
        Some(ProviderKind::GoogleSecretManager) => match text(config, "auth_method").as_deref() {
            Some("workload_identity") => vec!["project_id"],
            _ => vec!["project_id", "credentials_path"],
        },
    };
    needed.retain(|name| text(config, name).is_none());
    let mut missing: Vec<String> =
        needed.iter().map(|name| format!("--{}", name.replace('_', "-"))).collect();
    if kind.is_none() {
        missing.push("--type".to_owned());
    }
    if !document.contains_key("path_mapping") {
        missing.push("--map".to_owned());
    }
    if missing.is_empty() {
        return Ok(());
    }
    Err(Failure::usage(
        format!("a backend needs {}", missing.join(", ")),
        "add them, or give the whole configuration with --file; `scaivault backend add --help` explains each",
    ))
}

fn read_certificates(file: &str) -> Result<String, Failure> {
    if file.is_empty() {
        return Ok(String::new());
    }
    read_file(file.as_ref())
}

pub(super) fn read_file(file: &Path) -> Result<String, Failure> {
    std::fs::read_to_string(file).map_err(|error| {
        Failure::usage(format!("{} cannot be read: {error}", file.display()), "name a file that can be read")
    })
}
