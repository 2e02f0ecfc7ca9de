//! RSA keys that sign tokens, made at run time.

use std::fmt;
use std::sync::Arc;

use anyhow::Result;
use jsonwebtoken::jwk::Jwk;
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use rcgen::{KeyPair, PKCS_RSA_SHA256, RsaKeySize};
use serde_json::{Value, json};

/// An RSA key of 2048 bits that signs JSON web tokens with RS256.
#[derive(Clone)]
pub struct SigningKey(Arc<Parts>);

struct Parts {
    id: String,
    pem: String,
    jwk: Jwk,
    signing: EncodingKey,
    verifying: DecodingKey,
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SigningKey({})", self.id())
    }
}

impl SigningKey {
    /// Makes a new one.
    ///
    /// # Errors
    /// If the system has no randomness.
    pub fn new() -> Result<SigningKey> {
        let pair = KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048)?;
        // Google's file has plain line feeds.
        let pem = pair.serialize_pem().replace("\r\n", "\n");
        let signing = EncodingKey::from_rsa_pem(pem.as_bytes())?;
        let mut jwk = Jwk::from_encoding_key(&signing, Algorithm::RS256)?;
        let id = hex(&rand::random::<[u8; 20]>());
        jwk.common.key_id = Some(id.clone());
        let verifying = DecodingKey::from_jwk(&jwk)?;
        Ok(SigningKey(Arc::new(Parts { id, pem, jwk, signing, verifying })))
    }

    /// Its id, the `kid` of what it signs.
    pub fn id(&self) -> &str {
        &self.0.id
    }

    /// The private key, PKCS #8 in PEM.
    pub fn pem(&self) -> &str {
        &self.0.pem
    }

    /// The public key as a JWKS document.
    pub fn jwks(&self) -> Value {
        let mut key = json!(self.0.jwk);
        key["use"] = json!("sig");
        json!({ "keys": [key] })
    }

    /// Signs claims.
    ///
    /// # Panics
    /// Never: the key is complete.
    pub fn sign(&self, claims: &Value) -> String {
        let header = Header { kid: Some(self.id().to_owned()), ..Header::new(Algorithm::RS256) };
        jsonwebtoken::encode(&header, claims, &self.0.signing).expect("the key is complete")
    }

    /// The claims of a token, if this key has signed it. Nothing else is checked.
    pub fn verify(&self, token: &str) -> Option<Value> {
        let mut signature_alone = Validation::new(Algorithm::RS256);
        // Times are the fakes' own to check: their clock can be put forward.
        signature_alone.validate_exp = false;
        signature_alone.validate_aud = false;
        signature_alone.required_spec_claims.clear();
        jsonwebtoken::decode(token, &self.0.verifying, &signature_alone).ok().map(|token| token.claims)
    }
}

/// The `kid` that a token claims to be signed with; nothing of it is checked.
pub(super) fn claimed_key(token: &str) -> Option<String> {
    jsonwebtoken::decode_header(token).ok()?.kid
}

/// Whether `aud` is or contains one of these.
pub(super) fn has_audience(claims: &Value, accepted: &[&str]) -> bool {
    audiences(claims).iter().any(|audience| accepted.contains(&audience.as_str()))
}

/// Every `aud` of a token.
pub(super) fn audiences(claims: &Value) -> Vec<String> {
    match &claims["aud"] {
        Value::String(one) => vec![one.clone()],
        Value::Array(many) => many.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
        _ => Vec::new(),
    }
}

/// Random bytes as hexadecimal digits.
pub(super) fn random_hex<const BYTES: usize>() -> String {
    let mut bytes = [0_u8; BYTES];
    rand::fill(&mut bytes);
    hex(&bytes)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
