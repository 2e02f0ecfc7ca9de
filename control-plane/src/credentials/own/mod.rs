//! Identities of our own: what the control plane is where it runs.
//!
//! Which tenant may use one, and where it may go, is decided by
//! [`Provider::check_own_identity`](scaivault_domain::backend::Provider::check_own_identity). Where an identity's service
//! is, the operator says and nobody else.

mod aws;
mod azure;
mod gcp;
mod kubernetes;
mod metadata;

use std::path::PathBuf;

use anyhow::{Context as _, ensure};
use scaivault_domain::backend::{Endpoint, ListedHosts};

use self::aws::AwsIdentity;
pub use self::azure::ManagedIdentities;
pub use self::gcp::GcpIdentity;
use self::kubernetes::ServiceAccount;

/// Where the metadata services of Azure and GCP are, on every machine of theirs.
const METADATA: &str = "http://169.254.169.254";

/// Where our identities come from, by the operator's settings.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where they may go besides the providers' own addresses.
    pub hosts: ListedHosts,
    /// Where the token of the Kubernetes service account is, if not where Kubernetes puts it.
    pub kubernetes_token_file: Option<PathBuf>,
    /// Azure's instance metadata service.
    pub azure_metadata: Endpoint,
    /// GCP's metadata server.
    pub gcp_metadata: Endpoint,
    /// An `external_account` file that is used instead of GCP's metadata server.
    pub gcp_external_account: Option<PathBuf>,
}

impl Default for Settings {
    fn default() -> Self {
        let metadata = || Endpoint::parse("", METADATA).expect("it is an address");
        Settings {
            hosts: ListedHosts::default(),
            kubernetes_token_file: None,
            azure_metadata: metadata(),
            gcp_metadata: metadata(),
            gcp_external_account: None,
        }
    }
}

/// Parses the address of a metadata service: `http://host[:port]`, or as Google's libraries have it `host[:port]`.
///
/// # Errors
/// Naming the setting.
pub fn metadata_address(setting: &str, text: Option<&str>) -> anyhow::Result<Endpoint> {
    // An environment variable that is empty says nothing.
    let text = text.filter(|text| !text.is_empty()).unwrap_or(METADATA);
    let url = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
    let endpoint = Endpoint::parse("", &url)
        .ok()
        .with_context(|| format!("--{setting} is no address such as `{METADATA}`"))?;
    ensure!(!endpoint.is_https(), "--{setting}: metadata services speak plain `http`");
    Ok(endpoint)
}

/// All of them. Nobody is asked before an identity is used.
#[derive(Debug)]
pub struct OwnIdentities {
    pub(super) hosts: ListedHosts,
    pub(crate) kubernetes: ServiceAccount,
    pub(crate) aws: AwsIdentity,
    pub(crate) azure: ManagedIdentities,
    pub(crate) gcp: GcpIdentity,
}

impl OwnIdentities {
    /// The identities of this process.
    ///
    /// # Errors
    /// If no HTTP client can be made.
    pub fn new(settings: Settings) -> anyhow::Result<Self> {
        Ok(OwnIdentities {
            hosts: settings.hosts,
            kubernetes: ServiceAccount::new(settings.kubernetes_token_file),
            aws: AwsIdentity::default(),
            azure: ManagedIdentities::new(&settings.azure_metadata)?,
            gcp: GcpIdentity::new(&settings.gcp_metadata, settings.gcp_external_account)?,
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Serves on loopback for as long as the test runs.
    pub(in crate::credentials) async fn serve(router: axum::Router) -> Endpoint {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, router).await });
        Endpoint::parse("", &url).unwrap()
    }

    #[test]
    fn a_metadata_service_is_named_with_or_without_its_scheme() {
        let address = |text| metadata_address("gcp-metadata", text).map(|found| found.to_string());
        assert_eq!(address(None).unwrap(), METADATA);
        assert_eq!(address(Some("")).unwrap(), METADATA);
        assert_eq!(address(Some("metadata.google.internal")).unwrap(), "http://metadata.google.internal");
        assert_eq!(address(Some("http://127.0.0.1:988/")).unwrap(), "http://127.0.0.1:988");
        for text in ["https://127.0.0.1", "ftp://127.0.0.1", "a b", "h?x"] {
            let error = address(Some(text)).unwrap_err().to_string();
            assert!(error.starts_with("--gcp-metadata"), "{text}: {error}");
        }
    }
}
