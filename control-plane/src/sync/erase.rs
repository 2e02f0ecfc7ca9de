//! Erasing copies that nobody is served any more: after a flip back to proxy, and when a backend is purged.
//!
//! An erasure is a job. It begins when no node serves the copies any longer, goes path by path, and is taken up again
//! after a crash.

use std::sync::Arc;
use std::time::Duration;

use scaivault_discovery::NodeBoard;
use scaivault_domain::audit::{Action, AuditRow};
use scaivault_domain::path::SecretPath;
use scaivault_domain::tenant::{NodeName, TenantId};
use scaivault_domain::time::Clock;
use scaivault_domain::view::{Generation, Route};

use super::apply::Stopped;
use super::jobs::{Erase, EraseJob};
use crate::audit::Audit;
use crate::model::{SecretHead, generation_key, secret_key};
use crate::service::Configurations;
use crate::service::nodes::Nodes;
use crate::store::jobs::Claim;
use crate::store::{CommitError, Key, Owner, Records, Space, Tx};

/// How often it is looked whether the nodes have acknowledged.
const POLL: Duration = Duration::from_millis(200);
/// A node that said nothing for so long serves its copies no longer by itself, and is not waited for.
const SILENT: Duration = Duration::from_secs(24 * 3600);
/// Heads that are read at once.
const PAGE: usize = 500;

/// Erases copies.
#[derive(Clone, Debug)]
pub struct Erasures {
    /// The store.
    pub records: Records,
    /// The committed configurations.
    pub configurations: Arc<Configurations>,
    /// Which nodes there are.
    pub nodes: Arc<Nodes>,
    /// How far they are.
    pub board: Arc<NodeBoard>,
    /// The audit trail.
    pub audit: Arc<Audit>,
    /// Wall time.
    pub clock: Arc<dyn Clock>,
}

impl Erasures {
    /// Does the whole job.
    pub(super) async fn run(&self, claim: &Claim<EraseJob>) -> Result<(), Stopped> {
        let job = &claim.payload;
        while !self.waiting_for(&job.tenant, job.generation).await.is_empty() {
            tokio::time::sleep(POLL).await;
        }
        let owner = Owner::from(&job.tenant);
        let mut after: Option<String> = None;
        loop {
            let page = self
                .records
                .scan_page::<SecretHead>(&owner, Space::Secret, "", after.as_deref(), PAGE)
                .await?;
            let last = page.len() < PAGE;
            after = page.last().map(|(name, ..)| name.clone());
            for (name, head, _) in page {
                if head.copy_of(&job.backend).is_none() {
                    continue;
                }
                let Ok(path) = SecretPath::check(&name) else { continue };
                self.erase_if_unserved(claim, &path).await?;
            }
            if last {
                return Ok(());
            }
        }
    }

    async fn erase_if_unserved(&self, claim: &Claim<EraseJob>, path: &SecretPath) -> Result<(), Stopped> {
        let job = &claim.payload;
        let configuration = self.configurations.of(&job.tenant).await?;
        let unserved = match (configuration.route(path), job.what) {
            (Route::Proxied { backend, .. }, _) => backend.id == job.backend,
            (Route::Local, Erase::Everything) => true,
            (Route::Local, Erase::Proxied) | (Route::Synced { .. }, _) => false,
        };
        if !unserved {
            return Ok(());
        }
        let mut row = AuditRow::of_control_plane(
            job.tenant.clone(),
            Action::SyncErase,
            path.as_str(),
            self.clock.now(),
        );
        row.backend = Some(job.backend.to_string());
        erase(&self.records, &job.tenant, path, |tx| {
            let tx = claim.fence(tx).expect_as_found(generation_key(&job.tenant), configuration.anchor);
            self.audit.stage(tx, &row)
        })
        .await
    }

    /// The nodes that may still serve what an older configuration said.
    async fn waiting_for(&self, tenant: &TenantId, generation: Generation) -> Vec<NodeName> {
        let now = self.clock.now();
        let serving = self.nodes.serving(tenant).await.unwrap_or_default();
        let behind = serving.into_iter().filter(|name| {
            // A node that has not been heard of since our start: it learns of the configuration when it comes back, before
            // it is told of anything else.
            let Some(node) = self.board.snapshot(name) else { return false };
            let held = node.progress.views.get(tenant).and_then(|view| view.acknowledged);
            held.is_none_or(|held| held < generation) && now.since(node.last_seen) < SILENT
        });
        behind.collect()
    }
}

/// Deletes a secret and all of its versions, if it is not written meanwhile; `bind` adds what else must hold.
pub(super) async fn erase(
    records: &Records,
    tenant: &TenantId,
    path: &SecretPath,
    bind: impl Fn(Tx) -> Tx,
) -> Result<(), Stopped> {
    let at = secret_key(tenant, path);
    let owner = Owner::from(tenant);
    loop {
        let Some((_, version)) = records.get::<SecretHead>(&at).await? else { return Ok(()) };
        let mut tx = bind(Tx::new()).expect(at.clone(), version).delete(at.clone());
        let mut after: Option<String> = None;
        loop {
            let prefix = format!("{path}@");
            let names = records
                .store()
                .scan(&owner, Space::SecretVersion, &prefix, crate::store::Depth::All, after.as_deref(), PAGE)
                .await?;
            let last = names.len() < PAGE;
            after = names.last().map(|entry| entry.name().to_owned());
            for entry in &names {
                tx = tx.delete(Key::new(tenant, Space::SecretVersion, entry.name()));
            }
            if last {
                break;
            }
        }
        match records.store().commit(tx).await {
            Ok(_) => return Ok(()),
            Err(CommitError::Precondition(lost)) if lost == at => {}
            Err(CommitError::Precondition(_)) => return Err(Stopped::Fenced),
            Err(CommitError::Unavailable(error)) => return Err(error.into()),
        }
    }
}
