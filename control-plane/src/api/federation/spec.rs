//! Between messages and the configuration of a backend.

use std::time::Duration;

use prost_types::FieldMask;
use scaivault_domain::backend::{
    BackendSpec, DEFAULT_TIMEOUT, Endpoint, KvMount, KvVersion, Provider, VaultAuthMethod, VaultLogin,
    VaultTarget, check_timeout,
};
use scaivault_domain::mapping::PathMapping;
use scaivault_domain::path::SecretPath;
use scaivault_domain::sync::{ConflictPolicy, DEFAULT_HISTORY, Mode, SyncSettings, WritePolicy};
use scaivault_domain::tenant::BackendName;
use scaivault_domain::{Error, Reason};
use scaivault_edge::wire;
use scaivault_proto::federation::v1::backend::Config;
use scaivault_proto::federation::v1::{self as pb};

use crate::model::BackendRecord;
use crate::store::RowVersion;

/// The configuration that a message describes.
pub(super) fn parse(wanted: pb::Backend) -> Result<BackendSpec, Error> {
    Ok(BackendSpec {
        name: BackendName::parse(&wanted.name)?,
        provider: parse_provider(wanted.config)?,
        mapping: parse_rules(wanted.rules)?,
        mode: parse_mode(wanted.mode)?,
        sync: SyncSettings {
            interval: parse_interval("/sync_interval", wanted.sync_interval)?,
            write_policy: parse_write_policy(wanted.write_policy)?,
            conflict_policy: parse_conflict_policy(wanted.conflict_policy)?,
            prefetch: wanted.prefetch,
            max_staleness: parse_interval("/max_staleness", wanted.max_staleness)?,
            history_depth: parse_depth(wanted.history_depth),
        },
        enabled: wanted.enabled.unwrap_or(true),
        timeout: parse_timeout(wanted.timeout)?,
    })
}

/// The configuration with the masked fields taken from a message.
pub(super) fn edit(
    before: &BackendSpec,
    wanted: pb::Backend,
    mask: Option<&FieldMask>,
) -> Result<BackendSpec, Error> {
    let Some(mask) = mask.filter(|mask| !mask.paths.iter().any(|path| path == "*")) else {
        return parse(wanted);
    };
    let mut spec = before.clone();
    for path in &mask.paths {
        match path.as_str() {
            "name" => spec.name = BackendName::parse(&wanted.name)?,
            "hashicorp_vault" => spec.provider = parse_provider(wanted.config.clone())?,
            "rules" => spec.mapping = parse_rules(wanted.rules.clone())?,
            "mode" => spec.mode = parse_mode(wanted.mode)?,
            "sync_interval" => spec.sync.interval = parse_interval("/sync_interval", wanted.sync_interval)?,
            "write_policy" => spec.sync.write_policy = parse_write_policy(wanted.write_policy)?,
            "conflict_policy" => spec.sync.conflict_policy = parse_conflict_policy(wanted.conflict_policy)?,
            "prefetch" => spec.sync.prefetch = wanted.prefetch,
            "max_staleness" => {
                spec.sync.max_staleness = parse_interval("/max_staleness", wanted.max_staleness)?
            }
            "history_depth" => spec.sync.history_depth = parse_depth(wanted.history_depth),
            "enabled" => spec.enabled = wanted.enabled.unwrap_or(true),
            "timeout" => spec.timeout = parse_timeout(wanted.timeout)?,
            _ => {
                return Err(Error::invalid(
                    "/update_mask",
                    "has fields other than name, hashicorp_vault, rules, mode, enabled, timeout, sync_interval, \
                     write_policy, conflict_policy, prefetch, max_staleness, history_depth",
                ));
            }
        }
    }
    Ok(spec)
}

fn parse_rules(rules: Vec<pb::PathRule>) -> Result<PathMapping, Error> {
    let mut given = Vec::with_capacity(rules.len());
    for (index, rule) in rules.into_iter().enumerate() {
        let overrides = wire::parse_overrides(index, &rule)?;
        given.push((rule.pattern, rule.template, overrides));
    }
    PathMapping::parse_rules(given)
}

fn parse_mode(mode: i32) -> Result<Mode, Error> {
    wire::parse_mode("/mode", mode)?.map_or_else(|| Mode::parse(""), Ok)
}

fn parse_write_policy(policy: i32) -> Result<WritePolicy, Error> {
    let policy = wire::parse_write_policy("/write_policy", policy)?;
    Ok(policy.unwrap_or(SyncSettings::default().write_policy))
}

fn parse_conflict_policy(policy: i32) -> Result<ConflictPolicy, Error> {
    let policy = wire::parse_conflict_policy("/conflict_policy", policy)?;
    Ok(policy.unwrap_or(SyncSettings::default().conflict_policy))
}

fn parse_interval(pointer: &str, interval: Option<prost_types::Duration>) -> Result<Option<Duration>, Error> {
    interval.map(|interval| wire::parse_duration(Reason::InvalidConfig, pointer, &interval)).transpose()
}

fn parse_depth(depth: u32) -> u32 {
    if depth == 0 { DEFAULT_HISTORY } else { depth }
}

fn parse_timeout(timeout: Option<prost_types::Duration>) -> Result<Duration, Error> {
    match timeout {
        None => Ok(DEFAULT_TIMEOUT),
        Some(timeout) => {
            check_timeout(wire::parse_duration(Reason::InvalidConfig, "/config/timeout", &timeout)?)
        }
    }
}

fn parse_provider(config: Option<Config>) -> Result<Provider, Error> {
    let Some(Config::HashicorpVault(config)) = config else {
        return Err(Error::field(Reason::InvalidConfig, "/config", "is required"));
    };
    let invalid = |field: &str, detail: &'static str| {
        Error::field(Reason::InvalidConfig, format!("/config/{field}"), detail)
    };
    let method = VaultAuthMethod::parse(&config.auth_method)?;
    let mount = if config.auth_mount.is_empty() { method.as_str().to_owned() } else { config.auth_mount };
    if !is_mount(&mount) {
        return Err(invalid("auth_mount", "is a path such as `approle` or `team/approle`"));
    }
    let credentials = SecretPath::check(&config.auth_config_path)
        .map_err(|fault| invalid("auth_config_path", fault.detail()))?;
    if !config.namespace.is_empty() && !is_mount(config.namespace.trim_end_matches('/')) {
        return Err(invalid("namespace", "is a path such as `team` or `team/project`"));
    }
    let kv = config.kv.map(|kv| {
        let version = match kv.version {
            1 => KvVersion::V1,
            2 => KvVersion::V2,
            _ => return Err(invalid("kv_version", "is 1 or 2")),
        };
        if !is_mount(&kv.path) {
            return Err(invalid("kv_mount", "is a path such as `secret` or `team/kv`"));
        }
        Ok(KvMount { path: kv.path, version })
    });
    if method != VaultAuthMethod::Token && (!config.lease_policies.is_empty() || config.allow_static_on_nodes)
    {
        let field = if config.lease_policies.is_empty() { "allow_static_on_nodes" } else { "lease_policies" };
        return Err(invalid(field, "belongs to auth_method `token`"));
    }
    let target = VaultTarget {
        endpoint: Endpoint::parse(&config.endpoint)?,
        namespace: (!config.namespace.is_empty()).then_some(config.namespace),
        ca_cert: (!config.ca_cert.is_empty()).then_some(config.ca_cert),
        tls_verify: config.tls_verify.unwrap_or(true),
        kv: kv.transpose()?,
    };
    // Certificates that cannot be used are an error now, not at the first read.
    scaivault_backends::check_vault_trust(&target)
        .map_err(|_| invalid("ca_cert", "has no certificate in PEM that can be used"))?;
    let login = VaultLogin {
        method,
        mount,
        credentials,
        lease_policies: config.lease_policies,
        allow_static_on_nodes: config.allow_static_on_nodes,
    };
    Ok(Provider::HashicorpVault { target, login })
}

/// Whether `text` can stand in a URL and in a header as it is.
fn is_mount(text: &str) -> bool {
    text.len() <= 255
        && text.split('/').all(|segment| {
            !matches!(segment, "" | "." | "..")
                && segment.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
        })
}

/// A configured backend as a message.
pub(super) fn backend(record: &BackendRecord, version: RowVersion) -> pb::Backend {
    let spec = &record.spec;
    let Provider::HashicorpVault { target, login } = &spec.provider;
    let config = pb::HashicorpVaultConfig {
        endpoint: target.endpoint.to_string(),
        auth_method: login.method.as_str().into(),
        auth_config_path: login.credentials.to_string(),
        auth_mount: login.mount.clone(),
        tls_verify: Some(target.tls_verify),
        namespace: target.namespace.clone().unwrap_or_default(),
        ca_cert: target.ca_cert.clone().unwrap_or_default(),
        kv: target.kv.as_ref().map(|kv| pb::KvMount {
            path: kv.path.clone(),
            version: match kv.version {
                KvVersion::V1 => 1,
                KvVersion::V2 => 2,
            },
        }),
        lease_policies: login.lease_policies.clone(),
        allow_static_on_nodes: login.allow_static_on_nodes,
    };
    pb::Backend {
        id: record.id.to_string(),
        name: spec.name.to_string(),
        config: Some(Config::HashicorpVault(config)),
        rules: spec
            .mapping
            .rules()
            .iter()
            .map(|rule| wire::rule(rule.pattern.to_string(), rule.template.to_string(), &rule.overrides))
            .collect(),
        mode: wire::mode(spec.mode).into(),
        sync_interval: spec.sync.interval.map(wire::duration),
        write_policy: wire::write_policy(spec.sync.write_policy).into(),
        conflict_policy: wire::conflict_policy(spec.sync.conflict_policy).into(),
        prefetch: spec.sync.prefetch,
        max_staleness: spec.sync.max_staleness.map(wire::duration),
        history_depth: spec.sync.history_depth,
        enabled: Some(spec.enabled),
        timeout: Some(wire::duration(spec.timeout)),
        etag: version.to_string(),
        generation: record.generation,
        create_time: Some(wire::time(record.created)),
        update_time: Some(wire::time(record.updated)),
    }
}
