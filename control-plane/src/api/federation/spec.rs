//! Between messages and the configuration of a backend.

use std::time::Duration;

use prost_types::FieldMask;
use scaivault_domain::backend::{BackendSpec, DEFAULT_TIMEOUT, Provider, check_timeout};
use scaivault_domain::mapping::{GivenRule, PathMapping, Separator};
use scaivault_domain::sync::{ConflictPolicy, Mode, SyncSettings, WritePolicy};
use scaivault_domain::tenant::BackendName;
use scaivault_domain::{Error, Reason};
use scaivault_edge::wire;
use scaivault_proto::federation::v1::{self as pb};

use super::provider;
use crate::model::BackendRecord;
use crate::store::RowVersion;

/// The configuration that a message describes.
pub(super) fn parse(wanted: pb::Backend) -> Result<BackendSpec, Error> {
    let provider = provider::parse(wanted.config)?;
    Ok(BackendSpec {
        name: BackendName::parse(&wanted.name)?,
        mapping: parse_rules(wanted.rules)?,
        mode: parse_mode(wanted.mode)?,
        sync: SyncSettings {
            interval: parse_interval("/sync_interval", wanted.sync_interval)?,
            write_policy: parse_write_policy(wanted.write_policy)?,
            conflict_policy: parse_conflict_policy(wanted.conflict_policy)?,
            prefetch: wanted.prefetch,
            max_staleness: parse_interval("/max_staleness", wanted.max_staleness)?,
            history_depth: parse_depth(wanted.history_depth, &provider),
        },
        provider,
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
    // First, for other fields' defaults are those of the store.
    if mask.paths.iter().any(|path| is_store(path)) {
        spec.provider = provider::parse(wanted.config)?;
    }
    for path in &mask.paths {
        match path.as_str() {
            "name" => spec.name = BackendName::parse(&wanted.name)?,
            path if is_store(path) => {}
            "rules" => spec.mapping = parse_rules(wanted.rules.clone())?,
            "mode" => spec.mode = parse_mode(wanted.mode)?,
            "sync_interval" => spec.sync.interval = parse_interval("/sync_interval", wanted.sync_interval)?,
            "write_policy" => spec.sync.write_policy = parse_write_policy(wanted.write_policy)?,
            "conflict_policy" => spec.sync.conflict_policy = parse_conflict_policy(wanted.conflict_policy)?,
            "prefetch" => spec.sync.prefetch = wanted.prefetch,
            "max_staleness" => {
                spec.sync.max_staleness = parse_interval("/max_staleness", wanted.max_staleness)?
            }
            "history_depth" => {
                spec.sync.history_depth = parse_depth(wanted.history_depth, &spec.provider);
            }
            "enabled" => spec.enabled = wanted.enabled.unwrap_or(true),
            "timeout" => spec.timeout = parse_timeout(wanted.timeout)?,
            _ => {
                return Err(Error::invalid(
                    "/update_mask",
                    "has fields other than name, the config's name, rules, mode, enabled, timeout, sync_interval, \
                     write_policy, conflict_policy, prefetch, max_staleness, history_depth",
                ));
            }
        }
    }
    Ok(spec)
}

/// Whether a field of the message is a store's configuration.
fn is_store(path: &str) -> bool {
    matches!(path, "hashicorp_vault" | "aws_secrets_manager" | "azure_key_vault" | "google_secret_manager")
}

fn parse_rules(rules: Vec<pb::PathRule>) -> Result<PathMapping, Error> {
    let mut given = Vec::with_capacity(rules.len());
    for (index, rule) in rules.iter().enumerate() {
        let overrides = wire::parse_overrides(index, rule)?;
        let (pattern, template, separator) = (&rule.pattern, &rule.template, &rule.separator);
        given.push(GivenRule { pattern, template, separator, overrides });
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

fn parse_depth(depth: u32, provider: &Provider) -> u32 {
    if depth == 0 { provider.kind().default_history() } else { depth }
}

fn parse_timeout(timeout: Option<prost_types::Duration>) -> Result<Duration, Error> {
    match timeout {
        None => Ok(DEFAULT_TIMEOUT),
        Some(timeout) => {
            check_timeout(wire::parse_duration(Reason::InvalidConfig, "/config/timeout", &timeout)?)
        }
    }
}

/// A configured backend as a message.
pub(super) fn backend(record: &BackendRecord, version: RowVersion) -> pb::Backend {
    pb::Backend {
        id: record.id.to_string(),
        etag: version.to_string(),
        generation: record.generation,
        create_time: Some(wire::time(record.created)),
        update_time: Some(wire::time(record.updated)),
        ..configured(&record.spec)
    }
}

/// What would be stored in the place of `current`, as a message; what only a commit gives is that of `current`.
pub(super) fn tried(spec: &BackendSpec, current: Option<&(BackendRecord, RowVersion)>) -> pb::Backend {
    match current {
        Some((record, version)) => backend(&BackendRecord { spec: spec.clone(), ..record.clone() }, *version),
        None => configured(spec),
    }
}

fn configured(spec: &BackendSpec) -> pb::Backend {
    pb::Backend {
        name: spec.name.to_string(),
        config: Some(provider::message(&spec.provider)),
        rules: spec
            .mapping
            .rules()
            .iter()
            .map(|rule| {
                wire::rule(&GivenRule {
                    pattern: rule.pattern.as_str(),
                    template: rule.template.as_str(),
                    separator: rule.separator.as_ref().map_or("", Separator::as_str),
                    overrides: rule.overrides,
                })
            })
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
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_default_is_that_of_the_new_store_in_whichever_order_the_fields_are_named() {
        let rules =
            vec![pb::PathRule { pattern: "a/**".into(), template: "b/**".into(), ..Default::default() }];
        let vault = pb::HashicorpVaultConfig {
            endpoint: "https://vault".into(),
            auth_method: "approle".into(),
            auth_config_path: "infra/vault".into(),
            ..Default::default()
        };
        let config = Some(pb::backend::Config::HashicorpVault(vault));
        let mode = pb::Mode::Proxy.into();
        let before = pb::Backend { name: "store".into(), config, rules, mode, ..Default::default() };
        let before = parse(before).unwrap();
        assert_eq!(before.sync.history_depth, 10);
        let aws = pb::AwsSecretsManagerConfig {
            region: "eu-central-1".into(),
            credentials_path: "infra/aws".into(),
            ..Default::default()
        };
        let config = Some(pb::backend::Config::AwsSecretsManager(aws));
        let wanted = pb::Backend { config, ..Default::default() };
        for paths in [["history_depth", "aws_secrets_manager"], ["aws_secrets_manager", "history_depth"]] {
            let mask = FieldMask { paths: paths.map(str::to_owned).into() };
            let after = edit(&before, wanted.clone(), Some(&mask)).unwrap();
            assert_eq!(after.sync.history_depth, 1, "{paths:?}");
        }
    }
}
