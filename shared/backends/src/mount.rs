//! Where a name lives in Vault: below which KV mount, and by which path in it. Pure.

use scaivault_domain::backend::{KvMount, KvVersion};
use scaivault_domain::mapping::RemoteName;

use crate::error::BackendError;

/// A KV mount. Its path may have several segments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mount {
    segments: Vec<String>,
    pub(crate) version: KvVersion,
    source: Source,
}

/// Who says where the mount is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Configured,
    /// Found for the literal part of a name, so it can serve no name that ends its literals before the mount does.
    LookedUp,
}

/// Where a folder is, seen from a mount.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Folder<'n> {
    /// The mount lies below it; this is the next segment on the way there.
    Above(String),
    /// In the mount, under these segments.
    Inside(Vec<&'n str>),
}

impl Mount {
    pub(crate) fn configured(mount: &KvMount) -> Self {
        Mount { segments: split(&mount.path), version: mount.version, source: Source::Configured }
    }

    /// As Vault names it, with a slash at the end.
    pub(crate) fn looked_up(path: &str, version: KvVersion) -> Self {
        Mount { segments: split(path), version, source: Source::LookedUp }
    }

    pub(crate) fn segments(&self) -> impl Iterator<Item = &str> {
        self.segments.iter().map(String::as_str)
    }

    /// The path of `name` in this mount; may be empty. On version 2 the API's infix is no part of it, where the
    /// template has it right behind the mount; what a wildcard stood for is never taken for one.
    pub(crate) fn path_of<'n>(&self, name: &'n RemoteName) -> Result<Vec<&'n str>, BackendError> {
        let depth = self.segments.len();
        let segments: Vec<_> = name.segments().collect();
        let outside = self.source == Source::LookedUp && name.literal() < depth;
        if outside || !segments.iter().take(depth).copied().eq(self.segments()) {
            return Err(BackendError::MountNotLiteral);
        }
        let infix = self.version == KvVersion::V2
            && name.literal() > depth
            && matches!(segments.get(depth), Some(&"data" | &"metadata"));
        Ok(segments[depth + usize::from(infix)..].to_vec())
    }

    /// Where the folder `name` (`None`: of everything) is.
    pub(crate) fn folder<'n>(&self, name: Option<&'n RemoteName>) -> Result<Folder<'n>, BackendError> {
        let above: Vec<_> = name.into_iter().flat_map(RemoteName::segments).collect();
        match self.segments.get(above.len()) {
            Some(next)
                if self.source == Source::Configured && self.segments().zip(&above).all(|(a, b)| a == *b) =>
            {
                Ok(Folder::Above(next.clone()))
            }
            _ => {
                name.map_or(Err(BackendError::MountNotLiteral), |name| self.path_of(name).map(Folder::Inside))
            }
        }
    }
}

fn split(path: &str) -> Vec<String> {
    path.trim_matches('/').split('/').map(str::to_owned).collect()
}

/// The part of a name that its mount must lie in: what Vault is asked about.
pub(crate) fn literal_part(name: &RemoteName) -> Result<Vec<&str>, BackendError> {
    let literal: Vec<_> = name.segments().take(name.literal()).collect();
    if literal.is_empty() { Err(BackendError::MountNotLiteral) } else { Ok(literal) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(mount: &Mount, text: &str, literal: usize) -> Option<String> {
        mount.path_of(&RemoteName::with_literal(text, literal)).ok().map(|path| path.join("/"))
    }

    #[test]
    fn one_literal_infix_is_dropped_and_never_a_captured_one() {
        let kv = Mount::looked_up("kv/", KvVersion::V2);
        for (text, literal, expected) in [
            ("kv/data/x", 2, "x"),
            ("kv/metadata/x", 2, "x"),
            ("kv/x", 1, "x"),
            ("kv/data/x", 1, "data/x"),
            ("kv/data/data/x", 2, "data/x"),
            ("kv/data/data/x", 3, "data/x"),
            ("kv/app/data/x", 4, "app/data/x"),
            ("kv/data", 2, ""),
            ("kv", 1, ""),
        ] {
            assert_eq!(path(&kv, text, literal).as_deref(), Some(expected), "{text} {literal}");
        }
    }

    #[test]
    fn data_is_an_ordinary_folder_of_version_1() {
        let kv = Mount::looked_up("kv/", KvVersion::V1);
        assert_eq!(path(&kv, "kv/data/x", 2).as_deref(), Some("data/x"));
    }

    #[test]
    fn a_mount_may_be_nested_but_lies_in_the_literals() {
        let nested = Mount::looked_up("team/kv/", KvVersion::V2);
        assert_eq!(path(&nested, "team/kv/data/x", 3).as_deref(), Some("x"));
        assert_eq!(path(&nested, "team/kv/x", 1), None);
        assert_eq!(path(&nested, "team/kvx/x", 2), None);
        assert_eq!(path(&nested, "team", 1), None);
        let configured = Mount::configured(&KvMount { path: "team/kv".into(), version: KvVersion::V2 });
        assert_eq!(path(&configured, "team/kv/data/x", 1).as_deref(), Some("data/x"));
    }

    #[test]
    fn a_configured_mount_is_found_from_above() {
        let mount = Mount::configured(&KvMount { path: "team/kv".into(), version: KvVersion::V2 });
        let folder = |text: &str| mount.folder(Some(&RemoteName::new(text))).map(|f| format!("{f:?}"));
        assert_eq!(mount.folder(None), Ok(Folder::Above("team".into())));
        assert_eq!(folder("team").as_deref(), Ok(r#"Above("kv")"#));
        assert_eq!(folder("team/kv").as_deref(), Ok("Inside([])"));
        assert_eq!(folder("team/kv/data/a").as_deref(), Ok(r#"Inside(["a"])"#));
        assert_eq!(folder("other"), Err(BackendError::MountNotLiteral));
    }
}
