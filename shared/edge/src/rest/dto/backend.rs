//! Backends in JSON.

use scaivault_domain::backend::{HASHICORP_VAULT, Mode};
use scaivault_domain::time::{format_duration, parse_duration};
use scaivault_domain::{Error, Reason};
use scaivault_proto::federation::v1 as proto;
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use utoipa::ToSchema;

use super::mapping::{PathMapping, PathRule};
use super::{duration, rfc3339, to_wire};
use crate::rest::answer::required;
use crate::rest::body::{self, Fault};

/// A configuration as it is sent.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = BackendConfiguration)]
pub(in crate::rest) struct Configuration<'a> {
    /// Unique in the tenant.
    name: String,
    /// Which store: `hashicorp-vault`.
    #[schema(pattern = "^hashicorp-vault$")]
    r#type: String,
    /// Where the store is and how to log in.
    #[serde(borrow)]
    #[schema(value_type = VaultConfig)]
    config: &'a RawValue,
    /// Which paths the backend owns.
    path_mapping: PathMapping,
    /// How reads are served: `proxy`.
    #[schema(pattern = "^proxy$")]
    mode: String,
    /// Whether the backend is used at all; true if left out.
    enabled: Option<bool>,
    /// Refused: it belongs to mode `sync`.
    #[schema(ignore)]
    sync_interval: Option<IgnoredAny>,
    /// Accept that existing local secrets are hidden by the mapping.
    #[serde(default)]
    adopt: bool,
}

/// HashiCorp Vault or OpenBao.
#[derive(Default, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::rest) struct VaultConfig {
    /// Base URL, e.g. `https://vault.internal:8200`.
    endpoint: String,
    /// `approle` or `token`.
    #[schema(pattern = "^(approle|token)$")]
    auth_method: String,
    /// The local secret with the credential: `{role_id, secret_id}` or `{token}`.
    auth_config_path: String,
    /// Where the auth method is mounted; its own name if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    auth_mount: Option<String>,
    /// Whether the server's certificate is checked; true if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    tls_verify: Option<bool>,
    /// Vault namespace.
    #[serde(skip_serializing_if = "Option::is_none")]
    namespace: Option<String>,
    /// PEM certificates that the server's certificate must chain to.
    #[serde(skip_serializing_if = "Option::is_none")]
    ca_cert: Option<String>,
    /// The KV mount, where `sys/internal/ui/mounts` is forbidden; together with `kv_version`.
    #[serde(skip_serializing_if = "Option::is_none")]
    kv_mount: Option<String>,
    /// 1 or 2; together with `kv_mount`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 2)]
    kv_version: Option<i32>,
    /// Policies of the child tokens that nodes get (`auth_method` `token`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    lease_policies: Vec<String>,
    /// Whether nodes may hold a configured token that never expires (`auth_method` `token`).
    #[serde(default)]
    allow_static_on_nodes: bool,
    /// The deadline of a proxied read, e.g. `5s`.
    #[serde(skip_serializing_if = "Option::is_none")]
    timeout: Option<String>,
}

/// Parses a configuration.
///
/// # Errors
/// Names the field by its pointer.
pub(in crate::rest) fn parse(text: &[u8]) -> Result<(proto::Backend, Adopt), Error> {
    let sent: Configuration<'_> = body::parse(text).map_err(|fault| in_place(fault, ""))?;
    // The type first: what is a field of `config` depends on it.
    if sent.r#type != HASHICORP_VAULT {
        let detail = format!("is no supported type; there is `{HASHICORP_VAULT}`");
        return Err(Error::field(Reason::InvalidConfig, "/type", detail));
    }
    let config: VaultConfig =
        body::parse(sent.config.get().as_bytes()).map_err(|fault| in_place(fault, "/config"))?;
    let mode = match Mode::parse(&sent.mode)? {
        Mode::Proxy => proto::Mode::Proxy,
    };
    if sent.sync_interval.is_some() {
        let detail = "belongs to mode `sync`; in mode `proxy` every read asks the backend";
        return Err(Error::field(Reason::InvalidConfig, "/sync_interval", detail));
    }
    let invalid = |pointer: &str, detail: &str| Error::field(Reason::InvalidConfig, pointer, detail);
    let timeout = config.timeout.as_deref().map(parse_duration).transpose();
    let timeout = timeout.map_err(|detail| invalid("/config/timeout", detail))?;
    let kv = match (config.kv_mount, config.kv_version) {
        (None, None) => None,
        (Some(path), Some(version)) => Some(proto::KvMount { path, version }),
        (Some(_), None) => return Err(invalid("/config/kv_version", "is required beside kv_mount")),
        (None, Some(_)) => return Err(invalid("/config/kv_mount", "is required beside kv_version")),
    };
    let backend = proto::Backend {
        name: sent.name,
        config: Some(proto::backend::Config::HashicorpVault(proto::HashicorpVaultConfig {
            endpoint: config.endpoint,
            auth_method: config.auth_method,
            auth_config_path: config.auth_config_path,
            auth_mount: config.auth_mount.unwrap_or_default(),
            tls_verify: config.tls_verify,
            namespace: config.namespace.unwrap_or_default(),
            ca_cert: config.ca_cert.unwrap_or_default(),
            kv,
            lease_policies: config.lease_policies,
            allow_static_on_nodes: config.allow_static_on_nodes,
        })),
        rules: sent.path_mapping.into_wire(),
        mode: mode.into(),
        enabled: sent.enabled,
        timeout: timeout.map(to_wire),
        ..Default::default()
    };
    Ok((backend, Adopt(sent.adopt)))
}

/// Whether existing local secrets may be hidden by the mapping.
pub(in crate::rest) struct Adopt(pub(in crate::rest) bool);

/// A fault below `prefix`, with the reason of the part of a configuration that it lies in.
fn in_place(fault: Fault, prefix: &str) -> Error {
    const MAPPING: &str = "/path_mapping";
    let error = fault.under(prefix, Reason::InvalidRequest);
    let pointer = error.violations.first().map_or("", |violation| violation.pointer.as_str());
    let reason = match pointer {
        "/type" | "/mode" => Reason::InvalidConfig,
        _ if pointer.starts_with(MAPPING) => Reason::InvalidMapping,
        _ if prefix == "/config" => Reason::InvalidConfig,
        _ => Reason::InvalidRequest,
    };
    Error { reason, ..error }
}

/// A configured backend.
#[derive(Serialize, ToSchema)]
pub(in crate::rest) struct Backend {
    /// Assigned by ScaiVault, e.g. `fed_abcdefghijklmnop`.
    id: String,
    #[serde(flatten)]
    configured: Configured,
    /// The path mapping as an array.
    rules: Vec<PathRule>,
    /// The tenant's configuration generation in which this came to be.
    generation: u64,
    /// When it was created.
    #[schema(required)]
    created_at: Option<String>,
    /// When it was last changed.
    #[schema(required)]
    updated_at: Option<String>,
}

/// The part of a backend that its owner writes.
#[derive(Serialize, ToSchema)]
pub(in crate::rest) struct Configured {
    /// Unique in the tenant.
    name: String,
    /// Which store: `hashicorp-vault`.
    r#type: &'static str,
    /// Where the store is and how to log in.
    config: VaultConfig,
    /// Which paths the backend owns, in order.
    path_mapping: PathMapping,
    /// How reads are served: `proxy`.
    mode: &'static str,
    /// Whether the backend is used at all.
    enabled: bool,
}

impl Configured {
    /// What the owner of `backend` wrote.
    pub(in crate::rest) fn from_wire(backend: proto::Backend) -> Result<Self, Error> {
        let mode = match backend.mode() {
            proto::Mode::Proxy | proto::Mode::Unspecified => "proxy",
        };
        let proto::backend::Config::HashicorpVault(vault) = required(backend.config)?;
        let (kv_mount, kv_version) = vault.kv.map(|kv| (kv.path, kv.version)).unzip();
        let given = |text: String| Some(text).filter(|text| !text.is_empty());
        Ok(Configured {
            name: backend.name,
            r#type: HASHICORP_VAULT,
            config: VaultConfig {
                endpoint: vault.endpoint,
                auth_method: vault.auth_method,
                auth_config_path: vault.auth_config_path,
                auth_mount: given(vault.auth_mount),
                tls_verify: Some(vault.tls_verify.unwrap_or(true)),
                namespace: given(vault.namespace),
                ca_cert: given(vault.ca_cert),
                kv_mount,
                kv_version,
                lease_policies: vault.lease_policies,
                allow_static_on_nodes: vault.allow_static_on_nodes,
                timeout: duration(backend.timeout.as_ref()).map(format_duration),
            },
            path_mapping: PathMapping(PathRule::from_wire(backend.rules)),
            mode,
            enabled: backend.enabled.unwrap_or(true),
        })
    }
}

impl Backend {
    /// The backend as the service gave it.
    pub(in crate::rest) fn from_wire(mut backend: proto::Backend) -> Result<Self, Error> {
        let id = std::mem::take(&mut backend.id);
        let (generation, created_at) = (backend.generation, rfc3339(backend.create_time.as_ref()));
        let updated_at = rfc3339(backend.update_time.as_ref());
        let configured = Configured::from_wire(backend)?;
        let rules = configured.path_mapping.0.clone();
        Ok(Backend { id, configured, rules, generation, created_at, updated_at })
    }
}

/// Backends in the order of their names.
#[derive(Serialize, ToSchema)]
pub(in crate::rest) struct BackendList {
    pub(in crate::rest) backends: Vec<Backend>,
    /// Empty on the last page.
    pub(in crate::rest) next_page_token: String,
}

/// A change: members replace those of the configuration, `null` removes them, `config` is merged member by member,
/// `path_mapping` is replaced whole (RFC 7396).
#[derive(ToSchema)]
#[expect(dead_code, reason = "only describes the body")]
pub(in crate::rest) struct BackendPatch {
    name: Option<String>,
    r#type: Option<String>,
    /// Members as in a configuration.
    config: Option<std::collections::BTreeMap<String, serde_json::Value>>,
    path_mapping: Option<PathMapping>,
    mode: Option<String>,
    enabled: Option<bool>,
    adopt: Option<bool>,
}

/// A backend that is gone.
#[derive(Serialize, ToSchema)]
pub(in crate::rest) struct BackendDeleted {
    /// Nodes that have not yet acknowledged the configuration without it.
    pub(in crate::rest) pending_nodes: Vec<String>,
}
