//! Settings of a node: flag, else environment, else file, else default.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use scaivault_backends::egress::{Egress, Policy, Private};
use scaivault_domain::time::parse_duration;
use scaivault_journal::SyncPolicy;
use scaivault_telemetry::{Format, TelemetryConfig, TraceConfig};
use secrecy::SecretString;
use serde::Deserialize;

use crate::cache::key::KeySource;
use crate::known::Patience;

/// What can be set. Every name is a flag, an environment variable and a key of the file alike.
#[derive(Args, Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Options {
    /// A TOML file with any of these settings
    #[arg(long, env = "SCAIVAULT_CONFIG", value_name = "FILE")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// Where the node's identity and its audit journal are [default: /var/lib/scaivault-node]
    #[arg(long, env = "SCAIVAULT_DATA_DIR", value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Address of the API [default: 127.0.0.1:8300]
    #[arg(long, env = "SCAIVAULT_LISTEN", value_name = "ADDR")]
    pub listen: Option<SocketAddr>,
    /// The control plane's listener for nodes, e.g. https://control-plane:8201
    #[arg(long, env = "SCAIVAULT_CONTROL_PLANE", value_name = "URL")]
    pub control_plane: Option<String>,
    /// File with the join token; needed until the node has joined (the token itself can come as SCAIVAULT_JOIN_TOKEN)
    #[arg(long, env = "SCAIVAULT_JOIN_TOKEN_FILE", value_name = "FILE")]
    pub join_token_file: Option<PathBuf>,
    /// PEM certificate chain of the API; read again when it changes
    #[arg(long, env = "SCAIVAULT_TLS_CERT_FILE", value_name = "FILE")]
    pub tls_cert_file: Option<PathBuf>,
    /// PEM key of the API
    #[arg(long, env = "SCAIVAULT_TLS_KEY_FILE", value_name = "FILE")]
    pub tls_key_file: Option<PathBuf>,
    /// Serve the API without TLS beyond loopback, behind something that terminates it
    #[arg(long, env = "SCAIVAULT_PLAINTEXT")]
    pub plaintext: bool,
    /// How long known tokens are trusted without the control plane [default: 1h]
    #[arg(long, env = "SCAIVAULT_MAX_OFFLINE", value_name = "DURATION")]
    pub max_offline: Option<String>,
    /// How long copies of secrets are served without the control plane [default: 24h]
    #[arg(long, env = "SCAIVAULT_MAX_OFFLINE_VALUES", value_name = "DURATION")]
    pub max_offline_values: Option<String>,
    /// Where the key of the cache and the journal comes from: `file` (node.key in the data directory), `env:NAME`,
    /// `command:PROGRAM ARGS`, or `memory` (nothing can be read after a restart) [default: file]
    #[arg(long, env = "SCAIVAULT_CACHE_KEY", value_name = "SOURCE")]
    pub cache_key: Option<String>,
    /// Most bytes of the audit journal that wait for the control plane; then no value leaves [default: 1073741824]
    #[arg(long, env = "SCAIVAULT_AUDIT_MAX_BYTES", value_name = "BYTES")]
    pub audit_max_bytes: Option<u64>,
    /// How old the oldest row of the audit journal may be before its file is closed and shipped [default: 10s]
    #[arg(long, env = "SCAIVAULT_AUDIT_ROTATE", value_name = "DURATION")]
    pub audit_rotate: Option<String>,
    /// Make every audit row safe from a power loss before its value leaves, at the price of an fdatasync per group
    #[arg(long, env = "SCAIVAULT_AUDIT_FSYNC")]
    pub audit_fsync: bool,
    /// Let backends be at this host name, `*.suffix`, address or range, each with or without `:port`, although it is
    /// loopback, link-local, reserved or a metadata service. May be given more than once
    #[arg(long, env = "SCAIVAULT_EGRESS_ALLOW", value_name = "ENTRY", value_delimiter = ',')]
    pub egress_allow: Vec<String>,
    /// Let no backend be at a private address that --egress-allow does not name
    #[arg(long, env = "SCAIVAULT_EGRESS_DENY_PRIVATE")]
    pub egress_deny_private: bool,
    /// What to log, e.g. `info,scaivault_edge=debug`
    #[arg(long, env = "SCAIVAULT_LOG", value_name = "FILTER")]
    pub log: Option<String>,
    /// Log one JSON object a line
    #[arg(long, env = "SCAIVAULT_LOG_JSON")]
    pub log_json: bool,
    /// Export traces to this collector, OTLP over gRPC, e.g. http://localhost:4317 [default: none]
    #[arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT", value_name = "URL")]
    pub otlp_endpoint: Option<String>,
    /// The share of the traces that begin here which is exported, 0 to 1 [default: as OTEL_TRACES_SAMPLER says, or all]
    #[arg(long, env = "SCAIVAULT_TRACE_SAMPLE_RATIO", value_name = "RATIO")]
    pub trace_sample_ratio: Option<f64>,
}

/// Settings, parsed.
#[derive(Debug)]
pub struct Config {
    /// Where the node's identity and its audit journal are.
    pub data_dir: PathBuf,
    /// Address of the API.
    pub listen: SocketAddr,
    /// The control plane's listener for nodes.
    pub control_plane: String,
    /// File with the join token.
    pub join_token_file: Option<PathBuf>,
    /// Certificate chain and key of the API.
    pub tls: Option<(PathBuf, PathBuf)>,
    /// How long what is held is trusted without the control plane.
    pub patience: Patience,
    /// Where the key of the cache and the journal comes from.
    pub cache_key: KeySource,
    /// Most bytes of the journal.
    pub audit_max_bytes: u64,
    /// How old the oldest row of an open journal file may be.
    pub audit_rotate: Duration,
    /// When rows are safe from a power loss.
    pub audit_sync: SyncPolicy,
    /// Where backends may be.
    pub egress: Egress,
}

impl Options {
    /// Reads the file, if there is one, for what neither flags nor environment say.
    ///
    /// # Errors
    /// When the file cannot be read or has unknown settings.
    pub fn with_file(self) -> anyhow::Result<Self> {
        let Some(path) = &self.config else { return Ok(self) };
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let file: Options =
            toml::from_str(&text).with_context(|| format!("{} is not valid", path.display()))?;
        Ok(Options {
            data_dir: self.data_dir.or(file.data_dir),
            listen: self.listen.or(file.listen),
            control_plane: self.control_plane.or(file.control_plane),
            join_token_file: self.join_token_file.or(file.join_token_file),
            tls_cert_file: self.tls_cert_file.or(file.tls_cert_file),
            tls_key_file: self.tls_key_file.or(file.tls_key_file),
            plaintext: self.plaintext || file.plaintext,
            max_offline: self.max_offline.or(file.max_offline),
            max_offline_values: self.max_offline_values.or(file.max_offline_values),
            cache_key: self.cache_key.or(file.cache_key),
            audit_max_bytes: self.audit_max_bytes.or(file.audit_max_bytes),
            audit_rotate: self.audit_rotate.or(file.audit_rotate),
            audit_fsync: self.audit_fsync || file.audit_fsync,
            egress_allow: if self.egress_allow.is_empty() { file.egress_allow } else { self.egress_allow },
            egress_deny_private: self.egress_deny_private || file.egress_deny_private,
            log: self.log.or(file.log),
            log_json: self.log_json || file.log_json,
            otlp_endpoint: self.otlp_endpoint.or(file.otlp_endpoint),
            trace_sample_ratio: self.trace_sample_ratio.or(file.trace_sample_ratio),
            config: self.config,
        })
    }

    /// How the process tells about itself.
    pub fn telemetry(&self) -> (TelemetryConfig, TraceConfig) {
        let format = if self.log_json { Format::Json } else { Format::Pretty };
        let traces = TraceConfig {
            service: "scaivault-data-plane",
            endpoint: self.otlp_endpoint.clone(),
            sample_ratio: self.trace_sample_ratio,
        };
        (TelemetryConfig { format, filter: self.log.clone() }, traces)
    }

    /// Checks the settings.
    ///
    /// # Errors
    /// Naming the setting.
    pub fn parse(self) -> anyhow::Result<Config> {
        let listen = self.listen.unwrap_or(SocketAddr::from(([127, 0, 0, 1], 8300)));
        let tls = match (self.tls_cert_file, self.tls_key_file) {
            (Some(cert), Some(key)) => Some((cert, key)),
            (None, None) => None,
            _ => bail!("--tls-cert-file and --tls-key-file go together"),
        };
        if tls.is_none() && !listen.ip().is_loopback() && !self.plaintext {
            bail!(
                "--listen {listen} without TLS: set --tls-cert-file and --tls-key-file, or --plaintext behind a proxy that terminates TLS"
            );
        }
        let duration = |name: &str, text: &Option<String>, default: Duration| match text {
            None => Ok(default),
            Some(text) => parse_duration(text).map_err(|fault| anyhow::anyhow!("--{name} {fault}")),
        };
        let private = if self.egress_deny_private { Private::Refused } else { Private::Allowed };
        let egress = Policy::of_settings(&self.egress_allow, private).context("--egress-allow")?;
        Ok(Config {
            data_dir: self.data_dir.unwrap_or_else(|| Path::new("/var/lib/scaivault-node").to_owned()),
            listen,
            control_plane: self
                .control_plane
                .context("no control plane: set --control-plane, e.g. https://control-plane:8201")?,
            join_token_file: self.join_token_file,
            tls,
            patience: Patience {
                grants: duration("max-offline", &self.max_offline, Duration::from_secs(3600))?,
                values: duration(
                    "max-offline-values",
                    &self.max_offline_values,
                    Duration::from_secs(24 * 3600),
                )?,
            },
            cache_key: self.cache_key.as_deref().unwrap_or("file").parse()?,
            audit_max_bytes: self.audit_max_bytes.unwrap_or(1 << 30),
            audit_rotate: duration("audit-rotate", &self.audit_rotate, Duration::from_secs(10))?,
            audit_sync: if self.audit_fsync { SyncPolicy::Group } else { SyncPolicy::None },
            egress: Egress::new(egress),
        })
    }
}

impl Config {
    /// The join token, from its file or from `SCAIVAULT_JOIN_TOKEN`.
    ///
    /// # Errors
    /// When there is none, or its file cannot be read.
    pub fn join_token(&self, from_environment: Option<SecretString>) -> anyhow::Result<SecretString> {
        match (&self.join_token_file, from_environment) {
            (Some(path), _) => Ok(std::fs::read_to_string(path)
                .with_context(|| format!("cannot read the join token in {}", path.display()))?
                .into()),
            (None, Some(token)) => Ok(token),
            (None, None) => bail!(
                "the node has not joined yet: set --join-token-file; `scaivault node add` gives a token"
            ),
        }
    }
}
