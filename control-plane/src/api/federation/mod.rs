//! `scaivault.federation.v1`.

mod provider;
mod runs;
mod spec;
mod test;

use std::sync::Arc;
use std::time::Duration;

use scaivault_backends::connection::{Connection, Leases};
use scaivault_backends::guard::BreakerState;
use scaivault_discovery::{NodeBoard, PrefetchProgress};
use scaivault_domain::access::Scope;
use scaivault_domain::audit::Action;
use scaivault_domain::backend::{BackendId, BackendSpec};
use scaivault_domain::event::Event;
use scaivault_domain::lease::LeaseKey;
use scaivault_domain::sync::RunId;
use scaivault_domain::tenant::TenantId;
use scaivault_domain::time::{Clock, Timestamp};
use scaivault_domain::{Error, Reason};
use scaivault_edge::error::grpc::status;
use scaivault_edge::wire;
use scaivault_proto::federation::v1::federation_service_server::FederationService;
use scaivault_proto::federation::v1::{self as pb};
use tokio::time::Instant;
use tonic::{Request, Response, Status, async_trait};

use super::{Door, changed, uninterrupted};
use crate::connections::Connections;
use crate::credentials::{Credentials, Holder};
use crate::monitor::Monitor;
use crate::service::federation::{Consent, Covered, Federation};
use crate::service::nodes::Nodes;
use crate::service::{Configurations, PageRequest};
use crate::store::{Owner, Records, Revision, RowVersion, Space};
use crate::sync::{Leaving, Losing, Syncs};

/// How long a deletion waits for nodes to forget the backend.
const FORGET: Duration = Duration::from_secs(2);
/// The longest that a request waits for the end of a run.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// The service on the wire.
#[derive(Clone, Debug)]
pub struct FederationApi(Arc<Parts>);

/// What the service is made of.
#[derive(Debug)]
pub struct Parts {
    /// Who is at the door.
    pub door: Door,
    /// Changes of backends.
    pub federation: Arc<Federation>,
    /// The committed configurations.
    pub configurations: Arc<Configurations>,
    /// What probes say.
    pub monitor: Arc<Monitor>,
    /// The sync of backends.
    pub syncs: Arc<Syncs>,
    /// What logins say.
    pub credentials: Arc<Credentials>,
    /// How backends are called.
    pub connections: Arc<Connections>,
    /// Which nodes there are.
    pub nodes: Arc<Nodes>,
    /// How far they are.
    pub board: Arc<NodeBoard>,
    /// The outbox.
    pub records: Records,
    /// Wall time.
    pub clock: Arc<dyn Clock>,
}

impl FederationApi {
    /// Serves what `parts` know.
    pub fn new(parts: Parts) -> Self {
        FederationApi(Arc::new(parts))
    }
}

#[async_trait]
impl FederationService for FederationApi {
    async fn create_backend(
        &self,
        request: Request<pb::CreateBackendRequest>,
    ) -> Result<Response<pb::CreateBackendResponse>, Status> {
        let name = request.get_ref().backend.as_ref().map(|backend| backend.name.clone()).unwrap_or_default();
        let door = &self.0.door;
        let action = if request.get_ref().validate_only { Action::BackendTest } else { Action::BackendWrite };
        let (allowed, context) = door.administer(&request, Scope::FederationWrite, action, &name).await?;
        let message = request.into_inner();
        let parts = self.0.clone();
        uninterrupted(async move {
            let (federation, covered) = (&parts.federation, covered(message.adopt));
            let spec = spec::parse(message.backend.unwrap_or_default());
            if message.validate_only {
                let outcome = async { federation.try_create(&allowed, &context, spec?, covered).await };
                let tried = parts.door.close(&allowed, &context, action, &name, outcome.await).await?;
                let (backend, test) = test::tried(&tried);
                return Ok(Response::new(pb::CreateBackendResponse { backend, test }));
            }
            let outcome = async { federation.create(&allowed, &context, spec?, covered).await };
            let done = parts.door.close(&allowed, &context, action, &name, outcome.await).await?;
            let (record, version) = &done.value;
            let backend = Some(spec::backend(record, *version));
            Ok(changed(pb::CreateBackendResponse { backend, test: None }, done.revision))
        })
        .await
    }

    async fn get_backend(
        &self,
        request: Request<pb::GetBackendRequest>,
    ) -> Result<Response<pb::GetBackendResponse>, Status> {
        let allowed = self.0.door.look(&request, Scope::FederationRead, Action::BackendRead).await?;
        let id = BackendId::parse(&request.get_ref().id).map_err(status)?;
        let configuration =
            self.0.configurations.of(allowed.tenant()).await.map_err(|error| status(error.into()))?;
        let (record, version) = configuration.backend(&id).map_err(status)?;
        Ok(Response::new(pb::GetBackendResponse { backend: Some(spec::backend(record, *version)) }))
    }

    async fn list_backends(
        &self,
        request: Request<pb::ListBackendsRequest>,
    ) -> Result<Response<pb::ListBackendsResponse>, Status> {
        let allowed = self.0.door.look(&request, Scope::FederationRead, Action::BackendRead).await?;
        let message = request.into_inner();
        let page = PageRequest::parse(message.page_size, &message.page_token).map_err(status)?;
        let configuration =
            self.0.configurations.of(allowed.tenant()).await.map_err(|error| status(error.into()))?;
        let after = page.after.as_deref().unwrap_or("");
        let mut rest =
            configuration.backends.iter().filter(|(record, _)| record.spec.name.as_str() > after).peekable();
        let backends: Vec<_> =
            rest.by_ref().take(page.size).map(|(record, version)| spec::backend(record, *version)).collect();
        let next = rest.peek().and(backends.last()).map(|last| last.name.clone());
        Ok(Response::new(pb::ListBackendsResponse { backends, next_page_token: next.unwrap_or_default() }))
    }

    async fn update_backend(
        &self,
        request: Request<pb::UpdateBackendRequest>,
    ) -> Result<Response<pb::UpdateBackendResponse>, Status> {
        let id = request.get_ref().backend.as_ref().map(|backend| backend.id.clone()).unwrap_or_default();
        let door = &self.0.door;
        let action = if request.get_ref().validate_only { Action::BackendTest } else { Action::BackendWrite };
        let (allowed, context) = door.administer(&request, Scope::FederationWrite, action, &id).await?;
        let message = request.into_inner();
        let parts = self.0.clone();
        uninterrupted(async move {
            let federation = &parts.federation;
            let wanted = message.backend.unwrap_or_default();
            let at =
                BackendId::parse(&wanted.id).and_then(|backend| Ok((backend, parse_etag(&wanted.etag)?)));
            let mask = message.update_mask.filter(|mask| !mask.paths.is_empty());
            let edit = |before: &BackendSpec| spec::edit(before, wanted.clone(), mask.as_ref());
            let losing = if message.force { Losing::Accepted } else { Losing::Refused };
            let consent = Consent { covered: covered(message.adopt), losing };
            if message.validate_only {
                let outcome = async {
                    let (backend, expected) = at?;
                    federation.try_update(&allowed, &context, &backend, expected, consent, edit).await
                };
                let tried = parts.door.close(&allowed, &context, action, &id, outcome.await).await?;
                let (backend, test) = test::tried(&tried);
                return Ok(Response::new(pb::UpdateBackendResponse { backend, test }));
            }
            let outcome = async {
                let (backend, expected) = at?;
                federation.update(&allowed, &context, &backend, expected, consent, edit).await
            };
            let done = parts.door.close(&allowed, &context, action, &id, outcome.await).await?;
            let (record, version) = &done.value;
            let backend = Some(spec::backend(record, *version));
            Ok(changed(pb::UpdateBackendResponse { backend, test: None }, done.revision))
        })
        .await
    }

    async fn test_backend(
        &self,
        request: Request<pb::TestBackendRequest>,
    ) -> Result<Response<pb::TestBackendResponse>, Status> {
        let id = request.get_ref().id.clone();
        let door = &self.0.door;
        let (allowed, context) =
            door.administer(&request, Scope::FederationWrite, Action::BackendTest, &id).await?;
        let parts = self.0.clone();
        // To its end, so that the login is revoked.
        uninterrupted(async move {
            let outcome = async { parts.federation.test(&allowed, &context, &BackendId::parse(&id)?).await };
            let report =
                parts.door.close(&allowed, &context, Action::BackendTest, &id, outcome.await).await?;
            Ok(Response::new(pb::TestBackendResponse { test: Some(test::message(&report)) }))
        })
        .await
    }

    async fn delete_backend(
        &self,
        request: Request<pb::DeleteBackendRequest>,
    ) -> Result<Response<pb::DeleteBackendResponse>, Status> {
        let id = request.get_ref().id.clone();
        let door = &self.0.door;
        let (allowed, context) =
            door.administer(&request, Scope::FederationWrite, Action::BackendWrite, &id).await?;
        let message = request.into_inner();
        let parts = self.0.clone();
        uninterrupted(async move {
            let outcome = async {
                let backend_id = BackendId::parse(&message.id)?;
                let leaving = match message.copies() {
                    pb::CopiesPolicy::Unspecified | pb::CopiesPolicy::Detach => Leaving::Detached,
                    pb::CopiesPolicy::Purge => Leaving::Purged,
                };
                let etag = parse_etag(&message.etag)?;
                parts.federation.delete(&allowed, &context, &backend_id, etag, leaving).await
            };
            let outcome = outcome.await;
            let done = parts.door.close(&allowed, &context, Action::BackendWrite, &id, outcome).await?;
            let generation = parts
                .configurations
                .of(allowed.tenant())
                .await
                .map_err(|error| status(error.into()))?
                .generation;
            let pending = parts.board.acknowledged(allowed.tenant(), generation, FORGET).await;
            let pending_nodes = pending.into_iter().map(|name| name.to_string()).collect();
            Ok(changed(pb::DeleteBackendResponse { pending_nodes }, done.revision))
        })
        .await
    }

    async fn get_backend_status(
        &self,
        request: Request<pb::GetBackendStatusRequest>,
    ) -> Result<Response<pb::GetBackendStatusResponse>, Status> {
        let allowed = self.0.door.look(&request, Scope::FederationRead, Action::BackendRead).await?;
        let id = BackendId::parse(&request.get_ref().id).map_err(status)?;
        self.0.status(allowed.tenant(), id).await.map(Response::new).map_err(status)
    }

    async fn sync_backend(
        &self,
        request: Request<pb::SyncBackendRequest>,
    ) -> Result<Response<pb::SyncBackendResponse>, Status> {
        let id = request.get_ref().id.clone();
        let door = &self.0.door;
        let (allowed, context) =
            door.administer(&request, Scope::FederationWrite, Action::SyncRun, &id).await?;
        let message = request.into_inner();
        let outcome = async {
            let key = self.0.key(&allowed, &message.id).await?;
            let wait = message.wait.map(|wait| parse_wait(&wait)).transpose()?;
            let allow_deletes = Some(message.allow_deletes.as_str()).filter(|run| !run.is_empty());
            let allow_deletes = allow_deletes
                .map(RunId::parse)
                .transpose()
                .map_err(|_| Error::invalid("/allow_deletes", "is the id of a run, e.g. `run_…`"))?;
            let run = self.0.syncs.request(&allowed, &context, &key, allow_deletes).await?;
            let runs = self.0.syncs.runs();
            let report = match wait {
                None => runs.report(&key, &run).await?,
                Some(wait) => runs.wait(&key, &run, wait).await?,
            };
            Ok(pb::SyncBackendResponse { run_id: run.to_string(), run: Some(self.0.run(&key, report)) })
        };
        let outcome = outcome.await;
        door.close(&allowed, &context, Action::SyncRun, &id, outcome).await.map(Response::new)
    }

    async fn get_sync(
        &self,
        request: Request<pb::GetSyncRequest>,
    ) -> Result<Response<pb::GetSyncResponse>, Status> {
        let allowed = self.0.door.look(&request, Scope::FederationRead, Action::BackendRead).await?;
        let message = request.into_inner();
        let answer = async {
            let key = self.0.key(&allowed, &message.id).await?;
            let run = RunId::parse(&message.run_id)?;
            let page = PageRequest::parse(message.page_size, &message.page_token)?;
            let report = self.0.syncs.runs().report(&key, &run).await?;
            let (skipped, failed, next_page_token) = self.0.left_out(&allowed, &key, &run, &page).await?;
            Ok(pb::GetSyncResponse { run: Some(self.0.run(&key, report)), skipped, failed, next_page_token })
        };
        answer.await.map(Response::new).map_err(status)
    }

    async fn list_syncs(
        &self,
        request: Request<pb::ListSyncsRequest>,
    ) -> Result<Response<pb::ListSyncsResponse>, Status> {
        let allowed = self.0.door.look(&request, Scope::FederationRead, Action::BackendRead).await?;
        let message = request.into_inner();
        let answer = async {
            let key = self.0.key(&allowed, &message.id).await?;
            let page = PageRequest::parse(message.page_size, &message.page_token)?;
            let reports = self.0.syncs.runs().reports(&key).await?;
            let after = page.after.as_deref();
            let mut rest = reports
                .into_iter()
                .filter(|report| after.is_none_or(|after| report.run_id.as_str() < after))
                .peekable();
            let syncs: Vec<_> =
                rest.by_ref().take(page.size).map(|report| self.0.run(&key, report)).collect();
            let next = rest.peek().and(syncs.last()).map(|last| last.run_id.clone());
            Ok(pb::ListSyncsResponse { syncs, next_page_token: next.unwrap_or_default() })
        };
        answer.await.map(Response::new).map_err(status)
    }

    async fn cancel_sync(
        &self,
        request: Request<pb::CancelSyncRequest>,
    ) -> Result<Response<pb::CancelSyncResponse>, Status> {
        let id = request.get_ref().id.clone();
        let door = &self.0.door;
        let (allowed, context) =
            door.administer(&request, Scope::FederationWrite, Action::SyncRun, &id).await?;
        let message = request.into_inner();
        let outcome = async {
            let key = self.0.key(&allowed, &message.id).await?;
            let report =
                self.0.syncs.cancel(&allowed, &context, &key, &RunId::parse(&message.run_id)?).await?;
            Ok(pb::CancelSyncResponse { run: Some(self.0.run(&key, report)) })
        };
        let outcome = outcome.await;
        door.close(&allowed, &context, Action::SyncRun, &id, outcome).await.map(Response::new)
    }

    async fn list_events(
        &self,
        request: Request<pb::ListEventsRequest>,
    ) -> Result<Response<pb::ListEventsResponse>, Status> {
        let allowed = self.0.door.look(&request, Scope::FederationRead, Action::BackendRead).await?;
        let message = request.into_inner();
        let page = PageRequest::parse(message.page_size, &message.page_token).map_err(status)?;
        let owner = Owner::from(allowed.tenant());
        let rows = self
            .0
            .records
            .scan_page::<Event>(&owner, Space::Event, "", page.after.as_deref(), page.size)
            .await
            .map_err(|error| status(error.into()))?;
        let next_page_token = rows.last().map(|(name, ..)| name.clone()).unwrap_or(message.page_token);
        let events = rows.into_iter().map(|(_, event, _)| wire_event(&event)).collect();
        Ok(Response::new(pb::ListEventsResponse { events, next_page_token }))
    }
}

impl Parts {
    async fn status(&self, tenant: &TenantId, id: BackendId) -> Result<pb::GetBackendStatusResponse, Error> {
        let configuration = self.configurations.of(tenant).await?;
        let (record, _) = configuration.backend(&id)?;
        let key = LeaseKey { tenant: tenant.clone(), backend: id.clone() };
        let health = self.monitor.health(&key);
        let node_login = self.credentials.failure(&key, Holder::Nodes);
        let sync = match record.spec.is_synced() {
            true => Some(self.syncs.states().of(&key).await?.0),
            false => None,
        };
        let held = sync.as_ref().and_then(|state| state.problem());
        let disconnected =
            health.as_ref().and_then(|health| health.outcome.as_ref().err()).or(node_login.as_ref());
        let problem = disconnected.or(held.as_ref());
        let verdict = match (&health, problem) {
            _ if !record.spec.enabled => pb::BackendHealth::Disabled,
            (None, _) => pb::BackendHealth::Pending,
            (Some(health), _) if health.unreachable => pb::BackendHealth::Unreachable,
            _ if disconnected.is_some_and(|error| is_outage(error.reason)) => pb::BackendHealth::Unreachable,
            (Some(_), Some(_)) => pb::BackendHealth::Degraded,
            (Some(_), None) => pb::BackendHealth::Healthy,
        };
        let connected = health
            .as_ref()
            .map(|health| health.outcome.as_ref().is_ok_and(|()| true) || !is_outage_of(health));
        let mut nodes = Vec::new();
        for name in self.nodes.serving(tenant).await? {
            let known = self.board.snapshot(&name);
            let view =
                known.as_ref().and_then(|node| node.progress.views.get(tenant)).cloned().unwrap_or_default();
            nodes.push(pb::NodeState {
                name: name.to_string(),
                connected: known.as_ref().is_some_and(|node| node.connected),
                sent_generation: view.sent.unwrap_or_default(),
                generation: view.acknowledged.unwrap_or_default(),
                refusal: view.refusal.map(|refusal| refusal.message).unwrap_or_default(),
                has_lease: known.as_ref().is_some_and(|node| node.progress.leases.contains_key(&key)),
                prefetched: known.as_ref().is_some_and(|node| {
                    node.progress.prefetch.get(&key) == Some(&PrefetchProgress::Complete)
                }),
                secrets: known.map_or(0, |node| node.progress.secrets as u64),
            });
        }
        Ok(pb::GetBackendStatusResponse {
            id: id.to_string(),
            name: record.spec.name.to_string(),
            status: verdict.into(),
            reason: problem
                .filter(|_| record.spec.enabled)
                .map(|error| error.message.to_string())
                .unwrap_or_default(),
            next_step: problem.map(|error| error.what_next()).unwrap_or_default().into(),
            connection: Some(pb::Connection {
                status: match connected {
                    Some(true) => "connected",
                    Some(false) => "disconnected",
                    None => "unknown",
                }
                .into(),
                latency_ms: health
                    .as_ref()
                    .and_then(|health| health.latency)
                    .map(|latency| u64::try_from(latency.as_millis()).unwrap_or(u64::MAX)),
                probe_time: health.as_ref().map(|health| wire::time(health.probed)),
                breaker: match health.as_ref().map_or(BreakerState::Closed, |health| health.breaker) {
                    BreakerState::Closed => "closed",
                    BreakerState::Open { .. } => "open",
                    BreakerState::HalfOpen { .. } => "half_open",
                }
                .into(),
            }),
            consecutive_failures: health.map_or(0, |health| health.failures),
            generation: configuration.generation,
            nodes,
            login_expire_time: self
                .credentials
                .ends_in(&key)
                .map(|left| wire::time(self.clock.now().after(left))),
            sync: match &sync {
                Some(state) => Some(self.sync_status(&key, state).await?),
                None => None,
            },
            call_budget: self
                .connections
                .open(&key)
                .filter(|_| record.spec.enabled)
                .map(|connection| call_budget(&connection, self.clock.now())),
        })
    }
}

/// How a backend may be called now.
fn call_budget(connection: &Connection<impl Leases>, now: Timestamp) -> pb::CallBudget {
    let flowing = connection.guard().flowing();
    let pause = |until: Instant| now.after(until.saturating_duration_since(Instant::now()));
    let throttled_until = flowing.throttled_until.map(pause);
    let reason = match throttled_until {
        Some(until) => format!("slowed down by the backend until {until}"),
        None if flowing.concurrency < flowing.most => {
            format!("slowed down by the backend to {} calls at once", flowing.concurrency)
        }
        None => String::new(),
    };
    let count = |calls| u32::try_from(calls).unwrap_or(u32::MAX);
    let quotas = connection.budget().remaining().into_iter().map(|left| pb::QuotaBudget {
        quota: left.quota.as_str().into(),
        per_second: left.per_second,
        burst: left.burst,
        remaining: left.now,
    });
    pb::CallBudget {
        quotas: quotas.collect(),
        concurrency: count(flowing.concurrency),
        max_concurrency: count(flowing.most),
        throttled_until: throttled_until.map(wire::time),
        reason,
    }
}

fn is_outage(reason: Reason) -> bool {
    matches!(reason, Reason::BackendUnreachable | Reason::BackendTimeout)
}

fn is_outage_of(health: &crate::monitor::Health) -> bool {
    health.outcome.as_ref().is_err_and(|error| is_outage(error.reason))
}

fn covered(adopt: bool) -> Covered {
    if adopt { Covered::Adopted } else { Covered::Refused }
}

fn parse_etag(etag: &str) -> Result<Option<RowVersion>, Error> {
    if etag.is_empty() {
        return Ok(None);
    }
    let number = etag.parse().map_err(|_| Error::invalid("/etag", "is not one that a read gave"))?;
    Ok(Some(Revision::from_u64(number)))
}

fn parse_wait(wait: &prost_types::Duration) -> Result<Duration, Error> {
    let wait = wire::parse_duration(Reason::InvalidRequest, "/wait", wait)?;
    if wait > LONGEST_WAIT {
        return Err(Error::invalid("/wait", "is at most 60s"));
    }
    Ok(wait)
}

fn wire_event(event: &Event) -> pb::Event {
    // The kind serialises with its name, which stands in `type` already.
    let mut data = serde_json::to_value(&event.kind).unwrap_or_default();
    if let Some(fields) = data.as_object_mut() {
        fields.remove("type");
        // Stored as a number; times in the API are RFC 3339.
        if let Some(since) = fields.get("since").and_then(serde_json::Value::as_i64) {
            fields.insert("since".into(), Timestamp::from_millis(since).to_string().into());
        }
    }
    pb::Event {
        id: event.id.clone(),
        r#type: event.kind.type_name().into(),
        source: format!("/v1/federation/backends/{}", event.backend),
        subject: event.backend_name.to_string(),
        time: Some(wire::time(event.time)),
        data: data.to_string(),
    }
}
