use std::time::Duration;

use proptest::prelude::*;
use prost::Message as _;
use scaivault_discovery::wire::{
    grant_from_wire, grant_to_wire, lease_from_wire, lease_to_wire, refusal_from_wire, refusal_to_wire,
    view_chunks, view_from_chunks,
};
use scaivault_discovery::{LeaseRefusal, MAX_MESSAGE_BYTES};
use scaivault_domain::error::Reason;
use scaivault_domain::lease::Material;
use scaivault_domain::view::TenantView;
use secrecy::ExposeSecret as _;

use crate::fixtures::{backend, caller, hash, key, large_view, lease, overlapping_view, tenant, view};

#[test]
fn everything_arrives_as_it_was_sent() {
    for view in [view(1, 7), large_view(1, 7, 5)] {
        assert_eq!(view_from_chunks(view_chunks(&view)), Ok((*view).clone()));
    }
    let grant = grant_from_wire(grant_to_wire(&hash(1), 9, &caller(1, 2)));
    assert_eq!(grant, Ok((hash(1), 9, caller(1, 2))));
    let sent = lease(3, "lease-1");
    let arrived = lease_from_wire(lease_to_wire(&sent)).unwrap();
    assert_eq!((&arrived.key, &arrived.id, arrived.remaining), (&sent.key, &sent.id, sent.remaining));
    let (Material::VaultToken(arrived), Material::VaultToken(sent)) = (arrived.material, sent.material);
    assert_eq!(arrived.expose_secret(), sent.expose_secret());
    for reason in [None, Some(Reason::BackendLoginFailed)] {
        let refusal =
            LeaseRefusal { reason, message: "no".into(), retry_after: Some(Duration::from_secs(3)) };
        assert_eq!(refusal_from_wire(refusal_to_wire(&key(3), &refusal)), Ok((key(3), refusal)));
    }
}

#[test]
fn a_view_without_backends_is_a_view() {
    let empty = TenantView { tenant: tenant(1), generation: 3, backends: Vec::new() };
    assert_eq!(view_from_chunks(view_chunks(&empty)), Ok(empty));
}

#[test]
fn chunks_keep_the_limit() {
    let chunks = view_chunks(&large_view(1, 1, 20));
    assert!(chunks.len() >= 16);
    assert!(chunks.iter().all(|chunk| chunk.encoded_len() < MAX_MESSAGE_BYTES));
}

#[test]
fn overlapping_backends_are_refused_and_named() {
    let message = view_from_chunks(view_chunks(&overlapping_view(1, 1))).unwrap_err().to_string();
    assert!(message.contains("external/a/**") && message.contains("external/a/b/**"), "{message}");
    let mut twice = (*view(1, 1)).clone();
    twice.backends.push(backend(1, "c", 0));
    let message = view_from_chunks(view_chunks(&twice)).unwrap_err().to_string();
    assert!(message.contains("stands twice"), "{message}");
}

proptest! {
    #[test]
    fn overlaps_are_found_as_a_plain_search_finds_them(
        folders in proptest::collection::vec(proptest::collection::vec("[ab*]", 1..4), 2..5)
    ) {
        let backends: Vec<_> = (0..).zip(&folders).map(|(number, folder)| {
            let pattern = folder.join("/");
            let mut backend = backend(number, "x", 0);
            backend.mapping = scaivault_domain::mapping::PathMapping::parse([(&pattern, &pattern)]).unwrap();
            backend
        }).collect();
        let plain = backends.iter().enumerate().any(|(index, one)| {
            backends[..index].iter().any(|other| other.mapping.overlap(&one.mapping).is_some())
        });
        let view = TenantView { tenant: tenant(1), generation: 1, backends };
        prop_assert_eq!(view_from_chunks(view_chunks(&view)).is_err(), plain);
    }
}
