//! `scaivault`: one secrets API in front of every store, from the command line.

mod client;
mod connection;
mod failure;
mod json;
mod output;
mod parse;
mod server;

use std::io::{self, BufWriter, IsTerminal as _, Write as _};
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};
use clap_complete::Shell;

use crate::connection::{Connect, Credentials};
use crate::failure::{Exit, Failure};
use crate::output::{Format, Output};

/// One secrets API in front of HashiCorp Vault and ScaiVault's own store.
#[derive(Debug, Parser)]
#[command(name = "scaivault", version, arg_required_else_help = true)]
struct Cli {
    /// How to print answers.
    #[arg(short, long, global = true, value_enum, default_value_t, value_name = "FORMAT")]
    output: Format,
    #[command(flatten)]
    connect: Connect,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    #[command(flatten)]
    Client(client::Command),
    #[command(flatten)]
    Server(server::Command),
    /// Print a completion script for a shell.
    Completion {
        /// The shell.
        shell: Shell,
    },
}

fn main() -> ExitCode {
    rustls::crypto::aws_lc_rs::default_provider()
        .install_default()
        .expect("nothing ran before that installed one");
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(told) => {
            let exit = if told.use_stderr() { Exit::Usage } else { Exit::Ok };
            return if told.print().is_ok() { exit.into() } else { Exit::ReaderGone.into() };
        }
    };
    match run(cli) {
        Ok(()) => Exit::Ok.into(),
        Err(failure) => {
            let colour =
                io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
            failure.tell(&mut io::stderr().lock(), colour);
            failure.exit().into()
        }
    }
}

fn run(cli: Cli) -> Result<(), Failure> {
    let mut stdout = BufWriter::new(io::stdout().lock());
    match cli.command {
        Command::Client(command) => {
            let terminal = io::stdout().is_terminal();
            let mut output = Output {
                out: &mut stdout,
                notes: &mut io::stderr().lock(),
                input: &mut io::stdin().lock(),
                format: cli.output,
                terminal,
                watched: io::stderr().is_terminal(),
            };
            let credentials = Credentials::from_environment(&cli.connect)?;
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| {
                    Failure::usage(format!("no runtime: {error}"), "free file descriptors or memory")
                })?;
            runtime.block_on(client::run(command, &cli.connect, credentials, &mut output))?;
        }
        Command::Server(command) => server::run(command, &mut stdout)?,
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "scaivault", &mut script);
            stdout.write_all(&script)?;
        }
    }
    stdout.flush()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
