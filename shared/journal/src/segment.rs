//! Segments: what a journal ships. Rows in one compressed block per tenant, chained by hash.
//!
//! ```text
//! "SVAS" | format(1) | header length (u32 BE) | header (JSON) | blocks, in the header's order | SHA-256 of all before
//! ```
//!
//! A block is zstd over lines of `{"seq":…,"row":{…}}`. The hash covers the compressed bytes, and a header names the hash
//! of the segment before it, so whoever holds a later hash can tell that nothing before it was changed, taken out or put
//! in another order.

use std::collections::BTreeMap;
use std::fmt;

use bytes::Bytes;
use scaivault_domain::audit::AuditRow;
use scaivault_domain::tenant::{NodeName, TenantId};
use scaivault_domain::time::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

const MAGIC: &[u8; 5] = b"SVAS\x01";
const HASH_BYTES: usize = 32;
const LEVEL: i32 = 3;

/// Most bytes that the rows of one segment have when they are decompressed.
pub const MAX_PLAIN_BYTES: u64 = 64 * 1024 * 1024;

macro_rules! hex_bytes {
    ($(#[$doc:meta])* $type:ident, $len:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $type(pub(crate) [u8; $len]);

        impl $type {
            /// Takes the bytes.
            pub fn from_bytes(bytes: [u8; $len]) -> Self {
                $type(bytes)
            }

            /// The bytes.
            pub fn as_bytes(&self) -> &[u8; $len] {
                &self.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl From<$type> for String {
            fn from(bytes: $type) -> String {
                bytes.to_string()
            }
        }

        impl TryFrom<String> for $type {
            type Error = &'static str;

            fn try_from(text: String) -> Result<Self, Self::Error> {
                const FAULT: &str = concat!("is not ", $len, " bytes in lower-case hexadecimal");
                let mut bytes = [0; $len];
                let digits = text.as_bytes();
                if digits.len() != 2 * $len {
                    return Err(FAULT);
                }
                for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
                    *byte = nibble(pair[0]).ok_or(FAULT)? << 4 | nibble(pair[1]).ok_or(FAULT)?;
                }
                Ok($type(bytes))
            }
        }
    };
}

fn nibble(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    }
}

hex_bytes! {
    /// A random id, made once per journal directory: a node that lost its directory begins a new journal.
    JournalId, 16
}
hex_bytes! {
    /// The SHA-256 that ends a segment and that the next one's header repeats.
    Hash, 32
}

impl Hash {
    /// What stands for the hash before a journal's first segment.
    pub const NONE: Hash = Hash([0; 32]);
}

/// What a segment is known by: the same wherever and however often it is shipped.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SegmentId {
    /// Which node wrote it.
    pub node: NodeName,
    /// Which of the node's journals.
    pub journal: JournalId,
    /// The sequence number of its first row.
    pub first_seq: u64,
}

impl fmt::Display for SegmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.node, self.journal, self.first_seq)
    }
}

/// What a segment says about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// Which node wrote it.
    pub node: NodeName,
    /// Which of the node's journals.
    pub journal: JournalId,
    /// The sequence number of its first row; a journal's first is 1.
    pub first_seq: u64,
    /// The sequence number of its last row. None is missing between the two.
    pub last_seq: u64,
    /// How many rows it has.
    pub rows: u64,
    /// One block per tenant, in the order of their ids.
    pub tenants: Vec<TenantBlock>,
    /// When it was packed.
    pub created: Timestamp,
    /// The hash of the segment before it, [`Hash::NONE`] for the first.
    pub prev_hash: Hash,
}

/// The rows of one tenant in a segment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TenantBlock {
    /// Whose they are.
    pub tenant: TenantId,
    /// How many.
    pub rows: u64,
    /// Size of the block.
    pub bytes: u64,
    /// Size of the block when it is decompressed.
    pub plain_bytes: u64,
}

/// Why bytes are no segment, or a segment's rows cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SegmentError {
    /// Not the beginning of a segment of a format that this version knows.
    #[error("these bytes are no audit segment of a known format")]
    NoSegment,
    /// The hash at the end is not that of the bytes before it.
    #[error("the audit segment was altered: its hash does not match")]
    Altered,
    /// The hash matches, but the content contradicts itself; whoever made it was no journal.
    #[error("the audit segment contradicts itself: {0}")]
    Inconsistent(&'static str),
}

/// A row as it is packed: its tenant, and its JSON as it was written.
pub(crate) struct PackedRow {
    pub(crate) tenant: TenantId,
    pub(crate) json: zeroize::Zeroizing<Vec<u8>>,
}

#[derive(Deserialize)]
struct Line {
    seq: u64,
    row: AuditRow,
}

/// A closed part of a journal. Whoever holds one knows that its hash is right and its header fits its blocks.
#[derive(Clone, PartialEq, Eq)]
pub struct Segment {
    header: Header,
    hash: Hash,
    blocks_at: usize,
    encoded: Bytes,
}

impl Segment {
    /// Packs `rows`, of which there is at least one, with consecutive sequence numbers from `first_seq`.
    pub(crate) fn pack(
        id: SegmentId,
        rows: &[PackedRow],
        created: Timestamp,
        prev_hash: Hash,
    ) -> std::io::Result<Self> {
        let mut lines: BTreeMap<&TenantId, (u64, Vec<u8>)> = BTreeMap::new();
        for (seq, row) in (id.first_seq..).zip(rows) {
            let (count, text) = lines.entry(&row.tenant).or_default();
            *count += 1;
            text.extend(format!("{{\"seq\":{seq},\"row\":").as_bytes());
            text.extend(&*row.json);
            text.extend(b"}\n");
        }
        let mut tenants = Vec::new();
        let mut blocks = Vec::new();
        for (tenant, (rows, text)) in lines {
            let block = zstd::bulk::compress(&text, LEVEL)?;
            tenants.push(TenantBlock {
                tenant: tenant.clone(),
                rows,
                bytes: block.len() as u64,
                plain_bytes: text.len() as u64,
            });
            blocks.extend(block);
        }
        let rows = rows.len() as u64;
        let SegmentId { node, journal, first_seq } = id;
        let last_seq = first_seq + rows - 1;
        let header = Header { node, journal, first_seq, last_seq, rows, tenants, created, prev_hash };
        Ok(Self::encode_parts(header, &blocks))
    }

    fn encode_parts(header: Header, blocks: &[u8]) -> Self {
        let text = serde_json::to_vec(&header).expect("names and numbers");
        let len = u32::try_from(text.len()).expect("far fewer tenants than rows, and those fit in 64 MiB");
        let mut encoded = MAGIC.to_vec();
        encoded.extend(len.to_be_bytes());
        encoded.extend(text);
        let blocks_at = encoded.len();
        encoded.extend(blocks);
        let hash = Hash(Sha256::digest(&encoded).into());
        encoded.extend(hash.0);
        Segment { header, hash, blocks_at, encoded: encoded.into() }
    }

    /// The segment as it is shipped and stored.
    pub fn encode(&self) -> Bytes {
        self.encoded.clone()
    }

    /// Reads what [`encode`](Self::encode) gave.
    ///
    /// # Errors
    /// Nothing is returned unless the hash is right and the header fits the blocks.
    pub fn decode(encoded: Bytes) -> Result<Self, SegmentError> {
        let rest = encoded.strip_prefix(MAGIC).ok_or(SegmentError::NoSegment)?;
        let (rest, hash) = rest.split_last_chunk::<HASH_BYTES>().ok_or(SegmentError::NoSegment)?;
        let hashed: [u8; HASH_BYTES] = Sha256::digest(&encoded[..encoded.len() - HASH_BYTES]).into();
        if hashed != *hash {
            return Err(SegmentError::Altered);
        }
        let (len, rest) = rest.split_first_chunk().ok_or(SegmentError::NoSegment)?;
        let len = u32::from_be_bytes(*len) as usize;
        let (header, blocks) =
            rest.split_at_checked(len).ok_or(SegmentError::Inconsistent("it is shorter than its header"))?;
        let header: Header =
            serde_json::from_slice(header).map_err(|_| SegmentError::Inconsistent("its header is none"))?;
        header.check(blocks.len() as u64)?;
        let blocks_at = MAGIC.len() + 4 + len;
        Ok(Segment { header, hash: Hash(*hash), blocks_at, encoded })
    }

    /// What it is known by.
    pub fn id(&self) -> SegmentId {
        let Header { node, journal, first_seq, .. } = &self.header;
        SegmentId { node: node.clone(), journal: *journal, first_seq: *first_seq }
    }

    /// What it says about itself.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Its hash, which the next segment names.
    pub fn hash(&self) -> Hash {
        self.hash
    }

    /// The rows of one tenant, or of all, by sequence number. Nothing of another tenant is decompressed.
    ///
    /// # Errors
    /// The blocks are not what the header says.
    pub fn rows(&self, tenant: Option<&TenantId>) -> Result<Vec<(u64, AuditRow)>, SegmentError> {
        let mut rows = Vec::new();
        let mut at = self.blocks_at;
        for block in &self.header.tenants {
            let end = at + block.bytes as usize;
            if tenant.is_none_or(|wanted| *wanted == block.tenant) {
                self.read_block(block, &self.encoded[at..end], &mut rows)?;
            }
            at = end;
        }
        rows.sort_by_key(|(seq, _)| *seq);
        Ok(rows)
    }

    fn read_block(
        &self,
        block: &TenantBlock,
        bytes: &[u8],
        rows: &mut Vec<(u64, AuditRow)>,
    ) -> Result<(), SegmentError> {
        // `Header::check` bounds the capacity, and no more than that is decompressed.
        let text = zstd::bulk::decompress(bytes, block.plain_bytes as usize)
            .map_err(|_| SegmentError::Inconsistent("a block does not decompress to what its header says"))?;
        let before = rows.len();
        let mut next = self.header.first_seq;
        for line in text.split_inclusive(|byte| *byte == b'\n') {
            let Line { seq, row } = serde_json::from_slice(line)
                .map_err(|_| SegmentError::Inconsistent("a line of a block is no row"))?;
            if row.tenant != block.tenant || seq < next || seq > self.header.last_seq {
                return Err(SegmentError::Inconsistent("a row is in a place that is not its own"));
            }
            next = seq + 1;
            rows.push((seq, row));
        }
        if (rows.len() - before) as u64 != block.rows {
            return Err(SegmentError::Inconsistent("a block has not as many rows as its header says"));
        }
        Ok(())
    }
}

impl Header {
    fn check(&self, blocks_bytes: u64) -> Result<(), SegmentError> {
        let sum = |of: fn(&TenantBlock) -> u64| {
            self.tenants.iter().try_fold(0u64, |sum, block| sum.checked_add(of(block)))
        };
        let spanned = self.last_seq.checked_sub(self.first_seq).and_then(|n| n.checked_add(1));
        let fault = if spanned != Some(self.rows) || sum(|block| block.rows) != Some(self.rows) {
            "the numbers of rows differ"
        } else if sum(|block| block.bytes) != Some(blocks_bytes) {
            "the sizes of its blocks differ"
        } else if sum(|block| block.plain_bytes).is_none_or(|bytes| bytes > MAX_PLAIN_BYTES) {
            "it is larger than a segment may be"
        } else if !self.tenants.is_sorted_by(|a, b| a.tenant < b.tenant) {
            "its tenants are not in order"
        } else {
            return Ok(());
        };
        Err(SegmentError::Inconsistent(fault))
    }
}

impl fmt::Debug for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Segment({}, {} rows, {})", self.id(), self.header.rows, self.hash)
    }
}

/// Where a chain of segments does not hold.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the audit chain breaks before segment {at}: {fault}")]
pub struct ChainBreak {
    /// The first segment that does not follow from those before it.
    pub at: SegmentId,
    /// In what way.
    pub fault: ChainFault,
}

/// In what way a segment does not follow from the one before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainFault {
    /// It belongs to another journal.
    #[error("it belongs to another journal")]
    OtherJournal,
    /// Rows are missing, doubled or in another order.
    #[error("row {expected} should follow, and {found} does")]
    Sequence {
        /// The number that should come next.
        expected: u64,
        /// The number that does.
        found: u64,
    },
    /// The segment before it is not the one that it was chained to.
    #[error("the segment before it was replaced")]
    Replaced,
}

/// Checks that `segments` of one journal follow from one another without a gap. They may begin after the journal's first,
/// as they do when old ones were deleted by retention; whoever keeps the last hash must compare it too.
///
/// # Errors
/// The first break.
pub fn verify_chain<'s>(segments: impl Iterator<Item = &'s Segment>) -> Result<(), ChainBreak> {
    let mut previous: Option<&Segment> = None;
    for segment in segments {
        let header = &segment.header;
        let (expected, prev_hash) = match previous {
            Some(before) => (before.header.last_seq.saturating_add(1), before.hash),
            None if header.first_seq == 1 => (1, Hash::NONE),
            None => (header.first_seq, header.prev_hash),
        };
        let same_journal = previous.is_none_or(|before| {
            before.header.node == header.node && before.header.journal == header.journal
        });
        let fault = if !same_journal {
            ChainFault::OtherJournal
        } else if header.first_seq != expected {
            ChainFault::Sequence { expected, found: header.first_seq }
        } else if header.prev_hash != prev_hash {
            ChainFault::Replaced
        } else {
            previous = Some(segment);
            continue;
        };
        return Err(ChainBreak { at: segment.id(), fault });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::*;
    use crate::testing::{row, tenant};

    fn packed(tenant_id: &str, path: &str) -> PackedRow {
        let row = row(tenant_id, path);
        PackedRow { json: serde_json::to_vec(&row).unwrap().into(), tenant: row.tenant }
    }

    fn chain(count: u64) -> Vec<Segment> {
        let mut prev_hash = Hash::NONE;
        let mut segments = Vec::new();
        for n in 0..count {
            let id = SegmentId {
                node: NodeName::parse("n1").unwrap(),
                journal: JournalId([7; 16]),
                first_seq: 3 * n + 1,
            };
            let rows = [packed("a", &format!("a/{n}")), packed("b", "b/1"), packed("a", "a/2")];
            let segment = Segment::pack(id, &rows, Timestamp::from_millis(1), prev_hash).unwrap();
            prev_hash = segment.hash();
            segments.push(segment);
        }
        segments
    }

    fn with_header(segment: &Segment, edit: impl FnOnce(&mut Header)) -> Segment {
        let mut header = segment.header.clone();
        edit(&mut header);
        Segment::encode_parts(header, &segment.encoded[segment.blocks_at..segment.encoded.len() - HASH_BYTES])
    }

    #[test]
    fn what_is_packed_is_read_back_in_order() {
        let segment = Segment::decode(chain(1)[0].encode()).unwrap();
        let rows = segment.rows(None).unwrap();
        let read: Vec<_> = rows.iter().map(|(seq, row)| (*seq, row.path.as_str())).collect();
        assert_eq!(read, [(1, "a/0"), (2, "b/1"), (3, "a/2")]);
        assert_eq!(rows[0].1, row("a", "a/0"));
    }

    #[test]
    fn a_tenant_sees_only_its_own_rows() {
        let segment = &chain(1)[0];
        let rows = segment.rows(Some(&tenant("b"))).unwrap();
        assert_eq!(rows, [(2, row("b", "b/1"))]);
        assert_eq!(segment.rows(Some(&tenant("c"))).unwrap(), []);
    }

    #[test]
    fn a_chain_holds_from_its_first_segment_or_a_later_one() {
        let segments = chain(5);
        assert_eq!(verify_chain(segments.iter()), Ok(()));
        assert_eq!(verify_chain(segments[2..].iter()), Ok(()));
        assert_eq!(verify_chain([].iter()), Ok(()));
    }

    #[test]
    fn a_first_segment_that_claims_a_past_is_a_break() {
        let forged = with_header(&chain(1)[0], |header| header.prev_hash = Hash([1; 32]));
        assert_eq!(verify_chain([forged].iter()).unwrap_err().fault, ChainFault::Replaced);
    }

    #[test]
    fn a_segment_of_another_journal_is_a_break() {
        let mut segments = chain(2);
        segments[1] = with_header(&segments[1], |header| header.journal = JournalId([8; 16]));
        assert_eq!(verify_chain(segments.iter()).unwrap_err().fault, ChainFault::OtherJournal);
    }

    #[test]
    fn a_header_that_contradicts_its_blocks_is_refused() {
        type Edit = fn(&mut Header);
        let edits: [Edit; 8] = [
            |header| header.rows += 1,
            |header| header.last_seq += 1,
            |header| header.first_seq = u64::MAX,
            |header| (header.first_seq, header.last_seq, header.rows) = (0, u64::MAX, 0),
            |header| header.tenants[0].bytes += 1,
            |header| header.tenants[0].plain_bytes = u64::MAX,
            |header| header.tenants[0].plain_bytes = MAX_PLAIN_BYTES + 1,
            |header| header.tenants.swap(0, 1),
        ];
        for (n, edit) in edits.into_iter().enumerate() {
            let forged = with_header(&chain(1)[0], edit).encode();
            assert!(matches!(Segment::decode(forged), Err(SegmentError::Inconsistent(_))), "edit {n}");
        }
    }

    #[test]
    fn a_block_that_is_larger_than_it_says_is_not_decompressed() {
        let bomb = zstd::bulk::compress(&vec![b' '; 32 << 20], LEVEL).unwrap();
        let mut header = chain(1)[0].header.clone();
        header.tenants.truncate(1);
        (header.rows, header.last_seq) = (header.tenants[0].rows, header.tenants[0].rows);
        (header.tenants[0].bytes, header.tenants[0].plain_bytes) = (bomb.len() as u64, 1000);
        let segment = Segment::decode(Segment::encode_parts(header, &bomb).encode()).unwrap();
        assert!(matches!(segment.rows(None), Err(SegmentError::Inconsistent(_))));
    }

    #[test]
    fn a_row_in_another_tenants_block_is_refused() {
        let forged = with_header(&chain(1)[0], |header| header.tenants[0].tenant = tenant("a0"));
        let forged = Segment::decode(forged.encode()).unwrap();
        assert!(matches!(forged.rows(Some(&tenant("a0"))), Err(SegmentError::Inconsistent(_))));
    }

    #[derive(Clone, Debug)]
    enum Tampering {
        /// One byte of one segment, its hash left as it was.
        Edit(Index, Index, u8),
        /// One byte of one segment's blocks or header, with a hash that fits.
        Forge(Index, Index, u8),
        Delete(Index),
        Swap(Index, Index),
        Repeat(Index, Index),
    }

    fn tamperings() -> impl Strategy<Value = Tampering> {
        prop_oneof![
            (any::<Index>(), any::<Index>(), 1u8..).prop_map(|(s, b, x)| Tampering::Edit(s, b, x)),
            (any::<Index>(), any::<Index>(), 1u8..).prop_map(|(s, b, x)| Tampering::Forge(s, b, x)),
            any::<Index>().prop_map(Tampering::Delete),
            (any::<Index>(), any::<Index>()).prop_map(|(a, b)| Tampering::Swap(a, b)),
            (any::<Index>(), any::<Index>()).prop_map(|(a, b)| Tampering::Repeat(a, b)),
        ]
    }

    /// What an auditor does with stored segments: read each, check the chain, compare the last hash with the one kept.
    fn audit(stored: &[Vec<u8>], last: Hash) -> bool {
        let read: Result<Vec<_>, _> =
            stored.iter().map(|bytes| Segment::decode(Bytes::copy_from_slice(bytes))).collect();
        read.is_ok_and(|segments| {
            verify_chain(segments.iter()).is_ok()
                && segments.first().is_some_and(|first| first.header.first_seq == 1)
                && segments.last().is_some_and(|segment| segment.hash() == last)
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1_000))]

        #[test]
        fn an_edited_deleted_or_reordered_segment_is_detected(tampering in tamperings()) {
            let segments = chain(6);
            let last = segments[5].hash();
            let mut stored: Vec<Vec<u8>> = segments.iter().map(|s| s.encode().to_vec()).collect();
            prop_assert!(audit(&stored, last));
            let untouched = stored.clone();
            match tampering {
                Tampering::Edit(segment, byte, xor) => {
                    let bytes = &mut stored[segment.index(6)];
                    let at = byte.index(bytes.len());
                    bytes[at] ^= xor;
                }
                Tampering::Forge(segment, byte, xor) => {
                    let bytes = &mut stored[segment.index(6)];
                    let end = bytes.len() - HASH_BYTES;
                    bytes[byte.index(end)] ^= xor;
                    let hash: [u8; 32] = Sha256::digest(&bytes[..end]).into();
                    bytes[end..].copy_from_slice(&hash);
                }
                Tampering::Delete(at) => drop(stored.remove(at.index(6))),
                Tampering::Swap(a, b) => stored.swap(a.index(6), b.index(6)),
                Tampering::Repeat(from, to) => {
                    let copy = stored[from.index(6)].clone();
                    stored.insert(to.index(7), copy);
                }
            }
            prop_assert!(stored == untouched || !audit(&stored, last));
        }

        #[test]
        fn bytes_that_are_no_segment_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(Segment::decode(bytes.into()).is_err());
        }
    }
}
