use std::sync::Arc;
use std::time::Duration;

use prost::Message as _;
use scaivault_discovery::{
    Demand, Desired, LeaseState, MAX_MESSAGE_BYTES, MAX_UNACKNOWLEDGED, NextStep, Publisher, Subscriber,
    Violation,
};
use scaivault_domain::budget::{Share, Slice};
use scaivault_proto::discovery::v1::delta_request::Message;
use scaivault_proto::discovery::v1::{Ack, DeltaRequest, DeltaResponse, Nack, Refusal, removal, upsert};

use crate::fixtures::{NOW, caller, hash, key, large_view, lease, overlapping_view, tenant, view};

fn connected(demands: impl IntoIterator<Item = Demand>) -> (Subscriber, Publisher) {
    let mut subscriber = Subscriber::new();
    subscriber.demand(demands);
    let publisher = connect(&mut subscriber);
    (subscriber, publisher)
}

fn connect(subscriber: &mut Subscriber) -> Publisher {
    let mut publisher = Publisher::new();
    for request in [subscriber.hello("0.1.0")].into_iter().chain(subscriber.resume()) {
        publisher.on_request(request).unwrap();
    }
    publisher
}

fn desired(revision: u64) -> Desired {
    Desired { epoch: "e1".into(), revision, ..Desired::default() }
}

/// Plans and has the node apply and acknowledge until there is nothing left; how many responses that took.
fn settle(subscriber: &mut Subscriber, publisher: &mut Publisher, desired: &Desired) -> usize {
    let mut count = 0;
    loop {
        let responses = publisher.plan(Some(desired), NOW);
        if responses.is_empty() {
            return count;
        }
        count += responses.len();
        for response in responses {
            publisher.on_request(subscriber.handle(response, NOW).reply).unwrap();
        }
    }
}

fn ack(nonce: u64) -> DeltaRequest {
    DeltaRequest { message: Some(Message::Ack(Ack { nonce })) }
}

fn has_removal_of(response: &DeltaResponse, number: u8) -> bool {
    let bytes = hash(number).as_bytes().to_vec();
    response
        .removals
        .iter()
        .any(|removal| removal.resource == Some(removal::Resource::TokenHash(bytes.clone())))
}

#[test]
fn at_most_eight_responses_of_limited_size_are_unacknowledged() {
    let (_, mut publisher) = connected([]);
    let mut desired = desired(1);
    desired.views.insert(tenant(1), large_view(1, 1, 40));
    let mut unacknowledged: Vec<u64> = Vec::new();
    let mut chunks = 0;
    loop {
        let responses = publisher.plan(Some(&desired), NOW);
        for response in &responses {
            assert!(response.encoded_len() <= MAX_MESSAGE_BYTES);
            chunks += response.upserts.len();
            unacknowledged.push(response.nonce);
        }
        assert!(unacknowledged.len() <= MAX_UNACKNOWLEDGED);
        let Some(nonce) = unacknowledged.pop() else { break };
        publisher.on_request(ack(nonce)).unwrap();
    }
    assert_eq!(chunks, 40);
    assert_eq!(publisher.progress().views[&tenant(1)].acknowledged, Some(1));
}

#[test]
fn a_revocation_overtakes_a_large_view_and_waits_for_no_acknowledgement() {
    let (mut subscriber, mut publisher) = connected([Demand::Grant(hash(1))]);
    let mut desired = desired(1);
    desired.grants.insert(hash(1), Some((1, caller(1, 1))));
    settle(&mut subscriber, &mut publisher, &desired);
    desired.revision = 2;
    desired.views.insert(tenant(1), large_view(1, 1, 40));
    assert_eq!(publisher.plan(Some(&desired), NOW).len(), MAX_UNACKNOWLEDGED - 1);
    desired.revision = 3;
    desired.grants.insert(hash(1), None);
    let urgent = publisher.plan(Some(&desired), NOW);
    assert_eq!(urgent.len(), 1);
    assert!(has_removal_of(&urgent[0], 1));
}

#[test]
fn lanes_are_removals_grants_views_leases() {
    let demands =
        [Demand::Grant(hash(1)), Demand::Grant(hash(2)), Demand::Lease { key: key(1), refused_id: None }];
    let (_, mut publisher) = connected(demands);
    let mut desired = desired(1);
    desired.grants.insert(hash(1), Some((1, caller(1, 1))));
    desired.grants.insert(hash(2), None);
    desired.views.insert(tenant(1), large_view(1, 1, 3));
    desired.leases.insert(key(1), LeaseState::Held(lease(1, "l1")));
    let responses = publisher.plan(Some(&desired), NOW);
    assert!(has_removal_of(&responses[0], 2));
    let order: Vec<_> = responses
        .iter()
        .flat_map(|response| &response.upserts)
        .map(|upsert| match upsert.resource.as_ref().unwrap() {
            upsert::Resource::Grant(_) => 'g',
            upsert::Resource::View(_) => 'v',
            upsert::Resource::Lease(_) => 'l',
            upsert::Resource::Freshness(_) => 'f',
            upsert::Resource::Secret(_) => 's',
            upsert::Resource::PrefetchComplete(_) => 'c',
        })
        .collect();
    assert_eq!(order, ['g', 'v', 'v', 'v', 'l']);
}

#[test]
fn a_later_generation_supersedes_what_was_not_sent() {
    let (mut subscriber, mut publisher) = connected([]);
    let mut desired = desired(1);
    desired.views.insert(tenant(1), large_view(1, 1, 40));
    let begun = publisher.plan(Some(&desired), NOW);
    desired.revision = 2;
    desired.views.insert(tenant(1), view(1, 2));
    for response in begun {
        publisher.on_request(subscriber.handle(response, NOW).reply).unwrap();
    }
    assert_eq!(publisher.progress().views[&tenant(1)].acknowledged, None);
    assert_eq!(settle(&mut subscriber, &mut publisher, &desired), 1);
    assert_eq!(publisher.progress().views[&tenant(1)].acknowledged, Some(2));
}

#[test]
fn a_refused_view_is_not_sent_again_until_it_changes() {
    let (mut subscriber, mut publisher) = connected([]);
    let mut desired = desired(1);
    desired.views.insert(tenant(1), view(1, 1));
    settle(&mut subscriber, &mut publisher, &desired);
    desired.revision = 2;
    desired.views.insert(tenant(1), overlapping_view(1, 2));
    assert_eq!(settle(&mut subscriber, &mut publisher, &desired), 1);
    let progress = publisher.progress().views[&tenant(1)].clone();
    assert_eq!((progress.sent, progress.acknowledged), (Some(2), Some(1)));
    assert!(progress.refusal.unwrap().message.contains("overlap"));
    assert_eq!(settle(&mut subscriber, &mut publisher, &desired), 0);
    desired.revision = 3;
    desired.views.insert(tenant(1), view(1, 3));
    settle(&mut subscriber, &mut publisher, &desired);
    let progress = publisher.progress().views[&tenant(1)].clone();
    assert_eq!((progress.acknowledged, progress.refusal), (Some(3), None));
}

#[test]
fn a_refusal_names_the_first_cause_when_several_chunks_are_refused() {
    let (_, mut publisher) = connected([]);
    let mut desired = desired(1);
    desired.views.insert(tenant(1), large_view(1, 4, 2));
    for (response, message) in
        publisher.plan(Some(&desired), NOW).iter().zip(["the cause", "the consequence"])
    {
        let refusals =
            vec![Refusal { tenant: tenant(1).to_string(), generation: 4, message: message.into() }];
        let nack = Message::Nack(Nack { nonce: response.nonce, refusals });
        publisher.on_request(DeltaRequest { message: Some(nack) }).unwrap();
    }
    assert_eq!(publisher.progress().views[&tenant(1)].refusal.as_ref().unwrap().message, "the cause");
}

#[test]
fn the_rest_of_a_refused_view_is_not_sent() {
    let (_, mut publisher) = connected([]);
    let mut desired = desired(1);
    desired.views.insert(tenant(1), large_view(1, 4, 40));
    let sent = publisher.plan(Some(&desired), NOW);
    let refusals = vec![Refusal { tenant: tenant(1).to_string(), generation: 4, message: "no".into() }];
    let nack = Message::Nack(Nack { nonce: sent[0].nonce, refusals });
    publisher.on_request(DeltaRequest { message: Some(nack) }).unwrap();
    for response in &sent[1..] {
        publisher.on_request(ack(response.nonce)).unwrap();
    }
    assert!(publisher.plan(Some(&desired), NOW).iter().all(|response| response.upserts.is_empty()));
    assert_eq!(publisher.progress().views[&tenant(1)].acknowledged, None);
}

#[test]
fn an_older_view_does_not_interrupt_the_one_on_its_way() {
    let (mut subscriber, mut publisher) = connected([]);
    let mut newer = desired(1);
    newer.views.insert(tenant(1), large_view(1, 4, 2));
    let mut responses = publisher.plan(Some(&newer), NOW);
    newer.views.insert(tenant(1), view(1, 3));
    responses[1].nonce = 100;
    assert!(subscriber.handle(responses.remove(0), NOW).changes.is_empty());
    assert!(subscriber.handle(only_response_of(&newer), NOW).changes.is_empty());
    assert_eq!(subscriber.handle(responses.remove(0), NOW).changes.len(), 1);
}

#[test]
fn a_view_that_a_new_epoch_interrupted_does_not_hold_up_that_of_the_new_one() {
    let (mut subscriber, mut publisher) = connected([]);
    let mut desired = desired(9);
    desired.views.insert(tenant(1), large_view(1, 9, 40));
    subscriber.handle(publisher.plan(Some(&desired), NOW).remove(0), NOW);
    desired = Desired { epoch: "e2".into(), revision: 1, ..Desired::default() };
    desired.views.insert(tenant(1), view(1, 1));
    assert_eq!(subscriber.handle(only_response_of(&desired), NOW).changes.len(), 1);
}

/// The one response of a new stream, numbered behind any other.
fn only_response_of(desired: &Desired) -> DeltaResponse {
    let (_, mut publisher) = connected([]);
    DeltaResponse { nonce: 99, ..publisher.plan(Some(desired), NOW).remove(0) }
}

#[test]
fn the_revision_is_said_only_when_all_of_it_was_sent() {
    let (mut subscriber, mut publisher) = connected([]);
    let mut desired = desired(5);
    desired.views.insert(tenant(1), large_view(1, 1, 10));
    let first = publisher.plan(Some(&desired), NOW);
    assert!(first.iter().all(|response| response.revision == 0));
    for response in first {
        assert_eq!(subscriber.handle(response.clone(), NOW).revision, 0);
        publisher.on_request(ack(response.nonce)).unwrap();
    }
    assert_eq!(publisher.plan(Some(&desired), NOW).last().unwrap().revision, 5);
    assert!(publisher.plan(Some(&desired), NOW).is_empty());
    desired.revision = 6;
    let only_the_revision = publisher.plan(Some(&desired), NOW);
    assert_eq!(only_the_revision.len(), 1);
    assert_eq!((only_the_revision[0].revision, only_the_revision[0].upserts.len()), (6, 0));
}

#[test]
fn after_a_lost_stream_only_differences_travel() {
    let demands = [Demand::Grant(hash(1)), Demand::Lease { key: key(1), refused_id: None }];
    let (mut subscriber, mut publisher) = connected(demands);
    let mut desired = desired(1);
    desired.views.insert(tenant(1), view(1, 1));
    desired.views.insert(tenant(2), view(2, 1));
    desired.grants.insert(hash(1), Some((1, caller(1, 1))));
    desired.leases.insert(key(1), LeaseState::Held(lease(1, "l1")));
    settle(&mut subscriber, &mut publisher, &desired);
    desired.revision = 2;
    desired.views.insert(tenant(2), view(2, 2));
    let mut publisher = connect(&mut subscriber);
    assert_eq!(publisher.progress().leases[&key(1)], "l1");
    let responses = publisher.plan(Some(&desired), NOW);
    assert_eq!(responses.iter().map(|response| response.upserts.len()).sum::<usize>(), 1);
}

#[test]
fn a_new_epoch_sends_everything_again_and_takes_the_rest_away() {
    let (mut subscriber, mut publisher) = connected([Demand::Grant(hash(1))]);
    let mut desired = desired(9);
    desired.views.insert(tenant(1), view(1, 9));
    desired.views.insert(tenant(2), view(2, 9));
    desired.grants.insert(hash(1), Some((9, caller(1, 1))));
    settle(&mut subscriber, &mut publisher, &desired);
    desired = Desired { epoch: "e2".into(), revision: 1, ..Desired::default() };
    desired.views.insert(tenant(1), view(1, 1));
    desired.grants.insert(hash(1), None);
    let responses = publisher.plan(Some(&desired), NOW);
    assert_eq!(responses.len(), 1);
    let applied = subscriber.handle(responses[0].clone(), NOW);
    assert!(applied.epoch_changed);
    assert_eq!((applied.changes.len(), applied.revision), (3, 1));
    publisher.on_request(applied.reply).unwrap();
    assert_eq!(publisher.progress().views.len(), 1);
    assert_eq!(publisher.progress().views[&tenant(1)].acknowledged, Some(1));
}

#[test]
fn a_view_of_another_epoch_is_replaced_although_its_generation_is_the_same() {
    let (mut subscriber, mut publisher) = connected([]);
    let mut old = desired(1);
    old.views.extend([(tenant(1), view(1, 1)), (tenant(2), view(2, 1))]);
    settle(&mut subscriber, &mut publisher, &old);
    // The stream is lost when the node has heard of the new epoch and of nothing in it.
    let new = Desired { epoch: "e2".into(), ..old.clone() };
    let mut first = publisher.plan(Some(&new), NOW).remove(0);
    first.upserts.clear();
    subscriber.handle(first, NOW);
    let mut publisher = connect(&mut subscriber);
    let upserts: usize = publisher.plan(Some(&new), NOW).iter().map(|response| response.upserts.len()).sum();
    assert_eq!(upserts, 2);
}

#[test]
fn a_refused_lease_is_not_pushed_again() {
    let (mut subscriber, mut publisher) = connected([Demand::Lease { key: key(1), refused_id: None }]);
    let mut desired = desired(1);
    desired.leases.insert(key(1), LeaseState::Held(lease(1, "l1")));
    settle(&mut subscriber, &mut publisher, &desired);
    for request in subscriber.demand([Demand::Lease { key: key(1), refused_id: Some("l1".into()) }]) {
        let heard = publisher.on_request(request).unwrap();
        assert_eq!(heard.refused_leases, [(key(1), "l1".to_owned())]);
        assert_eq!(heard.next, NextStep::Diff);
    }
    assert!(publisher.plan(Some(&desired), NOW).is_empty());
    desired.leases.insert(key(1), LeaseState::Held(lease(1, "l2")));
    assert_eq!(settle(&mut subscriber, &mut publisher, &desired), 1);
    assert_eq!(publisher.progress().leases[&key(1)], "l2");
}

#[test]
fn a_refused_lease_that_was_on_its_way_is_not_applied() {
    let (mut subscriber, mut publisher) = connected([Demand::Lease { key: key(1), refused_id: None }]);
    let mut desired = desired(1);
    desired.leases.insert(key(1), LeaseState::Held(lease(1, "l1")));
    let response = publisher.plan(Some(&desired), NOW).remove(0);
    subscriber.demand([Demand::Lease { key: key(1), refused_id: Some("l1".into()) }]);
    assert!(subscriber.handle(response, NOW).changes.is_empty());
}

#[test]
fn a_slice_of_the_call_budget_travels_with_the_lease_whenever_it_changes() {
    let (mut subscriber, mut publisher) = connected([Demand::Lease { key: key(1), refused_id: None }]);
    let mut desired = desired(1);
    let slice = |parties| Some(Slice { budget: "b1".into(), share: Share::among(parties) });
    for (slice, pushes) in [(slice(2), 1), (slice(2), 0), (slice(3), 1), (slice(2), 1), (None, 1), (None, 0)]
    {
        let push = scaivault_discovery::LeasePush { slice, ..lease(1, "l1") };
        desired.leases.insert(key(1), LeaseState::Held(push));
        assert_eq!(settle(&mut subscriber, &mut publisher, &desired), pushes);
        assert_eq!(publisher.progress().leases[&key(1)], "l1", "it stays the same lease");
    }
}

#[test]
fn a_renewed_lease_is_pushed_and_an_ageing_one_is_not() {
    let (mut subscriber, mut publisher) = connected([Demand::Lease { key: key(1), refused_id: None }]);
    let mut desired = desired(1);
    let with = |secs| {
        LeaseState::Held(scaivault_discovery::LeasePush {
            remaining: Some(Duration::from_secs(secs)),
            ..lease(1, "l1")
        })
    };
    for (remaining, pushes) in [(600, 1), (300, 0), (290, 0), (600, 1), (599, 0)] {
        desired.leases.insert(key(1), with(remaining));
        assert_eq!(settle(&mut subscriber, &mut publisher, &desired), pushes, "{remaining}");
    }
}

#[test]
fn a_demand_made_again_is_answered_again() {
    let (mut subscriber, mut publisher) = connected([Demand::Grant(hash(1))]);
    let mut desired = desired(1);
    desired.grants.insert(hash(1), None);
    settle(&mut subscriber, &mut publisher, &desired);
    for request in subscriber.demand([Demand::Grant(hash(1))]) {
        publisher.on_request(request).unwrap();
    }
    assert!(subscriber.demand([Demand::Grant(hash(1))]).is_empty(), "one question is enough");
    assert_eq!(settle(&mut subscriber, &mut publisher, &desired), 1);
}

#[test]
fn what_is_no_longer_demanded_is_not_applied() {
    let (mut subscriber, mut publisher) = connected([Demand::Grant(hash(1))]);
    let mut desired = desired(1);
    desired.grants.insert(hash(1), Some((1, caller(1, 1))));
    let response = publisher.plan(Some(&desired), NOW).remove(0);
    for request in subscriber.demand([Demand::DropGrant(hash(1))]) {
        publisher.on_request(request).unwrap();
    }
    assert!(subscriber.handle(response, NOW).changes.is_empty());
    assert!(publisher.demands().grants.is_empty());
}

#[test]
fn a_node_that_breaks_the_protocol_is_told() {
    let (mut subscriber, mut publisher) = connected([]);
    assert_eq!(publisher.on_request(ack(1)), Err(Violation::UnknownNonce(1)));
    assert_eq!(publisher.on_request(subscriber.hello("x")), Err(Violation::OutOfTurn("Hello")));
    assert_eq!(Publisher::new().on_request(ack(1)), Err(Violation::OutOfTurn("Ack")));
    assert!(Publisher::new().on_request(DeltaRequest { message: None }).is_err());
}

#[test]
fn demands_are_bounded_on_both_sides() {
    use scaivault_discovery::MAX_GRANTS;
    use scaivault_domain::token::TokenHash;
    let token = |number: usize| {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&number.to_le_bytes());
        TokenHash::from_bytes(bytes)
    };
    let mut subscriber = Subscriber::new();
    subscriber.demand((0..=MAX_GRANTS).map(|number| Demand::Grant(token(number))));
    let opening = subscriber.resume();
    assert!(opening.len() > 10 && opening.iter().all(|request| request.encoded_len() <= MAX_MESSAGE_BYTES));
    let mut publisher = connect(&mut subscriber);
    assert_eq!(publisher.demands().grants.len(), MAX_GRANTS);
    let mut other = Subscriber::new();
    let more = other.demand([Demand::Grant(token(MAX_GRANTS))]).remove(0);
    assert_eq!(publisher.on_request(more), Err(Violation::TooManyDemands));
}

#[test]
fn a_grant_that_cannot_be_read_takes_the_held_one_away() {
    let (mut subscriber, mut publisher) = connected([Demand::Grant(hash(1))]);
    let mut desired = desired(1);
    desired.grants.insert(hash(1), Some((1, caller(1, 1))));
    settle(&mut subscriber, &mut publisher, &desired);
    desired.grants.insert(hash(1), Some((2, Arc::clone(&caller(1, 1)))));
    let mut response = publisher.plan(Some(&desired), NOW).remove(0);
    let Some(upsert::Resource::Grant(grant)) = &mut response.upserts[0].resource else { panic!("a grant") };
    grant.scopes = vec!["secrets:teleport".into()];
    let applied = subscriber.handle(response, NOW);
    assert!(matches!(applied.changes[..], [scaivault_discovery::Change::GrantGone(gone)] if gone == hash(1)));
    let heard = publisher.on_request(applied.reply).unwrap();
    assert_eq!(heard.refusals.len(), 1);
    assert!(publisher.plan(Some(&desired), NOW).is_empty());
}
