//! What is known of secrets: copies in the cache, paths that have none, and how long ago all of it was true.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use prost::Message as _;
use scaivault_discovery::{Change, Restored, wire};
use scaivault_domain::access::Caller;
use scaivault_domain::backend::BackendId;
use scaivault_domain::lease::LeaseKey;
use scaivault_domain::replica::{Absence, Freshness, KeyHash, Replica, SecretKey, Stale};
use scaivault_domain::tenant::TenantId;
use scaivault_domain::time::Timestamp;
use scaivault_domain::token::TokenHash;
use scaivault_domain::view::{BackendView, Generation, Route, TenantView};
use scaivault_proto::discovery::v1 as pb;
use zeroize::Zeroizing;

use crate::cache::{Cache, Marks, Warm, Write};

/// Most paths without a copy that are remembered.
const ABSENT: u64 = 100_000;

/// Copies, and what there is instead of them.
pub struct Copies {
    cache: Arc<Cache>,
    /// Why there is no copy, with the configuration in which it was told: another one may have another backend for the
    /// path, or another name there.
    absent: moka::sync::Cache<KeyHash, (Absence, Generation)>,
    /// In which configuration each copy was given. As small as it can be: there may be 100,000.
    given: RwLock<HashMap<KeyHash, Generation>>,
    freshness: RwLock<HashMap<LeaseKey, Arc<Freshness>>>,
    /// Backends whose every copy is held: what is not held of them is not there.
    prefetched: RwLock<HashSet<BackendId>>,
}

impl fmt::Debug for Copies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Copies").field("cache", &self.cache).finish_non_exhaustive()
    }
}

/// Whether the control plane can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// It can.
    Linked,
    /// It cannot: what is held has to do.
    Alone,
}

/// What an earlier run of the node held.
#[derive(Debug, Default)]
pub struct Remembered {
    /// What is told to the control plane.
    pub restored: Restored,
    /// Views that were in force.
    pub views: Vec<TenantView>,
    /// Grants that were in force.
    pub grants: Vec<(TokenHash, Arc<Caller>)>,
    /// When the control plane last confirmed all of it.
    pub confirmed: Option<Timestamp>,
}

impl Copies {
    /// Copies in `cache`. Paths that are forgotten because there are too many are given to `forgotten`.
    pub fn new(cache: Arc<Cache>, forgotten: impl Fn(KeyHash) + Send + Sync + 'static) -> Self {
        let evicted = move |hash: Arc<KeyHash>, _, cause: moka::notification::RemovalCause| {
            if cause.was_evicted() {
                forgotten(*hash);
            }
        };
        Copies {
            cache,
            absent: moka::sync::Cache::builder().max_capacity(ABSENT).eviction_listener(evicted).build(),
            given: RwLock::default(),
            freshness: RwLock::default(),
            prefetched: RwLock::default(),
        }
    }

    /// The cache.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// Takes over what an earlier run left in the cache. What cannot be read any more is as if it had never been there.
    pub fn remember(&self, warm: Warm, now: Timestamp) -> Remembered {
        let mut remembered = Remembered {
            restored: Restored { epoch: warm.marks.epoch, secrets: self.cache.held(), ..Restored::default() },
            confirmed: Some(warm.marks.confirmed),
            ..Remembered::default()
        };
        for (tenant, encoded) in warm.views {
            match decode_view(&encoded).filter(|view| view.tenant == tenant) {
                Some(view) => {
                    remembered.restored.views.push((tenant, view.generation));
                    remembered.views.push(view);
                }
                None => tracing::warn!(%tenant, "the view of an earlier run cannot be read"),
            }
        }
        for (_, encoded) in warm.grants {
            let grant =
                pb::Grant::decode(&**encoded).ok().and_then(|grant| wire::grant_from_wire(grant).ok());
            if let Some((hash, version, caller)) = grant.filter(|(.., caller)| !caller.expired(now)) {
                remembered.restored.grants.push((hash, version));
                remembered.grants.push((hash, caller));
            }
        }
        let mut held = self.freshness.write().unwrap_or_else(PoisonError::into_inner);
        for (tenant, freshness) in warm.freshness {
            held.insert(LeaseKey { tenant, backend: freshness.backend.clone() }, Arc::new(freshness));
        }
        drop(held);
        *self.prefetched.write().unwrap_or_else(PoisonError::into_inner) =
            warm.marks.prefetched.into_iter().collect();
        remembered
    }

    /// What is known of a path of this route, in this generation; `None`: nothing, it must be asked.
    ///
    /// While the control plane can be asked, a copy counts that it gave in this generation, or that a cycle of the rule
    /// has covered since: a copy from before may be of another name in the backend. Alone, what is held is all there is.
    pub fn look(
        &self,
        key: &SecretKey,
        route: &Route,
        generation: Generation,
        reach: Reach,
    ) -> Option<Result<Replica, Absence>> {
        let backend = route.backend().map(|backend| &backend.id);
        let hash = key.hash();
        if let Some((absence, _)) = self.absent.get(&hash).filter(|(_, told)| *told == generation) {
            return Some(Err(absence));
        }
        let is_given = || self.given().get(&hash) == Some(&generation);
        if reach == Reach::Alone || self.is_covered(key, route) || is_given() {
            // A copy of another backend, or one of ours that a backend owns now, is not what the path has.
            let held = self.cache.get(key).map(|(_, replica)| replica);
            if let Some(replica) =
                held.filter(|replica| backend.is_none() || backend == replica.backend.as_ref())
            {
                return Some(Ok(replica));
            }
        }
        let prefetched = self.prefetched.read().unwrap_or_else(PoisonError::into_inner);
        let whole = reach == Reach::Alone && backend.is_some_and(|backend| prefetched.contains(backend));
        (whole && self.is_covered(key, route)).then_some(Err(Absence::NotFound))
    }

    fn given(&self) -> RwLockReadGuard<'_, HashMap<KeyHash, Generation>> {
        self.given.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn give(&self, hash: KeyHash, generation: Option<Generation>) {
        let mut given = self.given.write().unwrap_or_else(PoisonError::into_inner);
        match generation {
            Some(generation) => given.insert(hash, generation),
            None => given.remove(&hash),
        };
    }

    /// Whether a cycle has compared every copy of the route's rule.
    fn is_covered(&self, key: &SecretKey, route: &Route) -> bool {
        let Route::Synced { backend, rule, .. } = route else { return true };
        let pattern = backend.mapping.rules()[*rule].pattern.as_str();
        self.freshness(&key.tenant, &backend.id)
            .is_some_and(|freshness| freshness.rules.iter().any(|(covered, _)| covered == pattern))
    }

    fn freshness(&self, tenant: &TenantId, backend: &BackendId) -> Option<Arc<Freshness>> {
        let held = self.freshness.read().unwrap_or_else(PoisonError::into_inner);
        held.get(&LeaseKey { tenant: tenant.clone(), backend: backend.clone() }).cloned()
    }

    /// Whether anything is known, or was asked, of a path: then its changes come by themselves.
    pub fn is_followed(&self, key: &SecretKey) -> bool {
        let hash = key.hash();
        self.cache.stamp(hash).is_some() || self.absent.contains_key(&hash)
    }

    /// How old a copy is, and whether that is longer than the period of its sync.
    pub fn age(
        &self,
        key: &SecretKey,
        backend: &BackendView,
        rule: usize,
        replica: &Replica,
        now: Timestamp,
    ) -> (std::time::Duration, Stale) {
        let age = match self.freshness(&key.tenant, &backend.id) {
            Some(freshness) => {
                let pattern = backend.mapping.rules()[rule].pattern.as_str();
                freshness.age(&key.path, pattern, replica.verified, now)
            }
            None => now.since(replica.verified),
        };
        (age, Stale::at(age, backend.rule(rule).interval))
    }

    /// The time since the copies of a backend were last compared with it, of those that were compared longest ago.
    pub fn oldest(&self, now: Timestamp) -> Vec<(LeaseKey, std::time::Duration)> {
        let held = self.freshness.read().unwrap_or_else(PoisonError::into_inner);
        let oldest = |freshness: &Freshness| {
            let rules = freshness.rules.iter().map(|(_, as_of)| *as_of);
            rules.chain(freshness.exceptions.values().copied()).min()
        };
        held.iter()
            .filter_map(|(key, freshness)| Some((key.clone(), now.since(oldest(freshness)?))))
            .collect()
    }

    /// Forgets everything, with these views and the grants of these tokens.
    pub(super) fn forget(
        &self,
        views: impl Iterator<Item = TenantId>,
        grants: impl Iterator<Item = TokenHash>,
    ) {
        let mut writes: Vec<Write> = grants.map(Write::GrantGone).chain(views.map(Write::ViewGone)).collect();
        writes.extend(self.cache.held().into_iter().map(|(hash, _)| Write::SecretGone(hash)));
        let freshness = std::mem::take(&mut *self.freshness.write().unwrap_or_else(PoisonError::into_inner));
        writes.extend(freshness.into_keys().map(|key| Write::FreshnessGone(key.tenant, key.backend)));
        self.absent.invalidate_all();
        *self.given.write().unwrap_or_else(PoisonError::into_inner) = HashMap::new();
        self.begin_stream();
        self.cache.apply(writes);
    }

    /// A stream begins: what was held whole may have grown meanwhile, until the control plane says that it is whole again.
    pub(super) fn begin_stream(&self) {
        self.prefetched.write().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Takes a change, and adds to `writes` what of it outlives the process. `generation` is the tenant's in force.
    pub(super) fn take(
        &self,
        change: &Change,
        generation: impl Fn(&TenantId) -> Generation,
        writes: &mut Vec<Write>,
    ) {
        match change {
            Change::View(view) => {
                self.keep_backends(
                    &view.tenant,
                    |key| view.backends.iter().any(|b| b.id == key.backend),
                    writes,
                );
                writes.push(Write::View(view.tenant.clone(), encode_view(view)));
            }
            Change::ViewGone(tenant) => {
                self.keep_backends(tenant, |_| false, writes);
                writes.push(Write::ViewGone(tenant.clone()));
            }
            Change::Grant(hash, version, caller) => {
                let grant = wire::grant_to_wire(hash, *version, caller).encode_to_vec();
                writes.push(Write::Grant(*hash, Zeroizing::new(grant)));
            }
            Change::GrantGone(hash) => writes.push(Write::GrantGone(*hash)),
            Change::Lease(_) | Change::LeaseGone(..) => {}
            Change::Secret(key, stamp, replica) => {
                let hash = key.hash();
                self.absent.invalidate(&hash);
                self.give(hash, Some(generation(&key.tenant)));
                writes.push(Write::Secret(key.clone(), *stamp, Replica::clone(replica)));
            }
            Change::SecretAbsent(key, absence) => {
                let hash = key.hash();
                self.absent.insert(hash, (*absence, generation(&key.tenant)));
                self.give(hash, None);
                writes.push(Write::SecretGone(hash));
            }
            Change::SecretGone(hash) => {
                self.absent.invalidate(hash);
                self.give(*hash, None);
                writes.push(Write::SecretGone(*hash));
            }
            Change::Freshness(tenant, freshness) => {
                let key = LeaseKey { tenant: tenant.clone(), backend: freshness.backend.clone() };
                let mut held = self.freshness.write().unwrap_or_else(PoisonError::into_inner);
                held.insert(key, Arc::new(freshness.clone()));
                writes.push(Write::Freshness(tenant.clone(), freshness.clone()));
            }
            Change::PrefetchComplete(key) => {
                let mut prefetched = self.prefetched.write().unwrap_or_else(PoisonError::into_inner);
                prefetched.insert(key.backend.clone());
            }
        }
    }

    /// Makes what was taken last beyond the process.
    pub(super) fn keep(&self, writes: Vec<Write>, epoch: &str, revision: u64, now: Timestamp) {
        let prefetched = self.prefetched.read().unwrap_or_else(PoisonError::into_inner);
        let marks = Marks {
            epoch: epoch.to_owned(),
            revision,
            confirmed: now,
            prefetched: prefetched.iter().cloned().collect(),
        };
        drop(prefetched);
        // First the epoch that the others are of.
        self.cache.apply(std::iter::once(Write::Marks(marks)).chain(writes).collect());
    }

    /// Forgets grants that are over, also beyond the process.
    pub(super) fn forget_grants(&self, grants: &[TokenHash]) {
        self.cache.apply(grants.iter().copied().map(Write::GrantGone).collect());
    }

    fn keep_backends(&self, tenant: &TenantId, kept: impl Fn(&LeaseKey) -> bool, writes: &mut Vec<Write>) {
        let gone = |key: &LeaseKey| key.tenant == *tenant && !kept(key);
        let mut held = self.freshness.write().unwrap_or_else(PoisonError::into_inner);
        for (key, _) in held.extract_if(|key, _| gone(key)) {
            writes.push(Write::FreshnessGone(key.tenant, key.backend));
        }
    }
}

fn encode_view(view: &TenantView) -> Zeroizing<Vec<u8>> {
    let mut encoded = Zeroizing::new(Vec::new());
    for chunk in wire::view_chunks(view) {
        chunk.encode_length_delimited(&mut *encoded).expect("a vector grows as it must");
    }
    encoded
}

fn decode_view(mut encoded: &[u8]) -> Option<TenantView> {
    let mut chunks = Vec::new();
    while !encoded.is_empty() {
        chunks.push(pb::TenantViewChunk::decode_length_delimited(&mut encoded).ok()?);
    }
    wire::view_from_chunks(chunks).ok()
}
