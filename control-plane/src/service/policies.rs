//! Policies of a tenant: named lists of rules that tokens point at.

use std::sync::Arc;

use scaivault_domain::access::{Administer, Authorized, Policy, ROOT_POLICY, Scope};
use scaivault_domain::audit::{Action, AuditRow, Origin};
use scaivault_domain::tenant::{PolicyName, TenantId};
use scaivault_domain::time::Clock;
use scaivault_domain::{Error, Reason};

use super::{Committed, Page, PageRequest, contended, settle};
use crate::audit::Audit;
use crate::model::{AccessorRecord, TokenRecord};
use crate::store::{Key, Owner, Records, Space, Tx};

/// Most rules of one policy.
const MAX_RULES: usize = 256;

/// The key of a policy.
pub fn policy_key(tenant: &TenantId, name: &PolicyName) -> Key {
    Key::new(tenant, Space::Policy, name.as_str())
}

/// The service of policies.
#[derive(Debug)]
pub struct Policies {
    records: Records,
    audit: Arc<Audit>,
    clock: Arc<dyn Clock>,
}

impl Policies {
    /// Policies of `records`.
    pub fn new(records: Records, audit: Arc<Audit>, clock: Arc<dyn Clock>) -> Self {
        Policies { records, audit, clock }
    }

    /// Creates or replaces a policy.
    ///
    /// # Errors
    /// `invalid_request` for the name `root` and for too many or empty rules.
    pub async fn put(
        &self,
        allowed: &Authorized<Administer, Scope>,
        origin: &Origin,
        policy: Policy,
    ) -> Result<Committed<Policy>, Error> {
        if policy.name.as_str() == ROOT_POLICY {
            return Err(Error::invalid("/name", "`root` is built in"));
        }
        if policy.rules.len() > MAX_RULES {
            return Err(Error::invalid("/rules", "has at most 256 rules"));
        }
        if let Some(at) = policy.rules.iter().position(|rule| rule.capabilities.is_empty()) {
            return Err(Error::invalid(format!("/rules/{at}/capabilities"), "needs at least one capability"));
        }
        let key = policy_key(allowed.tenant(), &policy.name);
        let row = AuditRow::new(
            allowed.caller(),
            origin,
            Action::PolicyWrite,
            policy.name.as_str(),
            self.clock.now(),
        );
        let tx = Tx::new().put(key.clone(), self.records.seal(&key, &policy));
        let revision =
            settle(self.records.store().commit(self.audit.stage(tx, &row)).await)?.ok_or_else(contended)?;
        Ok(Committed { value: policy, revision })
    }

    /// Reads a policy.
    ///
    /// # Errors
    /// `not_found`.
    pub async fn get(
        &self,
        allowed: &Authorized<Administer, Scope>,
        name: &PolicyName,
    ) -> Result<Policy, Error> {
        let found = self.records.get::<Policy>(&policy_key(allowed.tenant(), name)).await?;
        found.map(|(policy, _)| policy).ok_or_else(gone)
    }

    /// The policies in the order of their names.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn list(
        &self,
        allowed: &Authorized<Administer, Scope>,
        page: &PageRequest,
    ) -> Result<Page<Policy>, Error> {
        let owner = Owner::from(allowed.tenant());
        let rows = self
            .records
            .scan_page::<Policy>(&owner, Space::Policy, "", page.after.as_deref(), page.size + 1)
            .await?;
        let policies = rows.into_iter().map(|(_, policy, _)| policy).collect();
        Ok(page.page(policies, |policy| policy.name.to_string()))
    }

    /// Deletes a policy.
    ///
    /// # Errors
    /// `in_use` while a token points at it.
    pub async fn delete(
        &self,
        allowed: &Authorized<Administer, Scope>,
        origin: &Origin,
        name: &PolicyName,
    ) -> Result<Committed<()>, Error> {
        let tenant = allowed.tenant();
        let key = policy_key(tenant, name);
        let (_, version) = self.records.get::<Policy>(&key).await?.ok_or_else(gone)?;
        for (_, by, _) in
            self.records.scan_all::<AccessorRecord>(&Owner::from(tenant), Space::Token, "").await?
        {
            let token = self.records.get::<TokenRecord>(&Key::installation(Space::Token, by.hash)).await?;
            if let Some((token, _)) = token
                && token.policies.iter().any(|policy| policy == name.as_str())
            {
                let message = format!("the token with the accessor `{}` uses this policy", token.accessor);
                return Err(Error::new(Reason::InUse, message).next("revoke the token first"));
            }
        }
        let row =
            AuditRow::new(allowed.caller(), origin, Action::PolicyWrite, name.as_str(), self.clock.now());
        let tx = Tx::new().expect(key.clone(), version).delete(key);
        let revision =
            settle(self.records.store().commit(self.audit.stage(tx, &row)).await)?.ok_or_else(contended)?;
        Ok(Committed { value: (), revision })
    }
}

fn gone() -> Error {
    Error::new(Reason::NotFound, "no policy has this name").next("list the policies to see their names")
}
