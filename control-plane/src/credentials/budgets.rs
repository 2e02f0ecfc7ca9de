//! One call budget per credential, and who has which part of it.
//!
//! Backends of a tenant that use the same credential at the same store use the same budget. The control plane has one
//! part of it and so has every connected node of the tenant, all equal; what only the control plane asks, listings and
//! metadata, it need not share.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use scaivault_backends::budget::{Budget, Quotas};
use scaivault_domain::backend::{Provider, Target};
use scaivault_domain::budget::{Share, Slice};
use scaivault_domain::path::SecretPath;
use scaivault_domain::tenant::TenantId;
use scaivault_domain::time::Timestamp;

use crate::audit::unique;

/// How many connected nodes serve a tenant.
type Nodes = Box<dyn Fn(&TenantId) -> usize + Send + Sync>;
/// By tenant and path of the credential; the same credential may be used at several stores.
type Open = HashMap<(TenantId, Option<SecretPath>), Vec<Weak<Shared>>>;

/// The budgets of all credentials in use.
pub struct Budgets {
    nodes: Nodes,
    quotas: fn(&Target) -> Quotas,
    open: Mutex<Open>,
}

impl fmt::Debug for Budgets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Budgets").finish_non_exhaustive()
    }
}

/// The budget of one credential. It lasts as long as somebody holds it.
#[derive(Debug)]
pub(super) struct Shared {
    name: Arc<str>,
    target: Target,
    budget: Arc<Budget>,
    parties: AtomicUsize,
}

impl Shared {
    /// The control plane's part, to be used.
    pub(super) fn budget(&self) -> &Arc<Budget> {
        &self.budget
    }

    /// A node's part; `None` if nothing limits the credential.
    pub(super) fn slice(&self) -> Option<Slice> {
        let share = Share::among(self.parties.load(Ordering::Relaxed));
        (!self.budget.is_unlimited()).then(|| Slice { budget: self.name.clone(), share })
    }

    /// Shares the budget among `parties`; whether they were others before.
    fn share_among(&self, parties: usize) -> bool {
        let changed = self.parties.swap(parties, Ordering::Relaxed) != parties;
        if changed {
            self.budget.scale_values(Share::among(parties));
        }
        changed
    }
}

impl Budgets {
    /// Budgets that the control plane shares with as many as `nodes` says.
    pub fn new(nodes: impl Fn(&TenantId) -> usize + Send + Sync + 'static) -> Self {
        Budgets { nodes: Box::new(nodes), quotas: Quotas::of, open: Mutex::default() }
    }

    /// The budget of the credential of `provider`.
    pub(super) fn of(&self, tenant: &TenantId, provider: &Provider) -> Arc<Shared> {
        let target = provider.target();
        let mut open = self.lock();
        let at = open.entry((tenant.clone(), provider.credentials().cloned())).or_default();
        at.retain(|shared| shared.strong_count() > 0);
        let known = at.iter().filter_map(Weak::upgrade).find(|shared| shared.target.is_same_store(&target));
        known.unwrap_or_else(|| {
            let shared = Arc::new(Shared {
                name: unique(Timestamp::default()).into(),
                budget: Arc::new(Budget::new((self.quotas)(&target))),
                target,
                parties: AtomicUsize::new(1),
            });
            shared.share_among(self.parties(tenant));
            at.push(Arc::downgrade(&shared));
            shared
        })
    }

    /// Divides every budget anew; whether any part has changed.
    pub(super) fn divide(&self) -> bool {
        let mut open = self.lock();
        open.retain(|_, shared| shared.iter().any(|shared| shared.strong_count() > 0));
        let mut changed = false;
        for ((tenant, _), shared) in &*open {
            let limited = shared.iter().filter_map(Weak::upgrade).filter(|one| !one.budget.is_unlimited());
            for shared in limited {
                changed |= shared.share_among(self.parties(tenant));
            }
        }
        changed
    }

    fn parties(&self, tenant: &TenantId) -> usize {
        (self.nodes)(tenant).saturating_add(1)
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use scaivault_domain::backend::{Endpoint, VaultLogin, VaultMethod, VaultTarget};

    use super::*;

    fn tenant() -> TenantId {
        TenantId::parse("acme").expect("a tenant")
    }

    fn provider(endpoint: &str, credentials: &str) -> Provider {
        let target = VaultTarget::at(Endpoint::parse("endpoint", endpoint).expect("a URL"));
        let credentials = SecretPath::check(credentials).expect("a path");
        let method =
            VaultMethod::Token { credentials, lease_policies: Vec::new(), allow_static_on_nodes: false };
        Provider::HashicorpVault { target, login: VaultLogin { mount: "token".into(), method } }
    }

    /// Of a store with the quotas of AWS, with as many nodes as the number says.
    fn budgets(nodes: &Arc<AtomicUsize>) -> Budgets {
        let nodes = nodes.clone();
        let budgets = Budgets::new(move |_| nodes.load(Ordering::Relaxed));
        Budgets { quotas: |_| Quotas::aws(), ..budgets }
    }

    fn bursts(shared: &Shared) -> Vec<f64> {
        shared.budget().remaining().iter().map(|remaining| remaining.burst).collect()
    }

    #[test]
    fn two_backends_with_one_credential_share_one_budget() {
        let budgets = budgets(&Arc::default());
        let one = budgets.of(&tenant(), &provider("https://a", "creds/x"));
        let same = budgets.of(&tenant(), &provider("https://a", "creds/x"));
        assert!(Arc::ptr_eq(&one, &same));
        let others = [
            budgets.of(&tenant(), &provider("https://a", "creds/y")),
            budgets.of(&tenant(), &provider("https://b", "creds/x")),
            budgets.of(&TenantId::parse("other").expect("a tenant"), &provider("https://a", "creds/x")),
        ];
        for other in others {
            assert!(!Arc::ptr_eq(one.budget(), other.budget()));
            assert_ne!(one.slice().map(|slice| slice.budget), other.slice().map(|slice| slice.budget));
        }
    }

    #[test]
    fn every_connected_node_has_as_much_as_the_control_plane() {
        let nodes = Arc::new(AtomicUsize::new(1));
        let budgets = budgets(&nodes);
        let shared = budgets.of(&tenant(), &provider("https://a", "creds/x"));
        let share = || shared.slice().expect("it is limited").share;
        assert_eq!(share(), Share::among(2));
        // Nodes read values one by one: all the rest stays whole.
        assert_eq!(bursts(&shared), [500.0, 5.0, 10.0, 10.0]);
        nodes.store(3, Ordering::Relaxed);
        assert!(budgets.divide());
        assert!(!budgets.divide(), "nothing to tell nodes");
        assert_eq!((share(), bursts(&shared)), (Share::among(4), vec![250.0, 5.0, 10.0, 10.0]));
    }

    #[test]
    fn what_has_no_quotas_is_not_divided() {
        let budgets = Budgets::new(|_| 7);
        let shared = budgets.of(&tenant(), &provider("https://a", "creds/x"));
        assert_eq!(shared.slice(), None);
        assert!(!budgets.divide());
    }

    #[test]
    fn a_budget_ends_with_its_last_backend() {
        let budgets = budgets(&Arc::default());
        let shared = budgets.of(&tenant(), &provider("https://a", "creds/x"));
        budgets.divide();
        assert_eq!(budgets.lock().len(), 1);
        drop(shared);
        budgets.divide();
        assert!(budgets.lock().is_empty());
    }
}
