//! What the rows of the store hold. Each is sealed; see [`crate::store::Records`].

use std::collections::BTreeMap;

use scaivault_domain::access::Scope;
use scaivault_domain::backend::{BackendId, BackendSpec, OwnIdentity};
use scaivault_domain::lease::LeaseKey;
use scaivault_domain::path::SecretPath;
use scaivault_domain::secret::{Kind, Metadata, State, Version};
use scaivault_domain::sync::{Base, Outcome, RunId, SkipReason};
use scaivault_domain::tenant::{NodeName, TenantId};
use scaivault_domain::time::Timestamp;
use scaivault_domain::token::TokenHash;
use scaivault_domain::view::Generation;
use serde::{Deserialize, Serialize};

use crate::credentials::Configured;
use crate::store::{Key, Space};

/// A tenant, at `Installation / Tenant / id`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TenantRecord {
    /// Its id.
    pub id: TenantId,
    /// For people.
    pub display_name: String,
    /// The identities of ScaiVault's own that its backends may use; the operator grants them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub identities: Vec<OwnIdentity>,
    /// When it was created.
    pub created: Timestamp,
}

/// The anchor of a tenant's configuration, at `tenant / Generation / config`. Every change of a backend expects the
/// version it read and rewrites it, so that checks across backends hold.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct GenerationRecord {
    /// The number of the configuration.
    pub generation: Generation,
}

/// A backend, at `tenant / Backend / id`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BackendRecord {
    /// Its id.
    pub id: BackendId,
    /// Its configuration.
    pub spec: BackendSpec,
    /// The generation in which the configuration came to be.
    pub generation: Generation,
    /// The generation in which its store and login came to be.
    #[serde(default)]
    pub login_generation: Generation,
    /// When it was created.
    pub created: Timestamp,
    /// When the configuration came to be.
    pub updated: Timestamp,
}

impl BackendRecord {
    /// The store and the login, with their generation.
    pub fn configured(&self) -> Configured<'_> {
        Configured { provider: &self.spec.provider, generation: self.login_generation }
    }
}

/// A token, at `Installation / Token / hash`: whoever asks with a token has not yet a tenant.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TokenRecord {
    /// Whose it is.
    pub tenant: TenantId,
    /// A name for the token that is not the token.
    pub accessor: String,
    /// Who it is for.
    pub subject: String,
    /// Which API it may use.
    pub scopes: Vec<Scope>,
    /// Which paths: names of policies.
    pub policies: Vec<String>,
    /// When it was created.
    pub created: Timestamp,
    /// When it ends, if it does.
    pub expires: Option<Timestamp>,
    /// How long it lived when it was created, in milliseconds; `None` is for ever. Its own renewals give no more.
    pub lifetime_ms: Option<u64>,
    /// The token that it was created with, perhaps in another tenant.
    pub parent: Option<Parent>,
}

/// The token that another was created with.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Parent {
    /// Its accessor.
    pub accessor: String,
    /// Its hash as text.
    pub hash: String,
}

/// Finds a token by its accessor, at `tenant / Token / accessor`; and by its parent, at
/// `Installation / Token / children/parent's accessor/hash`, because a child may live in another tenant.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AccessorRecord {
    /// The token's hash as text.
    pub hash: String,
}

/// A node, at `Installation / Node / name`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NodeRecord {
    /// Its name.
    pub name: NodeName,
    /// The tenants that it serves; empty is all of them.
    pub tenants: Vec<TenantId>,
    /// Stands in its certificates, so that a node of the same name that was removed before is refused.
    pub enrolment: String,
    /// When it was invited.
    pub created: Timestamp,
    /// When its certificate ends; `None` before it joined.
    pub certificate_expires: Option<Timestamp>,
}

/// An invitation, at `Installation / JoinToken / SHA-256 of its secret`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JoinRecord {
    /// Who is invited.
    pub node: NodeName,
    /// To which enrolment: a later invitation of the same name makes this one void.
    pub enrolment: String,
    /// Until when.
    pub expires: Timestamp,
}

/// The head of a local secret, at `tenant / Secret / path`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SecretHead {
    /// The newest version.
    pub current: Version,
    /// The state of that version.
    pub state: State,
    /// When that version was made or changed its state.
    #[serde(default)]
    pub changed: Timestamp,
    /// What was agreed with the backend that it is a copy of. Means nothing to paths that this backend does not sync.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<Base>,
}

impl SecretHead {
    /// The base, if the secret is a copy of this backend's.
    pub fn copy_of(&self, backend: &BackendId) -> Option<&Base> {
        self.base.as_ref().filter(|base| base.backend == *backend)
    }
}

/// One version of a local secret, at `tenant / SecretVersion / path@version`; its value follows in the same row.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SecretVersionHead {
    /// Which version.
    pub version: Version,
    /// What the bytes are.
    pub kind: Kind,
    /// Kept with the value.
    pub content_type: String,
    /// Custom metadata.
    pub metadata: Metadata,
    /// Whether it has a value.
    pub state: State,
    /// When it was written.
    pub created: Timestamp,
    /// When it was deleted, if it was.
    pub deleted: Option<Timestamp>,
    /// The version in the backend that it is a copy of; empty for ScaiVault's own.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub remote_version: String,
}

/// What the last cycles of a backend found, at `tenant / SyncState / backend's id`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct SyncState {
    /// By the pattern of the rule.
    pub rules: BTreeMap<String, RuleState>,
    /// By the pattern of the rule: since when it is synced as it is. Older copies may be another rule's, or another
    /// store's.
    pub since: BTreeMap<String, Timestamp>,
    /// By the pattern of the rule: when its next cycle begins.
    pub due: BTreeMap<String, Timestamp>,
    /// Known paths that the last cycle over their rule could not verify, with the time when they last were.
    pub exceptions: BTreeMap<SecretPath, Timestamp>,
    /// Paths without a copy that the last cycle over their rule left out.
    pub skipped: BTreeMap<SecretPath, SkipReason>,
    /// How many copies there are.
    pub secrets: u64,
    /// When the last run that was complete or partial ended, and how long it took.
    pub last_sync: Option<(Timestamp, u64)>,
    /// The last run that ended: its id, when it began and how it ended.
    pub last_run: Option<(RunId, Timestamp, Outcome)>,
    /// How many names and paths it skipped.
    pub last_skipped: u64,
    /// Runs in a row that failed.
    pub failures: u32,
    /// Why the last run failed, one sentence; empty if it did not.
    pub failure: String,
    /// The last run, if it held deletions back, and how many.
    pub held_back: Option<(RunId, u64)>,
}

/// How the sync of one rule stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleState {
    /// The begin of the last cycle that listed everything.
    pub as_of: Timestamp,
    /// The begin of the last cycle that read everything, whatever the listing said.
    pub reread: Timestamp,
}

/// The key of a secret's head.
pub fn secret_key(tenant: &TenantId, path: &SecretPath) -> Key {
    Key::new(tenant, Space::Secret, path.as_str())
}

/// The key of what the cycles of a backend found.
pub fn sync_state_key(key: &LeaseKey) -> Key {
    Key::new(&key.tenant, Space::SyncState, key.backend.as_str())
}

/// The key of the anchor of a tenant's configuration.
pub fn generation_key(tenant: &TenantId) -> Key {
    Key::new(tenant, Space::Generation, "config")
}

/// The key of a token.
pub fn token_key(hash: TokenHash) -> Key {
    Key::installation(Space::Token, hash.to_text())
}

/// The key that finds a token by its accessor.
pub fn accessor_key(tenant: &TenantId, accessor: &str) -> Key {
    Key::new(tenant, Space::Token, accessor)
}

/// The key that finds a token by its parent. No hash has a slash in it.
pub fn child_key(parent: &str, hash: &str) -> Key {
    Key::installation(Space::Token, format!("children/{parent}/{hash}"))
}

/// The key of a version of a secret. `@` is in no path, and fixed digits keep versions in order.
pub fn version_key(tenant: &TenantId, path: &str, version: Version) -> Key {
    Key::new(tenant, Space::SecretVersion, format!("{path}@{version:016x}"))
}
