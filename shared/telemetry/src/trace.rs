//! Traces: the spans that leave the process, and how a trace comes in and goes on.
//!
//! Only the spans that are made here are exported, with the fields that they have here. A span's name and fields hold
//! routes, methods, ids and outcomes: never a path, a query, a value or a token. The spans and the lines of the log
//! are another matter, and stay here. While nobody traces, no span is made and nothing is injected.

use futures::FutureExt as _;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use opentelemetry::Context;
use opentelemetry::trace::{SpanContext, SpanId, TraceContextExt as _, TraceFlags, TraceId, TraceState};
use scaivault_domain::backend::BackendId;
use tracing::field::Empty;
use tracing::{Instrument as _, Span, info_span};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

/// What tells the spans that are exported from all others.
pub(crate) const TARGET: &str = "scaivault::trace";

/// Everything that a span may tell a collector. What is not here does not leave the process.
pub(crate) const FIELDS: [&str; 11] = [
    "http.request.method",
    "http.route",
    "http.response.status_code",
    "rpc.system",
    "rpc.service",
    "rpc.method",
    "rpc.grpc.status_code",
    "backend.id",
    "backend.type",
    "backend.operation",
    "outcome",
];

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
/// A longer `tracestate` may be dropped, says W3C.
const LONGEST_STATE: usize = 512;

/// The span that a request came from, by its W3C headers.
#[derive(Clone, Copy, Debug)]
pub struct Remote<'a> {
    trace_id: &'a str,
    span_id: &'a str,
    flags: u8,
    headers: &'a HeaderMap,
}

impl<'a> Remote<'a> {
    /// What `traceparent` says; `None` if there is none, or it is malformed.
    pub fn from_headers(headers: &'a HeaderMap) -> Option<Self> {
        let mut values = headers.get_all(TRACEPARENT).iter();
        let (Some(value), None) = (values.next(), values.next()) else { return None };
        let (trace_id, span_id, flags) = parse(value.to_str().ok()?)?;
        Some(Remote { trace_id, span_id, flags, headers })
    }

    /// The id of the trace: 32 hexadecimal digits.
    pub fn trace_id(&self) -> &'a str {
        self.trace_id
    }

    fn context(&self) -> Context {
        let span = SpanContext::new(
            TraceId::from_hex(self.trace_id).unwrap_or(TraceId::INVALID),
            SpanId::from_hex(self.span_id).unwrap_or(SpanId::INVALID),
            TraceFlags::new(self.flags) & TraceFlags::SAMPLED,
            true,
            self.state().unwrap_or_default(),
        );
        Context::new().with_remote_span_context(span)
    }

    fn state(&self) -> Option<TraceState> {
        let lines: Result<Vec<_>, _> =
            self.headers.get_all(TRACESTATE).iter().map(HeaderValue::to_str).collect();
        lines.ok()?.join(",").parse().ok().filter(|_| self.state_length() <= LONGEST_STATE)
    }

    fn state_length(&self) -> usize {
        self.headers.get_all(TRACESTATE).iter().map(HeaderValue::len).sum()
    }
}

/// Trace, span and flags of a `traceparent`: `version-traceid-spanid-flags`. Later versions may be longer.
fn parse(text: &str) -> Option<(&str, &str, u8)> {
    let is_hex = |part: &str, len: usize| {
        part.len() == len && part.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    };
    let is_zero = |part: &str| part.bytes().all(|b| b == b'0');
    let mut parts = text.split('-');
    let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let well_formed = is_hex(version, 2)
        && version != "ff"
        && (version != "00" || parts.next().is_none())
        && is_hex(trace, 32)
        && !is_zero(trace)
        && is_hex(span, 16)
        && !is_zero(span)
        && is_hex(flags, 2);
    if !well_formed {
        return None;
    }
    Some((trace, span, u8::from_str_radix(flags, 16).ok()?))
}

/// Has the request with these headers continue the trace of the span that we are in. Without one, they stay as they
/// are.
pub fn inject(headers: &mut HeaderMap) {
    let context = Context::current();
    let span = context.span();
    let span = span.span_context();
    if !span.is_valid() {
        return;
    }
    let parent = format!("00-{}-{}-{:02x}", span.trace_id(), span.span_id(), span.trace_flags());
    headers.insert(TRACEPARENT, HeaderValue::try_from(parent).expect("hexadecimal digits and dashes"));
    match HeaderValue::try_from(span.trace_state().header()) {
        Ok(state) if !state.is_empty() => headers.insert(TRACESTATE, state),
        _ => headers.remove(TRACESTATE),
    };
}

/// The span of a request that this process answers; none while nobody traces.
#[derive(Clone, Debug)]
pub struct ServerSpan(Span);

impl ServerSpan {
    /// The span of what is not traced.
    pub const NONE: ServerSpan = ServerSpan(Span::none());

    /// The span of an HTTP request to `route`, which is a template such as `/v1/secrets/{*path}`.
    pub fn http(method: &'static str, route: &str, caller: Option<&Remote<'_>>) -> Self {
        let span = info_span!(
            target: TARGET,
            parent: None,
            "http",
            otel.name = %format_args!("{method} {route}"),
            otel.kind = "server",
            otel.status_code = Empty,
            http.request.method = method,
            http.route = route,
            http.response.status_code = Empty,
        );
        Self::within(span, caller)
    }

    /// The span of a gRPC call of a method that we have, written `/service/method`.
    pub fn grpc(path: &str, caller: Option<&Remote<'_>>) -> Self {
        let name = path.trim_start_matches('/');
        let (service, method) = name.split_once('/').unwrap_or_default();
        let span = info_span!(
            target: TARGET,
            parent: None,
            "grpc",
            otel.name = name,
            otel.kind = "server",
            otel.status_code = Empty,
            rpc.system = "grpc",
            rpc.service = service,
            rpc.method = method,
            rpc.grpc.status_code = Empty,
        );
        Self::within(span, caller)
    }

    fn within(span: Span, caller: Option<&Remote<'_>>) -> Self {
        if let Some(caller) = caller
            && !span.is_disabled()
        {
            // Fails only where no layer takes the span, and then there is nothing to be put anywhere.
            let _ = span.set_parent(caller.context());
        }
        ServerSpan(span)
    }

    /// The id of its trace; also of one that is not sampled, since the servers behind us go on with it.
    pub fn trace_id(&self) -> Option<String> {
        if self.0.is_disabled() {
            return None;
        }
        let context = self.0.context();
        let id = context.span().span_context().trace_id();
        (id != TraceId::INVALID).then(|| id.to_string())
    }

    /// Does `work` within the span.
    pub fn around<F: Future>(&self, work: F) -> impl Future<Output = F::Output> + use<F> {
        work.instrument(self.0.clone())
    }

    /// The request was answered; `grpc` is the status of a call.
    pub fn answered(&self, http: StatusCode, grpc: Option<i64>) {
        /// Those that are the server's fault: unknown, deadline exceeded, unimplemented, internal, unavailable, data
        /// loss.
        const FAULTS: [i64; 6] = [2, 4, 12, 13, 14, 15];
        self.0.record("http.response.status_code", i64::from(http.as_u16()));
        self.0.record("rpc.grpc.status_code", grpc.unwrap_or_default());
        if http.is_server_error() || grpc.is_some_and(|code| FAULTS.contains(&code)) {
            self.0.record("otel.status_code", "error");
        }
    }
}

/// Makes one call of a backend within a span of its own, if we are in a trace now. `operation` is e.g. `read`; `class`
/// names a failure.
pub fn backend_call<F, C, T, E>(
    backend: &BackendId,
    kind: &'static str,
    operation: &'static str,
    class: C,
    call: F,
) -> impl Future<Output = Result<T, E>> + use<F, C, T, E>
where
    F: Future<Output = Result<T, E>>,
    C: FnOnce(&E) -> &'static str,
{
    // The probes of a backend, which nobody asked for, would each be a trace.
    let span = if Context::map_current(Context::has_active_span) {
        info_span!(
            target: TARGET,
            "backend",
            otel.name = %format_args!("backend.{operation}"),
            otel.kind = "client",
            otel.status_code = Empty,
            backend.id = %backend,
            backend.type = kind,
            backend.operation = operation,
            outcome = Empty,
        )
    } else {
        Span::none()
    };
    ended(span, call, |outcome: &Result<T, E>| outcome.as_ref().map_or_else(class, |_| "ok"))
}

/// Makes a sync run within a trace of its own; `outcome` names how it ended, e.g. `complete`.
pub fn sync_run<F, C, T>(
    backend: &BackendId,
    kind: &'static str,
    outcome: C,
    run: F,
) -> impl Future<Output = T> + use<F, C, T>
where
    F: Future<Output = T>,
    C: FnOnce(&T) -> &'static str,
{
    let span = info_span!(
        target: TARGET,
        parent: None,
        "sync",
        otel.status_code = Empty,
        backend.id = %backend,
        backend.type = kind,
        outcome = Empty,
    );
    ended(span, run, outcome)
}

/// Not an `async fn`: that would hold `work` twice, and calls of backends are large.
fn ended<F, C, T>(span: Span, work: F, name: C) -> impl Future<Output = T>
where
    F: Future<Output = T>,
    C: FnOnce(&T) -> &'static str,
{
    let ending = Ending { span: span.clone(), outcome: "abandoned" };
    work.instrument(span).map(move |outcome| {
        ending.named(name(&outcome));
        outcome
    })
}

/// Tells how the work of a span ended; of work that is dropped, e.g. at a deadline, that it was given up.
struct Ending {
    span: Span,
    outcome: &'static str,
}

impl Ending {
    fn named(mut self, outcome: &'static str) {
        self.outcome = outcome;
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.span.record("outcome", self.outcome);
        if !matches!(self.outcome, "ok" | "complete" | "partial" | "cancelled" | "not_found") {
            self.span.record("otel.status_code", "error");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

    fn headers(lines: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(*name, value.parse().expect("a value"));
        }
        headers
    }

    #[test]
    fn only_a_valid_traceparent_names_a_trace() {
        for text in [
            format!("00-{ID}-00f067aa0ba902b7-01"),
            format!("01-{ID}-00f067aa0ba902b7-01"),
            format!("cc-{ID}-00f067aa0ba902b7-01-what-comes-later"),
        ] {
            let headers = headers(&[("traceparent", &text)]);
            assert_eq!(Remote::from_headers(&headers).map(|remote| remote.trace_id()), Some(ID), "{text}");
        }
        for text in [
            "".to_owned(),
            ID.to_owned(),
            format!("ff-{ID}-00f067aa0ba902b7-01"),
            format!("00-{ID}-00f067aa0ba902b7-01-more"),
            format!("00-{}-00f067aa0ba902b7-01", ID.to_uppercase()),
            format!("00-{}-00f067aa0ba902b7-01", "0".repeat(32)),
            format!("00-{ID}-0000000000000000-01"),
            format!("00-{ID}-00f067aa0ba902b7"),
            format!("00-{ID}-00f067aa0ba902b7-+1"),
        ] {
            assert!(Remote::from_headers(&headers(&[("traceparent", &text)])).is_none(), "{text}");
        }
        let parent = format!("00-{ID}-00f067aa0ba902b7-01");
        let twice = headers(&[("traceparent", &parent), ("traceparent", &parent)]);
        assert!(Remote::from_headers(&twice).is_none());
    }

    #[test]
    fn a_trace_comes_in_and_goes_on_with_its_state() {
        let parent = format!("00-{ID}-00f067aa0ba902b7-03");
        let incoming = headers(&[("traceparent", &parent), ("tracestate", "a=1"), ("tracestate", "b=2")]);
        let context = Remote::from_headers(&incoming).expect("it is valid").context();
        let _within = context.attach();
        let mut outgoing = headers(&[("traceparent", "old"), ("tracestate", "old=1")]);
        inject(&mut outgoing);
        let sampled = format!("00-{ID}-00f067aa0ba902b7-01");
        assert_eq!(outgoing, headers(&[("traceparent", &sampled), ("tracestate", "a=1,b=2")]));
    }

    #[test]
    fn a_state_that_is_malformed_or_endless_does_not_go_on() {
        let parent = format!("00-{ID}-00f067aa0ba902b7-00");
        for state in ["none", "A B=1", &format!("a={}", "x".repeat(511))] {
            let incoming = headers(&[("traceparent", &parent), ("tracestate", state)]);
            let _within = Remote::from_headers(&incoming).expect("it is valid").context().attach();
            let mut outgoing = incoming.clone();
            inject(&mut outgoing);
            assert_eq!(outgoing, headers(&[("traceparent", &parent)]), "{state}");
        }
    }

    #[test]
    fn outside_a_trace_headers_stay_as_they_are() {
        let mut outgoing = headers(&[("traceparent", "as it came"), ("tracestate", "a=1")]);
        let before = outgoing.clone();
        inject(&mut outgoing);
        assert_eq!(outgoing, before);
    }
}
