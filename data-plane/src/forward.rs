//! Forwarding to the control plane: whole requests of APIs that a node does not have, and single calls of the one it has.
//!
//! A change that is forwarded is answered once it is in force on this node, at most five seconds later: whoever changes
//! a configuration or revokes a token through a node finds it so when they read through the same node.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request as HttpRequest;
use axum::response::Response as HttpResponse;
use http::HeaderName;
use http::header::{CONNECTION, HOST, TRANSFER_ENCODING, UPGRADE};
use scaivault_domain::{Error, Reason};
use scaivault_edge::auth::TENANT;
use scaivault_edge::error::grpc::status;
use scaivault_edge::{RequestContext, refusal};
use scaivault_telemetry::trace;
use tokio::sync::Semaphore;
use tonic::metadata::MetadataMap;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tonic_types::StatusExt as _;
use tower::ServiceExt as _;

use crate::known::{Known, Link};

/// The control plane's word for the commit of a change.
pub(crate) const REVISION: &str = "x-scaivault-revision";
/// How long an answer waits for its change to be in force here.
pub(crate) const IN_FORCE: Duration = Duration::from_secs(5);
/// Says that an answer did not wait long enough.
pub(crate) const PENDING: &str = "x-scaivault-pending";
/// Headers of one connection, which the next one has its own of.
const HOP: [HeaderName; 6] = [
    CONNECTION,
    HOST,
    TRANSFER_ENCODING,
    UPGRADE,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
];

/// How long the control plane may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a caller may ask to wait for the end of a sync.
const LONGEST_SYNC: Duration = Duration::from_secs(60);

/// The way to the control plane: open while there is a stream. Without one, one call at a time tries; the others are
/// refused at once, instead of queueing up for a connection that is not there.
#[derive(Clone, Debug)]
pub struct Gate {
    known: Arc<Known>,
    trial: Arc<Semaphore>,
}

impl Gate {
    /// Open as `known` says.
    pub fn new(known: Arc<Known>) -> Self {
        Gate { known, trial: Arc::new(Semaphore::new(1)) }
    }

    /// Makes `call`.
    ///
    /// # Errors
    /// `control_plane_unavailable` if it was not made, or not answered.
    pub async fn pass<T>(&self, call: impl Future<Output = T>) -> Result<T, Error> {
        self.pass_within(PATIENCE, call).await
    }

    async fn pass_within<T>(&self, patience: Duration, call: impl Future<Output = T>) -> Result<T, Error> {
        let _trial = match self.known.link() {
            Link::Up | Link::Ready => None,
            Link::Starting | Link::Down => Some(self.trial.try_acquire().map_err(|_| no_control_plane())?),
        };
        tokio::time::timeout(patience, call).await.map_err(|_| {
            Error::new(
                Reason::ControlPlaneUnavailable,
                "the control plane did not answer in time; a change that was asked for may still happen",
            )
            .next("see whether the change happened before you try again")
            .retry_after(Duration::from_secs(1))
        })
    }
}

/// What forwarding needs.
#[derive(Clone, Debug)]
pub struct Forward {
    upstream: Channel,
    known: Arc<Known>,
    gate: Gate,
}

impl Forward {
    /// Forwards to `upstream` through `gate`, and waits for `known` to have caught up.
    pub fn new(upstream: Channel, known: Arc<Known>, gate: Gate) -> Self {
        Forward { upstream, known, gate }
    }

    /// Forwards a request as it is, whatever its protocol, and gives the control plane's answer as it is.
    pub async fn whole(self, request: HttpRequest) -> HttpResponse {
        let (mut parts, body) = request.into_parts();
        let original = parts.headers.clone();
        for name in HOP {
            parts.headers.remove(name);
        }
        trace::inject(&mut parts.headers);
        parts.extensions.clear();
        parts.version = http::Version::HTTP_2;
        let request = http::Request::from_parts(parts, tonic::body::Body::new(body));
        let patience = if may_wait(request.uri()) { PATIENCE + LONGEST_SYNC } else { PATIENCE };
        match self.gate.pass_within(patience, self.upstream.oneshot(request)).await {
            Ok(Ok(response)) => {
                let revision =
                    response.headers().get(REVISION).and_then(|value| value.to_str().ok()?.parse().ok());
                let mut response = response.map(Body::new);
                if let Some(revision) = revision
                    && !self.known.in_force(revision, IN_FORCE).await
                {
                    response.headers_mut().insert(PENDING, http::HeaderValue::from_static("true"));
                }
                response
            }
            Ok(Err(error)) => {
                tracing::debug!(%error, "a request could not be forwarded");
                refusal(&original, no_control_plane())
            }
            Err(error) => refusal(&original, error),
        }
    }
}

/// Whether the caller may have asked to wait for the end of a sync, or of the test of a backend.
fn may_wait(uri: &http::Uri) -> bool {
    let ends = ["/sync", "/test", "/SyncBackend", "/TestBackend", "/CreateBackend", "/UpdateBackend"];
    ends.iter().any(|end| uri.path().ends_with(end))
        || uri.query().is_some_and(|query| query.contains("validate_only"))
}

/// The same call for the control plane: only the headers that it needs, the id that the caller is told, and the trace
/// that we are in.
pub(crate) fn forwarded<T>(request: Request<T>) -> Request<T> {
    let context = RequestContext::of(&request);
    let (metadata, _, message) = request.into_parts();
    let mut kept = MetadataMap::new();
    for name in ["authorization", TENANT, "traceparent", "tracestate"] {
        if let Some(value) = metadata.get(name) {
            kept.insert(name, value.clone());
        }
    }
    if let Ok(id) = context.request_id.parse() {
        kept.insert("x-request-id", id);
    }
    trace::inject(kept.as_mut());
    Request::from_parts(kept, tonic::Extensions::default(), message)
}

/// A failure of a forwarded call: the control plane's own, or that there was none.
pub(crate) fn unreachable(failure: Status) -> Status {
    let ours = failure.get_details_error_info().is_some_and(|info| info.domain == "scaivault");
    if ours {
        // Details and metadata are the control plane's; the node only hands them on.
        return Status::with_details(failure.code(), failure.message(), failure.details().to_vec().into());
    }
    match failure.code() {
        Code::Unavailable | Code::Unknown | Code::Cancelled | Code::DeadlineExceeded => {
            status(no_control_plane())
        }
        _ => failure,
    }
}

fn no_control_plane() -> Error {
    Error::new(
        Reason::ControlPlaneUnavailable,
        "the node cannot reach its control plane, which this request needs",
    )
    .next("try again; proxied reads go on meanwhile")
    .retry_after(Duration::from_secs(1))
}
