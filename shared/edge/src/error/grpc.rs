//! Errors as gRPC statuses, and back.

use std::borrow::Cow;
use std::collections::HashMap;

use scaivault_domain::error::Violation;
use scaivault_domain::{Error, Reason};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt as _};

/// The domain of every `ErrorInfo` of ours.
pub const DOMAIN: &str = "scaivault";

const NEXT_STEP: &str = "next_step";

/// The canonical code of a reason.
pub fn code(reason: Reason) -> Code {
    match reason {
        Reason::InvalidPath
        | Reason::InvalidMapping
        | Reason::InvalidRequest
        | Reason::InvalidConfig
        | Reason::VersionUnsupported
        | Reason::CredentialCycle
        | Reason::CredentialUnusable => Code::InvalidArgument,
        Reason::TooLarge => Code::OutOfRange,
        Reason::Unauthenticated => Code::Unauthenticated,
        Reason::PermissionDenied => Code::PermissionDenied,
        Reason::NotFound | Reason::NotSynced | Reason::NotActive | Reason::Unrepresentable => Code::NotFound,
        Reason::AlreadyExists => Code::AlreadyExists,
        Reason::MappingOverlap
        | Reason::LocalSecretsCovered
        | Reason::FederatedReadOnly
        | Reason::WrongMode
        | Reason::InUse
        | Reason::LocalAhead
        | Reason::BackendForbidden
        | Reason::BackendLoginFailed => Code::FailedPrecondition,
        Reason::PreconditionFailed => Code::Aborted,
        Reason::RateLimited => Code::ResourceExhausted,
        Reason::BackendInvalidAnswer => Code::Unknown,
        Reason::BackendUnreachable
        | Reason::BackendThrottled
        | Reason::NoLease
        | Reason::TooStale
        | Reason::AuditUnavailable
        | Reason::ControlPlaneUnavailable
        | Reason::OfflineTooLong
        | Reason::Unavailable => Code::Unavailable,
        Reason::BackendTimeout | Reason::DeadlineExceeded => Code::DeadlineExceeded,
        Reason::Unsupported => Code::Unimplemented,
        Reason::Internal => Code::Internal,
    }
}

/// An error as a status with `ErrorInfo`, `BadRequest` and `RetryInfo`. The front adds `RequestInfo`.
pub fn status(error: Error) -> Status {
    let metadata = HashMap::from([(NEXT_STEP.to_owned(), error.what_next().to_owned())]);
    let mut details =
        ErrorDetails::with_error_info(error.reason.code().to_ascii_uppercase(), DOMAIN, metadata);
    if !error.violations.is_empty() {
        let fields = error.violations.into_iter().map(|v| FieldViolation::new(v.pointer, v.detail));
        details.set_bad_request(fields.collect::<Vec<_>>());
    }
    if error.retry_after.is_some() {
        details.set_retry_info(error.retry_after);
    }
    Status::with_error_details(code(error.reason), error.message, details)
}

/// The error that a status carries: whole if it is one of ours, otherwise what its code says.
///
/// The text of a foreign status is kept only where the caller's request is at fault; elsewhere it may name hosts.
pub fn error(status: &Status) -> Error {
    let details = status.get_error_details();
    let ours = details.error_info().filter(|info| info.domain == DOMAIN);
    let Some((info, reason)) =
        ours.and_then(|info| Some((info, Reason::from_code(&info.reason.to_ascii_lowercase())?)))
    else {
        return foreign(status);
    };
    Error {
        reason,
        message: Cow::Owned(status.message().to_owned()),
        next_step: info.metadata.get(NEXT_STEP).map(|step| Cow::Owned(step.clone())),
        violations: details
            .bad_request()
            .into_iter()
            .flat_map(|bad| &bad.field_violations)
            .map(|v| Violation { pointer: v.field.clone(), detail: v.description.clone() })
            .collect(),
        retry_after: details.retry_info().and_then(|retry| retry.retry_delay),
    }
}

fn foreign(status: &Status) -> Error {
    let said = |reason| Error::new(reason, status.message().to_owned());
    match status.code() {
        Code::InvalidArgument => said(Reason::InvalidRequest),
        Code::OutOfRange => said(Reason::TooLarge),
        Code::Unauthenticated => said(Reason::Unauthenticated),
        Code::PermissionDenied => said(Reason::PermissionDenied),
        Code::NotFound => said(Reason::NotFound),
        Code::AlreadyExists => said(Reason::AlreadyExists),
        Code::FailedPrecondition | Code::Aborted => said(Reason::PreconditionFailed),
        Code::ResourceExhausted => Error::new(Reason::RateLimited, "too many requests"),
        Code::Unimplemented => Error::new(Reason::Unsupported, "this server does not offer the operation"),
        Code::Unavailable => Error::new(Reason::Unavailable, "the service is not available"),
        Code::DeadlineExceeded | Code::Cancelled => deadline_exceeded(),
        Code::Ok | Code::Unknown | Code::Internal | Code::DataLoss => Error::internal(),
    }
}

pub(crate) fn deadline_exceeded() -> Error {
    Error::new(Reason::DeadlineExceeded, "the request took longer than its deadline")
        .next("try again; if it was a write, read first whether it has happened")
}
