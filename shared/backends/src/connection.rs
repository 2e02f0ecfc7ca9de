//! One backend as a plane uses it: adapter, guard and coalescing behind one call.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::FutureExt as _;
use scaivault_domain::backend::{BackendId, Target};
use scaivault_domain::lease::LeaseKey;
use scaivault_domain::mapping::RemoteName;
use scaivault_domain::tenant::{BackendName, TenantId};
use scaivault_domain::view::{BackendView, Generation};
use scaivault_domain::{Error, Reason};
use scaivault_telemetry::trace::backend_call;
use tokio::time::{Instant, timeout, timeout_at};

use crate::background::{Background, Failed};
use crate::budget::{Budget, Cost, Quota};
use crate::coalesce::Coalescer;
use crate::egress::Egress;
use crate::guard::{Guard, Limits, Retry};
use crate::permission::allow;
use crate::{
    Backend, BackendError, Lease, Operation, Page, PageToken, RemoteSecret, RemoteVersion, SecretBackend as _,
};

/// Where leases come from: the control plane's logins, or what a node was given.
pub trait Leases: Send + Sync + 'static {
    /// A lease for `key` that is for the login of this generation; another one than `refused`, which the backend did not
    /// take.
    fn lease(
        &self,
        key: &LeaseKey,
        generation: Generation,
        refused: Option<&str>,
    ) -> impl Future<Output = Result<Arc<Lease>, Error>> + Send;

    /// What the credential behind the leases of `key` may ask of `target`. Whoever has the same credential has the same
    /// budget; another one is only given while there is no lease yet.
    fn budget(&self, key: &LeaseKey, target: &Target) -> Arc<Budget>;
}

/// A connection to one backend. Cheap to share; everybody who uses the backend uses the same one.
pub struct Connection<L> {
    key: LeaseKey,
    name: BackendName,
    target: Target,
    login_generation: Generation,
    backend: Backend,
    guard: Guard,
    /// By name and lease: whoever comes with a new lease must not join a call that was begun with a refused one.
    reads: Coalescer<(RemoteName, String), Arc<RemoteSecret>>,
    leases: Arc<L>,
}

impl<L> fmt::Debug for Connection<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("key", &self.key)
            .field("guard", &self.guard)
            .finish_non_exhaustive()
    }
}

impl<L: Leases> Connection<L> {
    /// Whose backend it is.
    pub fn key(&self) -> &LeaseKey {
        &self.key
    }

    /// The `type` of the backend.
    pub fn kind(&self) -> &'static str {
        self.target.kind().as_str()
    }

    /// The guard, whose state is part of the backend's status.
    pub fn guard(&self) -> &Guard {
        &self.guard
    }

    /// The current value of `name`, within `timeout`. Identical reads in flight share one call of the backend.
    ///
    /// # Errors
    /// What the backend did wrong, as the caller of the API is told it.
    pub async fn read(
        self: &Arc<Self>,
        name: &RemoteName,
        timeout: Duration,
    ) -> Result<Arc<RemoteSecret>, Error> {
        let deadline = Instant::now() + timeout;
        // A lease that cannot be had must not be shared as if the backend had failed, so it comes first.
        let lease = self.lease(None, deadline).await?;
        let outcome = self.shared_read(name, lease.clone(), deadline).await;
        let outcome = match outcome {
            Err(BackendError::LoginExpired) => {
                let lease = self.lease(Some(&lease.id), deadline).await?;
                self.shared_read(name, lease, deadline).await
            }
            outcome => outcome,
        };
        outcome.map_err(|error| self.failed(error, Some(Operation::Read)).shown)
    }

    async fn shared_read(
        self: &Arc<Self>,
        name: &RemoteName,
        lease: Arc<Lease>,
        deadline: Instant,
    ) -> Result<Arc<RemoteSecret>, BackendError> {
        let (connection, remote) = (self.clone(), name.clone());
        let key = (name.clone(), lease.id.clone());
        let call = async move {
            let left = deadline.saturating_duration_since(Instant::now());
            let budget = connection.budget();
            connection
                .guard
                .call(Retry::PROXIED_READ, Cost::one(&budget, Quota::Values), left, || {
                    connection.traced("read", connection.backend.read(&lease, &remote))
                })
                .await
                .map(Arc::new)
        };
        // Whoever joins a call that began earlier still has a deadline of its own.
        timeout_at(deadline, self.reads.run(key, call)).await.unwrap_or(Err(BackendError::Timeout))
    }

    /// The versions that the backend still knows of, newest first.
    ///
    /// # Errors
    /// What the backend did wrong, as the caller of the API is told it.
    pub async fn history(
        self: &Arc<Self>,
        name: &RemoteName,
        timeout: Duration,
    ) -> Result<Vec<RemoteVersion>, Error> {
        let call = |lease: Arc<Lease>| {
            let (connection, name) = (self.clone(), name.clone());
            async move { connection.backend.history(&lease, &name).await }
        };
        let mut history = self
            .guarded(Effort::prompt("history", Some(Operation::History), Quota::Metadata, timeout), call)
            .await?;
        history.reverse();
        Ok(history)
    }

    /// One part of what is directly in `folder` (`None`: in the whole store).
    ///
    /// # Errors
    /// What the backend did wrong, as the caller of the API is told it.
    pub async fn list(
        self: &Arc<Self>,
        folder: Option<&RemoteName>,
        after: Option<&PageToken>,
        timeout: Duration,
    ) -> Result<Page, Error> {
        let call = |lease: Arc<Lease>| {
            let (connection, folder, after) = (self.clone(), folder.cloned(), after.cloned());
            async move { connection.backend.list(&lease, folder.as_ref(), after.as_ref()).await }
        };
        Ok(self.guarded(Effort::prompt("list", Some(Operation::List), Quota::Lists, timeout), call).await?)
    }

    /// Asks the backend whether it answers and takes our login.
    ///
    /// # Errors
    /// What the backend did wrong, as the caller of the API is told it.
    pub async fn probe(self: &Arc<Self>, timeout: Duration) -> Result<(), Error> {
        let call = |lease: Arc<Lease>| {
            let connection = self.clone();
            async move { connection.backend.probe(&lease).await }
        };
        Ok(self.guarded(Effort::prompt("probe", None, Quota::Lists, timeout), call).await?)
    }

    /// What a run of work that nobody waits for does with the backend; `timeout` is for each call.
    pub fn background(self: &Arc<Self>, timeout: Duration) -> Background<L> {
        Background::new(self.clone(), timeout)
    }

    /// What may be asked of the store.
    pub fn budget(&self) -> Arc<Budget> {
        self.leases.budget(&self.key, &self.target)
    }

    pub(crate) fn backend(&self) -> &Backend {
        &self.backend
    }

    /// Makes `call` with a lease, and with another one if that is refused.
    pub(crate) async fn guarded<T, F>(
        &self,
        effort: Effort,
        call: impl Fn(Arc<Lease>) -> F + Send + Sync,
    ) -> Result<T, Failed>
    where
        F: Future<Output = Result<T, BackendError>> + Send,
    {
        let deadline = Instant::now() + effort.whole;
        let mut refused = None;
        loop {
            let lease_by = deadline.min(Instant::now() + effort.attempt);
            let lease = match self.lease(refused.as_deref(), lease_by).await {
                Ok(lease) => lease,
                Err(error) => return Err(self.without_lease(error).await),
            };
            let left = deadline.saturating_duration_since(Instant::now());
            let attempt = async || {
                let call = timeout(effort.attempt, call(lease.clone()));
                let call = call.map(|answer| answer.unwrap_or(Err(BackendError::Timeout)));
                self.traced(effort.operation, call).await
            };
            let budget = self.budget();
            let cost = Cost::one(&budget, effort.quota);
            match self.guard.call(effort.retry, cost, left, attempt).await {
                Err(BackendError::LoginExpired) if refused.is_none() => refused = Some(lease.id.clone()),
                outcome => return outcome.map_err(|cause| self.failed(cause, effort.needs)),
            }
        }
    }

    /// One call of the backend, as traces show it.
    fn traced<T>(
        &self,
        operation: &'static str,
        call: impl Future<Output = Result<T, BackendError>>,
    ) -> impl Future<Output = Result<T, BackendError>> {
        let class = |error: &BackendError| error.class().as_str();
        backend_call(&self.key.backend, self.target.kind().as_str(), operation, class, call)
    }

    /// What failed, of which `needs` says what would have to be allowed for it.
    pub(crate) fn failed(&self, cause: BackendError, needs: Option<Operation>) -> Failed {
        let shown = named(cause.clone(), &self.name);
        let shown = match (&cause, needs) {
            (BackendError::Forbidden, Some(operation)) => shown.next(allow(self.target.kind(), operation)),
            _ => shown,
        };
        Failed { cause, shown }
    }

    /// A backend that cannot be reached for a login cannot be reached: the breaker counts that too.
    async fn without_lease(&self, shown: Error) -> Failed {
        match shown.reason {
            Reason::BackendUnreachable => {
                let cause = BackendError::Unreachable("no login");
                self.guard.count(cause.clone()).await;
                Failed { cause, shown }
            }
            Reason::BackendTimeout => {
                self.guard.count(BackendError::Timeout).await;
                Failed { cause: BackendError::Timeout, shown }
            }
            Reason::NoLease => {
                self.guard.count(BackendError::Timeout).await;
                self.failed(BackendError::Timeout, None)
            }
            Reason::BackendThrottled => {
                Failed { cause: BackendError::Throttled { retry_after: shown.retry_after }, shown }
            }
            _ => Failed { cause: BackendError::LoginExpired, shown },
        }
    }

    async fn lease(&self, refused: Option<&str>, deadline: Instant) -> Result<Arc<Lease>, Error> {
        timeout_at(deadline, self.leases.lease(&self.key, self.login_generation, refused))
            .await
            .unwrap_or_else(|_| {
                let message = format!("no credential for the backend `{}` came in time", self.name);
                Err(Error::new(Reason::NoLease, message)
                    .next("try again; the backend's status tells why")
                    .retry_after(Duration::from_secs(1)))
            })
    }
}

/// How much is done for an answer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effort {
    /// What for, e.g. `read`.
    pub(crate) operation: &'static str,
    /// What must be allowed for it, if it needs more than a login.
    pub(crate) needs: Option<Operation>,
    /// What each attempt uses up.
    pub(crate) quota: Quota,
    pub(crate) retry: Retry,
    /// The deadline of one attempt.
    pub(crate) attempt: Duration,
    /// The deadline of everything: attempts, the pauses between them and a new login.
    pub(crate) whole: Duration,
}

impl Effort {
    fn prompt(operation: &'static str, needs: Option<Operation>, quota: Quota, timeout: Duration) -> Self {
        Effort { operation, needs, quota, retry: Retry::PROXIED_READ, attempt: timeout, whole: timeout }
    }
}

/// The connections of a plane, one for each backend that is used.
#[derive(Debug)]
pub struct Connections<L> {
    leases: Arc<L>,
    egress: Egress,
    open: Mutex<HashMap<LeaseKey, Arc<Connection<L>>>>,
}

impl<L: Leases> Connections<L> {
    /// No connections yet; leases come from `leases`, and `egress` says where connections may lead.
    pub fn new(leases: Arc<L>, egress: Egress) -> Self {
        Connections { leases, egress, open: Mutex::default() }
    }

    /// The connection to `backend`; a new one if its target has changed.
    ///
    /// # Errors
    /// `backend_invalid_answer` if the target's certificates are unusable or its address is refused.
    pub fn of(&self, tenant: &TenantId, backend: &BackendView) -> Result<Arc<Connection<L>>, Error> {
        let key = LeaseKey { tenant: tenant.clone(), backend: backend.id.clone() };
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(connection) = open.get(&key)
            && connection.target == backend.target
            && connection.login_generation == backend.login_generation
        {
            return Ok(connection.clone());
        }
        let adapter = Backend::connect(&backend.target, &self.egress);
        let adapter = adapter.map_err(|error| named(error, &backend.name))?;
        let connection = Arc::new(Connection {
            key: key.clone(),
            name: backend.name.clone(),
            target: backend.target.clone(),
            login_generation: backend.login_generation,
            backend: adapter,
            guard: Guard::new(Limits::default()),
            reads: Coalescer::default(),
            leases: self.leases.clone(),
        });
        open.insert(key, connection.clone());
        Ok(connection)
    }

    /// The connection to a backend, if there is one.
    pub fn open(&self, key: &LeaseKey) -> Option<Arc<Connection<L>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).get(key).cloned()
    }

    /// Every connection there is.
    pub fn all(&self) -> Vec<Arc<Connection<L>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Forgets the connections of `tenant` to backends that are not among `kept`.
    pub fn retain(&self, tenant: &TenantId, kept: impl Fn(&BackendId) -> bool) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|key, _| key.tenant != *tenant || kept(&key.backend));
    }
}

/// What the caller of the API is told of a failure of the backend `name`.
fn named(error: BackendError, name: &BackendName) -> Error {
    let mut shown = Error::from(error);
    shown.message = format!("backend `{name}`: {}", shown.message).into();
    shown
}
