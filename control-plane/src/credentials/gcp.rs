//! Tokens for GCP Secret Manager: those that a service account's key signs, and those of our own identity.
//!
//! A token that a key signs for one service is sent in place of an access token, and nobody is called for it. Source:
//! AIP-4111, "Self-signed JWT".

use std::time::Duration;

use jsonwebtoken::{Algorithm, Header};
use scaivault_domain::Error;
use scaivault_domain::backend::Provider;
use scaivault_domain::secret::SecretValue;
use scaivault_domain::time::{Clock as _, Timestamp};
use scaivault_telemetry::SystemClock;
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};

use super::bearer::{self, RsaKey};
use super::{Issued, unusable};

/// Google takes no token that is valid for longer.
const LIFE: Duration = Duration::from_secs(3600);
/// How far our clock may be ahead of Google's.
const SKEW: Duration = Duration::from_secs(10);

/// The key of a service account. The URLs of its file (`token_uri` and others) are not even read: whoever writes the
/// file would choose where its key's signature goes.
pub(crate) struct Credential {
    email: String,
    key_id: String,
    key: RsaKey,
    /// Whom the tokens are for.
    audience: String,
}

#[derive(Deserialize)]
struct Fields {
    r#type: Option<String>,
    client_email: Option<String>,
    private_key_id: Option<String>,
    private_key: Option<SecretString>,
    universe_domain: Option<String>,
}

impl Credential {
    /// Reads the stored secret: the JSON key of a service account.
    ///
    /// # Errors
    /// `credential_unusable`, naming the key.
    pub(crate) fn parse(provider: &Provider, value: &SecretValue) -> Result<Self, Error> {
        let needed = "store the JSON key file of a service account as it is";
        let wrong = |name: &str, what: &str| {
            unusable(provider, format!("`{name}` of the credential {what}")).next(needed)
        };
        let fields: Fields = serde_json::from_slice(value.expose())
            .map_err(|_| unusable(provider, "the credential is no JSON object of strings").next(needed))?;
        check_type(provider, fields.r#type.as_deref())?;
        let required = |name: &str, text: Option<String>| match text {
            Some(text)
                if !text.is_empty() && text.len() <= 512 && text.bytes().all(|b| b.is_ascii_graphic()) =>
            {
                Ok(text)
            }
            Some(_) => Err(wrong(name, "is empty or has characters that it cannot have")),
            None => Err(unusable(provider, format!("the credential has no `{name}`")).next(needed)),
        };
        let email = required("client_email", fields.client_email)?;
        let key_id = required("private_key_id", fields.private_key_id)?;
        let key = fields
            .private_key
            .ok_or_else(|| unusable(provider, "the credential has no `private_key`").next(needed))?;
        let key = RsaKey::parse(key.expose_secret()).map_err(|what| wrong("private_key", what))?;
        let universe = fields.universe_domain.as_deref().unwrap_or("googleapis.com");
        let is_domain = |text: &str| {
            (1..=255).contains(&text.len())
                && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.')
        };
        if !is_domain(universe) {
            return Err(wrong("universe_domain", "is no domain such as `googleapis.com`"));
        }
        Ok(Credential { email, key_id, key, audience: format!("https://secretmanager.{universe}/") })
    }
}

impl Credential {
    /// A token that says who we are to `audience` alone, for `life`.
    ///
    /// # Errors
    /// `internal`, if the system cannot sign.
    pub(crate) fn token_for(&self, audience: &str, life: Duration) -> Result<SecretString, Error> {
        let header = Header { kid: Some(self.key_id.clone()), ..Header::new(Algorithm::RS256) };
        let issued_at = SystemClock.now().since(Timestamp::default()).saturating_sub(SKEW).as_secs();
        let claims = Claims {
            iss: &self.email,
            sub: &self.email,
            aud: audience,
            iat: issued_at,
            exp: issued_at + life.as_secs(),
        };
        self.key.sign(&header, &claims)
    }
}

/// Whether the file is the one kind that a tenant may bring.
fn check_type(provider: &Provider, found: Option<&str>) -> Result<(), Error> {
    let refused = |message: &str, next: &'static str| Err(unusable(provider, message.to_owned()).next(next));
    let key = "create a JSON key of a service account and store that";
    match found {
        Some("service_account") => Ok(()),
        Some("external_account") => refused(
            "`type` of the credential is `external_account`, which tells us where to send credentials; only the operator may",
            "ask the operator to set it as `--gcp-external-account` and use `workload_identity`, or store a service account's key",
        ),
        Some("authorized_user") => refused(
            "`type` of the credential is `authorized_user`: the login of a person, which ends with it",
            key,
        ),
        Some("impersonated_service_account") => refused(
            "`type` of the credential is `impersonated_service_account`, which holds the login of another",
            key,
        ),
        Some(_) => refused("`type` of the credential is not `service_account`", key),
        None => refused("the credential has no `type`", key),
    }
}

#[derive(Serialize)]
struct Claims<'a> {
    iss: &'a str,
    sub: &'a str,
    aud: &'a str,
    iat: u64,
    exp: u64,
}

/// Signs a token. That the key was deleted, or never was the account's, is seen at the first call.
///
/// # Errors
/// `internal`, if the system cannot sign.
pub(crate) fn log_in(credential: &Credential) -> Result<Issued, Error> {
    bearer::issued(credential.token_for(&credential.audience, LIFE)?, LIFE - SKEW)
}

#[cfg(test)]
mod tests {
    use jsonwebtoken::{DecodingKey, Validation, decode};
    use rcgen::{KeyPair, PKCS_RSA_SHA256, PublicKeyData as _};
    use scaivault_domain::Reason;
    use scaivault_domain::backend::{GcpLogin, GcpTarget, ProjectId, Tls};
    use scaivault_domain::lease::Material;
    use scaivault_domain::path::SecretPath;
    use serde_json::{Value, json};

    use super::*;

    fn parse(stored: &Value) -> Result<Credential, Error> {
        let target = GcpTarget {
            project: ProjectId::parse("acme").unwrap(),
            location: None,
            endpoint: None,
            tls: Tls::default(),
        };
        let login = GcpLogin::ServiceAccount { credentials: SecretPath::parse("gcp").unwrap() };
        let provider = Provider::GoogleSecretManager { target, login };
        Credential::parse(&provider, &SecretValue::new(stored.to_string().into_bytes()))
    }

    fn stored(key: &KeyPair) -> Value {
        json!({
            "type": "service_account", "client_email": "reader@acme.iam.gserviceaccount.com",
            "private_key_id": "k1", "private_key": key.serialize_pem(), "token_uri": "https://evil.example",
        })
    }

    #[test]
    fn a_key_signs_a_token_for_secret_manager_alone() {
        let key = KeyPair::generate_for(&PKCS_RSA_SHA256).unwrap();
        let issued = log_in(&parse(&stored(&key)).unwrap()).unwrap();
        assert!(issued.ttl.unwrap() <= LIFE);
        let Material::Bearer(token) = issued.material else { panic!("no bearer token") };
        let public = DecodingKey::from_rsa_der(key.der_bytes());
        let mut validation = Validation::new(Algorithm::RS256);
        validation.set_audience(&["https://secretmanager.googleapis.com/"]);
        let found = decode::<Value>(token.expose_secret(), &public, &validation).unwrap();
        assert_eq!(found.header.kid.as_deref(), Some("k1"));
        assert_eq!(found.claims["iss"], found.claims["sub"]);
        assert_eq!(found.claims["exp"].as_u64().unwrap() - found.claims["iat"].as_u64().unwrap(), 3600);
    }

    #[test]
    fn whatever_is_no_key_of_a_service_account_is_refused_by_name() {
        let good = stored(&KeyPair::generate_for(&PKCS_RSA_SHA256).unwrap());
        let universe = |domain: &str| {
            let mut stored = good.clone();
            stored["universe_domain"] = json!(domain);
            parse(&stored)
        };
        assert_eq!(universe("example.goog").unwrap().audience, "https://secretmanager.example.goog/");
        let cases = [
            ("type", json!("external_account")),
            ("type", json!("authorized_user")),
            ("type", json!("impersonated_service_account")),
            ("type", json!("gdch_service_account")),
            ("type", Value::Null),
            ("client_email", json!("a b")),
            ("client_email", Value::Null),
            ("private_key_id", json!("")),
            ("private_key", json!("no PEM")),
            ("private_key", Value::Null),
            ("universe_domain", json!("a/b")),
        ];
        for (name, value) in cases {
            let mut stored = good.clone();
            stored[name] = value;
            let error = parse(&stored).err().unwrap();
            assert_eq!(error.reason, Reason::CredentialUnusable, "{name}");
            assert!(error.message.contains(&format!("`{name}`")), "{error}");
            assert!(error.next_step.is_some());
        }
    }
}
