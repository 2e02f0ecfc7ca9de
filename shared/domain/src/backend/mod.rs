//! Backends: one configured federation to one remote store.
//!
//! [`Provider`] is what the owner of a backend wrote: a target and a login. A node is told the [`Target`] alone.

mod aws;
mod azure;
mod gcp;
mod naming;
mod own;
mod vault;

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use url::Url;

use crate::access::{Caller, Capability};
use crate::error::{Error, Reason};
use crate::mapping::PathMapping;
use crate::path::SecretPath;
use crate::sync::{DEFAULT_HISTORY, Mode, SyncSettings};
use crate::tenant::BackendName;

pub use self::aws::{AwsLogin, AwsRegion, AwsRole, AwsTarget, RoleArn};
pub use self::azure::{AzureCloud, AzureLogin, AzureMethod, AzureTarget};
pub use self::gcp::{GcpLogin, GcpTarget, ProjectId};
pub use self::naming::Naming;
pub use self::own::{ListedHosts, NoHost};
pub use self::vault::{KvMount, KvVersion, VaultLogin, VaultMethod, VaultTarget};

/// How long a proxied read may take unless configured.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(5);

/// The id of a backend: `fed_` and 16 characters of `a-z 2-7`, unique in the installation.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct BackendId(std::sync::Arc<str>);

impl BackendId {
    /// Parses an id.
    ///
    /// # Errors
    /// `not_found`: what is no id names no backend.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let body = text.strip_prefix("fed_").unwrap_or("");
        if body.len() == 16 && body.bytes().all(|b| b.is_ascii_lowercase() || (b'2'..=b'7').contains(&b)) {
            return Ok(BackendId(text.into()));
        }
        Err(Error::new(Reason::NotFound, "no backend has this id").next("list the backends to see their ids"))
    }

    /// Makes an id of 10 random bytes.
    pub fn from_random(random: [u8; 10]) -> Self {
        const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
        let mut id = String::from("fed_");
        let bits = random.iter().fold(0u128, |bits, byte| bits << 8 | u128::from(*byte));
        for shift in (0..16).rev() {
            id.push(char::from(ALPHABET[(bits >> (shift * 5) & 31) as usize]));
        }
        BackendId(id.into())
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for BackendId {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        Self::parse(&text)
    }
}

impl From<BackendId> for String {
    fn from(id: BackendId) -> String {
        id.0.as_ref().into()
    }
}

impl fmt::Display for BackendId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for BackendId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An `https` (in dev mode also `http`) base URL without credentials, query or fragment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Endpoint(Url);

impl Endpoint {
    /// Parses a base URL.
    ///
    /// # Errors
    /// `invalid_config`, naming `config.<field>`.
    pub fn parse(field: &str, text: &str) -> Result<Self, Error> {
        let invalid = |detail| invalid(field, detail);
        let mut url =
            Url::parse(text).map_err(|_| invalid("is no URL such as https://vault.internal:8200"))?;
        if !matches!(url.scheme(), "https" | "http") {
            return Err(invalid("begins with https://"));
        }
        if !url.has_host() {
            return Err(invalid("has no host"));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(invalid("carries no user name or password; credentials are stored as a secret"));
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err(invalid("has no query and no fragment"));
        }
        let path = url.path().trim_end_matches('/').to_owned();
        url.set_path(&path);
        Ok(Endpoint(url))
    }

    /// The URL; its path has no trailing slash unless it is the root.
    pub fn url(&self) -> &Url {
        &self.0
    }

    /// The host, without a port.
    pub fn host(&self) -> &str {
        self.0.host_str().expect("an endpoint has a host")
    }

    /// Whether it is a part of a host only.
    pub fn has_path(&self) -> bool {
        self.0.path() != "/"
    }

    /// Whether the connection is encrypted.
    pub fn is_https(&self) -> bool {
        self.0.scheme() == "https"
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.as_str().trim_end_matches('/'))
    }
}

/// How the connection to a store is secured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tls {
    /// PEM certificates that the server's certificate must chain to, instead of the public roots.
    pub ca_cert: Option<String>,
    /// Whether the server's certificate is checked.
    pub verify: bool,
}

impl Default for Tls {
    fn default() -> Self {
        Tls { ca_cert: None, verify: true }
    }
}

/// The stores that can be federated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ProviderKind {
    /// HashiCorp Vault or OpenBao, KV version 1 or 2.
    HashicorpVault,
    /// AWS Secrets Manager.
    AwsSecretsManager,
    /// Azure Key Vault.
    AzureKeyVault,
    /// GCP Secret Manager.
    GoogleSecretManager,
}

impl ProviderKind {
    /// Every kind.
    pub const ALL: &'static [ProviderKind] = &[
        ProviderKind::HashicorpVault,
        ProviderKind::AwsSecretsManager,
        ProviderKind::AzureKeyVault,
        ProviderKind::GoogleSecretManager,
    ];

    /// The `type` in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            ProviderKind::HashicorpVault => "hashicorp-vault",
            ProviderKind::AwsSecretsManager => "aws-secrets-manager",
            ProviderKind::AzureKeyVault => "azure-key-vault",
            ProviderKind::GoogleSecretManager => "google-secret-manager",
        }
    }

    /// The kind of this name.
    ///
    /// # Errors
    /// `invalid_config`, naming `type`.
    pub fn parse(name: &str) -> Result<Self, Error> {
        Self::ALL.iter().copied().find(|kind| kind.as_str() == name).ok_or_else(|| {
            let known = Self::ALL.iter().map(|kind| format!("`{}`", kind.as_str())).collect::<Vec<_>>();
            let detail = format!("is no supported type; there are {}", known.join(", "));
            Error::field(Reason::InvalidConfig, "/type", detail)
        })
    }

    /// How many versions the first copy of a secret brings along unless configured. Vault's versions are part of what
    /// its users see; elsewhere each one costs a call, and one call more to know which there are.
    pub fn default_history(self) -> u32 {
        match self {
            ProviderKind::HashicorpVault => DEFAULT_HISTORY,
            ProviderKind::AwsSecretsManager
            | ProviderKind::AzureKeyVault
            | ProviderKind::GoogleSecretManager => 1,
        }
    }

    /// How such a store names its secrets.
    pub fn naming(self) -> Naming {
        match self {
            ProviderKind::HashicorpVault => Naming::Vault,
            ProviderKind::AwsSecretsManager => Naming::Aws,
            ProviderKind::AzureKeyVault => Naming::Azure,
            ProviderKind::GoogleSecretManager => Naming::Gcp,
        }
    }
}

/// An identity that ScaiVault itself has where it runs. A tenant may use one only if the operator granted it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OwnIdentity {
    /// The Kubernetes service account of the control plane.
    Kubernetes,
    /// What the AWS environment gives the control plane.
    Aws,
    /// The managed identity of the control plane's machine.
    Azure,
    /// The service account, or the workload identity, of the control plane.
    Gcp,
}

impl OwnIdentity {
    /// Every identity.
    pub const ALL: &'static [OwnIdentity] =
        &[OwnIdentity::Kubernetes, OwnIdentity::Aws, OwnIdentity::Azure, OwnIdentity::Gcp];

    /// The name in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            OwnIdentity::Kubernetes => "kubernetes",
            OwnIdentity::Aws => "aws",
            OwnIdentity::Azure => "azure",
            OwnIdentity::Gcp => "gcp",
        }
    }

    /// The identity of this name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|identity| identity.as_str() == name)
    }
}

/// Which store, where it is and how to log in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Provider {
    /// HashiCorp Vault or OpenBao, KV version 1 or 2.
    HashicorpVault {
        /// Where it is.
        target: VaultTarget,
        /// How to log in.
        login: VaultLogin,
    },
    /// AWS Secrets Manager.
    AwsSecretsManager {
        /// Where it is.
        target: AwsTarget,
        /// How to log in.
        login: AwsLogin,
    },
    /// Azure Key Vault.
    AzureKeyVault {
        /// Where it is.
        target: AzureTarget,
        /// How to log in.
        login: AzureLogin,
    },
    /// GCP Secret Manager.
    GoogleSecretManager {
        /// Where it is.
        target: GcpTarget,
        /// How to log in.
        login: GcpLogin,
    },
}

/// [`Provider`] without the login: what a node may know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// HashiCorp Vault or OpenBao, KV version 1 or 2.
    HashicorpVault(VaultTarget),
    /// AWS Secrets Manager.
    AwsSecretsManager(AwsTarget),
    /// Azure Key Vault.
    AzureKeyVault(AzureTarget),
    /// GCP Secret Manager.
    GoogleSecretManager(GcpTarget),
}

impl Target {
    /// Which store it is.
    pub fn kind(&self) -> ProviderKind {
        match self {
            Target::HashicorpVault(_) => ProviderKind::HashicorpVault,
            Target::AwsSecretsManager(_) => ProviderKind::AwsSecretsManager,
            Target::AzureKeyVault(_) => ProviderKind::AzureKeyVault,
            Target::GoogleSecretManager(_) => ProviderKind::GoogleSecretManager,
        }
    }

    /// Where the store is.
    pub fn endpoint(&self) -> Cow<'_, Endpoint> {
        match self {
            Target::HashicorpVault(target) => Cow::Borrowed(&target.endpoint),
            Target::AwsSecretsManager(target) => target.endpoint(),
            Target::AzureKeyVault(target) => Cow::Borrowed(&target.vault),
            Target::GoogleSecretManager(target) => target.endpoint(),
        }
    }

    /// How the connection is secured.
    pub fn tls(&self) -> &Tls {
        match self {
            Target::HashicorpVault(target) => &target.tls,
            Target::AwsSecretsManager(target) => &target.tls,
            Target::AzureKeyVault(target) => &target.tls,
            Target::GoogleSecretManager(target) => &target.tls,
        }
    }

    /// Whether names mean the same there as at `other`: how the connection is secured may differ.
    pub fn is_same_store(&self, other: &Target) -> bool {
        let (mut this, mut other) = (self.clone(), other.clone());
        *this.tls_mut() = Tls::default();
        *other.tls_mut() = Tls::default();
        this == other
    }

    fn tls_mut(&mut self) -> &mut Tls {
        match self {
            Target::HashicorpVault(target) => &mut target.tls,
            Target::AwsSecretsManager(target) => &mut target.tls,
            Target::AzureKeyVault(target) => &mut target.tls,
            Target::GoogleSecretManager(target) => &mut target.tls,
        }
    }
}

impl Provider {
    /// What a node may know.
    pub fn target(&self) -> Target {
        match self {
            Provider::HashicorpVault { target, .. } => Target::HashicorpVault(target.clone()),
            Provider::AwsSecretsManager { target, .. } => Target::AwsSecretsManager(target.clone()),
            Provider::AzureKeyVault { target, .. } => Target::AzureKeyVault(target.clone()),
            Provider::GoogleSecretManager { target, .. } => Target::GoogleSecretManager(target.clone()),
        }
    }

    /// Which store it is.
    pub fn kind(&self) -> ProviderKind {
        match self {
            Provider::HashicorpVault { .. } => ProviderKind::HashicorpVault,
            Provider::AwsSecretsManager { .. } => ProviderKind::AwsSecretsManager,
            Provider::AzureKeyVault { .. } => ProviderKind::AzureKeyVault,
            Provider::GoogleSecretManager { .. } => ProviderKind::GoogleSecretManager,
        }
    }

    /// The local secret with the credential; `None` if the login uses nothing but an identity of our own.
    pub fn credentials(&self) -> Option<&SecretPath> {
        match self {
            Provider::HashicorpVault { login, .. } => login.method.credentials(),
            Provider::AwsSecretsManager { login, .. } => login.credentials.as_ref(),
            Provider::AzureKeyVault { login, .. } => login.method.credentials(),
            Provider::GoogleSecretManager { login, .. } => login.credentials(),
        }
    }

    /// The field of `config` that names the credential.
    pub fn credentials_field(&self) -> &'static str {
        match self {
            Provider::HashicorpVault { .. } => "auth_config_path",
            Provider::AwsSecretsManager { .. }
            | Provider::AzureKeyVault { .. }
            | Provider::GoogleSecretManager { .. } => "credentials_path",
        }
    }

    /// The identity of ours that the login uses, if it uses one.
    pub fn own_identity(&self) -> Option<OwnIdentity> {
        match self {
            _ if self.credentials().is_some() => None,
            Provider::HashicorpVault { login, .. } => login.method.own_identity(),
            Provider::AwsSecretsManager { .. } => Some(OwnIdentity::Aws),
            Provider::AzureKeyVault { .. } => Some(OwnIdentity::Azure),
            Provider::GoogleSecretManager { .. } => Some(OwnIdentity::Gcp),
        }
    }

    /// Everything that a login or a read connects to from here, by the field of `config` that decides it.
    pub fn endpoints(&self) -> Vec<(&'static str, Cow<'_, Endpoint>)> {
        match self {
            // The STS of Vault's `aws` method is Vault's to call.
            Provider::HashicorpVault { target, .. } => vec![("endpoint", Cow::Borrowed(&target.endpoint))],
            Provider::AwsSecretsManager { target, login } => {
                vec![("endpoint", target.endpoint()), ("sts_endpoint", login.sts_endpoint(&target.region))]
            }
            Provider::AzureKeyVault { target, login } => {
                let vault = ("vault_url", Cow::Borrowed(&target.vault));
                match &login.method {
                    // The operator says where those are from.
                    AzureMethod::ManagedIdentity { .. } => vec![vault],
                    AzureMethod::ClientSecret { .. } | AzureMethod::Certificate { .. } => {
                        vec![vault, ("authority", login.authority())]
                    }
                }
            }
            Provider::GoogleSecretManager { target, .. } => vec![("endpoint", target.endpoint())],
        }
    }
}

/// An error of a field of `config`.
fn invalid(field: &str, detail: impl Into<String>) -> Error {
    Error::field(Reason::InvalidConfig, format!("/config/{field}"), detail)
}

/// The configuration of a backend as its owner wrote it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendSpec {
    /// Unique in the tenant.
    pub name: BackendName,
    /// Which store and how to log in.
    pub provider: Provider,
    /// Which paths it owns.
    pub mapping: PathMapping,
    /// How reads are served, where a rule does not say otherwise.
    pub mode: Mode,
    /// How its synced rules are synced.
    #[serde(default)]
    pub sync: SyncSettings,
    /// Whether it is used at all; a disabled backend keeps its paths and refuses reads.
    pub enabled: bool,
    /// The deadline of a proxied read, retries included.
    pub timeout: Duration,
}

impl BackendSpec {
    /// Whether any of its rules is synced.
    pub fn is_synced(&self) -> bool {
        self.mapping.rules().iter().any(|rule| self.sync.of(self.mode, rule).mode == Mode::Sync)
    }

    /// Whether `caller` may turn `before` (`None`: create) into this configuration.
    ///
    /// A backend sends a credential to an endpoint and shows at its patterns what it finds there. So whoever changes the
    /// store, the login or the mapping must be able to read the credential, for the mapping decides what the credential
    /// shows, and to write at every pattern, old and new, for the endpoint decides what is found there. So does who
    /// changes which side's writes count: that decides what is written over. When and how much is synced does not.
    ///
    /// # Errors
    /// `permission_denied`, naming the field and the capability.
    pub fn authorize_change(&self, before: Option<&BackendSpec>, caller: &Caller) -> Result<(), Error> {
        if before.is_some_and(|before| {
            before.provider == self.provider
                && before.mapping == self.mapping
                && before.mode == self.mode
                && before.sync.write_policy == self.sync.write_policy
                && before.sync.conflict_policy == self.sync.conflict_policy
        }) {
            return Ok(());
        }
        if let Some(credentials) = self.provider.credentials()
            && !caller.allows(credentials, Capability::Read)
        {
            let detail = "whoever decides where a credential is sent, and what it shows, needs `read` on it";
            let pointer = format!("/config/{}", self.provider.credentials_field());
            return Err(Error::field(Reason::PermissionDenied, pointer, detail)
                .next("ask for a policy that allows `read` on the credential's path"));
        }
        let mappings = [Some(&self.mapping), before.map(|before| &before.mapping)];
        for mapping in mappings.into_iter().flatten() {
            for rule in mapping.rules() {
                if !caller.allows_all(&rule.pattern, Capability::Write) {
                    let detail =
                        format!("whoever decides what `{}` shows needs `write` on all of it", rule.pattern);
                    return Err(Error::field(Reason::PermissionDenied, "/path_mapping", detail)
                        .next("ask for a policy that allows `write` on the pattern"));
                }
            }
        }
        Ok(())
    }
}

/// Parses the deadline of a proxied read.
///
/// # Errors
/// `invalid_config`, naming `config.timeout`.
pub fn check_timeout(timeout: Duration) -> Result<Duration, Error> {
    if (Duration::from_millis(100)..=Duration::from_secs(60)).contains(&timeout) {
        return Ok(timeout);
    }
    Err(invalid("timeout", "is between 100ms and 60s"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::{ConflictPolicy, WritePolicy};

    #[test]
    fn ids_read_as_they_are_written() {
        let id = BackendId::from_random([255; 10]);
        assert_eq!(id.as_str(), "fed_7777777777777777");
        assert_eq!(BackendId::parse(id.as_str()).unwrap(), id);
        assert!(BackendId::parse("fed_abc").is_err());
    }

    #[test]
    fn endpoints_carry_nothing_but_the_address() {
        for text in ["", "vault", "ftp://a", "https://u:p@a", "https://a?x=1", "https://a#x", "https://"] {
            let error = Endpoint::parse("endpoint", text).expect_err(text);
            assert_eq!(error.violations[0].pointer, "/config/endpoint");
        }
        assert_eq!(Endpoint::parse("endpoint", "https://a:8200/").unwrap().to_string(), "https://a:8200");
        assert_eq!(Endpoint::parse("endpoint", "https://a/vault/").unwrap().to_string(), "https://a/vault");
    }

    #[test]
    fn who_decides_what_is_written_over_needs_the_right_to_write_it() {
        let method = VaultMethod::Approle { credentials: SecretPath::parse("infra/vault").unwrap() };
        let target = VaultTarget::at(Endpoint::parse("endpoint", "https://vault").unwrap());
        let before = BackendSpec {
            name: BackendName::parse("vault").unwrap(),
            provider: Provider::HashicorpVault {
                target,
                login: VaultLogin { mount: "approle".into(), method },
            },
            mapping: PathMapping::parse([("a/**", "kv/**")]).unwrap(),
            mode: Mode::Sync,
            sync: SyncSettings::default(),
            enabled: true,
            timeout: DEFAULT_TIMEOUT,
        };
        let without_rights = Caller {
            tenant: crate::tenant::TenantId::parse("acme").unwrap(),
            token: None,
            subject: "ci".into(),
            accessor: String::new(),
            scopes: Vec::new(),
            rules: Vec::new().into(),
            expires_at: None,
        };
        let may = |change: fn(&mut SyncSettings)| {
            let mut spec = before.clone();
            change(&mut spec.sync);
            spec.authorize_change(Some(&before), &without_rights).is_ok()
        };
        assert!(!may(|sync| sync.write_policy = WritePolicy::WriteThrough));
        assert!(!may(|sync| sync.conflict_policy = ConflictPolicy::LocalWins));
        assert!(may(|sync| (sync.prefetch, sync.interval) = (true, Some(Duration::from_secs(60)))));
    }
}
