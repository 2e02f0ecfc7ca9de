//! Random histories: whatever happens on the way, the node ends up with what it should have.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use proptest::prelude::*;
use prost::Message as _;
use scaivault_discovery::wire::{view_chunks, view_from_chunks};
use scaivault_discovery::{
    Demand, Desired, LeaseRefusal, LeaseState, MAX_MESSAGE_BYTES, MAX_UNACKNOWLEDGED, NextStep, Publisher,
    Subscriber,
};
use scaivault_domain::error::Reason;
use scaivault_domain::lease::LeaseKey;
use scaivault_domain::token::TokenHash;
use scaivault_domain::view::TenantView;
use scaivault_proto::discovery::v1::{DeltaRequest, DeltaResponse};

use crate::fixtures::{Held, NOW, caller, hash, key, large_view, lease, overlapping_view, tenant, view};

#[derive(Clone, Debug)]
enum Step {
    SmallView(u8),
    LargeView(u8),
    BadView(u8),
    DropTenant(u8),
    Grant(u8),
    Revoke(u8),
    Lease(u8),
    LeasePending(u8),
    LeaseRefused(u8),
    Demand(u8),
    DropDemand(u8),
    DemandLease(u8),
    LeaseFails(u8),
    DropLease(u8),
    NewEpoch,
    LoseStream,
    Plan,
    Deliver(usize),
    Hear,
    Acknowledge(prop::sample::Index),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let few = 1..4u8;
    let step = prop_oneof![
        2 => few.clone().prop_map(Step::SmallView),
        1 => few.clone().prop_map(Step::LargeView),
        1 => few.clone().prop_map(Step::BadView),
        1 => few.clone().prop_map(Step::DropTenant),
        2 => few.clone().prop_map(Step::Grant),
        1 => few.clone().prop_map(Step::Revoke),
        2 => few.clone().prop_map(Step::Lease),
        1 => few.clone().prop_map(Step::LeasePending),
        1 => few.clone().prop_map(Step::LeaseRefused),
        2 => few.clone().prop_map(Step::Demand),
        1 => few.clone().prop_map(Step::DropDemand),
        2 => few.clone().prop_map(Step::DemandLease),
        1 => few.clone().prop_map(Step::LeaseFails),
        1 => few.prop_map(Step::DropLease),
        1 => Just(Step::NewEpoch),
        2 => Just(Step::LoseStream),
        6 => Just(Step::Plan),
        6 => (1..9usize).prop_map(Step::Deliver),
        4 => Just(Step::Hear),
        6 => any::<prop::sample::Index>().prop_map(Step::Acknowledge),
    ];
    proptest::collection::vec(step, 0..80)
}

/// Both planes, and what is on its way between them.
struct World {
    desired: Desired,
    epochs: u32,
    /// Counts commits of the epoch; the generation and version of whatever is changed.
    commits: u64,
    grants: HashMap<TokenHash, u64>,
    lease_ids: u64,
    publisher: Publisher,
    subscriber: Subscriber,
    held: Held,
    wanted: HashSet<TokenHash>,
    wanted_leases: HashSet<LeaseKey>,
    responses: VecDeque<DeltaResponse>,
    requests: VecDeque<DeltaRequest>,
    /// Travel on their own, in any order.
    acknowledgements: Vec<DeltaRequest>,
}

impl World {
    fn new() -> Self {
        let mut world = World {
            desired: Desired { epoch: "epoch-0".into(), ..Desired::default() },
            epochs: 0,
            commits: 0,
            grants: HashMap::new(),
            lease_ids: 0,
            publisher: Publisher::new(),
            subscriber: Subscriber::new(),
            held: Held::default(),
            wanted: HashSet::new(),
            wanted_leases: HashSet::new(),
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

    fn commit(&mut self) -> u64 {
        self.commits += 1;
        self.desired.revision = self.commits;
        self.commits
    }

    fn set_view(&mut self, view: Arc<TenantView>) {
        self.desired.views.insert(view.tenant.clone(), view);
    }

    fn set_lease(&mut self, number: u8, state: LeaseState) {
        self.desired.leases.insert(key(number), state);
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::SmallView(number) => {
                let view = view(number, self.commit());
                self.set_view(view);
            }
            Step::LargeView(number) => {
                let view = large_view(number, self.commit(), 3);
                self.set_view(view);
            }
            Step::BadView(number) => {
                let view = overlapping_view(number, self.commit());
                self.set_view(view);
            }
            Step::DropTenant(number) => {
                self.commit();
                self.desired.views.remove(&tenant(number));
            }
            Step::Grant(number) => {
                let version = self.commit();
                self.grants.insert(hash(number), version);
            }
            Step::Revoke(number) => {
                self.commit();
                self.grants.remove(&hash(number));
            }
            Step::Lease(number) => {
                self.lease_ids += 1;
                let push = lease(number, &format!("lease-{}", self.lease_ids));
                self.set_lease(number, LeaseState::Held(push));
            }
            Step::LeasePending(number) => self.set_lease(number, LeaseState::Pending),
            Step::LeaseRefused(number) => {
                let reason = Some(Reason::BackendLoginFailed);
                let refusal = LeaseRefusal { reason, message: "the login failed".into(), retry_after: None };
                self.set_lease(number, LeaseState::Refused(refusal));
            }
            Step::Demand(number) => {
                self.wanted.insert(hash(number));
                self.demand(Demand::Grant(hash(number)));
            }
            Step::DropDemand(number) => {
                self.wanted.remove(&hash(number));
                self.held.grants.remove(&hash(number));
                self.demand(Demand::DropGrant(hash(number)));
            }
            Step::DemandLease(number) => {
                self.wanted_leases.insert(key(number));
                self.demand(Demand::Lease { key: key(number), refused_id: None });
            }
            Step::LeaseFails(number) => {
                if let Some(Some(id)) = self.held.leases.get(&key(number)).cloned() {
                    self.demand(Demand::Lease { key: key(number), refused_id: Some(id) });
                }
            }
            Step::DropLease(number) => {
                self.wanted_leases.remove(&key(number));
                self.held.leases.remove(&key(number));
                self.demand(Demand::DropLease(key(number)));
            }
            Step::NewEpoch => self.new_epoch(),
            Step::LoseStream => self.connect(),
            Step::Plan => self.plan(),
            Step::Deliver(count) => self.deliver(count),
            Step::Hear => self.hear(),
            Step::Acknowledge(index) => {
                if !self.acknowledgements.is_empty() {
                    let acknowledgement =
                        self.acknowledgements.swap_remove(index.index(self.acknowledgements.len()));
                    self.publisher.on_request(acknowledgement).unwrap();
                }
            }
        }
    }

    fn demand(&mut self, demand: Demand) {
        self.requests.extend(self.subscriber.demand([demand]));
    }

    /// As after a restore: everything is there, with numbers that start over.
    fn new_epoch(&mut self) {
        self.epochs += 1;
        self.desired.epoch = format!("epoch-{}", self.epochs);
        self.commits = 1;
        self.desired.revision = 1;
        self.grants.values_mut().for_each(|version| *version = 1);
        for view in self.desired.views.values_mut() {
            *view = Arc::new(TenantView { generation: 1, ..(**view).clone() });
        }
    }

    fn plan(&mut self) {
        let versions = &self.grants;
        let grants = self.publisher.demands().grants.iter().map(|hash| {
            let number = hash.as_bytes()[0];
            (*hash, versions.get(hash).map(|version| (*version, caller(number, number))))
        });
        self.desired.grants = grants.collect();
        for response in self.publisher.plan(Some(&self.desired), NOW) {
            assert!(response.encoded_len() <= MAX_MESSAGE_BYTES);
            self.responses.push_back(response);
        }
        assert!(self.responses.len() + self.acknowledgements.len() <= MAX_UNACKNOWLEDGED);
    }

    fn deliver(&mut self, count: usize) {
        for _ in 0..count {
            let Some(response) = self.responses.pop_front() else { return };
            let applied = self.subscriber.handle(response, NOW);
            if !applied.epoch_changed {
                assert!(applied.revision >= self.held.revision);
            }
            self.held.apply(applied.changes, applied.revision);
            self.acknowledgements.push(applied.reply);
        }
    }

    fn hear(&mut self) {
        for request in self.requests.drain(..) {
            let heard = self.publisher.on_request(request).unwrap();
            for (key, id) in heard.refused_leases {
                // The control plane gets another one.
                if matches!(self.desired.leases.get(&key), Some(LeaseState::Held(push)) if push.id == id) {
                    self.lease_ids += 1;
                    let push =
                        lease(key.tenant.as_str().as_bytes()[7] - b'0', &format!("lease-{}", self.lease_ids));
                    self.desired.leases.insert(key, LeaseState::Held(push));
                }
            }
        }
    }

    /// Lets everything arrive until nothing is left to say; in how many rounds.
    fn settle(&mut self) -> usize {
        for round in 0.. {
            self.hear();
            let mut next = NextStep::Wait;
            for acknowledgement in std::mem::take(&mut self.acknowledgements).into_iter().rev() {
                next = next.max(self.publisher.on_request(acknowledgement).unwrap().next);
            }
            self.plan();
            if self.responses.is_empty() {
                assert_eq!(next, NextStep::Wait);
                return round;
            }
            self.deliver(usize::MAX);
        }
        unreachable!("the rounds do not end")
    }

    fn check(&self) {
        let progress = self.publisher.progress().views;
        for (tenant, view) in &self.desired.views {
            let held = self.held.views.get(tenant);
            if view_from_chunks(view_chunks(view)).is_ok() {
                assert_eq!(held, Some(view));
                assert_eq!(progress[tenant].acknowledged, Some(view.generation));
                assert_eq!(progress[tenant].refusal, None);
            } else {
                assert_ne!(held.map(|held| &held.backends), Some(&view.backends));
                assert_eq!(progress[tenant].refusal.as_ref().unwrap().generation, view.generation);
                assert_ne!(progress[tenant].acknowledged, Some(view.generation));
            }
        }
        assert!(self.held.views.keys().all(|tenant| self.desired.views.contains_key(tenant)));

        assert_eq!(self.held.grants.keys().copied().collect::<HashSet<_>>(), self.wanted);
        for (hash, grant) in &self.held.grants {
            assert_eq!(grant.as_ref().map(|(version, _)| version), self.grants.get(hash));
        }

        let held = &self.publisher.progress().leases;
        for key in &self.wanted_leases {
            match self.desired.leases.get(key) {
                Some(LeaseState::Held(push)) => {
                    assert_eq!(self.held.leases.get(key), Some(&Some(push.id.clone())));
                    assert_eq!(held.get(key), Some(&push.id));
                }
                Some(LeaseState::Refused(_)) => assert_eq!(self.held.leases.get(key), Some(&None)),
                Some(LeaseState::Pending) | None => {}
            }
        }
        assert!(self.held.leases.keys().all(|key| self.wanted_leases.contains(key)));
        assert_eq!(self.held.revision, self.desired.revision);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]
    #[test]
    fn every_history_ends_with_the_node_holding_what_it_should(steps in steps()) {
        let mut world = World::new();
        for step in steps {
            world.step(step);
        }
        let rounds = world.settle();
        prop_assert!(rounds <= 12, "took {rounds} rounds");
        world.check();
        world.connect();
        world.settle();
        world.check();
    }
}
