//! Reading copies, whoever asks: the service, and the nodes.

use std::sync::Arc;

use scaivault_domain::lease::LeaseKey;
use scaivault_domain::path::SecretPath;
use scaivault_domain::replica::{Absence, Replica, Stale, Stamp};
use scaivault_domain::secret::State;
use scaivault_domain::sync::Base;
use scaivault_domain::tenant::TenantId;
use scaivault_domain::time::Clock;
use scaivault_domain::view::{BackendView, Route};
use sha2::{Digest as _, Sha256};

use super::SyncStates;
use crate::model::{SecretHead, SecretVersionHead, secret_key, version_key};
use crate::store::{Records, RowVersion, StoreError};

/// How often a secret is read again that changes while it is read.
const ATTEMPTS: usize = 8;

/// A copy, and how long ago it was compared with its backend.
#[derive(Clone, Debug)]
pub struct Copy {
    /// The copy.
    pub replica: Replica,
    /// Time since its value was verified.
    pub age: std::time::Duration,
    /// Whether that is longer than the period of its sync.
    pub stale: Stale,
}

/// The current versions of secrets in our store.
#[derive(Debug)]
pub struct Copies {
    records: Records,
    states: Arc<SyncStates>,
    clock: Arc<dyn Clock>,
}

impl Copies {
    /// Reads from `records`.
    pub fn new(records: Records, states: Arc<SyncStates>, clock: Arc<dyn Clock>) -> Self {
        Copies { records, states, clock }
    }

    /// What our store has for a path of this route, or why it has nothing.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn find(
        &self,
        tenant: &TenantId,
        path: &SecretPath,
        route: &Route,
    ) -> Result<Result<(Stamp, Replica), Absence>, StoreError> {
        match route {
            Route::Proxied { .. } => Ok(Err(Absence::Proxy)),
            Route::Unrepresentable { .. } => Ok(Err(Absence::NotFound)),
            Route::Local => Ok(self.current(tenant, path, |_| true).await?.ok_or(Absence::NotFound)),
            Route::Synced { backend, name, rule } => {
                let key = LeaseKey { tenant: tenant.clone(), backend: backend.id.clone() };
                // First when they were compared, then the copies: those may be newer, never older.
                let (state, _) = self.states.of(&key).await?;
                let pattern = backend.mapping.rules()[*rule].pattern.as_str();
                let is_current = |base: Option<&Base>| {
                    base.is_some_and(|base| {
                        base.backend == backend.id
                            && base.remote_name == name.as_str()
                            && state.is_current(pattern, path, base)
                    })
                };
                let found = self.current(tenant, path, is_current).await?;
                Ok(found.ok_or_else(|| state.absence(backend, *rule, path)))
            }
        }
    }

    /// How old a copy is.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn aged(
        &self,
        tenant: &TenantId,
        backend: &BackendView,
        rule: usize,
        path: &SecretPath,
        replica: Replica,
    ) -> Result<Copy, StoreError> {
        let key = LeaseKey { tenant: tenant.clone(), backend: backend.id.clone() };
        let (state, _) = self.states.of(&key).await?;
        let pattern = backend.mapping.rules()[rule].pattern.as_str();
        let age = state.freshness(&key).age(path, pattern, replica.verified, self.clock.now());
        let stale = Stale::at(age, backend.rule(rule).interval);
        Ok(Copy { replica, age, stale })
    }

    /// Whether no cycle has seen the rule yet: its paths are read in the backend until they have copies.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn is_unseen(
        &self,
        tenant: &TenantId,
        backend: &BackendView,
        rule: usize,
    ) -> Result<bool, StoreError> {
        let key = LeaseKey { tenant: tenant.clone(), backend: backend.id.clone() };
        let (state, _) = self.states.of(&key).await?;
        Ok(!state.rules.contains_key(backend.mapping.rules()[rule].pattern.as_str()))
    }

    /// The current version at `path`, if its base is as `wanted`.
    async fn current(
        &self,
        tenant: &TenantId,
        path: &SecretPath,
        wanted: impl Fn(Option<&Base>) -> bool,
    ) -> Result<Option<(Stamp, Replica)>, StoreError> {
        let at = secret_key(tenant, path);
        for _ in 0..ATTEMPTS {
            let Some((head, version)) = self.records.get::<SecretHead>(&at).await? else { return Ok(None) };
            let base = head.base.as_ref();
            if !wanted(base) {
                return Ok(None);
            }
            let key = version_key(tenant, path.as_str(), head.current);
            let entry = self.records.get_secret::<SecretVersionHead>(&key).await?;
            // Head and version are read one after the other: if the head has moved, they may not belong together.
            let unmoved = self.records.store().get(&at).await?.is_some_and(|row| row.version == version);
            if let Some((entry, value)) = entry.filter(|_| unmoved) {
                let replica = Replica {
                    version: head.current,
                    kind: entry.kind,
                    content_type: entry.content_type,
                    metadata: entry.metadata,
                    state: head.state,
                    value: value.filter(|_| head.state == State::Active),
                    backend: base.map(|base| base.backend.clone()),
                    remote_version: base.map(|base| base.remote_version.clone()).unwrap_or_default(),
                    created: Some(entry.created),
                    verified: base.map_or(head.changed, |base| base.verified),
                };
                return Ok(Some((stamp(&head, version), replica)));
            }
        }
        Err(StoreError::Corrupt("the head of a secret names a version that is not there".into()))
    }
}

/// Which state of a secret `head` is, at this version of its row.
pub fn stamp(head: &SecretHead, version: RowVersion) -> Stamp {
    let plain = serde_json::to_vec(head).expect("a head is always JSON");
    let digest = Sha256::digest(&plain);
    let tag = digest.first_chunk().expect("SHA-256 has 32 bytes");
    Stamp { revision: version.as_u64(), tag: u64::from_be_bytes(*tag) }
}
