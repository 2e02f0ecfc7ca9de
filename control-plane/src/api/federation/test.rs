//! Tests of backends as messages.

use scaivault_proto::federation::v1 as pb;

use super::spec;
use crate::service::testing::{Check, Report, Tried};

/// What a test found.
pub(super) fn message(report: &Report) -> pb::BackendTest {
    pb::BackendTest { passed: report.passed(), checks: report.checks.iter().map(check).collect() }
}

fn check(check: &Check) -> pb::BackendCheck {
    pb::BackendCheck {
        name: check.name.as_str().into(),
        outcome: check.outcome.as_str().into(),
        detail: check.detail.clone(),
        next_step: check.next_step.clone(),
        latency_ms: check.latency.map(|took| u64::try_from(took.as_millis()).unwrap_or(u64::MAX)),
    }
}

/// What a change that was tried would have stored, and how it was tested.
pub(super) fn tried(tried: &Tried) -> (Option<pb::Backend>, Option<pb::BackendTest>) {
    (Some(spec::tried(&tried.spec, tried.current.as_ref())), Some(message(&tried.report)))
}
