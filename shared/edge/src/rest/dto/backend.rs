//! Backends in JSON.

use std::num::NonZeroU32;

use scaivault_domain::backend::ProviderKind;
use scaivault_domain::sync::{ConflictPolicy, Mode, SyncSettings, WritePolicy};
use scaivault_domain::time::format_duration;
use scaivault_domain::{Error, Reason};
use scaivault_proto::federation::v1 as proto;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use utoipa::ToSchema;

use super::config::Config;
use super::mapping::{PathMapping, PathRule};
use super::{duration, named, rfc3339, span, to_wire};
use crate::rest::answer::required;
use crate::rest::body::{self, Fault};
use crate::wire;

/// A configuration as it is sent.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = BackendConfiguration)]
pub(in crate::rest) struct Configuration<'a> {
    /// Unique in the tenant.
    name: String,
    /// Which store: `hashicorp-vault`, `aws-secrets-manager`, `azure-key-vault` or `google-secret-manager`.
    #[schema(pattern = "^(hashicorp-vault|aws-secrets-manager|azure-key-vault|google-secret-manager)$")]
    r#type: String,
    /// Where the store is and how to log in.
    #[serde(borrow)]
    #[schema(value_type = Config)]
    config: &'a RawValue,
    /// Which paths the backend owns.
    path_mapping: PathMapping,
    /// How reads are served where a rule does not say otherwise: `proxy` or `sync`.
    #[schema(pattern = "^(proxy|sync)$")]
    mode: String,
    /// From the start of one cycle to the start of the next, e.g. `15m`; needed if anything is synced.
    #[schema(pattern = "^([0-9]+(days?|h|m|s|ms|us|ns))+$")]
    sync_interval: Option<String>,
    /// What becomes of writes to synced paths: `disabled`, which is also what holds if it is left out. This version
    /// serves no other.
    #[schema(pattern = "^(disabled|write_through|local_only)$")]
    write_policy: Option<String>,
    /// Who is right when the two sides of a synced path disagree: `backend_wins`, which is also what holds if it is
    /// left out. This version serves no other.
    #[schema(pattern = "^(backend_wins|local_wins|manual)$")]
    conflict_policy: Option<String>,
    /// Whether every node holds every copy, instead of those that were read there; false if left out.
    prefetch: Option<bool>,
    /// How old an answer may be, e.g. `1m`: an older copy is compared with the store before it is given.
    #[schema(pattern = "^([0-9]+(days?|h|m|s|ms|us|ns))+$")]
    max_staleness: Option<String>,
    /// How many versions the first copy of a secret brings along; if left out, 10 of a Vault and 1 of others.
    #[schema(value_type = Option<u32>, minimum = 1, maximum = 100)]
    history_depth: Option<NonZeroU32>,
    /// Whether the backend is used at all; true if left out.
    enabled: Option<bool>,
    /// Accept that existing local secrets are hidden by the mapping.
    #[serde(default)]
    adopt: bool,
    /// Of changes only.
    #[serde(default)]
    #[schema(ignore)]
    force: bool,
}

/// Parses a configuration.
///
/// # Errors
/// Names the field by its pointer.
pub(in crate::rest) fn parse(text: &[u8]) -> Result<(proto::Backend, Consent), Error> {
    let sent: Configuration<'_> = body::parse(text).map_err(|fault| in_place(fault, ""))?;
    // The type first: what is a field of `config` depends on it.
    let kind = ProviderKind::parse(&sent.r#type)?;
    let config = Config::parse(kind, sent.config.get()).map_err(|fault| in_place(fault, "/config"))?;
    let (config, timeout) = config.into_wire()?;
    let mode = Mode::parse(&sent.mode)?;
    let defaults = SyncSettings::default();
    let write_policy = named("/write_policy", sent.write_policy, WritePolicy::parse)?;
    let conflict_policy = named("/conflict_policy", sent.conflict_policy, ConflictPolicy::parse)?;
    let backend = proto::Backend {
        name: sent.name,
        config: Some(config),
        rules: sent.path_mapping.into_wire()?,
        mode: wire::mode(mode).into(),
        enabled: sent.enabled,
        timeout,
        sync_interval: span("/sync_interval", sent.sync_interval)?.map(to_wire),
        write_policy: wire::write_policy(write_policy.unwrap_or(defaults.write_policy)).into(),
        conflict_policy: wire::conflict_policy(conflict_policy.unwrap_or(defaults.conflict_policy)).into(),
        prefetch: sent.prefetch.unwrap_or(defaults.prefetch),
        max_staleness: span("/max_staleness", sent.max_staleness)?.map(to_wire),
        history_depth: sent.history_depth.map_or(0, NonZeroU32::get),
        ..Default::default()
    };
    Ok((backend, Consent { adopt: sent.adopt, force: sent.force }))
}

/// What the sender of a configuration accepts.
#[derive(Clone, Copy, Debug)]
pub struct Consent {
    /// Existing local secrets may be hidden by the mapping.
    pub adopt: bool,
    /// Copies that were changed here may be erased.
    pub force: bool,
}

/// A fault below `prefix`, with the reason of the part of a configuration that it lies in.
fn in_place(fault: Fault, prefix: &str) -> Error {
    const MAPPING: &str = "/path_mapping";
    let error = fault.under(prefix, Reason::InvalidRequest);
    let pointer = error.violations.first().map_or("", |violation| violation.pointer.as_str());
    let reason = match pointer {
        "/type" | "/mode" | "/sync_interval" | "/write_policy" | "/conflict_policy" | "/prefetch"
        | "/max_staleness" | "/history_depth" => Reason::InvalidConfig,
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
    /// Which paths the backend owns, in order.
    path_mapping: PathMapping,
    /// The same as an array, with what each rule overrides. It is sent back as `path_mapping`.
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

/// What a merge patch is merged into: the mapping as an array, so that a patch of something else keeps what the rules
/// override, and `config` without the defaults that follow from other members, so that they follow a change of those.
#[derive(Serialize)]
pub(in crate::rest) struct Patchable {
    #[serde(flatten)]
    configured: Configured,
    path_mapping: Vec<PathRule>,
}

/// The part of a backend that its owner writes, but for the mapping.
#[derive(Serialize, ToSchema)]
struct Configured {
    /// Unique in the tenant.
    name: String,
    /// Which store.
    r#type: &'static str,
    /// Where the store is and how to log in.
    config: Config,
    /// How reads are served where a rule does not say otherwise: `proxy` or `sync`.
    mode: &'static str,
    /// From the start of one cycle to the start of the next.
    #[serde(skip_serializing_if = "Option::is_none")]
    sync_interval: Option<String>,
    /// What becomes of writes to synced paths: `disabled`, `write_through` or `local_only`.
    write_policy: &'static str,
    /// Who is right when the two sides disagree: `backend_wins`, `local_wins` or `manual`.
    conflict_policy: &'static str,
    /// Whether every node holds every copy.
    prefetch: bool,
    /// How old an answer may be.
    #[serde(skip_serializing_if = "Option::is_none")]
    max_staleness: Option<String>,
    /// How many versions the first copy of a secret brings along.
    history_depth: u32,
    /// Whether the backend is used at all.
    enabled: bool,
}

impl Configured {
    fn from_wire(backend: proto::Backend) -> Result<Self, Error> {
        let defaults = SyncSettings::default();
        let mode = wire::parse_mode("/mode", backend.mode)?.unwrap_or(Mode::Proxy);
        let write_policy = wire::parse_write_policy("/write_policy", backend.write_policy)?;
        let conflict_policy = wire::parse_conflict_policy("/conflict_policy", backend.conflict_policy)?;
        let (kind, config) = Config::from_wire(required(backend.config)?, backend.timeout.as_ref());
        Ok(Configured {
            name: backend.name,
            r#type: kind.as_str(),
            config,
            mode: mode.as_str(),
            sync_interval: duration(backend.sync_interval.as_ref()).map(format_duration),
            write_policy: write_policy.unwrap_or(defaults.write_policy).as_str(),
            conflict_policy: conflict_policy.unwrap_or(defaults.conflict_policy).as_str(),
            prefetch: backend.prefetch,
            max_staleness: duration(backend.max_staleness.as_ref()).map(format_duration),
            history_depth: match backend.history_depth {
                0 => defaults.history_depth,
                depth => depth,
            },
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
        let rules = PathRule::from_wire(std::mem::take(&mut backend.rules))?;
        let configured = Configured::from_wire(backend)?;
        let path_mapping = PathMapping(rules.clone());
        Ok(Backend { id, configured, path_mapping, rules, generation, created_at, updated_at })
    }
}

impl Patchable {
    /// The backend as the service gave it.
    pub(in crate::rest) fn from_wire(mut backend: proto::Backend) -> Result<Self, Error> {
        let path_mapping = PathRule::from_wire(std::mem::take(&mut backend.rules))?;
        let configured = Configured::from_wire(backend)?;
        let config = configured.config.without_defaults();
        Ok(Patchable { configured: Configured { config, ..configured }, path_mapping })
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
/// `path_mapping` is replaced whole and in either form (RFC 7396). With another `type` nothing of the old `config` stays,
/// nor `history_depth`. Without `path_mapping` the rules keep what they
/// override; an answer's `rules` are sent back as `path_mapping`.
#[derive(ToSchema)]
#[expect(dead_code, reason = "only describes the body")]
pub(in crate::rest) struct BackendPatch {
    name: Option<String>,
    r#type: Option<String>,
    /// Members as in a configuration.
    config: Option<std::collections::BTreeMap<String, serde_json::Value>>,
    path_mapping: Option<PathMapping>,
    #[schema(pattern = "^(proxy|sync)$")]
    mode: Option<String>,
    #[schema(pattern = "^([0-9]+(days?|h|m|s|ms|us|ns))+$")]
    sync_interval: Option<String>,
    #[schema(pattern = "^(disabled|write_through|local_only)$")]
    write_policy: Option<String>,
    #[schema(pattern = "^(backend_wins|local_wins|manual)$")]
    conflict_policy: Option<String>,
    prefetch: Option<bool>,
    #[schema(pattern = "^([0-9]+(days?|h|m|s|ms|us|ns))+$")]
    max_staleness: Option<String>,
    #[schema(minimum = 1, maximum = 100)]
    history_depth: Option<u32>,
    enabled: Option<bool>,
    /// Accept that existing local secrets are hidden by the mapping.
    adopt: Option<bool>,
    /// Accept that copies which were changed here are erased when their paths are proxied again; as `force=true`.
    force: Option<bool>,
}

/// A backend that is gone.
#[derive(Serialize, ToSchema)]
pub(in crate::rest) struct BackendDeleted {
    /// Nodes that have not yet acknowledged the configuration without it.
    pub(in crate::rest) pending_nodes: Vec<String>,
}
