//! `scaivault.discovery.v1`: what nodes call. Not part of the public API.

use std::pin::Pin;
use std::sync::Arc;

use scaivault_discovery::{NodeBoard, NodeIdentity, Source, Tenants, delta_stream};
use scaivault_domain::{Error, Reason};
use scaivault_edge::error::grpc::status;
use scaivault_proto::discovery::v1 as pb;
use scaivault_proto::discovery::v1::discovery_service_server::DiscoveryService;
use scaivault_proto::discovery::v1::enrolment_service_server::EnrolmentService;
use tokio_stream::{Stream, StreamExt as _};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming, async_trait};

use super::certified;
use crate::audit::Audit;
use crate::nodes::CertifiedNode;
use crate::service::nodes::Nodes;

/// The stream, the audit segments and the certificates of nodes that have joined.
#[derive(Clone)]
pub struct DiscoveryApi {
    source: Arc<dyn Source>,
    board: Arc<NodeBoard>,
    nodes: Arc<Nodes>,
    audit: Arc<Audit>,
    stop: CancellationToken,
}

impl std::fmt::Debug for DiscoveryApi {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DiscoveryApi").finish_non_exhaustive()
    }
}

impl DiscoveryApi {
    /// Publishes from `source` and keeps `board` up to date; streams end at `stop`.
    pub fn new(
        source: Arc<dyn Source>,
        board: Arc<NodeBoard>,
        nodes: Arc<Nodes>,
        audit: Arc<Audit>,
        stop: CancellationToken,
    ) -> Self {
        DiscoveryApi { source, board, nodes, audit, stop }
    }
}

#[async_trait]
impl DiscoveryService for DiscoveryApi {
    type DeltaStream = Pin<Box<dyn Stream<Item = Result<pb::DeltaResponse, Status>> + Send>>;

    async fn delta(
        &self,
        request: Request<Streaming<pb::DeltaRequest>>,
    ) -> Result<Response<Self::DeltaStream>, Status> {
        let node = joined(&request)?;
        // Removed, or invited anew: the stream of the old enrolment ends.
        let stop = self.stop.child_token();
        tokio::spawn({
            let (nodes, node, stop, mut wake) =
                (self.nodes.clone(), node.clone(), stop.clone(), self.source.wake());
            stop.clone().run_until_cancelled_owned(async move {
                while wake.changed().await.is_ok() {
                    if nodes.check(&node).await.is_err_and(|error| error.reason == Reason::Unauthenticated) {
                        stop.cancel();
                    }
                }
            })
        });
        let ended = stop.clone().drop_guard();
        let identity = NodeIdentity {
            name: node.name,
            tenants: if node.tenants.is_empty() {
                Tenants::All
            } else {
                Tenants::Only(node.tenants.into_iter().collect())
            },
        };
        let stream =
            delta_stream(self.source.clone(), self.board.clone(), identity, request.into_inner(), stop);
        // With the stream its watch ends.
        let watched = stream.map(move |response| {
            let _alive = &ended;
            response
        });
        Ok(Response::new(Box::pin(watched)))
    }

    async fn ship_segment(
        &self,
        request: Request<pb::ShipSegmentRequest>,
    ) -> Result<Response<pb::ShipSegmentResponse>, Status> {
        let node = joined(&request)?;
        self.audit.take_encoded(&node, request.into_inner().segment).await.map_err(status)?;
        Ok(Response::new(pb::ShipSegmentResponse {}))
    }

    async fn renew_certificate(
        &self,
        request: Request<pb::RenewCertificateRequest>,
    ) -> Result<Response<pb::RenewCertificateResponse>, Status> {
        let node = joined(&request)?;
        let certificates = self.nodes.renew(&node, &request.get_ref().csr).await.map_err(status)?;
        let certificates = certificates.iter().map(|certificate| certificate.to_vec()).collect();
        Ok(Response::new(pb::RenewCertificateResponse { certificates }))
    }
}

/// The node of the client certificate, which the listener has asked for.
fn joined<T>(request: &Request<T>) -> Result<CertifiedNode, Status> {
    let refuse = || Error::new(Reason::Unauthenticated, "this call needs a node's certificate");
    certified(request).and_then(|node| node.ok_or_else(refuse)).map_err(status)
}

/// How nodes join. The only calls without a client certificate.
#[derive(Clone, Debug)]
pub struct EnrolmentApi(Arc<Nodes>);

impl EnrolmentApi {
    /// Enrols into `nodes`.
    pub fn new(nodes: Arc<Nodes>) -> Self {
        EnrolmentApi(nodes)
    }
}

#[async_trait]
impl EnrolmentService for EnrolmentApi {
    async fn enrol(&self, request: Request<pb::EnrolRequest>) -> Result<Response<pb::EnrolResponse>, Status> {
        let message = request.into_inner();
        let (name, certificates) =
            self.0.enrol(&message.join_secret.into(), &message.csr).await.map_err(status)?;
        let certificates = certificates.iter().map(|certificate| certificate.to_vec()).collect();
        Ok(Response::new(pb::EnrolResponse { certificates, name: name.to_string() }))
    }
}
