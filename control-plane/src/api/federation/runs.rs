//! Runs and how a sync stands, as messages.

use std::sync::Arc;

use scaivault_domain::Error;
use scaivault_domain::access::{Administer, Authorized, Capability, Scope};
use scaivault_domain::backend::BackendId;
use scaivault_domain::lease::LeaseKey;
use scaivault_domain::path::SecretPath;
use scaivault_domain::sync::{Outcome, RunId, RunReport, Skipped};
use scaivault_edge::wire;
use scaivault_proto::federation::v1::{self as pb};

use super::Parts;
use crate::service::PageRequest;
use crate::sync::{Lines, Progress, SyncState};

impl Parts {
    /// A backend of the caller's tenant.
    pub(super) async fn key(
        &self,
        allowed: &Authorized<Administer, Scope>,
        id: &str,
    ) -> Result<LeaseKey, Error> {
        let id = BackendId::parse(id)?;
        self.configurations.of(allowed.tenant()).await?.backend(&id)?;
        Ok(LeaseKey { tenant: allowed.tenant().clone(), backend: id })
    }

    /// A run as it stands.
    pub(super) fn run(&self, key: &LeaseKey, report: RunReport) -> pb::SyncRun {
        let progress = self.syncs.runs().progress(key).filter(|(run, _)| *run == report.run_id);
        sync_run(report, progress.map(|(_, progress)| progress))
    }

    /// A page of what a run left out, as far as the caller may list it: first what it skipped, then what failed.
    pub(super) async fn left_out(
        &self,
        allowed: &Authorized<Administer, Scope>,
        key: &LeaseKey,
        run: &RunId,
        page: &PageRequest,
    ) -> Result<(Vec<pb::SkippedPath>, Vec<pb::SkippedPath>, String), Error> {
        let position = page.after.as_deref().unwrap_or("s0");
        let invalid = || Error::invalid("/page_token", "is not one that a page gave");
        let (kind, from) = position.split_at_checked(1).ok_or_else(invalid)?;
        let from: usize = from.parse().map_err(|_| invalid())?;
        let runs = self.syncs.runs();
        let mut room = page.size;
        let mut skipped = Vec::new();
        if kind == "s" {
            skipped = runs.lines(key, run, Lines::Skipped, from, room).await?;
            room -= skipped.len();
        }
        let begin = if kind == "s" { 0 } else { from };
        let failed = match room {
            0 => Vec::new(),
            room => runs.lines(key, run, Lines::Failed, begin, room).await?,
        };
        let next = if skipped.len() == page.size {
            format!("s{}", from + skipped.len())
        } else if skipped.len() + failed.len() == page.size {
            format!("f{}", begin + failed.len())
        } else {
            String::new()
        };
        // Which paths there are is as much a secret as a listing is.
        let may_see = |line: &Skipped| {
            SecretPath::check(&line.path)
                .map_or(true, |path| allowed.caller().allows(&path, Capability::List))
        };
        let lines = |lines: Vec<Skipped>| lines.into_iter().filter(may_see).map(skipped_path).collect();
        Ok((lines(skipped), lines(failed), next))
    }

    /// How the sync of a backend stands.
    pub(super) async fn sync_status(
        &self,
        key: &LeaseKey,
        state: &SyncState,
    ) -> Result<pb::SyncStatus, Error> {
        let now = self.clock.now();
        let oldest =
            state.exceptions.values().copied().chain(state.rules.values().map(|rule| rule.as_of)).min();
        let running = match self.syncs.runs().progress(key) {
            Some((run, progress)) => {
                let report = self.syncs.runs().report(key, &run).await.ok();
                report.filter(|report| report.ended.is_none()).map(|report| sync_run(report, Some(progress)))
            }
            None => None,
        };
        Ok(pb::SyncStatus {
            last_sync: state.last_sync.map(|(at, _)| wire::time(at)),
            last_sync_duration_ms: state.last_sync.map(|(_, took)| took).unwrap_or_default(),
            secrets_synced: state.secrets,
            last_attempt: state.last_run.as_ref().map(|(_, at, _)| wire::time(*at)),
            last_outcome: state
                .last_run
                .as_ref()
                .map(|(.., outcome)| outcome.as_str().into())
                .unwrap_or_default(),
            consecutive_failures: state.failures,
            oldest_value_age: oldest.filter(|_| state.secrets > 0).map(|at| wire::duration(now.since(at))),
            next_sync: self.syncs.next_run(key).await?.map(wire::time),
            running,
            skipped: state.last_skipped,
            held_back_run: state.held_back.as_ref().map(|(run, _)| run.to_string()).unwrap_or_default(),
        })
    }
}

fn sync_run(report: RunReport, progress: Option<Arc<Progress>>) -> pb::SyncRun {
    let counts = report.counts;
    pb::SyncRun {
        run_id: report.run_id.to_string(),
        backend_id: report.backend.to_string(),
        trigger: report.trigger.as_str().into(),
        start_time: Some(wire::time(report.started)),
        end_time: report.ended.map(wire::time),
        outcome: report.outcome.map(Outcome::as_str).unwrap_or_default().into(),
        counts: Some(pb::SyncCounts {
            listed: counts.listed,
            mapped: counts.mapped,
            unchanged: counts.unchanged,
            created: counts.created,
            updated: counts.updated,
            tombstoned: counts.tombstoned,
            local_ahead: counts.local_ahead,
            conflicts: counts.conflicts,
            skipped: counts.skipped,
            failed: counts.failed,
        }),
        calls: report.calls.into_iter().collect(),
        held_back: report.held_back.map(|held| pb::HeldBack { deletions: held.deletions, known: held.known }),
        class: report.class.unwrap_or_default(),
        message: report.message,
        progress: progress.filter(|_| report.ended.is_none()).map(|progress| pb::SyncProgress {
            phase: progress.phase().as_str().into(),
            listed: progress.listed(),
            done: progress.done(),
            total: progress.total(),
        }),
    }
}

fn skipped_path(skipped: Skipped) -> pb::SkippedPath {
    pb::SkippedPath {
        path: skipped.path,
        remote_name: skipped.remote_name,
        reason: skipped.reason.as_str().into(),
        detail: skipped.detail,
    }
}
