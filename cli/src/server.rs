//! Commands that serve: each plane by itself, both in one process, and the first start of an installation.

use std::env;
use std::io::Write;
use std::path::PathBuf;

use clap::Subcommand;
use scaivault::dev;
use scaivault_telemetry::{Format, TelemetryConfig, TraceConfig};
use secrecy::ExposeSecret as _;
use tokio::signal::unix::{SignalKind, signal};

use crate::failure::Failure;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run both planes in this process, with an embedded store and a random operator token. For trying out: the Vault
    /// that VAULT_ADDR and VAULT_TOKEN name is federated.
    Dev {
        #[command(flatten)]
        options: dev::Options,
        /// Export traces to this collector, OTLP over gRPC, e.g. http://localhost:4317
        #[arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT", value_name = "URL")]
        otlp_endpoint: Option<String>,
    },
    /// Run the control plane.
    ControlPlane(Box<scaivault_control_plane::config::Options>),
    /// Run a data-plane node.
    DataPlane(Box<scaivault_data_plane::config::Options>),
    /// Look after an installation.
    #[command(subcommand)]
    Operator(Operator),
}

#[derive(Debug, Subcommand)]
pub(crate) enum Operator {
    /// Make an installation: root key file (if there is none), certificate authority, first tenant and operator token.
    Init {
        #[command(flatten)]
        options: Box<scaivault_control_plane::config::Options>,
        /// Write the operator token here, mode 0600, instead of printing it.
        #[arg(long, value_name = "FILE")]
        token_file: Option<PathBuf>,
        /// Leave an existing installation as it is, and succeed.
        #[arg(long)]
        if_needed: bool,
    },
}

pub(crate) fn run(command: Command, out: &mut dyn Write) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::usage(format!("no runtime: {error}"), "free file descriptors or memory"))?;
    let outcome = runtime.block_on(async {
        match command {
            Command::Dev { options, otlp_endpoint } => dev(options, otlp_endpoint, out).await,
            Command::ControlPlane(options) => scaivault_control_plane::run::run(*options).await,
            Command::DataPlane(options) => scaivault_data_plane::run::run(*options).await,
            Command::Operator(Operator::Init { options, token_file, if_needed }) => {
                if let Some(token) =
                    scaivault_control_plane::run::init(*options, token_file, if_needed).await?
                {
                    writeln!(out, "{}", token.expose_secret())?;
                }
                Ok(())
            }
        }
    });
    outcome.map_err(|error| Failure::server(format!("{error:#}"), "see `scaivault help` for the settings"))
}

async fn dev(
    options: dev::Options,
    otlp_endpoint: Option<String>,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    let logs = TelemetryConfig { format: Format::Pretty, filter: Some(options.log.clone()) };
    let traces = TraceConfig { service: "scaivault-dev", endpoint: otlp_endpoint, sample_ratio: None };
    let traces = scaivault_telemetry::init_with_traces(logs, traces)?;
    let running = dev::start(&options).await?;
    let vault = match dev::vault::Vault::from_variables(|name| env::var(name).ok()) {
        Ok(None) => Ok(None),
        Ok(Some(vault)) => vault.federate(&running).await.map(Some),
        Err(error) => Err(error),
    };
    writeln!(out, "ScaiVault is ready, in dev mode: plaintext on loopback.\n")?;
    writeln!(out, "  export SCAIVAULT_ADDR=http://{}", running.node)?;
    writeln!(out, "  export SCAIVAULT_TOKEN={}\n", running.token.expose_secret())?;
    writeln!(out, "  scaivault put hello name=world && scaivault get hello\n")?;
    match vault {
        Ok(None) => {}
        Ok(Some(federated)) => writeln!(out, "{federated}")?,
        Err(why) => writeln!(out, "Your own Vault is not served here: {why:#}\n")?,
    }
    writeln!(out, "Ctrl-C stops it.")?;
    out.flush()?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    running.stop().await;
    traces.flush().await;
    Ok(())
}
