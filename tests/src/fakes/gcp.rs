//! Google Cloud as far as a client of Secret Manager meets it: the secrets, and every way to prove who one is.
//!
//! One address serves what Google has at several hosts: `secretmanager.googleapis.com`, `oauth2.googleapis.com/token`,
//! `sts.googleapis.com/v1/token`, `iamcredentials.googleapis.com`, the metadata server and Google's public keys. Written
//! from the REST reference of Secret Manager v1, AIP-4111 (self-signed JWTs), AIP-4117 (external accounts), RFC 8693 and
//! the metadata server's documentation. There is one project; answers name it by its number, as Google's do.
//!
//! Where Google is stricter than one might think, so is this: an empty payload is refused, tokens need the scope
//! `cloud-platform`, an etag that is not the current one fails a write.

mod faults;
mod identity;
mod requests;
mod secrets;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use axum::Router;
use axum::extract::{Request, State as Extract};
use axum::response::Response;
use serde_json::{Value, json};

pub use self::faults::Fault;
pub use self::requests::{Operation, Permission};
pub use self::secrets::Secrets;

use self::faults::Faults;
use self::identity::{Account, Grant, Provider};
use self::secrets::{Id, Secret};
use super::clock::Clock;
use super::keys::SigningKey;
use super::serving::{Bound, Serving};
use crate::authority::Authority;

/// The project's id, as people write it.
pub const PROJECT: &str = "scaivault-tests";
/// The project's number, as Google's answers have it.
pub const PROJECT_NUMBER: &str = "384650217903";

/// A Google Cloud with one project; gone when dropped.
#[derive(Debug)]
pub struct Gcp {
    cloud: Arc<Cloud>,
    _serving: Serving,
}

/// A service account and one of its keys.
#[derive(Clone)]
pub struct AccountKey {
    /// The account's e-mail address.
    pub email: String,
    /// The key, to sign with it what Google's libraries would not.
    pub key: SigningKey,
    json: String,
}

impl fmt::Debug for AccountKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AccountKey")
            .field("email", &self.email)
            .field("key", &self.key)
            .finish_non_exhaustive()
    }
}

impl AccountKey {
    /// The file that Google gives for it: `type`, `private_key` and the rest.
    pub fn json(&self) -> &str {
        &self.json
    }
}

impl Gcp {
    /// Starts one without TLS.
    ///
    /// # Errors
    /// If it cannot listen.
    pub async fn start() -> Result<Gcp> {
        Self::serve(Bound::plain().await?)
    }

    /// Starts one that serves TLS with a certificate of this authority.
    ///
    /// # Errors
    /// If it cannot listen.
    pub async fn start_tls(authority: &Authority) -> Result<Gcp> {
        Self::serve(Bound::tls(authority).await?)
    }

    fn serve(bound: Bound) -> Result<Gcp> {
        let cloud = Arc::new(Cloud {
            url: bound.url(),
            clock: Clock::default(),
            google: SigningKey::new()?,
            state: Mutex::default(),
        });
        cloud.state().add_account(&default_account());
        let router = Router::new().fallback(answer).with_state(cloud.clone());
        Ok(Gcp { cloud, _serving: bound.serve(router) })
    }

    /// The base URL of everything, without a slash at the end.
    pub fn url(&self) -> &str {
        &self.cloud.url
    }

    /// What an administrator does with the secrets that are not bound to a location.
    pub fn secrets(&self) -> Secrets<'_> {
        Secrets::new(&self.cloud, None)
    }

    /// What an administrator does with the secrets of a location, e.g. `europe-west1`.
    pub fn regional(&self, location: &str) -> Secrets<'_> {
        Secrets::new(&self.cloud, Some(location.to_owned()))
    }

    /// Makes a service account, e.g. `reader`, if there is none, and a new key of it. It may do everything until
    /// [`Gcp::deny`].
    ///
    /// # Errors
    /// If the system has no randomness.
    pub fn service_account(&self, name: &str) -> Result<AccountKey> {
        let email = format!("{name}@{PROJECT}.iam.gserviceaccount.com");
        let key = SigningKey::new()?;
        let mut state = self.cloud.state();
        state.add_account(&email);
        let account = state.accounts.get_mut(&email).context("it was just made")?;
        account.keys.insert(key.id().to_owned(), key.clone());
        let url = &self.cloud.url;
        let json = json!({
            "type": "service_account",
            "project_id": PROJECT,
            "private_key_id": key.id(),
            "private_key": key.pem(),
            "client_email": email,
            "client_id": account.unique_id,
            "auth_uri": "https://accounts.google.com/o/oauth2/auth",
            "token_uri": format!("{url}/token"),
            "auth_provider_x509_cert_url": "https://www.googleapis.com/oauth2/v1/certs",
            "client_x509_cert_url":
                format!("https://www.googleapis.com/robot/v1/metadata/x509/{}", email.replace('@', "%40")),
            "universe_domain": "googleapis.com",
        });
        Ok(AccountKey { email, key, json: format!("{json:#}") })
    }

    /// The account of the machine whose metadata server this is.
    pub fn default_account(&self) -> String {
        default_account()
    }

    /// Takes the account from the machine, whose metadata server then gives no tokens.
    pub fn detach_account(&self) {
        self.cloud.state().is_detached = true;
    }

    /// Ends [`Gcp::detach_account`].
    pub fn attach_account(&self) {
        self.cloud.state().is_detached = false;
    }

    /// Deletes a key: what it has signed is refused from now on. Access tokens got with it before go on.
    pub fn revoke_key(&self, key: &AccountKey) {
        if let Some(account) = self.cloud.state().accounts.get_mut(&key.email) {
            account.keys.remove(key.key.id());
        }
    }

    /// Makes every access token of a principal invalid.
    pub fn revoke_tokens(&self, principal: &str) {
        self.cloud.state().tokens.retain(|_, grant| grant.principal != principal);
    }

    /// How long access tokens last that are issued from now on. At first an hour.
    pub fn set_token_lifetime(&self, lifetime: Duration) {
        self.cloud.state().token_lifetime = lifetime;
    }

    /// Trusts an OIDC issuer, whose tokens this key signs, as a provider of a workload identity pool. Returns the
    /// audience that names it: `//iam.googleapis.com/projects/…/providers/…`.
    pub fn trust_issuer(&self, pool: &str, provider: &str, issuer: &str, key: &SigningKey) -> String {
        let audience = format!("{}/providers/{provider}", identity::pool(pool));
        let trusted = Provider { pool: pool.to_owned(), issuer: issuer.to_owned(), key: key.clone() };
        self.cloud.state().providers.insert(audience.clone(), trusted);
        audience
    }

    /// The name of a workload's principal: whoever has `subject` in a token of that pool's providers. It may do nothing
    /// until [`Gcp::allow`] or [`Gcp::allow_impersonation`].
    pub fn workload(pool: &str, subject: &str) -> String {
        format!("principal:{}/subject/{subject}", identity::pool(pool))
    }

    /// Lets a principal get access tokens of a service account.
    pub fn allow_impersonation(&self, principal: &str, email: &str) {
        self.cloud.state().impersonators.insert((principal.to_owned(), email.to_owned()));
    }

    /// The `external_account` file of a workload that keeps its issuer's token in `subject_token`, for the provider
    /// with this audience. It takes over a service account if one is given.
    pub fn external_account(&self, audience: &str, subject_token: &Path, email: Option<&str>) -> String {
        let url = &self.cloud.url;
        let mut json = json!({
            "type": "external_account",
            "audience": audience,
            "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
            "token_url": format!("{url}/v1/token"),
            "credential_source": { "file": subject_token, "format": { "type": "text" } },
            "universe_domain": "googleapis.com",
        });
        if let Some(email) = email {
            let impersonation = format!("{url}/v1/projects/-/serviceAccounts/{email}:generateAccessToken");
            json["service_account_impersonation_url"] = json!(impersonation);
        }
        format!("{json:#}")
    }

    /// Takes a permission from a principal: an account's e-mail address or [`Gcp::workload`].
    pub fn deny(&self, principal: &str, permission: Permission) {
        if let Some(permissions) = self.cloud.state().permissions.get_mut(principal) {
            permissions.remove(&permission);
        }
    }

    /// Gives a permission to a principal.
    pub fn allow(&self, principal: &str, permission: Permission) {
        self.cloud.state().permissions.entry(principal.to_owned()).or_default().insert(permission);
    }

    /// The most that a page has, however many are asked for; Google's is 25,000.
    pub fn set_page_size(&self, most: usize) {
        self.cloud.state().page_size = most.max(1);
    }

    /// Every request from now on meets this fault; it comes before those injected earlier.
    pub fn inject(&self, fault: Fault) {
        self.cloud.state().faults.inject(None, fault, None);
    }

    /// Every request of one kind from now on meets this fault.
    pub fn inject_on(&self, operation: Operation, fault: Fault) {
        self.cloud.state().faults.inject(Some(operation), fault, None);
    }

    /// The next so many requests of one kind meet this fault.
    pub fn inject_times(&self, operation: Operation, fault: Fault, times: u32) {
        self.cloud.state().faults.inject(Some(operation), fault, Some(times));
    }

    /// Ends every fault; what hangs already stays so.
    pub fn heal(&self) {
        self.cloud.state().faults = Faults::default();
    }

    /// How many requests of this kind came, refused ones included.
    pub fn calls(&self, operation: Operation) -> usize {
        self.cloud.state().calls.get(&operation).copied().unwrap_or(0)
    }

    /// Puts its clock forward, by whole seconds: tokens expire.
    pub fn advance(&self, by: Duration) {
        self.cloud.clock.advance(by);
    }

    /// The cloud itself, for a fake that trusts what this one has signed.
    pub(super) fn cloud(&self) -> Arc<Cloud> {
        self.cloud.clone()
    }
}

fn default_account() -> String {
    format!("{PROJECT_NUMBER}-compute@developer.gserviceaccount.com")
}

/// What the handlers share.
#[derive(Debug)]
pub(super) struct Cloud {
    url: String,
    clock: Clock,
    /// Signs the identity tokens of the metadata server.
    google: SigningKey,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    secrets: HashMap<Id, Secret>,
    /// Counts whatever was created, so that the newest comes first.
    created: u64,
    page_size: usize,
    forbidden: BTreeSet<Id>,
    accounts: BTreeMap<String, Account>,
    permissions: BTreeMap<String, BTreeSet<Permission>>,
    impersonators: BTreeSet<(String, String)>,
    providers: BTreeMap<String, Provider>,
    tokens: HashMap<String, Grant>,
    token_lifetime: Duration,
    /// Whether the machine has no account.
    is_detached: bool,
    faults: Faults,
    calls: BTreeMap<Operation, usize>,
}

impl Default for State {
    fn default() -> Self {
        State {
            secrets: HashMap::new(),
            created: 0,
            page_size: 25_000,
            forbidden: BTreeSet::new(),
            accounts: BTreeMap::new(),
            permissions: BTreeMap::new(),
            impersonators: BTreeSet::new(),
            providers: BTreeMap::new(),
            tokens: HashMap::new(),
            token_lifetime: Duration::from_secs(3600),
            is_detached: false,
            faults: Faults::default(),
            calls: BTreeMap::new(),
        }
    }
}

impl State {
    fn add_account(&mut self, email: &str) {
        self.accounts.entry(email.to_owned()).or_default();
        self.permissions.entry(email.to_owned()).or_insert_with(|| Permission::ALL.into());
    }
}

impl Cloud {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn answer(Extract(cloud): Extract<Arc<Cloud>>, request: Request) -> Response {
    let Some(call) = requests::Call::read(request).await else { return requests::unknown_page() };
    let fault = {
        let mut state = cloud.state();
        *state.calls.entry(call.operation).or_default() += 1;
        state.faults.next(call.operation)
    };
    if let Some(instead) = faults::instead(fault.as_ref()).await {
        return instead;
    }
    let answer = match call.operation {
        Operation::OauthToken => cloud.oauth_token(&call),
        Operation::StsToken => cloud.sts_token(&call),
        Operation::GenerateAccessToken => cloud.generate_access_token(&call),
        Operation::Certificates => requests::answer(200, &cloud.google.jwks()),
        Operation::Metadata | Operation::MetadataToken | Operation::MetadataIdentity => cloud.metadata(&call),
        _ => match cloud.secret_manager(&call, fault.as_ref()) {
            Ok(answer) => requests::answer(200, &answer),
            Err(refusal) => refusal.into(),
        },
    };
    faults::spoil(answer, fault.as_ref()).await
}

/// How Google tells that a request is refused.
#[derive(Debug)]
struct Refusal {
    code: u16,
    status: &'static str,
    message: String,
}

impl Refusal {
    fn invalid(message: impl Into<String>) -> Refusal {
        Refusal { code: 400, status: "INVALID_ARGUMENT", message: message.into() }
    }

    fn precondition(message: impl Into<String>) -> Refusal {
        Refusal { code: 400, status: "FAILED_PRECONDITION", message: message.into() }
    }

    fn unauthenticated() -> Refusal {
        let message = "Request had invalid authentication credentials. Expected OAuth 2 access token, login cookie or \
                       other valid authentication credential. See \
                       https://developers.google.com/identity/sign-in/web/devconsole-project.";
        Refusal { code: 401, status: "UNAUTHENTICATED", message: message.to_owned() }
    }

    fn denied(message: impl Into<String>) -> Refusal {
        Refusal { code: 403, status: "PERMISSION_DENIED", message: message.into() }
    }

    fn not_found(message: impl Into<String>) -> Refusal {
        Refusal { code: 404, status: "NOT_FOUND", message: message.into() }
    }

    fn exists(message: impl Into<String>) -> Refusal {
        Refusal { code: 409, status: "ALREADY_EXISTS", message: message.into() }
    }

    fn body(&self) -> Value {
        json!({ "error": { "code": self.code, "message": self.message, "status": self.status } })
    }
}

impl From<Refusal> for Response {
    fn from(refusal: Refusal) -> Response {
        requests::answer(refusal.code, &refusal.body())
    }
}
