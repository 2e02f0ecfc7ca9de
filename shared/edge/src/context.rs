//! What is known of a request before anybody looks at what it asks.

use std::ops::Deref;
use std::sync::Arc;
use std::time::Instant;

use http::{HeaderMap, HeaderName};
use scaivault_domain::audit::Origin;

/// The header that carries the request's id, both ways.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

const TRACEPARENT: &str = "traceparent";

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
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let request_id = text(REQUEST_ID.as_str()).filter(|id| is_request_id(id)).map(str::to_owned);
        RequestContext(Arc::new(Origin {
            request_id: request_id.unwrap_or_else(|| format!("{:032x}", rand::random::<u128>())),
            trace_id: text(TRACEPARENT).and_then(trace_id).unwrap_or_default().to_owned(),
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

/// The trace id of a W3C `traceparent`: `version-traceid-parentid-flags`. Later versions may be longer.
fn trace_id(text: &str) -> Option<&str> {
    let is_hex = |part: &str, len: usize| {
        part.len() == len && part.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    };
    let is_zero = |part: &str| part.bytes().all(|b| b == b'0');
    let mut parts = text.split('-');
    let (version, trace, parent, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let well_formed = is_hex(version, 2)
        && version != "ff"
        && (version != "00" || parts.next().is_none())
        && is_hex(trace, 32)
        && !is_zero(trace)
        && is_hex(parent, 16)
        && !is_zero(parent)
        && is_hex(flags, 2);
    well_formed.then_some(trace)
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
    fn only_a_valid_traceparent_gives_a_trace_id() {
        let id = "4bf92f3577b34da6a3ce929d0e0e4736";
        for text in [
            format!("00-{id}-00f067aa0ba902b7-01"),
            format!("01-{id}-00f067aa0ba902b7-01"),
            format!("cc-{id}-00f067aa0ba902b7-01-what-comes-later"),
        ] {
            assert_eq!(context("traceparent", &text).trace_id, id, "{text}");
        }
        for text in [
            "".to_owned(),
            id.to_owned(),
            format!("ff-{id}-00f067aa0ba902b7-01"),
            format!("00-{id}-00f067aa0ba902b7-01-more"),
            format!("00-{}-00f067aa0ba902b7-01", id.to_uppercase()),
            format!("00-{}-00f067aa0ba902b7-01", "0".repeat(32)),
            format!("00-{id}-0000000000000000-01"),
            format!("00-{id}-00f067aa0ba902b7"),
        ] {
            assert_eq!(context("traceparent", &text).trace_id, "", "{text}");
        }
    }
}
