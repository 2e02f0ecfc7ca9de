//! Tenants, policies, tokens, nodes and audit rows in JSON.

use prost_types::FieldMask;
use scaivault_domain::Error;
use scaivault_domain::backend::OwnIdentity;
use scaivault_domain::time::parse_duration;
use scaivault_proto::admin::v1 as proto;
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;

use super::{duration, rfc3339, to_wire};
use crate::rest::body::Object;

/// A tenant to create.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::rest) struct NewTenant {
    /// 1 to 63 of `a-z 0-9 -`.
    id: String,
    /// For people.
    #[serde(default)]
    display_name: String,
    /// The identities of ScaiVault's own that its backends may log in with; none if left out.
    #[serde(default)]
    identities: Vec<Identity>,
}

impl From<NewTenant> for proto::Tenant {
    fn from(new: NewTenant) -> Self {
        proto::Tenant {
            id: new.id,
            display_name: new.display_name,
            create_time: None,
            identities: names(new.identities),
        }
    }
}

/// An identity that ScaiVault itself has where it runs.
#[derive(Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum Identity {
    /// The Kubernetes service account of the control plane.
    Kubernetes,
    /// What the AWS environment gives the control plane.
    Aws,
    /// The managed identity of the control plane's machine.
    Azure,
    /// The service account, or the workload identity, of the control plane.
    Gcp,
}

fn names(identities: Vec<Identity>) -> Vec<String> {
    let name = |identity| match identity {
        Identity::Kubernetes => OwnIdentity::Kubernetes,
        Identity::Aws => OwnIdentity::Aws,
        Identity::Azure => OwnIdentity::Azure,
        Identity::Gcp => OwnIdentity::Gcp,
    };
    identities.into_iter().map(|identity| name(identity).as_str().to_owned()).collect()
}

/// A change of a tenant; what is left out stays as it is, and `null` empties.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::rest) struct TenantPatch {
    /// For people.
    #[serde(default, deserialize_with = "named")]
    display_name: Option<String>,
    /// All identities of ScaiVault's own that its backends may log in with from now on.
    #[serde(default, deserialize_with = "named")]
    identities: Option<Vec<Identity>>,
}

/// A member that is there; `null` is the empty one.
fn named<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(member: D) -> Result<Option<T>, D::Error> {
    Option::<T>::deserialize(member).map(|value| Some(value.unwrap_or_default()))
}

impl TenantPatch {
    pub(in crate::rest) fn into_wire(self, id: String) -> proto::UpdateTenantRequest {
        let named =
            [("display_name", self.display_name.is_some()), ("identities", self.identities.is_some())];
        let paths: Vec<_> =
            named.into_iter().filter(|(_, is_named)| *is_named).map(|(name, _)| name).collect();
        // No path at all would be every path.
        let paths = if paths.is_empty() { vec!["id"] } else { paths };
        proto::UpdateTenantRequest {
            tenant: Some(proto::Tenant {
                id,
                display_name: self.display_name.unwrap_or_default(),
                create_time: None,
                identities: names(self.identities.unwrap_or_default()),
            }),
            update_mask: Some(FieldMask { paths: paths.into_iter().map(str::to_owned).collect() }),
        }
    }
}

/// A tenant.
#[derive(Serialize, ToSchema)]
pub(in crate::rest) struct Tenant {
    id: String,
    /// For people.
    display_name: String,
    /// The identities of ScaiVault's own that its backends may log in with.
    identities: Vec<String>,
    #[schema(required)]
    created_at: Option<String>,
}

impl From<proto::Tenant> for Tenant {
    fn from(tenant: proto::Tenant) -> Self {
        let created_at = rfc3339(tenant.create_time.as_ref());
        Tenant { id: tenant.id, display_name: tenant.display_name, identities: tenant.identities, created_at }
    }
}

/// Tenants in the order of their ids.
#[derive(Serialize, ToSchema)]
pub(in crate::rest) struct TenantList {
    pub(in crate::rest) tenants: Vec<Tenant>,
    /// Empty on the last page.
    pub(in crate::rest) next_page_token: String,
}

/// Whether a rule gives or takes.
#[derive(Clone, Copy, Default, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum Effect {
    /// The rule gives the capabilities.
    #[default]
    Allow,
    /// The rule takes them; it wins over every allow.
    Deny,
}

/// What may be done with a path.
#[derive(Clone, Copy, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum Capability {
    Read,
    List,
    Write,
    Delete,
}

/// One line of a policy.
#[derive(Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct PolicyRule {
    /// A path pattern, e.g. `apps/**`.
    path: String,
    /// What the rule gives or takes.
    #[schema(value_type = Vec<Capability>)]
    capabilities: Vec<String>,
    /// Which of the two; `allow` if left out.
    #[serde(default)]
    #[schema(required = false)]
    effect: Effect,
}

/// The rules of a policy.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::rest) struct PolicyRules {
    /// At most 256.
    #[schema(value_type = Vec<PolicyRule>)]
    rules: Vec<Object<PolicyRule>>,
}

/// A policy to write.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::rest) struct NewPolicy {
    /// 1 to 63 of `a-z 0-9 -`.
    name: String,
    /// At most 256.
    #[schema(value_type = Vec<PolicyRule>)]
    rules: Vec<Object<PolicyRule>>,
}

impl PolicyRules {
    /// The policy of this name.
    pub(in crate::rest) fn named(self, name: String) -> NewPolicy {
        NewPolicy { name, rules: self.rules }
    }
}

impl From<NewPolicy> for proto::Policy {
    fn from(policy: NewPolicy) -> Self {
        let rules = policy.rules.into_iter().map(|Object(rule)| proto::PolicyRule {
            path: rule.path,
            capabilities: rule.capabilities,
            effect: match rule.effect {
                Effect::Allow => proto::Effect::Allow.into(),
                Effect::Deny => proto::Effect::Deny.into(),
            },
        });
        proto::Policy { name: policy.name, rules: rules.collect() }
    }
}

/// A policy: deny by default, deny wins.
#[derive(Serialize, ToSchema)]
pub(in crate::rest) struct Policy {
    name: String,
    rules: Vec<PolicyRule>,
}

impl From<proto::Policy> for Policy {
    fn from(policy: proto::Policy) -> Self {
        let rules = policy.rules.into_iter().map(|rule| PolicyRule {
            effect: match rule.effect() {
                proto::Effect::Allow | proto::Effect::Unspecified => Effect::Allow,
                proto::Effect::Deny => Effect::Deny,
            },
            path: rule.path,
            capabilities: rule.capabilities,
        });
        Policy { name: policy.name, rules: rules.collect() }
    }
}

/// Policies in the order of their names.
#[derive(Serialize, ToSchema)]
pub(in crate::rest) struct PolicyList {
    pub(in crate::rest) policies: Vec<Policy>,
    /// Empty on the last page.
    pub(in crate::rest) next_page_token: String,
}

/// A token to create.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::rest) struct NewToken {
    /// Who it is for.
    subject: String,
    /// Which API it may use.
    scopes: Vec<String>,
    /// The policies that say which paths.
    #[serde(default)]
    policies: Vec<String>,
    /// How long it lives, e.g. `24h`, which is also meant if left out; `0s` is for ever.
    ttl: Option<String>,
}

impl NewToken {
    /// The request to the service.
    pub(in crate::rest) fn into_wire(self) -> Result<proto::CreateTokenRequest, Error> {
        let ttl = ttl(self.ttl.as_deref())?;
        Ok(proto::CreateTokenRequest {
            subject: self.subject,
            scopes: self.scopes,
            policies: self.policies,
            ttl,
        })
    }
}

/// How long a token lives from now.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::rest) struct RenewToken {
    /// E.g. `24h`.
    ttl: Option<String>,
}

impl RenewToken {
    /// The request to the service.
    pub(in crate::rest) fn into_wire(self, accessor: String) -> Result<proto::RenewTokenRequest, Error> {
        Ok(proto::RenewTokenRequest { accessor, ttl: ttl(self.ttl.as_deref())? })
    }
}

fn ttl(text: Option<&str>) -> Result<Option<prost_types::Duration>, Error> {
    let ttl = text.map(parse_duration).transpose().map_err(|detail| Error::invalid("/ttl", detail))?;
    Ok(ttl.map(to_wire))
}

/// What is known of a token; never the token itself.
#[derive(Serialize, ToSchema)]
pub(in crate::rest) struct Token {
    /// A name for the token that is not the token.
    accessor: String,
    subject: String,
    scopes: Vec<String>,
    policies: Vec<String>,
    tenant: String,
    /// The accessor of the token that it was created with.
    #[schema(required)]
    parent: Option<String>,
    #[schema(required)]
    created_at: Option<String>,
    /// Null if it does not end.
    #[schema(required)]
    expires_at: Option<String>,
}

impl From<proto::Token> for Token {
    fn from(token: proto::Token) -> Self {
        Token {
            created_at: rfc3339(token.create_time.as_ref()),
            expires_at: rfc3339(token.expire_time.as_ref()),
            accessor: token.accessor,
            subject: token.subject,
            scopes: token.scopes,
            policies: token.policies,
            tenant: token.tenant,
            parent: Some(token.parent).filter(|parent| !parent.is_empty()),
        }
    }
}

/// A token that was created.
#[derive(Serialize, ToSchema)]
pub(in crate::rest) struct CreatedToken {
    /// The token itself: shown here and never again.
    pub(in crate::rest) token: String,
    #[serde(flatten)]
    pub(in crate::rest) info: Token,
}

/// Tokens in the order of their accessors.
#[derive(Serialize, ToSchema)]
pub(in crate::rest) struct TokenList {
    pub(in crate::rest) tokens: Vec<Token>,
    /// Empty on the last page.
    pub(in crate::rest) next_page_token: String,
}

/// Tokens that were revoked.
#[derive(Serialize, ToSchema)]
pub(in crate::rest) struct Revoked {
    /// How many, children included.
    pub(in crate::rest) revoked: u32,
}

/// A node to invite.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::rest) struct NewNode {
    /// Unique in the installation.
    pub(in crate::rest) name: String,
    /// The tenants that it serves; `*` is all of them.
    pub(in crate::rest) tenants: Vec<String>,
}

/// A data-plane node.
#[derive(Serialize, ToSchema)]
pub(in crate::rest) struct Node {
    name: String,
    /// The tenants that it serves; `*` is all of them.
    tenants: Vec<String>,
    /// When it was invited.
    #[schema(required)]
    created_at: Option<String>,
    /// Null before it joined.
    #[schema(required)]
    certificate_expires_at: Option<String>,
    /// Whether its stream is up.
    connected: bool,
    /// The build that it reported.
    build: String,
}

impl From<proto::Node> for Node {
    fn from(node: proto::Node) -> Self {
        Node {
            created_at: rfc3339(node.create_time.as_ref()),
            certificate_expires_at: rfc3339(node.certificate_expire_time.as_ref()),
            name: node.name,
            tenants: node.tenants,
            connected: node.connected,
            build: node.build,
        }
    }
}

/// A node that was invited.
#[derive(Serialize, ToSchema)]
pub(in crate::rest) struct CreatedNode {
    /// Works once within an hour; shown here and never again.
    pub(in crate::rest) join_token: String,
    pub(in crate::rest) node: Node,
}

/// Nodes in the order of their names.
#[derive(Serialize, ToSchema)]
pub(in crate::rest) struct NodeList {
    pub(in crate::rest) nodes: Vec<Node>,
    /// Empty on the last page.
    pub(in crate::rest) next_page_token: String,
}

/// Audit rows in the order in which they arrived.
#[derive(Serialize, ToSchema)]
pub(in crate::rest) struct AuditRows {
    pub(in crate::rest) rows: Vec<AuditRow>,
    /// Where the next page begins; never empty, so that it can be kept.
    pub(in crate::rest) next_page_token: String,
}

/// One row of the audit trail; what does not apply is null.
#[derive(Serialize, ToSchema)]
pub(in crate::rest) struct AuditRow {
    #[schema(required)]
    time: Option<String>,
    principal: String,
    /// The token's accessor.
    #[schema(required)]
    accessor: Option<String>,
    /// E.g. `secret.read`.
    action: String,
    path: String,
    #[schema(required)]
    backend: Option<String>,
    #[schema(required)]
    remote_name: Option<String>,
    #[schema(required)]
    version: Option<u64>,
    #[schema(required)]
    remote_version: Option<String>,
    /// `proxy` or `local`.
    #[schema(required)]
    source: Option<String>,
    /// `ok`, or the code of the refusal.
    outcome: String,
    /// In microseconds.
    latency_us: u64,
    #[schema(required)]
    request_id: Option<String>,
    #[schema(required)]
    trace_id: Option<String>,
    /// The process that wrote the row.
    node: String,
}

impl From<proto::AuditRow> for AuditRow {
    fn from(row: proto::AuditRow) -> Self {
        let given = |text: String| Some(text).filter(|text| !text.is_empty());
        let latency = duration(row.latency.as_ref()).unwrap_or_default();
        AuditRow {
            time: rfc3339(row.time.as_ref()),
            principal: row.principal,
            accessor: given(row.accessor),
            action: row.action,
            path: row.path,
            backend: given(row.backend),
            remote_name: given(row.remote_name),
            version: Some(row.version).filter(|version| *version > 0),
            remote_version: given(row.remote_version),
            source: given(row.source),
            outcome: row.outcome,
            latency_us: u64::try_from(latency.as_micros()).unwrap_or(u64::MAX),
            request_id: given(row.request_id),
            trace_id: given(row.trace_id),
            node: row.node,
        }
    }
}
