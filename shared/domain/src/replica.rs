//! Secrets as nodes hold them: copies that the control plane pushes, and what is known about paths that have none.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::backend::BackendId;
use crate::path::SecretPath;
use crate::secret::{Kind, Metadata, SecretValue, State, Version};
use crate::sync::SkipReason;
use crate::tenant::TenantId;
use crate::time::Timestamp;

/// Names a secret to both planes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SecretKey {
    /// Whose it is.
    pub tenant: TenantId,
    /// Where it is.
    pub path: SecretPath,
}

impl SecretKey {
    /// Names the secret at `path` of `tenant`.
    pub fn new(tenant: &TenantId, path: &SecretPath) -> Self {
        SecretKey { tenant: tenant.clone(), path: path.clone() }
    }

    /// The short form of the key.
    pub fn hash(&self) -> KeyHash {
        let mut hash = Sha256::new();
        hash.update(self.tenant.as_str());
        // A NUL is in no tenant's id and in no path.
        hash.update([0]);
        hash.update(self.path.as_str());
        let digest = hash.finalize();
        KeyHash(*digest.first_chunk().expect("SHA-256 has 32 bytes"))
    }
}

/// The first 16 bytes of the SHA-256 of a [`SecretKey`]: what a node tells of 100,000 keys must stay small.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyHash(pub [u8; 16]);

impl fmt::Debug for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Which state of a secret a copy shows. Within an epoch the revision alone says which one is newer; the tag tells
/// across epochs whether two copies are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Stamp {
    /// The store's revision that wrote the state.
    pub revision: u64,
    /// A digest of the state.
    pub tag: u64,
}

/// The current version of a secret, as a node holds it.
#[derive(Clone, Debug)]
pub struct Replica {
    /// Our version.
    pub version: Version,
    /// What the bytes are.
    pub kind: Kind,
    /// Kept with the value.
    pub content_type: String,
    /// Custom metadata.
    pub metadata: Metadata,
    /// Whether it has a value.
    pub state: State,
    /// The value; `None` unless the state is active.
    pub value: Option<SecretValue>,
    /// The backend that it is a copy of; `None` for ScaiVault's own.
    pub backend: Option<BackendId>,
    /// The version in the backend, as the backend names it.
    pub remote_version: String,
    /// When the version was made.
    pub created: Option<Timestamp>,
    /// When this value was last read from its backend or compared with it; a [`Freshness`] may say something later.
    pub verified: Timestamp,
}

/// Why a node has no copy of a secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Absence {
    /// There is no such secret.
    NotFound,
    /// It is not copied yet: read it from its backend.
    Proxy,
    /// The last sync skipped it.
    NotSynced(SkipReason),
}

/// Whether a copy is older than the period of its sync.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stale {
    /// It is not.
    No,
    /// It is, and says so.
    Yes,
}

impl Stale {
    /// Whether a copy of this age is stale that is synced every `interval`.
    pub fn at(age: Duration, interval: Option<Duration>) -> Self {
        if interval.is_some_and(|interval| age > interval) { Stale::Yes } else { Stale::No }
    }
}

/// When the copies of a backend were last compared with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Freshness {
    /// Of which backend.
    pub backend: BackendId,
    /// By the pattern of the rule: the begin of the last cycle that covered it.
    pub rules: Vec<(String, Timestamp)>,
    /// Paths that this cycle could not verify, with the time when they last were.
    pub exceptions: BTreeMap<SecretPath, Timestamp>,
}

impl Freshness {
    /// How old a copy is at `now`: time since its value was verified.
    pub fn age(&self, path: &SecretPath, rule: &str, verified: Timestamp, now: Timestamp) -> Duration {
        let cycle = match self.exceptions.get(path) {
            Some(as_of) => Some(*as_of),
            None => self.rules.iter().find(|(pattern, _)| pattern == rule).map(|(_, as_of)| *as_of),
        };
        let verified = cycle.map_or(verified, |as_of| as_of.max(verified));
        now.since(verified)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> SecretPath {
        SecretPath::check(text).unwrap()
    }

    #[test]
    fn keys_of_different_tenants_differ() {
        let key =
            |tenant: &str, text: &str| SecretKey::new(&TenantId::parse(tenant).unwrap(), &path(text)).hash();
        assert_eq!(key("a", "b/c"), key("a", "b/c"));
        assert_ne!(key("a", "b/c"), key("ab", "c"));
        assert_ne!(key("a", "b/c"), key("b", "b/c"));
    }

    #[test]
    fn a_path_that_a_cycle_could_not_verify_keeps_its_age() {
        let at = |seconds: i64| Timestamp::from_millis(seconds * 1000);
        let freshness = Freshness {
            backend: BackendId::from_random([1; 10]),
            rules: vec![("e/**".into(), at(100))],
            exceptions: BTreeMap::from([(path("e/x"), at(40))]),
        };
        let age =
            |text: &str, verified: i64| freshness.age(&path(text), "e/**", at(verified), at(130)).as_secs();
        assert_eq!(age("e/a", 10), 30);
        assert_eq!(age("e/a", 120), 10);
        assert_eq!(age("e/x", 10), 90);
        assert_eq!(freshness.age(&path("f"), "f", at(10), at(130)).as_secs(), 120);
    }
}
