use std::fmt;

use chacha20poly1305::aead::{AeadInOut as _, KeyInit as _};
use chacha20poly1305::{Tag, XChaCha20Poly1305, XNonce};
use hkdf::Hkdf;
use sha2::Sha256;
use zeroize::Zeroizing;

const FORMAT: u8 = 1;
const NONCE_AT: usize = 5;
const TEXT_AT: usize = NONCE_AT + 24;
const TAG_BYTES: usize = 16;

/// How much longer a record is than what is sealed in it.
pub const OVERHEAD: usize = TEXT_AT + TAG_BYTES;

/// Names a seed of the key ring; stands in every record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(pub(crate) u32);

impl KeyId {
    /// The id that `record` was sealed under, if it has the form of a record. Tells what a re-encryption has yet to do.
    pub fn of(record: &[u8]) -> Result<KeyId, SealError> {
        match *record {
            [FORMAT, a, b, c, d, ..] if record.len() >= OVERHEAD => {
                Ok(KeyId(u32::from_be_bytes([a, b, c, d])))
            }
            _ => Err(SealError::NoRecord),
        }
    }
}

impl From<u32> for KeyId {
    fn from(id: u32) -> Self {
        KeyId(id)
    }
}

impl From<KeyId> for u32 {
    fn from(id: KeyId) -> Self {
        id.0
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Why a record was not opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// Too short, or of a format that this version does not know.
    #[error("these bytes are no sealed record of a known format")]
    NoRecord,
    /// The key ring is older than the record, or the key was retired.
    #[error("the key ring has no key {0}")]
    UnknownKey(KeyId),
    /// Altered, moved from elsewhere, or another owner's.
    #[error("the record was altered or does not belong here")]
    Refused,
}

/// Derives 32 bytes from a key of 32 random bytes, which needs no salt.
pub(crate) fn derive(key: &[u8; 32], info: &[u8]) -> Zeroizing<[u8; 32]> {
    let mut derived = Zeroizing::new([0; 32]);
    Hkdf::<Sha256>::new(None, key).expand(info, &mut *derived).expect("32 bytes are within HKDF's limit");
    derived
}

pub(crate) fn fill_random(bytes: &mut [u8]) {
    getrandom::fill(bytes).expect("the operating system has random bytes");
}

/// What a data key is derived with: unambiguous, because every text is preceded by its length.
pub(crate) fn data_key_info(id: KeyId, owner: &str, purpose: &str) -> Vec<u8> {
    let mut info = b"scaivault data key ".to_vec();
    info.push(FORMAT);
    info.extend(id.0.to_be_bytes());
    for text in [owner, purpose] {
        info.extend((text.len() as u64).to_be_bytes());
        info.extend(text.as_bytes());
    }
    info
}

/// Seals and opens records of one owner and purpose under one key.
pub struct Cipher {
    id: KeyId,
    aead: XChaCha20Poly1305,
}

impl Cipher {
    pub(crate) fn new(id: KeyId, data_key: &[u8; 32]) -> Self {
        Cipher { id, aead: XChaCha20Poly1305::new(data_key.into()) }
    }

    /// Seals `plain` to the place that `aad` names.
    pub fn seal(&self, aad: &[u8], plain: &[u8]) -> Vec<u8> {
        let mut record = Vec::with_capacity(plain.len() + OVERHEAD);
        record.push(FORMAT);
        record.extend(self.id.0.to_be_bytes());
        record.resize(TEXT_AT, 0);
        fill_random(&mut record[NONCE_AT..]);
        record.extend(plain);
        let (header, text) = record.split_at_mut(TEXT_AT);
        let nonce = XNonce::try_from(&header[NONCE_AT..]).expect("24 bytes");
        let tag = self.aead.encrypt_inout_detached(&nonce, aad, text.into());
        record.extend(tag.expect("shorter than XChaCha20's 256 GiB"));
        record
    }

    /// Opens a record that was sealed to the place that `aad` names.
    ///
    /// # Errors
    /// Nothing is returned unless every byte is as it was sealed.
    pub fn open(&self, aad: &[u8], record: &[u8]) -> Result<Zeroizing<Vec<u8>>, SealError> {
        let id = KeyId::of(record)?;
        if id != self.id {
            return Err(SealError::UnknownKey(id));
        }
        let (header, sealed) = record.split_at(TEXT_AT);
        let (text, tag) = sealed.split_at(sealed.len() - TAG_BYTES);
        let nonce = XNonce::try_from(&header[NONCE_AT..]).expect("24 bytes");
        let tag = Tag::try_from(tag).expect("16 bytes");
        let mut plain = Zeroizing::new(text.to_vec());
        self.aead
            .decrypt_inout_detached(&nonce, aad, plain.as_mut_slice().into(), &tag)
            .map_err(|_| SealError::Refused)?;
        Ok(plain)
    }
}

impl fmt::Debug for Cipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cipher(key {}, [redacted])", self.id)
    }
}
