use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use prost::Message as _;
use scaivault_discovery::wire::copy_to_wire;
use scaivault_discovery::{
    Change, Demand, Desired, MAX_MESSAGE_BYTES, MAX_SECRETS, MAX_UNACKNOWLEDGED, Mark, NextStep,
    PrefetchProgress, Publisher, Restored, SecretCopy, Subscriber, Violation,
};
use scaivault_domain::path::SecretPath;
use scaivault_domain::replica::{Absence, Freshness, KeyHash, SecretKey, Stamp};
use scaivault_domain::secret::State;
use scaivault_domain::time::Timestamp;
use scaivault_domain::view::TenantView;
use scaivault_proto::discovery::v1::delta_request::Message;
use scaivault_proto::discovery::v1::{DeltaRequest, DeltaResponse, SecretName, Subscribe, removal, upsert};

use crate::fixtures::{Held, NOW, caller, hash, prefetched_view, tenant, view};
use crate::shelf::{Shelf, owning, replica, secret};

/// Both halves with nothing between them, and the store behind.
struct Pair {
    shelf: Shelf,
    desired: Desired,
    concerned: u64,
    publisher: Publisher,
    subscriber: Subscriber,
    held: Held,
}

impl Pair {
    fn new() -> Self {
        Pair::with(Shelf::new(), view(1, 1))
    }

    /// Whose first tenant is prefetched, with this many secrets.
    fn prefetched(count: u8, bytes: usize) -> Self {
        let mut shelf = Shelf::new();
        shelf.prefetched.insert(tenant(1));
        (0..count).for_each(|number| shelf.put(&secret(1, number), &vec![number; bytes]));
        Pair::with(shelf, prefetched_view(1, 1))
    }

    fn with(shelf: Shelf, view: Arc<TenantView>) -> Self {
        let mut pair = Pair {
            desired: Desired { epoch: "e1".into(), revision: shelf.revision, ..Desired::default() },
            concerned: shelf.revision,
            shelf,
            publisher: Publisher::new(),
            subscriber: Subscriber::new(),
            held: Held::default(),
        };
        pair.desired.views.insert(tenant(1), view);
        pair.connect();
        pair
    }

    fn connect(&mut self) {
        self.publisher = Publisher::new();
        for request in [self.subscriber.hello("0.1.0")].into_iter().chain(self.subscriber.resume()) {
            self.publisher.on_request(request).unwrap();
        }
    }

    fn demand(&mut self, demands: impl IntoIterator<Item = Demand>) {
        for request in self.subscriber.demand(demands) {
            self.publisher.on_request(request).unwrap();
        }
    }

    fn diff(&mut self) -> Vec<DeltaResponse> {
        self.desired.revision = self.shelf.revision;
        self.concerned = self.shelf.revision;
        self.publisher.plan(Some(&self.desired), NOW)
    }

    /// What the loop does when the feed has moved.
    fn follow(&mut self) -> Vec<DeltaResponse> {
        self.publisher.mark(Mark { revision: self.shelf.revision, concerned: self.concerned });
        self.shelf.feed_publisher(&mut self.publisher);
        self.publisher.plan(None, NOW)
    }

    fn deliver(&mut self, responses: Vec<DeltaResponse>) {
        for response in responses {
            let applied = self.subscriber.handle(response, NOW);
            self.held.apply(applied.changes, applied.revision);
            self.publisher.on_request(applied.reply).unwrap();
        }
    }

    /// Until nothing is left to say; what was said.
    fn settle(&mut self) -> Vec<DeltaResponse> {
        let mut all = Vec::new();
        let mut responses = if self.publisher.adrift() { self.diff() } else { Vec::new() };
        loop {
            responses.extend(self.follow());
            if responses.is_empty() && !self.publisher.busy() && self.publisher.cursor().is_none() {
                return all;
            }
            all.extend(responses.iter().cloned());
            self.deliver(std::mem::take(&mut responses));
        }
    }

    fn text(&self, key: &SecretKey) -> Option<Vec<u8>> {
        let (_, replica) = self.held.secrets.get(key)?.as_ref().ok()?;
        replica.value.as_ref().map(|value| value.expose().to_vec())
    }
}

fn copies(responses: &[DeltaResponse]) -> Vec<&str> {
    let upserts = responses.iter().flat_map(|response| &response.upserts);
    upserts
        .filter_map(|upsert| match upsert.resource.as_ref().unwrap() {
            upsert::Resource::Secret(copy) => Some(copy.name.as_ref().unwrap().path.as_str()),
            _ => None,
        })
        .collect()
}

fn copy(key: &SecretKey, revision: u64, prefetched: bool) -> upsert::Resource {
    let stamp = Stamp { revision, tag: revision };
    let replica = replica(b"v", State::Active);
    upsert::Resource::Secret(copy_to_wire(&SecretCopy { key: key.clone(), stamp, replica, prefetched }, NOW))
}

fn response(nonce: u64, epoch: &str, resource: upsert::Resource) -> DeltaResponse {
    let upserts = vec![scaivault_proto::discovery::v1::Upsert { resource: Some(resource) }];
    DeltaResponse { nonce, epoch: epoch.into(), upserts, subscribes: 9, ..DeltaResponse::default() }
}

#[test]
fn a_demanded_secret_comes_and_then_changes_by_itself() {
    let mut pair = Pair::new();
    let key = secret(1, 1);
    pair.settle();
    pair.demand([Demand::Secret(key.clone())]);
    pair.settle();
    assert!(matches!(pair.held.secrets[&key], Err(Absence::NotFound)));
    pair.shelf.put(&key, b"one");
    pair.settle();
    assert_eq!(pair.text(&key).unwrap(), b"one");
    pair.shelf.put(&key, b"two");
    pair.settle();
    assert_eq!(pair.text(&key).unwrap(), b"two");
    pair.shelf.delete(&key);
    pair.settle();
    assert!(matches!(pair.held.secrets[&key], Err(Absence::NotFound)));
    pair.demand([Demand::DropSecret(key.hash())]);
    pair.shelf.put(&key, b"three");
    assert!(copies(&pair.settle()).is_empty());
}

#[test]
fn a_demand_for_a_secret_costs_no_diff() {
    let mut pair = Pair::new();
    pair.settle();
    let request = pair.subscriber.demand([Demand::Secret(secret(1, 1))]).remove(0);
    assert_eq!(pair.publisher.on_request(request).unwrap().next, NextStep::Continue);
}

#[test]
fn changes_of_one_secret_before_it_is_sent_become_one() {
    let mut pair = Pair::new();
    let key = secret(1, 1);
    pair.demand([Demand::Secret(key.clone())]);
    pair.settle();
    (0..5).for_each(|number| pair.shelf.put(&key, &[number]));
    assert_eq!(copies(&pair.settle()).len(), 1);
    assert_eq!(pair.text(&key).unwrap(), [4]);
}

#[test]
fn what_a_path_is_absent_for_is_said_again_when_a_first_cycle_ends() {
    let mut pair = Pair::new();
    pair.shelf.cycle(&tenant(1));
    pair.demand([Demand::Secret(secret(1, 1))]);
    pair.settle();
    assert!(matches!(pair.held.secrets[&secret(1, 1)], Err(Absence::Proxy)));
    pair.shelf.cycle(&tenant(1));
    pair.settle();
    assert!(matches!(pair.held.secrets[&secret(1, 1)], Err(Absence::NotFound)));
}

#[test]
fn a_new_view_has_absences_looked_at_again() {
    let mut pair = Pair::new();
    pair.demand([Demand::Secret(secret(1, 1))]);
    pair.settle();
    // Nothing of this is in the feed: the configuration alone makes it so.
    pair.shelf.cycling.insert(tenant(1));
    pair.desired.views.insert(tenant(1), view(1, 2));
    let responses = pair.diff();
    pair.deliver(responses);
    pair.settle();
    assert!(matches!(pair.held.secrets[&secret(1, 1)], Err(Absence::Proxy)));
}

#[test]
fn after_a_lost_stream_only_changed_copies_travel() {
    let mut pair = Pair::new();
    let keys: Vec<_> = (0..4).map(|number| secret(1, number)).collect();
    for key in &keys {
        pair.shelf.put(key, b"one");
        pair.demand([Demand::Secret(key.clone())]);
    }
    assert_eq!(copies(&pair.settle()).len(), 4);
    pair.shelf.put(&keys[1], b"two");
    pair.shelf.delete(&keys[2]);
    pair.connect();
    let said = pair.settle();
    assert_eq!(copies(&said), ["external/a/s1"]);
    assert_eq!(pair.text(&keys[1]).unwrap(), b"two");
    let gone = Some(removal::Resource::SecretHash(keys[2].hash().0.to_vec()));
    let removals = said.iter().flat_map(|response| &response.removals);
    assert_eq!(removals.filter(|removal| removal.resource == gone).count(), 1);
    assert!(!pair.held.secrets.contains_key(&keys[2]));
    assert_eq!(pair.held.revision, pair.shelf.revision);
}

#[test]
fn in_a_new_epoch_only_copies_with_another_tag_travel() {
    let mut pair = Pair::new();
    let keys: Vec<_> = (0..3).map(|number| secret(1, number)).collect();
    for key in &keys {
        pair.shelf.put(key, b"one");
        pair.demand([Demand::Secret(key.clone())]);
    }
    pair.settle();
    pair.desired.epoch = "e2".into();
    pair.shelf.start_over();
    pair.shelf.put(&keys[1], b"two");
    pair.connect();
    assert_eq!(copies(&pair.settle()), ["external/a/s1"]);
    // And those of both epochs are known on the stream after that.
    pair.connect();
    assert!(copies(&pair.settle()).is_empty());
    pair.shelf.put(&keys[0], b"two");
    assert_eq!(copies(&pair.settle()), ["external/a/s0"]);
}

#[test]
fn a_node_that_starts_from_its_disk_is_sent_what_differs() {
    let mut pair = Pair::new();
    pair.shelf.put(&secret(1, 1), b"one");
    pair.shelf.put(&secret(1, 2), b"one");
    let secrets = [(secret(1, 1), 2), (secret(1, 2), 1)]
        .map(|(key, revision)| (key.hash(), Stamp { revision, tag: 0 }))
        .into();
    let views = vec![(tenant(1), 1)];
    pair.subscriber =
        Subscriber::restore(Restored { epoch: "e1".into(), views, secrets, ..Restored::default() });
    pair.connect();
    let said = pair.settle();
    assert_eq!(copies(&said), ["external/a/s2"]);
    assert_eq!(said.iter().map(|response| response.upserts.len()).sum::<usize>(), 1, "the view is held");
}

#[test]
fn a_secret_that_comes_back_behind_a_survey_stays() {
    let mut pair = Pair::new();
    for key in (0..6).map(|number| secret(1, number)) {
        pair.shelf.put(&key, b"one");
        pair.demand([Demand::Secret(key)]);
    }
    pair.settle();
    pair.shelf.delete(&secret(1, 0));
    pair.connect();
    pair.diff();
    pair.shelf.page(&mut pair.publisher);
    pair.shelf.put(&secret(1, 0), b"two");
    pair.publisher.mark(Mark { revision: pair.shelf.revision, concerned: 1 });
    pair.shelf.follow(&mut pair.publisher);
    pair.shelf.answer(&mut pair.publisher);
    let said = pair.publisher.plan(None, NOW);
    pair.deliver(said);
    pair.settle();
    assert_eq!(pair.text(&secret(1, 0)).unwrap(), b"two");
}

#[test]
fn a_lost_feed_is_replaced_by_a_comparison() {
    let mut pair = Pair::new();
    pair.shelf.put(&secret(1, 1), b"one");
    pair.demand([1, 2].map(|number| Demand::Secret(secret(1, number))));
    pair.settle();
    pair.shelf.put(&secret(1, 1), b"two");
    pair.shelf.put(&secret(1, 2), b"two");
    pair.shelf.expire_feed();
    pair.settle();
    let responses = pair.diff();
    pair.deliver(responses);
    pair.settle();
    assert_eq!(pair.text(&secret(1, 1)).unwrap(), b"two");
    assert_eq!(pair.text(&secret(1, 2)).unwrap(), b"two");
}

#[test]
fn a_change_that_the_feed_did_not_tell_is_found_by_a_comparison() {
    let mut pair = Pair::new();
    pair.shelf.put(&secret(1, 1), b"one");
    pair.demand([Demand::Secret(secret(1, 1))]);
    pair.settle();
    pair.shelf.put_in_silence(&secret(1, 1), b"two", State::Active);
    pair.settle();
    assert_eq!(pair.text(&secret(1, 1)).unwrap(), b"one");
    pair.publisher.compare();
    pair.settle();
    assert_eq!(pair.text(&secret(1, 1)).unwrap(), b"two");
}

#[test]
fn a_prefetched_backend_comes_whole_and_stays_so() {
    let mut pair = Pair::prefetched(20, 10);
    pair.settle();
    assert_eq!(pair.held.secrets.len(), 20);
    assert_eq!(pair.held.complete, [owning(1)]);
    let progress = pair.publisher.progress();
    assert_eq!(
        (progress.secrets, &progress.prefetch),
        (20, &[(owning(1), PrefetchProgress::Complete)].into())
    );
    pair.shelf.put(&secret(1, 100), b"new");
    pair.shelf.delete(&secret(1, 3));
    pair.settle();
    assert_eq!(pair.text(&secret(1, 100)).unwrap(), b"new");
    assert!(matches!(pair.held.secrets[&secret(1, 3)], Err(Absence::NotFound)));
}

#[test]
fn a_backend_that_becomes_prefetched_is_sent_whole() {
    let mut pair = Pair::new();
    (0..5).for_each(|number| pair.shelf.put(&secret(1, number), b"v"));
    pair.settle();
    assert!(pair.held.secrets.is_empty());
    pair.shelf.prefetched.insert(tenant(1));
    pair.desired.views.insert(tenant(1), prefetched_view(1, 2));
    let responses = pair.diff();
    pair.deliver(responses);
    pair.settle();
    assert_eq!((pair.held.secrets.len(), pair.held.complete.len()), (5, 1));
}

#[test]
fn a_backend_is_complete_only_behind_its_last_copy() {
    let mut pair = Pair::prefetched(30, 100 * 1024);
    let said = pair.settle();
    let order: Vec<_> = said
        .iter()
        .flat_map(|response| &response.upserts)
        .map(|upsert| matches!(upsert.resource, Some(upsert::Resource::PrefetchComplete(_))))
        .collect();
    assert_eq!(order.iter().position(|complete| *complete), Some(31), "behind the view and thirty copies");
    assert_eq!(order.len(), 32);
}

#[test]
fn nothing_waits_for_a_prefetch() {
    let mut pair = Pair::prefetched(40, 200 * 1024);
    let other = secret(1, 200);
    pair.shelf.prefetched.clear();
    pair.shelf.put(&other, b"one");
    pair.shelf.prefetched.insert(tenant(1));
    pair.desired.grants.insert(hash(1), Some((1, caller(1, 1))));
    pair.demand([Demand::Grant(hash(1)), Demand::Secret(other.clone()), Demand::Secret(secret(1, 201))]);
    let mut unheard = pair.diff();
    while pair.publisher.busy() {
        unheard.extend(pair.follow());
    }
    assert_eq!(copies(&unheard)[0], "external/a/s200", "before any prefetched one");
    assert_eq!(unheard.len(), MAX_UNACKNOWLEDGED - 2);
    // A demanded secret has a place of its own.
    let large = secret(1, 39);
    pair.demand([Demand::Secret(large)]);
    let demanded = pair.follow();
    assert_eq!(copies(&demanded), ["external/a/s39"]);
    // And so has a removal, beside a change that has to wait.
    pair.shelf.put(&secret(1, 38), &[0; 200 * 1024]);
    pair.demand([Demand::Secret(secret(1, 38))]);
    pair.shelf.delete(&other);
    let urgent = pair.follow();
    assert_eq!((urgent.len(), copies(&urgent).len()), (1, 0));
    assert!(matches!(urgent[0].removals[0].resource, Some(removal::Resource::Secret(_))));
    pair.deliver(unheard);
    pair.deliver(demanded);
    pair.deliver(urgent);
    pair.settle();
    assert_eq!(pair.held.complete, [owning(1)]);
    assert!(matches!(pair.held.secrets[&other], Err(Absence::NotFound)));
}

#[test]
fn a_revocation_waits_for_no_secrets() {
    let mut pair = Pair::prefetched(40, 200 * 1024);
    pair.desired.grants.insert(hash(1), Some((1, caller(1, 1))));
    pair.demand([Demand::Grant(hash(1))]);
    pair.diff();
    pair.demand((0..40).map(|number| Demand::Secret(secret(1, number))));
    while pair.publisher.busy() {
        pair.follow();
    }
    pair.desired.grants.insert(hash(1), None);
    let urgent = pair.diff();
    assert_eq!(urgent.len(), 1);
    assert!(matches!(urgent[0].removals[0].resource, Some(removal::Resource::TokenHash(_))));
}

#[test]
fn a_value_larger_than_a_message_travels_alone() {
    let mut pair = Pair::new();
    for (number, bytes) in [(0, 10), (1, 1024 * 1024), (2, 10)] {
        pair.shelf.put(&secret(1, number), &vec![b'x'; bytes]);
        pair.demand([Demand::Secret(secret(1, number))]);
    }
    for response in pair.settle() {
        assert!(response.encoded_len() <= MAX_MESSAGE_BYTES || response.upserts.len() == 1);
    }
    assert_eq!(pair.text(&secret(1, 1)).unwrap().len(), 1024 * 1024);
}

#[test]
fn the_revision_waits_for_the_secrets_of_the_node() {
    let mut pair = Pair::new();
    let key = secret(1, 1);
    pair.shelf.put(&key, b"one");
    pair.demand([Demand::Secret(key.clone())]);
    pair.settle();
    assert_eq!(pair.held.revision, 2);
    // A commit that concerns neither views nor grants advances what is announced with the secret.
    pair.shelf.put(&key, b"two");
    pair.publisher.mark(Mark { revision: 3, concerned: pair.concerned });
    pair.shelf.follow(&mut pair.publisher);
    assert!(pair.publisher.plan(None, NOW).is_empty(), "it was not looked at yet");
    let said = pair.follow();
    assert_eq!((said.len(), said[0].revision), (1, 3));
    pair.deliver(said);
    // One that concerns them is not announced before the diff.
    pair.shelf.put(&key, b"three");
    pair.concerned = pair.shelf.revision;
    let said = pair.follow();
    assert_eq!((copies(&said).len(), said[0].revision), (1, 3));
    pair.deliver(said);
    assert_eq!(pair.diff()[0].revision, 4);
}

#[test]
fn commits_that_do_not_concern_the_node_send_nothing() {
    let mut pair = Pair::new();
    pair.demand([Demand::Secret(secret(1, 1))]);
    pair.settle();
    for number in 10..30 {
        pair.shelf.put(&secret(1, number), b"v");
        assert!(pair.follow().is_empty());
    }
    pair.settle();
    pair.shelf.put(&secret(1, 1), b"v");
    pair.settle();
    assert_eq!(pair.held.revision, pair.shelf.revision);
}

#[test]
fn a_commit_whose_secret_was_sent_before_the_feed_told_of_it_is_announced() {
    let mut pair = Pair::new();
    let key = secret(1, 1);
    pair.demand([Demand::Secret(key.clone()), Demand::Secret(secret(1, 2))]);
    pair.settle();
    pair.shelf.put(&key, b"one");
    pair.demand([Demand::Secret(key.clone())]);
    pair.shelf.answer(&mut pair.publisher);
    let said = pair.publisher.plan(None, NOW);
    assert_eq!((copies(&said).len(), said[0].revision), (1, 1));
    pair.deliver(said);
    let said = pair.settle();
    assert_eq!((said.len(), copies(&said).len(), said[0].revision), (1, 0, 2));
}

#[test]
fn an_older_copy_is_refused_by_name_and_a_new_epoch_begins_anew() {
    let key = secret(1, 1);
    let mut subscriber = Subscriber::new();
    subscriber.demand([Demand::Secret(key.clone())]);
    assert_eq!(subscriber.handle(response(1, "e1", copy(&key, 9, false)), NOW).changes.len(), 1);
    let refused = subscriber.handle(response(2, "e1", copy(&key, 8, false)), NOW);
    assert!(refused.changes.is_empty());
    let Some(Message::Nack(nack)) = refused.reply.message else { panic!("acknowledged") };
    assert!(nack.refusals[0].message.contains("external/a/s1"), "{}", nack.refusals[0].message);
    assert_eq!(subscriber.handle(response(3, "e1", copy(&key, 9, false)), NOW).changes.len(), 1);
    let applied = subscriber.handle(response(4, "e2", copy(&key, 1, false)), NOW);
    assert!(matches!(&applied.changes[..], [Change::Secret(_, stamp, _)] if stamp.revision == 1));
}

#[test]
fn a_copy_that_nobody_asked_for_is_taken_only_if_it_is_prefetched() {
    let mut subscriber = Subscriber::new();
    assert!(subscriber.handle(response(1, "e1", copy(&secret(1, 1), 1, false)), NOW).changes.is_empty());
    assert_eq!(subscriber.handle(response(2, "e1", copy(&secret(1, 2), 1, true)), NOW).changes.len(), 1);
}

#[test]
fn a_prefetched_copy_that_was_given_up_on_its_way_is_followed() {
    let mut pair = Pair::prefetched(1, 1);
    let key = secret(1, 0);
    pair.demand([Demand::Secret(key.clone())]);
    let mut on_the_way = pair.diff();
    while pair.publisher.busy() {
        on_the_way.extend(pair.follow());
    }
    pair.demand([Demand::DropSecret(key.hash())]);
    pair.deliver(on_the_way);
    assert!(pair.text(&key).is_some());
    pair.shelf.delete(&key);
    pair.settle();
    assert!(pair.text(&key).is_none());
}

#[test]
fn what_was_sent_for_an_earlier_demand_is_no_answer_to_a_later_one() {
    let mut pair = Pair::new();
    let key = secret(1, 1);
    pair.shelf.put(&key, b"one");
    pair.demand([Demand::Secret(key.clone())]);
    let mut on_the_way = pair.diff();
    on_the_way.extend(pair.follow());
    pair.demand([Demand::DropSecret(key.hash())]);
    pair.shelf.put(&key, b"two");
    on_the_way.extend(pair.diff());
    let again = pair.subscriber.demand([Demand::Secret(key.clone())]);
    pair.deliver(on_the_way);
    assert_eq!((pair.held.revision, pair.text(&key)), (3, None));
    for request in again {
        pair.publisher.on_request(request).unwrap();
    }
    pair.settle();
    assert_eq!(pair.text(&key).unwrap(), b"two");
}

#[test]
fn a_copy_that_cannot_be_read_takes_the_held_one_away() {
    let key = secret(1, 1);
    let mut subscriber = Subscriber::new();
    subscriber.demand([Demand::Secret(key.clone())]);
    subscriber.handle(response(1, "e1", copy(&key, 1, false)), NOW);
    let upsert::Resource::Secret(mut bad) = copy(&key, 2, false) else { panic!("a copy") };
    bad.state = "misplaced".into();
    let applied = subscriber.handle(response(2, "e1", upsert::Resource::Secret(bad)), NOW);
    assert!(matches!(applied.changes[..], [Change::SecretGone(gone)] if gone == key.hash()));
    assert!(matches!(applied.reply.message, Some(Message::Nack(_))));
    assert_eq!(subscriber.handle(response(3, "e1", copy(&key, 3, false)), NOW).changes.len(), 1);
}

#[test]
fn a_hundred_thousand_held_copies_are_resumed_in_about_three_megabytes() {
    let secrets = (0..100_000u128).map(|number| {
        (KeyHash((number << 64 | number).to_be_bytes()), Stamp { revision: number as u64 + 1, tag: 7 })
    });
    let mut subscriber = Subscriber::restore(Restored {
        epoch: "e1".into(),
        secrets: secrets.collect(),
        ..Restored::default()
    });
    subscriber.hello("0.1.0");
    let opening = subscriber.resume();
    let sizes = opening.iter().map(DeltaRequest::encoded_len);
    assert!(sizes.clone().all(|size| size <= MAX_MESSAGE_BYTES));
    assert!(sizes.sum::<usize>() < 3_210_000);
}

#[test]
fn secrets_that_a_node_may_demand_are_bounded() {
    let mut publisher = Publisher::new();
    let mut subscriber = Subscriber::new();
    for request in [subscriber.hello("x")].into_iter().chain(subscriber.resume()) {
        publisher.on_request(request).unwrap();
    }
    let name =
        |number: usize| SecretName { tenant: tenant(1).to_string(), path: format!("external/a/{number}") };
    let secrets = (0..=MAX_SECRETS).map(name).collect();
    let message = Message::Subscribe(Subscribe { secrets, ..Subscribe::default() });
    let told = publisher.on_request(DeltaRequest { message: Some(message) });
    assert_eq!(told, Err(Violation::TooManyDemands));
}

#[test]
fn a_freshness_is_sent_when_it_changes() {
    let mut pair = Pair::new();
    let ago = |seconds: i64| Timestamp::from_millis(NOW.as_millis() - seconds * 1000);
    let freshness = |seconds| {
        Arc::new(Freshness {
            backend: owning(1).backend,
            rules: vec![("external/a/**".into(), ago(seconds))],
            exceptions: BTreeMap::from([(SecretPath::check("external/a/s1").unwrap(), ago(500))]),
        })
    };
    pair.desired.freshness.insert(owning(1), freshness(60));
    pair.settle();
    assert_eq!(pair.held.freshness[&owning(1)], *freshness(60));
    assert!(pair.diff().is_empty());
    pair.desired.freshness.insert(owning(1), freshness(5));
    let responses = pair.diff();
    assert_eq!(responses.len(), 1);
    pair.deliver(responses);
    assert_eq!(pair.held.freshness[&owning(1)], *freshness(5));
}

#[test]
fn clocks_that_differ_do_not_change_an_age() {
    let mut subscriber = Subscriber::new();
    let key = secret(1, 1);
    subscriber.demand([Demand::Secret(key.clone())]);
    let copy = SecretCopy {
        key,
        stamp: Stamp { revision: 1, tag: 1 },
        replica: replica(b"v", State::Active),
        prefetched: false,
    };
    let pushed = copy_to_wire(&copy, NOW.after(Duration::from_secs(30)));
    let elsewhere = NOW.after(Duration::from_secs(7200));
    let applied = subscriber.handle(response(1, "e1", upsert::Resource::Secret(pushed)), elsewhere);
    let [Change::Secret(_, _, replica)] = &applied.changes[..] else { panic!("a copy") };
    assert_eq!(elsewhere.since(replica.verified), Duration::from_secs(30));
}
