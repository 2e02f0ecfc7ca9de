//! JSON merge patch (RFC 7396) over raw text: order and numbers stay as they are written.

use serde_json::value::{RawValue, to_raw_value};

use super::dto::mapping::Members;

/// Members that are replaced whole: their order is their meaning.
const WHOLE: &[&str] = &["path_mapping"];

/// `target` with `patch` merged into it.
pub(super) fn merged(target: &RawValue, patch: &RawValue) -> Box<RawValue> {
    let Some(changes) = Members::of(patch) else { return patch.to_owned() };
    let mut members = Members::of(target).unwrap_or_default();
    for (name, change) in changes.0 {
        let at = members.0.iter().position(|(known, _)| *known == name);
        if change.get() == "null" {
            if let Some(at) = at {
                members.0.remove(at);
            }
            continue;
        }
        let before = at.map_or(RawValue::NULL, |at| &members.0[at].1);
        let after = if WHOLE.contains(&name.as_str()) { change } else { merged(before, &change) };
        match at {
            Some(at) => members.0[at].1 = after,
            None => members.0.push((name, after)),
        }
    }
    to_raw_value(&members).expect("members are raw JSON under string keys")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merge(target: &str, patch: &str) -> String {
        let raw = |text: &str| RawValue::from_string(text.to_owned()).unwrap();
        merged(&raw(target), &raw(patch)).get().to_owned()
    }

    #[test]
    fn the_examples_of_rfc_7396() {
        for (target, patch, result) in [
            (r#"{"a":"b"}"#, r#"{"a":"c"}"#, r#"{"a":"c"}"#),
            (r#"{"a":"b"}"#, r#"{"b":"c"}"#, r#"{"a":"b","b":"c"}"#),
            (r#"{"a":"b"}"#, r#"{"a":null}"#, r#"{}"#),
            (r#"{"a":"b","b":"c"}"#, r#"{"a":null}"#, r#"{"b":"c"}"#),
            (r#"{"a":["b"]}"#, r#"{"a":"c"}"#, r#"{"a":"c"}"#),
            (r#"{"a":"c"}"#, r#"{"a":["b"]}"#, r#"{"a":["b"]}"#),
            (r#"{"a":{"b":"c"}}"#, r#"{"a":{"b":"d","c":null}}"#, r#"{"a":{"b":"d"}}"#),
            (r#"{"a":[{"b":"c"}]}"#, r#"{"a":[1]}"#, r#"{"a":[1]}"#),
            (r#"["a","b"]"#, r#"["c","d"]"#, r#"["c","d"]"#),
            (r#"{"a":"b"}"#, r#"["c"]"#, r#"["c"]"#),
            (r#"{"e":null}"#, r#"{"a":1}"#, r#"{"e":null,"a":1}"#),
            (r#"[1,2]"#, r#"{"a":"b","c":null}"#, r#"{"a":"b"}"#),
            (r#"{}"#, r#"{"a":{"bb":{"ccc":null}}}"#, r#"{"a":{"bb":{}}}"#),
        ] {
            assert_eq!(merge(target, patch), result, "{target} {patch}");
        }
    }

    #[test]
    fn a_path_mapping_is_replaced_whole_and_in_its_order() {
        let target = r#"{"path_mapping":{"a/**":"x/**"}}"#;
        let patch = r#"{"path_mapping":{"z/**":"x/**","a/**":"y/**"}}"#;
        assert_eq!(merge(target, patch), patch);
    }
}
