//! Tenants of the installation.

use std::sync::Arc;

use scaivault_domain::access::{Administer, Authorized, Scope};
use scaivault_domain::audit::{Action, AuditRow, Origin};
use scaivault_domain::backend::OwnIdentity;
use scaivault_domain::secret::State;
use scaivault_domain::tenant::TenantId;
use scaivault_domain::time::Clock;
use scaivault_domain::{Error, Reason};

use super::{ATTEMPTS, Committed, Page, PageRequest, contended, settle};
use crate::audit::Audit;
use crate::model::{AccessorRecord, SecretHead, TenantRecord, TokenRecord};
use crate::store::{Depth, Key, Owner, Records, Space, StoreError, Tx};

/// The service of tenants.
#[derive(Debug)]
pub struct Tenants {
    records: Records,
    audit: Arc<Audit>,
    clock: Arc<dyn Clock>,
}

/// The key of a tenant.
pub fn tenant_key(id: &TenantId) -> Key {
    Key::installation(Space::Tenant, id.as_str())
}

/// What a change of a tenant says; `None` leaves a field as it is.
#[derive(Clone, Debug, Default)]
pub struct TenantChange {
    /// For people.
    pub display_name: Option<String>,
    /// All that the tenant may use from now on.
    pub identities: Option<Vec<OwnIdentity>>,
}

impl TenantChange {
    fn applied_to(self, before: TenantRecord) -> TenantRecord {
        TenantRecord {
            display_name: self.display_name.unwrap_or(before.display_name),
            identities: self.identities.unwrap_or(before.identities),
            ..before
        }
    }
}

fn check_display_name(name: &str) -> Result<(), Error> {
    if name.len() > 128 || name.chars().any(char::is_control) {
        return Err(Error::invalid("/display_name", "has at most 128 bytes and no control characters"));
    }
    Ok(())
}

/// What the row of a change tells that it changed: the tenant, and which identities it may use now, if that is another.
fn changed(granted: &[OwnIdentity], after: &TenantRecord) -> String {
    if granted == after.identities {
        return after.id.to_string();
    }
    let names: Vec<_> = after.identities.iter().map(|identity| identity.as_str()).collect();
    format!("{}/identities={}", after.id, names.join(","))
}

fn unknown() -> Error {
    Error::new(Reason::NotFound, "no tenant has this id").next("list the tenants to see their ids")
}

impl Tenants {
    /// Tenants of `records`.
    pub fn new(records: Records, audit: Arc<Audit>, clock: Arc<dyn Clock>) -> Self {
        Tenants { records, audit, clock }
    }

    /// Creates a tenant.
    ///
    /// # Errors
    /// `already_exists`.
    pub async fn create(
        &self,
        allowed: &Authorized<Administer, Scope>,
        origin: &Origin,
        id: TenantId,
        display_name: String,
        identities: Vec<OwnIdentity>,
    ) -> Result<Committed<TenantRecord>, Error> {
        check_display_name(&display_name)?;
        let now = self.clock.now();
        let record = TenantRecord { id, display_name, identities, created: now };
        let key = tenant_key(&record.id);
        let row = AuditRow::new(allowed.caller(), origin, Action::TenantWrite, changed(&[], &record), now);
        let tx = Tx::new().expect_absent(key.clone()).put(key.clone(), self.records.seal(&key, &record));
        match settle(self.records.store().commit(self.audit.stage(tx, &row)).await)? {
            Some(revision) => Ok(Committed { value: record, revision }),
            None => Err(Error::field(Reason::AlreadyExists, "/id", "a tenant of this id exists")),
        }
    }

    /// Changes a tenant. An identity that is taken away is not shown again; what was logged in with it ends by itself.
    ///
    /// # Errors
    /// `not_found`.
    pub async fn update(
        &self,
        allowed: &Authorized<Administer, Scope>,
        origin: &Origin,
        id: &TenantId,
        change: TenantChange,
    ) -> Result<Committed<TenantRecord>, Error> {
        if let Some(name) = &change.display_name {
            check_display_name(name)?;
        }
        let key = tenant_key(id);
        for _ in 0..ATTEMPTS {
            let (before, version) = self.records.get::<TenantRecord>(&key).await?.ok_or_else(unknown)?;
            let granted = before.identities.clone();
            let record = change.clone().applied_to(before);
            let what = changed(&granted, &record);
            let row = AuditRow::new(allowed.caller(), origin, Action::TenantWrite, what, self.clock.now());
            let tx =
                Tx::new().expect(key.clone(), version).put(key.clone(), self.records.seal(&key, &record));
            if let Some(revision) = settle(self.records.store().commit(self.audit.stage(tx, &row)).await)? {
                return Ok(Committed { value: record, revision });
            }
        }
        Err(contended())
    }

    /// The tenants in the order of their ids.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn list(
        &self,
        _allowed: &Authorized<Administer, Scope>,
        page: &PageRequest,
    ) -> Result<Page<TenantRecord>, Error> {
        let rows = self
            .records
            .scan_page::<TenantRecord>(
                &Owner::Installation,
                Space::Tenant,
                "",
                page.after.as_deref(),
                page.size + 1,
            )
            .await?;
        Ok(page.page(rows.into_iter().map(|(_, tenant, _)| tenant).collect(), |tenant| tenant.id.to_string()))
    }

    /// Every tenant, for the control plane's own work.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn all(&self) -> Result<Vec<TenantId>, StoreError> {
        let rows = self.records.scan_all::<TenantRecord>(&Owner::Installation, Space::Tenant, "").await?;
        Ok(rows.into_iter().map(|(_, tenant, _)| tenant.id).collect())
    }

    /// Whether there is such a tenant.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn exists(&self, id: &TenantId) -> Result<bool, StoreError> {
        Ok(self.records.store().get(&tenant_key(id)).await?.is_some())
    }

    /// Deletes a tenant that has nothing in use, and erases what is left of it: deleted secrets, expired tokens, events.
    /// Its audit trail stays.
    ///
    /// # Errors
    /// `in_use` while it has secrets, backends, policies or tokens.
    pub async fn delete(
        &self,
        allowed: &Authorized<Administer, Scope>,
        origin: &Origin,
        id: &TenantId,
    ) -> Result<Committed<()>, Error> {
        let key = tenant_key(id);
        let (_, version) = self.records.get::<TenantRecord>(&key).await?.ok_or_else(unknown)?;
        if let Some(what) = self.used_by(id).await? {
            return Err(
                Error::new(Reason::InUse, format!("the tenant still has {what}")).next("delete them first")
            );
        }
        self.audit.settle(id).await?;
        for space in [
            Space::Secret,
            Space::SecretVersion,
            Space::Token,
            Space::Generation,
            Space::Event,
            Space::Setting,
            Space::SyncState,
            Space::Run,
            Space::RunDetail,
        ] {
            self.erase(id, space).await?;
        }
        let mut row =
            AuditRow::new(allowed.caller(), origin, Action::TenantWrite, id.as_str(), self.clock.now());
        // The row must outlive the tenant that it is about.
        row.tenant = TenantId::parse(crate::DEFAULT_TENANT)?;
        let tx = Tx::new().expect(key.clone(), version).delete(key);
        let revision =
            settle(self.records.store().commit(self.audit.stage(tx, &row)).await)?.ok_or_else(contended)?;
        Ok(Committed { value: (), revision })
    }

    async fn used_by(&self, id: &TenantId) -> Result<Option<&'static str>, Error> {
        let owner = Owner::from(id);
        for (space, what) in [(Space::Backend, "backends"), (Space::Policy, "policies")] {
            if !self.records.store().scan(&owner, space, "", Depth::All, None, 1).await?.is_empty() {
                return Ok(Some(what));
            }
        }
        let secrets = self.records.scan_all::<SecretHead>(&owner, Space::Secret, "").await?;
        if secrets.iter().any(|(_, head, _)| head.state == State::Active) {
            return Ok(Some("secrets"));
        }
        let now = self.clock.now();
        for (_, by, _) in self.records.scan_all::<AccessorRecord>(&owner, Space::Token, "").await? {
            let token = self.records.get::<TokenRecord>(&Key::installation(Space::Token, by.hash)).await?;
            if token.is_some_and(|(token, _)| token.expires.is_none_or(|end| end > now)) {
                return Ok(Some("tokens"));
            }
        }
        Ok(None)
    }

    async fn erase(&self, id: &TenantId, space: Space) -> Result<(), Error> {
        const AT_ONCE: usize = 256;
        loop {
            let rows =
                self.records.store().scan(&Owner::from(id), space, "", Depth::All, None, AT_ONCE).await?;
            if rows.is_empty() {
                return Ok(());
            }
            let tx = rows.iter().fold(Tx::new(), |tx, row| tx.delete(Key::new(id, space, row.name())));
            settle(self.records.store().commit(tx).await)?;
        }
    }
}

#[cfg(test)]
mod tests {
    use scaivault_domain::time::Timestamp;

    use super::*;

    #[test]
    fn the_row_of_a_grant_tells_what_is_granted_now() {
        let told = |granted: &[OwnIdentity], identities: Option<&[OwnIdentity]>| {
            let before = TenantRecord {
                id: TenantId::parse("acme").unwrap(),
                display_name: String::new(),
                identities: granted.to_vec(),
                created: Timestamp::default(),
            };
            let change = TenantChange {
                display_name: Some("Acme".into()),
                identities: identities.map(<[OwnIdentity]>::to_vec),
            };
            changed(granted, &change.applied_to(before))
        };
        let (aws, both) = ([OwnIdentity::Aws], [OwnIdentity::Aws, OwnIdentity::Gcp]);
        assert_eq!(told(&aws, Some(&both)), "acme/identities=aws,gcp");
        assert_eq!(told(&aws, Some(&[])), "acme/identities=", "they are taken away");
        assert_eq!([told(&aws, None), told(&aws, Some(&aws))], ["acme", "acme"]);
    }
}
