//! The audit journal: rows on disk before values leave, and hash-chained segments.
//!
//! ```text
//! record ──► writer ──► file of rows ──► packer ──► segment ──► next_segment … acknowledge
//!       one write for all that wait      one segment per file       in order, at least once
//! ```
//!
//! [`Journal::record`] returns `Ok` only when the row is in the file, so whoever releases a value afterwards never has an
//! answer without its row. Rows are known by node, journal id and sequence number; the numbers have no gaps and never go
//! back, and a gap that a damaged disk makes is a break of the chain ([`verify_chain`]), never a silent loss.
//!
//! # The directory
//!
//! Mode 0700, files 0600, held by one process at a time. Everything that tells anything is sealed; names of files show
//! sequence numbers and a time.
//!
//! | file | content |
//! |---|---|
//! | `head` | sealed: node, journal id, first number that is not packed, hash of the last segment; replaced as a whole |
//! | `N.rows` | frames of `len \| crc32 \| sealed row`, the first with number N; a row is sealed to its number |
//! | `N-M-T.segment` | sealed [`Segment`] of the rows N to M, the first of time T |
//! | `reserve` | zeros: space that lets the packer work on a full disk |
//! | `lock` | empty |
//! | `*.damaged` | what could not be read, kept for an investigation |
//!
//! A file of rows is closed after [`rotate_bytes`](JournalConfig::rotate_bytes) or
//! [`rotate_after`](JournalConfig::rotate_after). The packer writes its segment, syncs it, replaces the head, syncs it,
//! and only then removes the rows and offers the segment. So what was offered once is offered again byte for byte, also
//! after a crash or an upgrade, until it is acknowledged, and its numbers are never given to other rows.
//!
//! # What a crash costs
//!
//! Nothing that was acknowledged, if the process dies. If the machine loses power: nothing with [`SyncPolicy::Group`];
//! with [`SyncPolicy::None`] the rows since the last rotation, because they were in the page cache only. At open each file
//! is cut at the first row that is not whole.

mod backlog;
mod disk;
mod packer;
mod segment;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod writer;

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use scaivault_domain::audit::AuditRow;
use scaivault_domain::tenant::NodeName;
use scaivault_domain::time::Clock;
use scaivault_seal::Cipher;
use tokio::sync::{Notify, mpsc, oneshot};
use tracing::{error, warn};
use zeroize::Zeroizing;

pub use backlog::Backlog;
pub use segment::{
    ChainBreak, ChainFault, Hash, Header, JournalId, MAX_PLAIN_BYTES, Segment, SegmentError, SegmentId,
    TenantBlock, verify_chain,
};

use crate::backlog::Waiting;
use crate::disk::Disk;
use crate::packer::Packer;
use crate::writer::{Desk, Limits, Pending, Writer};

/// Most bytes of a row's JSON.
pub const MAX_ROW_BYTES: usize = 64 * 1024;

/// Most bytes of a file of rows, so that a segment stays within [`MAX_PLAIN_BYTES`].
const MAX_ROTATE_BYTES: u64 = MAX_PLAIN_BYTES / 2;

/// Rows that wait for the writer; whoever comes later waits for a place.
const QUEUE: usize = 4_096;

const RETRY_AFTER: Duration = Duration::from_secs(1);

/// When rows are safe from a power loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncPolicy {
    /// When their file is packed; the last ones may be lost.
    None,
    /// When they are acknowledged: one fdatasync for all rows of a write.
    Group,
}

/// Where a journal is and how far it may grow.
#[derive(Clone, Debug)]
pub struct JournalConfig {
    /// Its directory, and nobody else's.
    pub dir: PathBuf,
    /// Whose rows they are.
    pub node: NodeName,
    /// Most bytes that wait to be shipped. The reserve for packing, a bit more than `rotate_bytes`, comes on top.
    pub max_bytes: u64,
    /// The size at which a file is closed; at most 32 MiB.
    pub rotate_bytes: u64,
    /// The age at which a file with rows is closed.
    pub rotate_after: Duration,
    /// When rows are safe from a power loss.
    pub sync: SyncPolicy,
}

impl JournalConfig {
    /// At most 1 GiB, closed every 4 MiB or 10 s, synced before rows are acknowledged.
    pub fn new(dir: impl Into<PathBuf>, node: NodeName) -> Self {
        JournalConfig {
            dir: dir.into(),
            node,
            max_bytes: 1 << 30,
            rotate_bytes: 4 << 20,
            rotate_after: Duration::from_secs(10),
            sync: SyncPolicy::Group,
        }
    }
}

/// Why a row is not recorded, or a journal not opened.
#[derive(Clone, Debug, thiserror::Error)]
pub enum JournalError {
    /// It holds as much as it may. It takes rows again as soon as segments are acknowledged.
    #[error("the audit journal is full: it takes rows again when segments have been shipped")]
    Full,
    /// It cannot be written. The next row tries again.
    #[error("the audit journal cannot be written")]
    Unavailable(#[source] Arc<io::Error>),
    /// The row can never be recorded.
    #[error("an audit row has at most {MAX_ROW_BYTES} bytes")]
    RowTooLarge,
    /// Another process has the directory.
    #[error("the audit journal at {0} is used by another process")]
    InUse(PathBuf),
    /// The rows in the directory are another node's.
    #[error(
        "the audit journal at {dir} belongs to node `{node}`: ship it under that name, or use another directory"
    )]
    OtherNode {
        /// Which directory.
        dir: PathBuf,
        /// Whose it is.
        node: NodeName,
    },
    /// The directory cannot be read with this key.
    #[error(
        "{0} is missing, damaged or sealed with another key: restore it or its key, or move the directory away"
    )]
    Damaged(PathBuf),
}

impl From<io::Error> for JournalError {
    fn from(error: io::Error) -> Self {
        JournalError::Unavailable(Arc::new(error))
    }
}

/// The audit journal of one node. Dropping it writes what is queued and gives the directory back.
pub struct Journal {
    // Dropped in this order: the writer ends when the queue is closed, and only then can it be waited for.
    queue: mpsc::Sender<Pending>,
    _threads: Threads,
    rotate: Arc<Notify>,
    waiting: Arc<Waiting>,
    desk: Arc<Desk>,
    sync: SyncPolicy,
    disk: Arc<Disk>,
    node: NodeName,
    id: JournalId,
}

impl fmt::Debug for Journal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Journal").field("node", &self.node).finish_non_exhaustive()
    }
}

impl Journal {
    /// Opens the journal in its directory, or begins a new one if there is none.
    ///
    /// # Errors
    /// `InUse`, `OtherNode`, `Damaged`, or `Unavailable` if the directory cannot be made, read or written.
    pub fn open(
        config: JournalConfig,
        cipher: Arc<Cipher>,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, JournalError> {
        let JournalConfig { dir, node, max_bytes, rotate_bytes, rotate_after, sync } = config;
        let (disk, found) = Disk::open(&dir, &node, cipher)?;
        let disk = Arc::new(disk);
        let id = found.head.journal;
        let rotate_bytes = rotate_bytes.min(MAX_ROTATE_BYTES);
        let mut reserve = disk.reserve(rotate_bytes + 2 * MAX_ROW_BYTES as u64);
        if let Err(error) = reserve.hold() {
            warn!(%error, "the audit journal takes no rows until there is space on the disk");
        }
        let reserve = Arc::new(Mutex::new(reserve));
        let waiting = Arc::new(Waiting::new(found.rows, found.segments));
        let rotate = Arc::new(Notify::new());
        let (queue, queued) = mpsc::channel(QUEUE);

        let mut threads = Threads { waiting: waiting.clone(), running: Vec::new() };
        let packer = Packer {
            disk: disk.clone(),
            waiting: waiting.clone(),
            reserve: reserve.clone(),
            clock,
            head: found.head,
        };
        threads.start("audit-packer", move || packer.run())?;
        let limits = Limits { max_bytes, rotate_bytes, rotate_after, sync };
        let writer = Writer::new(disk.clone(), waiting.clone(), reserve, limits, found.next_seq);
        let desk = Arc::new(Desk::new(writer));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
        let (rotate_now, running) = (rotate.clone(), desk.clone());
        threads.start("audit-writer", move || runtime.block_on(running.run(queued, rotate_now)))?;
        Ok(Journal { queue, _threads: threads, rotate, waiting, desk, sync, disk, node, id })
    }

    /// Writes a row. `Ok` only when it is in the file, so the value may leave.
    ///
    /// A caller that stops waiting may leave a row behind for something that did not happen.
    ///
    /// # Errors
    /// `Full`, `Unavailable` or `RowTooLarge`; nothing may be released.
    pub async fn record(&self, row: AuditRow) -> Result<(), JournalError> {
        let json = Zeroizing::new(serde_json::to_vec(&row).expect("a row is text and numbers"));
        if json.len() > MAX_ROW_BYTES {
            return Err(JournalError::RowTooLarge);
        }
        let stopped = || JournalError::from(io::Error::other("the journal's writer has stopped"));
        let (done, written) = oneshot::channel();
        let pending = Pending { time: row.time, tenant: row.tenant, json, done };
        match self.sync {
            // It waits for the disk, which nobody else should have to.
            SyncPolicy::Group => self.queue.send(pending).await.map_err(|_| stopped())?,
            SyncPolicy::None => self.desk.bring(pending),
        }
        written.await.map_err(|_| stopped())?
    }

    /// The oldest segment that is not acknowledged, as soon as there is one. The same one until it is.
    pub async fn next_segment(&self) -> Segment {
        loop {
            let file = self.waiting.oldest_segment().await;
            let (disk, node, reading) = (self.disk.clone(), self.node.clone(), file.clone());
            let read = tokio::task::spawn_blocking(move || disk.read_segment(&node, &reading));
            match read.await.map_err(io::Error::other).flatten() {
                Ok(Some(segment)) => return segment,
                Ok(None) => {
                    error!(first_seq = file.first_seq, "a segment of the audit journal was damaged on disk");
                    if let Some(file) = self.waiting.take_segment(file.first_seq)
                        && let Err(error) = self.disk.set_segment_aside(&file)
                    {
                        warn!(%error, "cannot set the damaged segment aside");
                    }
                }
                // Acknowledged by another shipper meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound && !self.waiting.has_segment(&file) => {
                }
                Err(error) => {
                    warn!(%error, first_seq = file.first_seq, "cannot read a segment of the audit journal");
                    tokio::time::sleep(RETRY_AFTER).await;
                }
            }
        }
    }

    /// The segment is stored elsewhere: deletes it. An id that is not waiting is ignored, so this may be repeated.
    pub fn acknowledge(&self, id: &SegmentId) {
        if id.node != self.node || id.journal != self.id {
            return;
        }
        if let Some(file) = self.waiting.take_segment(id.first_seq)
            && let Err(error) = self.disk.remove_segment(&file)
        {
            warn!(%error, segment = %id, "cannot delete a shipped segment; it is shipped again after a restart");
        }
    }

    /// Closes the file that takes rows, if it has any, so that they can be shipped now.
    pub fn rotate_now(&self) {
        self.rotate.notify_one();
    }

    /// What waits to be shipped.
    pub fn backlog(&self) -> Backlog {
        self.waiting.backlog()
    }
}

/// The journal's threads, waited for when dropped.
struct Threads {
    waiting: Arc<Waiting>,
    running: Vec<JoinHandle<()>>,
}

impl Threads {
    fn start(&mut self, name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
        self.running.push(thread::Builder::new().name(name.into()).spawn(run)?);
        Ok(())
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.waiting.stop();
        for thread in self.running.drain(..) {
            if thread.join().is_err() {
                error!("a thread of the audit journal panicked");
            }
        }
    }
}
