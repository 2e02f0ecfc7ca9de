//! The node's half: what it holds, what it demands, and what a response changes.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use prost::Message as _;
use scaivault_domain::access::Caller;
use scaivault_domain::lease::LeaseKey;
use scaivault_domain::replica::{Absence, Freshness, KeyHash, Replica, SecretKey, Stamp};
use scaivault_domain::tenant::TenantId;
use scaivault_domain::time::Timestamp;
use scaivault_domain::token::TokenHash;
use scaivault_domain::view::{Generation, TenantView};
use scaivault_proto::discovery::v1 as pb;
use scaivault_proto::discovery::v1::delta_request::Message;

use crate::wire::{self, LeasePush, LeaseRefusal, MAX_CHUNKS, Refused, SecretCopy};
use crate::{MAX_GRANTS, MAX_LEASES, MAX_MESSAGE_BYTES, MAX_SECRETS};

/// Longest name of an epoch.
const MAX_EPOCH_BYTES: usize = 128;

/// What a response changes on the node, in the order to apply it.
#[derive(Clone, Debug)]
pub enum Change {
    /// A tenant's view is replaced.
    View(Arc<TenantView>),
    /// The tenant is served here no longer.
    ViewGone(TenantId),
    /// A token may do this, as of this version.
    Grant(TokenHash, u64, Arc<Caller>),
    /// The token is unknown, expired or revoked.
    GrantGone(TokenHash),
    /// A credential, new or renewed.
    Lease(LeasePush),
    /// There is no credential, or no longer.
    LeaseGone(LeaseKey, LeaseRefusal),
    /// The current version of a secret. It is followed from now on.
    Secret(SecretKey, Stamp, Arc<Replica>),
    /// The node cannot have a copy of this secret now. It is followed: a later change comes by itself.
    SecretAbsent(SecretKey, Absence),
    /// The copy is not to be used any more, and what there is instead is not known. It is followed no longer: whoever
    /// wants it demands it, also who did so already.
    SecretGone(KeyHash),
    /// When the copies of a backend were last compared with it.
    Freshness(TenantId, Freshness),
    /// Every copy of this backend has come.
    PrefetchComplete(LeaseKey),
}

/// What a node still holds when it starts, from its own disk.
#[derive(Clone, Debug, Default)]
pub struct Restored {
    /// The epoch that it followed last.
    pub epoch: String,
    /// The generations of its views.
    pub views: Vec<(TenantId, Generation)>,
    /// Its grants, each with its version.
    pub grants: Vec<(TokenHash, u64)>,
    /// Its copies. A copy that was put in another epoch than `epoch` has revision 0: only its tag means something.
    pub secrets: Vec<(KeyHash, Stamp)>,
}

/// What the node wants, or no longer. A demand made again is answered again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Demand {
    /// What the token of this hash may do, now and whenever it changes.
    Grant(TokenHash),
    /// Not wanted any more.
    DropGrant(TokenHash),
    /// A credential for this backend.
    Lease {
        /// For which.
        key: LeaseKey,
        /// The id of the one that the backend refused: another is wanted.
        refused_id: Option<String>,
    },
    /// Not wanted any more.
    DropLease(LeaseKey),
    /// A copy of this secret, now and whenever it changes.
    Secret(SecretKey),
    /// Not wanted any more; a copy that was held is dropped with it.
    DropSecret(KeyHash),
}

/// What came of a response.
#[derive(Debug)]
pub struct Applied {
    /// To be applied, in order, before `reply` is sent.
    pub changes: Vec<Change>,
    /// The acknowledgement, whole or with refusals.
    pub reply: pb::DeltaRequest,
    /// Everything up to this revision of the epoch is known here once the changes are applied.
    pub revision: u64,
    /// The store started a new epoch: revisions and generations start over.
    pub epoch_changed: bool,
}

/// The number of the `Subscribe` that asked, if there was no demand before it. What was sent before that was heard is the
/// end of an earlier demand that was given up: nobody followed it since, so it may be older than the revision that is
/// known here. 0: the demand was never given up.
type Since = u64;

/// Versions, generations and ids that are held from another epoch are kept as 0 or empty: any other one replaces them.
#[derive(Debug)]
enum Grant {
    Asked(Since),
    Held(u64),
    Unknown,
}

#[derive(Debug)]
enum Lease {
    Asked { refused_id: Option<String> },
    Held { id: String },
    Denied,
}

/// Keys are kept where they are needed to ask again: of a hundred thousand copies the hashes are enough.
#[derive(Debug)]
enum Secret {
    Asked(Box<SecretKey>, Since),
    Held(Stamp),
    Absent(Box<SecretKey>),
}

/// The node's half of the protocol. Lives as long as the node; [`hello`](Self::hello) starts a stream.
#[derive(Debug, Default)]
pub struct Subscriber {
    epoch: String,
    revision: u64,
    nonce: u64,
    /// How many `Subscribe` messages the stream has had.
    subscribes: u64,
    views: BTreeMap<TenantId, Generation>,
    /// The chunks so far of views that are on their way.
    partial: HashMap<TenantId, Vec<pb::TenantViewChunk>>,
    grants: HashMap<TokenHash, Grant>,
    leases: HashMap<LeaseKey, Lease>,
    secrets: HashMap<KeyHash, Secret>,
}

impl Subscriber {
    /// A node that holds nothing.
    pub fn new() -> Self {
        Subscriber::default()
    }

    /// A node that still holds something. Nothing older than that is applied.
    pub fn restore(restored: Restored) -> Self {
        let Restored { epoch, views, grants, secrets } = restored;
        Subscriber {
            epoch,
            views: views.into_iter().collect(),
            grants: grants.into_iter().map(|(hash, version)| (hash, Grant::Held(version))).collect(),
            secrets: secrets.into_iter().map(|(hash, stamp)| (hash, Secret::Held(stamp))).collect(),
            ..Subscriber::default()
        }
    }

    /// The epoch that is followed; empty before the first response.
    pub fn epoch(&self) -> &str {
        &self.epoch
    }

    /// Starts a stream: its first message.
    pub fn hello(&mut self, build: &str) -> pb::DeltaRequest {
        self.nonce = 0;
        self.partial.clear();
        // Nothing is on its way.
        self.subscribes = 0;
        for grant in self.grants.values_mut() {
            if let Grant::Asked(since) = grant {
                *since = 0;
            }
        }
        for secret in self.secrets.values_mut() {
            if let Secret::Asked(_, since) = secret {
                *since = 0;
            }
        }
        request(Message::Hello(pb::Hello { build: build.to_owned(), epoch: self.epoch.clone() }))
    }

    /// The messages after [`hello`](Self::hello): what is held, and the demands that have no answer to hold.
    pub fn resume(&mut self) -> Vec<pb::DeltaRequest> {
        let views = self.views.iter().map(|(tenant, generation)| {
            Held::View(pb::HeldView { tenant: tenant.to_string(), generation: *generation })
        });
        let grants = self.grants.iter().filter_map(|(hash, grant)| match grant {
            Grant::Held(version) => {
                Some(Held::Grant(pb::HeldGrant { token_hash: hash.as_bytes().to_vec(), version: *version }))
            }
            Grant::Asked(_) | Grant::Unknown => None,
        });
        let leases = self.leases.iter().filter_map(|(key, lease)| match lease {
            Lease::Held { id } => {
                Some(Held::Lease(pb::HeldLease { key: Some(wire::key_to_wire(key)), id: id.clone() }))
            }
            Lease::Asked { .. } | Lease::Denied => None,
        });
        let secrets = self.secrets.iter().filter_map(|(hash, secret)| match secret {
            Secret::Held(stamp) => Some(Held::Secret(*hash, *stamp)),
            Secret::Asked(..) | Secret::Absent(_) => None,
        });
        let held = views.chain(grants).chain(leases).chain(secrets);
        let mut messages: Vec<_> =
            in_messages(held, Held::size, |resume: &mut pb::Resume, held| match held {
                Held::View(view) => resume.views.push(view),
                Held::Grant(grant) => resume.grants.push(grant),
                Held::Lease(lease) => resume.leases.push(lease),
                Held::Secret(hash, stamp) => wire::held_to_wire(&mut resume.secrets, hash, stamp),
            });
        if messages.is_empty() {
            messages.push(pb::Resume::default());
        }
        messages.last_mut().expect("at least one").last = true;

        let grants = self.grants.iter().filter(|(_, grant)| !matches!(grant, Grant::Held(_)));
        let leases = self.leases.iter().filter_map(|(key, lease)| match lease {
            Lease::Asked { refused_id } => Some((key.clone(), refused_id.clone())),
            Lease::Denied => Some((key.clone(), None)),
            Lease::Held { .. } => None,
        });
        let asked = grants.map(|(hash, _)| Asked::grant(hash));
        let asked = asked.chain(leases.map(|(key, refused_id)| Asked::lease(&key, refused_id)));
        let asked = asked.chain(self.secrets.values().filter_map(|secret| match secret {
            Secret::Asked(key, _) | Secret::Absent(key) => Some(Asked::Secret(wire::name_to_wire(key))),
            Secret::Held(_) => None,
        }));
        let asked: Vec<_> = subscribe(asked).collect();
        self.subscribes = asked.len() as u64;
        messages.into_iter().map(Message::Resume).map(request).chain(asked).collect()
    }

    /// Takes demands; what is to be sent of them if a stream is open. Otherwise [`resume`](Self::resume) will say it.
    ///
    /// Beyond [`MAX_GRANTS`], [`MAX_LEASES`] and [`MAX_SECRETS`] demands are not taken: whoever waits for them waits in
    /// vain.
    pub fn demand(&mut self, demands: impl IntoIterator<Item = Demand>) -> Vec<pb::DeltaRequest> {
        let mut asked = Vec::new();
        let mut dropped = Vec::new();
        let next = self.subscribes + 1;
        for demand in demands {
            match demand {
                Demand::Grant(hash) => {
                    let known = self.grants.get(&hash);
                    if !matches!(known, Some(Grant::Asked(_)))
                        && (known.is_some() || self.grants.len() < MAX_GRANTS)
                    {
                        let since = if known.is_some() { 0 } else { next };
                        self.grants.insert(hash, Grant::Asked(since));
                        asked.push(Asked::grant(&hash));
                    }
                }
                Demand::Lease { key, refused_id } => {
                    let known = self.leases.get(&key);
                    let waiting = matches!(known, Some(Lease::Asked { refused_id: earlier })
                        if refused_id.is_none() || *earlier == refused_id);
                    if !waiting && (known.is_some() || self.leases.len() < MAX_LEASES) {
                        asked.push(Asked::lease(&key, refused_id.clone()));
                        self.leases.insert(key, Lease::Asked { refused_id });
                    }
                }
                Demand::DropGrant(hash) => {
                    if self.grants.remove(&hash).is_some() {
                        asked.retain(
                            |asked| !matches!(asked, Asked::Grant(bytes) if **bytes == *hash.as_bytes()),
                        );
                        dropped.push(Dropped::Grant(hash.as_bytes().to_vec()));
                    }
                }
                Demand::DropLease(key) => {
                    if self.leases.remove(&key).is_some() {
                        let key = wire::key_to_wire(&key);
                        asked.retain(
                            |asked| !matches!(asked, Asked::Lease(lease) if lease.key.as_ref() == Some(&key)),
                        );
                        dropped.push(Dropped::Lease(key));
                    }
                }
                Demand::Secret(key) => {
                    let hash = key.hash();
                    let known = self.secrets.get(&hash);
                    if !matches!(known, Some(Secret::Asked(..)))
                        && (known.is_some() || self.secrets.len() < MAX_SECRETS)
                    {
                        asked.push(Asked::Secret(wire::name_to_wire(&key)));
                        let since = if known.is_some() { 0 } else { next };
                        self.secrets.insert(hash, Secret::Asked(Box::new(key), since));
                    }
                }
                Demand::DropSecret(hash) => {
                    if let Some(secret) = self.secrets.remove(&hash) {
                        if let Secret::Asked(key, _) = secret {
                            let name = wire::name_to_wire(&key);
                            asked.retain(|asked| !matches!(asked, Asked::Secret(asked) if *asked == name));
                        }
                        dropped.push(Dropped::Secret(hash));
                    }
                }
            }
        }
        // What is asked again after it was dropped comes behind the drop.
        let dropped =
            in_messages(dropped, Dropped::size, |message: &mut pb::Unsubscribe, dropped| match dropped {
                Dropped::Grant(hash) => message.token_hashes.push(hash),
                Dropped::Lease(key) => message.leases.push(key),
                Dropped::Secret(hash) => message.secret_hashes.extend_from_slice(&hash.0),
            });
        let asked: Vec<_> = subscribe(asked).collect();
        self.subscribes += asked.len() as u64;
        dropped.into_iter().map(Message::Unsubscribe).map(request).chain(asked).collect()
    }

    /// Takes a response that came at `now`. The changes are to be applied before the reply is sent.
    pub fn handle(&mut self, response: pb::DeltaResponse, now: Timestamp) -> Applied {
        if let Err(fault) = self.check_order(&response) {
            return self.refuse_whole(&response, &fault);
        }
        self.nonce = response.nonce;
        let epoch_changed = self.epoch != response.epoch;
        if epoch_changed {
            self.enter_epoch(response.epoch);
        }
        let mut changes = Vec::new();
        let mut refusals = Vec::new();
        let heard = response.subscribes;
        for removal in response.removals {
            let name = match &removal.resource {
                Some(pb::removal::Resource::Secret(absence)) => absence.name.clone(),
                _ => None,
            };
            match self.remove(removal, heard) {
                Ok(change) => changes.extend(change),
                Err(fault) => {
                    changes.extend(self.distrust_secret(name.as_ref()));
                    refusals.push(refusal("", 0, &fault));
                }
            }
        }
        for upsert in response.upserts {
            match upsert.resource {
                Some(pb::upsert::Resource::View(chunk)) => {
                    let (tenant, generation) = (chunk.tenant.clone(), chunk.generation);
                    match self.take_chunk(chunk) {
                        Ok(view) => changes.extend(view.map(Change::View)),
                        Err(fault) => refusals.push(refusal(&tenant, generation, &fault)),
                    }
                }
                Some(pb::upsert::Resource::Grant(grant)) => {
                    let (tenant, hash) = (grant.tenant.clone(), wire::hash_from_wire(&grant.token_hash));
                    match wire::grant_from_wire(grant) {
                        Ok((hash, version, caller)) => {
                            changes.extend(self.take_grant(hash, version, caller, heard))
                        }
                        Err(fault) => {
                            changes.extend(hash.ok().and_then(|hash| self.forget_grant(hash)));
                            refusals.push(refusal(&tenant, 0, &fault));
                        }
                    }
                }
                Some(pb::upsert::Resource::Lease(lease)) => match wire::lease_from_wire(lease) {
                    Ok(lease) => changes.extend(self.take_lease(lease)),
                    Err(fault) => refusals.push(refusal("", 0, &fault)),
                },
                Some(pb::upsert::Resource::Secret(copy)) => {
                    let name = copy.name.clone();
                    match wire::copy_from_wire(copy, now) {
                        Ok(copy) => match self.take_secret(copy, heard) {
                            Ok(change) => changes.extend(change),
                            Err(fault) => refusals.push(refusal("", 0, &fault)),
                        },
                        Err(fault) => {
                            changes.extend(self.distrust_secret(name.as_ref()));
                            refusals.push(refusal("", 0, &fault));
                        }
                    }
                }
                Some(pb::upsert::Resource::Freshness(freshness)) => {
                    match wire::freshness_from_wire(freshness, now) {
                        Ok((tenant, freshness)) => changes.push(Change::Freshness(tenant, freshness)),
                        Err(fault) => refusals.push(refusal("", 0, &fault)),
                    }
                }
                Some(pb::upsert::Resource::PrefetchComplete(key)) => match wire::key_from_wire(Some(&key)) {
                    Ok(key) => changes.push(Change::PrefetchComplete(key)),
                    Err(fault) => refusals.push(refusal("", 0, &fault)),
                },
                None => refusals.push(refusal(
                    "",
                    0,
                    &Refused::new("a resource of a kind that is not known here"),
                )),
            }
        }
        self.revision = self.revision.max(response.revision);
        let reply = match refusals.is_empty() {
            true => Message::Ack(pb::Ack { nonce: response.nonce }),
            false => Message::Nack(pb::Nack { nonce: response.nonce, refusals }),
        };
        Applied { changes, reply: request(reply), revision: self.revision, epoch_changed }
    }

    fn check_order(&self, response: &pb::DeltaResponse) -> Result<(), Refused> {
        if response.nonce <= self.nonce {
            let last = self.nonce;
            return Err(Refused::new(format!("response {} does not come after {last}", response.nonce)));
        }
        if response.epoch.is_empty() || response.epoch.len() > MAX_EPOCH_BYTES {
            return Err(Refused::new("the response has no epoch"));
        }
        // 0 says nothing: more of the same revision is to come.
        if response.epoch == self.epoch && response.revision != 0 && response.revision < self.revision {
            let (old, held) = (response.revision, self.revision);
            return Err(Refused::new(format!("revision {old} is older than {held}, which is known here")));
        }
        Ok(())
    }

    /// Refuses every view of the response by name, so that none of them counts as being in force.
    fn refuse_whole(&self, response: &pb::DeltaResponse, fault: &Refused) -> Applied {
        let mut refusals: Vec<_> = response
            .upserts
            .iter()
            .filter_map(|upsert| match &upsert.resource {
                Some(pb::upsert::Resource::View(chunk)) => {
                    Some(refusal(&chunk.tenant, chunk.generation, fault))
                }
                _ => None,
            })
            .collect();
        if refusals.is_empty() {
            refusals.push(refusal("", 0, fault));
        }
        let reply = request(Message::Nack(pb::Nack { nonce: response.nonce, refusals }));
        Applied { changes: Vec::new(), reply, revision: self.revision, epoch_changed: false }
    }

    fn enter_epoch(&mut self, epoch: String) {
        self.epoch = epoch;
        self.revision = 0;
        self.partial.clear();
        self.views.values_mut().for_each(|generation| *generation = 0);
        for grant in self.grants.values_mut() {
            if let Grant::Held(version) = grant {
                *version = 0;
            }
        }
        for lease in self.leases.values_mut() {
            if let Lease::Held { id } = lease {
                id.clear();
            }
        }
        for secret in self.secrets.values_mut() {
            if let Secret::Held(stamp) = secret {
                stamp.revision = 0;
            }
        }
    }

    /// `heard`: how many `Subscribe` messages had been heard when this was sent.
    fn remove(&mut self, removal: pb::Removal, heard: u64) -> Result<Option<Change>, Refused> {
        match removal.resource {
            Some(pb::removal::Resource::Tenant(tenant)) => {
                let tenant = TenantId::parse(&tenant)?;
                self.partial.remove(&tenant);
                Ok(self.views.remove(&tenant).map(|_| Change::ViewGone(tenant)))
            }
            Some(pb::removal::Resource::TokenHash(hash)) => {
                let hash = wire::hash_from_wire(&hash)?;
                let grant = self.grants.get_mut(&hash);
                let grant = grant.filter(|grant| !matches!(grant, Grant::Asked(since) if *since > heard));
                Ok(grant.map(|grant| {
                    *grant = Grant::Unknown;
                    Change::GrantGone(hash)
                }))
            }
            Some(pb::removal::Resource::Lease(removal)) => {
                let (key, refusal) = wire::refusal_from_wire(removal)?;
                Ok(self.leases.get_mut(&key).map(|lease| {
                    *lease = Lease::Denied;
                    Change::LeaseGone(key, refusal)
                }))
            }
            Some(pb::removal::Resource::SecretHash(hash)) => {
                let hash = hash.try_into().map_err(|_| Refused::new("the hash of a key has 16 bytes"))?;
                let hash = KeyHash(hash);
                let asked =
                    matches!(self.secrets.get(&hash), Some(Secret::Asked(_, since)) if *since > heard);
                Ok((!asked && self.secrets.remove(&hash).is_some()).then_some(Change::SecretGone(hash)))
            }
            Some(pb::removal::Resource::Secret(absence)) => {
                let (key, absence) = wire::absence_from_wire(&absence)?;
                let secret = self.secrets.get_mut(&key.hash());
                let secret =
                    secret.filter(|secret| !matches!(secret, Secret::Asked(_, since) if *since > heard));
                Ok(secret.map(|secret| {
                    *secret = Secret::Absent(Box::new(key.clone()));
                    Change::SecretAbsent(key, absence)
                }))
            }
            None => Err(Refused::new("a removal of a kind that is not known here")),
        }
    }

    fn take_chunk(&mut self, chunk: pb::TenantViewChunk) -> Result<Option<Arc<TenantView>>, Refused> {
        let tenant = TenantId::parse(&chunk.tenant)?;
        let begun = self.partial.get(&tenant).map_or(0, |begun| begun[0].generation);
        let known = self.views.get(&tenant).copied().unwrap_or(0).max(begun);
        if chunk.generation < known {
            let old = chunk.generation;
            return Err(Refused::new(format!("generation {old} is older than {known}, which is known here")));
        }
        let begun = self.partial.remove(&tenant);
        if chunk.chunks > MAX_CHUNKS || chunk.chunk >= chunk.chunks {
            return Err(Refused::new(format!("chunk {} of {} cannot be", chunk.chunk, chunk.chunks)));
        }
        let mut chunks = match begun {
            _ if chunk.chunk == 0 => Vec::new(),
            Some(begun)
                if begun.len() == chunk.chunk as usize
                    && begun[0].generation == chunk.generation
                    && begun[0].chunks == chunk.chunks =>
            {
                begun
            }
            _ => return Err(Refused::new(format!("chunk {} came without those before it", chunk.chunk))),
        };
        let last = chunk.chunk + 1 == chunk.chunks;
        chunks.push(chunk);
        if !last {
            self.partial.insert(tenant, chunks);
            return Ok(None);
        }
        let view = wire::view_from_chunks(chunks)?;
        self.views.insert(tenant, view.generation);
        Ok(Some(Arc::new(view)))
    }

    fn take_grant(
        &mut self,
        hash: TokenHash,
        version: u64,
        caller: Arc<Caller>,
        heard: u64,
    ) -> Option<Change> {
        let grant = self.grants.get_mut(&hash)?;
        if matches!(grant, Grant::Asked(since) if *since > heard) {
            return None;
        }
        *grant = Grant::Held(version);
        Some(Change::Grant(hash, version, caller))
    }

    fn forget_grant(&mut self, hash: TokenHash) -> Option<Change> {
        let grant = self.grants.get_mut(&hash)?;
        matches!(grant, Grant::Held(_)).then(|| {
            *grant = Grant::Unknown;
            Change::GrantGone(hash)
        })
    }

    fn take_lease(&mut self, push: LeasePush) -> Option<Change> {
        let lease = self.leases.get_mut(&push.key)?;
        // Sent before the publisher heard that the backend refuses it.
        if matches!(lease, Lease::Asked { refused_id: Some(refused) } if *refused == push.id) {
            return None;
        }
        *lease = Lease::Held { id: push.id.clone() };
        Some(Change::Lease(push))
    }

    /// A prefetched copy is taken unasked: the publisher follows it although nobody here subscribed to it, even if the
    /// node gave it up while it was on its way.
    fn take_secret(&mut self, copy: SecretCopy, heard: u64) -> Result<Option<Change>, Refused> {
        let SecretCopy { key, stamp, replica, prefetched } = copy;
        let hash = key.hash();
        match self.secrets.get(&hash) {
            Some(Secret::Held(held)) if stamp.revision < held.revision => {
                let (old, held, path) = (stamp.revision, held.revision, key.path);
                return Err(Refused::new(format!(
                    "revision {old} of {path} is older than {held}, which is held here"
                )));
            }
            Some(Secret::Asked(_, since)) if *since > heard => return Ok(None),
            None if !prefetched => return Ok(None),
            None if self.secrets.len() >= MAX_SECRETS => {
                return Err(Refused::new("more secrets than a node may hold"));
            }
            _ => {}
        }
        self.secrets.insert(hash, Secret::Held(stamp));
        Ok(Some(Change::Secret(key, stamp, replica)))
    }

    /// What came instead of a held copy cannot be read: the copy is known to be out of date.
    fn distrust_secret(&mut self, name: Option<&pb::SecretName>) -> Option<Change> {
        let key = wire::name_from_wire(name).ok()?;
        let hash = key.hash();
        let secret = self.secrets.get_mut(&hash)?;
        matches!(secret, Secret::Held(_)).then(|| {
            // Still asked for: the next state of it may be one that can be read.
            *secret = Secret::Asked(Box::new(key), 0);
            Change::SecretGone(hash)
        })
    }
}

enum Held {
    View(pb::HeldView),
    Grant(pb::HeldGrant),
    Lease(pb::HeldLease),
    Secret(KeyHash, Stamp),
}

impl Held {
    fn size(&self) -> usize {
        match self {
            Held::View(view) => view.encoded_len(),
            Held::Grant(grant) => grant.encoded_len(),
            Held::Lease(lease) => lease.encoded_len(),
            Held::Secret(..) => 32,
        }
    }
}

enum Asked {
    Grant(Vec<u8>),
    Lease(pb::LeaseDemand),
    Secret(pb::SecretName),
}

impl Asked {
    fn grant(hash: &TokenHash) -> Self {
        Asked::Grant(hash.as_bytes().to_vec())
    }

    fn lease(key: &LeaseKey, refused_id: Option<String>) -> Self {
        let refused_id = refused_id.unwrap_or_default();
        Asked::Lease(pb::LeaseDemand { key: Some(wire::key_to_wire(key)), refused_id })
    }

    fn size(&self) -> usize {
        match self {
            Asked::Grant(hash) => hash.len(),
            Asked::Lease(lease) => lease.encoded_len(),
            Asked::Secret(name) => name.encoded_len(),
        }
    }
}

enum Dropped {
    Grant(Vec<u8>),
    Lease(pb::LeaseKey),
    Secret(KeyHash),
}

impl Dropped {
    fn size(&self) -> usize {
        match self {
            Dropped::Grant(hash) => hash.len(),
            Dropped::Lease(key) => key.encoded_len(),
            Dropped::Secret(hash) => hash.0.len(),
        }
    }
}

fn request(message: Message) -> pb::DeltaRequest {
    pb::DeltaRequest { message: Some(message) }
}

fn subscribe(asked: impl IntoIterator<Item = Asked>) -> impl Iterator<Item = pb::DeltaRequest> {
    let messages = in_messages(asked, Asked::size, |message: &mut pb::Subscribe, asked| match asked {
        Asked::Grant(hash) => message.token_hashes.push(hash),
        Asked::Lease(lease) => message.leases.push(lease),
        Asked::Secret(name) => message.secrets.push(name),
    });
    messages.into_iter().map(Message::Subscribe).map(request)
}

/// Packs items into as few messages as the limit allows; none if there are none.
fn in_messages<T, M: Default>(
    items: impl IntoIterator<Item = T>,
    size: impl Fn(&T) -> usize,
    mut push: impl FnMut(&mut M, T),
) -> Vec<M> {
    const AROUND_AN_ITEM: usize = 8;
    let mut messages = Vec::new();
    let mut filled = usize::MAX;
    for item in items {
        let cost = size(&item) + AROUND_AN_ITEM;
        if filled.saturating_add(cost) > MAX_MESSAGE_BYTES - 2 * AROUND_AN_ITEM {
            messages.push(M::default());
            filled = 0;
        }
        filled += cost;
        push(messages.last_mut().expect("pushed for the first item"), item);
    }
    messages
}

fn refusal(tenant: &str, generation: Generation, fault: &Refused) -> pb::Refusal {
    pb::Refusal { tenant: tenant.chars().take(64).collect(), generation, message: fault.to_string() }
}
