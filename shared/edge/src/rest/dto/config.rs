//! The `config` of a backend in JSON: one shape for each type of store.

use scaivault_domain::Error;
use scaivault_domain::Reason;
use scaivault_domain::backend::{AwsRole, Endpoint, ProviderKind, VaultMethod};
use scaivault_domain::time::format_duration;
use scaivault_proto::federation::v1 as proto;
use scaivault_proto::federation::v1::backend::Config as Wire;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{duration, given, span, to_wire};
use crate::rest::body::{self, Fault};

/// Where the store is and how to log in; its members depend on `type`.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
pub(in crate::rest) enum Config {
    /// `hashicorp-vault`.
    Vault(VaultConfig),
    /// `aws-secrets-manager`.
    Aws(AwsConfig),
    /// `azure-key-vault`.
    Azure(AzureConfig),
    /// `google-secret-manager`.
    Gcp(GcpConfig),
}

/// HashiCorp Vault or OpenBao.
#[derive(Default, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::rest) struct VaultConfig {
    /// Base URL, e.g. `https://vault.internal:8200`.
    endpoint: String,
    /// `approle`, `token`, `kubernetes`, `aws` or `gcp`.
    #[schema(pattern = "^(approle|token|kubernetes|aws|gcp)$")]
    auth_method: String,
    /// The local secret with the credential: `{role_id, secret_id}`, `{token}`, `{jwt}`, AWS keys, or a service
    /// account's JSON key. The last three may be left out: then ScaiVault shows an identity of its own, if the operator
    /// granted that to the tenant.
    #[serde(skip_serializing_if = "Option::is_none")]
    auth_config_path: Option<String>,
    /// Where the auth method is mounted; its own name if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    auth_mount: Option<String>,
    /// Vault's role (`auth_method` `kubernetes`, `aws`, `gcp`).
    #[serde(skip_serializing_if = "Option::is_none")]
    auth_role: Option<String>,
    /// `X-Vault-AWS-IAM-Server-ID` (`auth_method` `aws`); the endpoint's host if left out, and always that host with
    /// ScaiVault's own identity.
    #[serde(skip_serializing_if = "Option::is_none")]
    aws_server_id: Option<String>,
    /// The region that the login is signed for (`auth_method` `aws`); `us-east-1` if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    aws_region: Option<String>,
    /// Where that region's STS is (`auth_method` `aws`), if not at its own address.
    #[serde(skip_serializing_if = "Option::is_none")]
    sts_endpoint: Option<String>,
    /// Whether the server's certificate is checked; true if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    tls_verify: Option<bool>,
    /// Vault namespace.
    #[serde(skip_serializing_if = "Option::is_none")]
    namespace: Option<String>,
    /// PEM certificates that the server's certificate must chain to.
    #[serde(skip_serializing_if = "Option::is_none")]
    ca_cert: Option<String>,
    /// The KV mount, where `sys/internal/ui/mounts` is forbidden; together with `kv_version`.
    #[serde(skip_serializing_if = "Option::is_none")]
    kv_mount: Option<String>,
    /// 1 or 2; together with `kv_mount`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 2)]
    kv_version: Option<i32>,
    /// Policies of the child tokens that nodes get (`auth_method` `token`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    lease_policies: Vec<String>,
    /// Whether nodes may hold a configured token that never expires (`auth_method` `token`).
    #[serde(default)]
    allow_static_on_nodes: bool,
    /// The deadline of a proxied read, e.g. `5s`.
    #[serde(skip_serializing_if = "Option::is_none")]
    timeout: Option<String>,
}

/// AWS Secrets Manager.
#[derive(Default, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::rest) struct AwsConfig {
    /// The region, e.g. `eu-central-1`.
    region: String,
    /// The local secret with an IAM user's keys: `{access_key_id, secret_access_key, session_token?}`. Without it
    /// ScaiVault's own identity is used, if the operator granted that to the tenant.
    #[serde(skip_serializing_if = "Option::is_none")]
    credentials_path: Option<String>,
    /// The role to assume, with the keys or with ScaiVault's own identity, which needs one.
    #[serde(skip_serializing_if = "Option::is_none")]
    role_arn: Option<String>,
    /// What the role's trust policy asks for. Without `credentials_path` it is made by ScaiVault.
    #[serde(skip_serializing_if = "Option::is_none")]
    external_id: Option<String>,
    /// How long a session lasts, 15 m to 12 h; 1 h if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(pattern = "^([0-9]+(days?|h|m|s|ms|us|ns))+$")]
    session_duration: Option<String>,
    /// Whether nodes may hold the keys themselves where no session can be made of them.
    #[serde(default)]
    allow_static_on_nodes: bool,
    /// Base URL of Secrets Manager, if it is not the region's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    endpoint: Option<String>,
    /// Base URL of STS, if it is not the region's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    sts_endpoint: Option<String>,
    /// PEM certificates that the servers' certificates must chain to.
    #[serde(skip_serializing_if = "Option::is_none")]
    ca_cert: Option<String>,
    /// Whether the servers' certificates are checked; true if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    tls_verify: Option<bool>,
    /// The deadline of a proxied read, e.g. `5s`.
    #[serde(skip_serializing_if = "Option::is_none")]
    timeout: Option<String>,
}

/// Azure Key Vault.
#[derive(Default, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::rest) struct AzureConfig {
    /// The vault's URL, e.g. `https://acme.vault.azure.net`.
    vault_url: String,
    /// `managed_identity`, `client_secret` or `certificate`.
    #[schema(pattern = "^(managed_identity|client_secret|certificate)$")]
    auth_method: String,
    /// The local secret with the credential: `{tenant_id, client_id, client_secret}` or `{tenant_id, client_id,
    /// certificate_pem, private_key_pem}`.
    #[serde(skip_serializing_if = "Option::is_none")]
    credentials_path: Option<String>,
    /// Which user-assigned identity (`auth_method` `managed_identity`); the machine's own if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    client_id: Option<String>,
    /// Base URL of the token service, if it is not that of the vault's cloud.
    #[serde(skip_serializing_if = "Option::is_none")]
    authority: Option<String>,
    /// What the token is for, if not for the vault's cloud, e.g. `https://vault.azure.net`.
    #[serde(skip_serializing_if = "Option::is_none")]
    resource: Option<String>,
    /// PEM certificates that the servers' certificates must chain to.
    #[serde(skip_serializing_if = "Option::is_none")]
    ca_cert: Option<String>,
    /// Whether the servers' certificates are checked; true if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    tls_verify: Option<bool>,
    /// The deadline of a proxied read, e.g. `5s`.
    #[serde(skip_serializing_if = "Option::is_none")]
    timeout: Option<String>,
}

/// GCP Secret Manager.
#[derive(Default, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::rest) struct GcpConfig {
    /// The project's id, e.g. `acme-prod`.
    project_id: String,
    /// `service_account` or `workload_identity`; `service_account` if left out beside a `credentials_path`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(pattern = "^(service_account|workload_identity)$")]
    auth_method: Option<String>,
    /// The local secret with the service account's JSON key.
    #[serde(skip_serializing_if = "Option::is_none")]
    credentials_path: Option<String>,
    /// The location of regional secrets, e.g. `europe-west3`; the global ones if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    location: Option<String>,
    /// Base URL of Secret Manager, if it is not Google's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    endpoint: Option<String>,
    /// PEM certificates that the server's certificate must chain to.
    #[serde(skip_serializing_if = "Option::is_none")]
    ca_cert: Option<String>,
    /// Whether the server's certificate is checked; true if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    tls_verify: Option<bool>,
    /// The deadline of a proxied read, e.g. `5s`.
    #[serde(skip_serializing_if = "Option::is_none")]
    timeout: Option<String>,
}

impl Config {
    /// Parses the `config` of a store of this kind.
    ///
    /// # Errors
    /// What is wrong, and where in `config`.
    pub(in crate::rest) fn parse(kind: ProviderKind, text: &str) -> Result<Config, Fault> {
        let text = text.as_bytes();
        Ok(match kind {
            ProviderKind::HashicorpVault => Config::Vault(body::parse(text)?),
            ProviderKind::AwsSecretsManager => Config::Aws(body::parse(text)?),
            ProviderKind::AzureKeyVault => Config::Azure(body::parse(text)?),
            ProviderKind::GoogleSecretManager => Config::Gcp(body::parse(text)?),
        })
    }

    /// For the wire, with the timeout, which is the backend's there.
    ///
    /// # Errors
    /// `invalid_config`, naming the field.
    pub(super) fn into_wire(self) -> Result<(Wire, Option<prost_types::Duration>), Error> {
        let (config, timeout) = match self {
            Config::Vault(vault) => vault.into_wire()?,
            Config::Aws(aws) => aws.into_wire()?,
            Config::Azure(azure) => azure.into_wire(),
            Config::Gcp(gcp) => gcp.into_wire(),
        };
        Ok((config, span("/config/timeout", timeout)?.map(to_wire)))
    }

    /// Without the defaults that depend on other members. The service fills them in again.
    pub(super) fn without_defaults(self) -> Self {
        fn unless(value: Option<String>, default: &str) -> Option<String> {
            value.filter(|value| value != default)
        }
        match self {
            Config::Vault(vault) => {
                let endpoint = Endpoint::parse("endpoint", &vault.endpoint);
                let host = endpoint.as_ref().map_or("", Endpoint::host);
                Config::Vault(VaultConfig {
                    auth_mount: unless(vault.auth_mount, &vault.auth_method),
                    aws_server_id: unless(vault.aws_server_id, host),
                    aws_region: unless(vault.aws_region, VaultMethod::AWS_REGION),
                    ..vault
                })
            }
            Config::Aws(aws) => {
                let session = format_duration(AwsRole::SESSION);
                Config::Aws(AwsConfig { session_duration: unless(aws.session_duration, &session), ..aws })
            }
            Config::Azure(_) | Config::Gcp(_) => self,
        }
    }

    /// From the wire.
    pub(super) fn from_wire(config: Wire, timeout: Option<&prost_types::Duration>) -> (ProviderKind, Self) {
        let timeout = duration(timeout).map(format_duration);
        match config {
            Wire::HashicorpVault(vault) => {
                (ProviderKind::HashicorpVault, Config::Vault(VaultConfig::from_wire(vault, timeout)))
            }
            Wire::AwsSecretsManager(aws) => {
                (ProviderKind::AwsSecretsManager, Config::Aws(AwsConfig::from_wire(aws, timeout)))
            }
            Wire::AzureKeyVault(azure) => {
                (ProviderKind::AzureKeyVault, Config::Azure(AzureConfig::from_wire(azure, timeout)))
            }
            Wire::GoogleSecretManager(gcp) => {
                (ProviderKind::GoogleSecretManager, Config::Gcp(GcpConfig::from_wire(gcp, timeout)))
            }
        }
    }
}

impl VaultConfig {
    fn into_wire(self) -> Result<(Wire, Option<String>), Error> {
        let invalid = |field: &str, detail: &str| {
            Error::field(Reason::InvalidConfig, format!("/config/{field}"), detail)
        };
        let kv = match (self.kv_mount, self.kv_version) {
            (None, None) => None,
            (Some(path), Some(version)) => Some(proto::KvMount { path, version }),
            (Some(_), None) => return Err(invalid("kv_version", "is required beside kv_mount")),
            (None, Some(_)) => return Err(invalid("kv_mount", "is required beside kv_version")),
        };
        let config = proto::HashicorpVaultConfig {
            endpoint: self.endpoint,
            auth_method: self.auth_method,
            auth_config_path: self.auth_config_path.unwrap_or_default(),
            auth_mount: self.auth_mount.unwrap_or_default(),
            auth_role: self.auth_role.unwrap_or_default(),
            aws_server_id: self.aws_server_id.unwrap_or_default(),
            aws_region: self.aws_region.unwrap_or_default(),
            sts_endpoint: self.sts_endpoint.unwrap_or_default(),
            tls_verify: self.tls_verify,
            namespace: self.namespace.unwrap_or_default(),
            ca_cert: self.ca_cert.unwrap_or_default(),
            kv,
            lease_policies: self.lease_policies,
            allow_static_on_nodes: self.allow_static_on_nodes,
        };
        Ok((Wire::HashicorpVault(config), self.timeout))
    }

    fn from_wire(vault: proto::HashicorpVaultConfig, timeout: Option<String>) -> Self {
        let (kv_mount, kv_version) = vault.kv.map(|kv| (kv.path, kv.version)).unzip();
        VaultConfig {
            endpoint: vault.endpoint,
            auth_method: vault.auth_method,
            auth_config_path: given(vault.auth_config_path),
            auth_mount: given(vault.auth_mount),
            auth_role: given(vault.auth_role),
            aws_server_id: given(vault.aws_server_id),
            aws_region: given(vault.aws_region),
            sts_endpoint: given(vault.sts_endpoint),
            tls_verify: Some(vault.tls_verify.unwrap_or(true)),
            namespace: given(vault.namespace),
            ca_cert: given(vault.ca_cert),
            kv_mount,
            kv_version,
            lease_policies: vault.lease_policies,
            allow_static_on_nodes: vault.allow_static_on_nodes,
            timeout,
        }
    }
}

impl AwsConfig {
    fn into_wire(self) -> Result<(Wire, Option<String>), Error> {
        let config = proto::AwsSecretsManagerConfig {
            region: self.region,
            credentials_path: self.credentials_path.unwrap_or_default(),
            role_arn: self.role_arn.unwrap_or_default(),
            external_id: self.external_id.unwrap_or_default(),
            session_duration: span("/config/session_duration", self.session_duration)?.map(to_wire),
            allow_static_on_nodes: self.allow_static_on_nodes,
            endpoint: self.endpoint.unwrap_or_default(),
            sts_endpoint: self.sts_endpoint.unwrap_or_default(),
            ca_cert: self.ca_cert.unwrap_or_default(),
            tls_verify: self.tls_verify,
        };
        Ok((Wire::AwsSecretsManager(config), self.timeout))
    }

    fn from_wire(aws: proto::AwsSecretsManagerConfig, timeout: Option<String>) -> Self {
        AwsConfig {
            region: aws.region,
            credentials_path: given(aws.credentials_path),
            role_arn: given(aws.role_arn),
            external_id: given(aws.external_id),
            session_duration: duration(aws.session_duration.as_ref()).map(format_duration),
            allow_static_on_nodes: aws.allow_static_on_nodes,
            endpoint: given(aws.endpoint),
            sts_endpoint: given(aws.sts_endpoint),
            ca_cert: given(aws.ca_cert),
            tls_verify: Some(aws.tls_verify.unwrap_or(true)),
            timeout,
        }
    }
}

impl AzureConfig {
    fn into_wire(self) -> (Wire, Option<String>) {
        let config = proto::AzureKeyVaultConfig {
            vault_url: self.vault_url,
            auth_method: self.auth_method,
            credentials_path: self.credentials_path.unwrap_or_default(),
            client_id: self.client_id.unwrap_or_default(),
            authority: self.authority.unwrap_or_default(),
            resource: self.resource.unwrap_or_default(),
            ca_cert: self.ca_cert.unwrap_or_default(),
            tls_verify: self.tls_verify,
        };
        (Wire::AzureKeyVault(config), self.timeout)
    }

    fn from_wire(azure: proto::AzureKeyVaultConfig, timeout: Option<String>) -> Self {
        AzureConfig {
            vault_url: azure.vault_url,
            auth_method: azure.auth_method,
            credentials_path: given(azure.credentials_path),
            client_id: given(azure.client_id),
            authority: given(azure.authority),
            resource: given(azure.resource),
            ca_cert: given(azure.ca_cert),
            tls_verify: Some(azure.tls_verify.unwrap_or(true)),
            timeout,
        }
    }
}

impl GcpConfig {
    fn into_wire(self) -> (Wire, Option<String>) {
        let config = proto::GoogleSecretManagerConfig {
            project_id: self.project_id,
            auth_method: self.auth_method.unwrap_or_default(),
            credentials_path: self.credentials_path.unwrap_or_default(),
            location: self.location.unwrap_or_default(),
            endpoint: self.endpoint.unwrap_or_default(),
            ca_cert: self.ca_cert.unwrap_or_default(),
            tls_verify: self.tls_verify,
        };
        (Wire::GoogleSecretManager(config), self.timeout)
    }

    fn from_wire(gcp: proto::GoogleSecretManagerConfig, timeout: Option<String>) -> Self {
        GcpConfig {
            project_id: gcp.project_id,
            auth_method: given(gcp.auth_method),
            credentials_path: given(gcp.credentials_path),
            location: given(gcp.location),
            endpoint: given(gcp.endpoint),
            ca_cert: given(gcp.ca_cert),
            tls_verify: Some(gcp.tls_verify.unwrap_or(true)),
            timeout,
        }
    }
}
