//! Objects whose order counts. `serde_json::Value` and maps would sort the keys and drop duplicates silently, which
//! changes what matches first.

use std::fmt;
use std::marker::PhantomData;

use scaivault_domain::Error;
use scaivault_domain::mapping::{GivenRule, Overrides};
use scaivault_domain::sync::{ConflictPolicy, Mode, WritePolicy};
use scaivault_domain::time::format_duration;
use scaivault_proto::federation::v1 as proto;
use serde::de::value::SeqAccessDeserializer;
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize, Serializer};
use serde_json::value::RawValue;
use utoipa::openapi::schema::{AdditionalProperties, ArrayBuilder, ObjectBuilder, OneOfBuilder, Type};
use utoipa::openapi::{Ref, RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use super::{given, named, span};
use crate::rest::body::Object;
use crate::wire;

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

    /// The member of this name.
    pub(in crate::rest) fn get(&self, name: &str) -> Option<&RawValue> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, value)| &**value)
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

/// One `pattern -> template` of a path mapping, and what it says differently from its backend.
#[derive(Clone, Default, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::rest) struct PathRule {
    /// Secret paths, e.g. `external/hashicorp/**`.
    pattern: String,
    /// Names in the remote store, e.g. `secret/data/**`.
    template: String,
    /// How reads are served; the backend's mode if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(pattern = "^(proxy|sync)$")]
    mode: Option<String>,
    /// From the start of one cycle to the start of the next, e.g. `15m`; the backend's if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(pattern = "^([0-9]+(days?|h|m|s|ms|us|ns))+$")]
    sync_interval: Option<String>,
    /// What becomes of writes; the backend's policy if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(pattern = "^(disabled|write_through|local_only)$")]
    write_policy: Option<String>,
    /// Who is right when the two sides disagree; the backend's policy if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(pattern = "^(backend_wins|local_wins|manual)$")]
    conflict_policy: Option<String>,
    /// What joins the segments of a name in a store whose names have no slashes, e.g. `--`; slashes if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(max_length = 16)]
    separator: Option<String>,
}

impl PathRule {
    /// The rules as the service gave them.
    pub(super) fn from_wire(rules: Vec<proto::PathRule>) -> Result<Vec<PathRule>, Error> {
        let rules = rules.into_iter().enumerate().map(|(index, rule)| {
            let overrides = wire::parse_overrides(index, &rule)?;
            Ok(PathRule {
                pattern: rule.pattern,
                template: rule.template,
                separator: given(rule.separator),
                mode: overrides.mode.map(|mode| mode.as_str().to_owned()),
                sync_interval: overrides.sync_interval.map(format_duration),
                write_policy: overrides.write_policy.map(|policy| policy.as_str().to_owned()),
                conflict_policy: overrides.conflict_policy.map(|policy| policy.as_str().to_owned()),
            })
        });
        rules.collect()
    }

    /// The rule with this index in its mapping, for the wire.
    fn into_wire(self, index: usize) -> Result<proto::PathRule, Error> {
        let at = |field: &str| format!("/path_mapping/{index}/{field}");
        let overrides = Overrides {
            mode: named(&at("mode"), self.mode, Mode::parse)?,
            sync_interval: span(&at("sync_interval"), self.sync_interval)?,
            write_policy: named(&at("write_policy"), self.write_policy, WritePolicy::parse)?,
            conflict_policy: named(&at("conflict_policy"), self.conflict_policy, ConflictPolicy::parse)?,
        };
        Ok(wire::rule(&GivenRule {
            pattern: &self.pattern,
            template: &self.template,
            separator: self.separator.as_deref().unwrap_or_default(),
            overrides,
        }))
    }
}

/// Ordered rules; the first match wins. Read from an object or an array, written as an object, which has no place for
/// what a rule overrides.
#[derive(Clone)]
pub(in crate::rest) struct PathMapping(pub(super) Vec<PathRule>);

impl PathMapping {
    /// The rules for the wire.
    ///
    /// # Errors
    /// `invalid_config`, naming what a rule overrides in a way that cannot be.
    pub(super) fn into_wire(self) -> Result<Vec<proto::PathRule>, Error> {
        self.0.into_iter().enumerate().map(|(index, rule)| rule.into_wire(index)).collect()
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
                let rule = |(pattern, template)| PathRule { pattern, template, ..Default::default() };
                Ok(PathMapping(members.into_iter().map(rule).collect()))
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
        let description = "Ordered rules; the first match wins. Answers have the object form here, and the array, \
                           which alone shows what rules override, as `rules`.";
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
