//! Identical reads in flight share one call.
//!
//! Whoever waits for the call drives it, so the usual one, with a single caller, costs no task. A caller that hangs up
//! cancels it for nobody: it leaves a task behind that drives the call to its end. Nothing is kept once it has ended:
//! the next caller asks again.

use std::collections::HashMap;
use std::fmt;
use std::hash::Hash;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::FutureExt as _;
use futures::future::{BoxFuture, FusedFuture as _, Shared};
use tokio::runtime::Handle;

use crate::error::BackendError;

type Outcome<V> = Result<V, BackendError>;
type Flight<V> = Shared<BoxFuture<'static, Outcome<V>>>;

/// Calls in flight by key, e.g. a backend's id and a remote name. A key must not name a caller.
pub struct Coalescer<K, V: Clone> {
    flights: Flights<K, V>,
}

type Flights<K, V> = Arc<Mutex<HashMap<K, Flight<V>>>>;

impl<K, V: Clone> Default for Coalescer<K, V> {
    fn default() -> Self {
        Coalescer { flights: Flights::default() }
    }
}

impl<K, V: Clone> fmt::Debug for Coalescer<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Coalescer").field("in_flight", &lock(&self.flights).len()).finish()
    }
}

impl<K, V> Coalescer<K, V>
where
    K: Clone + Eq + Hash + Send + 'static,
    V: Clone + Send + Sync + 'static,
{
    /// The outcome of the call in flight for `key`, or of `call` if there is none.
    ///
    /// # Errors
    /// Those of the call, the same for everybody who shares it.
    pub async fn run<C>(&self, key: K, call: C) -> Outcome<V>
    where
        C: Future<Output = Outcome<V>> + Send + 'static,
    {
        let mut passenger = Passenger(self.join(key, call));
        (&mut passenger.0).await
    }

    fn join<C>(&self, key: K, call: C) -> Flight<V>
    where
        C: Future<Output = Outcome<V>> + Send + 'static,
    {
        let mut flights = lock(&self.flights);
        if let Some(flight) = flights.get(&key) {
            return flight.clone();
        }
        let landing = Landing { flights: self.flights.clone(), key: key.clone() };
        let flight = async move {
            let outcome = AssertUnwindSafe(call).catch_unwind().await;
            // Off the board before anybody hears of it, so that whoever asks again asks anew.
            drop(landing);
            outcome.unwrap_or(Err(BackendError::Unreachable("the call was ended before its answer came")))
        };
        let flight = flight.boxed().shared();
        flights.insert(key, flight.clone());
        flight
    }
}

/// Somebody who waits for a call.
struct Passenger<V: Clone + Send + Sync + 'static>(Flight<V>);

impl<V: Clone + Send + Sync + 'static> Drop for Passenger<V> {
    fn drop(&mut self) {
        // Even if others wait: they may be hanging up at this moment, each relying on the other.
        if !self.0.is_terminated()
            && self.0.peek().is_none()
            && let Ok(runtime) = Handle::try_current()
        {
            runtime.spawn(self.0.clone());
        }
    }
}

/// Takes the flight off the board, also when the call panics.
struct Landing<K: Eq + Hash, V: Clone> {
    flights: Flights<K, V>,
    key: K,
}

impl<K: Eq + Hash, V: Clone> Drop for Landing<K, V> {
    fn drop(&mut self) {
        lock(&self.flights).remove(&self.key);
    }
}

fn lock<K, V: Clone>(flights: &Flights<K, V>) -> MutexGuard<'_, HashMap<K, Flight<V>>> {
    flights.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::Notify;

    use super::*;

    #[derive(Default)]
    struct Store {
        calls: AtomicUsize,
        open: Notify,
    }

    impl Store {
        fn call(self: &Arc<Self>) -> impl Future<Output = Outcome<usize>> + Send + 'static {
            let store = self.clone();
            async move {
                let call = store.calls.fetch_add(1, Ordering::SeqCst) + 1;
                store.open.notified().await;
                Ok(call)
            }
        }
    }

    #[tokio::test]
    async fn identical_calls_share_one_and_nothing_is_kept() {
        let (store, coalescer) = (Arc::new(Store::default()), Coalescer::default());
        let share = |key| coalescer.run(key, store.call());
        let (a, b, c, ()) = tokio::join!(share("x"), share("x"), share("y"), async {
            store.open.notify_one();
            store.open.notify_one();
            tokio::task::yield_now().await;
            store.open.notify_one();
        });
        assert_eq!(a, b);
        assert_ne!(a, c);
        assert_eq!(store.calls.load(Ordering::SeqCst), 2);
        store.open.notify_one();
        assert_eq!(share("x").await, Ok(3));
    }

    #[tokio::test]
    async fn a_caller_that_hangs_up_cancels_nobody() {
        let (store, coalescer) = (Arc::new(Store::default()), Arc::new(Coalescer::default()));
        let impatient = tokio::spawn({
            let (store, coalescer) = (store.clone(), coalescer.clone());
            async move { coalescer.run("x", store.call()).await }
        });
        while store.calls.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        impatient.abort();
        assert!(impatient.await.is_err_and(|error| error.is_cancelled()));
        let (patient, ()) = tokio::join!(coalescer.run("x", store.call()), async { store.open.notify_one() });
        assert_eq!(patient, Ok(1));
    }

    #[tokio::test]
    async fn a_caller_that_joined_goes_on_when_the_first_hangs_up() {
        let (store, coalescer) = (Arc::new(Store::default()), Coalescer::default());
        let mut first = Box::pin(coalescer.run("x", store.call()));
        let mut second = Box::pin(coalescer.run("x", store.call()));
        assert!(futures::poll!(&mut first).is_pending() && futures::poll!(&mut second).is_pending());
        drop(first);
        store.open.notify_one();
        assert_eq!(second.await, Ok(1));
        assert!(lock(&coalescer.flights).is_empty());
    }

    #[tokio::test]
    async fn failures_are_shared_and_a_panic_is_one() {
        let coalescer: Coalescer<_, ()> = Coalescer::default();
        assert_eq!(
            coalescer.run("x", async { Err(BackendError::Timeout) }).await,
            Err(BackendError::Timeout)
        );
        let panicked = coalescer.run("x", async { panic!("a call that panics") }).await;
        assert!(matches!(panicked, Err(BackendError::Unreachable(_))));
        assert_eq!(coalescer.run("x", async { Ok(()) }).await, Ok(()));
    }
}
