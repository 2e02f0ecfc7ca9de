//! A node as a process: settings, logs, signals.

use secrecy::SecretString;
use tokio::signal::unix::{SignalKind, signal};

use crate::app;
use crate::config::Options;

/// The environment variable with the join token, for where there is no file.
const JOIN_TOKEN: &str = "SCAIVAULT_JOIN_TOKEN";

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// What keeps it from starting, and what to do about it.
pub async fn run(options: Options) -> anyhow::Result<()> {
    let options = options.with_file()?;
    let (logs, traces) = options.telemetry();
    let traces = scaivault_telemetry::init_with_traces(logs, traces)?;
    let token = std::env::var(JOIN_TOKEN).ok().filter(|text| !text.is_empty()).map(SecretString::from);
    let node = app::start(options.parse()?, token).await?;
    tracing::info!(address = %node.address, "the node serves");
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping");
    node.stop().await;
    traces.flush().await;
    Ok(())
}
