//! Objects whose order counts. `serde_json::Value` and maps would sort the keys and drop duplicates silently, which
//! changes what matches first.

use std::fmt;
use std::marker::PhantomData;

use scaivault_proto::federation::v1 as proto;
use serde::de::value::SeqAccessDeserializer;
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize, Serializer};
use serde_json::value::RawValue;
use utoipa::openapi::schema::{AdditionalProperties, ArrayBuilder, ObjectBuilder, OneOfBuilder, Type};
use utoipa::openapi::{Ref, RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use crate::rest::body::Object;

/// The members of an object in the order of the document; no key twice.
pub(in crate::rest) struct Ordered<V>(pub(in crate::rest) Vec<(String, V)>);

/// The members of an object with their values as they are written.
pub(in crate::rest) type Members = Ordered<Box<RawValue>>;

impl<V> Default for Ordered<V> {
    fn default() -> Self {
        Ordered(Vec::new())
    }
}

impl Members {
    /// The members of `value`; `None` if it is no object, or one with a key twice.
    pub(in crate::rest) fn of(value: &RawValue) -> Option<Self> {
        serde_json::from_str(value.get()).ok()
    }
}

impl<V: Serialize> Serialize for Ordered<V> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(key, value)| (key, value)))
    }
}

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Ordered<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(InOrder(PhantomData))
    }
}

struct InOrder<V>(PhantomData<V>);

impl<'de, V: Deserialize<'de>> Visitor<'de> for InOrder<V> {
    type Value = Ordered<V>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Ordered<V>, A::Error> {
        let mut members: Vec<(String, V)> = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            if members.iter().any(|(earlier, _)| *earlier == key) {
                return Err(A::Error::custom("holds a key twice"));
            }
            members.push((key, map.next_value()?));
        }
        Ok(Ordered(members))
    }
}

/// One `pattern -> template` of a path mapping.
#[derive(Clone, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::rest) struct PathRule {
    /// Secret paths, e.g. `external/hashicorp/**`.
    pattern: String,
    /// Names in the remote store, e.g. `secret/data/**`.
    template: String,
}

impl PathRule {
    /// The rules as protobuf has them.
    pub(super) fn from_wire(rules: Vec<proto::PathRule>) -> Vec<PathRule> {
        rules.into_iter().map(|rule| PathRule { pattern: rule.pattern, template: rule.template }).collect()
    }
}

/// Ordered rules; the first match wins. Read from an object or an array, written as an object.
#[derive(Clone)]
pub(in crate::rest) struct PathMapping(pub(super) Vec<PathRule>);

impl PathMapping {
    /// The rules for the wire.
    pub(super) fn into_wire(self) -> Vec<proto::PathRule> {
        let rules = self.0.into_iter();
        rules.map(|rule| proto::PathRule { pattern: rule.pattern, template: rule.template }).collect()
    }
}

impl Serialize for PathMapping {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|rule| (&rule.pattern, &rule.template)))
    }
}

impl<'de> Deserialize<'de> for PathMapping {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EitherForm;

        impl<'de> Visitor<'de> for EitherForm {
            type Value = PathMapping;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object {pattern: template} or an array of {pattern, template}")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<PathMapping, A::Error> {
                let Ordered(members) = InOrder::<String>(PhantomData).visit_map(map)?;
                let rules = members.into_iter().map(|(pattern, template)| PathRule { pattern, template });
                Ok(PathMapping(rules.collect()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<PathMapping, A::Error> {
                let rules = Vec::<Object<PathRule>>::deserialize(SeqAccessDeserializer::new(seq))?;
                Ok(PathMapping(rules.into_iter().map(|Object(rule)| rule).collect()))
            }
        }

        deserializer.deserialize_any(EitherForm)
    }
}

impl PartialSchema for PathMapping {
    fn schema() -> RefOr<Schema> {
        let object = ObjectBuilder::new()
            .description(Some("Pattern to template, in the order of the document."))
            .additional_properties(Some(AdditionalProperties::<Schema>::RefOr(
                ObjectBuilder::new().schema_type(Type::String).into(),
            )));
        let array = ArrayBuilder::new().items(Ref::from_schema_name(PathRule::name()));
        let description = "Ordered rules; the first match wins. Answers have the object form.";
        OneOfBuilder::new().item(object).item(array).description(Some(description)).into()
    }
}

impl ToSchema for PathMapping {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        schemas.push((PathRule::name().into(), PathRule::schema()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patterns(text: &str) -> Result<Vec<String>, String> {
        let mapping: Result<PathMapping, _> = serde_json::from_str(text);
        mapping.map(|m| m.0.into_iter().map(|r| r.pattern).collect()).map_err(|error| error.to_string())
    }

    #[test]
    fn the_order_of_the_document_is_kept() {
        assert_eq!(patterns(r#"{"z/**":"a/**","a/*":"b/*","m":"c"}"#).unwrap(), ["z/**", "a/*", "m"]);
        let array = r#"[{"pattern":"z","template":"a"},{"template":"b","pattern":"a"}]"#;
        assert_eq!(patterns(array).unwrap(), ["z", "a"]);
        let mapping: PathMapping = serde_json::from_str(array).unwrap();
        assert_eq!(serde_json::to_string(&mapping).unwrap(), r#"{"z":"a","a":"b"}"#);
    }

    #[test]
    fn a_pattern_twice_is_refused_and_not_dropped() {
        assert!(patterns(r#"{"a":"x","b":"y","a":"z"}"#).unwrap_err().contains("twice"));
        assert!(patterns(r#"[["a","x"]]"#).is_err());
    }
}
