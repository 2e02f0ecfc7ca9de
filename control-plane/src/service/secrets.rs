//! Secrets: ScaiVault's own, and those of backends as the control plane sees them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use scaivault_domain::access::{Authorized, List, Read, Write};
use scaivault_domain::audit::{Action, AuditRow, Origin};
use scaivault_domain::mapping::RemoteName;
use scaivault_domain::path::{Folder, SecretPath};
use scaivault_domain::replica::{Absence, Stale};
use scaivault_domain::secret::{Kind, Metadata, SecretValue, Source, State, Version, check_metadata};
use scaivault_domain::sync::Mode;
use scaivault_domain::tenant::TenantId;
use scaivault_domain::time::{Clock, Timestamp};
use scaivault_domain::view::{BackendView, Route};
use scaivault_domain::{Error, Reason};

use super::{ATTEMPTS, Committed, Configuration, Configurations, Page, PageRequest, contended, settle};
use crate::audit::Audit;
use crate::connections::Connections;
use crate::model::{SecretHead, SecretVersionHead, generation_key, secret_key, version_key};
use crate::store::{Depth, Entry, Owner, Records, RowVersion, Space, StoreError, Tx};
use crate::sync::{Copies, Copy, Refresher};

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
    /// Time since the value was verified against its backend; zero for our own.
    pub age: Duration,
    /// Whether that is longer than the period of its sync.
    pub stale: Stale,
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
    copies: Arc<Copies>,
    refresher: Arc<Refresher>,
    audit: Arc<Audit>,
    clock: Arc<dyn Clock>,
}

/// Which state of a secret a reader wants.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wanted {
    /// This version; `None`: the current one.
    pub version: Option<Version>,
    /// This version or a later one; 0: any.
    pub at_least: Version,
    /// A copy that was compared with its backend within this time.
    pub max_age: Option<Duration>,
}

impl Secrets {
    /// Secrets of `records`, and of backends through `connections`.
    pub fn new(
        records: Records,
        configurations: Arc<Configurations>,
        connections: Arc<Connections>,
        copies: Arc<Copies>,
        refresher: Arc<Refresher>,
        audit: Arc<Audit>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        Secrets { records, configurations, connections, copies, refresher, audit, clock }
    }

    /// Reads a secret. The audit row is written before the value is given.
    ///
    /// # Errors
    /// `not_found`, `not_synced`, `not_active`, `version_unsupported`, `too_stale`, or what the backend did wrong.
    pub async fn get(
        &self,
        allowed: &Authorized<Read>,
        origin: &Origin,
        wanted: Wanted,
    ) -> Result<Found, Error> {
        let mut row = self.row(allowed.caller(), origin, Action::SecretRead, allowed.path().as_str());
        let outcome = self.read(allowed, wanted, &mut row).await;
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
        wanted: Wanted,
        row: &mut AuditRow,
    ) -> Result<Found, Error> {
        let (tenant, path) = (allowed.tenant(), allowed.path());
        let configuration = self.configurations.of(tenant).await?;
        let route = configuration.route(path);
        if let Some(backend) = route.backend() {
            row.backend = Some(backend.id.to_string());
        }
        let found = match &route {
            Route::Local => local(&self.records, tenant, path, wanted.version).await?,
            Route::Unrepresentable { backend } => return Err(Error::unrepresentable(&backend.name)),
            Route::Proxied { backend, name } => {
                row.remote_name = Some(name.as_str().into());
                self.proxied(tenant, backend, name, &wanted).await?
            }
            Route::Synced { backend, name, rule } => {
                row.remote_name = Some(name.as_str().into());
                if !backend.enabled {
                    return Err(Error::backend_disabled(&backend.name));
                }
                match self.copies.find(tenant, path, &route).await? {
                    Ok((_, replica)) => {
                        let copy = self.copies.aged(tenant, backend, *rule, path, replica).await?;
                        self.synced(&configuration, path, &route, copy, wanted).await?
                    }
                    Err(Absence::Proxy) => self.proxied(tenant, backend, name, &wanted).await?,
                    Err(Absence::NotFound) => return Err(absent()),
                    Err(Absence::NotSynced(reason)) => return Err(Error::not_synced(reason)),
                }
            }
        };
        if found.version.is_some_and(|version| version < wanted.at_least) {
            return Err(Error::new(Reason::TooStale, "there is no version that late")
                .next("read without `min_version`, or write first"));
        }
        Ok(found)
    }

    async fn proxied(
        &self,
        tenant: &TenantId,
        backend: &BackendView,
        name: &RemoteName,
        wanted: &Wanted,
    ) -> Result<Found, Error> {
        let unsupported = |pointer| {
            let detail = "a path that is read in its backend has only its current version";
            Err(Error::field(Reason::VersionUnsupported, pointer, detail))
        };
        if wanted.version.is_some() {
            return unsupported("/version");
        }
        if wanted.at_least > 0 {
            return unsupported("/min_version");
        }
        let secret = self.connections.read(tenant, backend, name).await?;
        Ok(Found {
            version: None,
            kind: secret.kind,
            value: secret.value.clone(),
            content_type: secret.content_type.to_string(),
            metadata: secret.metadata.clone().unwrap_or_default(),
            source: Source::Proxy,
            remote_version: secret.remote_version.clone(),
            created: secret.created,
            age: Duration::ZERO,
            stale: Stale::No,
        })
    }

    /// A copy as it was wanted: another version of it, or one that is fresh enough.
    async fn synced(
        &self,
        configuration: &Configuration,
        path: &SecretPath,
        route: &Route,
        copy: Copy,
        wanted: Wanted,
    ) -> Result<Found, Error> {
        let Route::Synced { backend, rule, .. } = route else { return Err(Error::internal()) };
        let tenant = &configuration.tenant;
        let found = |copy: Copy| {
            let replica = copy.replica;
            let value = replica.value.ok_or_else(|| Error::not_active(replica.state))?;
            Ok(Found {
                version: Some(replica.version),
                kind: replica.kind,
                value,
                content_type: replica.content_type,
                metadata: replica.metadata,
                source: Source::Sync,
                remote_version: replica.remote_version,
                created: replica.created,
                age: copy.age,
                stale: copy.stale,
            })
        };
        if let Some(version) = wanted.version.filter(|version| *version != copy.replica.version) {
            let (age, stale) = (copy.age, copy.stale);
            let older = local(&self.records, tenant, path, Some(version)).await?;
            return Ok(Found { source: Source::Sync, age, stale, ..older });
        }
        let limits = [wanted.max_age, backend.sync.max_staleness];
        let Some(limit) = limits.into_iter().flatten().min().filter(|limit| copy.age > *limit) else {
            return found(copy);
        };
        self.refresher.refresh(configuration, path, route).await?;
        match self.copies.find(tenant, path, route).await? {
            Ok((_, replica)) => {
                let copy = self.copies.aged(tenant, backend, *rule, path, replica).await?;
                tracing::debug!(?limit, age = ?copy.age, "a copy was verified for its reader");
                found(copy)
            }
            Err(_) => Err(absent()),
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
        let route = self.configurations.of(tenant).await?.route(path);
        row.backend = route.backend().map(|backend| backend.id.to_string());
        let copied = match &route {
            Route::Synced { .. } => self.copies.find(tenant, path, &route).await?.is_ok(),
            Route::Unrepresentable { backend } => return Err(Error::unrepresentable(&backend.name)),
            Route::Local | Route::Proxied { .. } => false,
        };
        if let Route::Proxied { backend, name } | Route::Synced { backend, name, .. } = &route
            && !copied
        {
            row.remote_name = Some(name.as_str().into());
            let history = self.connections.history(tenant, backend, name).await?;
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
                remote_version: entry.remote_version,
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
    ) -> Result<Committed<(Version, Timestamp)>, Error> {
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
    ) -> Result<Committed<(Version, Timestamp)>, Error> {
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
                remote_version: String::new(),
            };
            let mut row = row.clone();
            row.version = Some(version);
            row.source = Some(Source::Local.as_str().into());
            // A copy that was detached remembers its base: if its backend comes back, both sides can be compared.
            let base = head.as_ref().and_then(|(head, _)| head.base.clone());
            let head_key = secret_key(tenant, path);
            let version_key = version_key(tenant, path.as_str(), version);
            // A mapping that comes meanwhile must see this secret, or this write that mapping.
            let tx = Tx::new()
                .expect_as_found(generation_key(tenant), anchor)
                .expect_as_found(head_key.clone(), head.map(|(_, version)| version))
                .put(
                    head_key.clone(),
                    self.records.seal(
                        &head_key,
                        &SecretHead { current: version, state: State::Active, changed: now, base },
                    ),
                )
                .put(version_key.clone(), self.records.seal_secret(&version_key, &entry, Some(&new.value)));
            let tx = self.audit.stage(tx, &row.ended(origin, &Ok(())));
            if let Some(revision) = settle(self.records.store().commit(tx).await)? {
                return Ok(Committed { value: (version, now), revision });
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
    ) -> Result<Committed<()>, Error> {
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
    ) -> Result<Committed<()>, Error> {
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
            let now = self.clock.now();
            entry.state = State::Deleted;
            entry.deleted = Some(now);
            let mut row = row.clone();
            row.version = Some(head.current);
            row.source = Some(Source::Local.as_str().into());
            let head_key = secret_key(tenant, path);
            let gone = SecretHead { state: State::Deleted, changed: now, ..head };
            let tx = Tx::new()
                .expect_as_found(generation_key(tenant), anchor)
                .expect(head_key.clone(), head_version)
                .put(head_key.clone(), self.records.seal(&head_key, &gone))
                .put(key.clone(), self.records.seal_secret(&key, &entry, value.as_ref()));
            let tx = self.audit.stage(tx, &row.ended(origin, &Ok(())));
            if let Some(revision) = settle(self.records.store().commit(tx).await)? {
                return Ok(Committed { value: (), revision });
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
            let asked = self.asked_rules(tenant, backend).await?;
            if asked.is_empty() {
                continue;
            }
            let found = self.connections.children(tenant, backend, folder).await?;
            names
                .extend(found.into_iter().filter(|name| is_of(backend, &asked, name)).map(|name| (name, ())));
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
        configuration: &Configuration,
        entry: &Entry,
    ) -> Result<bool, StoreError> {
        let Entry::Row { name, row } = entry else { return Ok(true) };
        let Ok(path) = SecretPath::check(name) else { return Ok(false) };
        let head: SecretHead = self.records.open(&secret_key(tenant, &path), &row.value)?;
        Ok(head.state == State::Active
            && match configuration.route(&path) {
                Route::Local => true,
                Route::Proxied { .. } | Route::Unrepresentable { .. } => false,
                Route::Synced { backend, .. } => backend.enabled && head.copy_of(&backend.id).is_some(),
            })
    }

    /// The rules whose paths are listed by asking the backend: those that are proxied, and those that no cycle has seen.
    async fn asked_rules(&self, tenant: &TenantId, backend: &BackendView) -> Result<Vec<usize>, StoreError> {
        let mut asked = backend.rules_in(Mode::Proxy);
        for rule in backend.rules_in(Mode::Sync) {
            if self.copies.is_unseen(tenant, backend, rule).await? {
                asked.push(rule);
            }
        }
        Ok(asked)
    }

    /// Refuses a path that a backend owns; answers the anchor of the configuration that says so.
    async fn check_local(&self, tenant: &TenantId, path: &SecretPath) -> Result<Option<RowVersion>, Error> {
        let configuration = self.configurations.of(tenant).await?;
        match configuration.route(path) {
            Route::Local => Ok(configuration.anchor),
            Route::Proxied { backend, .. }
            | Route::Synced { backend, .. }
            | Route::Unrepresentable { backend } => Err(Error::federated_read_only(&backend.name)),
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

/// Whether a listed name is a folder, or a path of one of these rules.
fn is_of(backend: &BackendView, rules: &[usize], name: &str) -> bool {
    let Ok(path) = SecretPath::check(name) else { return true };
    backend.mapping.owner(&path).is_some_and(|rule| rules.contains(&rule))
}

fn is_visible(allowed: &Authorized<List, Folder>, name: &str) -> bool {
    match name.strip_suffix('/') {
        Some(folder) => allowed.may_see_below(folder.split('/')),
        None => SecretPath::check(name).is_ok_and(|path| allowed.may_see(&path)),
    }
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
        (state, _) => return Err(Error::not_active(state)),
    };
    Ok(Found {
        version: Some(entry.version),
        kind: entry.kind,
        value,
        content_type: entry.content_type,
        metadata: entry.metadata,
        source: Source::Local,
        remote_version: entry.remote_version,
        created: Some(entry.created),
        age: Duration::ZERO,
        stale: Stale::No,
    })
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
