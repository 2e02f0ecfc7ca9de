//! Sync runs in JSON.

use std::collections::BTreeMap;

use scaivault_domain::Error;
use scaivault_domain::sync::RunId;
use scaivault_proto::federation::v1 as proto;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{given, rfc3339};
use crate::rest::answer::required;

/// A sync to start.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::rest) struct StartSync {
    /// Consent to the deletions that this run held back.
    #[schema(pattern = "^run_[0-9a-f]{32}$")]
    allow_deletes: Option<String>,
}

impl StartSync {
    /// The run whose deletions are consented to; empty if there is none.
    ///
    /// # Errors
    /// `not_found` for what is no id of a run.
    pub(in crate::rest) fn allow_deletes(self) -> Result<String, Error> {
        self.allow_deletes.map_or_else(|| Ok(String::new()), |id| RunId::parse(&id).map(String::from))
    }
}

/// A sync run. Of one under way, what there is so far.
#[derive(Serialize, ToSchema)]
pub(in crate::rest) struct SyncRun {
    /// E.g. `run_0000019a…`.
    run_id: String,
    backend_id: String,
    /// `schedule`, `manual` or `configuration`.
    trigger: String,
    #[schema(required)]
    started_at: Option<String>,
    /// Null while it runs.
    #[schema(required)]
    ended_at: Option<String>,
    /// `complete`, `partial`, `failed` or `cancelled`; null while it runs.
    #[schema(required)]
    outcome: Option<String>,
    /// Names that the backend listed.
    listed: u64,
    /// Paths that they are here.
    mapped: u64,
    /// Paths on which both sides agree as before.
    unchanged: u64,
    /// Paths that are new here.
    created: u64,
    /// Paths that got a new value, state or metadata.
    updated: u64,
    /// Paths whose secret is gone in the backend.
    tombstoned: u64,
    /// Paths that are ahead of the backend.
    local_ahead: u64,
    /// Paths on which both sides had changed.
    conflicts: u64,
    /// How many names and paths were left out.
    skipped_count: u64,
    /// How many paths the backend failed to give.
    failed_count: u64,
    /// Calls of the backend, by operation.
    calls: BTreeMap<String, u64>,
    /// Deletions that wait for consent; null if none do.
    #[schema(required)]
    held_back: Option<HeldBack>,
    /// The class of the failure, e.g. `transient`; null if it did not fail.
    #[schema(required)]
    class: Option<String>,
    /// What went wrong, one sentence; empty if nothing did.
    message: String,
    /// How far it is; null once it has ended.
    #[schema(required)]
    progress: Option<Progress>,
}

/// Deletions that wait for consent.
#[derive(Serialize, ToSchema)]
struct HeldBack {
    /// How many paths would have been deleted.
    deletions: u64,
    /// Of how many that are known.
    known: u64,
}

/// How far a running sync is.
#[derive(Serialize, ToSchema)]
struct Progress {
    /// `listing`, `planning` or `applying`.
    phase: String,
    /// Names listed so far.
    listed: u64,
    /// Paths done.
    done: u64,
    /// Paths to be done; 0 until that is known.
    total: u64,
}

impl From<proto::SyncRun> for SyncRun {
    fn from(run: proto::SyncRun) -> Self {
        let counts = run.counts.unwrap_or_default();
        SyncRun {
            run_id: run.run_id,
            backend_id: run.backend_id,
            trigger: run.trigger,
            started_at: rfc3339(run.start_time.as_ref()),
            ended_at: rfc3339(run.end_time.as_ref()),
            outcome: given(run.outcome),
            listed: counts.listed,
            mapped: counts.mapped,
            unchanged: counts.unchanged,
            created: counts.created,
            updated: counts.updated,
            tombstoned: counts.tombstoned,
            local_ahead: counts.local_ahead,
            conflicts: counts.conflicts,
            skipped_count: counts.skipped,
            failed_count: counts.failed,
            calls: run.calls.into_iter().collect(),
            held_back: run.held_back.map(|held| HeldBack { deletions: held.deletions, known: held.known }),
            class: given(run.class),
            message: run.message,
            progress: run.progress.map(|progress| Progress {
                phase: progress.phase,
                listed: progress.listed,
                done: progress.done,
                total: progress.total,
            }),
        }
    }
}

impl SyncRun {
    /// Whether it has ended.
    pub(in crate::rest) fn ended(&self) -> bool {
        self.outcome.is_some()
    }

    /// Its id.
    pub(in crate::rest) fn id(&self) -> &str {
        &self.run_id
    }
}

/// Runs, newest first. The last 50 are kept.
#[derive(Serialize, ToSchema)]
pub(in crate::rest) struct SyncRunList {
    syncs: Vec<SyncRun>,
    /// Empty on the last page.
    next_page_token: String,
}

impl From<proto::ListSyncsResponse> for SyncRunList {
    fn from(list: proto::ListSyncsResponse) -> Self {
        let syncs = list.syncs.into_iter().map(SyncRun::from).collect();
        SyncRunList { syncs, next_page_token: list.next_page_token }
    }
}

/// A run with what it left out.
#[derive(Serialize, ToSchema)]
pub(in crate::rest) struct SyncReport {
    #[serde(flatten)]
    run: SyncRun,
    /// What was left out, in the order of paths; the pages of `failed` follow those of `skipped`.
    skipped: Vec<Skipped>,
    /// What the backend failed to give.
    failed: Vec<Skipped>,
    /// Empty on the last page.
    next_page_token: String,
}

/// Something that a run left out.
#[derive(Serialize, ToSchema)]
#[schema(as = SkippedPath)]
struct Skipped {
    /// Its path; null if it has none.
    #[schema(required)]
    path: Option<String>,
    /// Its name in the backend.
    remote_name: String,
    /// E.g. `charset`; a closed set.
    reason: String,
    /// More about it; may be empty.
    detail: String,
}

impl From<proto::SkippedPath> for Skipped {
    fn from(skipped: proto::SkippedPath) -> Self {
        Skipped {
            path: given(skipped.path),
            remote_name: skipped.remote_name,
            reason: skipped.reason,
            detail: skipped.detail,
        }
    }
}

impl SyncReport {
    /// The report as the service gave it.
    ///
    /// # Errors
    /// `internal` if it lacks the run.
    pub(in crate::rest) fn from_wire(answer: proto::GetSyncResponse) -> Result<Self, Error> {
        Ok(SyncReport {
            run: required(answer.run)?.into(),
            skipped: answer.skipped.into_iter().map(Skipped::from).collect(),
            failed: answer.failed.into_iter().map(Skipped::from).collect(),
            next_page_token: answer.next_page_token,
        })
    }
}
