//! `/v1/secrets`.

use std::sync::Arc;

use axum::extract::State;
use http::header::AGE;
use http::{HeaderName, HeaderValue, StatusCode};
use scaivault_domain::path::SecretPath;
use scaivault_domain::{Error, Reason};
use scaivault_proto::secrets::v1 as proto;
use scaivault_proto::secrets::v1::secrets_service_server::SecretsService;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Answer;
use super::answer::{Json, required};
use super::body::Body;
use super::call::Call;
use super::dto::secret::{
    Batch, BatchResults, PutSecret, Secret, SecretList, SecretRead, SecretVersions, Written, age, etag,
};
use super::precondition::{expected_version, is_known};
use super::query::{Flag, Page};
use crate::wire;

type Service = State<Arc<dyn SecretsService>>;

const PREFIX: &str = "/v1/secrets/";

/// `true` on an answer whose age is beyond the period of its backend's sync.
const STALE: HeaderName = HeaderName::from_static("x-scaivault-stale");

/// The routes of secrets.
pub(crate) fn routes(service: Arc<dyn SecretsService>) -> OpenApiRouter {
    OpenApiRouter::new()
        .routes(routes!(read, put, delete))
        .routes(routes!(list_top))
        .routes(routes!(batch))
        .with_state(service)
}

/// The path exactly as it stands in the URL: nothing is decoded, so there is one spelling only.
fn path(call: &Call) -> Result<String, Error> {
    let raw = call.path().strip_prefix(PREFIX).unwrap_or_default();
    SecretPath::parse(raw).map_err(|error| match raw.strip_suffix('/') {
        Some(_) => error.next("add `?list=true` to list a folder, or leave the last slash out"),
        None => error,
    })?;
    Ok(raw.to_owned())
}

/// Reads a secret, one field of it, its versions, or the children of a folder.
///
/// A folder is written with a slash at its end and `list=true`.
#[utoipa::path(
    get, path = "/v1/secrets/{*path}", tag = "secrets", operation_id = "read_secret",
    params(
        ("path" = String, Path, description = "The path; slashes stand as they are, nothing is percent-encoded"),
        ("version" = Option<u64>, Query, minimum = 1, description = "ScaiVault's version; the current one if left out"),
        ("min_version" = Option<u64>, Query, minimum = 1, description = "The answer is of this version or a later one"),
        ("field" = Option<String>, Query, description = "One field of a JSON value, e.g. `a.b`"),
        ("versions" = Option<bool>, Query, description = "`true`: the versions, without values"),
        ("list" = Option<bool>, Query, description = "`true`: the children of a folder"),
        ("page_size" = Option<i32>, Query, minimum = 1, description = "With `list`: at most this many, 100 unless given"),
        ("page_token" = Option<String>, Query, description = "With `list`: `next_page_token` of the page before"),
        ("If-None-Match" = Option<String>, Header, description = "ETags that the caller has"),
        ("Cache-Control" = Option<String>, Header, description = "`max-age=N` or `no-cache`: a copy that is older \
            is compared with its backend first; other directives say nothing here"),
    ),
    responses(
        (status = 200, body = SecretRead<'_>, headers(
            ("ETag" = String),
            ("Age" = u64, description = "Seconds since the value was verified against its backend"),
            ("X-ScaiVault-Stale" = Option<bool>, description = "`true` if the age is beyond the period of the sync"),
        )),
        (status = 304, description = "The caller has this version"),
    ),
)]
async fn read(State(service): Service, call: Call) -> Answer {
    let mut query =
        call.query(&["version", "min_version", "field", "versions", "list", "page_size", "page_token"])?;
    if query.flag("list")? == Flag::On {
        let page = query.page()?;
        query.end()?;
        return list(&*service, call, page).await;
    }
    if query.flag("versions")? == Flag::On {
        query.end()?;
        let request = proto::ListVersionsRequest { path: path(&call)? };
        let answer = service.list_versions(call.request(request)).await?.into_inner();
        return Json::new(StatusCode::OK, &SecretVersions::from_wire(answer)).done();
    }
    let version = query.number("version")?.unwrap_or_default();
    let min_version = query.number("min_version")?.unwrap_or_default();
    let field = query.text("field").map(|field| field.into_owned());
    query.end()?;
    let max_age = call.max_age.map(wire::duration);
    let request = proto::GetRequest { path: path(&call)?, version, max_age, min_version };
    get(&*service, call, request, field).await
}

async fn get(
    service: &dyn SecretsService,
    mut call: Call,
    request: proto::GetRequest,
    field: Option<String>,
) -> Answer {
    let if_none_match = call.if_none_match.take();
    let answer = service.get(call.request(request)).await?.into_inner();
    let found = required(answer.secret)?;
    let etag = etag(&found);
    if is_known(if_none_match.as_ref(), etag.as_ref()) {
        return aged(Json::empty(StatusCode::NOT_MODIFIED), &found).etag(etag).done();
    }
    let secret = Secret::from_wire(&found)?;
    let json = match &field {
        None => Json::with_capacity(StatusCode::OK, &secret, found.value.len() + found.path.len() + 320),
        Some(field) => Json::new(StatusCode::OK, &secret.field(field).ok_or_else(|| no_field(field))?),
    };
    aged(json, &found).etag(etag).done()
}

/// The answer with what tells its age.
fn aged(answer: Json, secret: &proto::Secret) -> Json {
    let stale = secret.stale.then(|| HeaderValue::from_static("true"));
    answer.header(AGE, Some(HeaderValue::from(age(secret)))).header(STALE, stale)
}

fn no_field(field: &str) -> Error {
    let shown: String = field.chars().take(60).collect();
    Error::field(Reason::NotFound, "/field", format!("the secret has no field `{shown}`"))
        .next("read the secret without `field` to see its fields")
}

/// Lists the top folder.
#[utoipa::path(
    get, path = "/v1/secrets/", tag = "secrets", operation_id = "list_top_secrets",
    params(
        ("list" = bool, Query, description = "`true`"),
        ("page_size" = Option<i32>, Query, minimum = 1, description = "At most this many, 100 unless given"),
        ("page_token" = Option<String>, Query, description = "`next_page_token` of the page before"),
    ),
    responses((status = 200, body = SecretList)),
)]
async fn list_top(State(service): Service, call: Call) -> Answer {
    let mut query = call.query(&["list", "page_size", "page_token"])?;
    if query.flag("list")? == Flag::Off {
        let error = Error::field(Reason::InvalidPath, "/path", "is empty");
        return Err(error.next("add `?list=true` to list the top folder").into());
    }
    let page = query.page()?;
    query.end()?;
    list(&*service, call, page).await
}

async fn list(service: &dyn SecretsService, call: Call, page: Page) -> Answer {
    let folder = call.path().strip_prefix(PREFIX).unwrap_or_default().to_owned();
    if !folder.is_empty() {
        SecretPath::parse(folder.strip_suffix('/').unwrap_or(&folder))?;
    }
    let request = proto::ListRequest { folder, page_size: page.size, page_token: page.token };
    let answer = service.list(call.request(request)).await?.into_inner();
    let list = SecretList { keys: answer.keys, next_page_token: answer.next_page_token };
    Json::new(StatusCode::OK, &list).done()
}

/// Writes a new version of a local secret.
#[utoipa::path(
    put, path = "/v1/secrets/{*path}", tag = "secrets", operation_id = "put_secret",
    params(
        ("path" = String, Path, description = "The path"),
        ("If-Match" = Option<String>, Header, description = "Only if this is the current version, e.g. `\"v3\"`"),
        ("If-None-Match" = Option<String>, Header, description = "`*`: only if there is no secret"),
    ),
    request_body = PutSecret<'_>,
    responses(
        (status = 200, body = Written<'_>, headers(("ETag" = String))),
        (status = 201, body = Written<'_>, description = "The first version", headers(("ETag" = String))),
    ),
)]
async fn put(State(service): Service, call: Call, body: Body) -> Answer {
    call.query(&[])?;
    let path = path(&call)?;
    let expected = expected_version(call.if_match.as_ref(), call.if_none_match.as_ref())?;
    let request = body.parse::<PutSecret<'_>>()?.into_wire(&body, path.clone(), expected)?;
    let (metadata, answer, _) = service.put(call.request(request)).await?.into_parts();
    let status = if answer.version == 1 { StatusCode::CREATED } else { StatusCode::OK };
    let etag = super::precondition::quoted(&format!("v{}", answer.version));
    Json::new(status, &Written::from_wire(&path, &answer)).etag(etag).revision(&metadata).done()
}

/// Deletes a local secret softly: its versions are kept.
#[utoipa::path(
    delete, path = "/v1/secrets/{*path}", tag = "secrets", operation_id = "delete_secret",
    params(
        ("path" = String, Path, description = "The path"),
        ("If-Match" = Option<String>, Header, description = "Only if this is the current version, e.g. `\"v3\"`"),
    ),
    responses((status = 204, description = "Deleted")),
)]
async fn delete(State(service): Service, call: Call) -> Answer {
    call.query(&[])?;
    let path = path(&call)?;
    let expected_version = expected_version(call.if_match.as_ref(), None)?;
    let request = proto::DeleteRequest { path, expected_version };
    let (metadata, _, _) = service.delete(call.request(request)).await?.into_parts();
    Json::empty(StatusCode::NO_CONTENT).revision(&metadata).done()
}

/// Reads many secrets; each path has its own outcome.
#[utoipa::path(
    post, path = "/v1/secrets", tag = "secrets", operation_id = "read_secrets",
    request_body = Batch,
    responses((status = 200, body = BatchResults<'_>)),
)]
async fn batch(State(service): Service, call: Call, body: Body) -> Answer {
    call.query(&[])?;
    let Batch { paths } = body.parse()?;
    let answer = service.batch_get(call.request(proto::BatchGetRequest { paths })).await?.into_inner();
    Json::new(StatusCode::OK, &BatchResults::from_wire(&answer)).done()
}
