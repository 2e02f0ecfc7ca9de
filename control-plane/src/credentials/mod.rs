//! Credentials of backends: logins, and the leases that nodes get.
//!
//! The control plane logs in once per backend for itself and once for all nodes: the second login is the lease. What a
//! login needs is a local secret of the same tenant; it is read at use and again after a refusal, so a rotation heals
//! itself. A login is renewed at half of its life.

mod aws;
mod azure;
mod bearer;
mod budgets;
mod gcp;
mod login;
pub mod own;
mod vault;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use scaivault_backends::budget::{Budget, Quotas};
use scaivault_backends::connection::Leases;
use scaivault_backends::{BackendError, Egress, Lease};
use scaivault_domain::audit::{Action, AuditRow};
use scaivault_domain::backend::{Provider, Target};
use scaivault_domain::budget::Slice;
use scaivault_domain::lease::{LeaseKey, Material};
use scaivault_domain::path::SecretPath;
use scaivault_domain::secret::SecretValue;
use scaivault_domain::tenant::TenantId;
use scaivault_domain::time::Timestamp;
use scaivault_domain::view::{Generation, Route};
use scaivault_domain::{Error, Reason};
use tokio::sync::watch;
use tokio::time::Instant;

pub use self::budgets::Budgets;
use self::budgets::Shared;
use self::own::OwnIdentities;
use crate::audit::{Audit, unique};
use crate::model::TenantRecord;
use crate::service::tenants::tenant_key;
use crate::service::{Configurations, secrets};
use crate::store::Records;

/// How long a failed login is not tried again, and one whose outcome had ended when it came.
const PAUSE: Duration = Duration::from_secs(1);
/// A token service that asks for more than this is asked again anyway.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// How often it is looked whether a tenant may still use an identity of ours, however long what it gave lasts.
const GRANT_IS_TRUSTED_FOR: Duration = Duration::from_secs(3600);
/// After how many logins in a row, each of which gave what the backend refused within [`PAUSE`], another one is in vain.
/// Without that each read would be a login where logins succeed and are good for nothing.
const IN_VAIN: u32 = 2;
/// How long one login may take.
const LOGIN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a replaced lease still works, for the reads that have just begun with it.
const GRACE: Duration = Duration::from_secs(60);
/// The longest life of a login that is believed.
const LONGEST_LIFE: Duration = Duration::from_secs(365 * 24 * 3600);
/// The shortest time between two renewals, whatever a backend says.
const SHORTEST_RENEWAL: Duration = Duration::from_millis(500);

/// Who a login is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Holder {
    /// This process.
    ControlPlane,
    /// All nodes together.
    Nodes,
}

/// Who logs in, and with what of ours.
pub(crate) struct Asking<'a> {
    pub(crate) key: &'a LeaseKey,
    pub(crate) holder: Holder,
    pub(crate) own: &'a OwnIdentities,
    pub(crate) egress: &'a Egress,
    pub(crate) now: Timestamp,
}

/// A login that succeeded.
pub(crate) struct Issued {
    pub(crate) material: Material,
    /// How long it lasts; `None`: it does not end.
    pub(crate) ttl: Option<Duration>,
    pub(crate) renewal: Renewal,
    pub(crate) revocation: Revocation,
}

/// What is done at half of a login's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Renewal {
    /// It is renewed; when that no longer helps, there is another login.
    Renew,
    /// There is another login.
    Again,
}

/// What is done when a login is no longer needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Revocation {
    /// It is revoked: it was made for us.
    Revoke,
    /// It stays: it is the configured credential itself.
    Leave,
}

struct Held {
    lease: Arc<Lease>,
    ttl: Option<Duration>,
    renewal: Renewal,
    revocation: Revocation,
    since: Instant,
    /// How many in a row, up to this one, were got because the one before was refused at once.
    streak: u32,
}

impl Held {
    /// The streak of the next one, if this one is refused now.
    fn streak_if_refused(&self) -> u32 {
        if self.since.elapsed() < PAUSE { self.streak + 1 } else { 1 }
    }
}

#[derive(Clone)]
enum State {
    Empty,
    Held(Arc<Held>),
    /// The login failed, or was in vain: then the streak goes on with the next one.
    Failed {
        error: Error,
        at: Instant,
        streak: u32,
    },
}

/// Which lease will not do.
#[derive(Clone, Copy)]
enum Other<'a> {
    /// Any will.
    Any,
    /// The backend refused this one.
    Refused(&'a str),
    /// This one is to be replaced, although it is good.
    Replaced(&'a str),
}

impl Other<'_> {
    fn id(&self) -> Option<&str> {
        match self {
            Other::Any => None,
            Other::Refused(id) | Other::Replaced(id) => Some(id),
        }
    }
}

/// The login of one backend for one holder.
struct Login {
    key: LeaseKey,
    provider: Provider,
    /// The generation in which the backend's store and login came to be.
    generation: Generation,
    holder: Holder,
    /// What the credential may ask of the store.
    budget: Arc<Shared>,
    state: watch::Sender<State>,
    /// One login at a time; whoever comes meanwhile takes its outcome. When the last one began.
    turn: tokio::sync::Mutex<Option<Instant>>,
}

/// A store with its login, as it has been configured since a generation.
#[derive(Clone, Copy, Debug)]
pub struct Configured<'a> {
    /// The store and the login.
    pub provider: &'a Provider,
    /// Since when.
    pub generation: Generation,
}

impl Login {
    fn new(key: &LeaseKey, configured: Configured<'_>, holder: Holder, budgets: &Budgets) -> Self {
        let Configured { provider, generation } = configured;
        Login {
            key: key.clone(),
            provider: provider.clone(),
            generation,
            holder,
            budget: budgets.of(&key.tenant, provider),
            state: watch::Sender::new(State::Empty),
            turn: tokio::sync::Mutex::default(),
        }
    }
}

/// A lease that nobody else has. It is revoked when it is dropped, if it was made for us.
pub struct TemporaryLease {
    login: Arc<Login>,
    held: Arc<Held>,
    egress: Egress,
}

impl fmt::Debug for TemporaryLease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TemporaryLease").field("lease", &self.held.lease.id).finish_non_exhaustive()
    }
}

impl TemporaryLease {
    /// The lease.
    pub fn lease(&self) -> &Lease {
        &self.held.lease
    }
}

impl Drop for TemporaryLease {
    fn drop(&mut self) {
        revoke_later(self.login.clone(), self.held.clone(), Duration::ZERO, &self.egress);
    }
}

/// What a node can be told of a lease.
#[derive(Clone, Debug)]
pub enum NodeLease {
    /// The login is under way; the nudge tells when it has ended.
    Pending,
    /// Here it is, with the node's part of the call budget.
    Held(Arc<Lease>, Option<Slice>),
    /// It cannot be had.
    Refused(Error),
}

/// The logins of all backends.
pub struct Credentials {
    records: Records,
    configurations: Arc<Configurations>,
    audit: Arc<Audit>,
    logins: Mutex<HashMap<(LeaseKey, Holder), Arc<Login>>>,
    budgets: Budgets,
    nudge: watch::Sender<u64>,
    own: OwnIdentities,
    egress: Egress,
    me: Weak<Credentials>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").finish_non_exhaustive()
    }
}

impl Credentials {
    /// Logins with the credentials in `records` and with our `own` identities, to where `egress` lets them lead. `nudge`
    /// is moved whenever a lease for nodes has changed.
    pub fn new(
        records: Records,
        configurations: Arc<Configurations>,
        audit: Arc<Audit>,
        budgets: Budgets,
        nudge: watch::Sender<u64>,
        own: OwnIdentities,
        egress: Egress,
    ) -> Arc<Self> {
        Arc::new_cyclic(|me| Credentials {
            records,
            configurations,
            audit,
            logins: Mutex::default(),
            budgets,
            nudge,
            own,
            egress,
            me: me.clone(),
        })
    }

    /// Checks that the credential of a new configuration is there and has what its method needs, or that the tenant may
    /// use the identity of ours that stands in for it.
    ///
    /// # Errors
    /// `credential_unusable`, `permission_denied` or `invalid_config`, naming the field.
    pub async fn check(&self, tenant: &TenantId, provider: &Provider) -> Result<(), Error> {
        self.check_own(tenant, provider).await?;
        let Some(path) = provider.credentials() else { return Ok(()) };
        login::check(provider, &self.read(tenant, provider, path).await?)
    }

    /// Whether the tenant may use the identity of ours that a login uses, if it uses one.
    async fn check_own(&self, tenant: &TenantId, provider: &Provider) -> Result<(), Error> {
        if provider.own_identity().is_none() {
            return Ok(());
        }
        let granted = match self.records.get::<TenantRecord>(&tenant_key(tenant)).await? {
            Some((record, _)) => record.identities,
            None => Vec::new(),
        };
        provider.check_own_identity(&granted, &self.own.hosts)
    }

    async fn read(
        &self,
        tenant: &TenantId,
        provider: &Provider,
        path: &SecretPath,
    ) -> Result<SecretValue, Error> {
        // Checked at every use: a mapping may have come to own the path.
        if self.configurations.of(tenant).await?.route(path) != Route::Local {
            return Err(Error::new(
                Reason::CredentialCycle,
                "the backend's credential lies in a federated path",
            )
            .next("store the credential at a local path"));
        }
        match secrets::local(&self.records, tenant, path, None).await {
            Ok(found) => Ok(found.value),
            Err(error) if matches!(error.reason, Reason::NotFound | Reason::NotActive) => {
                Err(unusable(provider, "there is no secret at the credential's path")
                    .next("store the credential there first, e.g. with `scaivault put`"))
            }
            Err(error) => Err(error),
        }
    }

    /// The lease that nodes hold, as far as it is known now. Starts a login if there is none.
    pub fn for_nodes(&self, key: &LeaseKey, configured: Configured<'_>) -> NodeLease {
        let login = self.login(key, configured, Holder::Nodes);
        let state = login.state.borrow().clone();
        match state {
            State::Held(held) if alive(&held) => NodeLease::Held(held.lease.clone(), login.budget.slice()),
            State::Failed { error, at, .. } if at.elapsed() < pause(&error) => NodeLease::Refused(error),
            State::Empty | State::Held(_) | State::Failed { .. } => {
                // Who is at it tells everybody when it is done.
                let is_under_way = login.turn.try_lock().is_err();
                if let Some(me) = self.me.upgrade().filter(|_| !is_under_way) {
                    tokio::spawn(async move { me.hold(&login, Other::Any).await });
                }
                NodeLease::Pending
            }
        }
    }

    /// The backend refused the lease `id` of nodes: another login, unless there was one since.
    pub fn refused_by_backend(&self, key: &LeaseKey, configured: Configured<'_>, id: &str) {
        let login = self.login(key, configured, Holder::Nodes);
        let (id, Some(me)) = (id.to_owned(), self.me.upgrade()) else { return };
        tokio::spawn(async move { me.hold(&login, Other::Refused(&id)).await });
    }

    /// Divides the call budgets among those who use them now; nodes are told if their parts have changed.
    pub fn divide_budgets(&self) {
        if self.budgets.divide() {
            self.nudge.send_modify(|count| *count += 1);
        }
    }

    /// The control plane's part of what the credential of a backend may ask; `None` before its first login.
    fn budget(&self, key: &LeaseKey) -> Option<Arc<Budget>> {
        let logins = self.logins.lock().unwrap_or_else(PoisonError::into_inner);
        Some(logins.get(&(key.clone(), Holder::ControlPlane))?.budget.budget().clone())
    }

    /// Why the last login for `holder` failed, if it did.
    pub fn failure(&self, key: &LeaseKey, holder: Holder) -> Option<Error> {
        let logins = self.logins.lock().unwrap_or_else(PoisonError::into_inner);
        match &*logins.get(&(key.clone(), holder))?.state.borrow() {
            State::Failed { error, .. } => Some(error.clone()),
            State::Empty | State::Held(_) => None,
        }
    }

    /// When the control plane's own login ends, if it has one that does.
    pub fn ends_in(&self, key: &LeaseKey) -> Option<Duration> {
        let logins = self.logins.lock().unwrap_or_else(PoisonError::into_inner);
        match &*logins.get(&(key.clone(), Holder::ControlPlane))?.state.borrow() {
            State::Held(held) => Some(held.lease.expires_at?.saturating_duration_since(Instant::now())),
            State::Empty | State::Failed { .. } => None,
        }
    }

    /// Forgets the logins of `tenant` whose backend is not among `kept`, and revokes what can be revoked.
    pub fn retain(&self, tenant: &TenantId, kept: impl Fn(&LeaseKey) -> bool) {
        let mut logins = self.logins.lock().unwrap_or_else(PoisonError::into_inner);
        logins.retain(|(key, _), login| {
            let keep = key.tenant != *tenant || kept(key);
            if !keep && let State::Held(held) = login.state.send_replace(State::Empty) {
                revoke_later(login.clone(), held, Duration::ZERO, &self.egress);
            }
            keep
        });
    }

    fn login(&self, key: &LeaseKey, configured: Configured<'_>, holder: Holder) -> Arc<Login> {
        let mut logins = self.logins.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(login) = logins.get(&(key.clone(), holder))
            && login.provider == *configured.provider
            && login.generation == configured.generation
        {
            return login.clone();
        }
        let login = Arc::new(Login::new(key, configured, holder, &self.budgets));
        if let Some(before) = logins.insert((key.clone(), holder), login.clone())
            && let State::Held(held) = before.state.send_replace(State::Empty)
        {
            revoke_later(before, held, GRACE, &self.egress);
        }
        login
    }

    fn is_current(&self, login: &Arc<Login>) -> bool {
        let logins = self.logins.lock().unwrap_or_else(PoisonError::into_inner);
        logins.get(&(login.key.clone(), login.holder)).is_some_and(|current| Arc::ptr_eq(current, login))
    }

    /// Logs in anew for nodes everywhere: what a node that was removed may still hold is revoked after that.
    pub fn replace_for_nodes(&self) {
        let held: Vec<_> = {
            let logins = self.logins.lock().unwrap_or_else(PoisonError::into_inner);
            logins.values().filter(|login| login.holder == Holder::Nodes).cloned().collect()
        };
        for login in held {
            let State::Held(current) = login.state.borrow().clone() else { continue };
            let Some(me) = self.me.upgrade() else { return };
            tokio::spawn(async move { me.hold(&login, Other::Replaced(&current.lease.id)).await });
        }
    }

    /// A lease `other` than one that will not do: the one that is held, or that of a new login.
    async fn hold(self: &Arc<Self>, login: &Arc<Login>, other: Other<'_>) -> Result<Arc<Held>, Error> {
        if let Some(held) = usable(login, other.id()) {
            return Ok(held);
        }
        let mut turn = login.turn.lock().await;
        if let Some(held) = usable(login, other.id()) {
            return Ok(held);
        }
        let state = login.state.borrow().clone();
        let streak = match (&state, other) {
            (State::Failed { error, at, .. }, _) if at.elapsed() < pause(error) => return Err(error.clone()),
            (State::Failed { streak, .. }, _) => *streak,
            (State::Held(held), Other::Refused(_)) => held.streak_if_refused(),
            (State::Held(_) | State::Empty, _) => 0,
        };
        if matches!(state, State::Held(_)) && streak > IN_VAIN {
            let error = Error::from(BackendError::LoginExpired);
            tracing::warn!(
                tenant = %login.key.tenant, backend.id = %login.key.backend,
                "logins succeed, and the backend refuses what they give"
            );
            login.state.send_replace(State::Failed { error: error.clone(), at: Instant::now(), streak });
            self.nudge.send_modify(|count| *count += 1);
            return Err(error);
        }
        // A token service whose tokens have ended when they come must not be asked as fast as it answers.
        if let (State::Held(held), Some(last)) = (&state, *turn)
            && !alive(held)
        {
            tokio::time::sleep_until(last + PAUSE).await;
        }
        *turn = Some(Instant::now());
        let outcome = self.log_in(login).await;
        let result = match outcome {
            Ok(issued) => {
                let held = Arc::new(Held { streak, ..hold(login.generation, issued) });
                let before = login.state.send_replace(State::Held(held.clone()));
                if let State::Held(before) = before {
                    revoke_later(login.clone(), before, GRACE, &self.egress);
                }
                if self.is_current(login) {
                    self.renew_later(login, &held);
                } else {
                    // The backend went, or changed, while the login was under way.
                    revoke_later(login.clone(), held.clone(), GRACE, &self.egress);
                }
                Ok(held)
            }
            Err(error) => {
                tracing::warn!(tenant = %login.key.tenant, backend.id = %login.key.backend, %error, "a login failed");
                login.state.send_replace(State::Failed {
                    error: error.clone(),
                    at: Instant::now(),
                    streak: 0,
                });
                Err(error)
            }
        };
        self.nudge.send_modify(|count| *count += 1);
        result
    }

    /// Logs in anew, with the credential as it is stored now, beside every login that is held.
    ///
    /// # Errors
    /// Why there is no login.
    pub async fn try_login(&self, key: &LeaseKey, provider: &Provider) -> Result<TemporaryLease, Error> {
        // Of no generation that a backend can have: it is for this caller alone.
        let configured = Configured { provider, generation: 0 };
        let login = Arc::new(Login::new(key, configured, Holder::ControlPlane, &self.budgets));
        let held = Arc::new(hold(login.generation, self.log_in(&login).await?));
        Ok(TemporaryLease { login, held, egress: self.egress.clone() })
    }

    async fn log_in(&self, login: &Arc<Login>) -> Result<Issued, Error> {
        let tenant = &login.key.tenant;
        let attempt = async {
            let credential = match login.provider.credentials() {
                Some(path) => Some(self.read(tenant, &login.provider, path).await?),
                None => None,
            };
            // Checked at every login: the operator may have taken the identity away, or the host from the list.
            self.check_own(tenant, &login.provider).await.map_err(no_longer_ours)?;
            let asking = Asking {
                key: &login.key,
                holder: login.holder,
                own: &self.own,
                egress: &self.egress,
                now: self.audit.now(),
            };
            login::log_in(&login.provider, credential.as_ref(), &asking).await
        };
        let outcome = tokio::time::timeout(LOGIN_TIMEOUT, attempt).await.unwrap_or_else(|_| {
            Err(Error::new(Reason::BackendTimeout, "the backend did not answer the login in time"))
        });
        let path = login.provider.credentials().map_or("", SecretPath::as_str);
        let mut row =
            AuditRow::of_control_plane(tenant.clone(), Action::BackendLogin, path, self.audit.now());
        row.backend = Some(login.key.backend.to_string());
        row.outcome =
            outcome.as_ref().map_or_else(|error| error.reason.code(), |_| scaivault_domain::audit::OK).into();
        match (self.audit.record(row).await, outcome) {
            (Ok(()), outcome) => outcome,
            (Err(error), Ok(issued)) => {
                // A login that is not written down is not used.
                revoke_later(
                    login.clone(),
                    Arc::new(hold(login.generation, issued)),
                    Duration::ZERO,
                    &self.egress,
                );
                Err(error)
            }
            (Err(error), Err(_)) => Err(error),
        }
    }

    /// Renews at half of the life, for as long as this lease is the one that is held. What an identity of ours gave is
    /// looked after more often: the grant may be taken away long before it ends.
    fn renew_later(self: &Arc<Self>, login: &Arc<Login>, held: &Arc<Held>) {
        let renewal = held.ttl.map(|ttl| Instant::now() + (ttl / 2).max(SHORTEST_RENEWAL));
        let is_ours = login.provider.own_identity().is_some();
        if renewal.is_none() && !is_ours {
            return;
        }
        let (me, login, id) = (Arc::downgrade(self), Arc::downgrade(login), held.lease.id.clone());
        tokio::spawn(async move {
            loop {
                let look = is_ours.then(|| Instant::now() + GRANT_IS_TRUSTED_FOR);
                let Some(next) = [renewal, look].into_iter().flatten().min() else { return };
                tokio::time::sleep_until(next).await;
                let (Some(me), Some(login)) = (me.upgrade(), login.upgrade()) else { return };
                let State::Held(current) = login.state.borrow().clone() else { return };
                if current.lease.id != id {
                    return;
                }
                if me.end_if_refused(&login).await {
                    return;
                }
                if renewal == Some(next) {
                    return me.renew(&login, &current).await;
                }
            }
        });
    }

    /// Looks again whether the tenant may use what its backends use of our own identities, as its grants have changed.
    pub fn recheck_grants(&self, tenant: &TenantId) {
        let Some(me) = self.me.upgrade() else { return };
        let ours: Vec<_> = {
            let logins = self.logins.lock().unwrap_or_else(PoisonError::into_inner);
            let of_tenant = logins.values().filter(|login| login.key.tenant == *tenant);
            of_tenant.filter(|login| login.provider.own_identity().is_some()).cloned().collect()
        };
        tokio::spawn(async move {
            for login in ours {
                me.end_if_refused(&login).await;
            }
        });
    }

    /// Ends a login that the tenant may no longer use: nodes give its lease up. A store that does not answer ends none.
    async fn end_if_refused(&self, login: &Arc<Login>) -> bool {
        let refused = match self.check_own(&login.key.tenant, &login.provider).await {
            Err(error) if matches!(error.reason, Reason::PermissionDenied | Reason::InvalidConfig) => error,
            _ => return false,
        };
        let failed = State::Failed { error: no_longer_ours(refused), at: Instant::now(), streak: 0 };
        if let State::Held(held) = login.state.send_replace(failed) {
            revoke_later(login.clone(), held, Duration::ZERO, &self.egress);
        }
        self.nudge.send_modify(|count| *count += 1);
        true
    }

    async fn renew(self: &Arc<Self>, login: &Arc<Login>, held: &Arc<Held>) {
        let still_allowed = self.check_own(&login.key.tenant, &login.provider).await.is_ok();
        if still_allowed && held.renewal == Renewal::Renew {
            let renewed = login::renew(&login.provider, &held.lease.material, &self.egress).await;
            // Towards the longest life that a backend allows, renewals give less and less; then a login is better.
            if let Ok(Some(ttl)) = renewed
                && held.ttl.is_some_and(|first| ttl >= first / 2)
            {
                let issued = Issued {
                    material: held.lease.material.clone(),
                    ttl: Some(ttl),
                    renewal: held.renewal,
                    revocation: held.revocation,
                };
                self.replace(login, held, &Arc::new(hold(login.generation, issued))).await;
                return;
            }
        }
        // What is held stays until it ends: a backend that is down now may be up again before that.
        while let Some(current) = usable(login, None)
            && Arc::ptr_eq(&current, held)
        {
            match self.log_in(login).await {
                Ok(issued) => {
                    let next = Arc::new(hold(login.generation, issued));
                    if self.replace(login, held, &next).await {
                        revoke_later(login.clone(), held.clone(), GRACE, &self.egress);
                    } else {
                        revoke_later(login.clone(), next, Duration::ZERO, &self.egress);
                    }
                }
                Err(error) => {
                    tracing::warn!(backend.id = %login.key.backend, %error, "a login could not be renewed yet");
                    let left = held.lease.expires_at.map(|end| end.saturating_duration_since(Instant::now()));
                    tokio::time::sleep((left.unwrap_or_default() / 8).max(PAUSE)).await;
                }
            }
        }
    }
}

impl Credentials {
    /// Puts `next` in the place of `held`, unless something else has come there since; whether it did.
    async fn replace(self: &Arc<Self>, login: &Arc<Login>, held: &Arc<Held>, next: &Arc<Held>) -> bool {
        let _turn = login.turn.lock().await;
        let replaced = login.state.send_if_modified(|state| match state {
            State::Held(current) if Arc::ptr_eq(current, held) => {
                *state = State::Held(next.clone());
                true
            }
            _ => false,
        });
        if replaced {
            self.renew_later(login, next);
            self.nudge.send_modify(|count| *count += 1);
        }
        replaced
    }
}

/// The control plane's own leases.
#[derive(Debug)]
pub struct OwnLeases(pub Arc<Credentials>);

impl Leases for OwnLeases {
    async fn lease(
        &self,
        key: &LeaseKey,
        generation: Generation,
        refused: Option<&str>,
    ) -> Result<Arc<Lease>, Error> {
        let configuration = self.0.configurations.of(&key.tenant).await?;
        let (record, _) = configuration.backend(&key.backend)?;
        if record.login_generation != generation {
            // Whoever asks has a connection to what the backend was before.
            return Err(Error::reconfigured());
        }
        let login = self.0.login(key, record.configured(), Holder::ControlPlane);
        let (credentials, refused) = (self.0.clone(), refused.map(str::to_owned));
        // A login that has begun is finished, also when its caller runs out of time: the next one finds it done.
        let held = tokio::spawn(async move {
            let other = refused.as_deref().map_or(Other::Any, Other::Refused);
            credentials.hold(&login, other).await
        });
        held.await.unwrap_or_else(|_| Err(Error::internal())).map(|held| held.lease.clone())
    }

    fn budget(&self, key: &LeaseKey, target: &Target) -> Arc<Budget> {
        self.0.budget(key).unwrap_or_else(|| Arc::new(Budget::new(Quotas::of(target))))
    }
}

fn usable(login: &Login, refused: Option<&str>) -> Option<Arc<Held>> {
    match &*login.state.borrow() {
        State::Held(held) if alive(held) && refused != Some(held.lease.id.as_str()) => Some(held.clone()),
        _ => None,
    }
}

fn alive(held: &Held) -> bool {
    held.lease.expires_at.is_none_or(|end| end > Instant::now())
}

/// How long a login is not tried again after it failed.
fn pause(error: &Error) -> Duration {
    error.retry_after.unwrap_or(PAUSE).clamp(PAUSE, LONGEST_PAUSE)
}

fn hold(generation: Generation, issued: Issued) -> Held {
    let ttl = issued.ttl.map(|ttl| ttl.min(LONGEST_LIFE));
    let lease = Lease {
        // Random, so that it tells nothing of the credential and changes with every renewal.
        id: unique(Timestamp::default()),
        login_generation: generation,
        material: issued.material,
        expires_at: ttl.map(|ttl| Instant::now() + ttl),
    };
    Held {
        lease: Arc::new(lease),
        ttl,
        renewal: issued.renewal,
        revocation: issued.revocation,
        since: Instant::now(),
        streak: 0,
    }
}

fn revoke_later(login: Arc<Login>, held: Arc<Held>, after: Duration, egress: &Egress) {
    if held.revocation == Revocation::Leave {
        return;
    }
    let egress = egress.clone();
    tokio::spawn(async move {
        tokio::time::sleep(after).await;
        // Best effort: what cannot be revoked ends by itself.
        login::revoke(&login.provider, &held.lease.material, &egress).await;
    });
}

/// Why a login with an identity of ours is refused that was configured when it was allowed.
fn no_longer_ours(error: Error) -> Error {
    if !matches!(error.reason, Reason::PermissionDenied | Reason::InvalidConfig) {
        return error;
    }
    let next = error.what_next().to_owned();
    let detail = error.violations.into_iter().next().map(|violation| violation.detail).unwrap_or_default();
    Error::new(Reason::BackendLoginFailed, detail).next(next)
}

/// The stored credential cannot be used.
fn unusable(provider: &Provider, message: impl Into<String>) -> Error {
    Error::field(Reason::CredentialUnusable, format!("/config/{}", provider.credentials_field()), message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(streak: u32) -> Held {
        let issued = Issued {
            material: Material::Bearer("t".into()),
            ttl: None,
            renewal: Renewal::Again,
            revocation: Revocation::Leave,
        };
        Held { streak, ..hold(1, issued) }
    }

    #[test]
    fn logins_are_in_vain_only_if_what_they_give_is_refused_at_once() {
        let (first, second, third) = (held(0), held(1), held(IN_VAIN));
        assert_eq!((first.streak_if_refused(), second.streak_if_refused()), (1, 2), "each gets another one");
        assert!(third.streak_if_refused() > IN_VAIN);
        let third = Held { since: third.since.checked_sub(PAUSE).unwrap(), ..third };
        assert_eq!(third.streak_if_refused(), 1, "it was good for a while");
    }
}
