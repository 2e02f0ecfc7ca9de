//! Backends: one configured federation to one remote store.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use url::Url;

use crate::access::{Caller, Capability};
use crate::error::{Error, Reason};
use crate::mapping::PathMapping;
use crate::path::SecretPath;
use crate::sync::{Mode, SyncSettings};
use crate::tenant::BackendName;

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
    /// `invalid_config`, naming `config.endpoint`.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let invalid = |detail| Error::field(Reason::InvalidConfig, "/config/endpoint", detail);
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
    /// PEM certificates that the server's certificate must chain to, instead of the public roots.
    pub ca_cert: Option<String>,
    /// Whether the server's certificate is checked.
    pub tls_verify: bool,
    /// The KV mount, if Vault is not to be asked for it.
    pub kv: Option<KvMount>,
}

/// How the control plane logs in to a Vault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VaultAuthMethod {
    /// `role_id` and `secret_id`.
    Approle,
    /// A Vault token.
    Token,
}

impl VaultAuthMethod {
    /// Every method.
    pub const ALL: &'static [VaultAuthMethod] = &[VaultAuthMethod::Approle, VaultAuthMethod::Token];

    /// The name in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            VaultAuthMethod::Approle => "approle",
            VaultAuthMethod::Token => "token",
        }
    }

    /// The method of this name.
    ///
    /// # Errors
    /// `invalid_config`, naming `config.auth_method`.
    pub fn parse(name: &str) -> Result<Self, Error> {
        Self::ALL.iter().copied().find(|m| m.as_str() == name).ok_or_else(|| {
            Error::field(Reason::InvalidConfig, "/config/auth_method", "is `approle` or `token`")
        })
    }
}

/// The login of a Vault backend. Stays in the control plane.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VaultLogin {
    /// Which method.
    pub method: VaultAuthMethod,
    /// Where the method is mounted, e.g. `approle`.
    pub mount: String,
    /// The local secret with the credential: `{role_id, secret_id}` or `{token}`.
    pub credentials: SecretPath,
    /// Policies of the child tokens that nodes get (`token` only); empty: those of the token itself.
    pub lease_policies: Vec<String>,
    /// Whether nodes may hold the configured token itself when it never expires (`token` only).
    pub allow_static_on_nodes: bool,
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
}

/// [`Provider`] without the login: what a node may know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// HashiCorp Vault or OpenBao, KV version 1 or 2.
    HashicorpVault(VaultTarget),
}

impl Target {
    /// The `type` in the API.
    pub fn kind(&self) -> &'static str {
        match self {
            Target::HashicorpVault(_) => HASHICORP_VAULT,
        }
    }

    /// Where the store is.
    pub fn endpoint(&self) -> &Endpoint {
        match self {
            Target::HashicorpVault(target) => &target.endpoint,
        }
    }

    /// Whether names mean the same there as at `other`: how the connection is secured may differ.
    pub fn is_same_store(&self, other: &Target) -> bool {
        match (self, other) {
            (Target::HashicorpVault(this), Target::HashicorpVault(other)) => {
                (&this.endpoint, &this.namespace, &this.kv) == (&other.endpoint, &other.namespace, &other.kv)
            }
        }
    }

    /// Whether the server's certificate is checked.
    pub fn tls_verify(&self) -> bool {
        match self {
            Target::HashicorpVault(target) => target.tls_verify,
        }
    }
}

/// The `type` of a Vault backend.
pub const HASHICORP_VAULT: &str = "hashicorp-vault";

impl Provider {
    /// What a node may know.
    pub fn target(&self) -> Target {
        match self {
            Provider::HashicorpVault { target, .. } => Target::HashicorpVault(target.clone()),
        }
    }

    /// The `type` in the API.
    pub fn kind(&self) -> &'static str {
        match self {
            Provider::HashicorpVault { .. } => HASHICORP_VAULT,
        }
    }

    /// The local secret with the credential.
    pub fn credentials(&self) -> &SecretPath {
        match self {
            Provider::HashicorpVault { login, .. } => &login.credentials,
        }
    }
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
    /// shows, and to write at every pattern, old and new, for the endpoint decides what is found there.
    ///
    /// # Errors
    /// `permission_denied`, naming the field and the capability.
    pub fn authorize_change(&self, before: Option<&BackendSpec>, caller: &Caller) -> Result<(), Error> {
        if before.is_some_and(|before| {
            before.provider == self.provider && before.mapping == self.mapping && before.mode == self.mode
        }) {
            return Ok(());
        }
        if !caller.allows(self.provider.credentials(), Capability::Read) {
            let detail = "whoever decides where a credential is sent, and what it shows, needs `read` on it";
            return Err(Error::field(Reason::PermissionDenied, "/config/auth_config_path", detail)
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
    Err(Error::field(Reason::InvalidConfig, "/config/timeout", "is between 100ms and 60s"))
}

#[cfg(test)]
mod tests {
    use super::*;

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
            let error = Endpoint::parse(text).expect_err(text);
            assert_eq!(error.violations[0].pointer, "/config/endpoint");
        }
        assert_eq!(Endpoint::parse("https://a:8200/").unwrap().to_string(), "https://a:8200");
        assert_eq!(Endpoint::parse("https://a/vault/").unwrap().to_string(), "https://a/vault");
    }
}
