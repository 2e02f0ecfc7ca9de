//! Erasing copies that nobody is served any more: after a flip back to proxy, and when a backend is purged.
//!
//! An erasure is a job. It begins when no node serves the copies any longer, goes path by path, and is taken up again
//! after a crash.

use std::sync::Arc;
use std::time::{Duration, Instant};

use scaivault_discovery::NodeBoard;
use scaivault_domain::audit::{Action, AuditRow};
use scaivault_domain::backend::BackendId;
use scaivault_domain::path::SecretPath;
use scaivault_domain::sync::Local;
use scaivault_domain::tenant::TenantId;
use scaivault_domain::time::{Clock, Timestamp};
use scaivault_domain::view::{Generation, Route};

use super::apply::Stopped;
use super::jobs::{EraseJob, Originals};
use crate::audit::Audit;
use crate::model::{SecretHead, generation_key, secret_key};
use crate::service::Configurations;
use crate::service::nodes::Nodes;
use crate::store::jobs::Claim;
use crate::store::{CommitError, Depth, Key, Owner, Records, Space, StoreError, Tx};

/// How long nodes have to come back after this process began.
const REUNION: Duration = Duration::from_secs(30);
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
    /// When this process began.
    pub started: Instant,
}

impl Erasures {
    /// Does the job, if no node serves the copies any more.
    pub(super) async fn run(&self, claim: &Claim<EraseJob>) -> Result<Erased, Stopped> {
        let job = &claim.payload;
        if self.is_served(&job.tenant, job.generation).await? {
            return Ok(Erased::Waiting);
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
                let Ok(path) = SecretPath::check(&name) else { continue };
                if is_erased(job, &head) && job.covers(&path) {
                    self.erase_if_unserved(claim, &path).await?;
                }
            }
            if last {
                return Ok(Erased::All);
            }
        }
    }

    async fn erase_if_unserved(&self, claim: &Claim<EraseJob>, path: &SecretPath) -> Result<(), Stopped> {
        let job = &claim.payload;
        let configuration = self.configurations.of(&job.tenant).await?;
        if let Route::Synced { backend, .. } = configuration.route(path)
            && backend.id == job.backend
        {
            return Ok(());
        }
        let row = erasure(&job.tenant, &job.backend, path, self.clock.now());
        erase(
            &self.records,
            &job.tenant,
            path,
            |head| is_erased(job, head),
            |tx| {
                let tx = claim.fence(tx).expect_as_found(generation_key(&job.tenant), configuration.anchor);
                self.audit.stage(tx, &row)
            },
        )
        .await
    }

    /// Whether some node may still serve what an older configuration said.
    async fn is_served(&self, tenant: &TenantId, generation: Generation) -> Result<bool, StoreError> {
        let now = self.clock.now();
        let serving = self.nodes.serving(tenant).await?;
        Ok(serving.into_iter().any(|name| match self.board.snapshot(&name) {
            // One that has not been heard of since our start may be about to come back.
            None => self.started.elapsed() < REUNION,
            Some(node) => {
                let held = node.progress.views.get(tenant).and_then(|view| view.acknowledged);
                held.is_none_or(|held| held < generation) && now.since(node.last_seen) < SILENT
            }
        }))
    }
}

/// What came of an erasure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Erased {
    /// It is done.
    All,
    /// Some node may still serve the copies.
    Waiting,
}

/// Whether a secret is a copy that the job erases.
fn is_erased(job: &EraseJob, head: &SecretHead) -> bool {
    let Some(base) = head.copy_of(&job.backend) else { return false };
    let local = Local::of(Some((head.current, head.state)), Some(base), &job.backend);
    let original = base.adopted || matches!(local, Local::Changed | Local::Revived);
    job.originals == Originals::Erased || !original
}

/// The row of an erasure.
pub(super) fn erasure(tenant: &TenantId, backend: &BackendId, path: &SecretPath, now: Timestamp) -> AuditRow {
    let mut row = AuditRow::of_control_plane(tenant.clone(), Action::SyncErase, path.as_str(), now);
    row.backend = Some(backend.to_string());
    row
}

/// Deletes a secret and all of its versions, if its head is as `wanted` and is not written meanwhile; `bind` adds what
/// else must hold.
pub(super) async fn erase(
    records: &Records,
    tenant: &TenantId,
    path: &SecretPath,
    wanted: impl Fn(&SecretHead) -> bool,
    bind: impl Fn(Tx) -> Tx,
) -> Result<(), Stopped> {
    let at = secret_key(tenant, path);
    let owner = Owner::from(tenant);
    loop {
        let Some((head, version)) = records.get::<SecretHead>(&at).await? else { return Ok(()) };
        if !wanted(&head) {
            return Ok(());
        }
        let mut tx = bind(Tx::new()).expect(at.clone(), version).delete(at.clone());
        let mut after: Option<String> = None;
        loop {
            let prefix = format!("{path}@");
            let names = records
                .store()
                .scan(&owner, Space::SecretVersion, &prefix, Depth::All, after.as_deref(), PAGE)
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
