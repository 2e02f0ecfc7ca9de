//! Responses being filled, within the window and the size of a message.

use prost::Message as _;
use scaivault_domain::lease::LeaseKey;
use scaivault_domain::replica::KeyHash;
use scaivault_domain::tenant::TenantId;
use scaivault_proto::discovery::v1 as pb;

use crate::{MAX_MESSAGE_BYTES, MAX_UNACKNOWLEDGED};

/// How much of the window may be filled: each lane leaves a place for those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lane {
    /// Removals and grants: a revocation waits for no acknowledgement.
    Urgent,
    /// Views, leases, and secrets that somebody waits for.
    Bulk,
    /// Secrets that nobody waits for.
    Prefetch,
}

impl Lane {
    /// How many responses may be under way.
    pub(super) fn room(self) -> usize {
        match self {
            Lane::Urgent => MAX_UNACKNOWLEDGED,
            Lane::Bulk => MAX_UNACKNOWLEDGED - 1,
            Lane::Prefetch => MAX_UNACKNOWLEDGED - 2,
        }
    }
}

/// What of a response matters when it is acknowledged, or before.
#[derive(Debug, Default)]
pub(super) struct InFlight {
    pub(super) tenants: Vec<TenantId>,
    pub(super) leases: Vec<(LeaseKey, String)>,
    /// Copies that the node takes although it gave up the demand meanwhile.
    pub(super) prefetched: Vec<KeyHash>,
    /// Backends of which every copy is held.
    pub(super) complete: Vec<LeaseKey>,
}

pub(super) struct Draft {
    pub(super) nonce: u64,
    size: usize,
    pub(super) removals: Vec<pb::Removal>,
    pub(super) upserts: Vec<pb::Upsert>,
    pub(super) in_flight: InFlight,
}

/// Responses being filled. Every method is `None` if there is no room.
pub(super) struct Batch {
    pub(super) drafts: Vec<Draft>,
    nonce: u64,
    in_flight: usize,
}

impl Batch {
    pub(super) fn new(nonce: u64, in_flight: usize) -> Self {
        Batch { drafts: Vec::new(), nonce, in_flight }
    }

    pub(super) fn open(&mut self, lane: Lane) -> Option<&mut Draft> {
        if self.in_flight + self.drafts.len() >= lane.room() {
            return None;
        }
        const AROUND: usize = 256;
        let nonce = self.nonce + self.drafts.len() as u64 + 1;
        let (removals, upserts, in_flight) = (Vec::new(), Vec::new(), InFlight::default());
        self.drafts.push(Draft { nonce, size: AROUND, removals, upserts, in_flight });
        self.drafts.last_mut()
    }

    /// The response that an item of `size` goes into.
    pub(super) fn draft(&mut self, lane: Lane, size: usize) -> Option<&mut Draft> {
        const AROUND: usize = 12;
        let size = size + AROUND;
        let fits = self.drafts.last().is_some_and(|draft| draft.size + size <= MAX_MESSAGE_BYTES);
        let draft = if fits { self.drafts.last_mut() } else { self.open(lane) }?;
        draft.size += size;
        Some(draft)
    }

    pub(super) fn remove(&mut self, resource: pb::removal::Resource) -> Option<()> {
        let removal = pb::Removal { resource: Some(resource) };
        self.draft(Lane::Urgent, removal.encoded_len())?.removals.push(removal);
        Some(())
    }

    pub(super) fn upsert(&mut self, lane: Lane, resource: pb::upsert::Resource) -> Option<&mut Draft> {
        let upsert = pb::Upsert { resource: Some(resource) };
        let draft = self.draft(lane, upsert.encoded_len())?;
        draft.upserts.push(upsert);
        Some(draft)
    }
}
