//! What a sync run found and did.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::backend::BackendId;
use crate::error::{Error, Reason};
use crate::mapping::Skip;
use crate::path::PathFault;
use crate::time::Timestamp;

/// The id of a run: `run_` and 32 hexadecimal digits, in the order of time.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RunId(String);

impl RunId {
    /// The id of a run that begins `at`.
    pub fn new(at: Timestamp, random: u64) -> Self {
        RunId(format!("run_{:016x}{random:016x}", at.as_millis()))
    }

    /// Parses an id.
    ///
    /// # Errors
    /// `not_found`: what is no id names no run.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let digits = text.strip_prefix("run_").unwrap_or("");
        if digits.len() == 32 && digits.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
            return Ok(RunId(text.into()));
        }
        Err(Error::new(Reason::NotFound, "no run has this id")
            .next("list the runs of the backend to see their ids"))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for RunId {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        Self::parse(&text)
    }
}

impl From<RunId> for String {
    fn from(id: RunId) -> String {
        id.0
    }
}

impl std::fmt::Display for RunId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

names! {
    /// Why a run began.
    Trigger {
        /// Its time had come.
        Schedule = "schedule",
        /// Somebody asked for it.
        Manual = "manual",
        /// The configuration was created or changed.
        Configuration = "configuration",
    }
}

names! {
    /// How a run ended.
    Outcome {
        /// Everything that maps was compared.
        Complete = "complete",
        /// Something was left out; the report says what and why.
        Partial = "partial",
        /// The login or the listing failed, or nothing could be read.
        Failed = "failed",
        /// Somebody ended it.
        Cancelled = "cancelled",
    }
}

names! {
    /// Why a name or path was left out. A closed set.
    SkipReason {
        /// The name has characters that no path has.
        Charset = "charset",
        /// The path would be too long.
        TooLong = "too_long",
        /// The value is larger than our store takes.
        TooLarge = "too_large",
        /// No template makes the name.
        NoRule = "no_rule",
        /// An earlier rule owns the path.
        ShadowedByRule = "shadowed_by_rule",
        /// The path does not map back to the name.
        RoundTrip = "round_trip",
        /// Another name has the same path.
        Collision = "collision",
        /// The backend does not let us read it.
        Forbidden = "forbidden",
        /// It has no current value.
        NotActive = "not_active",
        /// Its value is of a kind that cannot be carried.
        BinaryUnsupported = "binary_unsupported",
        /// Its value arrived damaged.
        Checksum = "checksum",
        /// It waits for somebody to resolve its conflict.
        ConflictFrozen = "conflict_frozen",
        /// The backend failed; the next run tries again.
        Transient = "transient",
        /// Too many deletions at once: they wait for somebody's consent.
        MassDeleteGuard = "mass_delete_guard",
    }
}

impl From<Skip> for SkipReason {
    fn from(skip: Skip) -> Self {
        match skip {
            Skip::Charset => SkipReason::Charset,
            Skip::TooLong => SkipReason::TooLong,
            Skip::NoRule => SkipReason::NoRule,
            Skip::ShadowedByRule => SkipReason::ShadowedByRule,
            Skip::RoundTrip => SkipReason::RoundTrip,
        }
    }
}

impl From<PathFault> for SkipReason {
    fn from(fault: PathFault) -> Self {
        match fault {
            PathFault::Charset => SkipReason::Charset,
            PathFault::TooLong => SkipReason::TooLong,
        }
    }
}

/// Something that a run left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// Its path here; empty if it has none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub path: String,
    /// Its name in the backend.
    pub remote_name: String,
    /// Why.
    pub reason: SkipReason,
    /// More about it, one sentence; may be empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
}

/// How many paths went which way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Counts {
    /// Names that the backend listed.
    pub listed: u64,
    /// Paths that they are here.
    pub mapped: u64,
    /// Paths on which both sides agree as before.
    pub unchanged: u64,
    /// Paths that are new here.
    pub created: u64,
    /// Paths that got a new value, state or metadata.
    pub updated: u64,
    /// Paths whose secret is gone in the backend, and is deleted softly here.
    pub tombstoned: u64,
    /// Paths that are ahead of the backend.
    pub local_ahead: u64,
    /// Paths on which both sides had changed.
    pub conflicts: u64,
    /// Names and paths that were left out, whatever the reason; the failed ones are not among them.
    pub skipped: u64,
    /// Paths that the backend failed to give.
    pub failed: u64,
}

/// The report of a run. What was skipped and what failed is kept beside it, page by page.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunReport {
    /// Which run.
    pub run_id: RunId,
    /// Of which backend.
    pub backend: BackendId,
    /// Why it began.
    pub trigger: Trigger,
    /// When it began.
    pub started: Timestamp,
    /// When it ended; `None` while it runs.
    pub ended: Option<Timestamp>,
    /// How it ended; `None` while it runs.
    pub outcome: Option<Outcome>,
    /// How many paths went which way.
    pub counts: Counts,
    /// Calls of the backend, by operation.
    pub calls: BTreeMap<String, u64>,
    /// Deletions that were held back, and of how many known paths.
    pub held_back: Option<HeldBack>,
    /// The class of the failure, if it failed, e.g. `transient`.
    pub class: Option<String>,
    /// What went wrong, one sentence that shows nothing of the backend's answers; empty if nothing did.
    pub message: String,
}

/// Deletions that wait for consent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldBack {
    /// How many paths would have been deleted.
    pub deletions: u64,
    /// Of how many that are known.
    pub known: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn run_ids_sort_by_time_and_read_as_they_are_written() {
        let early = RunId::new(Timestamp::from_millis(1_000), u64::MAX);
        let late = RunId::new(Timestamp::from_millis(2_000), 0);
        assert!(early < late);
        assert_eq!(RunId::parse(late.as_str()).unwrap(), late);
        assert!(RunId::parse("run_x").is_err());
    }
}
