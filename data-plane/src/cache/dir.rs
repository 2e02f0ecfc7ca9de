//! The directory of the cache: for one process, for nobody else to read, and set aside when it is of no use.
//!
//! sled is not given files that somebody else may have changed: it was seen to loop for ever, to take all memory and to
//! crash on damaged ones, which no `catch_unwind` catches. So a file beside the directory says how it was left. Closed:
//! then its files have the checksum that is noted. Open, by a process that died: then the kernel still has what it wrote,
//! if the machine runs since. Everything else is set aside.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, Read as _};
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use scaivault_domain::time::Timestamp;

/// How many directories that were set aside are kept.
const KEPT: usize = 2;
/// After so many attempts to open a directory that did not end, it is not tried again.
const ATTEMPTS: u32 = 2;
/// What is noted is overwritten in place, which works on a full disk too.
const NOTE_BYTES: usize = 64;

/// Why a directory was not locked.
#[derive(Debug)]
pub(super) enum LockError {
    InUse,
    Io(io::Error),
}

/// The directory is this process's while this lives.
#[derive(Debug)]
pub(super) struct Lock {
    dir: PathBuf,
    /// Of the file beside it.
    file: File,
}

/// How a directory was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    Closed(u32),
    Open {
        boot: u128,
        /// How often opening it began and did not end.
        attempts: u32,
    },
}

impl Lock {
    pub(super) fn take(dir: &Path) -> Result<Self, LockError> {
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .mode(0o600)
            .open(beside(dir, ".lock"))
            .map_err(LockError::Io)?;
        match lock_soon(&file) {
            Ok(()) => Ok(Lock { dir: dir.to_owned(), file }),
            Err(TryLockError::WouldBlock) => Err(LockError::InUse),
            Err(TryLockError::Error(error)) => Err(LockError::Io(error)),
        }
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Notes that opening the directory begins, or says why it must not.
    pub(super) fn begin(&self) -> Result<(), String> {
        let fresh = fs::read_dir(&self.dir).map_or(true, |mut files| files.next().is_none());
        let attempts = match self.left() {
            _ if fresh => 0,
            Some(Left::Closed(sum)) => match checksum(&self.dir) {
                Ok(is) if is == sum => 0,
                Ok(_) => return Err("its files were changed after it was closed".into()),
                Err(error) => return Err(error.to_string()),
            },
            Some(Left::Open { attempts, .. }) if attempts >= ATTEMPTS => {
                return Err("the process died whenever it was opened".into());
            }
            Some(Left::Open { boot, attempts }) if boot == this_boot() => attempts,
            Some(Left::Open { .. }) => return Err("the machine went down while it was open".into()),
            None => return Err("nothing says how it was left".into()),
        };
        self.note(Left::Open { boot: this_boot(), attempts: attempts + 1 });
        Ok(())
    }

    /// The directory was opened.
    pub(super) fn opened(&self) {
        self.note(Left::Open { boot: this_boot(), attempts: 0 });
    }

    /// The directory was closed, and nothing writes to it any more.
    pub(super) fn closed(&self) {
        match checksum(&self.dir) {
            Ok(sum) => self.note(Left::Closed(sum)),
            Err(error) => tracing::warn!(%error, "the cache is closed and cannot be read"),
        }
    }

    /// Takes the directory away from whoever starts next. Files that are open stay readable.
    pub(super) fn discard(&self) {
        if let Err(error) = fs::remove_dir_all(&self.dir) {
            tracing::error!(%error, "the cache cannot be removed: remove it before the next start");
        }
    }

    /// Moves the directory out of the way, for an investigation. Only the last ones are kept.
    pub(super) fn set_aside(&self, now: Timestamp) -> io::Result<()> {
        let mut at = now.as_millis();
        let mut aside = beside(&self.dir, &format!(".broken-{at}"));
        while aside.exists() {
            at += 1;
            aside = beside(&self.dir, &format!(".broken-{at}"));
        }
        if let Err(error) = fs::rename(&self.dir, &aside) {
            tracing::warn!(%error, "the cache cannot be set aside and is removed");
            return fs::remove_dir_all(&self.dir);
        }
        for (_, old) in set_aside_before(&self.dir)?.into_iter().rev().skip(KEPT) {
            fs::remove_dir_all(&old).or_else(|_| fs::remove_file(&old))?;
        }
        Ok(())
    }

    fn left(&self) -> Option<Left> {
        let mut note = [0; NOTE_BYTES];
        self.file.read_exact_at(&mut note, 0).ok()?;
        let words: Vec<&str> = std::str::from_utf8(&note).ok()?.split_whitespace().collect();
        match words[..] {
            ["closed", sum] => Some(Left::Closed(u32::from_str_radix(sum, 16).ok()?)),
            ["open", boot, attempts] => Some(Left::Open {
                boot: u128::from_str_radix(boot, 16).ok()?,
                attempts: attempts.parse().ok()?,
            }),
            _ => None,
        }
    }

    /// A note that is not made costs the directory, which is no more than it is worth.
    fn note(&self, left: Left) {
        let text = match left {
            Left::Closed(sum) => format!("closed {sum:x}"),
            Left::Open { boot, attempts } => format!("open {boot:x} {attempts}"),
        };
        if let Err(error) = self.file.write_all_at(format!("{text:<NOTE_BYTES$}").as_bytes(), 0) {
            tracing::warn!(%error, "cannot note how the cache is left");
        }
    }
}

/// Locks a file, and waits a little for it: a process that is being started has what its parent had open, until it runs
/// its own program.
pub(super) fn lock_soon(file: &File) -> Result<(), TryLockError> {
    for _ in 0..100 {
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => thread::sleep(Duration::from_millis(10)),
            done => return done,
        }
    }
    file.try_lock()
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

/// What the machine's run since its start is known by. Another one each time if it cannot be told.
fn this_boot() -> u128 {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    u128::from_str_radix(&id.trim_end().replace('-', ""), 16)
        .unwrap_or_else(|_| u128::from(std::process::id()))
}

/// Of all files and their names.
fn checksum(dir: &Path) -> io::Result<u32> {
    let mut names = Vec::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let into = if entry.file_type()?.is_dir() { &mut dirs } else { &mut names };
            into.push(entry.path());
        }
    }
    names.sort_unstable();
    let mut sum = crc32fast::Hasher::new();
    let mut buffer = vec![0; 256 * 1024];
    for name in names {
        sum.update(name.strip_prefix(dir).unwrap_or(&name).as_os_str().as_encoded_bytes());
        let mut file = File::open(&name)?;
        sum.update(&file.metadata()?.len().to_be_bytes());
        loop {
            match file.read(&mut buffer)? {
                0 => break,
                read => sum.update(&buffer[..read]),
            }
        }
    }
    Ok(sum.finalize())
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
