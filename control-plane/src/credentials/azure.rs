//! Tokens of Microsoft Entra ID for Azure Key Vault.
//!
//! Sources: "OAuth 2.0 client credentials flow on the Microsoft identity platform", "Microsoft identity platform
//! application authentication certificate credentials" (PS256 and `x5t#S256`) and "Microsoft Entra authentication and
//! authorization error codes".

use std::borrow::Cow;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::{HeaderMap, Method};
use jsonwebtoken::{Algorithm, Header};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use scaivault_backends::Egress;
use scaivault_backends::http::{Body, Http};
use scaivault_domain::backend::{AzureCloud, AzureLogin, AzureMethod, AzureTarget, Provider, Tls};
use scaivault_domain::secret::SecretValue;
use scaivault_domain::time::{Clock as _, Timestamp};
use scaivault_domain::{Error, Reason};
use scaivault_telemetry::SystemClock;
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::bearer::{self, MAX_ANSWER, RsaKey};
use super::own::OwnIdentities;
use super::{Issued, unusable};

const JWT_BEARER: &str = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer";
/// How long an assertion can be used, in seconds; the documentation asks for 5 to 10 minutes at most.
const ASSERTION_LIFE: i64 = 300;

/// Who logs in, and with what.
pub(crate) struct Credential {
    tenant_id: String,
    client_id: String,
    proof: Proof,
}

enum Proof {
    Secret(SecretString),
    Certificate {
        /// The certificate's SHA-256, as a JWT's header has it.
        thumbprint: String,
        key: Box<RsaKey>,
    },
}

#[derive(Deserialize)]
struct Fields {
    tenant_id: Option<String>,
    client_id: Option<String>,
    client_secret: Option<SecretString>,
    certificate_pem: Option<String>,
    private_key_pem: Option<SecretString>,
}

impl Credential {
    /// Reads the stored secret.
    ///
    /// # Errors
    /// `credential_unusable`, naming the key.
    pub(crate) fn parse(
        provider: &Provider,
        method: &AzureMethod,
        value: &SecretValue,
    ) -> Result<Self, Error> {
        let wrong = |name: &str, what: &str| unusable(provider, format!("`{name}` of the credential {what}"));
        let missing = |name: &str, needed: &'static str| {
            unusable(provider, format!("the credential has no `{name}`")).next(needed)
        };
        let fields: Fields = serde_json::from_slice(value.expose())
            .map_err(|_| unusable(provider, "the credential is no JSON object of strings"))?;
        let needed = match method {
            AzureMethod::Certificate { .. } => {
                "store it with `tenant_id`, `client_id`, `certificate_pem` and `private_key_pem`"
            }
            _ => "store it with `tenant_id`, `client_id` and `client_secret`",
        };
        let tenant_id = fields.tenant_id.ok_or_else(|| missing("tenant_id", needed))?;
        check_tenant(&tenant_id).map_err(|what| wrong("tenant_id", what))?;
        let client_id = fields.client_id.ok_or_else(|| missing("client_id", needed))?;
        if !is_id(&client_id, b"-") {
            return Err(wrong("client_id", "is no application (client) id"));
        }
        let proof = match method {
            AzureMethod::Certificate { .. } => {
                let certificate = fields.certificate_pem.ok_or_else(|| missing("certificate_pem", needed))?;
                let key = fields.private_key_pem.ok_or_else(|| missing("private_key_pem", needed))?;
                let key =
                    RsaKey::parse(key.expose_secret()).map_err(|what| wrong("private_key_pem", what))?;
                let thumbprint = thumbprint(&certificate, &key).map_err(|(name, what)| wrong(name, what))?;
                Proof::Certificate { thumbprint, key: Box::new(key) }
            }
            AzureMethod::ClientSecret { .. } | AzureMethod::ManagedIdentity { .. } => {
                let secret = fields.client_secret.ok_or_else(|| missing("client_secret", needed))?;
                let text = secret.expose_secret();
                if text.is_empty() || text.trim() != text {
                    return Err(wrong("client_secret", "is empty, or begins or ends with white space"));
                }
                Proof::Secret(secret)
            }
        };
        Ok(Credential { tenant_id, client_id, proof })
    }
}

fn is_id(text: &str, others: &[u8]) -> bool {
    (1..=255).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || others.contains(&b))
        // Dots alone would be removed from the URL.
        && text.bytes().any(|b| b.is_ascii_alphanumeric())
}

fn check_tenant(text: &str) -> Result<(), &'static str> {
    if !is_id(text, b"-.") {
        return Err("is no directory (tenant) id or domain");
    }
    // Those are no tenants; an application of its own right belongs to one.
    if ["common", "organizations", "consumers"].iter().any(|name| text.eq_ignore_ascii_case(name)) {
        return Err("names no single tenant; use the directory (tenant) id");
    }
    Ok(())
}

/// The thumbprint of the certificate that belongs to `key`, or the field that is wrong and how.
fn thumbprint(pem: &str, key: &RsaKey) -> Result<String, (&'static str, &'static str)> {
    let no_certificate = ("certificate_pem", "is no certificate in PEM");
    let mut others = false;
    for der in CertificateDer::pem_slice_iter(pem.as_bytes()) {
        let der = der.map_err(|_| no_certificate)?;
        let (_, certificate) = X509Certificate::from_der(&der).map_err(|_| no_certificate)?;
        if certificate.public_key().raw == key.public() {
            return Ok(URL_SAFE_NO_PAD.encode(Sha256::digest(&der)));
        }
        others = true;
    }
    Err(if others { ("private_key_pem", "does not belong to `certificate_pem`") } else { no_certificate })
}

/// Logs in with an application's credential.
///
/// # Errors
/// What Entra ID refused, and what to do about it.
pub(crate) async fn log_in(
    target: &AzureTarget,
    login: &AzureLogin,
    credential: &Credential,
    egress: &Egress,
) -> Result<Issued, Error> {
    let authority = login.authority();
    let path = format!("/{}/oauth2/v2.0/token", credential.tenant_id);
    let scope = format!("{}/.default", login.resource().trim_end_matches('/'));
    let mut form = vec![
        ("grant_type", "client_credentials"),
        ("client_id", credential.client_id.as_str()),
        ("scope", scope.as_str()),
    ];
    let assertion;
    match &credential.proof {
        Proof::Secret(secret) => form.push(("client_secret", secret.expose_secret())),
        Proof::Certificate { thumbprint, key } => {
            assertion = sign(
                thumbprint,
                key,
                &credential.client_id,
                &format!("{authority}{path}"),
                SystemClock.now(),
            )?;
            form.push(("client_assertion_type", JWT_BEARER));
            form.push(("client_assertion", assertion.expose_secret()));
        }
    }
    let http = Http::new(&authority, &tls(target, login), HeaderMap::new(), egress).map_err(bearer::fault)?;
    let answer = http.send(Method::POST, &path, HeaderMap::new(), Some(Body::Form(&form)), MAX_ANSWER).await;
    let answer = answer.map_err(bearer::fault)?;
    if answer.status.is_success() {
        bearer::token_in(&answer.body)
    } else {
        Err(refused(&answer.body, &credential.proof))
    }
}

/// Gets a token of one of our managed identities.
///
/// # Errors
/// If there is none, or the metadata service does not answer.
pub(crate) async fn log_in_as_ourselves(login: &AzureLogin, own: &OwnIdentities) -> Result<Issued, Error> {
    let client_id = match &login.method {
        AzureMethod::ManagedIdentity { client_id } => client_id.as_deref(),
        AzureMethod::ClientSecret { .. } | AzureMethod::Certificate { .. } => None,
    };
    own.azure.token(login.resource(), client_id).await
}

/// How the connection to the authority is secured: as that to the vault if the configuration names the authority. That
/// of a cloud is always verified; it has public certificates if the vault's, at an address of its own, are others.
fn tls<'a>(target: &'a AzureTarget, login: &AzureLogin) -> Cow<'a, Tls> {
    match login.authority {
        Some(_) => Cow::Borrowed(&target.tls),
        None if AzureCloud::has_vault(target.vault.host()) => {
            Cow::Owned(Tls { verify: true, ..target.tls.clone() })
        }
        None => Cow::Owned(Tls::default()),
    }
}

#[derive(Serialize)]
struct Claims<'a> {
    aud: &'a str,
    iss: &'a str,
    sub: &'a str,
    jti: String,
    nbf: i64,
    iat: i64,
    exp: i64,
}

fn sign(
    thumbprint: &str,
    key: &RsaKey,
    client_id: &str,
    token_endpoint: &str,
    now: Timestamp,
) -> Result<SecretString, Error> {
    let header = Header { x5t_s256: Some(thumbprint.to_owned()), ..Header::new(Algorithm::PS256) };
    let now = now.as_millis() / 1000;
    let claims = Claims {
        aud: token_endpoint,
        iss: client_id,
        sub: client_id,
        jti: guid(rand::random()),
        nbf: now,
        iat: now,
        exp: now + ASSERTION_LIFE,
    };
    key.sign(&header, &claims)
}

/// The documentation has a GUID for a JWT's id.
fn guid(random: u128) -> String {
    let mut text = format!("{random:032x}");
    for at in [20, 16, 12, 8] {
        text.insert(at, '-');
    }
    text
}

/// What a refusal means. Its text names the tenant, the application and more, so it is not shown; the numbers may change,
/// says their documentation, so whatever is not known is told by its OAuth class.
fn refused(body: &[u8], proof: &Proof) -> Error {
    #[derive(Deserialize)]
    struct Refusal {
        error: String,
        #[serde(default)]
        error_codes: Vec<u64>,
    }

    let Ok(refusal) = serde_json::from_slice::<Refusal>(body) else {
        return bearer::invalid_answer(
            "the token service gave an answer that is neither a token nor a refusal",
        );
    };
    let failed = |message: &'static str, next: &'static str| {
        Error::new(Reason::BackendLoginFailed, message).next(next)
    };
    let unknown_application = || {
        failed(
            "Entra ID knows no application with the credential's `client_id` in the tenant `tenant_id`",
            "check both in the stored credential, and that the application has a service principal in the tenant",
        )
    };
    let unknown_tenant = || {
        failed(
            "Entra ID knows no tenant with the credential's `tenant_id`",
            "check it in the stored credential, and that the vault is in the same cloud",
        )
    };
    let resource = || {
        failed(
            "Entra ID gives the application no token for the vault's resource",
            "check `resource`, and that the vault belongs to the tenant's cloud",
        )
    };
    let proof_refused = || match proof {
        Proof::Secret(_) => failed(
            "Entra ID does not take the credential's `client_secret`",
            "store the value of a current client secret of the application, not its id",
        ),
        Proof::Certificate { .. } => failed(
            "Entra ID does not take the credential's certificate",
            "upload the certificate to the application, or store one that is there and has not expired",
        ),
    };
    match refusal.error_codes.first() {
        Some(7_000_222) => failed(
            "the credential's `client_secret` has expired",
            "add a new client secret to the application and store its value",
        ),
        Some(700_024) => failed(
            "Entra ID takes our assertion for one of another time",
            "ask the operator to set the control plane's clock",
        ),
        Some(700_023) => failed(
            "Entra ID takes our assertion for one that is meant for another authority",
            "check `authority` and the credential's `tenant_id`",
        ),
        Some(700_016 | 7_000_229 | 700_021) => unknown_application(),
        Some(7_000_112) => failed(
            "the application with the credential's `client_id` is disabled",
            "enable it in Entra ID, or store the credential of another one",
        ),
        Some(90_002 | 900_021 | 900_023) => unknown_tenant(),
        Some(53_000..=53_999) => failed(
            "a Conditional Access policy of the tenant forbids the login",
            "let the policy allow the application from where the control plane runs",
        ),
        Some(500_011 | 650_057 | 70_011 | 1_002_012) => resource(),
        Some(90_033 | 90_012) => {
            Error::new(Reason::BackendUnreachable, "Entra ID says that it has a fault which will pass")
        }
        _ => match refusal.error.as_str() {
            "invalid_client" | "invalid_grant" => proof_refused(),
            "unauthorized_client" => unknown_application(),
            "invalid_resource" | "invalid_scope" => resource(),
            "temporarily_unavailable" | "server_error" => Error::new(
                Reason::BackendUnreachable,
                "the token service says that it has a fault which will pass",
            ),
            _ => failed(
                "Entra ID refuses the login",
                "check the stored credential; the tenant's sign-in logs tell why it was refused",
            ),
        },
    }
}

#[cfg(test)]
mod tests {
    use jsonwebtoken::{DecodingKey, Validation, decode};
    use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_RSA_SHA256};
    use scaivault_domain::backend::Endpoint;
    use scaivault_domain::path::SecretPath;
    use serde_json::{Value, json};

    use super::*;

    fn provider(method: AzureMethod) -> Provider {
        let vault = Endpoint::parse("vault_url", "https://acme.vault.azure.net").unwrap();
        let login = AzureLogin { method, authority: None, resource: None, cloud: AzureCloud::Public };
        Provider::AzureKeyVault { target: AzureTarget { vault, tls: Tls::default() }, login }
    }

    fn parse(method: AzureMethod, stored: &Value) -> Result<Credential, Error> {
        let value = SecretValue::new(stored.to_string().into_bytes());
        Credential::parse(&provider(method.clone()), &method, &value)
    }

    fn with_certificate(stored: &Value) -> Result<Credential, Error> {
        parse(AzureMethod::Certificate { credentials: SecretPath::parse("azure").unwrap() }, stored)
    }

    fn with_secret(stored: &Value) -> Result<Credential, Error> {
        parse(AzureMethod::ClientSecret { credentials: SecretPath::parse("azure").unwrap() }, stored)
    }

    fn certificate() -> (String, String) {
        let key = KeyPair::generate_for(&PKCS_RSA_SHA256).unwrap();
        let certificate = CertificateParams::new(Vec::new()).unwrap().self_signed(&key).unwrap();
        (certificate.pem(), key.serialize_pem())
    }

    #[test]
    fn a_credential_that_cannot_work_is_refused_by_the_name_of_its_key() {
        let (certificate, key) = certificate();
        let (other, _) = self::certificate();
        let ecdsa = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap().serialize_pem();
        let good = json!({
            "tenant_id": "acme.example", "client_id": "0-1", "client_secret": "~s", "certificate_pem": certificate,
            "private_key_pem": key,
        });
        assert!(with_certificate(&good).is_ok());
        assert!(with_secret(&good).is_ok());
        let chain = format!("{other}{certificate}");
        assert!(with_certificate(&json!({ "certificate_pem": chain }).over(&good)).is_ok());
        let cases = [
            ("tenant_id", json!("a/b")),
            ("tenant_id", json!("..")),
            ("tenant_id", json!("a?b")),
            ("tenant_id", json!("Common")),
            ("tenant_id", Value::Null),
            ("client_id", json!("a&b")),
            ("client_id", Value::Null),
            ("certificate_pem", json!("no PEM")),
            ("certificate_pem", json!(key)),
            ("certificate_pem", Value::Null),
            ("private_key_pem", json!(certificate)),
            ("private_key_pem", json!(ecdsa)),
            ("private_key_pem", json!(self::certificate().1)),
            ("private_key_pem", Value::Null),
        ];
        for (name, value) in cases {
            let error = with_certificate(&json!({ name: value }).over(&good)).err().unwrap();
            assert_eq!(error.reason, Reason::CredentialUnusable, "{name}");
            assert_eq!(error.violations[0].pointer, "/config/credentials_path");
            assert!(error.message.contains(&format!("`{name}`")), "{error}");
            assert!(!error.message.contains("BEGIN"), "{error}");
        }
        for secret in [json!(""), json!("s\n"), Value::Null] {
            let error = with_secret(&json!({ "client_secret": secret }).over(&good)).err().unwrap();
            assert!(error.message.contains("`client_secret`"), "{error}");
        }
    }

    trait Over {
        fn over(self, others: &Value) -> Value;
    }

    impl Over for Value {
        fn over(self, others: &Value) -> Value {
            let mut merged = others.clone();
            merged.as_object_mut().unwrap().extend(self.as_object().unwrap().clone());
            merged
        }
    }

    #[test]
    fn an_assertion_is_what_entra_documents() {
        let (pem, key) = certificate();
        let der = CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
        let (_, parsed) = X509Certificate::from_der(&der).unwrap();
        let public = DecodingKey::from_rsa_der(&parsed.public_key().subject_public_key.data);
        let key = RsaKey::parse(&key).unwrap();
        let audience = "https://login.example/t/oauth2/v2.0/token";
        let token = sign(&thumbprint(&pem, &key).unwrap(), &key, "app", audience, SystemClock.now()).unwrap();
        let mut validation = Validation::new(Algorithm::PS256);
        validation.set_audience(&[audience]);
        let found = decode::<Value>(token.expose_secret(), &public, &validation).unwrap();
        assert_eq!(found.header.x5t_s256.unwrap(), URL_SAFE_NO_PAD.encode(Sha256::digest(&der)));
        assert_eq!((&found.claims["iss"], &found.claims["sub"]), (&json!("app"), &json!("app")));
        let life = found.claims["exp"].as_u64().unwrap() - found.claims["nbf"].as_u64().unwrap();
        assert!(life <= 600, "{life}");
        assert_eq!(found.claims["jti"].as_str().unwrap().len(), 36);
    }

    #[test]
    fn the_authority_of_a_cloud_is_always_verified() {
        let at = |vault, authority: Option<&str>| {
            let parse = |url| Endpoint::parse("", url).unwrap();
            let method = AzureMethod::ManagedIdentity { client_id: None };
            let cloud = AzureCloud::Public;
            let login = AzureLogin { method, authority: authority.map(parse), resource: None, cloud };
            let lax = Tls { ca_cert: Some("own".into()), verify: false };
            let found = tls(&AzureTarget { vault: parse(vault), tls: lax }, &login).into_owned();
            (found.verify, found.ca_cert.is_some())
        };
        assert_eq!(at("https://acme.vault.azure.net", None), (true, true));
        assert_eq!(at("https://vault.internal", None), (true, false));
        assert_eq!(at("https://vault.internal", Some("https://login.internal")), (false, true));
    }

    #[test]
    fn a_refusal_tells_what_to_do_and_nothing_of_its_text() {
        let told = |error: &str, code: u64| {
            let body =
                json!({ "error": error, "error_codes": [code], "error_description": "AADSTS: app 'canary'" });
            refused(body.to_string().as_bytes(), &Proof::Secret("s".into()))
        };
        for (error, code, part) in [
            ("invalid_client", 7_000_215, "does not take the credential's `client_secret`"),
            ("invalid_client", 7_000_222, "has expired"),
            ("invalid_client", 4_711, "does not take"),
            ("unauthorized_client", 700_016, "no application"),
            ("invalid_request", 90_002, "no tenant"),
            ("invalid_resource", 500_011, "resource"),
            ("canary", 4_711, "refuses the login"),
        ] {
            let shown = told(error, code);
            assert_eq!(shown.reason, Reason::BackendLoginFailed);
            assert!(shown.message.contains(part), "{shown}");
            assert!(!format!("{shown:?}").contains("canary"), "{shown:?}");
            assert!(shown.next_step.is_some());
        }
        assert_eq!(told("temporarily_unavailable", 90_033).reason, Reason::BackendUnreachable);
    }
}
