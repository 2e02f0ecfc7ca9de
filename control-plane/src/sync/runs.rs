//! The reports of runs, and what is known of those under way.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use scaivault_domain::Error;
use scaivault_domain::lease::LeaseKey;
use scaivault_domain::sync::{RunId, RunReport, Skipped};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::store::{Depth, Key, Owner, Records, Space, StoreError, Tx};

/// How many runs of a backend are kept.
const KEPT: usize = 50;
/// How many lines of a report stand in one row.
const LINES: usize = 500;

/// How far a run is.
#[derive(Debug, Default)]
pub struct Progress {
    phase: AtomicU8,
    listed: AtomicU64,
    done: AtomicU64,
    total: AtomicU64,
}

/// What a run is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It asks the backend what there is.
    Listing,
    /// It compares that with what is here.
    Planning,
    /// It reads and commits.
    Applying,
}

impl Phase {
    /// The name in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Phase::Listing => "listing",
            Phase::Planning => "planning",
            Phase::Applying => "applying",
        }
    }
}

impl Progress {
    /// What it is doing.
    pub fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Relaxed) {
            0 => Phase::Listing,
            1 => Phase::Planning,
            _ => Phase::Applying,
        }
    }

    /// Names that were listed so far.
    pub fn listed(&self) -> u64 {
        self.listed.load(Ordering::Relaxed)
    }

    /// Paths that are done.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Paths that are to be done; 0 until it is known.
    pub fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }

    pub(super) fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    pub(super) fn list(&self, names: usize) {
        self.listed.fetch_add(names as u64, Ordering::Relaxed);
    }

    pub(super) fn expect(&self, total: usize) {
        self.total.store(total as u64, Ordering::Relaxed);
    }

    pub(super) fn advance(&self) {
        self.done.fetch_add(1, Ordering::Relaxed);
    }
}

/// A run under way in this process.
#[derive(Clone, Debug)]
pub(super) struct Active {
    pub(super) run: RunId,
    pub(super) progress: Arc<Progress>,
    pub(super) cancel: CancellationToken,
}

/// The runs of all backends.
#[derive(Debug)]
pub struct Runs {
    records: Records,
    active: Mutex<HashMap<LeaseKey, Active>>,
    /// Queued runs that somebody ended before they began.
    cancelled: Mutex<HashSet<RunId>>,
    ended: watch::Sender<u64>,
}

impl Runs {
    /// Reports in `records`.
    pub fn new(records: Records) -> Self {
        Runs { records, active: Mutex::default(), cancelled: Mutex::default(), ended: watch::Sender::new(0) }
    }

    /// The report of a run.
    ///
    /// # Errors
    /// `not_found`.
    pub async fn report(&self, key: &LeaseKey, run: &RunId) -> Result<RunReport, Error> {
        let report = self.records.get::<RunReport>(&run_key(key, run)).await?;
        report.map(|(report, _)| report).ok_or_else(|| {
            Error::new(scaivault_domain::Reason::NotFound, "no run has this id, or it is no longer kept")
                .next("list the runs of the backend to see their ids")
        })
    }

    /// The reports of a backend, newest first.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn reports(&self, key: &LeaseKey) -> Result<Vec<RunReport>, StoreError> {
        let prefix = format!("{}/", key.backend);
        let rows = self.records.scan_all::<RunReport>(&Owner::from(&key.tenant), Space::Run, &prefix).await?;
        Ok(rows.into_iter().rev().map(|(_, report, _)| report).collect())
    }

    /// At most `size` lines of what a run left out, from the line `from` on.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn lines(
        &self,
        key: &LeaseKey,
        run: &RunId,
        kind: Lines,
        from: usize,
        size: usize,
    ) -> Result<Vec<Skipped>, StoreError> {
        let mut lines = Vec::new();
        let mut row = from / LINES;
        let mut skip = from % LINES;
        while lines.len() < size {
            let found = self.records.get::<Vec<Skipped>>(&lines_key(key, run, kind, row)).await?;
            let Some((found, _)) = found else { break };
            lines.extend(found.into_iter().skip(skip).take(size - lines.len()));
            (row, skip) = (row + 1, 0);
        }
        Ok(lines)
    }

    /// How far the backend's run is; `None` if none is under way here.
    pub fn progress(&self, key: &LeaseKey) -> Option<(RunId, Arc<Progress>)> {
        self.active().get(key).map(|active| (active.run.clone(), active.progress.clone()))
    }

    /// Ends a run: the one under way, or one that is queued.
    pub fn cancel(&self, key: &LeaseKey, run: &RunId) {
        match self.active().get(key).filter(|active| active.run == *run) {
            Some(active) => active.cancel.cancel(),
            None => {
                self.cancelled().insert(run.clone());
            }
        }
    }

    /// Waits until a run has ended, at most for `patience`; its report as it stands then.
    ///
    /// # Errors
    /// `not_found`.
    pub async fn wait(&self, key: &LeaseKey, run: &RunId, patience: Duration) -> Result<RunReport, Error> {
        let mut ended = self.ended.subscribe();
        let end = tokio::time::Instant::now() + patience;
        loop {
            let report = self.report(key, run).await?;
            if report.ended.is_some() || tokio::time::timeout_at(end, ended.changed()).await.is_err() {
                return Ok(report);
            }
        }
    }

    pub(super) fn begin(&self, key: &LeaseKey, run: RunId) -> Active {
        let cancel = CancellationToken::new();
        if self.cancelled().remove(&run) {
            cancel.cancel();
        }
        let active = Active { run, progress: Arc::default(), cancel };
        self.active().insert(key.clone(), active.clone());
        active
    }

    pub(super) fn end(&self, key: &LeaseKey, run: &RunId) {
        let mut active = self.active();
        if active.get(key).is_some_and(|active| active.run == *run) {
            active.remove(key);
        }
        drop(active);
        self.ended.send_modify(|count| *count += 1);
    }

    pub(super) fn put(&self, tx: Tx, tenant: &LeaseKey, report: &RunReport) -> Tx {
        let key = run_key(tenant, &report.run_id);
        let sealed = self.records.seal(&key, report);
        tx.put(key, sealed)
    }

    pub(super) fn put_lines(
        &self,
        mut tx: Tx,
        key: &LeaseKey,
        run: &RunId,
        kind: Lines,
        lines: &[Skipped],
    ) -> Tx {
        for (row, lines) in lines.chunks(LINES).enumerate() {
            let at = lines_key(key, run, kind, row);
            let sealed = self.records.seal(&at, &lines);
            tx = tx.put(at, sealed);
        }
        tx
    }

    /// Forgets every run of a backend that is deleted.
    pub(super) async fn forget(&self, mut tx: Tx, key: &LeaseKey) -> Result<Tx, StoreError> {
        let owner = Owner::from(&key.tenant);
        let prefix = format!("{}/", key.backend);
        for space in [Space::Run, Space::RunDetail] {
            let mut after: Option<String> = None;
            loop {
                let store = self.records.store();
                let page = store.scan(&owner, space, &prefix, Depth::All, after.as_deref(), LINES).await?;
                after = page.last().map(|entry| entry.name().to_owned());
                tx = page.iter().fold(tx, |tx, entry| tx.delete(Key::new(&key.tenant, space, entry.name())));
                if page.len() < LINES {
                    break;
                }
            }
        }
        Ok(tx)
    }

    /// Forgets all but the last runs of a backend.
    pub(super) async fn trim(&self, key: &LeaseKey) -> Result<(), StoreError> {
        let owner = Owner::from(&key.tenant);
        let prefix = format!("{}/", key.backend);
        self.records.trim(&owner, Space::Run, &prefix, KEPT).await?;
        let oldest = self.records.scan_page::<RunReport>(&owner, Space::Run, &prefix, None, 1).await?;
        let Some((oldest, ..)) = oldest.into_iter().next() else { return Ok(()) };
        let mut tx = Tx::new();
        let mut any = false;
        for (name, ..) in self
            .records
            .scan_page::<serde::de::IgnoredAny>(&owner, Space::RunDetail, &prefix, None, LINES)
            .await?
        {
            if name < oldest {
                any = true;
                tx = tx.delete(Key::new(&key.tenant, Space::RunDetail, name));
            }
        }
        if any {
            // Nobody else touches these rows, so there is nothing to expect of them.
            let _ = self.records.store().commit(tx).await;
        }
        Ok(())
    }

    fn active(&self) -> MutexGuard<'_, HashMap<LeaseKey, Active>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cancelled(&self) -> MutexGuard<'_, HashSet<RunId>> {
        self.cancelled.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Which lines of a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lines {
    /// What was left out.
    Skipped,
    /// What the backend failed to give.
    Failed,
}

fn run_key(key: &LeaseKey, run: &RunId) -> Key {
    Key::new(&key.tenant, Space::Run, format!("{}/{run}", key.backend))
}

fn lines_key(key: &LeaseKey, run: &RunId, kind: Lines, row: usize) -> Key {
    let kind = match kind {
        Lines::Skipped => 's',
        Lines::Failed => 'f',
    };
    Key::new(&key.tenant, Space::RunDetail, format!("{}/{run}/{kind}{row:06}", key.backend))
}
