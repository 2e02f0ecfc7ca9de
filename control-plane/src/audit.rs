//! The audit trail: rows of this process, segments of every journal, and reading them.
//!
//! A change's row is a row of the change's own transaction. Rows of reads and refusals go to the journal, which is on
//! disk before the answer leaves. Either way they end in segments: staged rows are moved into the journal, and closed
//! segments of all journals, a node's or our own, are kept in the store, each once, each linked to the one before.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use scaivault_domain::audit::{AuditRow, Origin};
use scaivault_domain::tenant::{NodeName, TenantId};
use scaivault_domain::time::{Clock, Timestamp};
use scaivault_domain::{Error, Reason};
use scaivault_journal::{Journal, Segment};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::nodes::CertifiedNode;
use crate::service::tenants::Tenants;
use crate::store::{CommitError, Depth, Entry, Key, Owner, Records, Space, Tx};

/// Most segments that one query opens.
const MAX_OPENED: usize = 64;
/// How many staged rows are moved at once.
const MOVED: usize = 256;
/// How long after a failure the background work is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// How long a commit takes, generously.
const COMMIT: Duration = Duration::from_millis(200);
/// How often staged rows are looked for in any case.
const STAGED_NET: Duration = Duration::from_secs(10);

/// The newest link of a journal's chain, at `Installation / AuditHead / node.journal`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct ChainHead {
    next_seq: u64,
    hash: [u8; 32],
}

/// How many segments were ever taken, at `Installation / AuditHead / arrivals`.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
struct Arrivals(u64);

/// The audit trail.
pub struct Audit {
    records: Records,
    journal: Journal,
    clock: Arc<dyn Clock>,
    staged: Notify,
}

impl std::fmt::Debug for Audit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Audit").finish_non_exhaustive()
    }
}

/// Which rows are wanted.
#[derive(Clone, Debug, Default)]
pub struct Query {
    /// Rows from this time on.
    pub start: Option<Timestamp>,
    /// Rows before this time.
    pub end: Option<Timestamp>,
    /// Rows of this path, or below it if it ends in `/`; empty for all.
    pub path: String,
    /// Rows of this principal; empty for all.
    pub principal: String,
}

/// A row, and the process that wrote it.
#[derive(Clone, Debug)]
pub struct Found {
    /// The row.
    pub row: AuditRow,
    /// Who wrote it.
    pub node: NodeName,
}

impl Audit {
    /// The trail in `records`, with this process's own `journal`.
    pub fn new(records: Records, journal: Journal, clock: Arc<dyn Clock>) -> Self {
        Audit { records, journal, clock, staged: Notify::new() }
    }

    /// Bytes that wait in this process's journal.
    pub fn backlog_bytes(&self) -> u64 {
        self.journal.backlog().bytes
    }

    /// Adds the row to the transaction of the change that it is about.
    pub fn stage(&self, tx: Tx, row: &AuditRow) -> Tx {
        let key = Key::new(&row.tenant, Space::AuditRow, unique(row.time));
        let sealed = self.records.seal(&key, row);
        self.staged.notify_one();
        tx.put(key, sealed)
    }

    /// Writes a row now.
    ///
    /// # Errors
    /// `audit_unavailable`: whatever the row is about must not happen, or not be told.
    pub async fn record(&self, row: AuditRow) -> Result<(), Error> {
        self.journal.record(row).await.map_err(|error| {
            tracing::error!(%error, "the audit journal takes no rows");
            Error::new(Reason::AuditUnavailable, "the audit row cannot be written, so nothing is released")
                .next("try again; the operator finds the cause in the log")
                .retry_after(RETRY)
        })
    }

    /// Ends a request with its row; the outcome is given only after that.
    ///
    /// # Errors
    /// The outcome's own, or `audit_unavailable` in its place.
    pub async fn close<T>(
        &self,
        row: AuditRow,
        origin: &Origin,
        outcome: Result<T, Error>,
    ) -> Result<T, Error> {
        self.record(row.ended(origin, &outcome)).await?;
        outcome
    }

    /// Ends a request whose success has its row in the transaction: only a refusal is written here.
    ///
    /// # Errors
    /// The outcome's own, or `audit_unavailable` in its place.
    pub async fn close_refusal<T>(
        &self,
        row: AuditRow,
        origin: &Origin,
        outcome: Result<T, Error>,
    ) -> Result<T, Error> {
        match outcome {
            Ok(done) => Ok(done),
            refused => self.close(row, origin, refused).await,
        }
    }

    /// Moves staged rows into the journal and segments of the journal into the store, until told to stop.
    pub async fn run(self: Arc<Self>, tenants: Arc<Tenants>, stop: CancellationToken) {
        let moving = async {
            loop {
                if let Err(error) = self.move_staged(&tenants).await {
                    tracing::warn!(%error, "staged audit rows stay where they are");
                    tokio::time::sleep(RETRY).await;
                    continue;
                }
                // Staging comes before the commit, so a moment is given to it; the longer wait is the net.
                let _ = tokio::time::timeout(STAGED_NET, self.staged.notified()).await;
                tokio::time::sleep(COMMIT).await;
            }
        };
        let taking = async {
            loop {
                let segment = self.journal.next_segment().await;
                match self.take(&segment).await {
                    Ok(()) => self.journal.acknowledge(&segment.id()),
                    Err(error) => {
                        tracing::warn!(%error, "a segment of the audit journal waits");
                        tokio::time::sleep(RETRY).await;
                    }
                }
            }
        };
        tokio::select! {
            () = moving => {}
            () = taking => {}
            () = stop.cancelled() => {}
        }
    }

    async fn move_staged(&self, tenants: &Tenants) -> Result<(), Error> {
        for tenant in tenants.all().await? {
            self.settle(&tenant).await?;
        }
        Ok(())
    }

    /// Moves the rows of a tenant's changes into the journal now.
    ///
    /// # Errors
    /// `audit_unavailable`, or when the store does not answer: some rows may be left.
    pub async fn settle(&self, tenant: &TenantId) -> Result<(), Error> {
        loop {
            let owner = Owner::from(tenant);
            let rows: Vec<Entry<(AuditRow, _)>> =
                self.records.scan(&owner, Space::AuditRow, "", Depth::All, None, MOVED).await?;
            if rows.is_empty() {
                return Ok(());
            }
            let mut tx = Tx::new();
            for entry in rows {
                let Entry::Row { name, row: (row, _) } = entry else { continue };
                self.record(row).await?;
                tx = tx.delete(Key::new(tenant, Space::AuditRow, name));
            }
            // Dying here would write the rows twice, with equal request ids. Never not at all.
            self.records.store().commit(tx).await.map_err(|_| store_unavailable())?;
        }
    }

    /// Takes an encoded segment of a node's journal.
    ///
    /// # Errors
    /// `invalid_request` for a segment that is not the node's or not the next one.
    pub async fn take_encoded(&self, node: &CertifiedNode, encoded: Bytes) -> Result<(), Error> {
        let segment =
            Segment::decode(encoded).map_err(|error| Error::invalid("/segment", error.to_string()))?;
        if segment.header().node != node.name {
            return Err(Error::invalid("/segment", "is another node's"));
        }
        if !segment.header().tenants.iter().all(|block| node.serves(&block.tenant)) {
            return Err(Error::invalid("/segment", "has rows of a tenant that the node does not serve"));
        }
        self.take(&segment).await
    }

    async fn take(&self, segment: &Segment) -> Result<(), Error> {
        let header = segment.header();
        let journal: String = header.journal.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        let chain_key = Key::installation(Space::AuditHead, format!("{}.{journal}", header.node));
        let arrivals_key = Key::installation(Space::AuditHead, "arrivals");
        loop {
            let chain = self.records.get::<ChainHead>(&chain_key).await?;
            let (head, chain_version) =
                chain.map_or((None, None), |(head, version)| (Some(head), Some(version)));
            if let Some(head) = &head {
                if header.last_seq < head.next_seq {
                    // It came before, and the acknowledgement was lost.
                    return Ok(());
                }
                if header.first_seq != head.next_seq || header.prev_hash.as_bytes() != &head.hash {
                    tracing::error!(node = %header.node, segment = %segment.id(), "an audit chain has a break");
                }
            }
            let arrivals = self.records.get::<Arrivals>(&arrivals_key).await?;
            let (count, arrivals_version) =
                arrivals.map_or((0, None), |(count, version)| (count.0, Some(version)));
            let name = format!("{count:016x}");
            let key = Key::installation(Space::AuditSegment, name.clone());
            let next = ChainHead { next_seq: header.last_seq + 1, hash: *segment.hash().as_bytes() };
            let mut tx = Tx::new()
                .expect_as_found(chain_key.clone(), chain_version)
                .expect_as_found(arrivals_key.clone(), arrivals_version)
                .put(chain_key.clone(), self.records.seal(&chain_key, &next))
                .put(arrivals_key.clone(), self.records.seal(&arrivals_key, &Arrivals(count + 1)))
                .put(key.clone(), self.records.seal_bytes(&key, &segment.encode()));
            for block in &header.tenants {
                let index = Key::new(&block.tenant, Space::AuditSegment, name.clone());
                tx = tx.put(index.clone(), self.records.seal(&index, &block.rows));
            }
            match self.records.store().commit(tx).await {
                Ok(_) => return Ok(()),
                Err(CommitError::Precondition(_)) => {}
                Err(CommitError::Unavailable(error)) => return Err(error.into()),
            }
        }
    }

    /// At most `size` rows of a tenant in the order of their arrival, from `token` on, and where to go on.
    ///
    /// # Errors
    /// `invalid_request` for a token that none of these calls gave.
    pub async fn query(
        &self,
        tenant: &TenantId,
        query: &Query,
        size: usize,
        token: Option<&str>,
    ) -> Result<(Vec<Found>, String), Error> {
        let (mut segment, mut skip) = match token {
            None => (0, 0),
            Some(token) => {
                position(token).ok_or_else(|| Error::invalid("/page_token", "is not one that a page gave"))?
            }
        };
        let owner = Owner::from(tenant);
        let mut found = Vec::new();
        let mut opened = 0;
        loop {
            let from = segment.checked_sub(1).map(|before: u64| format!("{before:016x}"));
            let index: Vec<Entry<(u64, _)>> =
                self.records.scan(&owner, Space::AuditSegment, "", Depth::All, from.as_deref(), 16).await?;
            if index.is_empty() {
                return Ok((found, format!("{segment}.{skip}")));
            }
            for entry in index {
                let at = u64::from_str_radix(entry.name(), 16).map_err(|_| Error::internal())?;
                if at != segment {
                    (segment, skip) = (at, 0);
                }
                if opened == MAX_OPENED {
                    // An empty page with a token that has moved: there may be more.
                    return Ok((found, format!("{segment}.{skip}")));
                }
                opened += 1;
                let rows = self.rows_of(tenant, entry.name()).await?;
                for (node, row) in rows.into_iter().skip(skip) {
                    if found.len() == size {
                        return Ok((found, format!("{segment}.{skip}")));
                    }
                    skip += 1;
                    if query.wants(&row) {
                        found.push(Found { row, node });
                    }
                }
                (segment, skip) = (segment + 1, 0);
            }
        }
    }

    async fn rows_of(&self, tenant: &TenantId, name: &str) -> Result<Vec<(NodeName, AuditRow)>, Error> {
        let key = Key::installation(Space::AuditSegment, name);
        let Some(row) = self.records.store().get(&key).await? else { return Ok(Vec::new()) };
        let encoded = self.records.open_bytes(&key, &row.value)?;
        let corrupt = |error: scaivault_journal::SegmentError| {
            tracing::error!(%error, segment = name, "an audit segment cannot be read");
            Error::internal()
        };
        let segment = Segment::decode(Bytes::copy_from_slice(encoded.expose())).map_err(corrupt)?;
        let rows = segment.rows(Some(tenant)).map_err(corrupt)?;
        let node = &segment.header().node;
        Ok(rows.into_iter().map(|(_, row)| (node.clone(), row)).collect())
    }

    /// The time for a row.
    pub fn now(&self) -> Timestamp {
        self.clock.now()
    }
}

impl Query {
    fn wants(&self, row: &AuditRow) -> bool {
        let path =
            if self.path.ends_with('/') { row.path.starts_with(&self.path) } else { row.path == self.path };
        self.start.is_none_or(|start| row.time >= start)
            && self.end.is_none_or(|end| row.time < end)
            && (self.path.is_empty() || path)
            && (self.principal.is_empty() || row.principal == self.principal)
    }
}

fn position(token: &str) -> Option<(u64, usize)> {
    let (segment, skip) = token.split_once('.')?;
    Some((segment.parse().ok()?, skip.parse().ok()?))
}

/// A name that sorts by time and never comes twice.
pub(crate) fn unique(time: Timestamp) -> String {
    let mut random = [0; 8];
    getrandom::fill(&mut random).expect("without the system's randomness nothing was sealed either");
    format!("{:016x}-{:016x}", time.as_millis(), u64::from_be_bytes(random))
}

fn store_unavailable() -> Error {
    Error::new(Reason::Unavailable, "the store does not answer")
}
