//! Who may do what: scopes say which API, policies say which paths.
//!
//! Permission is a value: an [`Authorized`] can only be made here, and services take it instead of a path.

use std::marker::PhantomData;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Reason};
use crate::path::{Folder, SecretPath};
use crate::pattern::Pattern;
use crate::tenant::{PolicyName, TenantId};
use crate::time::Timestamp;
use crate::token::TokenHash;

/// Which part of the API a token may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Scope {
    /// Read and list secrets.
    #[serde(rename = "secrets:read")]
    SecretsRead,
    /// Write and delete secrets.
    #[serde(rename = "secrets:write")]
    SecretsWrite,
    /// See backends, their status and events.
    #[serde(rename = "federation:read")]
    FederationRead,
    /// Configure backends.
    #[serde(rename = "federation:write")]
    FederationWrite,
    /// Read the audit trail.
    #[serde(rename = "audit:read")]
    AuditRead,
    /// Policies and tokens of the token's own tenant.
    #[serde(rename = "admin")]
    Admin,
    /// Tenants, nodes and keys of the installation; may name a tenant.
    #[serde(rename = "operator")]
    Operator,
}

impl Scope {
    /// Every scope.
    pub const ALL: &'static [Scope] = &[
        Scope::SecretsRead,
        Scope::SecretsWrite,
        Scope::FederationRead,
        Scope::FederationWrite,
        Scope::AuditRead,
        Scope::Admin,
        Scope::Operator,
    ];

    /// The name in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Scope::SecretsRead => "secrets:read",
            Scope::SecretsWrite => "secrets:write",
            Scope::FederationRead => "federation:read",
            Scope::FederationWrite => "federation:write",
            Scope::AuditRead => "audit:read",
            Scope::Admin => "admin",
            Scope::Operator => "operator",
        }
    }

    /// The scope of this name.
    ///
    /// # Errors
    /// `invalid_request`, naming `scopes`.
    pub fn parse(name: &str) -> Result<Scope, Error> {
        Scope::ALL.iter().copied().find(|scope| scope.as_str() == name).ok_or_else(|| {
            let known = Scope::ALL.iter().map(|s| s.as_str()).collect::<Vec<_>>().join(", ");
            Error::invalid("/scopes", format!("the scopes are {known}"))
        })
    }
}

/// What may be done with a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Capability {
    /// See the value and the versions.
    Read,
    /// See that the path exists.
    List,
    /// Write a new version.
    Write,
    /// Delete the secret.
    Delete,
}

impl Capability {
    /// Every capability.
    pub const ALL: &'static [Capability] =
        &[Capability::Read, Capability::List, Capability::Write, Capability::Delete];

    /// The name in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Capability::Read => "read",
            Capability::List => "list",
            Capability::Write => "write",
            Capability::Delete => "delete",
        }
    }

    /// The capability of this name.
    pub fn parse(name: &str) -> Option<Capability> {
        Capability::ALL.iter().copied().find(|c| c.as_str() == name)
    }
}

/// Whether a rule gives or takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Effect {
    /// The rule gives the capabilities.
    Allow,
    /// The rule takes them; it wins over every allow.
    Deny,
}

/// One line of a policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyRule {
    /// The paths that it is about.
    pub path: Pattern,
    /// What it gives or takes there.
    pub capabilities: Vec<Capability>,
    /// Which of the two.
    pub effect: Effect,
}

/// A named list of rules.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// Unique in the tenant.
    pub name: PolicyName,
    /// At most 256, in no particular order: deny wins.
    pub rules: Vec<PolicyRule>,
}

/// The name of the built-in policy that allows everything on every path.
pub const ROOT_POLICY: &str = "root";

/// The rules of the built-in policy.
pub fn root_rules() -> Vec<PolicyRule> {
    let path = Pattern::parse("**").expect("the pattern of all paths");
    vec![PolicyRule { path, capabilities: Capability::ALL.to_vec(), effect: Effect::Allow }]
}

/// An authenticated principal with everything needed to decide what it may do. Nodes hold it as a *grant*.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Where everything the caller touches lives.
    pub tenant: TenantId,
    /// The hash of its token, if it came with one.
    pub token: Option<TokenHash>,
    /// Who it is, e.g. `ci-deployer`.
    pub subject: String,
    /// A name for the token that is not the token.
    pub accessor: String,
    /// Which API.
    pub scopes: Vec<Scope>,
    /// Which paths: the rules of all its policies.
    pub rules: Arc<[PolicyRule]>,
    /// When the token ends, if it does.
    pub expires_at: Option<Timestamp>,
}

/// The caller may read the value at a path.
#[derive(Debug)]
pub enum Read {}
/// The caller may write or delete at a path (which of the two was asked is checked where it is made).
#[derive(Debug)]
pub enum Write {}
/// The caller may list; what is listed must still be filtered with [`Authorized::may_see`].
#[derive(Debug)]
pub enum List {}
/// The caller may use an administrative API.
#[derive(Debug)]
pub enum Administer {}

/// Proof that `caller` may do `Action` on `target`. Only this module makes one.
#[derive(Debug)]
pub struct Authorized<Action, Target = SecretPath> {
    caller: Arc<Caller>,
    target: Target,
    action: PhantomData<fn() -> Action>,
}

impl<Action, Target> Authorized<Action, Target> {
    /// Who was authorised.
    pub fn caller(&self) -> &Arc<Caller> {
        &self.caller
    }

    /// Where everything the caller touches lives.
    pub fn tenant(&self) -> &TenantId {
        &self.caller.tenant
    }
}

impl<Action> Authorized<Action, SecretPath> {
    /// The path that was authorised.
    pub fn path(&self) -> &SecretPath {
        &self.target
    }
}

impl Authorized<List, Folder> {
    /// The folder to list.
    pub fn folder(&self) -> &Folder {
        &self.target
    }

    /// Whether the caller may be told that `path` exists.
    pub fn may_see(&self, path: &SecretPath) -> bool {
        self.caller.allows(path, Capability::List)
    }

    /// Whether the caller may be told of something below the folder of these segments.
    pub fn may_see_below<'a>(&self, folder: impl Iterator<Item = &'a str> + Clone) -> bool {
        let mut about = self.caller.rules.iter().filter(|rule| rule.capabilities.contains(&Capability::List));
        about.clone().any(|rule| rule.effect == Effect::Allow && rule.path.reaches_below(folder.clone()))
            && !about.any(|rule| rule.effect == Effect::Deny && rule.path.covers_below(folder.clone()))
    }
}

impl Caller {
    /// Whether the policies give `capability` on `path`. Deny by default, and deny wins.
    pub fn allows(&self, path: &SecretPath, capability: Capability) -> bool {
        let segments: Vec<_> = path.segments().collect();
        let mut allowed = false;
        for rule in self.rules.iter() {
            if !rule.capabilities.contains(&capability) || rule.path.captures(&segments).is_none() {
                continue;
            }
            match rule.effect {
                Effect::Deny => return false,
                Effect::Allow => allowed = true,
            }
        }
        allowed
    }

    /// Whether one rule gives `capability` on every path of `pattern` and no rule takes it from one of them.
    pub fn allows_all(&self, pattern: &Pattern, capability: Capability) -> bool {
        let mut about = self.rules.iter().filter(|rule| rule.capabilities.contains(&capability));
        about.clone().any(|rule| rule.effect == Effect::Allow && rule.path.covers(pattern))
            && !about.any(|rule| rule.effect == Effect::Deny && rule.path.intersects(pattern))
    }

    /// The same caller acting for another tenant. Policies belong to a tenant, so of its rules only that of the built-in
    /// policy `root` goes along.
    #[must_use]
    pub fn acting_for(&self, tenant: TenantId) -> Caller {
        let root = root_rules();
        let rules = self.rules.iter().filter(|rule| root.contains(rule)).cloned().collect();
        Caller { tenant, rules, ..self.clone() }
    }

    /// Whether the caller has `scope`.
    pub fn has(&self, scope: Scope) -> bool {
        self.scopes.contains(&scope)
    }

    /// Whether the token is over at `now`.
    pub fn expired(&self, now: Timestamp) -> bool {
        self.expires_at.is_some_and(|end| end <= now)
    }
}

fn require(caller: &Caller, scope: Scope) -> Result<(), Error> {
    if caller.has(scope) {
        return Ok(());
    }
    let message = format!("the token has no scope `{}`", scope.as_str());
    Err(Error::new(Reason::PermissionDenied, message).next("use a token that was created with this scope"))
}

fn on_path<Action>(
    caller: &Arc<Caller>,
    path: SecretPath,
    scope: Scope,
    capability: Capability,
) -> Result<Authorized<Action>, Error> {
    require(caller, scope)?;
    if !caller.allows(&path, capability) {
        // Says nothing about whether the path exists.
        let message = format!("no policy of the token allows `{}` on this path", capability.as_str());
        return Err(Error::new(Reason::PermissionDenied, message)
            .next("ask the tenant's admin for a policy that does"));
    }
    Ok(Authorized { caller: caller.clone(), target: path, action: PhantomData })
}

/// Allows reading `path`.
///
/// # Errors
/// `permission_denied`, whether or not the path exists.
pub fn authorize_read(caller: &Arc<Caller>, path: SecretPath) -> Result<Authorized<Read>, Error> {
    on_path(caller, path, Scope::SecretsRead, Capability::Read)
}

/// Allows writing `path`.
///
/// # Errors
/// `permission_denied`, whether or not the path exists.
pub fn authorize_write(caller: &Arc<Caller>, path: SecretPath) -> Result<Authorized<Write>, Error> {
    on_path(caller, path, Scope::SecretsWrite, Capability::Write)
}

/// Allows deleting `path`.
///
/// # Errors
/// `permission_denied`, whether or not the path exists.
pub fn authorize_delete(caller: &Arc<Caller>, path: SecretPath) -> Result<Authorized<Write>, Error> {
    on_path(caller, path, Scope::SecretsWrite, Capability::Delete)
}

/// Allows listing `folder`; what the caller may not list is left out of the answer.
///
/// # Errors
/// `permission_denied` without the scope.
pub fn authorize_list(caller: &Arc<Caller>, folder: Folder) -> Result<Authorized<List, Folder>, Error> {
    require(caller, Scope::SecretsRead)?;
    Ok(Authorized { caller: caller.clone(), target: folder, action: PhantomData })
}

/// Allows an administrative request that needs `scope`.
///
/// # Errors
/// `permission_denied` without the scope.
pub fn authorize_admin(caller: &Arc<Caller>, scope: Scope) -> Result<Authorized<Administer, Scope>, Error> {
    require(caller, scope)?;
    Ok(Authorized { caller: caller.clone(), target: scope, action: PhantomData })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller(rules: &[(&str, &[Capability], Effect)]) -> Arc<Caller> {
        let rules = rules.iter().map(|(path, capabilities, effect)| PolicyRule {
            path: Pattern::parse(path).unwrap(),
            capabilities: capabilities.to_vec(),
            effect: *effect,
        });
        Arc::new(Caller {
            tenant: TenantId::parse("t").unwrap(),
            token: None,
            subject: "s".into(),
            accessor: "a".into(),
            scopes: vec![Scope::SecretsRead],
            rules: rules.collect(),
            expires_at: None,
        })
    }

    fn path(text: &str) -> SecretPath {
        SecretPath::check(text).unwrap()
    }

    #[test]
    fn nothing_is_allowed_by_default() {
        assert!(authorize_read(&caller(&[]), path("a")).is_err());
    }

    #[test]
    fn deny_wins() {
        let caller = caller(&[
            ("a/**", &[Capability::Read], Effect::Allow),
            ("a/secret/**", &[Capability::Read], Effect::Deny),
        ]);
        assert!(authorize_read(&caller, path("a/b")).is_ok());
        assert!(authorize_read(&caller, path("a/secret/b")).is_err());
        assert!(caller.allows_all(&Pattern::parse("a/b/**").unwrap(), Capability::Read));
        assert!(!caller.allows_all(&Pattern::parse("a/**").unwrap(), Capability::Read));
        assert!(!caller.allows_all(&Pattern::parse("a/*/b").unwrap(), Capability::Read));
    }

    #[test]
    fn a_folder_that_is_denied_as_a_whole_is_not_listed() {
        let caller = caller(&[
            ("**", &[Capability::List], Effect::Allow),
            ("a/secret/**", &[Capability::List], Effect::Deny),
        ]);
        let allowed = authorize_list(&caller, Folder::ROOT).unwrap();
        assert!(allowed.may_see_below(["a"].into_iter()));
        assert!(!allowed.may_see_below(["a", "secret"].into_iter()));
    }

    #[test]
    fn policies_do_not_go_along_into_another_tenant() {
        let other = TenantId::parse("other").unwrap();
        let named = caller(&[("app/**", &[Capability::Read], Effect::Allow)]).acting_for(other.clone());
        assert!(!named.allows(&path("app/x"), Capability::Read));
        let root = Caller { rules: root_rules().into(), ..Caller::clone(&caller(&[])) };
        assert!(root.acting_for(other).allows(&path("app/x"), Capability::Read));
    }

    #[test]
    fn a_policy_without_the_scope_is_not_enough() {
        let caller = caller(&[("**", Capability::ALL, Effect::Allow)]);
        let refused = authorize_write(&caller, path("a")).expect_err("no secrets:write");
        assert_eq!(refused.reason, Reason::PermissionDenied);
    }
}
