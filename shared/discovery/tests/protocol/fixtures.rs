//! Resources to publish, and a node that keeps what it is told.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use scaivault_discovery::{Change, Found, LeasePush};
use scaivault_domain::access::{Caller, Capability, Effect, PolicyRule, Scope};
use scaivault_domain::backend::{BackendId, Endpoint, KvMount, KvVersion, Target, Tls, VaultTarget};
use scaivault_domain::lease::{LeaseKey, Material};
use scaivault_domain::mapping::PathMapping;
use scaivault_domain::pattern::Pattern;
use scaivault_domain::replica::{Freshness, SecretKey};
use scaivault_domain::sync::{Mode, SyncSettings};
use scaivault_domain::tenant::{BackendName, TenantId};
use scaivault_domain::time::Timestamp;
use scaivault_domain::token::TokenHash;
use scaivault_domain::view::{BackendView, Generation, TenantView};

pub(crate) const NOW: Timestamp = Timestamp::from_millis(1_000_000);

pub(crate) fn tenant(number: u8) -> TenantId {
    TenantId::parse(&format!("tenant-{number}")).unwrap()
}

pub(crate) fn hash(number: u8) -> TokenHash {
    TokenHash::from_bytes([number; 32])
}

pub(crate) fn key(number: u8) -> LeaseKey {
    LeaseKey { tenant: tenant(number), backend: BackendId::from_random([number; 10]) }
}

pub(crate) fn backend(number: u8, folder: &str, ca_bytes: usize) -> BackendView {
    BackendView {
        login_generation: 4,
        id: BackendId::from_random([number; 10]),
        name: BackendName::parse(&format!("backend-{number}")).unwrap(),
        target: Target::HashicorpVault(VaultTarget {
            endpoint: Endpoint::parse("endpoint", "https://vault.internal:8200/base").unwrap(),
            namespace: Some("team/a".into()),
            tls: Tls { ca_cert: (ca_bytes > 0).then(|| "x".repeat(ca_bytes)), verify: number > 1 },
            kv: Some(KvMount { path: "team/kv".into(), version: KvVersion::V2 }),
        }),
        mapping: PathMapping::parse([
            (format!("external/{folder}/special"), "kv/data/other".to_owned()),
            (format!("external/{folder}/**"), "kv/data/**".to_owned()),
        ])
        .unwrap(),
        mode: Mode::Proxy,
        sync: SyncSettings::default(),
        enabled: number != 3,
        timeout: Duration::from_millis(5500),
    }
}

fn view_of(owner: u8, generation: Generation, backends: Vec<BackendView>) -> Arc<TenantView> {
    Arc::new(TenantView { tenant: tenant(owner), generation, backends })
}

pub(crate) fn view(owner: u8, generation: Generation) -> Arc<TenantView> {
    view_of(owner, generation, vec![backend(1, "a", 0), backend(2, "b", 0)])
}

/// Whose first backend is synced and prefetched.
pub(crate) fn prefetched_view(owner: u8, generation: Generation) -> Arc<TenantView> {
    let sync = SyncSettings { prefetch: true, interval: Some(Duration::from_secs(60)), ..Default::default() };
    let prefetched = BackendView { mode: Mode::Sync, sync, ..backend(1, "a", 0) };
    view_of(owner, generation, vec![prefetched, backend(2, "b", 0)])
}

/// Of `chunks` chunks.
pub(crate) fn large_view(owner: u8, generation: Generation, chunks: u8) -> Arc<TenantView> {
    let backends = (0..chunks).map(|number| backend(number, &format!("f{number}"), 200 * 1024));
    view_of(owner, generation, backends.collect())
}

pub(crate) fn overlapping_view(owner: u8, generation: Generation) -> Arc<TenantView> {
    view_of(owner, generation, vec![backend(1, "a", 0), backend(2, "a/b", 0)])
}

pub(crate) fn caller(token: u8, owner: u8) -> Arc<Caller> {
    let rule = |path: &str, effect| PolicyRule {
        path: Pattern::parse(path).unwrap(),
        capabilities: vec![Capability::Read, Capability::List],
        effect,
    };
    Arc::new(Caller {
        tenant: tenant(owner),
        token: Some(hash(token)),
        subject: "ci-deployer".into(),
        accessor: "acc_1".into(),
        scopes: vec![Scope::SecretsRead, Scope::FederationRead],
        rules: [rule("external/**", Effect::Allow), rule("external/*/special", Effect::Deny)].into(),
        expires_at: Some(Timestamp::from_millis(-1_234_567)),
    })
}

pub(crate) fn lease(number: u8, id: &str) -> LeasePush {
    LeasePush {
        login_generation: 5,
        key: key(number),
        id: id.into(),
        remaining: Some(Duration::from_secs(600)),
        material: Material::VaultToken("hvs.token".to_owned().into()),
        slice: None,
    }
}

/// What a node makes of the changes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Held {
    pub(crate) views: BTreeMap<TenantId, Arc<TenantView>>,
    /// `None`: told that there is none.
    pub(crate) grants: HashMap<TokenHash, Option<(u64, Arc<Caller>)>>,
    pub(crate) leases: HashMap<LeaseKey, Option<String>>,
    pub(crate) secrets: HashMap<SecretKey, Found>,
    pub(crate) freshness: HashMap<LeaseKey, Freshness>,
    pub(crate) complete: Vec<LeaseKey>,
    pub(crate) revision: u64,
}

impl Held {
    pub(crate) fn apply(&mut self, changes: Vec<Change>, revision: u64) {
        self.revision = revision;
        for change in changes {
            match change {
                Change::View(view) => {
                    self.views.insert(view.tenant.clone(), view);
                }
                Change::ViewGone(tenant) => {
                    self.views.remove(&tenant).expect("only what is held goes");
                }
                Change::Grant(hash, version, caller) => {
                    self.grants.insert(hash, Some((version, caller)));
                }
                Change::GrantGone(hash) => {
                    self.grants.insert(hash, None);
                }
                Change::Lease(push) => {
                    self.leases.insert(push.key, Some(push.id));
                }
                Change::LeaseGone(key, _) => {
                    self.leases.insert(key, None);
                }
                Change::Secret(key, stamp, replica) => {
                    self.secrets.insert(key, Ok((stamp, replica)));
                }
                Change::SecretAbsent(key, absence) => {
                    self.secrets.insert(key, Err(absence));
                }
                Change::SecretGone(hash) => self.secrets.retain(|key, _| key.hash() != hash),
                Change::Freshness(tenant, freshness) => {
                    self.freshness.insert(LeaseKey { tenant, backend: freshness.backend.clone() }, freshness);
                }
                Change::PrefetchComplete(key) => self.complete.push(key),
            }
        }
    }
}
