//! `scaivault.federation.v1`.

use std::sync::Arc;
use std::time::Duration;

use prost_types::FieldMask;
use scaivault_backends::guard::BreakerState;
use scaivault_discovery::NodeBoard;
use scaivault_domain::access::Scope;
use scaivault_domain::audit::Action;
use scaivault_domain::backend::{
    BackendId, BackendSpec, DEFAULT_TIMEOUT, Endpoint, KvMount, KvVersion, Mode, Provider, VaultAuthMethod,
    VaultLogin, VaultTarget, check_timeout,
};
use scaivault_domain::event::Event;
use scaivault_domain::lease::LeaseKey;
use scaivault_domain::mapping::PathMapping;
use scaivault_domain::path::SecretPath;
use scaivault_domain::tenant::{BackendName, TenantId};
use scaivault_domain::time::{Clock, Timestamp};
use scaivault_domain::{Error, Reason};
use scaivault_edge::error::grpc::status;
use scaivault_edge::wire;
use scaivault_proto::federation::v1::backend::Config;
use scaivault_proto::federation::v1::federation_service_server::FederationService;
use scaivault_proto::federation::v1::{self as pb};
use tonic::{Request, Response, Status, async_trait};

use super::{Door, changed, uninterrupted};
use crate::credentials::{Credentials, Holder};
use crate::model::BackendRecord;
use crate::monitor::Monitor;
use crate::service::federation::{Covered, Federation};
use crate::service::nodes::Nodes;
use crate::service::{Configurations, PageRequest};
use crate::store::{Owner, Records, Revision, RowVersion, Space};

/// How long a deletion waits for nodes to forget the backend.
const FORGET: Duration = Duration::from_secs(2);

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
    /// What logins say.
    pub credentials: Arc<Credentials>,
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
        let (allowed, context) =
            door.administer(&request, Scope::FederationWrite, Action::BackendWrite, &name).await?;
        let message = request.into_inner();
        let parts = self.0.clone();
        uninterrupted(async move {
            let outcome = async {
                let spec = parse_spec(message.backend.unwrap_or_default())?;
                parts.federation.create(&allowed, &context, spec, covered(message.adopt)).await
            };
            let outcome = outcome.await;
            let done = parts.door.close(&allowed, &context, Action::BackendWrite, &name, outcome).await?;
            let (record, version) = &done.value;
            Ok(changed(pb::CreateBackendResponse { backend: Some(backend(record, *version)) }, done.revision))
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
        Ok(Response::new(pb::GetBackendResponse { backend: Some(backend(record, *version)) }))
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
            rest.by_ref().take(page.size).map(|(record, version)| backend(record, *version)).collect();
        let next = rest.peek().and(backends.last()).map(|last| last.name.clone());
        Ok(Response::new(pb::ListBackendsResponse { backends, next_page_token: next.unwrap_or_default() }))
    }

    async fn update_backend(
        &self,
        request: Request<pb::UpdateBackendRequest>,
    ) -> Result<Response<pb::UpdateBackendResponse>, Status> {
        let id = request.get_ref().backend.as_ref().map(|backend| backend.id.clone()).unwrap_or_default();
        let door = &self.0.door;
        let (allowed, context) =
            door.administer(&request, Scope::FederationWrite, Action::BackendWrite, &id).await?;
        let message = request.into_inner();
        let parts = self.0.clone();
        uninterrupted(async move {
            let outcome = async {
                let wanted = message.backend.unwrap_or_default();
                let backend_id = BackendId::parse(&wanted.id)?;
                let expected = parse_etag(&wanted.etag)?;
                let mask = message.update_mask.filter(|mask| !mask.paths.is_empty());
                let edit = |before: &BackendSpec| edit(before, wanted.clone(), mask.as_ref());
                parts
                    .federation
                    .update(&allowed, &context, &backend_id, expected, covered(message.adopt), edit)
                    .await
            };
            let outcome = outcome.await;
            let done = parts.door.close(&allowed, &context, Action::BackendWrite, &id, outcome).await?;
            let (record, version) = &done.value;
            Ok(changed(pb::UpdateBackendResponse { backend: Some(backend(record, *version)) }, done.revision))
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
                parts.federation.delete(&allowed, &context, &backend_id, parse_etag(&message.etag)?).await
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
        let allowed = self.0.door.look(&request, Scope::FederationWrite, Action::BackendWrite).await?;
        let id = BackendId::parse(&request.get_ref().id).map_err(status)?;
        let configuration =
            self.0.configurations.of(allowed.tenant()).await.map_err(|error| status(error.into()))?;
        let (record, _) = configuration.backend(&id).map_err(status)?;
        match record.spec.mode {
            Mode::Proxy => Err(status(
                Error::new(
                    Reason::WrongMode,
                    "a backend in proxy mode has nothing to sync: every read is current",
                )
                .next("read the secret through ScaiVault; the backend answers"),
            )),
        }
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
        let problem =
            health.as_ref().and_then(|health| health.outcome.as_ref().err()).or(node_login.as_ref());
        let verdict = match (&health, problem) {
            _ if !record.spec.enabled => pb::BackendHealth::Disabled,
            (None, _) => pb::BackendHealth::Pending,
            (Some(health), _) if health.unreachable => pb::BackendHealth::Unreachable,
            (Some(_), Some(error)) if is_outage(error.reason) => pb::BackendHealth::Unreachable,
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
                has_lease: known.is_some_and(|node| node.progress.leases.contains_key(&key)),
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
            next_step: problem.and_then(|error| error.next_step.as_deref()).unwrap_or_default().into(),
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
        })
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

/// The configuration that a message describes.
fn parse_spec(wanted: pb::Backend) -> Result<BackendSpec, Error> {
    Ok(BackendSpec {
        name: BackendName::parse(&wanted.name)?,
        provider: parse_provider(wanted.config)?,
        mapping: parse_rules(wanted.rules)?,
        mode: parse_mode(wanted.mode)?,
        enabled: wanted.enabled.unwrap_or(true),
        timeout: parse_timeout(wanted.timeout)?,
    })
}

/// The configuration with the masked fields taken from a message.
fn edit(before: &BackendSpec, wanted: pb::Backend, mask: Option<&FieldMask>) -> Result<BackendSpec, Error> {
    let Some(mask) = mask.filter(|mask| !mask.paths.iter().any(|path| path == "*")) else {
        return parse_spec(wanted);
    };
    let mut spec = before.clone();
    for path in &mask.paths {
        match path.as_str() {
            "name" => spec.name = BackendName::parse(&wanted.name)?,
            "hashicorp_vault" => spec.provider = parse_provider(wanted.config.clone())?,
            "rules" => spec.mapping = parse_rules(wanted.rules.clone())?,
            "mode" => spec.mode = parse_mode(wanted.mode)?,
            "enabled" => spec.enabled = wanted.enabled.unwrap_or(true),
            "timeout" => spec.timeout = parse_timeout(wanted.timeout)?,
            _ => {
                return Err(Error::invalid(
                    "/update_mask",
                    "has fields other than name, hashicorp_vault, rules, mode, enabled, timeout",
                ));
            }
        }
    }
    Ok(spec)
}

fn parse_rules(rules: Vec<pb::PathRule>) -> Result<PathMapping, Error> {
    PathMapping::parse(rules.into_iter().map(|rule| (rule.pattern, rule.template)))
}

fn parse_mode(mode: i32) -> Result<Mode, Error> {
    match pb::Mode::try_from(mode) {
        Ok(pb::Mode::Proxy) => Ok(Mode::Proxy),
        Ok(pb::Mode::Unspecified) | Err(_) => Mode::parse(""),
    }
}

fn parse_timeout(timeout: Option<prost_types::Duration>) -> Result<Duration, Error> {
    match timeout {
        None => Ok(DEFAULT_TIMEOUT),
        Some(timeout) => {
            check_timeout(wire::parse_duration(Reason::InvalidConfig, "/config/timeout", &timeout)?)
        }
    }
}

fn parse_provider(config: Option<Config>) -> Result<Provider, Error> {
    let Some(Config::HashicorpVault(config)) = config else {
        return Err(Error::field(Reason::InvalidConfig, "/config", "is required"));
    };
    let invalid = |field: &str, detail: &'static str| {
        Error::field(Reason::InvalidConfig, format!("/config/{field}"), detail)
    };
    let method = VaultAuthMethod::parse(&config.auth_method)?;
    let mount = if config.auth_mount.is_empty() { method.as_str().to_owned() } else { config.auth_mount };
    if !is_mount(&mount) {
        return Err(invalid("auth_mount", "is a path such as `approle` or `team/approle`"));
    }
    let credentials = SecretPath::check(&config.auth_config_path)
        .map_err(|fault| invalid("auth_config_path", fault.detail()))?;
    if !config.namespace.is_empty() && !is_mount(config.namespace.trim_end_matches('/')) {
        return Err(invalid("namespace", "is a path such as `team` or `team/project`"));
    }
    let kv = config.kv.map(|kv| {
        let version = match kv.version {
            1 => KvVersion::V1,
            2 => KvVersion::V2,
            _ => return Err(invalid("kv_version", "is 1 or 2")),
        };
        if !is_mount(&kv.path) {
            return Err(invalid("kv_mount", "is a path such as `secret` or `team/kv`"));
        }
        Ok(KvMount { path: kv.path, version })
    });
    if method != VaultAuthMethod::Token && (!config.lease_policies.is_empty() || config.allow_static_on_nodes)
    {
        let field = if config.lease_policies.is_empty() { "allow_static_on_nodes" } else { "lease_policies" };
        return Err(invalid(field, "belongs to auth_method `token`"));
    }
    let target = VaultTarget {
        endpoint: Endpoint::parse(&config.endpoint)?,
        namespace: (!config.namespace.is_empty()).then_some(config.namespace),
        ca_cert: (!config.ca_cert.is_empty()).then_some(config.ca_cert),
        tls_verify: config.tls_verify.unwrap_or(true),
        kv: kv.transpose()?,
    };
    // Certificates that cannot be used are an error now, not at the first read.
    scaivault_backends::vault_client(&target)
        .map_err(|_| invalid("ca_cert", "has no certificate in PEM that can be used"))?;
    let login = VaultLogin {
        method,
        mount,
        credentials,
        lease_policies: config.lease_policies,
        allow_static_on_nodes: config.allow_static_on_nodes,
    };
    Ok(Provider::HashicorpVault { target, login })
}

/// Whether `text` can stand in a URL and in a header as it is.
fn is_mount(text: &str) -> bool {
    text.len() <= 255
        && text.split('/').all(|segment| {
            !matches!(segment, "" | "." | "..")
                && segment.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
        })
}

fn backend(record: &BackendRecord, version: RowVersion) -> pb::Backend {
    let spec = &record.spec;
    let Provider::HashicorpVault { target, login } = &spec.provider;
    let config = pb::HashicorpVaultConfig {
        endpoint: target.endpoint.to_string(),
        auth_method: login.method.as_str().into(),
        auth_config_path: login.credentials.to_string(),
        auth_mount: login.mount.clone(),
        tls_verify: Some(target.tls_verify),
        namespace: target.namespace.clone().unwrap_or_default(),
        ca_cert: target.ca_cert.clone().unwrap_or_default(),
        kv: target.kv.as_ref().map(|kv| pb::KvMount {
            path: kv.path.clone(),
            version: match kv.version {
                KvVersion::V1 => 1,
                KvVersion::V2 => 2,
            },
        }),
        lease_policies: login.lease_policies.clone(),
        allow_static_on_nodes: login.allow_static_on_nodes,
    };
    pb::Backend {
        id: record.id.to_string(),
        name: spec.name.to_string(),
        config: Some(Config::HashicorpVault(config)),
        rules: spec
            .mapping
            .rules()
            .iter()
            .map(|rule| pb::PathRule {
                pattern: rule.pattern.to_string(),
                template: rule.template.to_string(),
            })
            .collect(),
        mode: match spec.mode {
            Mode::Proxy => pb::Mode::Proxy,
        }
        .into(),
        enabled: Some(spec.enabled),
        timeout: Some(wire::duration(spec.timeout)),
        etag: version.to_string(),
        generation: record.generation,
        create_time: Some(wire::time(record.created)),
        update_time: Some(wire::time(record.updated)),
    }
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
