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
//! # What is promised
//!
//! - Changes are applied, waiters woken, and only then is the response acknowledged.
//! - A view is taken whole or not at all. A refused one leaves the last good one in force, is visible on the
//!   [`NodeBoard`], and is not sent again before its generation changes. Other resources of the response are applied.
//! - Within an epoch a view's generation never goes back. A new epoch starts generations over: everything is sent again
//!   and replaces what is held, which stays in force until then.
//! - Removals and grants go before views, views before leases. At most [`MAX_UNACKNOWLEDGED`] responses are under way,
//!   and bulk leaves one of them free, so a revocation waits neither for a large view nor for an acknowledgement.
//! - A grant that cannot be read takes the held one away: what it replaces is known to be out of date.
//! - What nobody demands any more is not applied: nothing would ever revoke it.
//!
//! # Considered and dropped
//!
//! Timestamps for leases (clocks differ; seconds left do not). Sending a refused view again on a timer (it is refused
//! again). One stream a tenant (a node with a thousand tenants would need a thousand).

mod board;
mod follow;
mod publisher;
mod serve;
mod subscriber;
pub mod wire;

pub use board::{NodeBoard, NodeStatus};
pub use follow::{Sink, follow};
pub use publisher::{
    Demands, Desired, Heard, LeaseState, NextStep, Progress, Publisher, Refusal, ViewProgress, ViewRefusal,
    Violation,
};
pub use serve::{NodeIdentity, Source, Tenants, delta_stream};
pub use subscriber::{Applied, Change, Demand, Subscriber};
pub use wire::{LeasePush, LeaseRefusal};

/// Largest message of the protocol, encoded. One resource that is larger travels alone.
pub const MAX_MESSAGE_BYTES: usize = 256 * 1024;
/// Most responses that a node has not acknowledged.
pub const MAX_UNACKNOWLEDGED: usize = 8;
/// Most grants that a node may demand.
pub const MAX_GRANTS: usize = 100_000;
/// Most leases that a node may demand.
pub const MAX_LEASES: usize = 10_000;
