//! Random histories of secrets: whatever happens on the way, what the node holds is what the store has.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use proptest::prelude::*;
use prost::Message as _;
use scaivault_discovery::{
    Change, Demand, Desired, MAX_MESSAGE_BYTES, MAX_UNACKNOWLEDGED, Mark, NextStep, PrefetchProgress,
    Publisher, Restored, Subscriber,
};
use scaivault_domain::replica::{Absence, KeyHash, Replica, SecretKey, Stamp};
use scaivault_domain::secret::State;
use scaivault_domain::view::TenantView;
use scaivault_proto::discovery::v1::{DeltaRequest, DeltaResponse};

use crate::fixtures::{NOW, prefetched_view, tenant, view};
use crate::shelf::{Shelf, owning, secret};

#[derive(Clone, Debug)]
enum Step {
    Write(u8),
    WriteLarge(u8),
    DeleteSoftly(u8),
    Delete(u8),
    Cycle(u8),
    Prefetch(u8),
    DropTenant,
    Demand(u8),
    Drop(u8),
    ExpireFeed,
    NewEpoch,
    LoseStream,
    RestartNode,
    Compare,
    Diff,
    Follow,
    Page,
    Plan,
    Deliver(usize),
    Hear,
    Acknowledge(prop::sample::Index),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let some = 0..12u8;
    let step = prop_oneof![
        5 => some.clone().prop_map(Step::Write),
        3 => some.clone().prop_map(Step::WriteLarge),
        1 => some.clone().prop_map(Step::DeleteSoftly),
        3 => some.clone().prop_map(Step::Delete),
        1 => (1..3u8).prop_map(Step::Cycle),
        1 => (1..3u8).prop_map(Step::Prefetch),
        1 => Just(Step::DropTenant),
        5 => some.clone().prop_map(Step::Demand),
        3 => some.prop_map(Step::Drop),
        1 => Just(Step::ExpireFeed),
        1 => Just(Step::NewEpoch),
        2 => Just(Step::LoseStream),
        1 => Just(Step::RestartNode),
        1 => Just(Step::Compare),
        4 => Just(Step::Diff),
        5 => Just(Step::Follow),
        4 => Just(Step::Page),
        8 => Just(Step::Plan),
        6 => (1..9usize).prop_map(Step::Deliver),
        4 => Just(Step::Hear),
        6 => any::<prop::sample::Index>().prop_map(Step::Acknowledge),
    ];
    proptest::collection::vec(step, 0..120)
}

/// Six secrets of each of two tenants.
fn key(number: u8) -> SecretKey {
    secret(1 + number / 6, number % 6)
}

/// A row of the node's cache.
#[derive(Debug)]
struct Row {
    key: SecretKey,
    epoch: String,
    stamp: Stamp,
    replica: Arc<Replica>,
}

/// What a node keeps on its disk, and what it only knows while it runs.
#[derive(Debug, Default)]
struct Node {
    epoch: String,
    revision: u64,
    rows: HashMap<KeyHash, Row>,
    absent: HashMap<SecretKey, Absence>,
    wanted: BTreeSet<SecretKey>,
}

impl Node {
    fn apply(&mut self, changes: Vec<Change>, epoch: &str, revision: u64) {
        epoch.clone_into(&mut self.epoch);
        self.revision = revision;
        for change in changes {
            match change {
                Change::Secret(key, stamp, replica) => {
                    let row = Row { key: key.clone(), epoch: epoch.to_owned(), stamp, replica };
                    self.absent.remove(&key);
                    if let Some(before) = self.rows.insert(key.hash(), row) {
                        let back = before.epoch == epoch && before.stamp.revision > stamp.revision;
                        assert!(!back, "{key:?} went back");
                    }
                }
                Change::SecretAbsent(key, absence) => {
                    self.rows.remove(&key.hash());
                    self.absent.insert(key, absence);
                }
                Change::SecretGone(hash) => {
                    self.rows.remove(&hash);
                    self.wanted.retain(|key| key.hash() != hash);
                }
                _ => {}
            }
        }
    }

    fn restored(&self) -> Subscriber {
        let secrets = self.rows.iter().map(|(hash, row)| {
            let revision = if row.epoch == self.epoch { row.stamp.revision } else { 0 };
            (*hash, Stamp { revision, ..row.stamp })
        });
        Subscriber::restore(Restored {
            epoch: self.epoch.clone(),
            secrets: secrets.collect(),
            ..Restored::default()
        })
    }
}

struct World {
    shelf: Shelf,
    desired: Desired,
    mark: Mark,
    epochs: u32,
    writes: u64,
    publisher: Publisher,
    subscriber: Subscriber,
    node: Node,
    responses: VecDeque<DeltaResponse>,
    requests: VecDeque<DeltaRequest>,
    acknowledgements: Vec<DeltaRequest>,
}

impl World {
    fn new() -> Self {
        let mut desired = Desired { epoch: "epoch-0".into(), revision: 1, ..Desired::default() };
        desired.views.extend([1, 2].map(|owner| (tenant(owner), view(owner, 1))));
        let mut world = World {
            shelf: Shelf::new(),
            desired,
            mark: Mark { revision: 1, concerned: 1 },
            epochs: 0,
            writes: 0,
            publisher: Publisher::new(),
            subscriber: Subscriber::new(),
            node: Node::default(),
            responses: VecDeque::new(),
            requests: VecDeque::new(),
            acknowledgements: Vec::new(),
        };
        world.connect();
        world
    }

    fn connect(&mut self) {
        self.responses.clear();
        self.requests.clear();
        self.acknowledgements.clear();
        self.publisher = Publisher::new();
        self.requests.push_back(self.subscriber.hello("0.1.0"));
        self.requests.extend(self.subscriber.resume());
    }

    fn write(&mut self, number: u8, bytes: usize) {
        self.writes += 1;
        let text = format!("{:0>3}", self.writes).repeat(bytes);
        self.shelf.put(&key(number), text.as_bytes());
    }

    fn reconfigure(&mut self, owner: u8) {
        let generation = self.shelf.commit();
        self.mark.concerned = generation;
        let view = match self.shelf.prefetched.contains(&tenant(owner)) {
            true => prefetched_view(owner, generation),
            false => view(owner, generation),
        };
        self.desired.views.insert(tenant(owner), view);
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Write(number) => self.write(number, 1),
            Step::WriteLarge(number) => self.write(number, 70 * 1024),
            Step::DeleteSoftly(number) => {
                self.shelf.put_state(&key(number), b"", State::Deleted);
            }
            Step::Delete(number) => self.shelf.delete(&key(number)),
            Step::Cycle(owner) => self.shelf.cycle(&tenant(owner)),
            Step::Prefetch(owner) => {
                if !self.shelf.prefetched.remove(&tenant(owner)) {
                    self.shelf.prefetched.insert(tenant(owner));
                }
                self.reconfigure(owner);
            }
            Step::DropTenant => {
                if self.desired.views.remove(&tenant(2)).is_none() {
                    self.reconfigure(2);
                } else {
                    self.mark.concerned = self.shelf.commit();
                    for key in (6..12).map(key) {
                        self.shelf.delete(&key);
                    }
                }
            }
            Step::Demand(number) => {
                self.node.wanted.insert(key(number));
                self.demand(Demand::Secret(key(number)));
            }
            Step::Drop(number) => {
                let key = key(number);
                self.node.rows.remove(&key.hash());
                self.node.absent.remove(&key);
                self.node.wanted.remove(&key);
                self.demand(Demand::DropSecret(key.hash()));
            }
            Step::ExpireFeed => self.shelf.expire_feed(),
            Step::NewEpoch => {
                self.epochs += 1;
                self.desired.epoch = format!("epoch-{}", self.epochs);
                self.shelf.start_over();
                for view in self.desired.views.values_mut() {
                    *view = Arc::new(TenantView { generation: 1, ..(**view).clone() });
                }
                self.mark.concerned = 1;
                // The control plane starts anew, too.
                self.connect();
            }
            Step::LoseStream => self.connect(),
            Step::RestartNode => {
                self.subscriber = self.node.restored();
                self.node.revision = 0;
                self.node.absent.clear();
                self.node.wanted.clear();
                self.connect();
            }
            Step::Compare => self.publisher.compare(),
            Step::Diff => self.plan_desired(),
            Step::Follow => self.follow(),
            Step::Page => self.shelf.page(&mut self.publisher),
            Step::Plan => {
                self.shelf.answer(&mut self.publisher);
                let responses = self.publisher.plan(None, NOW);
                self.send(responses);
            }
            Step::Deliver(count) => self.deliver(count),
            Step::Hear => self.hear(),
            Step::Acknowledge(index) => {
                if !self.acknowledgements.is_empty() {
                    let index = index.index(self.acknowledgements.len());
                    self.publisher.on_request(self.acknowledgements.swap_remove(index)).unwrap();
                }
            }
        }
    }

    fn demand(&mut self, demand: Demand) {
        self.requests.extend(self.subscriber.demand([demand]));
    }

    fn plan_desired(&mut self) {
        self.desired.revision = self.shelf.revision;
        let responses = self.publisher.plan(Some(&self.desired), NOW);
        self.send(responses);
    }

    fn follow(&mut self) {
        self.mark.revision = self.shelf.revision;
        self.publisher.mark(self.mark);
        self.shelf.follow(&mut self.publisher);
    }

    fn send(&mut self, responses: Vec<DeltaResponse>) {
        for response in responses {
            let resources = response.removals.len() + response.upserts.len();
            assert!(response.encoded_len() <= MAX_MESSAGE_BYTES || resources == 1);
            self.responses.push_back(response);
        }
        assert!(self.responses.len() + self.acknowledgements.len() <= MAX_UNACKNOWLEDGED);
    }

    fn deliver(&mut self, count: usize) {
        for _ in 0..count {
            let Some(response) = self.responses.pop_front() else { return };
            let applied = self.subscriber.handle(response, NOW);
            assert!(matches!(
                applied.reply.message,
                Some(scaivault_proto::discovery::v1::delta_request::Message::Ack(_))
            ));
            self.node.apply(applied.changes, self.subscriber.epoch(), applied.revision);
            self.acknowledgements.push(applied.reply);
            self.check_announced();
        }
    }

    /// Nothing that the node holds is older than the revision that it believes to be in force.
    fn check_announced(&self) {
        if self.node.epoch != self.desired.epoch {
            return;
        }
        for row in self.node.rows.values() {
            let history = self.shelf.history.iter();
            let mut until =
                history.filter(|(revision, key, _)| *key == row.key && *revision <= self.node.revision);
            let Some((revision, _, then)) = until.next_back() else { continue };
            let held = if row.epoch == self.node.epoch {
                row.stamp.revision >= *revision
            } else {
                then.is_some_and(|then| then.tag == row.stamp.tag)
            };
            assert!(held, "{:?} is older than revision {}", row.key, self.node.revision);
        }
    }

    fn hear(&mut self) {
        for request in self.requests.drain(..) {
            self.publisher.on_request(request).unwrap();
        }
    }

    /// Lets everything arrive until nothing is left to say; in how many rounds.
    fn settle(&mut self) -> usize {
        for round in 0..400 {
            self.hear();
            let mut next = NextStep::Wait;
            for acknowledgement in std::mem::take(&mut self.acknowledgements) {
                next = next.max(self.publisher.on_request(acknowledgement).unwrap().next);
            }
            self.follow();
            if round == 0 || self.publisher.adrift() || self.publisher.behind() {
                self.plan_desired();
            }
            self.shelf.page(&mut self.publisher);
            self.shelf.answer(&mut self.publisher);
            let responses = self.publisher.plan(None, NOW);
            self.send(responses);
            let quiet = !self.publisher.busy() && self.publisher.cursor().is_none();
            if self.responses.is_empty() && quiet && next == NextStep::Wait {
                return round;
            }
            self.deliver(usize::MAX);
        }
        panic!("the rounds do not end")
    }

    fn prefetches(&self, owner: u8) -> bool {
        self.shelf.prefetched.contains(&tenant(owner)) && self.desired.views.contains_key(&tenant(owner))
    }

    fn check(&self) {
        for row in self.node.rows.values() {
            let (stamp, replica) = &self.shelf.secrets[&row.key];
            assert_eq!(row.stamp.tag, stamp.tag, "{:?}", row.key);
            assert!(row.epoch != self.node.epoch || row.stamp == *stamp, "{:?}", row.key);
            let value = |replica: &Replica| replica.value.as_ref().map(|value| value.expose().to_vec());
            assert_eq!(value(&row.replica), value(replica));
            assert_eq!(row.replica.state, replica.state);
        }
        for key in &self.node.wanted {
            match self.shelf.find(key) {
                Ok(_) => assert!(self.node.rows.contains_key(&key.hash()), "{key:?} is not held"),
                Err(absence) => assert_eq!(self.node.absent.get(key), Some(&absence), "{key:?}"),
            }
        }
        let progress = self.publisher.progress().prefetch;
        let prefetched = [1, 2].into_iter().filter(|owner| self.prefetches(*owner)).map(owning);
        assert!(progress.keys().cloned().eq(prefetched));
        assert!(progress.values().all(|progress| *progress == PrefetchProgress::Complete));
        // More only if a demand was given up before the acknowledgement of its copy, which travels on its own, came.
        assert!(self.publisher.progress().secrets >= self.node.rows.len());
        assert_eq!(self.node.revision, self.shelf.revision);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]
    #[test]
    fn every_history_ends_with_the_node_holding_what_the_store_has(steps in steps()) {
        let mut world = World::new();
        for step in steps {
            world.step(step);
        }
        world.settle();
        world.check();
        world.connect();
        world.settle();
        world.check();
        prop_assert_eq!(world.publisher.progress().secrets, world.node.rows.len());
        // With a new stream every copy of a prefetched backend is there, also those that were given up.
        for key in (0..12).map(key).filter(|key| world.shelf.secrets.contains_key(key)) {
            let prefetched = (1..3).any(|owner| world.prefetches(owner) && key.tenant == tenant(owner));
            prop_assert!(!prefetched || world.node.rows.contains_key(&key.hash()), "{key:?}");
        }
    }
}
