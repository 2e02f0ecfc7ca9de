//! What a sync asks of a store first: every secret below a folder, and what tells its versions apart.
//!
//! A survey is made of [`Step`]s, one or two calls each, so that every one of them goes through the guard, is tried
//! again by itself and gets a new lease if it must. An adapter answers a step with what it found and the steps that it
//! leads to; who takes the steps need not know what is in them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use scaivault_domain::mapping::RemoteName;
use scaivault_domain::secret::{Metadata, State};
use scaivault_domain::time::Timestamp;
use sha2::{Digest, Sha256};

use crate::budget::{Budget, Quota};
use crate::{PageToken, RemoteEntry, RemoteSecret};

/// What a store says of the current version of a secret, without giving its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The store's name of the version, as in [`RemoteSecret`]; empty if its listings name none.
    pub remote_version: String,
    /// Whether it has a value.
    pub state: State,
    /// Changes whenever the value, the state or the custom metadata does. Only good to be compared.
    pub token: String,
}

impl Seen {
    /// The custom metadata is part of the token because stores change it without a trace anywhere else.
    pub(crate) fn new(remote_version: String, state: State, stamp: &str, metadata: &Metadata) -> Self {
        let mut token = format!("{stamp}.{}", state.as_str());
        if !metadata.is_empty() {
            token.push_str(&format!(".{:016x}", digest(metadata)));
        }
        Seen { remote_version, state, token }
    }
}

/// A stamp of a store that counts versions. The time is part of it because a secret that was removed and made again
/// counts them anew.
pub(crate) fn counted(remote_version: &str, created: Option<Timestamp>) -> String {
    format!("{remote_version}@{}", created.map_or(0, Timestamp::as_millis))
}

/// Short, for there may be a million of them: it tells changes apart, it proves nothing.
fn digest(metadata: &Metadata) -> u64 {
    let mut hash = Sha256::new();
    for text in metadata.iter().flat_map(|(key, value)| [key, value]) {
        hash.update((text.len() as u64).to_be_bytes());
        hash.update(text);
    }
    let hash: [u8; 32] = hash.finalize().into();
    hash.iter().take(8).fold(0, |number, byte| number << 8 | u64::from(*byte))
}

impl RemoteSecret {
    /// What a survey would have said of this version; `None` if the store's listings tell no versions apart.
    pub fn seen(&self) -> Option<Seen> {
        let stamp = self.stamp.as_ref()?;
        let metadata = self.metadata.as_ref().unwrap_or(const { &Metadata::new() });
        Some(Seen::new(self.remote_version.clone(), State::Active, stamp, metadata))
    }
}

/// A secret as a survey saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Surveyed {
    /// The name as the mapping's templates spell it, exactly as the store has it: it may be one that no path can have.
    pub name: RemoteName,
    /// Its current version; `None`: the store does not tell, so it must be read.
    pub seen: Option<Seen>,
    /// Its custom metadata, where listings tell it and reads do not.
    pub metadata: Option<Metadata>,
}

/// A part of a survey.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SurveyPage {
    /// Secrets that are there.
    pub secrets: Vec<Surveyed>,
    /// What may not be looked at, a folder with everything below it: not absent, just not seen.
    pub forbidden: Vec<RemoteEntry>,
}

/// A call that a survey has still to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Everything below a folder (`None`: in the whole store), as cheaply as the store allows.
    Tree(Option<RemoteName>),
    /// What is directly in a folder.
    Folder {
        /// The folder.
        name: RemoteName,
        /// Where to go on in it.
        after: Option<PageToken>,
        /// How to look at it.
        way: Way,
    },
    /// What a listing did not tell of a secret.
    Secret(RemoteName),
    /// The next part of a tree that is given in pages.
    More {
        /// The root of the tree, as in [`Step::Tree`].
        root: Option<RemoteName>,
        /// Where to go on.
        after: PageToken,
    },
}

/// How a folder is looked at, cheapest first. Not every store, and not every policy, allows every way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// All at once, with everything below it.
    Scan,
    /// By listings that tell versions.
    Versions,
    /// By listings that tell names, and one call more for each secret.
    Names,
}

/// What a step of a survey found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Secrets, and what may not be looked at.
    pub page: SurveyPage,
    /// Where the survey goes on.
    pub next: Vec<Step>,
}

/// Counts the calls that were made for somebody, by operation.
#[derive(Debug, Default)]
pub struct Calls {
    by_operation: Mutex<BTreeMap<&'static str, u64>>,
    /// Calls that the budget does not know of yet.
    beyond: [AtomicU32; Quota::ALL.len()],
}

impl Calls {
    /// One more call of `operation`.
    pub fn count(&self, operation: &'static str) {
        let mut calls = self.by_operation.lock().unwrap_or_else(PoisonError::into_inner);
        *calls.entry(operation).or_default() += 1;
    }

    /// The calls so far.
    pub fn snapshot(&self) -> BTreeMap<&'static str, u64> {
        self.by_operation.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// One more call of `quota` than the one that the guard let through. It need not wait: whoever asks the budget next
    /// waits the longer. For a handful of calls; what takes more belongs into further steps.
    pub fn beyond(&self, quota: Quota) {
        self.beyond[quota as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Takes the calls beyond what was let through from the budget.
    pub(crate) fn debit(&self, budget: &Budget) {
        for quota in Quota::ALL {
            match self.beyond[quota as usize].swap(0, Ordering::Relaxed) {
                0 => {}
                calls => budget.debit(quota, calls),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(version: &str, state: State, created: i64, metadata: &[(&str, &str)]) -> String {
        let metadata = metadata.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
        let stamp = counted(version, Some(Timestamp::from_millis(created)));
        Seen::new(version.into(), state, &stamp, &metadata).token
    }

    #[test]
    fn a_token_changes_with_everything_that_a_sync_must_see() {
        let tokens = [
            token("7", State::Active, 1, &[]),
            token("8", State::Active, 1, &[]),
            token("7", State::Deleted, 1, &[]),
            token("7", State::Active, 2, &[]),
            token("7", State::Active, 1, &[("a", "b")]),
            token("7", State::Active, 1, &[("a", "c")]),
            token("7", State::Active, 1, &[("ab", "")]),
            token("7", State::Active, 1, &[("a", ""), ("b", "")]),
        ];
        for (index, token) in tokens.iter().enumerate() {
            assert!(!tokens[index + 1..].contains(token), "{token}");
        }
        assert_eq!(tokens[4], token("7", State::Active, 1, &[("a", "b")]));
    }
}
