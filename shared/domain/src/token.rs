//! Opaque tokens: `svt_`, 256 random bits, a checksum. Only the SHA-256 of one is ever stored or sent.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use secrecy::{ExposeSecret as _, SecretString};
use sha2::{Digest as _, Sha256};

const PREFIX: &str = "svt_";
const RANDOM_CHARS: usize = 43;
const TEXT_CHARS: usize = PREFIX.len() + RANDOM_CHARS + 6;

/// The SHA-256 of a token. Enough to find its grant; 256 random bits need no slower hash.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TokenHash([u8; 32]);

impl TokenHash {
    /// Takes a hash from a store or a message.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        TokenHash(bytes)
    }

    /// The bytes of the hash.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Takes a hash from a message.
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(TokenHash)
    }

    /// Reads what [`to_text`](Self::to_text) wrote.
    pub fn from_text(text: &str) -> Option<Self> {
        TokenHash::from_slice(&URL_SAFE_NO_PAD.decode(text).ok()?)
    }

    /// The hash in URL-safe base64, for keys.
    pub fn to_text(self) -> String {
        URL_SAFE_NO_PAD.encode(self.0)
    }
}

impl fmt::Debug for TokenHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TokenHash({}…)", &self.to_text()[..8])
    }
}

/// Makes a token of 32 random bytes.
pub fn token_from_random(random: [u8; 32]) -> SecretString {
    let body = URL_SAFE_NO_PAD.encode(random);
    format!("{PREFIX}{body}{}", checksum(&body)).into()
}

/// The hash of a well-formed token; `None` for a text that cannot be one, which costs no demand for a grant.
pub fn hash_token(text: &SecretString) -> Option<TokenHash> {
    let text = text.expose_secret();
    if text.len() != TEXT_CHARS || !text.is_ascii() {
        return None;
    }
    let (body, check) = text.strip_prefix(PREFIX)?.split_at(RANDOM_CHARS);
    (checksum(body) == check).then(|| TokenHash(Sha256::digest(text.as_bytes()).into()))
}

fn checksum(body: &str) -> String {
    URL_SAFE_NO_PAD.encode(crc32fast::hash(body.as_bytes()).to_be_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mistyped_token_is_known_without_a_lookup() {
        let token = token_from_random([7; 32]);
        assert!(hash_token(&token).is_some());
        let mistyped = token.expose_secret().replacen('B', "C", 1);
        assert!(hash_token(&mistyped.into()).is_none());
        assert!(hash_token(&"".into()).is_none());
        assert!(hash_token(&"svt_".into()).is_none());
        assert!(hash_token(&format!("svt_{}", "ä".repeat(30)).into()).is_none());
    }
}
