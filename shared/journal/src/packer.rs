//! The one thread that turns closed files of rows into segments.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use scaivault_domain::time::Clock;
use tracing::{error, warn};

use crate::backlog::Waiting;
use crate::disk::{Disk, Head, Reserve, RowFile, SegmentFile};
use crate::segment::{Segment, SegmentId};

const RETRY_AFTER: Duration = Duration::from_secs(1);

pub(crate) struct Packer {
    pub(crate) disk: Arc<Disk>,
    pub(crate) waiting: Arc<Waiting>,
    pub(crate) reserve: Arc<Mutex<Reserve>>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) head: Head,
}

impl Packer {
    /// Packs what is closed, oldest first, until the journal stops.
    pub(crate) fn run(mut self) {
        while let Some(file) = self.waiting.next_rows() {
            if let Err(error) = self.pack(&file) {
                warn!(%error, first_seq = file.first_seq, "cannot pack rows of the audit journal; trying again");
                self.waiting.pause_packing(RETRY_AFTER);
            }
        }
    }

    /// May run twice over the same rows: nothing of a segment is offered before the head, which comes last, is written.
    pub(crate) fn pack(&mut self, file: &RowFile) -> io::Result<()> {
        let rows = match self.waiting.take_kept(file) {
            Some(rows) => rows,
            None => self.disk.read_rows(file.first_seq, file.rows)?.rows,
        };
        let missing = file.rows - rows.len() as u64;
        if missing > 0 {
            // The gap in the numbers shows in the chain.
            error!(
                first_seq = file.first_seq,
                rows = missing,
                "rows of the audit journal were damaged on disk"
            );
        }
        if rows.is_empty() {
            self.disk.set_rows_aside(file.first_seq)?;
            self.waiting.packed(None);
            return Ok(());
        }
        let Head { node, journal, .. } = self.head.clone();
        let id = SegmentId { node, journal, first_seq: file.first_seq };
        let segment = Segment::pack(id, &rows, self.clock.now(), self.head.prev_hash)?;

        let reserve = self.reserve.clone();
        let mut released = None;
        let stored = self.store(&segment, file).or_else(|error| {
            if !matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
                return Err(error);
            }
            let reserve = released.insert(reserve.lock().unwrap_or_else(PoisonError::into_inner));
            reserve.release();
            self.store(&segment, file)
        })?;
        let cleared = if missing > 0 {
            self.disk.set_rows_aside(file.first_seq)
        } else {
            self.disk.remove_rows(file.first_seq)
        };
        if let Err(error) = cleared {
            warn!(%error, first_seq = file.first_seq, "cannot remove packed rows; the next start does it");
        }
        self.waiting.packed(Some(stored));
        if let Some(mut reserve) = released
            && let Err(error) = reserve.hold()
        {
            warn!(%error, "the audit journal takes no rows until there is space on the disk again");
        }
        Ok(())
    }

    fn store(&mut self, segment: &Segment, file: &RowFile) -> io::Result<SegmentFile> {
        let stored = self.disk.write_segment(segment, file.since)?;
        let head = Head { next_seq: stored.last_seq + 1, prev_hash: segment.hash(), ..self.head.clone() };
        self.disk.write_head(&head)?;
        self.head = head;
        Ok(stored)
    }
}
