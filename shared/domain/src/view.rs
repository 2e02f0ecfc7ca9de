//! What a node knows of a tenant's configuration, and the route of a path.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::backend::{BackendId, Target};
use crate::mapping::{PathMapping, RemoteName};
use crate::path::SecretPath;
use crate::sync::{Effective, Mode, SyncSettings};
use crate::tenant::{BackendName, TenantId};

/// The number of a tenant's committed configuration.
pub type Generation = u64;

/// One backend as a node knows it: no login, no credential path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendView {
    /// The backend's id.
    pub id: BackendId,
    /// Its name, for people.
    pub name: BackendName,
    /// Where the store is.
    pub target: Target,
    /// The generation in which the store and its login came to be. A credential that was obtained for another one must
    /// not be sent to this store, nor show what this mapping shows.
    pub login_generation: Generation,
    /// Which paths it owns.
    pub mapping: PathMapping,
    /// How reads are served, where a rule does not say otherwise.
    pub mode: Mode,
    /// How its synced rules are synced.
    pub sync: SyncSettings,
    /// Whether reads are served at all.
    pub enabled: bool,
    /// The deadline of a proxied read.
    pub timeout: Duration,
}

impl BackendView {
    /// What holds for the rule with this index.
    pub fn rule(&self, index: usize) -> Effective {
        self.sync.of(self.mode, &self.mapping.rules()[index])
    }

    /// The rule that owns `path`, and the name there; no name, if the store can have none that stands for it.
    pub fn forward(&self, path: &SecretPath) -> Option<(usize, Option<RemoteName>)> {
        let (rule, name) = self.mapping.forward(path)?;
        Some((rule, name.filter(|name| self.target.kind().naming().has(name))))
    }

    /// The folders of the store (`None`: all of it) in which the names of `rules` lie, none of them twice or within
    /// another.
    pub fn roots(&self, rules: &[usize]) -> Vec<Option<RemoteName>> {
        let listed = || {
            let rules = rules.iter().map(|index| &self.mapping.rules()[*index]);
            rules.filter(|rule| !rule.pattern.is_literal())
        };
        if !self.target.kind().naming().has_slashes() {
            // Without folders there is nothing to list but everything.
            return listed().next().map(|_| None).into_iter().collect();
        }
        let literals: BTreeSet<Vec<&str>> =
            listed().map(|rule| rule.template.literal_prefix().collect()).collect();
        // What stores read into a segment they read into it at the end of a root, too.
        let within = |inner: &[&str], outer: &[&str]| {
            inner.len() > outer.len()
                && inner.starts_with(outer)
                && !inner[outer.len()..].iter().any(|segment| matches!(*segment, "data" | "metadata"))
        };
        literals
            .iter()
            .filter(|inner| !literals.iter().any(|outer| !outer.is_empty() && within(inner, outer)))
            .map(|root| (!root.is_empty()).then(|| RemoteName::new(root.join("/"))))
            .collect()
    }

    /// What those of `rules` name that have no wildcards: nothing has to be listed to know that.
    pub fn literal_names(&self, rules: &[usize]) -> impl Iterator<Item = (SecretPath, RemoteName)> {
        rules.iter().filter_map(|index| {
            let pattern = &self.mapping.rules()[*index].pattern;
            let path = SecretPath::check(pattern.as_str()).ok().filter(|_| pattern.is_literal())?;
            let (_, name) = self.forward(&path)?;
            Some((path, name?))
        })
    }

    /// Those of [`Self::literal_names`] that no listing shows, but that the store describes if it is asked for each.
    pub fn names_told_alone(&self, rules: &[usize]) -> impl Iterator<Item = RemoteName> {
        let naming = self.target.kind().naming();
        self.literal_names(rules).map(|(_, name)| name).filter(move |name| naming.is_told_alone(name))
    }

    /// The rules that are served in `mode`, by index.
    pub fn rules_in(&self, mode: Mode) -> Vec<usize> {
        (0..self.mapping.rules().len()).filter(|index| self.rule(*index).mode == mode).collect()
    }
}

/// One whole generation of a tenant's configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TenantView {
    /// Whose it is.
    pub tenant: TenantId,
    /// Which one.
    pub generation: Generation,
    /// Every backend.
    pub backends: Vec<BackendView>,
}

/// What a path resolves to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// ScaiVault's own store.
    Local,
    /// A name in a backend, read there each time.
    Proxied {
        /// The backend that owns the path.
        backend: Arc<BackendView>,
        /// The name there.
        name: RemoteName,
    },
    /// A name in a backend that our store copies.
    Synced {
        /// The backend that owns the path.
        backend: Arc<BackendView>,
        /// The name there.
        name: RemoteName,
        /// The rule between them, by index.
        rule: usize,
    },
    /// No name in the backend: its store can have none that stands for the path.
    Unrepresentable {
        /// The backend that owns the path.
        backend: Arc<BackendView>,
    },
}

impl Route {
    /// The backend that owns the path.
    pub fn backend(&self) -> Option<&Arc<BackendView>> {
        match self {
            Route::Local => None,
            Route::Proxied { backend, .. }
            | Route::Synced { backend, .. }
            | Route::Unrepresentable { backend } => Some(backend),
        }
    }
}

/// The backends of one tenant, indexed by the literal beginnings of their patterns.
///
/// Routing costs one hash lookup per segment of the path, however many backends the tenant has.
#[derive(Clone, Debug, Default)]
pub struct MountTable {
    backends: Vec<Arc<BackendView>>,
    by_prefix: HashMap<String, Vec<u32>>,
}

impl MountTable {
    /// Builds the table. Overlaps between backends were refused when they were configured.
    pub fn new(backends: impl IntoIterator<Item = BackendView>) -> Self {
        let mut table = MountTable::default();
        for backend in backends {
            let index = u32::try_from(table.backends.len()).expect("fewer backends than u32::MAX");
            for rule in backend.mapping.rules() {
                let prefix = rule.pattern.literal_prefix().collect::<Vec<_>>().join("/");
                let slot = table.by_prefix.entry(prefix).or_default();
                if slot.last() != Some(&index) {
                    slot.push(index);
                }
            }
            table.backends.push(Arc::new(backend));
        }
        table
    }

    /// Where `path` lives.
    pub fn route(&self, path: &SecretPath) -> Route {
        let text = path.as_str();
        // Longest beginning first: most tables have one mount that fits, and it is the most specific.
        let ends = std::iter::once(text.len()).chain(text.rmatch_indices('/').map(|(at, _)| at)).chain([0]);
        for end in ends {
            for index in self.by_prefix.get(&text[..end]).into_iter().flatten() {
                let backend = &self.backends[*index as usize];
                let backend = backend.clone();
                match backend.forward(path) {
                    Some((_, None)) => return Route::Unrepresentable { backend },
                    Some((rule, Some(name))) if backend.rule(rule).mode == Mode::Sync => {
                        return Route::Synced { backend, name, rule };
                    }
                    Some((_, Some(name))) => return Route::Proxied { backend, name },
                    None => {}
                }
            }
        }
        Route::Local
    }

    /// Every backend, in the order of the view.
    pub fn backends(&self) -> &[Arc<BackendView>] {
        &self.backends
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::backend::{Endpoint, VaultTarget};
    use crate::pattern::tests::{paths, patterns};

    fn backend(number: u8, pairs: &[(&str, &str)]) -> BackendView {
        BackendView {
            id: BackendId::from_random([number; 10]),
            name: BackendName::parse(&format!("b{number}")).unwrap(),
            target: Target::HashicorpVault(VaultTarget::at(
                Endpoint::parse("endpoint", "https://vault").unwrap(),
            )),
            login_generation: 1,
            mapping: PathMapping::parse(pairs.iter().copied()).unwrap(),
            mode: Mode::Proxy,
            sync: SyncSettings::default(),
            enabled: true,
            timeout: Duration::from_secs(5),
        }
    }

    #[test]
    fn a_path_goes_to_the_backend_that_owns_it() {
        let table = MountTable::new([
            backend(1, &[("external/a/**", "kv/**")]),
            backend(2, &[("external/b/x", "kv/x"), ("*/c", "kv/*")]),
        ]);
        let owner = |text: &str| match table.route(&SecretPath::check(text).unwrap()) {
            Route::Local | Route::Unrepresentable { .. } => String::new(),
            Route::Proxied { backend, name } | Route::Synced { backend, name, .. } => {
                format!("{} {}", backend.name, name.as_str())
            }
        };
        assert_eq!(owner("external/a/x/y"), "b1 kv/x/y");
        assert_eq!(owner("external/a"), "");
        assert_eq!(owner("external/b/x"), "b2 kv/x");
        assert_eq!(owner("z/c"), "b2 kv/z");
        assert_eq!(owner("z/d"), "");
    }

    proptest! {
        #[test]
        fn the_index_routes_as_a_plain_search_does(rules in proptest::collection::vec(patterns(), 1..4), path in paths()) {
            let pairs: Vec<_> = rules.iter().map(|p| (p.as_str(), p.as_str())).collect();
            let Ok(mapping) = PathMapping::parse(pairs.clone()) else { return Ok(()) };
            let expected = mapping.forward(&path).and_then(|(_, name)| name);
            let found = match MountTable::new([backend(1, &pairs)]).route(&path) {
                Route::Local | Route::Unrepresentable { .. } => None,
                Route::Proxied { name, .. } | Route::Synced { name, .. } => Some(name),
            };
            prop_assert_eq!(found, expected);
        }
    }
}
