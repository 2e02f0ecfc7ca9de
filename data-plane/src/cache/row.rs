//! Rows: where they are, what seals them, and what is in them.

use std::borrow::Cow;
use std::ops::RangeInclusive;
use std::sync::Arc;

use scaivault_domain::backend::BackendId;
use scaivault_domain::replica::{KeyHash, Replica, Stamp};
use scaivault_domain::secret::{Kind, Metadata, SecretValue, State, Version};
use scaivault_domain::tenant::TenantId;
use scaivault_domain::time::Timestamp;
use scaivault_domain::token::TokenHash;
use scaivault_seal::Keyring;
use serde::{Deserialize, Serialize};
use sled::IVec;
use zeroize::Zeroizing;

/// How much of a value is in one row. A leaf of sled has up to 17 rows, and must stay below 128 KiB: a larger one becomes
/// a file of its own.
pub(super) const CHUNK_BYTES: usize = 6 * 1024;

const INDEX: u8 = b'i';
const VALUE: u8 = b'v';
const INDEX_PURPOSE: &str = "cache index";
const VALUE_PURPOSE: &str = "cache";
/// What belongs to no tenant, and what names its tenant.
const NODE: &str = "";

/// The key of a row in sled: kind, number, chunk. It says nothing about what is in the row.
pub(super) type Place = [u8; 11];

/// A row to write, or to erase.
pub(super) type Row = (Place, Option<Vec<u8>>);

fn place(kind: u8, number: u64, chunk: u16) -> Place {
    let mut place = [kind; 11];
    place[1..9].copy_from_slice(&number.to_be_bytes());
    place[9..].copy_from_slice(&chunk.to_be_bytes());
    place
}

/// The format's version, sealed, so that another key is seen at once.
pub(super) const HEADER: Place = *b"hscaivault\0";
/// Index rows begin with this.
pub(super) const INDEX_PREFIX: [u8; 1] = [INDEX];

pub(super) fn is_value(place: &Place) -> bool {
    place[0] == VALUE
}

/// All rows that values of these numbers could have.
pub(super) fn values_of(numbers: RangeInclusive<u64>) -> RangeInclusive<Place> {
    place(VALUE, *numbers.start(), 0)..=place(VALUE, *numbers.end(), u16::MAX)
}

/// The number in the key of an index row.
pub(super) fn number_of(key: &[u8]) -> Option<u64> {
    let (number, _) = key.get(1..)?.split_first_chunk()?;
    Some(u64::from_be_bytes(*number))
}

/// What is held.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Name {
    Secret(KeyHash),
    View(TenantId),
    Grant(TokenHash),
    Freshness(TenantId, BackendId),
    Marks,
}

impl Name {
    fn to_bytes(&self) -> Vec<u8> {
        match self {
            Name::Secret(hash) => [b"s", &hash.0[..]].concat(),
            Name::View(tenant) => [b"v", tenant.as_str().as_bytes()].concat(),
            Name::Grant(hash) => [b"g", &hash.as_bytes()[..]].concat(),
            Name::Freshness(tenant, backend) => {
                [b"f", backend.as_str().as_bytes(), b" ", tenant.as_str().as_bytes()].concat()
            }
            Name::Marks => b"m".to_vec(),
        }
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let (kind, rest) = bytes.split_first()?;
        let text = || std::str::from_utf8(rest).ok();
        Some(match kind {
            b's' => Name::Secret(KeyHash(rest.try_into().ok()?)),
            b'v' => Name::View(TenantId::parse(text()?).ok()?),
            b'g' => Name::Grant(TokenHash::from_slice(rest)?),
            b'f' => {
                let (backend, tenant) = text()?.split_once(' ')?;
                Name::Freshness(TenantId::parse(tenant).ok()?, BackendId::parse(backend).ok()?)
            }
            b'm' if rest.is_empty() => Name::Marks,
            _ => return None,
        })
    }
}

/// Where something is held, and which state of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// Zero for what is no secret.
    pub(super) stamp: Stamp,
    /// In which epoch, counted, it was written.
    pub(super) era: u16,
    /// Of its rows. Each write has its own.
    pub(super) number: u64,
    pub(super) chunks: u16,
}

impl Entry {
    /// What `plain` is held as.
    pub(super) fn new(stamp: Stamp, era: u16, number: u64, plain: &[u8]) -> Self {
        let chunks = plain.len().div_ceil(CHUNK_BYTES).max(1);
        let chunks = u16::try_from(chunks).expect("what is held has less than 384 MiB");
        Entry { stamp, era, number, chunks }
    }

    /// Where its rows are.
    pub(super) fn places(&self) -> impl Iterator<Item = Place> {
        let Entry { number, chunks, .. } = *self;
        std::iter::once(place(INDEX, number, 0))
            .chain((0..chunks).map(move |chunk| place(VALUE, number, chunk)))
    }

    /// Rows that erase it.
    pub(super) fn erase(&self, rows: &mut Vec<Row>) {
        rows.extend(self.places().map(|place| (place, None)));
    }
}

/// Seals and opens rows.
#[derive(Clone, Debug)]
pub(super) struct Seals(pub(super) Arc<Keyring>);

/// What a value is sealed to beside its place.
#[derive(Clone, Copy)]
pub(super) struct Context<'a> {
    owner: &'a str,
    name: &'a [u8],
}

impl<'a> Context<'a> {
    /// A secret of `tenant` at `path`.
    pub(super) fn secret(tenant: &'a TenantId, path: &'a str) -> Self {
        Context { owner: tenant.as_str(), name: path.as_bytes() }
    }
}

impl Seals {
    pub(super) fn header(&self) -> Row {
        (HEADER, Some(self.0.cipher(NODE, INDEX_PURPOSE).seal(&HEADER, &[])))
    }

    pub(super) fn is_header(&self, record: &[u8]) -> bool {
        self.0.open(NODE, INDEX_PURPOSE, &HEADER, record).is_ok()
    }

    /// The rows that hold `plain`. The index comes last: with it the value is there.
    pub(super) fn seal(
        &self,
        entry: &Entry,
        name: &Name,
        context: Option<Context<'_>>,
        plain: &[u8],
        rows: &mut Vec<Row>,
    ) {
        let name = name.to_bytes();
        let context = context.unwrap_or(Context { owner: NODE, name: &name });
        let cipher = self.0.cipher(context.owner, VALUE_PURPOSE);
        for chunk in 0..entry.chunks {
            let from = usize::from(chunk) * CHUNK_BYTES;
            let part = &plain[from..plain.len().min(from + CHUNK_BYTES)];
            let place = place(VALUE, entry.number, chunk);
            rows.push((place, Some(cipher.seal(&bound(&place, entry, context.name), part))));
        }
        let mut index = Vec::with_capacity(20 + name.len());
        index.extend(entry.stamp.revision.to_be_bytes());
        index.extend(entry.stamp.tag.to_be_bytes());
        index.extend(entry.era.to_be_bytes());
        index.extend(entry.chunks.to_be_bytes());
        index.extend(name);
        let place = place(INDEX, entry.number, 0);
        rows.push((place, Some(self.0.cipher(NODE, INDEX_PURPOSE).seal(&place, &index))));
    }

    /// What an index row says: what is held, and where.
    pub(super) fn open_index(&self, key: &[u8], record: &[u8]) -> Option<(Name, Entry)> {
        let number = number_of(key)?;
        let plain = self.0.open(NODE, INDEX_PURPOSE, key, record).ok()?;
        let (revision, rest) = plain.split_first_chunk()?;
        let (tag, rest) = rest.split_first_chunk()?;
        let (era, rest) = rest.split_first_chunk()?;
        let (chunks, name) = rest.split_first_chunk()?;
        let entry = Entry {
            stamp: Stamp { revision: u64::from_be_bytes(*revision), tag: u64::from_be_bytes(*tag) },
            era: u16::from_be_bytes(*era),
            number,
            chunks: u16::from_be_bytes(*chunks),
        };
        Some((Name::parse(name)?, entry))
    }

    /// Opens what was sealed for `context`, if all of its rows are there.
    pub(super) fn open(
        &self,
        entry: &Entry,
        context: Context<'_>,
        row: impl Fn(&Place) -> Option<IVec>,
    ) -> Option<Zeroizing<Vec<u8>>> {
        let open = |chunk| {
            let place = place(VALUE, entry.number, chunk);
            let aad = bound(&place, entry, context.name);
            self.0.open(context.owner, VALUE_PURPOSE, &aad, &row(&place)?).ok()
        };
        if entry.chunks == 1 {
            return open(0);
        }
        // Never grown, which would leave copies behind.
        let mut plain = Zeroizing::new(Vec::with_capacity(usize::from(entry.chunks) * CHUNK_BYTES));
        for chunk in 0..entry.chunks {
            plain.extend_from_slice(&open(chunk)?);
        }
        Some(plain)
    }

    /// Opens what belongs to no tenant.
    pub(super) fn open_named(
        &self,
        entry: &Entry,
        name: &Name,
        row: impl Fn(&Place) -> Option<IVec>,
    ) -> Option<Zeroizing<Vec<u8>>> {
        self.open(entry, Context { owner: NODE, name: &name.to_bytes() }, row)
    }
}

fn bound(place: &Place, entry: &Entry, name: &[u8]) -> Vec<u8> {
    let mut aad = Vec::with_capacity(21 + name.len());
    aad.extend(place);
    aad.extend(entry.chunks.to_be_bytes());
    aad.extend(entry.stamp.tag.to_be_bytes());
    aad.extend(name);
    aad
}

/// Everything of a replica but its value.
#[derive(Serialize, Deserialize)]
struct Head<'a> {
    #[serde(rename = "v")]
    version: Version,
    #[serde(rename = "k")]
    kind: Kind,
    #[serde(rename = "s")]
    state: State,
    #[serde(rename = "l", skip_serializing_if = "Option::is_none")]
    value_bytes: Option<usize>,
    #[serde(rename = "t", skip_serializing_if = "str::is_empty", default)]
    content_type: Cow<'a, str>,
    #[serde(rename = "m", skip_serializing_if = "no_metadata", default)]
    metadata: Cow<'a, Metadata>,
    #[serde(rename = "b", skip_serializing_if = "Option::is_none", default)]
    backend: Option<BackendId>,
    #[serde(rename = "r", skip_serializing_if = "str::is_empty", default)]
    remote_version: Cow<'a, str>,
    #[serde(rename = "c", skip_serializing_if = "Option::is_none", default)]
    created: Option<Timestamp>,
    #[serde(rename = "a")]
    verified: Timestamp,
}

fn no_metadata(metadata: &Metadata) -> bool {
    metadata.is_empty()
}

/// `value | head | length of the head`: the value comes first, so that its bytes need not be copied when it is read.
pub(super) fn encode(replica: &Replica) -> Zeroizing<Vec<u8>> {
    let head = Head {
        version: replica.version,
        kind: replica.kind,
        state: replica.state,
        value_bytes: replica.value.as_ref().map(SecretValue::len),
        content_type: Cow::Borrowed(&replica.content_type),
        metadata: Cow::Borrowed(&replica.metadata),
        backend: replica.backend.clone(),
        remote_version: Cow::Borrowed(&replica.remote_version),
        created: replica.created,
        verified: replica.verified,
    };
    let head = serde_json::to_vec(&head).expect("texts and numbers are JSON");
    let value = replica.value.as_ref().map_or(&[][..], SecretValue::expose);
    let mut plain = Zeroizing::new(Vec::with_capacity(value.len() + head.len() + 4));
    plain.extend_from_slice(value);
    plain.extend_from_slice(&head);
    plain.extend_from_slice(&u32::try_from(head.len()).expect("metadata is small").to_be_bytes());
    plain
}

/// Reads what [`encode`] made.
pub(super) fn decode(mut plain: Zeroizing<Vec<u8>>) -> Option<Replica> {
    let (rest, length) = plain.split_last_chunk()?;
    let at = rest.len().checked_sub(usize::try_from(u32::from_be_bytes(*length)).ok()?)?;
    let head: Head<'_> = serde_json::from_slice(&rest[at..]).ok()?;
    let replica = Replica {
        version: head.version,
        kind: head.kind,
        content_type: head.content_type.into_owned(),
        metadata: head.metadata.into_owned(),
        state: head.state,
        value: None,
        backend: head.backend,
        remote_version: head.remote_version.into_owned(),
        created: head.created,
        verified: head.verified,
    };
    let value = match head.value_bytes {
        Some(bytes) if bytes == at => {
            // The head stays behind the value until both are wiped.
            let mut value = std::mem::take(&mut *plain);
            value.truncate(at);
            Some(SecretValue::new(value))
        }
        None if at == 0 => None,
        _ => return None,
    };
    Some(Replica { value, ..replica })
}
