//! The control plane's half, one per stream: what the node was sent, and what it must be sent next.

mod batch;
mod looks;
mod secrets;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use prost::Message as _;
use scaivault_domain::access::Caller;
use scaivault_domain::budget::Slice;
use scaivault_domain::error::Reason;
use scaivault_domain::lease::LeaseKey;
use scaivault_domain::path::SecretPath;
use scaivault_domain::replica::{Freshness, SecretKey};
use scaivault_domain::tenant::TenantId;
use scaivault_domain::time::Timestamp;
use scaivault_domain::token::TokenHash;
use scaivault_domain::view::{Generation, TenantView};
use scaivault_proto::discovery::v1 as pb;
use scaivault_proto::discovery::v1::delta_request::Message;

use self::batch::{Batch, InFlight, Lane};
pub use self::looks::Found;
use self::secrets::Secrets;
pub use self::secrets::{Mark, SecretChange, SecretChanges, Surveyed};
use crate::wire::{self, LeasePush, LeaseRefusal, Refused};
use crate::{MAX_GRANTS, MAX_LEASES, MAX_SECRETS};

/// Most views that a node may say it holds.
const MAX_VIEWS: usize = 100_000;

/// What a node asked for, besides secrets.
#[derive(Clone, Debug, Default)]
pub struct Demands {
    /// The tokens whose grants it wants.
    pub grants: HashSet<TokenHash>,
    /// The backends whose leases it wants.
    pub leases: HashSet<LeaseKey>,
}

/// Everything a node should have now, besides secrets.
#[derive(Clone, Debug, Default)]
pub struct Desired {
    /// The store's epoch; not empty.
    pub epoch: String,
    /// The store's revision that this was read at.
    pub revision: u64,
    /// The views of every tenant that the node serves.
    pub views: BTreeMap<TenantId, Arc<TenantView>>,
    /// The demanded grants, each with its version; `None`: unknown, expired or revoked. A demand without an entry is
    /// answered by a later diff.
    pub grants: HashMap<TokenHash, Option<(u64, Arc<Caller>)>>,
    /// The demanded leases. A demand without an entry is pending.
    pub leases: HashMap<LeaseKey, LeaseState>,
    /// When the copies of the backends of the node's tenants were last compared with them.
    pub freshness: BTreeMap<LeaseKey, Arc<Freshness>>,
}

/// How a demanded lease stands.
#[derive(Clone, Debug)]
pub enum LeaseState {
    /// The login is under way; the node keeps what it has.
    Pending,
    /// There is one.
    Held(LeasePush),
    /// There is none.
    Refused(LeaseRefusal),
}

/// What is to be done after a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum NextStep {
    /// Nothing.
    Wait,
    /// There is room again: plan what the last plan had no room for; the same desired state will do.
    Continue,
    /// The node asked for something: plan with a new desired state.
    Diff,
}

/// What a request said beyond what the publisher keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heard {
    /// What is to be done.
    pub next: NextStep,
    /// Leases of these ids were refused by their backends.
    pub refused_leases: Vec<(LeaseKey, String)>,
    /// What the node refused.
    pub refusals: Vec<Refusal>,
}

/// Something that the node refused to apply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The tenant as the node names it; empty if it names none.
    pub tenant: String,
    /// Why.
    pub message: String,
}

/// The node broke the protocol; the stream must end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// A message that cannot come here.
    #[error("{0} cannot come here")]
    OutOfTurn(&'static str),
    /// A message that cannot be read.
    #[error("{0}")]
    Malformed(#[from] Refused),
    /// A response that was never sent, or is acknowledged already.
    #[error("response {0} is not waiting for an acknowledgement")]
    UnknownNonce(u64),
    /// More demands than a node may have.
    #[error("a node may demand at most {MAX_GRANTS} grants, {MAX_LEASES} leases and {MAX_SECRETS} secrets")]
    TooManyDemands,
}

/// How a node stands, as its acknowledgements tell.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// By tenant.
    pub views: BTreeMap<TenantId, ViewProgress>,
    /// The id of the lease that the node holds, by backend.
    pub leases: BTreeMap<LeaseKey, String>,
    /// How many copies of secrets it was sent.
    pub secrets: usize,
    /// The prefetched backends.
    pub prefetch: BTreeMap<LeaseKey, PrefetchProgress>,
}

/// How a node stands with the copies of a prefetched backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrefetchProgress {
    /// Some are on their way.
    Filling,
    /// It holds all, and is sent what changes.
    Complete,
}

/// How a node stands with one tenant's view.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ViewProgress {
    /// The generation that was sent last, perhaps not yet whole.
    pub sent: Option<Generation>,
    /// The generation that is in force, as far as is known.
    pub acknowledged: Option<Generation>,
    /// The generation that was sent last was refused.
    pub refusal: Option<ViewRefusal>,
}

/// Why a view is not in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ViewRefusal {
    /// Which generation.
    pub generation: Generation,
    /// Why, one sentence of the node.
    pub message: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    Hello,
    Resume,
    Stream,
}

#[derive(Debug, Default)]
struct View {
    /// `sent: None` is a view of another epoch: any generation replaces it.
    progress: ViewProgress,
    /// Chunks of the generation that had no room yet.
    unsent: VecDeque<pb::TenantViewChunk>,
    /// Responses with chunks that are not acknowledged.
    unacknowledged: BTreeSet<u64>,
}

#[derive(Debug)]
enum SentLease {
    /// From `Resume`.
    Resumed {
        id: String,
    },
    /// `remaining` as of the last diff: if it grows, the lease was renewed.
    Held {
        id: String,
        remaining: Option<Duration>,
        slice: Option<Slice>,
    },
    Refused {
        reason: Option<Reason>,
        message: String,
    },
}

/// The control plane's half of the protocol, for one stream of one node.
#[derive(Debug)]
pub struct Publisher {
    turn: Turn,
    build: String,
    epoch: String,
    /// The revision that the node was told to have whole; `None`: nothing yet on this stream or in this epoch.
    revision: Option<u64>,
    /// The revision that the last complete diff was made at.
    diffed: Option<u64>,
    /// A revision that is worth a response of its own: something in it concerned the node.
    owed: u64,
    nonce: u64,
    /// How many `Subscribe` messages were heard.
    subscribes: u64,
    in_flight: BTreeMap<u64, InFlight>,
    /// The last plan had no room for everything.
    behind: bool,
    demands: Demands,
    views: BTreeMap<TenantId, View>,
    /// What was answered: a version, or that there is none.
    grants: HashMap<TokenHash, Option<u64>>,
    leases: HashMap<LeaseKey, SentLease>,
    /// Ids that the node wants replaced.
    refused_leases: HashMap<LeaseKey, String>,
    held_leases: BTreeMap<LeaseKey, String>,
    freshness: BTreeMap<LeaseKey, Arc<Freshness>>,
    /// What is to be sent once the node has every copy as of this revision: a copy that is out of date must not be told
    /// to be fresh.
    fresher: BTreeMap<LeaseKey, (u64, Arc<Freshness>)>,
    secrets: Secrets,
}

impl Default for Publisher {
    fn default() -> Self {
        Publisher {
            turn: Turn::Hello,
            build: String::new(),
            epoch: String::new(),
            revision: None,
            diffed: None,
            owed: 0,
            nonce: 0,
            subscribes: 0,
            in_flight: BTreeMap::new(),
            behind: false,
            demands: Demands::default(),
            views: BTreeMap::new(),
            grants: HashMap::new(),
            leases: HashMap::new(),
            refused_leases: HashMap::new(),
            held_leases: BTreeMap::new(),
            freshness: BTreeMap::new(),
            fresher: BTreeMap::new(),
            secrets: Secrets::default(),
        }
    }
}

impl Publisher {
    /// A publisher for a stream that was just opened.
    pub fn new() -> Self {
        Publisher::default()
    }

    /// What the node asked for.
    pub fn demands(&self) -> &Demands {
        &self.demands
    }

    /// The node's build; empty before it said hello.
    pub fn build(&self) -> &str {
        &self.build
    }

    /// Whether the node has said what it holds; before that nothing is planned.
    pub fn resumed(&self) -> bool {
        self.turn == Turn::Stream
    }

    /// Whether the last plan had no room for all of the desired state.
    pub fn behind(&self) -> bool {
        self.behind
    }

    /// Whether there must be a new desired state: what is known does not say from where to follow the feed.
    pub fn adrift(&self) -> bool {
        self.secrets.adrift()
    }

    /// Takes how far the feed can be followed.
    pub fn mark(&mut self, mark: Mark) {
        self.secrets.mark(mark);
    }

    /// From where the feed has something that may concern the node.
    pub fn cursor(&self) -> Option<u64> {
        self.secrets.cursor()
    }

    /// Takes what the feed said behind [`cursor`](Self::cursor).
    pub fn changed(&mut self, page: &SecretChanges) {
        if self.secrets.changed(page) {
            self.owed = self.owed.max(page.next);
        }
    }

    /// The feed does not reach back to [`cursor`](Self::cursor): everything will be compared.
    pub fn feed_lost(&mut self) {
        self.secrets.feed_lost();
    }

    /// Has everything compared that the node holds: a net for what was missed.
    pub fn compare(&mut self) {
        self.secrets.compare();
    }

    /// The page that has to be surveyed next: of which tenant, and after which path.
    pub fn page(&mut self) -> Option<(TenantId, Option<SecretPath>)> {
        self.secrets.page()
    }

    /// Takes the page that [`page`](Self::page) asked for. Fewer than `max`: it was the tenant's last one.
    pub fn surveyed(&mut self, page: Vec<Surveyed>, max: usize) {
        self.secrets.surveyed(page, max);
    }

    /// The secrets that have to be looked at next, in this order.
    pub fn reads(&self) -> Vec<SecretKey> {
        self.secrets.reads(self.in_flight.len(), self.behind)
    }

    /// Takes what was found of the first of [`reads`](Self::reads). The next plan sends as much of it as there is room
    /// for, and forgets the rest: it will be looked at again.
    pub fn found(&mut self, found: impl IntoIterator<Item = (SecretKey, Found)>) {
        found.into_iter().for_each(|(key, found)| self.secrets.found(&key, found));
    }

    /// Whether there is a page or a look to be had before the node says anything.
    pub fn busy(&self) -> bool {
        self.resumed()
            && (self.secrets.has_page() || self.secrets.has_reads(self.in_flight.len(), self.behind))
    }

    /// How the node stands.
    pub fn progress(&self) -> Progress {
        let views = self.views.iter().map(|(tenant, view)| (tenant.clone(), view.progress.clone())).collect();
        Progress {
            views,
            leases: self.held_leases.clone(),
            secrets: self.secrets.copies(),
            prefetch: self.secrets.progress(),
        }
    }

    /// Takes what the node says.
    ///
    /// # Errors
    /// If the node broke the protocol; the stream must end.
    pub fn on_request(&mut self, request: pb::DeltaRequest) -> Result<Heard, Violation> {
        let message =
            request.message.ok_or_else(|| Refused::new("a request of a kind that is not known here"))?;
        let mut heard = Heard { next: NextStep::Wait, refused_leases: Vec::new(), refusals: Vec::new() };
        match (self.turn, message) {
            (Turn::Hello, Message::Hello(hello)) => {
                self.build = hello.build.chars().take(64).collect();
                self.epoch = hello.epoch;
                self.turn = Turn::Resume;
            }
            (Turn::Resume, Message::Resume(resume)) => {
                if resume.last {
                    self.turn = Turn::Stream;
                    heard.next = NextStep::Diff;
                }
                self.resume(resume)?;
            }
            (Turn::Stream, Message::Subscribe(subscribe)) => {
                heard.next = match subscribe.token_hashes.is_empty() && subscribe.leases.is_empty() {
                    true => NextStep::Continue,
                    false => NextStep::Diff,
                };
                heard.refused_leases = self.subscribe(subscribe)?;
                self.subscribes += 1;
            }
            (Turn::Stream, Message::Unsubscribe(unsubscribe)) => self.unsubscribe(unsubscribe)?,
            (Turn::Stream, Message::Ack(ack)) => heard.next = self.settle(ack.nonce, &[])?,
            (Turn::Stream, Message::Nack(nack)) => {
                heard.next = self.settle(nack.nonce, &nack.refusals)?;
                let refusals = nack.refusals.into_iter();
                heard.refusals =
                    refusals.map(|r| Refusal { tenant: r.tenant, message: shortened(&r.message) }).collect();
            }
            (_, Message::Hello(_)) => return Err(Violation::OutOfTurn("Hello")),
            (_, Message::Resume(_)) => return Err(Violation::OutOfTurn("Resume")),
            (_, Message::Subscribe(_)) => return Err(Violation::OutOfTurn("Subscribe")),
            (_, Message::Unsubscribe(_)) => return Err(Violation::OutOfTurn("Unsubscribe")),
            (_, Message::Ack(_)) => return Err(Violation::OutOfTurn("Ack")),
            (_, Message::Nack(_)) => return Err(Violation::OutOfTurn("Nack")),
        }
        Ok(heard)
    }

    fn resume(&mut self, resume: pb::Resume) -> Result<(), Violation> {
        // Generation 0, version 0 and an empty id are held from another epoch.
        for held in resume.views {
            let sent = (held.generation != 0).then_some(held.generation);
            let progress = ViewProgress { sent, acknowledged: sent, refusal: None };
            self.views.insert(
                TenantId::parse(&held.tenant).map_err(Refused::from)?,
                View { progress, ..View::default() },
            );
        }
        for held in resume.grants {
            let hash = wire::hash_from_wire(&held.token_hash)?;
            self.demands.grants.insert(hash);
            if held.version != 0 {
                self.grants.insert(hash, Some(held.version));
            }
        }
        for held in resume.leases {
            let key = wire::key_from_wire(held.key.as_ref())?;
            self.demands.leases.insert(key.clone());
            if !held.id.is_empty() {
                self.held_leases.insert(key.clone(), held.id.clone());
                self.leases.insert(key, SentLease::Resumed { id: held.id });
            }
        }
        wire::held_from_wire(&resume.secrets)?.for_each(|(hash, stamp)| self.secrets.resume(hash, stamp));
        self.check_bounds()
    }

    fn subscribe(&mut self, subscribe: pb::Subscribe) -> Result<Vec<(LeaseKey, String)>, Violation> {
        let mut refused = Vec::new();
        // Forgetting what was answered makes the next diff answer again.
        for bytes in &subscribe.token_hashes {
            let hash = wire::hash_from_wire(bytes)?;
            self.demands.grants.insert(hash);
            self.grants.remove(&hash);
        }
        for demand in subscribe.leases {
            let key = wire::key_from_wire(demand.key.as_ref())?;
            self.demands.leases.insert(key.clone());
            self.leases.remove(&key);
            if demand.refused_id.is_empty() {
                self.refused_leases.remove(&key);
            } else {
                self.held_leases.remove(&key);
                self.refused_leases.insert(key.clone(), demand.refused_id.clone());
                refused.push((key, demand.refused_id));
            }
        }
        for name in &subscribe.secrets {
            self.secrets.subscribe(&wire::name_from_wire(Some(name))?);
        }
        self.check_bounds().map(|()| refused)
    }

    fn unsubscribe(&mut self, unsubscribe: pb::Unsubscribe) -> Result<(), Violation> {
        for bytes in &unsubscribe.token_hashes {
            let hash = wire::hash_from_wire(bytes)?;
            self.demands.grants.remove(&hash);
            self.grants.remove(&hash);
        }
        for key in &unsubscribe.leases {
            let key = wire::key_from_wire(Some(key))?;
            self.demands.leases.remove(&key);
            self.leases.remove(&key);
            self.refused_leases.remove(&key);
            self.held_leases.remove(&key);
        }
        for hash in wire::hashes_from_wire(&unsubscribe.secret_hashes)? {
            // A prefetched copy on its way is taken all the same, so it must be followed.
            if !self.in_flight.values().any(|response| response.prefetched.contains(&hash)) {
                self.secrets.unsubscribe(hash);
            }
        }
        Ok(())
    }

    fn check_bounds(&self) -> Result<(), Violation> {
        let within = self.demands.grants.len() <= MAX_GRANTS
            && self.demands.leases.len() <= MAX_LEASES
            && self.views.len() <= MAX_VIEWS
            && self.secrets.len() <= MAX_SECRETS;
        within.then_some(()).ok_or(Violation::TooManyDemands)
    }

    fn settle(&mut self, nonce: u64, refusals: &[pb::Refusal]) -> Result<NextStep, Violation> {
        let settled = self.in_flight.remove(&nonce).ok_or(Violation::UnknownNonce(nonce))?;
        for refusal in refusals {
            let view = TenantId::parse(&refusal.tenant).ok().and_then(|tenant| self.views.get_mut(&tenant));
            // A refusal of what was superseded, or of another epoch, says nothing about what is on its way.
            if let Some(view) = view.filter(|view| view.unacknowledged.contains(&nonce))
                && view.progress.sent == Some(refusal.generation)
            {
                view.unsent.clear();
                // The first says why; those of the chunks behind it only say that it is missing.
                view.progress.refusal.get_or_insert_with(|| ViewRefusal {
                    generation: refusal.generation,
                    message: shortened(&refusal.message),
                });
            }
        }
        for tenant in settled.tenants {
            if let Some(view) = self.views.get_mut(&tenant)
                && view.unacknowledged.remove(&nonce)
                && view.unacknowledged.is_empty()
                && view.unsent.is_empty()
                && view.progress.refusal.is_none()
            {
                view.progress.acknowledged = view.progress.sent;
            }
        }
        for (key, id) in settled.leases {
            if matches!(self.leases.get(&key), Some(SentLease::Held { id: sent, .. }) if *sent == id) {
                self.held_leases.insert(key, id);
            }
        }
        settled.complete.iter().for_each(|key| self.secrets.completed(key));
        let owed = self.revision.is_none_or(|said| said < self.owed);
        let waiting = !self.fresher.is_empty() || self.secrets.unfinished();
        Ok(if self.behind || owed || waiting { NextStep::Continue } else { NextStep::Wait })
    }

    /// What to send now, in this order. What has no room before the node acknowledges is left to a later plan, which
    /// may as well have another desired state; without one, views, grants, freshness and leases stay as they are.
    pub fn plan(&mut self, desired: Option<&Desired>, now: Timestamp) -> Vec<pb::DeltaResponse> {
        if !self.resumed() {
            return Vec::new();
        }
        if let Some(desired) = desired {
            if self.epoch != desired.epoch {
                self.enter_epoch(&desired.epoch);
            }
            self.secrets.desired(desired.revision, &desired.views);
        }
        let mut batch = Batch::new(self.nonce, self.in_flight.len());
        self.behind |= desired.is_some();
        // Without room for all of it the rest waits for an acknowledgement.
        let _ = self.fill(desired, &mut batch, now);
        self.secrets.end_fill();

        let whole = self.diffed.filter(|_| !self.behind).and_then(|diffed| self.secrets.whole_at(diffed));
        let whole = whole.filter(|whole| self.revision.is_none_or(|said| said < *whole));
        if whole.is_some() && batch.drafts.is_empty() && self.revision.is_none_or(|said| said < self.owed) {
            batch.open(Lane::Bulk);
        }
        let before = self.revision.unwrap_or(0);
        if !batch.drafts.is_empty() {
            self.revision = whole.or(self.revision);
        }
        let (last, count) = (self.revision.unwrap_or(0), batch.drafts.len());
        let mut responses = Vec::with_capacity(count);
        for (index, draft) in batch.drafts.into_iter().enumerate() {
            self.nonce += 1;
            self.in_flight.insert(self.nonce, draft.in_flight);
            responses.push(pb::DeltaResponse {
                nonce: self.nonce,
                epoch: self.epoch.clone(),
                revision: if index + 1 == count { last } else { before },
                removals: draft.removals,
                upserts: draft.upserts,
                subscribes: self.subscribes,
            });
        }
        responses
    }

    /// Everything that the node holds is of another epoch: it is sent anew or taken away.
    fn enter_epoch(&mut self, epoch: &str) {
        self.epoch = epoch.to_owned();
        self.revision = None;
        self.diffed = None;
        self.owed = 0;
        self.views.values_mut().for_each(|view| *view = View::default());
        self.grants.clear();
        self.leases.clear();
        self.held_leases.clear();
        self.freshness.clear();
        self.fresher.clear();
        self.secrets.enter_epoch();
    }

    /// `None`: there was no room for all of it.
    fn fill(&mut self, desired: Option<&Desired>, batch: &mut Batch, now: Timestamp) -> Option<()> {
        self.secrets.fill_removals(batch, now)?;
        if let Some(desired) = desired {
            self.fill_removals(desired, batch)?;
            self.fill_grants(desired, batch)?;
            self.fill_views(desired, batch)?;
            self.note_freshness(desired);
            self.fill_leases(desired, batch)?;
            self.behind = false;
            self.diffed = self.diffed.max(Some(desired.revision));
            self.owed = self.owed.max(desired.revision);
        }
        if self.behind {
            return None;
        }
        self.secrets.fill_wanted(batch, now)?;
        self.fill_freshness(batch, now)?;
        self.secrets.fill_prefetched(batch, now)
    }

    fn fill_removals(&mut self, desired: &Desired, batch: &mut Batch) -> Option<()> {
        let gone: Vec<_> =
            self.views.keys().filter(|tenant| !desired.views.contains_key(*tenant)).cloned().collect();
        for tenant in gone {
            batch.remove(pb::removal::Resource::Tenant(tenant.to_string()))?;
            self.views.remove(&tenant);
        }
        for (hash, grant) in &desired.grants {
            if grant.is_none() && self.demands.grants.contains(hash) && self.grants.get(hash) != Some(&None) {
                batch.remove(pb::removal::Resource::TokenHash(hash.as_bytes().to_vec()))?;
                self.grants.insert(*hash, None);
            }
        }
        for (key, lease) in &desired.leases {
            let LeaseState::Refused(refusal) = lease else { continue };
            let told = matches!(self.leases.get(key), Some(SentLease::Refused { reason, message })
                if *reason == refusal.reason && *message == refusal.message);
            if !told && self.demands.leases.contains(key) {
                batch.remove(pb::removal::Resource::Lease(wire::refusal_to_wire(key, refusal)))?;
                let (reason, message) = (refusal.reason, refusal.message.clone());
                self.leases.insert(key.clone(), SentLease::Refused { reason, message });
                self.held_leases.remove(key);
            }
        }
        Some(())
    }

    fn fill_grants(&mut self, desired: &Desired, batch: &mut Batch) -> Option<()> {
        for (hash, grant) in &desired.grants {
            let Some((version, caller)) = grant else { continue };
            if self.demands.grants.contains(hash) && self.grants.get(hash) != Some(&Some(*version)) {
                let grant = wire::grant_to_wire(hash, *version, caller);
                batch.upsert(Lane::Urgent, pb::upsert::Resource::Grant(grant))?;
                self.grants.insert(*hash, Some(*version));
            }
        }
        Some(())
    }

    fn fill_views(&mut self, desired: &Desired, batch: &mut Batch) -> Option<()> {
        for (tenant, wanted) in &desired.views {
            let view = self.views.entry(tenant.clone()).or_default();
            if view.progress.sent.is_none_or(|sent| sent < wanted.generation) {
                view.progress.sent = Some(wanted.generation);
                view.progress.refusal = None;
                view.unsent = wire::view_chunks(wanted).into();
            }
            while let Some(chunk) = view.unsent.front() {
                let draft = batch.draft(Lane::Bulk, chunk.encoded_len())?;
                let resource = view.unsent.pop_front().map(pb::upsert::Resource::View);
                draft.upserts.push(pb::Upsert { resource });
                draft.in_flight.tenants.push(tenant.clone());
                view.unacknowledged.insert(draft.nonce);
            }
        }
        Some(())
    }

    fn note_freshness(&mut self, desired: &Desired) {
        self.freshness.retain(|key, _| desired.freshness.contains_key(key));
        self.fresher.clear();
        for (key, freshness) in &desired.freshness {
            let same = |sent: &Arc<Freshness>| Arc::ptr_eq(sent, freshness) || sent == freshness;
            if !self.freshness.get(key).is_some_and(same) {
                self.fresher.insert(key.clone(), (desired.revision, freshness.clone()));
            }
        }
    }

    fn fill_freshness(&mut self, batch: &mut Batch, now: Timestamp) -> Option<()> {
        while let Some(entry) = self.fresher.first_entry() {
            let (revision, freshness) = entry.get();
            if self.secrets.whole_at(*revision).is_none_or(|whole| whole < *revision) {
                // All were read at the same revision.
                return Some(());
            }
            let pushed = wire::freshness_to_wire(&entry.key().tenant, freshness, now);
            batch.upsert(Lane::Bulk, pb::upsert::Resource::Freshness(pushed))?;
            let (key, (_, freshness)) = entry.remove_entry();
            self.freshness.insert(key, freshness);
        }
        Some(())
    }

    fn fill_leases(&mut self, desired: &Desired, batch: &mut Batch) -> Option<()> {
        for (key, lease) in &desired.leases {
            let LeaseState::Held(push) = lease else { continue };
            if !self.demands.leases.contains(key) || self.refused_leases.get(key) == Some(&push.id) {
                continue;
            }
            let news = match self.leases.get(key) {
                // Which slice goes with it was not resumed.
                Some(SentLease::Resumed { id }) => *id != push.id || push.slice.is_some(),
                Some(SentLease::Held { id, remaining, slice }) => {
                    *id != push.id || *slice != push.slice || renewed(*remaining, push.remaining)
                }
                Some(SentLease::Refused { .. }) | None => true,
            };
            if news {
                let draft =
                    batch.upsert(Lane::Bulk, pb::upsert::Resource::Lease(wire::lease_to_wire(push)))?;
                draft.in_flight.leases.push((key.clone(), push.id.clone()));
                self.refused_leases.remove(key);
            }
            let LeasePush { id, remaining, slice, .. } = push;
            let (id, remaining, slice) = (id.clone(), *remaining, slice.clone());
            self.leases.insert(key.clone(), SentLease::Held { id, remaining, slice });
        }
        Some(())
    }
}

/// Whether a lease lasts longer than what was left of it at the last diff.
fn renewed(before: Option<Duration>, now: Option<Duration>) -> bool {
    const ROUNDING: Duration = Duration::from_secs(1);
    match (before, now) {
        (Some(before), Some(now)) => now > before + ROUNDING,
        (before, now) => before.is_some() != now.is_some(),
    }
}

fn shortened(message: &str) -> String {
    message.chars().filter(|c| !c.is_control()).take(512).collect()
}
