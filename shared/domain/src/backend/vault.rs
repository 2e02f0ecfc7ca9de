//! HashiCorp Vault and OpenBao: where one is, and how to log in.

use serde::{Deserialize, Serialize};

use super::{AwsRegion, Endpoint, OwnIdentity, Tls};
use crate::path::SecretPath;

/// The version of a Vault KV mount's API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum KvVersion {
    /// Plain values.
    V1,
    /// Values with versions and metadata.
    V2,
}

/// A KV mount that the configuration names instead of asking Vault for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvMount {
    /// Where it is mounted, without slashes at the ends, e.g. `team/kv`.
    pub path: String,
    /// Which API it speaks.
    pub version: KvVersion,
}

/// Where a Vault (or OpenBao) is and how to talk to it. All that a node is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VaultTarget {
    /// Base URL.
    pub endpoint: Endpoint,
    /// `X-Vault-Namespace`, if namespaces are used.
    pub namespace: Option<String>,
    /// How the connection is secured.
    pub tls: Tls,
    /// The KV mount, if Vault is not to be asked for it.
    pub kv: Option<KvMount>,
}

impl VaultTarget {
    /// The Vault at `endpoint`, with nothing else set.
    pub fn at(endpoint: Endpoint) -> Self {
        VaultTarget { endpoint, namespace: None, tls: Tls::default(), kv: None }
    }
}

/// The login of a Vault backend. Stays in the control plane.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VaultLogin {
    /// Where the method is mounted, e.g. `approle`.
    pub mount: String,
    /// Which method, and what it needs.
    pub method: VaultMethod,
}

/// A login method of Vault. Where the credential of the last three is left out, an identity of our own is shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VaultMethod {
    /// `role_id` and `secret_id`.
    Approle {
        /// The local secret `{role_id, secret_id}`.
        credentials: SecretPath,
    },
    /// A Vault token.
    Token {
        /// The local secret `{token}`.
        credentials: SecretPath,
        /// Policies of the child tokens that nodes get; empty: those of the token itself.
        lease_policies: Vec<String>,
        /// Whether nodes may hold the configured token itself when it never expires.
        allow_static_on_nodes: bool,
    },
    /// A Kubernetes service account's token.
    Kubernetes {
        /// Vault's role.
        role: String,
        /// The local secret `{jwt}`.
        credentials: Option<SecretPath>,
    },
    /// A signed request of AWS STS.
    Aws {
        /// Vault's role.
        role: String,
        /// The local secret `{access_key_id, secret_access_key, session_token?}`.
        credentials: Option<SecretPath>,
        /// `X-Vault-AWS-IAM-Server-ID`, which is signed: the request is good for no other Vault.
        server_id: String,
        /// The region that the request is signed for.
        region: AwsRegion,
        /// Where the request would go, if not to the region's own STS.
        sts_endpoint: Option<Endpoint>,
    },
    /// A token signed by a Google service account, or by Google for a machine.
    Gcp {
        /// Vault's role.
        role: String,
        /// The local secret with the service account's JSON key.
        credentials: Option<SecretPath>,
    },
}

impl VaultMethod {
    /// The names of all methods in the API.
    pub const NAMES: &'static [&'static str] = &["approle", "token", "kubernetes", "aws", "gcp"];

    /// The region that a login of the `aws` method is signed for unless configured.
    ///
    /// Source: "AWS auth method" in Vault's documentation, whose logins are signed for it unless they are told another.
    pub const AWS_REGION: &'static str = "us-east-1";

    /// The name in the API, which is also where Vault mounts it by default.
    pub fn as_str(&self) -> &'static str {
        match self {
            VaultMethod::Approle { .. } => "approle",
            VaultMethod::Token { .. } => "token",
            VaultMethod::Kubernetes { .. } => "kubernetes",
            VaultMethod::Aws { .. } => "aws",
            VaultMethod::Gcp { .. } => "gcp",
        }
    }

    /// The local secret with the credential.
    pub fn credentials(&self) -> Option<&SecretPath> {
        match self {
            VaultMethod::Approle { credentials } | VaultMethod::Token { credentials, .. } => {
                Some(credentials)
            }
            VaultMethod::Kubernetes { credentials, .. }
            | VaultMethod::Aws { credentials, .. }
            | VaultMethod::Gcp { credentials, .. } => credentials.as_ref(),
        }
    }

    /// The identity of ours that is shown where there is no credential.
    pub fn own_identity(&self) -> Option<OwnIdentity> {
        match self {
            VaultMethod::Approle { .. } | VaultMethod::Token { .. } => None,
            VaultMethod::Kubernetes { .. } => Some(OwnIdentity::Kubernetes),
            VaultMethod::Aws { .. } => Some(OwnIdentity::Aws),
            VaultMethod::Gcp { .. } => Some(OwnIdentity::Gcp),
        }
    }

    /// The STS that the configuration names.
    pub fn sts_endpoint(&self) -> Option<&Endpoint> {
        match self {
            VaultMethod::Aws { sts_endpoint, .. } => sts_endpoint.as_ref(),
            _ => None,
        }
    }
}
