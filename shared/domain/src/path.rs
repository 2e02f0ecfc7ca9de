//! Secret paths: one grammar, one spelling, one door.

use std::fmt;

use crate::error::{Error, Reason};

/// Longest path in bytes.
pub const MAX_BYTES: usize = 512;
/// Most segments of a path.
pub const MAX_SEGMENTS: usize = 32;
/// Longest segment in bytes.
pub const MAX_SEGMENT_BYTES: usize = 255;

/// Why a text is no [`SecretPath`]. The first two are also reasons to skip a name in a sync.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PathFault {
    /// A character or segment outside the grammar; no spelling of it is accepted.
    Charset,
    /// More bytes or segments than a path may have.
    TooLong,
}

impl PathFault {
    /// What is wrong, without the text itself.
    pub fn detail(self) -> &'static str {
        match self {
            PathFault::Charset => {
                "segments are made of A-Z a-z 0-9 . _ - and joined by single slashes; `.` and `..` are no segments"
            }
            PathFault::TooLong => "at most 512 bytes, 32 segments and 255 bytes a segment",
        }
    }
}

/// Whether `segment` may stand in a [`SecretPath`].
pub fn check_segment(segment: &str) -> Result<(), PathFault> {
    if segment.is_empty() || segment == "." || segment == ".." {
        return Err(PathFault::Charset);
    }
    if !segment.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-')) {
        return Err(PathFault::Charset);
    }
    if segment.len() > MAX_SEGMENT_BYTES {
        return Err(PathFault::TooLong);
    }
    Ok(())
}

/// A path of a secret, e.g. `external/hashicorp/app/db`. [`SecretPath::parse`] is the only door, so every callee may
/// trust it: it is never empty, has no `.`, `..`, empty or encoded segments, and exactly one spelling.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SecretPath(Box<str>);

impl SecretPath {
    /// Parses `text` exactly as it stands: nothing is trimmed, decoded or normalised.
    ///
    /// # Errors
    /// The fault, for callers that skip instead of refuse.
    pub fn check(text: &str) -> Result<Self, PathFault> {
        if text.len() > MAX_BYTES {
            return Err(PathFault::TooLong);
        }
        let mut segments = 0;
        for segment in text.split('/') {
            check_segment(segment)?;
            segments += 1;
        }
        if segments > MAX_SEGMENTS {
            return Err(PathFault::TooLong);
        }
        Ok(SecretPath(text.into()))
    }

    /// [`check`](Self::check) as the API answers it.
    ///
    /// # Errors
    /// `invalid_path`, naming the field `path`.
    pub fn parse(text: &str) -> Result<Self, Error> {
        Self::check(text).map_err(|fault| Error::field(Reason::InvalidPath, "/path", fault.detail()))
    }

    /// The path as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The segments in order; at least one.
    pub fn segments(&self) -> impl DoubleEndedIterator<Item = &str> + Clone {
        self.0.split('/')
    }
}

impl fmt::Display for SecretPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for SecretPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl serde::Serialize for SecretPath {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> serde::Deserialize<'de> for SecretPath {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::check(&text).map_err(|fault| serde::de::Error::custom(fault.detail()))
    }
}

/// A folder of paths: all of them, or those below one path. Written `""` or `a/b`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Folder(Option<SecretPath>);

impl Folder {
    /// The folder that holds everything.
    pub const ROOT: Folder = Folder(None);

    /// Parses `""`, `a/b` or `a/b/`.
    ///
    /// # Errors
    /// `invalid_path`, naming the field `path`.
    pub fn parse(text: &str) -> Result<Self, Error> {
        match text.strip_suffix('/').unwrap_or(text) {
            "" if text.is_empty() => Ok(Folder::ROOT),
            inner => SecretPath::parse(inner).map(|path| Folder(Some(path))),
        }
    }

    /// The segments in order; none for the root.
    pub fn segments(&self) -> impl Iterator<Item = &str> + Clone {
        self.0.iter().flat_map(SecretPath::segments)
    }

    /// What every path in the folder begins with: `""` or `a/b/`.
    pub fn prefix(&self) -> String {
        self.0.as_ref().map_or_else(String::new, |path| format!("{path}/"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn one_spelling_only() {
        for text in [
            "", "/a", "a/", "a//b", ".", "..", "a/../b", "a/./b", "a%2fb", "a b", "a\0b", "ä", "a\\b", "a\n",
            "*", "a/**",
        ] {
            assert_eq!(SecretPath::check(text), Err(PathFault::Charset), "{text:?}");
        }
        for text in ["a", "a/b", "A/b.c/_-", "...", "a/..b"] {
            assert_eq!(SecretPath::check(text).map(|p| p.as_str().to_owned()), Ok(text.to_owned()));
        }
    }

    #[test]
    fn limits_are_inclusive() {
        assert!(SecretPath::check(&"a".repeat(255)).is_ok());
        assert_eq!(SecretPath::check(&"a".repeat(256)), Err(PathFault::TooLong));
        assert!(SecretPath::check(&["a"; 32].join("/")).is_ok());
        assert_eq!(SecretPath::check(&["a"; 33].join("/")), Err(PathFault::TooLong));
        let long = format!("{0}/{0}/{1}", "a".repeat(200), "b".repeat(110));
        assert_eq!(long.len(), 512);
        assert!(SecretPath::check(&long).is_ok());
        assert_eq!(SecretPath::check(&format!("{long}c")), Err(PathFault::TooLong));
    }

    proptest! {
        #[test]
        fn whatever_parses_prints_as_it_was_written(text in ".{0,40}") {
            if let Ok(path) = SecretPath::check(&text) {
                prop_assert_eq!(path.as_str(), text.as_str());
                prop_assert_eq!(path.segments().collect::<Vec<_>>().join("/"), text);
            }
        }
    }
}
