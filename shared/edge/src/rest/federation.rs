//! `/v1/federation`.

use std::sync::Arc;

use axum::extract::State;
use http::{HeaderValue, StatusCode};
use scaivault_domain::{Error, Reason};
use scaivault_proto::federation::v1 as proto;
use scaivault_proto::federation::v1::federation_service_server::FederationService;
use serde_json::value::{RawValue, to_raw_value};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Answer;
use super::answer::{Json, required};
use super::body::Body;
use super::call::{Call, Name};
use super::dto::Nothing;
use super::dto::backend::{
    self, Adopt, Backend, BackendDeleted, BackendList, BackendPatch, Configuration, Configured,
};
use super::dto::mapping::Members;
use super::dto::status::{BackendStatus, EventList, SyncStarted};
use super::merge::merged;
use super::precondition::{if_match, quoted};
use super::query::PAGE;

type Service = State<Arc<dyn FederationService>>;

const BACKENDS: &str = "/v1/federation/backends";

/// The routes of federation.
pub(crate) fn routes(service: Arc<dyn FederationService>) -> OpenApiRouter {
    unserved().with_state(service)
}

/// What the routes say of themselves, for a plane that hands them on.
pub(crate) fn api() -> utoipa::openapi::OpenApi {
    unserved().into_openapi()
}

fn unserved() -> OpenApiRouter<Arc<dyn FederationService>> {
    OpenApiRouter::new()
        .routes(routes!(list, create))
        .routes(routes!(read, change, delete))
        .routes(routes!(status))
        .routes(routes!(sync))
        .routes(routes!(events))
}

/// Lists the backends.
#[utoipa::path(
    get, path = "/v1/federation/backends", tag = "federation", operation_id = "list_backends",
    params(
        ("page_size" = Option<i32>, Query, minimum = 1, description = "At most this many, 100 unless given"),
        ("page_token" = Option<String>, Query, description = "`next_page_token` of the page before"),
    ),
    responses((status = 200, body = BackendList)),
)]
async fn list(State(service): Service, call: Call) -> Answer {
    let page = call.query(PAGE)?.page()?;
    let request = proto::ListBackendsRequest { page_size: page.size, page_token: page.token };
    let answer = service.list_backends(call.request(request)).await?.into_inner();
    let backends = answer.backends.into_iter().map(Backend::from_wire).collect::<Result<_, _>>()?;
    Json::new(StatusCode::OK, &BackendList { backends, next_page_token: answer.next_page_token }).done()
}

/// Configures a backend.
#[utoipa::path(
    post, path = "/v1/federation/backends", tag = "federation", operation_id = "create_backend",
    request_body = Configuration<'_>,
    responses((status = 201, body = Backend, headers(("Location" = String), ("ETag" = String)))),
)]
async fn create(State(service): Service, call: Call, body: Body) -> Answer {
    call.query(&[])?;
    let (backend, Adopt(adopt)) = backend::parse(body.bytes())?;
    let request = proto::CreateBackendRequest { backend: Some(backend), adopt };
    let (metadata, answer, _) = service.create_backend(call.request(request)).await?.into_parts();
    let backend = required(answer.backend)?;
    let id = backend.id.clone();
    shown(StatusCode::CREATED, backend)?.location(BACKENDS, &id).revision(&metadata).done()
}

/// Reads a configuration.
#[utoipa::path(
    get, path = "/v1/federation/backends/{id}", tag = "federation", operation_id = "read_backend",
    params(("id" = String, Path, description = "The backend's id")),
    responses((status = 200, body = Backend, headers(("ETag" = String)))),
)]
async fn read(State(service): Service, Name(id): Name, call: Call) -> Answer {
    call.query(&[])?;
    let answer = service.get_backend(call.request(proto::GetBackendRequest { id })).await?.into_inner();
    shown(StatusCode::OK, required(answer.backend)?)?.done()
}

/// Changes a configuration by a JSON merge patch.
#[utoipa::path(
    patch, path = "/v1/federation/backends/{id}", tag = "federation", operation_id = "change_backend",
    params(
        ("id" = String, Path, description = "The backend's id"),
        ("If-Match" = Option<String>, Header, description = "Only if this is the current ETag"),
    ),
    request_body(content = BackendPatch, content_type = "application/merge-patch+json"),
    responses((status = 200, body = Backend, headers(("ETag" = String)))),
)]
async fn change(State(service): Service, Name(id): Name, call: Call, body: Body) -> Answer {
    call.query(&[])?;
    let patch = to_raw_value(&body.parse::<Members>()?).expect("members are raw JSON under string keys");
    let expected = call.if_match.as_ref().map(if_match).transpose()?.flatten();
    match patched(&*service, call.clone(), &id, &patch, expected).await {
        // Somebody else changed it between our read and our write. Whoever named no ETag does not mind: once more.
        Err(refusal) if refusal.reason() == Reason::PreconditionFailed && expected.is_none() => {
            patched(&*service, call, &id, &patch, None).await
        }
        outcome => outcome,
    }
}

/// Reads the backend, merges `patch` into it, and writes it if it is still what was read.
async fn patched(
    service: &dyn FederationService,
    call: Call,
    id: &str,
    patch: &RawValue,
    expected: Option<&str>,
) -> Answer {
    let request = call.clone().request(proto::GetBackendRequest { id: id.to_owned() });
    let before = required(service.get_backend(request).await?.into_inner().backend)?;
    if expected.is_some_and(|expected| expected != before.etag) {
        return Err(Error::new(Reason::PreconditionFailed, "the backend has another ETag by now")
            .next("read the backend again and repeat the change")
            .into());
    }
    let etag = before.etag.clone();
    let before = to_raw_value(&Configured::from_wire(before)?).expect("DTOs have string keys");
    let (after, Adopt(adopt)) = backend::parse(merged(&before, patch).get().as_bytes())?;
    let backend = proto::Backend { id: id.to_owned(), etag, ..after };
    let request = proto::UpdateBackendRequest { backend: Some(backend), update_mask: None, adopt };
    let (metadata, answer, _) = service.update_backend(call.request(request)).await?.into_parts();
    shown(StatusCode::OK, required(answer.backend)?)?.revision(&metadata).done()
}

/// Deletes a configuration. The remote store is left as it is.
#[utoipa::path(
    delete, path = "/v1/federation/backends/{id}", tag = "federation", operation_id = "delete_backend",
    params(
        ("id" = String, Path, description = "The backend's id"),
        ("If-Match" = Option<String>, Header, description = "Only if this is the current ETag"),
    ),
    responses((status = 200, body = BackendDeleted)),
)]
async fn delete(State(service): Service, Name(id): Name, call: Call) -> Answer {
    call.query(&[])?;
    let etag = call.if_match.as_ref().map(if_match).transpose()?.flatten().unwrap_or_default().to_owned();
    let request = proto::DeleteBackendRequest { id, etag };
    let (metadata, answer, _) = service.delete_backend(call.request(request)).await?.into_parts();
    let deleted = BackendDeleted { pending_nodes: answer.pending_nodes };
    Json::new(StatusCode::OK, &deleted).revision(&metadata).done()
}

/// Connection and per-node state of a backend.
#[utoipa::path(
    get, path = "/v1/federation/backends/{id}/status", tag = "federation", operation_id = "read_backend_status",
    params(("id" = String, Path, description = "The backend's id")),
    responses((status = 200, body = BackendStatus)),
)]
async fn status(State(service): Service, Name(id): Name, call: Call) -> Answer {
    call.query(&[])?;
    let request = call.request(proto::GetBackendStatusRequest { id });
    let answer = service.get_backend_status(request).await?.into_inner();
    Json::new(StatusCode::OK, &BackendStatus::from_wire(answer)).done()
}

/// Triggers a sync. Backends in mode `proxy` answer `wrong_mode`.
#[utoipa::path(
    post, path = "/v1/federation/backends/{id}/sync", tag = "federation", operation_id = "sync_backend",
    params(("id" = String, Path, description = "The backend's id")),
    request_body = Option<Nothing>,
    responses((status = 202, body = SyncStarted)),
)]
async fn sync(State(service): Service, Name(id): Name, call: Call, body: Body) -> Answer {
    call.query(&[])?;
    let Nothing {} = body.parse_or_empty()?;
    let request = call.request(proto::SyncBackendRequest { id });
    let answer = service.sync_backend(request).await?.into_inner();
    Json::new(StatusCode::ACCEPTED, &SyncStarted { run_id: answer.run_id }).done()
}

/// Reads the outbox of events, oldest first.
#[utoipa::path(
    get, path = "/v1/federation/events", tag = "federation", operation_id = "list_events",
    params(
        ("page_size" = Option<i32>, Query, minimum = 1, description = "At most this many, 100 unless given"),
        ("page_token" = Option<String>, Query, description = "`next_page_token` of the page before"),
    ),
    responses((status = 200, body = EventList)),
)]
async fn events(State(service): Service, call: Call) -> Answer {
    let page = call.query(PAGE)?.page()?;
    let request = proto::ListEventsRequest { page_size: page.size, page_token: page.token };
    let answer = service.list_events(call.request(request)).await?.into_inner();
    Json::new(StatusCode::OK, &EventList::from_wire(answer)?).done()
}

fn shown(status: StatusCode, backend: proto::Backend) -> Result<Json, Error> {
    let etag: Option<HeaderValue> = quoted(&backend.etag).filter(|_| !backend.etag.is_empty());
    Ok(Json::new(status, &Backend::from_wire(backend)?).etag(etag))
}
