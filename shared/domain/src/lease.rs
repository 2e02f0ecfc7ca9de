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
}

impl fmt::Debug for Material {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Material::VaultToken(_) => "VaultToken([redacted])",
        })
    }
}
