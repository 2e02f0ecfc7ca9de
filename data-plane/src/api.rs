//! `scaivault.secrets.v1` on a node: reads what backends own, refuses from its view, forwards the rest.

use std::sync::Arc;

use scaivault_backends::RemoteSecret;
use scaivault_domain::access::{Caller, authorize_delete, authorize_read, authorize_write};
use scaivault_domain::audit::Action;
use scaivault_domain::path::SecretPath;
use scaivault_domain::view::Route;
use scaivault_domain::{Error, Reason};
use scaivault_edge::RequestContext;
use scaivault_edge::error::grpc::status;
use scaivault_edge::{auth, wire};
use scaivault_proto::secrets::v1::secrets_service_client::SecretsServiceClient;
use scaivault_proto::secrets::v1::secrets_service_server::SecretsService;
use scaivault_proto::secrets::v1::{self as pb, batch_get_result::Outcome};
use scaivault_telemetry::Metrics;
use tonic::transport::Channel;
use tonic::{Request, Response, Status, async_trait};

use crate::forward::{Gate, forwarded, unreachable};
use crate::known::{Known, View};
use crate::service::read::Reader;

/// The service on the wire.
#[derive(Clone, Debug)]
pub struct SecretsApi {
    known: Arc<Known>,
    reader: Arc<Reader>,
    upstream: SecretsServiceClient<Channel>,
    gate: Gate,
    metrics: Metrics,
}

impl SecretsApi {
    /// Serves what `known` and `reader` can; `upstream`, through `gate`, the rest.
    pub fn new(
        known: Arc<Known>,
        reader: Arc<Reader>,
        upstream: Channel,
        gate: Gate,
        metrics: Metrics,
    ) -> Self {
        let upstream = SecretsServiceClient::new(upstream);
        SecretsApi { known, reader, upstream, gate, metrics }
    }

    async fn forward<T>(&self, call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
        self.gate.pass(call).await.map_err(status)?.map_err(unreachable)
    }

    async fn enter<T>(
        &self,
        request: &Request<T>,
    ) -> Result<(Arc<Caller>, Arc<View>, RequestContext), Status> {
        let context = RequestContext::of(request);
        match auth::caller(&*self.known, request.metadata()).await {
            // Before anything is written down: rows of a tenant that the node does not serve are not its to write.
            Ok(caller) => self.known.view(&caller.tenant).map(|view| (caller, view, context)).map_err(status),
            Err(error) => {
                if error.reason == Reason::Unauthenticated {
                    self.metrics.unauthenticated();
                }
                Err(status(error))
            }
        }
    }

    /// Refuses a change of a path that a backend owns.
    async fn refuse_federated(
        &self,
        view: &View,
        caller: &Caller,
        context: &RequestContext,
        action: Action,
        path: &SecretPath,
    ) -> Result<(), Status> {
        let Route::Remote { backend, .. } = view.mounts.route(path) else { return Ok(()) };
        let row = self.reader.row(caller, context, action, path.as_str());
        let refusal = Err(Error::federated_read_only(&backend.name));
        self.reader.close(row, context, refusal).await.map_err(status)
    }
}

#[async_trait]
impl SecretsService for SecretsApi {
    async fn get(&self, request: Request<pb::GetRequest>) -> Result<Response<pb::GetResponse>, Status> {
        let (caller, view, context) = self.enter(&request).await?;
        let path = SecretPath::parse(&request.get_ref().path).map_err(status)?;
        let allowed = authorize_read(&caller, path);
        let row = self.reader.row(&caller, &context, Action::SecretRead, &request.get_ref().path);
        let allowed = self.reader.close_refusal(row, &context, allowed).await.map_err(status)?;
        match view.mounts.route(allowed.path()) {
            Route::Local => {
                let mut upstream = self.upstream.clone();
                self.forward(upstream.get(forwarded(request))).await
            }
            Route::Remote { backend, name } => {
                let message = request.into_inner();
                let version = Some(message.version).filter(|version| *version != 0);
                let found =
                    self.reader.read(&allowed, &context, &backend, &name, version).await.map_err(status)?;
                Ok(Response::new(pb::GetResponse { secret: Some(secret(message.path, &found)) }))
            }
        }
    }

    async fn batch_get(
        &self,
        request: Request<pb::BatchGetRequest>,
    ) -> Result<Response<pb::BatchGetResponse>, Status> {
        // One call of `get` each, so that every path is authorised and audited on its own.
        let (metadata, extensions, message) = request.into_parts();
        wire::check_batch(&message.paths).map_err(status)?;
        let reads = message.paths.into_iter().map(|path| {
            let ask = pb::GetRequest { path: path.clone(), version: 0 };
            let request = Request::from_parts(metadata.clone(), extensions.clone(), ask);
            async move {
                let outcome = match self.get(request).await {
                    Ok(answer) => answer.into_inner().secret.map(Outcome::Secret),
                    Err(refusal) if refusal.code() == tonic::Code::Unauthenticated => return Err(refusal),
                    Err(refusal) => Some(Outcome::Error(wire::refused(&refusal))),
                };
                Ok(pb::BatchGetResult { path, outcome })
            }
        });
        let results = futures::future::try_join_all(reads).await?;
        Ok(Response::new(pb::BatchGetResponse { results }))
    }

    async fn list(&self, request: Request<pb::ListRequest>) -> Result<Response<pb::ListResponse>, Status> {
        self.enter(&request).await?;
        let mut upstream = self.upstream.clone();
        self.forward(upstream.list(forwarded(request))).await
    }

    async fn put(&self, request: Request<pb::PutRequest>) -> Result<Response<pb::PutResponse>, Status> {
        let (caller, view, context) = self.enter(&request).await?;
        let path = SecretPath::parse(&request.get_ref().path).map_err(status)?;
        let row = self.reader.row(&caller, &context, Action::SecretWrite, path.as_str());
        let allowed = authorize_write(&caller, path);
        let allowed = self.reader.close_refusal(row, &context, allowed).await.map_err(status)?;
        self.refuse_federated(&view, &caller, &context, Action::SecretWrite, allowed.path()).await?;
        let mut upstream = self.upstream.clone();
        self.forward(upstream.put(forwarded(request))).await
    }

    async fn delete(
        &self,
        request: Request<pb::DeleteRequest>,
    ) -> Result<Response<pb::DeleteResponse>, Status> {
        let (caller, view, context) = self.enter(&request).await?;
        let path = SecretPath::parse(&request.get_ref().path).map_err(status)?;
        let row = self.reader.row(&caller, &context, Action::SecretDelete, path.as_str());
        let allowed = authorize_delete(&caller, path);
        let allowed = self.reader.close_refusal(row, &context, allowed).await.map_err(status)?;
        self.refuse_federated(&view, &caller, &context, Action::SecretDelete, allowed.path()).await?;
        let mut upstream = self.upstream.clone();
        self.forward(upstream.delete(forwarded(request))).await
    }

    async fn list_versions(
        &self,
        request: Request<pb::ListVersionsRequest>,
    ) -> Result<Response<pb::ListVersionsResponse>, Status> {
        self.enter(&request).await?;
        let mut upstream = self.upstream.clone();
        self.forward(upstream.list_versions(forwarded(request))).await
    }
}

fn secret(path: String, found: &RemoteSecret) -> pb::Secret {
    pb::Secret {
        path,
        version: 0,
        secret_type: wire::kind(found.kind).into(),
        value: found.value.expose().to_vec().into(),
        content_type: found.content_type.to_string(),
        metadata: found.metadata.clone().into_iter().collect(),
        state: pb::SecretState::Active.into(),
        source: pb::SecretSource::Proxy.into(),
        remote_version: found.remote_version.clone(),
        age: Some(prost_types::Duration::default()),
        create_time: found.created.map(wire::time),
    }
}
