//! The journal's directory: which files there are, how each is written, read and sealed.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use scaivault_domain::tenant::{NodeName, TenantId};
use scaivault_domain::time::Timestamp;
use scaivault_seal::{Cipher, OVERHEAD};
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::JournalError;
use crate::segment::{Hash, JournalId, PackedRow, Segment, SegmentId};

const HEAD: &str = "head";
const LOCK: &str = "lock";
const RESERVE: &str = "reserve";
const FRAME_BYTES: usize = 8;

/// Who the journal is and what was packed last.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Head {
    pub(crate) node: NodeName,
    pub(crate) journal: JournalId,
    /// The number of the first row that is not in a segment.
    pub(crate) next_seq: u64,
    /// The hash of the last segment.
    pub(crate) prev_hash: Hash,
}

/// A file of rows that takes no more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RowFile {
    pub(crate) first_seq: u64,
    pub(crate) rows: u64,
    pub(crate) bytes: u64,
    /// The time of the first row.
    pub(crate) since: Timestamp,
}

/// A segment on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SegmentFile {
    pub(crate) first_seq: u64,
    pub(crate) last_seq: u64,
    pub(crate) bytes: u64,
    /// The time of the first row.
    pub(crate) since: Timestamp,
}

impl SegmentFile {
    fn name(&self) -> String {
        format!("{:020}-{:020}-{}.segment", self.first_seq, self.last_seq, self.since.as_millis())
    }

    fn parse(name: &str, bytes: u64) -> Option<Self> {
        let mut parts = name.strip_suffix(".segment")?.splitn(3, '-');
        let first_seq = parts.next()?.parse().ok()?;
        let last_seq = parts.next()?.parse().ok()?;
        let since = Timestamp::from_millis(parts.next()?.parse().ok()?);
        Some(SegmentFile { first_seq, last_seq, bytes, since })
    }
}

fn rows_name(first_seq: u64) -> String {
    format!("{first_seq:020}.rows")
}

/// Rows read from a file, up to the first that is not whole.
pub(crate) struct WholeRows {
    pub(crate) rows: Vec<PackedRow>,
    /// The time of the first row.
    pub(crate) since: Timestamp,
    /// Where the last whole row ends.
    pub(crate) bytes: u64,
}

/// How many bytes a row of this JSON takes in a file.
pub(crate) fn framed_bytes(json: &[u8]) -> u64 {
    (FRAME_BYTES + OVERHEAD + json.len()) as u64
}

/// The directory, held by a lock for as long as this lives.
pub(crate) struct Disk {
    dir: PathBuf,
    cipher: Arc<Cipher>,
    journal: JournalId,
    _lock: File,
}

/// What was found when the directory was opened.
pub(crate) struct Found {
    pub(crate) head: Head,
    pub(crate) rows: Vec<RowFile>,
    pub(crate) segments: Vec<SegmentFile>,
    pub(crate) next_seq: u64,
}

impl Disk {
    /// Opens the directory, or makes it: takes the lock, finds or founds the journal, cuts what a crash left half written.
    pub(crate) fn open(
        dir: &Path,
        node: &NodeName,
        cipher: Arc<Cipher>,
    ) -> Result<(Self, Found), JournalError> {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        if let Err(error) = fs::set_permissions(dir, Permissions::from_mode(0o700)) {
            warn!(%error, "cannot close the journal's directory to others; what is in it is sealed");
        }
        let lock = create_or_empty(&dir.join(LOCK))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(JournalError::InUse(dir.to_owned())),
            Err(TryLockError::Error(error)) => return Err(error.into()),
        }
        let listing = Listing::read(dir)?;
        let mut disk = Disk { dir: dir.to_owned(), cipher, journal: JournalId([0; 16]), _lock: lock };
        let mut head = disk.read_or_found_head(node, &listing)?;
        disk.journal = head.journal;
        let found = disk.recover(&mut head, listing)?;
        Ok((disk, found))
    }

    fn read_or_found_head(&self, node: &NodeName, listing: &Listing) -> Result<Head, JournalError> {
        let damaged = || JournalError::Damaged(self.dir.join(HEAD));
        let head: Head = match fs::read(self.dir.join(HEAD)) {
            Ok(sealed) => {
                let plain = self.cipher.open(b"head", &sealed).map_err(|_| damaged())?;
                serde_json::from_slice(&plain).map_err(|_| damaged())?
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if !listing.rows.is_empty() || !listing.segments.is_empty() {
                    return Err(damaged());
                }
                let mut id = [0; 16];
                getrandom::fill(&mut id).expect("the operating system has random bytes");
                let head =
                    Head { node: node.clone(), journal: JournalId(id), next_seq: 1, prev_hash: Hash::NONE };
                self.write_head(&head)?;
                head
            }
            Err(error) => return Err(error.into()),
        };
        if head.node != *node {
            return Err(JournalError::OtherNode { dir: self.dir.clone(), node: head.node });
        }
        Ok(head)
    }

    /// A crash may have left: a segment that the head does not know yet, a file of rows that is in a segment already, a
    /// half-written row at the end of a file, rows behind the place where a failed file was given up.
    fn recover(&self, head: &mut Head, listing: Listing) -> io::Result<Found> {
        let Listing { rows, mut segments } = listing;
        if let Some(last) = segments.pop_if(|last| last.last_seq >= head.next_seq) {
            match self.read_segment(&head.node, &last)? {
                Some(segment) => {
                    (head.next_seq, head.prev_hash) = (last.last_seq + 1, segment.hash());
                    segments.push(last);
                }
                None => self.set_aside(&last.name())?,
            }
        }
        let mut next_seq = head.next_seq;
        let mut kept = Vec::new();
        for (n, &first_seq) in rows.iter().enumerate() {
            let limit = rows.get(n + 1).map_or(u64::MAX, |next| next - first_seq);
            let whole = self.read_rows(first_seq, limit)?;
            if first_seq < head.next_seq || whole.rows.is_empty() {
                self.remove_rows(first_seq)?;
                continue;
            }
            self.cut_rows(first_seq, whole.bytes)?;
            let file =
                RowFile { first_seq, rows: whole.rows.len() as u64, bytes: whole.bytes, since: whole.since };
            next_seq = first_seq + file.rows;
            kept.push(file);
        }
        Ok(Found { head: head.clone(), rows: kept, segments, next_seq })
    }

    fn cut_rows(&self, first_seq: u64, bytes: u64) -> io::Result<()> {
        let file = OpenOptions::new().write(true).open(self.dir.join(rows_name(first_seq)))?;
        let found = file.metadata()?.len();
        if found == bytes {
            return Ok(());
        }
        warn!(first_seq, bytes = found - bytes, "cut what was not whole from the end of the audit journal");
        file.set_len(bytes)
    }

    /// An empty file for rows from `first_seq`. A file of this name has no row that anybody was told of.
    pub(crate) fn create_rows(&self, first_seq: u64) -> io::Result<File> {
        let file = create_or_empty(&self.dir.join(rows_name(first_seq)))?;
        self.sync_dir()?;
        Ok(file)
    }

    /// Seals a row to its number and puts it in a frame: `len | crc32(len, sealed row) | sealed row`.
    pub(crate) fn frame_row(&self, seq: u64, json: &[u8], into: &mut Vec<u8>) {
        let sealed = self.cipher.seal(&self.row_aad(seq), json);
        let len = u32::try_from(sealed.len()).expect("a row is at most 64 KiB").to_be_bytes();
        into.extend(len);
        into.extend(checksum(len, &sealed).to_be_bytes());
        into.extend(sealed);
    }

    /// The first `limit` rows of a file, or those before the first that is not whole.
    pub(crate) fn read_rows(&self, first_seq: u64, limit: u64) -> io::Result<WholeRows> {
        let content = fs::read(self.dir.join(rows_name(first_seq)))?;
        let mut whole = WholeRows { rows: Vec::new(), since: Timestamp::default(), bytes: 0 };
        let mut rest = content.as_slice();
        while (whole.rows.len() as u64) < limit {
            let seq = first_seq + whole.rows.len() as u64;
            let Some((time, row, after)) = self.read_row(seq, rest) else { break };
            if whole.rows.is_empty() {
                whole.since = time;
            }
            whole.rows.push(row);
            rest = after;
        }
        whole.bytes = (content.len() - rest.len()) as u64;
        Ok(whole)
    }

    fn read_row<'c>(&self, seq: u64, content: &'c [u8]) -> Option<(Timestamp, PackedRow, &'c [u8])> {
        #[derive(Deserialize)]
        struct Place {
            time: Timestamp,
            tenant: TenantId,
        }
        let (len, rest) = content.split_first_chunk()?;
        let (crc, rest) = rest.split_first_chunk()?;
        let (sealed, rest) = rest.split_at_checked(u32::from_be_bytes(*len) as usize)?;
        if checksum(*len, sealed) != u32::from_be_bytes(*crc) {
            return None;
        }
        let json = self.cipher.open(&self.row_aad(seq), sealed).ok()?;
        let Place { time, tenant } = serde_json::from_slice(&json).ok()?;
        Some((time, PackedRow { tenant, json }, rest))
    }

    pub(crate) fn remove_rows(&self, first_seq: u64) -> io::Result<()> {
        fs::remove_file(self.dir.join(rows_name(first_seq)))
    }

    pub(crate) fn set_rows_aside(&self, first_seq: u64) -> io::Result<()> {
        self.set_aside(&rows_name(first_seq))
    }

    /// On disk, sealed, when this returns.
    pub(crate) fn write_segment(&self, segment: &Segment, since: Timestamp) -> io::Result<SegmentFile> {
        let header = segment.header();
        let sealed = self.cipher.seal(&self.segment_aad(header.first_seq), &segment.encode());
        let file = SegmentFile {
            first_seq: header.first_seq,
            last_seq: header.last_seq,
            bytes: sealed.len() as u64,
            since,
        };
        self.replace(&file.name(), &sealed)?;
        Ok(file)
    }

    /// `None`: it was damaged.
    pub(crate) fn read_segment(&self, node: &NodeName, file: &SegmentFile) -> io::Result<Option<Segment>> {
        let sealed = fs::read(self.dir.join(file.name()))?;
        let plain = self.cipher.open(&self.segment_aad(file.first_seq), &sealed);
        let segment =
            plain.ok().and_then(|mut plain| Segment::decode(std::mem::take(&mut *plain).into()).ok());
        let id = SegmentId { node: node.clone(), journal: self.journal, first_seq: file.first_seq };
        Ok(segment.filter(|segment| segment.id() == id && segment.header().last_seq == file.last_seq))
    }

    pub(crate) fn remove_segment(&self, file: &SegmentFile) -> io::Result<()> {
        fs::remove_file(self.dir.join(file.name()))
    }

    pub(crate) fn set_segment_aside(&self, file: &SegmentFile) -> io::Result<()> {
        self.set_aside(&file.name())
    }

    /// Keeps what cannot be read where an investigator will look and no restart trips over it.
    fn set_aside(&self, name: &str) -> io::Result<()> {
        fs::rename(self.dir.join(name), self.dir.join(format!("{name}.damaged")))
    }

    /// On disk, sealed, when this returns.
    pub(crate) fn write_head(&self, head: &Head) -> io::Result<()> {
        let plain = serde_json::to_vec(head).expect("names and numbers");
        self.replace(HEAD, &self.cipher.seal(b"head", &plain))
    }

    fn replace(&self, name: &str, content: &[u8]) -> io::Result<()> {
        let new = self.dir.join(format!("{name}.new"));
        let mut file = create_or_empty(&new)?;
        let written = file.write_all(content).and_then(|()| file.sync_all());
        if let Err(error) = written {
            // It may be the space that is missing.
            let _ = fs::remove_file(&new);
            return Err(error);
        }
        fs::rename(&new, self.dir.join(name))?;
        self.sync_dir()
    }

    fn sync_dir(&self) -> io::Result<()> {
        File::open(&self.dir)?.sync_all()
    }

    fn row_aad(&self, seq: u64) -> Vec<u8> {
        [b"row".as_slice(), &self.journal.0, &seq.to_be_bytes()].concat()
    }

    fn segment_aad(&self, first_seq: u64) -> Vec<u8> {
        [b"segment".as_slice(), &self.journal.0, &first_seq.to_be_bytes()].concat()
    }

    pub(crate) fn reserve(&self, bytes: u64) -> Reserve {
        let path = self.dir.join(RESERVE);
        let held = fs::metadata(&path).is_ok_and(|metadata| metadata.len() == bytes);
        Reserve { path, bytes, held }
    }
}

struct Listing {
    rows: Vec<u64>,
    segments: Vec<SegmentFile>,
}

impl Listing {
    fn read(dir: &Path) -> io::Result<Self> {
        let mut listing = Listing { rows: Vec::new(), segments: Vec::new() };
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            if name.ends_with(".new") {
                fs::remove_file(entry.path())?;
            } else if let Some(first_seq) = name.strip_suffix(".rows").and_then(|seq| seq.parse().ok()) {
                listing.rows.push(first_seq);
            } else if let Some(file) = SegmentFile::parse(name, entry.metadata()?.len()) {
                listing.segments.push(file);
            }
        }
        listing.rows.sort_unstable();
        listing.segments.sort_unstable_by_key(|file| file.first_seq);
        Ok(listing)
    }
}

/// Space set apart for packing. Rows are written only while it is held, so a disk that the journal has filled can still
/// turn rows into a segment, which is how space is won back.
pub(crate) struct Reserve {
    path: PathBuf,
    bytes: u64,
    held: bool,
}

impl Reserve {
    pub(crate) fn hold(&mut self) -> io::Result<()> {
        if self.held {
            return Ok(());
        }
        let mut file = create_or_empty(&self.path)?;
        if let Err(error) = io::copy(&mut io::Read::take(io::repeat(0), self.bytes), &mut file) {
            // Half a reserve would take the space that somebody else may be waiting for.
            let _ = fs::remove_file(&self.path);
            return Err(error);
        }
        self.held = true;
        Ok(())
    }

    pub(crate) fn release(&mut self) {
        self.held = false;
        // Gone already, or not removable, and then the write that needs the space fails and says so.
        let _ = fs::remove_file(&self.path);
    }
}

fn create_or_empty(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)
}

/// Covers the length, so that a tail of zeros is no row.
fn checksum(len: [u8; 4], sealed: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&len);
    crc.update(sealed);
    crc.finalize()
}
