//! One path: what the backend says of it, what is decided, and the commit.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use scaivault_backends::background::{Background, Failed};
use scaivault_backends::{BackendError, RemoteSecret, RemoteVersion};
use scaivault_domain::audit::{Action, AuditRow};
use scaivault_domain::lease::LeaseKey;
use scaivault_domain::mapping::RemoteName;
use scaivault_domain::path::SecretPath;
use scaivault_domain::replica::SecretKey;
use scaivault_domain::secret::{Kind, Metadata, SecretValue, Source, State, Version, keep_within_limits};
use scaivault_domain::sync::fingerprint::canonical;
use scaivault_domain::sync::plan::{Agreement, Value};
use scaivault_domain::sync::{Base, Decision, Fingerprint, Local, Remote, SkipReason, decide};
use scaivault_domain::tenant::TenantId;
use scaivault_domain::time::{Clock, Timestamp};
use scaivault_domain::view::{BackendView, Route};
use scaivault_domain::{Error, Reason};
use tokio::sync::Semaphore;

use super::jobs::SyncJob;
use crate::audit::Audit;
use crate::connections::Connections;
use crate::credentials::OwnLeases;
use crate::model::{SecretHead, SecretVersionHead, generation_key, secret_key, version_key};
use crate::service::Configuration;
use crate::store::jobs::Claim;
use crate::store::{CommitError, Key, Records, RowVersion, StoreError, Tx};

/// How often a path is decided again that changes here meanwhile.
const ATTEMPTS: usize = 8;
/// What values are digested for.
const FINGERPRINT: &str = "fingerprint";
/// Reads that compare a copy with its backend at the same time.
const REFRESHES: usize = 16;

/// Where a path stands.
#[derive(Clone, Copy, Debug)]
pub(super) struct At<'a> {
    pub(super) tenant: &'a TenantId,
    pub(super) backend: &'a BackendView,
    pub(super) path: &'a SecretPath,
    pub(super) name: &'a RemoteName,
    pub(super) rule: usize,
}

/// What must still hold when a path is committed.
#[derive(Clone, Copy, Debug)]
pub(super) enum Mandate<'a> {
    /// This run of the backend's job.
    Run(&'a Claim<SyncJob>),
    /// This configuration of the tenant.
    Configuration(Option<RowVersion>),
}

/// Whether a secret that is gone in the backend is deleted here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Deleting {
    /// It is.
    Now,
    /// It is left as it is, and told.
    Later,
}

/// What became of a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Applied {
    /// Both sides are as agreed.
    Unchanged,
    /// It is new here.
    Created,
    /// It has a new value, state or metadata here.
    Updated,
    /// As [`Updated`](Self::Updated); we had changed it too.
    Overruled,
    /// It is deleted here.
    Tombstoned,
    /// It is gone in the backend, and is left as it is until it is known how many are.
    Gone,
    /// We are ahead, and stay it.
    LocalAhead,
    /// It is left as it is.
    Skipped(SkipReason, String),
    /// The backend failed to give it.
    Failed(String),
    /// The backend gives nothing at all.
    Down(String),
}

/// Why nothing more can be committed.
#[derive(Debug, thiserror::Error)]
pub(super) enum Stopped {
    /// Another runner has the job, or the configuration is another.
    #[error("the mandate has ended")]
    Fenced,
    /// The store does not answer.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What the backend says of a path.
enum Observed {
    Value { secret: RemoteSecret, past: Vec<Past> },
    Inactive(State),
    Gone,
    Unreadable(SkipReason, String),
    Failed(String),
    Down(String),
}

/// An older version.
struct Past {
    remote_version: String,
    created: Option<Timestamp>,
    state: State,
    secret: Option<RemoteSecret>,
}

/// Decides about paths and commits them, one by one.
#[derive(Clone)]
pub(super) struct Desk {
    pub(super) records: Records,
    pub(super) audit: Arc<Audit>,
    pub(super) clock: Arc<dyn Clock>,
}

impl Desk {
    /// Reads the path and does what there is to do. `listed` is the custom metadata, where a listing tells it and a
    /// read does not.
    pub(super) async fn read(
        &self,
        at: &At<'_>,
        backend: &Background<OwnLeases>,
        listed: Option<&Metadata>,
        mandate: Mandate<'_>,
        deleting: Deleting,
    ) -> Result<Applied, Stopped> {
        let head = self.head(at).await?;
        let base = head.as_ref().and_then(|(head, _)| head.copy_of(&at.backend.id));
        let asked = self.clock.now();
        let mut observed = observe(at, backend, base).await;
        if let Observed::Value { secret, .. } = &mut observed
            && secret.metadata.is_none()
        {
            secret.metadata = match (listed, &head) {
                (Some(listed), _) => Some(listed.clone()),
                // Nobody said that it changed.
                (None, Some((head, _))) => self.metadata(at, head.current).await?,
                (None, None) => None,
            };
        }
        self.settle(at, Some(head), &observed, asked, mandate, deleting).await
    }

    /// Takes a state that the listing showed.
    pub(super) async fn pull_state(
        &self,
        at: &At<'_>,
        state: State,
        mandate: Mandate<'_>,
    ) -> Result<Applied, Stopped> {
        self.settle(at, None, &Observed::Inactive(state), self.clock.now(), mandate, Deleting::Later).await
    }

    async fn settle(
        &self,
        at: &At<'_>,
        mut known: Option<Option<(SecretHead, RowVersion)>>,
        observed: &Observed,
        asked: Timestamp,
        mandate: Mandate<'_>,
        deleting: Deleting,
    ) -> Result<Applied, Stopped> {
        let effective = at.backend.rule(at.rule);
        for _ in 0..ATTEMPTS {
            let head = match known.take() {
                Some(head) => head,
                None => self.head(at).await?,
            };
            let (head, found) = head.map_or((None, None), |(head, version)| (Some(head), Some(version)));
            let base = head.as_ref().and_then(|head| head.copy_of(&at.backend.id));
            if base.is_some_and(|base| base.verified > asked) {
                // Somebody asked later than we did, and has committed what they saw.
                return Ok(Applied::Unchanged);
            }
            let local = Local::of(head.as_ref().map(|head| (head.current, head.state)), base, &at.backend.id);
            let remote = match observed {
                Observed::Value { secret, .. } => {
                    Remote::Read(self.compare(at, local, head.as_ref(), secret).await?)
                }
                Observed::Inactive(state) if base.is_some_and(|base| base.remote_state == *state) => {
                    Remote::Same
                }
                Observed::Inactive(state) => Remote::Inactive(*state),
                Observed::Gone => Remote::Gone,
                Observed::Unreadable(reason, detail) => return Ok(Applied::Skipped(*reason, detail.clone())),
                Observed::Failed(detail) => return Ok(Applied::Failed(detail.clone())),
                Observed::Down(detail) => return Ok(Applied::Down(detail.clone())),
            };
            let decision = decide(local, remote, effective.write_policy, effective.conflict_policy);
            let draft = Draft { desk: self, at, head: head.as_ref(), local, asked };
            let change = match (decision, observed) {
                (Decision::Nothing, _) => return Ok(Applied::Unchanged),
                (Decision::Skip(reason), _) => return Ok(Applied::Skipped(reason, String::new())),
                // The configuration refuses the policies that would write to the backend, or ask somebody.
                (Decision::LocalAhead | Decision::Push | Decision::PushDelete, _) => {
                    return Ok(Applied::LocalAhead);
                }
                (Decision::KeepLocal(_) | Decision::Conflict(_), _) => {
                    return Ok(Applied::Skipped(SkipReason::ConflictFrozen, String::new()));
                }
                (Decision::Create, Observed::Value { secret, past }) => {
                    draft.version(secret, past, Applied::Created)
                }
                (Decision::Pull(Agreement::Follows), Observed::Value { secret, past }) => {
                    let back = local == Local::Tombstoned;
                    draft.version(secret, past, if back { Applied::Created } else { Applied::Updated })
                }
                (Decision::Pull(Agreement::Overrules(_)), Observed::Value { secret, past }) => {
                    draft.version(secret, past, Applied::Overruled)
                }
                (Decision::Rebase, Observed::Value { secret, .. }) => {
                    match draft.rebase(secret, mandate).await? {
                        Some(change) => change,
                        None => return Ok(Applied::Unchanged),
                    }
                }
                (Decision::PullState(state), _) => draft.state(state).await?,
                (Decision::Tombstone(_), _) if deleting == Deleting::Later => return Ok(Applied::Gone),
                (Decision::Tombstone(_), _) => draft.tombstone().await?,
                (Decision::DropBase, _) => draft.without_base(),
                (
                    Decision::Read
                    | Decision::Confirm
                    | Decision::Create
                    | Decision::Pull(_)
                    | Decision::Rebase,
                    _,
                ) => {
                    unreachable!("a decision to take or to ask for a value is made of one that was not read")
                }
            };
            let key = secret_key(at.tenant, at.path);
            let tx = mandate.bind(at.tenant, change.tx).expect_as_found(key.clone(), found);
            let tx = match change.row {
                Some(row) => self.audit.stage(tx, &row),
                None => tx,
            };
            match self.records.store().commit(tx).await {
                Ok(_) => return Ok(change.applied),
                Err(CommitError::Precondition(lost)) if lost == key => {}
                Err(CommitError::Precondition(_)) => return Err(Stopped::Fenced),
                Err(CommitError::Unavailable(error)) => return Err(error.into()),
            }
        }
        Ok(Applied::Failed("it changed here again and again".into()))
    }

    /// Compares a value that was read with the agreed one, and with ours where that may be another.
    async fn compare(
        &self,
        at: &At<'_>,
        local: Local,
        head: Option<&SecretHead>,
        secret: &RemoteSecret,
    ) -> Result<Value, StoreError> {
        let base =
            head.and_then(|head| head.copy_of(&at.backend.id)).and_then(|base| base.fingerprint.as_ref());
        if base.is_some_and(|base| self.is_of(at.tenant, base, secret.kind, &secret.value)) {
            return Ok(Value::OfBase);
        }
        if matches!(local, Local::Unbased | Local::Changed | Local::Revived)
            && let Some(head) = head.filter(|head| head.state == State::Active)
        {
            let key = version_key(at.tenant, at.path.as_str(), head.current);
            let ours = self.records.get_secret::<SecretVersionHead>(&key).await?;
            let remote = canonical(secret.kind, secret.value.expose());
            if let Some((entry, Some(value))) = ours
                && *canonical(entry.kind, value.expose()) == *remote
            {
                return Ok(Value::OfLocal);
            }
        }
        Ok(Value::New)
    }

    async fn metadata(&self, at: &At<'_>, version: Version) -> Result<Option<Metadata>, StoreError> {
        let key = version_key(at.tenant, at.path.as_str(), version);
        Ok(self.records.get_secret::<SecretVersionHead>(&key).await?.map(|(entry, _)| entry.metadata))
    }

    async fn head(&self, at: &At<'_>) -> Result<Option<(SecretHead, RowVersion)>, StoreError> {
        self.records.get(&secret_key(at.tenant, at.path)).await
    }

    fn fingerprint(&self, tenant: &TenantId, kind: Kind, value: &SecretValue) -> Fingerprint {
        let data = canonical(kind, value.expose());
        let (key, mac) = self
            .records
            .keyring()
            .mac(None, tenant.as_str(), FINGERPRINT, &data)
            .expect("the ring has its primary key");
        Fingerprint { key: key.into(), mac: hex(&mac) }
    }

    /// Whether a value has this fingerprint, also if that was made with an older key.
    fn is_of(&self, tenant: &TenantId, agreed: &Fingerprint, kind: Kind, value: &SecretValue) -> bool {
        let data = canonical(kind, value.expose());
        let mac = self.records.keyring().mac(Some(agreed.key.into()), tenant.as_str(), FINGERPRINT, &data);
        mac.is_ok_and(|(_, mac)| hex(&mac) == agreed.mac)
    }
}

impl Mandate<'_> {
    fn bind(&self, tenant: &TenantId, tx: Tx) -> Tx {
        match self {
            Mandate::Run(claim) => claim.fence(tx),
            Mandate::Configuration(anchor) => tx.expect_as_found(generation_key(tenant), *anchor),
        }
    }
}

/// A change of one path.
struct ChangeOfPath {
    tx: Tx,
    row: Option<AuditRow>,
    applied: Applied,
}

/// Makes changes of a path from what is there.
struct Draft<'a> {
    desk: &'a Desk,
    at: &'a At<'a>,
    head: Option<&'a SecretHead>,
    local: Local,
    asked: Timestamp,
}

impl Draft<'_> {
    /// The backend's value becomes the current version, those in between become versions before it.
    fn version(&self, secret: &RemoteSecret, past: &[Past], applied: Applied) -> ChangeOfPath {
        let now = self.desk.clock.now();
        let mut version = self.head.map_or(0, |head| head.current);
        let mut tx = Tx::new();
        for past in past {
            version += 1;
            let secret = past.secret.as_ref();
            let entry = SecretVersionHead {
                version,
                kind: secret.map_or(Kind::Json, |secret| secret.kind),
                content_type: secret.map(|secret| secret.content_type.to_string()).unwrap_or_default(),
                metadata: Metadata::new(),
                state: past.state,
                created: past.created.unwrap_or(now),
                deleted: None,
                remote_version: past.remote_version.clone(),
            };
            tx = self.put_version(tx, &entry, secret.map(|secret| &secret.value));
        }
        version += 1;
        let entry = SecretVersionHead {
            version,
            kind: secret.kind,
            content_type: secret.content_type.to_string(),
            metadata: keep_within_limits(secret.metadata.clone().unwrap_or_default()),
            state: State::Active,
            created: secret.created.unwrap_or(now),
            deleted: None,
            remote_version: secret.remote_version.clone(),
        };
        tx = self.put_version(tx, &entry, Some(&secret.value));
        let base = self.base(version, State::Active, Some(secret));
        tx = self.put_head(
            tx,
            SecretHead { current: version, state: State::Active, changed: now, base: Some(base) },
        );
        ChangeOfPath { tx, row: Some(self.row(Action::SyncPull, version, &secret.remote_version)), applied }
    }

    /// The values agree: only what is known about them changes. `None`: not even that, for when they were compared is
    /// known of a whole cycle.
    async fn rebase(
        &self,
        secret: &RemoteSecret,
        mandate: Mandate<'_>,
    ) -> Result<Option<ChangeOfPath>, StoreError> {
        let (head, mut entry, value) = self.current().await?;
        let metadata = keep_within_limits(secret.metadata.clone().unwrap_or_default());
        let same = entry.metadata == metadata && head.state == State::Active;
        let mut tx = Tx::new();
        let mut changed = head.changed;
        if !same {
            changed = self.desk.clock.now();
            entry.metadata = metadata;
            entry.state = State::Active;
            tx = self.put_version(tx, &entry, value.as_ref());
        }
        let base = self.base(head.current, State::Active, Some(secret));
        let before = head.copy_of(&self.at.backend.id);
        let agreed = before.is_some_and(|before| Base { verified: base.verified, ..before.clone() } == base);
        if same && agreed && matches!(mandate, Mandate::Run(_)) {
            return Ok(None);
        }
        let tx =
            self.put_head(tx, SecretHead { state: State::Active, changed, base: Some(base), ..head.clone() });
        // Nothing that a reader could see has changed, so there is no row for it.
        let row = (!same).then(|| self.row(Action::SyncPull, head.current, &secret.remote_version));
        let applied = if same { Applied::Unchanged } else { Applied::Updated };
        Ok(Some(ChangeOfPath { tx, row, applied }))
    }

    /// The backend's state, which has no value, becomes ours. The value is kept, for the state may change back.
    async fn state(&self, state: State) -> Result<ChangeOfPath, StoreError> {
        let now = self.desk.clock.now();
        let (current, entry, value) = match self.head {
            Some(_) => {
                let (head, entry, value) = self.current().await?;
                (head.current, entry, value)
            }
            None => {
                let entry = SecretVersionHead {
                    version: 1,
                    kind: Kind::Json,
                    content_type: String::new(),
                    metadata: Metadata::new(),
                    state,
                    created: now,
                    deleted: None,
                    remote_version: String::new(),
                };
                (1, entry, None)
            }
        };
        let tx = self.put_version(Tx::new(), &SecretVersionHead { state, ..entry }, value.as_ref());
        let base = Base { remote_state: state, ..self.base(current, state, None) };
        let tx = self.put_head(tx, SecretHead { current, state, changed: now, base: Some(base) });
        let row = self.row(Action::SyncPull, current, "");
        let applied = if self.head.is_some() { Applied::Updated } else { Applied::Created };
        Ok(ChangeOfPath { tx, row: Some(row), applied })
    }

    /// It is gone in the backend: it is deleted here, softly.
    async fn tombstone(&self) -> Result<ChangeOfPath, StoreError> {
        let now = self.desk.clock.now();
        let (head, entry, value) = self.current().await?;
        let entry = SecretVersionHead { state: State::Deleted, deleted: Some(now), ..entry };
        let tx = self.put_version(Tx::new(), &entry, value.as_ref());
        let base = Base {
            remote_state: State::Deleted,
            tombstone: true,
            ..self.base(head.current, State::Deleted, None)
        };
        let gone =
            SecretHead { current: head.current, state: State::Deleted, changed: now, base: Some(base) };
        let tx = self.put_head(tx, gone);
        let row = self.row(Action::SyncDelete, head.current, "");
        Ok(ChangeOfPath { tx, row: Some(row), applied: Applied::Tombstoned })
    }

    /// Neither side has it any more.
    fn without_base(&self) -> ChangeOfPath {
        let tx = match self.head {
            Some(head) => self.put_head(Tx::new(), SecretHead { base: None, ..head.clone() }),
            None => Tx::new(),
        };
        ChangeOfPath { tx, row: None, applied: Applied::Unchanged }
    }

    /// What is agreed now. Without a value the fingerprint of the last one is kept: it may come back.
    fn base(&self, local_version: Version, local_state: State, secret: Option<&RemoteSecret>) -> Base {
        let before = self.head.and_then(|head| head.copy_of(&self.at.backend.id));
        let token = secret.and_then(RemoteSecret::seen).map(|seen| seen.token);
        Base {
            backend: self.at.backend.id.clone(),
            remote_name: self.at.name.as_str().into(),
            token: token.unwrap_or_default(),
            remote_version: match secret {
                Some(secret) => secret.remote_version.clone(),
                None => before.map(|base| base.remote_version.clone()).unwrap_or_default(),
            },
            fingerprint: match secret {
                Some(secret) => Some(self.desk.fingerprint(self.at.tenant, secret.kind, &secret.value)),
                // Ours may be another value by now, and then it was never agreed.
                None => {
                    before.filter(|_| self.local == Local::Same).and_then(|base| base.fingerprint.clone())
                }
            },
            remote_state: State::Active,
            local_version,
            local_state,
            verified: self.asked,
            tombstone: false,
            adopted: self.local == Local::Unbased || before.is_some_and(|base| base.adopted),
        }
    }

    async fn current(&self) -> Result<(&SecretHead, SecretVersionHead, Option<SecretValue>), StoreError> {
        let head = self.head.expect("what is changed in place is there");
        let key = version_key(self.at.tenant, self.at.path.as_str(), head.current);
        let (entry, value) =
            self.desk.records.get_secret::<SecretVersionHead>(&key).await?.ok_or_else(|| {
                StoreError::Corrupt("the head of a secret names a version that is not there".into())
            })?;
        Ok((head, entry, value))
    }

    fn put_version(&self, tx: Tx, entry: &SecretVersionHead, value: Option<&SecretValue>) -> Tx {
        let key = version_key(self.at.tenant, self.at.path.as_str(), entry.version);
        let sealed = self.desk.records.seal_secret(&key, entry, value);
        tx.put(key, sealed)
    }

    fn put_head(&self, tx: Tx, head: SecretHead) -> Tx {
        let key: Key = secret_key(self.at.tenant, self.at.path);
        let sealed = self.desk.records.seal(&key, &head);
        tx.put(key, sealed)
    }

    fn row(&self, action: Action, version: Version, remote_version: &str) -> AuditRow {
        let mut row = AuditRow::of_control_plane(
            self.at.tenant.clone(),
            action,
            self.at.path.as_str(),
            self.desk.clock.now(),
        );
        row.backend = Some(self.at.backend.id.to_string());
        row.remote_name = Some(self.at.name.as_str().into());
        row.version = Some(version);
        row.remote_version = (!remote_version.is_empty()).then(|| remote_version.into());
        row.source = Some(Source::Sync.as_str().into());
        row
    }
}

async fn observe(at: &At<'_>, backend: &Background<OwnLeases>, base: Option<&Base>) -> Observed {
    let secret = match backend.read(at.name).await {
        Ok(secret) => secret,
        Err(failed) => return Observed::without_value(&failed),
    };
    if secret.kind.check(secret.value.expose()).is_err() {
        return Observed::Unreadable(SkipReason::TooLarge, "the value is larger than 1 MiB".into());
    }
    match past(at, backend, base, &secret).await {
        Ok(past) => Observed::Value { secret, past },
        Err(failed) => Observed::without_value(&failed),
    }
}

impl Observed {
    fn without_value(failed: &Failed) -> Observed {
        match failed.cause {
            BackendError::NotFound | BackendError::NotActive(State::Deleted | State::Destroyed) => {
                Observed::Gone
            }
            BackendError::NotActive(state) => Observed::Inactive(state),
            BackendError::Forbidden => Observed::Unreadable(SkipReason::Forbidden, String::new()),
            BackendError::TooLarge => Observed::Unreadable(SkipReason::TooLarge, String::new()),
            BackendError::Checksum => Observed::Unreadable(SkipReason::Checksum, String::new()),
            BackendError::Unrepresentable => Observed::Unreadable(SkipReason::Charset, String::new()),
            _ if is_down(&failed.cause) => Observed::Down(failed.shown.message.to_string()),
            _ => Observed::Failed(failed.shown.message.to_string()),
        }
    }
}

/// Whether it is not one path's fault: the others would fail in the same way.
fn is_down(cause: &BackendError) -> bool {
    matches!(
        cause,
        BackendError::Unreachable(_)
            | BackendError::Timeout
            | BackendError::Server { .. }
            | BackendError::Open { .. }
            | BackendError::Throttled { .. }
            | BackendError::Busy
            | BackendError::EndpointRefused(_)
            | BackendError::LoginExpired
    )
}

/// The versions between the agreed one and `secret`, or the last few of a secret that is new here.
async fn past(
    at: &At<'_>,
    backend: &Background<OwnLeases>,
    base: Option<&Base>,
    secret: &RemoteSecret,
) -> Result<Vec<Past>, Failed> {
    let base = base.filter(|base| base.remote_name == at.name.as_str());
    let Ok(current) = secret.remote_version.parse::<u64>() else {
        return uncounted_past(at, backend, base, secret).await;
    };
    // A version that is brought back is one that is known; a lower one is of another secret of this name.
    let known =
        base.and_then(|base| base.remote_version.parse::<u64>().ok()).filter(|known| *known <= current);
    let first = known.map_or(1, |known| known + 1);
    // A history that is longer than was asked for is cut, also where a cycle missed much of it.
    let first = first.max((current + 1).saturating_sub(at.backend.sync.history_depth.into()));
    if first >= current {
        return Ok(Vec::new());
    }
    let history = history(at, backend).await?;
    let is_past = |line: &RemoteVersion| {
        line.remote_version.parse::<u64>().is_ok_and(|version| (first..current).contains(&version))
    };
    bring_along(at, backend, history.into_iter().filter(is_past)).await
}

/// The same of a store that names its versions without counting them; its history is in order.
async fn uncounted_past(
    at: &At<'_>,
    backend: &Background<OwnLeases>,
    base: Option<&Base>,
    secret: &RemoteSecret,
) -> Result<Vec<Past>, Failed> {
    let most = at.backend.sync.history_depth as usize - 1;
    if most == 0 || secret.remote_version.is_empty() {
        return Ok(Vec::new());
    }
    let agreed = base.map(|base| base.remote_version.as_str());
    if agreed == Some(secret.remote_version.as_str()) {
        return Ok(Vec::new());
    }
    let history = history(at, backend).await?;
    let between = between(&history, agreed, &secret.remote_version, most);
    bring_along(at, backend, history.into_iter().take(between.end).skip(between.start)).await
}

/// Where in a history, which is in order, the versions stand that came after the agreed one and before `current`; the
/// last `most` of them.
fn between(history: &[RemoteVersion], agreed: Option<&str>, current: &str, most: usize) -> Range<usize> {
    let place = |version: &str| history.iter().position(|line| line.remote_version == version);
    let Some(current) = place(current) else { return 0..0 };
    let first = agreed.and_then(place).map_or(0, |agreed| agreed + 1).max(current.saturating_sub(most));
    // What is agreed may stand behind: of two that are equally old, either does. Then nothing is between them.
    first.min(current)..current
}

/// The versions that the backend tells of; none, if it does not tell us. What is wrong with a history is nothing wrong
/// with the current value, which was read. An outage is told, for afterwards the history can be had.
async fn history(at: &At<'_>, backend: &Background<OwnLeases>) -> Result<Vec<RemoteVersion>, Failed> {
    match backend.history(at.name).await {
        Err(failed) if !is_down(&failed.cause) => Ok(Vec::new()),
        history => history,
    }
}

async fn bring_along(
    at: &At<'_>,
    backend: &Background<OwnLeases>,
    history: impl Iterator<Item = RemoteVersion>,
) -> Result<Vec<Past>, Failed> {
    let mut past = Vec::new();
    for line in history {
        let (state, secret) = match line.state {
            State::Active => match backend.read_version(at.name, &line.remote_version).await {
                Ok(secret) if secret.kind.check(secret.value.expose()).is_ok() => {
                    (State::Active, Some(secret))
                }
                // Too large to be kept: what is left is that it was there.
                Ok(_) => (State::Destroyed, None),
                Err(failed) if is_down(&failed.cause) => return Err(failed),
                Err(failed) => (state_without_value(&failed.cause), None),
            },
            state => (state, None),
        };
        past.push(Past { remote_version: line.remote_version, created: line.created, state, secret });
    }
    Ok(past)
}

/// As what an older version is kept whose value cannot be had.
fn state_without_value(cause: &BackendError) -> State {
    match cause {
        BackendError::NotActive(state) => *state,
        // It went while it was read, or is too large to be kept.
        BackendError::NotFound | BackendError::TooLarge => State::Destroyed,
        // The backend still has it, and keeps it from us.
        _ => State::Disabled,
    }
}

/// Compares single copies with their backends, for readers who want them fresher than the last cycle left them.
pub struct Refresher {
    desk: Desk,
    connections: Arc<Connections>,
    /// How many may be compared at the same time, by backend: one that hangs is in nobody else's way.
    turns: Mutex<HashMap<LeaseKey, Arc<Semaphore>>>,
    /// Who compares which secret now; whoever comes meanwhile waits for what it finds.
    under_way: Mutex<HashMap<SecretKey, Weak<tokio::sync::Mutex<()>>>>,
}

impl std::fmt::Debug for Refresher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Refresher").finish_non_exhaustive()
    }
}

impl Refresher {
    /// Commits to `records`.
    pub fn new(
        records: Records,
        connections: Arc<Connections>,
        audit: Arc<Audit>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let desk = Desk { records, audit, clock };
        Refresher { desk, connections, turns: Mutex::default(), under_way: Mutex::default() }
    }

    /// Runs a cycle for one path, by the configuration that it was routed with. What the backend has is ours when this
    /// returns. Deletions are left to the next cycle, which counts them.
    ///
    /// # Errors
    /// `too_stale`, if the backend could not be asked.
    pub async fn refresh(
        &self,
        configuration: &Configuration,
        path: &SecretPath,
        route: &Route,
    ) -> Result<(), Error> {
        let Route::Synced { backend, name, rule } = route else { return Err(Error::internal()) };
        let tenant = &configuration.tenant;
        let asked = self.desk.clock.now();
        let key = LeaseKey { tenant: tenant.clone(), backend: backend.id.clone() };
        let turns =
            lock(&self.turns).entry(key).or_insert_with(|| Arc::new(Semaphore::new(REFRESHES))).clone();
        let compare = async {
            let alone = self.alone(&SecretKey::new(tenant, path));
            let _alone = alone.lock().await;
            let at = At { tenant, backend, path, name, rule: *rule };
            if self.verified_since(&at, asked).await? {
                return Ok(Applied::Unchanged);
            }
            let Ok(_turn) = turns.try_acquire() else {
                return Ok(Applied::Failed("too many others are being compared with the backend now".into()));
            };
            let background = self.connections.background(tenant, backend).map_err(Refused::Error)?;
            let mandate = Mandate::Configuration(configuration.anchor);
            Ok::<_, Refused>(self.desk.read(&at, &background, None, mandate, Deleting::Later).await?)
        };
        let too_stale = |why: String| {
            Err(Error::new(Reason::TooStale, format!("the copy is older than was asked for: {why}"))
                .retry_after(Duration::from_secs(1)))
        };
        match tokio::time::timeout(backend.timeout, compare).await {
            Err(_) => too_stale("the backend did not answer in time".into()),
            Ok(Err(Refused::Stopped(Stopped::Fenced))) => {
                too_stale("the configuration has just changed".into())
            }
            Ok(Err(Refused::Stopped(Stopped::Store(error)))) => Err(error.into()),
            Ok(Err(Refused::Error(error))) => Err(error),
            Ok(Ok(Applied::Failed(why) | Applied::Down(why))) => too_stale(why),
            Ok(Ok(Applied::Skipped(reason, _))) => {
                too_stale(format!("it cannot be verified ({})", reason.as_str()))
            }
            Ok(Ok(Applied::LocalAhead)) => too_stale("it was changed here".into()),
            Ok(Ok(Applied::Gone)) => too_stale("it is gone in the backend; the next sync decides".into()),
            Ok(Ok(
                Applied::Unchanged
                | Applied::Created
                | Applied::Updated
                | Applied::Overruled
                | Applied::Tombstoned,
            )) => Ok(()),
        }
    }

    fn alone(&self, key: &SecretKey) -> Arc<tokio::sync::Mutex<()>> {
        let mut under_way = lock(&self.under_way);
        if let Some(alone) = under_way.get(key).and_then(Weak::upgrade) {
            return alone;
        }
        under_way.retain(|_, alone| alone.strong_count() > 0);
        let alone = Arc::default();
        under_way.insert(key.clone(), Arc::downgrade(&alone));
        alone
    }

    async fn verified_since(&self, at: &At<'_>, asked: Timestamp) -> Result<bool, StoreError> {
        let head = self.desk.head(at).await?;
        Ok(head
            .is_some_and(|(head, _)| head.copy_of(&at.backend.id).is_some_and(|base| base.verified >= asked)))
    }
}

/// Why a path was not compared.
enum Refused {
    Stopped(Stopped),
    Error(Error),
}

impl From<Stopped> for Refused {
    fn from(stopped: Stopped) -> Self {
        Refused::Stopped(stopped)
    }
}

impl From<StoreError> for Refused {
    fn from(error: StoreError) -> Self {
        Refused::Stopped(error.into())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_came_after_the_agreed_version_is_brought_along() {
        let line = |version: &str| RemoteVersion {
            remote_version: version.into(),
            state: State::Active,
            created: None,
        };
        let history = ["a", "b", "c", "d"].map(line);
        for (agreed, current, most, expected) in [
            (None, "d", 9, 0..3),
            (None, "d", 2, 1..3),
            (Some("a"), "d", 9, 1..3),
            (Some("a"), "d", 1, 2..3),
            (Some("c"), "d", 9, 3..3),
            (Some("forgotten"), "c", 9, 0..2),
            // Of two that are equally old either may be the later one.
            (Some("d"), "c", 9, 2..2),
            (Some("a"), "unlisted", 9, 0..0),
        ] {
            assert_eq!(between(&history, agreed, current, most), expected, "{agreed:?} {current} {most}");
        }
    }

    #[test]
    fn only_an_outage_of_the_history_fails_a_path() {
        let (pause, gone) = (Duration::from_secs(1), BackendError::NotFound);
        for outage in [
            BackendError::Unreachable("down"),
            BackendError::Timeout,
            BackendError::Throttled { retry_after: None },
            BackendError::Server { status: 503 },
            BackendError::Open { retry_after: pause },
            BackendError::Busy,
            BackendError::LoginExpired,
        ] {
            assert!(is_down(&outage), "{outage}");
        }
        for (of_one, kept_as) in [
            (gone, State::Destroyed),
            (BackendError::TooLarge, State::Destroyed),
            (BackendError::NotActive(State::Expired), State::Expired),
            (BackendError::Forbidden, State::Disabled),
            (BackendError::Checksum, State::Disabled),
            (BackendError::InvalidAnswer("odd"), State::Disabled),
            (BackendError::Unsupported("versions"), State::Disabled),
        ] {
            assert!(!is_down(&of_one), "{of_one}");
            assert_eq!(state_without_value(&of_one), kept_as, "{of_one}");
        }
    }
}
