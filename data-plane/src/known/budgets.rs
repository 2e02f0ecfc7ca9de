//! This node's slices of call budgets.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use scaivault_backends::budget::{Budget, Quotas};
use scaivault_domain::backend::{BackendId, Target};
use scaivault_domain::budget::{Share, Slice};
use scaivault_domain::lease::LeaseKey;
use scaivault_domain::tenant::TenantId;

/// The slices that came with leases, and the budgets that are made of them. A slice outlives its lease: the calls that
/// were made with one credential count on with the next.
#[derive(Debug)]
pub(super) struct Budgets {
    unlimited: Arc<Budget>,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    slices: HashMap<LeaseKey, Slice>,
    /// By tenant and name: backends with the same credential use the same.
    open: HashMap<(TenantId, Arc<str>), (Quotas, Arc<Budget>)>,
}

impl Default for Budgets {
    fn default() -> Self {
        Budgets { unlimited: Arc::new(Budget::new(Quotas::unlimited())), inner: Mutex::default() }
    }
}

impl Budgets {
    /// What came with a lease. A control plane that shares no budget leaves the node all of it.
    pub(super) fn take(&self, key: &LeaseKey, slice: Option<Slice>) {
        let mut inner = self.lock();
        match slice {
            Some(slice) => {
                if let Some((_, budget)) = inner.open.get(&(key.tenant.clone(), slice.budget.clone())) {
                    budget.scale(slice.share);
                }
                inner.slices.insert(key.clone(), slice);
            }
            None => {
                inner.slices.remove(key);
            }
        }
    }

    /// Forgets the slices of leases that are not `used`, and budgets that nobody has a slice of.
    pub(super) fn retain(&self, used: impl Fn(&LeaseKey) -> bool) {
        let Inner { slices, open } = &mut *self.lock();
        slices.retain(|key, _| used(key));
        open.retain(|(tenant, name), _| {
            let key = |backend| LeaseKey { tenant: tenant.clone(), backend };
            slices.iter().any(|(key, slice)| key.tenant == *tenant && slice.budget == *name)
                || BackendId::parse(name).is_ok_and(|backend| used(&key(backend)))
        });
    }

    /// What the node may ask of `target`.
    pub(super) fn of(&self, key: &LeaseKey, target: &Target) -> Arc<Budget> {
        self.with(key, Quotas::of(target))
    }

    fn with(&self, key: &LeaseKey, quotas: Quotas) -> Arc<Budget> {
        if quotas == Quotas::unlimited() {
            return self.unlimited.clone();
        }
        let mut inner = self.lock();
        let slice = inner.slices.get(key);
        let name = (key.tenant.clone(), name_of(key, slice));
        let share = slice.map_or(Share::WHOLE, |slice| slice.share);
        match inner.open.get(&name) {
            Some((of, budget)) if *of == quotas => budget.clone(),
            _ => {
                let budget = Arc::new(Budget::new(quotas));
                budget.scale(share);
                inner.open.insert(name, (quotas, budget.clone()));
                budget
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The name of a budget; one that is not shared has that of its backend.
fn name_of(key: &LeaseKey, slice: Option<&Slice>) -> Arc<str> {
    slice.map_or_else(|| key.backend.as_str().into(), |slice| slice.budget.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: u8) -> LeaseKey {
        let tenant = TenantId::parse("acme").expect("a tenant");
        LeaseKey { tenant, backend: BackendId::from_random([number; 10]) }
    }

    fn slice(name: &str, parties: usize) -> Option<Slice> {
        Some(Slice { budget: name.into(), share: Share::among(parties) })
    }

    fn burst(budget: &Budget) -> f64 {
        budget.remaining()[0].burst
    }

    #[test]
    fn backends_with_one_credential_use_one_slice() {
        let budgets = Budgets::default();
        budgets.take(&key(1), slice("a", 4));
        budgets.take(&key(2), slice("a", 4));
        budgets.take(&key(3), slice("b", 4));
        let [one, two, three] = [1, 2, 3].map(|number| budgets.with(&key(number), Quotas::aws()));
        assert!(Arc::ptr_eq(&one, &two) && !Arc::ptr_eq(&one, &three));
        assert_eq!(burst(&one), 250.0);
    }

    #[test]
    fn a_slice_that_changes_changes_the_budget_in_use() {
        let budgets = Budgets::default();
        budgets.take(&key(1), slice("a", 2));
        let budget = budgets.with(&key(1), Quotas::aws());
        assert_eq!(burst(&budget), 500.0);
        budgets.take(&key(1), slice("a", 5));
        assert_eq!(burst(&budget), 200.0);
        assert!(Arc::ptr_eq(&budget, &budgets.with(&key(1), Quotas::aws())));
    }

    #[test]
    fn a_control_plane_that_shares_nothing_leaves_all_of_it() {
        let budgets = Budgets::default();
        budgets.take(&key(1), None);
        assert_eq!(burst(&budgets.with(&key(1), Quotas::aws())), 1000.0);
        assert!(budgets.with(&key(2), Quotas::unlimited()).is_unlimited());
    }

    #[test]
    fn what_nobody_uses_is_forgotten() {
        let budgets = Budgets::default();
        for number in [1, 2] {
            budgets.take(&key(number), slice("a", 2));
            budgets.with(&key(number), Quotas::aws());
        }
        budgets.retain(|used| *used == key(2));
        assert_eq!(budgets.lock().open.len(), 1);
        budgets.retain(|_| false);
        assert!(budgets.lock().open.is_empty() && budgets.lock().slices.is_empty());
    }
}
