//! Status and events of backends in JSON.

use scaivault_domain::Error;
use scaivault_proto::federation::v1 as proto;
use serde::Serialize;
use serde_json::value::RawValue;
use utoipa::ToSchema;

use super::sync::SyncRun;
use super::{duration, given, rfc3339};
use crate::rest::answer::fault;

/// Connection and per-node state of a backend.
#[derive(Serialize, ToSchema)]
pub(in crate::rest) struct BackendStatus {
    id: String,
    name: String,
    /// `pending`, `healthy`, `degraded`, `unreachable` or `disabled`.
    status: &'static str,
    #[serde(flatten)]
    sync: SyncState,
    /// The control plane's connection.
    connection: Connection,
    /// Why it is not healthy, one sentence; empty if it is.
    reason: String,
    /// What to do about it, one sentence.
    next_step: String,
    /// Probes of the connection in a row that failed.
    consecutive_failures: u32,
    /// The tenant's current configuration generation.
    generation: u64,
    /// Every enrolled node that serves the tenant.
    nodes: Vec<NodeState>,
    /// When the control plane's login ends; null if it does not or there is none.
    #[schema(required)]
    login_expires_at: Option<String>,
    /// How often the control plane may call it now; null before its first call.
    #[schema(required)]
    call_budget: Option<CallBudget>,
}

/// How often the control plane may call a backend now. Nodes have parts of their own.
#[derive(Serialize, ToSchema)]
struct CallBudget {
    /// What the store's quotas leave its credential; empty if it has none.
    quotas: Vec<QuotaBudget>,
    /// Most calls at once; less than `max_concurrency` while the backend wants to be called less.
    concurrency: u32,
    /// Most calls at once otherwise.
    max_concurrency: u32,
    /// It is not called before that; null if it did not ask for a pause.
    #[schema(required)]
    throttled_until: Option<String>,
    /// Why it is called less than it could be, one sentence; empty if it is not.
    reason: String,
}

/// What is left of one quota of a store.
#[derive(Serialize, ToSchema)]
struct QuotaBudget {
    /// `values`, `metadata`, `lists` or `batches`.
    quota: String,
    /// Calls a second that can be kept up.
    per_second: f64,
    /// Calls at once, after a pause.
    burst: f64,
    /// Calls at once, now.
    remaining: f64,
}

impl From<proto::CallBudget> for CallBudget {
    fn from(budget: proto::CallBudget) -> Self {
        let quotas = budget.quotas.into_iter().map(|left| QuotaBudget {
            quota: left.quota,
            per_second: left.per_second,
            burst: left.burst,
            remaining: left.remaining,
        });
        CallBudget {
            quotas: quotas.collect(),
            concurrency: budget.concurrency,
            max_concurrency: budget.max_concurrency,
            throttled_until: rfc3339(budget.throttled_until.as_ref()),
            reason: budget.reason,
        }
    }
}

/// How the sync of a backend stands. Null, all of it, where nothing is synced.
#[derive(Default, Serialize, ToSchema)]
struct SyncState {
    /// When the last run that compared everything or nearly so ended; null before the first.
    #[schema(required)]
    last_sync: Option<String>,
    /// How long it took.
    #[schema(required)]
    last_sync_duration_ms: Option<u64>,
    /// How many secrets are held as copies.
    #[schema(required)]
    secrets_synced: Option<u64>,
    /// When the last run began.
    #[schema(required)]
    last_attempt: Option<String>,
    /// How the last run ended: `complete`, `partial`, `failed` or `cancelled`.
    #[schema(required)]
    last_outcome: Option<String>,
    /// Runs in a row that failed.
    #[schema(required)]
    sync_failures: Option<u32>,
    /// Age of the copy that was verified longest ago; null without copies.
    #[schema(required)]
    oldest_value_age_s: Option<u64>,
    /// When the next run begins; null while one runs.
    #[schema(required)]
    next_sync: Option<String>,
    /// The run under way.
    #[schema(required)]
    running: Option<SyncRun>,
    /// Paths that the last run skipped.
    #[schema(required)]
    skipped: Option<u64>,
    /// The last run whose deletions wait for consent, which is `{"allow_deletes": …}` in the body of a new sync.
    #[schema(required)]
    held_back_run: Option<String>,
}

impl From<proto::SyncStatus> for SyncState {
    fn from(sync: proto::SyncStatus) -> Self {
        let last_sync = rfc3339(sync.last_sync.as_ref());
        SyncState {
            last_sync_duration_ms: last_sync.is_some().then_some(sync.last_sync_duration_ms),
            last_sync,
            secrets_synced: Some(sync.secrets_synced),
            last_attempt: rfc3339(sync.last_attempt.as_ref()),
            last_outcome: given(sync.last_outcome),
            sync_failures: Some(sync.consecutive_failures),
            oldest_value_age_s: duration(sync.oldest_value_age.as_ref()).map(|age| age.as_secs()),
            next_sync: rfc3339(sync.next_sync.as_ref()),
            running: sync.running.map(SyncRun::from),
            skipped: Some(sync.skipped),
            held_back_run: given(sync.held_back_run),
        }
    }
}

/// What to do about deletions that wait for consent.
fn consent(run: &str) -> String {
    format!(
        "bring the secrets back in the backend, or consent to their deletion with \
         POST …/sync {{\"allow_deletes\": \"{run}\"}}"
    )
}

/// The control plane's connection to a backend.
#[derive(Serialize, ToSchema)]
struct Connection {
    /// `connected`, `disconnected` or `unknown`.
    status: String,
    /// The last probe's latency; null before the first.
    #[schema(required)]
    latency_ms: Option<u64>,
    /// When it was last probed.
    #[schema(required)]
    probed_at: Option<String>,
    /// `closed`, `open` or `half_open`.
    breaker: String,
}

/// How far one node is with the tenant's configuration.
#[derive(Serialize, ToSchema)]
struct NodeState {
    name: String,
    /// Whether its stream is up.
    connected: bool,
    /// The generation that was last sent to it.
    sent_generation: u64,
    /// The generation that is in force there.
    generation: u64,
    /// Why it refused a generation; null if it did not.
    #[schema(required)]
    refusal: Option<String>,
    /// Whether it holds a lease for the backend.
    has_lease: bool,
    /// Whether it holds every copy of the backend, as `prefetch` asks for.
    prefetched: bool,
    /// How many secrets it holds, of all backends and of ScaiVault's own.
    secrets: u64,
}

impl BackendStatus {
    /// The status as the service gave it.
    pub(in crate::rest) fn from_wire(status: proto::GetBackendStatusResponse) -> Self {
        let health = match status.status() {
            proto::BackendHealth::Pending | proto::BackendHealth::Unspecified => "pending",
            proto::BackendHealth::Healthy => "healthy",
            proto::BackendHealth::Degraded => "degraded",
            proto::BackendHealth::Unreachable => "unreachable",
            proto::BackendHealth::Disabled => "disabled",
        };
        let connection = status.connection.unwrap_or_else(|| proto::Connection {
            status: "unknown".into(),
            breaker: "closed".into(),
            ..Default::default()
        });
        let nodes = status.nodes.into_iter().map(|node| NodeState {
            name: node.name,
            connected: node.connected,
            sent_generation: node.sent_generation,
            generation: node.generation,
            refusal: given(node.refusal),
            has_lease: node.has_lease,
            prefetched: node.prefetched,
            secrets: node.secrets,
        });
        let sync = status.sync.map(SyncState::from).unwrap_or_default();
        let next_step = match &sync.held_back_run {
            Some(run) if status.next_step.is_empty() => consent(run),
            _ => status.next_step,
        };
        BackendStatus {
            id: status.id,
            name: status.name,
            status: health,
            sync,
            connection: Connection {
                probed_at: rfc3339(connection.probe_time.as_ref()),
                status: connection.status,
                latency_ms: connection.latency_ms,
                breaker: connection.breaker,
            },
            reason: status.reason,
            next_step,
            consecutive_failures: status.consecutive_failures,
            generation: status.generation,
            nodes: nodes.collect(),
            login_expires_at: rfc3339(status.login_expire_time.as_ref()),
            call_budget: status.call_budget.map(CallBudget::from),
        }
    }
}

/// Events, oldest first.
#[derive(Serialize, ToSchema)]
pub(in crate::rest) struct EventList {
    events: Vec<Event>,
    /// Where the next page begins; never empty, so that it can be kept.
    next_page_token: String,
}

/// One event, CloudEvents 1.0.
#[derive(Serialize, ToSchema)]
struct Event {
    /// `1.0`.
    specversion: &'static str,
    /// Unique.
    id: String,
    /// E.g. `federation.backend.unreachable`.
    r#type: String,
    /// `/v1/federation/backends/{id}`.
    source: String,
    /// The backend's name.
    subject: String,
    /// When it happened.
    #[serde(skip_serializing_if = "Option::is_none")]
    time: Option<String>,
    /// `application/json`.
    datacontenttype: &'static str,
    /// The event's own fields.
    #[schema(value_type = std::collections::BTreeMap<String, serde_json::Value>)]
    data: Box<RawValue>,
}

impl EventList {
    /// The events as the service gave them.
    ///
    /// # Errors
    /// `internal` if the data of one are not JSON.
    pub(in crate::rest) fn from_wire(list: proto::ListEventsResponse) -> Result<Self, Error> {
        let events = list.events.into_iter().map(|event| {
            let data =
                RawValue::from_string(event.data).map_err(|_| fault("the data of an event are not JSON"))?;
            Ok(Event {
                specversion: "1.0",
                id: event.id,
                r#type: event.r#type,
                source: event.source,
                subject: event.subject,
                time: rfc3339(event.time.as_ref()),
                datacontenttype: "application/json",
                data,
            })
        });
        Ok(EventList { events: events.collect::<Result<_, _>>()?, next_page_token: list.next_page_token })
    }
}
