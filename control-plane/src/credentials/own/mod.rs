//! Identities that ScaiVault itself has where it runs. Which tenant may use one, and where it may go, is decided by
//! [`Provider::check_own_identity`](scaivault_domain::backend::Provider::check_own_identity).

mod aws;
mod kubernetes;

use std::path::PathBuf;

use scaivault_domain::backend::ListedHosts;

pub(super) use self::aws::AwsIdentity;
pub(super) use self::kubernetes::ServiceAccount;

/// What the operator says of ScaiVault's own identities.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Where they may go besides the providers' own addresses.
    pub hosts: ListedHosts,
    /// Where the token of the Kubernetes service account is, if not where Kubernetes puts it.
    pub kubernetes_token_file: Option<PathBuf>,
}

/// The identities of this process.
#[derive(Debug)]
pub struct OwnIdentities {
    pub(super) hosts: ListedHosts,
    pub(super) kubernetes: ServiceAccount,
    pub(super) aws: AwsIdentity,
}

impl OwnIdentities {
    /// The identities that `settings` describe. Nobody is asked for one before it is used.
    ///
    /// # Errors
    /// Naming the setting that cannot be used.
    pub fn new(settings: Settings) -> anyhow::Result<Self> {
        Ok(OwnIdentities {
            hosts: settings.hosts,
            kubernetes: ServiceAccount::new(settings.kubernetes_token_file),
            aws: AwsIdentity::default(),
        })
    }
}
