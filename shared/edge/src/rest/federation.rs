//! `/v1/federation`.

use std::sync::Arc;
use std::time::Duration;

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
use super::call::{Call, Name, Names};
use super::dto::Nothing;
use super::dto::backend::{self, Backend, BackendDeleted, BackendList, BackendPatch, Configuration};
use super::dto::mapping::Members;
use super::dto::status::{BackendStatus, EventList};
use super::dto::sync::{StartSync, SyncReport, SyncRun, SyncRunList};
use super::dto::test::{BackendTest, ChangedBackend, ValidatedBackend};
use super::json::{Consent, patch_backend};
use super::precondition::{if_match, quoted};
use super::query::{Flag, PAGE};
use crate::wire;

type Service = State<Arc<dyn FederationService>>;

const BACKENDS: &str = "/v1/federation/backends";

/// The longest time that a caller may wait for the end of a sync.
pub(crate) const MAX_WAIT: Duration = Duration::from_secs(60);

/// The routes of federation, but for those that wait.
pub(crate) fn routes(service: Arc<dyn FederationService>) -> OpenApiRouter {
    unserved().with_state(service)
}

/// The routes that may wait for [`MAX_WAIT`] before they answer.
pub(crate) fn waiting_routes(service: Arc<dyn FederationService>) -> OpenApiRouter {
    waiting_unserved().with_state(service)
}

/// What the routes say of themselves, for a plane that hands them on.
pub(crate) fn api() -> utoipa::openapi::OpenApi {
    unserved().into_openapi()
}

/// The same of the routes that wait.
pub(crate) fn waiting_api() -> utoipa::openapi::OpenApi {
    waiting_unserved().into_openapi()
}

fn waiting_unserved() -> OpenApiRouter<Arc<dyn FederationService>> {
    OpenApiRouter::new().routes(routes!(sync))
}

fn unserved() -> OpenApiRouter<Arc<dyn FederationService>> {
    OpenApiRouter::new()
        .routes(routes!(list, create))
        .routes(routes!(read, change, delete))
        .routes(routes!(test))
        .routes(routes!(status))
        .routes(routes!(list_syncs))
        .routes(routes!(read_sync))
        .routes(routes!(cancel_sync))
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
    params(("validate_only" = Option<bool>, Query, description = "`true`: check everything and test the connection, \
        but store nothing")),
    request_body = Configuration<'_>,
    responses(
        (status = 201, body = Backend, headers(("Location" = String), ("ETag" = String))),
        (status = 200, body = ValidatedBackend, description = "With `validate_only=true`: nothing was stored"),
    ),
)]
async fn create(State(service): Service, call: Call, body: Body) -> Answer {
    let validate_only = call.query(&["validate_only"])?.flag("validate_only")? == Flag::On;
    let (backend, Consent { adopt, force }) = backend::parse(body.bytes())?;
    if force {
        return Err(Error::invalid("/force", "is for changes: a new backend has no copies").into());
    }
    let request = proto::CreateBackendRequest { backend: Some(backend), adopt, validate_only };
    let (metadata, answer, _) = service.create_backend(call.request(request)).await?.into_parts();
    let backend = required(answer.backend)?;
    if validate_only {
        return validated(backend, answer.test);
    }
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
///
/// Without `path_mapping` the rules stay as they are, with what they override.
#[utoipa::path(
    patch, path = "/v1/federation/backends/{id}", tag = "federation", operation_id = "change_backend",
    params(
        ("id" = String, Path, description = "The backend's id"),
        ("force" = Option<bool>, Query, description = "`true`: accept that copies which were changed here are \
            erased when their paths are proxied again"),
        ("validate_only" = Option<bool>, Query, description = "`true`: check everything and test the connection, but \
            store nothing"),
        ("If-Match" = Option<String>, Header, description = "Only if this is the current ETag"),
    ),
    request_body(content = BackendPatch, content_type = "application/merge-patch+json"),
    responses((status = 200, body = ChangedBackend, headers(("ETag" = String)))),
)]
async fn change(State(service): Service, Name(id): Name, call: Call, body: Body) -> Answer {
    let mut query = call.query(&["force", "validate_only"])?;
    let how = How { force: query.flag("force")?, validate_only: query.flag("validate_only")? };
    let patch = to_raw_value(&body.parse::<Members>()?).expect("members are raw JSON under string keys");
    let expected = call.if_match.as_ref().map(if_match).transpose()?.flatten();
    match patched(&*service, call.clone(), &id, &patch, expected, how).await {
        // Somebody else changed it between our read and our write. Whoever named no ETag does not mind: once more.
        Err(refusal) if refusal.reason() == Reason::PreconditionFailed && expected.is_none() => {
            patched(&*service, call, &id, &patch, None, how).await
        }
        outcome => outcome,
    }
}

/// How a change is made, as its query says.
#[derive(Clone, Copy)]
struct How {
    force: Flag,
    validate_only: Flag,
}

/// Reads the backend, merges `patch` into it, and writes it if it is still what was read.
async fn patched(
    service: &dyn FederationService,
    call: Call,
    id: &str,
    patch: &RawValue,
    expected: Option<&str>,
    how: How,
) -> Answer {
    let request = call.clone().request(proto::GetBackendRequest { id: id.to_owned() });
    let before = required(service.get_backend(request).await?.into_inner().backend)?;
    if expected.is_some_and(|expected| expected != before.etag) {
        return Err(Error::new(Reason::PreconditionFailed, "the backend has another ETag by now")
            .next("read the backend again and repeat the change")
            .into());
    }
    let etag = before.etag.clone();
    let (after, consent) = patch_backend(before, patch)?;
    let request = proto::UpdateBackendRequest {
        backend: Some(proto::Backend { id: id.to_owned(), etag, ..after }),
        update_mask: None,
        adopt: consent.adopt,
        force: consent.force || how.force == Flag::On,
        validate_only: how.validate_only == Flag::On,
    };
    let (metadata, answer, _) = service.update_backend(call.request(request)).await?.into_parts();
    let backend = required(answer.backend)?;
    if how.validate_only == Flag::On {
        return validated(backend, answer.test);
    }
    shown(StatusCode::OK, backend)?.revision(&metadata).done()
}

/// Tests a backend with a login of its own. Reads no value, stores nothing.
///
/// A check that failed is an answer with `"passed": false`, not an error.
#[utoipa::path(
    post, path = "/v1/federation/backends/{id}/test", tag = "federation", operation_id = "test_backend",
    params(("id" = String, Path, description = "The backend's id")),
    request_body = Option<Nothing>,
    responses((status = 200, body = BackendTest)),
)]
async fn test(State(service): Service, Name(id): Name, call: Call, body: Body) -> Answer {
    call.query(&[])?;
    let Nothing {} = body.parse_or_empty()?;
    let answer = service.test_backend(call.request(proto::TestBackendRequest { id })).await?.into_inner();
    Json::new(StatusCode::OK, &BackendTest::from(required(answer.test)?)).done()
}

/// Deletes a configuration. The remote store is left as it is.
#[utoipa::path(
    delete, path = "/v1/federation/backends/{id}", tag = "federation", operation_id = "delete_backend",
    params(
        ("id" = String, Path, description = "The backend's id"),
        ("data" = Option<String>, Query, pattern = "^(detach|purge)$", description = "What becomes of its copies: \
            `detach`, which is also what holds if it is left out, makes them ordinary local secrets; `purge` erases them"),
        ("If-Match" = Option<String>, Header, description = "Only if this is the current ETag"),
    ),
    responses((status = 200, body = BackendDeleted)),
)]
async fn delete(State(service): Service, Name(id): Name, call: Call) -> Answer {
    let copies = match call.query(&["data"])?.text("data").as_deref() {
        None | Some("detach") => proto::CopiesPolicy::Detach,
        Some("purge") => proto::CopiesPolicy::Purge,
        Some(_) => return Err(Error::invalid("/data", "is `detach` or `purge`").into()),
    };
    let etag = call.if_match.as_ref().map(if_match).transpose()?.flatten().unwrap_or_default().to_owned();
    let request = proto::DeleteBackendRequest { id, etag, copies: copies.into() };
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

/// Starts a sync, or gives the one that is under way.
///
/// Backends that sync nothing answer `wrong_mode`.
#[utoipa::path(
    post, path = "/v1/federation/backends/{id}/sync", tag = "federation", operation_id = "sync_backend",
    params(
        ("id" = String, Path, description = "The backend's id"),
        ("wait" = Option<String>, Query, pattern = "^([0-9]+(m|s|ms))+$",
            description = "How long to wait for the end of the run, at most `60s`; not at all if left out"),
    ),
    request_body = Option<StartSync>,
    responses(
        (status = 200, body = SyncRun, description = "The run has ended"),
        (status = 202, body = SyncRun, description = "The run is under way", headers(("Location" = String))),
    ),
)]
async fn sync(State(service): Service, Name(id): Name, call: Call, body: Body) -> Answer {
    let wait = call.query(&["wait"])?.duration("wait", MAX_WAIT)?;
    let allow_deletes = body.parse_or_empty::<StartSync>()?.allow_deletes()?;
    let runs = format!("{BACKENDS}/{id}/syncs");
    let request = proto::SyncBackendRequest { id, wait: wait.map(wire::duration), allow_deletes };
    let answer = service.sync_backend(call.request(request)).await?.into_inner();
    let run = SyncRun::from(required(answer.run)?);
    if run.ended() {
        return Json::new(StatusCode::OK, &run).done();
    }
    Json::new(StatusCode::ACCEPTED, &run).location(&runs, run.id()).done()
}

/// Lists the runs of a backend, newest first.
#[utoipa::path(
    get, path = "/v1/federation/backends/{id}/syncs", tag = "federation", operation_id = "list_syncs",
    params(
        ("id" = String, Path, description = "The backend's id"),
        ("page_size" = Option<i32>, Query, minimum = 1, description = "At most this many, 100 unless given"),
        ("page_token" = Option<String>, Query, description = "`next_page_token` of the page before"),
    ),
    responses((status = 200, body = SyncRunList)),
)]
async fn list_syncs(State(service): Service, Name(id): Name, call: Call) -> Answer {
    let page = call.query(PAGE)?.page()?;
    let request = proto::ListSyncsRequest { id, page_size: page.size, page_token: page.token };
    let answer = service.list_syncs(call.request(request)).await?.into_inner();
    Json::new(StatusCode::OK, &SyncRunList::from(answer)).done()
}

/// Reads the report of a run: what it did, what it left out and why.
#[utoipa::path(
    get, path = "/v1/federation/backends/{id}/syncs/{run}", tag = "federation", operation_id = "read_sync",
    params(
        ("id" = String, Path, description = "The backend's id"),
        ("run" = String, Path, description = "The run's id"),
        ("page_size" = Option<i32>, Query, minimum = 1,
            description = "At most this many of `skipped` and `failed`, 100 unless given"),
        ("page_token" = Option<String>, Query, description = "`next_page_token` of the page before"),
    ),
    responses((status = 200, body = SyncReport)),
)]
async fn read_sync(State(service): Service, Names(id, run_id): Names, call: Call) -> Answer {
    let page = call.query(PAGE)?.page()?;
    let request = proto::GetSyncRequest { id, run_id, page_size: page.size, page_token: page.token };
    let answer = service.get_sync(call.request(request)).await?.into_inner();
    Json::new(StatusCode::OK, &SyncReport::from_wire(answer)?).done()
}

/// Ends a running sync. What it committed stays.
#[utoipa::path(
    post, path = "/v1/federation/backends/{id}/syncs/{run}/cancel", tag = "federation", operation_id = "cancel_sync",
    params(
        ("id" = String, Path, description = "The backend's id"),
        ("run" = String, Path, description = "The run's id"),
    ),
    request_body = Option<Nothing>,
    responses((status = 200, body = SyncRun)),
)]
async fn cancel_sync(State(service): Service, Names(id, run_id): Names, call: Call, body: Body) -> Answer {
    call.query(&[])?;
    let Nothing {} = body.parse_or_empty()?;
    let request = proto::CancelSyncRequest { id, run_id };
    let answer = service.cancel_sync(call.request(request)).await?.into_inner();
    Json::new(StatusCode::OK, &SyncRun::from(required(answer.run)?)).done()
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

/// What would have been stored, and how it was tested.
fn validated(backend: proto::Backend, test: Option<proto::BackendTest>) -> Answer {
    Json::new(StatusCode::OK, &ValidatedBackend::from_wire(backend, required(test)?)?).done()
}

fn shown(status: StatusCode, backend: proto::Backend) -> Result<Json, Error> {
    let etag: Option<HeaderValue> = quoted(&backend.etag).filter(|_| !backend.etag.is_empty());
    Ok(Json::new(status, &Backend::from_wire(backend)?).etag(etag))
}
