use proptest::prelude::*;
use prost::Message as _;
use scaivault_discovery::wire::{absence_to_wire, copy_to_wire, grant_to_wire, lease_to_wire, view_chunks};
use scaivault_discovery::{self as discovery, Change, Demand, Subscriber};
use scaivault_domain::replica::{Absence, Stamp};
use scaivault_domain::secret::State;
use scaivault_proto::discovery::v1::delta_request::Message;
use scaivault_proto::discovery::v1::{
    CallBudget, DeltaResponse, Freshness, Grant, Lease, PathFreshness, Removal, RuleFreshness, SecretAbsence,
    SecretCopy, SyncSettings, TenantViewChunk, Upsert, ViewRule, backend_view, lease as lease_message,
    removal, upsert,
};

use crate::fixtures::{NOW, caller, hash, key, lease, tenant, view};
use crate::shelf::{replica, secret};

fn response(nonce: u64, resources: impl IntoIterator<Item = upsert::Resource>) -> DeltaResponse {
    let upserts = resources.into_iter().map(|resource| Upsert { resource: Some(resource) }).collect();
    DeltaResponse {
        nonce,
        epoch: "e1".into(),
        revision: nonce + 10,
        upserts,
        subscribes: 9,
        ..Default::default()
    }
}

fn chunk(generation: u64) -> TenantViewChunk {
    view_chunks(&view(1, generation)).remove(0)
}

fn absence() -> SecretAbsence {
    absence_to_wire(&secret(1, 2), Absence::NotFound)
}

/// Holds generation 5 and revision 11, and demands a grant and a lease.
fn subscriber() -> Subscriber {
    let mut subscriber = Subscriber::new();
    subscriber.demand([Demand::Grant(hash(1)), Demand::Lease { key: key(1), refused_id: None }]);
    assert_eq!(subscriber.handle(response(1, [upsert::Resource::View(chunk(5))]), NOW).changes.len(), 1);
    subscriber
}

const NO_NAMES: [&str; 9] = ["", "-a", "a-", "A", "a b", "a/b", "ä", "a\0", "..."];
const NO_PATTERNS: [&str; 9] = ["", "/a", "a/", "a//b", "a/../b", "a/**/b/**", "a*", "ä", "a b"];

fn bad_chunks() -> Vec<TenantViewChunk> {
    let mut bad = Vec::new();
    let mut with = |change: &dyn Fn(&mut TenantViewChunk)| {
        let mut chunk = chunk(6);
        change(&mut chunk);
        bad.push(chunk);
    };
    let long = "a".repeat(64);
    for name in NO_NAMES.iter().copied().chain([long.as_str()]) {
        with(&|chunk| chunk.tenant = name.into());
        for backend in 0..2 {
            with(&|chunk| chunk.backends[backend].id = format!("fed_{name}"));
            with(&|chunk| chunk.backends[backend].name = name.into());
            with(&|chunk| chunk.backends[backend].mode = name.into());
        }
    }
    for generation in 0..5 {
        with(&|chunk| chunk.generation = generation);
    }
    for (number, chunks) in [(0, 0), (0, 2000), (1, 1), (1, 2), (7, 3), (u32::MAX, u32::MAX)] {
        with(&|chunk| (chunk.chunk, chunk.chunks) = (number, chunks));
    }
    for backend in 0..2 {
        for rule in 0..2 {
            for text in NO_PATTERNS {
                with(&|chunk| chunk.backends[backend].rules[rule].pattern = text.into());
            }
            for text in ["", "a//b", "a/**/**", "a*", "kv/*", "kv/*/**"] {
                with(&|chunk| chunk.backends[backend].rules[rule].template = text.into());
            }
        }
        with(&|chunk| chunk.backends[backend].rules.clear());
        with(&|chunk| {
            let rule = chunk.backends[backend].rules[0].clone();
            chunk.backends[backend].rules.push(rule);
        });
        with(&|chunk| {
            let rules = &mut chunk.backends[backend].rules;
            rules.extend((0..64).map(|number| ViewRule {
                pattern: format!("x/{number}"),
                template: "x".into(),
                ..ViewRule::default()
            }));
        });
        with(&|chunk| chunk.backends[backend].target = None);
        with(&|chunk| chunk.backends[backend].mode = "sync".into());
        with(&|chunk| chunk.backends[backend].sync = None);
        let mut sync = |change: &dyn Fn(&mut SyncSettings)| {
            with(&|chunk| change(chunk.backends[backend].sync.as_mut().unwrap()));
        };
        for name in ["", "enabled", "write_through"] {
            sync(&|sync| sync.write_policy = name.into());
        }
        for name in ["", "newest_wins", "manual"] {
            sync(&|sync| sync.conflict_policy = name.into());
        }
        for seconds in [-1, 24 * 3600 + 1] {
            sync(&|sync| sync.interval = Some(prost_types::Duration { seconds, nanos: 0 }));
        }
        sync(&|sync| sync.max_staleness = Some(prost_types::Duration::default()));
        sync(&|sync| sync.history_depth = 0);
        for rule in 0..2 {
            let mut rule = |change: &dyn Fn(&mut ViewRule)| {
                with(&|chunk| change(&mut chunk.backends[backend].rules[rule]));
            };
            // Synced, and nobody says how often.
            rule(&|rule| rule.mode = "sync".into());
            rule(&|rule| rule.mode = "copy".into());
            rule(&|rule| rule.write_policy = "local_only".into());
            rule(&|rule| rule.conflict_policy = "none".into());
            rule(&|rule| rule.sync_interval = Some(prost_types::Duration { seconds: -1, nanos: 0 }));
        }
        with(&|chunk| chunk.backends[backend].timeout = None);
        for (seconds, nanos) in [(-1, 0), (0, -1), (0, 0), (61, 0), (1, 1_000_000_000), (i64::MAX, 0)] {
            let timeout = prost_types::Duration { seconds, nanos };
            with(&|chunk| chunk.backends[backend].timeout = Some(timeout));
        }
        let mut vault = |change: &dyn Fn(&mut scaivault_proto::discovery::v1::VaultTarget)| {
            with(&|chunk| match chunk.backends[backend].target.as_mut().unwrap() {
                backend_view::Target::HashicorpVault(vault) => change(vault),
                _ => panic!("the fixtures have Vaults"),
            });
        };
        for endpoint in ["", "vault", "ftp://a", "https://u:p@a", "https://a?x=1", "https://a#x", "https://"]
        {
            vault(&|vault| vault.endpoint = endpoint.into());
        }
        for (mount, version) in [("kv", 0), ("kv", 3), ("", 1), ("", 2), ("/kv", 1), ("kv/", 2), ("/", 1)] {
            vault(&|vault| (vault.kv_mount, vault.kv_version) = (mount.into(), version));
        }
        for namespace in ["a\n", "\0", "a\r\nX-Vault-Token: b"] {
            vault(&|vault| vault.namespace = namespace.into());
        }
    }
    with(&|chunk| chunk.backends[1].id = chunk.backends[0].id.clone());
    with(&|chunk| chunk.backends[1].rules = chunk.backends[0].rules.clone());
    with(&|chunk| chunk.backends[1].rules[0].pattern = "external/a/x".into());
    with(&|chunk| chunk.backends[1].rules[1].pattern = "external/*/**".into());
    bad
}

fn bad_grants() -> Vec<Grant> {
    let mut bad = Vec::new();
    let mut with = |change: &dyn Fn(&mut Grant)| {
        let mut grant = grant_to_wire(&hash(1), 1, &caller(1, 1));
        change(&mut grant);
        bad.push(grant);
    };
    for length in [0, 1, 16, 31, 33, 64] {
        with(&|grant| grant.token_hash = vec![1; length]);
    }
    for name in NO_NAMES {
        with(&|grant| grant.tenant = name.into());
        with(&|grant| grant.scopes.push(name.into()));
        with(&|grant| grant.rules[0].capabilities.push(name.into()));
    }
    for scope in ["secrets", "secrets:*", "Admin", "root"] {
        with(&|grant| grant.scopes[0] = scope.into());
    }
    for rule in 0..2 {
        for pattern in NO_PATTERNS {
            with(&|grant| grant.rules[rule].path = pattern.into());
        }
    }
    with(&|grant| grant.subject.clear());
    with(&|grant| grant.accessor.clear());
    for (seconds, nanos) in [(0, -1), (0, 1_000_000_000), (i64::MAX, 0), (i64::MIN, 0)] {
        let time = prost_types::Timestamp { seconds, nanos };
        with(&|grant| grant.expire_time = Some(time));
    }
    bad
}

fn bad_leases() -> Vec<Lease> {
    let mut bad = Vec::new();
    let mut with = |change: &dyn Fn(&mut Lease)| {
        let mut lease = lease_to_wire(&lease(1, "l1"));
        change(&mut lease);
        bad.push(lease);
    };
    with(&|lease| lease.key = None);
    with(&|lease| lease.id.clear());
    with(&|lease| lease.material = None);
    for (name, share) in [("", 0.5), ("b1", 0.0), ("b1", 1.5), ("b1", f64::NAN)] {
        with(&|lease| lease.call_budget = Some(CallBudget { name: name.into(), share }));
    }
    for token in ["", "a b", "a\n", "ä", "a\r\nX-Vault-Namespace: b"] {
        with(&|lease| lease.material = Some(lease_message::Material::VaultToken(token.into())));
    }
    for name in NO_NAMES {
        with(&|lease| lease.key.as_mut().unwrap().tenant = name.into());
        with(&|lease| lease.key.as_mut().unwrap().backend = name.into());
    }
    for (seconds, nanos) in [(-1, 0), (0, -1), (0, 1_000_000_000)] {
        let remaining = prost_types::Duration { seconds, nanos };
        with(&|lease| lease.remaining = Some(remaining));
    }
    bad
}

fn secret_copy() -> SecretCopy {
    let stamp = Stamp { revision: 1, tag: 1 };
    let replica = replica(b"v", State::Active);
    copy_to_wire(&discovery::SecretCopy { key: secret(1, 1), stamp, replica, prefetched: true }, NOW)
}

fn bad_copies() -> Vec<SecretCopy> {
    let mut bad = Vec::new();
    let mut with = |change: &dyn Fn(&mut SecretCopy)| {
        let mut copy = secret_copy();
        change(&mut copy);
        bad.push(copy);
    };
    with(&|copy| copy.name = None);
    for name in NO_NAMES {
        with(&|copy| copy.name.as_mut().unwrap().tenant = name.into());
    }
    for path in ["", "/a", "a/", "a//b", "a/../b", "a b", "ä", "a\0"] {
        with(&|copy| copy.name.as_mut().unwrap().path = path.into());
    }
    for text in ["", "xml", "Active", "JSON"] {
        with(&|copy| copy.kind = text.into());
        with(&|copy| copy.state = text.into());
    }
    with(&|copy| copy.revision = 0);
    with(&|copy| copy.version = 0);
    with(&|copy| copy.value = None);
    with(&|copy| copy.state = "deleted".into());
    with(&|copy| (copy.kind, copy.value) = ("json".into(), Some(b"[]".to_vec())));
    with(&|copy| (copy.kind, copy.value) = ("text".into(), Some(vec![0xff])));
    with(&|copy| copy.value = Some(vec![0; 1024 * 1024 + 1]));
    with(&|copy| copy.content_type = "text/plain\r\nX: y".into());
    with(&|copy| copy.remote_version = "1\n".into());
    with(&|copy| copy.backend = "fed_1".into());
    with(&|copy| copy.age = None);
    with(&|copy| copy.age.as_mut().unwrap().seconds = -1);
    with(&|copy| copy.create_time.as_mut().unwrap().nanos = -1);
    bad
}

fn bad_freshness() -> Vec<Freshness> {
    let age = Some(prost_types::Duration { seconds: 1, nanos: 0 });
    let key = Some(scaivault_discovery::wire::key_to_wire(&key(1)));
    let rule = |pattern: &str, age| Freshness {
        key: key.clone(),
        rules: vec![RuleFreshness { pattern: pattern.into(), age }],
        ..Freshness::default()
    };
    let exception = |path: &str, age| Freshness {
        key: key.clone(),
        exceptions: vec![PathFreshness { path: path.into(), age }],
        ..Freshness::default()
    };
    vec![
        Freshness::default(),
        rule("a//b", age),
        rule("a", None),
        exception("a//b", age),
        exception("a", None),
    ]
}

fn bad_responses() -> Vec<DeltaResponse> {
    let views = bad_chunks().into_iter().map(upsert::Resource::View);
    let grants = bad_grants().into_iter().map(upsert::Resource::Grant);
    let leases = bad_leases().into_iter().map(upsert::Resource::Lease);
    let copies = bad_copies().into_iter().map(upsert::Resource::Secret);
    let freshness = bad_freshness().into_iter().map(upsert::Resource::Freshness);
    let complete = [upsert::Resource::PrefetchComplete(Default::default())];
    let secrets = copies.chain(freshness).chain(complete);
    let mut bad: Vec<_> =
        views.chain(grants).chain(leases).chain(secrets).map(|resource| response(2, [resource])).collect();
    let whole = || {
        let grant = grant_to_wire(&hash(1), 1, &caller(1, 1));
        let lease = lease_to_wire(&lease(1, "l1"));
        let upserts = [
            upsert::Resource::View(chunk(6)),
            upsert::Resource::Grant(grant),
            upsert::Resource::Lease(lease),
        ];
        response(2, upserts)
    };
    bad.extend([0, 1].map(|nonce| DeltaResponse { nonce, ..whole() }));
    bad.extend((1..11).map(|revision| DeltaResponse { revision, ..whole() }));
    bad.extend([String::new(), "e".repeat(129)].map(|epoch| DeltaResponse { epoch, ..whole() }));
    let removals = [
        None,
        Some(removal::Resource::Tenant("-".into())),
        Some(removal::Resource::TokenHash(vec![1; 31])),
        Some(removal::Resource::Lease(Default::default())),
        Some(removal::Resource::SecretHash(vec![1; 15])),
        Some(removal::Resource::Secret(SecretAbsence { absence: "not_found".into(), ..Default::default() })),
        Some(removal::Resource::Secret(SecretAbsence { absence: "lost".into(), ..absence() })),
    ];
    for resource in removals {
        bad.push(DeltaResponse { removals: vec![Removal { resource }], ..response(2, []) });
    }
    bad.push(DeltaResponse { upserts: vec![Upsert { resource: None }], ..response(2, []) });
    bad
}

#[test]
fn malformed_and_old_responses_change_nothing() {
    let bad = bad_responses();
    assert!(bad.len() >= 300, "{}", bad.len());
    for malformed in bad {
        let mut subscriber = subscriber();
        let before = subscriber.resume();
        let shown = format!("{malformed:?}");
        let applied = subscriber.handle(malformed, NOW);
        assert!(applied.changes.is_empty(), "{shown}");
        let Some(Message::Nack(nack)) = applied.reply.message else { panic!("acknowledged: {shown}") };
        assert!(nack.refusals.iter().all(|refusal| !refusal.message.is_empty()));
        assert_eq!(subscriber.resume(), before, "{shown}");
        let applied = subscriber.handle(response(3, [upsert::Resource::View(chunk(7))]), NOW);
        assert!(matches!(&applied.changes[..], [Change::View(view)] if view.generation == 7), "{shown}");
    }
}

#[test]
fn a_bad_view_does_not_hold_up_the_rest_of_its_response() {
    let mut subscriber = subscriber();
    let mut bad = chunk(6);
    bad.backends[0].mode = "sync".into();
    let good = view_chunks(&view(2, 1)).remove(0);
    let lease = lease_to_wire(&lease(1, "l1"));
    let resources =
        [upsert::Resource::View(bad), upsert::Resource::View(good), upsert::Resource::Lease(lease)];
    let applied = subscriber.handle(response(2, resources), NOW);
    assert!(
        matches!(&applied.changes[..], [Change::View(view), Change::Lease(_)] if view.tenant == tenant(2))
    );
    let Some(Message::Nack(nack)) = applied.reply.message else { panic!("acknowledged") };
    assert_eq!((nack.refusals.len(), nack.refusals[0].generation), (1, 6));
    assert_eq!(nack.refusals[0].tenant, tenant(1).as_str());
}

proptest! {
    #[test]
    fn no_bytes_crash_the_node(at in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let grant = grant_to_wire(&hash(1), 1, &caller(1, 1));
        let lease = lease_to_wire(&lease(1, "l1"));
        let resources =
            [
                upsert::Resource::View(chunk(6)),
                upsert::Resource::Grant(grant),
                upsert::Resource::Lease(lease),
                upsert::Resource::Secret(secret_copy()),
            ];
        let mut bytes = response(2, resources).encode_to_vec();
        for (index, byte) in at {
            let index = index.index(bytes.len());
            bytes[index] = byte;
        }
        if let Ok(response) = DeltaResponse::decode(&*bytes) {
            subscriber().handle(response, NOW);
        }
    }
}
