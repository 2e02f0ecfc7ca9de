//! What is around every request, whatever its protocol: an id, a span, a deadline, and an answer even to a panic.

use std::collections::HashSet;
use std::convert::Infallible;
use std::panic::AssertUnwindSafe;
use std::sync::LazyLock;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{MatchedPath, Request};
use axum::response::{IntoResponse as _, Response};
use axum::routing::Route;
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use futures::FutureExt as _;
use http::header::{AUTHORIZATION, CONTENT_TYPE};
use http::{HeaderMap, HeaderValue, Method};
use prost::Message as _;
use prost_types::FileDescriptorSet;
use scaivault_domain::Error;
use scaivault_telemetry::trace::{Remote, ServerSpan};
use tonic_types::{RequestInfo, pb};
use tower::util::service_fn;
use tower::{ServiceExt as _, layer::layer_fn};
use tracing::Instrument as _;

use crate::context::{REQUEST_ID, RequestContext};
use crate::error::{Refusal, grpc};

const GRPC: &str = "application/grpc";
const STATUS_DETAILS: &str = "grpc-status-details-bin";

/// Puts the frame around every route and fallback of `router`. Within `deadline` a handler must have begun to answer;
/// what it then streams may take longer.
pub(crate) fn framed(router: Router, deadline: Duration) -> Router {
    // One layer for everything: each further one would cost every request an allocation.
    router.layer(layer_fn(move |route: Route| {
        service_fn(move |request: Request| answer(route.clone(), request, deadline))
    }))
}

async fn answer(route: Route, mut request: Request, deadline: Duration) -> Result<Response, Infallible> {
    let wire = Wire::of(request.headers());
    let (method, called) = (method_of(&request), route_of(&request, &wire));
    let caller = Remote::from_headers(request.headers());
    let served = wire.span(method, called, caller.as_ref());
    let trace_id = served.trace_id().or_else(|| Some(caller?.trace_id().to_owned())).unwrap_or_default();
    let context = RequestContext::in_trace(request.headers(), trace_id);
    let span = tracing::info_span!(
        "request",
        request.id = context.request_id,
        trace.id = (!context.trace_id.is_empty()).then_some(&*context.trace_id),
        http.request.method = method,
        http.route = called,
        http.response.status_code = tracing::field::Empty,
        rpc.grpc.status_code = tracing::field::Empty,
    );
    let deadline = wire.deadline(request.headers()).map_or(deadline, |asked| asked.min(deadline));
    let id = HeaderValue::from_str(&context.request_id).expect("request ids are made of header characters");
    request.headers_mut().insert(REQUEST_ID, id.clone());
    if let Some(authorization) = request.headers_mut().get_mut(AUTHORIZATION) {
        authorization.set_sensitive(true);
    }
    request.extensions_mut().insert(context.clone());

    let handled = served.around(AssertUnwindSafe(route.oneshot(request)).catch_unwind());
    let mut response = match tokio::time::timeout(deadline, handled).instrument(span.clone()).await {
        Ok(Ok(Ok(response))) => response,
        // The text of the panic may hold what was being handled, so it goes nowhere.
        Ok(Err(_panic)) => {
            span.in_scope(|| tracing::error!("a handler panicked"));
            wire.refuse(Error::internal())
        }
        Err(_elapsed) => wire.refuse(grpc::deadline_exceeded()),
    };

    response = Refusal::write(response, &context.request_id);
    if let Some(details) = response.headers_mut().get_mut(STATUS_DETAILS)
        && let Some(named) = name_request(details.as_bytes(), &context.request_id)
    {
        *details = named;
    }
    response.headers_mut().insert(REQUEST_ID, id);
    span.record("http.response.status_code", response.status().as_u16());
    let code = response.headers().get("grpc-status").and_then(|code| code.to_str().ok());
    if let Some(code) = code {
        span.record("rpc.grpc.status_code", code);
    }
    served.answered(response.status(), code.and_then(|code| code.parse().ok()));
    Ok(response)
}

/// The methods of gRPC that are served, as `/service/method`.
static METHODS: LazyLock<HashSet<String>> = LazyLock::new(|| {
    let described = [
        scaivault_proto::DESCRIPTORS,
        tonic_health::pb::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
    ];
    let files = described.into_iter().flat_map(|set| {
        FileDescriptorSet::decode(set).expect("the descriptors were made with the code that serves them").file
    });
    files
        .flat_map(|file| {
            let package = file.package().to_owned();
            file.service.into_iter().flat_map(move |service| {
                let name = format!("/{package}.{}/", service.name());
                service.method.into_iter().map(move |method| format!("{name}{}", method.name()))
            })
        })
        .collect()
});

/// The route for the spans: a template or a method that we have, never what a caller made up.
fn route_of<'a>(request: &'a Request, wire: &Wire) -> &'a str {
    let route = match wire {
        Wire::Grpc { .. } => METHODS.get(request.uri().path()).map(String::as_str),
        Wire::Rest => request.extensions().get::<MatchedPath>().map(MatchedPath::as_str),
    };
    route.unwrap_or("unknown")
}

/// The method for the spans; one that nobody knows may be anything.
fn method_of(request: &Request) -> &'static str {
    match *request.method() {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        _ => "_OTHER",
    }
}

/// The protocol of a request.
enum Wire {
    Grpc { content_type: HeaderValue },
    Rest,
}

impl Wire {
    fn of(headers: &HeaderMap) -> Self {
        match headers.get(CONTENT_TYPE) {
            Some(value) if value.as_bytes().starts_with(GRPC.as_bytes()) => {
                Wire::Grpc { content_type: value.clone() }
            }
            _ => Wire::Rest,
        }
    }

    /// The span of a call of the API. Probes, scrapes and what nodes do of their own accord would drown those.
    fn span(&self, method: &'static str, route: &str, caller: Option<&Remote<'_>>) -> ServerSpan {
        let ours = route.starts_with("/scaivault.") && !route.starts_with("/scaivault.discovery.");
        match self {
            Wire::Rest if route.starts_with("/v1/") => ServerSpan::http(method, route, caller),
            Wire::Grpc { .. } if ours => ServerSpan::grpc(route, caller),
            _ => ServerSpan::NONE,
        }
    }

    /// The deadline that the caller asked for.
    fn deadline(&self, headers: &HeaderMap) -> Option<Duration> {
        match self {
            Wire::Grpc { .. } => grpc_timeout(headers.get("grpc-timeout")?.to_str().ok()?),
            Wire::Rest => None,
        }
    }

    fn refuse(&self, error: Error) -> Response {
        match self {
            Wire::Grpc { content_type } => {
                let mut response = grpc::status(error).into_http::<Body>();
                response.headers_mut().insert(CONTENT_TYPE, content_type.clone());
                response
            }
            Wire::Rest => Refusal::from(error).into_response(),
        }
    }
}

/// A refusal in the protocol of the request with these headers, for layers and routes of a plane's own.
pub fn refusal(headers: &HeaderMap, error: Error) -> Response {
    Wire::of(headers).refuse(error)
}

/// The answer to a request that no route takes.
pub(crate) async fn unknown_route(request: Request) -> Response {
    let wire = Wire::of(request.headers());
    wire.refuse(match wire {
        Wire::Grpc { .. } => {
            Error::new(scaivault_domain::Reason::Unsupported, "this server has no such method")
                .next("ask the server's reflection for its services")
        }
        Wire::Rest => Error::new(scaivault_domain::Reason::NotFound, "there is no such route")
            .next("GET /openapi.json lists the routes"),
    })
}

/// Parses `grpc-timeout`: at most eight digits and a unit.
fn grpc_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let value: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(value * 3600)),
        "M" => Some(Duration::from_secs(value * 60)),
        "S" => Some(Duration::from_secs(value)),
        "m" => Some(Duration::from_millis(value)),
        "u" => Some(Duration::from_micros(value)),
        "n" => Some(Duration::from_nanos(value)),
        _ => None,
    }
}

/// Adds `RequestInfo` to the details of a status, unless a server behind this one has done it.
fn name_request(details: &[u8], request_id: &str) -> Option<HeaderValue> {
    let bytes = STANDARD.decode(details).or_else(|_| STANDARD_NO_PAD.decode(details)).ok()?;
    let mut status = pb::Status::decode(bytes.as_slice()).ok()?;
    if status.details.iter().any(|detail| detail.type_url == RequestInfo::TYPE_URL) {
        return None;
    }
    status.details.push(prost_types::Any {
        type_url: RequestInfo::TYPE_URL.to_owned(),
        value: pb::RequestInfo { request_id: request_id.to_owned(), serving_data: String::new() }
            .encode_to_vec(),
    });
    HeaderValue::try_from(STANDARD_NO_PAD.encode(status.encode_to_vec())).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_timeout_of_grpc_is_digits_and_a_unit() {
        assert_eq!(grpc_timeout("5S"), Some(Duration::from_secs(5)));
        assert_eq!(grpc_timeout("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        assert_eq!(grpc_timeout("250m"), Some(Duration::from_millis(250)));
        for text in ["", "S", "5", "-5S", "+5S", "5x", "123456789S", "5ä"] {
            assert_eq!(grpc_timeout(text), None, "{text}");
        }
    }
}
