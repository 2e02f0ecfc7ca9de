//! What is known of a request before anybody looks at what it asks.

use std::ops::Deref;
use std::sync::Arc;
use std::time::Instant;

use http::{HeaderMap, HeaderName};
use scaivault_domain::audit::Origin;
use scaivault_telemetry::trace::Remote;

/// The header that carries the request's id, both ways.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The id, the trace and the start of a request: an [`Origin`] for audit rows, cheap to clone.
#[derive(Clone, Debug)]
pub struct RequestContext(Arc<Origin>);

impl RequestContext {
    /// The context of a request: the one that the front gave it, or a new one where there is no front.
    pub fn of<T>(request: &tonic::Request<T>) -> Self {
        let given = request.extensions().get::<RequestContext>().cloned();
        given.unwrap_or_else(|| Self::from_headers(request.metadata().as_ref()))
    }

    /// A context from `x-request-id` and `traceparent`. What is missing or malformed is made up or left out.
    pub fn from_headers(headers: &HeaderMap) -> Self {
        let trace_id = Remote::from_headers(headers).map(|caller| caller.trace_id().to_owned());
        Self::in_trace(headers, trace_id.unwrap_or_default())
    }

    /// A context in a trace that is known already; in none if `trace_id` is empty.
    pub(crate) fn in_trace(headers: &HeaderMap, trace_id: String) -> Self {
        let request_id = headers.get(REQUEST_ID).and_then(|value| value.to_str().ok());
        let request_id = request_id.filter(|id| is_request_id(id)).map(str::to_owned);
        RequestContext(Arc::new(Origin {
            request_id: request_id.unwrap_or_else(|| format!("{:032x}", rand::random::<u128>())),
            trace_id,
            started: Instant::now(),
        }))
    }
}

impl Deref for RequestContext {
    type Target = Origin;

    fn deref(&self) -> &Origin {
        &self.0
    }
}

/// Whether a caller's id may go into logs and audit rows as it stands.
fn is_request_id(text: &str) -> bool {
    (1..=64).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context(name: &'static str, value: &str) -> RequestContext {
        RequestContext::from_headers(&HeaderMap::from_iter([(
            HeaderName::from_static(name),
            value.parse().unwrap(),
        )]))
    }

    #[test]
    fn a_sane_request_id_is_kept_and_any_other_replaced() {
        let longest = "x".repeat(64);
        for id in ["a", "A-b_c.9", longest.as_str()] {
            assert_eq!(context("x-request-id", id).request_id, id);
        }
        let too_long = "x".repeat(65);
        for id in ["", "a b", "a\"b", "a/b", too_long.as_str()] {
            let made = context("x-request-id", id).request_id.clone();
            assert_ne!(made, id);
            assert!(is_request_id(&made), "{made}");
        }
    }

    #[test]
    fn the_trace_is_the_callers_or_none() {
        let id = "4bf92f3577b34da6a3ce929d0e0e4736";
        assert_eq!(context("traceparent", &format!("00-{id}-00f067aa0ba902b7-01")).trace_id, id);
        for text in ["", id] {
            assert_eq!(context("traceparent", text).trace_id, "", "{text}");
        }
    }
}
