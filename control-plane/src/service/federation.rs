//! Backends: their configuration and the rules of changing it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use scaivault_backends::{BackendError, Egress};
use scaivault_domain::access::{Administer, Authorized, Caller, Capability, Scope};
use scaivault_domain::audit::{Action, AuditRow, Origin};
use scaivault_domain::backend::{BackendId, BackendSpec, Provider};
use scaivault_domain::lease::LeaseKey;
use scaivault_domain::mapping::PathMapping;
use scaivault_domain::path::SecretPath;
use scaivault_domain::sync::MIN_INTERVAL;
use scaivault_domain::tenant::TenantId;
use scaivault_domain::time::Clock;
use scaivault_domain::{Error, Reason};

use super::testing::Trials;
use super::{ATTEMPTS, Committed, Configuration, Configurations, contended, settle};
use crate::audit::Audit;
use crate::credentials::Credentials;
use crate::model::{BackendRecord, GenerationRecord, SecretHead, generation_key};
use crate::store::{Key, Owner, Records, RowVersion, Space, Tx};
use crate::sync::{Leaving, Losing, Reconfiguration, Syncs};

/// How many covered secrets a refusal names.
const NAMED: usize = 10;

/// What the operator allows in backend configurations.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Endpoints without TLS.
    pub plaintext: bool,
    /// `tls_verify: false`.
    pub unverified_tls: bool,
    /// The shortest period of a sync.
    pub sync_interval: Duration,
    /// Where backends may be.
    pub egress: Egress,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            plaintext: false,
            unverified_tls: false,
            sync_interval: MIN_INTERVAL,
            egress: Egress::default(),
        }
    }
}

impl Limits {
    /// What the operator says of every connection, whichever identity is shown on it.
    fn check(&self, provider: &Provider) -> Result<(), Error> {
        for (field, endpoint) in provider.endpoints() {
            if !endpoint.is_https() && !self.plaintext {
                let pointer = format!("/config/{field}");
                return Err(Error::field(Reason::InvalidConfig, pointer, "must be https")
                    .next("use TLS, or start the control plane with --allow-plaintext-backends"));
            }
        }
        if !provider.target().tls().verify && !self.unverified_tls {
            let detail = "may only be false if the operator allows it";
            return Err(Error::field(Reason::InvalidConfig, "/config/tls_verify", detail).next(
                "give the server's CA as `ca_cert`, or start the control plane with --allow-unverified-tls",
            ));
        }
        Ok(())
    }
}

/// Whether a mapping may hide existing local secrets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Covered {
    /// It may not.
    Refused,
    /// The caller accepts it.
    Adopted,
}

/// What the caller of a change accepts.
#[derive(Clone, Copy, Debug)]
pub struct Consent {
    /// That local secrets are hidden.
    pub covered: Covered,
    /// That copies which were changed here are erased.
    pub losing: Losing,
}

/// A change that is allowed and whole, but for the commit.
pub(super) struct Planned {
    /// What will be stored.
    pub(super) record: BackendRecord,
    /// What is stored; `None`: nothing yet.
    pub(super) before: Option<(BackendRecord, RowVersion)>,
    tx: Tx,
}

/// The service of backends.
#[derive(Debug)]
pub struct Federation {
    records: Records,
    pub(super) configurations: Arc<Configurations>,
    pub(super) credentials: Arc<Credentials>,
    syncs: Arc<Syncs>,
    pub(super) audit: Arc<Audit>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) limits: Limits,
    pub(super) trials: Arc<Trials>,
}

impl Federation {
    /// Backends of `records`.
    pub fn new(
        records: Records,
        configurations: Arc<Configurations>,
        credentials: Arc<Credentials>,
        syncs: Arc<Syncs>,
        audit: Arc<Audit>,
        clock: Arc<dyn Clock>,
        limits: Limits,
    ) -> Self {
        let trials = Arc::default();
        Federation { records, configurations, credentials, syncs, audit, clock, limits, trials }
    }

    /// Configures a backend.
    ///
    /// # Errors
    /// `already_exists` for a taken name, `mapping_overlap`, `credential_cycle`, `credential_unusable`,
    /// `local_secrets_covered`, and `permission_denied` by the rules of [`BackendSpec::authorize_change`].
    pub async fn create(
        &self,
        allowed: &Authorized<Administer, Scope>,
        origin: &Origin,
        spec: BackendSpec,
        covered: Covered,
    ) -> Result<Committed<(BackendRecord, RowVersion)>, Error> {
        let consent = Consent { covered, losing: Losing::Refused };
        self.change(allowed, origin, &new_id()?, consent, |_| Ok(spec.clone())).await
    }

    /// Changes a backend: `edit` makes the new configuration of the old one.
    ///
    /// # Errors
    /// As [`create`](Self::create), `not_found`, and `precondition_failed` if `expected` is not the current version.
    pub async fn update(
        &self,
        allowed: &Authorized<Administer, Scope>,
        origin: &Origin,
        id: &BackendId,
        expected: Option<RowVersion>,
        consent: Consent,
        edit: impl Fn(&BackendSpec) -> Result<BackendSpec, Error>,
    ) -> Result<Committed<(BackendRecord, RowVersion)>, Error> {
        self.change(allowed, origin, id, consent, |before| edited(before, expected, &edit)).await
    }

    async fn change(
        &self,
        allowed: &Authorized<Administer, Scope>,
        origin: &Origin,
        id: &BackendId,
        consent: Consent,
        decide: impl Fn(Option<&(BackendRecord, RowVersion)>) -> Result<BackendSpec, Error>,
    ) -> Result<Committed<(BackendRecord, RowVersion)>, Error> {
        for _ in 0..ATTEMPTS {
            let Planned { record, tx, .. } = self.plan(allowed, id, consent, &decide).await?;
            let mut row = AuditRow::new(
                allowed.caller(),
                origin,
                Action::BackendWrite,
                record.spec.name.as_str(),
                record.updated,
            );
            row.backend = Some(id.to_string());
            if let Some(revision) = settle(self.records.store().commit(self.audit.stage(tx, &row)).await)? {
                self.syncs.nudge();
                return Ok(Committed { value: (record, revision), revision });
            }
        }
        Err(contended())
    }

    /// Decides a change and checks everything about it; nothing has happened yet.
    pub(super) async fn plan(
        &self,
        allowed: &Authorized<Administer, Scope>,
        id: &BackendId,
        consent: Consent,
        decide: impl Fn(Option<&(BackendRecord, RowVersion)>) -> Result<BackendSpec, Error>,
    ) -> Result<Planned, Error> {
        let tenant = allowed.tenant();
        let configuration = self.configurations.of(tenant).await?;
        let before = configuration.backend(id).ok();
        let mut spec = decide(before)?;
        let old = before.map(|(record, _)| &record.spec);
        let mut random = [0; 16];
        getrandom::fill(&mut random).map_err(|_| Error::internal())?;
        spec.provider = spec.provider.with_external_id(old.map(|old| &old.provider), random)?;
        spec.authorize_change(old, allowed.caller())?;
        self.check_spec(&configuration, id, &spec)?;
        if old.is_none_or(|old| old.provider != spec.provider) {
            self.check_egress(&spec).await?;
            self.credentials.check(tenant, &spec.provider).await?;
        }
        if consent.covered == Covered::Refused && old.is_none_or(|old| old.mapping != spec.mapping) {
            self.check_covered(tenant, &spec.mapping, old.map(|old| &old.mapping)).await?;
        }

        let now = self.clock.now();
        let generation = configuration.generation + 1;
        // Nothing that was obtained for another store or login is good for this one.
        let login_generation = match before {
            Some((record, _)) if record.spec.provider == spec.provider => record.login_generation,
            _ => generation,
        };
        let record = BackendRecord {
            id: id.clone(),
            spec,
            generation,
            login_generation,
            created: before.map_or(now, |(record, _)| record.created),
            updated: now,
        };
        let key = Key::new(tenant, Space::Backend, id.as_str());
        let tx = self.next_generation(&configuration).put(key.clone(), self.records.seal(&key, &record));
        let change = Reconfiguration {
            before: old,
            after: Some(&record.spec),
            leaving: Leaving::Detached,
            losing: consent.losing,
        };
        let at = LeaseKey { tenant: tenant.clone(), backend: id.clone() };
        let tx = self.syncs.reconfigure(tx, &at, generation, &change).await?;
        let before = before.cloned();
        Ok(Planned { record, before, tx })
    }

    /// The rules of a configuration by itself, and beside the others of its tenant.
    pub(super) fn check_spec(
        &self,
        configuration: &Configuration,
        id: &BackendId,
        spec: &BackendSpec,
    ) -> Result<(), Error> {
        self.limits.check(&spec.provider)?;
        spec.provider.kind().naming().check(&spec.mapping)?;
        spec.sync.check(spec.mode, spec.mapping.rules(), self.limits.sync_interval)?;
        check_against_others(configuration, id, spec)
    }

    /// Deletes a backend's configuration; what is in the remote store stays as it is. Its copies become ordinary local
    /// secrets, unless they are to be erased.
    ///
    /// # Errors
    /// `not_found`, and `precondition_failed` if `expected` is not the current version.
    pub async fn delete(
        &self,
        allowed: &Authorized<Administer, Scope>,
        origin: &Origin,
        id: &BackendId,
        expected: Option<RowVersion>,
        leaving: Leaving,
    ) -> Result<Committed<BackendRecord>, Error> {
        let tenant = allowed.tenant();
        for _ in 0..ATTEMPTS {
            let configuration = self.configurations.of(tenant).await?;
            let (record, version) = configuration.backend(id)?;
            check_version(*version, expected)?;
            if leaving == Leaving::Purged {
                check_deletes(allowed.caller(), &record.spec)?;
            }
            let tx =
                self.next_generation(&configuration).delete(Key::new(tenant, Space::Backend, id.as_str()));
            let change =
                Reconfiguration { before: Some(&record.spec), after: None, leaving, losing: Losing::Refused };
            let at = LeaseKey { tenant: tenant.clone(), backend: id.clone() };
            let tx = self.syncs.reconfigure(tx, &at, configuration.generation + 1, &change).await?;
            let mut row = AuditRow::new(
                allowed.caller(),
                origin,
                Action::BackendWrite,
                record.spec.name.as_str(),
                self.clock.now(),
            );
            row.backend = Some(id.to_string());
            if let Some(revision) = settle(self.records.store().commit(self.audit.stage(tx, &row)).await)? {
                self.syncs.nudge();
                return Ok(Committed { value: record.clone(), revision });
            }
        }
        Err(contended())
    }

    /// A transaction that only happens if `configuration` is still the committed one, and makes the next.
    fn next_generation(&self, configuration: &Configuration) -> Tx {
        let anchor = generation_key(&configuration.tenant);
        let next = GenerationRecord { generation: configuration.generation + 1 };
        Tx::new()
            .expect_as_found(anchor.clone(), configuration.anchor)
            .put(anchor.clone(), self.records.seal(&anchor, &next))
    }

    /// Refuses an endpoint that could not be connected to anyway. Asked after the rights: it looks names up.
    pub(super) async fn check_egress(&self, spec: &BackendSpec) -> Result<(), Error> {
        for (field, endpoint) in spec.provider.endpoints() {
            let Err(error) = self.limits.egress.check_resolved(&endpoint).await else { continue };
            let BackendError::EndpointRefused(what) = &error else { return Err(error.into()) };
            let detail = format!("is, or leads to, {what}, which the operator does not allow");
            let refused = Error::field(Reason::InvalidConfig, format!("/config/{field}"), detail);
            return Err(match error.hint() {
                Some(hint) => refused.next(hint),
                None => refused,
            });
        }
        Ok(())
    }

    /// Refuses a mapping that would hide local secrets which no mapping hid before.
    async fn check_covered(
        &self,
        tenant: &TenantId,
        mapping: &PathMapping,
        before: Option<&PathMapping>,
    ) -> Result<(), Error> {
        let mut covered: BTreeSet<String> = BTreeSet::new();
        for rule in mapping.rules() {
            let mut prefix = rule.pattern.literal_prefix().collect::<Vec<_>>().join("/");
            if !prefix.is_empty() && !rule.pattern.is_literal() {
                prefix.push('/');
            }
            for (name, _, _) in
                self.records.scan_all::<SecretHead>(&Owner::from(tenant), Space::Secret, &prefix).await?
            {
                let Ok(path) = SecretPath::check(&name) else { continue };
                let hidden_already = before.is_some_and(|before| before.owner(&path).is_some());
                if rule.pattern.matches(&path) && !hidden_already {
                    covered.insert(name);
                }
            }
        }
        if covered.is_empty() {
            return Ok(());
        }
        let named = covered.iter().take(NAMED).map(|path| format!("`{path}`")).collect::<Vec<_>>().join(", ");
        let more = covered.len().saturating_sub(NAMED);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        let detail = format!("would hide the local secrets {named}{more}");
        Err(Error::field(Reason::LocalSecretsCovered, "/path_mapping", detail)
            .next("move them, narrow the mapping, or send `\"adopt\": true` to hide them"))
    }
}

/// The id of a backend that is to be.
pub(super) fn new_id() -> Result<BackendId, Error> {
    let mut random = [0; 10];
    getrandom::fill(&mut random).map_err(|_| Error::internal())?;
    Ok(BackendId::from_random(random))
}

/// What `edit` makes of the configuration that is there.
pub(super) fn edited(
    before: Option<&(BackendRecord, RowVersion)>,
    expected: Option<RowVersion>,
    edit: impl Fn(&BackendSpec) -> Result<BackendSpec, Error>,
) -> Result<BackendSpec, Error> {
    let (record, version) = before.ok_or_else(gone)?;
    check_version(*version, expected)?;
    edit(&record.spec)
}

/// Whether `caller` may delete every path of a backend.
///
/// # Errors
/// `permission_denied`, naming the pattern.
pub(crate) fn check_deletes(caller: &Caller, spec: &BackendSpec) -> Result<(), Error> {
    match spec.mapping.rules().iter().find(|rule| !caller.allows_all(&rule.pattern, Capability::Delete)) {
        None => Ok(()),
        Some(rule) => {
            let message =
                format!("whoever has the copies of `{}` deleted needs `delete` on all of it", rule.pattern);
            Err(Error::new(Reason::PermissionDenied, message)
                .next("ask for a policy that allows `delete` on the pattern"))
        }
    }
}

/// The rules between a backend and the other backends of its tenant.
fn check_against_others(
    configuration: &Configuration,
    id: &BackendId,
    spec: &BackendSpec,
) -> Result<(), Error> {
    for (other, _) in configuration.backends.iter().filter(|(other, _)| other.id != *id) {
        if other.spec.name == spec.name {
            return Err(Error::field(Reason::AlreadyExists, "/name", "a backend of this name exists")
                .next("choose another name, or change the existing backend"));
        }
        if let Some((mine, theirs)) = spec.mapping.overlap(&other.spec.mapping) {
            let detail = format!(
                "`{mine}` and `{theirs}` of the backend `{}` ({}) can match the same path",
                other.spec.name, other.id
            );
            return Err(Error::field(Reason::MappingOverlap, "/path_mapping", detail)
                .next("make one of them narrower"));
        }
        if captures(&other.spec.mapping, &spec.provider) {
            return Err(cycle(&spec.provider, &format!("the backend `{}`", other.spec.name)));
        }
        if captures(&spec.mapping, &other.spec.provider) {
            let detail = format!("would capture the credential of the backend `{}`", other.spec.name);
            return Err(Error::field(Reason::CredentialCycle, "/path_mapping", detail)
                .next("credentials live in local paths; narrow the mapping"));
        }
    }
    if captures(&spec.mapping, &spec.provider) {
        return Err(cycle(&spec.provider, "this backend's own mapping"));
    }
    Ok(())
}

/// Whether the credential of a backend lies where a mapping rules.
fn captures(mapping: &PathMapping, provider: &Provider) -> bool {
    provider.credentials().is_some_and(|credentials| mapping.owner(credentials).is_some())
}

fn cycle(provider: &Provider, owner: &str) -> Error {
    Error::field(
        Reason::CredentialCycle,
        format!("/config/{}", provider.credentials_field()),
        format!("the credential's path is federated by {owner}"),
    )
    .next("store the credential at a local path")
}

fn check_version(current: RowVersion, expected: Option<RowVersion>) -> Result<(), Error> {
    if expected.is_none_or(|expected| expected == current) {
        return Ok(());
    }
    Err(Error::new(Reason::PreconditionFailed, "the backend has changed since it was read")
        .next("read it again and decide again"))
}

fn gone() -> Error {
    Error::new(Reason::NotFound, "no backend has this id").next("list the backends to see their ids")
}

#[cfg(test)]
mod tests {
    use scaivault_domain::backend::{
        Endpoint, ListedHosts, OwnIdentity, Tls, VaultLogin, VaultMethod, VaultTarget,
    };

    use super::*;

    #[test]
    fn an_identity_of_ours_goes_without_tls_only_where_host_and_operator_allow_it() {
        let shown = |url: &str, verify: bool| {
            let target = VaultTarget::at(Endpoint::parse("endpoint", url).unwrap());
            let target = VaultTarget { tls: Tls { verify, ..Tls::default() }, ..target };
            let method = VaultMethod::Kubernetes { role: "r".into(), credentials: None };
            Provider::HashicorpVault { target, login: VaultLogin { mount: "kubernetes".into(), method } }
        };
        let strict = Limits::default();
        let lax = Limits { plaintext: true, unverified_tls: true, ..Limits::default() };
        let listed = ListedHosts::parse(["vault.internal"]).unwrap();
        for provider in [shown("http://vault.internal", true), shown("https://vault.internal", false)] {
            let is_listed =
                |hosts: &ListedHosts| provider.check_own_identity(OwnIdentity::ALL, hosts).is_ok();
            assert!(is_listed(&listed) && lax.check(&provider).is_ok());
            assert!(strict.check(&provider).is_err(), "the host is listed, but the operator's switch is off");
            assert!(!is_listed(&ListedHosts::default()), "the switch is on, but the host is not listed");
        }
    }
}
