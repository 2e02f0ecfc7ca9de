//! What the errors of AWS mean.
//!
//! Sources: the errors of each action in the AWS Secrets Manager API Reference, "Common Error Types" there, and the
//! throttling codes of the SDK's own retry policy. Codes come with and without `Exception` at their end.

use std::time::Duration;

use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use aws_smithy_runtime_api::client::result::SdkError;
use aws_smithy_types::error::metadata::ProvideErrorMetadata;
use scaivault_domain::secret::State;

use crate::error::BackendError;
use crate::http::{parse_date, parse_retry_after};

pub(super) const NO_JSON_OF_AWS: BackendError = BackendError::InvalidAnswer("JSON that is not AWS's");

/// What a failed call of the SDK means, whichever service it was for. Its client has to be [`aws_http_client`].
///
/// [`aws_http_client`]: super::aws_http_client
pub fn aws_failure<E: ProvideErrorMetadata>(error: &SdkError<E, HttpResponse>) -> BackendError {
    match error {
        SdkError::ConstructionFailure(_) => {
            BackendError::InvalidConfig("no request can be made of the name, the region or the credential")
        }
        SdkError::TimeoutError(_) => BackendError::Timeout,
        SdkError::DispatchFailure(failure) => failure
            .as_connector_error()
            .and_then(|error| std::error::Error::source(error)?.downcast_ref().cloned())
            .unwrap_or(BackendError::Unreachable("the connection broke")),
        SdkError::ResponseError(error) => of_answer(error.raw(), None, None),
        SdkError::ServiceError(error) => of_answer(error.raw(), error.err().code(), error.err().message()),
        _ => NO_JSON_OF_AWS,
    }
}

fn of_answer(answer: &HttpResponse, code: Option<&str>, message: Option<&str>) -> BackendError {
    let header = |name: &str| answer.headers().get(name);
    let retry_after =
        header("retry-after").and_then(|text| parse_retry_after(text, header("date").and_then(parse_date)));
    let code = code.or_else(|| code_in_xml(answer.body().bytes()?));
    meaning(answer.status().as_u16(), code.unwrap_or(""), message.unwrap_or(""), retry_after)
}

/// Gateways of AWS, and emulators of them, answer in XML where the service itself speaks JSON.
fn code_in_xml(body: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(body).ok()?;
    let (_, rest) = text.split_once("<Code>")?;
    let (code, _) = rest.split_once("</Code>")?;
    Some(code)
}

/// What an error code means. By the status alone, if the code is unknown.
pub(super) fn meaning(status: u16, code: &str, message: &str, retry_after: Option<Duration>) -> BackendError {
    match code.strip_suffix("Exception").unwrap_or(code) {
        code if code.starts_with("Throttl") => BackendError::Throttled { retry_after },
        "TooManyRequests"
        | "RequestLimitExceeded"
        | "RequestThrottled"
        | "ProvisionedThroughputExceeded"
        | "BandwidthLimitExceeded"
        | "PriorRequestNotComplete"
        | "TransactionInProgress"
        | "SlowDown" => BackendError::Throttled { retry_after },
        "ExpiredToken"
        | "UnrecognizedClient"
        | "InvalidClientTokenId"
        | "InvalidAccessKeyId"
        | "InvalidSignature"
        | "SignatureDoesNotMatch"
        | "IncompleteSignature"
        | "MissingAuthenticationToken"
        | "AuthFailure"
        | "RequestExpired"
        | "RequestTimeTooSkewed"
        | "InvalidToken" => BackendError::LoginExpired,
        // A key of KMS that is closed to us closes the secret, whatever the policy of the secret says.
        "AccessDenied"
        | "NotAuthorized"
        | "UnauthorizedOperation"
        | "OptInRequired"
        | "DecryptionFailure"
        | "EncryptionFailure" => BackendError::Forbidden,
        "ResourceNotFound" => BackendError::NotFound,
        "ResourceExists" => BackendError::PreconditionLost,
        "InvalidRequest" if says_deleted(message) => BackendError::NotActive(State::Deleted),
        "InternalServiceError"
        | "InternalService"
        | "InternalFailure"
        | "InternalServerError"
        | "ServiceUnavailable" => BackendError::Server { status: status.max(500) },
        "LimitExceeded" => {
            BackendError::InvalidConfig("a quota of the account, or of the secret's versions, is used up")
        }
        "InvalidNextToken" => BackendError::InvalidAnswer("it no longer knows where the listing stood"),
        "InvalidRequest" => {
            BackendError::InvalidAnswer("it does not take the request in the state that the secret is in")
        }
        "InvalidParameter" | "ValidationError" | "Validation" | "Serialization" => MALFORMED,
        _ => match status {
            429 => BackendError::Throttled { retry_after },
            500.. => BackendError::Server { status },
            401 => BackendError::LoginExpired,
            // Something in front of the store may say no in a language of its own.
            403 => BackendError::Forbidden,
            200..300 => NO_JSON_OF_AWS,
            _ => BackendError::InvalidAnswer("a status that this request cannot have"),
        },
    }
}

const MALFORMED: BackendError = BackendError::InvalidAnswer("it takes the request for malformed");

/// Only the message tells a deleted secret from one that is in another wrong state.
fn says_deleted(message: &str) -> bool {
    ["marked for deletion", "marked deleted", "scheduled for deletion"]
        .iter()
        .any(|words| message.contains(words))
}
