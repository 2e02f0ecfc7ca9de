//! `/v1/tenants`, `/v1/policies`, `/v1/tokens`, `/v1/nodes`, `/v1/audit`.

use std::sync::Arc;

use axum::extract::State;
use http::StatusCode;
use scaivault_proto::admin::v1 as proto;
use scaivault_proto::admin::v1::admin_service_server::AdminService;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Answer;
use super::answer::{Json, required};
use super::body::Body;
use super::call::{Call, Name};
use super::dto::access::{
    AuditRows, CreatedNode, CreatedToken, NewNode, NewPolicy, NewTenant, NewToken, NodeList, Policy,
    PolicyList, PolicyRules, RenewToken, Revoked, Tenant, TenantList, TenantPatch, Token, TokenList,
};
use super::query::PAGE;

type Service = State<Arc<dyn AdminService>>;

/// The routes of administration.
pub(crate) fn routes(service: Arc<dyn AdminService>) -> OpenApiRouter {
    unserved().with_state(service)
}

/// What the routes say of themselves, for a plane that hands them on.
pub(crate) fn api() -> utoipa::openapi::OpenApi {
    unserved().into_openapi()
}

fn unserved() -> OpenApiRouter<Arc<dyn AdminService>> {
    OpenApiRouter::new()
        .routes(routes!(list_tenants, create_tenant))
        .routes(routes!(change_tenant, delete_tenant))
        .routes(routes!(list_policies, create_policy))
        .routes(routes!(read_policy, put_policy, delete_policy))
        .routes(routes!(list_tokens, create_token))
        .routes(routes!(read_own_token, revoke_own_token))
        .routes(routes!(renew_own_token))
        .routes(routes!(read_token, revoke_token))
        .routes(routes!(renew_token))
        .routes(routes!(list_nodes, create_node))
        .routes(routes!(delete_node))
        .routes(routes!(query_audit))
}

/// Lists the tenants.
#[utoipa::path(
    get, path = "/v1/tenants", tag = "tenants",
    params(
        ("page_size" = Option<i32>, Query, minimum = 1, description = "At most this many, 100 unless given"),
        ("page_token" = Option<String>, Query, description = "`next_page_token` of the page before"),
    ),
    responses((status = 200, body = TenantList)),
)]
async fn list_tenants(State(service): Service, call: Call) -> Answer {
    let page = call.query(PAGE)?.page()?;
    let request = proto::ListTenantsRequest { page_size: page.size, page_token: page.token };
    let answer = service.list_tenants(call.request(request)).await?.into_inner();
    let tenants = answer.tenants.into_iter().map(Tenant::from).collect();
    Json::new(StatusCode::OK, &TenantList { tenants, next_page_token: answer.next_page_token }).done()
}

/// Creates a tenant.
#[utoipa::path(
    post, path = "/v1/tenants", tag = "tenants",
    request_body = NewTenant,
    responses((status = 201, body = Tenant, headers(("Location" = String)))),
)]
async fn create_tenant(State(service): Service, call: Call, body: Body) -> Answer {
    call.query(&[])?;
    let tenant = body.parse::<NewTenant>()?.into();
    let request = proto::CreateTenantRequest { tenant: Some(tenant) };
    let (metadata, answer, _) = service.create_tenant(call.request(request)).await?.into_parts();
    let tenant = required(answer.tenant)?;
    let id = tenant.id.clone();
    Json::new(StatusCode::CREATED, &Tenant::from(tenant))
        .location("/v1/tenants", &id)
        .revision(&metadata)
        .done()
}

/// Changes a tenant by a JSON merge patch.
#[utoipa::path(
    patch, path = "/v1/tenants/{id}", tag = "tenants",
    params(("id" = String, Path, description = "The tenant's id")),
    request_body(content = TenantPatch, content_type = "application/merge-patch+json"),
    responses((status = 200, body = Tenant)),
)]
async fn change_tenant(State(service): Service, Name(id): Name, call: Call, body: Body) -> Answer {
    call.query(&[])?;
    let request = body.parse::<TenantPatch>()?.into_wire(id);
    let (metadata, answer, _) = service.update_tenant(call.request(request)).await?.into_parts();
    Json::new(StatusCode::OK, &Tenant::from(required(answer.tenant)?)).revision(&metadata).done()
}

/// Deletes an empty tenant.
#[utoipa::path(
    delete, path = "/v1/tenants/{id}", tag = "tenants",
    params(("id" = String, Path, description = "The tenant's id")),
    responses((status = 204, description = "Deleted")),
)]
async fn delete_tenant(State(service): Service, Name(id): Name, call: Call) -> Answer {
    call.query(&[])?;
    let request = call.request(proto::DeleteTenantRequest { id });
    let (metadata, _, _) = service.delete_tenant(request).await?.into_parts();
    Json::empty(StatusCode::NO_CONTENT).revision(&metadata).done()
}

/// Lists the policies.
#[utoipa::path(
    get, path = "/v1/policies", tag = "policies",
    params(
        ("page_size" = Option<i32>, Query, minimum = 1, description = "At most this many, 100 unless given"),
        ("page_token" = Option<String>, Query, description = "`next_page_token` of the page before"),
    ),
    responses((status = 200, body = PolicyList)),
)]
async fn list_policies(State(service): Service, call: Call) -> Answer {
    let page = call.query(PAGE)?.page()?;
    let request = proto::ListPoliciesRequest { page_size: page.size, page_token: page.token };
    let answer = service.list_policies(call.request(request)).await?.into_inner();
    let policies = answer.policies.into_iter().map(Policy::from).collect();
    Json::new(StatusCode::OK, &PolicyList { policies, next_page_token: answer.next_page_token }).done()
}

/// Creates or replaces a policy.
#[utoipa::path(
    post, path = "/v1/policies", tag = "policies",
    request_body = NewPolicy,
    responses((status = 201, body = Policy, headers(("Location" = String)))),
)]
async fn create_policy(State(service): Service, call: Call, body: Body) -> Answer {
    call.query(&[])?;
    write_policy(&*service, call, body.parse()?, StatusCode::CREATED).await
}

/// Reads a policy.
#[utoipa::path(
    get, path = "/v1/policies/{name}", tag = "policies",
    params(("name" = String, Path, description = "The policy's name")),
    responses((status = 200, body = Policy)),
)]
async fn read_policy(State(service): Service, Name(name): Name, call: Call) -> Answer {
    call.query(&[])?;
    let answer = service.get_policy(call.request(proto::GetPolicyRequest { name })).await?.into_inner();
    Json::new(StatusCode::OK, &Policy::from(required(answer.policy)?)).done()
}

/// Creates or replaces a policy.
#[utoipa::path(
    put, path = "/v1/policies/{name}", tag = "policies",
    params(("name" = String, Path, description = "The policy's name")),
    request_body = PolicyRules,
    responses((status = 200, body = Policy)),
)]
async fn put_policy(State(service): Service, Name(name): Name, call: Call, body: Body) -> Answer {
    call.query(&[])?;
    let policy = body.parse::<PolicyRules>()?.named(name);
    write_policy(&*service, call, policy, StatusCode::OK).await
}

async fn write_policy(
    service: &dyn AdminService,
    call: Call,
    policy: NewPolicy,
    status: StatusCode,
) -> Answer {
    let request = proto::PutPolicyRequest { policy: Some(policy.into()) };
    let (metadata, answer, _) = service.put_policy(call.request(request)).await?.into_parts();
    let policy = required(answer.policy)?;
    let name = policy.name.clone();
    let json = Json::new(status, &Policy::from(policy)).revision(&metadata);
    if status == StatusCode::CREATED { json.location("/v1/policies", &name).done() } else { json.done() }
}

/// Deletes a policy that no token uses.
#[utoipa::path(
    delete, path = "/v1/policies/{name}", tag = "policies",
    params(("name" = String, Path, description = "The policy's name")),
    responses((status = 204, description = "Deleted")),
)]
async fn delete_policy(State(service): Service, Name(name): Name, call: Call) -> Answer {
    call.query(&[])?;
    let request = call.request(proto::DeletePolicyRequest { name });
    let (metadata, _, _) = service.delete_policy(request).await?.into_parts();
    Json::empty(StatusCode::NO_CONTENT).revision(&metadata).done()
}

/// Lists the tokens.
#[utoipa::path(
    get, path = "/v1/tokens", tag = "tokens",
    params(
        ("page_size" = Option<i32>, Query, minimum = 1, description = "At most this many, 100 unless given"),
        ("page_token" = Option<String>, Query, description = "`next_page_token` of the page before"),
    ),
    responses((status = 200, body = TokenList)),
)]
async fn list_tokens(State(service): Service, call: Call) -> Answer {
    let page = call.query(PAGE)?.page()?;
    let request = proto::ListTokensRequest { page_size: page.size, page_token: page.token };
    let answer = service.list_tokens(call.request(request)).await?.into_inner();
    let tokens = answer.tokens.into_iter().map(Token::from).collect();
    Json::new(StatusCode::OK, &TokenList { tokens, next_page_token: answer.next_page_token }).done()
}

/// Creates a token with at most the caller's own scopes.
#[utoipa::path(
    post, path = "/v1/tokens", tag = "tokens",
    request_body = NewToken,
    responses((status = 201, body = CreatedToken, headers(("Location" = String)))),
)]
async fn create_token(State(service): Service, call: Call, body: Body) -> Answer {
    call.query(&[])?;
    let request = body.parse::<NewToken>()?.into_wire()?;
    let (metadata, answer, _) = service.create_token(call.request(request)).await?.into_parts();
    let info = required(answer.info)?;
    let accessor = info.accessor.clone();
    let created = CreatedToken { token: answer.token, info: info.into() };
    Json::new(StatusCode::CREATED, &created).location("/v1/tokens", &accessor).revision(&metadata).done()
}

/// Looks up the caller's own token.
#[utoipa::path(get, path = "/v1/tokens/self", tag = "tokens", responses((status = 200, body = Token)))]
async fn read_own_token(State(service): Service, call: Call) -> Answer {
    look_up(&*service, call, String::new()).await
}

/// Looks up a token.
#[utoipa::path(
    get, path = "/v1/tokens/{accessor}", tag = "tokens",
    params(("accessor" = String, Path, description = "The token's accessor")),
    responses((status = 200, body = Token)),
)]
async fn read_token(State(service): Service, Name(accessor): Name, call: Call) -> Answer {
    look_up(&*service, call, accessor).await
}

async fn look_up(service: &dyn AdminService, call: Call, accessor: String) -> Answer {
    call.query(&[])?;
    let answer =
        service.lookup_token(call.request(proto::LookupTokenRequest { accessor })).await?.into_inner();
    Json::new(StatusCode::OK, &Token::from(required(answer.token)?)).done()
}

/// Moves the expiry of the caller's own token.
#[utoipa::path(
    post, path = "/v1/tokens/self/renew", tag = "tokens",
    request_body = Option<RenewToken>,
    responses((status = 200, body = Token)),
)]
async fn renew_own_token(State(service): Service, call: Call, body: Body) -> Answer {
    renew(&*service, call, body, String::new()).await
}

/// Moves the expiry of a token.
#[utoipa::path(
    post, path = "/v1/tokens/{accessor}/renew", tag = "tokens",
    params(("accessor" = String, Path, description = "The token's accessor")),
    request_body = Option<RenewToken>,
    responses((status = 200, body = Token)),
)]
async fn renew_token(State(service): Service, Name(accessor): Name, call: Call, body: Body) -> Answer {
    renew(&*service, call, body, accessor).await
}

async fn renew(service: &dyn AdminService, call: Call, body: Body, accessor: String) -> Answer {
    call.query(&[])?;
    let request = body.parse_or_empty::<RenewToken>()?.into_wire(accessor)?;
    let (metadata, answer, _) = service.renew_token(call.request(request)).await?.into_parts();
    Json::new(StatusCode::OK, &Token::from(required(answer.token)?)).revision(&metadata).done()
}

/// Revokes the caller's own token and the tokens that were created with it.
#[utoipa::path(delete, path = "/v1/tokens/self", tag = "tokens", responses((status = 200, body = Revoked)))]
async fn revoke_own_token(State(service): Service, call: Call) -> Answer {
    revoke(&*service, call, String::new()).await
}

/// Revokes a token and the tokens that were created with it.
#[utoipa::path(
    delete, path = "/v1/tokens/{accessor}", tag = "tokens",
    params(("accessor" = String, Path, description = "The token's accessor")),
    responses((status = 200, body = Revoked)),
)]
async fn revoke_token(State(service): Service, Name(accessor): Name, call: Call) -> Answer {
    revoke(&*service, call, accessor).await
}

async fn revoke(service: &dyn AdminService, call: Call, accessor: String) -> Answer {
    call.query(&[])?;
    let request = call.request(proto::RevokeTokenRequest { accessor });
    let (metadata, answer, _) = service.revoke_token(request).await?.into_parts();
    Json::new(StatusCode::OK, &Revoked { revoked: answer.revoked }).revision(&metadata).done()
}

/// Lists the nodes.
#[utoipa::path(
    get, path = "/v1/nodes", tag = "nodes",
    params(
        ("page_size" = Option<i32>, Query, minimum = 1, description = "At most this many, 100 unless given"),
        ("page_token" = Option<String>, Query, description = "`next_page_token` of the page before"),
    ),
    responses((status = 200, body = NodeList)),
)]
async fn list_nodes(State(service): Service, call: Call) -> Answer {
    let page = call.query(PAGE)?.page()?;
    let request = proto::ListNodesRequest { page_size: page.size, page_token: page.token };
    let answer = service.list_nodes(call.request(request)).await?.into_inner();
    let nodes = answer.nodes.into_iter().map(Into::into).collect();
    Json::new(StatusCode::OK, &NodeList { nodes, next_page_token: answer.next_page_token }).done()
}

/// Invites a node.
#[utoipa::path(
    post, path = "/v1/nodes", tag = "nodes",
    request_body = NewNode,
    responses((status = 201, body = CreatedNode, headers(("Location" = String)))),
)]
async fn create_node(State(service): Service, call: Call, body: Body) -> Answer {
    call.query(&[])?;
    let NewNode { name, tenants } = body.parse()?;
    let request = proto::CreateNodeRequest { name, tenants };
    let (metadata, answer, _) = service.create_node(call.request(request)).await?.into_parts();
    let node = required(answer.node)?;
    let name = node.name.clone();
    let created = CreatedNode { join_token: answer.join_token, node: node.into() };
    Json::new(StatusCode::CREATED, &created).location("/v1/nodes", &name).revision(&metadata).done()
}

/// Removes a node: its certificate is refused from now on.
#[utoipa::path(
    delete, path = "/v1/nodes/{name}", tag = "nodes",
    params(("name" = String, Path, description = "The node's name")),
    responses((status = 204, description = "Deleted")),
)]
async fn delete_node(State(service): Service, Name(name): Name, call: Call) -> Answer {
    call.query(&[])?;
    let request = call.request(proto::DeleteNodeRequest { name });
    let (metadata, _, _) = service.delete_node(request).await?.into_parts();
    Json::empty(StatusCode::NO_CONTENT).revision(&metadata).done()
}

/// Reads audit rows of the caller's tenant.
#[utoipa::path(
    get, path = "/v1/audit", tag = "audit",
    params(
        ("start" = Option<String>, Query, description = "Rows from this RFC 3339 time on"),
        ("end" = Option<String>, Query, description = "Rows before this RFC 3339 time"),
        ("path" = Option<String>, Query, description = "Rows of this path, or below it if it ends in a slash"),
        ("principal" = Option<String>, Query, description = "Rows of this principal"),
        ("page_size" = Option<i32>, Query, minimum = 1, description = "At most this many, 100 unless given"),
        ("page_token" = Option<String>, Query, description = "`next_page_token` of the page before"),
    ),
    responses((status = 200, body = AuditRows)),
)]
async fn query_audit(State(service): Service, call: Call) -> Answer {
    let mut query = call.query(&["start", "end", "path", "principal", "page_size", "page_token"])?;
    let page = query.page()?;
    let request = proto::QueryAuditRequest {
        start_time: query.time("start")?,
        end_time: query.time("end")?,
        path: query.text("path").unwrap_or_default().into_owned(),
        principal: query.text("principal").unwrap_or_default().into_owned(),
        page_size: page.size,
        page_token: page.token,
    };
    let answer = service.query_audit(call.request(request)).await?.into_inner();
    let rows = answer.rows.into_iter().map(Into::into).collect();
    Json::new(StatusCode::OK, &AuditRows { rows, next_page_token: answer.next_page_token }).done()
}
