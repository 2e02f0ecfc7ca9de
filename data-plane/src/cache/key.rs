//! Where the key comes from that a node's own files are sealed with.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::str::FromStr;
use std::time::Duration;

use scaivault_seal::{Keyring, RootKey, RootKeyError, UnwrapError};
use secrecy::SecretString;
use tokio::io::AsyncReadExt as _;
use tokio::process::Command;
use tokio::time::timeout;
use zeroize::Zeroizing;

const ROOT_FILE: &str = "node.key";
const RING_FILE: &str = "node.keyring";
/// How long a command may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// More than a key in base64 has.
const OUTPUT_BYTES: u64 = 1024;

/// Where the root key of a node is. It wraps the key ring beside the node's files, unless there is none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum KeySource {
    /// In the data directory, made at the first start: `file`.
    #[default]
    File,
    /// In an environment variable, in base64: `env:NAME`.
    Environment(String),
    /// What a command writes, in base64: `command:PROGRAM ARGUMENT…`. There is no shell and no quoting.
    Command(Vec<String>),
    /// Nowhere: a ring that dies with the process, so that nothing can be read after a restart: `memory`.
    Memory,
}

/// Why there is no key, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// No such source.
    #[error("`{0}` is no source of a key: use `file`, `env:NAME`, `command:PROGRAM ARGUMENT…` or `memory`")]
    Source(String),
    /// The variable is not set, or is no text.
    #[error("the environment variable {0} has no key: set it, or use another source")]
    Variable(String),
    /// The command cannot be run.
    #[error("cannot run `{program}` for the key")]
    Run {
        /// Which program.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// The command failed.
    #[error("`{program}` gave no key: {status}")]
    Failed {
        /// Which program.
        program: String,
        /// How it ended.
        status: ExitStatus,
    },
    /// The command did not end.
    #[error("`{0}` gave no key within 10 seconds")]
    Slow(String),
    /// What was given is no key, or its file cannot be used.
    #[error(transparent)]
    Root(#[from] RootKeyError),
    /// The key ring was wrapped by another key, or is damaged.
    #[error(
        "{path} cannot be opened: use the key that it was made with, or remove it and lose what the node has on disk"
    )]
    Ring {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: UnwrapError,
    },
    /// The key ring cannot be read or written.
    #[error("cannot use the key ring at {path}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl FromStr for KeySource {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        let none = || KeyError::Source(text.to_owned());
        match text.split_once(':') {
            None if text == "file" => Ok(KeySource::File),
            None if text == "memory" => Ok(KeySource::Memory),
            Some(("env", name)) if !name.is_empty() => Ok(KeySource::Environment(name.to_owned())),
            Some(("command", line)) => {
                let words: Vec<_> = line.split_whitespace().map(str::to_owned).collect();
                if words.is_empty() { Err(none()) } else { Ok(KeySource::Command(words)) }
            }
            _ => Err(none()),
        }
    }
}

impl KeySource {
    /// The node's key ring. It is made in `data_dir` if there is none.
    ///
    /// # Errors
    /// Each says what to do.
    pub async fn keyring(&self, data_dir: &Path) -> Result<Keyring, KeyError> {
        let root = match self {
            KeySource::Memory => return Ok(Keyring::generate()),
            KeySource::File => {
                let path = data_dir.join(ROOT_FILE);
                match RootKey::from_file(&path) {
                    Err(RootKeyError::Missing(_)) => RootKey::create_file(&path)?,
                    read => read?,
                }
            }
            KeySource::Environment(name) => {
                let text = std::env::var(name).map_err(|_| KeyError::Variable(name.clone()))?;
                RootKey::from_base64(&SecretString::from(text))?
            }
            KeySource::Command(words) => RootKey::from_base64(&output(words).await?)?,
        };
        ring(&data_dir.join(RING_FILE), &root)
    }
}

/// What the command writes. It has the node's environment and standard error, and nothing to read.
async fn output(words: &[String]) -> Result<SecretString, KeyError> {
    let [program, arguments @ ..] = words else { return Err(KeyError::Source(String::new())) };
    let failed = |source| KeyError::Run { program: program.clone(), source };
    let run = async {
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let mut text = Zeroizing::new(Vec::with_capacity(OUTPUT_BYTES as usize));
        if let Some(stdout) = child.stdout.take() {
            stdout.take(OUTPUT_BYTES).read_to_end(&mut text).await?;
        }
        Ok((child.wait().await?, text))
    };
    let (status, text) =
        timeout(PATIENCE, run).await.map_err(|_| KeyError::Slow(program.clone()))?.map_err(failed)?;
    if !status.success() {
        return Err(KeyError::Failed { program: program.clone(), status });
    }
    let text = std::str::from_utf8(&text).map_err(|_| RootKeyError::NoKey)?;
    Ok(text.trim_ascii_end().into())
}

fn ring(path: &Path, root: &RootKey) -> Result<Keyring, KeyError> {
    let unusable = |source| KeyError::Io { path: path.to_owned(), source };
    match fs::read(path) {
        Ok(wrapped) => {
            Keyring::unwrap(&wrapped, root).map_err(|source| KeyError::Ring { path: path.to_owned(), source })
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let ring = Keyring::generate();
            write_whole(path, &ring.wrap(root)).map_err(unusable)?;
            Ok(ring)
        }
        Err(error) => Err(unusable(error)),
    }
}

/// Half a ring would stop every start after this one.
fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    fs::File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    /// 32 bytes in base64.
    const KEY: &str = "q6urq6urq6urq6urq6urq6urq6urq6urq6urq6urq6s=";

    fn command(words: &[&str]) -> KeySource {
        KeySource::Command(words.iter().map(|word| (*word).to_owned()).collect())
    }

    fn opens(one: &Keyring, other: &Keyring) -> bool {
        other.open("", "test", b"", &one.cipher("", "test").seal(b"", b"x")).is_ok()
    }

    #[test]
    fn sources_have_names() {
        assert_eq!("file".parse::<KeySource>().unwrap(), KeySource::File);
        assert_eq!("memory".parse::<KeySource>().unwrap(), KeySource::Memory);
        assert_eq!("env:A".parse::<KeySource>().unwrap(), KeySource::Environment("A".into()));
        assert_eq!("command: kms  open key ".parse::<KeySource>().unwrap(), command(&["kms", "open", "key"]));
        for text in ["", "File", "env:", "env", "command:", "command: ", "kms"] {
            assert!(text.parse::<KeySource>().is_err(), "{text}");
        }
    }

    #[tokio::test]
    async fn a_ring_is_made_once_and_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let made = KeySource::File.keyring(dir.path()).await.unwrap();
        assert!(opens(&made, &KeySource::File.keyring(dir.path()).await.unwrap()));
        for file in [ROOT_FILE, RING_FILE] {
            let mode = fs::metadata(dir.path().join(file)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{file}");
        }
    }

    #[tokio::test]
    async fn a_ring_of_another_key_is_refused_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        KeySource::File.keyring(dir.path()).await.unwrap();
        let refused = command(&["echo", KEY]).keyring(dir.path()).await.unwrap_err();
        assert!(matches!(refused, KeyError::Ring { source: UnwrapError::WrongRootKey, .. }), "{refused}");
        KeySource::File.keyring(dir.path()).await.expect("nothing was changed");
    }

    #[tokio::test]
    async fn a_command_gives_the_key_and_no_file_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let source = command(&["echo", KEY]);
        let made = source.keyring(dir.path()).await.unwrap();
        assert!(opens(&made, &source.keyring(dir.path()).await.unwrap()));
        assert!(!dir.path().join(ROOT_FILE).exists());
    }

    #[tokio::test]
    async fn a_command_that_gives_no_key_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let refused = async |words: &[&str]| command(words).keyring(dir.path()).await.unwrap_err();
        assert!(matches!(refused(&["false"]).await, KeyError::Failed { .. }));
        assert!(matches!(refused(&["echo", "no key"]).await, KeyError::Root(RootKeyError::NoKey)));
        assert!(matches!(refused(&["/nowhere/at-all"]).await, KeyError::Run { .. }));
        assert!(matches!(refused(&["cat", "/dev/zero"]).await, KeyError::Failed { .. }));
        assert!(!dir.path().join(RING_FILE).exists());
    }

    #[tokio::test(start_paused = true)]
    async fn a_command_that_hangs_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let refused = command(&["sleep", "600"]).keyring(dir.path()).await.unwrap_err();
        assert!(matches!(refused, KeyError::Slow(_)), "{refused}");
    }

    #[tokio::test]
    async fn a_variable_that_is_not_set_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let source = KeySource::Environment("SCAIVAULT_TEST_NO_SUCH_VARIABLE".into());
        let refused = source.keyring(dir.path()).await.unwrap_err();
        assert!(refused.to_string().contains("SCAIVAULT_TEST_NO_SUCH_VARIABLE"));
    }

    #[tokio::test]
    async fn a_ring_in_memory_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let one = KeySource::Memory.keyring(dir.path()).await.unwrap();
        assert!(!opens(&one, &KeySource::Memory.keyring(dir.path()).await.unwrap()));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
