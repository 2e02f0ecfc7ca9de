//! Adapters to the stores that ScaiVault fronts.
//!
//! An adapter knows one store: how to ask it and what its answers mean. It knows no tenant, no policy and no login;
//! each call is given a [`Lease`] that the control plane obtained. What protects a store from us, and us from a store,
//! is the same for all of them and stands in [`guard`] and [`coalesce`].

mod aws;
mod azure;
pub mod background;
pub mod budget;
pub mod coalesce;
pub mod connection;
pub mod egress;
pub mod error;
mod gcp;
pub mod guard;
pub mod http;
mod mount;
mod permission;
mod reach;
pub mod survey;
#[cfg(test)]
mod testing;
mod tls;
mod vault;

use std::borrow::Cow;
use std::future::Future;

use scaivault_domain::backend::{Target, Tls};
use scaivault_domain::mapping::RemoteName;
use scaivault_domain::secret::{Kind, Metadata, SecretValue, State};
use scaivault_domain::time::Timestamp;
use scaivault_domain::view::Generation;
use tokio::time::Instant;

use crate::budget::Quota;
use crate::survey::{Calls, Found, Step};

pub use crate::aws::{AwsBackend, aws_failure, aws_http_client};
pub use crate::azure::AzureBackend;
pub use crate::egress::Egress;
pub use crate::error::{BackendError, Class};
pub use crate::gcp::GcpBackend;
pub use crate::http::client;
pub use crate::permission::{allow, permission};
pub use crate::reach::reach;
pub use crate::vault::{VaultBackend, vault_client};
pub use scaivault_domain::lease::Material;

/// A short-lived credential for a backend, ready to be used.
#[derive(Clone, Debug)]
pub struct Lease {
    /// Names the lease, not the credential; another credential has another id.
    pub id: String,
    /// The generation of the login that it is for: it is sent to no backend of another one.
    pub login_generation: Generation,
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
    /// The store's custom metadata; `None` if a read does not tell, as where only listings do.
    pub metadata: Option<Metadata>,
    /// The store's name of this version; empty if it keeps none (KV version 1).
    pub remote_version: String,
    /// When the version was written, if the store says so.
    pub created: Option<Timestamp>,
    /// What tells this version from every other in a listing, apart from state and metadata; `None` if listings of the
    /// store do not tell versions apart.
    pub stamp: Option<String>,
}

/// A value on its way to a store.
#[derive(Clone, Debug)]
pub struct RemoteWrite {
    /// The bytes.
    pub value: SecretValue,
    /// What they are.
    pub kind: Kind,
    /// Their media type, for stores that keep one.
    pub content_type: Cow<'static, str>,
    /// The custom metadata that the secret is to have; what the store keeps besides is left alone.
    pub metadata: Metadata,
    /// What must be there now.
    pub expected: Expected,
}

/// What must be in a store for a write to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expected {
    /// No secret of the name.
    Absent,
    /// This version, as in [`RemoteSecret`].
    Version(String),
}

/// What came of a write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// The store's name of the new version; empty if it keeps none.
    pub remote_version: String,
    /// Why the custom metadata is not as it was to be, although the value is; `None` if it is.
    pub metadata: Option<BackendError>,
}

/// What is done in a store, as its permissions name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Reading values.
    Read,
    /// Reading several values with one call.
    ReadMany,
    /// Listing names.
    List,
    /// Listing the versions of a secret.
    History,
    /// Writing values.
    Write,
    /// Deleting secrets.
    Delete,
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
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
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

    /// How many secrets [`read_many`](Self::read_many) takes with one call; 1 if the store, or our permissions there,
    /// have no such call.
    fn most_at_once(&self) -> usize {
        1
    }

    /// The current values of several secrets, in the order of `names`, of which there are at most
    /// [`most_at_once`](Self::most_at_once).
    ///
    /// `Forbidden` as a whole says that there is no permission for it, and that it is not asked for again soon. Any
    /// failure as a whole, and of one of them any but `NotFound`, says little: read them one by one.
    fn read_many(
        &self,
        lease: &Lease,
        names: &[RemoteName],
    ) -> impl Future<Output = Result<Vec<Result<RemoteSecret, BackendError>>, BackendError>> + Send {
        async move {
            let mut secrets = Vec::with_capacity(names.len());
            for name in names {
                secrets.push(self.read(lease, name).await);
            }
            Ok(secrets)
        }
    }

    /// Writes a new version of `name`, if what is there now is what was expected: never over something else.
    ///
    /// `PreconditionLost`: it was not, and nothing was changed that is not still there as a version.
    fn write(
        &self,
        lease: &Lease,
        name: &RemoteName,
        write: &RemoteWrite,
    ) -> impl Future<Output = Result<Written, BackendError>> + Send;

    /// Deletes `name` so that it can be brought back, if its current version is `expected`.
    fn delete(
        &self,
        lease: &Lease,
        name: &RemoteName,
        expected: &str,
    ) -> impl Future<Output = Result<(), BackendError>> + Send;

    /// Whether the lease may read the value of `name`, found out without reading it.
    fn may_read(
        &self,
        lease: &Lease,
        name: &RemoteName,
    ) -> impl Future<Output = Result<(), BackendError>> + Send;

    /// Whether the lease may list the versions of `name`, found out without reading a value.
    fn may_list_versions(
        &self,
        lease: &Lease,
        name: &RemoteName,
    ) -> impl Future<Output = Result<(), BackendError>> + Send {
        async move { self.history(lease, name).await.map(drop) }
    }

    /// Whether the lease may use [`read_many`](Self::read_many), found out without reading a value; `None` if the store
    /// has no such call.
    fn may_read_many(&self, _lease: &Lease) -> impl Future<Output = Option<Result<(), BackendError>>> + Send {
        async { None }
    }

    /// Which quota the first call of a survey's step uses up. What a step calls beyond that is told to
    /// [`Calls::beyond`].
    fn step_quota(&self, step: &Step) -> Quota {
        match step {
            Step::Tree(_) | Step::Folder { .. } | Step::More { .. } => Quota::Lists,
            Step::Secret(_) => Quota::Metadata,
        }
    }

    /// Whether `Forbidden` may be said of a lease that ended a moment ago.
    fn may_mistake_refusals(&self) -> bool {
        false
    }

    /// Whether the store answers and takes the lease; as cheap as the store allows.
    fn probe(&self, lease: &Lease) -> impl Future<Output = Result<(), BackendError>> + Send;
}

/// Any of the stores. Closed, so that a new one breaks the build wherever it must be known.
#[derive(Debug)]
pub enum Backend {
    /// HashiCorp Vault or OpenBao.
    Vault(VaultBackend),
    /// AWS Secrets Manager.
    Aws(AwsBackend),
    /// Azure Key Vault.
    Azure(AzureBackend),
    /// GCP Secret Manager.
    Gcp(GcpBackend),
}

/// Does the same with whichever adapter it is.
macro_rules! each {
    ($backend:expr, $adapter:ident => $call:expr) => {
        match $backend {
            Backend::Vault($adapter) => $call,
            Backend::Aws($adapter) => $call,
            Backend::Azure($adapter) => $call,
            Backend::Gcp($adapter) => $call,
        }
    };
}

/// [`each`] of a call. On the heap, for the SDK's futures are large: what holds a call would be as large as the largest.
macro_rules! call {
    ($backend:expr, $adapter:ident => $call:expr) => {
        each!($backend, $adapter => Box::pin($call).await)
    };
}

impl Backend {
    /// Prepares the connections to a store; calls nobody yet.
    ///
    /// # Errors
    /// `InvalidConfig`, if a certificate or header of the target is unusable; `EndpointRefused`, if `egress` refuses its
    /// address.
    pub fn connect(target: &Target, egress: &Egress) -> Result<Backend, BackendError> {
        match target {
            Target::HashicorpVault(target) => VaultBackend::connect(target, egress).map(Backend::Vault),
            Target::AwsSecretsManager(target) => AwsBackend::connect(target, egress).map(Backend::Aws),
            Target::AzureKeyVault(target) => AzureBackend::connect(target, egress).map(Backend::Azure),
            Target::GoogleSecretManager(target) => GcpBackend::connect(target, egress).map(Backend::Gcp),
        }
    }
}

impl SecretBackend for Backend {
    async fn read(&self, lease: &Lease, name: &RemoteName) -> Result<RemoteSecret, BackendError> {
        call!(self, adapter => adapter.read(lease, name))
    }

    async fn history(&self, lease: &Lease, name: &RemoteName) -> Result<Vec<RemoteVersion>, BackendError> {
        call!(self, adapter => adapter.history(lease, name))
    }

    async fn read_version(
        &self,
        lease: &Lease,
        name: &RemoteName,
        remote_version: &str,
    ) -> Result<RemoteSecret, BackendError> {
        call!(self, adapter => adapter.read_version(lease, name, remote_version))
    }

    async fn list(
        &self,
        lease: &Lease,
        folder: Option<&RemoteName>,
        after: Option<&PageToken>,
    ) -> Result<Page, BackendError> {
        call!(self, adapter => adapter.list(lease, folder, after))
    }

    async fn survey(&self, lease: &Lease, step: &Step, calls: &Calls) -> Result<Found, BackendError> {
        call!(self, adapter => adapter.survey(lease, step, calls))
    }

    fn most_at_once(&self) -> usize {
        each!(self, adapter => adapter.most_at_once())
    }

    async fn read_many(
        &self,
        lease: &Lease,
        names: &[RemoteName],
    ) -> Result<Vec<Result<RemoteSecret, BackendError>>, BackendError> {
        call!(self, adapter => adapter.read_many(lease, names))
    }

    async fn write(
        &self,
        lease: &Lease,
        name: &RemoteName,
        write: &RemoteWrite,
    ) -> Result<Written, BackendError> {
        call!(self, adapter => adapter.write(lease, name, write))
    }

    async fn delete(&self, lease: &Lease, name: &RemoteName, expected: &str) -> Result<(), BackendError> {
        call!(self, adapter => adapter.delete(lease, name, expected))
    }

    async fn may_read(&self, lease: &Lease, name: &RemoteName) -> Result<(), BackendError> {
        call!(self, adapter => adapter.may_read(lease, name))
    }

    async fn may_list_versions(&self, lease: &Lease, name: &RemoteName) -> Result<(), BackendError> {
        call!(self, adapter => adapter.may_list_versions(lease, name))
    }

    async fn may_read_many(&self, lease: &Lease) -> Option<Result<(), BackendError>> {
        call!(self, adapter => adapter.may_read_many(lease))
    }

    fn step_quota(&self, step: &Step) -> Quota {
        each!(self, adapter => adapter.step_quota(step))
    }

    fn may_mistake_refusals(&self) -> bool {
        each!(self, adapter => adapter.may_mistake_refusals())
    }

    async fn probe(&self, lease: &Lease) -> Result<(), BackendError> {
        call!(self, adapter => adapter.probe(lease))
    }
}

/// Checks that the certificates of a configuration can be used.
///
/// # Errors
/// `InvalidConfig`, if not.
pub fn check_tls(tls: &Tls) -> Result<(), BackendError> {
    match &tls.ca_cert {
        Some(_) => tls::client_config(tls::Trust::of(&Tls { verify: true, ..tls.clone() })).map(drop),
        None => Ok(()),
    }
}
