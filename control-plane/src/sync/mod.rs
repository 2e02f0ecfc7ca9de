//! Sync mode: copying backends into our own store.
//!
//! A synced backend has a job in the store. The [`Scheduler`] claims what is due and runs a [`cycle`] under the claim:
//! list, plan, and for every path read, decide and commit on its own. What a cycle found is the backend's
//! [`SyncState`]; what it did is its report. Whoever lost the claim commits nothing more.

mod apply;
mod copies;
mod cycle;
mod erase;
mod jobs;
mod runs;
mod scheduler;
mod states;

pub use self::apply::Refresher;
pub use self::copies::{Copies, Copy, stamp};
pub use self::erase::Erasures;
pub use self::runs::{Lines, Phase, Progress, Runs};
pub use self::scheduler::{Leaving, Losing, Reconfiguration, Scheduler, SyncParts, Syncs};
pub use self::states::SyncStates;
#[doc(inline)]
pub use crate::model::SyncState;
