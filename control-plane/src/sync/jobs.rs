//! The jobs of sync mode: their names and what they carry.

use std::time::Duration;

use scaivault_domain::backend::BackendId;
use scaivault_domain::lease::LeaseKey;
use scaivault_domain::mapping::PathMapping;
use scaivault_domain::path::SecretPath;
use scaivault_domain::sync::{Mode, RunId, SyncSettings, Trigger};
use scaivault_domain::tenant::TenantId;
use scaivault_domain::time::Timestamp;
use scaivault_domain::view::Generation;
use serde::{Deserialize, Serialize};

use crate::store::jobs::JobName;

/// What begins the name of every sync job.
pub(super) const SYNC: &str = "sync/";
/// What begins the name of every erasure.
pub(super) const ERASE: &str = "erase/";

/// What a backend's sync job is scheduled with.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct SyncJob {
    /// Of which tenant.
    pub(super) tenant: TenantId,
    /// Of which backend.
    pub(super) backend: BackendId,
    /// The id of the next run, unless somebody asks for one. Every attempt at a run has the same id, so a run that is
    /// taken up after a crash ends with one report and one event.
    pub(super) run: RunId,
    /// Why it begins.
    pub(super) trigger: Trigger,
}

/// A run that somebody asked for.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Asked {
    /// Its id.
    pub(super) run: Option<RunId>,
    /// The run whose deletions are allowed.
    pub allow_deletes: Option<RunId>,
}

impl SyncJob {
    /// The job whose next run begins for `trigger`.
    pub(super) fn new(key: &LeaseKey, trigger: Trigger, now: Timestamp) -> Self {
        SyncJob { tenant: key.tenant.clone(), backend: key.backend.clone(), run: new_run(now), trigger }
    }

    /// Which backend.
    pub(super) fn key(&self) -> LeaseKey {
        LeaseKey { tenant: self.tenant.clone(), backend: self.backend.clone() }
    }
}

/// Copies that are to be erased.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct EraseJob {
    /// Of which tenant.
    pub(super) tenant: TenantId,
    /// Of which backend.
    pub(super) backend: BackendId,
    /// The configuration that does not serve them any more: nodes have to know it first.
    pub(super) generation: Generation,
    /// The configuration that says which paths are meant.
    pub(super) mapping: PathMapping,
    /// Its mode.
    pub(super) mode: Mode,
    /// Its settings.
    pub(super) settings: SyncSettings,
    /// Only paths that it serves in this mode; `None`: all of its paths.
    pub(super) only: Option<Mode>,
    /// What becomes of what is only here.
    pub(super) originals: Originals,
}

/// What becomes of secrets of which something is nowhere else: changed here since they were copied, or ours before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Originals {
    /// They stay.
    Kept,
    /// They are erased too: somebody accepted it.
    Erased,
}

impl EraseJob {
    /// Whether a path is meant.
    pub(super) fn covers(&self, path: &SecretPath) -> bool {
        self.mapping.owner(path).is_some_and(|rule| {
            let mode = self.settings.of(self.mode, &self.mapping.rules()[rule]).mode;
            self.only.is_none_or(|only| only == mode)
        })
    }
}

/// The name of a backend's sync job.
pub(super) fn sync_job(key: &LeaseKey) -> JobName {
    name(SYNC, key)
}

/// The name of the job that erases a backend's copies.
pub(super) fn erase_job(key: &LeaseKey) -> JobName {
    name(ERASE, key)
}

fn name(kind: &str, key: &LeaseKey) -> JobName {
    JobName::parse(&format!("{kind}{}/{}", key.tenant, key.backend)).expect("ids have no empty segments")
}

pub(super) fn new_run(now: Timestamp) -> RunId {
    let mut random = [0; 8];
    getrandom::fill(&mut random).expect("without the system's randomness nothing was sealed either");
    RunId::new(now, u64::from_be_bytes(random))
}

/// When the next cycle begins that started `at`: a little early, so that backends of one period drift apart.
pub(super) fn next_cycle(at: Timestamp, interval: Duration, chance: f64) -> Timestamp {
    at.after(interval.mul_f64(0.9 + 0.1 * chance))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_period_is_at_most_a_tenth_shorter() {
        let at = Timestamp::from_millis(1_000);
        let minute = Duration::from_secs(60);
        assert_eq!(next_cycle(at, minute, 0.0), at.after(Duration::from_secs(54)));
        assert_eq!(next_cycle(at, minute, 1.0), at.after(minute));
    }
}
