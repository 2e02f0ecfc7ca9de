//! Envelope encryption: sealed records, tenant keys, key sources.
//!
//! ```text
//! root key ──wraps──► key ring (seeds by id, one primary) ──HKDF per owner and purpose──► data key ──seals──► record
//! ```
//!
//! The root key lives outside the store and is needed at start and at rotation only. An owner is a tenant's id, or
//! whatever else must not be able to open another's records; a purpose keeps apart what one owner seals for different
//! ends. Associated data binds a record to its place: the caller gives the same bytes (tenant, path, version, kind) when
//! it seals and when it opens, so a record that was moved does not open.
//!
//! # A sealed record
//!
//! | bytes | what |
//! |---|---|
//! | 1 | format, `1` |
//! | 4 | id of the seed, big endian |
//! | 24 | nonce, random |
//! | as the plain text | cipher text, XChaCha20 |
//! | 16 | tag, Poly1305 |
//!
//! A record is [`OVERHEAD`] bytes longer than what is in it. The format and the id are part of the key derivation, so
//! they are authenticated as well. Random nonces of 24 bytes may be drawn without counting: after 2⁸⁰ records under one
//! key the chance of a repeated one is still below 2⁻³².
//!
//! # A wrapped key ring
//!
//! | bytes | what |
//! |---|---|
//! | 1 | format, `1` |
//! | 8 | id of the root key, derived from it |
//! | n | sealed record: primary id, then id and seed of every key |
//! | 8 | the first bytes of the SHA-256 of everything before |
//!
//! The checksum tells accidental damage from a wrong root key; against malice there is the tag.

mod cipher;
mod keyring;
mod root_key;

pub use cipher::{Cipher, KeyId, OVERHEAD, SealError};
pub use keyring::{Keyring, Seed, UnwrapError};
pub use root_key::{RootKey, RootKeyError};
