//! Settings of the control plane: flag, else environment, else file, else default.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use scaivault_backends::egress::{Egress, Policy, Private};
use scaivault_domain::backend::ListedHosts;
use scaivault_domain::sync::MIN_INTERVAL;
use scaivault_domain::time::parse_duration;
use scaivault_seal::RootKey;
use scaivault_telemetry::{Format, TelemetryConfig, TraceConfig};
use secrecy::SecretString;
use serde::Deserialize;

use crate::credentials::own::{self, metadata_address};

/// What can be set. Every name is a flag, an environment variable and a key of the file alike.
#[derive(Args, Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Options {
    /// A TOML file with any of these settings
    #[arg(long, env = "SCAIVAULT_CONFIG", value_name = "FILE")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// Where the store and the audit journal are [default: /var/lib/scaivault]
    #[arg(long, env = "SCAIVAULT_DATA_DIR", value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Address of the public API [default: 127.0.0.1:8200]
    #[arg(long, env = "SCAIVAULT_LISTEN", value_name = "ADDR")]
    pub listen: Option<SocketAddr>,
    /// Address for nodes, mutual TLS [default: 127.0.0.1:8201]
    #[arg(long, env = "SCAIVAULT_NODE_LISTEN", value_name = "ADDR")]
    pub node_listen: Option<SocketAddr>,
    /// File with the root key, mode 0600 (the key itself can come as SCAIVAULT_ROOT_KEY)
    #[arg(long, env = "SCAIVAULT_ROOT_KEY_FILE", value_name = "FILE")]
    pub root_key_file: Option<PathBuf>,
    /// PEM certificate chain of the public API; read again when it changes
    #[arg(long, env = "SCAIVAULT_TLS_CERT_FILE", value_name = "FILE")]
    pub tls_cert_file: Option<PathBuf>,
    /// PEM key of the public API
    #[arg(long, env = "SCAIVAULT_TLS_KEY_FILE", value_name = "FILE")]
    pub tls_key_file: Option<PathBuf>,
    /// Serve the public API without TLS beyond loopback, behind something that terminates it
    #[arg(long, env = "SCAIVAULT_PLAINTEXT")]
    pub plaintext: bool,
    /// Let backends be configured with plain `http` endpoints
    #[arg(long, env = "SCAIVAULT_ALLOW_PLAINTEXT_BACKENDS")]
    pub allow_plaintext_backends: bool,
    /// Let backends be configured with `tls_verify: false`
    #[arg(long, env = "SCAIVAULT_ALLOW_UNVERIFIED_TLS")]
    pub allow_unverified_tls: bool,
    /// How long a backend's breaker is open before it is reported as unreachable [default: 60s]
    #[arg(long, env = "SCAIVAULT_UNREACHABLE_AFTER", value_name = "DURATION")]
    pub unreachable_after: Option<String>,
    /// How old the oldest row of the audit journal may be before its file is closed and kept [default: 10s]
    #[arg(long, env = "SCAIVAULT_AUDIT_ROTATE", value_name = "DURATION")]
    pub audit_rotate: Option<String>,
    /// Let ScaiVault's own identities, where they are granted to a tenant, go to this host too: a name, an address or
    /// `*.suffix`, with or without `:port`; with `kubernetes=` (aws, azure, gcp) before it that identity alone. Without it
    /// they go to the providers' own addresses only. May be given more than once
    #[arg(long, env = "SCAIVAULT_OWN_IDENTITY_HOSTS", value_name = "[IDENTITY=]HOST", value_delimiter = ',')]
    pub own_identity_hosts: Vec<String>,
    /// File with the token of the Kubernetes service account that logs in to Vault [default: where Kubernetes puts it]
    #[arg(long, env = "SCAIVAULT_KUBERNETES_TOKEN_FILE", value_name = "FILE")]
    pub kubernetes_token_file: Option<PathBuf>,
    /// Let backends be at this host name, `*.suffix`, address or range, each with or without `:port`, although it is
    /// loopback, link-local, reserved or a metadata service. May be given more than once
    #[arg(long, env = "SCAIVAULT_EGRESS_ALLOW", value_name = "ENTRY", value_delimiter = ',')]
    pub egress_allow: Vec<String>,
    /// Let no backend be at a private address that --egress-allow does not name
    #[arg(long, env = "SCAIVAULT_EGRESS_DENY_PRIVATE")]
    pub egress_deny_private: bool,
    /// Azure's instance metadata service, where managed identities come from [default: http://169.254.169.254]
    #[arg(long, env = "AZURE_POD_IDENTITY_AUTHORITY_HOST", value_name = "URL")]
    pub azure_metadata: Option<String>,
    /// Google's metadata server, where our own identity in GCP comes from [default: http://169.254.169.254]
    #[arg(long, env = "GCE_METADATA_HOST", value_name = "URL")]
    pub gcp_metadata: Option<String>,
    /// A JSON file of the type `external_account`, for our own identity in GCP where this is no machine of Google's
    #[arg(long, env = "GOOGLE_APPLICATION_CREDENTIALS", value_name = "FILE")]
    pub gcp_external_account: Option<PathBuf>,
    /// What to log, e.g. `info,scaivault_edge=debug`
    #[arg(long, env = "SCAIVAULT_LOG", value_name = "FILTER")]
    pub log: Option<String>,
    /// Log one JSON object a line
    #[arg(long, env = "SCAIVAULT_LOG_JSON")]
    pub log_json: bool,
    /// The shortest `sync_interval` that a backend may have [default: 30s]
    #[arg(long, env = "SCAIVAULT_MIN_SYNC_INTERVAL", value_name = "DURATION")]
    pub min_sync_interval: Option<String>,
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
    /// Where the store and the audit journal are.
    pub data_dir: PathBuf,
    /// Address of the public API.
    pub listen: SocketAddr,
    /// Address for nodes.
    pub node_listen: SocketAddr,
    /// Certificate chain and key of the public API.
    pub tls: Option<(PathBuf, PathBuf)>,
    /// What configurations of backends may say.
    pub limits: crate::service::federation::Limits,
    /// How long a breaker is open before the backend is called unreachable.
    pub unreachable_after: Duration,
    /// How old the oldest row of an open journal file may be.
    pub audit_rotate: Duration,
    /// Where our own identities come from.
    pub own_identities: own::Settings,
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
            node_listen: self.node_listen.or(file.node_listen),
            root_key_file: self.root_key_file.or(file.root_key_file),
            tls_cert_file: self.tls_cert_file.or(file.tls_cert_file),
            tls_key_file: self.tls_key_file.or(file.tls_key_file),
            plaintext: self.plaintext || file.plaintext,
            allow_plaintext_backends: self.allow_plaintext_backends || file.allow_plaintext_backends,
            allow_unverified_tls: self.allow_unverified_tls || file.allow_unverified_tls,
            unreachable_after: self.unreachable_after.or(file.unreachable_after),
            audit_rotate: self.audit_rotate.or(file.audit_rotate),
            own_identity_hosts: if self.own_identity_hosts.is_empty() {
                file.own_identity_hosts
            } else {
                self.own_identity_hosts
            },
            kubernetes_token_file: self.kubernetes_token_file.or(file.kubernetes_token_file),
            egress_allow: if self.egress_allow.is_empty() { file.egress_allow } else { self.egress_allow },
            egress_deny_private: self.egress_deny_private || file.egress_deny_private,
            azure_metadata: self.azure_metadata.or(file.azure_metadata),
            gcp_metadata: self.gcp_metadata.or(file.gcp_metadata),
            gcp_external_account: self.gcp_external_account.or(file.gcp_external_account),
            log: self.log.or(file.log),
            log_json: self.log_json || file.log_json,
            min_sync_interval: self.min_sync_interval.or(file.min_sync_interval),
            otlp_endpoint: self.otlp_endpoint.or(file.otlp_endpoint),
            trace_sample_ratio: self.trace_sample_ratio.or(file.trace_sample_ratio),
            config: self.config,
        })
    }

    /// The directory of the store.
    pub fn data_dir(&self) -> &Path {
        self.data_dir.as_deref().unwrap_or(Path::new("/var/lib/scaivault"))
    }

    /// The root key, from its file or from `SCAIVAULT_ROOT_KEY`.
    ///
    /// # Errors
    /// When there is none, or it is not a key.
    pub fn root_key(&self, from_environment: Option<SecretString>) -> anyhow::Result<RootKey> {
        match (&self.root_key_file, from_environment) {
            (Some(path), _) => Ok(RootKey::from_file(path)?),
            (None, Some(text)) => {
                tracing::warn!(
                    "the root key comes from the environment, which other processes may read; prefer a file"
                );
                Ok(RootKey::from_base64(&text)?)
            }
            (None, None) => {
                bail!("no root key: set --root-key-file; `scaivault operator init` makes the file")
            }
        }
    }

    /// How the process tells about itself.
    pub fn telemetry(&self) -> (TelemetryConfig, TraceConfig) {
        let format = if self.log_json { Format::Json } else { Format::Pretty };
        let traces = TraceConfig {
            service: "scaivault-control-plane",
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
        let listen = self.listen.unwrap_or(SocketAddr::from(([127, 0, 0, 1], 8200)));
        let tls = match (self.tls_cert_file.clone(), self.tls_key_file.clone()) {
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
            data_dir: self.data_dir().to_owned(),
            listen,
            node_listen: self.node_listen.unwrap_or(SocketAddr::from(([127, 0, 0, 1], 8201))),
            tls,
            limits: crate::service::federation::Limits {
                plaintext: self.allow_plaintext_backends,
                unverified_tls: self.allow_unverified_tls,
                sync_interval: duration("min-sync-interval", &self.min_sync_interval, MIN_INTERVAL)?,
                egress: Egress::new(egress),
            },
            unreachable_after: duration(
                "unreachable-after",
                &self.unreachable_after,
                Duration::from_secs(60),
            )?,
            audit_rotate: duration("audit-rotate", &self.audit_rotate, Duration::from_secs(10))?,
            own_identities: own::Settings {
                hosts: ListedHosts::parse(&self.own_identity_hosts).context("--own-identity-hosts")?,
                kubernetes_token_file: self.kubernetes_token_file.clone(),
                azure_metadata: metadata_address("azure-metadata", self.azure_metadata.as_deref())?,
                gcp_metadata: metadata_address("gcp-metadata", self.gcp_metadata.as_deref())?,
                gcp_external_account: self.gcp_external_account.filter(|path| !path.as_os_str().is_empty()),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plaintext_beyond_loopback_has_to_be_asked_for() {
        let open = Options { listen: Some(SocketAddr::from(([0, 0, 0, 0], 8200))), ..Options::default() };
        assert!(open.clone().parse().is_err());
        assert!(Options { plaintext: true, ..open }.parse().is_ok());
        assert!(Options::default().parse().is_ok());
    }

    #[test]
    fn a_host_for_identities_that_is_none_is_named() {
        let with =
            |host: &str| Options { own_identity_hosts: vec![host.into()], ..Options::default() }.parse();
        assert!(format!("{:#}", with("https://vault").unwrap_err()).contains("--own-identity-hosts"));
        assert!(with("*.vault.internal").is_ok() && with("kubernetes=vault.internal:8200").is_ok());
    }

    #[test]
    fn an_egress_entry_that_means_nothing_is_named() {
        let with = |entry: &str| Options { egress_allow: vec![entry.into()], ..Options::default() }.parse();
        assert!(format!("{:#}", with("127.1").unwrap_err()).starts_with("--egress-allow: `127.1`"));
        assert!(with("127.0.0.1:8200").is_ok());
    }

    #[test]
    fn a_flag_wins_over_the_file_and_unknown_settings_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("control-plane.toml");
        std::fs::write(&file, "data-dir = \"/file\"\naudit-rotate = \"1s\"\negress-allow = [\"a\", \"b\"]\n")
            .unwrap();
        let options =
            Options { config: Some(file.clone()), data_dir: Some("/flag".into()), ..Options::default() };
        let options = options.with_file().unwrap();
        assert_eq!(options.egress_allow, ["a", "b"]);
        let config = options.parse().unwrap();
        assert_eq!((config.data_dir, config.audit_rotate), ("/flag".into(), Duration::from_secs(1)));
        std::fs::write(&file, "datadir = \"/file\"\n").unwrap();
        assert!(Options { config: Some(file), ..Options::default() }.with_file().is_err());
    }
}
