//! Nodes: invited, enrolled, renewed, removed.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rustls_pki_types::CertificateDer;
use scaivault_domain::access::{Administer, Authorized, Scope};
use scaivault_domain::audit::{Action, AuditRow, Origin};
use scaivault_domain::tenant::{NodeName, TenantId};
use scaivault_domain::time::Clock;
use scaivault_domain::{Error, Reason};
use secrecy::SecretString;

use super::tenants::Tenants;
use super::tokens::accessor;
use super::{Committed, Page, PageRequest, contended, settle};
use crate::audit::Audit;
use crate::model::{JoinRecord, NodeRecord};
use crate::nodes::{Authority, CertifiedNode, join_key};
use crate::store::{Key, Owner, Records, RowVersion, Space, StoreError, Tx};

/// How long an invitation stands.
const INVITATION: Duration = Duration::from_secs(3600);

/// The service of nodes.
#[derive(Debug)]
pub struct Nodes {
    records: Records,
    tenants: Arc<Tenants>,
    authority: Arc<Authority>,
    audit: Arc<Audit>,
    clock: Arc<dyn Clock>,
}

/// The key of a node.
pub fn node_key(name: &NodeName) -> Key {
    Key::installation(Space::Node, name.as_str())
}

impl Nodes {
    /// Nodes of `records`, certified by `authority`.
    pub fn new(
        records: Records,
        tenants: Arc<Tenants>,
        authority: Arc<Authority>,
        audit: Arc<Audit>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        Nodes { records, tenants, authority, audit, clock }
    }

    /// Invites a node that serves `tenants` (empty: all of them); answers its join token.
    ///
    /// # Errors
    /// `already_exists` for a node that has joined; an invitation that was not used is replaced.
    pub async fn invite(
        &self,
        allowed: &Authorized<Administer, Scope>,
        origin: &Origin,
        name: NodeName,
        tenants: Vec<TenantId>,
    ) -> Result<Committed<(SecretString, NodeRecord)>, Error> {
        for tenant in &tenants {
            if !self.tenants.exists(tenant).await? {
                return Err(Error::invalid("/tenants", format!("there is no tenant `{tenant}`")));
            }
        }
        let found = self.records.get::<NodeRecord>(&node_key(&name)).await?;
        if let Some((node, _)) = &found
            && node.certificate_expires.is_some()
        {
            return Err(Error::field(Reason::AlreadyExists, "/name", "a node of this name has joined")
                .next("remove the node first, or choose another name"));
        }
        let now = self.clock.now();
        let node =
            NodeRecord { name, tenants, enrolment: accessor(), created: now, certificate_expires: None };
        let mut random = [0; 32];
        getrandom::fill(&mut random).map_err(|_| Error::internal())?;
        let secret = SecretString::from(URL_SAFE_NO_PAD.encode(random));
        let invitation = JoinRecord {
            node: node.name.clone(),
            enrolment: node.enrolment.clone(),
            expires: now.after(INVITATION),
        };
        let (key, join) = (node_key(&node.name), join_key(&secret));
        let tx = Tx::new()
            .expect_as_found(key.clone(), found.map(|(_, version)| version))
            .put(key.clone(), self.records.seal(&key, &node))
            .put(join.clone(), self.records.seal(&join, &invitation));
        let row = AuditRow::new(allowed.caller(), origin, Action::NodeWrite, node.name.as_str(), now);
        let revision =
            settle(self.records.store().commit(self.audit.stage(tx, &row)).await)?.ok_or_else(contended)?;
        Ok(Committed { value: (self.authority.join_token(&secret), node), revision })
    }

    /// Exchanges an invitation for a certificate. An invitation works once.
    ///
    /// # Errors
    /// `unauthenticated` for one that is unknown, used or too old.
    pub async fn enrol(
        &self,
        secret: &SecretString,
        csr: &[u8],
    ) -> Result<(NodeName, Vec<CertificateDer<'static>>), Error> {
        let refuse = || {
            Error::new(Reason::Unauthenticated, "the join token is unknown, used or too old")
                .next("ask the operator for a new one: `scaivault node add`")
        };
        let join = join_key(secret);
        let (invitation, join_version) = self.records.get::<JoinRecord>(&join).await?.ok_or_else(refuse)?;
        let now = self.clock.now();
        if invitation.expires <= now {
            return Err(refuse());
        }
        let key = node_key(&invitation.node);
        let (mut node, version) = self.records.get::<NodeRecord>(&key).await?.ok_or_else(refuse)?;
        if invitation.enrolment != node.enrolment || node.certificate_expires.is_some() {
            return Err(refuse());
        }
        let (certificates, ends) = self.authority.sign(&node, csr)?;
        node.certificate_expires = Some(ends);
        let tx = Tx::new()
            .expect(join.clone(), join_version)
            .delete(join)
            .expect(key.clone(), version)
            .put(key.clone(), self.records.seal(&key, &node));
        self.commit_own(tx, &node).await?.ok_or_else(refuse)?;
        Ok((node.name, certificates))
    }

    /// A new certificate for a node that still has one.
    ///
    /// # Errors
    /// `unauthenticated` for a node that was removed.
    pub async fn renew(
        &self,
        node: &CertifiedNode,
        csr: &[u8],
    ) -> Result<Vec<CertificateDer<'static>>, Error> {
        let (mut record, version) = self.find(node).await?;
        let (certificates, ends) = self.authority.sign(&record, csr)?;
        record.certificate_expires = Some(ends);
        let key = node_key(&record.name);
        let tx = Tx::new().expect(key.clone(), version).put(key.clone(), self.records.seal(&key, &record));
        self.commit_own(tx, &record).await?.ok_or_else(contended)?;
        Ok(certificates)
    }

    async fn commit_own(&self, tx: Tx, node: &NodeRecord) -> Result<Option<crate::store::Revision>, Error> {
        // What happens to nodes is the installation's, but every row has a tenant: the operator's own.
        let tenant = TenantId::parse(crate::DEFAULT_TENANT)?;
        let row = AuditRow::of_control_plane(tenant, Action::NodeWrite, node.name.as_str(), self.clock.now());
        settle(self.records.store().commit(self.audit.stage(tx, &row)).await)
    }

    /// Deletes invitations that nobody took in time.
    ///
    /// # Errors
    /// When the store does not answer; the next sweep goes on.
    pub async fn sweep(&self) -> Result<(), Error> {
        let now = self.clock.now();
        for (name, invitation, version) in
            self.records.scan_all::<JoinRecord>(&Owner::Installation, Space::JoinToken, "").await?
        {
            if invitation.expires <= now {
                let key = Key::installation(Space::JoinToken, name);
                let tx = Tx::new().expect(key.clone(), version).delete(key);
                settle(self.records.store().commit(tx).await)?;
            }
        }
        Ok(())
    }

    /// Checks that the node of a certificate is still enrolled.
    ///
    /// # Errors
    /// `unauthenticated` for a node that was removed, or invited anew since.
    pub async fn check(&self, node: &CertifiedNode) -> Result<(), Error> {
        self.find(node).await.map(drop)
    }

    async fn find(&self, node: &CertifiedNode) -> Result<(NodeRecord, RowVersion), Error> {
        let found = self.records.get::<NodeRecord>(&node_key(&node.name)).await?;
        found.filter(|(record, _)| record.enrolment == node.enrolment).ok_or_else(|| {
            Error::new(Reason::Unauthenticated, "the node is not enrolled any more")
                .next("ask the operator for a new join token: `scaivault node add`")
        })
    }

    /// The nodes in the order of their names.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn list(
        &self,
        _allowed: &Authorized<Administer, Scope>,
        page: &PageRequest,
    ) -> Result<Page<NodeRecord>, Error> {
        let rows = self
            .records
            .scan_page::<NodeRecord>(
                &Owner::Installation,
                Space::Node,
                "",
                page.after.as_deref(),
                page.size + 1,
            )
            .await?;
        Ok(page.page(rows.into_iter().map(|(_, node, _)| node).collect(), |node| node.name.to_string()))
    }

    /// Every node that has joined and serves `tenant`.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn serving(&self, tenant: &TenantId) -> Result<Vec<NodeName>, StoreError> {
        let nodes = self.records.scan_all::<NodeRecord>(&Owner::Installation, Space::Node, "").await?;
        Ok(nodes
            .into_iter()
            .map(|(_, node, _)| node)
            .filter(|node| node.certificate_expires.is_some())
            .filter(|node| node.tenants.is_empty() || node.tenants.contains(tenant))
            .map(|node| node.name)
            .collect())
    }

    /// Removes a node; its certificate is refused from now on.
    ///
    /// # Errors
    /// `not_found`.
    pub async fn remove(
        &self,
        allowed: &Authorized<Administer, Scope>,
        origin: &Origin,
        name: &NodeName,
    ) -> Result<Committed<()>, Error> {
        let key = node_key(name);
        let found = self.records.get::<NodeRecord>(&key).await?;
        let (_, version) = found.ok_or_else(|| {
            Error::new(Reason::NotFound, "no node has this name").next("list the nodes to see their names")
        })?;
        let row = AuditRow::new(allowed.caller(), origin, Action::NodeWrite, name.as_str(), self.clock.now());
        let tx = Tx::new().expect(key.clone(), version).delete(key);
        let revision =
            settle(self.records.store().commit(self.audit.stage(tx, &row)).await)?.ok_or_else(contended)?;
        Ok(Committed { value: (), revision })
    }
}
