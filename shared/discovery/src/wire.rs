//! Between the domain and the wire. What comes in goes through the domain's parsers field by field: a peer of another
//! build may send what this one does not know, and half of a configuration is no configuration.

mod replica;

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use prost::Message as _;
use scaivault_domain::access::{Caller, Capability, Effect, PolicyRule, Scope};
use scaivault_domain::backend::{
    AwsRegion, AwsTarget, AzureTarget, BackendId, Endpoint, GcpTarget, KvMount, KvVersion, ProjectId, Target,
    Tls, VaultTarget, check_timeout,
};
use scaivault_domain::budget::{Share, Slice};
use scaivault_domain::error::{Error, Reason};
use scaivault_domain::lease::{LeaseKey, Material};
use scaivault_domain::mapping::{GivenRule, Overrides, PathMapping, Rule, Separator};
use scaivault_domain::pattern::Pattern;
use scaivault_domain::sync::{ConflictPolicy, Mode, SyncSettings, WritePolicy};
use scaivault_domain::tenant::{BackendName, TenantId};
use scaivault_domain::time::Timestamp;
use scaivault_domain::token::TokenHash;
use scaivault_domain::view::{BackendView, Generation, TenantView};
use scaivault_proto::discovery::v1 as pb;
use secrecy::ExposeSecret as _;

pub use self::replica::{
    SecretCopy, absence_from_wire, absence_to_wire, copy_from_wire, copy_to_wire, freshness_from_wire,
    freshness_to_wire, hashes_from_wire, held_from_wire, held_to_wire, name_from_wire, name_to_wire,
};
use crate::MAX_MESSAGE_BYTES;

/// Most chunks of one view.
pub const MAX_CHUNKS: u32 = 1024;
/// What a chunk leaves free in its message for the fields around it.
const ENVELOPE_BYTES: usize = 1024;

/// Why a message was not taken, in one sentence without values.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Refused(Cow<'static, str>);

impl Refused {
    /// A refusal that says `message`.
    pub fn new(message: impl Into<Cow<'static, str>>) -> Self {
        Refused(message.into())
    }

    fn of(what: impl std::fmt::Display, fault: &Refused) -> Self {
        Refused::new(format!("{what}: {fault}"))
    }
}

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        Refused(error.message)
    }
}

/// A credential on its way to a node.
#[derive(Clone, Debug)]
pub struct LeasePush {
    /// What it is for.
    pub key: LeaseKey,
    /// Its id; a new credential has a new one, a renewed one keeps it.
    pub id: String,
    /// The generation of the login that it is for.
    pub login_generation: Generation,
    /// How long it lasts from now; `None` if it does not end.
    pub remaining: Option<Duration>,
    /// The credential.
    pub material: Material,
    /// How often the node may use it; `None` if nothing limits that.
    pub slice: Option<Slice>,
}

/// Why a lease cannot be had, or is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseRefusal {
    /// Why; `None` if the backend is gone.
    pub reason: Option<Reason>,
    /// One sentence for the caller.
    pub message: String,
    /// When asking again makes sense.
    pub retry_after: Option<Duration>,
}

/// A view in chunks of at most [`MAX_MESSAGE_BYTES`]. A backend is never split: a larger one is a chunk of its own.
pub fn view_chunks(view: &TenantView) -> Vec<pb::TenantViewChunk> {
    let mut parts: Vec<Vec<pb::BackendView>> = vec![Vec::new()];
    let mut size = 0;
    for backend in &view.backends {
        let backend = backend_to_wire(backend);
        let cost = backend.encoded_len() + 8;
        let part = parts.last_mut().expect("never empty");
        if size + cost > MAX_MESSAGE_BYTES - ENVELOPE_BYTES && !part.is_empty() {
            parts.push(vec![backend]);
            size = cost;
        } else {
            part.push(backend);
            size += cost;
        }
    }
    let chunks = u32::try_from(parts.len()).expect("fewer chunks than u32::MAX");
    (0..)
        .zip(parts)
        .map(|(chunk, backends)| pb::TenantViewChunk {
            tenant: view.tenant.to_string(),
            generation: view.generation,
            chunk,
            chunks,
            backends,
        })
        .collect()
}

/// The view of all its chunks, in order.
///
/// # Errors
/// If a chunk is missing or of another view, a backend cannot be read, an id stands twice, or backends overlap.
pub fn view_from_chunks(chunks: Vec<pb::TenantViewChunk>) -> Result<TenantView, Refused> {
    let first = chunks.first().ok_or_else(|| Refused::new("a view has at least one chunk"))?;
    let (tenant, generation) = (TenantId::parse(&first.tenant)?, first.generation);
    let whole = (0..).zip(&chunks).all(|(number, chunk)| {
        chunk.tenant == first.tenant
            && chunk.generation == generation
            && chunk.chunk == number
            && chunk.chunks as usize == chunks.len()
    });
    if !whole {
        return Err(Refused::new("the chunks are not those of one whole view"));
    }
    let backends = chunks
        .into_iter()
        .flat_map(|chunk| chunk.backends)
        .map(|backend| {
            let id = BackendId::parse(&backend.id).map_err(|_| Refused::new("a backend has no valid id"))?;
            backend_from_wire(id.clone(), backend)
                .map_err(|fault| Refused::of(format_args!("backend {id}"), &fault))
        })
        .collect::<Result<Vec<_>, _>>()?;
    check_disjoint(&backends)?;
    Ok(TenantView { tenant, generation, backends })
}

/// Refuses two backends with one id or one path.
///
/// Patterns can only meet if the literal beginning of one begins with that of the other. So each is compared with those
/// at the beginnings of its own, the shorter ones first: all pairs of a large view would take minutes.
fn check_disjoint(backends: &[BackendView]) -> Result<(), Refused> {
    let mut ids = HashSet::new();
    if let Some(twice) = backends.iter().find(|backend| !ids.insert(&backend.id)) {
        return Err(Refused::new(format!("backend {} stands twice", twice.id)));
    }
    let mut rules: Vec<(Vec<&str>, &BackendId, &Pattern)> = backends
        .iter()
        .flat_map(|backend| backend.mapping.rules().iter().map(move |rule| (&backend.id, &rule.pattern)))
        .map(|(id, pattern)| (pattern.literal_prefix().collect(), id, pattern))
        .collect();
    rules.sort_by_key(|(prefix, ..)| prefix.len());
    let mut seen: HashMap<&[&str], Vec<(&BackendId, &Pattern)>> = HashMap::new();
    for (prefix, id, pattern) in &rules {
        let met = (0..=prefix.len())
            .filter_map(|end| seen.get(&prefix[..end]))
            .flatten()
            .find(|(other, theirs)| other != id && theirs.intersects(pattern));
        if let Some((other, theirs)) = met {
            return Err(Refused::new(format!(
                "backends {other} and {id} overlap: `{theirs}` and `{pattern}` can match one path"
            )));
        }
        seen.entry(prefix).or_default().push((id, pattern));
    }
    Ok(())
}

fn backend_to_wire(backend: &BackendView) -> pb::BackendView {
    let rules = backend.mapping.rules().iter().map(rule_to_wire);
    pb::BackendView {
        id: backend.id.to_string(),
        name: backend.name.to_string(),
        target: Some(target_to_wire(&backend.target)),
        login_generation: backend.login_generation,
        rules: rules.collect(),
        mode: backend.mode.as_str().to_owned(),
        enabled: backend.enabled,
        timeout: duration_to_wire(backend.timeout),
        sync: Some(settings_to_wire(&backend.sync)),
    }
}

fn rule_to_wire(rule: &Rule) -> pb::ViewRule {
    let Overrides { mode, sync_interval, write_policy, conflict_policy } = rule.overrides;
    pb::ViewRule {
        pattern: rule.pattern.as_str().to_owned(),
        template: rule.template.as_str().to_owned(),
        separator: rule.separator.as_ref().map_or("", Separator::as_str).to_owned(),
        mode: mode.map_or("", Mode::as_str).to_owned(),
        sync_interval: sync_interval.and_then(duration_to_wire),
        write_policy: write_policy.map_or("", WritePolicy::as_str).to_owned(),
        conflict_policy: conflict_policy.map_or("", ConflictPolicy::as_str).to_owned(),
    }
}

fn overrides_from_wire(rule: &pb::ViewRule) -> Result<Overrides, Refused> {
    fn given<T>(name: &str, parse: impl Fn(&str) -> Result<T, Error>) -> Result<Option<T>, Refused> {
        if name.is_empty() { Ok(None) } else { Ok(Some(parse(name)?)) }
    }
    Ok(Overrides {
        mode: given(&rule.mode, Mode::parse)?,
        sync_interval: duration_from_wire(rule.sync_interval, "sync interval of a rule")?,
        write_policy: given(&rule.write_policy, WritePolicy::parse)?,
        conflict_policy: given(&rule.conflict_policy, ConflictPolicy::parse)?,
    })
}

fn settings_to_wire(settings: &SyncSettings) -> pb::SyncSettings {
    pb::SyncSettings {
        interval: settings.interval.and_then(duration_to_wire),
        write_policy: settings.write_policy.as_str().to_owned(),
        conflict_policy: settings.conflict_policy.as_str().to_owned(),
        prefetch: settings.prefetch,
        max_staleness: settings.max_staleness.and_then(duration_to_wire),
        history_depth: settings.history_depth,
    }
}

fn settings_from_wire(settings: &pb::SyncSettings) -> Result<SyncSettings, Refused> {
    Ok(SyncSettings {
        interval: duration_from_wire(settings.interval, "sync interval")?,
        write_policy: WritePolicy::parse(&settings.write_policy)?,
        conflict_policy: ConflictPolicy::parse(&settings.conflict_policy)?,
        prefetch: settings.prefetch,
        max_staleness: duration_from_wire(settings.max_staleness, "staleness allowed")?,
        history_depth: settings.history_depth,
    })
}

fn backend_from_wire(id: BackendId, backend: pb::BackendView) -> Result<BackendView, Refused> {
    let target =
        target_from_wire(backend.target.ok_or_else(|| Refused::new("the kind of store is not known here"))?)?;
    let timeout =
        duration_from_wire(backend.timeout, "timeout")?.ok_or_else(|| Refused::new("has no timeout"))?;
    let rules = backend.rules.iter().map(|rule| {
        Ok(GivenRule {
            pattern: &rule.pattern,
            template: &rule.template,
            separator: &rule.separator,
            overrides: overrides_from_wire(rule)?,
        })
    });
    let mapping = PathMapping::parse_rules(rules.collect::<Result<Vec<_>, Refused>>()?)?;
    target.kind().naming().check(&mapping)?;
    let mode = Mode::parse(&backend.mode)?;
    let sync = settings_from_wire(&backend.sync.ok_or_else(|| Refused::new("has no sync settings"))?)?;
    // How short an interval may be is the control plane's to say.
    sync.check(mode, mapping.rules(), Duration::ZERO)?;
    Ok(BackendView {
        id,
        login_generation: backend.login_generation,
        name: BackendName::parse(&backend.name)?,
        target,
        mapping,
        mode,
        sync,
        enabled: backend.enabled,
        timeout: check_timeout(timeout)?,
    })
}

fn target_to_wire(target: &Target) -> pb::backend_view::Target {
    let Tls { ca_cert, verify: tls_verify } = target.tls().clone();
    let ca_cert = ca_cert.unwrap_or_default();
    let given = |endpoint: &Option<Endpoint>| endpoint.as_ref().map(Endpoint::to_string).unwrap_or_default();
    match target {
        Target::HashicorpVault(vault) => pb::backend_view::Target::HashicorpVault(vault_to_wire(vault)),
        Target::AwsSecretsManager(aws) => pb::backend_view::Target::AwsSecretsManager(pb::AwsTarget {
            region: aws.region.to_string(),
            endpoint: given(&aws.endpoint),
            ca_cert,
            tls_verify,
        }),
        Target::AzureKeyVault(azure) => pb::backend_view::Target::AzureKeyVault(pb::AzureTarget {
            vault_url: azure.vault.to_string(),
            ca_cert,
            tls_verify,
        }),
        Target::GoogleSecretManager(gcp) => pb::backend_view::Target::GoogleSecretManager(pb::GcpTarget {
            project: gcp.project.to_string(),
            location: gcp.location.clone().unwrap_or_default(),
            endpoint: given(&gcp.endpoint),
            ca_cert,
            tls_verify,
        }),
    }
}

fn target_from_wire(target: pb::backend_view::Target) -> Result<Target, Refused> {
    let tls = |ca_cert, verify| Tls { ca_cert: some_text(ca_cert), verify };
    let endpoint = |text: String| some_text(text).map(|text| Endpoint::parse("endpoint", &text)).transpose();
    Ok(match target {
        pb::backend_view::Target::HashicorpVault(vault) => Target::HashicorpVault(vault_from_wire(vault)?),
        pb::backend_view::Target::AwsSecretsManager(aws) => Target::AwsSecretsManager(AwsTarget {
            region: AwsRegion::parse("region", &aws.region)?,
            endpoint: endpoint(aws.endpoint)?,
            tls: tls(aws.ca_cert, aws.tls_verify),
        }),
        pb::backend_view::Target::AzureKeyVault(azure) => Target::AzureKeyVault(AzureTarget {
            vault: Endpoint::parse("vault_url", &azure.vault_url)?,
            tls: tls(azure.ca_cert, azure.tls_verify),
        }),
        pb::backend_view::Target::GoogleSecretManager(gcp) => {
            let location = some_text(gcp.location);
            location.as_deref().map(GcpTarget::check_location).transpose()?;
            Target::GoogleSecretManager(GcpTarget {
                project: ProjectId::parse(&gcp.project)?,
                location,
                endpoint: endpoint(gcp.endpoint)?,
                tls: tls(gcp.ca_cert, gcp.tls_verify),
            })
        }
    })
}

fn vault_to_wire(vault: &VaultTarget) -> pb::VaultTarget {
    pb::VaultTarget {
        endpoint: vault.endpoint.to_string(),
        namespace: vault.namespace.clone().unwrap_or_default(),
        ca_cert: vault.tls.ca_cert.clone().unwrap_or_default(),
        tls_verify: vault.tls.verify,
        kv_mount: vault.kv.as_ref().map_or_else(String::new, |kv| kv.path.clone()),
        kv_version: vault.kv.as_ref().map_or(0, |kv| match kv.version {
            KvVersion::V1 => 1,
            KvVersion::V2 => 2,
        }),
    }
}

fn vault_from_wire(vault: pb::VaultTarget) -> Result<VaultTarget, Refused> {
    let kv = match (vault.kv_mount.as_str(), vault.kv_version) {
        ("", 0) => None,
        (path, version @ (1 | 2)) if !path.is_empty() && path.trim_matches('/') == path => {
            let version = if version == 1 { KvVersion::V1 } else { KvVersion::V2 };
            Some(KvMount { path: path.to_owned(), version })
        }
        _ => {
            return Err(Refused::new(
                "the KV mount is a path without slashes at its ends, and version 1 or 2",
            ));
        }
    };
    if vault.namespace.chars().any(char::is_control) {
        return Err(Refused::new("the namespace has a control character"));
    }
    Ok(VaultTarget {
        endpoint: Endpoint::parse("endpoint", &vault.endpoint)?,
        namespace: some_text(vault.namespace),
        tls: Tls { ca_cert: some_text(vault.ca_cert), verify: vault.tls_verify },
        kv,
    })
}

/// A grant as it is pushed.
pub fn grant_to_wire(hash: &TokenHash, version: u64, caller: &Caller) -> pb::Grant {
    let rules = caller.rules.iter().map(|rule| pb::GrantRule {
        path: rule.path.as_str().to_owned(),
        capabilities: rule.capabilities.iter().map(|capability| capability.as_str().to_owned()).collect(),
        deny: rule.effect == Effect::Deny,
    });
    pb::Grant {
        token_hash: hash.as_bytes().to_vec(),
        version,
        tenant: caller.tenant.to_string(),
        subject: caller.subject.clone(),
        accessor: caller.accessor.clone(),
        scopes: caller.scopes.iter().map(|scope| scope.as_str().to_owned()).collect(),
        rules: rules.collect(),
        expire_time: caller.expires_at.map(timestamp_to_wire),
    }
}

/// A pushed grant.
///
/// # Errors
/// If a field cannot be read, or the grant names nobody.
pub fn grant_from_wire(grant: pb::Grant) -> Result<(TokenHash, u64, Arc<Caller>), Refused> {
    let hash = hash_from_wire(&grant.token_hash)?;
    if grant.subject.is_empty() || grant.accessor.is_empty() {
        return Err(Refused::new("a grant has a subject and an accessor"));
    }
    let rules = grant
        .rules
        .iter()
        .map(|rule| {
            let capabilities = rule.capabilities.iter().map(|name| {
                Capability::parse(name)
                    .ok_or_else(|| Refused::new("a rule has a capability that is not known here"))
            });
            Ok(PolicyRule {
                path: Pattern::parse(&rule.path)
                    .map_err(|fault| Refused::new(format!("the path of a rule {fault}")))?,
                capabilities: capabilities.collect::<Result<_, Refused>>()?,
                effect: if rule.deny { Effect::Deny } else { Effect::Allow },
            })
        })
        .collect::<Result<_, Refused>>()?;
    let caller = Caller {
        tenant: TenantId::parse(&grant.tenant)?,
        token: Some(hash),
        subject: grant.subject,
        accessor: grant.accessor,
        scopes: grant.scopes.iter().map(|name| Scope::parse(name)).collect::<Result<_, _>>()?,
        rules,
        expires_at: timestamp_from_wire(grant.expire_time, "expiry of a grant")?,
    };
    Ok((hash, grant.version, Arc::new(caller)))
}

/// The hash of a token.
///
/// # Errors
/// If it does not have 32 bytes.
pub fn hash_from_wire(bytes: &[u8]) -> Result<TokenHash, Refused> {
    let bytes = bytes.try_into().map_err(|_| Refused::new("a token hash has 32 bytes"))?;
    Ok(TokenHash::from_bytes(bytes))
}

/// The name of a lease.
pub fn key_to_wire(key: &LeaseKey) -> pb::LeaseKey {
    pb::LeaseKey { tenant: key.tenant.to_string(), backend: key.backend.to_string() }
}

/// The name of a lease.
///
/// # Errors
/// If it is missing or names no tenant or backend.
pub fn key_from_wire(key: Option<&pb::LeaseKey>) -> Result<LeaseKey, Refused> {
    let key = key.ok_or_else(|| Refused::new("a lease has no key"))?;
    let backend =
        BackendId::parse(&key.backend).map_err(|_| Refused::new("a lease is for no valid backend id"))?;
    Ok(LeaseKey { tenant: TenantId::parse(&key.tenant)?, backend })
}

/// A lease as it is pushed.
pub fn lease_to_wire(lease: &LeasePush) -> pb::Lease {
    pb::Lease {
        key: Some(key_to_wire(&lease.key)),
        id: lease.id.clone(),
        login_generation: lease.login_generation,
        remaining: lease.remaining.and_then(duration_to_wire),
        material: Some(match &lease.material {
            Material::VaultToken(token) => pb::lease::Material::VaultToken(token.expose_secret().to_owned()),
            Material::AwsKeys { access_key_id, secret_access_key, session_token } => {
                pb::lease::Material::AwsKeys(pb::AwsKeys {
                    access_key_id: access_key_id.clone(),
                    secret_access_key: secret_access_key.expose_secret().to_owned(),
                    session_token: session_token
                        .as_ref()
                        .map(|token| token.expose_secret().to_owned())
                        .unwrap_or_default(),
                })
            }
            Material::Bearer(token) => pb::lease::Material::Bearer(token.expose_secret().to_owned()),
        }),
        call_budget: lease
            .slice
            .as_ref()
            .map(|slice| pb::CallBudget { name: slice.budget.as_ref().to_owned(), share: slice.share.get() }),
    }
}

/// A pushed lease.
///
/// # Errors
/// If a field cannot be read or the credential is missing.
pub fn lease_from_wire(lease: pb::Lease) -> Result<LeasePush, Refused> {
    let key = key_from_wire(lease.key.as_ref())?;
    if lease.id.is_empty() {
        return Err(Refused::new("a lease has no id"));
    }
    let remaining = duration_from_wire(lease.remaining, "remaining time")?;
    let material = match lease.material {
        Some(pb::lease::Material::VaultToken(token)) if is_header_text(&token) => {
            Material::VaultToken(token.into())
        }
        Some(pb::lease::Material::Bearer(token)) if is_header_text(&token) => Material::Bearer(token.into()),
        Some(pb::lease::Material::AwsKeys(keys))
            if is_header_text(&keys.access_key_id)
                && !keys.secret_access_key.is_empty()
                && (keys.session_token.is_empty() || is_header_text(&keys.session_token)) =>
        {
            Material::AwsKeys {
                access_key_id: keys.access_key_id,
                secret_access_key: keys.secret_access_key.into(),
                session_token: some_text(keys.session_token).map(Into::into),
            }
        }
        Some(_) => return Err(Refused::new("the credential of a lease cannot stand in a header")),
        None => return Err(Refused::new("the credential of a lease is of a kind that is not known here")),
    };
    let slice = lease.call_budget.map(slice_from_wire).transpose()?;
    Ok(LeasePush { key, id: lease.id, login_generation: lease.login_generation, remaining, material, slice })
}

fn slice_from_wire(budget: pb::CallBudget) -> Result<Slice, Refused> {
    let share = Share::new(budget.share).ok_or_else(|| Refused::new("a call budget is not a part of one"))?;
    if budget.name.is_empty() {
        return Err(Refused::new("a call budget has no name"));
    }
    Ok(Slice { budget: budget.name.into(), share })
}

/// The refusal of a lease as it is pushed.
pub fn refusal_to_wire(key: &LeaseKey, refusal: &LeaseRefusal) -> pb::LeaseRemoval {
    pb::LeaseRemoval {
        key: Some(key_to_wire(key)),
        reason: refusal.reason.map_or_else(String::new, |reason| reason.code().to_owned()),
        message: refusal.message.clone(),
        retry_after: refusal.retry_after.and_then(duration_to_wire),
    }
}

/// The pushed refusal of a lease. A reason of a later build reads as `no_lease`: the lease is gone either way.
///
/// # Errors
/// If a field cannot be read.
pub fn refusal_from_wire(removal: pb::LeaseRemoval) -> Result<(LeaseKey, LeaseRefusal), Refused> {
    let key = key_from_wire(removal.key.as_ref())?;
    let reason = match removal.reason.as_str() {
        "" => None,
        code => Some(Reason::from_code(code).unwrap_or(Reason::NoLease)),
    };
    let retry_after = duration_from_wire(removal.retry_after, "time to ask again")?;
    Ok((key, LeaseRefusal { reason, message: removal.message, retry_after }))
}

fn some_text(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

fn is_header_text(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// `None` for what the wire cannot carry, which is longer than ten thousand years.
fn duration_to_wire(duration: Duration) -> Option<prost_types::Duration> {
    duration.try_into().ok()
}

fn duration_from_wire(
    duration: Option<prost_types::Duration>,
    what: &'static str,
) -> Result<Option<Duration>, Refused> {
    let Some(duration) = duration else { return Ok(None) };
    match (u64::try_from(duration.seconds), u32::try_from(duration.nanos)) {
        (Ok(seconds), Ok(nanos)) if nanos < 1_000_000_000 => Ok(Some(Duration::new(seconds, nanos))),
        _ => Err(Refused::new(format!("the {what} is no duration"))),
    }
}

fn timestamp_to_wire(time: Timestamp) -> prost_types::Timestamp {
    let millis = time.as_millis();
    let nanos = i32::try_from(millis.rem_euclid(1000) * 1_000_000).expect("less than a second");
    prost_types::Timestamp { seconds: millis.div_euclid(1000), nanos }
}

fn timestamp_from_wire(
    time: Option<prost_types::Timestamp>,
    what: &'static str,
) -> Result<Option<Timestamp>, Refused> {
    let Some(time) = time else { return Ok(None) };
    let fault = || Refused::new(format!("the {what} is no time"));
    if !(0..1_000_000_000).contains(&time.nanos) {
        return Err(fault());
    }
    let millis =
        time.seconds.checked_mul(1000).and_then(|ms| ms.checked_add(i64::from(time.nanos / 1_000_000)));
    millis.map(|millis| Some(Timestamp::from_millis(millis))).ok_or_else(fault)
}
