//! What the tests of this crate begin with.

use std::sync::{Arc, LazyLock};

use scaivault_domain::audit::{Action, AuditRow};
use scaivault_domain::tenant::{NodeName, TenantId};
use scaivault_domain::time::{Clock, Timestamp};
use scaivault_seal::{Cipher, Keyring};

pub(crate) fn tenant(name: &str) -> TenantId {
    TenantId::parse(name).unwrap()
}

pub(crate) fn node() -> NodeName {
    NodeName::parse("n1").unwrap()
}

pub(crate) fn row(tenant_id: &str, path: &str) -> AuditRow {
    AuditRow {
        time: FixedClock.now(),
        tenant: tenant(tenant_id),
        principal: "ci-deployer".into(),
        accessor: "acc_1".into(),
        action: Action::SecretRead,
        path: path.into(),
        backend: Some("vault".into()),
        remote_name: None,
        version: Some(3),
        remote_version: None,
        source: Some("proxy".into()),
        outcome: "ok".into(),
        latency_us: 1_250,
        request_id: "req_1".into(),
        trace_id: String::new(),
    }
}

/// The same for all tests, so that a journal can be opened again.
pub(crate) fn cipher() -> Arc<Cipher> {
    static RING: LazyLock<Keyring> = LazyLock::new(Keyring::generate);
    RING.cipher("node", "journal")
}

pub(crate) struct FixedClock;

impl Clock for FixedClock {
    fn now(&self) -> Timestamp {
        Timestamp::from_millis(1_767_225_600_000)
    }
}
