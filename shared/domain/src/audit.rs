//! Rows of the audit trail: who did what, when, and how it ended. Never a value.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::access::Caller;
use crate::error::Error;
use crate::tenant::TenantId;
use crate::time::Timestamp;

/// What was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Action {
    /// A secret's value was read.
    #[serde(rename = "secret.read")]
    SecretRead,
    /// Paths were listed.
    #[serde(rename = "secret.list")]
    SecretList,
    /// The versions of a secret were listed.
    #[serde(rename = "secret.versions")]
    SecretVersions,
    /// A secret was written.
    #[serde(rename = "secret.write")]
    SecretWrite,
    /// A secret was deleted.
    #[serde(rename = "secret.delete")]
    SecretDelete,
    /// A backend was created, changed or deleted.
    #[serde(rename = "backend.write")]
    BackendWrite,
    /// Backends, their status or events were looked at.
    #[serde(rename = "backend.read")]
    BackendRead,
    /// A backend was tested, configured or not.
    #[serde(rename = "backend.test")]
    BackendTest,
    /// Tenants, policies, tokens or nodes were looked at.
    #[serde(rename = "admin.read")]
    AdminRead,
    /// The audit trail was looked at.
    #[serde(rename = "audit.read")]
    AuditRead,
    /// A policy was created, changed or deleted.
    #[serde(rename = "policy.write")]
    PolicyWrite,
    /// A token was created, renewed or revoked.
    #[serde(rename = "token.write")]
    TokenWrite,
    /// A tenant was created, changed or deleted.
    #[serde(rename = "tenant.write")]
    TenantWrite,
    /// A node was invited, enrolled or removed.
    #[serde(rename = "node.write")]
    NodeWrite,
    /// The control plane logged in to a backend.
    #[serde(rename = "backend.login")]
    BackendLogin,
    /// A sync took a value or a state from a backend.
    #[serde(rename = "sync.pull")]
    SyncPull,
    /// A sync deleted a secret, because it is gone in its backend.
    #[serde(rename = "sync.delete")]
    SyncDelete,
    /// A sync run was asked for, or ended before its end.
    #[serde(rename = "sync.run")]
    SyncRun,
    /// The copies of a backend were erased.
    #[serde(rename = "sync.erase")]
    SyncErase,
}

impl Action {
    /// The name in the API and in the rows.
    pub fn as_str(self) -> &'static str {
        match self {
            Action::SecretRead => "secret.read",
            Action::SecretList => "secret.list",
            Action::SecretVersions => "secret.versions",
            Action::SecretWrite => "secret.write",
            Action::SecretDelete => "secret.delete",
            Action::BackendWrite => "backend.write",
            Action::BackendRead => "backend.read",
            Action::BackendTest => "backend.test",
            Action::AdminRead => "admin.read",
            Action::AuditRead => "audit.read",
            Action::PolicyWrite => "policy.write",
            Action::TokenWrite => "token.write",
            Action::TenantWrite => "tenant.write",
            Action::NodeWrite => "node.write",
            Action::BackendLogin => "backend.login",
            Action::SyncPull => "sync.pull",
            Action::SyncDelete => "sync.delete",
            Action::SyncRun => "sync.run",
            Action::SyncErase => "sync.erase",
        }
    }
}

/// One row. Optional fields are left out of the stored form when they do not apply.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditRow {
    /// When the outcome was known.
    pub time: Timestamp,
    /// Whose it is.
    pub tenant: TenantId,
    /// Who did it: the token's subject, or `control-plane` for what it does by itself.
    pub principal: String,
    /// The token's accessor.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub accessor: String,
    /// What was done.
    pub action: Action,
    /// The secret's path, or the name of what was changed.
    pub path: String,
    /// The backend that served it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backend: Option<String>,
    /// The name there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote_name: Option<String>,
    /// Our version, if one was read or written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<u64>,
    /// The version there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote_version: Option<String>,
    /// `proxy`, `sync` or `local`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// `ok`, or the code of the refusal.
    pub outcome: String,
    /// How long it took, in microseconds.
    pub latency_us: u64,
    /// The request's id, as the caller was told it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub request_id: String,
    /// The trace's id (W3C, 32 hex digits), if the request was traced.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub trace_id: String,
}

/// What a row knows of the request behind it.
#[derive(Clone, Debug)]
pub struct Origin {
    /// The request's id, as the caller is told it.
    pub request_id: String,
    /// The trace's id, empty if the request is not traced.
    pub trace_id: String,
    /// When the request came in.
    pub started: Instant,
}

impl AuditRow {
    /// A row of `caller`'s doing `action` to `path`, at `time`, so far successful.
    pub fn new(
        caller: &Caller,
        origin: &Origin,
        action: Action,
        path: impl Into<String>,
        time: Timestamp,
    ) -> Self {
        AuditRow {
            time,
            tenant: caller.tenant.clone(),
            principal: caller.subject.clone(),
            accessor: caller.accessor.clone(),
            action,
            path: path.into(),
            backend: None,
            remote_name: None,
            version: None,
            remote_version: None,
            source: None,
            outcome: OK.into(),
            latency_us: micros(origin.started),
            request_id: origin.request_id.clone(),
            trace_id: origin.trace_id.clone(),
        }
    }

    /// The row of what the control plane did by itself for `tenant`.
    pub fn of_control_plane(
        tenant: TenantId,
        action: Action,
        path: impl Into<String>,
        time: Timestamp,
    ) -> Self {
        AuditRow {
            time,
            tenant,
            principal: "control-plane".into(),
            accessor: String::new(),
            action,
            path: path.into(),
            backend: None,
            remote_name: None,
            version: None,
            remote_version: None,
            source: None,
            outcome: OK.into(),
            latency_us: 0,
            request_id: String::new(),
            trace_id: String::new(),
        }
    }

    /// The same row with the outcome and the time it took.
    #[must_use]
    pub fn ended<T>(mut self, origin: &Origin, outcome: &Result<T, Error>) -> Self {
        self.outcome = outcome.as_ref().map_or_else(|error| error.reason.code(), |_| OK).into();
        self.latency_us = micros(origin.started);
        self
    }
}

/// The outcome of what succeeded.
pub const OK: &str = "ok";

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}
