//! Tokens: made, looked up, renewed and revoked; and verified, which is where every request begins.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use scaivault_domain::access::{Administer, Authorized, Caller, ROOT_POLICY, Scope, root_rules};
use scaivault_domain::audit::{Action, AuditRow, Origin};
use scaivault_domain::tenant::{PolicyName, TenantId};
use scaivault_domain::time::{Clock, Timestamp};
use scaivault_domain::token::{TokenHash, hash_token, token_from_random};
use scaivault_domain::{Error, Reason};
use scaivault_edge::auth::Verifier;
use secrecy::SecretString;

use super::policies::policy_key;
use super::{ATTEMPTS, Committed, Page, PageRequest, contended, settle};
use crate::audit::Audit;
use crate::model::{AccessorRecord, Parent, TokenRecord, accessor_key, child_key, token_key};
use crate::store::{Owner, Records, RowVersion, Space, Tx};

const DEFAULT_TTL: Duration = Duration::from_secs(24 * 3600);
/// Most policies of one token.
const MAX_POLICIES: usize = 32;
/// Most bytes of the rules of one token's policies. A grant must fit into a message to a node.
const MAX_RULE_BYTES: usize = 128 * 1024;

/// What a new token is asked to be.
#[derive(Clone, Debug)]
pub struct NewToken {
    /// Who it is for.
    pub subject: String,
    /// Which API it may use.
    pub scopes: Vec<Scope>,
    /// Which paths: names of policies.
    pub policies: Vec<String>,
    /// How long it lives.
    pub ttl: Ttl,
}

/// How long a token lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ttl {
    /// 24 hours.
    Default,
    /// This long.
    Of(Duration),
    /// Until it is revoked.
    Forever,
}

impl Ttl {
    fn at_most(self, limit: Duration) -> Ttl {
        match self {
            Ttl::Default => Ttl::Of(DEFAULT_TTL.min(limit)),
            Ttl::Of(ttl) => Ttl::Of(ttl.min(limit)),
            Ttl::Forever => Ttl::Of(limit),
        }
    }
}

/// The service of tokens.
#[derive(Debug)]
pub struct Tokens {
    records: Records,
    audit: Arc<Audit>,
    clock: Arc<dyn Clock>,
}

impl Tokens {
    /// Tokens of `records`.
    pub fn new(records: Records, audit: Arc<Audit>, clock: Arc<dyn Clock>) -> Self {
        Tokens { records, audit, clock }
    }

    /// Makes a token with at most the caller's own rights, and at most its own lifetime.
    ///
    /// # Errors
    /// `permission_denied` for a scope, policy or lifetime beyond the caller's; `invalid_request` for unknown policies.
    pub async fn create(
        &self,
        allowed: &Authorized<Administer, Scope>,
        origin: &Origin,
        wanted: NewToken,
    ) -> Result<Committed<(SecretString, TokenRecord)>, Error> {
        let caller = allowed.caller();
        let (parent_hash, parent, parent_version) = self.own(caller).await?;
        check_subject(&wanted.subject)?;
        if wanted.scopes.is_empty() {
            return Err(Error::invalid("/scopes", "needs at least one scope"));
        }
        if let Some(scope) = wanted.scopes.iter().find(|scope| !caller.has(**scope)) {
            let detail = format!("`{}` is not a scope of your token", scope.as_str());
            return Err(Error::field(Reason::PermissionDenied, "/scopes", detail)
                .next("a token can only hand on scopes of its own"));
        }
        let mut policies = wanted.policies;
        policies.sort();
        policies.dedup();
        self.check_policies(caller, &parent, &policies).await?;
        let now = self.clock.now();
        let expires = expiry(caller, now, wanted.ttl, parent.expires)?;
        let record = TokenRecord {
            tenant: caller.tenant.clone(),
            accessor: accessor(),
            subject: wanted.subject,
            scopes: wanted.scopes,
            policies,
            created: now,
            expires,
            lifetime_ms: expires.map(|end| millis(end.since(now))),
            parent: Some(Parent { accessor: parent.accessor, hash: parent_hash.to_text() }),
        };
        let mut random = [0; 32];
        getrandom::fill(&mut random).map_err(|_| Error::internal())?;
        let token = token_from_random(random);
        let row = AuditRow::new(caller, origin, Action::TokenWrite, &record.accessor, now);
        // A parent that is revoked meanwhile leaves no child behind.
        let tx = Tx::new().expect(token_key(parent_hash), parent_version);
        let tx = self.audit.stage(put_token(&self.records, tx, &token, &record), &row);
        let revision = settle(self.records.store().commit(tx).await)?.ok_or_else(contended)?;
        Ok(Committed { value: (token, record), revision })
    }

    async fn check_policies(
        &self,
        caller: &Caller,
        parent: &TokenRecord,
        policies: &[String],
    ) -> Result<(), Error> {
        if policies.len() > MAX_POLICIES {
            return Err(Error::invalid("/policies", "has at most 32 policies"));
        }
        let is_root = parent.policies.iter().any(|policy| policy == ROOT_POLICY);
        // Policies belong to a tenant: in another one the same name is another policy.
        let at_home = parent.tenant == caller.tenant;
        for policy in policies {
            if !(is_root || at_home && parent.policies.contains(policy)) {
                let detail = "a token without the policy `root` can only hand on policies of its own";
                return Err(Error::field(Reason::PermissionDenied, "/policies", detail));
            }
            if policy == ROOT_POLICY {
                continue;
            }
            let name = PolicyName::parse(policy).map_err(|_| unknown_policy(policy))?;
            let found = self.records.store().get(&policy_key(&caller.tenant, &name)).await?;
            found.ok_or_else(|| unknown_policy(policy))?;
        }
        Ok(())
    }

    /// The record behind the caller's own token. An operator may act in another tenant; its token stays in its own.
    async fn own(&self, caller: &Caller) -> Result<(TokenHash, TokenRecord, RowVersion), Error> {
        let hash = caller.token.ok_or_else(gone)?;
        let (record, version) = self.records.get::<TokenRecord>(&token_key(hash)).await?.ok_or_else(gone)?;
        Ok((hash, record, version))
    }

    /// The token with this accessor in the caller's tenant; the caller's own without one.
    ///
    /// # Errors
    /// `not_found`, also for accessors of other tenants.
    pub async fn lookup(&self, target: &TokenTarget) -> Result<TokenRecord, Error> {
        match target {
            TokenTarget::Own(caller) => Ok(self.own(caller).await?.1),
            TokenTarget::Other(allowed, accessor) => Ok(self.find(allowed.tenant(), accessor).await?.1),
        }
    }

    async fn find(
        &self,
        tenant: &TenantId,
        accessor: &str,
    ) -> Result<(TokenHash, TokenRecord, RowVersion), Error> {
        let found = self.records.get::<AccessorRecord>(&accessor_key(tenant, accessor)).await?;
        let (by, _) = found.ok_or_else(gone)?;
        let hash = TokenHash::from_text(&by.hash).ok_or_else(Error::internal)?;
        let (record, version) = self.records.get::<TokenRecord>(&token_key(hash)).await?.ok_or_else(gone)?;
        Ok((hash, record, version))
    }

    /// The tokens of the caller's tenant, in the order of their accessors.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn list(
        &self,
        allowed: &Authorized<Administer, Scope>,
        page: &PageRequest,
    ) -> Result<Page<TokenRecord>, Error> {
        let owner = Owner::from(allowed.tenant());
        let now = self.clock.now();
        let rows = self
            .records
            .scan_page::<AccessorRecord>(&owner, Space::Token, "", page.after.as_deref(), page.size + 1)
            .await?;
        let mut tokens = Vec::new();
        for (_, by, _) in rows {
            let hash = TokenHash::from_text(&by.hash).ok_or_else(Error::internal)?;
            // Revoked between the two reads: not in the list.
            if let Some((record, _)) = self.records.get::<TokenRecord>(&token_key(hash)).await? {
                tokens.push(record);
            }
        }
        let mut page = page.page(tokens, |record| record.accessor.clone());
        page.items.retain(|record| record.expires.is_none_or(|end| end > now));
        Ok(page)
    }

    /// Moves the end of a token to `ttl` from now.
    ///
    /// # Errors
    /// `not_found` for a token that is over.
    pub async fn renew(
        &self,
        target: &TokenTarget,
        origin: &Origin,
        ttl: Ttl,
    ) -> Result<Committed<TokenRecord>, Error> {
        for _ in 0..ATTEMPTS {
            let caller = target.caller();
            let (hash, mut record, version) = self.resolve(target).await?;
            let now = self.clock.now();
            if record.expires.is_some_and(|end| end <= now) {
                return Err(gone());
            }
            let parent_ends = match &record.parent {
                Some(parent) => {
                    let hash = TokenHash::from_text(&parent.hash).ok_or_else(Error::internal)?;
                    self.records.get::<TokenRecord>(&token_key(hash)).await?.ok_or_else(gone)?.0.expires
                }
                None => None,
            };
            let ttl = match (target, record.lifetime_ms) {
                // Who has a token for an hour must not make it one for ever.
                (TokenTarget::Own(_), Some(lifetime)) => ttl.at_most(Duration::from_millis(lifetime)),
                _ => ttl,
            };
            record.expires = expiry(caller, now, ttl, parent_ends)?;
            let key = token_key(hash);
            let row = AuditRow::new(caller, origin, Action::TokenWrite, &record.accessor, now);
            let tx =
                Tx::new().expect(key.clone(), version).put(key.clone(), self.records.seal(&key, &record));
            if let Some(revision) = settle(self.records.store().commit(self.audit.stage(tx, &row)).await)? {
                return Ok(Committed { value: record, revision });
            }
        }
        Err(contended())
    }

    /// Revokes a token and every token that was made with it, wherever they live; answers how many.
    ///
    /// The token itself goes first, so that it makes no further children; a store that fails in the middle leaves
    /// children that a second revocation of any of them, or their expiry, ends.
    ///
    /// # Errors
    /// `not_found` for a token that is not there.
    pub async fn revoke(&self, target: &TokenTarget, origin: &Origin) -> Result<Committed<u32>, Error> {
        let (hash, record, _) = self.resolve(target).await?;
        let row =
            AuditRow::new(target.caller(), origin, Action::TokenWrite, &record.accessor, self.clock.now());
        let mut revision = None;
        let mut revoked = 0;
        let mut doomed = vec![(hash, record)];
        while let Some((hash, record)) = doomed.pop() {
            let mut tx =
                Tx::new().delete(token_key(hash)).delete(accessor_key(&record.tenant, &record.accessor));
            if let Some(parent) = &record.parent {
                tx = tx.delete(child_key(&parent.accessor, &hash.to_text()));
            }
            if revoked == 0 {
                tx = self.audit.stage(tx, &row);
            }
            revision = Some(settle(self.records.store().commit(tx).await)?.ok_or_else(contended)?);
            revoked += 1;
            let prefix = format!("children/{}/", record.accessor);
            for (_, by, _) in
                self.records.scan_all::<AccessorRecord>(&Owner::Installation, Space::Token, &prefix).await?
            {
                let child = TokenHash::from_text(&by.hash).ok_or_else(Error::internal)?;
                if let Some((record, _)) = self.records.get::<TokenRecord>(&token_key(child)).await? {
                    doomed.push((child, record));
                }
            }
        }
        Ok(Committed { value: revoked, revision: revision.ok_or_else(Error::internal)? })
    }

    async fn resolve(&self, target: &TokenTarget) -> Result<(TokenHash, TokenRecord, RowVersion), Error> {
        match target {
            TokenTarget::Own(caller) => {
                let hash = caller.token.ok_or_else(gone)?;
                let (record, version) =
                    self.records.get::<TokenRecord>(&token_key(hash)).await?.ok_or_else(gone)?;
                Ok((hash, record, version))
            }
            TokenTarget::Other(allowed, accessor) => self.find(allowed.tenant(), accessor).await,
        }
    }

    /// What the token of this hash may do, with a version that changes whenever that does.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn grant(&self, hash: TokenHash) -> Result<Option<(u64, Arc<Caller>)>, Error> {
        let Some((record, mut version)) = self.records.get::<TokenRecord>(&token_key(hash)).await? else {
            return Ok(None);
        };
        if record.expires.is_some_and(|end| end <= self.clock.now()) {
            return Ok(None);
        }
        let mut rules = Vec::new();
        for name in &record.policies {
            if name == ROOT_POLICY {
                rules.extend(root_rules());
                continue;
            }
            let name = PolicyName::parse(name)?;
            let key = policy_key(&record.tenant, &name);
            if let Some((policy, changed)) =
                self.records.get::<scaivault_domain::access::Policy>(&key).await?
            {
                rules.extend(policy.rules);
                version = version.max(changed);
            }
        }
        let bytes: usize =
            rules.iter().map(|rule| rule.path.as_str().len() + 16 * rule.capabilities.len()).sum();
        if bytes > MAX_RULE_BYTES {
            tracing::warn!(
                token.accessor = record.accessor,
                "the token's policies are too large; it is refused"
            );
            return Ok(None);
        }
        let caller = Caller {
            tenant: record.tenant,
            token: Some(hash),
            subject: record.subject,
            accessor: record.accessor,
            scopes: record.scopes,
            rules: rules.into(),
            expires_at: record.expires,
        };
        Ok(Some((version.as_u64(), Arc::new(caller))))
    }

    /// Deletes tokens that have been over for a day. Their grants ended with them; this only frees the rows.
    ///
    /// # Errors
    /// When the store does not answer; the next sweep goes on.
    pub async fn sweep(&self, tenant: &TenantId) -> Result<u32, Error> {
        let now = self.clock.now();
        let mut swept = 0;
        for (accessor, by, _) in
            self.records.scan_all::<AccessorRecord>(&Owner::from(tenant), Space::Token, "").await?
        {
            let hash = TokenHash::from_text(&by.hash).ok_or_else(Error::internal)?;
            let Some((record, version)) = self.records.get::<TokenRecord>(&token_key(hash)).await? else {
                continue;
            };
            if record.expires.is_none_or(|end| end.after(Duration::from_secs(24 * 3600)) > now) {
                continue;
            }
            let tx = Tx::new()
                .expect(token_key(hash), version)
                .delete(token_key(hash))
                .delete(accessor_key(tenant, &accessor));
            let tx = match &record.parent {
                Some(parent) => tx.delete(child_key(&parent.accessor, &by.hash)),
                None => tx,
            };
            swept += u32::from(settle(self.records.store().commit(tx).await)?.is_some());
        }
        Ok(swept)
    }
}

#[async_trait]
impl Verifier for Tokens {
    async fn verify(&self, token: &SecretString) -> Result<Arc<Caller>, Error> {
        let grant = match hash_token(token) {
            Some(hash) => self.grant(hash).await?,
            None => None,
        };
        grant.map(|(_, caller)| caller).ok_or_else(|| {
            Error::new(Reason::Unauthenticated, "the token is unknown, expired or revoked")
                .next("use a current token in `Authorization: Bearer …`")
        })
    }
}

/// Adds a token's rows to `tx`.
pub fn put_token(records: &Records, tx: Tx, token: &SecretString, record: &TokenRecord) -> Tx {
    let hash = hash_token(token).expect("a token that was just made is well formed");
    let found = AccessorRecord { hash: hash.to_text() };
    let by_accessor = accessor_key(&record.tenant, &record.accessor);
    let mut tx = tx
        .put(by_accessor.clone(), records.seal(&by_accessor, &found))
        .put(token_key(hash), records.seal(&token_key(hash), record));
    if let Some(parent) = &record.parent {
        let by_parent = child_key(&parent.accessor, &found.hash);
        tx = tx.put(by_parent.clone(), records.seal(&by_parent, &found));
    }
    tx
}

/// Which token is meant, and the right to touch it: one's own needs none.
#[derive(Debug)]
pub enum TokenTarget {
    /// The token of the request.
    Own(Arc<Caller>),
    /// The token with this accessor.
    Other(Authorized<Administer, Scope>, String),
}

impl TokenTarget {
    /// Who asks.
    pub fn caller(&self) -> &Arc<Caller> {
        match self {
            TokenTarget::Own(caller) => caller,
            TokenTarget::Other(allowed, _) => allowed.caller(),
        }
    }
}

/// A new accessor: 96 random bits in hexadecimal.
pub(crate) fn accessor() -> String {
    let mut random = [0; 12];
    getrandom::fill(&mut random).expect("without the system's randomness no token could be made either");
    random.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn check_subject(subject: &str) -> Result<(), Error> {
    if (1..=128).contains(&subject.len()) && subject.chars().all(|c| c.is_ascii_graphic()) {
        return Ok(());
    }
    Err(Error::invalid("/subject", "is 1 to 128 printable ASCII characters without spaces"))
}

fn expiry(
    caller: &Caller,
    now: Timestamp,
    ttl: Ttl,
    parent_ends: Option<Timestamp>,
) -> Result<Option<Timestamp>, Error> {
    let wanted = match ttl {
        Ttl::Default => Some(now.after(DEFAULT_TTL)),
        Ttl::Of(duration) => Some(now.after(duration)),
        Ttl::Forever if caller.has(Scope::Operator) => None,
        Ttl::Forever => {
            return Err(Error::field(
                Reason::PermissionDenied,
                "/ttl",
                "only `operator` may ask for a token without end",
            ));
        }
    };
    // A child never outlives its parent.
    Ok(match (wanted, parent_ends) {
        (Some(wanted), Some(parent)) => Some(wanted.min(parent)),
        (wanted, parent) => wanted.or(parent),
    })
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn unknown_policy(name: &str) -> Error {
    let shown: String = name.chars().take(63).collect();
    Error::invalid("/policies", format!("there is no policy {shown:?}")).next("create the policy first")
}

fn gone() -> Error {
    Error::new(Reason::NotFound, "no token has this accessor").next("list the tokens to see their accessors")
}
