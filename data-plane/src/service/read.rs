//! A proxied read: route, backend, journal row, value. In this order.

use std::sync::Arc;

use scaivault_backends::RemoteSecret;
use scaivault_backends::connection::Connections;
use scaivault_domain::access::{Authorized, Caller, Read};
use scaivault_domain::audit::{Action, AuditRow, Origin};
use scaivault_domain::mapping::RemoteName;
use scaivault_domain::secret::{Source, Version};
use scaivault_domain::time::Clock;
use scaivault_domain::view::BackendView;
use scaivault_domain::{Error, Reason};
use scaivault_journal::Journal;
use scaivault_telemetry::Metrics;

use crate::known::Known;

/// Reads through backends, and writes down what it does.
pub struct Reader {
    connections: Arc<Connections<Known>>,
    journal: Arc<Journal>,
    clock: Arc<dyn Clock>,
    metrics: Metrics,
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader").finish_non_exhaustive()
    }
}

impl Reader {
    /// Reads through `connections`; rows go to `journal`.
    pub fn new(
        connections: Arc<Connections<Known>>,
        journal: Arc<Journal>,
        clock: Arc<dyn Clock>,
        metrics: Metrics,
    ) -> Self {
        Reader { connections, journal, clock, metrics }
    }

    /// The current value at an authorised path that `backend` owns as `name`.
    ///
    /// # Errors
    /// What the backend did wrong; `audit_unavailable` if the row cannot be written, and then no value leaves.
    pub async fn read(
        &self,
        allowed: &Authorized<Read>,
        origin: &Origin,
        backend: &BackendView,
        name: &RemoteName,
        version: Option<Version>,
    ) -> Result<Arc<RemoteSecret>, Error> {
        let mut row = self.row(allowed.caller(), origin, Action::SecretRead, allowed.path().as_str());
        row.backend = Some(backend.id.to_string());
        row.remote_name = Some(name.as_str().into());
        row.source = Some(Source::Proxy.as_str().into());
        let outcome = self.ask(allowed, backend, name, version).await;
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
        version: Option<Version>,
    ) -> Result<Arc<RemoteSecret>, Error> {
        if version.is_some() {
            let detail = "a path in proxy mode has only its current version";
            return Err(
                Error::field(Reason::VersionUnsupported, "/version", detail).next("read without `version`")
            );
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
                .retry_after(std::time::Duration::from_secs(1))
        })?;
        outcome
    }

    /// Ends what is refused here; what is allowed goes on and is written down where it ends.
    ///
    /// # Errors
    /// The outcome's own, or `audit_unavailable` in its place.
    pub async fn close_refusal<T>(
        &self,
        row: AuditRow,
        origin: &Origin,
        outcome: Result<T, Error>,
    ) -> Result<T, Error> {
        match outcome {
            Ok(allowed) => Ok(allowed),
            refused => self.close(row, origin, refused).await,
        }
    }
}
