//! What nodes are told: views, grants and leases, as the store and the logins have them now.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use scaivault_discovery::{Demands, Desired, LeasePush, LeaseRefusal, LeaseState, NodeIdentity, Source};
use scaivault_domain::Error;
use scaivault_domain::access::Caller;
use scaivault_domain::lease::LeaseKey;
use scaivault_domain::tenant::TenantId;
use scaivault_domain::time::{Clock, Timestamp};
use scaivault_domain::token::TokenHash;
use scaivault_domain::view::TenantView;
use scaivault_edge::error::grpc::status;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::connections::Connections;
use crate::credentials::{Credentials, NodeLease};
use crate::model::NodeRecord;
use crate::service::Configurations;
use crate::service::nodes::node_key;
use crate::service::tenants::Tenants;
use crate::service::tokens::Tokens;
use crate::store::{ChangeKind, FeedError, Owner, Records, Revision, Space};

/// How many changes are read at once.
const FEED_PAGE: usize = 1000;
/// The feed is read at least this often: a hint may be lost.
const FEED_NET: Duration = Duration::from_secs(5);

type Granted = Option<(u64, Arc<Caller>)>;

/// Follows the store and answers what each node should have.
pub struct Publishing {
    records: Records,
    configurations: Arc<Configurations>,
    credentials: Arc<Credentials>,
    connections: Arc<Connections>,
    tenants: Arc<Tenants>,
    tokens: Arc<Tokens>,
    clock: Arc<dyn Clock>,
    nudge: watch::Sender<u64>,
    followed: Mutex<Followed>,
}

/// What was derived from the store, up to a revision.
#[derive(Default)]
struct Followed {
    revision: Revision,
    grants: HashMap<TokenHash, Granted>,
    views: HashMap<TenantId, Arc<TenantView>>,
}

impl std::fmt::Debug for Publishing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Publishing").finish_non_exhaustive()
    }
}

/// What a publication is made from.
#[derive(Debug)]
pub struct Parts {
    /// The store.
    pub records: Records,
    /// The configurations that become views.
    pub configurations: Arc<Configurations>,
    /// The logins that become leases.
    pub credentials: Arc<Credentials>,
    /// The control plane's own connections, which end with their backends.
    pub connections: Arc<Connections>,
    /// The tenants.
    pub tenants: Arc<Tenants>,
    /// The tokens that become grants.
    pub tokens: Arc<Tokens>,
    /// Wall time.
    pub clock: Arc<dyn Clock>,
    /// Moved whenever a node may need something.
    pub nudge: watch::Sender<u64>,
}

impl Publishing {
    /// Publishes from the store's present on.
    pub async fn new(parts: Parts) -> Self {
        let followed = Followed { revision: parts.records.store().head().await, ..Followed::default() };
        Publishing {
            records: parts.records,
            configurations: parts.configurations,
            credentials: parts.credentials,
            connections: parts.connections,
            tenants: parts.tenants,
            tokens: parts.tokens,
            clock: parts.clock,
            nudge: parts.nudge,
            followed: Mutex::new(followed),
        }
    }

    /// Follows the feed until told to stop.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        let mut wake = self.records.store().wake();
        loop {
            match self.follow().await {
                Ok(true) => continue,
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(%error, "the store's feed cannot be read; nodes keep what they have")
                }
            }
            tokio::select! {
                () = stop.cancelled() => return,
                _ = tokio::time::timeout(FEED_NET, wake.changed()) => {}
            }
        }
    }

    /// Takes one page of the feed; whether there may be more.
    async fn follow(&self) -> Result<bool, FeedError> {
        let cursor = self.lock().revision;
        let changes = match self.records.store().changes(cursor, FEED_PAGE).await {
            Ok(changes) => changes,
            Err(FeedError::Expired) => {
                let revision = self.records.store().head().await;
                *self.lock() = Followed { revision, ..Followed::default() };
                self.nudge.send_modify(|count| *count += 1);
                return Ok(false);
            }
            Err(error) => return Err(error),
        };
        let mut concerned = false;
        let mut reconfigured = Vec::new();
        {
            let mut followed = self.lock();
            for change in &changes.changes {
                match (&change.key.owner, change.key.space) {
                    (Owner::Installation, Space::Token) => {
                        if let Some(hash) = TokenHash::from_text(&change.key.name) {
                            followed.grants.remove(&hash);
                        }
                    }
                    (Owner::Tenant(tenant), Space::Policy) => {
                        followed.grants.retain(|_, granted| {
                            granted.as_ref().is_none_or(|(_, caller)| caller.tenant != *tenant)
                        });
                    }
                    (Owner::Tenant(tenant), Space::Generation) => {
                        followed.views.remove(tenant);
                        reconfigured.push(tenant.clone());
                    }
                    // What a removed node held is taken out of use.
                    (_, Space::Node) if change.kind == ChangeKind::Deleted => {
                        self.credentials.replace_for_nodes()
                    }
                    (_, Space::Tenant | Space::Node) => {}
                    _ => continue,
                }
                concerned = true;
            }
            followed.revision = changes.next;
        }
        for tenant in reconfigured {
            if let Ok(configuration) = self.configurations.of(&tenant).await {
                self.connections.retain(&tenant, configuration.views());
                self.credentials.retain(&tenant, |key| {
                    configuration.backend(&key.backend).is_ok_and(|(record, _)| record.spec.enabled)
                });
            }
        }
        if concerned {
            self.nudge.send_modify(|count| *count += 1);
        }
        Ok(changes.next != cursor)
    }

    async fn view(&self, tenant: &TenantId) -> Result<Arc<TenantView>, Error> {
        let (known, revision) = {
            let followed = self.lock();
            (followed.views.get(tenant).cloned(), followed.revision)
        };
        if let Some(view) = known {
            return Ok(view);
        }
        let view = Arc::new(self.configurations.of(tenant).await?.view());
        self.keep(revision, |followed| followed.views.insert(tenant.clone(), view.clone()));
        Ok(view)
    }

    async fn grant(&self, hash: TokenHash, now: Timestamp) -> Result<Granted, Error> {
        let (known, revision) = {
            let followed = self.lock();
            (followed.grants.get(&hash).cloned(), followed.revision)
        };
        let granted = match known {
            Some(granted) => granted,
            None => {
                let granted = self.tokens.grant(hash).await?;
                // Only what exists is kept: strangers could name unknown tokens without end.
                if granted.is_some() {
                    self.keep(revision, |followed| followed.grants.insert(hash, granted.clone()));
                }
                granted
            }
        };
        Ok(granted.filter(|(_, caller)| !caller.expired(now)))
    }

    async fn lease(&self, key: &LeaseKey) -> Result<LeaseState, Error> {
        let configuration = self.configurations.of(&key.tenant).await?;
        let Ok((record, _)) = configuration.backend(&key.backend) else {
            return Ok(LeaseState::Refused(LeaseRefusal {
                reason: None,
                message: "the backend is gone".into(),
                retry_after: None,
            }));
        };
        Ok(match self.credentials.for_nodes(key, &record.spec.provider) {
            NodeLease::Pending => LeaseState::Pending,
            NodeLease::Held(lease) => LeaseState::Held(LeasePush {
                key: key.clone(),
                id: lease.id.clone(),
                remaining: lease.expires_at.map(|end| end.saturating_duration_since(Instant::now())),
                material: lease.material.clone(),
            }),
            NodeLease::Refused(error) => LeaseState::Refused(LeaseRefusal {
                reason: Some(error.reason),
                message: error.message.into_owned(),
                retry_after: error.retry_after,
            }),
        })
    }

    async fn everything(&self, node: &NodeIdentity, demands: &Demands) -> Result<Desired, Error> {
        // First the revision, then what it names: what is read may be newer, never older.
        let revision = self.lock().revision;
        if self.records.get::<NodeRecord>(&node_key(&node.name)).await?.is_none() {
            return Err(Error::new(
                scaivault_domain::Reason::Unauthenticated,
                "the node is not enrolled any more",
            ));
        }
        let mut views = BTreeMap::new();
        for tenant in self.tenants.all().await? {
            if node.tenants.serves(&tenant) {
                let view = self.view(&tenant).await?;
                views.insert(tenant, view);
            }
        }
        let now = self.clock.now();
        let mut grants = HashMap::new();
        for hash in &demands.grants {
            let granted = self.grant(*hash, now).await?;
            // A token of a tenant that the node does not serve is unknown there.
            grants.insert(*hash, granted.filter(|(_, caller)| node.tenants.serves(&caller.tenant)));
        }
        let mut leases = HashMap::new();
        for key in demands.leases.iter().filter(|key| node.tenants.serves(&key.tenant)) {
            leases.insert(key.clone(), self.lease(key).await?);
        }
        let epoch = self.records.store().epoch().to_string();
        Ok(Desired { epoch, revision: revision.as_u64(), views, grants, leases })
    }

    /// Keeps what was read, unless the feed has moved since: then it may be older than what the feed said, and keeping
    /// it would undo a revocation.
    fn keep<T>(&self, read_at: Revision, keep: impl FnOnce(&mut Followed) -> T) {
        let mut followed = self.lock();
        if followed.revision == read_at {
            keep(&mut followed);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Followed> {
        self.followed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait::async_trait]
impl Source for Publishing {
    fn wake(&self) -> watch::Receiver<u64> {
        self.nudge.subscribe()
    }

    async fn desired(&self, node: &NodeIdentity, demands: &Demands) -> Result<Desired, Status> {
        self.everything(node, demands).await.map_err(status)
    }

    async fn lease_refused(&self, node: &NodeIdentity, key: &LeaseKey, lease_id: &str) {
        if !node.tenants.serves(&key.tenant) {
            return;
        }
        let Ok(configuration) = self.configurations.of(&key.tenant).await else { return };
        if let Ok((record, _)) = configuration.backend(&key.backend) {
            self.credentials.refused_by_backend(key, &record.spec.provider, lease_id);
        }
    }
}
