//! Secrets that have to be looked at in the store, each once, however often it changes meanwhile.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use scaivault_domain::replica::{Absence, KeyHash, Replica, SecretKey, Stamp};

/// What a secret is: a copy of its current version, or why there is none.
pub type Found = Result<(Stamp, Arc<Replica>), Absence>;

/// In what order secrets are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Rank {
    /// The node holds a copy, which may have to be taken away.
    Held,
    /// Somebody waits for it, or was told that there is none.
    Wanted,
    /// Nobody asked for it.
    Prefetch,
}

/// One secret that is to be looked at.
#[derive(Debug)]
pub(super) struct Look {
    pub(super) key: SecretKey,
    pub(super) rank: Rank,
    seq: u64,
    /// Everything up to this revision may be announced before it was looked at.
    before: u64,
    /// Whether the node is to hold it unasked.
    pub(super) prefetch: bool,
    /// What it is. Sent by the next plan, or looked at again: it is not kept.
    pub(super) found: Option<Found>,
}

/// All of them. What waits longest comes first within its rank.
#[derive(Debug, Default)]
pub(super) struct Looks {
    looks: HashMap<KeyHash, Look>,
    order: BTreeMap<(Rank, u64), KeyHash>,
    /// What the announced revision waits for: everything but prefetches.
    before: BTreeSet<(u64, u64)>,
    seq: u64,
}

impl Looks {
    pub(super) fn len(&self) -> usize {
        self.looks.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.looks.is_empty()
    }

    pub(super) fn get(&self, hash: &KeyHash) -> Option<&Look> {
        self.looks.get(hash)
    }

    /// Has a secret looked at, again if it was already. It keeps its place.
    pub(super) fn put(&mut self, hash: KeyHash, key: &SecretKey, rank: Rank, before: u64, prefetch: bool) {
        let look = match self.remove(&hash) {
            Some(known) => Look {
                rank: known.rank.min(rank),
                before: known.before.min(before),
                prefetch: known.prefetch || prefetch,
                found: None,
                ..known
            },
            None => {
                self.seq += 1;
                Look { key: key.clone(), rank, seq: self.seq, before, prefetch, found: None }
            }
        };
        self.insert(hash, look);
    }

    fn insert(&mut self, hash: KeyHash, look: Look) {
        self.order.insert((look.rank, look.seq), hash);
        if look.rank < Rank::Prefetch {
            self.before.insert((look.before, look.seq));
        }
        self.looks.insert(hash, look);
    }

    pub(super) fn remove(&mut self, hash: &KeyHash) -> Option<Look> {
        let look = self.looks.remove(hash)?;
        self.order.remove(&(look.rank, look.seq));
        self.before.remove(&(look.before, look.seq));
        Some(look)
    }

    /// Nobody waits for it any more; if it is prefetched, it is still looked at.
    pub(super) fn give_up(&mut self, hash: &KeyHash) {
        if let Some(look) = self.remove(hash)
            && look.prefetch
        {
            self.insert(*hash, Look { rank: Rank::Prefetch, ..look });
        }
    }

    /// The next ones to be looked at, none behind `last`, at most `max`.
    pub(super) fn next(&self, last: Rank, max: usize) -> Vec<SecretKey> {
        let order = self.order.range(..=(last, u64::MAX)).take(max);
        order.map(|(_, hash)| self.looks[hash].key.clone()).collect()
    }

    /// What a look has found. `None` if it is not wanted any more.
    pub(super) fn found(&mut self, hash: &KeyHash, found: Found) -> Option<()> {
        self.looks.get_mut(hash)?.found = Some(found);
        Some(())
    }

    /// Forgets what was found and had no room. A value takes nothing away, so it can wait for the others.
    pub(super) fn forget_found(&mut self, hash: &KeyHash) {
        let Some(look) = self.remove(hash) else { return };
        let rank = match &look.found {
            Some(Ok((_, replica))) if replica.value.is_some() => look.rank.max(Rank::Wanted),
            _ => look.rank,
        };
        self.insert(*hash, Look { rank, found: None, ..look });
    }

    /// The revision up to which nothing is waited for; `None` if nothing is waited for at all.
    pub(super) fn whole_at(&self) -> Option<u64> {
        self.before.first().map(|(before, _)| *before)
    }

    /// The number of the look that came last.
    pub(super) fn last_seq(&self) -> u64 {
        self.seq
    }

    /// Whether every look up to this number is done.
    pub(super) fn done_up_to(&self, seq: u64) -> bool {
        [Rank::Held, Rank::Wanted, Rank::Prefetch].into_iter().all(|rank| {
            let first = self.order.range((rank, 0)..=(rank, u64::MAX)).next();
            first.is_none_or(|((_, first), _)| *first > seq)
        })
    }

    /// Revisions start over: nothing may be announced before what is waiting now.
    pub(super) fn start_over(&mut self) {
        self.before.clear();
        for look in self.looks.values_mut() {
            look.before = 0;
            if look.rank < Rank::Prefetch {
                self.before.insert((0, look.seq));
            }
        }
    }
}
