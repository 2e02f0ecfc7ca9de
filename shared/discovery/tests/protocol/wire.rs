use std::time::Duration;

use proptest::prelude::*;
use prost::Message as _;
use scaivault_discovery::wire::{
    absence_from_wire, absence_to_wire, copy_from_wire, copy_to_wire, freshness_from_wire, freshness_to_wire,
    grant_from_wire, grant_to_wire, held_from_wire, held_to_wire, lease_from_wire, lease_to_wire,
    refusal_from_wire, refusal_to_wire, view_chunks, view_from_chunks,
};
use scaivault_discovery::{LeasePush, LeaseRefusal, MAX_MESSAGE_BYTES, SecretCopy};
use scaivault_domain::backend::{
    AwsRegion, AwsTarget, AzureTarget, Endpoint, GcpTarget, ProjectId, Target, Tls,
};
use scaivault_domain::budget::{Share, Slice};
use scaivault_domain::error::Reason;
use scaivault_domain::lease::Material;
use scaivault_domain::mapping::{GivenRule, Overrides, PathMapping};
use scaivault_domain::path::SecretPath;
use scaivault_domain::replica::{Absence, Freshness, Stamp};
use scaivault_domain::secret::State;
use scaivault_domain::sync::{ConflictPolicy, Mode, SkipReason, WritePolicy};
use scaivault_domain::view::TenantView;
use secrecy::ExposeSecret as _;

use crate::fixtures::{
    NOW, backend, caller, hash, key, large_view, lease, overlapping_view, prefetched_view, tenant, view,
};
use crate::shelf::{owning, replica, secret};

fn exposed(material: &Material) -> Vec<String> {
    match material {
        Material::VaultToken(token) => vec!["vault".into(), token.expose_secret().into()],
        Material::AwsKeys { access_key_id, secret_access_key, session_token } => {
            let session = session_token.as_ref().map(|token| token.expose_secret().to_owned());
            let keys = [access_key_id.clone(), secret_access_key.expose_secret().to_owned()];
            keys.into_iter().chain(session).collect()
        }
        Material::Bearer(token) => vec!["bearer".into(), token.expose_secret().into()],
    }
}

#[test]
fn every_kind_of_store_arrives_as_it_was_sent() {
    let endpoint = |text: &str| Endpoint::parse("endpoint", text).unwrap();
    let tls = || Tls { ca_cert: Some("pem".into()), verify: false };
    let location = Some("europe-west3".to_owned());
    for (target, template, separator) in [
        (
            Target::AwsSecretsManager(AwsTarget {
                region: AwsRegion::parse("region", "eu-central-1").unwrap(),
                endpoint: Some(endpoint("https://aws.internal")),
                tls: tls(),
            }),
            "prod/**",
            "",
        ),
        (
            Target::AzureKeyVault(AzureTarget { vault: endpoint("https://a.vault.azure.net"), tls: tls() }),
            "app/**",
            "--",
        ),
        (
            Target::GoogleSecretManager(GcpTarget {
                project: ProjectId::parse("acme").unwrap(),
                location,
                endpoint: None,
                tls: Tls::default(),
            }),
            "app/**",
            "__",
        ),
    ] {
        let mut view = (*view(1, 7)).clone();
        let rule = GivenRule { pattern: "external/x/**", template, separator, ..GivenRule::default() };
        view.backends.truncate(1);
        view.backends[0].target = target;
        view.backends[0].mapping = PathMapping::parse_rules([rule]).unwrap();
        assert_eq!(view_from_chunks(view_chunks(&view)), Ok(view));
    }
}

#[test]
fn everything_arrives_as_it_was_sent() {
    for view in [view(1, 7), large_view(1, 7, 5)] {
        assert_eq!(view_from_chunks(view_chunks(&view)), Ok((*view).clone()));
    }
    let grant = grant_from_wire(grant_to_wire(&hash(1), 9, &caller(1, 2)));
    assert_eq!(grant, Ok((hash(1), 9, caller(1, 2))));
    let slice = Slice { budget: "b1".into(), share: Share::among(3) };
    let sent = LeasePush { slice: Some(slice), ..lease(3, "lease-1") };
    let arrived = lease_from_wire(lease_to_wire(&sent)).unwrap();
    assert_eq!((&arrived.slice, arrived.login_generation), (&sent.slice, sent.login_generation));
    assert_eq!((&arrived.key, &arrived.id, arrived.remaining), (&sent.key, &sent.id, sent.remaining));
    assert_eq!(exposed(&arrived.material), exposed(&sent.material));
    let keys = |session_token: Option<&str>| Material::AwsKeys {
        access_key_id: "AKIA".into(),
        secret_access_key: "secret/+key".into(),
        session_token: session_token.map(Into::into),
    };
    for material in [keys(None), keys(Some("session")), Material::Bearer("bearer".into())] {
        let sent = LeasePush { material, ..sent.clone() };
        let arrived = lease_from_wire(lease_to_wire(&sent)).unwrap();
        assert_eq!(exposed(&arrived.material), exposed(&sent.material));
    }
    for reason in [None, Some(Reason::BackendLoginFailed)] {
        let refusal =
            LeaseRefusal { reason, message: "no".into(), retry_after: Some(Duration::from_secs(3)) };
        assert_eq!(refusal_from_wire(refusal_to_wire(&key(3), &refusal)), Ok((key(3), refusal)));
    }
}

#[test]
fn sync_settings_and_what_rules_say_differently_arrive() {
    let mut view = (*prefetched_view(1, 3)).clone();
    view.backends[0].sync.max_staleness = Some(Duration::from_secs(90));
    view.backends[0].sync.history_depth = 3;
    let overrides = Overrides { sync_interval: Some(Duration::from_millis(1500)), ..Overrides::default() };
    let proxied = Overrides { mode: Some(Mode::Proxy), ..Overrides::default() };
    let policies = Overrides {
        write_policy: Some(WritePolicy::Disabled),
        conflict_policy: Some(ConflictPolicy::BackendWins),
        ..Overrides::default()
    };
    let rules = [
        ("external/a/x/**", "kv/x/**", overrides),
        ("external/a/y/**", "kv/y/**", proxied),
        ("external/a/**", "kv/**", policies),
    ]
    .map(|(pattern, template, overrides)| GivenRule { pattern, template, separator: "", overrides });
    view.backends[0].mapping = PathMapping::parse_rules(rules).unwrap();
    assert_eq!(view_from_chunks(view_chunks(&view)), Ok(view));
}

#[test]
fn copies_arrive_as_they_were_sent() {
    for state in [State::Active, State::Deleted] {
        let stamp = Stamp { revision: 7, tag: u64::MAX };
        let sent =
            SecretCopy { key: secret(1, 1), stamp, replica: replica(b"\xff\0", state), prefetched: true };
        let arrived = copy_from_wire(copy_to_wire(&sent, NOW), NOW).unwrap();
        assert_eq!((&arrived.key, arrived.stamp, arrived.prefetched), (&sent.key, stamp, true));
        assert_eq!(format!("{:?}", arrived.replica), format!("{:?}", sent.replica));
        let value = |copy: &SecretCopy| copy.replica.value.as_ref().map(|value| value.expose().to_vec());
        assert_eq!(value(&arrived), value(&sent));
    }
    for absence in [Absence::NotFound, Absence::Proxy, Absence::NotSynced(SkipReason::TooLarge)] {
        let sent = absence_to_wire(&secret(1, 1), absence);
        assert_eq!(absence_from_wire(&sent), Ok((secret(1, 1), absence)));
    }
    let mut held = Vec::new();
    let stamps =
        [1, 2].map(|number| (secret(1, number).hash(), Stamp { revision: 3, tag: u64::from(number) }));
    stamps.iter().for_each(|(hash, stamp)| held_to_wire(&mut held, *hash, *stamp));
    assert!(held_from_wire(&held).unwrap().eq(stamps));
    assert!(held_from_wire(&held[1..]).is_err());
}

#[test]
fn a_freshness_too_large_to_send_makes_no_copy_younger() {
    let freshness = Freshness {
        backend: owning(1).backend,
        rules: vec![("external/a/**".into(), NOW)],
        exceptions: (0..100_000)
            .map(|number| (SecretPath::check(&format!("external/a/{number}")).unwrap(), NOW))
            .collect(),
    };
    let sent = freshness_to_wire(&tenant(1), &freshness, NOW);
    assert!(sent.encoded_len() < MAX_MESSAGE_BYTES);
    let (_, arrived) = freshness_from_wire(sent, NOW).unwrap();
    assert_eq!(arrived, Freshness { rules: Vec::new(), exceptions: Default::default(), ..freshness });
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
