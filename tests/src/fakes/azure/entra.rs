//! Who may have tokens and what they are good for: Entra ID and managed identities.
//!
//! Written from Microsoft's "client credentials grant flow", "application authentication certificate credentials",
//! "error codes" and "how to use managed identities on an Azure VM"; error bodies are those of recordings.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use aws_lc_rs::digest;
use aws_lc_rs::signature::{
    RSA_PKCS1_2048_8192_SHA256, RSA_PSS_2048_8192_SHA256, RsaParameters, UnparsedPublicKey,
};
use axum::http::StatusCode;
use base64::Engine as _;
use base64::alphabet;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use scaivault_domain::time::Timestamp;
use serde::Deserialize;
use serde_json::{Value, json};
use x509_parser::pem::parse_x509_pem;

use super::reply::{Asked, Reply};

/// What tokens of the vault are issued for.
pub(super) const VAULT: &str = "https://vault.azure.net";
/// Another service, so that a token can be valid and still not for the vault.
const MANAGEMENT: &str = "https://management.azure.com";
const JWT_BEARER: &str = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer";
/// How far clocks may be apart, in seconds.
const SKEW: f64 = 300.0;
/// Entra's tokens last about an hour.
const LIFETIME: Duration = Duration::from_secs(3599);

/// Something that a role lets its holder do with secrets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Right {
    /// Reading values.
    Get,
    /// Listing secrets, versions and deleted secrets, and reading the latter's properties.
    List,
    /// New versions, and other properties of old ones.
    Set,
    /// Deleting softly.
    Delete,
    /// Bringing deleted secrets back.
    Recover,
}

/// A managed identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Identity {
    /// The machine's own, which a request without `client_id` gets.
    System,
    /// One that is assigned to the machine, which a request names.
    User,
}

/// What an application logs in with.
#[derive(Clone)]
pub struct ClientSecret {
    /// The application's id.
    pub client_id: String,
    /// The secret.
    pub client_secret: String,
}

/// Everybody, and every token.
pub(super) struct Directory {
    principals: BTreeMap<String, Principal>,
    system_identity: Option<String>,
    user_identities: BTreeSet<String>,
    tokens: BTreeMap<String, Token>,
    pub(super) lifetime: Duration,
}

struct Principal {
    object_id: String,
    rights: BTreeSet<Right>,
    secret: Option<String>,
    certificates: Vec<Certificate>,
}

struct Token {
    client_id: String,
    audience: String,
    expires: i64,
}

/// What is known of a registered certificate.
struct Certificate {
    sha1: Vec<u8>,
    sha256: Vec<u8>,
    /// PKCS #1, as the certificate has it.
    public_key: Vec<u8>,
    not_before: i64,
    not_after: i64,
}

impl Certificate {
    fn parse(pem: &str) -> Result<Certificate> {
        let (_, pem) = parse_x509_pem(pem.as_bytes()).context("no PEM")?;
        let parsed = pem.parse_x509().context("no certificate")?;
        ensure!(
            parsed.public_key().parsed()?.key_size() >= 2048,
            "Entra takes RSA keys of 2048 bits or more"
        );
        Ok(Certificate {
            sha1: digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, &pem.contents).as_ref().to_vec(),
            sha256: digest::digest(&digest::SHA256, &pem.contents).as_ref().to_vec(),
            public_key: parsed.public_key().subject_public_key.data.to_vec(),
            not_before: parsed.validity().not_before.timestamp(),
            not_after: parsed.validity().not_after.timestamp(),
        })
    }
}

/// Why a token is no good.
pub(super) enum BadToken {
    Missing,
    Unknown,
    Expired,
    Audience(String),
}

impl BadToken {
    /// What the vault says of it.
    pub(super) fn message(&self) -> String {
        match self {
            BadToken::Missing => "AKV10000: Request is missing a Bearer or PoP token.".to_owned(),
            BadToken::Unknown => {
                "AKV10046: Unable to resolve the key used for signature validation.".to_owned()
            }
            BadToken::Expired => "[TokenExpired] Error validating token: 'S2S12086'.".to_owned(),
            BadToken::Audience(found) => {
                format!("AKV10022: Invalid audience. Expected {VAULT}, found: {found}.")
            }
        }
    }
}

/// Whom a valid token belongs to.
pub(super) struct Caller<'a> {
    client_id: &'a str,
    principal: &'a Principal,
}

impl Caller<'_> {
    pub(super) fn may(&self, right: Right) -> bool {
        self.principal.rights.contains(&right)
    }

    /// As refusals name it.
    pub(super) fn describe(&self, tenant: &str) -> String {
        let (client_id, object_id) = (self.client_id, &self.principal.object_id);
        format!("appid={client_id};oid={object_id};iss=https://sts.windows.net/{tenant}/")
    }
}

/// Why no token is issued.
struct Refusal {
    status: StatusCode,
    error: &'static str,
    code: u32,
    text: String,
}

impl Refusal {
    fn bad_request(error: &'static str, code: u32, text: impl Into<String>) -> Refusal {
        Refusal { status: StatusCode::BAD_REQUEST, error, code, text: text.into() }
    }

    fn invalid_client(code: u32, text: impl Into<String>) -> Refusal {
        Refusal { status: StatusCode::UNAUTHORIZED, error: "invalid_client", code, text: text.into() }
    }

    /// The assertion's signature, or the key that it names, is not what was registered.
    fn signature(reason: &str) -> Refusal {
        let text = format!("Client assertion contains an invalid signature. [Reason - {reason}]");
        Refusal::invalid_client(700027, text)
    }

    fn malformed() -> Refusal {
        Refusal::invalid_client(50027, "JWT token is invalid or malformed.")
    }

    fn into_reply(self, now: i64) -> Reply {
        let (trace, correlation) = (guid(), guid());
        let written = Timestamp::from_millis(now * 1000).to_string();
        let time = format!("{}Z", written[..19].replace('T', " "));
        let (code, text) = (self.code, self.text);
        let description =
            format!("AADSTS{code}: {text} Trace ID: {trace} Correlation ID: {correlation} Timestamp: {time}");
        let body = json!({
            "error": self.error,
            "error_description": description,
            "error_codes": [code],
            "timestamp": time,
            "trace_id": trace,
            "correlation_id": correlation,
            "error_uri": format!("https://login.microsoftonline.com/error?code={code}"),
        });
        Reply::json(self.status, body)
    }
}

impl Default for Directory {
    fn default() -> Self {
        Directory {
            principals: BTreeMap::new(),
            system_identity: None,
            user_identities: BTreeSet::new(),
            tokens: BTreeMap::new(),
            lifetime: LIFETIME,
        }
    }
}

impl Directory {
    pub(super) fn register(&mut self, rights: &[Right]) -> String {
        let client_id = guid();
        let principal = Principal {
            object_id: guid(),
            rights: rights.iter().copied().collect(),
            secret: None,
            certificates: Vec::new(),
        };
        self.principals.insert(client_id.clone(), principal);
        client_id
    }

    pub(super) fn assign(&mut self, identity: Identity, client_id: &str) {
        match identity {
            Identity::System => self.system_identity = Some(client_id.to_owned()),
            Identity::User => drop(self.user_identities.insert(client_id.to_owned())),
        }
    }

    pub(super) fn unassign(&mut self, client_id: &str) {
        self.user_identities.remove(client_id);
        self.system_identity.take_if(|assigned| assigned == client_id);
    }

    pub(super) fn rotate_secret(&mut self, client_id: &str) -> String {
        let secret = random_text(30);
        self.principal(client_id).secret = Some(secret.clone());
        secret
    }

    pub(super) fn set_rights(&mut self, client_id: &str, rights: &[Right]) {
        self.principal(client_id).rights = rights.iter().copied().collect();
    }

    pub(super) fn add_certificate(&mut self, client_id: &str, pem: &str) -> Result<()> {
        let certificate = Certificate::parse(pem)?;
        self.principal(client_id).certificates.push(certificate);
        Ok(())
    }

    pub(super) fn remove_certificates(&mut self, client_id: &str) {
        self.principal(client_id).certificates.clear();
    }

    pub(super) fn revoke_tokens(&mut self) {
        self.tokens.clear();
    }

    fn principal(&mut self, client_id: &str) -> &mut Principal {
        self.principals.get_mut(client_id).expect("the test names an application that it registered")
    }

    /// Whose token the request carries, if the vault takes it.
    pub(super) fn caller(&self, asked: &Asked) -> Result<Caller<'_>, BadToken> {
        let header = asked.header("authorization").unwrap_or_default();
        let (scheme, token) = header.split_once(' ').ok_or(BadToken::Missing)?;
        if !scheme.eq_ignore_ascii_case("bearer") || token.is_empty() {
            return Err(BadToken::Missing);
        }
        let token = self.tokens.get(token).ok_or(BadToken::Unknown)?;
        if token.expires <= asked.now {
            return Err(BadToken::Expired);
        }
        if token.audience.trim_end_matches('/') != VAULT {
            return Err(BadToken::Audience(token.audience.clone()));
        }
        let principal = self.principals.get(&token.client_id).ok_or(BadToken::Unknown)?;
        Ok(Caller { client_id: &token.client_id, principal })
    }

    /// `POST /{tenant}/oauth2/v2.0/token`.
    pub(super) fn token(&mut self, asked: &Asked, tenant: &str, our_tenant: &str) -> Reply {
        match self.grant(asked, tenant, our_tenant) {
            Ok(client_id) => {
                let (access_token, lifetime) = self.issue(client_id, VAULT, our_tenant, asked.now);
                Reply::ok(json!({
                    "token_type": "Bearer",
                    "expires_in": lifetime,
                    "ext_expires_in": lifetime,
                    "access_token": access_token,
                }))
            }
            Err(refusal) => refusal.into_reply(asked.now),
        }
    }

    fn grant(&self, asked: &Asked, tenant: &str, our_tenant: &str) -> Result<String, Refusal> {
        let form = Form::parse(asked);
        if !tenant.eq_ignore_ascii_case(our_tenant) {
            let text =
                format!("Tenant '{tenant}' not found. Check to make sure you have the correct tenant ID.");
            return Err(Refusal::bad_request("invalid_request", 90002, text));
        }
        if form.required("grant_type")? != "client_credentials" {
            let text = "The app requested an unsupported grant type.";
            return Err(Refusal::bad_request("unsupported_grant_type", 70003, text));
        }
        let client_id = form.required("client_id")?;
        let principal = self.principals.get(client_id).filter(|_| !self.is_managed(client_id));
        let principal = principal.ok_or_else(|| {
            let text = format!(
                "Application with identifier '{client_id}' was not found in the directory '{our_tenant}'. This can \
                 happen if the application has not been installed by the administrator of the tenant or consented to \
                 by any user in the tenant. You may have sent your authentication request to the wrong tenant."
            );
            Refusal::bad_request("unauthorized_client", 700016, text)
        })?;
        let scope = form.required("scope")?;
        let resource = scope.strip_suffix("/.default").ok_or_else(|| {
            let text = format!(
                "The provided value for scope {scope} is not valid. Client credential flows must have a scope value \
                 with /.default suffixed to the resource identifier (application ID URI)."
            );
            Refusal::bad_request("invalid_scope", 1_002_012, text)
        })?;
        if resource.trim_end_matches('/') != VAULT {
            let text = format!("The resource principal named {resource} was not found in the tenant.");
            return Err(Refusal::bad_request("invalid_resource", 500_011, text));
        }
        match (form.get("client_assertion"), form.get("client_secret")) {
            (Some(assertion), _) => {
                if form.required("client_assertion_type")? != JWT_BEARER {
                    return Err(Refusal::malformed());
                }
                let audiences = [
                    format!("{}/{tenant}/oauth2/v2.0/token", asked.base),
                    format!("{}/{tenant}/v2.0", asked.base),
                ];
                check_assertion(assertion, client_id, &principal.certificates, &audiences, asked.now)?;
            }
            (None, Some(secret)) if principal.secret.as_deref() == Some(secret) => {}
            (None, Some(_)) => {
                let text = format!(
                    "Invalid client secret provided. Ensure the secret being sent in the request is the client secret \
                     value, not the client secret ID, for a secret added to app '{client_id}'."
                );
                return Err(Refusal::invalid_client(7_000_215, text));
            }
            (None, None) => {
                let text = "The request body must contain the following parameter: 'client_assertion' or \
                            'client_secret'.";
                return Err(Refusal::invalid_client(7_000_218, text));
            }
        }
        Ok(client_id.to_owned())
    }

    /// Managed identities have no credentials, so they cannot come here.
    fn is_managed(&self, client_id: &str) -> bool {
        self.system_identity.as_deref() == Some(client_id) || self.user_identities.contains(client_id)
    }

    /// `GET /metadata/identity/oauth2/token`, as the metadata service of a virtual machine answers it.
    pub(super) fn identity_token(&mut self, asked: &Asked, tenant: &str) -> Reply {
        if !asked.header("metadata").is_some_and(|value| value.eq_ignore_ascii_case("true")) {
            return identity_refusal("invalid_request", "Required metadata header not specified");
        }
        if asked.header("x-forwarded-for").is_some() {
            return identity_refusal("invalid_request", "Proxy requests are not allowed");
        }
        if asked.query("api-version") != Some("2018-02-01") {
            let text = "Required query variable 'api-version' is missing or not supported";
            return identity_refusal("invalid_request", text);
        }
        let Some(resource) = asked.query("resource") else {
            return identity_refusal("invalid_request", "Required query variable 'resource' is missing");
        };
        if ![VAULT, MANAGEMENT].contains(&resource.trim_end_matches('/')) {
            let text = "AADSTS500011: The resource principal was not found in the tenant.";
            return identity_refusal("invalid_resource", text);
        }
        let identity = match asked.query("client_id") {
            None => self.system_identity.as_deref(),
            Some(client_id) => Some(client_id).filter(|client_id| self.is_managed(client_id)),
        };
        let Some(client_id) = identity.map(str::to_owned) else {
            return identity_refusal("invalid_request", "Identity not found");
        };
        let (access_token, lifetime) = self.issue(client_id.clone(), resource, tenant, asked.now);
        Reply::ok(json!({
            "access_token": access_token,
            "client_id": client_id,
            // Numbers are texts here.
            "expires_in": lifetime.to_string(),
            "expires_on": (asked.now + lifetime).to_string(),
            "ext_expires_in": lifetime.to_string(),
            "not_before": asked.now.to_string(),
            "resource": resource,
            "token_type": "Bearer",
        }))
    }

    /// A token, and for how many seconds it is valid.
    fn issue(&mut self, client_id: String, audience: &str, tenant: &str, now: i64) -> (String, i64) {
        let lifetime = i64::try_from(self.lifetime.as_secs()).expect("a test has no billion years");
        let expires = now + lifetime;
        let object_id = self.principals.get(&client_id).map(|principal| principal.object_id.as_str());
        // It looks like Entra's, but is known by its text: nobody but the vault may look into it.
        let header = json!({ "typ": "JWT", "alg": "RS256", "kid": "fake" });
        let claims = json!({
            "aud": audience, "iss": format!("https://sts.windows.net/{tenant}/"), "iat": now, "nbf": now,
            "exp": expires, "appid": client_id, "oid": object_id, "sub": object_id, "tid": tenant, "ver": "1.0",
        });
        let part = |value: Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let token = format!("{}.{}.{}", part(header), part(claims), random_text(256));
        let issued = Token { client_id, audience: audience.to_owned(), expires };
        self.tokens.insert(token.clone(), issued);
        (token, lifetime)
    }
}

/// Where the tenant's endpoints are: Microsoft's libraries ask for this first.
pub(super) fn discovery(asked: &Asked, tenant: &str) -> Reply {
    let base = &asked.base;
    Reply::ok(json!({
        "issuer": format!("{base}/{tenant}/v2.0"),
        "authorization_endpoint": format!("{base}/{tenant}/oauth2/v2.0/authorize"),
        "token_endpoint": format!("{base}/{tenant}/oauth2/v2.0/token"),
    }))
}

fn identity_refusal(error: &str, description: &str) -> Reply {
    Reply::json(StatusCode::BAD_REQUEST, json!({ "error": error, "error_description": description }))
}

struct Form(Vec<(String, String)>);

impl Form {
    fn parse(asked: &Asked) -> Form {
        let form = asked
            .header("content-type")
            .is_some_and(|found| found.starts_with("application/x-www-form-urlencoded"));
        let body: &[u8] = if form { &asked.body } else { &[] };
        Form(url::form_urlencoded::parse(body).into_owned().collect())
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    fn required(&self, name: &str) -> Result<&str, Refusal> {
        self.get(name).filter(|value| !value.is_empty()).ok_or_else(|| {
            let text = format!("The request body must contain the following parameter: '{name}'.");
            Refusal::bad_request("invalid_request", 900_144, text)
        })
    }
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    typ: Option<String>,
    x5t: Option<String>,
    #[serde(rename = "x5t#S256")]
    x5t_s256: Option<String>,
}

#[derive(Deserialize)]
struct Claims {
    aud: String,
    iss: String,
    sub: String,
    /// RFC 7519 allows fractions of seconds, and Microsoft's library for Python writes them.
    exp: f64,
    nbf: Option<f64>,
    jti: Option<String>,
}

/// Whether `assertion` proves that its maker has the key of one of `certificates`, now and to us.
fn check_assertion(
    assertion: &str,
    client_id: &str,
    certificates: &[Certificate],
    audiences: &[String],
    now: i64,
) -> Result<(), Refusal> {
    let (signed, signature) = assertion.rsplit_once('.').ok_or_else(Refusal::malformed)?;
    let (header, claims) = signed.split_once('.').ok_or_else(Refusal::malformed)?;
    let header: Header = part(header)?;
    let claims: Claims = part(claims)?;
    let signature = decode(signature).ok_or_else(Refusal::malformed)?;

    if header.typ.as_deref() != Some("JWT") {
        let text = "Invalid JWT header type specified, must be 'JWT' or 'http://openid.net/specs/jwt/1.0'.";
        return Err(Refusal::bad_request("invalid_request", 5_002_727, text));
    }
    let algorithm: &RsaParameters = match header.alg.as_str() {
        "RS256" => &RSA_PKCS1_2048_8192_SHA256,
        "PS256" => &RSA_PSS_2048_8192_SHA256,
        _ => return Err(Refusal::signature("The algorithm is not supported.")),
    };
    let named = |thumbprint: &Option<String>, known: &[u8]| {
        thumbprint.as_ref().is_none_or(|text| decode(text).as_deref() == Some(known))
    };
    let certificate = certificates
        .iter()
        .filter(|_| header.x5t.is_some() || header.x5t_s256.is_some())
        .find(|known| named(&header.x5t, &known.sha1) && named(&header.x5t_s256, &known.sha256))
        .ok_or_else(|| Refusal::signature("The key was not found."))?;
    UnparsedPublicKey::new(algorithm, &certificate.public_key)
        .verify(signed.as_bytes(), &signature)
        .map_err(|_| Refusal::signature("The provided signature value did not match the expected one."))?;
    if !(certificate.not_before..=certificate.not_after).contains(&now) {
        return Err(Refusal::signature("The key used is expired."));
    }

    if claims.iss != client_id || claims.sub != client_id {
        let text = "Client assertion application identifier doesn't match 'client_id' parameter.";
        return Err(Refusal::invalid_client(700_021, text));
    }
    if !audiences.contains(&claims.aud) {
        let text = "Client assertion audience claim does not match Realm issuer.";
        return Err(Refusal::invalid_client(700_023, text));
    }
    #[expect(clippy::cast_precision_loss, reason = "seconds of these millennia are exact")]
    let moment = now as f64;
    if claims.exp + SKEW <= moment || claims.nbf.is_some_and(|begin| begin - SKEW > moment) {
        return Err(Refusal::invalid_client(700_024, "Client assertion is not within its valid time range."));
    }
    // Entra does not remember them, so neither does this.
    if claims.jti.is_none_or(|jti| jti.is_empty()) {
        return Err(Refusal::malformed());
    }
    Ok(())
}

fn part<T: for<'de> Deserialize<'de>>(text: &str) -> Result<T, Refusal> {
    let bytes = decode(text).ok_or_else(Refusal::malformed)?;
    serde_json::from_slice(&bytes).map_err(|_| Refusal::malformed())
}

/// Base64 in either alphabet, padded or not: Microsoft's own libraries write thumbprints both ways, and Entra takes them.
fn decode(text: &str) -> Option<Vec<u8>> {
    const LENIENT: GeneralPurposeConfig =
        GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    const ENGINE: GeneralPurpose = GeneralPurpose::new(&alphabet::URL_SAFE, LENIENT);
    ENGINE.decode(text.replace('+', "-").replace('/', "_")).ok()
}

pub(super) fn guid() -> String {
    let mut text = format!("{:032x}", rand::random::<u128>());
    for at in [20, 16, 12, 8] {
        text.insert(at, '-');
    }
    text
}

fn random_text(bytes: usize) -> String {
    let random: Vec<u8> = std::iter::repeat_with(rand::random).take(bytes).collect();
    URL_SAFE_NO_PAD.encode(random)
}
