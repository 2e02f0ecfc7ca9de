//! One rule of a path mapping on the command line.

use scaivault_domain::Error;
use scaivault_domain::mapping::Separator;
use scaivault_domain::sync::{ConflictPolicy, Mode, WritePolicy};
use scaivault_domain::time::format_duration;
use scaivault_edge::wire as edge;
use scaivault_proto::federation::v1::PathRule;
use serde_json::{Value, json};

use crate::parse;

/// One `pattern -> template`, and what it says differently from its backend.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Rule {
    pattern: String,
    template: String,
    separator: Option<String>,
    mode: Option<Mode>,
    sync_interval: Option<String>,
    write_policy: Option<WritePolicy>,
    conflict_policy: Option<ConflictPolicy>,
}

/// `pattern=template,mode=sync,sync-interval=30s`.
pub(super) fn rule(text: &str) -> Result<Rule, String> {
    let mut parts = text.split(',');
    let parse::Pair { key, value } = parse::pair(parts.next().unwrap_or_default())?;
    let mut rule = Rule { pattern: key, template: value, ..Default::default() };
    for part in parts {
        let (name, value) = part.split_once('=').unwrap_or((part, ""));
        match name {
            "separator" => {
                Separator::parse(value).map_err(|fault| format!("the {name} {fault}"))?;
                rule.separator = Some(value.to_owned());
            }
            "mode" => rule.mode = Some(named(name, value, Mode::ALL, Mode::as_str)?),
            "sync-interval" => {
                parse::duration(value).map_err(|fault| format!("the {name} {fault}"))?;
                rule.sync_interval = Some(value.to_owned());
            }
            "write-policy" => {
                rule.write_policy = Some(named(name, value, WritePolicy::ALL, WritePolicy::as_str)?);
            }
            "conflict-policy" => {
                rule.conflict_policy = Some(named(name, value, ConflictPolicy::ALL, ConflictPolicy::as_str)?);
            }
            _ => {
                return Err(format!(
                    "a rule has no setting `{name}`; there are separator, mode, sync-interval, write-policy, \
                     conflict-policy"
                ));
            }
        }
    }
    Ok(rule)
}

fn named<T: Copy>(setting: &str, text: &str, all: &[T], name: fn(T) -> &'static str) -> Result<T, String> {
    all.iter().copied().find(|one| name(*one) == text).ok_or_else(|| {
        let names: Vec<_> = all.iter().map(|one| name(*one)).collect();
        format!("the {setting} is {}", names.join(" or "))
    })
}

impl Rule {
    /// The rule as the server gave it, with its index in the mapping.
    pub(super) fn of(index: usize, rule: &PathRule) -> Result<Self, Error> {
        let overrides = edge::parse_overrides(index, rule)?;
        Ok(Rule {
            pattern: rule.pattern.clone(),
            template: rule.template.clone(),
            separator: Some(rule.separator.clone()).filter(|text| !text.is_empty()),
            mode: overrides.mode,
            sync_interval: overrides.sync_interval.map(format_duration),
            write_policy: overrides.write_policy,
            conflict_policy: overrides.conflict_policy,
        })
    }

    /// What stands in a table.
    pub(super) fn cells(&self) -> [String; 3] {
        let settings = self.settings().map(|(name, value)| format!("{name}={value}"));
        [self.pattern.clone(), self.template.clone(), settings.collect::<Vec<_>>().join(",")]
    }

    /// The rule as the REST API has it.
    pub(super) fn to_json(&self) -> Value {
        let mut json = json!({ "pattern": self.pattern, "template": self.template });
        for (name, value) in self.settings() {
            json[name.replace('-', "_")] = value.into();
        }
        json
    }

    fn settings(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let settings = [
            ("separator", self.separator.as_deref()),
            ("mode", self.mode.map(Mode::as_str)),
            ("sync-interval", self.sync_interval.as_deref()),
            ("write-policy", self.write_policy.map(WritePolicy::as_str)),
            ("conflict-policy", self.conflict_policy.map(ConflictPolicy::as_str)),
        ];
        settings.into_iter().filter_map(|(name, value)| Some((name, value?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_of_the_command_line_may_say_what_it_overrides() {
        let text = "a/**=kv/**,separator=--,mode=sync,sync-interval=30s,write-policy=disabled,conflict-policy=manual";
        let parsed = rule(text).expect("a rule");
        assert_eq!((&*parsed.pattern, &*parsed.template), ("a/**", "kv/**"));
        assert_eq!(format!("a/**=kv/**,{}", parsed.cells()[2]), text);
        for (text, fault) in [
            ("a/**", "KEY=VALUE"),
            ("a/**=kv/**,", "no setting ``"),
            ("a/**=kv/**,separator=/", "separator"),
            ("a/**=kv/**,mode", "proxy or sync"),
            ("a/**=kv/**,mode=both", "proxy or sync"),
            ("a/**=kv/**,sync-interval=30", "duration"),
            ("a/**=kv/**,sync_interval=30s", "sync-interval"),
        ] {
            let told = rule(text).expect_err(text);
            assert!(told.contains(fault), "{fault} is not in {told}");
        }
    }
}
