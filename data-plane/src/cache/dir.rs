//! The directory of the cache: for one process, for nobody else to read, and set aside when it is of no use.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use scaivault_domain::time::Timestamp;

/// How many directories that were set aside are kept.
const KEPT: usize = 2;
/// After so many attempts to open a directory that did not end, it is not tried again.
const ATTEMPTS: u64 = 2;

/// Why a directory was not locked.
pub(super) enum LockError {
    InUse,
    Io(io::Error),
}

/// The directory is this process's while this lives. The file beside it has one byte for each attempt to open the
/// directory that did not end: what kills the process at each start must not do so for ever.
#[derive(Debug)]
pub(super) struct Lock(File);

impl Lock {
    pub(super) fn take(dir: &Path) -> Result<Self, LockError> {
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(beside(dir, ".lock"))
            .map_err(LockError::Io)?;
        match file.try_lock() {
            Ok(()) => Ok(Lock(file)),
            Err(TryLockError::WouldBlock) => Err(LockError::InUse),
            Err(TryLockError::Error(error)) => Err(LockError::Io(error)),
        }
    }

    /// Whether opening the directory may be tried; notes the attempt, if the disk has room for it.
    pub(super) fn may_open(&mut self) -> bool {
        let may = self.0.metadata().is_ok_and(|file| file.len() < ATTEMPTS);
        let _ = self.0.write_all(b".");
        may
    }

    /// The attempt ended, well or not.
    pub(super) fn opened(&mut self) {
        let _ = self.0.set_len(0);
    }
}

/// Makes the directory and what is in it the owner's alone.
pub(super) fn make_private(dir: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    fs::set_permissions(dir, Permissions::from_mode(0o700))?;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        // Not what a link leads to.
        if kind.is_dir() || kind.is_file() {
            let mode = if kind.is_dir() { 0o700 } else { 0o600 };
            fs::set_permissions(entry.path(), Permissions::from_mode(mode))?;
        }
    }
    Ok(())
}

/// Moves the directory out of the way, for an investigation. Only the last ones are kept.
pub(super) fn set_aside(dir: &Path, now: Timestamp) -> io::Result<()> {
    let mut at = now.as_millis();
    let mut aside = beside(dir, &format!(".broken-{at}"));
    while aside.exists() {
        at += 1;
        aside = beside(dir, &format!(".broken-{at}"));
    }
    if let Err(error) = fs::rename(dir, &aside) {
        tracing::warn!(%error, "the cache cannot be set aside and is removed");
        return fs::remove_dir_all(dir);
    }
    for (_, old) in set_aside_before(dir)?.into_iter().rev().skip(KEPT) {
        fs::remove_dir_all(&old).or_else(|_| fs::remove_file(&old))?;
    }
    Ok(())
}

/// What was set aside, in order of time.
fn set_aside_before(dir: &Path) -> io::Result<Vec<(i64, PathBuf)>> {
    let prefix = beside(dir, ".broken-");
    let mut found = Vec::new();
    for entry in fs::read_dir(parent(dir))? {
        let path = entry?.path();
        let at = path.to_str().zip(prefix.to_str()).and_then(|(path, prefix)| path.strip_prefix(prefix));
        if let Some(at) = at.and_then(|at| at.parse().ok()) {
            found.push((at, path));
        }
    }
    found.sort_unstable();
    Ok(found)
}

fn beside(dir: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(dir.file_name().unwrap_or_default());
    name.push(suffix);
    parent(dir).join(name)
}

fn parent(dir: &Path) -> &Path {
    dir.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
