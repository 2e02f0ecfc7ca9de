//! Watching backends: probes, what status says of them, and the events of an outage.
//!
//! A backend is probed every 30 seconds, and faster while it fails. `federation.backend.unreachable` is written once
//! when its breaker has been open for long enough, `federation.backend.recovered` once when it is used again; a row in
//! the store remembers the outage, so that a restart of the control plane in the middle of one repeats neither.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use scaivault_backends::guard::BreakerState;
use scaivault_domain::audit::OK;
use scaivault_domain::event::{Event, EventKind};
use scaivault_domain::lease::LeaseKey;
use scaivault_domain::tenant::TenantId;
use scaivault_domain::time::{Clock, Timestamp};
use scaivault_domain::view::BackendView;
use scaivault_domain::{Error, Reason};
use scaivault_telemetry::Health::{Down, Up};
use scaivault_telemetry::{Breaker, Metrics};
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::audit::unique;
use crate::connections::Connections;
use crate::service::Configurations;
use crate::service::tenants::Tenants;
use crate::store::{CommitError, Key, Records, Space, Tx};

/// How often a healthy backend is probed.
const IDLE: Duration = Duration::from_secs(30);
/// How often one that fails is probed at first; the pause doubles up to [`MOST_FAILING`].
const FAILING: Duration = Duration::from_millis(500);
/// The longest pause between probes of one that fails: an outage's end is news as well.
const MOST_FAILING: Duration = Duration::from_secs(4);
/// How often the list of backends is compared with the probes that run.
const RECONCILE: Duration = Duration::from_secs(1);

/// What is known of a backend's connection.
#[derive(Clone, Debug)]
pub struct Health {
    /// When it was last probed.
    pub probed: Timestamp,
    /// How long the last successful probe took.
    pub latency: Option<Duration>,
    /// How the last probe ended.
    pub outcome: Result<(), Error>,
    /// Failures in a row.
    pub failures: u32,
    /// What the breaker does.
    pub breaker: BreakerState,
    /// Whether the outage has lasted long enough to be called one.
    pub unreachable: bool,
}

/// A running outage, at `tenant / Setting / outage/id`.
#[derive(Debug, Serialize, Deserialize)]
struct Outage {
    since: Timestamp,
}

/// Probes every backend.
pub struct Monitor {
    records: Records,
    tenants: Arc<Tenants>,
    configurations: Arc<Configurations>,
    connections: Arc<Connections>,
    clock: Arc<dyn Clock>,
    metrics: Metrics,
    unreachable_after: Duration,
    health: Mutex<HashMap<LeaseKey, Health>>,
}

impl std::fmt::Debug for Monitor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Monitor").finish_non_exhaustive()
    }
}

impl Monitor {
    /// Probes through `connections`; an outage is one when the breaker has been open for `unreachable_after`.
    pub fn new(
        records: Records,
        tenants: Arc<Tenants>,
        configurations: Arc<Configurations>,
        connections: Arc<Connections>,
        clock: Arc<dyn Clock>,
        metrics: Metrics,
        unreachable_after: Duration,
    ) -> Self {
        Monitor {
            records,
            tenants,
            configurations,
            connections,
            clock,
            metrics,
            unreachable_after,
            health: Mutex::default(),
        }
    }

    /// What is known of a backend; `None` before its first probe.
    pub fn health(&self, key: &LeaseKey) -> Option<Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner).get(key).cloned()
    }

    /// Keeps one probe running for each enabled backend, until told to stop.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        let mut running: HashMap<LeaseKey, (Arc<BackendView>, JoinHandle<()>)> = HashMap::new();
        loop {
            match self.enabled().await {
                Ok(wanted) => {
                    running.retain(|key, (view, probe)| {
                        let keep = !probe.is_finished() && wanted.get(key) == Some(view);
                        if !keep {
                            probe.abort();
                        }
                        if !wanted.contains_key(key) {
                            self.health.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
                        }
                        keep
                    });
                    for (key, view) in wanted {
                        running.entry(key.clone()).or_insert_with(|| {
                            let probe = tokio::spawn(self.clone().probe(key, view.clone()));
                            (view, probe)
                        });
                    }
                }
                Err(error) => tracing::warn!(%error, "the backends to probe cannot be read"),
            }
            tokio::select! {
                () = stop.cancelled() => break,
                () = tokio::time::sleep(RECONCILE) => {}
            }
        }
        for (_, (_, probe)) in running {
            probe.abort();
        }
    }

    async fn enabled(&self) -> Result<HashMap<LeaseKey, Arc<BackendView>>, Error> {
        let mut wanted = HashMap::new();
        for tenant in self.tenants.all().await? {
            for view in self.configurations.of(&tenant).await?.views().iter().filter(|view| view.enabled) {
                wanted.insert(LeaseKey { tenant: tenant.clone(), backend: view.id.clone() }, view.clone());
            }
        }
        Ok(wanted)
    }

    async fn probe(self: Arc<Self>, key: LeaseKey, backend: Arc<BackendView>) {
        let metrics = self.metrics.backend(&key.backend, backend.target.kind().as_str());
        let mut pause = FAILING;
        let mut failing = false;
        loop {
            let started = tokio::time::Instant::now();
            let connection = self.connections.of(&key.tenant, &backend);
            if let Ok(connection) = &connection {
                metrics.flow(connection.guard().flow());
            }
            let (outcome, breaker) = match &connection {
                Ok(connection) => (connection.probe(backend.timeout).await, connection.guard().state()),
                Err(error) => (Err(error.clone()), BreakerState::Closed),
            };
            let latency = outcome.is_ok().then(|| started.elapsed());
            metrics.health(if outcome.is_ok() { Up } else { Down });
            metrics.request("probe", outcome.as_ref().map_or_else(|error| error.reason.code(), |()| OK));
            metrics.breaker(match breaker {
                BreakerState::Closed => Breaker::Closed,
                BreakerState::HalfOpen { .. } => Breaker::HalfOpen,
                BreakerState::Open { .. } => Breaker::Open,
            });
            pause = match (outcome.is_ok(), failing) {
                (true, _) => IDLE,
                (false, false) => FAILING,
                (false, true) => (pause * 2).min(MOST_FAILING),
            };
            failing = outcome.is_err();
            if let Err(error) = self.note(&key, &backend, outcome, breaker, latency).await {
                tracing::warn!(backend.id = %key.backend, %error, "an event waits for the next probe");
                pause = FAILING;
            }
            let until_unreachable = breaker
                .open_since()
                .map(|since| {
                    (since + self.unreachable_after).saturating_duration_since(tokio::time::Instant::now())
                })
                .filter(|left| !left.is_zero());
            let next = pause.min(until_unreachable.unwrap_or(pause)).max(Duration::from_millis(100));
            // Reads of others may open or close the breaker: that is news as well.
            match &connection {
                Ok(connection) => {
                    let mut state = connection.guard().subscribe();
                    let _ = tokio::time::timeout(next, state.changed()).await;
                }
                Err(_) => tokio::time::sleep(next).await,
            }
            if pause == IDLE
                && connection.is_ok_and(|connection| connection.guard().state() != BreakerState::Closed)
            {
                pause = FAILING;
            }
        }
    }

    async fn note(
        &self,
        key: &LeaseKey,
        backend: &BackendView,
        outcome: Result<(), Error>,
        breaker: BreakerState,
        latency: Option<Duration>,
    ) -> Result<(), Error> {
        let now = self.clock.now();
        let open_for = breaker.open_since().map(|since| since.elapsed());
        let unreachable = open_for.is_some_and(|open| open >= self.unreachable_after);
        let before = self.health(key);
        let failures = match &outcome {
            Ok(()) => 0,
            Err(_) => before.as_ref().map_or(0, |health| health.failures).saturating_add(1),
        };
        let class = outcome.as_ref().err().map(|error| error.reason);
        let health = Health {
            probed: now,
            latency: latency.or(before.and_then(|health| health.latency)),
            outcome,
            failures,
            breaker,
            unreachable,
        };
        self.health.lock().unwrap_or_else(PoisonError::into_inner).insert(key.clone(), health);
        if unreachable {
            let since = open_for.map_or(now, |open| Timestamp::from_millis(now.as_millis() - millis(open)));
            self.begin_outage(key, backend, class.unwrap_or(Reason::BackendUnreachable), since, now).await
        } else if breaker == BreakerState::Closed && class.is_none() {
            self.end_outage(key, backend, now).await
        } else {
            Ok(())
        }
    }

    async fn begin_outage(
        &self,
        key: &LeaseKey,
        backend: &BackendView,
        reason: Reason,
        since: Timestamp,
        now: Timestamp,
    ) -> Result<(), Error> {
        let outage = outage_key(key);
        let kind = EventKind::BackendUnreachable { class: reason.code().into(), since };
        let tx = Tx::new()
            .expect_absent(outage.clone())
            .put(outage.clone(), self.records.seal(&outage, &Outage { since }));
        self.publish(tx, key, backend, kind, now).await
    }

    async fn end_outage(&self, key: &LeaseKey, backend: &BackendView, now: Timestamp) -> Result<(), Error> {
        let outage = outage_key(key);
        let Some((Outage { since }, version)) = self.records.get::<Outage>(&outage).await? else {
            return Ok(());
        };
        let tx = Tx::new().expect(outage.clone(), version).delete(outage);
        self.publish(tx, key, backend, EventKind::BackendRecovered { since }, now).await
    }

    async fn publish(
        &self,
        tx: Tx,
        key: &LeaseKey,
        backend: &BackendView,
        kind: EventKind,
        now: Timestamp,
    ) -> Result<(), Error> {
        let event = Event {
            id: unique(now),
            tenant: key.tenant.clone(),
            time: now,
            backend: key.backend.clone(),
            backend_name: backend.name.clone(),
            kind,
        };
        let at = event_key(&key.tenant, &event.id);
        match self.records.store().commit(tx.put(at.clone(), self.records.seal(&at, &event))).await {
            Ok(_) => {
                tracing::warn!(backend.id = %key.backend, backend.name = %backend.name, "{}", event.kind.type_name());
                Ok(())
            }
            // It was written before: this is the same outage.
            Err(CommitError::Precondition(_)) => Ok(()),
            Err(CommitError::Unavailable(error)) => Err(error.into()),
        }
    }
}

/// The key of an event; the outbox is in the order of time.
pub fn event_key(tenant: &TenantId, id: &str) -> Key {
    Key::new(tenant, Space::Event, id)
}

fn outage_key(key: &LeaseKey) -> Key {
    Key::new(&key.tenant, Space::Setting, format!("outage/{}", key.backend))
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}
