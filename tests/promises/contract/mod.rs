//! What every adapter promises, tried with each of them against its server.
//!
//! [`promises`] is the suite and [`capabilities`] says what a store cannot have; a promise about that is then one about
//! how it is refused. A further store is one file here: a [`Provider`] that starts its server, and a [`Store`] that says
//! what an administrator does there behind the adapter's back.
//!
//! Each promise has an empty store of its own and a proxy of its own in front of it, so all of them run at once.

/// Names functions of [`promises`], for stores of one kind.
macro_rules! all_of {
    ($($promise:ident)*) => {
        &[$((stringify!($promise), |store| Box::pin(promises::$promise(store)))),*]
    };
}

mod aws;
mod azure;
mod capabilities;
mod gcp;
mod promises;
mod vault;

use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use futures::FutureExt as _;
use futures::future::{LocalBoxFuture, ready};
use futures::stream::{StreamExt as _, iter};
use scaivault_backends::budget::{Budget, Quotas};
use scaivault_backends::connection::{Connection, Connections, Leases};
use scaivault_backends::egress::Policy;
use scaivault_backends::survey::{Calls, Step, Surveyed};
use scaivault_backends::{
    Backend, BackendError, Egress, Expected, Lease, RemoteEntry, RemoteSecret, RemoteVersion, RemoteWrite,
    SecretBackend as _, Written,
};
use scaivault_domain::Error;
use scaivault_domain::backend::{BackendId, Endpoint, Target};
use scaivault_domain::lease::LeaseKey;
use scaivault_domain::mapping::{PathMapping, RemoteName};
use scaivault_domain::secret::{Kind, Metadata, SecretValue, State};
use scaivault_domain::sync::{Mode, SyncSettings};
use scaivault_domain::tenant::{BackendName, TenantId};
use scaivault_domain::view::{BackendView, Generation};
use scaivault_tests::http_faults::HttpProxy;

use self::capabilities::Capabilities;

/// A running server.
trait Provider: Sized {
    /// One store of it.
    type Store: Store + 'static;

    /// Starts it.
    async fn start() -> Result<Self>;

    /// An empty store, for nobody but the promise that is called `promise`.
    async fn store(&self, promise: &str) -> Result<Self::Store>;
}

/// An empty store, and what its administrator does. Secrets are named by a leaf: the last segment of their name.
trait Store {
    /// What it can have.
    const CAN: Capabilities;

    /// How much is asked of its server at the same time.
    const AT_ONCE: usize = 32;

    /// Where it listens.
    fn socket(&self) -> SocketAddr;

    /// What the adapter is told of it, if it is found at `endpoint`.
    fn target(&self, endpoint: Endpoint) -> Target;

    /// A credential that may do everything in this store, until it is forbidden.
    fn lease(&self) -> Lease;

    /// The folder that its secrets are in; `None`: the whole store.
    fn root(&self) -> Option<RemoteName>;

    /// The longest name that a secret can have.
    fn longest(&self) -> RemoteName;

    /// Gives a secret a new version.
    async fn put(&self, leaf: &str, value: &[u8], kind: Kind) -> Result<()>;

    /// Brings the current version of a secret into one of the states of [`Capabilities::states`].
    async fn change(&self, leaf: &str, to: State) -> Result<()>;

    /// Undoes a deletion that the adapter did.
    async fn restore(&self, leaf: &str) -> Result<()>;

    /// Sets the custom metadata of a secret that has none.
    async fn describe(&self, leaf: &str, metadata: &Metadata) -> Result<()>;

    /// Closes the value of a secret to the lease, and with it perhaps other values: see [`Capabilities::closes`].
    async fn forbid(&self, leaf: &str) -> Result<()>;

    /// Closes listings to the lease.
    async fn forbid_listing(&self) -> Result<()>;

    /// Ends the lease.
    async fn revoke(&self) -> Result<()>;

    /// Waits until what was written is old enough to be told apart from what may come next.
    fn settle(&self) {}

    /// The name of a secret.
    fn name(&self, leaf: &str) -> RemoteName {
        self.root().map_or_else(|| RemoteName::with_literal(leaf, 0), |root| root.child(leaf))
    }
}

/// A store, the adapter to it, and the network between them.
struct Connected<S> {
    store: S,
    proxy: HttpProxy,
    target: Target,
    backend: Backend,
    lease: Lease,
}

impl<S: Store> Connected<S> {
    async fn to(store: S) -> Result<Self> {
        let proxy = HttpProxy::start(store.socket()).await?;
        let target = store.target(Endpoint::parse("endpoint", &proxy.url())?);
        let backend = Backend::connect(&target, &egress())?;
        let lease = store.lease();
        Ok(Connected { store, proxy, target, backend, lease })
    }

    fn name(&self, leaf: &str) -> RemoteName {
        self.store.name(leaf)
    }

    async fn read(&self, leaf: &str) -> Result<RemoteSecret, BackendError> {
        self.backend.read(&self.lease, &self.name(leaf)).await
    }

    async fn read_version(&self, leaf: &str, version: &str) -> Result<RemoteSecret, BackendError> {
        self.backend.read_version(&self.lease, &self.name(leaf), version).await
    }

    async fn history(&self, leaf: &str) -> Result<Vec<RemoteVersion>, BackendError> {
        self.backend.history(&self.lease, &self.name(leaf)).await
    }

    async fn write(&self, leaf: &str, write: &RemoteWrite) -> Result<Written, BackendError> {
        self.backend.write(&self.lease, &self.name(leaf), write).await
    }

    async fn delete(&self, leaf: &str, expected: &str) -> Result<(), BackendError> {
        self.backend.delete(&self.lease, &self.name(leaf), expected).await
    }

    async fn may_read(&self, leaf: &str) -> Result<(), BackendError> {
        self.backend.may_read(&self.lease, &self.name(leaf)).await
    }

    async fn probe(&self) -> Result<(), BackendError> {
        self.backend.probe(&self.lease).await
    }

    /// Every entry, and how many pages they came in.
    async fn list(&self) -> Result<(Vec<RemoteEntry>, usize), BackendError> {
        let (root, mut entries, mut after) = (self.store.root(), Vec::new(), None);
        for page in 1.. {
            let found = self.backend.list(&self.lease, root.as_ref(), after.as_ref()).await?;
            entries.extend(found.entries);
            after = found.next;
            if after.is_none() {
                return Ok((entries, page));
            }
        }
        unreachable!("it counts without end")
    }

    /// Everything that a survey finds, by name.
    async fn survey(&self) -> Result<Vec<Surveyed>, BackendError> {
        let (mut steps, mut found) = (vec![Step::Tree(self.store.root())], Vec::new());
        let calls = Calls::default();
        while let Some(step) = steps.pop() {
            let mut answer = self.backend.survey(&self.lease, &step, &calls).await?;
            found.append(&mut answer.page.secrets);
            steps.append(&mut answer.next);
        }
        found.sort_by(|a, b| a.name.as_str().cmp(b.name.as_str()));
        Ok(found)
    }

    /// One secret of it.
    async fn surveyed(&self, leaf: &str) -> Result<Option<Surveyed>, BackendError> {
        let name = self.name(leaf);
        Ok(self.survey().await?.into_iter().find(|secret| secret.name.as_str() == name.as_str()))
    }

    /// The same store as a plane uses it: with a guard.
    fn guarded(&self) -> Result<Arc<Connection<OneLease>>> {
        let backend = BackendView {
            login_generation: 0,
            id: BackendId::from_random([1; 10]),
            name: BackendName::parse("contract")?,
            target: self.target.clone(),
            mapping: PathMapping::parse([("a/**", "**")])?,
            mode: Mode::Proxy,
            sync: SyncSettings::default(),
            enabled: true,
            timeout: Duration::from_secs(5),
        };
        let connections = Connections::new(Arc::new(OneLease(Arc::new(self.lease.clone()))), egress());
        Ok(connections.of(&TenantId::parse("acme")?, &backend)?)
    }
}

/// The same lease each time.
struct OneLease(Arc<Lease>);

impl Leases for OneLease {
    async fn lease(&self, _: &LeaseKey, _: Generation, _: Option<&str>) -> Result<Arc<Lease>, Error> {
        Ok(self.0.clone())
    }

    fn budget(&self, _: &LeaseKey, target: &Target) -> Arc<Budget> {
        Arc::new(Budget::new(Quotas::of(target)))
    }
}

fn egress() -> Egress {
    Egress::new(Policy::default().with_loopback())
}

/// A write of what a store takes for `value`.
fn to_write(value: &[u8], kind: Kind, expected: Expected) -> RemoteWrite {
    let content_type = match kind {
        Kind::Json => "application/json",
        Kind::Text => "text/plain",
        Kind::Binary => "application/octet-stream",
    };
    RemoteWrite {
        value: SecretValue::new(value.to_vec()),
        kind,
        content_type: content_type.into(),
        metadata: Metadata::new(),
        expected,
    }
}

/// A promise, tried with a store of its own.
type Tried<S> = (&'static str, fn(Connected<S>) -> LocalBoxFuture<'static, Result<()>>);

/// The whole suite.
fn suite<S: Store + 'static>() -> Vec<Tried<S>> {
    let all: &[Tried<S>] = all_of![
        a_listing_names_every_secret_once_however_many_pages_there_are
        a_survey_finds_what_is_there_with_the_tokens_of_reads
        tokens_change_with_values_metadata_and_states
        values_come_back_as_they_are
        values_are_written_as_they_are
        what_a_store_cannot_carry_is_refused_before_it_is_sent
        sizes_are_checked_before_anything_is_sent
        names_at_the_edge_work_and_beyond_it_nothing_is_sent
        what_is_not_there_is_not_found
        versions_are_told_oldest_first_and_read_by_name
        states_are_states_and_never_values
        metadata_is_read
        metadata_is_written_with_the_value
        metadata_that_does_not_fit_is_told_and_the_value_is_written
        a_write_is_done_only_where_nothing_else_came_first
        a_write_that_is_made_again_makes_no_second_version
        a_deletion_is_soft_and_of_the_expected_version_only
        one_closed_secret_does_not_close_the_others
        a_closed_listing_is_no_empty_one
        whether_a_value_may_be_read_is_found_out_without_reading_it
        a_probe_is_one_call
        a_lease_that_ended_says_so
        faults_of_the_server_are_told_apart
        what_is_not_the_protocol_is_no_answer
        a_page_in_front_of_the_store_never_says_that_something_is_gone
        listings_that_go_in_circles_end_with_an_error
        empty_pages_without_end_end_with_an_error
        a_throttled_store_is_asked_later_and_not_given_up
        a_pause_that_is_asked_for_is_made
        a_fault_that_passes_is_survived
        a_store_that_hangs_does_not_hang_its_readers
        nobody_at_the_address_is_unreachable
    ];
    all.to_vec()
}

/// Starts the server and tries the promises, all at the same time.
async fn keeps<P: Provider>(promises: Vec<Tried<P::Store>>) -> Result<()> {
    let provider = P::start().await?;
    let outcomes = promises.into_iter().map(async |(promise, tried)| {
        let run = async { tried(Connected::to(provider.store(promise).await?).await?).await };
        // A promise that panics is broken, too, and the others are still to be tried.
        let outcome = AssertUnwindSafe(run).catch_unwind().await;
        let broken = match outcome {
            Ok(Ok(())) => return None,
            Ok(Err(error)) => format!("{error:?}"),
            Err(panic) => panic
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
                .unwrap_or_default(),
        };
        Some(format!("{promise}: {broken}"))
    });
    let outcomes = iter(outcomes).buffer_unordered(P::Store::AT_ONCE);
    let broken: Vec<String> = outcomes.filter_map(ready).collect().await;
    anyhow::ensure!(broken.is_empty(), "{} promises are broken:\n{}", broken.len(), broken.join("\n\n"));
    Ok(())
}
