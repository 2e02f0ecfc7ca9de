//! What the cycles of a backend found, and what it means for a path that has no copy.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use scaivault_domain::lease::LeaseKey;
use scaivault_domain::path::SecretPath;
use scaivault_domain::replica::{Absence, Freshness};
use scaivault_domain::sync::{Base, SkipReason};
use scaivault_domain::view::BackendView;
use scaivault_domain::{Error, Reason};

use crate::model::{SyncState, sync_state_key};
use crate::store::{Records, RowVersion, StoreError};

/// Reads states, each version of one once.
#[derive(Debug)]
pub struct SyncStates {
    records: Records,
    held: Mutex<HashMap<LeaseKey, (RowVersion, Arc<SyncState>)>>,
}

impl SyncStates {
    /// Reads from `records`.
    pub fn new(records: Records) -> Self {
        SyncStates { records, held: Mutex::default() }
    }

    /// The state of a backend, and the version of its row; an empty one before the first cycle.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn of(&self, key: &LeaseKey) -> Result<(Arc<SyncState>, Option<RowVersion>), StoreError> {
        let at = sync_state_key(key);
        let Some(row) = self.records.store().get(&at).await? else {
            self.lock().remove(key);
            return Ok((Arc::default(), None));
        };
        if let Some((version, state)) = self.lock().get(key)
            && *version == row.version
        {
            return Ok((state.clone(), Some(row.version)));
        }
        let state: Arc<SyncState> = Arc::new(self.records.open(&at, &row.value)?);
        self.lock().insert(key.clone(), (row.version, state.clone()));
        Ok((state, Some(row.version)))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<LeaseKey, (RowVersion, Arc<SyncState>)>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SyncState {
    /// What a path of `backend` is that has no copy.
    ///
    /// Until a cycle has seen the whole rule, and where one could not read the path, the backend itself is asked: a path
    /// that was proxied before is never lost on the way.
    pub fn absence(&self, backend: &BackendView, rule: usize, path: &SecretPath) -> Absence {
        let pattern = backend.mapping.rules()[rule].pattern.as_str();
        // What lies in a folder that is closed to us is as closed as the folder.
        let folders = path
            .as_str()
            .match_indices('/')
            .filter_map(|(end, _)| SecretPath::check(&path.as_str()[..end]).ok());
        let mut closed = folders
            .filter_map(|folder| self.skipped.get(&folder))
            .filter(|reason| **reason == SkipReason::Forbidden);
        match (self.rules.get(pattern), self.skipped.get(path).or_else(|| closed.next())) {
            (None, _) | (_, Some(SkipReason::Transient)) => Absence::Proxy,
            (_, Some(reason)) => Absence::NotSynced(*reason),
            (Some(_), None) => Absence::NotFound,
        }
    }

    /// What somebody has to look at: a sync that fails, or deletions that wait.
    pub fn problem(&self) -> Option<Error> {
        if self.failures > 0 {
            let message = format!("the last sync failed ({} in a row): {}", self.failures, self.failure);
            return Some(
                Error::new(Reason::BackendInvalidAnswer, message)
                    .next("see the report of the last run; copies are served meanwhile, and age"),
            );
        }
        let (run, count) = self.held_back.as_ref()?;
        let message = format!("{count} secrets are gone in the backend; their deletion waits for consent");
        Some(Error::new(Reason::PreconditionFailed, message).next(format!(
            "see what is missing in the report of {run}; if it is right, sync with `allow_deletes` {run}"
        )))
    }

    /// Whether a copy is of the rule as it is now: it was compared since, one by one or by a cycle over all of it.
    pub fn is_current(&self, pattern: &str, path: &SecretPath, base: &Base) -> bool {
        let seen = self.rules.contains_key(pattern) && !self.exceptions.contains_key(path);
        seen || self.since.get(pattern).is_none_or(|since| base.verified >= *since)
    }

    /// When the copies were last compared with the backend.
    pub fn freshness(&self, key: &LeaseKey) -> Freshness {
        Freshness {
            backend: key.backend.clone(),
            rules: self.rules.iter().map(|(pattern, rule)| (pattern.clone(), rule.as_of)).collect(),
            exceptions: self.exceptions.clone(),
        }
    }
}
