//! A store of secrets with a feed, as the control plane offers it to publishers.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use scaivault_discovery::{Found, Publisher, SecretChange, SecretChanges, Surveyed};
use scaivault_domain::backend::BackendId;
use scaivault_domain::lease::LeaseKey;
use scaivault_domain::path::SecretPath;
use scaivault_domain::replica::{Absence, Replica, SecretKey, Stamp};
use scaivault_domain::secret::{Kind, Metadata, SecretValue, State};
use scaivault_domain::tenant::TenantId;

use crate::fixtures::{NOW, backend, tenant};

/// The secret `external/a/{number}`, which the first backend of the fixtures' views owns.
pub(crate) fn secret(owner: u8, number: u8) -> SecretKey {
    SecretKey { tenant: tenant(owner), path: SecretPath::check(&format!("external/a/s{number}")).unwrap() }
}

/// That backend.
pub(crate) fn owning(owner: u8) -> LeaseKey {
    LeaseKey { tenant: tenant(owner), backend: backend(1, "a", 0).id }
}

pub(crate) fn replica(text: &[u8], state: State) -> Arc<Replica> {
    Arc::new(Replica {
        version: 1,
        kind: Kind::Binary,
        content_type: "text/plain".into(),
        metadata: Metadata::from([("owner".into(), "team-a".into())]),
        state,
        value: (state == State::Active).then(|| SecretValue::new(text.to_vec())),
        backend: Some(owning(1).backend),
        remote_version: "7".into(),
        created: Some(NOW),
        verified: NOW,
    })
}

#[derive(Debug, Default)]
pub(crate) struct Shelf {
    pub(crate) revision: u64,
    pub(crate) secrets: BTreeMap<SecretKey, (Stamp, Arc<Replica>)>,
    /// Every change of the epoch, with what the secret was then.
    pub(crate) history: Vec<(u64, SecretKey, Option<Stamp>)>,
    feed: Vec<(u64, Option<Arc<SecretChange>>)>,
    /// The feed tells of what came after.
    expired: u64,
    pub(crate) prefetched: BTreeSet<TenantId>,
    /// Whose paths are absent because they are not copied yet.
    pub(crate) cycling: BTreeSet<TenantId>,
}

impl Shelf {
    pub(crate) fn new() -> Self {
        Shelf { revision: 1, ..Shelf::default() }
    }

    fn prefetch(&self, tenant: &TenantId) -> Option<BackendId> {
        self.prefetched.contains(tenant).then(|| owning(1).backend)
    }

    pub(crate) fn commit(&mut self) -> u64 {
        self.revision += 1;
        self.revision
    }

    pub(crate) fn put(&mut self, key: &SecretKey, text: &[u8]) {
        self.put_state(key, text, State::Active);
    }

    pub(crate) fn put_state(&mut self, key: &SecretKey, text: &[u8], state: State) {
        self.put_in_silence(key, text, state);
        self.tell(key);
    }

    /// As if the feed had lost a line.
    pub(crate) fn put_in_silence(&mut self, key: &SecretKey, text: &[u8], state: State) {
        let revision = self.commit();
        let tag = text.iter().fold(state as u64, |tag, byte| tag.wrapping_mul(31) + u64::from(*byte));
        let stamp = Stamp { revision, tag };
        self.secrets.insert(key.clone(), (stamp, replica(text, state)));
        self.history.push((revision, key.clone(), Some(stamp)));
    }

    pub(crate) fn delete(&mut self, key: &SecretKey) {
        if self.secrets.remove(key).is_some() {
            let revision = self.commit();
            self.history.push((revision, key.clone(), None));
            self.tell(key);
        }
    }

    fn tell(&mut self, key: &SecretKey) {
        let change = SecretChange::new(key.clone(), self.prefetch(&key.tenant));
        self.feed.push((self.revision, Some(Arc::new(change))));
    }

    /// A first cycle begins or ends.
    pub(crate) fn cycle(&mut self, tenant: &TenantId) {
        if !self.cycling.remove(tenant) {
            self.cycling.insert(tenant.clone());
        }
        let revision = self.commit();
        self.feed.push((revision, None));
    }

    pub(crate) fn expire_feed(&mut self) {
        self.expired = self.revision;
        self.feed.clear();
    }

    /// As after a restore: everything is there, with revisions that start over.
    pub(crate) fn start_over(&mut self) {
        self.feed.clear();
        self.history.clear();
        (self.revision, self.expired) = (1, 0);
        for (key, (stamp, _)) in &mut self.secrets {
            self.revision += 1;
            stamp.revision = self.revision;
            self.history.push((self.revision, key.clone(), Some(*stamp)));
        }
    }

    pub(crate) fn changed(&self, cursor: u64, max: usize) -> Option<SecretChanges> {
        if cursor < self.expired {
            return None;
        }
        let page: Vec<_> = self.feed.iter().filter(|(revision, _)| *revision > cursor).take(max).collect();
        let next =
            if page.len() < max { self.revision } else { page.last().map_or(self.revision, |(at, _)| *at) };
        Some(SecretChanges {
            changes: page.iter().filter_map(|(_, change)| change.clone()).collect(),
            // Which tenant's is not kept: asking too many again does no harm.
            absent_again: match page.iter().any(|(_, change)| change.is_none()) {
                true => (1..4).map(owning).collect(),
                false => Vec::new(),
            },
            next,
        })
    }

    pub(crate) fn find(&self, key: &SecretKey) -> Found {
        self.secrets.get(key).cloned().ok_or(match self.cycling.contains(&key.tenant) {
            true => Absence::Proxy,
            false => Absence::NotFound,
        })
    }

    pub(crate) fn look(&self, keys: &[SecretKey], enough: usize) -> Vec<Found> {
        let mut read = 0;
        let found = keys.iter().map(|key| self.find(key));
        found
            .take_while(|found| {
                let more = read < enough;
                read += found
                    .as_ref()
                    .map_or(0, |(_, replica)| replica.value.as_ref().map_or(0, SecretValue::len));
                more
            })
            .collect()
    }

    pub(crate) fn survey(&self, tenant: &TenantId, after: Option<&SecretPath>, max: usize) -> Vec<Surveyed> {
        let secrets = self.secrets.iter().filter(|(key, _)| key.tenant == *tenant);
        let after = secrets.filter(|(key, _)| after.is_none_or(|after| key.path > *after));
        let prefetch = self.prefetch(tenant);
        after
            .take(max)
            .map(|(key, (stamp, _))| Surveyed {
                path: key.path.clone(),
                stamp: *stamp,
                prefetch: prefetch.clone(),
            })
            .collect()
    }

    /// Has a publisher take one page of the feed and one of the survey, and look at secrets once.
    pub(crate) fn feed_publisher(&self, publisher: &mut Publisher) {
        self.follow(publisher);
        self.page(publisher);
        self.answer(publisher);
    }

    pub(crate) fn follow(&self, publisher: &mut Publisher) {
        if let Some(cursor) = publisher.cursor() {
            match self.changed(cursor, 3) {
                Some(page) => publisher.changed(&page),
                None => publisher.feed_lost(),
            }
        }
    }

    pub(crate) fn page(&self, publisher: &mut Publisher) {
        if let Some((tenant, after)) = publisher.page() {
            publisher.surveyed(self.survey(&tenant, after.as_ref(), 2), 2);
        }
    }

    pub(crate) fn answer(&self, publisher: &mut Publisher) {
        let keys = publisher.reads();
        let found = self.look(&keys, 150 * 1024);
        publisher.found(keys.into_iter().zip(found));
    }
}
