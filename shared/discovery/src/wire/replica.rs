//! Secrets on the wire: copies, absences, freshness, and what a node says it holds.
//!
//! Clocks differ, so what counts is how long ago something was, and each side makes a time of it by its own clock.

use std::sync::Arc;
use std::time::Duration;

use prost::Message as _;
use scaivault_domain::backend::BackendId;
use scaivault_domain::lease::LeaseKey;
use scaivault_domain::path::SecretPath;
use scaivault_domain::pattern::Pattern;
use scaivault_domain::replica::{Absence, Freshness, KeyHash, Replica, SecretKey, Stamp};
use scaivault_domain::secret::{Kind, SecretValue, State};
use scaivault_domain::sync::SkipReason;
use scaivault_domain::tenant::TenantId;
use scaivault_domain::time::Timestamp;
use scaivault_proto::discovery::v1 as pb;

use super::{
    Refused, duration_from_wire, duration_to_wire, key_from_wire, key_to_wire, timestamp_from_wire,
    timestamp_to_wire,
};

/// Largest freshness that is sent with its exceptions.
const MAX_FRESHNESS_BYTES: usize = 1024 * 1024;
const HASH_BYTES: usize = 16;

/// A copy on its way to a node.
#[derive(Clone, Debug)]
pub struct SecretCopy {
    /// Of which secret.
    pub key: SecretKey,
    /// Which state of it.
    pub stamp: Stamp,
    /// The copy.
    pub replica: Arc<Replica>,
    /// Whether the node is to hold it although nobody there may have asked for it.
    pub prefetched: bool,
}

/// The name of a secret.
pub fn name_to_wire(key: &SecretKey) -> pb::SecretName {
    pb::SecretName { tenant: key.tenant.to_string(), path: key.path.to_string() }
}

/// The name of a secret.
///
/// # Errors
/// If it is missing, or has no valid tenant or path.
pub fn name_from_wire(name: Option<&pb::SecretName>) -> Result<SecretKey, Refused> {
    let name = name.ok_or_else(|| Refused::new("a secret has no name"))?;
    Ok(SecretKey { tenant: TenantId::parse(&name.tenant)?, path: SecretPath::parse(&name.path)? })
}

/// A copy as it is pushed at `now`.
pub fn copy_to_wire(copy: &SecretCopy, now: Timestamp) -> pb::SecretCopy {
    let replica = &*copy.replica;
    pb::SecretCopy {
        name: Some(name_to_wire(&copy.key)),
        revision: copy.stamp.revision,
        tag: copy.stamp.tag,
        version: replica.version,
        kind: replica.kind.as_str().to_owned(),
        content_type: replica.content_type.clone(),
        metadata: replica.metadata.clone(),
        state: replica.state.as_str().to_owned(),
        value: replica.value.as_ref().map(|value| value.expose().to_vec()),
        backend: replica.backend.as_ref().map_or_else(String::new, BackendId::to_string),
        remote_version: replica.remote_version.clone(),
        create_time: replica.created.map(timestamp_to_wire),
        age: duration_to_wire(now.since(replica.verified)),
        prefetched: copy.prefetched,
    }
}

/// A copy that came at `now`.
///
/// # Errors
/// If a field cannot be read, or there is a value where there must be none or the other way round.
pub fn copy_from_wire(copy: pb::SecretCopy, now: Timestamp) -> Result<SecretCopy, Refused> {
    let key = name_from_wire(copy.name.as_ref())?;
    let fault = |fault: &str| Refused::new(format!("the copy of {}: {fault}", key.path));
    if copy.revision == 0 || copy.version == 0 {
        return Err(fault("revisions and versions begin with 1"));
    }
    let kind = [Kind::Json, Kind::Text, Kind::Binary].into_iter().find(|kind| kind.as_str() == copy.kind);
    let kind = kind.ok_or_else(|| fault("its kind is not known here"))?;
    let state = State::ALL.iter().copied().find(|state| state.as_str() == copy.state);
    let state = state.ok_or_else(|| fault("its state is not known here"))?;
    if (state == State::Active) != copy.value.is_some() {
        return Err(fault("an active secret has a value, and no other has"));
    }
    if let Some(value) = &copy.value {
        kind.check(value).map_err(|error| fault(&error.message))?;
    }
    if copy.content_type.chars().chain(copy.remote_version.chars()).any(char::is_control) {
        return Err(fault("it has a control character where none can be"));
    }
    let backend = match copy.backend.as_str() {
        "" => None,
        id => Some(BackendId::parse(id).map_err(|_| fault("it is of no valid backend id"))?),
    };
    let replica = Replica {
        version: copy.version,
        kind,
        content_type: copy.content_type,
        metadata: copy.metadata,
        state,
        value: copy.value.map(SecretValue::new),
        backend,
        remote_version: copy.remote_version,
        created: timestamp_from_wire(copy.create_time, "time at which the version was made")?,
        verified: moment(copy.age, now)?,
    };
    let stamp = Stamp { revision: copy.revision, tag: copy.tag };
    Ok(SecretCopy { key, stamp, replica: Arc::new(replica), prefetched: copy.prefetched })
}

/// Why there is no copy, as it is pushed.
pub fn absence_to_wire(key: &SecretKey, absence: Absence) -> pb::SecretAbsence {
    let (absence, skip_reason) = match absence {
        Absence::NotFound => ("not_found", ""),
        Absence::Proxy => ("proxy", ""),
        Absence::NotSynced(reason) => ("not_synced", reason.as_str()),
    };
    let (absence, skip_reason) = (absence.to_owned(), skip_reason.to_owned());
    pb::SecretAbsence { name: Some(name_to_wire(key)), absence, skip_reason }
}

/// Why there is no copy. A reason of a later build reads as `transient`: there is no copy either way.
///
/// # Errors
/// If the secret has no valid name, or the absence is of a kind that is not known here.
pub fn absence_from_wire(absence: &pb::SecretAbsence) -> Result<(SecretKey, Absence), Refused> {
    let key = name_from_wire(absence.name.as_ref())?;
    let absence = match absence.absence.as_str() {
        "not_found" => Absence::NotFound,
        "proxy" => Absence::Proxy,
        "not_synced" => {
            let reason = SkipReason::from_name(&absence.skip_reason);
            Absence::NotSynced(reason.unwrap_or(SkipReason::Transient))
        }
        _ => return Err(Refused::new(format!("why {} is absent is not known here", key.path))),
    };
    Ok((key, absence))
}

/// A freshness as it is pushed at `now`. One with too many exceptions to send says nothing at all: then every copy
/// counts from its own time, which makes it no younger than it is.
pub fn freshness_to_wire(tenant: &TenantId, freshness: &Freshness, now: Timestamp) -> pb::Freshness {
    let key = LeaseKey { tenant: tenant.clone(), backend: freshness.backend.clone() };
    let age = |as_of: &Timestamp| duration_to_wire(now.since(*as_of));
    let rules = freshness.rules.iter();
    let exceptions = freshness.exceptions.iter();
    let whole = pb::Freshness {
        key: Some(key_to_wire(&key)),
        rules: rules.map(|(rule, at)| pb::RuleFreshness { pattern: rule.clone(), age: age(at) }).collect(),
        exceptions: exceptions
            .map(|(path, at)| pb::PathFreshness { path: path.to_string(), age: age(at) })
            .collect(),
    };
    if whole.encoded_len() > MAX_FRESHNESS_BYTES {
        return pb::Freshness { key: whole.key, ..pb::Freshness::default() };
    }
    whole
}

/// A freshness that came at `now`.
///
/// # Errors
/// If a field cannot be read.
pub fn freshness_from_wire(freshness: pb::Freshness, now: Timestamp) -> Result<LeaseFreshness, Refused> {
    let key = key_from_wire(freshness.key.as_ref())?;
    let rules = freshness.rules.into_iter().map(|rule| {
        Pattern::parse(&rule.pattern)
            .map_err(|fault| Refused::new(format!("the pattern of a rule {fault}")))?;
        Ok((rule.pattern, moment(rule.age, now)?))
    });
    let exceptions = freshness
        .exceptions
        .into_iter()
        .map(|path| Ok((SecretPath::parse(&path.path)?, moment(path.age, now)?)));
    let freshness = Freshness {
        backend: key.backend,
        rules: rules.collect::<Result<_, Refused>>()?,
        exceptions: exceptions.collect::<Result<_, Refused>>()?,
    };
    Ok((key.tenant, freshness))
}

/// Whose, and how fresh.
type LeaseFreshness = (TenantId, Freshness);

/// Adds a held copy to those that a `Resume` tells of.
pub fn held_to_wire(held: &mut Vec<u8>, hash: KeyHash, stamp: Stamp) {
    held.extend_from_slice(&hash.0);
    held.extend_from_slice(&stamp.revision.to_be_bytes());
    held.extend_from_slice(&stamp.tag.to_be_bytes());
}

/// The held copies that a `Resume` tells of.
///
/// # Errors
/// If something is cut off.
pub fn held_from_wire(held: &[u8]) -> Result<impl Iterator<Item = (KeyHash, Stamp)>, Refused> {
    let (held, rest) = held.as_chunks::<32>();
    if !rest.is_empty() {
        return Err(Refused::new("a held secret has 32 bytes"));
    }
    Ok(held.iter().map(|held| {
        let (hash, stamp) = held.split_first_chunk().expect("16 of 32 bytes");
        let (numbers, _) = stamp.as_chunks::<8>();
        let [revision, tag] = [numbers[0], numbers[1]].map(u64::from_be_bytes);
        (KeyHash(*hash), Stamp { revision, tag })
    }))
}

/// Hashes of keys, one behind the other.
///
/// # Errors
/// If something is cut off.
pub fn hashes_from_wire(hashes: &[u8]) -> Result<impl Iterator<Item = KeyHash>, Refused> {
    let (hashes, rest) = hashes.as_chunks::<HASH_BYTES>();
    if !rest.is_empty() {
        return Err(Refused::new("the hash of a key has 16 bytes"));
    }
    Ok(hashes.iter().copied().map(KeyHash))
}

/// The time that was `age` ago.
fn moment(age: Option<prost_types::Duration>, now: Timestamp) -> Result<Timestamp, Refused> {
    let age = duration_from_wire(age, "age")?.ok_or_else(|| Refused::new("something has no age"))?;
    Ok(before(now, age))
}

fn before(now: Timestamp, age: Duration) -> Timestamp {
    Timestamp::from_millis(now.as_millis().saturating_sub(i64::try_from(age.as_millis()).unwrap_or(i64::MAX)))
}
