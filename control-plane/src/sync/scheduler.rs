//! Which runs there are: by the clock, by request, after a change of the configuration.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use scaivault_domain::access::{Administer, Authorized, Scope};
use scaivault_domain::audit::{Action, AuditRow, Origin};
use scaivault_domain::backend::BackendSpec;
use scaivault_domain::event::{Event, EventKind};
use scaivault_domain::lease::LeaseKey;
use scaivault_domain::mapping::{Rule, Separator};
use scaivault_domain::path::SecretPath;
use scaivault_domain::pattern::{Pattern, Template};
use scaivault_domain::sync::report::Counts;
use scaivault_domain::sync::{Deletions, Local, Mode, Outcome, RunId, RunReport, Trigger};
use scaivault_domain::tenant::BackendName;
use scaivault_domain::time::{Clock, Timestamp};
use scaivault_domain::view::{BackendView, Generation};
use scaivault_domain::{Error, Reason};
use scaivault_telemetry::{BackendMetrics, Metrics, trace};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::apply::{Desk, Stopped};
use super::cycle::{Cycle, Done};
use super::erase::{Erased, Erasures};
use super::jobs::{
    Asked, ERASE, EraseJob, Originals, SYNC, SyncJob, erase_job, new_run, next_cycle, sync_job,
};
use super::runs::{Lines, Runs};
use super::states::SyncStates;
use crate::audit::{Audit, unique};
use crate::connections::Connections;
use crate::model::{SecretHead, SyncState, sync_state_key};
use crate::monitor::event_key;
use crate::service::Configurations;
use crate::service::federation::check_deletes;
use crate::store::jobs::{Claim, JobName, JobState, Jobs};
use crate::store::{CommitError, Owner, Records, Space, StoreError, Tx};

/// How often it is looked for what is due, besides when something is scheduled.
const NET: Duration = Duration::from_secs(1);
/// Cycles and erasures at the same time.
const AT_ONCE: usize = 16;
/// How often a change is tried again when another came in between.
const ATTEMPTS: usize = 16;
/// How long a cancelled run may take to end.
const CANCEL: Duration = Duration::from_secs(5);

/// What becomes of the copies of a backend that is deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leaving {
    /// They become ordinary local secrets.
    Detached,
    /// They are erased.
    Purged,
}

/// What the sync of backends is made of.
pub struct SyncParts {
    /// The store.
    pub records: Records,
    /// The jobs in it.
    pub jobs: Jobs,
    /// The committed configurations.
    pub configurations: Arc<Configurations>,
    /// The backends.
    pub connections: Arc<Connections>,
    /// What cycles found.
    pub states: Arc<SyncStates>,
    /// What runs did.
    pub runs: Arc<Runs>,
    /// The audit trail.
    pub audit: Arc<Audit>,
    /// Wall time.
    pub clock: Arc<dyn Clock>,
    /// What is counted.
    pub metrics: Metrics,
}

/// The sync of backends, as the API sees it.
pub struct Syncs {
    parts: SyncParts,
    /// Something is due that was not when it was last looked.
    nudge: Notify,
    /// Series are told for as long as they are held.
    series: Mutex<HashMap<LeaseKey, BackendMetrics>>,
}

impl std::fmt::Debug for Syncs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Syncs").finish_non_exhaustive()
    }
}

impl Syncs {
    /// Made of `parts`.
    pub fn new(parts: SyncParts) -> Self {
        Syncs { parts, nudge: Notify::new(), series: Mutex::default() }
    }

    /// The reports of runs.
    pub fn runs(&self) -> &Runs {
        &self.parts.runs
    }

    /// What cycles found.
    pub fn states(&self) -> &SyncStates {
        &self.parts.states
    }

    /// When the next run begins; `None` while one runs, and for a backend that is not synced.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn next_run(&self, key: &LeaseKey) -> Result<Option<Timestamp>, StoreError> {
        let job = self.parts.jobs.get::<SyncJob>(&sync_job(key)).await?;
        Ok(job.filter(|(job, _)| job.state == JobState::Waiting).map(|(job, _)| job.due))
    }

    /// Asks for a run now. While one runs, its id is answered and at most one more is queued; consent to deletions always
    /// is for the next one.
    ///
    /// # Errors
    /// `wrong_mode`, `backend_disabled`, and `precondition_failed` for consent to what is not held back.
    pub async fn request(
        &self,
        allowed: &Authorized<Administer, Scope>,
        origin: &Origin,
        key: &LeaseKey,
        allow_deletes: Option<RunId>,
    ) -> Result<RunId, Error> {
        let SyncParts { records, jobs, configurations, runs, audit, clock, .. } = &self.parts;
        let configuration = configurations.of(&key.tenant).await?;
        let (record, _) = configuration.backend(&key.backend)?;
        if !record.spec.enabled {
            return Err(Error::backend_disabled(&record.spec.name));
        }
        if !record.spec.is_synced() {
            return Err(Error::new(
                Reason::WrongMode,
                "a backend in proxy mode has nothing to sync: every read is current",
            )
            .next("read the secret through ScaiVault; the backend answers"));
        }
        if allow_deletes.is_some() {
            check_deletes(allowed.caller(), &record.spec)?;
        }
        if let Some(run) = &allow_deletes
            && self.parts.states.of(key).await?.0.held_back.as_ref().is_none_or(|(held, _)| held != run)
        {
            return Err(Error::field(
                Reason::PreconditionFailed,
                "/allow_deletes",
                "is not the last run, or held no deletion back",
            )
            .next("see the backend's status for the run whose deletions wait"));
        }
        let name = sync_job(key);
        for _ in 0..ATTEMPTS {
            let now = clock.now();
            let fresh = new_run(now);
            let mut queued = fresh.clone();
            let ask = |asked: &mut Asked| {
                queued = asked.run.get_or_insert(fresh.clone()).clone();
                asked.allow_deletes = asked.allow_deletes.take().or(allow_deletes.clone());
            };
            let Some(tx) = jobs.ask(Tx::new(), &name, ask).await? else {
                return Err(
                    Error::new(Reason::Unavailable, "the backend is being configured").next("try again")
                );
            };
            let tx = match queued == fresh {
                true => runs.put(tx, key, &begun(key, fresh, Trigger::Manual, now)),
                false => tx,
            };
            let mut row =
                AuditRow::new(allowed.caller(), origin, Action::SyncRun, record.spec.name.as_str(), now);
            row.backend = Some(key.backend.to_string());
            match records.store().commit(audit.stage(tx, &row)).await {
                Ok(_) => {
                    self.nudge.notify_one();
                    // One that a change has just cut off still runs, and has ended: it is not what the caller waits for.
                    if let Some((running, _)) = runs.progress(key).filter(|_| allow_deletes.is_none())
                        && runs.report(key, &running).await.is_ok_and(|report| report.ended.is_none())
                    {
                        return Ok(running);
                    }
                    return Ok(queued);
                }
                Err(CommitError::Precondition(_)) => {}
                Err(CommitError::Unavailable(error)) => return Err(error.into()),
            }
        }
        Err(Error::new(Reason::Unavailable, "too many changes at once").next("try again"))
    }

    /// Ends a run. What it committed stays.
    ///
    /// # Errors
    /// `not_found`.
    pub async fn cancel(
        &self,
        allowed: &Authorized<Administer, Scope>,
        origin: &Origin,
        key: &LeaseKey,
        run: &RunId,
    ) -> Result<RunReport, Error> {
        let SyncParts { runs, audit, clock, .. } = &self.parts;
        let report = runs.report(key, run).await?;
        if report.ended.is_some() {
            return Ok(report);
        }
        let mut row = AuditRow::new(allowed.caller(), origin, Action::SyncRun, run.as_str(), clock.now());
        row.backend = Some(key.backend.to_string());
        audit.record(row).await?;
        runs.cancel(key, run);
        runs.wait(key, run, CANCEL).await
    }

    /// Adds to the transaction that changes a backend's configuration what its sync has to do about it: the change
    /// schedules a run, ends one that runs by the old configuration, and has copies erased that are served no longer.
    ///
    /// # Errors
    /// `local_ahead`, unless `force`, if secrets would be erased that were changed here.
    pub async fn reconfigure(
        &self,
        tx: Tx,
        key: &LeaseKey,
        generation: Generation,
        change: &Reconfiguration<'_>,
    ) -> Result<Tx, Error> {
        let SyncParts { records, jobs, states, clock, .. } = &self.parts;
        let now = clock.now();
        let (before, after) = (change.before, change.after);
        let (state, found) = states.of(key).await?;
        let at = sync_state_key(key);
        let name = sync_job(key);
        let mut tx = tx;
        match after {
            Some(after) if after.is_synced() => {
                if before.is_some_and(|before| same_sync(before, after)) {
                    return Ok(tx);
                }
                let kept = kept_state(&state, before, after, now);
                tx = tx.expect_as_found(at.clone(), found).put(at.clone(), records.seal(&at, &kept));
                // Removed first, with what was asked of it: that run has ended, as its report says.
                tx = jobs.unschedule(tx, &name);
                if after.enabled {
                    tx = jobs.schedule(tx, &name, now, &SyncJob::new(key, Trigger::Configuration, now));
                }
            }
            Some(_) | None => tx = jobs.unschedule(tx.expect_as_found(at.clone(), found).delete(at), &name),
        }
        if let Some(named) = before.or(after) {
            tx = self.end_runs(tx, key, &named.name, now).await?;
        }
        if after.is_none() {
            tx = self.parts.runs.forget(tx, key).await?;
        }
        let Some(before) = before else { return Ok(tx) };
        let pending = jobs.get::<EraseJob>(&erase_job(key)).await?.is_some();
        let (spec, only, originals) = match (after, change.leaving) {
            (Some(after), _) => {
                if !before.is_synced() && !pending {
                    return Ok(tx);
                }
                if change.losing == Losing::Refused {
                    self.check_ahead(key, before, after).await?;
                }
                let originals = match change.losing {
                    Losing::Refused => Originals::Kept,
                    Losing::Accepted => Originals::Erased,
                };
                (after, Some(Mode::Proxy), originals)
            }
            (None, Leaving::Purged) => (before, None, Originals::Kept),
            // What was to be erased still is; the rest is kept.
            (None, Leaving::Detached) if pending => (before, Some(Mode::Proxy), Originals::Kept),
            (None, Leaving::Detached) => return Ok(tx),
        };
        let job = EraseJob {
            tenant: key.tenant.clone(),
            backend: key.backend.clone(),
            generation,
            mapping: spec.mapping.clone(),
            mode: spec.mode,
            settings: spec.sync.clone(),
            only,
            originals,
        };
        Ok(jobs.schedule(tx, &erase_job(key), now, &job))
    }

    fn metrics_of(&self, key: &LeaseKey, metrics: &Metrics, kind: &'static str) -> BackendMetrics {
        let mut series = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        series.entry(key.clone()).or_insert_with(|| metrics.backend(&key.backend, kind)).clone()
    }

    /// Ends the reports of runs that the change cuts off: each with its event, like every run.
    async fn end_runs(
        &self,
        mut tx: Tx,
        key: &LeaseKey,
        name: &BackendName,
        now: Timestamp,
    ) -> Result<Tx, StoreError> {
        let SyncParts { records, runs, .. } = &self.parts;
        for report in runs.reports(key).await?.into_iter().filter(|report| report.ended.is_none()) {
            let report = RunReport {
                ended: Some(now),
                outcome: Some(Outcome::Cancelled),
                class: Some("cancelled".into()),
                message: "the configuration changed".into(),
                ..report
            };
            let event = event(key, name, &report, now);
            let at = event_key(&key.tenant, &event.id);
            tx = runs.put(tx, key, &report).put(at.clone(), records.seal(&at, &event));
        }
        Ok(tx)
    }

    /// Looks for what is due now, instead of in a moment.
    pub fn nudge(&self) {
        self.nudge.notify_one();
    }

    /// Refuses to erase what is only here.
    async fn check_ahead(
        &self,
        key: &LeaseKey,
        before: &BackendSpec,
        after: &BackendSpec,
    ) -> Result<(), Error> {
        let mode = |spec: &BackendSpec, path: &SecretPath| {
            spec.mapping.owner(path).map(|rule| spec.sync.of(spec.mode, &spec.mapping.rules()[rule]).mode)
        };
        if !before.is_synced() || before.mapping == after.mapping && before.mode == after.mode {
            return Ok(());
        }
        let heads =
            self.parts.records.scan_all::<SecretHead>(&Owner::from(&key.tenant), Space::Secret, "").await?;
        let ahead: Vec<String> = heads
            .into_iter()
            .filter(|(name, head, _)| {
                let Ok(path) = SecretPath::check(name) else { return false };
                let local = Local::of(Some((head.current, head.state)), head.base.as_ref(), &key.backend);
                let adopted = head.copy_of(&key.backend).is_some_and(|base| base.adopted);
                (adopted || matches!(local, Local::Changed | Local::Revived))
                    && mode(before, &path) == Some(Mode::Sync)
                    && mode(after, &path) == Some(Mode::Proxy)
            })
            .map(|(name, ..)| name)
            .collect();
        let Some(first) = ahead.first() else { return Ok(()) };
        let others = ahead.len() - 1;
        let more = if others > 0 { format!(" and {others} more") } else { String::new() };
        Err(Error::new(
            Reason::LocalAhead,
            format!(
                "`{first}`{more} is not only a copy: it was changed here, or was here before, and would be erased"
            ),
        ))
    }
}

/// Whether copies that were changed here may be erased.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Losing {
    /// They may not.
    Refused,
    /// The caller accepts it.
    Accepted,
}

/// A change of a backend's configuration.
#[derive(Clone, Copy, Debug)]
pub struct Reconfiguration<'a> {
    /// What it was; `None`: it is new.
    pub before: Option<&'a BackendSpec>,
    /// What it will be; `None`: it is deleted.
    pub after: Option<&'a BackendSpec>,
    /// What becomes of the copies of a backend that is deleted.
    pub leaving: Leaving,
    /// Whether copies that were changed here may be erased.
    pub losing: Losing,
}

/// Whether a sync would do the same under both configurations.
fn same_sync(before: &BackendSpec, after: &BackendSpec) -> bool {
    let key = |spec: &BackendSpec| {
        (spec.provider.clone(), spec.mapping.clone(), spec.mode, spec.sync.clone(), spec.enabled)
    };
    key(before) == key(after)
}

/// What is still known after a change: nothing of rules that are new, or lead elsewhere now.
fn kept_state(
    state: &SyncState,
    before: Option<&BackendSpec>,
    after: &BackendSpec,
    now: Timestamp,
) -> SyncState {
    let mut kept = state.clone();
    let same_store =
        before.is_some_and(|before| before.provider.target().is_same_store(&after.provider.target()));
    let unchanged = |pattern: &str| {
        same_store && before.is_some_and(|before| leads(before, pattern) == leads(after, pattern))
    };
    let synced: BTreeSet<String> = after
        .mapping
        .rules()
        .iter()
        .filter(|rule| after.sync.of(after.mode, rule).mode == Mode::Sync)
        .map(|rule| rule.pattern.to_string())
        .collect();
    kept.rules.retain(|pattern, _| synced.contains(pattern) && unchanged(pattern));
    kept.due.clear();
    kept.since.retain(|pattern, _| synced.contains(pattern) && unchanged(pattern));
    for pattern in synced {
        kept.since.entry(pattern).or_insert(now);
    }
    if kept.rules.len() != state.rules.len() {
        kept.skipped.clear();
    }
    kept.exceptions.retain(|path, _| after.mapping.owner(path).is_some());
    kept
}

/// What decides which names the paths of a synced rule have: the rule, and those before it, for they decide which paths
/// are left to it.
fn leads<'s>(
    spec: &'s BackendSpec,
    pattern: &str,
) -> Option<Vec<(&'s Pattern, &'s Template, Option<&'s Separator>)>> {
    let rules = spec.mapping.rules();
    let synced = |rule: &Rule| spec.sync.of(spec.mode, rule).mode == Mode::Sync;
    let index = rules.iter().position(|rule| rule.pattern.as_str() == pattern && synced(rule))?;
    let lead = |rule: &'s Rule| (&rule.pattern, &rule.template, rule.separator.as_ref());
    Some(rules[..=index].iter().map(lead).collect())
}

fn begun(key: &LeaseKey, run_id: RunId, trigger: Trigger, started: Timestamp) -> RunReport {
    RunReport {
        run_id,
        backend: key.backend.clone(),
        trigger,
        started,
        ended: None,
        outcome: None,
        counts: Counts::default(),
        calls: Default::default(),
        held_back: None,
        class: None,
        message: String::new(),
    }
}

/// Runs what is due.
pub struct Scheduler {
    sync: Arc<Syncs>,
    erasures: Erasures,
}

impl std::fmt::Debug for Scheduler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scheduler").finish_non_exhaustive()
    }
}

impl Scheduler {
    /// Runs the jobs of `sync`, and `erasures`.
    pub fn new(sync: Arc<Syncs>, erasures: Erasures) -> Self {
        Scheduler { sync, erasures }
    }

    /// Claims and runs what is due, until told to stop. What runs then is left to the next process.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        let jobs = &self.sync.parts.jobs;
        match jobs.release_abandoned().await {
            Ok(0) => {}
            Ok(count) => tracing::info!(count, "jobs of an earlier process are taken up"),
            Err(error) => tracing::warn!(%error, "jobs of an earlier process wait for their claims to end"),
        }
        let mut running: JoinSet<()> = JoinSet::new();
        loop {
            let mut wait = NET;
            while running.try_join_next().is_some() {}
            for kind in [ERASE, SYNC] {
                let room = AT_ONCE.saturating_sub(running.len());
                match jobs.due(kind, room).await {
                    Ok(due) => {
                        let now = self.sync.parts.clock.now();
                        let next = due.next.map_or(NET, |next| next.since(now));
                        wait = wait.min(next.max(Duration::from_millis(10)));
                        for name in due.jobs {
                            self.clone().begin(kind, name, &mut running).await;
                        }
                    }
                    Err(error) => tracing::warn!(%error, "what is due cannot be read"),
                }
            }
            tokio::select! {
                () = stop.cancelled() => break,
                () = self.sync.nudge.notified() => {}
                () = tokio::time::sleep(wait) => {}
                Some(_) = running.join_next(), if !running.is_empty() => {}
            }
        }
        running.shutdown().await;
    }

    async fn begin(self: Arc<Self>, kind: &str, name: JobName, running: &mut JoinSet<()>) {
        let jobs = &self.sync.parts.jobs;
        if kind == SYNC {
            match jobs.claim::<SyncJob>(&name).await {
                Ok(Some(claim)) => {
                    running.spawn(async move { self.sync(claim).await });
                }
                Ok(None) => {}
                Err(error) => tracing::warn!(%error, job = name.as_str(), "a job cannot be claimed"),
            }
        } else {
            match jobs.claim::<EraseJob>(&name).await {
                Ok(Some(claim)) => {
                    running.spawn(async move { self.erase(claim).await });
                }
                Ok(None) => {}
                Err(error) => tracing::warn!(%error, job = name.as_str(), "a job cannot be claimed"),
            }
        }
    }

    async fn erase(&self, claim: Claim<EraseJob>) {
        let SyncParts { records, jobs, .. } = &self.sync.parts;
        match jobs.hold(&claim, self.erasures.run(&claim)).await {
            Some(Ok(Erased::All)) => {
                let tx = jobs.finish::<_, EraseJob>(Tx::new(), &claim, None);
                if let Err(error) = records.store().commit(tx).await {
                    tracing::warn!(%error, "an erasure that is done will be done again");
                }
            }
            Some(Ok(Erased::Waiting)) => {
                let next = (self.sync.parts.clock.now().after(NET), &claim.payload);
                let _ = records.store().commit(jobs.finish(Tx::new(), &claim, Some(next))).await;
            }
            Some(Err(Stopped::Fenced)) => {
                // The configuration has changed: what is left to erase is decided by the new one.
                let next = (self.sync.parts.clock.now(), &claim.payload);
                let _ = records.store().commit(jobs.finish(Tx::new(), &claim, Some(next))).await;
            }
            Some(Err(Stopped::Store(error))) => tracing::warn!(%error, "an erasure is taken up again later"),
            None => {}
        }
    }

    async fn sync(&self, claim: Claim<SyncJob>) {
        let key = claim.payload.key();
        let asked = match self.sync.parts.jobs.asked::<_, Asked>(&claim).await {
            Ok(asked) => asked.unwrap_or_default(),
            Err(error) => {
                tracing::warn!(%error, backend.id = %key.backend, "a run waits for the store");
                return;
            }
        };
        let run = asked.run.clone().unwrap_or_else(|| claim.payload.run.clone());
        match self.run_one(&claim, &key, &asked, &run).await {
            Ok(()) => {}
            Err(Stopped::Fenced) => {
                tracing::info!(backend.id = %key.backend, %run, "a run ends: it lost its job")
            }
            Err(Stopped::Store(error)) => {
                tracing::warn!(%error, backend.id = %key.backend, %run, "a run is taken up again later");
            }
        }
        self.sync.parts.runs.end(&key, &run);
    }

    async fn run_one(
        &self,
        claim: &Claim<SyncJob>,
        key: &LeaseKey,
        asked: &Asked,
        run: &RunId,
    ) -> Result<(), Stopped> {
        let SyncParts { records, jobs, configurations, connections, states, runs, audit, clock, .. } =
            &self.sync.parts;
        let configuration = configurations.of(&key.tenant).await?;
        let backend = configuration.views().iter().find(|view| view.id == key.backend && view.enabled);
        let Some(backend) = backend.filter(|view| !view.rules_in(Mode::Sync).is_empty()) else {
            // The change that made it so has fenced the job off, or is about to.
            return Err(Stopped::Fenced);
        };
        let started = clock.now();
        let (state, _) = states.of(key).await?;
        let trigger = if asked.run.is_some() { Trigger::Manual } else { claim.payload.trigger };
        let rules = due_rules(backend, &state, trigger, started);
        let deletions = match (&state.held_back, &asked.allow_deletes) {
            (Some((run, count)), Some(allowed)) if run == allowed => Deletions::Allowed(*count),
            _ => Deletions::Guarded,
        };

        let begun = match runs.report(key, run).await {
            Ok(report) => RunReport { started, ..report },
            Err(_) => begun(key, run.clone(), trigger, started),
        };
        commit(records, runs.put(claim.fence(Tx::new()), key, &begun)).await?;
        // Only now: whoever is told that it runs may read its report.
        let active = runs.begin(key, run.clone());
        tracing::debug!(backend.id = %key.backend, backend.name = %backend.name, %run, "a sync begins");
        let desk = Desk { records: records.clone(), audit: audit.clone(), clock: clock.clone() };
        let cycle = Cycle {
            desk: &desk,
            connections,
            key,
            backend,
            rules: &rules,
            claim,
            state: &state,
            deletions,
            progress: &active.progress,
            cancel: &active.cancel,
        };
        let kind = backend.target.kind().as_str();
        let outcome = |done: &Option<Result<Done, Stopped>>| match done {
            Some(Ok(done)) => done.outcome.as_str(),
            Some(Err(_)) | None => "ended",
        };
        let done = trace::sync_run(&key.backend, kind, outcome, jobs.hold(claim, cycle.run())).await;
        let done = match done.ok_or(Stopped::Fenced)? {
            // Trying again does not help, and nobody would see that it is tried.
            Err(Stopped::Store(StoreError::Corrupt(what))) => {
                tracing::error!(backend.id = %key.backend, what, "a sync met a row that cannot be read");
                Done::failed("invalid", &Error::internal(), Default::default())
            }
            done => done?,
        };
        self.end(claim, key, backend, &rules, begun, &state, done).await?;
        if let Err(error) = runs.trim(key).await {
            tracing::warn!(%error, "old reports are forgotten later");
        }
        Ok(())
    }

    /// One commit: what is known now, the report, the event, and when the next cycle begins.
    #[expect(clippy::too_many_arguments, reason = "everything that a run knows goes into its last commit")]
    async fn end(
        &self,
        claim: &Claim<SyncJob>,
        key: &LeaseKey,
        backend: &BackendView,
        rules: &[usize],
        begun: RunReport,
        state: &SyncState,
        done: Done,
    ) -> Result<(), Stopped> {
        let SyncParts { records, jobs, runs, clock, metrics, .. } = &self.sync.parts;
        let now = clock.now();
        let took = now.since(begun.started);
        let run = begun.run_id.clone();
        let mut next = done.state.unwrap_or_else(|| state.clone());
        next.last_run = Some((run.clone(), begun.started, done.outcome));
        next.last_skipped = done.counts.skipped;
        match done.outcome {
            Outcome::Complete | Outcome::Partial => {
                next.failures = 0;
                next.last_sync = Some((now, u64::try_from(took.as_millis()).unwrap_or(u64::MAX)));
                next.held_back = done.held_back.map(|held| (run.clone(), held.deletions));
                next.failure = String::new();
            }
            Outcome::Failed => {
                next.failures = next.failures.saturating_add(1);
                next.failure.clone_from(&done.message);
            }
            Outcome::Cancelled => {}
        }
        for index in rules {
            let pattern = backend.mapping.rules()[*index].pattern.to_string();
            if let Some(interval) = backend.rule(*index).interval {
                next.due.insert(pattern, next_cycle(begun.started, interval, rand::random()));
            }
        }
        let due = next.due.values().min().copied().unwrap_or(now).max(now);
        let job = SyncJob::new(key, Trigger::Schedule, now);
        let report = RunReport {
            ended: Some(now),
            outcome: Some(done.outcome),
            counts: done.counts,
            calls: done.calls.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect(),
            held_back: done.held_back,
            class: done.class.map(str::to_owned),
            message: done.message,
            ..begun
        };
        let event = event(key, &backend.name, &report, now);
        let synced = next.secrets;
        let at = sync_state_key(key);
        let event_at = event_key(&key.tenant, &event.id);
        let mut tx = Tx::new().put(at.clone(), records.seal(&at, &next));
        tx = runs.put(tx, key, &report);
        tx = runs.put_lines(tx, key, &run, Lines::Skipped, &done.skipped);
        tx = runs.put_lines(tx, key, &run, Lines::Failed, &done.failed);
        tx = tx.put(event_at.clone(), records.seal(&event_at, &event));
        commit(records, jobs.finish(tx, claim, Some((due, &job)))).await?;
        let metrics = self.sync.metrics_of(key, metrics, backend.target.kind().as_str());
        metrics.sync_run(done.outcome.as_str(), took);
        if matches!(done.outcome, Outcome::Complete | Outcome::Partial) {
            metrics.sync_succeeded(now);
            let Counts { skipped, failed, local_ahead, .. } = report.counts;
            metrics.sync_secrets(&[
                ("synced", synced),
                ("skipped", skipped),
                ("failed", failed),
                ("local_ahead", local_ahead),
            ]);
            metrics.conflicts_open(0);
        }
        tracing::info!(
            backend.id = %key.backend, backend.name = %backend.name, %run, outcome = done.outcome.as_str(),
            created = report.counts.created, updated = report.counts.updated,
            tombstoned = report.counts.tombstoned, skipped = report.counts.skipped, failed = report.counts.failed,
            "a sync ended"
        );
        Ok(())
    }
}

async fn commit(records: &Records, tx: Tx) -> Result<(), Stopped> {
    match records.store().commit(tx).await {
        Ok(_) => Ok(()),
        Err(CommitError::Precondition(_)) => Err(Stopped::Fenced),
        Err(CommitError::Unavailable(error)) => Err(error.into()),
    }
}

/// The rules that a run is about.
fn due_rules(backend: &BackendView, state: &SyncState, trigger: Trigger, now: Timestamp) -> Vec<usize> {
    let all = backend.rules_in(Mode::Sync);
    let due = |index: &usize| {
        let pattern = backend.mapping.rules()[*index].pattern.as_str();
        state.due.get(pattern).is_none_or(|due| *due <= now)
    };
    match trigger {
        Trigger::Manual | Trigger::Configuration => all,
        Trigger::Schedule => {
            let due: Vec<usize> = all.iter().copied().filter(due).collect();
            if due.is_empty() { all } else { due }
        }
    }
}

fn event(key: &LeaseKey, name: &BackendName, report: &RunReport, now: Timestamp) -> Event {
    let run_id = report.run_id.clone();
    let kind = match report.outcome {
        Some(outcome @ (Outcome::Complete | Outcome::Partial)) => {
            EventKind::SyncCompleted { run_id, outcome, counts: report.counts }
        }
        Some(Outcome::Failed | Outcome::Cancelled) | None => EventKind::SyncFailed {
            run_id,
            class: report.class.clone().unwrap_or_default(),
            message: report.message.clone(),
        },
    };
    Event {
        id: unique(now),
        tenant: key.tenant.clone(),
        time: now,
        backend: key.backend.clone(),
        backend_name: name.clone(),
        kind,
    }
}

#[cfg(test)]
mod tests {
    use scaivault_domain::backend::{GcpLogin, GcpTarget, ProjectId, Provider, Tls};
    use scaivault_domain::mapping::{GivenRule, PathMapping};
    use scaivault_domain::sync::SyncSettings;

    use super::*;
    use crate::model::RuleState;

    fn joined_by(separator: &str) -> BackendSpec {
        let target = GcpTarget {
            project: ProjectId::parse("acme-prod").expect("a project"),
            location: None,
            endpoint: None,
            tls: Tls::default(),
        };
        let rule = GivenRule { pattern: "e/**", template: "**", separator, ..GivenRule::default() };
        BackendSpec {
            name: BackendName::parse("prod").expect("a name"),
            provider: Provider::GoogleSecretManager { target, login: GcpLogin::WorkloadIdentity },
            mapping: PathMapping::parse_rules([rule]).expect("a mapping"),
            mode: Mode::Sync,
            sync: SyncSettings::default(),
            enabled: true,
            timeout: Duration::from_secs(5),
        }
    }

    #[test]
    fn nothing_is_known_of_a_rule_whose_separator_changed() {
        let (begin, now) = (Timestamp::from_millis(1), Timestamp::from_millis(2));
        let state = SyncState {
            rules: [("e/**".to_owned(), RuleState { as_of: begin, reread: begin })].into(),
            since: [("e/**".to_owned(), begin)].into(),
            ..SyncState::default()
        };
        let before = joined_by("--");
        let same = kept_state(&state, Some(&before), &joined_by("--"), now);
        assert_eq!((same.rules, same.since), (state.rules.clone(), state.since.clone()));
        let changed = kept_state(&state, Some(&before), &joined_by("__"), now);
        assert_eq!((changed.rules.len(), changed.since["e/**"]), (0, now));
    }
}
