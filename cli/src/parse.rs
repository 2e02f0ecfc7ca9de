//! Words of the command line, parsed by the types that the server parses them with.

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use scaivault_domain::Error;
use scaivault_domain::access::{Capability, Effect, PolicyRule};
use scaivault_domain::backend::OwnIdentity;
use scaivault_domain::path::{Folder, SecretPath};
use scaivault_domain::pattern::Pattern;
use scaivault_domain::tenant::{BackendName, NodeName, PolicyName, TenantId};
use scaivault_domain::time::{Timestamp, parse_duration};

/// What is wrong, without naming the field: the command line names the argument.
fn detail(error: Error) -> String {
    error
        .violations
        .into_iter()
        .next()
        .map_or_else(|| error.message.into_owned(), |violation| violation.detail)
}

pub(crate) fn path(text: &str) -> Result<SecretPath, String> {
    SecretPath::parse(text).map_err(detail)
}

/// A folder in the API's spelling: empty, or with a slash at its end.
pub(crate) fn folder(text: &str) -> Result<String, String> {
    Folder::parse(text).map_err(detail)?;
    Ok(if text.is_empty() || text.ends_with('/') { text.to_owned() } else { format!("{text}/") })
}

pub(crate) fn backend_name(text: &str) -> Result<BackendName, String> {
    BackendName::parse(text).map_err(detail)
}

pub(crate) fn tenant(text: &str) -> Result<TenantId, String> {
    TenantId::parse(text).map_err(detail)
}

/// An identity of ScaiVault's own.
pub(crate) fn identity(text: &str) -> Result<OwnIdentity, String> {
    OwnIdentity::parse(text).ok_or_else(|| "is one of `kubernetes`, `aws`, `azure`, `gcp`".to_owned())
}

/// A tenant that a node serves, or `*` for all of them.
pub(crate) fn served_tenant(text: &str) -> Result<String, String> {
    if text == "*" { Ok(text.to_owned()) } else { tenant(text).map(String::from) }
}

pub(crate) fn node_name(text: &str) -> Result<NodeName, String> {
    NodeName::parse(text).map_err(detail)
}

pub(crate) fn policy_name(text: &str) -> Result<PolicyName, String> {
    PolicyName::parse(text).map_err(detail)
}

pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    parse_duration(text).map_err(str::to_owned)
}

/// One name of a closed set, so that help and completion list them all.
pub(crate) fn one_of<T: Copy + Send + Sync + 'static>(
    all: &'static [T],
    name: fn(T) -> &'static str,
) -> impl TypedValueParser<Value = T> {
    PossibleValuesParser::new(all.iter().map(|one| name(*one)))
        .map(move |text| *all.iter().find(|one| name(**one) == text).expect("the parser takes no other name"))
}

/// `key=value`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pair {
    pub(crate) key: String,
    pub(crate) value: String,
}

pub(crate) fn pair(text: &str) -> Result<Pair, String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok(Pair { key: key.to_owned(), value: value.to_owned() }),
        _ => Err("is written KEY=VALUE".to_owned()),
    }
}

/// Where a value stands: on the command line, in a file (`@file`) or on standard input (`-`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Literal(String),
    File(PathBuf),
    Stdin,
}

impl Source {
    /// Reads the notation; `\@…` and `\-` are the literal texts `@…` and `-`.
    pub(crate) fn of(text: &str) -> Source {
        match (text, text.strip_prefix('@')) {
            ("-", _) => Source::Stdin,
            (_, Some(file)) => Source::File(file.into()),
            _ if text.starts_with("\\@") || text == "\\-" => Source::Literal(text[1..].to_owned()),
            _ => Source::Literal(text.to_owned()),
        }
    }
}

pub(crate) fn source(text: &str) -> Result<Source, String> {
    Ok(Source::of(text))
}

/// A file's name, or `-` for standard input.
pub(crate) fn file(text: &str) -> Result<Source, String> {
    Ok(if text == "-" { Source::Stdin } else { Source::File(text.into()) })
}

/// A moment, or how long ago it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moment {
    At(Timestamp),
    Ago(Duration),
}

impl Moment {
    pub(crate) fn before(self, now: Timestamp) -> Timestamp {
        match self {
            Moment::At(time) => time,
            Moment::Ago(duration) => {
                let ago = i64::try_from(duration.as_millis()).unwrap_or(i64::MAX);
                Timestamp::from_millis(now.as_millis().saturating_sub(ago).max(0))
            }
        }
    }
}

pub(crate) fn moment(text: &str) -> Result<Moment, String> {
    if let Some(time) = Timestamp::parse(text) {
        return Ok(Moment::At(time));
    }
    parse_duration(text).map(Moment::Ago).map_err(|_| {
        "is a duration such as `15m` (that long ago) or a time such as `2026-01-31T12:00:00Z`".to_owned()
    })
}

/// `allow read,list apps/**`.
pub(crate) fn policy_rule(text: &str) -> Result<PolicyRule, String> {
    let words: Vec<_> = text.split_whitespace().collect();
    let [effect, capabilities, pattern] = words[..] else {
        return Err("is written `allow|deny CAPABILITY,… PATTERN`, e.g. `allow read,list apps/**`".to_owned());
    };
    let effect = match effect {
        "allow" => Effect::Allow,
        "deny" => Effect::Deny,
        _ => return Err("begins with `allow` or `deny`".to_owned()),
    };
    let capabilities = capabilities
        .split(',')
        .map(|name| Capability::parse(name).ok_or("the capabilities are read, list, write, delete"))
        .collect::<Result<_, _>>()?;
    let path = Pattern::parse(pattern).map_err(|fault| format!("the pattern {fault}"))?;
    Ok(PolicyRule { path, capabilities, effect })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_rule_is_three_words() {
        let rule = policy_rule("deny  read,list apps/**").expect("a rule");
        assert_eq!(rule.effect, Effect::Deny);
        assert_eq!(rule.capabilities, [Capability::Read, Capability::List]);
        assert_eq!(rule.path.as_str(), "apps/**");
        for text in [
            "",
            "allow read",
            "permit read a",
            "allow look a",
            "allow read a//b",
            "allow read a b",
            "allow read, a",
        ] {
            assert!(policy_rule(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_value_may_stand_elsewhere() {
        assert_eq!(Source::of("-"), Source::Stdin);
        assert_eq!(Source::of("@a b"), Source::File("a b".into()));
        assert_eq!(Source::of("\\@a"), Source::Literal("@a".into()));
        assert_eq!(Source::of("a@b"), Source::Literal("a@b".into()));
        assert_eq!(Source::of("\\n"), Source::Literal("\\n".into()));
    }

    #[test]
    fn a_moment_is_a_time_or_a_while_ago() {
        let now = Timestamp::parse("2026-01-01T01:00:00Z").expect("a time");
        let at = |text| moment(text).expect(text).before(now).to_string();
        assert_eq!(at("1h"), "2026-01-01T00:00:00.000Z");
        assert_eq!(at("2025-12-31T00:00:00Z"), "2025-12-31T00:00:00.000Z");
        assert!(moment("yesterday").is_err());
    }

    #[test]
    fn folders_are_spelled_as_the_api_does() {
        assert_eq!(folder("").as_deref(), Ok(""));
        assert_eq!(folder("a/b").as_deref(), Ok("a/b/"));
        assert_eq!(folder("a/b/").as_deref(), Ok("a/b/"));
        assert!(folder("/a").is_err());
    }
}
