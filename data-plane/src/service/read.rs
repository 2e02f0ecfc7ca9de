//! A read: route, then the copy or the backend, then the journal row, then the value. In this order.

use std::sync::Arc;
use std::time::Duration;

use scaivault_backends::RemoteSecret;
use scaivault_backends::connection::Connections;
use scaivault_domain::access::{Authorized, Caller, Read};
use scaivault_domain::audit::{Action, AuditRow, Origin};
use scaivault_domain::mapping::RemoteName;
use scaivault_domain::replica::{Absence, Replica, SecretKey, Stale};
use scaivault_domain::secret::{SecretValue, Source, Version};
use scaivault_domain::time::Clock;
use scaivault_domain::view::{BackendView, Route};
use scaivault_domain::{Error, Reason};
use scaivault_journal::Journal;
use scaivault_telemetry::{Lookup, Metrics};

use crate::known::{Known, View};

/// Reads copies and through backends, and writes down what it does.
pub struct Reader {
    known: Arc<Known>,
    connections: Arc<Connections<Known>>,
    journal: Arc<Journal>,
    clock: Arc<dyn Clock>,
    metrics: Metrics,
}

/// Which state of a secret a reader wants.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wanted {
    /// This version or a later one; 0: any.
    pub at_least: Version,
    /// A copy that was compared with its backend within this time.
    pub max_age: Option<Duration>,
}

/// What became of looking for a copy.
#[derive(Debug)]
pub enum Copied {
    /// It is here.
    Here {
        /// The copy.
        held: Held,
        /// Whose it is.
        source: Source,
    },
    /// It is not copied yet: the backend has it.
    Proxied,
    /// What is here is older than is wanted: the control plane may have more.
    Behind,
    /// The configuration has changed meanwhile: the path may have another route.
    Moved,
}

/// A copy with its value.
#[derive(Debug)]
pub struct Held {
    /// The copy, without the value.
    pub replica: Replica,
    /// The value.
    pub value: SecretValue,
    /// Time since it was compared with its backend; zero for our own.
    pub age: Duration,
    /// Whether that is longer than the period of its sync.
    pub stale: Stale,
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader").finish_non_exhaustive()
    }
}

impl Reader {
    /// Reads copies that are `known`, and through `connections`; rows go to `journal`.
    pub fn new(
        known: Arc<Known>,
        connections: Arc<Connections<Known>>,
        journal: Arc<Journal>,
        clock: Arc<dyn Clock>,
        metrics: Metrics,
    ) -> Self {
        Reader { known, connections, journal, clock, metrics }
    }

    /// The copy at an authorised path of this route, if there is one here that is new enough. Given only after its row;
    /// so is the refusal, if it is known that there is none.
    ///
    /// # Errors
    /// `not_found`, `not_synced`, `not_active`, or why nothing is known.
    pub async fn copy(
        &self,
        allowed: &Authorized<Read>,
        origin: &Origin,
        view: &View,
        route: &Route,
        wanted: &Wanted,
    ) -> Result<Copied, Error> {
        let path = allowed.path();
        let key = SecretKey::new(allowed.tenant(), path);
        let held = self.known.copies().look(&key, route, view.generation, self.known.reach());
        self.metrics.cache_lookup(match &held {
            Some(Ok(_)) => Lookup::Hit,
            Some(Err(_)) => Lookup::Absent,
            None => Lookup::Miss,
        });
        let found = match held {
            Some(found) => self.known.check_values().map(|()| found),
            None => match self.known.copy(&key, route, view.generation).await {
                Ok(None) => return Ok(Copied::Moved),
                Ok(Some(found)) => Ok(found),
                Err(error) => Err(error),
            },
        };
        let outcome = match found {
            Ok(Err(Absence::Proxy)) => return Ok(Copied::Proxied),
            Ok(Err(Absence::NotFound)) => Err(Error::new(Reason::NotFound, "no secret at this path")),
            Ok(Err(Absence::NotSynced(reason))) => Err(Error::not_synced(reason)),
            Ok(Ok(replica)) if replica.version < wanted.at_least => return Ok(Copied::Behind),
            Ok(Ok(replica)) => self.aged(&key, route, replica),
            Err(error) => Err(error),
        };
        let mut row = self.row(allowed.caller(), origin, Action::SecretRead, path.as_str());
        let source = match route {
            Route::Synced { backend, name, .. } => {
                row.backend = Some(backend.id.to_string());
                row.remote_name = Some(name.as_str().into());
                let limit = [wanted.max_age, backend.sync.max_staleness].into_iter().flatten().min();
                if let (Ok(held), Some(limit)) = (&outcome, limit)
                    && held.age > limit
                {
                    return Ok(Copied::Behind);
                }
                Source::Sync
            }
            Route::Local | Route::Proxied { .. } | Route::Unrepresentable { .. } => Source::Local,
        };
        if let Ok(held) = &outcome {
            row.source = Some(source.as_str().into());
            row.version = Some(held.replica.version);
            let remote = &held.replica.remote_version;
            row.remote_version = (!remote.is_empty()).then(|| remote.clone());
        }
        let told = outcome.as_ref().map(drop).map_err(|error| error.reason);
        self.metrics.read(Some(source), told, origin.started.elapsed());
        self.close(row, origin, outcome.map(|held| Copied::Here { held, source })).await
    }

    fn aged(&self, key: &SecretKey, route: &Route, mut replica: Replica) -> Result<Held, Error> {
        let value = replica.value.take().ok_or_else(|| Error::not_active(replica.state))?;
        let (age, stale) = match route {
            Route::Synced { backend, rule, .. } => {
                self.known.copies().age(key, backend, *rule, &replica, self.clock.now())
            }
            Route::Local | Route::Proxied { .. } | Route::Unrepresentable { .. } => {
                (Duration::ZERO, Stale::No)
            }
        };
        Ok(Held { replica, value, age, stale })
    }

    /// The current value at an authorised path that `backend` owns as `name`; refused if the request has the field
    /// `unsupported`, which asks for what only copies have.
    ///
    /// # Errors
    /// What the backend did wrong; `audit_unavailable` if the row cannot be written, and then no value leaves.
    pub async fn read(
        &self,
        allowed: &Authorized<Read>,
        origin: &Origin,
        backend: &BackendView,
        name: &RemoteName,
        unsupported: Option<&'static str>,
    ) -> Result<Arc<RemoteSecret>, Error> {
        let mut row = self.row(allowed.caller(), origin, Action::SecretRead, allowed.path().as_str());
        row.backend = Some(backend.id.to_string());
        row.remote_name = Some(name.as_str().into());
        row.source = Some(Source::Proxy.as_str().into());
        let outcome = self.ask(allowed, backend, name, unsupported).await;
        if let Ok(secret) = &outcome {
            row.remote_version = (!secret.remote_version.is_empty()).then(|| secret.remote_version.clone());
        }
        let told = outcome.as_ref().map(drop).map_err(|error| error.reason);
        self.metrics.read(Some(Source::Proxy), told, origin.started.elapsed());
        self.close(row, origin, outcome).await
    }

    async fn ask(
        &self,
        allowed: &Authorized<Read>,
        backend: &BackendView,
        name: &RemoteName,
        unsupported: Option<&'static str>,
    ) -> Result<Arc<RemoteSecret>, Error> {
        if let Some(pointer) = unsupported {
            let detail = "a path that is read in its backend has only its current version";
            return Err(Error::field(Reason::VersionUnsupported, pointer, detail)
                .next("read without `version` and `min_version`"));
        }
        if !backend.enabled {
            return Err(Error::backend_disabled(&backend.name));
        }
        self.connections.of(allowed.tenant(), backend)?.read(name, backend.timeout).await
    }

    /// The row of what `caller` asks for.
    pub fn row(&self, caller: &Caller, origin: &Origin, action: Action, path: &str) -> AuditRow {
        AuditRow::new(caller, origin, action, path, self.clock.now())
    }

    /// Ends a request with its row; the outcome is given only after that.
    ///
    /// # Errors
    /// The outcome's own, or `audit_unavailable` in its place.
    pub async fn close<T>(
        &self,
        row: AuditRow,
        origin: &Origin,
        outcome: Result<T, Error>,
    ) -> Result<T, Error> {
        self.journal.record(row.ended(origin, &outcome)).await.map_err(|error| {
            tracing::error!(%error, "the audit journal takes no rows");
            Error::new(Reason::AuditUnavailable, "the audit row cannot be written, so nothing is released")
                .next("try again; the operator finds the cause in the node's log")
                .retry_after(Duration::from_secs(1))
        })?;
        outcome
    }

    /// Gives an outcome of authorisation; a refusal only after its row. What is allowed goes on and is written down where
    /// it ends.
    ///
    /// # Errors
    /// The outcome's own, or `audit_unavailable` in its place.
    pub async fn admit<T>(
        &self,
        caller: &Caller,
        origin: &Origin,
        action: Action,
        path: &str,
        outcome: Result<T, Error>,
    ) -> Result<T, Error> {
        match outcome {
            Ok(allowed) => Ok(allowed),
            refused => self.close(self.row(caller, origin, action, path), origin, refused).await,
        }
    }
}
