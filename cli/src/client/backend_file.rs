//! A backend's configuration in the JSON of the REST API: what `--file` reads and what is printed.

use std::fmt;
use std::time::Duration;

use scaivault_domain::backend::{Endpoint, HASHICORP_VAULT, VaultAuthMethod, check_timeout};
use scaivault_domain::mapping::{Overrides, PathMapping};
use scaivault_domain::path::SecretPath;
use scaivault_domain::sync::{ConflictPolicy, Mode, SyncSettings, WritePolicy};
use scaivault_domain::tenant::BackendName;
use scaivault_domain::time::{format_duration, parse_duration};
use scaivault_domain::{Error, Reason};
use scaivault_edge::wire as edge;
use scaivault_proto::federation::v1::{self as wire, backend::Config};
use serde::de::{MapAccess, SeqAccess, Visitor, value::MapAccessDeserializer, value::SeqAccessDeserializer};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_with::{DeserializeAs as _, Map, Same};

use super::wire::{duration, time, to_duration};
use crate::failure::Failure;
use crate::parse;

/// The shortest period that a server may be configured to take; it refuses what is too short for it.
const SHORTEST: Duration = Duration::from_secs(1);

/// The configuration as its owner writes it. Unknown fields are refused, and so are fields that stand twice.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct BackendFile {
    pub(super) name: String,
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) config: VaultConfig,
    pub(super) path_mapping: Rules,
    pub(super) mode: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(super) sync_interval: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) write_policy: Option<WritePolicy>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) conflict_policy: Option<ConflictPolicy>,
    #[serde(default)]
    pub(super) prefetch: bool,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(super) max_staleness: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) history_depth: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) enabled: Option<bool>,
    /// Accept that existing local secrets are hidden: a wish of the request, not a part of the configuration.
    #[serde(default, skip_serializing)]
    pub(super) adopt: bool,
}

/// `config` of a Vault or OpenBao. Empty texts are settings that are not made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct VaultConfig {
    pub(super) endpoint: String,
    pub(super) auth_method: String,
    pub(super) auth_config_path: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(super) auth_mount: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) tls_verify: Option<bool>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(super) namespace: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(super) ca_cert: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(super) kv_mount: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) kv_version: Option<i32>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) lease_policies: Vec<String>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) allow_static_on_nodes: bool,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(super) timeout: String,
}

/// The path mapping in its order: `{pattern: template}`, or an array of rules. Printed as the former.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Rules(pub(super) Vec<Rule>);

/// One `pattern -> template`, and what it says differently from its backend.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Rule {
    pub(super) pattern: String,
    pub(super) template: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mode: Option<Mode>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    sync_interval: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    write_policy: Option<WritePolicy>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    conflict_policy: Option<ConflictPolicy>,
}

/// `pattern=template,mode=sync,sync-interval=30s`.
pub(super) fn rule(text: &str) -> Result<Rule, String> {
    let mut parts = text.split(',');
    let parse::Pair { key, value } = parse::pair(parts.next().unwrap_or_default())?;
    let mut rule = Rule { pattern: key, template: value, ..Default::default() };
    for part in parts {
        let (name, value) = part.split_once('=').unwrap_or((part, ""));
        match name {
            "mode" => rule.mode = Some(named(name, value, Mode::ALL, Mode::as_str)?),
            "sync-interval" => {
                parse::duration(value).map_err(|fault| format!("the {name} {fault}"))?;
                value.clone_into(&mut rule.sync_interval);
            }
            "write-policy" => {
                rule.write_policy = Some(named(name, value, WritePolicy::ALL, WritePolicy::as_str)?);
            }
            "conflict-policy" => {
                rule.conflict_policy = Some(named(name, value, ConflictPolicy::ALL, ConflictPolicy::as_str)?);
            }
            _ => {
                return Err(format!(
                    "a rule has no setting `{name}`; there are mode, sync-interval, write-policy, conflict-policy"
                ));
            }
        }
    }
    Ok(rule)
}

fn named<T: Copy>(setting: &str, text: &str, all: &[T], name: fn(T) -> &'static str) -> Result<T, String> {
    all.iter().copied().find(|one| name(*one) == text).ok_or_else(|| {
        let names: Vec<_> = all.iter().map(|one| name(*one)).collect();
        format!("the {setting} is {}", names.join(" or "))
    })
}

impl Rule {
    /// What it says differently from its backend, as `--map` reads it.
    pub(super) fn overrides(&self) -> String {
        let interval = Some(&*self.sync_interval).filter(|text| !text.is_empty());
        let settings = [
            ("mode", self.mode.map(Mode::as_str)),
            ("sync-interval", interval),
            ("write-policy", self.write_policy.map(WritePolicy::as_str)),
            ("conflict-policy", self.conflict_policy.map(ConflictPolicy::as_str)),
        ];
        let settings = settings.into_iter().filter_map(|(name, value)| Some(format!("{name}={}", value?)));
        settings.collect::<Vec<_>>().join(",")
    }

    fn to_domain(&self, index: usize) -> Result<Overrides, Error> {
        Ok(Overrides {
            mode: self.mode,
            sync_interval: span(&format!("/path_mapping/{index}/sync_interval"), &self.sync_interval)?,
            write_policy: self.write_policy,
            conflict_policy: self.conflict_policy,
        })
    }

    fn of_wire(index: usize, rule: &wire::PathRule) -> Result<Self, Error> {
        let overrides = edge::parse_overrides(index, rule)?;
        Ok(Rule {
            pattern: rule.pattern.clone(),
            template: rule.template.clone(),
            mode: overrides.mode,
            sync_interval: overrides.sync_interval.map(format_duration).unwrap_or_default(),
            write_policy: overrides.write_policy,
            conflict_policy: overrides.conflict_policy,
        })
    }
}

/// A duration; an empty text is none.
fn span(pointer: &str, text: &str) -> Result<Option<Duration>, Error> {
    let given = Some(text).filter(|text| !text.is_empty());
    let span = given.map(parse_duration).transpose();
    span.map_err(|detail| Error::field(Reason::InvalidConfig, pointer, detail))
}

impl Serialize for Rules {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|rule| (&rule.pattern, &rule.template)))
    }
}

impl<'de> Deserialize<'de> for Rules {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EitherForm;

        impl<'de> Visitor<'de> for EitherForm {
            type Value = Rules;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("{pattern: template, …} or [{\"pattern\": …, \"template\": …}, …]")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Rules, A::Error> {
                let pairs: Vec<(String, String)> =
                    Map::<Same, Same>::deserialize_as(MapAccessDeserializer::new(map))?;
                let rule = |(pattern, template)| Rule { pattern, template, ..Default::default() };
                Ok(Rules(pairs.into_iter().map(rule).collect()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Rules, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(seq)).map(Rules)
            }
        }

        deserializer.deserialize_any(EitherForm)
    }
}

impl BackendFile {
    /// Reads the JSON of the REST API.
    pub(super) fn parse(json: &str) -> Result<Self, Failure> {
        serde_json::from_str(json).map_err(|error| {
            Failure::usage(
                format!("the file is no backend's configuration: {error}"),
                "correct it; `scaivault backend add --help` names the fields",
            )
        })
    }

    /// Checks the configuration as the server does, and gives it as it is sent.
    pub(super) fn to_wire(&self) -> Result<wire::Backend, Failure> {
        let config = &self.config;
        BackendName::parse(&self.name)?;
        if self.kind != HASHICORP_VAULT {
            let detail = format!("this version serves type `{HASHICORP_VAULT}` only");
            return Err(Error::field(Reason::InvalidConfig, "/type", detail).into());
        }
        Endpoint::parse(&config.endpoint)?;
        VaultAuthMethod::parse(&config.auth_method)?;
        SecretPath::check(&config.auth_config_path).map_err(|fault| {
            Error::field(Reason::InvalidConfig, "/config/auth_config_path", fault.detail())
        })?;
        let mode = Mode::parse(&self.mode)?;
        let rules = self.path_mapping.0.iter().enumerate();
        let rules = rules.map(|(index, rule)| Ok((&rule.pattern, &rule.template, rule.to_domain(index)?)));
        let rules = rules.collect::<Result<Vec<_>, Error>>()?;
        let defaults = SyncSettings::default();
        let sync = SyncSettings {
            interval: span("/sync_interval", &self.sync_interval)?,
            write_policy: self.write_policy.unwrap_or(defaults.write_policy),
            conflict_policy: self.conflict_policy.unwrap_or(defaults.conflict_policy),
            prefetch: self.prefetch,
            max_staleness: span("/max_staleness", &self.max_staleness)?,
            history_depth: self.history_depth.unwrap_or(defaults.history_depth),
        };
        sync.check(mode, PathMapping::parse_rules(rules.iter().copied())?.rules(), SHORTEST)?;
        let timeout = span("/config/timeout", &config.timeout)?.map(check_timeout).transpose()?;
        let kv = match (&*config.kv_mount, config.kv_version) {
            ("", None) => None,
            (mount, Some(version @ (1 | 2))) if !mount.is_empty() => {
                Some(wire::KvMount { path: mount.to_owned(), version })
            }
            _ => {
                let detail = "kv_mount and kv_version (1 or 2) are given together";
                return Err(Error::field(Reason::InvalidConfig, "/config/kv_mount", detail).into());
            }
        };
        Ok(wire::Backend {
            name: self.name.clone(),
            config: Some(Config::HashicorpVault(wire::HashicorpVaultConfig {
                endpoint: config.endpoint.clone(),
                auth_method: config.auth_method.clone(),
                auth_config_path: config.auth_config_path.clone(),
                auth_mount: config.auth_mount.clone(),
                tls_verify: config.tls_verify,
                namespace: config.namespace.clone(),
                ca_cert: config.ca_cert.clone(),
                kv,
                lease_policies: config.lease_policies.clone(),
                allow_static_on_nodes: config.allow_static_on_nodes,
            })),
            rules: rules
                .into_iter()
                .map(|(pattern, template, overrides)| {
                    edge::rule(pattern.clone(), template.clone(), &overrides)
                })
                .collect(),
            mode: edge::mode(mode).into(),
            enabled: self.enabled,
            timeout: timeout.map(to_duration).transpose()?,
            sync_interval: sync.interval.map(to_duration).transpose()?,
            write_policy: self.write_policy.map_or(wire::WritePolicy::Unspecified, edge::write_policy).into(),
            conflict_policy: self
                .conflict_policy
                .map_or(wire::ConflictPolicy::Unspecified, edge::conflict_policy)
                .into(),
            prefetch: self.prefetch,
            max_staleness: sync.max_staleness.map(to_duration).transpose()?,
            history_depth: self.history_depth.unwrap_or_default(),
            ..Default::default()
        })
    }

    /// The configuration as the server sent it.
    pub(super) fn of_wire(backend: &wire::Backend) -> Result<Self, Failure> {
        let (kind, config) = match &backend.config {
            Some(Config::HashicorpVault(config)) => (HASHICORP_VAULT, config.clone()),
            None => return Err(Failure::strange_answer("a backend of an unknown type")),
        };
        let unknown = |what: &'static str| move |_| Failure::strange_answer(what);
        let mode = edge::parse_mode("/mode", backend.mode).ok().flatten();
        let mode = mode.ok_or_else(|| Failure::strange_answer("a backend of an unknown mode"))?;
        let rules = backend.rules.iter().enumerate().map(|(index, rule)| Rule::of_wire(index, rule));
        let (kv_mount, kv_version) = config.kv.map(|kv| (kv.path, kv.version)).unzip();
        Ok(BackendFile {
            name: backend.name.clone(),
            kind: kind.to_owned(),
            config: VaultConfig {
                endpoint: config.endpoint,
                auth_method: config.auth_method,
                auth_config_path: config.auth_config_path,
                auth_mount: config.auth_mount,
                tls_verify: config.tls_verify,
                namespace: config.namespace,
                ca_cert: config.ca_cert,
                kv_mount: kv_mount.unwrap_or_default(),
                kv_version,
                lease_policies: config.lease_policies,
                allow_static_on_nodes: config.allow_static_on_nodes,
                timeout: duration(backend.timeout).map(format_duration).unwrap_or_default(),
            },
            path_mapping: Rules(
                rules.collect::<Result<_, _>>().map_err(unknown("a rule of a later version"))?,
            ),
            mode: mode.as_str().to_owned(),
            sync_interval: duration(backend.sync_interval).map(format_duration).unwrap_or_default(),
            write_policy: edge::parse_write_policy("/write_policy", backend.write_policy)
                .map_err(unknown("an unknown write policy"))?,
            conflict_policy: edge::parse_conflict_policy("/conflict_policy", backend.conflict_policy)
                .map_err(unknown("an unknown conflict policy"))?,
            prefetch: backend.prefetch,
            max_staleness: duration(backend.max_staleness).map(format_duration).unwrap_or_default(),
            history_depth: Some(backend.history_depth).filter(|depth| *depth > 0),
            enabled: backend.enabled,
            adopt: false,
        })
    }
}

/// A stored backend as the REST API shows it.
#[derive(Serialize)]
pub(super) struct Stored {
    pub(super) id: String,
    #[serde(flatten)]
    pub(super) file: BackendFile,
    rules: Vec<Rule>,
    pub(super) etag: String,
    pub(super) generation: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) create_time: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) update_time: Option<String>,
}

impl Stored {
    pub(super) fn of(backend: wire::Backend) -> Result<Self, Failure> {
        let file = BackendFile::of_wire(&backend)?;
        Ok(Stored {
            id: backend.id,
            rules: file.path_mapping.0.clone(),
            file,
            etag: backend.etag,
            generation: backend.generation,
            create_time: time(backend.create_time),
            update_time: time(backend.update_time),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REFERENCE: &str = r#"{
      "name": "hashicorp-production",
      "type": "hashicorp-vault",
      "config": {
        "endpoint": "https://vault.internal:8200",
        "auth_method": "approle",
        "auth_config_path": "infra/hashicorp/approle",
        "tls_verify": true,
        "namespace": "acme"
      },
      "path_mapping": {
        "external/hashicorp/shared/*": "secret/data/shared/*",
        "external/hashicorp/apps/**": "secret/data/apps/**"
      },
      "mode": "proxy"
    }"#;

    fn refusal(json: &str) -> String {
        let failure = BackendFile::parse(json).and_then(|file| file.to_wire().map(drop)).expect_err(json);
        let mut told = Vec::new();
        failure.tell(&mut told, false);
        String::from_utf8(told).expect("UTF-8")
    }

    #[test]
    fn the_reference_is_read_in_its_order() {
        let backend = BackendFile::parse(REFERENCE).expect("the reference").to_wire().expect("valid");
        let patterns: Vec<_> = backend.rules.iter().map(|rule| &*rule.pattern).collect();
        assert_eq!(patterns, ["external/hashicorp/shared/*", "external/hashicorp/apps/**"]);
        let Some(Config::HashicorpVault(config)) = backend.config else { panic!("no config") };
        assert_eq!((&*config.namespace, config.tls_verify), ("acme", Some(true)));
    }

    #[test]
    fn what_is_shown_is_what_was_written() {
        let file = BackendFile::parse(REFERENCE).expect("the reference");
        let sent = file.to_wire().expect("valid");
        assert_eq!(BackendFile::of_wire(&sent).expect("readable"), file);
        let shown = serde_json::to_string(&Stored::of(sent).expect("readable")).expect("JSON");
        let mapping = r#""path_mapping":{"external/hashicorp/shared/*":"secret/data/shared/*","external/hashicorp/apps/**""#;
        assert!(shown.contains(mapping), "{shown}");
    }

    #[test]
    fn rules_may_be_an_array() {
        let file: Rules = serde_json::from_str(r#"[{"pattern":"b/**","template":"kv/**"}]"#).expect("rules");
        assert_eq!(file, Rules(vec![rule("b/**=kv/**").expect("a rule")]));
    }

    /// The reference in mode `sync`, with one rule that says otherwise.
    fn synced() -> String {
        REFERENCE
            .replace(
                "\"mode\": \"proxy\"",
                r#""mode": "sync", "sync_interval": "15m", "prefetch": true, "max_staleness": "1m", "history_depth": 3"#,
            )
            .replace(
                r#"{
        "external/hashicorp/shared/*": "secret/data/shared/*","#,
                r#"[{"pattern": "external/hashicorp/shared/*", "template": "secret/data/shared/*", "mode": "proxy",
                     "sync_interval": "30s", "write_policy": "disabled", "conflict_policy": "backend_wins"},"#,
            )
            .replace(
                r#""external/hashicorp/apps/**": "secret/data/apps/**"
      }"#,
                r#"{"pattern": "external/hashicorp/apps/**", "template": "secret/data/apps/**"}]"#,
            )
    }

    #[test]
    fn what_rules_override_is_shown_as_it_was_written() {
        let file = BackendFile::parse(&synced()).expect("a configuration");
        let sent = file.to_wire().expect("valid");
        assert_eq!(sent.rules[0].mode(), wire::Mode::Proxy);
        assert_eq!(sent.rules[0].sync_interval.map(|every| every.seconds), Some(30));
        assert_eq!((sent.sync_interval.map(|every| every.seconds), sent.history_depth), (Some(900), 3));
        assert_eq!(BackendFile::of_wire(&sent).expect("readable"), file);
        let shown: serde_json::Value =
            serde_json::to_value(Stored::of(sent).expect("readable")).expect("JSON");
        assert_eq!((&shown["rules"][0]["mode"], &shown["sync_interval"]), (&"proxy".into(), &"15m".into()));
        assert_eq!(shown["rules"][1].as_object().map(serde_json::Map::len), Some(2));
    }

    #[test]
    fn a_rule_of_the_command_line_may_say_what_it_overrides() {
        let text = "a/**=kv/**,mode=sync,sync-interval=30s,write-policy=disabled,conflict-policy=manual";
        let parsed = rule(text).expect("a rule");
        assert_eq!((&*parsed.pattern, &*parsed.template), ("a/**", "kv/**"));
        assert_eq!(format!("a/**=kv/**,{}", parsed.overrides()), text);
        for (text, fault) in [
            ("a/**", "KEY=VALUE"),
            ("a/**=kv/**,", "no setting ``"),
            ("a/**=kv/**,mode", "proxy or sync"),
            ("a/**=kv/**,mode=both", "proxy or sync"),
            ("a/**=kv/**,sync-interval=30", "duration"),
            ("a/**=kv/**,sync_interval=30s", "sync-interval"),
        ] {
            let told = rule(text).expect_err(text);
            assert!(told.contains(fault), "{fault} is not in {told}");
        }
    }

    #[test]
    fn what_the_server_would_refuse_is_refused_here_by_name() {
        for (from, to, named) in [
            ("\"mode\": \"proxy\"", "\"mode\": \"proxy\", \"modes\": 1", "unknown field `modes`"),
            ("\"mode\": \"proxy\"", "\"mode\": \"proxy\", \"mode\": \"proxy\"", "duplicate field `mode`"),
            ("\"mode\": \"proxy\"", "\"mode\": \"both\"", "mode"),
            ("\"mode\": \"proxy\"", "\"mode\": \"sync\"", "sync_interval: is needed"),
            ("\"mode\": \"proxy\"", "\"mode\": \"sync\", \"sync_interval\": \"15\"", "sync_interval: is no"),
            ("\"mode\": \"proxy\"", "\"mode\": \"proxy\", \"history_depth\": 101", "history_depth"),
            ("\"mode\": \"proxy\"", "\"mode\": \"proxy\", \"write_policy\": \"local_only\"", "write_policy"),
            ("\"mode\": \"proxy\"", "\"mode\": \"proxy\", \"write_policy\": \"some\"", "`write_through`"),
            ("shared/*\": \"secret/data/shared/*", "apps/**\": \"secret/data/apps/**", "stands twice"),
            ("secret/data/apps/**", "secret/data/apps/*", "same wildcards"),
            ("https://vault", "vault", "config.endpoint"),
            ("approle\",", "ldap\",", "config.auth_method"),
            ("infra/hashicorp", "infra//hashicorp", "config.auth_config_path"),
            ("\"acme\"", "\"acme\", \"timeout\": \"soon\"", "config.timeout"),
            ("\"acme\"", "\"acme\", \"kv_version\": 2", "kv_mount"),
            ("hashicorp-vault", "aws-secrets-manager", "type"),
        ] {
            let changed = REFERENCE.replacen(from, to, 1);
            assert_ne!(changed, REFERENCE, "{from}");
            let told = refusal(&changed);
            assert!(told.contains(named) && told.contains("next: "), "{named} is not in {told}");
        }
    }
}
