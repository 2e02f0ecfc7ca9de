//! Events: facts that somebody may want to be woken for. CloudEvents 1.0 in the API.

use serde::{Deserialize, Serialize};

use crate::backend::BackendId;
use crate::sync::report::{Counts, Outcome, RunId};
use crate::tenant::{BackendName, TenantId};
use crate::time::Timestamp;

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type")]
pub enum EventKind {
    /// A backend's breaker has been open for long enough to call somebody.
    #[serde(rename = "federation.backend.unreachable")]
    BackendUnreachable {
        /// The class of the last failure, e.g. `timeout`.
        class: String,
        /// When the first failure of this outage was seen.
        since: Timestamp,
    },
    /// The breaker of such a backend has closed.
    #[serde(rename = "federation.backend.recovered")]
    BackendRecovered {
        /// When the outage began.
        since: Timestamp,
    },
    /// A cycle ended, whole or with something left out.
    #[serde(rename = "federation.sync.completed")]
    SyncCompleted {
        /// Which run.
        run_id: RunId,
        /// `complete` or `partial`.
        outcome: Outcome,
        /// How many paths went which way.
        counts: Counts,
    },
    /// A cycle came to nothing, or somebody ended it.
    #[serde(rename = "federation.sync.failed")]
    SyncFailed {
        /// Which run.
        run_id: RunId,
        /// The class of the failure, e.g. `transient`.
        class: String,
        /// What happened, without anything that the backend sent.
        message: String,
    },
}

impl EventKind {
    /// The CloudEvents `type`.
    pub fn type_name(&self) -> &'static str {
        match self {
            EventKind::BackendUnreachable { .. } => "federation.backend.unreachable",
            EventKind::BackendRecovered { .. } => "federation.backend.recovered",
            EventKind::SyncCompleted { .. } => "federation.sync.completed",
            EventKind::SyncFailed { .. } => "federation.sync.failed",
        }
    }
}

/// One row of the outbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Unique; also the position in the outbox.
    pub id: String,
    /// Whose it is.
    pub tenant: TenantId,
    /// When it happened.
    pub time: Timestamp,
    /// The backend that it is about.
    pub backend: BackendId,
    /// Its name, for people.
    pub backend_name: BackendName,
    /// What happened.
    #[serde(flatten)]
    pub kind: EventKind,
}
