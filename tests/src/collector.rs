//! A collector of traces: takes OTLP over gRPC on loopback, and keeps every span.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::trace::v1::Span;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

type Taken = Arc<Mutex<Vec<ExportTraceServiceRequest>>>;

/// A collector that runs until it is dropped.
#[derive(Debug)]
pub struct Collector {
    address: SocketAddr,
    taken: Taken,
    serving: JoinHandle<()>,
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Collector {
    /// Starts one.
    ///
    /// # Errors
    /// If it cannot listen.
    pub async fn start() -> Result<Collector> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let (address, taken) = (listener.local_addr()?, Taken::default());
        let service = TraceServiceServer::new(Intake(taken.clone()));
        let server = Server::builder().add_service(service);
        let serving = tokio::spawn(async move {
            let _ = server.serve_with_incoming(TcpIncoming::from(listener)).await;
        });
        Ok(Collector { address, taken, serving })
    }

    /// Where it takes spans.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Everything that was sent to it.
    pub fn taken(&self) -> Vec<ExportTraceServiceRequest> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The spans of a trace, those that began first in front.
    pub fn trace(&self, id: &str) -> Vec<Collected> {
        let mut spans: Vec<Collected> = Vec::new();
        for resource in self.taken().into_iter().flat_map(|request| request.resource_spans) {
            let service = resource.resource.map(|resource| text(&resource.attributes, "service.name"));
            let service = service.unwrap_or_default();
            let found = resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            let found = found.filter(|span| hex(&span.trace_id) == id);
            spans.extend(found.map(|span| Collected { service: service.clone(), span }));
        }
        spans.sort_by_key(|collected| collected.span.start_time_unix_nano);
        spans
    }
}

/// A span, and which service sent it.
#[derive(Clone, Debug)]
pub struct Collected {
    /// The `service.name`.
    pub service: String,
    /// The span.
    pub span: Span,
}

impl Collected {
    /// Its id, in hexadecimal digits.
    pub fn id(&self) -> String {
        hex(&self.span.span_id)
    }

    /// The id of the span that it is a part of, in hexadecimal digits; empty if there is none.
    pub fn parent(&self) -> String {
        hex(&self.span.parent_span_id)
    }

    /// An attribute as text; empty if it does not have it.
    pub fn attribute(&self, name: &str) -> String {
        text(&self.span.attributes, name)
    }
}

fn text(attributes: &[KeyValue], name: &str) -> String {
    let found = attributes.iter().find(|attribute| attribute.key == name);
    match found.and_then(|attribute| attribute.value.as_ref()) {
        Some(AnyValue { value: Some(Value::StringValue(text)) }) => text.clone(),
        Some(AnyValue { value: Some(Value::IntValue(number)) }) => number.to_string(),
        _ => String::new(),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

struct Intake(Taken);

#[tonic::async_trait]
impl TraceService for Intake {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(request.into_inner());
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}
