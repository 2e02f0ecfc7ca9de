//! Whether two values are the same, without keeping either.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use zeroize::Zeroizing;

use crate::secret::Kind;

/// A keyed digest of a value. Only good for comparing values of the same tenant under the same key.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Which key it was made with.
    pub key: u32,
    /// The digest, in hex.
    pub mac: String,
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A prefix tells two apart and cannot be tried against a list of guesses with any certainty.
        write!(f, "{}:{}…", self.key, self.mac.get(..8).unwrap_or_default())
    }
}

/// What is digested: JSON with keys sorted and numbers as they are written, else the bytes.
///
/// A store may write the same object in another order each time; that is no change.
pub fn canonical(kind: Kind, value: &[u8]) -> Zeroizing<Vec<u8>> {
    let mut out = Zeroizing::new(Vec::with_capacity(value.len() + 1));
    // The kind is a part of it: the text `{}` and the object are different secrets.
    out.push(match kind {
        Kind::Json => b'j',
        Kind::Text => b't',
        Kind::Binary => b'b',
    });
    let json = (kind == Kind::Json).then(|| serde_json::from_slice::<&RawValue>(value).ok()).flatten();
    match json {
        Some(raw) => write(raw, &mut out),
        None => out.extend_from_slice(value),
    }
    out
}

fn write(raw: &RawValue, out: &mut Vec<u8>) {
    let text = raw.get();
    match text.as_bytes().first() {
        Some(b'{') => {
            let members: BTreeMap<String, &RawValue> = serde_json::from_str(text).unwrap_or_default();
            out.push(b'{');
            for (index, (key, value)) in members.into_iter().enumerate() {
                if index > 0 {
                    out.push(b',');
                }
                string(&key, out);
                out.push(b':');
                write(value, out);
            }
            out.push(b'}');
        }
        Some(b'[') => {
            let items: Vec<&RawValue> = serde_json::from_str(text).unwrap_or_default();
            out.push(b'[');
            for (index, value) in items.into_iter().enumerate() {
                if index > 0 {
                    out.push(b',');
                }
                write(value, out);
            }
            out.push(b']');
        }
        // `"A"` and `"\u0041"` are the same string.
        Some(b'"') => string(&serde_json::from_str::<String>(text).unwrap_or_default(), out),
        _ => out.extend_from_slice(text.as_bytes()),
    }
}

fn string(text: &str, out: &mut Vec<u8>) {
    out.extend(serde_json::to_vec(text).expect("text is always JSON"));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(text: &str) -> Vec<u8> {
        canonical(Kind::Json, text.as_bytes()).to_vec()
    }

    #[test]
    fn the_order_of_keys_and_spaces_make_no_difference() {
        assert_eq!(
            json(r#"{"b":[1, {"y":2,"x":1}], "a":"\u0041"}"#),
            json(r#"{"a":"A","b":[1,{"x":1,"y":2}]}"#)
        );
    }

    #[test]
    fn numbers_stay_as_they_are_written() {
        assert_ne!(json(r#"{"a":1.0}"#), json(r#"{"a":1}"#));
        assert_ne!(json(r#"{"a":12345678901234567890123}"#), json(r#"{"a":12345678901234567890124}"#));
    }

    #[test]
    fn kinds_and_bytes_are_told_apart() {
        assert_ne!(canonical(Kind::Text, b"{}"), canonical(Kind::Json, b"{}"));
        assert_ne!(canonical(Kind::Text, b"a "), canonical(Kind::Text, b"a"));
    }
}
