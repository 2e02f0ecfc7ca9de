//! `scaivault.admin.v1`.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use prost_types::FieldMask;
use scaivault_discovery::NodeBoard;
use scaivault_domain::access::{Capability, Effect, Policy, PolicyRule, Scope};
use scaivault_domain::audit::Action;
use scaivault_domain::backend::OwnIdentity;
use scaivault_domain::pattern::Pattern;
use scaivault_domain::tenant::{NodeName, PolicyName, TenantId};
use scaivault_domain::{Error, Reason};
use scaivault_edge::RequestContext;
use scaivault_edge::error::grpc::status;
use scaivault_edge::wire;
use scaivault_proto::admin::v1 as pb;
use scaivault_proto::admin::v1::admin_service_server::AdminService;
use secrecy::ExposeSecret as _;
use tonic::{Request, Response, Status, async_trait};

use super::{Door, changed, uninterrupted};
use crate::audit::{Audit, Found, Query};
use crate::model::{NodeRecord, TenantRecord, TokenRecord};
use crate::service::PageRequest;
use crate::service::nodes::Nodes;
use crate::service::policies::Policies;
use crate::service::tenants::{TenantChange, Tenants};
use crate::service::tokens::{NewToken, TokenTarget, Tokens, Ttl};

/// The service on the wire.
#[derive(Clone, Debug)]
pub struct AdminApi(Arc<Parts>);

/// What the service is made of.
#[derive(Debug)]
pub struct Parts {
    /// Who is at the door.
    pub door: Door,
    /// Tenants.
    pub tenants: Arc<Tenants>,
    /// Policies.
    pub policies: Arc<Policies>,
    /// Tokens.
    pub tokens: Arc<Tokens>,
    /// Nodes.
    pub nodes: Arc<Nodes>,
    /// How far nodes are.
    pub board: Arc<NodeBoard>,
    /// The trail.
    pub audit: Arc<Audit>,
}

impl AdminApi {
    /// Serves what `parts` know.
    pub fn new(parts: Parts) -> Self {
        AdminApi(Arc::new(parts))
    }

    /// One's own token without an accessor; any of the tenant with scope `admin`.
    async fn token_target<T>(
        &self,
        request: &Request<T>,
        accessor: &str,
        action: Option<Action>,
    ) -> Result<(TokenTarget, RequestContext), Status> {
        if accessor.is_empty() {
            let (caller, context) = self.0.door.enter(request).await?;
            return Ok((TokenTarget::Own(caller), context));
        }
        let (allowed, context) = match action {
            Some(action) => self.0.door.administer(request, Scope::Admin, action, accessor).await?,
            None => (
                self.0.door.look(request, Scope::Admin, Action::AdminRead).await?,
                RequestContext::of(request),
            ),
        };
        Ok((TokenTarget::Other(allowed, accessor.to_owned()), context))
    }
}

#[async_trait]
impl AdminService for AdminApi {
    async fn create_tenant(
        &self,
        request: Request<pb::CreateTenantRequest>,
    ) -> Result<Response<pb::CreateTenantResponse>, Status> {
        let tenant = request.get_ref().tenant.clone().unwrap_or_default();
        let (allowed, context) =
            self.0.door.administer(&request, Scope::Operator, Action::TenantWrite, &tenant.id).await?;
        let parts = self.0.clone();
        uninterrupted(async move {
            let outcome = async {
                let id = TenantId::parse(&tenant.id).map_err(|error| at(error, "/id"))?;
                let identities = parse_identities(&tenant.identities)?;
                parts.tenants.create(&allowed, &context, id, tenant.display_name, identities).await
            };
            let outcome = outcome.await;
            let done = parts.door.close(&allowed, &context, Action::TenantWrite, &tenant.id, outcome).await?;
            Ok(changed(pb::CreateTenantResponse { tenant: Some(wire_tenant(done.value)) }, done.revision))
        })
        .await
    }

    async fn update_tenant(
        &self,
        request: Request<pb::UpdateTenantRequest>,
    ) -> Result<Response<pb::UpdateTenantResponse>, Status> {
        let message = request.get_ref().clone();
        let tenant = message.tenant.unwrap_or_default();
        let (allowed, context) =
            self.0.door.administer(&request, Scope::Operator, Action::TenantWrite, &tenant.id).await?;
        let parts = self.0.clone();
        uninterrupted(async move {
            let name = tenant.id.clone();
            let outcome = async {
                let id = TenantId::parse(&tenant.id).map_err(|error| at(error, "/id"))?;
                let change = parse_change(tenant, message.update_mask)?;
                parts.tenants.update(&allowed, &context, &id, change).await
            };
            let outcome = outcome.await;
            let done = parts.door.close(&allowed, &context, Action::TenantWrite, &name, outcome).await?;
            Ok(changed(pb::UpdateTenantResponse { tenant: Some(wire_tenant(done.value)) }, done.revision))
        })
        .await
    }

    async fn list_tenants(
        &self,
        request: Request<pb::ListTenantsRequest>,
    ) -> Result<Response<pb::ListTenantsResponse>, Status> {
        let allowed = self.0.door.look(&request, Scope::Operator, Action::AdminRead).await?;
        let message = request.into_inner();
        let page = PageRequest::parse(message.page_size, &message.page_token).map_err(status)?;
        let page = self.0.tenants.list(&allowed, &page).await.map_err(status)?;
        let tenants = page.items.into_iter().map(wire_tenant).collect();
        Ok(Response::new(pb::ListTenantsResponse { tenants, next_page_token: page.next }))
    }

    async fn delete_tenant(
        &self,
        request: Request<pb::DeleteTenantRequest>,
    ) -> Result<Response<pb::DeleteTenantResponse>, Status> {
        let id = request.get_ref().id.clone();
        let (allowed, context) =
            self.0.door.administer(&request, Scope::Operator, Action::TenantWrite, &id).await?;
        let parts = self.0.clone();
        uninterrupted(async move {
            let outcome = match TenantId::parse(&id).map_err(|error| at(error, "/id")) {
                Ok(tenant) => parts.tenants.delete(&allowed, &context, &tenant).await,
                Err(error) => Err(error),
            };
            let done = parts.door.close(&allowed, &context, Action::TenantWrite, &id, outcome).await?;
            Ok(changed(pb::DeleteTenantResponse {}, done.revision))
        })
        .await
    }

    async fn put_policy(
        &self,
        request: Request<pb::PutPolicyRequest>,
    ) -> Result<Response<pb::PutPolicyResponse>, Status> {
        let policy = request.get_ref().policy.clone().unwrap_or_default();
        let (allowed, context) =
            self.0.door.administer(&request, Scope::Admin, Action::PolicyWrite, &policy.name).await?;
        let parts = self.0.clone();
        uninterrupted(async move {
            let name = policy.name.clone();
            let outcome = match parse_policy(policy) {
                Ok(policy) => parts.policies.put(&allowed, &context, policy).await,
                Err(error) => Err(error),
            };
            let done = parts.door.close(&allowed, &context, Action::PolicyWrite, &name, outcome).await?;
            Ok(changed(pb::PutPolicyResponse { policy: Some(wire_policy(done.value)) }, done.revision))
        })
        .await
    }

    async fn get_policy(
        &self,
        request: Request<pb::GetPolicyRequest>,
    ) -> Result<Response<pb::GetPolicyResponse>, Status> {
        let allowed = self.0.door.look(&request, Scope::Admin, Action::AdminRead).await?;
        let name = PolicyName::parse(&request.get_ref().name).map_err(status)?;
        let policy = self.0.policies.get(&allowed, &name).await.map_err(status)?;
        Ok(Response::new(pb::GetPolicyResponse { policy: Some(wire_policy(policy)) }))
    }

    async fn list_policies(
        &self,
        request: Request<pb::ListPoliciesRequest>,
    ) -> Result<Response<pb::ListPoliciesResponse>, Status> {
        let allowed = self.0.door.look(&request, Scope::Admin, Action::AdminRead).await?;
        let message = request.into_inner();
        let page = PageRequest::parse(message.page_size, &message.page_token).map_err(status)?;
        let page = self.0.policies.list(&allowed, &page).await.map_err(status)?;
        let policies = page.items.into_iter().map(wire_policy).collect();
        Ok(Response::new(pb::ListPoliciesResponse { policies, next_page_token: page.next }))
    }

    async fn delete_policy(
        &self,
        request: Request<pb::DeletePolicyRequest>,
    ) -> Result<Response<pb::DeletePolicyResponse>, Status> {
        let name = request.get_ref().name.clone();
        let (allowed, context) =
            self.0.door.administer(&request, Scope::Admin, Action::PolicyWrite, &name).await?;
        let parts = self.0.clone();
        uninterrupted(async move {
            let outcome = match PolicyName::parse(&name) {
                Ok(policy) => parts.policies.delete(&allowed, &context, &policy).await,
                Err(error) => Err(error),
            };
            let done = parts.door.close(&allowed, &context, Action::PolicyWrite, &name, outcome).await?;
            Ok(changed(pb::DeletePolicyResponse {}, done.revision))
        })
        .await
    }

    async fn create_token(
        &self,
        request: Request<pb::CreateTokenRequest>,
    ) -> Result<Response<pb::CreateTokenResponse>, Status> {
        let subject = request.get_ref().subject.clone();
        let (allowed, context) =
            self.0.door.administer(&request, Scope::Admin, Action::TokenWrite, &subject).await?;
        let message = request.into_inner();
        let parts = self.0.clone();
        uninterrupted(async move {
            let outcome = match parse_token(message) {
                Ok(wanted) => parts.tokens.create(&allowed, &context, wanted).await,
                Err(error) => Err(error),
            };
            let done = parts.door.close(&allowed, &context, Action::TokenWrite, &subject, outcome).await?;
            let (token, record) = done.value;
            let token = token.expose_secret().to_owned();
            Ok(changed(pb::CreateTokenResponse { token, info: Some(wire_token(record)) }, done.revision))
        })
        .await
    }

    async fn lookup_token(
        &self,
        request: Request<pb::LookupTokenRequest>,
    ) -> Result<Response<pb::LookupTokenResponse>, Status> {
        let (target, _) = self.token_target(&request, &request.get_ref().accessor, None).await?;
        let record = self.0.tokens.lookup(&target).await.map_err(status)?;
        Ok(Response::new(pb::LookupTokenResponse { token: Some(wire_token(record)) }))
    }

    async fn list_tokens(
        &self,
        request: Request<pb::ListTokensRequest>,
    ) -> Result<Response<pb::ListTokensResponse>, Status> {
        let allowed = self.0.door.look(&request, Scope::Admin, Action::AdminRead).await?;
        let message = request.into_inner();
        let page = PageRequest::parse(message.page_size, &message.page_token).map_err(status)?;
        let page = self.0.tokens.list(&allowed, &page).await.map_err(status)?;
        let tokens = page.items.into_iter().map(wire_token).collect();
        Ok(Response::new(pb::ListTokensResponse { tokens, next_page_token: page.next }))
    }

    async fn renew_token(
        &self,
        request: Request<pb::RenewTokenRequest>,
    ) -> Result<Response<pb::RenewTokenResponse>, Status> {
        let accessor = request.get_ref().accessor.clone();
        let (target, context) = self.token_target(&request, &accessor, Some(Action::TokenWrite)).await?;
        let ttl = parse_ttl(request.into_inner().ttl).map_err(status)?;
        let parts = self.0.clone();
        uninterrupted(async move {
            let outcome = parts.tokens.renew(&target, &context, ttl).await;
            let done =
                parts.door.admit(target.caller(), &context, Action::TokenWrite, &accessor, outcome).await?;
            Ok(changed(pb::RenewTokenResponse { token: Some(wire_token(done.value)) }, done.revision))
        })
        .await
    }

    async fn revoke_token(
        &self,
        request: Request<pb::RevokeTokenRequest>,
    ) -> Result<Response<pb::RevokeTokenResponse>, Status> {
        let accessor = request.get_ref().accessor.clone();
        let (target, context) = self.token_target(&request, &accessor, Some(Action::TokenWrite)).await?;
        let parts = self.0.clone();
        uninterrupted(async move {
            let outcome = parts.tokens.revoke(&target, &context).await;
            let done =
                parts.door.admit(target.caller(), &context, Action::TokenWrite, &accessor, outcome).await?;
            Ok(changed(pb::RevokeTokenResponse { revoked: done.value }, done.revision))
        })
        .await
    }

    async fn create_node(
        &self,
        request: Request<pb::CreateNodeRequest>,
    ) -> Result<Response<pb::CreateNodeResponse>, Status> {
        let message = request.get_ref().clone();
        let (allowed, context) =
            self.0.door.administer(&request, Scope::Operator, Action::NodeWrite, &message.name).await?;
        let parts = self.0.clone();
        uninterrupted(async move {
            let outcome = match parse_node(&message) {
                Ok((name, tenants)) => parts.nodes.invite(&allowed, &context, name, tenants).await,
                Err(error) => Err(error),
            };
            let done =
                parts.door.close(&allowed, &context, Action::NodeWrite, &message.name, outcome).await?;
            let (token, node) = done.value;
            let join_token = token.expose_secret().to_owned();
            let node = Some(wire_node(node, &parts.board));
            Ok(changed(pb::CreateNodeResponse { join_token, node }, done.revision))
        })
        .await
    }

    async fn list_nodes(
        &self,
        request: Request<pb::ListNodesRequest>,
    ) -> Result<Response<pb::ListNodesResponse>, Status> {
        let allowed = self.0.door.look(&request, Scope::Operator, Action::AdminRead).await?;
        let message = request.into_inner();
        let page = PageRequest::parse(message.page_size, &message.page_token).map_err(status)?;
        let page = self.0.nodes.list(&allowed, &page).await.map_err(status)?;
        let nodes = page.items.into_iter().map(|node| wire_node(node, &self.0.board)).collect();
        Ok(Response::new(pb::ListNodesResponse { nodes, next_page_token: page.next }))
    }

    async fn delete_node(
        &self,
        request: Request<pb::DeleteNodeRequest>,
    ) -> Result<Response<pb::DeleteNodeResponse>, Status> {
        let name = request.get_ref().name.clone();
        let (allowed, context) =
            self.0.door.administer(&request, Scope::Operator, Action::NodeWrite, &name).await?;
        let parts = self.0.clone();
        uninterrupted(async move {
            let outcome = match NodeName::parse(&name) {
                Ok(node) => parts.nodes.remove(&allowed, &context, &node).await,
                Err(error) => Err(error),
            };
            let done = parts.door.close(&allowed, &context, Action::NodeWrite, &name, outcome).await?;
            Ok(changed(pb::DeleteNodeResponse {}, done.revision))
        })
        .await
    }

    async fn query_audit(
        &self,
        request: Request<pb::QueryAuditRequest>,
    ) -> Result<Response<pb::QueryAuditResponse>, Status> {
        let allowed = self.0.door.look(&request, Scope::AuditRead, Action::AuditRead).await?;
        let message = request.into_inner();
        let page = PageRequest::parse(message.page_size, &message.page_token).map_err(status)?;
        let moment = |pointer: &str, time: Option<prost_types::Timestamp>| {
            time.map(|time| wire::parse_time(pointer, &time)).transpose().map_err(status)
        };
        let query = Query {
            start: moment("/start_time", message.start_time)?,
            end: moment("/end_time", message.end_time)?,
            path: message.path,
            principal: message.principal,
        };
        let (rows, next_page_token) = self
            .0
            .audit
            .query(allowed.tenant(), &query, page.size, page.after.as_deref())
            .await
            .map_err(status)?;
        let rows = rows.into_iter().map(wire_row).collect();
        Ok(Response::new(pb::QueryAuditResponse { rows, next_page_token }))
    }
}

/// The same error, naming the field where the message has it.
fn at(error: Error, pointer: &str) -> Error {
    let detail = error.violations.into_iter().next().map(|violation| violation.detail).unwrap_or_default();
    Error::field(error.reason, pointer, detail)
}

fn parse_identities(names: &[String]) -> Result<Vec<OwnIdentity>, Error> {
    let identities: Option<BTreeSet<_>> = names.iter().map(|name| OwnIdentity::parse(name)).collect();
    let unknown = || Error::invalid("/identities", "are of `kubernetes`, `aws`, `azure` and `gcp`");
    Ok(identities.ok_or_else(unknown)?.into_iter().collect())
}

fn parse_change(wanted: pb::Tenant, mask: Option<FieldMask>) -> Result<TenantChange, Error> {
    let all = || ["display_name".to_owned(), "identities".to_owned()].to_vec();
    let fields = mask.map(|mask| mask.paths).filter(|paths| !paths.is_empty()).unwrap_or_else(all);
    let mut change = TenantChange::default();
    for field in fields {
        match field.as_str() {
            "display_name" => change.display_name = Some(wanted.display_name.clone()),
            "id" => {}
            "identities" => change.identities = Some(parse_identities(&wanted.identities)?),
            _ => {
                return Err(Error::invalid("/update_mask", "has fields other than display_name, identities"));
            }
        }
    }
    Ok(change)
}

fn wire_tenant(record: TenantRecord) -> pb::Tenant {
    pb::Tenant {
        id: record.id.to_string(),
        display_name: record.display_name,
        create_time: Some(wire::time(record.created)),
        identities: record.identities.iter().map(|identity| identity.as_str().to_owned()).collect(),
    }
}

fn parse_policy(policy: pb::Policy) -> Result<Policy, Error> {
    let name = PolicyName::parse(&policy.name)?;
    let rules = policy.rules.into_iter().enumerate().map(|(index, rule)| {
        let pointer = |field: &str| format!("/rules/{index}/{field}");
        let path = Pattern::parse(&rule.path)
            .map_err(|fault| Error::invalid(pointer("path"), format!("the pattern {fault}")))?;
        let capabilities = rule.capabilities.iter().map(|name| {
            Capability::parse(name).ok_or_else(|| {
                Error::invalid(pointer("capabilities"), "are `read`, `list`, `write` and `delete`")
            })
        });
        let effect = match pb::Effect::try_from(rule.effect) {
            Ok(pb::Effect::Unspecified | pb::Effect::Allow) => Effect::Allow,
            Ok(pb::Effect::Deny) => Effect::Deny,
            Err(_) => return Err(Error::invalid(pointer("effect"), "is `allow` or `deny`")),
        };
        let mut capabilities: Vec<_> = capabilities.collect::<Result<_, Error>>()?;
        capabilities.sort();
        capabilities.dedup();
        Ok(PolicyRule { path, capabilities, effect })
    });
    Ok(Policy { name, rules: rules.collect::<Result<_, _>>()? })
}

fn wire_policy(policy: Policy) -> pb::Policy {
    let rules = policy.rules.into_iter().map(|rule| pb::PolicyRule {
        path: rule.path.to_string(),
        capabilities: rule.capabilities.iter().map(|capability| capability.as_str().into()).collect(),
        effect: match rule.effect {
            Effect::Allow => pb::Effect::Allow,
            Effect::Deny => pb::Effect::Deny,
        }
        .into(),
    });
    pb::Policy { name: policy.name.to_string(), rules: rules.collect() }
}

fn parse_token(message: pb::CreateTokenRequest) -> Result<NewToken, Error> {
    Ok(NewToken {
        subject: message.subject,
        scopes: message.scopes.iter().map(|scope| Scope::parse(scope)).collect::<Result<_, _>>()?,
        policies: message.policies,
        ttl: parse_ttl(message.ttl)?,
    })
}

fn parse_ttl(ttl: Option<prost_types::Duration>) -> Result<Ttl, Error> {
    let Some(ttl) = ttl else { return Ok(Ttl::Default) };
    let ttl = wire::parse_duration(Reason::InvalidRequest, "/ttl", &ttl)?;
    if ttl > Duration::from_secs(10 * 365 * 24 * 3600) {
        return Err(Error::invalid("/ttl", "is at most ten years"));
    }
    Ok(if ttl.is_zero() { Ttl::Forever } else { Ttl::Of(ttl) })
}

fn wire_token(record: TokenRecord) -> pb::Token {
    pb::Token {
        accessor: record.accessor,
        subject: record.subject,
        scopes: record.scopes.iter().map(|scope| scope.as_str().into()).collect(),
        policies: record.policies,
        create_time: Some(wire::time(record.created)),
        expire_time: record.expires.map(wire::time),
        parent: record.parent.map(|parent| parent.accessor).unwrap_or_default(),
        tenant: record.tenant.to_string(),
    }
}

fn parse_node(message: &pb::CreateNodeRequest) -> Result<(NodeName, Vec<TenantId>), Error> {
    let name = NodeName::parse(&message.name)?;
    let tenants = match &message.tenants[..] {
        [] => return Err(Error::invalid("/tenants", "needs at least one tenant, or `*` for all of them")),
        [all] if all == "*" => Vec::new(),
        tenants => tenants
            .iter()
            .map(|tenant| TenantId::parse(tenant).map_err(|error| at(error, "/tenants")))
            .collect::<Result<_, _>>()?,
    };
    Ok((name, tenants))
}

fn wire_node(record: NodeRecord, board: &NodeBoard) -> pb::Node {
    let known = board.snapshot(&record.name);
    let tenants = if record.tenants.is_empty() {
        vec!["*".to_owned()]
    } else {
        record.tenants.iter().map(TenantId::to_string).collect()
    };
    pb::Node {
        name: record.name.to_string(),
        tenants,
        create_time: Some(wire::time(record.created)),
        certificate_expire_time: record.certificate_expires.map(wire::time),
        connected: known.as_ref().is_some_and(|node| node.connected),
        build: known.map(|node| node.build).unwrap_or_default(),
    }
}

fn wire_row(found: Found) -> pb::AuditRow {
    let row = found.row;
    pb::AuditRow {
        time: Some(wire::time(row.time)),
        principal: row.principal,
        accessor: row.accessor,
        action: row.action.as_str().into(),
        path: row.path,
        backend: row.backend.unwrap_or_default(),
        remote_name: row.remote_name.unwrap_or_default(),
        version: row.version.unwrap_or_default(),
        remote_version: row.remote_version.unwrap_or_default(),
        source: row.source.unwrap_or_default(),
        outcome: row.outcome,
        latency: Some(wire::duration(Duration::from_micros(row.latency_us))),
        request_id: row.request_id,
        trace_id: row.trace_id,
        node: found.node.to_string(),
    }
}
