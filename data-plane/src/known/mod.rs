//! What the control plane told this node: views, grants and copies, which outlive the process in the cache, and leases,
//! which do not.
//!
//! The stream applies changes here; requests read here and, where something is missing, demand it and wait.

mod budgets;
mod copies;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use arc_swap::ArcSwap;
use moka::sync::Cache;
use scaivault_backends::Lease;
use scaivault_backends::budget::Budget;
use scaivault_backends::connection::Leases;
use scaivault_discovery::{Change, Demand, LeaseRefusal, Sink};
use scaivault_domain::access::Caller;
use scaivault_domain::backend::Target;
use scaivault_domain::lease::LeaseKey;
use scaivault_domain::replica::{Absence, Replica, SecretKey};
use scaivault_domain::tenant::TenantId;
use scaivault_domain::time::{Clock, Timestamp};
use scaivault_domain::token::{TokenHash, hash_token};
use scaivault_domain::view::{Generation, MountTable, Route};
use scaivault_domain::{Error, Reason};
use scaivault_edge::auth::Verifier;
use secrecy::SecretString;
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout};

use self::budgets::Budgets;
pub use self::copies::{Copies, Reach, Remembered};

/// How long a node that starts with what it held waits for the control plane before it is ready without.
const FIRST_CONTACT: Duration = Duration::from_secs(1);
/// How long a request waits for a copy that was demanded.
const SECRET_WAIT: Duration = Duration::from_secs(2);
/// How long a request waits for a grant that was demanded.
const GRANT_WAIT: Duration = Duration::from_secs(2);
/// How long a token is remembered as unknown.
const UNKNOWN_FOR: Duration = Duration::from_secs(5);
/// Most tokens that are remembered as unknown.
const UNKNOWN: u64 = 100_000;
/// Most demands for unknown tokens at once: strangers must not fill the stream.
const DEMANDS: usize = 256;
/// How long a refused lease is not demanded again.
const LEASE_PAUSE: Duration = Duration::from_secs(1);

/// One generation of a tenant's configuration, ready to route.
#[derive(Debug)]
pub struct View {
    /// Which one.
    pub generation: Generation,
    /// Where paths live.
    pub mounts: MountTable,
}

/// Told of each new view of a tenant.
type Retain = Box<dyn Fn(&TenantId, &MountTable) + Send + Sync>;

enum HeldLease {
    Held(Arc<Lease>),
    Refused(LeaseRefusal, Instant),
}

/// What this node knows.
pub struct Known {
    clock: Arc<dyn Clock>,
    started: Instant,
    views: ArcSwap<HashMap<TenantId, Arc<View>>>,
    grants: RwLock<HashMap<TokenHash, Arc<Caller>>>,
    unknown: Cache<TokenHash, ()>,
    leases: RwLock<HashMap<LeaseKey, HeldLease>>,
    budgets: Budgets,
    demands: mpsc::Sender<Demand>,
    /// Unknown tokens that are being asked for, and by how many requests.
    asking: Mutex<HashMap<TokenHash, usize>>,
    /// The revision up to which everything is in force. Sent after every applied response; whoever waits looks again.
    applied: watch::Sender<u64>,
    link: watch::Sender<Link>,
    copies: Copies,
    confirmed: Mutex<Confirmed>,
    patience: Patience,
    retain: Retain,
}

/// How long what is held is trusted without the control plane.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// What tokens may do.
    pub grants: Duration,
    /// Copies of secrets.
    pub values: Duration,
}

/// When the control plane last confirmed what is held.
struct Confirmed {
    /// By the clock that is never turned, for as long as this process has run.
    at: Instant,
    /// How long before that, if it was an earlier process.
    before: Duration,
    epoch: String,
    revision: u64,
}

impl Confirmed {
    fn elapsed(&self) -> Duration {
        self.at.elapsed() + self.before
    }
}

/// The stream to the control plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// There has been none since the start.
    Starting,
    /// It is up, and nothing was applied yet.
    Up,
    /// It is up, and what was applied is in force.
    Ready,
    /// It ended; what was applied stays in force.
    Down,
}

impl fmt::Debug for Known {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Known").field("link", &*self.link.borrow()).finish_non_exhaustive()
    }
}

impl Known {
    /// Knows what an earlier run remembered; what is missing is asked for through `demands`.
    pub fn new(
        clock: Arc<dyn Clock>,
        demands: mpsc::Sender<Demand>,
        copies: Copies,
        remembered: Remembered,
        patience: Patience,
    ) -> Self {
        let now = clock.now();
        let confirmed = Confirmed {
            at: Instant::now(),
            before: remembered.confirmed.map_or(Duration::ZERO, |confirmed| now.since(confirmed)),
            epoch: remembered.restored.epoch,
            revision: 0,
        };
        let views = remembered.views.into_iter().map(|view| {
            let mounts = MountTable::new(view.backends);
            (view.tenant, Arc::new(View { generation: view.generation, mounts }))
        });
        Known {
            clock,
            started: Instant::now(),
            views: ArcSwap::from_pointee(views.collect()),
            grants: RwLock::new(remembered.grants.into_iter().collect()),
            unknown: Cache::builder().max_capacity(UNKNOWN).time_to_live(UNKNOWN_FOR).build(),
            leases: RwLock::default(),
            budgets: Budgets::default(),
            demands,
            asking: Mutex::default(),
            confirmed: Mutex::new(confirmed),
            copies,
            applied: watch::Sender::new(0),
            link: watch::Sender::new(Link::Starting),
            patience,
            retain: Box::new(|_, _| {}),
        }
    }

    /// Calls `retain` with each new view, for what is kept per backend.
    #[must_use]
    pub fn on_view(mut self, retain: impl Fn(&TenantId, &MountTable) + Send + Sync + 'static) -> Self {
        self.retain = Box::new(retain);
        self
    }

    /// The view of a tenant.
    ///
    /// # Errors
    /// `unavailable` before the first view, `permission_denied` for a tenant that the node does not serve.
    pub fn view(&self, tenant: &TenantId) -> Result<Arc<View>, Error> {
        if let Some(view) = self.views.load().get(tenant) {
            return Ok(view.clone());
        }
        match *self.link.borrow() {
            Link::Ready | Link::Down => Err(Error::new(
                Reason::PermissionDenied,
                "there is no such tenant, or the node does not serve it",
            )
            .next("use a node of your tenant")),
            Link::Starting | Link::Up => {
                Err(Error::new(Reason::Unavailable, "the node has no configuration yet")
                    .next("try again")
                    .retry_after(Duration::from_secs(1)))
            }
        }
    }

    /// Whether any tenant can be served.
    pub fn serves(&self) -> bool {
        !self.views.load().is_empty()
    }

    /// The stream's state.
    pub fn link(&self) -> Link {
        *self.link.borrow()
    }

    /// Whether the node has only just started and may hear from the control plane at any moment: until then it is not
    /// ready, because what it cannot serve by itself would fail.
    pub fn is_settling(&self) -> bool {
        self.link() == Link::Starting && self.started.elapsed() < FIRST_CONTACT
    }

    /// Waits until something was applied.
    pub async fn ready(&self) {
        // The sender is in `self`, so the wait only ends as it should.
        let _ = self.link.subscribe().wait_for(|link| *link == Link::Ready).await;
    }

    /// Waits until everything up to `revision` is in force here, at most for `patience`; whether it is.
    pub async fn in_force(&self, revision: u64, patience: Duration) -> bool {
        let mut applied = self.applied.subscribe();
        timeout(patience, applied.wait_for(|known| *known >= revision)).await.is_ok_and(|known| known.is_ok())
    }

    /// How many leases are held.
    pub fn leases_held(&self) -> usize {
        let leases = self.leases.read().unwrap_or_else(PoisonError::into_inner);
        leases.values().filter(|lease| matches!(lease, HeldLease::Held(_))).count()
    }

    async fn grant(&self, hash: TokenHash) -> Result<Arc<Caller>, Error> {
        if let Some(caller) = self.granted(hash) {
            self.check_online(self.patience.grants)?;
            if caller.expired(self.clock.now()) {
                return Err(unauthenticated());
            }
            return Ok(caller);
        }
        if self.unknown.contains_key(&hash) {
            return Err(unauthenticated());
        }
        if !self.is_linked() {
            return Err(no_control_plane(
                "the token is not known here, and the control plane cannot be asked",
            ));
        }
        let Some(_asking) = Asking::begin(&self.asking, hash) else {
            return Err(Error::new(Reason::RateLimited, "too many unknown tokens at once")
                .next("try again")
                .retry_after(Duration::from_secs(1)));
        };
        let mut link = self.link.subscribe();
        let arrived = async {
            let mut applied = self.applied.subscribe();
            self.demand(Demand::Grant(hash)).await;
            loop {
                if let Some(caller) = self.granted(hash) {
                    return Ok(caller);
                }
                if self.unknown.contains_key(&hash) {
                    return Err(unauthenticated());
                }
                tokio::select! {
                    applied = applied.changed() => applied.map_err(|_| Error::internal())?,
                    _ = link.wait_for(|link| matches!(link, Link::Down)) => {
                        return Err(no_control_plane("the control plane went away while it was asked for the token"));
                    }
                }
            }
        };
        timeout(GRANT_WAIT, arrived).await.unwrap_or_else(|_| {
            Err(no_control_plane("the control plane did not say in time what the token may do"))
        })
    }

    fn granted(&self, hash: TokenHash) -> Option<Arc<Caller>> {
        self.grants.read().unwrap_or_else(PoisonError::into_inner).get(&hash).cloned()
    }

    fn is_linked(&self) -> bool {
        matches!(*self.link.borrow(), Link::Up | Link::Ready)
    }

    fn check_online(&self, patience: Duration) -> Result<(), Error> {
        if *self.link.borrow() == Link::Ready {
            return Ok(());
        }
        // A stream that says nothing confirms nothing.
        let offline = self.confirmed.lock().unwrap_or_else(PoisonError::into_inner).elapsed();
        match offline > patience {
            true => Err(Error::new(
                Reason::OfflineTooLong,
                "the node has been without its control plane for too long",
            )
            .next("restore the connection of the node to the control plane")
            .retry_after(Duration::from_secs(5))),
            false => Ok(()),
        }
    }

    /// Whether the control plane can be asked.
    pub fn reach(&self) -> Reach {
        if self.is_linked() { Reach::Linked } else { Reach::Alone }
    }

    /// Refuses to serve copies after too long a time without the control plane.
    ///
    /// # Errors
    /// `offline_too_long`.
    pub fn check_values(&self) -> Result<(), Error> {
        self.check_online(self.patience.values)
    }

    /// Demands what the path of this route has and waits for it: a copy, or the reason why there is none. Everybody who
    /// waits for it shares the demand. `None`: the configuration has changed meanwhile, and the path may have another route.
    ///
    /// # Errors
    /// `control_plane_unavailable` if nobody can be asked.
    pub async fn copy(
        &self,
        key: &SecretKey,
        route: &Route,
        generation: Generation,
    ) -> Result<Option<Result<Replica, Absence>>, Error> {
        if !self.is_linked() {
            return Err(no_control_plane(
                "the secret is not held here, and the control plane cannot be asked for it",
            ));
        }
        let mut link = self.link.subscribe();
        let arrived = async {
            let mut applied = self.applied.subscribe();
            self.demand(Demand::Secret(key.clone())).await;
            loop {
                if let Some(found) = self.copies.look(key, route, generation, Reach::Linked) {
                    return Ok(Some(found));
                }
                if self.view(&key.tenant).is_ok_and(|view| view.generation != generation) {
                    return Ok(None);
                }
                tokio::select! {
                    applied = applied.changed() => applied.map_err(|_| Error::internal())?,
                    _ = link.wait_for(|link| matches!(link, Link::Down)) => {
                        return Err(no_control_plane("the control plane went away while it was asked for the secret"));
                    }
                }
            }
        };
        timeout(SECRET_WAIT, arrived)
            .await
            .unwrap_or_else(|_| Err(no_control_plane("the control plane did not give the secret in time")))
    }

    /// The copies of secrets.
    pub fn copies(&self) -> &Copies {
        &self.copies
    }

    /// The wall time.
    pub fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// Writes down that the control plane still confirms what is held, also if nothing has changed for long.
    pub fn confirm(&self) {
        if *self.link.borrow() == Link::Ready {
            let (epoch, revision) = {
                let mut confirmed = self.confirmed.lock().unwrap_or_else(PoisonError::into_inner);
                confirmed.at = Instant::now();
                confirmed.before = Duration::ZERO;
                (confirmed.epoch.clone(), confirmed.revision)
            };
            let now = self.clock.now();
            off_the_runtime(|| self.copies.keep(Vec::new(), &epoch, revision, now));
        }
    }

    async fn demand(&self, demand: Demand) {
        // The stream's task lives as long as the process; when it is gone, nobody waits for an answer either.
        let _ = self.demands.send(demand).await;
    }

    /// Forgets grants that are over, and gives their demands up.
    pub async fn sweep(&self) {
        let now = self.clock.now();
        let over: Vec<TokenHash> = {
            let mut grants = self.grants.write().unwrap_or_else(PoisonError::into_inner);
            grants.extract_if(|_, caller| caller.expired(now)).map(|(hash, _)| hash).collect()
        };
        if !over.is_empty() {
            off_the_runtime(|| self.copies.forget_grants(&over));
        }
        for hash in over {
            self.demand(Demand::DropGrant(hash)).await;
        }
    }
}

#[async_trait::async_trait]
impl Verifier for Known {
    async fn verify(&self, token: &SecretString) -> Result<Arc<Caller>, Error> {
        let hash = hash_token(token).ok_or_else(unauthenticated)?;
        self.grant(hash).await
    }
}

impl Leases for Known {
    async fn lease(
        &self,
        key: &LeaseKey,
        generation: Generation,
        refused: Option<&str>,
    ) -> Result<Arc<Lease>, Error> {
        if let Some(id) = refused {
            self.forget_refused(key, id);
        }
        let mut applied = self.applied.subscribe();
        let mut demanded = false;
        loop {
            match self.held(key, generation, refused) {
                Some(Ok(lease)) => return Ok(lease),
                // The connection is to what the backend was before.
                None if self.holds_later(key, generation) => return Err(Error::reconfigured()),
                Some(Err(error)) if demanded => return Err(error),
                Some(Err(error)) if !self.may_ask_again(key) => return Err(error),
                _ => {}
            }
            if !self.is_linked() {
                return Err(no_lease(
                    "the node has no credential for the backend, and the control plane cannot be asked",
                ));
            }
            if !demanded {
                demanded = true;
                self.forget_refusal(key);
                applied.borrow_and_update();
                self.demand(Demand::Lease { key: key.clone(), refused_id: refused.map(str::to_owned) }).await;
                continue;
            }
            let mut link = self.link.subscribe();
            tokio::select! {
                applied = applied.changed() => applied.map_err(|_| Error::internal())?,
                _ = link.wait_for(|link| matches!(link, Link::Down)) => {}
            }
        }
    }

    fn budget(&self, key: &LeaseKey, target: &Target) -> Arc<Budget> {
        self.budgets.of(key, target)
    }
}

impl Known {
    /// What is held for `key`, if it can be used.
    fn held(
        &self,
        key: &LeaseKey,
        generation: Generation,
        refused: Option<&str>,
    ) -> Option<Result<Arc<Lease>, Error>> {
        let leases = self.leases.read().unwrap_or_else(PoisonError::into_inner);
        match leases.get(key)? {
            // The right one is on its way; this one must not go there.
            HeldLease::Held(lease) if lease.login_generation != generation => None,
            HeldLease::Held(lease)
                if refused != Some(lease.id.as_str())
                    && lease.expires_at.is_none_or(|end| end > Instant::now()) =>
            {
                Some(Ok(lease.clone()))
            }
            HeldLease::Held(_) => None,
            HeldLease::Refused(refusal, _) => {
                let mut error =
                    Error::new(refusal.reason.unwrap_or(Reason::NoLease), refusal.message.clone())
                        .next("see the backend's status");
                error.retry_after = refusal.retry_after;
                Some(Err(error))
            }
        }
    }

    fn holds_later(&self, key: &LeaseKey, generation: Generation) -> bool {
        let leases = self.leases.read().unwrap_or_else(PoisonError::into_inner);
        matches!(leases.get(key), Some(HeldLease::Held(lease)) if lease.login_generation > generation)
    }

    fn may_ask_again(&self, key: &LeaseKey) -> bool {
        let leases = self.leases.read().unwrap_or_else(PoisonError::into_inner);
        match leases.get(key) {
            Some(HeldLease::Refused(refusal, at)) => {
                at.elapsed() >= refusal.retry_after.unwrap_or(LEASE_PAUSE)
            }
            _ => true,
        }
    }

    /// A lease that the backend refused for one is refused for all.
    fn forget_refused(&self, key: &LeaseKey, id: &str) {
        let mut leases = self.leases.write().unwrap_or_else(PoisonError::into_inner);
        if matches!(leases.get(key), Some(HeldLease::Held(lease)) if lease.id == id) {
            leases.remove(key);
        }
    }

    /// Gives up the leases of a tenant's backends that are gone or disabled.
    fn drop_leases(&self, tenant: &TenantId, mounts: &MountTable) {
        let mut leases = self.leases.write().unwrap_or_else(PoisonError::into_inner);
        let used = |key: &LeaseKey| {
            key.tenant != *tenant
                || mounts.backends().iter().any(|backend| backend.id == key.backend && backend.enabled)
        };
        self.budgets.retain(used);
        for (key, _) in leases.extract_if(|key, _| !used(key)) {
            // A full channel costs a demand that stays open, nothing more.
            let _ = self.demands.try_send(Demand::DropLease(key));
        }
    }

    fn forget_refusal(&self, key: &LeaseKey) {
        let mut leases = self.leases.write().unwrap_or_else(PoisonError::into_inner);
        if matches!(leases.get(key), Some(HeldLease::Refused(..))) {
            leases.remove(key);
        }
    }

    fn apply_one(&self, change: Change) {
        match change {
            Change::View(view) => {
                let mounts = MountTable::new(view.backends.iter().cloned());
                (self.retain)(&view.tenant, &mounts);
                self.drop_leases(&view.tenant, &mounts);
                let swapped = Arc::new(View { generation: view.generation, mounts });
                self.views.rcu(|views| {
                    let mut views = HashMap::clone(views);
                    views.insert(view.tenant.clone(), swapped.clone());
                    views
                });
            }
            Change::ViewGone(tenant) => {
                (self.retain)(&tenant, &MountTable::default());
                self.drop_leases(&tenant, &MountTable::default());
                self.views.rcu(|views| {
                    let mut views = HashMap::clone(views);
                    views.remove(&tenant);
                    views
                });
            }
            Change::Grant(hash, _, caller) => {
                self.unknown.invalidate(&hash);
                self.grants.write().unwrap_or_else(PoisonError::into_inner).insert(hash, caller);
            }
            Change::GrantGone(hash) => {
                // In this order: a reader between the two must find nothing that lets it in.
                self.unknown.insert(hash, ());
                self.grants.write().unwrap_or_else(PoisonError::into_inner).remove(&hash);
                // A full channel costs a demand that stays open, nothing more.
                let _ = self.demands.try_send(Demand::DropGrant(hash));
            }
            Change::Lease(push) => {
                self.budgets.take(&push.key, push.slice);
                let lease = Lease {
                    id: push.id,
                    login_generation: push.login_generation,
                    material: push.material,
                    expires_at: push.remaining.map(|remaining| Instant::now() + remaining),
                };
                let held = HeldLease::Held(Arc::new(lease));
                self.leases.write().unwrap_or_else(PoisonError::into_inner).insert(push.key, held);
            }
            Change::LeaseGone(key, refusal) => {
                let refused = HeldLease::Refused(refusal, Instant::now());
                self.leases.write().unwrap_or_else(PoisonError::into_inner).insert(key, refused);
            }
            // Of these there is nothing but the copies.
            Change::Secret(..)
            | Change::SecretAbsent(..)
            | Change::SecretGone(_)
            | Change::Freshness(..)
            | Change::PrefetchComplete(_) => {}
        }
    }
}

impl Sink for Known {
    fn apply(&self, changes: Vec<Change>, epoch: &str, revision: u64) {
        let mut writes = Vec::new();
        let generation = |tenant: &TenantId| self.views.load().get(tenant).map_or(0, |view| view.generation);
        for change in changes {
            self.copies.take(&change, generation, &mut writes);
            self.apply_one(change);
        }
        let now = self.clock.now();
        off_the_runtime(|| self.copies.keep(writes, epoch, revision, now));
        *self.confirmed.lock().unwrap_or_else(PoisonError::into_inner) =
            Confirmed { at: Instant::now(), before: Duration::ZERO, epoch: epoch.to_owned(), revision };
        self.link.send_if_modified(|link| std::mem::replace(link, Link::Ready) != Link::Ready);
        self.applied.send_replace(revision);
    }

    fn connected(&self) {
        self.copies.begin_stream();
        self.link.send_replace(Link::Up);
    }

    fn disconnected(&self) {
        self.link.send_if_modified(|link| {
            if *link == Link::Ready {
                // Up to now everything that had changed would have come.
                self.confirmed.lock().unwrap_or_else(PoisonError::into_inner).at = Instant::now();
            }
            std::mem::replace(link, Link::Down) != Link::Down
        });
    }

    fn expelled(&self) {
        tracing::error!("the control plane does not know this node: what it held is forgotten");
        let views = self.views.swap(Arc::default());
        self.leases.write().unwrap_or_else(PoisonError::into_inner).clear();
        self.budgets.retain(|_| false);
        let grants = std::mem::take(&mut *self.grants.write().unwrap_or_else(PoisonError::into_inner));
        self.copies.forget(views.keys().cloned(), grants.into_keys());
        self.link.send_replace(Link::Starting);
    }
}

/// A request's part in asking for an unknown token. Requests with the same token share one place.
struct Asking<'k> {
    all: &'k Mutex<HashMap<TokenHash, usize>>,
    hash: TokenHash,
}

impl<'k> Asking<'k> {
    /// `None` if too many other tokens are being asked for.
    fn begin(all: &'k Mutex<HashMap<TokenHash, usize>>, hash: TokenHash) -> Option<Self> {
        let mut asking = all.lock().unwrap_or_else(PoisonError::into_inner);
        if asking.len() >= DEMANDS && !asking.contains_key(&hash) {
            return None;
        }
        *asking.entry(hash).or_default() += 1;
        Some(Asking { all, hash })
    }
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        let mut asking = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = asking.get_mut(&self.hash) {
            *count -= 1;
            if *count == 0 {
                asking.remove(&self.hash);
            }
        }
    }
}

/// Does work that may wait for the disk without holding others up.
fn off_the_runtime<T>(work: impl FnOnce() -> T) -> T {
    match Handle::try_current().map(|runtime| runtime.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        _ => work(),
    }
}

fn unauthenticated() -> Error {
    Error::new(Reason::Unauthenticated, "the token is unknown, expired or revoked")
        .next("use a current token in `Authorization: Bearer …`")
}

fn no_control_plane(message: &'static str) -> Error {
    Error::new(Reason::ControlPlaneUnavailable, message).next("try again").retry_after(Duration::from_secs(1))
}

fn no_lease(message: &'static str) -> Error {
    Error::new(Reason::NoLease, message).next("try again").retry_after(Duration::from_secs(1))
}

#[cfg(test)]
mod tests {
    use scaivault_domain::access::Scope;
    use scaivault_domain::time::Timestamp;
    use scaivault_domain::token::token_from_random;

    use super::*;
    use crate::cache::{Cache, CacheConfig};

    const EPOCH: &str = "e";

    struct Noon;

    impl Clock for Noon {
        fn now(&self) -> Timestamp {
            Timestamp::from_millis(1_000_000)
        }
    }

    fn known() -> (Arc<Known>, mpsc::Receiver<Demand>) {
        let (demands, demanded) = mpsc::channel(16);
        let keyring = Arc::new(scaivault_seal::Keyring::generate());
        // In no directory: what a test holds is in memory.
        let config = CacheConfig::new("/dev/null/cache", keyring, Arc::new(Noon));
        let copies = Copies::new(Arc::new(Cache::open(config).unwrap().cache), |_| {});
        let hour = Duration::from_secs(3600);
        let patience = Patience { grants: hour, values: hour };
        (Arc::new(Known::new(Arc::new(Noon), demands, copies, Remembered::default(), patience)), demanded)
    }

    fn caller() -> Arc<Caller> {
        Arc::new(Caller {
            tenant: TenantId::parse("t").unwrap(),
            token: None,
            subject: "s".into(),
            accessor: "a".into(),
            scopes: vec![Scope::SecretsRead],
            rules: [].into(),
            expires_at: None,
        })
    }

    #[tokio::test(start_paused = true)]
    async fn an_unknown_token_without_the_control_plane_is_unavailable_and_not_refused() {
        let (known, _demanded) = known();
        let refused = known.verify(&token_from_random([1; 32])).await.expect_err("nobody can be asked");
        assert_eq!(refused.reason, Reason::ControlPlaneUnavailable);
        let malformed = known.verify(&"svt_nonsense".into()).await.expect_err("not a token");
        assert_eq!(malformed.reason, Reason::Unauthenticated);
    }

    #[tokio::test(start_paused = true)]
    async fn a_grant_is_demanded_once_known_and_gone_when_revoked() {
        let (known, mut demanded) = known();
        known.connected();
        let token = token_from_random([2; 32]);
        let hash = hash_token(&token).unwrap();
        let asking = tokio::spawn({
            let (known, token) = (known.clone(), token.clone());
            async move { known.verify(&token).await }
        });
        assert_eq!(demanded.recv().await, Some(Demand::Grant(hash)));
        known.apply(vec![Change::Grant(hash, 1, caller())], EPOCH, 1);
        assert_eq!(asking.await.unwrap().unwrap().subject, "s");
        known.apply(vec![Change::GrantGone(hash)], EPOCH, 2);
        assert_eq!(known.verify(&token).await.expect_err("revoked").reason, Reason::Unauthenticated);
    }

    #[tokio::test(start_paused = true)]
    async fn another_slice_of_the_budget_is_no_other_lease() {
        let (known, mut demanded) = known();
        known.connected();
        let backend = scaivault_domain::backend::BackendId::from_random([1; 10]);
        let key = LeaseKey { tenant: TenantId::parse("t").unwrap(), backend };
        let push = |parties| {
            let share = scaivault_domain::budget::Share::among(parties);
            Change::Lease(scaivault_discovery::LeasePush {
                key: key.clone(),
                id: "l1".into(),
                login_generation: 0,
                remaining: None,
                material: scaivault_backends::Material::VaultToken("token".to_owned().into()),
                slice: Some(scaivault_domain::budget::Slice { budget: "b1".into(), share }),
            })
        };
        for parties in [2, 3] {
            known.apply(vec![push(parties)], EPOCH, 1);
            assert_eq!(known.lease(&key, 0, None).await.unwrap().id, "l1");
        }
        assert!(demanded.try_recv().is_err(), "nobody has asked for another login");
    }

    #[tokio::test(start_paused = true)]
    async fn a_credential_is_given_to_no_connection_of_another_login() {
        let (known, _demanded) = known();
        known.connected();
        let backend = scaivault_domain::backend::BackendId::from_random([1; 10]);
        let key = LeaseKey { tenant: TenantId::parse("t").unwrap(), backend };
        let push = |id: &str, login_generation| {
            Change::Lease(scaivault_discovery::LeasePush {
                key: key.clone(),
                id: id.into(),
                login_generation,
                remaining: None,
                material: scaivault_backends::Material::VaultToken("token".to_owned().into()),
                slice: None,
            })
        };
        known.apply(vec![push("before", 3)], EPOCH, 1);
        assert_eq!(known.lease(&key, 3, None).await.unwrap().id, "before");
        // The view came first: its credential is waited for, the one before is not taken.
        let waiting = tokio::spawn({
            let (known, key) = (known.clone(), key.clone());
            async move { known.lease(&key, 4, None).await }
        });
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(!waiting.is_finished());
        known.apply(vec![push("after", 4)], EPOCH, 2);
        assert_eq!(waiting.await.unwrap().unwrap().id, "after");
        // A request that began before the change does not get what came after it.
        let late = known.lease(&key, 3, Some("before")).await.expect_err("another login by now");
        assert_eq!(late.reason, Reason::NoLease);
    }

    #[tokio::test(start_paused = true)]
    async fn a_known_token_works_offline_but_not_for_ever() {
        let (known, _demanded) = known();
        let token = token_from_random([3; 32]);
        known.connected();
        known.apply(vec![Change::Grant(hash_token(&token).unwrap(), 1, caller())], EPOCH, 1);
        known.disconnected();
        assert!(known.verify(&token).await.is_ok());
        tokio::time::advance(Duration::from_secs(3601)).await;
        assert_eq!(known.verify(&token).await.expect_err("too long").reason, Reason::OfflineTooLong);
        known.connected();
        assert!(known.verify(&token).await.is_err(), "a stream that says nothing confirms nothing");
        known.apply(Vec::new(), EPOCH, 2);
        assert!(known.verify(&token).await.is_ok());
    }
}
