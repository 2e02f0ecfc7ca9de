//! What is on disk and not acknowledged yet; shared by the writer, the packer and whoever ships.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use scaivault_domain::time::Timestamp;
use tokio::sync::Notify;

use crate::disk::{RowFile, SegmentFile};
use crate::segment::PackedRow;

/// What waits to be shipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backlog {
    /// Bytes on disk, which is what the journal's limit is about.
    pub bytes: u64,
    /// Closed files, packed or not.
    pub segments: usize,
    /// The time of the oldest row.
    pub oldest: Option<Timestamp>,
}

#[derive(Default)]
struct State {
    /// Oldest first. Every row in it is newer than those in `segments`.
    rows: VecDeque<RowFile>,
    /// What is in the newest of them, by the number of the first row.
    kept: Option<(u64, Vec<PackedRow>)>,
    segments: VecDeque<SegmentFile>,
    closed_bytes: u64,
    active_bytes: u64,
    active_since: Option<Timestamp>,
    stopping: bool,
}

pub(crate) struct Waiting {
    state: Mutex<State>,
    /// Rows were closed, or the journal stops.
    packable: Condvar,
    /// A segment was packed.
    shippable: Notify,
}

impl Waiting {
    pub(crate) fn new(rows: Vec<RowFile>, segments: Vec<SegmentFile>) -> Self {
        let closed_bytes =
            rows.iter().map(|file| file.bytes).chain(segments.iter().map(|file| file.bytes)).sum();
        let state = State { rows: rows.into(), segments: segments.into(), closed_bytes, ..State::default() };
        Waiting { state: Mutex::new(state), packable: Condvar::new(), shippable: Notify::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn backlog(&self) -> Backlog {
        let state = self.state();
        let segment = state.segments.front().map(|file| file.since);
        let rows = state.rows.front().map(|file| file.since);
        Backlog {
            bytes: state.closed_bytes + state.active_bytes,
            segments: state.segments.len() + state.rows.len(),
            oldest: segment.or(rows).or(state.active_since),
        }
    }

    /// The file that takes rows grew to `bytes`; its first row is of `since`.
    pub(crate) fn grew(&self, bytes: u64, since: Timestamp) {
        let mut state = self.state();
        (state.active_bytes, state.active_since) = (bytes, Some(since));
    }

    /// The file that took rows is closed. What is in it is kept until the next one is: a packer that falls behind reads
    /// from the disk.
    pub(crate) fn closed(&self, file: RowFile, rows: Vec<PackedRow>) {
        let mut state = self.state();
        (state.active_bytes, state.active_since) = (0, None);
        state.closed_bytes += file.bytes;
        state.kept = Some((file.first_seq, rows));
        state.rows.push_back(file);
        self.packable.notify_all();
    }

    pub(crate) fn stop(&self) {
        self.state().stopping = true;
        self.packable.notify_all();
    }

    /// The oldest file of rows, as soon as there is one; `None` when the journal stops.
    pub(crate) fn next_rows(&self) -> Option<RowFile> {
        let state = self.state();
        let state = self
            .packable
            .wait_while(state, |state| !state.stopping && state.rows.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        if state.stopping { None } else { state.rows.front().cloned() }
    }

    /// What is in a file, if it is still kept.
    pub(crate) fn take_kept(&self, file: &RowFile) -> Option<Vec<PackedRow>> {
        let mut state = self.state();
        let (_, rows) = state.kept.take_if(|(first_seq, _)| *first_seq == file.first_seq)?;
        (rows.len() as u64 == file.rows).then_some(rows)
    }

    /// Waits for `pause`, or until the journal stops.
    pub(crate) fn pause_packing(&self, pause: Duration) {
        let state = self.state();
        // What ends the wait does not matter: the caller looks again.
        drop(self.packable.wait_timeout_while(state, pause, |state| !state.stopping));
    }

    /// The oldest file of rows became `segment`, or nothing if none of its rows could be read.
    pub(crate) fn packed(&self, segment: Option<SegmentFile>) {
        let mut state = self.state();
        if let Some(rows) = state.rows.pop_front() {
            state.closed_bytes -= rows.bytes;
        }
        if let Some(segment) = segment {
            state.closed_bytes += segment.bytes;
            state.segments.push_back(segment);
        }
        self.shippable.notify_waiters();
    }

    /// The oldest segment, as soon as there is one.
    pub(crate) async fn oldest_segment(&self) -> SegmentFile {
        loop {
            let packed = self.shippable.notified();
            if let Some(file) = self.state().segments.front() {
                return file.clone();
            }
            packed.await;
        }
    }

    pub(crate) fn has_segment(&self, file: &SegmentFile) -> bool {
        self.state().segments.contains(file)
    }

    /// Takes the segment that begins at `first_seq` from the queue, if it is still in it.
    pub(crate) fn take_segment(&self, first_seq: u64) -> Option<SegmentFile> {
        let mut state = self.state();
        let at = state.segments.iter().position(|file| file.first_seq == first_seq)?;
        let file = state.segments.remove(at)?;
        state.closed_bytes -= file.bytes;
        Some(file)
    }
}
