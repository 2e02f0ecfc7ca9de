//! One field of a JSON value, taken without parsing the rest: numbers and key order stay as they are written.

use std::borrow::Cow;
use std::collections::HashMap;

use serde_json::value::RawValue;

/// The member of `object` that `path` names, e.g. `a.b`. A key that itself holds dots is found before its parts are.
pub(super) fn pick<'a>(object: &'a RawValue, path: &str) -> Option<&'a RawValue> {
    let mut members: HashMap<Cow<'a, str>, &'a RawValue> = serde_json::from_str(object.get()).ok()?;
    if let Some(found) = members.remove(path) {
        return Some(found);
    }
    path.match_indices('.').find_map(|(dot, _)| pick(members.get(&path[..dot])?, &path[dot + 1..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_given_as_it_is_written() {
        let text = r#"{"a":{"b":12345678901234567890123.10,"c.d":{"e":[1, 2]}},"x.y":"z","n":null,"é":1}"#;
        let object: &RawValue = serde_json::from_str(text).unwrap();
        let pick = |path| pick(object, path).map(RawValue::get);
        assert_eq!(pick("a.b"), Some("12345678901234567890123.10"));
        assert_eq!(pick("a.c.d.e"), Some("[1, 2]"));
        assert_eq!(pick("x.y"), Some("\"z\""));
        assert_eq!(pick("n"), Some("null"));
        assert_eq!(pick("é"), Some("1"));
        for missing in ["", "b", "a.", "a.x", "x", "a.b.c", ".a"] {
            assert_eq!(pick(missing), None, "{missing}");
        }
    }
}
