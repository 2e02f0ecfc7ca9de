//! `scaivault.secrets.v1` on a node: reads copies and what backends own, refuses from its view, forwards the rest.

use std::sync::Arc;

use scaivault_backends::RemoteSecret;
use scaivault_domain::access::{Caller, authorize_delete, authorize_read, authorize_write};
use scaivault_domain::audit::Action;
use scaivault_domain::path::SecretPath;
use scaivault_domain::replica::{SecretKey, Stale};
use scaivault_domain::secret::Source;
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

use crate::forward::{Gate, IN_FORCE, PENDING, REVISION, forwarded, unreachable};
use crate::known::{Known, View};
use crate::service::read::{Copied, Held, Reader, Wanted};

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

    /// Gives the answer to a change of a secret once the change has come here, if the secret is followed here: whoever
    /// writes and then reads through the same node reads what they wrote.
    async fn settled<T>(
        &self,
        caller: &Caller,
        path: &SecretPath,
        mut answer: Response<T>,
    ) -> Result<Response<T>, Status> {
        let revision = answer.metadata_mut().remove(REVISION);
        let revision = revision.and_then(|value| value.to_str().ok()?.parse().ok());
        if let Some(revision) = revision
            && self.known.copies().is_followed(&SecretKey::new(&caller.tenant, path))
            && !self.known.in_force(revision, IN_FORCE).await
        {
            answer.metadata_mut().insert(PENDING, tonic::metadata::MetadataValue::from_static("true"));
        }
        Ok(answer)
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
        let route = view.mounts.route(path);
        let Some(backend) = route.backend() else { return Ok(()) };
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
        let path = &request.get_ref().path;
        let allowed =
            self.reader.admit(&caller, &context, Action::SecretRead, path, allowed).await.map_err(status)?;
        let message = request.get_ref();
        let route = view.mounts.route(allowed.path());
        if message.version != 0 && !matches!(route, Route::Proxied { .. }) {
            // Older versions are the store's.
            let mut upstream = self.upstream.clone();
            return self.forward(upstream.get(forwarded(request))).await;
        }
        if let Route::Unrepresentable { backend } = &route {
            let mut row = self.reader.row(&caller, &context, Action::SecretRead, path);
            row.backend = Some(backend.id.to_string());
            let refusal = Err(Error::unrepresentable(&backend.name));
            return self.reader.close(row, &context, refusal).await.map_err(status);
        }
        let max_age = message
            .max_age
            .as_ref()
            .map(|max_age| wire::parse_duration(Reason::InvalidRequest, "/max_age", max_age));
        let wanted = Wanted { at_least: message.min_version, max_age: max_age.transpose().map_err(status)? };
        let copied = match &route {
            Route::Proxied { .. } => Copied::Proxied,
            Route::Synced { backend, .. } if !backend.enabled => Copied::Proxied,
            Route::Local | Route::Synced { .. } | Route::Unrepresentable { .. } => {
                self.reader.copy(&allowed, &context, &view, &route, &wanted).await.map_err(status)?
            }
        };
        match (copied, route) {
            (Copied::Here { held, source }, _) => Ok(Response::new(pb::GetResponse {
                secret: Some(copy(request.into_inner().path, held, source)),
            })),
            (Copied::Proxied, Route::Proxied { backend, name } | Route::Synced { backend, name, .. }) => {
                let message = request.into_inner();
                let unsupported = match (message.version, message.min_version) {
                    (0, 0) => None,
                    (0, _) => Some("/min_version"),
                    _ => Some("/version"),
                };
                let found = self
                    .reader
                    .read(&allowed, &context, &backend, &name, unsupported)
                    .await
                    .map_err(status)?;
                Ok(Response::new(pb::GetResponse { secret: Some(secret(message.path, &found)) }))
            }
            // The control plane always has the configuration in force.
            (Copied::Behind | Copied::Moved, _)
            | (Copied::Proxied, Route::Local | Route::Unrepresentable { .. }) => {
                let mut upstream = self.upstream.clone();
                self.forward(upstream.get(forwarded(request))).await
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
            let ask = pb::GetRequest { path: path.clone(), ..Default::default() };
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
        let allowed = authorize_write(&caller, path);
        let path = &request.get_ref().path;
        let allowed =
            self.reader.admit(&caller, &context, Action::SecretWrite, path, allowed).await.map_err(status)?;
        self.refuse_federated(&view, &caller, &context, Action::SecretWrite, allowed.path()).await?;
        let mut upstream = self.upstream.clone();
        let written = self.forward(upstream.put(forwarded(request))).await?;
        self.settled(allowed.caller(), allowed.path(), written).await
    }

    async fn delete(
        &self,
        request: Request<pb::DeleteRequest>,
    ) -> Result<Response<pb::DeleteResponse>, Status> {
        let (caller, view, context) = self.enter(&request).await?;
        let path = SecretPath::parse(&request.get_ref().path).map_err(status)?;
        let allowed = authorize_delete(&caller, path);
        let path = &request.get_ref().path;
        let allowed = self
            .reader
            .admit(&caller, &context, Action::SecretDelete, path, allowed)
            .await
            .map_err(status)?;
        self.refuse_federated(&view, &caller, &context, Action::SecretDelete, allowed.path()).await?;
        let mut upstream = self.upstream.clone();
        let deleted = self.forward(upstream.delete(forwarded(request))).await?;
        self.settled(allowed.caller(), allowed.path(), deleted).await
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
        metadata: found.metadata.clone().unwrap_or_default().into_iter().collect(),
        state: pb::SecretState::Active.into(),
        source: pb::SecretSource::Proxy.into(),
        remote_version: found.remote_version.clone(),
        age: Some(prost_types::Duration::default()),
        create_time: found.created.map(wire::time),
        stale: false,
    }
}

fn copy(path: String, held: Held, source: Source) -> pb::Secret {
    let replica = held.replica;
    pb::Secret {
        path,
        version: replica.version,
        secret_type: wire::kind(replica.kind).into(),
        value: held.value.expose().to_vec().into(),
        content_type: replica.content_type,
        metadata: replica.metadata.into_iter().collect(),
        state: pb::SecretState::Active.into(),
        source: wire::source(source).into(),
        remote_version: replica.remote_version,
        age: Some(wire::duration(held.age)),
        create_time: replica.created.map(wire::time),
        stale: held.stale == Stale::Yes,
    }
}
