//! What can go wrong with a store, said so that the caller knows what to do.
//!
//! No variant holds what the store sent: a body or a URL may carry a secret.

use std::time::Duration;

use scaivault_domain::secret::State;
use scaivault_domain::{Error, Reason};

const EGRESS_HINT: &str = "name another endpoint, or have the operator start the control plane and the nodes with an \
                           `--egress-allow` for this host or address";

/// Why a store gave no answer that can be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BackendError {
    /// The store asked us to slow down.
    #[error("the backend asked us to slow down")]
    Throttled {
        /// When it wants to be asked again, if it said so.
        retry_after: Option<Duration>,
    },
    /// No connection, or it broke before the answer.
    #[error("the backend cannot be reached: {0}")]
    Unreachable(&'static str),
    /// No answer before the deadline.
    #[error("the backend did not answer in time")]
    Timeout,
    /// The store has a fault of its own, or is sealed.
    #[error("the backend answered with status {status}")]
    Server {
        /// The status of its answer.
        status: u16,
    },
    /// The lease is no longer good: get another one.
    #[error("the backend no longer takes our credential")]
    LoginExpired,
    /// The lease is good, but must not read this name.
    #[error("the backend forbids our credential to do this")]
    Forbidden,
    /// The store has nothing of this name.
    #[error("the backend has nothing of this name")]
    NotFound,
    /// The name exists; its current version has no value.
    #[error("the current version in the backend is {}", .0.as_str())]
    NotActive(State),
    /// What is there is not what a write expected; nothing was overwritten for good.
    #[error("the backend has another version than was expected")]
    PreconditionLost,
    /// The store cannot have such a name, so it was not asked.
    #[error("the backend cannot have such a name")]
    Unrepresentable,
    /// The store has no way to do it, so it was not asked, or was asked for the rest.
    #[error("the backend cannot do this: {0}")]
    Unsupported(&'static str),
    /// A value that the store would not take, so it was not sent.
    #[error("the backend takes values of at most {most} bytes")]
    ValueTooLarge {
        /// The largest that it takes, in bytes.
        most: usize,
    },
    /// Not what this protocol allows.
    #[error("the backend gave an answer that is not its protocol: {0}")]
    InvalidAnswer(&'static str),
    /// A value that is not what its checksum says: it was damaged on its way, or over there.
    #[error("the backend gave a value that does not match its checksum")]
    Checksum,
    /// An answer larger than we take.
    #[error("the backend gave an answer that is too large")]
    TooLarge,
    /// The breaker is open: the store failed too often to be asked now.
    #[error("the backend failed repeatedly and is given a pause")]
    Open {
        /// When it is asked again.
        retry_after: Duration,
    },
    /// Too many calls are waiting for this store.
    #[error("too many calls are waiting for the backend")]
    Busy,
    /// The configuration cannot work.
    #[error("the backend's configuration cannot work: {0}")]
    InvalidConfig(&'static str),
    /// The operator does not let backends connect to where the endpoint is, or where its name leads.
    #[error("the backend's endpoint is, or leads to, {0}, and is refused")]
    EndpointRefused(&'static str),
    /// Which mount a name belongs to depends on a wildcard.
    #[error("the mount does not lie in the literal part of the template")]
    MountNotLiteral,
    /// Vault does not tell us about the mount, and the configuration does not either.
    #[error("the backend does not tell which KV mount the template names")]
    MountLookupForbidden,
}

/// The closed set of classes that status and events name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// Too many calls.
    Throttled,
    /// Trying again may help.
    Transient,
    /// A new login may help.
    Auth,
    /// A policy over there is in the way.
    Forbidden,
    /// There is no value of this name.
    NotFound,
    /// Somebody has to correct something.
    Invalid,
}

impl Class {
    /// The name in status and events.
    pub fn as_str(self) -> &'static str {
        match self {
            Class::Throttled => "throttled",
            Class::Transient => "transient",
            Class::Auth => "auth",
            Class::Forbidden => "forbidden",
            Class::NotFound => "not_found",
            Class::Invalid => "invalid",
        }
    }
}

impl BackendError {
    /// A lease of another kind of store: the configuration changed while a call was on its way.
    pub(crate) const FOREIGN_LEASE: BackendError =
        BackendError::InvalidConfig("the credential is one for another kind of store");

    /// The class of the error.
    pub fn class(&self) -> Class {
        match self {
            BackendError::Throttled { .. } | BackendError::Busy => Class::Throttled,
            BackendError::Unreachable(_)
            | BackendError::Timeout
            | BackendError::Server { .. }
            | BackendError::Open { .. } => Class::Transient,
            BackendError::LoginExpired => Class::Auth,
            BackendError::Forbidden => Class::Forbidden,
            BackendError::NotFound | BackendError::NotActive(_) | BackendError::Unrepresentable => {
                Class::NotFound
            }
            BackendError::InvalidAnswer(_)
            | BackendError::Checksum
            | BackendError::TooLarge
            | BackendError::Unsupported(_)
            | BackendError::ValueTooLarge { .. }
            | BackendError::PreconditionLost
            | BackendError::InvalidConfig(_)
            | BackendError::EndpointRefused(_)
            | BackendError::MountNotLiteral
            | BackendError::MountLookupForbidden => Class::Invalid,
        }
    }

    /// Whether it is a failure of the store that counts towards opening the breaker.
    pub fn is_outage(&self) -> bool {
        matches!(self, BackendError::Unreachable(_) | BackendError::Timeout | BackendError::Server { .. })
    }

    /// Whether the call was refused here, so that it says nothing about the store.
    pub fn is_refusal(&self) -> bool {
        matches!(
            self,
            BackendError::Open { .. }
                | BackendError::Busy
                | BackendError::Unrepresentable
                | BackendError::Unsupported(_)
                | BackendError::ValueTooLarge { .. }
                | BackendError::EndpointRefused(_)
                | BackendError::MountNotLiteral
        )
    }

    /// When trying again makes sense, if that is known.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            BackendError::Throttled { retry_after } => *retry_after,
            BackendError::Open { retry_after } => Some(*retry_after),
            _ => None,
        }
    }

    /// What somebody can do about it, one sentence.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            BackendError::Forbidden => {
                Some("let the policies of the store allow this to the backend's credential")
            }
            BackendError::LoginExpired => Some("check the backend's credential and its expiry"),
            BackendError::EndpointRefused(_) => Some(EGRESS_HINT),
            BackendError::MountNotLiteral => Some(
                "begin the template with the mount, e.g. `secret/data/**`; a namespace belongs into `config.namespace`",
            ),
            BackendError::MountLookupForbidden => Some(
                "begin the template with a KV mount that the role may read, or set `kv_mount` and `kv_version` in `config`",
            ),
            BackendError::Unreachable(_) | BackendError::Open { .. } => {
                Some("check the endpoint, the network and the certificate")
            }
            BackendError::Timeout => {
                Some("see whether the backend is slow, or raise the backend's `timeout`")
            }
            BackendError::Server { .. } => Some("see the backend's own health; it may be sealed"),
            BackendError::Throttled { .. } | BackendError::Busy => {
                Some("ask less often, or raise the backend's limits")
            }
            _ => None,
        }
    }
}

impl From<BackendError> for Error {
    fn from(error: BackendError) -> Error {
        let reason = match &error {
            BackendError::Throttled { .. } | BackendError::Busy => Reason::BackendThrottled,
            BackendError::Unreachable(_) | BackendError::Server { .. } | BackendError::Open { .. } => {
                Reason::BackendUnreachable
            }
            BackendError::Timeout => Reason::BackendTimeout,
            BackendError::LoginExpired => Reason::BackendLoginFailed,
            BackendError::Forbidden => Reason::BackendForbidden,
            BackendError::NotFound => Reason::NotFound,
            BackendError::NotActive(_) => Reason::NotActive,
            BackendError::PreconditionLost => Reason::PreconditionFailed,
            BackendError::Unrepresentable => Reason::Unrepresentable,
            BackendError::Unsupported(_) => Reason::InvalidRequest,
            BackendError::ValueTooLarge { .. } => Reason::TooLarge,
            // The reader did nothing wrong; it is the owner of the backend who reads the hint.
            BackendError::InvalidAnswer(_)
            | BackendError::Checksum
            | BackendError::TooLarge
            | BackendError::InvalidConfig(_)
            | BackendError::EndpointRefused(_)
            | BackendError::MountNotLiteral
            | BackendError::MountLookupForbidden => Reason::BackendInvalidAnswer,
        };
        let mut shown = Error::new(reason, error.to_string());
        if let Some(hint) = error.hint() {
            shown = shown.next(hint);
        }
        if let Some(after) = error.retry_after() {
            shown = shown.retry_after(after);
        }
        shown
    }
}
