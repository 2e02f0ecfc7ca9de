//! What a test of a backend found. Pure.

use std::time::Duration;

use scaivault_domain::audit::OK;
use scaivault_domain::mapping::RemoteName;
use scaivault_domain::{Error, Reason};

/// What is checked, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckName {
    /// The rules of a configuration, by itself and beside the others.
    Configuration,
    /// Whether the store's address may be used, resolves and answers.
    Endpoint,
    /// Whether the credential is there and has what the login needs.
    Credential,
    /// Whether the store takes the login.
    Login,
    /// Whether names can be listed, and have paths here.
    List,
    /// Whether the value of one of them may be read.
    Read,
    /// Whether versions can be listed.
    History,
    /// Whether many values can be read with one call.
    Batch,
}

impl CheckName {
    /// The name in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            CheckName::Configuration => "configuration",
            CheckName::Endpoint => "endpoint",
            CheckName::Credential => "credential",
            CheckName::Login => "login",
            CheckName::List => "list",
            CheckName::Read => "read",
            CheckName::History => "history",
            CheckName::Batch => "batch",
        }
    }
}

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is as it should be.
    Ok,
    /// The backend does not work like this.
    Failed,
    /// It could not be checked, or there is nothing to be checked.
    Skipped,
    /// It works, but less well.
    Warning,
}

impl Outcome {
    /// The name in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Outcome::Ok => "ok",
            Outcome::Failed => "failed",
            Outcome::Skipped => "skipped",
            Outcome::Warning => "warning",
        }
    }
}

/// One check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// What was checked.
    pub name: CheckName,
    /// How it ended.
    pub outcome: Outcome,
    /// What was found, one sentence.
    pub detail: String,
    /// What to do about it, one sentence; empty if there is nothing to do.
    pub next_step: String,
    /// How long it took; `None` if nobody was asked.
    pub latency: Option<Duration>,
    /// Why it failed.
    reason: Option<Reason>,
}

impl Check {
    fn new(name: CheckName, outcome: Outcome, detail: impl Into<String>, next_step: &str) -> Self {
        let (detail, next_step) = (detail.into(), next_step.to_owned());
        Check { name, outcome, detail, next_step, latency: None, reason: None }
    }

    /// It is as it should be.
    pub(super) fn ok(name: CheckName, detail: String) -> Self {
        Check::new(name, Outcome::Ok, detail, "")
    }

    /// It could not be checked.
    pub(super) fn skipped(name: CheckName, detail: impl Into<String>) -> Self {
        Check::new(name, Outcome::Skipped, detail, "")
    }

    /// It works, but less well.
    pub(super) fn warning(name: CheckName, detail: String, next_step: &str) -> Self {
        Check::new(name, Outcome::Warning, detail, next_step)
    }

    /// The backend does not work, because of `error`.
    pub(super) fn of_failure(name: CheckName, error: &Error) -> Self {
        let failed = Check::new(name, Outcome::Failed, &*error.message, error.what_next());
        Check { reason: Some(error.reason), ..failed }
    }

    /// With how long it took.
    pub(super) fn in_time(self, latency: Duration) -> Self {
        Check { latency: Some(latency), ..self }
    }

    /// The backend works less well, because of `error`.
    pub(super) fn of_warning(name: CheckName, error: &Error) -> Self {
        Check::new(name, Outcome::Warning, &*error.message, error.what_next())
    }
}

/// What a test found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// In the order in which they were made.
    pub checks: Vec<Check>,
    /// The name that was tried for `read`.
    pub(super) probed: Option<RemoteName>,
}

impl Report {
    /// Whether no check failed.
    pub fn passed(&self) -> bool {
        self.checks.iter().all(|check| check.outcome != Outcome::Failed)
    }

    /// `ok`, or the code of the first failure, for the audit trail.
    pub(super) fn outcome_code(&self) -> &'static str {
        let failed = self.checks.iter().find(|check| check.outcome == Outcome::Failed);
        failed.map_or(OK, |check| check.reason.unwrap_or(Reason::Internal).code())
    }

    pub(super) fn push(&mut self, check: Check) {
        self.checks.push(check);
    }

    /// Adds a check that is either as it should be or failed; whether it is.
    pub(super) fn add(
        &mut self,
        name: CheckName,
        latency: Option<Duration>,
        outcome: Result<String, Error>,
    ) -> bool {
        let check = match &outcome {
            Ok(detail) => Check::ok(name, detail.clone()),
            Err(error) => Check::of_failure(name, error),
        };
        self.push(Check { latency, ..check });
        outcome.is_ok()
    }

    pub(super) fn skip(&mut self, name: CheckName, why: &str) {
        self.push(Check::skipped(name, why));
    }

    /// Skips those of `names` that were not made, because of the first that failed.
    pub(super) fn skip_rest(&mut self, names: Vec<CheckName>) {
        let failed = self.checks.iter().find(|check| check.outcome == Outcome::Failed);
        let why = format!("`{}` failed", failed.map_or("another check", |check| check.name.as_str()));
        for name in names {
            if !self.checks.iter().any(|check| check.name == name) {
                self.skip(name, &why);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_failed_check_is_needed_for_is_skipped_and_the_first_failure_is_written_down() {
        let mut report = Report::default();
        assert!(report.add(CheckName::Configuration, None, Ok("1 rule".into())));
        assert!(report.passed() && report.outcome_code() == "ok");
        let down = Error::new(Reason::BackendUnreachable, "it does not answer");
        assert!(!report.add(CheckName::Endpoint, Some(Duration::from_millis(3)), Err(down)));
        report.add(CheckName::Credential, None, Err(Error::new(Reason::CredentialUnusable, "no `token`")));
        report.skip_rest(vec![CheckName::Endpoint, CheckName::Login, CheckName::List]);
        let outcomes: Vec<_> =
            report.checks.iter().map(|check| (check.name.as_str(), check.outcome.as_str())).collect();
        assert_eq!(
            outcomes,
            [
                ("configuration", "ok"),
                ("endpoint", "failed"),
                ("credential", "failed"),
                ("login", "skipped"),
                ("list", "skipped")
            ]
        );
        assert_eq!(report.checks[3].detail, "`endpoint` failed");
        assert!(!report.passed());
        assert_eq!(report.outcome_code(), "backend_unreachable");
        assert!(
            report
                .checks
                .iter()
                .all(|check| { check.outcome != Outcome::Failed || !check.next_step.is_empty() })
        );
    }

    #[test]
    fn a_warning_does_not_fail_a_test() {
        let mut report = Report::default();
        let refused = Error::new(Reason::BackendForbidden, "it may not").next("allow it");
        report.push(Check::of_warning(CheckName::History, &refused));
        assert!(report.passed() && report.outcome_code() == "ok");
        assert_eq!(report.checks[0].next_step, "allow it");
    }
}
