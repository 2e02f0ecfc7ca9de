//! Whether the process lives and is ready: `/livez`, `/readyz`, and `grpc.health.v1`.

use std::borrow::Cow;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures::{Stream, stream};
use http::StatusCode;
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use serde::Serialize;
use tonic::Status;
use tonic_health::ServingStatus;
use tonic_health::pb::health_server::Health;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

/// How often a watching caller's state is looked at.
const WATCHED_EVERY: Duration = Duration::from_secs(1);

/// Whether the process can serve. A backend that is down never makes it unready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Readiness {
    /// Whether requests should be sent here.
    pub ready: bool,
    /// Why not, or what is not as it should be, e.g. `stale`.
    pub reasons: Vec<Cow<'static, str>>,
}

impl Readiness {
    /// Ready, and nothing to say.
    pub fn ready() -> Self {
        Readiness { ready: true, reasons: Vec::new() }
    }
}

/// Asked for every probe.
pub(crate) type Probe = Arc<dyn Fn() -> Readiness + Send + Sync>;

/// `/livez` and `/readyz`.
pub(crate) fn routes(probe: Probe) -> Router {
    let readyz = move || {
        let readiness = probe();
        async move {
            let status = if readiness.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
            let body = serde_json::to_string(&readiness).expect("a flag and texts are JSON");
            uncached(status, "application/json", body)
        }
    };
    let livez = || async { uncached(StatusCode::OK, "text/plain; charset=utf-8", "ok\n".to_owned()) };
    Router::new().route("/livez", get(livez)).route("/readyz", get(readyz))
}

/// A small answer that is true only now.
pub(crate) fn uncached(status: StatusCode, content_type: &'static str, body: String) -> Response {
    (status, [(CONTENT_TYPE, content_type), (CACHE_CONTROL, "no-store")], body).into_response()
}

/// `grpc.health.v1` from the same probe, for the whole server and for each of its services.
pub(crate) struct GrpcHealth {
    pub(crate) probe: Probe,
    pub(crate) services: Vec<&'static str>,
}

impl GrpcHealth {
    fn known(&self, service: &str) -> Result<(), Status> {
        if service.is_empty() || self.services.contains(&service) {
            return Ok(());
        }
        Err(Status::not_found("this server has no such service"))
    }
}

fn serving(probe: &Probe) -> HealthCheckResponse {
    let status = if probe().ready { ServingStatus::Serving } else { ServingStatus::NotServing };
    HealthCheckResponse { status: status as i32 }
}

#[tonic::async_trait]
impl Health for GrpcHealth {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn check(
        &self,
        request: tonic::Request<HealthCheckRequest>,
    ) -> Result<tonic::Response<HealthCheckResponse>, Status> {
        self.known(&request.get_ref().service)?;
        Ok(tonic::Response::new(serving(&self.probe)))
    }

    async fn watch(
        &self,
        request: tonic::Request<HealthCheckRequest>,
    ) -> Result<tonic::Response<Self::WatchStream>, Status> {
        self.known(&request.get_ref().service)?;
        let changes = stream::unfold((self.probe.clone(), None), async |(probe, told)| {
            loop {
                let now = serving(&probe);
                if told != Some(now.status) {
                    let told = Some(now.status);
                    return Some((Ok(now), (probe, told)));
                }
                tokio::time::sleep(WATCHED_EVERY).await;
            }
        });
        Ok(tonic::Response::new(Box::pin(changes)))
    }
}
