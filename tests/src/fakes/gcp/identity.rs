//! Who is calling: tokens that Google issues, takes and gives for others.

use std::collections::BTreeMap;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, StatusCode};
use axum::response::Response;
use serde_json::{Value, json};

use super::requests::{self, Call, Operation};
use super::{Cloud, PROJECT, PROJECT_NUMBER, Refusal, default_account};
use crate::fakes::clock::seconds;
use crate::fakes::keys::{SigningKey, claimed_key, has_audience, random_hex};

const SCOPE: &str = "https://www.googleapis.com/auth/cloud-platform";
/// Enough to get tokens of others; Google's libraries ask for it when a workload takes over an account.
const IAM_SCOPE: &str = "https://www.googleapis.com/auth/iam";
/// What Google's libraries put into an assertion, even if the file names another `token_uri`.
const TOKEN_AUDIENCE: &str = "https://oauth2.googleapis.com/token";
/// The most that a service account's own token may be valid for.
const LONGEST_SECONDS: i64 = 3600;
/// How far a client's clock may be ahead.
const SKEW_SECONDS: i64 = 60;

/// The name of a workload identity pool, as audiences and principals have it.
pub(super) fn pool(name: &str) -> String {
    format!("//iam.googleapis.com/projects/{PROJECT_NUMBER}/locations/global/workloadIdentityPools/{name}")
}

#[derive(Debug)]
pub(super) struct Account {
    pub(super) unique_id: String,
    /// By key id.
    pub(super) keys: BTreeMap<String, SigningKey>,
}

impl Default for Account {
    fn default() -> Self {
        let number = rand::random::<u64>() % 1_000_000_000_000_000_000;
        Account { unique_id: format!("117{number:018}"), keys: BTreeMap::new() }
    }
}

/// An issuer that is trusted for workloads.
#[derive(Debug)]
pub(super) struct Provider {
    pub(super) pool: String,
    pub(super) issuer: String,
    pub(super) key: SigningKey,
}

/// What an access token stands for.
#[derive(Clone, Debug)]
pub(super) struct Grant {
    pub(super) principal: String,
    expires: i64,
    scoped: Scoped,
}

/// Whether a token was issued for all of Google Cloud, or for something smaller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scoped {
    Cloud,
    Iam,
    Elsewhere,
}

impl Scoped {
    fn of(scopes: &str) -> Scoped {
        let has = |wanted: &str| scopes.split([' ', ',']).any(|scope| scope == wanted);
        match (has(SCOPE), has(IAM_SCOPE)) {
            (true, _) => Scoped::Cloud,
            (false, true) => Scoped::Iam,
            (false, false) => Scoped::Elsewhere,
        }
    }
}

impl Cloud {
    /// Who calls.
    pub(super) fn authenticate(&self, call: &Call) -> Result<String, Refusal> {
        let Some(bearer) = call.bearer() else {
            let message = "Request is missing required authentication credential. Expected OAuth 2 access token, login \
                           cookie or other valid authentication credential. See \
                           https://developers.google.com/identity/sign-in/web/devconsole-project.";
            return Err(Refusal { message: message.to_owned(), ..Refusal::unauthenticated() });
        };
        let grant = if bearer.split('.').count() == 3 && claimed_key(bearer).is_some() {
            self.self_signed(bearer, call.location().as_deref())
        } else {
            self.granted(bearer)
        };
        let grant = grant.ok_or_else(Refusal::unauthenticated)?;
        let enough = match grant.scoped {
            Scoped::Cloud => true,
            Scoped::Iam => call.operation == Operation::GenerateAccessToken,
            Scoped::Elsewhere => false,
        };
        if !enough {
            return Err(Refusal::denied("Request had insufficient authentication scopes."));
        }
        Ok(grant.principal)
    }

    fn granted(&self, token: &str) -> Option<Grant> {
        let grant = self.state().tokens.get(token)?.clone();
        (grant.expires > self.clock.seconds()).then_some(grant)
    }

    /// A JWT that a service account sends instead of an access token (AIP-4111): for a service's host or with scopes.
    fn self_signed(&self, token: &str, location: Option<&str>) -> Option<Grant> {
        let (email, claims) = self.account_token(token)?;
        let expires = self.timely(&claims)?;
        let regional = location.map(|place| format!("https://secretmanager.{place}.rep.googleapis.com/"));
        let hosts = ["https://secretmanager.googleapis.com/", regional.as_deref().unwrap_or_default()];
        let scoped = match claims["scope"].as_str() {
            Some(scopes) => Scoped::of(scopes),
            None if has_audience(&claims, &hosts) => Scoped::Cloud,
            None => return None,
        };
        let names_itself = claims["iss"] == email && claims["sub"] == email;
        names_itself.then_some(Grant { principal: email, expires, scoped })
    }

    /// The account and the claims of a token that one of our service accounts has signed. The account is taken from the
    /// key; nothing else is checked.
    pub(in crate::fakes) fn account_token(&self, token: &str) -> Option<(String, Value)> {
        let id = claimed_key(token)?;
        let state = self.state();
        let (email, key) =
            state.accounts.iter().find_map(|(email, account)| Some((email, account.keys.get(&id)?)))?;
        Some((email.clone(), key.verify(token)?))
    }

    /// The claims of an identity token that Google has signed and that has not expired.
    pub(in crate::fakes) fn identity_token(&self, token: &str) -> Option<Value> {
        let claims = self.google.verify(token)?;
        (claims["exp"].as_i64()? > self.clock.seconds()).then_some(claims)
    }

    /// The time now, in seconds since the Unix epoch.
    pub(in crate::fakes) fn seconds(&self) -> i64 {
        self.clock.seconds()
    }

    /// When a service account's token expires, if its times are in order.
    fn timely(&self, claims: &Value) -> Option<i64> {
        let (issued, expires) = (claims["iat"].as_i64()?, claims["exp"].as_i64()?);
        let now = self.clock.seconds();
        let in_order = issued <= now + SKEW_SECONDS && expires > now && expires - issued <= LONGEST_SECONDS;
        in_order.then_some(expires)
    }

    /// Issues an access token.
    fn grant(&self, principal: &str, lifetime: Duration, scoped: Scoped) -> String {
        let token = format!("ya29.c.{}", random_hex::<48>());
        let expires = self.clock.seconds() + seconds(lifetime);
        let grant = Grant { principal: principal.to_owned(), expires, scoped };
        self.state().tokens.insert(token.clone(), grant);
        token
    }

    fn lifetime(&self) -> Duration {
        self.state().token_lifetime
    }

    /// `POST /token`: the JWT bearer grant (RFC 7523) of a service account.
    pub(super) fn oauth_token(&self, call: &Call) -> Response {
        let grant_type = call.form("grant_type").unwrap_or_default();
        if grant_type != "urn:ietf:params:oauth:grant-type:jwt-bearer" {
            return oauth_error("unsupported_grant_type", &format!("Invalid grant_type: {grant_type}"));
        }
        let assertion = call.form("assertion").unwrap_or_default();
        let Some((email, claims)) = self.account_token(&assertion) else {
            return oauth_error("invalid_grant", "Invalid JWT Signature.");
        };
        if claims["iss"] != email {
            return oauth_error("invalid_grant", "Invalid grant: account not found");
        }
        if !has_audience(&claims, &[&format!("{}/token", self.url), TOKEN_AUDIENCE]) {
            return oauth_error("invalid_grant", "Invalid JWT: Failed audience check.");
        }
        if self.timely(&claims).is_none() {
            let message = "Invalid JWT: Token must be a short-lived token (60 minutes) and in a reasonable timeframe. \
                           Check your iat and exp values in the JWT claim.";
            return oauth_error("invalid_grant", message);
        }
        let Some(scopes) = claims["scope"].as_str() else {
            return oauth_error("invalid_scope", "Invalid OAuth scope or ID token audience provided.");
        };
        let lifetime = self.lifetime();
        let token = self.grant(&email, lifetime, Scoped::of(scopes));
        let body = json!({ "access_token": token, "expires_in": lifetime.as_secs(), "token_type": "Bearer" });
        requests::answer(200, &body)
    }

    /// `POST /v1/token`: token exchange (RFC 8693) for a workload.
    pub(super) fn sts_token(&self, call: &Call) -> Response {
        let field = |name: &str| call.form(name).unwrap_or_default();
        if field("grant_type") != "urn:ietf:params:oauth:grant-type:token-exchange" {
            return oauth_error("unsupported_grant_type", "Invalid grant_type.");
        }
        if field("requested_token_type") != "urn:ietf:params:oauth:token-type:access_token" {
            return oauth_error("invalid_request", "Invalid value for \"requested_token_type\".");
        }
        let kinds = ["urn:ietf:params:oauth:token-type:jwt", "urn:ietf:params:oauth:token-type:id_token"];
        if !kinds.contains(&field("subject_token_type").as_str()) {
            return oauth_error("invalid_request", "Invalid value for \"subject_token_type\".");
        }
        let audience = field("audience");
        let exchanged = {
            let state = self.state();
            let Some(provider) = state.providers.get(&audience) else {
                return oauth_error("invalid_request", "Invalid value for \"audience\".");
            };
            self.workload(provider, &audience, &field("subject_token"))
        };
        let principal = match exchanged {
            Ok(principal) => principal,
            Err(message) => return oauth_error("invalid_grant", message),
        };
        let lifetime = self.lifetime();
        let body = json!({
            "access_token": self.grant(&principal, lifetime, Scoped::of(&field("scope"))),
            "issued_token_type": "urn:ietf:params:oauth:token-type:access_token",
            "token_type": "Bearer",
            "expires_in": lifetime.as_secs(),
        });
        requests::answer(200, &body)
    }

    /// The principal that a workload's token stands for, or why it does not.
    fn workload(&self, provider: &Provider, audience: &str, token: &str) -> Result<String, &'static str> {
        let claims =
            provider.key.verify(token).ok_or("Error connecting to the given credential's issuer.")?;
        if claims["iss"] != provider.issuer {
            return Err("The issuer in ID Token does not match the expected ones.");
        }
        // Without a list of its own a provider takes its resource name, with or without `https:`.
        if !has_audience(&claims, &[audience, &format!("https:{audience}")]) {
            return Err("The audience in ID Token does not match the expected audience.");
        }
        if claims["exp"].as_i64().is_none_or(|expires| expires <= self.clock.seconds()) {
            return Err("ID Token is stale to sign-in.");
        }
        let subject = claims["sub"].as_str().ok_or("The mapped attribute google.subject is required.")?;
        Ok(format!("principal:{}/subject/{subject}", pool(&provider.pool)))
    }

    /// `projects.serviceAccounts.generateAccessToken`
    pub(super) fn generate_access_token(&self, call: &Call) -> Response {
        match self.impersonate(call) {
            Ok(body) => requests::answer(200, &body),
            Err(refusal) => refusal.into(),
        }
    }

    fn impersonate(&self, call: &Call) -> Result<Value, Refusal> {
        let principal = self.authenticate(call)?;
        let email = call.version().to_owned();
        let body = call.json()?;
        let scopes: Option<Vec<&str>> =
            body["scope"].as_array().and_then(|scopes| scopes.iter().map(Value::as_str).collect());
        let Some(scopes) = scopes.filter(|scopes| !scopes.is_empty()) else {
            return Err(Refusal::invalid("Request contains an invalid argument."));
        };
        let state = self.state();
        if !state.impersonators.contains(&(principal, email.clone())) || !state.accounts.contains_key(&email)
        {
            let message =
                "Permission 'iam.serviceAccounts.getAccessToken' denied on resource (or it may not exist).";
            return Err(Refusal::denied(message));
        }
        let longest = state.token_lifetime;
        drop(state);
        let lifetime = match body["lifetime"].as_str() {
            None => longest,
            Some(text) => {
                let asked = text.strip_suffix('s').and_then(|seconds| seconds.parse().ok());
                let asked = asked.filter(|seconds| (1..=3600).contains(seconds));
                let asked = asked.ok_or_else(|| Refusal::invalid("Request contains an invalid argument."))?;
                Duration::from_secs(asked).min(longest)
            }
        };
        let token = self.grant(&email, lifetime, Scoped::of(&scopes.join(" ")));
        let expires = self.clock.now() + lifetime;
        Ok(json!({ "accessToken": token, "expireTime": format!("{expires:.0}") }))
    }

    /// The metadata server of a virtual machine.
    pub(super) fn metadata(&self, call: &Call) -> Response {
        let mut answer = self.metadata_value(call);
        let headers = answer.headers_mut();
        headers.insert("Metadata-Flavor", HeaderValue::from_static("Google"));
        headers.insert("Server", HeaderValue::from_static("Metadata Server for VM"));
        answer
    }

    fn metadata_value(&self, call: &Call) -> Response {
        let path: Vec<&str> = call.segments.iter().map(String::as_str).collect();
        // The root may be asked by anybody: libraries look there whether this is a machine of Google's.
        if path == [""] {
            return text(StatusCode::OK, "computeMetadata/\n");
        }
        // A browser or a proxy that was talked into asking has no such header, or has the other one.
        if call.header("X-Forwarded-For").is_some() || call.header("Metadata-Flavor") != Some("Google") {
            return html(StatusCode::FORBIDDEN, "Missing Metadata-Flavor:Google header.");
        }
        let account = default_account();
        match path[2..] {
            ["project", "project-id"] => text(StatusCode::OK, PROJECT),
            ["project", "numeric-project-id"] => text(StatusCode::OK, PROJECT_NUMBER),
            ["universe", "universe-domain"] => text(StatusCode::OK, "googleapis.com"),
            ["instance", "service-accounts", name, value]
                if (name == "default" || name == account) && !self.state().is_detached =>
            {
                self.account_value(call, &account, value)
            }
            _ => html(StatusCode::NOT_FOUND, "The requested URL was not found on this server."),
        }
    }

    fn account_value(&self, call: &Call, account: &str, value: &str) -> Response {
        match (call.operation, value) {
            (Operation::MetadataToken, _) => {
                let lifetime = self.lifetime();
                let token = self.grant(account, lifetime, Scoped::of(call.query("scopes").unwrap_or(SCOPE)));
                let body = json!({ "access_token": token, "expires_in": lifetime.as_secs(), "token_type": "Bearer" });
                requests::answer(200, &body)
            }
            (Operation::MetadataIdentity, _) => match call.query("audience") {
                Some(audience) => {
                    text(StatusCode::OK, &self.identity(account, audience, call.query("format")))
                }
                None => html(StatusCode::BAD_REQUEST, "non-empty audience parameter required"),
            },
            (_, "") if call.query("recursive") == Some("true") => {
                let body = json!({ "aliases": ["default"], "email": account, "scopes": [SCOPE] });
                requests::answer(200, &body)
            }
            (_, "") => text(StatusCode::OK, "aliases\nemail\nidentity\nscopes\ntoken\n"),
            (_, "email") => text(StatusCode::OK, account),
            (_, "scopes") => text(StatusCode::OK, &format!("{SCOPE}\n")),
            _ => html(StatusCode::NOT_FOUND, "The requested URL was not found on this server."),
        }
    }

    fn identity(&self, account: &str, audience: &str, format: Option<&str>) -> String {
        let (now, lifetime) = (self.clock.seconds(), seconds(self.lifetime()));
        let unique_id =
            self.state().accounts.get(account).map(|account| account.unique_id.clone()).unwrap_or_default();
        let mut claims = json!({
            "iss": "https://accounts.google.com",
            "aud": audience,
            "azp": unique_id,
            "sub": unique_id,
            "email": account,
            "email_verified": true,
            "iat": now,
            "exp": now + lifetime,
        });
        if format == Some("full") {
            claims["google"] = json!({ "compute_engine": {
                "project_id": PROJECT,
                "project_number": PROJECT_NUMBER.parse::<u64>().unwrap_or_default(),
                "zone": "europe-west1-b",
                "instance_id": "5127894412063841902",
                "instance_name": "node-1",
                "instance_creation_timestamp": now - 86_400,
            } });
        }
        self.google.sign(&claims)
    }
}

/// A refusal as OAuth writes it (RFC 6749, section 5.2).
fn oauth_error(error: &str, description: &str) -> Response {
    requests::answer(400, &json!({ "error": error, "error_description": description }))
}

fn text(status: StatusCode, body: &str) -> Response {
    requests::typed(status, "application/text", Body::from(body.to_owned()))
}

fn html(status: StatusCode, body: &str) -> Response {
    requests::typed(status, "text/html; charset=UTF-8", Body::from(format!("<p>{body}</p>\n")))
}
