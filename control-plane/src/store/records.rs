//! Typed, sealed rows: the way in which everything but the store itself reads and writes.
//!
//! A value is JSON (of a secret's version: see [`Records::seal_secret`]) in a sealed record under the owner's key. The
//! row's owner, space and name are the record's associated data, so a row that was moved or swapped does not open.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use scaivault_domain::secret::SecretValue;
use scaivault_seal::Keyring;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{CommitError, Depth, Entry, Key, Owner, RowVersion, Space, Store, StoreError, Tx};

/// What the key ring derives the store's keys for.
const PURPOSE: &str = "store";

/// What stands between the head of a secret and its value. A value may be empty, so its absence needs a mark.
const NO_VALUE: u8 = 0;
const VALUE: u8 = 1;

/// How many records are read at once where all are wanted.
const PAGE: usize = 1000;

/// How many rows one transaction trims: a longer one would hold up everybody's writes.
const TRIM: usize = 256;

/// Sealed rows of a store.
#[derive(Clone)]
pub struct Records {
    store: Arc<dyn Store>,
    keyring: Arc<Keyring>,
}

impl std::fmt::Debug for Records {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Records").finish_non_exhaustive()
    }
}

impl Records {
    /// The rows of `store`, sealed with `keyring`.
    pub fn new(store: Arc<dyn Store>, keyring: Arc<Keyring>) -> Self {
        Records { store, keyring }
    }

    /// The store, for commits and the feed.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// The key ring, for what is sealed outside the store.
    pub fn keyring(&self) -> &Keyring {
        &self.keyring
    }

    /// The record at `key`, and its version for [`Tx::expect`](super::Tx::expect).
    ///
    /// # Errors
    /// A row that does not open is corrupt.
    pub async fn get<T: DeserializeOwned>(&self, key: &Key) -> Result<Option<(T, RowVersion)>, StoreError> {
        match self.store.get(key).await? {
            Some(row) => Ok(Some((self.open(key, &row.value)?, row.version))),
            None => Ok(None),
        }
    }

    /// [`Store::scan`] with opened records.
    ///
    /// # Errors
    /// A row that does not open is corrupt, and the scan with it.
    pub async fn scan<T: DeserializeOwned>(
        &self,
        owner: &Owner,
        space: Space,
        prefix: &str,
        depth: Depth,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<Entry<(T, RowVersion)>>, StoreError> {
        let entries = self.store.scan(owner, space, prefix, depth, after, limit).await?;
        let open = |entry: Entry| {
            Ok(match entry {
                Entry::Folder { name } => Entry::Folder { name },
                Entry::Row { name, row } => {
                    let key = Key::new(owner.clone(), space, name);
                    let record = self.open(&key, &row.value)?;
                    Entry::Row { name: key.name, row: (record, row.version) }
                }
            })
        };
        entries.into_iter().map(open).collect()
    }

    /// At most `limit` records whose names begin with `prefix` and come after `after`: name, record, version.
    ///
    /// # Errors
    /// A row that does not open is corrupt, and the scan with it.
    pub async fn scan_page<T: DeserializeOwned>(
        &self,
        owner: &Owner,
        space: Space,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<(String, T, RowVersion)>, StoreError> {
        let entries = self.scan(owner, space, prefix, Depth::All, after, limit).await?;
        Ok(entries
            .into_iter()
            .filter_map(|entry| match entry {
                Entry::Row { name, row: (record, version) } => Some((name, record, version)),
                Entry::Folder { .. } => None,
            })
            .collect())
    }

    /// Every record whose name begins with `prefix`, read page by page.
    ///
    /// # Errors
    /// A row that does not open is corrupt, and the scan with it.
    pub async fn scan_all<T: DeserializeOwned>(
        &self,
        owner: &Owner,
        space: Space,
        prefix: &str,
    ) -> Result<Vec<(String, T, RowVersion)>, StoreError> {
        let mut all: Vec<(String, T, RowVersion)> = Vec::new();
        loop {
            let after = all.last().map(|(name, ..)| name.clone());
            let page = self.scan_page(owner, space, prefix, after.as_deref(), PAGE).await?;
            let last = page.len() < PAGE;
            all.extend(page);
            if last {
                return Ok(all);
            }
        }
    }

    /// Keeps the `keep` newest rows whose names begin with `prefix`, and deletes the others in transactions of bounded
    /// size; how many. For rows with names in the order of time, which nobody rewrites. Reads all rows of the prefix.
    ///
    /// # Errors
    /// When the store does not answer. Some rows may be deleted; the next time trims the rest.
    pub async fn trim(
        &self,
        owner: &Owner,
        space: Space,
        prefix: &str,
        keep: usize,
    ) -> Result<usize, StoreError> {
        let mut newest = VecDeque::new();
        let mut trimmed = 0;
        let mut last: Option<String> = None;
        loop {
            let page = self.store.scan(owner, space, prefix, Depth::All, last.as_deref(), TRIM).await?;
            newest.extend(page.iter().map(|entry| entry.name().to_owned()));
            last = newest.back().cloned();
            let old: Vec<String> = newest.drain(..newest.len().saturating_sub(keep)).collect();
            trimmed += old.len();
            self.delete_all(old.into_iter().map(|name| Key::new(owner.clone(), space, name))).await?;
            if page.len() < TRIM {
                return Ok(trimmed);
            }
        }
    }

    async fn delete_all(&self, keys: impl ExactSizeIterator<Item = Key>) -> Result<(), StoreError> {
        if keys.len() == 0 {
            return Ok(());
        }
        match self.store.commit(keys.fold(Tx::new(), Tx::delete)).await {
            Ok(_) => Ok(()),
            Err(CommitError::Unavailable(error)) => Err(error),
            Err(CommitError::Precondition(_)) => unreachable!("nothing was expected"),
        }
    }

    /// The secret at `key`, and its value if it has one.
    ///
    /// # Errors
    /// A row that does not open is corrupt.
    pub async fn get_secret<H: DeserializeOwned>(
        &self,
        key: &Key,
    ) -> Result<Option<(H, Option<SecretValue>)>, StoreError> {
        match self.store.get(key).await? {
            Some(row) => Ok(Some(self.open_secret(key, &row.value)?)),
            None => Ok(None),
        }
    }

    /// Seals a record to its place, for a put at `key` and nowhere else.
    pub fn seal<T: Serialize>(&self, key: &Key, record: &T) -> Bytes {
        self.seal_bytes(key, to_json(record).expose())
    }

    /// Opens what [`seal`](Self::seal) made for `key`.
    ///
    /// # Errors
    /// It is corrupt.
    pub fn open<T: DeserializeOwned>(&self, key: &Key, sealed: &[u8]) -> Result<T, StoreError> {
        let plain = self.open_bytes(key, sealed)?;
        serde_json::from_slice(plain.expose()).map_err(|_| corrupt(key, "has not the form of its kind"))
    }

    /// Seals a head and a value that has no serialised form: length of the head (u32, little endian), head in JSON,
    /// one byte that says whether there is a value, value.
    pub fn seal_secret(&self, key: &Key, head: &impl Serialize, value: Option<&SecretValue>) -> Bytes {
        let head = to_json(head);
        let length = u32::try_from(head.len()).expect("the head of a secret is far below 4 GiB");
        // Of its final size, because growing would leave copies behind that nobody wipes.
        let mut plain = Vec::with_capacity(4 + head.len() + 1 + value.map_or(0, SecretValue::len));
        plain.extend(length.to_le_bytes());
        plain.extend_from_slice(head.expose());
        plain.push(if value.is_some() { VALUE } else { NO_VALUE });
        plain.extend_from_slice(value.map_or(&[], SecretValue::expose));
        self.seal_bytes(key, SecretValue::new(plain).expose())
    }

    /// Opens what [`seal_secret`](Self::seal_secret) made for `key`.
    ///
    /// # Errors
    /// It is corrupt.
    pub fn open_secret<H: DeserializeOwned>(
        &self,
        key: &Key,
        sealed: &[u8],
    ) -> Result<(H, Option<SecretValue>), StoreError> {
        let plain = self.open_bytes(key, sealed)?;
        split_secret(plain.expose())
            .and_then(|(head, value)| Some((serde_json::from_slice(head).ok()?, value)))
            .ok_or_else(|| corrupt(key, "has not the form of a secret"))
    }

    /// Seals any bytes to their place.
    pub fn seal_bytes(&self, key: &Key, plain: &[u8]) -> Bytes {
        self.keyring.cipher(key.owner.as_str(), PURPOSE).seal(&place(key), plain).into()
    }

    /// Opens what [`seal_bytes`](Self::seal_bytes) made for `key`.
    ///
    /// # Errors
    /// It is corrupt.
    pub fn open_bytes(&self, key: &Key, sealed: &[u8]) -> Result<SecretValue, StoreError> {
        match self.keyring.open(key.owner.as_str(), PURPOSE, &place(key), sealed) {
            Ok(mut plain) => Ok(SecretValue::new(std::mem::take(&mut *plain))),
            Err(refused) => Err(corrupt(key, &format!("does not open: {refused}"))),
        }
    }
}

fn to_json(record: &impl Serialize) -> SecretValue {
    SecretValue::new(serde_json::to_vec(record).expect("records are structs with text for keys"))
}

fn split_secret(plain: &[u8]) -> Option<(&[u8], Option<SecretValue>)> {
    let (length, rest) = plain.split_first_chunk()?;
    let (head, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
    match rest.split_first()? {
        (&VALUE, value) => Some((head, Some(SecretValue::new(value.to_vec())))),
        (&NO_VALUE, []) => Some((head, None)),
        _ => None,
    }
}

/// The associated data: every text with its length before it, so that no two places look the same.
fn place(key: &Key) -> Vec<u8> {
    let mut place = vec![key.space.code()];
    for text in [key.owner.as_str(), &key.name] {
        place.extend((text.len() as u64).to_le_bytes());
        place.extend_from_slice(text.as_bytes());
    }
    place
}

/// Names where it is, but not the row: a token's name, say, is the hash of it.
fn corrupt(key: &Key, what: &str) -> StoreError {
    StoreError::Corrupt(format!("a row of {:?} in {:?} {what}", key.space, key.owner))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use scaivault_domain::tenant::TenantId;
    use serde::Deserialize;

    use super::super::{MemoryStore, RedbStore};
    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Head {
        note: String,
    }

    fn head(note: &str) -> Head {
        Head { note: note.to_owned() }
    }

    fn records() -> Records {
        Records::new(Arc::new(MemoryStore::new()), Arc::new(Keyring::generate()))
    }

    fn key(tenant: &str, space: Space, name: &str) -> Key {
        Key::new(Owner::Tenant(TenantId::parse(tenant).unwrap()), space, name)
    }

    #[tokio::test]
    async fn a_record_is_read_as_it_was_sealed() {
        let records = records();
        let key = key("acme", Space::Policy, "a/b");
        assert_eq!(records.get::<Head>(&key).await.unwrap(), None);
        let tx = Tx::new().put(key.clone(), records.seal(&key, &head("hello")));
        let version = records.store().commit(tx).await.unwrap();
        assert_eq!(records.get(&key).await.unwrap(), Some((head("hello"), version)));

        let found = records.scan::<Head>(&key.owner, key.space, "", Depth::All, None, 9).await.unwrap();
        assert_eq!(found, [Entry::Row { name: "a/b".into(), row: (head("hello"), version) }]);
        let found = records.scan::<Head>(&key.owner, key.space, "", Depth::Children, None, 9).await.unwrap();
        assert_eq!(found, [Entry::Folder { name: "a/".into() }]);
    }

    #[tokio::test]
    async fn trimming_keeps_the_newest_of_its_prefix() {
        let records = records();
        let owner = key("acme", Space::Run, "").owner;
        let names = |prefix: &'static str| async {
            let rows = records.store().scan(&owner, Space::Run, prefix, Depth::All, None, 5_000).await;
            rows.unwrap().iter().map(|entry| entry.name().to_owned()).collect::<Vec<_>>()
        };
        let run = |n: usize| format!("a/{n:04}");
        let others = ["a-b/0", "a0", "b/0"].map(str::to_owned);
        let tx = (0..3 * TRIM)
            .map(run)
            .chain(others)
            .fold(Tx::new(), |tx, name| tx.put(Key::new(owner.clone(), Space::Run, name), Bytes::new()));
        records.store().commit(tx).await.unwrap();

        let trim = |keep| records.trim(&owner, Space::Run, "a/", keep);
        assert_eq!(trim(3 * TRIM).await.unwrap(), 0);
        assert_eq!(trim(TRIM + 1).await.unwrap(), 2 * TRIM - 1);
        assert_eq!(names("a/").await, (2 * TRIM - 1..3 * TRIM).map(run).collect::<Vec<_>>());
        assert_eq!(trim(50).await.unwrap(), TRIM - 49);
        assert_eq!(trim(50).await.unwrap(), 0);
        assert_eq!(trim(0).await.unwrap(), 50);
        assert_eq!(names("").await, ["a-b/0", "a0", "b/0"]);
    }

    #[test]
    fn an_empty_value_is_not_the_absence_of_one() {
        let records = records();
        let key = key("acme", Space::SecretVersion, "a");
        for value in [None, Some(&b""[..]), Some(b"\0\xff"), Some(b"hunter2")] {
            let value = value.map(|value| SecretValue::new(value.to_vec()));
            let sealed = records.seal_secret(&key, &head("x"), value.as_ref());
            let (found, opened) = records.open_secret::<Head>(&key, &sealed).unwrap();
            assert_eq!(found, head("x"));
            assert_eq!(opened.as_ref().map(SecretValue::expose), value.as_ref().map(SecretValue::expose));
        }
    }

    #[test]
    fn what_is_no_secret_is_refused() {
        let records = records();
        let key = key("acme", Space::SecretVersion, "a");
        for plain in
            [&b""[..], b"\x01", b"\x09\0\0\0{}", b"\x02\0\0\0{}", b"\x02\0\0\0{}\x00x", b"\x02\0\0\0{}\x02"]
        {
            let sealed = records.seal_bytes(&key, plain);
            assert!(matches!(
                records.open_secret::<serde_json::Value>(&key, &sealed),
                Err(StoreError::Corrupt(_))
            ));
        }
    }

    #[test]
    fn a_record_opens_in_its_place_only() {
        let records = records();
        let home = key("acme", Space::Secret, "ab");
        let sealed = records.seal(&home, &head("x"));
        assert!(records.open::<Head>(&home, &sealed).is_ok());
        for elsewhere in [
            key("acme", Space::Secret, "a"),
            key("acme", Space::SecretVersion, "ab"),
            key("other", Space::Secret, "ab"),
            Key::installation(Space::Secret, "ab"),
        ] {
            assert!(matches!(records.open::<Head>(&elsewhere, &sealed), Err(StoreError::Corrupt(_))));
        }
        let places: HashSet<Vec<u8>> =
            [("ab", "c"), ("a", "bc"), ("abc", "")].map(|(t, n)| place(&key(t, Space::Secret, n))).into();
        assert_eq!(places.len(), 3);
    }

    #[tokio::test]
    async fn swapped_rows_are_detected() {
        let records = records();
        let (a, b) = (key("acme", Space::Secret, "a"), key("acme", Space::Secret, "b"));
        let store = records.store();
        let tx = Tx::new()
            .put(a.clone(), records.seal(&a, &head("of a")))
            .put(b.clone(), records.seal(&b, &head("of b")));
        store.commit(tx).await.unwrap();
        let (of_a, of_b) = (store.get(&a).await.unwrap().unwrap(), store.get(&b).await.unwrap().unwrap());
        store.commit(Tx::new().put(a.clone(), of_b.value).put(b.clone(), of_a.value)).await.unwrap();
        for key in [a, b] {
            let error = records.get::<Head>(&key).await.unwrap_err();
            assert!(matches!(&error, StoreError::Corrupt(_)), "{error}");
            assert!(records.scan::<Head>(&key.owner, key.space, "", Depth::All, None, 9).await.is_err());
        }
    }

    #[test]
    fn corruption_names_the_place_and_no_content() {
        let records = records();
        let key = key("acme", Space::Token, "name-of-the-row");
        let sealed = records.seal(&key, &"canary");
        let error = records.open::<Head>(&key, &sealed).unwrap_err().to_string();
        assert!(error.contains("acme") && error.contains("Token"), "{error}");
        assert!(!error.contains("canary") && !error.contains("name-of-the-row"), "{error}");
    }

    #[tokio::test]
    async fn no_value_is_found_in_the_file() {
        const CANARY: &str = "canary-5e0e4d5c-7d2b";
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        let store = Arc::new(RedbStore::open(&path).unwrap());
        let records = Records::new(store, Arc::new(Keyring::generate()));
        for n in 0..50 {
            let secret = key("acme", Space::SecretVersion, &format!("a/{n}"));
            let backend = key("acme", Space::Backend, &n.to_string());
            let value = SecretValue::new(CANARY.repeat(n).into_bytes());
            let tx = Tx::new()
                .put(secret.clone(), records.seal_secret(&secret, &head(CANARY), Some(&value)))
                .put(backend.clone(), records.seal(&backend, &head(CANARY)));
            records.store().commit(tx).await.unwrap();
        }
        drop(records);
        let file = std::fs::read(&path).unwrap();
        let finds = |text: &str| file.windows(text.len()).any(|window| window == text.as_bytes());
        assert!(finds("acme"), "the file is the store's");
        assert!(!finds(CANARY));
    }
}
