//! Secret values, kinds, states and versions.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::sync::Arc;

use serde::de::{DeserializeSeed, Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::error::{Error, Reason};

/// Largest value in ScaiVault's own store, in bytes.
pub const MAX_VALUE_BYTES: usize = 1024 * 1024;

/// The bytes of a secret. Wiped when the last holder lets go; prints as `[redacted]`; cannot be serialised.
#[derive(Clone)]
pub struct SecretValue(Arc<Zeroizing<Vec<u8>>>);

impl SecretValue {
    /// Takes the bytes.
    pub fn new(bytes: Vec<u8>) -> Self {
        SecretValue(Arc::new(Zeroizing::new(bytes)))
    }

    /// The bytes. Every call is a place where a secret could leak, so the name is easy to search for.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }

    /// Size in bytes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether the value is the empty string, which is a value like any other.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Debug for SecretValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

/// What the bytes of a value are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// One JSON object in UTF-8 without duplicate keys.
    Json,
    /// Any other UTF-8.
    Text,
    /// Any bytes.
    Binary,
}

impl Kind {
    /// What a store that knows only text has: `Json` if it is an object without duplicate keys, else `Text`.
    pub fn of_text(text: &[u8]) -> Kind {
        if is_plain_object(text) { Kind::Json } else { Kind::Text }
    }

    /// The name in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Json => "json",
            Kind::Text => "text",
            Kind::Binary => "binary",
        }
    }

    /// Checks that `value` is of this kind and within the limit of our own store.
    ///
    /// # Errors
    /// `invalid_request` or `too_large`, naming `data`.
    pub fn check(self, value: &[u8]) -> Result<(), Error> {
        if value.len() > MAX_VALUE_BYTES {
            return Err(Error::field(Reason::TooLarge, "/data", "a value has at most 1 MiB"));
        }
        match self {
            Kind::Json if !is_plain_object(value) => {
                Err(Error::invalid("/data", "of type `json` is one JSON object without duplicate keys"))
            }
            Kind::Text if std::str::from_utf8(value).is_err() => {
                Err(Error::invalid("/data", "of type `text` is UTF-8; use type `binary`"))
            }
            _ => Ok(()),
        }
    }
}

/// Whether the state of a secret's version lets it have a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// The only state with a value.
    Active,
    /// Switched off in its store.
    Disabled,
    /// Deleted, and can be brought back.
    Deleted,
    /// Deleted for good.
    Destroyed,
    /// Past its expiry.
    Expired,
}

impl State {
    /// Every state.
    pub const ALL: &'static [State] =
        &[State::Active, State::Disabled, State::Deleted, State::Destroyed, State::Expired];

    /// The name in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            State::Active => "active",
            State::Disabled => "disabled",
            State::Deleted => "deleted",
            State::Destroyed => "destroyed",
            State::Expired => "expired",
        }
    }
}

/// Our version number of a secret; the first is 1. Only the store assigns it.
pub type Version = u64;

/// Where an answer came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// Read from the backend for this request.
    Proxy,
    /// ScaiVault's copy of a backend's secret.
    Sync,
    /// ScaiVault's own secret.
    Local,
}

impl Source {
    /// The name in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Source::Proxy => "proxy",
            Source::Sync => "sync",
            Source::Local => "local",
        }
    }
}

/// Custom metadata of a secret.
pub type Metadata = BTreeMap<String, String>;

/// Most keys of custom metadata.
const MAX_METADATA: usize = 64;

/// Checks the limits of custom metadata: 64 keys of 128 bytes with values of 512 bytes, as Vault has them.
///
/// # Errors
/// `invalid_request`, naming `metadata`.
pub fn check_metadata(metadata: &Metadata) -> Result<(), Error> {
    if metadata.len() > MAX_METADATA {
        return Err(Error::invalid("/metadata", "has at most 64 keys"));
    }
    for (key, value) in metadata {
        if key.is_empty() || key.len() > 128 || key.chars().any(char::is_control) {
            return Err(Error::invalid("/metadata", "keys have 1 to 128 bytes and no control characters"));
        }
        if value.len() > 512 {
            return Err(Error::invalid("/metadata", "values have at most 512 bytes"));
        }
    }
    Ok(())
}

/// The part of a store's metadata that we can keep.
pub fn keep_within_limits(metadata: Metadata) -> Metadata {
    let kept = |key: &String, value: &String| {
        check_metadata(&Metadata::from([(key.clone(), value.clone())])).is_ok()
    };
    metadata.into_iter().filter(|(key, value)| kept(key, value)).take(MAX_METADATA).collect()
}

/// Whether `bytes` are one JSON object with no key twice in any object of it.
fn is_plain_object(bytes: &[u8]) -> bool {
    struct Unique {
        object_only: bool,
    }

    impl<'de> DeserializeSeed<'de> for Unique {
        type Value = ();

        fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
            deserializer.deserialize_any(self)
        }
    }

    impl<'de> Visitor<'de> for Unique {
        type Value = ();

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("JSON")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
            let mut keys = HashSet::new();
            while let Some(key) = map.next_key::<String>()? {
                if !keys.insert(key) {
                    return Err(A::Error::custom("duplicate key"));
                }
                map.next_value_seed(Unique { object_only: false })?;
            }
            Ok(())
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
            if self.object_only {
                return Err(A::Error::custom("no object"));
            }
            while seq.next_element_seed(Unique { object_only: false })?.is_some() {}
            Ok(())
        }

        fn visit_bool<E: serde::de::Error>(self, _: bool) -> Result<(), E> {
            self.scalar()
        }
        fn visit_i64<E: serde::de::Error>(self, _: i64) -> Result<(), E> {
            self.scalar()
        }
        fn visit_u64<E: serde::de::Error>(self, _: u64) -> Result<(), E> {
            self.scalar()
        }
        fn visit_f64<E: serde::de::Error>(self, _: f64) -> Result<(), E> {
            self.scalar()
        }
        fn visit_str<E: serde::de::Error>(self, _: &str) -> Result<(), E> {
            self.scalar()
        }
        fn visit_unit<E: serde::de::Error>(self) -> Result<(), E> {
            self.scalar()
        }
    }

    impl Unique {
        fn scalar<E: serde::de::Error>(&self) -> Result<(), E> {
            if self.object_only { Err(E::custom("no object")) } else { Ok(()) }
        }
    }

    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    Unique { object_only: true }.deserialize(&mut deserializer).is_ok() && deserializer.end().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_never_prints() {
        let value = SecretValue::new(b"hunter2".to_vec());
        assert_eq!(format!("{value:?}"), "[redacted]");
    }

    #[test]
    fn json_is_an_object_without_duplicate_keys() {
        for text in [
            r#"{}"#,
            r#"{"a":123456789012345678901234567890,"b":[{"c":1},{"c":2}]}"#,
            r#" {"b":1,"a":null} "#,
        ] {
            assert_eq!(Kind::of_text(text.as_bytes()), Kind::Json, "{text}");
        }
        for text in
            ["", "1", "[]", r#""a""#, r#"{"a":1,"a":2}"#, r#"{"x":[{"a":1,"a":2}]}"#, r#"{"a":1} x"#, "{a:1}"]
        {
            assert_eq!(Kind::of_text(text.as_bytes()), Kind::Text, "{text}");
        }
    }

    #[test]
    fn deep_nesting_is_text_and_not_a_crash() {
        let deep = format!("{}1{}", r#"{"a":"#.repeat(100_000), "}".repeat(100_000));
        assert_eq!(Kind::of_text(deep.as_bytes()), Kind::Text);
    }
}
