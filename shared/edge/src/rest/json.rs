//! Backends in the JSON of REST, for clients that send and show it.

use scaivault_domain::Error;
use scaivault_proto::federation::v1 as proto;
use serde::{Serialize, Serializer};
use serde_json::value::{RawValue, to_raw_value};

use super::dto::backend::{self, Backend, Patchable};
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

/// The configuration with a merge patch (RFC 7396) in it; what the patch does not name stays as it is.
///
/// # Errors
/// Names the field by its pointer.
pub fn patch_backend(before: proto::Backend, patch: &RawValue) -> Result<(proto::Backend, Consent), Error> {
    let before = to_raw_value(&Patchable::from_wire(before)?).expect("DTOs have string keys");
    backend::parse(merged(&before, patch).get().as_bytes())
}
