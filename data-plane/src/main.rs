//! The executable of a data-plane node, without any login code.

use clap::Parser;

#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(flatten)]
    options: scaivault_data_plane::config::Options,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    rustls::crypto::aws_lc_rs::default_provider()
        .install_default()
        .expect("nothing ran before that installed one");
    scaivault_data_plane::run::run(Cli::parse().options).await
}
