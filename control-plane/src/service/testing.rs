//! Testing a backend, configured or not yet: with a connection and a login of its own, so that neither an old lease nor
//! an open breaker hides what is true now. No value is read, nothing is stored but the row of the audit trail.

mod report;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use scaivault_backends::{
    Backend, BackendError, EntryKind, Lease, Operation, SecretBackend as _, allow, reach,
};
use scaivault_domain::access::{Administer, Authorized, Caller, Capability, Scope};
use scaivault_domain::audit::{Action, AuditRow, Origin};
use scaivault_domain::backend::{BackendId, BackendSpec, Provider};
use scaivault_domain::lease::LeaseKey;
use scaivault_domain::mapping::RemoteName;
use scaivault_domain::path::SecretPath;
use scaivault_domain::sync::Mode;
use scaivault_domain::tenant::TenantId;
use scaivault_domain::view::BackendView;
use scaivault_domain::{Error, Reason};
use tokio::time::{Instant, timeout_at};

use super::configuration::view;
use super::federation::{Consent, Covered, Federation, Planned, edited, new_id};
use crate::credentials::TemporaryLease;
use crate::model::BackendRecord;
use crate::store::RowVersion;
use crate::sync::Losing;

pub use self::report::{Check, CheckName, Outcome, Report};

/// How long a whole test may take. A login is not cut short by it, lest it be lost before it is revoked; it has a
/// deadline of its own, which leaves some time for the rest.
const WHOLE: Duration = Duration::from_secs(15);
/// How long it may take to connect.
const CONNECT: Duration = Duration::from_secs(3);
/// Tests of one tenant at the same time.
const AT_ONCE: usize = 4;
/// Folders that are listed, each of them a rule's.
const MOST_ROOTS: usize = 8;
/// How deep a secret is looked for where folders hold nothing but folders.
const MOST_LEVELS: usize = 4;

/// The tests under way.
#[derive(Debug, Default)]
pub(super) struct Trials(Mutex<HashMap<TenantId, Vec<BackendId>>>);

/// The right to make one test, until it is dropped.
#[derive(Debug)]
struct Turn {
    trials: Arc<Trials>,
    tenant: TenantId,
    backend: BackendId,
}

impl Trials {
    /// Begins a test, if the backend is not being tested and the tenant has not too many of them.
    fn begin(self: &Arc<Self>, tenant: &TenantId, backend: &BackendId) -> Result<Turn, Error> {
        let mut trials = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let running = trials.entry(tenant.clone()).or_default();
        let refusal = match running.len() {
            _ if running.contains(backend) => "this backend is being tested already",
            AT_ONCE.. => "as many backends are being tested as may be at once",
            _ => {
                running.push(backend.clone());
                return Ok(Turn { trials: self.clone(), tenant: tenant.clone(), backend: backend.clone() });
            }
        };
        Err(Error::new(Reason::RateLimited, refusal)
            .next("wait until that test has ended; none takes longer than 15 s")
            .retry_after(Duration::from_secs(1)))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut trials = self.trials.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(running) = trials.get_mut(&self.tenant) {
            running.retain(|backend| *backend != self.backend);
            if running.is_empty() {
                trials.remove(&self.tenant);
            }
        }
    }
}

/// A change that was tried and not made.
#[derive(Debug)]
pub struct Tried {
    /// What would have been stored.
    pub spec: BackendSpec,
    /// What is stored; `None`: nothing.
    pub current: Option<(BackendRecord, RowVersion)>,
    /// How it was tested.
    pub report: Report,
}

impl Federation {
    /// Does what [`create`](Self::create) does, but for storing it, and tests it.
    ///
    /// # Errors
    /// As `create`; `rate_limited` if too many tests are under way.
    pub async fn try_create(
        &self,
        allowed: &Authorized<Administer, Scope>,
        origin: &Origin,
        spec: BackendSpec,
        covered: Covered,
    ) -> Result<Tried, Error> {
        let consent = Consent { covered, losing: Losing::Refused };
        let id = new_id()?;
        let _turn = self.trials.begin(allowed.tenant(), &id)?;
        self.tried(allowed, origin, self.plan(allowed, &id, consent, |_| Ok(spec.clone())).await?).await
    }

    /// Does what [`update`](Self::update) does, but for storing it, and tests it.
    ///
    /// # Errors
    /// As `update`; `rate_limited` if the backend is being tested, or too many are.
    pub async fn try_update(
        &self,
        allowed: &Authorized<Administer, Scope>,
        origin: &Origin,
        id: &BackendId,
        expected: Option<RowVersion>,
        consent: Consent,
        edit: impl Fn(&BackendSpec) -> Result<BackendSpec, Error>,
    ) -> Result<Tried, Error> {
        let _turn = self.trials.begin(allowed.tenant(), id)?;
        let planned = self.plan(allowed, id, consent, |before| edited(before, expected, &edit)).await?;
        self.tried(allowed, origin, planned).await
    }

    async fn tried(
        &self,
        allowed: &Authorized<Administer, Scope>,
        origin: &Origin,
        planned: Planned,
    ) -> Result<Tried, Error> {
        let Planned { record, before, .. } = planned;
        let report = self.tested(allowed, origin, &record.id, &record.spec, Ok(())).await?;
        Ok(Tried { spec: record.spec, current: before, report })
    }

    /// Tests a configured backend. The credential goes nowhere but where it goes anyway, so no more rights are needed
    /// than for any other use of the backend.
    ///
    /// # Errors
    /// `not_found`; `rate_limited` if the backend is being tested, or too many are.
    pub async fn test(
        &self,
        allowed: &Authorized<Administer, Scope>,
        origin: &Origin,
        id: &BackendId,
    ) -> Result<Report, Error> {
        let configuration = self.configurations.of(allowed.tenant()).await?;
        let (record, _) = configuration.backend(id)?;
        let _turn = self.trials.begin(allowed.tenant(), id)?;
        let valid = self.check_spec(&configuration, id, &record.spec);
        self.tested(allowed, origin, id, &record.spec, valid).await
    }

    /// Makes the test and writes it down before it is told.
    async fn tested(
        &self,
        allowed: &Authorized<Administer, Scope>,
        origin: &Origin,
        id: &BackendId,
        spec: &BackendSpec,
        valid: Result<(), Error>,
    ) -> Result<Report, Error> {
        let trial = Trial {
            federation: self,
            caller: allowed.caller(),
            key: LeaseKey { tenant: allowed.tenant().clone(), backend: id.clone() },
            spec,
            view: view(id, spec, 0),
            deadline: Instant::now() + WHOLE,
            report: Report::default(),
        };
        // On the heap: what holds it would be as large as everything that it may call.
        let report = Box::pin(trial.run(valid)).await;
        let now = self.clock.now();
        let mut row = AuditRow::new(allowed.caller(), origin, Action::BackendTest, spec.name.as_str(), now);
        row.backend = Some(id.to_string());
        row.remote_name = report.probed.as_ref().map(|name| name.as_str().to_owned());
        row.outcome = report.outcome_code().into();
        self.audit.record(row).await?;
        Ok(report)
    }
}

/// One test under way.
struct Trial<'a> {
    federation: &'a Federation,
    caller: &'a Caller,
    key: LeaseKey,
    spec: &'a BackendSpec,
    view: BackendView,
    deadline: Instant,
    report: Report,
}

/// A login, and the store to use it at.
struct Session {
    lease: TemporaryLease,
    backend: Backend,
}

impl Session {
    fn lease(&self) -> &Lease {
        self.lease.lease()
    }
}

/// What one page of each rule's folder showed.
#[derive(Default)]
struct Seen {
    /// Secrets, whatever they map to.
    names: usize,
    /// Those that have a path here.
    mapped: usize,
    /// One of them.
    example: Option<(SecretPath, RemoteName)>,
    /// Whether there is more than was looked at.
    more: bool,
    /// Folders that were refused, and why.
    refused: Vec<(Option<RemoteName>, BackendError)>,
    /// Folders that were answered.
    answered: usize,
}

impl Trial<'_> {
    async fn run(mut self, valid: Result<(), Error>) -> Report {
        let rules = match self.spec.mapping.rules().len() {
            1 => "1 rule".to_owned(),
            many => format!("{many} rules"),
        };
        let about = match self.spec.enabled {
            true => format!("{rules}, mode `{}`", self.spec.mode.as_str()),
            false => format!("{rules}, mode `{}`; the backend is disabled", self.spec.mode.as_str()),
        };
        let valid = self.report.add(CheckName::Configuration, None, valid.map(|()| about));
        if valid {
            self.endpoint().await;
            self.credential().await;
        }
        let session = match self.report.passed() {
            true => self.login().await,
            false => None,
        };
        match session {
            Some(session) => {
                let example = self.list(&session).await;
                self.names(&session, example).await;
            }
            None => self.report.skip_rest(self.expected()),
        }
        self.report
    }

    /// The checks that such a backend has.
    fn expected(&self) -> Vec<CheckName> {
        let mut names = vec![
            CheckName::Endpoint,
            CheckName::Credential,
            CheckName::Login,
            CheckName::List,
            CheckName::Read,
        ];
        names.extend(self.spec.is_synced().then_some(CheckName::History));
        names
    }

    async fn endpoint(&mut self) {
        let target = self.spec.provider.target();
        let (endpoint, egress) = (target.endpoint(), &self.federation.limits.egress);
        let started = Instant::now();
        let outcome = match self.federation.check_egress(self.spec).await {
            Ok(()) => reach(&endpoint, target.tls(), egress, CONNECT).await.map_err(Error::from),
            Err(refused) => Err(refused),
        };
        let found = format!("`{}` answers", endpoint.host());
        self.report.add(CheckName::Endpoint, Some(started.elapsed()), outcome.map(|()| found));
    }

    async fn credential(&mut self) {
        let provider = &self.spec.provider;
        let outcome = self.federation.credentials.check(&self.key.tenant, provider).await;
        let found = match provider.credentials() {
            Some(path) => format!("the secret `{path}` has what the login needs"),
            None => "none is needed: ScaiVault shows an identity of its own".to_owned(),
        };
        self.report.add(CheckName::Credential, None, outcome.map(|()| found));
    }

    async fn login(&mut self) -> Option<Session> {
        let started = Instant::now();
        let outcome = self.log_in().await;
        let took = Some(started.elapsed());
        match outcome {
            Ok(session) => {
                self.report.add(CheckName::Login, took, Ok("the store takes the login".to_owned()));
                Some(session)
            }
            Err(error) => {
                self.report.add(CheckName::Login, took, Err(error));
                None
            }
        }
    }

    /// Not every login asks somebody, so the store is asked whether it takes what came of it.
    async fn log_in(&self) -> Result<Session, Error> {
        let provider: &Provider = &self.spec.provider;
        let backend = Backend::connect(&self.view.target, &self.federation.limits.egress)?;
        let lease = self.federation.credentials.try_login(&self.key, provider).await?;
        let session = Session { lease, backend };
        self.within(session.backend.probe(session.lease())).await?;
        Ok(session)
    }

    async fn within<T>(
        &self,
        call: impl Future<Output = Result<T, BackendError>>,
    ) -> Result<T, BackendError> {
        timeout_at(self.deadline, call).await.unwrap_or(Err(BackendError::Timeout))
    }

    /// A secret whose name a listing, or a rule, gave.
    async fn list(&mut self, session: &Session) -> Option<(SecretPath, RemoteName)> {
        let rules: Vec<usize> = (0..self.spec.mapping.rules().len()).collect();
        let literal = self.view.literal_names(&rules).next();
        let roots = self.view.roots(&rules);
        if roots.is_empty() {
            self.report.skip(CheckName::List, "every rule names one secret, so nothing has to be listed");
            return literal;
        }
        let started = Instant::now();
        let seen = self.look(session, &roots).await;
        let check = match &seen {
            Ok(seen) => self.judge(session, seen).await,
            Err(error) => Check::of_failure(CheckName::List, &Error::from(error.clone())),
        };
        self.report.push(check.in_time(started.elapsed()));
        seen.ok().and_then(|seen| seen.example).or(literal)
    }

    async fn look(&self, session: &Session, roots: &[Option<RemoteName>]) -> Result<Seen, BackendError> {
        let mut seen = Seen { more: roots.len() > MOST_ROOTS, ..Seen::default() };
        for root in roots.iter().take(MOST_ROOTS) {
            let mut folder = root.clone();
            for level in 0..MOST_LEVELS {
                let page = session.backend.list(session.lease(), folder.as_ref(), None);
                let page = match self.within(page).await {
                    Ok(page) => page,
                    // One folder that is closed to us says nothing about the others.
                    Err(error @ BackendError::Forbidden) => {
                        seen.refused.push((folder, error));
                        break;
                    }
                    Err(error) => return Err(error),
                };
                seen.answered += usize::from(level == 0);
                seen.more |= page.next.is_some();
                let mut below = None;
                let before = seen.names;
                for entry in page.entries {
                    match entry.kind {
                        EntryKind::Secret => self.note(&mut seen, &entry.name),
                        EntryKind::Folder => below = below.or(Some(entry.name)),
                    }
                }
                seen.more |= below.is_some();
                if below.is_none() || seen.names > before {
                    break;
                }
                folder = below;
            }
        }
        Ok(seen)
    }

    fn note(&self, seen: &mut Seen, name: &RemoteName) {
        seen.names += 1;
        let name = self.view.target.kind().naming().fold(name);
        let Some(path) = self.view.mapping.reverse(&name).into_iter().flatten().next() else { return };
        // As a read of the path would ask for it.
        let Some((_, Some(name))) = self.view.forward(&path) else { return };
        seen.mapped += 1;
        if seen.example.is_none() {
            seen.example = Some((path, name));
        }
    }

    async fn judge(&self, session: &Session, seen: &Seen) -> Check {
        if let Some((folder, error)) = seen.refused.first() {
            let what = match folder {
                Some(folder) => format!("the credential may not list `{}`", folder.as_str()),
                None => "the credential may not list".to_owned(),
            };
            let next = self.allow(session, Operation::List, folder.as_ref()).await;
            let error = Error { message: what.into(), ..Error::from(error.clone()) }.next(next);
            // Reads by name need no listing, and of several folders a sync leaves out the closed ones.
            return match self.spec.is_synced() && seen.answered == 0 {
                true => Check::of_failure(CheckName::List, &error),
                false => Check::of_warning(CheckName::List, &error),
            };
        }
        let names = match seen.names {
            1 => "1 name".to_owned(),
            many => format!("{many} names"),
        };
        let rest = if seen.more { "; there is more than was looked at" } else { "" };
        let found = format!("{names} seen, {} with a path here{rest}", seen.mapped);
        match (seen.names, seen.mapped) {
            (0, _) if seen.more => Check::warning(
                CheckName::List,
                found,
                "nothing has to be done if there are secrets further down",
            ),
            (0, _) => Check::warning(
                CheckName::List,
                found,
                "compare the templates of the mapping with what is in the store",
            ),
            (_, 0) => Check::warning(
                CheckName::List,
                found,
                "compare the templates of the mapping with the names in the store",
            ),
            _ => Check::ok(CheckName::List, found),
        }
    }

    /// What depends on a secret to try it with.
    async fn names(&mut self, session: &Session, example: Option<(SecretPath, RemoteName)>) {
        match &example {
            Some((path, name)) => {
                self.read(session, path, name).await;
                if self.spec.is_synced() {
                    self.history(session, name).await;
                }
            }
            None => {
                self.report.skip(CheckName::Read, "no name is known to try it with");
                if self.spec.is_synced() {
                    self.report.skip(CheckName::History, "no name is known to try it with");
                }
            }
        }
        if self.view.rules_in(Mode::Sync).is_empty() {
            return;
        }
        let started = Instant::now();
        let batch = async { Ok(session.backend.may_read_many(session.lease()).await) };
        if let Some(outcome) = self.within(batch).await.unwrap_or_else(|error| Some(Err(error))) {
            let found = "several values can be read with one call";
            let failing = "without it a sync reads values one by one";
            let check = self.optional(CheckName::Batch, Operation::ReadMany, outcome, found, failing);
            self.report.push(check.in_time(started.elapsed()));
        }
    }

    async fn read(&mut self, session: &Session, path: &SecretPath, name: &RemoteName) {
        self.report.probed = Some(name.clone());
        // Who may not see the path learns no name from a test.
        let may_see = [Capability::List, Capability::Read].iter().any(|one| self.caller.allows(path, *one));
        let what = match may_see {
            true => format!("`{}`, which is `{path}` here", name.as_str()),
            false => "a secret that the mapping covers".to_owned(),
        };
        let started = Instant::now();
        let outcome = self.within(session.backend.may_read(session.lease(), name)).await;
        let check = match outcome {
            Ok(()) => Check::ok(CheckName::Read, format!("the credential may read {what}")),
            Err(BackendError::NotFound | BackendError::NotActive(_)) => {
                Check::skipped(CheckName::Read, format!("the store does not tell of {what}"))
            }
            Err(BackendError::Forbidden) => {
                let next = match may_see {
                    true => self.allow(session, Operation::Read, Some(name)).await,
                    false => allow(self.spec.provider.kind(), Operation::Read),
                };
                let message = format!("the credential may not read {what}");
                let error = Error::new(Reason::BackendForbidden, message).next(next);
                Check::of_failure(CheckName::Read, &error)
            }
            Err(error) => Check::of_failure(CheckName::Read, &Error::from(error)),
        };
        self.report.push(check.in_time(started.elapsed()));
    }

    async fn history(&mut self, session: &Session, name: &RemoteName) {
        let started = Instant::now();
        let outcome = self.within(session.backend.may_list_versions(session.lease(), name)).await;
        let found = "versions can be listed";
        let failing = "without it a first sync brings no older versions along";
        let check = self.optional(CheckName::History, Operation::History, outcome, found, failing);
        self.report.push(check.in_time(started.elapsed()));
    }

    /// Something that is missed by nobody but a sync, which does without it.
    fn optional(
        &self,
        name: CheckName,
        operation: Operation,
        outcome: Result<(), BackendError>,
        found: &str,
        failing: &str,
    ) -> Check {
        match outcome {
            Ok(()) => Check::ok(name, found.to_owned()),
            Err(BackendError::Forbidden) => {
                let message = format!("the credential may not do this; {failing}");
                let next = allow(self.spec.provider.kind(), operation);
                Check::of_warning(name, &Error::new(Reason::BackendForbidden, message).next(next))
            }
            Err(error) => Check::of_warning(name, &Error::from(error)),
        }
    }

    async fn allow(&self, session: &Session, operation: Operation, name: Option<&RemoteName>) -> String {
        let exact = session.backend.allow(session.lease(), &self.view.target, operation, name);
        let plain = || allow(self.spec.provider.kind(), operation);
        timeout_at(self.deadline, exact).await.unwrap_or_else(|_| plain())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tenant(name: &str) -> TenantId {
        TenantId::parse(name).expect("a tenant")
    }

    #[test]
    fn a_backend_is_tested_once_at_a_time_and_a_tenant_has_a_few() {
        let trials: Arc<Trials> = Arc::default();
        let ids: Vec<_> = (0..=AT_ONCE as u8).map(|number| BackendId::from_random([number; 10])).collect();
        let acme = tenant("acme");
        let first = trials.begin(&acme, &ids[0]).expect("nothing is under way");
        let twice = trials.begin(&acme, &ids[0]).expect_err("it is under way");
        assert_eq!(twice.reason, Reason::RateLimited);
        let mut turns: Vec<_> = ids[1..AT_ONCE].iter().map(|id| trials.begin(&acme, id)).collect();
        assert!(turns.iter().all(Result::is_ok));
        assert!(trials.begin(&acme, &ids[AT_ONCE]).is_err());
        assert!(trials.begin(&tenant("other"), &ids[0]).is_ok());
        drop(first);
        turns.push(trials.begin(&acme, &ids[AT_ONCE]));
        assert!(turns.iter().all(Result::is_ok));
        drop(turns);
        assert!(trials.0.lock().expect("no test panicked").is_empty());
    }
}
