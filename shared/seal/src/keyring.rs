use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use crate::cipher::{Cipher, KeyId, SealError, data_key_info, derive, fill_random};
use crate::root_key::RootKey;

const FORMAT: u8 = 1;
const ROOT_ID_BYTES: usize = 8;
const CHECKSUM_BYTES: usize = 8;
const WRAPPED_AS: &[u8] = b"scaivault key ring";

/// 32 random bytes that data keys are derived from. Wiped when dropped.
#[derive(Clone)]
pub struct Seed(Zeroizing<[u8; 32]>);

impl Seed {
    fn generate() -> Self {
        let mut seed = Zeroizing::new([0; 32]);
        fill_random(&mut *seed);
        Seed(seed)
    }
}

impl fmt::Debug for Seed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Seed([redacted])")
    }
}

/// Why a key ring was not unwrapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnwrapError {
    /// The ring is whole, but another root key wrapped it.
    #[error("the key ring was wrapped by another root key; start with the one that wrapped it")]
    WrongRootKey,
    /// The ring was damaged or altered, or is of a format that this version does not know.
    #[error("the wrapped key ring is damaged; restore it from a backup")]
    Damaged,
}

/// The seeds by id. New records are sealed under the primary; every seed opens what was sealed under it.
pub struct Keyring {
    seeds: BTreeMap<KeyId, Seed>,
    primary: KeyId,
    /// By what the data key is derived with. Grows with tenants, by about 200 bytes each.
    ciphers: RwLock<HashMap<Vec<u8>, Arc<Cipher>>>,
}

impl Keyring {
    /// A ring with one new seed.
    pub fn generate() -> Self {
        Self::new(BTreeMap::from([(KeyId(1), Seed::generate())]), KeyId(1))
    }

    fn new(seeds: BTreeMap<KeyId, Seed>, primary: KeyId) -> Self {
        Keyring { seeds, primary, ciphers: RwLock::default() }
    }

    /// This ring with a new seed as its primary. To be wrapped and stored before anything is sealed under it.
    #[must_use]
    pub fn rotated(&self) -> Self {
        let newest = self.seeds.keys().next_back().map_or(0, |id| id.0);
        let primary = KeyId(newest.checked_add(1).expect("fewer than 2³² rotations"));
        let mut seeds = self.seeds.clone();
        seeds.insert(primary, Seed::generate());
        Self::new(seeds, primary)
    }

    /// The id that new records are sealed under.
    pub fn primary(&self) -> KeyId {
        self.primary
    }

    /// Seals for `owner` and `purpose` under the primary key.
    pub fn cipher(&self, owner: &str, purpose: &str) -> Arc<Cipher> {
        self.cipher_of(self.primary, owner, purpose).expect("the ring has its primary")
    }

    /// Opens a record of `owner` and `purpose`, whichever key it was sealed under.
    ///
    /// # Errors
    /// Nothing is returned unless every byte is as it was sealed, for this owner, purpose and place.
    pub fn open(
        &self,
        owner: &str,
        purpose: &str,
        aad: &[u8],
        record: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, SealError> {
        self.cipher_of(KeyId::of(record)?, owner, purpose)?.open(aad, record)
    }

    /// A keyed digest of `data` for `owner` and `purpose`, under the key `id` (`None`: the primary), and which key it
    /// was. Equal data has equal digests under one key; without the key nothing can be tried.
    ///
    /// # Errors
    /// [`SealError::UnknownKey`], if the ring does not have the key.
    pub fn mac(
        &self,
        id: Option<KeyId>,
        owner: &str,
        purpose: &str,
        data: &[u8],
    ) -> Result<(KeyId, [u8; 32]), SealError> {
        let id = id.unwrap_or(self.primary);
        let seed = self.seeds.get(&id).ok_or(SealError::UnknownKey(id))?;
        let key = derive(&seed.0, &data_key_info(id, owner, purpose));
        let mut mac = Hmac::<Sha256>::new_from_slice(&*key).expect("HMAC takes keys of any length");
        mac.update(data);
        Ok((id, mac.finalize().into_bytes().into()))
    }

    fn cipher_of(&self, id: KeyId, owner: &str, purpose: &str) -> Result<Arc<Cipher>, SealError> {
        let seed = self.seeds.get(&id).ok_or(SealError::UnknownKey(id))?;
        let info = data_key_info(id, owner, purpose);
        if let Some(cipher) = self.ciphers.read().unwrap_or_else(PoisonError::into_inner).get(&info) {
            return Ok(cipher.clone());
        }
        let cipher = Arc::new(Cipher::new(id, &derive(&seed.0, &info)));
        self.ciphers.write().unwrap_or_else(PoisonError::into_inner).insert(info, cipher.clone());
        Ok(cipher)
    }

    /// The ring as it is stored.
    pub fn wrap(&self, root: &RootKey) -> Vec<u8> {
        let mut plain = Zeroizing::new(Vec::with_capacity(4 + self.seeds.len() * 36));
        plain.extend(self.primary.0.to_be_bytes());
        for (id, seed) in &self.seeds {
            plain.extend(id.0.to_be_bytes());
            plain.extend(*seed.0);
        }
        let mut wrapped = vec![FORMAT];
        wrapped.extend(root.id());
        wrapped.extend(root.cipher().seal(WRAPPED_AS, &plain));
        wrapped.extend(checksum(&wrapped));
        wrapped
    }

    /// The ring that [`wrap`](Self::wrap) stored.
    ///
    /// # Errors
    /// A wrong root key is told from a damaged ring.
    pub fn unwrap(wrapped: &[u8], root: &RootKey) -> Result<Self, UnwrapError> {
        let (body, sum) = wrapped.split_last_chunk::<CHECKSUM_BYTES>().ok_or(UnwrapError::Damaged)?;
        if checksum(body) != *sum {
            return Err(UnwrapError::Damaged);
        }
        let ([FORMAT], rest) = body.split_first_chunk().ok_or(UnwrapError::Damaged)? else {
            return Err(UnwrapError::Damaged);
        };
        let (root_id, record) = rest.split_first_chunk::<ROOT_ID_BYTES>().ok_or(UnwrapError::Damaged)?;
        if *root_id != root.id() {
            return Err(UnwrapError::WrongRootKey);
        }
        let plain = root.cipher().open(WRAPPED_AS, record).map_err(|_| UnwrapError::Damaged)?;
        Self::parse(&plain).ok_or(UnwrapError::Damaged)
    }

    fn parse(plain: &[u8]) -> Option<Self> {
        let (primary, entries) = plain.split_first_chunk()?;
        let primary = KeyId(u32::from_be_bytes(*primary));
        let (entries, []) = entries.as_chunks::<36>() else { return None };
        let mut seeds = BTreeMap::new();
        for entry in entries {
            let (id, seed) = entry.split_first_chunk()?;
            let seed = Seed(Zeroizing::new(seed.try_into().ok()?));
            seeds.insert(KeyId(u32::from_be_bytes(*id)), seed);
        }
        seeds.contains_key(&primary).then(|| Self::new(seeds, primary))
    }
}

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keyring")
            .field("seeds", &self.seeds)
            .field("primary", &self.primary)
            .finish_non_exhaustive()
    }
}

fn checksum(bytes: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let digest: [u8; 32] = Sha256::digest(bytes).into();
    *digest.first_chunk().expect("8 of 32 bytes")
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::*;
    use crate::OVERHEAD;

    fn flipped(bytes: &[u8], bit: Index) -> Vec<u8> {
        let mut bytes = bytes.to_vec();
        let bit = bit.index(bytes.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        bytes
    }

    #[test]
    fn digests_agree_under_one_key_only() {
        let ring = Keyring::generate();
        let (id, mac) = ring.mac(None, "acme", "test", b"a").unwrap();
        let rotated = ring.rotated();
        assert_eq!(rotated.mac(Some(id), "acme", "test", b"a").unwrap(), (id, mac));
        assert_ne!(rotated.mac(None, "acme", "test", b"a").unwrap().1, mac);
        assert_ne!(ring.mac(None, "other", "test", b"a").unwrap().1, mac);
        assert_ne!(ring.mac(None, "acme", "test", b"b").unwrap().1, mac);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1_000))]

        #[test]
        fn what_is_sealed_opens_and_a_flipped_bit_does_not(
            plain in proptest::collection::vec(any::<u8>(), 0..300),
            aad in proptest::collection::vec(any::<u8>(), 0..40),
            bit: Index,
        ) {
            let ring = Keyring::generate();
            let record = ring.cipher("t", "values").seal(&aad, &plain);
            prop_assert_eq!(record.len(), plain.len() + OVERHEAD);
            prop_assert_eq!(&*ring.open("t", "values", &aad, &record).unwrap(), &plain);
            prop_assert!(ring.open("t", "values", &aad, &flipped(&record, bit)).is_err());
        }

        #[test]
        fn a_flipped_bit_of_a_wrapped_ring_is_damage(bit: Index) {
            let root = RootKey::generate();
            let wrapped = Keyring::generate().rotated().wrap(&root);
            prop_assert_eq!(Keyring::unwrap(&flipped(&wrapped, bit), &root).unwrap_err(), UnwrapError::Damaged);
        }

        #[test]
        fn bytes_that_are_no_record_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            prop_assert!(Keyring::generate().open("t", "values", b"", &bytes).is_err());
            prop_assert!(Keyring::unwrap(&bytes, &RootKey::generate()).is_err());
        }
    }

    #[test]
    fn a_record_opens_only_in_its_place() {
        let ring = Keyring::generate();
        let record = ring.cipher("t", "values").seal(b"a/b@1", b"v");
        assert_eq!(ring.open("t", "values", b"a/b@2", &record), Err(SealError::Refused));
        assert_eq!(ring.open("t", "values", b"", &record), Err(SealError::Refused));
    }

    #[test]
    fn another_owner_or_purpose_cannot_open() {
        let ring = Keyring::generate();
        let record = ring.cipher("ab", "c").seal(b"", b"v");
        for (owner, purpose) in [("other", "c"), ("ab", "other"), ("a", "bc"), ("abc", ""), ("c", "ab")] {
            assert_eq!(ring.open(owner, purpose, b"", &record), Err(SealError::Refused), "{owner} {purpose}");
        }
    }

    #[test]
    fn another_ring_cannot_open() {
        let record = Keyring::generate().cipher("t", "values").seal(b"", b"v");
        assert_eq!(Keyring::generate().open("t", "values", b"", &record), Err(SealError::Refused));
    }

    #[test]
    fn nonces_do_not_repeat() {
        let cipher = Keyring::generate().cipher("t", "values");
        let nonces: HashSet<Vec<u8>> = (0..10_000).map(|_| cipher.seal(b"", b"")[5..29].to_vec()).collect();
        assert_eq!(nonces.len(), 10_000);
    }

    #[test]
    fn a_rotated_ring_seals_under_the_new_key_and_opens_the_old() {
        let ring = Keyring::generate();
        let old = ring.cipher("t", "values").seal(b"", b"old");
        let rotated = ring.rotated();
        let new = rotated.cipher("t", "values").seal(b"", b"new");
        assert_eq!(&**rotated.open("t", "values", b"", &old).unwrap(), b"old");
        assert_eq!(KeyId::of(&new).unwrap(), rotated.primary());
        assert_eq!(ring.open("t", "values", b"", &new), Err(SealError::UnknownKey(rotated.primary())));
    }

    #[test]
    fn an_unwrapped_ring_opens_what_the_wrapped_one_sealed() {
        let root = RootKey::generate();
        let ring = Keyring::generate().rotated();
        let record = ring.cipher("t", "values").seal(b"", b"v");
        let unwrapped = Keyring::unwrap(&ring.wrap(&root), &root).unwrap();
        assert_eq!(&**unwrapped.open("t", "values", b"", &record).unwrap(), b"v");
        assert_eq!(unwrapped.primary(), ring.primary());
    }

    #[test]
    fn a_wrong_root_key_is_told_from_damage() {
        let wrapped = Keyring::generate().wrap(&RootKey::generate());
        assert_eq!(Keyring::unwrap(&wrapped, &RootKey::generate()).unwrap_err(), UnwrapError::WrongRootKey);
    }

    #[test]
    fn keys_do_not_print() {
        let ring = Keyring::new(BTreeMap::from([(KeyId(1), Seed(Zeroizing::new([173; 32])))]), KeyId(1));
        assert_eq!(
            format!("{ring:?}"),
            "Keyring { seeds: {KeyId(1): Seed([redacted])}, primary: KeyId(1), .. }"
        );
        assert_eq!(format!("{:?}", ring.cipher("t", "values")), "Cipher(key 1, [redacted])");
    }
}
