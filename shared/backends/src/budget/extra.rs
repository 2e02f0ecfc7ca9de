//! Calls that an adapter makes besides the one that the guard has paid for.
//!
//! The guard puts a [`Purse`] around each call that it lets through, and the adapter finds it by its task. So adapters
//! still know no budget, and nothing between the two has to hand it on.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::task::futures::TaskLocalFuture;

use super::{Budget, Quota, Urgency};
use crate::error::BackendError;

tokio::task_local! {
    static PURSE: Arc<Purse>;
}

/// What the calls behind one call are paid from.
pub(crate) struct Purse {
    budget: Option<Arc<Budget>>,
    urgency: Urgency,
    further: Mutex<Further>,
}

/// The one further call that is asked for.
#[derive(Clone, Copy)]
struct Further {
    /// It was waited for before.
    paid: Option<Quota>,
    /// It was not made, for it would have been one too many.
    unpaid: Option<Quota>,
}

impl Purse {
    pub(super) fn new(budget: Option<Arc<Budget>>, urgency: Urgency, paid: Option<Quota>) -> Self {
        Purse { budget, urgency, further: Mutex::new(Further { paid, unpaid: None }) }
    }

    /// `call`, within which [`ask`] and [`note`] find this purse.
    pub(crate) fn around<F: Future>(self: &Arc<Self>, call: F) -> TaskLocalFuture<Arc<Purse>, F> {
        PURSE.scope(self.clone(), call)
    }

    /// What has to be paid before the call can come to its end.
    pub(crate) fn unpaid(&self) -> Option<Quota> {
        self.further.lock().unwrap_or_else(PoisonError::into_inner).unpaid
    }

    fn ask(&self, quota: Quota) -> bool {
        let Some(pool) = self.budget.as_ref().and_then(|budget| budget.pool(quota)) else { return true };
        let mut further = self.further.lock().unwrap_or_else(PoisonError::into_inner);
        if further.paid == Some(quota) {
            further.paid = None;
            return true;
        }
        let is_paid = pool.at_once(self.urgency);
        if !is_paid {
            further.unpaid = Some(quota);
        }
        is_paid
    }
}

/// Whether one further call of `quota` may be made now. For calls of a scarcer quota than the first one's, once in a
/// call: the guard waits for one of them only.
///
/// # Errors
/// What the adapter is to end with. The guard then waits until there is a token, holding no place at the store, and
/// makes the whole call again.
pub(crate) fn ask(quota: Quota) -> Result<(), BackendError> {
    // Without a guard nobody counts.
    match PURSE.try_with(|purse| purse.ask(quota)) {
        Ok(false) => Err(BackendError::Throttled { retry_after: None }),
        Ok(true) | Err(_) => Ok(()),
    }
}

/// Counts one further call of `quota`, which is made anyway. Whoever asks the budget next waits the longer.
pub(crate) fn note(quota: Quota) {
    // Without a guard nobody counts.
    let _ = PURSE.try_with(|purse| {
        if let Some(budget) = &purse.budget {
            budget.debit(quota, 1);
        }
    });
}
