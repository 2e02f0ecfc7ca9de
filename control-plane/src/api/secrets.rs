//! `scaivault.secrets.v1` in the control plane.

use std::sync::Arc;

use scaivault_domain::Reason;
use scaivault_domain::access::{authorize_delete, authorize_list, authorize_read, authorize_write};
use scaivault_domain::audit::Action;
use scaivault_domain::path::{Folder, SecretPath};
use scaivault_domain::replica::Stale;
use scaivault_domain::secret::{SecretValue, Version};
use scaivault_edge::error::grpc::status;
use scaivault_edge::wire;
use scaivault_proto::secrets::v1::secrets_service_server::SecretsService;
use scaivault_proto::secrets::v1::{self as pb, batch_get_result::Outcome};
use tonic::{Request, Response, Status, async_trait};

use super::{Door, changed, uninterrupted};
use crate::service::PageRequest;
use crate::service::secrets::{Expected, Found, NewVersion, Secrets, Wanted};

/// The service on the wire.
#[derive(Clone, Debug)]
pub struct SecretsApi {
    door: Door,
    secrets: Arc<Secrets>,
}

impl SecretsApi {
    /// Serves `secrets`.
    pub fn new(door: Door, secrets: Arc<Secrets>) -> Self {
        SecretsApi { door, secrets }
    }
}

#[async_trait]
impl SecretsService for SecretsApi {
    async fn get(&self, request: Request<pb::GetRequest>) -> Result<Response<pb::GetResponse>, Status> {
        let (caller, context) = self.door.enter(&request).await?;
        let message = request.into_inner();
        let path = SecretPath::parse(&message.path).map_err(status)?;
        let allowed = authorize_read(&caller, path);
        let allowed = self.door.admit(&caller, &context, Action::SecretRead, &message.path, allowed).await?;
        let max_age = message
            .max_age
            .map(|max_age| wire::parse_duration(Reason::InvalidRequest, "/max_age", &max_age))
            .transpose()
            .map_err(status)?;
        let wanted = Wanted {
            version: Some(message.version).filter(|version| *version != 0),
            at_least: message.min_version,
            max_age,
        };
        let found = self.secrets.get(&allowed, &context, wanted).await.map_err(status)?;
        Ok(Response::new(pb::GetResponse { secret: Some(secret(message.path, found)) }))
    }

    async fn batch_get(
        &self,
        request: Request<pb::BatchGetRequest>,
    ) -> Result<Response<pb::BatchGetResponse>, Status> {
        // One call of `get` each, so that every path is authorised and audited on its own.
        let (metadata, extensions, message) = request.into_parts();
        wire::check_batch(&message.paths).map_err(status)?;
        let mut results = Vec::with_capacity(message.paths.len());
        for path in message.paths {
            let ask = pb::GetRequest { path: path.clone(), ..Default::default() };
            let outcome = match self.get(Request::from_parts(metadata.clone(), extensions.clone(), ask)).await
            {
                Ok(answer) => answer.into_inner().secret.map(Outcome::Secret),
                Err(refusal) if refusal.code() == tonic::Code::Unauthenticated => return Err(refusal),
                Err(refusal) => Some(Outcome::Error(wire::refused(&refusal))),
            };
            results.push(pb::BatchGetResult { path, outcome });
        }
        Ok(Response::new(pb::BatchGetResponse { results }))
    }

    async fn list(&self, request: Request<pb::ListRequest>) -> Result<Response<pb::ListResponse>, Status> {
        let (caller, context) = self.door.enter(&request).await?;
        let message = request.into_inner();
        let folder = Folder::parse(&message.folder).map_err(status)?;
        let page = PageRequest::parse(message.page_size, &message.page_token).map_err(status)?;
        let allowed = authorize_list(&caller, folder);
        let allowed =
            self.door.admit(&caller, &context, Action::SecretList, &message.folder, allowed).await?;
        let page = self.secrets.list(&allowed, &context, &page).await.map_err(status)?;
        Ok(Response::new(pb::ListResponse { keys: page.items, next_page_token: page.next }))
    }

    async fn put(&self, request: Request<pb::PutRequest>) -> Result<Response<pb::PutResponse>, Status> {
        let (caller, context) = self.door.enter(&request).await?;
        let message = request.into_inner();
        let path = SecretPath::parse(&message.path).map_err(status)?;
        let allowed = authorize_write(&caller, path);
        let allowed = self.door.admit(&caller, &context, Action::SecretWrite, &message.path, allowed).await?;
        let new = NewVersion {
            kind: wire::parse_kind(message.secret_type).map_err(status)?,
            value: SecretValue::new(message.value.into()),
            content_type: message.content_type,
            metadata: message.metadata.into_iter().collect(),
        };
        let expected = expected(message.expected_version);
        let secrets = self.secrets.clone();
        uninterrupted(async move {
            let done = secrets.put(&allowed, &context, new, expected).await.map_err(status)?;
            let (version, created) = done.value;
            let answer = pb::PutResponse { version, create_time: Some(wire::time(created)) };
            Ok(changed(answer, done.revision))
        })
        .await
    }

    async fn delete(
        &self,
        request: Request<pb::DeleteRequest>,
    ) -> Result<Response<pb::DeleteResponse>, Status> {
        let (caller, context) = self.door.enter(&request).await?;
        let message = request.into_inner();
        let path = SecretPath::parse(&message.path).map_err(status)?;
        let allowed = authorize_delete(&caller, path);
        let allowed =
            self.door.admit(&caller, &context, Action::SecretDelete, &message.path, allowed).await?;
        let expected = message.expected_version.map_or(Expected::Any, Expected::Version);
        let secrets = self.secrets.clone();
        uninterrupted(async move {
            let done = secrets.delete(&allowed, &context, expected).await.map_err(status)?;
            Ok(changed(pb::DeleteResponse {}, done.revision))
        })
        .await
    }

    async fn list_versions(
        &self,
        request: Request<pb::ListVersionsRequest>,
    ) -> Result<Response<pb::ListVersionsResponse>, Status> {
        let (caller, context) = self.door.enter(&request).await?;
        let message = request.into_inner();
        let path = SecretPath::parse(&message.path).map_err(status)?;
        let allowed = authorize_read(&caller, path);
        let allowed =
            self.door.admit(&caller, &context, Action::SecretVersions, &message.path, allowed).await?;
        let lines = self.secrets.versions(&allowed, &context).await.map_err(status)?;
        let versions = lines
            .into_iter()
            .map(|line| pb::SecretVersion {
                version: line.version.unwrap_or_default(),
                remote_version: line.remote_version,
                state: wire::state(line.state).into(),
                create_time: line.created.map(wire::time),
            })
            .collect();
        Ok(Response::new(pb::ListVersionsResponse { versions }))
    }
}

fn secret(path: String, found: Found) -> pb::Secret {
    pb::Secret {
        path,
        version: found.version.unwrap_or_default(),
        secret_type: wire::kind(found.kind).into(),
        value: found.value.expose().to_vec().into(),
        content_type: found.content_type,
        metadata: found.metadata.into_iter().collect(),
        state: pb::SecretState::Active.into(),
        source: wire::source(found.source).into(),
        remote_version: found.remote_version,
        age: Some(wire::duration(found.age)),
        create_time: found.created.map(wire::time),
        stale: found.stale == Stale::Yes,
    }
}

fn expected(version: Option<Version>) -> Expected {
    match version {
        None => Expected::Any,
        Some(0) => Expected::Absent,
        Some(version) => Expected::Version(version),
    }
}
