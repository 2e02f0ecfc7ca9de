//! Errors as `application/problem+json` (RFC 9457).

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use http::header::{CACHE_CONTROL, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderValue, StatusCode};
use scaivault_domain::{Error, Reason};
use serde::Serialize;
use utoipa::ToSchema;

/// The content type of every refusal over REST.
pub const CONTENT: &str = "application/problem+json";

/// The HTTP status of a reason.
pub fn status(reason: Reason) -> StatusCode {
    match reason {
        Reason::InvalidPath
        | Reason::InvalidMapping
        | Reason::InvalidRequest
        | Reason::InvalidConfig
        | Reason::VersionUnsupported
        | Reason::CredentialCycle
        | Reason::CredentialUnusable => StatusCode::BAD_REQUEST,
        Reason::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        Reason::Unauthenticated => StatusCode::UNAUTHORIZED,
        Reason::PermissionDenied => StatusCode::FORBIDDEN,
        Reason::NotFound | Reason::NotSynced | Reason::NotActive | Reason::Unrepresentable => {
            StatusCode::NOT_FOUND
        }
        Reason::AlreadyExists
        | Reason::MappingOverlap
        | Reason::LocalSecretsCovered
        | Reason::FederatedReadOnly
        | Reason::WrongMode
        | Reason::InUse
        | Reason::LocalAhead => StatusCode::CONFLICT,
        Reason::PreconditionFailed => StatusCode::PRECONDITION_FAILED,
        Reason::RateLimited => StatusCode::TOO_MANY_REQUESTS,
        Reason::BackendForbidden
        | Reason::BackendLoginFailed
        | Reason::BackendUnreachable
        | Reason::BackendInvalidAnswer => StatusCode::BAD_GATEWAY,
        Reason::BackendThrottled
        | Reason::NoLease
        | Reason::TooStale
        | Reason::AuditUnavailable
        | Reason::ControlPlaneUnavailable
        | Reason::OfflineTooLong
        | Reason::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Reason::BackendTimeout | Reason::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        Reason::Unsupported => StatusCode::NOT_IMPLEMENTED,
        Reason::Internal => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// A refusal or failure.
#[derive(Serialize, ToSchema)]
#[schema(as = Problem)]
pub(crate) struct Problem<'a> {
    /// `urn:scaivault:error:` and the code.
    r#type: String,
    /// The code in words.
    title: String,
    /// The HTTP status.
    status: u16,
    /// What happened, one sentence.
    detail: &'a str,
    /// One of a closed set of lower-case names; what programs should look at.
    code: &'static str,
    /// Finds the request in logs and audit rows.
    request_id: &'a str,
    /// The wrong fields, if the request was at fault.
    errors: Vec<FieldError<'a>>,
    /// What to do next, one sentence.
    next_step: &'a str,
}

/// One wrong field.
#[derive(Serialize, ToSchema)]
#[schema(as = FieldError)]
pub(crate) struct FieldError<'a> {
    /// JSON pointer into the body, or `/name` of a parameter or header.
    pointer: &'a str,
    /// What is wrong with it.
    detail: &'a str,
}

/// An error as a response.
pub fn response(error: &Error, request_id: &str) -> Response {
    with_status(error, status(error.reason), request_id)
}

fn with_status(error: &Error, status: StatusCode, request_id: &str) -> Response {
    let code = error.reason.code();
    let problem = Problem {
        r#type: format!("urn:scaivault:error:{code}"),
        title: code.replace('_', " "),
        status: status.as_u16(),
        detail: &error.message,
        code,
        request_id,
        errors: error
            .violations
            .iter()
            .map(|v| FieldError { pointer: &v.pointer, detail: &v.detail })
            .collect(),
        next_step: error.what_next(),
    };
    let body = serde_json::to_vec(&problem).expect("strings and numbers are JSON");
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(CONTENT));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if let Some(after) = error.retry_after {
        // Whole seconds, rounded up: a caller that comes back too early is refused again.
        let seconds = after.as_secs() + u64::from(after.subsec_nanos() > 0);
        headers.insert(RETRY_AFTER, HeaderValue::from(seconds.max(1)));
    }
    if status == StatusCode::UNAUTHORIZED {
        headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response
}

/// A refusal on its way out of a handler. It becomes a problem where the request's id is known: in the frame around
/// all routes.
#[derive(Clone, Debug)]
pub(crate) struct Refusal {
    error: Error,
    status: StatusCode,
}

impl Refusal {
    /// A refusal with a status that HTTP demands instead of the reason's own.
    pub(crate) fn with_status(error: Error, status: StatusCode) -> Self {
        Refusal { error, status }
    }

    /// Why.
    pub(crate) fn reason(&self) -> Reason {
        self.error.reason
    }

    /// Writes the refusal that `response` carries, if it carries one, and keeps the headers that were set beside it.
    pub(crate) fn write(mut response: Response, request_id: &str) -> Response {
        let Some(refusal) = response.extensions_mut().remove::<Refusal>() else { return response };
        let mut written = with_status(&refusal.error, refusal.status, request_id);
        if let Some(allow) = response.headers_mut().remove(http::header::ALLOW) {
            written.headers_mut().insert(http::header::ALLOW, allow);
        }
        written
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Refusal { status: status(error.reason), error }
    }
}

impl From<tonic::Status> for Refusal {
    fn from(status: tonic::Status) -> Self {
        let error = super::grpc::error(&status);
        if error.reason == Reason::Internal {
            tracing::error!(code = ?status.code(), message = status.message(), "the service failed");
        }
        error.into()
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let mut response = self.status.into_response();
        response.extensions_mut().insert(self);
        response
    }
}
