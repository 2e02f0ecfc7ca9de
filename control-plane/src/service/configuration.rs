//! The committed configuration of each tenant, read once per generation.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use scaivault_domain::backend::{BackendId, BackendSpec};
use scaivault_domain::path::SecretPath;
use scaivault_domain::tenant::TenantId;
use scaivault_domain::view::{BackendView, Generation, MountTable, Route, TenantView};
use scaivault_domain::{Error, Reason};

use crate::model::{BackendRecord, GenerationRecord, generation_key};
use crate::store::{Owner, Records, RowVersion, Space, StoreError};

/// One whole generation of a tenant's configuration.
#[derive(Debug)]
pub struct Configuration {
    /// Whose it is.
    pub tenant: TenantId,
    /// Which one; 0 before the first backend.
    pub generation: Generation,
    /// The anchor as it was read, to expect in a change.
    pub anchor: Option<RowVersion>,
    /// Every backend, with the version of its row, in the order of their names.
    pub backends: Vec<(BackendRecord, RowVersion)>,
    mounts: MountTable,
}

impl Configuration {
    /// Where `path` lives.
    pub fn route(&self, path: &SecretPath) -> Route {
        self.mounts.route(path)
    }

    /// Every backend as it is used, in the order of [`backends`](Self::backends).
    pub fn views(&self) -> &[Arc<BackendView>] {
        self.mounts.backends()
    }

    /// A backend of the tenant.
    ///
    /// # Errors
    /// `not_found`, also for ids of other tenants.
    pub fn backend(&self, id: &BackendId) -> Result<&(BackendRecord, RowVersion), Error> {
        self.backends.iter().find(|(record, _)| record.id == *id).ok_or_else(|| {
            Error::new(Reason::NotFound, "no backend has this id").next("list the backends to see their ids")
        })
    }

    /// What nodes are told.
    pub fn view(&self) -> TenantView {
        TenantView {
            tenant: self.tenant.clone(),
            generation: self.generation,
            backends: self
                .backends
                .iter()
                .map(|(record, _)| view(&record.id, &record.spec, record.login_generation))
                .collect(),
        }
    }
}

/// A configuration as it is used.
pub(super) fn view(id: &BackendId, spec: &BackendSpec, login_generation: Generation) -> BackendView {
    BackendView {
        id: id.clone(),
        login_generation,
        name: spec.name.clone(),
        target: spec.provider.target(),
        mapping: spec.mapping.clone(),
        mode: spec.mode,
        sync: spec.sync.clone(),
        enabled: spec.enabled,
        timeout: spec.timeout,
    }
}

/// Reads configurations, each generation once.
#[derive(Debug)]
pub struct Configurations {
    records: Records,
    held: Mutex<HashMap<TenantId, Arc<Configuration>>>,
}

impl Configurations {
    /// Reads from `records`.
    pub fn new(records: Records) -> Self {
        Configurations { records, held: Mutex::default() }
    }

    /// The committed configuration of `tenant`.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn of(&self, tenant: &TenantId) -> Result<Arc<Configuration>, StoreError> {
        loop {
            let anchor = self.anchor(tenant).await?;
            let version = anchor.as_ref().map(|(_, version)| *version);
            let held = self.held.lock().expect("no panic while held").get(tenant).cloned();
            if let Some(held) = held
                && held.anchor == version
            {
                return Ok(held);
            }
            let mut backends = Vec::new();
            for (_, record, version) in
                self.records.scan_all::<BackendRecord>(&Owner::from(tenant), Space::Backend, "").await?
            {
                backends.push((record, version));
            }
            // Backends and anchor change in one transaction, so an unchanged anchor means that what was read is whole.
            if self.anchor(tenant).await?.map(|(_, version)| version) != version {
                continue;
            }
            backends.sort_by(|(a, _): &(BackendRecord, _), (b, _)| a.spec.name.cmp(&b.spec.name));
            let configuration = Arc::new(Configuration {
                tenant: tenant.clone(),
                generation: anchor.map_or(0, |(record, _)| record.generation),
                anchor: version,
                mounts: MountTable::new(
                    backends
                        .iter()
                        .map(|(record, _)| view(&record.id, &record.spec, record.login_generation)),
                ),
                backends,
            });
            self.held.lock().expect("no panic while held").insert(tenant.clone(), configuration.clone());
            return Ok(configuration);
        }
    }

    async fn anchor(&self, tenant: &TenantId) -> Result<Option<(GenerationRecord, RowVersion)>, StoreError> {
        self.records.get(&generation_key(tenant)).await
    }
}
