//! Path mappings: ordered rules between secret paths and names in a remote store. The first match wins.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Reason};
use crate::path::{Folder, PathFault, SecretPath};
use crate::pattern::{Pattern, Template};
use crate::sync::{ConflictPolicy, Mode, WritePolicy};

/// Most rules of one mapping.
pub const MAX_RULES: usize = 64;

/// A name in a remote store, as its template spells it: segments joined by `/`, the first few of them literal.
///
/// The same text can name two things: stores give some literal segments a meaning (Vault's `data` behind a mount) that
/// the same segment does not have where it was captured. So the split is part of the name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RemoteName {
    text: String,
    literal: usize,
}

impl RemoteName {
    /// A name that somebody wrote out whole: every segment is literal.
    pub fn new(text: impl Into<String>) -> Self {
        let text = text.into();
        let literal = text.split('/').count();
        RemoteName { text, literal }
    }

    /// A name of which only the first `literal` segments stand in the template.
    pub fn with_literal(text: impl Into<String>, literal: usize) -> Self {
        RemoteName { text: text.into(), literal }
    }

    /// The name of `child` in this folder, as a listing found it.
    #[must_use]
    pub fn child(&self, child: &str) -> Self {
        RemoteName { text: format!("{}/{child}", self.text), literal: self.literal }
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The segments in order.
    pub fn segments(&self) -> impl Iterator<Item = &str> + Clone {
        self.text.split('/')
    }

    /// How many segments at the beginning stand in the template.
    pub fn literal(&self) -> usize {
        self.literal
    }

    /// Whether a template with this many literal segments at its beginning spells the name.
    ///
    /// A difference in the count matters only if it makes one of Vault's infixes literal for one and captured for the
    /// other. An infix stands behind a mount, so the first segment is none, nor is a name in a store without folders.
    fn spelled_by(&self, literal: usize) -> bool {
        let (fewer, more) = (self.literal.min(literal).max(1), self.literal.max(literal));
        !self.segments().take(more).skip(fewer).any(|segment| matches!(segment, "data" | "metadata"))
    }
}

/// What joins the segments of a name in a store whose names have no slashes, e.g. `--`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Separator(String);

impl Separator {
    /// Longest separator in bytes.
    pub const MAX_BYTES: usize = 16;

    /// Parses a separator.
    ///
    /// # Errors
    /// What is wrong, to be read behind "the separator …".
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        if text.is_empty() || text.len() > Self::MAX_BYTES {
            return Err("has 1 to 16 characters");
        }
        if !text.bytes().all(|b| b.is_ascii_graphic() && b != b'/' && b != b'*') {
            return Err("has a character that cannot join names");
        }
        Ok(Separator(text.to_owned()))
    }

    /// The separator.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The segments as one name; `None` if splitting that would give others.
    fn join(&self, segments: &[&str]) -> Option<String> {
        let name = segments.join(&self.0);
        self.split(&name).eq(segments.iter().copied()).then_some(name)
    }

    fn split<'n>(&'n self, name: &'n str) -> impl Iterator<Item = &'n str> {
        name.split(self.0.as_str())
    }
}

impl fmt::Display for Separator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A rule as it is written.
#[derive(Clone, Copy, Debug, Default)]
pub struct GivenRule<'t> {
    /// The text of the pattern.
    pub pattern: &'t str,
    /// The text of the template.
    pub template: &'t str,
    /// The text of the separator; empty: none.
    pub separator: &'t str,
    /// What it overrides.
    pub overrides: Overrides,
}

/// One `pattern -> template` of a mapping.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// Which secret paths the rule owns.
    pub pattern: Pattern,
    /// The name of such a path in the remote store.
    pub template: Template,
    /// What joins the segments of the name there; `None`: slashes.
    #[serde(default)]
    pub separator: Option<Separator>,
    /// What it says differently from its backend.
    #[serde(default)]
    pub overrides: Overrides,
}

/// What a rule says differently from its backend: a subtree is moved from proxy to sync by a rule of its own in front.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Overrides {
    /// How reads are served.
    pub mode: Option<Mode>,
    /// From the start of one cycle to the start of the next.
    pub sync_interval: Option<Duration>,
    /// What becomes of writes.
    pub write_policy: Option<WritePolicy>,
    /// Who is right when the sides disagree.
    pub conflict_policy: Option<ConflictPolicy>,
}

/// Why a remote name has no secret path here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Skip {
    /// A segment of the name cannot stand in a secret path.
    Charset,
    /// The path would be too long.
    TooLong,
    /// No template makes this name.
    NoRule,
    /// An earlier rule owns the path that this rule would give the name.
    ShadowedByRule,
    /// The path does not map back to the name.
    RoundTrip,
}

/// How the children of a folder of secret paths are found in the remote store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listing {
    /// The rule puts one folder there, of this whole name ending in `/`; nobody has to be asked.
    Folder(String),
    /// All names below this remote folder that matter are direct children of it, or lie below them.
    Level(RemoteName),
    /// Names at any depth below this remote folder (`None`: the whole store) have to be walked.
    Walk(Option<RemoteName>),
}

/// The ordered rules of one backend; never empty, patterns unique.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<Rule>", into = "Vec<Rule>")]
pub struct PathMapping(Vec<Rule>);

impl TryFrom<Vec<Rule>> for PathMapping {
    type Error = Error;

    fn try_from(rules: Vec<Rule>) -> Result<Self, Error> {
        let invalid = |index: usize, detail: String| {
            Error::field(Reason::InvalidMapping, format!("/path_mapping/{index}"), detail)
        };
        if rules.is_empty() {
            return Err(Error::field(Reason::InvalidMapping, "/path_mapping", "needs at least one rule"));
        }
        if rules.len() > MAX_RULES {
            return Err(Error::field(Reason::InvalidMapping, "/path_mapping", "has more than 64 rules"));
        }
        for (index, rule) in rules.iter().enumerate() {
            if !rule.template.fits(&rule.pattern) {
                let detail = format!(
                    "pattern `{}` and template `{}` must carry the same wildcards in the same order",
                    rule.pattern, rule.template
                );
                return Err(invalid(index, detail));
            }
            if rules[..index].iter().any(|earlier| earlier.pattern == rule.pattern) {
                return Err(invalid(index, format!("pattern `{}` stands twice", rule.pattern)));
            }
        }
        Ok(PathMapping(rules))
    }
}

impl From<PathMapping> for Vec<Rule> {
    fn from(mapping: PathMapping) -> Self {
        mapping.0
    }
}

impl PathMapping {
    /// Parses `(pattern, template)` pairs in their order.
    ///
    /// # Errors
    /// `invalid_mapping`, naming the rule.
    pub fn parse<P: AsRef<str>, T: AsRef<str>>(
        pairs: impl IntoIterator<Item = (P, T)>,
    ) -> Result<Self, Error> {
        let pairs: Vec<_> = pairs.into_iter().collect();
        Self::parse_rules(pairs.iter().map(|(pattern, template)| GivenRule {
            pattern: pattern.as_ref(),
            template: template.as_ref(),
            ..GivenRule::default()
        }))
    }

    /// Parses rules in their order.
    ///
    /// # Errors
    /// `invalid_mapping`, naming the rule.
    pub fn parse_rules<'t>(given: impl IntoIterator<Item = GivenRule<'t>>) -> Result<Self, Error> {
        let mut rules = Vec::new();
        for (index, GivenRule { pattern, template, separator, overrides }) in given.into_iter().enumerate() {
            let invalid = |what: &str, text: &str, fault: &str| {
                let shown: String = text.chars().take(80).collect();
                let detail = format!("the {what} {shown:?} {fault}");
                Error::field(Reason::InvalidMapping, format!("/path_mapping/{index}"), detail)
            };
            let separator = (!separator.is_empty())
                .then(|| Separator::parse(separator).map_err(|fault| invalid("separator", separator, fault)));
            rules.push(Rule {
                pattern: Pattern::parse(pattern).map_err(|fault| invalid("pattern", pattern, fault))?,
                template: Template::parse(template).map_err(|fault| invalid("template", template, fault))?,
                separator: separator.transpose()?,
                overrides,
            });
        }
        PathMapping::try_from(rules)
    }

    /// The rules in order.
    pub fn rules(&self) -> &[Rule] {
        &self.0
    }

    /// The first rule that owns `path`, by index.
    pub fn owner(&self, path: &SecretPath) -> Option<usize> {
        let segments: Vec<_> = path.segments().collect();
        self.0.iter().position(|rule| rule.pattern.captures(&segments).is_some())
    }

    /// The first rule that owns `path`, and the remote name it gives; no name, if the rule's separator stands in one of
    /// the segments, so that the name would be another path's.
    pub fn forward(&self, path: &SecretPath) -> Option<(usize, Option<RemoteName>)> {
        let segments: Vec<_> = path.segments().collect();
        self.0.iter().enumerate().find_map(|(index, rule)| {
            let captures = rule.pattern.captures(&segments)?;
            let name = match &rule.separator {
                None => Some(rule.template.fill(&captures)),
                Some(separator) => separator.join(&rule.template.fill_segments(&captures)),
            };
            let literal = rule.template.literal_prefix().count();
            Some((index, name.map(|text| RemoteName { text, literal })))
        })
    }

    /// Every secret path of a remote name: one for each rule whose template makes it, unless skipped.
    ///
    /// A path is given only if it maps forward to the same rule and the same name.
    pub fn reverse(&self, name: &RemoteName) -> Vec<Result<SecretPath, Skip>> {
        let mut paths = Vec::new();
        for (index, rule) in self.0.iter().enumerate() {
            let segments: Vec<_> = match &rule.separator {
                None => name.segments().collect(),
                Some(separator) => separator.split(&name.text).collect(),
            };
            let Some(captures) = rule.template.captures(&segments) else { continue };
            if !name.spelled_by(rule.template.literal_prefix().count()) {
                continue;
            }
            let path = SecretPath::check(&rule.pattern.fill(&captures)).map_err(|fault| match fault {
                PathFault::Charset => Skip::Charset,
                PathFault::TooLong => Skip::TooLong,
            });
            paths.push(path.and_then(|path| match self.forward(&path) {
                Some((owner, _)) if owner != index => Err(Skip::ShadowedByRule),
                Some((_, Some(there))) if there.text == name.text => Ok(path),
                _ => Err(Skip::RoundTrip),
            }));
        }
        if paths.is_empty() {
            paths.push(Err(Skip::NoRule));
        }
        paths
    }

    /// Whether some path could belong to both mappings; the first such pair of patterns.
    pub fn overlap<'a>(&'a self, other: &'a PathMapping) -> Option<(&'a Pattern, &'a Pattern)> {
        self.0.iter().find_map(|mine| {
            let theirs = other.0.iter().find(|theirs| mine.pattern.intersects(&theirs.pattern))?;
            Some((&mine.pattern, &theirs.pattern))
        })
    }

    /// Where to look in the remote store for the children of `folder`, for each rule that reaches it.
    pub fn listings(&self, folder: &Folder) -> Vec<Listing> {
        let mut listings: Vec<Listing> = Vec::new();
        for rule in &self.0 {
            if !rule.pattern.reaches_below(folder.segments()) {
                continue;
            }
            let listing = rule.listing(folder);
            if !listings.contains(&listing) {
                listings.push(listing);
            }
        }
        listings
    }
}

impl Rule {
    fn listing(&self, folder: &Folder) -> Listing {
        // With nothing but a trailing `**` behind the literals, a folder here is a folder there.
        let prefix: Vec<_> = self.pattern.literal_prefix().collect();
        let trailing = self.pattern.as_str() == [&prefix[..], &["**"]].concat().join("/");
        let folder: Vec<_> = folder.segments().collect();
        let below = usize::from(self.pattern.is_literal());
        if prefix.len() > folder.len() + below && prefix.starts_with(&folder) {
            return Listing::Folder(format!("{}/", prefix[..=folder.len()].join("/")));
        }
        if self.separator.is_some() {
            return Listing::Walk(None);
        }
        let root: Vec<_> = self.template.literal_prefix().collect();
        if self.pattern.is_literal()
            && let [parent @ .., _] = &root[..]
            && !parent.is_empty()
        {
            return Listing::Level(RemoteName { text: parent.join("/"), literal: root.len() });
        }
        if trailing && self.template.as_str().ends_with("**") && folder.starts_with(&prefix) {
            let level = [&root[..], &folder[prefix.len()..]].concat();
            if !level.is_empty() {
                return Listing::Level(RemoteName { text: level.join("/"), literal: root.len() });
            }
        }
        Listing::Walk((!root.is_empty()).then(|| RemoteName::new(root.join("/"))))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pattern::tests::{paths, patterns};

    fn mapping(pairs: &[(&str, &str)]) -> PathMapping {
        PathMapping::parse(pairs.iter().copied()).expect("a valid mapping")
    }

    fn path(text: &str) -> SecretPath {
        SecretPath::check(text).expect("a valid path")
    }

    #[test]
    fn first_matching_rule_wins() {
        let mapping = mapping(&[
            ("e/apps/special", "kv/data/other"),
            ("e/apps/*", "kv/data/a/*"),
            ("e/**", "kv/data/**"),
        ]);
        let name = |text: &str, literal| RemoteName::with_literal(text, literal);
        assert_eq!(mapping.forward(&path("e/apps/special")), Some((0, Some(name("kv/data/other", 3)))));
        assert_eq!(mapping.forward(&path("e/apps/x")), Some((1, Some(name("kv/data/a/x", 3)))));
        assert_eq!(mapping.forward(&path("e/x/y/z")), Some((2, Some(name("kv/data/x/y/z", 2)))));
        assert_eq!(mapping.forward(&path("other")), None);
    }

    #[test]
    fn a_name_that_another_rule_owns_is_skipped() {
        let mapping = mapping(&[("e/apps/*", "kv/a/*"), ("e/**", "kv/**")]);
        assert_eq!(mapping.reverse(&RemoteName::new("kv/apps/x")), [Err(Skip::ShadowedByRule)]);
        assert_eq!(mapping.reverse(&RemoteName::new("kv/a/x")), [Ok(path("e/apps/x")), Ok(path("e/a/x"))]);
        assert_eq!(mapping.reverse(&RemoteName::new("kv/sp ace")), [Err(Skip::Charset)]);
        assert_eq!(mapping.reverse(&RemoteName::new("other")), [Err(Skip::NoRule)]);
    }

    #[test]
    fn a_captured_infix_is_no_literal_one() {
        let mapping = mapping(&[("e/a/**", "kv/data/**"), ("e/b/**", "kv/**"), ("e/c/*", "kv/apps/*")]);
        let paths = |text: &str, literal| mapping.reverse(&RemoteName::with_literal(text, literal));
        assert_eq!(paths("kv/data/x", 2), [Ok(path("e/a/x"))]);
        assert_eq!(paths("kv/data/x", 1), [Ok(path("e/b/data/x"))]);
        assert_eq!(paths("kv/apps/x", 1), [Ok(path("e/b/apps/x")), Ok(path("e/c/x"))]);
    }

    #[test]
    fn a_name_without_folders_may_be_that_of_an_infix() {
        let literal_and_captured = mapping(&[("e/one", "data"), ("e/*", "*")]);
        for literal in [0, 1] {
            let paths = |text: &str| literal_and_captured.reverse(&RemoteName::with_literal(text, literal));
            assert_eq!(paths("data"), [Ok(path("e/one")), Ok(path("e/data"))]);
            assert_eq!(paths("metadata"), [Ok(path("e/metadata"))]);
        }
    }

    #[test]
    fn bad_rules_are_refused_and_named() {
        let refused =
            |pairs: &[(&str, &str)]| PathMapping::parse(pairs.iter().copied()).expect_err("refused");
        for (pairs, pointer) in [
            (&[][..], "/path_mapping"),
            (&[("a/**", "b/*")][..], "/path_mapping/0"),
            (&[("a/*/**", "b/**/*")][..], "/path_mapping/0"),
            (&[("a", "b"), ("a", "c")][..], "/path_mapping/1"),
            (&[("a b", "c")][..], "/path_mapping/0"),
            (&[("a/**", "kv/../**")][..], "/path_mapping/0"),
        ] {
            let error = refused(pairs);
            assert_eq!(
                (error.reason, &*error.violations[0].pointer),
                (Reason::InvalidMapping, pointer),
                "{pairs:?}"
            );
        }
    }

    #[test]
    fn a_folder_is_listed_one_level_where_the_rule_allows_it() {
        let plain = mapping(&[("e/h/**", "kv/data/**")]);
        let level = |name: &str| Listing::Level(RemoteName::with_literal(name, 2));
        let folder = |text: &str| Folder::parse(text).expect("a folder");
        assert_eq!(plain.listings(&folder("e/h")), [level("kv/data")]);
        assert_eq!(plain.listings(&folder("e/h/app")), [level("kv/data/app")]);
        assert_eq!(plain.listings(&folder("e")), [Listing::Folder("e/h/".into())]);
        assert_eq!(plain.listings(&folder("")), [Listing::Folder("e/".into())]);
        assert_eq!(plain.listings(&folder("x")), []);
        let walk = |name: &str| Listing::Walk(Some(RemoteName::new(name)));
        assert_eq!(mapping(&[("e/*/db", "kv/*/db")]).listings(&folder("e")), [walk("kv")]);
        assert_eq!(mapping(&[("e/x/db", "kv/y")]).listings(&folder("e")), [Listing::Folder("e/x/".into())]);
        assert_eq!(mapping(&[("e/x/db", "kv/y")]).listings(&folder("e/x")), [level("kv")]);
    }

    fn separated(rules: &[(&str, &str, &str)]) -> PathMapping {
        let rule =
            |(pattern, template, separator)| GivenRule { pattern, template, separator, ..Default::default() };
        PathMapping::parse_rules(rules.iter().copied().map(rule)).expect("a valid mapping")
    }

    #[test]
    fn a_separator_joins_what_it_can_part_again() {
        let mapping = separated(&[("e/**", "app/**", "--")]);
        let there = |text: &str| {
            mapping.forward(&path(text)).and_then(|(_, name)| name).map(|name| name.as_str().to_owned())
        };
        assert_eq!(there("e/db/password").as_deref(), Some("app--db--password"));
        assert_eq!(there("e/db-password").as_deref(), Some("app--db-password"));
        for text in ["e/a--b", "e/a-/b", "e/--"] {
            assert_eq!(there(text), None, "{text}");
        }
        let back = |text: &str| mapping.reverse(&RemoteName::new(text));
        assert_eq!(back("app--db--password"), [Ok(path("e/db/password"))]);
        assert_eq!(back("app--db---x"), [Ok(path("e/db/-x"))]);
        assert_eq!(back("app--db----x"), [Err(Skip::Charset)]);
        assert_eq!(back("other"), [Err(Skip::NoRule)]);
    }

    #[test]
    fn a_separator_is_a_text_that_can_join() {
        for separator in ["/", "a/b", "*", " ", "ä", "12345678901234567"] {
            let rule = GivenRule { pattern: "e/**", template: "**", separator, ..Default::default() };
            let error = PathMapping::parse_rules([rule]).expect_err(separator);
            assert_eq!(error.violations[0].pointer, "/path_mapping/0", "{separator}");
        }
    }

    proptest! {
        #[test]
        fn a_separated_name_is_one_path(path in paths(), separator in "(-|--|_|__|x)") {
            let mapping = separated(&[("**", "**", separator.as_str())]);
            if let Some((_, Some(name))) = mapping.forward(&path) {
                prop_assert_eq!(mapping.reverse(&name), [Ok(path)]);
            }
        }

        #[test]
        fn what_a_separator_parts_it_joins_again(name in "[a-z_-]{1,20}", separator in "(-|--|_|__|x)") {
            let mapping = separated(&[("**", "**", separator.as_str())]);
            for path in mapping.reverse(&RemoteName::new(name.as_str())).into_iter().flatten() {
                let there = mapping.forward(&path).and_then(|(_, there)| there).map(|there| there.text);
                prop_assert_eq!(there.as_deref(), Some(name.as_str()));
            }
        }

        #[test]
        fn what_maps_forward_maps_back(patterns in proptest::collection::vec(patterns(), 1..4), path in paths()) {
            let pairs = patterns.iter().enumerate().map(|(i, p)| (p.as_str(), format!("kv/r{i}/{p}")));
            let Ok(mapping) = PathMapping::parse(pairs) else { return Ok(()) };
            if let Some((_, Some(name))) = mapping.forward(&path) {
                prop_assert!(mapping.reverse(&name).contains(&Ok(path)));
            }
        }

        #[test]
        fn what_maps_back_maps_forward(patterns in proptest::collection::vec(patterns(), 1..4), name in paths()) {
            let Ok(mapping) = PathMapping::parse(patterns.iter().map(|p| (p.as_str(), p.as_str()))) else { return Ok(()) };
            let name = RemoteName::new(name.as_str());
            for path in mapping.reverse(&name).into_iter().flatten() {
                let there = mapping.forward(&path).and_then(|(_, there)| there).map(|there| there.text);
                prop_assert_eq!(there.as_deref(), Some(name.as_str()));
            }
        }

        #[test]
        fn disjoint_mappings_never_share_a_path(a in patterns(), b in patterns(), path in paths()) {
            let (a, b) = (mapping(&[(a.as_str(), a.as_str())]), mapping(&[(b.as_str(), b.as_str())]));
            if a.overlap(&b).is_none() {
                prop_assert!(a.forward(&path).is_none() || b.forward(&path).is_none());
            }
        }
    }
}
