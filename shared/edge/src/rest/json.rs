//! Backends in the JSON of REST, for clients that send and show it.

use scaivault_domain::Error;
use scaivault_proto::federation::v1 as proto;
use serde::{Serialize, Serializer};
use serde_json::value::{RawValue, to_raw_value};

use super::dto::backend::{self, Backend, Patchable};
use super::dto::mapping::Members;
use super::merge::merged;

pub use super::dto::backend::Consent;
pub use super::dto::test::{BackendCheck, BackendTest};

/// A backend as REST answers it.
pub struct BackendJson(Backend);

impl std::fmt::Debug for BackendJson {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("BackendJson")
    }
}

impl BackendJson {
    /// The backend as the service gave it.
    ///
    /// # Errors
    /// If the service is of a later version.
    pub fn of(backend: proto::Backend) -> Result<Self, Error> {
        Backend::from_wire(backend).map(BackendJson)
    }
}

impl Serialize for BackendJson {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

/// Parses a configuration.
///
/// # Errors
/// Names the field by its pointer.
pub fn parse_backend(text: &[u8]) -> Result<(proto::Backend, Consent), Error> {
    backend::parse(text)
}

/// What only means something beside another member of `config`, and goes with it.
const DEPENDENTS: &[(&str, &[&str])] = &[
    ("role_arn", &["external_id", "session_duration"]),
    // With an identity of ours the external id is ours to make.
    ("credentials_path", &["external_id", "allow_static_on_nodes"]),
    ("kv_mount", &["kv_version"]),
];

/// The configuration with a merge patch (RFC 7396) in it; what the patch does not name stays as it is.
///
/// Another `type` is another store: nothing of the old one's `config`, nor its default of `history_depth`, is taken over.
///
/// # Errors
/// Names the field by its pointer.
pub fn patch_backend(before: proto::Backend, patch: &RawValue) -> Result<(proto::Backend, Consent), Error> {
    let before = to_raw_value(&Patchable::from_wire(before)?).expect("DTOs have string keys");
    let mut members = Members::of(&before).expect("a DTO is an object");
    let changes = Members::of(patch).unwrap_or_default();
    let text = |members: &Members| serde_json::from_str::<String>(members.get("type")?.get()).ok();
    if text(&changes).is_some_and(|kind| text(&members).is_some_and(|before| before != kind)) {
        members.0.retain(|(name, _)| !matches!(name.as_str(), "config" | "history_depth"));
    } else if let (Some(config), Some(changes)) =
        (members.get("config").and_then(Members::of), changes.get("config").and_then(Members::of))
    {
        let config = to_raw_value(&without_orphans(config, &changes)).expect("members have string keys");
        members
            .0
            .iter_mut()
            .filter(|(name, _)| name == "config")
            .for_each(|(_, value)| *value = config.clone());
    }
    let before = to_raw_value(&members).expect("members have string keys");
    backend::parse(merged(&before, patch).get().as_bytes())
}

/// `config` without what depends on members that `changes` removes.
fn without_orphans(mut config: Members, changes: &Members) -> Members {
    for (name, dependents) in DEPENDENTS {
        if changes.get(name).is_some_and(|value| value.get() == "null") {
            config.0.retain(|(name, _)| !dependents.contains(&name.as_str()));
        }
    }
    config
}
