//! The executable of the control plane.

use clap::Parser;

#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(flatten)]
    options: scaivault_control_plane::config::Options,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    rustls::crypto::aws_lc_rs::default_provider()
        .install_default()
        .expect("nothing ran before that installed one");
    scaivault_control_plane::run::run(Cli::parse().options).await
}
