//! Patterns over paths and the templates they fill: `*` is one whole segment, `**` is one or more.
//!
//! The matcher is ours because the language must be invertible and linear: with at most one `**` there is exactly one
//! way to match, so no input can make it blow up.

use std::fmt;

use crate::path::{SecretPath, check_segment};

/// Longest pattern or template in bytes.
pub const MAX_TEXT_BYTES: usize = 1024;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Segment {
    Literal(Box<str>),
    One,
    Many,
}

/// What the wildcards of a match stood for, in order. Each is one segment, or for `**` one or more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Captures<'t>(Vec<Vec<&'t str>>);

/// A sequence of literal segments and wildcards; what a pattern and a template have in common.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Glob {
    text: Box<str>,
    segments: Box<[Segment]>,
}

impl Glob {
    fn parse(text: &str, literal: impl Fn(&str) -> Result<(), &'static str>) -> Result<Self, &'static str> {
        if text.len() > MAX_TEXT_BYTES {
            return Err("is longer than 1024 bytes");
        }
        let segments = text
            .split('/')
            .map(|segment| match segment {
                "*" => Ok(Segment::One),
                "**" => Ok(Segment::Many),
                "" => Err("has an empty segment"),
                _ if segment.contains('*') => Err("has a wildcard that does not stand for a whole segment"),
                _ => literal(segment).map(|()| Segment::Literal(segment.into())),
            })
            .collect::<Result<Box<[_]>, _>>()?;
        if segments.iter().filter(|s| **s == Segment::Many).count() > 1 {
            return Err("has more than one `**`");
        }
        Ok(Glob { text: text.into(), segments })
    }

    fn captures<'t>(&self, name: &[&'t str]) -> Option<Captures<'t>> {
        let fixed = self.segments.len();
        let many = self.segments.iter().position(|s| *s == Segment::Many);
        let span = match many {
            Some(_) => (name.len() + 1).checked_sub(fixed).filter(|n| *n >= 1)?,
            None if name.len() == fixed => 1,
            None => return None,
        };
        let mut captures = Vec::new();
        let mut rest = name;
        for segment in &self.segments {
            let take = if *segment == Segment::Many { span } else { 1 };
            let (here, after) = rest.split_at(take);
            match segment {
                Segment::Literal(literal) if **literal != *here[0] => return None,
                Segment::Literal(_) => {}
                Segment::One | Segment::Many => captures.push(here.to_vec()),
            }
            rest = after;
        }
        Some(Captures(captures))
    }

    fn fill(&self, captures: &Captures<'_>) -> String {
        self.fill_segments(captures).join("/")
    }

    fn fill_segments<'n>(&'n self, captures: &Captures<'n>) -> Vec<&'n str> {
        let mut wildcards = captures.0.iter();
        let mut name = Vec::new();
        for segment in &self.segments {
            match segment {
                Segment::Literal(literal) => name.push(&**literal),
                Segment::One | Segment::Many => name.extend(wildcards.next().into_iter().flatten()),
            }
        }
        name
    }

    /// Literal segments before the first wildcard.
    fn literal_prefix(&self) -> impl Iterator<Item = &str> {
        self.segments.iter().map_while(|segment| match segment {
            Segment::Literal(literal) => Some(&**literal),
            Segment::One | Segment::Many => None,
        })
    }

    fn literals(&self) -> impl Iterator<Item = &str> {
        self.segments.iter().filter_map(|segment| match segment {
            Segment::Literal(literal) => Some(&**literal),
            Segment::One | Segment::Many => None,
        })
    }

    fn wildcards(&self) -> impl Iterator<Item = &Segment> {
        self.segments.iter().filter(|s| !matches!(s, Segment::Literal(_)))
    }

    /// `**` as one segment followed by any number of segments, which is what the set questions below are asked in.
    fn steps(&self) -> Vec<Step<'_>> {
        let mut steps = Vec::with_capacity(self.segments.len() + 1);
        for segment in &self.segments {
            match segment {
                Segment::Literal(literal) => steps.push(Step::Literal(literal)),
                Segment::One => steps.push(Step::One),
                Segment::Many => steps.extend([Step::One, Step::Any]),
            }
        }
        steps
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Step<'a> {
    Literal(&'a str),
    One,
    /// Zero or more segments.
    Any,
}

fn intersects(a: &[Step<'_>], b: &[Step<'_>]) -> bool {
    match (a.split_first(), b.split_first()) {
        (None, None) => true,
        (Some((Step::Any, rest)), None) => intersects(rest, b),
        (None, Some((Step::Any, rest))) => intersects(a, rest),
        (None, Some(_)) | (Some(_), None) => false,
        (Some((Step::Any, a_rest)), Some((_, b_rest))) => {
            // `Any` ends here, or takes one more step of the other side.
            intersects(a_rest, b) || intersects(a, b_rest)
        }
        (Some(_), Some((Step::Any, _))) => intersects(b, a),
        (Some((x, a_rest)), Some((y, b_rest))) => {
            (*x == Step::One || *y == Step::One || x == y) && intersects(a_rest, b_rest)
        }
    }
}

fn covers(outer: &[Step<'_>], inner: &[Step<'_>]) -> bool {
    match (outer.split_first(), inner.split_first()) {
        (None, None) => true,
        (None, Some(_)) => false,
        (Some((Step::Any, rest)), None) => covers(rest, inner),
        (Some(_), None) => false,
        (Some((Step::Any, rest)), Some((_, inner_rest))) => covers(rest, inner) || covers(outer, inner_rest),
        (Some(_), Some((Step::Any, _))) => false,
        (Some((x, outer_rest)), Some((y, inner_rest))) => {
            (*x == Step::One || x == y) && covers(outer_rest, inner_rest)
        }
    }
}

/// A set of secret paths, e.g. `external/hashicorp/**`; the language of path mappings and of policies.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Pattern(Glob);

impl Pattern {
    /// Parses `text`.
    ///
    /// # Errors
    /// What is wrong, to be read behind "the pattern …".
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        Glob::parse(text, |s| check_segment(s).map_err(|_| "has a segment that no secret path can have"))
            .map(Self)
    }

    /// The pattern as it was written.
    pub fn as_str(&self) -> &str {
        &self.0.text
    }

    /// Whether `path` is in the set.
    pub fn matches(&self, path: &SecretPath) -> bool {
        self.captures(&path.segments().collect::<Vec<_>>()).is_some()
    }

    /// What the wildcards stand for, if the path of these segments is in the set.
    pub fn captures<'t>(&self, segments: &[&'t str]) -> Option<Captures<'t>> {
        self.0.captures(segments)
    }

    /// The text with the wildcards replaced. It need not be a valid path: captures of a remote name may be anything.
    pub fn fill(&self, captures: &Captures<'_>) -> String {
        self.0.fill(captures)
    }

    /// Literal segments before the first wildcard.
    pub fn literal_prefix(&self) -> impl Iterator<Item = &str> {
        self.0.literal_prefix()
    }

    /// Whether some path could be in both sets.
    pub fn intersects(&self, other: &Pattern) -> bool {
        intersects(&self.0.steps(), &other.0.steps())
    }

    /// Whether every path of `other` is in this set.
    pub fn covers(&self, other: &Pattern) -> bool {
        covers(&self.0.steps(), &other.0.steps())
    }

    /// Whether some path below the folder of these segments could be in the set.
    pub fn reaches_below<'a>(&self, folder: impl Iterator<Item = &'a str>) -> bool {
        let mut steps: Vec<Step<'a>> = folder.map(Step::Literal).collect();
        steps.extend([Step::One, Step::Any]);
        intersects(&self.0.steps(), &steps)
    }

    /// Whether every path below the folder of these segments is in the set.
    pub fn covers_below<'a>(&self, folder: impl Iterator<Item = &'a str>) -> bool {
        let mut steps: Vec<Step<'a>> = folder.map(Step::Literal).collect();
        steps.extend([Step::One, Step::Any]);
        covers(&self.0.steps(), &steps)
    }

    /// Whether this is a pattern without wildcards: the name of one path.
    pub fn is_literal(&self) -> bool {
        self.0.wildcards().next().is_none()
    }
}

/// What a pattern's captures are put into to give the name in the remote store, e.g. `secret/data/**`.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Template(Glob);

impl Template {
    /// Parses `text`. Literal segments may hold whatever a remote store may have, but no control characters, `.` or `..`.
    ///
    /// # Errors
    /// What is wrong, to be read behind "the template …".
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        Glob::parse(text, |segment| {
            if segment == "." || segment == ".." || segment.chars().any(char::is_control) {
                return Err("has a segment that no remote name can have");
            }
            Ok(())
        })
        .map(Self)
    }

    /// The template as it was written.
    pub fn as_str(&self) -> &str {
        &self.0.text
    }

    /// The remote name.
    pub fn fill(&self, captures: &Captures<'_>) -> String {
        self.0.fill(captures)
    }

    /// The segments of the remote name.
    pub fn fill_segments<'n>(&'n self, captures: &Captures<'n>) -> Vec<&'n str> {
        self.0.fill_segments(captures)
    }

    /// What the wildcards stand for, if this template makes the name of these segments.
    pub fn captures<'t>(&self, segments: &[&'t str]) -> Option<Captures<'t>> {
        self.0.captures(segments)
    }

    /// Literal segments before the first wildcard. Every name that the template makes begins with them.
    pub fn literal_prefix(&self) -> impl Iterator<Item = &str> {
        self.0.literal_prefix()
    }

    /// Every literal segment, wherever it stands.
    pub fn literals(&self) -> impl Iterator<Item = &str> {
        self.0.literals()
    }

    /// How many segments it has, wildcards included. No name that it makes has fewer.
    pub fn segment_count(&self) -> usize {
        self.0.segments.len()
    }

    /// Whether `pattern` has the same wildcards in the same order, so that captures fit both ways.
    pub fn fits(&self, pattern: &Pattern) -> bool {
        self.0.wildcards().eq(pattern.0.wildcards())
    }
}

macro_rules! textual {
    ($type:ident) => {
        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0.text, f)
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0.text)
            }
        }

        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0.text)
            }
        }

        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                Self::parse(&String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
            }
        }
    };
}

textual!(Pattern);
textual!(Template);

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pattern(text: &str) -> Pattern {
        Pattern::parse(text).expect("a valid pattern")
    }

    /// Patterns over a tiny alphabet, so that matches and overlaps are common.
    pub(crate) fn patterns() -> impl Strategy<Value = Pattern> {
        proptest::collection::vec(
            prop_oneof![3 => "[ab]", 1 => Just("*".into()), 1 => Just("**".into())],
            1..5,
        )
        .prop_filter_map("one `**`", |segments: Vec<String>| Pattern::parse(&segments.join("/")).ok())
    }

    pub(crate) fn paths() -> impl Strategy<Value = SecretPath> {
        proptest::collection::vec("[abc]", 1..6)
            .prop_map(|s| SecretPath::check(&s.join("/")).expect("in the grammar"))
    }

    #[test]
    fn wildcards_stand_for_whole_segments() {
        assert!(pattern("a/**").matches(&SecretPath::check("a/b/c").unwrap()));
        assert!(!pattern("a/**").matches(&SecretPath::check("a").unwrap()));
        assert!(!pattern("a/*").matches(&SecretPath::check("a/b/c").unwrap()));
        assert!(pattern("**/z").matches(&SecretPath::check("a/b/z").unwrap()));
        assert!(!pattern("**/z").matches(&SecretPath::check("z").unwrap()));
        assert!(pattern("a/**/z").matches(&SecretPath::check("a/z/z").unwrap()));
        for text in ["", "/", "a//b", "a*", "**a", "**/b/**", "a/", "ä", "a/../b"] {
            assert!(Pattern::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_pattern_covers_only_what_it_always_matches() {
        assert!(pattern("**").covers(&pattern("a/**")));
        assert!(pattern("a/**").covers(&pattern("a/*/c")));
        assert!(pattern("a/**").covers(&pattern("a/**/c")));
        assert!(!pattern("a/*").covers(&pattern("a/**")));
        assert!(!pattern("a/**/c").covers(&pattern("a/**")));
        assert!(!pattern("a/**").covers(&pattern("a")));
    }

    #[test]
    fn the_worst_pair_is_compared_quickly() {
        let long = format!("{}/**/{}", vec!["*"; 200].join("/"), vec!["a"; 100].join("/"));
        assert!(pattern(&long).intersects(&pattern(&long)));
        assert!(pattern(&long).covers(&pattern(&long)));
    }

    proptest! {
        #[test]
        fn intersection_is_symmetric_and_sound(a in patterns(), b in patterns(), path in paths()) {
            prop_assert_eq!(a.intersects(&b), b.intersects(&a));
            if a.matches(&path) && b.matches(&path) {
                prop_assert!(a.intersects(&b));
            }
        }

        #[test]
        fn cover_is_sound(outer in patterns(), inner in patterns(), path in paths()) {
            if outer.covers(&inner) && inner.matches(&path) {
                prop_assert!(outer.matches(&path));
            }
        }

        #[test]
        fn captures_put_back_give_the_same_path(pattern in patterns(), path in paths()) {
            let segments: Vec<_> = path.segments().collect();
            if let Some(captures) = pattern.captures(&segments) {
                prop_assert_eq!(pattern.fill(&captures), path.as_str());
            }
        }
    }
}
