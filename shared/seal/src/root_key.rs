use std::fmt;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use secrecy::{ExposeSecret as _, SecretString};
use zeroize::Zeroizing;

use crate::cipher::{Cipher, KeyId, derive, fill_random};

const TEXT_BYTES: usize = 44;

/// The key that wraps the key ring: 32 random bytes that live outside the store. Wiped when dropped.
pub struct RootKey(Zeroizing<[u8; 32]>);

/// Why there is no root key, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum RootKeyError {
    /// There is no file.
    #[error("no root key at {0}: mount the file, or create one if this installation is new")]
    Missing(PathBuf),
    /// A key is there already, and overwriting it could lose everything sealed under it.
    #[error("{0} exists and is never overwritten: use it, or move it away")]
    Exists(PathBuf),
    /// Not a regular file.
    #[error("{0} is no regular file: name the file itself")]
    NotRegular(PathBuf),
    /// Others than the owner may read or change the file.
    #[error("{path} has mode {mode:04o}: run `chmod 600` on it, and replace the key if others could read it")]
    Mode {
        /// Which file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// The text is no key.
    #[error(
        "the root key is 32 random bytes in base64 (44 characters): make one with `openssl rand -base64 32`"
    )]
    NoKey,
    /// The file cannot be read or written.
    #[error("cannot use the root key at {path}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl RootKey {
    /// A new random key.
    pub fn generate() -> Self {
        let mut key = Zeroizing::new([0; 32]);
        fill_random(&mut *key);
        RootKey(key)
    }

    /// Reads the key from a regular file of mode 0600 or 0400: base64, and at most a line feed behind it.
    ///
    /// # Errors
    /// Each says what to do.
    pub fn from_file(path: &Path) -> Result<Self, RootKeyError> {
        // Asked before it is opened, which would wait at a pipe, and again of what was opened.
        check_file(path, &fs::metadata(path).map_err(|source| unusable(path, source))?)?;
        let file = File::open(path).map_err(|source| unusable(path, source))?;
        check_file(path, &file.metadata().map_err(|source| unusable(path, source))?)?;
        let mut text = Zeroizing::new(Vec::with_capacity(TEXT_BYTES + 2));
        file.take(TEXT_BYTES as u64 + 2).read_to_end(&mut text).map_err(|source| unusable(path, source))?;
        Self::parse(text.strip_suffix(b"\n").unwrap_or(&text))
    }

    /// Makes a new key in a new file of mode 0600, on disk when this returns.
    ///
    /// # Errors
    /// A file that exists is never overwritten.
    pub fn create_file(path: &Path) -> Result<Self, RootKeyError> {
        let key = Self::generate();
        let mut text = Zeroizing::new([b'\n'; TEXT_BYTES + 1]);
        STANDARD.encode_slice(*key.0, &mut *text).expect("44 characters hold 32 bytes");
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(|source| unusable(path, source))?;
        let written = file.write_all(&*text).and_then(|()| file.sync_all()).and_then(|()| sync_parent(path));
        if let Err(source) = written {
            // Half a key would stand in the way of the next attempt; the first error is the one to tell.
            let _ = fs::remove_file(path);
            return Err(unusable(path, source));
        }
        Ok(key)
    }

    /// Parses the key as an environment variable has it.
    ///
    /// # Errors
    /// Not 32 bytes in base64.
    pub fn from_base64(text: &SecretString) -> Result<Self, RootKeyError> {
        let text = text.expose_secret();
        Self::parse(text.strip_suffix('\n').unwrap_or(text).as_bytes())
    }

    fn parse(text: &[u8]) -> Result<Self, RootKeyError> {
        if text.len() != TEXT_BYTES {
            return Err(RootKeyError::NoKey);
        }
        let mut decoded = Zeroizing::new([0; 33]);
        match (STANDARD.decode_slice(text, &mut *decoded), decoded.split_first_chunk()) {
            (Ok(32), Some((key, _))) => Ok(RootKey(Zeroizing::new(*key))),
            _ => Err(RootKeyError::NoKey),
        }
    }

    pub(crate) fn id(&self) -> [u8; 8] {
        *derive(&self.0, b"scaivault root key id").first_chunk().expect("8 of 32 bytes")
    }

    pub(crate) fn cipher(&self) -> Cipher {
        Cipher::new(KeyId(0), &derive(&self.0, b"scaivault key ring"))
    }
}

impl fmt::Debug for RootKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RootKey([redacted])")
    }
}

fn check_file(path: &Path, metadata: &Metadata) -> Result<(), RootKeyError> {
    if !metadata.is_file() {
        return Err(RootKeyError::NotRegular(path.to_owned()));
    }
    match metadata.permissions().mode() & 0o7777 {
        0o600 | 0o400 => Ok(()),
        mode => Err(RootKeyError::Mode { path: path.to_owned(), mode }),
    }
}

fn unusable(path: &Path, source: io::Error) -> RootKeyError {
    let path = path.to_owned();
    match source.kind() {
        io::ErrorKind::NotFound => RootKeyError::Missing(path),
        io::ErrorKind::AlreadyExists => RootKeyError::Exists(path),
        _ => RootKeyError::Io { path, source },
    }
}

/// Without it the file's name may be gone after a power loss.
fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(mode: u32, text: &str) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("root.key");
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        (dir, path)
    }

    fn key_text() -> String {
        STANDARD.encode([173; 32])
    }

    #[test]
    fn a_created_key_is_read_back_and_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("root.key");
        let key = RootKey::create_file(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        assert_eq!(fs::metadata(&path).unwrap().len(), 45);
        assert_eq!(*RootKey::from_file(&path).unwrap().0, *key.0);
        assert!(matches!(RootKey::create_file(&path), Err(RootKeyError::Exists(_))));
        assert_eq!(*RootKey::from_file(&path).unwrap().0, *key.0);
    }

    #[test]
    fn a_key_that_others_may_read_is_refused() {
        for mode in [0o640, 0o604, 0o644, 0o700, 0o660] {
            let (_dir, path) = file(mode, &key_text());
            let error = RootKey::from_file(&path).unwrap_err();
            assert!(error.to_string().contains("chmod 600"), "{mode:o}: {error}");
        }
        for mode in [0o600, 0o400] {
            let (_dir, path) = file(mode, &key_text());
            assert_eq!(*RootKey::from_file(&path).unwrap().0, [173; 32]);
        }
    }

    #[test]
    fn only_regular_files_hold_keys() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(RootKey::from_file(dir.path()), Err(RootKeyError::NotRegular(_))));
        assert!(matches!(RootKey::from_file(&dir.path().join("none")), Err(RootKeyError::Missing(_))));
        assert!(matches!(RootKey::from_file(Path::new("/dev/null")), Err(RootKeyError::NotRegular(_))));
    }

    #[test]
    fn only_32_bytes_in_base64_are_a_key() {
        let key = key_text();
        for text in [
            String::new(),
            key[..43].to_owned(),
            format!("{key}\n\n"),
            format!(" {key}"),
            format!("{key}{key}"),
            "!".repeat(44),
            STANDARD.encode([0; 31]),
            STANDARD.encode([0; 33]),
        ] {
            let (_dir, path) = file(0o600, &text);
            assert!(matches!(RootKey::from_file(&path), Err(RootKeyError::NoKey)), "{text:?}");
            assert!(matches!(RootKey::from_base64(&text.into()), Err(RootKeyError::NoKey)));
        }
        for text in [key.clone(), format!("{key}\n")] {
            assert_eq!(*RootKey::from_base64(&text.into()).unwrap().0, [173; 32]);
        }
    }

    #[test]
    fn a_root_key_does_not_print() {
        assert_eq!(format!("{:?}", RootKey::generate()), "RootKey([redacted])");
    }
}
