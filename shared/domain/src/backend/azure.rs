//! Azure Key Vault: where one is, and how to log in.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use super::{Endpoint, Tls};
use crate::path::SecretPath;

/// Where an Azure Key Vault is. All that a node is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AzureTarget {
    /// The vault's own URL, e.g. `https://acme.vault.azure.net`.
    pub vault: Endpoint,
    /// How the connection is secured.
    pub tls: Tls,
}

/// The login of an Azure backend. Stays in the control plane.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AzureLogin {
    /// Which method, and what it needs.
    pub method: AzureMethod,
    /// Where tokens are issued, if not at the address of the vault's cloud.
    pub authority: Option<Endpoint>,
    /// What the token is for, if not the vault's cloud, e.g. `https://vault.azure.net`.
    pub resource: Option<String>,
    /// The cloud's own addresses, by the vault's host.
    pub cloud: AzureCloud,
}

/// A login method of Azure.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AzureMethod {
    /// The managed identity of the control plane's machine.
    ManagedIdentity {
        /// Which of several user-assigned ones.
        client_id: Option<String>,
    },
    /// A secret of an application.
    ClientSecret {
        /// The local secret `{tenant_id, client_id, client_secret}`.
        credentials: SecretPath,
    },
    /// A certificate of an application.
    Certificate {
        /// The local secret `{tenant_id, client_id, certificate_pem, private_key_pem}`.
        credentials: SecretPath,
    },
}

impl AzureMethod {
    /// The names of all methods in the API.
    pub const NAMES: &'static [&'static str] = &["managed_identity", "client_secret", "certificate"];

    /// The name in the API.
    pub fn as_str(&self) -> &'static str {
        match self {
            AzureMethod::ManagedIdentity { .. } => "managed_identity",
            AzureMethod::ClientSecret { .. } => "client_secret",
            AzureMethod::Certificate { .. } => "certificate",
        }
    }

    /// The local secret with the credential.
    pub fn credentials(&self) -> Option<&SecretPath> {
        match self {
            AzureMethod::ManagedIdentity { .. } => None,
            AzureMethod::ClientSecret { credentials } | AzureMethod::Certificate { credentials } => {
                Some(credentials)
            }
        }
    }
}

/// One of Microsoft's clouds.
///
/// Source: "National clouds" in the documentation of Microsoft Entra ID, and the DNS suffixes of Azure Key Vault.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AzureCloud {
    /// Azure.
    #[default]
    Public,
    /// Azure operated by 21Vianet.
    China,
    /// Azure Government.
    UsGovernment,
}

impl AzureCloud {
    /// The cloud that a vault belongs to, by its host. A host of nobody's is taken for the public cloud's.
    pub fn of(vault: &Endpoint) -> Self {
        let host = vault.host();
        if host.ends_with(".vault.azure.cn") {
            AzureCloud::China
        } else if host.ends_with(".vault.usgovcloudapi.net") {
            AzureCloud::UsGovernment
        } else {
            AzureCloud::Public
        }
    }

    /// Whether `host` is a vault of one of the clouds.
    pub fn has_vault(host: &str) -> bool {
        [".vault.azure.net", ".vault.azure.cn", ".vault.usgovcloudapi.net"]
            .iter()
            .any(|suffix| host.strip_suffix(suffix).is_some_and(|name| !name.is_empty()))
    }

    fn authority(self) -> &'static str {
        match self {
            AzureCloud::Public => "https://login.microsoftonline.com",
            AzureCloud::China => "https://login.chinacloudapi.cn",
            AzureCloud::UsGovernment => "https://login.microsoftonline.us",
        }
    }

    fn resource(self) -> &'static str {
        match self {
            AzureCloud::Public => "https://vault.azure.net",
            AzureCloud::China => "https://vault.azure.cn",
            AzureCloud::UsGovernment => "https://vault.usgovcloudapi.net",
        }
    }
}

impl AzureLogin {
    /// Where tokens are issued.
    pub fn authority(&self) -> Cow<'_, Endpoint> {
        match &self.authority {
            Some(authority) => Cow::Borrowed(authority),
            None => Cow::Owned(
                Endpoint::parse("authority", self.cloud.authority())
                    .expect("the clouds have valid addresses"),
            ),
        }
    }

    /// What the token is for.
    pub fn resource(&self) -> &str {
        self.resource.as_deref().unwrap_or_else(|| self.cloud.resource())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vault_is_logged_in_to_in_its_own_cloud() {
        let login = |vault: &str| {
            let cloud = AzureCloud::of(&Endpoint::parse("vault_url", vault).unwrap());
            let method = AzureMethod::ManagedIdentity { client_id: None };
            let login = AzureLogin { method, authority: None, resource: None, cloud };
            (login.authority().to_string(), login.resource().to_owned())
        };
        let (authority, resource) = login("https://acme.vault.azure.net");
        assert_eq!(
            (&*authority, &*resource),
            ("https://login.microsoftonline.com", "https://vault.azure.net")
        );
        assert_eq!(login("https://acme.vault.azure.cn").1, "https://vault.azure.cn");
        assert_eq!(login("https://acme.vault.usgovcloudapi.net").0, "https://login.microsoftonline.us");
        assert!(AzureCloud::has_vault("acme.vault.azure.net"));
        assert!(!AzureCloud::has_vault("acme.vault.azure.net.evil.example"));
        assert!(!AzureCloud::has_vault(".vault.azure.net"));
    }
}
