//! `tenant` and `node`: what an operator does.

use clap::Subcommand;
use prost_types::FieldMask;
use scaivault_domain::backend::OwnIdentity;
use scaivault_domain::tenant::{NodeName, TenantId};
use scaivault_proto::admin::v1::{
    self as wire_v1, CreateNodeRequest, CreateTenantRequest, DeleteNodeRequest, DeleteTenantRequest,
    ListNodesRequest, ListTenantsRequest, UpdateTenantRequest,
};
use serde::Serialize;

use super::wire;
use crate::connection::Connection;
use crate::failure::Failure;
use crate::output::{Output, details, table};
use crate::parse;

/// Tenants of the installation.
#[derive(Debug, Subcommand)]
pub(crate) enum Tenant {
    /// Create a tenant.
    Create {
        /// Id of the tenant.
        #[arg(value_parser = parse::tenant)]
        id: TenantId,
        /// A name for people.
        #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
        display_name: String,
        /// An identity of ScaiVault's own that the tenant's backends may log in with: kubernetes, aws, azure or gcp.
        /// Repeatable, or separated by commas.
        #[arg(long = "identity", value_name = "IDENTITY", value_delimiter = ',', value_parser = parse::identity)]
        identities: Vec<OwnIdentity>,
    },
    /// Change a tenant; what is not named stays as it is.
    #[command(group = clap::ArgGroup::new("change").required(true).multiple(true))]
    Set {
        /// Id of the tenant.
        #[arg(value_parser = parse::tenant)]
        id: TenantId,
        /// A name for people.
        #[arg(long, value_name = "NAME", group = "change")]
        display_name: Option<String>,
        /// An identity of ScaiVault's own that the tenant's backends may log in with: kubernetes, aws, azure or gcp.
        /// Repeatable, or separated by commas; what is not named here is taken away.
        #[arg(
            long = "identity",
            value_name = "IDENTITY",
            group = "change",
            value_delimiter = ',',
            value_parser = parse::identity
        )]
        identities: Vec<OwnIdentity>,
        /// Take all of ScaiVault's own identities away.
        #[arg(long, group = "change", conflicts_with = "identities")]
        no_identities: bool,
    },
    /// List the tenants.
    List,
    /// Delete an empty tenant.
    Delete {
        /// Id of the tenant.
        #[arg(value_parser = parse::tenant)]
        id: TenantId,
    },
}

#[derive(Serialize)]
struct ShownTenant {
    id: String,
    display_name: String,
    identities: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    create_time: Option<String>,
}

#[derive(Serialize)]
struct Tenants {
    tenants: Vec<ShownTenant>,
}

impl From<wire_v1::Tenant> for ShownTenant {
    fn from(tenant: wire_v1::Tenant) -> Self {
        ShownTenant {
            id: tenant.id,
            display_name: tenant.display_name,
            identities: tenant.identities,
            create_time: wire::time(tenant.create_time),
        }
    }
}

impl Tenant {
    pub(super) async fn run(self, to: &Connection, output: &mut Output<'_>) -> Result<(), Failure> {
        match self {
            Tenant::Create { id, display_name, identities } => {
                let identities = names(&identities);
                let tenant = wire_v1::Tenant { id: id.into(), display_name, create_time: None, identities };
                let answer = to.admin().create_tenant(CreateTenantRequest { tenant: Some(tenant) }).await?;
                show_tenant(answer.into_inner().tenant, output)
            }
            Tenant::Set { id, display_name, identities, no_identities } => {
                let mut paths = Vec::new();
                if display_name.is_some() {
                    paths.push("display_name".to_owned());
                }
                if no_identities || !identities.is_empty() {
                    paths.push("identities".to_owned());
                }
                let tenant = wire_v1::Tenant {
                    id: id.into(),
                    display_name: display_name.unwrap_or_default(),
                    create_time: None,
                    identities: names(&identities),
                };
                let request =
                    UpdateTenantRequest { tenant: Some(tenant), update_mask: Some(FieldMask { paths }) };
                let answer = to.admin().update_tenant(request).await?;
                show_tenant(answer.into_inner().tenant, output)
            }
            Tenant::List => list_tenants(to, output).await,
            Tenant::Delete { id } => {
                to.admin().delete_tenant(DeleteTenantRequest { id: id.as_str().to_owned() }).await?;
                output.note(&format!("deleted tenant {id}"))
            }
        }
    }
}

fn names(identities: &[OwnIdentity]) -> Vec<String> {
    identities.iter().map(|identity| identity.as_str().to_owned()).collect()
}

fn show_tenant(tenant: Option<wire_v1::Tenant>, output: &mut Output<'_>) -> Result<(), Failure> {
    let tenant = ShownTenant::from(tenant.ok_or_else(|| Failure::strange_answer("no tenant"))?);
    output.show(&tenant, || {
        details([
            ("tenant", tenant.id.clone()),
            ("display name", tenant.display_name.clone()),
            ("identities", tenant.identities.join(",")),
        ])
    })
}

async fn list_tenants(to: &Connection, output: &mut Output<'_>) -> Result<(), Failure> {
    let tenants = wire::all(async |page_token| {
        let request = ListTenantsRequest { page_size: wire::PAGE, page_token };
        let answer = to.admin().list_tenants(request).await?.into_inner();
        Ok((answer.tenants, answer.next_page_token))
    })
    .await?;
    let list = Tenants { tenants: tenants.into_iter().map(ShownTenant::from).collect() };
    output.show(&list, || {
        let rows = list.tenants.iter().map(|tenant| {
            [
                tenant.id.clone(),
                tenant.display_name.clone(),
                tenant.identities.join(","),
                tenant.create_time.clone().unwrap_or_default(),
            ]
        });
        table(["id", "display name", "identities", "created"], rows)
    })
}

/// Data-plane nodes of the installation.
#[derive(Debug, Subcommand)]
pub(crate) enum Node {
    /// Invite a node and print its join token: it works once within an hour.
    Add {
        /// Name of the node.
        #[arg(value_parser = parse::node_name)]
        name: NodeName,
        /// A tenant that it serves, or '*' for all of them. Repeatable, or separated by commas.
        #[arg(
            long = "tenant",
            value_name = "TENANT",
            required = true,
            value_delimiter = ',',
            value_parser = parse::served_tenant
        )]
        tenants: Vec<String>,
    },
    /// List the nodes.
    List,
    /// Remove a node: its certificate is refused from now on.
    Remove {
        /// Name of the node.
        #[arg(value_parser = parse::node_name)]
        name: NodeName,
    },
}

#[derive(Serialize)]
struct ShownNode {
    name: String,
    tenants: Vec<String>,
    connected: bool,
    #[serde(skip_serializing_if = "String::is_empty")]
    build: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    create_time: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    certificate_expire_time: Option<String>,
}

#[derive(Serialize)]
struct Nodes {
    nodes: Vec<ShownNode>,
}

#[derive(Serialize)]
struct Invited {
    join_token: String,
    #[serde(flatten)]
    node: ShownNode,
}

impl From<wire_v1::Node> for ShownNode {
    fn from(node: wire_v1::Node) -> Self {
        ShownNode {
            name: node.name,
            tenants: node.tenants,
            connected: node.connected,
            build: node.build,
            create_time: wire::time(node.create_time),
            certificate_expire_time: wire::time(node.certificate_expire_time),
        }
    }
}

impl Node {
    pub(super) async fn run(self, to: &Connection, output: &mut Output<'_>) -> Result<(), Failure> {
        match self {
            Node::Add { name, tenants } => {
                let answer = to.admin().create_node(CreateNodeRequest { name: name.into(), tenants }).await?;
                let answer = answer.into_inner();
                let node = answer.node.ok_or_else(|| Failure::strange_answer("no node"))?;
                let invited = Invited { join_token: answer.join_token, node: node.into() };
                // The join token alone on standard output, so that it can be piped.
                output.show(&invited, || format!("{}\n", invited.join_token))?;
                output.note(&format!("{} can join once within an hour with this token", invited.node.name))
            }
            Node::List => list_nodes(to, output).await,
            Node::Remove { name } => {
                to.admin().delete_node(DeleteNodeRequest { name: name.as_str().to_owned() }).await?;
                output.note(&format!("removed node {name}"))
            }
        }
    }
}

async fn list_nodes(to: &Connection, output: &mut Output<'_>) -> Result<(), Failure> {
    let nodes = wire::all(async |page_token| {
        let request = ListNodesRequest { page_size: wire::PAGE, page_token };
        let answer = to.admin().list_nodes(request).await?.into_inner();
        Ok((answer.nodes, answer.next_page_token))
    })
    .await?;
    let list = Nodes { nodes: nodes.into_iter().map(ShownNode::from).collect() };
    output.show(&list, || {
        let rows = list.nodes.iter().map(|node| {
            [
                node.name.clone(),
                node.tenants.join(","),
                if node.connected { "yes" } else { "no" }.to_owned(),
                node.build.clone(),
                node.certificate_expire_time.clone().unwrap_or_else(|| "not joined".to_owned()),
            ]
        });
        table(["name", "tenants", "connected", "build", "certificate ends"], rows)
    })
}
