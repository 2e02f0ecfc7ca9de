//! The delta protocol between the planes: one stream a node, on which only differences travel.
//!
//! Both halves are pure state machines ([`Subscriber`] on the node, [`Publisher`] in the control plane, one per stream)
//! with a loop around each ([`follow`], [`delta_stream`]) that does the I/O and decides nothing.
//!
//! # A stream
//!
//! The node says `Hello` (its build, the epoch it follows), then in `Resume` what it still holds and in `Subscribe` what
//! it waits for. The publisher then diffs what the node has against what it should have, whenever something was
//! committed, a demand came, or half a minute passed. It diffs against what was *sent*, not what was acknowledged: a
//! stream is ordered and loses nothing, and a lost stream starts over from `Resume`. Acknowledgements pace the stream
//! and say what is in force.
//!
//! # Secrets
//!
//! There may be a million of them, so they are no part of what is diffed. Each stream follows the store's feed with a
//! cursor, and knows of every secret that its node was told of no more than the hash of its key and the state it was
//! told. A line of the feed concerns the node if its hash is among them, or if the secret belongs to a prefetched backend;
//! then the secret is looked at in the store and sent as it is at that time, so many changes become one.
//!
//! `Resume` names held copies by hash, revision and tag. A survey of the stamps of the node's tenants tells which of them
//! differ, in the same epoch by their revision, in another one by their tag; those that it does not come across are taken
//! away. The cursor is taken before the survey. The same survey finds what is prefetched, repairs what a lost feed would
//! have told, and runs every quarter of an hour or so as a net for what was missed.
//!
//! # What is promised
//!
//! - Changes are applied, waiters woken, and only then is the response acknowledged.
//! - A view is taken whole or not at all. A refused one leaves the last good one in force, is visible on the
//!   [`NodeBoard`], and is not sent again before its generation changes. Other resources of the response are applied.
//! - Within an epoch a view's generation never goes back. A new epoch starts generations over: everything is sent again
//!   and replaces what is held, which stays in force until then.
//! - Within an epoch a copy of a secret only ever advances by its revision. An older one is refused by name.
//! - Removals and grants go before views, then freshness, leases, secrets that somebody waits for or that have changed,
//!   and secrets that are prefetched. At most [`MAX_UNACKNOWLEDGED`] responses are under way. Bulk leaves one of them
//!   free, so a revocation waits neither for a large view nor for an acknowledgement; a prefetch leaves two, so that a
//!   demanded secret does not wait for it either. A secret that loses its value counts as a removal.
//! - When a revision is announced, no view, grant or copy on the node is older than it. A commit that concerns the node
//!   is announced even if there is nothing to send for it; one that does not goes along with the next that does.
//! - A grant or a copy that cannot be read takes the held one away: what it replaces is known to be out of date.
//! - What nobody demands any more is not applied: nothing would ever revoke it. The exception is a copy that is marked as
//!   prefetched: it is applied unasked, and the publisher follows it even if its demand was given up while it was on its
//!   way. Nor is what was sent for an earlier demand applied for a later one: it was not followed in between.
//! - An absence is an answer like any other, and stays subscribed. Only a copy that a survey did not come across is
//!   subscribed no longer: its name is not known, so why it is gone is not known either.
//!
//! # Considered and dropped
//!
//! Timestamps for leases (clocks differ; seconds left do not). Sending a refused view again on a timer (it is refused
//! again). One stream a tenant (a node with a thousand tenants would need a thousand). A digest of what a node holds, to
//! compare with what the publisher believes: the stream loses nothing, so the two cannot differ; what can differ is the
//! store, which a survey compares.

mod board;
mod follow;
mod publisher;
mod serve;
mod subscriber;
pub mod wire;

pub use board::{NodeBoard, NodeStatus};
pub use follow::{Sink, follow};
pub use publisher::{
    Demands, Desired, Found, Heard, LeaseState, Mark, NextStep, PrefetchProgress, Progress, Publisher,
    Refusal, SecretChange, SecretChanges, Surveyed, ViewProgress, ViewRefusal, Violation,
};
pub use serve::{NodeIdentity, Source, Tenants, delta_stream};
pub use subscriber::{Applied, Change, Demand, Restored, Subscriber};
pub use wire::{LeasePush, LeaseRefusal, SecretCopy};

/// Largest message of the protocol, encoded. One resource that is larger travels alone.
pub const MAX_MESSAGE_BYTES: usize = 256 * 1024;
/// Most responses that a node has not acknowledged.
pub const MAX_UNACKNOWLEDGED: usize = 8;
/// Most grants that a node may demand.
pub const MAX_GRANTS: usize = 100_000;
/// Most leases that a node may demand.
pub const MAX_LEASES: usize = 10_000;
/// Most secrets that a node may hold, be told the absence of, or wait for.
pub const MAX_SECRETS: usize = 1_000_000;
