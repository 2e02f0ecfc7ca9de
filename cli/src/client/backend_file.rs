//! A backend's configuration in the JSON of the REST API: what `--file` reads and what is printed.

use std::fmt;

use scaivault_domain::backend::{Endpoint, HASHICORP_VAULT, Mode, VaultAuthMethod, check_timeout};
use scaivault_domain::mapping::PathMapping;
use scaivault_domain::path::SecretPath;
use scaivault_domain::tenant::BackendName;
use scaivault_domain::time::{format_duration, parse_duration};
use scaivault_domain::{Error, Reason};
use scaivault_proto::federation::v1::{self as wire, backend::Config};
use serde::de::{MapAccess, SeqAccess, Visitor, value::MapAccessDeserializer, value::SeqAccessDeserializer};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_with::{DeserializeAs as _, Map, Same, SerializeAs as _};

use super::wire::{duration, time, to_duration};
use crate::failure::Failure;

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

/// The path mapping in its order: `{pattern: template}`, or `[{"pattern", "template"}]`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Rules(pub(super) Vec<(String, String)>);

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    pattern: String,
    template: String,
}

impl Serialize for Rules {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Map::<Same, Same>::serialize_as(&self.0, serializer)
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
                Map::<Same, Same>::deserialize_as(MapAccessDeserializer::new(map)).map(Rules)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Rules, A::Error> {
                let rules: Vec<Rule> = Vec::deserialize(SeqAccessDeserializer::new(seq))?;
                Ok(Rules(rules.into_iter().map(|rule| (rule.pattern, rule.template)).collect()))
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
        PathMapping::parse(self.path_mapping.0.iter().map(|(pattern, template)| (pattern, template)))?;
        let Mode::Proxy = Mode::parse(&self.mode)?;
        let timeout = match &*config.timeout {
            "" => None,
            text => {
                let invalid = |detail| Error::field(Reason::InvalidConfig, "/config/timeout", detail);
                Some(to_duration(check_timeout(parse_duration(text).map_err(invalid)?)?)?)
            }
        };
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
            rules: self
                .path_mapping
                .0
                .iter()
                .map(|(pattern, template)| wire::PathRule {
                    pattern: pattern.clone(),
                    template: template.clone(),
                })
                .collect(),
            mode: wire::Mode::Proxy.into(),
            enabled: self.enabled,
            timeout,
            ..Default::default()
        })
    }

    /// The configuration as the server sent it.
    pub(super) fn of_wire(backend: &wire::Backend) -> Result<Self, Failure> {
        let (kind, config) = match &backend.config {
            Some(Config::HashicorpVault(config)) => (HASHICORP_VAULT, config.clone()),
            None => return Err(Failure::strange_answer("a backend of an unknown type")),
        };
        let mode = match backend.mode() {
            wire::Mode::Proxy => Mode::Proxy,
            wire::Mode::Unspecified => return Err(Failure::strange_answer("a backend of an unknown mode")),
        };
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
                backend.rules.iter().map(|rule| (rule.pattern.clone(), rule.template.clone())).collect(),
            ),
            mode: mode.as_str().to_owned(),
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
            rules: backend
                .rules
                .into_iter()
                .map(|rule| Rule { pattern: rule.pattern, template: rule.template })
                .collect(),
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
        assert_eq!(file, Rules(vec![("b/**".into(), "kv/**".into())]));
    }

    #[test]
    fn what_the_server_would_refuse_is_refused_here_by_name() {
        for (from, to, named) in [
            ("\"mode\": \"proxy\"", "\"mode\": \"proxy\", \"modes\": 1", "unknown field `modes`"),
            ("\"mode\": \"proxy\"", "\"mode\": \"proxy\", \"mode\": \"proxy\"", "duplicate field `mode`"),
            ("\"mode\": \"proxy\"", "\"mode\": \"sync\"", "mode"),
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
