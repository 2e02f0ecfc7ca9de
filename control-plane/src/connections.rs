//! Backends as the control plane uses them: for reads that reach it directly, for listings, history and probes.

use std::collections::BTreeSet;
use std::sync::Arc;

use scaivault_backends::background::Background;
use scaivault_backends::connection::{self, Connection};
use scaivault_backends::{BackendError, Egress, EntryKind, RemoteSecret, RemoteVersion};
use scaivault_domain::lease::LeaseKey;
use scaivault_domain::mapping::{Listing, RemoteName};
use scaivault_domain::path::Folder;
use scaivault_domain::tenant::TenantId;
use scaivault_domain::view::BackendView;
use scaivault_domain::{Error, Reason};

use crate::credentials::OwnLeases;

/// Most calls of a backend for one listing. Deeper trees are listed folder by folder.
const MAX_CALLS: usize = 1000;

/// The control plane's connections to backends.
#[derive(Debug)]
pub struct Connections(connection::Connections<OwnLeases>);

impl Connections {
    /// Connections with the control plane's own logins, to where `egress` lets them lead.
    pub fn new(leases: OwnLeases, egress: Egress) -> Self {
        Connections(connection::Connections::new(Arc::new(leases), egress))
    }

    /// The connection to a backend.
    ///
    /// # Errors
    /// When its target is unusable.
    pub fn of(&self, tenant: &TenantId, backend: &BackendView) -> Result<Arc<Connection<OwnLeases>>, Error> {
        self.0.of(tenant, backend)
    }

    /// The connection to a backend, if it is in use.
    pub fn open(&self, key: &LeaseKey) -> Option<Arc<Connection<OwnLeases>>> {
        self.0.open(key)
    }

    /// Forgets connections to backends that are gone.
    pub fn retain(&self, tenant: &TenantId, kept: &[Arc<BackendView>]) {
        self.0.retain(tenant, |id| kept.iter().any(|backend| backend.id == *id));
    }

    /// Reads a remote secret.
    ///
    /// # Errors
    /// What the backend did wrong.
    pub async fn read(
        &self,
        tenant: &TenantId,
        backend: &BackendView,
        name: &RemoteName,
    ) -> Result<Arc<RemoteSecret>, Error> {
        check_enabled(backend)?;
        self.of(tenant, backend)?.read(name, backend.timeout).await
    }

    /// The versions of a remote secret, newest first.
    ///
    /// # Errors
    /// What the backend did wrong.
    pub async fn history(
        &self,
        tenant: &TenantId,
        backend: &BackendView,
        name: &RemoteName,
    ) -> Result<Vec<RemoteVersion>, Error> {
        check_enabled(backend)?;
        self.of(tenant, backend)?.history(name, backend.timeout).await
    }

    /// What a sync does with a backend: behind proxied reads, patiently, and counted.
    ///
    /// # Errors
    /// When its target is unusable.
    pub fn background(
        &self,
        tenant: &TenantId,
        backend: &BackendView,
    ) -> Result<Background<OwnLeases>, Error> {
        Ok(self.of(tenant, backend)?.background(backend.timeout))
    }

    /// The names of a folder's children that come from this backend, whole; folders end in `/`.
    ///
    /// # Errors
    /// What the backend did wrong.
    pub async fn children(
        &self,
        tenant: &TenantId,
        backend: &BackendView,
        folder: &Folder,
    ) -> Result<BTreeSet<String>, Error> {
        let mut names = BTreeSet::new();
        for listing in backend.mapping.listings(folder) {
            match listing {
                Listing::Folder(name) => {
                    names.insert(name);
                }
                Listing::Level(level) => {
                    for (name, kind) in self.level(tenant, backend, Some(&level)).await? {
                        collect(&mut names, backend, folder, &name, kind);
                    }
                }
                Listing::Walk(root) => self.walk(tenant, backend, folder, root, &mut names).await?,
            }
        }
        Ok(names)
    }

    async fn walk(
        &self,
        tenant: &TenantId,
        backend: &BackendView,
        folder: &Folder,
        root: Option<RemoteName>,
        names: &mut BTreeSet<String>,
    ) -> Result<(), Error> {
        let mut open = vec![root];
        let mut calls = 0;
        while let Some(next) = open.pop() {
            calls += 1;
            if calls > MAX_CALLS {
                return Err(too_many_calls(backend));
            }
            for (name, kind) in self.level(tenant, backend, next.as_ref()).await? {
                match kind {
                    EntryKind::Folder => open.push(Some(name)),
                    EntryKind::Secret => collect(names, backend, folder, &name, kind),
                }
            }
        }
        Ok(())
    }

    async fn level(
        &self,
        tenant: &TenantId,
        backend: &BackendView,
        level: Option<&RemoteName>,
    ) -> Result<Vec<(RemoteName, EntryKind)>, Error> {
        let connection = self.of(tenant, backend)?;
        let mut entries = Vec::new();
        let mut after = None;
        for _ in 0..MAX_CALLS {
            let page = connection.list(level, after.as_ref(), backend.timeout).await?;
            entries.extend(page.entries.into_iter().map(|entry| (entry.name, entry.kind)));
            match page.next {
                Some(next) if after.as_ref() != Some(&next) => after = Some(next),
                Some(_) => return Err(BackendError::InvalidAnswer("a listing that goes back").into()),
                None => return Ok(entries),
            }
        }
        Err(too_many_calls(backend))
    }
}

fn too_many_calls(backend: &BackendView) -> Error {
    let message = format!("backend `{}`: the listing would take more than {MAX_CALLS} calls", backend.name);
    Error::new(Reason::Unsupported, message).next("list a deeper folder")
}

/// Adds the child of `folder` under which a remote name appears, if it has a path here at all.
fn collect(
    names: &mut BTreeSet<String>,
    backend: &BackendView,
    folder: &Folder,
    remote: &RemoteName,
    kind: EntryKind,
) {
    let prefix = folder.prefix();
    // A name that is skipped has no path here; the rules of mappings say why.
    let remote = backend.target.kind().naming().fold(remote);
    for path in backend.mapping.reverse(&remote).into_iter().flatten() {
        let Some(below) = path.as_str().strip_prefix(&prefix) else { continue };
        match (below.split_once('/'), kind) {
            (Some((child, _)), _) => names.insert(format!("{prefix}{child}/")),
            (None, EntryKind::Folder) => names.insert(format!("{path}/")),
            (None, EntryKind::Secret) => names.insert(path.as_str().to_owned()),
        };
    }
}

fn check_enabled(backend: &BackendView) -> Result<(), Error> {
    if backend.enabled { Ok(()) } else { Err(Error::backend_disabled(&backend.name)) }
}
