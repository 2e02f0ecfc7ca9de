//! What nodes are told: views, grants, leases and copies of secrets, as the store and the logins have them now.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt as _;
use scaivault_discovery::{
    Demands, Desired, Found, LeasePush, LeaseRefusal, LeaseState, Mark, NodeIdentity, SecretChange,
    SecretChanges, Source, Surveyed,
};
use scaivault_domain::Error;
use scaivault_domain::access::Caller;
use scaivault_domain::backend::BackendId;
use scaivault_domain::lease::LeaseKey;
use scaivault_domain::path::SecretPath;
use scaivault_domain::replica::{Freshness, SecretKey};
use scaivault_domain::secret::SecretValue;
use scaivault_domain::sync::Mode;
use scaivault_domain::tenant::TenantId;
use scaivault_domain::time::{Clock, Timestamp};
use scaivault_domain::token::TokenHash;
use scaivault_domain::view::{Route, TenantView};
use scaivault_edge::error::grpc::status;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::connections::Connections;
use crate::credentials::{Credentials, NodeLease};
use crate::model::{NodeRecord, SecretHead};
use crate::service::nodes::node_key;
use crate::service::tenants::Tenants;
use crate::service::tokens::Tokens;
use crate::service::{Configuration, Configurations};
use crate::store::{Change, ChangeKind, FeedError, Owner, Records, Revision, Space, StoreError};
use crate::sync::{Copies, SyncStates, stamp};

/// How many changes are read at once.
const FEED_PAGE: usize = 1000;
/// The feed is read at least this often: a hint may be lost.
const FEED_NET: Duration = Duration::from_secs(5);

/// How many changes of secrets are at hand.
const RECENT: usize = 20_000;
/// How many secrets are read at the same time for one node.
const READS: usize = 16;

type Granted = Option<(u64, Arc<Caller>)>;

/// Follows the store and answers what each node should have.
pub struct Publishing {
    records: Records,
    configurations: Arc<Configurations>,
    credentials: Arc<Credentials>,
    connections: Arc<Connections>,
    tenants: Arc<Tenants>,
    tokens: Arc<Tokens>,
    copies: Arc<Copies>,
    states: Arc<SyncStates>,
    clock: Arc<dyn Clock>,
    nudge: watch::Sender<u64>,
    feed: watch::Sender<Mark>,
    followed: Mutex<Followed>,
}

/// What was derived from the store, up to a revision.
#[derive(Default)]
struct Followed {
    revision: Revision,
    grants: HashMap<TokenHash, Granted>,
    views: HashMap<TenantId, Arc<TenantView>>,
    freshness: HashMap<LeaseKey, Arc<Freshness>>,
    recent: Recent,
}

/// The last changes of secrets, so that the streams of many nodes need not read them from the store one by one.
#[derive(Default)]
struct Recent {
    /// What came after this revision is here.
    from: Revision,
    changes: VecDeque<(Revision, Line)>,
}

/// What a line of the feed means for secrets.
#[derive(Clone)]
enum Line {
    Secret(Arc<SecretChange>),
    /// The cycles of this backend know more of paths without a copy.
    AbsentAgain(LeaseKey),
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
    /// The secrets that nodes hold copies of.
    pub copies: Arc<Copies>,
    /// When they were last compared with their backends.
    pub states: Arc<SyncStates>,
    /// Wall time.
    pub clock: Arc<dyn Clock>,
    /// Moved whenever a node may need something.
    pub nudge: watch::Sender<u64>,
}

impl Publishing {
    /// Publishes from the store's present on.
    pub async fn new(parts: Parts) -> Self {
        let revision = parts.records.store().head().await;
        let followed = Followed::from(revision);
        let mark = Mark { revision: revision.as_u64(), concerned: revision.as_u64() };
        Publishing {
            records: parts.records,
            configurations: parts.configurations,
            credentials: parts.credentials,
            connections: parts.connections,
            tenants: parts.tenants,
            tokens: parts.tokens,
            copies: parts.copies,
            states: parts.states,
            clock: parts.clock,
            nudge: parts.nudge,
            feed: watch::Sender::new(mark),
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
                *self.lock() = Followed::from(revision);
                self.nudge.send_modify(|count| *count += 1);
                let revision = revision.as_u64();
                self.feed.send_replace(Mark { revision, concerned: revision });
                return Ok(false);
            }
            Err(error) => return Err(error),
        };
        let mut concerned = None;
        let mut reconfigured = Vec::new();
        let lines = self.lines(&changes.changes).await?;
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
                        followed.freshness.retain(|key, _| key.tenant != *tenant);
                        reconfigured.push(tenant.clone());
                    }
                    (Owner::Tenant(tenant), Space::SyncState) => {
                        followed.freshness.retain(|key, _| {
                            key.tenant != *tenant || key.backend.as_str() != change.key.name
                        });
                    }
                    // What a removed node held is taken out of use.
                    (_, Space::Node) if change.kind == ChangeKind::Deleted => {
                        self.credentials.replace_for_nodes()
                    }
                    (_, Space::Tenant) => {
                        if let Ok(tenant) = TenantId::parse(&change.key.name) {
                            self.credentials.recheck_grants(&tenant);
                        }
                    }
                    (_, Space::Node) => {}
                    _ => continue,
                }
                concerned = Some(change.revision);
            }
            followed.revision = changes.next;
            followed.recent.extend(lines);
        }
        for tenant in reconfigured {
            if let Ok(configuration) = self.configurations.of(&tenant).await {
                self.connections.retain(&tenant, configuration.views());
                self.credentials.retain(&tenant, |key| {
                    configuration.backend(&key.backend).is_ok_and(|(record, _)| record.spec.enabled)
                });
            }
        }
        if concerned.is_some() {
            self.nudge.send_modify(|count| *count += 1);
        }
        self.feed.send_modify(|mark| {
            mark.revision = changes.next.as_u64();
            mark.concerned = concerned.map_or(mark.concerned, Revision::as_u64);
        });
        Ok(changes.next != cursor)
    }

    /// What changes of rows mean for secrets.
    async fn lines(&self, changes: &[Change]) -> Result<Vec<(Revision, Line)>, StoreError> {
        let mut configurations: HashMap<&TenantId, Arc<Configuration>> = HashMap::new();
        let mut lines = Vec::new();
        for change in changes {
            let Owner::Tenant(tenant) = &change.key.owner else { continue };
            match change.key.space {
                Space::Secret => {
                    let Ok(path) = SecretPath::check(&change.key.name) else { continue };
                    let configuration = match configurations.get(tenant) {
                        Some(configuration) => configuration,
                        None => {
                            let read = self.configurations.of(tenant).await?;
                            configurations.entry(tenant).or_insert(read)
                        }
                    };
                    let prefetch = prefetched(&configuration.route(&path));
                    let change_of = SecretChange::new(SecretKey::new(tenant, &path), prefetch);
                    lines.push((change.revision, Line::Secret(Arc::new(change_of))));
                }
                Space::SyncState => {
                    let Ok(backend) = BackendId::parse(&change.key.name) else { continue };
                    let key = LeaseKey { tenant: tenant.clone(), backend };
                    lines.push((change.revision, Line::AbsentAgain(key)));
                }
                _ => {}
            }
        }
        Ok(lines)
    }

    async fn changed_after(&self, cursor: Revision, max: usize) -> Result<Option<SecretChanges>, FeedError> {
        let recent = {
            let followed = self.lock();
            followed.recent.after(cursor, max, followed.revision)
        };
        if let Some(page) = recent {
            return Ok(Some(page));
        }
        let page = match self.records.store().changes(cursor, max).await {
            Ok(page) => page,
            Err(FeedError::Expired) => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut changes = SecretChanges { next: page.next.as_u64(), ..SecretChanges::default() };
        for (_, line) in self.lines(&page.changes).await? {
            line.add_to(&mut changes);
        }
        Ok(Some(changes))
    }

    async fn freshness(&self, key: &LeaseKey) -> Result<Arc<Freshness>, Error> {
        let (known, revision) = {
            let followed = self.lock();
            (followed.freshness.get(key).cloned(), followed.revision)
        };
        if let Some(freshness) = known {
            return Ok(freshness);
        }
        let freshness = Arc::new(self.states.of(key).await?.0.freshness(key));
        self.keep(revision, |followed| followed.freshness.insert(key.clone(), freshness.clone()));
        Ok(freshness)
    }

    async fn find(&self, key: &SecretKey) -> Result<Found, StoreError> {
        let route = self.configurations.of(&key.tenant).await?.route(&key.path);
        let found = self.copies.find(&key.tenant, &key.path, &route).await?;
        Ok(found.map(|(stamp, replica)| (stamp, Arc::new(replica))))
    }

    async fn survey_page(
        &self,
        tenant: &TenantId,
        after: Option<&SecretPath>,
        max: usize,
    ) -> Result<Vec<Surveyed>, StoreError> {
        let configuration = self.configurations.of(tenant).await?;
        let owner = Owner::from(tenant);
        let mut after = after.map(|path| path.as_str().to_owned());
        let mut found = Vec::new();
        while found.len() < max {
            let page = self
                .records
                .scan_page::<SecretHead>(&owner, Space::Secret, "", after.as_deref(), max)
                .await?;
            let last = page.len() < max;
            after = page.last().map(|(name, ..)| name.clone());
            for (name, head, version) in page {
                let Ok(path) = SecretPath::check(&name) else { continue };
                let route = configuration.route(&path);
                let has_copy = match &route {
                    Route::Local => true,
                    Route::Proxied { .. } | Route::Unrepresentable { .. } => false,
                    Route::Synced { backend, .. } => head.copy_of(&backend.id).is_some(),
                };
                if has_copy {
                    found.push(Surveyed { path, stamp: stamp(&head, version), prefetch: prefetched(&route) });
                }
            }
            if last {
                break;
            }
        }
        // The rest of the last page comes again with the next call.
        found.truncate(max);
        Ok(found)
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
        Ok(match self.credentials.for_nodes(key, record.configured()) {
            NodeLease::Pending => LeaseState::Pending,
            NodeLease::Held(lease, slice) => LeaseState::Held(LeasePush {
                key: key.clone(),
                id: lease.id.clone(),
                login_generation: lease.login_generation,
                remaining: lease.expires_at.map(|end| end.saturating_duration_since(Instant::now())),
                material: lease.material.clone(),
                slice,
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
        let mut freshness = BTreeMap::new();
        for (tenant, view) in &views {
            for backend in view.backends.iter().filter(|backend| !backend.rules_in(Mode::Sync).is_empty()) {
                let key = LeaseKey { tenant: tenant.clone(), backend: backend.id.clone() };
                freshness.insert(key.clone(), self.freshness(&key).await?);
            }
        }
        let mut leases = HashMap::new();
        for key in demands.leases.iter().filter(|key| node.tenants.serves(&key.tenant)) {
            leases.insert(key.clone(), self.lease(key).await?);
        }
        let epoch = self.records.store().epoch().to_string();
        Ok(Desired { epoch, revision: revision.as_u64(), views, grants, leases, freshness })
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

impl Followed {
    /// Nothing is derived yet, and the feed is followed from here.
    fn from(revision: Revision) -> Self {
        Followed {
            revision,
            recent: Recent { from: revision, changes: VecDeque::new() },
            ..Followed::default()
        }
    }
}

impl Recent {
    fn extend(&mut self, lines: Vec<(Revision, Line)>) {
        self.changes.extend(lines);
        while self.changes.len() > RECENT
            && let Some((revision, _)) = self.changes.pop_front()
        {
            // A commit may have several lines: without all of them it is not here.
            self.from = revision;
        }
    }

    /// Whole commits after `cursor`, up to `head`; `None` if they are not here.
    fn after(&self, cursor: Revision, max: usize, head: Revision) -> Option<SecretChanges> {
        if cursor < self.from {
            return None;
        }
        let begin = self.changes.partition_point(|(revision, _)| *revision <= cursor);
        let mut page = SecretChanges { next: head.as_u64(), ..SecretChanges::default() };
        let mut last = cursor;
        for (count, (revision, line)) in self.changes.iter().skip(begin).enumerate() {
            if count >= max && *revision != last {
                page.next = last.as_u64();
                break;
            }
            last = *revision;
            line.clone().add_to(&mut page);
        }
        Some(page)
    }
}

impl Line {
    fn add_to(self, page: &mut SecretChanges) {
        match self {
            Line::Secret(change) => page.changes.push(change),
            Line::AbsentAgain(key) => page.absent_again.push(key),
        }
    }
}

/// The backend of a path whose every copy is held by every node.
fn prefetched(route: &Route) -> Option<BackendId> {
    match route {
        Route::Synced { backend, .. } if backend.sync.prefetch => Some(backend.id.clone()),
        Route::Local | Route::Proxied { .. } | Route::Synced { .. } | Route::Unrepresentable { .. } => None,
    }
}

#[async_trait::async_trait]
impl Source for Publishing {
    fn feed(&self) -> watch::Receiver<Mark> {
        self.feed.subscribe()
    }

    async fn changed(&self, cursor: u64, max: usize) -> Result<Option<SecretChanges>, Status> {
        self.changed_after(Revision::from_u64(cursor), max).await.map_err(|error| match error {
            FeedError::Expired => status(Error::internal()),
            FeedError::Store(error) => status(error.into()),
        })
    }

    async fn secrets(
        &self,
        _node: &NodeIdentity,
        keys: &[SecretKey],
        enough: usize,
    ) -> Result<Vec<Found>, Status> {
        let mut found = Vec::new();
        let mut bytes = 0;
        let reads = keys.iter().cloned().map(|key| async move { self.find(&key).await });
        let mut reads = futures::stream::iter(reads).buffered(READS);
        while bytes <= enough
            && let Some(next) = reads.next().await
        {
            let next = next.map_err(|error| status(error.into()))?;
            if let Ok((_, replica)) = &next {
                bytes += replica.value.as_ref().map_or(0, SecretValue::len);
            }
            found.push(next);
        }
        Ok(found)
    }

    async fn survey(
        &self,
        tenant: &TenantId,
        after: Option<&SecretPath>,
        max: usize,
    ) -> Result<Vec<Surveyed>, Status> {
        self.survey_page(tenant, after, max).await.map_err(|error| status(error.into()))
    }

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
            self.credentials.refused_by_backend(key, record.configured(), lease_id);
        }
    }
}
