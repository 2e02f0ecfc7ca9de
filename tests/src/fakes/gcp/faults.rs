//! What can go wrong with Google's answers.

use std::future;
use std::time::Duration;

use axum::body::{self, Body};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::Response;
use futures::stream;

use super::requests::{self, Operation};
use super::{PROJECT_NUMBER, Refusal};

/// A fault of the service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// No answer ever comes.
    Hang,
    /// This status, with an error of Google's shape.
    Status(u16),
    /// The quota is used up: 429 `RESOURCE_EXHAUSTED`.
    Throttled {
        /// What `Retry-After` says, if it is there.
        retry_after: Option<Duration>,
    },
    /// The right answer, cut in the middle.
    Truncated,
    /// 200 with bytes that are no JSON.
    Garbage,
    /// The right answer, called `text/html`.
    WrongContentType,
    /// An accessed payload does not have the checksum that stands beside it.
    WrongChecksum,
    /// Every page of a list says that there is another one, with a new token each time.
    EndlessPages,
    /// Every page of a list says that there is another one, always with the same token.
    RepeatedPageToken,
    /// 200 with a JSON object of this many bytes.
    Huge {
        /// Bytes.
        bytes: usize,
    },
}

/// The faults in force.
#[derive(Debug, Default)]
pub(super) struct Faults(Vec<Injected>);

#[derive(Debug)]
struct Injected {
    on: Option<Operation>,
    fault: Fault,
    left: Option<u32>,
}

impl Faults {
    pub(super) fn inject(&mut self, on: Option<Operation>, fault: Fault, times: Option<u32>) {
        self.0.push(Injected { on, fault, left: times });
    }

    /// The fault that a request of this kind meets.
    pub(super) fn next(&mut self, operation: Operation) -> Option<Fault> {
        self.0.retain(|injected| injected.left != Some(0));
        let met = self.0.iter_mut().rev().find(|injected| injected.on.is_none_or(|on| on == operation))?;
        if let Some(left) = &mut met.left {
            *left -= 1;
        }
        Some(met.fault)
    }
}

/// What is answered without looking at the request.
pub(super) async fn instead(fault: Option<&Fault>) -> Option<Response> {
    match fault? {
        Fault::Hang => future::pending().await,
        Fault::Status(code) => {
            let status = match code {
                503 => "UNAVAILABLE",
                504 => "DEADLINE_EXCEEDED",
                _ => "INTERNAL",
            };
            let message = "The service is currently unavailable.".to_owned();
            Some(Refusal { code: *code, status, message }.into())
        }
        Fault::Throttled { retry_after } => {
            let message = format!(
                "Quota exceeded for quota metric 'Access requests' and limit 'Access requests per minute' of service \
                 'secretmanager.googleapis.com' for consumer 'project_number:{PROJECT_NUMBER}'."
            );
            let mut answer: Response = Refusal { code: 429, status: "RESOURCE_EXHAUSTED", message }.into();
            if let Some(pause) = retry_after {
                answer.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(pause.as_secs()));
            }
            Some(answer)
        }
        Fault::Garbage => Some(requests::json_of(StatusCode::OK, Body::from(vec![0xfe; 512]))),
        Fault::Huge { bytes } => {
            const PIECE: usize = 64 * 1024;
            let (begin, end) = ("{\"padding\":\"", "\"}");
            let padding = bytes.saturating_sub(begin.len() + end.len());
            let pieces = std::iter::once(begin.to_owned())
                .chain(std::iter::repeat_n("x".repeat(PIECE), padding / PIECE))
                .chain([format!("{}{end}", "x".repeat(padding % PIECE))]);
            let body = Body::from_stream(stream::iter(pieces.map(Ok::<_, std::convert::Infallible>)));
            Some(requests::json_of(StatusCode::OK, body))
        }
        _ => None,
    }
}

/// What becomes of the right answer.
pub(super) async fn spoil(answer: Response, fault: Option<&Fault>) -> Response {
    let (mut parts, body) = answer.into_parts();
    let body = match fault {
        Some(Fault::WrongContentType) => {
            parts.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/html; charset=UTF-8"));
            body
        }
        Some(Fault::Truncated) => {
            let whole = body::to_bytes(body, usize::MAX).await.unwrap_or_default();
            parts.headers.insert(header::CONTENT_LENGTH, HeaderValue::from(whole.len()));
            let half = whole.slice(..whole.len() / 2);
            let cut = std::io::Error::from(std::io::ErrorKind::ConnectionReset);
            Body::from_stream(stream::iter([Ok(half), Err(cut)]))
        }
        _ => body,
    };
    Response::from_parts(parts, body)
}
