//! The front: every protocol, the probes and the documents of one port, in one router.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::response::Response;
use axum::routing::{any, get};
use http::header::CONTENT_TYPE;
use scaivault_proto::admin::v1::admin_service_server::{AdminService, AdminServiceServer};
use scaivault_proto::federation::v1::federation_service_server::{
    FederationService, FederationServiceServer,
};
use scaivault_proto::secrets::v1::secrets_service_server::{SecretsService, SecretsServiceServer};
use tonic::server::NamedService;
use tonic::service::RoutesBuilder;
use tonic_health::pb::health_server::HealthServer;
use tonic_web::GrpcWebLayer;
use utoipa_axum::router::OpenApiRouter;

use crate::health::{self, GrpcHealth, Probe, Readiness, uncached};
use crate::rest::{self, MAX_BODY};
use crate::{frame, openapi};

/// The method of gRPC that may wait.
const SYNC: &str = "/scaivault.federation.v1.FederationService/SyncBackend";
/// The deadline of a request unless another is set.
const DEADLINE: Duration = Duration::from_secs(30);

/// A router in the making. Each service that is added is served by gRPC and grpc-web, and by REST where there is REST
/// for it.
///
/// ```no_run
/// # use scaivault_edge::{Front, Readiness};
/// # fn with(secrets: std::sync::Arc<impl scaivault_proto::secrets::v1::secrets_service_server::SecretsService>) {
/// let router = Front::new(Readiness::ready).secrets(secrets).metrics(String::new).build();
/// # }
/// ```
pub struct Front {
    probe: Probe,
    grpc: RoutesBuilder,
    services: Vec<&'static str>,
    rest: OpenApiRouter,
    further: Router,
    /// What may wait before it answers, beyond the deadline: by REST, and by everything else.
    waiting: OpenApiRouter,
    further_waiting: Router,
    /// What is handed on, as it documents itself.
    handed_on: Vec<utoipa::openapi::OpenApi>,
    deadline: Duration,
}

impl std::fmt::Debug for Front {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Front").field("services", &self.services).finish_non_exhaustive()
    }
}

impl Front {
    /// A front that answers probes by asking `readiness`, and has the reflection of its services.
    pub fn new(readiness: impl Fn() -> Readiness + Send + Sync + 'static) -> Self {
        Front {
            probe: Arc::new(readiness),
            grpc: RoutesBuilder::default(),
            services: Vec::new(),
            rest: OpenApiRouter::default(),
            further: Router::new(),
            waiting: OpenApiRouter::default(),
            further_waiting: Router::new(),
            handed_on: Vec::new(),
            deadline: DEADLINE,
        }
    }

    /// Serves secrets.
    #[must_use]
    pub fn secrets<S: SecretsService>(mut self, service: Arc<S>) -> Self {
        self.rest = self.rest.merge(rest::secrets::routes(service.clone()));
        self.grpc(SecretsServiceServer::from_arc(service).max_decoding_message_size(MAX_BODY))
    }

    /// Serves federation.
    #[must_use]
    pub fn federation<S: FederationService>(mut self, service: Arc<S>) -> Self {
        self.rest = self.rest.merge(rest::federation::routes(service.clone()));
        self.waiting = self.waiting.merge(rest::federation::waiting_routes(service.clone()));
        let server = FederationServiceServer::from_arc(service).max_decoding_message_size(MAX_BODY);
        let sync = Router::new().route_service(SYNC, server.clone()).layer(GrpcWebLayer::new());
        self.further_waiting = self.further_waiting.merge(sync);
        self.grpc(server)
    }

    /// Serves administration.
    #[must_use]
    pub fn admin<S: AdminService>(mut self, service: Arc<S>) -> Self {
        self.rest = self.rest.merge(rest::admin::routes(service.clone()));
        self.grpc(AdminServiceServer::from_arc(service).max_decoding_message_size(MAX_BODY))
    }

    /// Hands the requests of federation and administration on as they are, whatever their protocol. Reflection, health
    /// and the OpenAPI document say the same as where they are served.
    #[must_use]
    pub fn forwarded<F, R>(mut self, hand_on: F) -> Self
    where
        F: Fn(Request) -> R + Clone + Send + Sync + 'static,
        R: Future<Output = Response> + Send + 'static,
    {
        use scaivault_proto::admin::v1::admin_service_server::SERVICE_NAME as ADMIN;
        use scaivault_proto::federation::v1::federation_service_server::SERVICE_NAME as FEDERATION;

        for service in [FEDERATION, ADMIN] {
            let hand_on = hand_on.clone();
            self.further = self.further.route(&format!("/{service}/{{method}}"), any(hand_on));
            self.services.push(service);
        }
        self.further_waiting = self.further_waiting.route(SYNC, any(hand_on.clone()));
        let waiting = rest::federation::waiting_api();
        for path in waiting.paths.paths.keys() {
            self.further_waiting = self.further_waiting.route(path, any(hand_on.clone()));
        }
        self.handed_on.push(waiting);
        for api in [rest::federation::api(), rest::admin::api()] {
            for path in api.paths.paths.keys() {
                let hand_on = hand_on.clone();
                self.further = self.further.route(path, any(hand_on));
            }
            self.handed_on.push(api);
        }
        self
    }

    /// Serves another gRPC service, e.g. discovery. The size of its messages is its own affair.
    #[must_use]
    pub fn grpc<S>(mut self, service: S) -> Self
    where
        S: tower::Service<
                http::Request<tonic::body::Body>,
                Response: axum::response::IntoResponse,
                Error = std::convert::Infallible,
                Future: Send,
            > + NamedService
            + Clone
            + Send
            + Sync
            + 'static,
    {
        self.grpc.add_service(service);
        self.services.push(S::NAME);
        self
    }

    /// Serves `/metrics` with this text, in Prometheus' format.
    #[must_use]
    pub fn metrics(mut self, text: impl Fn() -> String + Clone + Send + Sync + 'static) -> Self {
        const PROMETHEUS: &str = "text/plain; version=0.0.4; charset=utf-8";
        let metrics = move || {
            let text = text();
            async move { uncached(http::StatusCode::OK, PROMETHEUS, text) }
        };
        self.further = self.further.route("/metrics", get(metrics));
        self
    }

    /// Within this time a handler must have begun to answer; 30 s unless set. Callers of gRPC may ask for less. A sync
    /// has as much more as its caller may wait for it.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// The router of all of it.
    pub fn build(mut self) -> Router {
        let reflection = || {
            self.services
                .iter()
                .fold(tonic_reflection::server::Builder::configure(), |builder, name| {
                    builder.with_service_name(*name)
                })
                .with_service_name(HealthServer::<GrpcHealth>::NAME)
                .register_encoded_file_descriptor_set(scaivault_proto::DESCRIPTORS)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        const FITTING: &str = "the descriptors were made with the code that serves them";
        self.grpc.add_service(reflection().build_v1().expect(FITTING));
        // Older clients ask for no other.
        self.grpc.add_service(reflection().build_v1alpha().expect(FITTING));
        let probe = self.probe.clone();
        self.grpc.add_service(HealthServer::new(GrpcHealth { probe, services: self.services }));
        // tonic's fallback would answer every unknown REST path; grpc-web's layer would refuse every known one.
        let grpc = self.grpc.routes().into_axum_router().reset_fallback().layer(GrpcWebLayer::new());

        let (rest, mut api) = self.rest.split_for_parts();
        let (waiting, waiting_api) = self.waiting.split_for_parts();
        api.merge(waiting_api);
        for handed_on in self.handed_on {
            api.merge(handed_on);
        }
        let document = openapi::document(api).to_json().expect("an OpenAPI document is JSON");
        let document: bytes::Bytes = document.into();
        let openapi = move || {
            let document = document.clone();
            async move { ([(CONTENT_TYPE, "application/json")], document) }
        };
        let router = rest
            .merge(self.further)
            .merge(health::routes(self.probe))
            .route("/openapi.json", get(openapi))
            .method_not_allowed_fallback(rest::method_not_allowed)
            .merge(grpc)
            .fallback(frame::unknown_route);
        let waiting =
            waiting.merge(self.further_waiting).method_not_allowed_fallback(rest::method_not_allowed);
        frame::framed(router, self.deadline)
            .merge(frame::framed(waiting, self.deadline + rest::federation::MAX_WAIT))
    }
}
