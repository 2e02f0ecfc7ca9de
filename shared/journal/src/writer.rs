//! Writing rows.
//!
//! Rows that must outlive a power loss are written by a thread of their own, one fdatasync for all that wait. Rows that
//! need not are written by whoever brings them: if nobody is writing they write at once, and whoever comes meanwhile
//! leaves theirs to them. Handing a row to a thread and waiting for it costs more than the write.

use std::fs::File;
use std::io::{self, Write as _};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

use scaivault_domain::tenant::TenantId;
use scaivault_domain::time::Timestamp;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::Instant;
use tracing::warn;
use zeroize::Zeroizing;

use crate::backlog::Waiting;
use crate::disk::{Disk, Reserve, RowFile, framed_bytes};
use crate::segment::PackedRow;
use crate::{JournalError, SyncPolicy};

/// As good as never.
const FAR: Duration = Duration::from_secs(24 * 3600);
/// Most rows of one write.
const BATCH: usize = 1_024;

/// A row on its way, and who waits for it.
pub(crate) struct Pending {
    pub(crate) time: Timestamp,
    pub(crate) tenant: TenantId,
    pub(crate) json: Zeroizing<Vec<u8>>,
    pub(crate) done: oneshot::Sender<Result<(), JournalError>>,
}

pub(crate) struct Limits {
    pub(crate) max_bytes: u64,
    pub(crate) rotate_bytes: u64,
    pub(crate) rotate_after: Duration,
    pub(crate) sync: SyncPolicy,
}

/// The file that takes rows. It has at least one.
struct Active {
    file: File,
    closed: RowFile,
    opened: Instant,
    /// What is in it: the packer need not read it back.
    rows: Vec<PackedRow>,
}

pub(crate) struct Writer {
    disk: Arc<Disk>,
    waiting: Arc<Waiting>,
    reserve: Arc<Mutex<Reserve>>,
    limits: Limits,
    next_seq: u64,
    active: Option<Active>,
}

impl Writer {
    pub(crate) fn new(
        disk: Arc<Disk>,
        waiting: Arc<Waiting>,
        reserve: Arc<Mutex<Reserve>>,
        limits: Limits,
        next_seq: u64,
    ) -> Self {
        Writer { disk, waiting, reserve, limits, next_seq, active: None }
    }

    /// Writes rows in order and tells each caller how it ended.
    fn write(&mut self, rows: impl Iterator<Item = Pending>) {
        let mut rows = rows.peekable();
        if let Err(error) = self.reserve.lock().unwrap_or_else(PoisonError::into_inner).hold() {
            return refuse(rows, &error.into());
        }
        while rows.peek().is_some() {
            let chunk = self.take_what_fits(&mut rows);
            if chunk.is_empty() {
                // What is in the active file can only be shipped, and make room, once it is closed.
                self.rotate();
                return refuse(rows, &JournalError::Full);
            }
            match self.append(&chunk) {
                Ok(()) => {
                    for Pending { tenant, json, done, .. } in chunk {
                        if let Some(active) = &mut self.active {
                            active.rows.push(PackedRow { tenant, json });
                        }
                        // A caller that hung up has a row too many, which is no harm.
                        let _ = done.send(Ok(()));
                    }
                }
                Err(error) => refuse(chunk.into_iter(), &error.into()),
            }
            if self.active_bytes() >= self.limits.rotate_bytes {
                self.rotate();
            }
        }
    }

    /// When to look whether the active file is old enough to be closed. One that is begun meanwhile is younger.
    fn due(&self) -> Instant {
        let opened = self.active.as_ref().map_or_else(Instant::now, |active| active.opened);
        opened.checked_add(self.limits.rotate_after).unwrap_or_else(|| Instant::now() + FAR)
    }

    fn rotate_if_due(&mut self) {
        if self.active.is_some() && self.due() <= Instant::now() {
            self.rotate();
        }
    }

    fn active_bytes(&self) -> u64 {
        self.active.as_ref().map_or(0, |active| active.closed.bytes)
    }

    /// Rows up to the one that fills the active file, as far as the journal's limit lets them.
    fn take_what_fits(&self, rows: &mut std::iter::Peekable<impl Iterator<Item = Pending>>) -> Vec<Pending> {
        let room = self.limits.max_bytes.saturating_sub(self.waiting.backlog().bytes);
        let until_full = self.limits.rotate_bytes.saturating_sub(self.active_bytes());
        let mut chunk = Vec::new();
        let mut bytes = 0;
        while bytes < until_full
            && let Some(row) = rows.next_if(|row| bytes + framed_bytes(&row.json) <= room)
        {
            bytes += framed_bytes(&row.json);
            chunk.push(row);
        }
        chunk
    }

    /// Writes all of `rows` or none that anybody will read. A file that fails is given up for a new one, once.
    fn append(&mut self, rows: &[Pending]) -> io::Result<()> {
        let mut frames = Vec::new();
        for (seq, row) in (self.next_seq..).zip(rows) {
            self.disk.frame_row(seq, &row.json, &mut frames);
        }
        let since = rows.first().map_or_else(Timestamp::default, |row| row.time);
        let continues = self.active.is_some();
        match self.append_once(&frames, rows.len(), since) {
            Err(error) if continues => {
                warn!(%error, "the audit journal begins a new file after a write error");
                self.append_once(&frames, rows.len(), since)
            }
            result => result,
        }
    }

    fn append_once(&mut self, frames: &[u8], rows: usize, since: Timestamp) -> io::Result<()> {
        let mut active = match self.active.take() {
            Some(active) => active,
            None => Active {
                file: self.disk.create_rows(self.next_seq)?,
                closed: RowFile { first_seq: self.next_seq, rows: 0, bytes: 0, since },
                opened: Instant::now(),
                rows: Vec::new(),
            },
        };
        let written = active.file.write_all(frames).and_then(|()| match self.limits.sync {
            SyncPolicy::Group => active.file.sync_data(),
            SyncPolicy::None => Ok(()),
        });
        if let Err(error) = written {
            self.give_up(active);
            return Err(error);
        }
        active.closed.rows += rows as u64;
        active.closed.bytes += frames.len() as u64;
        self.next_seq += rows as u64;
        self.waiting.grew(active.closed.bytes, active.closed.since);
        self.active = Some(active);
        Ok(())
    }

    /// Nothing is written behind a failed write. If the file cannot even be cut, what is behind its last good row is not
    /// read: the number of its rows is known, and after a restart the next file's name tells it.
    fn give_up(&self, active: Active) {
        if active.closed.rows == 0 {
            if let Err(error) = self.disk.remove_rows(active.closed.first_seq) {
                warn!(%error, "cannot remove an empty file of the audit journal");
            }
            return;
        }
        if let Err(error) = active.file.set_len(active.closed.bytes) {
            warn!(%error, "cannot cut a failed file of the audit journal");
        }
        self.waiting.closed(active.closed, active.rows);
    }

    fn rotate(&mut self) {
        if let Some(active) = self.active.take() {
            self.waiting.closed(active.closed, active.rows);
        }
    }
}

/// The writer, and the rows that wait for it.
pub(crate) struct Desk {
    writer: Mutex<Writer>,
    waiting: Mutex<Vec<Pending>>,
}

impl Desk {
    pub(crate) fn new(writer: Writer) -> Self {
        Desk { writer: Mutex::new(writer), waiting: Mutex::default() }
    }

    /// Writes a row, and those that others bring meanwhile; or leaves it to whoever is writing.
    pub(crate) fn bring(&self, row: Pending) {
        self.waiting().push(row);
        self.work_off();
    }

    /// Writes the rows that wait. Whoever held the writer calls this after letting go of it, so that no row is left
    /// behind: it may have been brought meanwhile.
    fn work_off(&self) {
        while !self.waiting().is_empty() {
            let mut writer = match self.writer.try_lock() {
                Ok(writer) => writer,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => return,
            };
            loop {
                let rows = std::mem::take(&mut *self.waiting());
                if rows.is_empty() {
                    break;
                }
                writer.write(rows.into_iter());
            }
        }
    }

    /// Writes what comes by the queue until it is closed and empty, and closes files when it is time.
    pub(crate) async fn run(self: Arc<Self>, mut queue: mpsc::Receiver<Pending>, rotate_now: Arc<Notify>) {
        let mut batch = Vec::with_capacity(BATCH);
        loop {
            let due = self.writer().due();
            self.work_off();
            tokio::select! {
                received = queue.recv_many(&mut batch, BATCH) => match received {
                    0 => break,
                    _ => self.writer().write(batch.drain(..)),
                },
                () = rotate_now.notified() => self.writer().rotate(),
                () = tokio::time::sleep_until(due) => self.writer().rotate_if_due(),
            }
        }
        if let Some(active) = &self.writer().active
            && let Err(error) = active.file.sync_data()
        {
            warn!(%error, "the last rows of the audit journal may not outlive a power loss");
        }
        self.work_off();
    }

    fn writer(&self) -> MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn waiting(&self) -> MutexGuard<'_, Vec<Pending>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn refuse(rows: impl Iterator<Item = Pending>, error: &JournalError) {
    // A caller that hung up does not mind.
    rows.for_each(|row| drop(row.done.send(Err(error.clone()))));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{cipher, node, row};

    struct Bench {
        dir: tempfile::TempDir,
        disk: Arc<Disk>,
        writer: Writer,
    }

    fn bench() -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let (disk, found) = Disk::open(dir.path(), &node(), cipher()).unwrap();
        let disk = Arc::new(disk);
        let limits = Limits {
            max_bytes: 1 << 20,
            rotate_bytes: 1 << 16,
            rotate_after: Duration::MAX,
            sync: SyncPolicy::Group,
        };
        let waiting = Arc::new(Waiting::new(Vec::new(), Vec::new()));
        let reserve = Arc::new(Mutex::new(disk.reserve(1)));
        let writer = Writer::new(disk.clone(), waiting, reserve, limits, found.next_seq);
        Bench { dir, disk, writer }
    }

    impl Bench {
        fn write(&mut self, path: &str) -> Result<(), JournalError> {
            let row = row("t", path);
            let (done, mut answer) = oneshot::channel();
            let json = serde_json::to_vec(&row).unwrap().into();
            let pending = Pending { time: row.time, tenant: row.tenant, json, done };
            self.writer.write(std::iter::once(pending));
            answer.try_recv().unwrap()
        }

        /// From now on neither writing to the active file nor cutting it works.
        fn break_active_file(&mut self) {
            let active = self.writer.active.as_mut().unwrap();
            let name = format!("{:020}.rows", active.closed.first_seq);
            active.file = File::open(self.dir.path().join(name)).unwrap();
        }

        fn counts_after_reopen(self) -> Vec<(u64, u64)> {
            let Bench { dir, disk, writer } = self;
            drop((disk, writer));
            let (_, found) = Disk::open(dir.path(), &node(), cipher()).unwrap();
            found.rows.iter().map(|file| (file.first_seq, file.rows)).collect()
        }
    }

    #[test]
    fn a_row_that_comes_while_the_writer_is_busy_is_not_left_behind() {
        let Bench { dir: _dir, writer, .. } = bench();
        let desk = Desk::new(writer);
        let (done, mut answer) = oneshot::channel();
        let busy = desk.writer();
        let row = row("t", "a");
        let json = serde_json::to_vec(&row).unwrap().into();
        desk.bring(Pending { time: row.time, tenant: row.tenant, json, done });
        assert!(answer.try_recv().is_err(), "somebody else has the writer");
        drop(busy);
        desk.work_off();
        answer.try_recv().unwrap().unwrap();
    }

    #[test]
    fn a_file_that_fails_is_given_up_and_the_row_goes_to_a_new_one() {
        let mut bench = bench();
        bench.write("a").unwrap();
        bench.write("b").unwrap();
        bench.break_active_file();
        bench.write("c").unwrap();
        assert_eq!(bench.counts_after_reopen(), [(1, 2), (3, 1)]);
    }

    #[test]
    fn rows_behind_a_failed_write_are_not_read_when_the_file_could_not_be_cut() {
        let mut bench = bench();
        bench.write("a").unwrap();
        let mut refused = Vec::new();
        bench.disk.frame_row(2, &serde_json::to_vec(&row("t", "refused")).unwrap(), &mut refused);
        bench.writer.active.as_mut().unwrap().file.write_all(&refused).unwrap();
        bench.break_active_file();
        bench.write("b").unwrap();
        let closed = bench.writer.waiting.next_rows().unwrap();
        assert_eq!(bench.disk.read_rows(closed.first_seq, closed.rows).unwrap().rows.len(), 1);
        assert_eq!(bench.counts_after_reopen(), [(1, 1), (2, 1)]);
    }

    #[tokio::test]
    async fn a_row_that_is_brought_while_a_file_is_closed_is_written_afterwards() {
        let Bench { dir: _dir, disk: _disk, writer } = bench();
        let desk = Arc::new(Desk::new(writer));
        let row = row("t", "a");
        let (done, written) = oneshot::channel();
        let closing = desk.writer();
        let json = serde_json::to_vec(&row).unwrap().into();
        desk.bring(Pending { time: row.time, tenant: row.tenant, json, done });
        drop(closing);
        let (_open, queue) = mpsc::channel(1);
        let running = tokio::spawn(desk.run(queue, Arc::default()));
        written.await.unwrap().unwrap();
        running.abort();
    }

    #[test]
    fn a_file_is_closed_by_the_row_that_fills_it() {
        let mut bench = bench();
        let path = "p".repeat(500);
        while bench.writer.waiting.backlog().segments == 0 {
            bench.write(&path).unwrap();
        }
        let bytes = bench.writer.waiting.next_rows().unwrap().bytes;
        assert!((1 << 16..(1 << 16) + 1_000).contains(&bytes), "{bytes}");
    }
}
