//! Leases: short-lived credentials for a backend, obtained by the control plane, held by nodes in memory only.

use std::fmt;

use secrecy::SecretString;

use crate::backend::BackendId;
use crate::tenant::TenantId;

/// Names a lease: one backend of one tenant.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseKey {
    /// Whose backend.
    pub tenant: TenantId,
    /// Which one.
    pub backend: BackendId,
}

/// The credential itself. Nodes see these forms only, never a login.
#[derive(Clone)]
pub enum Material {
    /// A Vault token.
    VaultToken(SecretString),
    /// Keys of AWS, which sign requests.
    AwsKeys {
        /// Names the key.
        access_key_id: String,
        /// Signs with it.
        secret_access_key: SecretString,
        /// Of a session; `None` with an IAM user's own keys.
        session_token: Option<SecretString>,
    },
    /// An OAuth 2 access token of Azure or GCP.
    Bearer(SecretString),
}

impl fmt::Debug for Material {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Material::VaultToken(_) => "VaultToken([redacted])",
            Material::AwsKeys { .. } => "AwsKeys([redacted])",
            Material::Bearer(_) => "Bearer([redacted])",
        })
    }
}
