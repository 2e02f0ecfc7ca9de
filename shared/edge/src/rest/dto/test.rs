//! Tests of backends in JSON.

use scaivault_domain::Error;
use scaivault_proto::federation::v1 as proto;
use serde::Serialize;
use utoipa::ToSchema;

use super::backend::Backend;

/// What a test of a backend found. No value was read.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct BackendTest {
    /// Whether no check failed.
    passed: bool,
    /// In the order in which they were made; what a failed one is needed for is skipped.
    checks: Vec<BackendCheck>,
}

/// One check of a test.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct BackendCheck {
    /// `configuration`, `endpoint`, `credential`, `login`, `list` or `read`; if something is synced also `history` and,
    /// where the store can give many values at once, `batch`.
    name: String,
    /// `ok`, `failed`, `skipped` or `warning`: what works, but less well.
    #[schema(pattern = "^(ok|failed|skipped|warning)$")]
    outcome: String,
    /// What was found, one sentence.
    detail: String,
    /// What to do about it, one sentence; empty if there is nothing to do.
    next_step: String,
    /// How long it took; null if nobody was asked.
    #[schema(required)]
    latency_ms: Option<u64>,
}

impl From<proto::BackendTest> for BackendTest {
    fn from(test: proto::BackendTest) -> Self {
        let checks = test.checks.into_iter().map(|check| BackendCheck {
            name: check.name,
            outcome: check.outcome,
            detail: check.detail,
            next_step: check.next_step,
            latency_ms: check.latency_ms,
        });
        BackendTest { passed: test.passed, checks: checks.collect() }
    }
}

/// What `validate_only=true` answers: nothing was stored.
#[derive(Serialize, ToSchema)]
pub(in crate::rest) struct ValidatedBackend {
    /// What would have been stored; of a new backend without an id.
    backend: Backend,
    /// How it was tested.
    test: BackendTest,
}

impl ValidatedBackend {
    /// The parts as the service gave them.
    pub(in crate::rest) fn from_wire(
        backend: proto::Backend,
        test: proto::BackendTest,
    ) -> Result<Self, Error> {
        Ok(ValidatedBackend { backend: Backend::from_wire(backend)?, test: test.into() })
    }
}

/// What a change answers.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "only describes the body")]
pub(in crate::rest) enum ChangedBackend {
    /// The backend as it is now.
    Stored(Backend),
    /// With `validate_only=true`.
    Validated(ValidatedBackend),
}
