//! JSON as it was written: keys in their order, numbers with all their digits.

use serde::ser::{Error as _, SerializeMap as _};
use serde::{Serialize, Serializer};
use serde_json::value::RawValue;
use serde_with::{DeserializeAs as _, Map, Same};

/// Deeper documents are refused, as serde_json does.
const MAX_DEPTH: u8 = 128;

/// The fields of an object in their order; `None` if it is none.
pub(crate) fn fields(json: &RawValue) -> Option<Vec<(String, &RawValue)>> {
    Map::<Same, Same>::deserialize_as(&mut serde_json::Deserializer::from_str(json.get())).ok()
}

/// The field at `path`, e.g. `db.user`. A key that has dots itself wins over the fields of an object.
pub(crate) fn pick<'a>(json: &'a RawValue, path: &str) -> Option<&'a RawValue> {
    let fields = fields(json)?;
    let of = |name: &str| fields.iter().find(|(key, _)| key == name).map(|(_, value)| *value);
    of(path).or_else(|| {
        path.rmatch_indices('.')
            .find_map(|(dot, _)| of(&path[..dot]).and_then(|inner| pick(inner, &path[dot + 1..])))
    })
}

/// What a person wants to see of a value: the text itself of a string, everything else as JSON.
pub(crate) fn text(json: &RawValue) -> String {
    serde_json::from_str(json.get()).unwrap_or_else(|_| json.get().to_owned())
}

/// JSON that other formats can be written from.
pub(crate) struct Document<'a> {
    json: &'a RawValue,
    depth: u8,
}

impl<'a> Document<'a> {
    pub(crate) fn new(json: &'a RawValue) -> Self {
        Document { json, depth: 0 }
    }
}

impl Serialize for Document<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let depth = self.depth + 1;
        if depth > MAX_DEPTH {
            return Err(S::Error::custom("nested too deeply"));
        }
        let inner = |json| Document { json, depth };
        let json = self.json.get();
        match json.as_bytes().first() {
            Some(b'{') => {
                let fields = fields(self.json).ok_or_else(|| S::Error::custom("no object"))?;
                let mut map = serializer.serialize_map(Some(fields.len()))?;
                for (key, value) in fields {
                    map.serialize_entry(&key, &inner(value))?;
                }
                map.end()
            }
            Some(b'[') => {
                let items: Vec<&RawValue> = serde_json::from_str(json).map_err(S::Error::custom)?;
                serializer.collect_seq(items.into_iter().map(inner))
            }
            Some(b'"') => serializer.serialize_str(&text(self.json)),
            Some(b'n') => serializer.serialize_unit(),
            Some(b't') => serializer.serialize_bool(true),
            Some(b'f') => serializer.serialize_bool(false),
            _ => serialize_number(json, serializer),
        }
    }
}

fn serialize_number<S: Serializer>(digits: &str, serializer: S) -> Result<S::Ok, S::Error> {
    if let Ok(number) = digits.parse::<i64>() {
        return serializer.serialize_i64(number);
    }
    if let Ok(number) = digits.parse::<i128>() {
        return serializer.serialize_i128(number);
    }
    match digits.parse::<f64>() {
        Ok(number) if digits.contains(['.', 'e', 'E']) && number.is_finite() => {
            serializer.serialize_f64(number)
        }
        // No number type holds it: text keeps every digit.
        _ => serializer.serialize_str(digits),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(text: &str) -> Box<RawValue> {
        RawValue::from_string(text.to_owned()).expect("JSON")
    }

    #[test]
    fn fields_are_picked_by_path() {
        let json = raw(r#"{"db":{"user":"app","port":5432},"tls.key":"k","a":{"b.c":1}}"#);
        let found = |path| pick(&json, path).map(text);
        assert_eq!(found("db.user").as_deref(), Some("app"));
        assert_eq!(found("db.port").as_deref(), Some("5432"));
        assert_eq!(found("db").as_deref(), Some(r#"{"user":"app","port":5432}"#));
        assert_eq!(found("tls.key").as_deref(), Some("k"));
        assert_eq!(found("a.b.c").as_deref(), Some("1"));
        assert_eq!(found("db.none"), None);
        assert_eq!(found("db.user.x"), None);
    }

    #[test]
    fn yaml_keeps_order_and_digits() {
        let json = raw(
            r#"{"z":1,"a":[true,null,{"x":"y"}],"big":123456789012345678901234567890,"bigger":1234567890123456789012345678901234567890123,"f":1.5,"t":"007"}"#,
        );
        let yaml = serde_saphyr::to_string(&Document::new(&json)).expect("YAML");
        let z = yaml.find("z: 1").expect("z");
        let a = yaml.find("a:").expect("a");
        assert!(z < a, "{yaml}");
        for part in [
            "123456789012345678901234567890",
            "1234567890123456789012345678901234567890123",
            "f: 1.5",
            "x: \"y\"",
        ] {
            assert!(yaml.contains(part), "{part} is not in\n{yaml}");
        }
        assert!(!yaml.contains("t: 007"), "{yaml}");
    }

    #[test]
    fn deep_nesting_is_refused_and_not_a_crash() {
        let deep = raw(&format!("{}1{}", "[".repeat(200), "]".repeat(200)));
        assert!(serde_saphyr::to_string(&Document::new(&deep)).is_err());
    }
}
