//! Secrets: ScaiVault's own, and those of backends as the control plane sees them.

use std::collections::BTreeMap;
use std::sync::Arc;

use scaivault_domain::access::{Authorized, List, Read, Write};
use scaivault_domain::audit::{Action, AuditRow, Origin};
use scaivault_domain::path::{Folder, SecretPath};
use scaivault_domain::secret::{Kind, Metadata, SecretValue, Source, State, Version, check_metadata};
use scaivault_domain::tenant::TenantId;
use scaivault_domain::time::{Clock, Timestamp};
use scaivault_domain::view::Route;
use scaivault_domain::{Error, Reason};

use super::{ATTEMPTS, Configurations, Page, PageRequest, contended, settle};
use crate::audit::Audit;
use crate::connections::Connections;
use crate::model::{SecretHead, SecretVersionHead, generation_key, version_key};
use crate::store::{Depth, Entry, Key, Owner, Records, RowVersion, Space, StoreError, Tx};

/// A secret as it was read.
#[derive(Clone, Debug)]
pub struct Found {
    /// Our version; `None` for a proxied read.
    pub version: Option<Version>,
    /// What the bytes are.
    pub kind: Kind,
    /// The value.
    pub value: SecretValue,
    /// Kept with the value.
    pub content_type: String,
    /// Custom metadata.
    pub metadata: Metadata,
    /// Where it came from.
    pub source: Source,
    /// The version in the backend.
    pub remote_version: String,
    /// When the version was made, if the store tells.
    pub created: Option<Timestamp>,
}

/// One line of a secret's history.
#[derive(Clone, Debug)]
pub struct VersionLine {
    /// Our version; `None` for versions that only the backend has.
    pub version: Option<Version>,
    /// The version in the backend.
    pub remote_version: String,
    /// Whether it has a value.
    pub state: State,
    /// When it was made, if the store tells.
    pub created: Option<Timestamp>,
}

/// What a write is asked to store.
#[derive(Clone, Debug)]
pub struct NewVersion {
    /// The value.
    pub value: SecretValue,
    /// What the bytes are.
    pub kind: Kind,
    /// Kept with the value.
    pub content_type: String,
    /// Custom metadata.
    pub metadata: Metadata,
}

/// Which version a change expects to be current.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// Whatever is current.
    Any,
    /// The secret does not exist.
    Absent,
    /// This version.
    Version(Version),
}

/// The service of secrets.
#[derive(Debug)]
pub struct Secrets {
    records: Records,
    configurations: Arc<Configurations>,
    connections: Arc<Connections>,
    audit: Arc<Audit>,
    clock: Arc<dyn Clock>,
}

impl Secrets {
    /// Secrets of `records`, and of backends through `connections`.
    pub fn new(
        records: Records,
        configurations: Arc<Configurations>,
        connections: Arc<Connections>,
        audit: Arc<Audit>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        Secrets { records, configurations, connections, audit, clock }
    }

    /// Reads a secret. The audit row is written before the value is given.
    ///
    /// # Errors
    /// `not_found`, `not_active`, `version_unsupported`, or what the backend did wrong.
    pub async fn get(
        &self,
        allowed: &Authorized<Read>,
        origin: &Origin,
        version: Option<Version>,
    ) -> Result<Found, Error> {
        let mut row = self.row(allowed.caller(), origin, Action::SecretRead, allowed.path().as_str());
        let outcome = self.read(allowed, version, &mut row).await;
        if let Ok(found) = &outcome {
            row.version = found.version;
            row.source = Some(found.source.as_str().into());
            row.remote_version = (!found.remote_version.is_empty()).then(|| found.remote_version.clone());
        }
        self.audit.close(row, origin, outcome).await
    }

    async fn read(
        &self,
        allowed: &Authorized<Read>,
        version: Option<Version>,
        row: &mut AuditRow,
    ) -> Result<Found, Error> {
        let (tenant, path) = (allowed.tenant(), allowed.path());
        match self.configurations.of(tenant).await?.route(path) {
            Route::Local => local(&self.records, tenant, path, version).await,
            Route::Remote { backend, name } => {
                row.backend = Some(backend.id.to_string());
                row.remote_name = Some(name.as_str().into());
                if version.is_some() {
                    return Err(Error::field(
                        Reason::VersionUnsupported,
                        "/version",
                        "a path in proxy mode has only its current version",
                    ));
                }
                let secret = self.connections.read(tenant, &backend, &name).await?;
                Ok(Found {
                    version: None,
                    kind: secret.kind,
                    value: secret.value.clone(),
                    content_type: secret.content_type.to_string(),
                    metadata: secret.metadata.clone(),
                    source: Source::Proxy,
                    remote_version: secret.remote_version.clone(),
                    created: secret.created,
                })
            }
        }
    }

    /// Lists versions, newest first.
    ///
    /// # Errors
    /// `not_found`, or what the backend did wrong.
    pub async fn versions(
        &self,
        allowed: &Authorized<Read>,
        origin: &Origin,
    ) -> Result<Vec<VersionLine>, Error> {
        let mut row = self.row(allowed.caller(), origin, Action::SecretVersions, allowed.path().as_str());
        let outcome = self.read_versions(allowed, &mut row).await;
        self.audit.close(row, origin, outcome).await
    }

    async fn read_versions(
        &self,
        allowed: &Authorized<Read>,
        row: &mut AuditRow,
    ) -> Result<Vec<VersionLine>, Error> {
        let (tenant, path) = (allowed.tenant(), allowed.path());
        if let Route::Remote { backend, name } = self.configurations.of(tenant).await?.route(path) {
            row.backend = Some(backend.id.to_string());
            row.remote_name = Some(name.as_str().into());
            let history = self.connections.history(tenant, &backend, &name).await?;
            return Ok(history
                .into_iter()
                .map(|line| VersionLine {
                    version: None,
                    remote_version: line.remote_version,
                    state: line.state,
                    created: line.created,
                })
                .collect());
        }
        let (head, _) = self.head(tenant, path).await?.ok_or_else(absent)?;
        let mut lines = Vec::new();
        for version in (1..=head.current).rev() {
            let key = version_key(tenant, path.as_str(), version);
            let Some((entry, _)) = self.records.get_secret::<SecretVersionHead>(&key).await? else {
                continue;
            };
            lines.push(VersionLine {
                version: Some(entry.version),
                remote_version: String::new(),
                state: entry.state,
                created: Some(entry.created),
            });
        }
        Ok(lines)
    }

    /// Writes a new version of a local secret.
    ///
    /// # Errors
    /// `federated_read_only`, `precondition_failed`, or what is wrong with the value.
    pub async fn put(
        &self,
        allowed: &Authorized<Write>,
        origin: &Origin,
        new: NewVersion,
        expected: Expected,
    ) -> Result<(Version, Timestamp), Error> {
        let row = self.row(allowed.caller(), origin, Action::SecretWrite, allowed.path().as_str());
        let outcome = self.write(allowed, origin, &row, new, expected).await;
        self.audit.close_refusal(row, origin, outcome).await
    }

    async fn write(
        &self,
        allowed: &Authorized<Write>,
        origin: &Origin,
        row: &AuditRow,
        new: NewVersion,
        expected: Expected,
    ) -> Result<(Version, Timestamp), Error> {
        let (tenant, path) = (allowed.tenant(), allowed.path());
        new.kind.check(new.value.expose())?;
        check_metadata(&new.metadata)?;
        if new.content_type.len() > 256 || new.content_type.chars().any(char::is_control) {
            return Err(Error::invalid("/content_type", "has at most 256 bytes and no control characters"));
        }
        for _ in 0..ATTEMPTS {
            let anchor = self.check_local(tenant, path).await?;
            let head = self.head(tenant, path).await?;
            check_expected(head.as_ref().map(|(head, _)| head), expected)?;
            let now = self.clock.now();
            let version = head.as_ref().map_or(1, |(head, _)| head.current + 1);
            let entry = SecretVersionHead {
                version,
                kind: new.kind,
                content_type: new.content_type.clone(),
                metadata: new.metadata.clone(),
                state: State::Active,
                created: now,
                deleted: None,
            };
            let mut row = row.clone();
            row.version = Some(version);
            row.source = Some(Source::Local.as_str().into());
            let head_key = secret_key(tenant, path);
            let version_key = version_key(tenant, path.as_str(), version);
            // A mapping that comes meanwhile must see this secret, or this write that mapping.
            let tx = Tx::new()
                .expect_as_found(generation_key(tenant), anchor)
                .expect_as_found(head_key.clone(), head.map(|(_, version)| version))
                .put(
                    head_key.clone(),
                    self.records.seal(&head_key, &SecretHead { current: version, state: State::Active }),
                )
                .put(version_key.clone(), self.records.seal_secret(&version_key, &entry, Some(&new.value)));
            let tx = self.audit.stage(tx, &row.ended(origin, &Ok(())));
            if settle(self.records.store().commit(tx).await)?.is_some() {
                return Ok((version, now));
            }
        }
        Err(contended())
    }

    /// Deletes a local secret softly: the current version becomes `deleted`, and nothing is erased.
    ///
    /// # Errors
    /// `not_found`, `federated_read_only`, `precondition_failed`.
    pub async fn delete(
        &self,
        allowed: &Authorized<Write>,
        origin: &Origin,
        expected: Expected,
    ) -> Result<(), Error> {
        let row = self.row(allowed.caller(), origin, Action::SecretDelete, allowed.path().as_str());
        let outcome = self.remove(allowed, origin, &row, expected).await;
        self.audit.close_refusal(row, origin, outcome).await
    }

    async fn remove(
        &self,
        allowed: &Authorized<Write>,
        origin: &Origin,
        row: &AuditRow,
        expected: Expected,
    ) -> Result<(), Error> {
        let (tenant, path) = (allowed.tenant(), allowed.path());
        for _ in 0..ATTEMPTS {
            let anchor = self.check_local(tenant, path).await?;
            let (head, head_version) = self.head(tenant, path).await?.ok_or_else(absent)?;
            if head.state != State::Active {
                return Err(absent());
            }
            check_expected(Some(&head), expected)?;
            let key = version_key(tenant, path.as_str(), head.current);
            let (mut entry, value) =
                self.records.get_secret::<SecretVersionHead>(&key).await?.ok_or_else(absent)?;
            entry.state = State::Deleted;
            entry.deleted = Some(self.clock.now());
            let mut row = row.clone();
            row.version = Some(head.current);
            row.source = Some(Source::Local.as_str().into());
            let head_key = secret_key(tenant, path);
            let gone = SecretHead { current: head.current, state: State::Deleted };
            let tx = Tx::new()
                .expect_as_found(generation_key(tenant), anchor)
                .expect(head_key.clone(), head_version)
                .put(head_key.clone(), self.records.seal(&head_key, &gone))
                .put(key.clone(), self.records.seal_secret(&key, &entry, value.as_ref()));
            let tx = self.audit.stage(tx, &row.ended(origin, &Ok(())));
            if settle(self.records.store().commit(tx).await)?.is_some() {
                return Ok(());
            }
        }
        Err(contended())
    }

    /// Lists the children of a folder, local and federated, as far as the caller may see them. Folders end in `/`.
    ///
    /// # Errors
    /// What a backend that the folder reaches did wrong: a listing with a hole in it would be read as whole.
    pub async fn list(
        &self,
        allowed: &Authorized<List, Folder>,
        origin: &Origin,
        page: &PageRequest,
    ) -> Result<Page<String>, Error> {
        let folder = allowed.folder();
        let row = self.row(allowed.caller(), origin, Action::SecretList, folder.prefix());
        let outcome = self.children(allowed, page).await;
        self.audit.close(row, origin, outcome).await
    }

    async fn children(
        &self,
        allowed: &Authorized<List, Folder>,
        page: &PageRequest,
    ) -> Result<Page<String>, Error> {
        let (tenant, folder) = (allowed.tenant(), allowed.folder());
        if !allowed.may_see_below(folder.segments()) {
            // Nobody has to be asked for what may not be seen.
            return Ok(Page { items: Vec::new(), next: String::new() });
        }
        let prefix = folder.prefix();
        let configuration = self.configurations.of(tenant).await?;
        let after = page.after.as_ref().map(|key| format!("{prefix}{key}"));

        // Whole names, so that the order is the store's and a page can begin anywhere.
        let mut names: BTreeMap<String, ()> = BTreeMap::new();
        for backend in configuration.views().iter().filter(|backend| backend.enabled) {
            let found = self.connections.children(tenant, backend, folder).await?;
            names.extend(found.into_iter().map(|name| (name, ())));
        }
        if let Some(after) = &after {
            names = names.split_off(after);
            names.remove(after);
        }

        let mut cursor = after;
        let mut local_done = false;
        let mut visible = Vec::new();
        while visible.len() <= page.size && !(local_done && names.is_empty()) {
            if !local_done {
                let wanted = page.size + 1;
                let entries = self
                    .records
                    .store()
                    .scan(
                        &Owner::from(tenant),
                        Space::Secret,
                        &prefix,
                        Depth::Children,
                        cursor.as_deref(),
                        wanted,
                    )
                    .await?;
                local_done = entries.len() < wanted;
                cursor = entries.last().map(|entry| entry.name().to_owned()).or(cursor);
                for entry in entries {
                    if self.is_listed(tenant, &configuration, &entry)? {
                        names.insert(entry.name().to_owned(), ());
                    }
                }
            }
            // What lies beyond the local scan's end may still be preceded by local names.
            while let Some((name, ())) = names.pop_first() {
                if !local_done && cursor.as_ref().is_some_and(|end| name > *end) {
                    names.insert(name, ());
                    break;
                }
                if is_visible(allowed, &name) {
                    visible.push(name[prefix.len()..].to_owned());
                }
            }
        }
        Ok(page.page(visible, Clone::clone))
    }

    /// Whether a local entry belongs into a listing: active, and not hidden by a mapping.
    fn is_listed(
        &self,
        tenant: &TenantId,
        configuration: &super::Configuration,
        entry: &Entry,
    ) -> Result<bool, StoreError> {
        let Entry::Row { name, row } = entry else { return Ok(true) };
        let Ok(path) = SecretPath::check(name) else { return Ok(false) };
        let head: SecretHead = self.records.open(&secret_key(tenant, &path), &row.value)?;
        Ok(head.state == State::Active && configuration.route(&path) == Route::Local)
    }

    /// Refuses a path that a backend owns; answers the anchor of the configuration that says so.
    async fn check_local(&self, tenant: &TenantId, path: &SecretPath) -> Result<Option<RowVersion>, Error> {
        let configuration = self.configurations.of(tenant).await?;
        match configuration.route(path) {
            Route::Local => Ok(configuration.anchor),
            Route::Remote { backend, .. } => Err(Error::federated_read_only(&backend.name)),
        }
    }

    async fn head(
        &self,
        tenant: &TenantId,
        path: &SecretPath,
    ) -> Result<Option<(SecretHead, RowVersion)>, StoreError> {
        self.records.get(&secret_key(tenant, path)).await
    }

    fn row(
        &self,
        caller: &scaivault_domain::access::Caller,
        origin: &Origin,
        action: Action,
        path: impl Into<String>,
    ) -> AuditRow {
        AuditRow::new(caller, origin, action, path, self.clock.now())
    }
}

fn is_visible(allowed: &Authorized<List, Folder>, name: &str) -> bool {
    match name.strip_suffix('/') {
        Some(folder) => allowed.may_see_below(folder.split('/')),
        None => SecretPath::check(name).is_ok_and(|path| allowed.may_see(&path)),
    }
}

fn secret_key(tenant: &TenantId, path: &SecretPath) -> Key {
    Key::new(tenant, Space::Secret, path.as_str())
}

/// Reads a local secret, whoever asks: the caller has decided that it may be.
///
/// # Errors
/// `not_found`, `not_active`.
pub(crate) async fn local(
    records: &Records,
    tenant: &TenantId,
    path: &SecretPath,
    version: Option<Version>,
) -> Result<Found, Error> {
    let version = match version {
        Some(version) => version,
        None => {
            let head = records.get::<SecretHead>(&secret_key(tenant, path)).await?;
            head.ok_or_else(absent)?.0.current
        }
    };
    let found = records.get_secret::<SecretVersionHead>(&version_key(tenant, path.as_str(), version)).await?;
    let (entry, value) = found.ok_or_else(absent)?;
    let value = match (entry.state, value) {
        (State::Active, Some(value)) => value,
        (state, _) => return Err(not_active(state)),
    };
    Ok(Found {
        version: Some(entry.version),
        kind: entry.kind,
        value,
        content_type: entry.content_type,
        metadata: entry.metadata,
        source: Source::Local,
        remote_version: String::new(),
        created: Some(entry.created),
    })
}

/// What a read of a version without a value answers.
pub(crate) fn not_active(state: State) -> Error {
    Error::new(Reason::NotActive, format!("the secret is {}", state.as_str()))
        .next("list its versions to see which have a value")
}

fn absent() -> Error {
    Error::new(Reason::NotFound, "no secret at this path")
}

fn check_expected(head: Option<&SecretHead>, expected: Expected) -> Result<(), Error> {
    let holds = match (expected, head) {
        (Expected::Any, _) => true,
        (Expected::Absent, head) => head.is_none_or(|head| head.state != State::Active),
        (Expected::Version(version), Some(head)) => head.current == version && head.state == State::Active,
        (Expected::Version(_), None) => false,
    };
    if holds {
        return Ok(());
    }
    Err(Error::new(Reason::PreconditionFailed, "the secret is not at the expected version")
        .next("read it again and decide again"))
}
