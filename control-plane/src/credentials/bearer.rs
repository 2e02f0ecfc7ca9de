//! Bearer tokens of Azure and GCP: answers of their token services, and the JWTs that keys sign for them.

use std::time::Duration;

use jsonwebtoken::{EncodingKey, Header, encode};
use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls_pki_types::PrivateKeyDer;
use rustls_pki_types::pem::PemObject as _;
use scaivault_backends::{BackendError, Class};
use scaivault_domain::lease::Material;
use scaivault_domain::{Error, Reason};
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};

use super::vault::is_token;
use super::{Issued, Renewal, Revocation};

/// Most bytes of an answer with a token.
pub(crate) const MAX_ANSWER: usize = 64 * 1024;

/// What a token service answers (RFC 6749, section 5.1).
#[derive(Deserialize)]
struct Token {
    access_token: SecretString,
    expires_in: Seconds,
}

/// Azure's metadata service writes numbers as text.
#[derive(Deserialize)]
#[serde(untagged)]
enum Seconds {
    Number(u64),
    Text(String),
}

/// The token in an answer of a token service.
///
/// # Errors
/// `backend_invalid_answer`, if there is none that can be used.
pub(crate) fn token_in(body: &[u8]) -> Result<Issued, Error> {
    let invalid = || invalid_answer("the token service gave an answer without a token and its life");
    let token: Token = serde_json::from_slice(body).map_err(|_| invalid())?;
    let seconds = match token.expires_in {
        Seconds::Number(seconds) => seconds,
        Seconds::Text(text) => text.parse().map_err(|_| invalid())?,
    };
    issued(token.access_token, Duration::from_secs(seconds))
}

/// A token that ends after `ttl`, and until then cannot be renewed or revoked.
///
/// # Errors
/// `backend_invalid_answer`, if no header can carry it.
pub(crate) fn issued(token: SecretString, ttl: Duration) -> Result<Issued, Error> {
    if !is_token(token.expose_secret()) {
        return Err(invalid_answer("the token service gave a token that no header can carry"));
    }
    Ok(Issued {
        material: Material::Bearer(token),
        ttl: Some(ttl),
        renewal: Renewal::Again,
        revocation: Revocation::Leave,
    })
}

/// The error of an answer that is not the protocol of a token service.
pub(crate) fn invalid_answer(message: &'static str) -> Error {
    Error::new(Reason::BackendInvalidAnswer, message)
        .next("check that what answers there is the token service itself and not something in between")
}

/// What the caller is told if a token service gave no answer of its protocol.
pub(crate) fn fault(error: BackendError) -> Error {
    let message = error.to_string().replacen("the backend", "the token service", 1);
    let next = match error.class() {
        Class::Forbidden => Some("check what is between the control plane and the token service"),
        Class::Transient => Some("check the token service's address, the network and the certificate"),
        _ => None,
    };
    let mut shown = Error::from(error);
    // Nobody forbade the reading of a secret: something on the way keeps us from logging in.
    if shown.reason == Reason::BackendForbidden {
        shown.reason = Reason::BackendLoginFailed;
    }
    shown.message = message.into();
    match next {
        Some(next) => shown.next(next),
        None => shown,
    }
}

/// An RSA key that signs JWTs.
pub(crate) struct RsaKey {
    key: EncodingKey,
    /// `SubjectPublicKeyInfo`, as certificates have it.
    public: Vec<u8>,
}

impl RsaKey {
    /// Reads a key in PEM, PKCS #8 or PKCS #1.
    ///
    /// # Errors
    /// What is wrong with it, as the end of a sentence.
    pub(crate) fn parse(pem: &str) -> Result<Self, &'static str> {
        if pem.contains("ENCRYPTED") {
            return Err("is encrypted; store the key without a passphrase");
        }
        let der = PrivateKeyDer::from_pem_slice(pem.as_bytes()).map_err(|_| "is no private key in PEM")?;
        let unusable = "is no RSA key of 2048 bits or more";
        let signing = any_supported_type(&der).map_err(|_| unusable)?;
        if signing.algorithm() != rustls::SignatureAlgorithm::RSA {
            return Err(unusable);
        }
        let public = signing.public_key().ok_or(unusable)?.to_vec();
        let key = EncodingKey::from_rsa_pem(pem.as_bytes())
            .map_err(|_| "does not begin with a private key in PEM")?;
        Ok(RsaKey { key, public })
    }

    /// The public half, `SubjectPublicKeyInfo` in DER.
    pub(crate) fn public(&self) -> &[u8] {
        &self.public
    }

    /// A JWT with these claims.
    ///
    /// # Errors
    /// `internal`, if the system cannot sign.
    pub(crate) fn sign(&self, header: &Header, claims: &impl Serialize) -> Result<SecretString, Error> {
        encode(header, claims, &self.key).map(SecretString::from).map_err(|_| Error::internal())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_of_the_token_service_is_told_as_its_own() {
        let told = fault(BackendError::Server { status: 503 });
        assert_eq!(told.message, "the token service answered with status 503");
        assert_eq!(told.reason, Reason::BackendUnreachable);
        assert_eq!(fault(BackendError::Forbidden).reason, Reason::BackendLoginFailed);
        let retry_after = Some(Duration::from_secs(7));
        assert_eq!(fault(BackendError::Throttled { retry_after }).retry_after, retry_after);
    }

    #[test]
    fn the_life_of_a_token_is_a_number_or_text() {
        for life in ["3599", "\"3599\""] {
            let body = format!(r#"{{"access_token":"t","expires_in":{life}}}"#);
            assert_eq!(token_in(body.as_bytes()).unwrap().ttl, Some(Duration::from_secs(3599)));
        }
        for body in [
            r#"{"access_token":"t"}"#,
            r#"{"access_token":"a b","expires_in":1}"#,
            r#"{"access_token":"","expires_in":1}"#,
            r#"{"access_token":"t","expires_in":-1}"#,
            r#"{"access_token":"t","expires_in":"soon"}"#,
            "[]",
        ] {
            let error = token_in(body.as_bytes()).err().unwrap();
            assert_eq!(error.reason, Reason::BackendInvalidAnswer, "{body}");
        }
    }
}
