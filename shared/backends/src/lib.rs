//! Adapters to the stores that ScaiVault fronts.
//!
//! An adapter knows one store: how to ask it and what its answers mean. It knows no tenant, no policy and no login;
//! each call is given a [`Lease`] that the control plane obtained. What protects a store from us, and us from a store,
//! is the same for all of them and stands in [`guard`] and [`coalesce`].

pub mod background;
pub mod budget;
pub mod coalesce;
pub mod connection;
pub mod error;
pub mod guard;
mod http;
mod mount;
pub mod survey;
#[cfg(test)]
mod testing;
mod tls;
mod vault;

use std::borrow::Cow;
use std::future::Future;

use scaivault_domain::backend::Target;
use scaivault_domain::mapping::RemoteName;
use scaivault_domain::secret::{Kind, Metadata, SecretValue, State};
use scaivault_domain::time::Timestamp;
use tokio::time::Instant;

use crate::budget::Quota;
use crate::survey::{Calls, Found, Step};

pub use crate::error::{BackendError, Class};
pub use crate::vault::{VaultBackend, vault_client};
pub use scaivault_domain::lease::Material;

/// A short-lived credential for a backend, ready to be used.
#[derive(Clone, Debug)]
pub struct Lease {
    /// Names the lease, not the credential; another credential has another id.
    pub id: String,
    /// The credential.
    pub material: Material,
    /// When it ends, if it does.
    pub expires_at: Option<Instant>,
}

/// The current value of a remote secret.
#[derive(Clone, Debug)]
pub struct RemoteSecret {
    /// The bytes, as the store sent them.
    pub value: SecretValue,
    /// What they are.
    pub kind: Kind,
    /// Their media type.
    pub content_type: Cow<'static, str>,
    /// The store's custom metadata.
    pub metadata: Metadata,
    /// The store's name of this version; empty if it keeps none (KV version 1).
    pub remote_version: String,
    /// When the version was written, if the store says so.
    pub created: Option<Timestamp>,
}

/// One version of a remote secret, without its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteVersion {
    /// As in [`RemoteSecret`].
    pub remote_version: String,
    /// Whether it has a value.
    pub state: State,
    /// When it was written, if the store says so.
    pub created: Option<Timestamp>,
}

/// What a listing found in a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteEntry {
    /// The name as the mapping's templates spell it, so that it can be mapped back.
    pub name: RemoteName,
    /// Whether it can be read or listed. A name that is both is two entries.
    pub kind: EntryKind,
}

/// What an entry of a listing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// Can be read.
    Secret,
    /// Can be listed.
    Folder,
}

/// Where a listing goes on. Only good for the folder it came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageToken(String);

/// A part of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// What was found.
    pub entries: Vec<RemoteEntry>,
    /// Asks for the next part; `None`: this was the last one.
    pub next: Option<PageToken>,
}

/// One remote store.
pub trait SecretBackend: Send + Sync {
    /// The current value of `name`.
    fn read(
        &self,
        lease: &Lease,
        name: &RemoteName,
    ) -> impl Future<Output = Result<RemoteSecret, BackendError>> + Send;

    /// The versions that the store still knows of, oldest first.
    fn history(
        &self,
        lease: &Lease,
        name: &RemoteName,
    ) -> impl Future<Output = Result<Vec<RemoteVersion>, BackendError>> + Send;

    /// The value of one version of `name`; a store that keeps no versions has none to find.
    fn read_version(
        &self,
        lease: &Lease,
        name: &RemoteName,
        remote_version: &str,
    ) -> impl Future<Output = Result<RemoteSecret, BackendError>> + Send;

    /// What is directly in `folder` (`None`: in the whole store). A folder that is not there is empty.
    fn list(
        &self,
        lease: &Lease,
        folder: Option<&RemoteName>,
        after: Option<&PageToken>,
    ) -> impl Future<Output = Result<Page, BackendError>> + Send;

    /// Takes one step of a survey, which begins with [`Step::Tree`]. It is complete when no step is left.
    fn survey(
        &self,
        lease: &Lease,
        step: &Step,
        calls: &Calls,
    ) -> impl Future<Output = Result<Found, BackendError>> + Send;

    /// Which quota the first call of a survey's step uses up. What a step calls beyond that is told to
    /// [`Calls::beyond`].
    fn step_quota(&self, step: &Step) -> Quota {
        match step {
            Step::Tree(_) | Step::Folder { .. } => Quota::Lists,
            Step::Secret(_) => Quota::Metadata,
        }
    }

    /// Whether the store answers and takes the lease; as cheap as the store allows.
    fn probe(&self, lease: &Lease) -> impl Future<Output = Result<(), BackendError>> + Send;
}

/// Any of the stores. Closed, so that a new one breaks the build wherever it must be known.
#[derive(Debug)]
pub enum Backend {
    /// HashiCorp Vault or OpenBao.
    Vault(VaultBackend),
}

impl Backend {
    /// Prepares the connections to a store; calls nobody yet.
    ///
    /// # Errors
    /// `InvalidConfig`, if a certificate or header of the target is unusable.
    pub fn connect(target: &Target) -> Result<Backend, BackendError> {
        match target {
            Target::HashicorpVault(target) => VaultBackend::connect(target).map(Backend::Vault),
        }
    }
}

impl SecretBackend for Backend {
    async fn read(&self, lease: &Lease, name: &RemoteName) -> Result<RemoteSecret, BackendError> {
        match self {
            Backend::Vault(vault) => vault.read(lease, name).await,
        }
    }

    async fn history(&self, lease: &Lease, name: &RemoteName) -> Result<Vec<RemoteVersion>, BackendError> {
        match self {
            Backend::Vault(vault) => vault.history(lease, name).await,
        }
    }

    async fn read_version(
        &self,
        lease: &Lease,
        name: &RemoteName,
        remote_version: &str,
    ) -> Result<RemoteSecret, BackendError> {
        match self {
            Backend::Vault(vault) => vault.read_version(lease, name, remote_version).await,
        }
    }

    async fn list(
        &self,
        lease: &Lease,
        folder: Option<&RemoteName>,
        after: Option<&PageToken>,
    ) -> Result<Page, BackendError> {
        match self {
            Backend::Vault(vault) => vault.list(lease, folder, after).await,
        }
    }

    async fn survey(&self, lease: &Lease, step: &Step, calls: &Calls) -> Result<Found, BackendError> {
        match self {
            Backend::Vault(vault) => vault.survey(lease, step, calls).await,
        }
    }

    fn step_quota(&self, step: &Step) -> Quota {
        match self {
            Backend::Vault(vault) => vault.step_quota(step),
        }
    }

    async fn probe(&self, lease: &Lease) -> Result<(), BackendError> {
        match self {
            Backend::Vault(vault) => vault.probe(lease).await,
        }
    }
}
