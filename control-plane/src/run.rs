//! The control plane as a process: settings, logs, signals.

use anyhow::Context as _;
use secrecy::{ExposeSecret as _, SecretString};
use std::path::PathBuf;

use crate::config::Options;
use crate::{app, bootstrap};

/// The environment variable with the root key, for where there is no file.
const ROOT_KEY: &str = "SCAIVAULT_ROOT_KEY";

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// What keeps it from starting, and what to do about it.
pub async fn run(options: Options) -> anyhow::Result<()> {
    let options = options.with_file()?;
    let (logs, traces) = options.telemetry();
    let traces = scaivault_telemetry::init_with_traces(logs, traces)?;
    let root = options.root_key(from_environment(ROOT_KEY))?;
    let store = bootstrap::open_store(options.data_dir())?;
    let running = app::start(options.parse()?, store, &root).await?;
    tracing::info!(public = %running.public, nodes = %running.nodes, "the control plane is ready");
    stopped().await?;
    tracing::info!("stopping");
    running.stop().await;
    traces.flush().await;
    Ok(())
}

/// Makes an installation in the data directory, with a root key file if there is none yet, and gives the first operator
/// token: to `token_file` (mode 0600), or to be printed. With `if_needed` an existing installation is left as it is.
///
/// # Errors
/// When there is one already, or it cannot be made.
pub async fn init(
    options: Options,
    token_file: Option<PathBuf>,
    if_needed: bool,
) -> anyhow::Result<Option<SecretString>> {
    let options = options.with_file()?;
    let store = bootstrap::open_store(options.data_dir())?;
    if if_needed && bootstrap::is_initialised(&*store).await? {
        return Ok(None);
    }
    let root = match &options.root_key_file {
        Some(path) if !path.exists() => scaivault_seal::RootKey::create_file(path)?,
        _ => options.root_key(from_environment(ROOT_KEY))?,
    };
    // Before the commit: an installation whose first token was lost could not be used.
    let mut file = match &token_file {
        Some(path) => Some(new_file(path).with_context(|| format!("cannot make {}", path.display()))?),
        None => None,
    };
    let made = bootstrap::initialise(store, &root, &scaivault_telemetry::SystemClock).await;
    if let (Err(_), Some(path)) = (&made, &token_file) {
        // An empty file would be in the way of the next try.
        let _ = std::fs::remove_file(path);
    }
    let token = made?;
    match &mut file {
        None => Ok(Some(token)),
        Some(file) => {
            use std::io::Write as _;
            file.write_all(token.expose_secret().as_bytes())?;
            file.sync_all()?;
            Ok(None)
        }
    }
}

fn new_file(path: &std::path::Path) -> std::io::Result<std::fs::File> {
    use std::os::unix::fs::OpenOptionsExt as _;
    std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

fn from_environment(name: &str) -> Option<SecretString> {
    std::env::var(name).ok().filter(|text| !text.is_empty()).map(SecretString::from)
}

/// Waits for SIGTERM or SIGINT.
async fn stopped() -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}
