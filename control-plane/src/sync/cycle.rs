//! One cycle: list, plan, apply. What it commits it commits path by path; a crash is resumed from the bases.

use std::collections::{BTreeMap, BTreeSet};

use futures::stream::FuturesUnordered;
use futures::{FutureExt as _, StreamExt as _};
use scaivault_backends::background::{Background, Failed};
use scaivault_backends::{BackendError, Class};
use scaivault_domain::Error;
use scaivault_domain::lease::LeaseKey;
use scaivault_domain::mapping::RemoteName;
use scaivault_domain::path::SecretPath;
use scaivault_domain::sync::plan::{Held, Listed, Listing, Reread, Scope, Step};
use scaivault_domain::sync::report::{Counts, HeldBack};
use scaivault_domain::sync::{
    Base, Decision, Deletions, Local, Mode, Outcome, SkipReason, Skipped, SyncPlan, plan,
};
use scaivault_domain::time::Timestamp;
use scaivault_domain::view::BackendView;
use tokio_util::sync::CancellationToken;

use super::apply::{Applied, At, Deleting, Desk, Mandate, Stopped};
use super::erase::{erase, erasure};
use super::jobs::SyncJob;
use super::runs::{Phase, Progress};
use crate::connections::Connections;
use crate::credentials::OwnLeases;
use crate::model::{RuleState, SecretHead, SyncState};
use crate::store::jobs::Claim;
use crate::store::{Owner, Space, StoreError};

/// Paths that are read and committed at the same time, or more where one call reads many. The connection lets fewer of
/// them read.
const AT_ONCE: usize = 64;
/// So many failures in a row end a run: each of them was tried again and again.
const GIVEN_UP: usize = 8;
/// Heads that are read at once.
const PAGE: usize = 1000;
/// How long a secret is kept that a sync deleted.
const TOMBSTONES: std::time::Duration = std::time::Duration::from_secs(7 * 24 * 3600);
/// How long a listing is trusted to show every change.
const REREAD: std::time::Duration = std::time::Duration::from_secs(24 * 3600);

/// What one cycle is given.
pub(super) struct Cycle<'a> {
    pub(super) desk: &'a Desk,
    pub(super) connections: &'a Connections,
    pub(super) key: &'a LeaseKey,
    pub(super) backend: &'a BackendView,
    /// The rules that are due.
    pub(super) rules: &'a [usize],
    pub(super) claim: &'a Claim<SyncJob>,
    pub(super) state: &'a SyncState,
    pub(super) deletions: Deletions,
    pub(super) progress: &'a Progress,
    pub(super) cancel: &'a CancellationToken,
}

/// What came of a cycle.
#[derive(Debug)]
pub(super) struct Done {
    pub(super) outcome: Outcome,
    pub(super) counts: Counts,
    pub(super) skipped: Vec<Skipped>,
    pub(super) failed: Vec<Skipped>,
    pub(super) calls: BTreeMap<&'static str, u64>,
    pub(super) held_back: Option<HeldBack>,
    pub(super) class: Option<&'static str>,
    pub(super) message: String,
    /// What is known now; `None` if nothing was learnt.
    pub(super) state: Option<SyncState>,
}

/// What the steps came to, so far.
#[derive(Default)]
struct Tally {
    counts: Counts,
    skipped: Vec<Skipped>,
    failed: Vec<Skipped>,
    /// Known paths that could not be verified.
    unverified: BTreeSet<SecretPath>,
    /// Paths without a copy that were left out.
    left_out: BTreeMap<SecretPath, SkipReason>,
    gone: Vec<Step>,
    read: u64,
}

impl Cycle<'_> {
    /// Runs the cycle.
    ///
    /// # Errors
    /// Only if nothing more can be committed; what the backend does wrong is in the outcome.
    pub(super) async fn run(&self) -> Result<Done, Stopped> {
        let started = self.desk.clock.now();
        let backend = match self.connections.background(&self.key.tenant, self.backend) {
            Ok(backend) => backend,
            Err(error) => return Ok(Done::failed(Class::Invalid.as_str(), &error, BTreeMap::new())),
        };
        let listing = match self.cancel.run_until_cancelled(self.list(&backend)).await {
            None => return Ok(Done::cancelled(Tally::default(), &backend)),
            Some(Ok(listing)) => listing,
            Some(Err(failed)) => {
                return Ok(Done::failed(failed.cause.class().as_str(), &failed.shown, backend.calls()));
            }
        };
        self.progress.enter(Phase::Planning);
        let held = self.held().await?;
        let reread = self.reread(started);
        let scope = Scope {
            backend: &self.backend.id,
            mode: self.backend.mode,
            naming: self.backend.target.kind().naming(),
            mapping: &self.backend.mapping,
            settings: &self.backend.sync,
            rules: self.rules,
            reread,
        };
        // For 100,000 names it takes longer than others may be kept waiting.
        let plan = tokio::task::block_in_place(|| plan(&scope, &listing, &held, self.deletions));
        drop(listing);
        self.progress.enter(Phase::Applying);
        let mut tally = Tally::of(&plan, &held, self);
        let applied = self.cancel.run_until_cancelled(self.apply(&plan, &backend, &held, &mut tally)).await;
        let held_back = match applied {
            None => return Ok(Done::cancelled(tally, &backend)),
            Some(outcome) => outcome?,
        };
        self.forget_old_tombstones(&held, started).await?;
        Ok(self.done(started, reread, held_back, tally, &held, &backend))
    }

    async fn list(&self, backend: &Background<OwnLeases>) -> Result<Listing, Failed> {
        let mut listing = Listing::default();
        listing.named.extend(self.backend.literal_names(self.rules).map(|(_, name)| name));
        let mut refused = None;
        let mut answered = false;
        let alone = self.backend.names_told_alone(self.rules).map(Some);
        for root in self.backend.roots(self.rules).into_iter().chain(alone) {
            let mut survey = backend.survey(root.as_ref());
            loop {
                match survey.next().await {
                    Ok(None) => {
                        answered = true;
                        break;
                    }
                    Ok(Some(page)) => {
                        self.progress.list(page.secrets.len());
                        listing.names.extend(page.secrets.into_iter().map(|secret| Listed {
                            name: secret.name,
                            metadata: secret.metadata,
                            token: secret.seen.as_ref().map(|seen| seen.token.clone()),
                            state: secret.seen.map(|seen| seen.state),
                        }));
                        listing.forbidden.extend(page.forbidden.into_iter().map(|entry| entry.name));
                    }
                    // One folder that is closed to us says nothing about the others.
                    Err(failed) if failed.cause == BackendError::Forbidden => {
                        listing.forbidden.push(root.clone().unwrap_or_else(|| RemoteName::new("")));
                        refused = Some(failed);
                        break;
                    }
                    Err(failed) => return Err(failed),
                }
            }
        }
        match refused {
            Some(failed) if !answered => Err(failed),
            _ => Ok(listing),
        }
    }

    /// What our store has at the paths of every synced rule.
    async fn held(&self) -> Result<BTreeMap<SecretPath, Held>, StoreError> {
        let owner = Owner::from(&self.key.tenant);
        let mut held = BTreeMap::new();
        for prefix in prefixes(self.backend) {
            let mut after: Option<String> = None;
            loop {
                let page = self
                    .desk
                    .records
                    .scan_page::<SecretHead>(&owner, Space::Secret, &prefix, after.as_deref(), PAGE)
                    .await?;
                let last = page.len() < PAGE;
                after = page.last().map(|(name, ..)| name.clone());
                for (name, head, _) in page {
                    let Ok(path) = SecretPath::check(&name) else { continue };
                    let synced = self
                        .backend
                        .mapping
                        .owner(&path)
                        .is_some_and(|rule| self.backend.rule(rule).mode == Mode::Sync);
                    if synced {
                        held.insert(path, Held { secret: Some((head.current, head.state)), base: head.base });
                    }
                }
                if last {
                    break;
                }
            }
        }
        Ok(held)
    }

    fn reread(&self, now: Timestamp) -> Reread {
        let due = |rule: Option<&RuleState>| rule.is_none_or(|rule| now.since(rule.reread) >= REREAD);
        if self.rules.iter().any(|index| due(self.state.rules.get(self.pattern(*index)))) {
            Reread::Everything
        } else {
            Reread::Changed
        }
    }

    /// What deletions were held back.
    async fn apply(
        &self,
        plan: &SyncPlan,
        backend: &Background<OwnLeases>,
        held: &BTreeMap<SecretPath, Held>,
        tally: &mut Tally,
    ) -> Result<Option<HeldBack>, Stopped> {
        let (to_confirm, to_do): (Vec<_>, Vec<_>) =
            plan.steps.iter().partition(|step| step.decision == Decision::Confirm);
        self.progress.expect(plan.steps.len());
        self.work(&to_do, backend, held, Deleting::Later, tally).await?;

        // A listing that still shows what is gone must not get past the brake.
        let gone = std::mem::take(&mut tally.gone);
        let mut held_back = plan.held_back;
        let mut to_delete: Vec<&Step> = Vec::new();
        if plan.holds_back((gone.len() + to_confirm.len()) as u64, self.deletions) {
            for step in to_confirm.into_iter().chain(&gone) {
                tally.hold_back(step);
                let none = HeldBack { deletions: 0, known: plan.known };
                held_back.get_or_insert(none).deletions += 1;
            }
        } else {
            to_delete.extend(to_confirm);
            to_delete.extend(&gone);
        }
        self.work(&to_delete, backend, held, Deleting::Now, tally).await?;
        Ok(held_back)
    }

    async fn work(
        &self,
        steps: &[&Step],
        backend: &Background<OwnLeases>,
        held: &BTreeMap<SecretPath, Held>,
        deleting: Deleting,
        tally: &mut Tally,
    ) -> Result<(), Stopped> {
        let is_known = |step: &Step| held.get(&step.path).is_some_and(|held| self.is_live(held));
        let mut left = steps.iter();
        let mut running = FuturesUnordered::new();
        let mut failures = 0;
        let at_once = backend.most_reads_at_once().max(AT_ONCE);
        loop {
            // While the backend fails nothing more is begun: each call takes as long to give up as the first.
            while (running.is_empty() || failures == 0 && running.len() < at_once)
                && let Some(step) = left.next()
            {
                running.push(self.step(step, backend, deleting).boxed());
            }
            let Some((step, applied)) = running.next().await else { return Ok(()) };
            self.progress.advance();
            let applied = applied?;
            failures = if matches!(applied, Applied::Down(_)) { failures + 1 } else { 0 };
            if let (Applied::Down(detail), GIVEN_UP..) = (&applied, failures) {
                // The backend is down: to wait for each of the others in turn would take hours.
                for step in left.by_ref() {
                    tally.add(step, Applied::Down(detail.clone()), is_known(step));
                }
            }
            tally.add(step, applied, is_known(step));
        }
    }

    async fn step<'s>(
        &self,
        step: &'s Step,
        backend: &Background<OwnLeases>,
        deleting: Deleting,
    ) -> (&'s Step, Result<Applied, Stopped>) {
        (step, self.decided(step, backend, deleting).await)
    }

    async fn decided(
        &self,
        step: &Step,
        backend: &Background<OwnLeases>,
        deleting: Deleting,
    ) -> Result<Applied, Stopped> {
        let at = At {
            tenant: &self.key.tenant,
            backend: self.backend,
            path: &step.path,
            name: &step.name,
            rule: step.rule,
        };
        let mandate = Mandate::Run(self.claim);
        match step.decision {
            Decision::PullState(state) => self.desk.pull_state(&at, state, mandate).await,
            Decision::LocalAhead | Decision::Push | Decision::PushDelete => Ok(Applied::LocalAhead),
            _ => self.desk.read(&at, backend, step.metadata.as_ref(), mandate, deleting).await,
        }
    }

    fn is_live(&self, held: &Held) -> bool {
        matches!(
            Local::of(held.secret, held.base.as_ref(), &self.backend.id),
            Local::Same | Local::Changed | Local::Revived
        )
    }

    async fn forget_old_tombstones(
        &self,
        held: &BTreeMap<SecretPath, Held>,
        now: Timestamp,
    ) -> Result<(), Stopped> {
        let is_over = |secret, base: Option<&Base>| {
            Local::of(secret, base, &self.backend.id) == Local::Tombstoned
                && base.is_some_and(|base| now.since(base.verified) >= TOMBSTONES)
        };
        for (path, _) in held.iter().filter(|(_, held)| is_over(held.secret, held.base.as_ref())) {
            let row = erasure(&self.key.tenant, &self.backend.id, path, now);
            erase(
                &self.desk.records,
                &self.key.tenant,
                path,
                |head| is_over(Some((head.current, head.state)), head.base.as_ref()),
                |tx| self.desk.audit.stage(self.claim.fence(tx), &row),
            )
            .await?;
        }
        Ok(())
    }

    fn done(
        &self,
        started: Timestamp,
        reread: Reread,
        held_back: Option<HeldBack>,
        mut tally: Tally,
        held: &BTreeMap<SecretPath, Held>,
        backend: &Background<OwnLeases>,
    ) -> Done {
        tally.counts.skipped = tally.skipped.len() as u64;
        tally.counts.failed = tally.failed.len() as u64;
        let counts = tally.counts;
        let nothing = tally.read > 0 && counts.failed == tally.read && counts.unchanged == 0;
        let mapped_left_out = tally
            .skipped
            .iter()
            .any(|skipped| !skipped.path.is_empty() || skipped.reason == SkipReason::Forbidden);
        let outcome = if nothing {
            Outcome::Failed
        } else if counts.failed > 0 || held_back.is_some() || mapped_left_out {
            Outcome::Partial
        } else {
            Outcome::Complete
        };
        let state = (outcome != Outcome::Failed).then(|| self.next_state(started, reread, &tally, held));
        let first = tally.failed.first();
        let message = match (outcome, held_back) {
            (Outcome::Failed, _) => {
                first.map(|failed| failed.detail.clone()).unwrap_or_else(|| "nothing could be read".into())
            }
            (_, Some(HeldBack { deletions, known })) => format!(
                "{deletions} of {known} secrets are gone in the backend; no deletion is applied before somebody consents"
            ),
            (_, None) => first.map(|failed| failed.detail.clone()).unwrap_or_default(),
        };
        Done {
            outcome,
            counts,
            skipped: tally.skipped,
            failed: tally.failed,
            calls: backend.calls(),
            held_back,
            class: (outcome == Outcome::Failed).then(|| Class::Transient.as_str()),
            message,
            state,
        }
    }

    fn next_state(
        &self,
        started: Timestamp,
        reread: Reread,
        tally: &Tally,
        held: &BTreeMap<SecretPath, Held>,
    ) -> SyncState {
        let in_scope = |path: &SecretPath| {
            self.backend.mapping.owner(path).is_some_and(|rule| self.rules.contains(&rule))
        };
        let mut next = self.state.clone();
        next.exceptions.retain(|path, _| !in_scope(path));
        next.skipped.retain(|path, _| !in_scope(path));
        next.skipped.extend(tally.left_out.clone());
        for path in &tally.unverified {
            let Some(base) = held.get(path).and_then(|held| held.base.as_ref()) else { continue };
            let rule = self.backend.mapping.owner(path);
            let cycle = rule.and_then(|rule| self.state.rules.get(self.pattern(rule))).map(|rule| rule.as_of);
            let last = match self.state.exceptions.get(path) {
                Some(last) => *last,
                None => cycle.unwrap_or_default(),
            };
            next.exceptions.insert(path.clone(), last.max(base.verified));
        }
        for index in self.rules {
            let rule = next
                .rules
                .entry(self.pattern(*index).to_owned())
                .or_insert(RuleState { as_of: started, reread: started });
            rule.as_of = started;
            if reread == Reread::Everything {
                rule.reread = started;
            }
        }
        let live = held.values().filter(|held| self.is_live(held)).count() as u64;
        next.secrets = (live + tally.counts.created).saturating_sub(tally.counts.tombstoned);
        next
    }

    fn pattern(&self, rule: usize) -> &str {
        self.backend.mapping.rules()[rule].pattern.as_str()
    }
}

/// What the names of the paths of the synced rules begin with; none of them twice or within another.
pub(super) fn prefixes(backend: &BackendView) -> BTreeSet<String> {
    let all: BTreeSet<String> = backend
        .rules_in(Mode::Sync)
        .into_iter()
        .map(|index| {
            let pattern = &backend.mapping.rules()[index].pattern;
            let mut prefix = pattern.literal_prefix().collect::<Vec<_>>().join("/");
            if !prefix.is_empty() && !pattern.is_literal() {
                prefix.push('/');
            }
            prefix
        })
        .collect();
    all.iter()
        .filter(|prefix| !all.iter().any(|other| other != *prefix && prefix.starts_with(other.as_str())))
        .cloned()
        .collect()
}

impl Tally {
    fn of(plan: &SyncPlan, held: &BTreeMap<SecretPath, Held>, cycle: &Cycle<'_>) -> Tally {
        let mut tally = Tally {
            counts: Counts {
                listed: plan.listed,
                mapped: plan.mapped,
                unchanged: plan.unchanged,
                ..Counts::default()
            },
            skipped: plan.skipped.clone(),
            ..Tally::default()
        };
        tally.unverified.extend(plan.unverified.iter().cloned());
        for skipped in &plan.skipped {
            if let Ok(path) = SecretPath::check(&skipped.path)
                && !held.get(&path).is_some_and(|held| cycle.is_live(held))
            {
                tally.left_out.insert(path, skipped.reason);
            }
        }
        tally
    }

    fn add(&mut self, step: &Step, applied: Applied, known: bool) {
        if !matches!(step.decision, Decision::PullState(_) | Decision::LocalAhead) {
            self.read += 1;
        }
        match applied {
            Applied::Unchanged => self.counts.unchanged += 1,
            Applied::Created => self.counts.created += 1,
            Applied::Updated => self.counts.updated += 1,
            Applied::Overruled => {
                self.counts.updated += 1;
                self.counts.conflicts += 1;
            }
            Applied::Tombstoned => self.counts.tombstoned += 1,
            Applied::Gone => self.gone.push(step.clone()),
            Applied::LocalAhead => self.counts.local_ahead += 1,
            Applied::Skipped(reason, detail) => {
                self.leave_out(step, reason, known);
                self.skipped.push(line(step, reason, detail));
            }
            Applied::Failed(detail) | Applied::Down(detail) => {
                self.leave_out(step, SkipReason::Transient, known);
                self.failed.push(line(step, SkipReason::Transient, detail));
            }
        }
    }

    fn hold_back(&mut self, step: &Step) {
        self.unverified.insert(step.path.clone());
        self.skipped.push(line(step, SkipReason::MassDeleteGuard, String::new()));
    }

    fn leave_out(&mut self, step: &Step, reason: SkipReason, known: bool) {
        if known {
            self.unverified.insert(step.path.clone());
        } else {
            self.left_out.insert(step.path.clone(), reason);
        }
    }
}

fn line(step: &Step, reason: SkipReason, detail: String) -> Skipped {
    Skipped { path: step.path.to_string(), remote_name: step.name.as_str().into(), reason, detail }
}

/// What happened and what somebody can do about it: a report has one place for both.
fn told(error: &Error) -> String {
    match &error.next_step {
        Some(next) => format!("{}; {next}", error.message),
        None => error.message.to_string(),
    }
}

impl Done {
    pub(super) fn failed(class: &'static str, error: &Error, calls: BTreeMap<&'static str, u64>) -> Done {
        Done {
            outcome: Outcome::Failed,
            counts: Counts::default(),
            skipped: Vec::new(),
            failed: Vec::new(),
            calls,
            held_back: None,
            class: Some(class),
            message: told(error),
            state: None,
        }
    }

    /// What was committed before somebody ended it stays.
    fn cancelled(mut tally: Tally, backend: &Background<OwnLeases>) -> Done {
        tally.counts.skipped = tally.skipped.len() as u64;
        tally.counts.failed = tally.failed.len() as u64;
        Done {
            outcome: Outcome::Cancelled,
            counts: tally.counts,
            skipped: tally.skipped,
            failed: tally.failed,
            calls: backend.calls(),
            held_back: None,
            class: Some("cancelled"),
            message: "somebody ended the run".into(),
            state: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use scaivault_domain::Reason;

    use super::*;

    #[test]
    fn a_run_that_failed_tells_what_to_do_where_that_is_known() {
        let error = Error::new(Reason::BackendForbidden, "the backend forbids it");
        let message = |error: &Error| Done::failed("forbidden", error, BTreeMap::new()).message;
        assert_eq!(message(&error), "the backend forbids it");
        assert_eq!(message(&error.next("allow `list`")), "the backend forbids it; allow `list`");
    }
}
