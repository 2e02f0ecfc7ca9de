//! The one error of the product: a closed set of reasons, each saying what the caller can do.
//!
//! A reason is the `reason` of a gRPC `ErrorInfo` and, in lower case, the `code` of a problem+json. Status codes
//! belong to the edge, which maps every variant of [`Reason`] exhaustively.

use std::borrow::Cow;
use std::time::Duration;

use crate::secret::State;
use crate::sync::SkipReason;
use crate::tenant::BackendName;

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $code:literal),+ $(,)?) => {
        /// Why a request was not served. Adding a variant breaks the build wherever it must be known.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Reason { $($(#[$doc])* $variant),+ }

        impl Reason {
            /// Every reason, in the order of declaration.
            pub const ALL: &'static [Reason] = &[$(Reason::$variant),+];

            /// The lower-case name that problem+json and the CLI show.
            pub fn code(self) -> &'static str {
                match self { $(Reason::$variant => $code),+ }
            }
        }
    };
}

reasons! {
    /// The path breaks the grammar of `SecretPath`.
    InvalidPath = "invalid_path",
    /// A rule of a path mapping is not one of the language.
    InvalidMapping = "invalid_mapping",
    /// A field of the request is missing, unknown or out of range.
    InvalidRequest = "invalid_request",
    /// A field of a backend's configuration is missing, unknown or out of range.
    InvalidConfig = "invalid_config",
    /// `version` was asked of a path whose store does not keep versions here.
    VersionUnsupported = "version_unsupported",
    /// The credential would have to be read through a federation.
    CredentialCycle = "credential_cycle",
    /// The credential named by the configuration is missing or lacks a key.
    CredentialUnusable = "credential_unusable",
    /// The value, body or header is larger than the limit.
    TooLarge = "too_large",
    /// No token, or one that is unknown, expired or revoked.
    Unauthenticated = "unauthenticated",
    /// The token lacks the scope, or no policy allows the path.
    PermissionDenied = "permission_denied",
    /// Nothing with this name is visible to the caller.
    NotFound = "not_found",
    /// The path belongs to a synced backend, and the last sync left it out.
    NotSynced = "not_synced",
    /// The secret exists, but its current state has no value.
    NotActive = "not_active",
    /// The path maps to a name that its store cannot have.
    Unrepresentable = "unrepresentable",
    /// Something with this name exists.
    AlreadyExists = "already_exists",
    /// Two backends of the tenant would both own a path.
    MappingOverlap = "mapping_overlap",
    /// The mapping would hide existing local secrets.
    LocalSecretsCovered = "local_secrets_covered",
    /// The path is owned by a backend that takes no writes through here.
    FederatedReadOnly = "federated_read_only",
    /// The backend's mode does not have this operation.
    WrongMode = "wrong_mode",
    /// The thing is used by another and cannot go.
    InUse = "in_use",
    /// The version or etag is no longer the current one.
    PreconditionFailed = "precondition_failed",
    /// Secrets were changed here that the change would erase.
    LocalAhead = "local_ahead",
    /// Too many requests of this tenant.
    RateLimited = "rate_limited",
    /// The backend refused our credential's access to this name.
    BackendForbidden = "backend_forbidden",
    /// The backend refused our login.
    BackendLoginFailed = "backend_login_failed",
    /// The backend cannot be connected to, or its breaker is open.
    BackendUnreachable = "backend_unreachable",
    /// The backend answered something that is not its protocol.
    BackendInvalidAnswer = "backend_invalid_answer",
    /// The backend asked us to slow down.
    BackendThrottled = "backend_throttled",
    /// The backend did not answer before the deadline.
    BackendTimeout = "backend_timeout",
    /// The node has no credential for the backend and cannot get one now.
    NoLease = "no_lease",
    /// The copy is older than the read allows, and could not be verified now.
    TooStale = "too_stale",
    /// The audit row could not be written, so the value stays here.
    AuditUnavailable = "audit_unavailable",
    /// The node cannot reach the control plane, which this request needs.
    ControlPlaneUnavailable = "control_plane_unavailable",
    /// The node has been without its control plane for longer than is allowed.
    OfflineTooLong = "offline_too_long",
    /// The process is starting or draining.
    Unavailable = "unavailable",
    /// The request took longer than its deadline.
    DeadlineExceeded = "deadline_exceeded",
    /// The operation exists in the API, but this configuration does not offer it.
    Unsupported = "unsupported",
    /// A fault of ours; the request id finds it in the log.
    Internal = "internal",
}

impl Reason {
    /// The reason whose [`code`](Self::code) this is.
    pub fn from_code(code: &str) -> Option<Reason> {
        Reason::ALL.iter().copied().find(|reason| reason.code() == code)
    }
}

impl Reason {
    /// What the caller can do where nothing more particular is known.
    pub fn next_step(self) -> &'static str {
        match self {
            Reason::InvalidPath
            | Reason::InvalidMapping
            | Reason::InvalidRequest
            | Reason::InvalidConfig
            | Reason::CredentialCycle
            | Reason::CredentialUnusable => "correct the named field and send the request again",
            Reason::VersionUnsupported => "read without `version`",
            Reason::TooLarge => "send less, or keep large data elsewhere and a reference to it here",
            Reason::Unauthenticated => "send a current token in `Authorization: Bearer …`",
            Reason::PermissionDenied => "use a token that may, or ask the tenant's admin for one",
            Reason::NotFound => "check the name; a listing shows what is there",
            Reason::NotSynced => "see the backend's last sync run for what it skipped and why",
            Reason::TooStale => "accept an older value, or see the backend's status",
            Reason::LocalAhead => "copy what is only here, or send `\"force\": true` to lose it",
            Reason::NotActive => "list the versions to see which have a value",
            Reason::Unrepresentable => "check the path; its store cannot have such a name",
            Reason::AlreadyExists => "choose another name, or change what exists",
            Reason::MappingOverlap => "make one of the mappings narrower",
            Reason::LocalSecretsCovered => "move the local secrets, or narrow the mapping",
            Reason::FederatedReadOnly => "write it in the backend",
            Reason::WrongMode => "see the backend's mode",
            Reason::InUse => "remove what uses it first",
            Reason::PreconditionFailed => "read it again and decide again",
            Reason::RateLimited
            | Reason::BackendThrottled
            | Reason::ControlPlaneUnavailable
            | Reason::NoLease
            | Reason::Unavailable
            | Reason::DeadlineExceeded => "try again later",
            Reason::BackendForbidden | Reason::BackendLoginFailed => {
                "check the rights of the backend's credential"
            }
            Reason::BackendUnreachable | Reason::BackendTimeout => {
                "see the backend's status; it is tried again by itself"
            }
            Reason::BackendInvalidAnswer => {
                "check that the endpoint is the store itself and not something in between"
            }
            Reason::AuditUnavailable => "ask the operator to look at the audit journal",
            Reason::OfflineTooLong => "restore the node's connection to its control plane",
            Reason::Unsupported => "see the documentation of this version",
            Reason::Internal => "give the request id to the operator",
        }
    }
}

/// One field of a request that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// JSON pointer (RFC 6901) into the request, e.g. `/config/endpoint`.
    pub pointer: String,
    /// What is wrong with it, in one sentence without the value.
    pub detail: String,
}

/// A refusal or failure as the caller sees it. Never holds a secret, a backend's body, or a file's path.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{}: {message}", reason.code())]
pub struct Error {
    /// What kind of refusal this is.
    pub reason: Reason,
    /// One sentence that says what happened.
    pub message: Cow<'static, str>,
    /// What the caller can do next, one sentence.
    pub next_step: Option<Cow<'static, str>>,
    /// The wrong fields, if the request was at fault.
    pub violations: Vec<Violation>,
    /// When trying again makes sense.
    pub retry_after: Option<Duration>,
}

impl Error {
    /// An error of `reason` that says `message`.
    pub fn new(reason: Reason, message: impl Into<Cow<'static, str>>) -> Self {
        Error { reason, message: message.into(), next_step: None, violations: Vec::new(), retry_after: None }
    }

    /// Bad input: the field at `pointer` is wrong in the way `detail` says, which is the message too.
    pub fn field(reason: Reason, pointer: impl Into<String>, detail: impl Into<String>) -> Self {
        let (pointer, detail) = (pointer.into(), detail.into());
        let name = pointer.trim_start_matches('/').replace('/', ".");
        let message = if name.is_empty() { detail.clone() } else { format!("{name}: {detail}") };
        Error::new(reason, message).violation(pointer, detail)
    }

    /// An `invalid_request` that names the field.
    pub fn invalid(pointer: impl Into<String>, detail: impl Into<String>) -> Self {
        Error::field(Reason::InvalidRequest, pointer, detail)
    }

    /// A change of a path that `backend` owns.
    pub fn federated_read_only(backend: &BackendName) -> Self {
        let message =
            format!("the path is federated by the backend `{backend}`, which takes no writes through here");
        Error::new(Reason::FederatedReadOnly, message).next(
            "write it in the backend; a proxied path shows it at once, a synced one after its next sync",
        )
    }

    /// A secret whose current version has no value.
    pub fn not_active(state: State) -> Self {
        Error::new(Reason::NotActive, format!("the secret is {}", state.as_str()))
            .next("list its versions to see which have a value")
    }

    /// A synced path that the last cycle left out.
    pub fn not_synced(reason: SkipReason) -> Self {
        Error::new(Reason::NotSynced, format!("the last sync skipped the secret: {}", reason.as_str()))
    }

    /// A path that the store of its backend has no name for. The store was not asked.
    pub fn unrepresentable(backend: &BackendName) -> Self {
        Error::new(Reason::Unrepresentable, format!("the backend `{backend}` can have no name for this path"))
    }

    /// A use of a backend that has another store or login by now.
    pub fn reconfigured() -> Self {
        Error::new(Reason::NoLease, "the backend's configuration has just changed")
            .next("try again")
            .retry_after(Duration::from_secs(1))
    }

    /// A use of a backend that is switched off.
    pub fn backend_disabled(backend: &BackendName) -> Self {
        Error::new(Reason::BackendUnreachable, format!("backend `{backend}` is disabled"))
            .next("enable the backend")
    }

    /// A fault of ours. The cause goes to the log where it is handled, not to the caller.
    pub fn internal() -> Self {
        Error::new(Reason::Internal, "an internal fault; the request id finds it in the log")
    }

    /// Adds a wrong field.
    #[must_use]
    pub fn violation(mut self, pointer: impl Into<String>, detail: impl Into<String>) -> Self {
        self.violations.push(Violation { pointer: pointer.into(), detail: detail.into() });
        self
    }

    /// Says what the caller can do next.
    #[must_use]
    pub fn next(mut self, step: impl Into<Cow<'static, str>>) -> Self {
        self.next_step = Some(step.into());
        self
    }

    /// What the caller can do next: what the error says of it, or what its reason does.
    pub fn what_next(&self) -> &str {
        self.next_step.as_deref().unwrap_or(self.reason.next_step())
    }

    /// Says when to try again.
    #[must_use]
    pub fn retry_after(mut self, after: Duration) -> Self {
        self.retry_after = Some(after);
        self
    }

    /// Moves every violation below `prefix`, e.g. from `/endpoint` to `/config/endpoint`.
    #[must_use]
    pub fn under(mut self, prefix: &str) -> Self {
        for violation in &mut self.violations {
            violation.pointer.insert_str(0, prefix);
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_is_found_by_its_code() {
        for reason in Reason::ALL {
            assert_eq!(Reason::from_code(reason.code()), Some(*reason));
        }
    }
}
