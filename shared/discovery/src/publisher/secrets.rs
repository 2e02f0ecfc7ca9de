//! The secrets of one stream: what the node was told of each, what has to be looked at, and how far the feed was
//! followed.
//!
//! Three things have a secret looked at: a demand, a line of the feed, and a survey. A survey walks the stamps of whole
//! tenants; it compares what a node holds from before with the store, and finds what is prefetched. Whatever it was,
//! the look decides what is sent, by what the node was told last. The feed is followed from before a survey begins, so
//! that nothing falls between the two.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use scaivault_domain::backend::BackendId;
use scaivault_domain::lease::LeaseKey;
use scaivault_domain::path::SecretPath;
use scaivault_domain::replica::{Absence, KeyHash, SecretKey, Stamp};
use scaivault_domain::sync::Mode;
use scaivault_domain::tenant::TenantId;
use scaivault_domain::time::Timestamp;
use scaivault_domain::view::{BackendView, Generation, TenantView};
use scaivault_proto::discovery::v1 as pb;

use super::PrefetchProgress;
use super::batch::{Batch, Lane};
use super::looks::{Found, Looks, Rank};
use crate::MAX_SECRETS;
use crate::wire::{self, SecretCopy};

/// Most secrets that are looked at in one go.
const LOOKS_AT_ONCE: usize = 512;
/// A survey goes on when fewer looks than this are waiting.
const MAX_WAITING: usize = 4096;

/// How far the store's feed can be followed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mark {
    /// The revision up to which it can tell what changed.
    pub revision: u64,
    /// The newest revision, not after `revision`, that changed a view, a grant or a freshness of any node.
    pub concerned: u64,
}

/// One secret that may have changed. Made once and shared by all streams.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SecretChange {
    /// Which one.
    pub key: SecretKey,
    /// The hash of the key.
    pub hash: KeyHash,
    /// The backend that it is a copy of, if that backend is prefetched.
    pub prefetch: Option<BackendId>,
}

impl SecretChange {
    /// The secret named `key` may have changed.
    pub fn new(key: SecretKey, prefetch: Option<BackendId>) -> Self {
        SecretChange { hash: key.hash(), key, prefetch }
    }
}

/// A page of the feed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SecretChanges {
    /// Secrets that were written, deleted or erased.
    pub changes: Vec<Arc<SecretChange>>,
    /// Backends whose paths may be absent for another reason now, e.g. because their first cycle has ended.
    pub absent_again: Vec<LeaseKey>,
    /// Where the next page begins; always after the cursor.
    pub next: u64,
}

/// A secret that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Surveyed {
    /// Where.
    pub path: SecretPath,
    /// Its current state.
    pub stamp: Stamp,
    /// The backend that it is a copy of, if that backend is prefetched.
    pub prefetch: Option<BackendId>,
}

/// What the node was told last.
#[derive(Debug)]
enum Told {
    /// Nothing: it asked.
    Asked,
    /// This state. Revision 0 is one of another epoch, which the tag compares.
    Copy(Stamp),
    /// That there is no copy.
    Absent(Box<SecretKey>, Absence),
}

/// How the copies of one prefetched backend stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Prefetch {
    /// They have to be surveyed.
    Due,
    /// A survey is under way.
    Surveyed,
    /// They are more than the node may hold.
    Overfull,
    /// All are found; those up to this look are not all sent.
    Sending(u64),
    /// All were sent.
    Sent,
    /// All are held.
    Complete,
}

#[derive(Debug)]
struct Survey {
    tenants: VecDeque<TenantId>,
    after: Option<SecretPath>,
    /// What the node holds and the survey has not come across; `None` if it looks for prefetched copies only.
    unseen: Option<HashSet<KeyHash>>,
    /// The node would hold more than it may.
    overfull: bool,
}

/// Whether the node's copies have to be compared with the store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Compare {
    #[default]
    Done,
    /// To be on the safe side.
    Due,
    /// Nothing can be announced before.
    Needed,
}

#[derive(Debug, Default)]
pub(super) struct Secrets {
    told: HashMap<KeyHash, Told>,
    copies: usize,
    looks: Looks,
    /// Looked at, not sent, in the order of the looks.
    answered: Vec<KeyHash>,
    /// Copies of secrets that are no more, whose names are not known.
    gone: BTreeSet<KeyHash>,
    /// Where the feed is followed from; `None` before it is known what revision that is.
    cursor: Option<u64>,
    mark: Mark,
    generations: BTreeMap<TenantId, Generation>,
    prefetch: BTreeMap<LeaseKey, Prefetch>,
    compare: Compare,
    survey: Option<Survey>,
}

impl Secrets {
    pub(super) fn resume(&mut self, hash: KeyHash, stamp: Stamp) {
        self.tell(hash, Told::Copy(stamp));
        self.compare = Compare::Needed;
    }

    pub(super) fn subscribe(&mut self, key: &SecretKey) {
        let hash = key.hash();
        self.tell(hash, Told::Asked);
        self.looks.put(hash, key, Rank::Wanted, self.before(), false);
    }

    /// The node has not been sent anything of it that it would take.
    pub(super) fn unsubscribe(&mut self, hash: KeyHash) {
        self.forget(&hash);
        self.looks.give_up(&hash);
    }

    /// How many secrets the node holds, is told that it cannot have, or waits for.
    pub(super) fn len(&self) -> usize {
        self.told.len()
    }

    /// How many copies the node was sent.
    pub(super) fn copies(&self) -> usize {
        self.copies
    }

    pub(super) fn progress(&self) -> BTreeMap<LeaseKey, PrefetchProgress> {
        let progress = |prefetch| match prefetch {
            Prefetch::Complete => PrefetchProgress::Complete,
            _ => PrefetchProgress::Filling,
        };
        self.prefetch.iter().map(|(key, prefetch)| (key.clone(), progress(*prefetch))).collect()
    }

    /// The node has acknowledged that it holds every copy.
    pub(super) fn completed(&mut self, key: &LeaseKey) {
        if let Some(prefetch) = self.prefetch.get_mut(key)
            && *prefetch == Prefetch::Sent
        {
            *prefetch = Prefetch::Complete;
        }
    }

    /// What was read at `revision` is going to be sent. The feed is followed from the first time on.
    pub(super) fn desired(&mut self, revision: u64, views: &BTreeMap<TenantId, Arc<TenantView>>) {
        self.cursor.get_or_insert(revision);
        for (tenant, view) in views {
            if self.generations.get(tenant) != Some(&view.generation) {
                self.generations.insert(tenant.clone(), view.generation);
                self.reconfigured(tenant, &view.backends);
            }
        }
        if self.generations.len() > views.len() {
            self.generations.retain(|tenant, _| views.contains_key(tenant));
            self.prefetch.retain(|key, _| views.contains_key(&key.tenant));
            self.stop_survey();
            // Which copies are theirs is not known by their hashes.
            self.compare();
        }
    }

    fn reconfigured(&mut self, tenant: &TenantId, backends: &[BackendView]) {
        let prefetched = |backend: &&BackendView| {
            backend.enabled && backend.sync.prefetch && !backend.rules_in(Mode::Sync).is_empty()
        };
        let prefetched = backends.iter().filter(prefetched);
        let prefetched: BTreeSet<LeaseKey> = prefetched
            .map(|backend| LeaseKey { tenant: tenant.clone(), backend: backend.id.clone() })
            .collect();
        self.prefetch.retain(|key, _| key.tenant != *tenant || prefetched.contains(key));
        // Also what was complete: another configuration may have more of it.
        self.prefetch.extend(prefetched.into_iter().map(|key| (key, Prefetch::Due)));
        self.ask_again(|key| key.tenant == *tenant);
    }

    /// Has absences looked at again.
    fn ask_again(&mut self, concerned: impl Fn(&SecretKey) -> bool) {
        let before = self.before();
        for (hash, told) in &self.told {
            if let Told::Absent(key, _) = told
                && concerned(key)
            {
                self.looks.put(*hash, key, Rank::Wanted, before, false);
            }
        }
    }

    /// Revisions start over.
    pub(super) fn enter_epoch(&mut self) {
        for told in self.told.values_mut() {
            if let Told::Copy(stamp) = told {
                stamp.revision = 0;
            }
        }
        self.generations.clear();
        self.prefetch.clear();
        self.mark = Mark::default();
        self.gone.clear();
        self.looks.start_over();
        self.feed_lost();
    }

    /// The feed cannot tell any more what has changed: everything is compared, and the feed followed from the next
    /// desired state on.
    pub(super) fn feed_lost(&mut self) {
        self.cursor = None;
        self.stop_survey();
        self.prefetch.values_mut().for_each(|prefetch| *prefetch = Prefetch::Due);
        if self.told.values().any(|told| !matches!(told, Told::Asked)) {
            self.compare = Compare::Needed;
        }
    }

    /// Has a survey that is under way begin again.
    fn stop_survey(&mut self) {
        self.survey = None;
        self.turn_prefetch(Prefetch::Surveyed, Prefetch::Due);
    }

    fn turn_prefetch(&mut self, from: Prefetch, to: Prefetch) {
        self.prefetch.values_mut().filter(|this| **this == from).for_each(|this| *this = to);
    }

    /// Compares everything that the node holds, to be on the safe side.
    pub(super) fn compare(&mut self) {
        if self.compare == Compare::Done && self.follows() {
            self.compare = Compare::Due;
            self.turn_prefetch(Prefetch::Overfull, Prefetch::Due);
        }
    }

    /// Whether it has to be said first at which revision the feed is followed.
    pub(super) fn adrift(&self) -> bool {
        self.cursor.is_none()
    }

    /// Whether the feed can say anything that concerns the node.
    fn follows(&self) -> bool {
        !self.told.is_empty() || !self.prefetch.is_empty()
    }

    pub(super) fn mark(&mut self, mark: Mark) {
        self.mark = mark;
        if !self.follows()
            && let Some(cursor) = &mut self.cursor
        {
            *cursor = mark.revision.max(*cursor);
        }
    }

    /// From where the feed has something new.
    pub(super) fn cursor(&self) -> Option<u64> {
        self.cursor.filter(|cursor| *cursor < self.mark.revision)
    }

    /// Takes a page of the feed; whether anything of it concerns the node.
    pub(super) fn changed(&mut self, page: &SecretChanges) -> bool {
        let before = self.before();
        let mut concerned = false;
        for change in &page.changes {
            let prefetched = self.is_prefetched(&change.key.tenant, change.prefetch.as_ref());
            let rank = match self.told.get(&change.hash) {
                Some(Told::Copy(_)) => Rank::Held,
                Some(Told::Asked | Told::Absent(..)) => Rank::Wanted,
                None if prefetched && self.may_hold_more() => Rank::Prefetch,
                None => continue,
            };
            concerned |= rank < Rank::Prefetch;
            self.looks.put(change.hash, &change.key, rank, before, prefetched);
        }
        let again: HashSet<&TenantId> = page.absent_again.iter().map(|backend| &backend.tenant).collect();
        if !again.is_empty() {
            concerned = true;
            self.ask_again(|key| again.contains(&key.tenant));
        }
        self.cursor = self.cursor.max(Some(page.next));
        concerned
    }

    fn is_prefetched(&self, tenant: &TenantId, backend: Option<&BackendId>) -> bool {
        backend.is_some_and(|backend| {
            self.prefetch.contains_key(&LeaseKey { tenant: tenant.clone(), backend: backend.clone() })
        })
    }

    fn may_hold_more(&self) -> bool {
        self.told.len() + self.looks.len() < MAX_SECRETS
    }

    /// What a look that is due now may be announced before.
    fn before(&self) -> u64 {
        match self.compare {
            Compare::Needed => 0,
            Compare::Due | Compare::Done => self.cursor.unwrap_or(0),
        }
    }

    /// The next page that has to be surveyed: a tenant, and after which path.
    pub(super) fn page(&mut self) -> Option<(TenantId, Option<SecretPath>)> {
        self.cursor?;
        if self.survey.is_none() {
            self.begin_survey()?;
        }
        if self.looks.len() >= MAX_WAITING {
            return None;
        }
        let survey = self.survey.as_ref()?;
        Some((survey.tenants.front()?.clone(), survey.after.clone()))
    }

    /// Whether [`page`](Self::page) has one.
    pub(super) fn has_page(&self) -> bool {
        let due = self.compare != Compare::Done || self.prefetch.values().any(|this| *this == Prefetch::Due);
        (due || self.survey.is_some()) && self.cursor.is_some() && self.looks.len() < MAX_WAITING
    }

    fn begin_survey(&mut self) -> Option<()> {
        let compare = self.compare != Compare::Done;
        let due = self.prefetch.iter_mut().filter(|(_, prefetch)| **prefetch == Prefetch::Due);
        let mut prefetched = BTreeSet::new();
        for (key, prefetch) in due {
            *prefetch = Prefetch::Surveyed;
            prefetched.insert(key.tenant.clone());
        }
        let (tenants, unseen) = if compare {
            self.ask_again(|_| true);
            let copies = self.told.iter().filter(|(_, told)| matches!(told, Told::Copy(_)));
            (self.generations.keys().cloned().collect(), Some(copies.map(|(hash, _)| *hash).collect()))
        } else if prefetched.is_empty() {
            return None;
        } else {
            (prefetched.into_iter().collect(), None)
        };
        self.survey = Some(Survey { tenants, after: None, unseen, overfull: false });
        self.end_survey();
        Some(())
    }

    /// Takes a page of the survey. Fewer than `max`: it was the last one of its tenant.
    pub(super) fn surveyed(&mut self, page: Vec<Surveyed>, max: usize) {
        let Some(mut survey) = self.survey.take() else { return };
        let Some(tenant) = survey.tenants.front().cloned() else { return };
        let (last, before) = (page.len() < max, self.before());
        survey.after = if last { None } else { page.last().map(|found| found.path.clone()) };
        for Surveyed { path, stamp, prefetch } in page {
            let prefetched = self.is_prefetched(&tenant, prefetch.as_ref());
            let key = SecretKey { tenant: tenant.clone(), path };
            let hash = key.hash();
            if let Some(unseen) = &mut survey.unseen {
                unseen.remove(&hash);
            }
            match self.told.get_mut(&hash) {
                Some(Told::Copy(held)) if is_same(held, &stamp) => *held = stamp,
                // What was sent meanwhile is newer than the survey.
                Some(Told::Copy(held)) if held.revision > stamp.revision => {}
                Some(Told::Copy(_)) => self.looks.put(hash, &key, Rank::Held, before, prefetched),
                Some(Told::Asked | Told::Absent(..)) => {
                    self.looks.put(hash, &key, Rank::Wanted, before, prefetched);
                }
                None if prefetched => match self.may_hold_more() {
                    true => self.looks.put(hash, &key, Rank::Prefetch, before, prefetched),
                    false => survey.overfull = true,
                },
                None => {}
            }
        }
        if last {
            survey.tenants.pop_front();
        }
        self.survey = Some(survey);
        self.end_survey();
    }

    /// Ends the survey if all of it is there.
    fn end_survey(&mut self) {
        let Some(survey) = self.survey.take_if(|survey| survey.tenants.is_empty()) else { return };
        if let Some(unseen) = survey.unseen {
            self.compare = Compare::Done;
            self.gone.extend(unseen.into_iter().filter(|hash| self.looks.get(hash).is_none()));
        }
        let found = match survey.overfull {
            true => Prefetch::Overfull,
            false => Prefetch::Sending(self.looks.last_seq()),
        };
        self.turn_prefetch(Prefetch::Surveyed, found);
    }

    /// Which secrets to look at now, given how many responses are under way. `behind`: other things come first, except
    /// for what may have to be taken away.
    pub(super) fn reads(&self, in_flight: usize, behind: bool) -> Vec<SecretKey> {
        self.last_rank(in_flight, behind).map_or_else(Vec::new, |last| self.looks.next(last, LOOKS_AT_ONCE))
    }

    /// Whether [`reads`](Self::reads) has any.
    pub(super) fn has_reads(&self, in_flight: usize, behind: bool) -> bool {
        self.last_rank(in_flight, behind).is_some_and(|last| !self.looks.next(last, 1).is_empty())
    }

    fn last_rank(&self, in_flight: usize, behind: bool) -> Option<Rank> {
        if self.cursor.is_none() || in_flight >= Lane::Urgent.room() {
            None
        } else if behind || in_flight >= Lane::Bulk.room() {
            Some(Rank::Held)
        } else if in_flight >= Lane::Prefetch.room() {
            Some(Rank::Wanted)
        } else {
            Some(Rank::Prefetch)
        }
    }

    /// What was found; the next plan sends it.
    pub(super) fn found(&mut self, key: &SecretKey, found: Found) {
        let hash = key.hash();
        if self.looks.found(&hash, found).is_some() {
            self.answered.push(hash);
        }
    }

    /// Sends what takes something away.
    pub(super) fn fill_removals(&mut self, batch: &mut Batch, now: Timestamp) -> Option<()> {
        while let Some(hash) = self.gone.first().copied() {
            batch.remove(pb::removal::Resource::SecretHash(hash.0.to_vec()))?;
            self.forget(&hash);
        }
        self.fill(Lane::Urgent, batch, now, |_, found| match found {
            Ok((_, replica)) => replica.value.is_none(),
            Err(_) => true,
        })
    }

    /// Sends what somebody waits for.
    pub(super) fn fill_wanted(&mut self, batch: &mut Batch, now: Timestamp) -> Option<()> {
        self.fill(Lane::Bulk, batch, now, |rank, _| rank < Rank::Prefetch)
    }

    /// Sends the rest, and says which backends are complete with it.
    pub(super) fn fill_prefetched(&mut self, batch: &mut Batch, now: Timestamp) -> Option<()> {
        self.fill(Lane::Prefetch, batch, now, |_, _| true)?;
        for (key, prefetch) in &mut self.prefetch {
            if let Prefetch::Sending(until) = *prefetch
                && self.looks.done_up_to(until)
            {
                let complete = pb::upsert::Resource::PrefetchComplete(wire::key_to_wire(key));
                batch.upsert(Lane::Prefetch, complete)?.in_flight.complete.push(key.clone());
                *prefetch = Prefetch::Sent;
            }
        }
        Some(())
    }

    /// Forgets what had no room: it is read again, as it is then.
    pub(super) fn end_fill(&mut self) {
        for hash in std::mem::take(&mut self.answered) {
            self.looks.forget_found(&hash);
        }
    }

    fn fill(
        &mut self,
        lane: Lane,
        batch: &mut Batch,
        now: Timestamp,
        goes: impl Fn(Rank, &Found) -> bool,
    ) -> Option<()> {
        let mut answered = std::mem::take(&mut self.answered).into_iter();
        let mut left = Vec::new();
        let mut room = Some(());
        for hash in answered.by_ref() {
            let look = self.looks.get(&hash);
            let goes =
                look.is_some_and(|look| look.found.as_ref().is_some_and(|found| goes(look.rank, found)));
            if !goes {
                left.push(hash);
                continue;
            }
            room = self.send(hash, lane, batch, now);
            if room.is_none() {
                left.push(hash);
                break;
            }
        }
        left.extend(answered);
        self.answered = left;
        room
    }

    /// Sends what was found of one secret, unless the node knows it. `None`: there was no room.
    fn send(&mut self, hash: KeyHash, lane: Lane, batch: &mut Batch, now: Timestamp) -> Option<()> {
        let look = self.looks.get(&hash)?;
        let told = match (self.told.get(&hash), look.found.as_ref()?) {
            // Nobody asked for it, or not any more.
            (None, Err(_)) => None,
            (None, Ok(_)) if !look.prefetch => None,
            (Some(Told::Copy(held)), Ok((stamp, _))) if is_same(held, stamp) => Some(Told::Copy(*stamp)),
            (Some(Told::Copy(held)), Ok((stamp, _))) if held.revision > stamp.revision => None,
            (Some(Told::Absent(_, told)), Err(absence)) if told == absence => None,
            (_, Ok((stamp, replica))) => {
                let (key, replica, prefetched) = (look.key.clone(), replica.clone(), look.prefetch);
                let copy = wire::copy_to_wire(&SecretCopy { key, stamp: *stamp, replica, prefetched }, now);
                let draft = batch.upsert(lane, pb::upsert::Resource::Secret(copy))?;
                if prefetched {
                    draft.in_flight.prefetched.push(hash);
                }
                Some(Told::Copy(*stamp))
            }
            (_, Err(absence)) => {
                batch.remove(pb::removal::Resource::Secret(wire::absence_to_wire(&look.key, *absence)))?;
                Some(Told::Absent(Box::new(look.key.clone()), *absence))
            }
        };
        self.looks.remove(&hash);
        if let Some(told) = told {
            self.tell(hash, told);
        }
        Some(())
    }

    fn tell(&mut self, hash: KeyHash, told: Told) {
        self.forget(&hash);
        self.copies += usize::from(matches!(told, Told::Copy(_)));
        self.told.insert(hash, told);
    }

    fn forget(&mut self, hash: &KeyHash) {
        let before = self.told.remove(hash);
        self.copies -= usize::from(matches!(before, Some(Told::Copy(_))));
        // What a survey found out about it is over.
        self.gone.remove(hash);
        if let Some(unseen) = self.survey.as_mut().and_then(|survey| survey.unseen.as_mut()) {
            unseen.remove(hash);
        }
    }

    /// The revision up to which everything that concerns the node was sent, if views and grants are at `desired`.
    pub(super) fn whole_at(&self, desired: u64) -> Option<u64> {
        if self.compare == Compare::Needed || !self.gone.is_empty() {
            return None;
        }
        let desired = if self.mark.concerned <= desired { self.mark.revision.max(desired) } else { desired };
        if !self.follows() {
            return Some(desired);
        }
        let followed = self.cursor?;
        Some(desired.min(self.looks.whole_at().map_or(followed, |before| before.min(followed))))
    }

    /// Whether an acknowledgement may make something possible.
    pub(super) fn unfinished(&self) -> bool {
        !self.looks.is_empty()
            || !self.gone.is_empty()
            || self.survey.is_some()
            || self.compare != Compare::Done
            || self.prefetch.values().any(|this| matches!(this, Prefetch::Due | Prefetch::Sending(_)))
    }
}

/// Whether the node holds this state already.
fn is_same(held: &Stamp, stamp: &Stamp) -> bool {
    if held.revision == 0 { held.tag == stamp.tag } else { held.revision == stamp.revision }
}
