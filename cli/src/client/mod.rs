//! The commands that ask a server. Each parses its input, makes its calls, prints one answer.

mod admin;
mod audit;
mod backend;
mod events;
mod policy;
mod secrets;
mod sync;
#[cfg(test)]
mod tests;
mod token;
mod wire;

use clap::Subcommand;

use crate::connection::{self, Connect, Connection, Credentials};
use crate::failure::Failure;
use crate::output::{Format, Output};

/// What a server can be asked.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Read a secret.
    Get(secrets::Get),
    /// Write a new version of a secret.
    Put(secrets::Put),
    /// List what lies in a folder.
    List(secrets::List),
    /// Delete a secret; its versions are kept.
    Delete(secrets::Delete),
    /// List the versions of a secret, without values.
    Versions(secrets::Versions),
    /// Federated stores.
    #[command(subcommand)]
    Backend(backend::Command),
    /// What happened to backends.
    Events(events::Events),
    /// Tokens of the tenant.
    #[command(subcommand)]
    Token(token::Command),
    /// Which paths a token may use.
    #[command(subcommand)]
    Policy(policy::Command),
    /// Tenants of the installation (operators only).
    #[command(subcommand)]
    Tenant(admin::Tenant),
    /// Data-plane nodes of the installation (operators only).
    #[command(subcommand)]
    Node(admin::Node),
    /// Who did what.
    #[command(subcommand)]
    Audit(audit::Command),
    /// Tell by the exit code whether the server is ready; needs no token.
    Health,
}

/// Does what was asked.
pub(crate) async fn run(
    command: Command,
    connect: &Connect,
    credentials: Credentials,
    output: &mut Output<'_>,
) -> Result<(), Failure> {
    if output.format == Format::Raw && !matches!(command, Command::Get(_)) {
        return Err(Failure::usage("`-o raw` is for `get` only", "use `-o table`, `json` or `yaml`"));
    }
    if matches!(command, Command::Health) {
        return health(connect).await;
    }
    let to = Connection::open(connect, &credentials).await?;
    match command {
        Command::Get(get) => get.run(&to, output).await,
        Command::Put(put) => put.run(&to, output).await,
        Command::List(list) => list.run(&to, output).await,
        Command::Delete(delete) => delete.run(&to, output).await,
        Command::Versions(versions) => versions.run(&to, output).await,
        Command::Backend(command) => command.run(&to, output).await,
        Command::Events(events) => events.run(&to, output).await,
        Command::Token(command) => command.run(&to, output).await,
        Command::Policy(command) => command.run(&to, output).await,
        Command::Tenant(command) => command.run(&to, output).await,
        Command::Node(command) => command.run(&to, output).await,
        Command::Audit(command) => command.run(&to, output).await,
        Command::Health => Ok(()),
    }
}

async fn health(connect: &Connect) -> Result<(), Failure> {
    match connection::readiness(connect).await? {
        http::StatusCode::OK => Ok(()),
        status => Err(Failure::server(
            format!("the server at {} is not ready: {status}", connect.addr),
            "wait until it is, or look into its log",
        )),
    }
}
