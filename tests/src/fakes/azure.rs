//! A fake Azure Key Vault with the token endpoints of Entra ID and of managed identities, all at one address.
//!
//! It asks for what Azure asks for: `api-version`, a token that it issued, that is for the vault and has not expired, a
//! role that allows the call. Tokens are issued for a client secret, for a client assertion whose signature is that of a
//! registered certificate, and to managed identities. Its clock can be moved on ([`AzureFake::advance`]), so that no test
//! waits for a token to expire or for the next second of `updated`.
//!
//! Microsoft's own libraries for Python (azure-identity 1.27, azure-keyvault-secrets 4.12) were seen to work with it.
//! Whoever uses them has to say `disable_instance_discovery` and `verify_challenge_resource=False`.
//!
//! What is not there: keys, certificates, backup and purge over HTTP, the firewall, claims challenges, sovereign clouds,
//! and the seconds that the real vault takes to delete and recover.

mod entra;
mod faults;
mod reply;
mod vault;

use std::collections::BTreeMap;
use std::fmt;
use std::future::pending;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Result;
use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::header::{DATE, HOST};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri};
use axum::response::Response;
use jiff::fmt::rfc2822::DateTimePrinter;
use rcgen::{CertificateParams, KeyPair, PKCS_RSA_SHA256};
use scaivault_domain::time::Clock as _;
use scaivault_telemetry::SystemClock;

pub use self::entra::{ClientSecret, Identity, Right};
pub use self::faults::{Fault, Side};
pub use self::vault::Draft;

use self::entra::Directory;
use self::reply::{Asked, Reply};
use self::vault::Vault;
use super::serving::{Bound, Serving};
use crate::authority::Authority;

/// Every right.
pub const ALL_RIGHTS: [Right; 5] = [Right::Get, Right::List, Right::Set, Right::Delete, Right::Recover];

/// What requests are counted as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operation {
    /// `GET /secrets/{name}[/{version}]`
    Get,
    /// `GET /secrets`: each page is one.
    List,
    /// `GET /secrets/{name}/versions`: each page is one.
    ListVersions,
    /// `PUT /secrets/{name}`
    Set,
    /// `PATCH /secrets/{name}/{version}`
    Update,
    /// `DELETE /secrets/{name}`
    Delete,
    /// `GET /deletedsecrets/{name}`
    GetDeleted,
    /// `GET /deletedsecrets`: each page is one.
    ListDeleted,
    /// `POST /deletedsecrets/{name}/recover`
    Recover,
    /// `POST /{tenant}/oauth2/v2.0/token`
    Token,
    /// `GET /metadata/identity/oauth2/token`
    IdentityToken,
    /// `GET /{tenant}/v2.0/.well-known/openid-configuration`
    Discovery,
    /// Anything else.
    Other,
}

/// A certificate that an application can log in with, and its key, both PEM.
pub struct AppCertificate {
    /// The certificate, to register.
    pub certificate: String,
    /// Its private key: RSA, PKCS #8.
    pub key: String,
}

impl AppCertificate {
    /// A new one, signed by itself as Entra allows.
    ///
    /// # Errors
    /// If the system has no randomness.
    pub fn generate() -> Result<AppCertificate> {
        let key = KeyPair::generate_for(&PKCS_RSA_SHA256)?;
        let certificate = CertificateParams::new(Vec::new())?.self_signed(&key)?;
        Ok(AppCertificate { certificate: certificate.pem(), key: key.serialize_pem() })
    }
}

/// A vault and its directory, served until this is dropped.
pub struct AzureFake {
    url: String,
    tenant: String,
    azure: Arc<Azure>,
    _serving: Serving,
}

impl fmt::Debug for AzureFake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AzureFake").field("url", &self.url).finish_non_exhaustive()
    }
}

impl AzureFake {
    /// Starts one without TLS.
    ///
    /// # Errors
    /// If it cannot listen.
    pub async fn start() -> Result<AzureFake> {
        Ok(AzureFake::serve(Bound::plain().await?))
    }

    /// Starts one with a certificate of this authority.
    ///
    /// # Errors
    /// If it cannot listen.
    pub async fn start_tls(authority: &Authority) -> Result<AzureFake> {
        Ok(AzureFake::serve(Bound::tls(authority).await?))
    }

    fn serve(bound: Bound) -> AzureFake {
        let (url, tenant) = (bound.url(), entra::guid());
        let scheme = if url.starts_with("https") { "https" } else { "http" };
        let azure = Arc::new(Azure {
            scheme,
            authority: url.clone(),
            tenant: tenant.clone(),
            state: Mutex::default(),
        });
        let router = Router::new()
            .fallback(answer)
            .layer(DefaultBodyLimit::max(1024 * 1024))
            .with_state(azure.clone());
        AzureFake { url, tenant, azure, _serving: bound.serve(router) }
    }

    /// The address of the vault, of the authority and of the metadata service, e.g. `http://127.0.0.1:4711`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The tenant's id.
    pub fn tenant(&self) -> &str {
        &self.tenant
    }

    /// Where applications get tokens.
    pub fn token_endpoint(&self) -> String {
        format!("{}/{}/oauth2/v2.0/token", self.url, self.tenant)
    }

    /// Registers an application that logs in with a secret.
    pub fn register_app(&self, rights: &[Right]) -> ClientSecret {
        let mut state = self.azure.state();
        let client_id = state.directory.register(rights);
        let client_secret = state.directory.rotate_secret(&client_id);
        ClientSecret { client_id, client_secret }
    }

    /// Registers an application that logs in with a certificate (PEM), and returns its client id.
    ///
    /// # Errors
    /// If it is no certificate of an RSA key.
    pub fn register_app_with_certificate(&self, certificate: &str, rights: &[Right]) -> Result<String> {
        let mut state = self.azure.state();
        let client_id = state.directory.register(rights);
        state.directory.add_certificate(&client_id, certificate)?;
        Ok(client_id)
    }

    /// Registers a managed identity, and returns its client id.
    pub fn register_identity(&self, identity: Identity, rights: &[Right]) -> String {
        let mut state = self.azure.state();
        let client_id = state.directory.register(rights);
        state.directory.assign(identity, &client_id);
        client_id
    }

    /// Takes a managed identity from the machine; tokens that were issued to it stay valid.
    pub fn unassign_identity(&self, client_id: &str) {
        self.azure.state().directory.unassign(client_id);
    }

    /// Gives the machine a managed identity that was registered before.
    pub fn assign_identity(&self, identity: Identity, client_id: &str) {
        self.azure.state().directory.assign(identity, client_id);
    }

    /// Lets an application log in with a further certificate.
    ///
    /// # Errors
    /// If it is no certificate of an RSA key.
    pub fn add_certificate(&self, client_id: &str, certificate: &str) -> Result<()> {
        self.azure.state().directory.add_certificate(client_id, certificate)
    }

    /// Forgets an application's certificates; tokens that were issued for them stay valid.
    pub fn remove_certificates(&self, client_id: &str) {
        self.azure.state().directory.remove_certificates(client_id);
    }

    /// Replaces an application's secret; tokens that were issued for the old one stay valid.
    pub fn rotate_secret(&self, client_id: &str) -> String {
        self.azure.state().directory.rotate_secret(client_id)
    }

    /// Replaces the rights of an application or identity, from its next call on.
    pub fn set_rights(&self, client_id: &str, rights: &[Right]) {
        self.azure.state().directory.set_rights(client_id, rights);
    }

    /// No token that was issued so far is valid any more.
    pub fn revoke_tokens(&self) {
        self.azure.state().directory.revoke_tokens();
    }

    /// How long tokens are valid that are issued from now on, in whole seconds; 3599 s otherwise.
    pub fn set_token_lifetime(&self, lifetime: Duration) {
        self.azure.state().directory.lifetime = lifetime;
    }

    /// Moves the fake's clock on.
    pub fn advance(&self, by: Duration) {
        self.azure.state().ahead += by;
    }

    /// Makes a version with this value and nothing else, and returns its id.
    pub fn put(&self, name: &str, value: &str) -> String {
        self.put_with(name, Draft::of(value))
    }

    /// Makes a version, and returns its id.
    pub fn put_with(&self, name: &str, draft: Draft) -> String {
        let mut state = self.azure.state();
        let now = state.now();
        state.vault.put(name, draft, now)
    }

    /// Changes the current version of a secret, e.g. disables it or sets its tags or its expiry.
    pub fn change(&self, name: &str, change: impl FnOnce(&mut Draft)) {
        let mut state = self.azure.state();
        let now = state.now();
        state.vault.change(name, now, change);
    }

    /// Disables the current version of a secret.
    pub fn disable(&self, name: &str) {
        self.change(name, |draft| draft.disabled = true);
    }

    /// Enables the current version of a secret.
    pub fn enable(&self, name: &str) {
        self.change(name, |draft| draft.disabled = false);
    }

    /// Sets when the current version of a secret expires, in seconds since the Unix epoch.
    pub fn set_expiry(&self, name: &str, expires: i64) {
        self.change(name, |draft| draft.expires = Some(expires));
    }

    /// Deletes a secret softly.
    pub fn delete(&self, name: &str) {
        let mut state = self.azure.state();
        let now = state.now();
        state.vault.remove(name, now);
    }

    /// Brings a deleted secret back.
    pub fn recover(&self, name: &str) {
        self.azure.state().vault.restore(name);
    }

    /// Removes a deleted secret for good, so that its name is free.
    pub fn purge(&self, name: &str) {
        self.azure.state().vault.purge(name);
    }

    /// The current version of a secret and its id, enabled or not.
    pub fn current(&self, name: &str) -> Option<(String, Draft)> {
        self.azure.state().vault.current(name)
    }

    /// The ids of a secret's versions, the oldest first.
    pub fn versions(&self, name: &str) -> Vec<String> {
        self.azure.state().vault.ids(name)
    }

    /// Misbehaves like this from the next request on.
    pub fn set_fault(&self, side: Side, fault: Fault) {
        self.azure.state().set_fault(side, Switch { fault, left: None });
    }

    /// Misbehaves like this for so many requests.
    pub fn set_fault_times(&self, side: Side, fault: Fault, times: usize) {
        self.azure.state().set_fault(side, Switch { fault, left: Some(times) });
    }

    /// How many requests of this kind came, answered or not.
    pub fn calls(&self, operation: Operation) -> usize {
        self.azure.state().calls.get(&operation).copied().unwrap_or_default()
    }

    /// All requests, the oldest first, e.g. `GET /secrets/db?api-version=7.4`.
    pub fn requests(&self) -> Vec<String> {
        self.azure.state().requests.clone()
    }

    /// Forgets the requests and counts them from zero.
    pub fn reset_calls(&self) {
        let mut state = self.azure.state();
        state.calls.clear();
        state.requests.clear();
    }
}

/// What the handler has.
struct Azure {
    scheme: &'static str,
    /// What challenges name.
    authority: String,
    tenant: String,
    state: Mutex<AzureState>,
}

#[derive(Default)]
struct AzureState {
    vault: Vault,
    directory: Directory,
    vault_fault: Switch,
    tokens_fault: Switch,
    calls: BTreeMap<Operation, usize>,
    requests: Vec<String>,
    /// How far the clock was moved.
    ahead: Duration,
}

struct Switch {
    fault: Fault,
    /// For how many more requests; without end if there is none.
    left: Option<usize>,
}

impl Default for Switch {
    fn default() -> Self {
        Switch { fault: Fault::Pass, left: None }
    }
}

impl AzureState {
    fn now(&self) -> i64 {
        SystemClock.now().after(self.ahead).as_millis() / 1000
    }

    fn set_fault(&mut self, side: Side, switch: Switch) {
        match side {
            Side::Vault => self.vault_fault = switch,
            Side::Tokens => self.tokens_fault = switch,
        }
    }

    /// The fault for one request.
    fn fault(&mut self, side: Side) -> Fault {
        let switch = match side {
            Side::Vault => &mut self.vault_fault,
            Side::Tokens => &mut self.tokens_fault,
        };
        match &mut switch.left {
            None => switch.fault.clone(),
            Some(0) => Fault::Pass,
            Some(left) => {
                *left -= 1;
                switch.fault.clone()
            }
        }
    }
}

/// What a method and a path ask for.
enum Call<'a> {
    Get(&'a str, Option<&'a str>),
    List,
    ListVersions(&'a str),
    Set(&'a str),
    Update(&'a str, &'a str),
    Delete(&'a str),
    GetDeleted(&'a str),
    ListDeleted,
    Recover(&'a str),
    Token(&'a str),
    IdentityToken,
    Discovery,
    NotAllowed,
    Unknown,
}

impl<'a> Call<'a> {
    fn parse(method: &Method, path: &'a str) -> Call<'a> {
        // Microsoft's libraries ask for the current version with an empty one: `/secrets/db/`.
        let path = path.strip_prefix('/').unwrap_or(path);
        let parts: Vec<&str> = path.strip_suffix('/').unwrap_or(path).split('/').collect();
        match (method.as_str(), parts.as_slice()) {
            ("GET", ["secrets"]) => Call::List,
            ("GET", ["secrets", name]) => Call::Get(name, None),
            ("GET", ["secrets", name, "versions"]) => Call::ListVersions(name),
            ("GET", ["secrets", name, version]) => Call::Get(name, Some(version)),
            ("PUT", ["secrets", name]) => Call::Set(name),
            ("PATCH", ["secrets", name, version]) => Call::Update(name, version),
            ("DELETE", ["secrets", name]) => Call::Delete(name),
            ("GET", ["deletedsecrets"]) => Call::ListDeleted,
            ("GET", ["deletedsecrets", name]) => Call::GetDeleted(name),
            ("POST", ["deletedsecrets", name, "recover"]) => Call::Recover(name),
            ("POST", [tenant, "oauth2", "v2.0", "token"]) => Call::Token(tenant),
            ("GET", ["metadata", "identity", "oauth2", "token"]) => Call::IdentityToken,
            ("GET", [_, "v2.0", ".well-known", "openid-configuration"]) => Call::Discovery,
            (_, ["secrets" | "deletedsecrets", ..] | [_, "oauth2", "v2.0", "token"]) => Call::NotAllowed,
            _ => Call::Unknown,
        }
    }

    fn operation(&self) -> Operation {
        match self {
            Call::Get(..) => Operation::Get,
            Call::List => Operation::List,
            Call::ListVersions(_) => Operation::ListVersions,
            Call::Set(_) => Operation::Set,
            Call::Update(..) => Operation::Update,
            Call::Delete(_) => Operation::Delete,
            Call::GetDeleted(_) => Operation::GetDeleted,
            Call::ListDeleted => Operation::ListDeleted,
            Call::Recover(_) => Operation::Recover,
            Call::Token(_) => Operation::Token,
            Call::IdentityToken => Operation::IdentityToken,
            Call::Discovery => Operation::Discovery,
            Call::NotAllowed | Call::Unknown => Operation::Other,
        }
    }

    fn side(&self) -> Side {
        match self {
            Call::Token(_) | Call::IdentityToken | Call::Discovery => Side::Tokens,
            _ => Side::Vault,
        }
    }

    /// The right that a call to the vault needs, what Azure calls its data action, and the secret's name.
    ///
    /// See "Azure built-in roles for Key Vault data plane operations".
    fn needs(&self) -> Option<(Right, &'static str, Option<&'a str>)> {
        Some(match *self {
            Call::Get(name, _) => (Right::Get, "getSecret/action", Some(name)),
            Call::List | Call::ListDeleted => (Right::List, "readMetadata/action", None),
            Call::ListVersions(name) | Call::GetDeleted(name) => {
                (Right::List, "readMetadata/action", Some(name))
            }
            Call::Set(name) => (Right::Set, "setSecret/action", Some(name)),
            Call::Update(name, _) => (Right::Set, "update/action", Some(name)),
            Call::Delete(name) => (Right::Delete, "delete", Some(name)),
            Call::Recover(name) => (Right::Recover, "recover/action", Some(name)),
            Call::Token(_) | Call::IdentityToken | Call::Discovery | Call::NotAllowed | Call::Unknown => {
                return None;
            }
        })
    }
}

impl Azure {
    fn state(&self) -> MutexGuard<'_, AzureState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reply(&self, call: &Call<'_>, asked: &Asked, fault: &Fault) -> Reply {
        let state = &mut *self.state();
        let allowed = match call {
            Call::Token(tenant) => return state.directory.token(asked, tenant, &self.tenant),
            Call::IdentityToken => return state.directory.identity_token(asked, &self.tenant),
            Call::Discovery => return entra::discovery(asked, &self.tenant),
            _ => self.admit(&state.directory, call, asked, fault),
        };
        let vault = &mut state.vault;
        let reply = allowed.and_then(|()| match *call {
            Call::Get(name, version) => vault.get(asked, name, version),
            Call::List => vault.list(asked, fault),
            Call::ListVersions(name) => vault.versions(asked, name, fault),
            Call::Set(name) => vault.set(asked, name),
            Call::Update(name, version) => vault.update(asked, name, version),
            Call::Delete(name) => vault.delete(asked, name),
            Call::GetDeleted(name) => vault.get_deleted(asked, name),
            Call::ListDeleted => vault.list_deleted(asked, fault),
            Call::Recover(name) => vault.recover(asked, name),
            Call::Token(_) | Call::IdentityToken | Call::Discovery | Call::NotAllowed | Call::Unknown => {
                Err(not_served(call))
            }
        });
        reply.unwrap_or_else(|refusal| refusal)
    }

    /// Whether a call to the vault is one, comes with a valid token, and is allowed to its owner.
    fn admit(
        &self,
        directory: &Directory,
        call: &Call<'_>,
        asked: &Asked,
        fault: &Fault,
    ) -> Result<(), Reply> {
        let (right, action, name) = call.needs().ok_or_else(|| not_served(call))?;
        vault::check_api_version(asked)?;
        let caller = directory.caller(asked).map_err(|bad| {
            let (authority, tenant) = (&self.authority, &self.tenant);
            let challenge =
                format!("Bearer authorization=\"{authority}/{tenant}\", resource=\"{}\"", entra::VAULT);
            Reply::challenge(&bad.message(), challenge)
        })?;
        let closed = match fault {
            Fault::ForbidList => right == Right::List,
            Fault::ForbidName(closed) => name.is_some_and(|name| name.eq_ignore_ascii_case(closed)),
            _ => false,
        };
        if closed || !caller.may(right) {
            let text = format!(
                "Caller is not authorized to perform action on resource.\r\nIf role assignments, deny assignments or \
                 role definitions were changed recently, please observe propagation time.\r\nCaller: {}\r\nAction: \
                 'Microsoft.KeyVault/vaults/secrets/{action}'\r\nResource: '{}'\r\nAssignment: (not found)\r\n\
                 DenyAssignmentId: null\r\nDecisionReason: 'DeniedWithNoValidRBAC' \r\nVault: fake;location=loopback\r\n",
                caller.describe(&self.tenant),
                name.unwrap_or("fake"),
            );
            return Err(Reply::inner_error(StatusCode::FORBIDDEN, "Forbidden", text, "ForbiddenByRbac"));
        }
        name.map_or(Ok(()), vault::check_name)
    }
}

fn not_served(call: &Call<'_>) -> Reply {
    match call {
        Call::NotAllowed => {
            let text = "The method is not allowed on this resource.";
            Reply::error(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed", text)
        }
        _ => Reply::error(StatusCode::NOT_FOUND, "NotFound", "There is no such resource."),
    }
}

async fn answer(
    State(azure): State<Arc<Azure>>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let now = azure.state().now();
    let mut response = respond(&azure, now, &method, &uri, headers, body).await;
    // By its own clock, as all its times are.
    let date = jiff::Timestamp::from_second(now).unwrap_or(jiff::Timestamp::MAX);
    let date = DateTimePrinter::new().timestamp_to_rfc9110_string(&date).expect("years have four digits");
    response.headers_mut().insert(DATE, HeaderValue::from_str(&date).expect("a date is plain text"));
    response
}

async fn respond(
    azure: &Azure,
    now: i64,
    method: &Method,
    uri: &Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let call = Call::parse(method, uri.path());
    let side = call.side();
    let fault = {
        let mut state = azure.state();
        *state.calls.entry(call.operation()).or_default() += 1;
        state.requests.push(format!("{method} {}", uri.path_and_query().map_or("/", |path| path.as_str())));
        state.fault(side)
    };
    if fault == Fault::Hang {
        return pending().await;
    }
    if let Some(response) = fault.instead(side) {
        return response;
    }
    // As with the real vault, links lead to where the client found us, so a proxy in front stays in front.
    let host = headers.get(HOST).and_then(|host| host.to_str().ok());
    let host = host.or_else(|| uri.authority().map(|authority| authority.as_str()));
    let base = host.map_or_else(|| azure.authority.clone(), |host| format!("{}://{host}", azure.scheme));
    let query = url::form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes());
    let asked = Asked { base, query: query.into_owned().collect(), headers, body, now };
    let reply = azure.reply(&call, &asked, &fault);
    let mut response = match fault {
        Fault::Truncated => faults::truncated(reply),
        _ => reply.into(),
    };
    response.headers_mut().insert(DATE, date(now));
    response
}

/// What the fake's clock shows, which `updated` and the like are dated by: clients compare the two.
fn date(now: i64) -> HeaderValue {
    let now = jiff::Timestamp::from_second(now).expect("nobody moves the clock out of its range");
    HeaderValue::from_str(&now.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string()).expect("a date is ASCII")
}
